# SPDX-License-Identifier: Apache-2.0
"""`python -m clam_kernels`: the command `clam`."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
