# SPDX-License-Identifier: Apache-2.0
"""A reward model with another vocabulary than the policy: it reads text, with its own tokenizer and template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlhf_fast.data.encoding import encode_texts, reads_ids_of
from rlhf_fast.data.examples import PromptLine, pad_right
from rlhf_fast.errors import UserError
from rlhf_fast.models.batches import NO_ROWS, Batch, MicroBatch, in_micro_batches
from rlhf_fast.models.fsdp import pad_to_ranks
from rlhf_fast.models.heads import sequence_scores
from rlhf_fast.models.loading import context_length, load_tokenizer
from rlhf_fast.run.progress import notice


@dataclass(frozen=True)
class Reader:
    """Scores texts with such a model."""

    tokenizer: Any
    max_length: int
    micro_batch: MicroBatch

    def scores(self, model: Any, prompts: Sequence[PromptLine], texts: Sequence[str], ended: Sequence[bool]) -> Tensor:
        """(B,) scores of the completions `texts`; completions of one prompt are next to each other."""
        samples = len(texts) // len(prompts)
        every = [line.prompt for line in prompts for _ in range(samples)]
        rows = encode_texts(self.tokenizer, every, texts, ended, self.max_length)
        device = next(model.parameters()).device
        ids, attention = (x.to(device) for x in pad_right(rows, self.tokenizer.pad_token_id))
        batch = Batch(ids, attention.bool(), attention.bool())
        plan = pad_to_ranks(batch.plan(self.micro_batch.rows, tokens=self.micro_batch.tokens), model, NO_ROWS)
        return in_micro_batches(lambda part: sequence_scores(model, part), batch, plan)


def reader_of(
    reward: Any, source: str, tokenizer: Any, policy: Any, micro_batch: MicroBatch, trust_remote_code: bool = False
) -> Reader | None:
    """None if the reward model, loaded from `source`, reads the token ids that the policy writes with `tokenizer`.

    Sizes do not tell: Llama 2 and Mistral both have 32 000 tokens, and embeddings are padded. A model without a
    tokenizer of its own is taken for one of the policy's family if it has embeddings enough.
    """
    size = reward.get_input_embeddings().num_embeddings
    ids = min(len(tokenizer), policy.get_input_embeddings().weight.shape[0])
    try:
        own = load_tokenizer(source, trust_remote_code)
    except UserError:
        if size >= ids:
            return None
        raise UserError(
            f"the reward model {source!r} has {size} embeddings for a vocabulary of {ids} and no tokenizer of its own: "
            "it cannot read what the policy writes"
        ) from None
    if reads_ids_of(own, tokenizer) and size >= ids:
        return None
    notice(
        f"the reward model {source!r} has another vocabulary than the policy: it reads prompts and completions as "
        "text, by its own tokenizer and chat template, and a critic starts from the policy"
    )
    reward.config.pad_token_id = own.pad_token_id
    return Reader(own, min(context_length(reward), 2**20), micro_batch)
