# SPDX-License-Identifier: Apache-2.0
"""`rlhf-fast label FILE`: people compare, rank or rate completions in a local web page.

The page shows a prompt and its completions in random order, without the models' names; two stand side by side, as in
Chatbot Arena. `label_server.py` serves it, `answer_file.py` writes the answers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rlhf_fast.errors import UserError
from rlhf_fast.run.terminal import printable

from .answer_file import AnswerFile
from .label_server import LabelServer

LAST_PORT = 65535


def main(arguments: Sequence[str]) -> int:
    """Parse the options of the subcommand and serve the page until Ctrl-C."""
    parser = argparse.ArgumentParser(
        "rlhf-fast label", description="Compare, rank or rate completions in a local web page."
    )
    parser.add_argument("file", help="feedback file, rated or not (rlhf-fast collect writes one)")
    parser.add_argument("--output", help="file that answers are appended to (default FILE.labels.jsonl)")
    parser.add_argument("--rate", action="store_true", help="rate each completion 1 to 7 (default: rank them)")
    parser.add_argument("--pairs", action="store_true", help="show two completions at a time: every pair of a prompt's")
    parser.add_argument(
        "--criteria", nargs="+", default=[], metavar="NAME", help="also rate by these: helpful harmless honest, say"
    )
    parser.add_argument("--annotator", default="", help="initial name; it can be changed on the page")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine)")
    parser.add_argument("--port", type=_port, default=7860, help="port to listen on, 0: any free one (default 7860)")
    options = parser.parse_args(list(arguments))
    output = options.output or str(Path(options.file).with_suffix(".labels.jsonl"))
    answer_file = AnswerFile(options.file, output, rate=options.rate, pairs=options.pairs, criteria=options.criteria)
    try:
        server = LabelServer(answer_file, (options.host, options.port), options.annotator)
    except OSError as error:
        raise UserError(
            f"cannot serve the page on --host {options.host} --port {options.port}: {error.strerror}; --port 0 takes "
            "any free port"
        ) from None
    print(f"{len(answer_file.items)} prompts of {printable(options.file)}; answers go to {printable(output)}")
    print(f"open {server.address}", flush=True)
    print("only who has this address can label; Ctrl-C ends, and the next start goes on", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print(f"\nwhat was answered is in {printable(output)}; next: rlhf-fast data check {printable(output)}, then")
        print(f"rlhf-fast reward --feedback-file {printable(output)} --model MODEL --output-dir runs/reward")
    finally:
        server.server_close()
    return 0


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > LAST_PORT:
        raise argparse.ArgumentTypeError(f"wanted a port from 0 (any free one) to {LAST_PORT}, got {text}")
    return int(text)
