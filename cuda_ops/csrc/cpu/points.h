// The sampling points of several rows (one image and head, consecutive queries), prepared side by
// side: attention weights, the pixels that each point touches and the shares of its corners.
#pragma once

#include "slices.h"

namespace {

constexpr int64_t kPadding = 16;  // points: the longest vector of floats
constexpr int64_t kBlock = 256;   // points of a level that are prepared together

// Points of levels [l0, l1) of up to `rows` rows. They are used level by level: what the points of
// one level touch stays in the L1 cache from row to row. Whatever lies behind the last row is
// computed along, and never read.
template <typename A>
struct Points {
  int64_t l0, l1, rows, capacity;  // of a level's arrays
  int64_t pitch;                   // of a row's weights
  // Of all levels; [l - l0, row, k]
  A *x, *y;                        // raw inputs
  A* attention;
  A *origin_x, *origin_y;          // pixel = origin + scale * raw input
  A *scale_x, *scale_y;
  A* row_weights;                  // [row, l, k], padded: the softmax of whole rows
  // Of the level that `place` was called for last; [row, k]
  A *right, *bottom;               // shares of the right column and of the lower line
  A* shares[4];                    // of the four corners, times the attention weight
  int32_t *upper, *lower;          // pixels of the left corners; the same for a point outside

  Points(Arena& arena, const Problem& p, int64_t l0_, int64_t l1_)
      : l0(l0_), l1(l1_), rows(p.K < kBlock ? kBlock / p.K : 1),
        capacity(round_up(rows * p.K, kPadding)), pitch(round_up(p.L * p.K, kPadding)) {
    A** all[] = {&x, &y, &attention, &origin_x, &origin_y, &scale_x, &scale_y};
    for (A** array : all) *array = arena.take<A>((l1 - l0) * capacity);
    row_weights = arena.take<A>(rows * pitch);
    A** placed[] = {&right, &bottom, &shares[0], &shares[1], &shares[2], &shares[3]};
    for (A** array : placed) *array = arena.take<A>(capacity);
    upper = arena.take<int32_t>(capacity);
    lower = arena.take<int32_t>(capacity);
  }

  // Fills what does not depend on the row, unless reference points are boxes.
  void set_scales(const Problem& p) {
    for (int64_t i = 0; i < (l1 - l0) * capacity; ++i) {
      const int64_t l = l0 + i / capacity;
      scale_x[i] = p.R == 0 ? static_cast<A>(p.shapes[2 * l + 1]) : A{1};
      scale_y[i] = p.R == 0 ? static_cast<A>(p.shapes[2 * l]) : A{1};
      origin_x[i] = origin_y[i] = static_cast<A>(-0.5);
    }
  }
};

// weights[0, padded) = softmax of logits[0, count), zeros behind. Not inlined, so that the forward,
// the backward and `finish` cannot be compiled to differ in a bit. kPadded: padded, if not 0.
template <typename T, int kPadded>
__attribute__((noinline)) void softmax(
    const T* __restrict logits, int64_t count, Wide<T>* __restrict weights) {
  using A = Wide<T>;
  const int64_t padded = kPadded ? kPadded : round_up(count, kPadding);
  if (kPadded) count = kPadded;
  for (int64_t i = 0; i < count; ++i) weights[i] = widen(logits[i]);
  for (int64_t i = count; i < padded; ++i) weights[i] = -static_cast<A>(__builtin_inff());
  using V = Vector<A>;
  V* vectors = reinterpret_cast<V*>(weights);
  const int64_t number = padded / kLanes<A>;
  V peak = vectors[0], total = {};
  for (int64_t v = 1; v < number; ++v) peak = vectors[v] > peak ? vectors[v] : peak;
  peak = over_lanes<A>(peak, [](V a, V b) { return a > b ? a : b; });
  for (int64_t v = 0; v < number; ++v) vectors[v] -= peak;
#pragma omp simd
  for (int64_t i = 0; i < padded; ++i) weights[i] = exp_of_nonpositive(weights[i]);
  for (int64_t v = 0; v < number; ++v) total += vectors[v];
  const V scale = 1 / over_lanes<A>(total, [](V a, V b) { return a + b; });
  for (int64_t v = 0; v < number; ++v) vectors[v] *= scale;
}

template <typename T>
inline void softmax(const T* logits, int64_t count, Wide<T>* weights) {
  count == 16 ? softmax<T, 16>(logits, count, weights) : softmax<T, 0>(logits, count, weights);
}

// Calls `body` with the number of points per level, which is a constant to the compiler if it is 4,
// as it is in nearly every model: loops over it are too short to pay for a general form.
struct Four {
  constexpr operator int64_t() const { return 4; }
};
template <typename Body>
inline void with_constant(int64_t K, Body body) {
  K == 4 ? body(Four{}) : body(K);
}

template <typename T>
inline void load_pairs(
    const T* __restrict source, int64_t count, Wide<T>* __restrict x, Wide<T>* __restrict y) {
  for (int64_t i = 0; i < count; ++i) {
    x[i] = widen(source[2 * i]);
    y[i] = widen(source[2 * i + 1]);
  }
}

template <typename A>
inline void fill(A* array, int64_t count, A number) {
  for (int64_t i = 0; i < count; ++i) array[i] = number;
}

// Loads rows [q, q + rows) of head m of image n.
template <typename T, typename PointsPerLevel>
void load_rows(
    const Problem& p, PointsPerLevel K, Points<Wide<T>>& points, int64_t n, int64_t q, int64_t m,
    int64_t rows) {
  using A = Wide<T>;
  const int64_t count = p.L * K;
  const A half = static_cast<A>(0.5), box_unit = half / static_cast<A>(K);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = (n * p.Q + q + r) * p.M + m, next = kAhead * p.M * count;
    const T* weights = static_cast<const T*>(p.weights) + row * count;
    const A* reference = static_cast<const A*>(p.reference) + (n * p.Q + q + r) * p.L * p.R;
    A* softened = points.row_weights + r * points.pitch;
    prefetch<0>(weights + next, count);
    if (p.R == 0) {
      widen_row(weights, count, softened);
      prefetch<0>(static_cast<const A*>(p.points) + (row * count + next) * 2, count * 2);
    } else {
      softmax(weights, count, softened);
      prefetch<0>(static_cast<const T*>(p.points) + (row * count + next) * 2, count * 2);
    }
    for (int64_t l = points.l0; l < points.l1; ++l) {
      const int64_t source = (row * count + l * K) * 2;
      const int64_t target = (l - points.l0) * points.capacity + r * K;
      A* __restrict attention = points.attention + target;
      A* __restrict x = points.x + target;
      A* __restrict y = points.y + target;
      for (int64_t k = 0; k < K; ++k) attention[k] = softened[l * K + k];
      if (p.R == 0) {
        load_pairs(static_cast<const A*>(p.points) + source, K, x, y);
        continue;
      }
      load_pairs(static_cast<const T*>(p.points) + source, K, x, y);
      const A w = static_cast<A>(p.shapes[2 * l + 1]), h = static_cast<A>(p.shapes[2 * l]);
      const A* box = reference + l * p.R;
      fill(points.origin_x + target, K, box[0] * w - half);
      fill(points.origin_y + target, K, box[1] * h - half);
      if (p.R == 2) continue;
      fill(points.scale_x + target, K, box[2] * w * box_unit);
      fill(points.scale_y + target, K, box[3] * h * box_unit);
    }
  }
}

// Places the points of level l of `rows` loaded rows; `first` is the level's first bordered pixel.
template <typename A>
void place(const Problem& p, Points<A>& points, int64_t l, int64_t first, int64_t rows) {
  const int64_t start = (l - points.l0) * points.capacity;
  const A* __restrict attention = points.attention + start;
  const A* __restrict origin_x = points.origin_x + start;
  const A* __restrict origin_y = points.origin_y + start;
  const A* __restrict scale_x = points.scale_x + start;
  const A* __restrict scale_y = points.scale_y + start;
  const A* __restrict raw_x = points.x + start;
  const A* __restrict raw_y = points.y + start;
  A* __restrict right = points.right;
  A* __restrict bottom = points.bottom;
  A* __restrict share0 = points.shares[0];
  A* __restrict share1 = points.shares[1];
  A* __restrict share2 = points.shares[2];
  A* __restrict share3 = points.shares[3];
  int32_t* __restrict upper = points.upper;
  int32_t* __restrict lower = points.lower;
  const A width = static_cast<A>(p.shapes[2 * l + 1]), height = static_cast<A>(p.shapes[2 * l]);
  const int32_t stride = static_cast<int32_t>(p.shapes[2 * l + 1]) + 2;
  const int32_t origin = static_cast<int32_t>(first) + stride + 1;
  const int64_t count = round_up(rows * p.K, kPadding);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const A given_x = origin_x[i] + raw_x[i] * scale_x[i];
    const A given_y = origin_y[i] + raw_y[i] * scale_y[i];
    const bool inside =
        (given_x > A{-1}) & (given_x < width) & (given_y > A{-1}) & (given_y < height);
    // A point outside goes to the border's corner, with no weight.
    const A corner = static_cast<A>(-0.5);
    const A x = inside ? given_x : corner, y = inside ? given_y : corner;
    // Floor: truncation, less one below zero, where x > -1.
    const int32_t column = static_cast<int32_t>(x) - static_cast<int32_t>(x < 0);
    const int32_t line = static_cast<int32_t>(y) - static_cast<int32_t>(y < 0);
    const A from_left = x - static_cast<A>(column), from_top = y - static_cast<A>(line);
    const A weight = inside ? attention[i] : A{0};
    const A below = weight * from_top, above = weight - below;
    right[i] = from_left;
    bottom[i] = from_top;
    share1[i] = above * from_left;
    share0[i] = above - share1[i];
    share3[i] = below * from_left;
    share2[i] = below - share3[i];
    upper[i] = origin + line * stride + column;
    lower[i] = upper[i] + (inside ? stride : 0);
  }
}

// The corners of placed points: 0 and 1 of the upper line, 2 and 3 of the lower one. It holds the
// pointers itself, where no store through another pointer can seem to change them.
template <typename A>
struct Corners {
  const A* shares[4];
  const int32_t *upper, *lower;

  explicit Corners(const Points<A>& points)
      : shares{points.shares[0], points.shares[1], points.shares[2], points.shares[3]},
        upper(points.upper), lower(points.lower) {}

  int64_t pixel(int corner, int64_t i) const {
    return (corner < 2 ? upper : lower)[i] + corner % 2;
  }
};

}  // namespace
