// What forward and backward share: which row a lane works for, where the row's points lie, and
// how the lanes of a row hand each other what they prepared.
//
// A warp holds 32 / G neighbouring rows with G lanes each. The lanes share out the row's points
// while preparing them, and its channels while gathering, C neighbouring ones a lane.
#pragma once

#include "problem.h"

namespace cuda_ops {

struct Row {
  int32_t n, q, m;
  bool real;  // false beside the edge of a tile: such a row computes as row (n, 0, 0), unseen

  template <typename T>
  __device__ __forceinline__ int64_t index(const Attention<T>& p) const {
    return (int64_t{n} * p.Q + q) * p.M + m;
  }
};

template <typename T, int G>
__device__ __forceinline__ Row row_of(const Attention<T>& p, int64_t block, int32_t thread) {
  const int32_t tile_rows = kTileWidth * p.lines;
  const int32_t row = thread / G, in_tile = row % tile_rows;
  const int32_t group = static_cast<int32_t>(block % p.head_groups);
  const int32_t tile = static_cast<int32_t>(block / p.head_groups % p.tiles);
  Row r;
  r.n = static_cast<int32_t>(block / p.head_groups / p.tiles);
  r.m = group * p.heads + row / tile_rows;
  r.real = r.m < p.M;
  if (p.spatial) {
    int32_t l = p.L - 1;
    while (tile < p.levels[l].first_tile) --l;
    const Level& level = p.levels[l];
    const int32_t across = divide_up(level.width, kTileWidth), at = tile - level.first_tile;
    const int32_t x = at % across * kTileWidth + in_tile % kTileWidth;
    const int32_t y = at / across * p.lines + in_tile / kTileWidth;
    r.real = r.real && x < level.width && y < level.height;
    r.q = level.start + y * level.width + x;
  } else {
    r.q = tile * tile_rows + in_tile;
    r.real = r.real && r.q < p.Q;
  }
  if (!r.real) r.q = r.m = 0;
  return r;
}

// Sums and maxima over the G lanes of a row; every lane gets the result.
template <int G, typename A>
__device__ __forceinline__ A sum_of_row(A x) {
#pragma unroll
  for (int other = G / 2; other > 0; other /= 2) x += __shfl_xor_sync(kAll, x, other);
  return x;
}

template <int G, typename A>
__device__ __forceinline__ A peak_of_row(A x) {
#pragma unroll
  for (int other = G / 2; other > 0; other /= 2)
    x = larger(x, __shfl_xor_sync(kAll, x, other));
  return x;
}

// Attention weight of a logit: exp(logit - peak) * scale. With weights given, just that.
template <typename A>
struct Softmax {
  A peak, scale;

  template <typename T>
  __device__ __forceinline__ A weight(const Attention<T>& p, T logit) const {
    return p.R == 0 ? widen(logit) : exp_of(widen(logit) - peak) * scale;
  }
};

template <typename T, int G>
__device__ __forceinline__ Softmax<Wide<T>> softmax_of_row(
    const Attention<T>& p, int64_t row, int32_t lane) {
  using A = Wide<T>;
  if (p.R == 0) return {};
  const int32_t points = p.points_per_row();
  const T* logits = p.weights + row * points;
  // The peak passes over NaN, the total does not: one NaN logit makes every weight NaN.
  A peak = widen(logits[0]), total = 0;
#pragma unroll 4
  for (int32_t i = lane; i < points; i += G) peak = larger(peak, widen(logits[i]));
  peak = peak_of_row<G>(peak);
#pragma unroll 4
  for (int32_t i = lane; i < points; i += G) total += exp_of(widen(logits[i]) - peak);
  return {peak, 1 / sum_of_row<G>(total)};
}

// Where a point falls: the pixel left above of it, its distance from there, and which of its four
// corners (bit 0: left above, 1: right above, 2: left below, 3: right below) are in the image.
template <typename A>
struct Point {
  A x, y;              // pixels
  A right, bottom;     // shares of the right column and the lower line
  A scale_x, scale_y;  // pixels per unit of the raw input
  A weight;
  int32_t level;
  int32_t token;  // of the corner left above, whether it is real or not
  uint32_t spot;  // the level's width, shifted by four, and the bits of the corners
};

// i / K. The quotient is off by less than the half that keeps it from the next whole number, as
// long as i < 2^21; shared memory has room for a thousandth of that.
template <typename T>
__device__ __forceinline__ int32_t level_of(const Attention<T>& p, int32_t i) {
  return static_cast<int32_t>((static_cast<float>(i) + 0.5f) * p.levels_per_point);
}

template <typename T>
__device__ __forceinline__ Point<Wide<T>> place(
    const Attention<T>& p, const Row& row, int64_t index, int32_t i,
    const Softmax<Wide<T>>& softmax) {
  using A = Wide<T>;
  Point<A> point{};
  const int32_t points = p.points_per_row();
  if (i >= points) return point;
  point.level = level_of(p, i);
  const Level& level = p.levels[point.level];
  const A width = A(level.width), height = A(level.height);
  const int64_t at = index * points + i;
  point.weight = softmax.weight(p, p.weights[at]);
  if (p.R == 0) {
    const auto location = static_cast<const Pack<A, 2>*>(p.points)[at];
    point.scale_x = width;
    point.scale_y = height;
    point.x = location.numbers[0] * width - A(0.5);
    point.y = location.numbers[1] * height - A(0.5);
  } else {
    const auto offset = static_cast<const Pack<T, 2>*>(p.points)[at];
    const A* reference =
        p.reference + ((int64_t{row.n} * p.Q + row.q) * p.L + point.level) * p.R;
    const A unit = A(0.5) / A(p.K);
    point.scale_x = p.R == 2 ? A(1) : reference[2] * width * unit;
    point.scale_y = p.R == 2 ? A(1) : reference[3] * height * unit;
    point.x = reference[0] * width - A(0.5) + widen(offset.numbers[0]) * point.scale_x;
    point.y = reference[1] * height - A(0.5) + widen(offset.numbers[1]) * point.scale_y;
  }
  // A NaN coordinate touches nothing.
  if (!(point.x > A(-1) && point.x < width && point.y > A(-1) && point.y < height)) return point;
  const A left = floor(point.x), top = floor(point.y);
  point.right = point.x - left;
  point.bottom = point.y - top;
  const int32_t column = static_cast<int32_t>(left), line = static_cast<int32_t>(top);
  const uint32_t columns = (column >= 0 ? 1u : 0u) | (column + 1 < level.width ? 2u : 0u);
  const uint32_t corners =
      (line >= 0 ? columns : 0u) | (line + 1 < level.height ? columns << 2 : 0u);
  point.token = level.start + line * level.width + column;
  point.spot = static_cast<uint32_t>(level.width) << 4 | corners;
  return point;
}

// Token 0 of a row's image and head at one lane's channels, and the token right of it.
template <typename T, int C>
struct Tokens {
  using Load = typename Loaded<T, C>::type;
  const char *left, *right;
  int32_t stride;  // bytes

  // Lanes beyond the last channel read the first ones, and nothing comes of it.
  __device__ __forceinline__ Tokens(const Attention<T>& p, const Row& row, int32_t d)
      : stride(p.M * p.D * static_cast<int32_t>(sizeof(T))) {
    const T* head = p.value + (int64_t{row.n} * p.S * p.M + row.m) * p.D + (d < p.D ? d : 0);
    left = opaque(reinterpret_cast<const char*>(head));
    right = opaque(left + stride);
  }

  // The four corners of a point; zeros outside of the image.
  __device__ __forceinline__ void load(int32_t token, uint32_t spot, Load (&corners)[4]) const {
    const int32_t below = token + static_cast<int32_t>(spot >> 4);
    const char* const addresses[4] = {
        left + int64_t{token} * stride, right + int64_t{token} * stride,
        left + int64_t{below} * stride, right + int64_t{below} * stride};
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      corners[corner] = Load{};
      if (spot >> corner & 1) corners[corner] = *reinterpret_cast<const Load*>(addresses[corner]);
    }
  }
};

// Keeps the compiler from fetching the corners of all points at once, for which the registers
// would not do: other warps hide what one waits for.
__device__ __forceinline__ void fetch_no_further() { asm volatile("" ::: "memory"); }

}  // namespace cuda_ops
