// Runs the CUDA kernels' phases on the CPU: a loop over blocks around a loop over threads for
// each phase, the loop's end standing for the barrier. Shared memory starts out as NaN.
#include "phases.h"

#include <limits>
#include <vector>

namespace {

using namespace cuda_ops;

struct Plain {
  template <typename A, int C>
  void operator()(A* address, const A (&amounts)[C]) const {
    for (int c = 0; c < C; ++c) address[c] += amounts[c];
  }
};

template <typename A>
std::vector<A> fresh(int64_t numbers) {
  return std::vector<A>(numbers, std::numeric_limits<A>::quiet_NaN());
}

template <typename T>
void set_sizes(T& p, const int64_t* sizes, const int64_t* shapes) {
  p.N = sizes[0], p.M = sizes[1], p.D = sizes[2], p.Q = sizes[3], p.L = sizes[4], p.K = sizes[5];
  p.S = 0;
  for (int64_t l = 0; l < p.L; ++l) {
    p.levels.height[l] = shapes[2 * l];
    p.levels.width[l] = shapes[2 * l + 1];
    p.levels.start[l] = p.S;
    p.S += shapes[2 * l] * shapes[2 * l + 1];
  }
}

template <typename Phase>
void each_thread(int threads, const Phase& phase) {
  for (int thread = 0; thread < threads; ++thread) phase(thread);
}

template <typename T, int C>
void forward(Attention<T>& p) {
  divide_rows(p, C, false);
  for (int64_t block = 0; block < p.blocks(); ++block) {
    auto memory = fresh<T>(Shared<T>::numbers(p.row_points(), p.rows, p.lanes, false));
    const Shared<T> shared{memory.data(), p.row_points(), p.rows, p.lanes};
    each_thread(p.threads(), [&](int t) { place_points(p, shared, block, t); });
    each_thread(p.threads(), [&](int t) { softmax_rows(p, shared, block, t); });
    each_thread(p.threads(), [&](int t) { gather_rows<T, C>(p, shared, block, t); });
  }
}

template <typename T, int C>
void backward(Attention<T>& p) {
  divide_rows(p, C, true);
  for (int64_t block = 0; block < p.blocks(); ++block) {
    auto memory = fresh<T>(Shared<T>::numbers(p.row_points(), p.rows, p.lanes, true));
    const Shared<T> shared{memory.data(), p.row_points(), p.rows, p.lanes};
    each_thread(p.threads(), [&](int t) { place_points(p, shared, block, t); });
    each_thread(p.threads(), [&](int t) { softmax_rows(p, shared, block, t); });
    if (p.placed != nullptr)
      each_thread(p.threads(), [&](int t) { keep_points(p, shared, block, t); });
    for (int64_t chunk = 0; chunk < p.row_points(); chunk += kChunk) {
      each_thread(
          p.threads(), [&](int t) { scatter_rows<T, C>(p, shared, block, t, chunk, Plain{}); });
      each_thread(p.threads(), [&](int t) { sum_lanes(p, shared, block, t, chunk); });
    }
    each_thread(p.threads(), [&](int t) { mean_dots(p, shared, block, t); });
    each_thread(p.threads(), [&](int t) { finish_rows(p, shared, block, t); });
  }
}

template <typename T>
void owners(Owners<T>& p) {
  divide_tokens(p);
  for (int64_t block = 0; block < p.blocks(); ++block) {
    auto sums = fresh<T>(p.strip * p.D);
    const Owned<T> mine = owned_by(p, block);
    each_thread(kWarp, [&](int lane) { clear_owned(p, mine, lane, sums.data()); });
    for (int64_t first = 0; first < p.Q * p.K; first += kWarp) {
      std::vector<int64_t> hits;
      each_thread(kWarp, [&](int lane) {
        if (touches_owned(p, mine, first + lane)) hits.push_back(first + lane);
      });
      for (const int64_t hit : hits)
        each_thread(kWarp, [&](int lane) { add_point(p, mine, hit, lane, sums.data()); });
    }
    each_thread(kWarp, [&](int lane) { store_owned(p, mine, lane, sums.data()); });
  }
}

template <typename T>
void run(
    const int64_t* sizes, const int64_t* shapes, int64_t vector, const T* value,
    const T* reference, const T* points, const T* weights, T* output, const T* grad_output,
    T* grad_value, T* placed, T* grad_points, T* grad_weights, T* reference_parts) {
  Attention<T> p{};
  set_sizes(p, sizes, shapes);
  p.R = sizes[6];
  p.value = value, p.reference = reference, p.points = points, p.weights = weights;
  p.output = output, p.grad_output = grad_output;
  p.grad_value = placed == nullptr ? grad_value : nullptr;
  p.placed = placed;
  p.grad_points = grad_points, p.grad_weights = grad_weights;
  p.reference_parts = reference_parts;
  constexpr int kVector = 16 / sizeof(T);
  vector ? forward<T, kVector>(p) : forward<T, 1>(p);
  vector ? backward<T, kVector>(p) : backward<T, 1>(p);
  if (placed == nullptr) return;
  Owners<T> o{};
  set_sizes(o, sizes, shapes);
  o.grad_output = grad_output, o.placed = placed, o.grad_value = grad_value;
  owners(o);
}

}  // namespace

#define CUDA_OPS_RUN(name, T)                                                                     \
  extern "C" void name(                                                                           \
      const int64_t* sizes, const int64_t* shapes, int64_t vector, const T* value,                \
      const T* reference, const T* points, const T* weights, T* output, const T* grad_output,     \
      T* grad_value, T* placed, T* grad_points, T* grad_weights, T* reference_parts) {            \
    run<T>(sizes, shapes, vector, value, reference, points, weights, output, grad_output,         \
           grad_value, placed, grad_points, grad_weights, reference_parts);                       \
  }
CUDA_OPS_RUN(run_float, float)
CUDA_OPS_RUN(run_double, double)
