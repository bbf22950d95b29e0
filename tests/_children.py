# SPDX-License-Identifier: Apache-2.0
"""Child processes of the tests: they end with the test that started them, also if it fails."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
# torch's compiler and multiprocessing start these; they run as long as this process does.
SERVANTS = ("torch/_inductor/compile_worker", "multiprocessing.resource_tracker")


def adopt_orphans() -> None:
    """Let a process whose parent ended become a child of this one, so that `left` lists it."""
    with contextlib.suppress(OSError, AttributeError):  # on Linux only
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def left() -> list[tuple[int, str]]:
    """(id, command) of the children that still run, without SERVANTS."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return []  # the usual case; it costs one system call
    pairs = [(pid, _command(pid)) for pid in _children(os.getpid())]
    return [(pid, words) for pid, words in pairs if words and not any(s in words for s in SERVANTS)]


def _children(pid: int) -> list[int]:
    """Ids of the processes that the threads of a process started."""
    children: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                children += map(int, (task / "children").read_text().split())
    return children


def _command(pid: int) -> str:
    """The command line of a process; empty if it has ended and waits to be collected."""
    with contextlib.suppress(OSError):
        name, _, rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
        if rest.split()[0] != "Z":
            # a process that has just started has no command line yet
            words = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
            return words or name.partition("(")[2]
    return ""


def end(pid: int) -> None:
    """Kill a process and every process that it started."""
    family = _children(pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for child in family:
        end(child)


@contextlib.contextmanager
def ended(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """Kill the process when the block ends."""
    try:
        yield process
    finally:
        end(process.pid)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        process.wait()
