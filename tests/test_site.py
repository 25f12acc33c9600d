# SPDX-License-Identifier: Apache-2.0
"""The site of `make docs` holds every page and every public function; `make docs` itself checks the links."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import rlhf_fast as rf

ROOT = Path(__file__).resolve().parents[1]
SITE = (ROOT / "website" / "mkdocs.yml").read_text(encoding="utf-8")
OPS = (ROOT / "docs" / "ops.md").read_text(encoding="utf-8")


def test_every_page_is_in_the_navigation_and_on_the_first_page() -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    nav = SITE[SITE.index("\nnav:") : SITE.index("\nhooks:")]
    assert set(re.findall(r"- ([\w-]+\.md)$", nav, re.MULTILINE)) == pages
    linked = set(re.findall(r"\]\(([\w-]+\.md)", (ROOT / "docs" / "index.md").read_text()))
    assert linked == pages - {"index.md"}


def test_every_public_function_is_in_the_reference() -> None:
    shown = {
        module: re.findall(r"\w+", names) for module, names in re.findall(r"^::: (\S+)\n.*\[(.*)\]", OPS, re.MULTILINE)
    }
    public = [(name, getattr(home, name)) for home in (rf, rf.hf) for name in home.__all__]
    for name, thing in public:
        if inspect.isfunction(thing) or inspect.isclass(thing):
            assert name in shown.get(thing.__module__, ()), f"{thing.__module__}: {name} is missing"
            assert inspect.isclass(thing) or f"`{name}`" in OPS, f"{name} is in no table"
            assert inspect.getdoc(thing)


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The hook, with a stand-in for mkdocs, which is in an environment of its own."""
    files = ModuleType("mkdocs.structure.files")
    files.File = files.Files = object  # type: ignore[attr-defined]
    plugins = ModuleType("mkdocs.plugins")
    plugins.event_priority = lambda number: lambda function: function  # type: ignore[attr-defined]
    modules = {"mkdocs": ModuleType("mkdocs"), "mkdocs.plugins": plugins, "mkdocs.structure.files": files}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("outside", ROOT / "website" / "outside.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_that_lead_out_of_docs_lead_into_the_site(outside: ModuleType) -> None:
    from types import SimpleNamespace

    def moved(page: str, link: str) -> str:
        name = SimpleNamespace(file=SimpleNamespace(src_uri=page))
        return str(outside.on_page_markdown(f"[x]({link})", name, None, None))[4:-1]

    assert moved("recipes.md", "../examples/recipes/plain_loop.py") == "source/examples/recipes/plain_loop.py.md"
    assert moved("demo.md", "../examples/demo/README.md#files") == "source/examples/demo/README.md#files"
    assert moved("source/README.md", "docs/demo.md") == "../demo.md"
    assert moved("source/README.md", "CONTRIBUTING.md") == "CONTRIBUTING.md"
    assert moved("trainer.md", "objectives.md") == "objectives.md"
    assert moved("trainer.md", "https://example.org/a.md") == "https://example.org/a.md"


def test_a_notebook_becomes_a_page_with_its_pictures(outside: ModuleType) -> None:
    cells = {
        "cells": [
            {"cell_type": "markdown", "source": ["# Title"]},
            {
                "cell_type": "code",
                "source": ["1 + 1"],
                "outputs": [
                    {"output_type": "stream", "text": ["printed\n"]},
                    {"output_type": "display_data", "data": {"image/png": "AAAA", "text/plain": ["<Figure>"]}},
                ],
            },
        ]
    }
    text, pictures = outside.notebook(cells, "n.ipynb")
    assert text == (
        "# Title\n\n```python\n1 + 1\n```\n\n```text\nprinted\n```\n\n![What the cell draws](n.ipynb-0.png)\n"
    )
    assert pictures == {"n.ipynb-0.png": b"\0\0\0"}
