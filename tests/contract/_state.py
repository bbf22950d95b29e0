# SPDX-License-Identifier: Apache-2.0
"""The state that all threads of a process share, and that a call could leave changed."""

from __future__ import annotations

import os
import random
import warnings
from typing import Any

import numpy as np
import torch

from clam_kernels._core import backend

MATMUL = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


def modes() -> list[str]:
    return [switch.fp32_precision for switch in MATMUL]


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def state() -> dict[str, Any]:
    """All such state of this process."""
    generator = np.random.get_state()  # noqa: NPY002
    return {
        "torch's generator": torch.get_rng_state().tolist(),
        "numpy's generator": [generator[1].tolist(), generator[2:]],
        "python's generator": random.getstate(),
        "threads": torch.get_num_threads(),
        "products": modes(),
        "precision": torch.get_float32_matmul_precision(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "gradients": [torch.is_grad_enabled(), torch.is_inference_mode_enabled()],
        "autocast": [torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "backend": backend.requested(),
        "warnings": list(warnings.filters),
        "floats": np.geterr(),
        "mask": umask(),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
    }
