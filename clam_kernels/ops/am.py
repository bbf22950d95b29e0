# SPDX-License-Identifier: Apache-2.0
"""Associative memory: am_step, am_recursion, am_energy, am_assign. Equations: docs/ops/am.md."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import python_fallback

from .._core import checks
from .._core.install import op
from .._core.spec import Gradient
from . import _am as _parts

_BETA = {"beta_tensor": {"beta": "Tensor beta"}, "": {"beta": "float beta"}}
_CORE = {"v": 2, "rho": 2, "beta": 1, "update_mask": 2, "log_weights": 1}


# ---- the documented functions ------------------------------------------------------------------


def _tensors(v: object, rho: object, beta: Any, update_mask: object, log_weights: object) -> Any:
    """Check the types of the arguments, whose errors the dispatcher would word differently; return
    beta, a number as a Python number.
    """
    checks.tensor("v", v)
    checks.tensor("rho", rho)
    if not isinstance(beta, Tensor):
        beta = checks.real("beta", beta, "a number or a Tensor")
    checks.tensor("update_mask", update_mask, optional=True)
    checks.tensor("log_weights", log_weights, optional=True)
    return beta


def _settings(step: object, precision: object) -> Any:
    """Check the types of step and precision; return step as a Python number."""
    number = checks.real("step", step)
    checks.text("precision", precision)
    return number


def _overload(packet: Any, beta: Any) -> Any:
    """The overload for this beta. Without it the dispatcher would first try the overload with
    Tensors, which costs a call with a number more than all its other checks.
    """
    return packet.beta_tensor if isinstance(beta, Tensor) else packet.default


def am_step(
    v: Tensor,
    rho: Tensor,
    beta: float | Tensor,
    *,
    step: float = 1.0,
    update_mask: Tensor | None = None,
    log_weights: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """One step of the associative-memory recursion: distance, softmax, update.

        p_nk = softmax_k(log_weights_k - beta_k |v_n - rho_k|^2)
        v'   = v + step * update_mask * (p @ rho - v)              (eqs. 1-3 of docs/ops/am.md)

    Parameters
    ----------
    v : Tensor [..., N, D], float16, bfloat16, float32 or float64
        States. Leading dims of all arguments broadcast.
    rho : Tensor [..., K, D], dtype and device of v
        Memories.
    beta : float or Tensor broadcastable to [..., K], >= 0, unit 1/|v|^2
        Inverse temperature as in the ClAM paper: weights exp(-beta d^2). A last dim of K is one
        beta for each memory, a last dim of 1 one for all. With 0 only log_weights count. The Python
        number inf assigns each row to its nearest memory (inf in a tensor gives NaN). A tensor gets
        a gradient. Inside torch.compile pass a beta that changes as a tensor: a number recompiles.
    step : float, finite, >= 0
        dt/tau. The energy never rises for 0 <= step <= 2. It is a Python number, never a tensor:
        inside torch.compile a step that changes recompiles.
    update_mask : Tensor broadcastable to [..., N, D], bool or float in [0, 1], optional
        1 (True): the entry is updated. 0: the entry keeps its bits. Other values raise no error.
    log_weights : Tensor broadcastable to [..., K], optional
        Logarithm of each memory's weight; -inf masks a memory.
    precision : "highest", "high" or "medium", optional
        Precision of the matrix products; None is torch.get_float32_matmul_precision(). On a CPU
        all modes multiply in float32 (float64 for float64).

    Returns
    -------
    Tensor [..., N, D], dtype of v, contiguous

    Raises
    ------
    TypeError
        A type or dtype that is not listed above.
    ValueError
        A shape, device or value that does not fit; values are checked on numbers and CPU tensors.

    Notes
    -----
    Memory O(N D + K D), never N x K. Backward is written by hand for v, rho, beta, update_mask and
    log_weights. Double backward raises NotImplementedError. torch.func transforms and forward-mode
    AD run `python_fallback.am.am_step`, which needs an N x K x D array. A row of v with NaN or inf
    becomes NaN and changes no other row.

    Examples
    --------
    >>> import torch, clam_kernels
    >>> rho = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    >>> clam_kernels.am_step(torch.tensor([[0.25, 0.0]]), rho, 4.0, step=0.5)
    tensor([[0.1846, 0.0000]])
    """
    beta = _tensors(v, rho, beta, update_mask, log_weights)
    step = _settings(step, precision)
    call = _overload(torch.ops.clam.am_step, beta)
    out: Tensor = call(v, rho, beta, step, update_mask, log_weights, precision)
    return out


def am_recursion(
    v: Tensor,
    rho: Tensor,
    beta: float | Tensor,
    steps: int,
    *,
    step: float = 1.0,
    update_mask: Tensor | None = None,
    log_weights: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """`steps` steps of `am_step` with the same memories, in one pass over the rows.

        v_{t+1} = v_t + step * update_mask * (softmax_k(log_weights_k - beta_k |v_t - rho_k|^2) @
        rho - v_t)
                                                                          (eq. 4 of docs/ops/am.md)

    Parameters
    ----------
    v : Tensor [..., N, D], float16, bfloat16, float32 or float64
        States before the first step. Leading dims of all arguments broadcast.
    rho : Tensor [..., K, D], dtype and device of v
        Memories.
    beta : float or Tensor broadcastable to [..., K], >= 0, unit 1/|v|^2
        Inverse temperature, weights exp(-beta d^2); see `am_step`. Inside torch.compile pass a beta
        that changes as a tensor, a number recompiles.
    steps : int, >= 0
        Number of steps; 0 returns a copy of v.
    step : float, finite, >= 0
        dt/tau. It is a Python number, never a tensor: inside torch.compile a step that changes
        recompiles.
    update_mask : Tensor broadcastable to [..., N, D], bool or float in [0, 1], optional
        1 (True): the entry is updated. 0: the entry keeps its bits. Other values raise no error.
    log_weights : Tensor broadcastable to [..., K], optional
        Logarithm of each memory's weight; -inf masks a memory.
    precision : "highest", "high" or "medium", optional
        Precision of the matrix products; see `am_step`.

    Returns
    -------
    Tensor [..., N, D], dtype of v, contiguous
        The state stays in float32 (float64) between the steps.

    Raises
    ------
    TypeError
        A type or dtype that is not listed above.
    ValueError
        A shape, device or value that does not fit; values are checked on numbers and CPU tensors.

    Notes
    -----
    Memory O(N D + K D) forward. Backward saves only the arguments, and computes the states of one
    chunk of rows at a time again. Double backward raises; see `am_step`.

    Examples
    --------
    >>> import torch, clam_kernels
    >>> patterns = torch.eye(3)
    >>> hidden = torch.tensor([[1.0, 0.0, 0.4]])
    >>> evolves = torch.tensor([[False, True, True]])
    >>> clam_kernels.am_recursion(hidden, patterns, 8.0, 5, update_mask=evolves).round(decimals=3)
    tensor([[1., 0., 0.]])
    """
    beta = _tensors(v, rho, beta, update_mask, log_weights)
    step = _settings(step, precision)
    steps = checks.whole("steps", steps, 0)
    call = _overload(torch.ops.clam.am_recursion, beta)
    out: Tensor = call(v, rho, beta, steps, step, update_mask, log_weights, precision)
    return out


def am_energy(
    v: Tensor,
    rho: Tensor,
    beta: float | Tensor,
    *,
    log_weights: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """Energy of each state, which no step with 0 <= step <= 2 raises.

        E(v_n) = -(1/beta) logsumexp_k(log_weights_k - beta |v_n - rho_k|^2)   (eq. 5 of
        docs/ops/am.md)

    Parameters
    ----------
    v : Tensor [..., N, D], float16, bfloat16, float32 or float64
        States. Leading dims of all arguments broadcast.
    rho : Tensor [..., K, D], dtype and device of v
        Memories.
    beta : float or Tensor [] or [..., 1], finite, > 0, unit 1/|v|^2
        One inverse temperature for all memories, weights exp(-beta d^2).
    log_weights : Tensor broadcastable to [..., K], optional
        Logarithm of each memory's weight; -inf masks a memory.
    precision : "highest", "high" or "medium", optional
        Precision of the matrix products; see `am_step`.

    Returns
    -------
    Tensor [..., N], float32 (float64 for float64), unit |v|^2
        +inf where all memories are masked.

    Raises
    ------
    TypeError
        A type or dtype that is not listed above.
    ValueError
        A shape, device or value that does not fit, or a beta for each memory.

    Notes
    -----
    Differentiable by hand-written formulas with respect to v, rho, beta and log_weights.

    Examples
    --------
    >>> import torch, clam_kernels
    >>> rho = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    >>> clam_kernels.am_energy(torch.tensor([[0.25, 0.0]]), rho, 4.0)
    tensor([0.0308])
    """
    beta = _tensors(v, rho, beta, None, log_weights)
    _settings(1.0, precision)
    call = _overload(torch.ops.clam.am_energy, beta)
    out: Tensor = call(v, rho, beta, log_weights, precision)
    return out


def am_assign(
    v: Tensor, rho: Tensor, *, log_weights: Tensor | None = None, precision: str | None = None
) -> tuple[Tensor, Tensor]:
    """Nearest memory of each state, the lowest index of a tie, and its squared distance.

        label_n = argmin_k |v_n - rho_k|^2 over the memories with log_weights_k > -inf
                                                                          (eq. 6 of docs/ops/am.md)

    Parameters
    ----------
    v : Tensor [..., N, D], float16, bfloat16, float32 or float64
        States. Leading dims of all arguments broadcast.
    rho : Tensor [..., K, D], dtype and device of v
        Memories.
    log_weights : Tensor broadcastable to [..., K], optional
        A memory with -inf is masked; other values do not matter.
    precision : "highest", "high" or "medium", optional
        Precision of the matrix products; see `am_step`.

    Returns
    -------
    labels : Tensor [..., N], int64
        -1 where v has NaN or inf, and where all memories are masked.
    sqdist : Tensor [..., N], float32 (float64 for float64), unit |v|^2
        From the difference of the pair; +inf where all memories are masked. No gradient.

    Raises
    ------
    TypeError
        A type or dtype that is not listed above.
    ValueError
        A shape or device that does not fit.

    Examples
    --------
    >>> import torch, clam_kernels
    >>> clam_kernels.am_assign(torch.tensor([[0.9, 0.0], [0.1, 0.0]]), torch.eye(2))
    (tensor([0, 0]), tensor([0.0100, 0.8100]))
    """
    _tensors(v, rho, 1.0, None, log_weights)
    _settings(1.0, precision)
    labels, sqdist = torch.ops.clam.am_assign(v, rho, log_weights, precision)
    return labels, sqdist


def am_weights(v: Tensor, rho: Tensor, beta: Tensor, log_weights: Tensor | None) -> Tensor:
    """Weight [..., N, K] of each memory in a step, from differences; 0 for a masked memory. Plain
    torch, not an op.
    """
    return _truth.am_weights(v, rho, beta, log_weights)


# ---- the declarations --------------------------------------------------------------------------

_REST = "float step=1.0, Tensor? update_mask=None, Tensor? log_weights=None, str? precision=None"
_truth = python_fallback.am
_ROOM = "clam_kernels.kernels.am"
_LIMITS = {"triton": "clam_kernels.kernels.common.launch:why_not"}
_SMALL_LIMITS = {
    **_LIMITS,
    "cuda": f"{_ROOM}.cuda:why_not",
    "auto-cuda": f"{_ROOM}.cuda:why_slower",
}


def _kernels(function: str, file: str = "forward", small: bool = False) -> dict[str, str]:
    """Names of the Triton kernel of a function and, with `small`, of its CUDA kernel for few
    features.
    """
    names = {"triton": f"{_ROOM}.{file}:{function}"}
    return {**names, "cuda": f"{_ROOM}.cuda:{function}"} if small else names


op(
    name="am_step",
    arguments=f"Tensor v, Tensor rho, {{beta}}, {_REST}",
    returns="Tensor",
    overloads=_BETA,
    check=_parts.check_step,
    check_values=_parts.check_beta_values,
    fake=_parts.fake_step,
    truth=_truth.am_step,
    reference=_truth.am_step_forward,
    function=am_step,
    kernels=_kernels("am_step", small=True),
    limits=_SMALL_LIMITS,
    gradient=Gradient(
        reference=_truth.am_step_backward,
        kernels=_kernels("am_step_backward", file="backward", small=True),
        saved=(_truth.am_step_saved, _parts.fake_step_saved),
        saved_kernels=_kernels("am_step_saved", small=True),
    ),
    same_dtype=("v", "rho"),
    core=_CORE,
)

op(
    name="am_recursion",
    arguments=f"Tensor v, Tensor rho, {{beta}}, SymInt steps, {_REST}",
    returns="Tensor",
    overloads=_BETA,
    check=_parts.check_recursion,
    check_values=_parts.check_beta_values,
    fake=_parts.fake_recursion,
    truth=_truth.am_recursion,
    reference=_truth.am_recursion_forward,
    function=am_recursion,
    kernels=_kernels("am_recursion", small=True),
    limits=_SMALL_LIMITS,
    gradient=Gradient(
        reference=_truth.am_recursion_backward,
        kernels=_kernels("am_recursion_backward", file="backward", small=True),
    ),
    same_dtype=("v", "rho"),
    core=_CORE,
)

op(
    name="am_energy",
    arguments="Tensor v, Tensor rho, {beta}, Tensor? log_weights=None, str? precision=None",
    returns="Tensor",
    overloads=_BETA,
    check=_parts.check_energy,
    check_values=_parts.check_energy_values,
    fake=_parts.fake_energy,
    truth=_truth.am_energy,
    reference=_truth.am_energy_forward,
    function=am_energy,
    kernels=_kernels("am_energy", file="energy"),
    limits=_LIMITS,
    gradient=Gradient(
        reference=_truth.am_energy_backward,
        kernels=_kernels("am_energy_backward", file="energy"),
        output_dims=1,
    ),
    same_dtype=("v", "rho"),
    core=_CORE,
)

op(
    name="am_assign",
    arguments="Tensor v, Tensor rho, Tensor? log_weights=None, str? precision=None",
    returns="(Tensor, Tensor)",
    check=_parts.check_assign,
    fake=_parts.fake_assign,
    truth=_truth.am_assign,
    reference=_truth.am_assign_forward,
    function=am_assign,
    kernels=_kernels("am_assign", file="energy"),
    limits=_LIMITS,
    same_dtype=("v", "rho"),
    core=_CORE,
)
