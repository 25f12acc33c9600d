# SPDX-License-Identifier: Apache-2.0
"""Silencing libraries, so that a run prints only what its user needs."""

from __future__ import annotations

import logging
import sys
import warnings

LIBRARIES = "torch|transformers|peft|accelerate|huggingface_hub|bitsandbytes|tokenizers|datasets"


def quiet() -> None:
    """Silence warnings of libraries, unless the user wants them (`python -W`), and their progress bars."""
    # It logs a search for a kernel on the hub at import; peft and the Trainer import it.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.warnoptions:
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category, module=rf"({LIBRARIES})(\.|$)")
    if "transformers" in sys.modules:
        from transformers.utils import logging as messages

        messages.set_verbosity_error()
        messages.disable_progress_bar()
