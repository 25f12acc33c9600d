# SPDX-License-Identifier: Apache-2.0
"""Reports about other trainers, tried on this one: each test names the report, and failed here before, but where it
says that ours was right."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import causal_lms
from helpers.ppo_runs import load_agent, prompts_of, replace, train_step
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad

from rlhf_fast.data.examples import PromptLine, read_prompts, read_sft
from rlhf_fast.data.messages import Chat
from rlhf_fast.errors import UserError
from rlhf_fast.feedback.schema import read_feedback
from rlhf_fast.models import prefix_sharing
from rlhf_fast.models.loading import load_causal_lm, load_tokenizer
from rlhf_fast.models.lora import add_lora, merged_copy
from rlhf_fast.rollout.builtin import generate
from rlhf_fast.rollout.rollout import Rollout, SamplingParams
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.trainer import PPOConfig, SFTConfig
from rlhf_fast.trainer.rl.reward_functions import load_functions
from rlhf_fast.trainer.rl.rewards import LengthRules
from rlhf_fast.trainer.sft import packing
from rlhf_fast.trainer.sft.train import train_sft


def copy_of(tiny: Path, folder: Path, **config: Any) -> Path:
    """The tiny model with other values in its config.json."""
    folder.mkdir()
    for file in (tiny / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))
    return folder


def trained(tiny: Path, model: Path, folder: Path, **values: Any) -> Path:
    """The folder of two steps of SFT."""
    config = SFTConfig(
        model=str(model), train_file=str(tiny / "sft.jsonl"), output_dir=str(folder), dtype="float32", max_length=32,
        max_steps=2, batch_size=8, **values,
    )  # fmt: skip
    run = RunFolder.create(folder)
    train_sft(config, run)
    run.close()
    return folder


def test_a_generation_config_that_cannot_be_written_ends_no_run(tiny: Path, tmp_path: Path) -> None:
    """transformers #29988, LLaMA-Factory #2479: published models have a temperature but no do_sample, and training
    died when it saved. And LLaMA-Factory #1161: the trained model had use_cache false, so it generated slowly."""
    model = copy_of(tiny, tmp_path / "base", use_cache=True)
    (model / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "eos_token_id": 1}))
    saved = trained(tiny, model, tmp_path / "run", gradient_checkpointing=True) / "model"
    generation = json.loads((saved / "generation_config.json").read_text())
    assert generation["do_sample"] is True and generation["temperature"] == 0.6 and generation["top_p"] == 0.9
    assert json.loads((saved / "config.json").read_text())["use_cache"] is True

    (model / "generation_config.json").write_text(json.dumps({"num_beams": 1, "length_penalty": 3.0}))
    generation = load_causal_lm(str(model), "float32").generation_config
    generation.validate(strict=True)


def test_tied_embeddings_and_adapters_reload_as_they_were(tiny: Path, tmp_path: Path) -> None:
    """transformers #45127: a merged model with a tied head was another model once reloaded. Ours was right."""
    model = copy_of(tiny, tmp_path / "base", tie_word_embeddings=True)
    weights = load_file(model / "model.safetensors")
    weights.pop("lm_head.weight", None)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    run = trained(tiny, model, tmp_path / "run", lora_rank=4, lr=1e-2)
    base = load_causal_lm(str(model), torch.float32)
    adapted = PeftModel.from_pretrained(base, str(run / "adapters")).merge_and_unload()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        wanted, got = (x(ids).logits for x in (adapted, load_causal_lm(str(run / "model"), torch.float32)))
        start = load_causal_lm(str(model), torch.float32)(ids).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert float((got - start).abs().max()) > 1e-2


CALL = {"type": "function", "function": {"name": "f", "arguments": {"unit": None, "city": "Rome"}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"unit": {"default": None, "type": "string"}}}}


def test_null_is_a_value_of_a_tools_argument(write_jsonl: Any, tmp_path: Path) -> None:
    """prime-rl #2942, TRL #5307: Arrow fills tool calls up with nulls, which must go. But JSON does not, and there a
    null is what the model is to write."""
    turns = [
        {"role": "user", "content": "hi", "name": None},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
    ]
    row = {"messages": turns, "tools": [TOOL]}
    [read] = read_sft(write_jsonl("tools.jsonl", row))
    assert isinstance(read.prompt, Chat) and isinstance(read.completion, dict)
    assert read.completion["tool_calls"] == [CALL] and read.prompt.tools == [TOOL] and "name" not in read.prompt[0]

    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([row, row]).to_parquet(tmp_path / "tools.parquet")
    read = read_sft(tmp_path / "tools.parquet")[0]
    assert isinstance(read.completion, dict)
    assert read.completion["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}


SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}, {"from": "human", "value": "1 + 2?"},
    ],
    "system": "Be brief.",
}  # fmt: skip
ALPACA = {"instruction": "Translate.", "input": "chat", "history": [["Hi", "Hello!"]]}


def test_rows_of_sharegpt_and_alpaca_are_read(write_jsonl: Any) -> None:
    """axolotl and LLaMA-Factory read these two, TRL converts the first (`maybe_convert_to_chatml`): most chat data on
    the hub has one of them."""
    share = {**SHAREGPT, "conversations": [*SHAREGPT["conversations"], {"from": "gpt", "value": "3"}]}
    [read] = read_sft(write_jsonl("share.jsonl", share))
    roles = ["system", "user", "assistant", "user"]
    assert [m["role"] for m in read.prompt] == roles and read.prompt[0]["content"] == "Be brief."
    assert read.completion == "3"
    [read] = read_sft(write_jsonl("alpaca.jsonl", {**ALPACA, "output": "cat"}))
    assert [m["content"] for m in read.prompt] == ["Hi", "Hello!", "Translate.\nchat"] and read.completion == "cat"
    prompts = read_prompts(write_jsonl("prompts.jsonl", SHAREGPT, {**ALPACA, "answer": "cat"}))
    assert [len(line.prompt) for line in prompts] == [4, 3] and prompts[1].columns == {"answer": "cat"}

    sides = {"chosen": {"from": "gpt", "value": "3"}, "rejected": {"from": "gpt", "value": "4"}}
    pairs = read_feedback(
        write_jsonl("pairs.jsonl", {**SHAREGPT, **sides}, {**ALPACA, "chosen": "cat", "rejected": "dog"})
    )
    assert [pair.texts for pair in pairs] == [["3", "4"], ["cat", "dog"]] and len(pairs[0].prompt) == 4
    call = [{"from": "human", "value": "?"}, {"from": "function_call", "value": json.dumps(CALL["function"])}]
    [read] = read_sft(write_jsonl("calls.jsonl", {"conversations": call}))
    assert isinstance(read.completion, dict) and read.completion["tool_calls"] == [CALL]
    for wrong in ({"from": "nobody", "value": "x"}, {"from": "function_call", "value": "{"}, "text"):
        with pytest.raises(UserError, match="wrong.jsonl:1"):
            read_sft(write_jsonl("wrong.jsonl", {"conversations": [call[0], wrong]}), strict=True)


def test_a_tracker_that_fails_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """verl #4904: the network failed, wandb raised, and the training was over."""
    run = RunFolder.create(tmp_path / "run")
    run.save_config(SFTConfig(output_dir=str(run.path)))
    calls: list[str] = []

    class Failing:
        name = "wandb"

        def log(self, *args: Any, **options: Any) -> None:
            calls.append("log")
            raise ConnectionError("timed out")

        def finish(self) -> None:
            calls.append("finish")

    assert run._trackers is not None
    run._trackers._open.append(Failing())
    run.log({"loss": 1.0}, 1)
    run.log({"loss": 0.5}, 2)
    run.close()
    assert calls == ["log"] and "wandb failed and is left out from now on" in capsys.readouterr().err
    assert len((run.path / "metrics.jsonl").read_text().splitlines()) == 2


def test_reward_functions_may_be_coroutines(tmp_path: Path) -> None:
    """TRL accepts `async def` reward functions, so people have them, some with a client that keeps to one loop."""
    (tmp_path / "rules.py").write_text(
        "import asyncio\n"
        "client = None\n"
        "async def longer(prompt, completions):\n"
        "    global client\n"
        "    client = client or asyncio.get_running_loop()\n"
        "    answered = asyncio.Event()\n"
        "    client.call_soon(answered.set)\n"
        "    await answered.wait()\n"
        "    return [len(c) for c in completions]\n"
    )
    [function] = load_functions([f"{tmp_path / 'rules.py'}:longer"])

    async def in_a_notebook() -> list[list[float]]:
        return [function.of_prompts([PromptLine("a", "here")], texts) for texts in (["b", "cde"], ["fg"])]

    assert asyncio.run(in_a_notebook()) == [[1.0, 3.0], [2.0]]


def test_text_is_utf8_whatever_the_locale_is(tiny: Path, tmp_path: Path) -> None:
    """LLaMA-Factory's most frequent report on Windows: UnicodeDecodeError of the locale's codec. Ours was right."""
    rows = [{"prompt": "ann wants animals 你好", "completion": " cat 猫"}] * 8
    data = tmp_path / "zh.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    command = [sys.executable, "-m", "rlhf_fast", "data", "check", str(data)]
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env={**os.environ, **locale}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


# ------------------------------------ reports of 2026 about RL and adapters; ours was right but for the last one


@pytest.mark.parametrize("objective", ["ppo", "grpo"])
def test_pads_move_no_figure_of_a_step(objective: str, config: PPOConfig) -> None:
    """TRL #6803 and #6809: metrics counted padding."""
    config = replace(config, objective=objective)
    found = []
    for pads in (0, 7, 64):

        def sampler(*args: Any, pads: int = pads, **options: Any) -> Rollout:
            made = generate(*args, **options)
            wider = {name: pad(getattr(made, name), (0, pads)) for name in ("attention_mask", "response_mask")}
            return changed(made, input_ids=pad(made.input_ids, (0, pads), value=5), **wider)

        agent = load_agent(config)
        found.append(train_step(agent, prompts_of(config, agent), config, 0, sampler))
    for figures in found[1:]:
        assert figures == pytest.approx(found[0], rel=1e-4, abs=1e-5)


def test_a_generation_config_does_not_reach_the_sampler(tiny: Path, tmp_path: Path) -> None:
    """verl #7270, TRL #5783: a checkpoint's repetition_penalty and top_k were used in sampling, unseen by the loss."""
    model = copy_of(tiny, tmp_path / "base")
    settings = {"repetition_penalty": 1.5, "top_k": 5, "temperature": 0.3, "do_sample": True, "eos_token_id": 1}
    (model / "generation_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(str(model))
    params = SamplingParams(max_new_tokens=8)
    ids = [tokenizer("ann wants food")["input_ids"]]
    plain, other = (load_causal_lm(str(name), torch.float32) for name in (tiny / "model", model))
    assert other.generation_config.top_k == 5 and plain.generation_config.top_k != 5
    plain.generation_config.eos_token_id = other.generation_config.eos_token_id
    drawn = [generate(x, tokenizer, ids, params, seed=3, samples_per_prompt=16).input_ids for x in (plain, other)]
    assert torch.equal(*drawn)


def test_an_end_within_the_prompt_ends_no_completion(tiny: Path) -> None:
    """TRL #6802 and #6805: a prompt of several turns holds EOS tokens, and the penalty for a missing one was void."""
    tokenizer, model = load_tokenizer(str(tiny / "model")), load_causal_lm(str(tiny / "model"), torch.float32)
    eos = tokenizer.eos_token_id
    prompt = [*tokenizer("ann wants food")["input_ids"], eos, *tokenizer("ben likes music")["input_ids"], eos, 7]
    rollout = generate(model, tokenizer, [prompt], SamplingParams(max_new_tokens=2), seed=0, samples_per_prompt=16)
    last = rollout.input_ids[:, len(prompt) :]
    wanted = ((last == eos) & rollout.response_mask[:, len(prompt) :]).any(1)
    assert torch.equal(rollout.ended, wanted) and not bool(wanted.all())
    rollout.scores = torch.zeros(16)
    assert torch.equal(LengthRules(missing_eos_penalty=1.0).apply(rollout), -(~wanted).float())


def test_merging_often_changes_no_weight(tiny: Path) -> None:
    """TRL #6688: merging in bfloat16 and taking the adapters out again let the base weights drift."""
    model = load_causal_lm(str(tiny / "model"), torch.bfloat16)
    handle = add_lora(model, 4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    merges = [merged_copy(handle).state_dict() for _ in range(3)]
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(torch.equal(weight, merges[0][name]) for merge in merges for name, weight in merge.items())
    assert any(not torch.equal(weight, before[name]) for name, weight in merges[0].items() if name in before) or any(
        name not in before for name in merges[0]
    )


HYBRIDS = [("lfm2", "Lfm2ForCausalLM"), ("jamba", "JambaForCausalLM"), ("falcon_h1", "FalconH1ForCausalLM")]


@pytest.mark.parametrize(("family", "name"), HYBRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_hybrids_are_packed_only_if_rows_stay_apart(family: str, name: str, dtype: torch.dtype) -> None:
    """transformers #46093 and #44867, ms-swift #9565: convolutions and recurrences read across packed examples. Here
    Jamba and Falcon-H1 did, by 0.06 and 0.004 nats in SFT, and in RL in bfloat16."""
    model = causal_lms.tiny(family, name).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randint(3, 90, (n,), generator=generator).tolist() for n in (9, 6, 7)]
    examples = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in draws]
    if family == "lfm2":
        packing.check_packing(model, examples, 0)
    else:
        with pytest.raises(UserError, match="lets packed demonstrations see one another"):
            packing.check_packing(model, examples, 0)
    assert (prefix_sharing.packing_kernel(model) is not None) == (family == "lfm2")
