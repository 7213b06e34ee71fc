"""The kernels of kernels/metal as CUDA."""
