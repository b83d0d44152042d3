// What each thread of the CUDA kernels does between two barriers, as plain functions of the
// block's and the thread's number. attention.cu runs them on a GPU; the tests run the very same
// functions on the CPU, looping over blocks and threads, so that arithmetic and indexing are
// tested where there is no GPU.
//
// A row is one (image, query, head). Forward and backward blocks hold `rows` rows with `lanes`
// threads each; the lanes of a row share out its channels, C neighbouring ones at a time.
// N batch, S tokens, M heads, D channels per head, Q queries, L levels, K points, P = L * K.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define CUDA_OPS_INLINE __host__ __device__ __forceinline__
#else
#include <cmath>
#define CUDA_OPS_INLINE inline
#endif

namespace cuda_ops {

constexpr int kMaxLevels = 64;     // sizes travel in the kernel's parameters
constexpr int kChunk = 8;          // points whose partial sums are in shared memory at a time
constexpr int kSharedBytes = 48 * 1024;
constexpr int kWarp = 32;

template <typename T>
struct WideOf {
  typedef float type;
};
template <>
struct WideOf<double> {
  typedef double type;
};
template <typename T>
using Wide = typename WideOf<T>::type;

CUDA_OPS_INLINE float widen(float x) { return x; }
CUDA_OPS_INLINE double widen(double x) { return x; }
CUDA_OPS_INLINE void narrow(float from, float& to) { to = from; }
CUDA_OPS_INLINE void narrow(double from, double& to) { to = from; }
CUDA_OPS_INLINE float exp_of(float x) { return expf(x); }
CUDA_OPS_INLINE double exp_of(double x) { return exp(x); }
#if defined(__CUDACC__)
CUDA_OPS_INLINE float widen(__half x) { return __half2float(x); }
CUDA_OPS_INLINE float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
CUDA_OPS_INLINE void narrow(float from, __half& to) { to = __float2half_rn(from); }
CUDA_OPS_INLINE void narrow(float from, __nv_bfloat16& to) { to = __float2bfloat16_rn(from); }
#endif

// One load or store of C neighbouring numbers.
template <typename T, int C>
struct alignas(C * sizeof(T)) Pack {
  T numbers[C];
};

struct Levels {
  int32_t height[kMaxLevels], width[kMaxLevels], start[kMaxLevels];
};

template <typename T>
struct Attention {
  using A = Wide<T>;
  int64_t N, S, M, D, Q, L, K;
  int64_t R;                // numbers in a reference point (2 or 4); 0: locations are given
  Levels levels;
  const T* value;           // [N, S, M, D]
  const void* points;       // [N, Q, M, L, K, 2]: offsets (T), or with R = 0 locations (A)
  const T* weights;         // [N, Q, M, L * K]: logits, or with R = 0 attention weights
  const A* reference;       // [N, Q, L, R]
  T* output;                // [N, Q, M, D]

  const T* grad_output;     // [N, Q, M, D]
  A* grad_value;            // [N, S, M, D], zeroed; null in deterministic mode
  A* placed;                // [N, Q, M, L * K, 3]: x, y, weight; deterministic mode only
  void* grad_points;        // as points
  T* grad_weights;          // as weights
  A* reference_parts;       // [N, Q, M, L, R], or null

  int rows, lanes;

  CUDA_OPS_INLINE int64_t row_count() const { return N * Q * M; }
  CUDA_OPS_INLINE int64_t row_points() const { return L * K; }
  CUDA_OPS_INLINE int64_t blocks() const { return (row_count() + rows - 1) / rows; }
  CUDA_OPS_INLINE int threads() const { return rows * lanes; }
};

// The block's shared memory. Per row: x, y, weight and dot of every point; backward also the
// lanes' partial sums of a chunk of points, and one sum.
template <typename A>
struct Shared {
  A* memory;
  int64_t points;
  int rows, lanes;

  static CUDA_OPS_INLINE int64_t numbers(int64_t points, int rows, int lanes, bool backward) {
    return rows * (backward ? 4 * points + int64_t{3} * kChunk * lanes + 1 : 3 * points);
  }
  CUDA_OPS_INLINE A& x(int64_t row, int64_t point) const { return memory[row * points + point]; }
  CUDA_OPS_INLINE A& y(int64_t row, int64_t point) const {
    return memory[(rows + row) * points + point];
  }
  CUDA_OPS_INLINE A& weight(int64_t row, int64_t point) const {
    return memory[(2 * rows + row) * points + point];
  }
  CUDA_OPS_INLINE A& dot(int64_t row, int64_t point) const {
    return memory[(3 * rows + row) * points + point];
  }
  CUDA_OPS_INLINE A& partial(int64_t row, int which, int64_t in_chunk, int lane) const {
    return memory[4 * rows * points + ((row * 3 + which) * kChunk + in_chunk) * lanes + lane];
  }
  CUDA_OPS_INLINE A& mean(int64_t row) const {
    return memory[4 * rows * points + int64_t{3} * rows * kChunk * lanes + row];
  }
};

// A point's four neighbours: tokens within the level (-1 outside of it) and bilinear shares.
template <typename A>
struct Footprint {
  int32_t token[4];
  A left, right, top, bottom;

  CUDA_OPS_INLINE A share(int corner) const {
    return (corner & 1 ? right : left) * (corner & 2 ? bottom : top);
  }
};

// False for a point that touches no pixel; a NaN coordinate touches none.
template <typename A>
CUDA_OPS_INLINE bool footprint(A x, A y, int32_t height, int32_t width, Footprint<A>& f) {
  if (!(x > A(-1) && x < A(width) && y > A(-1) && y < A(height))) return false;
  const int32_t column = static_cast<int32_t>(x) - (x < 0 ? 1 : 0);
  const int32_t line = static_cast<int32_t>(y) - (y < 0 ? 1 : 0);
  f.right = x - A(column);
  f.left = 1 - f.right;
  f.bottom = y - A(line);
  f.top = 1 - f.bottom;
  const bool columns[2] = {column >= 0, column + 1 < width};
  const bool lines[2] = {line >= 0, line + 1 < height};
  for (int corner = 0; corner < 4; ++corner) {
    const int dx = corner & 1, dy = corner >> 1;
    f.token[corner] = columns[dx] && lines[dy] ? (line + dy) * width + column + dx : -1;
  }
  return true;
}

// The scale of a raw offset or location: pixels per unit, and for 4-d references per box.
template <typename T>
struct Scale {
  Wide<T> x, y;
};

template <typename T>
CUDA_OPS_INLINE Scale<T> scale_of(const Attention<T>& p, int64_t row, int64_t level) {
  using A = Wide<T>;
  const A width = A(p.levels.width[level]), height = A(p.levels.height[level]);
  if (p.R == 0) return {width, height};
  if (p.R == 2) return {A(1), A(1)};
  const A* reference = p.reference + (row / p.M * p.L + level) * p.R;
  const A unit = A(0.5) / A(p.K);
  return {reference[2] * width * unit, reference[3] * height * unit};
}

// Phase 1: pixel coordinates and raw weights of all points of the block's rows.
template <typename T>
CUDA_OPS_INLINE void place_points(
    const Attention<T>& p, const Shared<Wide<T>>& shared, int64_t block, int thread) {
  using A = Wide<T>;
  const int64_t points = p.row_points();
  for (int64_t i = thread; i < p.rows * points; i += p.threads()) {
    const int64_t r = i / points, point = i % points, row = block * p.rows + r;
    if (row >= p.row_count()) return;
    const int64_t level = point / p.K, at = row * points + point;
    const Scale<T> scale = scale_of(p, row, level);
    A x, y;
    if (p.R == 0) {
      const A* location = static_cast<const A*>(p.points) + 2 * at;
      x = location[0] * scale.x - A(0.5);
      y = location[1] * scale.y - A(0.5);
    } else {
      const T* offset = static_cast<const T*>(p.points) + 2 * at;
      const A* reference = p.reference + (row / p.M * p.L + level) * p.R;
      x = reference[0] * A(p.levels.width[level]) - A(0.5) + widen(offset[0]) * scale.x;
      y = reference[1] * A(p.levels.height[level]) - A(0.5) + widen(offset[1]) * scale.y;
    }
    shared.x(r, point) = x;
    shared.y(r, point) = y;
    shared.weight(r, point) = widen(p.weights[at]);
  }
}

// Phase 2, fused only: one thread a row turns its logits into weights.
template <typename T>
CUDA_OPS_INLINE void softmax_rows(
    const Attention<T>& p, const Shared<Wide<T>>& shared, int64_t block, int thread) {
  using A = Wide<T>;
  if (p.R == 0 || thread >= p.rows || block * p.rows + thread >= p.row_count()) return;
  const int64_t points = p.row_points();
  A peak = shared.weight(thread, 0), total = 0;
  for (int64_t i = 1; i < points; ++i) {
    const A logit = shared.weight(thread, i);
    peak = logit > peak ? logit : peak;
  }
  for (int64_t i = 0; i < points; ++i) {
    const A weight = exp_of(shared.weight(thread, i) - peak);
    shared.weight(thread, i) = weight;
    total += weight;
  }
  const A scale = 1 / total;
  for (int64_t i = 0; i < points; ++i) shared.weight(thread, i) *= scale;
}

// Phase 3, forward: a thread sums its channels over all points of its row, and stores them.
template <typename T, int C>
CUDA_OPS_INLINE void gather_rows(
    const Attention<T>& p, const Shared<Wide<T>>& shared, int64_t block, int thread) {
  using A = Wide<T>;
  const int64_t r = thread / p.lanes, row = block * p.rows + r;
  if (row >= p.row_count()) return;
  const int64_t m = row % p.M, n = row / (p.Q * p.M);
  for (int64_t d = thread % p.lanes * C; d < p.D; d += p.lanes * C) {
    A sums[C] = {};
    for (int64_t level = 0, point = 0; level < p.L; ++level) {
      const int32_t height = p.levels.height[level], width = p.levels.width[level];
      const T* tokens = p.value + ((n * p.S + p.levels.start[level]) * p.M + m) * p.D + d;
      for (int64_t k = 0; k < p.K; ++k, ++point) {
        Footprint<A> f;
        if (!footprint(shared.x(r, point), shared.y(r, point), height, width, f)) continue;
        const A weight = shared.weight(r, point);
        for (int corner = 0; corner < 4; ++corner) {
          if (f.token[corner] < 0) continue;
          const Pack<T, C> pixel =
              *reinterpret_cast<const Pack<T, C>*>(tokens + f.token[corner] * p.M * p.D);
          const A share = weight * f.share(corner);
          for (int c = 0; c < C; ++c) sums[c] += share * widen(pixel.numbers[c]);
        }
      }
    }
    Pack<T, C> output;
    for (int c = 0; c < C; ++c) narrow(sums[c], output.numbers[c]);
    *reinterpret_cast<Pack<T, C>*>(p.output + row * p.D + d) = output;
  }
}

// Phase 3 of the deterministic backward: keeps the placed points for the owners' kernel.
template <typename T>
CUDA_OPS_INLINE void keep_points(
    const Attention<T>& p, const Shared<Wide<T>>& shared, int64_t block, int thread) {
  const int64_t points = p.row_points();
  for (int64_t i = thread; i < p.rows * points; i += p.threads()) {
    const int64_t r = i / points, point = i % points, row = block * p.rows + r;
    if (row >= p.row_count()) return;
    Wide<T>* placed = p.placed + (row * points + point) * 3;
    placed[0] = shared.x(r, point);
    placed[1] = shared.y(r, point);
    placed[2] = shared.weight(r, point);
  }
}

// Phase 4, once per chunk of points: a thread's part of the inner products of grad_output with
// the output's derivatives by x, y and weight; and, through `add`, the gradient of value.
template <typename T, int C, typename Add>
CUDA_OPS_INLINE void scatter_rows(
    const Attention<T>& p, const Shared<Wide<T>>& shared, int64_t block, int thread,
    int64_t chunk, const Add& add) {
  using A = Wide<T>;
  const int lane = thread % p.lanes;
  const int64_t r = thread / p.lanes, row = block * p.rows + r;
  if (row >= p.row_count()) return;
  const int64_t m = row % p.M, n = row / (p.Q * p.M), points = p.row_points();
  const int64_t end = chunk + kChunk < points ? chunk + kChunk : points;
  for (int64_t point = chunk; point < end; ++point) {
    const int64_t level = point / p.K;
    const int64_t tokens = ((n * p.S + p.levels.start[level]) * p.M + m) * p.D;
    const A weight = shared.weight(r, point);
    A by_x = 0, by_y = 0, by_weight = 0;
    Footprint<A> f;
    if (footprint(
            shared.x(r, point), shared.y(r, point), p.levels.height[level],
            p.levels.width[level], f)) {
      A dots[4] = {};
      for (int64_t d = lane * C; d < p.D; d += p.lanes * C) {
        const Pack<T, C> grad =
            *reinterpret_cast<const Pack<T, C>*>(p.grad_output + row * p.D + d);
        for (int corner = 0; corner < 4; ++corner) {
          if (f.token[corner] < 0) continue;
          const int64_t at = tokens + f.token[corner] * p.M * p.D + d;
          const Pack<T, C> pixel = *reinterpret_cast<const Pack<T, C>*>(p.value + at);
          const A share = weight * f.share(corner);
          A amounts[C];
          for (int c = 0; c < C; ++c) {
            const A g = widen(grad.numbers[c]);
            dots[corner] += g * widen(pixel.numbers[c]);
            amounts[c] = share * g;
          }
          if (p.grad_value != nullptr) add(p.grad_value + at, amounts);
        }
      }
      by_x = weight * (f.top * (dots[1] - dots[0]) + f.bottom * (dots[3] - dots[2]));
      by_y = weight * (f.left * (dots[2] - dots[0]) + f.right * (dots[3] - dots[1]));
      by_weight = f.top * (f.left * dots[0] + f.right * dots[1]) +
                  f.bottom * (f.left * dots[2] + f.right * dots[3]);
    }
    shared.partial(r, 0, point - chunk, lane) = by_x;
    shared.partial(r, 1, point - chunk, lane) = by_y;
    shared.partial(r, 2, point - chunk, lane) = by_weight;
  }
}

// Phase 5, once per chunk: sums over the lanes; gradients of points, and for the plain operator
// of weights. The derivatives by x and y take the places of x and y.
template <typename T>
CUDA_OPS_INLINE void sum_lanes(
    const Attention<T>& p, const Shared<Wide<T>>& shared, int64_t block, int thread,
    int64_t chunk) {
  using A = Wide<T>;
  const int64_t points = p.row_points();
  for (int64_t i = thread; i < p.rows * kChunk; i += p.threads()) {
    const int64_t r = i / kChunk, point = chunk + i % kChunk, row = block * p.rows + r;
    if (row >= p.row_count() || point >= points) continue;
    A sums[3] = {};
    for (int lane = 0; lane < p.lanes; ++lane) {
      for (int which = 0; which < 3; ++which)
        sums[which] += shared.partial(r, which, point - chunk, lane);
    }
    const Scale<T> scale = scale_of(p, row, point / p.K);
    const int64_t at = row * points + point;
    shared.x(r, point) = sums[0];
    shared.y(r, point) = sums[1];
    shared.dot(r, point) = sums[2];
    if (p.R == 0) {
      static_cast<A*>(p.grad_points)[2 * at] = sums[0] * scale.x;
      static_cast<A*>(p.grad_points)[2 * at + 1] = sums[1] * scale.y;
      narrow(sums[2], p.grad_weights[at]);
    } else {
      narrow(sums[0] * scale.x, static_cast<T*>(p.grad_points)[2 * at]);
      narrow(sums[1] * scale.y, static_cast<T*>(p.grad_points)[2 * at + 1]);
    }
  }
}

// Phase 6, fused only: one thread a row takes the weighted mean of the row's dots.
template <typename T>
CUDA_OPS_INLINE void mean_dots(
    const Attention<T>& p, const Shared<Wide<T>>& shared, int64_t block, int thread) {
  if (p.R == 0 || thread >= p.rows || block * p.rows + thread >= p.row_count()) return;
  Wide<T> mean = 0;
  for (int64_t i = 0; i < p.row_points(); ++i)
    mean += shared.weight(thread, i) * shared.dot(thread, i);
  shared.mean(thread) = mean;
}

// Phase 7, fused only: gradients of logits, and each row's part of those of reference points.
template <typename T>
CUDA_OPS_INLINE void finish_rows(
    const Attention<T>& p, const Shared<Wide<T>>& shared, int64_t block, int thread) {
  using A = Wide<T>;
  if (p.R == 0) return;
  const int64_t points = p.row_points();
  for (int64_t i = thread; i < p.rows * points; i += p.threads()) {
    const int64_t r = i / points, point = i % points, row = block * p.rows + r;
    if (row >= p.row_count()) break;
    narrow(
        shared.weight(r, point) * (shared.dot(r, point) - shared.mean(r)),
        p.grad_weights[row * points + point]);
  }
  if (p.reference_parts == nullptr) return;
  for (int64_t i = thread; i < p.rows * p.L; i += p.threads()) {
    const int64_t r = i / p.L, level = i % p.L, row = block * p.rows + r;
    if (row >= p.row_count()) break;
    A x = 0, y = 0, w = 0, h = 0;
    for (int64_t point = level * p.K; point < (level + 1) * p.K; ++point) {
      const T* offset = static_cast<const T*>(p.points) + 2 * (row * points + point);
      x += shared.x(r, point);
      y += shared.y(r, point);
      w += shared.x(r, point) * widen(offset[0]);
      h += shared.y(r, point) * widen(offset[1]);
    }
    const A width = A(p.levels.width[level]), height = A(p.levels.height[level]);
    A* part = p.reference_parts + (row * p.L + level) * p.R;
    part[0] = x * width;
    part[1] = y * height;
    if (p.R == 4) {
      const A unit = A(0.5) / A(p.K);
      part[2] = w * width * unit;
      part[3] = h * height * unit;
    }
  }
}

// The deterministic gradient of value: a warp owns `strip` neighbouring tokens of one (image,
// head, level), reads that level's points in order, a warpful at a time, and adds up in shared
// memory what falls on its tokens: no atomics, one order of additions.
template <typename T>
struct Owners {
  using A = Wide<T>;
  int64_t N, S, M, D, Q, L, K;
  Levels levels;
  int32_t first_strip[kMaxLevels + 1];  // number of the level's first strip
  const T* grad_output;                 // [N, Q, M, D]
  const A* placed;                      // [N, Q, M, L * K, 3]
  T* grad_value;                        // [N, S, M, D]
  int strip;

  CUDA_OPS_INLINE int64_t blocks() const { return N * M * first_strip[L]; }
};

template <typename T>
struct Owned {
  int64_t n, m, level;
  int32_t begin, end;  // tokens within the level
};

template <typename T>
CUDA_OPS_INLINE Owned<T> owned_by(const Owners<T>& p, int64_t block) {
  Owned<T> mine;
  const int32_t strip = static_cast<int32_t>(block % p.first_strip[p.L]);
  const int64_t head = block / p.first_strip[p.L];
  mine.n = head / p.M;
  mine.m = head % p.M;
  mine.level = 0;
  while (strip >= p.first_strip[mine.level + 1]) ++mine.level;
  const int32_t tokens = p.levels.height[mine.level] * p.levels.width[mine.level];
  mine.begin = (strip - p.first_strip[mine.level]) * p.strip;
  mine.end = tokens - mine.begin < p.strip ? tokens : mine.begin + p.strip;
  return mine;
}

// The point number `i` of the owned level: its place in `placed`, in the order (query, point).
template <typename T>
CUDA_OPS_INLINE int64_t placed_row(const Owners<T>& p, const Owned<T>& mine, int64_t i) {
  return (mine.n * p.Q + i / p.K) * p.M + mine.m;
}

// Whether point `i` touches an owned token.
template <typename T>
CUDA_OPS_INLINE bool touches_owned(const Owners<T>& p, const Owned<T>& mine, int64_t i) {
  if (i >= p.Q * p.K) return false;
  const Wide<T>* placed =
      p.placed + 3 * ((placed_row(p, mine, i) * p.L + mine.level) * p.K + i % p.K);
  Footprint<Wide<T>> f;
  if (!footprint(
          placed[0], placed[1], p.levels.height[mine.level], p.levels.width[mine.level], f))
    return false;
  bool touches = false;
  for (int corner = 0; corner < 4; ++corner)
    touches = touches || (f.token[corner] >= mine.begin && f.token[corner] < mine.end);
  return touches;
}

// Adds point `i` to the sums [strip, D] of the owned tokens, each lane for its own channels.
template <typename T>
CUDA_OPS_INLINE void add_point(
    const Owners<T>& p, const Owned<T>& mine, int64_t i, int lane, Wide<T>* sums) {
  using A = Wide<T>;
  const int64_t row = placed_row(p, mine, i);
  const A* placed = p.placed + 3 * ((row * p.L + mine.level) * p.K + i % p.K);
  Footprint<A> f;
  footprint(placed[0], placed[1], p.levels.height[mine.level], p.levels.width[mine.level], f);
  for (int64_t d = lane; d < p.D; d += kWarp) {
    const A grad = placed[2] * widen(p.grad_output[row * p.D + d]);
    for (int corner = 0; corner < 4; ++corner) {
      const int32_t token = f.token[corner];
      if (token >= mine.begin && token < mine.end)
        sums[(token - mine.begin) * p.D + d] += f.share(corner) * grad;
    }
  }
}

template <typename T>
CUDA_OPS_INLINE void clear_owned(
    const Owners<T>& p, const Owned<T>& mine, int lane, Wide<T>* sums) {
  for (int64_t i = lane; i < (mine.end - mine.begin) * p.D; i += kWarp) sums[i] = 0;
}

template <typename T>
CUDA_OPS_INLINE void store_owned(
    const Owners<T>& p, const Owned<T>& mine, int lane, const Wide<T>* sums) {
  const int64_t first = mine.n * p.S + p.levels.start[mine.level] + mine.begin;
  for (int64_t i = lane; i < (mine.end - mine.begin) * p.D; i += kWarp)
    narrow(sums[i], p.grad_value[((first + i / p.D) * p.M + mine.m) * p.D + i % p.D]);
}

// How a launch is divided, from sizes alone.

template <typename T>
CUDA_OPS_INLINE void divide_rows(Attention<T>& p, int channels_per_load, bool backward) {
  constexpr int kThreads = 128;
  p.lanes = 1;
  while (p.lanes < kWarp && p.lanes * channels_per_load < p.D) p.lanes *= 2;
  p.rows = kThreads / p.lanes;
  while (p.rows > 1 && Shared<Wide<T>>::numbers(p.row_points(), p.rows, p.lanes, backward) *
                               static_cast<int64_t>(sizeof(Wide<T>)) > kSharedBytes)
    p.rows /= 2;
}

template <typename T>
CUDA_OPS_INLINE void divide_tokens(Owners<T>& p) {
  constexpr int64_t kBytes = 8 * 1024;  // of sums a warp: 28 warps then fit an SM
  const int64_t fits = kBytes / (p.D * static_cast<int64_t>(sizeof(Wide<T>)));
  p.strip = static_cast<int>(fits < 1 ? 1 : fits);
  p.first_strip[0] = 0;
  for (int64_t l = 0; l < p.L; ++l) {
    const int32_t tokens = p.levels.height[l] * p.levels.width[l];
    p.first_strip[l + 1] = p.first_strip[l] + (tokens + p.strip - 1) / p.strip;
  }
}

}  // namespace cuda_ops
