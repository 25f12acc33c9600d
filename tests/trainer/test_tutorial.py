# SPDX-License-Identifier: Apache-2.0
"""`rlhf-fast init`, and docs/tutorial.md typed command by command, in its order, on what `init` has written."""

from __future__ import annotations

import io
import json
import py_compile
import shutil
from pathlib import Path

import pytest
from helpers import pages
from helpers.pages import ROOT

from rlhf_fast import cli
from rlhf_fast.data.files import read_rows
from rlhf_fast.errors import UserError
from rlhf_fast.feedback.check import check
from rlhf_fast.run.options import load_config
from rlhf_fast.starter import init
from rlhf_fast.starter.init import write_project
from rlhf_fast.trainer import PipelineConfig
from rlhf_fast.trainer.pipeline import check_files

BLOCKS = pages.blocks(ROOT / "docs" / "tutorial.md")
KINDS = {
    "sft": "demonstrations",
    "prompts": "prompts",
    "feedback": "feedback",
    "demonstrations": "demonstrations",
    "heldout": "demonstrations",
}
FEWER = ["--sft.max-steps", "3", "--reward.epochs", "1", "--ppo.max-steps", "2"]  # of the second run


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "my-reward"
    write_project(folder)
    return folder


def test_every_sample_file_is_read_as_what_its_name_says(project: Path) -> None:
    files = sorted(path for path in (project / "data").glob("**/*.*"))
    assert {path.suffix for path in files} == {".csv", ".json", ".jsonl"} and len(files) == 12
    for path in files:
        findings = check(path)
        assert (findings.kind, findings.errors) == (KINDS[path.name.partition("-")[0].partition(".")[0]], []), path


def test_the_configuration_holds_what_the_phases_need_and_says_it(project: Path) -> None:
    text = (project / "config.yaml").read_text()
    config = load_config(PipelineConfig, project / "config.yaml")
    config.validate()
    check_files(config)
    assert config.model == str(project / "model"), "a model beside the file is found from anywhere"
    settings = [line for line in text.splitlines() if ":" in line and not line.lstrip().startswith("#")]
    assert sum("#" in line for line in settings) > len(settings) / 2
    commented = text.replace("# feedback_file", "feedback_file").replace("# reward_functions", "reward_functions")
    (project / "more.yaml").write_text(commented)
    more = load_config(PipelineConfig, project / "more.yaml")
    check_files(more)
    assert Path(str(more.reward.feedback_file)).exists() and more.ppo.reward_functions


def test_a_folder_that_holds_something_is_left_alone(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="my-reward is not empty: name a new folder"):
        write_project(project)
    assert before == {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    (tmp_path / "file").write_text("")
    assert cli.main(["init", str(tmp_path / "file")]) == 2
    assert "cannot write to" in capsys.readouterr().err
    assert cli.main(["init", str(tmp_path / "new" / "one")]) == 0
    assert "rlhf-fast run --config" in capsys.readouterr().out


def test_a_package_that_pip_has_compiled_writes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = shutil.copytree(init.PROJECT, tmp_path / "installed", ignore=shutil.ignore_patterns("__pycache__"))
    py_compile.compile(str(installed / "reward.py"))
    assert (installed / "__pycache__").is_dir()
    monkeypatch.setattr(init, "PROJECT", installed)
    write_project(tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"config.yaml", "reward.py", "data", "model"}


def test_no_prompt_is_both_learned_and_held_out(project: Path) -> None:
    held_out, *others = (
        {row["prompt"] for row, _ in read_rows(project / "data" / name) if isinstance(row, dict)}
        for name in ("heldout.csv", "demonstrations.csv", "prompts.csv")
    )
    assert len(held_out) >= 10 and all(other and not other & held_out for other in others)


def test_the_tutorial_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done: list[str] = []
    said = ""
    for block in BLOCKS:
        if block.language == "sh":
            for words in pages.commands(block):
                if words[0] == "echo":
                    said = words[1]
                    continue
                if words[:2] == ["rlhf-fast", "run"] and "runs/second" in words:
                    config = Path("my-reward/config.yaml")
                    config.write_text(config.read_text().replace("reward.py:polite ", "reward.py:polite_and_short "))
                    assert config.read_text().count("polite_and_short ") == 2
                    words = [*words, *FEWER]
                monkeypatch.setattr("sys.stdin", io.StringIO(said + "\n"))
                assert cli.main(words[1:]) in ((0, 1) if words[1] == "doctor" else (0,)), words
                done.append(words[1])
        elif block.language == "python":
            _reward(block)
        elif block.text.startswith("my-reward/"):
            named = [line.split()[0] for line in block.text.splitlines()[1:]]
            assert all((Path("my-reward") / name).exists() for name in named)
        elif block.text.startswith("prompt,"):
            assert block.text in Path("my-reward/data/demonstrations.csv").read_text()
        elif block.language == "yaml":
            Path("my-reward/real.yaml").write_text(block.text)
            real = load_config(PipelineConfig, "my-reward/real.yaml")
            real.validate()
            check_files(real)
    assert done == ["init", "data", "data", "run", "doctor", "chat", "run", "eval"]
    ppo = json.loads(Path("runs/first/summary.json").read_text())["ppo"]
    assert ppo["gold_after"] - ppo["gold_before"] > 0.8, "the reward has been learned"
    assert Path("runs/first/report.html").exists()


def _reward(block: pages.Block) -> None:
    """The first block is what `init` wrote, without the docstring; the second is appended to it."""
    path = Path("my-reward/reward.py")
    if "polite_and_short" in block.text:
        path.write_text(path.read_text() + "\n\n" + block.text)
        return
    written, shown = {}, {}  # type: ignore[var-annotated]
    exec(path.read_text(), written)
    exec(block.text, shown)
    texts = [" hello may i have soup please", " hey give me soup now", " soup", ""]
    assert written["polite"]("ann orders lunch", texts) == shown["polite"]("ann orders lunch", texts) == [3, -3, 0, 0]
