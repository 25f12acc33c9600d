// SPDX-License-Identifier: Apache-2.0
// The only header through which kernels use CUDA. With RF_EMULATE it is the tests' emulator instead, and the same
// kernels run on a CPU. Everything that names a GPU instruction is here, next to its plain C++ equivalent.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef RF_EMULATE
#include "cuda_emulator.h"
#ifndef RF_REAL_BLOCKS
#define RF_SMALL_BLOCKS  // few threads, so that small tests have many blocks
#endif
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
// An array in the block's shared memory: RF_SHARED(float, scratch, 16);
#define RF_SHARED(type, name, count) __shared__ type name[count]
// RF_LAUNCH(kernel<T>, blocks, threads, stream, arguments...): an error is returned by cudaGetLastError().
#define RF_LAUNCH(kernel, blocks, threads, stream, ...) \
  (kernel)<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), 0, stream>>>(__VA_ARGS__)
#endif

#include "../args.h"
#include "../math.h"

namespace rlhf_fast {
namespace cuda {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarp = 32;
constexpr float kInf = __builtin_inff();
constexpr float kNan = __builtin_nanf("");
constexpr double kLog2e = 1.4426950408889634;
constexpr float kLn2 = 0.6931471805599453f;
// The content of a word before publish(), which memset can write; no value may equal it.
constexpr int kUnpublishedByte = 0xfe;
constexpr uint64_t kUnpublished = ~uint64_t{0} / 0xff * kUnpublishedByte;

// 16-bit floats as their bits, so that the emulator needs no CUDA header.
struct alignas(2) BFloat16 {
  uint16_t bits;
};
struct alignas(2) Half {
  uint16_t bits;
};

template <class To, class From>
__device__ __forceinline__ To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// The compiler moves no load across: where it would take all registers for loads that could wait.
__device__ __forceinline__ void keep_loads_apart() { asm volatile("" ::: "memory"); }

#ifdef RF_EMULATE

template <class... Parameters, class... Arguments>
void launch_clusters(void (*kernel)(Parameters...), int64_t blocks, int threads, int size, cudaStream_t,
                     const Arguments&... arguments) {
  emulator::launch(blocks, threads, [=] { kernel(arguments...); }, size);
}
inline void cluster_barrier() { emulator::cluster_barrier(); }
template <class Kernel>
int64_t cluster_cache(Kernel*, int) {
  return 256 * 1024;
}
template <class... Parameters>
bool clusters_fit(void (*)(Parameters...), int, int) {
  return true;
}

inline float exp2_fast(float x) { return exp2f(x); }
inline uint32_t funnel_shift(uint32_t low, uint32_t high, unsigned bits) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> bits);
}
inline void store_16_bytes(uint4 value, void* to) { *static_cast<uint4*>(to) = value; }
inline void store_16_bytes_for_later(uint4 value, void* to) { *static_cast<uint4*>(to) = value; }
inline uint4 load_16_bytes_for_the_last_time(const uint4* from) { return *from; }
inline uint4 load_16_bytes_global(const uint4* from) { return *from; }
inline void publish(uint64_t value, uint64_t* word) { emulator::publish(value, word, kUnpublished); }
inline uint64_t wait_for(const uint64_t* word) { return emulator::wait_for(word, kUnpublished); }
inline unsigned take_ticket(uint64_t* counter) { return emulator::take_ticket(counter, kUnpublished); }
inline float to_float(Half x) { return static_cast<float>(bit_cast<_Float16>(x.bits)); }
inline void from_float(float x, Half* to) { to->bits = bit_cast<uint16_t>(static_cast<_Float16>(x)); }
inline void from_float(float x, BFloat16* to) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  to->bits = static_cast<uint16_t>(x == x ? rounded : (bits >> 16) | 0x40u);
}

#else

struct ClusterLaunch {
  cudaLaunchAttribute cluster{};
  cudaLaunchConfig_t config{};

  ClusterLaunch(int64_t blocks, int threads, int size, cudaStream_t stream) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(size);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;  // config points to cluster
};

// Launches clusters of `size` neighbouring blocks (2, 4 or 8), which run at the same time and can use
// cluster_barrier().
template <class... Parameters, class... Arguments>
void launch_clusters(void (*kernel)(Parameters...), int64_t blocks, int threads, int size, cudaStream_t stream,
                     const Arguments&... arguments) {
  const ClusterLaunch launch(blocks, threads, size, stream);
  cudaLaunchKernelEx(&launch.config, kernel, arguments...);
}

// All threads of the cluster wait here; afterwards all see what each wrote to global memory before. A block launched
// without a cluster is a cluster of its own.
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n\t"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
#else
  __syncthreads();
#endif
}

// Bytes of the device's L2 cache; 0 where `kernel` must not run in clusters. This depends not only on the
// device: code compiled for an older one has no cluster barrier.
template <class Kernel>
int64_t cluster_cache(Kernel* kernel, int device) {
  cudaFuncAttributes attributes;
  int bytes = 0;
  if (cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion < 90) return 0;
  const cudaError_t error = cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device);
  return error == cudaSuccess && cudaGetLastError() == cudaSuccess ? bytes : 0;
}

// Whether a cluster of `size` blocks of the kernel fits on the current device. It may not if part of the GPU is
// disabled or assigned to others.
template <class... Parameters>
bool clusters_fit(void (*kernel)(Parameters...), int threads, int size) {
  ClusterLaunch launch(size, threads, size, nullptr);
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config) == cudaSuccess) return clusters > 0;
  cudaGetLastError();  // the error is the answer, not a failure: clear it
  return false;
}

// The lower word of high:low >> bits, bits < 32.
__device__ __forceinline__ uint32_t funnel_shift(uint32_t low, uint32_t high, unsigned bits) {
  return __funnelshift_r(low, high, bits);
}
// 2^x in one instruction; 2 ulp; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// A 16-byte store in one instruction; a plain store of a struct may be several.
__device__ __forceinline__ void store_16_bytes(uint4 value, void* to) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}
// The same for what this kernel does not read again: it leaves the L2 cache before what others wait to read there.
__device__ __forceinline__ void store_16_bytes_for_later(uint4 value, void* to) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}
// And what is read for the last time leaves it first, too.
__device__ __forceinline__ uint4 load_16_bytes_for_the_last_time(const uint4* from) { return __ldcs(from); }
// From global memory: of an address that was made of a number the compiler does not know it.
__device__ __forceinline__ uint4 load_16_bytes_global(const uint4* from) {
  uint4 value;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(__cvta_generic_to_global(from)));
  return value;
}
// How many blocks took one before; `counter` holds kUnpublished until the first does. A block may wait for blocks of
// lower tickets alone: they run already, so none waits for one that has no room to start. (CUDA does not promise to
// start blocks in the order of their indices.)
__device__ __forceinline__ unsigned take_ticket(uint64_t* counter) {
  return static_cast<unsigned>(atomicAdd(reinterpret_cast<unsigned long long*>(counter), 1ull) - kUnpublished);
}
// Publishes a word from one block to others, atomically; it does not order other memory accesses.
__device__ __forceinline__ void publish(uint64_t value, uint64_t* word) {
  asm volatile("st.relaxed.gpu.u64 [%0], %1;" : : "l"(word), "l"(value));
}
__device__ __forceinline__ uint64_t wait_for(const uint64_t* word) {
  uint64_t value;
  do {
    asm volatile("ld.relaxed.gpu.u64 %0, [%1];" : "=l"(value) : "l"(word));
  } while (value == kUnpublished);
  return value;
}
__device__ __forceinline__ float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ void from_float(float x, Half* to) { to->bits = __half_as_ushort(__float2half_rn(x)); }
__device__ __forceinline__ void from_float(float x, BFloat16* to) {
  to->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

#endif

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ void from_float(float x, float* to) { *to = x; }

// Calls a launcher with the type of a Dtype: with_dtype(dtype, [&](auto zero) { using T = decltype(zero); ... }).
template <class F>
auto with_dtype(Dtype dtype, const F& f) {
  if (dtype == kFloat32) return f(float{});
  if (dtype == kBFloat16) return f(BFloat16{});
  return f(Half{});
}

}  // namespace cuda
}  // namespace rlhf_fast
