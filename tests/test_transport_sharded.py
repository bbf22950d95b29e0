# SPDX-License-Identifier: Apache-2.0
"""`sinkhorn` over several processes: rows spread unevenly, one process without any."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from clam_kernels import sinkhorn, swav_codes

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


def _masses() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.rand(s, generator=generator, dtype=torch.float64) + 0.1 for s in (N, K))
    return a / a.sum(), b / b.sum(), torch.rand(N, generator=generator) < 0.7


def _forbidden() -> Tensor:
    """A prototype that no row of the first process may have."""
    scores = _scores()
    scores[:50, 2] = -torch.inf
    return scores


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", len(PARTS))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(PARTS))
    group, part = dist.group.WORLD, PARTS[rank]
    a, b, mask = _masses()
    found = {}

    def keep(name: str, result) -> None:
        found[name] = (result.codes(), result.labels(), result.g, result.err, result.status,
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
    lost = _scores()
    lost[80, 3] = torch.nan
    keep("lost", sinkhorn(lost[part], process_group=group))
    keep("no rows", sinkhorn(_scores()[:0], process_group=group))
    found["codes"] = (swav_codes(_scores()[part], process_group=group),)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(_worker, args=(str(folder),), nprocs=len(PARTS), start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(len(PARTS))]


def _whole(found, name: str, dim: int = 0):
    """(codes, labels, g, err, status, iterations); the last four are the same on all."""
    ranks = [rank[name] for rank in found]
    for rank in ranks[1:]:
        for mine, first in zip(rank[2:5], ranks[0][2:5], strict=True):
            assert torch.equal(mine.nan_to_num(), first.nan_to_num())
        assert rank[5] == ranks[0][5]
    return (torch.cat([r[0] for r in ranks], dim), torch.cat([r[1] for r in ranks], dim),
        *ranks[0][2:])  # fmt: skip


def _same(result, want, atol: float, gauge: float) -> None:
    codes, labels, g, err, status, n_iter = result
    torch.testing.assert_close(codes, want.codes(), atol=atol, rtol=0)
    torch.testing.assert_close(g, want.g, atol=gauge, rtol=0)
    torch.testing.assert_close(err, want.err, atol=atol, rtol=0)
    assert torch.equal(labels, want.labels())
    assert torch.equal(status, want.status)
    assert n_iter == want.n_iter


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RULES)
def test_a_sharded_run_is_that_of_one_process(found, name, dtype):
    want = sinkhorn(_scores(dtype), **RULES[name])
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    _same(_whole(found, f"{name} {dtype}"), want, bound, bound)


def test_masses_masks_batches_and_forbidden_pairs(found):
    a, b, mask = _masses()
    want = sinkhorn(_scores(), row_marginal=a, col_marginal=b, tol=1e-6, max_iter=3000)
    _same(_whole(found, "masses"), want, 1e-11, 1e-11)
    _same(_whole(found, "mask"), sinkhorn(_scores(), row_mask=mask), 1e-12, 1e-12)
    _same(_whole(found, "forbidden"), sinkhorn(_forbidden()), 1e-12, 1e-12)
    both = torch.stack([_scores(), 3 * _scores()])
    want = sinkhorn(both, tol=1e-4, max_iter=3000)
    _same(_whole(found, "batch", 1), want, 1e-11, 1e-10)


def test_a_fault_of_one_process_is_one_of_all(found):
    codes, labels, *_, status, _ = _whole(found, "lost")
    assert int(status) == 2
    assert bool(codes.isnan().all())
    assert bool((labels == -1).all())
    assert all(int(rank["no rows"][4]) == 4 for rank in found)
    assert all(rank["no rows"][0].shape == (0, K) for rank in found)


def test_codes_of_a_batch_spread_over_processes(found):
    codes = torch.cat([rank["codes"][0] for rank in found])
    torch.testing.assert_close(codes, swav_codes(_scores()), atol=1e-12, rtol=0)
