# SPDX-License-Identifier: Apache-2.0
"""TRL: the fused LM head under SFT, DPO, KTO, GRPO and RLOO, and the functions that take logits.

    from rlhf_fast.integrations import apply_rlhf_fast_to_trl
    patch = apply_rlhf_fast_to_trl()
    print(patch.report())

Like TRL, we compute tiles of logits in the autocast dtype. On CPU, TRL 1.16 sends every position through the head, also
prompts and padding; patched, it sends only the labelled ones, as it does on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import rlhf_fast as rf

from ._ops import logprobs_and_entropy, row_entropy, served
from ._patch import Maker, Patch, Target, patch_package

MINORS = ("1.16", "1.15", "1.14")
UTILS = "trl.trainer.utils"
ALL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

HEAD = "temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0"
SIGNATURES = {
    "selective_log_softmax": "logits, index, temperature=1.0, row_mask=None",
    "entropy_from_logits": "logits, chunk_size=128",
    "selective_log_softmax_and_entropy": "logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None",
    "_ChunkedLogProbFunction": f"ctx, hidden, weight, bias, targets, {HEAD}, outputs={ALL_OUTPUTS}",
    "_ChunkedLogProbFunction, 1.14": f"ctx, last_hidden, weight, bias, targets, {HEAD}",
    "_use_triton": "device",
}


def apply_rlhf_fast_to_trl(
    *, fused_lm_head: bool = True, logprob: bool = True, entropy: bool = True, force: bool = False
) -> Patch:
    """Make TRL use our ops; imports trl.trainer.utils.

    Args:
        fused_lm_head: log-probs, entropy and the rest straight from hidden states, in all trainers.
        logprob, entropy: `selective_log_softmax`, `entropy_from_logits`; with both, `..._and_entropy` too.
        force: also patch versions that were not tested.
    """
    wanted: list[tuple[bool, str, Maker]] = [
        (logprob, "selective_log_softmax", _selective_log_softmax),
        (entropy, "entropy_from_logits", _entropy_from_logits),
        (logprob and entropy, "selective_log_softmax_and_entropy", _selective_log_softmax_and_entropy),
    ]
    targets = [Target(UTILS, name, {SIGNATURES[name]: maker}) for enabled, name, maker in wanted if enabled]
    if fused_lm_head:
        heads: dict[str, Maker] = {
            SIGNATURES["_ChunkedLogProbFunction"]: _Head,
            SIGNATURES["_ChunkedLogProbFunction, 1.14"]: _HeadOfTwo,
        }
        targets.append(Target(UTILS, "_ChunkedLogProbFunction", heads))
        targets.append(Target(UTILS, "_use_triton", {SIGNATURES["_use_triton"]: _use_triton}, only_here=True))
    return patch_package("trl", MINORS, targets, force=force)


def _selective_log_softmax(original: Any) -> Any:
    def selective_log_softmax(
        logits: Tensor,  # (..., V)
        index: Tensor,  # (...) or (..., K)
        temperature: float = 1.0,
        row_mask: Tensor | None = None,  # as index
    ) -> Tensor:
        if not served(logits, index):
            return original(logits, index, temperature=temperature, row_mask=row_mask)
        mask = None if row_mask is None else row_mask != 0
        if mask is not None and mask.dim() == logits.dim():  # an entry for each of K tokens, not for the row
            return rf.token_logprobs(logits, index, temperature=temperature).masked_fill(~mask, 0.0)
        return rf.token_logprobs(logits, index, temperature=temperature, mask=mask)

    return selective_log_softmax


def _entropy_from_logits(original: Any) -> Any:
    def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
        if not served(logits):
            return original(logits, chunk_size)
        return row_entropy(logits)

    return entropy_from_logits


def _selective_log_softmax_and_entropy(original: Any) -> Any:
    def selective_log_softmax_and_entropy(
        logits: Tensor,  # (..., V)
        index: Tensor,  # (...)
        entropy_requires_grad: bool = True,
        temperature: float = 1.0,
        row_mask: Tensor | None = None,  # (...)
    ) -> tuple[Tensor, Tensor]:
        if not served(logits, index) or index.shape != logits.shape[:-1]:
            return original(logits, index, entropy_requires_grad, temperature, row_mask)
        mask = None if row_mask is None else row_mask != 0
        stats = rf.token_stats(logits, index, temperature=temperature, mask=mask)
        logprobs, entropy = logprobs_and_entropy(stats)
        return logprobs, entropy if entropy_requires_grad else entropy.detach()

    return selective_log_softmax_and_entropy


def _use_triton(original: Any) -> Any:
    def use_triton(device: torch.device) -> bool:
        """True on CPU too: TRL then drops the positions without a label before the head."""
        return device.type == "cpu" or original(device)

    return use_triton


class _Head:
    """Replaces the autograd function, of which TRL only calls `apply`."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def apply(
        self,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ALL_OUTPUTS,
    ) -> tuple[Tensor | None, ...]:
        """(logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1), each `(N,)`, None where not in outputs."""
        # With DeepSpeed ZeRO-3 only TRL's backward gathers the head around each use. A softcap is not linear, so the
        # mean of the capped logits needs all logits.
        capped_mean = "mean_logits" in outputs and final_logit_softcapping is not None
        if not served(hidden, weight, targets) or hasattr(weight, "ds_id") or capped_mean:
            rest = (temperature, chunk_size, final_logit_softcapping, logit_scale, outputs)
            return self.original.apply(hidden, weight, bias, targets, *rest)
        weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        ours = {"entropy": "entropy", "log_sum_sq_probs": "sum_sq_probs", "is_top1": "argmax"}
        stats = rf.linear_token_stats(
            hidden, weight, targets, outputs=("logprobs", *(ours[name] for name in outputs if name in ours)),
            bias=bias, temperature=temperature, logit_scale=logit_scale, softcap=final_logit_softcapping,
        )  # fmt: skip
        mean = None
        if "mean_logits" in outputs:
            mean = _mean_logits(hidden, weight, bias) * (logit_scale / temperature)
        return (
            stats.logprobs,
            stats.entropy,
            None if stats.sum_sq_probs is None else stats.sum_sq_probs.log(),
            mean,
            None if stats.argmax is None else stats.argmax == targets,
        )


class _HeadOfTwo(_Head):
    """TRL 1.14: no choice of outputs, always (logprobs, entropy)."""

    def apply(self, *args: Any, outputs: tuple[str, ...] = ("entropy",)) -> tuple[Tensor | None, ...]:
        hidden, weight, _, targets, *_ = args
        if not served(hidden, weight, targets) or hasattr(weight, "ds_id"):
            return self.original.apply(*args)
        given = [*args, *(None, 1.0)[len(args) - 6 :], outputs]  # softcap and scale, where the caller left them out
        return super().apply(*given)[:2]


@torch.no_grad()
def _mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(N,) mean over the vocabulary: the head is linear, so it is the product with the mean row of the weight."""
    mean = hidden.float() @ weight.mean(0, dtype=torch.float32)
    return mean if bias is None else mean + bias.mean(dtype=torch.float32)
