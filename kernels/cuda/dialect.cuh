// Metal's words in CUDA's, so that the sources in kernels/metal serve both. A simdgroup is a warp.

__device__ inline float simd_sum(float x) {
  for (int mask = 16; mask > 0; mask /= 2) {
    x += __shfl_xor_sync(0xFFFFFFFFu, x, mask);
  }
  return x;
}

__device__ inline float simd_max(float x) {
  for (int mask = 16; mask > 0; mask /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, mask));
  }
  return x;
}

template <typename To>
__device__ inline To as_type(uint32_t bits) {
  return __uint_as_float(bits);
}

#define thread
#define threadgroup __shared__
#define threadgroup_barrier(flags) __syncthreads()
#define thread_index_in_simdgroup (threadIdx.x % 32)
#define simdgroup_index_in_threadgroup (threadIdx.x / 32)
#define thread_position_in_threadgroup threadIdx
#define threadgroup_position_in_grid blockIdx
#define inline __device__ inline
