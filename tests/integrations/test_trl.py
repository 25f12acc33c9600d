# SPDX-License-Identifier: Apache-2.0
"""Each function that is replaced in TRL, against TRL's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import pages
from helpers.checks import assert_as_original, assert_replaces_and_restores, assert_signature, look_up
from torch import Tensor

from rlhf_fast.integrations import Patch, apply_rlhf_fast_to_trl
from rlhf_fast.integrations.trl import ALL_OUTPUTS, MINORS, SIGNATURES, UTILS, _Head, _HeadOfTwo

trl = pytest.importorskip("trl", reason="make test-integrations installs it")
pytest.importorskip("trl.trainer.utils")

FUNCTIONS = ["selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy"]
PATHS = [f"{UTILS}.{name}" for name in (*FUNCTIONS, "_ChunkedLogProbFunction")]


@pytest.fixture
def patch() -> Iterator[Patch]:
    with apply_rlhf_fast_to_trl() as patch:
        yield patch


def original(name: str) -> Any:
    """To be called inside a patch."""
    return look_up(f"{UTILS}.{name}").rlhf_fast_replaces


def ours(name: str) -> Any:
    return look_up(f"{UTILS}.{name}")


def test_the_newest_version_is_installed() -> None:
    assert ".".join(trl.__version__.split(".")[:2]) == MINORS[0], "the tests of the older versions read their sources"


@pytest.mark.parametrize("name", [name for name in SIGNATURES if "," not in name])
def test_signature(name: str) -> None:
    assert_signature(f"{UTILS}.{name}", SIGNATURES[name])


def test_replaces_everywhere_and_restores() -> None:
    import trl.experimental.cpo.cpo_trainer as consumer

    before = consumer.selective_log_softmax
    assert_replaces_and_restores(apply_rlhf_fast_to_trl, PATHS)
    with apply_rlhf_fast_to_trl():
        assert consumer.selective_log_softmax is ours("selective_log_softmax") is not before
    assert consumer.selective_log_softmax is before


def test_switches() -> None:
    with apply_rlhf_fast_to_trl(fused_lm_head=False, entropy=False) as patch:
        assert patch.replaced == [f"{UTILS}.selective_log_softmax"]


@pytest.mark.parametrize("shape", [(3, 7, 101), (5, 64), (2, 0, 33)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("masked", [False, True])
def test_selective_log_softmax(
    patch: Patch, generator: torch.Generator, shape: tuple[int, ...], temperature: float, masked: bool
) -> None:
    logits = 4 * torch.randn(shape, generator=generator)
    index = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    mask = torch.randint(0, 2, shape[:-1], generator=generator) if masked else None
    for name in ("selective_log_softmax", "selective_log_softmax_and_entropy"):

        def call(f: Any) -> Any:
            return lambda logits: f(logits, index, temperature=temperature, row_mask=mask)  # noqa: B023

        assert_as_original(call(ours(name)), call(original(name)), {"logits": logits})


@pytest.mark.parametrize("masked", [False, True])
def test_top_k_index(patch: Patch, generator: torch.Generator, masked: bool) -> None:
    logits = torch.randn(2, 5, 37, generator=generator)
    index = torch.randint(0, 37, (2, 5, 4), generator=generator)
    mask = torch.randint(0, 2, (2, 5, 4), generator=generator) if masked else None

    def call(f: Any) -> Any:
        return lambda logits: f(logits, index, row_mask=mask)

    name = "selective_log_softmax"
    assert_as_original(call(ours(name)), call(original(name)), {"logits": logits})
    assert ours(name)(logits, index).shape == (2, 5, 4)


def test_entropy(patch: Patch, generator: torch.Generator) -> None:
    logits = 3 * torch.randn(2, 200, 51, generator=generator)
    assert_as_original(ours("entropy_from_logits"), original("entropy_from_logits"), {"logits": logits})
    _, entropy = ours("selective_log_softmax_and_entropy")(
        logits.requires_grad_(), torch.zeros(2, 200, dtype=torch.int64), entropy_requires_grad=False
    )
    assert not entropy.requires_grad


def test_bfloat16_gives_float32_and_is_far_closer_to_the_truth(patch: Patch, generator: torch.Generator) -> None:
    """TRL's kernel on a GPU gives float32 too; its path on a CPU gives bfloat16, which cannot hold a log-prob."""
    logits = (4 * torch.randn(4, 64, 1009, generator=generator)).bfloat16()
    index = torch.randint(0, 1009, (4, 64), generator=generator)
    truth = logits.double().log_softmax(-1).gather(-1, index[..., None])[..., 0]
    ours_error, their_error = (
        (f(logits, index).double() - truth).abs().max().item()
        for f in (ours("selective_log_softmax"), original("selective_log_softmax"))
    )
    assert ours("selective_log_softmax")(logits, index).dtype == torch.float32
    assert ours_error < 1e-5 and their_error > 1e-2


def test_a_temperature_of_zero_is_an_error_as_in_trl(patch: Patch) -> None:
    with pytest.raises(ValueError, match="temperature"):
        ours("selective_log_softmax")(torch.randn(2, 3), torch.zeros(2, dtype=torch.int64), temperature=0.0)


# ----------------------------------------------------------------------------------------------- the fused LM head


def head_inputs(generator: torch.Generator, rows: int, bias: bool) -> tuple[dict[str, Tensor], Tensor]:
    inputs = {"hidden": torch.randn(rows, 16, generator=generator), "weight": torch.randn(77, 16, generator=generator)}
    if bias:
        inputs["bias"] = torch.randn(77, generator=generator)
    return inputs, torch.randint(0, 77, (rows,), generator=generator)


@pytest.mark.parametrize("rows", [0, 1, 33])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("temperature", "softcap", "scale", "outputs"),
    [
        (1.0, None, 1.0, ("log_probs",)),
        (0.8, None, 0.5, ALL_OUTPUTS),
        (1.3, 5.0, 0.25, ("log_probs", "entropy", "log_sum_sq_probs", "is_top1")),
        (1.0, 5.0, 1.0, ALL_OUTPUTS),
    ],
)
def test_fused_head(
    patch: Patch,
    generator: torch.Generator,
    rows: int,
    bias: bool,
    temperature: float,
    softcap: float | None,
    scale: float,
    outputs: tuple[str, ...],
) -> None:
    inputs, targets = head_inputs(generator, rows, bias)

    def call(f: Any) -> Any:
        return lambda hidden, weight, bias=None: tuple(
            x if x is None or x.is_floating_point() else x.float()
            for x in f(hidden, weight, bias, targets, temperature, 32, softcap, scale, outputs)
        )

    name = "_ChunkedLogProbFunction"
    mine, theirs = ours(name).apply, original(name).apply
    made, expected = (call(f)(**inputs) for f in (mine, theirs))
    assert [x is None for x in made] == [x is None for x in expected]

    if softcap is not None and "mean_logits" in outputs:  # served by TRL's own
        assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True) if a is not None and b is not None)
    else:  # TRL's head computes in float32 whatever comes in: ours, tested elsewhere, is the truth in float64
        assert_as_original(call(mine), call(theirs), inputs, truth=call(mine))


def test_fused_head_of_bfloat16_and_a_float32_head(patch: Patch, generator: torch.Generator) -> None:
    """`cast_lm_head_to_fp32`: hidden is float32, the weight stays bfloat16 and gets a bfloat16 gradient."""
    inputs, targets = head_inputs(generator, 9, False)
    hidden = inputs["hidden"].requires_grad_()
    weight = inputs["weight"].bfloat16().requires_grad_()
    gradients = []
    for f in (ours("_ChunkedLogProbFunction"), original("_ChunkedLogProbFunction")):
        logprobs = f.apply(hidden, weight, None, targets, 1.0, 32, None, 1.0, ("log_probs",))[0]
        gradients.append(torch.autograd.grad(logprobs.sum(), (hidden, weight)))
    assert gradients[0][1].dtype == torch.bfloat16
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-2, atol=1e-4)


def test_fused_head_under_autocast(patch: Patch, generator: torch.Generator) -> None:
    inputs, targets = head_inputs(generator, 9, False)
    with torch.autocast("cpu", torch.bfloat16):
        made, expected = (
            f.apply(*inputs.values(), None, targets, 1.0, 32, None, 1.0, ("log_probs", "entropy"))
            for f in (ours("_ChunkedLogProbFunction"), original("_ChunkedLogProbFunction"))
        )
    for a, b in zip(made[:2], expected[:2], strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_zero3_goes_to_trl(generator: torch.Generator) -> None:
    class Theirs:
        @staticmethod
        def apply(*args: Any) -> str:
            return "theirs"

    inputs, targets = head_inputs(generator, 4, False)
    inputs["weight"].ds_id = 3  # type: ignore[attr-defined]
    arguments = (inputs["hidden"], inputs["weight"], None, targets, 1.0, 32, None, 1.0)
    assert _Head(Theirs).apply(*arguments, ("log_probs",)) == "theirs"
    assert _HeadOfTwo(Theirs).apply(*arguments) == "theirs"


def test_the_head_of_trl_1_14_gives_two(generator: torch.Generator) -> None:
    inputs, targets = head_inputs(generator, 4, False)
    logits = (inputs["hidden"] @ inputs["weight"].T).double() / 0.5
    for rest in ((), (None,), (None, 1.0)):
        logprobs, entropy = _HeadOfTwo(None).apply(inputs["hidden"], inputs["weight"], None, targets, 0.5, 32, *rest)
        truth = logits.log_softmax(-1)
        torch.testing.assert_close(logprobs.double(), truth.gather(1, targets[:, None])[:, 0], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(entropy.double(), -(truth.exp() * truth).sum(-1), rtol=1e-5, atol=1e-4)


def test_rows_without_a_label_never_reach_the_head_on_a_cpu(patch: Patch) -> None:
    assert look_up(f"{UTILS}._use_triton")(torch.device("cpu"))
    patch.undo()
    assert not look_up(f"{UTILS}._use_triton")(torch.device("cpu"))


@pytest.mark.parametrize("page", ["README.md", "docs/integrations.md"])
def test_the_block_that_the_pages_show(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = [block for block in pages.blocks(pages.ROOT / page) if "apply_rlhf_fast_to_trl()" in block.text]
    variables: dict[str, Any] = {}
    try:
        exec(block.text, variables)
        assert "replaced" in capsys.readouterr().out + variables["patch"].report()  # one block undoes it at its end
    finally:
        variables["patch"].undo()
