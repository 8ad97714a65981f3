// Attention within packed sequences, forward and backward, one head of one sequence at a time in cache.
//
// For sequences up to some thousand tokens: scratch memory grows with the length, scores of a block of rows at once.
// Heads have 64 components. Threads are OpenMP's, each with its own heads, so results are the same every time.
//
// Shapes: T tokens, H heads, S sequences, L tokens of one. Rows of queries, keys and values: T x 3 · H · 64, each
// part with its heads side by side. Attended and upstream: T x H · 64. Normalisers: H x T, log-sum-exp of the scores.
#include <cmath>
#include <new>
#include <vector>

#include "products.h"

namespace {

constexpr int64_t SIZE = STRIP;
// Rows of scores at once: whole rows of register tiles, with AMX whole steps of a product's depth.
constexpr int64_t BLOCK = Operand<Bfloat16>::step == 32 ? 64 : 8 * ROWS;
static_assert(BLOCK % Operand<Bfloat16>::step == 0);

inline int64_t up_to(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// A row of an AMX tile that crosses a cache line takes two loads.
template <class T>
struct OfCacheLines {
  typedef T value_type;
  static constexpr std::align_val_t line{64};
  OfCacheLines() = default;
  template <class U>
  OfCacheLines(const OfCacheLines<U>&) {}
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), line)); }
  void deallocate(T* memory, size_t) { ::operator delete(memory, line); }
  bool operator==(const OfCacheLines&) const { return true; }
  bool operator!=(const OfCacheLines&) const { return false; }
};

template <class T>
using Scratch = std::vector<T, OfCacheLines<T>>;

// A thread's memory for one use, kept from call to call.
template <class T>
T* scratch(Scratch<T>& memory, int64_t count) {
  if ((int64_t)memory.size() < count) memory.resize(count);
  return memory.data();
}

// Rows become the depth of a right operand, zeros up to `depth`, their components its columns.
template <class E>
void pack_by_depth(int64_t count, int64_t depth, const E* rows, int64_t stride, E* packed) {
  constexpr int64_t lane = Operand<E>::lane;
  std::memset(packed + count * SIZE, 0, sizeof(E) * (depth - count) * SIZE);
  for (int64_t r = 0; r < count; r += lane)
    for (int64_t d = 0; d < SIZE; d += WIDTH) {
      Floats second = r + 1 < count ? load(rows + (r + 1) * stride + d) : Floats{};
      Operand<E>::write_packed(packed + r * SIZE + d * lane, load(rows + r * stride + d), second);
    }
}

// Rows become the columns of a right operand, zeros up to whole strips, their components its depth.
template <class E>
void pack_by_column(int64_t count, const E* rows, int64_t stride, E* packed) {
  constexpr int64_t lane = Operand<E>::lane;
  const int64_t whole = count / STRIP * STRIP;
  std::memset(packed + whole * SIZE, 0, sizeof(E) * (up_to(count, STRIP) - whole) * SIZE);
  for (int64_t r = 0; r < count; ++r) {
    E* column = packed + r / STRIP * STRIP * SIZE + r % STRIP * lane;
    for (int64_t d = 0; d < SIZE; d += lane)
      std::memcpy(column + d * STRIP, rows + r * stride + d, sizeof(E) * lane);
  }
}

// Components become the rows of a left operand, zeros up to `depth`.
template <class E>
void transpose(int64_t count, int64_t depth, const E* rows, int64_t stride, E* transposed) {
  for (int64_t d = 0; d < SIZE; ++d)
    for (int64_t r = count; r < depth; ++r) transposed[d * depth + r] = E{};
  for (int64_t r = 0; r < count; ++r)
    for (int64_t d = 0; d < SIZE; ++d) transposed[d * depth + r] = rows[r * stride + d];
}

// Scores of a row to exp(score - maximum); returns the maximum, and their sum.
template <class E>
float weigh(int64_t length, int64_t width, float scaling, float* scores, E* weights, float* total) {
  for (int64_t c = length; c < width; ++c) scores[c] = -INFINITY;
  Floats most = all(-INFINITY), sums{};
  for (int64_t c = 0; c < width; c += WIDTH) most = larger(most, load(scores + c));
  const float maximum_score = maximum(most) * scaling;
  for (int64_t c = 0; c < width; c += WIDTH) {
    Floats weight = exponential(load(scores + c) * scaling - maximum_score);
    sums += weight;
    store(weights + c, weight);
  }
  *total = sum(sums);
  return maximum_score;
}

template <class E>
void attend_head(int64_t length, int64_t stride, int64_t out_stride, float scaling, const E* queries, const E* keys,
                 const E* values, E* attended, float* normalisers) {
  static thread_local Scratch<E> of_keys, of_values, of_weights;
  static thread_local Scratch<float> of_scores;
  const int64_t width = up_to(length, STRIP), depth = up_to(length, Operand<E>::step);
  E* packed_keys = scratch(of_keys, width * SIZE);
  E* packed_values = scratch(of_values, depth * SIZE);
  E* weights = scratch(of_weights, BLOCK * width);
  float* scores = scratch(of_scores, BLOCK * width);
  pack_by_column(length, keys, stride, packed_keys);
  pack_by_depth(length, depth, values, stride, packed_values);
  for (int64_t begin = 0; begin < length; begin += BLOCK) {
    const int64_t count = length - begin < BLOCK ? length - begin : BLOCK;
    multiply<E>(Sums::fresh, count, width / STRIP, SIZE, queries + begin * stride, stride, packed_keys, SIZE * STRIP,
                scores, width);
    float totals[BLOCK];
    alignas(64) float sums[BLOCK * SIZE];
    for (int64_t r = 0; r < count; ++r) {
      float most = weigh(length, width, scaling, scores + r * width, weights + r * width, totals + r);
      normalisers[begin + r] = most + std::log(totals[r]);
    }
    multiply<E>(Sums::fresh, count, 1, depth, weights, width, packed_values, 0, sums, SIZE);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t d = 0; d < SIZE; d += WIDTH)
        store(attended + (begin + r) * out_stride + d, load(sums + r * SIZE + d) / totals[r]);
  }
}

// What one head's backward pass holds; every row of scores here is a key's, over all queries.
template <class E>
struct Backward {
  int64_t length, width, depth;
  Scratch<E> query_columns, query_depth, upstream_columns, upstream_depth, keys_transposed;
  Scratch<E> weights, gradients, packed_gradients;
  Scratch<float> scores, products, normalisers, shares, query_gradient;

  void begin(int64_t tokens, int64_t stride, int64_t out_stride, const E* queries, const E* keys, const E* attended,
             const E* upstream, const float* of_rows) {
    length = tokens, width = up_to(length, STRIP), depth = up_to(length, Operand<E>::step);
    pack_by_column(length, queries, stride, scratch(query_columns, width * SIZE));
    pack_by_depth(length, depth, queries, stride, scratch(query_depth, depth * SIZE));
    pack_by_column(length, upstream, out_stride, scratch(upstream_columns, width * SIZE));
    pack_by_depth(length, depth, upstream, out_stride, scratch(upstream_depth, depth * SIZE));
    transpose(length, depth, keys, stride, scratch(keys_transposed, depth * SIZE));
    for (auto memory : {&weights, &gradients, &packed_gradients}) scratch(*memory, BLOCK * width);
    for (auto memory : {&scores, &products}) scratch(*memory, BLOCK * width);
    scratch(query_gradient, SIZE * width);
    float *normaliser = scratch(normalisers, width), *share = scratch(shares, width);
    for (int64_t t = 0; t < width; ++t) {
      normaliser[t] = t < length ? of_rows[t] : INFINITY;  // the weight of what is not there is 0
      Floats along{};
      for (int64_t d = 0; t < length && d < SIZE; d += WIDTH)
        along += load(attended + t * out_stride + d) * load(upstream + t * out_stride + d);
      share[t] = sum(along);
    }
  }

  // Softmax weights and the scores' gradients of `count` keys from their scores and products with the upstream.
  void weigh(int64_t count, float scaling) {
    constexpr int64_t lane = Operand<E>::lane;
    const int64_t rows = up_to(count, Operand<E>::step);
    for (int64_t r = 0; r < rows; r += lane)
      for (int64_t c = 0; c < width; c += WIDTH) {
        Floats both[2] = {};
        for (int64_t row = r; row < r + lane && row < count; ++row) {
          int64_t at = row * width + c;
          Floats weight = exponential(load(&scores[at]) * scaling - load(&normalisers[c]));
          both[row - r] = weight * (load(&products[at]) - load(&shares[c])) * scaling;
          store(&weights[at], weight);
          store(&gradients[at], both[row - r]);
        }
        E* strip = &packed_gradients[c / STRIP * STRIP * rows];
        Operand<E>::write_packed(strip + r * STRIP + c % STRIP * lane, both[0], both[1]);
      }
  }
};

template <class E>
void store_rows(int64_t count, const float* from, E* to, int64_t stride) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t d = 0; d < SIZE; d += WIDTH) store(to + r * stride + d, load(from + r * SIZE + d));
}

template <class E>
void attend_head_backward(int64_t length, int64_t stride, int64_t out_stride, float scaling, const E* queries,
                          const E* keys, const E* values, const E* attended, const E* upstream,
                          const float* normalisers, E* of_queries, E* of_keys, E* of_values) {
  static thread_local Backward<E> b;
  b.begin(length, stride, out_stride, queries, keys, attended, upstream, normalisers);
  const int64_t strips = b.width / STRIP;
  for (int64_t begin = 0; begin < length; begin += BLOCK) {
    const int64_t count = length - begin < BLOCK ? length - begin : BLOCK, rows = up_to(count, Operand<E>::step);
    multiply<E>(Sums::fresh, count, strips, SIZE, keys + begin * stride, stride, b.query_columns.data(), SIZE * STRIP,
                b.scores.data(), b.width);
    multiply<E>(Sums::fresh, count, strips, SIZE, values + begin * stride, stride, b.upstream_columns.data(),
                SIZE * STRIP, b.products.data(), b.width);
    b.weigh(count, scaling);
    alignas(64) float of_block[2][BLOCK * SIZE];
    multiply<E>(Sums::fresh, count, 1, b.depth, b.weights.data(), b.width, b.upstream_depth.data(), 0, of_block[0],
                SIZE);
    multiply<E>(Sums::fresh, count, 1, b.depth, b.gradients.data(), b.width, b.query_depth.data(), 0, of_block[1],
                SIZE);
    store_rows(count, of_block[0], of_values + begin * stride, stride);
    store_rows(count, of_block[1], of_keys + begin * stride, stride);
    multiply<E>(begin ? Sums::continued : Sums::fresh, SIZE, strips, rows, b.keys_transposed.data() + begin, b.depth,
                b.packed_gradients.data(), rows * STRIP, b.query_gradient.data(), b.width);
  }
  for (int64_t t = 0; t < length; ++t)
    for (int64_t d = 0; d < SIZE; d += WIDTH) {
      Floats row;
      for (int64_t i = 0; i < WIDTH; ++i) row[i] = b.query_gradient[(d + i) * b.width + t];
      store(of_queries + t * stride + d, row);
    }
}

template <class E>
void attend(int64_t sequences, const int32_t* boundaries, int64_t heads, float scaling, const E* rows, E* attended,
            float* normalisers) {
  const int64_t out_stride = heads * SIZE, stride = 3 * out_stride, tokens = boundaries[sequences];
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (int64_t s = 0; s < sequences; ++s)
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t begin = boundaries[s], length = boundaries[s + 1] - begin;
      const E* queries = rows + begin * stride + h * SIZE;
      attend_head(length, stride, out_stride, scaling, queries, queries + out_stride, queries + 2 * out_stride,
                  attended + begin * out_stride + h * SIZE, normalisers + h * tokens + begin);
    }
}

template <class E>
void attend_backward(int64_t sequences, const int32_t* boundaries, int64_t heads, float scaling, const E* rows,
                     const E* attended, const float* normalisers, const E* upstream, E* gradient) {
  const int64_t out_stride = heads * SIZE, stride = 3 * out_stride, tokens = boundaries[sequences];
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (int64_t s = 0; s < sequences; ++s)
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t begin = boundaries[s], length = boundaries[s + 1] - begin, out = begin * out_stride + h * SIZE;
      const E* queries = rows + begin * stride + h * SIZE;
      E* of_queries = gradient + begin * stride + h * SIZE;
      attend_head_backward(length, stride, out_stride, scaling, queries, queries + out_stride,
                           queries + 2 * out_stride, attended + out, upstream + out, normalisers + h * tokens + begin,
                           of_queries, of_queries + out_stride, of_queries + 2 * out_stride);
    }
}

}  // namespace

#define FUNCTIONS(E, NAME)                                                                                       \
  void drama_attend_##NAME(int64_t sequences, const int32_t* boundaries, int64_t heads, float scaling,           \
                           const E* rows, E* attended, float* normalisers) {                                     \
    attend(sequences, boundaries, heads, scaling, rows, attended, normalisers);                                  \
  }                                                                                                              \
  void drama_attend_backward_##NAME(int64_t sequences, const int32_t* boundaries, int64_t heads, float scaling,  \
                                    const E* rows, const E* attended, const float* normalisers,                  \
                                    const E* upstream, E* gradient) {                                            \
    attend_backward(sequences, boundaries, heads, scaling, rows, attended, normalisers, upstream, gradient);     \
  }

extern "C" {
FUNCTIONS(float, float32)
FUNCTIONS(Bfloat16, bfloat16)
}
