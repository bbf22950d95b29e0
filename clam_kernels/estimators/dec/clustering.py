# SPDX-License-Identifier: Apache-2.0
"""Clustering of a DEC: centroids from k-means on codes, then steps on KL(p || q) against a target p
that is refreshed from all rows. Equations: docs/dec.md.
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from ..._core.warn import warn
from ...ops._dec_target import log_counts_of
from ...ops.dec import DecTarget, dec_loss, dec_target, student_t_stats
from ...ops.kmeans import kmeans_update
from ..kmeans import KMeans
from ..training.checkpoint import State, of_module, restore_module, under
from .networks import EncoderDecoder
from .phases import Context, Phase
from .pretraining import dead_layers, reconstruction_loss
from .regroup import neighbour_graph, regroup

COLUMNS = (
    "step", "changed", "loss", "reconstruction", "entropy", "smallest", "confidence",
)  # fmt: skip
# Mean squared distance of a code to its centroid at the start, with z_scale="auto".
WITHIN = 4.0
# Passes of the stop rule, one after the other, that end the clustering.
PASSES = 2
# The mean largest q is 1/K where q is uniform, at most 1. At the start it is nearly uniform below
# (1 + NEARLY_UNIFORM (1 - 1/K)) / K.
NEARLY_UNIFORM = 0.5
# A fit warns where a cluster has less than this part of an equal share in so many checks.
SMALL_SHARE, SMALL_CHECKS = 0.1, 3
# A fit warns where this share of the labels still changes at its end.
MANY_CHANGES = 0.05
# Start codes with more numbers than this are not kept.
MOST_START_CODES = 1 << 24
# Most rows of the graph that regroups, and augmented draws of each.
GRAPH_ROWS, DRAWS = 1 << 14, 5
# Rows of a chunk.
CHUNK_ROWS = 1 << 13


class Assignment(NamedTuple):
    """Labels of all rows, and what the history has of them."""

    labels: Tensor  # [N] int64
    counts: Tensor  # [K] float64, soft counts
    inertia: float  # sum of the squared distances to the centroids of the labels
    confidence: float  # mean over the rows of the largest q


class Snapshot(NamedTuple):
    """The labels at a step."""

    labels: Tensor
    step: int


def assign(z: Tensor, centroids: Tensor, alpha: float) -> Assignment:
    """Labels, soft counts, inertia and mean max q of codes."""
    lse, labels, counts, _ = student_t_stats(z, centroids, alpha=alpha)
    inertia = confidence = 0.0
    for part, label, norm in zip(
        z.split(CHUNK_ROWS), labels.split(CHUNK_ROWS), lse.split(CHUNK_ROWS), strict=True
    ):
        sqdist = (part - centroids[label]).square().sum(1).double()
        inertia += float(sqdist.sum())
        confidence += float((student_score(sqdist, alpha) - norm.double()).exp().sum())
    return Assignment(labels, counts, inertia, confidence / len(z))


def student_score(sqdist: Tensor, alpha: float) -> Tensor:
    """-(alpha + 1)/2 log(1 + d^2/alpha); q is its softmax over the centroids."""
    return -0.5 * (alpha + 1.0) * torch.log1p(sqdist / alpha)


class Clustering(Phase):
    """The phase that trains encoder and centroids (idec: and the decoder).

    dec: loss = mean_i KL(p_i || q_i); idec: loss = |x - decoder(z)|^2 / features + gamma mean KL.
    p comes from clean rows in eval mode, q from augmented rows.
    """

    name = "cluster"

    def __init__(
        self,
        context: Context,
        number: int,
        before: Clustering | None = None,
        labels: Tensor | None = None,
    ) -> None:
        """`before` is the run whose clusters were regrouped to `labels` [N], where -1 is a row
        without a label; without it, k-means is the start.
        """
        super().__init__(context, number)
        self.before, self.labels = before, labels
        settings, network = context.settings, context.network
        self.is_idec = settings.variant == "idec"
        parameters = [network.centroids, *network.encoder.parameters()]
        if self.is_idec:
            assert network.decoder is not None
            parameters += network.decoder.parameters()
        self.run = self.start_run(
            parameters, settings.learning_rate, settings.batch_size,
            settings.cluster_length(len(context.inputs)),
        )  # fmt: skip
        self.interval = settings.interval_of(len(context.inputs))
        # labels are compared with labels that are at least so many steps old
        self.lag = max(self.interval, self.run.length.steps_per_epoch)
        self.pretrained: EncoderDecoder | None = None
        self.target: DecTarget | None = None
        self.init_labels: Tensor | None = None
        self.init_codes: Tensor | None = None
        self.older: Snapshot | None = None
        self.newer: Snapshot | None = None
        self.passes = 0
        self.stop_reason = "max_iter"
        self.next_labels: Tensor | None = None  # the start of the next run
        self.rows: list[tuple[float, ...]] = []  # of the history, with the sizes of the clusters
        self._reset_sums()

    # ---- the start -------------------------------------------------------------------------------

    def begin(self) -> None:
        """Centroids by k-means on the codes of all rows, and the scale of the codes."""
        if self.before is not None:
            self._begin_again(self.before)
            return
        context, network = self.context, self.context.network
        settings = context.settings
        self.pretrained = network.pair()
        for layer in dead_layers(context):
            warn(
                f"DEC: more than half of the units of layer {layer} of the encoder are 0 for all"
                " rows: lower pretrain_learning_rate, or scale X to about [-1, 1]"
            )
        network.code_scale.fill_(1.0)
        z = context.codes()
        _check_codes(z)
        model = KMeans(settings.n_clusters, n_init=settings.n_init, random_state=context.seed)
        model.fit(z)
        self._place(model.cluster_centers_, model.inertia_ / len(z))

    def _place(self, centroids: Tensor, within: float) -> None:
        """Set the scale of the codes and the centroids, from those of codes that are not scaled."""
        network, scale = self.context.network, self.context.settings.z_scale
        if scale == "auto":
            scale = math.sqrt(WITHIN / within) if within > 0 else 1.0
        with torch.no_grad():
            network.code_scale.fill_(float(scale))
            network.centroids.copy_(centroids * network.code_scale)

    def _begin_again(self, before: Clustering) -> None:
        """The pretrained weights, and centroids that are the means of the regrouped clusters."""
        assert before.pretrained is not None
        assert self.labels is not None
        self._use_pretrained(before)
        self.pretrained = before.pretrained
        self.init_labels, self.init_codes = before.init_labels, before.init_codes
        z = self.context.codes()
        sums, counts = kmeans_update(z, self.labels, self.context.settings.n_clusters)
        means = (sums / counts[:, None]).to(z.dtype)
        known = self.labels >= 0
        distances = (z[known] - means[self.labels[known]]).square().sum(1)
        self._place(means, float(distances.mean()))

    def _use_pretrained(self, run: Clustering) -> None:
        """Encoder and decoder as before clustering; codes without a scale."""
        network = self.context.network
        pair = EncoderDecoder(network.encoder, network.decoder)
        assert run.pretrained is not None
        pair.load_state_dict(run.pretrained.state_dict())
        network.code_scale.fill_(1.0)

    def labels_of_regrouping(self) -> Tensor | None:
        """Labels after the moves of `regroup`, -1 for a row outside the graph; None for none."""
        context, k = self.context, self.context.settings.n_clusters
        trained = copy.deepcopy(context.network.state_dict())
        labels = assign(context.codes(), context.network.centroids.detach(), 1.0).labels
        self._use_pretrained(self)
        generator = torch.Generator("cpu").manual_seed(context.seed)
        order = torch.randperm(len(labels), generator=generator, device="cpu", dtype=torch.int64)
        some = order[:GRAPH_ROWS].sort().values
        if context.device.type != "cpu":  # an augmentation draws on the device of its batch
            generator = torch.Generator(context.device).manual_seed(context.seed)
        copies = DRAWS if context.settings.augment is not None else 0
        draws = [context.codes_of(some, generator) for _ in range(copies)]
        graph = neighbour_graph(context.codes_of(some), draws)
        context.network.load_state_dict(trained)
        new, moves = regroup(graph, labels.cpu()[some].numpy(), k)
        if not moves or len(np.unique(new)) < k:
            return None
        result = torch.full_like(labels, -1)
        result[some.to(result.device)] = torch.from_numpy(new).to(result)
        return result

    def _store_start(self, z: Tensor, result: Assignment) -> None:
        """Store labels and codes at the first refresh; warn where q is nearly uniform."""
        if self.init_labels is not None:
            return
        self.init_labels = result.labels
        self.init_codes = z if z.numel() <= MOST_START_CODES else None
        k = self.context.settings.n_clusters
        bound = (1.0 + NEARLY_UNIFORM * (1.0 - 1.0 / k)) / k
        if k > 1 and not self.run.is_over and result.confidence < bound:
            is_auto = self.context.settings.z_scale == "auto"
            cure = "a longer pretraining" if is_auto else "z_scale='auto', or a longer pretraining"
            warn(
                f"DEC: at the start the mean largest q is {result.confidence:.3g}, nearly 1/K ="
                f" {1 / k:.3g}, so the target teaches little: use {cure}"
            )

    # ---- the steps -------------------------------------------------------------------------------

    def before_step(self) -> None:
        if self.run.steps % self.interval == 0:
            self.refresh()

    def refresh(self) -> None:
        """Labels of all rows; then either the end of the run, or a new target."""
        settings, network = self.context.settings, self.context.network
        z = self.context.codes()
        _check_codes(z)
        result = assign(z, network.centroids.detach(), settings.alpha)
        self._store_start(z, result)
        if self._has_converged(result):
            self.stop_reason, self.run.is_stopped = "tol", True
            return
        self.target = self._new_target(z, result)

    def _new_target(self, z: Tensor, result: Assignment) -> DecTarget | None:
        settings, centroids = self.context.settings, self.context.network.centroids.detach()
        if settings.target == "minibatch":
            return None
        if settings.target == "frozen":
            return dec_target(z, centroids, alpha=settings.alpha)
        log_counts = log_counts_of(result.counts)
        return DecTarget(log_counts, centroids.clone(), settings.alpha)

    def _has_converged(self, result: Assignment) -> bool:
        """Add a row to the history; return whether the stop rule ends the run.

        It compares labels with labels that are at least `lag` steps old, since labels change
        little in few steps whatever the state; the first refresh compares nothing.
        """
        step = self.run.steps
        if self.newer is None or step - self.newer.step >= self.lag:
            self.older, self.newer = self.newer, Snapshot(result.labels, step)
        changed, is_old = self._changed(result.labels)
        self._record(result, changed)
        self.passes = self.passes + 1 if is_old and changed < self.context.settings.tol else 0
        return self.passes >= PASSES

    def _changed(self, labels: Tensor) -> tuple[float, bool]:
        """(share of rows whose label changed, whether the other labels are `lag` steps old)."""
        before = self.older or self.newer
        assert before is not None
        changed = float((labels != before.labels).double().mean())
        return changed, self.run.steps - before.step >= self.lag

    def _record(self, result: Assignment, changed: float) -> None:
        self.run.read_losses()
        kl, rec = (self.sums / self.count).tolist() if self.count else (math.nan, math.nan)
        self._reset_sums()
        k, n = len(result.counts), len(result.labels)
        share = result.counts / n
        entropy = float(torch.special.entr(share).sum()) / math.log(k) if k > 1 else 1.0
        sizes = torch.bincount(result.labels, minlength=k).tolist()
        rec = rec if self.is_idec else math.nan
        figures = (changed, kl, rec, entropy, min(sizes) / n, result.confidence)
        self.rows.append((self.run.steps, *figures, *sizes))
        for name, value in zip(COLUMNS[1:], figures, strict=True):
            if not math.isnan(value):
                self.run.scalar(name if name != "loss" else "kl", value)

    def _reset_sums(self) -> None:
        """Begin the sums of KL and reconstruction since the last refresh."""
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.context.device)
        self.count = 0

    def loss(self, rows: Tensor) -> Tensor:
        context, settings = self.context, self.context.settings
        x = context.draw(rows, self.run.generators["augment"])
        z = context.network(x)
        index = rows if settings.target == "frozen" else None
        kl = dec_loss(
            z, context.network.centroids, self.target, index,
            alpha=settings.alpha, mode=settings.target,
        )  # fmt: skip
        self.sums[0] += kl.detach()
        self.count += 1
        if not self.is_idec:
            return kl
        rec = reconstruction_loss(context.network.reconstruct(z), x)
        self.sums[1] += rec.detach()
        return rec + settings.gamma * kl

    def figures(self) -> dict[str, Any]:
        last = dict(zip(COLUMNS, self.rows[-1], strict=False))
        names = ("changed", "smallest", "confidence")
        return {**super().figures(), **{name: last[name] for name in names}}

    # ---- the end ---------------------------------------------------------------------------------

    def end(self) -> None:
        """The history gets a last row, unless the run ended at a refresh."""
        if not self.rows or self.rows[-1][0] != self.run.steps:
            z = self.context.codes()
            _check_codes(z)
            result = assign(z, self.context.network.centroids.detach(), self.context.settings.alpha)
            self._store_start(z, result)  # without epochs this is the start
            self.newer = self.newer or Snapshot(result.labels, self.run.steps)
            self._record(result, self._changed(result.labels)[0])
        if self.run.is_stopped and self.stop_reason != "tol":
            self.stop_reason = "callback"
        settings = self.context.settings
        is_wanted = settings.regroup and settings.n_clusters > 1 and self.stop_reason != "callback"
        if is_wanted and self.run.steps:
            self.next_labels = self.labels_of_regrouping()

    def warn_of_result(self) -> None:
        """Warn of small clusters, and of labels that still change."""
        k = self.context.settings.n_clusters
        table = [dict(zip(COLUMNS, row, strict=False)) for row in self.rows]
        last = [row["smallest"] for row in table[-SMALL_CHECKS:]]
        used = sum(size > 0 for size in self.rows[-1][len(COLUMNS) :])
        if used < k:
            warn(
                f"DEC: {used} of {k} clusters have rows at the end: lower learning_rate, pretrain"
                " longer, use variant='idec' or target='frozen', or choose a smaller n_clusters",
                ConvergenceWarning,
            )
            return
        if max(last) < SMALL_SHARE / k:
            warn(
                f"DEC: the smallest cluster has {last[-1]:.2%} of the rows, less than a tenth of an"
                f" equal share, in the last {len(last)} checks: lower learning_rate or n_epochs,"
                " use variant='idec' or target='frozen', or choose a smaller n_clusters"
            )
        changed = table[-1]["changed"]
        if self.stop_reason == "max_iter" and changed > MANY_CHANGES:
            warn(
                f"DEC: {changed:.1%} of the labels changed in the last epoch: raise n_epochs, or"
                " lower learning_rate",
                ConvergenceWarning,
            )

    # ---- state -----------------------------------------------------------------------------------

    def state(self) -> State:
        tensors, numbers = self.run.state()
        assert self.pretrained is not None
        tensors |= of_module("pretrained", self.pretrained)
        names = "init_labels", "init_codes", "next_labels"
        optional = {name: getattr(self, name) for name in names}
        steps = {}
        for name in ("older", "newer"):
            snapshot = getattr(self, name)
            if snapshot is not None:
                optional[f"{name}_labels"], steps[name] = snapshot
        if self.target is not None:
            for name in ("log_counts", "mu0", "z0", "log_norm", "p"):
                optional[f"target.{name}"] = getattr(self.target, name)
        tensors |= {name: value for name, value in optional.items() if value is not None}
        tensors["sums"] = self.sums
        tensors["history"] = torch.tensor(self.rows, dtype=torch.float64, device="cpu")
        rest = {"count": self.count, "passes": self.passes, "stop_reason": self.stop_reason}
        return tensors, {**numbers, **rest, "snapshots": steps}

    def restore(self, state: State) -> None:
        tensors, numbers = state
        self.run.restore(state)
        device = self.context.device
        self.pretrained = self.context.network.pair()
        restore_module(self.pretrained, under("pretrained", tensors), device)
        self.sums = tensors["sums"].to(device)
        width = len(COLUMNS) + self.context.settings.n_clusters
        self.rows = [tuple(row) for row in tensors["history"].reshape(-1, width).tolist()]
        self.count, self.passes = int(numbers["count"]), int(numbers["passes"])
        self.stop_reason = str(numbers["stop_reason"])
        placed = {name: tensor.to(device) for name, tensor in tensors.items()}
        self.init_labels, self.init_codes = placed.get("init_labels"), placed.get("init_codes")
        self.next_labels = placed.get("next_labels")
        for name, step in numbers["snapshots"].items():
            setattr(self, name, Snapshot(placed[f"{name}_labels"], int(step)))
        parts: dict[str, Any] = under("target", placed)
        if parts:
            self.target = DecTarget(**parts, alpha0=self.context.settings.alpha)


def _check_codes(z: Tensor) -> None:
    """FloatingPointError, which names the first row whose code is not finite."""
    if bool(z.sum().isfinite()):
        return
    bad = (~z.isfinite()).any(1).nonzero()[:1].tolist()
    if bad:
        raise FloatingPointError(
            f"encoder: expected finite codes, got NaN or infinity for row {bad[0][0]};"
            " lower pretrain_learning_rate or learning_rate"
        )
