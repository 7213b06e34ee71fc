// sizes[0] steps of a gated delta rule. A simdgroup owns one row of one head's state [DV, DK], in
// registers.
// d is the tape: what each step added along k.
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
float s[DK / 32];
for (int i = 0; i < DK / 32; ++i) {
  s[i] = state[base + i * 32 + lane];
}
for (int t = 0; t < steps; ++t) {
  const int at = batch * steps + t;
  const int keys = (at * HK + hk) * DK;
  const int head_at = at * HV + hv;
  float memory = 0.0f;
  for (int i = 0; i < DK / 32; ++i) {
    const int j = i * 32 + lane;
    s[i] = s[i] * float(g[VECTOR ? head_at * DK + j : head_at]);
    memory = fma(s[i], float(k[keys + j]), memory);
  }
  memory = simd_sum(memory);
  const float delta = (float(v[head_at * DV + row]) - memory) * float(beta[head_at]);
  float out = 0.0f;
  for (int i = 0; i < DK / 32; ++i) {
    const int j = keys + i * 32 + lane;
    s[i] = fma(float(k[j]), delta, s[i]);
    out = fma(s[i], float(q[j]), out);
  }
  out = simd_sum(out);
  if (lane == 0) {
    y[head_at * DV + row] = static_cast<T>(out);
    d[head_at * DV + row] = delta;
  }
}
for (int i = 0; i < DK / 32; ++i) {
  after[base + i * 32 + lane] = s[i];
}
