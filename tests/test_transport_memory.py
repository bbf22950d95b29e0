# SPDX-License-Identifier: Apache-2.0
"""`sinkhorn` and its results allocate no N x K array beside their input and their output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clam_kernels import sinkhorn, swav_codes, testing

N, K = 20_000, 300
FEW = 4e6  # bytes; the scores are 24e6
OUTPUT = 4 * N * K


def _scores(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(N, K, generator=torch.Generator().manual_seed(0)).to(dtype)


def _mask() -> Tensor:
    return torch.arange(N) % 7 != 0


RULES = {
    "epsilon": {"epsilon": 0.05},
    "epsilon of 1": {"epsilon": 1.0},
    "epsilon as a tensor": {"epsilon": torch.tensor(0.05)},
    "epsilon that learns": {
        "epsilon": torch.tensor(0.05, requires_grad=True), "gradient": "unrolled",
    },
    "bias": {"bias": torch.linspace(-1, 1, K)},
    "mask": {"row_mask": _mask()},
    "rows first": {"prototype_first": False},
    "tolerance": {"tol": 1e-3, "accelerate": "anderson"},
    "implicit": {
        "epsilon": torch.tensor(0.5, requires_grad=True), "gradient": "implicit", "tol": 1e-3,
    },
}  # fmt: skip


HALF = torch.bfloat16


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in RULES), ("epsilon", HALF), ("mask", HALF)],
    ids=str,
)
def test_scores_are_not_copied(name, dtype):
    scores = _scores(dtype)
    assert testing.peak_bytes(lambda: sinkhorn(scores, **RULES[name])) <= FEW


def test_the_gradient_of_epsilon_needs_no_array_of_all_entries():
    scores, epsilon = _scores(), torch.tensor(0.05, requires_grad=True)
    result = sinkhorn(scores, epsilon=epsilon, gradient="unrolled")
    peak = testing.peak_bytes(lambda: torch.autograd.grad(result.g.square().sum(), epsilon))
    assert peak <= 2 * FEW


@pytest.mark.parametrize(
    ("read", "name", "dtype"),
    [
        ("codes", "epsilon", torch.float32),
        ("codes", "epsilon as a tensor", torch.float32),
        ("codes", "bias", torch.float32),
        ("codes", "mask", torch.float32),
        ("codes", "mask", HALF),
        ("plan", "epsilon", torch.float32),
        ("plan", "mask", torch.float32),
        ("assign", "epsilon", torch.float32),
        ("swav_codes", "mask", torch.float32),
    ],
    ids=str,
)
def test_codes_need_no_array_beside_them(read, name, dtype):
    scores, rule = _scores(dtype), RULES[name]
    result = sinkhorn(scores, **rule)
    calls = {
        "codes": result.codes,
        "plan": result.plan,
        "assign": lambda: result.assign(scores),
        "swav_codes": lambda: swav_codes(scores, row_mask=rule.get("row_mask")),
    }
    assert testing.peak_bytes(calls[read]) <= OUTPUT + FEW


@pytest.mark.parametrize(
    ("form", "name"), [("scores", "epsilon"), ("scores", "mask"), ("features", "bias")]
)
def test_sums_and_labels_need_few_entries_at_once(form, name):
    z, c = (torch.rand(size, 8, generator=torch.Generator().manual_seed(1)) for size in (N, K))
    result = sinkhorn(_scores() if form == "scores" else (z, c), **RULES[name])
    for read in ("labels", "topk", "counts", "entropy", "value"):
        rest = (2,) if read == "topk" else ()
        peak = testing.peak_bytes(lambda read=read, rest=rest: getattr(result, read)(*rest))
        assert peak <= FEW, read


def test_the_graph_of_codes_stores_scores_and_codes_only():
    scores, epsilon = _scores().requires_grad_(), torch.tensor(0.05, requires_grad=True)
    result = sinkhorn(scores, epsilon=epsilon, gradient="unrolled")
    sizes: list[int] = []

    def note(x: Tensor) -> Tensor:
        if x.numel() == N * K:
            sizes.append(x.data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        codes = result.codes()
    assert set(sizes) == {scores.data_ptr(), codes.data_ptr()}
