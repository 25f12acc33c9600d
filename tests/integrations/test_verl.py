# SPDX-License-Identifier: Apache-2.0
"""Each function that is replaced in verl, against verl's own, and its advantage and reward code on its DataProto.

verl runs on CPU here (Ray is imported, not started). Not covered: the engines (FSDP, Megatron), which need GPUs, and
verl's own Triton `linear_cross_entropy`; what stands in for that is held against float64 instead.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checks import assert_as_original, assert_replaces_and_restores, assert_signature, look_up
from torch import Tensor

from rlhf_fast.integrations import Patch, apply_rlhf_fast_to_verl
from rlhf_fast.integrations.verl import MINORS, SIGNATURES, targets_of

verl = pytest.importorskip("verl", reason="make test-integrations installs it")
core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
pytest.importorskip("verl.utils.experimental.torch_functional")
pytest.importorskip("verl.utils.kernel.linear_cross_entropy")

PATHS = {target.name: target.path for target in targets_of()}


@pytest.fixture
def patch() -> Iterator[Patch]:
    with apply_rlhf_fast_to_verl(policy_loss=True) as patch:
        yield patch


def both(name: str) -> tuple[Any, Any]:
    """Ours and the original; inside a patch."""
    ours = look_up(PATHS[name])
    return ours, ours.rlhf_fast_replaces


def response_mask(generator: torch.Generator, rows: int, length: int) -> Tensor:
    """Prompt-free responses of several lengths with holes where a tool spoke, int64 as verl's."""
    mask = torch.rand(rows, length, generator=generator) < 0.7
    ends = torch.randint(1, length + 1, (rows, 1), generator=generator)
    mask &= torch.arange(length) < ends
    mask[0, :2] = True
    return mask.long()


def test_the_newest_version_is_installed() -> None:
    assert ".".join(verl.__version__.split(".")[:2]) == MINORS[0]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    path = PATHS.get(name, f"verl.trainer.ppo.core_algos.{name}")
    assert_signature(path, SIGNATURES[name])


def test_replaces_everywhere_and_restores() -> None:
    table = core_algos.ADV_ESTIMATOR_REGISTRY
    before = table["gae"]
    assert_replaces_and_restores(apply_rlhf_fast_to_verl, list(PATHS.values()))
    with apply_rlhf_fast_to_verl(policy_loss=True) as patch:
        assert table["gae"] is core_algos.compute_gae_advantage_return is not before
        assert "rlhf_fast" in core_algos.POLICY_LOSS_REGISTRY, patch.report()
    assert table["gae"] is before and "rlhf_fast" not in core_algos.POLICY_LOSS_REGISTRY


@pytest.mark.parametrize("shape", [(3, 7, 101), (9, 64)], ids=str)
def test_logprobs_and_entropy_from_logits(patch: Patch, generator: torch.Generator, shape: tuple[int, ...]) -> None:
    logits = 4 * torch.randn(shape, generator=generator)
    labels = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    ours, original = both("logprobs_from_logits")
    assert_as_original(lambda logits: ours(logits, labels), lambda logits: original(logits, labels), {"logits": logits})
    assert_as_original(*both("entropy_from_logits"), {"logits": logits})
    truth = both("entropy_from_logits")[1]
    ours, original = both("entropy_from_logits_with_chunking")
    assert_as_original(ours, lambda logits: original(logits, 4), {"logits": logits.flatten(0, -2)}, truth=truth)


def test_dtypes_from_bfloat16(patch: Patch) -> None:
    logits, labels = torch.randn(4, 33).bfloat16(), torch.randint(0, 33, (4,))
    assert both("logprobs_from_logits")[0](logits, labels).dtype == torch.float32  # as verl's flash-attn path
    for name in ("entropy_from_logits", "entropy_from_logits_with_chunking"):
        ours, original = both(name)
        assert ours(logits).dtype == original(logits).dtype


def test_entropy_can_be_compiled(patch: Patch) -> None:
    """verl's engines wrap it in torch.compile(dynamic=True)."""
    compiled = torch.compile(both("entropy_from_logits")[0], dynamic=True, fullgraph=True, backend="aot_eager")
    logits = torch.randn(5, 17, requires_grad=True)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(compiled(logits), expected, rtol=1e-5, atol=1e-5)
    compiled(logits).sum().backward()
    assert logits.grad is not None


@pytest.mark.parametrize("shape", [(11, 16), (3, 5, 16)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_fused_linear(patch: Patch, generator: torch.Generator, shape: tuple[int, ...], temperature: float) -> None:
    inputs = {"hidden": torch.randn(shape, generator=generator), "weight": torch.randn(77, 16, generator=generator)}
    ids = torch.randint(0, 77, shape[:-1], generator=generator)
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    module = FusedLinearForPPO(chunk_size=4)
    ours, original = both("FusedLinearForPPO.forward")
    assert_as_original(
        lambda hidden, weight: ours(module, hidden, weight, ids, temperature),
        lambda hidden, weight: original(module, hidden, weight, ids, temperature),
        inputs,
        truth=lambda hidden, weight: plainly(hidden, weight, ids, temperature),
    )


def test_a_temperature_for_each_row_is_verls_affair(patch: Patch) -> None:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    arguments = (FusedLinearForPPO(), torch.randn(3, 8), torch.randn(9, 8), torch.tensor([0, 5, 8]), torch.rand(3, 1))
    ours, original = both("FusedLinearForPPO.forward")
    assert all(torch.equal(a, b) for a, b in zip(ours(*arguments), original(*arguments), strict=True))


def test_linear_cross_entropy(patch: Patch, generator: torch.Generator) -> None:
    inputs = {"hidden": torch.randn(1, 11, 16, generator=generator), "weight": torch.randn(77, 16, generator=generator)}
    ids = torch.randint(0, 77, (1, 11), generator=generator)
    ours, _ = both("linear_cross_entropy")
    by_hand = functools.partial(plainly, ids=ids, temperature=0.7, flat=True)
    assert_as_original(lambda hidden, weight: ours(hidden, weight, ids, 0.7, "none"), by_hand, inputs)


def plainly(
    hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, flat: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy; `flat`: one dimension, as verl's linear_cross_entropy gives them."""
    logprobs = (hidden @ weight.T / temperature).log_softmax(-1)
    made = logprobs.gather(-1, ids[..., None])[..., 0], -(logprobs.exp() * logprobs).sum(-1)
    return (made[0].flatten(), made[1].flatten()) if flat else made


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (1.0, 0.0)])
@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.float32])
def test_gae(patch: Patch, generator: torch.Generator, gamma: float, lam: float, mask_dtype: torch.dtype) -> None:
    mask = response_mask(generator, 6, 41)
    inputs = {name: torch.randn(6, 41, generator=generator) for name in ("rewards", "values")}
    ours, original = both("compute_gae_advantage_return")

    def call(f: Any) -> Any:
        return lambda rewards, values: f(rewards, values, mask.to(mask_dtype), gamma, lam)

    assert_as_original(call(ours), call(original), inputs, real=mask.bool())
    advantages, returns = call(ours)(**inputs)
    assert not advantages[mask == 0].any() and not returns[mask == 0].any()


def test_gae_refuses_what_verl_refuses(patch: Patch) -> None:
    ours, _ = both("compute_gae_advantage_return")
    for real in (0, 1):
        mask = torch.zeros(2, 3, dtype=torch.int64)
        mask.view(-1)[:real] = 1
        with pytest.raises(ValueError, match="mask"):
            ours(torch.randn(2, 3), torch.randn(2, 3), mask, 1.0, 0.95)


@pytest.mark.parametrize("kind", ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "k1+", "k3+", "abs+"])
def test_kl_penalty(patch: Patch, generator: torch.Generator, kind: str) -> None:
    logprob = -3 * torch.rand(4, 50, generator=generator)
    inputs = {"logprob": logprob, "ref_logprob": logprob + 2 * torch.randn(4, 50, generator=generator)}
    inputs["ref_logprob"][0, :4] = logprob[0, :4] + torch.tensor([15.0, -15.0, 30.0, -30.0])  # beyond both clamps
    ours, original = both("kl_penalty")
    assert_as_original(lambda **x: ours(**x, kl_penalty=kind), lambda **x: original(**x, kl_penalty=kind), inputs)


def test_kl_penalty_far_apart_has_finite_gradients(patch: Patch) -> None:
    logprob = torch.tensor([[-200.0, 0.0]], requires_grad=True)
    both("kl_penalty")[0](logprob, torch.tensor([[0.0, -200.0]]), "k3").sum().backward()
    assert logprob.grad is not None and logprob.grad.isfinite().all()


def test_unknown_kl_is_verls_error(patch: Patch) -> None:
    with pytest.raises(NotImplementedError):
        both("kl_penalty")[0](torch.zeros(1, 1), torch.zeros(1, 1), "full")


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
@pytest.mark.parametrize("weighted", [False, True])
def test_policy_loss(patch: Patch, generator: torch.Generator, mode: str, weighted: bool) -> None:
    from verl.workers.config import ActorConfig

    config = ActorConfig(
        strategy="fsdp", ppo_micro_batch_size_per_gpu=1, rollout_n=1, clip_ratio_low=0.1, clip_ratio_high=0.3
    )
    mask, advantages = response_mask(generator, 6, 21), torch.randn(6, 21, generator=generator)
    old = -torch.rand(6, 21, generator=generator)
    weights = torch.rand(6, 21, generator=generator) if weighted else None
    log_prob = old + 0.5 * torch.randn(6, 21, generator=generator)
    metrics = {}

    def loss(name: str, log_prob: Tensor) -> Tensor:
        function = core_algos.get_policy_loss_fn(name)
        made, metrics[name] = function(old.to(log_prob.dtype), log_prob, advantages, mask, mode, config, weights)
        return made

    calls = [functools.partial(loss, name) for name in ("rlhf_fast", "vanilla")]
    assert_as_original(*calls, {"log_prob": log_prob})
    assert metrics["rlhf_fast"] == pytest.approx(metrics["vanilla"], rel=1e-4, abs=1e-6)


def test_on_verls_own_batch(generator: torch.Generator) -> None:
    """apply_kl_penalty and compute_advantage of verl's trainer, on a DataProto."""
    ray_trainer = pytest.importorskip("verl.trainer.ppo.ray_trainer")
    results = []
    tensors = {
        name: torch.randn(5, 19, generator=generator)
        for name in ("token_level_scores", "old_log_probs", "ref_log_prob", "values")
    }
    tensors["response_mask"] = response_mask(generator, 5, 19)
    for patched in (False, True):
        data = verl.DataProto.from_dict({name: x.clone() for name, x in tensors.items()})
        patch = apply_rlhf_fast_to_verl() if patched else Patch("nothing")
        with patch:
            controller = core_algos.FixedKLController(kl_coef=0.1)
            data, metrics = ray_trainer.apply_kl_penalty(data, controller, kl_penalty="low_var_kl")
            data = ray_trainer.compute_advantage(
                data,
                core_algos.AdvantageEstimator.GAE,
                gamma=0.99,
                lam=0.95,
                config={},
            )
        results.append((data.batch, metrics))
    (theirs, their_metrics), (ours, our_metrics) = results
    real = tensors["response_mask"].bool()
    for name in ("token_level_rewards", "advantages", "returns"):
        torch.testing.assert_close(ours[name][real], theirs[name][real], rtol=1e-5, atol=1e-5)
    assert our_metrics == pytest.approx(their_metrics, rel=1e-5)


PLUGIN = """
import verl, verl.utils.torch_functional as functional
print(hasattr(functional.logprobs_from_logits, "rlhf_fast_replaces"))
import verl.trainer.ppo.core_algos as core_algos
print(core_algos.get_adv_estimator_fn("gae") is core_algos.compute_gae_advantage_return)
print(hasattr(core_algos.compute_gae_advantage_return, "rlhf_fast_replaces"))
print("rlhf_fast" in core_algos.POLICY_LOSS_REGISTRY)
"""


def test_verls_own_door() -> None:
    """Through VERL_USE_EXTERNAL_MODULES, which needs no installation; the entry point names the same module."""
    environment = {
        **os.environ,
        "RLHF_FAST_VERL": "policy_loss",
        "VERL_USE_EXTERNAL_MODULES": "rlhf_fast.integrations.verl_plugin",
        "VERL_USE_EXTERNAL_PLUGINS": "none",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    done = subprocess.run([sys.executable, "-c", PLUGIN], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-4:] == ["True"] * 4
