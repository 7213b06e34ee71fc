// y [P, N]: for each pair of a row and a slot, the row times the slot's weights; FUSED: silu of the
// product with wa times that with wb. The first pair of a slot works for all pairs of that slot, up
// to LOT at a time, so that each expert is read once. Pair p reads row p / PER of x.
const int lane = thread_index_in_simdgroup;
const int pair = threadgroup_position_in_grid.y;
const int first =
    (int(threadgroup_position_in_grid.x) * SIMDGROUPS + int(simdgroup_index_in_threadgroup)) * OUTS;
const int slot = slots[pair];
if (slot < 0 || slot >= SLOTS) {
  for (int n = first + lane; n < N && n < first + OUTS; n += 32) {
    y[pair * N + n] = static_cast<T>(0.0f);
  }
  return;
}
for (int p = 0; p < pair; ++p) {
  if (slots[p] == slot) {
    return;
  }
}
threadgroup int members[LOT];
threadgroup int found[2];
for (int start = pair; start < P;) {
  if (thread_position_in_threadgroup.x == 0) {
    int count = 0;
    int p = start;
    for (; p < P && count < LOT; ++p) {
      if (slots[p] == slot) {
        members[count] = p;
        ++count;
      }
    }
    found[0] = count;
    found[1] = p;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int count = found[0];
  start = found[1];
  if (first < N && count > 0) {
    float a[OUTS][LOT];
    float b[OUTS][LOT];
    for (int o = 0; o < OUTS; ++o) {
      for (int m = 0; m < LOT; ++m) {
        a[o][m] = 0.0f;
        b[o][m] = 0.0f;
      }
    }
    for (int chunk = lane; chunk < K / 8; chunk += 32) {
      float qa[OUTS][8];
      float qb[OUTS][8];
      for (int o = 0; o < OUTS; ++o) {
        const size_t row = size_t(slot) * N + (first + o < N ? first + o : N - 1);
        const size_t words = row * (K * BITS / 32);
        const size_t groups = row * (K / GROUP);
        const int group = chunk * 8 / GROUP;
        dequantize8<BITS, MXFP4>(wa + words, sa + groups, ba + groups, chunk, group, qa[o]);
        if (FUSED) {
          dequantize8<BITS, MXFP4>(wb + words, sb + groups, bb + groups, chunk, group, qb[o]);
        }
      }
      for (int m = 0; m < LOT; ++m) {
        if (m < count) {
          const int row = members[m] / PER;
          for (int i = 0; i < 8; ++i) {
            const float v = float(x[row * K + chunk * 8 + i]);
            for (int o = 0; o < OUTS; ++o) {
              a[o][m] = fma(qa[o][i], v, a[o][m]);
              if (FUSED) {
                b[o][m] = fma(qb[o][i], v, b[o][m]);
              }
            }
          }
        }
      }
    }
    for (int o = 0; o < OUTS; ++o) {
      for (int m = 0; m < LOT; ++m) {
        if (m < count) {
          float total = simd_sum(a[o][m]);
          if (FUSED) {
            const float up = simd_sum(b[o][m]);
            total = total / (1.0f + exp(-total)) * up;
          }
          if (lane == 0 && first + o < N) {
            y[members[m] * N + first + o] = static_cast<T>(total);
          }
        }
      }
    }
  }
  // The list is written anew for the next lot.
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
