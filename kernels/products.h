// Matrix products of small operands in cache, sums in float.
//
// E is an operand's element: bfloat16 bits, two to a lane, or float. The right operand is packed in strips of 64
// columns: [columns / 64][depth / lane][64][lane]. Depths are multiples of Operand<E>::step.
#pragma once
#include <type_traits>

#include "vectors.h"
#if defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define DRAMA_AMX 1
#endif

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
  static constexpr int64_t lane = 1, step = 1;
  static Floats multiply_add(Floats sum, const float* a, const float* b) { return sum + *a * load(b); }
  static void write_packed(float* to, Floats first, Floats) { store(to, first); }
};

template <>
struct Operand<Bfloat16> {
  static constexpr int64_t lane = 2;
#if defined(DRAMA_AMX)
  static constexpr int64_t step = 32;
#else
  static constexpr int64_t step = lane;
#endif
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

// C = A * B, or C += A * B.
enum class Sums { fresh, continued };

// C (R x 64, row stride ldc) from A (R x depth, row stride lda) * B (one packed strip), R at most ROWS.
template <class E, int R>
inline void multiply_rows(Sums sums, int64_t depth, const E* a, int64_t lda, const E* b, float* c, int64_t ldc) {
  constexpr int64_t lane = Operand<E>::lane;
  for (int64_t begin = 0; begin < STRIP; begin += AT_ONCE * WIDTH) {
    Floats total[R][AT_ONCE];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < AT_ONCE; ++v)
        total[r][v] = sums == Sums::fresh ? Floats{} : load(c + r * ldc + begin + v * WIDTH);
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

// As many rows as there are, at most ROWS.
template <class E, int R = ROWS>
inline void multiply_up_to(int64_t rows, Sums sums, int64_t depth, const E* a, int64_t lda, const E* b, float* c,
                           int64_t ldc) {
  if (rows >= R)
    multiply_rows<E, R>(sums, depth, a, lda, b, c, ldc);
  else if constexpr (R > 1)
    multiply_up_to<E, R - 1>(rows, sums, depth, a, lda, b, c, ldc);
}

#if defined(DRAMA_AMX)
// AMX: registers are tiles of up to 16 rows of 64 bytes. Sums are 16 x 16; operands go 32 of the depth at a time.
constexpr int64_t AMX_ROWS = 16;

// What LDTILECFG reads. Tiles 0 to 3 are sums, 4 and 5 of the left operand, 6 and 7 of the right.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {0, 0, 0, 0, 0, 0, AMX_ROWS, AMX_ROWS};

  explicit TileConfig(int64_t count) { std::memset(rows, (int)count, 6); }
};
static_assert(sizeof(TileConfig) == 64 && STRIP % Operand<Bfloat16>::step == 0 && DEPTH % Operand<Bfloat16>::step == 0);

// Linux gives a process room for tiles in its saved state when it asks, or refuses.
inline bool amx_allowed() {
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
  return allowed;
}

// As multiply_rows, for as many rows as TILES tiles have.
template <int TILES>
inline void multiply_amx_rows(Sums sums, int64_t depth, const Bfloat16* a, int64_t lda, const Bfloat16* b, float* c,
                              int64_t ldc) {
  constexpr int64_t b_bytes = STRIP * 2 * sizeof(Bfloat16);
  const int64_t a_bytes = lda * sizeof(Bfloat16), c_bytes = ldc * sizeof(float);
  for (int64_t column = 0; column < STRIP; column += 32, b += 64) {
    float *first = c + column, *second = TILES == 2 ? first + AMX_ROWS * ldc : nullptr;
    if (sums == Sums::fresh) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, first, c_bytes);
      _tile_loadd(1, first + 16, c_bytes);
      if constexpr (TILES == 2) {
        _tile_loadd(2, second, c_bytes);
        _tile_loadd(3, second + 16, c_bytes);
      }
    }
    for (int64_t k = 0; k < depth; k += Operand<Bfloat16>::step) {
      _tile_loadd(4, a + k, a_bytes);
      _tile_loadd(6, b + k * STRIP, b_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + k * STRIP + 32, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (TILES == 2) {
        _tile_loadd(5, a + AMX_ROWS * lda + k, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, first, c_bytes);
    _tile_stored(1, first + 16, c_bytes);
    if constexpr (TILES == 2) {
      _tile_stored(2, second, c_bytes);
      _tile_stored(3, second + 16, c_bytes);
    }
  }
}

// Rows up to the last whole tile, then the rest with tiles of as many rows.
inline void multiply_amx(Sums sums, int64_t rows, int64_t strips, int64_t depth, const Bfloat16* a, int64_t lda,
                         const Bfloat16* b, int64_t strip_stride, float* c, int64_t ldc) {
  const int64_t whole = rows / AMX_ROWS * AMX_ROWS;
  for (int64_t begin = 0, end; begin < rows; begin = end) {
    end = begin < whole ? whole : rows;
    const TileConfig config(begin < whole ? AMX_ROWS : rows - whole);
    asm volatile("" : : "r"(&config) : "memory");  // compilers are not told that what follows reads memory
    _tile_loadconfig(&config);
    for (int64_t s = 0; s < strips; ++s)
      for (int64_t k = 0; k < depth; k += DEPTH) {
        const Sums so_far = k ? Sums::continued : sums;
        const int64_t part = depth - k < DEPTH ? depth - k : DEPTH;
        const Bfloat16* strip = b + s * strip_stride + k * STRIP;
        float* to = c + s * STRIP;
        int64_t r = begin;
        for (; r + 2 * AMX_ROWS <= end; r += 2 * AMX_ROWS)
          multiply_amx_rows<2>(so_far, part, a + r * lda + k, lda, strip, to + r * ldc, ldc);
        if (r < end) multiply_amx_rows<1>(so_far, part, a + r * lda + k, lda, strip, to + r * ldc, ldc);
      }
  }
  _tile_release();
}
#endif

// C (rows x 64 · strips) from A * B; `strip_stride` elements from one packed strip to the next.
template <class E>
void multiply(Sums sums, int64_t rows, int64_t strips, int64_t depth, const E* a, int64_t lda, const E* b,
              int64_t strip_stride, float* c, int64_t ldc) {
#if defined(DRAMA_AMX)
  if constexpr (std::is_same_v<E, Bfloat16>)
    if (amx_allowed()) return multiply_amx(sums, rows, strips, depth, a, lda, b, strip_stride, c, ldc);
#endif
  for (int64_t s = 0; s < strips; ++s)
    for (int64_t k = 0; k < depth; k += DEPTH) {
      const Sums so_far = k ? Sums::continued : sums;
      const int64_t part = depth - k < DEPTH ? depth - k : DEPTH;
      for (int64_t r = 0; r < rows; r += ROWS)
        multiply_up_to<E>(rows - r, so_far, part, a + r * lda + k, lda, b + s * strip_stride + k * STRIP,
                          c + r * ldc + s * STRIP, ldc);
    }
}

}  // namespace
