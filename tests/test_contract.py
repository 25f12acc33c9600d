# SPDX-License-Identifier: Apache-2.0
"""What every op promises, whichever it is: opcheck, compile, autocast, dtypes, no mutation, no double backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.samples import SAMPLES, Sample, build
from helpers.tools import HALF, Recorder, named_outputs, with_gradients
from torch import Tensor

import rlhf_fast as rf

DIFFERENTIABLE = [name for name in SAMPLES if build(name, torch.float32).differentiable]
COMPILED_BY_INDUCTOR = ("token_stats", "linear_token_stats")  # the rest go through aot_eager, which is much quicker

every_sample = pytest.mark.parametrize("name", SAMPLES)
every_differentiable_sample = pytest.mark.parametrize("name", DIFFERENTIABLE)


def run(sample: Sample, call: Any = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and, where there are any, gradients."""
    call = call or sample.call
    if sample.differentiable:
        return with_gradients(call, sample.inputs)
    return named_outputs(call(**sample.inputs)), {}


def assert_same(left: tuple[dict[str, Tensor], ...], right: tuple[dict[str, Tensor], ...], atol: float = 1e-6) -> None:
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0 if atol == 0 else 1e-5, atol=atol, equal_nan=True)


@every_sample
def test_opcheck(backend: str, name: str) -> None:
    """Every operator that a forward and backward reach: schema, fake tensor, autograd registration, tracing."""
    sample = build(name, torch.float32)
    with Recorder() as recorder:
        run(sample)
    assert recorder.calls, "no rlhf_fast operator was called"
    forward = recorder.calls[0][0]
    for func, args, kwargs in recorder.calls:
        args = _keeping_nothing(func, args)
        torch.library.opcheck(func, args, kwargs)
        if func is forward and sample.differentiable:
            leaves = [_leaf_like(x, sample) for x in args]
            torch.library.opcheck(func, tuple(leaves), kwargs)


def _keeping_nothing(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Kept tiles are an output that masked rows leave unwritten in part and that an eager backward overwrites: opcheck,
    which compares outputs after the backward, would take that for a wrong trace."""
    if not (returns := func._schema.returns) or returns[-1].name != "tiles":
        return args
    names = [argument.name for argument in func._schema.arguments]
    return tuple(0 if name == "budget" else x for name, x in zip(names, args, strict=True))


def _leaf_like(x: Any, sample: Sample) -> Any:
    """The argument, requiring grad if it is one of the sample's inputs."""
    if not isinstance(x, Tensor):
        return x
    is_input = any(x.shape == y.shape and torch.equal(x, y) for y in sample.inputs.values())
    return x.clone().requires_grad_(is_input)


def test_native_operators_have_compiled_kernels() -> None:
    """No operator of the native namespace silently runs the Python reference, except linear's loop over row chunks."""
    from rlhf_fast import _ext

    if _ext._C is None:
        pytest.skip("extension not built")
    reached = set()
    for name in SAMPLES:
        with rf.use_backend("native"), Recorder() as recorder:
            run(build(name, torch.float32))
        reached |= {func.name() for func, _, _ in recorder.calls}
    assert len(reached) >= 8
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    missing = {op for op in reached if not has_kernel(op.removesuffix(".default"), "CPU") and "linear" not in op}
    assert not missing, f"no compiled CPU kernel for {sorted(missing)}"


@every_sample
def test_compiles_without_a_graph_break(backend: str, name: str) -> None:
    torch._dynamo.reset()
    sample = build(name, torch.float32)
    engine = "inductor" if name in COMPILED_BY_INDUCTOR and backend == "native" else "aot_eager"
    compiled = torch.compile(sample.call, fullgraph=True, backend=engine)
    assert_same(run(sample, compiled), run(sample))


@pytest.mark.parametrize("name", ["token_stats", "token_kl_reverse", "gae", "ppo_advantages", "linear_token_stats"])
def test_compiles_with_dynamic_shapes(backend: str, name: str) -> None:
    torch._dynamo.reset()
    first = build(name, torch.float32)
    compiled = torch.compile(first.call, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_same(run(first, compiled), run(first))


@every_sample
def test_autocast(backend: str, name: str) -> None:
    """Row ops take what they are given; heads multiply in autocast's dtype; outputs stay float32."""
    for dtype in (torch.float32, torch.bfloat16):
        sample = build(name, dtype)
        plain = run(sample)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = run(sample)
        assert all(x.dtype in (torch.float32, torch.int64) for x in cast[0].values())
        assert {k: g.dtype for k, g in cast[1].items()} == {
            k: x.dtype for k, x in sample.inputs.items() if k in cast[1]
        }
        if not name.startswith("linear") or dtype == torch.bfloat16:
            assert_same(cast, plain, atol=0)
        else:
            half = sample._replace(inputs={k: v.bfloat16() for k, v in sample.inputs.items()})
            assert_same(cast[:1], run(half)[:1], atol=1e-6)


@every_sample
def test_float64_in_float64_out(name: str) -> None:
    outputs, grads = run(build(name, torch.float64))
    assert all(x.dtype in (torch.float64, torch.int64) for x in outputs.values())
    assert all(g.dtype == torch.float64 for g in grads.values())


@every_sample
def test_inputs_are_left_alone(backend: str, dtype: torch.dtype, name: str) -> None:
    sample = build(name, dtype)
    before = {k: v.clone() for k, v in sample.inputs.items()}
    versions = {k: v._version for k, v in sample.inputs.items()}
    run(sample)
    assert all(torch.equal(before[k], v) and versions[k] == v._version for k, v in sample.inputs.items())


@every_sample
def test_no_grad_and_inference_mode(backend: str, name: str) -> None:
    sample = build(name, torch.float32)
    expected = run(sample)[0]
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            leaves = {k: v.clone().requires_grad_(sample.differentiable) for k, v in sample.inputs.items()}
            outputs = named_outputs(sample.call(**leaves))
        assert not any(x.requires_grad for x in outputs.values())
        assert_same((outputs,), (expected,), atol=0)


@pytest.mark.parametrize("by_grad", [True, False])
@every_differentiable_sample
def test_double_backward_raises(backend: str, name: str, by_grad: bool) -> None:
    """By backward(create_graph=True) and by torch.autograd.grad alike; a silent zero would be a wrong gradient."""
    sample = build(name, torch.float32)

    def second_order(power: int) -> None:
        """The gradient's norm, as in a gradient penalty, beside a term that has a gradient of its own."""
        leaves = [v.clone().requires_grad_() for v in sample.inputs.values()]
        outputs = named_outputs(sample.call(**dict(zip(sample.inputs, leaves, strict=True))))
        loss = sum((x.pow(power).sum() for x in outputs.values() if x.requires_grad), torch.zeros(()))
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        penalised = sum((g.square().sum() for g in grads), sum((x.sum() for x in leaves), torch.zeros(())))
        if by_grad:
            torch.autograd.grad(penalised, leaves)
        else:
            penalised.backward()

    for power in (1, 2):
        with pytest.raises(RuntimeError, match="double backward|twice|second"):
            second_order(power)


@every_differentiable_sample
def test_backward_twice_with_a_retained_graph(backend: str, name: str) -> None:
    if name.endswith("inplace") or name == "linear_policy_loss":
        return  # raises instead: test_second_backward_after_inplace_raises, test_a_second_backward_raises
    sample = build(name, torch.float32)
    leaves = {k: v.clone().requires_grad_() for k, v in sample.inputs.items()}
    loss = sum((x.sum() for x in named_outputs(sample.call(**leaves)).values() if x.requires_grad), torch.zeros(()))
    first = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    second = torch.autograd.grad(loss, list(leaves.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_differentiable_sample
def test_an_expanded_gradient(backend: str, name: str) -> None:
    """`.sum().backward()` and `.mean()` hand a stride-0 gradient to the kernels; a transposed one is as legal."""
    sample = build(name, torch.float32)
    results = []
    for shape_gradient in (lambda x: torch.ones(()).expand(x.shape), lambda x: torch.ones(x.shape)):
        leaves = {k: v.clone().requires_grad_() for k, v in sample.inputs.items()}
        outputs = [x for x in named_outputs(sample.call(**leaves)).values() if x.requires_grad]
        results.append(torch.autograd.grad(outputs, list(leaves.values()), [shape_gradient(x) for x in outputs]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@every_sample
def test_fake_tensors(name: str) -> None:
    """Shapes and dtypes without data, and without a look at data that is not there."""
    sample = build(name, torch.float32)
    expected = named_outputs(sample.call(**sample.inputs))
    with torch._subclasses.FakeTensorMode():
        fake = build(name, torch.float32)
        got = named_outputs(fake.call(**fake.inputs))
    assert {k: (x.shape, x.dtype) for k, x in got.items()} == {k: (x.shape, x.dtype) for k, x in expected.items()}


@every_sample
@pytest.mark.parametrize("half", HALF, ids=str)
def test_half_precision_equals_its_float32(backend: str, half: torch.dtype, name: str) -> None:
    """Half-precision inputs are widened once and then treated exactly as float32 ones (heads round their logits)."""
    if name.startswith("linear"):
        return
    sample = build(name, half)
    wide = sample._replace(inputs={k: v.float() for k, v in sample.inputs.items()})
    assert_same(run(sample)[:1], run(wide)[:1], atol=2e-6)


@every_sample
def test_one_thread_and_two_agree(backend: str, name: str) -> None:
    before = torch.get_num_threads()
    rows = (64, 33)
    if backend in ("triton", "emulated"):  # slow, and one thread each: only what PyTorch adds is shared
        rows = (8, 33)
    if backend == "native" and not name.startswith("linear"):  # its threads share no less than 524288 logits or tokens
        rows = (128, 130) if name.startswith("token") else (1024, 520)
    sample = build(name, torch.float32, rows=rows)
    try:
        torch.set_num_threads(1)
        alone = run(sample)
        torch.set_num_threads(2)
        shared = run(sample)
    finally:
        torch.set_num_threads(before)
    assert_same(alone, shared, atol=1e-5)
