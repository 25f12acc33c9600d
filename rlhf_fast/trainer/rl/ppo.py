# SPDX-License-Identifier: Apache-2.0
"""Phase 3: reinforcement learning from a reward (Schulman et al. 2017; Ouyang et al. 2022).

A copy of the SFT model is the policy, a frozen copy the reference; the critic starts as the reward model. One step:

    1. sample completions of a batch of prompts        5. values by the critic
    2. score them by the reward model                  6. rewards with the KL, advantages (`objectives/`)
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

import math
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from rlhf_fast.data.examples import read_prompts, read_sft
from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.errors import Interrupted
from rlhf_fast.feedback.raters import load_rater
from rlhf_fast.models.loading import parameter_count
from rlhf_fast.rollout.builtin import generate
from rlhf_fast.rollout.mismatch import Correction, mismatch_metrics
from rlhf_fast.rollout.rollout import Sampler
from rlhf_fast.rollout.sampler import SERVER_LOG, Served, open_sampler
from rlhf_fast.run.autosave import Autosave
from rlhf_fast.run.checkpoint import require_space, seed_everything
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.run.progress import Progress, StopFlag, Timer, notice
from rlhf_fast.run.resume import finished_summary
from rlhf_fast.run.runtime import tune_process
from rlhf_fast.run.threads import threads

from .agent import Agent, encode_prompts, load_agent, restore, save
from .checks import check_distribution
from .config import PPOConfig
from .evaluation import Evaluator, summarise
from .learn import update
from .metrics import Watch, rollout_metrics
from .objectives import OBJECTIVES
from .pace import Pace
from .prompts import Prompts, read_prompts_or_feedback
from .ptx import encode_demonstrations
from .sample import collect
from .schedule import learning_rate_scale
from .score import pairs_of, plan_minibatches, score
from .settings import update_options


def train_ppo(config: PPOConfig, run: RunFolder, sampler: Sampler | None = None) -> dict[str, Any]:
    """Run the phase in `run`; the resulting model is in `model/`. Returns the summary, which is in summary.json too.

    Raises UserError for wrong input or when a check fails, Interrupted after a Ctrl-C or SIGTERM (all is saved).
    """
    config.validate()
    config = config.resolved()
    if (finished := finished_summary(run, config)) is not None:
        return finished
    with ExitStack() as servers:
        return _train(config, run, sampler, servers)


def _train(config: PPOConfig, run: RunFolder, sampler: Sampler | None, servers: ExitStack) -> dict[str, Any]:
    """The phase itself, with the options resolved; a server that it starts is ended by `servers`."""
    seed_everything(config.seed)
    tune_process()
    timer = Timer()
    rater = load_rater(config.rater) if config.rater else None
    scored = bool(config.reward_model or config.reward_functions)
    pairs = OBJECTIVES[config.objective].pairs
    lines = read_prompts_or_feedback(config.prompts_file, feedback=pairs, scored=scored, strict=config.strict)
    demonstrations = read_sft(config.ptx_file, config.strict) if config.ptx_file else []
    held_out_file = config.eval_prompts_file
    held_out_lines = read_prompts(held_out_file, config.strict) if held_out_file else []
    if sampler is None:
        served = Served(config.model, config.dtype, config.max_length)
        sampler = servers.enter_context(open_sampler(config, served, run.path / SERVER_LOG))
    with timer("load"):
        agent = load_agent(config)
        prompts = encode_prompts(lines, config, agent)
        held_out = encode_prompts(held_out_lines, config, agent) if held_out_lines else None
        if demonstrations:
            agent.demonstrations = encode_demonstrations(demonstrations, agent.tokenizer, ranks().device, config)
    run.save_config(config)
    if config.prompt_epochs:
        steps = math.ceil(config.prompt_epochs * len(prompts.ids) / config.prompts_per_step)
        config = replace(config, max_steps=steps)
    require_space(run.path, parameter_count(agent.policy) * (2 if agent.critic is not None else 1), config.save_steps)
    step = restore(agent, run)
    evaluator = Evaluator(agent, held_out, config, run, rater, sampler)
    evaluator.resume(step)
    with timer("evaluate"):
        before = evaluator.at("before")

    metrics = run.last_metrics()  # of the step that a resumed run begins behind, should none be left
    watch = Watch()
    autosave = Autosave(run, config, (agent.policy, agent.critic), step, partial(save, agent, run))
    pace = Pace(config, timer)
    with StopFlag() as stop, Progress("ppo", config.max_steps) as bar, autosave:
        while step < config.max_steps and not pace.ended(step):
            threads().fit()
            with timer("step"):
                metrics = train_step(agent, prompts, pace.config, step, timer, sampler)
            step += 1
            for message in watch.look(metrics):
                notice(f"step {step}: {message}")
            if config.eval_steps and step % config.eval_steps == 0:
                with timer("evaluate"):
                    metrics |= evaluator.at_step(step)
            run.log({**metrics, **timer.lap()}, step)
            bar.update(step, **{name.partition("/")[2]: metrics[name] for name in SHOWN})
            if autosave.after_step(step, stop.requested):
                raise Interrupted(f"stopped after {step} of {config.max_steps} steps; --resume goes on")

        with timer("save"):  # inside of `stop`: a signal now waits until all is written
            autosave.finish(step)
            if evaluator.last_is_best:
                run.save_model(agent.merged_policy(), agent.tokenizer)
        with timer("evaluate"):
            after = evaluator.at("after")
    return summarise(config, run, timer, step, before, after, metrics)


SHOWN = ("objective/scores", "objective/kl", "objective/entropy")


def train_step(
    agent: Agent, prompts: Prompts, config: PPOConfig, step: int, timer: Timer, sampler: Sampler = generate
) -> dict[str, float]:
    """One step of the algorithm; returns its metrics."""
    config = config.resolved()
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step + 500_000)

    # 1. and 2. Sample completions and score them, each rank for its share of the prompts.
    rollout, drawn = collect(agent, prompts, config, step, timer, sampler)
    samples, unit = pairs_of(rollout, config)

    # 3. to 6. Log-probabilities under policy and reference, values, advantages.
    plans = plan_minibatches(samples.batch, unit, config, agent.policy, generator)
    experience = score(agent, samples, plans, config, timer, calibrate=step == 0)
    options = update_options(config, agent.kl_controller.coef, agent.rewards.rounding, unit)
    # Whether these are all samples, drawn from the full distribution, not selected by reward.
    plain = samples.support is None and prompts.pairs is None and unit == 1 and not drawn.get("sample/dropped")
    if plain and not options.loss.on_policy:
        check_distribution(experience.old_logprobs, experience.entropy, experience.batch.mask)

    # 7. Learn from them.
    scale = learning_rate_scale(step, config.warmup_steps, config.max_steps, config.lr_schedule)
    agent.set_learning_rates(config.lr * scale, config.critic_lr * scale)
    with timer("update"):
        agent.train(config.gradient_checkpointing)  # gradient checkpointing needs training mode; dropout is always off
        losses = update(agent, experience, plans, options, generator, step, critic_only=step < config.critic_warmup)
        agent.train(False)

    # 8. Metrics of the samples, now that the log-probabilities of all of them are known.
    if plain and options.loss.on_policy:
        check_distribution(experience.old_logprobs, experience.entropy, experience.batch.mask)
    metrics = {**rollout_metrics(samples, experience, options.loss.kl), **drawn, **losses}
    metrics |= {"objective/kl_coef": agent.kl_controller.coef, "policy/lr": config.lr * scale}
    if samples.logprobs is not None:
        correction = Correction(config.sampler_correction, config.sampler_cap)
        mask = experience.batch.mask
        metrics |= mismatch_metrics(experience.old_logprobs, samples.logprobs, mask, correction)
    metrics["policy/ratio_gap"] = agent.largest_gap
    if step >= config.critic_warmup:  # before, the policy does not learn, so kl_coef has no effect
        agent.kl_controller.update(metrics["objective/kl"])
    return metrics
