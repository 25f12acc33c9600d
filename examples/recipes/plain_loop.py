# SPDX-License-Identifier: Apache-2.0
"""RLHF with PPO in a plain PyTorch loop: log-probs, KL-penalised rewards, GAE and whitening by rlhf_fast.

    python examples/recipes/plain_loop.py

Language model (a trunk that computes hidden states, and a matrix as head) and reward model (it prefers tokens of the
upper half of the vocabulary) are stand-ins. Responses end at token 0, so rows have different lengths.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import rlhf_fast as rf

VOCAB, WIDTH, PROMPT, NEW, BATCH = 64, 48, 4, 12, 64
TEMPERATURE, KL_COEF, CLIP = 0.9, 0.02, 0.2


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(VOCAB, WIDTH), nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head, self.value = nn.Linear(WIDTH, VOCAB, bias=False), nn.Linear(WIDTH, 1)

    def trunk(self, ids: Tensor) -> Tensor:  # (B, T) -> (B, T, H)
        return self.rnn(self.embed(ids))[0]


def response_logprobs(policy: Policy, hidden: Tensor, response: Tensor, mask: Tensor) -> Tensor:
    """(B, NEW); only real tokens reach the head, and only a tile of logits exists at a time."""
    return rf.linear_token_logprobs(hidden, policy.head.weight, response, mask=mask, temperature=TEMPERATURE)


@torch.no_grad()
def sample(policy: Policy) -> tuple[Tensor, Tensor]:
    """ids (B, PROMPT + NEW) and mask (B, NEW), True up to and with the first token 0."""
    ids = torch.randint(1, VOCAB, (BATCH, PROMPT))
    for _ in range(NEW):
        logits = policy.head(policy.trunk(ids)[:, -1]) / TEMPERATURE
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], dim=1)
    ended = (ids[:, PROMPT:] == 0).cumsum(1)
    return ids, (ended - (ids[:, PROMPT:] == 0).long()) == 0


def score(ids: Tensor, mask: Tensor) -> Tensor:
    """(B,) scores of the reward model."""
    return ((ids[:, PROMPT:] >= VOCAB // 2) & mask).sum(1) / mask.sum(1)


def main(steps: int = 60) -> list[float]:
    """Mean score of each step."""
    torch.manual_seed(0)
    policy, reference = Policy(), Policy()
    reference.load_state_dict(policy.state_dict())
    optimizer, history = torch.optim.Adam(policy.parameters(), lr=5e-3), []
    states = slice(PROMPT - 1, PROMPT + NEW - 1)  # the hidden states that predict the response
    for step in range(steps):
        ids, mask = sample(policy)
        response, scores = ids[:, PROMPT:], score(ids, mask)
        with torch.no_grad():
            hidden, ref_hidden = policy.trunk(ids)[:, states], reference.trunk(ids)[:, states]
            old_logprobs = response_logprobs(policy, hidden, response, mask)
            ref_logprobs = response_logprobs(reference, ref_hidden, response, mask)
            values = policy.value(hidden)[..., 0]
        result = rf.ppo_advantages(scores, old_logprobs, ref_logprobs, values, mask, kl_coef=KL_COEF)
        for _ in range(2):
            hidden = policy.trunk(ids)[:, states]
            log_ratio = response_logprobs(policy, hidden, response, mask) - old_logprobs
            ratio = log_ratio.clamp(-rf.LOG_RATIO_LIMIT, rf.LOG_RATIO_LIMIT).exp()  # without the limit it may be inf
            surrogate = torch.min(ratio * result.advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * result.advantages)
            value_errors = (policy.value(hidden)[..., 0] - result.returns) ** 2
            loss = ((0.5 * value_errors - surrogate) * mask).sum() / mask.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        history.append(scores.mean().item())
        if step % 10 == 9:
            print(f"step {step + 1:3d}  score {history[-1]:.3f}  KL {(result.kl.sum() / mask.sum()).item():.4f}")
    return history


if __name__ == "__main__":
    main()
