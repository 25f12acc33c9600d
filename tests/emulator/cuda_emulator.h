// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on a CPU, for tests alone. Each thread of a block is a fiber; blocks run one after the other.
//
// What it shows: indexing, masks, tails, reductions, and barriers or shuffles that not every thread reaches (a deadlock
// is an error). With AddressSanitizer and UBSan also accesses outside of buffers, misaligned ones, and overflows.
// What it cannot show: races (fibers change only at barriers and shuffles, and blocks never overlap), memory order,
// speed, and what the GPU's own approximate instructions round to.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#include "fiber.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

struct uint4 {
  uint32_t x, y, z, w;
};
static_assert(sizeof(uint4) == 16, "");

struct Dim {
  unsigned x = 0;
};

namespace emulator {

constexpr unsigned kWarp = 32;
// Threads wait here until `size` of them have come.
struct Barrier {
  unsigned size = 0;
  unsigned arrived = 0;
  unsigned generation = 0;
};

struct Thread {
  Fiber fiber;
  bool done = false;
  unsigned shuffles = 0;  // made so far: two buffers take turns, so that one barrier a shuffle is enough
};

struct Block {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Barrier> warps;
  std::vector<uint32_t> slots;  // two for each thread
  Barrier whole;
  Fiber scheduler;
  std::function<void()> body;
  unsigned running = 0;
  bool progress = false;  // since the scheduler last looked at every fiber
};

inline Block& block() {
  static Block instance;
  return instance;
}

inline void yield() {
  Block& b = block();
  switch_fiber(b.threads[b.running]->fiber, b.scheduler);
}

inline void wait_at(Barrier& barrier) {
  const unsigned generation = barrier.generation;
  block().progress = true;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) yield();
}

inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_emulator: %s\n", what);
  std::abort();
}

// What a fiber runs; it is never resumed once done.
inline void run_thread() {
  Block& b = block();
  b.body();
  b.threads[b.running]->done = true;
  b.progress = true;
  yield();
}

}  // namespace emulator

inline Dim threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

inline void prepare(Block& b, unsigned threads) {
  if (threads % kWarp != 0) fail("blocks must be whole warps");
  while (b.threads.size() < threads) b.threads.push_back(std::make_unique<Thread>());
  b.warps.assign(threads / kWarp, Barrier{kWarp, 0, 0});
  b.whole = {threads, 0, 0};
  b.slots.assign(2 * threads, 0);
  for (unsigned t = 0; t < threads; ++t) {
    b.threads[t]->done = false;
    b.threads[t]->shuffles = 0;
    start_fiber(b.threads[t]->fiber, run_thread);
  }
}

inline void run_block(Block& b, unsigned threads) {
  prepare(b, threads);
  for (unsigned left = threads; left > 0;) {
    b.progress = false;
    for (unsigned t = 0; t < threads; ++t) {
      if (b.threads[t]->done) continue;
      b.running = t;
      threadIdx.x = t;
      switch_fiber(b.scheduler, b.threads[t]->fiber);
      if (b.threads[t]->done) --left;
    }
    if (!b.progress) fail("deadlock: some threads wait at a barrier or shuffle that others never reach");
  }
}

inline void launch(int64_t blocks, int threads, std::function<void()> body) {
  Block& b = block();
  b.body = std::move(body);
  gridDim.x = static_cast<unsigned>(blocks);
  blockDim.x = static_cast<unsigned>(threads);
  for (int64_t i = 0; i < blocks; ++i) {
    blockIdx.x = static_cast<unsigned>(i);
    run_block(b, blockDim.x);
  }
}

inline uint32_t exchange(uint32_t value, unsigned from_lane) {
  Block& b = block();
  const unsigned thread = b.running, first = thread / kWarp * kWarp;
  const unsigned turn = b.threads[thread]->shuffles++ % 2 * blockDim.x;
  b.slots[turn + thread] = value;
  wait_at(b.warps[thread / kWarp]);
  return b.slots[turn + first + from_lane % kWarp];
}

}  // namespace emulator

#define RF_LAUNCH(kernel, blocks, threads, stream, ...) \
  ((void)(stream), emulator::launch(blocks, threads, [=] { (kernel)(__VA_ARGS__); }))

inline void __syncthreads() { emulator::wait_at(emulator::block().whole); }
inline void __syncwarp() { emulator::wait_at(emulator::block().warps[threadIdx.x / emulator::kWarp]); }
inline void __threadfence() {}

inline uint32_t __shfl_down_sync(unsigned, uint32_t value, unsigned distance) {
  const unsigned lane = threadIdx.x % emulator::kWarp;
  return emulator::exchange(value, lane + distance < emulator::kWarp ? lane + distance : lane);
}
inline uint32_t __shfl_up_sync(unsigned, uint32_t value, unsigned distance) {
  const unsigned lane = threadIdx.x % emulator::kWarp;
  return emulator::exchange(value, lane >= distance ? lane - distance : lane);
}
inline uint32_t __shfl_sync(unsigned, uint32_t value, unsigned lane) { return emulator::exchange(value, lane); }
inline unsigned atomicAdd(unsigned* to, unsigned value) {
  const unsigned before = *to;
  *to += value;
  return before;
}

// The runtime, as far as launchers use it.
typedef int cudaError_t;
typedef void* cudaStream_t;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
