// Shared by all kernels; also compiled as CUDA, through kernels/cuda/dialect.cuh. Pointers are
// template arguments because MLX puts small inputs into another address space.

// The 8 weights from 8 * chunk on of one packed row: BITS bytes, never in more than two words.
template <int BITS, typename W>
inline uint64_t packed8(W row, int chunk) {
  const int bit = chunk * 8 * BITS;
  const int word = bit / 32;
  const int shift = bit % 32;
  uint64_t bits = row[word];
  if (shift + 8 * BITS > 32) {
    bits |= uint64_t(row[word + 1]) << 32;
  }
  return bits >> shift;
}

// The index of WIDTH bits at that place of a row of codes.
template <int WIDTH, typename W>
inline uint32_t code_at(W row, int place) {
  const int bit = place * WIDTH;
  const int word = bit / 32;
  const int shift = bit % 32;
  uint32_t bits = row[word] >> shift;
  if (shift + WIDTH > 32) {
    bits |= row[word + 1] << (32 - shift);
  }
  return bits & ((1u << WIDTH) - 1u);
}

// e2m1: twice the magnitudes 0 .5 1 1.5 2 3 4 6 as hex digits, then the sign.
inline float fp4(uint32_t code) {
  const float magnitude = 0.5f * float((0xC8643210u >> (4 * (code & 7u))) & 15u);
  return code & 8u ? -magnitude : magnitude;
}

// e8m0: a power of two; 0 is 2^-127, a subnormal.
inline float e8m0(uint32_t exponent) {
  return as_type<float>(exponent == 0u ? 0x400000u : exponent << 23);
}

// MXFP4 0: affine, q * scale + bias. 1: fp4 codes times a shared power of two; biases unread.
template <int BITS, int MXFP4, typename W, typename S>
inline void dequantize8(W row, S scales, S biases, int chunk, int group, thread float (&q)[8]) {
  const uint64_t bits = packed8<BITS>(row, chunk);
  if (MXFP4) {
    const float scale = e8m0(uint32_t(scales[group]));
    for (int i = 0; i < 8; ++i) {
      q[i] = scale * fp4(uint32_t(bits >> (4 * i)) & 15u);
    }
  } else {
    const float scale = float(scales[group]);
    const float bias = float(biases[group]);
    for (int i = 0; i < 8; ++i) {
      q[i] = fma(scale, float(uint32_t(bits >> (BITS * i)) & ((1u << BITS) - 1u)), bias);
    }
  }
}
