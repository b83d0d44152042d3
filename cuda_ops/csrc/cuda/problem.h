// What the attention kernels are given, and how their work is divided: sizes, pointers, number
// types. Everything here follows from sizes alone, so the order of every sum does, too.
//
// N batch, S tokens, M heads, D channels per head, Q queries, L levels, K points, P = L * K.
// A row is one (image, query, head).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace cuda_ops {

constexpr int kMaxLevels = 64;  // sizes travel in the kernels' parameters
constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kSharedBytes = 48 * 1024;  // what a block gets without asking
constexpr int kMaxQueries = 1 << 22;     // an owner's list numbers queries in 22 bits

template <typename T>
struct WideOf {
  typedef float type;
};
template <>
struct WideOf<double> {
  typedef double type;
};
// Coordinates, softmax and sums are of this type.
template <typename T>
using Wide = typename WideOf<T>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void narrow(float from, float& to) { to = from; }
__device__ __forceinline__ void narrow(double from, double& to) { to = from; }
__device__ __forceinline__ void narrow(float from, __half& to) { to = __float2half_rn(from); }
__device__ __forceinline__ void narrow(float from, __nv_bfloat16& to) {
  to = __float2bfloat16_rn(from);
}
__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
// The larger number; NaN only of two NaNs.
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }
__device__ __forceinline__ float smaller(float a, float b) { return fminf(a, b); }
__device__ __forceinline__ double smaller(double a, double b) { return fmin(a, b); }

// C neighbouring numbers, loaded or stored at once.
template <typename T, int C>
struct alignas(C * sizeof(T)) Pack {
  T numbers[C];
};

// The same numbers as one load leaves them: selecting or copying a Pack of 16-bit numbers costs
// an instruction for each of them.
template <typename T, int C>
struct Loaded {
  typedef T type;
};
template <typename T, int C>
  requires(C * sizeof(T) == 16)
struct Loaded<T, C> {
  typedef uint4 type;
};

template <typename T>
__device__ __forceinline__ Wide<T> number(T loaded, int) {
  return widen(loaded);
}
template <typename T>
__device__ __forceinline__ Wide<T> number(const uint4& loaded, int c) {
  const uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
  if constexpr (sizeof(T) == 8) {
    return __hiloint2double(
        static_cast<int>(words[2 * c + 1]), static_cast<int>(words[2 * c]));
  } else if constexpr (sizeof(T) == 4) {
    return __uint_as_float(words[c]);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const uint32_t word = words[c / 2];
    return __uint_as_float(c % 2 == 0 ? word << 16 : word & 0xffff0000u);
  } else {
    const uint32_t word = words[c / 2];
    return __half2float(__ushort_as_half(
        static_cast<unsigned short>(c % 2 == 0 ? word & 0xffffu : word >> 16)));
  }
}

// Hides where an address comes from, lest the compiler fold its parts into every later one: that
// makes 64-bit multiplications of what is one multiply-add.
template <typename T>
__device__ __forceinline__ const T* opaque(const T* address) {
#if defined(__CUDA_ARCH__)
  asm("" : "+l"(address));
  __builtin_assume(__isGlobal(address));
#endif
  return address;
}

struct Level {
  int32_t height, width;
  int32_t start;       // first token
  int32_t first_tile;  // of the level's 8 x `lines` tiles of queries, or its 8 x 8 tiles of tokens
};

template <typename T>
struct Attention {
  using A = Wide<T>;
  int32_t N, S, M, D, Q, L, K;
  int32_t R;  // numbers in a reference point (2 or 4); 0: locations are given, and weights
  Level levels[kMaxLevels];
  const T* value;      // [N, S, M, D]
  const void* points;  // [N, Q, M, L, K, 2]: offsets (T), or with R = 0 locations (A)
  const T* weights;    // [N, Q, M, P]: logits, or with R = 0 attention weights
  const A* reference;  // [N, Q, L, R]
  T* output;           // [N, Q, M, D]

  const T* grad_output;  // [N, Q, M, D]
  void* grad_points;     // as points
  T* grad_weights;       // as weights
  A* reference_parts;    // [N, Q, M, L, R], or null
  A* placed;             // [N, M, L, Q, K, 2]: pixels (x, y); NaN for a point that touches none
  A* shares;             // [N, M, L, Q, K]: attention weights

  float levels_per_point;  // 1 / K

  // A block takes a tile of queries of some heads. Where queries are the tokens (Q = S, as in the
  // encoder) a tile is 8 wide and `lines` high, so that its points meet in the L1 cache; else it
  // is a run of queries.
  int32_t lines, heads, tiles, head_groups;
  bool spatial;

  __host__ __device__ int32_t points_per_row() const { return L * K; }
  __host__ __device__ int64_t blocks() const { return int64_t{N} * tiles * head_groups; }
};

constexpr int kTileWidth = 8;

__host__ __device__ constexpr int32_t divide_up(int32_t x, int32_t by) { return (x + by - 1) / by; }
__host__ __device__ constexpr int32_t round_up(int32_t x, int32_t to) {
  return divide_up(x, to) * to;
}

// Divides the rows into blocks of at most `threads` threads, `lanes` of them a row; heads of one
// tile share a block where together they fill a cache line.
template <typename T>
void divide_rows(Attention<T>& p, int lanes, int threads) {
  constexpr int kCacheLine = 128;
  p.levels_per_point = 1.0f / static_cast<float>(p.K);
  const int rows = threads / lanes;
  const int64_t row_bytes = int64_t{p.D} * static_cast<int64_t>(sizeof(T));
  p.heads = 1;
  while (p.heads * 2 <= p.M && p.heads * 2 * row_bytes <= kCacheLine &&
         p.heads * 2 * kTileWidth <= rows)
    p.heads *= 2;
  p.lines = rows / (p.heads * kTileWidth);
  p.head_groups = divide_up(p.M, p.heads);
  p.spatial = p.Q == p.S;
  p.tiles = 0;
  for (int32_t l = 0; l < p.L && p.spatial; ++l) {
    p.levels[l].first_tile = p.tiles;
    p.tiles += divide_up(p.levels[l].width, kTileWidth) * divide_up(p.levels[l].height, p.lines);
  }
  if (!p.spatial) p.tiles = divide_up(p.Q, kTileWidth * p.lines);
}

}  // namespace cuda_ops
