// Vectors in the compiler's own notation, conversions of 16-bit types, and exp. No standard
// headers with inline functions: this file is compiled for several instruction sets, and the
// linker would keep one copy of such a function for all of them.
#pragma once

#include <cstdint>

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T, int lanes>
struct VectorOf {
  typedef T type __attribute__((vector_size(lanes * sizeof(T)), may_alias));
};
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
template <typename T>
using Vector = typename VectorOf<T, kLanes<T>>::type;

#if defined(__clang__)
#define CUDA_OPS_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define CUDA_OPS_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Index){__VA_ARGS__})
#endif

template <typename T>
struct IndexOf;
template <>
struct IndexOf<float> {
  typedef int32_t type __attribute__((vector_size(16)));
};
template <>
struct IndexOf<double> {
  typedef int64_t type __attribute__((vector_size(32)));
};

// Sums the lanes of four vectors at once: {sum(a), sum(b), sum(c), sum(d)} into out[0..3].
template <typename T, int lanes>
inline __attribute__((always_inline)) void add_lane_sums(
    const typename VectorOf<T, lanes>::type (&rows)[4], T* out) {
  if constexpr (lanes > 4) {
    typedef typename VectorOf<T, lanes / 2>::type Half;
    Half halves[4];
    for (int i = 0; i < 4; ++i) {
      Half parts[2];
      __builtin_memcpy(parts, &rows[i], sizeof(rows[i]));
      halves[i] = parts[0] + parts[1];
    }
    add_lane_sums<T, lanes / 2>(halves, out);
  } else if constexpr (lanes == 4) {
    [[maybe_unused]] typedef typename IndexOf<T>::type Index;
    const auto ab = CUDA_OPS_SHUFFLE(rows[0], rows[1], 0, 4, 1, 5) +
                    CUDA_OPS_SHUFFLE(rows[0], rows[1], 2, 6, 3, 7);  // a02 b02 a13 b13
    const auto cd = CUDA_OPS_SHUFFLE(rows[2], rows[3], 0, 4, 1, 5) +
                    CUDA_OPS_SHUFFLE(rows[2], rows[3], 2, 6, 3, 7);
    const auto sums =
        CUDA_OPS_SHUFFLE(ab, cd, 0, 1, 4, 5) + CUDA_OPS_SHUFFLE(ab, cd, 2, 3, 6, 7);
    typename VectorOf<T, 4>::type before;
    __builtin_memcpy(&before, out, sizeof(before));
    before += sums;
    __builtin_memcpy(out, &before, sizeof(before));
  } else {
    for (int i = 0; i < 4; ++i) {
      for (int lane = 0; lane < lanes; ++lane) out[i] += rows[i][lane];
    }
  }
}

template <typename To, typename From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

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

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return bits_as<float>(uint32_t{x.bits} << 16); }
inline float widen(Half x) {
  const uint32_t magnitude = uint32_t{x.bits & 0x7fffu} << 13;
  // The exponent is rebased by a multiplication, which also normalises subnormal numbers.
  const float finite = bits_as<float>(magnitude) * bits_as<float>(uint32_t{0x77800000});  // 2^112
  const uint32_t special = magnitude | 0x7f800000u;
  const uint32_t wide = (x.bits & 0x7c00u) == 0x7c00u ? special : bits_as<uint32_t>(finite);
  return bits_as<float>(wide | (uint32_t{x.bits & 0x8000u} << 16));
}

inline void narrow(float from, float& to) { to = from; }
inline void narrow(double from, double& to) { to = from; }
inline void narrow(float from, BFloat16& to) {
  const uint32_t bits = bits_as<uint32_t>(from);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>(from != from ? 0x7fc0u : rounded);
}
inline void narrow(float from, Half& to) {
  const uint32_t bits = bits_as<uint32_t>(from);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Adding 0.5 lines the last bit of a subnormal half up with the last bit of the float.
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  to.bits = static_cast<uint16_t>(half | sign);
}

// exp of x <= 0 to about one unit in the last place, without a call, so that loops over it
// vectorise: x = n ln 2 + r, exp(r) by the polynomial of Cephes' expf, 2^n by its bits.
inline float exp_of_nonpositive(float x) {
  const float clamped = x < -87.3f ? -87.3f : x;
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = clamped * 1.44269504088896341f + kShift;
  const float n = shifted - kShift;
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const uint32_t exponent = bits_as<uint32_t>(shifted) - bits_as<uint32_t>(kShift) + 127u;
  const float result = p * bits_as<float>(exponent << 23);
  return x < -87.3f ? 0.0f : result;
}
inline double exp_of_nonpositive(double x) { return __builtin_exp(x); }

}  // namespace
