# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of views and codes: exact cases, and the losses of SwAV, DINO, iBOT and CAPI as
their papers and codes compute them, written anew.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_xent import close, lattice, normal, unit, wide
from torch import Tensor

import clam_kernels as ck
from clam_kernels import testing
from python_fallback import xent as truth

NAN = math.nan
TAU, EPSILON = 0.1, 0.05
Graded = list[Tensor]


def graded(z: Tensor, prototypes: Tensor, *rest: Any, **options: Any) -> Graded:
    """The loss, and its gradients for rows and prototypes."""
    leaves = [x.detach().clone().requires_grad_() for x in (z, prototypes)]
    loss = ck.swapped_prediction(*leaves, *rest, **options)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


def graded_by_torch(loss: Any, z: Tensor, prototypes: Tensor) -> Graded:
    leaves = [x.detach().clone().requires_grad_() for x in (z, prototypes)]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def compare(results: Graded, expected: Graded, dtype: torch.dtype = torch.float64) -> None:
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    for a, b in zip(results, expected, strict=True):
        assert a.dtype == dtype
        assert (a - b).abs().max() <= bound * max(1.0, float(b.abs().max()))


def potentials(z: Tensor, prototypes: Tensor, epsilon: float = EPSILON) -> tuple[Tensor, Tensor]:
    return ck.sinkhorn((z, prototypes), epsilon=epsilon, n_iter=3).code_potentials()


def linear_codes(scores: Tensor, n_iter: int = 3) -> Tensor:
    """SwAV's routine: exponentials, divided by sums of columns and rows in turn."""
    q = torch.exp(scores / EPSILON).T
    q = q / q.sum()
    k, n = q.shape
    for _ in range(n_iter):
        q = q / q.sum(1, keepdim=True) / k
        q = q / q.sum(0, keepdim=True) / n
    return (q * n).T


def swav(z: Tensor, prototypes: Tensor, assigned: int = 2, codes: Any = None) -> Tensor:
    """SwAV's loss, pair by pair."""
    scores, loss = z @ prototypes.T, z.new_zeros(())
    for a in range(assigned):
        q = linear_codes(scores[a].detach()) if codes is None else codes[a]
        part = z.new_zeros(())
        for v in range(len(z)):
            if v != a:
                part = part - (q * (scores[v] / TAU).log_softmax(1)).sum(1).mean()
        loss = loss + part / (len(z) - 1)
    return loss / assigned


def first_case() -> tuple[Tensor, Tensor]:
    views = [unit(lattice(4, 4, 5 + v, 3, 7) + 0.02 * (v + 1)) for v in range(3)]
    return torch.stack(views), unit(lattice(3, 4, 3, 4, 5) + 0.07)


# ---- exact cases ---------------------------------------------------------------------------------


def test_the_result_of_sinkhorn_goes_straight_into_the_loss():
    z, prototypes = first_case()
    codes = ck.sinkhorn((z[:2], prototypes), epsilon=EPSILON, n_iter=3)
    f, g = codes.code_potentials()
    close(ck.swapped_prediction(z, prototypes, f, g), 4.9224357005, 1e-10)
    q = (z[:2] @ prototypes.T / EPSILON + f[..., None] + g[:, None]).exp()
    close(q[0, 0], [0.08500646, 0.0, 0.91499354], 1e-8)
    close(q[0].sum(0), [1.717939, 1.366755, 0.915306], 1e-6)
    close(q, codes.codes(), 1e-14)
    close(q, ck.swav_codes((z[:2], prototypes)), 1e-14)
    compare(graded(z, prototypes, f, g), graded_by_torch(swav, z, prototypes))


def test_potentials_of_codes_with_masks_and_a_tolerance():
    """A masked row has no code, a masked prototype no mass, and a constant moves from g to f."""
    scores = normal(12, 5)
    mask = torch.arange(12) != 4
    share = wide([0.25, 0.0, 0.25, 0.25, 0.25])
    for options in ({"n_iter": 3}, {"tol": 1e-8}):
        for dtype in (torch.float64, torch.float32):
            result = ck.sinkhorn(
                scores.to(dtype), epsilon=0.5, row_mask=mask, col_marginal=share, **options
            )
            f, g = result.code_potentials()
            assert g.max() == 0
            assert f[4] == -math.inf
            q = (scores.to(dtype) / 0.5 + f[:, None] + g).exp()
            close(q, result.codes(), 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_rows_have_uniform_codes(dtype):
    _, prototypes = first_case()
    prototypes = prototypes.to(dtype)
    z = unit(normal(4, dtype=dtype)).expand(2, 6, 4)
    f, g = potentials(z, prototypes)
    q = (z @ prototypes.T / EPSILON + f[..., None] + g[:, None]).exp()
    close(q, torch.full_like(q, 1 / 3), 1e-12 if dtype == torch.float64 else 1e-5)
    scores = z[0, 0] @ prototypes.T / TAU
    expected = scores.logsumexp(0) - scores.mean()
    close(ck.swapped_prediction(z, prototypes, f, g), expected, 1e-5)
    assert expected >= math.log(3)
    flat = torch.cat([prototypes[:, :3], 0 * prototypes[:, :1]], 1)
    away = torch.eye(4, dtype=dtype)[3].expand(2, 6, 4)
    loss = ck.swapped_prediction(away, flat, *potentials(away, flat))
    close(loss, math.log(3), 1e-6)


def test_exchanged_views_give_the_same_loss():
    z, prototypes = first_case()
    f, g = potentials(z[:2], prototypes)
    one, other = z[:2], z[:2].flip(0)
    close(
        ck.swapped_prediction(one, prototypes, f, g),
        ck.swapped_prediction(other, prototypes, f.flip(0), g.flip(0)),
        1e-14,
    )


def test_permuted_prototypes_give_the_same_loss():
    z, prototypes = first_case()
    f, g = potentials(z[:2], prototypes)
    order = torch.tensor([2, 0, 1])
    one = graded(z, prototypes, f, g)
    other = graded(z, prototypes[order], f, g[:, order])
    compare([one[0], one[1], one[2][order]], other)


# ---- the losses of public code -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("views", "k"), [(2, 30), (8, 12)])
def test_swav(views, k, dtype):
    z, prototypes = unit(normal(views, 16, 8, dtype=dtype)), unit(normal(k, 8, dtype=dtype))
    f, g = potentials(z[:2], prototypes)
    compare(graded(z, prototypes, f, g), graded_by_torch(swav, z, prototypes), dtype)


def test_lightly_with_low_resolution_views_a_queue_and_a_bias():
    """lightly's loss takes lists of scores and a queue: codes come from the rows and the queue, and
    the rows of the batch are used.
    """
    n, k = 12, 9
    high, low, queue = normal(2, n, 5), normal(3, n, 5, seed=1), normal(2, 20, 5, seed=2)
    high, low, queue, prototypes, bias = (
        *(unit(x) for x in (high, low, queue, normal(k, 5))), normal(k) / 10
    )  # fmt: skip
    z = torch.cat([high, low])

    def lightly(z: Tensor, prototypes: Tensor) -> Tensor:
        scores, loss = z @ prototypes.T + bias, z.new_zeros(())
        for a in range(2):
            with torch.no_grad():
                more = torch.cat([scores[a], queue[a] @ prototypes.T + bias])
                q = linear_codes(more)[:n]
            others = [scores[v] for v in range(5) if v != a]
            parts = [(q * (s / TAU).log_softmax(1)).sum(1).mean() for s in others]
            loss = loss - torch.stack(parts).mean()
        return loss / 2

    scores = torch.cat([high, queue], 1) @ prototypes.T + bias
    f, g = ck.sinkhorn(scores, epsilon=EPSILON, n_iter=3).code_potentials()
    results = graded(z, prototypes, f[:, :n], g, bias=bias)
    compare(results, graded_by_torch(lightly, z, prototypes))


def test_dino_with_ten_crops():
    """Centred and sharpened targets of two views of a teacher, for ten views of the student."""
    n, k, student, epsilon = 6, 20, 0.1, 0.04
    z, prototypes = unit(normal(10, n, 8)), unit(normal(k, 8))
    rows, points, centre = unit(normal(2, n, 5)), unit(normal(k, 5)), normal(k) / 5

    def dino(z: Tensor, prototypes: Tensor) -> Tensor:
        targets = ((rows @ points.T - centre) / epsilon).softmax(-1)
        logs, total, terms = (z @ prototypes.T / student).log_softmax(-1), z.new_zeros(()), 0
        for a, q in enumerate(targets):
            for v in range(10):
                if v != a:
                    total, terms = total - (q * logs[v]).sum(-1).mean(), terms + 1
        return total / terms

    g = (-centre / epsilon).expand(2, k)
    f = -(rows @ points.T / epsilon + g[:, None]).logsumexp(-1)
    teacher = {"target_z": rows, "target_prototypes": points}
    results = graded(z, prototypes, f, g, temperature=student, epsilon=epsilon, **teacher)
    compare(results, graded_by_torch(dino, z, prototypes))


def test_dinov2_with_sinkhorn():
    """Sinkhorn codes of the teacher's scores; each view of the student against each of them."""
    n, k = 16, 10
    z, prototypes = unit(normal(3, n, 8)), unit(normal(k, 8))
    rows, points = unit(normal(2, n, 8, seed=3)), unit(normal(k, 8, seed=3))
    pairs = torch.full((2, 3), 0.5, dtype=torch.float64)

    def dinov2(z: Tensor, prototypes: Tensor) -> Tensor:
        logs, total = (z @ prototypes.T / TAU).log_softmax(-1), z.new_zeros(())
        for q in [linear_codes(rows[a] @ points.T) for a in range(2)]:
            for v in range(3):
                total = total - (q * logs[v]).sum(-1).mean()
        return total / 2

    f, g = potentials(rows, points)
    teacher = {"target_z": rows, "target_prototypes": points}
    compare(
        graded(z, prototypes, f, g, pairs=pairs, **teacher),
        graded_by_torch(dinov2, z, prototypes),
    )


def test_ibot_with_weights_of_images_and_padding():
    """Masked patches: each image counts once, whatever its number of masked patches; the batch is
    padded with rows of NaN that have weight 0.
    """
    images = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
    n, k, epsilon = len(images), 11, 0.06
    z, prototypes = unit(normal(n, 8)), unit(normal(k, 8))
    rows, points, centre = unit(normal(n, 8, seed=5)), unit(normal(k, 8, seed=5)), normal(k) / 5
    weight = 1 / torch.bincount(images).double()[images]

    def ibot(z: Tensor, prototypes: Tensor) -> Tensor:
        q = ((rows @ points.T - centre) / epsilon).softmax(-1)
        losses = -(q * (z @ prototypes.T / TAU).log_softmax(-1)).sum(-1)
        return (losses * weight).sum() / 3

    g = (-centre / epsilon)[None]
    f = -(rows @ points.T / epsilon + g).logsumexp(-1)[None]
    one = torch.ones(1, 1, dtype=torch.float64)
    expected = graded_by_torch(ibot, z, prototypes)
    pad = torch.full((3, 8), NAN, dtype=torch.float64)
    for padding in (pad[:0], pad):
        m = len(padding)
        result = graded(
            torch.cat([z, padding])[None], prototypes,
            torch.cat([f, padding[:, :1].T], 1), g, epsilon=epsilon, pairs=one,
            target_z=torch.cat([rows, padding])[None], target_prototypes=points,
            weight=torch.cat([weight, torch.zeros(m, dtype=torch.float64)]),
        )  # fmt: skip
        assert result[1][0, n:].eq(0).all()
        compare([result[0], result[1][0, :n], result[2]], expected)


def test_capi_with_a_problem_for_each_position():
    """Sinkhorn of each position by itself: a leading dim of codes and rows."""
    positions, n, k = 4, 10, 6
    z, prototypes = unit(normal(positions, 1, n, 5)), unit(normal(k, 5))
    rows, points = unit(normal(positions, 1, n, 5, seed=7)), unit(normal(k, 5, seed=7))

    def capi(z: Tensor, prototypes: Tensor) -> Tensor:
        losses = []
        for p in range(positions):
            q = linear_codes(rows[p, 0] @ points.T)
            losses.append(-(q * (z[p, 0] @ prototypes.T / TAU).log_softmax(-1)).sum(-1).mean())
        return torch.stack(losses).sum()

    f, g = potentials(rows, points)
    one = torch.ones(1, 1, dtype=torch.float64)
    results = graded(z, prototypes, f, g, pairs=one, target_z=rows, target_prototypes=points)
    assert results[0].shape == (positions,)
    compare([results[0].sum(), *results[1:]], graded_by_torch(capi, z, prototypes))


# ---- gradients -----------------------------------------------------------------------------------


def test_the_teacher_has_no_gradient():
    z, prototypes = first_case()
    f, g = potentials(z[:2], prototypes)
    teacher = {
        "target_z": z[:2], "target_prototypes": prototypes, "target_bias": wide([0.1, 0.2, 0.3]),
        "pairs": torch.ones(2, 3, dtype=torch.float64),
        "weight": torch.ones(4, dtype=torch.float64),
    }  # fmt: skip
    constants = [x.clone().requires_grad_() for x in (f, g, *teacher.values())]
    rows = z.clone().requires_grad_()
    options = dict(zip(teacher, constants[2:], strict=True))
    ck.swapped_prediction(rows, prototypes, *constants[:2], **options).backward()
    assert rows.grad is not None
    assert all(x.grad is None for x in constants)


def test_gradcheck():
    z, prototypes, bias = normal(2, 5, 3), normal(7, 3), normal(7)
    bias[2] = -math.inf
    fixed = {"target_z": normal(2, 5, 3, seed=1), "target_prototypes": normal(7, 3, seed=1)}
    line = normal(7, seed=1)
    line[2] = -math.inf
    weight = wide([1.0, 0.0, 2.0, 0.5, 0.0])
    f, g = normal(2, 5), normal(2, 7)

    def loss(z: Tensor, prototypes: Tensor, bias: Tensor) -> Tensor:
        return ck.swapped_prediction(
            z, prototypes, f, g, bias=bias, weight=weight, target_bias=line, epsilon=1.0, **fixed
        )

    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in (z, prototypes, bias)])


@pytest.mark.parametrize("views", [1, 2])
def test_tiles_of_prototypes_give_the_same(views, monkeypatch):
    """For large K a chunk has some prototypes at a time, and backward computes the scores again."""
    from python_fallback.common.chunk import RowBounds
    from python_fallback.xent import swapped

    z, prototypes, bias = normal(views, 40, 6), normal(300, 6), normal(300)
    bias[7] = -math.inf
    f, g = normal(views, 40) - 8, normal(views, 300)
    pairs = torch.ones(views, views, dtype=torch.float64)
    leaves = testing.leaves_of([z, prototypes, bias])
    rest = (bias, None, None, None, pairs, None, "highest")
    forward, backward = truth.swapped_prediction_saved, truth.swapped_prediction_backward
    needs = [True, True, False, False, True, *[False] * 5]
    loss = truth.swapped_prediction(*leaves[:2], f, g, 0.5, 1.0, leaves[2], None, None, None, pairs)
    expected = torch.autograd.grad(loss, leaves)
    for most in (swapped.MAX_VIEWS_ENTRIES, 1):
        monkeypatch.setattr(swapped, "MAX_VIEWS_ENTRIES", most)
        monkeypatch.setattr(swapped, "VIEWS_TILE_ENTRIES", 2000)
        monkeypatch.setattr(swapped, "VIEWS_ROWS", RowBounds(64, 16))
        out, *saved = forward(z, prototypes, f, g, 0.5, 1.0, *rest, needs)
        close(out, loss.detach(), 1e-11)
        for upstream in (1.0, -2.0):
            results = backward(
                wide(upstream), z, prototypes, f, g, 0.5, 1.0, *rest[:-1], *saved, needs
            )
            parts = [results[0], results[1], results[4]]
            for a, b in zip(parts, expected, strict=True):
                close(a, upstream * b, 1e-10)


def test_a_row_that_is_not_finite_touches_only_itself():
    z, prototypes = unit(normal(3, 6, 4)), unit(normal(5, 4))
    f, g = potentials(z[:2], prototypes)
    full = graded(z, prototypes, f, g)
    bad = z.clone()
    bad[2, 1] = NAN  # the third view has no code: all other rows keep their gradients
    loss, dz, dc = graded(bad, prototypes, f, g)
    assert loss.isnan()
    assert dz[2, 1].isnan().all()
    others = torch.ones(3, 6, dtype=torch.bool)
    others[2, 1] = False
    close(dz[others], full[1][others], 1e-13)
    assert dc.isfinite().all()
    light = torch.ones(3, 6, dtype=torch.float64)
    light[2, 1] = 0.0
    expected = graded(z, prototypes, f, g, weight=light)
    for a, b in zip(graded(bad, prototypes, f, g, weight=light), expected, strict=True):
        close(a, b, 1e-14)


def test_weights_of_0_have_no_loss():
    z, prototypes = first_case()
    f, g = potentials(z[:2], prototypes)
    for result in graded(z * NAN, prototypes, f, g, weight=torch.zeros(4)):
        assert result.eq(0).all()


def test_one_view_needs_pairs():
    z, prototypes = first_case()
    f, g = potentials(z[:1], prototypes)
    text = "pairs: expected a Tensor: there is no other view to match z [1, 4, 4], got None"
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared whole
        ck.swapped_prediction(z[:1], prototypes, f, g)
    assert str(caught.value) == text


# ---- size ----------------------------------------------------------------------------------------


def test_memory_of_many_prototypes():
    """With K = 40,000 the peak beside the gradients is below a quarter of the logits."""
    n, k, d = 256, 40_000, 8
    z, prototypes = normal(1, n, d, dtype=torch.float32), normal(k, d, dtype=torch.float32)
    f, g = torch.full((1, n), -12.0), torch.zeros(1, k)
    one = torch.ones(1, 1)
    leaves = testing.leaves_of([z, prototypes])

    def call() -> Any:
        loss = ck.swapped_prediction(*leaves, f, g, epsilon=1.0, pairs=one)
        return torch.autograd.grad(loss, leaves)

    results = 4 * (z.numel() + prototypes.numel())
    assert testing.peak_bytes(call) - results < 0.25 * 4 * n * k


def test_scores_far_beyond_exp_stay_finite():
    """SwAV's codes overflow where rows are not of unit length: the potentials do not."""
    z, prototypes = 40 * normal(2, 6, 4).float(), normal(5, 4).float()
    f, g = potentials(z, prototypes)
    for result in graded(z, prototypes, f, g):
        assert result.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_rows_are_computed_in_float32(dtype):
    z, prototypes = unit(normal(2, 8, 6)).to(dtype), unit(normal(5, 6)).to(dtype)
    f, g = potentials(z, prototypes)
    loss = ck.swapped_prediction(z, prototypes, f, g)
    assert loss.dtype == torch.float32
    exact = ck.swapped_prediction(z.double(), prototypes.double(), f, g)
    close(loss, exact, 1e-5)
