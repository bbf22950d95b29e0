# SPDX-License-Identifier: Apache-2.0
"""What a fit of ClAM tells while it runs: a bar on stderr, callbacks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..common import callbacks
from ..common.base import progress_bar
from ..common.scale import rescaled
from .selection import Contest


class Progress:
    """Called after every epoch, or batch of `partial_fit`; whether a callback asks to stop.

    `unit` is the exponent of a length 1 of the frame in units of the data, `total` the number of
    epochs or batches, and `word` is "epoch" or "batch".
    """

    def __init__(
        self, estimator: Any, listeners: list[Any], unit: int, total: int, word: str
    ) -> None:
        self.estimator, self.listeners, self.unit = estimator, listeners, unit
        self.bar: Any = None
        if estimator.verbose:
            self.bar = progress_bar("ClAM", total, word)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, stage: int, epoch: int, losses: Tensor, contest: Contest) -> bool:
        """One epoch is over."""
        if self.bar is not None:
            if contest.select == "silhouette" and contest.front:
                self.bar.set_postfix(silhouette=f"{-contest.winner().key:.4f}", refresh=False)
            self.bar.update()
        loss = float(losses.mean()) if len(losses) else float("nan")
        return self._told(stage, epoch, loss, len(contest.table))

    def batch(self, number: int, loss: float) -> bool:
        """One batch of `partial_fit` is over, the first ever has the number 0."""
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{rescaled(loss, 2 * self.unit):.4g}", refresh=False)
            self.bar.update()
        return self._told(0, number, loss, 0)

    def _told(self, stage: int, epoch: int, loss: float, candidates: int) -> bool:
        loss = rescaled(loss, 2 * self.unit)
        info = {"round": stage, "epoch": epoch, "loss": loss, "candidates": candidates}
        return callbacks.call(self.listeners, "on_iteration", self.estimator, info)
