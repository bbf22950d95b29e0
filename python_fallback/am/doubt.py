# SPDX-License-Identifier: Apache-2.0
"""Which rows the expanded distance cannot serve.

The fast path computes |x|^2 + |rho|^2 - 2 x.rho of centred data. Its error grows with |x|^2 +
|rho|^2, not with the distance: it fails where a row and the memories that compete for it lie far
from the centre and close to each other. `Watch` finds such rows from quantities of the row alone,
and `am/exact.py` computes them again.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# A row is near what the memories recall where their squared distance is below this part of
# |x|^2 + |recalled|^2. Where betas differ, a row beside a sharp memory may recall a broad one that
# is far: it is near where sum_k p_k beta_k |x - rho_k|^2 is below the second part of its warmth,
# sum_k p_k beta_k (|x|^2 + |rho_k|^2), in which a broad memory may hide a sharp one.
CANCEL, CANCEL_OF_MANY = 1 / 16, 1 / 4
# The heat of a row is the largest beta times |x|^2 + |recalled|^2. A row is in doubt where its heat
# times the weight of all memories but the first (where betas differ, its warmth if that is less) is
# above CALM if it is near, or above WARM if not: below, the result is off by a few roundings, or by
# no more than differences are. Where betas differ, CALM_OF_MANY takes the place of CALM. float64
# has digits to spare: WARM takes the place of both.
CALM, CALM_OF_MANY, WARM = 32.0, 4.0, 1024.0
# As CALM for the energy, whose others add to a distance that comes from a difference.
CALM_OF_ENERGY = 1.0
# Bound on the error of a logit, in units of rounding times the heat. From an error of 1 on, no
# weight can be trusted, and the row is in doubt.
GROWTH = 8.0
# The gradient of the energy holds x - rho itself, also for a row of only one memory. A difference
# loses digits where its square is below this part of |x|^2 + |rho|^2.
CANCEL_OF_ENERGY = 2.0**-12
# Between these |x|^2 + |recalled|^2, and products of three such lengths, stay inside the range of
# the dtype; so does a logit below the third.
SMALLEST = {torch.float32: 2.0**-80, torch.float64: 2.0**-640}
LARGEST = {torch.float32: 2.0**76, torch.float64: 2.0**640}
HOTTEST = {torch.float32: 2.0**120, torch.float64: 2.0**1000}
# No two memories are close where their squared distance times this is at least the largest |rho|^2;
# looked at for up to so many memories, whose betas differ by no more than a factor of LIKE. Up to
# the heat of REST no row is then looked at, not even one half-way between two memories.
APART, MOST_PAIRED, LIKE, REST = 8.0, 256, 2.0, 2.0**14
# A memory is small beside the centre where its squared length times this is below the centre's.
BARE = 256.0


def are_apart(
    rho: Tensor, norms: Tensor, alive: Tensor | None, beta: Tensor, ratio: Tensor
) -> Tensor:
    """[b] bool: whether no two memories [b, K, D] are close beside their distance from the centre,
    and all are in the range of their dtype. No row can then be near what it recalls and recall more
    than one memory: it would have to be close to two of them. Beta [b, 1, 1] is the largest, ratio
    [b] says how many times the least it is.
    """
    size = rho.shape[-2]
    if size > MOST_PAIRED:
        return torch.zeros(len(rho), dtype=torch.bool, device=rho.device)
    gaps = torch.baddbmm(norms + norms.mT, rho, rho.mT, alpha=-2)
    gaps.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    if alive is not None:
        gaps.masked_fill_(~(alive[..., None] & alive[:, None, :]), torch.inf)
    reach, dtype = norms.amax((1, 2)), rho.dtype
    inside = (reach > SMALLEST[dtype]) & (reach < LARGEST[dtype] / 8)
    inside = inside & (reach * beta[:, 0, 0] < HOTTEST[dtype] / 8)
    return inside & (gaps.amin((1, 2)) * APART >= reach) & (ratio <= LIKE)


class Watch:
    """Finds the rows of a cell whose logits cancel, or that leave the range of their dtype.

    size is |x|^2 + |recalled|^2 and along is <x, recalled>, both [b, n, 1] of centred rows.
    """

    def __init__(
        self,
        rho: Tensor,
        norms: Tensor,
        alive: Tensor | None,
        beta: Tensor,
        centre: Tensor,
        bare: Tensor,
    ) -> None:
        """Memories [b, K, D], centred, and their squared norms [b, 1, K]; alive [b, K] says which
        take part; beta [b, 1, K or 1]. bare [b] says that some memory is small beside the centre
        [b, 1, D].
        """
        dtype = beta.dtype
        self.beta = beta.amax(-1, keepdim=True)
        ratio = beta.new_ones(len(beta))
        if beta.shape[-1] > 1:
            least = beta if alive is None else beta.masked_fill(~alive[:, None, :], torch.inf)
            ratio = (self.beta / least.amin(-1, keepdim=True))[:, 0, 0]
        self.per_memory = beta.shape[-1] > 1
        apart = are_apart(rho, norms, alive, self.beta, ratio)
        self.apart = (apart & ~bare)[:, None]
        self.centre, self.bare = centre, bare[:, None]
        self.limits = (SMALLEST[dtype], LARGEST[dtype], HOTTEST[dtype])
        self.trusted = 1 / (GROWTH * torch.finfo(dtype).eps / 2)
        on_cpu = beta.is_cpu and beta.numel() > 0
        self.most = float(self.beta.amax()) if on_cpu else math.inf
        self.reach = float(norms.amax()) if on_cpu else math.inf
        self.is_idle = on_cpu and bool(self.apart.all())
        self.has_bare = not on_cpu or bool(bare.any())

    def sleeps(self, x: Tensor, step: float) -> bool:
        """Whether no row of a chunk, whose centred states are x, can be in doubt in any step."""
        if not (self.is_idle and step <= 1):  # then no state leaves the ball of rows and memories
            return False
        size = 2 * max(float(torch.linalg.vector_norm(x, dim=-1).amax()) ** 2, self.reach)
        return size < self.limits[1] and size * self.most <= REST

    def doubts(
        self,
        size: Tensor,
        along: Tensor,
        weights: Tensor,
        recalled: Tensor | None = None,
        warmth: Callable[[], tuple[Tensor, Tensor]] | None = None,
        calm: float | None = None,
    ) -> Tensor | None:
        """[b, n] bool, or None: rows whose weights or states may be wrong. `weights` [b, n, .] may
        hold the largest alone. What a row recalls [b, n, .] loses digits where it is small beside
        the centre. `warmth` computes size and along weighted by p_k beta_k; it is needed where the
        betas differ. `calm` takes the place of CALM.
        """
        calm = calm or (CALM_OF_MANY if self.per_memory else CALM)
        calm = WARM if size.dtype == torch.float64 else calm
        lost = self._lost_digits(recalled) if self.has_bare and recalled is not None else None
        if lost is None and self._is_plain(size, along, calm):
            return None
        near, outside, heat = self._split(size, along, CANCEL)
        spread = heat * (1 - weights.amax(-1))
        if self.per_memory and warmth is not None:
            warm, along = warmth()
            near = (self._margin(warm, along, CANCEL_OF_MANY) > 0)[..., 0]
            spread = spread.minimum(warm[..., 0])
        some = outside | (heat >= self.trusted)
        some = some | (spread > torch.where(near & ~self.apart, calm, WARM))
        some = some if lost is None else some | lost
        return some if bool(some.any()) else None

    def _lost_digits(self, recalled: Tensor) -> Tensor:
        """[b, n] bool: rows that recall what is small beside the centre of their memories."""
        back = recalled[..., : self.centre.shape[-1]] + self.centre
        return (back.square().sum(-1) * BARE < recalled.square().sum(-1)) & self.bare

    def lost(self, size: Tensor, along: Tensor) -> Tensor | None:
        """As `doubts`, for x - recalled itself: rows too close to what they recall."""
        near = (self._margin(size, along, CANCEL_OF_ENERGY) > 0)[..., 0]
        return near if bool(near.any()) else None

    def beside(self, norm: Tensor, top: Tensor, shift: Tensor | None) -> Tensor | None:
        """As `doubts`, for rho - x of the likeliest memory, which a row may stand beside without
        recalling it alone. `norm` is |x|^2 and `top` the largest logit less beta |x|^2, [b, n, 1];
        the distance is exact where no log-weight is larger than that memory's.
        """
        lift = 0.0 if shift is None else shift.amax(-1, keepdim=True)
        near = (norm - (top - lift) / self.beta < 2 * CANCEL_OF_ENERGY * norm)[..., 0]
        return near if bool(near.any()) else None

    def _split(self, size: Tensor, along: Tensor, part: float) -> tuple[Tensor, Tensor, Tensor]:
        """[b, n] each: whether a row is near, whether it leaves the range, and its heat."""
        smallest, largest, hottest = self.limits
        heat = size * self.beta
        inside = (size < largest) & (heat < hottest)
        inside = inside & ((size > smallest) | self.apart[..., None])
        near = self._margin(size, along, part) > 0
        return near[..., 0], ~inside[..., 0], heat[..., 0]

    @staticmethod
    def _margin(size: Tensor, along: Tensor, part: float) -> Tensor:
        """Above 0 where |x - recalled|^2 = size - 2 along is below the part of size."""
        return 2 * along - (1 - part) * size

    def _is_plain(self, size: Tensor, along: Tensor, calm: float) -> bool:
        """Whether no row can be in doubt, from the extremes alone: cheap, and mostly so."""
        if not size.is_cpu:
            return False
        smallest, largest, _ = self.limits
        low, high = (float(end) for end in torch.aminmax(size))
        heat = high * self.most
        if not (smallest < low and high < largest and heat <= WARM):
            return False
        if heat <= calm or self.is_idle:
            return True
        return not self.per_memory and float(self._margin(size, along, CANCEL).amax()) <= 0
