# SPDX-License-Identifier: Apache-2.0
"""Step 7: epochs over minibatches, each one optimizer step of the policy and of the critic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.models.batches import NO_ROWS
from rlhf_fast.models.heads import token_values
from rlhf_fast.models.optim import AdamW

from .agent import Agent
from .checks import check_figures, check_ratio
from .experience import Experience
from .objectives.objective import Totals
from .objectives.ppo import value_loss
from .policy_update import PolicyLossOptions, policy_backward

Figures = dict[str, float]
Terms = dict[str, Tensor]  # of a micro-batch: numbers that are still being computed
Plans = list[list[Tensor]]  # for each minibatch, the rows of each micro-batch


@dataclass(frozen=True)
class UpdateOptions:
    """Options of an update on a step's samples."""

    loss: PolicyLossOptions
    epochs: int
    longest: int
    cliprange_value: float
    early_stop_kl: float
    max_grad_norm: float | None
    gradient_checkpointing: bool


def minibatches(count: int, unit: int, parts: int, generator: torch.Generator) -> list[Tensor]:
    """This rank's rows of each of `parts` minibatches. All ranks' rows are shuffled together, in units of `unit`.

    Raises ValueError if `parts` does not divide the number of units: some would weigh more than others.
    """
    first = ranks().index * count
    if ranks().count * count // unit % parts:
        raise ValueError(f"{parts} minibatches cannot share {ranks().count * count // unit} units of {unit} samples")
    order = torch.randperm(ranks().count * count // unit, generator=generator)[:, None] * unit + torch.arange(unit)
    chunks = [chunk.flatten() for chunk in order.chunk(parts)]
    return [chunk[(chunk >= first) & (chunk < first + count)] - first for chunk in chunks]


def update(
    agent: Agent,
    experience: Experience,
    plans: Plans,
    options: UpdateOptions,
    generator: torch.Generator,
    step: int,
    *,
    critic_only: bool = False,
) -> Figures:
    """Learn from a step's samples; returns losses and their figures, averaged over optimizer steps."""
    experience = experience.with_copies()
    sums: Figures = {}
    done, agent.largest_gap = 0, 0.0
    before = step * options.epochs * len(plans)  # optimizer steps
    for epoch in range(options.epochs):
        for index in range(len(plans)) if epoch == 0 else torch.randperm(len(plans), generator=generator).tolist():
            # A micro-batch's loss is its sum over tokens divided by the minibatch's token count on all ranks, so the
            # split into micro-batches does not change the gradient.
            rows = torch.cat([NO_ROWS, *plans[index]])
            counts = [float(x[rows].sum()) for x in (experience.learned, experience.batch.mask)]
            learned, tokens, sequences = ranks().total([*counts, len(rows)])
            # One model after the other, so that only one model's gradients are in memory.
            figures: Figures = {}
            if not critic_only:
                totals = Totals(learned, sequences, options.longest)
                policy = partial(policy_gradients, agent, experience, totals, options, epoch == index == 0)
                ptx = None
                if agent.demonstrations is not None:
                    ptx = partial(agent.demonstrations.backward, agent.policy, before + done, int(sequences))
                figures |= learn(policy, plans[index], agent.policy_optimizer, "policy/grad_norm", options, ptx)
            if agent.critic_optimizer is not None:
                critic = partial(critic_gradients, agent, experience, tokens, options)
                figures |= learn(critic, plans[index], agent.critic_optimizer, "val/grad_norm", options)
            check_figures(figures, step, done)
            for name, value in figures.items():
                sums[name] = sums.get(name, 0.0) + value
            done += 1
            if options.early_stop_kl and figures.get("policy/approxkl_avg", 0.0) > options.early_stop_kl:
                return {**{name: value / done for name, value in sums.items()}, "policy/updates": done}
    return {**{name: value / done for name, value in sums.items()}, "policy/updates": done}


def learn(
    gradients: Callable[[Tensor], Terms],
    plan: list[Tensor],
    optimizer: AdamW,
    norm: str,
    options: UpdateOptions,
    more: Callable[[], Terms] | None = None,
) -> Figures:
    """One optimizer step of one model: sums of gradients and figures over its micro-batches and all ranks.

    `more` adds gradients of other data than the plan's rows.
    """
    sums: Terms = {}
    for part in [*map(gradients, plan), *([more()] if more is not None else [])]:
        for name, value in part.items():
            sums[name] = sums[name] + value.double() if name in sums else value.double()
    names = sorted(set().union(*ranks().every(list(sums))))  # a rank without rows has none
    own = torch.stack(list(sums.values())).tolist() if sums else []  # the one wait for a GPU
    own_figures = dict(zip(sums, own, strict=True))
    figures = dict(zip(names, ranks().total([own_figures.get(name, 0.0) for name in names]), strict=True))
    return {**figures, norm: optimizer.step(options.max_grad_norm)}


def policy_gradients(
    agent: Agent, experience: Experience, totals: Totals, options: UpdateOptions, first: bool, rows: Tensor
) -> Terms:
    """Add the policy's gradients of one micro-batch; returns its terms of the minibatch's means."""
    part = experience.rows(rows)
    result = policy_backward(agent.policy, agent.reference, part, totals, options.loss)
    width, tokens = part.batch.mask.shape[1], max(totals.tokens, 1.0)
    if options.loss.single_update:  # the old log-probabilities are these
        experience.old_logprobs[rows, :width] = result.logprobs
        if result.entropy is not None:
            experience.entropy[rows, :width] = result.entropy
        part = experience.rows(rows)
    elif first:
        gap = check_ratio(result.logprobs, part.old_logprobs, part.learned, agent.policy)
        agent.largest_gap = max(agent.largest_gap, gap)
    log_ratio = (result.logprobs - part.old_logprobs).where(part.learned, -torch.inf)
    result.figures["policy/ratio"] = log_ratio.exp().sum() / tokens
    log_ratio = log_ratio.where(part.learned, 0.0)
    result.figures["policy/approxkl_avg"] = (log_ratio.exp() - 1 - log_ratio).sum() / tokens
    return result.figures


def critic_gradients(
    agent: Agent, experience: Experience, tokens: float, options: UpdateOptions, rows: Tensor
) -> Terms:
    """The same for the critic; `tokens` is the minibatch's token count."""
    part = experience.rows(rows)
    values = token_values(agent.critic, part.batch)
    loss = value_loss(values, part.values, part.returns, part.batch.mask, options.cliprange_value)
    (loss / tokens).backward()
    return {"loss/value_avg": loss.detach() / tokens}
