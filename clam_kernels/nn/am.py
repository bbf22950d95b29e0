# SPDX-License-Identifier: Apache-2.0
"""The associative memory as a layer. Equations: docs/ops/am.md."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._core import checks
from ..ops._facts import compute_dtype
from ..ops.am import am_assign, am_energy, am_recursion, am_weights
from ._parameters import as_vector, source_names, source_tensors, write

_HALVES = (torch.float16, torch.bfloat16)
# Smallest and largest beta by the dtype of its logarithm.
_LIMITS = {torch.float32: (1e-37, 1e38), torch.float64: (1e-307, 1e308)}


class AssociativeMemory(nn.Module):
    """An associative memory as a layer: returns the rows after the recursion.

        v <- v + step * update_mask * (softmax_k(log_weights_k - beta_k |v - rho_k|^2) @ rho - v),
        `steps` times; rho are the memories                         (eqs. 1-4 of docs/ops/am.md)

    The layer has no projection: with patterns as memories it returns the stored pattern for a
    damaged one. Add projections, heads and normalisation as layers before and after it.

    Parameters
    ----------
    n_memories : int, >= 1
        Number of memories K.
    n_features : int, >= 1
        Number of features D.
    steps : int, >= 0, default 1
        Number of steps; 0 returns a copy of the rows.
    step : float, finite, >= 0, default 1.0
        dt/tau. The energy never rises for 0 <= step <= 2. A Python number, never a tensor: inside
        torch.compile a step that changes recompiles.
    beta : float or Tensor broadcastable to [K], 1e-37 to 1e38, unit 1/|v|^2, default 1.0
        First inverse temperature, weights exp(-beta d^2). A last dim of K is one beta for each
        memory; a number or a last dim of 1 is one for all. A float64 layer takes 1e-307 to 1e308.
        Take a typical row, and let d be its second-nearest squared distance minus its nearest: for
        beta from 1 / d to 10 / d several memories get weight; for a much larger beta only the
        nearest, for a much smaller one all the same.
    learn_beta : bool, default True
        Whether beta is trained.
    log_weights : bool, default False
        Whether each memory has a trained log-weight; they start at 0.
    precision : "highest", "high" or "medium", optional
        Precision of the matrix products; see `clam_kernels.am_step`. None is torch's precision,
        and "medium" under autocast to half precision.
    device : torch.device, str or None, optional
        Device of the parameters, as in torch.nn.
    dtype : torch.dtype, optional
        Dtype of the parameters: float16, bfloat16, float32 or float64.

    Attributes
    ----------
    memories : Parameter [K, D]
        The memories, drawn from the standard normal distribution. `from_patterns` stores patterns
        instead, also with leading dims.
    log_beta : Parameter, shape of `beta` ([1] for a number), float32 (float64 for float64)
        Logarithm of beta, so that training keeps beta positive. Stays float32 in a layer of half
        precision, also after `layer.half()`: bfloat16 would round a beta of 100 to 98.8.
    beta : Tensor, shape and dtype of `log_beta`
        exp(log_beta), clamped to its range. `layer.beta = 2.0` sets it.
    log_weights : Parameter [K] or None
        Logarithm of each memory's weight; -inf masks a memory.
    steps, step, precision
        The arguments; may be assigned.

    Raises
    ------
    TypeError
        A type or dtype that is not listed above.
    ValueError
        A value or shape that does not fit.

    Notes
    -----
    Memory O(N D + K D), never N x K, forward and backward. Under autocast, half precision rows and
    float32 memories give a float32 result. Frozen parameters are in `state_dict` too, so that
    frozen and trained layers load each other's files.

    `torch.distributed.fsdp.fully_shard` supports the layer. All trained parameters need one dtype:
    shard a float32 layer, with a `MixedPrecisionPolicy` for half precision. fully_shard gathers the
    parameters only in `forward`; `register_fsdp_forward_method(layer, "energy")` adds another
    method.

    Examples
    --------
    >>> import torch
    >>> from clam_kernels.nn import AssociativeMemory
    >>> layer = AssociativeMemory.from_patterns(torch.eye(3), steps=5, beta=8.0)
    >>> damaged = torch.tensor([[1.0, 0.0, 0.4]])
    >>> damaged_entries = torch.tensor([[False, True, True]])
    >>> layer(damaged, update_mask=damaged_entries).round(decimals=3)
    tensor([[1., 0., 0.]])
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), AssociativeMemory(16, 4, steps=3))
    >>> model(torch.zeros(2, 8)).shape
    torch.Size([2, 4])
    """

    memories: nn.Parameter
    log_beta: nn.Parameter
    log_weights: nn.Parameter | None

    def __init__(
        self,
        n_memories: int,
        n_features: int,
        *,
        steps: int = 1,
        step: float = 1.0,
        beta: float | Tensor = 1.0,
        learn_beta: bool = True,
        log_weights: bool = False,
        precision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = []
        for name, size in (("n_memories", n_memories), ("n_features", n_features)):
            shape.append(checks.whole(name, size, 1))
            checks.at_least(name, shape[-1], 1)
        for name, flag in (("learn_beta", learn_beta), ("log_weights", log_weights)):
            checks.boolean(name, flag)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        checks.float_dtype("dtype", dtype)
        self.steps, self.step = checks.whole("steps", steps, 0), checks.real("step", step)
        self.precision = precision
        # stored for reset_parameters, which initialises a module that was made on meta
        self._log_beta_start = as_vector(_log_of_beta(beta, _beta_dtype(dtype)).cpu())
        memories = torch.empty(shape, device=device, dtype=dtype)
        self._register(memories, True, learn_beta, log_weights)
        self.reset_parameters()

    @classmethod
    def from_patterns(
        cls,
        patterns: Tensor,
        *,
        steps: int = 1,
        step: float = 1.0,
        beta: float | Tensor = 1.0,
        learn_memories: bool = False,
        learn_beta: bool = False,
        log_weights: bool | Tensor = False,
        precision: str | None = None,
    ) -> AssociativeMemory:
        """Make a layer whose memories are copies of patterns, with their dtype and device.

        Parameters
        ----------
        patterns : Tensor [..., K, D], float16, bfloat16, float32 or float64
            The patterns. Leading dims are separate sets of memories (heads, replicas), and
            broadcast with those of the rows.
        steps : int, >= 0, default 1
            Number of steps.
        step : float, finite, >= 0, default 1.0
            dt/tau.
        beta : float or Tensor broadcastable to [..., K], unit 1/|v|^2, default 1.0
            Inverse temperature, weights exp(-beta d^2), from 1e-37 to 1e38 (float64: 1e-307 to
            1e308).
        learn_memories : bool, default False
            Whether the memories are trained.
        learn_beta : bool, default False
            Whether beta is trained.
        log_weights : bool or Tensor broadcastable to [..., K], default False
            True: trained log-weights that start at 0. A tensor has their first values.
        precision : "highest", "high" or "medium", optional
            Precision of the matrix products.

        Returns
        -------
        AssociativeMemory
            Its `reset_parameters` replaces the patterns by random memories.

        Raises
        ------
        TypeError
            A type or dtype that is not listed above.
        ValueError
            A value or shape that does not fit.

        Examples
        --------
        >>> import torch
        >>> from clam_kernels.nn import AssociativeMemory
        >>> AssociativeMemory.from_patterns(torch.eye(3), beta=20.0)(torch.eye(3))
        tensor([[1., 0., 0.],
                [0., 1., 0.],
                [0., 0., 1.]])
        """
        checks.tensor("patterns", patterns)
        checks.floating("patterns", patterns)
        checks.shape("patterns", patterns, "[..., K, D]", patterns.ndim >= 2)
        checks.non_empty("patterns", patterns, -2, "K")
        checks.non_empty("patterns", patterns, -1, "D")
        shape = list(patterns.shape)
        weights = log_weights if isinstance(log_weights, Tensor) else None
        checks.boolean("learn_memories", learn_memories)
        # on meta, so that storing patterns draws no random numbers
        layer = cls(
            shape[-2], shape[-1], steps=steps, step=step, beta=beta, learn_beta=learn_beta,
            log_weights=weights is not None or log_weights,  # type: ignore[arg-type]
            precision=precision, device="meta", dtype=patterns.dtype,
        )  # fmt: skip
        layer._register(patterns.detach().clone(), learn_memories, learn_beta, log_weights)
        return layer

    def _register(
        self, memories: Tensor, learn: bool, learn_beta: bool, log_weights: bool | Tensor
    ) -> None:
        """Register the parameters. A call of the op on meta tensors raises if they do not fit."""
        beta = self._log_beta_start.to(memories.device, _beta_dtype(memories.dtype))
        weights = None if log_weights is False else memories.new_zeros(memories.shape[:-1])
        if isinstance(log_weights, Tensor):
            checks.has_values("log_weights", log_weights)
            weights = as_vector(log_weights.detach().to(memories.device, copy=True))
        rho, on_meta = (None if x is None else x.to("meta") for x in (memories, weights))
        am_recursion(
            rho, rho, beta.to("meta"), self.steps,  # type: ignore[arg-type]
            step=self.step, log_weights=on_meta, precision=self.precision,
        )  # fmt: skip
        self.memories = nn.Parameter(memories, requires_grad=learn)
        self.log_beta = nn.Parameter(beta, requires_grad=learn_beta)
        learned = None if weights is None else nn.Parameter(weights.to(memories.dtype))
        self.register_parameter("log_weights", learned)

    @property
    def n_memories(self) -> int:
        """Number of memories K."""
        return self.memories.shape[-2]

    @property
    def n_features(self) -> int:
        """Number of features D."""
        return self.memories.shape[-1]

    @property
    def beta(self) -> Tensor:
        """Inverse temperature, unit 1/|v|^2. Assign a number or a tensor to set it, for example to
        raise it during training; not in compiled code.
        """
        log: Tensor = self.log_beta
        if log.dtype not in _LIMITS:  # cast by the caller, or by FSDP with a MixedPrecisionPolicy
            log = log.float()
        low, high = _LIMITS[log.dtype]
        return log.clamp(math.log(low), math.log(high)).exp()

    @beta.setter
    def beta(self, value: float | Tensor) -> None:
        log = _log_of_beta(value, _beta_dtype(self.log_beta.dtype))
        size = list(self.log_beta.shape)
        fits = log.ndim <= len(size) and all(
            a in (1, b) for a, b in zip(log.shape[::-1], size[::-1], strict=False)
        )
        checks.expect(fits, "beta", f"shape broadcastable to {size}", list(log.shape))
        with torch.no_grad():
            write(self, "log_beta", log)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new memories; reset beta and log-weights to their first values.

        Parameters
        ----------
        generator : torch.Generator, optional
            A generator on the device of the parameters; None is torch's default generator.
        """
        if self.memories.is_meta:
            return
        with torch.no_grad():
            write(self, "memories", torch.empty_like(self.memories).normal_(generator=generator))
            write(self, "log_beta", self._log_beta_start)
            if self.log_weights is not None:
                write(self, "log_weights", torch.zeros_like(self.log_weights))

    # ---- conversion and loading ----------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AssociativeMemory:
        """Called by `half`, `to` and similar methods: log_beta stays at least float32."""
        beta_tensors = source_tensors(self, "log_beta")

        def keep_precision(x: Tensor) -> Tensor:
            out = fn(x)
            if any(x is tensor for tensor in beta_tensors) and out.dtype in _HALVES:
                out = x.to(out.device, _beta_dtype(out.dtype))
            return out

        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Accept files of earlier versions, where a shared beta is a scalar. log_beta stays
        float32, also if a state dict in half precision is assigned.
        """
        for name in source_names(state_dict, prefix, "log_beta"):
            value = state_dict[name]
            if isinstance(value, Tensor) and value.dtype in _HALVES:
                state_dict[name] = value.float()
        for name in ("log_beta", "log_weights"):
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor):
                state_dict[prefix + name] = as_vector(value)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    # ---- recall --------------------------------------------------------------------------------

    def forward(
        self, v: Tensor, update_mask: Tensor | None = None, steps: int | None = None
    ) -> Tensor:
        """Recall: the rows after `steps` steps.

        Parameters
        ----------
        v : Tensor [..., N, D], dtype (outside autocast) and device of the memories
            Rows to recall.
        update_mask : Tensor broadcastable to [..., N, D], bool or float in [0, 1], optional
            1 (True): the entry is updated. 0: the entry keeps its bits.
        steps : int, >= 0, optional
            Number of steps; default that of the layer.

        Returns
        -------
        Tensor [..., N, D], dtype of v (under autocast the wider of v's and the memories')
        """
        self._check(v)
        return am_recursion(
            v,
            self.memories,
            self.beta,
            self.steps if steps is None else steps,
            step=self.step,
            update_mask=update_mask,
            log_weights=self.log_weights,
            precision=self.precision,
        )

    def energy(self, v: Tensor) -> Tensor:
        """Energy of each row: low near memories, and no step with 0 <= step <= 2 raises it.

        Parameters
        ----------
        v : Tensor [..., N, D], dtype (outside autocast) and device of the memories
            Rows. The layer must have one beta for all memories.

        Returns
        -------
        Tensor [..., N], float32 (float64 for float64), unit |v|^2
        """
        self._check(v)
        return am_energy(
            v, self.memories, self.beta, log_weights=self.log_weights, precision=self.precision
        )

    def assign(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest memory of each row, and its squared distance; no gradient.

        Parameters
        ----------
        v : Tensor [..., N, D], dtype (outside autocast) and device of the memories
            Rows.

        Returns
        -------
        labels : Tensor [..., N], int64
            The lowest index of a tie. Memories with a log-weight of -inf are masked; beta and other
            log-weights do not matter.
        sqdist : Tensor [..., N], float32 (float64 for float64), unit |v|^2
        """
        self._check(v)
        return am_assign(v, self.memories, log_weights=self.log_weights, precision=self.precision)

    def weights(self, v: Tensor) -> Tensor:
        """Weight of each memory in the first step: softmax_k(log_weights_k - beta_k |v - rho_k|^2).

        Needs an N x K x D array of float64 differences, as no other method; twice differentiable.

        Parameters
        ----------
        v : Tensor [..., N, D], device of the memories
            Rows.

        Returns
        -------
        Tensor [..., N, K], float32 (float64 for float64)
            Rows of sum 1. The weight of a masked memory is 0; if all are masked, all weights are 0.
        """
        self._check(v)
        dtype = _beta_dtype(self.memories.dtype)
        log_weights = None if self.log_weights is None else self.log_weights.to(dtype)
        with torch.autocast(v.device.type, enabled=False):
            rho, beta = self.memories.to(dtype), self.beta.to(dtype)
            return am_weights(v.to(dtype), rho, beta, log_weights)

    def _check(self, v: Any) -> None:
        """Check v. The op checks it too, but its errors name `rho`, which is no argument of the
        layer.
        """
        checks.tensor("v", v)
        rho = self.memories
        # is_autocast_enabled raises for device meta, which has no autocast
        if v.dtype != rho.dtype and not torch.is_autocast_enabled(v.device.type):
            checks.same_dtype("v", v, "memories", rho)
        checks.same_device("v", v, "memories", rho)
        if v.ndim < 2 or v.shape[-1] != rho.shape[-1]:
            match = f"memories {checks.spell(*rho.shape)}"
            checks.shape("v", v, ["...", "N", rho.shape[-1]], False, match)

    def extra_repr(self) -> str:
        """Sizes and settings, for `print`."""
        batch = list(self.memories.shape[:-2])
        words = [
            f"{self.n_memories}, {self.n_features}, steps={self.steps}, step={self.step:g}",
            *([f"batch={batch}"] if batch else []),
            *(["learn_memories=False"] if not self.memories.requires_grad else []),
            *(["learn_beta=False"] if not self.log_beta.requires_grad else []),
            *(["log_weights=True"] if self.log_weights is not None else []),
            *([f"precision={self.precision!r}"] if self.precision is not None else []),
        ]
        return ", ".join(words)


def _beta_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of log_beta in a layer with parameters of `dtype`."""
    return compute_dtype(dtype)


def _log_of_beta(beta: float | Tensor, dtype: torch.dtype) -> Tensor:
    """The logarithm in float64 of a beta in the range that `dtype` allows."""
    low, high = _LIMITS[dtype]
    limits = f"from {low:g} to {high:g}"
    if not isinstance(beta, Tensor):
        probe = torch.empty(1, 1, dtype=torch.float32, device="meta")
        am_energy(probe, probe, beta)  # raises for a number that is no beta
        beta = float(beta)
        checks.expect(low <= beta <= high, "beta", f"a number {limits}", beta)
        return torch.tensor(beta, dtype=torch.float64, device="cpu").log()
    checks.floating("beta", beta)
    checks.has_values("beta", beta)
    beta = beta.detach().double()
    if beta.is_cpu:
        checks.values("beta", beta, 0.0, finite=True, strict=True)
        for outside in beta[(beta < low) | (beta > high)][:1].tolist():
            checks.expect(False, "beta", f"values {limits}", outside)
    return beta.log()
