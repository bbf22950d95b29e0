# SPDX-License-Identifier: Apache-2.0
"""What processes exchange, put together in the order of the ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def gathered(x: Tensor, group: Any) -> Tensor:
    """A tensor of every process of a group, stacked in the order of their ranks.

    Parameters
    ----------
    x : Tensor [...]
        The same shape, dtype and kind of device on all of them.
    group : torch.distributed.ProcessGroup
        All of its processes call.

    Returns
    -------
    Tensor [ranks, ...]
        The same bits on all of them, so that what is computed from it is too.
    """
    import torch.distributed as dist

    found = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, x.contiguous(), group=group)
    return torch.stack(found)


def gathered_rows(x: Tensor, group: Any) -> tuple[Tensor, int]:
    """Tensors of all processes of a group, one below the other in the order of their ranks.

    Parameters
    ----------
    x : Tensor [rows, ...]
        Any number of rows on each; else as of `gathered`.
    group : torch.distributed.ProcessGroup
        All of its processes call.

    Returns
    -------
    whole : Tensor [all rows, ...]
        The same bits on all of them.
    first : int
        Where the rows of this process begin.
    """
    import torch.distributed as dist

    counts = gathered(torch.tensor([len(x)], dtype=torch.int64, device=x.device), group)[
        :, 0
    ].tolist()
    first = sum(counts[: dist.get_rank(group)])
    if not any(counts):
        return x, first
    padded = x.new_zeros((max(counts), *x.shape[1:]))
    padded[: len(x)] = x
    found = gathered(padded, group)
    return torch.cat([part[:n] for part, n in zip(found, counts, strict=True)]), first
