# SPDX-License-Identifier: Apache-2.0
"""Real steps of TRL's trainers on a tiny random model: the same losses and gradients, patched and not."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast.integrations import apply_rlhf_fast_to_trl

trl = pytest.importorskip("trl", reason="make test-integrations installs it")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

WORDS = [f"w{i}" for i in range(507)]  # with the special tokens an odd vocabulary
TEXT = [" ".join(WORDS[(7 * row + i) % 507] for i in range(12)) for row in range(8)]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def model(folder: Path) -> Any:
    """From a folder: TRL loads the reference model from where the policy came."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=510, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0, eos_token_id=1, bos_token_id=1, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    return transformers.LlamaForCausalLM.from_pretrained(folder / "model")


def common(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
        "logging_steps": 1, "report_to": [], "save_strategy": "no", "use_cpu": True, "seed": 0, "bf16": False,
        "gradient_checkpointing": False, "max_grad_norm": 0.0, "optim": "sgd", "disable_tqdm": True,
        **options,
    }  # fmt: skip


def data(rows: dict[str, list[str]]) -> dict[str, Any]:
    return {"train_dataset": datasets.Dataset.from_dict(rows), "processing_class": tokenizer()}


def sft(folder: Path) -> Any:
    halves = [text.split(" ", 5) for text in TEXT]
    rows = {"prompt": [" ".join(h[:5]) for h in halves], "completion": [" " + h[5] for h in halves]}
    return trl.SFTTrainer(model(folder), trl.SFTConfig(**common(folder)), **data(rows))


def dpo(folder: Path) -> Any:
    starts, ends = [" " + text[:20] for text in TEXT], [" " + text[-20:] for text in TEXT]
    rows = {"prompt": TEXT, "chosen": starts, "rejected": ends}
    return trl.DPOTrainer(model(folder), args=trl.DPOConfig(**common(folder)), **data(rows))


def share_of_even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(i % 2 == 0 for i in ids) / max(1, len(ids)) for ids in completion_ids]


def online(trainer: str) -> Callable[[Path], Any]:
    def make(folder: Path) -> Any:
        options = common(folder, num_generations=4, max_completion_length=9, beta=0.05, temperature=0.8)
        config = getattr(trl, f"{trainer}Config")(**options)
        return getattr(trl, f"{trainer}Trainer")(model(folder), share_of_even, args=config, **data({"prompt": TEXT}))

    return make


TRAINERS = {"SFT": sft, "DPO": dpo, "GRPO": online("GRPO"), "RLOO": online("RLOO")}


class Recorder(transformers.TrainerCallback):  # type: ignore[name-defined, misc]
    """Gradients just before each optimizer step."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})


def run(make: Callable[[Path], Any], folder: Path) -> tuple[list[dict[str, float]], list[dict[str, Any]], float]:
    trainer = make(folder)
    recorder = Recorder()
    trainer.add_callback(recorder)
    torch.manual_seed(1)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    return [row for row in trainer.state.log_history if "loss" in row], recorder.gradients, seconds


@pytest.mark.parametrize("name", TRAINERS)
def test_two_steps_are_the_same(name: str, tmp_path: Path) -> None:
    logs, gradients, seconds = run(TRAINERS[name], tmp_path / "plain")
    with apply_rlhf_fast_to_trl() as patch:
        assert f"{trl.__name__}.trainer.utils._ChunkedLogProbFunction" in patch.replaced
        our_logs, our_gradients, our_seconds = run(TRAINERS[name], tmp_path / "ours")
    print(f"{name}: {seconds:.2f} s plain, {our_seconds:.2f} s patched, ratio {seconds / our_seconds:.2f}")
    assert len(logs) == len(our_logs) == len(gradients) == len(our_gradients) == 2
    for theirs, ours in zip(logs, our_logs, strict=True):
        shared = {key for key in theirs if "time" not in key and isinstance(theirs[key], float)} - {"train_runtime"}
        assert {"loss"} <= shared
        for key in shared:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), key
    for theirs, ours in zip(gradients, our_gradients, strict=True):
        assert any(gradient.abs().max() > 1e-4 for gradient in theirs.values()), "nothing was learned"
        for key, gradient in theirs.items():
            scale = max(gradient.abs().max().item(), 1e-3)
            assert (ours[key] - gradient).abs().max().item() <= 1e-4 * scale, key
