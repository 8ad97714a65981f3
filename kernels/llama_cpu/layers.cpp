// What a transformer layer does between its matrix products, forward and backward, one pass over memory each.
//
// Covers RMSNorm, SwiGLU and rotary positions. Threads are OpenMP's, the same that PyTorch's operations use. E is an
// element, bfloat16 bits or float; arithmetic is float. Every width is a multiple of 16, half a head too.
//
// Shapes: T tokens, K components, H heads of D components.
#include <cmath>

#include "vectors.h"

namespace {

inline Floats sigmoid(Floats x) { return 1.f / (1.f + exponential(-larger(all(-88.f), x))); }

// 1 / root mean square of a row (Zhang and Sennrich 2019, eq. 4).
template <class E>
inline float inverse_root_mean_square(const E* row, int64_t width, float epsilon) {
  Floats squares{};
  for (int64_t k = 0; k < width; k += WIDTH) {
    Floats x = load(row + k);
    squares += x * x;
  }
  return 1.f / std::sqrt(sum(squares) / width + epsilon);
}

template <class E>
void rms_norm(int64_t rows, int64_t width, float epsilon, const E* x, const E* weight, E* normed) {
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < rows; ++t) {
    const E* row = x + t * width;
    float scale = inverse_root_mean_square(row, width, epsilon);
    for (int64_t k = 0; k < width; k += WIDTH) store(normed + t * width + k, load(row + k) * scale * load(weight + k));
  }
}

// gradient += that of x; weight_gradient (one row for each part of the rows) += that of the weight.
template <class E>
void rms_norm_backward(int64_t rows, int64_t width, int64_t parts, float epsilon, const E* upstream, const E* x,
                       const E* weight, E* gradient, float* weight_gradient) {
#pragma omp parallel for schedule(static, 1)
  for (int64_t part = 0; part < parts; ++part) {
    float* of_weight = weight_gradient + part * width;
    for (int64_t t = rows * part / parts; t < rows * (part + 1) / parts; ++t) {
      const E *row = x + t * width, *above = upstream + t * width;
      float scale = inverse_root_mean_square(row, width, epsilon);
      Floats products{};
      for (int64_t k = 0; k < width; k += WIDTH) products += load(above + k) * load(weight + k) * load(row + k);
      float along = sum(products) * scale * scale * scale / width;
      for (int64_t k = 0; k < width; k += WIDTH) {
        Floats up = load(above + k), value = load(row + k);
        E* to = gradient + t * width + k;
        store(to, load(to) + up * load(weight + k) * scale - value * along);
        store(of_weight + k, load(of_weight + k) + up * value * scale);
      }
    }
  }
}

// x * sigmoid(x) * up (Shazeer 2020, SwiGLU).
template <class E>
void swiglu(int64_t count, const E* gate, const E* up, E* product) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < count; i += WIDTH) {
    Floats x = load(gate + i);
    store(product + i, x * sigmoid(x) * load(up + i));
  }
}

// Also the product itself, over `upstream`.
template <class E>
void swiglu_backward(int64_t count, E* upstream, const E* gate, const E* up, E* gate_gradient, E* up_gradient) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < count; i += WIDTH) {
    Floats x = load(gate + i), y = load(up + i), above = load(upstream + i), share = sigmoid(x);
    store(gate_gradient + i, above * y * share * (1.f + x * (1.f - share)));
    store(up_gradient + i, above * x * share);
    store(upstream + i, x * share * y);
  }
}

// Rotates the first `heads` heads of each row by its token's angles (Su et al. 2021; half a head's components by the
// other half's, as transformers' Llama has it), backwards by the transposed matrix, and copies the rest of the row.
template <class E>
void rotate(int64_t rows, int64_t width, int64_t heads, int64_t size, int64_t backwards, const E* cosines,
            const E* sines, const E* from, E* to) {
  const int64_t half = size / 2;
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < rows; ++t) {
    const E *cosine = cosines + t * size, *sine = sines + t * size;
    for (int64_t column = 0; column < heads * size; column += size)
      for (int64_t d = 0; d < half; d += WIDTH) {
        const E* x = from + t * width + column + d;
        E* y = to + t * width + column + d;
        Floats first = load(x), second = load(x + half);
        Floats of_first = second * load(sine + d), of_second = first * load(sine + half + d);
        if (backwards) of_first = second * -load(sine + half + d), of_second = first * -load(sine + d);
        store(y, first * load(cosine + d) - of_first);
        store(y + half, second * load(cosine + half + d) + of_second);
      }
    if (from != to)
      std::memcpy(to + t * width + heads * size, from + t * width + heads * size, sizeof(E) * (width - heads * size));
  }
}

}  // namespace

#define FUNCTIONS(E, NAME)                                                                                            \
  void drama_rms_norm_##NAME(int64_t rows, int64_t width, float epsilon, const E* x, const E* weight, E* normed) {    \
    rms_norm(rows, width, epsilon, x, weight, normed);                                                                \
  }                                                                                                                   \
  void drama_rms_norm_backward_##NAME(int64_t rows, int64_t width, int64_t parts, float epsilon, const E* upstream,   \
                                      const E* x, const E* weight, E* gradient, float* weight_gradient) {             \
    rms_norm_backward(rows, width, parts, epsilon, upstream, x, weight, gradient, weight_gradient);                   \
  }                                                                                                                   \
  void drama_swiglu_##NAME(int64_t count, const E* gate, const E* up, E* product) {                                   \
    swiglu(count, gate, up, product);                                                                                 \
  }                                                                                                                   \
  void drama_swiglu_backward_##NAME(int64_t count, E* upstream, const E* gate, const E* up, E* gate_gradient,         \
                                    E* up_gradient) {                                                                 \
    swiglu_backward(count, upstream, gate, up, gate_gradient, up_gradient);                                           \
  }                                                                                                                   \
  void drama_rotate_##NAME(int64_t rows, int64_t width, int64_t heads, int64_t size, int64_t backwards,               \
                           const E* cosines, const E* sines, const E* from, E* to) {                                  \
    rotate(rows, width, heads, size, backwards, cosines, sines, from, to);                                            \
  }

extern "C" {
FUNCTIONS(float, float32)
FUNCTIONS(Bfloat16, bfloat16)
}
