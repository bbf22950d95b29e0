# SPDX-License-Identifier: Apache-2.0
"""Run one stage and write its result to the output folder, also where it raises."""

from __future__ import annotations

import argparse
import importlib
import os
import time
import traceback
from pathlib import Path

from .. import record
from .setting import STAGES, Setting

# "env=hang,build=fail": the tests of gpu_check need stages that hang or fail
FAULTS = "CLAM_GPU_CHECK_PLANT"


def inject_fault(stage: str) -> None:
    faults = dict(pair.split("=") for pair in os.environ.get(FAULTS, "").split(",") if pair)
    if faults.get(stage) == "hang":
        time.sleep(3600)
    if faults.get(stage) == "fail":
        raise RuntimeError("planted failure")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=[s.name for s in STAGES])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    setting = Setting(arguments.out, arguments.seed, arguments.seconds, arguments.dry_run)
    try:
        inject_fault(arguments.stage)
        result = importlib.import_module(f".{arguments.stage}", __package__).run(setting)
    except Exception as error:  # the report must have errors that no stage expected
        traceback.print_exc()
        result = {"status": "fail", "reason": f"{type(error).__name__}: {error}"[:2000]}
    setting.save({**result, "where": record.facts(setting.device), "done": True})


if __name__ == "__main__":
    main()
