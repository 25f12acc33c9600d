# SPDX-License-Identifier: Apache-2.0
"""Attention over packed tokens: no pads, and sequences may share a prefix.

Known to transformers as the attention implementation "rlhf_fast". With a `packed_row` (`prefix_sharing.py`) among the
trunk's arguments there is one row of tokens, and its blocks (or, on GPUs, a mask for `flex.py`) say which queries see
which keys. Without one it is "sdpa", but for one new token per row on a CPU, which a kernel of ours reads.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_fast.ops.decode_attention import decode_attention, has_decode_kernel

NAME = "rlhf_fast"
LONGEST_PLAIN, MOST_SCORES = 1024, 2**26  # for packed rows: keys, and scores of all heads (2 bytes each)
LONGEST_EAGER = 192  # keys, for padded rows
UNKNOWN = (
    "softcap",
    "s_aux",
    "position_bias",
    "cache",
    "indices",
    "block_indices",
)  # arguments of some models' attention that ours does not support
SELECTED = UNKNOWN[-2:]  # the keys that an indexer selected
INDEXERS = ("index_topk", "index_topk_blocks")  # in the configs of models that have one


@cache
def registered() -> str:
    """Register the attention with transformers and return its name.

    The import is here because it takes two seconds, and a wrong file name should be reported before.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def choose_attention(model: Any, length: int | None = None) -> None:
    """Pick the attention kernel for the coming padded passes over rows of `length` tokens; None means generation.

    In bfloat16 on a CPU, short rows use matmuls and a softmax ("eager"), since the fused kernel's backward is slow.
    Measured on two Zen 4 cores, forward and backward of 1024 tokens, 9 heads of 64: 6 ms against 42 at length 16, 25
    against 49 at 128, equal at 512. The choice depends on the length alone, so that all passes over the same rows use
    the same kernel. Generation uses `attend`.
    """
    current = model.config._attn_implementation
    if model.device.type != "cpu" or current not in ("sdpa", "eager", NAME):
        return
    short = length is not None and length <= LONGEST_EAGER
    if model.dtype != torch.bfloat16:
        wanted = NAME if length is None and current == "sdpa" else current
    else:
        wanted = "eager" if short else NAME
    if current == wanted or (wanted == NAME and length is not None and current == "sdpa"):
        return  # they are the same where each row has several tokens
    if is_replaceable(model):
        model.set_attn_implementation(registered() if wanted == NAME else wanted)


def is_replaceable(model: Any) -> bool:
    """Whether the model is the same model with attention of ours.

    Some have an indexer, which selects the keys of each query. For "eager" and "sdpa" transformers masks the others; to
    attention of any other name it passes the selection. Some support only "eager", and some have attention of their own
    (Falcon), for which transformers logs a warning at each attempt to set it.
    """
    config = model.config.get_text_config()
    if any(getattr(config, name, None) is not None for name in INDEXERS):
        return False
    # Not public: should a transformers come without it, `packing_kernel` still tries what was set.
    settable = getattr(model, "_can_set_attn_implementation", None)
    return bool(getattr(model, "_supports_sdpa", False) and (settable is None or settable()))


class AttentionBlock(NamedTuple):
    """R rows of Q queries and the K keys that each row sees, as indices into the packed row; 0 at pads."""

    queries: Tensor  # (R, Q)
    keys: Tensor  # (R, K)
    bias: Tensor | None  # (R or 1, Q, K), -inf where a query does not see a key; None: Q = K, causal, not plain
    plain: bool  # use two matmuls and a softmax, not the fused kernel
    real: Tensor  # flat indices (n,) of the queries that are not pads, in token order


def block_of(model: Any, queries: Tensor, keys: Tensor, last: Tensor, real: Tensor) -> AttentionBlock:
    """The block in which queries (R, Q) see the keys (R, K) up to index `last` (R or 1, Q); `real` (R, Q) bool.

    Arguments are on the CPU, the block is where the model is.
    """
    plain = plain_is_faster(model, queries, keys)
    causal = not plain and queries is keys
    real = real.flatten().nonzero().squeeze(1)
    queries, keys, last, real = (x.to(model.device, non_blocking=True) for x in (queries, keys, last, real))
    bias = None
    if not causal:
        later = torch.arange(keys.shape[1], device=keys.device) > last.unsqueeze(-1)
        dtype = torch.float32 if plain else model.dtype  # of the scores
        bias = torch.zeros(later.shape, dtype=dtype, device=keys.device).masked_fill_(later, -torch.inf)
    return AttentionBlock(queries, keys, bias, plain, real)


def plain_is_faster(model: Any, queries: Tensor, keys: Tensor) -> bool:
    """Whether two matmuls and a softmax are faster than the fused kernel, whose backward is slow in bfloat16 on a CPU.

    Measured on two Zen 4 cores, forward and backward of 9 heads of 64 (ms, plain and fused): 18 and 50 for 16 rows of
    124 queries and 188 keys, 68 and 116 for 8 of 256 and 768. Longer rows use the fused kernel, because the plain one
    saves its weights for the backward.
    """
    if model.device.type != "cpu" or model.dtype != torch.bfloat16 or keys.shape[1] > LONGEST_PLAIN:
        return False
    return queries.numel() * keys.shape[1] * model.config.get_text_config().num_attention_heads <= MOST_SCORES


def attend(
    module: nn.Module,
    query: Tensor,  # (1, heads, N, D)
    key: Tensor,  # (1, key heads, N, D)
    value: Tensor,  # (1, key heads, N, D')
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed_row: Any = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """(1, N, heads, D') attention of each token over those it sees; the signature is transformers'.

    Raises:
        ValueError: on arguments that would be ignored.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if any(options.get(name) is not None for name in SELECTED):
        raise ValueError(
            f'attention "{NAME}" reads every key, but {type(module).__name__} selects some ({", ".join(SELECTED)}); '
            'set_attn_implementation("sdpa") of such a model'
        )
    if packed_row is None and _is_one_token(query, key, value, attention_mask, dropout, options):
        mask = None if attention_mask is None else attention_mask[:, 0, 0].expand(len(query), -1)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return decode_attention(query[:, :, 0], key, value, mask, scaling).unsqueeze(1), None
    if packed_row is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    if dropout or any(options.get(name) is not None for name in UNKNOWN):
        raise ValueError(f"attention over packed rows supports neither dropout nor {', '.join(UNKNOWN)}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if packed_row.flex is not None:
        from .flex import attend as flex_attend

        return flex_attend(query, key, value, packed_row.flex, scaling), None
    tokens = [x[0].transpose(0, 1) for x in (query, key, value)]  # (N, heads, D)
    outputs = []
    for block in packed_row.blocks:
        queries, keys, values = (
            _Take.apply(x.flatten(1), places).unflatten(2, x.shape[1:])  # type: ignore[no-untyped-call]
            for x, places in zip(tokens, (block.queries, block.keys, block.keys), strict=True)
        )
        if block.plain:
            assert block.bias is not None
            out = _plain(queries, keys, values, block.bias, scaling)
        else:
            mask = None if block.bias is None else block.bias.unsqueeze(1).to(query.dtype)  # autocast may lower it
            heads = [x.transpose(1, 2) for x in (queries, keys, values)]
            out, _ = sdpa_attention_forward(
                module, heads[0], heads[1], heads[2], mask, scaling=scaling, is_causal=mask is None
            )
        outputs.append(out.flatten(0, 1).index_select(0, block.real))
    return torch.cat(outputs).unsqueeze(0), None


def _is_one_token(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, options: dict[str, Any]
) -> bool:
    """Whether a kernel of ours serves this call: one new token per row, without a gradient, in one dtype (autocast may
    leave query and key wider than value)."""
    return (
        query.shape[2] == 1
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)))
        and has_decode_kernel(query)
        and query.dtype == key.dtype == value.dtype
        and len(query) == len(key)
        and (mask is None or (mask.dtype == torch.bool and mask.shape[1:] == (1, 1, key.shape[2])))
        and not dropout
        and all(options.get(name) is None for name in UNKNOWN)
    )


class _Take(torch.autograd.Function):
    """Gather tokens (N, W) at indices (R, K); gradients of a token in several rows are summed in float32."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, places: Tensor) -> Tensor:  # type: ignore[override]
        ctx.count = len(tokens)
        ctx.save_for_backward(places)
        return tokens.index_select(0, places.flatten()).unflatten(0, places.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (places,) = ctx.saved_tensors
        rows = grad.flatten(0, 1)
        sums = rows.new_zeros((ctx.count, rows.shape[1]), dtype=torch.promote_types(rows.dtype, torch.float32))
        return sums.index_add_(0, places.flatten(), rows.to(sums.dtype)).to(grad.dtype), None


def _plain(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """(R, Q, heads, D) from rows (R, Q, heads, D) and (R, K, key heads, D)."""
    rows, count, heads, size = query.shape
    key_heads, width = key.shape[2], value.shape[-1]
    shared = heads // key_heads  # heads that read the same keys are one matmul
    queries = query.view(rows, count, key_heads, shared, size).permute(0, 2, 3, 1, 4)
    queries = queries.reshape(rows * key_heads, shared * count, size)
    keys, values = (x.transpose(1, 2).reshape(rows * key_heads, x.shape[1], -1) for x in (key, value))
    output = _Plain.apply(queries, keys, values, bias, rows, scaling).view(rows, key_heads, shared, count, width)  # type: ignore[no-untyped-call]
    return output.permute(0, 3, 1, 2, 4).reshape(rows, count, heads, width)


class _Plain(torch.autograd.Function):
    """softmax(queries @ keys.T * scaling + bias) @ values, in batches (R * key heads) of heads that share their keys.

    Scores are float32: bfloat16 values near 10 are 0.06 apart, which would cause most of the error. Only the weights
    are saved for the backward, in the dtype of the second matmul: a third of what autograd would save.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor, rows: int, scaling: float
    ) -> Tensor:
        scores = queries.float() @ (keys.float() * scaling).transpose(1, 2)
        scores.view(rows, -1, *bias.shape[1:]).add_(bias.unsqueeze(1))
        weights = scores.softmax(-1).to(values.dtype)
        ctx.save_for_backward(queries, keys, values, weights)
        ctx.scaling = scaling
        return weights @ values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        queries, keys, values, weights = ctx.saved_tensors
        grad_scores = torch.ops.aten._softmax_backward_data(grad @ values.transpose(1, 2), weights, -1, weights.dtype)
        grad_queries, grad_keys = grad_scores @ keys, grad_scores.transpose(1, 2) @ queries
        return grad_queries * ctx.scaling, grad_keys * ctx.scaling, weights.transpose(1, 2) @ grad, None, None, None
