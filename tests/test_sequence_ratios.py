# SPDX-License-Identifier: Apache-2.0
"""Ratios of whole sequences: GSPO's and RLOO's losses, fused and composed, against their papers' formulas."""

from __future__ import annotations

import pytest
import torch
from helpers import truths
from helpers.tools import randint, randn, random_mask, upcast
from torch import Tensor

import rlhf_fast as rf
from rlhf_fast.ops.token_losses import importance_ratio, sequence_log_ratio

B, T, HIDDEN, VOCABULARY, CLIP = 6, 7, 16, 101, 0.2


class Case:
    """Sequences on both sides of the clip, of different lengths."""

    def __init__(self, generator: torch.Generator) -> None:
        self.leaves = {
            "hidden": randn(B, T, HIDDEN, generator=generator),
            "weight": randn(VOCABULARY, HIDDEN, generator=generator, scale=0.4),
        }
        self.targets = randint(VOCABULARY, B, T, generator=generator)
        self.mask = random_mask(B, T, generator=generator, share=0.7)
        self.mask[:, 0] = True
        logprobs = truths.token_stats(truths.linear_logits(*(upcast(x) for x in self.leaves.values())), self.targets)
        drift = torch.linspace(-0.6, 0.6, B).unsqueeze(-1) + randn(B, T, generator=generator, scale=0.2)
        self.old = (logprobs["logprobs"] - drift).float()
        self.advantages = randn(B, 1, generator=generator).expand(B, T)


def truth(case: Case, leaves: dict[str, Tensor], mean: bool) -> Tensor:
    """Mean over sequences of -min(s A, clip(s) A): GSPO's eq. 5 and 7 with the mean, TRL's RLOO with the sum."""
    logits = truths.linear_logits(leaves["hidden"], leaves["weight"])
    logprobs = truths.token_stats(logits, case.targets)["logprobs"]
    losses = []
    for b in range(B):
        real = case.mask[b]
        log_ratio = (logprobs[b] - case.old[b].double())[real]
        ratio = (log_ratio.mean() if mean else log_ratio.sum()).exp()
        gain = case.advantages[b, 0].double()
        losses.append(-torch.minimum(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain))
    return torch.stack(losses).mean()


def fused(case: Case, leaves: dict[str, Tensor], mean: bool) -> Tensor:
    with torch.no_grad():
        logprobs = rf.linear_token_logprobs(**leaves, targets=case.targets, mask=case.mask)
    return rf.linear_policy_loss(
        **leaves, targets=case.targets, old_logprobs=case.old, advantages=case.advantages, mask=case.mask, clip=CLIP,
        log_ratio=sequence_log_ratio(logprobs, case.old, case.mask, mean=mean),
        normalizer=B * case.mask.sum(-1, keepdim=True) if mean else B,
    ).loss  # fmt: skip


def composed(case: Case, leaves: dict[str, Tensor], mean: bool) -> Tensor:
    """As the docstring of token_losses has it."""
    logprobs = rf.linear_token_logprobs(**leaves, targets=case.targets, mask=case.mask)
    ratio = importance_ratio(sequence_log_ratio(logprobs, case.old, case.mask, mean=mean))
    loss = -torch.minimum(ratio * case.advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * case.advantages)
    return (loss * case.mask / (B * case.mask.sum(-1, keepdim=True))).sum()


@pytest.mark.parametrize("backend", ["torch", "native"], indirect=True)
@pytest.mark.parametrize("mean", [True, False], ids=["gspo", "rloo"])
@pytest.mark.parametrize("way", [fused, composed])
def test_a_sequence_ratio(backend: str, mean: bool, way: object, generator: torch.Generator) -> None:
    case = Case(generator)
    results = []
    for call, leaves in ((way, case.leaves), (truth, {k: upcast(v) for k, v in case.leaves.items()})):
        leaves = {k: v.clone().requires_grad_() for k, v in leaves.items()}
        loss = call(case, leaves, mean)
        results.append((loss.detach().double(), [g.double() for g in torch.autograd.grad(loss, list(leaves.values()))]))
    (loss, grads), (true, true_grads) = results
    assert max(float(g.abs().max()) for g in true_grads) > 0
    if way is composed or mean:  # with the sum the fused value counts a sequence once a token, see its docstring
        torch.testing.assert_close(loss, true, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads, true_grads, rtol=1e-4, atol=1e-6)


def test_a_log_ratio_is_used_as_given(generator: torch.Generator) -> None:
    """logprobs - old_logprobs handed in gives the same loss; its own gradient is not taken."""
    case = Case(generator)
    logprobs = rf.linear_token_logprobs(**case.leaves, targets=case.targets)
    per_token = case.leaves | {"targets": case.targets, "old_logprobs": case.old, "advantages": case.advantages}
    plain = rf.linear_policy_loss(**per_token, mask=case.mask)
    given = (logprobs - case.old).requires_grad_()
    handed = rf.linear_policy_loss(**per_token, mask=case.mask, log_ratio=given)
    torch.testing.assert_close(handed.loss, plain.loss)
    assert not handed.loss.requires_grad
    with pytest.raises(ValueError, match="linear_policy_loss: log_ratio must have the shape of the rows of hidden"):
        rf.linear_policy_loss(**per_token, mask=case.mask, log_ratio=given[:1])
