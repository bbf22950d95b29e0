# SPDX-License-Identifier: Apache-2.0
"""One step of the recursion and its gradient where features are many, in few passes over the rows.

The op passes over rows x features about thirty times for each replica, and most of these passes
write to newly allocated memory. With few memories and thousands of features they take ten times as
long as the products. Here one array of errors serves all replicas. The weights are computed from
distances in float64, so that no row is in doubt.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Number of features from which a CPU trains in this way.
FEATURES = 1025


def squared_errors(
    x: Tensor, masks: Tensor, counted: Tensor, memories: Tensor, beta: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """Squared errors e_n = sum_j c_nj (y_nj - x_nj)^2 of the completed rows y = p rho, with
    p = softmax_k(-beta |v - rho_k|^2) and v the masked rows; and the gradient of
    sum_n factor_n e_n with respect to the memories.

    Parameters
    ----------
    x : Tensor [N, D]
        Rows, 0 where not observed.
    masks, counted : bool Tensor [N, D]
        Entries that are set to 0, and entries whose error counts.
    memories : Tensor [R, K, D]
    beta : Tensor [R, 1]
    factor : Tensor [N]
        Factor of the error of each row.

    Returns
    -------
    tuple of Tensor [R, N] (errors without the factor) and Tensor [R, K, D]
    """
    states, mask = x.masked_fill(masks, 0.0), counted.to(x.dtype)
    minus, double = -x * mask, 2 * factor[:, None]
    weights = _weights(states, memories, beta).to(x.dtype)
    error, gradient = torch.empty_like(x), torch.empty_like(memories)
    rows = []
    for p, rho, sharp, slope in zip(weights, memories, beta, gradient, strict=True):
        torch.mm(p, rho, out=error)
        torch.addcmul(minus, error, mask, out=error)
        rows.append(torch.linalg.vector_norm(error, dim=1).square_())
        torch.mm((p * double).T, error, out=slope)
        pull = double * (error @ rho.T)
        pull = (pull - (p * pull).sum(1, keepdim=True)) * p * (2 * sharp)
        slope.add_(pull.T @ states).sub_(pull.sum(0)[:, None] * rho)
    return torch.stack(rows), gradient


def _weights(states: Tensor, memories: Tensor, beta: Tensor) -> Tensor:
    """softmax_k(-beta |v - rho_k|^2) of every replica, [R, N, K] float64."""
    replicas, count, features = memories.shape
    flat = memories.double().reshape(-1, features)
    # without |v|^2, which is the same for all memories
    distances = flat.square().sum(1) - 2 * states.double() @ flat.T
    distances = distances.reshape(-1, replicas, count).transpose(0, 1)
    return torch.softmax(distances * -beta.double()[:, None], -1)
