# SPDX-License-Identifier: Apache-2.0
"""Models cut over two processes against whole ones: `torchrun --nproc-per-node 2 ranks_fsdp.py CASE ...`.

test_fsdp.py starts it. Each rank learns from sequences of its own, the second of fewer micro-batches than the first.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
    PreTrainedConfig,
)
from vllm_stub import Stub

from rlhf_fast.distributed.dtensors import full_on_main, full_state_dict
from rlhf_fast.distributed.ranks import ranks
from rlhf_fast.errors import UserError
from rlhf_fast.models.activations import checkpoint_activations
from rlhf_fast.models.batches import NO_ROWS, Batch, in_micro_batches
from rlhf_fast.models.fsdp import pad_to_ranks, sharded, unsharded
from rlhf_fast.models.heads import check_head, token_kl, token_logprobs, token_values
from rlhf_fast.models.loading import make_critic
from rlhf_fast.models.optim import AdamW
from rlhf_fast.rollout.builtin import generate
from rlhf_fast.rollout.engine import EngineSampler
from rlhf_fast.rollout.rollout import SamplingParams
from rlhf_fast.rollout.vllm_server import VLLMServers
from rlhf_fast.trainer.rl.ahead import Key, OneStepAhead

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {**SIZES, "intermediate_size": 37, "vocab_size": 61, "num_key_value_heads": 1}  # odd: slices are not equal
CONFIGS: dict[str, PreTrainedConfig] = {
    "tied": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "untied": LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "biased": PhiConfig(**LLAMA, tie_word_embeddings=False),  # a bias on the head, too
    "experts": MixtralConfig(
        **{**LLAMA, "intermediate_size": 40}, num_local_experts=8, num_experts_per_tok=1
    ),  # some read no token at all
    "gpt2": GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=61, n_positions=32, bos_token_id=1, eos_token_id=2),
}


class Tokenizer:
    """As much of one as generation asks for."""

    pad_token_id, eos_token_id = 0, 2

    def decode(self, ids: Tensor, skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def batches() -> list[Batch]:
    """What each rank has."""
    found = []
    for rank in range(ranks().count):
        g = torch.Generator().manual_seed(rank)
        lengths = torch.randint(5, 9, (5 - 2 * (rank % 2),), generator=g)
        attention = torch.arange(9) < lengths[:, None]
        ids = torch.randint(3, 61, attention.shape, generator=g) * attention
        found.append(Batch(ids, attention, attention & (torch.arange(9) >= 2)))
    return found


def loss_of(model: Any, part: Batch, critic: bool) -> Tensor:
    made = token_values(model, part) if critic else token_logprobs(model, part)
    return (made * torch.arange(1, made.shape[1] + 1)).sum() / 20


def whole(value: Any) -> Any:
    """Tensors gathered in the main process."""
    return {name: full_on_main(x) for name, x in value.items()} if isinstance(value, dict) else full_on_main(value)


def compare(model: Any, critic: bool, tolerance: float, size: int = 0, kind: Any = "adamw") -> None:
    """Gradients, their norm and the weights after three steps, to a whole model that reads what all ranks read."""
    cut = sharded(copy.deepcopy(model), True, size)
    mine, other = AdamW(cut.parameters(), lr=1e-3, kind=kind), AdamW(model.parameters(), lr=1e-3)
    assert sum(master.numel() for _, master in mine.pairs) < 0.6 * sum(p.numel() for p in model.parameters())
    own = batches()[ranks().index]
    for _ in range(3):
        plan = pad_to_ranks(own.plan(2), cut, NO_ROWS)
        assert len(plan) == 3 and (len(plan[-1]) == 0) == (ranks().index % 2 == 1)
        for rows in plan:
            loss_of(cut, own.rows(rows), critic).backward()
        for batch in batches():
            for rows in batch.plan(2):
                loss_of(model, batch.rows(rows), critic).backward()
        theirs = torch.nn.utils.get_total_norm([m.grad for _, m in other.pairs if m.grad is not None])
        for _, master in other.pairs:  # its step adds up over ranks, which have all the same
            master.grad = None if master.grad is None else master.grad / ranks().count
        norms = mine.step(0.5), other.step(0.5)
        torch.testing.assert_close(torch.tensor(norms), theirs.expand(2), rtol=tolerance, atol=0)
    gathered = {kind: {i: whole(x) for i, x in saved.items()} for kind, saved in mine.state_dict().items()}
    saved = gathered, other.state_dict()
    if ranks().main:
        for kind in ("weights", "moments"):
            torch.testing.assert_close(saved[0][kind], saved[1][kind], rtol=0, atol=tolerance)
    state, plain = full_state_dict(cut), model.state_dict()
    assert state is not None and state.keys() == plain.keys()
    if ranks().main:
        torch.testing.assert_close(state, plain, rtol=0, atol=2 * tolerance)


def learns(name: str, dtype: torch.dtype = torch.float32, checkpointing: bool = False, critic: bool = False) -> None:
    torch.manual_seed(0)
    if critic:
        config = copy.deepcopy(CONFIGS[name])
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
        model.score.float()
        model = make_critic(model)
    else:
        model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype)
    model.eval()
    if checkpointing:
        checkpoint_activations(model)
        model.train()
    compare(model, critic, 1e-5 if dtype == torch.float32 else 2e-2)


def tied() -> None:
    learns("tied")
    learns("tied", torch.bfloat16)


def untied() -> None:
    learns("untied")
    learns("untied", torch.bfloat16)
    learns("untied", checkpointing=True)


def biased() -> None:
    learns("biased")


def experts() -> None:
    learns("experts")


def gpt2() -> None:
    learns("gpt2")


def critic() -> None:
    learns("untied", critic=True)
    learns("untied", torch.bfloat16, critic=True)


def reads() -> None:
    """Passes without gradients, sampling of different lengths on the ranks, and what is in memory between them."""
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        reference = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        pair, cut_pair = (model, reference), [sharded(copy.deepcopy(m), True) for m in (model, reference)]
        own = batches()[ranks().index]
        results = []
        for policy, other in (pair, cut_pair):
            plan = pad_to_ranks(own.plan(2), policy, NO_ROWS)
            kl = in_micro_batches(lambda part, p=policy, o=other: token_kl(p, lambda: nullcontext(o), part), own, plan)
            check_head(policy, own.input_ids[:1])
            prompts = [row[keep].tolist() for row, keep in zip(own.input_ids, own.attention_mask, strict=True)]
            made = generate(policy, Tokenizer(), prompts, SamplingParams(max_new_tokens=3 + 9 * ranks().index), seed=1)
            results.append((kl, made.input_ids, token_logprobs(policy, own)))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
        assert len(results[0][1]) == len(own.input_ids), name
        shapes = [tuple(p.shape) for p in cut_pair[0].parameters()]
        with unsharded(cut_pair[0]):
            assert not any(hasattr(p, "placements") for p in cut_pair[0].parameters())
        assert all(hasattr(p, "placements") for p in cut_pair[0].parameters())
        assert shapes == [tuple(p.shape) for p in model.parameters()]


def engine() -> None:
    """A server has the weights of all ranks, new ones after a step; samples are those of one process."""
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(CONFIGS["tied"], dtype=torch.float32).eval()
    served, whole_policy = copy.deepcopy(policy), copy.deepcopy(policy)
    cut_policy = sharded(policy, True)
    optimizer = AdamW(cut_policy.parameters(), lr=1e-2)
    stub = Stub(served).__enter__() if ranks().main else None
    (url, _) = ranks().every(stub.url if stub else None)
    sampler = EngineSampler(VLLMServers([url]))
    prompts = [[5, 9, 11], [8, 3], [6, 33, 21], [7, 19]]
    mine = slice(2 * ranks().index, 2 * ranks().index + 2)
    params, texts, versions = SamplingParams(max_new_tokens=4), [], []
    for step in range(2):
        rollout = sampler(
            cut_policy, Tokenizer(), prompts[mine], params, seed=3, samples_per_prompt=2,
            first_prompt=mine.start, total_prompts=4,
        )  # fmt: skip
        own = token_logprobs(cut_policy, rollout.batch).detach()
        torch.testing.assert_close(own, rollout.logprobs, rtol=0, atol=1e-5)
        texts.append([text for part in ranks().every(rollout.texts) for text in part])
        versions.append(sampler.version)
        assert versions[-1] == versions[0] + step and (stub is None or stub.version == versions[-1])
        loss_of(cut_policy, batches()[ranks().index].rows(torch.arange(3)), critic=False).backward()
        optimizer.step(1.0)
    assert texts[0] != texts[1]
    texts.append(_ahead(sampler, cut_policy, prompts, mine, params))
    ranks().wait()
    ranks().leave()  # from here on this is one process
    if stub is not None:
        alone = EngineSampler(VLLMServers([url]))
        assert alone(whole_policy, Tokenizer(), prompts, params, seed=3, samples_per_prompt=2).texts == texts[0]
        state = json.loads(texts[2])
        assert len(state["texts"]) == 8 and state["steps_behind"] == 1
        stub.stop()
    ranks()._alone = False


def _ahead(sampler: EngineSampler, policy: Any, prompts: Any, mine: slice, params: SamplingParams) -> str:
    """Step 0 and 1 by two processes; what a checkpoint holds after step 0 gives each its share of step 1 again."""

    def call(method: Any, step: int, place: int) -> Any:
        return method(
            policy, Tokenizer(), prompts[mine], params, seed=step, samples_per_prompt=2, first_prompt=mine.start
        )

    ahead, resumed = OneStepAhead(sampler, 2), OneStepAhead(sampler, 2)
    ahead.take(Key(0, 0, 8), call, 4)
    state = ahead.state(1)
    rollout = ahead.take(Key(1, 4, 8), call, 4)
    resumed.load(state, 1)
    again = resumed.take(Key(1, 4, 8), call, 4)
    assert again.texts == rollout.texts == call(sampler, 1, 4).texts
    assert torch.equal(again.input_ids, rollout.input_ids) and torch.equal(again.logprobs, rollout.logprobs)
    return json.dumps({name: state[name] for name in ("texts", "steps_behind")})


def refused() -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS["tied"])
    model._no_split_modules = None
    try:
        sharded(model, True)
    except UserError as error:
        assert "does not say what its decoder layers are" in str(error), error
    else:
        raise AssertionError("a model without known layers was cut")


if __name__ == "__main__":
    import ranks_checkpoints
    import ranks_mesh

    torch.set_num_threads(1)
    ranks()
    for case in sys.argv[1:]:
        (globals().get(case) or getattr(ranks_checkpoints, case, None) or getattr(ranks_mesh, case))()
        print(f" {case} done ", flush=True)
    ranks().wait()
    os._exit(0)  # past the end of Python, where the threads of torch's meshes may still ask for their group
