# SPDX-License-Identifier: Apache-2.0
"""Sampling: from softmax(logits / temperature), pads and the batch change nothing, the masks are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.integrations.causal_lm import language_model_head
from rlhf_fast.models import heads
from rlhf_fast.models import loading as models
from rlhf_fast.rollout import builtin, distribution
from rlhf_fast.rollout.builtin import end_ids, generate
from rlhf_fast.rollout.cache import take_rows
from rlhf_fast.rollout.decoder import reads_padded_prompts
from rlhf_fast.rollout.distribution import draw
from rlhf_fast.rollout.packed_weights import packed_weights
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


@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"min_p": 1e-3}, {"min_p": 2e-4, "top_p": 0.97}])
def test_a_row_looks_as_far_as_it_must_whatever_the_others_keep(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that keep a few, hundreds and thousands of ids: those that a sort of the vocabulary keeps."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9000, generator=generator) * torch.tensor([9.0, 0.5, 2.0, 5.0, 0.1, 3.0])[:, None]
    uniform = torch.rand(6, generator=generator, dtype=torch.float64)
    params = SamplingParams(**options)
    sorted_rows: list[tuple[int, int]] = []
    topk = torch.Tensor.topk

    def look(self: torch.Tensor, k: int) -> Any:
        sorted_rows.append((len(self), k))
        return topk(self, k)

    monkeypatch.setattr(torch.Tensor, "topk", look)
    drawn, support = draw(logits, uniform, params)
    assert support is not None
    assert sorted_rows[0] == (6, 256) and all(rows < 6 for rows, _ in sorted_rows[1:]), "peaked rows are done"
    counts = support.offsets.diff().tolist()
    assert min(counts) < 256 and max(counts) > 4096
    for row, probabilities in enumerate(logits.softmax(-1)):
        values, ids = probabilities.sort(descending=True)
        values = values * (values >= params.min_p * values[0])
        before = values.double().cumsum(0) - values
        kept = ids[(before < params.top_p * values.sum()) & (values > 0)]
        assert abs(len(kept) - counts[row]) <= 1  # the sum of the mass rounds in another order
        got = support.take(torch.tensor([row])).ids
        least = min(len(kept), len(got))
        assert len(got.unique()) == len(got) and torch.equal(probabilities[got[:least]], values[:least])  # but for ties
        alone, own = draw(logits[row : row + 1], uniform[row : row + 1], params)
        assert own is not None and torch.equal(alone, drawn[row : row + 1]) and torch.equal(own.ids, got)


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
        assert tokenizer.decode(prompt) + text == tokenizer.decode(real, skip_special_tokens=True)


def test_the_seed_decides(lm: Any, tokenizer: Any) -> None:
    def texts(**source: Any) -> list[str]:
        return generate(lm, tokenizer, PROMPTS, SamplingParams(max_new_tokens=8), samples_per_prompt=3, **source).texts

    first = texts(seed=3)
    assert texts(seed=3) == first
    assert texts(seed=4) != first and len(set(first[:3])) == 3
    torch.manual_seed(3)
    of_the_global_generator = texts()
    torch.manual_seed(3)
    assert texts() == of_the_global_generator


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
    assert end_ids(lm, tokenizer) == sorted({13, 17, tokenizer.eos_token_id})
    monkeypatch.setattr(lm.generation_config, "eos_token_id", None)
    assert end_ids(lm, tokenizer) == [tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"min_p": 0.45}, [3, 1]),
        ({"min_p": 0.09}, [3, 1, 4, 0]),
        ({"min_p": 0.2, "top_k": 2}, [3, 1]),
        ({"min_p": 0.3, "top_p": 0.7}, [3, 1]),  # of the 0.95 that min_p leaves
    ],
)
def test_min_p_is_a_share_of_the_largest_probability(options: dict[str, Any], kept: list[int]) -> None:
    probabilities = torch.tensor([[0.05, 0.25, 0.0, 0.5, 0.2]])
    _, support = draw(probabilities.log(), torch.tensor([0.5]).double(), SamplingParams(**options))
    assert support is not None and support.ids.tolist() == kept


def test_min_p_looks_at_the_whole_vocabulary_where_it_must() -> None:
    logits = torch.linspace(0, 0.1, 5000).expand(3, 5000)
    _, support = draw(logits, torch.tensor([0.1, 0.5, 0.9]).double(), SamplingParams(min_p=0.95))
    assert support is not None and 2500 < int(support.offsets[1]) < 2600  # those within log 0.95 of the largest


def test_draws_over_several_blocks_are_those_of_the_whole_distribution_function() -> None:
    logits = 3 * torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    logits[:, 300:700] = -torch.inf
    uniform = torch.rand(4, 500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    for column in range(500):
        drawn, _ = draw(logits, uniform[:, column], SamplingParams())
        wanted = torch.searchsorted(cumulative, uniform[:, [column]].contiguous(), right=True).squeeze(1)
        near = (cumulative.gather(1, wanted[:, None]).squeeze(1) - uniform[:, column]).abs() < 1e-6
        assert ((drawn == wanted) | near).all()


def test_draws_of_some_rows_at_once_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    for width in (1000, 1024):
        logits = 3 * torch.randn(7, width, generator=generator)
        uniform = torch.rand(7, generator=generator, dtype=torch.float64)
        wanted, _ = draw(logits, uniform, SamplingParams(temperature=0.7))
        for most in (1, 3000):  # logits: rows one by one, and by two
            monkeypatch.setattr(distribution, "AT_ONCE", most)
            assert torch.equal(draw(logits, uniform, SamplingParams(temperature=0.7))[0], wanted)
        monkeypatch.undo()


def test_nothing_ends_before_min_new_tokens_and_its_log_probabilities_know_it(lm: Any, tokenizer: Any) -> None:
    weight = lm.lm_head.weight.data
    before = weight.clone()
    weight[tokenizer.eos_token_id] += 0.3
    try:
        params = SamplingParams(max_new_tokens=9, top_k=20)
        early = generate(lm, tokenizer, PROMPTS, params, seed=0, samples_per_prompt=8)
        assert int(early.response_mask.sum(1).min()) < 4
        params = SamplingParams(max_new_tokens=9, top_k=20, min_new_tokens=4)
        rollout = generate(lm, tokenizer, PROMPTS, params, seed=0, samples_per_prompt=8)
        assert int(rollout.response_mask.sum(1).min()) == 5 and rollout.ended.any()
        assert rollout.support is not None
        start = torch.tensor([len(PROMPTS[row // 8]) for row in range(32)])
        for number, (row, column) in enumerate(rollout.response_mask.nonzero().tolist()):
            kept = rollout.support.take(torch.tensor([number])).ids.tolist()
            assert int(rollout.input_ids[row, column]) in kept
            assert tokenizer.eos_token_id not in kept or column - int(start[row]) >= 4
    finally:
        weight.copy_(before)
    with pytest.raises(UserError, match="min_new_tokens takes the end out .* set one of them"):
        SamplingParams(min_new_tokens=3)
    with pytest.raises(UserError, match="min_new_tokens 9 is more than max_new_tokens 8"):
        SamplingParams(min_new_tokens=9, max_new_tokens=8, top_k=5)


def test_a_stop_string_ends_a_completion_and_is_left_out_of_its_text(lm: Any, tokenizer: Any) -> None:
    params = SamplingParams(max_new_tokens=12, temperature=1.5)
    free = generate(lm, tokenizer, PROMPTS, params, seed=1, samples_per_prompt=6)
    stop = " ".join(free.texts[0].split()[1:3])  # of two tokens
    params = SamplingParams(max_new_tokens=12, temperature=1.5, stop=(stop, "nowhere"))
    stopped = generate(lm, tokenizer, PROMPTS, params, seed=1, samples_per_prompt=6)
    assert stop in free.texts[0] and free.texts[0].startswith(stopped.texts[0]) and bool(stopped.ended[0])
    count = int(stopped.response_mask[0].sum())
    assert count < int(free.response_mask[0].sum())
    tokens = stopped.input_ids[0][stopped.response_mask[0]]
    assert tokens.tolist() == free.input_ids[0][free.response_mask[0]][:count].tolist()
    assert stop in tokenizer.decode(tokens) and stop not in tokenizer.decode(tokens[:-1])
    for one, other in zip(stopped.texts, free.texts, strict=True):
        assert stop not in one and other.startswith(one)


@pytest.mark.parametrize("options", [{}, {"top_k": 7, "top_p": 0.9}])
def test_waves_change_no_sample(lm: Any, tokenizer: Any, options: dict[str, Any]) -> None:
    once = SamplingParams(max_new_tokens=9, **options)
    whole = generate(lm, tokenizer, PROMPTS, once, seed=2, samples_per_prompt=3)
    sizes: list[int] = []
    read = builtin.Decoder

    class Watched(read):  # type: ignore[misc, valid-type]
        def __init__(self, model: Any, prompts: list[list[int]], *args: Any, **more: Any) -> None:
            sizes.append(len(prompts))
            super().__init__(model, prompts, *args, **more)

    params = SamplingParams(max_new_tokens=9, batch_size=6, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtin, "Decoder", Watched)
        waves = generate(lm, tokenizer, PROMPTS, params, seed=2, samples_per_prompt=3)
        patch.setattr(builtin, "reads_padded_prompts", lambda model: False)
        alone = generate(lm, tokenizer, PROMPTS, once, seed=2, samples_per_prompt=3)
    assert sizes == [2, 2, 1, 1, 1, 1]
    for other in (waves, alone):
        assert whole.texts == other.texts and torch.equal(whole.input_ids, other.input_ids)
        assert torch.equal(whole.ended, other.ended)
        if options:
            assert whole.support is not None and other.support is not None
            assert torch.equal(whole.support.offsets, other.support.offsets)
            assert torch.equal(whole.support.ids, other.support.ids)


def test_packed_weights_give_the_same_products(tiny: Path) -> None:
    model = models.load_causal_lm(str(tiny / "model"), "bfloat16")
    head, ids = language_model_head(model), torch.tensor([PROMPTS[2], PROMPTS[2][::-1]])
    with torch.inference_mode():
        wanted = model.base_model(ids).last_hidden_state
        logits = torch.nn.functional.linear(wanted, head.weight)
        with packed_weights(model, head, 2) as linear:
            layers = [x for x in model.base_model.modules() if "forward" in vars(x)]
            got = model.base_model(ids).last_hidden_state
            assert torch.equal(got, wanted) and torch.equal(linear(got), logits)
    served = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert len(layers) == (7 * model.config.num_hidden_layers if served else 0)
    assert not any("forward" in vars(x) for x in model.base_model.modules())


def test_the_cache_grows_in_place_and_keeps_what_the_models_own_would(lm: Any) -> None:
    ids = torch.tensor([PROMPTS[2], PROMPTS[2][::-1]])
    with torch.inference_mode():
        ours, theirs = (lm.base_model(ids, use_cache=True).past_key_values for _ in range(2))
        take_rows(ours, torch.tensor([0, 0, 1]))
        theirs.batch_select_indices(torch.tensor([0, 0, 1]))
        place, copies = ours.layers[0].keys.data_ptr(), 0
        for step in range(200):
            if step == 120:
                take_rows(ours, torch.tensor([2, 0]))
                theirs.batch_select_indices(torch.tensor([2, 0]))
            token = torch.full((len(ours.layers[0].keys), 1), 5 + step % 40)
            states = [lm.base_model(token, past_key_values=cache).last_hidden_state for cache in (ours, theirs)]
            torch.testing.assert_close(states[0], states[1], atol=1e-5, rtol=1e-5)
            copies, place = copies + (place != ours.layers[0].keys.data_ptr()), ours.layers[0].keys.data_ptr()
    assert copies == 3  # two as it grew, one as rows were taken out
    for layer, other in zip(ours.layers, theirs.layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys)
        torch.testing.assert_close(layer.values, other.values)


def test_a_model_whose_cache_is_wrong_is_refused_by_name(tiny: Path, tokenizer: Any) -> None:
    def model_with(forward: Any) -> Any:
        model = models.load_causal_lm(str(tiny / "model"), "float32")
        own = model.base_model.forward
        model.base_model.forward = lambda *args, **more: forward(own, *args, **more)
        return model

    def forgets(own: Any, *args: Any, past_key_values: Any = None, **more: Any) -> Any:
        if past_key_values is not None:
            past_key_values.layers[0].values.zero_()
        return own(*args, past_key_values=past_key_values, **more)

    def has_none(own: Any, *args: Any, **more: Any) -> Any:
        output = own(*args, **more)
        output.past_key_values = None
        return output

    for forward, message in (
        (forgets, "LlamaForCausalLM cannot be sampled from: hidden states with its cache are"),
        (has_none, "LlamaForCausalLM cannot be sampled from: TypeError: its forward gives no cache"),
    ):
        with pytest.raises(UserError, match=message):
            generate(model_with(forward), tokenizer, PROMPTS, SamplingParams(max_new_tokens=3), seed=0)


def test_a_model_that_reads_pads_is_sampled_from_one_length_at_a_time(tiny: Path, tokenizer: Any) -> None:
    model = models.load_causal_lm(str(tiny / "model"), "float32")
    params = SamplingParams(max_new_tokens=8)
    wanted = generate(model, tokenizer, PROMPTS, params, seed=0, samples_per_prompt=2)
    reads = models.load_causal_lm(str(tiny / "model"), "float32")
    own = reads.base_model.forward
    reads.base_model.forward = lambda *args, attention_mask=None, position_ids=None, **more: own(*args, **more)
    assert not reads_padded_prompts(reads) and reads_padded_prompts(model)
    assert generate(reads, tokenizer, PROMPTS, params, seed=0, samples_per_prompt=2).texts == wanted.texts
