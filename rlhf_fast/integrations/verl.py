# SPDX-License-Identifier: Apache-2.0
"""verl: log-probs, entropy, the fused head, GAE and the KL penalty.

    from rlhf_fast.integrations import apply_rlhf_fast_to_verl
    patch = apply_rlhf_fast_to_verl()

verl's workers are Ray processes. `RLHF_FAST_VERL=1` in their environment does the same there, through verl's plugin
entry point (`verl_plugin.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import rlhf_fast as rf

from ._ops import as_one_dtype, logprobs_and_entropy, row_entropy, served
from ._patch import Maker, Patch, Target, patch_package

MINORS = ("0.9", "0.8", "0.7")
FUNCTIONAL = "verl.utils.torch_functional"
ALGORITHMS = "verl.trainer.ppo.core_algos"

SIGNATURES = {
    "logprobs_from_logits": "logits, labels, inplace_backward=True",
    "entropy_from_logits": "logits",
    "entropy_from_logits_with_chunking": "logits, chunk_size=2048",
    "FusedLinearForPPO.forward": "self, hidden_states, vocab_weights, input_ids, temperature=1.0",
    "linear_cross_entropy": "ctx, hidden, weight, labels, temperature=1.0, reduction='none', dist_process_group=None",
    "compute_gae_advantage_return": "token_level_rewards, values, response_mask, gamma, lam",
    "kl_penalty": "logprob, ref_logprob, kl_penalty",
    "compute_policy_loss_vanilla": "old_log_prob, log_prob, advantages, response_mask, loss_agg_mode='token-mean', "
    "config=None, rollout_is_weights=None",
}


def apply_rlhf_fast_to_verl(
    *,
    logprob: bool = True,
    entropy: bool = True,
    fused_linear: bool = True,
    gae: bool = True,
    kl: bool = True,
    policy_loss: bool = False,
    force: bool = False,
) -> Patch:
    """Make verl use our ops in this process; imports the modules that it patches.

    Args:
        logprob, entropy: from logits.
        fused_linear: both straight from hidden states, used if verl's `use_fused_kernels` is set.
        gae: `compute_gae_advantage_return`, also in the table of advantage estimators.
        kl: `kl_penalty`, in the reward and in the loss.
        policy_loss: registers the loss mode "rlhf_fast": "vanilla" with one device synchronisation, not three.
        force: also patch versions that were not tested.
    """
    targets = targets_of(logprob, entropy, fused_linear, gae, kl, policy_loss)
    return patch_package("verl", MINORS, targets, force=force)


def targets_of(
    logprob: bool = True,
    entropy: bool = True,
    fused_linear: bool = True,
    gae: bool = True,
    kl: bool = True,
    policy_loss: bool = False,
) -> list[Target]:
    head, fused = "verl.utils.experimental.torch_functional", "verl.utils.kernel.linear_cross_entropy"
    wanted: list[tuple[bool, str, str, Maker, dict[str, str]]] = [
        (logprob, FUNCTIONAL, "logprobs_from_logits", _logprobs_from_logits, {}),
        (entropy, FUNCTIONAL, "entropy_from_logits", _entropy_from_logits, {}),
        (entropy, FUNCTIONAL, "entropy_from_logits_with_chunking", _entropy_with_chunking, {}),
        (fused_linear, head, "FusedLinearForPPO.forward", _fused_linear_forward, {}),
        (fused_linear, fused, "linear_cross_entropy", _linear_cross_entropy, {}),
        (gae, ALGORITHMS, "compute_gae_advantage_return", _gae, {"registry": "ADV_ESTIMATOR_REGISTRY"}),
        (kl, ALGORITHMS, "kl_penalty", _kl_penalty, {}),
        (policy_loss, ALGORITHMS, "compute_policy_loss_vanilla", _policy_loss,
         {"registry": "POLICY_LOSS_REGISTRY", "added_as": "rlhf_fast"}),
    ]  # fmt: skip
    return [
        Target(module, name, {SIGNATURES[name]: maker}, **options)  # type: ignore[arg-type]
        for enabled, module, name, maker, options in wanted
        if enabled
    ]


def _logprobs_from_logits(original: Any) -> Any:
    names = original.__globals__

    def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
        if not served(logits, labels):
            return original(logits, labels, inplace_backward)
        # verl overwrites the logits only where it calls flash-attn; elsewhere its callers may still need them.
        inplace = inplace_backward and names.get("FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", False)
        return rf.token_logprobs(logits, labels, inplace_backward=inplace)

    return logprobs_from_logits


def _entropy_from_logits(original: Any) -> Any:
    def entropy_from_logits(logits: Tensor) -> Tensor:
        if not served(logits):
            return original(logits)
        return row_entropy(logits).to(logits.dtype)

    return entropy_from_logits


def _entropy_with_chunking(original: Any) -> Any:
    def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
        if not served(logits):
            return original(logits, chunk_size)
        return row_entropy(logits)

    return entropy_from_logits_with_chunking


def _fused_linear_forward(original: Any) -> Any:
    def forward(
        self: Any,
        hidden_states: Tensor,  # (T, H) or (B, T, H)
        vocab_weights: Tensor,  # (V, H)
        input_ids: Tensor,  # (T,) or (B, T), rolled
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        per_row = isinstance(temperature, Tensor) and temperature.dim() > 0
        if per_row or not served(hidden_states, vocab_weights, input_ids):
            return original(self, hidden_states, vocab_weights, input_ids, temperature)
        targets = input_ids.to(torch.int64)
        stats = rf.linear_token_stats(hidden_states, vocab_weights, targets, temperature=temperature)
        logprobs, entropy = logprobs_and_entropy(stats)
        return logprobs, entropy.to(hidden_states.dtype)

    return forward


def _linear_cross_entropy(original: Any) -> Any:
    def linear_cross_entropy(
        hidden: Tensor,  # (..., H)
        weight: Tensor,  # (V, H)
        labels: Tensor,  # (...)
        temperature: float = 1.0,
        reduction: str = "none",
        dist_process_group: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """(tokens,) each. A vocabulary split over ranks, or a reduction, goes to the original."""
        if reduction.lower() != "none" or dist_process_group is not None or not served(hidden, weight, labels):
            return original(hidden, weight, labels, temperature, reduction, dist_process_group)
        flat = hidden.reshape(-1, hidden.shape[-1])
        return logprobs_and_entropy(rf.linear_token_stats(flat, weight, labels.reshape(-1), temperature=temperature))

    return linear_cross_entropy


def _gae(original: Any) -> Any:
    def compute_gae_advantage_return(
        token_level_rewards: Tensor,  # (B, T)
        values: Tensor,  # (B, T)
        response_mask: Tensor,  # (B, T), 1 = token of the policy; masked tokens are skipped
        gamma: float,
        lam: float,
    ) -> tuple[Tensor, Tensor]:
        """Whitened advantages and returns; 0 at masked tokens, where verl leaves the next token's value."""
        if not served(token_level_rewards, values, response_mask) or int((response_mask != 0).sum()) < 2:
            return original(token_level_rewards, values, response_mask, gamma, lam)  # raises an error for one token
        mask = response_mask != 0
        rewards, values = as_one_dtype(token_level_rewards, values)
        advantages, returns = rf.gae(rewards, values, mask=mask, gamma=float(gamma), lam=float(lam))
        return rf.masked_whiten(advantages, mask), returns

    return compute_gae_advantage_return


def _kl_penalty(original: Any) -> Any:
    estimators = {"kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}

    def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
        estimator = estimators.get(kl_penalty.removesuffix("+"))
        if estimator is None or not served(logprob, ref_logprob) or logprob.shape != ref_logprob.shape:
            return original(logprob, ref_logprob, kl_penalty)
        logprob, ref_logprob = as_one_dtype(logprob, ref_logprob)
        limit = 10.0 if estimator == "k3" else None
        if kl_penalty.endswith("+"):
            return rf.approx_kl(logprob, ref_logprob, estimator=estimator, gradient="straight_through", clamp=limit)
        if estimator != "k3":
            return rf.approx_kl(logprob, ref_logprob, estimator=estimator)
        # Like verl's, the clamp stops the gradient; log_ratio_limit keeps exp from overflowing into 0 * inf.
        return rf.approx_kl(logprob, ref_logprob, estimator="k3", log_ratio_limit=20.0).clamp(max=10.0)

    return kl_penalty


def _policy_loss(original: Any) -> Any:
    names = original.__globals__  # verl's own agg_loss and masked_mean

    def compute_policy_loss_rlhf_fast(
        old_log_prob: Tensor,  # (B, T), as all tensors here
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """verl's "vanilla": dual-clipped PPO (Ye et al. 2020), the log-ratio limited to 20 nats."""
        low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
        high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
        bound = config.get("clip_ratio_c", 3.0)
        if bound <= 1.0:
            raise ValueError(f"clip_ratio_c must be greater than 1, got {bound}")
        log_ratio = (log_prob - old_log_prob).clamp(-20.0, 20.0)
        ratio = log_ratio.exp()
        plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high)
        worse, most = torch.maximum(plain, clipped), -advantages * bound
        losses = torch.where(advantages < 0, torch.minimum(most, worse), worse)
        if rollout_is_weights is not None:
            losses = losses * rollout_is_weights
        loss = names["agg_loss"](
            loss_mat=losses, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info
        )
        with torch.no_grad():
            shares = ((clipped > plain).float(), -log_ratio, ((worse > most) & (advantages < 0)).float())
            means = torch.stack([names["verl_F"].masked_mean(share, response_mask) for share in shares]).tolist()
        return loss, dict(zip(("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"), means, strict=True))

    return compute_policy_loss_rlhf_fast
