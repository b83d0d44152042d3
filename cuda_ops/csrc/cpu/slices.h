// One head's slice of `value` or of its gradient, copied out of [N, S, M, D] into rows of whole
// vectors of wide numbers that lie side by side, with a border of zeros around each level: then
// gathering and scattering need no edge cases, and rows do not compete for a few cache sets.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

using cuda_ops::Problem;

constexpr int64_t kAlignment = 64;
constexpr int64_t kAhead = 6;  // rows between asking for one and using it

constexpr int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// Cuts one aligned allocation into arrays; with a null start it only measures.
struct Arena {
  char* start;
  int64_t used = 0;

  template <typename T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(start + used);
    used += round_up(count * static_cast<int64_t>(sizeof(T)), kAlignment);
    return array;
  }
};

int64_t bordered_pixels(const Problem& p, int64_t l0, int64_t l1) {
  int64_t pixels = 0;
  for (int64_t l = l0; l < l1; ++l) pixels += (p.shapes[2 * l] + 2) * (p.shapes[2 * l + 1] + 2);
  return pixels;
}

int64_t tokens_before(const Problem& p, int64_t level) {
  int64_t tokens = 0;
  for (int64_t l = 0; l < level; ++l) tokens += p.shapes[2 * l] * p.shapes[2 * l + 1];
  return tokens;
}

// Asks for `count` numbers that will be read (write = 0) or written soon: rows of one head lie far
// apart, and the hardware foresees neither the next row nor its page.
template <int write, typename T>
inline void prefetch(const T* start, int64_t count) {
  const char* bytes = reinterpret_cast<const char*>(start);
  for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(T)); i += 64)
    __builtin_prefetch(bytes + i, write, 3);
}

template <typename A>
inline void clear(A* array, int64_t count) {
  __builtin_memset(array, 0, static_cast<uint64_t>(count) * sizeof(A));
}

// Copies levels [l0, l1) of head m of image n, borders included, into rows that are `pitch` numbers
// apart; what a row has beyond D is zero.
template <typename T>
void copy_in(
    const Problem& p, int64_t n, int64_t m, int64_t l0, int64_t l1, int64_t pitch,
    Wide<T>* target) {
  const int64_t* strides = p.value_strides;
  const T* source = static_cast<const T*>(p.value) + n * strides[0] + m * strides[2] +
                    tokens_before(p, l0) * strides[1];
  for (int64_t l = l0; l < l1; ++l) {
    const int64_t height = p.shapes[2 * l], width = p.shapes[2 * l + 1];
    clear(target, (width + 2) * pitch);
    target += (width + 2) * pitch;
    for (int64_t y = 0; y < height; ++y) {
      clear(target, pitch);
      target += pitch;
      for (int64_t x = 0; x < width; ++x, source += strides[1], target += pitch) {
        prefetch<0>(source + kAhead * strides[1], p.D);
        if (strides[3] == 1) {
          widen_row(source, p.D, target);
        } else {
          for (int64_t d = 0; d < p.D; ++d) target[d] = widen(source[d * strides[3]]);
        }
        clear(target + p.D, pitch - p.D);
      }
      clear(target, pitch);
      target += pitch;
    }
    clear(target, (width + 2) * pitch);
    target += (width + 2) * pitch;
  }
}

// The way back for gradients, without the borders.
template <typename T>
void copy_out(
    const Problem& p, int64_t n, int64_t m, int64_t l0, int64_t l1, int64_t pitch,
    const Wide<T>* source) {
  T* target =
      static_cast<T*>(p.grad_value) + ((n * p.S + tokens_before(p, l0)) * p.M + m) * p.D;
  for (int64_t l = l0; l < l1; ++l) {
    const int64_t height = p.shapes[2 * l], width = p.shapes[2 * l + 1];
    source += (width + 2) * pitch;
    for (int64_t y = 0; y < height; ++y) {
      source += pitch;
      for (int64_t x = 0; x < width; ++x, source += pitch, target += p.M * p.D) {
        prefetch<1>(target + kAhead * p.M * p.D, p.D);
        narrow_row(source, p.D, target);
      }
      source += pitch;
    }
    source += (width + 2) * pitch;
  }
}

}  // namespace
