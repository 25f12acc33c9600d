// SPDX-License-Identifier: Apache-2.0
// In which order the emulator starts blocks and runs threads, and when other blocks see what one publishes.
//
// RLHF_FAST_SCHEDULE, read at every launch, as "seed=7 resident=3 start=random":
//   seed      0: threads and blocks in order. Others: in an order that differs from turn to turn; words become visible
//             late.
//   resident  blocks, or clusters, that run at the same time; the next starts when one of them is done.
//   start     "order": blocks start by rising index, as every GPU does and no document promises; "random".
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "races.h"

namespace emulator {

struct Schedule {
  uint64_t state = 0;  // of the random numbers; 0: none are wanted
  unsigned resident = 4;
  bool random_start = false;

  Schedule() {
    const char* text = std::getenv("RLHF_FAST_SCHEDULE");
    if (text == nullptr) return;
    state = number(text, "seed=", 0);
    resident = static_cast<unsigned>(number(text, "resident=", resident));
    random_start = std::strstr(text, "start=random") != nullptr;
    if (random_start && state == 0) state = 1;
  }

  // xorshift64; 0 without a seed.
  unsigned below(unsigned bound) {
    if (state == 0) return 0;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return static_cast<unsigned>((state >> 11) % bound);
  }

  // The k-th thread of a turn: from `turn` on, upward or, at odd turns, downward.
  unsigned order(unsigned k, unsigned turn, unsigned count) const {
    return turn % 2 == 0 ? (turn + k) % count : (turn + count - k) % count;
  }

  // Which resident cluster goes on: without a seed the same one for as long as it gets ahead.
  unsigned pick(unsigned count, unsigned idle_turns) {
    if (state == 0 || idle_turns > 0) return last_ = (last_ + (idle_turns > 0 ? 1 : 0)) % count;
    return last_ = below(count);
  }

  std::vector<unsigned> start_order(unsigned count) {
    std::vector<unsigned> order(count);
    for (unsigned i = 0; i < count; ++i) order[i] = i;
    for (unsigned i = count; random_start && i > 1; --i) std::swap(order[i - 1], order[below(i)]);
    return order;
  }

 private:
  static uint64_t number(const char* text, const char* name, uint64_t otherwise) {
    const char* found = std::strstr(text, name);
    return found == nullptr ? otherwise : std::strtoull(found + std::strlen(name), nullptr, 10);
  }
  unsigned last_ = 0;
};

// Words that were published and are still on their way.
class Publications {
 public:
  RF_UNWATCHED void publish(uint64_t value, uint64_t* word) {
    if (count_ == kMost) make_all_visible();
    pending_[count_++] = {value, word};
  }
  // Without a seed all.
  RF_UNWATCHED void make_some_visible(Schedule* schedule) {
    unsigned kept = 0;
    for (unsigned i = 0; i < count_; ++i) {
      if (schedule->below(3) == 0) {
        store(pending_[i]);
      } else {
        pending_[kept++] = pending_[i];
      }
    }
    count_ = kept;
  }
  // Returns whether there were any.
  RF_UNWATCHED bool make_all_visible() {
    const bool any = count_ > 0;
    for (unsigned i = 0; i < count_; ++i) store(pending_[i]);
    count_ = 0;
    return any;
  }

 private:
  static constexpr unsigned kMost = 4096;
  struct Word {
    uint64_t value;
    uint64_t* to;
  };
  RF_UNWATCHED static void store(const Word& word) {
    reinterpret_cast<std::atomic<uint64_t>*>(word.to)->store(word.value, std::memory_order_relaxed);
  }
  Word pending_[kMost];
  unsigned count_ = 0;
};

inline Publications& publications() {
  static Publications* instance = new Publications;
  return *instance;
}

}  // namespace emulator
