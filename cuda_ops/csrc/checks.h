// What both devices' kernels rely on, checked before any pointer is used.
//
// ops.py reports a caller's mistakes first, as ValueError; these guard calls that reach
// torch.ops.cuda_ops directly, where a wrong shape would read foreign memory.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

namespace cuda_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kExact = int64_t{1} << 24;  // float32 counts exactly up to here

struct Sizes {
  int64_t N, S, M, D, Q, L, K;
  int64_t R;  // numbers in a reference point: 2 or 4; 0 without reference points
};

inline std::string shape_text(const int64_t* sizes, int64_t dim) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < dim; ++i) text << (i ? ", " : "") << sizes[i];
  text << "]";
  return text.str();
}

inline void check_shape(
    const char* name, const Tensor& tensor, std::initializer_list<int64_t> expected) {
  const auto sizes = tensor.sizes();
  bool equal = sizes.size() == expected.size();
  size_t i = 0;
  for (const int64_t size : expected) {
    equal = equal && sizes[i] == size;
    ++i;
  }
  STD_TORCH_CHECK(
      equal, name, " has shape ", shape_text(sizes.data(), sizes.size()), ", expected ",
      shape_text(expected.begin(), expected.size()));
}

inline ScalarType accumulation_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_type(const char* name, const Tensor& tensor, ScalarType expected) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == expected, name, " has dtype ",
      torch::headeronly::toString(tensor.scalar_type()), ", expected ",
      torch::headeronly::toString(expected));
}

inline void check_value(
    const Tensor& value, const std::vector<int64_t>& spatial_shapes, int64_t levels) {
  const ScalarType type = value.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::Half ||
          type == ScalarType::BFloat16,
      "value has dtype ", torch::headeronly::toString(type),
      ", expected float64, float32, float16 or bfloat16");
  STD_TORCH_CHECK(value.dim() == 4, "value has ", value.dim(), " dimensions, expected [N, S, M, D]");
  STD_TORCH_CHECK(
      levels >= 1 && spatial_shapes.size() == static_cast<size_t>(2 * levels),
      "spatial_shapes has ", spatial_shapes.size(), " numbers, expected (h, w) for ", levels,
      " levels");
  // Heights and widths go through float32.
  int64_t tokens = 0, bordered = 0;
  for (size_t i = 0; i < spatial_shapes.size(); i += 2) {
    const int64_t height = spatial_shapes[i], width = spatial_shapes[i + 1];
    STD_TORCH_CHECK(
        height >= 1 && width >= 1 && height < kExact && width < kExact,
        "spatial_shapes holds (", height, ", ", width, "), expected sizes of 1 to ", kExact - 1);
    tokens += height * width;
    // Kernels number the pixels of an image, and the CPU's those of its border, in 32 bits.
    bordered += (height + 2) * (width + 2);
    STD_TORCH_CHECK(
        bordered <= std::numeric_limits<int32_t>::max(), "spatial_shapes covers ", bordered,
        " or more tokens with a border of one, expected less than 2^31");
  }
  STD_TORCH_CHECK(
      value.size(1) == tokens, "value has ", value.size(1), " tokens, expected ", tokens,
      " from spatial_shapes");
}

inline void check_same_device(const char* name, const Tensor& tensor, const Tensor& value) {
  STD_TORCH_CHECK(
      tensor.is_cuda() == value.is_cuda() && tensor.get_device_index() == value.get_device_index(),
      name, " is on another device than value");
}

// The upper bounds keep the bytes of a head's slice within 64 bits, for any tokens that
// check_value lets through: expanded tensors claim sizes that no memory has.
inline void check_counts(const Sizes& z) {
  STD_TORCH_CHECK(
      z.D >= 1 && z.M >= 1 && z.K >= 1, "M, D and K must be at least 1, got M = ", z.M,
      ", D = ", z.D, ", K = ", z.K);
  STD_TORCH_CHECK(
      z.D < kExact && z.L * z.K < kExact, "got D = ", z.D, " and L * K = ", z.L * z.K,
      ", expected less than ", kExact, " each");
}

inline Sizes check_plain(
    const Tensor& value, const std::vector<int64_t>& spatial_shapes, const Tensor& locations,
    const Tensor& weights) {
  STD_TORCH_CHECK(
      locations.dim() == 6, "sampling_locations has ", locations.dim(),
      " dimensions, expected [N, Q, M, L, K, 2]");
  check_value(value, spatial_shapes, locations.size(3));
  const Sizes z{value.size(0),     value.size(1),     value.size(2), value.size(3),
                locations.size(1), locations.size(3), locations.size(4), 0};
  check_counts(z);
  check_shape("sampling_locations", locations, {z.N, z.Q, z.M, z.L, z.K, 2});
  check_shape("attention_weights", weights, {z.N, z.Q, z.M, z.L, z.K});
  check_type("sampling_locations", locations, accumulation_type(value.scalar_type()));
  check_type("attention_weights", weights, value.scalar_type());
  check_same_device("sampling_locations", locations, value);
  check_same_device("attention_weights", weights, value);
  return z;
}

inline Sizes check_fused(
    const Tensor& value, const std::vector<int64_t>& spatial_shapes, const Tensor& reference,
    const Tensor& offsets, const Tensor& logits) {
  STD_TORCH_CHECK(
      offsets.dim() == 6, "sampling_offsets has ", offsets.dim(),
      " dimensions, expected [N, Q, M, L, K, 2]");
  STD_TORCH_CHECK(
      reference.dim() == 4 && (reference.size(3) == 2 || reference.size(3) == 4),
      "reference_points has shape ", shape_text(reference.sizes().data(), reference.dim()),
      ", expected [N, Q, L, 2] or [N, Q, L, 4]");
  check_value(value, spatial_shapes, offsets.size(3));
  const Sizes z{value.size(0),   value.size(1),   value.size(2),   value.size(3),
                offsets.size(1), offsets.size(3), offsets.size(4), reference.size(3)};
  check_counts(z);
  check_shape("reference_points", reference, {z.N, z.Q, z.L, z.R});
  check_shape("sampling_offsets", offsets, {z.N, z.Q, z.M, z.L, z.K, 2});
  check_shape("attention_logits", logits, {z.N, z.Q, z.M, z.L * z.K});
  check_type("reference_points", reference, accumulation_type(value.scalar_type()));
  check_type("sampling_offsets", offsets, value.scalar_type());
  check_type("attention_logits", logits, value.scalar_type());
  check_same_device("reference_points", reference, value);
  check_same_device("sampling_offsets", offsets, value);
  check_same_device("attention_logits", logits, value);
  return z;
}

inline void check_grad_output(const Tensor& grad_output, const Tensor& value, const Sizes& z) {
  check_shape("grad_output", grad_output, {z.N, z.Q, z.M * z.D});
  check_type("grad_output", grad_output, value.scalar_type());
  check_same_device("grad_output", grad_output, value);
}

}  // namespace cuda_ops
