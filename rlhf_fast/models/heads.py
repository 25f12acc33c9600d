# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities, values and scores from the hidden states of Hugging Face models.

Everything is aligned with the tokens: `[b, t]` of a log-probability or a value belongs to `input_ids[b, t]` and is read
from the hidden state at t - 1, the one that predicts this token. Full logits are never computed: the hidden states
of the masked tokens go to `rf.linear_token_logprobs`, flattened and contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import rlhf_fast as rf
from rlhf_fast.distributed.dtensors import full_tensor
from rlhf_fast.errors import UserError
from rlhf_fast.integrations.lm_head import language_model_head

from .activations import activations_of
from .attention import choose_attention
from .batches import Batch, Support
from .fsdp import unsharded
from .loading import score_normalizer
from .prefix_sharing import pack, packed_states


def position_ids(attention_mask: Tensor) -> Tensor:
    """(B, T) positions that count real tokens only, so that left padding does not shift them."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_(min=0)


def hidden_states(model: Any, batch: Batch) -> Tensor:
    """(B, T, H) last hidden states of the trunk: the input of the language-model, value and score heads."""
    with activations_of(model):
        return _hidden_states(model, batch)


def _hidden_states(model: Any, batch: Batch) -> Tensor:
    """If all padding is on the right, no real token can see a pad, so the mask is left out and attention takes its fast
    causal path; states at pads are meaningless either way. Tokens may then be packed: `prefix_sharing.py`.
    With `batch.positions` rows hold several sequences. transformers sees from the positions that none may attend to
    another (a block-diagonal mask, or the varlen path of flash attention).
    """
    input_ids, copy = batch.input_ids, batch.on_cpu()
    mask = copy.attention_mask.bool()
    if len(input_ids) == 0:  # still run the trunk: the other ranks need this rank's shards of the weights
        one = input_ids.new_zeros((1, 1))
        return _hidden_states(model, Batch(one, one == 0, one != 0))[:0]
    if batch.positions is not None:
        choose_attention(model, input_ids.shape[1])
        return model.base_model(input_ids=input_ids, position_ids=batch.positions, use_cache=False).last_hidden_state
    if bool((mask[:, 1:] <= mask[:, :-1]).all()) and bool(mask[:, 0].all()):
        packed = pack(model, copy.input_ids, mask)
        if packed is not None:
            return packed_states(model, packed)
        choose_attention(model, input_ids.shape[1])
        return model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    choose_attention(model, input_ids.shape[1])
    attended = batch.attention_mask.long()
    return model.base_model(
        input_ids=input_ids, attention_mask=attended, position_ids=position_ids(attended), use_cache=False
    ).last_hidden_state


def head_and_options(model: Any, temperature: float) -> tuple[Tensor, dict[str, Any]]:
    """The head's weight (V, H), and the other arguments of the `rf.linear_*` ops: bias, scale, softcap, temperature."""
    head = language_model_head(model)
    bias = None if head.bias is None else full_tensor(head.bias)
    return full_tensor(head.weight), {**head.options(), "bias": bias, "temperature": temperature}


def predicting_rows(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The hidden states (N, H) that predict the tokens of `batch.mask`, and the flat indices (N,) of those tokens."""
    batch = batch.with_copy()
    hidden = hidden_states(model, batch)
    tokens = batch.on_cpu().mask.flatten().nonzero().squeeze(1).to(hidden.device, non_blocking=True)  # (N,)
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, tokens - 1), tokens


def token_logprobs(model: Any, batch: Batch, temperature: float = 1.0) -> Tensor:
    """(B, T) float32: [b, t] = log p(input_ids[b, t] | what precedes it) where `batch.mask`, else 0. Differentiable.

    p is softmax(logits / temperature), over the ids of `batch.support` alone if it has one.
    """
    rows, tokens = predicting_rows(model, batch)
    logprobs = row_logprobs(model, rows, batch.input_ids.flatten()[tokens], batch.support, temperature)
    return scatter(logprobs, tokens, batch.mask)


def row_logprobs(
    model: Any, rows: Tensor, targets: Tensor, support: Support | None = None, temperature: float = 1.0
) -> Tensor:
    """(N,) log-probabilities of `targets` (N,), from the hidden states (N, H) that predict them."""
    weight, options = head_and_options(model, temperature)
    if support is None:
        return rf.linear_token_logprobs(rows, weight, targets, **options)
    if options.pop("lora") is not None:
        raise UserError("top_k and top_p do not go with an adapter on the language-model head")
    return rf.linear_sampled_logprobs(rows, weight, targets, support.ids, support.offsets, **options)


def token_logprobs_entropy(model: Any, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """`token_logprobs` and, in the same pass, the entropy (B, T) in nats of softmax(logits / temperature) over all
    ids, including those outside of `batch.support`."""
    rows, tokens = predicting_rows(model, batch)
    targets = batch.input_ids.flatten()[tokens]
    weight, options = head_and_options(model, temperature)
    stats = rf.linear_token_stats(rows, weight, targets, **options)
    assert stats.logprobs is not None and stats.entropy is not None  # the op gives both by default
    logprobs = stats.logprobs
    if batch.support is not None:
        logprobs = row_logprobs(model, rows, targets, batch.support, temperature)
    return scatter(logprobs, tokens, batch.mask), scatter(stats.entropy, tokens, batch.mask)


def token_kl(model: Any, reference: Any, batch: Batch, temperature: float = 1.0) -> Tensor:
    """(B, T) nats: KL(policy || reference) over the whole vocabulary, before each token of `batch.mask`, else 0.

    `reference()` is a context manager that yields the reference model, like `Agent.reference`.
    """
    rows, tokens = predicting_rows(model, batch)
    weight, options = head_and_options(model, temperature)
    with reference() as ref_model:
        ref_rows, _ = predicting_rows(ref_model, batch)
        ref_weight, ref_options = head_and_options(ref_model, temperature)
    ref_options.pop("lora")
    kl = rf.linear_token_kl(
        rows, weight, ref_rows, ref_weight, **options, **{f"ref_{k}": v for k, v in ref_options.items()}
    )
    return scatter(kl, tokens, batch.mask)


def scatter(values: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """(B, T): `values` (N,) at the flat indices `tokens` (N,), 0 elsewhere."""
    return values.new_zeros(mask.numel()).index_put((tokens,), values).view(mask.shape)


def token_values(model: Any, batch: Batch) -> Tensor:
    """(B, T) float32: [b, t] = value of the state before input_ids[b, t] where `batch.mask`, else 0. Differentiable.

    The critic is a reward model whose head is applied at every token instead of only the last.
    """
    rows, tokens = predicting_rows(model, batch)
    return scatter(_read_score(model, rows), tokens, batch.mask)


def sequence_scores(model: Any, batch: Batch) -> Tensor:
    """(B,) float32 normalised score of each sequence, read at its last attended token whatever the padding side."""
    hidden = hidden_states(model, batch)
    places = torch.arange(batch.attention_mask.shape[1], device=hidden.device)
    last = (batch.attention_mask.long() * places).argmax(dim=1)  # (B,)
    return _read_score(model, hidden[torch.arange(len(last), device=last.device), last])


def _read_score(model: Any, rows: Tensor) -> Tensor:
    """(N,) normalised scores of hidden states (N, H); float32 from the head on."""
    mean, std = score_normalizer(model)
    bias = None if model.score.bias is None else model.score.bias.float()
    raw = nn.functional.linear(rows.float(), model.score.weight.float(), bias).squeeze(-1)
    return (raw - mean) / std


@torch.no_grad()
def check_head(model: Any, input_ids: Tensor) -> None:
    """UserError if the model's own logits for `input_ids` (1, T) differ from those of its trunk and head."""
    attended = torch.ones_like(input_ids, dtype=torch.bool)
    wanted = attended.clone()
    wanted[:, 0] = False
    with unsharded(model):
        ours = token_logprobs(model, Batch(input_ids, attended, wanted))[:, 1:]
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
    theirs = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    gap = float((ours - theirs).abs().max()) if ours.numel() else 0.0
    if not gap < 0.25:  # bfloat16 logits near 30 are 0.125 apart; a head read wrongly is off by nats
        raise UserError(
            f"{type(model).__name__} computes its logits from the last hidden state in a way that is not supported: "
            f"log-probabilities differ by {gap:.3g} nats"
        )
