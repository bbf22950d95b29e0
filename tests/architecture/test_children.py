# SPDX-License-Identifier: Apache-2.0
"""The guard of the suite itself: no test leaves a process behind."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import _children
import pytest


def test_a_running_child_is_listed_and_ends_with_its_block():
    process = subprocess.Popen(["sleep", "600"])

    def fails() -> None:
        with _children.ended(process):
            assert [pid for pid, _ in _children.left()] == [process.pid]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert process.returncode == -9
    assert _children.left() == []


def test_a_grandchild_ends_with_its_parent():
    shell = subprocess.Popen(["sh", "-c", "sleep 600 & echo $!; wait"], stdout=subprocess.PIPE)
    with _children.ended(shell):
        assert shell.stdout is not None
        sleeper = int(shell.stdout.readline())
    _wait_for(sleeper)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are listed on Linux")
def test_an_orphan_is_listed():
    shell = subprocess.run(["sh", "-c", "sleep 600 >/dev/null 2>&1 & echo $!"], capture_output=True)
    sleeper = int(shell.stdout)
    assert [pid for pid, _ in _children.left()] == [sleeper]
    _children.end(sleeper)
    _wait_for(sleeper)
    assert _children.left() == []


def _wait_for(pid: int) -> None:
    """Wait until an adopted process has ended; its parent is this process now."""
    status = os.waitpid(pid, 0)[1]
    assert os.WTERMSIG(status) == 9
