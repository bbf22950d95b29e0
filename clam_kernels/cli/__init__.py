# SPDX-License-Identifier: Apache-2.0
"""The command `clam`: fit, predict, transform, complete, score, plot, info.

Results go to a file or stdout, messages to stderr. Exit codes: 0 done, 1 bad input or failed run,
2 wrong arguments (also an output that exists, without --force), 130 after Ctrl-C.
"""

from __future__ import annotations

from .run import main

__all__ = ["main"]
