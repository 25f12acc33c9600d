# SPDX-License-Identifier: Apache-2.0
"""Loading Hugging Face models, and reading log-probabilities, values and scores out of their hidden states.

Everything is aligned with the tokens: `[b, t]` of a log-probability or a value belongs to `input_ids[b, t]` and is read
from the hidden state at t - 1, the one that predicts this token. Full logits are never made: rows of hidden states at
the tokens that count go to `rf.linear_token_logprobs`, flattened and contiguous.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rlhf_fast as rf

from .errors import UserError
from .gguf import resolve_model
from .run import notice


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype of the weights. "auto" is bfloat16 on CUDA and on CPUs with AVX512_BF16 or AMX, else float32."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    if torch.cuda.is_available():
        return torch.bfloat16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if not fast:
        notice("this CPU has neither AVX512_BF16 nor AMX, so bfloat16 would be slow: working in float32")
    return torch.bfloat16 if fast else torch.float32


def device() -> torch.device:
    """Where models go: the first GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_tokenizer(model: str) -> Any:
    """The tokenizer, padding on the left. A missing pad token is the EOS token: pads are found by mask, never by id."""
    from transformers import AutoTokenizer

    _quiet()
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(model), padding_side="left")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the tokenizer of {model!r}: {_first_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {model!r} has no EOS token; completions could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(model: str, dtype: str | torch.dtype) -> Any:
    """An AutoModelForCausalLM in eval mode on `device()`; `dtype` as for `resolve_dtype`."""
    from transformers import AutoModelForCausalLM

    _quiet()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(resolve_model(model), dtype=resolve_dtype(dtype))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the language model {model!r}: {_first_line(error)}") from None
    return loaded.eval().to(device())


def load_reward_model(model: str, dtype: str | torch.dtype, tokenizer: Any = None) -> Any:
    """An AutoModelForSequenceClassification with one label, from a reward model or (new head) from a language model.

    The head stays in float32, so that scores are not rounded to the 8 bits of bfloat16. With `tokenizer` the pad id is
    written into the config, as users of the saved model need it for batches.
    """
    from transformers import AutoModelForSequenceClassification

    _quiet()
    source = resolve_model(model)
    try:
        loaded = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, dtype=resolve_dtype(dtype))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot load the reward model {model!r}: {_first_line(error)}") from None
    if not isinstance(getattr(loaded, "score", None), nn.Linear):
        raise UserError(
            f"{type(loaded).__name__} has no linear head named `score`; such a model cannot score completions here"
        )
    loaded.score.float()
    _restore_head(loaded, Path(source))
    if tokenizer is not None:
        loaded.config.pad_token_id = tokenizer.pad_token_id
    return loaded.eval().to(device())


def _restore_head(model: Any, folder: Path) -> None:
    """Read the head's float32 weights again: from_pretrained rounded them to the trunk's dtype."""
    from safetensors import safe_open

    file = folder / "model.safetensors"
    if file.is_file():
        with safe_open(str(file), framework="pt") as tensors:
            for name, parameter in model.score.named_parameters():
                if f"score.{name}" in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                    parameter.data.copy_(tensors.get_tensor(f"score.{name}"))


def set_score_normalizer(model: Any, mean: float, std: float) -> None:
    """Keep in the reward model's config that a score is (raw - mean) / std from now on."""
    model.config.score_mean, model.config.score_std = float(mean), float(std)


def score_normalizer(model: Any) -> tuple[float, float]:
    """Mean and standard deviation that scores and values are normalised by; (0, 1) before they are known."""
    return getattr(model.config, "score_mean", 0.0), getattr(model.config, "score_std", 1.0)


def make_critic(model: Any) -> Any:
    """Turn a reward model into a critic: its normaliser moves into its head, which gets a bias. Returns the model."""
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
    """Most tokens the model can read, as its config says."""
    return int(getattr(model.config, "max_position_embeddings", None) or 2**31)


def position_ids(attention_mask: Tensor) -> Tensor:
    """(B, T) positions that count real tokens only, so that left padding does not shift them."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_(min=0)


def hidden_states(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, T, H) last hidden states from the trunk alone: what the head, the value head or the score head read.

    Where all padding is on the right, no real token can see a pad, so the mask is left out and attention takes its
    fast causal path; states at pads are meaningless either way.
    """
    choose_attention(model, input_ids.shape[1])
    mask = attention_mask.bool()
    if bool((mask[:, 1:] <= mask[:, :-1]).all()) and bool(mask[:, 0].all()):
        return model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    return model.base_model(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids(mask), use_cache=False
    ).last_hidden_state


def choose_attention(model: Any, length: int) -> None:
    """Matmuls and a softmax for short sequences in bfloat16 on a CPU, where the fused kernel's backward is slow.

    Measured on two Zen 4 cores, forward and backward of 1024 tokens, 9 heads of 64: 6 ms against 42 at length 16, 25
    against 49 at 128, equal at 512. Decided by the length alone, so that all passes over the same rows agree.
    """
    if (
        model.device.type == "cpu"
        and model.dtype == torch.bfloat16
        and model.config._attn_implementation in ("sdpa", "eager")
    ):
        wanted = "eager" if length <= 192 else "sdpa"
        if model.config._attn_implementation != wanted:
            model.set_attn_implementation(wanted)


def head(model: Any) -> tuple[Tensor, Tensor | None]:
    """Weight (V, H) and bias (V,) of the language-model head."""
    layer = model.get_output_embeddings()
    return layer.weight, getattr(layer, "bias", None)


@dataclass(frozen=True)
class LogitOptions:
    """What a model does to its logits beyond the matmul; the names are those of `rf.linear_token_logprobs`."""

    logit_scale: float = 1.0
    softcap: float | None = None


def logit_options(model: Any) -> LogitOptions:
    """Read from the model's config: Gemma 2 caps its logits, Cohere multiplies and Granite divides them."""
    config = model.config
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    return LogitOptions(float(scale), getattr(config, "final_logit_softcapping", None))


def _head_options(model: Any, temperature: float) -> tuple[Tensor, dict[str, Any]]:
    """The head's weight (V, H), and the rest of what turns hidden states into the sampling law."""
    weight, bias = head(model)
    options = logit_options(model)
    return weight, {
        "bias": bias,
        "temperature": temperature,
        "logit_scale": options.logit_scale,
        "softcap": options.softcap,
    }


def _predicting_rows(model: Any, input_ids: Tensor, attention_mask: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden states (N, H) that predict the tokens of `mask` (B, T), and the flat indices (N,) of those tokens.

    A token in the first column has nothing before it, so it cannot be asked for.
    """
    hidden = hidden_states(model, input_ids, attention_mask)
    tokens = mask.flatten().nonzero().squeeze(1)  # (N,)
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, tokens - 1), tokens


def token_logprobs(
    model: Any, input_ids: Tensor, attention_mask: Tensor, mask: Tensor, temperature: float = 1.0
) -> Tensor:
    """(B, T) float32: [b, t] = log p(input_ids[b, t] | what precedes it) where `mask`, else 0. Differentiable.

    `mask` (B, T) bool must be False in the first column. The law is softmax(logits / temperature).
    """
    rows, tokens = _predicting_rows(model, input_ids, attention_mask, mask)
    weight, options = _head_options(model, temperature)
    logprobs = rf.linear_token_logprobs(rows, weight, input_ids.flatten()[tokens], **options)
    return _scatter(logprobs, tokens, mask)


def token_logprobs_entropy(
    model: Any, input_ids: Tensor, attention_mask: Tensor, mask: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` and, in the same pass, the entropy (B, T) in nats of the law each token was drawn from."""
    rows, tokens = _predicting_rows(model, input_ids, attention_mask, mask)
    weight, options = _head_options(model, temperature)
    stats = rf.linear_token_stats(rows, weight, input_ids.flatten()[tokens], **options)
    assert stats.logprobs is not None and stats.entropy is not None  # both are asked for by default
    return _scatter(stats.logprobs, tokens, mask), _scatter(stats.entropy, tokens, mask)


def _scatter(values: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """(B, T): `values` (N,) at the flat indices `tokens` (N,), 0 elsewhere."""
    return values.new_zeros(mask.numel()).index_put((tokens,), values).view(mask.shape)


def token_values(model: Any, input_ids: Tensor, attention_mask: Tensor, mask: Tensor) -> Tensor:
    """(B, T) float32: [b, t] = value of the state before input_ids[b, t] where `mask`, else 0. Differentiable.

    The critic is a reward model whose head is read at every token instead of the last.
    """
    rows, tokens = _predicting_rows(model, input_ids, attention_mask, mask)
    return _scatter(_read_score(model, rows), tokens, mask)


def sequence_scores(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(B,) float32 normalised score of each sequence, read at its last attended token whatever the padding side."""
    hidden = hidden_states(model, input_ids, attention_mask)
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (attention_mask.long() * places).argmax(dim=1)  # (B,)
    return _read_score(model, hidden[torch.arange(len(last), device=last.device), last])


def _read_score(model: Any, rows: Tensor) -> Tensor:
    """(N,) normalised scores of hidden states (N, H); float32 from the head on."""
    mean, std = score_normalizer(model)
    bias = None if model.score.bias is None else model.score.bias.float()
    raw = nn.functional.linear(rows.float(), model.score.weight.float(), bias).squeeze(-1)
    return (raw - mean) / std


@torch.inference_mode()
def check_head(model: Any, input_ids: Tensor) -> None:
    """Stop if the model's own logits for `input_ids` (1, T) disagree with its trunk and head taken apart."""
    mask = torch.ones_like(input_ids, dtype=torch.bool)
    mask[:, 0] = False
    ours = token_logprobs(model, input_ids, torch.ones_like(input_ids), mask)[:, 1:]
    logits = model(input_ids=input_ids).logits[:, :-1].float()
    theirs = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    gap = float((ours - theirs).abs().max()) if ours.numel() else 0.0
    if not gap < 0.25:  # bfloat16 logits near 30 are 0.125 apart; a head read wrongly is off by nats
        raise UserError(
            f"{type(model).__name__} computes its logits from the last hidden state in a way that is not supported: "
            f"log-probabilities differ by {gap:.3g} nats"
        )


def parameter_count(model: Any) -> int:
    """Weights of the model, shared ones once."""
    return sum(math.prod(p.shape) for p in model.parameters())


def _quiet() -> None:
    """transformers reports each new head and each shard; a phase says what matters itself."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
