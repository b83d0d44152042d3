// Runs the CUDA kernels on the CPU, launched as on a GPU: reads one call's sizes and tensors from
// a file, writes output and gradients to another.
//   kernels_on_host INPUT OUTPUT
// INPUT: int64 dtype (0 double, 1 float, 2 half, 3 bfloat16), seed of the threads' order,
// N, M, D, Q, L, K, R, L times (h, w); then value, reference, points, weights, grad_output.
#include "launch.h"

#include <algorithm>
#include <fstream>
#include <limits>

namespace cuda_ops {

// One byte more than a block may ask for, to see that no one writes beyond.
alignas(16) unsigned char shared_memory[kSharedBytes + 16];

namespace {

template <typename T>
using Array = std::vector<T>;

struct Run {
  template <typename Kernel, typename Problem>
  void operator()(Kernel* kernel, const Launch& launch, const Problem& p) const {
    if (launch.bytes > kSharedBytes) host_cuda::fail("too much shared memory");
    struct Call {
      Kernel* kernel;
      const Problem& p;
    } call{kernel, p};
    for (int64_t block = 0; block < launch.blocks; ++block) {
      std::fill_n(shared_memory, sizeof(shared_memory), 0xff);
      blockIdx.x = static_cast<unsigned>(block);
      host_cuda::run_block(
          static_cast<unsigned>(launch.threads),
          [](void* argument) {
            const Call& it = *static_cast<const Call*>(argument);
            it.kernel(it.p);
          },
          &call);
      for (int64_t i = launch.bytes; i < int64_t{sizeof(shared_memory)}; ++i) {
        if (shared_memory[i] != 0xff) host_cuda::fail("a write beyond shared memory");
      }
    }
  }
};

template <typename T>
Array<T> read(std::ifstream& file, int64_t count) {
  Array<T> array(static_cast<size_t>(count));
  file.read(reinterpret_cast<char*>(array.data()), count * static_cast<int64_t>(sizeof(T)));
  if (!file) host_cuda::fail("the input is too short");
  return array;
}

template <typename T>
Array<T> poisoned(int64_t count) {
  Array<T> array(static_cast<size_t>(count));
  std::fill_n(reinterpret_cast<unsigned char*>(array.data()), array.size() * sizeof(T), 0xff);
  return array;
}

template <typename T>
void write(std::ofstream& file, const Array<T>& array) {
  file.write(
      reinterpret_cast<const char*>(array.data()),
      static_cast<int64_t>(array.size() * sizeof(T)));
}

template <typename Problem>
void set_sizes(Problem& p, const Array<int64_t>& sizes, const Array<int64_t>& shapes) {
  const auto size = [&](int i) { return static_cast<int32_t>(sizes[static_cast<size_t>(i)]); };
  p.N = size(0), p.M = size(1), p.D = size(2), p.Q = size(3), p.L = size(4), p.K = size(5);
  p.S = 0;
  for (int32_t l = 0; l < p.L; ++l) {
    const auto at = static_cast<size_t>(2 * l);
    p.levels[l] = {static_cast<int32_t>(shapes[at]), static_cast<int32_t>(shapes[at + 1]), p.S, 0};
    p.S += p.levels[l].height * p.levels[l].width;
  }
}

template <typename T>
void call(std::ifstream& in, std::ofstream& out) {
  using A = Wide<T>;
  const auto seed = read<int64_t>(in, 1);
  const auto sizes = read<int64_t>(in, 7);
  const auto shapes = read<int64_t>(in, 2 * sizes[4]);
  host_cuda::order.seed(static_cast<unsigned>(seed[0]));
  Attention<T> p{};
  set_sizes(p, sizes, shapes);
  p.R = static_cast<int32_t>(sizes[6]);
  const int64_t rows = int64_t{p.N} * p.Q * p.M, points = rows * p.L * p.K;
  const auto value = read<T>(in, int64_t{p.N} * p.S * p.M * p.D);
  const auto reference = read<A>(in, int64_t{p.N} * p.Q * p.L * p.R);
  // With R = 0 the points are locations, of the wide type.
  const auto offsets = read<T>(in, p.R == 0 ? 0 : 2 * points);
  const auto locations = read<A>(in, p.R == 0 ? 2 * points : 0);
  const auto weights = read<T>(in, points);
  const auto grad_output = read<T>(in, rows * p.D);

  auto output = poisoned<T>(rows * p.D), grad_value = poisoned<T>(p.N * int64_t{p.S} * p.M * p.D);
  auto grad_offsets = poisoned<T>(static_cast<int64_t>(offsets.size()));
  auto grad_locations = poisoned<A>(static_cast<int64_t>(locations.size()));
  auto grad_weights = poisoned<T>(points);
  auto parts = poisoned<A>(rows * p.L * p.R), placed = poisoned<A>(2 * points);
  auto shares = poisoned<A>(points);
  p.value = value.data(), p.reference = reference.data(), p.weights = weights.data();
  p.points = p.R == 0 ? static_cast<const void*>(locations.data()) : offsets.data();
  p.output = output.data(), p.grad_output = grad_output.data();
  p.grad_points = p.R == 0 ? static_cast<void*>(grad_locations.data()) : grad_offsets.data();
  p.grad_weights = grad_weights.data(), p.reference_parts = parts.data();
  p.placed = placed.data(), p.shares = shares.data();
  Owners<T> owners{};
  set_sizes(owners, sizes, shapes);
  auto boxes = poisoned<A>(4 * owners.box_count());
  owners.boxes = boxes.data(), owners.grad_value = grad_value.data();

  run_forward(p, Run{});
  run_backward(p, owners, Run{});
  write(out, output);
  write(out, grad_value);
  write(out, parts);
  write(out, grad_offsets);
  write(out, grad_locations);
  write(out, grad_weights);
}

}  // namespace
}  // namespace cuda_ops

int main(int count, char** arguments) {
  using namespace cuda_ops;
  if (count != 3) host_cuda::fail("expected INPUT and OUTPUT");
  std::ifstream in(arguments[1], std::ios::binary);
  std::ofstream out(arguments[2], std::ios::binary);
  switch (read<int64_t>(in, 1)[0]) {
    case 0: call<double>(in, out); break;
    case 1: call<float>(in, out); break;
    case 2: call<__half>(in, out); break;
    default: call<__nv_bfloat16>(in, out); break;
  }
  return out ? 0 : 1;
}
