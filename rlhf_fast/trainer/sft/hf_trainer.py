# SPDX-License-Identifier: Apache-2.0
"""`transformers.Trainer` in a run folder: a loss over tokens, our metrics, checkpoints without pickles."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback

from rlhf_fast.distributed.dtensors import local_shard, shard_like
from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.errors import UserError
from rlhf_fast.models.fsdp import is_sharded, shard_size, sharded
from rlhf_fast.models.moments import restore_moments, saved_moments
from rlhf_fast.models.optimizers import Pairs, over_shards
from rlhf_fast.run.autosave import Autosave
from rlhf_fast.run.checkpoint import (
    Parts,
    load_state,
    put_in_place,
    remove_old_checkpoints,
    rng_state,
    save_state,
    set_rng_state,
    write_checksums,
)
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.run.options import OptimizerKind
from rlhf_fast.run.progress import Progress, StopFlag, Timer
from rlhf_fast.run.records import read_jsonl
from rlhf_fast.run.threads import threads
from rlhf_fast.run.verdicts import LiveVerdict, of_sft


class SumTrainer(Trainer):
    """A Trainer for models whose forward returns the loss summed over tokens; saves by `save_state`, not pickle."""

    kind: OptimizerKind = "adamw"
    pairs: Pairs = ()  # weights, and what the optimizer steps for each of them
    fsdp_size = 0
    fsdp = False  # True shards the model over the ranks, by FSDP as we use it; accelerate has none for CPUs
    shards: Mapping[str, Tensor] = MappingProxyType({})  # of the checkpoint whose other files have just been written
    timer: Timer | None = None  # of the phase
    rng: Mapping[str, Any] | None = None  # when the last step ended: one that fails has drawn numbers, for dropout

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean loss over all tokens of the optimizer step."""
        # The Trainer counts the labels of the optimizer step on all ranks. Engines average over ranks.
        assert num_items_in_batch is not None
        count = self.accelerator.num_processes
        with self.accelerator.autocast():
            loss = model(**inputs)["loss"] / num_items_in_batch
        # We sum gradients over ranks; the Trainer logs the average of what the ranks return here.
        return loss + (count - 1) * loss.detach() if is_sharded(model) else loss * count

    def create_optimizer(self, model: Any = None) -> Any:
        """Shard the model first if `fsdp`, with its adapters, and FSDP sums all gradients; accelerate leaves it so."""
        if self.fsdp and not is_sharded(self.model):
            sharded(self.model, True, self.fsdp_size)._is_accelerate_prepared = True
        assert self.model is not None
        decayed = set(self.get_decay_parameter_names(self.model))
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        groups = [
            {
                "params": [p for name, p in trained if (name in decayed) == decay],
                "weight_decay": self.args.weight_decay * decay,
            }
            for decay in (True, False)
        ]
        args = self.args
        adam = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        self.optimizer, self.pairs = over_shards(self.kind, groups, weight_decay=args.weight_decay, **adam)
        return self.optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model of a checkpoint; what is trained of a sharded one is saved with the optimizer."""
        if not is_sharded(self.model) and self.args.should_save:
            self._save(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if any(Path(resume_from_checkpoint).glob("model*.safetensors")):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self.lr_scheduler is not None and self.model is not None
        state = {"moments": saved_moments(self._inner(), self.pairs), "scheduler": self.lr_scheduler.state_dict()}
        if self.timer is not None:
            state["timer"] = self.timer.state()
        if is_sharded(self.model):
            state["weights"] = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        parts = Parts.of(state)
        self.shards = parts.shards
        if self.args.should_save:
            save_state(output_dir, parts)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            assert self.optimizer is not None and self.lr_scheduler is not None and self.model is not None
            state = load_state(checkpoint, "moments", "scheduler", shard_size=shard_size(self.model))
            restore_moments(self._inner(), self.pairs, state["moments"])
            if self.timer is not None:
                self.timer.resume(state.get("timer"))
            lrs = self.lr_scheduler.base_lrs  # from the options, which may have changed
            for name, saved in state.get("weights", {}).items():
                weight = self.model.get_parameter(name)
                local_shard(weight.detach()).copy_(local_shard(shard_like(saved, weight)))
            self.lr_scheduler.load_state_dict({**state["scheduler"], "base_lrs": lrs})
            schedule: Any = self.lr_scheduler
            for group, lr, factor in zip(self.optimizer.param_groups, lrs, schedule.lr_lambdas, strict=True):
                group["lr"] = lr * factor(schedule.last_epoch)

    def _inner(self) -> Any:
        """The optimizer inside of accelerate's."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _save_rng_state(self, output_dir: str) -> None:
        save_state(Path(output_dir) / f"rng-{ranks().index}", dict(self.rng or rng_state()))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and (folder := Path(checkpoint) / f"rng-{ranks().index}").exists():
            set_rng_state(load_state(folder))


class Bridge(TrainerCallback):
    """Connects the Trainer to the run folder: metrics, progress bar, stop signal, names of checkpoints."""

    def __init__(self, run: RunFolder, stop: StopFlag, autosave: Autosave, trainer: SumTrainer) -> None:
        """The bar is created when training begins."""
        self.run, self.stop, self.autosave, self.trainer = run, stop, autosave, trainer
        self.bar: Progress | None = None
        self.verdict = LiveVerdict(of_sft)

    def close(self) -> None:
        """Close the progress bar, whatever ended the training."""
        if self.bar is not None:
            self.bar.__exit__(None, None, None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove metrics that will be logged again, and checkpoints that a kill left incomplete."""
        self._end_step(state.global_step)
        self.run.truncate_metrics(state.global_step)
        for unfinished in (self.run.path / "checkpoints").glob("checkpoint-*") if ranks().main else ():
            shutil.rmtree(unfinished)
        ranks().wait()
        self.verdict = LiveVerdict(of_sft, read_jsonl(self.run.path / "metrics.jsonl"))
        self.bar = Progress("sft", state.max_steps).__enter__()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From here to the step's metrics nothing can be saved."""
        self.autosave.begin_change()

    def _end_step(self, step: int) -> None:
        self.autosave.end_change(step)
        self.trainer.rng = rng_state()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Log a row of metrics, with which a step ends."""
        if not logs or "loss" not in logs:
            return  # the Trainer's own closing summary
        if not math.isfinite(logs["loss"]):
            raise UserError(f"the SFT loss is {logs['loss']} at step {state.global_step}; lower lr")
        row = {"loss": logs["loss"], "lr": logs["learning_rate"], "grad_norm": logs["grad_norm"]}
        self.run.log(row, state.global_step)
        self._end_step(state.global_step)
        if self.bar is not None:
            self.bar.update(state.global_step, self.verdict.after(row), loss=logs["loss"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide whether to save, and stop all ranks if one was asked to."""
        threads().fit()
        save, stop = self.autosave.due(state.global_step, self.stop.requested)
        control.should_save |= save or (state.global_step >= state.max_steps and self.autosave.keeps_last())
        control.should_training_stop |= stop
        if control.should_save:
            self.autosave.check_finite(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the shards, if any, and rename the checkpoint to step-N; resume ignores it before."""
        written = self.run.path / "checkpoints" / f"checkpoint-{state.global_step}"
        final = written.with_name(f"step-{state.global_step}")  # now: `state` changes while the shards are written

        def publish() -> None:
            if ranks().main:
                (written / "training_args.bin").unlink(missing_ok=True)  # a pickle; nothing reads it
                write_checksums(written)
                put_in_place(written, final)
                remove_old_checkpoints(self.run.path, self.run.keep)

        ranks().wait()
        if shards := self.trainer.shards:
            self.trainer.shards = {}
            self.run.shard_writer.start(written, shards, publish)
            return
        publish()
        ranks().wait()


class Evaluation(TrainerCallback):
    """The loss on the held-out demonstrations every few steps."""

    def __init__(self, run: RunFolder, every: int, loss: Callable[[], float]) -> None:
        """`loss` leaves the model in eval mode; the Trainer's next step puts it into training mode."""
        self.run, self.every, self.loss = run, every, loss

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate the step that a run resumes from, if it ended by an error of that evaluation."""
        if state.global_step and ranks().once(lambda: not self._is_done(state.global_step)):
            self._evaluate(state)

    def _is_done(self, step: int) -> bool:
        rows = read_jsonl(self.run.path / "metrics.jsonl")
        return any(row.get("step") == step and "eval/nll" in row for row in rows)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Evaluate once the step's own metrics are logged."""
        if logs and "loss" in logs:
            self._evaluate(state)

    def _evaluate(self, state: Any) -> None:
        """The last step is followed by an evaluation in any case."""
        if state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self.run.log({"eval/nll": self.loss()}, state.global_step)
