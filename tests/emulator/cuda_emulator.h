// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on a CPU, for tests alone. Each thread of a block is a fiber. Several blocks (or clusters) are
// resident at a time, each with shared memory of its own, and start when one before them is done; schedule.h says in
// which order blocks and threads run.
//
// What it shows: indexing, masks, tails, reductions, barriers or shuffles that not every thread reaches, blocks that
// wait for blocks which have no room to start (both are errors, not hangs), and shared memory that nobody wrote (NaN).
// With AddressSanitizer and UBSan also accesses outside of buffers, misaligned ones, and overflows; with
// ThreadSanitizer races between threads, blocks and launches (races.h).
// What it cannot show: memory order between relaxed words, speed, and what the GPU's own approximate instructions round
// to.
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
#include "races.h"
#include "schedule.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint4 {
  uint32_t x, y, z, w;
};
static_assert(sizeof(uint4) == 16, "");

struct Dim {
  unsigned x = 0;
};
inline Dim threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr unsigned kWarp = 32, kFullMask = 0xffffffffu;
constexpr size_t kShared = 16 * 1024, kGap = 64;  // bytes of shared memory a block, and unusable ones between arrays

// Threads wait here until `size` of them have come.
struct Barrier {
  unsigned size = 0;
  unsigned arrived = 0;
  unsigned generation = 0;
  char order[2] = {};  // what ThreadSanitizer knows this barrier's generations by
};

struct Block;

struct Thread {
  Fiber fiber;
  Watched watched;
  Block* block = nullptr;
  unsigned index = 0;  // in its block
  bool done = false;
  unsigned shuffles = 0;  // made so far: two buffers take turns, so that one barrier a shuffle is enough
};

struct Cluster {
  Barrier barrier;
  unsigned running = 0;   // threads that are not done
  bool progress = false;  // since the scheduler last looked at it
  std::vector<std::unique_ptr<Block>> blocks;
};

struct Block {
  unsigned index = 0;
  Cluster* cluster = nullptr;
  Barrier whole;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Barrier> warps;
  std::vector<uint32_t> slots;  // two for each thread
  char* shared = nullptr;
  size_t shared_used = 0;
  struct Array {
    const void* site;
    void* begin;
  } arrays[16];
  unsigned array_count = 0;
};

struct Machine {
  Fiber host;
  Watched host_watched;
  Thread* running = nullptr;
  std::function<void()> body;
  char before_launch = 0;                      // for ThreadSanitizer: what the host did before all threads of a launch
  char after_launch = 0;                       // and all threads before what the host does next
  bool waiting = false;                        // a thread found a word that nobody has published
  std::vector<std::unique_ptr<Cluster>> idle;  // to be used again
};

inline Machine& machine() {
  static Machine* instance = new Machine;
  return *instance;
}

inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_emulator: %s\n", what);
  std::abort();
}

RF_UNWATCHED inline void yield() {
  Machine& m = machine();
  Thread& thread = *m.running;
  leave_to(m.host_watched);
  switch_fiber(thread.fiber, m.host);
}

// `orders`: what was written before is seen after, as with a barrier; a shuffle promises nothing of the kind.
RF_UNWATCHED inline void wait_at(Barrier& barrier, bool orders) {
  const unsigned generation = barrier.generation;
  char* order = &barrier.order[generation % 2];
  if (orders) release(order);
  machine().running->block->cluster->progress = true;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    while (barrier.generation == generation) yield();
  }
  if (orders) acquire(order);
}

// What a fiber runs; it is never resumed once done.
RF_UNWATCHED inline void run_thread() {
  Machine& m = machine();
  acquire(&m.before_launch);
  m.body();
  Thread& thread = *m.running;
  release(&m.after_launch);
  thread.done = true;
  --thread.block->cluster->running;
  thread.block->cluster->progress = true;
  yield();
}

// An array in the block's shared memory, the same for all its threads; full of 0xff, which are NaNs.
template <class T>
RF_UNWATCHED T* shared_array(const void* site, size_t count) {
  Block& block = *machine().running->block;
  for (unsigned i = 0; i < block.array_count; ++i) {
    if (block.arrays[i].site == site) return static_cast<T*>(block.arrays[i].begin);
  }
  char* begin = block.shared + block.shared_used;
  const size_t bytes = (count * sizeof(T) + 15) / 16 * 16;
  block.shared_used += bytes + kGap;
  if (block.array_count == 16 || block.shared_used > kShared) fail("too much shared memory");
  block.arrays[block.array_count++] = {site, begin};
  usable(begin, count * sizeof(T));
  return reinterpret_cast<T*>(begin);
}

// ------------------------------------------------------------------------------------------- the scheduler

inline void prepare(Cluster& cluster, unsigned first, unsigned blocks, unsigned threads) {
  while (cluster.blocks.size() < blocks) cluster.blocks.push_back(std::make_unique<Block>());
  cluster.blocks.resize(blocks);
  cluster.barrier = {blocks * threads, 0, 0, {}};
  cluster.running = blocks * threads;
  for (unsigned k = 0; k < blocks; ++k) {
    Block& b = *cluster.blocks[k];
    b.index = first + k;
    b.cluster = &cluster;
    b.whole = {threads, 0, 0, {}};
    b.warps.assign(threads / kWarp, Barrier{kWarp, 0, 0, {}});
    b.slots.assign(2 * threads, 0);
    if (b.shared == nullptr || kWatchesRaces) b.shared = new char[kShared];  // or what two blocks do would seem a race
    usable(b.shared, kShared);
    std::memset(b.shared, 0xff, kShared);
    unusable(b.shared, kShared);
    b.shared_used = b.array_count = 0;
    while (b.threads.size() < threads) b.threads.push_back(std::make_unique<Thread>());
    b.threads.resize(threads);
    for (unsigned t = 0; t < threads; ++t) {
      Thread& thread = *b.threads[t];
      thread.block = &b;
      thread.index = t;
      thread.done = false;
      thread.shuffles = 0;
      thread.watched = new_watched();
      start_fiber(thread.fiber, run_thread);
    }
  }
}

RF_UNWATCHED inline void resume(Thread& thread) {
  Machine& m = machine();
  m.running = &thread;
  threadIdx.x = thread.index;
  blockIdx.x = thread.block->index;
  leave_to(thread.watched);
  switch_fiber(m.host, thread.fiber);
}

// Lets every thread of the cluster run until it waits or is done; returns whether any got further.
inline bool advance(Cluster& cluster, Schedule& schedule) {
  cluster.progress = false;
  for (const auto& block : cluster.blocks) {
    const unsigned threads = static_cast<unsigned>(block->threads.size()), turn = schedule.below(threads);
    for (unsigned k = 0; k < threads; ++k) {
      Thread& thread = *block->threads[schedule.order(k, turn, threads)];
      if (!thread.done) resume(thread);
    }
  }
  return cluster.progress;
}

inline void retire(std::unique_ptr<Cluster> cluster) {
  for (const auto& block : cluster->blocks) {
    for (const auto& thread : block->threads) end_watched(thread->watched);
  }
  machine().idle.push_back(std::move(cluster));
}

inline std::unique_ptr<Cluster> start(unsigned number, unsigned size, unsigned threads) {
  std::vector<std::unique_ptr<Cluster>>& idle = machine().idle;
  if (idle.empty()) idle.push_back(std::make_unique<Cluster>());
  std::unique_ptr<Cluster> cluster = std::move(idle.back());
  idle.pop_back();
  prepare(*cluster, number * size, size, threads);
  return cluster;
}

inline void stuck() {
  fail(machine().waiting ? "hang: the resident blocks wait for blocks that have no room to start"
                         : "deadlock: some threads wait at a barrier or shuffle that others never reach");
}

inline void run_clusters(unsigned count, unsigned size, unsigned threads) {
  Schedule schedule;
  const std::vector<unsigned> order = schedule.start_order(count);
  std::vector<std::unique_ptr<Cluster>> resident;
  unsigned started = 0, idle_turns = 0;
  while (started < count || !resident.empty()) {
    while (started < count && resident.size() < schedule.resident) {
      resident.push_back(start(order[started++], size, threads));
      idle_turns = 0;
    }
    const unsigned which = schedule.pick(static_cast<unsigned>(resident.size()), idle_turns);
    publications().make_some_visible(&schedule);
    bool progress = advance(*resident[which], schedule);
    if (resident[which]->running == 0) {
      retire(std::move(resident[which]));
      resident.erase(resident.begin() + which);
      idle_turns = 0;
      continue;
    }
    idle_turns = progress ? 0 : idle_turns + 1;
    if (idle_turns <= resident.size()) continue;
    if (!publications().make_all_visible()) stuck();
    idle_turns = 0;
  }
  publications().make_all_visible();
}

inline void launch(int64_t blocks, int threads, std::function<void()> body, int cluster = 1) {
  if (threads % static_cast<int>(kWarp) != 0) fail("blocks must be whole warps");
  if (blocks % cluster != 0) fail("a grid must be whole clusters");
  Machine& m = machine();
  m.body = std::move(body);
  m.host_watched = this_watched();
  m.waiting = false;
  std::fenv_t host;  // may flush denormals, which a GPU's kernels keep
  std::fegetenv(&host);
  std::fesetenv(FE_DFL_ENV);
  gridDim.x = static_cast<unsigned>(blocks);
  blockDim.x = static_cast<unsigned>(threads);
  release(&m.before_launch);
  run_clusters(static_cast<unsigned>(blocks / cluster), static_cast<unsigned>(cluster), blockDim.x);
  acquire(&m.after_launch);
  std::fesetenv(&host);
}

RF_UNWATCHED inline uint32_t exchange(unsigned mask, uint32_t value, unsigned from_lane) {
  if (mask != kFullMask) fail("a shuffle of part of a warp");
  Thread& thread = *machine().running;
  Block& b = *thread.block;
  const unsigned first = thread.index / kWarp * kWarp;
  uint32_t* slots = b.slots.data() + thread.shuffles++ % 2 * (b.slots.size() / 2);
  slots[thread.index] = value;
  wait_at(b.warps.data()[thread.index / kWarp], false);
  return slots[first + from_lane % kWarp];
}

// Words from block to block, see csrc/cuda/compat.cuh. `empty` is what they hold before.
RF_UNWATCHED inline void publish(uint64_t value, uint64_t* word, uint64_t empty) {
  if (*word != empty) fail("a word is published twice, or was not cleared");
  publications().publish(value, word);
  machine().running->block->cluster->progress = true;
}
RF_UNWATCHED inline void cluster_barrier() { wait_at(machine().running->block->cluster->barrier, true); }
RF_UNWATCHED inline uint64_t wait_for(const uint64_t* word, uint64_t empty) {
  const auto* atomic = reinterpret_cast<const std::atomic<uint64_t>*>(word);
  for (;;) {
    const uint64_t value = atomic->load(std::memory_order_relaxed);
    if (value != empty) return value;
    machine().waiting = true;
    yield();
  }
}
RF_UNWATCHED inline unsigned take_ticket(uint64_t* counter, uint64_t empty) {
  const uint64_t before = reinterpret_cast<std::atomic<uint64_t>*>(counter)->fetch_add(1, std::memory_order_relaxed);
  if (before < empty || before - empty >= gridDim.x) fail("a ticket's counter was not cleared");
  return static_cast<unsigned>(before - empty);
}

}  // namespace emulator

#define RF_LAUNCH(kernel, blocks, threads, stream, ...) \
  ((void)(stream), emulator::launch(blocks, threads, [=] { (kernel)(__VA_ARGS__); }))
#define RF_SHARED(type, name, count) \
  static const char name##_site = 0; \
  type* const name = emulator::shared_array<type>(&name##_site, count)

RF_UNWATCHED inline void __syncthreads() { emulator::wait_at(emulator::machine().running->block->whole, true); }
RF_UNWATCHED inline void __syncwarp() {
  const emulator::Thread& thread = *emulator::machine().running;
  emulator::wait_at(thread.block->warps.data()[thread.index / emulator::kWarp], true);
}

RF_UNWATCHED inline uint32_t __shfl_down_sync(unsigned mask, uint32_t value, unsigned distance) {
  const unsigned lane = threadIdx.x % emulator::kWarp;
  return emulator::exchange(mask, value, lane + distance < emulator::kWarp ? lane + distance : lane);
}
RF_UNWATCHED inline uint32_t __shfl_sync(unsigned mask, uint32_t value, unsigned lane) {
  return emulator::exchange(mask, value, lane);
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
