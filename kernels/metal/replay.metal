// The state after sizes[1] of the sizes[0] rows on a tape: delta.metal's updates, in its order and
// roundings, with the products that the tape saves left out.
const int lane = thread_index_in_simdgroup;
const int head = threadgroup_position_in_grid.y;
const int row =
    int(threadgroup_position_in_grid.x) * SIMDGROUPS + int(simdgroup_index_in_threadgroup);
if (row >= DV) {
  return;
}
const int batch = head / HV;
const int hv = head % HV;
const int hk = hv / (HV / HK);
const size_t base = (size_t(head) * DV + row) * DK;
const int steps = sizes[0];
const int keep = sizes[1];
for (int i = 0; i < DK / 32; ++i) {
  const int j = i * 32 + lane;
  float s = state[base + j];
  for (int t = 0; t < keep; ++t) {
    const int at = batch * steps + t;
    const int head_at = at * HV + hv;
    s = s * float(g[VECTOR ? head_at * DK + j : head_at]);
    s = fma(float(k[(at * HK + hk) * DK + j]), d[head_at * DV + row], s);
  }
  after[base + j] = s;
}
