# SPDX-License-Identifier: Apache-2.0
"""Dropout of every kind: switched off when a model is loaded, and on again by the option `dropout`.

In RL old and new log-probabilities must come from the same function, so dropout is off. The other phases leave it off
as well, unless their option `dropout` says otherwise. A saved model has the rates of its original configuration.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

# In the names of rates: attn_pdrop, layerdrop, drop_path_prob, attention_dropout, ... and the noise of some routers.
WORDS = ("drop", "jitter")
Rate = tuple[Any, str, float]  # holder, attribute or key, value


def switch_off_dropout(model: Any) -> None:
    """Set every rate of the model and of its configuration to 0, after storing it in `model.dropout_rates`."""
    if not hasattr(model, "dropout_rates"):
        model.dropout_rates = [*_config_rates(model.config), *_module_rates(model)]
        model.while_saving = partial(own_config, model)  # for `RunFolder.save_model`
    for holder, name, _ in model.dropout_rates:
        _set(holder, name, 0.0)
    model.dropout_is_on = False


def switch_on_dropout(model: Any) -> None:
    """Restore the rates that `switch_off_dropout` stored."""
    for holder, name, value in model.dropout_rates:
        _set(holder, name, value)
    model.dropout_is_on = bool(model.dropout_rates)


def keep_rates(model: Any, plain: Any) -> None:
    """Save `plain`, a model with the configuration of `model`, with the same rates as `model`."""
    plain.dropout_rates = [
        (plain.config, name, value) for holder, name, value in model.dropout_rates if holder is model.config
    ]
    plain.while_saving = partial(own_config, plain)


@contextmanager
def own_config(model: Any) -> Iterator[None]:
    """Within it the configuration has the original rates, for saving."""
    rates = [rate for rate in model.dropout_rates if not isinstance(rate[0], nn.Module)]
    before = [(holder, name, _get(holder, name)) for holder, name, _ in rates]
    for holder, name, value in rates:
        _set(holder, name, value)
    try:
        yield
    finally:
        for holder, name, value in before:
            _set(holder, name, value)


def _config_rates(config: Any) -> Iterator[Rate]:
    """Rates of a configuration and of the configurations and mappings in it."""
    values = config if isinstance(config, dict) else vars(config)
    for name, value in list(values.items()):
        if _is_rate(name, value):
            yield config, name, value
        elif isinstance(value, dict) or type(value).__name__.endswith("Config"):
            yield from _config_rates(value)


def _module_rates(model: Any) -> Iterator[Rate]:
    """Rates that modules store themselves: p of nn.Dropout and similar classes, and other numbers."""
    for module in model.modules():
        for name, value in vars(module).items():
            if _is_rate(name, value) or (
                name == "p" and "Dropout" in type(module).__name__ and _is_rate("drop", value)
            ):
                yield module, name, value


def _is_rate(name: Any, value: Any) -> bool:
    return isinstance(value, float) and value > 0 and any(word in str(name) for word in WORDS)


def _get(holder: Any, name: str) -> Any:
    return holder[name] if isinstance(holder, dict) else getattr(holder, name)


def _set(holder: Any, name: str, value: float) -> None:
    if isinstance(holder, dict):
        holder[name] = value
    else:
        setattr(holder, name, value)
