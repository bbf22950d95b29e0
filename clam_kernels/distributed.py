# SPDX-License-Identifier: Apache-2.0
"""Exchange of tensors between processes, in the order of the ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def gather(x: Tensor, group: Any) -> Tensor:
    """Stack the tensors of all processes of a group, in the order of their ranks.

    Parameters
    ----------
    x : Tensor [...]
        The tensor of this process: the same shape, dtype and device type on all processes.
    group : torch.distributed.ProcessGroup
        All of its processes must call.

    Returns
    -------
    Tensor [ranks, ...]
        The same bits on all processes, so that all compute the same results from it.
    """
    import torch.distributed as dist

    tensors = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(tensors, x.contiguous(), group=group)
    return torch.stack(tensors)


def gather_rows(x: Tensor, group: Any) -> tuple[Tensor, int]:
    """Concatenate the rows of all processes of a group, in the order of their ranks.

    Parameters
    ----------
    x : Tensor [rows, ...]
        The rows of this process, any number; dtype, device type and other dims as in `gather`.
    group : torch.distributed.ProcessGroup
        All of its processes must call.

    Returns
    -------
    whole : Tensor [all rows, ...]
        The rows of all processes, the same bits on each.
    first : int
        Index of the first row of this process.
    """
    import torch.distributed as dist

    count = torch.tensor([len(x)], dtype=torch.int64, device=x.device)
    counts = gather(count, group)[:, 0].tolist()
    first = sum(counts[: dist.get_rank(group)])
    if not any(counts):
        return x, first
    padded = x.new_zeros((max(counts), *x.shape[1:]))
    padded[: len(x)] = x
    tensors = gather(padded, group)
    return torch.cat([part[:n] for part, n in zip(tensors, counts, strict=True)]), first
