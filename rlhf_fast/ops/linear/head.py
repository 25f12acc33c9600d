# SPDX-License-Identifier: Apache-2.0
"""A language-model head: tiles of its logits, and sums of the gradients. All matmuls are here."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops.linear.inputs import HeadGradientTensors, Needs
from rlhf_fast.ops.reference import accumulate_dtype

SCALED_EXPONENT = 8  # scaled gradients are below 2^8, so sums of them may grow by another factor of 256 in float16

CPU_PRODUCT_ROWS = 4096  # rows of a half-precision product that fit in cache until they are added in float32


class Head(NamedTuple):
    """logits = hidden @ (weight + lora_scale * lora_b @ lora_a).T + bias, without forming that sum."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    lora_a: Tensor | None  # (r, H)
    lora_b: Tensor | None  # (V, r)
    lora_scale: float

    def first(self, columns: int) -> Head:
        """The head of the first `columns` columns, for a padded V."""
        if columns == self.weight.shape[0]:
            return self
        bias, lora_b = (None if x is None else x[:columns] for x in (self.bias, self.lora_b))
        return self._replace(weight=self.weight[:columns], bias=bias, lora_b=lora_b)

    def low_rank(self, hidden: Tensor) -> Tensor | None:
        """(N, r): hidden @ lora_a.T * lora_scale, which lora_b then multiplies."""
        return None if self.lora_a is None else (hidden @ self.lora_a.t()) * self.lora_scale

    def fill(self, tile: Tensor, hidden: Tensor, low: Tensor | None, columns: slice) -> Tensor:
        """Writes the logits of hidden (n, H) and low (n, r) at `columns` into tile (n, columns)."""
        weight, bias = self.weight[columns].t(), None if self.bias is None else self.bias[columns]
        if bias is not None and tile.dtype == hidden.dtype:
            torch.addmm(bias, hidden, weight, out=tile)  # rounds once, like a model's own head
        else:
            product(hidden, weight, tile)
            if bias is not None:
                tile.add_(bias)
        if low is not None:
            assert self.lora_b is not None
            add_product(low, self.lora_b[columns].t(), tile)
        return tile


class HeadGradients:
    """The gradients of hidden and head, summed over tiles in float32 (float64 for float64)."""

    def __init__(
        self,
        head: Head,
        hidden: Tensor,
        low: Tensor | None,
        needs: Needs,
        row_blocks: int,
        revisits: bool = True,
        hold_sums: bool = False,
    ) -> None:
        """row_blocks: number of tiles in a column; revisits: a column of tiles is not complete before the next one
        starts; hold_sums: `finish` returns the dtypes of `held_dtypes`, for callers that multiply the gradients once
        more.
        """
        self.head, self.of, self.low, self.needs = head, hidden, low, needs
        self.once = row_blocks == 1
        rows, dtype = hidden.shape[0], accumulate_dtype(hidden.dtype)
        columns = head.weight.shape[0]
        rank = 0 if low is None else low.shape[1]
        self.hidden = hidden.new_zeros((rows if needs.hidden else 0, hidden.shape[1]), dtype=dtype)
        self.low_grad = hidden.new_zeros((rows if needs.hidden or needs.lora_a else 0, rank), dtype=dtype)
        self.bias = hidden.new_zeros(columns if needs.bias else 0, dtype=dtype)
        self.lora_b = hidden.new_zeros((columns if needs.lora_b else 0, rank), dtype=dtype)
        self.hold_sums = hold_sums
        self.scale: Tensor | None = None  # a power of two that all sums are multiplied by, see `fit_scale`
        whole_sum = dtype if revisits and not self.once else hidden.dtype
        if hold_sums and held_dtypes(hidden.dtype).weight == dtype:
            whole_sum = dtype
        self.weight: Tensor | None = None
        if needs.weight:
            self.weight = torch.empty_like(head.weight, dtype=whole_sum, memory_format=torch.contiguous_format)
            if not self.once:
                self.weight.zero_()
        self._sum: Tensor | None = None  # float32 sum of the weight gradient at the current columns
        self._sum_at: tuple[int, int] = (0, 0)

    def fit_scale(self, largest: Tensor) -> Tensor:
        """The power of two for the next tiles, whose gradients are at most `largest` (a scalar).

        float16 has full precision only between 6e-5 and 65504, so gradients made small by a large normalizer would
        underflow. The scale only decreases, and earlier sums are rescaled. `finish` divides by it.
        """
        exponent = torch.frexp(largest.float()).exponent
        wanted = torch.ldexp(torch.ones_like(largest, dtype=torch.float32), (SCALED_EXPONENT - exponent).clamp(-60, 60))
        if self.scale is None:
            self.scale = wanted
            return wanted
        scale = torch.minimum(self.scale, wanted)
        if scale.is_cuda or bool(scale != self.scale):  # comparing on a GPU would make the host wait
            for total in self._sums():
                total.mul_(scale / self.scale)
        self.scale = scale
        return scale

    def _sums(self) -> list[Tensor]:
        tensors = [self.hidden, self.low_grad, self.bias, self.lora_b, self.weight]
        return [x for x in tensors if x is not None and x.numel()]

    def add(self, dlogits: Tensor, rows: slice, columns: slice) -> None:
        """Adds the gradient of one tile."""
        dlogits = dlogits.to(self.of.dtype)
        if self.needs.hidden:
            add_product(dlogits, self.head.weight[columns], self.hidden[rows])
        if self.weight is not None:
            if self.once:
                product(dlogits.t(), self.of[rows], self.weight[columns])
            else:
                add_product(dlogits.t(), self.of[rows], self.weight_sum(columns))
        if self.needs.bias:
            self.bias[columns] += dlogits.sum(0, dtype=self.bias.dtype)
        if self.low is not None:
            assert self.head.lora_b is not None
            if self.low_grad.numel():
                add_product(dlogits, self.head.lora_b[columns], self.low_grad[rows])
            if self.needs.lora_b:
                add_product(dlogits.t(), self.low[rows], self.lora_b[columns])

    def weight_sum(self, columns: slice) -> Tensor:
        """Where the weight gradient at these columns is summed."""
        assert self.weight is not None
        if self.weight.dtype == self.hidden.dtype:
            return self.weight[columns]
        at = (columns.start, columns.stop)
        if self._sum is None or self._sum_at != at:
            self._flush()
            self._sum = torch.zeros_like(self.weight[columns], dtype=self.hidden.dtype)
            self._sum_at = at
        return self._sum

    def _flush(self) -> None:
        if self._sum is not None and self.weight is not None:
            self.weight[slice(*self._sum_at)] = self._sum
        self._sum = None

    def finish(self, vocabulary: int, over_ranks: Callable[[Tensor], Tensor]) -> HeadGradientTensors:
        """Gradients of hidden (N, H), weight, bias, lora_a and lora_b, (0,) if not needed.

        over_ranks sums over ranks in place: each has a share of hidden's and lora_a's. Columns beyond the head's, up to
        `vocabulary`, are 0.
        """
        self._flush()
        lora_a = self.low_grad.new_empty(0)
        if self.low is not None and self.low_grad.numel():
            assert self.head.lora_a is not None
            scaled = (self.low_grad * self.head.lora_scale).to(self.of.dtype)
            if self.needs.hidden:
                add_product(scaled, self.head.lora_a, self.hidden)
            if self.needs.lora_a:
                lora_a = torch.zeros_like(self.head.lora_a, dtype=self.hidden.dtype)
                add_product(scaled.t(), self.of, lora_a)
                over_ranks(lora_a)
        elif self.needs.lora_a and self.head.lora_a is not None:
            lora_a = torch.zeros_like(self.head.lora_a)
        dtypes = held_dtypes(self.of.dtype) if self.hold_sums else GradientDtypes(*[self.of.dtype] * 5)
        weight = self.hidden.new_empty(0) if self.weight is None else _padded(self.weight, vocabulary)
        bias = _padded(self.bias, vocabulary) if self.needs.bias else self.bias
        lora_b = _padded(self.lora_b, vocabulary) if self.needs.lora_b else self.lora_b.new_empty(0)
        hidden = over_ranks(self.hidden) if self.needs.hidden else self.hidden.new_empty(0)
        gradients = HeadGradientTensors(hidden, weight, bias, lora_a, lora_b)
        if self.scale is not None:
            for x in gradients:
                x.div_(self.scale)
        return HeadGradientTensors(*(x.to(dtype) for x, dtype in zip(gradients, dtypes, strict=True)))


class GradientDtypes(NamedTuple):
    """The dtypes of HeadGradientTensors."""

    hidden: torch.dtype
    weight: torch.dtype
    bias: torch.dtype
    lora_a: torch.dtype
    lora_b: torch.dtype


def held_dtypes(dtype: torch.dtype) -> GradientDtypes:
    """The dtypes of gradients that are kept to be multiplied by one more factor, for operands of this dtype.

    The dtype of the sums, except that the weight's is bfloat16 for bfloat16 operands: it is the one large gradient, and
    bfloat16 has the range of float32, so nothing underflows.
    """
    sums = accumulate_dtype(dtype)
    return GradientDtypes(*[sums] * 5)._replace(weight=dtype if dtype == torch.bfloat16 else sums)


def _padded(x: Tensor, rows: int) -> Tensor:
    return x if x.shape[0] == rows else torch.cat([x, x.new_zeros(rows - x.shape[0], *x.shape[1:])])


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b in the dtype of out: products of half-precision operands are exact if out is float32."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif out.is_cuda:
        torch.mm(a, b, out.dtype, out=out)
    else:
        wide = a.to(out.dtype)
        for left in range(0, b.shape[1], CPU_PRODUCT_ROWS):
            block = slice(left, left + CPU_PRODUCT_ROWS)
            torch.mm(wide, b[:, block].to(out.dtype), out=out[:, block])


def add_product(a: Tensor, b: Tensor, total: Tensor) -> None:
    """total += a @ b, summed in the dtype of total. On a CPU bfloat16 products are first rounded to bfloat16; float16
    products, which could overflow, are not rounded.
    """
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, total.dtype, out=total)
    else:
        exact = a.dtype == torch.float16
        b = b.to(total.dtype) if exact else b
        for top in range(0, a.shape[0], CPU_PRODUCT_ROWS):
            block = slice(top, top + CPU_PRODUCT_ROWS)
            total[block] += (a[block].to(total.dtype) if exact else a[block]) @ b
