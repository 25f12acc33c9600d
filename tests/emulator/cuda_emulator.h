// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on a CPU, for tests alone. Each thread of a block is a fiber; blocks run one after the other. Those
// of a cluster take turns at its barriers; they share one piece of shared memory, so nothing in it outlives a barrier.
//
// What it shows: indexing, masks, tails, reductions, and barriers or shuffles that not every thread reaches (a deadlock
// is an error). With AddressSanitizer and UBSan also accesses outside of buffers, misaligned ones, and overflows.
// What it cannot show: races (fibers change only at barriers and shuffles, and blocks never overlap), memory order,
// speed, and what the GPU's own approximate instructions round to.
#pragma once

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
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
  std::vector<Barrier> wholes;  // one for each block of the cluster, which is mostly one
  Barrier cluster;
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

inline void prepare(Block& b, unsigned blocks, unsigned threads) {
  if (threads % kWarp != 0) fail("blocks must be whole warps");
  const unsigned all = blocks * threads;
  while (b.threads.size() < all) b.threads.push_back(std::make_unique<Thread>());
  b.warps.assign(all / kWarp, Barrier{kWarp, 0, 0});
  b.wholes.assign(blocks, Barrier{threads, 0, 0});
  b.cluster = {all, 0, 0};
  b.slots.assign(2 * all, 0);
  for (unsigned t = 0; t < all; ++t) {
    b.threads[t]->done = false;
    b.threads[t]->shuffles = 0;
    start_fiber(b.threads[t]->fiber, run_thread);
  }
}

// Lets the threads [begin, end) run until each waits or is done; returns how many got done.
inline unsigned advance(Block& b, unsigned begin, unsigned end) {
  unsigned done = 0;
  for (unsigned t = begin; t < end; ++t) {
    if (b.threads[t]->done) continue;
    b.running = t;
    threadIdx.x = t - begin;
    switch_fiber(b.scheduler, b.threads[t]->fiber);
    done += b.threads[t]->done;
  }
  return done;
}

inline void run_cluster(Block& b, unsigned first, unsigned blocks, unsigned threads) {
  prepare(b, blocks, threads);
  for (unsigned left = blocks * threads; left > 0;) {
    bool progress = false;
    for (unsigned k = 0; k < blocks; ++k) {
      blockIdx.x = first + k;
      do {  // as far as the block gets alone
        b.progress = false;
        left -= advance(b, k * threads, (k + 1) * threads);
        progress |= b.progress;
      } while (b.progress);
    }
    if (!progress) fail("deadlock: some threads wait at a barrier or shuffle that others never reach");
  }
}

inline void launch(int64_t blocks, int threads, std::function<void()> body, int cluster = 1) {
  Block& b = block();
  b.body = std::move(body);
  std::fenv_t host;  // may flush denormals, which a GPU's kernels keep
  std::fegetenv(&host);
  std::fesetenv(FE_DFL_ENV);
  gridDim.x = static_cast<unsigned>(blocks);
  blockDim.x = static_cast<unsigned>(threads);
  for (int64_t i = 0; i < blocks; i += cluster) {
    run_cluster(b, static_cast<unsigned>(i), static_cast<unsigned>(cluster), blockDim.x);
  }
  std::fesetenv(&host);
}

inline uint32_t exchange(uint32_t value, unsigned from_lane) {
  Block& b = block();
  const unsigned thread = b.running, first = thread / kWarp * kWarp;
  const unsigned turn = b.threads[thread]->shuffles++ % 2 * static_cast<unsigned>(b.slots.size() / 2);
  b.slots[turn + thread] = value;
  wait_at(b.warps[thread / kWarp]);
  return b.slots[turn + first + from_lane % kWarp];
}

}  // namespace emulator

#define RF_LAUNCH(kernel, blocks, threads, stream, ...) \
  ((void)(stream), emulator::launch(blocks, threads, [=] { (kernel)(__VA_ARGS__); }))

inline void __syncthreads() { emulator::wait_at(emulator::block().wholes[emulator::block().running / blockDim.x]); }
inline void __syncwarp() { emulator::wait_at(emulator::block().warps[emulator::block().running / emulator::kWarp]); }
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
inline cudaError_t cudaMemsetAsync(void* to, int byte, size_t size, cudaStream_t) {
  std::memset(to, byte, size);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
