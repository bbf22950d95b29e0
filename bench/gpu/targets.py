# SPDX-License-Identifier: Apache-2.0
"""Stage targets: every row of every family, timed beside its peers on the same data, with its error
in the same run.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from .. import record
from .cases import Bout, Row, Work, backends, families, forced, refusal
from .clock import Clock, Contestant, Times, peak_bytes, race, tidy
from .setting import Setting, write_json
from .table import best

ROUNDS, FEW_ROUNDS = 24, 3
# Where no ceilings were measured in this run; bytes, operations and exponentials a second.
ASSUMED = {
    "copy": 4.3e12, "bf16": 790e12, "tf32": 395e12, "fp32": 60e12, "ex2": 4.18e12, "lanes": 33.5e12,
}  # fmt: skip
# A product in a split mode is this many products of a unit.
UNITS = {"bf16x3": ("bf16", 3), "bf16x6": ("bf16", 6), "tf32x3": ("tf32", 3)}
# (factor of the plain error, what is fine whatever the plain error is) for each figure judged
CLASSES: dict[str, dict[str, tuple[float, float]]] = {
    "exact": {"out": (2.0, 0.0), "grad_median": (2.0, 0.0)},
    "accurate": {"out": (2.0, 1e-5), "grad_median": (2.0, 1e-4)},
    "like": {"out": (2.0, 0.0), "grad_median": (2.0, 0.0)},
    "labels": {"out": (0.0, 0.0)},
    "curve": {},
}


def floor(work: Work, ceilings: dict[str, float]) -> tuple[float, str]:
    """(milliseconds that no version can beat, what binds). Lane operations share the issue slots
    of float32 products, so those two add up.
    """
    unit, times = UNITS.get(work.unit, (work.unit, 1))
    parts = {
        "memory": work.bytes / ceilings["copy"],
        work.unit: times * work.flops / ceilings[unit] + work.lanes / ceilings["lanes"],
        "ex2": work.exps / ceilings["ex2"],
    }
    bound = max(parts, key=lambda name: parts[name])
    return 1e3 * parts[bound], bound


def ceilings_of(setting: Setting) -> tuple[dict[str, float], bool]:
    """(rates, whether they were measured in this run)."""
    found = setting.earlier("ceilings").get("rates", {})
    rates = {name: found.get(name) or rate for name, rate in ASSUMED.items()}
    return rates, all(found.get(name) for name in ASSUMED if name != "lanes")


def judged(errors: dict[str, Any], plain: dict[str, Any], kind: str) -> list[str]:
    """What misses the error class, by the rule of `testing.assert_close_on_average`: over the draws
    the mean share of what is allowed is at most 1, no share over 8. A NaN misses every class.
    """
    missed = []
    for name, (factor, fine) in CLASSES[kind].items():
        if name not in errors:
            continue
        pairs = zip(draws(errors, name), draws(plain, name), strict=True)
        shares = [share(error, max(factor * other, fine)) for error, other in pairs]
        mean = math.exp(statistics.fmean(math.log(s) for s in shares))
        if not (mean <= 1 and max(shares) <= 8):
            missed.append(f"error {name} {errors[name]:.1e}, {mean:.2g} of the allowed")
    return missed


def draws(errors: dict[str, Any], name: str) -> list[float]:
    found: list[float] = errors.get(f"{name}_draws", [errors[name]])
    return found


def share(error: float, allowed: float) -> float:
    """Of what is allowed; no draw counts for less than a thousandth."""
    if error == 0:
        return 1e-3
    return max(error / allowed, 1e-3) if allowed > 0 and error == error else math.inf


def summary(times: Times, scale: float) -> dict[str, Any]:
    names = {"ms_median": 0.5, "ms_p10": 0.1, "ms_p90": 0.9}
    found: dict[str, Any] = {}
    for name, share in names.items():
        value = times.quantile(share)
        found[name] = None if value is None else scale * value
    if times.ms:
        found["ms_median"] = scale * statistics.median(times.ms)
    return {**found, "rounds": len(times.ms)}


def ratios(row: Row, ms: float | None, peers: dict[str, Any]) -> dict[str, float]:
    """Fastest peer of each name a target speaks of, over ours; absent peers have no ratio."""
    found = {}
    for name in dict.fromkeys([*row.target.ratios, "eager"]):
        rivals = [
            p["ms"] for key, p in peers.items() if key.startswith(name) and p.get("ms") is not None
        ]
        if rivals and ms:
            found[name] = min(rivals) / ms
    return found


def misses(row: Row, facts: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    """Everything that a row asks for and did not get."""
    if facts["ms_median"] is None:
        return [f"did not run: {facts.get('reason')}"]
    missed = judged(facts["errors"], plain, row.target.error)
    missed += [facts["failed"]] if "failed" in facts else []
    if facts.get("curve_ok") is False:
        missed.append("the loss curve leaves that of eager")
    if facts["ms_median"] > row.target.ms:
        missed.append(f"{facts['ms_median']:.3g} ms > {row.target.ms:.3g}")
    for name, least in row.target.ratios.items():
        got = facts["ratios"].get(name)
        if got is not None and got < least:
            missed.append(f"{got:.2g}x {name} < {least:g}x")
    limit, peak = row.target.peak_bytes, facts.get("peak_bytes")
    if limit is not None and peak is not None and peak > limit:
        missed.append(f"peak {peak / 2**30:.2f} GiB > {limit / 2**30:.2f}")
    count, most = facts.get("launches"), row.target.launches
    if count is not None and most is not None and count > most:
        missed.append(f"{count} launches > {most}")
    return missed


class Table:
    """The rows so far, on disk after each."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.clock = setting, Clock(setting.device)
        self.ceilings, self.measured = ceilings_of(setting)
        self.where = record.facts(setting.device)
        self.rows: list[dict[str, Any]] = []

    def save(self) -> None:
        write_json(self.setting.out / "targets.json", {**self.where, "rows": self.rows})
        status = {"status": "timeout", "reason": f"stopped after {len(self.rows)} rows"}
        self.setting.save({**status, "rows": self.rows})

    def blank(self, row: Row, backend: str) -> dict[str, Any]:
        ms, bound = floor(row.work, self.ceilings)
        return {
            "id": row.id, "name": row.name, "shape": row.shape, "dtype": row.dtype,
            "mode": row.mode, "backend": backend, "unit": row.work.unit,
            "ms_median": None, "ms_p10": None, "ms_p90": None,
            "floor_ms": ms, "bound_by": bound, "share": None, "peers": {}, "ratios": {},
            "err_vs_f64": None, "err_ratio_to_eager": None, "errors": {}, "peak_bytes": None,
            "target": {
                "ms": row.target.ms, "ratios": dict(row.target.ratios),
                "peak_bytes": row.target.peak_bytes, "launches": row.target.launches,
                "error": row.target.error,
            },
            "pass": False, "note": row.note, "stand_in": self.setting.dry_run,
            "ceilings_measured": self.measured,
        }  # fmt: skip

    def run(self, row: Row, seconds: float) -> None:
        """One row on every backend that can run it; a row that cannot be built says why."""
        able, refusals = backends(row.op, self.setting.device)
        try:
            bout = row.build(self.setting, row)
            why = {name: refusal(name, row.op, *bout.args) for name in able}
            refusals |= {name: reason for name, reason in why.items() if reason is not None}
            able = [name for name, reason in why.items() if reason is None]
            if not able:
                raise RuntimeError("; ".join(refusals.values()))
            self.bout(row, bout, able, seconds)
        except Exception as error:  # a row may fail, the table goes on
            reason = f"{type(error).__name__}: {error}"[:300]
            self.rows.append({**self.blank(row, "-"), "reason": reason, "missed": [reason]})
        if refusals:
            self.rows[-1]["refusals"] = refusals
        tidy(self.clock)
        self.save()

    def bout(self, row: Row, bout: Bout, able: list[str], seconds: float) -> None:
        contestants = {name: Contestant(bout.ours, forced(name)) for name in able}
        contestants |= {f"peer {name}": peer for name, peer in bout.peers.items()}
        rounds = FEW_ROUNDS if self.setting.dry_run else ROUNDS
        times = race(self.clock, contestants, rounds, seconds, row.kind)
        plain = self.errors(bout, bout.plain)
        peers = {name: self.peer(bout, name, times) for name in bout.peers}
        for name in able:
            facts = {**self.blank(row, name), **summary(times[name], bout.scale), "peers": peers}
            facts["reason"] = times[name].reason
            if times[name].ms:
                self.measure(facts, bout, contestants[name], plain)
                facts["ratios"] = ratios(row, facts["ms_median"], peers)
            facts["missed"] = misses(row, facts, plain)
            facts["pass"] = not facts["missed"]
            self.rows.append(facts)

    def errors(self, bout: Bout, one: Contestant) -> dict[str, Any]:
        with one.around():
            return bout.errors(one.call())

    def peer(self, bout: Bout, name: str, times: dict[str, Times]) -> dict[str, Any]:
        found = times[f"peer {name}"]
        if not found.ms:
            return {"ms": None, "err": None, "absent": found.reason}
        errors = self.errors(bout, bout.peers[name])
        ms = summary(found, bout.scale)
        return {"ms": ms["ms_median"], "ms_p10": ms["ms_p10"], "ms_p90": ms["ms_p90"],
                "err": errors.get("out"), "errors": errors}  # fmt: skip

    def measure(
        self, facts: dict[str, Any], bout: Bout, one: Contestant, plain: dict[str, Any]
    ) -> None:
        """Share, error and memory of ours."""
        if not self.setting.dry_run:  # the stand-in does a fraction of the work
            facts["share"] = facts["floor_ms"] / facts["ms_median"]
        facts["errors"] = self.errors(bout, one)
        facts["err_vs_f64"] = facts["errors"].get("out")
        if facts["err_vs_f64"] is not None and plain["out"] > 0:
            facts["err_ratio_to_eager"] = facts["err_vs_f64"] / plain["out"]
        facts["peak_bytes"] = peak_bytes(self.clock, one)
        if bout.facts is not None:
            try:
                with one.around():
                    facts |= bout.facts()
            except Exception as error:  # the time is known by now and stays in the table
                facts["failed"] = f"{type(error).__name__}: {error}"[:300]


def run(setting: Setting) -> dict[str, Any]:
    table = Table(setting)
    rows = [row for family in families() for row in family.rows]
    for at, row in enumerate(rows):
        if setting.left() < 5 and not setting.dry_run:
            table.rows.append({**table.blank(row, "-"), "missed": ["no time was left"]})
            continue
        table.run(row, 0.75 * setting.left() / (len(rows) - at))
    table.save()
    missed = [f"{r['id']} {r['mode']}" for r in best(table.rows) if not r["pass"]]
    status = "miss" if missed and not setting.dry_run else "pass"
    reason = f"missed: {', '.join(missed)}" if missed else None
    return {"status": status, "reason": reason, "rows": table.rows, "ceilings": table.ceilings}
