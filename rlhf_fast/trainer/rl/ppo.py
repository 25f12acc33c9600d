# SPDX-License-Identifier: Apache-2.0
"""Phase 3: reinforcement learning from a reward model by PPO (Schulman et al. 2017; Ouyang et al. 2022).

A copy of the SFT model is the policy, a frozen copy the reference; the critic starts as the reward model. One step:

    1. sample completions of a batch of prompts        5. values by the critic
    2. score them by the reward model                  6. advantages: reward = score - kl_coef x KL, GAE, whitening
    3. log-probabilities under the policy (old)        7. epochs over minibatches: clipped losses, AdamW
    4. log-probabilities under the reference           8. log, save

Everything per token is (B, T) and aligned with `input_ids`: `[b, t]` is the log-probability, value or reward of token t
of row b, read from the hidden state at t - 1, which has seen the tokens before t only. A value is therefore V(state
before emitting token t). The mask is True at the completion's tokens, the EOS that ended it included.

Every random number of step n is drawn from generators seeded by (seed, n): a resumed run repeats what would have been,
even where it was killed in the middle of an update. With several processes each has its share of a step's prompts, and
what is drawn for a sample, or which minibatch it falls into, depends on its number among all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.errors import Interrupted
from rlhf_fast.feedback.raters import load_rater
from rlhf_fast.models.batches import NO_ROWS, Batch, in_micro_batches
from rlhf_fast.models.fsdp import pad_to_ranks
from rlhf_fast.models.heads import token_kl, token_logprobs, token_logprobs_entropy, token_values
from rlhf_fast.models.loading import parameter_count
from rlhf_fast.models.optim import AdamW
from rlhf_fast.rollout.builtin import generate
from rlhf_fast.rollout.evaluate import Rater, evaluate
from rlhf_fast.rollout.rollout import Rollout, Sampler, SamplingParams
from rlhf_fast.run.autosave import Autosave
from rlhf_fast.run.checkpoint import require_space, seed_everything
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.run.progress import Progress, StopFlag, Timer, notice
from rlhf_fast.run.resume import finished_summary
from rlhf_fast.run.runtime import tune_process

from .agent import Agent, calibrate_critic, encode_prompts, load_agent, restore, save
from .checks import check_finite, check_logprobs, check_ratio
from .config import PPOConfig
from .dynamic_sampling import refill
from .metrics import Sampled, Watch, rollout_metrics
from .objectives import OBJECTIVES, Paid, Totals, best_and_worst, counted, exact_reference, payment, value_loss
from .policy_update import policy_backward
from .prompts import Prompts, read_asked

MAX_GRAD_NORM = 1.0


def train_ppo(config: PPOConfig, run: RunFolder, sampler: Sampler = generate) -> dict[str, Any]:
    """Run the phase in `run`; the resulting model is in `model/`. Returns the summary, which is in summary.json too.

    Raises UserError for wrong input or when a check fails, Interrupted after a Ctrl-C or SIGTERM (all is saved).
    """
    config.validate()
    if (finished := finished_summary(run, config)) is not None:
        return finished
    seed_everything(config.seed)
    tune_process()
    timer = Timer()
    rater = load_rater(config.rater) if config.rater else None
    scored = bool(config.reward_model or config.reward_functions)
    lines = read_asked(config.prompts_file, feedback=config.objective == "dpo", scored=scored)
    held_out_file = config.eval_prompts_file
    held_out_lines = read_asked(held_out_file, feedback=False, scored=scored) if held_out_file else []
    with timer("load"):
        agent = load_agent(config)
        prompts = encode_prompts(lines, config, agent)
        held_out = encode_prompts(held_out_lines, config, agent) if held_out_lines else None
    run.save_config(config)
    require_space(run.path, parameter_count(agent.policy) * (2 if agent.critic is not None else 1), config.save_steps)
    step = restore(agent, run)
    with timer("evaluate"):
        before = evaluate_once("before", agent, held_out, config, run, rater)

    metrics: dict[str, float] = {}
    watch = Watch()
    autosave = Autosave(run, config, (agent.policy, agent.critic), step, partial(save, agent, run))
    with StopFlag() as stop, Progress("ppo", config.max_steps) as bar, autosave:
        while step < config.max_steps and not out_of_time(config, timer, steps_done=step):
            with timer("step"):
                metrics = train_step(agent, prompts, config, step, timer, sampler)
            step += 1
            for message in watch.look(metrics):
                notice(f"step {step}: {message}")
            run.log({**metrics, **timer.lap()}, step)
            bar.update(step, **{name.partition("/")[2]: metrics[name] for name in SHOWN})
            if autosave.after_step(step, stop.requested):
                raise Interrupted(f"stopped after {step} of {config.max_steps} steps; --resume goes on")

        with timer("save"):  # still in reach of `stop`: a signal that comes now waits until all is written
            autosave.finish(step)
            run.save_model(agent.merged_policy(), agent.tokenizer)
        with timer("evaluate"):
            after = evaluate_once("after", agent, held_out, config, run, rater)
    return summarise(config, run, timer, step, before, after, metrics)


SHOWN = ("objective/scores", "objective/kl", "objective/entropy")


def train_step(
    agent: Agent, prompts: Prompts, config: PPOConfig, step: int, timer: Timer, sampler: Sampler = generate
) -> dict[str, float]:
    """One step of the algorithm; returns its metrics."""
    objective = OBJECTIVES[config.objective]

    # 1. and 2. Sample completions and score them, each rank those of its share of the prompts; with dynamic sampling in
    # rounds, until enough of them teach something. Rows of one prompt are next to each other.
    rollout, drawn = refill(
        lambda extra: sample(agent, prompts, config, step, extra, timer, sampler),
        lambda made: counted(payment(made, config), config),
        config.prompts_per_step,
        config.dynamic_sampling,
    )
    agent.asked += config.prompts_per_step * (1 + int(drawn.get("sample/extra_rounds", 0)))
    batch = rollout.batch
    paid = payment(rollout, config)
    better, unit = torch.zeros_like(paid, dtype=torch.bool), 1
    if objective.token_loss is None:  # learns from pairs alone
        samples = len(paid) * ranks().count // config.prompts_per_step  # feedback brings two a prompt
        pairs, unit = best_and_worst(paid, samples), 2
        batch, paid = batch.rows(pairs), paid[pairs]
        better = (paid[0::2] > paid[1::2]).repeat_interleave(2)

    # Which rows go through the models together. All passes of the step use the same cut, so that the update's first
    # minibatch runs the very matmuls of the old log-probabilities, and its ratio is 1 to the last bits.
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step + 500_000)
    plans = [
        pad_to_ranks(batch.plan(config.micro_batch_size, rows, unit), agent.policy, NO_ROWS)
        for rows in minibatches(len(paid), unit, config, generator)
    ]
    plan = [rows for part in plans for rows in part]

    # 3. and 4. Log-probabilities of the sampled tokens under the policy as it sampled, and under the reference.
    with timer("old_logprobs"):
        old_logprobs, entropy = logprobs_and_entropy(agent.policy, batch, plan, config.temperature)
        check_logprobs("old_logprobs", old_logprobs, batch.mask)
    with timer("reference"):
        if config.kl_estimator == "exact":
            kl = in_micro_batches(
                lambda part: token_kl(agent.policy, agent.reference, part, config.temperature), batch, plan
            )
            ref_logprobs = exact_reference(old_logprobs, kl)
        else:
            with agent.reference() as reference:
                ref_logprobs = in_micro_batches(
                    lambda part: token_logprobs(reference, part, config.temperature), batch, plan
                )
            check_logprobs("ref_logprobs", ref_logprobs, batch.mask)

    # 5. Values of the states before each token.
    with timer("critic"):
        values = torch.zeros_like(old_logprobs)
        if agent.critic is not None:
            values = in_micro_batches(lambda part: token_values(agent.critic, part), batch, plan)
            if step == 0:
                values = calibrate_critic(agent.critic, values, paid, batch.mask)
            check_finite("values", values, batch.mask)

    # 6. Rewards (the score at the last token, the KL at every token), advantages and returns.
    with timer("advantages"):
        priced = agent.at_price(config)
        made = objective.advantages(Paid(paid, old_logprobs, ref_logprobs, values, batch.mask), priced, ranks().group)
        check_finite("advantages", made.advantages, batch.mask)
    sampled = Sampled(batch, old_logprobs, ref_logprobs, values, made, better)

    # 7. Learn from them.
    with timer("update"):
        agent.train(config.gradient_checkpointing)  # in this mode only it works; dropout is off for good
        losses = update(agent, sampled, plans, priced, step, generator)
        agent.train(False)
    metrics = {**rollout_metrics(rollout, entropy, sampled), **drawn, **losses}
    metrics["objective/kl_coef"] = agent.kl_price.coef
    agent.kl_price.update(metrics["objective/kl"])
    return metrics


def sample(
    agent: Agent, prompts: Prompts, config: PPOConfig, step: int, extra: int, timer: Timer, sampler: Sampler
) -> Rollout:
    """The samples of this rank's share of a round of prompts, and their scores; `extra` 0 is the step's first round.

    A score is one number, by the reward model (read at the last token), by functions, by both, or by people.
    """
    with timer("generate"):
        chosen = prompts.chosen(agent.asked + extra * config.prompts_per_step, config.prompts_per_step, config.seed)
        mine = ranks().share(len(chosen), "prompts_per_step")
        rollout = prompts.ranked(chosen[mine]) or sampler(
            agent.policy,
            agent.tokenizer,
            [prompts.ids[i] for i in chosen[mine]],
            SamplingParams.of(config),
            seed=config.seed * 1_000_003 + step + extra * 10_000_019,
            samples_per_prompt=config.samples_per_prompt,
            first_prompt=mine.start,
            total_prompts=len(chosen),
        )
    with timer("reward"):
        if rollout.scores is None:
            batch = rollout.batch
            asked = [prompts.lines[i].prompt for i in chosen[mine]]
            plan = pad_to_ranks(batch.plan(config.micro_batch_size), agent.policy, NO_ROWS)
            rollout.scores = ranks().all_or_none(lambda: agent.rewards(batch, plan, asked, rollout.texts))
    return rollout


def minibatches(count: int, unit: int, config: PPOConfig, generator: torch.Generator) -> list[Tensor]:
    """This rank's rows of each minibatch. All ranks' rows are shuffled together, in units of `unit` rows."""
    first = ranks().index * count
    order = torch.randperm(ranks().count * count // unit, generator=generator)[:, None] * unit + torch.arange(unit)
    chunks = [chunk.flatten() for chunk in order.chunk(config.num_minibatches)]
    return [chunk[(chunk >= first) & (chunk < first + count)] - first for chunk in chunks]


def update(
    agent: Agent, sampled: Sampled, plans: list[list[Tensor]], config: PPOConfig, step: int, generator: torch.Generator
) -> dict[str, float]:
    """Epochs over minibatches, each one optimizer step; returns the means of the losses and of what they tell."""
    sums: dict[str, float] = {}
    done = 0
    for epoch in range(config.epochs):
        for index in range(len(plans)) if epoch == 0 else torch.randperm(len(plans), generator=generator).tolist():
            # Losses of the micro-batches are sums over tokens, over what the whole minibatch has on all ranks: how it
            # is cut does not change the gradient.
            rows = torch.cat([NO_ROWS, *plans[index]])
            totals = Totals(*ranks().total([float(sampled.batch.mask[rows].sum()), len(rows)]))
            # One model after the other, so that memory never holds the gradients of both.
            figures: dict[str, float] = {}
            if step >= config.critic_warmup:
                policy = partial(policy_gradients, agent, sampled, totals, config, epoch == index == 0)
                figures |= learn(policy, plans[index], agent.policy_optimizer, "policy/grad_norm")
            if agent.critic_optimizer is not None:
                critic = partial(critic_gradients, agent, sampled, totals, config)
                figures |= learn(critic, plans[index], agent.critic_optimizer, "val/grad_norm")
            for name, value in figures.items():
                check_finite(name, torch.tensor([value]))
                sums[name] = sums.get(name, 0.0) + value
            done += 1
            if config.early_stop_kl and figures.get("policy/approxkl_avg", 0.0) > config.early_stop_kl:
                return {**{name: value / done for name, value in sums.items()}, "policy/updates": done}
    return {**{name: value / done for name, value in sums.items()}, "policy/updates": done}


def learn(
    gradients: Callable[[Tensor], dict[str, float]], plan: list[Tensor], optimizer: AdamW, norm: str
) -> dict[str, float]:
    """One step of one model: add up the gradients of its micro-batches and what they tell, over all ranks."""
    sums: dict[str, float] = {}
    for rows in plan:
        for name, value in gradients(rows).items():
            sums[name] = sums.get(name, 0.0) + value
    names = sorted(set().union(*ranks().every(list(sums))))  # a rank without rows has none
    figures = dict(zip(names, ranks().total([sums.get(name, 0.0) for name in names]), strict=True))
    return {**figures, norm: optimizer.step(MAX_GRAD_NORM)}


def policy_gradients(
    agent: Agent, sampled: Sampled, totals: Totals, config: PPOConfig, first: bool, rows: Tensor
) -> dict[str, float]:
    """Add the policy's gradients of one micro-batch; what it adds to the means over the minibatch's tokens."""
    part = sampled.batch.rows(rows)
    old_logprobs = sampled.old_logprobs[rows, : part.input_ids.shape[1]]
    logprobs, figures = policy_backward(agent, sampled, part, rows, totals, config)
    if first:
        check_ratio(logprobs, old_logprobs, part.mask, agent.policy.dtype)
    log_ratio = (logprobs - old_logprobs)[part.mask]
    figures["policy/ratio"] = float(log_ratio.exp().sum()) / totals.tokens
    figures["policy/approxkl_avg"] = float((log_ratio.exp() - 1 - log_ratio).sum()) / totals.tokens
    return figures


def critic_gradients(
    agent: Agent, sampled: Sampled, totals: Totals, config: PPOConfig, rows: Tensor
) -> dict[str, float]:
    """The same of the critic."""
    part = sampled.batch.rows(rows)
    width = part.input_ids.shape[1]
    values, old_values = token_values(agent.critic, part), sampled.values[rows, :width]
    loss = value_loss(values, old_values, sampled.made.returns[rows, :width], part.mask, config.cliprange_value)
    (loss / totals.tokens).backward()
    return {"loss/value_avg": float(loss.detach()) / totals.tokens}


def logprobs_and_entropy(policy: Any, batch: Batch, plan: list[Tensor], temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, T) and the entropies (B, T) of the laws they belong to, in one pass."""

    def both(part: Batch) -> Tensor:
        return torch.stack(token_logprobs_entropy(policy, part, temperature), -1)

    logprobs, entropy = in_micro_batches(both, batch, plan).unbind(-1)
    return logprobs.contiguous(), entropy


def out_of_time(config: PPOConfig, timer: Timer, steps_done: int) -> bool:
    """True if one more step, the evaluation and saving would not end within `max_seconds`."""
    if not config.max_seconds or "step" not in timer.totals:
        return False
    step = timer.totals["step"] / max(1, timer.counts["step"])
    left = config.max_seconds - timer.elapsed() - timer.totals["evaluate"] - timer.totals["load"]
    if ranks().any(left < 1.2 * step):
        notice(f"the time limit of {config.max_seconds:.0f} s ends the phase after {steps_done} steps")
        return True
    return False


def evaluate_once(
    when: str, agent: Agent, held_out: Prompts | None, config: PPOConfig, run: RunFolder, rater: Rater | None
) -> dict[str, float]:
    """Figures on the held-out prompts, kept in eval_<when>.json and samples.jsonl; a resumed run reads them back."""
    if held_out is None:
        return {}
    name = f"eval_{when}.json"
    if run.resume and (run.path / name).exists():
        return run.read_json(name)
    figures, rows = evaluate(
        agent.policy,
        agent.reference,
        agent.rewards.model,
        agent.tokenizer,
        [line.prompt for line in held_out.lines],
        held_out.ids,
        SamplingParams.of(config),
        samples=config.eval_samples,
        micro_batch_size=config.micro_batch_size,
        rater=rater,
    )
    figures["reward"] = ranks().once(lambda: agent.rewards.pay(rows))
    run.append_jsonl("samples.jsonl", [{"when": when, **row} for row in rows], 0 if when == "before" else len(rows))
    run.write_json(name, figures)
    return figures


def summarise(
    config: PPOConfig,
    run: RunFolder,
    timer: Timer,
    steps: int,
    before: dict[str, float],
    after: dict[str, float],
    metrics: dict[str, float],
) -> dict[str, Any]:
    """Write and return summary.json: every figure of the evaluation before and after, and where the time went."""
    names = dict.fromkeys([*before, *after])
    summary: dict[str, Any] = {"steps": steps, "max_steps": config.max_steps, "objective": config.objective}
    for name in names:
        summary[f"{name}_before"], summary[f"{name}_after"] = before.get(name), after.get(name)
    summary["kl_final"] = after.get("kl", metrics.get("objective/kl"))
    summary["seconds"] = timer.elapsed()
    summary["seconds_by_part"] = {part: seconds for part, seconds in timer.totals.items() if part != "step"}
    run.write_json("summary.json", summary)
    return summary
