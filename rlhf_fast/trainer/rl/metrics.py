# SPDX-License-Identifier: Apache-2.0
"""Metrics of a step's samples over all ranks, with the names of TRL and cleanrl."""

from __future__ import annotations

import torch
from torch import Tensor

import rlhf_fast as rf
from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.run.verdicts import LiveVerdict, Rows, of_rl_so_far

from .checks import RATIO_NOTABLE
from .experience import Experience
from .objectives.dpo import PairOptions, pair_figures
from .objectives.objective import KLOptions, sampled_estimator

MANY_CLIPPED = 0.1  # share of scores


class Watch:
    """Warns of problems that each step's metrics show and that raise no error; each warning once."""

    def __init__(self, rows: Rows = ()) -> None:
        """`rows`: metrics of the steps before, in a resumed run, for the verdict and the entropy at the start."""
        self.verdict = LiveVerdict(of_rl_so_far, rows)
        self.first_entropy: float | None = rows[0].get("objective/entropy") if rows else None
        self.warned: set[str] = set()

    def look(self, metrics: dict[str, float]) -> list[str]:
        """New warnings for the user."""
        entropy, many = metrics.get("objective/entropy"), torch.inf  # ranked completions have no such metrics
        if self.first_entropy is None:
            self.first_entropy = entropy
        warnings = {
            "entropy": entropy is not None
            and self.first_entropy is not None
            and entropy < 0.2 * self.first_entropy
            and f"the entropy has fallen from {self.first_entropy:.2f} to {entropy:.2f} nats a token: samples become "
            "alike; a larger kl_coef or a smaller lr keeps them apart",
            "ended": metrics.get("sample/ended", many) == 0
            and "no completion of this step ended by itself: the score is read where each was cut off; raise "
            "max_new_tokens, set missing_eos_penalty, or see that SFT taught the end-of-sequence token",
            "unfilled": metrics.get("sample/unfilled", 0) > 0
            and f"{metrics['sample/unfilled']:.0f} prompts of this step teach nothing, as all their samples earned the "
            f"same, and dynamic_sampling {metrics['sample/extra_rounds']:.0f} found no others: raise it or "
            "samples_per_prompt, or see whether the prompts are too easy or hopeless",
            "clipped": metrics.get("objective/scores_clipped", 0) > MANY_CLIPPED
            and f"score_clip cuts {metrics.get('objective/scores_clipped', 0):.0%} of this step's scores, which then "
            "cannot be told apart: raise it, or train a reward model whose normaliser fits these samples",
            "ratio": metrics.get("policy/ratio_gap", 0) > RATIO_NOTABLE
            and f"log-probabilities of the same tokens differ by up to {metrics.get('policy/ratio_gap', 0):.2f} nats "
            "between two passes, as rounding in 16 bits can do (a mixture of experts, another attention kernel); the "
            "mean is within bounds. dtype float32 shows whether it is rounding",
            "filtered": metrics.get("sample/learned", 1) == 0
            and "overlong_filter has left out every sample of this step, as none ended by itself: raise max_new_tokens",
            "scores": metrics.get("objective/scores_std", many) < 1e-6
            and "all completions of this step got the same score: there is nothing to learn from them",
        }
        new = {name: text for name, text in warnings.items() if isinstance(text, str) and name not in self.warned}
        self.warned |= set(new)
        return list(new.values())


def rollout_metrics(
    rollout: Rollout, experience: Experience, kl: KLOptions | None, *, critic: bool
) -> dict[str, float]:
    """Means over all samples of the step, once the update is done; `val/...` with a `critic` alone.

    objective/kl: nats per sequence, left out without `kl`, where nothing is known of the reference.
    objective/entropy: nats per token. objective/rlhf_reward: reward minus the KL penalty. val/explained_variance:
    1 - Var(returns - values) / Var(returns), over tokens.
    """
    mask = experience.batch.mask
    nats, coef = torch.zeros_like(experience.rewards), 0.0
    if kl is not None:
        coef, estimator = kl.reward_coef, sampled_estimator(kl)
        nats = rf.approx_kl(experience.old_logprobs, experience.ref_logprobs, estimator=estimator, mask=mask).sum(1)
    by_sample = torch.stack([nats, experience.rewards - coef * nats], 1)
    assert rollout.scores is not None
    by_completion = torch.stack([rollout.scores, rollout.response_mask.sum(1).float(), rollout.ended.float()], 1)
    by_token = torch.stack([experience.entropy[mask], experience.returns[mask], experience.values[mask]], 1)
    kls, rewards = ranks().cat(by_sample).unbind(1)
    scores, lengths, ended = ranks().cat(by_completion).unbind(1)
    entropies, returns, values = ranks().cat(by_token).unbind(1)
    figures = {
        **({} if kl is None else {"objective/kl": kls.mean()}),
        "objective/entropy": entropies.mean(),
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(),
        "objective/rlhf_reward": rewards.mean(),
        **(critic_metrics(returns, values) if critic else {}),
        "sample/length": lengths.mean(),
        "sample/ended": ended.mean(),
        "sample/learned": ranks().cat(experience.learned[mask].float()).mean(),
        **{name: ranks().cat(numbers).nanmean() for name, numbers in sorted(rollout.score_parts.items())},
    }
    return {name: float(value) for name, value in figures.items()}


def pair_metrics(experience: Experience, options: PairOptions) -> dict[str, float]:
    """Means over all prompts that have pairs, by the policy before this step's update, with the names of TRL.

    A completion's reward is beta log p / p_ref. Empty if no prompt has pairs.
    """
    log_ratios = (experience.old_logprobs - experience.ref_logprobs).sum(1)
    by_prompt = (-1, options.samples)
    rounding = None if experience.rounding is None else experience.rounding.view(by_prompt)
    figures = pair_figures(log_ratios.view(by_prompt), experience.rewards.view(by_prompt), options.beta, rounding)
    figures = ranks().cat(figures)
    if not len(figures):
        return {}
    chosen, rejected, right = figures.double().mean(0).tolist()
    names = ("chosen", "rejected", "margins", "accuracies")
    return dict(zip((f"rewards/{name}" for name in names), (chosen, rejected, chosen - rejected, right), strict=True))


def critic_metrics(returns: Tensor, values: Tensor) -> dict[str, Tensor]:
    """How well the values (N,) predict the returns (N,) of the same tokens."""
    return {
        "val/explained_variance": 1 - (returns - values).var() / returns.var().clamp(min=1e-8),
        "val/mean": values.mean(),
    }
