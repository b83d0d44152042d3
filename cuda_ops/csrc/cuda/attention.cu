// Both operators on CUDA: the tensors around the kernels, and their launches.
#include "../checks.h"
#include "launch.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

namespace cuda_ops {
namespace {

using Shapes = std::vector<int64_t>;

int32_t small(
    const char* name, int64_t size, int64_t limit = std::numeric_limits<int32_t>::max()) {
  STD_TORCH_CHECK(size <= limit, name, " is ", size, ", expected at most ", limit, " on CUDA");
  return static_cast<int32_t>(size);
}

// The sizes, in the numbers that the kernels count with; offsets into tensors are 64 bits wide.
template <typename Problem>
void set_sizes(Problem& p, const Sizes& z, const Shapes& shapes) {
  p.N = small("N", z.N);
  p.S = small("S", z.S);
  p.Q = small("Q", z.Q, kMaxQueries - 1);
  p.L = small("L", z.L, kMaxLevels);
  small("M * D * 8", z.M * z.D * 8);  // bytes of the widest type
  small("Q * K", z.Q * z.K, std::numeric_limits<int32_t>::max() - kWarp);
  p.M = static_cast<int32_t>(z.M);
  p.D = static_cast<int32_t>(z.D);
  p.K = static_cast<int32_t>(z.K);
  int32_t start = 0;
  for (int32_t l = 0; l < p.L; ++l) {
    p.levels[l] = {
        static_cast<int32_t>(shapes[2 * l]), static_cast<int32_t>(shapes[2 * l + 1]), start, 0};
    start += p.levels[l].height * p.levels[l].width;
  }
}

template <typename T>
Attention<T> attention_of(const Sizes& z, const Shapes& shapes, const Tensor& value) {
  Attention<T> p{};
  set_sizes(p, z, shapes);
  p.R = static_cast<int32_t>(z.R);
  p.value = static_cast<const T*>(value.const_data_ptr());
  return p;
}

// Contiguous, and where its numbers start at a multiple of 16 bytes, as the kernels load them; a
// tensor that is a slice of another need not.
Tensor packed(const Tensor& tensor) {
  const Tensor whole = torch::stable::contiguous(tensor);
  const bool aligned = reinterpret_cast<uintptr_t>(whole.const_data_ptr()) % 16 == 0;
  return aligned ? whole : torch::stable::clone(whole);
}

// Starts kernels on the stream that torch uses at the moment.
struct Run {
  cudaStream_t stream;

  explicit Run(const Tensor& tensor) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }

  template <typename Kernel, typename Problem>
  void operator()(const Kernel& kernel, const Launch& launch, const Problem& p) const {
    STD_TORCH_CHECK(
        launch.bytes <= kSharedBytes, "L * K = ", int64_t{p.L} * p.K, " points need ",
        launch.bytes, " bytes of shared memory, expected at most ", kSharedBytes);
    const int32_t blocks = small("the number of CUDA blocks", launch.blocks);
    kernel<<<blocks, launch.threads, static_cast<size_t>(launch.bytes), stream>>>(p);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

// The gradient of value, and what the first kernel leaves for the owners.
struct Owned {
  Tensor grad_value, placed, shares, boxes;

  Owned(const Tensor& value, const Sizes& z)
      : grad_value(torch::stable::new_empty(value, value.sizes())),
        placed(wide(value, {z.N, z.M, z.L, z.Q, z.K, 2})),
        shares(wide(value, {z.N, z.M, z.L, z.Q, z.K})),
        boxes(wide(value, {z.N, z.M, z.L, (z.Q * z.K + kWarp - 1) / kWarp, 4})) {}

  static Tensor wide(const Tensor& value, std::initializer_list<int64_t> sizes) {
    return torch::stable::new_empty(value, sizes, accumulation_type(value.scalar_type()));
  }
};

template <typename T>
void run_owned(Attention<T>& p, const Sizes& z, const Shapes& shapes, Owned& owned) {
  using A = Wide<T>;
  p.placed = static_cast<A*>(owned.placed.mutable_data_ptr());
  p.shares = static_cast<A*>(owned.shares.mutable_data_ptr());
  Owners<T> owners{};
  set_sizes(owners, z, shapes);
  owners.boxes = static_cast<A*>(owned.boxes.mutable_data_ptr());
  owners.grad_value = static_cast<T*>(owned.grad_value.mutable_data_ptr());
  run_backward(p, owners, Run(owned.grad_value));
}

template <typename Call>
void with_storage(const Tensor& value, const Call& call) {
  switch (value.scalar_type()) {
    case ScalarType::Double: return call(double{});
    case ScalarType::Half: return call(__half{});
    case ScalarType::BFloat16: return call(__nv_bfloat16{});
    default: return call(float{});
  }
}

Tensor multi_scale_deformable_attention(
    const Tensor& value, const Shapes& shapes, const Tensor& locations, const Tensor& weights) {
  const Sizes z = check_plain(value, shapes, locations, weights);
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const Tensor values = packed(value);
  const Tensor points = packed(locations);
  const Tensor attention = packed(weights);
  Tensor output = torch::stable::new_empty(value, {z.N, z.Q, z.M * z.D});
  with_storage(value, [&](auto storage) {
    using T = decltype(storage);
    Attention<T> p = attention_of<T>(z, shapes, values);
    p.points = points.const_data_ptr();
    p.weights = static_cast<const T*>(attention.const_data_ptr());
    p.output = static_cast<T*>(output.mutable_data_ptr());
    run_forward(p, Run(value));
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> multi_scale_deformable_attention_backward(
    const Tensor& grad_output, const Tensor& value, const Shapes& shapes, const Tensor& locations,
    const Tensor& weights) {
  const Sizes z = check_plain(value, shapes, locations, weights);
  check_grad_output(grad_output, value, z);
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const Tensor values = packed(value);
  const Tensor points = packed(locations);
  const Tensor attention = packed(weights);
  const Tensor grad = packed(grad_output);
  Tensor grad_points = torch::stable::new_empty(locations, locations.sizes());
  Tensor grad_weights = torch::stable::new_empty(weights, weights.sizes());
  Owned owned(value, z);
  with_storage(value, [&](auto storage) {
    using T = decltype(storage);
    Attention<T> p = attention_of<T>(z, shapes, values);
    p.points = points.const_data_ptr();
    p.weights = static_cast<const T*>(attention.const_data_ptr());
    p.grad_output = static_cast<const T*>(grad.const_data_ptr());
    p.grad_points = grad_points.mutable_data_ptr();
    p.grad_weights = static_cast<T*>(grad_weights.mutable_data_ptr());
    run_owned(p, z, shapes, owned);
  });
  return {owned.grad_value, grad_points, grad_weights};
}

Tensor fused_deformable_attention(
    const Tensor& value, const Shapes& shapes, const Tensor& reference_points,
    const Tensor& offsets, const Tensor& logits) {
  const Sizes z = check_fused(value, shapes, reference_points, offsets, logits);
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const Tensor values = packed(value);
  const Tensor reference = packed(reference_points);
  const Tensor points = packed(offsets);
  const Tensor weights = packed(logits);
  Tensor output = torch::stable::new_empty(value, {z.N, z.Q, z.M * z.D});
  with_storage(value, [&](auto storage) {
    using T = decltype(storage);
    Attention<T> p = attention_of<T>(z, shapes, values);
    p.reference = static_cast<const Wide<T>*>(reference.const_data_ptr());
    p.points = points.const_data_ptr();
    p.weights = static_cast<const T*>(weights.const_data_ptr());
    p.output = static_cast<T*>(output.mutable_data_ptr());
    run_forward(p, Run(value));
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_deformable_attention_backward(
    const Tensor& grad_output, const Tensor& value, const Shapes& shapes,
    const Tensor& reference_points, const Tensor& offsets, const Tensor& logits,
    bool reference_gradient) {
  const Sizes z = check_fused(value, shapes, reference_points, offsets, logits);
  check_grad_output(grad_output, value, z);
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const Tensor values = packed(value);
  const Tensor reference = packed(reference_points);
  const Tensor points = packed(offsets);
  const Tensor weights = packed(logits);
  const Tensor grad = packed(grad_output);
  Tensor grad_points = torch::stable::new_empty(offsets, offsets.sizes());
  Tensor grad_weights = torch::stable::new_empty(logits, logits.sizes());
  Tensor parts = torch::stable::new_empty(
      reference_points, {reference_gradient ? z.N : 0, z.Q, z.M, z.L, z.R});
  Owned owned(value, z);
  with_storage(value, [&](auto storage) {
    using T = decltype(storage);
    Attention<T> p = attention_of<T>(z, shapes, values);
    p.reference = static_cast<const Wide<T>*>(reference.const_data_ptr());
    p.points = points.const_data_ptr();
    p.weights = static_cast<const T*>(weights.const_data_ptr());
    p.grad_output = static_cast<const T*>(grad.const_data_ptr());
    p.grad_points = grad_points.mutable_data_ptr();
    p.grad_weights = static_cast<T*>(grad_weights.mutable_data_ptr());
    if (reference_gradient)
      p.reference_parts = static_cast<Wide<T>*>(parts.mutable_data_ptr());
    run_owned(p, z, shapes, owned);
  });
  const std::vector<int64_t> heads{2};
  Tensor grad_reference = reference_gradient
      ? torch::stable::sum(parts, torch::headeronly::IntHeaderOnlyArrayRef(heads))
      : torch::stable::new_empty(reference_points, {0});
  return {owned.grad_value, grad_reference, grad_points, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CUDA, library) {
  library.impl(
      "multi_scale_deformable_attention", TORCH_BOX(&multi_scale_deformable_attention));
  library.impl(
      "multi_scale_deformable_attention_backward",
      TORCH_BOX(&multi_scale_deformable_attention_backward));
  library.impl("fused_deformable_attention", TORCH_BOX(&fused_deformable_attention));
  library.impl(
      "fused_deformable_attention_backward", TORCH_BOX(&fused_deformable_attention_backward));
}

}  // namespace cuda_ops
