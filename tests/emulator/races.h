// SPDX-License-Identifier: Apache-2.0
// The emulator's words to the sanitizers. Under ThreadSanitizer every CUDA thread is a fiber of its own there, ordered
// with others by barriers and launches alone, so that what only the schedule happened to order is reported as a race.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define RF_UNWATCHED __attribute__((no_sanitize("thread")))
#else
#define RF_UNWATCHED
#endif

namespace emulator {

#if defined(__SANITIZE_THREAD__)
using Watched = void*;
constexpr bool kWatchesRaces = true;
inline Watched new_watched() { return __tsan_create_fiber(0); }
inline Watched this_watched() { return __tsan_get_current_fiber(); }
inline void end_watched(Watched fiber) { __tsan_destroy_fiber(fiber); }
inline void leave_to(Watched fiber) { __tsan_switch_to_fiber(fiber, 1); }  // 1: a switch orders nothing
inline void release(void* order) { __tsan_release(order); }
inline void acquire(void* order) { __tsan_acquire(order); }
#else
struct Watched {};
constexpr bool kWatchesRaces = false;
inline Watched new_watched() { return {}; }
inline Watched this_watched() { return {}; }
inline void end_watched(Watched) {}
inline void leave_to(Watched) {}
inline void release(void*) {}
inline void acquire(void*) {}
#endif

// Memory that may be touched, or not, until further notice.
#if defined(__SANITIZE_ADDRESS__)
inline void usable(void* begin, size_t bytes) { __asan_unpoison_memory_region(begin, bytes); }
inline void unusable(void* begin, size_t bytes) { __asan_poison_memory_region(begin, bytes); }
#else
inline void usable(void*, size_t) {}
inline void unusable(void*, size_t) {}
#endif

}  // namespace emulator
