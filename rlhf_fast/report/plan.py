# SPDX-License-Identifier: Apache-2.0
"""`rlhf-fast plan --model M --gpus 8 --gpu-memory 80`: does it fit, with which options, and how long does it take."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rlhf_fast.errors import UserError, first_line
from rlhf_fast.models.footprint import Footprint
from rlhf_fast.models.loading import resolve_dtype
from rlhf_fast.trainer.rl.objectives import OBJECTIVES

from .estimate import GIB, SPARE, Models, PlanOptions, Setup, host_bytes, memory, peak, seconds, step_rows, wave_rows

WAVES = (1, 2, 4, 8)  # in which completions are sampled
NODE = 8  # most GPUs of a node


def choose(options: PlanOptions, models: Models) -> Setup | None:
    """The setup that fits and computes least beyond the model's own passes; None if nothing fits.

    Order: full weights before adapters before 4 bits; copies before shards; stored before recomputed activations; all
    completions at once before waves.
    """
    adapters = options.lora_rank or 32
    kinds = [(options.lora_rank, False), (adapters, False), (adapters, True)]
    rows = step_rows(options)
    for (rank, nf4), recompute, fsdp in itertools.product(kinds, (False, True), (False, True)):
        if fsdp and (options.gpus == 1 or nf4):  # 4-bit weights are not sharded
            continue
        for waves in WAVES if options.phase == "ppo" else WAVES[:1]:
            setups = [Setup(fsdp, recompute, rank, nf4, 2**k, waves) for k in range(rows.bit_length())]
            fit = [x for x in setups if peak(memory(options, models, x)) <= options.gpu_memory * GIB]
            # with fewer than four rows the weights are read more often than recomputing costs
            if fit and (recompute or fit[-1].micro_batch >= min(rows, 4)):
                return fit[-1]
    return None


def load(options: PlanOptions) -> Models:
    """Footprints of the models of a plan."""
    dtype = resolve_dtype(options.dtype)

    def both(name: str) -> tuple[Footprint, Footprint]:
        try:
            return Footprint.of(name, dtype), Footprint.of(name, dtype, options.lora_rank or 32)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the configuration of {name!r}: {first_line(error)}") from None

    policy, adapted = both(options.model)
    if policy.context is not None and options.length > policy.context:
        raise UserError(
            f"a sequence of {options.length} tokens is longer than the context of {options.model!r}, {policy.context}: "
            "lower prompt_length or max_new_tokens"
        )
    if options.phase != "ppo" or options.reward_model == "none":
        return Models(policy, adapted, None, None)
    return Models(policy, adapted, *(both(options.reward_model) if options.reward_model else (policy, adapted)))


def show(options: PlanOptions, models: Models, setup: Setup) -> None:
    """Print the memory by moment and part, the times, the assumptions and the launch line."""
    from rich.console import Console
    from rich.table import Table

    moments = memory(options, models, setup)
    console = Console()
    table = Table("GiB of one process", *moments, title=f"{options.phase} of {_number(models.policy.weights)} weights")
    for part in dict.fromkeys(part for parts in moments.values() for part in parts):
        values = [parts.get(part, 0.0) / GIB for parts in moments.values()]
        if max(values) > 0.005:
            table.add_row(part, *(f"{value:.2f}" for value in values))
    table.add_section()
    table.add_row(
        f"with {SPARE:.0%} to spare", *(f"{sum(p.values()) * (1 + SPARE) / GIB:.2f}" for p in moments.values())
    )
    console.print(table)
    if host := host_bytes(options, models, setup):
        console.print(f"And {host / GIB:.1f} GiB of pinned CPU memory for each process, for what is offloaded.")
    times = seconds(options, models, setup)
    console.print(f"A step of {options.batch_size} sequences: about {sum(times.values()):.1f} s ("
                  + ", ".join(f"{name} {value:.1f}" for name, value in times.items()) + ").")  # fmt: skip
    console.print(_assumed(options))
    launch, nodes = _launcher(options.gpus)
    if nodes > 1:
        console.print(
            f"On each of {nodes} nodes of {options.gpus // nodes} GPUs, with its own --node-rank, 0 to {nodes - 1}, "
            "and the address of the first for NODE0:"
        )
    objective = f" --objective {options.objective}" if options.phase == "ppo" and options.objective != "ppo" else ""
    objective += "" if options.kl_coef is None or options.phase != "ppo" else f" --kl-coef {options.kl_coef:g}"
    flags = f"{objective} {setup.flags()}{_saving(options, setup)}{_sizes(options, setup)}"
    console.print(f"{launch} {options.phase} --model {options.model}{flags}", soft_wrap=True)


def _assumed(options: PlanOptions) -> str:
    copies = options.optimizer == "adamw-offload" or options.activation_offloading
    host = f"copies to and from CPU memory at {options.host_bandwidth:g} GB/s, " if copies else ""
    return (
        f"Assumed: matrix products at {options.efficiency:.0%} of an {options.gpu.upper()}'s bf16 peak, generation at "
        f"{options.bandwidth:.0%} of its bandwidth, {host}all processes equally busy, no time for communication. The "
        "built-in sampler is slower than that on a GPU; an engine is not: docs/engine.md."
    )


def _launcher(gpus: int) -> tuple[str, int]:
    """The beginning of the launch line, and the number of nodes, which have eight GPUs or less."""
    if gpus == 1:
        return "rlhf-fast", 1
    each = max(n for n in range(1, NODE + 1) if gpus % n == 0)
    nodes = gpus // each
    several = f"--nnodes {nodes} --node-rank 0 " if nodes > 1 else ""
    first = " --master-addr NODE0 --master-port 29500" if nodes > 1 else ""
    return f"torchrun {several}--nproc-per-node {each}{first} -m rlhf_fast", nodes


def _number(weights: int) -> str:
    return f"{weights / 1e9:.2f}B" if weights >= 1e9 else f"{weights / 1e6:.1f}M"


def _saving(options: PlanOptions, setup: Setup) -> str:
    """What the plan was told to assume, as options of the phase."""
    words = "" if options.optimizer == "adamw" else f" --optimizer {options.optimizer}"
    words += " --activation-offloading" if options.activation_offloading else ""
    return words + (f" --fsdp-size {options.fsdp_size}" if setup.fsdp and options.fsdp_size else "")


def _sizes(options: PlanOptions, setup: Setup) -> str:
    """The planned lengths and batches as options of the phase."""
    words = [] if setup.waves == 1 else [f"--generation-batch-size {wave_rows(options, setup)}"]
    words += [] if setup.nf4 else [f"--dtype {options.dtype}"]
    words.append(f"--max-length {options.length}")
    prompts = options.batch_size // options.samples
    if options.phase != "ppo":
        words.append(f"--batch-size {prompts}")
    else:
        words += [f"--max-new-tokens {options.max_new_tokens}", f"--prompts-per-step {prompts}"]
        words.append(f"--epochs {options.epochs}")
        words += [f"--samples-per-prompt {options.samples}"] if not OBJECTIVES[options.objective].pairs else []
    return " " + " ".join(words)


def main(arguments: Sequence[str]) -> int:
    """Parse the options, plan, print; 1 if nothing fits."""
    import tyro

    options = tyro.cli(PlanOptions, args=list(arguments), prog="rlhf-fast plan")
    options.validate()
    models = load(options)
    setup = choose(options, models)
    if setup is None:
        rank = options.lora_rank or 32
        least = {"in 4 bits": Setup(False, True, rank, True, waves=WAVES[-1])}
        least |= {"sharded": Setup(True, True, rank, waves=WAVES[-1])} if options.gpus > 1 else {}
        size, how = min((peak(memory(options, models, setup)) / GIB, name) for name, setup in least.items())
        raise UserError(
            f"nothing fits into {options.gpus} x {options.gpu_memory:g} GiB: {how}, with adapters and recomputed "
            f"activations a process still takes {size:.1f} GiB; use more GPUs, shorter sequences, or a smaller "
            "--batch-size"
        )
    show(options, models, setup)
    return 0
