# SPDX-License-Identifier: Apache-2.0
"""The options of RL in bundles, so that each part of the phase gets only what it reads.

A bundle is defined beside the code that takes it. They are all filled here: nothing below `train_ppo` knows the config.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from rlhf_fast.data.limits import Limits
from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.models.batches import MicroBatch
from rlhf_fast.ops.token_losses import Clip
from rlhf_fast.rollout.mismatch import Correction
from rlhf_fast.rollout.rollout import SamplingParams
from rlhf_fast.rollout.sampler import Served
from rlhf_fast.run.autosave import SaveOptions
from rlhf_fast.run.options import SamplerOptions

from .agent import AdamOptions, AgentOptions, ModelOptions
from .config import PPOConfig
from .evaluation import EvalOptions
from .learn import UpdateOptions
from .objectives import OBJECTIVES
from .objectives.dpo import PairOptions
from .objectives.objective import AdvantageOptions, KLOptions
from .pace import Duration
from .policy_update import PolicyLossOptions
from .prompts import DataOptions, PromptOptions
from .ptx import PtxOptions
from .rewards import LengthRules
from .sample import SampleOptions
from .schedule import LearningRates
from .score import ScoreOptions
from .sizes import Sizes

T = TypeVar("T")
RULES = ("missing_eos_penalty", "missing_eos_score", "overlong_penalty")


class Settings:
    """What the parts of the phase take, from one config."""

    def __init__(self, config: PPOConfig) -> None:
        """Options of `config` that are None get their defaults first."""
        config = config.resolved()
        self.data = _data(config)
        self.sampler = SamplerOptions(config.sampler, config.engine_url, config.engine_weights)
        self.served = Served(config.model, config.dtype, config.max_length)
        self.one_step_ahead = config.one_step_ahead
        self.prompts = PromptOptions(
            limits=Limits(config.max_length, config.overlong, config.strict),
            max_new_tokens=config.max_new_tokens,
            every_pair=config.dpo_pairs == "all",
        )
        self.agent = _agent(config)
        self.sizes = _sizes(config)
        self.ptx = PtxOptions(
            coef=config.ptx_coef,
            limits=Limits(config.max_length, config.overlong, config.strict),
            micro_batch=MicroBatch.of(config),
            seed=config.seed,
            stride=_samples_learned(config) // _given(config.num_minibatches),
        )
        self.evaluation = EvalOptions(
            params=SamplingParams.of(config),
            samples=config.eval_samples,
            micro_batch=MicroBatch.of(config),
            every=config.eval_steps,
            keep_best=config.keep_best,
        )
        self.saving = SaveOptions.of(config)
        self.duration = Duration(config.max_steps, config.min_steps, config.max_seconds)
        self.step = _step(config)


@dataclass(frozen=True)
class StepOptions:
    """Options of a step: collect, score, learn."""

    seed: int
    sample: SampleOptions
    score: ScoreOptions
    update: UpdateOptions
    rates: LearningRates
    critic_warmup: int  # steps in which the critic learns alone

    def at(self, kl_coef: float, unit: int) -> StepOptions:
        """A copy with this step's `kl_coef`, and the unit of consecutive samples that form pairs."""
        advantages, loss = self.score.advantages, self.update.loss
        kl = advantages.kl._replace(coef=kl_coef)
        pairs = loss.pairs._replace(beta=kl_coef, samples=unit)
        return replace(
            self,
            score=self.score._replace(advantages=advantages._replace(kl=kl)),
            update=replace(self.update, loss=replace(loss, kl=kl, pairs=pairs)),
        )


def _given(value: T | None) -> T:
    """An option that `resolved` has filled in."""
    assert value is not None
    return value


def _data(config: PPOConfig) -> DataOptions:
    return DataOptions(
        prompts_file=config.prompts_file,
        eval_prompts_file=config.eval_prompts_file,
        ptx_file=config.ptx_file,
        feedback=OBJECTIVES[config.objective].pairs,
        scored=bool(config.reward_model or config.reward_functions),
        of_samples=config.changed("kl_target", "early_stop_kl", *RULES, "dynamic_sampling", "score_clip"),
        strict=config.strict,
    )


def _agent(config: PPOConfig) -> AgentOptions:
    models = ModelOptions(
        model=config.model,
        reward_model=config.reward_model,
        critic=OBJECTIVES[config.objective].critic,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        load_in_4bit=config.load_in_4bit,
        lora_rank=config.lora_rank,
        fsdp=config.fsdp,
        fsdp_size=config.fsdp_size,
        gradient_checkpointing=config.gradient_checkpointing,
        activation_offloading=config.activation_offloading,
    )
    adam = AdamOptions(
        lr=config.lr,
        critic_lr=config.critic_lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        kind=config.optimizer,
    )
    return AgentOptions(
        models=models,
        adam=adam,
        reward_functions=config.reward_functions,
        score_clip=_given(config.score_clip),
        micro_batch=MicroBatch.of(config),
        kl_coef=_given(config.kl_coef),
        kl_target=config.kl_target,
        reference=needs_reference(config),
    )


def _sizes(config: PPOConfig) -> Sizes:
    return Sizes(
        prompts=config.prompts_per_step,
        samples=config.samples_per_prompt,
        minibatches=_given(config.num_minibatches),
        micro_batch=MicroBatch.of(config),
        pairs=OBJECTIVES[config.objective].pairs,
    )


def _rules(config: PPOConfig) -> LengthRules:
    return LengthRules(
        missing_eos_penalty=config.missing_eos_penalty,
        missing_eos_score=config.missing_eos_score,
        overlong_penalty=_given(config.overlong_penalty),
        overlong_buffer=config.overlong_buffer,
        max_new_tokens=config.max_new_tokens,
    )


def _kl(config: PPOConfig) -> KLOptions:
    return KLOptions(_given(config.kl_coef), _given(config.kl_estimator), _given(config.kl_in))


def _step(config: PPOConfig) -> StepOptions:
    return StepOptions(
        seed=config.seed,
        sample=SampleOptions(
            params=SamplingParams.of(config),
            seed=config.seed,
            extra_rounds=_given(config.dynamic_sampling),
            rules=_rules(config),
        ),
        score=_score(config),
        update=_update(config),
        rates=LearningRates(
            policy=config.lr,
            critic=config.critic_lr,
            warmup_steps=config.warmup_steps,
            max_steps=config.max_steps,
            schedule=config.lr_schedule,
        ),
        critic_warmup=config.critic_warmup,
    )


def _score(config: PPOConfig) -> ScoreOptions:
    advantages = AdvantageOptions(
        kl=_kl(config),
        samples_per_prompt=config.samples_per_prompt,
        gamma=config.gamma,
        lam=config.lam,
        whiten_rewards=config.whiten_rewards,
        process_group=ranks().group,
    )
    return ScoreOptions(
        objective=OBJECTIVES[config.objective],
        advantages=advantages,
        rules=_rules(config),
        temperature=config.temperature,
        correction=_correction(config),
        every_pair=config.dpo_pairs == "all",
        bootstrap_truncated=config.bootstrap_truncated,
        overlong_filter=bool(config.overlong_filter),
        single_update=single_update(config),
        reference=needs_reference(config),
    )


def _correction(config: PPOConfig) -> Correction:
    correction = Correction(config.sampler_correction)
    return correction if config.sampler_cap is None else correction._replace(cap=config.sampler_cap)


def _samples_learned(config: PPOConfig) -> int:
    """Samples of a whole step that the update learns from."""
    two = OBJECTIVES[config.objective].pairs and config.dpo_pairs == "best-worst"
    return config.prompts_per_step * (2 if two else config.samples_per_prompt)


def _update(config: PPOConfig) -> UpdateOptions:
    loss = PolicyLossOptions(
        objective=OBJECTIVES[config.objective],
        clip=Clip(_given(config.cliprange), _given(config.cliprange_high), config.dual_clip or torch.inf),
        kl=_kl(config),
        ratio=_given(config.importance_ratio),
        entropy_coef=config.entropy_coef,
        temperature=config.temperature,
        pairs=PairOptions(_given(config.kl_coef), config.dpo_loss, config.label_smoothing),
        single_update=single_update(config),
    )
    return UpdateOptions(
        loss=loss,
        epochs=config.epochs,
        longest=config.max_new_tokens,
        cliprange_value=config.cliprange_value,
        early_stop_kl=config.early_stop_kl,
        max_grad_norm=config.max_grad_norm or None,
        gradient_checkpointing=config.gradient_checkpointing,
    )


def needs_reference(config: PPOConfig) -> bool:
    """True if a step reads log-probabilities of the reference: for a KL that counts, which pairs always have."""
    return _given(config.kl_coef) > 0


def single_update(config: PPOConfig) -> bool:
    """True if a step is one update and nothing before it reads the policy's log-probabilities.

    The update's own are then the old ones, and every ratio is 1, so the pass for the old ones is skipped.
    """
    objective, kl = OBJECTIVES[config.objective], _kl(config)
    return (
        config.epochs * _given(config.num_minibatches) == 1
        and not objective.pairs
        and not objective.critic
        and kl.reward_coef == 0
        and kl.place != "loss-importance"
        and kl.estimator != "exact"
    )
