# SPDX-License-Identifier: Apache-2.0
"""Write the README's tables from the registry and from bench/results; `--check` only compares."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import clam_kernels

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"


def results() -> list[dict[str, Any]]:
    """Every committed row of `make bench`, by machine and name."""
    files = sorted(RESULTS.glob("*/*.*.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def on_a_gpu() -> tuple[set[str], dict[str, int]]:
    """(backends that a committed run of bench/gpu_check.py tested whole and timed; contract cases
    of each op that passed in one that was cut short before any failed).
    """
    found: set[str] = set()
    part: dict[str, int] = {}
    for file in RESULTS.glob("*/report.json"):
        report = json.loads(file.read_text(encoding="utf-8"))
        tests = report["stages"]["tests"]
        if report["dry_run"]:
            continue
        if tests["status"] == "pass":
            found |= {row["backend"] for row in report["rows"]}
        elif not any(s["outcome"].startswith(("exit", "died")) for s in tests.get("shards", [])):
            part |= tests.get("cases", {})
    return found, part


# How a kernel is proven where no whole run on a GPU is committed.
ELSEWHERE = {
    "triton": "Triton's interpreter",
    "cuda": "D to 16: its bodies run on a CPU",
}


def ops_table() -> str:
    """op x backend x what it was proven on."""
    proven, part = on_a_gpu()
    lines = [
        "| op | gradients | reference | Triton | CUDA C++ | on a GPU |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for spec in clam_kernels.all_ops():
        cells = [ELSEWHERE[b] if b in spec.kernels else "" for b in ("triton", "cuda")]
        gradients = "by hand" if spec.gradient else "none"
        cases = part.get(spec.name, 0)
        gpu = f"{cases} cases passed, none failed, not all ran" if cases else "unproven"
        gpu = "tested" if set(spec.kernels) <= proven else gpu
        gpu = gpu if spec.kernels else "no kernel yet: runs the reference"
        row = [f"`{spec.name}`", gradients, "CPU, tested", *cells, gpu]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _bytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


def _error(row: dict[str, Any]) -> str:
    errors = row.get("error_vs_float64")
    return f"{errors['ours']:.0e} / {errors['eager']:.0e}" if errors else ""


def _against(rivals: dict[str, Any]) -> str:
    return ", ".join(f"{rivals[name]['ratio']:.2f} {name}" for name in sorted(rivals))


def _memory(peak: dict[str, float]) -> str:
    return " / ".join(_bytes(peak[name]) for name in ("ours", "eager") if name in peak)


def bench_table() -> str:
    """One table a machine: ratios of medians of alternating rounds."""
    rows = results()
    blocks = []
    for machine in sorted({row["machine"] for row in rows}):
        head = [
            "workload",
            "pass",
            "times as fast as",
            "memory: ours / eager",
            "error: ours / rival",
        ]
        lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
        for row in (r for r in rows if r["machine"] == machine):
            memory = _memory(row["peak_extra_bytes"])
            cells = [f"`{row['name']}`", row["mode"], _against(row.get("rivals", {})), memory]
            lines.append(f"| {' | '.join([*cells, _error(row)])} |")
        versions = next(r["versions"] for r in rows if r["machine"] == machine)
        note = f"Machine: {machine}; torch {versions['torch']}, Python {versions['python']}."
        blocks.append("\n".join([note, "", *lines]))
    return "\n\n".join(blocks)


def _times(row: dict[str, Any]) -> str:
    """Rivals over ours; "eager" in chunks is the faster size."""
    found = {name: ratio for name, ratio in row["ratios"].items() if name != "eager"}
    for name, peer in row["peers"].items():
        key = "eager" if name.startswith("eager") else name
        if peer.get("ms"):
            ratio = peer["ms"] / row["ms_median"]
            found[key] = min(found.get(key, ratio), ratio)
    return ", ".join(f"{found[name]:.2g} {name}" for name in sorted(found))


GPU_HEAD = (
    "row", "workload (float32)", "mode", "backend", "ms", "goals", "floor / time",
    "times as fast as", "error / eager's", "run",
)  # fmt: skip


def gpu_table() -> str:
    """Rows of `bench/gpu_check.py`, each from the last committed run that has it: the backend that
    the automatic choice would take, which is the fastest.
    """
    best: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {}
    for file in sorted(RESULTS.glob("*/targets.json"), key=lambda f: f.parent.name, reverse=True):
        run: dict[tuple[str, str], dict[str, Any]] = {}
        for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
            key = (row["id"], row["mode"])
            if row["ms_median"] and row["ms_median"] < run.get(key, row)["ms_median"] + 1e-9:
                run[key] = row
        best |= {key: (file.parent.name, row) for key, row in run.items()}
    lines = [
        f"| {' | '.join(GPU_HEAD)} |",
        f"|{' --- |' * len(GPU_HEAD)}",
    ]
    order = sorted(best.items(), key=lambda item: (int(re.findall(r"\d+", item[0][0])[0]), item[0]))
    for (_, mode), (run_name, row) in order:
        ratio = row["err_ratio_to_eager"]
        goals = "met" if row["pass"] else "missed"
        cells = [
            row["id"],
            row["name"],
            mode,
            row["backend"],
            f"{row['ms_median']:,.0f}" if row["ms_median"] > 1e3 else f"{row['ms_median']:.3g}",
            f"{goals} ({row['target']['ms']:g} ms)",
            f"{row['share']:.0%}",
            _times(row),
            f"{ratio:.2g}" if ratio else "",
            run_name,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


METHODS = ("kmeans", "kmeans_chosen", "clam_without_am", "clam")


def quality_table() -> str:
    """Silhouettes of `bench/quality.py`, means over its seeds."""
    sets = json.loads((RESULTS / "quality.json").read_text(encoding="utf-8"))["sets"]
    lines = [
        "| table | K | k-means | k-means, chosen | ClAM without AM | ClAM (least of the seeds) |"
        " NMI: k-means, ClAM | cost |",
        f"|{' --- |' * 8}",
    ]
    totals: dict[str, list[float]] = {method: [] for method in METHODS}
    for name, runs in sets.items():
        found = {
            method: [run["methods"][method]["silhouette"] for run in runs] for method in METHODS
        }
        for method in METHODS:
            totals[method].append(_mean(found[method]))
        nmi = [_mean(run["methods"][m]["nmi"] for run in runs) for m in ("kmeans", "clam")]
        cells = [name, str(runs[0]["k"])]
        cells += [f"{_mean(found[method]):.4f}" for method in METHODS]
        cells[-1] += f" ({min(found['clam']):.4f})"
        cells += [f"{nmi[0]:.2f}, {nmi[1]:.2f}", f"{_mean(r['cost'] for r in runs):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    means = {method: _mean(values) for method, values in totals.items()}
    cells = ["mean", "", *(f"{means[method]:.4f}" for method in METHODS), "", ""]
    lines.append(f"| {' | '.join(cells)} |")
    gain = means["clam"] - means["clam_without_am"]
    lines += ["", f"What the training itself adds, mean over the tables: {gain:+.4f}."]
    return "\n".join(lines)


def completion_table() -> str:
    """Errors of `bench/completion.py`, means over its masks."""
    rows = json.loads((RESULTS / "completion.json").read_text(encoding="utf-8"))["rows"]
    heads = {
        "clam": "ClAM",
        "oracle": "its rule, k-means centres of the complete data",
        "kmeans_mean_filled": "its rule, k-means centres of the mean-filled data",
        "knn_imputer": "KNNImputer(10)",
        "mean": "mean",
    }
    lines = [f"| table | K | {' | '.join(heads.values())} |", f"|{' --- |' * (2 + len(heads))}"]
    for row in rows:
        cells = [row["name"], str(row["k"]), *(f"{row['rmse'][name]:.3f}" for name in heads)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def million_table() -> str:
    """Fits of `bench/million.py`, means over its seeds."""
    report = json.loads((RESULTS / "million.json").read_text(encoding="utf-8"))
    runs = report["runs"]
    lines = [
        "| | seconds | memory over the input | inertia | silhouette (10,000 rows) |",
        f"|{' --- |' * 5}",
    ]
    base = _mean(run["kmeans"]["inertia"] for run in runs)
    for method, name in (("kmeans", "scikit-learn KMeans(n_init=1)"), ("clam", "ClAM")):
        found = [run[method] for run in runs]
        cells = [
            name,
            f"{_mean(f['seconds'] for f in found):.0f}",
            _bytes(max(f["extra_bytes"] for f in found)),
            f"{_mean(f['inertia'] for f in found) / base:.3f}",
            f"{_mean(f['silhouette'] for f in found):.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def relabelling_table() -> str:
    """Runs of `bench/relabelling.py` on all rows."""
    report = json.loads((RESULTS / "relabelling.json").read_text(encoding="utf-8"))
    names = {
        "scores": "`sinkhorn`, stored scores, tol 1e-3",
        "features": "`sinkhorn`, scores made anew in each pass, tol 1e-3",
        "scores, tight": "`sinkhorn`, stored scores, tol of the published test",
        "published": "the published algorithm (float64, plain domain)",
    }
    lines = [
        "| | CPU seconds | passes | memory over the input | labels unlike float64's to 1e-10 |",
        f"|{' --- |' * 5}",
    ]
    for method, name in names.items():
        row = report["methods"][method]
        cells = [
            name,
            f"{row['cpu_seconds']:.1f}",
            str(row["iterations"]),
            _bytes(row["extra_bytes"]),
            str(row["labels_that_differ"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {
    "ops": ops_table,
    "bench": bench_table,
    "gpu": gpu_table,
    "quality": quality_table,
    "completion": completion_table,
    "million": million_table,
    "relabelling": relabelling_table,
}


def rendered(text: str) -> str:
    """The README with its marked blocks made anew."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- {name}:begin[^>]*-->\n).*?(<!-- {name}:end -->)"
        text, count = re.subn(
            pattern, lambda m, t=table: f"{m[1]}{t()}\n{m[2]}", text, flags=re.DOTALL
        )
        if count != 1:
            raise SystemExit(f"README.md: expected one block '{name}', got {count}")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only; 1 if they differ")
    check = parser.parse_args().check
    text = README.read_text(encoding="utf-8")
    fresh = rendered(text)
    if not check:
        README.write_text(fresh, encoding="utf-8")
    elif fresh != text:
        print(
            "README.md: its tables differ from the registry or bench/results; run make readme-bench"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
