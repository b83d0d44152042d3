// Both operators on CUDA: kernels from the phases of phases.h, and the tensors around them.
#include "../checks.h"
#include "phases.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <cuda_runtime.h>

#include <optional>
#include <tuple>

namespace cuda_ops {
namespace {

using Shapes = std::vector<int64_t>;

template <typename A>
__device__ Shared<A> shared_memory(int64_t points, int rows, int lanes) {
  extern __shared__ __align__(16) unsigned char memory[];
  return {reinterpret_cast<A*>(memory), points, rows, lanes};
}

struct AtomicAdd {
  template <typename A, int C>
  __device__ __forceinline__ void operator()(A* address, const A (&amounts)[C]) const {
#if __CUDA_ARCH__ >= 900
    if constexpr (sizeof(A) == 4 && C % 4 == 0) {
      for (int c = 0; c < C; c += 4)
        atomicAdd(
            reinterpret_cast<float4*>(address + c),
            make_float4(amounts[c], amounts[c + 1], amounts[c + 2], amounts[c + 3]));
      return;
    }
#endif
    for (int c = 0; c < C; ++c) atomicAdd(address + c, amounts[c]);
  }
};

template <typename T, int C>
__global__ void forward_kernel(const __grid_constant__ Attention<T> p) {
  const auto shared = shared_memory<Wide<T>>(p.row_points(), p.rows, p.lanes);
  place_points(p, shared, blockIdx.x, threadIdx.x);
  __syncthreads();
  softmax_rows(p, shared, blockIdx.x, threadIdx.x);
  __syncthreads();
  gather_rows<T, C>(p, shared, blockIdx.x, threadIdx.x);
}

template <typename T, int C>
__global__ void backward_kernel(const __grid_constant__ Attention<T> p) {
  const auto shared = shared_memory<Wide<T>>(p.row_points(), p.rows, p.lanes);
  place_points(p, shared, blockIdx.x, threadIdx.x);
  __syncthreads();
  softmax_rows(p, shared, blockIdx.x, threadIdx.x);
  __syncthreads();
  if (p.placed != nullptr) keep_points(p, shared, blockIdx.x, threadIdx.x);
  __syncthreads();
  for (int64_t chunk = 0; chunk < p.row_points(); chunk += kChunk) {
    scatter_rows<T, C>(p, shared, blockIdx.x, threadIdx.x, chunk, AtomicAdd{});
    __syncthreads();
    sum_lanes(p, shared, blockIdx.x, threadIdx.x, chunk);
    __syncthreads();
  }
  mean_dots(p, shared, blockIdx.x, threadIdx.x);
  __syncthreads();
  finish_rows(p, shared, blockIdx.x, threadIdx.x);
}

template <typename T>
__global__ void owners_kernel(const __grid_constant__ Owners<T> p) {
  extern __shared__ __align__(16) unsigned char memory[];
  Wide<T>* sums = reinterpret_cast<Wide<T>*>(memory);
  const int lane = threadIdx.x;
  const Owned<T> mine = owned_by(p, blockIdx.x);
  clear_owned(p, mine, lane, sums);
  __syncwarp();
  // A channel's sums belong to one lane throughout, so nothing else has to be waited for.
  for (int64_t first = 0; first < p.Q * p.K; first += kWarp) {
    unsigned hits = __ballot_sync(0xffffffffu, touches_owned(p, mine, first + lane));
    for (; hits != 0; hits &= hits - 1)
      add_point(p, mine, first + __ffs(static_cast<int>(hits)) - 1, lane, sums);
  }
  __syncwarp();
  store_owned(p, mine, lane, sums);
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

unsigned grid_of(int64_t blocks) {
  STD_TORCH_CHECK(
      blocks <= std::numeric_limits<int32_t>::max(), "the call needs ", blocks,
      " CUDA blocks, expected less than 2^31; split the batch");
  return static_cast<unsigned>(blocks);
}

Levels levels_of(const Sizes& z, const Shapes& shapes) {
  STD_TORCH_CHECK(z.L <= kMaxLevels, "got ", z.L, " levels, expected at most ", kMaxLevels);
  Levels levels{};
  int32_t start = 0;
  for (int64_t l = 0; l < z.L; ++l) {
    levels.height[l] = static_cast<int32_t>(shapes[2 * l]);
    levels.width[l] = static_cast<int32_t>(shapes[2 * l + 1]);
    levels.start[l] = start;
    start += levels.height[l] * levels.width[l];
  }
  return levels;
}

template <typename T>
Attention<T> attention_of(const Sizes& z, const Shapes& shapes, const Tensor& value) {
  Attention<T> p{};
  p.N = z.N, p.S = z.S, p.M = z.M, p.D = z.D, p.Q = z.Q, p.L = z.L, p.K = z.K, p.R = z.R;
  p.levels = levels_of(z, shapes);
  p.value = static_cast<const T*>(value.const_data_ptr());
  return p;
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Divides the rows over blocks and hands `launch` the number of channels of one load: 16 bytes
// where every head begins at a multiple of that, else a single channel.
template <typename T, typename Launch>
void launch_rows(Attention<T>& p, bool backward, const Launch& launch) {
  constexpr int kVector = 16 / sizeof(T);
  const void* other = backward ? static_cast<const void*>(p.grad_output) : p.output;
  const bool vectors = p.D % kVector == 0 && aligned(p.value) && aligned(other);
  divide_rows(p, vectors ? kVector : 1, backward);
  const int64_t bytes = Shared<Wide<T>>::numbers(p.row_points(), p.rows, p.lanes, backward) *
                        static_cast<int64_t>(sizeof(Wide<T>));
  STD_TORCH_CHECK(
      bytes <= kSharedBytes, "L * K = ", p.row_points(), " points need ", bytes,
      " bytes of shared memory, expected at most ", kSharedBytes);
  if (p.row_count() == 0) return;
  const unsigned grid = grid_of(p.blocks());
  if (vectors) {
    launch(std::integral_constant<int, kVector>{}, grid, p.threads(), bytes);
  } else {
    launch(std::integral_constant<int, 1>{}, grid, p.threads(), bytes);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void run_forward(Attention<T>& p, cudaStream_t stream) {
  launch_rows(p, false, [&](auto channels, unsigned grid, int threads, int64_t bytes) {
    forward_kernel<T, decltype(channels)::value><<<grid, threads, bytes, stream>>>(p);
  });
}

template <typename T>
void run_backward(Attention<T>& p, cudaStream_t stream) {
  launch_rows(p, true, [&](auto channels, unsigned grid, int threads, int64_t bytes) {
    backward_kernel<T, decltype(channels)::value><<<grid, threads, bytes, stream>>>(p);
  });
}

template <typename T>
void run_owners(const Attention<T>& attention, T* grad_value, cudaStream_t stream) {
  Owners<T> p{};
  p.N = attention.N, p.S = attention.S, p.M = attention.M, p.D = attention.D;
  p.Q = attention.Q, p.L = attention.L, p.K = attention.K;
  p.levels = attention.levels;
  p.grad_output = attention.grad_output;
  p.placed = attention.placed;
  p.grad_value = grad_value;
  divide_tokens(p);
  if (p.blocks() == 0) return;
  const int64_t bytes = p.strip * p.D * static_cast<int64_t>(sizeof(Wide<T>));
  STD_TORCH_CHECK(
      bytes <= kSharedBytes, "D = ", p.D, " channels need ", bytes,
      " bytes of shared memory, expected at most ", kSharedBytes);
  owners_kernel<T><<<grid_of(p.blocks()), kWarp, bytes, stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename Call>
auto with_storage(const Tensor& value, const Call& call) {
  switch (value.scalar_type()) {
    case ScalarType::Double: return call(double{});
    case ScalarType::Half: return call(__half{});
    case ScalarType::BFloat16: return call(__nv_bfloat16{});
    default: return call(float{});
  }
}

// The gradient of value in its two forms: filled by atomics in wide numbers and then converted,
// or written once, in its own type, by the owners.
struct ValueGradient {
  const Tensor& value;
  bool deterministic;
  Tensor memory;
  std::optional<Tensor> placed;

  ValueGradient(const Tensor& value, const Sizes& z, bool deterministic)
      : value(value),
        deterministic(deterministic),
        memory(
            deterministic ? torch::stable::new_empty(value, value.sizes())
                          : torch::stable::new_zeros(
                                value, value.sizes(), accumulation_type(value.scalar_type()))) {
    if (deterministic)
      placed = torch::stable::new_empty(
          value, {z.N, z.Q, z.M, z.L * z.K, 3}, accumulation_type(value.scalar_type()));
  }

  template <typename T>
  void run(Attention<T>& p, cudaStream_t stream) {
    if (deterministic) {
      p.placed = static_cast<Wide<T>*>(placed->mutable_data_ptr());
      run_backward(p, stream);
      run_owners(p, static_cast<T*>(memory.mutable_data_ptr()), stream);
    } else {
      p.grad_value = static_cast<Wide<T>*>(memory.mutable_data_ptr());
      run_backward(p, stream);
    }
  }

  Tensor result() const { return torch::stable::to(memory, value.scalar_type()); }
};

Tensor multi_scale_deformable_attention(
    const Tensor& value, const Shapes& shapes, const Tensor& locations, const Tensor& weights) {
  const Sizes z = check_plain(value, shapes, locations, weights);
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const Tensor values = torch::stable::contiguous(value);
  const Tensor points = torch::stable::contiguous(locations);
  const Tensor attention = torch::stable::contiguous(weights);
  Tensor output = torch::stable::new_empty(value, {z.N, z.Q, z.M * z.D});
  with_storage(value, [&](auto storage) {
    using T = decltype(storage);
    Attention<T> p = attention_of<T>(z, shapes, values);
    p.points = points.const_data_ptr();
    p.weights = static_cast<const T*>(attention.const_data_ptr());
    p.output = static_cast<T*>(output.mutable_data_ptr());
    run_forward(p, current_stream(value));
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> multi_scale_deformable_attention_backward(
    const Tensor& grad_output, const Tensor& value, const Shapes& shapes, const Tensor& locations,
    const Tensor& weights, bool deterministic) {
  const Sizes z = check_plain(value, shapes, locations, weights);
  check_grad_output(grad_output, value, z);
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const Tensor values = torch::stable::contiguous(value);
  const Tensor points = torch::stable::contiguous(locations);
  const Tensor attention = torch::stable::contiguous(weights);
  const Tensor grad = torch::stable::contiguous(grad_output);
  Tensor grad_points = torch::stable::new_empty(locations, locations.sizes());
  Tensor grad_weights = torch::stable::new_empty(weights, weights.sizes());
  ValueGradient grad_value(value, z, deterministic);
  with_storage(value, [&](auto storage) {
    using T = decltype(storage);
    Attention<T> p = attention_of<T>(z, shapes, values);
    p.points = points.const_data_ptr();
    p.weights = static_cast<const T*>(attention.const_data_ptr());
    p.grad_output = static_cast<const T*>(grad.const_data_ptr());
    p.grad_points = grad_points.mutable_data_ptr();
    p.grad_weights = static_cast<T*>(grad_weights.mutable_data_ptr());
    grad_value.run(p, current_stream(value));
  });
  return {grad_value.result(), grad_points, grad_weights};
}

Tensor fused_deformable_attention(
    const Tensor& value, const Shapes& shapes, const Tensor& reference_points,
    const Tensor& offsets, const Tensor& logits) {
  const Sizes z = check_fused(value, shapes, reference_points, offsets, logits);
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const Tensor values = torch::stable::contiguous(value);
  const Tensor reference = torch::stable::contiguous(reference_points);
  const Tensor points = torch::stable::contiguous(offsets);
  const Tensor weights = torch::stable::contiguous(logits);
  Tensor output = torch::stable::new_empty(value, {z.N, z.Q, z.M * z.D});
  with_storage(value, [&](auto storage) {
    using T = decltype(storage);
    Attention<T> p = attention_of<T>(z, shapes, values);
    p.reference = static_cast<const Wide<T>*>(reference.const_data_ptr());
    p.points = points.const_data_ptr();
    p.weights = static_cast<const T*>(weights.const_data_ptr());
    p.output = static_cast<T*>(output.mutable_data_ptr());
    run_forward(p, current_stream(value));
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_deformable_attention_backward(
    const Tensor& grad_output, const Tensor& value, const Shapes& shapes,
    const Tensor& reference_points, const Tensor& offsets, const Tensor& logits,
    bool reference_gradient, bool deterministic) {
  const Sizes z = check_fused(value, shapes, reference_points, offsets, logits);
  check_grad_output(grad_output, value, z);
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const Tensor values = torch::stable::contiguous(value);
  const Tensor reference = torch::stable::contiguous(reference_points);
  const Tensor points = torch::stable::contiguous(offsets);
  const Tensor weights = torch::stable::contiguous(logits);
  const Tensor grad = torch::stable::contiguous(grad_output);
  Tensor grad_points = torch::stable::new_empty(offsets, offsets.sizes());
  Tensor grad_weights = torch::stable::new_empty(logits, logits.sizes());
  Tensor parts = torch::stable::new_empty(
      reference_points, {reference_gradient ? z.N : 0, z.Q, z.M, z.L, z.R});
  ValueGradient grad_value(value, z, deterministic);
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
    grad_value.run(p, current_stream(value));
  });
  const std::vector<int64_t> heads{2};
  Tensor grad_reference = reference_gradient
      ? torch::stable::sum(parts, torch::headeronly::IntHeaderOnlyArrayRef(heads))
      : torch::stable::new_empty(reference_points, {0});
  return {grad_value.result(), grad_reference, grad_points, grad_weights};
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
