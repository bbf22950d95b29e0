# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of k-means through the interpreter: labels are those of float64 on every path,
sums keep their digits and their bits. Every buffer lies between guard bands.
"""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from _interpreted import INTERPRETED_BACKEND, NEEDS_INTERPRETER, random
from _subprocess import output_of
from torch import Tensor

from clam_kernels import testing
from python_fallback import kmeans as truth

pytestmark = [NEEDS_INTERPRETER, INTERPRETED_BACKEND]


@pytest.fixture
def kernels():
    return importlib.import_module("clam_kernels.kernels.kmeans.assign")


def _assign(*args: object) -> tuple[Tensor, Tensor]:
    labels, sqdist = torch.ops.clam.kmeans_assign(*args)
    return labels, sqdist


def _assert_agrees(*args: object) -> Tensor:
    """Check labels and distances of a call against the equation in float64."""
    labels, sqdist = _assign(*args)
    expected, far = truth.kmeans_assign(*args)
    torch.testing.assert_close(labels, expected, rtol=0, atol=0)
    torch.testing.assert_close(sqdist, far, rtol=1e-6, atol=0, equal_nan=True)
    return labels


# ---- assignment ----------------------------------------------------------------------------------

SAMPLES = [(op, s.name) for op in ("kmeans_assign", "kmeans_update") for s in testing.samples(op)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("op", "name"), SAMPLES)
def test_samples(backend, op, name, dtype):
    (sample,) = (s for s in testing.samples(op) if s.name == name)
    if dtype not in sample.dtypes:
        pytest.skip("the grid is too coarse")
    args = sample.cast(dtype).args
    if op == "kmeans_assign":
        _assert_agrees(*args)
        return
    (sums, counts), (expected, counted) = (
        torch.ops.clam.kmeans_update(*args),
        truth.kmeans_update(*args),
    )
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-6 * scale)
    torch.testing.assert_close(counts, counted, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("n", "k", "d"), [(70, 33, 150), (40, 9, 700), (50, 1, 3), (257, 300, 5)])
def test_narrow_and_wide(backend, n, k, d):
    _assert_agrees(random(n, d), random(k, d, seed=1))


@pytest.mark.parametrize("n", [1, 65])
def test_equal_centroids(backend, monkeypatch, n):
    """Ties across tiles and in the last tile, which is not full; nor is the last tile of rows."""
    launch = importlib.import_module("clam_kernels.kernels.common.launch")
    real = launch.settings
    monkeypatch.setattr(launch, "settings", lambda *arguments: {**real(*arguments), "ROWS": 64})
    c = random(1, 7, seed=1).expand(130, 7).contiguous()
    assert not _assert_agrees(random(n, 7), c).any()
    c[:65] += 1.0
    assert set(_assign(c[70:75], c)[0].tolist()) == {65}


@pytest.mark.parametrize("offset", [1e4, 1e5])
@pytest.mark.parametrize("has_shift", [True, False])
def test_far_from_the_origin(backend, offset, has_shift):
    centroids = offset + 3 * random(32, 16)
    x = centroids[torch.arange(600) % 32] + 0.3 * random(600, 16, seed=1)
    labels = _assert_agrees(x, centroids, x.double().mean(0).float() if has_shift else None)
    assert torch.equal(labels, torch.arange(600) % 32)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("size", [1e-41, 1e-30, 1e-19, 1e18, 1e19, 1e38])
def test_huge_and_tiny(backend, size):
    """If scores overflow or underflow, float64 decides."""
    _assert_agrees(random(40, 3) * size, random(9, 3, seed=1) * size)


@pytest.mark.parametrize("offset", [0, 4096])
def test_digits(backend, offset):
    """Integers, and rows as centroids: exact ties, which scores do not resolve."""
    datasets = pytest.importorskip("sklearn.datasets")
    x = torch.as_tensor(datasets.load_digits().data).float() + offset
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[:10]
    far = (x.long()[:, None] - x.long()[rows]).square().sum(-1)
    tied = far == far.amin(1, keepdim=True)
    assert int((tied.sum(1) > 1).sum()) == 4
    labels, sqdist = _assign(x, x[rows], None, None, False)
    assert torch.equal(labels, tied.int().argmax(1))
    assert sqdist.shape == (0,)


def test_labels_if_no_centroid_can_win(backend):
    x, masked = random(20, 3), torch.full((9, 3), math.nan)
    x[3, 1] = math.inf
    labels, sqdist = _assign(x, masked)
    assert set(labels.tolist()) == {-1}
    assert torch.equal(sqdist.isnan(), torch.arange(20) == 3)
    assert int(sqdist.isinf().sum()) == 19


# ---- how the label of a row is computed ----------------------------------------------------------


def _bounded(monkeypatch: pytest.MonkeyPatch, unit: float) -> None:
    """Set another bound on the error of a product."""
    assign = importlib.import_module("clam_kernels.kernels.kmeans.assign")
    monkeypatch.setattr(assign, "unit", lambda precision, d: unit)


NOTHING = -1.0  # a bound below 0: scores decide every row


@pytest.mark.parametrize("d", [5, 150])
def test_two_candidates_in_float64(backend, monkeypatch, d):
    """Pairs of centroids one rounding apart: scores alone give wrong labels; float64 on the pair
    decides.
    """
    centers = 4 * random(10, d)
    near = torch.nextafter(centers, centers + random(10, d, seed=1).sign())
    c = torch.stack([centers, near], 1).flatten(0, 1)
    x = centers[torch.arange(60) % 10] + 0.1 * random(60, d, seed=2)
    expected = truth.kmeans_assign(x, c)[0]
    _bounded(monkeypatch, NOTHING)
    assert not torch.equal(_assign(x, c)[0], expected)
    _bounded(monkeypatch, 2.0**-9)
    _assert_agrees(x, c)
    # no other centroids: a third candidate is impossible, however wide the bound
    _assert_agrees(x[::6], c[:2])
    _bounded(monkeypatch, 1e9)
    _assert_agrees(x[::6], c[:2])


@pytest.mark.parametrize("unit", [1e9, math.inf, math.nan])
@pytest.mark.parametrize("d", [3, 150])
def test_all_candidates_in_float64(backend, monkeypatch, d, unit):
    """Every row meets every centroid; some centroids occur three times."""
    c = random(70, d, seed=1)
    c[40:60] = c[:20]
    c[66:] = c[:4]
    c[7] = math.nan
    mask = torch.zeros(70, dtype=torch.bool)
    mask[0] = True
    _bounded(monkeypatch, unit)
    _assert_agrees(random(8 if d > 3 else 50, d), c, None, mask)


def test_equal_to_rounding_is_a_tie(backend, monkeypatch):
    """The label is the lowest index within 2^-40 of the minimum, not the first that the
    sweep loads.
    """
    step = 2.0**-12
    far = 1 + torch.tensor([1.5, 0.8, 0.0, 0.5, 2.0], dtype=torch.float64) * 2.0**-41
    # |x - c|^2 = far: one long coordinate, and one whose square is the remainder
    c = torch.stack([torch.ones(5, dtype=torch.float64), (far - 1).sqrt()], 1).float()
    result = (c.double().square().sum(1) - 1) / 2.0**-41
    assert torch.allclose(result, (far - 1) / 2.0**-41, atol=1e-5), step
    for order in ([0, 1, 2, 3, 4], [4, 0, 3, 2, 1], [2, 0, 1], [4, 2], [2, 4]):
        for bound in (2.0**-24, 1e9):
            _bounded(monkeypatch, bound)
            _assert_agrees(torch.zeros(3, 2), c[order])


@pytest.mark.parametrize(("mode", "wrong"), [("medium", True), ("high", False)])
def test_structureless_rows(backend, monkeypatch, mode, wrong):
    """No score of one half precision product can decide these rows; the labels are exact."""
    x, c = random(4000, 3), random(64, 3, seed=1)
    expected = truth.kmeans_assign(x, c)[0]
    with monkeypatch.context() as patched:
        _bounded(patched, NOTHING)
        result = _assign(x, c, None, None, False, mode)[0]
        assert bool((result != expected).any()) == wrong
    assert torch.equal(_assign(x, c, None, None, False, mode)[0], expected)


@pytest.mark.parametrize("k", [63, 64, 130, 3000])
def test_codes_of_tiles_are_in_the_bound(backend, k):
    """The last bits of a score are the tile's index; centroids closer than these bits are ties of
    scores.
    """
    x = random(40, 2)
    c = 1 + 1e-5 * random(k, 2, seed=1)
    _assert_agrees(x, c)
    _assert_agrees(c[:40] + 1e-6 * x, c)


def _parts(x: Tensor, halves: int) -> list[Tensor]:
    """The parts of a scaled factor that the matrix units get."""
    parts: list[Tensor] = []
    for _ in range(halves):
        parts.append((x - sum(parts, torch.zeros(()))).half().float())
    return parts


@pytest.mark.parametrize(("precision", "halves"), [("f16", 1), ("f16x3", 2)])
def test_the_error_of_products_is_bounded(backend, precision, halves):
    """The bounds of both kinds of product hold, and each kind exceeds the bound of the
    finer one.
    """
    nearest = importlib.import_module("clam_kernels.kernels.kmeans.nearest")
    bound, worst = nearest.ROUNDED[precision], 0.0
    for d in (1, 3, 64):
        x, c = random(60_000 // d, d), random(60_000 // d, d, seed=1)
        x = x * 2.0 ** (7 - x.abs().amax(1, keepdim=True).log2().floor())
        c = c * 2.0 ** (7 - c.norm(dim=1, keepdim=True).log2().floor())
        parts = [_parts(t, halves) for t in (x, c)]
        product = sum(
            (a.double() * b.double()).sum(1)
            for i, a in enumerate(parts[0]) for j, b in enumerate(parts[1]) if i + j < halves
        )  # fmt: skip
        error = (product - (x.double() * c.double()).sum(1)).abs()
        worst = max(worst, float((error / (x.double().norm(dim=1) * c.double().norm(dim=1))).max()))
    assert bound / 8 <= worst <= bound
    # float32 sums beside it: the steps of 2^-24, rows of every size
    for d in (3, 64, 700):
        x, c = random(200, d), random(50, d, seed=1)
        error = ((x @ c.T).double() - x.double() @ c.double().T).abs().amax(1)
        allowed = (nearest.unit(precision, d) - bound) * x.norm(dim=1) * c.norm(dim=1).max()
        assert bool((error <= allowed).all())


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-20, 1.0, 127.9, 1e20, 3e38])
def test_powers_are_exact_inverses(backend, kernels, size):
    """For ordinary magnitudes and for the smallest and largest of float32."""
    import triton
    import triton.language as tl

    halves = importlib.import_module("clam_kernels.kernels.common.halves")

    @triton.jit
    def applied(X, OUT, F: tl.constexpr):
        at = tl.arange(0, 16)
        tl.store(OUT + at, F(tl.load(X + at)))

    x = torch.full((16,), size)
    x[1:] = torch.nextafter(x[1:], torch.tensor(0.0))
    up, down = torch.empty(16), torch.empty(16)
    applied[(1,)](x, up, halves.power)
    applied[(1,)](x, down, halves.unpower)
    assert torch.equal(up.double() * down.double(), torch.ones(16, dtype=torch.float64))
    if size > 1e-36:
        assert bool(((x * up >= 128) & (x * up < 256)).all())


# ---- sums by label -------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "k", "d"), [(500, 3, 5), (200, 40, 3), (60, 4, 130)])
def test_pieces(backend, monkeypatch, kernels, n, k, d, weighted):
    """Labels without a row, with a whole piece, and with one row more."""
    monkeypatch.setattr(kernels, "PIECE", 32)
    monkeypatch.setattr(kernels, "TILE", 16)
    labels = torch.randint(-1, k + 1, (n,), generator=torch.Generator().manual_seed(0))
    labels[:32], labels[32 : 65 if n > 100 else 33] = 0, 1
    labels[labels == 2] = -5
    x, weight = random(n, d), random(n, seed=1).square() if weighted else None
    sums, counts = torch.ops.clam.kmeans_update(x, labels, k, weight)
    expected = torch.zeros(k + 1, d, dtype=torch.float64)
    share = torch.ones(n, dtype=torch.float64) if weight is None else weight.double()
    at = torch.where((labels >= 0) & (labels < k), labels, k)
    expected.index_add_(0, at, x.double() * share[:, None])
    torch.testing.assert_close(sums, expected[:k], rtol=0, atol=1e-5)
    counted = torch.zeros(k + 1, dtype=torch.float64).index_add_(0, at, share)[:k]
    torch.testing.assert_close(counts, counted if weighted else counted.long(), rtol=1e-14, atol=0)
    again = torch.ops.clam.kmeans_update(x, labels, k, weight)
    assert torch.equal(again[0], sums)
    assert torch.equal(again[1], counts)


def test_labels_of_any_strides(backend):
    """A sort keeps the strides of its input."""
    labels = torch.randint(3, (9, 2), generator=torch.Generator().manual_seed(0)).T
    x = random(9, 2)
    sums, counts = torch.ops.clam.kmeans_update(x, labels, 3, None, None)
    expected, counted = truth.kmeans_update(x, labels, 3)
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-6)
    assert torch.equal(counts, counted)


@pytest.mark.parametrize("k", [3, 300, 40_000])
def test_keys_of_one_two_and_four_bytes(backend, kernels, k):
    labels = torch.tensor([k - 1, -1, 1, k - 1, k, 1, 0, 1, -(1 << 40), 1 << 40])
    order, starts, before, owner = kernels.segments(labels, k, 2)
    assert order.tolist() == [6, 2, 5, 7, 0, 3, 1, 4, 8, 9]
    assert [starts[i].item() for i in (0, 1, 2, k - 1, k)] == [0, 1, 4, 4, 6]
    assert [before[i].item() for i in (0, 1, 2, k - 1, k)] == [0, 1, 3, 3, 4]
    assert owner.tolist() == [0, 1, 1, k - 1] + [k] * (1 + min(k, 10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_keep_their_digits(backend, dtype):
    """Far from the origin, with a shift that float32 cannot represent."""
    shift = torch.tensor([100.0, 1e4 + 1 / 3], dtype=torch.float64).to(dtype)
    x = (shift.double() + random(20_000, 2).double()).float()
    sums, counts = torch.ops.clam.kmeans_update(x, torch.zeros(20_000).long(), 1, None, shift)
    gap = x.double() - shift.double()
    error = (sums[0] / counts - gap.mean(0)).abs()
    assert bool((error <= 2.0**-22 * gap.abs().mean(0)).all())


def test_weights_that_float32_cannot_hold(backend):
    x, labels = random(50, 2), torch.arange(50) % 3
    weight = random(50, seed=1).double().abs() * 1e-60
    (sums, counts), (expected, counted) = (
        f(x, labels, 3, weight) for f in (torch.ops.clam.kmeans_update, truth.kmeans_update)
    )
    torch.testing.assert_close(sums / 1e-60, expected / 1e-60, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(counts, counted, rtol=1e-14, atol=0)


# ---- shapes --------------------------------------------------------------------------------------


def test_a_row_has_the_same_label_wherever_it_stands(backend):
    x, c = random(300, 4), random(70, 4, seed=1)
    labels, sqdist = _assign(x, c)
    part = _assign(x[100:171], c)
    assert torch.equal(part[0], labels[100:171])
    assert torch.equal(part[1], sqdist[100:171])


def test_offsets_are_64_bits_wide(backend):
    """A batch stride past 2^31 reaches the right rows: the operands are views of one large
    buffer.
    """
    far = (1 << 31) + 64
    try:
        buffer = torch.empty(far + 12)
    except RuntimeError:
        pytest.skip("no 8 GB of address space here")
    x = buffer.as_strided((2, 3, 4), (far, 4, 1))
    small = random(2, 3, 4)
    x.copy_(small)
    c, labels = random(2, 5, 4, seed=1), torch.tensor([[0, 1, 0], [1, 1, -1]])
    result = _assign(x, c)
    assert torch.equal(result[0], truth.kmeans_assign(small, c)[0])
    sums, _ = torch.ops.clam.kmeans_update(x, labels, 2)
    torch.testing.assert_close(sums, truth.kmeans_update(small, labels, 2)[0], rtol=1e-6, atol=1e-6)


def test_many_shapes_need_few_compilations(backend):
    """Thirty row and centroid counts and batches need a handful of specialisations."""
    code = (
        "import sys; sys.path.insert(0, 'tools')\n"
        "import torch, resources\n"
        "from clam_kernels.kernels.kmeans import assign\n"
        "keys = {}\n"
        "for i in range(30):\n"
        "    x = torch.zeros(*([3] if i % 5 == 0 else []), 1000 + 37 * i, 16)\n"
        "    k = 70 + 13 * i\n"
        "    c, labels = torch.zeros(k, 16), torch.zeros(x.shape[:-1], dtype=torch.int64)\n"
        "    c = c.expand(2, k, 16).clone() if i % 7 == 3 else c\n"
        "    x = x[0] if c.ndim == 3 and x.ndim == 3 else x\n"
        "    labels = labels if labels.ndim < x.ndim else labels[0]\n"
        "    def call():\n"
        "        assign.kmeans_assign(x, c, None, None, True, 'highest')\n"
        "        assign.kmeans_update(x, labels, k, None, None)\n"
        "    for one in resources.record('sm_90', call):\n"
        "        keys.setdefault(one.name, set()).add(repr(resources.signature(one)))\n"
        "print(max(map(len, keys.values())), {n: len(one) for n, one in keys.items()})\n"
    )
    output = output_of(code)
    assert int(output.split()[0]) <= 4, output
