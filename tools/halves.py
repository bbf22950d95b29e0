# SPDX-License-Identifier: Apache-2.0
"""Run the test suite in two processes at once, one for each core: the contract tests with those
that compile for GPUs, and the other tests, whose output follows when both are done. Ctrl-C stops
both.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile

PYTEST = (sys.executable, "-m", "pytest", "-q", "-m", "not slow")
FIRST = ("tests/contract", "tests/aot")
REST = (*PYTEST, *(f"--ignore={folder}" for folder in FIRST), "-p", "no:cacheprovider")


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryFile() as output:
        first = subprocess.Popen((*PYTEST, *FIRST))
        rest = subprocess.Popen(REST, stdout=output, stderr=subprocess.STDOUT)
        halves = (first, rest)
        try:
            codes = [half.wait() for half in halves]
        except KeyboardInterrupt:  # both processes get it too, and clean up after themselves
            for half in halves:
                half.wait()
            return 130
        finally:
            for half in halves:
                half.kill()
                half.wait()
        output.seek(0)
        print(output.read().decode(errors="replace"), flush=True)
    return 1 if any(codes) else 0


if __name__ == "__main__":
    sys.exit(main())
