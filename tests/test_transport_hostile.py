# SPDX-License-Identifier: Apache-2.0
"""`sinkhorn` on input that is masked, forbidden, half precision, empty or wrong."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from clam_kernels import sela_labels, sinkhorn, swav_codes

SHUT = -math.inf
DOUBLE = torch.float64


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def _cost(scores: Tensor, labels: Tensor) -> float:
    return float(scores[torch.arange(len(labels)), labels].sum())


@pytest.mark.parametrize("n_iter", [0, 3, 200])
def test_strict_labels_with_forbidden_pairs(n_iter):
    """Rows move in chains if none may move directly; the shares are exact whenever that is
    possible.
    """
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
    result = sinkhorn(scores, n_iter=3)
    with pytest.raises(ValueError, match=r"strict: expected False where forbidden pairs \(-inf\)"):
        result.labels(strict=True)


@pytest.mark.parametrize("form", ["scores", "features"])
@pytest.mark.parametrize("rule", [{}, {"tol": 1e-6, "max_iter": 3000}], ids=["fixed", "tol"])
def test_masked_entries_may_have_any_values(form, rule):
    z, c = _draw(0, 9, 3), _draw(1, 5, 3)
    rows, columns = torch.tensor([0, 1, 3, 4, 6, 7, 8]), torch.tensor([0, 2, 4])
    z[2], z[5], c[1], c[3] = math.nan, math.inf, math.nan, -math.inf
    mask = torch.zeros(9, dtype=torch.bool).index_fill(0, rows, True)
    shares = torch.zeros(5, dtype=DOUBLE).index_fill(0, columns, 1 / 3)
    whole, few = ((z, c), (z[rows], c[columns])) if form == "features" else (
        z @ c.T, z[rows] @ c[columns].T)  # fmt: skip
    result = sinkhorn(whole, epsilon=0.7, row_mask=mask, col_marginal=shares, **rule)
    expected = sinkhorn(few, epsilon=0.7, **rule)
    assert int(result.status) == 0
    codes = torch.zeros(9, 5, dtype=DOUBLE)
    codes[rows[:, None], columns] = expected.codes()
    torch.testing.assert_close(result.codes(), codes, atol=1e-10, rtol=0)
    torch.testing.assert_close(result.plan(), codes / 7, atol=1e-10, rtol=0)
    for strict in (False, True):
        labels = torch.full((9,), -1).index_copy(0, rows, columns[expected.labels(strict)])
        assert torch.equal(result.labels(strict), labels)
    counts = torch.zeros(5, dtype=torch.int64).index_copy(0, columns, expected.counts())
    assert torch.equal(result.counts(), counts)
    for name in ("entropy", "value"):
        torch.testing.assert_close(getattr(result, name)(), getattr(expected, name)())
    values, indices = result.topk(2)
    torch.testing.assert_close(values[rows], expected.topk(2)[0], atol=1e-10, rtol=0)
    assert torch.equal(indices[rows], columns[expected.topk(2)[1]])


@pytest.mark.parametrize("form", ["scores", "features"])
@pytest.mark.parametrize("gradient", ["unrolled", "implicit", "envelope"])
def test_gradients_do_not_depend_on_masked_entries(form, gradient):
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
        result = sinkhorn(scores, epsilon=leaves[-1], row_mask=mask, col_marginal=shares,
            gradient=gradient, **rule)  # fmt: skip
        if gradient == "envelope":
            loss = result.value()
        else:
            active = shares > 0
            codes = result.codes() if mask is None else result.codes()[mask]
            loss = codes[:, active].square().sum() + result.g[active].square().sum()
        return list(torch.autograd.grad(loss, leaves))

    rows, columns = mask.nonzero()[:, 0], (shares > 0).nonzero()[:, 0]
    expected = gradients(z[rows], c[columns], None, shares[columns])
    z[2], c[1] = math.nan, math.inf
    actual = gradients(z, c, mask, shares)
    at = [(rows[:, None], columns)] if form == "scores" else [(rows,), (columns,)]
    for ours, theirs, place in zip(actual, expected, [*at, ()], strict=True):
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
        result = sinkhorn(scores, epsilon=epsilon, gradient=gradient, **rule)
        return result.value() if gradient == "envelope" else result.codes().square().sum()

    epsilon = torch.tensor(0.6, dtype=DOUBLE, requires_grad=True)
    (epsilon_gradient,) = torch.autograd.grad(loss(epsilon, scores), epsilon)
    # the pair has no weight, and its score is finite
    far = scores.masked_fill(scores == SHUT, -400.0)
    (expected,) = torch.autograd.grad(loss(epsilon, far), epsilon)
    torch.testing.assert_close(epsilon_gradient, expected, atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("epsilon", [0.05, 0.01])
def test_the_error_is_that_of_the_returned_codes(dtype, epsilon):
    normal = torch.nn.functional.normalize
    z, c = normal(_draw(0, 500, 16), dim=1).to(dtype), normal(_draw(1, 20, 16), dim=1).to(dtype)
    result = sinkhorn((z, c), epsilon=epsilon, n_iter=3)
    codes = result.codes().double()
    error = (codes.mean(0) - 1 / 20).abs().sum()
    assert float(result.err) == pytest.approx(float(error), abs=2e-6 / epsilon * 0.05)
    rows = result.plan().double().sum(1)
    torch.testing.assert_close(rows, torch.full_like(rows, 1 / 500), atol=0, rtol=1e-4)


def test_float16_prototypes_over_a_small_epsilon():
    z, c = _draw(0, 50, 16).half(), (70 * _draw(1, 6, 16)).half()
    result = sinkhorn((z, c), epsilon=1e-3)
    expected = sinkhorn(z.double() @ c.double().T, epsilon=1e-3)
    assert int(result.status) == 0
    assert torch.equal(result.labels(), expected.labels())


@pytest.mark.parametrize("batch", [(), (2,), (0,)])
@pytest.mark.parametrize("rule", [{}, {"tol": 1e-3}, {"tol": 1e-3, "accelerate": "anderson"}])
def test_no_rows(batch, rule):
    result = sinkhorn(torch.zeros(*batch, 0, 3), **rule)
    assert result.codes().shape == result.plan().shape == (*batch, 0, 3)
    assert result.labels().shape == result.labels(strict=True).shape == (*batch, 0)
    assert result.counts().shape == (*batch, 3)
    assert not result.counts().any()
    assert result.topk(2)[1].shape == (*batch, 0, 2)
    assert result.n_iter == (0 if rule else 3)
    assert not result.err.any()
    assert bool((result.status == 4).all())


def test_warnings_name_the_failure():
    scores = _draw(0, 6, 3)
    scores[1, 1] = math.nan
    with pytest.raises(ValueError, match=r"log_probabilities: .* got NaN at row 1, column 1"):
        sela_labels(scores)
    with pytest.warns(ConvergenceWarning, match="1 of 1 problems have NaN"):
        sinkhorn(scores, tol=1e-3)
    scores = _draw(0, 6, 3)
    scores[:, 2] = SHUT
    for rule in ({"tol": 1e-3}, {"tol": 1e-3, "prototype_first": False}, {"n_iter": 3}):
        result = sinkhorn(scores, warn=False, **rule)
        assert int(result.status) == 3
        for x in (result.f, result.g, result.err, result.codes(), result.value()):
            assert bool(x.isnan().all())
        assert result.labels().tolist() == [-1] * 6
        assert result.labels(strict=True).tolist() == [-1] * 6
    with pytest.warns(ConvergenceWarning, match="have a row or prototype with mass whose scores"):
        sinkhorn(scores, tol=1e-3)


def test_a_start_with_a_masked_prototype():
    scores = _draw(0, 40, 3)
    without = torch.tensor([0.5, 0.5, 0.0], dtype=DOUBLE)
    first = sinkhorn(scores, epsilon=0.5, tol=1e-6, col_marginal=without)
    result = sinkhorn(scores, epsilon=0.5, tol=1e-8, init=first)
    expected = sinkhorn(scores, epsilon=0.5, tol=1e-8)
    assert int(result.status) == 0
    torch.testing.assert_close(result.codes(), expected.codes(), atol=1e-7, rtol=0)


def test_masses_under_a_mask_are_scaled_to_one():
    scores, mask = _draw(0, 8, 3), torch.arange(8) < 5
    mass = _draw(1, 8).softmax(0)
    result = sinkhorn(scores, row_marginal=mass, row_mask=mask, tol=1e-8, max_iter=3000)
    active_mass = mass[:5] / mass[:5].sum()
    expected = sinkhorn(scores[:5], row_marginal=active_mass, tol=1e-8, max_iter=3000)
    torch.testing.assert_close(result.plan()[:5], expected.plan(), atol=1e-9, rtol=0)


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
        ({"warn": 1}, TypeError, "warn: expected a bool, got int"),
        (
            {"process_group": 3},
            TypeError,
            "process_group: expected a ProcessGroup or None, got int",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", [{}, {"tol": 1e-3}], ids=["fixed", "tol"])
def test_refusals(wrong, error, text, rule):
    call = {"scores": _draw(0, 6, 3), **wrong, **rule}
    with pytest.raises(error, match=text):
        sinkhorn(call.pop("scores"), **call)


def test_refusals_of_the_presets():
    scores = _draw(0, 6, 3)
    with pytest.raises(TypeError, match="process_group: expected a ProcessGroup or None, got str"):
        swav_codes(scores, process_group="gloo")
    for name in ("strict", "warn"):
        with pytest.raises(TypeError, match=f"{name}: expected a bool, got int"):
            sela_labels(scores, **{name: 1})


def test_refusals_of_a_result():
    result = sinkhorn(_draw(0, 6, 3))
    for method in (result.labels, result.counts):
        with pytest.raises(TypeError, match="strict: expected a bool, got int"):
            method(strict=1)
    for k in (0, 4):
        with pytest.raises(ValueError, match="k: expected an int from 1 to 3, got"):
            result.topk(k)
    for k in (1.0, True):
        with pytest.raises(TypeError, match="k: expected an int >= 1, got"):
            result.topk(k)
    with pytest.raises(ValueError, match=r"scores: expected shape \[..., M, 3\]"):
        result.assign(_draw(0, 6, 4))


def test_a_float64_bias_does_not_change_the_dtype():
    scores, bias = _draw(0, 6, 3).float(), _draw(1, 3)
    for rule, form in itertools.product(({}, {"tol": 1e-3}), (scores, (scores, torch.eye(3)))):
        result = sinkhorn(form, bias=bias, **rule)
        assert {x.dtype for x in (result.f, result.g, result.err, result.codes())} == {
            torch.float32
        }
