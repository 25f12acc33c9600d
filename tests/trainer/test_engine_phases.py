# SPDX-License-Identifier: Apache-2.0
"""Whatever samples can sample by an engine: collect, the reward model's normaliser, eval, chat; and a run whose engine
is killed goes on with another one."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.engine_runs import another, by_engine
from helpers.ppo_runs import assert_same_run, metrics
from helpers.vllm_stub import Stub

from rlhf_fast import cli
from rlhf_fast.errors import UserError
from rlhf_fast.models import loading
from rlhf_fast.rollout.builtin import generate
from rlhf_fast.rollout.engine import EngineError, EngineSampler
from rlhf_fast.rollout.vllm_server import VLLMServers
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.run.progress import Timer
from rlhf_fast.trainer import CollectConfig, PPOConfig, RewardConfig, collection
from rlhf_fast.trainer.reward.train import train_reward
from rlhf_fast.trainer.rl import ppo


def of_engine(stub: Stub) -> list[str]:
    return ["--sampler", "vllm-server", "--engine-url", stub.url]


def completions_asked(stub: Stub) -> int:
    return stub.log.count("/v1/completions")


@pytest.fixture
def collect_config(tiny: Path) -> CollectConfig:
    return CollectConfig(
        model=str(tiny / "model"), dtype="float32", max_length=32, prompts_file=str(tiny / "heldout.jsonl"),
        samples_per_prompt=2, max_new_tokens=4, micro_batch_size=6, sampler="vllm-server",
    )  # fmt: skip


def prompts_file(source: Path, target: Path, count: int) -> str:
    target.write_text("".join(line + "\n" for line in source.read_text().splitlines()[:count]))
    return str(target)


def test_collect_samples_by_the_engine(collect_config: CollectConfig, tiny: Path, tmp_path: Path, stub: Stub) -> None:
    file = prompts_file(tiny / "heldout.jsonl", tmp_path / "prompts.jsonl", 7)
    config = dataclasses.replace(collect_config, prompts_file=file, engine_url=(stub.url,))
    summary = collection.collect(config, RunFolder.create(tmp_path / "run"))
    assert summary["prompts"] == completions_asked(stub) == 7 and len(set(stub.seeds)) == 14
    found = [json.loads(line) for line in (tmp_path / "run" / "feedback.jsonl").read_text().splitlines()]
    policy, tokenizer = (
        load(str(tiny / "model"), *rest)
        for load, rest in ((loading.load_causal_lm, ["float32"]), (loading.load_tokenizer, []))
    )
    sampler = EngineSampler(VLLMServers([stub.url]))
    done = collection._sample(
        config, collection.Policy(policy, tokenizer, sampler), collection.read_prompts(file)[:3],
        [tokenizer(row["prompt"], add_special_tokens=False)["input_ids"] for row in found[:3]], 0, Timer(),
    )  # fmt: skip
    assert [row["completion_ids"] for row in done] == [row["completion_ids"] for row in found[:3]]


def test_a_rank_without_prompts_samples_for_an_engine_only(
    collect_config: CollectConfig, tiny: Path, stub: Stub
) -> None:
    model, tokenizer = (
        loading.load_causal_lm(str(tiny / "model"), "float32"),
        loading.load_tokenizer(str(tiny / "model")),
    )
    for sampler, calls in ((generate, 0), (EngineSampler(VLLMServers([stub.url])), 1)):
        policy = collection.Policy(model, tokenizer, sampler)
        assert collection._sample(collect_config, policy, [], [[5, 8]], 0, Timer()) == []
        assert completions_asked(stub) == calls


def test_two_ranks_collect_a_number_of_prompts_that_is_no_multiple(tiny: Path, tmp_path: Path, stub: Stub) -> None:
    """The second rank has no prompts in the last round."""
    file = prompts_file(tiny / "heldout.jsonl", tmp_path / "prompts.jsonl", 7)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rlhf_fast",
        "collect", "--model", str(tiny / "model"), "--dtype", "float32", "--max-length", "32", "--prompts-file", file,
        "--samples-per-prompt", "2", "--max-new-tokens", "4", "--micro-batch-size", "6",
        "--output-dir", str(tmp_path / "run"), *of_engine(stub),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "run" / "feedback.jsonl").read_text().splitlines()) == 7 and completions_asked(stub) == 8


def test_the_normaliser_of_a_reward_model_samples_by_the_engine(job_data: Path, tmp_path: Path, stub: Stub) -> None:
    config = RewardConfig(
        model=str(job_data / "model"), dtype="float32", max_length=32, feedback_file=str(job_data / "feedback.jsonl"),
        batch_size=32, epochs=0.5, sampler="vllm-server", engine_url=(stub.url,),
    )  # fmt: skip
    train_reward(config, RunFolder.create(tmp_path / "run"))
    assert completions_asked(stub) > 30
    stub.stop()
    with pytest.raises(EngineError, match="cannot be reached"):
        train_reward(config, RunFolder.create(tmp_path / "other"))
    assert not (tmp_path / "other" / "metrics.jsonl").exists()  # found before any training


def test_eval_and_chat_sample_by_the_engine(
    tiny: Path, tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--prompts", str(tiny / "heldout.jsonl"), "--dtype", "float32", "--max-new-tokens", "4"]
    model, output = str(tiny / "model"), tmp_path / "eval.json"
    options += ["--samples", "2", "--limit", "3", "--output", str(output)]
    assert cli.main(["eval", model, model, *options, *of_engine(stub)]) == 0
    assert completions_asked(stub) == 6
    samples = json.loads(output.read_text())["samples"]
    assert [row["completion"] for row in samples["a"]] == [row["completion"] for row in samples["b"]]
    monkeypatch.setattr("sys.stdin", io.StringIO("ann wants animals\n\n"))
    stub.faults["dtype"] = f"torch.{str(loading.resolve_dtype('auto')).removeprefix('torch.')}"
    assert cli.main(["chat", model, "--max-new-tokens", "3", *of_engine(stub)]) == 0
    assert completions_asked(stub) == 7
    assert cli.main(["chat", model, "--engine-url", stub.url]) == 2
    assert "engine_url is for sampler vllm-server" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ killed and restarted


def test_a_run_whose_engine_was_killed_goes_on_with_another_one_bit_for_bit(
    config: PPOConfig, tiny: Path, tmp_path: Path, stub: Stub
) -> None:
    """The second engine has other weights at first: it gets the policy's before it samples."""
    config = by_engine(config, stub, max_steps=4, max_new_tokens=4)
    ppo.train_ppo(config, RunFolder.create(tmp_path / "whole"))
    samples = config.prompts_per_step * config.samples_per_prompt
    with (
        Stub(another(tiny / "model"), dies_after=samples * 2 + 3) as dying,
        pytest.raises(UserError, match="cannot be reached .*--resume"),
    ):
        ppo.train_ppo(by_engine(config, dying), RunFolder.create(tmp_path / "cut"))
    assert len(metrics(tmp_path / "cut")) == 2
    with Stub(another(tiny / "model")) as restarted:
        ppo.train_ppo(by_engine(config, restarted), RunFolder.create(tmp_path / "cut", resume=True))
        asked = restarted.log.index("/v1/completions")
        assert "/resume" in restarted.log[:asked]  # new weights first
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
