# SPDX-License-Identifier: Apache-2.0
"""`rlhf-fast chat RUN_OR_MODEL`: type a prompt, read the model's completion."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from rlhf_fast.data.examples import encode_prompt
from rlhf_fast.errors import UserError
from rlhf_fast.models.loading import context_length, find_model, load_causal_lm, load_tokenizer
from rlhf_fast.rollout.builtin import generate
from rlhf_fast.rollout.rollout import Sampler, SamplingParams
from rlhf_fast.rollout.sampler import Served, add_arguments, open_sampler, options_of, server_log
from rlhf_fast.run.terminal import printable


def main(arguments: Sequence[str]) -> int:
    """Parse the options of the subcommand and talk until an empty line or the end of the input."""
    parser = argparse.ArgumentParser("rlhf-fast chat", description="Talk to a model, or to the result of a run folder.")
    parser.add_argument("model", help="run folder, model folder, or Hugging Face id")
    parser.add_argument("--temperature", type=float, default=0.8, help="sampling temperature (default 0.8)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="most tokens of an answer (default 64)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first answer, 1 more for each next one (default 0)"
    )
    add_arguments(parser)
    options = parser.parse_args(list(arguments))
    if options.temperature <= 0 or options.max_new_tokens <= 0:
        raise UserError("--temperature and --max-new-tokens must be greater than 0")
    path = find_model(options.model)
    params = SamplingParams(max_new_tokens=options.max_new_tokens, temperature=options.temperature)
    with open_sampler(options_of(options), Served(path, "auto"), server_log()) as sampler:
        tokenizer, model = load_tokenizer(path), load_causal_lm(path, "auto")
        print(f"{printable(path)}: an empty line quits")
        for turn in range(1_000_000_000):
            try:
                prompt = input("> ")
            except EOFError:
                break
            if not prompt.strip():
                break
            print(printable(answer(model, tokenizer, prompt, params, options.seed + turn, sampler)))
    return 0


def answer(
    model: Any, tokenizer: Any, prompt: str, params: SamplingParams, seed: int, sampler: Sampler = generate
) -> str:
    """One sampled completion of `prompt`."""
    room = context_length(model) - params.max_new_tokens
    ids = encode_prompt(tokenizer, prompt, max_length=room, where="the prompt")
    return sampler(model, tokenizer, [ids], params, seed=seed).texts[0].strip()
