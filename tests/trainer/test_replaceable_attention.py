# SPDX-License-Identifier: Apache-2.0
"""Models whose attention selects its keys, or cannot be set, keep the attention that they have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from rlhf_fast.models import attention, heads, prefix_sharing
from rlhf_fast.models.batches import Batch
from rlhf_fast.rollout.decoder import Decoder

SIZES: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_experts_per_tok": 2, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SPARSE = {  # of eight keys
    "tokens": transformers.DeepseekV32Config(
        **SIZES, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
        v_head_dim=8, n_routed_experts=4, n_group=1, topk_group=1, moe_intermediate_size=16, first_k_dense_replace=1,
        index_topk=8, index_head_dim=16, index_n_heads=32,  # so many that no keys tie with a score of 0
    ),
    "blocks": transformers.MiniMaxM3VLTextConfig(
        **SIZES, num_key_value_heads=2, head_dim=8, rotary_dim=8, num_local_experts=4, dense_intermediate_size=48,
        shared_intermediate_size=16, index_n_heads=2, index_head_dim=8, index_block_size=2, index_topk_blocks=4,
        index_local_blocks=1, layer_types=["minimax_m3_sparse"] * 2,
    ),
}  # fmt: skip
LENGTHS = (20, 17, 18)  # the first 12 tokens are the same


def model_of(config: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def rows() -> list[Tensor]:
    """Token ids of each row."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, 99, (12,), generator=generator)
    return [torch.cat([prompt, torch.randint(3, 99, (length - 12,), generator=generator)]) for length in LENGTHS]


@torch.no_grad()
def alone(model: Any) -> list[Tensor]:
    """(T, H) hidden states of each row, by transformers alone."""
    assert model.config._attn_implementation == "sdpa"
    return [model.base_model(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in rows()]


@torch.no_grad()
def assert_states(model: Any, wanted: list[Tensor], side: str = "right") -> None:
    """The hidden states of all rows in one batch, padded on a side."""
    ids, mask = torch.zeros(3, max(LENGTHS), dtype=torch.int64), torch.zeros(3, max(LENGTHS), dtype=torch.bool)
    for i, row in enumerate(rows()):
        where = slice(len(row)) if side == "right" else slice(max(LENGTHS) - len(row), None)
        ids[i, where], mask[i, where] = row, True
    got = heads.hidden_states(model, Batch(ids, mask, mask))
    torch.testing.assert_close(got[mask], torch.cat(wanted), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_model_that_selects_keys_selects_them_after_it_has_generated(side: str) -> None:
    """And while it generates. Its indexer is ignored under another name than "sdpa" or "eager"."""
    model = model_of(SPARSE["tokens"])
    wanted = alone(model)
    attention.choose_attention(model)
    decoder = Decoder(model, [row[:12].tolist() for row in rows()], 0, 1, 5)
    for place in range(12, 17):
        decoder.step(torch.stack([row[place] for row in rows()]))
        torch.testing.assert_close(decoder.hidden, torch.stack([x[place] for x in wanted]), atol=1e-4, rtol=1e-4)
    assert_states(model, wanted, side)


@pytest.mark.parametrize("name", SPARSE)
def test_no_attention_but_transformers_own_is_set(name: str) -> None:
    model = model_of(SPARSE[name])
    for dtype in (torch.float32, torch.bfloat16):
        attention.choose_attention(model.to(dtype))
        assert prefix_sharing.packing_kernel(model) is None
        assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation(attention.registered())
    with pytest.raises(ValueError, match="selects some"):
        model(input_ids=rows()[0][None])


def test_attention_that_cannot_be_set_is_not_set_at_every_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers logs a warning each time."""
    model = model_of(
        transformers.FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    )
    monkeypatch.setattr(model, "set_attn_implementation", lambda name: pytest.fail(f"set to {name}"))
    attention.choose_attention(model)
    attention.choose_attention(model.bfloat16(), 8)
    assert prefix_sharing.packing_kernel(model) is None


def test_without_the_private_question_of_transformers_only_what_agrees_is_packed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`_can_set_attn_implementation` is not public. Falcon then keeps its attention, whatever is set."""
    sizes: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    falcon = model_of(transformers.FalconConfig(**sizes))
    llama = model_of(transformers.LlamaConfig(**sizes, intermediate_size=48))
    assert not attention.is_replaceable(falcon) and attention.is_replaceable(llama)

    class Newer:
        """A model of a transformers that does not have it."""

        def __init__(self, model: Any) -> None:
            self.config, self._supports_sdpa = model.config, model._supports_sdpa

    assert attention.is_replaceable(Newer(falcon)) and attention.is_replaceable(Newer(llama))
    for module in (attention, prefix_sharing):
        monkeypatch.setattr(module, "is_replaceable", lambda model: True)
    for model, kernel in ((falcon, None), (llama, "blocks")):
        wanted = alone(model)
        assert prefix_sharing.packing_kernel(model) == kernel
        attention.choose_attention(model)
        assert_states(model, wanted)
