// Both operators' CPU kernels, compiled once per instruction set (CUDA_OPS_KERNELS names the
// table). All storage types and both operators share one body.
//
// N batch, S tokens, M heads, D channels per head, Q queries, L levels, K points.
#include "points.h"

namespace {

template <typename T>
int64_t row_pitch(const Problem& p) {
  return round_up(p.D, kLanes<Wide<T>>);
}

// What one task works with: some levels of one head.
template <typename T>
struct Head {
  using A = Wide<T>;
  int64_t channels;  // D rounded up to whole vectors
  Points<A> points;
  A* rows;           // [row, channels]: output or grad_output
  // Backward only:
  A* pixels;         // [bordered pixel, 2, channels]: values and gradient
  A* dots;           // [row, k, corner] of one level: <grad_output, corner>
  A *grad_x, *grad_y, *grad_weight;  // [l - l0, row, k]
  A* row_grad;       // [l - l0, k]: grad_weight of one row

  Head(Arena& arena, const Problem& p, int64_t l0, int64_t l1, bool backward)
      : channels(row_pitch<T>(p)), points(arena, p, l0, l1) {
    rows = arena.take<A>(points.rows * channels);
    if (!backward) return;
    pixels = arena.take<A>(bordered_pixels(p, l0, l1) * 2 * channels);
    dots = arena.take<A>(4 * points.capacity);
    A** arrays[] = {&grad_x, &grad_y, &grad_weight};
    for (A** array : arrays) *array = arena.take<A>((l1 - l0) * points.capacity);
    row_grad = arena.take<A>((l1 - l0) * p.K);
  }
};

template <typename T, bool backward>
int64_t scratch_bytes(const Problem& p) {
  Arena arena{nullptr};
  Head<T> head(arena, p, 0, p.L, backward);
  return arena.used;
}

template <typename T>
int64_t finish_scratch_bytes(const Problem& p) {
  return round_up(p.L * p.K, kPadding) * static_cast<int64_t>(sizeof(Wide<T>));
}

template <typename T>
int64_t slice_bytes(const Problem& p) {
  const int64_t numbers = bordered_pixels(p, 0, p.L) * row_pitch<T>(p);
  return round_up(numbers * static_cast<int64_t>(sizeof(Wide<T>)), kAlignment);
}

template <typename T>
void pack(const Problem& p, int64_t n, int64_t m, int64_t l0, int64_t l1, void* slice) {
  const int64_t pitch = row_pitch<T>(p);
  Wide<T>* target = static_cast<Wide<T>*>(slice) + bordered_pixels(p, 0, l0) * pitch;
  copy_in<T>(p, n, m, l0, l1, pitch, target);
}

// Adds to `output` what the placed points of `rows` rows read, in `vectors` vectors of channels.
template <typename A, int vectors>
void gather(
    const Points<A>& points, int64_t rows, int64_t K, const A* pixels, int64_t channels,
    A* output) {
  using V = Vector<A>;
  // Two chains of additions hide the latency of each; more would not fit the registers.
  constexpr int chains = vectors <= 4 ? 2 : 1;
  const Corners<A> corners(points);
  for (int64_t r = 0; r < rows; ++r, output += channels) {
    V* row = reinterpret_cast<V*>(output);
    V sums[chains][vectors] = {};
    for (int v = 0; v < vectors; ++v) sums[0][v] = row[v];
    for (int64_t i = r * K; i < (r + 1) * K; ++i) {
      for (int corner = 0; corner < 4; ++corner) {
        const V* pixel = reinterpret_cast<const V*>(pixels + corners.pixel(corner, i) * channels);
        const A share = corners.shares[corner][i];
        for (int v = 0; v < vectors; ++v) sums[corner % chains][v] += share * pixel[v];
      }
    }
    for (int v = 0; v < vectors; ++v) row[v] = chains == 1 ? sums[0][v] : sums[0][v] + sums[1][v];
  }
}

// The backward soon reads back what it wrote, which a Zen 4 does faster by 32 bytes than by 64.
template <typename A>
constexpr int kScatterLanes = kVectorBytes > 32 ? kLanes<A> / 2 : kLanes<A>;

// Adds to the gradients of all pixels that points [i, i + number) touch, and to `dots` the inner
// products of grad_output with those pixels. A pixel's gradient lies `channels` behind its values.
template <typename A, int vectors, int number>
inline __attribute__((always_inline)) void scatter_points(
    const Corners<A>& corners, int64_t i, A* __restrict pixels, int64_t channels,
    const Vector<A, kScatterLanes<A>> (&grad_output)[vectors], A* __restrict dots) {
  constexpr int lanes = kScatterLanes<A>, count = 4 * number;
  using V = Vector<A, lanes>;
  V products[count > lanes ? count : lanes] = {};
#pragma GCC unroll 16
  for (int j = 0; j < count; ++j) {
    A* pixel = pixels + corners.pixel(j % 4, i + j / 4) * 2 * channels;
    const V* value = reinterpret_cast<const V*>(pixel);
    V* grad = reinterpret_cast<V*>(pixel + channels);
    const A share = corners.shares[j % 4][i + j / 4];
    for (int v = 0; v < vectors; ++v) {
      products[j] += grad_output[v] * value[v];
      grad[v] += share * grad_output[v];
    }
  }
  for (int j = 0; j < count; j += lanes) {
    const V sums = lane_sums<A, lanes>(products + j);
    A* target = dots + 4 * i + j;
    if constexpr (count >= lanes) {
      V before;
      __builtin_memcpy(&before, target, sizeof(before));
      before += sums;
      __builtin_memcpy(target, &before, sizeof(before));
    } else {
      for (int lane = 0; lane < count; ++lane) target[lane] += sums[lane];
    }
  }
}

// The same for all placed points of `rows` rows.
template <typename A, int vectors>
void scatter_level(
    const Points<A>& points, int64_t rows, int64_t K, A* pixels, int64_t channels,
    const A* grad_output, A* dots) {
  using V = Vector<A, kScatterLanes<A>>;
  constexpr int group = kScatterLanes<A> > 4 ? kScatterLanes<A> / 4 : 1;  // dots fill a vector
  const Corners<A> corners(points);
  for (int64_t r = 0; r < rows; ++r, grad_output += channels) {
    V g[vectors];
    for (int v = 0; v < vectors; ++v) g[v] = reinterpret_cast<const V*>(grad_output)[v];
    const int64_t end = (r + 1) * K;
    int64_t i = r * K;
    for (; i + group <= end; i += group)
      scatter_points<A, vectors, group>(corners, i, pixels, channels, g, dots);
    for (; i < end; ++i) scatter_points<A, vectors, 1>(corners, i, pixels, channels, g, dots);
  }
}

// Calls `block(number, c)` with `number` vectors of channels from channel c on, until all are done.
template <int lanes, typename Block>
inline void for_channels(int64_t channels, Block block) {
  int64_t c = 0;
  for (; c + 8 * lanes <= channels; c += 8 * lanes) block.template operator()<8>(c);
  for (; c + 4 * lanes <= channels; c += 4 * lanes) block.template operator()<4>(c);
  for (; c + 2 * lanes <= channels; c += 2 * lanes) block.template operator()<2>(c);
  for (; c < channels; c += lanes) block.template operator()<1>(c);
}

template <typename T>
void forward(
    const Problem& p, int64_t n, int64_t m, int64_t q0, int64_t q1, const void* slice,
    void* scratch) {
  using A = Wide<T>;
  const A* pixels = static_cast<const A*>(slice);
  Arena arena{static_cast<char*>(scratch)};
  Head<T> head(arena, p, 0, p.L, false);
  Points<A>& points = head.points;
  points.set_scales(p);
  for (int64_t q = q0; q < q1; q += points.rows) {
    const int64_t rows = q1 - q < points.rows ? q1 - q : points.rows;
    with_constant(p.K, [&](auto K) { load_rows<T>(p, K, points, n, q, m, rows); });
    clear(head.rows, rows * head.channels);
    for (int64_t l = 0; l < p.L; ++l) {
      place(p, points, l, bordered_pixels(p, 0, l), rows);
      for_channels<kLanes<A>>(head.channels, [&]<int vectors>(int64_t c) {
        gather<A, vectors>(points, rows, p.K, pixels + c, head.channels, head.rows + c);
      });
    }
    T* output = static_cast<T*>(p.output) + ((n * p.Q + q) * p.M + m) * p.D;
    for (int64_t r = 0; r < rows; ++r, output += p.M * p.D) {
      prefetch<1>(output + kAhead * p.M * p.D, p.D);
      narrow_row(head.rows + r * head.channels, p.D, output);
    }
  }
}

// From the dots of the placed points of `rows` rows: the derivatives by raw input and by weight.
template <typename T>
void point_gradients(const Problem& p, Head<T>& head, int64_t l, int64_t rows) {
  using A = Wide<T>;
  const Points<A>& points = head.points;
  const int64_t start = (l - points.l0) * points.capacity;
  const A* __restrict attention = points.attention + start;
  const A* __restrict right = points.right;
  const A* __restrict bottom = points.bottom;
  const int32_t* __restrict upper = points.upper;
  const int32_t* __restrict lower = points.lower;
  const A* __restrict dots = head.dots;
  A* __restrict grad_x = head.grad_x + start;
  A* __restrict grad_y = head.grad_y + start;
  A* __restrict grad_weight = head.grad_weight + start;
  const int64_t count = round_up(rows * p.K, kPadding);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const bool inside = lower[i] != upper[i];
    const A a = dots[4 * i], b = dots[4 * i + 1], c = dots[4 * i + 2], d = dots[4 * i + 3];
    const A above = a + right[i] * (b - a), below = c + right[i] * (d - c);
    const A x = attention[i] * ((b - a) + bottom[i] * ((d - c) - (b - a)));
    const A y = attention[i] * (below - above);
    grad_x[i] = inside ? x : A{0};
    grad_y[i] = inside ? y : A{0};
    grad_weight[i] = inside ? above + bottom[i] * (below - above) : A{0};
  }
}

// The gradient of a row's logits from that of its weights.
template <typename T, int kCount>
__attribute__((noinline)) void softmax_gradient(
    const Wide<T>* __restrict weights, const Wide<T>* __restrict dots, int64_t count,
    T* __restrict grads) {
  if (kCount) count = kCount;
  using V = Vector<Wide<T>>;
  constexpr int lanes = kLanes<Wide<T>>;
  V products = {};
  const int64_t whole = count / lanes * lanes;
  for (int64_t j = 0; j < whole; j += lanes) {
    V weight, dot;
    __builtin_memcpy(&weight, weights + j, sizeof(V));
    __builtin_memcpy(&dot, dots + j, sizeof(V));
    products += weight * dot;
  }
  Wide<T> mean = over_lanes<Wide<T>>(products, [](V a, V b) { return a + b; })[0];
  for (int64_t j = whole; j < count; ++j) mean += weights[j] * dots[j];
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) narrow(weights[i] * (dots[i] - mean), grads[i]);
}

template <typename T>
inline void softmax_gradient(
    const Wide<T>* weights, const Wide<T>* dots, int64_t count, T* grads) {
  count == 16 ? softmax_gradient<T, 16>(weights, dots, count, grads)
              : softmax_gradient<T, 0>(weights, dots, count, grads);
}

template <typename T>
inline void store_pairs(
    T* __restrict target, int64_t count, const Wide<T>* x, const Wide<T>* scale_x,
    const Wide<T>* y, const Wide<T>* scale_y) {
  for (int64_t k = 0; k < count; ++k) {
    narrow(x[k] * scale_x[k], target[2 * k]);
    narrow(y[k] * scale_y[k], target[2 * k + 1]);
  }
}

// What the points of a row's level give to the gradient of the row's reference point there; they
// begin at `begin` in the arrays of `head`.
template <typename T>
void reference_part(
    const Problem& p, const Head<T>& head, int64_t row, int64_t l, int64_t begin) {
  using A = Wide<T>;
  A x = 0, y = 0, w = 0, h = 0;
  for (int64_t i = begin; i < begin + p.K; ++i) {
    x += head.grad_x[i];
    y += head.grad_y[i];
    w += head.grad_x[i] * head.points.x[i];
    h += head.grad_y[i] * head.points.y[i];
  }
  const A width = static_cast<A>(p.shapes[2 * l + 1]), height = static_cast<A>(p.shapes[2 * l]);
  const A box_unit = static_cast<A>(0.5) / static_cast<A>(p.K);
  A* part = static_cast<A*>(p.reference_parts) + (row * p.L + l) * p.R;
  part[0] = x * width;
  part[1] = y * height;
  if (p.R == 4) {
    part[2] = w * width * box_unit;
    part[3] = h * height * box_unit;
  }
}

// Writes the gradients of row r, all but that of value; `row` is its number in the tensors.
template <typename T, typename PointsPerLevel>
void store_row(
    const Problem& p, PointsPerLevel K, const Head<T>& head, int64_t row, int64_t r) {
  using A = Wide<T>;
  const Points<A>& points = head.points;
  const int64_t size = (points.l1 - points.l0) * K, count = p.L * K;
  const int64_t target = row * count + points.l0 * K, next = kAhead * p.M * count;
  T* grad_weights = static_cast<T*>(p.grad_weights) + target;
  prefetch<1>(grad_weights + next, size);
  prefetch<1>(static_cast<T*>(p.grad_points) + (target + next) * 2, size * 2);
  for (int64_t l = points.l0; l < points.l1; ++l) {
    const int64_t begin = (l - points.l0) * points.capacity + r * K;
    const int64_t offset = (l - points.l0) * K;
    for (int64_t k = 0; k < K; ++k) head.row_grad[offset + k] = head.grad_weight[begin + k];
    const A* x = head.grad_x + begin;
    const A* y = head.grad_y + begin;
    const A* scale_x = points.scale_x + begin;
    const A* scale_y = points.scale_y + begin;
    if (p.R == 0) {
      A* grad_points = static_cast<A*>(p.grad_points) + (target + offset) * 2;
      store_pairs(grad_points, K, x, scale_x, y, scale_y);
    } else {
      T* grad_points = static_cast<T*>(p.grad_points) + (target + offset) * 2;
      store_pairs(grad_points, K, x, scale_x, y, scale_y);
      if (p.reference_parts != nullptr) reference_part(p, head, row, l, begin);
    }
  }
  if (p.R == 0) {
    narrow_row(head.row_grad, size, grad_weights);
  } else if (size == count) {
    softmax_gradient(points.row_weights + r * points.pitch, head.row_grad, count, grad_weights);
  } else {
    narrow_row(head.row_grad, size, static_cast<A*>(p.weight_dots) + target);
  }
}

template <typename T>
void scatter(const Problem& p, int64_t n, int64_t m, int64_t l0, int64_t l1, void* scratch) {
  using A = Wide<T>;
  Arena arena{static_cast<char*>(scratch)};
  Head<T> head(arena, p, l0, l1, true);
  Points<A>& points = head.points;
  const int64_t channels = head.channels;
  points.set_scales(p);
  copy_in<T>(p, n, m, l0, l1, 2 * channels, head.pixels);
  clear(head.rows, points.rows * channels);

  for (int64_t q = 0; q < p.Q; q += points.rows) {
    const int64_t rows = p.Q - q < points.rows ? p.Q - q : points.rows;
    const int64_t first_row = (n * p.Q + q) * p.M + m;
    with_constant(p.K, [&](auto K) { load_rows<T>(p, K, points, n, q, m, rows); });
    for (int64_t r = 0; r < rows; ++r) {
      const T* grad_output = static_cast<const T*>(p.grad_output) + (first_row + r * p.M) * p.D;
      prefetch<0>(grad_output + kAhead * p.M * p.D, p.D);
      widen_row(grad_output, p.D, head.rows + r * channels);
    }
    for (int64_t l = l0; l < l1; ++l) {
      place(p, points, l, bordered_pixels(p, l0, l), rows);
      clear(head.dots, 4 * points.capacity);
      for_channels<kScatterLanes<A>>(channels, [&]<int vectors>(int64_t c) {
        scatter_level<A, vectors>(
            points, rows, p.K, head.pixels + c, channels, head.rows + c, head.dots);
      });
      point_gradients(p, head, l, rows);
    }
    with_constant(p.K, [&](auto K) {
      for (int64_t r = 0; r < rows; ++r) store_row(p, K, head, first_row + r * p.M, r);
    });
  }
  copy_out<T>(p, n, m, l0, l1, 2 * channels, head.pixels + channels);
}

template <typename T>
void finish(const Problem& p, int64_t n, int64_t q0, int64_t q1, void* scratch) {
  using A = Wide<T>;
  const int64_t count = p.L * p.K;
  const int64_t split_heads = p.weight_dots == nullptr ? 0 : p.M;
  A* weights = static_cast<A*>(scratch);
  for (int64_t q = q0; q < q1; ++q) {
    for (int64_t m = 0; m < split_heads; ++m) {
      const int64_t row = (n * p.Q + q) * p.M + m;
      softmax(static_cast<const T*>(p.weights) + row * count, count, weights);
      const A* dots = static_cast<const A*>(p.weight_dots) + row * count;
      softmax_gradient(weights, dots, count, static_cast<T*>(p.grad_weights) + row * count);
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
    CUDA_OPS_TEXT(CUDA_OPS_KERNELS),
    slice_bytes<T>,
    scratch_bytes<T, false>,
    scratch_bytes<T, true>,
    finish_scratch_bytes<T>,
    pack<T>,
    forward<T>,
    scatter<T>,
    finish<T>};

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
