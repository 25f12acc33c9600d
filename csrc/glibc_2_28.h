// SPDX-License-Identifier: Apache-2.0
// Included before every C++ source of a wheel (RLHF_FAST_ABI3 in CMakeLists.txt): binds symbols of which newer glibcs
// have a newer version to the version of glibc 2.28, so that a wheel built on a newer Linux loads on every
// manylinux_2_28.
#pragma once

#include <limits.h>  // for __GLIBC__: other libraries of C, such as musl, have no such versions

#if defined(__GLIBC__) && defined(__x86_64__)
#define RF_OLDEST "GLIBC_2.2.5"
#elif defined(__GLIBC__) && defined(__aarch64__)
#define RF_OLDEST "GLIBC_2.17"
#endif

#ifdef RF_OLDEST
__asm__(".symver exp,exp@" RF_OLDEST);  // 2.29 only dropped the SVID error handling
__asm__(".symver log,log@" RF_OLDEST);
__asm__(".symver pow,pow@" RF_OLDEST);
// libstdc++'s shared_ptr counts without atomics if this symbol (2.32) says that there is one thread. This copy never
// does.
extern "C" {
__attribute__((weak, visibility("hidden"))) char __libc_single_threaded = 0;
}
#endif
