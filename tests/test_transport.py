# SPDX-License-Identifier: Apache-2.0
"""`sinkhorn` and its presets: codes, labels, values, tolerance, refusals."""

from __future__ import annotations

import doctest
import warnings

import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

import clam_kernels
from clam_kernels import sela_labels, sinkhorn, swav_codes, testing, transport
from clam_kernels.transport import _problem, _sinkhorn


def _scores(seed: int = 0, n: int = 120, k: int = 9, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, k, generator=generator, dtype=torch.float64).mul(2).sub(1).to(dtype)


def _features(seed: int = 0, n: int = 60, k: int = 7, d: int = 5):
    generator = torch.Generator().manual_seed(seed)
    z, c = (torch.randn(size, d, generator=generator, dtype=torch.float64) for size in (n, k))
    return tuple(torch.nn.functional.normalize(t, dim=1) for t in (z, c))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n_iter", [1, 3, 7])
def test_codes_are_those_of_the_linear_loop(dtype, n_iter):
    """SwAV's loop: exp, then divide by the shares of the prototypes and of the rows in turn."""
    scores = _scores(dtype=dtype)
    q = (scores.double() / 0.05).exp()
    q /= q.sum()
    for _ in range(n_iter):
        q /= q.sum(0, keepdim=True) * q.shape[1]
        q /= q.sum(1, keepdim=True) * q.shape[0]
    expected = q * len(q)
    result = swav_codes(scores, n_iter=n_iter)
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(result.double(), expected, atol=bound, rtol=0)


def test_features_and_scores_agree():
    z, c = _features()
    by_features, by_scores = sinkhorn((z, c)), sinkhorn(z @ c.T)
    torch.testing.assert_close(by_features.codes(), by_scores.codes(), atol=1e-12, rtol=0)
    assert torch.equal(by_features.labels(), by_scores.codes().argmax(1))
    bias = torch.linspace(-1, 1, 7, dtype=torch.float64)
    one, two = sinkhorn((z, c), bias=bias), sinkhorn(z @ c.T + 0.05 * bias)
    torch.testing.assert_close(one.codes(), two.codes(), atol=1e-12, rtol=0)


def test_outputs_of_a_result_are_consistent():
    scores = _scores()
    result = sinkhorn(scores, tol=1e-10, max_iter=5000)
    codes, plan = result.codes(), result.plan()
    assert bool(result.converged)
    torch.testing.assert_close(plan.sum(1), torch.full((120,), 1 / 120, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(0), torch.full((9,), 1 / 9, dtype=torch.float64))
    torch.testing.assert_close(codes, plan * 120)
    assert torch.equal(result.counts(), torch.bincount(result.labels(), minlength=9))
    values, indices = result.topk(2)
    torch.testing.assert_close(values, codes.topk(2, 1).values)
    assert torch.equal(indices[:, 0], result.labels())
    divergence = (plan * (plan * 120 * 9).log()).sum()
    value = -(plan * scores).sum() + 0.05 * divergence
    assert float(result.value()) == pytest.approx(float(value), abs=1e-9)
    entropy = -(codes * codes.log()).sum(1).mean()
    assert float(result.entropy()) == pytest.approx(float(entropy), abs=1e-9)
    rows = slice(5, 12)
    assert torch.equal(result.codes(rows), codes[rows])
    torch.testing.assert_close(result.assign(scores[rows]), codes[rows])


def test_any_tile_gives_the_same(monkeypatch):
    result = sinkhorn(_scores())
    expected = result.labels(), result.value(), result.topk(3)[1]
    monkeypatch.setattr(_problem, "TILE_ENTRIES", 50)
    assert torch.equal(result.labels(), expected[0])
    torch.testing.assert_close(result.value(), expected[1])
    assert torch.equal(result.topk(3)[1], expected[2])


@pytest.mark.parametrize(("n", "k"), [(300, 10), (305, 10), (60, 60), (7, 3), (5, 9)])
def test_strict_labels_fill_every_share(n, k):
    result = sinkhorn(_scores(1, n, k), epsilon=0.04, tol=1e-3, warn=False, max_iter=400)
    labels = result.labels(strict=True)
    counts = torch.bincount(labels, minlength=k)
    assert torch.equal(result.counts(strict=True), counts)
    assert counts.max() <= -(-n // k)
    assert counts.min() >= n // k
    extra = counts - n // k
    assert extra[: n % k].all()  # the first prototypes have one more
    moved = (labels != result.labels()).double().mean()
    assert moved < 0.1 or n < 10 * k


def test_strict_labels_are_near_the_exact_assignment():
    from scipy.optimize import linear_sum_assignment

    scores = _scores(2, 90, 9)
    result = sinkhorn(scores, epsilon=0.04, tol=1e-4, max_iter=2000)
    labels = result.labels(strict=True)
    seats = scores.repeat_interleave(10, 1).numpy()
    best = seats[linear_sum_assignment(-seats)].sum()
    ours = float(scores[torch.arange(90), labels].sum())
    assert ours >= 0.995 * best


def test_masks_and_marginals():
    scores = _scores()
    mask = torch.arange(120) < 70
    hostile = scores.clone()
    hostile[70:] = torch.nan
    result, few = sinkhorn(hostile, row_mask=mask), sinkhorn(scores[:70])
    torch.testing.assert_close(result.codes()[:70], few.codes(), atol=1e-12, rtol=0)
    assert not result.codes()[70:].any()
    assert bool((result.labels()[70:] == -1).all())
    shares = torch.arange(1.0, 10.0, dtype=torch.float64)
    result = sinkhorn(scores, col_marginal=shares / shares.sum(), tol=1e-6, max_iter=5000)
    torch.testing.assert_close(result.plan().sum(0), shares / 45, atol=1e-6, rtol=0)
    counts = torch.bincount(result.labels(strict=True), minlength=9)
    assert int((counts - (shares * 120 / 45).round()).abs().max()) <= 1


def test_tolerance_is_that_of_plain_iterations():
    scores = _scores()
    result = sinkhorn(scores, tol=1e-5)
    assert float(result.err) <= 1e-5
    plain = sinkhorn(scores, n_iter=result.n_iter)
    torch.testing.assert_close(result.codes(), plain.codes(), atol=1e-12, rtol=0)
    assert float(sinkhorn(scores, n_iter=result.n_iter - 1).err) > 1e-5
    restarted = sinkhorn(scores, tol=1e-5, init=result)
    assert restarted.n_iter == 0
    # each problem of a batch stops on its own
    both = sinkhorn(torch.stack([scores, 4 * scores]), tol=1e-3, max_iter=3000)
    alone = sinkhorn(scores, tol=1e-3, max_iter=3000)
    assert torch.equal(both.g[0], alone.g)
    assert both.status.tolist() == [0, 0]


def test_rows_first_to_a_tolerance():
    scores = _scores()
    result = sinkhorn(scores, tol=1e-5, prototype_first=False)
    plain = sinkhorn(scores, n_iter=result.n_iter, prototype_first=False)
    torch.testing.assert_close(result.plan(), plain.plan(), atol=1e-14, rtol=0)
    assert float(result.err) <= 1e-5
    torch.testing.assert_close(result.err, plain.err, atol=1e-14, rtol=0)
    before = sinkhorn(scores, n_iter=result.n_iter - 1, prototype_first=False)
    assert float(before.err) > 1e-5
    both = sinkhorn(torch.stack([4 * scores, scores]), tol=1e-5, prototype_first=False,
        max_iter=3000)  # fmt: skip
    torch.testing.assert_close(both.plan()[1], result.plan(), atol=1e-15, rtol=0)


def _self_labelling(sd: float, dtype: torch.dtype, k: int = 50) -> torch.Tensor:
    logits = torch.randn(2000, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (sd * logits).log_softmax(1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sd", [1.0, 2.0, 6.0])
def test_acceleration(sd, dtype):
    scores = _self_labelling(sd, dtype)
    rule = {"epsilon": 1 / 25, "tol": 1e-4, "max_iter": 5000}
    plain, fast = sinkhorn(scores, **rule), sinkhorn(scores, accelerate="anderson", **rule)
    assert plain.n_iter >= 5 * fast.n_iter
    assert float(fast.err) <= 1e-4
    columns = fast.plan().double().sum(0)
    assert float((columns - 1 / 50).abs().sum()) <= 1.01e-4
    assert float((fast.labels() != plain.labels()).double().mean()) <= 1e-3


def test_acceleration_of_a_batch_is_that_of_each():
    scores = torch.stack([_self_labelling(sd, torch.float64, 20) for sd in (1.0, 3.0, 2.0)])
    scores[2, 5, 7] = torch.nan
    rule = {"epsilon": 1 / 25, "tol": 1e-6, "max_iter": 500, "accelerate": "anderson"}
    with pytest.warns(ConvergenceWarning, match=r"1 of 3 problems have NaN or \+inf"):
        both = sinkhorn(scores, **rule)
    assert both.status.tolist() == [0, 0, 2]
    alone = [sinkhorn(scores[i], **rule) for i in range(2)]
    for i in range(2):
        # the Gram matrix of the last steps is nearly singular: rounding shows at 1e-10
        torch.testing.assert_close(both.g[i], alone[i].g, atol=1e-8, rtol=0)
    assert both.n_iter == max(x.n_iter for x in alone)


@pytest.mark.parametrize("k", [10, 300])
def test_float32_reaches_a_millionth(k):
    """Sums over many rows do not limit the tolerance."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.multinomial(torch.arange(1.0, k + 1), 60_000, True, generator=generator)
    scores = 0.3 * torch.randn(60_000, k, generator=generator)
    scores[torch.arange(60_000), rows] += 0.7
    result = sinkhorn(scores, epsilon=0.1, tol=1e-6, accelerate="anderson", max_iter=100)
    assert bool(result.converged)
    exact = sinkhorn(scores.double(), epsilon=0.1, tol=1e-6, accelerate="anderson", max_iter=100)
    assert result.n_iter <= exact.n_iter + 5


def test_acceleration_where_it_is_hard():
    """A prototype far below the others, a row with a prototype for itself, clusters of very unequal
    size.
    """
    scores = _self_labelling(2.0, torch.float32, 20)
    scores[:, 3] -= 12
    scores[0, 4:] -= 40
    scores[400:, 0] += 3
    result = sinkhorn(scores, epsilon=1 / 25, tol=1e-3, accelerate="anderson", max_iter=300)
    assert bool(result.converged)
    exact = sinkhorn(scores.double(), epsilon=1 / 25, tol=1e-3, max_iter=20_000)
    assert bool(exact.converged)
    assert float((result.labels() != exact.labels()).double().mean()) <= 2e-3


def test_strict_labels_of_a_batch():
    scores = torch.stack([_scores(i, 40, 4) for i in range(6)]).reshape(2, 3, 40, 4)
    shares = torch.tensor([[0.25] * 4, [0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    result = sinkhorn(scores, col_marginal=shares, tol=1e-3, max_iter=3000)
    labels = result.labels(strict=True)
    for i in range(2):
        for j in range(3):
            counts = torch.bincount(labels[i, j], minlength=4)
            assert counts.tolist() == [round(40 * float(x)) for x in shares[j]]
            alone = sinkhorn(scores[i, j], col_marginal=shares[j], tol=1e-3, max_iter=3000)
            assert torch.equal(labels[i, j], alone.labels(strict=True))


def test_starts_from_an_earlier_result():
    scores = _self_labelling(2.0, torch.float64, 20)
    rule = {"epsilon": 1 / 25, "tol": 1e-4, "max_iter": 5000}
    first = sinkhorn(scores, **rule)
    moved = (scores + 0.01 * _scores(3, 2000, 20)).log_softmax(1)
    fresh, restarted = sinkhorn(moved, **rule), sinkhorn(moved, init=first, **rule)
    assert restarted.n_iter < 0.7 * fresh.n_iter
    fast = sinkhorn(moved, init=first, accelerate="anderson", **rule)
    assert fast.n_iter <= sinkhorn(moved, accelerate="anderson", **rule).n_iter


def test_a_run_that_did_not_converge_warns_once():
    with pytest.warns(ConvergenceWarning, match=r"max_iter=16 iterations, tol=1e-09") as caught:
        result = sinkhorn(_scores(), tol=1e-9, max_iter=16)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert int(result.status) == transport.NOT_CONVERGED
    assert bool((result.labels() >= 0).all())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sinkhorn(_scores(), tol=1e-9, max_iter=16, warn=False)
        sinkhorn(_scores())


def test_warnings_of_labels_name_the_line_of_the_caller():
    scores = _scores()
    with pytest.warns(ConvergenceWarning, match="max_iter=2 iterations, tol=1e-09") as caught:
        sela_labels(scores.log_softmax(1), tol=1e-9, max_iter=2)
    assert [x.filename for x in caught] == [__file__]
    scores[0, 0] = torch.nan
    with pytest.warns(ConvergenceWarning, match="1 of 1 problems have NaN") as caught:
        sinkhorn(scores, tol=1e-9)
    assert [x.filename for x in caught] == [__file__]


def test_labels_that_raise_do_not_warn():
    scores = _scores()
    scores[0, 0] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"log_probabilities: .* got NaN at row 0, col"):
            sela_labels(scores)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x: sinkhorn(x[:, :0]), "scores: expected K >= 1, got [6, 0]"),
        (lambda x: sinkhorn(x, init=x[0, :2]), "init: expected shape [..., 3], got [2]"),
        (
            lambda x: sinkhorn(x.expand(2, 6, 3), bias=x),
            "bias: expected leading dims that broadcast to match scores [2, 6, 3], got [6, 3]",
        ),
        (
            lambda x: sinkhorn(x.expand(2, 6, 3), row_mask=x.T[:3] > 9),
            "row_mask: expected leading dims that broadcast to match scores [2, 6, 3], got [3, 6]",
        ),
        (lambda x: sela_labels(x[:, :0]), "log_probabilities: expected K >= 1, got [6, 0]"),
        (lambda x: sela_labels(x[0]), "log_probabilities: expected shape [N, K], got [3]"),
        (lambda x: sela_labels((x, x)), "log_probabilities: expected a Tensor, got tuple"),
    ],
)
def test_errors_name_arguments_of_the_caller(call, text):
    with pytest.raises((TypeError, ValueError)) as caught:
        call(torch.zeros(6, 3))
    assert str(caught.value) == text


def test_gradients():
    z, c = (t.requires_grad_() for t in _features(3, 8, 3, 2))
    epsilon = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def codes(z, c, epsilon):
        return sinkhorn((z, c), epsilon=epsilon, gradient="unrolled").codes()

    assert torch.autograd.gradcheck(codes, (z, c, epsilon))
    assert not sinkhorn((z, c), epsilon=epsilon).codes().requires_grad
    assert not swav_codes(z @ c.T).requires_grad
    with torch.no_grad():
        assert not codes(z, c, epsilon).requires_grad


def test_self_labels():
    logits = torch.randn(400, 10, generator=torch.Generator().manual_seed(0))
    logits[:, 7] -= 6
    log_p = logits.log_softmax(1)
    counts = torch.bincount(sela_labels(log_p), minlength=10)
    assert int((counts - 40).abs().max()) <= 3
    assert torch.bincount(sela_labels(log_p, strict=True)).tolist() == [40] * 10


@pytest.mark.parametrize("form", ["scores", "features", "masked", "unrolled"])
def test_in_a_compiled_step(form):
    z, c = (x.float() for x in _features())
    mask = torch.arange(len(z)) < 50

    def codes(z: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        if form == "features":
            return swav_codes((z, c))
        if form == "unrolled":
            return sinkhorn(z @ c.T, gradient="unrolled").codes()
        return swav_codes(z @ c.T, row_mask=mask if form == "masked" else None)

    compiled = torch.compile(codes, fullgraph=True, backend="aot_eager")
    z.requires_grad_(form == "unrolled")
    torch.testing.assert_close(compiled(z, c), codes(z, c), atol=1e-6, rtol=0)


def test_a_number_of_iterations_that_changes_does_not_recompile():
    scores = _scores(dtype=torch.float32)
    compiled = torch.compile(
        lambda x, n: sinkhorn(x, n_iter=n).codes(),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for n in (3, 4, 5):
        torch.testing.assert_close(compiled(scores, n), sinkhorn(scores, n_iter=n).codes())


def test_failed_problems_give_no_label():
    scores = torch.stack([_scores(), _scores(1)])
    scores[1, 3, 3] = torch.nan
    result = sinkhorn(scores)
    assert result.status.tolist() == [0, 2]
    assert bool((result.labels()[1] == -1).all())
    assert bool((result.labels()[0] >= 0).all())
    assert bool(result.codes()[1].isnan().all())
    assert not result.counts()[1].any()


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"epsilon": 0.0}, ValueError, "epsilon: expected a finite number > 0, got 0.0"),
        ({"epsilon": -1}, ValueError, "epsilon: expected a finite number > 0, got -1"),
        ({"tol": 0.0}, ValueError, "tol: expected a finite number > 0, got 0.0"),
        ({"n_iter": -1}, ValueError, "n_iter: expected an int >= 0, got -1"),
        (
            {"n_iter": 5, "tol": 1e-3},
            ValueError,
            r"n_iter: expected None with tol \(max_iter limits the iterations\), got 5",
        ),
        ({"gradient": "all"}, ValueError, "gradient: expected 'stop', 'unrolled', 'implicit' or"),
        (
            {"gradient": "unrolled", "tol": 1e-3},
            ValueError,
            "gradient: expected 'stop', 'implicit' or 'envelope' with tol",
        ),
        ({"row_mask": torch.ones(120)}, TypeError, "row_mask: expected dtype bool, got float32"),
        ({"row_mask": torch.ones(9) > 0}, ValueError, r"row_mask: expected shape \[..., 120\]"),
        ({"col_marginal": -torch.ones(9)}, ValueError, "col_marginal: expected finite values >= 0"),
        ({"scores": [[1.0]]}, TypeError, "scores: expected a Tensor or a tuple of two"),
        (
            {"scores": torch.zeros(3)},
            ValueError,
            r"scores: expected shape \[..., N, K\], got \[3\]",
        ),
    ],
    ids=str,
)
def test_refusals(wrong, error, text):
    call = {"scores": _scores(), **wrong}
    with pytest.raises(error, match=text):
        sinkhorn(call.pop("scores"), **call)


@pytest.mark.parametrize("stored", [False, True])
def test_labels_take_no_array_of_all_entries(stored):
    n, k = (50_000, 500) if stored else (200_000, 1000)
    z = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    c = torch.randn(k, 4, generator=torch.Generator().manual_seed(1))
    scores = z @ c.T if stored else (z, c)
    peak = testing.peak_bytes(lambda: sinkhorn(scores, epsilon=1.0, n_iter=1).labels())
    assert peak < 32e6  # the scores are 100 and 800 MB


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 2, 65_536, 131_072])
def test_any_number_of_prototypes(k, dtype):
    generator = torch.Generator().manual_seed(0)
    scores = (2 * torch.rand(6, k, generator=generator, dtype=torch.float64) - 1).to(dtype)
    result = sinkhorn(scores)
    q = (scores.double() / 0.05 - 20).exp()
    for _ in range(3):
        q /= q.sum(0, keepdim=True) * k
        q /= q.sum(1, keepdim=True) * 6
    torch.testing.assert_close(result.codes().double(), 6 * q, atol=1e-5, rtol=0)
    assert int(result.status) == 0
    assert bool((sinkhorn(scores, tol=1e-3, accelerate="anderson").labels() < k).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", [1e-3, 1e-2, 1.0, 1e3])
def test_any_epsilon(epsilon, dtype):
    result = sinkhorn(_scores(dtype=dtype), epsilon=epsilon)
    exact = sinkhorn(_scores(), epsilon=epsilon)
    for x in (result.f, result.g, result.err):
        assert bool(x.isfinite().all())
    # potentials of 2000 are known to 1e-4 in float32, and codes to as much
    torch.testing.assert_close(result.codes().double(), exact.codes(), atol=1e-3, rtol=0)
    late = sinkhorn(_scores(dtype=dtype), epsilon=epsilon, tol=1e-2, max_iter=300, warn=False,
        accelerate="anderson")  # fmt: skip
    assert bool(late.err.isfinite())
    assert int(late.counts().sum()) == 120


def test_examples_run():
    result = doctest.testmod(_sinkhorn)
    assert result.attempted >= 3
    assert not result.failed
    assert {"sinkhorn", "swav_codes", "sela_labels"} <= set(clam_kernels.__all__)


# ---- scores that are large beside epsilon, in float32 --------------------------------------------


def _outlier(off: float) -> torch.Tensor:
    """Scores are minus squared distances, and one row is far from all others."""
    x, y = _scores(0, 50, 2).float(), _scores(1, 40, 2).float() + 1
    x[0] = off
    return -torch.cdist(x, y).square()


def _raised(rows: float, columns: float) -> torch.Tensor:
    """Normal scores plus a constant for each row, and one for most prototypes."""
    scores = _scores(0, 500, 20).float() + rows * _scores(1, 500, 1).float()
    scores[:, 0] += columns
    scores[:, 5:] -= columns
    return scores


@pytest.mark.parametrize("accelerate", [None, "anderson"])
@pytest.mark.parametrize("off", [1e3, 1e4, 1e6])
def test_the_plan_has_its_row_sums_if_one_row_is_far(off, accelerate):
    scores = _outlier(off)
    result = sinkhorn(scores, epsilon=1.0, tol=1e-4, accelerate=accelerate)
    assert bool(result.converged)
    plan = result.plan().double()
    torch.testing.assert_close(plan.sum(1), torch.full((50,), 0.02).double(), rtol=1e-6, atol=0)
    error = (plan.sum(0) - 1 / 40).abs().sum()
    torch.testing.assert_close(error, result.err.double(), rtol=0.01, atol=1e-7)
    torch.testing.assert_close(plan, result.codes().double() / 50, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("form", ["stop", "unrolled", "implicit", "envelope"])
def test_the_plan_is_the_codes_times_the_masses(form, mask):
    scores = _scores().requires_grad_()
    n = scores.shape[0]
    keep = torch.arange(n) % 3 != 0 if mask else torch.ones(n, dtype=torch.bool)
    rule = {} if form in ("stop", "unrolled") else {"tol": 1e-8}
    result = sinkhorn(scores, epsilon=0.5, gradient=form, row_mask=keep if mask else None, **rule)
    plan, mass = result.plan(), (keep.double() / keep.sum())[:, None]
    torch.testing.assert_close(plan, mass * result.codes(), rtol=1e-12, atol=0)
    whole = torch.exp(scores / 0.5 + result.f[:, None] + result.g)
    torch.testing.assert_close(plan, torch.where(keep[:, None], whole, 0.0), rtol=1e-9, atol=0)
    some = slice(3, 40, 5)
    assert torch.equal(result.plan(some), plan[some])
    if form in ("unrolled", "implicit"):
        weight = _scores(7, *scores.shape)
        of_plan = torch.autograd.grad((plan * weight).sum(), scores, retain_graph=True)[0]
        of_whole = torch.autograd.grad((whole * keep[:, None] * weight).sum(), scores)[0]
        torch.testing.assert_close(of_plan, of_whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("accelerate", [None, "anderson"])
@pytest.mark.parametrize("outlier", [False, True])
def test_a_constant_of_rows_costs_no_iteration(outlier, accelerate):
    scores = _scores(0, 50, 5).float()
    scores[0] = 1e6 if outlier else scores[0] + 1e6
    rule = {"epsilon": 0.5, "tol": 1e-3, "accelerate": accelerate}
    result, expected = sinkhorn(scores, **rule), sinkhorn(scores.double(), **rule)
    assert bool(result.converged)
    assert result.n_iter <= expected.n_iter + 1
    error = (result.plan().double().sum(0) - 0.2).abs().sum()
    torch.testing.assert_close(error, result.err.double(), rtol=0.01, atol=1e-6)


@pytest.mark.parametrize(("rows", "columns", "bound"), [
    (1e2, 0.0, 1e-4), (1e3, 0.0, 2e-4), (1e4, 0.0, 2e-3), (1e5, 0.0, 2e-2),
    (0.0, 1e3, 4e-4), (0.0, 1e5, 2e-2),
])  # fmt: skip
def test_large_scores_converge_in_float32(rows, columns, bound):
    scores = _raised(rows, columns)
    rule = {"epsilon": 0.05, "accelerate": "anderson"}
    result = sinkhorn(scores, tol=1e-5, **rule)
    assert bool(result.converged)
    assert result.n_iter <= 3 * sinkhorn(scores.double(), tol=1e-5, **rule).n_iter + 5
    error = (result.plan().double().sum(0) - 1 / 20).abs().sum()
    assert float(error) <= 2e-5
    expected = sinkhorn(scores.double(), tol=1e-9, max_iter=5000, **rule)
    assert float((result.codes() - expected.codes()).abs().sum(1).mean()) <= bound
    shifted = sinkhorn(scores, tol=1e-5, bias=torch.full((20,), 1e4), **rule)
    assert float((shifted.plan().double().sum(0) - 1 / 20).abs().sum()) <= 2e-5


def test_rows_first_do_not_claim_a_plan_that_float32_cannot_hold():
    result = sinkhorn(_outlier(1e4), epsilon=1.0, tol=1e-4, prototype_first=False, warn=False)
    assert float((result.plan().sum(1) - 0.02).abs().sum()) > 1e-4
    assert not bool(result.converged)
    with pytest.warns(ConvergenceWarning, match="Large scores / epsilon need float64 scores"):
        sinkhorn(_outlier(1e4), epsilon=1.0, tol=1e-4, prototype_first=False, max_iter=50)
    fixed = sinkhorn(_outlier(1e4), epsilon=1.0, n_iter=50, prototype_first=False)
    assert float(fixed.err) > 0.1
