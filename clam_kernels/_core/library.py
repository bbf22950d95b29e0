# SPDX-License-Identifier: Apache-2.0
"""The compiled CUDA library: found beside the package, loaded once, at first use, never at
import.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parent.parent
PATH = _PACKAGE / "_C.so"
BUILD_FILE = _PACKAGE / "_build.json"


def build_record() -> dict[str, Any]:
    """What the installer wrote: {cuda, archs, reason, torch, nvcc}; a reason if it wrote
    nothing.
    """
    try:
        record: dict[str, Any] = json.loads(BUILD_FILE.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return {"cuda": False, "reason": f"no build record ({type(error).__name__})"}
    return record


@functools.cache
def why_unavailable() -> str | None:
    """None once the library is loaded, else the reason why it is not."""
    record = build_record()
    if not PATH.exists():
        return f"the CUDA library is not built: {record.get('reason', 'unknown reason')}"
    try:
        torch.ops.load_library(str(PATH))
    except OSError as error:
        built = f"built for torch {record.get('torch')}, running torch {torch.__version__}"
        return f"the CUDA library does not load ({error.__cause__ or error}); {built}"
    return None
