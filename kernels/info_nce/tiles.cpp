// Tiles of scores and of their gradients, for one chunk of rows and a range of column tiles.
//
// Covers the arithmetic only, of InfoNCE and, where there is a teacher, of soft targets: memory, packing, threads and
// the losses themselves are cpu.py's.
// Knows nothing of torch, so that it builds in seconds; one thread calls it for its own tiles.
//
// Shapes: R rows, N columns in tiles of 64 · STRIPS, K components in blocks (block d is what dim d has
// beyond dim d - 1, padded to 64), M dims, T components of a teacher. E is an operand's element, see products.h.
#include <algorithm>

#include "products.h"

namespace {

constexpr int64_t STRIPS = 2, TILE = STRIP * STRIPS;
constexpr float MASKED = -1e30f;

struct Chunk {
  int64_t rows, padded_rows, columns, components, dims, teacher_components;
  const int64_t* ends;             // M: where each block ends among the padded components
  const void* queries;             // R x K
  const void* queries_transposed;  // K x padded R
  const void* passages_by_depth;   // packed, depth is K
  const void* passages_by_column;  // per tile packed, depth is the tile's columns
  const float* query_norms;        // M x R, 1 / (norm * temperature)
  const float* passage_norms;      // M x N, 1 / norm
  const uint8_t* masked;           // R x columns, or null
  const int64_t* positives;        // R
  float* scores;                   // M x tiles x R x TILE
  float* positive_scores;          // M x R
  float* maxima;                   // M x R of one thread
  float* sums;                     // M x R of one thread: sum of exp(score - maximum)
  const float* scales;             // M: weight / B
  const float* shifts;             // M x R
  const float* missed;             // M x R
  float* row_terms;                // M x R of one thread
  float* column_terms;             // M x N
  float* query_products;           // R x K of one thread
  float* passage_products;         // tiles x K x TILE
  float* suffix;                   // R x TILE, scratch of one thread
  void* upstream;                  // R x TILE in E, scratch
  void* upstream_packed;           // packed, depth is padded R, scratch
  // Of a teacher, or null:
  const float* teacher_queries;    // R x T
  const float* teacher_passages;   // packed, depth is T
  const int64_t* sparse_starts;    // R + 1, or null: a row's entries in the two below, its columns ascending
  const int32_t* sparse_columns;
  const float* sparse_values;
  float* teacher_logits;           // tiles x R x TILE; when gradients are added, the targets
  float* teacher_weights;          // R x TILE: exp(logit - maximum), scratch of one thread
  float* teacher_maxima;           // R of one thread
  float* teacher_sums;             // R of one thread: sum of exp(logit - maximum)
  float* teacher_terms;            // R of one thread: sum of exp(logit - maximum) * (logit - maximum)
  float* expected;                 // M x R of one thread: sum of exp(logit - maximum) * score
  const float* teacher_shifts;     // R
};

int64_t tiles_of(const Chunk& c) { return c.columns / TILE + (c.columns % TILE != 0); }

// One row of a tile: scores of one dim from the product.
inline void scale_row(const Chunk& c, int64_t d, int64_t tile, int64_t r, const float* product, float* scores) {
  const int64_t padded = tiles_of(c) * TILE, first = tile * TILE, valid = c.columns - first;
  const float* norms = c.passage_norms + d * padded + first;
  const float norm = c.query_norms[d * c.rows + r];
  for (int64_t v = 0; v < TILE; v += WIDTH) store(scores + v, load(product + v) * norm * load(norms + v));
  for (int64_t v = valid; v < TILE; ++v) scores[v] = MASKED;
}

// InfoNCE: what is no negative of the row leaves its scores.
inline void leave_negatives(const Chunk& c, int64_t d, int64_t tile, int64_t r, float* scores) {
  const int64_t first = tile * TILE, valid = c.columns - first;
  const int64_t positive = c.positives[r] - first;
  if (c.masked && valid >= TILE) {
    const uint8_t* flags = c.masked + r * c.columns + first;
    for (int64_t v = 0; v < TILE; v += WIDTH) {
      Bytes some;
      std::memcpy(&some, flags + v, sizeof some);
      store(scores + v, __builtin_convertvector(some, Ints) != 0 ? all(MASKED) : load(scores + v));
    }
  } else if (c.masked) {
    for (int64_t v = 0; v < valid; ++v)
      if (c.masked[r * c.columns + first + v]) scores[v] = MASKED;
  }
  if (positive >= 0 && positive < TILE) {
    c.positive_scores[d * c.rows + r] = scores[positive];
    scores[positive] = MASKED;
  }
}

inline float highest_of_row(const float* scores) {
  Floats most = load(scores);
  for (int64_t v = WIDTH; v < TILE; v += WIDTH) most = larger(most, load(scores + v));
  return maximum(most);
}

// A row's running maximum and sum of exp(score - maximum).
inline void take_up(const float* scores, float& running, float& total) {
  const float highest = highest_of_row(scores);
  if (highest > running) {
    total *= exponential(all(running - highest))[0];
    running = highest;
  }
  Floats sums{};
  for (int64_t v = 0; v < TILE; v += WIDTH) sums += exponential(load(scores + v) - running);
  total += sum(sums);
}

// One row of a teacher's tile from its product, and what is summed up of it; weights stay for the scores' turn.
inline void take_up_teacher(const Chunk& c, int64_t tile, int64_t r, float* logits, float* weights) {
  const int64_t first = tile * TILE, valid = c.columns - first;
  if (c.sparse_starts) {
    const int32_t *begin = c.sparse_columns + c.sparse_starts[r], *end = c.sparse_columns + c.sparse_starts[r + 1];
    for (auto at = std::lower_bound(begin, end, first); at < end && *at < first + TILE; ++at)
      logits[*at - first] += c.sparse_values[at - c.sparse_columns];
  }
  for (int64_t v = valid; v < TILE; ++v) logits[v] = MASKED;
  float& running = c.teacher_maxima[r];
  const float highest = highest_of_row(logits);
  if (highest > running) {
    const float rise = highest - running, factor = exponential(all(-rise))[0];
    c.teacher_terms[r] = factor * (c.teacher_terms[r] - rise * c.teacher_sums[r]);
    c.teacher_sums[r] *= factor;
    for (int64_t d = 0; d < c.dims; ++d) c.expected[d * c.rows + r] *= factor;
    running = highest;
  }
  Floats sums{}, terms{};
  for (int64_t v = 0; v < TILE; v += WIDTH) {
    const Floats below = load(logits + v) - running, weight = exponential(below);
    store(weights + v, weight);
    sums += weight;
    terms += weight * below;
  }
  c.teacher_sums[r] += sum(sums);
  c.teacher_terms[r] += sum(terms);
}

void teacher_tile(const Chunk& c, int64_t tile) {
  float* logits = c.teacher_logits + tile * c.rows * TILE;
  if (c.teacher_components == 0) std::memset(logits, 0, sizeof(float) * c.rows * TILE);
  multiply<float>(Sums::fresh, c.rows, STRIPS, c.teacher_components, c.teacher_queries, c.teacher_components,
                  c.teacher_passages + tile * TILE * c.teacher_components, c.teacher_components * STRIP, logits, TILE);
  for (int64_t r = 0; r < c.rows; ++r) take_up_teacher(c, tile, r, logits + r * TILE, c.teacher_weights + r * TILE);
}

inline float weighted_sum(const float* weights, const float* scores) {
  Floats sums{};
  for (int64_t v = 0; v < TILE; v += WIDTH) sums += load(weights + v) * load(scores + v);
  return sum(sums);
}

template <bool TEACHER>
inline void score_row(const Chunk& c, int64_t d, int64_t tile, int64_t r, const float* product, float* scores) {
  const int64_t row = d * c.rows + r;
  scale_row(c, d, tile, r, product, scores);
  if (!TEACHER) leave_negatives(c, d, tile, r, scores);
  take_up(scores, c.maxima[row], c.sums[row]);
  if (TEACHER) c.expected[row] += weighted_sum(c.teacher_weights + r * TILE, scores);
}

template <class E, bool TEACHER>
void scores_of(const Chunk& c, int64_t begin, int64_t end) {
  const E* queries = static_cast<const E*>(c.queries);
  const E* passages = static_cast<const E*>(c.passages_by_depth);
  const int64_t tiles = tiles_of(c);
  for (int64_t tile = begin; tile < end; ++tile) {
    if (TEACHER) teacher_tile(c, tile);
    float* product = c.suffix;
    const E* strips = passages + tile * STRIPS * c.components * STRIP;
    for (int64_t d = 0, from = 0; d < c.dims; from = c.ends[d++]) {
      multiply<E>(d ? Sums::continued : Sums::fresh, c.rows, STRIPS, c.ends[d] - from, queries + from, c.components,
                  strips + from * STRIP, c.components * STRIP, product, TILE);
      float* to = c.scores + (d * tiles + tile) * c.rows * TILE;
      for (int64_t r = 0; r < c.rows; ++r) score_row<TEACHER>(c, d, tile, r, product + r * TILE, to + r * TILE);
    }
  }
}

template <class E>
void scores(const Chunk& c, int64_t begin, int64_t end) {
  c.teacher_logits ? scores_of<E, true>(c, begin, end) : scores_of<E, false>(c, begin, end);
}

// A tile's logits to targets.
void to_targets(const Chunk& c, int64_t tile) {
  float* logits = c.teacher_logits + tile * c.rows * TILE;
  for (int64_t r = 0; r < c.rows; ++r)
    for (int64_t v = r * TILE; v < (r + 1) * TILE; v += WIDTH)
      store(logits + v, exponential(load(logits + v) - c.teacher_shifts[r]));
}

// Gradients of one dim's scores in a tile, added to the suffix sums over dims, and the norms' terms.
template <bool TEACHER>
void add_gradients_of_dim(const Chunk& c, int64_t d, int64_t tile) {
  const int64_t first = (d * tiles_of(c) + tile) * TILE;
  const float* norms = c.passage_norms + first;
  float* column_terms = c.column_terms + first;
  for (int64_t r = 0; r < c.rows; ++r) {
    const int64_t row = d * c.rows + r, positive = TEACHER ? -1 : c.positives[r] - tile * TILE;
    const float* scores = c.scores + first * c.rows + r * TILE;
    const float* targets = TEACHER ? c.teacher_logits + (tile * c.rows + r) * TILE : nullptr;
    float* suffix = c.suffix + r * TILE;
    const float norm = c.query_norms[row], scale = c.scales[d], shift = c.shifts[row];
    Floats terms{};
    for (int64_t v = 0; v < TILE; v += WIDTH) {
      Floats score = load(scores + v), probability = exponential(score - shift);
      Floats gradient = (TEACHER ? probability - load(targets + v) : probability) * scale;
      Floats term = gradient * score;
      terms += term;
      store(column_terms + v, load(column_terms + v) + term);
      store(suffix + v, load(suffix + v) + gradient * norm * load(norms + v));
    }
    c.row_terms[row] += sum(terms);
    if (positive >= 0 && positive < TILE) {
      const float gradient = -scale * c.missed[row], term = gradient * c.positive_scores[row];
      c.row_terms[row] += term;
      column_terms[positive] += term;
      suffix[positive] += gradient * norm * norms[positive];
    }
  }
}

template <class E>
void write_upstream(const Chunk& c) {
  constexpr int64_t lane = Operand<E>::lane;
  E* rows = static_cast<E*>(c.upstream);
  E* packed = static_cast<E*>(c.upstream_packed);
  for (int64_t r = 0; r < c.padded_rows; r += lane)
    for (int64_t v = 0; v < TILE; v += WIDTH) {
      Floats first = r < c.rows ? load(c.suffix + r * TILE + v) : Floats{};
      Floats second = lane == 2 && r + 1 < c.rows ? load(c.suffix + (r + 1) * TILE + v) : Floats{};
      if (r < c.rows) store(rows + r * TILE + v, first);
      if (lane == 2 && r + 1 < c.rows) store(rows + (r + 1) * TILE + v, second);
      E* strip = packed + (v / STRIP) * c.padded_rows * STRIP;
      Operand<E>::write_packed(strip + r * STRIP + (v % STRIP) * lane, first, second);
    }
}

template <class E, bool TEACHER>
void add_gradients_of(const Chunk& c, int64_t begin, int64_t end) {
  const E* queries = static_cast<const E*>(c.queries_transposed);
  const E* passages = static_cast<const E*>(c.passages_by_column);
  for (int64_t tile = begin; tile < end; ++tile) {
    std::memset(c.suffix, 0, sizeof(float) * c.rows * TILE);
    if (TEACHER) to_targets(c, tile);
    for (int64_t d = c.dims - 1; d >= 0; --d) {
      const int64_t from = d ? c.ends[d - 1] : 0, width = c.ends[d] - from;
      add_gradients_of_dim<TEACHER>(c, d, tile);
      write_upstream<E>(c);
      multiply<E>(Sums::continued, c.rows, width / STRIP, TILE, static_cast<const E*>(c.upstream), TILE,
                  passages + (tile * c.components + from) * TILE, TILE * STRIP, c.query_products + from,
                  c.components);
      multiply<E>(Sums::continued, width, STRIPS, c.padded_rows, queries + from * c.padded_rows, c.padded_rows,
                  static_cast<const E*>(c.upstream_packed), c.padded_rows * STRIP,
                  c.passage_products + (tile * c.components + from) * TILE, TILE);
    }
  }
}

template <class E>
void add_gradients(const Chunk& c, int64_t begin, int64_t end) {
  c.teacher_logits ? add_gradients_of<E, true>(c, begin, end) : add_gradients_of<E, false>(c, begin, end);
}

}  // namespace

extern "C" {
int64_t drama_tile_columns() { return TILE; }
int64_t drama_depth_step_float32() { return Operand<float>::step; }
int64_t drama_depth_step_bfloat16() { return Operand<Bfloat16>::step; }
void drama_scores_float32(const Chunk* c, int64_t begin, int64_t end) { scores<float>(*c, begin, end); }
void drama_scores_bfloat16(const Chunk* c, int64_t begin, int64_t end) { scores<Bfloat16>(*c, begin, end); }
void drama_gradients_float32(const Chunk* c, int64_t begin, int64_t end) { add_gradients<float>(*c, begin, end); }
void drama_gradients_bfloat16(const Chunk* c, int64_t begin, int64_t end) { add_gradients<Bfloat16>(*c, begin, end); }
}
