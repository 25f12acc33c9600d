# SPDX-License-Identifier: Apache-2.0
"""What stops PPO, each with a message that says what is wrong: options, files, models, numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ppo_runs import load_agent, prompts_of, replace, train_step
from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.models import heads
from rlhf_fast.models import loading as models
from rlhf_fast.rollout.builtin import generate
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.trainer import PPOConfig
from rlhf_fast.trainer.rl import agent as agents
from rlhf_fast.trainer.rl import checks, ppo
from rlhf_fast.trainer.rl.metrics import Watch
from rlhf_fast.trainer.rl.reward_functions import RewardFunction
from rlhf_fast.trainer.rl.rewards import Rewards, Scores


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kl_estimator": "exact", "top_k": 5}, "whole vocabulary"),
        ({"kl_in": "loss", "kl_estimator": "k1"}, "no gradient on average"),
        ({"kl_in": "loss-importance", "kl_estimator": "exact"}, "take loss"),
        ({"objective": "dpo", "kl_estimator": "exact"}, "in its own loss"),
        ({"objective": "dpo", "dpo_loss": "ipo", "kl_coef": 0.0}, "beta of 'dpo'.* above 0"),
        ({"objective": "dpo", "kl_estimator": "k2", "kl_in": "loss"}, "in its own loss"),
        ({"kl_target": 1.0, "kl_coef": 0.0}, "above 0"),
        ({"critic_warmup": 1, "objective": "rloo"}, "with a critic"),
        ({"objective": "dapo", "samples_per_prompt": 1}, "2 or more"),
        ({"objective": "grpo", "dual_clip": 0.5}, "above 1"),
        ({"objective": "cispo", "dual_clip": 3.0}, "PPO's loss"),
        ({"objective": "gspo", "kl_in": "loss", "kl_estimator": "exact"}, "importance_ratio token"),
        ({"entropy_coef": 0.1, "top_k": 5}, "entropy_coef is of the whole vocabulary"),
        (
            {"objective": "grpo", "bootstrap_truncated": True},
            "bootstrap_truncated needs an objective with a critic; 'grpo' has none",
        ),
        ({"dpo_pairs": "all"}, "for the objective 'dpo' alone"),
        ({"objective": "dpo", "dpo_loss": "ipo", "label_smoothing": 0.1}, "not for ipo"),
        ({"keep_best": True}, "eval_steps"),
        ({"objective": "dpo", "cliprange": 0.1}, "cliprange is not for 'dpo', which learns from pairs"),
        ({"objective": "dpo", "cliprange_high": 0.1}, "cliprange_high is not for 'dpo'"),
        ({"objective": "dpo", "importance_ratio": "sequence-mean"}, "importance_ratio is not for 'dpo'"),
        ({"objective": "dpo", "overlong_filter": True}, "overlong_filter is not for 'dpo'"),
        ({"objective": "dpo", "gamma": 0.9}, "gamma is not for 'dpo'"),
        ({"ptx_coef": 1.0}, "ptx_coef needs ptx_file"),
        ({"overlong_buffer": 0.1}, "overlong_buffer needs overlong_penalty"),
        ({"eval_steps": 1}, "eval_steps needs eval_prompts_file"),
        (
            {"sampler_cap": 2.5, "sampler_correction": "mask"},
            "sampler_cap needs sampler_correction truncate or sequence-mask: leave it out",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(config: PPOConfig, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(config, **values).validate()


@pytest.mark.parametrize(
    "values",
    [
        {"objective": "grpo", "lam": 0.9, "cliprange_value": 0.0, "critic_lr": 1e-4},  # a file of several objectives
        {"sampler_correction": "none", "sampler_cap": 2.0},  # as config.yaml of earlier runs has it
        {"sampler_correction": "mask", "sampler_cap": 3.0},
    ],
)
def test_options_of_another_kind_that_a_file_may_hold_are_accepted(config: PPOConfig, values: dict[str, Any]) -> None:
    replace(config, **values).validate()


def test_files_and_functions_are_read_before_any_model(
    config: PPOConfig, write_jsonl: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ppo, "encode_prompts", lambda *args: pytest.fail("models were loaded first"))
    monkeypatch.setattr(agents, "load_tokenizer", lambda *args: pytest.fail("a model's tokenizer was loaded first"))
    bad = write_jsonl("bad.jsonl", {"prompt": "ann wants animals"}, "{not json")
    cases: list[tuple[str, dict[str, Any]]] = [
        ("cannot read the data file none.jsonl", {"prompts_file": "none.jsonl"}),
        ("bad.jsonl:2: not valid JSON", {"prompts_file": bad}),
        ("bad.jsonl:2: not valid JSON", {"prompts_file": bad, "objective": "dpo"}),
        ("bad.jsonl:2: not valid JSON", {"eval_prompts_file": bad}),
        ("there is no file none.py", {"rater": "none.py:f"}),
        ("there is no file none.py", {"reward_functions": ("none.py:f",)}),
        ("say what samples are worth", {"objective": "dpo", "reward_model": ""}),
        ("there is no folder './none'", {"reward_model": "./none"}),
    ]
    for message, values in cases:
        with pytest.raises(UserError, match=message):
            ppo.train_ppo(replace(config, strict=True, **values), RunFolder.create(tmp_path / "run", overwrite=True))


def test_a_reward_model_that_cannot_read_is_refused(config: PPOConfig, tiny: Path, tmp_path: Path) -> None:
    """Without a tokenizer of its own, and with too few embeddings for the policy's ids; more are padding."""
    model = models.load_reward_model(str(tiny / "model"), "float32", new_head=True)
    for size, name in ((99, "padded"), (20, "small")):
        model.resize_token_embeddings(size)
        model.save_pretrained(tmp_path / name)
    assert load_agent(replace(config, reward_model=str(tmp_path / "padded"))).rewards.reader is None
    with pytest.raises(UserError, match="has 20 embeddings for a vocabulary of .* and no tokenizer of its own"):
        load_agent(replace(config, reward_model=str(tmp_path / "small")))


def test_a_prompt_without_room_for_a_completion_is_named(config: PPOConfig, write_jsonl: Callable[..., str]) -> None:
    path = write_jsonl("long.jsonl", {"prompt": "ann wants animals"}, {"prompt": "ann wants animals " * 20})
    config = replace(config, prompts_file=path)
    with pytest.raises(UserError, match="long.jsonl.*2"):
        prompts_of(replace(config, overlong="error"), load_agent(config))
    assert len(prompts_of(config, load_agent(config)).lines) == 1


def test_dropout_is_noticed(config: PPOConfig) -> None:
    agent = load_agent(config)
    prompts = prompts_of(config, agent)
    hidden_states = heads.hidden_states

    def noisy(model: Any, *args: Any) -> Tensor:
        return torch.nn.functional.dropout(hidden_states(model, *args), 0.1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "hidden_states", noisy)
        with pytest.raises(UserError, match="ratio of the first minibatch is not 1: .* at sample .* token .*dropout"):
            train_step(agent, prompts, config, 0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("reward", "the score is nan at sample"),
        ("frozen", "ref_logprobs is nan at sample"),
        ("critic", "values is nan"),
        ("policy", "old_logprobs is nan at sample"),
    ],
)
def test_what_is_not_finite_is_named(config: PPOConfig, model: str, message: str) -> None:
    agent = load_agent(config)
    prompts = prompts_of(config, agent)
    broken = agent.rewards.model if model == "reward" else getattr(agent, model)
    broken.base_model.norm.weight.data[3] = float("nan")
    sound = agent.frozen if model == "policy" else agent.policy  # which samples
    with pytest.raises(UserError, match=message):
        train_step(agent, prompts, config, 1, lambda _, *rest, **more: generate(sound, *rest, **more))


def test_advantages_that_overflow_stop_the_run(config: PPOConfig) -> None:
    """Each reward is finite in float32, the distance of the first from their mean is not."""
    config = replace(config, objective="dr_grpo")
    agent = load_agent(config)
    one = RewardFunction("one", "one", 1.0, lambda prompt, completions: [3e38, -3e38, -3e38, -3e38])
    agent.rewards = Rewards(None, [one])
    with pytest.raises(UserError, match="advantages is inf at sample 0"):
        train_step(agent, prompts_of(config, agent), config, 1)


def test_scores_that_differ_by_the_models_rounding_teach_nothing(config: PPOConfig) -> None:
    class Rounded(Rewards):
        def __call__(self, *args: Any) -> Scores:
            found = super().__call__(*args)
            return found._replace(rounding=torch.full_like(found.total, 2.0**-6))  # as of a reward model in bfloat16

    config = replace(config, objective="grpo", kl_coef=0.0, dynamic_sampling=1)
    agent = load_agent(config)
    near = RewardFunction("near", "near", 1.0, lambda prompt, completions: [1.0, 1.0078125, 1.0, 1.0])
    agent.rewards = Rounded(None, [near])
    figures = train_step(agent, prompts_of(config, agent), config, 1)
    assert figures["sample/unfilled"] == config.prompts_per_step and figures["policy/grad_norm"] == 0


def test_a_gradient_that_explodes_stops_the_run(config: PPOConfig) -> None:
    agent = load_agent(config)
    prompts = prompts_of(config, agent)
    agent.policy.base_model.layers[0].mlp.up_proj.weight.register_hook(lambda grad: grad * float("inf"))
    for step, advice in ((0, "No weight has changed yet, so lr is not the cause"), (1, "Lower lr, or set dtype")):
        message = f"policy/grad_norm is (nan|inf) in step {step + 1}, minibatch 1. {advice}"
        with pytest.raises(UserError, match=message):
            train_step(agent, prompts, config, step)
        agent = load_agent(config)
        agent.policy.base_model.layers[0].mlp.up_proj.weight.register_hook(lambda grad: grad * float("inf"))


def test_logprobs_above_zero_stop_the_run() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    checks.check_logprobs("old_logprobs", torch.tensor([[-1.0, 1e-6], [0.0, 99.0]]), mask)
    with pytest.raises(UserError, match="old_logprobs is 0.5 at sample 1 token 0; a log-probability is at most 0"):
        checks.check_logprobs("old_logprobs", torch.tensor([[-1.0, 0.0], [0.5, 0.0]]), mask)


def test_what_goes_wrong_silently_is_said_once() -> None:
    good = {"objective/entropy": 2.0, "sample/ended": 0.5, "objective/scores_std": 1.0}
    watch = Watch()
    assert watch.look(good) == []
    for name, value, word in (
        ("objective/entropy", 0.3, "entropy has fallen from 2.00 to 0.30"),
        ("sample/ended", 0.0, "no completion"),
        ("objective/scores_std", 0.0, "same score"),
    ):
        (message,) = watch.look({**good, name: value})
        assert word in message and watch.look({**good, name: value}) == []
    (message,) = Watch([good, good]).look({**good, "objective/entropy": 0.3})  # of a resumed run
    assert "from 2.00 to 0.30" in message
