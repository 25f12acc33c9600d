# SPDX-License-Identifier: Apache-2.0
"""Wrong input: a ValueError or TypeError that starts with the op and the argument, before any kernel runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import rlhf_fast as rf

X = torch.randn(2, 3, 7)
T = torch.zeros(2, 3, dtype=torch.int64)
M = torch.ones(2, 3, dtype=torch.bool)
R = torch.randn(2, 3)
H, W, S = torch.randn(2, 3, 4), torch.randn(7, 4), torch.randn(2)
FLAGS = torch.zeros(2, 3, dtype=torch.bool)


def logprobs(logits: Any = X, targets: Any = T, **options: Any) -> Any:
    return rf.token_logprobs(logits, targets, **options)


def stats(logits: Any = X, targets: Any = T, **options: Any) -> Any:
    return rf.token_stats(logits, targets, **options)


def kl(logits: Any = X, ref_logits: Any = X, **options: Any) -> Any:
    return rf.token_kl(logits, ref_logits, **options)


def approx(logprobs: Any = R, ref_logprobs: Any = R, **options: Any) -> Any:
    return rf.approx_kl(logprobs, ref_logprobs, **options)


def gae(rewards: Any = R, values: Any = R, **options: Any) -> Any:
    return rf.gae(rewards, values, **options)


def packed(cu_seqlens: Any, rewards: Any = R[0], values: Any = R[0], **options: Any) -> Any:
    return rf.gae(rewards, values, cu_seqlens=cu_seqlens, **options)


def ppo(
    scores: Any = S, logprobs: Any = R, ref_logprobs: Any = R, values: Any = R, mask: Any = M, **options: Any
) -> Any:
    return rf.ppo_advantages(scores, logprobs, ref_logprobs, values, mask, **{"kl_coef": 0.1, **options})


def linear(hidden: Any = H, weight: Any = W, targets: Any = T, **options: Any) -> Any:
    return rf.linear_token_logprobs(hidden, weight, targets, **options)


def linear_stats(hidden: Any = H, weight: Any = W, targets: Any = T, **options: Any) -> Any:
    return rf.linear_token_stats(hidden, weight, targets, **options)


def linear_kl(hidden: Any = H, weight: Any = W, ref_hidden: Any = H, ref_weight: Any = W, **options: Any) -> Any:
    return rf.linear_token_kl(hidden, weight, ref_hidden, ref_weight, **options)


def policy(hidden: Any = H, weight: Any = W, targets: Any = T, **options: Any) -> Any:
    given = {"old_logprobs": R, "advantages": R, "mask": M, **options}
    return rf.linear_policy_loss(hidden, weight, targets, **given)


# (call, op, argument, error) - the message must begin "rlhf_fast.<op>: <argument> ".
ErrorCases = list[tuple[str, dict[str, Any], type[Exception] | tuple[type[Exception], ...]]]

SHARED_ROW_ERRORS: ErrorCases = [
    ("temperature", {"temperature": 0.0}, ValueError),
    ("temperature", {"temperature": -1.0}, ValueError),
    ("temperature", {"temperature": float("nan")}, ValueError),
    ("temperature", {"temperature": torch.ones(3)}, ValueError),
    ("temperature", {"temperature": torch.zeros(2, 3)}, ValueError),
    ("softcap", {"softcap": 0.0}, ValueError),
    ("softcap", {"softcap": -3.0}, ValueError),
    ("mask", {"mask": M.int()}, TypeError),
    ("mask", {"mask": M.float()}, TypeError),
    ("mask", {"mask": M[:, :2]}, ValueError),
    ("mask", {"mask": M.unsqueeze(-1)}, ValueError),
    ("vocab_size", {"vocab_size": 8}, ValueError),
    ("vocab_size", {"vocab_size": 0}, ValueError),
]
TARGET_ERRORS: ErrorCases = [
    ("targets", {"targets": T[:, :2]}, ValueError),
    ("targets", {"targets": T.unsqueeze(-1).unsqueeze(-1)}, ValueError),
    ("targets", {"targets": T.float()}, TypeError),
    ("targets", {"targets": T.bool()}, TypeError),
    ("targets", {"targets": T + 7}, ValueError),
    ("targets", {"targets": T - 1}, ValueError),
    ("targets", {"targets": T - 100}, ValueError),
    ("targets", {"targets": T + 6, "vocab_size": 6}, ValueError),
    ("targets", {"targets": None}, (TypeError, ValueError)),
    ("targets", {"targets": T.to("meta")}, ValueError),
]
LOGITS_ERRORS: ErrorCases = [
    ("logits", {"logits": X.int()}, TypeError),
    ("logits", {"logits": X.to(torch.complex64)}, TypeError),
    ("logits", {"logits": X.tolist()}, TypeError),
    ("logits", {"logits": torch.tensor(1.0)}, ValueError),
]
OUTPUT_ERRORS: ErrorCases = [
    ("outputs", {"outputs": ("logprob",)}, ValueError),
    ("outputs", {"outputs": "entropy"}, TypeError),
]
KL_ERRORS: ErrorCases = [
    ("ref_logits", {"ref_logits": X[..., :5]}, ValueError),
    ("ref_logits", {"ref_logits": X[:1]}, ValueError),
    ("ref_logits", {"ref_logits": X.bfloat16()}, TypeError),
    ("ref_logits", {"ref_logits": X.to("meta")}, ValueError),
    ("ref_temperature", {"ref_temperature": 0.0}, ValueError),
    ("ref_temperature", {"ref_temperature": torch.ones(2)}, ValueError),
    ("kind", {"kind": "backward"}, ValueError),
    ("beta", {"kind": "jsd", "beta": -0.1}, ValueError),
    ("beta", {"kind": "jsd", "beta": 1.1}, ValueError),
]
APPROX_ERRORS: ErrorCases = [
    ("logprobs", {"logprobs": R.long()}, TypeError),
    ("ref_logprobs", {"ref_logprobs": R[:, :2]}, ValueError),
    ("ref_logprobs", {"ref_logprobs": R.half()}, TypeError),
    ("importance_ratio", {"importance_ratio": R[:1]}, ValueError),
    ("importance_ratio", {"importance_ratio": R.double()}, TypeError),
    ("estimator", {"estimator": "k4"}, ValueError),
    ("gradient", {"gradient": "none"}, ValueError),
    ("clamp", {"clamp": -1.0}, ValueError),
    ("mask", {"mask": M.long()}, TypeError),
    ("mask", {"mask": M[:, :1]}, ValueError),
]
GAE_ERRORS: ErrorCases = [
    ("rewards", {"rewards": R.int()}, TypeError),
    ("rewards", {"rewards": X}, ValueError),
    ("rewards", {"rewards": R[0], "values": R[0]}, ValueError),
    ("values", {"values": R[:, :2]}, ValueError),
    ("values", {"values": R.bfloat16()}, TypeError),
    ("values", {"values": R.to("meta")}, ValueError),
    ("mask", {"mask": M.float()}, TypeError),
    ("mask", {"mask": M[:1]}, ValueError),
    ("dones", {"dones": FLAGS.int()}, TypeError),
    ("dones", {"dones": FLAGS[:, :2]}, ValueError),
    ("truncated", {"truncated": FLAGS}, ValueError),
    ("truncated", {"bootstrap_values": R}, ValueError),
    ("truncated", {"truncated": FLAGS.float(), "bootstrap_values": R}, TypeError),
    ("bootstrap_values", {"truncated": FLAGS, "bootstrap_values": R.half()}, TypeError),
    ("bootstrap_values", {"truncated": FLAGS, "bootstrap_values": R[:, :1]}, ValueError),
    ("gamma", {"gamma": 1.01}, ValueError),
    ("gamma", {"gamma": -0.1}, ValueError),
    ("lam", {"lam": 1.5}, ValueError),
    ("lam", {"lam": torch.ones(3)}, ValueError),
    ("value_lam", {"value_lam": -1.0}, ValueError),
    ("mask_mode", {"mask_mode": "skip"}, ValueError),
]
PACKED_ERRORS: ErrorCases = [
    ("cu_seqlens", {"cu_seqlens": torch.tensor([0.0, 3.0])}, TypeError),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 2])}, ValueError),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([1, 3])}, ValueError),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 2, 1, 3])}, ValueError),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 4])}, ValueError),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([[0, 3]])}, ValueError),
    ("rewards", {"cu_seqlens": torch.tensor([0, 2]), "rewards": R, "values": R}, ValueError),
    ("lam", {"cu_seqlens": torch.tensor([0, 1, 3]), "lam": torch.ones(3)}, ValueError),
]
PPO_ERRORS: ErrorCases = [
    ("scores", {"scores": R}, ValueError),
    ("scores", {"scores": S.double()}, TypeError),
    ("logprobs", {"logprobs": R[0]}, ValueError),
    ("ref_logprobs", {"ref_logprobs": R[:, :2]}, ValueError),
    ("values", {"values": R.half()}, TypeError),
    ("mask", {"mask": M.float()}, TypeError),
    ("mask", {"mask": M[:, :2]}, ValueError),
    ("mask", {"mask": None}, TypeError),
    ("estimator", {"estimator": "k5"}, ValueError),
    ("gamma", {"gamma": 2.0}, ValueError),
    ("lam", {"lam": -0.5}, ValueError),
    ("score_clip", {"score_clip": -1.0}, ValueError),
]
LINEAR_ERRORS: ErrorCases = [
    ("hidden", {"hidden": H.int()}, TypeError),
    ("hidden", {"hidden": torch.tensor(1.0)}, ValueError),
    ("weight", {"weight": W.t()}, ValueError),
    ("weight", {"weight": W[0]}, ValueError),
    ("weight", {"weight": W.bfloat16()}, TypeError),
    ("weight", {"weight": W.to("meta")}, ValueError),
    ("bias", {"bias": torch.zeros(4)}, ValueError),
    ("bias", {"bias": torch.zeros(7).half()}, TypeError),
    ("memory_budget", {"memory_budget": -1}, ValueError),
    ("logits_dtype", {"logits_dtype": torch.bfloat16}, ValueError),
]
LORA_ERRORS: ErrorCases = [
    ("lora", {"lora": (torch.ones(2, 4), torch.ones(7, 2))}, TypeError),
    ("lora", {"lora": (torch.ones(2, 5), torch.ones(7, 2), 1.0)}, ValueError),
    ("lora", {"lora": (torch.ones(2, 4), torch.ones(6, 2), 1.0)}, ValueError),
    ("lora", {"lora": (torch.ones(2, 4), torch.ones(7, 3), 1.0)}, ValueError),
    ("lora", {"lora": (torch.ones(2, 4).half(), torch.ones(7, 2), 1.0)}, TypeError),
]
LINEAR_KL_ERRORS: ErrorCases = [
    ("ref_hidden", {"ref_hidden": H[:1]}, ValueError),
    ("ref_hidden", {"ref_hidden": H.bfloat16(), "ref_weight": W.bfloat16()}, TypeError),
    ("ref_weight", {"ref_weight": W[:5]}, ValueError),
    ("ref_weight", {"ref_weight": W.t()}, ValueError),
    ("ref_bias", {"ref_bias": torch.zeros(3)}, ValueError),
    ("ref_temperature", {"ref_temperature": 0.0}, ValueError),
    ("ref_softcap", {"ref_softcap": -1.0}, ValueError),
    ("kind", {"kind": "backward"}, ValueError),
    ("beta", {"kind": "jsd", "beta": 1.0}, ValueError),
]
POLICY_ERRORS: ErrorCases = [
    ("mask", {"mask": None}, TypeError),
    ("targets", {"targets": T.unsqueeze(-1)}, ValueError),
    ("old_logprobs", {"old_logprobs": R[:, :2]}, ValueError),
    ("old_logprobs", {"old_logprobs": T}, TypeError),
    ("advantages", {"advantages": R[0]}, ValueError),
    ("ref_logprobs", {"kl_coef": 0.1}, ValueError),
    ("ref_logprobs", {"kl_coef": 0.1, "ref_logprobs": R[:1]}, ValueError),
    ("ref_hidden", {"kl_coef": 0.1, "estimator": "exact"}, ValueError),
    ("ref_weight", {"kl_coef": 0.1, "estimator": "exact", "ref_hidden": H}, ValueError),
    ("ref_weight", {"kl_coef": 0.1, "estimator": "exact", "ref_hidden": H, "ref_weight": W[:3]}, ValueError),
    ("estimator", {"estimator": "k5"}, ValueError),
    ("ref_hidden", {"ref_hidden": "x", "ref_weight": W}, TypeError),
    ("ref_hidden", {"ref_weight": W}, ValueError),
    ("ref_hidden", {"ref_bias": 3}, ValueError),
    ("ref_weight", {"ref_hidden": H, "ref_weight": W[:3]}, ValueError),
    ("ref_bias", {"ref_hidden": H, "ref_weight": W, "ref_bias": 3}, TypeError),
    ("ref_logprobs", {"estimator": "exact", "ref_hidden": H, "ref_weight": W, "ref_logprobs": "x"}, TypeError),
    ("kl_gradient", {"kl_gradient": "k2"}, ValueError),
    ("objective", {"objective": "gspo"}, ValueError),
    ("clip", {"clip": -0.1}, ValueError),
    ("dual_clip", {"dual_clip": 0.9}, ValueError),
    ("normalizer", {"normalizer": 0.0}, ValueError),
    ("normalizer", {"normalizer": torch.ones(5)}, ValueError),
]

CASES: list[tuple[Callable[..., Any], str, str, dict[str, Any], Any]] = [
    (call, op, *case)
    for call, op, cases in [
        (logprobs, "token_logprobs", LOGITS_ERRORS + TARGET_ERRORS + SHARED_ROW_ERRORS),
        (stats, "token_stats", LOGITS_ERRORS + TARGET_ERRORS + SHARED_ROW_ERRORS + OUTPUT_ERRORS),
        (kl, "token_kl", LOGITS_ERRORS + KL_ERRORS + SHARED_ROW_ERRORS),
        (approx, "approx_kl", APPROX_ERRORS),
        (gae, "gae", GAE_ERRORS),
        (packed, "gae", PACKED_ERRORS),
        (ppo, "ppo_advantages", PPO_ERRORS),
        (linear, "linear_token_logprobs", LINEAR_ERRORS + LORA_ERRORS + TARGET_ERRORS + SHARED_ROW_ERRORS),
        (linear_stats, "linear_token_stats", LINEAR_ERRORS + TARGET_ERRORS + SHARED_ROW_ERRORS + OUTPUT_ERRORS),
        (linear_kl, "linear_token_kl", LINEAR_ERRORS + LORA_ERRORS + LINEAR_KL_ERRORS + SHARED_ROW_ERRORS),
        (policy, "linear_policy_loss", LINEAR_ERRORS + LORA_ERRORS + POLICY_ERRORS + TARGET_ERRORS + SHARED_ROW_ERRORS),
    ]
    for case in cases
]


def _id(case: Any) -> str:
    _, op, argument, options, _ = case
    given = options.get(argument)
    if isinstance(given, torch.Tensor):
        given = f"{tuple(given.shape)}-{str(given.dtype).removeprefix('torch.')}-{given.device}"
    return f"{op}-{argument}-{'a list' if isinstance(given, list) else given}"  # of random numbers


@pytest.mark.parametrize("case", CASES, ids=_id)
def test_message_begins_with_op_and_argument(case: Any) -> None:
    call, op, argument, options, error = case
    with pytest.raises(error, match=rf"^rlhf_fast\.{op}: {argument}\b"):
        call(**options)


def test_message_tells_what_was_wanted_and_what_came() -> None:
    with pytest.raises(ValueError, match=r"values must have the shape of rewards.*\(2, 3\).*got \(2, 2\)"):
        gae(values=R[:, :2])
    with pytest.raises(ValueError, match=r"targets.*between 0 and 6, got 12"):
        logprobs(targets=T + 12)
    with pytest.raises(TypeError, match=r"mask.*bool.*got torch.int64"):
        kl(mask=M.long())
    with pytest.raises(ValueError, match=r"kind.*reverse.*forward.*jsd.*tv.*got 'Reverse'"):
        kl(kind="Reverse")


def test_masked_whiten_errors() -> None:
    for error, args in [
        (TypeError, (R.int(), M)),
        (TypeError, (R, M.float())),
        (ValueError, (R, M[:, :2])),
        (TypeError, (R, None)),
    ]:
        with pytest.raises(error, match=r"^rlhf_fast\.masked_whiten: (values|mask)\b"):
            rf.masked_whiten(*args)  # type: ignore[arg-type]


def test_options_are_keyword_only() -> None:
    for call in (lambda: rf.token_logprobs(X, T, 1.0), lambda: rf.gae(R, R, M), lambda: rf.token_kl(X, X, "reverse")):
        with pytest.raises(TypeError):
            call()
