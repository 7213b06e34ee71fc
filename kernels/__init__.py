"""Metal, CUDA and CPU kernels behind one face, with pure-MLX fallbacks.

Empty so far. Knows nothing of models.
"""
