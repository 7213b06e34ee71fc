"""Compressed KV caches: codec, cache kinds, their attention, save and load.

Empty so far. Will depend on `kernels`; knows nothing of disks.
"""
