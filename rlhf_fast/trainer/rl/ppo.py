# SPDX-License-Identifier: Apache-2.0
"""Phase 3: reinforcement learning from a reward (Schulman et al. 2017; Ouyang et al. 2022).

A copy of the SFT model is the policy, a frozen copy the reference; the critic starts as the reward model. One step:

    collect  1. sample completions of a batch of prompts
             2. score them by the reward model
    score    3. log-probabilities under the policy (old)
             4. log-probabilities under the reference
             5. values by the critic
             6. rewards with the KL, advantages (`objectives/`)
    learn    7. epochs over minibatches: clipped losses, AdamW
             8. log, save

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

from rlhf_fast.errors import Interrupted
from rlhf_fast.feedback.raters import load_rater
from rlhf_fast.rollout.builtin import generate
from rlhf_fast.rollout.mismatch import mismatch_metrics
from rlhf_fast.rollout.rollout import Sampler
from rlhf_fast.rollout.sampler import SERVER_LOG, open_sampler
from rlhf_fast.run.autosave import Autosave
from rlhf_fast.run.checkpoint import require_space, seed_everything
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.run.progress import Progress, StopFlag, Timer, notice
from rlhf_fast.run.records import read_jsonl
from rlhf_fast.run.resume import finished_summary
from rlhf_fast.run.runtime import tune_process
from rlhf_fast.run.threads import threads

from .agent import Agent, encode_prompts, load_agent, restore, save, save_policy
from .ahead import one_step_ahead
from .checks import check_distribution
from .config import PPOConfig
from .evaluation import Evaluator, summarise
from .learn import update
from .metrics import Watch, pair_metrics, rollout_metrics
from .pace import Pace
from .prompts import Data, Prompts, read_data
from .ptx import encode_demonstrations
from .reward_functions import load_functions
from .sample import collect, prompts_used
from .score import choose_samples, plan_minibatches, score
from .settings import Settings, StepOptions
from .sizes import Sizes


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
    settings = Settings(config)  # from here on each part gets its own options, not the config
    data = read_data(settings.data, load_functions(config.reward_functions), rater)
    if sampler is None:
        sampler = servers.enter_context(open_sampler(settings.sampler, settings.served, run.path / SERVER_LOG))
    with timer("load"):
        agent, prompts, held_out = _load(settings, data)
    run.save_config(config)
    settings = Settings(with_steps(config, len(prompts.ids)))
    max_steps = settings.duration.max_steps
    # With save_last a finished run can go on with more steps, so its last step samples ahead as well.
    agent.ahead = one_step_ahead(settings.one_step_ahead, sampler, max_steps + settings.saving.last)
    require_space(run.path, agent.parameter_count(), settings.saving.steps)
    pace = Pace(settings.duration, settings.sizes, timer)
    step = restore(agent, pace, run)
    evaluator = Evaluator(agent, held_out, settings.evaluation, run, rater, sampler)
    evaluator.resume(step)
    with timer("evaluate"):
        before = evaluator.at("before")
        if evaluator.missed(step):
            run.log_to_last(evaluator.at_step(step), step)

    metrics = run.last_metrics()  # for the summary, if a resumed run has no step left to do
    watch = Watch(read_jsonl(run.path / "metrics.jsonl"))
    autosave = Autosave(run, settings.saving, (agent.policy, agent.critic), step, partial(save, agent, pace, run))
    agent.watch_changes(autosave.begin_change)
    with StopFlag() as stop, Progress("ppo", max_steps) as bar, autosave:
        while step < max_steps and not pace.ended(step):
            threads().fit()
            with timer("step"):
                metrics = train_step(agent, prompts, settings.step, pace.sizes, step, timer, sampler)
            step += 1
            for message in watch.look(metrics):
                notice(f"step {step}: {message}")
            try:
                if evaluator.due(step):
                    with timer("evaluate"):
                        metrics |= evaluator.at_step(step)
            finally:  # the step is done, also if its evaluation fails, which a resumed run repeats
                run.log({**metrics, **timer.lap()}, step)
                autosave.end_change(step)
            shown = {name.partition("/")[2]: metrics[name] for name in SHOWN if name in metrics}
            bar.update(step, watch.verdict.after(metrics), **shown)
            if autosave.after_step(step, stop.requested) and step < max_steps:
                raise Interrupted(f"stopped after {step} of {max_steps} steps; --resume goes on")

        with timer("save"):  # inside of `stop`: a signal now waits until all is written
            autosave.finish(step)
            if not settings.evaluation.keep_best:
                save_policy(agent, run)
        run.stop_requested = stop.requested
    with autosave, timer("evaluate"):
        before, after = evaluator.at_end(step, before, pace.held_out)
    summary = {"steps": step, "max_steps": max_steps, "objective": settings.step.score.objective.name}
    return summarise(summary | evaluator.best_step(), run, timer, before, after, metrics)


def _load(settings: Settings, data: Data) -> tuple[Agent, Prompts, Prompts | None]:
    """The models, and the token ids of the prompts and of the held-out ones."""
    agent = load_agent(settings.agent)
    prompts = encode_prompts(data.prompts, agent, settings.prompts)
    held_out = encode_prompts(data.held_out, agent, settings.prompts) if data.held_out else None
    if data.demonstrations:
        agent.demonstrations = encode_demonstrations(data.demonstrations, agent.policy, agent.tokenizer, settings.ptx)
    return agent, prompts, held_out


SHOWN = ("objective/scores", "objective/kl", "objective/entropy", "rewards/margins", "rewards/accuracies")


def with_steps(config: PPOConfig, prompts: int) -> PPOConfig:
    """A copy whose max_steps follows from prompt_epochs, if that is set, and the number of prompts."""
    steps = math.ceil(config.prompt_epochs * prompts / config.prompts_per_step)
    return replace(config, max_steps=steps) if config.prompt_epochs else config


def train_step(
    agent: Agent,
    prompts: Prompts,
    options: StepOptions,
    sizes: Sizes,
    step: int,
    timer: Timer,
    sampler: Sampler = generate,
) -> dict[str, float]:
    """One step of the algorithm; returns its metrics."""
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step + 500_000)
    began = timer.since_start()

    # Collect: completions and their scores, each rank for its share of the prompts.
    rollout, drawn = collect(agent, prompts, options.sample, sizes, step, timer, sampler)

    # Score: log-probabilities under policy and reference, values, advantages.
    samples, unit = choose_samples(rollout, options.score, sizes.prompts)
    options = options.at(agent.kl_controller.coef, unit)
    plans = plan_minibatches(samples.batch, unit, sizes, agent.policy, generator)
    if step == 0 and agent.critic is not None:
        agent.begin_change()  # as its head is fitted
    experience = score(agent, samples, plans, options.score, timer, calibrate=step == 0)
    # Whether these are all samples, drawn from the full distribution of this policy, not selected by reward.
    selected = prompts.pairs is not None or unit > 1 or bool(drawn.get("sample/dropped"))
    plain = samples.support is None and not selected and not samples.steps_behind
    if plain and not options.score.single_update:
        check_distribution(experience.old_logprobs, experience.entropy, experience.batch.mask)

    # Learn: epochs over minibatches.
    lr, critic_lr = options.rates.at(step)
    agent.set_learning_rates(lr, critic_lr)
    with timer("update"):
        agent.train(options.update.gradient_checkpointing)  # which needs training mode; dropout is always off
        warming_up = step < options.critic_warmup
        losses = update(agent, experience, plans, options.update, generator, step, critic_only=warming_up)
        agent.train(False)

    # Metrics, now that the log-probabilities of all samples are known.
    if plain and options.score.single_update:
        check_distribution(experience.old_logprobs, experience.entropy, experience.batch.mask)
    kl = options.update.loss.kl if options.score.reference else None
    metrics = {**drawn, **losses}
    if prompts.pairs is None:  # of ranked completions, which are not the policy's, neither KL nor entropy is one
        metrics |= rollout_metrics(samples, experience, kl, critic=agent.critic is not None)
    if options.score.objective.pairs:
        metrics |= pair_metrics(experience, options.update.loss.pairs)
    metrics |= {"objective/kl_coef": agent.kl_controller.coef, "policy/lr": lr}
    if samples.logprobs is not None:
        correction, mask = options.score.correction, experience.batch.mask
        metrics |= mismatch_metrics(experience.old_logprobs, samples.logprobs, mask, correction)
        metrics["engine/steps_behind"] = float(samples.steps_behind)
    if agent.ahead is not None:
        metrics |= {"time/step_began": began, **agent.ahead.times(timer.start)}
    if not options.score.single_update and not warming_up:  # else there is one pass, and nothing to compare it with
        metrics["policy/ratio_gap"] = agent.largest_gap
    if "objective/kl" in metrics and not warming_up:  # before, the policy does not learn, so kl_coef has no effect
        agent.kl_controller.update(metrics["objective/kl"])
    agent.prompts_drawn += prompts_used(sizes, drawn)  # not before: a step that fails is repeated with the same prompts
    return metrics
