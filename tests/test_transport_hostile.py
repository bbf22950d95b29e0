# SPDX-License-Identifier: Apache-2.0
"""`sinkhorn` on input that is out of play, forbidden, half, empty or wrong."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from clam_kernels import sela_labels, sinkhorn

SHUT = -math.inf
DOUBLE = torch.float64


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def _cost(scores: Tensor, labels: Tensor) -> float:
    return float(scores[torch.arange(len(labels)), labels].sum())


@pytest.mark.parametrize("n_iter", [0, 3, 200])
def test_strict_labels_with_forbidden_pairs(n_iter):
    """Rows move in chains where none may move straight; the shares are met whenever they can be."""
    straight = [[1, 0.9, SHUT]] * 2 + [[1, SHUT, SHUT]] + [[SHUT, 1, 0.5]] * 3
    chain = [[SHUT, 1, SHUT, SHUT], [SHUT, 1, 0.9, SHUT], [0.5, SHUT, 1, SHUT], [SHUT] * 3 + [1]]
    for rows in (straight, chain):
        scores = torch.tensor(rows)
        labels = sinkhorn(scores, n_iter=n_iter).labels(strict=True)
        k = scores.shape[1]
        assert torch.bincount(labels, minlength=k).tolist() == [len(rows) // k] * k
        assert _cost(scores, labels) > SHUT
    for seed in range(40):
        scores = _draw(seed, 12, 4)
        open_ = torch.rand(12, 4, generator=torch.Generator().manual_seed(seed)) < 0.45
        open_[torch.arange(12), torch.arange(12) % 4] = True
        scores = scores.masked_fill(~open_, SHUT)
        labels = sinkhorn(scores, epsilon=0.3, n_iter=n_iter).labels(strict=True)
        assert torch.bincount(labels).tolist() == [3, 3, 3, 3]
        assert _cost(scores, labels) > SHUT


def test_strict_shares_that_cannot_be_met():
    scores = torch.tensor([[1.0, SHUT], [1.0, SHUT], [1.0, 0.9], [1.0, SHUT]])
    found = sinkhorn(scores, n_iter=3)
    with pytest.raises(ValueError, match=r"strict: expected False where forbidden pairs \(-inf\)"):
        found.labels(strict=True)


@pytest.mark.parametrize("form", ["scores", "features"])
@pytest.mark.parametrize("rule", [{}, {"tol": 1e-6, "max_iter": 3000}], ids=["fixed", "tol"])
def test_what_takes_no_part_may_hold_anything(form, rule):
    z, c = _draw(0, 9, 3), _draw(1, 5, 3)
    rows, columns = torch.tensor([0, 1, 3, 4, 6, 7, 8]), torch.tensor([0, 2, 4])
    z[2], z[5], c[1], c[3] = math.nan, math.inf, math.nan, -math.inf
    mask = torch.zeros(9, dtype=torch.bool).index_fill(0, rows, True)
    shares = torch.zeros(5, dtype=DOUBLE).index_fill(0, columns, 1 / 3)
    whole, few = ((z, c), (z[rows], c[columns])) if form == "features" else (
        z @ c.T, z[rows] @ c[columns].T)  # fmt: skip
    found = sinkhorn(whole, epsilon=0.7, row_mask=mask, col_marginal=shares, **rule)
    want = sinkhorn(few, epsilon=0.7, **rule)
    assert int(found.status) == 0
    codes = torch.zeros(9, 5, dtype=DOUBLE)
    codes[rows[:, None], columns] = want.codes()
    torch.testing.assert_close(found.codes(), codes, atol=1e-10, rtol=0)
    torch.testing.assert_close(found.plan(), codes / 7, atol=1e-10, rtol=0)
    for strict in (False, True):
        labels = torch.full((9,), -1).index_copy(0, rows, columns[want.labels(strict)])
        assert torch.equal(found.labels(strict), labels)
    counts = torch.zeros(5, dtype=torch.int64).index_copy(0, columns, want.counts())
    assert torch.equal(found.counts(), counts)
    for name in ("entropy", "value"):
        torch.testing.assert_close(getattr(found, name)(), getattr(want, name)())
    values, indices = found.topk(2)
    torch.testing.assert_close(values[rows], want.topk(2)[0], atol=1e-10, rtol=0)
    assert torch.equal(indices[rows], columns[want.topk(2)[1]])


@pytest.mark.parametrize("form", ["scores", "features"])
@pytest.mark.parametrize("gradient", ["unrolled", "implicit", "envelope"])
def test_gradients_see_nothing_of_what_takes_no_part(form, gradient):
    z, c = _draw(0, 7, 3), _draw(1, 4, 3)
    mask, shares = torch.arange(7) != 2, torch.tensor([0.5, 0.0, 0.25, 0.25], dtype=DOUBLE)
    rule = {"n_iter": 3} if gradient == "unrolled" else {"tol": 1e-12, "max_iter": 3000}

    def gradients(z: Tensor, c: Tensor, mask: Tensor | None, shares: Tensor) -> list[Tensor]:
        leaves = [z.clone().requires_grad_(), c.clone().requires_grad_(),
            torch.tensor(0.7, dtype=DOUBLE, requires_grad=True)]  # fmt: skip
        scores = (leaves[0], leaves[1])
        if form == "scores":
            stored = (leaves[0].detach() @ leaves[1].detach().T).requires_grad_()
            scores, leaves = stored, [stored, leaves[2]]
        found = sinkhorn(scores, epsilon=leaves[-1], row_mask=mask, col_marginal=shares,
            gradient=gradient, **rule)  # fmt: skip
        if gradient == "envelope":
            loss = found.value()
        else:
            live = shares > 0
            codes = found.codes() if mask is None else found.codes()[mask]
            loss = codes[:, live].square().sum() + found.g[live].square().sum()
        return list(torch.autograd.grad(loss, leaves))

    rows, columns = mask.nonzero()[:, 0], (shares > 0).nonzero()[:, 0]
    want = gradients(z[rows], c[columns], None, shares[columns])
    z[2], c[1] = math.nan, math.inf
    found = gradients(z, c, mask, shares)
    at = [(rows[:, None], columns)] if form == "scores" else [(rows,), (columns,)]
    for ours, theirs, place in zip(found, want, [*at, ()], strict=True):
        torch.testing.assert_close(ours[place], theirs, atol=1e-9, rtol=1e-8)
        rest = ours.clone()
        if place:
            rest[place] = 0
            assert not rest.any()


@pytest.mark.parametrize("gradient", ["unrolled", "implicit", "envelope"])
def test_a_forbidden_pair_gives_epsilon_no_infinite_gradient(gradient):
    scores = _draw(0, 6, 3)
    scores[1, 1] = SHUT
    rule = {"n_iter": 4} if gradient == "unrolled" else {"tol": 1e-12, "max_iter": 3000}

    def loss(epsilon: Tensor, scores: Tensor) -> Tensor:
        found = sinkhorn(scores, epsilon=epsilon, gradient=gradient, **rule)
        return found.value() if gradient == "envelope" else found.codes().square().sum()

    epsilon = torch.tensor(0.6, dtype=DOUBLE, requires_grad=True)
    (found,) = torch.autograd.grad(loss(epsilon, scores), epsilon)
    far = scores.masked_fill(scores == SHUT, -400.0)  # of no weight, and finite
    (want,) = torch.autograd.grad(loss(epsilon, far), epsilon)
    torch.testing.assert_close(found, want, atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("epsilon", [0.05, 0.01])
def test_error_is_that_of_the_codes_handed_out(dtype, epsilon):
    normal = torch.nn.functional.normalize
    z, c = normal(_draw(0, 500, 16), dim=1).to(dtype), normal(_draw(1, 20, 16), dim=1).to(dtype)
    found = sinkhorn((z, c), epsilon=epsilon, n_iter=3)
    codes = found.codes().double()
    error = (codes.mean(0) - 1 / 20).abs().sum()
    assert float(found.err) == pytest.approx(float(error), abs=2e-6 / epsilon * 0.05)
    rows = found.plan().double().sum(1)
    torch.testing.assert_close(rows, torch.full_like(rows, 1 / 500), atol=0, rtol=1e-4)


def test_float16_prototypes_over_a_small_epsilon():
    z, c = _draw(0, 50, 16).half(), (70 * _draw(1, 6, 16)).half()
    found = sinkhorn((z, c), epsilon=1e-3)
    want = sinkhorn(z.double() @ c.double().T, epsilon=1e-3)
    assert int(found.status) == 0
    assert torch.equal(found.labels(), want.labels())


@pytest.mark.parametrize("batch", [(), (2,), (0,)])
@pytest.mark.parametrize("rule", [{}, {"tol": 1e-3}, {"tol": 1e-3, "accelerate": "anderson"}])
def test_no_rows(batch, rule):
    found = sinkhorn(torch.zeros(*batch, 0, 3), **rule)
    assert found.codes().shape == found.plan().shape == (*batch, 0, 3)
    assert found.labels().shape == found.labels(strict=True).shape == (*batch, 0)
    assert found.counts().shape == (*batch, 3)
    assert not found.counts().any()
    assert found.topk(2)[1].shape == (*batch, 0, 2)
    assert found.n_iter == (0 if rule else 3)
    assert not found.err.any()
    assert bool((found.status == 4).all())


def test_what_failed_is_said():
    scores = _draw(0, 6, 3)
    scores[1, 1] = math.nan
    with pytest.raises(ValueError, match=r"log_probabilities: .* got NaN at row 1, column 1"):
        sela_labels(scores)
    with pytest.warns(ConvergenceWarning, match="1 of 1 problems have NaN"):
        sinkhorn(scores, tol=1e-3)
    scores = _draw(0, 6, 3)
    scores[:, 2] = SHUT
    for rule in ({"tol": 1e-3}, {"tol": 1e-3, "prototype_first": False}, {"n_iter": 3}):
        found = sinkhorn(scores, warn=False, **rule)
        assert int(found.status) == 3
        for x in (found.f, found.g, found.err, found.codes(), found.value()):
            assert bool(x.isnan().all())
        assert found.labels().tolist() == [-1] * 6
        assert found.labels(strict=True).tolist() == [-1] * 6
    with pytest.warns(ConvergenceWarning, match="have a row or prototype with mass whose scores"):
        sinkhorn(scores, tol=1e-3)


def test_a_start_that_left_out_a_prototype():
    scores = _draw(0, 40, 3)
    without = torch.tensor([0.5, 0.5, 0.0], dtype=DOUBLE)
    first = sinkhorn(scores, epsilon=0.5, tol=1e-6, col_marginal=without)
    found = sinkhorn(scores, epsilon=0.5, tol=1e-8, init=first)
    want = sinkhorn(scores, epsilon=0.5, tol=1e-8)
    assert int(found.status) == 0
    torch.testing.assert_close(found.codes(), want.codes(), atol=1e-7, rtol=0)


def test_masses_under_a_mask_are_scaled_to_one():
    scores, mask = _draw(0, 8, 3), torch.arange(8) < 5
    mass = _draw(1, 8).softmax(0)
    found = sinkhorn(scores, row_marginal=mass, row_mask=mask, tol=1e-8, max_iter=3000)
    left = mass[:5] / mass[:5].sum()
    want = sinkhorn(scores[:5], row_marginal=left, tol=1e-8, max_iter=3000)
    torch.testing.assert_close(found.plan()[:5], want.plan(), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"row_marginal": torch.ones(6)}, ValueError, "row_marginal: expected masses of total 1,"),
        ({"col_marginal": torch.ones(3) / 2}, ValueError, "col_marginal: expected masses of total"),
        (
            {"col_marginal": torch.ones(3, dtype=torch.int64)},
            TypeError,
            "col_marginal: expected dt",
        ),
        (
            {"row_marginal": torch.ones(5) / 5},
            ValueError,
            r"row_marginal: expected shape \[..., 6\]",
        ),
        ({"bias": torch.zeros(4)}, ValueError, r"bias: expected shape \[..., 3\], got \[4\]"),
        ({"bias": torch.zeros(6, 1)}, ValueError, r"bias: expected shape \[..., 3\], got \[6, 1\]"),
        ({"bias": 1.0}, TypeError, "bias: expected a Tensor, got float"),
        (
            {"scores": torch.zeros(6, 3, dtype=torch.int64)},
            TypeError,
            "scores: expected dtype float",
        ),
        ({"prototype_first": 0}, TypeError, "prototype_first: expected a bool, got int"),
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", [{}, {"tol": 1e-3}], ids=["fixed", "tol"])
def test_refusals(wrong, error, text, rule):
    call = {"scores": _draw(0, 6, 3), **wrong, **rule}
    with pytest.raises(error, match=text):
        sinkhorn(call.pop("scores"), **call)


def test_refusals_of_a_result():
    found = sinkhorn(_draw(0, 6, 3))
    for k in (0, 4):
        with pytest.raises(ValueError, match="k: expected an int from 1 to 3, got"):
            found.topk(k)
    for k in (1.0, True):
        with pytest.raises(TypeError, match="k: expected an int >= 1, got"):
            found.topk(k)
    with pytest.raises(ValueError, match=r"scores: expected shape \[..., M, 3\]"):
        found.assign(_draw(0, 6, 4))


def test_a_float64_bias_leaves_float32_as_it_is():
    scores, bias = _draw(0, 6, 3).float(), _draw(1, 3)
    for rule, form in itertools.product(({}, {"tol": 1e-3}), (scores, (scores, torch.eye(3)))):
        found = sinkhorn(form, bias=bias, **rule)
        assert {x.dtype for x in (found.f, found.g, found.err, found.codes())} == {torch.float32}
