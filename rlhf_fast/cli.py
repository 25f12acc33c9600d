# SPDX-License-Identifier: Apache-2.0
"""The command `rlhf-fast`: one subcommand a phase, `run` for all of them, and tools around them.

Only torch is needed for `info`; the other subcommands import what they need when they start. What the user can put
right is shown as one message without a traceback (exit code 2); an interrupted run that was saved exits with 130.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
import platform
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from rlhf_fast.distributed.ranks import first_to_fail, ranks
from rlhf_fast.errors import Interrupted, UserError
from rlhf_fast.run.quiet import quiet
from rlhf_fast.run.terminal import printable

USAGE = """\
usage: rlhf-fast COMMAND [--config FILE.yaml] [options]

  init     write a folder to start from: configuration, sample data, reward function
  run      all phases, one after the other, from one YAML file
  sft      fine-tune a language model on demonstrations
  collect  sample several completions of each prompt and have them rated
  reward   train a reward model on rankings or ratings
  ppo      RL against the reward model (PPO, GRPO, RLOO, ...), or DPO
  data     check FILE: wrong lines, counts, agreement between annotators
  label    compare, rank or rate completions in a local web page
  report   write a run's report again, or compare several runs on one page
  doctor   say which phase of a run is bad, and why
  eval     compare two models on prompts: reward, gold, win rate, KL
  plan     memory and time of a run on given GPUs, and the options that fit, before any weight is loaded
  chat     talk to a model, or to the result of a run folder
  engine   start a vLLM server that the other commands can sample by
  info     versions, what serves each op, and why not something faster

`rlhf-fast COMMAND --help` lists the options of a command.
"""
DISK_ERRORS = (
    "No space left on device",
    "Disk quota exceeded",
    "Read-only file system",
    "File too large",
    "Permission denied",
    "Input/output error",
)
PHASES = ("sft", "collect", "reward", "ppo", "run")
TOOLS = {  # modules with a function main(arguments) -> exit code
    "init": "rlhf_fast.starter.init",
    "data": "rlhf_fast.feedback.check",
    "label": "rlhf_fast.feedback.label",
    "report": "rlhf_fast.report.runs",
    "doctor": "rlhf_fast.report.doctor",
    "eval": "rlhf_fast.report.compare",
    "plan": "rlhf_fast.report.plan",
    "chat": "rlhf_fast.report.chat",
    "engine": "rlhf_fast.rollout.vllm_process",
}
SYNONYMS = {"--completions": "--samples-per-prompt"}  # as the feedback file calls them
LIBRARIES = dict.fromkeys(
    ("transformers", "datasets", "accelerate", "safetensors", "rich", "tensorboard", "tyro", "yaml"), "trainer"
)  # and the extra that brings each


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # The tokenizer works before data loaders fork, and would warn about its threads at each one.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    quiet()
    try:
        code = _command(arguments[0], arguments[1:])
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever reads the output has closed it, as `| head` does; Python would flush once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (UserError, Interrupted) as error:
        if first_to_fail():
            print(f"rlhf-fast {arguments[0]}: {printable(error)}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, UserError) else 130
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in LIBRARIES:
            return _unexpected()
        extra = LIBRARIES[missing]
        print(f"rlhf-fast {arguments[0]} needs {missing}: pip install 'rlhf-fast[{extra}]'", file=sys.stderr)
        return 2
    except Exception as error:
        if not first_to_fail():
            return 1
        if "closed by peer" in str(error):
            print(
                f"rlhf-fast {arguments[0]}: another process was killed; --resume goes on", file=sys.stderr, flush=True
            )
            return 1
        # of whatever library was writing
        if not any(reason in str(error) for reason in DISK_ERRORS):
            return _unexpected()
        print(f"rlhf-fast {arguments[0]}: {printable(error)}; what was saved before is whole", file=sys.stderr)
        return 2


def _unexpected() -> int:
    """Print the traceback of an error that should not happen: it may quote a model's text, or a secret."""
    print(printable(traceback.format_exc()), file=sys.stderr, flush=True)
    return 1


def _command(command: str, arguments: list[str]) -> int:
    if command == "info":
        print(info())
        return 0
    if command in TOOLS:
        return int(importlib.import_module(TOOLS[command]).main(arguments))
    if command in PHASES:
        return _phase(command, arguments)
    near = difflib.get_close_matches(command, [*PHASES, *TOOLS, "info"], n=1)
    raise UserError(
        f"there is no such command; did you mean {near[0]!r}?" if near else f"there is no such command\n{USAGE}"
    )


def _phase(command: str, arguments: list[str]) -> int:
    """Parse the options of a phase, make its run folder, run it, and print its summary."""
    import transformers  # noqa: F401  (its absence is reported before a run folder is made)

    from rlhf_fast import trainer
    from rlhf_fast.run.folder import RunFolder, is_restart

    classes: dict[str, Any] = {
        "sft": trainer.SFTConfig,
        "collect": trainer.CollectConfig,
        "reward": trainer.RewardConfig,
        "ppo": trainer.PPOConfig,
        "run": trainer.PipelineConfig,
    }
    config = parse(classes[command], arguments, f"rlhf-fast {command}")
    if ranks().once(lambda: is_restart(config.output_dir)):  # torchrun --max-restarts started all processes again
        config = dataclasses.replace(config, resume=True, overwrite=False)
    config.validate()
    if command == "run":
        summary = trainer.run_pipeline(config)
    else:
        functions = {"sft": "train_sft", "collect": "collect", "reward": "train_reward", "ppo": "train_ppo"}
        function = getattr(trainer, functions[command])
        run = RunFolder.create(config.output_dir, overwrite=config.overwrite, resume=config.resume)
        try:
            summary = function(config, run)
        finally:
            run.close()
    if ranks().main:
        show(summary, config.output_dir)
    return 0


def parse(cls: type[Any], arguments: list[str], program: str) -> Any:
    """An instance of `cls`: its defaults, then the file after --config, then the flags."""
    import tyro

    from rlhf_fast.run.options import load_config

    path, rest = _take_config(arguments)
    rest = [SYNONYMS.get(word, word) for word in rest]
    try:
        return tyro.cli(cls, args=rest, default=load_config(cls, path), prog=program, description=cls.__doc__)
    except SystemExit as exit_:  # tyro has printed its own message, with the nearest option
        if exit_.code:
            raise UserError("the options above were not understood") from None
        raise


def _take_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value of --config, wherever it stands, and the other arguments."""
    rest: list[str] = []
    path = None
    words = iter(arguments)
    for word in words:
        if word == "--config":
            path = next(words, None)
            if path is None:
                raise UserError("--config wants the name of a YAML file after it")
        elif word.startswith("--config="):
            path = word.partition("=")[2]
        else:
            rest.append(word)
    return path, rest


def show(summary: dict[str, Any], folder: str) -> None:
    """Print the figures of a summary as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(folder)), show_header=False)  # Text: brackets in a name are no markup
    for name, value in _flat(summary, ""):
        shown = f"{value:.4g}" if isinstance(value, float) else printable(value)
        table.add_row(Text(name), Text(shown))
    Console().print(table)


def _flat(tree: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in tree.items():
        if prefix + name in ("backend", "calibration", "seconds_by_part"):
            continue
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return rows


def info() -> str:
    """Versions, the CPU, and the table of `rf.backends()`."""
    import importlib.metadata

    import torch

    import rlhf_fast as rf
    from rlhf_fast import _ext

    lines = [f"rlhf_fast {rf.__version__}, Python {platform.python_version()}, torch {torch.__version__}"]
    for name in ("transformers", "datasets", "accelerate", "tyro"):
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} is not installed: the trainer needs pip install 'rlhf-fast[trainer]'")
    capability = _ext.cpu_capability() or "no compiled kernels"
    features = [
        name
        for name, test in (("AVX512_BF16", "_is_avx512_bf16_supported"), ("AMX", "_is_amx_tile_supported"))
        if getattr(torch.cpu, test, lambda: False)()
    ]
    fast = ", ".join(features) or "none (bfloat16 is slow here)"
    lines.append(f"CPU: {torch.get_num_threads()} threads, kernels for {capability}, bfloat16 by {fast}")
    lines.append(f"GPU: {torch.cuda.get_device_name(0) if torch.cuda.is_available() else 'none'}")
    lines += [f"build: {key} {value}" for key, value in _ext.build_info().items()]
    return "\n".join([*lines, "", str(rf.backends())])


if __name__ == "__main__":
    sys.exit(main())
