# SPDX-License-Identifier: Apache-2.0
"""The lines of SECURITY.md's threat model that lie with runs: one test each. What is printed: test_output.py."""

from __future__ import annotations

import ast
import contextlib
import gzip
import json
import re
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from helpers import phases

from rlhf_fast.data import files
from rlhf_fast.data.examples import read_prompts, read_sft
from rlhf_fast.errors import UserError
from rlhf_fast.feedback.check import check
from rlhf_fast.feedback.schema import read_feedback
from rlhf_fast.models.loading import load_causal_lm, load_tokenizer
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.run.options import load_config, read_yaml
from rlhf_fast.run.resume import finished_summary
from rlhf_fast.trainer import PPOConfig, SFTConfig

PACKAGE = Path(__file__).resolve().parents[2] / "rlhf_fast"
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def test_each_line_of_the_threat_model_has_its_tests() -> None:
    """SECURITY.md names them in the last column of its table."""
    lines = (PACKAGE.parent / "SECURITY.md").read_text(encoding="utf-8").split("## Threat model")[1].splitlines()
    rows = [line for line in lines if line.startswith("| ") and "---" not in line][1:]
    assert len(rows) > 10
    for row in rows:
        tests = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row.split("|")[3])
        assert tests, row
        for file, name in tests:
            assert f"\ndef {name}(" in (Path(__file__).parent / file).read_text(encoding="utf-8"), (file, name)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_in_the_package_unpickles_or_evaluates(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {name.partition(".")[0] for name in names} & UNPICKLERS
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "torch.save", "eval", "exec", "os.system", "yaml.load"), called


def test_every_file_of_a_run_is_safetensors_json_yaml_or_text(job_data: Path, tmp_path: Path) -> None:
    for name in ("sft", "reward", "grpo"):
        phases.run(replace(phases.jobs(job_data)[name], save_steps=1), tmp_path / name)
    for path in tmp_path.rglob("*"):
        if path.is_file() and "tensorboard" not in path.parts:
            assert path.suffix in {".safetensors", ".json", ".jsonl", ".yaml", ".jinja", ".txt", ".md", ""}, path
            assert path.suffix or path.name == ".rlhf_fast"
            assert not path.read_bytes().startswith((b"\x80\x02", b"\x80\x04", b"PK"))  # pickles and torch.save's zips


def test_a_pickled_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (tiny / "model" / name).exists():
            (tmp_path / name).write_bytes((tiny / "model" / name).read_bytes())
    torch.save({"weight": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot load the language model"):
        load_causal_lm(str(tmp_path), "float32")


def test_code_of_a_model_folder_is_not_run(tiny: Path, tmp_path: Path) -> None:
    config = json.loads((tiny / "model" / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for load in (load_tokenizer, lambda name: load_causal_lm(name, "float32")):
        with pytest.raises(UserError):
            load(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system ['touch ran']", "lr: !!python/name:os.system", "a: !!python/tuple [1]"]
)
def test_yaml_is_safe_loaded(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match="not valid YAML"):
        read_yaml(tmp_path / "c.yaml")
    assert not (tmp_path / "ran").exists()


def test_yaml_aliases_do_not_multiply(tmp_path: Path) -> None:
    """The billion laughs: references stay references, and a list is not the number that was wanted."""
    lines = [
        "a0: &a0 [x, x, x, x, x, x, x, x, x]",
        *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)),
    ]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError, match="unknown key 'a0'"):
        load_config(SFTConfig, tmp_path / "c.yaml")


@pytest.mark.parametrize("name", ["bomb.jsonl.gz", "bomb.json.gz", "bomb.csv.gz"])
def test_a_small_file_that_expands_without_end_is_refused_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MOST_EXPANDED", 2**20)
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"prompt\n" + b"x" * 2**24))
    assert path.stat().st_size < 2**15
    tracemalloc.start()
    with pytest.raises(UserError, match=rf"{name} has \d+ bytes and expands to more than .* unpack it yourself"):
        list(files.read_rows(path))
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()
    path.write_bytes(gzip.compress(b'{"prompt": "fits"}'))
    assert len(list(files.read_rows(path))) <= 1


def test_a_parquet_file_that_expands_without_end_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "bomb.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["x" * 1000] * 100_000}), path)  # 100 MB, as one dictionary
    assert path.stat().st_size < 2**20
    assert next(iter(files.read_rows(path)))[0] == {"prompt": "x" * 1000}
    monkeypatch.setattr(files, "MOST_EXPANDED", 2**22)
    before = pyarrow.total_allocated_bytes()
    with pytest.raises(UserError, match=r"bomb.parquet has \d+ bytes and expands to more than"):
        list(files.read_rows(path))
    assert pyarrow.total_allocated_bytes() - before < 2**24


def test_paths_in_data_files_are_never_opened(tmp_path: Path) -> None:
    """Every way to name a file that a row may hold, in every phase's reader, watched by an audit hook."""
    (tmp_path / "secret.txt").write_text("secret")
    secret = str(tmp_path / "secret.txt")
    rows = [
        {"prompt": secret, "completion": f"file://{secret}", "tools": [{"path": secret}], "image": secret},
        {"messages": [{"role": "user", "content": f"@{secret}"}, {"role": "assistant", "content": f"$(cat {secret})"}]},
        {"prompt": f"![]({secret})", "completions": [f"file:{secret}", "b"], "ranks": [1, 2], "completion_ids": None},
        {"prompt": [{"role": "user", "content": [{"type": "image", "url": secret}]}], "completion": "x"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened: list[str] = []
    watching = True
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if watching and event == "open" else None)
    for read in (read_prompts, read_sft, read_feedback, check):
        with contextlib.suppress(UserError):
            read(path)
    watching = False
    assert str(path) in opened and secret not in opened and not any("secret" in name for name in opened)


def test_secrets_stay_out_of_a_run_folder(
    job_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "hf_" + "S3cretS3cretS3cretS3cret"
    monkeypatch.setenv("HF_TOKEN", secret)
    phases.run(replace(phases.jobs(job_data)["sft"], max_steps=1), tmp_path / "run")
    address = f"https://user:{secret}@host/score?token={secret}"
    run = RunFolder.create(tmp_path / "other")
    config = PPOConfig(prompts_file="p.jsonl", reward_functions=(address,))
    finished_summary(run, config)
    run.save_config(config)
    assert yaml.safe_load((run.path / "config.yaml").read_text())["reward_functions"] == [
        "https://***@host/score?token=***"
    ]
    assert finished_summary(RunFolder.create(run.path, resume=True), config) is None  # and it is no change
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path
    assert secret not in "".join(capsys.readouterr())
