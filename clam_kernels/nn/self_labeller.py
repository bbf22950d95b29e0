# SPDX-License-Identifier: Apache-2.0
"""Self-labelling (SeLa) as a layer: heads, the labels of a whole data set, and relabelling.

Equations: docs/sela.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._core import checks
from ..ops._facts import compute_dtype
from ..transport import NOT_CONVERGED, Scores, Sinkhorn, sinkhorn
from ._labels import Relabelling as Relabelling
from ._labels import check_settings, first_labels, normalised_marginal

# With more entries [N, K] than this, 256 MB of float32, `relabel_features` stores no such array.
DENSE_ENTRIES = 1 << 26
MARGINALS = ("col_marginal", "row_marginal")
_WHY = {2: "NaN or +inf", 3: "a row or column with -inf only", 4: "no rows"}


class SelfLabeller(nn.Module):
    """Linear heads on shared features, each with its own labels for all rows of a data set.

        loss = mean_h -log softmax(features W_h^T + b_h)[label_h],
        labels_h = argmax_k(lam log p_h + g_h), with g_h such that all labels have equal shares
                                                                                (docs/sela.md)

    In a training loop call `loss` for each batch, and regularly `relabel` or `relabel_features` for
    each head.

    Parameters
    ----------
    in_features : int, >= 1
        Number of features D.
    n_clusters : int, >= 1
        Number of labels K.
    n_rows : int, >= 1
        Number of rows N of the data set.
    n_heads : int, >= 1
        Number of heads H.
    lam : float, > 0
        Sharpness of the plan, 1 / epsilon. A larger lam is closer to the best equal partition.
    tol : float, > 0
        A relabelling stops when the L1 error of the label shares is at most this.
    max_iter : int, >= 1
        Largest number of iterations of a relabelling.
    col_marginal : Tensor [K], finite, > 0, optional
        Shares of the labels, in any unit; default equal.
    row_marginal : Tensor [N], finite, > 0, optional
        Masses of the rows in the shares, in any unit; default equal. They do not change the loss.
    strict : bool
        Whether the counts equal the shares, rounded to whole rows; see `Sinkhorn.labels`.
    start : "balanced" or Tensor [H, N] or [N], int64
        Labels before the first relabelling. "balanced": i mod K, in a random order of each head.
    generator : torch.Generator, optional
        A generator on the CPU; None is torch's default generator.
    device : torch.device, str or None, optional
        Device of all parameters and buffers; None is torch's default device.
    dtype : torch.dtype, optional
        Float dtype of the parameters.

    Attributes
    ----------
    weight : Parameter [H, K, D]
    bias : Parameter [H, K]
    labels : buffer [H, N], int64
        Current labels.
    g : buffer [H, K], float64
        Potentials of each head's last relabelling, with which the next one starts; 0 before. They
        and the marginals stay float64 when the module is cast.
    col_marginal : buffer [K] or None, float64
    row_marginal : buffer [N] or None, float64
        The marginals, with a total of 1.

    Raises
    ------
    TypeError
        A type or dtype that is not listed above.
    ValueError
        A value or shape that does not fit.

    Notes
    -----
    Labels, potentials and marginals are in `state_dict`: a loop that is saved, loaded and continued
    has the same results as one without a break. The state of a layer with a marginal loads only
    into a layer with that marginal, whose values it replaces. No [H, N, K] array ever exists.

    Examples
    --------
    >>> import torch
    >>> from clam_kernels.nn import SelfLabeller
    >>> x = torch.tensor([[0.0, 1.0], [0.1, 0.9], [1.0, 0.0], [0.9, 0.2]])
    >>> heads = SelfLabeller(2, 2, n_rows=4, n_heads=3, generator=torch.Generator().manual_seed(0))
    >>> optimiser = torch.optim.SGD(heads.parameters(), 1.0)
    >>> for _ in range(20):
    ...     done = [heads.relabel_features(x, head) for head in range(3)]
    ...     loss = heads.loss(x, torch.arange(4))
    ...     optimiser.zero_grad()
    ...     loss.backward()
    ...     optimiser.step()
    >>> [bool(row[0] == row[1] != row[2] == row[3]) for row in heads.labels]
    [True, True, True]
    """

    weight: nn.Parameter
    bias: nn.Parameter
    labels: Tensor
    g: Tensor
    col_marginal: Tensor | None
    row_marginal: Tensor | None

    def __init__(
        self,
        in_features: int,
        n_clusters: int,
        n_rows: int,
        n_heads: int = 10,
        *,
        lam: float = 25.0,
        tol: float = 1e-3,
        max_iter: int = 400,
        col_marginal: Tensor | None = None,
        row_marginal: Tensor | None = None,
        strict: bool = False,
        start: str | Tensor = "balanced",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"in_features": in_features, "n_clusters": n_clusters, "n_rows": n_rows}
        for name, size in {**sizes, "n_heads": n_heads, "max_iter": max_iter}.items():
            checks.whole(name, size, 1)
            checks.at_least(name, int(size), 1)
        self.lam = checks.number("lam", lam, 0.0, finite=True, strict=True)
        self.tol = checks.number("tol", tol, 0.0, finite=True, strict=True)
        check_settings(strict, dtype)
        in_features, n_clusters, n_rows = int(in_features), int(n_clusters), int(n_rows)
        n_heads, self.max_iter = int(n_heads), int(max_iter)
        self.n_rows, self.strict = n_rows, strict
        # First values of the buffers: `reset_parameters` copies them, also to a module on meta
        self._first_values = {
            "col_marginal": normalised_marginal("col_marginal", col_marginal, n_clusters),
            "row_marginal": normalised_marginal("row_marginal", row_marginal, n_rows),
            "labels": first_labels(start, n_heads, n_rows, n_clusters),
        }
        shape = n_heads, n_clusters, in_features
        self._register(shape, torch.get_default_device() if device is None else device, dtype)
        self._checked_labels: tuple[int, int] | None = None
        self.reset_parameters(generator)

    def _register(
        self, shape: tuple[int, int, int], device: torch.device | str, dtype: torch.dtype | None
    ) -> None:
        """Register parameters and buffers; only the marginals get their values."""
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(shape[:2], dtype=dtype, device=device))
        self.register_buffer("g", torch.zeros(shape[:2], dtype=torch.float64, device=device))
        labels = torch.empty(shape[0], self.n_rows, dtype=torch.int64, device=device)
        self.register_buffer("labels", labels)
        for name in MARGINALS:
            mass = self._first_values[name]
            self.register_buffer(name, None if mass is None else mass.to(device, copy=True))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SelfLabeller:
        """Cast or move the module; potentials and marginals stay float64."""
        before = {name: t for name, t in self._buffers.items() if t is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    @property
    def n_heads(self) -> int:
        """Number of heads H."""
        return self.weight.shape[0]

    @property
    def n_clusters(self) -> int:
        """Number of labels K."""
        return self.weight.shape[1]

    @property
    def in_features(self) -> int:
        """Number of features D."""
        return self.weight.shape[2]

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw heads as `torch.nn.Linear` does, and balanced random labels. Potentials become 0;
        labels and marginals that were arguments of the layer get those values.

        A module that was made on the device "meta" is complete after `to_empty` and this call. On
        meta this call does nothing.

        Parameters
        ----------
        generator : torch.Generator, optional
            A generator on the CPU; None is torch's default generator.
        """
        if self.weight.is_meta:
            return
        bound = 1.0 / math.sqrt(self.in_features)
        with torch.no_grad():
            # the CPU draws the values, so that a seed gives the same ones on every device
            for part in (self.weight, self.bias):
                drawn = torch.empty(part.shape, dtype=part.dtype, device="cpu")
                part.copy_(drawn.uniform_(-bound, bound, generator=generator))
            for row in self.labels:
                order = torch.randperm(self.n_rows, generator=generator, device="cpu")
                row.copy_(order % self.n_clusters)
            for name, value in self._first_values.items():
                if value is not None:
                    getattr(self, name).copy_(value)
            self.g.zero_()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        """As in torch, plus an error if the layer has a marginal and the state does not, or the
        reverse: such labels and potentials belong to other shares. The error is raised also with
        `strict=False`, which torch does not pass to modules.
        """
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, unexpected, errors
        )
        for name in MARGINALS:
            key, own = prefix + name, getattr(self, name)
            if key in unexpected:
                unexpected.remove(key)
                got = checks.spell(*state_dict[key].shape)
                words = checks.wording(key, "none in the state dict", got, "this layer")
                errors.append(f"{words}: make the layer with {name}")
            elif key in missing and prefix + "labels" in state_dict:
                missing.remove(key)
                expected = f"shape {checks.spell(*own.shape)} in the state dict"
                words = checks.wording(key, expected, "none", "this layer")
                errors.append(f"{words}: make the layer without {name}")

    # ---- training ------------------------------------------------------------------------------

    def forward(self, features: Tensor) -> Tensor:
        """Logits of every head.

        Parameters
        ----------
        features : Tensor [B, D], dtype (outside autocast) and device of the heads

        Returns
        -------
        Tensor [H, B, K]
        """
        self._check_features(features)
        flat = functional.linear(features, self.weight.flatten(0, 1), self.bias.flatten())
        return flat.unflatten(-1, self.bias.shape).transpose(0, 1)

    def loss(self, features: Tensor, rows: Tensor) -> Tensor:
        """Cross entropy with the current labels, mean over rows and heads.

        Parameters
        ----------
        features : Tensor [B, D], dtype (outside autocast) and device of the heads
        rows : Tensor [B], int64
            The indices of these rows in the data set, 0 <= row < N.

        Returns
        -------
        Tensor []

        Raises
        ------
        ValueError
            A shape that does not fit, no rows, rows outside 0 to N - 1 (checked on a CPU only), or
            labels outside 0 to K - 1.
        """
        checks.tensor("rows", rows)
        got, is_int64 = str(rows.dtype).removeprefix("torch."), rows.dtype == torch.int64
        checks.type_error(is_int64, lambda: checks.wording("rows", "dtype int64", got))
        self._check_labels()
        logits = self(features)
        size = logits.shape[1]
        checks.shape("rows", rows, [size], list(rows.shape) == [size], "features")
        self._check_rows(rows)
        targets = self.labels[:, rows.to(self.labels.device)]
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    # ---- relabelling -----------------------------------------------------------------------------

    @torch.no_grad()
    def log_probabilities(self, features: Tensor, head: int) -> Tensor:
        """Logarithms of the softmax of one head; no gradient.

        Parameters
        ----------
        features : Tensor [B, D]
        head : int
            Index of the head, 0 <= head < H.

        Returns
        -------
        Tensor [B, K], float32 (float64 for float64)
        """
        head = self._head(head)
        self._check_features(features)
        logits = functional.linear(features, self.weight[head], self.bias[head])
        return logits.to(compute_dtype(logits.dtype)).log_softmax(-1)

    @torch.no_grad()
    def relabel(
        self, log_probabilities: Tensor | Callable[[int], Tensor], head: int
    ) -> Relabelling:
        """Compute new labels of one head with the given shares, from its last potentials.

        Parameters
        ----------
        log_probabilities : Tensor [N, K], or a callable that returns them for a head
            log softmax of the head for all rows of the data set, in order; the mean over augmented
            draws if there are any. A constant added to a row changes nothing.
        head : int
            Index of the head, 0 <= head < H.

        Returns
        -------
        Relabelling
            The result. New labels and potentials are in the buffers.

        Raises
        ------
        TypeError
            A type or dtype that is not listed above.
        ValueError
            A shape or device that does not fit.
        FloatingPointError
            NaN or +inf among the log-probabilities, or no plan exists; labels do not change.

        Examples
        --------
        >>> import torch
        >>> from clam_kernels.nn import SelfLabeller
        >>> heads = SelfLabeller(5, 2, n_rows=4, n_heads=1)
        >>> logits = torch.tensor([[2.0, 0.0], [3.0, 0.0], [1.0, 0.0], [4.0, 0.0]])
        >>> done = heads.relabel(logits.log_softmax(1), 0)
        >>> heads.labels, done.counts
        (tensor([[1, 0, 1, 0]]), tensor([2, 2]))
        """
        head = self._head(head)
        values = log_probabilities(head) if callable(log_probabilities) else log_probabilities
        checks.tensor("log_probabilities", values)
        checks.floating("log_probabilities", values)
        shape = [self.n_rows, self.n_clusters]
        spelled = checks.spell(*shape)
        checks.shape("log_probabilities", values, spelled, list(values.shape) == shape)
        checks.same_device("log_probabilities", values, "the heads", self.labels)
        return self._store(head, self._solve(values.detach(), None, head))

    @torch.no_grad()
    def relabel_features(self, features: Tensor, head: int) -> Relabelling:
        """`relabel` from features of all rows.

        The mean of log softmax(W phi + b) over augmented draws phi is W mean(phi) + b plus a
        constant of each row, so features can be means over draws.

        Parameters
        ----------
        features : Tensor [N, D]
            Features of all rows of the data set, in order.
        head : int
            Index of the head, 0 <= head < H.

        Returns
        -------
        Relabelling

        Raises
        ------
        TypeError, ValueError, FloatingPointError
            As in `relabel`.
        """
        head = self._head(head)
        self._check_features(features)
        rows = [self.n_rows, self.in_features]
        checks.shape("features", features, checks.spell(*rows), list(features.shape) == rows)
        if self.n_rows * self.n_clusters <= DENSE_ENTRIES:
            return self.relabel(self.log_probabilities(features, head), head)
        pair = (features.detach(), self.weight[head].detach().to(features.dtype))
        return self._store(head, self._solve(pair, self.lam * self.bias[head].detach(), head))

    def _solve(self, scores: Scores, bias: Tensor | None, head: int) -> Sinkhorn:
        """The plan of one head; FloatingPointError if there is none."""
        result = sinkhorn(
            scores, epsilon=1.0 / self.lam, bias=bias, tol=self.tol, max_iter=self.max_iter,
            row_marginal=self.row_marginal, col_marginal=self.col_marginal, init=self.g[head],
            accelerate="anderson", warn=False,
        )  # fmt: skip
        status = int(result.status)
        if status > NOT_CONVERGED:
            raise FloatingPointError(
                f"head {head}: expected log-probabilities that have a plan, got {_WHY[status]}; its"
                " labels are unchanged"
            )
        return result

    def _store(self, head: int, result: Sinkhorn) -> Relabelling:
        """Store the labels and potentials of a plan in the buffers."""
        labels = result.labels(strict=self.strict)
        changed = float((labels != self.labels[head]).double().mean())
        counts = torch.bincount(labels, minlength=self.n_clusters)
        self.labels[head] = labels
        self.g[head] = result.g
        ok = bool(result.converged)
        return Relabelling(head, result.n_iter, float(result.err), ok, changed, counts)

    @torch.no_grad()
    def assign(self, features: Tensor, head: int = 0) -> Tensor:
        """Labels of any rows with the potentials of a head: those that a relabelling would give to
        rows that do not change the potentials.

        Parameters
        ----------
        features : Tensor [B, D]
        head : int
            Index of the head, 0 <= head < H.

        Returns
        -------
        Tensor [B], int64
            argmax_k(lam log p_k + g_k), the lowest index of a tie.
        """
        scores = self.lam * self.log_probabilities(features, head)
        return (scores + self.g[head].to(scores.dtype)).argmax(-1)

    # ---- checks ----------------------------------------------------------------------------------

    def _check_features(self, features: Any) -> None:
        """Features [B, D] that fit the heads."""
        checks.tensor("features", features)
        d = self.in_features
        fits = features.ndim == 2 and features.shape[-1] == d
        checks.shape("features", features, f"[B, {d}]", fits)
        checks.same_device("features", features, "the heads", self.weight)
        if not torch.is_autocast_enabled(features.device.type):
            checks.same_dtype("features", features, "the heads", self.weight)

    def _head(self, head: Any) -> int:
        """The index of a head as a Python int."""
        checks.type_error(
            checks.is_whole(head), lambda: checks.wording("head", "an int", repr(head))
        )
        text = f"an int from 0 to {self.n_heads - 1}"
        checks.value_error(
            bool(0 <= head < self.n_heads), lambda: checks.wording("head", text, head)
        )
        return head if isinstance(head, int) else int(head)

    def _check_rows(self, rows: Tensor) -> None:
        """Rows of the data set, at least one."""
        checks.non_empty("rows", rows, 0, "B")
        if not self.labels.is_meta:
            checks.has_values("rows", rows)
        if rows.is_cpu and not torch.compiler.is_compiling():
            bad = rows[(rows < 0) | (rows >= self.n_rows)][:1].tolist()
            text = f"values from 0 to {self.n_rows - 1}"
            checks.value_error(not bad, lambda: checks.wording("rows", text, bad[0]))

    def _check_labels(self) -> None:
        """Raise if a label is out of range; labels are read again only after a change."""
        if torch.compiler.is_compiling():
            return
        now = None
        if not self.labels.is_inference():
            now = (self.labels.data_ptr(), self.labels._version)
        if now is not None and now == self._checked_labels:
            return
        bad = ((self.labels < 0) | (self.labels >= self.n_clusters)).nonzero()[:1].tolist()
        if bad:
            head, row = bad[0]
            got = int(self.labels[head, row])
            text = f"values from 0 to {self.n_clusters - 1}"
            raise ValueError(
                checks.wording("labels", text, f"{got} for row {row} of head {head}; relabel first")
            )
        self._checked_labels = now

    def extra_repr(self) -> str:
        """Sizes and settings, for `print`."""
        sizes = f"{self.in_features}, {self.n_clusters}, n_rows={self.n_rows}"
        words = [f"{sizes}, n_heads={self.n_heads}, lam={self.lam:g}, tol={self.tol:g}"]
        return ", ".join(words + (["strict=True"] if self.strict else []))
