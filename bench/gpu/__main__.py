# SPDX-License-Identifier: Apache-2.0
"""Runs one stage and leaves its result in the output folder, whatever happens to it."""

from __future__ import annotations

import argparse
import importlib
import os
import time
import traceback
from pathlib import Path

from .. import record
from .setting import STAGES, Setting

# "env=hang,build=fail": for the tests of gpu_check, which need a stage that misbehaves
PLANT = "CLAM_GPU_CHECK_PLANT"


def misbehave(stage: str) -> None:
    planted = dict(p.split("=") for p in os.environ.get(PLANT, "").split(",") if p)
    if planted.get(stage) == "hang":
        time.sleep(3600)
    if planted.get(stage) == "fail":
        raise RuntimeError("planted failure")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=[s.name for s in STAGES])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    setting = Setting(given.out, given.seed, given.seconds, given.dry_run)
    try:
        misbehave(given.stage)
        found = importlib.import_module(f".{given.stage}", __package__).run(setting)
    except Exception as error:  # the report must say what no stage foresaw
        traceback.print_exc()
        found = {"status": "fail", "reason": f"{type(error).__name__}: {error}"[:2000]}
    setting.save({**found, "where": record.facts(setting.device), "done": True})


if __name__ == "__main__":
    main()
