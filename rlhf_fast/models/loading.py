# SPDX-License-Identifier: Apache-2.0
"""Loading Hugging Face models and tokenizers, and converting a reward model to a critic."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from rlhf_fast.data.limits import Limits
from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.errors import UserError, first_line
from rlhf_fast.run.progress import notice
from rlhf_fast.run.quiet import quiet

from .dropout import switch_off_dropout
from .gguf import resolve_model
from .qlora import four_bit, is_quantised, keep_gradients

SCORE_HEADS = ("score.", "classifier.")  # prefixes of the names of a score head's weights


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype of the weights. "auto" is bfloat16 on CUDA and on CPUs with AVX512_BF16 or AMX, else float32.

    With "nf4" it is the dtype of the weights that are not quantised, and of all matrix products.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in ("auto", "nf4"):
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    if torch.cuda.is_available():
        return torch.bfloat16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if not fast:
        notice("this CPU has neither AVX512_BF16 nor AMX, so bfloat16 would be slow: working in float32")
    return torch.bfloat16 if fast else torch.float32


def device() -> torch.device:
    """The device of models: this process' GPU if there is one, else the CPU."""
    return ranks().device if torch.cuda.is_available() else torch.device("cpu")


def find_model(name: str) -> str:
    """The newest model of a run folder (ppo/model, sft/model or model), or `name` itself."""
    for inside in ("ppo/model", "sft/model", "model"):
        if (Path(name) / inside / "config.json").exists():
            return str(Path(name) / inside)
    return name


def load_tokenizer(model: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer, padding on the left. A missing pad token is the EOS token: pads are found by mask, never by id."""
    from transformers import AutoTokenizer

    quiet()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_model(model), padding_side="left", trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the tokenizer of {model!r}: {first_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {model!r} has no EOS token; completions could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(
    model: str, dtype: str | torch.dtype, trust_remote_code: bool = False, load_in_4bit: bool = False
) -> Any:
    """An AutoModelForCausalLM in eval mode on `device()`; `dtype` as for `resolve_dtype`. Never unpickles.

    Raises:
        UserError: it cannot be read, or its files lack a weight or have a score head.
    """
    from transformers import AutoModelForCausalLM

    source = Source(model, "language model", resolve_dtype(dtype), trust_remote_code, load_in_4bit)
    loaded, info = _from_pretrained(AutoModelForCausalLM, source)
    missing = sorted(info["missing_keys"])
    other = sorted(key for key in info["unexpected_keys"] if key.startswith(SCORE_HEADS))
    if missing or other:
        raise UserError(
            f"{model!r} is not a language model: its files {'lack' if missing else 'have'} "
            f"{', '.join((missing or other)[:3])}; is it the folder of a reward model?"
        )
    return _ready(loaded)


def load_reward_model(
    model: str,
    dtype: str | torch.dtype,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    load_in_4bit: bool = False,
    *,
    new_head: bool = True,
) -> Any:
    """An AutoModelForSequenceClassification with one label; a language model gets a random head if `new_head`.

    The head stays in float32, so that scores are not rounded to the 8 bits of bfloat16. With `tokenizer` its pad id is
    written to the config, which users of the saved model need for batches.

    Raises:
        UserError: it cannot be read, its head is not one linear layer `score` with one output, or its files lack it
            and not `new_head`.
    """
    from transformers import AutoModelForSequenceClassification

    source = Source(model, "reward model", resolve_dtype(dtype), trust_remote_code, load_in_4bit)
    loaded, info = _from_pretrained(AutoModelForSequenceClassification, source, num_labels=1)
    if not isinstance(getattr(loaded, "score", None), nn.Linear):
        raise UserError(
            f"{type(loaded).__name__} has no linear head named `score`: call such a model in a reward function"
        )
    missing = sorted(key for key in info["missing_keys"] if not (new_head and key == "score.weight"))
    other = sorted(key for key in info["unexpected_keys"] if key.startswith(SCORE_HEADS))
    if missing or other:
        raise UserError(
            f"{model!r} is not a reward model: its files {'lack' if missing else 'have'} "
            f"{', '.join((missing or other)[:3])}; rlhf-fast reward trains one from a language model"
        )
    loaded.score.float()
    _restore_head(loaded, resolve_model(model))
    if tokenizer is not None:
        loaded.config.pad_token_id = tokenizer.pad_token_id
    return _ready(loaded)


class Source(NamedTuple):
    """Where a model comes from and how it is read."""

    model: str
    kind: str  # for messages
    dtype: torch.dtype
    trust_remote_code: bool
    load_in_4bit: bool


def _from_pretrained(auto: Any, source: Source, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model, and which of its weights were missing or unexpected; UserError for one of a wrong shape."""
    from safetensors import SafetensorError

    quiet()
    try:
        loaded, info = auto.from_pretrained(
            resolve_model(source.model),
            dtype=source.dtype,
            use_safetensors=True,
            trust_remote_code=source.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below; transformers' own message does not name them
            **(four_bit(source.dtype, device()) if source.load_in_4bit else {}),
            **options,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot load the {source.kind} {source.model!r}: {first_line(error)}") from None
    for name, shape, wanted in sorted(info["mismatched_keys"], key=str):
        heads = f": {shape[0]} outputs where one score is wanted" if name == "score.weight" else ""
        raise UserError(
            f"cannot load the {source.kind} {source.model!r}: its {name} has the shape {list(shape)} and not "
            f"{list(wanted)}{heads}"
        )
    return loaded, info


def _ready(model: Any) -> Any:
    """Eval mode, no dropout, on `device()`; a quantised model is already there and must not be moved."""
    switch_off_dropout(model)
    _make_generation_storable(model)
    if not is_quantised(model):
        return model.eval().to(device())
    keep_gradients(model)
    return model.eval()


def _make_generation_storable(model: Any) -> None:
    """Sample by default if the generation config has settings of sampling, as some published ones have without saying.

    transformers reads such a config but refuses to write it, which would end a run when it saves.
    """
    generation = getattr(model, "generation_config", None)
    if generation is None or _is_valid(generation):
        return
    generation.do_sample = True
    if not _is_valid(generation):
        ends = {name: getattr(generation, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        notice(
            f"the generation config of {model.config._name_or_path!r} is not valid: only its special tokens are kept"
        )
        model.generation_config = type(generation)(**{f"{name}_token_id": value for name, value in ends.items()})


def _is_valid(generation: Any) -> bool:
    try:
        generation.validate(strict=True)
    except ValueError:
        return False
    return True


def _restore_head(model: Any, source: str) -> None:
    """Reload the head's float32 weights, which from_pretrained rounded to the trunk's dtype."""
    from safetensors import safe_open

    for name, parameter in model.score.named_parameters():
        file = _file_with(f"score.{name}", source)
        if file is not None:
            with safe_open(file, framework="pt") as tensors:
                if f"score.{name}" in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                    parameter.data.copy_(tensors.get_tensor(f"score.{name}"))


def _file_with(weight: str, source: str) -> str | None:
    """The file that holds a weight, if any does, of a folder or of a model in the hub's cache, one file or several.

    The hub is not asked: the model was loaded, so its files are here.
    """
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
    from transformers.utils.hub import cached_file

    here = {
        "local_files_only": True,
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **here)
    name = SAFE_WEIGHTS_NAME
    if index is not None:
        name = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].get(weight, name)
    found: str | None = cached_file(source, name, **here)
    return found


def set_score_normalizer(model: Any, mean: float, std: float) -> None:
    """Store in the reward model's config that a score is (raw - mean) / std."""
    model.config.score_mean, model.config.score_std = float(mean), float(std)


def score_normalizer(model: Any) -> tuple[float, float]:
    """Mean and standard deviation for normalising scores and values; (0, 1) before they are known."""
    return getattr(model.config, "score_mean", 0.0), getattr(model.config, "score_std", 1.0)


def make_critic(model: Any) -> Any:
    """Turn a reward model into a critic in place: mean and std are folded into a head with a bias. Returns it."""
    mean, std = score_normalizer(model)
    score = model.score
    value = nn.Linear(score.in_features, 1, device=score.weight.device, dtype=torch.float32)
    with torch.no_grad():
        value.weight.copy_(score.weight / std)
        value.bias.copy_(((0.0 if score.bias is None else score.bias) - mean) / std + torch.zeros_like(value.bias))
    model.score = value
    set_score_normalizer(model, 0.0, 1.0)
    return model


def context_length(model: Any) -> int:
    """Most tokens the model can read, by its config; for a model with images, by its text config."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31)


def reading_limits(model: Any, wanted: Limits) -> Limits:
    """The limits `wanted` by the user, with those of the model's context and vocabulary."""
    rows = model.get_input_embeddings().weight.shape[0]
    return replace(wanted, max_length=min(wanted.max_length, context_length(model)), vocabulary=int(rows))


def fit_padding(tokenizer: Any, model: Any) -> None:
    """Pad with the EOS token if the tokenizer's pad token is not in the model's embeddings."""
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.pad_token_id >= rows:
        notice(f"the pad token {tokenizer.pad_token!r} is not in the model's embeddings: padding with the EOS token")
        tokenizer.pad_token = tokenizer.eos_token


def parameter_count(model: Any) -> int:
    """Number of weights of the model; shared ones count once."""
    shapes = [
        getattr(p, "quant_state", p).shape for p in model.parameters()
    ]  # one stored entry holds two 4-bit weights
    return sum(map(math.prod, shapes))


def reward_parameter_count(model: str, trust_remote_code: bool = False) -> int:
    """Number of weights of the reward model that starts from `model`, from the configuration alone."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    quiet()
    try:
        config = AutoConfig.from_pretrained(resolve_model(model), num_labels=1, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            empty = AutoModelForSequenceClassification.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the reward model {model!r}: {first_line(error)}") from None
    return parameter_count(empty)
