# SPDX-License-Identifier: Apache-2.0
"""The policy's loss and gradients on one batch, against each paper's formula in plain PyTorch on whole logits."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_fast.models import prefix_sharing
from rlhf_fast.models.batches import Batch, Support
from rlhf_fast.models.loading import load_causal_lm
from rlhf_fast.trainer import PPOConfig
from rlhf_fast.trainer.rl.experience import Experience
from rlhf_fast.trainer.rl.learn import minibatches
from rlhf_fast.trainer.rl.metrics import pair_metrics
from rlhf_fast.trainer.rl.objectives.objective import Totals
from rlhf_fast.trainer.rl.policy_update import PolicyResult, policy_backward
from rlhf_fast.trainer.rl.settings import Settings

LONGEST, ROWS = 6, 4
TEMPERATURE = 0.8  # of all losses: each way to a log-probability must divide by it


@pytest.fixture(scope="module")
def models(tiny: Path) -> tuple[Any, Any]:
    """A policy and a reference that differ from it."""
    policy, reference = (load_causal_lm(str(tiny / "model"), torch.float32) for _ in range(2))
    torch.manual_seed(0)
    for parameter in policy.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return policy, reference


def experience(models: tuple[Any, Any], spread: float = 0.6, cut: bool = False) -> Experience:
    """Four rows of one prompt; the policy that sampled is `spread` nats away at a token, the third row is not learned.

    `cut`: sampling kept every id, which takes the way of sampled log-probabilities. The advantages of a row differ, as
    with a KL in the reward or a correction for an engine.
    """
    policy, reference = models
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(2, policy.config.vocab_size, (ROWS, 2 + LONGEST), generator=generator)
    ids[:, :2] = ids[0, :2]
    real = torch.arange(2 + LONGEST) < torch.tensor([8, 5, 8, 3])[:, None]
    mask = real.clone()
    mask[:, :2] = False
    size, tokens = policy.config.vocab_size, int(mask.sum())
    support = Support(torch.arange(size).repeat(tokens), torch.arange(tokens + 1) * size) if cut else None
    with torch.no_grad():
        own, other = (logprobs_entropy(model, ids, real, mask)[0] for model in (policy, reference))
    noise = spread * torch.randn(own.shape, generator=generator) * mask
    of_rows = torch.randn(ROWS, 1, generator=generator)
    of_tokens = torch.randn(own.shape, generator=generator)
    advantages = (of_rows + of_tokens) * mask
    learned = mask & (torch.arange(ROWS) != 2)[:, None]
    rest = torch.zeros_like(own)
    return Experience(
        Batch(ids, real, mask, support), learned, torch.arange(4.0), own - noise, rest, other, rest, advantages, rest
    )


def logprobs_entropy(model: Any, ids: Tensor, real: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T) from whole logits."""
    logits = model(input_ids=ids, attention_mask=real.long()).logits[:, :-1].float()
    logp = (logits / TEMPERATURE).log_softmax(-1)
    pad = torch.nn.functional.pad
    sampled = pad(logp.gather(-1, ids[:, 1:, None]).squeeze(-1), (1, 0))
    return sampled * mask, pad(-(logp.exp() * logp).sum(-1), (1, 0)) * mask


def paper_loss(name: str, found: Experience, logprobs: Tensor, entropy: Tensor, config: PPOConfig) -> Tensor:
    """The loss of the batch, row by row and token by token."""
    assert config.cliprange is not None and config.cliprange_high is not None
    low, high, tokens = 1 - config.cliprange, 1 + config.cliprange_high, float(found.learned.sum())
    total = torch.zeros(())
    for b in range(ROWS):
        keep = found.learned[b]
        if not keep.any():
            continue
        log_ratio = (logprobs - found.old_logprobs)[b][keep]
        advantages, own, ref = found.advantages[b][keep], logprobs[b][keep], found.ref_logprobs[b][keep]
        if config.importance_ratio == "sequence-mean":
            ratio = log_ratio.mean().exp().detach() * (own - own.detach()).exp()  # GSPO-token, eq. 13 and 14
        elif config.importance_ratio == "sequence":
            ratio = log_ratio.sum().exp().detach() * (len(own) * (own - own.detach())).exp()
        else:
            ratio = log_ratio.exp()
        if name == "cispo":
            losses = -ratio.detach().clamp(low, high) * advantages * own
        else:
            losses = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
        if config.dual_clip:
            losses = torch.where(advantages < 0, torch.minimum(losses, -config.dual_clip * advantages), losses)
        if config.importance_ratio == "sequence" and name != "cispo":  # one number a sequence
            losses = losses / len(losses)
        if str(config.kl_in).startswith("loss"):
            gap = own - ref
            kl = {"k1": gap, "k2": 0.5 * gap**2, "k3": (-gap).exp() - 1 + gap}[str(config.kl_estimator)]
            if config.kl_in == "loss-straight-through":  # the value with the gradient of k2
                kl = kl.detach() + 0.5 * (gap**2 - gap.detach() ** 2)
            elif config.kl_in == "loss-importance":
                kl = log_ratio.exp() * kl
            losses = losses + config.kl_coef * kl
        losses = losses - config.entropy_coef * entropy[b][keep]
        if name in ("grpo", "gspo"):
            total = total + losses.mean() / ROWS
        elif name == "dr_grpo":
            total = total + losses.sum() / (ROWS * LONGEST)
        elif name == "rloo":
            total = total + losses.sum() / ROWS
        else:
            total = total + losses.sum() / tokens
    return total


def ours(models: tuple[Any, Any], found: Experience, config: PPOConfig) -> tuple[PolicyResult, dict[str, Tensor]]:
    policy, reference = models
    policy.zero_grad()

    def of_reference() -> AbstractContextManager[Any]:
        return nullcontext(reference)

    loss = Settings(config).step.update.loss
    totals = Totals(float(found.learned.sum()), ROWS, LONGEST)
    result = policy_backward(policy, of_reference, found, totals, loss)
    return result, {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def assert_close(gradients: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 2e-4) -> None:
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        gap, size = float((gradients[name] - gradient).abs().max()), float(gradient.abs().max())
        assert gap < tolerance * size + 1e-7, name


CASES: list[tuple[str, dict[str, Any]]] = [
    ("ppo", {}),
    ("ppo", {"dual_clip": 1.05, "entropy_coef": 0.3}),
    ("grpo", {"kl_coef": 0.5}),
    ("grpo", {"kl_coef": 0.5, "kl_in": "loss-straight-through", "kl_estimator": "k1"}),
    ("grpo", {"kl_coef": 0.5, "kl_in": "loss-importance"}),
    ("dr_grpo", {}),
    ("dapo", {"kl_coef": 0.3, "kl_estimator": "k2"}),
    ("cispo", {"cliprange": 0.1, "cliprange_high": 0.1}),
    ("cispo", {"importance_ratio": "sequence-mean", "cliprange": 0.1, "cliprange_high": 0.1}),
    ("cispo", {"importance_ratio": "sequence", "cliprange": 0.1, "cliprange_high": 0.1}),
    ("dapo", {"importance_ratio": "sequence"}),
    ("rloo", {"importance_ratio": "token"}),
    ("gspo", {"cliprange": 0.05, "cliprange_high": 0.1, "kl_coef": 0.3, "entropy_coef": 0.2}),
    ("rloo", {}),
    ("reinforce++-baseline", {"kl_coef": 0.3}),
]


# Entropy is of the whole vocabulary, so the options refuse it with top_k and top_p.
WAYS = [(*case, cut) for case in CASES for cut in (False, True) if not (cut and "entropy_coef" in case[1])]


@pytest.mark.parametrize(("name", "values", "cut"), WAYS)
def test_loss_and_gradients_are_the_papers(
    models: tuple[Any, Any], name: str, values: dict[str, Any], cut: bool
) -> None:
    config = PPOConfig(objective=name, num_minibatches=2, temperature=TEMPERATURE, **values).resolved()
    found = experience(models, cut=cut)
    result, gradients = ours(models, found, config)
    models[0].zero_grad()
    logprobs, entropy = logprobs_entropy(models[0], *found.batch[:3])
    loss = paper_loss(name, found, logprobs, entropy, config)
    loss.backward()
    wanted = {key: p.grad.clone() for key, p in models[0].named_parameters() if p.grad is not None}
    assert result.figures["loss/policy_avg"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    assert_close(gradients, wanted)
    assert 0 < result.figures["policy/clipfrac_avg"] <= 1 or config.importance_ratio == "sequence"


def test_the_exact_kl_in_the_loss_is_that_of_both_heads_at_the_temperature(models: tuple[Any, Any]) -> None:
    """Heads with a bias of their own."""
    policy, reference = models = copy.deepcopy(models)
    torch.manual_seed(1)
    for model in models:
        model.lm_head.bias = torch.nn.Parameter(0.5 * torch.randn(model.config.vocab_size))
    config = PPOConfig(
        objective="dapo", kl_in="loss", kl_estimator="exact", kl_coef=0.7, num_minibatches=2, temperature=TEMPERATURE
    ).resolved()
    found = experience(models)
    found = found._replace(advantages=torch.zeros_like(found.advantages))
    result, gradients = ours(models, found, config)
    policy.zero_grad()
    ids, real, _ = found.batch[:3]
    own, other = (
        (model(ids, attention_mask=real.long()).logits[:, :-1] / TEMPERATURE).log_softmax(-1)
        for model in (policy, reference)
    )
    kl = torch.nn.functional.pad((own.exp() * (own - other.detach())).sum(-1), (1, 0))
    loss = 0.7 * kl[found.learned].mean()
    loss.backward()
    assert loss.item() > 0.01
    assert result.figures["loss/policy_avg"] == pytest.approx(loss.item(), rel=1e-4)
    assert_close(gradients, {key: p.grad for key, p in policy.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++-baseline"])
def test_single_update_the_old_logprobs_are_the_updates_own(models: tuple[Any, Any], name: str, cut: bool) -> None:
    """Loss and gradient are those at ratio 1, though nobody took old log-probabilities before."""
    values = {"kl_in": "loss", "kl_estimator": "k3", "kl_coef": 0.2, "num_minibatches": 1, "temperature": TEMPERATURE}
    config = PPOConfig(objective=name, **values).resolved()
    found = experience(models, spread=0.0, cut=cut)
    assert Settings(config).step.update.loss.single_update
    result, gradients = ours(models, found._replace(old_logprobs=torch.zeros_like(found.old_logprobs)), config)
    models[0].zero_grad()
    logprobs, entropy = logprobs_entropy(models[0], *found.batch[:3])
    loss = paper_loss(name, found, logprobs, entropy, config)
    if name != "cispo":  # whose value is that of the log-probability, here of the ratio
        assert result.figures["loss/policy_avg"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)
    loss.backward()
    assert_close(gradients, {key: p.grad.clone() for key, p in models[0].named_parameters() if p.grad is not None})
    torch.testing.assert_close(result.logprobs, found.old_logprobs, atol=2e-5, rtol=1e-4)  # of all rows
    if not cut:
        assert result.entropy is not None
        torch.testing.assert_close(result.entropy, entropy, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("values", [{"label_smoothing": 0.2}, {"dpo_loss": "ipo"}], ids=str)
def test_pairs_have_the_loss_and_gradients_of_the_papers(models: tuple[Any, Any], values: dict[str, Any]) -> None:
    """Of sums over a sequence, at the temperature, in a mean over pairs; the second row of each pair is the better."""
    config = PPOConfig(objective="dpo", temperature=TEMPERATURE, kl_coef=0.3, num_minibatches=1, **values).resolved()
    found = experience(models)
    result, gradients = ours(models, found, config)
    models[0].zero_grad()
    worse, better = (logprobs_entropy(models[0], *found.batch[:3])[0] - found.ref_logprobs).sum(1).view(2, 2).unbind(1)
    margins, smoothing = better - worse, config.label_smoothing
    losses = -(1 - smoothing) * (0.3 * margins).sigmoid().log() - smoothing * (-0.3 * margins).sigmoid().log()
    if config.dpo_loss == "ipo":
        losses = (margins - 1 / 0.6) ** 2
    losses.mean().backward()
    assert result.figures["loss/policy_avg"] == pytest.approx(losses.mean().item(), rel=1e-4)
    told = pair_metrics(
        found._replace(old_logprobs=result.logprobs), Settings(config).step.at(0.3, 2).update.loss.pairs
    )
    assert told["rewards/accuracies"] == (margins > 0).float().mean()
    assert told["rewards/margins"] == pytest.approx(0.3 * margins.mean().item(), rel=1e-4)
    assert_close(gradients, {name: p.grad for name, p in models[0].named_parameters() if p.grad is not None})


@pytest.mark.parametrize("values", [{}, {"importance_ratio": "sequence-mean"}, {"kl_in": "loss", "epochs": 2}], ids=str)
def test_a_micro_batch_waits_for_no_device(
    models: tuple[Any, Any], values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors on "meta" have no values: whatever reads one, as it would have to wait for a GPU, fails."""
    policy, reference = (copy.deepcopy(model).to("meta") for model in models)
    monkeypatch.setattr(prefix_sharing, "packing_kernel", lambda model: "blocks")
    config = PPOConfig(objective="grpo", **{"kl_coef": 0.2, "kl_in": "loss", **values}).resolved()
    found = experience(models)
    batch = Batch(*(x.to("meta") for x in found.batch[:3]), copy=found.batch)
    meta = Experience(batch, *(x.to("meta") for x in found[1:9]), learned_copy=found.learned)
    part = meta.rows(torch.tensor([0, 1, 2, 3]))
    options = Settings(config).step.update.loss
    result = policy_backward(policy, lambda: nullcontext(reference), part, Totals(10.0, 4.0, LONGEST), options)
    assert {value.device.type for value in result.figures.values()} == {"meta"}
    assert all(p.grad is not None for p in policy.model.layers.parameters())


@pytest.mark.parametrize(
    ("values", "once"),
    [
        ({"objective": "grpo"}, True),
        ({"objective": "grpo", "epochs": 2}, False),
        ({"objective": "grpo", "num_minibatches": 2}, False),
        ({"objective": "grpo", "kl_in": "reward"}, False),
        ({"objective": "grpo", "kl_in": "loss-importance"}, False),
        ({"objective": "rloo"}, False),  # its KL is in the reward
        ({"objective": "rloo", "kl_coef": 0.0}, True),
        ({"objective": "ppo", "num_minibatches": 1, "kl_coef": 0.0}, False),
        ({"objective": "dpo", "num_minibatches": 1}, False),
    ],
)
def test_when_the_pass_of_old_logprobs_is_left_out(values: dict[str, Any], once: bool) -> None:
    config = PPOConfig(**values).resolved()
    assert Settings(config).step.update.loss.single_update == once


def test_minibatches_hold_every_row_once() -> None:
    parts = minibatches(12, 3, 4, torch.Generator().manual_seed(0))
    assert sorted(torch.cat(parts).tolist()) == list(range(12))
    assert all(part.view(-1, 3).diff(dim=1).eq(1).all() for part in parts)
    orders = [torch.cat(minibatches(12, 3, 4, torch.Generator().manual_seed(seed))).tolist() for seed in range(4)]
    assert len(set(map(tuple, orders))) > 2
