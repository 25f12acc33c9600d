# SPDX-License-Identifier: Apache-2.0
"""A hook of mkdocs: what pages link to outside of docs/ becomes part of the site, under source/.

Markdown is a page as it is, a notebook becomes one, source code is shown in a page, pictures are copied. Links are
followed from page to page, so the site needs no address of a code host.
"""

from __future__ import annotations

import base64
import json
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")  # no scheme
FENCED = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
PICTURES = {".png", ".svg"}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".sh": "sh", ".h": "cpp", ".cpp": "cpp"}


def address(path: Path) -> str:
    """Where a file of the repository lies in the site's sources."""
    if path.is_relative_to(DOCS):
        return str(path.relative_to(DOCS))
    name = f"source/{path.relative_to(ROOT)}"
    return name if path.suffix in PICTURES | {".md"} else f"{name}.md"


def original(page: str) -> Path:
    """The file of the repository that a page of the site shows."""
    if not page.startswith("source/"):
        return DOCS / page
    path = ROOT / page.removeprefix("source/")
    return path if path.exists() else path.with_suffix("")


def targets(text: str, page: Path) -> list[Path]:
    """The files that a page links to."""
    found = [(page.parent / link[2]).resolve() for link in LINK.finditer(FENCED.sub("", text))]
    return [path for path in found if path.is_file() and path.is_relative_to(ROOT)]


@event_priority(100)  # before the plugins, so that they know these files too
def on_files(files: Files, config: Any) -> Files:
    """Add what is linked to."""
    waiting = [DOCS / file.src_uri for file in files.documentation_pages()]
    seen = set(waiting)
    while waiting:
        page = waiting.pop()
        if page.suffix != ".md":
            continue
        for path in targets(page.read_text(encoding="utf-8"), page):
            if path not in seen:
                seen.add(path)
                waiting.append(path)
                if not path.is_relative_to(DOCS):
                    add(path, files, config)
    return files


def add(path: Path, files: Files, config: Any) -> None:
    """One file of the repository as a page or a picture of the site."""
    if path.suffix in PICTURES:
        files.append(File.generated(config, address(path), content=path.read_bytes()))
        return
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text, pictures = notebook(json.loads(text), path.name)
        for name, picture in pictures.items():
            files.append(File.generated(config, f"{Path(address(path)).parent}/{name}", content=picture))
    elif path.suffix != ".md":
        text = f"# {path.relative_to(ROOT)}\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{text}````\n"
    files.append(File.generated(config, address(path), content=text))


def notebook(cells: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown with what its cells have printed and drawn, and its pictures by name."""
    parts, pictures = [], {}
    for cell in cells["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                picture = f"{name}-{len(pictures)}.png"
                pictures[picture] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![What the cell draws]({picture})")
            elif printed := "".join(output.get("text", data.get("text/plain", ()))):
                parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(parts) + "\n", pictures


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links to files of the repository, turned to where those lie in the site."""
    here = page.file.src_uri
    if here.endswith(".ipynb.md"):  # its pictures lie beside it
        return markdown
    source = original(here)

    def moved(link: re.Match[str]) -> str:
        target = (source.parent / link[2]).resolve()
        if not target.is_file() or not target.is_relative_to(ROOT):
            return link[0]
        return link[1] + os.path.relpath(address(target), Path(here).parent) + link[3]

    return LINK.sub(moved, markdown)
