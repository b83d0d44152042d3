// The CPU kernels' interface: plain pointers and sizes, so that kernels.cpp can be compiled for
// several instruction sets without sharing a single inline function between them.
#pragma once

#include <cstdint>

namespace cuda_ops {

// Storage types; sums and coordinates are float, and double for kDouble.
enum StorageType { kFloat, kDouble, kHalf, kBFloat16, kStorageTypes };

struct Problem {
  int64_t N, S, M, D, Q, L, K;
  int64_t R;                   // numbers in a reference point (2 or 4); 0: locations are given
  const int64_t* shapes;       // (h, w) per level
  const void* value;           // [N, S, M, D] with the strides below
  int64_t value_strides[4];
  const void* points;          // [N, Q, M, L, K, 2]: offsets, or with R = 0 locations (wide type)
  const void* weights;         // [N, Q, M, L * K]: logits, or with R = 0 attention weights
  const void* reference;       // [N, Q, L, R] (wide type)
  void* output;                // [N, Q, M, D]

  const void* grad_output;     // [N, Q, M, D]
  void* grad_value;            // [N, S, M, D]
  void* grad_points;           // as points
  void* grad_weights;          // as weights
  void* grad_reference;        // as reference, or null
  void* weight_dots;           // scratch [N, Q, M, L * K] (wide type) if levels are split, R > 0
  void* reference_parts;       // scratch [N, Q, M, L, R] (wide type), or null
};

// Forward and scatter work on a copy of the slice of `value` that belongs to one (image, head).
// However the work is split into tasks, every sum is taken by one task in one order, so results do
// not depend on the number of threads. Slices and scratch are 64-byte aligned.
struct Kernels {
  const char* name;
  int64_t (*slice_bytes)(const Problem&);
  int64_t (*forward_scratch_bytes)(const Problem&);
  int64_t (*scatter_scratch_bytes)(const Problem&);
  int64_t (*finish_scratch_bytes)(const Problem&);
  // Copies levels [l0, l1) into their place in the slice.
  void (*pack)(const Problem&, int64_t n, int64_t m, int64_t l0, int64_t l1, void* slice);
  // Outputs of queries [q0, q1) from a whole slice.
  void (*forward)(
      const Problem&, int64_t n, int64_t m, int64_t q0, int64_t q1, const void* slice,
      void* scratch);
  // Gradients over levels [l0, l1) and all queries: of value, points and (R = 0, or all levels)
  // weights; of weights else only the dots with grad_output, for `finish`.
  void (*scatter)(const Problem&, int64_t n, int64_t m, int64_t l0, int64_t l1, void* scratch);
  // For queries [q0, q1), from what scatter left: the gradients of logits where levels were split,
  // and of reference points.
  void (*finish)(const Problem&, int64_t n, int64_t q0, int64_t q1, void* scratch);
};

// One table per instruction set that the compiler could build for; see dispatch.cpp.
const Kernels* baseline_kernels(StorageType type);
const Kernels* avx2_kernels(StorageType type);
const Kernels* avx512_kernels(StorageType type);

// The best table that this machine can run. CUDA_OPS_CPU=baseline|avx2|avx512 asks for a lesser
// one, for tests and measurements.
const Kernels& kernels_for(StorageType type);

}  // namespace cuda_ops
