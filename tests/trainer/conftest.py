# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the trainer's tests: the tiny task of examples/tiny, and writing small JSONL files."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import phases
from helpers.engine_runs import another
from helpers.vllm_stub import Stub

from rlhf_fast.models import loading
from rlhf_fast.trainer import PPOConfig

TINY = Path(__file__).parents[2] / "examples" / "tiny"
WriteJsonl = Callable[..., str]


@pytest.fixture(autouse=True)
def nan_filled_allocations() -> None:
    """Not here: libraries allocate memory that they never read, and deterministic mode slows them."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on several threads, and one thread repeats bit for bit.

    Commands that run in this process make it flush denormals, which tests of kernels may not find so.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model and its data: model/ sft.jsonl feedback_prompts.jsonl heldout.jsonl. Read only."""
    folder = tmp_path_factory.mktemp("tiny")
    spec = importlib.util.spec_from_file_location("make_data", TINY / "make_data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.make_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def job_data(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder with what the jobs of tests/helpers/phases.py start from."""
    folder = tmp_path_factory.mktemp("jobs") / "data"
    shutil.copytree(tiny, folder)
    phases.prepare(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_rater() -> str:
    """The tiny task's rater, in the form that `rater` options take."""
    return f"{TINY / 'raters.py'}:topic_share"


@pytest.fixture(scope="session")
def reward_model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained reward model with a normaliser: enough for everything but learning something useful."""
    folder = tmp_path_factory.mktemp("reward") / "model"
    torch.manual_seed(0)
    tokenizer = loading.load_tokenizer(str(tiny / "model"))
    model = loading.load_reward_model(str(tiny / "model"), "float32", tokenizer, new_head=True)
    model.score.weight.data.mul_(20)
    loading.set_score_normalizer(model, 0.1, 0.5)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config(tiny: Path, reward_model: str) -> PPOConfig:
    """Three small steps of PPO on the tiny task."""
    return PPOConfig(
        model=str(tiny / "model"),
        reward_model=reward_model,
        prompts_file=str(tiny / "feedback_prompts.jsonl"),
        dtype="float32",
        max_length=32,
        max_new_tokens=8,
        prompts_per_step=4,
        samples_per_prompt=4,
        max_steps=3,
        lr=1e-3,
        critic_lr=1e-3,
    )


@pytest.fixture
def served(tiny: Path) -> Any:
    """What an engine has before the first sync."""
    return another(tiny / "model")


@pytest.fixture
def stub(served: Any) -> Iterator[Stub]:
    """A stand-in for a vLLM server."""
    with Stub(served) as server:
        yield server


@pytest.fixture
def write_jsonl(tmp_path: Path) -> WriteJsonl:
    """`write_jsonl("name.jsonl", row, ...)` -> path; a row that is text is written as it stands."""

    def write(name: str, *rows: Any) -> str:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def stop_at() -> Callable[[int], type]:
    """`stop_at(n)` stands in for the class StopFlag: a Ctrl-C that comes during step n."""

    def make(step: int) -> type:
        class StopAt:
            asked = 0

            def __enter__(self) -> StopAt:
                return self

            def __exit__(self, *error: object) -> None:
                """Nothing was installed."""

            @property
            def requested(self) -> bool:
                """Phases ask after each step; from the n-th step on the answer is yes."""
                self.asked += 1
                return self.asked >= step

        return StopAt

    return make
