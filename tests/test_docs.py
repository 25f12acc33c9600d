# SPDX-License-Identifier: Apache-2.0
"""Every block of code in README and docs runs, every command in them is understood, and every link leads somewhere.

The tutorial's commands run one after the other in tests/trainer/test_tutorial.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import pages
from helpers.pages import ROOT, Block

import rlhf_fast as rf

BLOCKS = [block for page in pages.PAGES for block in pages.blocks(page)]
ELSEWHERE = {ROOT / "docs" / "tutorial.md"}  # in a test of its own
names = pytest.mark.parametrize


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert len(BLOCKS) > 30
    assert [block.name for block in BLOCKS if block.language not in ("sh", "python", "yaml", "text")] == []
    for page in pages.PAGES:
        outside = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        assert not re.search(r"\n\n    \S", outside), f"{page}: code that is only indented has no language"


@names("block", [block for block in BLOCKS if block.language == "sh"], ids=lambda block: block.name)
def test_commands_are_understood(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tyro")
    for words in pages.commands(block):
        pages.understand(words, monkeypatch)


@names("page", pages.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        other = (page.parent / target).resolve() if target else page
        assert other.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in headings(other), f"{page.name} links to {target}#{anchor}"


def headings(page: Path) -> set[str]:
    """The anchors that a code host and mkdocs give to a page's headings."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_every_fault_of_the_table_is_tried_by_tests_that_exist() -> None:
    rows = [line for line in (ROOT / "docs" / "resuming.md").read_text().splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 14
    for row in rows:
        cell = row.split("|")[3]
        files = re.split(r"`(test_\w+\.py)`:", cell)[1:]
        assert files, row
        for file, listed in zip(files[::2], files[1::2], strict=True):
            text = (ROOT / "tests" / "trainer" / file).read_text()
            tests = re.findall(r"`(test_\w+)`", listed)
            assert tests and all(f"\ndef {test}(" in text for test in tests), (file, tests)
    targets = re.findall(r"`make ([\w-]+)`", "".join(rows))
    assert targets and all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in targets)


def loop_names() -> dict[str, Any]:
    """What the README's loop starts from."""
    g = torch.Generator().manual_seed(0)
    return {
        "torch": torch, "rf": rf, "hidden": torch.randn(2, 5, 8, generator=g, requires_grad=True),
        "weight": torch.randn(11, 8, generator=g), "ref_hidden": torch.randn(2, 5, 8, generator=g),
        "ref_weight": torch.randn(11, 8, generator=g), "tokens": torch.randint(11, (2, 5), generator=g),
        "mask": torch.ones(2, 5, dtype=torch.bool), "scores": torch.randn(2, generator=g),
        "values": torch.randn(2, 5, generator=g),
    }  # fmt: skip


def python_blocks(page: str) -> list[Block]:
    return [block for block in pages.blocks(ROOT / page) if block.language == "python"]


@names("drift", [0.0, 200.0, -200.0, 1e4])
def test_the_readmes_loop_survives_tokens_that_drifted_far(drift: float) -> None:
    (block,) = [block for block in python_blocks("README.md") if "ppo_advantages" in block.text]
    variables = loop_names()
    first, second = block.text.split("\nlogprobs = ", 1)
    exec(first, variables)
    variables["old_logprobs"][:, 1] -= drift
    exec("logprobs = " + second, variables)
    assert bool(variables["loss"].isfinite()) and bool(variables["hidden"].grad.isfinite().all())
    assert bool(variables["hidden"].grad.any())


def cleanrl() -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    steps, envs = 17, 3
    return {
        "args": SimpleNamespace(num_steps=steps, num_envs=envs, gamma=0.99, gae_lambda=0.95),
        "Categorical": torch.distributions.Categorical,
        "rewards": torch.randn(steps, envs, generator=g), "values": torch.randn(steps, envs, generator=g),
        "dones": (torch.rand(steps, envs, generator=g) < 0.2).float(), "next_done": torch.tensor([1.0, 0.0, 0.0]),
        "next_value": torch.randn(envs, generator=g), "logits": torch.randn(9, 4, generator=g),
        "action": torch.randint(4, (9,), generator=g), "oldlogprob": -torch.rand(9, generator=g),
    }  # fmt: skip


def nanochat() -> dict[str, Any]:
    g = torch.Generator().manual_seed(2)
    head = torch.nn.Linear(8, 11, bias=False)
    embedding = torch.nn.Embedding(11, 8)

    def model(inputs: Any, targets: Any, loss_reduction: str) -> Any:
        logits = head(embedding(inputs)).flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction=loss_reduction)

    model.trunk, model.lm_head = embedding, head  # type: ignore[attr-defined]
    return {
        "model": model, "inputs": torch.randint(11, (3, 7), generator=g),
        "targets": torch.randint(-1, 11, (3, 7), generator=g), "ref_logp": -torch.rand(3, 7, generator=g),
    }  # fmt: skip


def plain_loop() -> dict[str, Any]:
    g = torch.Generator().manual_seed(3)
    head, embedding = torch.nn.Linear(8, 11, bias=False), torch.nn.Embedding(11, 8)
    ids, states = torch.randint(11, (4, 9), generator=g), slice(2, 8)
    lengths = torch.tensor([6, 1, 3, 5])
    mask = torch.arange(6) < lengths[:, None]
    return {
        "model": lambda ids: SimpleNamespace(logits=head(embedding(ids))), "head": head, "states": states, "ids": ids,
        "hidden": embedding(ids)[:, states].detach(), "response": ids[:, 3:], "temperature": 0.7, "mask": mask,
        "ref_logprobs": -torch.rand(4, 6, generator=g) * mask, "values": torch.randn(4, 6, generator=g) * mask,
        "scores": torch.randn(4, generator=g), "kl_coef": 0.05,
    }  # fmt: skip


@names(
    ("number", "start_of", "compared"),
    [
        (0, cleanrl, {"advantages", "returns", "newlogprob", "entropy", "approx_kl"}),
        (1, nanochat, {"logp", "kl"}),
        (2, plain_loop, {"logprobs", "kl", "rewards", "advantages", "returns"}),
    ],
)
@torch.no_grad()
def test_recipes_give_what_they_replace(
    number: int, start_of: Callable[[], dict[str, Any]], compared: set[str]
) -> None:
    before, after = python_blocks("docs/recipes.md")[2 * number : 2 * number + 2]
    assert before.text.startswith("# before") and after.text.startswith("# after")
    torch.manual_seed(0)
    start = {"torch": torch, "rf": rf, **start_of()}
    results = []
    for block in (before, after):
        variables = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in start.items()}
        exec(compile(block.text, block.name, "exec"), variables)
        results.append(variables)
    for name in compared:
        old, new = (result[name].double() for result in results)
        new = new.T if new.shape != old.shape else new  # cleanrl's tensors are (step, env)
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_the_ratio_of_the_recipes_is_finite() -> None:
    (block,) = python_blocks("docs/recipes.md")[6:]
    old = torch.zeros(1, 3)
    variables = {"rf": rf, "logprobs": torch.tensor([[-0.5, -1.0, 100.0]]), "old_logprobs": old, "ref_logprobs": old}
    exec(block.text, variables)
    assert variables["ratio"].isfinite().all() and variables["kl"].isfinite().all()


def test_the_block_that_patches_a_model() -> None:
    transformers = pytest.importorskip("transformers")
    (block,) = [block for block in python_blocks("docs/integrations.md") if "patch_loss(model)" in block.text]
    sizes: dict[str, int] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    variables = {"model": model}
    exec(block.text, variables)
    ids = torch.randint(40, (2, 5))
    assert model.train()(input_ids=ids, labels=ids).logits is None
    variables["patch"].undo()


def test_every_python_block_is_in_some_test() -> None:
    """One that a page gains needs a line above; TRL's is in tests/integrations/test_trl.py."""
    found: dict[str, int] = {}
    for block in BLOCKS:
        if block.language == "python" and block.page not in ELSEWHERE:
            name = str(block.page.relative_to(ROOT))
            found[name] = found.get(name, 0) + 1
    assert found == {"README.md": 2, "docs/integrations.md": 2, "docs/recipes.md": 7}
