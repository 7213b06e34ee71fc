// What codes.metal found of each span, put together for one row: sums are brought to one top.
// sizes as there; at most SPLITS spans.
const int lane = thread_index_in_simdgroup;
const int index = thread_position_in_threadgroup.x;
const int row = threadgroup_position_in_grid.x;
const int head = threadgroup_position_in_grid.y;
const int splits = sizes[3];
const size_t from = size_t(head) * splits * R + row;
threadgroup float factors[SPLITS];
float highest = -3.4028234e38f;
for (int i = lane; i < splits; i += 32) {
  const float top = tops[from + size_t(i) * R];
  highest = top > highest ? top : highest;
}
highest = simd_max(highest);
float sum = 0.0f;
for (int i = lane; i < splits; i += 32) {
  const float factor = exp(float(tops[from + size_t(i) * R]) - highest);
  sum += factor * totals[from + size_t(i) * R];
  if (index < 32) {
    factors[i] = factor;
  }
}
sum = simd_sum(sum);
threadgroup_barrier(mem_flags::mem_threadgroup);
const size_t out = size_t(head) * R + row;
for (int c = index; c < DV; c += THREADS) {
  float merged = 0.0f;
  for (int i = 0; i < splits; ++i) {
    merged = fma(float(factors[i]), float(sums[(from + size_t(i) * R) * DV + c]), merged);
  }
  y[out * DV + c] = merged;
}
if (index == 0) {
  top[out] = highest;
  total[out] = sum;
}
