# SPDX-License-Identifier: Apache-2.0
"""A run prints what its user needs: what libraries say about themselves is left out."""

from __future__ import annotations

import logging
import sys
import warnings

LIBRARIES = "torch|transformers|peft|accelerate|huggingface_hub|bitsandbytes|tokenizers|datasets"


def quiet() -> None:
    """Silence warnings of libraries, unless the user wants them (`python -W`), and bars that would cross ours."""
    # It looks for a kernel on the hub whenever it is imported, which peft and the Trainer do.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.warnoptions:
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category, module=rf"({LIBRARIES})(\.|$)")
    if "transformers" in sys.modules:
        from transformers.utils import logging as messages

        messages.set_verbosity_error()
        messages.disable_progress_bar()
