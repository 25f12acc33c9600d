# SPDX-License-Identifier: Apache-2.0
"""`rf.hf`: the ops on a Hugging Face causal LM, with the model's own trunk and head."""

from .causal_lm import token_logprobs, token_stats
from .lm_head import LanguageModelHead, language_model_head
from .transformers import patch_loss

__all__ = ["LanguageModelHead", "language_model_head", "patch_loss", "token_logprobs", "token_stats"]
