# SPDX-License-Identifier: Apache-2.0
"""How full SFT's rows are: padded, packed within a micro-batch (`packing`), or packed over the whole file by TRL.

    python benchmarks/packing_fill.py

prints the share of the computed tokens that are no pads, for three distributions of lengths. Best fit over the whole
file is that of `trl.data_utils.pack_dataset` (strategy bfd), in rows of max_length. Counts, not times.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from rlhf_fast.trainer.sft.packing import in_rows

EXAMPLES, MAX_LENGTH = 20_000, 2048
DISTRIBUTIONS: dict[str, Callable[[random.Random], float]] = {
    "short chats: log-normal, median 150": lambda rng: rng.lognormvariate(5.0, 0.8),
    "even: uniform from 50 to 2048": lambda rng: rng.uniform(50, 2048),
    "two kinds: 4 of 5 near 80, 1 of 5 near 1500": lambda rng: (
        rng.gauss(80, 20) if rng.random() < 0.8 else rng.gauss(1500, 200)
    ),
}


def within_batches(lengths: Sequence[int], size: int, *, packed: bool) -> float:
    """Share of real tokens in micro-batches of `size` examples, in the order of the file."""
    computed = 0
    for start in range(0, len(lengths), size):
        part = lengths[start : start + size]
        rows = in_rows(part, MAX_LENGTH) if packed else [[i] for i in range(len(part))]
        computed += len(rows) * max(sum(part[i] for i in row) for row in rows)
    return sum(lengths) / computed


def best_fit(lengths: Sequence[int]) -> float:
    """The same for TRL's best fit over all examples; every row has max_length."""
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    dataset = Dataset.from_dict({"input_ids": [[0] * n for n in lengths]})
    return sum(lengths) / (len(pack_dataset(dataset, MAX_LENGTH, "bfd")) * MAX_LENGTH)


def main() -> None:
    """Print the table of docs/trainer-measurements.md."""
    print("| lengths | padded, 32 | packed, 8 | packed, 32 | packed, 128 | best fit over the file |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, draw in DISTRIBUTIONS.items():
        rng = random.Random(0)
        lengths = [max(8, min(MAX_LENGTH, round(draw(rng)))) for _ in range(EXAMPLES)]
        shares = [within_batches(lengths, 32, packed=False)]
        shares += [within_batches(lengths, size, packed=True) for size in (8, 32, 128)]
        print(f"| {name} | " + " | ".join(f"{share:.1%}" for share in (*shares, best_fit(lengths))) + " |")


if __name__ == "__main__":
    main()
