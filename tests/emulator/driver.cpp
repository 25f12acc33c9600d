// SPDX-License-Identifier: Apache-2.0
// Every CUDA kernel on the emulator, against plain loops in double: a program of its own, without PyTorch, so that
// sanitizers which Python does not stand can watch it. See proof.py for the ways it is compiled and run.
//
// RF_PARTS: which families, for mutants.py, which compiles the program for each broken line: logprob 1, kl 2, gae 4,
// vtrace 8, and 16 for the others.
#ifndef RF_PARTS
#define RF_PARTS 31
#endif

#include "driver_common.h"

#if RF_PARTS & 1
#include "driver_logprob.h"
#endif
#if RF_PARTS & 2
#include "driver_kl.h"
#endif
#if RF_PARTS & 28
#include "driver_tokens.h"
#endif

int main() {
#if RF_PARTS & 1
  check_logprob();
#endif
#if RF_PARTS & 2
  check_token_kl();
#endif
#if RF_PARTS & 4
  check_gae();
#endif
#if RF_PARTS & 8
  check_vtrace();
#endif
#if RF_PARTS & 16
  check_ppo();
#endif
  if (failures > 0) return std::printf("%d wrong numbers\n", failures), 1;
  std::printf("every kernel is right\n");
  return 0;
}
