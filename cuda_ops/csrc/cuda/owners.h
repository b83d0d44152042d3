// The gradient of value, without atomics: a block owns 8 x 8 tokens of one (image, head, level),
// finds the points that touch them, and adds up in shared memory what they bring. Four warps each
// take every fourth group of the points, in order, and their sums are added in order: the result
// is the same bits every time. Points are skipped 32 at a time by the box that holds them.
#pragma once

#include "problem.h"

namespace cuda_ops {

constexpr int kTile = 8;     // tokens across and down
constexpr int kOwners = 4;   // warps of a block
constexpr int kAhead = 4;    // gradients that are on their way while others are added
constexpr int kList = 2 * kWarp;  // points that a warp has found and not yet added

template <typename A>
constexpr int kVector = 16 / static_cast<int>(sizeof(A));
// Channels of a block: each of a point's four corners has 8 lanes, with 16 bytes each.
template <typename A>
constexpr int kOwnedChannels = 8 * kVector<A>;

// Division of numbers below 2^31 by one that is known before the launch (Granlund and Montgomery,
// 1994): i / d = (i * multiplier / 2^32 + i) / 2^shift.
struct Divisor {
  uint32_t multiplier, shift;
};
inline Divisor divisor(uint32_t d) {
  uint32_t shift = 0;
  while ((uint64_t{1} << shift) < d) ++shift;
  const uint64_t excess = (uint64_t{1} << shift) - d;
  return {static_cast<uint32_t>((excess << 32) / d + 1), shift};
}
__device__ __forceinline__ uint32_t quotient(uint32_t i, Divisor d) {
  return (__umulhi(i, d.multiplier) + i) >> d.shift;
}

template <typename T>
struct Owners {
  using A = Wide<T>;
  int32_t N, S, M, D, Q, L, K;
  Level levels[kMaxLevels];
  const T* grad_output;  // [N, Q, M, D]
  const A* placed;       // [N, M, L, Q * K, 2]
  const A* shares;       // [N, M, L, Q * K]
  A* boxes;              // [N, M, L, chunks, 4]: lowest x and y, highest x and y
  T* grad_value;         // [N, S, M, D]
  int32_t tiles, channel_parts;
  Divisor by_points;  // i / K

  __host__ __device__ int32_t points() const { return Q * K; }
  __host__ __device__ int32_t chunks() const { return divide_up(points(), kWarp); }
  __host__ __device__ int64_t box_count() const { return int64_t{N} * M * L * chunks(); }
  __host__ __device__ int64_t blocks() const { return int64_t{N} * M * channel_parts * tiles; }
};

template <typename T>
void divide_tokens(Owners<T>& p) {
  p.by_points = divisor(static_cast<uint32_t>(p.K));
  p.tiles = 0;
  for (int32_t l = 0; l < p.L; ++l) {
    p.levels[l].first_tile = p.tiles;
    p.tiles += divide_up(p.levels[l].width, kTile) * divide_up(p.levels[l].height, kTile);
  }
  p.channel_parts = divide_up(p.D, kOwnedChannels<Wide<T>>);
}

constexpr int kBoxThreads = 128;

// One warp a chunk of 32 points: the box that holds them. Points that touch nothing are NaN,
// which minimum and maximum pass over.
template <typename T>
__global__ void __launch_bounds__(kBoxThreads) box_kernel(const __grid_constant__ Owners<T> p) {
  using A = Wide<T>;
  const int64_t box = (int64_t{blockIdx.x} * kBoxThreads + threadIdx.x) / kWarp;
  if (box >= p.box_count()) return;
  const int32_t i = static_cast<int32_t>(box % p.chunks()) * kWarp + threadIdx.x % kWarp;
  const A nothing = static_cast<A>(nanf(""));
  Pack<A, 2> low{{nothing, nothing}};
  if (i < p.points())
    low = reinterpret_cast<const Pack<A, 2>*>(p.placed)[box / p.chunks() * int64_t{p.points()} + i];
  Pack<A, 2> high = low;
#pragma unroll
  for (int other = kWarp / 2; other > 0; other /= 2) {
#pragma unroll
    for (int axis = 0; axis < 2; ++axis) {
      low.numbers[axis] =
          smaller(low.numbers[axis], __shfl_xor_sync(kAll, low.numbers[axis], other));
      high.numbers[axis] =
          larger(high.numbers[axis], __shfl_xor_sync(kAll, high.numbers[axis], other));
    }
  }
  if (threadIdx.x % kWarp == 0)
    reinterpret_cast<Pack<A, 4>*>(p.boxes)[box] = {
        {low.numbers[0], low.numbers[1], high.numbers[0], high.numbers[1]}};
}

// A point that touches the tile: its distances from the pixel left above of it, its weight, and
// where that pixel lies in the tile. `place` holds its column plus 8 in bits 0 to 4, its line plus
// 8 in bits 5 to 9, and the query above. The columns of a point's corners are -1 to 8, so that one
// is in the tile where, of bits 3 and 4, only the lower is set; lines likewise.
template <typename A>
struct alignas(16) Found {
  A right, bottom, weight;
  uint32_t place;
};

__device__ __forceinline__ uint32_t place_of(int32_t column, int32_t line, uint32_t query) {
  return static_cast<uint32_t>(column + 8) | static_cast<uint32_t>(line + 8) << 5 | query << 10;
}
__device__ __forceinline__ bool in_tile(uint32_t place) { return (place & 0x318) == 0x108; }
__device__ __forceinline__ uint32_t token_of(uint32_t place) {
  return (place & 7) | (place >> 2 & 0x38);
}

template <typename A>
struct OwnersShared {
  Pack<A, kVector<A>> sums[kOwners][kTile * kTile][8];  // [warp][token][lane of a corner]
  Found<A> list[kOwners][kList];
};

struct OwnedTile {
  int32_t n, m, part, level, x, y;  // x, y: of its first token
};

template <typename T>
__device__ __forceinline__ OwnedTile owned_tile(const Owners<T>& p, int64_t block) {
  const int64_t others = int64_t{p.N} * p.M * p.channel_parts;
  // Coarse levels have as many points as fine ones on fewer tiles: they start first.
  const int32_t tile = p.tiles - 1 - static_cast<int32_t>(block / others);
  int32_t rest = static_cast<int32_t>(block % others);
  OwnedTile t;
  t.part = rest % p.channel_parts;
  rest /= p.channel_parts;
  t.m = rest % p.M;
  t.n = rest / p.M;
  t.level = p.L - 1;
  while (tile < p.levels[t.level].first_tile) --t.level;
  const int32_t at = tile - p.levels[t.level].first_tile;
  const int32_t across = divide_up(p.levels[t.level].width, kTile);
  t.x = at % across * kTile;
  t.y = at / across * kTile;
  return t;
}

// Adds the listed points to the warp's sums, one after the other: eight lanes for each corner,
// each for its own channels. `grads` points to the lane's channels of query 0, `sums` to those of
// the warp's first token.
template <typename T, bool vectors>
__device__ __forceinline__ void add_found(
    const char* grads, int32_t query_bytes, int32_t channels, Found<Wide<T>>* list, int32_t count,
    Pack<Wide<T>, kVector<Wide<T>>>* sums, int32_t lane) {
  using A = Wide<T>;
  constexpr int V = kVector<A>;
  const int32_t corner = lane / 8, dx = corner & 1, dy = corner >> 1;
  // A corner's share across is x or 1 - x, and down y or 1 - y.
  const A sign_x = A(2 * dx - 1), sign_y = A(2 * dy - 1), base_x = A(1 - dx), base_y = A(1 - dy);
  // Points that touch nothing fill the last group.
  if (lane < kAhead - 1 && count + lane < kList) list[count + lane] = {0, 0, 0, 0};
  __syncwarp();
#pragma unroll 1
  for (int32_t first = 0; first < count; first += kAhead) {
    Found<A> found[kAhead];
    Pack<T, V> grad[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      found[i] = list[first + i];
      const auto* source = reinterpret_cast<const T*>(
          grads + int64_t{static_cast<int32_t>(found[i].place >> 10)} * query_bytes);
      if constexpr (vectors) {
        grad[i] = *reinterpret_cast<const Pack<T, V>*>(source);
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) grad[i].numbers[v] = source[v < channels ? v : 0];
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      // What the point before brought to the same token came by other lanes.
      __syncwarp();
      const uint32_t place = found[i].place + static_cast<uint32_t>(dx | dy << 5);
      const A share = (base_x + sign_x * found[i].right) * found[i].weight *
                      (base_y + sign_y * found[i].bottom);
      if (in_tile(place)) {
        auto& sum = sums[token_of(place) * 8];
        auto before = sum;
#pragma unroll
        for (int v = 0; v < V; ++v) before.numbers[v] += share * widen(grad[i].numbers[v]);
        sum = before;
      }
    }
  }
  __syncwarp();
}

template <typename T, bool vectors>
__global__ void __launch_bounds__(kOwners* kWarp) owners_kernel(
    const __grid_constant__ Owners<T> p) {
  using A = Wide<T>;
  constexpr int V = kVector<A>;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  auto& shared = *reinterpret_cast<OwnersShared<A>*>(shared_memory);
  const int32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const OwnedTile tile = owned_tile(p, blockIdx.x);
  const int64_t list_of_points = (int64_t{tile.n} * p.M + tile.m) * p.L + tile.level;
  const auto* boxes = reinterpret_cast<const Pack<A, 4>*>(p.boxes) + list_of_points * p.chunks();
  const auto* placed = reinterpret_cast<const Pack<A, 2>*>(p.placed) + list_of_points * p.points();
  const A* shares = p.shares + list_of_points * p.points();
  const A left = A(tile.x - 1), top = A(tile.y - 1);
  const A right = A(tile.x + kTile), bottom = A(tile.y + kTile);
  // Lanes beyond the last channel add up those of the first; no one stores their sums.
  const int32_t channel = tile.part * kOwnedChannels<A> + lane % 8 * V;
  const int32_t channels = channel < p.D ? p.D - channel : 1;
  const char* grads = opaque(reinterpret_cast<const char*>(
      p.grad_output + (int64_t{tile.n} * p.Q * p.M + tile.m) * p.D +
      (channel < p.D ? channel : 0)));
  const int32_t query_bytes = p.M * p.D * static_cast<int32_t>(sizeof(T));

  for (int32_t i = lane; i < kTile * kTile * 8; i += kWarp)
    shared.sums[warp][i / 8][i % 8] = Pack<A, V>{};
  Found<A>* list = shared.list[warp];
  Pack<A, V>* sums = &shared.sums[warp][0][lane % 8];
  int32_t count = 0;
  for (int32_t group = warp; group * kWarp < p.chunks(); group += kOwners) {
    const int32_t chunk = group * kWarp + lane;
    bool meets = false;
    if (chunk < p.chunks()) {
      const auto box = boxes[chunk];
      meets = box.numbers[2] > left && box.numbers[0] < right && box.numbers[3] > top &&
              box.numbers[1] < bottom;
    }
    for (uint32_t chunks = __ballot_sync(kAll, meets); chunks != 0; chunks &= chunks - 1) {
      const int32_t i = (group * kWarp + __ffs(static_cast<int>(chunks)) - 1) * kWarp + lane;
      Pack<A, 2> at{};
      bool touches = i < p.points();
      if (touches) {
        at = placed[i];
        touches = at.numbers[0] > left && at.numbers[0] < right && at.numbers[1] > top &&
                  at.numbers[1] < bottom;
      }
      const uint32_t found = __ballot_sync(kAll, touches);
      if (touches) {
        const A column = floor(at.numbers[0]), line = floor(at.numbers[1]);
        list[count + __popc(found & ((1u << lane) - 1))] = {
            at.numbers[0] - column, at.numbers[1] - line, shares[i],
            place_of(
                static_cast<int32_t>(column) - tile.x, static_cast<int32_t>(line) - tile.y,
                quotient(static_cast<uint32_t>(i), p.by_points))};
      }
      count += __popc(found);
      if (count <= kList - kWarp) continue;
      add_found<T, vectors>(grads, query_bytes, channels, list, count, sums, lane);
      count = 0;
    }
  }
  add_found<T, vectors>(grads, query_bytes, channels, list, count, sums, lane);
  __syncthreads();

  const Level& level = p.levels[tile.level];
  for (int32_t i = threadIdx.x; i < kTile * kTile * 8; i += kOwners * kWarp) {
    const int32_t token = i / 8, x = tile.x + token % kTile, y = tile.y + token / kTile;
    const int32_t d = tile.part * kOwnedChannels<A> + i % 8 * V;
    if (x >= level.width || y >= level.height || d >= p.D) continue;
    Pack<A, V> sum = shared.sums[0][token][i % 8];
#pragma unroll
    for (int other = 1; other < kOwners; ++other) {
#pragma unroll
      for (int v = 0; v < V; ++v)
        sum.numbers[v] += shared.sums[other][token][i % 8].numbers[v];
    }
    T* target = p.grad_value +
                ((int64_t{tile.n} * p.S + level.start + y * level.width + x) * p.M + tile.m) * p.D +
                d;
    if constexpr (vectors) {
      Pack<T, V> narrowed;
#pragma unroll
      for (int v = 0; v < V; ++v) narrow(sum.numbers[v], narrowed.numbers[v]);
      *reinterpret_cast<Pack<T, V>*>(target) = narrowed;
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (d + v < p.D) narrow(sum.numbers[v], target[v]);
      }
    }
  }
}

}  // namespace cuda_ops
