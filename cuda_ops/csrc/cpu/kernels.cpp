// Both operators' CPU kernels, compiled once per instruction set (CUDA_OPS_KERNELS names the
// table). All storage types and both operators share one body: the head's slice of `value` is
// copied into wide numbers with a border of zeros around each level, so that gathering needs no
// edge cases; the points of one (query, head) are prepared side by side, then gathered.
//
// N batch, S tokens, M heads, D channels per head, Q queries, L levels, K points, P = L * K.
#include "kernels.h"
#include "simd.h"

namespace {

using cuda_ops::Problem;

constexpr int64_t kAlignment = 64;
constexpr int64_t kPadding = 16;  // points are padded to a multiple: the longest vector of floats

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

// The prepared points of one (query, head), and the constants of each point's level. Arrays are
// padded to whole vectors; padding points weigh nothing.
template <typename A>
struct Points {
  int64_t count, padded;
  A *width, *height;        // of the point's level
  int32_t *stride, *first;  // padded row length and first padded pixel of the point's level
  int32_t* level;
  A *x, *y;                 // inputs, then pixel coordinates
  A *scale_x, *scale_y;     // pixels per unit of the raw input
  A *origin_x, *origin_y;   // [L]: pixel of the reference point
  A *unit_x, *unit_y;       // [L]: pixels per unit of offset
  A* attention;
  A *left, *right, *top, *bottom;  // shares of the two columns and rows
  A* corners;               // [P, 4]: shares of the four corners, times the attention weight
  A* dots;                  // [P, 4]: <grad_output, corner>
  int32_t* pixel;           // top left corner, or -1 for a point that touches nothing
  A* grad_x;
  A* grad_y;
  A* grad_weight;

  Points(Arena& arena, const Problem& p) : count(p.L * p.K), padded(round_up(count, kPadding)) {
    width = arena.take<A>(padded);
    height = arena.take<A>(padded);
    stride = arena.take<int32_t>(padded);
    first = arena.take<int32_t>(padded);
    level = arena.take<int32_t>(padded);
    x = arena.take<A>(padded);
    y = arena.take<A>(padded);
    scale_x = arena.take<A>(padded);
    scale_y = arena.take<A>(padded);
    origin_x = arena.take<A>(p.L);
    origin_y = arena.take<A>(p.L);
    unit_x = arena.take<A>(p.L);
    unit_y = arena.take<A>(p.L);
    attention = arena.take<A>(padded);
    left = arena.take<A>(padded);
    right = arena.take<A>(padded);
    top = arena.take<A>(padded);
    bottom = arena.take<A>(padded);
    corners = arena.take<A>(4 * padded);
    dots = arena.take<A>(4 * padded);
    pixel = arena.take<int32_t>(padded);
    grad_x = arena.take<A>(padded);
    grad_y = arena.take<A>(padded);
    grad_weight = arena.take<A>(padded);
  }

  void set_levels(const Problem& p) {
    int32_t pixels = 0;
    for (int64_t i = 0, l = 0; l < p.L; ++l) {
      const int64_t h = p.shapes[2 * l], w = p.shapes[2 * l + 1];
      for (int64_t k = 0; k < p.K; ++k, ++i) {
        width[i] = static_cast<A>(w);
        height[i] = static_cast<A>(h);
        stride[i] = static_cast<int32_t>(w + 2);
        first[i] = pixels;
        level[i] = static_cast<int32_t>(l);
      }
      pixels += static_cast<int32_t>((h + 2) * (w + 2));
    }
    for (int64_t i = count; i < padded; ++i) {
      width[i] = height[i] = 0;
      stride[i] = first[i] = 0;
      level[i] = 0;
    }
  }
};

int64_t padded_pixels(const Problem& p) {
  int64_t pixels = 0;
  for (int64_t l = 0; l < p.L; ++l) pixels += (p.shapes[2 * l] + 2) * (p.shapes[2 * l + 1] + 2);
  return pixels;
}

template <typename T>
struct Head {
  using A = Wide<T>;
  int64_t channels;  // D rounded up to whole vectors
  Points<A> points;
  A* values;  // [padded pixel, channels]
  A* row;     // one output or grad_output row
  A* grads;   // as values; backward only

  Head(Arena& arena, const Problem& p, bool backward)
      : channels(round_up(p.D, kLanes<A>)), points(arena, p) {
    row = arena.take<A>(channels);
    const int64_t pixels = padded_pixels(p);
    values = arena.take<A>(pixels * channels);
    grads = backward ? arena.take<A>(pixels * channels) : nullptr;
  }
};

template <typename T>
int64_t scratch_bytes(const Problem& p, bool backward) {
  Arena arena{nullptr};
  Head<T> head(arena, p, backward);
  return arena.used;
}

template <typename A>
void clear(A* array, int64_t count) {
  __builtin_memset(array, 0, static_cast<uint64_t>(count) * sizeof(A));
}

// Copies levels [l0, l1) of one head's values into `values`, with their borders.
template <typename T>
void copy_in(const Problem& p, const Head<T>& head, int64_t n, int64_t m, int64_t l0, int64_t l1) {
  using A = Wide<T>;
  const T* source = static_cast<const T*>(p.value) + n * p.value_strides[0] +
                    m * p.value_strides[2];
  const int64_t channels = head.channels;
  A* target = head.values;
  for (int64_t l = 0; l < l1; ++l) {
    const int64_t height = p.shapes[2 * l], width = p.shapes[2 * l + 1];
    if (l < l0) {
      source += height * width * p.value_strides[1];
      target += (height + 2) * (width + 2) * channels;
      continue;
    }
    clear(target, (width + 2) * channels);
    target += (width + 2) * channels;
    for (int64_t y = 0; y < height; ++y) {
      clear(target, channels);
      target += channels;
      for (int64_t x = 0; x < width; ++x) {
        if (p.value_strides[3] == 1) {
          for (int64_t d = 0; d < p.D; ++d) target[d] = widen(source[d]);
        } else {
          for (int64_t d = 0; d < p.D; ++d) target[d] = widen(source[d * p.value_strides[3]]);
        }
        for (int64_t d = p.D; d < channels; ++d) target[d] = 0;
        source += p.value_strides[1];
        target += channels;
      }
      clear(target, channels);
      target += channels;
    }
    clear(target, (width + 2) * channels);
    target += (width + 2) * channels;
  }
}

// The way back for gradients, without the borders.
template <typename T>
void copy_out(
    const Problem& p, const Head<T>& head, int64_t n, int64_t m, int64_t l0, int64_t l1) {
  using A = Wide<T>;
  T* target = static_cast<T*>(p.grad_value) + (n * p.S * p.M + m) * p.D;
  const A* source = head.grads;
  for (int64_t l = 0; l < l1; ++l) {
    const int64_t height = p.shapes[2 * l], width = p.shapes[2 * l + 1];
    if (l < l0) {
      target += height * width * p.M * p.D;
      source += (height + 2) * (width + 2) * head.channels;
      continue;
    }
    source += (width + 2) * head.channels;
    for (int64_t y = 0; y < height; ++y) {
      source += head.channels;
      for (int64_t x = 0; x < width; ++x) {
        for (int64_t d = 0; d < p.D; ++d) narrow(source[d], target[d]);
        source += head.channels;
        target += p.M * p.D;
      }
      source += head.channels;
    }
    source += (width + 2) * head.channels;
  }
}

// In place, over whole vectors; padding holds -infinity before and zero after.
template <typename A>
inline void softmax(A* weights, int64_t padded) {
  A peak = weights[0], total = 0;
#pragma omp simd reduction(max : peak)
  for (int64_t i = 0; i < padded; ++i) peak = weights[i] > peak ? weights[i] : peak;
#pragma omp simd
  for (int64_t i = 0; i < padded; ++i) weights[i] = exp_of_nonpositive(weights[i] - peak);
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < padded; ++i) total += weights[i];
  const A scale = 1 / total;
#pragma omp simd
  for (int64_t i = 0; i < padded; ++i) weights[i] *= scale;
}

template <typename T>
void load(
    const T* __restrict source, int64_t count, int64_t padded, Wide<T> padding,
    Wide<T>* __restrict target) {
  for (int64_t i = 0; i < count; ++i) target[i] = widen(source[i]);
  for (int64_t i = count; i < padded; ++i) target[i] = padding;
}

template <typename T, typename A>
void load_pairs(const T* __restrict source, int64_t count, A* __restrict x, A* __restrict y) {
  for (int64_t i = 0; i < count; ++i) {
    x[i] = widen(source[2 * i]);
    y[i] = widen(source[2 * i + 1]);
  }
}

// Fills the points of one (query, head): pixel coordinates, attention weights, corner shares.
template <typename T>
void prepare(const Problem& p, Points<Wide<T>>& points, int64_t n, int64_t q, int64_t m) {
  using A = Wide<T>;
  const int64_t count = points.count;
  const int64_t padded = points.padded / kPadding * kPadding;  // tells the compiler: no remainder
  const int64_t row = (n * p.Q + q) * p.M + m;
  A* __restrict xs = points.x;
  A* __restrict ys = points.y;
  A* __restrict scale_x = points.scale_x;
  A* __restrict scale_y = points.scale_y;
  const A* __restrict width = points.width;
  const A* __restrict height = points.height;
  const A half = static_cast<A>(0.5);

  const T* weights = static_cast<const T*>(p.weights) + row * count;
  const A padding = p.R == 0 ? A{0} : -static_cast<A>(__builtin_inff());
  load(weights, count, padded, padding, points.attention);
  if (p.R == 0) {
    load_pairs(static_cast<const A*>(p.points) + row * count * 2, count, xs, ys);
#pragma omp simd
    for (int64_t i = 0; i < padded; ++i) {
      scale_x[i] = width[i];
      scale_y[i] = height[i];
      xs[i] = xs[i] * width[i] - half;
      ys[i] = ys[i] * height[i] - half;
    }
  } else {
    softmax(points.attention, padded);
    load_pairs(static_cast<const T*>(p.points) + row * count * 2, count, xs, ys);
    const A* reference = static_cast<const A*>(p.reference) + (n * p.Q + q) * p.L * p.R;
    const A box_unit = half / static_cast<A>(p.K);
    A* __restrict origin_x = points.origin_x;
    A* __restrict origin_y = points.origin_y;
    A* __restrict unit_x = points.unit_x;
    A* __restrict unit_y = points.unit_y;
    for (int64_t l = 0; l < p.L; ++l, reference += p.R) {
      const A w = width[l * p.K], h = height[l * p.K];
      origin_x[l] = reference[0] * w - half;
      origin_y[l] = reference[1] * h - half;
      unit_x[l] = p.R == 2 ? A{1} : reference[2] * w * box_unit;
      unit_y[l] = p.R == 2 ? A{1} : reference[3] * h * box_unit;
    }
    // Looked up by level, not stored in a loop over K: a whole vector that is read back right
    // after its parts were written one by one has to wait for all of them.
    const int32_t* __restrict level = points.level;
#pragma omp simd
    for (int64_t i = 0; i < padded; ++i) {
      scale_x[i] = unit_x[level[i]];
      scale_y[i] = unit_y[level[i]];
      xs[i] = origin_x[level[i]] + xs[i] * scale_x[i];
      ys[i] = origin_y[level[i]] + ys[i] * scale_y[i];
    }
  }

  const A* __restrict attention = points.attention;
  const int32_t* __restrict stride = points.stride;
  const int32_t* __restrict first = points.first;
  A* __restrict left = points.left;
  A* __restrict right = points.right;
  A* __restrict top = points.top;
  A* __restrict bottom = points.bottom;
  A* __restrict corners = points.corners;
  int32_t* __restrict pixel = points.pixel;
#pragma omp simd
  for (int64_t i = 0; i < padded; ++i) {
    const bool touches =
        (xs[i] > A{-1}) & (xs[i] < width[i]) & (ys[i] > A{-1}) & (ys[i] < height[i]);
    const A x = touches ? xs[i] : A{0};
    const A y = touches ? ys[i] : A{0};
    // Floor: truncation, less one below zero, where x > -1.
    const int32_t column = static_cast<int32_t>(x) - static_cast<int32_t>(x < 0);
    const int32_t line = static_cast<int32_t>(y) - static_cast<int32_t>(y < 0);
    const A share_right = x - static_cast<A>(column), share_left = 1 - share_right;
    const A share_bottom = y - static_cast<A>(line), share_top = 1 - share_bottom;
    left[i] = share_left;
    right[i] = share_right;
    top[i] = share_top;
    bottom[i] = share_bottom;
    pixel[i] = touches ? first[i] + (line + 1) * stride[i] + column + 1 : -1;
  }
#pragma omp simd
  for (int64_t i = 0; i < padded; ++i) {
    const A upper = attention[i] * top[i], lower = attention[i] * bottom[i];
    corners[4 * i] = upper * left[i];
    corners[4 * i + 1] = upper * right[i];
    corners[4 * i + 2] = lower * left[i];
    corners[4 * i + 3] = lower * right[i];
  }
}

// Sums `vectors` vectors of channels over all points of one (query, head).
template <typename A, int vectors>
void gather(const Points<A>& points, const A* values, int64_t channels, A* output) {
  using V = Vector<A>;
  constexpr int lanes = kLanes<A>;
  // Separate chains of additions hide the latency of each; more would not fit the registers.
  constexpr int chains = vectors <= 2 ? 4 : vectors <= 4 ? 2 : 1;
  V sums[chains][vectors] = {};
  for (int64_t i = 0; i < points.count; ++i) {
    if (points.pixel[i] < 0) continue;
    const A* share = points.corners + 4 * i;
    const A* upper = values + points.pixel[i] * channels;
    const A* lower = upper + points.stride[i] * channels;
    const A* pixels[4] = {upper, upper + channels, lower, lower + channels};
    for (int corner = 0; corner < 4; ++corner) {
      const V* pixel = reinterpret_cast<const V*>(pixels[corner]);
      for (int v = 0; v < vectors; ++v) sums[corner % chains][v] += share[corner] * pixel[v];
    }
  }
  for (int v = 0; v < vectors; ++v) {
    V sum = sums[0][v];
    for (int chain = 1; chain < chains; ++chain) sum += sums[chain][v];
    reinterpret_cast<V*>(output)[v] = sum;
  }
  static_assert(sizeof(V) == lanes * sizeof(A));
}

template <typename A>
void gather_all(const Points<A>& points, const A* values, int64_t channels, A* output) {
  constexpr int lanes = kLanes<A>;
  int64_t c = 0;
  for (; c + 8 * lanes <= channels; c += 8 * lanes)
    gather<A, 8>(points, values + c, channels, output + c);
  for (; c + 4 * lanes <= channels; c += 4 * lanes)
    gather<A, 4>(points, values + c, channels, output + c);
  for (; c + 2 * lanes <= channels; c += 2 * lanes)
    gather<A, 2>(points, values + c, channels, output + c);
  for (; c < channels; c += lanes) gather<A, 1>(points, values + c, channels, output + c);
}

// Adds to `grads` the gradient of every value that points [begin, end) touched, and to `dots`
// the inner products of grad_output with those values.
template <typename A, int vectors>
void scatter_block(
    const Points<A>& points, int64_t begin, int64_t end, const A* __restrict values,
    A* __restrict grads, int64_t channels, const A* grad_output) {
  using V = Vector<A>;
  constexpr int lanes = kLanes<A>;
  V g[vectors];
  for (int v = 0; v < vectors; ++v) g[v] = reinterpret_cast<const V*>(grad_output)[v];
  for (int64_t i = begin; i < end; ++i) {
    if (points.pixel[i] < 0) continue;
    const A* share = points.corners + 4 * i;
    const int64_t upper = points.pixel[i] * channels;
    const int64_t lower = upper + points.stride[i] * channels;
    const int64_t pixels[4] = {upper, upper + channels, lower, lower + channels};
    V dots[4] = {};
    for (int corner = 0; corner < 4; ++corner) {
      const V* pixel = reinterpret_cast<const V*>(values + pixels[corner]);
      V* grad = reinterpret_cast<V*>(grads + pixels[corner]);
      for (int v = 0; v < vectors; ++v) {
        dots[corner] += g[v] * pixel[v];
        grad[v] += share[corner] * g[v];
      }
    }
    add_lane_sums<A, lanes>(dots, points.dots + 4 * i);
  }
}

template <typename A>
void scatter_all(
    const Points<A>& points, int64_t begin, int64_t end, const A* values, A* grads,
    int64_t channels, const A* grad_output) {
  constexpr int lanes = kLanes<A>;
  clear(points.dots + 4 * begin, 4 * (end - begin));
  int64_t c = 0;
  for (; c + 8 * lanes <= channels; c += 8 * lanes)
    scatter_block<A, 8>(points, begin, end, values + c, grads + c, channels, grad_output + c);
  for (; c + 4 * lanes <= channels; c += 4 * lanes)
    scatter_block<A, 4>(points, begin, end, values + c, grads + c, channels, grad_output + c);
  for (; c + 2 * lanes <= channels; c += 2 * lanes)
    scatter_block<A, 2>(points, begin, end, values + c, grads + c, channels, grad_output + c);
  for (; c < channels; c += lanes)
    scatter_block<A, 1>(points, begin, end, values + c, grads + c, channels, grad_output + c);
}

template <typename T>
void forward(const Problem& p, int64_t n, int64_t m, int64_t q0, int64_t q1, void* scratch) {
  Arena arena{static_cast<char*>(scratch)};
  Head<T> head(arena, p, false);
  head.points.set_levels(p);
  copy_in(p, head, n, m, 0, p.L);
  for (int64_t q = q0; q < q1; ++q) {
    prepare<T>(p, head.points, n, q, m);
    gather_all(head.points, head.values, head.channels, head.row);
    T* output = static_cast<T*>(p.output) + ((n * p.Q + q) * p.M + m) * p.D;
    for (int64_t d = 0; d < p.D; ++d) narrow(head.row[d], output[d]);
  }
}

template <typename T>
void scatter(const Problem& p, int64_t n, int64_t m, int64_t l0, int64_t l1, void* scratch) {
  using A = Wide<T>;
  Arena arena{static_cast<char*>(scratch)};
  Head<T> head(arena, p, true);
  Points<A>& points = head.points;
  points.set_levels(p);
  copy_in(p, head, n, m, l0, l1);
  const int64_t begin = l0 * p.K, end = l1 * p.K;
  int64_t first_pixel = 0, last_pixel = 0;
  for (int64_t l = 0; l < l1; ++l) {
    const int64_t pixels = (p.shapes[2 * l] + 2) * (p.shapes[2 * l + 1] + 2);
    if (l < l0) first_pixel += pixels;
    last_pixel += pixels;
  }
  clear(head.grads + first_pixel * head.channels, (last_pixel - first_pixel) * head.channels);
  clear(head.row, head.channels);

  for (int64_t q = 0; q < p.Q; ++q) {
    const int64_t row = (n * p.Q + q) * p.M + m;
    prepare<T>(p, points, n, q, m);
    const T* grad_output = static_cast<const T*>(p.grad_output) + row * p.D;
    for (int64_t d = 0; d < p.D; ++d) head.row[d] = widen(grad_output[d]);
    scatter_all(points, begin, end, head.values, head.grads, head.channels, head.row);

    const A* __restrict dots = points.dots;
    A* __restrict grad_x = points.grad_x;
    A* __restrict grad_y = points.grad_y;
    A* __restrict grad_weight = points.grad_weight;
    const A* __restrict left = points.left;
    const A* __restrict right = points.right;
    const A* __restrict top = points.top;
    const A* __restrict bottom = points.bottom;
    const A* __restrict attention = points.attention;
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      const A a = dots[4 * i], b = dots[4 * i + 1], c = dots[4 * i + 2], d = dots[4 * i + 3];
      grad_x[i] = attention[i] * (top[i] * (b - a) + bottom[i] * (d - c));
      grad_y[i] = attention[i] * (left[i] * (c - a) + right[i] * (d - b));
      grad_weight[i] = top[i] * (left[i] * a + right[i] * b) +
                       bottom[i] * (left[i] * c + right[i] * d);
    }

    if (p.R == 0) {
      A* grad_points = static_cast<A*>(p.grad_points) + row * points.count * 2;
      T* grad_weights = static_cast<T*>(p.grad_weights) + row * points.count;
      for (int64_t i = begin; i < end; ++i) {
        grad_points[2 * i] = grad_x[i] * points.scale_x[i];
        grad_points[2 * i + 1] = grad_y[i] * points.scale_y[i];
        narrow(grad_weight[i], grad_weights[i]);
      }
      continue;
    }

    T* grad_points = static_cast<T*>(p.grad_points) + row * points.count * 2;
    A* weight_dots = static_cast<A*>(p.weight_dots) + row * points.count;
    for (int64_t i = begin; i < end; ++i) {
      narrow(grad_x[i] * points.scale_x[i], grad_points[2 * i]);
      narrow(grad_y[i] * points.scale_y[i], grad_points[2 * i + 1]);
      weight_dots[i] = grad_weight[i];
    }
    if (p.reference_parts == nullptr) continue;
    const T* offsets = static_cast<const T*>(p.points) + row * points.count * 2;
    A* part = static_cast<A*>(p.reference_parts) + (row * p.L + l0) * p.R;
    const A box_unit = static_cast<A>(0.5) / static_cast<A>(p.K);
    for (int64_t l = l0; l < l1; ++l, part += p.R) {
      A x = 0, y = 0, w = 0, h = 0;
      for (int64_t i = l * p.K; i < (l + 1) * p.K; ++i) {
        x += grad_x[i];
        y += grad_y[i];
        w += grad_x[i] * widen(offsets[2 * i]);
        h += grad_y[i] * widen(offsets[2 * i + 1]);
      }
      const A width = points.width[l * p.K], height = points.height[l * p.K];
      part[0] = x * width;
      part[1] = y * height;
      if (p.R == 4) {
        part[2] = w * width * box_unit;
        part[3] = h * height * box_unit;
      }
    }
  }
  copy_out(p, head, n, m, l0, l1);
}

template <typename T>
void finish(const Problem& p, int64_t n, int64_t q0, int64_t q1) {
  using A = Wide<T>;
  const int64_t count = p.L * p.K;
  for (int64_t q = q0; q < q1; ++q) {
    for (int64_t m = 0; m < p.M; ++m) {
      const int64_t row = (n * p.Q + q) * p.M + m;
      const T* logits = static_cast<const T*>(p.weights) + row * count;
      const A* dots = static_cast<const A*>(p.weight_dots) + row * count;
      T* grads = static_cast<T*>(p.grad_weights) + row * count;
      A peak = widen(logits[0]), total = 0, mean = 0;
#pragma omp simd reduction(max : peak)
      for (int64_t i = 0; i < count; ++i) {
        const A logit = widen(logits[i]);
        peak = logit > peak ? logit : peak;
      }
#pragma omp simd reduction(+ : total, mean)
      for (int64_t i = 0; i < count; ++i) {
        const A weight = exp_of_nonpositive(widen(logits[i]) - peak);
        total += weight;
        mean += weight * dots[i];
      }
      const A scale = 1 / total;
      mean *= scale;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const A weight = exp_of_nonpositive(widen(logits[i]) - peak) * scale;
        narrow(weight * (dots[i] - mean), grads[i]);
      }
    }
    if (p.reference_parts == nullptr) continue;
    const int64_t size = p.L * p.R;
    A* grad = static_cast<A*>(p.grad_reference) + (n * p.Q + q) * size;
    const A* parts = static_cast<const A*>(p.reference_parts) + (n * p.Q + q) * p.M * size;
    for (int64_t i = 0; i < size; ++i) {
      A sum = 0;
      for (int64_t m = 0; m < p.M; ++m) sum += parts[m * size + i];
      grad[i] = sum;
    }
  }
}

#define CUDA_OPS_TEXT_(name) #name
#define CUDA_OPS_TEXT(name) CUDA_OPS_TEXT_(name)
#define CUDA_OPS_JOIN_(a, b) a##b
#define CUDA_OPS_JOIN(a, b) CUDA_OPS_JOIN_(a, b)

template <typename T>
constexpr cuda_ops::Kernels kTable = {
    CUDA_OPS_TEXT(CUDA_OPS_KERNELS), scratch_bytes<T>, forward<T>, scatter<T>, finish<T>};

}  // namespace

namespace cuda_ops {

const Kernels* CUDA_OPS_JOIN(CUDA_OPS_KERNELS, _kernels)(StorageType type) {
  switch (type) {
    case kFloat: return &kTable<float>;
    case kDouble: return &kTable<double>;
    case kHalf: return &kTable<Half>;
    case kBFloat16: return &kTable<BFloat16>;
    default: return nullptr;
  }
}

}  // namespace cuda_ops
