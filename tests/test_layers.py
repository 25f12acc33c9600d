# SPDX-License-Identifier: Apache-2.0
"""The rule of docs/architecture.md: imports go downward, and no phase knows another."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Lowest first. A module may import from its own layer and from those before it. `parallel` layers hold rooms that must
# not know one another, such as the phases.
LAYERS: list[tuple[str, ...]] = [
    ("errors", "_version", "_built_from", "_ext", "_dispatch", "_triton", "_pages", "_spin"),
    ("ops", "kernels"),
    (
        "integrations.lm_head",
        "integrations.wrappers",
        "integrations.causal_lm",
        "integrations.transformers",
        "integrations._patch",
        "integrations.hf",
    ),
    ("",),  # rlhf_fast/__init__.py, which the trainer and the patches of other trainers use as `rf`
    ("integrations",),
    ("distributed",),
    ("run",),
    ("data",),
    ("feedback",),
    ("models",),
    ("starter",),
    ("rollout",),
    ("trainer.sft", "trainer.collection", "trainer.reward", "trainer.rl"),
    ("report",),
    ("trainer.pipeline",),
    ("trainer",),  # trainer/__init__.py: the public names
    ("cli",),
    ("__main__",),
]
PARALLEL = next(layer for layer in LAYERS if "trainer.rl" in layer)
ROOMS = {room: number for number, layer in enumerate(LAYERS) for room in layer}


def room_of(module: str) -> str:
    """The longest name in the table that the module is, or lies in."""
    name = module.removeprefix("rlhf_fast").removeprefix(".")
    while name and name not in ROOMS:
        name = name.rpartition(".")[0]
    return name


def modules() -> dict[str, Path]:
    """Every module of the package by dotted name."""
    found = {}
    for path in sorted((ROOT / "rlhf_fast").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(module: str, path: Path) -> Iterator[tuple[int, str]]:
    """(line, module of ours) of every import, those inside functions included."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.startswith("rlhf_fast"))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            if base.startswith("rlhf_fast"):
                for alias in node.names:
                    whole = f"{base}.{alias.name}"
                    yield node.lineno, whole if whole in MODULES else base


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downward(module: str) -> None:
    own = room_of(module)
    for line, other in imported(module, MODULES[module]):
        room = room_of(other)
        place = f"{module}, line {line}: imports {other}"
        assert ROOMS[room] <= ROOMS[own], f"{place}, which lies above it"
        assert room == own or own not in PARALLEL or room not in PARALLEL, f"{place}: no phase knows another"


def test_no_part_of_rl_sees_the_whole_config() -> None:
    """`settings.py` splits it into bundles; the parts of the phase take those."""
    config = "rlhf_fast.trainer.rl.config"
    importers = {name for name, path in MODULES.items() if any(other == config for _, other in imported(name, path))}
    inside = {name.rpartition(".")[2] for name in importers if name.startswith("rlhf_fast.trainer.rl")}
    assert inside == {"ppo", "settings"}


def test_no_import_cycle() -> None:
    """Among modules, imports at the top of files and inside functions alike."""
    edges = {name: {other for _, other in imported(name, path)} - {name} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> None:
        assert name not in trail, "import cycle: " + " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in sorted(edges.get(name, ())):
                visit(other, [*trail, name])
            done.add(name)

    for name in edges:
        visit(name, [])
