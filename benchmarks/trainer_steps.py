# SPDX-License-Identifier: Apache-2.0
"""The loss of one batch by TRL and by us, and the update of a policy with a vocabulary of 262 144.

    make measure-trainer                            or, with TRL installed,
    python benchmarks/trainer_steps.py              the tables of docs/trainer-measurements.md
    python benchmarks/trainer_steps.py --model DIR  another model than SmolLM2-135M

Every row runs in a process of its own, whose peak memory is that of the whole process. The update: forward and backward
of PPO's loss on given samples, eager PyTorch with full logits beside the trainer's own. `trainer_phases.py` has the
steps of all phases.
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
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import machine

PROMPTS = ["The new job", "My sister told me that", "The old dog", "A cup of", "Last summer we", "The train to"]
PROMPTS_PER_STEP, SAMPLES, NEW_TOKENS, BETA = 4, 4, 48, 0.04
ADDRESS_SPACE = 20 * 2**30
GEMMA = dict(
    vocab_size=262_144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
    num_key_value_heads=1, head_dim=256, tie_word_embeddings=True,
)  # fmt: skip


def worth(text: str) -> float:
    return float(len(set(text.split())))


LENGTHS: list[int] = []  # of what TRL sampled, whose own metrics are cleared as they are logged


def trl_reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    LENGTHS.extend(map(len, completion_ids))
    return [worth(text) for text in completions]


def our_reward(prompt: str, completions: list[str]) -> list[float]:
    return [worth(text) for text in completions]


def trl_trainer(model: str, folder: str, steps: int) -> Any:
    import datasets
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    config = trl.GRPOConfig(
        output_dir=folder, per_device_train_batch_size=PROMPTS_PER_STEP * SAMPLES, num_generations=SAMPLES,
        max_completion_length=NEW_TOKENS, beta=BETA, loss_type="grpo", learning_rate=1e-6, max_steps=steps,
        lr_scheduler_type="constant", use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        save_strategy="no", logging_strategy="no", temperature=1.0, top_p=1.0, disable_tqdm=True,
    )  # fmt: skip
    rows = datasets.Dataset.from_dict({"prompt": PROMPTS})
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return trl.GRPOTrainer(loaded, trl_reward, args=config, train_dataset=rows, processing_class=tokenizer)


def our_config(model: str, folder: str, **options: Any) -> Any:
    from rlhf_fast.trainer import PPOConfig

    prompts = Path(folder) / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    common = {"objective": "grpo", "kl_in": "loss", "kl_estimator": "k3", "kl_coef": BETA, "num_minibatches": 1}
    return PPOConfig(
        model=model, prompts_file=str(prompts), dtype="float32", prompts_per_step=PROMPTS_PER_STEP, lr=1e-6,
        reward_functions=(f"{__file__}:our_reward",), samples_per_prompt=SAMPLES, max_new_tokens=NEW_TOKENS,
        score_clip=0.0, **{**common, **options},
    )  # fmt: skip


def losses(model: str) -> dict[str, float]:
    """The loss of one batch by both, with old and reference log-probabilities that differ from the policy's."""
    import rlhf_fast as rf
    from rlhf_fast.models.batches import Batch
    from rlhf_fast.trainer.rl.experience import Experience
    from rlhf_fast.trainer.rl.objectives.objective import Totals
    from rlhf_fast.trainer.rl.policy_update import policy_backward
    from rlhf_fast.trainer.rl.settings import Settings

    generator = torch.Generator().manual_seed(0)
    count, prompt = PROMPTS_PER_STEP * SAMPLES, 6
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(model, folder, 1)
        config = our_config(model, folder)
    policy = trainer.model.train()
    ids = torch.randint(2, policy.config.vocab_size, (count, prompt + NEW_TOKENS), generator=generator)
    lengths = torch.randint(5, NEW_TOKENS + 1, (count, 1), generator=generator)
    completion_mask = torch.arange(NEW_TOKENS) < lengths
    mask = torch.nn.functional.pad(completion_mask, (prompt, 0))
    real = torch.nn.functional.pad(completion_mask, (prompt, 0), value=True)
    batch = Batch(ids, real, mask)
    with torch.no_grad():
        exact = rf.hf.token_logprobs(policy, ids, real, mask=mask)
    old, ref = (exact + 0.2 * torch.randn(exact.shape, generator=generator) * mask for _ in range(2))
    advantages = torch.randn(count, generator=generator)
    trainer.current_gradient_accumulation_steps = 1
    theirs = trainer._compute_loss(
        policy,
        {
            "prompt_ids": ids[:, :prompt], "prompt_mask": real[:, :prompt].long(), "completion_ids": ids[:, prompt:],
            "completion_mask": completion_mask.long(), "advantages": advantages, "num_items_in_batch": mask.sum(),
            "old_per_token_logps": old[:, prompt:], "ref_per_token_logps": ref[:, prompt:],
        },
    )  # fmt: skip
    nothing = torch.zeros_like(exact)
    experience = Experience(
        batch=batch, learned=mask, rewards=advantages, old_logprobs=old, entropy=nothing, ref_logprobs=ref,
        values=nothing, advantages=advantages[:, None] * mask, returns=nothing,
    )  # fmt: skip
    loss = replace(Settings(config).step.update.loss, single_update=False)
    totals = Totals(float(mask.sum()), count, NEW_TOKENS)
    found = policy_backward(policy, nullcontext, experience, totals, loss)
    return {"TRL": theirs.item(), "rlhf_fast": found.figures["loss/policy_avg"]}


def update(variant: str, tokens: int) -> dict[str, float]:
    """Forward and backward of PPO's loss on `tokens` sampled tokens of a model of Gemma 3 270M's shape."""
    import transformers

    import rlhf_fast as rf
    from rlhf_fast.run.runtime import tune_process

    tune_process()
    if variant == "eager":
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    torch.manual_seed(0)
    model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**GEMMA))
    length, prompt = 256, 32
    ids = torch.randint(2, 262_144, (tokens // length, prompt + length))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, :prompt] = False
    old, advantages = torch.full(ids.shape, -12.5), torch.randn(ids.shape)

    def step() -> None:
        if variant == "eager":
            logits = model(ids, use_cache=False).logits[:, prompt - 1 : -1]
            logprobs = logits.float().log_softmax(-1).gather(-1, ids[:, prompt:, None]).squeeze(-1)
            ratio, gain = (logprobs - old[:, prompt:]).exp(), advantages[:, prompt:]
            loss = -torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()
        else:
            hidden = model.model(ids, use_cache=False).last_hidden_state[:, prompt - 1 : -1]
            part = slice(prompt, None)
            loss = rf.linear_policy_loss(
                hidden, model.lm_head.weight, ids[:, part], old[:, part], advantages[:, part], mask=mask[:, part]
            ).loss
        loss.backward()
        model.zero_grad()

    step()
    times = []
    for _ in range(2):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {"seconds": min(times)}


def row(*job: str, model: str) -> dict[str, float] | None:
    """A measurement in a process of its own; None where memory ran out."""
    command = [sys.executable, __file__, "--model", model, "--job", *job]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        if "alloc" in done.stderr or done.returncode < 0:
            return None
        raise RuntimeError(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help='"smollm2", or a folder')
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    from rlhf_fast.models.gguf import resolve_model

    model = str(resolve_model(options.model))
    if options.job:
        warnings.simplefilter("ignore")
        name, *arguments = options.job
        figures = update(arguments[0], int(arguments[1])) if name == "update" else losses(model)
        figures["gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(figures))
        return
    print(", ".join(f"{key} {value}" for key, value in machine().items()), time.strftime("%Y-%m-%d"), sep=", ")
    same = row("losses", model=model)
    assert same is not None
    print(f"\nThe loss of one batch: TRL {same['TRL']:.6f}, rlhf_fast {same['rlhf_fast']:.6f}\n")
    print("| PPO update, Gemma 3 270M's shape, float32 | tokens | seconds | peak GiB |\n| --- | ---: | ---: | ---: |")
    for tokens in (1024, 4096):
        for variant, name in (("eager", "eager, full logits"), ("ours", "rlhf_fast")):
            made = row("update", variant, str(tokens), model=model)
            cells = ["does not fit in 20 GiB", ""] if made is None else [f"{made['seconds']:.1f}", f"{made['gib']:.1f}"]
            print(f"| {name} | {tokens} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
