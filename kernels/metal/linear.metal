// y [M, N] = x [M, K] times w [N, K] transposed. A simdgroup owns OUTS outputs; each lane
// dequantizes 8 of their weights at a time and uses them for all M rows.
const int lane = thread_index_in_simdgroup;
const int first =
    (int(threadgroup_position_in_grid.x) * SIMDGROUPS + int(simdgroup_index_in_threadgroup)) * OUTS;
if (first >= N) {
  return;
}
float sum[OUTS][M];
for (int o = 0; o < OUTS; ++o) {
  for (int m = 0; m < M; ++m) {
    sum[o][m] = 0.0f;
  }
}
for (int chunk = lane; chunk < K / 8; chunk += 32) {
  float q[OUTS][8];
  for (int o = 0; o < OUTS; ++o) {
    const size_t n = first + o < N ? first + o : N - 1;
    dequantize8<BITS, MXFP4>(
        w + n * (K * BITS / 32),
        scales + n * (K / GROUP),
        biases + n * (K / GROUP),
        chunk,
        chunk * 8 / GROUP,
        q[o]);
  }
  for (int m = 0; m < M; ++m) {
    float v[8];
    for (int i = 0; i < 8; ++i) {
      v[i] = float(x[m * K + chunk * 8 + i]);
    }
    for (int o = 0; o < OUTS; ++o) {
      for (int i = 0; i < 8; ++i) {
        sum[o][m] = fma(q[o][i], v[i], sum[o][m]);
      }
    }
  }
}
for (int o = 0; o < OUTS; ++o) {
  for (int m = 0; m < M; ++m) {
    const float total = simd_sum(sum[o][m]);
    if (lane == 0 && first + o < N) {
      y[m * N + first + o] = static_cast<T>(total);
    }
  }
}
