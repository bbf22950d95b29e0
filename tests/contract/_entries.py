# SPDX-License-Identifier: Apache-2.0
"""A call of every public function, layer and estimator, for tests of rules that all calls follow.
Every tensor here has a device and a dtype of its own, so that the calls mean the same under each
setting of torch.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

import clam_kernels as ck
from clam_kernels import metrics, testing
from clam_kernels.nn import AssociativeMemory, SelfLabeller

N, D, K = 60, 4, 3
RANDOM = np.random.default_rng(0)
LABELS = np.arange(N) % K
X = (3.0 * np.eye(K, D)[LABELS] + RANDOM.normal(size=(N, D))).astype(np.float32)
GAPS = np.where(RANDOM.random((N, D)) < 0.1, np.nan, X)
WEIGHTS = RANDOM.uniform(0.5, 2.0, N)
SCORES = RANDOM.normal(size=(N, K)).astype(np.float32)
SHARES = np.array([0.5, 0.3, 0.2])
SAMPLES = {spec.name: testing.samples(spec.name) for spec in ck.all_ops()}
Calls = dict[str, Callable[[], Any]]


def tensor(array: Any) -> Tensor:
    """A copy, on the CPU and in the dtype of the array."""
    return torch.from_numpy(np.array(array))


def generator() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)


def leaves(value: Any) -> Iterator[Any]:
    """The tensors, arrays and plain values of a result, in order."""
    if isinstance(value, dict):
        value = [part for pair in value.items() for part in pair]
    if isinstance(value, list | tuple):
        for part in value:
            yield from leaves(part)
    else:
        yield value


def same(result: Any, expected: Any) -> None:
    """Whether two results are equal in type, dtype, device and every bit."""
    pairs = list(leaves(result)), list(leaves(expected))
    assert len(pairs[0]) == len(pairs[1])
    for a, b in zip(*pairs, strict=True):
        assert type(a) is type(b)
        if isinstance(a, Tensor):
            assert (a.dtype, a.device) == (b.dtype, b.device)
            a, b = a.detach().double().numpy(), b.detach().double().numpy()
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b or (a != a and b != b)


# ---- ops and metrics -----------------------------------------------------------------------------


def _on_samples(name: str) -> Any:
    """Call an op on all its samples, with gradients, and its truth."""
    result, spec = [], testing.spec_of(name)
    for sample in SAMPLES[name]:
        values = testing.evaluate(spec.packet, sample, sample.differentiable)
        result.append([*values.outputs, *values.gradients.values(), spec.truth(*sample.args)])
        result.append(spec.truth(*sample.cast(torch.float32).args))
    return result


def _functions() -> Calls:
    """Call the documented functions with plain arguments."""
    x, c, s = tensor(X), tensor(X[:K]), tensor(SCORES)
    labels, share = tensor(LABELS), tensor(SHARES[:1])
    return {
        "am_step": lambda: ck.am_step(x, c, 1.5, step=0.5),
        "am_recursion": lambda: ck.am_recursion(x, c, 1.5, 4),
        "am_energy": lambda: ck.am_energy(x, c, 1.5),
        "am_assign": lambda: ck.am_assign(x, c),
        "kmeans_assign": lambda: ck.kmeans_assign(x, c),
        "kmeans_update": lambda: ck.kmeans_update(x, labels, K),
        "kmeans_step": lambda: ck.kmeans_step(x, c),
        "student_t_stats": lambda: ck.student_t_stats(x, c, alpha=2.0, weight=tensor(WEIGHTS)),
        "dec_target": lambda: [
            ck.dec_target(x, c, store=store, dtype=torch.bfloat16).rows(labels).shares()
            for store in ("dense", "recompute")
        ],
        "dec_loss": lambda: [_deep(mode, alpha) for mode in _MODES for alpha in (1.0, share)],
        "dec_losses of ops": lambda: ck.ops.dec.dec_losses(x, c),
        "proto_nce": lambda: [
            ck.proto_nce(x, c, 0.5, labels, reduction=r) for r in ("mean", "sum", "none")
        ],
        "proto_nce_losses": lambda: ck.ops.xent.proto_nce_losses(x, c, share[0], labels[None]),
        "swapped_prediction": lambda: _predict(x, c),
        "cluster_concentration": lambda: ck.cluster_concentration(x[:, 0].abs(), labels, K),
        "sinkhorn of ops": lambda: ck.ops.sinkhorn.sinkhorn_potentials(s, 3),
        "sinkhorn_potentials_features of ops": lambda: ck.ops.sinkhorn.sinkhorn_potentials_features(
            x, c, 3
        ),
        "sinkhorn_pass": lambda: ck.ops.sinkhorn.sinkhorn_pass(s, s[0]),
        "sinkhorn_features_pass": lambda: ck.ops.sinkhorn.sinkhorn_features_pass(x, c, s[0]),
    }


_MODES = ("frozen", "minibatch", "self")


def _predict(x: Tensor, c: Tensor) -> Any:
    """A loss of codes of the rows, and its gradients."""
    views = torch.stack([x, x.flip(0)])
    leaves = [views.clone().requires_grad_(), c.clone().requires_grad_()]
    f, g = ck.sinkhorn((views, c), epsilon=0.5, n_iter=3).code_potentials()
    loss = ck.swapped_prediction(*leaves, f, g, epsilon=0.5)
    return [f, g, loss.detach(), torch.autograd.grad(loss.sum(), leaves)]


def _deep(mode: str, alpha: Any) -> Any:
    """A loss of deep embedded clustering of some rows, and its gradients."""
    x, c, rows = tensor(X), tensor(X[:K]), torch.arange(0, N, 2, device="cpu")
    leaves = [x[rows].requires_grad_(), c.clone().requires_grad_()]
    target = ck.dec_target(x, c)
    loss = ck.dec_loss(*leaves, target, rows, alpha=alpha, mode=mode)
    return [loss.detach(), torch.autograd.grad(loss.sum(), leaves)]


def ops() -> Calls:
    calls: Calls = {f"{name} on samples": lambda name=name: _on_samples(name) for name in SAMPLES}
    calls |= _functions()
    calls["silhouette"] = lambda: metrics.silhouette(X, LABELS)
    calls["silhouette of a sample"] = lambda: metrics.silhouette(tensor(X), tensor(LABELS), 20)
    calls["choice"] = lambda: [ck.choice(name) for name in ck.list_ops()]
    calls["explain"] = lambda: [ck.explain(name) for name in ck.list_ops()]
    calls["samples"] = lambda: [
        [sample.args for sample in testing.samples(name)] for name in SAMPLES
    ]
    return calls


# ---- transport -----------------------------------------------------------------------------------


def _read(result: Any, scores: Any) -> Any:
    """Every output of a result of `sinkhorn`."""
    return [
        result.f, result.g, result.err, result.status, result.n_iter, result.codes(), result.plan(),
        result.labels(), result.topk(2), result.counts(), result.value(), result.entropy(),
        result.assign(scores),
    ]  # fmt: skip


def _differentiated(gradient: str, features: bool, **rest: Any) -> Any:
    scores: Any = tensor(SCORES).requires_grad_()
    inputs = [scores]
    if features:
        inputs = [tensor(X).requires_grad_(), tensor(X[:K]).requires_grad_()]
        scores = tuple(inputs)
    result = ck.sinkhorn(scores, gradient=gradient, **rest)
    loss = result.value() if gradient == "envelope" else result.codes().square().sum()
    return torch.autograd.grad(loss, inputs)


def transport() -> Calls:
    s, pair = tensor(SCORES), (tensor(X), tensor(X[:K]))
    share, mass = tensor(SHARES), tensor(WEIGHTS / WEIGHTS.sum())
    mask = torch.arange(N, device="cpu") % 5 > 0
    marginals = {"row_marginal": mass, "col_marginal": share}
    tight = {"tol": 1e-4, "epsilon": 0.5}
    shut = s.masked_fill(tensor(RANDOM.random((N, K)) < 0.3), -torch.inf)
    shut[:, 0] = s[:, 0]
    return {
        "sinkhorn": lambda: _read(ck.sinkhorn(s), s),
        "sinkhorn of features": lambda: _read(ck.sinkhorn(pair, epsilon=0.5), pair),
        "sinkhorn with marginals": lambda: _read(ck.sinkhorn(s, **marginals, **tight), s),
        "sinkhorn of masked rows": lambda: _read(ck.sinkhorn(s, row_mask=mask), s),
        "sinkhorn, rows first": lambda: _read(
            ck.sinkhorn(s, prototype_first=False, bias=s[0], **tight), s
        ),
        "sinkhorn, accelerated": lambda: _read(ck.sinkhorn(s, accelerate="anderson", **tight), s),
        "sinkhorn, epsilon a tensor": lambda: _read(ck.sinkhorn(s, epsilon=share[0].float()), s),
        "strict labels": lambda: [
            ck.sinkhorn(x, **rest).labels(strict=True)
            for x in (s, torch.stack([s, -s]), pair)
            for rest in ({}, {"col_marginal": share})
        ],
        "strict labels with forbidden pairs": lambda: ck.sinkhorn(shut, epsilon=0.5).labels(True),
        "strict counts": lambda: ck.sinkhorn(s).counts(strict=True),
        "unrolled gradient": lambda: _differentiated("unrolled", False),
        "unrolled gradient of features": lambda: _differentiated("unrolled", True, epsilon=0.5),
        "implicit gradient": lambda: _differentiated("implicit", False, **tight),
        "implicit gradient of features": lambda: _differentiated("implicit", True, **tight),
        "envelope gradient": lambda: _differentiated("envelope", False, **tight),
        "swav_codes": lambda: ck.swav_codes(s),
        "swav_codes of masked rows": lambda: ck.swav_codes(s, row_mask=mask),
        "sela_labels": lambda: ck.sela_labels(s.log_softmax(1)),
        "sela_labels, strict": lambda: ck.sela_labels(s.log_softmax(1), strict=True),
    }


# ---- layers --------------------------------------------------------------------------------------


def _memory() -> AssociativeMemory:
    layer = AssociativeMemory(  # on meta: no draw from the global generator
        K, D, steps=3, beta=1.5, log_weights=True, device="meta", dtype=torch.float32
    )
    layer.to_empty(device="cpu").reset_parameters(generator())
    return layer


def _trained(layer: nn.Module, loss: Tensor) -> Any:
    """A loss, its gradients, and the state of the layer."""
    loss.backward()
    gradients = [p.grad for p in layer.parameters() if p.requires_grad]
    return [loss.detach(), *gradients, layer.state_dict()]


def _recall() -> Any:
    layer, x = _memory(), tensor(X)
    results = [layer.energy(x), layer.assign(x), layer.weights(x), layer.beta]
    return [results, _trained(layer, layer(x).square().sum())]


def _patterns() -> Any:
    layer = AssociativeMemory.from_patterns(tensor(X[:K]), steps=2, beta=tensor(SHARES * 4.0))
    hidden = torch.ones(N, D, dtype=torch.bool, device="cpu")
    hidden[:, 0] = False
    layer.beta = 2.0
    return [layer(tensor(X), update_mask=hidden), copy.deepcopy(layer).state_dict()]


def labeller(**rest: Any) -> SelfLabeller:
    return SelfLabeller(
        D, K, N, 2, generator=generator(), device="cpu", dtype=torch.float32, **rest
    )


def _relabelled(**rest: Any) -> Any:
    heads, x = labeller(**rest), tensor(X)
    one = heads.relabel_features(x, 0)
    two = heads.relabel(tensor(SCORES).log_softmax(1), 1)
    results = [one.err, one.changed, one.counts, two.n_iter, two.counts, heads.assign(x, 1)]
    loss = heads.loss(x[:7], torch.arange(7, device="cpu"))
    return [results, heads(x), heads.log_probabilities(x, 0), _trained(heads, loss)]


def _reloaded() -> Any:
    heads = labeller(col_marginal=tensor(SHARES))
    other = labeller(col_marginal=tensor(SHARES[::-1]))
    other.load_state_dict(heads.state_dict())
    other.reset_parameters(generator())
    return other.state_dict()


def layers() -> Calls:
    shares = {"col_marginal": SHARES, "row_marginal": WEIGHTS}
    start = torch.arange(N, device="cpu") % K
    return {
        "AssociativeMemory": _recall,
        "AssociativeMemory of patterns": _patterns,
        "SelfLabeller": _relabelled,
        "SelfLabeller, strict": lambda: _relabelled(
            strict=True, **{name: tensor(mass) for name, mass in shares.items()}
        ),
        "SelfLabeller with a start": lambda: _relabelled(start=start),
        "SelfLabeller, loaded": _reloaded,
    }


# ---- estimators ----------------------------------------------------------------------------------


def _saved(model: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "model")
        return type(model).load(Path(folder) / "model")


def _used(model: Any, x: Any, *methods: str) -> Any:
    """The attributes and the outputs of a fitted model, and the same after loading its file."""
    learned = [getattr(model, name) for name in ("cluster_centers_", "labels_", "inertia_")]
    results = [getattr(model, name)(x) for name in methods]
    again = _saved(model)
    return [*learned, results, [getattr(again, name)(x) for name in methods]]


def _kmeans(x: Any = X, weight: Any = None, **rest: Any) -> Any:
    settings = {"n_init": 2, "max_iter": 8, "random_state": 0, "device": "cpu", **rest}
    model = ck.KMeans(K, **settings).fit(x, sample_weight=weight)
    return _used(model, x, "predict", "transform", "score")


def _clam(x: Any = X, **rest: Any) -> Any:
    settings = {"n_init": 3, "max_iter": 4, "random_state": 0, "device": "cpu", **rest}
    model = ck.ClAM(K, **settings).fit(x)
    results = _used(
        model, x, "predict", "predict_proba", "transform", "score", "energy", "complete"
    )
    return [results, model.loss_curve_, model.candidates_, model.gap_, model.beta_]


def _imputed(x: Any) -> Any:
    return ck.ClAMImputer(K, n_init=2, max_iter=2, random_state=0, device="cpu").fit_transform(x)


def _streamed() -> Any:
    model = ck.ClAM(K, random_state=0, device="cpu")
    for part in (X[:30], X[30:]):
        model.partial_fit(part)
    return _used(model, X, "predict")


class Product(nn.Module):
    """A linear layer with fixed weights; torch's own draws them from the global generator."""

    def __init__(self, features: int, results: int) -> None:
        super().__init__()
        for name, shape in (("weight", (results, features)), ("bias", (results,))):
            value = torch.empty(shape, **_plain()).uniform_(-0.5, 0.5, generator=generator())
            setattr(self, name, nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def encoder() -> nn.Module:
    """A small encoder whose dropout draws from the global generator."""
    first, second = Product(D, 8), Product(8, 6)
    norm = nn.BatchNorm1d(8, **_plain())
    return nn.Sequential(first, norm, nn.ReLU(), nn.Dropout(0.2), second)


def _plain() -> dict[str, Any]:
    return {"device": "cpu", "dtype": torch.float32}


def noisy(batch: Tensor, random: torch.Generator) -> Tensor:
    noise = torch.randn(batch.shape, generator=random, device=batch.device, dtype=batch.dtype)
    return batch + 0.1 * noise


class LabelledRows(torch.utils.data.Dataset):
    """Rows as a map-style dataset, each with a label that SeLa ignores."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, row: int) -> Any:
        return X[row], LABELS[row]


def sela(x: Any = X, **rest: Any) -> Any:
    """A fit, its outputs, and the same fit resumed from its file."""
    settings = {"n_heads": 2, "n_epochs": 3, "batch_size": 16, "n_relabels": 3, "max_iter": 4000}
    settings |= {"augment": noisy, "random_state": 0, "device": "cpu", **rest}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        model = ck.SeLa(encoder(), K, **settings).fit(x, checkpoint=path)
        again = ck.SeLa(encoder(), K, **settings).fit(x, checkpoint=path, resume=True)
        model.export_labels(Path(folder) / "labels.npz")
        exported = dict(np.load(Path(folder) / "labels.npz"))
    states = [m.state_dict() for one in (model, again) for m in (one.encoder_, one.heads_)]
    results = [model.labels_, model.predict(x), model.transform(x), model.history_]
    return [results, states, exported]


class AutoencoderOfRows(nn.Module):
    """An encoder and a decoder in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = encoder(), Product(6, D)

    def encode(self, x: Tensor) -> Tensor:
        codes: Tensor = self.down(x)
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        rows: Tensor = self.up(codes)
        return rows


def dec(x: Any = X, **rest: Any) -> Any:
    """A fit, its outputs, the same fit resumed from its file, and a model from a file."""
    settings = {"hidden": (8,), "n_components": 3, "n_epochs": 2, "n_init": 2}
    settings |= {"pretrain_epochs": 60, "pretrain_learning_rate": 0.02}
    settings |= {"augment": noisy, "random_state": 0, "device": "cpu", **rest}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        model = ck.DEC(K, **settings).fit(x, checkpoint=path)
        again = ck.DEC(K, **settings).fit(x, checkpoint=path, resume=True)
        model.save(Path(folder) / "model")
        loaded = ck.DEC.load(Path(folder) / "model", encoder=settings.get("encoder"))
    states = [one.encoder_.state_dict() for one in (model, again, loaded)]
    results = [model.labels_, model.init_labels_, model.predict(x), model.predict_proba(x)]
    return [results, model.transform(x), model.score(x), model.history_, states]


def estimators() -> Calls:
    wide, x = X.astype(np.float64), tensor(X)
    return {
        "KMeans": _kmeans,
        "KMeans of float64": lambda: _kmeans(wide, weight=WEIGHTS),
        "KMeans of a tensor": lambda: _kmeans(x, weight=tensor(WEIGHTS)),
        "KMeans of a sparse matrix": lambda: _kmeans(sparse.csr_matrix(X)),
        "KMeans in pieces": lambda: _kmeans(chunk_rows=13),
        "KMeans, k-means||": lambda: _kmeans(init="k-means||"),
        "KMeans, random start": lambda: _kmeans(init="random", weight=WEIGHTS),
        "KMeans, init array": lambda: _kmeans(init=X[:K], n_init=1),
        "KMeans, empty clusters": lambda: [
            _kmeans(init=np.stack([X[0], X[0] + 99, X[0] + 98]), n_init=1, empty=word)
            for word in ("relocate", "split", "keep")
        ],
        "KMeans, cosine": lambda: _kmeans(metric="cosine"),
        "KMeans, minibatch": lambda: _kmeans(algorithm="minibatch", batch_size=16),
        "ClAM": _clam,
        "ClAM of a tensor": lambda: _clam(x),
        "ClAM of float64": lambda: _clam(wide),
        "ClAM with gaps": lambda: _clam(GAPS),
        "ClAM, paper": lambda: _clam(recipe="paper"),
        "ClAM, paper, with gaps": lambda: _clam(GAPS, recipe="paper", max_iter=2),
        "ClAM, random start": lambda: _clam(init="random", select="loss"),
        "ClAM, normal start": lambda: _clam(init="normal", select="inertia"),
        "ClAM, init array": lambda: _clam(init=X[:K], n_init=1),
        "ClAM searching a part": lambda: _clam(search_rows=30),
        "ClAM in parts": _streamed,
        "ClAMImputer": lambda: _imputed(GAPS),
        "DEC": dec,
        "DEC of a tensor": lambda: dec(x, target="self"),
        "DEC of a dataset": lambda: dec(LabelledRows(), target="minibatch"),
        "DEC, layer by layer": lambda: dec(pretrain="sdae"),
        "DEC of an own encoder": lambda: dec(encoder=AutoencoderOfRows(), variant="idec"),
        "SeLa": sela,
        "SeLa of a tensor": lambda: sela(x, strict=True),
        "SeLa of a dataset": lambda: sela(LabelledRows()),
        "SeLa with marginals": lambda: sela(col_marginal=SHARES, row_marginal=list(WEIGHTS)),
    }


ALL: Calls = {**ops(), **transport(), **layers(), **estimators()}
