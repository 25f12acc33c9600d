# SPDX-License-Identifier: Apache-2.0
"""Each function that is replaced in OpenRLHF, against its own; its experience maker; the launcher on a real Ray.

OpenRLHF's model and experience modules run here with empty stand-ins for DeepSpeed, flash-attn and vLLM. Not covered:
training itself, which needs all three.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checks import assert_as_original, assert_replaces_and_restores, assert_signature, look_up
from helpers.stubs import OPENRLHF_NEEDS, stubbed
from torch import Tensor

from rlhf_fast.integrations import Patch, apply_rlhf_fast_to_openrlhf
from rlhf_fast.integrations.openrlhf import MINORS, SIGNATURES, _compute_approx_kl_of_three, targets_of

pytest.importorskip("openrlhf", reason="make test-integrations installs it")
with stubbed(*OPENRLHF_NEEDS):
    actor = pytest.importorskip("openrlhf.models.actor")
    maker = pytest.importorskip("openrlhf.trainer.ppo_utils.experience_maker")

PATHS = {target.name.rpartition(".")[2]: target.path for target in targets_of()}


@pytest.fixture
def patch() -> Iterator[Patch]:
    with apply_rlhf_fast_to_openrlhf() as patch:
        yield patch


def both(name: str) -> tuple[Any, Any]:
    """Ours and the original; inside a patch."""
    ours = look_up(PATHS[name])
    return ours, ours.rlhf_fast_replaces


def action_mask(generator: torch.Generator, rows: int, length: int) -> Tensor:
    """Responses of several lengths with holes, and a row without any."""
    mask = torch.rand(rows, length, generator=generator) < 0.7
    mask &= torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=generator)
    mask[-1] = False
    return mask


def test_the_newest_version_is_installed() -> None:
    from importlib.metadata import version

    assert ".".join(version("openrlhf").split(".")[:2]) == MINORS[0]


@pytest.mark.parametrize("name", [name for name in SIGNATURES if "," not in name])
def test_signature(name: str) -> None:
    assert_signature(PATHS[name.rpartition(".")[2]], SIGNATURES[name])


def test_replaces_everywhere_and_restores() -> None:
    assert_replaces_and_restores(apply_rlhf_fast_to_openrlhf, list(PATHS.values()))
    before = actor.log_probs_from_logits
    with apply_rlhf_fast_to_openrlhf():
        assert actor.log_probs_from_logits is both("log_probs_from_logits")[0] is not before
        assert maker.compute_reward is both("compute_reward")[0]
    assert actor.log_probs_from_logits is before


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_from_logits(patch: Patch, generator: torch.Generator, temperature: float) -> None:
    logits = 4 * torch.randn(3, 7, 101, generator=generator)
    labels = torch.randint(0, 101, (3, 7), generator=generator)
    ours, original = both("log_probs_from_logits")
    assert_as_original(
        lambda logits: ours(logits, labels, temperature),
        lambda logits: original(logits, labels, temperature),
        {"logits": logits},
    )
    written = logits.clone()
    ours(written, labels, temperature)
    torch.testing.assert_close(written, logits / temperature)  # divided in place, as OpenRLHF does


def test_entropy(patch: Patch, generator: torch.Generator) -> None:
    ours, original = both("compute_entropy")
    plain = original._torchdynamo_orig_callable  # what it compiles, so that the test need not
    assert_as_original(ours, plain, {"logits": 4 * torch.randn(3, 7, 101, generator=generator)})
    assert ours(torch.randn(2, 5).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("off_policy", [False, True])
def test_approx_kl(patch: Patch, generator: torch.Generator, estimator: str, unbiased: bool, off_policy: bool) -> None:
    base = -3 * torch.rand(4, 50, generator=generator)
    inputs = {"log_probs": base + 2 * torch.randn(4, 50, generator=generator), "log_probs_base": base}
    inputs["log_probs"][0, :4] = base[0, :4] + torch.tensor([15.0, -15.0, 100.0, -100.0])  # beyond the clamps
    old = inputs["log_probs"] + torch.randn(4, 50, generator=generator) if off_policy else None
    options = {"log_probs_old": old, "kl_estimator": estimator, "unbiased_gradient": unbiased}
    ours, original = both("compute_approx_kl")
    truth = functools.partial(_in_float64, original, old, options)
    assert_as_original(lambda **x: ours(**x, **options), lambda **x: original(**x, **options), inputs, truth=truth)
    if not unbiased:
        ours = _compute_approx_kl_of_three(original)
        assert_as_original(
            lambda **x: ours(**x, kl_estimator=estimator), lambda **x: original(**x, **options), inputs, truth=truth
        )


def _in_float64(original: Any, old: Tensor | None, options: dict[str, Any], **inputs: Tensor) -> Any:
    """OpenRLHF casts to float32; here `.float()` does nothing."""
    kept, Tensor.float = Tensor.float, lambda self: self  # type: ignore[method-assign, assignment]
    try:
        return original(**inputs, **{**options, "log_probs_old": None if old is None else old.double()})
    finally:
        Tensor.float = kept  # type: ignore[method-assign]


def test_unknown_estimator_is_openrlhfs_error(patch: Patch) -> None:
    with pytest.raises(ValueError, match="kl_estimator"):
        both("compute_approx_kl")[0](torch.zeros(1, 1), torch.zeros(1, 1), kl_estimator="k9")


@pytest.mark.parametrize("clip", [None, (-0.5, 0.5)])
@pytest.mark.parametrize("kl_coef", [0.1, -1.0])
def test_reward(patch: Patch, generator: torch.Generator, clip: tuple[float, float] | None, kl_coef: float) -> None:
    mask = action_mask(generator, 5, 13)
    inputs = {"r": torch.randn(5, generator=generator), "kl": torch.randn(5, 13, generator=generator)}

    def call(f: Any) -> Any:
        return lambda r, kl: f(r, kl_coef, kl, mask.to(torch.int64), clip)

    assert_as_original(*(call(f) for f in both("compute_reward")), inputs)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (1.0, 0.0)])
@pytest.mark.parametrize("masked", [False, True])
def test_gae_and_cumulative_returns(
    patch: Patch, generator: torch.Generator, gamma: float, lam: float, masked: bool
) -> None:
    mask = action_mask(generator, 5, 41) if masked else None
    inputs = {name: torch.randn(5, 41, generator=generator) for name in ("values", "rewards")}

    def gae(f: Any) -> Any:
        return lambda values, rewards: f(None, values, rewards, mask, gamma, lam)

    def cumulative(f: Any) -> Any:
        return lambda rewards: f(None, rewards, mask, gamma)

    assert_as_original(*(gae(f) for f in both("get_advantages_and_returns")), inputs)
    ours, original = (cumulative(f) for f in both("get_cumulative_returns"))
    rewards = inputs["rewards"]
    expected = original(rewards)
    torch.testing.assert_close(ours(rewards), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("estimator", ["gae", "reinforce"])
def test_its_experience_maker(generator: torch.Generator, estimator: str) -> None:
    """compute_advantages_and_returns, from scores to whitened advantages, on its Experience."""
    from openrlhf.trainer.ppo_utils.experience import Experience

    options = types.SimpleNamespace(estimator=estimator, gamma=0.99, lambd=0.95, no_std_norm=False)
    arguments = types.SimpleNamespace(
        rollout=types.SimpleNamespace(n_samples_per_prompt=2),
        reward=types.SimpleNamespace(clip_range=(-5.0, 5.0)),
        algo=types.SimpleNamespace(advantage=options),
    )
    shape = (4, 17)
    tensors = {name: torch.randn(shape, generator=generator) for name in ("kl", "values")}
    scores, mask = torch.randn(4, generator=generator), action_mask(generator, *shape)
    made = []
    for patched in (False, True):
        maker_of_one = maker.RemoteExperienceMaker.__new__(maker.RemoteExperienceMaker)
        maker_of_one.advantage_estimator, maker_of_one.kl_ctl = estimator, types.SimpleNamespace(value=0.1)
        maker_of_one.strategy = types.SimpleNamespace(args=arguments)
        copies = {name: x.clone() for name, x in tensors.items()}
        experience = Experience(index=[0, 1, 2, 3], rewards=scores.clone(), action_mask=mask, info={}, **copies)
        maker.apply_length_penalties, kept = (lambda *_: None), maker.apply_length_penalties
        with apply_rlhf_fast_to_openrlhf() if patched else Patch("nothing"):
            made.append(maker_of_one.compute_advantages_and_returns([experience])[0])
        maker.apply_length_penalties = kept
    for name in ("advantages", "returns"):
        torch.testing.assert_close(getattr(made[1], name), getattr(made[0], name), rtol=1e-5, atol=2e-5)


def test_the_actor(generator: torch.Generator) -> None:
    """Actor.forward, log-probs and entropy at a temperature, and the gradient of both."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    class Table(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(23, 23, generator=torch.Generator().manual_seed(0)))

        def forward(self, ids: Tensor, **_: Any) -> Any:
            return CausalLMOutputWithPast(logits=self.table[ids])

    ids = torch.randint(0, 23, (2, 9), generator=generator)
    results = []
    for patched in (False, True):
        with apply_rlhf_fast_to_openrlhf() if patched else Patch("nothing"), torch.compiler.set_stance("force_eager"):
            policy = actor.Actor(Table(), temperature=0.7)
            policy.packing_samples = False
            logprobs, output = policy(
                ids, torch.ones(2, 4, dtype=torch.bool), torch.ones_like(ids), return_output=True, return_entropy=True
            )
            gradient = torch.autograd.grad(logprobs.sum() + output.entropy.sum(), policy.model.table)[0]
        results.append((logprobs.detach(), output.entropy.detach(), gradient))
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


COMMAND = """
import json, os, sys
import ray

def patched():
    \"\"\"What a worker of Ray sees before and after it imports the module.\"\"\"
    import importlib.util, sys, types
    early = "openrlhf.models.utils" in sys.modules or "deepspeed" in sys.modules
    sys.modules["deepspeed"] = types.ModuleType("deepspeed")
    sys.modules["openrlhf.models"] = package = types.ModuleType("openrlhf.models")
    package.__path__ = [p + "/models" for p in importlib.util.find_spec("openrlhf").submodule_search_locations]
    import openrlhf.models.utils as utils
    return [early, hasattr(utils.compute_reward, "rlhf_fast_replaces")]

if not ray.is_initialized():
    ray.init(num_cpus=1, include_dashboard=False, runtime_env={"env_vars": {"MARK": "1"}}, logging_level="error")
print("RESULT", json.dumps(ray.get(ray.remote(patched).remote())), patched()[1], sys.argv[1:])
ray.shutdown()
"""


def test_the_launcher_patches_the_workers_of_ray(tmp_path: Path) -> None:
    """A real Ray; in the place of openrlhf.cli.train_ppo_ray a command that looks at a worker."""
    cli = tmp_path / "openrlhf" / "cli"
    cli.mkdir(parents=True)
    (cli / "__init__.py").write_text("")
    (cli / "train_ppo_ray.py").write_text(COMMAND)
    (tmp_path / "run.py").write_text(
        "import runpy, sys, openrlhf.cli\n"
        f"openrlhf.cli.__path__ = [{str(cli)!r}]\n"
        "runpy.run_module('rlhf_fast.integrations.openrlhf', run_name='__main__', alter_sys=True)\n"
    )
    root = str(Path(__file__).resolve().parents[2])  # where the workers find rlhf_fast, installed or not
    environment = {
        **os.environ,
        "PYTHONPATH": root,
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [sys.executable, str(tmp_path / "run.py"), "--", "--actor.model_name_or_path", "some/model"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert "RESULT [false, true] True ['--actor.model_name_or_path', 'some/model']" in done.stdout, (
        done.stdout + done.stderr
    )
