# SPDX-License-Identifier: Apache-2.0
"""patch_loss on models of transformers: the loss and the gradients of the model's own forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf_fast.integrations import patch_loss

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 211, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "initializer_range": 0.2,
}  # fmt: skip
GEMMA = {"num_key_value_heads": 1, "head_dim": 16, "final_logit_softcapping": 3.0}
GPT2 = {
    "vocab_size": 211,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gemma2, softcap": ("Gemma2ForCausalLM", "Gemma2Config", {**SMALL, **GEMMA}),
    "cohere, scale": ("CohereForCausalLM", "CohereConfig", {**SMALL, "logit_scale": 0.3}),
    "granite, scale": ("GraniteForCausalLM", "GraniteConfig", {**SMALL, "logits_scaling": 4.0}),
}


def make(name: str) -> Any:
    torch.manual_seed(0)
    model, config, options = MODELS[name]
    return getattr(transformers, model)(getattr(transformers, config)(**options)).train()


def batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 211, (3, 14), generator=generator)
    labels = ids.clone()
    labels[:, :6] = -100
    labels[0, 9] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def loss_and_gradients(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("total", [None, 31, torch.tensor(31)], ids=["mean", "total", "total tensor"])
def test_loss_and_gradients(name: str, total: Any, generator: torch.Generator) -> None:
    model, inputs = make(name), batch(generator)
    if total is not None:
        inputs["num_items_in_batch"] = total
    loss, gradients = loss_and_gradients(model, inputs)
    with patch_loss(model) as patch:
        assert patch.report().endswith("replaced")
        assert model(**inputs).logits is None
        our_loss, our_gradients = loss_and_gradients(model, inputs)
    torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=1e-6)
    for key, gradient in gradients.items():
        torch.testing.assert_close(our_gradients[key], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item())
    assert "forward" not in vars(model)


def test_everything_else_is_the_models_own(generator: torch.Generator) -> None:
    model, inputs = make("llama"), batch(generator)
    with torch.no_grad():
        expected = model.eval()(**inputs)
        patch_loss(model)
        made = model(**inputs)
    assert torch.equal(made.loss, expected.loss) and torch.equal(made.logits, expected.logits)
    model.train()
    assert model(input_ids=inputs["input_ids"]).logits is not None
    assert isinstance(model(**inputs, return_dict=False), tuple)
    assert model.generate(inputs["input_ids"], max_new_tokens=2, do_sample=False).shape == (3, 16)


def test_positional_arguments_and_shifted_labels(generator: torch.Generator) -> None:
    model, inputs = make("llama"), batch(generator)
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    with patch_loss(model):
        one = model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"]).loss
        other = model(input_ids=inputs["input_ids"], shift_labels=shifted).loss
    torch.testing.assert_close(one, other)


def test_twice_is_once(generator: torch.Generator) -> None:
    model = make("llama")
    first, second = patch_loss(model), patch_loss(model)
    assert "ours already" in second.report()
    second.undo()
    assert "forward" in vars(model)
    first.undo()
    assert "forward" not in vars(model)


def test_undo_under_somebody_elses_wrapper(generator: torch.Generator) -> None:
    """accelerate wraps model.forward: then undoing leaves the wrapper and hands every call to the model."""
    model, inputs = make("llama"), batch(generator)
    patch = patch_loss(model)
    inner = model.forward
    model.forward = lambda **kwargs: inner(**kwargs)
    patch.undo()
    assert model(**inputs).logits is not None


def test_the_switch_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_FAST_DISABLE", "1")
    model = make("llama")
    assert "left alone" in patch_loss(model).report() and "forward" not in vars(model)


def test_heads_that_are_not_known_are_refused() -> None:
    model = make("llama")
    head = model.lm_head
    model.lm_head = torch.nn.Sequential(head)
    with pytest.raises(ValueError, match="plain nn.Linear"):
        patch_loss(model)
    model.lm_head = head
    model.config.logit_scale = 2.0  # which a Llama does not heed
    with pytest.raises(ValueError, match="its logits differ by"):
        patch_loss(model)
    assert model.training and "forward" not in vars(model)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_a_peft_model(generator: torch.Generator, targets: list[str]) -> None:
    peft = pytest.importorskip("peft")
    model, inputs = make("llama"), batch(generator)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets))
    factors = [p for name, p in wrapped.named_parameters() if "lora_B" in name]
    for factor in factors:
        factor.data.normal_(generator=generator)  # 0 at first, which would hide it
    expected = wrapped(**inputs).loss
    wanted = torch.autograd.grad(expected, factors)
    with patch_loss(wrapped):
        output = wrapped(**inputs)
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(output.loss, factors), wanted, rtol=1e-4, atol=1e-6)


def test_in_hf_trainer(generator: torch.Generator, tmp_path: Any) -> None:
    """Two steps of transformers.Trainer with gradient accumulation, which hands num_items_in_batch on."""
    rows = [{name: x[i % 3] for name, x in batch(generator).items()} for i in range(8)]
    losses = []
    for patched in (False, True):
        model = make("llama")
        if patched:
            patch_loss(model)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, seed=0, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-5)
