# SPDX-License-Identifier: Apache-2.0
"""Memory of what PPO loads and of two tiny steps, beside the formula of docs/scaling.md.

    python benchmarks/agent_memory.py objective=grpo lora_rank=16
    MALLOC_MMAP_THRESHOLD_=65536 torchrun --nproc-per-node 2 benchmarks/agent_memory.py

The second runs with fsdp, prints what each process takes, and has glibc give back what is freed.

Resident memory of this process above what Python and the libraries take; Linux.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from rlhf_fast.data.examples import read_prompts
from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.models.loading import load_reward_model, load_tokenizer
from rlhf_fast.run.options import load_config
from rlhf_fast.run.progress import Timer
from rlhf_fast.run.runtime import tune_process
from rlhf_fast.trainer import PPOConfig
from rlhf_fast.trainer.rl.agent import encode_prompts, load_agent
from rlhf_fast.trainer.rl.ppo import train_step
from rlhf_fast.trainer.rl.settings import Settings


def memory(name: str) -> float:
    """Bytes: VmRSS (now) or VmHWM (the peak); weights that are still mapped from their files count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def formula(config: PPOConfig, policy: int, learned: int, critic: int, critic_learned: int, reward: bool) -> float:
    """Bytes by docs/scaling.md. `policy` and `critic` are all weights, the others those that learn."""
    weight = 2 if config.dtype == "bfloat16" else 4
    master = 4 if config.dtype == "bfloat16" else 0
    if config.lora_rank:
        each = 4 + 8 + 4  # adapters are float32: weight, moments, gradient (small: both models' are counted)
        plain = (policy - learned) * (1 + reward) + critic - critic_learned
        return plain * weight + (learned + critic_learned) * each
    each, gradients = weight + master + 8, 4 * max(policy, critic)  # of one model at a time
    whole = policy * weight if config.fsdp else 0  # the policy while it samples
    return ((policy + critic) * each + gradients + (1 + reward) * policy * weight) / ranks().count + whole


def main() -> None:
    """Load, step, print."""
    from rlhf_fast.trainer.rl.objectives import OBJECTIVES

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.jsonl"
        file.write_text(json.dumps({"prompt": "The weather today is"}) + "\n")
        overrides = {"prompts_file": str(file), "dtype": "bfloat16", "samples_per_prompt": 2}
        overrides |= {"max_new_tokens": 8, "num_minibatches": 1, "micro_batch_size": 1}  # two: sums in float32
        overrides |= {"prompts_per_step": ranks().count, "fsdp": ranks().count > 1}
        overrides |= dict(word.split("=", 1) for word in sys.argv[1:])
        config = load_config(PPOConfig, None, overrides)
        if not config.reward_model:
            reward = load_reward_model(config.model, config.dtype, load_tokenizer(config.model), new_head=True)
            config.reward_model = str(Path(ranks().every(folder)[0]) / "reward")
            if ranks().main:
                reward.save_pretrained(config.reward_model)
            ranks().wait()
            del reward
        config.validate()
        if not config.fsdp:  # pieces of models come and go, and what is kept for them would be counted
            tune_process()
        before = memory("VmRSS")
        settings = Settings(config)
        agent = load_agent(settings.agent)
        loaded = memory("VmRSS") - before
        prompts = encode_prompts(read_prompts(config.prompts_file), agent, settings.prompts)
        for step in range(2):  # in the first one the moments come as the gradients go
            train_step(agent, prompts, settings.step, settings.sizes, step, Timer())
    count: list[int] = []
    for model in (agent.policy, agent.critic):
        sizes = [(p.numel(), p.requires_grad) for p in model.parameters()] if model is not None else []
        count += [sum(size for size, _ in sizes), sum(size for size, learns in sizes if learns)]
    wanted = formula(config, *count, reward=agent.rewards.model is not None)
    critic = "with" if OBJECTIVES[config.objective].critic else "without"
    print(
        f"{config.objective} ({critic} critic), {config.dtype}, LoRA rank {config.lora_rank}, {count[0] / 1e6:.0f}M "
        f"weights: formula {wanted / 1e9:.2f} GB; loaded {loaded / 1e9:.2f}, after two steps "
        f"{(memory('VmRSS') - before) / 1e9:.2f}, peak {(memory('VmHWM') - before) / 1e9:.2f}"
    )


if __name__ == "__main__":
    main()
