# SPDX-License-Identifier: Apache-2.0
"""What a fit of ClAM tells while it runs: a bar on stderr, callbacks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import _callbacks
from ._base import progress_bar
from ._search import resolved
from ._selection import Contest


class Progress:
    """Called after every epoch; whether a callback asks to stop."""

    def __init__(self, estimator: Any, listeners: list[Any]) -> None:
        self.estimator, self.listeners = estimator, listeners
        self.bar: Any = None
        if estimator.verbose:
            self.bar = progress_bar("ClAM", resolved(estimator, "max_iter"))

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
        if not self.listeners:
            return False
        loss = float(losses.mean()) if len(losses) else float("nan")
        info = {"round": stage, "epoch": epoch, "loss": loss, "candidates": len(contest.table)}
        return _callbacks.call(self.listeners, "on_iteration", self.estimator, info)
