# SPDX-License-Identifier: Apache-2.0
"""Self-labelling (SeLa) as a layer: heads, their labels of a whole data set, and relabelling.

Equations: docs/sela.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._core import checks
from ..transport import NOT_CONVERGED, Scores, Sinkhorn, sinkhorn
from ._labels import Relabelling as Relabelling
from ._labels import shares_of, start_of

# Entries of [N, K] above which `relabel_features` keeps no such array: 256 MB of float32.
DENSE_ENTRIES = 1 << 26
MARGINALS = ("col_marginal", "row_marginal")
_WHY = {2: "not finite", 3: "infeasible", 4: "without a row"}


class SelfLabeller(nn.Module):
    """Linear heads on shared features, each with labels of its own for every row of a data set.

        loss = mean_h -log softmax(features W_h^T + b_h)[label_h],
        labels_h = argmax_k(lam log p_h + g_h), with g_h such that all labels have equal shares
                                                                                (docs/sela.md)

    In a training loop of one's own: `loss` for each batch, and now and then `relabel` or
    `relabel_features` for each head.

    Parameters
    ----------
    in_features : int, >= 1
        Number of features D.
    n_clusters : int, >= 1
        Number of labels K.
    n_rows : int, >= 1
        Rows of the data set N.
    n_heads : int, >= 1
        Number of heads H.
    lam : float, > 0
        Sharpness of the plan, 1 / epsilon; the larger, the nearer to the best equal partition.
    tol : float, > 0
        L1 error of the label shares at which a relabelling ends.
    max_iter : int, >= 1
        Iterations after which it ends in any case.
    col_marginal : Tensor [K], finite, > 0, optional
        Shares of the labels, in any unit; equal unless given.
    row_marginal : Tensor [N], finite, > 0, optional
        Masses of the rows in the shares, in any unit; equal unless given. The loss has no part in
        them.
    strict : bool
        Whether counts are the shares rounded to whole rows; see `Sinkhorn.labels`.
    start : "balanced" or Tensor [H, N] or [N], int64
        Labels before the first relabelling: i mod K in an order drawn for each head, or given.
    generator : torch.Generator, optional
        Of the draws, on the CPU; None is torch's own.
    device : torch.device, str or None, optional
        Of all parameters and buffers; None is torch's default device.
    dtype : torch.dtype, optional
        Of the parameters: a float.

    Attributes
    ----------
    weight : Parameter [H, K, D]
    bias : Parameter [H, K]
    labels : buffer [H, N], int64
        Current labels.
    g : buffer [H, K], float64
        Potentials of each head's last relabelling, where the next one starts; 0 before. They and
        the marginals stay float64 where the module is cast.
    col_marginal : buffer [K] or None, float64
    row_marginal : buffer [N] or None, float64
        Marginals of total 1, where they were given.

    Raises
    ------
    TypeError
        A type or dtype other than stated.
    ValueError
        A value or shape that does not fit.

    Notes
    -----
    Labels, potentials and marginals are in `state_dict`: a loop that is saved, loaded and continued
    is the uninterrupted one. The state of a layer with a marginal loads only into a layer that was
    made with one, whose values it replaces. No [H, N, K] array ever exists.

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
        words = checks.wording("strict", "a bool", type(strict).__name__)
        checks.type_error(isinstance(strict, bool), lambda: words)
        in_features, n_clusters, n_rows = int(in_features), int(n_clusters), int(n_rows)
        n_heads, self.max_iter = int(n_heads), int(max_iter)
        self.n_rows, self.strict = n_rows, strict
        # Buffers of these begin as copies. A module that was made on meta lost its own, and
        # `reset_parameters` puts them back.
        self._begin = {
            "col_marginal": shares_of("col_marginal", col_marginal, n_clusters),
            "row_marginal": shares_of("row_marginal", row_marginal, n_rows),
            "labels": start_of(start, n_heads, n_rows, n_clusters),
        }
        shape = n_heads, n_clusters, in_features
        self._register(shape, torch.get_default_device() if device is None else device, dtype)
        self._trusted: tuple[int, int] | None = None
        self.reset_parameters(generator)

    def _register(
        self, shape: tuple[int, int, int], device: torch.device | str, dtype: torch.dtype | None
    ) -> None:
        """Parameters and buffers, without values but for the marginals."""
        wide: dict[str, Any] = {"dtype": torch.float64, "device": device}
        whole: dict[str, Any] = {"dtype": torch.int64, "device": device}
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(shape[:2], dtype=dtype, device=device))
        self.register_buffer("g", torch.zeros(shape[:2], **wide))
        self.register_buffer("labels", torch.empty(shape[0], self.n_rows, **whole))
        for name in MARGINALS:
            mass = self._begin[name]
            self.register_buffer(name, None if mass is None else mass.to(device, copy=True))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SelfLabeller:
        """Casts, moves: potentials and marginals go along, but are not rounded."""
        before = {name: t for name, t in self._buffers.items() if t is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, kept in before.items():
            found = getattr(self, name)
            if found.dtype != kept.dtype:
                self._buffers[name] = kept.to(found.device)
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
        """Draw heads as `torch.nn.Linear` does, and balanced random labels where no `start` was
        given; potentials are 0, and marginals and labels that were given are those again.

        A module that was made on the device "meta" is complete after `to_empty` and this call. On
        meta nothing is drawn.

        Parameters
        ----------
        generator : torch.Generator, optional
            Of the draws, on the CPU; None is torch's own.
        """
        if self.weight.is_meta:
            return
        bound = 1.0 / math.sqrt(self.in_features)
        with torch.no_grad():
            # drawn on the CPU, so that a seed means the same on every device
            for part in (self.weight, self.bias):
                drawn = torch.empty(part.shape, dtype=part.dtype, device="cpu")
                part.copy_(drawn.uniform_(-bound, bound, generator=generator))
            for row in self.labels:
                order = torch.randperm(self.n_rows, generator=generator, device="cpu")
                row.copy_(order % self.n_clusters)
            for name, given in self._begin.items():
                if given is not None:
                    getattr(self, name).copy_(given)
            self.g.zero_()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        """Torch's own, and an error where a layer has a marginal and a state with labels has none,
        or the reverse: such labels and potentials are of other shares. `strict=False` cannot let it
        pass, as torch tells no module of it.
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
        # one product for all heads
        flat = functional.linear(features, self.weight.flatten(0, 1), self.bias.flatten())
        return flat.unflatten(-1, self.bias.shape).transpose(0, 1)

    def loss(self, features: Tensor, rows: Tensor) -> Tensor:
        """Cross entropy with the current labels, mean over rows and heads.

        Parameters
        ----------
        features : Tensor [B, D], dtype (outside autocast) and device of the heads
        rows : Tensor [B], int64
            Which rows of the data set they are, 0 <= row < N.

        Returns
        -------
        Tensor []

        Raises
        ------
        ValueError
            A shape that does not fit, no rows, rows below 0 or above N - 1 (on a CPU; values on a
            GPU are not read), or labels below 0 or above K - 1, which nobody may train on.
        """
        checks.tensor("rows", rows)
        checks.type_error(
            rows.dtype == torch.int64,
            lambda: checks.wording("rows", "dtype int64", str(rows.dtype).removeprefix("torch.")),
        )
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
        """Logarithms of the softmax of one head, without gradient.

        Parameters
        ----------
        features : Tensor [B, D]
        head : int
            Which, 0 <= head < H.

        Returns
        -------
        Tensor [B, K], float32 (float64 for float64)
        """
        head = self._head(head)
        self._check_features(features)
        logits = functional.linear(features, self.weight[head], self.bias[head])
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        return logits.to(wide).log_softmax(-1)

    @torch.no_grad()
    def relabel(
        self, log_probabilities: Tensor | Callable[[int], Tensor], head: int
    ) -> Relabelling:
        """New labels of one head, with the shares asked for; it starts from its last potentials.

        Parameters
        ----------
        log_probabilities : Tensor [N, K], or a callable that gives them for a head
            log softmax of the head for every row of the data set in its order, averaged over
            augmented draws if there are any. A constant for each row changes nothing.
        head : int
            Which, 0 <= head < H.

        Returns
        -------
        Relabelling
            What happened. Labels and potentials are in the buffers.

        Raises
        ------
        TypeError
            A type or dtype other than stated.
        ValueError
            A shape or device that does not fit.
        FloatingPointError
            NaN or +inf among the log-probabilities, or no plan; labels stay as they were.

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
        given = log_probabilities(head) if callable(log_probabilities) else log_probabilities
        checks.tensor("log_probabilities", given)
        shape = [self.n_rows, self.n_clusters]
        spelled = checks.spell(*shape)
        checks.shape("log_probabilities", given, spelled, list(given.shape) == shape)
        checks.same_device("log_probabilities", given, "the heads", self.labels)
        return self._keep(head, self._solved(given.detach(), None, head))

    @torch.no_grad()
    def relabel_features(self, features: Tensor, head: int) -> Relabelling:
        """`relabel` from features of all rows.

        The mean of log softmax(W phi + b) over augmented draws phi is W mean(phi) + b up to a
        constant for each row, so features averaged over draws are all that is needed.

        Parameters
        ----------
        features : Tensor [N, D]
            Of every row of the data set in its order.
        head : int
            Which, 0 <= head < H.

        Returns
        -------
        Relabelling

        Raises
        ------
        TypeError, ValueError, FloatingPointError
            As `relabel`.
        """
        head = self._head(head)
        self._check_features(features)
        rows = [self.n_rows, self.in_features]
        checks.shape("features", features, checks.spell(*rows), list(features.shape) == rows)
        if self.n_rows * self.n_clusters <= DENSE_ENTRIES:
            return self.relabel(self.log_probabilities(features, head), head)
        pair = (features.detach(), self.weight[head].detach().to(features.dtype))
        return self._keep(head, self._solved(pair, self.lam * self.bias[head].detach(), head))

    def _solved(self, scores: Scores, bias: Tensor | None, head: int) -> Sinkhorn:
        found = sinkhorn(
            scores, epsilon=1.0 / self.lam, bias=bias, tol=self.tol, max_iter=self.max_iter,
            row_marginal=self.row_marginal, col_marginal=self.col_marginal, init=self.g[head],
            accelerate="anderson", warn=False,
        )  # fmt: skip
        status = int(found.status)
        if status > NOT_CONVERGED:
            raise FloatingPointError(
                f"head {head}: its log-probabilities are {_WHY[status]}, so they give no labels;"
                " the labels are those of before"
            )
        return found

    def _keep(self, head: int, found: Sinkhorn) -> Relabelling:
        labels = found.labels(strict=self.strict)
        changed = float((labels != self.labels[head]).double().mean())
        counts = torch.bincount(labels, minlength=self.n_clusters)
        self.labels[head] = labels
        self.g[head] = found.g
        ok = bool(found.converged)
        return Relabelling(head, found.n_iter, float(found.err), ok, changed, counts)

    @torch.no_grad()
    def assign(self, features: Tensor, head: int = 0) -> Tensor:
        """Labels of any rows at a head's potentials: what relabelling would give a row that does
        not move them.

        Parameters
        ----------
        features : Tensor [B, D]
        head : int
            Which, 0 <= head < H.

        Returns
        -------
        Tensor [B], int64
            argmax_k(lam log p_k + g_k), lowest index on ties.
        """
        scores = self.lam * self.log_probabilities(features, head)
        return (scores + self.g[head].to(scores.dtype)).argmax(-1)

    # ---- checks ----------------------------------------------------------------------------------

    def _check_features(self, features: Any) -> None:
        checks.tensor("features", features)
        d = self.in_features
        fits = features.ndim == 2 and features.shape[-1] == d
        checks.shape("features", features, f"[B, {d}]", fits)
        checks.same_device("features", features, "the heads", self.weight)
        if not torch.is_autocast_enabled(features.device.type):
            checks.same_dtype("features", features, "the heads", self.weight)

    def _head(self, head: Any) -> int:
        """The number of a head, as an int of Python's."""
        whole = isinstance(head, int | Integral) and not isinstance(head, bool)
        checks.type_error(whole, lambda: checks.wording("head", "an int", repr(head)))
        text = f"an int from 0 to {self.n_heads - 1}"
        checks.value_error(
            bool(0 <= head < self.n_heads), lambda: checks.wording("head", text, head)
        )
        return head if isinstance(head, int) else int(head)

    def _check_rows(self, rows: Tensor) -> None:
        checks.non_empty("rows", rows, 0, "B")
        if rows.is_cpu and not torch.compiler.is_compiling():
            bad = rows[(rows < 0) | (rows >= self.n_rows)][:1].tolist()
            text = f"values from 0 to {self.n_rows - 1}"
            checks.value_error(not bad, lambda: checks.wording("rows", text, bad[0]))

    def _check_labels(self) -> None:
        """Labels out of range raise, before a loss of them; read again only when they changed."""
        if torch.compiler.is_compiling():
            return
        now = None
        if not self.labels.is_inference():
            now = (self.labels.data_ptr(), self.labels._version)
        if now is not None and now == self._trusted:
            return
        bad = ((self.labels < 0) | (self.labels >= self.n_clusters)).nonzero()[:1].tolist()
        if bad:
            head, row = bad[0]
            got = int(self.labels[head, row])
            text = f"values from 0 to {self.n_clusters - 1}"
            raise ValueError(
                checks.wording("labels", text, f"{got} for row {row} of head {head}; relabel first")
            )
        self._trusted = now

    def extra_repr(self) -> str:
        """Sizes and settings, for `print`."""
        sizes = f"{self.in_features}, {self.n_clusters}, n_rows={self.n_rows}"
        words = [f"{sizes}, n_heads={self.n_heads}, lam={self.lam:g}, tol={self.tol:g}"]
        return ", ".join(words + (["strict=True"] if self.strict else []))
