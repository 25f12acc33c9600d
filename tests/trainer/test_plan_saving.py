# SPDX-License-Identifier: Apache-2.0
"""What `rlhf-fast plan` counts of the options that save memory: offloaded state and activations, 8 bits, shards."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.offloads import Casts, moved_to_host
from helpers.plans import LLAMA, folder_of, options_of
from transformers import AutoModelForCausalLM

from rlhf_fast import cli
from rlhf_fast.models import activations
from rlhf_fast.models.footprint import Footprint
from rlhf_fast.models.optim import AdamW
from rlhf_fast.models.optimizers import pinned_bytes, state_bytes
from rlhf_fast.report import estimate, plan


@pytest.mark.parametrize("checkpointing", [False, True])
def test_offloaded_activations_are_what_goes_to_cpu_memory(checkpointing: bool, tmp_path: Path) -> None:
    found = Footprint.of(folder_of(LLAMA, tmp_path), torch.float32)
    real = AutoModelForCausalLM.from_config(deepcopy(LLAMA), dtype=torch.float32, attn_implementation="sdpa").train()
    activations.set_up_activations(real, checkpointing, True)
    with moved_to_host() as moved, activations.activations_of(real):
        real.base_model(input_ids=torch.ones((3, 40), dtype=torch.int64), use_cache=False)
    copies = {id(copy): copy for _, copy in moved}
    device, host = found.offloaded(3, 40, checkpointing)
    norm = 2 * 120 * 64 * 4 * checkpointing  # the last norm's, which is in no layer: little in a model of many
    assert sum(host) == pytest.approx(sum(x.nbytes for x in copies.values()) - norm, rel=0.1)
    if not checkpointing:
        pinned = sum(pinned_bytes(x.nbytes) for x in copies.values())
        assert sum(map(pinned_bytes, host)) == pytest.approx(pinned, rel=0.1)
    assert device == pytest.approx(found.saved(3, 40, False) / 3, rel=1e-3)


@pytest.mark.parametrize("kind", ["adamw", "adamw-offload", "adamw-8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_state_is_as_large_as_counted(kind: Any, dtype: torch.dtype) -> None:
    if kind == "adamw-8bit":
        pytest.importorskip("bitsandbytes")
    weight = torch.nn.Parameter(torch.ones(100, 512, dtype=dtype))
    optimizer = AdamW([weight], lr=0.1, kind=kind)
    weight.sum().backward()
    optimizer.step()
    ((_, master),) = optimizer.pairs
    moments = [x for name, x in optimizer.optimizer.state[master].items() if torch.is_tensor(x) and "qmap" not in name]
    state = sum(x.nbytes for x in moments if x.dim())
    masters = 0 if master is weight else master.untyped_storage().nbytes()
    hosts = sum(x.nbytes for x in getattr(optimizer.optimizer, "hosts", {}).values())
    device, host = state_bytes(kind, weight.numel(), dtype == torch.bfloat16)
    found = (0, state + hosts) if kind == "adamw-offload" else (state + masters, 0)
    assert found == pytest.approx((device, host)) and (kind != "adamw-offload" or masters == 0)


def test_options_that_save_memory_are_counted_and_in_the_launch_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = options_of(tmp_path / "seven", gpus=16)
    models, setup = plan.load(options), plan.Setup(fsdp=True, gradient_checkpointing=True, micro_batch=4)
    whole, usual = plan.memory(options, models, setup), plan.peak(plan.memory(options, models, setup))
    assert estimate.host_bytes(options, models, setup) == 0
    options.fsdp_size = 8
    groups = plan.memory(options, models, setup)["update policy"]
    for part in ("policy weights", "policy optimizer", "gradients"):
        assert groups[part] == pytest.approx(2 * whole["update policy"][part])
    options.fsdp_size, options.optimizer = 0, "adamw-8bit"
    eight = plan.memory(options, models, setup)["sample"]["policy optimizer"]
    assert eight == pytest.approx(whole["sample"]["policy optimizer"] * 6.03 / 12, rel=1e-3)
    options.optimizer = "adamw-offload"
    assert plan.peak(plan.memory(options, models, setup)) < usual
    states = whole["sample"]["policy optimizer"] + whole["sample"]["critic optimizer"]
    found = estimate.host_bytes(options, models, setup)
    # Of each float32 tensor a process has a 16th, rounded up to a power of two: 4 of attention, 3 of MLP, norms.
    each = 32 * (4 * 2**22 + 3 * 2**24) + 2 * 2**25 + 65 * 2**10
    assert states < found == 2 * 3 * each  # policy and critic; master and moments
    options.activation_offloading = True
    more = estimate.host_bytes(options, models, setup) - found
    tokens = estimate.pass_tokens(options, estimate.micro_batch_rows(options, setup))
    assert more == 32 * 4096 * 2 * 2 ** math.ceil(math.log2(tokens))  # the input of each layer, in bfloat16
    config = folder_of(LLAMA, tmp_path / "small")
    words = ["plan", "--model", config, "--gpus", "4", "--optimizer", "adamw-offload", "--activation-offloading"]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    words = " ".join(shown.split())
    assert "of pinned CPU memory for each process" in words and "copies to and from CPU memory at 20 GB/s" in words
    assert "optimizer state over PCIe" in words and "activations over PCIe" in words
    assert "--optimizer adamw-offload --activation-offloading" in shown.splitlines()[-1]


def test_what_is_offloaded_takes_time(tmp_path: Path) -> None:
    options = options_of(tmp_path, gpus=16, epochs=3, optimizer="adamw-offload", activation_offloading=True)
    models, setup = plan.load(options), plan.Setup(fsdp=True, gradient_checkpointing=True)
    times = plan.seconds(options, models, setup)
    minibatches, weights = estimate.COMMON_DEFAULTS["num_minibatches"], 2 * models.policy.weights  # with the critic
    assert times["optimizer state over PCIe"] == pytest.approx(3 * minibatches * 2 * 12 * weights / 16 / 20e9)
    inputs = 2 * 32 * 4096 * 2 * estimate.pass_tokens(options, 4)
    assert times["activations over PCIe"] == pytest.approx(3 * 2 * inputs / 20e9)
    options.host_bandwidth = 40.0
    assert 2 * plan.seconds(options, models, setup)["activations over PCIe"] == times["activations over PCIe"]
    options.optimizer, options.activation_offloading = "adamw", False
    assert not [name for name in plan.seconds(options, models, setup) if "PCIe" in name]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_forward_under_autocast_ends_with_a_copy_of_all_weights(checkpointing: bool, tmp_path: Path) -> None:
    """Shards have no part in that: it is made from gathered weights."""
    options = plan.PlanOptions(model=folder_of(LLAMA, tmp_path), phase="sft", gpus=2)
    models = plan.load(options)
    real = AutoModelForCausalLM.from_config(deepcopy(LLAMA), dtype=torch.float32).train()
    activations.set_up_activations(real, checkpointing, False)
    with torch.autocast("cpu", torch.bfloat16), Casts(real.base_model) as casts:
        output = real.base_model(input_ids=torch.ones((3, 40), dtype=torch.int64), use_cache=False)
        kept = casts.alive()
    assert casts.alive() == (0 if checkpointing else kept)  # autocast has its own until the end of the forward
    assert output.last_hidden_state.requires_grad
    for fsdp in (False, True):
        moments = plan.memory(options, models, plan.Setup(fsdp=fsdp, gradient_checkpointing=checkpointing))
        counted = moments["update"]["weights in autocast's dtype"]
        assert counted - 2 * 2 * 64 * 301 == pytest.approx(kept, rel=0.01)  # embedding and head are not cast
        assert moments["update"]["policy weights"] == 4 * models.policy.weights / (2 if fsdp else 1)
