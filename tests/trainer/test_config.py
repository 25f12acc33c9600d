# SPDX-License-Identifier: Apache-2.0
"""Options: what a YAML file may hold, how wrong ones are refused, and what overrides what."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.run.options import load_config
from rlhf_fast.trainer import PipelineConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_fast.trainer.collection import CollectConfig

ALL = (SFTConfig, CollectConfig, RewardConfig, PPOConfig, PipelineConfig)


def yaml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def ppo(**values: object) -> PPOConfig:
    return dataclasses.replace(PPOConfig(prompts_file="p.jsonl", reward_model="r"), **values)


def test_files_are_relative_to_the_configuration_file(tmp_path: Path) -> None:
    path = yaml(tmp_path, "sft: {train_file: a.jsonl}\ncollect: {rater: raters.py:rate}\nppo: {rater: module:rate}\n")
    config = load_config(PipelineConfig, path)
    assert config.sft.train_file == str(tmp_path / "a.jsonl")
    assert config.collect.rater == f"{tmp_path}/raters.py:rate"
    assert config.ppo.rater == "module:rate" and config.model == "smollm2"


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path: Path) -> None:
    config = load_config(PPOConfig, yaml(tmp_path, "lr: 1e-4\nmax_steps: 60\nkl_coef: 1\n"))
    assert (config.lr, config.max_steps, config.kl_coef) == (1e-4, 60, 1.0)


def test_overrides_win(tmp_path: Path) -> None:
    path = yaml(tmp_path, "seed: 1\nppo: {lr: 0.1}\n")
    config = load_config(PipelineConfig, path, {"seed": 2, "ppo.lr": 0.2})
    assert (config.seed, config.ppo.lr) == (2, 0.2)


def test_lists_of_functions_and_names_of_data_sets(tmp_path: Path) -> None:
    text = 'reward_functions: [a.py:f, 0.5*b.py:g, mod:h]\nprompts_file: datasets:org/name\nstop: ["x.py:"]\n'
    config = load_config(PPOConfig, yaml(tmp_path, text))
    assert config.reward_functions == (f"{tmp_path}/a.py:f", f"0.5*{tmp_path}/b.py:g", "mod:h")
    assert config.prompts_file == "datasets:org/name" and config.stop == ("x.py:",)
    with pytest.raises(UserError, match="reward_functions must be a list of texts, got 3"):
        load_config(PPOConfig, yaml(tmp_path, "reward_functions: 3"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_sise: 3", "config.yaml: unknown key 'batch_sise'; did you mean 'batch_size'"),
        ("zzz: 3", "unknown key 'zzz'; known keys: .*train_file"),
        ("lr: fast", "config.yaml: lr must be of type float, got 'fast'"),
        ("batch_size: 1.5", "batch_size must be of type int, got 1.5"),
        ("batch_size: true", "batch_size must be of type int, got True"),
        ("train_file: null", "train_file must be of type str, got None"),
        ("dtype: float8", "dtype must be one of 'auto', 'float32', 'bfloat16', 'nf4', got 'float8'"),
        ("- a list", "wanted a mapping of options, got list"),
        ("lr: [", "is not valid YAML"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(SFTConfig, yaml(tmp_path, text))


def test_wrong_sections_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown key 'ppo.lrr'; did you mean 'lr'"):
        load_config(PipelineConfig, yaml(tmp_path, "ppo: {lrr: 1}"))
    with pytest.raises(UserError, match="ppo is a section: wanted a mapping, got 3"):
        load_config(PipelineConfig, yaml(tmp_path, "ppo: 3"))
    with pytest.raises(UserError, match="override: unknown key 'pppo.lr'"):
        load_config(PipelineConfig, None, {"pppo.lr": 1})
    with pytest.raises(UserError, match="cannot read the configuration .*none.yaml"):
        load_config(SFTConfig, tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", 0.0, "lr must be greater than 0, got 0.0"),
        ("lr", float("nan"), "lr must be greater than 0, got nan"),
        ("temperature", -1.0, "temperature must be greater than 0"),
        ("lam", 1.5, "lam must be between 0 and 1"),
        ("cliprange", 1.5, "cliprange must be above 0 and at most 1"),
        ("kl_coef", -0.1, "kl_coef must be 0 or more"),
        ("seed", -1, "seed must be 0 or more"),
        ("prompts_file", "", "prompts_file must be the name of a JSONL file, got ''"),
        ("reward_model", "", "reward_model must be a folder or an id"),
        ("num_minibatches", 3, "num_minibatches 3 must divide prompts_per_step x samples_per_prompt = 32"),
        ("max_new_tokens", 512, "must leave room for a prompt"),
    ],
)
def test_options_out_of_range_are_refused(name: str, value: object, message: str) -> None:
    ppo().validate()
    with pytest.raises(UserError, match=message):
        ppo(**{name: value}).validate()


def test_options_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(UserError, match="exclude each other"):
        ppo(overwrite=True, resume=True).validate()
    with pytest.raises(UserError, match="compares samples of one prompt"):
        ppo(objective="rloo", samples_per_prompt=1).validate()


def test_a_pipeline_checks_every_section() -> None:
    config = load_config(PipelineConfig, None, {"sft.train_file": "a", "ppo.prompts_file": "b"})
    with pytest.raises(UserError, match="prompts_file must be"):
        config.validate()
    config.reward.feedback_file = "people.jsonl"  # then nothing is collected
    config.validate()
    config.ppo.lr = -1.0
    with pytest.raises(UserError, match="lr must be greater than 0"):
        config.validate()


def test_there_are_few_options_and_each_is_documented() -> None:
    from tyro._docstrings import get_field_docstring

    for cls in ALL:
        names = set()
        for field in dataclasses.fields(cls):
            if not dataclasses.is_dataclass(field.default_factory):
                names.add(field.name)
                assert get_field_docstring(cls, field.name, ()), f"{cls.__name__}.{field.name} has no docstring"
        assert len(names) <= (92 if cls is PPOConfig else 38), cls.__name__
