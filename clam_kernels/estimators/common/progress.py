# SPDX-License-Identifier: Apache-2.0
"""What a verbose fit shows: a progress bar on stderr, or lines on stdout."""

from __future__ import annotations

from typing import Any

from ...exceptions import needs


class ProgressBar:
    """A bar on stderr over `total` epochs or batches, from `done` on; none unless verbose."""

    def __init__(
        self, verbose: int, name: str, total: int, unit: str = "epoch", done: int = 0
    ) -> None:
        self.bar: Any = None
        if not verbose:
            return
        try:
            from tqdm.auto import tqdm
        except ImportError:
            raise ImportError(needs("verbose: a progress bar", "tqdm", "progress")) from None
        self.bar = tqdm(total=total, initial=done, desc=name, unit=unit, leave=False)

    @property
    def is_shown(self) -> bool:
        """Whether there is a bar."""
        return self.bar is not None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def advance(self, **figures: str) -> None:
        """Move the bar on by one, and show figures beside it."""
        if self.bar is not None:
            if figures:
                self.bar.set_postfix(figures, refresh=False)
            self.bar.update()


def print_line(text: str) -> None:
    """Print a line of a verbose fit."""
    print(text)
