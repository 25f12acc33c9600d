# SPDX-License-Identifier: Apache-2.0
"""The policy's ratio is that of the distributions that tokens are drawn from, old and new alike.

The oracle is plain PyTorch on whole logits z. With K the ids that min-p, top-k and top-p kept when the token was
sampled, and T the temperature,

    p(a) = exp(z_a / T) / sum over i in K of exp(z_i / T)      ratio = p_new(a) / p_old(a)

in the clipped surrogate (Schulman et al. 2017, eq. 6 and 7). K is that of the policy that sampled, in all three models.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from rlhf_fast.models.loading import load_causal_lm, load_tokenizer
from rlhf_fast.rollout.builtin import generate
from rlhf_fast.rollout.rollout import Rollout, SamplingParams
from rlhf_fast.trainer import PPOConfig
from rlhf_fast.trainer.rl import score
from rlhf_fast.trainer.rl.experience import Experience
from rlhf_fast.trainer.rl.learn import UpdateOptions, policy_gradients
from rlhf_fast.trainer.rl.objectives.objective import Totals
from rlhf_fast.trainer.rl.settings import Settings

PROMPTS = [[5, 9, 11], [8], [6, 33, 21, 50, 4], [7, 19]]
SAMPLES, LONGEST = 4, 6
DRAWS: list[dict[str, Any]] = [
    {"temperature": 0.6}, {"temperature": 1.4, "top_k": 6}, {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 0.8, "min_p": 0.2}, {"temperature": 1.3, "top_k": 12, "top_p": 0.7, "min_p": 0.02},
]  # fmt: skip


class Models(NamedTuple):
    sampled: Any  # the policy that sampled
    moved: Any  # the policy some updates later
    reference: Any


@pytest.fixture(scope="module")
def models(tiny: Path) -> Models:
    torch.manual_seed(0)
    reference = load_causal_lm(str(tiny / "model"), torch.float32)

    def away(model: Any, spread: float) -> Any:
        model = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.data += spread * torch.randn_like(parameter)
        return model

    sampled = away(reference, 0.05)
    sampled.base_model.norm.weight.data.mul_(3.0)  # logits to which temperature and filters make a difference
    return Models(sampled, away(sampled, 0.04), reference)


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return load_tokenizer(str(tiny / "model"))


class Drawn(NamedTuple):
    """Samples, what was computed from them by the trainer, and the options it had."""

    rollout: Rollout
    config: PPOConfig
    experience: Experience


def drawn(models: Models, tokenizer: Any, draw: dict[str, Any], objective: str) -> Drawn:
    values = {"kl_in": "loss", "kl_estimator": "k3", "kl_coef": 0.3, "num_minibatches": 2}
    clips = {"cliprange": 0.05, "cliprange_high": 0.1}
    config = PPOConfig(objective=objective, max_new_tokens=LONGEST, **draw, **values, **clips).resolved()
    params = SamplingParams.of(config)
    rollout = generate(models.sampled, tokenizer, PROMPTS, params, seed=1, samples_per_prompt=SAMPLES)
    batch, options = rollout.batch, Settings(config).step.score
    plan = batch.plan(5)
    old, entropy = score.policy_logprobs(models.sampled, rollout, plan, options)
    agent: Any = SimpleNamespace(reference=lambda: nullcontext(models.reference))
    ref = score.reference_logprobs(agent, batch, plan, old, options)
    mask, rest = batch.mask, torch.zeros_like(old)
    advantages = torch.randn(old.shape, generator=torch.Generator().manual_seed(2)) * mask
    experience = Experience(batch, mask, rest[:, 0], old, entropy, ref, rest, advantages, rest)
    return Drawn(rollout, config, experience)


def updated(policy: Any, models: Models, found: Drawn, *, first: bool) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Figures and gradients of an update on all samples by the trainer, in micro-batches."""
    agent: Any = SimpleNamespace(policy=policy, reference=lambda: nullcontext(models.reference), largest_gap=0.0)
    options: UpdateOptions = Settings(found.config).step.update
    assert not options.loss.single_update
    mask = found.experience.learned
    totals, figures = Totals(float(mask.sum()), float(len(mask)), LONGEST), dict[str, float]()
    policy.zero_grad()
    for rows in found.experience.batch.plan(7):
        for name, value in policy_gradients(agent, found.experience, totals, options, first, rows).items():
            figures[name] = figures.get(name, 0.0) + float(value)
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    return {**figures, "gap": agent.largest_gap}, gradients


# -------------------------------------------------------------------------------------------------------- the oracle


def kept_of(logits: Tensor, config: PPOConfig) -> Tensor:
    """(V,) bool: the ids that one token was drawn from, each filter by its definition."""
    p = (logits / config.temperature).softmax(-1)
    keep = p >= config.min_p * p.max()
    if config.top_k:
        keep &= p >= p.topk(config.top_k).values[-1]
    if config.top_p == 1:
        return keep
    mass, total, nucleus = float(p[keep].double().sum()), 0.0, torch.zeros_like(keep)
    for i in p.argsort(descending=True).tolist():
        if keep[i] and total < config.top_p * mass:
            nucleus[i] = True
            total += float(p[i])
    return nucleus


def logits_of(model: Any, rollout: Rollout) -> Tensor:
    """(B, T, V): [b, t] are those of token t."""
    logits = model(rollout.input_ids, attention_mask=rollout.attention_mask.long()).logits.float()
    return torch.cat([torch.zeros_like(logits[:, :1]), logits[:, :-1]], 1)


@torch.no_grad()
def kept_sets(models: Models, found: Drawn) -> Tensor:
    """(B, T, V) bool, by the policy that sampled."""
    logits = logits_of(models.sampled, found.rollout)
    keep = torch.ones_like(logits, dtype=torch.bool)
    for b, t in found.rollout.response_mask.nonzero().tolist():
        keep[b, t] = kept_of(logits[b, t], found.config)
    return keep


def logprobs_of(model: Any, found: Drawn, keep: Tensor) -> Tensor:
    """(B, T) of the sampled tokens; differentiable."""
    rollout, logits = found.rollout, logits_of(model, found.rollout) / found.config.temperature
    logprobs = logits.masked_fill(~keep, -torch.inf).log_softmax(-1)
    logprobs = logprobs.gather(2, rollout.input_ids.unsqueeze(2)).squeeze(2)
    return torch.where(rollout.response_mask, logprobs, 0.0)


def paper(
    policy: Any, models: Models, found: Drawn, keep: Tensor
) -> tuple[dict[str, float], dict[str, Tensor], Tensor]:
    """Figures, gradients, and the log-ratios (B, T)."""
    config, mask = found.config, found.rollout.response_mask
    assert config.cliprange is not None and config.cliprange_high is not None and config.kl_coef is not None
    with torch.no_grad():
        old, ref = (logprobs_of(model, found, keep) for model in (models.sampled, models.reference))
    new, advantages, lengths = logprobs_of(policy, found, keep), found.experience.advantages, mask.sum(1, keepdim=True)
    log_ratio = new - old
    of_tokens = log_ratio.detach()
    if config.objective == "gspo":  # Zheng et al. 2025, eq. 14: its value is eq. 7's, its gradient the token's own
        log_ratio = (of_tokens.sum(1, keepdim=True) / lengths) + new - new.detach()
    ratio = log_ratio.exp()
    limited = ratio.clamp(1 - config.cliprange, 1 + config.cliprange_high)
    losses = -torch.minimum(ratio * advantages, limited * advantages)
    losses = losses + config.kl_coef * ((ref - new).exp() - 1 - (ref - new))
    loss = (losses * mask / (lengths * len(mask))).sum()
    policy.zero_grad()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    figures = {
        "loss/policy_avg": float(loss.detach()),
        "policy/ratio": float(of_tokens.exp()[mask].mean()),  # of tokens, and not clipped
        "policy/approxkl_avg": float((of_tokens.exp() - 1 - of_tokens)[mask].mean()),
    }
    return figures, gradients, of_tokens


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        gap, size = float((found[name] - gradient).abs().max()), float(gradient.abs().max())
        assert gap < 3e-4 * size + 1e-7, name


# --------------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("objective", ["grpo", "gspo"])
@pytest.mark.parametrize("draw", DRAWS, ids=str)
def test_ratio_and_gradient_are_those_of_what_tokens_are_drawn_from(
    models: Models, tokenizer: Any, draw: dict[str, Any], objective: str
) -> None:
    found = drawn(models, tokenizer, draw, objective)
    keep, mask = kept_sets(models, found), found.rollout.response_mask
    assert (found.rollout.support is not None) == (len(draw) > 1)
    if found.rollout.support is not None:
        counts = keep[mask].sum(1)
        assert counts.tolist() == found.rollout.support.offsets.diff().tolist()
        assert 1 < float(counts.float().mean()) < 0.6 * keep.shape[2]  # they cut something, and leave something
    for model, name in ((models.sampled, "old_logprobs"), (models.reference, "ref_logprobs")):
        with torch.no_grad():
            wanted = logprobs_of(model, found, keep)
        torch.testing.assert_close(getattr(found.experience, name), wanted, atol=1e-4, rtol=1e-4)
    # The first minibatch: the policy is the one that sampled.
    figures, gradients = updated(models.sampled, models, found, first=True)
    assert figures["gap"] < 1e-5 and figures["policy/ratio"] == pytest.approx(1, abs=1e-6)
    assert abs(figures["policy/approxkl_avg"]) < 1e-6
    assert_close(gradients, paper(models.sampled, models, found, keep)[1])
    # Later ones.
    figures, gradients = updated(models.moved, models, found, first=False)
    wanted_figures, wanted_gradients, log_ratio = paper(models.moved, models, found, keep)
    assert {name: figures[name] for name in wanted_figures} == pytest.approx(wanted_figures, rel=1e-3, abs=1e-5)
    assert_close(gradients, wanted_gradients)
    assert figures["policy/clipfrac_avg"] > 0 and float(log_ratio.abs().max()) > 0.2  # there is something to see


def test_other_distributions_have_another_ratio(models: Models, tokenizer: Any) -> None:
    """So the test above tells them apart: the whole vocabulary, temperature 1, what the moved policy would keep."""
    found = drawn(models, tokenizer, DRAWS[-1], "grpo")
    keep, mask = kept_sets(models, found), found.rollout.response_mask

    def ratios(old_keep: Tensor, new_keep: Tensor, temperature: float) -> Tensor:
        found.config.temperature = temperature
        with torch.no_grad():
            new, old = logprobs_of(models.moved, found, new_keep), logprobs_of(models.sampled, found, old_keep)
        return (new - old)[mask]

    temperature = found.config.temperature
    moved = kept_sets(models._replace(sampled=models.moved), found)
    every = torch.ones_like(keep)
    right = ratios(keep, keep, temperature)
    for wrong in (ratios(every, every, temperature), ratios(keep, keep, 1.0), ratios(keep, moved, temperature)):
        assert float((wrong - right).abs().max()) > 0.05
