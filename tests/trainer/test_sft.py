# SPDX-License-Identifier: Apache-2.0
"""SFT: what the loss is, that micro-batches do not change it, and that a stopped run goes on as if it had not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_fast.data.examples import Demonstration, read_sft
from rlhf_fast.data.limits import Limits
from rlhf_fast.errors import Interrupted, UserError
from rlhf_fast.models.batches import MicroBatch
from rlhf_fast.models.loading import load_causal_lm, load_tokenizer
from rlhf_fast.rollout.builtin import generate
from rlhf_fast.rollout.rollout import SamplingParams
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.trainer import SFTConfig
from rlhf_fast.trainer.sft import packing
from rlhf_fast.trainer.sft import train as sft


def config(tiny: Path, folder: Path, **values: Any) -> SFTConfig:
    """Twelve steps of 16 demonstrations."""
    files = {"train_file": str(tiny / "sft.jsonl"), "eval_file": str(tiny / "heldout.jsonl")}
    common = {"model": str(tiny / "model"), "output_dir": str(folder), "dtype": "float32", "lr": 3e-3}
    return SFTConfig(**{**common, **files, "max_steps": 12, **values})


def train(settings: SFTConfig) -> dict[str, Any]:
    """In a run folder of its own."""
    run = RunFolder.create(settings.output_dir, resume=settings.resume)
    try:
        return sft.train_sft(settings, run)
    finally:
        run.close()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of the model that a run wrote."""
    return load_file(folder / "model" / "model.safetensors")


def test_the_loss_is_that_of_the_completion_tokens(tiny: Path) -> None:
    tokenizer, model = load_tokenizer(str(tiny / "model")), load_causal_lm(str(tiny / "model"), torch.float32)
    examples = sft.encode(tokenizer, read_sft(tiny / "sft.jsonl")[:5], Limits(32))
    assert all(example["labels"][:3] == [-100] * 3 for example in examples)
    assert all(example["input_ids"][-1] == example["labels"][-1] == tokenizer.eos_token_id for example in examples)

    total, tokens = torch.tensor(0.0), 0
    for example in examples:  # one by one, by the model's own logits
        ids = torch.tensor([example["input_ids"]])
        logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        total -= logprobs[torch.arange(2, 11), ids[0, 3:]].sum().detach()
        tokens += 9
    ours = sft.evaluate(model, examples, tokenizer.pad_token_id, MicroBatch(2), torch.float32)
    assert ours == pytest.approx(float(total) / tokens, rel=1e-5)


def test_sft_learns_and_its_model_ends_by_itself(tiny: Path, tmp_path: Path) -> None:
    settings = config(tiny, tmp_path / "run", max_steps=60, batch_size=32)
    summary = train(settings)
    assert summary["loss_before"] - summary["loss_after"] > 0.7
    folder = str(tmp_path / "run" / "model")
    tokenizer, model = load_tokenizer(folder), load_causal_lm(folder, torch.float32)
    prompt = tokenizer("ann wants food")["input_ids"]
    rollout = generate(model, tokenizer, [prompt], SamplingParams(max_new_tokens=12), seed=0, samples_per_prompt=32)
    assert rollout.ended.float().mean() > 0.8


def test_micro_batches_do_not_change_the_result(tiny: Path, tmp_path: Path, write_jsonl: Any) -> None:
    # Demonstrations of different lengths, so that a mean of means would differ from the mean over tokens.
    rows = [json.loads(line) for line in (tiny / "sft.jsonl").read_text().splitlines()[:64]]
    for i, row in enumerate(rows):
        row["completion"] = " ".join(row["completion"].split()[: 1 + i % 8])
    files = {"train_file": write_jsonl("train.jsonl", *rows), "batch_size": 16, "max_steps": 4}
    train(config(tiny, tmp_path / "whole", micro_batch_size=16, **files))
    train(config(tiny, tmp_path / "parts", micro_batch_size=5, **files))  # 4 divides 16
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    start = load_file(tiny / "model" / "model.safetensors")
    for name in whole:
        moved = float((whole[name] - start[name]).abs().max())
        assert float((whole[name] - parts[name]).abs().max()) < 0.02 * moved + 1e-6, name


def test_a_budget_of_tokens_bounds_every_pass(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, int]] = []
    logprobs = sft.completion_logprobs

    def watched(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        shapes.append(tuple(batch["input_ids"].shape))
        return logprobs(model, batch)

    monkeypatch.setattr(sft, "completion_logprobs", watched)
    whole = train(config(tiny, tmp_path / "whole", max_steps=2))
    assert max(rows * width for rows, width in shapes) > 64
    shapes.clear()
    cut = train(config(tiny, tmp_path / "cut", max_steps=2, micro_batch_tokens=64))
    assert max(rows * width for rows, width in shapes) <= 64 and any(rows > 1 for rows, _ in shapes)
    assert cut["loss_after"] == pytest.approx(whole["loss_after"], abs=1e-4)


def test_packing_changes_nothing(tiny: Path, tmp_path: Path, write_jsonl: Any) -> None:
    rows = [json.loads(line) for line in (tiny / "sft.jsonl").read_text().splitlines()[:64]]
    for i, row in enumerate(rows):
        row["completion"] = " ".join(row["completion"].split()[: 1 + i % 8])
    files = {"train_file": write_jsonl("train.jsonl", *rows), "batch_size": 16, "max_steps": 4, "max_length": 24}
    padded = train(config(tiny, tmp_path / "padded", **files))
    packed = train(config(tiny, tmp_path / "packed", packing=True, micro_batch_size=8, **files))
    assert packed["loss_after"] == pytest.approx(padded["loss_after"], abs=1e-4)
    start, whole, parts = (
        load_file(tiny / "model/model.safetensors"),
        *map(weights, (tmp_path / "padded", tmp_path / "packed")),
    )
    for name in whole:
        moved = float((whole[name] - start[name]).abs().max())
        assert float((whole[name] - parts[name]).abs().max()) < 0.02 * moved + 1e-6, name


def test_packed_rows_are_full_and_know_where_each_example_begins() -> None:
    examples = [{"input_ids": [n] * n, "labels": [-100] + [n] * (n - 1)} for n in (2, 5, 3, 4, 1)]
    batch = packing.pack(examples, 0, 9)
    assert batch["input_ids"].tolist() == [[5, 5, 5, 5, 5, 3, 3, 3], [4, 4, 4, 4, 2, 2, 1, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 1, 0, 0]]
    assert batch["labels"][1].tolist() == [-100, 4, 4, 4, -100, 2, -100, -100]


def test_packed_rows_are_filled_evenly() -> None:
    """A batch is as wide as its widest row: 96 % of it is tokens, where filling one row after another leaves 78 %."""
    generator = torch.Generator().manual_seed(0)
    for lengths in torch.randint(50, 350, (20, 32), generator=generator).tolist():
        rows = packing.in_rows(lengths, 2048)
        assert sorted(i for row in rows for i in row) == list(range(32)) and len(rows) <= sum(lengths) // 2048 + 2
        widest = max(sum(lengths[i] for i in row) for row in rows)
        assert widest <= 2048 and sum(lengths) / (len(rows) * widest) > 0.96
    assert packing.in_rows([5, 4, 3], float("inf")) == [[0, 1, 2]] and packing.in_rows([7], 7) == [[0]]


def test_a_model_that_mixes_packed_examples_up_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, model = load_tokenizer(str(tiny / "model")), load_causal_lm(str(tiny / "model"), torch.float32)
    examples = sft.encode(tokenizer, read_sft(tiny / "sft.jsonl")[:3], Limits(32))
    packing.check_packing(model, examples, 0)
    trunk = model.base_model.forward
    monkeypatch.setattr(model.base_model, "forward", lambda position_ids=None, **more: trunk(**more))
    with pytest.raises(UserError, match="lets packed demonstrations see one another"):
        packing.check_packing(model, examples, 0)


def test_an_answer_to_messages_is_what_the_chat_template_makes_of_it(tiny: Path) -> None:
    tokenizer = load_tokenizer(str(tiny / "model"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'ann' if m.role == 'user' else 'ben' }} {{ m.content }} <eos> {% endfor %}"
        "{% if add_generation_prompt %}ben {% endif %}"
    )
    messages = [{"role": "user", "content": "wants food"}, {"role": "assistant", "content": "bread rice"}]
    line = Demonstration(messages[:-1], "bread rice", "f:1")
    (example,) = sft.encode(tokenizer, [line], Limits(32))
    assert tokenizer.decode(example["input_ids"]) == "ann wants food <eos> ben bread rice <eos>"
    assert tokenizer.decode([i for i in example["labels"] if i >= 0]) == "bread rice <eos>"


def test_a_stopped_run_goes_on_as_if_it_had_not(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: Any
) -> None:
    train(config(tiny, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(sft, "StopFlag", stop_at(5))
        with pytest.raises(Interrupted, match="SFT stopped at step 5; --resume goes on"):
            train(config(tiny, tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-5"]
    train(config(tiny, tmp_path / "run", resume=True))
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    steps = [line.split(",")[0] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [f'{{"step": {n}' for n in [0, *range(1, 13), 12]]


def test_a_finished_run_is_not_run_again(tiny: Path, tmp_path: Path) -> None:
    first = train(config(tiny, tmp_path / "run", max_steps=2))
    assert train(config(tiny, tmp_path / "run", max_steps=2, resume=True)) == first


def test_checkpoints_every_n_steps_keep_the_newest_two(tiny: Path, tmp_path: Path) -> None:
    train(config(tiny, tmp_path / "run", max_steps=8, save_steps=2))
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-6", "step-8"]


def test_bfloat16_learns_in_float32_and_is_written_in_bfloat16(tiny: Path, tmp_path: Path) -> None:
    summary = train(config(tiny, tmp_path / "run", dtype="bfloat16", max_steps=40, batch_size=32))
    assert summary["loss_before"] - summary["loss_after"] > 0.5
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {torch.bfloat16}


@pytest.mark.parametrize("pad", ["<eos>", None])
def test_pad_equal_to_eos_or_no_pad_at_all_learns_the_same(tiny: Path, tmp_path: Path, pad: str | None) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny / "model", pad_token=pad)
    tokenizer.save_pretrained(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(tiny / "model").save_pretrained(tmp_path / "model")
    normal = train(config(tiny, tmp_path / "normal"))
    same = train(config(tiny, tmp_path / "run", model=str(tmp_path / "model")))
    assert same["loss_after"] == pytest.approx(normal["loss_after"], abs=1e-5)


def test_a_completion_that_does_not_fit_is_cut_and_told(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(str(tiny / "model"))
    (example,) = sft.encode(tokenizer, read_sft(tiny / "sft.jsonl")[:1], Limits(8))
    assert len(example["input_ids"]) == 8 and example["labels"][-1] != tokenizer.eos_token_id
    assert "1 of 1 demonstrations were longer than max_length 8 and were cut" in capsys.readouterr().err


def test_a_prompt_longer_than_the_model_reads_is_named(tiny: Path, tmp_path: Path, write_jsonl: Any) -> None:
    path = write_jsonl("long.jsonl", {"prompt": "cat " * 64, "completion": " dog"})
    with pytest.raises(UserError, match=r"long.jsonl:1: the prompt has 64 tokens, and at most 63 fit"):
        train(config(tiny, tmp_path / "run", train_file=path, max_length=10_000))


def test_a_loss_that_is_not_finite_stops_the_run(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the SFT loss is nan at step \d+; lower lr"):
        train(config(tiny, tmp_path / "run", lr=1e30, max_steps=50))


def test_what_a_kill_left_of_a_checkpoint_is_cleared_away(tiny: Path, tmp_path: Path) -> None:
    half = tmp_path / "run" / "checkpoints" / "checkpoint-2" / ".tmpCUO7oQ"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half a tensor file")
    train(config(tiny, tmp_path / "run", max_steps=2, save_steps=2, resume=True))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-2"
    assert checkpoint.exists() and not list(checkpoint.parent.rglob(".tmp*"))


def test_the_schedule_the_decay_and_evaluations_on_the_way(tiny: Path, tmp_path: Path) -> None:
    def rows(name: str, **values: Any) -> list[dict[str, Any]]:
        train(config(tiny, tmp_path / name, max_steps=8, **values))
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    shaped = rows("shaped", lr_schedule="cosine", warmup_steps=2, weight_decay=10.0, eval_steps=3)
    assert [row["step"] for row in shaped if "eval/nll" in row] == [0, 3, 6, 8]
    rates = [row["lr"] / 3e-3 for row in shaped if "lr" in row]
    wanted = [0, 0.5, *(0.5 + 0.5 * math.cos(math.pi * k / 6) for k in range(6))]
    assert rates == pytest.approx(wanted, abs=1e-6)
    assert {row["lr"] for row in rows("constant", lr_schedule="constant") if "lr" in row} == {3e-3}
    decayed, plain = weights(tmp_path / "shaped"), weights(tmp_path / "constant")
    assert decayed["model.embed_tokens.weight"].norm() < 0.95 * plain["model.embed_tokens.weight"].norm()


def test_the_frozen_trunk_under_adapters_is_kept_in_the_dtype_of_the_products(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[bool, set[torch.dtype]] = {}

    def spy(model: Any, rank: int) -> Any:
        handle = add_lora(model, rank)
        kept.update(
            {learns: {p.dtype for p in model.parameters() if p.requires_grad is learns} for learns in (True, False)}
        )
        return handle

    add_lora = sft.add_lora
    monkeypatch.setattr(sft, "add_lora", spy)
    summary = train(config(tiny, tmp_path / "run", dtype="bfloat16", lora_rank=8, max_steps=30, lr=1e-2, batch_size=32))
    assert kept == {True: {torch.float32}, False: {torch.bfloat16}}
    assert summary["loss_before"] - summary["loss_after"] > 0.1
