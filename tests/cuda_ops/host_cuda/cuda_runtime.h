// A GPU's block on the CPU, enough of it to run the attention kernels as they are: every thread is
// a fiber that runs until it has to wait for its warp or block, and who runs next is drawn at
// random, so that a missing barrier shows as a wrong or a changing result. Shared memory starts
// out as NaN. What this cannot see: time, registers, and accesses that a GPU would tear apart.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint4 {
  unsigned x, y, z, w;
};
struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx;

namespace host_cuda {

constexpr int kLanes = 32;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "host_cuda: %s\n", what);
  std::abort();
}

enum class State { kReady, kAtWarp, kAtBlock, kDone };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state = State::kReady;
};

struct Warp {
  uint64_t given[kLanes];  // by the lanes, before the barrier
  uint64_t taken[kLanes];  // by the lanes, after it
};

struct Block {
  ucontext_t scheduler;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  unsigned running = 0;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
};
inline Block block;
inline std::mt19937 order;

inline void enter() {
  block.body(block.argument);
  block.threads[block.running].state = State::kDone;
  swapcontext(&block.threads[block.running].context, &block.scheduler);
}

inline void wait(State state) {
  Thread& thread = block.threads[block.running];
  thread.state = state;
  swapcontext(&thread.context, &block.scheduler);
}

// A warp goes on when all 32 lanes wait for it: leaving some behind is an error on a GPU, too.
inline void release_warps() {
  for (size_t w = 0; w < block.warps.size(); ++w) {
    int waiting = 0, done = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      const State state = block.threads[w * kLanes + lane].state;
      waiting += state == State::kAtWarp;
      done += state == State::kDone;
    }
    if (waiting > 0 && done > 0) fail("a lane left before its warp's barrier");
    if (waiting < kLanes) continue;
    std::memcpy(block.warps[w].taken, block.warps[w].given, sizeof(block.warps[w].given));
    for (int lane = 0; lane < kLanes; ++lane)
      block.threads[w * kLanes + lane].state = State::kReady;
  }
}

inline void release_block() {
  for (const Thread& thread : block.threads) {
    if (thread.state == State::kReady || thread.state == State::kAtWarp) return;
  }
  for (Thread& thread : block.threads) {
    if (thread.state == State::kAtBlock) thread.state = State::kReady;
  }
}

inline void run_block(unsigned threads, void (*body)(void*), void* argument) {
  constexpr size_t kStack = 128 * 1024;
  block.threads.resize(threads);
  block.warps.assign(threads / kLanes, Warp{});
  block.body = body;
  block.argument = argument;
  for (Thread& thread : block.threads) {
    if (!thread.stack) thread.stack = std::make_unique<char[]>(kStack);
    thread.state = State::kReady;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
  }
  std::vector<unsigned> ready;
  while (true) {
    ready.clear();
    bool all_done = true;
    for (unsigned i = 0; i < threads; ++i) {
      if (block.threads[i].state == State::kReady) ready.push_back(i);
      all_done = all_done && block.threads[i].state == State::kDone;
    }
    if (all_done) return;
    if (ready.empty()) fail("every thread waits");
    std::shuffle(ready.begin(), ready.end(), order);
    for (const unsigned i : ready) {
      block.running = threadIdx.x = i;
      swapcontext(&block.scheduler, &block.threads[i].context);
    }
    release_warps();
    release_block();
  }
}

template <typename T>
T exchange(T mine, int from) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Warp& warp = block.warps[block.running / kLanes];
  std::memcpy(&warp.given[block.running % kLanes], &mine, sizeof(T));
  wait(State::kAtWarp);
  T theirs;
  std::memcpy(&theirs, &warp.taken[from], sizeof(T));
  return theirs;
}

}  // namespace host_cuda

inline void __syncwarp() { host_cuda::wait(host_cuda::State::kAtWarp); }
inline void __syncthreads() { host_cuda::wait(host_cuda::State::kAtBlock); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T mine, int other) {
  if (mask != 0xffffffffu) host_cuda::fail("part of a warp");
  return host_cuda::exchange(mine, static_cast<int>(threadIdx.x % 32) ^ other);
}

inline unsigned __ballot_sync(unsigned mask, bool mine) {
  if (mask != 0xffffffffu) host_cuda::fail("part of a warp");
  host_cuda::exchange(mine, 0);
  unsigned votes = 0;
  const auto& warp = host_cuda::block.warps[host_cuda::block.running / 32];
  for (int lane = 0; lane < 32; ++lane) votes |= static_cast<unsigned>(warp.taken[lane] & 1) << lane;
  return votes;
}

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

template <typename To, typename From>
To host_cuda_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline float __uint_as_float(unsigned x) { return host_cuda_bits<float>(x); }
inline double __hiloint2double(int high, int low) {
  return host_cuda_bits<double>(uint64_t{static_cast<uint32_t>(high)} << 32 |
                                static_cast<uint32_t>(low));
}
