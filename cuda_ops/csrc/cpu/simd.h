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
template <typename T, int lanes = kLanes<T>>
using Vector = typename VectorOf<T, lanes>::type;

// Lane numbers for `shuffle`: each lane's partner at `distance`. With two vectors, lanes whose
// number holds `distance` look at the second, whose lanes count on from those of the first.
template <typename T, int lanes, int distance>
inline auto partners(bool of_two) {
  decltype(Vector<T, lanes>{} < Vector<T, lanes>{}) numbers{};  // integers as wide as T
  for (int lane = 0; lane < lanes; ++lane)
    numbers[lane] = (lane ^ distance) + (of_two && lane & distance ? lanes : 0);
  return numbers;
}

template <typename V, typename Numbers>
inline V shuffle(V a, V b, Numbers numbers) {
#if defined(__clang__)  // makes a shuffle of the loop; its own notation wants constants
  constexpr int lanes = sizeof(V) / sizeof(a[0]);
  V result{};
  for (int lane = 0; lane < lanes; ++lane)
    result[lane] = numbers[lane] < lanes ? a[numbers[lane]] : b[numbers[lane] - lanes];
  return result;
#else
  return __builtin_shuffle(a, b, numbers);
#endif
}

// Every lane of the result holds `combine` over all lanes of v.
template <typename T, int distance = kLanes<T> / 2, typename Combine>
inline Vector<T> over_lanes(Vector<T> v, Combine combine) {
  if constexpr (distance > 0) {
    v = combine(v, shuffle(v, v, partners<T, kLanes<T>, distance>(false)));
    return over_lanes<T, distance / 2>(v, combine);
  }
  return v;
}

// Lane i of the result is the sum over the lanes of rows[i]: at each step two vectors become one by
// adding the halves of each.
template <typename T, int lanes, int distance = 1>
inline __attribute__((always_inline)) Vector<T, lanes> lane_sums(const Vector<T, lanes>* rows) {
  if constexpr (distance == lanes) {
    return rows[0];
  } else {
    const Vector<T, lanes> a = lane_sums<T, lanes, 2 * distance>(rows);
    const Vector<T, lanes> b = lane_sums<T, lanes, 2 * distance>(rows + distance);
    const auto moved = partners<T, lanes, distance>(true), kept = moved ^ distance;
    return shuffle(a, b, kept) + shuffle(a, b, moved);
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

template <typename T>
inline void widen_row(const T* __restrict source, int64_t count, Wide<T>* __restrict target) {
  for (int64_t i = 0; i < count; ++i) target[i] = widen(source[i]);
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

template <typename T>
inline void narrow_row(const Wide<T>* __restrict source, int64_t count, T* __restrict target) {
  for (int64_t i = 0; i < count; ++i) narrow(source[i], target[i]);
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
