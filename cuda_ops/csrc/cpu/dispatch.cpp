// Chooses the kernels for the machine that runs, not for the one that compiled: a cluster's nodes
// may share one binary.
#include "kernels.h"

#include <cstdlib>
#include <cstring>

namespace cuda_ops {
namespace {

using Table = const Kernels* (*)(StorageType);

Table choose() {
  const char* asked = std::getenv("CUDA_OPS_CPU");
  const auto wanted = [asked](const char* name) {
    return asked == nullptr || std::strcmp(asked, name) == 0;
  };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && wanted("avx512")) return avx512_kernels;
  if (avx2 && wanted("avx2")) return avx2_kernels;
#else
  (void)wanted;
#endif
  return baseline_kernels;
}

}  // namespace

const Kernels& kernels_for(StorageType type) {
  static const Table table = choose();
  return *table(type);
}

}  // namespace cuda_ops

// For `python -m cuda_ops benchmark`, which calls it through ctypes: the name of the set in use.
extern "C" __attribute__((visibility("default"))) const char* cuda_ops_instruction_set() {
  return cuda_ops::kernels_for(cuda_ops::kFloat).name;
}
