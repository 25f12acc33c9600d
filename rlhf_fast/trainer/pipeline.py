# SPDX-License-Identifier: Apache-2.0
"""All phases one after the other in one run folder: sft/ collect/ reward/ ppo/, summary.json and report.html."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import rlhf_fast as rf
from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.errors import Interrupted
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.run.options import RunOptions
from rlhf_fast.run.progress import Timer, notice
from rlhf_fast.run.resume import finished_summary, tell_if_new

from .collection import CollectConfig, CollectOptions
from .reward.config import RewardConfig, RewardOptions
from .rl.config import PPOConfig, PPOOptions
from .sft.config import SFTConfig, SFTOptions

P = TypeVar("P", bound=RunOptions)
PHASES = ("sft", "collect", "reward", "ppo")
PPO_KEYS = (
    "steps",
    "reward_before",
    "reward_after",
    "gold_before",
    "gold_after",
    "kl_final",
    "entropy_before",
    "entropy_after",
)


@dataclass
class PipelineConfig(RunOptions):
    """All phases one after the other: sft, collect, reward, ppo. `push_to_hub` NAME uploads NAME-sft and so on."""

    sft: SFTOptions = field(default_factory=SFTOptions)
    collect: CollectOptions = field(default_factory=CollectOptions)
    reward: RewardOptions = field(default_factory=RewardOptions)
    ppo: PPOOptions = field(default_factory=PPOOptions)

    def validate(self) -> None:
        """Raise UserError if an option is out of its range; the output of an earlier phase need not be named."""
        super().validate()
        for phase in phase_configs(self).values():
            phase.validate()


def run_pipeline(config: PipelineConfig) -> dict[str, Any]:
    """Run what `config` describes and return the summary, also in summary.json of the run folder.

    With `resume` finished phases are skipped and an unfinished one continues. Raises UserError for wrong
    input, before anything is loaded where it can be known, and Interrupted after a Ctrl-C or SIGTERM.
    """
    from rlhf_fast.report.page import write_report

    from .collection import collect
    from .reward.train import resolved, train_reward
    from .rl.ppo import train_ppo
    from .sft.train import train_sft

    config.validate()
    check_files(config)
    run = RunFolder.create(config.output_dir, overwrite=config.overwrite, resume=config.resume)
    tell_if_new(run)
    run.save_config(config, tracked=False)  # each phase opens its own trackers
    timer = Timer()
    parts = phase_configs(config)
    phases = {"sft": _phase("sft", train_sft, parts["sft"], run)}
    if "collect" in parts:
        phases["collect"] = _phase("collect", collect, parts["collect"], run)
    phases["reward"] = _phase("reward", train_reward, resolved(parts["reward"]), run)
    # Resolved, as train_ppo stores it: else options that are None would seem to change at each resume.
    phases["ppo"] = _phase("ppo", train_ppo, parts["ppo"].resolved(), run)

    summary = summarise(config, phases, timer.elapsed())
    run.write_json("summary.json", summary)
    notice(f"report: {write_report(run.path)}")
    for name in ("sft", "reward", "ppo"):
        RunFolder(run.path / name).upload(parts[name].push_to_hub)
    return summary


def phase_configs(config: PipelineConfig) -> dict[str, Any]:
    """The configuration of each phase that runs, by its name, with the outputs of earlier phases as its inputs."""
    folder = Path(config.output_dir)
    sft_model, reward_model = str(folder / "sft" / "model"), str(folder / "reward" / "model")
    feedback = config.reward.feedback_file or str(folder / "collect" / "feedback.jsonl")
    rater = config.ppo.rater or config.collect.rater
    reward_model = config.ppo.reward_model or reward_model
    parts: dict[str, Any] = {"sft": _config(SFTConfig, config, config.sft)}
    if not config.reward.feedback_file:
        parts["collect"] = _config(CollectConfig, config, config.collect, model=sft_model)
    parts["reward"] = _config(RewardConfig, config, config.reward, model=sft_model, feedback_file=feedback)
    parts["ppo"] = _config(PPOConfig, config, config.ppo, model=sft_model, reward_model=reward_model, rater=rater)
    return parts


def check_files(config: PipelineConfig) -> None:
    """Read every file and find every function that the configuration names, with the columns that it takes.

    So what is wrong with the last phase's is not found at the end.
    """
    from rlhf_fast.data.examples import read_prompts, read_sft
    from rlhf_fast.feedback.raters import load_rater
    from rlhf_fast.feedback.schema import read_feedback
    from rlhf_fast.models.gguf import resolve_model

    from .rl.prompts import read_data
    from .rl.reward_functions import load_functions
    from .rl.settings import Settings

    strict, ppo = config.strict, phase_configs(config)["ppo"].resolved()
    read_sft(config.sft.train_file, strict)
    if config.sft.eval_file:
        read_sft(config.sft.eval_file, strict)
    rater = load_rater(config.collect.rater) if config.collect.rater else None
    if config.reward.feedback_file:
        read_feedback(config.reward.feedback_file, strict, config.reward.criterion)
    else:
        lines = read_prompts(config.collect.prompts_file, strict)
        if rater is not None:
            rater.check_columns(lines)
    read_data(Settings(ppo).data, load_functions(ppo.reward_functions), load_rater(ppo.rater) if ppo.rater else None)
    if config.ppo.reward_model:
        resolve_model(config.ppo.reward_model)


def _config(cls: type[P], config: PipelineConfig, section: Any, **values: Any) -> P:
    """The configuration of one phase: shared options, the phase's section, and the outputs of earlier phases."""
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(RunOptions)}
    shared["overwrite"] = False  # the pipeline's folder has been emptied already
    name = cls.__name__.removesuffix("Config").lower()
    shared["push_to_hub"] = f"{config.push_to_hub}-{name}" if config.push_to_hub and cls is not CollectConfig else ""
    shared["save_last"] = config.save_last and cls is PPOConfig  # other phases' results are inputs of later ones
    return cls(**{**shared, **dataclasses.asdict(section), **values})


def _phase(name: str, phase: Callable[[Any, RunFolder], dict[str, Any]], config: Any, run: RunFolder) -> dict[str, Any]:
    """Run one phase in its folder, or read the summary of one that had finished; adds the `seconds` it took."""
    config.output_dir = str(run.path / name)
    timer = Timer()
    child = run.child(name)
    later = PHASES[PHASES.index(name) + 1 :]
    try:
        finished = finished_summary(child, config, may_extend=not any((run.path / other).exists() for other in later))
        if finished is not None:
            return finished
        summary = phase(config, child)
    finally:
        child.close()
        gc.collect()  # free a phase's models before the next one loads its own
    summary["seconds"] = max(summary.get("seconds", 0.0), timer.elapsed())  # the phase counts earlier launches, too
    child.write_json("summary.json", summary)
    if later and ranks().any(child.stop_requested):
        raise Interrupted(f"stopped after {name}, which is finished; --resume goes on with what follows")
    return summary


def summarise(config: PipelineConfig, phases: dict[str, dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The figures that other tools read; keys as documented in docs/demo.md."""
    each = {name: phases.get(name, {}).get("seconds", 0.0) for name in PHASES}
    return {
        "seconds": {"total": max(seconds, sum(each.values())), **each},  # `seconds` are those of this launch
        "sft": {key: phases["sft"].get(key) for key in ("loss_before", "loss_after")},
        "reward": {key: phases["reward"].get(key) for key in ("heldout_pair_accuracy", "pairs")},
        "ppo": {**{key: phases["ppo"].get(key) for key in PPO_KEYS}, **_extra(phases["ppo"])},
        "backend": {f"{row.op}/{row.device}": row.backend for row in rf.backends()},
        "model": config.model,
    }


def _extra(ppo: dict[str, Any]) -> dict[str, Any]:
    """All other figures measured before and after."""
    return {key: value for key, value in ppo.items() if key.endswith(("_before", "_after")) and key not in PPO_KEYS}
