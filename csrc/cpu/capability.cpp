// SPDX-License-Identifier: Apache-2.0
#include "capability.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#ifdef RF_X86_ISAS
#include <cpuid.h>
#endif

namespace rlhf_fast {

namespace {
constexpr const char* kNames[] = {"default", "avx2", "avx512"};
}

const char* name_of(Capability capability) { return kNames[static_cast<int>(capability)]; }

bool parse(const char* name, Capability* capability) {
  for (int i = 0; i < 3; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) {
      *capability = static_cast<Capability>(i);
      return true;
    }
  }
  return false;
}

Capability best_capability() {
#ifdef RF_X86_ISAS
  static const Capability best = [] {
    __builtin_cpu_init();
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    const bool halves =
        __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;  // GCC 10 has no name for it
    if (!halves || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Capability::kDefault;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      return Capability::kAvx512;
    }
    return Capability::kAvx2;
  }();
  return best;
#else
  return Capability::kDefault;
#endif
}

namespace {

Capability from_environment() {
  const char* name = std::getenv("RLHF_FAST_CPU");
  Capability limit;
  return name != nullptr && parse(name, &limit) ? std::min(best_capability(), limit) : best_capability();
}

// Atomic, since threads may call kernels while another sets the limit.
std::atomic<Capability>& current() {
  static std::atomic<Capability> capability(from_environment());
  return capability;
}

}  // namespace

Capability capability() { return current().load(std::memory_order_relaxed); }

void cap(Capability limit) { current().store(std::min(best_capability(), limit), std::memory_order_relaxed); }

namespace isa_default {
extern const KernelTable kTable;
}
#ifdef RF_X86_ISAS
namespace isa_avx2 {
extern const KernelTable kTable;
}
namespace isa_avx512 {
extern const KernelTable kTable;
}
#endif

const KernelTable& kernels() {
#ifdef RF_X86_ISAS
  switch (capability()) {
    case Capability::kAvx512: return isa_avx512::kTable;
    case Capability::kAvx2: return isa_avx2::kTable;
    default: break;
  }
#endif
  return isa_default::kTable;
}

}  // namespace rlhf_fast
