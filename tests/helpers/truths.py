# SPDX-License-Identifier: Apache-2.0
"""What every op means, written the plainest way there is: PyTorch's own functions, and loops for the recurrences.

The tests call these with float64 copies of the inputs for the truth, and with the inputs themselves for "eager PyTorch
in the same dtype". Nothing here is imported from rlhf_fast, so a mistake cannot be made twice in the same place.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Temperature = float | Tensor


def shaped_logits(
    logits: Tensor,  # (..., V)
    *,
    temperature: Temperature = 1.0,  # float, 0-dim or (...)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """The logits that the softmax sees: columns that count, then scale, then softcap, then temperature."""
    x = logits if vocab_size is None else logits[..., :vocab_size]
    x = x * logit_scale
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    if isinstance(temperature, Tensor) and temperature.dim() > 0:
        temperature = temperature.to(x.dtype).unsqueeze(-1)
    elif isinstance(temperature, Tensor):
        temperature = temperature.item()
    return x / temperature


def token_stats(logits: Tensor, targets: Tensor, *, mask: Tensor | None = None, **shaping: Any) -> dict[str, Tensor]:
    """All five statistics of softmax(shaped logits); targets (...) or (..., K). Masked rows give 0 everywhere."""
    x = shaped_logits(logits, **shaping)
    logp = torch.log_softmax(x, dim=-1)
    p = logp.exp()
    if mask is not None:  # garbage is allowed there, so point at a column that exists
        targets = torch.where(mask if targets.dim() < logits.dim() else mask.unsqueeze(-1), targets, 0)
    index = targets.long() if targets.dim() == logits.dim() else targets.long().unsqueeze(-1)
    picked = logp.gather(-1, index)
    stats = {
        "logprobs": picked if targets.dim() == logits.dim() else picked.squeeze(-1),
        "entropy": -torch.where(p > 0, p * logp, 0.0).sum(-1),
        "logsumexp": torch.logsumexp(x, dim=-1),
        "sum_sq_probs": (p * p).sum(-1),
        "argmax": x.argmax(-1),
    }
    if mask is None:
        return stats
    return {k: _zero_where_masked(v, mask) for k, v in stats.items()}


def _zero_where_masked(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask if x.dim() == mask.dim() else mask.unsqueeze(-1), x, torch.zeros_like(x))


def token_kl(
    logits: Tensor,  # (..., V)
    ref_logits: Tensor,  # (..., V)
    *,
    kind: str = "reverse",
    beta: float = 0.5,
    temperature: Temperature = 1.0,
    ref_temperature: Temperature | None = None,
    mask: Tensor | None = None,
    **shaping: Any,
) -> Tensor:  # (...)
    """Divergence of two softmaxes, summed over the vocabulary."""
    ref_temperature = temperature if ref_temperature is None else ref_temperature
    logp = torch.log_softmax(shaped_logits(logits, temperature=temperature, **shaping), -1)
    logq = torch.log_softmax(shaped_logits(ref_logits, temperature=ref_temperature, **shaping), -1)
    p, q = logp.exp(), logq.exp()
    if kind == "reverse":
        out = _kl(p, logp, logq)
    elif kind == "forward":
        out = _kl(q, logq, logp)
    elif kind == "jsd":
        logm = ((1 - beta) * p + beta * q).log()
        out = beta * _kl(q, logq, logm) + (1 - beta) * _kl(p, logp, logm)
    else:
        out = (p - q).abs().sum(-1) / 2
    return out if mask is None else torch.where(mask, out, torch.zeros_like(out))


def _kl(p: Tensor, logp: Tensor, logq: Tensor) -> Tensor:
    return torch.where(p > 0, p * (logp - logq), 0.0).sum(-1)


def approx_kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Schulman's estimators (http://joschu.net/blog/kl-approx.html), samples taken from the policy."""
    d = logprobs - ref_logprobs
    return {"k1": d, "k2": d * d / 2, "k3": (-d).exp() - 1 + d, "abs": d.abs()}[estimator]


def gae(
    rewards: Tensor,  # (B, T)
    values: Tensor,  # (B, T)
    *,
    mask: Tensor | None = None,
    dones: Tensor | None = None,
    truncated: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    value_lam: float | Tensor | None = None,
    mask_mode: str = "carry",
) -> tuple[Tensor, Tensor]:
    """GAE by the loop everybody writes (arXiv 1506.02438, eq. 16), a row and a token at a time, in Python floats."""
    rows, length = rewards.shape
    advantages, returns = torch.zeros(rows, length).double(), torch.zeros(rows, length).double()
    if value_lam is None:
        value_lam = lam
    for b in range(rows):
        real = [mask is None or bool(mask[b, t]) for t in range(length)]
        last = max((t for t in range(length) if real[t]), default=-1)
        lam_b, value_lam_b = _row(lam, b), _row(value_lam, b)
        next_value = next_advantage = next_value_advantage = 0.0
        for t in reversed(range(length)):
            if not real[t]:
                if mask_mode == "zero":  # a step with reward 0 and value 0
                    next_advantage = gamma * next_value + gamma * lam_b * next_advantage
                    next_value_advantage = gamma * next_value + gamma * value_lam_b * next_value_advantage
                    next_value = 0.0
                continue
            reward, value = rewards[b, t].item(), values[b, t].item()
            if _flag(truncated, b, t, last):
                next_advantage = next_value_advantage = 0.0
                next_value = _flag_value(bootstrap_values, b, t)
            if _flag(dones, b, t, last):
                next_value = next_advantage = next_value_advantage = 0.0
            delta = reward + gamma * next_value - value
            next_advantage = delta + gamma * lam_b * next_advantage
            next_value_advantage = delta + gamma * value_lam_b * next_value_advantage
            next_value = value
            advantages[b, t] = next_advantage
            returns[b, t] = next_value_advantage + value
    return advantages, returns


def vtrace(
    rewards: Tensor,  # (B, T)
    values: Tensor,
    log_ratios: Tensor,
    *,
    mask: Tensor | None = None,
    dones: Tensor | None = None,
    truncated: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 1.0,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
    mask_mode: str = "carry",
) -> tuple[Tensor, Tensor]:
    """V-trace by the sum of arXiv 1802.01561, eq. 1, not by its recurrence: v_s = V_s + sum over the episode's t >= s
    of gamma^(t - s) (c_s ... c_(t-1)) rho_t (r_t + gamma V_(t+1) - V_t); of every token the whole, in Python floats."""
    rows, length = rewards.shape
    advantages, returns = torch.zeros(rows, length).double(), torch.zeros(rows, length).double()
    for b in range(rows):
        real = [mask is None or bool(mask[b, t]) for t in range(length)]
        last = max((t for t in range(length) if real[t]), default=-1)
        steps = [t for t in range(length) if real[t] or mask_mode == "zero"]
        number = lambda x, t: x[b, t].item() if real[t] else 0.0  # noqa: B023, E731
        v: dict[int, float] = {}
        following: dict[int, tuple[float, bool]] = {}  # the next value, and whether the episode goes on
        errors: dict[int, float] = {}  # rho_t delta_t
        for i, t in enumerate(steps):
            after = steps[i + 1] if i + 1 < len(steps) else None
            following[t] = (0.0, False) if after is None else (number(values, after), True)
            if real[t] and _flag(truncated, b, t, last):
                following[t] = _flag_value(bootstrap_values, b, t), False
            if real[t] and _flag(dones, b, t, last):
                following[t] = 0.0, False
            rho = min(rho_clip, _exp(number(log_ratios, t)))
            errors[t] = rho * (number(rewards, t) + gamma * following[t][0] - number(values, t))
        for i, s in enumerate(steps):
            total, weight = number(values, s), 1.0
            for t in steps[i:]:
                total += weight * errors[t]
                weight *= gamma * lam * min(c_clip, _exp(number(log_ratios, t)))
                if not following[t][1]:
                    break
            v[s] = total
        for i, t in enumerate(steps):
            if real[t]:
                next_v = v[steps[i + 1]] if following[t][1] else following[t][0]
                rho = min(rho_clip, _exp(number(log_ratios, t)))
                advantages[b, t] = rho * (number(rewards, t) + gamma * next_v - number(values, t))
                returns[b, t] = v[t]
    return advantages, returns


def retrace(
    rewards: Tensor,  # (B, T)
    q_values: Tensor,
    values: Tensor,
    log_ratios: Tensor,
    *,
    mask: Tensor | None = None,
    dones: Tensor | None = None,
    truncated: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 1.0,
    mask_mode: str = "carry",
) -> Tensor:
    """Retrace by the sum of arXiv 1606.02647, eq. 3: Q_t + sum over s >= t of gamma^(s - t) c_(t+1) ... c_s delta_s,
    c_s = lam min(1, ratio_s), delta_s = r_s + gamma V_(s+1) - Q_s; of every token the whole, in Python floats."""
    targets = torch.zeros(rewards.shape).double()
    for b in range(rewards.shape[0]):
        real = [mask is None or bool(mask[b, t]) for t in range(rewards.shape[1])]
        last = max((t for t in range(len(real)) if real[t]), default=-1)
        steps = [t for t in range(len(real)) if real[t] or mask_mode == "zero"]
        number = lambda x, t: x[b, t].item() if real[t] else 0.0  # noqa: B023, E731
        for i, first in enumerate(steps):
            total, weight = number(q_values, first), 1.0
            for t, after in zip(steps[i:], [*steps[i + 1 :], None], strict=True):
                done = real[t] and _flag(dones, b, t, last)
                cut = real[t] and not done and _flag(truncated, b, t, last)
                following = 0.0 if done or after is None else number(values, after)
                if cut:
                    following = _flag_value(bootstrap_values, b, t)
                total += weight * (number(rewards, t) + gamma * following - number(q_values, t))
                if done or cut or after is None:
                    break
                weight *= gamma * lam * min(1.0, _exp(number(log_ratios, after)))
            targets[b, first] = total if real[first] else 0.0
    return targets


def _exp(x: float) -> float:
    """Infinite where it overflows, but 0 only of -inf."""
    return math.inf if x > 700 else 0.0 if x == -math.inf else math.exp(max(x, -700.0))


def _row(x: float | Tensor, b: int) -> float:
    return x[b].item() if isinstance(x, Tensor) and x.dim() else float(x)


def _flag(flags: Tensor | None, b: int, t: int, last: int) -> bool:
    if flags is None:
        return False
    return bool(flags[b, t]) if flags.dim() == 2 else bool(flags[b]) and t == last


def _flag_value(values: Tensor | None, b: int, t: int) -> float:
    assert values is not None
    return (values[b, t] if values.dim() == 2 else values[b]).item()


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over the real tokens, variance with n - 1."""
    x = values[mask].double()
    if x.numel() == 0:
        return torch.zeros(values.shape).double()
    variance = x.var(unbiased=True) if x.numel() > 1 else torch.zeros(()).double()
    white = (x - x.mean()) * torch.rsqrt(variance + 1e-8)
    out = torch.zeros(values.shape).double()
    out[mask] = white if shift_mean else white + x.mean()
    return out


def ppo_advantages(
    scores: Tensor,  # (B,)
    logprobs: Tensor,  # (B, T)
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    estimator: str = "k1",
    gamma: float = 1.0,
    lam: float = 0.95,
    score_clip: float | None = None,
    whiten: bool = True,
) -> dict[str, Tensor]:
    """The classic chain: KL, penalised rewards, score on the last real token, GAE, whitening."""
    kl = approx_kl(logprobs.double(), ref_logprobs.double(), estimator)
    kl = torch.where(mask, kl, torch.zeros_like(kl))
    rewards = -kl_coef * kl
    for b in range(scores.numel()):
        real = mask[b].nonzero().flatten().tolist()
        if real:
            score = scores[b].item()
            rewards[b, real[-1]] += score if score_clip is None else max(-score_clip, min(score_clip, score))
    advantages, returns = gae(rewards, values.double(), mask=mask, gamma=gamma, lam=lam)
    if whiten:
        advantages = masked_whiten(advantages, mask)
    return {"kl": kl, "rewards": rewards, "advantages": advantages, "returns": returns}


def linear_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """hidden (..., H), weight (V, H) -> (..., V)."""
    return torch.nn.functional.linear(hidden, weight, bias)


def token_loss(name: str, logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, clip: Any, dual: float) -> Tensor:
    """Each token's policy loss for autograd, by the papers' formulas (see rlhf_fast/ops/token_losses.py)."""
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    ratio = log_ratio.exp()
    limited = ratio.clamp(1 - low, 1 + high)
    if name == "cispo":
        return -limited.detach() * advantages * logprobs
    loss = -torch.minimum(ratio * advantages, limited * advantages)
    if name == "dual_clip":
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual * advantages), loss)
    return loss
