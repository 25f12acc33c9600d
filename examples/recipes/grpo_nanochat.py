# SPDX-License-Identifier: Apache-2.0
"""GRPO as nanochat's scripts/chat_rl.py writes it, with rlhf_fast for the log-probs.

    python examples/recipes/grpo_nanochat.py

As there: on-policy, so no ratio and no clipping; advantage = reward - mean of the prompt's samples; the loss is
normalised over tokens. nanochat has no KL; here a small one keeps the policy close to its start. The task is a toy:
produce even tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import rlhf_fast as rf

VOCAB, WIDTH, PROMPT, NEW = 64, 48, 4, 12
SAMPLES, PROMPTS, KL_COEF = 8, 8, 0.02


class GPT(nn.Module):
    """Any language model: `trunk` returns hidden states (B, T, H), `lm_head` the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.rnn = nn.Embedding(VOCAB, WIDTH), nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)

    def trunk(self, idx: Tensor) -> Tensor:
        return self.rnn(self.wte(idx))[0]


def logprobs_of(model: GPT, inputs: Tensor, targets: Tensor) -> Tensor:
    """In nanochat `-model(inputs, targets, loss_reduction="none")`, with (B, T, V) logits. (B, T), 0 at target -1."""
    return rf.linear_token_logprobs(model.trunk(inputs), model.lm_head.weight, targets, mask=targets >= 0)


@torch.no_grad()
def generate(model: GPT, prompt: Tensor) -> Tensor:
    """(B, PROMPT) -> (B, PROMPT + NEW)"""
    ids = prompt
    for _ in range(NEW):
        logits = model.lm_head(model.trunk(ids)[:, -1])
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], dim=1)
    return ids


def get_batch(model: GPT) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """inputs, targets (B, T) with -1 where nothing is to be learned, rewards and advantages (B,)."""
    prompts = torch.randint(0, VOCAB, (PROMPTS, PROMPT)).repeat_interleave(SAMPLES, 0)
    ids = generate(model, prompts)
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[:, : PROMPT - 1] = -1
    rewards = (ids[:, PROMPT:] % 2 == 0).float().mean(1)
    groups = rewards.view(PROMPTS, SAMPLES)
    return inputs, targets, rewards, (groups - groups.mean(1, keepdim=True)).flatten()


def main(steps: int = 60) -> list[float]:
    """Mean reward of each step."""
    torch.manual_seed(0)
    model, reference = GPT(), GPT()
    reference.load_state_dict(model.state_dict())
    optimizer, history = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0), []
    for step in range(steps):
        inputs, targets, rewards, advantages = get_batch(model)
        logp = logprobs_of(model, inputs, targets)
        with torch.no_grad():
            ref_logp = logprobs_of(reference, inputs, targets)
        # The value of k3 with the gradient of the reverse KL (k2's), as GRPO's penalty intends.
        kl = rf.approx_kl(logp, ref_logp, estimator="k3", gradient="straight_through", mask=targets >= 0)
        num_valid = (targets >= 0).sum()
        loss = -((logp * advantages[:, None]).sum() - KL_COEF * kl.sum()) / num_valid
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(rewards.mean().item())
        if step % 10 == 9:
            print(f"step {step + 1:3d}  reward {history[-1]:.3f}  KL {(kl.detach().sum() / num_valid).item():.4f}")
    return history


if __name__ == "__main__":
    main()
