# SPDX-License-Identifier: Apache-2.0
"""Where the built-in sampler ends a completion."""

from __future__ import annotations

import torch

from rlhf_fast.rollout.builtin import Ends
from rlhf_fast.rollout.rollout import SamplingParams


def test_stop_strings_end_nothing_before_min_new_tokens() -> None:
    class Letters:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return " ".join("abcdef"[i] for i in ids)

    ends = Ends([5], SamplingParams(stop=("z", "a b"), min_new_tokens=3, top_k=5), Letters())
    assert not ends.reached(torch.tensor([[0, 1]])).any()
    assert ends.reached(torch.tensor([[0, 1, 2], [1, 0, 2], [1, 2, 5]])).tolist() == [True, False, True]
    assert [ends.forbidden(step) for step in (2, 3)] == [[5], []]
