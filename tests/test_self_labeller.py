# SPDX-License-Identifier: Apache-2.0
"""The self-labelling heads: logits and loss, relabelling and its shares, state, refusals."""

from __future__ import annotations

import copy
import doctest
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import clam_kernels
import clam_kernels.nn.self_labeller as module
from clam_kernels import testing
from clam_kernels.nn import SelfLabeller

N, D, K, H = 60, 6, 5, 3
F64 = torch.float64


def _draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def _heads(seed: int = 0, rows: int = N, heads: int = H, **rest: Any) -> SelfLabeller:
    generator = torch.Generator().manual_seed(seed)
    return SelfLabeller(D, K, rows, heads, generator=generator, **rest)


# ---- logits, loss --------------------------------------------------------------------------------


def test_logits_are_those_of_separate_linear_layers():
    heads, x = _heads(dtype=F64), _draw(1, 7, D, dtype=F64)
    logits = heads(x)
    assert logits.shape == (H, 7, K)
    for h in range(H):
        layer = nn.Linear(D, K, dtype=F64)
        layer.load_state_dict({"weight": heads.weight[h], "bias": heads.bias[h]})
        torch.testing.assert_close(logits[h], layer(x))
        torch.testing.assert_close(heads.log_probabilities(x, h), layer(x).log_softmax(1).detach())


def test_loss_is_the_mean_cross_entropy_of_the_heads():
    heads, x = _heads(), _draw(1, 7, D).requires_grad_()
    rows = torch.tensor([3, 0, 59, 3, 10, 11, 12])
    each = [functional.cross_entropy(heads(x)[h], heads.labels[h, rows]) for h in range(H)]
    loss = heads.loss(x, rows)
    torch.testing.assert_close(loss, torch.stack(each).mean())
    loss.backward()
    assert x.grad is not None
    assert bool(heads.weight.grad.abs().sum() > 0)


def test_a_new_layer_has_balanced_labels_of_its_own_in_each_head():
    heads = _heads()
    for row in heads.labels:
        assert torch.bincount(row).tolist() == [12] * K
    assert not torch.equal(heads.labels[0], heads.labels[1])
    assert torch.equal(_heads().labels, heads.labels)
    assert torch.equal(_heads().weight, heads.weight)
    assert not torch.equal(_heads(1).labels, heads.labels)
    assert bool((heads.g == 0).all())
    assert float(heads.weight.detach().abs().max()) <= D**-0.5
    state = torch.get_rng_state()
    _heads()
    assert torch.equal(torch.get_rng_state(), state), "a generator was given"


def test_given_start():
    start = torch.arange(N) % K
    assert torch.equal(_heads(start=start).labels, start.expand(H, N))
    each = torch.stack([start, start.roll(1), start.roll(2)])
    heads = _heads(start=each)
    each.zero_()
    assert torch.equal(heads.labels[1], start.roll(1))


# ---- relabelling ---------------------------------------------------------------------------------


def test_relabelling_is_the_labels_of_the_plan():
    heads, logp = _heads(dtype=F64, tol=1e-8, max_iter=4000), _draw(2, N, K, dtype=F64)
    logp = logp.log_softmax(1)
    before = heads.labels.clone()
    done = heads.relabel(logp, 1)
    expected = clam_kernels.sela_labels(logp, tol=1e-8, max_iter=4000)
    assert torch.equal(heads.labels[1], expected)
    assert torch.equal(heads.labels[[0, 2]], before[[0, 2]])
    assert (done.head, done.converged) == (1, True)
    assert done.err <= 1e-8
    assert done.n_iter > 0
    assert done.changed == float((before[1] != expected).double().mean()) > 0
    assert torch.equal(done.counts, torch.bincount(expected, minlength=K))
    assert int((done.counts - N / K).abs().max()) <= 1


def test_relabelling_takes_a_callable_for_one_head_at_a_time():
    one, two, calls = _heads(), _heads(), []

    def give(head: int) -> Tensor:
        calls.append(head)
        return _draw(head, N, K).log_softmax(1)

    for head in (2, 0):
        one.relabel(give, head)
        two.relabel(_draw(head, N, K).log_softmax(1), head)
    assert calls == [2, 0]
    assert torch.equal(one.labels, two.labels)


def test_the_next_relabelling_starts_from_the_last_potentials():
    heads, logp = _heads(), _draw(2, N, K).log_softmax(1)
    first = heads.relabel(logp, 0)
    assert bool(heads.g[0].abs().max() > 0)
    assert bool((heads.g[1:] == 0).all())
    again = heads.relabel(logp + 0.001 * _draw(3, N, K), 0)
    without_start = _heads()
    fresh = without_start.relabel(logp + 0.001 * _draw(3, N, K), 0)
    assert again.n_iter <= fresh.n_iter
    assert again.n_iter < first.n_iter
    assert again.changed < 0.1
    assert torch.equal(heads.labels[0], without_start.labels[0])


def test_mean_features_stand_for_the_mean_of_log_probabilities():
    """As `relabel_features` says: constants of a row change nothing."""
    heads = _heads(dtype=F64, tol=1e-6, max_iter=4000)
    draws = [_draw(s, N, D, dtype=F64) for s in range(4)]
    mean = torch.stack([heads.log_probabilities(x, 0) for x in draws]).mean(0)
    other = copy.deepcopy(heads)
    heads.relabel(mean, 0)
    other.relabel_features(torch.stack(draws).mean(0), 0)
    assert torch.equal(heads.labels[0], other.labels[0])
    torch.testing.assert_close(heads.g[0], other.g[0], rtol=0, atol=1e-9)


def test_without_an_array_of_scores(monkeypatch):
    """Beyond DENSE_ENTRIES entries, scores are computed again tile by tile."""
    heads, x = _heads(dtype=F64, tol=1e-6, max_iter=4000), _draw(1, N, D, dtype=F64)
    tiled = copy.deepcopy(heads)
    dense = heads.relabel_features(x, 0)
    monkeypatch.setattr(module, "DENSE_ENTRIES", 0)
    real, calls = module.sinkhorn, []
    monkeypatch.setattr(module, "sinkhorn", lambda s, **k: (calls.append(type(s)), real(s, **k))[1])
    done = tiled.relabel_features(x, 0)
    assert calls == [tuple]
    assert torch.equal(heads.labels, tiled.labels)
    torch.testing.assert_close(heads.g, tiled.g, rtol=0, atol=1e-9)
    assert abs(done.err - dense.err) < 1e-9
    assert torch.equal(heads.assign(x), tiled.labels[0])


@pytest.mark.parametrize("strict", [False, True])
def test_shares(strict):
    """Unequal shares in any unit; the number of rows is no multiple of the labels."""
    share = torch.tensor([4.0, 2.0, 2.0, 1.0, 1.0])
    rows = 63
    heads = _heads(rows=rows, col_marginal=share, strict=strict, tol=1e-5, max_iter=4000)
    done = heads.relabel(_draw(2, rows, K).log_softmax(1), 0)
    off = (done.counts - share / 10 * rows).abs().max()
    assert off < 1 if strict else off <= 2
    assert int(done.counts.sum()) == rows


def test_heavy_rows_count_more():
    mass = torch.ones(N)
    mass[:10] = 9.0
    logp = _draw(2, N, K).log_softmax(1)
    heads = _heads(row_marginal=mass, tol=1e-5, max_iter=4000)
    heads.relabel(logp, 0)
    masses = torch.bincount(heads.labels[0], mass, minlength=K)
    assert float((masses - mass.sum() / K).abs().max()) <= 9
    plain = _heads(tol=1e-5, max_iter=4000)
    plain.relabel(logp, 0)
    assert not torch.equal(plain.labels[0], heads.labels[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_failed_relabelling_raises_and_changes_nothing(value):
    heads, logp = _heads(), _draw(2, N, K).log_softmax(1)
    logp[7, 3] = value
    before = copy.deepcopy(heads.state_dict())
    text = "head 1: expected log-probabilities that have a plan, got NaN"
    with pytest.raises(FloatingPointError, match=text):
        heads.relabel(logp, 1)
    for name, tensor in heads.state_dict().items():
        assert torch.equal(tensor, before[name])
    logp[7] = -torch.inf
    with pytest.raises(FloatingPointError, match=r"head 1: .* got a row or column with -inf only"):
        heads.relabel(logp, 1)


def test_a_class_of_low_scores_gets_its_share():
    """The published linear-domain loop gives every row label 0 here, in float64 too."""
    rows = 400
    logits = _draw(0, rows, 10)
    logits[:, 7] -= 40
    heads = SelfLabeller(D, 10, rows, 1, tol=1e-3, max_iter=2000)
    done = heads.relabel(logits.log_softmax(1), 0)
    assert int((done.counts - 40).abs().max()) <= 3


def test_few_iterations_are_reported():
    heads = _heads(max_iter=1, tol=1e-9)
    done = heads.relabel(_draw(2, N, K).log_softmax(1), 0)
    assert (done.n_iter, done.converged) == (1, False)
    assert done.err > 1e-9
    assert int(heads.labels[0].min()) >= 0


def test_memory_is_that_of_one_head():
    """No array of [heads, N, K]: torch's peak memory equals that of one head."""
    peaks = []
    for count in (1, 8):
        heads = SelfLabeller(D, 50, 4000, count)
        x = _draw(0, 4000, D)

        def relabel(heads: SelfLabeller = heads, x: Tensor = x) -> None:
            for head in range(heads.n_heads):
                heads.relabel_features(x, head)

        peaks.append(testing.peak_bytes(relabel))
    assert peaks[0] > 4000 * 50 * 4
    assert peaks[1] < 1.1 * peaks[0]


# ---- state ---------------------------------------------------------------------------------------


def _steps(heads: SelfLabeller, optimiser: torch.optim.Optimizer, x: Tensor, first: int) -> None:
    for step in range(first, first + 4):
        heads.relabel_features(x, step % H)
        rows = torch.arange(N).roll(step)[:20]
        optimiser.zero_grad()
        heads.loss(x[rows], rows).backward()
        optimiser.step()


def test_a_loaded_layer_continues_bit_for_bit():
    x = _draw(5, N, D)
    whole = _heads()
    optimiser = torch.optim.SGD(whole.parameters(), 0.5, momentum=0.9)
    _steps(whole, optimiser, x, 0)
    file = io.BytesIO()
    torch.save([whole.state_dict(), optimiser.state_dict()], file)
    _steps(whole, optimiser, x, 4)
    file.seek(0)
    state, rest = torch.load(file, weights_only=True)
    assert set(state) == {"weight", "bias", "labels", "g"}
    other = _heads(seed=9)
    other.load_state_dict(state)
    again = torch.optim.SGD(other.parameters(), 0.5, momentum=0.9)
    again.load_state_dict(rest)
    _steps(other, again, x, 4)
    for name, value in whole.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


MARGINALS = {"col_marginal": K, "row_marginal": N}


def _masses(seed: int = 3) -> dict[str, Tensor]:
    return {name: _draw(seed, size, dtype=F64).exp() for name, size in MARGINALS.items()}


def test_a_state_has_the_marginals():
    x, heads, other = _draw(5, N, D), _heads(**_masses()), _heads(seed=9, **_masses(4))
    heads.relabel_features(x, 0)
    state = heads.state_dict()
    assert set(state) == {"weight", "bias", "labels", "g", *MARGINALS}
    other.load_state_dict(state)
    one, two = (layer.relabel_features(x, 1) for layer in (heads, other))
    assert torch.equal(one.counts, two.counts)
    for name, value in heads.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@pytest.mark.parametrize("name", MARGINALS)
def test_a_state_with_a_marginal_does_not_load_into_a_layer_without(name):
    layers = {
        "with": nn.ModuleList([_heads(**{name: _masses()[name]})]),
        "without": nn.ModuleList([_heads()]),
    }
    size = MARGINALS[name]
    none = f"0.{name}: expected none in the state dict to match this layer, got [{size}]"
    some = f"0.{name}: expected shape [{size}] in the state dict to match this layer, got none"
    for words, source, target in ((none, "with", "without"), (some, "without", "with")):
        state = layers[source].state_dict()
        with pytest.raises(RuntimeError) as caught:
            layers[target].load_state_dict(state)
        assert str(caught.value).splitlines()[1:] == [f"\t{words}: make the layer {source} {name}"]
    heads = {part: state[f"0.{part}"] for part in ("weight", "bias")}
    # its labels do not have other shares
    mismatch = layers["with"][0].load_state_dict(heads, strict=False)
    assert set(mismatch.missing_keys) == {"labels", "g", name}


@pytest.mark.parametrize("start", ["balanced", "labels"])
def test_a_layer_made_on_meta_is_complete_after_a_reset(start):
    options = {"start": torch.arange(N).flip(0) % K} if start == "labels" else {}
    plain = _heads(**_masses(), **options)
    before = torch.get_rng_state()
    heads = SelfLabeller(D, K, N, H, device="meta", **_masses(), **options)
    assert torch.equal(torch.get_rng_state(), before), "nothing is drawn on meta"
    assert all(t.is_meta for t in heads.state_dict().values())
    heads.to_empty(device="cpu")
    for t in heads.state_dict().values():
        t.detach().fill_(-7)
    heads.reset_parameters(torch.Generator().manual_seed(0))
    for name, value in plain.state_dict().items():
        assert torch.equal(heads.state_dict()[name], value), name


def test_the_default_device_is_that_of_the_layer():
    masses = _masses()
    with torch.device("meta"):
        heads, here = SelfLabeller(D, K, N, **masses), SelfLabeller(D, K, N, device="cpu", **masses)
    assert all(t.is_meta for t in heads.state_dict().values())
    assert all(t.is_cpu for t in here.state_dict().values())


def test_labels_out_of_range_are_refused():
    heads, x, rows = _heads(), _draw(1, 2, D), torch.tensor([0, 1])
    heads.loss(x, rows)
    heads.labels[1, 40] = -1
    text = "labels: expected values from 0 to 4, got -1 for row 40 of head 1; relabel first"
    with pytest.raises(ValueError, match=text):
        heads.loss(x, rows)
    heads.relabel(_draw(2, N, K).log_softmax(1), 1)
    heads.loss(x, rows)
    state = copy.deepcopy(heads.state_dict())
    state["labels"][0, 3] = K
    heads.load_state_dict(state)
    with pytest.raises(ValueError, match="got 5 for row 3 of head 0"):
        heads.loss(x, rows)


def test_assign_returns_the_labels_of_relabelling():
    heads, x = _heads(tol=1e-6, max_iter=4000), _draw(1, N, D)
    heads.relabel_features(x, 2)
    assert torch.equal(heads.assign(x, 2), heads.labels[2])
    assert torch.equal(heads.assign(x[5:9], 2), heads.labels[2, 5:9])


def test_copies_and_conversion():
    heads, x = _heads(), _draw(1, 4, D)
    other = copy.deepcopy(heads)
    other.relabel(_draw(2, N, K).log_softmax(1), 0)
    assert bool((heads.g == 0).all())
    wide = heads.double()
    assert wide(x.double()).dtype == F64
    assert wide.labels.dtype == torch.int64
    with torch.autocast("cpu", torch.bfloat16):
        loss = other.loss(x, torch.arange(4))
    assert bool(loss.isfinite())
    half = SelfLabeller(D, K, N, 1, dtype=torch.bfloat16)
    assert half.relabel_features(_draw(1, N, D, dtype=torch.bfloat16), 0).counts.sum() == N


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float"])
def test_casts_round_no_potentials_and_no_marginals(cast):
    shares = {"col_marginal": torch.rand(K) + 1, "row_marginal": torch.rand(N) + 1}
    heads = _heads(**shares)
    heads.relabel(_draw(2, N, K).log_softmax(1), 0)
    before = {name: getattr(heads, name).clone() for name in ("g", *shares)}
    assert getattr(heads, cast)() is heads
    for name, value in before.items():
        assert getattr(heads, name).dtype == F64
        assert torch.equal(getattr(heads, name), value), name
    dtype = getattr(torch, cast)
    assert heads.weight.dtype == dtype
    heads.relabel_features(_draw(1, N, D, dtype=dtype), 0)
    heads.to("meta", torch.float16)  # moved and cast in one call
    assert all(t.is_meta for t in heads.state_dict().values())
    assert [getattr(heads, name).dtype for name in before] == [F64] * 3


def test_sizes_of_numpy():
    sizes = [np.int64(D), np.int32(K), np.uint8(N), np.int64(H)]
    heads = SelfLabeller(*sizes, max_iter=np.int64(50))
    assert repr(heads) == repr(_heads())
    done = heads.relabel_features(_draw(1, N, D), np.int64(1))
    assert done.head == 1
    assert type(done.head) is int
    assert [type(size) for size in (heads.n_rows, heads.max_iter)] == [int, int]


def test_compiled_loss_is_one_graph():
    torch._dynamo.reset()
    heads, x, rows = _heads(), _draw(1, 8, D), torch.arange(8)
    compiled = torch.compile(heads.loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, rows), heads.loss(x, rows))
    torch._dynamo.reset()


def test_repr():
    assert repr(_heads()) == "SelfLabeller(6, 5, n_rows=60, n_heads=3, lam=25, tol=0.001)"
    assert repr(_heads(strict=True)).endswith("strict=True)")


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"n_clusters": 0}, ValueError, "n_clusters: expected an int >= 1, got 0"),
        ({"n_heads": 2.0}, TypeError, "n_heads: expected an int >= 1, got 2.0"),
        ({"n_rows": True}, TypeError, "n_rows: expected an int >= 1, got True"),
        ({"max_iter": 0}, ValueError, "max_iter: expected an int >= 1, got 0"),
        ({"lam": 0.0}, ValueError, "lam: expected a finite number > 0, got 0.0"),
        ({"tol": float("nan")}, ValueError, "tol: expected a finite number > 0, got nan"),
        ({"strict": 1}, TypeError, "strict: expected a bool, got int"),
        ({"start": "random"}, ValueError, "start: expected 'balanced' or an int64 Tensor"),
        ({"start": np.zeros(N)}, TypeError, "start: expected 'balanced' or an int64 Tensor"),
        ({"start": torch.zeros(3, dtype=torch.int64)}, ValueError, "start: expected shape"),
        ({"start": torch.full((N,), K)}, ValueError, "start: expected labels from 0 to 4"),
        ({"col_marginal": [1.0]}, TypeError, "col_marginal: expected a Tensor, got list"),
        ({"col_marginal": torch.ones(4)}, ValueError, r"col_marginal: expected shape \[5\], got"),
        ({"row_marginal": torch.zeros(N)}, ValueError, "row_marginal: expected finite values > 0"),
    ],
)
def test_refused_settings(change, error, text):
    settings = {"in_features": D, "n_clusters": K, "n_rows": N, "n_heads": H, **change}
    with pytest.raises(error, match=text):
        SelfLabeller(**settings)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda h: h(torch.zeros(3, D + 1)), ValueError, r"features: expected shape \[B, 6\], got"),
        (lambda h: h(torch.zeros(3, D).double()), TypeError, "features: expected dtype float32"),
        (lambda h: h([1]), TypeError, "features: expected a Tensor, got list"),
        (
            lambda h: h.loss(torch.zeros(3, D), torch.arange(2)),
            ValueError,
            r"rows: expected shape \[3\] to match features, got \[2\]",
        ),
        (
            lambda h: h.loss(torch.zeros(3, D), torch.arange(3).int()),
            TypeError,
            "rows: expected dtype int64, got int32",
        ),
        (
            lambda h: h.loss(torch.zeros(0, D), torch.arange(0)),
            ValueError,
            r"rows: expected B >= 1, got \[0\]",
        ),
        (
            lambda h: h.loss(torch.zeros(3, D), torch.tensor([0, -1, 2])),
            ValueError,
            "rows: expected values from 0 to 59, got -1",
        ),
        (
            lambda h: h.loss(torch.zeros(2, D), torch.tensor([59, 60])),
            ValueError,
            "rows: expected values from 0 to 59, got 60",
        ),
        (
            lambda h: h.relabel(torch.zeros(N, K), H),
            ValueError,
            "head: expected an int from 0 to 2",
        ),
        (lambda h: h.relabel(torch.zeros(N, K), "0"), TypeError, "head: expected an int, got '0'"),
        (
            lambda h: h.relabel(torch.zeros(N, K + 1), 0),
            ValueError,
            r"log_probabilities: expected shape \[60, 5\], got \[60, 6\]",
        ),
        (
            lambda h: h.relabel(lambda head: None, 0),
            TypeError,
            "log_probabilities: expected a Tens",
        ),
        (
            lambda h: h.relabel_features(torch.zeros(N - 1, D), 0),
            ValueError,
            r"features: expected shape \[60, 6\], got \[59, 6\]",
        ),
    ],
)
def test_refused_calls(call, error, text):
    with pytest.raises(error, match=text):
        call(_heads())


def test_examples_run():
    page = Path(__file__).parents[1] / "docs" / "sela.md"
    for result in (doctest.testmod(module), doctest.testfile(str(page), module_relative=False)):
        assert not result.failed
        assert result.attempted
