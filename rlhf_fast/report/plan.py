# SPDX-License-Identifier: Apache-2.0
"""`rlhf-fast plan --model M --gpus 8 --gpu-memory 80`: does it fit, with which options, and how long does it take."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from rlhf_fast.errors import UserError
from rlhf_fast.models.footprint import Footprint
from rlhf_fast.models.loading import resolve_dtype
from rlhf_fast.run.options import NAME, NOT_NEGATIVE, POSITIVE, Options
from rlhf_fast.trainer.rl.config import COMMON_DEFAULTS
from rlhf_fast.trainer.rl.objectives import OBJECTIVES

GIB = 2**30
TILE = 2**28  # bytes of the fused head's scratch
BUDGET = 2**28  # bytes of logits that the fused head keeps for its backward
BASE = 2**30  # of a process: libraries, and the context of a GPU
SPARE = 0.08  # of the memory: fragments, and buffers that no count knows
NF4 = 0.53  # bytes a weight, with the scales
FORWARD, BACKWARD = 1, 2  # passes' operations, in forward passes
GPUS = {  # bf16 operations and bytes a second, from the vendors' data sheets
    "a100": (312e12, 2.0e12),
    "h100": (989e12, 3.35e12),
    "h200": (989e12, 4.8e12),
    "b200": (2250e12, 8.0e12),
}


@dataclass
class PlanOptions(Options):
    """Say what a run would take, before any weight is loaded."""

    model: Annotated[str, NAME] = "smollm2"
    """A Hugging Face id, a folder, or a config.json."""
    phase: Literal["sft", "reward", "ppo"] = "ppo"
    """The phase to plan."""
    objective: str = "ppo"
    """For ppo: its objective; without a critic it takes less."""
    kl_coef: Annotated[float | None, NOT_NEGATIVE] = None
    """For ppo: with 0 no reference model is needed. None: the objective's."""
    reward_model: str = ""
    """For ppo: the reward model, also the critic's start; empty: as large as the model. "none": reward functions."""
    gpus: Annotated[int, POSITIVE] = 1
    """Processes, each with a GPU."""
    gpu_memory: Annotated[float, POSITIVE] = 80.0
    """GiB of each."""
    gpu: Literal["a100", "h100", "h200", "b200"] = "h100"
    """Whose operations and bandwidth the times assume."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the weights; the optimizer works in float32 either way."""
    prompt_length: Annotated[int, POSITIVE] = 512
    """Tokens of a prompt, in the mean; of a whole example for sft and reward."""
    max_new_tokens: Annotated[int, POSITIVE] = 512
    """Tokens of a completion, for ppo."""
    batch_size: Annotated[int, POSITIVE] = 64
    """Sequences of a step, of all processes together."""
    epochs: Annotated[int, POSITIVE] = 1
    """Passes over a step's samples, for ppo."""
    lora_rank: Annotated[int, NOT_NEGATIVE] = 0
    """Plan with adapters of this rank; 0: full weights, and adapters of rank 32 if nothing else fits."""
    efficiency: Annotated[float, POSITIVE] = 0.4
    """Share of the GPU's operations that matrix products reach."""
    bandwidth: Annotated[float, POSITIVE] = 0.6
    """Share of its bandwidth that generation reaches."""


class Setup(NamedTuple):
    """What the plan may choose."""

    fsdp: bool = False
    gradient_checkpointing: bool = False
    lora_rank: int = 0
    nf4: bool = False
    micro_batch: int = 1

    def flags(self) -> str:
        """As options of the phase."""
        words = [f"--micro-batch-size {self.micro_batch}"]
        words += ["--gradient-checkpointing"] if self.gradient_checkpointing else []
        words += [f"--lora-rank {self.lora_rank}"] if self.lora_rank else []
        words += ["--dtype nf4"] if self.nf4 else []
        return " ".join(words + (["--fsdp"] if self.fsdp else []))


class Models(NamedTuple):
    """Footprints with full weights and with adapters; `reward` is None without a reward model."""

    policy: Footprint
    adapted: Footprint
    reward: Footprint | None
    reward_adapted: Footprint | None


Memory = dict[str, dict[str, float]]  # moment -> part -> bytes of one process


def memory(options: PlanOptions, models: Models, setup: Setup) -> Memory:
    """Bytes of each part of a process at each moment of a step."""
    policy = models.adapted if setup.lora_rank else models.policy
    critic = None
    if options.phase == "ppo" and OBJECTIVES[options.objective].critic:
        critic = (models.reward_adapted if setup.lora_rank else models.reward) or policy
    rows = -(-options.batch_size // options.gpus)
    length = options.prompt_length + (options.max_new_tokens if options.phase == "ppo" else 0)
    always = {"libraries": float(BASE), **_trained("policy", policy, options, setup)}
    if critic is not None:
        always |= _trained("critic", critic, options, setup)
    if options.phase == "ppo":
        if not setup.lora_rank and has_reference(options):
            always["reference weights"] = _weights(policy, options, setup._replace(nf4=False))
        if models.reward is not None:
            always["reward model weights"] = _weights(models.reward, options, setup._replace(nf4=False))
    moments: Memory = {}
    if setup.fsdp:  # loaded whole, in float32 by SFT, before it is sharded
        whole = policy.weights * (4.0 if options.phase == "sft" and not setup.lora_rank else policy.width)
        others = {name: size for name, size in always.items() if not name.startswith("policy")}
        moments["load"] = {**others, "policy weights": whole}
    if options.phase == "ppo":
        gathered = float(policy.weights * policy.width) if setup.fsdp and not setup.nf4 else 0.0
        moments["sample"] = {**always, "KV cache": float(policy.cache_per_token * length * rows), "gathered": gathered}
    name = {"sft": "update", "reward": "update"}.get(options.phase, "update policy")
    moments[name] = {**always, **_update(policy, options, setup, length)}
    if options.phase != "reward":  # the head's tile, and its gradient's sum in float32
        moments[name]["head"] = TILE + BUDGET + (0.0 if setup.lora_rank else 4.0 * policy.head)
    if critic is not None:
        moments["update critic"] = {**always, **_update(critic, options, setup, length)}
    return moments


def has_reference(options: PlanOptions) -> bool:
    """Whether the steps read a reference model."""
    objective = OBJECTIVES[options.objective]
    usual = objective.defaults.get("kl_coef", COMMON_DEFAULTS["kl_coef"])
    return objective.pairs or (usual if options.kl_coef is None else options.kl_coef) > 0


def _weights(model: Footprint, options: PlanOptions, setup: Setup) -> float:
    """Of one copy, or of this process' share of it. SFT keeps float32 weights, and a copy for autocast."""
    float32 = options.phase == "sft" and not setup.lora_rank and model.width == 2
    bytes_ = float(model.weights * (4 + model.width if float32 else model.width))
    if setup.nf4:
        bytes_ -= model.in_layers * (model.width - NF4)
    return bytes_ / (options.gpus if setup.fsdp else 1)


def _trained(name: str, model: Footprint, options: PlanOptions, setup: Setup) -> dict[str, float]:
    """Weights, and the two moments and (of bfloat16 ones) the float32 master of each trained one."""
    has_master = model.width == 2 and options.phase != "sft"
    optimizer = model.trained * (12.0 if has_master else 8.0) / _shares(options, setup)
    return {f"{name} weights": _weights(model, options, setup), f"{name} optimizer": optimizer}


def _shares(options: PlanOptions, setup: Setup) -> int:
    """Processes that share the trained weights; adapters are copied."""
    return options.gpus if setup.fsdp and not setup.lora_rank else 1


def _update(model: Footprint, options: PlanOptions, setup: Setup, length: int) -> dict[str, float]:
    """What the update of one model adds. Gradients of one process' single micro-batch stay in the weights' dtype."""
    several = options.gpus > 1 or options.batch_size > setup.micro_batch
    full_sft = options.phase == "sft" and not setup.lora_rank
    width = 4.0 if full_sft else float(model.width)
    layers = 2.0 * model.largest_layer * width if setup.fsdp else 0.0  # one in use, one on its way
    buckets = 4.0 * model.trained if options.phase == "sft" and options.gpus > 1 and not setup.fsdp else 0.0
    return {
        "gradients": model.trained * (4.0 if several else float(model.width)) / _shares(options, setup),
        "buckets of DistributedDataParallel": buckets,
        "activations": float(model.saved(setup.micro_batch, length, setup.gradient_checkpointing)),
        "gathered": layers + (model.head * width if setup.fsdp else 0.0),
    }


def peak(moments: Memory) -> float:
    """The largest sum of a moment, with the spare share."""
    return max(sum(parts.values()) for parts in moments.values()) * (1 + SPARE)


def choose(options: PlanOptions, models: Models) -> Setup | None:
    """The setup that fits and computes least beyond the model's own passes; None if nothing fits.

    Order: full weights before adapters before 4 bits; copies before shards; stored before recomputed activations.
    """
    adapters = options.lora_rank or 32
    kinds = [(options.lora_rank, False), (adapters, False), (adapters, True)]
    rows = -(-options.batch_size // options.gpus)
    for (rank, nf4), recompute, fsdp in itertools.product(kinds, (False, True), (False, True)):
        if fsdp and (options.gpus == 1 or nf4):  # 4-bit weights are not sharded
            continue
        setups = [Setup(fsdp, recompute, rank, nf4, 2**k) for k in range(rows.bit_length())]
        fit = [x for x in setups if peak(memory(options, models, x)) <= options.gpu_memory * GIB]
        # with fewer than four rows the weights are read more often than recomputing costs
        if fit and (recompute or fit[-1].micro_batch >= min(rows, 4)):
            return fit[-1]
    return None


def seconds(options: PlanOptions, models: Models, setup: Setup) -> dict[str, float]:
    """Of each part of a step; a pass is bound by its operations, a generated token by reading the weights."""
    operations, bytes_ = GPUS[options.gpu]
    operations, bytes_ = operations * options.efficiency, bytes_ * options.bandwidth
    rows = -(-options.batch_size // options.gpus)
    policy, ppo = models.policy, options.phase == "ppo"
    length = options.prompt_length + (options.max_new_tokens if ppo else 0)
    forward = policy.flops_per_token(length) * length * rows / operations
    update = (FORWARD + BACKWARD + (FORWARD if setup.gradient_checkpointing else 0)) * forward
    if not ppo:
        return {"update": update}
    context = options.prompt_length + options.max_new_tokens / 2  # in the mean, while a completion grows
    read = (_weights(policy, options, Setup(nf4=setup.nf4)) + policy.cache_per_token * context * rows) / bytes_
    token = max(read, policy.flops_per_token(length) * rows / operations)
    parts = {"sample": options.max_new_tokens * token + forward * options.prompt_length / length}
    critic = OBJECTIVES[options.objective].critic
    passes = has_reference(options) + (options.epochs > 1 or critic)
    parts["old and reference log-probabilities"] = forward * passes
    score = (models.reward or policy).flops_per_token(length) * length * rows / operations
    if models.reward is not None:
        parts["scores"] = score
    if critic:
        parts["values and critic"] = score * (1 + 3 * options.epochs)
    parts["update"] = update * options.epochs
    return parts


def load(options: PlanOptions) -> Models:
    """Footprints of the models of a plan."""
    dtype = resolve_dtype(options.dtype)

    def both(name: str) -> tuple[Footprint, Footprint]:
        try:
            return Footprint.of(name, dtype), Footprint.of(name, dtype, options.lora_rank or 32)
        except (OSError, ValueError) as error:
            first = str(error).strip().partition("\n")[0]
            raise UserError(f"cannot read the configuration of {name!r}: {first}") from None

    policy, adapted = both(options.model)
    if options.phase != "ppo" or options.reward_model == "none":
        return Models(policy, adapted, None, None)
    return Models(policy, adapted, *(both(options.reward_model) if options.reward_model else (policy, adapted)))


def show(options: PlanOptions, models: Models, setup: Setup) -> None:
    """Print the memory by moment and part, the times, the assumptions and the launch line."""
    from rich.console import Console
    from rich.table import Table

    moments = memory(options, models, setup)
    console = Console()
    table = Table(
        "GiB of one process", *moments, title=f"{options.phase} of {models.policy.weights / 1e9:.2f}B weights"
    )
    for part in dict.fromkeys(part for parts in moments.values() for part in parts):
        values = [parts.get(part, 0.0) / GIB for parts in moments.values()]
        if max(values) > 0.005:
            table.add_row(part, *(f"{value:.2f}" for value in values))
    table.add_section()
    table.add_row(
        f"with {SPARE:.0%} to spare", *(f"{sum(p.values()) * (1 + SPARE) / GIB:.2f}" for p in moments.values())
    )
    console.print(table)
    times = seconds(options, models, setup)
    console.print(f"A step of {options.batch_size} sequences: about {sum(times.values()):.1f} s ("
                  + ", ".join(f"{name} {value:.1f}" for name, value in times.items()) + ").")  # fmt: skip
    console.print(
        f"Assumed: matrix products at {options.efficiency:.0%} of an {options.gpu.upper()}'s bf16 peak, generation at "
        f"{options.bandwidth:.0%} of its bandwidth, all processes equally busy, no time for communication. The "
        "built-in sampler is slower than that on a GPU; an engine is not: docs/engine.md."
    )
    launch = f"torchrun --nproc-per-node {options.gpus} -m rlhf_fast" if options.gpus > 1 else "rlhf-fast"
    objective = f" --objective {options.objective}" if options.phase == "ppo" and options.objective != "ppo" else ""
    objective += "" if options.kl_coef is None or options.phase != "ppo" else f" --kl-coef {options.kl_coef:g}"
    flags = f"{objective} {setup.flags()}{_sizes(options, setup)}"
    console.print(f"{launch} {options.phase} --model {options.model}{flags}", soft_wrap=True)


def _sizes(options: PlanOptions, setup: Setup) -> str:
    """The planned lengths and batches as options of the phase."""
    dtype = "" if setup.nf4 else f" --dtype {options.dtype}"
    if options.phase == "ppo":
        length = options.prompt_length + options.max_new_tokens
        return f"{dtype} --max-length {length} --max-new-tokens {options.max_new_tokens} --epochs {options.epochs}"
    return f"{dtype} --max-length {options.prompt_length}"


def main(arguments: Sequence[str]) -> int:
    """Parse the options, plan, print; 1 if nothing fits."""
    import tyro

    options = tyro.cli(PlanOptions, args=list(arguments), prog="rlhf-fast plan")
    options.validate()
    if options.objective not in OBJECTIVES:
        raise UserError(f"objective must be one of {', '.join(OBJECTIVES)}, got {options.objective!r}")
    models = load(options)
    setup = choose(options, models)
    if setup is None:
        least = memory(options, models, Setup(options.gpus > 1, True, options.lora_rank or 32, False, 1))
        raise UserError(
            f"nothing fits into {options.gpus} x {options.gpu_memory:g} GiB: sharded, with adapters and recomputed "
            f"activations a process still takes {peak(least) / GIB:.1f} GiB; use more GPUs, shorter sequences, or a "
            "smaller --batch-size"
        )
    show(options, models, setup)
    return 0
