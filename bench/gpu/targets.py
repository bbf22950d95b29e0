# SPDX-License-Identifier: Apache-2.0
"""Stage targets: time every target of every family beside its peers on the same data, and measure
its error in the same run.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from .. import record
from .cases import Target, TimedContest, Work, backends, families, forced_backend, refusal
from .clock import Clock, Contestant, Times, free_memory, peak_bytes, race
from .setting import Setting, write_json
from .table import best

ROUNDS, FEW_ROUNDS = 24, 3
# Used if this run measured no ceilings; bytes, operations and exponentials per second.
ASSUMED = {
    "copy": 4.3e12, "bf16": 790e12, "tf32": 395e12, "fp32": 60e12, "ex2": 4.18e12, "lanes": 33.5e12,
}  # fmt: skip
# A product in a split mode costs this many products of a unit.
UNITS = {"bf16x3": ("bf16", 3), "bf16x6": ("bf16", 6), "tf32x3": ("tf32", 3)}
# For each figure: (factor of the error of eager torch, bound that is always allowed).
CLASSES: dict[str, dict[str, tuple[float, float]]] = {
    "exact": {"out": (2.0, 0.0), "grad_median": (2.0, 0.0)},
    "accurate": {"out": (2.0, 1e-5), "grad_median": (2.0, 1e-4)},
    "like": {"out": (2.0, 0.0), "grad_median": (2.0, 0.0)},
    "labels": {"out": (0.0, 0.0)},
    "curve": {},
}


def floor(work: Work, ceilings: dict[str, float]) -> tuple[float, str]:
    """(lower bound in milliseconds, the limiting resource): the maximum over resources of work /
    ceiling. Lane operations share the issue slots of float32 products, so those two add up.
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
    measured = setting.earlier("ceilings").get("rates", {})
    rates = {name: measured.get(name) or rate for name, rate in ASSUMED.items()}
    return rates, all(measured.get(name) for name in ASSUMED if name != "lanes")


def error_misses(errors: dict[str, Any], plain: dict[str, Any], kind: str) -> list[str]:
    """The figures that miss their error class, by the rule of `testing.assert_close_on_average`:
    over the draws the geometric mean of error / allowed is at most 1, and no ratio exceeds 8. A NaN
    misses every class.
    """
    missed = []
    for name, (factor, always_allowed) in CLASSES[kind].items():
        if name not in errors:
            continue
        pairs = zip(draws(errors, name), draws(plain, name), strict=True)
        shares = [share(error, max(factor * other, always_allowed)) for error, other in pairs]
        mean = math.exp(statistics.fmean(math.log(s) for s in shares))
        if not (mean <= 1 and max(shares) <= 8):
            missed.append(f"error {name} {errors[name]:.1e}, {mean:.2g} of the allowed")
    return missed


def draws(errors: dict[str, Any], name: str) -> list[float]:
    values: list[float] = errors.get(f"{name}_draws", [errors[name]])
    return values


def share(error: float, allowed: float) -> float:
    """error / allowed, at least 1e-3: one exact draw must not hide the others in the mean."""
    if error == 0:
        return 1e-3
    return max(error / allowed, 1e-3) if allowed > 0 and error == error else math.inf


def summary(times: Times, scale: float) -> dict[str, Any]:
    names = {"ms_median": 0.5, "ms_p10": 0.1, "ms_p90": 0.9}
    figures: dict[str, Any] = {}
    for name, share in names.items():
        value = times.quantile(share)
        figures[name] = None if value is None else scale * value
    if times.ms:
        figures["ms_median"] = scale * statistics.median(times.ms)
    return {**figures, "rounds": len(times.ms)}


def ratios(target: Target, ms: float | None, peers: dict[str, Any]) -> dict[str, float]:
    """Time of the fastest peer of each name in the goal, over ours; absent peers have no ratio."""
    result = {}
    for name in dict.fromkeys([*target.goal.ratios, "eager"]):
        rivals = [
            p["ms"] for key, p in peers.items() if key.startswith(name) and p.get("ms") is not None
        ]
        if rivals and ms:
            result[name] = min(rivals) / ms
    return result


def misses(target: Target, facts: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    """Every part of the goal that the figures miss."""
    if facts["ms_median"] is None:
        return [f"did not run: {facts.get('reason')}"]
    missed = error_misses(facts["errors"], plain, target.goal.error)
    missed += [facts["failed"]] if "failed" in facts else []
    if facts.get("curve_ok") is False:
        missed.append("the loss curve leaves that of eager")
    if facts["ms_median"] > target.goal.ms:
        missed.append(f"{facts['ms_median']:.3g} ms > {target.goal.ms:.3g}")
    for name, least in target.goal.ratios.items():
        ratio = facts["ratios"].get(name)
        if ratio is not None and ratio < least:
            missed.append(f"{ratio:.2g}x {name} < {least:g}x")
    limit, peak = target.goal.peak_bytes, facts.get("peak_bytes")
    if limit is not None and peak is not None and peak > limit:
        missed.append(f"peak {peak / 2**30:.2f} GiB > {limit / 2**30:.2f}")
    count, most = facts.get("launches"), target.goal.launches
    if count is not None and most is not None and count > most:
        missed.append(f"{count} launches > {most}")
    return missed


class TargetTable:
    """The rows of the report so far; it is on disk after each."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.clock = setting, Clock(setting.device)
        self.ceilings, self.measured = ceilings_of(setting)
        self.where = record.facts(setting.device)
        self.rows: list[dict[str, Any]] = []

    def save(self) -> None:
        write_json(self.setting.out / "targets.json", {**self.where, "rows": self.rows})
        status = {"status": "timeout", "reason": f"stopped after {len(self.rows)} rows"}
        self.setting.save({**status, "rows": self.rows})

    def blank(self, target: Target, backend: str) -> dict[str, Any]:
        ms, bound = floor(target.work, self.ceilings)
        return {
            "id": target.id, "name": target.name, "shape": target.shape, "dtype": target.dtype,
            "mode": target.mode, "backend": backend, "unit": target.work.unit,
            "ms_median": None, "ms_p10": None, "ms_p90": None,
            "floor_ms": ms, "bound_by": bound, "share": None, "peers": {}, "ratios": {},
            "err_vs_f64": None, "err_ratio_to_eager": None, "errors": {}, "peak_bytes": None,
            "target": {
                "ms": target.goal.ms, "ratios": dict(target.goal.ratios),
                "peak_bytes": target.goal.peak_bytes, "launches": target.goal.launches,
                "error": target.goal.error,
            },
            "pass": False, "note": target.note, "stand_in": self.setting.dry_run,
            "ceilings_measured": self.measured,
        }  # fmt: skip

    def run(self, target: Target, seconds: float) -> None:
        """One target on every backend that can run it. One that cannot be built gives a reason."""
        able, refusals = backends(target.op, self.setting.device)
        try:
            contest = target.build(self.setting, target)
            reasons = {name: refusal(name, target.op, *contest.args) for name in able}
            refusals |= {name: reason for name, reason in reasons.items() if reason is not None}
            able = [name for name, reason in reasons.items() if reason is None]
            if not able:
                raise RuntimeError("; ".join(refusals.values()))
            self.contest(target, contest, able, seconds)
        except Exception as error:  # the other targets still run
            reason = f"{type(error).__name__}: {error}"[:300]
            self.rows.append({**self.blank(target, "-"), "reason": reason, "missed": [reason]})
        if refusals:
            self.rows[-1]["refusals"] = refusals
        free_memory(self.clock)
        self.save()

    def contest(
        self, target: Target, contest: TimedContest, able: list[str], seconds: float
    ) -> None:
        contestants = {name: Contestant(contest.ours, forced_backend(name)) for name in able}
        contestants |= {f"peer {name}": peer for name, peer in contest.peers.items()}
        rounds = FEW_ROUNDS if self.setting.dry_run else ROUNDS
        times = race(self.clock, contestants, rounds, seconds, target.kind)
        plain = self.errors(contest, contest.plain)
        peers = {name: self.peer(contest, name, times) for name in contest.peers}
        for name in able:
            facts = {
                **self.blank(target, name),
                **summary(times[name], contest.scale),
                "peers": peers,
            }
            facts["reason"] = times[name].reason
            if times[name].ms:
                self.measure(facts, contest, contestants[name], plain)
                facts["ratios"] = ratios(target, facts["ms_median"], peers)
            facts["missed"] = misses(target, facts, plain)
            facts["pass"] = not facts["missed"]
            self.rows.append(facts)

    def errors(self, contest: TimedContest, contestant: Contestant) -> dict[str, Any]:
        with contestant.around():
            return contest.errors(contestant.call())

    def peer(self, contest: TimedContest, name: str, times: dict[str, Times]) -> dict[str, Any]:
        own = times[f"peer {name}"]
        if not own.ms:
            return {"ms": None, "err": None, "absent": own.reason}
        errors = self.errors(contest, contest.peers[name])
        ms = summary(own, contest.scale)
        return {"ms": ms["ms_median"], "ms_p10": ms["ms_p10"], "ms_p90": ms["ms_p90"],
                "err": errors.get("out"), "errors": errors}  # fmt: skip

    def measure(
        self,
        facts: dict[str, Any],
        contest: TimedContest,
        contestant: Contestant,
        plain: dict[str, Any],
    ) -> None:
        """Share of the lower bound, error and memory of our call."""
        if not self.setting.dry_run:  # the stand-in is smaller than the target
            facts["share"] = facts["floor_ms"] / facts["ms_median"]
        facts["errors"] = self.errors(contest, contestant)
        facts["err_vs_f64"] = facts["errors"].get("out")
        if facts["err_vs_f64"] is not None and plain["out"] > 0:
            facts["err_ratio_to_eager"] = facts["err_vs_f64"] / plain["out"]
        facts["peak_bytes"] = peak_bytes(self.clock, contestant)
        if contest.facts is not None:
            try:
                with contestant.around():
                    facts |= contest.facts()
            except Exception as error:  # the times are valid without these facts
                facts["failed"] = f"{type(error).__name__}: {error}"[:300]


def run(setting: Setting) -> dict[str, Any]:
    table = TargetTable(setting)
    targets = [target for family in families() for target in family.targets]
    for at, target in enumerate(targets):
        if setting.left() < 5 and not setting.dry_run:
            table.rows.append({**table.blank(target, "-"), "missed": ["no time was left"]})
            continue
        table.run(target, 0.75 * setting.left() / (len(targets) - at))
    table.save()
    missed = [f"{r['id']} {r['mode']}" for r in best(table.rows) if not r["pass"]]
    status = "miss" if missed and not setting.dry_run else "pass"
    reason = f"missed: {', '.join(missed)}" if missed else None
    return {"status": status, "reason": reason, "rows": table.rows, "ceilings": table.ceilings}
