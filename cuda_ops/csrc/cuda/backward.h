// The backward's first kernel: gradients of points, weights and reference points. It gathers like
// the forward, and leaves for the owners (owners.h) where each point fell and what it weighs.
#pragma once

#include "rows.h"

namespace cuda_ops {

// A point of the chunk at hand, as the lane that prepared it will need it again.
template <typename A>
struct Prepared {
  A right, bottom, scale_x, scale_y;
};
// Derivatives by a point's weight and pixel, kept for sums over its row or level.
template <typename A>
struct Kept {
  A by_weight, weight, by_x, by_y;
};

// The memory of a warp.
template <typename A>
struct alignas(16) BackwardShared {
  Pack<int32_t, 2> spots[kWarp];
  Prepared<A> prepared[kWarp];
  A weights[kWarp];

  // After these, [32 / G, P].
  __device__ __forceinline__ Kept<A>* kept() { return reinterpret_cast<Kept<A>*>(this + 1); }
  // `points`: of all rows of a warp.
  __host__ __device__ static int64_t bytes(int64_t points) {
    return static_cast<int64_t>(sizeof(BackwardShared) + points * sizeof(Kept<A>));
  }
};

constexpr int kQuad = 4;  // points whose sums over the lanes are taken together

// Adds up sums[point][corner] over the G lanes of a row. Lane `i` of the row gets those of point
// i % 4, all four corners. Each exchange hands over the half that the other lane will keep, so it
// takes 12 (G = 4) or 16 (G = 8) shuffles, not 32 or 48.
template <int G, typename A>
__device__ __forceinline__ void sum_quad(
    const A (&sums)[kQuad][4], int32_t lane, A (&result)[4]) {
  static_assert(G == 4 || G == 8);
  const bool second_half = lane & 4, second_pair = lane & 2, odd = lane & 1;
  constexpr int corners = G == 8 ? 2 : 4;
  A mine[kQuad][corners];
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
#pragma unroll
    for (int c = 0; c < corners; ++c) {
      mine[i][c] = sums[i][c];
      if constexpr (G == 8) {
        const A give = second_half ? sums[i][c] : sums[i][c + 2];
        mine[i][c] = (second_half ? sums[i][c + 2] : sums[i][c]) +
                     __shfl_xor_sync(kAll, give, 4);
      }
    }
  }
  A pair[2][corners];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int c = 0; c < corners; ++c) {
      const A give = second_pair ? mine[i][c] : mine[i + 2][c];
      pair[i][c] =
          (second_pair ? mine[i + 2][c] : mine[i][c]) + __shfl_xor_sync(kAll, give, 2);
    }
  }
#pragma unroll
  for (int c = 0; c < corners; ++c) {
    const A give = odd ? pair[0][c] : pair[1][c];
    const A sum = (odd ? pair[1][c] : pair[0][c]) + __shfl_xor_sync(kAll, give, 1);
    if constexpr (G == 8) {
      const A other = __shfl_xor_sync(kAll, sum, 4);
      result[c] = second_half ? other : sum;
      result[c + 2] = second_half ? sum : other;
    } else {
      result[c] = sum;
    }
  }
}

// Gradients of one point from the inner products of grad_output with its corners. Returns the
// point's part of the row's weighted mean.
template <typename T>
__device__ __forceinline__ Wide<T> finish_point(
    const Attention<T>& p, const Wide<T> (&dots)[4], int64_t at,
    const BackwardShared<Wide<T>>& shared, int32_t in_warp, Kept<Wide<T>>& kept) {
  using A = Wide<T>;
  const Prepared<A> point = shared.prepared[in_warp];
  const A weight = shared.weights[in_warp];
  const A above = dots[1] - dots[0], below = dots[3] - dots[2];
  const A upper = dots[0] + point.right * above, lower = dots[2] + point.right * below;
  const bool touches = shared.spots[in_warp].numbers[1] != 0;
  const A scale = touches ? weight : A(0);  // a weight may be NaN
  const A by_x = scale * (above + point.bottom * (below - above));
  const A by_y = scale * (lower - upper);
  const A by_weight = upper + point.bottom * (lower - upper);
  if (p.R == 0) {
    static_cast<Pack<A, 2>*>(p.grad_points)[at] = {{by_x * point.scale_x, by_y * point.scale_y}};
    narrow(by_weight, p.grad_weights[at]);
    return 0;
  }
  Pack<T, 2> grad;
  narrow(by_x * point.scale_x, grad.numbers[0]);
  narrow(by_y * point.scale_y, grad.numbers[1]);
  static_cast<Pack<T, 2>*>(p.grad_points)[at] = grad;
  kept = {by_weight, weight, by_x, by_y};
  return weight * by_weight;
}

// A row's part of the gradient of its reference point, one level a lane.
template <typename T, int G>
__device__ __forceinline__ void finish_reference(
    const Attention<T>& p, int64_t index, int32_t lane, const Kept<Wide<T>>* kept) {
  using A = Wide<T>;
  const auto* offsets = static_cast<const Pack<T, 2>*>(p.points) + index * p.points_per_row();
  for (int32_t l = lane; l < p.L; l += G) {
    A x = 0, y = 0, w = 0, h = 0;
    for (int32_t i = l * p.K; i < (l + 1) * p.K; ++i) {
      x += kept[i].by_x;
      y += kept[i].by_y;
      w += kept[i].by_x * widen(offsets[i].numbers[0]);
      h += kept[i].by_y * widen(offsets[i].numbers[1]);
    }
    const A width = A(p.levels[l].width), height = A(p.levels[l].height);
    A* part = p.reference_parts + (index * p.L + l) * p.R;
    part[0] = x * width;
    part[1] = y * height;
    if (p.R == 4) {
      const A unit = A(0.5) / A(p.K);
      part[2] = w * width * unit;
      part[3] = h * height * unit;
    }
  }
}

// Threads of a block, and blocks that an SM shall have room for: 16 sums, four corners and their
// addresses take 85 registers.
constexpr int kBackwardThreads = 256, kBackwardBlocks = 3;

template <typename T, int C, int G>
__global__ void __launch_bounds__(kBackwardThreads, sizeof(Wide<T>) == 8 ? 2 : kBackwardBlocks)
    backward_kernel(const __grid_constant__ Attention<T> p) {
  using A = Wide<T>;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const int32_t in_warp = threadIdx.x % kWarp, lane = in_warp % G;
  const int32_t points = p.points_per_row();
  auto& shared = *reinterpret_cast<BackwardShared<A>*>(
      shared_memory + threadIdx.x / kWarp * BackwardShared<A>::bytes(points * (kWarp / G)));
  Kept<A>* kept = shared.kept() + in_warp / G * points;
  const Row row = row_of<T, G>(p, blockIdx.x, threadIdx.x);
  if (__ballot_sync(kAll, row.real) == 0) return;
  const int64_t index = row.index(p);
  const Softmax<A> softmax = softmax_of_row<T, G>(p, index, lane);

  A mean = 0;  // of by_weight under the row's weights, this lane's part
#pragma unroll 1
  for (int32_t first = 0; first < points; first += G) {
    const int32_t i = first + lane;
    const bool mine = row.real && i < points;
    __syncwarp();  // what was there has been read
    {
      const Point<A> point = place(p, row, index, i, softmax);
      shared.spots[in_warp] = {{point.token, static_cast<int32_t>(point.spot)}};
      shared.prepared[in_warp] = {point.right, point.bottom, point.scale_x, point.scale_y};
      shared.weights[in_warp] = point.weight;
      if (mine) {
        const int64_t at = ((int64_t{row.n} * p.M + row.m) * p.L + point.level) * p.Q * p.K +
                           int64_t{row.q} * p.K + (i - point.level * p.K);
        const A nowhere = static_cast<A>(nanf(""));
        const bool touches = point.spot != 0;
        reinterpret_cast<Pack<A, 2>*>(p.placed)[at] = {
            {touches ? point.x : nowhere, touches ? point.y : nowhere}};
        p.shares[at] = point.weight;
      }
    }
    __syncwarp();
#pragma unroll 1
    for (int32_t quad = 0; quad < G && first + quad < points; quad += kQuad) {
      A sums[kQuad][4] = {};
#pragma unroll 1
      for (int32_t d = lane * C; d < round_up(p.D, G * C); d += G * C) {
        using Load = typename Loaded<T, C>::type;
        const Tokens<T, C> tokens(p, row, d);
        Load grad{};  // stays zero in lanes beyond the last channel
        if (d < p.D) grad = *reinterpret_cast<const Load*>(p.grad_output + index * p.D + d);
#pragma unroll
        for (int j = 0; j < kQuad; ++j) {
          const auto spot = shared.spots[in_warp - lane + quad + j];
          Load corners[4];
          tokens.load(spot.numbers[0], static_cast<uint32_t>(spot.numbers[1]), corners);
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
#pragma unroll
            for (int c = 0; c < C; ++c)
              sums[j][corner] += number<T>(grad, c) * number<T>(corners[corner], c);
          }
          fetch_no_further();
        }
      }
      A dots[4];
      sum_quad<G>(sums, lane, dots);
      if (lane / kQuad == quad / kQuad && mine)
        mean += finish_point(p, dots, index * points + i, shared, in_warp, kept[i]);
    }
  }
  if (p.R == 0) return;

  mean = sum_of_row<G>(mean);
  __syncwarp();
  if (!row.real) return;
  for (int32_t i = lane; i < points; i += G)
    narrow(
        kept[i].weight * (kept[i].by_weight - mean), p.grad_weights[index * points + i]);
  if (p.reference_parts != nullptr) finish_reference<T, G>(p, index, lane, kept);
}

}  // namespace cuda_ops
