// Matrix products of small operands in cache, sums in float.
//
// E is an operand's element: bfloat16 bits, two to a lane, or float. The right operand is packed in strips of 64
// columns: [columns / 64][depth / lane][64][lane].
#pragma once
#include "vectors.h"

namespace {

constexpr int64_t STRIP = 64, ROWS = 6;
// Depth that all rows go through together: with it 64 KiB of a strip of floats are in use, an eighth of a small L2.
constexpr int64_t DEPTH = 256;
// Vectors of a row whose sums are in registers at once: 6 x 4 of the 32 that AVX-512 has, 6 x 2 of AVX2's 16.
constexpr int64_t AT_ONCE = WIDTH == 16 ? 4 : 2;

template <class E>
struct Operand;

template <>
struct Operand<float> {
  static constexpr int64_t lane = 1;
  static Floats multiply_add(Floats sum, const float* a, const float* b) { return sum + *a * load(b); }
  static void write_packed(float* to, Floats first, Floats) { store(to, first); }
};

template <>
struct Operand<Bfloat16> {
  static constexpr int64_t lane = 2;
  static Floats multiply_add(Floats sum, const Bfloat16* a, const Bfloat16* b) {
    int32_t pair;
    std::memcpy(&pair, a, sizeof pair);
#if defined(__AVX512BF16__)
    __m512i bits = _mm512_loadu_si512(b);
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)bits);
#else
    Bits left = Bits{} + (uint32_t)pair, right;
    std::memcpy(&right, b, sizeof right);
    sum += (Floats)(left << 16) * (Floats)(right << 16);
    return sum + (Floats)(left & 0xffff0000u) * (Floats)(right & 0xffff0000u);
#endif
  }
  static void write_packed(Bfloat16* to, Floats first, Floats second) {
    Bits pairs = rounded_to_bfloat16(first) | (rounded_to_bfloat16(second) << 16);
    std::memcpy(to, &pairs, sizeof pairs);
  }
};

// C (R x 64, row stride ldc) += A (R x depth, row stride lda) * B (one packed strip), R at most ROWS.
template <class E, int R>
inline void multiply_rows(int64_t depth, const E* a, int64_t lda, const E* b, float* c, int64_t ldc) {
  constexpr int64_t lane = Operand<E>::lane;
  for (int64_t begin = 0; begin < STRIP; begin += AT_ONCE * WIDTH) {
    Floats total[R][AT_ONCE];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < AT_ONCE; ++v) total[r][v] = load(c + r * ldc + begin + v * WIDTH);
    for (int64_t k = 0; k < depth; k += lane) {
      const E* row = b + k * STRIP + begin * lane;
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < AT_ONCE; ++v)
          total[r][v] = Operand<E>::multiply_add(total[r][v], a + r * lda + k, row + v * WIDTH * lane);
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < AT_ONCE; ++v) store(c + r * ldc + begin + v * WIDTH, total[r][v]);
  }
}

// Sums go on from one part of the depth to the next.
template <class E>
void multiply(int64_t rows, int64_t strips, int64_t depth, const E* a, int64_t lda, const E* b, int64_t strip_stride,
              float* c, int64_t ldc) {
  for (int64_t s = 0; s < strips; ++s)
    for (int64_t k = 0; k < depth; k += DEPTH) {
      const int64_t part = depth - k < DEPTH ? depth - k : DEPTH;
      const E* strip = b + s * strip_stride + k * STRIP;
      float* to = c + s * STRIP;
      int64_t r = 0;
      for (; r + ROWS <= rows; r += ROWS) multiply_rows<E, ROWS>(part, a + r * lda + k, lda, strip, to + r * ldc, ldc);
      const E* rest = a + r * lda + k;
      float* last = to + r * ldc;
      switch (rows - r) {
        case 5: multiply_rows<E, 5>(part, rest, lda, strip, last, ldc); break;
        case 4: multiply_rows<E, 4>(part, rest, lda, strip, last, ldc); break;
        case 3: multiply_rows<E, 3>(part, rest, lda, strip, last, ldc); break;
        case 2: multiply_rows<E, 2>(part, rest, lda, strip, last, ldc); break;
        case 1: multiply_rows<E, 1>(part, rest, lda, strip, last, ldc); break;
      }
    }
}

}  // namespace
