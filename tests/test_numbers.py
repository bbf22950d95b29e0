# SPDX-License-Identifier: Apache-2.0
"""Numpy's numbers are accepted wherever a Python number is, and give the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import Tensor

import clam_kernels as ck
from clam_kernels import ClAM, KMeans
from clam_kernels.nn import AssociativeMemory, SelfLabeller

INTS = [np.int64, np.int32, np.uint8, np.int8]
FLOATS = [np.float64, np.float32, np.float16]


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _equal(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


# ---- ops and layers ------------------------------------------------------------------------------

V, RHO = _draw(6, 3), _draw(4, 3)
LABELS = torch.arange(6) % 3
OPS = {
    "kmeans_update k": lambda n: ck.kmeans_update(V, LABELS, n(3)),
    "am_recursion steps": lambda n: ck.am_recursion(V, RHO, 1.0, n(3)),
    "layer sizes": lambda n: (torch.manual_seed(0), AssociativeMemory(n(4), n(3)))[1](V),
    "layer steps": lambda n: AssociativeMemory.from_patterns(RHO, steps=n(3))(V),
    "forward steps": lambda n: AssociativeMemory.from_patterns(RHO)(V, steps=n(3)),
    "step as an int": lambda n: ck.am_step(V, RHO, 1.0, step=n(1)),
    "epsilon as an int": lambda n: ck.sinkhorn(V, epsilon=n(1)).codes(),
    "lam as an int": lambda n: _relabelled(lam=n(5)),
}
REALS = {
    "am_step step": lambda n: ck.am_step(V, RHO, 1.0, step=n(0.5)),
    "am_recursion step": lambda n: ck.am_recursion(V, RHO, 1.0, 3, step=n(0.5)),
    "am_step beta": lambda n: ck.am_step(V, RHO, n(2.0)),
    "am_energy beta": lambda n: ck.am_energy(V, RHO, n(2.0)),
    "layer": lambda n: AssociativeMemory.from_patterns(RHO, step=n(0.5), beta=n(2.0))(V),
    "layer.beta": lambda n: _with_beta(n(2.0))(V),
    "sinkhorn epsilon": lambda n: ck.sinkhorn(V, epsilon=n(0.25)).codes(),
    "sinkhorn tol": lambda n: ck.sinkhorn(V, epsilon=n(0.5), tol=n(0.125)).codes(),
    "swav_codes epsilon": lambda n: ck.swav_codes(V, epsilon=n(0.25)),
    "sela_labels": lambda n: ck.sela_labels(V.log_softmax(1), lam=n(5.0), tol=n(0.125)),
    "SelfLabeller": lambda n: _relabelled(lam=n(5.0), tol=n(0.125)),
}
WORDS_OF_REALS = {
    "beta": ("a number or a Tensor", lambda x: ck.am_step(V, RHO, x)),
    "epsilon": ("a number or a Tensor", lambda x: ck.sinkhorn(V, epsilon=x)),
    "tol": ("a number", lambda x: ck.sinkhorn(V, tol=x)),
    "lam": ("a number", lambda x: ck.sela_labels(V.log_softmax(1), lam=x)),
    "lam of SelfLabeller": ("a number", lambda x: _relabelled(lam=x)),
}


def _relabelled(**settings: Any) -> Tensor:
    heads = SelfLabeller(3, 2, 6, 1, generator=torch.Generator().manual_seed(0), **settings)
    heads.relabel_features(V, 0)
    return torch.cat([heads.g.flatten(), heads.labels.flatten().double()])


def _with_beta(beta: Any) -> AssociativeMemory:
    layer = AssociativeMemory.from_patterns(RHO)
    layer.beta = beta
    return layer


@pytest.mark.parametrize("kind", INTS)
@pytest.mark.parametrize("call", OPS.values(), ids=OPS.keys())
def test_integers_of_ops_and_layers(call, kind):
    _equal(call(kind), call(int))


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("call", REALS.values(), ids=REALS.keys())
def test_floats_of_ops_and_layers(call, kind):
    _equal(call(kind), call(float))


def test_a_layer_stores_python_numbers():
    """torch.compile treats an attribute that is a numpy number as an array."""
    layer = AssociativeMemory(np.int64(4), np.int64(3), steps=np.int64(2), step=np.float32(0.5))
    assert [type(x) for x in (layer.steps, layer.step)] == [int, float]
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    _equal(compiled(V), layer(V))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (OPS["kmeans_update k"], "k: expected an int >= 1, got {}"),
        (OPS["am_recursion steps"], "steps: expected an int >= 0, got {}"),
        (OPS["layer steps"], "steps: expected an int >= 0, got {}"),
        (OPS["layer sizes"], "n_memories: expected an int >= 1, got {}"),
    ],
    ids=["k", "steps", "layer steps", "layer sizes"],
)
@pytest.mark.parametrize("value", [np.float64(3.0), np.bool_(True), np.array(3), True])
def test_values_that_are_no_integers_are_refused(call, text, value):
    with pytest.raises(TypeError) as caught:
        call(lambda _: value)
    assert str(caught.value) == text.format(repr(value))


@pytest.mark.parametrize("value", [np.bool_(True), np.array(0.5), torch.tensor(0.5), True])
def test_values_that_are_no_steps_are_refused(value):
    for call in (REALS["am_step step"], REALS["am_recursion step"]):
        with pytest.raises(TypeError) as caught:
            call(lambda _: value)
        assert str(caught.value) == f"step: expected a number, got {type(value).__name__}"


@pytest.mark.parametrize("value", ["a", 1j, np.array(0.5), np.bool_(True), True])
@pytest.mark.parametrize("name", WORDS_OF_REALS)
def test_an_error_names_the_argument_that_is_no_number(name, value):
    expected, call = WORDS_OF_REALS[name]
    with pytest.raises(TypeError) as caught:
        call(value)
    text = f"{name.split()[0]}: expected {expected}, got {type(value).__name__}"
    assert str(caught.value) == text


def test_an_error_names_a_lam_without_an_inverse():
    with pytest.raises(ValueError, match=r"lam: expected a number from 1.2e-38 to 3.4e\+38"):
        ck.sela_labels(V.log_softmax(1), lam=1e-60)


def test_symbolic_numbers_are_traced():
    """One graph for every k and every number of steps, as for plain ints."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def call(v: Tensor, n: int) -> tuple[Tensor, ...]:
        return *ck.kmeans_update(v, LABELS, n), ck.am_recursion(v, RHO, 1.0, n)

    compiled = torch.compile(call, backend=backend, fullgraph=True)
    for n in (3, 4, 5, 6):
        _equal(compiled(V, n), call(V, n))
    torch._dynamo.reset()
    assert len(graphs) <= 2


# ---- estimators ----------------------------------------------------------------------------------

X = np.concatenate([np.random.default_rng(i).normal(4 * i, 1, (40, 3)) for i in range(3)])
HOLED = np.where(np.random.default_rng(9).random(X.shape) < 0.1, np.nan, X)
# whole numbers, and numbers that every float type represents exactly
MODELS = {
    "KMeans": (
        KMeans,
        {"n_clusters": 3, "n_init": 2, "max_iter": 5, "chunk_rows": 50, "random_state": 0},
        {"tol": 0.25},
    ),
    "KMeans minibatch": (
        KMeans,
        {"n_clusters": 3, "n_init": 2, "max_iter": 5, "batch_size": 64, "random_state": 0},
        {"tol": 0.0},
    ),
    "KMeans parallel": (KMeans, {"n_clusters": 3, "random_state": 0}, {}),
    "ClAM": (
        ClAM,
        {"n_clusters": 3, "n_init": 4, "max_iter": 4, "batch_size": 64, "steps": 2,
         "search_rows": 100, "random_state": 0},
        {"beta": 1.5, "step": 0.5, "mask_ratio": 0.25, "learning_rate": 0.125,
         "inertia_guard": 1.5, "am_share": 0.5, "min_cluster_size": 1.0},
    ),
    "ClAM paper": (
        ClAM,
        {"n_clusters": 3, "n_init": 2, "max_iter": 2, "steps": 3, "random_state": 0},
        {"beta": 1.5, "step": 0.5, "mask_ratio": 0.25, "learning_rate": 0.125},
    ),
}  # fmt: skip
WORDS = {
    "KMeans minibatch": {"algorithm": "minibatch"},
    "KMeans parallel": {"init": "k-means||"},
    "ClAM paper": {"recipe": "paper"},
}


def _models(name: str, whole: Any, real: Any) -> tuple[Any, Any]:
    """An estimator with numpy's numbers, and the same with Python's."""
    kind, ints, floats = MODELS[name]
    words = WORDS.get(name, {})
    options = {n: whole(x) for n, x in ints.items()} | {n: real(x) for n, x in floats.items()}
    return kind(**options, **words), kind(**ints, **floats, **words)


@pytest.mark.parametrize(("whole", "real"), [(np.int64, np.float64), (np.uint8, np.float16)])
@pytest.mark.parametrize("name", MODELS)
def test_estimators(name, whole, real, tmp_path):
    model, plain = _models(name, whole, real)
    data = HOLED if name == "ClAM" else X
    before = model.get_params()
    model.fit(data)
    plain.fit(data)
    for one, other in ((model, plain), (clone(model).fit(data), plain)):
        assert np.array_equal(one.labels_, other.labels_)
        assert np.array_equal(one.cluster_centers_, other.cluster_centers_)
        assert np.array_equal(one.predict(data), other.predict(data))
        assert one.score(data) == other.score(data)
    after = model.get_params()
    assert all(after[key] is value for key, value in before.items())
    if name.startswith("ClAM"):
        result, expected = (
            m.complete(HOLED, beta=b(1.5), steps=s(3), step=b(0.5))
            for m, s, b in ((model, whole, real), (plain, int, float))
        )
        assert np.array_equal(result, expected)
    model.save(tmp_path / "model.safetensors")
    again = type(model).load(tmp_path / "model.safetensors")
    assert np.array_equal(again.predict(data), plain.predict(data))


@pytest.mark.parametrize(("whole", "real"), [(np.int64, np.float64), (np.uint8, np.float16)])
def test_partial_fit(whole, real):
    model, plain = _models("ClAM", whole, real)
    for part in (X[::2], X[1::2]):
        model.partial_fit(part)
        plain.partial_fit(part)
    assert np.array_equal(model.cluster_centers_, plain.cluster_centers_)


def test_a_callback_may_set_another_number():
    """A fit leaves the parameters as they are; one that a callback sets keeps its new value."""
    numbers = []

    def callback(model: Any, info: Any) -> None:
        numbers.append((model.n_clusters, type(model.n_clusters)))
        model.set_params(tol=0.5)

    model = KMeans(np.int64(3), tol=np.float32(0.25), callbacks=callback, random_state=0).fit(X)
    assert set(numbers) == {(3, np.int64)}
    assert (model.n_clusters, type(model.n_clusters), model.tol) == (3, np.int64, 0.5)


@pytest.mark.parametrize("kind", [KMeans, ClAM])
def test_a_failed_fit_leaves_the_numbers(kind):
    model = kind(n_clusters=np.int64(500))
    with pytest.raises(ValueError, match="n_samples"):
        model.fit(X)
    assert type(model.n_clusters) is np.int64
    with pytest.raises(TypeError, match="n_clusters: expected an int >= 1, got True"):
        kind(n_clusters=True).fit(X)
