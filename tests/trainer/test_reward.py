# SPDX-License-Identifier: Apache-2.0
"""The reward model: its loss by hand, its split, its normalisation, and a run that was stopped."""

from __future__ import annotations

import json
import math
import shutil
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.phases import metrics
from safetensors.torch import load_file

from rlhf_fast.data.examples import encode_completion, pad_right
from rlhf_fast.data.limits import Limits
from rlhf_fast.errors import Interrupted, UserError
from rlhf_fast.feedback.schema import Ranking, read_feedback
from rlhf_fast.models.batches import Batch, MicroBatch
from rlhf_fast.models.heads import sequence_scores
from rlhf_fast.models.loading import load_reward_model, load_tokenizer
from rlhf_fast.models.optim import AdamW
from rlhf_fast.rollout import sampler
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.trainer import RewardConfig
from rlhf_fast.trainer.reward import losses
from rlhf_fast.trainer.reward import train as reward

COMPLETIONS = ["cat dog", "red blue green pink", "rain", "egg salt soup"]


def batch_of(ids: torch.Tensor, mask: torch.Tensor) -> Batch:
    return Batch(ids, mask.bool(), mask.bool())


def ranked(goodness: list[float], prompt: str = "p") -> reward.EncodedRanking:
    """A ranking without tokens, for what looks at pairs only."""
    size = len(goodness)
    ranking = Ranking(prompt, [""] * size, [True] * size, goodness, "f:1")
    return reward.EncodedRanking([[0]] * size, ranking.pairs(), ranking)


def test_the_loss_is_the_mean_over_all_pairs_and_ties_count_for_nothing() -> None:
    scores = torch.tensor([1.0, -0.5, 2.0])

    def term(better: int, worse: int) -> float:
        return math.log1p(math.exp(float(scores[worse] - scores[better])))

    whole = reward.ranking_loss([scores], [ranked([3, 2, 1])])
    assert float(whole) == pytest.approx((term(0, 1) + term(0, 2) + term(1, 2)) / 3)
    tied = reward.ranking_loss([scores, scores], [ranked([3, 1, 1]), ranked([1, 1, 1])])
    assert float(tied) == pytest.approx((term(0, 1) + term(0, 2)) / 2)  # a ranking's weight is whole, ties or not
    nothing = reward.ranking_loss([scores.requires_grad_()], [ranked([1, 1, 1])])
    nothing.backward()
    assert float(nothing.detach()) == 0 and scores.grad is not None and not scores.grad.any()


def test_pair_accuracy_counts_pairs_and_a_draw_is_wrong() -> None:
    rankings = [ranked([2, 1, 0]), ranked([1, 1])]
    assert reward.pair_accuracy(rankings, [torch.tensor([3.0, 1.0, 2.0]), torch.zeros(2)]) == pytest.approx(2 / 3)
    assert reward.pair_accuracy(rankings, [torch.zeros(3), torch.zeros(2)]) == 0
    assert reward.pair_accuracy([ranked([1, 1])], [torch.zeros(2)]) is None


def test_no_prompt_is_on_both_sides_of_the_split() -> None:
    rankings = [ranked([1, 0], f"prompt {i % 10}") for i in range(40)]
    train, held_out = reward.split(rankings, RewardConfig(eval_fraction=0.25))
    prompts = [{ranking.source.prompt for ranking in side} for side in (train, held_out)]
    assert not prompts[0] & prompts[1] and len(prompts[1]) == 3 and len(train) + len(held_out) == 40
    assert len(reward.split(rankings, RewardConfig(eval_fraction=0.0))[1]) == 0
    with pytest.raises(UserError, match="1 different prompts are too few to hold out 25%"):
        reward.split(rankings[:1], RewardConfig(eval_fraction=0.25))


def test_the_usual_learning_rate_falls_with_the_size() -> None:
    assert reward.usual_lr(135_000_000) == pytest.approx(1.5e-4)
    assert reward.usual_lr(7_000_000_000) == pytest.approx(1.2e-5, rel=0.1)
    assert reward.usual_lr(7_000_000_000, adapters=True) == 10 * reward.usual_lr(7_000_000_000)
    assert reward.usual_lr(1000) == 5e-4


def test_of_many_training_rankings_some_are_scored_from_beginning_to_end() -> None:
    rankings = [ranked([1, 0], f"prompt {i}") for i in range(1000)]
    shown = [ranking.source.prompt for ranking in reward.spread(rankings, 256)]
    assert len(shown) == 250 and shown[:2] == ["prompt 0", "prompt 4"] and shown[-1] == "prompt 996"
    assert reward.spread(rankings[:256], 256) == rankings[:256] and reward.spread([], 256) == []


def test_micro_batches_keep_rankings_whole() -> None:
    rankings = [ranked([1.0] * size) for size in (4, 4, 2, 9, 1)]
    sizes = [[len(r.sequences) for r in batch] for batch in reward.micro_batches(rankings, MicroBatch(8))]
    assert sizes == [[4, 4], [2], [9], [1]]
    assert reward.micro_batches([], MicroBatch(8)) == []


def test_a_budget_of_tokens_bounds_every_pass(
    feedback: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, int]] = []
    scores = reward.sequence_scores

    def watched(model: Any, batch: Any) -> torch.Tensor:
        shapes.append(tuple(batch.input_ids.shape))
        return scores(model, batch)

    monkeypatch.setattr(reward, "sequence_scores", watched)
    whole = train(tiny, tmp_path / "whole", feedback, epochs=1)
    assert max(rows * width for rows, width in shapes) > 90
    shapes.clear()
    cut = train(tiny, tmp_path / "cut", feedback, epochs=1, micro_batch_tokens=90)
    assert all(rows == 4 or rows * width <= 90 for rows, width in shapes)  # a ranking stays whole
    assert any(rows > 4 for rows, _ in shapes)
    for name in ("heldout_pair_accuracy", "score_mean", "score_std"):
        assert cut[name] == pytest.approx(whole[name], rel=1e-3)


def test_the_learning_rate_that_is_used_is_in_the_configuration(
    feedback: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[AdamW] = []
    monkeypatch.setattr(reward, "AdamW", lambda *args, **more: made.append(AdamW(*args, **more)) or made[-1])
    train(tiny, tmp_path / "run", feedback, epochs=0.1, lr=None, head_lr=0.25)
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["lr"]
    model = reward.load(RewardConfig(model=str(tiny / "model"), dtype="float32"))[1]
    assert written == pytest.approx(reward.usual_lr(sum(p.numel() for p in model.parameters())), rel=1e-6)
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["lr"] == pytest.approx(written)
    trunk, head = made[0].param_groups  # of one step, at the peak
    assert (trunk["lr"], head["lr"]) == (pytest.approx(written), 0.25) and len(head["params"]) == 1


@pytest.fixture
def feedback(write_jsonl: Any, tiny: Path) -> str:
    """24 rankings of four completions of different lengths; more words are better."""
    model = str(tiny / "model")  # said to have made them, so that they set the normaliser
    prompts = [json.loads(line)["prompt"] for line in (tiny / "feedback_prompts.jsonl").read_text().splitlines()]
    prompts = sorted(set(prompts))[:24]
    return write_jsonl(
        "feedback.jsonl",
        *(
            {"prompt": p, "completions": COMPLETIONS, "ranks": [3, 1, 4, 2], "ratings": [2, 7, 1, 3], "model": model}
            for p in prompts
        ),
    )


def train(tiny: Path, folder: Path, feedback: str, **values: Any) -> dict[str, Any]:
    """In a run folder of its own."""
    common = {
        "model": str(tiny / "model"),
        "dtype": "float32",
        "lr": 1e-3,
        "head_lr": 1e-2,
        "epochs": 4,
        "batch_size": 4,
    }
    config = RewardConfig(**{**common, "output_dir": str(folder), "feedback_file": feedback, **values})
    run = RunFolder.create(folder, resume=config.resume)
    try:
        return reward.train_reward(config, run)
    finally:
        run.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_learns_and_its_scores_are_normalised_wherever_it_is_loaded(
    tiny: Path, tmp_path: Path, feedback: str, dtype: str
) -> None:
    summary = train(tiny, tmp_path / "run", feedback, dtype=dtype)
    assert summary["heldout_pair_accuracy"] > 0.9 and summary["pairs"] == 6 * summary["rankings"]
    folder = str(tmp_path / "run" / "model")
    tokenizer = load_tokenizer(folder)
    model = load_reward_model(folder, getattr(torch, dtype), tokenizer)
    scores = torch.cat(
        reward.score_all(model, reward.encode_all(tokenizer, read_feedback(feedback), Limits(64)), 0, MicroBatch(8))
    )
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4)
    assert float(scores.std(correction=0)) == pytest.approx(1, abs=1e-4)


def test_the_score_is_read_at_the_last_real_token_whatever_the_padding(tiny: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny / "model"))
    model = load_reward_model(str(tiny / "model"), torch.float32, tokenizer, new_head=True)
    sequences = [encode_completion(tokenizer, text) for text in COMPLETIONS]
    with torch.no_grad():
        alone = torch.cat(
            [sequence_scores(model, batch_of(torch.tensor([ids]), torch.ones(1, len(ids)))) for ids in sequences]
        )
        padded = pad_right(sequences, tokenizer.eos_token_id)  # pads look like the end
        right = sequence_scores(model, batch_of(*padded))
    torch.testing.assert_close(alone, right, rtol=1e-5, atol=1e-6)


def test_micro_batches_do_not_change_the_result(tiny: Path, tmp_path: Path, feedback: str) -> None:
    train(tiny, tmp_path / "whole", feedback, epochs=1, micro_batch_size=64)
    train(tiny, tmp_path / "parts", feedback, epochs=1, micro_batch_size=4)
    whole, parts = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-3, atol=1e-4)
    # Adam and the limit of the norm hide a factor in the gradients.
    rows = [metrics(tmp_path / name) for name in ("whole", "parts")]
    assert len(rows[0]) >= 5 and {"loss", "grad_norm", "pair_accuracy"} < rows[0][0].keys()
    for one, other in zip(*rows, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_each_epoch_has_every_ranking_in_an_order_of_its_own(
    feedback: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def noted(config: Any, model: Any, optimizer: Any, batch: Any, pad_id: int) -> dict[str, float]:
        seen.extend(str(ranking.source.prompt) for ranking in batch)
        return {"loss": 1.0, "pair_accuracy": 0.5, "grad_norm": 1.0}

    monkeypatch.setattr(reward, "_step", noted)
    train(tiny, tmp_path / "run", feedback, epochs=2)
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert sorted(first) == sorted(second) and len(set(first)) == len(first) and first != second


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stopped_run_goes_on_as_if_it_had_not(
    tiny: Path, tmp_path: Path, feedback: str, dtype: str, monkeypatch: pytest.MonkeyPatch, stop_at: Any
) -> None:
    first = train(tiny, tmp_path / "whole", feedback, dtype=dtype)
    with monkeypatch.context() as patch:
        patch.setattr(reward, "StopFlag", stop_at(8))
        with pytest.raises(Interrupted, match="reward model stopped at step 8 of 20"):
            train(tiny, tmp_path / "run", feedback, dtype=dtype)
    assert not (tmp_path / "run" / "model").exists()
    resumed = train(tiny, tmp_path / "run", feedback, dtype=dtype, resume=True)
    assert resumed["heldout_pair_accuracy"] == first["heldout_pair_accuracy"]
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("run", "whole")]
    assert logs[0] == logs[1]


def test_only_ties_are_refused(tiny: Path, tmp_path: Path, write_jsonl: Any) -> None:
    rows = [{"prompt": f"ann wants {t}", "completions": ["cat", "dog"], "ranks": [1, 1]} for t in ("food", "colors")]
    with pytest.raises(UserError, match=r"(?s)every rated line of them is a tie, .* no row is left"):
        train(tiny, tmp_path / "run", write_jsonl("ties.jsonl", *rows))


def test_a_prompt_longer_than_the_model_reads_is_named(tiny: Path, tmp_path: Path, write_jsonl: Any) -> None:
    row = {"prompt": "cat " * 70, "completions": ["cat", "dog"], "ranks": [1, 2]}
    with pytest.raises(UserError, match=r"long.jsonl:1: the prompt has 70 tokens, and at most 63 fit"):
        train(tiny, tmp_path / "run", write_jsonl("long.jsonl", row))


def test_a_loss_that_is_not_finite_stops_the_run(tiny: Path, tmp_path: Path, feedback: str) -> None:
    with pytest.raises(UserError, match="the reward model's loss is nan"):
        train(tiny, tmp_path / "run", feedback, lr=1e30, head_lr=1e30)


def ranked_and_rated(ratings: list[float]) -> reward.EncodedRanking:
    """A ranking by ratings, without tokens."""
    ranking = Ranking("p", [""] * len(ratings), [True] * len(ratings), ratings, "f:1", ratings)
    return reward.EncodedRanking([[0]] * len(ratings), ranking.pairs(), ranking)


def test_the_other_losses_by_hand() -> None:
    scores = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    e = scores.exp().tolist()

    def loss(name: str, goodness: list[float], **more: float) -> float:
        return float(reward.ranking_loss([scores], [ranked_and_rated(goodness)], name, **more))

    # Plackett-Luce: the best is chosen among three, the next among two.
    order = -math.log(e[2] / sum(e)) - math.log(e[0] / (e[0] + e[1]))
    assert loss("plackett_luce", [2, 1, 3]) == pytest.approx(order / 2)
    tied = -math.log(e[2] / (e[2] + e[1])) - math.log(e[0] / (e[0] + e[1]))
    assert loss("plackett_luce", [3, 1, 3]) == pytest.approx(tied / 2)
    assert loss("plackett_luce", [3, 1, 1]) == pytest.approx(-math.log(e[0] / sum(e)))  # one choice: its whole weight
    assert loss("best_of_k", [1, 1, 3]) == pytest.approx(-math.log(e[2] / sum(e)))
    assert loss("best_of_k", [3, 1, 3]) == pytest.approx(-math.log((e[0] + e[2]) / sum(e)))
    gaps = {(2, 0): 4.0, (2, 1): 6.0, (0, 1): 2.0}  # of the ratings 3, 1, 7
    pairs = sum(math.log1p(math.exp(-(float(scores[b] - scores[w]) - gap))) for (b, w), gap in gaps.items())
    assert loss("margin", [3, 1, 7]) == pytest.approx(pairs / 3)
    ranked = ranked_and_rated([2, 1, 0])  # its ranks count, where ratings say otherwise: no margin against them
    other = losses.with_ratings(ranked, [1.0, 5.0, 7.0])
    assert torch.equal(losses.margin(scores, other), losses.bradley_terry(scores, ranked))
    assert loss("regression", [1, 1, 1]) == pytest.approx((0 + 1.5**2 + 1) / 6)
    centered = loss("bradley_terry", [1, 1, 1], centering=0.1)
    assert centered == pytest.approx(0.1 * (0.5**2 + 3.0**2 + 1.5**2) / 3)
    for name in ("bradley_terry", "plackett_luce"):  # one and the same for two completions
        two = reward.ranking_loss([scores[:2]], [ranked_and_rated([1, 2])], name)
        assert float(two) == pytest.approx(math.log1p(math.exp(1.5)))


def test_ratings_are_standardised_over_all_rankings() -> None:
    made = losses.standardised([ranked_and_rated([1, 7]), ranked_and_rated([3, 5])])
    every = torch.tensor([value for ranking in made for value in ranking.source.ratings])
    assert float(every.mean()) == pytest.approx(0, abs=1e-6) and float(every.std(correction=0)) == pytest.approx(1)
    with pytest.raises(UserError, match="f:1: the loss regression needs ratings"):
        losses.standardised([ranked([1, 2])])


def test_the_option_names_every_loss() -> None:
    assert typing.get_args(typing.get_type_hints(RewardConfig)["loss"]) == tuple(losses.LOSSES)
    assert set(losses.PREPARE) <= set(losses.LOSSES)


def test_margins_do_not_depend_on_the_unit_of_the_ratings() -> None:
    """Raw differences of a 1 to 7 scale would give a loss of 3.4 before anything is learned."""
    for unit in (1.0, 100.0):
        rankings = [ranked_and_rated([unit * r for r in ratings]) for ratings in ([1, 7, 4], [2, 3])]
        scaled = losses.scaled_margins([*rankings, ranked([2, 1])])
        gaps = [[r.source.ratings[b] - r.source.ratings[w] for b, w in r.pairs] for r in scaled]
        assert [pytest.approx(part) for part in gaps] == [[1, 0.5, 0.5], [1 / 6], [1]]
        start = reward.ranking_loss([torch.zeros(3)], scaled[:1], "margin")
        assert float(start) == pytest.approx(sum(math.log1p(math.exp(m)) for m in (1, 0.5, 0.5)) / 3)


def test_calibration_sets_how_sure_against_how_often_right() -> None:
    rankings = [ranked([2, 1])] * 4
    scores = [torch.tensor(pair) for pair in ([0.1, 0.0], [0.0, 0.1], [5.0, 0.0], [9.0, 0.0])]
    low, high = reward.calibration(rankings, scores)
    assert low == {"predicted": pytest.approx(0.525, abs=1e-3), "observed": 0.5, "pairs": 2}
    assert high["observed"] == 1 and high["predicted"] > 0.99
    assert reward.calibration_error([low, high]) == pytest.approx((0.025 + 1 - high["predicted"]) / 2, abs=1e-3)
    assert reward.calibration([ranked([1, 1])], [torch.zeros(2)]) == [] and reward.calibration_error([]) is None


@pytest.mark.parametrize("loss", [name for name in losses.LOSSES if name != "bradley_terry"])  # that is the default
def test_every_loss_learns_the_order(tiny: Path, tmp_path: Path, feedback: str, loss: str) -> None:
    summary = train(tiny, tmp_path / "run", feedback, loss=loss, centering=0.01)
    assert summary["heldout_pair_accuracy"] >= (0.5 if loss == "best_of_k" else 0.9)
    assert summary["read_position_gap"] < 1e-4 and 0 <= summary["calibration_error"] <= 0.5


def test_the_result_is_an_ordinary_sequence_classifier(tiny: Path, tmp_path: Path, feedback: str) -> None:
    """Also if the base pads with the end: transformers and TRL read the last token that is not the pad token."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    shutil.copytree(tiny / "model", tmp_path / "base" / "model")
    padded = AutoTokenizer.from_pretrained(tiny / "model", pad_token="<eos>")
    padded.save_pretrained(tmp_path / "base" / "model")
    summary = train(tmp_path / "base", tmp_path / "run", feedback, epochs=1)
    folder = str(tmp_path / "run" / "model")
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ours = load_reward_model(folder, torch.float32, padded)
    rows = [encode_completion(padded, text) for text in COMPLETIONS]
    ids, mask = pad_right(rows, padded.pad_token_id)
    plain = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        normalised = sequence_scores(ours, batch_of(ids, mask))
        for side in ("right", "left"):
            raw = theirs(**plain.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")).logits.squeeze(1)
            torch.testing.assert_close((raw - theirs.config.score_mean) / theirs.config.score_std, normalised)
    assert theirs.config.num_labels == 1 and plain.padding_side == "right"
    assert summary["pad_token"] == plain.pad_token == "<pad>"
    assert "Pad with `<pad>`" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_scores_are_normalised_on_samples_of_the_policy_when_others_made_the_completions(
    tiny: Path, tmp_path: Path, write_jsonl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.loads(line)["prompt"] for line in (tiny / "heldout.jsonl").read_text().splitlines()[:8]]
    path = write_jsonl("people.jsonl", *({"prompt": p, "completions": COMPLETIONS[:2], "ranks": [1, 2]} for p in rows))
    made = []
    generate = sampler.generate
    monkeypatch.setattr(sampler, "generate", lambda *args, **more: made.append(generate(*args, **more)) or made[-1])
    train(tiny, tmp_path / "run", path, epochs=1)
    model = load_reward_model(str(tmp_path / "run" / "model"), torch.float32)
    with torch.no_grad():
        scores = sequence_scores(model, made[0].batch)
    assert len(scores) == 16 and float(scores.mean()) == pytest.approx(0, abs=1e-4)
    assert float(scores.std(correction=0)) == pytest.approx(1, abs=1e-4)


def test_one_long_completion_does_not_make_the_normaliser_sample_as_long(
    tiny: Path, tmp_path: Path, write_jsonl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [json.loads(line)["prompt"] for line in (tiny / "heldout.jsonl").read_text().splitlines()[:8]]
    rows = [{"prompt": p, "completions": ["cat dog", "rain"], "ranks": [1, 2]} for p in prompts]
    rows[0]["completions"] = ["cat " * 20, "rain"]
    longest = []
    generate = sampler.generate
    monkeypatch.setattr(
        sampler, "generate", lambda *args, **more: longest.append(args[3].max_new_tokens) or generate(*args, **more)
    )
    train(tiny, tmp_path / "run", write_jsonl("people.jsonl", *rows), epochs=1)
    assert longest == [3]  # two words and EOS
