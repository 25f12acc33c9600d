# SPDX-License-Identifier: Apache-2.0
"""Demonstrations in the update (PPO-ptx): their gradient, and those that are too long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ppo_runs import load_agent, prompts_of, replace, steps, train_step

from rlhf_fast.data.examples import read_sft
from rlhf_fast.data.limits import Limits
from rlhf_fast.errors import UserError
from rlhf_fast.models.heads import token_logprobs
from rlhf_fast.trainer import PPOConfig
from rlhf_fast.trainer.rl import ptx
from rlhf_fast.trainer.rl.prompts import draw
from rlhf_fast.trainer.rl.ptx import Demonstrations, encode_demonstrations
from rlhf_fast.trainer.rl.settings import Settings
from rlhf_fast.trainer.sft import labels


def test_demonstrations_are_learned_beside_the_reward(
    config: PPOConfig, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient is that of plain PPO plus ptx_coef times that of the demonstrations' mean loss."""
    config = replace(config, ptx_file=str(tiny / "sft.jsonl"), ptx_coef=0.5, num_minibatches=1)
    found: list[dict[str, Any]] = []
    for demonstrations in (True, False):
        agent = load_agent(config)
        if demonstrations:
            lines = read_sft(config.ptx_file or "")
            options = Settings(config).ptx
            agent.demonstrations = encode_demonstrations(lines, agent.policy, agent.tokenizer, options)
            whole = agent.demonstrations.batch
            learned = [ids[mask] for ids, mask in zip(whole.input_ids, whole.mask, strict=True)]
            texts = agent.tokenizer.batch_decode(learned, skip_special_tokens=True)
            assert [text.strip() for text in texts] == [str(line.completion).strip() for line in lines]
            batch = whole.rows(torch.tensor(draw(16, 16, len(lines), config.seed + 1)))
            agent.policy.zero_grad()
            loss = -token_logprobs(agent.policy, batch).sum() / batch.mask.sum()
            (0.5 * loss).backward()
            assert 0 < float(batch.mask.sum()) < float(batch.attention_mask.sum())
            extra = {name: p.grad.clone() for name, p in agent.policy.named_parameters()}
            agent.policy.zero_grad()
        kept: dict[str, Any] = {}
        step = agent.policy_optimizer.step

        def watched(norm: float | None, agent: Any = agent, kept: Any = kept, step: Any = step) -> float:
            kept.update({name: p.grad.clone() for name, p in agent.policy.named_parameters()})
            return float(step(norm))

        agent.policy_optimizer.step = watched  # type: ignore[method-assign]
        figures = train_step(agent, prompts_of(config, agent), config, 1)
        found.append(kept)
        assert not demonstrations or figures["loss/ptx"] == pytest.approx(loss.item(), rel=1e-4)
    for name, gradient in extra.items():
        torch.testing.assert_close(found[0][name], found[1][name] + gradient, atol=1e-5, rtol=1e-3)
    numbers: list[int] = []
    backward = Demonstrations.backward

    def noted(demonstrations: Demonstrations, policy: Any, number: int, count: int) -> Any:
        numbers.append(number)
        assert count == demonstrations.options.stride == 8  # as many as samples
        return backward(demonstrations, policy, number, count)

    monkeypatch.setattr(Demonstrations, "backward", noted)
    rows = steps(config, tmp_path / "run", max_steps=2, epochs=2, num_minibatches=2)
    assert "loss/ptx" in rows[0] and numbers == list(range(8))  # each optimizer step has others
    pairs = replace(config, objective="dpo", num_minibatches=2)
    strides = [Settings(replace(pairs, dpo_pairs=which).resolved()).ptx.stride for which in ("best-worst", "all")]
    assert strides == [4, 8]


def test_a_smaller_step_goes_on_where_the_one_before_ended(
    config: PPOConfig, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps get smaller if max_seconds is near; their demonstrations must not start over."""
    config = replace(config, ptx_file=str(tiny / "sft.jsonl"), num_minibatches=2)
    agent, options = load_agent(config), Settings(config).ptx
    demonstrations = encode_demonstrations(read_sft(config.ptx_file or ""), agent.policy, agent.tokenizer, options)
    places: list[tuple[int, int]] = []
    monkeypatch.setattr(
        ptx, "draw", lambda place, count, *rest: places.append((place, count)) or draw(place, count, *rest)
    )
    for number, count in ((0, 8), (1, 8), (2, 4), (3, 2)):
        demonstrations.backward(agent.policy, number, count)
    assert places == [(0, 8), (8, 8), (16, 4), (24, 2)]


def test_long_demonstrations_are_cut_dropped_or_an_error_as_in_sft(
    config: PPOConfig, tiny: Path, write_jsonl: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = load_agent(config)
    rows = [{"prompt": "ann wants animals", "completion": " cat" * 40}, {"prompt": "ann " * 40, "completion": " cat"}]
    lines = read_sft(write_jsonl("long.jsonl", *rows))

    def encoded(**values: Any) -> list[list[int]]:
        options = Settings(replace(config, ptx_file="x", **values)).ptx
        batch = encode_demonstrations(lines, agent.policy, agent.tokenizer, options).batch
        return [ids[mask].tolist() for ids, mask in zip(batch.input_ids, batch.mask, strict=True)]

    for overlong, kept in (("drop", 1), ("truncate-left", 2)):
        wanted = labels.encode(agent.tokenizer, lines, Limits(config.max_length, overlong))  # type: ignore[arg-type]
        told = capsys.readouterr().err
        found = encoded(overlong=overlong)
        assert found == [[label for label in one["labels"] if label >= 0] for one in wanted] and len(found) == kept
        assert told.count("were cut") == capsys.readouterr().err.count("were cut") == 1
    with pytest.raises(UserError, match="long.jsonl:1: it has 4. tokens, more than max_length 32"):
        encoded(overlong="error")
