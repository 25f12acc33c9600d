# SPDX-License-Identifier: Apache-2.0
"""What the built-in sampler draws a token from, and where it ends a completion, on a few tokens by hand."""

from __future__ import annotations

import torch

from rlhf_fast.rollout.builtin import Ends
from rlhf_fast.rollout.distribution import draw
from rlhf_fast.rollout.rollout import SamplingParams


def test_top_p_is_a_share_of_what_top_k_has_kept() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    for top_p, kept in ((0.55, [0]), (0.6, [0, 1])):  # of 4/7 and 3/7
        _, support = draw(logits, torch.zeros(1), SamplingParams(top_k=2, top_p=top_p))
        assert support is not None and support.ids.tolist() == kept


def test_stop_strings_end_nothing_before_min_new_tokens() -> None:
    class Letters:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return "".join(["a", "b", "c", "", "e", "f"][i] for i in ids)

    ends = Ends([5], SamplingParams(stop=("zz", "ab"), min_new_tokens=3, top_k=5), Letters())
    assert not ends.reached(torch.tensor([[0, 1]])).any()
    assert ends.reached(torch.tensor([[0, 1, 2], [1, 0, 2], [1, 2, 5]])).tolist() == [True, False, True]
    assert ends.reached(torch.tensor([[0, 3, 3, 3, 3, 1]])).all()  # tokens without a letter in between
    assert [ends.forbidden(step) for step in (2, 3)] == [[5], []]
