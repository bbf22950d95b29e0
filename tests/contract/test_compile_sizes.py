# SPDX-License-Identifier: Apache-2.0
"""torch.compile of every public function and layer, as one graph for any number of rows: a last
partial batch does not compile again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from _compiling import Counting
from _entries import leaves
from torch import Tensor

import clam_kernels as ck
from clam_kernels.nn import AssociativeMemory, SelfLabeller

N, D, K = 80, 4, 3
SIZES = (64, 48, 17)
Case = Callable[[Tensor, Tensor], Any]  # of rows [n, D] and which of N rows they are [n]


def _draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


CENTROIDS, WEIGHTS, MASK = _draw(K, D), _draw(N).exp(), _draw(N, D) > 0
SHARES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
OPS = ck.ops.sinkhorn
TARGET = ck.dec_target(_draw(N, D), CENTROIDS)


# ---- ops -----------------------------------------------------------------------------------------


def _ops() -> dict[str, Case]:
    beta = SHARES.clone()
    return {
        "am_step": lambda x, at: ck.am_step(x, CENTROIDS, 0.5),
        "am_step with options": lambda x, at: ck.am_step(
            x, CENTROIDS, beta, step=0.5, update_mask=MASK[at], log_weights=SHARES.log()
        ),
        "am_recursion": lambda x, at: ck.am_recursion(x, CENTROIDS, beta, 3, update_mask=MASK[at]),
        "am_energy": lambda x, at: ck.am_energy(x, CENTROIDS, 0.5, log_weights=SHARES.log()),
        "am_assign": lambda x, at: ck.am_assign(x, CENTROIDS),
        "kmeans_assign": lambda x, at: ck.kmeans_assign(x, CENTROIDS, mask=SHARES > 0.25),
        "kmeans_update": lambda x, at: ck.kmeans_update(x, at % K, K, weight=WEIGHTS[at]),
        "kmeans_step": lambda x, at: ck.kmeans_step(x, CENTROIDS, weight=WEIGHTS[at]),
        "student_t_stats": lambda x, at: ck.student_t_stats(x, CENTROIDS, weight=WEIGHTS[at]),
        "dec_loss": lambda x, at: ck.dec_loss(x, CENTROIDS, TARGET, at, weight=WEIGHTS[at]),
        "dec_loss, self": lambda x, at: ck.dec_loss(
            x, CENTROIDS, TARGET, alpha=beta[0], mode="self"
        ),
        "dec_loss, minibatch": lambda x, at: ck.dec_loss(x, CENTROIDS, mode="minibatch"),
        "ops.dec_losses": lambda x, at: ck.ops.dec.dec_losses(x, CENTROIDS, weight=WEIGHTS[at]),
        "proto_nce": lambda x, at: ck.proto_nce(x, CENTROIDS, SHARES, at % K, bias=SHARES),
        "proto_nce of two clusterings": lambda x, at: ck.proto_nce(
            x, CENTROIDS, beta[0], torch.stack([at % 2, at * 0]), offsets=(0, 2, K)
        ),
        "ops.proto_nce_losses": lambda x, at: ck.ops.xent.proto_nce_losses(
            x, CENTROIDS, 0.5, (at % K)[None]
        ),
        "swapped_prediction": lambda x, at: ck.swapped_prediction(
            torch.stack([x, x + 1.0]),
            CENTROIDS,
            WEIGHTS[at].expand(2, -1),
            SHARES.expand(2, -1),
            weight=WEIGHTS[at],
        ),
        "cluster_concentration": lambda x, at: ck.cluster_concentration(x[:, 0].abs(), at % K, K),
        "ops.sinkhorn": lambda x, at: OPS.sinkhorn_potentials(x, 3, log_row=_masses(at).log()),
        "ops.sinkhorn_potentials_features": lambda x, at: OPS.sinkhorn_potentials_features(
            x, CENTROIDS, 3, bias=SHARES
        ),
        "ops.sinkhorn_pass": lambda x, at: OPS.sinkhorn_pass(x, x[0], log_row=_masses(at).log()),
        "ops.sinkhorn_features_pass": lambda x, at: OPS.sinkhorn_features_pass(
            x, CENTROIDS, SHARES
        ),
    }


def _masses(at: Tensor) -> Tensor:
    return WEIGHTS[at] / WEIGHTS[at].sum()


# ---- transport -----------------------------------------------------------------------------------


def _read(result: Any) -> Any:
    return [result.f, result.g, result.err, result.status]


def _transport() -> dict[str, Case]:
    four, epsilon = _draw(D), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    share = four.exp() / four.exp().sum()
    differentiated = {"gradient": "unrolled", "epsilon": 0.5}
    return {
        "sinkhorn": lambda x, at: _read(ck.sinkhorn(x)),
        "codes": lambda x, at: ck.sinkhorn(x).codes(),
        "potentials of codes": lambda x, at: ck.sinkhorn(x).code_potentials(),
        "plan": lambda x, at: ck.sinkhorn(x).plan(),
        "value": lambda x, at: ck.sinkhorn(x).value(),
        "entropy": lambda x, at: ck.sinkhorn(x).entropy(),
        "counts": lambda x, at: ck.sinkhorn(x).counts(),
        "sinkhorn with a bias": lambda x, at: ck.sinkhorn(x, bias=four).codes(),
        "sinkhorn with marginals": lambda x, at: ck.sinkhorn(
            x, row_marginal=_masses(at), col_marginal=share
        ).codes(),
        "sinkhorn of masked rows": lambda x, at: ck.sinkhorn(x, row_mask=at % 5 > 0).codes(),
        "sinkhorn, rows first": lambda x, at: ck.sinkhorn(x, prototype_first=False).codes(),
        "sinkhorn from a start": lambda x, at: ck.sinkhorn(x, init=four).codes(),
        "sinkhorn of features": lambda x, at: ck.sinkhorn((x, CENTROIDS), epsilon=0.5).codes(),
        "unrolled": lambda x, at: ck.sinkhorn(x, **differentiated).codes(),
        "unrolled, features": lambda x, at: ck.sinkhorn((x, CENTROIDS), **differentiated).codes(),
        "unrolled, epsilon learnt": lambda x, at: ck.sinkhorn(
            x, gradient="unrolled", epsilon=epsilon
        ).codes(),
        "unrolled, marginals": lambda x, at: ck.sinkhorn(
            x, row_marginal=_masses(at), **differentiated
        ).value(),
        "labels": lambda x, at: ck.sinkhorn(x).labels(),
        "topk": lambda x, at: ck.sinkhorn(x).topk(2),
        "assign": lambda x, at: ck.sinkhorn(x).assign(x[1:] + 1.0),
        "swav_codes": lambda x, at: ck.swav_codes(x),
        "swav_codes of masked rows": lambda x, at: ck.swav_codes(x, row_mask=at % 5 > 0),
        "swav_codes of features": lambda x, at: ck.swav_codes((x, CENTROIDS)),
    }


# ---- layers --------------------------------------------------------------------------------------


def _layers() -> dict[str, Case]:
    memory = AssociativeMemory.from_patterns(
        CENTROIDS, steps=2, learn_memories=True, learn_beta=True, log_weights=True
    )
    heads = SelfLabeller(D, K, N, 2, dtype=torch.float64, col_marginal=SHARES)
    return {
        "AssociativeMemory": lambda x, at: memory(x, MASK[at]),
        "AssociativeMemory.energy": lambda x, at: memory.energy(x),
        "AssociativeMemory.assign": lambda x, at: memory.assign(x),
        "AssociativeMemory.weights": lambda x, at: memory.weights(x),
        "SelfLabeller": lambda x, at: heads(x),
        "SelfLabeller.loss": lambda x, at: heads.loss(x, at),
        "SelfLabeller.log_probabilities": lambda x, at: heads.log_probabilities(x, 1),
        "SelfLabeller.assign": lambda x, at: heads.assign(x, 1),
    }


ALL = {**_ops(), **_transport(), **_layers()}


# ---- the tests -----------------------------------------------------------------------------------


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def _results(call: Case, size: int) -> list[Tensor]:
    """The results of a call, and the gradient of the rows if it has one."""
    x = _draw(N, D)[:size].requires_grad_()
    at = torch.arange(size) + (N - size)
    results = [leaf for leaf in leaves(call(x, at)) if isinstance(leaf, Tensor)]
    ends = [leaf for leaf in results if leaf.requires_grad]
    loss = sum((leaf.square().sum() for leaf in ends), torch.zeros(()))
    gradients = torch.autograd.grad(loss, x) if ends else ()
    return [*(leaf.detach() for leaf in results), *gradients]


@pytest.mark.parametrize("name", ALL)
def test_a_third_number_of_rows_compiles_nothing(name):
    call, counting = ALL[name], Counting()
    compiled = torch.compile(call, backend=counting, fullgraph=True)
    for size in SIZES:
        before = counting.compiled
        torch.testing.assert_close(_results(compiled, size), _results(call, size))
    assert counting.compiled == before


class Loss(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = SelfLabeller(D, K, N, 2, dtype=torch.float64)

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        return self.heads.loss(x, at)


@pytest.mark.parametrize("strict", [True, False])
def test_a_loss_is_exported_for_any_number_of_rows(strict):
    module, (n,) = Loss(), torch.export.dims("n", min=2, max=N)
    args = _draw(9, D), torch.arange(9)
    program = torch.export.export(module, args, dynamic_shapes=({0: n}, {0: n}), strict=strict)
    more = _draw(17, D), torch.arange(17)
    torch.testing.assert_close(program.module()(*more), module(*more))


def test_a_loss_of_rows_selected_by_their_values():
    """The number of rows depends on the values: the graph computes it."""
    module, x = Loss(), _draw(N, D)

    def call(x: Tensor) -> Tensor:
        at = (x[:, 0] > 0).nonzero()[:, 0]
        return module(x[at], at)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(call, backend="eager", fullgraph=True)
        for rows in (x, -x):
            torch.testing.assert_close(compiled(rows), call(rows))


@pytest.mark.parametrize("sizes", [(), SIZES], ids=["first", "after others"])
def test_error_messages_are_the_same_in_compiled_code(sizes):
    """Also if the compiler has made the sizes symbolic."""
    module = Loss()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for size in sizes:
        compiled(_draw(size, D), torch.arange(size))
    words = r"rows: expected shape \[5\] to match features, got \[6\]"
    with pytest.raises(Exception, match=words):
        compiled(_draw(5, D), torch.arange(6))
    words = r"features: expected shape \[B, 4\], got \[5, 3\]"
    with pytest.raises(Exception, match=words):
        compiled(_draw(5, 3), torch.arange(5))
