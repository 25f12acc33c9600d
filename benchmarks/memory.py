# SPDX-License-Identifier: Apache-2.0
"""Peak extra memory, each figure from a process of its own: `python benchmarks/memory.py eager token_logprobs 1024`.

Extra is the rise of the peak resident memory over what was resident before the call, gradients included. Linux alone:
the peak is reset through /proc/self/clear_refs.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WIDTH, HIDDEN = 49152, 576
ROWS = (256, 512, 1024, 2048)
OPS = {"token_logprobs": "token_logprobs forward + backward", "linear_token_logprobs": "the same from hidden states"}
PROVIDERS = ("eager", "native")


def resident(field: str) -> int:
    """Bytes of /proc/self/status: VmRSS is resident now, VmHWM was at most."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def extra_bytes(provider: str, op: str, rows: int) -> int:
    import torch
    from common import backward, eager_linear_logprobs, eager_logprobs, on

    import rlhf_fast as rf

    ours = provider == "native"

    def prepare(rows: int) -> Any:
        targets = torch.randint(WIDTH, (rows,))
        if op == "token_logprobs":
            logits = torch.randn(rows, WIDTH).requires_grad_()
            if ours:
                call = lambda: rf.token_logprobs(logits, targets, inplace_backward=True)  # noqa: E731
            else:
                call = lambda: eager_logprobs(logits, targets)  # noqa: E731
            return on(provider if ours else "auto", backward(call, [logits]))
        hidden, weight = torch.randn(rows, HIDDEN).requires_grad_(), torch.randn(WIDTH, HIDDEN).requires_grad_()
        function = rf.linear_token_logprobs if ours else eager_linear_logprobs
        return backward(lambda: function(hidden, weight, targets), [hidden, weight])

    prepare(2)()  # threads, libraries and code are resident after this
    call = prepare(rows)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    call()
    return max(0, resident("VmHWM") - before)


def measure() -> Iterator[dict[str, Any]]:
    """One row per op, provider and number of rows; nothing where the system does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return
    for op in OPS:
        for rows in ROWS:
            for provider in PROVIDERS:
                command = [sys.executable, __file__, provider, op, str(rows)]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                yield {"op": op, "provider": provider, "rows": rows, "extra_bytes": int(output)}


if __name__ == "__main__":
    print(extra_bytes(sys.argv[1], sys.argv[2], int(sys.argv[3])))
