# SPDX-License-Identifier: Apache-2.0
"""`rlhf-fast init DIR`: a folder to start from, on which `rlhf-fast run` works at once."""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from rlhf_fast.errors import UserError
from rlhf_fast.models.tiny import write_tiny_model
from rlhf_fast.run.terminal import printable

from . import orders

PROJECT = Path(__file__).parent / "project"
DEMONSTRATIONS, RANKINGS = 960, 240  # rows to learn from, and prompts to be rated
CONTEXT = 256  # of the tiny model: room for the default of `rlhf-fast chat`
NEXT = """\
{folder} holds:
  config.yaml   every phase, with comments: edit it
  reward.py     what is wanted of a completion: edit it
  data/         demonstrations.csv, prompts.csv, heldout.csv, and a small file of each other format in data/formats/
  model/        a tiny random model, so that it runs in under a minute and without a download
next:
  rlhf-fast run --config {config}"""


def main(arguments: Sequence[str]) -> int:
    """Parse the options of the subcommand, write the folder, and say what to type next."""
    parser = argparse.ArgumentParser(
        "rlhf-fast init", description="Write a configuration, sample data in each format and a reward function."
    )
    parser.add_argument("folder", help="a new or empty folder")
    folder = Path(parser.parse_args(list(arguments)).folder)
    write_project(folder)
    print(printable(NEXT.format(folder=folder, config=folder / "config.yaml")))
    return 0


def write_project(folder: Path) -> None:
    """Fill a new or empty folder. Raises UserError if it holds anything, or cannot be written."""
    try:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty: name a new folder")
        write_tiny_model(folder / "model", orders.words(), context=CONTEXT)
        (folder / "data" / "formats").mkdir(parents=True)
        _write(folder)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None


def _write(folder: Path) -> None:
    for path in PROJECT.iterdir():
        if path.is_file():  # pip compiles what it installs, into a folder beside it
            shutil.copyfile(path, folder / path.name)
    seen, held_out = orders.prompts()
    data = {
        "demonstrations.csv": orders.demonstrations(seen, DEMONSTRATIONS),
        "prompts.csv": [{"prompt": seen[i % len(seen)]} for i in range(RANKINGS)],
        "heldout.csv": orders.demonstrations(held_out, len(held_out), seed=1),
    }
    formats = {f"formats/{name}": rows for name, rows in orders.every_format(seen).items()}
    for name, rows in (data | formats).items():
        write_rows(folder / "data" / name, rows)


def write_rows(path: Path, rows: list[orders.Row]) -> None:
    """Rows as CSV, JSON (one list) or JSON lines, by the file's suffix."""
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
