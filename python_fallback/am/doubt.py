# SPDX-License-Identifier: Apache-2.0
"""Which rows the expanded distance cannot serve.

The fast path computes |x|^2 + |rho|^2 - 2 x.rho of centred data. Its error grows with |x|^2 +
|rho|^2, not with the distance: the digits are lost where a row and the memories with weight lie far
from the centre and close to each other. `DoubtRule` decides this for each row, from quantities of
the row alone, and `am/exact.py` computes the rows in doubt again.

With size = |x|^2 + |recalled|^2, the *logit size* of a row is max_k(beta_k) * size: the size of the
terms that cancel in its logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# A row is near its recall where |x - recalled|^2 < NEAR_PART * size. Where betas differ, a row
# beside a memory of large beta may recall a distant memory of small beta, so size does not tell.
# There a row is near where sum_k p_k beta_k |x - rho_k|^2 < NEAR_PART_OF_MANY * its mean logit
# size, sum_k p_k beta_k (|x|^2 + |rho_k|^2).
NEAR_PART, NEAR_PART_OF_MANY = 1 / 16, 1 / 4
# A row is in doubt where logit size * (1 - largest weight) exceeds NEAR_LIMIT if the row is near,
# or FAR_LIMIT if it is not. Where betas differ, the mean logit size counts if it is smaller, and
# NEAR_LIMIT_OF_MANY replaces NEAR_LIMIT. Below the limit the result is off by a few roundings, or
# by no more than differences are. float64 has digits to spare: FAR_LIMIT serves for both.
NEAR_LIMIT, NEAR_LIMIT_OF_MANY, FAR_LIMIT = 32.0, 4.0, 1024.0
# Replaces NEAR_LIMIT for the energy: the other memories add to a distance that comes from a
# difference.
NEAR_LIMIT_OF_ENERGY = 1.0
# Bound on the error of a logit, in units of rounding times the logit size. From an error of 1 on,
# no weight can be trusted, and the row is in doubt.
LOGIT_ERROR = 8.0
# The gradient of the energy contains x - rho itself, also for a row with only one memory. A
# difference loses digits where its square is below this part of |x|^2 + |rho|^2.
NEAR_PART_OF_ENERGY = 2.0**-12
# For size between SMALLEST and LARGEST, size and products of three such lengths stay inside the
# range of the dtype. So does a logit below LARGEST_LOGIT.
SMALLEST = {torch.float32: 2.0**-80, torch.float64: 2.0**-640}
LARGEST = {torch.float32: 2.0**76, torch.float64: 2.0**640}
LARGEST_LOGIT = {torch.float32: 2.0**120, torch.float64: 2.0**1000}
# Memories are apart where APART times the least squared distance of two is at least the largest
# |rho|^2. `are_apart` compares at most MOST_PAIRED memories, whose betas differ by a factor of at
# most SIMILAR. If all memories are apart, a chunk is free of doubt up to the logit size of
# APART_LIMIT, also for a row half-way between two memories.
APART, MOST_PAIRED, SIMILAR, APART_LIMIT = 8.0, 256, 2.0, 2.0**14
# A memory is small beside the centre where its squared length times this is below the centre's.
SMALL = 256.0


def are_apart(
    rho: Tensor, norms: Tensor, active: Tensor | None, beta: Tensor, ratio: Tensor
) -> Tensor:
    """[b] bool: whether `APART * min_kl |rho_k - rho_l|^2 >= max_k |rho_k|^2` for the memories
    [b, K, D] of each problem, and all of them are in the range of their dtype. Then no row is both
    near its recall and recalls more than one memory: it would have to be close to two of them.

    beta [b, 1, 1] is the largest beta, ratio [b] the largest over the least.
    """
    size = rho.shape[-2]
    if size > MOST_PAIRED:
        return torch.zeros(len(rho), dtype=torch.bool, device=rho.device)
    sqdist = torch.baddbmm(norms + norms.mT, rho, rho.mT, alpha=-2)
    sqdist.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    if active is not None:
        sqdist.masked_fill_(~(active[..., None] & active[:, None, :]), torch.inf)
    largest, dtype = norms.amax((1, 2)), rho.dtype
    inside = (largest > SMALLEST[dtype]) & (largest < LARGEST[dtype] / 8)
    inside = inside & (largest * beta[:, 0, 0] < LARGEST_LOGIT[dtype] / 8)
    return inside & (sqdist.amin((1, 2)) * APART >= largest) & (ratio <= SIMILAR)


class DoubtRule:
    """Decides which rows of a cell have logits that cancel, or that leave the range of their dtype.

    In all methods size is |x|^2 + |recalled|^2 and product is <x, recalled>, both [b, n, 1] of
    centred rows.
    """

    def __init__(
        self,
        rho: Tensor,
        norms: Tensor,
        active: Tensor | None,
        beta: Tensor,
        centre: Tensor,
        has_small: Tensor,
    ) -> None:
        """Centred memories [b, K, D] and their squared norms [b, 1, K]; active [b, K], bool; beta
        [b, 1, K or 1]. has_small [b] says that a memory is small beside the centre [b, 1, D].
        """
        dtype = beta.dtype
        self.beta = beta.amax(-1, keepdim=True)
        ratio = beta.new_ones(len(beta))
        if beta.shape[-1] > 1:
            least = beta if active is None else beta.masked_fill(~active[:, None, :], torch.inf)
            ratio = (self.beta / least.amin(-1, keepdim=True))[:, 0, 0]
        self.per_memory = beta.shape[-1] > 1
        apart = are_apart(rho, norms, active, self.beta, ratio)
        self.apart = (apart & ~has_small)[:, None]
        self.centre, self.has_small = centre, has_small[:, None]
        self.range = (SMALLEST[dtype], LARGEST[dtype], LARGEST_LOGIT[dtype])
        self.trusted_logit = 1 / (LOGIT_ERROR * torch.finfo(dtype).eps / 2)
        on_cpu = beta.is_cpu and beta.numel() > 0
        self.largest_beta = float(self.beta.amax()) if on_cpu else math.inf
        self.largest_norm = float(norms.amax()) if on_cpu else math.inf
        self.all_apart = on_cpu and bool(self.apart.all())
        self.some_small = not on_cpu or bool(has_small.any())

    def is_free_of_doubt(self, x: Tensor, step: float) -> bool:
        """Whether no row of a chunk, with centred states x, can be in doubt in any step."""
        # for step <= 1 no state leaves the ball of the rows and the memories
        if not (self.all_apart and step <= 1):
            return False
        longest = float(torch.linalg.vector_norm(x, dim=-1).amax())
        size = 2 * max(longest**2, self.largest_norm)
        return size < self.range[1] and size * self.largest_beta <= APART_LIMIT

    def rows_in_doubt(
        self,
        size: Tensor,
        product: Tensor,
        weights: Tensor,
        recalled: Tensor | None = None,
        mean_logit_size: Callable[[], tuple[Tensor, Tensor]] | None = None,
        near_limit: float | None = None,
    ) -> Tensor | None:
        """[b, n] bool, or None: rows whose weights or states may be wrong.

        `weights` [b, n, .] may contain the largest weight alone. `recalled` [b, n, .] loses digits
        where it is small beside the centre. Where the betas differ, `mean_logit_size` is needed: it
        computes size and product, each weighted by p_k beta_k. `near_limit` replaces NEAR_LIMIT.
        """
        near_limit = near_limit or (NEAR_LIMIT_OF_MANY if self.per_memory else NEAR_LIMIT)
        near_limit = FAR_LIMIT if size.dtype == torch.float64 else near_limit
        small = self._small_recalls(recalled) if self.some_small and recalled is not None else None
        if small is None and self._is_plain(size, product, near_limit):
            return None
        near, outside, logit_size = self._classify(size, product)
        spread = logit_size * (1 - weights.amax(-1))
        if self.per_memory and mean_logit_size is not None:
            mean, product = mean_logit_size()
            near = (self._nearness(mean, product, NEAR_PART_OF_MANY) > 0)[..., 0]
            spread = spread.minimum(mean[..., 0])
        doubt = outside | (logit_size >= self.trusted_logit)
        doubt = doubt | (spread > torch.where(near & ~self.apart, near_limit, FAR_LIMIT))
        doubt = doubt if small is None else doubt | small
        return doubt if bool(doubt.any()) else None

    def _small_recalls(self, recalled: Tensor) -> Tensor:
        """[b, n] bool: `SMALL * |recalled + centre|^2 < |recalled|^2`, rows whose recall is small
        beside the centre of their memories.
        """
        result = recalled[..., : self.centre.shape[-1]] + self.centre
        return (result.square().sum(-1) * SMALL < recalled.square().sum(-1)) & self.has_small

    def rows_near_recall(self, size: Tensor, product: Tensor) -> Tensor | None:
        """[b, n] bool, or None: rows for which x - recalled loses digits."""
        near = (self._nearness(size, product, NEAR_PART_OF_ENERGY) > 0)[..., 0]
        return near if bool(near.any()) else None

    def rows_near_memory(
        self, norm: Tensor, top: Tensor, log_weights: Tensor | None
    ) -> Tensor | None:
        """[b, n] bool, or None: rows for which x - rho of the likeliest memory loses digits. A row
        may be close to that memory and recall others too.

        `norm` is |x|^2 and `top` the largest logit without its -beta |x|^2, both [b, n, 1]. The
        distance, norm - (top - max log-weight) / beta, is exact where no log-weight is larger than
        that of the likeliest memory.
        """
        highest = 0.0 if log_weights is None else log_weights.amax(-1, keepdim=True)
        near = (norm - (top - highest) / self.beta < 2 * NEAR_PART_OF_ENERGY * norm)[..., 0]
        return near if bool(near.any()) else None

    def _classify(self, size: Tensor, product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[b, n] each: whether a row is near, whether it leaves the range, and its logit size."""
        smallest, largest, largest_logit = self.range
        logit_size = size * self.beta
        inside = (size < largest) & (logit_size < largest_logit)
        inside = inside & ((size > smallest) | self.apart[..., None])
        near = self._nearness(size, product, NEAR_PART) > 0
        return near[..., 0], ~inside[..., 0], logit_size[..., 0]

    @staticmethod
    def _nearness(size: Tensor, product: Tensor, part: float) -> Tensor:
        """Positive where |x - recalled|^2 = size - 2 product is below part * size."""
        return 2 * product - (1 - part) * size

    def _is_plain(self, size: Tensor, product: Tensor, near_limit: float) -> bool:
        """Whether the extremes of size show that no row is in doubt: true for most chunks, and
        cheaper than the rule for each row.
        """
        if not size.is_cpu:
            return False
        smallest, largest, _ = self.range
        low, high = (float(end) for end in torch.aminmax(size))
        logit_size = high * self.largest_beta
        if not (smallest < low and high < largest and logit_size <= FAR_LIMIT):
            return False
        if logit_size <= near_limit or self.all_apart:
            return True
        return not self.per_memory and float(self._nearness(size, product, NEAR_PART).amax()) <= 0
