# SPDX-License-Identifier: Apache-2.0
"""Reward models from people's preferences: ours beside TRL's RewardTrainer on the same pairs.

    python benchmarks/human_data.py all pairs.jsonl.gz            everything below, about 45 minutes on two idle cores
    python benchmarks/human_data.py split pairs.jsonl.gz          1 100 pairs to train on, 200 held out
    python benchmarks/human_data.py train ours --pairs 1100       one run; --lr, --epochs, ... change our defaults
    python benchmarks/human_data.py train trl --pairs 1100
    python benchmarks/human_data.py train ours --pairs 550 --validate    on the 550 other training pairs: for a sweep
    python benchmarks/human_data.py ppo                           20 steps against ours of 1 100 pairs, the doctor
    python benchmarks/human_data.py report                        the tables of docs/human-data.md

Rows are {"chosen", "rejected"} as HH-RLHF publishes them. Each run is a process of its own and leaves numbers only, no
text, in runs/human/results. A held-out pair is right if the chosen side scores higher; both models read the same tokens
(the dialogue, then EOS), at most --max-length of them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import correlation, mean
from typing import Any

FOLDER = Path("runs/human")
HELD_OUT, SEED = 200, 0
FEWEST, DECAY = 5, 0.03  # of the regression on words: pairs with a word, and weight decay
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "human-data.md"
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"


def split(source: str) -> None:
    """Shuffle the rows once: the first 1 100 are for training, a smaller number of pairs is the first of these."""
    data = Path(source).read_bytes()
    text = (gzip.decompress(data) if source.endswith(".gz") else data).decode()
    rows = [line + "\n" for line in text.split("\n") if line.strip()]
    random.Random(SEED).shuffle(rows)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "train.jsonl").write_text("".join(rows[:-HELD_OUT]))
    (FOLDER / "held_out.jsonl").write_text("".join(rows[-HELD_OUT:]))
    print(f"{len(rows) - HELD_OUT} pairs to train on, {HELD_OUT} held out")


def files(pairs: int, validate: bool) -> tuple[Path, Path]:
    """The training file of so many pairs, and the file to measure on."""
    rows = (FOLDER / "train.jsonl").read_text().splitlines(keepends=True)
    train = FOLDER / f"train-{pairs}.jsonl"
    train.write_text("".join(rows[:pairs]))
    if not validate:
        return train, FOLDER / "held_out.jsonl"
    rest = FOLDER / f"validate-{pairs}.jsonl"
    rest.write_text("".join(rows[pairs:]))
    return train, rest


def encoded_pairs(path: Path, tokenizer: Any, model: Any, max_length: int) -> list[Any]:
    from rlhf_fast.data.limits import Limits
    from rlhf_fast.feedback.encoded import encode_all
    from rlhf_fast.feedback.schema import read_feedback

    rows = model.get_input_embeddings().weight.shape[0]
    return encode_all(tokenizer, read_feedback(path), Limits(max_length, vocabulary=rows), source=path)


def train_ours(options: argparse.Namespace, train: Path, held_out: Path) -> dict[str, Any]:
    from rlhf_fast.models.batches import MicroBatch
    from rlhf_fast.models.loading import load_reward_model, load_tokenizer
    from rlhf_fast.trainer.reward.train import score_all

    folder = FOLDER / f"ours-{options.name}"
    given = [f"--{name}={value}" for name, value in options.settings.items()]
    command = [sys.executable, "-m", "rlhf_fast", "reward", "--model", options.model, "--feedback-file", str(train)]
    command += ["--eval-fraction", "0", "--max-length", str(options.max_length), "--seed", str(options.seed)]
    start = time.perf_counter()
    subprocess.run([*command, "--output-dir", str(folder), "--overwrite", *given], check=True)
    seconds = time.perf_counter() - start
    tokenizer = load_tokenizer(str(folder / "model"))
    model = load_reward_model(str(folder / "model"), "auto", tokenizer, new_head=False)
    std = float(model.config.score_std)
    pairs = encoded_pairs(held_out, tokenizer, model, options.max_length)
    scores = score_all(model, pairs, tokenizer.pad_token_id, MicroBatch(32))
    summary = json.loads((folder / "summary.json").read_text())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if not options.keep:
        (folder / "model" / "model.safetensors").unlink()
    margins = [float((s[p.pairs[0][0]] - s[p.pairs[0][1]]) * std) for s, p in zip(scores, pairs, strict=True)]
    return {
        "margins": margins,
        "seconds": seconds,
        "parts": summary["seconds_by_part"],
        "steps": summary["steps"],
        "curve": [[m["step"], m["loss"], m["pair_accuracy"]] for m in metrics if "loss" in m],
    }


def train_trl(options: argparse.Namespace, train: Path, held_out: Path) -> dict[str, Any]:
    """TRL's own defaults (learning rate 1e-4, linear, AdamW), but for what both have alike."""
    import datasets
    import torch
    import trl
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from rlhf_fast.models.gguf import resolve_model
    from rlhf_fast.run.runtime import tune_process

    tune_process()
    name = str(resolve_model(options.model))
    tokenizer = AutoTokenizer.from_pretrained(name)
    torch.manual_seed(options.seed)
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, dtype=torch.float32)
    rows = [{"chosen": r.chosen, "rejected": r.rejected} for r in texts(train, tokenizer, model, options.max_length)]
    at_once = options.micro_batch_size or 8
    config = trl.RewardConfig(
        output_dir=str(FOLDER / "trl"), per_device_train_batch_size=at_once,
        gradient_accumulation_steps=8 // at_once, num_train_epochs=options.epochs or 1,
        max_length=options.max_length, use_cpu=True, bf16=True, gradient_checkpointing=False, report_to=[],
        save_strategy="no", logging_steps=1, disable_tqdm=True, seed=options.seed, pad_token=options.pad or None,
        **({"learning_rate": options.lr} if options.lr else {}),
    )  # fmt: skip
    start = time.perf_counter()
    data = datasets.Dataset.from_list(rows)
    trainer = trl.RewardTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    seconds = time.perf_counter() - start
    model = trainer.model.eval()
    pairs = encoded_pairs(held_out, tokenizer, model, options.max_length)
    margins = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for pair in pairs:
            better, worse = pair.pairs[0]
            scores = [model(torch.tensor([pair.sequences[i]])).logits.float().item() for i in (better, worse)]
            margins.append(scores[0] - scores[1])
    curve = [[h["step"], h["loss"], h.get("accuracy")] for h in trainer.state.log_history if "loss" in h]
    return {"margins": margins, "seconds": seconds, "steps": trainer.state.global_step, "curve": curve}


class Row:
    """Both sides of a pair as text."""

    def __init__(self, chosen: str, rejected: str) -> None:
        self.chosen, self.rejected = chosen, rejected


def texts(path: Path, tokenizer: Any, model: Any, max_length: int) -> list[Row]:
    """The same pairs that ours learns from: those whose prompt fits. EOS is TRL's to append."""
    rows = []
    for pair in encoded_pairs(path, tokenizer, model, max_length):
        better, worse = pair.pairs[0]
        whole = [pair.source.prompt + text for text in pair.source.texts]
        rows.append(Row(whole[better], whole[worse]))
    return rows


def figures(margins: list[float]) -> dict[str, float]:
    """Accuracy with Wilson's 95 % interval, the mean loss, and the calibration error in five bins."""
    count, right = len(margins), sum(m > 0 for m in margins)
    share, z = right / count, 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count**2)) / (1 + z * z / count)
    bins: dict[int, list[tuple[float, bool]]] = {}
    for m in margins:
        sure = 1 / (1 + math.exp(-abs(m)))
        bins.setdefault(min(4, int((sure - 0.5) * 10)), []).append((sure, m > 0))
    gap = sum(abs(sum(s for s, _ in b) - sum(r for _, r in b)) for b in bins.values()) / count
    loss = mean(math.log1p(math.exp(-abs(m))) + max(0.0, -m) for m in margins)
    return {"accuracy": share, "low": middle - half, "high": middle + half, "loss": loss, "calibration error": gap}


def calibration_rows(margins: list[float]) -> list[str]:
    rows = []
    for b in range(5):
        here = [(1 / (1 + math.exp(-abs(m))), m > 0) for m in margins]
        here = [(s, r) for s, r in here if min(4, int((s - 0.5) * 10)) == b]
        if here:
            said, seen = mean(s for s, _ in here), mean(r for _, r in here)
            rows.append(f"| {0.5 + b / 10:.1f} to {0.6 + b / 10:.1f} | {len(here)} | {said:.2f} | {seen:.2f} |")
    return rows


def report() -> None:
    """Print the tables and write them into the document."""
    runs = {path.stem: json.loads(path.read_text()) for path in sorted((FOLDER / "results").glob("*.json"))}
    lines = ["| run | pairs held out | accuracy (95 %) | loss | calibration error | steps | seconds |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, made in runs.items():
        f = figures(made["margins"])
        cells = [name, len(made["margins"]), f"{f['accuracy']:.3f} ({f['low']:.2f} to {f['high']:.2f})"]
        cells += [f"{f['loss']:.3f}", f"{f['calibration error']:.3f}", made["steps"] or "", f"{made['seconds']:.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "How sure, and how often right:", "", "| run | sure | pairs | mean | right |"]
    lines.append("| --- | --- | ---: | ---: | ---: |")
    for name, made in runs.items():
        lines += [f"| {name} {row}" for row in calibration_rows(made["margins"])]
    lines += ppo_lines()
    print("\n".join(lines))
    text = DOCUMENT.read_text()
    begin, rest = text.split(BEGIN)
    DOCUMENT.write_text(f"{begin}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.split(END)[1]}")


def train_words(options: argparse.Namespace, train: Path, held_out: Path) -> dict[str, Any]:
    """Logistic regression on which words the two answers hold, and on their lengths: no model."""
    import torch

    from rlhf_fast.feedback.schema import read_feedback

    start = time.perf_counter()
    learned, measured = (read_feedback(path) for path in (train, held_out))
    counts = Counter(word for ranking in learned for text in ranking.texts for word in words(text))
    places = {word: i for i, word in enumerate(word for word, count in counts.items() if count >= FEWEST)}

    def features(rankings: list[Any]) -> torch.Tensor:
        rows = torch.zeros(len(rankings), len(places) + 1)
        for row, ranking in zip(rows, rankings, strict=True):
            better, worse = (ranking.texts[i] for i in ranking.pairs()[0])
            for text, sign in ((better, 1.0), (worse, -1.0)):
                row[[places[word] for word in words(text) if word in places]] += sign
            row[-1] = (len(better) - len(worse)) / 200
        return rows

    weights, data = torch.zeros(len(places) + 1, requires_grad=True), features(learned)
    optimizer = torch.optim.LBFGS([weights], max_iter=100)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = -torch.nn.functional.logsigmoid(data @ weights).mean() + 0.5 * DECAY * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    margins = (features(measured) @ weights).tolist()
    return {"margins": margins, "seconds": time.perf_counter() - start, "steps": 0, "curve": []}


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z']+", text.lower()))


def ppo(only: str = "") -> None:
    """20 steps of PPO against the reward model of 1 100 pairs: what changes, and whether reward follows length."""
    from rlhf_fast.feedback.schema import read_feedback

    for name, file, most in (("prompts", "train", 512), ("held_out_prompts", "held_out", 64)):
        asked = [ranking.prompt for ranking in read_feedback(FOLDER / f"{file}.jsonl")][:most]
        (FOLDER / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in asked))
    for name, settings in PPO_RUNS.items():
        if only in ("", name):
            folder = FOLDER / f"ppo-{name}"
            command = [sys.executable, "-m", "rlhf_fast", "ppo", "--model", "smollm2", "--max-steps", "20", *settings]
            command += ["--reward-model", str(FOLDER / "ours-1100" / "model"), "--max-new-tokens", "48"]
            command += ["--prompts-file", str(FOLDER / "prompts.jsonl"), "--no-save-last", "--save-minutes", "0"]
            command += ["--eval-prompts-file", str(FOLDER / "held_out_prompts.jsonl")]
            command += ["--prompts-per-step", "8", "--samples-per-prompt", "4"]
            subprocess.run([*command, "--output-dir", str(folder), "--overwrite"], check=True)


PPO_RUNS = {"lr-5e-5": ["--lr", "5e-5"], "defaults": []}


def ppo_lines() -> list[str]:
    """One table, and the doctor's verdict on each run."""
    found = {name: FOLDER / f"ppo-{name}" for name in PPO_RUNS if (FOLDER / f"ppo-{name}" / "summary.json").exists()}
    if not found:
        return []
    lines = ["", "20 steps of PPO against the reward model of 1 100 pairs, 8 prompts x 4 samples of at most 48 tokens:"]
    columns = [f"{name}, {when}" for name in found for when in ("before", "after")]
    lines += ["", f"| held-out prompts | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in found.values()]
    for name in ("reward", "kl", "entropy", "length", "ended", "distinct"):
        values = [summary[f"{name}_{when}"] for summary in summaries for when in ("before", "after")]
        lines.append(f"| {name} | {' | '.join(f'{value:.2f}' for value in values)} |")
    values = [follows_length(folder, when) for folder in found.values() for when in ("before", "after")]
    lines.append(f"| correlation of reward and length | {' | '.join(values)} |")
    for name, folder in found.items():
        command = [sys.executable, "-m", "rlhf_fast", "doctor", str(folder)]
        said = subprocess.run(command, capture_output=True, text=True).stdout
        lines += ["", f"`rlhf-fast doctor` on {name}:", "", "```text"]
        lines += [line.rstrip() for line in said.splitlines() if line.strip()] + ["```"]
    return lines


def follows_length(folder: Path, when: str) -> str:
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    rewards, lengths = ([row[key] for row in rows if row["when"] == when] for key in ("reward", "tokens"))
    return "all of one length" if len(set(lengths)) == 1 else f"{correlation(rewards, lengths):.2f}"


def every(source: str) -> None:
    """All runs, the most telling first; the document is written after each."""
    runs = [["words", "--pairs", "1100"], ["ours", "--pairs", "1100", "--keep"], ["trl", "--pairs", "1100"]]
    runs += [["ours", "--pairs", "275"], ["ours", "--pairs", "550"]]
    split(source)
    for i, run in enumerate(runs):
        subprocess.run([sys.executable, __file__, "train", *run], check=True)
        if i == 2:
            ppo()
        report()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("split").add_argument("source")
    actions.add_parser("all").add_argument("source")
    actions.add_parser("ppo").add_argument("source", nargs="?", default="", choices=("", *PPO_RUNS), metavar="run")
    actions.add_parser("report")
    run = actions.add_parser("train")
    run.add_argument("side", choices=["ours", "trl", "words"])
    run.add_argument("--model", default="smollm2")
    run.add_argument("--pairs", type=int, default=1100)
    run.add_argument("--name", help="of the result")
    run.add_argument("--validate", action="store_true")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--max-length", type=int, default=512)
    run.add_argument("--lr", type=float)
    run.add_argument("--head-lr", type=float)
    run.add_argument("--epochs", type=float)
    run.add_argument("--batch-size", type=int)
    run.add_argument("--micro-batch-size", type=int, choices=(1, 2, 4, 8), help="pairs in one pass; 8 take 13 to 17 GB")
    run.add_argument("--pad", default="<|endoftext|>", help="pad token of TRL's side")
    run.add_argument("--keep", action="store_true", help="keep the weights")
    options = parser.parse_args()
    if options.action != "train":
        source = [options.source] if "source" in options else []
        return {"all": every, "split": split, "ppo": ppo, "report": report}[options.action](*source)
    names = ("lr", "head_lr", "epochs", "batch_size")
    options.settings = {n.replace("_", "-"): getattr(options, n) for n in names if getattr(options, n) is not None}
    changed = "".join(f"-{name}{value:g}" for name, value in options.settings.items())
    if options.micro_batch_size:  # the same sums, so not a part of the name; ours counts rows
        options.settings["micro-batch-size"] = 2 * options.micro_batch_size
    options.name = options.name or f"{options.pairs}{'-validate' if options.validate else ''}{changed}"
    train, held_out = files(options.pairs, options.validate)
    made = {"ours": train_ours, "trl": train_trl, "words": train_words}[options.side](options, train, held_out)
    (FOLDER / "results").mkdir(exist_ok=True)
    (FOLDER / "results" / f"{options.side}-{options.name}.json").write_text(json.dumps(made))
    print(options.side, options.name, figures(made["margins"]), f"{made['seconds']:.0f} s")


if __name__ == "__main__":
    main()
