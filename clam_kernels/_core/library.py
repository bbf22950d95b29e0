# SPDX-License-Identifier: Apache-2.0
"""The compiled CUDA library in the package folder: its first use loads it, import never does."""

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
    """The record of the installer: {cuda, archs, reason, torch, nvcc}. Without a record the result
    has only {cuda, reason}.
    """
    try:
        record: dict[str, Any] = json.loads(BUILD_FILE.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return {"cuda": False, "reason": f"no build record ({type(error).__name__})"}
    return record


@functools.cache
def why_unavailable() -> str | None:
    """Load the library; the reason why that is not possible, or None."""
    record = build_record()
    if not PATH.exists():
        return f"the CUDA library is not built: {record.get('reason', 'unknown reason')}"
    try:
        torch.ops.load_library(str(PATH))
    except OSError as error:
        built = f"built for torch {record.get('torch')}, running torch {torch.__version__}"
        return f"the CUDA library does not load ({error.__cause__ or error}); {built}"
    return None
