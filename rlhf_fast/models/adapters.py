# SPDX-License-Identifier: Apache-2.0
"""Saving adapters by themselves, beside the model that they are merged into, in peft's format."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_fast.distributed.dtensors import full_on_main
from rlhf_fast.run.folder import RunFolder


def save_adapters(handle: Any, run: RunFolder, head: str = "") -> None:
    """Write adapters/ of the run, as `peft.PeftModel.from_pretrained` reads it. All ranks must call it.

    `head` names a layer that was trained in full: its weights are written with them, as peft's modules_to_save.
    """
    from peft import get_peft_model_state_dict

    config = copy.deepcopy(handle.peft_config[handle.active_adapter])
    state = dict(get_peft_model_state_dict(handle))
    if head:
        config.modules_to_save = [head]
        layer = handle.get_base_model().get_submodule(head)
        state |= {f"base_model.model.{head}.{name}": weight for name, weight in layer.named_parameters()}
    config.inference_mode = True
    whole = {name: full_on_main(weight.detach()).cpu().contiguous() for name, weight in state.items()}
    run.save_adapters(lambda folder: _write(folder, whole, config))


def _write(folder: Path, state: dict[str, Tensor], config: Any) -> None:
    from safetensors.torch import save_file

    save_file(state, folder / "adapter_model.safetensors")
    config.save_pretrained(str(folder))
