# SPDX-License-Identifier: Apache-2.0
"""What a step of a phase takes: bytes by moment and part, seconds by part. Arithmetic on `models/footprint.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from rlhf_fast.errors import UserError
from rlhf_fast.models.footprint import Footprint
from rlhf_fast.models.optimizers import PORTION, pinned_bytes, state_bytes
from rlhf_fast.models.prefix_sharing import WORTH_IT
from rlhf_fast.run.options import NAME, NOT_NEGATIVE, POSITIVE, PROBABILITY, OptimizerKind, Options, check_groups
from rlhf_fast.trainer.rl.config import COMMON_DEFAULTS
from rlhf_fast.trainer.rl.objectives import OBJECTIVES

GIB = 2**30
# Bytes of logits that the fused head holds at most, and of its scratch; `ops/linear/tiles.py`.
LOGITS = {"cuda": 2**31, "cpu": 2**29}
TILE = {"cuda": 2**28, "cpu": 2**24}
POLICY_LOGITS = {"cuda": 2**31, "cpu": 48 * 2**20}  # of a policy loss, which keeps none
PAIR = 2  # completions of a prompt for the reward model and DPO
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
    samples_per_prompt: Annotated[int, POSITIVE] = 4
    """Completions of a prompt, for ppo; two for its objective dpo and for reward."""
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
    """Tokens of a prompt, in the mean; of a whole example for sft."""
    max_new_tokens: Annotated[int, POSITIVE] = 512
    """Tokens of a completion, for ppo and reward."""
    batch_size: Annotated[int, POSITIVE] = 64
    """Sequences of a step, of all processes together; for reward and dpo two for each pair."""
    epochs: Annotated[int, POSITIVE] = 1
    """Passes over a step's samples, for ppo."""
    lora_rank: Annotated[int, NOT_NEGATIVE] = 0
    """Plan with adapters of this rank; 0: full weights, and adapters of rank 32 if nothing else fits."""
    optimizer: OptimizerKind = "adamw"
    """The run's option of this name; the other two take less of the GPU."""
    activation_offloading: bool = False
    """The run's option of this name."""
    fsdp_size: Annotated[int, NOT_NEGATIVE] = 0
    """The run's option of this name: GPUs that share a copy, if models are sharded; 0: all."""
    efficiency: Annotated[float, PROBABILITY] = 0.4
    """Share of the GPU's operations that matrix products reach."""
    bandwidth: Annotated[float, PROBABILITY] = 0.6
    """Share of its bandwidth that generation reaches."""
    host_bandwidth: Annotated[float, POSITIVE] = 20.0
    """GB/s between a GPU's memory and the CPU's, for what is offloaded, per process."""

    @property
    def samples(self) -> int:
        """Sequences of one prompt."""
        if self.phase == "reward" or (self.phase == "ppo" and OBJECTIVES[self.objective].pairs):
            return PAIR
        return self.samples_per_prompt if self.phase == "ppo" else 1

    @property
    def completion(self) -> int:
        """Tokens of a completion beside those of `prompt_length`."""
        return 0 if self.phase == "sft" else self.max_new_tokens

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.prompt_length + self.completion

    def validate(self) -> None:
        """Raise UserError if an option is out of its range, or the batch cannot be divided."""
        super().validate()
        check_groups(self.fsdp_size, self.gpus)
        if self.objective not in OBJECTIVES:
            raise UserError(f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        unit = self.samples * (1 if self.phase == "reward" else self.gpus)
        if self.batch_size % unit:
            more = unit * -(-self.batch_size // unit)
            raise UserError(
                f"batch_size must be a multiple of {unit}, so that each process gets equally many prompts with "
                f"{self.samples} sequences each; got {self.batch_size}, try {more}"
            )


class Setup(NamedTuple):
    """What the plan may choose."""

    fsdp: bool = False
    gradient_checkpointing: bool = False
    lora_rank: int = 0
    nf4: bool = False
    micro_batch: int = 1
    waves: int = 1  # in which completions are sampled

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


def step_rows(options: PlanOptions) -> int:
    """Sequences of one process in one optimizer step."""
    rows = -(-options.batch_size // options.gpus)
    return -(-rows // _minibatches(options))


def _minibatches(options: PlanOptions) -> int:
    """Optimizer steps of an epoch of a step."""
    if options.phase != "ppo":
        return 1
    usual = OBJECTIVES[options.objective].defaults.get("num_minibatches", COMMON_DEFAULTS["num_minibatches"])
    return math.gcd(usual, options.batch_size)


def wave_rows(options: PlanOptions, setup: Setup) -> int:
    """Completions that a process samples at once."""
    return -(-options.batch_size // (options.gpus * setup.waves))


def pass_tokens(options: PlanOptions, rows: int) -> int:
    """Tokens of a pass over so many sequences of an optimizer step, a shared prompt once where that is worth it.

    Minibatches of single rows split a prompt's samples evenly, in the mean.
    """
    whole = rows * options.length
    split = 1 if options.samples == PAIR else -(-options.batch_size // options.gpus) // step_rows(options)
    together = max(1, options.samples // split)
    shared = rows * options.completion + -(-rows // together) * options.prompt_length
    return shared if shared <= WORTH_IT * whole else whole


def micro_batch_rows(options: PlanOptions, setup: Setup) -> int:
    """Sequences in a pass of the update; a pair stays together."""
    return min(max(setup.micro_batch, PAIR if options.samples == PAIR else 1), step_rows(options))


def memory(options: PlanOptions, models: Models, setup: Setup, device: str = "cuda") -> Memory:
    """Bytes of each part of a process at each moment of a step.

    Gradients of several micro-batches are there while the next one's activations are. Those of a single one replace its
    activations layer by layer, so the update is one moment and the optimizer's step another.
    """
    policy, critic = trained_models(options, models, setup)
    always = _always(options, models, setup)
    moments: Memory = {}
    if setup.fsdp:  # loaded whole, in float32 by SFT, before it is sharded
        whole = policy.weights * (4.0 if options.phase == "sft" and not setup.lora_rank else policy.width)
        others = {name: size for name, size in always.items() if not name.startswith("policy")}
        moments["load"] = {**others, "policy weights": whole}
    if options.phase == "ppo":
        gathered = float(policy.weights * policy.width) if setup.fsdp and not setup.nf4 else 0.0
        cache = policy.cache_per_token * options.length * wave_rows(options, setup)
        moments["sample"] = {**always, "KV cache": float(cache), "gathered": gathered}
    several = options.gpus > 1 or step_rows(options) > micro_batch_rows(options, setup)
    learners = {"": policy} if critic is None else {" policy": policy, " critic": critic}
    for name, model in learners.items():
        used = _pass(model, options, setup)
        if options.phase == "sft" and setup.lora_rank:
            used["activations"] = (used["activations"] + _pass(models.policy, options, setup)["activations"]) / 2
        if model is policy and name != " critic" and options.phase != "reward":
            used["head"] = _head(model, options, setup, device)
        gradients = _gradients(model, options, setup, several)
        moments[f"update{name}"] = {**always, **used, **(gradients if several else {})}
        if not several or options.optimizer == "adamw-offload":
            moments[f"step{name}"] = {**always, **gradients, **_stepped(model, options, setup)}
    return moments


def trained_models(options: PlanOptions, models: Models, setup: Setup) -> tuple[Footprint, Footprint | None]:
    """The policy (or the one model of SFT and reward), and the critic if there is one."""
    policy = models.adapted if setup.lora_rank else models.policy
    if options.phase != "ppo" or not OBJECTIVES[options.objective].critic:
        return policy, None
    return policy, (models.reward_adapted if setup.lora_rank else models.reward) or policy


def _always(options: PlanOptions, models: Models, setup: Setup) -> dict[str, float]:
    """What stays in memory."""
    policy, critic = trained_models(options, models, setup)
    always = {"libraries": float(BASE), **_trained("policy", policy, options, setup)}
    if critic is not None:
        always |= _trained("critic", critic, options, setup)
    if options.phase == "ppo":
        if not setup.lora_rank and has_reference(options):
            always["reference weights"] = _weights(policy, options, setup._replace(nf4=False))
        if models.reward is not None:
            always["reward model weights"] = _weights(models.reward, options, setup._replace(nf4=False))
    return always


def has_reference(options: PlanOptions) -> bool:
    """Whether the steps read a reference model."""
    objective = OBJECTIVES[options.objective]
    usual = objective.defaults.get("kl_coef", COMMON_DEFAULTS["kl_coef"])
    return objective.pairs or (usual if options.kl_coef is None else options.kl_coef) > 0


def _weights(model: Footprint, options: PlanOptions, setup: Setup) -> float:
    """Of one copy, or of this process' share of it; SFT keeps float32 weights."""
    adapters = model.trained if model.trained < model.weights else 0  # float32, on every process
    bytes_ = float((model.weights - adapters) * (4 if _casts(model, options, setup) else model.width))
    if setup.nf4:
        bytes_ -= model.linear * (model.width - NF4)
    return bytes_ / (_group(options) if setup.fsdp else 1) + 4.0 * adapters


def _casts(model: Footprint, options: PlanOptions, setup: Setup) -> bool:
    """Whether float32 weights are cast to bfloat16 where they are used (autocast)."""
    return options.phase == "sft" and not setup.lora_rank and model.width == 2


def _trained(name: str, model: Footprint, options: PlanOptions, setup: Setup) -> dict[str, float]:
    """Weights, and the two moments and (of full bfloat16 ones) the float32 master of each trained one."""
    optimizer, _ = _state(model, options, setup)
    return {f"{name} weights": _weights(model, options, setup), f"{name} optimizer": optimizer}


def _state(model: Footprint, options: PlanOptions, setup: Setup) -> tuple[float, float]:
    """Of the optimizer, on the GPU and in CPU memory."""
    return state_bytes(options.optimizer, model.trained / _shares(options, setup), _has_master(model, options, setup))


def _has_master(model: Footprint, options: PlanOptions, setup: Setup) -> bool:
    return model.width == 2 and options.phase != "sft" and not setup.lora_rank


def _stepped(model: Footprint, options: PlanOptions, setup: Setup) -> dict[str, float]:
    """What an offloaded optimizer has on the GPU while it steps."""
    own = model.trained / _shares(options, setup)
    portion = min(1.0, max(PORTION, model.largest_weight / _shares(options, setup)) / own)
    return {"state of a portion": _state(model, options, setup)[1] * portion}


def host_bytes(options: PlanOptions, models: Models, setup: Setup) -> float:
    """Pinned CPU memory that a process needs for what the options keep there."""
    trained = [model for model in trained_models(options, models, setup) if model is not None]
    state = sum(_pinned_state(model, options, setup) for model in trained)
    if not options.activation_offloading:
        return state
    tokens = pass_tokens(options, micro_batch_rows(options, setup))
    kept = (model.offloaded(1, tokens, setup.gradient_checkpointing)[1] for model in trained)
    return state + max(sum(map(pinned_bytes, sizes)) for sizes in kept)


def _pinned_state(model: Footprint, options: PlanOptions, setup: Setup) -> float:
    """Of an offloaded optimizer: a tensor for each moment, and master, of each weight or of this process' rows."""
    shares = _shares(options, setup)
    tensors = state_bytes(options.optimizer, 1, _has_master(model, options, setup))[1] / 4
    trained = (p if p.dim() else p[None] for p in model.model.parameters() if p.requires_grad)
    return tensors * sum(pinned_bytes(4 * -(-len(p) // shares) * p[0].numel()) for p in trained)


def _group(options: PlanOptions) -> int:
    """Processes that share a copy of sharded models."""
    return options.fsdp_size or options.gpus


def _shares(options: PlanOptions, setup: Setup) -> int:
    """Processes that share the trained weights; adapters are copied."""
    return _group(options) if setup.fsdp and not setup.lora_rank else 1


def _gradients(model: Footprint, options: PlanOptions, setup: Setup, several: bool) -> dict[str, float]:
    """Of one model. Those of one process' single micro-batch stay in the weights' dtype."""
    full_sft = options.phase == "sft" and not setup.lora_rank
    width = 4.0 if several or full_sft or setup.lora_rank else float(model.width)
    buckets = 4.0 * model.trained if options.phase == "sft" and options.gpus > 1 and not setup.fsdp else 0.0
    shares = _shares(options, setup)
    return {"gradients": model.trained * width / shares, "buckets of DistributedDataParallel": buckets}


def _pass(model: Footprint, options: PlanOptions, setup: Setup) -> dict[str, float]:
    """What a micro-batch adds.

    Adapters keep a float32 copy of their input; under autocast, in SFT, a bfloat16 copy of that.
    """
    width = 4.0 if options.phase == "sft" and not setup.lora_rank else float(model.width)
    layers = 2.0 * model.largest_layer * width if setup.fsdp else 0.0  # one in use, one on its way
    tokens = pass_tokens(options, micro_batch_rows(options, setup))
    kept = model.saved(1, tokens, setup.gradient_checkpointing)
    if options.activation_offloading:
        kept, _ = model.offloaded(1, tokens, setup.gradient_checkpointing)
    return {
        "activations": float(kept),
        "weights in autocast's dtype": _cast_weights(model, options, setup),
        "gathered": layers + (model.head * width if setup.fsdp else 0.0),
    }


def _cast_weights(model: Footprint, options: PlanOptions, setup: Setup) -> float:
    """The copy that autocast makes, of all weights also if these are sharded: it is there when a forward ends."""
    return float(model.weights * model.width) if _casts(model, options, setup) else 0.0


def _head(model: Footprint, options: PlanOptions, setup: Setup, device: str) -> float:
    """Logits of the fused head, its scratch, and the float32 sum of its gradient."""
    learned = micro_batch_rows(options, setup) * (options.completion or options.prompt_length)
    logits = 4.0 * learned * model.vocabulary
    keeps = options.phase == "sft" or OBJECTIVES[options.objective].pairs
    held = min(logits, LOGITS[device]) + min(logits, TILE[device]) if keeps else min(logits, POLICY_LOGITS[device])
    return held + (0.0 if setup.lora_rank else 4.0 * model.head)


def peak(moments: Memory) -> float:
    """The largest sum of a moment, with the spare share."""
    return max(sum(parts.values()) for parts in moments.values()) * (1 + SPARE)


def seconds(options: PlanOptions, models: Models, setup: Setup) -> dict[str, float]:
    """Of each part of a step; a pass is bound by its operations, a generated token by reading the weights."""
    operations, bytes_ = GPUS[options.gpu]
    operations, bytes_ = operations * options.efficiency, bytes_ * options.bandwidth
    rows = -(-options.batch_size // options.gpus)
    policy, ppo = models.policy, options.phase == "ppo"
    tokens = pass_tokens(options, rows)
    forward = policy.flops_per_token(options.length) * tokens / operations
    update = (FORWARD + BACKWARD + (FORWARD if setup.gradient_checkpointing else 0)) * forward
    transfers = _transfers(options, models, setup)
    if not ppo:
        return {"update": update, **transfers}
    context = options.prompt_length + options.max_new_tokens / 2  # in the mean, while a completion grows
    wave = wave_rows(options, setup)
    read = (_weights(policy, options, Setup(nf4=setup.nf4)) + policy.cache_per_token * context * wave) / bytes_
    token = setup.waves * max(read, policy.flops_per_token(options.length) * wave / operations)
    prompts = rows / options.samples * options.prompt_length
    parts = {"sample": options.max_new_tokens * token + forward * prompts / tokens}
    critic = OBJECTIVES[options.objective].critic
    passes = has_reference(options) + (options.epochs > 1 or critic)
    parts["old and reference log-probabilities"] = forward * passes
    score = (models.reward or policy).flops_per_token(options.length) * tokens / operations
    if models.reward is not None:
        parts["scores"] = score
    if critic:
        parts["values and critic"] = score * (1 + 3 * options.epochs)
    parts["update"] = update * options.epochs
    return parts | transfers


def _transfers(options: PlanOptions, models: Models, setup: Setup) -> dict[str, float]:
    """What is offloaded goes to CPU memory and back; nothing is computed meanwhile."""
    trained = [model for model in trained_models(options, models, setup) if model is not None]
    passes = options.epochs if options.phase == "ppo" else 1
    state = passes * _minibatches(options) * sum(_state(model, options, setup)[1] for model in trained)
    tokens = pass_tokens(options, -(-options.batch_size // options.gpus))
    kept = sum(sum(model.offloaded(1, tokens, setup.gradient_checkpointing)[1]) for model in trained)
    sizes = {
        "optimizer state over PCIe": state,
        "activations over PCIe": float(passes * kept * options.activation_offloading),
    }
    return {name: 2 * size / (options.host_bandwidth * 1e9) for name, size in sizes.items() if size}
