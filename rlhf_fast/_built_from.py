# SPDX-License-Identifier: Apache-2.0
"""A checksum of the extension's sources: in a checkout it tells a build of these sources from a stale one.

Operators take their arguments by position, so an extension of other sources would compute something else and say
nothing. setup.py writes the checksum beside the build, and `_ext.py` compares. Imports nothing that setup.py may lack.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

NOTE = "_built_from.txt"  # in the package
PATTERNS = ("csrc/*.h", "csrc/*.cpp", "csrc/cpu/*")  # CUDA's are not compiled on every machine


def checksum(root: Path) -> str:
    """SHA-256 of names and contents of the sources in a checkout; empty where there are none."""
    files = sorted(path for pattern in PATTERNS for path in root.glob(pattern))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest() if files else ""


def stale(package: Path) -> str:
    """Why the extension in the package's folder must not be loaded; empty if it may."""
    if not (package.parent / "setup.py").exists():  # installed: a csrc/ beside it is another package's
        return ""
    sources = checksum(package.parent)
    note = package / NOTE
    if not sources or (note.exists() and note.read_text() == sources):
        return ""
    return "the extension was built from other sources than those in csrc/; run python setup.py build_ext --inplace"
