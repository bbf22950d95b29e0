# SPDX-License-Identifier: Apache-2.0
"""`sinkhorn` over several processes: rows spread unevenly, one process without any."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from clam_kernels import sinkhorn, swav_codes
from clam_kernels.transport import _strict

N, K = 90, 7
PARTS = (slice(0, 50), slice(50, 50), slice(50, 90))
RULES = {
    "three iterations": {},
    "no iteration": {"n_iter": 0},
    "rows first": {"prototype_first": False, "n_iter": 4},
    "tolerance": {"tol": 1e-5, "epsilon": 0.1},
    "rows first to a tolerance": {"tol": 1e-5, "epsilon": 0.1, "prototype_first": False},
    "accelerated": {"tol": 1e-5, "accelerate": "anderson", "max_iter": 500},
}


def _scores(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (2 * torch.rand(N, K, generator=generator, dtype=torch.float64) - 1).to(dtype)


def _features() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    z, c = (torch.randn(s, 4, generator=generator, dtype=torch.float64) for s in (N, K))
    return z, c


def _masses() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.rand(s, generator=generator, dtype=torch.float64) + 0.1 for s in (N, K))
    return a / a.sum(), b / b.sum(), torch.rand(N, generator=generator) < 0.7


def _forbidden() -> Tensor:
    """Scores with a prototype that no row of the first process may have."""
    scores = _scores()
    scores[:50, 2] = -torch.inf
    return scores


def _chained() -> Tensor:
    """Forbidden pairs for which no row may move directly to a prototype with room: a row has its
    own prototype and the next; some rows have the first prototype alone.
    """
    own, rows = torch.arange(N) % K, torch.arange(N)
    open_ = torch.zeros(N, K, dtype=torch.bool)
    open_[rows, own] = open_[rows, (own + 1) % K] = True
    open_[[6, 13, 62, 69]] = torch.arange(K) == 0
    liked = torch.nn.functional.one_hot(own, K)
    return (_scores() + 3 * liked).masked_fill(~open_, -torch.inf)


def _sums(result) -> dict[str, Tensor]:
    """The sums over all rows, and the labels in exact shares."""
    return {
        "value": result.value(), "entropy": result.entropy(), "counts": result.counts(),
        "strict counts": result.counts(strict=True), "strict labels": result.labels(strict=True),
    }  # fmt: skip


def _sums_of(part: slice | None = None, group: Any = None) -> dict[str, dict[str, Tensor]]:
    """The sums of several problems, of some rows over a group or of all rows."""
    part = slice(None) if part is None else part
    a, b, mask = _masses()
    both = torch.stack([_scores(), 3 * _scores()])
    calls = {
        "plain": ((_scores(),), {}),
        "float32": ((_scores(torch.float32),), {}),
        "features": ((_features(),), {"epsilon": 0.3}),
        "bias": ((_scores(),), {"bias": torch.linspace(-2, 2, K)}),
        "masses": ((_scores(),), {"row_marginal": a[part], "col_marginal": b}),
        "mask": ((_scores(),), {"row_mask": mask[part]}),
        "chained": ((_chained(),), {"n_iter": 0}),
        "few choices": ((_scores() + torch.arange(K),), {"n_iter": 0}),
        "batch": ((both,), {"tol": 1e-4, "max_iter": 3000}),
    }
    results = {}
    before = _strict.CHOICES
    for name, ((scores,), rule) in calls.items():
        own = (scores[0][part], scores[1]) if isinstance(scores, tuple) else scores[..., part, :]
        _strict.CHOICES = 1 if name == "few choices" else before
        results[name] = _sums(sinkhorn(own, process_group=group, **rule))
    _strict.CHOICES = before
    return results


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", len(PARTS))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(PARTS))
    group, part = dist.group.WORLD, PARTS[rank]
    a, b, mask = _masses()
    results = {}

    def keep(name: str, result) -> None:
        results[name] = (result.codes(), result.labels(), result.g, result.err, result.status,
            result.n_iter)  # fmt: skip

    for name, rule in RULES.items():
        for dtype in (torch.float32, torch.float64):
            scores = _scores(dtype)[part]
            keep(f"{name} {dtype}", sinkhorn(scores, process_group=group, **rule))
    keep("masses", sinkhorn(_scores()[part], row_marginal=a[part], col_marginal=b, tol=1e-6,
        max_iter=3000, process_group=group))  # fmt: skip
    keep("mask", sinkhorn(_scores()[part], row_mask=mask[part], process_group=group))
    keep("forbidden", sinkhorn(_forbidden()[part], process_group=group))
    keep("batch", sinkhorn(torch.stack([_scores(), 3 * _scores()])[:, part], tol=1e-4,
        max_iter=3000, process_group=group))  # fmt: skip
    not_finite = _scores()
    not_finite[80, 3] = torch.nan
    keep("not-finite", sinkhorn(not_finite[part], process_group=group))
    keep("no rows", sinkhorn(_scores()[:0], process_group=group))
    results["sums"] = _sums_of(part, group)
    halves = torch.full((N,), 1 / N, dtype=torch.bfloat16)
    keep("half masses", sinkhorn(_scores()[part], row_marginal=halves[part], process_group=group))
    results["no rows, value"] = sinkhorn(_scores()[:0], process_group=group).value()
    results["codes"] = (swav_codes(_scores()[part], process_group=group),)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(_worker, args=(str(folder),), nprocs=len(PARTS), start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(len(PARTS))]


def _whole(ranks, name: str, dim: int = 0):
    """(codes, labels, g, err, status, iterations); the last four are equal on all processes."""
    outputs = [rank[name] for rank in ranks]
    for output in outputs[1:]:
        for mine, first in zip(output[2:5], outputs[0][2:5], strict=True):
            assert torch.equal(mine.nan_to_num(), first.nan_to_num())
        assert output[5] == outputs[0][5]
    return (torch.cat([r[0] for r in outputs], dim), torch.cat([r[1] for r in outputs], dim),
        *outputs[0][2:])  # fmt: skip


def _same(result, expected, atol: float, gauge: float) -> None:
    codes, labels, g, err, status, n_iter = result
    torch.testing.assert_close(codes, expected.codes(), atol=atol, rtol=0)
    torch.testing.assert_close(g, expected.g, atol=gauge, rtol=0)
    torch.testing.assert_close(err, expected.err, atol=atol, rtol=0)
    assert torch.equal(labels, expected.labels())
    assert torch.equal(status, expected.status)
    assert n_iter == expected.n_iter


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RULES)
def test_a_sharded_run_is_that_of_one_process(ranks, name, dtype):
    expected = sinkhorn(_scores(dtype), **RULES[name])
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    _same(_whole(ranks, f"{name} {dtype}"), expected, bound, bound)


def test_masses_masks_batches_and_forbidden_pairs(ranks):
    a, b, mask = _masses()
    expected = sinkhorn(_scores(), row_marginal=a, col_marginal=b, tol=1e-6, max_iter=3000)
    _same(_whole(ranks, "masses"), expected, 1e-11, 1e-11)
    _same(_whole(ranks, "mask"), sinkhorn(_scores(), row_mask=mask), 1e-12, 1e-12)
    _same(_whole(ranks, "forbidden"), sinkhorn(_forbidden()), 1e-12, 1e-12)
    both = torch.stack([_scores(), 3 * _scores()])
    expected = sinkhorn(both, tol=1e-4, max_iter=3000)
    _same(_whole(ranks, "batch", 1), expected, 1e-11, 1e-10)


def test_a_failure_of_one_process_is_one_of_all(ranks):
    codes, labels, *_, status, _ = _whole(ranks, "not-finite")
    assert int(status) == 2
    assert bool(codes.isnan().all())
    assert bool((labels == -1).all())
    assert all(int(rank["no rows"][4]) == 4 for rank in ranks)
    assert all(rank["no rows"][0].shape == (0, K) for rank in ranks)


def test_codes_of_a_batch_spread_over_processes(ranks):
    codes = torch.cat([rank["codes"][0] for rank in ranks])
    torch.testing.assert_close(codes, swav_codes(_scores()), atol=1e-12, rtol=0)


SUMS = (
    "plain", "float32", "features", "bias", "masses", "mask", "chained", "few choices", "batch"
)  # fmt: skip


@pytest.fixture(scope="module")
def alone():
    return _sums_of()


@pytest.mark.parametrize("name", SUMS)
def test_sums_are_those_of_all_rows(ranks, alone, name):
    """Every process returns the value, entropy and counts of the one-process run."""
    expected = alone[name]
    for rank in ranks:
        sums = rank["sums"][name]
        bound = 1e-6 if name == "float32" else 1e-11
        for word in ("value", "entropy"):
            torch.testing.assert_close(sums[word], expected[word], atol=bound, rtol=0)
        for word in ("counts", "strict counts"):
            assert torch.equal(sums[word], expected[word])


@pytest.mark.parametrize("name", SUMS)
def test_strict_labels_are_those_of_one_process(ranks, alone, name):
    """Shares are exact over all rows, not on each process."""
    expected = alone[name]["strict labels"]
    labels = torch.cat([rank["sums"][name]["strict labels"] for rank in ranks], -1)
    assert torch.equal(labels, expected)


def test_equal_masses_in_half_precision(ranks):
    _same(_whole(ranks, "half masses"), sinkhorn(_scores()), 1e-7, 1e-6)


def test_the_value_of_no_rows_is_zero(ranks):
    assert all(float(rank["no rows, value"]) == 0 for rank in ranks)
