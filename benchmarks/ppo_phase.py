# SPDX-License-Identifier: Apache-2.0
"""PPO's optimisation phase of a real small LM: the trainer's, the same loop on eager ops, and the usual loop.

    make measure-trainer                               or
    python benchmarks/ppo_phase.py [--model DIR]       the table of docs/trainer.md

Given samples and their scores, the phase is: old and reference log-probabilities, values, advantages, and one epoch of
policy and critic over two minibatches, optimizers included. Models, dtype, optimizers and samples are the same for all.

- rlhf_fast: `train_step` of the trainer.
- eager ops: the same, with each op of ours replaced by plain PyTorch on the same compacted rows.
- usual loop: micro-batches in the order of the samples, padded on the right, full logits as models return them.

Times are taken in one process, in turns. For the peaks of its memory each runs in processes of its own: what is in use
at most, and what is resident at most as the trainer sets the allocator.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from common import eager_logprobs_entropy, eager_ppo_advantages
from linear_memory import resident
from machine import machine
from torch import Tensor

import rlhf_fast as rf
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.run.progress import Timer
from rlhf_fast.run.runtime import tune_process
from rlhf_fast.trainer import PPOConfig
from rlhf_fast.trainer.rl import agent as agents
from rlhf_fast.trainer.rl import ppo
from rlhf_fast.trainer.rl.settings import Settings

VARIANTS = ("usual loop, full logits", "same loop, eager ops", "rlhf_fast")


class Shape(NamedTuple):
    prompts: int
    each: int  # samples of a prompt
    prompt: int  # tokens of it
    most: int  # tokens of a completion
    checkpointing: bool = False  # of activations


SHAPES = {
    "8 x 8, 8 + at most 20": Shape(8, 8, 8, 20),
    "4 x 4, 64 + at most 128": Shape(4, 4, 64, 128),
    "4 x 8, 64 + at most 128, checkpointing": Shape(4, 8, 64, 128, checkpointing=True),
}
KL_COEF, CLIP = 0.1, 0.2


def worth(prompt: str, completions: list[str]) -> list[float]:
    """PPO wants a reward to be named; it is not called, since the samples here come with their scores."""
    return [0.0] * len(completions)


def samples(shape: Shape, vocabulary: int) -> Rollout:
    """Random tokens; completions of a quarter of the longest at least."""
    prompts, each, prompt, most, _ = shape
    generator = torch.Generator().manual_seed(0)
    count = prompts * each
    begins = torch.randint(2, vocabulary, (prompts, prompt), generator=generator).repeat_interleave(each, 0)
    ids = torch.cat([begins, torch.randint(2, vocabulary, (count, most), generator=generator)], 1)
    lengths = prompt + torch.randint(most // 4, most + 1, (count, 1), generator=generator)
    places = torch.arange(prompt + most)
    real = (places < lengths)[:, : int(lengths.max())]
    ids = ids[:, : real.shape[1]] * real
    scores = torch.randn(count, generator=generator)
    ended = torch.ones(count, dtype=torch.bool)
    return Rollout(
        input_ids=ids,
        attention_mask=real,
        response_mask=real & (places[: real.shape[1]] >= prompt),
        texts=[""] * count,
        ended=ended,
        scores=scores,
    )


class Phase:
    """The models of one run, and the phase by each variant."""

    def __init__(self, model: str, shape: Shape) -> None:
        prompts, each, _, most, checkpointing = shape
        self.config = PPOConfig(
            model=model, reward_functions=(f"{__file__}:worth",), prompts_per_step=prompts, samples_per_prompt=each,
            max_new_tokens=most, num_minibatches=2, micro_batch_size=prompts * each // 2, kl_coef=KL_COEF, lr=1e-6,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        self.settings = Settings(self.config)
        self.agent = agents.load_agent(self.settings.agent)
        self.rollout = samples(shape, self.agent.policy.config.vocab_size)
        self.prompts: Any = SimpleNamespace(
            draw=lambda *_: list(range(prompts)), ranked=lambda _: self.rollout, pairs=[]
        )

    def __call__(self, variant: str) -> None:
        if variant == VARIANTS[0]:
            self.usual()
        elif variant == VARIANTS[1]:
            with eager_ops():
                self.ours()
        else:
            self.ours()

    def ours(self) -> None:
        ppo.train_step(self.agent, self.prompts, self.settings.step, self.settings.sizes, 1, Timer())

    def usual(self) -> None:
        """As small PPO codes have it, on the trainer's models and optimizers."""
        agent, rollout = self.agent, self.rollout
        ids, real, mask = rollout.input_ids, rollout.attention_mask, rollout.response_mask
        assert agent.frozen is not None and rollout.scores is not None
        micro = torch.arange(len(ids)).split(self.config.micro_batch_size)

        def logits(model: Any, rows: Tensor) -> Tensor:
            return model(ids[rows], attention_mask=real[rows].long(), use_cache=False).logits[:, :-1]

        def logprobs(model: Any, rows: Tensor) -> Tensor:
            return logits(model, rows).float().log_softmax(-1).gather(-1, ids[rows, 1:, None]).squeeze(-1)

        def values(rows: Tensor) -> Tensor:
            trunk = agent.critic.base_model(ids[rows], attention_mask=real[rows].long(), use_cache=False)
            return agent.critic.score(trunk.last_hidden_state.float())[:, :-1, 0]

        kept = mask[:, 1:]
        with torch.no_grad():
            # the entropy is a metric of this pass alone, as it is in the trainer
            both = [eager_logprobs_entropy(logits(agent.policy, rows), ids[rows, 1:]) for rows in micro]
            old = torch.cat([of_rows for of_rows, _ in both])
            ref = torch.cat([logprobs(agent.frozen, rows) for rows in micro])
            before = torch.cat([values(rows) for rows in micro])
            advantages, returns = eager_ppo_advantages(rollout.scores, old, ref, before * kept, kept, KL_COEF)
        agent.train(self.config.gradient_checkpointing)
        for rows in torch.randperm(len(ids)).chunk(self.config.num_minibatches):
            tokens = kept[rows].sum()
            ratio, gain = (logprobs(agent.policy, rows) - old[rows]).exp(), advantages[rows]
            loss = -torch.minimum(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain)
            ((loss * kept[rows]).sum() / tokens).backward()
            errors = (values(rows) - returns[rows]).square()
            (0.5 * (errors * kept[rows]).sum() / tokens).backward()
            agent.policy_optimizer.step(1.0)
            agent.critic_optimizer.step(1.0)
        agent.train(False)


@contextmanager
def eager_ops() -> Iterator[None]:
    """Every op that PPO calls, in plain PyTorch."""

    def stats(rows: Tensor, weight: Tensor, targets: Tensor, **_: Any) -> Any:
        logprobs, entropy = eager_logprobs_entropy(torch.nn.functional.linear(rows, weight), targets)
        return SimpleNamespace(logprobs=logprobs, entropy=entropy)

    def token_logprobs(rows: Tensor, weight: Tensor, targets: Tensor, **_: Any) -> Tensor:
        logits = torch.nn.functional.linear(rows, weight)
        return logits.float().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)

    def policy_loss(
        rows: Tensor, weight: Tensor, targets: Tensor, old: Tensor, gain: Tensor, *, normalizer: Tensor, **_: Any
    ) -> Any:
        logprobs = token_logprobs(rows, weight, targets)
        ratio = (logprobs - old).exp()
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        loss = (-torch.minimum(ratio * gain, clipped * gain) / normalizer).sum()
        share = (clipped * gain < ratio * gain).float().mean()
        return SimpleNamespace(loss=loss, logprobs=logprobs.detach(), clip_fraction=share)

    def advantages(
        scores: Tensor, logprobs: Tensor, ref: Tensor, values: Tensor, mask: Tensor, *, kl_coef: float, **_: Any
    ) -> Any:
        made, returns = eager_ppo_advantages(scores, logprobs, ref, values, mask, kl_coef)
        return rf.Advantages(logprobs - ref, torch.zeros_like(made), made, returns)

    replaced = {
        "linear_token_stats": stats, "linear_token_logprobs": token_logprobs, "linear_policy_loss": policy_loss,
        "ppo_advantages": advantages,
    }  # fmt: skip
    with mock.patch.multiple(rf, **replaced):
        yield


def peak(model: str, shape: Shape, variant: str) -> int:
    """Bytes of the phase above what is resident before it, moments of the optimizer there already."""
    phase = Phase(model, shape._replace(prompt=4, most=4))
    phase(variant)
    phase.rollout = samples(shape, phase.agent.policy.config.vocab_size)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator kept would hide what the phase takes
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    phase(variant)
    return resident("VmHWM") - before


# glibc maps every block from so many bytes on by itself and unmaps it when it is freed: what is resident is in use
IN_USE = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def peaks(model: str, shape: str, variant: str) -> tuple[float, float]:
    """GiB in use at most, and resident at most as the trainer sets the allocator, which keeps what is freed."""
    found = []
    for kept in (False, True):
        command = [sys.executable, __file__, "--model", model, "--peak", shape, variant, *(["--keep"] * kept)]
        environment = {**os.environ, **({} if kept else IN_USE)}
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        found.append(json.loads(output.splitlines()[-1]) / 2**30)
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help='"smollm2", or a folder')
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", type=int, nargs="+", default=range(len(SHAPES)), help="which of them, by number")
    parser.add_argument("--peak", nargs=2, metavar=("SHAPE", "VARIANT"), help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.peak:
        if options.keep:
            tune_process()
        print(json.dumps(peak(options.model, SHAPES[options.peak[0]], options.peak[1])))
        return
    tune_process()
    print(", ".join(f"{key} {value}" for key, value in machine().items()), time.strftime("%Y-%m-%d"), sep=", ")
    columns = ["samples, tokens", "variant", "seconds", "speed-up", "peak in use, GiB", "peak resident, GiB"]
    print(f"\n| {' | '.join(columns)} |\n| --- | --- | ---: | ---: | ---: | ---: |")
    for shape in [list(SHAPES)[i] for i in options.shapes]:
        phase = Phase(options.model, SHAPES[shape])
        times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for round_ in range(1 + options.rounds):
            first = round_ % len(VARIANTS)  # in turns: what one leaves in the heap serves the next
            for variant in VARIANTS[first:] + VARIANTS[:first]:
                start = time.perf_counter()
                phase(variant)
                if round_:
                    times[variant].append(time.perf_counter() - start)
        del phase
        for variant in VARIANTS:
            seconds = median(times[variant])
            in_use, held = peaks(options.model, shape, variant)
            cells = [shape, variant, f"{seconds:.2f}", f"{median(times[VARIANTS[0]]) / seconds:.2f} x"]
            print(f"| {' | '.join(cells)} | {in_use:.2f} | {held:.2f} |", flush=True)


if __name__ == "__main__":
    main()
