# SPDX-License-Identifier: Apache-2.0
"""OpenRLHF: log-probs, entropy, KL, the shaped reward, GAE and cumulative returns.

Its trainer and its workers are Ray processes, and each must be patched. Start it with

    python -m rlhf_fast.integrations.openrlhf -- --actor.model_name_or_path ...

and any other arguments that `openrlhf.cli.train_ppo_ray` takes.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

import torch
from torch import Tensor

import rlhf_fast as rf

from ._ops import as_one_dtype, row_entropy, served
from ._patch import Maker, Patch, Target, disabled, logger, patch_package

MINORS = ("0.11", "0.10", "0.9")
UTILS = "openrlhf.models.utils"
MAKER = "openrlhf.trainer.ppo_utils.experience_maker"
WORKER_HOOK = "rlhf_fast.integrations.openrlhf.patch_this_worker"

SIGNATURES = {
    "log_probs_from_logits": "logits, labels, temperature=1.0",
    "compute_entropy": "logits",
    "compute_approx_kl": "log_probs, log_probs_base, log_probs_old=None, kl_estimator='k1', unbiased_gradient=False",
    "compute_approx_kl, 0.11.0": "log_probs, log_probs_base, kl_estimator='k1'",
    "compute_reward": "r, kl_coef, kl, action_mask=None, reward_clip_range=None",
    "RemoteExperienceMaker.get_advantages_and_returns": "self, values, rewards, action_mask, gamma, lambd",
    "RemoteExperienceMaker.get_cumulative_returns": "self, rewards, action_mask, gamma",
}


def apply_rlhf_fast_to_openrlhf(
    *,
    logprob: bool = True,
    entropy: bool = True,
    kl: bool = True,
    reward: bool = True,
    gae: bool = True,
    force: bool = False,
) -> Patch:
    """Make OpenRLHF use our ops in this process; imports the modules that it patches.

    Args:
        logprob, entropy: `log_probs_from_logits`, `compute_entropy`.
        kl, reward: `compute_approx_kl`, `compute_reward`.
        gae: advantages and returns, and the cumulative returns of the estimators without a critic.
        force: also patch versions that were not tested.
    """
    return patch_package("openrlhf", MINORS, targets_of(logprob, entropy, kl, reward, gae), force=force)


def targets_of(
    logprob: bool = True, entropy: bool = True, kl: bool = True, reward: bool = True, gae: bool = True
) -> list[Target]:
    advantages, returns = (name for name in SIGNATURES if name.startswith("RemoteExperienceMaker"))
    wanted: list[tuple[bool, str, str, Maker]] = [
        (logprob, UTILS, "log_probs_from_logits", _log_probs_from_logits),
        (entropy, UTILS, "compute_entropy", _compute_entropy),
        (kl, UTILS, "compute_approx_kl", _compute_approx_kl),
        (reward, UTILS, "compute_reward", _compute_reward),
        (gae, MAKER, advantages, _advantages_and_returns),
        (gae, MAKER, returns, _cumulative_returns),
    ]
    targets = []
    for enabled, module, name, maker in wanted:
        makers = {SIGNATURES[name]: maker}
        if name == "compute_approx_kl":
            makers[SIGNATURES["compute_approx_kl, 0.11.0"]] = _compute_approx_kl_of_three
        if enabled:
            targets.append(Target(module, name, makers))
    return targets


def _log_probs_from_logits(original: Any) -> Any:
    def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        """Divides the logits in place, as OpenRLHF does."""
        if not served(logits, labels):
            return original(logits, labels, temperature)
        if temperature != 1.0:
            logits.div_(temperature)
        return rf.token_logprobs(logits, labels)

    return log_probs_from_logits


def _compute_entropy(original: Any) -> Any:
    def compute_entropy(logits: Tensor) -> Tensor:
        if not served(logits):
            return original(logits)
        return row_entropy(logits).to(logits.dtype)

    return compute_entropy


def _compute_approx_kl(original: Any) -> Any:
    importance_limit = original.__globals__.get("KL_IS_WEIGHT_CLIP", 10.0)

    def compute_approx_kl(
        log_probs: Tensor,  # (B, A), as all tensors here
        log_probs_base: Tensor,
        log_probs_old: Tensor | None = None,
        kl_estimator: str = "k1",
        unbiased_gradient: bool = False,
    ) -> Tensor:
        """At most 10 nats with every estimator; unbiased_gradient: k2's gradient times the importance ratio."""
        if not served(log_probs, log_probs_base) or kl_estimator not in ("k1", "k2", "k3"):
            return original(log_probs, log_probs_base, log_probs_old, kl_estimator, unbiased_gradient)
        logprobs, base = log_probs.float(), log_probs_base.float()
        if not unbiased_gradient:
            return _limited_kl(logprobs, base, kl_estimator)
        kl = rf.approx_kl(logprobs, base, estimator=kl_estimator, gradient="straight_through", clamp=10.0)
        if log_probs_old is None:
            return kl
        ratio = (logprobs.detach() - log_probs_old.detach().float()).exp().clamp(max=importance_limit)
        return kl.detach() + ratio * (kl - kl.detach())

    return compute_approx_kl


def _compute_approx_kl_of_three(original: Any) -> Any:
    def compute_approx_kl(log_probs: Tensor, log_probs_base: Tensor, kl_estimator: str = "k1") -> Tensor:
        """Before 0.11.1, without importance weights."""
        if not served(log_probs, log_probs_base) or kl_estimator not in ("k1", "k2", "k3"):
            return original(log_probs, log_probs_base, kl_estimator)
        return _limited_kl(log_probs.float(), log_probs_base.float(), kl_estimator)

    return compute_approx_kl


def _limited_kl(logprobs: Tensor, base: Tensor, estimator: str) -> Tensor:
    """Like OpenRLHF's, the outer clamp stops the gradient; the inner one keeps exp from overflowing into 0 * inf."""
    if estimator == "k3":
        logprobs, base = (logprobs - base).clamp(min=-10.0), torch.zeros_like(base)
    return rf.approx_kl(logprobs, base, estimator=estimator).clamp(-10.0, 10.0)


def _compute_reward(original: Any) -> Any:
    def compute_reward(
        r: Tensor,  # (B,)
        kl_coef: float,
        kl: Tensor,  # (B, A)
        action_mask: Tensor | None = None,  # (B, A)
        reward_clip_range: tuple[float, float] | None = None,
    ) -> Tensor:
        """-kl_coef * kl, plus the score at the last real token; in a row without one, at the end of the row."""
        if action_mask is None or not isinstance(r, Tensor) or not isinstance(kl, Tensor):
            return original(r, kl_coef, kl, action_mask, reward_clip_range)
        if reward_clip_range:
            r = r.clamp(min=reward_clip_range[0], max=reward_clip_range[1])
        last = action_mask.shape[1] - 1 - action_mask.long().fliplr().argmax(dim=1, keepdim=True)
        rewards = kl * -max(kl_coef, 0.0)
        return rewards.scatter_add_(1, last, r.unsqueeze(1).to(rewards.dtype))

    return compute_reward


def _real(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.where(mask != 0, x, torch.zeros((), dtype=x.dtype, device=x.device))


def _advantages_and_returns(original: Any) -> Any:
    def get_advantages_and_returns(
        self: Any,
        values: Tensor,  # (B, A), as all tensors here
        rewards: Tensor,
        action_mask: Tensor | None,
        gamma: float,
        lambd: float,
    ) -> tuple[Tensor, Tensor]:
        """Masked tokens have value and reward 0; advantages decay across them, and they get advantages too."""
        if not served(values, rewards):
            return original(self, values, rewards, action_mask, gamma, lambd)
        values, rewards = as_one_dtype(_real(values, action_mask), _real(rewards, action_mask))
        return rf.gae(rewards, values, gamma=gamma, lam=lambd)

    return get_advantages_and_returns


def _cumulative_returns(original: Any) -> Any:
    def get_cumulative_returns(
        self: Any,
        rewards: Tensor,  # (B, A)
        action_mask: Tensor | None,  # (B, A)
        gamma: float,
    ) -> Tensor:
        """GAE without values and with lam = 1 is the discounted sum of future rewards."""
        if not served(rewards):
            return original(self, rewards, action_mask, gamma)
        real = _real(rewards, action_mask)
        return rf.gae(real, torch.zeros_like(real), gamma=gamma, lam=1.0)[1]

    return get_cumulative_returns


# ----------------------------------------------------------------------------------------------- the launcher


def patch_this_worker() -> None:
    """Ray calls this in each new worker. It imports no module of OpenRLHF: a vLLM worker must not load DeepSpeed."""
    try:
        patch_package("openrlhf", MINORS, targets_of(), wait=True)
    except Exception:  # a worker whose set-up hook raises does not start
        logger.exception("OpenRLHF is not patched in this worker")


def hook_ray(ray: Any) -> None:
    """Make `ray.init` run `patch_this_worker` in every worker."""
    init = ray.init

    def init_with_hook(*args: Any, runtime_env: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        return init(*args, runtime_env={**(runtime_env or {}), "worker_process_setup_hook": WORKER_HOOK}, **kwargs)

    ray.init = init_with_hook


def main(arguments: list[str]) -> None:
    """Run OpenRLHF's PPO command, patched in this process and in all Ray workers."""
    import ray

    if not disabled():
        patch_this_worker()
        hook_ray(ray)
    command = "openrlhf.cli.train_ppo_ray"
    sys.argv = [command, *(arguments[1:] if arguments[:1] == ["--"] else arguments)]
    runpy.run_module(command, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
