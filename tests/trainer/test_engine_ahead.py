# SPDX-License-Identifier: Apache-2.0
"""One step ahead: which weights sampled which batch, that sampling and learning overlap, and that nothing depends on
when the server answers or on where a run was killed."""

from __future__ import annotations

import copy
import dataclasses
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engine_runs import by_engine
from helpers.ppo_runs import assert_same_run, metrics
from helpers.vllm_stub import Stub

from rlhf_fast.errors import UserError
from rlhf_fast.models import loading
from rlhf_fast.models.heads import token_logprobs
from rlhf_fast.report.doctor import diagnose
from rlhf_fast.report.page import write_report
from rlhf_fast.rollout.builtin import generate
from rlhf_fast.rollout.engine import EngineSampler, Pending
from rlhf_fast.rollout.rollout import SamplingParams
from rlhf_fast.rollout.vllm_server import VLLMServers
from rlhf_fast.run.checkpoint import checkpoints
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.trainer import PPOConfig
from rlhf_fast.trainer.rl import ppo

STEPS, PROMPTS = 4, 4
PATIENCE = 120.0  # seconds; only a test that fails waits so long
Snapshot = list[torch.Tensor]


def snapshot(model: Any) -> Snapshot:
    return [parameter.detach().clone() for parameter in model.parameters()]


class Recording(Stub):
    """Notes the weights that each prompt was sampled with; `before(n)` is called before batch n is sampled."""

    def __init__(self, model: Any, before: Callable[[int], None] = lambda batch: None, **faults: Any) -> None:
        super().__init__(model, **faults)
        self.before, self.sampled, self.asked = before, list[Snapshot](), 0
        self.prompts: list[list[int]] = []

    def route(self, route: str, body: Any) -> Any:
        if route == "/v1/completions":
            self.sampled.append(snapshot(self.model))
            self.prompts.append(body["prompt"])
        return super().route(route, body)

    def answer(self, handler: Any, body: Any) -> None:
        if handler.path == "/v1/completions":
            with self.counting:
                batch, self.asked = self.asked // PROMPTS, self.asked + 1
            self.before(batch)
        super().answer(handler, body)

    counting = threading.Lock()


@pytest.fixture
def stub(served: Any) -> Iterator[Recording]:
    with Recording(served) as server:
        yield server


@pytest.fixture
def ahead(config: PPOConfig, stub: Stub) -> PPOConfig:
    return by_engine(
        config, stub, max_steps=STEPS, save_last=False, max_new_tokens=5, prompts_per_step=PROMPTS, lr=2e-3,
        one_step_ahead=True,
    )  # fmt: skip


class Updates:
    """The policy's weights, and the samples, at the beginning of each update; `before` and `after` are called then."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.weights, self.learned = list[Snapshot](), list[Any]()
        self.before: Callable[[int], None] = lambda step: None
        self.after: Callable[[int], None] = lambda step: None
        learn = ppo.update

        def noted(agent: Any, experience: Any, *rest: Any, **more: Any) -> Any:
            step = len(self.weights)
            self.weights.append(snapshot(agent.policy))
            self.learned.append(experience)
            self.before(step)
            done = learn(agent, experience, *rest, **more)
            self.after(step)
            return done

        patch.setattr(ppo, "update", noted)


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> Updates:
    return Updates(monkeypatch)


def said(value: Any) -> list[str]:
    """An option's value on the command line."""
    return list(value) if isinstance(value, tuple) else [str(value)]


def of_batches(prompts: list[list[int]]) -> list[list[list[int]]]:
    """The prompts of each batch; threads ask for them in any order."""
    return [sorted(prompts[n : n + PROMPTS]) for n in range(0, len(prompts), PROMPTS)]


def equal(first: Snapshot, second: Snapshot) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_batch_n_is_sampled_by_the_weights_of_n_minus_1_updates(
    ahead: PPOConfig, stub: Recording, updates: Updates, tmp_path: Path
) -> None:
    """The oracle: the weights that the server had, and those that the updates began with."""
    ppo.train_ppo(ahead, RunFolder.create(tmp_path / "run"))
    assert len(updates.weights) == STEPS and len(stub.sampled) == STEPS * PROMPTS  # none beyond the last step
    assert not any(equal(a, b) for a, b in zip(updates.weights, updates.weights[1:], strict=False))
    for n in range(STEPS):
        wanted = updates.weights[max(0, n - 1)]
        assert all(equal(found, wanted) for found in stub.sampled[n * PROMPTS : (n + 1) * PROMPTS]), n
    rows = metrics(tmp_path / "run")
    assert [row["engine/steps_behind"] for row in rows] == [0, 1, 1, 1]
    assert rows[0]["engine/logprob_diff_max"] < 1e-5 < 1e-3 < rows[1]["engine/logprob_diff_max"]
    drawn, batch, prompts = sorted(stub.seeds), updates.learned[0].batch.input_ids, of_batches(stub.prompts)
    stub.seeds.clear()
    stub.prompts.clear()
    ppo.train_ppo(dataclasses.replace(ahead, one_step_ahead=False), RunFolder.create(tmp_path / "in turn"))
    assert sorted(stub.seeds) == drawn and torch.equal(updates.learned[STEPS].batch.input_ids, batch)
    assert of_batches(stub.prompts) == prompts and len({tuple(map(tuple, one)) for one in prompts}) == STEPS


def test_stale_samples_are_weighted_by_the_ratio_of_the_two_policies(
    ahead: PPOConfig, stub: Recording, updates: Updates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle computes both policies' log-probabilities by plain transformers."""
    monkeypatch.setattr(PPOConfig, "_not_ahead", lambda config: iter(()))  # it refuses to run without weights
    found = {}
    for kind, cap in (("none", None), ("truncate", 1.01)):
        stub.sampled.clear()
        updates.weights.clear()
        updates.learned.clear()
        config = dataclasses.replace(ahead, sampler_correction=kind, sampler_cap=cap, max_steps=2)
        ppo.train_ppo(config, RunFolder.create(tmp_path / kind))
        if kind == "none":
            first = copy.deepcopy(updates.learned[1])
            before, now = updates.weights
        found[kind] = updates.learned
    batch, model = first.batch, loading.load_causal_lm(ahead.model, "float32")

    def logprobs(values: Snapshot) -> torch.Tensor:
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), values, strict=True):
                parameter.copy_(value)
            logits = model(batch.input_ids, attention_mask=batch.attention_mask.long()).logits
        picked = logits[:, :-1].log_softmax(-1).gather(2, batch.input_ids[:, 1:, None]).squeeze(2)
        return torch.nn.functional.pad(picked, (1, 0)) * batch.mask

    torch.testing.assert_close(first.old_logprobs, logprobs(now), atol=1e-4, rtol=1e-4)  # not those that sampled
    wanted = (logprobs(now) - logprobs(before)).exp().clamp(max=1.01)
    assert float((wanted - 1)[batch.mask].abs().max()) > 5e-3
    step_0 = found["truncate"][0], found["none"][0]
    torch.testing.assert_close(step_0[0].advantages, step_0[1].advantages, atol=1e-5, rtol=1e-5)
    # The second batch of both runs: sampled by the same weights, as the first update does not see the correction.
    torch.testing.assert_close(found["truncate"][1].batch.input_ids, batch.input_ids)
    torch.testing.assert_close(found["truncate"][1].advantages, first.advantages * wanted, atol=1e-4, rtol=1e-4)


def test_the_server_samples_while_the_update_runs_and_when_it_answers_changes_nothing(
    ahead: PPOConfig, served: Any, updates: Updates, tmp_path: Path
) -> None:
    """Batch n + 1 is answered once update n has begun, which waits until it was asked for: that needs both at once.
    In the second run it is answered after the update, in the third at once."""
    began, ended, asked = ([threading.Event() for _ in range(STEPS + 1)] for _ in range(3))

    def wait(event: threading.Event) -> None:
        assert event.wait(PATIENCE), "sampling and learning wait for one another"

    def overlapping(batch: int) -> None:
        asked[batch].set()
        if batch:
            wait(began[batch - 1])

    def update_begins(step: int) -> None:
        began[step].set()
        if step + 1 < STEPS:
            wait(asked[step + 1])

    waits: list[Callable[[int], None]] = [
        overlapping, lambda batch: wait(ended[batch - 1]) if batch else None, lambda batch: None,
    ]  # fmt: skip
    for number, before in enumerate(waits):
        updates.weights.clear()
        updates.before = update_begins if number == 0 else lambda step: None
        updates.after = lambda step: ended[step].set()
        with Recording(copy.deepcopy(served), before) as stub:
            ppo.train_ppo(by_engine(ahead, stub), RunFolder.create(tmp_path / str(number)))
        for event in ended:
            event.clear()
    for number in (1, 2):
        assert_same_run(tmp_path / str(number), tmp_path / "0")


def test_weights_wait_until_the_batch_before_is_sampled(
    ahead: PPOConfig, served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of an evaluation, say. The server samples once it is waited for, or else once it has the new weights."""
    begin, loads, wait = threading.Event(), list[int](), Pending.wait

    class Counting(Recording):
        def load(self, path: str, version: int) -> None:
            super().load(path, version)
            loads.append(version)
            if len(loads) > 1:
                begin.set()

    def waited(pending: Pending) -> None:
        begin.set()
        wait(pending)

    monkeypatch.setattr(Pending, "wait", waited)
    model, tokenizer = loading.load_causal_lm(ahead.model, "float32"), loading.load_tokenizer(ahead.model)
    before = copy.deepcopy(model)
    with Counting(served, lambda batch: None if begin.wait(PATIENCE) else pytest.fail("nobody waits")) as stub:
        sampler = EngineSampler(VLLMServers([stub.url]))
        pending = sampler.start(model, tokenizer, [[5, 9, 11], [8]], SamplingParams(max_new_tokens=4), seed=0)
        for parameter in model.parameters():
            parameter.data.mul_(1.5)
        sampler.sync(model)
        rollout, _ = pending.result()
        assert len(loads) == 2 and all(equal(found, snapshot(before)) for found in stub.sampled)
    with torch.no_grad():
        own = token_logprobs(before, rollout.batch)
    torch.testing.assert_close(rollout.logprobs, own, atol=1e-5, rtol=1e-5)


def test_runs_go_on_as_if_they_had_not_ended(
    ahead: PPOConfig, stub: Recording, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: one that SIGKILL ended within a step, while the server sampled the next one's batch, a finished one
    that gets more steps, and one that failed within a step, whose samples the checkpoint then has."""
    held_out = tmp_path / "heldout.jsonl"
    held_out.write_text("".join(f"{line}\n" for line in (tiny / "heldout.jsonl").read_text().splitlines()[:2]))
    ahead = dataclasses.replace(
        ahead, save_steps=1, save_last=True, eval_prompts_file=str(held_out), eval_samples=1, eval_steps=2, top_k=9
    )
    ppo.train_ppo(ahead, RunFolder.create(tmp_path / "whole"))
    options = {
        name: value for name, value in dataclasses.asdict(ahead).items()
        if value != getattr(PPOConfig, name, None) and name not in ("output_dir", "one_step_ahead")
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", *said(value))]
    killed = (
        "import sys; from helpers.killer import die_after; die_after('metrics.jsonl', 2, 3000)(); "
        "from rlhf_fast import cli; sys.exit(cli.main(sys.argv[1:]))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", killed, "ppo", "--one-step-ahead", *words, "--output-dir", str(tmp_path / "cut")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(metrics(tmp_path / "cut")) == 2
    ppo.train_ppo(dataclasses.replace(ahead, max_steps=2), RunFolder.create(tmp_path / "short"))
    scores = iter([ppo.score, ppo.score])  # none in the third step
    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(ppo, "score", lambda *args, **options: next(scores)(*args, **options))
        ppo.train_ppo(dataclasses.replace(ahead, save_steps=0), RunFolder.create(tmp_path / "failed"))
    assert [path.name for path in checkpoints(tmp_path / "failed")] == ["step-2"]
    for name in ("cut", "short", "failed"):
        ppo.train_ppo(ahead, RunFolder.create(tmp_path / name, resume=True))
        assert_same_run(tmp_path / name, tmp_path / "whole")


def test_a_lost_server_is_named_and_the_run_goes_on_from_the_weights_it_has(
    ahead: PPOConfig, served: Any, updates: Updates, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        Recording(copy.deepcopy(served), dies_after=2 * PROMPTS * ahead.samples_per_prompt) as dying,
        pytest.raises(UserError, match="cannot be reached .*--resume; saved after 2 steps"),
    ):
        ppo.train_ppo(by_engine(ahead, dying), RunFolder.create(tmp_path / "run"))
    with Recording(served) as other:
        ppo.train_ppo(by_engine(ahead, other), RunFolder.create(tmp_path / "run", resume=True))
    assert "no samples of the next step are in the checkpoint: they are sampled now" in capsys.readouterr().err
    assert equal(other.sampled[0], updates.weights[2])
    assert [row["engine/steps_behind"] for row in metrics(tmp_path / "run")] == [0, 1, 0, 1]


def test_a_run_shows_its_overlap_and_the_doctor_takes_the_update_for_no_fault(ahead: PPOConfig, tmp_path: Path) -> None:
    ppo.train_ppo(ahead, RunFolder.create(tmp_path / "ppo"))
    page = write_report(tmp_path).read_text()
    assert "Sampling and learning" in page and "waits for" in page
    assert not [finding for finding in diagnose(tmp_path) if "new weights do not all arrive" in finding.text]


def test_what_it_cannot_go_with_is_refused_by_name(ahead: PPOConfig, tmp_path: Path) -> None:
    refused: dict[str, dict[str, Any]] = {
        "needs sampler vllm-server": {"sampler": "builtin", "engine_url": ()},
        "needs sampler vllm-server, which": {"sampler": "vllm", "engine_url": ()},
        "excludes dynamic_sampling": {"objective": "dapo", "dynamic_sampling": 2},
        "excludes max_seconds": {"max_seconds": 60.0},
        "needs a sampler_correction": {"sampler_correction": "none"},
        "is not for 'dpo'": {"objective": "dpo"},
    }
    for message, options in refused.items():
        with pytest.raises(UserError, match=f"one_step_ahead {message}"):
            dataclasses.replace(ahead, **options).validate()
    with pytest.raises(UserError, match="one_step_ahead needs a sampler that works while this process learns"):
        ppo.train_ppo(ahead, RunFolder.create(tmp_path / "run"), sampler=generate)
