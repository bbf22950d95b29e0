# SPDX-License-Identifier: Apache-2.0
"""The test suite in two halves side by side, one a core: the contract tests, and the rest, whose
output follows when both are done. Ctrl-C stops both.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile

PYTEST = (sys.executable, "-m", "pytest", "-q", "-m", "not slow")
REST = (*PYTEST, "--ignore=tests/contract", "-p", "no:cacheprovider")


def main() -> int:
    with tempfile.TemporaryFile() as said:
        rest = subprocess.Popen(REST, stdout=said, stderr=subprocess.STDOUT)
        try:
            contract = subprocess.run((*PYTEST, "tests/contract"), check=False).returncode
            others = rest.wait()
        except KeyboardInterrupt:
            rest.wait()
            return 130
        said.seek(0)
        print(said.read().decode(errors="replace"), flush=True)
    return 1 if contract or others else 0


if __name__ == "__main__":
    sys.exit(main())
