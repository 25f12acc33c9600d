# SPDX-License-Identifier: Apache-2.0
"""What the integrations gain: training steps of TRL, plain and patched, and the GAE of verl and OpenRLHF.

    make measure-integrations                      or, with the trainers installed,
    python benchmarks/integrations.py              the table of docs/integrations.md
    python benchmarks/integrations.py --model tiny the same on a random model, to try the script

A step is loss and backward of a trainer's own `compute_loss` on a fixed batch, 25 % of its tokens labelled; generation
and the optimizer, which no patch touches, are left out. Each row of TRL runs in processes of its own, whose peak memory
is that of the whole process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from machine import machine, seconds

from rlhf_fast.integrations import Patch, apply_rlhf_fast_to_openrlhf, apply_rlhf_fast_to_trl, apply_rlhf_fast_to_verl

MODES = ("TRL", "TRL, compacted", "rlhf_fast")
ROWS, LENGTH, LABELLED = 4, 128, 32


def load(model: str) -> Any:
    import transformers

    torch.manual_seed(0)
    if model == "tiny":
        config = transformers.LlamaConfig(
            vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
        )
        return transformers.LlamaForCausalLM(config)
    from rlhf_fast.models.gguf import resolve_model

    return transformers.AutoModelForCausalLM.from_pretrained(resolve_model(model), dtype=torch.float32)


def tokenizer(vocabulary: int) -> Any:
    """Nothing is tokenized here, but the trainers want one."""
    import tokenizers
    import transformers

    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0")
    plain = tokenizers.Tokenizer(words)
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="w0", eos_token="w1", unk_token="w0")


def trainer_and_batch(name: str, model: Any, folder: str) -> tuple[Any, dict[str, Any]]:
    import datasets
    import trl

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, model.config.vocab_size, (ROWS, LENGTH), generator=generator)
    options = {
        "output_dir": folder, "per_device_train_batch_size": ROWS, "report_to": [], "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False,
    }  # fmt: skip
    words = tokenizer(model.config.vocab_size)
    if name == "SFT":
        rows = datasets.Dataset.from_dict({"text": ["w2 w3 w4"] * ROWS})
        trainer = trl.SFTTrainer(model, trl.SFTConfig(**options), train_dataset=rows, processing_class=words)
        labels = ids.clone()
        labels[:, : LENGTH - LABELLED] = -100
        return trainer, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    rows = datasets.Dataset.from_dict({"prompt": ["w2 w3 w4"] * ROWS})
    config = trl.GRPOConfig(num_generations=ROWS, max_completion_length=LABELLED, **options)
    trainer = trl.GRPOTrainer(model, no_reward, args=config, train_dataset=rows, processing_class=words)
    trainer.current_gradient_accumulation_steps = 1  # which its training loop would set
    prompts, completions = ids.split([LENGTH - LABELLED, LABELLED], dim=1)
    return trainer, {
        "prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions, "completion_mask": torch.ones_like(completions),
        "advantages": torch.randn(ROWS, generator=generator), "num_items_in_batch": torch.tensor(ROWS * LABELLED),
    }  # fmt: skip


def no_reward(completions: list[str], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def measure_one(name: str, mode: str, model_name: str, rounds: int) -> dict[str, float]:
    """In this process: seconds of a step, peak memory in GiB, and the loss, which must be the same in all modes."""
    import trl.trainer.utils

    warnings.simplefilter("ignore")
    if mode == "rlhf_fast":
        apply_rlhf_fast_to_trl()
    elif mode == "TRL, compacted":
        trl.trainer.utils._use_triton = lambda device: True
    with tempfile.TemporaryDirectory() as folder:
        trainer, batch = trainer_and_batch(name, load(model_name), folder)
        model = trainer.model.train()

        def step() -> float:
            model.zero_grad(set_to_none=True)
            loss = trainer.compute_loss(model, dict(batch))
            loss.backward()
            return loss.item()

        loss = step()
        median = seconds(step, rounds)
    return {"seconds": median, "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "loss": loss}


def trl_table(model: str, rounds: int) -> None:
    print("| step | seconds | peak GiB | speed-up over TRL | over TRL, compacted | loss |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name in ("GRPO", "SFT"):
        made = {}
        for mode in MODES:
            command = [sys.executable, __file__, "--model", model, "--rounds", str(rounds), "--one", name, mode]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr)
            made[mode] = row = json.loads(done.stdout.splitlines()[-1])
            ratios = [f"{made[m]['seconds'] / row['seconds']:.2f} x" if m in made else "" for m in MODES[:2]]
            cells = [f"{name}, {mode}", f"{row['seconds']:.2f}", f"{row['gib']:.2f}", *ratios, f"{row['loss']:.5f}"]
            print(f"| {' | '.join(cells)} |")


def gae_table(rounds: int) -> None:
    """One thread, as the loops' tiny tensors use anyway."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from helpers.stubs import OPENRLHF_NEEDS, stubbed

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 16, 8192, generator=generator)
    mask = (torch.rand(16, 8192, generator=generator) < 0.9).long()
    import verl.trainer.ppo.core_algos as core_algos

    with stubbed(*OPENRLHF_NEEDS):
        from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker as Maker

    calls = {
        "verl": (
            apply_rlhf_fast_to_verl,
            lambda: core_algos.compute_gae_advantage_return(rewards, values, mask, 0.99, 0.95),
        ),
        "OpenRLHF": (
            apply_rlhf_fast_to_openrlhf,
            lambda: Maker.get_advantages_and_returns(None, values, rewards, mask, 0.99, 0.95),
        ),
    }
    print("\n| GAE, 16 x 8192, one thread | theirs, ms | ours, ms | speed-up |\n| --- | ---: | ---: | ---: |")
    for name, (apply, call) in calls.items():
        with Patch("nothing"):
            theirs = seconds(call, rounds)
        with apply():
            ours = seconds(call, 10 * rounds)
        print(f"| {name} | {1e3 * theirs:.1f} | {1e3 * ours:.2f} | {theirs / ours:.0f} x |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help='"smollm2", a Hugging Face id or folder, or "tiny"')
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", nargs=2, metavar=("TRAINER", "MODE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure_one(*options.one, options.model, options.rounds)))
        return
    print(", ".join(f"{key} {value}" for key, value in machine().items()), time.strftime("%Y-%m-%d"), sep=", ")
    print(f"\n{options.model}, {ROWS} x {LENGTH} tokens, {ROWS * LABELLED} labelled, float32\n")
    trl_table(options.model, options.rounds)
    gae_table(options.rounds)


if __name__ == "__main__":
    main()
