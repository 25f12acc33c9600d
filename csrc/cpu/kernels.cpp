// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set (CMakeLists.txt defines RF_ISA as the namespace): one table of kernels each.
#include "kernels.h"

#include "decode_attention_kernel.h"
#include "gae_kernel.h"
#include "kl_kernel.h"
#include "logprob_kernel.h"
#include "vtrace_kernel.h"

namespace rlhf_fast {
namespace RF_ISA {

#define RF_FOR_DTYPES(kernel) {kernel<float>, kernel<BFloat16>, kernel<Half>}  // in the order of Dtype

extern const KernelTable kTable;
const KernelTable kTable = {
    RF_FOR_DTYPES(token_stats),
    RF_FOR_DTYPES(token_stats_backward),
    RF_FOR_DTYPES(token_kl),
    RF_FOR_DTYPES(token_kl_backward),
    RF_FOR_DTYPES(token_kl_and_grad),
    RF_FOR_DTYPES(approx_kl),
    RF_FOR_DTYPES(approx_kl_backward),
    RF_FOR_DTYPES(gae),
    RF_FOR_DTYPES(vtrace),
    RF_FOR_DTYPES(ppo_advantages),
    RF_FOR_DTYPES(whiten_moments),
    RF_FOR_DTYPES(whiten),
    RF_FOR_DTYPES(decode_attention),
};

}  // namespace RF_ISA
}  // namespace rlhf_fast
