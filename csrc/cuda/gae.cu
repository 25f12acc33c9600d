// SPDX-License-Identifier: Apache-2.0
// The family gae on a GPU.
#include "gae.cuh"

#include "../gae_binding.h"
#include "device.h"
#include "vtrace.cuh"

namespace rlhf_fast {

namespace {

Tensor scratch(const Tensor& like, int64_t bytes) { return empty_of(like, {bytes}, ScalarType::Byte); }

// Null where the memory is empty.
template <class T>
T* begin_of(const Tensor& memory) {
  return memory.numel() == 0 ? nullptr : mutable_data_of<T>(memory);
}

Tensor moments_scratch(const Tensor& like, int64_t blocks) {
  return scratch(like, blocks * static_cast<int64_t>(sizeof(cuda::Moments)));
}

struct CudaGae : Cuda {
  static void gae(Dtype dtype, const GaeArgs& args, int64_t count, int64_t total, const Tensor& like) {
    if (count == 0 || total == 0) return;
    const Launch launch("gae", like);
    const cuda::Sequences sequences{args.cu_seqlens, args.length, count, total};
    const bool walks = cuda::walks_rows(args, sequences, launch.multiprocessors());
    const Tensor links = scratch(like, walks ? 0 : cuda::link_bytes(sequences, cuda::gae_chains(args)));
    launch.check(cuda::gae(dtype, args, sequences, walks, begin_of<uint64_t>(links), launch.stream()),
                 walks ? "gae_rows_kernel" : "gae_kernel");
  }

  static void vtrace(Dtype dtype, const VtraceArgs& args, int64_t count, int64_t total, const Tensor& like) {
    if (count == 0 || total == 0) return;
    RF_CHECK(count <= 0x7fffffff, "vtrace: more than 2^31 - 1 sequences");  // a block each
    const Launch launch("vtrace", like);
    const cuda::Sequences sequences{args.cu_seqlens, args.length, count, total};
    launch.check(cuda::vtrace(dtype, args, sequences, launch.stream()), "vtrace_kernel");
  }

  static void ppo_advantages(Dtype dtype, const PpoAdvantagesArgs& args, int64_t rows, const Tensor& like) {
    const Launch launch("ppo_advantages", like);
    const cuda::Sequences sequences{nullptr, args.length, rows, rows * args.length};
    const Tensor links = scratch(like, cuda::link_bytes(sequences, cuda::kPpoChains));
    const Tensor partial = moments_scratch(like, cuda::tiles_of(sequences.total));
    launch.check(cuda::ppo_advantages(dtype, args, sequences, begin_of<uint64_t>(links),
                                      begin_of<cuda::Moments>(partial), launch.stream()),
                 "ppo_advantages_kernel");
  }

  static void whiten_moments(Dtype dtype, const WhitenArgs& args, int64_t rows, const Tensor& like) {
    const Launch launch("masked_whiten", like);
    const int64_t total = rows * args.length;
    const Tensor partial = moments_scratch(like, cuda::whiten_blocks(total));
    launch.check(cuda::whiten_moments(dtype, args, total, begin_of<cuda::Moments>(partial), launch.stream()),
                 "whiten_moments_kernel");
  }

  static void whiten(Dtype dtype, const WhitenArgs& args, int64_t rows, const Tensor& like) {
    const int64_t total = rows * args.length;
    if (total == 0) return;
    const Launch launch("masked_whiten", like);
    launch.check(cuda::whiten(dtype, args, total, launch.stream()), "whiten_kernel");
  }
};

}  // namespace

RF_CUDA_LIBRARY(m) { GaeBinding<CudaGae>::register_in(m); }

}  // namespace rlhf_fast
