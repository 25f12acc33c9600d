# SPDX-License-Identifier: Apache-2.0
"""Phase 3: reinforcement learning from a reward model by PPO (Schulman et al. 2017; Ouyang et al. 2022).

A copy of the SFT model is the policy, a frozen copy the reference; the critic starts as the reward model. One step:

    1. sample completions of a batch of prompts        5. values by the critic
    2. score them by the reward model                  6. advantages: reward = score - kl_coef x KL, GAE, whitening
    3. log-probabilities under the reference           7. PPO epochs over minibatches: clipped losses, AdamW
    4. log-probabilities under the policy (old)        8. log, save

Everything per token is (B, T) and aligned with `input_ids`: `[b, t]` is the log-probability, value or reward of token t
of row b, read from the hidden state at t - 1, which has seen the tokens before t only. A value is therefore V(state
before emitting token t). The mask is True at the completion's tokens, the EOS that ended it included.

Every random number of step n is drawn from generators seeded by (seed, n): a resumed run repeats what would have been.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import rlhf_fast as rf
from rlhf_fast.feedback.raters import RaterError, load_rater
from rlhf_fast.models.batches import Batch, in_micro_batches
from rlhf_fast.models.generate import Rollout, generate
from rlhf_fast.models.heads import token_logprobs, token_logprobs_entropy, token_values
from rlhf_fast.models.loading import parameter_count
from rlhf_fast.report.evaluate import Rater, evaluate
from rlhf_fast.run.checkpoint import require_space, seed_everything
from rlhf_fast.run.errors import Interrupted, UserError
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.run.progress import Progress, StopFlag, Timer, notice
from rlhf_fast.run.runtime import tune_process

from .agent import Agent, Prompts, calibrate_critic, load_agent, load_prompts, restore, save
from .checks import check_finite, check_logprobs, check_ratio
from .config import PPOConfig
from .objectives import ADVANTAGES, policy_loss, value_loss


def train_ppo(config: PPOConfig, run: RunFolder) -> dict[str, Any]:
    """Run the phase in `run`; the resulting model is in `model/`. Returns the summary, which is in summary.json too.

    Raises UserError for wrong input or when a check fails, Interrupted after a Ctrl-C or SIGTERM (all is saved).
    """
    config.validate()
    if run.resume and (run.path / "summary.json").exists():
        return run.read_json("summary.json")
    seed_everything(config.seed)
    tune_process()
    timer = Timer()
    rater = load_rater(config.rater) if config.rater else None
    with timer("load"):
        agent = load_agent(config)
        prompts = load_prompts(config.prompts_file, config, agent)
        held_out = load_prompts(config.eval_prompts_file, config, agent) if config.eval_prompts_file else None
    run.save_config(config)
    require_space(run.path, parameter_count(agent.policy) * (2 if agent.critic is not None else 1), config.save_steps)
    step = restore(agent, run)
    with timer("evaluate"):
        before = evaluate_once("before", agent, held_out, config, run, rater)

    metrics: dict[str, float] = {}
    with StopFlag() as stop, Progress("ppo", config.max_steps) as bar:
        while step < config.max_steps and not out_of_time(config, timer, steps_done=step):
            try:
                with timer("step"):
                    metrics = train_step(agent, prompts, config, step, timer)
            except RaterError as error:  # comes before anything of the step is learned
                save(agent, run, step)
                raise UserError(f"{error}; saved after {step} steps, --resume goes on from there") from error
            step += 1
            run.log({**metrics, **timer.lap()}, step)
            bar.update(step, **{name.partition("/")[2]: metrics[name] for name in SHOWN})
            stopping = stop.requested  # asked once: a signal between two questions would end the run unsaved
            if stopping or (config.save_steps and step % config.save_steps == 0):
                save(agent, run, step)
            if stopping:
                raise Interrupted(f"stopped after {step} of {config.max_steps} steps; --resume goes on")

        with timer("save"):  # still in reach of `stop`: a signal that comes now waits until all is written
            if config.save_steps:
                save(agent, run, step)
            with run.folder("model") as folder:
                agent.policy.save_pretrained(folder)
                agent.tokenizer.save_pretrained(folder)
        with timer("evaluate"):
            after = evaluate_once("after", agent, held_out, config, run, rater)
    return summarise(config, run, timer, step, before, after, metrics)


SHOWN = ("objective/scores", "objective/kl", "objective/entropy")


def train_step(agent: Agent, prompts: Prompts, config: PPOConfig, step: int, timer: Timer) -> dict[str, float]:
    """One step of the algorithm; returns its metrics."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)

    # 1. Sample completions. Rows of one prompt are next to each other.
    with timer("generate"):
        chosen = prompts_of_step(len(prompts.ids), config, step)
        rollout = generate(
            agent.policy,
            agent.tokenizer,
            [prompts.ids[i] for i in chosen],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            generator=generator,
            samples_per_prompt=config.samples_per_prompt,
        )
    batch, mask = (Batch(rollout.input_ids, rollout.attention_mask, rollout.response_mask), rollout.response_mask)

    # Which rows go through the models together. All passes of the step use the same cut, so that the update's first
    # minibatch runs the very matmuls of the old log-probabilities, and its ratio is 1 to the last bits.
    minibatches = torch.randperm(len(batch.input_ids), generator=generator).chunk(config.num_minibatches)
    plans = [batch.plan(config.micro_batch_size, rows) for rows in minibatches]
    plan = [rows for part in plans for rows in part]

    # 2. Score them: one number a completion, by the reward model (read at the last token), by functions, or by both.
    with timer("reward"):
        scores = agent.rewards(batch, plan, [prompts.lines[i].prompt for i in chosen], rollout.texts)
        penalised = scores - config.missing_eos_penalty * ~rollout.ended

    # 3. and 4. Log-probabilities of the sampled tokens under the reference and under the policy as it sampled.
    with timer("reference"):
        ref_logprobs = in_micro_batches(
            lambda part: token_logprobs(agent.reference, *part, config.temperature), batch, plan
        )
        check_logprobs("ref_logprobs", ref_logprobs, mask)
    with timer("old_logprobs"):
        old_logprobs, entropy = logprobs_and_entropy(agent.policy, batch, plan, config.temperature)
        check_logprobs("old_logprobs", old_logprobs, mask)

    # 5. Values of the states before each token.
    with timer("critic"):
        values = torch.zeros_like(old_logprobs)
        if agent.critic is not None:
            values = in_micro_batches(lambda part: token_values(agent.critic, *part), batch, plan)
            if step == 0:
                values = calibrate_critic(agent.critic, values, penalised, mask)
            check_finite("values", values, mask)

    # 6. Rewards (the score at the last token, the KL at every token), advantages and returns.
    with timer("advantages"):
        made = ADVANTAGES[config.objective](penalised, old_logprobs, ref_logprobs, values, mask, config)
        check_finite("advantages", made.advantages, mask)
    sampled = Sampled(batch, old_logprobs, values, made)

    # 7. Learn from them.
    with timer("update"):
        losses = update(agent, sampled, plans, config, generator)
    return {**rollout_metrics(rollout, scores, entropy, sampled), **losses}


@dataclass
class Sampled:
    """What the update learns from; all (B, T)."""

    batch: Batch
    old_logprobs: Tensor
    values: Tensor
    made: rf.Advantages


def update(
    agent: Agent, sampled: Sampled, plans: list[list[Tensor]], config: PPOConfig, generator: torch.Generator
) -> dict[str, float]:
    """PPO epochs over minibatches, each one optimizer step; returns the means of the losses and of what they tell."""
    sums: dict[str, float] = {}
    count = len(plans) * config.epochs
    for epoch in range(config.epochs):
        for index in range(len(plans)) if epoch == 0 else torch.randperm(len(plans), generator=generator).tolist():
            # Losses of the micro-batches are sums over tokens, divided by the tokens of the whole minibatch: how it
            # is cut does not change the gradient.
            tokens = sum(int(sampled.batch.mask[rows].sum()) for rows in plans[index])
            figures: dict[str, float] = {}
            for rows in plans[index]:
                for name, value in backward(agent, sampled, rows, tokens, config, first=epoch == index == 0).items():
                    figures[name] = figures.get(name, 0.0) + value
            figures["policy/grad_norm"] = agent.policy_optimizer.step(config.max_grad_norm)
            if agent.critic_optimizer is not None:
                figures["val/grad_norm"] = agent.critic_optimizer.step(config.max_grad_norm)
            for name, value in figures.items():
                check_finite(name, torch.tensor([value]))
                sums[name] = sums.get(name, 0.0) + value / count
    return sums


def backward(
    agent: Agent, sampled: Sampled, rows: Tensor, tokens: int, config: PPOConfig, first: bool
) -> dict[str, float]:
    """Add the gradients of one micro-batch, whose losses count as a share of `tokens`."""
    part = sampled.batch.rows(rows)
    width = part.input_ids.shape[1]
    old_logprobs, old_values = sampled.old_logprobs[rows, :width], sampled.values[rows, :width]

    logprobs = token_logprobs(agent.policy, *part, config.temperature)
    if first:
        check_ratio(logprobs, old_logprobs, part.mask, agent.policy.dtype)
    advantages = sampled.made.advantages[rows, :width]
    loss, figures = policy_loss(logprobs, old_logprobs, advantages, part.mask, config.cliprange)
    (loss / tokens).backward()
    figures["loss/policy_avg"] = loss.detach()

    if agent.critic is not None:
        values = token_values(agent.critic, *part)
        returns = sampled.made.returns[rows, :width]
        loss = value_loss(values, old_values, returns, part.mask, config.cliprange_value)
        (loss / tokens).backward()
        figures["loss/value_avg"] = loss.detach()
    return {name: float(value) / tokens for name, value in figures.items()}


def logprobs_and_entropy(policy: Any, batch: Batch, plan: list[Tensor], temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, T) and the entropies (B, T) of the laws they belong to, in one pass."""

    def both(part: Batch) -> Tensor:
        return torch.stack(token_logprobs_entropy(policy, *part, temperature), -1)

    logprobs, entropy = in_micro_batches(both, batch, plan).unbind(-1)
    return logprobs.contiguous(), entropy


def rollout_metrics(rollout: Rollout, scores: Tensor, entropy: Tensor, sampled: Sampled) -> dict[str, float]:
    """What the samples of a step say about the policy, with the names of TRL and cleanrl.

    objective/kl: nats per sequence. objective/entropy: nats per token. objective/rlhf_reward: score minus the price of
    the KL. val/explained_variance: 1 - Var(returns - values) / Var(returns), over tokens.
    """
    mask, made = rollout.response_mask, sampled.made
    lengths = mask.sum(1).float()
    returns, values = made.returns[mask], sampled.values[mask]
    unexplained = (returns - values).var() / returns.var().clamp(min=1e-8)
    figures = {
        "objective/kl": made.kl.sum(1).mean(),
        "objective/entropy": entropy[mask].mean(),
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(),
        "objective/rlhf_reward": made.rewards.sum(1).mean(),
        "val/explained_variance": 1 - unexplained,
        "val/mean": values.mean(),
        "sample/length": lengths.mean(),
        "sample/ended": rollout.ended.float().mean(),
    }
    return {name: float(value) for name, value in figures.items()}


def prompts_of_step(count: int, config: PPOConfig, step: int) -> list[int]:
    """Prompts in random order, each once before any comes again; the order is a function of the seed alone."""
    chosen = []
    for place in range(step * config.prompts_per_step, (step + 1) * config.prompts_per_step):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(config.seed * 7919 + place // count))
        chosen.append(int(order[place % count]))
    return chosen


def out_of_time(config: PPOConfig, timer: Timer, steps_done: int) -> bool:
    """True if one more step, the evaluation and saving would not end within `max_seconds`."""
    if not config.max_seconds or "step" not in timer.totals:
        return False
    step = timer.totals["step"] / max(1, timer.counts["step"])
    left = config.max_seconds - timer.elapsed() - timer.totals["evaluate"] - timer.totals["load"]
    if left < 1.2 * step:
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
        samples=config.eval_samples,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        micro_batch_size=config.micro_batch_size,
        rater=rater,
    )
    figures["reward"] = agent.rewards.pay(rows)
    run.append_jsonl("samples.jsonl", [{"when": when, **row} for row in rows])
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
