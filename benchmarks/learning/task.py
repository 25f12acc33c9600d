# SPDX-License-Identifier: Apache-2.0
"""The task that both sides learn, and the one measure of what they have learned, in plain PyTorch.

It is that of examples/tiny: a prompt of three words names a topic, an answer of eight words earns the share of its
words that are on the topic, minus 1 if it does not end by itself. Every side starts from the same fine-tuned model.
"""

from __future__ import annotations

import json
import random
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "tiny"))

from make_data import make_tiny  # noqa: E402
from raters import topic_share  # noqa: E402

RATER = ROOT / "examples" / "tiny" / "raters.py"
NEW_TOKENS, MISSING_EOS = 10, 1.0
PAIRS, HELD_OUT_PAIRS, WRONG_LABELS = 768, 256, 0.1
EVALUATION_SAMPLES = 8  # of each held-out prompt


class Task:
    """The files in one folder, made on first use, and the measure."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base, self.start = folder / "model", folder / "start"
        if not (self.start / "model.safetensors").exists():
            self._make()

    def _make(self) -> None:
        make_tiny(self.folder)
        from learn_ours import sft

        sft(self, seed=0, folder=self.start)
        rng = random.Random(0)
        ids = [self.tokenizer(p)["input_ids"] for p in self.prompts("feedback_prompts.jsonl") for _ in range(3)]
        rng.shuffle(ids)
        pairs: list[dict[str, str]] = []
        model, generator = load(self.start), torch.Generator().manual_seed(0)
        for i in range(0, len(ids), 64):
            prompts = ids[i : i + 64]
            both = [sample(model, prompts, self.tokenizer, generator) for _ in range(2)]
            for k, prompt in enumerate(prompts):
                text = self.tokenizer.decode(prompt)
                answers = sorted((side.texts[k] for side in both), key=lambda a: topic_share(text, [a])[0])  # noqa: B023
                worth = topic_share(text, answers)
                if worth[0] == worth[1]:
                    continue
                if rng.random() < WRONG_LABELS:
                    answers.reverse()
                pairs.append({"prompt": text, "chosen": " " + answers[1], "rejected": " " + answers[0]})
        for name, rows in (("pairs", pairs[:PAIRS]), ("held_out_pairs", pairs[PAIRS : PAIRS + HELD_OUT_PAIRS])):
            (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.base, padding_side="left")

    def rows(self, name: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def prompts(self, name: str) -> list[str]:
        return [row["prompt"] for row in self.rows(name)]

    @cached_property
    def reference(self) -> Any:
        return load(self.start)

    def measure(self, model: Any) -> dict[str, float]:
        """On held-out prompts, always with the same random numbers: reward, KL and entropy in nats, length, ended."""
        training = model.training
        model.eval()
        texts = self.prompts("heldout.jsonl")
        ids = [self.tokenizer(p)["input_ids"] for p in texts for _ in range(EVALUATION_SAMPLES)]
        made = sample(model, ids, self.tokenizer, torch.Generator().manual_seed(1))
        with torch.no_grad():
            own, ref = (
                logits_of(m, made.ids)[:, made.prompt - 1 : -1].log_softmax(-1) for m in (model, self.reference)
            )
        kl = ((own.exp() * (own - ref)).sum(-1) * made.mask).sum(1)
        entropy = (-(own.exp() * own).sum(-1))[made.mask]
        rewards = reward([t for t in texts for _ in range(EVALUATION_SAMPLES)], made.texts, made.ended)
        model.train(training)
        return {
            "reward": sum(rewards) / len(rewards),
            "kl": float(kl.mean()),
            "entropy": float(entropy.mean()),
            "length": float(made.mask.sum(1).float().mean()),
            "ended": sum(made.ended) / len(made.ended),
        }

    def nll(self, model: Any) -> float:
        """Nats per token of the held-out demonstrations' answers, EOS included."""
        total, count = 0.0, 0
        for row in self.rows("heldout.jsonl"):
            prompt = self.tokenizer(row["prompt"])["input_ids"]
            ids = prompt + self.tokenizer(row["completion"])["input_ids"] + [self.tokenizer.eos_token_id]
            with torch.no_grad():
                logprobs = logits_of(model, torch.tensor([ids]))[0, :-1].log_softmax(-1)
            answer = torch.tensor(ids[1:])
            total -= float(logprobs.gather(1, answer[:, None])[len(prompt) - 1 :].sum())
            count += len(ids) - len(prompt)
        return total / count

    def pair_figures(self, model: Any) -> dict[str, float]:
        """Held-out accuracy and loss of a reward model (AutoModelForSequenceClassification)."""
        margins = []
        for row in self.rows("held_out_pairs.jsonl"):
            scores = []
            for side in ("chosen", "rejected"):
                ids = self.tokenizer(row["prompt"] + row[side])["input_ids"] + [self.tokenizer.eos_token_id]
                with torch.no_grad():
                    hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
                    scores.append(model.score(hidden.float()).squeeze())
            margins.append(scores[0] - scores[1])
        gaps = torch.stack(margins)
        return {"accuracy": float((gaps > 0).float().mean()), "loss": float(-logsigmoid(gaps).mean())}


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """From the trunk and the head: a trainer may have changed the model's own forward."""
    return model.lm_head(model.model(input_ids=ids, use_cache=False).last_hidden_state)


class Sampled:
    """Completions of prompts of one length: `ids` (B, P + T), `mask` (B, T) True up to the EOS, texts, ended."""

    def __init__(self, prompt: int, ids: Tensor, mask: Tensor, texts: list[str], ended: list[bool]) -> None:
        self.prompt, self.ids, self.mask, self.texts, self.ended = prompt, ids, mask, texts, ended


@torch.no_grad()
def sample(model: Any, prompts: list[list[int]], tokenizer: Any, generator: torch.Generator) -> Sampled:
    """Draw from softmax(logits), one token after the other, without a cache."""
    ids = torch.tensor(prompts)
    width, going = ids.shape[1], torch.ones(len(prompts), dtype=torch.bool)
    mask = torch.zeros(len(prompts), NEW_TOKENS, dtype=torch.bool)
    for step in range(NEW_TOKENS):
        drawn = torch.multinomial(logits_of(model, ids)[:, -1].softmax(-1), 1, generator=generator)
        mask[:, step] = going
        ids = torch.cat([ids, torch.where(going[:, None], drawn, tokenizer.pad_token_id)], 1)
        going = going & (drawn[:, 0] != tokenizer.eos_token_id)
    texts = [tokenizer.decode(row[width:], skip_special_tokens=True) for row in ids]
    return Sampled(width, ids, mask, texts, (~going).tolist())


def reward(prompts: list[str], completions: list[str], ended: list[bool]) -> list[float]:
    shares = [topic_share(p, [c])[0] for p, c in zip(prompts, completions, strict=True)]
    return [share - MISSING_EOS * (not end) for share, end in zip(shares, ended, strict=True)]
