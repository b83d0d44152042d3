// Which kernels a call runs, in which order, and how it is cut into blocks. `run(kernel, launch,
// problem)` starts one: on a GPU in attention.cu, on the CPU in the tests.
#pragma once

#include "backward.h"
#include "forward.h"
#include "owners.h"

#include <algorithm>

namespace cuda_ops {

struct Launch {
  int64_t blocks;
  int32_t threads;
  int64_t bytes;  // of shared memory a block; more than kSharedBytes where nothing fits
};

// Blocks of as many threads as shared memory has room for, up to `threads`. Queries that are not
// the tokens, as a decoder's, share no tile: small blocks spread the few that there are.
template <typename T>
Launch divide(Attention<T>& p, int lanes, int threads, int64_t bytes_of_warp) {
  if (p.Q != p.S) threads = std::min(threads, 128);
  while (threads > lanes * kTileWidth && threads / kWarp * bytes_of_warp > kSharedBytes)
    threads /= 2;
  divide_rows(p, lanes, threads);
  return {p.blocks(), threads, threads / kWarp * bytes_of_warp};
}

// Calls `call(C, G)`: loads of C channels, 16 bytes where every head begins at a multiple of
// that, as all tensors do, and G lanes a row.
template <typename T, typename Call>
void with_layout(const Attention<T>& p, const Call& call) {
  using std::integral_constant;
  constexpr int kLoad = 16 / sizeof(T);
  if (p.D % kLoad != 0) {
    call(integral_constant<int, 1>{}, integral_constant<int, 8>{});
  } else if (p.D <= 4 * kLoad) {
    call(integral_constant<int, kLoad>{}, integral_constant<int, 4>{});
  } else {
    call(integral_constant<int, kLoad>{}, integral_constant<int, 8>{});
  }
}

template <typename T, typename Run>
void run_forward(Attention<T>& p, const Run& run) {
  with_layout(p, [&](auto channels, auto lanes) {
    constexpr int C = decltype(channels)::value, G = decltype(lanes)::value;
    const Launch launch = divide(p, G, kForwardThreads, sizeof(ForwardShared<Wide<T>>));
    if (launch.blocks > 0) run(forward_kernel<T, C, G>, launch, p);
  });
}

// `owners` needs its sizes, boxes and grad_value; the rest is taken from `p`.
template <typename T, typename Run>
void run_backward(Attention<T>& p, Owners<T>& owners, const Run& run) {
  using A = Wide<T>;
  with_layout(p, [&](auto channels, auto lanes) {
    constexpr int C = decltype(channels)::value, G = decltype(lanes)::value;
    const int64_t points = int64_t{p.points_per_row()} * (kWarp / G);
    const Launch launch = divide(p, G, kBackwardThreads, BackwardShared<A>::bytes(points));
    if (launch.blocks > 0) run(backward_kernel<T, C, G>, launch, p);
  });
  owners.grad_output = p.grad_output;
  owners.placed = p.placed;
  owners.shares = p.shares;
  divide_tokens(owners);
  if (owners.blocks() == 0) return;
  const int64_t boxes = (owners.box_count() * kWarp + kBoxThreads - 1) / kBoxThreads;
  if (boxes > 0) run(box_kernel<T>, Launch{boxes, kBoxThreads, 0}, owners);
  static_assert(sizeof(OwnersShared<A>) <= kSharedBytes);
  const Launch launch{owners.blocks(), kOwners * kWarp, sizeof(OwnersShared<A>)};
  if (p.D % kVector<A> == 0) {
    run(owners_kernel<T, true>, launch, owners);
  } else {
    run(owners_kernel<T, false>, launch, owners);
  }
}

}  // namespace cuda_ops
