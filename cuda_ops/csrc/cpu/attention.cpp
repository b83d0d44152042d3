// Both operators on the CPU: tensors in, tasks out to torch's threads, kernels.h does the work.
#include "../checks.h"
#include "kernels.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <new>
#include <numeric>
#include <tuple>

namespace cuda_ops {
namespace {

using Shapes = std::vector<int64_t>;

constexpr int64_t kRows = 64;  // queries that are worth a task

StorageType storage_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return kDouble;
    case ScalarType::Half: return kHalf;
    case ScalarType::BFloat16: return kBFloat16;
    default: return kFloat;
  }
}

Problem problem_of(const Sizes& z, const Tensor& value, const Shapes& shapes) {
  Problem p{};
  p.N = z.N, p.S = z.S, p.M = z.M, p.D = z.D, p.Q = z.Q, p.L = z.L, p.K = z.K, p.R = z.R;
  p.shapes = shapes.data();
  p.value = value.const_data_ptr();
  std::copy_n(value.strides().data(), 4, p.value_strides);
  return p;
}

class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : memory_(::operator new(static_cast<size_t>(bytes), kAlignment)) {}
  ~Scratch() { ::operator delete(memory_, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() const { return memory_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  void* memory_;
};

// Into how many parts each head's work is best split so that all threads have as much to do.
int64_t parts_per_head(int64_t heads) {
  const int64_t threads = torch::stable::get_num_threads();
  return heads >= 4 * threads ? 1 : threads / std::gcd(heads, threads);
}

void run_forward(const Problem& p, const Kernels& kernels) {
  const int64_t heads = p.N * p.M;
  if (heads == 0 || p.Q == 0) return;
  const int64_t slice_bytes = kernels.slice_bytes(p);
  const int64_t scratch_bytes = kernels.forward_scratch_bytes(p);
  const int64_t parts = std::min(parts_per_head(heads), (p.Q + kRows - 1) / kRows);
  if (parts == 1) {
    // A head's slice stays in the cache of the core that packed it.
    torch::stable::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
      const Scratch slice(slice_bytes), scratch(scratch_bytes);
      for (int64_t head = begin; head < end; ++head) {
        kernels.pack(p, head / p.M, head % p.M, 0, p.L, slice.get());
        kernels.forward(p, head / p.M, head % p.M, 0, p.Q, slice.get(), scratch.get());
      }
    });
    return;
  }
  const Scratch slices(heads * slice_bytes);
  const auto slice = [&](int64_t head) {
    return static_cast<char*>(slices.get()) + head * slice_bytes;
  };
  torch::stable::parallel_for(0, heads * p.L, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / p.L, level = task % p.L;
      kernels.pack(p, head / p.M, head % p.M, level, level + 1, slice(head));
    }
  });
  torch::stable::parallel_for(0, heads * parts, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(scratch_bytes);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / parts, part = task % parts;
      kernels.forward(
          p, head / p.M, head % p.M, p.Q * part / parts, p.Q * (part + 1) / parts, slice(head),
          scratch.get());
    }
  });
}

// Levels are independent of each other in the backward, so they become tasks of their own where
// that shortens the longest thread's work, although a head costs a quarter more in levels.
bool splits_levels(const Sizes& z) {
  const int64_t threads = torch::stable::get_num_threads(), heads = z.N * z.M;
  const auto longest = [threads](int64_t tasks) { return (tasks + threads - 1) / threads; };
  return 5 * longest(heads * z.L) < 4 * z.L * longest(heads);
}

void run_backward(const Problem& p, const Kernels& kernels, bool split) {
  const int64_t heads = p.N * p.M;
  if (heads == 0) return;
  const int64_t groups = split ? p.L : 1;
  const int64_t bytes = kernels.scatter_scratch_bytes(p);
  torch::stable::parallel_for(0, heads * groups, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(bytes);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / groups, group = task % groups;
      kernels.scatter(
          p, head / p.M, head % p.M, p.L * group / groups, p.L * (group + 1) / groups,
          scratch.get());
    }
  });
  if (p.weight_dots == nullptr && p.reference_parts == nullptr) return;
  const int64_t parts = (p.Q + kRows - 1) / kRows;
  torch::stable::parallel_for(0, p.N * parts, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(kernels.finish_scratch_bytes(p));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t q0 = task % parts * kRows;
      kernels.finish(p, task / parts, q0, std::min(q0 + kRows, p.Q), scratch.get());
    }
  });
}

Tensor multi_scale_deformable_attention(
    const Tensor& value, const Shapes& shapes, const Tensor& locations, const Tensor& weights) {
  const Sizes z = check_plain(value, shapes, locations, weights);
  const Tensor points = torch::stable::contiguous(locations);
  const Tensor attention = torch::stable::contiguous(weights);
  Tensor output = torch::stable::new_empty(value, {z.N, z.Q, z.M * z.D});
  Problem p = problem_of(z, value, shapes);
  p.points = points.const_data_ptr();
  p.weights = attention.const_data_ptr();
  p.output = output.mutable_data_ptr();
  run_forward(p, kernels_for(storage_type(value)));
  return output;
}

std::tuple<Tensor, Tensor, Tensor> multi_scale_deformable_attention_backward(
    const Tensor& grad_output, const Tensor& value, const Shapes& shapes, const Tensor& locations,
    const Tensor& weights) {
  const Sizes z = check_plain(value, shapes, locations, weights);
  check_grad_output(grad_output, value, z);
  const Tensor points = torch::stable::contiguous(locations);
  const Tensor attention = torch::stable::contiguous(weights);
  const Tensor grad = torch::stable::contiguous(grad_output);
  Tensor grad_value = torch::stable::new_empty(value, value.sizes());
  Tensor grad_points = torch::stable::new_empty(locations, locations.sizes());
  Tensor grad_weights = torch::stable::new_empty(weights, weights.sizes());
  Problem p = problem_of(z, value, shapes);
  p.points = points.const_data_ptr();
  p.weights = attention.const_data_ptr();
  p.grad_output = grad.const_data_ptr();
  p.grad_value = grad_value.mutable_data_ptr();
  p.grad_points = grad_points.mutable_data_ptr();
  p.grad_weights = grad_weights.mutable_data_ptr();
  run_backward(p, kernels_for(storage_type(value)), splits_levels(z));
  return {grad_value, grad_points, grad_weights};
}

Tensor fused_deformable_attention(
    const Tensor& value, const Shapes& shapes, const Tensor& reference_points,
    const Tensor& offsets, const Tensor& logits) {
  const Sizes z = check_fused(value, shapes, reference_points, offsets, logits);
  const Tensor reference = torch::stable::contiguous(reference_points);
  const Tensor points = torch::stable::contiguous(offsets);
  const Tensor weights = torch::stable::contiguous(logits);
  Tensor output = torch::stable::new_empty(value, {z.N, z.Q, z.M * z.D});
  Problem p = problem_of(z, value, shapes);
  p.reference = reference.const_data_ptr();
  p.points = points.const_data_ptr();
  p.weights = weights.const_data_ptr();
  p.output = output.mutable_data_ptr();
  run_forward(p, kernels_for(storage_type(value)));
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_deformable_attention_backward(
    const Tensor& grad_output, const Tensor& value, const Shapes& shapes,
    const Tensor& reference_points, const Tensor& offsets, const Tensor& logits,
    bool reference_gradient) {
  const Sizes z = check_fused(value, shapes, reference_points, offsets, logits);
  check_grad_output(grad_output, value, z);
  const ScalarType wide = accumulation_type(value.scalar_type());
  const Tensor reference = torch::stable::contiguous(reference_points);
  const Tensor points = torch::stable::contiguous(offsets);
  const Tensor weights = torch::stable::contiguous(logits);
  const Tensor grad = torch::stable::contiguous(grad_output);
  Tensor grad_value = torch::stable::new_empty(value, value.sizes());
  Tensor grad_points = torch::stable::new_empty(offsets, offsets.sizes());
  Tensor grad_weights = torch::stable::new_empty(logits, logits.sizes());
  const bool split = splits_levels(z);
  Tensor weight_dots =
      torch::stable::new_empty(value, {split ? z.N : 0, z.Q, z.M, z.L * z.K}, wide);
  Tensor grad_reference = reference_gradient
      ? torch::stable::new_empty(reference_points, reference_points.sizes())
      : torch::stable::new_empty(reference_points, {0});
  Tensor reference_parts = torch::stable::new_empty(
      reference_points, {reference_gradient ? z.N : 0, z.Q, z.M, z.L, z.R});

  Problem p = problem_of(z, value, shapes);
  p.reference = reference.const_data_ptr();
  p.points = points.const_data_ptr();
  p.weights = weights.const_data_ptr();
  p.grad_output = grad.const_data_ptr();
  p.grad_value = grad_value.mutable_data_ptr();
  p.grad_points = grad_points.mutable_data_ptr();
  p.grad_weights = grad_weights.mutable_data_ptr();
  if (split) p.weight_dots = weight_dots.mutable_data_ptr();
  if (reference_gradient) {
    p.grad_reference = grad_reference.mutable_data_ptr();
    p.reference_parts = reference_parts.mutable_data_ptr();
  }
  run_backward(p, kernels_for(storage_type(value)), split);
  return {grad_value, grad_reference, grad_points, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cuda_ops, CPU, library) {
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
