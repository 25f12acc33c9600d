# SPDX-License-Identifier: Apache-2.0
"""Sampling: from softmax(logits / temperature), pads and the batch change nothing, the masks are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast.models import heads
from rlhf_fast.models import loading as models
from rlhf_fast.rollout.builtin import draw, ends, generate
from rlhf_fast.rollout.rollout import SamplingParams

PROMPTS = [[5, 9, 11], [8], [6, 33, 21, 50, 4], [7, 19]]


@pytest.fixture(scope="module")
def lm(tiny: Path) -> Any:
    torch.manual_seed(0)
    model = models.load_causal_lm(str(tiny / "model"), "float32")
    for parameter in model.parameters():
        parameter.data.mul_(2.0)  # a random model of the usual scale hardly prefers one id over another
    return model


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return models.load_tokenizer(str(tiny / "model"))


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, float("-inf"), 2.0]])
    uniform = torch.arange(0.5, 20_000).double() / 20_000
    for temperature in (1.0, 0.5):
        drawn, support = draw(logits.expand(20_000, 5), uniform, SamplingParams(temperature=temperature))
        wanted = (logits / temperature).softmax(-1)[0]
        assert support is None
        torch.testing.assert_close(drawn.bincount(minlength=5) / 20_000, wanted, atol=2e-4, rtol=0)


def test_draws_at_the_edges_stay_inside() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]]).expand(2, 4)
    uniform = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    assert draw(logits, uniform, SamplingParams())[0].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, [1, 3]),
        ({"top_p": 0.5}, [3]),
        ({"top_p": 0.9}, [1, 3, 4]),
        ({"top_k": 3, "top_p": 0.6}, [1, 3]),
        ({"top_k": 99, "top_p": 0.999999}, [0, 1, 3, 4]),
        ({"top_p": 1e-9}, [3]),
    ],
)
def test_a_truncated_distribution_is_the_one_over_what_it_keeps(options: dict[str, Any], kept: list[int]) -> None:
    probabilities = torch.tensor([[0.05, 0.25, 0.0, 0.5, 0.2]])
    uniform = torch.arange(0.5, 20_000).double() / 20_000
    drawn, support = draw(probabilities.log().expand(20_000, 5), uniform, SamplingParams(**options))
    assert support is not None
    first = support.take(torch.tensor([0]))
    assert sorted(first.ids.tolist()) == kept and first.offsets.tolist() == [0, len(kept)]
    wanted = torch.zeros(5)
    wanted[kept] = probabilities[0, kept] / probabilities[0, kept].sum()
    torch.testing.assert_close(drawn.bincount(minlength=5) / 20_000, wanted, atol=2e-4, rtol=0)


def test_top_p_looks_at_the_whole_vocabulary_where_it_must() -> None:
    logits = torch.linspace(0, 0.1, 5000).expand(3, 5000)
    _, support = draw(logits, torch.tensor([0.1, 0.5, 0.9]).double(), SamplingParams(top_p=0.5))
    assert support is not None and 2300 < int(support.offsets[1]) < 2500


def test_kept_ids_follow_their_tokens_and_make_the_log_probabilities(lm: Any, tokenizer: Any) -> None:
    rollout = generate(
        lm,
        tokenizer,
        PROMPTS,
        SamplingParams(max_new_tokens=9, temperature=0.8, top_k=6, top_p=0.9),
        seed=3,
        samples_per_prompt=4,
    )
    assert rollout.support is not None and len(rollout.support.offsets) == int(rollout.response_mask.sum()) + 1
    logprobs = heads.token_logprobs(lm, rollout.batch, temperature=0.8)
    with torch.no_grad():
        logits = lm(rollout.input_ids, attention_mask=rollout.attention_mask).logits[:, :-1].float() / 0.8
    for number, (row, column) in enumerate(rollout.response_mask.nonzero().tolist()):
        kept = rollout.support.take(torch.tensor([number])).ids
        row_logits = logits[row, column - 1]
        assert set(kept.tolist()) <= set(row_logits.topk(6).indices.tolist())
        place = kept.tolist().index(int(rollout.input_ids[row, column]))
        assert float(logprobs[row, column].detach()) == pytest.approx(
            float(row_logits[kept].log_softmax(0)[place]), abs=1e-4
        )
    part = rollout.batch.rows(torch.tensor([5, 2]))  # a micro-batch takes its rows' own
    alone = heads.token_logprobs(lm, part, temperature=0.8)
    torch.testing.assert_close(alone, logprobs[[5, 2], : alone.shape[1]], atol=1e-5, rtol=1e-5)


def test_cold_sampling_is_the_greedy_generation_of_each_prompt_alone(lm: Any, tokenizer: Any) -> None:
    rollout = generate(
        lm, tokenizer, PROMPTS, SamplingParams(max_new_tokens=12, temperature=1e-4), seed=0, samples_per_prompt=2
    )
    for i, prompt in enumerate(PROMPTS):
        alone = lm.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=12, do_sample=False
        )[0].tolist()
        for row in (2 * i, 2 * i + 1):
            assert rollout.input_ids[row][rollout.attention_mask[row]].tolist() == alone


def test_masks_texts_and_ends_agree(lm: Any, tokenizer: Any) -> None:
    lm.lm_head.weight.data[tokenizer.eos_token_id] += 0.02  # so that some rows end early
    rollout = generate(
        lm, tokenizer, PROMPTS, SamplingParams(max_new_tokens=12, temperature=1.5), seed=1, samples_per_prompt=6
    )
    assert rollout.input_ids.shape == rollout.attention_mask.shape == rollout.response_mask.shape
    assert 0 < rollout.ended.sum() < len(rollout.texts)
    for row, text in enumerate(rollout.texts):
        prompt = PROMPTS[row // 6]
        real = rollout.input_ids[row][rollout.attention_mask[row]].tolist()
        response = rollout.input_ids[row][rollout.response_mask[row]].tolist()
        assert real == prompt + response and rollout.attention_mask[row, : len(real)].all()
        assert (response[-1] == tokenizer.eos_token_id) == bool(rollout.ended[row])
        assert tokenizer.eos_token_id not in response[:-1]
        assert len(response) == 12 or rollout.ended[row]
        assert text == tokenizer.decode(response, skip_special_tokens=True)


def test_the_seed_decides(lm: Any, tokenizer: Any) -> None:
    def texts(**source: Any) -> list[str]:
        return generate(lm, tokenizer, PROMPTS, SamplingParams(max_new_tokens=8), samples_per_prompt=3, **source).texts

    first = texts(seed=3)
    assert texts(seed=3) == first
    assert texts(seed=4) != first and len(set(first[:3])) == 3
    torch.manual_seed(3)
    assert texts() == first


def test_sampled_tokens_have_the_logprobs_of_the_scoring_pass(lm: Any, tokenizer: Any) -> None:
    """The mean of log p over many samples is minus the entropy: sampling and scoring speak of one distribution."""
    rollout = generate(
        lm, tokenizer, [[5, 9]], SamplingParams(max_new_tokens=1, temperature=0.7), seed=5, samples_per_prompt=4000
    )
    logprobs, entropy = heads.token_logprobs_entropy(lm, rollout.batch, temperature=0.7)
    mean, spread = logprobs.sum(1).mean(), logprobs.sum(1).std() / 4000**0.5
    assert abs(mean + entropy.sum(1).mean()) < 4 * spread


def test_rollouts_can_be_learned_from(lm: Any, tokenizer: Any) -> None:
    rollout = generate(lm, tokenizer, PROMPTS, SamplingParams(max_new_tokens=3), seed=0)
    heads.token_logprobs(lm, rollout.batch).sum().backward()
    lm.zero_grad()


def test_every_end_that_the_model_names_ends(lm: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm.generation_config, "eos_token_id", [13, 17])
    assert ends(lm, tokenizer) == sorted({13, 17, tokenizer.eos_token_id})
    monkeypatch.setattr(lm.generation_config, "eos_token_id", None)
    assert ends(lm, tokenizer) == [tokenizer.eos_token_id]
