# SPDX-License-Identifier: Apache-2.0
"""One row of tokens, with prompts read once: the states and gradients are those of separate rows."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from rlhf_fast.data.examples import pad_right
from rlhf_fast.models import attention, flex, heads, prefix_sharing
from rlhf_fast.models.batches import Batch

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
MODELS = {
    "llama": transformers.LlamaConfig(**SIZES, num_key_value_heads=2),
    "qwen3": transformers.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8),
    "gpt2": transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, bos_token_id=1, eos_token_id=2),
    "gpt_neox": transformers.GPTNeoXConfig(**SIZES),
    "gemma2": transformers.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8),
    "gemma3": transformers.Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=8, sliding_window=16),
}


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(copy.deepcopy(MODELS[name])).eval()


def rows_of(prompts: list[list[int]], completions: list[list[list[int]]]) -> tuple[Tensor, Tensor]:
    ids, mask = pad_right([p + c for p, own in zip(prompts, completions, strict=True) for c in own], 0)
    return ids, mask.bool()


def samples() -> tuple[Tensor, Tensor]:
    """Three prompts, two of which begin alike, and completions some of which do."""
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 7, 8, 40, 41, 42], [60, 61, 62, 63, 64, 65]]
    return rows_of(
        prompts, [[[20, 21], [20, 22, 23, 24], [25]], [[30], [30, 31]], [[50, 51, 52], [53], [54, 55], [56]]]
    )


def states_and_gradients(model: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    wanted = mask.clone()
    wanted[:, 0] = False
    model.zero_grad()
    logprobs = heads.token_logprobs(model, Batch(ids, mask, wanted))
    (logprobs * torch.linspace(0.5, 1.5, logprobs.numel()).view_as(logprobs)).sum().backward()
    return logprobs.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_as_alone(model: Any, ids: Tensor, mask: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, packed_gradients = states_and_gradients(model, ids, mask)
    monkeypatch.setattr(heads, "pack", lambda *args: None)
    alone, gradients = states_and_gradients(model, ids, mask)
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=2e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, atol=2e-5, rtol=2e-4)


@pytest.fixture(params=["fused", "plain", "flex"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Plain attention is for half precision, and FlexAttention for GPUs; here they serve float32 on a CPU too, whose
    digits show every mistake."""
    monkeypatch.setattr(attention, "plain_is_faster", lambda *args: request.param == "plain")
    if request.param == "flex":
        monkeypatch.setattr(prefix_sharing, "packing_kernel", lambda model: "flex")
        # On a CPU PyTorch refuses a backward, though the one of the plain definition works.
        monkeypatch.setattr(sys.modules["torch.nn.attention.flex_attention"], "_validate_device", lambda *args: None)
        monkeypatch.setattr(flex, "BLOCK", 16)  # so that some blocks are full, some partial and most empty
    return request.param


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"gemma2"}))
def test_sharing_changes_neither_values_nor_gradients(name: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name)
    ids, mask = samples()
    found = prefix_sharing.pack(model, ids, mask)
    assert found is not None and found.input_ids.numel() < ids.numel()
    if kernel == "flex":
        assert found.flex is not None and not found.blocks
    else:
        assert {block.plain for block in found.blocks} == {kernel == "plain"}
    assert_same_as_alone(model, ids, mask, monkeypatch)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_checkpointed_layers_find_the_packed_row_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name).train()
    model.config.attn_pdrop = model.config.resid_pdrop = model.config.embd_pdrop = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids, mask = samples()
    logprobs, gradients = states_and_gradients(model, ids, mask)
    model.gradient_checkpointing_enable()
    again, checkpointed = states_and_gradients(model, ids, mask)
    assert torch.equal(again, logprobs)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(checkpointed[parameter], gradient)
    assert_same_as_alone(model, ids, mask, monkeypatch)


@pytest.mark.parametrize("seed", range(3))
def test_blocks_of_flex_attention_hold_what_a_mask_of_all_pairs_holds(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 400, (9,), generator=draw)
    parents = torch.cat([torch.arange(3), torch.randint(3, (6,), generator=draw)])  # three prefixes, six samples
    segments = torch.arange(9).repeat_interleave(lengths)
    prefixes = parents.repeat_interleave(lengths)
    partial, full = flex._blocks(segments, prefixes)
    places = torch.arange(len(segments))
    seen = (segments == segments[:, None]) | (segments == prefixes[:, None])
    seen &= places <= places[:, None]
    for i in range(len(full)):
        for j in range(len(full)):
            block = seen[i * flex.BLOCK : (i + 1) * flex.BLOCK, j * flex.BLOCK : (j + 1) * flex.BLOCK]
            assert bool(block.all()) or not full[i, j]
            assert not block.any() or bool(full[i, j] | partial[i, j])
    assert full.any() and not (full & partial).any() and not (full | partial).tril().all()
    mask = flex.block_mask(segments, prefixes, torch.device("cpu"))
    for blocks, counts, order in (
        (partial, mask.kv_num_blocks, mask.kv_indices),
        (full, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        assert counts is not None and order is not None
        for i, row in enumerate(blocks):
            assert order[0, 0, i, : int(counts[0, 0, i])].tolist() == row.nonzero().flatten().tolist()


def test_a_model_without_flex_attention_falls_back_to_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose probe begins with FlexAttention."""
    model = model_of("llama")

    def broken(*args: Any, **more: Any) -> Tensor:
        raise RuntimeError("no kernel of this shape")

    monkeypatch.setattr(prefix_sharing, "KERNELS_OF", {"cpu": ("flex", "blocks")})
    assert prefix_sharing.packing_kernel(model_of("llama")) == "blocks"  # a CPU has its forward and no backward
    monkeypatch.setattr(sys.modules["torch.nn.attention.flex_attention"], "_validate_device", lambda *args: None)
    assert prefix_sharing.packing_kernel(model) == "flex"
    assert not any(parameter.grad is not None for parameter in model.parameters())
    monkeypatch.setattr(flex, "attend", broken)
    assert prefix_sharing.packing_kernel(model_of("llama")) == "blocks"


@pytest.mark.parametrize("way", ["flex", "blocks"])
def test_a_packed_pass_waits_for_no_device(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on "meta" have no values: whatever reads one to decide something fails."""
    model = model_of("llama").to("meta")
    monkeypatch.setattr(prefix_sharing, "packing_kernel", lambda model: way)
    monkeypatch.setattr(attention, "plain_is_faster", lambda *args: False)
    monkeypatch.setattr(flex, "attend", lambda query, *args: query.transpose(1, 2))  # no "meta" in FlexAttention
    ids, mask = samples()
    on_cpu = Batch(ids, mask, mask & (torch.arange(ids.shape[1]) > 0))
    batch = Batch(*(x.to("meta") for x in on_cpu[:3]), copy=on_cpu)
    for part in batch.plan(6):
        rows = batch.rows(part)
        hidden, places = heads.predicting_rows(model, rows)
        assert hidden.shape == (len(places), 32) and hidden.device.type == "meta"
        assert len(places) == int(on_cpu.rows(part).mask.sum())


def test_rows_of_one_length_that_have_nothing_in_common_are_left_alone() -> None:
    ids, mask = pad_right([[1, 2, 3, 4], [4, 5, 6, 7], [8, 9, 10, 11]], 0)
    assert prefix_sharing.pack(model_of("llama"), ids, mask.bool()) is None


@pytest.mark.parametrize("seed", range(4))
def test_unlike_rows_are_packed_and_change_nothing(seed: int, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts with one to four completions, of any length, prompts that begin alike among them."""
    model = model_of("llama")
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(1, 99, (length,), generator=generator).tolist()

    begin = tokens(2, 6)
    prompts = [begin * (i % 2) + tokens(1, 9) for i in range(6)]
    completions = [[tokens(1, 25) for _ in range(1 + (i + seed) % 4)] for i in range(6)]
    ids, mask = rows_of(prompts, completions)
    found = prefix_sharing.pack(model, ids, mask)
    assert found is not None
    assert found.input_ids.numel() <= int(mask.sum())  # no pads
    assert_same_as_alone(model, ids, mask, monkeypatch)


def test_long_completions_of_a_short_prompt_are_left_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(99, (8, 400), generator=generator)
    ids[:, :4] = 7
    assert prefix_sharing.pack(model_of("llama"), ids, torch.ones_like(ids, dtype=torch.bool)) is None


def test_rows_longer_than_a_sliding_window_are_left_alone() -> None:
    ids = torch.randint(99, (1, 20)).repeat(4, 1)
    ids[:, 15:] = torch.randint(99, (4, 5), generator=torch.Generator().manual_seed(0))
    assert prefix_sharing.pack(model_of("gemma3"), ids, torch.ones_like(ids, dtype=torch.bool)) is None


def test_a_model_that_ignores_the_packed_row_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    trunk = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda packed_row=None, **more: trunk(**more))
    assert prefix_sharing.pack(model, *samples()) is None
    assert model.config._attn_implementation == "sdpa"  # as it was
    assert prefix_sharing.pack(model_of("llama"), *samples()) is not None


def test_attention_that_is_not_a_plain_softmax_is_left_alone() -> None:
    """Gemma 2 caps its scores, which no fused kernel does."""
    model = model_of("gemma2").bfloat16()
    ids, mask = samples()
    assert prefix_sharing.pack(model, ids, mask) is None
    for length in (8, 400):  # where others change to the fused kernel
        ones = torch.ones((1, length), dtype=torch.int64)
        heads.hidden_states(model, Batch(ones, ones.bool(), ones.bool()))
        assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("option", [{"softcap": 30.0}, {"dropout": 0.1}])
def test_options_that_would_be_ignored_are_refused(option: dict[str, float]) -> None:
    model = model_of("llama")
    found = prefix_sharing.pack(model, *samples())
    q = torch.zeros(1, 4, found.input_ids.shape[1], 8) if found else torch.empty(0)
    with pytest.raises(ValueError, match="dropout nor softcap"):
        attention.attend(model, q, q[:, :2], q[:, :2], None, packed_row=found, **option)


def test_without_a_packed_row_it_is_the_fused_attention_of_transformers() -> None:
    model, ids = model_of("llama"), torch.randint(3, 99, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    wanted = model(ids, attention_mask=mask, position_ids=heads.position_ids(mask)).logits
    model.set_attn_implementation(attention.registered())
    assert torch.equal(model(ids, attention_mask=mask, position_ids=heads.position_ids(mask)).logits, wanted)


def test_a_wrong_file_name_need_not_wait_for_the_models_of_transformers() -> None:
    code = "import sys, rlhf_fast.trainer.rl.ppo; sys.exit('transformers.modeling_utils' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_long_rows_are_left_to_the_fused_kernel() -> None:
    """In bfloat16, whose plain attention keeps a layer's weights."""
    model = model_of("llama").bfloat16()
    for length, plain in ((1000, True), (1025, False)):
        ids = torch.ones(3, length, dtype=torch.int64)
        ids[:, 8:] = torch.arange(3)[:, None]
        mask = torch.arange(length) < torch.tensor([length, 20, 20])[:, None]
        found = prefix_sharing.pack(model, ids, mask)
        assert found is not None and found.blocks[-1].plain == plain


def test_gradients_of_a_prompt_are_summed_in_float32() -> None:
    tokens = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    places = torch.zeros(600, 1, dtype=torch.int64)
    attention._Take.apply(tokens, places).sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.tolist() == [[600.0] * 3, [0.0] * 3]  # bfloat16 sums of ones end at 256


@pytest.mark.parametrize("sharpness", [1.0, 3.0])
def test_plain_attention_in_bfloat16_is_as_exact_as_the_fused_one(sharpness: float) -> None:
    """Against float64; transformers' eager attention, whose scores are bfloat16, is several times worse."""
    generator = torch.Generator().manual_seed(0)
    rows, asked, keys, heads_, key_heads, size = 3, 20, 45, 6, 2, 16
    shapes = [(rows, asked, heads_, size), (rows, keys, key_heads, size), (rows, keys, key_heads, size)]
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    inputs = [(x * (1 if i == 2 else sharpness)).bfloat16() for i, x in enumerate(drawn)]
    incoming = torch.randn(shapes[0], generator=generator).bfloat16()
    last = torch.arange(asked) + keys - asked
    bias = torch.zeros(1, asked, keys).masked_fill_(torch.arange(keys) > last[:, None], -torch.inf)

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = bias[:, None].to(q.dtype)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)

    def run(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        out = function(*leaves)
        out.backward(incoming.to(dtype))
        return [out.detach().double(), *(x.grad.double() for x in leaves if x.grad is not None)]

    truth = run(fused, torch.float64)
    ours = run(lambda q, k, v: attention._plain(q, k, v, bias, size**-0.5), torch.bfloat16)
    theirs = run(fused, torch.bfloat16)
    for wanted, mine, other in zip(truth, ours, theirs, strict=True):
        assert (mine - wanted).norm() <= 1.5 * (other - wanted).norm()
        assert (mine - wanted).norm() <= 6e-3 * wanted.norm()


def test_a_plan_keeps_the_rows_of_a_prompt_together() -> None:
    ids, mask = samples()
    asked = mask & (torch.arange(ids.shape[1]) >= torch.tensor([8, 8, 8, 7, 7, 6, 6, 6, 6])[:, None])
    plan = Batch(ids, mask, asked).plan(4)
    assert [part.tolist() for part in plan] == [[1, 0, 2, 4], [3, 5, 7, 6], [8]]


def test_a_model_with_images_is_read_by_the_sizes_of_its_text_config() -> None:
    """Its config has no vocab_size of its own; training on text alone failed with an AttributeError."""
    text = transformers.Gemma3TextConfig(
        vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, sliding_window=32,
    )  # fmt: skip
    vision = transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=4, image_token_index=52,
        boi_token_index=3, eoi_token_index=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    ids = torch.randint(4, 50, (4, 12))
    ids[1::2, :6] = ids[0::2, :6]
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1::2, 9:] = False
    wanted = mask.clone()
    wanted[:, :6] = False
    got = heads.token_logprobs(model, Batch(ids, mask, wanted))
    plain = model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1].log_softmax(-1)
    truth = plain.gather(-1, ids[:, 1:, None]).squeeze(-1) * wanted[:, 1:]
    torch.testing.assert_close(got[:, 1:], truth, atol=1e-4, rtol=0)
