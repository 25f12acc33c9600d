# SPDX-License-Identifier: Apache-2.0
"""Replace functions of an installed package by ours, report what was replaced, and undo it.

A trainer's function is replaced in its module and in every module that did `from ... import function`; `undo` restores
all of them. A function is replaced only if its signature is one that was tested.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

logger = logging.getLogger("rlhf_fast.integrations")

Maker = Callable[[Any], Any]  # original -> its replacement


@dataclass(frozen=True)
class Target:
    """One function or class of a trainer."""

    module: str
    name: str  # "function", or "Class.method"
    makers: Mapping[str, Maker]  # by `plain_signature` of the original
    only_here: bool = False  # do not replace it in modules that imported it by name
    registry: str | None = None  # name of a dict in the module that also holds it
    added_as: str | None = None  # replaces nothing: a new entry of the registry, under this key

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}" if self.added_as is None else f"{self.registry}[{self.added_as!r}]"


class Patch:
    """What was replaced in one package. `report()` lists it; `undo()` or the end of a `with` block restores it."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.rows: dict[str, str] = {}  # target -> what was done with it
        self._undoing = ExitStack()

    @property
    def replaced(self) -> list[str]:
        """The targets that this patch replaced or added."""
        return [path for path, outcome in self.rows.items() if outcome.startswith(("replaced", "added"))]

    def report(self) -> str:
        width = max((len(path) for path in self.rows), default=0)
        return "\n".join([self.title, *(f"  {path:<{width}}  {outcome}" for path, outcome in self.rows.items())])

    def on_undo(self, action: Callable[..., object], *args: Any) -> None:
        self._undoing.callback(action, *args)

    def undo(self) -> None:
        """Restore the originals; a second call does nothing."""
        self._undoing.close()
        for path in self.replaced:
            self.rows[path] = "original again: undone"

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()


def disabled() -> bool:
    return os.environ.get("RLHF_FAST_DISABLE", "0") not in ("", "0")


def patch_package(
    package: str, minors: Sequence[str], targets: Sequence[Target], *, force: bool = False, wait: bool = False
) -> Patch:
    """Replace the targets of an installed package.

    Args:
        minors: the tested versions, such as "1.16".
        force: also patch other versions; targets with an unknown signature are still left alone.
        wait: import nothing; modules that are not loaded yet are patched when they are imported.
    """
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = "(not installed)"
    patch = Patch(f"rlhf_fast -> {package} {version}, tested with {', '.join(minors)}")
    known = ".".join(version.split(".")[:2]) in minors
    if disabled():
        why_not = "RLHF_FAST_DISABLE is set"
    elif version == "(not installed)":
        why_not = f"{package} is not installed"
    elif not known and not force:
        why_not = f"version {version} was not tested; force=True tries"
    else:
        why_not = ""
    by_module: dict[str, list[Target]] = {}
    for target in targets:
        by_module.setdefault(target.module, []).append(target)
        patch.rows[target.path] = f"left alone: {why_not}" if why_not else f"waits for the import of {target.module}"
    if not why_not:
        _patch_modules(patch, by_module, wait)
    if not disabled():
        _tell_what_was_left(patch)
    return patch


def _patch_modules(patch: Patch, by_module: dict[str, list[Target]], wait: bool) -> None:
    waiting: dict[str, Callable[[], None]] = {}
    for name, targets in by_module.items():
        if wait and name not in sys.modules:
            waiting[name] = functools.partial(_patch_loaded, patch, name, targets)
            continue
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a third-party module raises when its own dependencies are missing
            for target in targets:
                patch.rows[target.path] = f"left alone: {name} cannot be imported ({error})"
            continue
        _patch_loaded(patch, name, targets)
    if waiting:
        finder = _AfterImport(waiting)
        sys.meta_path.insert(0, finder)
        patch.on_undo(sys.meta_path.remove, finder)


def _tell_what_was_left(patch: Patch) -> None:
    left = [f"{path} {outcome}" for path, outcome in patch.rows.items() if outcome.startswith("left alone")]
    if left:
        logger.warning("%s: %s", patch.title, "; ".join(left))


def _patch_loaded(patch: Patch, module_name: str, targets: Sequence[Target]) -> None:
    module = sys.modules[module_name]
    swaps: list[tuple[Target, Any, Any]] = []
    for target in targets:
        owner, original = _find(module, target.name)
        registry = getattr(module, target.registry) if target.registry else {}
        if original is None:
            patch.rows[target.path] = "not there: this version does not have it"
        elif hasattr(original, "rlhf_fast_replaces") or target.added_as in registry:
            patch.rows[target.path] = "ours already, by an earlier call"
        elif (maker := target.makers.get(plain_signature(original))) is None:
            known = " or ".join(f"({signature})" for signature in target.makers)
            patch.rows[target.path] = f"left alone: its signature is ({plain_signature(original)}), tested: {known}"
        else:
            ours = _dressed(maker(original), original)
            if target.added_as is not None:
                registry[target.added_as] = ours
                patch.on_undo(registry.pop, target.added_as, None)
                patch.rows[target.path] = "added"
                continue
            for key in [key for key, value in registry.items() if value is original]:
                registry[key] = ours
                patch.on_undo(_put_back, registry, key, ours, original)
            if isinstance(owner, type) or target.only_here:
                setattr(owner, target.name.rpartition(".")[2], ours)
                patch.on_undo(_set_back, owner, target.name.rpartition(".")[2], ours, original)
                patch.rows[target.path] = "replaced"
            else:
                swaps.append((target, original, ours))
    counts = _swap_everywhere([(original, ours) for _, original, ours in swaps])
    patch.on_undo(_swap_everywhere, [(ours, original) for _, original, ours in swaps])
    for (target, _, _), places in zip(swaps, counts, strict=True):
        patch.rows[target.path] = "replaced" if places == 1 else f"replaced, in {places} modules"


def _find(module: ModuleType, name: str) -> tuple[Any, Any]:
    """The module or class that holds the name, and its value; None where there is none."""
    owner: Any = module
    *classes, attribute = name.split(".")
    for part in classes:
        owner = vars(owner).get(part)
        if owner is None:
            return None, None
    return owner, vars(owner).get(attribute)


def plain_signature(thing: Any) -> str:
    """Parameters with their defaults, without annotations; of an autograd function or its apply: of `forward`."""
    owner = thing if isinstance(thing, type) else getattr(thing, "__self__", None)
    if isinstance(owner, type):
        thing = owner.forward  # type: ignore[attr-defined]
    parameters = inspect.signature(thing).parameters.values()
    return ", ".join(str(parameter.replace(annotation=inspect.Parameter.empty)) for parameter in parameters)


def _dressed(ours: Any, original: Any) -> Any:
    """`ours` with the name and docstring of the original, but not its attributes (such as those of torch.compile)."""
    if inspect.isfunction(original):
        functools.update_wrapper(ours, original, updated=())
    ours.rlhf_fast_replaces = original
    return ours


def _swap_everywhere(pairs: Sequence[tuple[Any, Any]]) -> list[int]:
    """In all loaded modules, rebind names of the first of each pair to the second; returns how many for each."""
    place = {id(old): i for i, (old, _) in enumerate(pairs)}
    counts = [0] * len(pairs)
    for module in list(sys.modules.values()) if pairs else []:
        if isinstance(module, ModuleType):
            for name, value in list(vars(module).items()):
                if (i := place.get(id(value))) is not None:
                    setattr(module, name, pairs[i][1])
                    counts[i] += 1
    return counts


def _put_back(registry: dict[Any, Any], key: Any, ours: Any, original: Any) -> None:
    if registry.get(key) is ours:
        registry[key] = original


def _set_back(owner: Any, name: str, ours: Any, original: Any) -> None:
    if vars(owner).get(name) is ours:
        setattr(owner, name, original)


class _AfterImport(MetaPathFinder):
    """Calls back right after one of the modules was executed, before its importers bind its names."""

    def __init__(self, waiting: dict[str, Callable[[], None]]) -> None:
        self.waiting = waiting

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        callback = self.waiting.pop(name, None)
        if callback is None:
            return None
        spec = importlib.util.find_spec(name)  # found by the other finders: this one has popped the name
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_call_back(module: ModuleType) -> None:
                run(module)
                try:
                    callback()
                except Exception:  # a trainer must be able to import its module whatever happens here
                    logger.exception("%s is not patched", name)

            spec.loader.exec_module = run_and_call_back  # type: ignore[method-assign]
        return spec
