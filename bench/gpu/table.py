# SPDX-License-Identifier: Apache-2.0
"""The last lines of the output, one for each target and each stage; and the exit code."""

from __future__ import annotations

from typing import Any

from .setting import STAGES

# "miss" (a missed speed target) passes too, unless --strict is set
GOOD = ("pass", "skipped")


def best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each id and mode: of a backend that passes, else of the fastest."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["id"], row["mode"]), []).append(row)
    slow = float("inf")
    return [
        min(group, key=lambda r: (not r["pass"], _number(r.get("ms_median"), slow)))
        for group in groups.values()
    ]


def _number(value: Any, default: float) -> float:
    return float(value) if isinstance(value, int | float) else default


def _figure(value: Any, spelled: str = ".3g") -> str:
    return "-" if not isinstance(value, int | float) else format(value, spelled)


def _row(row: dict[str, Any], mark: str) -> str:
    ratios = row.get("ratios") or {}
    eager = next((r for name, r in ratios.items() if name.startswith("eager")), None)
    cells = (
        f"{row['id']:<4}{row['name'][:34]:<35}{row['mode']:<8}{row['backend']:<10}"
        f"{_figure(row.get('ms_median')) + mark:>9}{_figure(row['target'].get('ms')):>7}"
        f"{_figure(row.get('share'), '.0%'):>6}{_figure(eager, '.1f'):>8}"
        f"{_figure(row.get('err_vs_f64'), '.1e'):>9}"
    )
    outcome = "pass" if row["pass"] else "; ".join(row.get("missed") or ["not run"])
    return f"{cells}  {outcome}"[:160]


def lines(report: dict[str, Any]) -> list[str]:
    """At most about 30 lines."""
    mark = "*" if report["dry_run"] else ""
    rows = best(report["rows"])
    output = []
    if rows:
        output.append(
            f"{'row':<39}{'mode':<8}{'backend':<10}{'ms':>9}{'goal':>7}{'share':>6}"
            f"{'x eager':>8}{'error':>9}"
        )
        output += [_row(row, mark) for row in rows]
    for stage in STAGES:
        result = report["stages"][stage.name]
        reason = " ".join(str(result.get("reason") or "").split())[:100]
        output.append(
            f"{stage.name:<12}{result['status']:<12}{result.get('seconds', 0):>6.1f} s  {reason}"
        )
    if report["dry_run"]:
        output.append("* dry run on a CPU: every figure is a stand-in")
    return output


def verdict(report: dict[str, Any], selected: list[str], strict: bool) -> tuple[int, str]:
    """(exit code, summary). A gate without a verdict has not passed."""
    failures = []
    for stage in STAGES:
        status = report["stages"][stage.name]["status"]
        fine = status in GOOD or (status == "miss" and not strict)
        fine |= status == "unavailable" and not stage.gate
        if stage.name in selected and not fine:
            failures.append(f"{stage.name} {status}")
    missing = [s.name for s in STAGES if s.gate and s.name not in selected]
    note = f" (not selected: {', '.join(missing)})" if missing else ""
    if failures:
        return 1, f"exit 1: {', '.join(failures)}{note}"
    return 0, f"exit 0{note}"
