// The forward of both operators.
#pragma once

#include "rows.h"

namespace cuda_ops {

// What the lanes of a warp leave for each other: one point a lane.
template <typename A>
struct ForwardShared {
  Pack<A, 4> shares[kWarp];  // of the four corners, times the attention weight
  Pack<int32_t, 2> spots[kWarp];
};

// Threads of a block, and blocks that an SM shall have room for.
constexpr int kForwardThreads = 512, kForwardBlocks = 2;

template <typename T, int C, int G>
__global__ void __launch_bounds__(kForwardThreads, kForwardBlocks)
    forward_kernel(const __grid_constant__ Attention<T> p) {
  using A = Wide<T>;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  auto& shared = reinterpret_cast<ForwardShared<A>*>(shared_memory)[threadIdx.x / kWarp];
  const int32_t in_warp = threadIdx.x % kWarp, lane = in_warp % G;
  const Row row = row_of<T, G>(p, blockIdx.x, threadIdx.x);
  if (__ballot_sync(kAll, row.real) == 0) return;
  const int64_t index = row.index(p);
  const Softmax<A> softmax = softmax_of_row<T, G>(p, index, lane);
  const int32_t points = p.points_per_row();

#pragma unroll 1
  for (int32_t first_channel = 0; first_channel < p.D; first_channel += G * C) {
    const int32_t d = first_channel + lane * C;
    const Tokens<T, C> tokens(p, row, d);
    A sums[C] = {};
#pragma unroll 1
    for (int32_t first = 0; first < points; first += G) {
      const Point<A> point = place(p, row, index, first + lane, softmax);
      const A weight = point.spot == 0 ? A(0) : point.weight;  // it may be NaN
      const A upper = weight * (1 - point.bottom), lower = weight * point.bottom;
      __syncwarp();  // what was there has been read
      shared.shares[in_warp] = {
          {upper * (1 - point.right), upper * point.right, lower * (1 - point.right),
           lower * point.right}};
      shared.spots[in_warp] = {{point.token, static_cast<int32_t>(point.spot)}};
      __syncwarp();
#pragma unroll
      for (int i = 0; i < G; ++i) {
        const auto spot = shared.spots[in_warp - lane + i];
        const auto shares = shared.shares[in_warp - lane + i];
        typename Loaded<T, C>::type corners[4];
        tokens.load(spot.numbers[0], static_cast<uint32_t>(spot.numbers[1]), corners);
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
#pragma unroll
          for (int c = 0; c < C; ++c)
            sums[c] += shares.numbers[corner] * number<T>(corners[corner], c);
        }
        fetch_no_further();
      }
    }
    if (!row.real || d >= p.D) continue;
    Pack<T, C> output;
#pragma unroll
    for (int c = 0; c < C; ++c) narrow(sums[c], output.numbers[c]);
    *reinterpret_cast<Pack<T, C>*>(p.output + index * p.D + d) = output;
  }
}

}  // namespace cuda_ops
