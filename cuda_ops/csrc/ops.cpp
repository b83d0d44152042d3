// The operators' schemas, declared once for every device.
//
// `spatial_shapes` is flat: (h_0, w_0, h_1, w_1, ...). Every sum is taken in a fixed order, so no
// operator has to know of torch's deterministic mode.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(cuda_ops, library) {
  library.def(
      "multi_scale_deformable_attention(Tensor value, SymInt[] spatial_shapes, "
      "Tensor sampling_locations, Tensor attention_weights) -> Tensor");
  library.def(
      "multi_scale_deformable_attention_backward(Tensor grad_output, Tensor value, "
      "SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights) "
      "-> (Tensor, Tensor, Tensor)");
  library.def(
      "fused_deformable_attention(Tensor value, SymInt[] spatial_shapes, Tensor reference_points, "
      "Tensor sampling_offsets, Tensor attention_logits) -> Tensor");
  library.def(
      "fused_deformable_attention_backward(Tensor grad_output, Tensor value, "
      "SymInt[] spatial_shapes, Tensor reference_points, Tensor sampling_offsets, "
      "Tensor attention_logits, bool reference_gradient) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}
