// Attention of R rows that share a key head over SPAN of its coded tokens, 32 at a time: the sum of
// the values' points in the rotated space, y [ROWS, DV], with the top and the total of its softmax.
// Codes are unpacked once for all rows, 32 indices of 32 tokens at a time, into threadgroup memory.
// Lanes are tokens for scores and channels for values. codes_merge.metal puts the spans together.
// sizes: coded tokens, tokens that there is room for, tokens of a span, spans.
const int lane = thread_index_in_simdgroup;
const int simdgroup = simdgroup_index_in_threadgroup;
const int index = thread_position_in_threadgroup.x;
const int split = threadgroup_position_in_grid.x;
const int head = int(threadgroup_position_in_grid.y) / BLOCKS;
const int first = int(threadgroup_position_in_grid.y) % BLOCKS * ROWS;
const int rows = R - first < ROWS ? R - first : ROWS;
const int tokens = sizes[0];
const int begin = split * sizes[2];
const int end = tokens - begin < sizes[2] ? tokens : begin + sizes[2];
const size_t stored = size_t(head) * sizes[1];
const float lowest = -3.4028234e38f;

constexpr int KEY_LOT = 32 * KEY_CHANNELS;
constexpr int VALUE_LOT = 32 * VALUE_CHANNELS;
constexpr int KEY_LOTS = (D + KEY_LOT - 1) / KEY_LOT;
constexpr int VALUE_LOTS = (DV + VALUE_LOT - 1) / VALUE_LOT;
constexpr int KEY_WORDS = (D / KEY_CHANNELS * KEY_WIDTH + 31) / 32;
constexpr int VALUE_WORDS = (DV / VALUE_CHANNELS * VALUE_WIDTH + 31) / 32;
constexpr int PITCH = (KEY_LOT > VALUE_LOT ? KEY_LOT : VALUE_LOT) + 1;
constexpr int SETS = 32 * SIMDGROUPS / VALUE_LOT;
constexpr int SCORED = (ROWS + SIMDGROUPS - 1) / SIMDGROUPS;
constexpr int SUMMED = (ROWS + SETS - 1) / SETS;
threadgroup float tile[32 * PITCH];
threadgroup float weights[32 * ROWS];
threadgroup float factors[ROWS];
threadgroup float key_book[KEY_CHANNELS << KEY_WIDTH];
threadgroup float value_book[VALUE_CHANNELS << VALUE_WIDTH];
for (int i = index; i < KEY_CHANNELS << KEY_WIDTH; i += 32 * SIMDGROUPS) {
  key_book[i] = key_points[i];
}
for (int i = index; i < VALUE_CHANNELS << VALUE_WIDTH; i += 32 * SIMDGROUPS) {
  value_book[i] = value_points[i];
}

// A simdgroup's rows of scores are simdgroup, simdgroup + SIMDGROUPS, ...
float tops[SCORED];
float totals[SCORED];
for (int i = 0; i < SCORED; ++i) {
  tops[i] = lowest;
  totals[i] = 0.0f;
}
// A thread's sums are of its channel of each lot, for rows set, set + SETS, ...
const int channel = index % VALUE_LOT;
const int set = index / VALUE_LOT;
float sum[VALUE_LOTS][SUMMED];
for (int lot = 0; lot < VALUE_LOTS; ++lot) {
  for (int i = 0; i < SUMMED; ++i) {
    sum[lot][i] = 0.0f;
  }
}

for (int from = begin; from < end; from += 32) {
  float s[SCORED];
  for (int i = 0; i < SCORED; ++i) {
    s[i] = 0.0f;
  }
  for (int lot = 0; lot < KEY_LOTS; ++lot) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int at = lot * 32 + lane;
    for (int j = simdgroup; j < 32; j += SIMDGROUPS) {
      const bool there = from + j < end && at < D / KEY_CHANNELS;
      uint32_t code = 0;
      if (there) {
        code = code_at<KEY_WIDTH>(key_words + (stored + from + j) * KEY_WORDS, at);
      }
      for (int e = 0; e < KEY_CHANNELS; ++e) {
        tile[j * PITCH + lane * KEY_CHANNELS + e] =
            there ? float(key_book[code * KEY_CHANNELS + e]) : 0.0f;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int channels = D - lot * KEY_LOT < KEY_LOT ? D - lot * KEY_LOT : KEY_LOT;
    const size_t queries = (size_t(head) * R + first) * D + lot * KEY_LOT;
    for (int c = 0; c < channels; ++c) {
      const float k = tile[lane * PITCH + c];
      for (int i = 0; i < SCORED; ++i) {
        const int row = simdgroup + i * SIMDGROUPS;
        if (row < rows) {
          s[i] = fma(float(q[queries + size_t(row) * D + c]), k, s[i]);
        }
      }
    }
  }

  const bool there = from + lane < end;
  const size_t token = stored + (there ? from + lane : begin);
  const float key_scale = float(key_scales[token]);
  const float value_scale = float(value_scales[token]);
  for (int i = 0; i < SCORED; ++i) {
    const int row = simdgroup + i * SIMDGROUPS;
    if (row < rows) {
      float score = lowest;
      if (there) {
        score = s[i] * key_scale;
        if (BIASED) {
          score += bias[size_t((first + row) % T) * tokens + from + lane];
        }
        score = score > lowest ? score : lowest;
      }
      float top = simd_max(score);
      top = top > tops[i] ? top : tops[i];
      const float weight = there ? exp(score - top) : 0.0f;
      const float factor = exp(tops[i] - top);
      totals[i] = totals[i] * factor + simd_sum(weight);
      tops[i] = top;
      weights[row * 32 + lane] = weight * value_scale;
      if (lane == 0) {
        factors[row] = factor;
      }
    }
  }

#pragma unroll
  for (int lot = 0; lot < VALUE_LOTS; ++lot) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int at = lot * 32 + lane;
    for (int j = simdgroup; j < 32; j += SIMDGROUPS) {
      const bool there = from + j < end && at < DV / VALUE_CHANNELS;
      uint32_t code = 0;
      if (there) {
        code = code_at<VALUE_WIDTH>(value_words + (stored + from + j) * VALUE_WORDS, at);
      }
      for (int e = 0; e < VALUE_CHANNELS; ++e) {
        tile[j * PITCH + lane * VALUE_CHANNELS + e] =
            there ? float(value_book[code * VALUE_CHANNELS + e]) : 0.0f;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = 0; i < SUMMED; ++i) {
      const int row = set + i * SETS;
      if (row < rows) {
        sum[lot][i] *= factors[row];
      }
    }
    for (int j = 0; j < 32; ++j) {
      const float v = tile[j * PITCH + channel];
      for (int i = 0; i < SUMMED; ++i) {
        const int row = set + i * SETS;
        if (row < rows) {
          sum[lot][i] = fma(float(weights[row * 32 + j]), v, sum[lot][i]);
        }
      }
    }
  }
}

const size_t out = (size_t(head) * sizes[3] + split) * R + first;
for (int i = 0; i < SCORED; ++i) {
  const int row = simdgroup + i * SIMDGROUPS;
  if (lane == 0 && row < rows) {
    top[out + row] = tops[i];
    total[out + row] = totals[i];
  }
}
#pragma unroll
for (int lot = 0; lot < VALUE_LOTS; ++lot) {
  const int c = lot * VALUE_LOT + channel;
  for (int i = 0; i < SUMMED; ++i) {
    const int row = set + i * SETS;
    if (row < rows && c < DV) {
      y[(out + row) * DV + c] = sum[lot][i];
    }
  }
}
