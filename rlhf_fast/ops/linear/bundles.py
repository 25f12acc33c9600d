# SPDX-License-Identifier: Apache-2.0
"""NamedTuples instead of flat argument lists, and the conversion between the two.

torch's schemas are flat. All code of the linear family above them takes bundles: the public function builds an op's
inputs and options, `flatten` turns them into the operator's arguments, and `unflatten` turns those back. The schema is
generated from the same classes, so a new option is a field of its bundle and the line that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, get_type_hints

from torch import Tensor

_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "int", bool: "bool"
}  # fmt: skip


@cache
def _fields(bundle: type) -> tuple[tuple[str, Any], ...]:
    hints = get_type_hints(bundle)
    return tuple((name, hints[name]) for name in bundle._fields)  # type: ignore[attr-defined]


@cache
def arguments(*bundles: type) -> tuple[tuple[str, Any], ...]:
    """Names and types of all fields in order; a field that is a bundle is replaced by its fields."""
    fields: list[tuple[str, Any]] = []
    for bundle in bundles:
        for name, kind in _fields(bundle):
            fields += arguments(kind) if hasattr(kind, "_fields") else [(name, kind)]
    return tuple(fields)


def schema(*bundles: type, prefix: str = "", mutated: str = "") -> str:
    """The arguments as torch writes them; `mutated` names a tensor that the operator writes to."""
    names = {Tensor: {mutated: "Tensor(a!)"}}
    return ", ".join(
        f"{names.get(kind, {}).get(name, _SCHEMA_TYPES[kind])} {prefix}{name}" for name, kind in arguments(*bundles)
    )


def flatten(*bundles: Any) -> tuple[Any, ...]:
    """The values of bundles, in the order of `arguments`."""
    flat: tuple[Any, ...] = ()
    for bundle in bundles:
        for value in bundle:
            flat = (*flat, *flatten(value)) if isinstance(value, tuple) else (*flat, value)
    return flat


def unflatten(flat: Iterable[Any], *bundles: type) -> list[Any]:
    """Bundles of these types from flat values. One value too few or too many raises."""
    values = iter(flat)
    built = [_build(bundle, values) for bundle in bundles]
    if left := len(list(values)):
        raise TypeError(f"{left} more values than {', '.join(b.__name__ for b in bundles)} have fields")
    return built


def _build(bundle: type, values: Iterator[Any]) -> Any:
    try:
        return bundle(*[_build(kind, values) if hasattr(kind, "_fields") else next(values)
                        for _, kind in _fields(bundle)])  # fmt: skip
    except StopIteration:
        raise TypeError(f"fewer values than {bundle.__name__} has fields") from None


def on_bundles(function: Callable[..., Iterable[Any]], *bundles: type) -> Callable[..., tuple[Any, ...]]:
    """`function(ops, *bundles)` as an operator's kernel, which takes flat arguments."""

    def kernel(ops: Any, *flat: Any) -> tuple[Any, ...]:
        return tuple(function(ops, *unflatten(flat, *bundles)))

    return kernel


def fake_on_bundles(function: Callable[..., Iterable[Any]], *bundles: type) -> Callable[..., tuple[Any, ...]]:
    """`function(*bundles)` as an operator's fake kernel."""

    def fake(*flat: Any) -> tuple[Any, ...]:
        return tuple(function(*unflatten(flat, *bundles)))

    return fake


def gradients_of(leading: Iterable[Tensor], needed: Iterable[bool], *bundles: type) -> tuple[Tensor | None, ...]:
    """What an autograd backward returns: a gradient or None for each of the first inputs, None for all others."""
    first = [x if wanted else None for x, wanted in zip(leading, needed, strict=True)]
    return (*first, *(None,) * (len(arguments(*bundles)) - len(first)))
