"""Compressed KV caches: codec, cache kinds, their attention, save and load.

Knows nothing of checkpoints. README.md states the layout that kernels read.
"""
