# SPDX-License-Identifier: Apache-2.0
"""Phase 1: supervised fine-tuning on demonstrations, on `transformers.Trainer`.

The loss is the mean negative log-likelihood of a completion's tokens, the end-of-sequence token included,
which is how the model learns to stop; prompt tokens are context only. Full logits are never computed: the trunk's
hidden states at the predicting positions go to `rf.linear_token_logprobs`. The mean is over the real tokens
of the whole optimizer step, so the result depends neither on how the step is split into micro-batches nor on packing.

Weights and optimizer stay in float32 while learning; with dtype bfloat16 the matmuls run in it (autocast),
and the model is written in it at the end.
"""

import math
from collections.abc import Sequence
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.data.encoding import end_of_turn
from rlhf_fast.data.examples import read_sft
from rlhf_fast.data.limits import Limits
from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.errors import Interrupted, UserError
from rlhf_fast.models.activations import set_up_activations
from rlhf_fast.models.adapters import save_adapters
from rlhf_fast.models.batches import MicroBatch, in_groups
from rlhf_fast.models.dropout import switch_on_dropout
from rlhf_fast.models.fsdp import pad_to_ranks
from rlhf_fast.models.loading import (
    device,
    fit_padding,
    load_causal_lm,
    load_tokenizer,
    parameter_count,
    reading_limits,
    resolve_dtype,
)
from rlhf_fast.models.lora import add_lora, merged
from rlhf_fast.models.qlora import as_adapted
from rlhf_fast.run.autosave import Autosave, SaveOptions
from rlhf_fast.run.checkpoint import require_space, seed_everything
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.run.progress import StopFlag, Timer
from rlhf_fast.run.resume import finished_summary
from rlhf_fast.run.runtime import tune_process

from .config import SFTConfig
from .labels import encode
from .packing import (
    IGNORED,
    Example,
    check_packing,
    collate,
    completion_logprobs,
    pack,
    packed_width,
    to_device,
)


def train_sft(config: SFTConfig, run: RunFolder) -> dict[str, Any]:
    """Fine-tune `config.model` on `config.train_file` into `run`'s folder `model/`; returns the summary.

    Raises UserError for bad data or a model that does not fit it, Interrupted after a Ctrl-C that was saved.
    """
    config.validate()
    if (finished := finished_summary(run, config)) is not None:
        return finished
    timer = Timer()
    demonstrations = read_sft(config.train_file, config.strict)
    held_out = read_sft(config.eval_file, config.strict) if config.eval_file else []
    seed_everything(config.seed)
    tune_process()
    dtype = resolve_dtype(config.dtype)
    with timer("load"):
        tokenizer = load_tokenizer(config.model, config.trust_remote_code)
        frozen = config.load_in_4bit or config.lora_rank > 0
        weight_dtype = dtype if frozen else torch.float32  # frozen weights need no float32
        model = load_causal_lm(config.model, weight_dtype, config.trust_remote_code, config.load_in_4bit)
        adapters = add_lora(model, config.lora_rank) if config.lora_rank else None
    require_space(run.path, parameter_count(model), config.save_steps)
    fit_padding(tokenizer, model)
    limits = reading_limits(model, Limits(config.max_length, config.overlong, config.strict))
    examples = encode(tokenizer, demonstrations, limits, config.turns, config.train_file)
    eval_examples = encode(tokenizer, held_out, limits, config.turns, config.eval_file or "")
    run.save_config(config)

    with timer("evaluate"):
        most = MicroBatch.of(config)
        before = evaluate(model, eval_examples, tokenizer.pad_token_id, most, dtype)
    if run.latest_checkpoint() is None and eval_examples:
        run.truncate_metrics(-1)
        run.log({"eval/nll": before}, 0)
    with timer("train"):
        steps = _train(config, run, model, tokenizer, Data(examples, eval_examples), dtype, timer)
    with timer("evaluate"):
        after = evaluate(model, eval_examples, tokenizer.pad_token_id, most, dtype)
    with timer("save"):
        if adapters is not None:
            save_adapters(adapters, run)
            model = merged(adapters)
        _end_with(model, end_of_turn(tokenizer), tokenizer.eos_token_id)
        run.save_model(model.to(dtype), tokenizer)

    summary = {
        "steps": steps,
        "demonstrations": len(examples),
        "loss_before": before if eval_examples else None,
        "loss_after": after if eval_examples else None,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": timer.elapsed(),
        "seconds_by_part": timer.parts(),
    }
    if eval_examples:
        run.log({"eval/nll": after}, steps)
    run.finish(summary)
    return summary


def _end_with(model: Any, *ends: int) -> None:
    """Set the saved model's generation config to stop at the tokens that end the learned answers."""
    if (generation := getattr(model, "generation_config", None)) is not None:
        listed = generation.eos_token_id
        before = listed if isinstance(listed, list) else [listed] * (listed is not None)
        generation.eos_token_id = list(dict.fromkeys([*before, *ends]))


@torch.no_grad()
def evaluate(model: Any, examples: Sequence[Example], pad_id: int, most: MicroBatch, dtype: torch.dtype) -> float:
    """Mean negative log-likelihood, in nats per completion token; NaN without examples. Ranks share the work."""
    model.eval()
    total, tokens = 0.0, 0.0
    groups = in_groups([(1, len(example["input_ids"])) for example in examples], most)
    batches = [[examples[i] for i in group] for group in groups]
    for part in pad_to_ranks(batches[ranks().index :: ranks().count], model, []):
        batch = to_device(collate(part or examples[:1], pad_id))  # other ranks may need this rank's shards
        with torch.autocast(device().type, dtype, enabled=dtype != torch.float32):
            logprobs = completion_logprobs(model, batch)
        if part:
            total -= float(logprobs.sum(dtype=torch.float64))
            tokens += int((batch["labels"] != IGNORED).sum())
    total, tokens = ranks().total([total, tokens])
    return total / tokens if tokens else math.nan


class Data(NamedTuple):
    """Training and held-out examples."""

    train: list[Example]
    held_out: list[Example]


def _train(
    config: SFTConfig, run: RunFolder, model: Any, tokenizer: Any, data: Data, dtype: torch.dtype, timer: Timer
) -> int:
    """Run the Trainer over `data`, changing `model` in place; returns the number of optimizer steps.

    Checkpoints hold what `timer` has counted.
    """
    from transformers import PrinterCallback

    from .hf_trainer import Bridge, Evaluation, SumTrainer

    if config.dropout:
        switch_on_dropout(model)
    set_up_activations(model, config.gradient_checkpointing, config.activation_offloading)
    model.forward = MethodType(negative_log_likelihood, model)  # what DDP and FSDP call, in autocast
    width, pad_id = packed_width(model, config.max_length), tokenizer.pad_token_id
    if config.packing:
        check_packing(model.eval(), data.train, pad_id)

    def gather(batch: list[Example]) -> dict[str, Tensor]:
        return pack(batch, pad_id, width) if config.packing else collate(batch, pad_id)

    with StopFlag() as stop:
        with as_adapted(model):
            trainer = SumTrainer(
                model=model,
                args=_arguments(config, run, model, dtype, max(len(example["input_ids"]) for example in data.train)),
                train_dataset=data.train,  # type: ignore[arg-type]  # a list is all that its DataLoader needs
                data_collator=gather,
            )
        trainer.fsdp, trainer.fsdp_size, trainer.kind = config.fsdp, config.fsdp_size, config.optimizer
        trainer.timer = timer
        if trainer.args.n_gpu > 1:
            raise UserError("start one process a GPU: accelerate launch -m rlhf_fast ..., or set CUDA_VISIBLE_DEVICES")
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise UserError("launch without FSDP and DeepSpeed: --fsdp is what shards a model over the processes")
        trainer.remove_callback(PrinterCallback)

        def save(step: int) -> None:
            trainer._save_checkpoint(model, None)
            bridge.on_save(trainer.args, trainer.state, trainer.control)

        autosave = Autosave(run, SaveOptions.of(config), [model], 0, save)
        trainer.add_callback(bridge := Bridge(run, stop, autosave, trainer))
        if config.eval_steps and data.held_out:
            most = MicroBatch.of(config)
            held_out = partial(evaluate, model, data.held_out, pad_id, most, dtype)
            trainer.add_callback(Evaluation(run, config.eval_steps, held_out))
        checkpoint = run.latest_checkpoint()
        try:
            with autosave:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            bridge.close()
            del model.forward
        run.stop_requested = stop.requested
        if ranks().any(stop.requested) and trainer.state.global_step < trainer.state.max_steps:
            raise Interrupted(f"SFT stopped at step {trainer.state.global_step}; --resume goes on from there")
    return int(trainer.state.global_step)


def negative_log_likelihood(model: Any, **inputs: Tensor) -> dict[str, Tensor]:
    """Replaces the model's forward in training: the loss summed over the labelled tokens, without logits."""
    return {"loss": -completion_logprobs(model, inputs).sum()}


def _arguments(config: SFTConfig, run: RunFolder, model: Any, dtype: torch.dtype, longest: int) -> Any:
    """Our options as TrainingArguments; the Trainer's own printing, progress bar and uploads are off.

    Its micro-batches have equally many rows, so a budget of tokens is kept for examples of the `longest` length.
    """
    from transformers import TrainingArguments

    share = ranks().share(config.batch_size, "batch_size")
    own = share.stop - share.start
    most = min(config.micro_batch_size, (config.micro_batch_tokens or own * longest) // longest)
    micro = max(n for n in range(1, own + 1) if own % n == 0 and n <= max(1, most))
    return TrainingArguments(
        output_dir=str(run.path / "checkpoints"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=own // micro,
        ddp_find_unused_parameters=False,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.lr,
        lr_scheduler_type="constant_with_warmup" if config.lr_schedule == "constant" else config.lr_schedule,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=dtype == torch.bfloat16,
        seed=config.seed,
        save_strategy="no",  # Autosave decides when
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device().type == "cuda",
        use_cpu=device().type == "cpu",
        use_cache=getattr(model.config, "use_cache", True),  # the Trainer writes it into the model's configuration
    )
