# SPDX-License-Identifier: Apache-2.0
"""One result, whichever way it is computed: PPO in plain Python, the reference ops, demonstrations padded or packed."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import phases
from helpers.ppo_runs import load_agent, prompts_of, train_step
from helpers.tools import native_is_built
from torch import Tensor

import rlhf_fast as rf
from rlhf_fast.data.examples import read_sft
from rlhf_fast.data.limits import Limits
from rlhf_fast.models.loading import load_causal_lm, load_tokenizer
from rlhf_fast.rollout.builtin import generate
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.trainer import PPOConfig
from rlhf_fast.trainer.sft import packing
from rlhf_fast.trainer.sft import train as sft

STEP = 1  # the first step also fits the critic's head, which test_ppo.py looks at


class Recorded:
    """One step of PPO: the sampled batch, and the models and gradients before each optimizer step."""

    def __init__(self, config: PPOConfig, spread: float = 0.03) -> None:
        """The policy begins away from the reference, so that there is a KL."""
        self.config, self.agent = config.resolved(), load_agent(config)
        torch.manual_seed(3)
        for parameter in self.agent.policy.parameters():
            parameter.data += spread * torch.randn_like(parameter)
        self.models: list[tuple[Any, Any]] = [self._copies()]  # as they sampled, then before each optimizer step
        self.gradients: dict[str, list[dict[str, Tensor]]] = {"policy": [], "critic": []}
        self.limits: list[float | None] = []  # of the gradients' norms
        self._watch("policy", self.agent.policy, self.agent.policy_optimizer)
        if self.agent.critic_optimizer is not None:
            self._watch("critic", self.agent.critic, self.agent.critic_optimizer)
        prompts = prompts_of(config, self.agent)
        other = replace(config, kl_coef=9.0)  # the agent's coefficient counts, which a target may have moved
        self.figures = train_step(self.agent, prompts, other, STEP, self._sample)

    def _copies(self) -> tuple[Any, Any]:
        return copy.deepcopy(self.agent.policy), copy.deepcopy(self.agent.critic)

    def _sample(self, *args: Any, **options: Any) -> Rollout:
        self.rollout = generate(*args, **options)
        return self.rollout

    def _watch(self, name: str, model: Any, optimizer: Any) -> None:
        step = optimizer.step

        def watched(norm: float | None = None) -> float:
            if name == "policy":
                self.models.append(self._copies())
            found = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
            self.gradients[name].append(found)
            self.limits.append(norm)
            return float(step(norm))

        optimizer.step = watched


# --------------------------------------------------------------------------------------- PPO in plain Python


def distribution_of(model: Any, ids: Tensor, start: int, temperature: float) -> Tensor:
    """(n, V) log-probabilities of all ids in the places of the completion's tokens, of one sequence without pads."""
    return (model(ids[None]).logits[0, start - 1 : -1].float() / temperature).log_softmax(-1)


def logprobs_of(model: Any, ids: Tensor, start: int, temperature: float) -> Tensor:
    """(n,) of the completion's tokens."""
    return distribution_of(model, ids, start, temperature).gather(-1, ids[start:, None]).squeeze(-1)


def values_of(critic: Any, ids: Tensor, start: int) -> Tensor:
    """(n,) of the states before the completion's tokens."""
    states = critic.base_model(ids[None]).last_hidden_state[0, start - 1 : -1]
    return critic.score(states).squeeze(-1)


def score_of(model: Any, ids: Tensor) -> float:
    """Read at the last token, even where that is a pad token that was sampled, which the model's own forward skips."""
    raw = model.score(model.base_model(ids[None]).last_hidden_state[0, -1])
    return float((raw - model.config.score_mean) / model.config.score_std)


def advantages_of(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """GAE by its recursion."""
    made, carry, following = [0.0] * len(rewards), 0.0, 0.0
    for t in reversed(range(len(rewards))):
        carry = rewards[t] + gamma * following - values[t] + gamma * lam * carry
        made[t], following = carry, values[t]
    return made


class Sampled(NamedTuple):
    """The sequences of a step, and what PPO computes from them before the update."""

    rows: list[Tensor]  # ids without pads
    starts: list[int]  # of the completions
    old: list[Tensor]
    kls: list[Tensor]
    values: list[Tensor]
    advantages: list[list[float]]  # before whitening
    returns: list[Tensor]
    scores: list[float]
    earned: list[float]  # of all tokens of a completion
    entropies: list[float]  # of all tokens


@torch.no_grad()
def sampled(seen: Recorded) -> Sampled:
    config, made = seen.config, seen.rollout
    policy, critic = seen.models[0]
    found = Sampled(*([] for _ in Sampled._fields))
    for ids, mask, ended in zip(made.input_ids, made.attention_mask, made.ended.tolist(), strict=True):
        found.rows.append(ids[mask])
        start = int(mask.sum() - made.response_mask[len(found.starts)].sum())
        found.starts.append(start)
        law = distribution_of(policy, ids[mask], start, config.temperature)
        found.entropies.extend((-law.exp() * law).sum(-1).tolist())
        found.old.append(logprobs_of(policy, ids[mask], start, config.temperature))
        found.kls.append(found.old[-1] - logprobs_of(seen.agent.frozen, ids[mask], start, config.temperature))
        found.values.append(values_of(critic, ids[mask], start))
        found.scores.append(score_of(seen.agent.rewards.model, ids[mask]))
        penalty = 0.0 if ended else config.missing_eos_penalty
        rewards = [-config.kl_coef * float(kl) for kl in found.kls[-1]]
        rewards[-1] += max(-config.score_clip, min(config.score_clip, found.scores[-1])) - penalty
        found.earned.append(sum(rewards))
        found.advantages.append(advantages_of(rewards, found.values[-1].tolist(), config.gamma, config.lam))
        found.returns.append(torch.tensor(found.advantages[-1]) + found.values[-1])
    return found


def mean(values: Any) -> float:
    return sum(map(float, values)) / len(values)


def oracle(seen: Recorded) -> tuple[dict[str, list[dict[str, Tensor]]], dict[str, float]]:
    """The gradients of each optimizer step, and metrics, of PPO as the papers write it; one minibatch an epoch.

    The policy does not learn from completions that were cut off, the critic does.
    """
    config, ended, made = seen.config, seen.rollout.ended.tolist(), sampled(seen)
    every = [a for row in made.advantages for a in row]
    deviation = math.sqrt(sum((a - mean(every)) ** 2 for a in every) / (len(every) - 1))
    learned = sum(len(row) for row, whole in zip(made.advantages, ended, strict=True) if whole)
    gradients: dict[str, list[dict[str, Tensor]]] = {"policy": [], "critic": []}
    losses: dict[str, list[float]] = {"policy": [], "critic": []}
    ratios = []
    for policy, critic in seen.models[1:]:
        policy_loss, value_loss = torch.tensor(0.0), torch.tensor(0.0)
        for b, (ids, start) in enumerate(zip(made.rows, made.starts, strict=True)):
            now, old, target = values_of(critic, ids, start), made.values[b], made.returns[b]
            held = old + (now - old).clamp(-config.cliprange_value, config.cliprange_value)
            value_loss = value_loss + 0.5 * torch.maximum((now - target) ** 2, (held - target) ** 2).sum()
            if ended[b]:
                white = (torch.tensor(made.advantages[b]) - mean(every)) / deviation
                ratio = (logprobs_of(policy, ids, start, config.temperature) - made.old[b]).exp()
                near = ratio.clamp(1 - config.cliprange, 1 + config.cliprange)
                policy_loss = policy_loss + torch.maximum(-white * ratio, -white * near).sum()
                ratios.append(ratio.detach().double())
        of_models = {"policy": (policy, policy_loss / learned), "critic": (critic, value_loss / len(every))}
        for name, (model, loss) in of_models.items():
            model.zero_grad()
            loss.backward()
            losses[name].append(float(loss))
            gradients[name].append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    norms = {
        name: [torch.stack([g.norm() for g in one.values()]).norm() for one in of] for name, of in gradients.items()
    }
    ratio = torch.cat(ratios)
    return gradients, {
        "loss/policy_avg": mean(losses["policy"]),
        "loss/value_avg": mean(losses["critic"]),
        "policy/grad_norm": mean(norms["policy"]),
        "val/grad_norm": mean(norms["critic"]),
        "policy/ratio": float(ratio.mean()),
        "policy/approxkl_avg": float((ratio - 1 - ratio.log()).mean()),
        "sample/learned": learned / len(every),
        **figures_of(made, config),
    }


def figures_of(made: Sampled, config: PPOConfig) -> dict[str, float]:
    """Metrics of the samples."""
    targets, guesses = torch.cat(made.returns), torch.cat(made.values)
    return {
        "objective/kl": mean([kl.sum() for kl in made.kls]),
        "objective/scores": mean(made.scores),
        "objective/scores_std": float(torch.tensor(made.scores).clamp(-config.score_clip, config.score_clip).std()),
        "objective/rlhf_reward": mean(made.earned),
        "objective/entropy": mean(made.entropies),
        "val/mean": float(guesses.mean()),
        "val/explained_variance": 1 - float((targets - guesses).var() / targets.var()),
        "sample/length": mean(list(map(len, made.advantages))),
    }


def test_a_step_of_ppo_is_that_of_plain_python(job_data: Path) -> None:
    config = replace(
        phases.jobs(job_data)["ppo"], num_minibatches=1, epochs=3, temperature=0.7, kl_coef=0.3, gamma=0.98, lam=0.9,
        score_clip=1.0, micro_batch_size=3, lr=3e-3, critic_lr=2e-3, max_new_tokens=16, prompts_per_step=8,
        overlong_filter=True, max_grad_norm=0.75,
    )  # fmt: skip
    seen = Recorded(config)
    gradients, figures = oracle(seen)
    assert figures["objective/kl"] > 0.05 and seen.figures["policy/clipfrac_avg"] > 0.05  # there is something to see
    assert 0 < seen.figures["sample/ended"] < 1 and seen.limits == [0.75] * 6
    optimizers = seen.agent.policy_optimizer, seen.agent.critic_optimizer
    assert [one.param_groups[0]["lr"] for one in optimizers if one is not None] == [3e-3, 2e-3]
    for name in ("policy", "critic"):
        assert len(seen.gradients[name]) == len(gradients[name]) == 3
        for ours, theirs in zip(seen.gradients[name], gradients[name], strict=True):
            assert ours.keys() == theirs.keys()
            for key, gradient in theirs.items():
                gap, size = float((ours[key] - gradient).abs().max()), float(gradient.abs().max())
                assert gap < 1e-4 * size + 1e-7, (name, key)
    assert {key: seen.figures[key] for key in figures} == pytest.approx(figures, rel=1e-3, abs=1e-5)


# ------------------------------------------------------------------------------------ native or reference ops


@pytest.mark.skipif(not native_is_built(), reason="no compiled kernels")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kl_estimator": "exact", "kl_in": "loss", "objective": "grpo"},
        {"objective": "dpo"},
        {"objective": "dapo", "top_p": 0.9, "cliprange_high": 0.28, "kl_estimator": "k3", "kl_in": "loss"},
    ],
)
def test_the_reference_ops_give_the_same_step(job_data: Path, options: dict[str, Any]) -> None:
    config = replace(phases.jobs(job_data)["ppo"], temperature=0.8, **options)
    made = {}
    for backend in ("auto", "torch"):
        with rf.use_backend(backend):
            made[backend] = Recorded(config)
    one, other = made["auto"], made["torch"]
    assert torch.equal(one.rollout.input_ids, other.rollout.input_ids)
    assert other.figures == pytest.approx(one.figures, rel=1e-3, abs=1e-4)
    for name in ("policy", "critic"):
        for first, second in zip(one.gradients[name][:1], other.gradients[name][:1], strict=True):
            for key, gradient in first.items():
                gap, size = float((second[key] - gradient).abs().max()), float(gradient.abs().max())
                assert gap < 1e-3 * size + 1e-7, (name, key)


# ------------------------------------------------------------------------------------------ padded or packed


@pytest.mark.parametrize("width", [12, 24, 10_000])
def test_packed_demonstrations_have_the_gradient_of_padded_ones(job_data: Path, width: int) -> None:
    tokenizer = load_tokenizer(str(job_data / "model"))
    model = load_causal_lm(str(job_data / "model"), torch.float32)
    examples = sft.encode(tokenizer, read_sft(job_data / "demos.jsonl")[:13], Limits(32))
    made = []
    for batch in (packing.collate(examples, 0), packing.pack(examples, 0, width)):
        model.zero_grad()
        loss = sft.negative_log_likelihood(model, **batch)["loss"]
        loss.backward()
        made.append((float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters()}))
    (loss, gradients), (packed_loss, packed_gradients) = made
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        gap = float((packed_gradients[name] - gradient).abs().max())
        assert gap < 1e-4 * float(gradient.abs().max()), name
