# SPDX-License-Identifier: Apache-2.0
"""One step ahead: while a step learns, a server samples the completions of the next one (Noukhovitch et al. 2024,
"Asynchronous RLHF", arXiv 2410.18252).

With W(n) the weights after n updates, and one row a process:

    server   | samples of 1, by W(0) | samples of 2, by W(1) | ...
    trainer  | update 0: W(0) -> W(1)| update 1: W(1) -> W(2)| ...

So the samples of step n > 0 are from W(n - 1), and those of step 0 from W(0). Their old log-probabilities are those of
W(n), where the update of step n begins; `rollout/mismatch.py` weights them by p_W(n) / p_W(n-1), of which the second is
what the engine returned.

A checkpoint after n steps holds the samples of step n, so a resumed run learns from the same ones. Only if the server
was lost before it had given them are they sampled again, then by W(n).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.errors import UserError
from rlhf_fast.models.batches import Support
from rlhf_fast.rollout.engine import EngineError, EngineSampler, Pending
from rlhf_fast.rollout.rollout import Rollout, Sampler
from rlhf_fast.run.progress import notice

Call = Callable[[Callable[..., Any], int, int], Any]  # (method of the sampler, step, place): `sample.call`
FIELDS = ("input_ids", "attention_mask", "response_mask", "texts", "ended", "support", "logprobs", "steps_behind")


class Key(NamedTuple):
    """What a batch was sampled for."""

    step: int
    place: int  # of its first prompt in the order of the prompts
    samples: int  # on all ranks


@dataclass
class Ahead:
    """A batch of this rank that the server samples, or has sampled."""

    key: Key
    steps_behind: int
    pending: Pending | None
    rollout: Rollout | None = None  # on the CPU, once collected
    times: tuple[float, float, float] | None = None  # when the server began and ended, and for how long we waited

    def collect(self) -> Rollout:
        """The samples; waits for them. All ranks must call this. EngineError if the server failed."""
        if self.rollout is None:
            assert self.pending is not None
            start = time.perf_counter()
            rollout, timed = self.pending.result()
            self.times = timed.began, timed.ended, time.perf_counter() - start
            rollout.steps_behind = self.steps_behind
            self.rollout = rollout
        return self.rollout


class OneStepAhead:
    """Gives each step its samples, and has those of the next one sampled in the meantime."""

    def __init__(self, sampler: Sampler, steps: int) -> None:
        """`sampler` works elsewhere; nothing is sampled for step `steps` and later ones.

        Raises:
            UserError: the sampler works in this process.
        """
        if not isinstance(sampler, EngineSampler) or not sampler.engine.elsewhere:
            raise UserError("one_step_ahead needs a sampler that works while this process learns: vllm-server")
        self.sampler, self.steps = sampler, steps
        self.now: Ahead | None = None  # of the step that is under way
        self.next: Ahead | None = None

    def take(self, key: Key, call: Call, following: int) -> Rollout:
        """The samples of a step, on the CPU; those of the next step, `following` prompts further, are then begun."""
        found = [one for one in (self.now, self.next) if one is not None and one.key == key]
        self.now = found[0] if found else Ahead(key, 0, call(self.sampler.start, key.step, key.place))
        self.next = None
        rollout = self.now.collect()
        if key.step + 1 < self.steps:
            after = Key(key.step + 1, key.place + following, key.samples)
            self.next = Ahead(after, 1, call(self.sampler.start, after.step, after.place))
        return rollout

    def times(self, start: float) -> dict[str, float]:
        """When the server sampled this step's batch, in seconds since `start`, and how long it was waited for."""
        if self.now is None or self.now.times is None:
            return {}
        began, ended, waited = self.now.times
        return {"time/engine_began": began - start, "time/engine_ended": ended - start, "time/engine_wait": waited}

    def state(self, step: int) -> dict[str, Any] | None:
        """For a checkpoint after `step` steps: the samples of step `step`, of all ranks. Waits for them.

        None if there are none: the server failed, or the run ends here.
        """
        for one in (self.now, self.next):
            if one is not None and one.key.step == step:
                try:
                    rollout = Rollout.concatenate(ranks().every(one.collect()))
                except EngineError:
                    return None
                if len(rollout.texts) != one.key.samples:  # of another rank, which has failed
                    return None
                return {"key": list(one.key), **{name: _plain(getattr(rollout, name)) for name in FIELDS}}
        return None

    def load(self, state: dict[str, Any] | None, step: int) -> None:
        """Go on with what `state(step)` returned."""
        if state is None:
            if step:
                notice("no samples of the next step are in the checkpoint: they are sampled now")
            return
        values = {name: state[name] for name in FIELDS}
        if values["support"] is not None:
            values["support"] = Support(*values["support"])
        key, rollout = Key(*state["key"]), Rollout(**values)
        rows = torch.arange(key.samples)[ranks().share(key.samples, "prompts_per_step x samples_per_prompt")]
        self.next = Ahead(key, rollout.steps_behind, None, rollout.rows(rows))


def one_step_ahead(wanted: bool, sampler: Sampler, steps: int) -> OneStepAhead | None:
    """`OneStepAhead`, if it is wanted."""
    return OneStepAhead(sampler, steps) if wanted else None


def _plain(value: Any) -> Any:
    """As `run.checkpoint.save_state` takes it."""
    if isinstance(value, Support):
        return list(value)
    return value.clone() if isinstance(value, Tensor) else value
