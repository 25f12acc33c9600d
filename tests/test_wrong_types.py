# SPDX-License-Identifier: Apache-2.0
"""Whatever is given for an argument of a public op: it works, or our error names the op and the argument."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch

import rlhf_fast as rf

X, T, R = torch.randn(2, 3, 7), torch.randint(7, (2, 3)), torch.randn(2, 3)
M, FLAGS, S = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool), torch.randn(2)
H, W = torch.randn(2, 3, 4), torch.randn(7, 4)
CALLS: dict[str, dict[str, Any]] = {
    "token_logprobs": {"logits": X, "targets": T},
    "token_stats": {"logits": X, "targets": T},
    "token_kl": {"logits": X, "ref_logits": X},
    "token_kl_and_grad": {"logits": X, "ref_logits": X, "grad_kl": R},
    "approx_kl": {"logprobs": R, "ref_logprobs": R},
    "gae": {"rewards": R, "values": R, "truncated": FLAGS, "bootstrap_values": R},
    "vtrace": {"rewards": R, "values": R, "log_ratios": R, "truncated": FLAGS, "bootstrap_values": R},
    "retrace": {
        "rewards": R, "q_values": R, "values": R, "log_ratios": R, "truncated": FLAGS, "bootstrap_values": R,
    },
    "ppo_advantages": {
        "scores": S, "logprobs": R, "ref_logprobs": R, "values": R, "mask": M, "kl_coef": 0.1,
    },
    "masked_whiten": {"values": R, "mask": M},
    "linear_token_logprobs": {"hidden": H, "weight": W, "targets": T},
    "linear_token_stats": {"hidden": H, "weight": W, "targets": T},
    "linear_token_kl": {"hidden": H, "weight": W, "ref_hidden": H, "ref_weight": W},
    "linear_policy_loss": {
        "hidden": H, "weight": W, "targets": T, "old_logprobs": R, "advantages": R, "mask": M, "ref_logprobs": R,
        "kl_coef": 0.1,
    },
    "linear_sampled_logprobs": {
        "hidden": H, "weight": W, "targets": T, "support_ids": torch.arange(7).repeat(6),
        "support_offsets": torch.arange(7) * 7,
    },
}  # fmt: skip
ARGUMENTS = [(op, name) for op in CALLS for name in inspect.signature(getattr(rf, op)).parameters]
WRONG = {
    "None": None, "text": "x", "list": [0.2, 0.28], "empty": [], "object": object(), "dict": {}, "true": True,
    "integer": 3, "negative": -1, "float": 1.5, "nan": float("nan"), "tuple": (1, 2, 3), "complex": 1j,
    "scalar": torch.tensor(1), "matrix": torch.ones(2, 2), "ints": torch.ones(2, 3, dtype=torch.int32),
    "bools": torch.ones(2, 3, dtype=torch.bool), "complexes": torch.ones(2, 3, dtype=torch.complex64),
    "sparse": torch.ones(2, 3).to_sparse(), "sparse logits": torch.ones(2, 3, 7).to_sparse(),
    "sparse mask": M.to_sparse(), "sparse targets": T.to_sparse(),
    "nested": torch.nested.nested_tensor([torch.ones(2, 7), torch.ones(3, 7)], layout=torch.jagged),
    "deep": torch.ones(2, 3, 4, 5), "numpy": torch.ones(2, 3).numpy(), "meta": torch.ones(2, 3, device="meta"),
}  # fmt: skip


def test_every_op_is_tried() -> None:
    assert set(CALLS) == set(rf._dispatch.KERNEL_OF)


@pytest.mark.parametrize(("op", "argument"), ARGUMENTS)
def test_wrong_types(op: str, argument: str) -> None:
    names, failures = "|".join(inspect.signature(getattr(rf, op)).parameters), []
    for kind, value in WRONG.items():
        try:
            getattr(rf, op)(**{**CALLS[op], argument: value})
        except (TypeError, ValueError) as error:
            if not re.match(rf"rlhf_fast\.{op}: ({names}) ", str(error)):
                failures.append(f"{kind}: {type(error).__name__}: {error}")
        except Exception as error:
            failures.append(f"{kind}: {type(error).__name__}: {error}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize(
    ("op", "options"),
    [("token_logprobs", {"temperature": None}), ("gae", {"gamma": None}), ("gae", {"lam": None}),
     ("linear_policy_loss", {"clip": [-0.1, 0.28]}), ("token_kl", {"temperature": "1.0"})],
)  # fmt: skip
def test_what_a_config_file_may_hold(op: str, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises((TypeError, ValueError), match=rf"^rlhf_fast\.{op}: {name} must be .*got"):
        getattr(rf, op)(**{**CALLS[op], **options})


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan"), 1e-45, 1e39])
@pytest.mark.parametrize("op", [op for op in CALLS if op.startswith(("token", "linear"))])
def test_factors_that_make_nan_of_every_logit(op: str, value: float) -> None:
    factors = ("temperature", "ref_temperature", "logit_scale", "ref_logit_scale", "softcap")
    given: dict[str, Any]
    for name in inspect.signature(getattr(rf, op)).parameters:
        for given in ({name: value}, {name: torch.full((2, 3), value, dtype=torch.float64)}) if name in factors else ():
            if isinstance(given[name], torch.Tensor) and not name.endswith("temperature"):
                continue
            with pytest.raises(ValueError, match=rf"^rlhf_fast\.{op}: {name} must be .*got"):
                getattr(rf, op)(**{**CALLS[op], **given})


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize(
    ("op", "name"),
    [("ppo_advantages", "kl_coef"), ("linear_policy_loss", "kl_coef"), ("linear_policy_loss", "entropy_coef")],
)
def test_coefficients_are_finite(op: str, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^rlhf_fast\.{op}: {name} must be finite, got"):
        getattr(rf, op)(**{**CALLS[op], name: value})


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_normalizer_is_positive_at_real_tokens(value: float) -> None:
    """A row without a real token may have 0 of them."""
    mask, normalizer = torch.tensor([[True] * 3, [False] * 3]), torch.tensor([[3.0], [0.0]])
    given = {**CALLS["linear_policy_loss"], "mask": mask}
    assert rf.linear_policy_loss(**{**given, "normalizer": normalizer}).loss.isfinite()
    by_rows = {**given, "mask": None, "rows": torch.tensor([0, 1, 2, -1])}
    assert rf.linear_policy_loss(**{**by_rows, "normalizer": normalizer}).loss.isfinite()
    normalizer[0] = value
    for arguments in (given, by_rows):
        with pytest.raises(ValueError, match=r"^rlhf_fast\.linear_policy_loss: normalizer must be .*got"):
            rf.linear_policy_loss(**{**arguments, "normalizer": normalizer})


def test_a_clip_range_may_be_a_list() -> None:
    """As YAML gives it."""
    given = CALLS["linear_policy_loss"]
    first, second = (rf.linear_policy_loss(**{**given, "clip": clip}).loss for clip in ([0.2, 0.28], (0.2, 0.28)))
    assert torch.equal(first, second)


def test_public_functions_say_what_they_raise() -> None:
    functions = {name: getattr(rf, name) for name in (*CALLS, "use_backend")}
    functions |= {f"hf.{name}": f for name in rf.hf.__all__ if inspect.isfunction(f := getattr(rf.hf, name))}
    silent = [name for name, f in functions.items() if "Raises:" not in (f.__doc__ or "")]
    assert not silent


def test_gae_returns_named_fields() -> None:
    result = rf.gae(R, R)
    assert isinstance(result, rf.GAE) and result._fields == ("advantages", "returns")


@pytest.mark.parametrize("op", CALLS)
def test_distributed_tensors_are_refused(op: str) -> None:
    """All but the heads' weights, which `process_group` takes."""
    for name, x in CALLS[op].items():
        if isinstance(x, torch.Tensor) and "weight" not in name:
            distributed = x.clone()
            distributed.placements = ("Shard(0)",)
            with pytest.raises(TypeError, match=rf"rlhf_fast\.{op}: {name} must be a plain tensor, got a DTensor"):
                getattr(rf, op)(**{**CALLS[op], name: distributed})
