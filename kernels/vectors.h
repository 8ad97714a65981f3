// Vectors as wide as the CPU's registers, at most 16 floats: exponentials, sums, bfloat16 in memory.
//
// A wider type than the registers lives in memory: in AVX2 training took 1.5 times as long with 16 floats
// (benchmarks/results/quickstart-commits.md).
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int64_t WIDTH = 16;
#elif defined(__AVX__)
constexpr int64_t WIDTH = 8;
#else
constexpr int64_t WIDTH = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Bits __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));
typedef uint8_t Bytes __attribute__((vector_size(WIDTH)));
typedef uint16_t Bfloat16;

inline Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }
inline Floats all(float value) { return Floats{} + value; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline float sum(Floats v) {
  float total = 0;
  for (int i = 0; i < WIDTH; ++i) total += v[i];
  return total;
}
inline float maximum(Floats v) {
  float most = v[0];
  for (int i = 1; i < WIDTH; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

// exp for arguments up to 88; 0 below -87. Cody-Waite reduction, Taylor to degree 6: 2 ulp.
inline Floats exponential(Floats x) {
  Floats clamped = larger(all(-87.f), x);  // in this order NaN stays NaN
  Floats rounded = clamped * 1.44269504f + 12582912.f;  // 1.5 * 2^23: the sum's low bits are the integer
  Floats n = rounded - 12582912.f;
  Floats r = clamped - n * 0.693145752f - n * 1.42860677e-6f;
  Floats p = all(1.f / 720);
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
#if defined(__AVX512F__)
  Floats result = (Floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  Ints power = ((Ints)rounded << 23) + (127 << 23);
  Floats result = p * (Floats)power;
#endif
  return x <= all(-87.f) ? Floats{} : result;
}

inline Bits rounded_to_bfloat16(Floats value) {  // to nearest even, in the low half of each lane
  Bits bits = (Bits)value;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

inline Floats load(const Bfloat16* from) {
  Halves narrow;
  std::memcpy(&narrow, from, sizeof narrow);
  return (Floats)(__builtin_convertvector(narrow, Bits) << 16);
}
inline void store(Bfloat16* to, Floats value) {
#if defined(__AVX512BF16__)
  Halves narrow = (Halves)_mm512_cvtneps_pbh((__m512)value);
#else
  Halves narrow = __builtin_convertvector(rounded_to_bfloat16(value), Halves);
#endif
  std::memcpy(to, &narrow, sizeof narrow);
}

}  // namespace
