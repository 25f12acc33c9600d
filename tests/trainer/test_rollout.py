# SPDX-License-Identifier: Apache-2.0
"""Sampling: the law is softmax(logits / temperature), pads and the batch change nothing, the masks are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast.models import heads
from rlhf_fast.models import loading as models
from rlhf_fast.models.generate import draw, ends, generate
from rlhf_fast.models.heads import LogitOptions

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


def test_draws_follow_the_law() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, float("-inf"), 2.0]])
    uniform = torch.arange(0.5, 20_000).double() / 20_000
    for temperature, options in ((1.0, LogitOptions()), (0.5, LogitOptions()), (1.0, LogitOptions(2.0, 1.5))):
        drawn = draw(logits.expand(20_000, 5), uniform, temperature, options)
        scaled = logits * options.logit_scale
        if options.softcap:
            scaled = torch.tanh(scaled / options.softcap) * options.softcap
        law = (scaled / temperature).softmax(-1)[0]
        torch.testing.assert_close(drawn.bincount(minlength=5) / 20_000, law, atol=2e-4, rtol=0)


def test_draws_at_the_edges_stay_inside() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]]).expand(2, 4)
    uniform = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    assert draw(logits, uniform, 1.0, LogitOptions()).tolist() == [1, 2]


def test_cold_sampling_is_the_greedy_generation_of_each_prompt_alone(lm: Any, tokenizer: Any) -> None:
    made = generate(lm, tokenizer, PROMPTS, max_new_tokens=12, temperature=1e-4, seed=0, samples_per_prompt=2)
    for i, prompt in enumerate(PROMPTS):
        alone = lm.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=12, do_sample=False
        )[0].tolist()
        for row in (2 * i, 2 * i + 1):
            assert made.input_ids[row][made.attention_mask[row]].tolist() == alone


def test_masks_texts_and_ends_agree(lm: Any, tokenizer: Any) -> None:
    lm.lm_head.weight.data[tokenizer.eos_token_id] += 0.02  # so that some rows end early
    made = generate(lm, tokenizer, PROMPTS, max_new_tokens=12, temperature=1.5, seed=1, samples_per_prompt=6)
    assert made.input_ids.shape == made.attention_mask.shape == made.response_mask.shape
    assert 0 < made.ended.sum() < len(made.texts)
    for row, text in enumerate(made.texts):
        prompt = PROMPTS[row // 6]
        real = made.input_ids[row][made.attention_mask[row]].tolist()
        response = made.input_ids[row][made.response_mask[row]].tolist()
        assert real == prompt + response and made.attention_mask[row, : len(real)].all()
        assert (response[-1] == tokenizer.eos_token_id) == bool(made.ended[row])
        assert tokenizer.eos_token_id not in response[:-1]
        assert len(response) == 12 or made.ended[row]
        assert text == tokenizer.decode(response, skip_special_tokens=True)


def test_the_seed_decides(lm: Any, tokenizer: Any) -> None:
    def texts(**source: Any) -> list[str]:
        return generate(lm, tokenizer, PROMPTS, max_new_tokens=8, samples_per_prompt=3, **source).texts

    first = texts(seed=3)
    assert texts(seed=3) == texts(generator=torch.Generator().manual_seed(3)) == first
    assert texts(seed=4) != first and len(set(first[:3])) == 3
    torch.manual_seed(3)
    assert texts() == first


def test_sampled_tokens_have_the_logprobs_of_the_scoring_pass(lm: Any, tokenizer: Any) -> None:
    """The mean of log p over many samples is minus the entropy: sampling and scoring speak of one law."""
    made = generate(lm, tokenizer, [[5, 9]], max_new_tokens=1, temperature=0.7, seed=5, samples_per_prompt=4000)
    logprobs, entropy = heads.token_logprobs_entropy(lm, made.input_ids, made.attention_mask, made.response_mask, 0.7)
    mean, spread = logprobs.sum(1).mean(), logprobs.sum(1).std() / 4000**0.5
    assert abs(mean + entropy.sum(1).mean()) < 4 * spread


def test_rollouts_can_be_learned_from(lm: Any, tokenizer: Any) -> None:
    made = generate(lm, tokenizer, PROMPTS, max_new_tokens=3, seed=0)
    heads.token_logprobs(lm, made.input_ids, made.attention_mask, made.response_mask).sum().backward()
    lm.zero_grad()


def test_every_end_that_the_model_names_ends(lm: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm.generation_config, "eos_token_id", [13, 17])
    assert ends(lm, tokenizer) == sorted({13, 17, tokenizer.eos_token_id})
    monkeypatch.setattr(lm.generation_config, "eos_token_id", None)
    assert ends(lm, tokenizer) == [tokenizer.eos_token_id]
