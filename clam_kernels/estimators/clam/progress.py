# SPDX-License-Identifier: Apache-2.0
"""What a ClAM fit shows and calls while it runs: a bar on stderr, callbacks."""

from __future__ import annotations

from torch import Tensor

from ..common.callbacks import Callbacks
from ..common.progress import ProgressBar
from ..common.scale import scale_number
from .selection import Candidates


class FitProgress:
    """Called after every epoch of a fit; returns whether a callback ends the fit.

    `unit` is the exponent of a length 1 of the frame in units of the data.
    """

    def __init__(self, bar: ProgressBar, callbacks: Callbacks, unit: int) -> None:
        self.bar, self.callbacks, self.unit = bar, callbacks, unit

    def __call__(self, stage: int, epoch: int, losses: Tensor, candidates: Candidates) -> bool:
        figures = {}
        if self.bar.is_shown and candidates.select == "silhouette" and candidates.front:
            figures["silhouette"] = f"{-candidates.best().key:.4f}"
        self.bar.advance(**figures)
        loss = float(losses.mean()) if len(losses) else float("nan")
        loss = scale_number(loss, 2 * self.unit)
        return after_iteration(self.callbacks, stage, epoch, loss, len(candidates.table))


class BatchProgress:
    """Called after every batch of `partial_fit`; returns whether a callback ends the call.

    `first` is the number of the first batch, which counts all batches of the estimator.
    """

    def __init__(self, bar: ProgressBar, callbacks: Callbacks, first: int) -> None:
        self.bar, self.callbacks, self.number = bar, callbacks, first

    def __call__(self, loss: float) -> bool:
        self.bar.advance(loss=f"{loss:.4g}")
        number, self.number = self.number, self.number + 1
        return after_iteration(self.callbacks, 0, number, loss, 0)


def after_iteration(
    callbacks: Callbacks, stage: int, epoch: int, loss: float, candidates: int
) -> bool:
    """Call the callbacks; `loss` is in units of the data."""
    info = {"round": stage, "epoch": epoch, "loss": loss, "candidates": candidates}
    return callbacks.iteration(info)
