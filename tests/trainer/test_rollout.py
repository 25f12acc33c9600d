# SPDX-License-Identifier: Apache-2.0
"""Sampling: the law is softmax(logits / temperature), pads and the batch change nothing, the masks are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast.models import heads
from rlhf_fast.models import loading as models
from rlhf_fast.models.batches import Batch
from rlhf_fast.rollout.builtin import Law, draw, ends, generate

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
    for temperature in (1.0, 0.5):
        drawn, support = draw(logits.expand(20_000, 5), uniform, Law(temperature))
        law = (logits / temperature).softmax(-1)[0]
        assert support is None
        torch.testing.assert_close(drawn.bincount(minlength=5) / 20_000, law, atol=2e-4, rtol=0)


def test_draws_at_the_edges_stay_inside() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]]).expand(2, 4)
    uniform = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    assert draw(logits, uniform, Law())[0].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("law", "kept"),
    [(Law(top_k=2), [1, 3]), (Law(top_p=0.5), [3]), (Law(top_p=0.9), [1, 3, 4]), (Law(top_k=3, top_p=0.6), [1, 3])]
    + [(Law(top_k=99, top_p=0.999999), [0, 1, 3, 4]), (Law(top_p=1e-9), [3])],
)
def test_a_cut_law_is_the_law_over_what_it_keeps(law: Law, kept: list[int]) -> None:
    probabilities = torch.tensor([[0.05, 0.25, 0.0, 0.5, 0.2]])
    uniform = torch.arange(0.5, 20_000).double() / 20_000
    drawn, support = draw(probabilities.log().expand(20_000, 5), uniform, law)
    assert support is not None
    first = support.take(torch.tensor([0]))
    assert sorted(first.ids.tolist()) == kept and first.offsets.tolist() == [0, len(kept)]
    wanted = torch.zeros(5)
    wanted[kept] = probabilities[0, kept] / probabilities[0, kept].sum()
    torch.testing.assert_close(drawn.bincount(minlength=5) / 20_000, wanted, atol=2e-4, rtol=0)


def test_top_p_looks_at_the_whole_vocabulary_where_it_must() -> None:
    logits = torch.linspace(0, 0.1, 5000).expand(3, 5000)
    _, support = draw(logits, torch.tensor([0.1, 0.5, 0.9]).double(), Law(top_p=0.5))
    assert support is not None and 2300 < int(support.offsets[1]) < 2500


def test_kept_ids_follow_their_tokens_and_make_the_log_probabilities(lm: Any, tokenizer: Any) -> None:
    made = generate(
        lm, tokenizer, PROMPTS, max_new_tokens=9, temperature=0.8, top_k=6, top_p=0.9, seed=3, samples_per_prompt=4
    )
    assert made.support is not None and len(made.support.offsets) == int(made.response_mask.sum()) + 1
    batch = Batch(made.input_ids, made.attention_mask, made.response_mask, made.support)
    logprobs = heads.token_logprobs(lm, *batch, temperature=0.8)
    with torch.no_grad():
        logits = lm(made.input_ids, attention_mask=made.attention_mask).logits[:, :-1].float() / 0.8
    for number, (row, column) in enumerate(made.response_mask.nonzero().tolist()):
        kept = made.support.take(torch.tensor([number])).ids
        law = logits[row, column - 1]
        assert set(kept.tolist()) <= set(law.topk(6).indices.tolist())
        place = kept.tolist().index(int(made.input_ids[row, column]))
        assert float(logprobs[row, column]) == pytest.approx(float(law[kept].log_softmax(0)[place]), abs=1e-4)
    part = batch.rows(torch.tensor([5, 2]))  # a micro-batch takes its rows' own
    alone = heads.token_logprobs(lm, *part, temperature=0.8)
    torch.testing.assert_close(alone, logprobs[[5, 2], : alone.shape[1]], atol=1e-5, rtol=1e-5)


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
    logprobs, entropy = heads.token_logprobs_entropy(
        lm, made.input_ids, made.attention_mask, made.response_mask, temperature=0.7
    )
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
