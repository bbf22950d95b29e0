# SPDX-License-Identifier: Apache-2.0
"""Write the tables of docs/results.md from the registry and from bench/results; `--check` only
compares.
"""

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
PAGE = ROOT / "docs" / "results.md"
RESULTS = ROOT / "bench" / "results"


def results() -> list[dict[str, Any]]:
    """Every committed row of `make bench`, by machine and name."""
    files = sorted(RESULTS.glob("*/*.*.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def gpu_tests() -> tuple[set[str], dict[str, int]]:
    """Backends for which a committed run of bench/gpu_check.py passed the whole suite; and, by op,
    the number of contract cases that passed in a run that ended early without a failure.
    """
    tested: set[str] = set()
    cases: dict[str, int] = {}
    for file in RESULTS.glob("*/report.json"):
        report = json.loads(file.read_text(encoding="utf-8"))
        tests = report["stages"]["tests"]
        if report["dry_run"]:
            continue
        if tests["status"] == "pass":
            tested |= {row["backend"] for row in report["rows"]}
        elif not any(s["outcome"].startswith(("exit", "died")) for s in tests.get("shards", [])):
            cases |= tests.get("cases", {})
    return tested, cases


# What proves a kernel where no run of the whole suite on a GPU is committed.
PROOFS_WITHOUT_A_GPU = {
    "triton": "Triton's interpreter",
    "cuda": "D to 16: its bodies run on a CPU",
}


def ops_table() -> str:
    """A row for each op: its backends, and what each of them was proven on."""
    tested, cases_by_op = gpu_tests()
    lines = [
        "| op | gradients | reference | Triton | CUDA C++ | on a GPU |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for spec in clam_kernels.all_ops():
        cells = [PROOFS_WITHOUT_A_GPU[b] if b in spec.kernels else "" for b in ("triton", "cuda")]
        gradients = "by hand" if spec.gradient else "none"
        cases = cases_by_op.get(spec.name, 0)
        gpu = f"{cases} cases passed, none failed, not all ran" if cases else "unproven"
        gpu = "tested" if set(spec.kernels) <= tested else gpu
        gpu = gpu if spec.kernels else "no kernel yet: runs the reference"
        row = [f"`{spec.name}`", gradients, "CPU, tested", *cells, gpu]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


def _error(row: dict[str, Any]) -> str:
    errors = row.get("error_vs_float64")
    return f"{errors['ours']:.0e} / {errors['eager']:.0e}" if errors else ""


def _ratios(rivals: dict[str, Any]) -> str:
    return ", ".join(f"{rivals[name]['ratio']:.2f} {name}" for name in sorted(rivals))


def _memory(peak: dict[str, float]) -> str:
    return " / ".join(_megabytes(peak[name]) for name in ("ours", "eager") if name in peak)


def bench_table() -> str:
    """One table a machine: rival / ours, medians over rounds that alternate."""
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
            memory = _memory(row.get("peak_extra_bytes", {}))
            cells = [f"`{row['name']}`", row["mode"], _ratios(row.get("rivals", {})), memory]
            lines.append(f"| {' | '.join([*cells, _error(row)])} |")
        versions = next(r["versions"] for r in rows if r["machine"] == machine)
        note = f"Machine: {machine}; torch {versions['torch']}, Python {versions['python']}."
        blocks.append("\n".join([note, "", *lines]))
    return "\n\n".join(blocks)


def _gpu_ratios(row: dict[str, Any]) -> str:
    """Times of the rivals divided by ours; of "eager" in chunks of several sizes the fastest."""
    ratios = {name: ratio for name, ratio in row["ratios"].items() if name != "eager"}
    for name, peer in row["peers"].items():
        key = "eager" if name.startswith("eager") else name
        if peer.get("ms"):
            ratio = peer["ms"] / row["ms_median"]
            ratios[key] = min(ratios.get(key, ratio), ratio)
    return ", ".join(f"{ratios[name]:.2g} {name}" for name in sorted(ratios))


GPU_HEAD = (
    "row", "workload (float32)", "mode", "backend", "ms", "goals", "floor / time",
    "times as fast as", "error / eager's", "run",
)  # fmt: skip


def gpu_table() -> str:
    """Rows of `bench/gpu_check.py`, each from the last committed run that has it. Of several
    backends the row is the fastest one's, which the automatic choice takes.
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
            _gpu_ratios(row),
            f"{ratio:.2g}" if ratio else "",
            run_name,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


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
        silhouettes = {
            method: [run["methods"][method]["silhouette"] for run in runs] for method in METHODS
        }
        for method in METHODS:
            totals[method].append(_mean(silhouettes[method]))
        nmi = [_mean(run["methods"][m]["nmi"] for run in runs) for m in ("kmeans", "clam")]
        cells = [name, str(runs[0]["k"])]
        cells += [f"{_mean(silhouettes[method]):.4f}" for method in METHODS]
        cells[-1] += f" ({min(silhouettes['clam']):.4f})"
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
        "oracle": "its rule, k-means centroids of the complete data",
        "kmeans_mean_filled": "its rule, k-means centroids of the mean-filled data",
        "knn_imputer": "KNNImputer(10)",
        "mean": "column means",
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
        fits = [run[method] for run in runs]
        cells = [
            name,
            f"{_mean(f['seconds'] for f in fits):.0f}",
            _megabytes(max(f["extra_bytes"] for f in fits)),
            f"{_mean(f['inertia'] for f in fits) / base:.3f}",
            f"{_mean(f['silhouette'] for f in fits):.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def relabelling_table() -> str:
    """Runs of `bench/relabelling.py` on all rows."""
    report = json.loads((RESULTS / "relabelling.json").read_text(encoding="utf-8"))
    names = {
        "scores": "`sinkhorn`, stored scores, tol 1e-3",
        "features": "`sinkhorn`, scores computed in each pass, tol 1e-3",
        "scores, tight": "`sinkhorn`, stored scores, tol of the published test",
        "published": "the published algorithm (float64, plain domain)",
    }
    lines = [
        "| | CPU seconds | passes | memory over the input |"
        " labels that differ from float64's (to 1e-10) |",
        f"|{' --- |' * 5}",
    ]
    for method, name in names.items():
        row = report["methods"][method]
        cells = [
            name,
            f"{row['cpu_seconds']:.1f}",
            str(row["iterations"]),
            _megabytes(row["extra_bytes"]),
            str(row["labels_that_differ"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# Accuracies of others beside the row of mnist10k, and what differs.
PUBLISHED = (
    "mnist10k is the standard test set of MNIST. Published accuracies: N2D .948 and DEC-DA .983 on"
    " it, DEC .84 on all 70,000 images. What differs: their networks are larger (500-500-2000-10 or"
    " convolutional) and train for hundreds of epochs, DEC's layer by layer without augmentation."
)


def dec_table() -> str:
    """Figures of `bench/dec_quality.py`, means over its seeds."""
    sets = json.loads((RESULTS / "dec_quality.json").read_text(encoding="utf-8"))["sets"]
    heads = ["table", "method", "accuracy (each seed)", "NMI", "ARI", "smallest cluster", "CPU s"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for name, runs in sets.items():
        for method in dict.fromkeys(m for run in runs for m in run["methods"]):
            rows = [run["methods"][method] for run in runs if method in run["methods"]]
            mean = {key: _mean(row[key] for row in rows) for key in rows[0]}
            each = ", ".join(f"{row['accuracy']:.3f}" for row in rows)
            cells = [name, method, f"{mean['accuracy']:.3f} ({each})"]
            cells += [f"{mean['nmi']:.3f}", f"{mean['ari']:.3f}", f"{mean['smallest']:.1%}"]
            cells.append(f"{mean['seconds']:.0f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", PUBLISHED])


TABLES = {
    "ops": ops_table,
    "bench": bench_table,
    "gpu": gpu_table,
    "quality": quality_table,
    "completion": completion_table,
    "million": million_table,
    "relabelling": relabelling_table,
    "dec": dec_table,
}


def update_tables(text: str) -> str:
    """The page with new content in each marked block."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- {name}:begin[^>]*-->\n).*?(<!-- {name}:end -->)"
        text, count = re.subn(
            pattern, lambda m, t=table: f"{m[1]}{t()}\n{m[2]}", text, flags=re.DOTALL
        )
        if count != 1:
            raise SystemExit(f"docs/results.md: expected one block '{name}', got {count}")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only; 1 if they differ")
    check = parser.parse_args().check
    text = PAGE.read_text(encoding="utf-8")
    updated = update_tables(text)
    if not check:
        PAGE.write_text(updated, encoding="utf-8")
    elif updated != text:
        print(
            "docs/results.md: its tables differ from the registry or bench/results;"
            " run make readme-bench"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
