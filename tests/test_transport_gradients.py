# SPDX-License-Identifier: Apache-2.0
"""Gradients of `sinkhorn`: through the iterations, at the fixed point, of the value; and POT's."""

from __future__ import annotations

import warnings

import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from clam_kernels import sinkhorn
from clam_kernels.transport import _gradients

DOUBLE = torch.float64
EPSILON = 0.3


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def _leaves(seed: int = 0, n: int = 8, k: int = 4) -> dict[str, Tensor]:
    results = {
        "scores": 0.5 * _draw(seed, n, k),
        "bias": 0.3 * _draw(seed + 1, k),
        "epsilon": torch.tensor(EPSILON, dtype=DOUBLE),
        "row_marginal": _draw(seed + 2, n).softmax(0),
        "col_marginal": _draw(seed + 3, k).softmax(0),
    }
    return {name: x.requires_grad_() for name, x in results.items()}


def _call(leaves: dict[str, Tensor], **rest):
    scores = (leaves["z"], leaves["c"]) if "z" in leaves else leaves["scores"]
    options = {name: x for name, x in leaves.items() if name not in ("scores", "z", "c")}
    return sinkhorn(scores, **{"epsilon": EPSILON, **options, **rest})


def _features(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    z, c = 0.7 * _draw(9, 8, 3), _draw(10, 4, 3)
    results = {"z": z.requires_grad_(), "c": c.requires_grad_(), **leaves}
    del results["scores"]
    return results


def _loop(leaves: dict[str, Tensor], n_iter: int) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, f, g) by plain torch, prototypes first."""
    scores = leaves["z"] @ leaves["c"].T if "z" in leaves else leaves["scores"]
    x = scores / leaves["epsilon"] + leaves["bias"]
    log_a, log_b = leaves["row_marginal"].log(), leaves["col_marginal"].log()
    f = torch.zeros_like(log_a)
    for _ in range(n_iter):
        g = log_b - (x + f[:, None]).logsumexp(0)
        f = log_a - (x + g).logsumexp(1)
    return x, f, g


def _gradients_of(loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    inputs = list(leaves.values())
    gradients = torch.autograd.grad(loss, inputs, retain_graph=True, materialize_grads=True)
    return dict(zip(leaves, gradients, strict=True))


def _same_gradients(result, expected, leaves, atol):
    """Compare gradients; those of marginals up to a constant, because their total is fixed."""
    for name in leaves:
        gap = result[name] - expected[name]
        if name.endswith("marginal"):
            gap = gap - gap.mean()
        assert float(gap.abs().max()) <= atol, name


@pytest.mark.parametrize("form", ["scores", "features"])
@pytest.mark.parametrize("n_iter", [1, 2, 4])
def test_unrolled(form, n_iter):
    leaves = _leaves() if form == "scores" else _features(_leaves())
    result = _call(leaves, n_iter=n_iter, gradient="unrolled")
    x, f, g = _loop(leaves, n_iter)
    weight = _draw(5, 8, 4)
    for ours, theirs in (
        (result.codes(), (x + g).softmax(1)),
        (result.plan(), (x + f[:, None] + g).exp()),
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
        one = _gradients_of((ours * weight).sum(), leaves)
        two = _gradients_of((theirs * weight).sum(), leaves)
        for name in leaves:
            torch.testing.assert_close(one[name], two[name], atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("form", ["scores", "features"])
@pytest.mark.parametrize("accelerate", [None, "anderson"])
@pytest.mark.parametrize("part", ["codes", "plan", "f+g"])
def test_implicit_is_autograd_through_very_many_iterations(form, accelerate, part):
    leaves = _leaves() if form == "scores" else _features(_leaves())
    result = _call(
        leaves, tol=1e-13, max_iter=5000, gradient="implicit", accelerate=accelerate, warn=False
    )
    x, f, g = _loop(leaves, 600)
    weight = _draw(5, 8, 4)
    ours, theirs = {
        "codes": (result.codes(), (x + g).softmax(1)),
        "plan": (result.plan(), (x + f[:, None] + g).exp()),
        "f+g": (result.f[:, None] + result.g, f[:, None] + g),
    }[part]
    torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)
    one = _gradients_of((ours * weight).sum(), leaves)
    two = _gradients_of((theirs * weight).sum(), leaves)
    _same_gradients(one, two, leaves, 1e-9)


def test_implicit_of_a_batch_is_that_of_each_problem():
    scores = (0.5 * _draw(0, 3, 8, 4)).requires_grad_()
    weight = _draw(1, 3, 8, 4)
    rule = {"epsilon": EPSILON, "tol": 1e-12, "gradient": "implicit", "max_iter": 5000}
    together = sinkhorn(scores, **rule).codes()
    (gradient,) = torch.autograd.grad((together * weight).sum(), scores)
    for i in range(3):
        alone = sinkhorn(scores[i], **rule).codes()
        (expected,) = torch.autograd.grad((alone * weight[i]).sum(), scores)
        torch.testing.assert_close(gradient[i], expected[i], atol=1e-11, rtol=0)


def test_implicit_gradients_of_masked_entries_are_zero():
    leaves = _leaves()
    with torch.no_grad():
        leaves["row_marginal"][2] = 0
        leaves["row_marginal"] /= leaves["row_marginal"].sum()
        leaves["col_marginal"][1] = 0
        leaves["col_marginal"] /= leaves["col_marginal"].sum()
        leaves["scores"][2] = torch.nan
    result = _call(leaves, tol=1e-13, max_iter=5000, gradient="implicit", warn=False)
    loss = (result.plan(slice(3, 8)) * _draw(5, 5, 4)).sum()
    gradients = _gradients_of(loss, leaves)
    assert not gradients["scores"][2].any()
    assert not gradients["scores"][:, 1].any()
    assert all(bool(x.isfinite().all()) for x in gradients.values())
    few = {
        name: x.detach()[..., [0, 2, 3]].requires_grad_() if name in ("bias", "col_marginal") else x
        for name, x in leaves.items()
    }
    few["scores"] = leaves["scores"].detach()[[0, 1, 3, 4, 5, 6, 7]][:, [0, 2, 3]].requires_grad_()
    few["row_marginal"] = leaves["row_marginal"].detach()[[0, 1, 3, 4, 5, 6, 7]].requires_grad_()
    alone = _call(few, tol=1e-13, max_iter=5000, gradient="implicit", warn=False)
    loss = (alone.plan(slice(2, 7)) * _draw(5, 5, 4)[:, [0, 2, 3]]).sum()
    expected = _gradients_of(loss, few)["scores"]
    torch.testing.assert_close(
        gradients["scores"][3:][:, [0, 2, 3]], expected[2:], atol=1e-9, rtol=0
    )


def test_the_implicit_solve_reports_its_residual(monkeypatch):
    monkeypatch.setattr(_gradients, "MAX_SOLVE_STEPS", 1)
    leaves = _leaves()
    codes = _call(leaves, tol=1e-10, max_iter=5000, gradient="implicit").codes()
    words = "equations of gradient='implicit' have a residual of"
    with pytest.warns(ConvergenceWarning, match=words) as caught:
        _gradients_of((codes * _draw(5, 8, 4)).sum(), leaves)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("form", ["scores", "features"])
def test_envelope(form):
    leaves = _leaves() if form == "scores" else _features(_leaves())
    result = _call(leaves, tol=1e-13, max_iter=5000, gradient="envelope", warn=False)
    assert not result.codes().requires_grad
    assert not result.plan().requires_grad
    x, f, g = _loop(leaves, 600)
    plan = (x + f[:, None] + g).exp()
    a, b = leaves["row_marginal"], leaves["col_marginal"]
    divergence = (plan * (plan / (a[:, None] * b)).log()).sum()
    scores = leaves["epsilon"] * x
    expected = -(plan * scores).sum() + leaves["epsilon"] * divergence
    value = result.value()
    assert float(value.detach()) == pytest.approx(float(expected.detach()), abs=1e-11)
    one, two = _gradients_of(value, leaves), _gradients_of(expected, leaves)
    _same_gradients(one, two, leaves, 1e-9)
    if form == "scores":
        torch.testing.assert_close(one["scores"], -plan, atol=1e-9, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parity_with_pot(dtype):
    ot = pytest.importorskip("ot")
    scores = _draw(0, 60, 12).to(dtype)
    a, b = _draw(1, 60).softmax(0), _draw(2, 12).softmax(0)
    for row, col in ((None, None), (a, b)):
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            result = sinkhorn(
                scores, epsilon=0.2, tol=1e-9 if dtype == DOUBLE else 2e-6, max_iter=5000,
                row_marginal=row, col_marginal=col, accelerate="anderson",
            )  # fmt: skip
        even = [torch.full((size,), 1 / size, dtype=DOUBLE) for size in (60, 12)]
        masses = even if row is None else [row, col]
        plan = ot.bregman.sinkhorn_log(
            *(m.numpy() for m in masses), -scores.double().numpy(), 0.2,
            numItermax=20_000, stopThr=1e-13,
        )  # fmt: skip
        bound = 1e-10 if dtype == DOUBLE else 1e-6
        gap = result.plan().double() - torch.from_numpy(plan)
        assert float(gap.abs().max()) <= bound
        value = -float((torch.from_numpy(plan) * scores).sum())
        assert -float((result.plan() * scores).sum()) == pytest.approx(value, abs=1e-5)
