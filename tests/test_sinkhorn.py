# SPDX-License-Identifier: Apache-2.0
"""Sinkhorn scaling: worked cases, marginals, invariances, numerical hazards. Tables:
docs/ops/sinkhorn.md.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import python_fallback.sinkhorn as fallback
from clam_kernels.ops.sinkhorn import (
    sinkhorn_pass,
    sinkhorn_potentials,
    sinkhorn_potentials_features,
)
from python_fallback.sinkhorn import scaling

L6 = torch.tensor(
    [[2, 0, 1], [1, 3, 0], [0, 1, 0], [2, 2, 2], [0, 0, 4], [1, 0, 0]], dtype=torch.float64
)


def _close(result, expected, bound=1e-9):
    torch.testing.assert_close(
        result, torch.as_tensor(expected, dtype=result.dtype), atol=bound, rtol=0
    )


def _codes(logits, g):
    return torch.softmax(logits + g, -1)


def _plan(logits, f, g):
    return (logits + f[..., None] + g[..., None, :]).exp()


def _draw(seed, *shape, size=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (size * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


# ---- worked cases --------------------------------------------------------------------------------


def test_two_by_two():
    logits = torch.tensor([[1, 0], [0, 0]], dtype=torch.float64)
    f, g, _, status = sinkhorn_potentials(logits, 1)
    _close(g, [-2.0064088681, -1.3862943611])
    _close(f, [-0.2078744323, 0.2627404874])
    _close(_codes(logits, g), [[0.5938454850, 0.4061545150], [0.3497554091, 0.6502445909]])
    third = _codes(logits, sinkhorn_potentials(logits, 3)[1])
    _close(third, [[0.6223578796, 0.3776421204], [0.3774392279, 0.6225607721]])
    limit = _codes(logits, sinkhorn_potentials(logits, 200)[1])
    _close(limit.diagonal(), [math.sqrt(math.e) / (1 + math.sqrt(math.e))] * 2, 1e-15)
    assert int(status) == scaling.FINE


def test_six_by_three():
    _, g, _, _ = sinkhorn_potentials(L6, 1)
    _close(g, [-4.1993654337, -4.6009475286, -5.3137795282])
    _close(_codes(L6, g).mean(0), [0.4319095066, 0.3362349925, 0.2318555009])
    f, g, err, _ = sinkhorn_potentials(L6, 3)
    _close(g, [-4.5595664172, -4.6558057426, -4.7838784259])
    expected = [
        0.4193513095,
        -0.3122650357,
        1.3166765929,
        -0.2281494619,
        -1.0506910027,
        1.2804023888,
    ]
    _close(f, expected)
    codes = _codes(L6, g)
    _close(codes[0], [0.7057772237, 0.0867525935, 0.2074701828])
    _close(codes[3], [0.3693700065, 0.3354790612, 0.2951509323])
    _close(codes.mean(0), [0.3450921662, 0.3440382804, 0.3108695534])
    _close(err, (codes.mean(0) - 1 / 3).abs().sum(), 1e-12)
    _, g, _, _ = sinkhorn_potentials(L6, 500)
    codes = _codes(L6, g)
    _close(codes[0], [0.6805747270, 0.0827269428, 0.2366983302])
    _close(codes[3], [0.3516706764, 0.3158611978, 0.3324681259])
    _close(g[1:] - g[0], [-0.1073922898, -0.0561511658])
    assert codes.argmax(1).tolist() == [0, 1, 1, 0, 2, 0]


def test_given_marginals():
    a = torch.tensor([0.1, 0.1, 0.2, 0.2, 0.2, 0.2], dtype=torch.float64)
    b = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    f, g, err, _ = sinkhorn_potentials(L6, 500, log_row=a.log(), log_col=b.log())
    plan = _plan(L6, f, g)
    _close(plan[0], [0.0879566985, 0.0047307213, 0.0073125802])
    _close(plan[4], [0.0145600123, 0.0057864093, 0.1796535784])
    assert float(err) < 1e-12


def test_trivial_shapes():
    one = sinkhorn_potentials(_draw(0, 1, 4), 1, log_col=torch.tensor([0.1, 0.2, 0.3, 0.4]).log())
    _close(_codes(_draw(0, 1, 4), one[1])[0], [0.1, 0.2, 0.3, 0.4], 1e-6)
    assert torch.equal(
        _codes(_draw(0, 5, 1), sinkhorn_potentials(_draw(0, 5, 1), 1)[1]), torch.ones(5, 1).double()
    )
    flat = _codes(torch.zeros(4, 5), sinkhorn_potentials(torch.zeros(4, 5), 1)[1])
    _close(flat, torch.full((4, 5), 0.2), 1e-6)
    none = sinkhorn_potentials(L6, 0)
    _close(_codes(L6, none[1]), torch.softmax(L6, 1), 1e-15)
    assert torch.equal(none[1], torch.zeros(3, dtype=torch.float64))


# ---- scale and bias ------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_a_scale_and_a_bias_are_those_of_the_logits(first):
    scores, bias, scale = _draw(0, 2, 30, 6), _draw(1, 6), torch.tensor([0.5, 20.0]).double()
    start, (a, b) = _draw(2, 6), (_draw(3, 30).log_softmax(0), _draw(4, 6).log_softmax(0))
    rest = {"log_row": a, "log_col": b, "init": start, "prototype_first": first}
    expected = sinkhorn_potentials(scale[:, None, None] * scores + bias, 4, **rest)
    for x, y in zip(
        sinkhorn_potentials(scores, 4, bias=bias, scale=scale, **rest), expected, strict=True
    ):
        _close(x, y, 1e-11)
    z, c = _draw(5, 30, 4), _draw(6, 6, 4)
    expected = sinkhorn_potentials(scale[:, None, None] * (z @ c.T) + bias, 4, **rest)
    for x, y in zip(
        sinkhorn_potentials_features(z, c, 4, bias=bias, scale=scale, **rest), expected, strict=True
    ):
        _close(x, y, 1e-11)


def test_a_scale_of_epsilon_is_a_division_by_it():
    """In float32 as in the library's own presets, and for half precision scores in float32."""
    scores = _draw(0, 300, 20).clamp(-1, 1)
    exact = sinkhorn_potentials(scores / 0.05, 3)[1]
    for dtype, bound in ((torch.float32, 2e-5), (torch.bfloat16, 0.1)):
        result = sinkhorn_potentials(scores.to(dtype), 3, scale=torch.tensor(20.0))[1]
        assert result.dtype == torch.float32
        _close(result.double(), exact, bound)
        rounded = sinkhorn_potentials(scores.to(dtype).double() * 20, 3)[1]
        _close(result.double(), rounded, 2e-5)


@pytest.mark.parametrize("size", [1e3, 1e6])
def test_a_large_bias_cancels(size):
    """Float64 adds it to the potentials: no logit is rounded relative to it."""
    logits, bias = _draw(0, 200, 6), size * _draw(1, 6)
    expected = sinkhorn_potentials(logits, 3)[1] - bias
    result = sinkhorn_potentials(logits.float(), 3, bias=bias)
    torch.testing.assert_close(result[1].double(), expected, atol=1e-5, rtol=1e-6)
    _close(result[0].double(), sinkhorn_potentials(logits, 3)[0], 1e-5)


@pytest.mark.parametrize(("value", "status"), [(math.nan, 2), (math.inf, 2), (-math.inf, 3)])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("n_iter", [0, 1, 3])
def test_a_bias_that_is_not_finite_fails_its_problem(value, status, n_iter, first):
    bias = torch.zeros(2, 3, dtype=torch.float64)
    bias[1, 1] = value
    f, g, err, statuses = sinkhorn_potentials(L6, n_iter, bias=bias, prototype_first=first)
    assert statuses.tolist() == [0, status]
    assert bool(f[1].isnan().all() & g[1].isnan().all() & err[1].isnan())
    shares = torch.tensor([0.5, 0.0, 0.5]).double().log()  # and is masked if its column is
    small = sinkhorn_potentials(L6[:, [0, 2]], n_iter, prototype_first=first)
    _, g, _, statuses = sinkhorn_potentials(
        L6, n_iter, bias=bias, log_col=shares, prototype_first=first
    )
    assert statuses.tolist() == [0, 0]
    _close(g[1, [0, 2]], small[1], 1e-12)


def test_gradients_of_a_scale_sum_over_its_problem():
    scores, scale = _draw(0, 3, 20, 5), torch.tensor([[0.5], [2.0]]).double().requires_grad_()
    weight = _draw(1, 2, 3, 5)

    def loss(scale):
        return (sinkhorn_potentials(scores, 3, scale=scale)[1] * weight).sum()

    (gradient,) = torch.autograd.grad(loss(scale), scale)
    step = 1e-6
    for i in range(2):
        moved = scale.detach().clone()
        moved[i, 0] += step
        near = float(loss(moved))
        moved[i, 0] -= 2 * step
        expected = (near - float(loss(moved))) / (2 * step)
        assert float(gradient[i, 0]) == pytest.approx(expected, rel=1e-6)


# ---- marginals and invariances -------------------------------------------------------------------


@settings(max_examples=40)
@given(
    st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 9), st.sampled_from([0.1, 3.0, 40.0]),
    st.booleans(),
)  # fmt: skip
def test_the_last_side_is_exact(seed, n, k, size, first):
    logits = _draw(seed, n, k, size=size)
    a, b = _draw(seed + 1, n).softmax(0), _draw(seed + 2, k).softmax(0)
    f, g, err, _ = sinkhorn_potentials(
        logits, 4, log_row=a.log(), log_col=b.log(), prototype_first=first
    )
    plan = _plan(logits, f, g)
    sums = (plan.sum(1), a) if first else (plan.sum(0), b)
    torch.testing.assert_close(*sums, rtol=1e-9, atol=1e-12)
    other = plan.sum(0) - b if first else plan.sum(1) - a
    assert float(err) == pytest.approx(float(other.abs().sum()), abs=1e-9)


@pytest.mark.parametrize("first", [True, False])
def test_permutations_and_shifts(first):
    logits = _draw(0, 40, 7, size=3)
    g = sinkhorn_potentials(logits, 3, prototype_first=first)[1]
    rows, columns = torch.randperm(40), torch.randperm(7)
    _close(sinkhorn_potentials(logits[rows], 3, prototype_first=first)[1], g, 1e-12)
    _close(sinkhorn_potentials(logits[:, columns], 3, prototype_first=first)[1], g[columns], 1e-12)
    _close(
        sinkhorn_potentials(logits + 5, 3, prototype_first=first)[1] + (5 if first else 0), g, 1e-12
    )
    if first:
        shift = _draw(1, 7)
        moved = sinkhorn_potentials(logits + shift, 3)[1]
        _close(moved, g - shift, 1e-12)


def test_a_shift_of_a_row_is_another_start():
    """To subtract row maxima before a few iterations, as some codes do, is another method."""
    moved = L6 + torch.tensor([3.0, 0, 0, 0, 0, 0])[:, None]
    gaps = [
        float(
            (
                _codes(L6, sinkhorn_potentials(L6, n)[1])
                - _codes(moved, sinkhorn_potentials(moved, n)[1])
            )
            .abs()
            .max()
        )
        for n in (1, 3, 500)
    ]
    assert gaps[0] == pytest.approx(0.354, abs=1e-3)
    assert gaps[1] == pytest.approx(0.0274, abs=1e-4)
    assert gaps[2] < 1e-12


def test_batches_forms_and_starts_agree():
    z, c, bias = _draw(0, 2, 30, 5), _draw(1, 6, 5), _draw(2, 6)
    logits = z @ c.T + bias
    for a, b in zip(
        sinkhorn_potentials_features(z, c, 4, bias=bias),
        sinkhorn_potentials(logits, 4),
        strict=True,
    ):
        _close(a, b, 1e-12)
    for i in range(2):
        _close(sinkhorn_potentials(logits, 4)[1][i], sinkhorn_potentials(logits[i], 4)[1], 1e-13)
    # a start from the potentials of an earlier call continues it
    first = sinkhorn_potentials(logits[0], 5)[1]
    _close(
        sinkhorn_potentials(logits[0], 3, init=first)[1],
        sinkhorn_potentials(logits[0], 8)[1],
        1e-12,
    )
    rows = sinkhorn_potentials(logits[0], 5, prototype_first=False)[1]
    again = sinkhorn_potentials(logits[0], 3, init=rows, prototype_first=False)[1]
    _close(again, sinkhorn_potentials(logits[0], 8, prototype_first=False)[1], 1e-12)


def test_any_tile_gives_the_same(monkeypatch):
    logits = _draw(0, 500, 9, size=4)
    whole = sinkhorn_potentials(logits, 6)
    monkeypatch.setattr(scaling, "TILE_ENTRIES", 150)
    for a, b in zip(sinkhorn_potentials(logits, 6), whole, strict=True):
        _close(a, b, 1e-12)


# ---- hazards -------------------------------------------------------------------------------------


def test_forbidden_pairs():
    logits = L6[:, :].clone()
    logits[0, 0] = logits[3, 1] = logits[3, 2] = -math.inf
    f, g, _, status = sinkhorn_potentials(logits, 50)
    codes = _codes(logits, g)
    assert int(status) == scaling.FINE
    assert codes[3].tolist() == [1, 0, 0]
    assert codes[0, 0] == 0
    assert bool(f.isfinite().all() & codes.isfinite().all())


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("n_iter", [0, 1, 3])
@pytest.mark.parametrize(
    ("change", "status"),
    [
        (lambda x: x[2].fill_(-math.inf), scaling.INFEASIBLE),
        (lambda x: x[:, 1].fill_(-math.inf), scaling.INFEASIBLE),
        (lambda x: x[2, 1].fill_(math.nan), scaling.NOT_FINITE),
        (lambda x: x[2, 1].fill_(math.inf), scaling.NOT_FINITE),
    ],
    ids=["row", "column", "nan", "inf"],
)
def test_an_infeasible_problem_has_a_status(first, n_iter, change, status):
    logits = torch.stack([L6, L6])
    change(logits[1])
    f, g, err, statuses = sinkhorn_potentials(logits, n_iter, prototype_first=first)
    assert statuses.tolist() == [scaling.FINE, status]
    assert bool(f[1].isnan().all() & g[1].isnan().all() & err[1].isnan())
    for a, b in zip(
        (f[0], g[0], err[0]), sinkhorn_potentials(L6, n_iter, prototype_first=first), strict=False
    ):
        assert torch.equal(a, b)


def test_entries_without_mass_have_no_influence():
    a = torch.tensor([0, 0.2, 0.2, 0.2, 0.2, 0.2], dtype=torch.float64)
    b = torch.tensor([0.5, 0.5, 0], dtype=torch.float64)
    logits = L6.clone()
    logits[0], logits[:, 2] = math.nan, math.inf
    f, g, err, status = sinkhorn_potentials(logits, 5, log_row=a.log(), log_col=b.log())
    small = sinkhorn_potentials(L6[1:, :2], 5)
    assert int(status) == scaling.FINE
    assert f[0] == g[2] == -math.inf
    _close(f[1:], small[0], 1e-12)
    _close(g[:2], small[1], 1e-12)
    _close(err, small[2], 1e-12)
    assert int(sinkhorn_potentials(L6, 3, log_row=torch.full((6,), -math.inf))[3]) == scaling.EMPTY
    assert int(sinkhorn_potentials(L6[:0], 3)[3]) == scaling.EMPTY


@pytest.mark.parametrize("low", [3.0, 30.0, 40.0])
def test_a_rare_class_keeps_its_share(low):
    """The linear domain in float32 gives every row the same label here."""
    scores = _draw(0, 400, 10)
    scores[:, 7] -= low
    logits = 25 * scores.log_softmax(1)
    results = [
        sinkhorn_potentials(logits.to(dtype), 400) for dtype in (torch.float64, torch.float32)
    ]
    labels = [_codes(logits, g.double()).argmax(1) for _, g, _, _ in results]
    assert torch.equal(*labels)
    counts = torch.bincount(labels[0], minlength=10)
    assert int((counts - 40).abs().max()) <= 3


@pytest.mark.parametrize("first", [True, False])
def test_a_prototype_far_below_the_others(first):
    """300 nats below: its mass underflows unless an exact pass came before, so it is computed
    again.
    """
    logits = _draw(0, 200, 6)
    logits[:, 2] -= 300
    single = sinkhorn_potentials(logits.float(), 3, prototype_first=first)
    double = fallback.sinkhorn_potentials(logits, 3, prototype_first=first)
    _close(single[1].double(), double[1], 1e-4)
    assert int(single[3]) == scaling.FINE
    started = sinkhorn_potentials(logits.float(), 2, init=torch.zeros(6))
    _close(
        started[1].double(), fallback.sinkhorn_potentials(logits, 2, init=torch.zeros(6))[1], 1e-4
    )


@pytest.mark.parametrize("size", [5.0, 200.0])
def test_float32_is_near_float64(size):
    logits = _draw(0, 3000, 300, size=size)
    single, double = sinkhorn_potentials(logits.float(), 3)[1], sinkhorn_potentials(logits, 3)[1]
    gap = (_codes(logits, single.double()) - _codes(logits, double)).abs().max()
    assert float(gap) < 5e-4


def test_half_scores_that_overflow_an_exponential():
    """At epsilon .05 exp(score / epsilon) overflows at .554 in float16 and at 4.4 in float32."""
    scores = _draw(0, 256, 30).clamp(-1, 1) * 8
    logits = (scores / 0.05).half()
    f, g, _, status = sinkhorn_potentials(logits, 3)
    assert g.dtype == torch.float32
    assert int(status) == scaling.FINE
    _close(g.double(), fallback.sinkhorn_potentials(logits.double(), 3)[1], 1e-3)
    assert bool(f.isfinite().all())


def test_rows_past_the_end_of_int32():
    """One row seen N times: g has a closed form, and N K is beyond 2^31."""
    row = _draw(0, 1, 64, size=3, dtype=torch.float32)
    n = 2**31 // 64 + 100
    small = sinkhorn_potentials(row.expand(1000, 64), 1)[1]
    _close(small, -math.log(64) - row[0] - math.log(1000), 1e-5)
    assert n * 64 > 2**31
    tail = scaling.Scores(row.expand(n, 64), 1.0).load(slice(n - 3, n), torch.empty(3, 64))
    assert torch.equal(tail, row.expand(3, 64))


def test_equal_bits_twice():
    logits = _draw(0, 700, 40, size=5, dtype=torch.float32)
    for a, b in zip(sinkhorn_potentials(logits, 5), sinkhorn_potentials(logits, 5), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("scale", [None, 20.0])
@pytest.mark.parametrize("size", [1e3, 1e4, 1e5])
def test_rows_of_large_logits_keep_their_digits(size, scale):
    """A constant of a row's logits costs no digits in float32, forward and backward."""
    logits = (_draw(0, 60, 6) + size * _draw(1, 60, 1)).float()
    g = _draw(2, 6).float().requires_grad_()
    times = None if scale is None else torch.tensor(scale)
    f, log_mass, _ = sinkhorn_pass(logits, g, scale=times)
    weight = _draw(3, 6)
    slope = torch.autograd.grad((log_mass * weight.float()).sum(), g)[0]
    wide = g.detach().double().requires_grad_()
    times = None if scale is None else torch.tensor(scale, dtype=torch.float64)
    want_f, expected, _ = sinkhorn_pass(logits.double(), wide, scale=times)
    _close(log_mass.double(), expected, 2e-5)
    torch.testing.assert_close(f.double(), want_f, rtol=1e-6, atol=1e-5)
    (want_slope,) = torch.autograd.grad((expected * weight).sum(), wide)
    _close(slope.double(), want_slope, 1e-5)
