# SPDX-License-Identifier: Apache-2.0
"""DEC and IDEC: an autoencoder, and centroids of its codes that train with its encoder.

Equations: docs/dec.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from os import PathLike
from typing import Any

import numpy as np
import torch
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    ClusterMixin,
    TransformerMixin,
)
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from ..common.base import choose_device, keeps_state_on_failure
from ..common.settings import check_enough_rows, check_n_clusters
from ..common.threads import threads_for
from ..training.checkpoint import check_checkpoint
from ..training.inputs import Inputs
from ..training.trainer import check_writer, encode_rows, seed_of
from .clustering import CHUNK_ROWS, Assignment, assign, student_score
from .inputs import MatrixInputs, ScaledInputs, read, scale_of
from .model_file import DecFile
from .networks import DecNetwork, batch_dtype, product_of
from .settings import CONSTRAINTS, DecSettings
from .training import DecTraining


class DEC(
    DecFile,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    ClusterMixin,
    BaseEstimator,
):
    """Deep embedded clustering: codes of an autoencoder, and centroids that train with the encoder.

    (1) Pretraining: encoder and decoder learn to reconstruct the rows. (2) k-means on the codes.
    (3) Encoder and centroids train on KL(p || q), where q is the Student-t soft assignment of a
    code to the centroids, and p is q sharpened: q^2 over the soft counts, each row normalised (Xie,
    Girshick, Farhadi 2016, arXiv 1511.06335). `variant="idec"` keeps the reconstruction in the loss
    (Guo et al. 2017).

    Parameters
    ----------
    n_clusters : int, >= 1, default 8
        Number of clusters K.
    encoder : torch.nn.Module, optional
        From a batch to codes [B, D]; a copy trains. A module with methods `encode` and `decode` is
        encoder and decoder. None is a chain of linear layers and ReLU by `hidden` and
        `n_components`.
    decoder : torch.nn.Module, optional
        From codes [B, D] to rows, for an own encoder; only pretraining and "idec" use it.
    hidden : sequence of int, default by recipe (250, 250, 1000; paper 500, 500, 2000)
        Sizes of the layers of the default encoder; the decoder is their mirror image.
    n_components : int, >= 1, default by recipe (10)
        Size D of a code of the default encoder.
    variant : "dec" or "idec", default "dec"
        The loss: the mean KL over a batch, or reconstruction + gamma times that.
    target : "frozen", "minibatch" or "self", default "frozen"
        p from all rows at the last refresh; from the batch (fast, and clusters may empty); or from
        the batch with the soft counts of the last refresh.
    pretrain : "ae", "sdae" or "none", default by recipe ("ae"; paper "sdae")
        All layers together; layer by layer with dropout, then together; or an own encoder that is
        trained already.
    augment : callable, optional
        `augment(batch, generator) -> batch`, on rows as the encoder gets them (see `standardize`).
        Pretraining and q see augmented rows, p and results see clean ones. A run repeats only if
        all random numbers come from the generator.
    recipe : "default" or "paper"
        The values of parameters that are None: for minutes on a CPU, or the published ones.
    z_scale : "auto" or float, > 0, default by recipe ("auto"; paper 1)
        Codes times this number are what centroids and q see: q has a length of its own, 1. "auto"
        gives the start of k-means a mean squared distance of 4 within clusters.
    standardize : "auto", True or False, default "auto"
        Whether each column of a matrix becomes (x - mean) / deviation; "auto" does so where the
        range of one column is more than 256 times that of another. Else all columns are divided by
        one number, the largest |x| (paper: the root of the mean square), after their means are
        subtracted if they are far from 0. Datasets and image folders are not scaled.
    alpha : float, > 0, default 1
        Degrees of freedom of q.
    gamma : float, >= 0, default 0.1
        "idec": weight of the KL; the reconstruction is the mean square over all entries of rows as
        the encoder gets them.
    pretrain_epochs : int, >= 1, default by recipe (40)
        Epochs of each phase of pretraining.
    pretrain_steps : int, >= 1, default by recipe (paper 50 000)
        Its steps instead, which are rounded up to whole epochs; "sdae" trains all layers together
        twice as long as one.
    pretrain_batch_size : int, >= 2, default by recipe (64; paper 256)
        Rows of a batch of pretraining.
    pretrain_learning_rate : float, > 0, default by recipe (1e-3; paper .05, a tenth of it after
        each 20 000 of 50 000 steps)
        Its learning rate.
    n_epochs : int, >= 0, default by recipe (those of 400 steps; paper 200)
        Most epochs of clustering; with 0 the result is k-means on the codes.
    batch_size : int, >= 2, default by recipe (256)
        Rows of a batch of clustering; a single last row is part of the batch before.
    learning_rate : float, > 0, default by recipe (1e-3; paper .01)
        Learning rate of clustering.
    optimizer : "adam", "sgd" or callable, default by recipe ("adam"; paper "sgd")
        "sgd" has the momentum .9. `optimizer(parameters) -> torch.optim.Optimizer` is called for
        each phase; its own rates apply, and its step must need no closure.
    interval : int, >= 1, default by recipe (30; paper the batches of an epoch, at most 140)
        Steps between two refreshes of p; each one computes the codes of all rows.
    tol : float, >= 0, default by recipe (1e-3)
        Clustering ends when at two refreshes, one after the other, a smaller share of the labels
        differs from labels that are at least max(interval, an epoch) old.
    regroup : bool, default by recipe (False)
        Whether clusters are regrouped after clustering, by the graph of nearest rows in the
        pretrained codes: two clusters without a gap between them become one, and a cluster with a
        gap in it becomes two (docs/dec.md). Clustering then begins again from the pretrained
        weights, at most three times. The graph has at most 16 384 rows, drawn at random.
    n_init : int, >= 1, default 20
        Starts of k-means on the codes.
    image_size : int, >= 1, optional
        Side to which the images of a folder are cropped (equally at opposite sides) and scaled.
    device : str
        "auto" is the tensor's device, for other data a GPU if there is one.
    random_state : int, RandomState or None
        An int repeats a run, on the CPU to the bit with the same number of threads. The caller's
        global generators do not change.
    verbose : int
        1 shows a bar over the epochs of each phase on stderr (needs tqdm).
    writer : object, optional
        `writer.add_scalar(tag, value, step)` is called for losses and the columns of `history_`.
    callbacks : callable, object or list of them, optional
        Called after every epoch as `callback(estimator, info)`, with a dict of phase, epoch and
        loss, in clustering also changed, smallest and confidence. A true result ends the phase.

    Attributes
    ----------
    labels_ : int32 array [N], or int64 Tensor on its device where X is a Tensor
        Label of each row: the centroid nearest to its code.
    init_labels_ : as `labels_`
        The labels of k-means at the start of clustering.
    cluster_centers_ : array or Tensor [K, D]
        Centroids of the codes that `transform` gives.
    soft_counts_ : float64 array or Tensor [K]
        Sum of q over the rows.
    inertia_ : float
        Sum of the squared distances of the codes to the centroids of their labels.
    n_iter_, n_steps_ : int
        Whole epochs of clustering, and its steps.
    n_rounds_ : int
        Runs of clustering: 1, and one more for each time that clusters were regrouped. What else is
        stated of clustering is that of the last run.
    converged_ : bool
        Whether `stop_reason_` is "tol".
    stop_reason_ : "tol", "max_iter" or "callback"
        What ended the clustering.
    history_ : dict
        Arrays with an entry for each refresh and for the end: step; changed (share of labels, see
        `tol`; 0 at first); loss (mean KL of the steps since the refresh before, in nats a row) and
        reconstruction (idec), NaN at first; entropy of the soft counts over log K; smallest (share
        of rows of the smallest cluster); confidence (mean largest q); sizes [entries, K] (rows of
        each cluster). "pretraining": the mean losses of the epochs of each of its phases.
    init_embedding_ : array or Tensor [N, D], or None
        The codes at the start of clustering, if N D <= 2^24, None after a load; `transform(X)`
        gives those at the end.
    encoder_, decoder_ : torch.nn.Module
        The trained modules in eval mode; they see scaled rows, and codes before `code_scale_`.
    code_scale_ : float
        What `z_scale` became.
    pretrained_ : torch.nn.Module
        Encoder and decoder before clustering. It is an encoder for another fit:
        `DEC(k, model.pretrained_, pretrain="none")`. A file of `save` does not have it.
    files_ : list of str
        For a folder of images: their paths in it, in the order of the rows.
    n_features_in_, feature_names_in_
        As everywhere in scikit-learn; the numbers of a row for other data.
    device_ : str
        Device of the fit.

    Notes
    -----
    No array has N x K entries but the result of `predict_proba`. Memory beside encoder and
    optimiser: the codes, a target of N min(K, D + 1) numbers, three sets of labels. The default
    encoder computes results in float64, so the code of a row does not depend on the rows beside it.

    Dropout draws from torch's global generators: what `SeLa` says of threads holds here too.

    Examples
    --------
    >>> import numpy as np
    >>> from clam_kernels import DEC
    >>> rng = np.random.default_rng(0)
    >>> X = np.concatenate([rng.normal(m, 0.1, (40, 4)) for m in (-1.0, 1.0)]).astype("float32")
    >>> model = DEC(2, hidden=(16,), n_components=2, pretrain_epochs=5, n_epochs=5, random_state=0)
    >>> np.bincount(model.fit_predict(X)).tolist()
    [40, 40]
    """

    _parameter_constraints = CONSTRAINTS

    def __init__(
        self,
        n_clusters: int = 8,
        encoder: nn.Module | None = None,
        *,
        decoder: nn.Module | None = None,
        hidden: Any = None,
        n_components: int | None = None,
        variant: str = "dec",
        target: str = "frozen",
        pretrain: str | None = None,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
        recipe: str = "default",
        z_scale: str | float | None = None,
        standardize: str | bool = "auto",
        alpha: float = 1.0,
        gamma: float = 0.1,
        pretrain_epochs: int | None = None,
        pretrain_steps: int | None = None,
        pretrain_batch_size: int | None = None,
        pretrain_learning_rate: float | None = None,
        n_epochs: int | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        optimizer: str | Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        interval: int | None = None,
        tol: float | None = None,
        regroup: bool | None = None,
        n_init: int = 20,
        image_size: int | None = None,
        device: str = "auto",
        random_state: Any = None,
        verbose: int = 0,
        writer: Any = None,
        callbacks: Any = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.encoder, self.decoder = encoder, decoder
        self.hidden, self.n_components = hidden, n_components
        self.variant, self.target = variant, target
        self.pretrain, self.augment = pretrain, augment
        self.recipe = recipe
        self.z_scale = z_scale
        self.standardize = standardize
        self.alpha, self.gamma = alpha, gamma
        self.pretrain_epochs, self.pretrain_steps = pretrain_epochs, pretrain_steps
        self.pretrain_batch_size = pretrain_batch_size
        self.pretrain_learning_rate = pretrain_learning_rate
        self.n_epochs, self.batch_size = n_epochs, batch_size
        self.learning_rate, self.optimizer = learning_rate, optimizer
        self.interval, self.tol = interval, tol
        self.regroup, self.n_init = regroup, n_init
        self.image_size = image_size
        self.device = device
        self.random_state = random_state
        self.verbose = verbose
        self.writer, self.callbacks = writer, callbacks

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    # ---- fitting -------------------------------------------------------------------------------

    @keeps_state_on_failure
    def fit(
        self,
        X: Any,
        y: Any = None,
        *,
        checkpoint: str | PathLike[str] | None = None,
        checkpoint_every: int | None = None,
        resume: bool = False,
    ) -> DEC:
        """Pretrain, and cluster the codes.

        Parameters
        ----------
        X : array-like or Tensor [N, features] or [N, ...], path, or map-style Dataset
            Finite rows. The default encoder flattens them. A path is an .npy (memory-mapped), an
            .npz with one array or one called x, or a folder of images (needs Pillow), read batch by
            batch, [C, H, W] in [0, 1]. Items of a Dataset are tensors or arrays, or tuples that
            begin with one.
        y : object, optional
            Ignored, for pipelines.
        checkpoint : str or PathLike, optional
            File of the whole state of the run, pretraining and clustering. A write replaces the
            whole file in one step.
        checkpoint_every : int, >= 1, optional
            Batches between two writes; default those of an epoch of clustering. The end of a phase
            is a write too.
        resume : bool
            Continue the run of the file if there is one; a finished run is only loaded. On the CPU,
            with the same number of threads, the result has the bits of a fit without an
            interruption. The file does not have the state of callbacks, nor that of a Dataset whose
            items are random.

        Returns
        -------
        DEC
            The estimator.

        Raises
        ------
        InvalidParameterError, ValueError, TypeError
            A parameter, shape or dtype does not fit; NaN or infinity in X, with its place; a module
            is missing; a layer of "sdae" learned nothing; a checkpoint of other settings or data.
        FloatingPointError
            The loss or a code is not finite.
        FileExistsError
            The checkpoint exists, without `resume`.
        ModelFileError
            The checkpoint is damaged.
        """
        self._validate_params()
        check_n_clusters(self.n_clusters)
        settings = DecSettings.of(self)
        check_writer(settings.writer)
        images = (None, settings.image_size)
        inner, shape = read(self, X, settings.device, images, reset=True)
        check_enough_rows(len(inner), settings.n_clusters)
        check_checkpoint(checkpoint, checkpoint_every, resume)
        device = choose_device(settings.device, inner.origin)
        names = getattr(self, "feature_names_in_", None)
        is_paper = settings.recipe == "paper"
        self._scale = scale_of(inner, shape, names, settings.standardize, is_paper)
        inputs = ScaledInputs(inner, self._scale, is_own=settings.encoder is not None)
        settings.callbacks.fit_begin()
        training = DecTraining(
            settings, inputs, self.n_features_in_, device, seed_of(settings.random_state)
        )
        if checkpoint is not None:
            training.use_checkpoint(checkpoint, checkpoint_every, resume)
        with threads_for(product_of(training.context.network, settings.batch_size)):
            training.go()
        self._store(settings, inputs, training)
        settings.callbacks.fit_end()
        return self

    def _store(self, settings: DecSettings, inputs: Inputs, training: DecTraining) -> None:
        """Store the attributes of a fit."""
        clustering, network = training.clustering, training.context.network
        assert clustering is not None
        assert clustering.pretrained is not None
        self._network = network
        self.pretrained_ = clustering.pretrained.eval()
        size = network.centroids.shape[1]
        self._layers = [settings.encoder is not None, list(self._scale.shape),
                        list(settings.hidden), size]  # fmt: skip
        self._images = inputs.images and list(inputs.images)
        self._n_features_out = size
        self.__dict__.pop("files_", None)
        if inputs.files is not None:
            self.files_ = inputs.files
        self.device_ = str(training.context.device)
        _, result = self._assign(settings, inputs)
        self.labels_ = inputs.give(result.labels)
        assert clustering.init_labels is not None
        self.init_labels_ = inputs.give(clustering.init_labels)
        codes = clustering.init_codes
        self.init_embedding_ = None if codes is None else inputs.give(codes)
        self.cluster_centers_ = inputs.give(network.centroids.detach().clone())
        self.soft_counts_ = inputs.give(result.counts)
        self.inertia_ = result.inertia
        self.n_iter_, self.n_steps_ = clustering.run.epoch, clustering.run.steps
        self.stop_reason_ = clustering.stop_reason
        self.n_rounds_ = training.at - training.first
        self.converged_ = self.stop_reason_ == "tol"
        self._table = np.array(clustering.rows, dtype=np.float64)
        losses = training.losses.items()
        self._pretraining = [[name, list(x)] for name, x in losses if name != clustering.name]
        self._set_modules()
        clustering.warn_of_result()

    # ---- use -----------------------------------------------------------------------------------

    def _read(self, X: Any) -> tuple[DecSettings, Inputs]:
        """New rows in the scale of the fit."""
        check_is_fitted(self, "cluster_centers_")
        settings = DecSettings.of(self)
        mode, size = self._images or (None, settings.image_size)
        place = str(self._network.centroids.device)
        inner, _ = read(self, X, place, (mode, size), reset=False)
        return settings, ScaledInputs(inner, self._scale, is_own=self._layers[0])

    def _codes(self, settings: DecSettings, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """(codes [N, D], centroids); in float64 by the default encoder."""
        network: DecNetwork = self._network
        if not self._layers[0]:
            network = copy.deepcopy(network).double()
            network.dtype = torch.float64
        device, dtype = network.centroids.device, batch_dtype(network)
        with threads_for(product_of(network, settings.batch_size)):
            codes = encode_rows(network, inputs, device, dtype, settings.batch_size)
        return codes, network.centroids.detach()

    def _assign(self, settings: DecSettings, inputs: Inputs) -> tuple[Tensor, Assignment]:
        codes, centroids = self._codes(settings, inputs)
        return codes, assign(codes, centroids, settings.alpha)

    def predict(self, X: Any) -> Any:
        """Label of each row: the centroid nearest to its code, the lowest index on ties.

        Parameters
        ----------
        X : as in `fit`

        Returns
        -------
        int32 array [N], or int64 Tensor on its device for a Tensor
        """
        settings, inputs = self._read(X)
        return inputs.give(self._assign(settings, inputs)[1].labels)

    def predict_proba(self, X: Any) -> Any:
        """Soft assignment q of each row.

            q_ij = (1 + |z_i - mu_j|^2 / alpha)^(-(alpha + 1) / 2) / (its sum over j)

        Parameters
        ----------
        X : as in `fit`

        Returns
        -------
        array or Tensor [N, K], in the dtype of X if that is float32 or float64
            Rows of sum 1.
        """
        settings, inputs = self._read(X)
        codes, centroids = self._codes(settings, inputs)
        wide = centroids.double()
        parts = []
        for z in codes.split(CHUNK_ROWS):
            d = torch.cdist(z.double(), wide, compute_mode="donot_use_mm_for_euclid_dist")
            q = student_score(d.square(), settings.alpha).softmax(1)
            parts.append(q.to(_result_dtype(inputs, codes)))
        return inputs.give(torch.cat(parts))

    def transform(self, X: Any) -> Any:
        """Codes of rows, times `code_scale_`, without augmentation.

        Parameters
        ----------
        X : as in `fit`

        Returns
        -------
        array or Tensor [N, D], in the dtype of X if that is float32 or float64
        """
        settings, inputs = self._read(X)
        codes, _ = self._codes(settings, inputs)
        return inputs.give(codes.to(_result_dtype(inputs, codes)))

    def score(self, X: Any, y: Any = None) -> float:
        """Minus the sum of the squared distances of the codes to their nearest centroids.

        The codes are those of this model, so scores of two models do not compare.

        Parameters
        ----------
        X : as in `fit`
        y : ignored

        Returns
        -------
        float
        """
        settings, inputs = self._read(X)
        return -self._assign(settings, inputs)[1].inertia


def _result_dtype(inputs: Inputs, codes: Tensor) -> torch.dtype:
    """The dtype of results: that of a matrix, else float32 or that of the own encoder."""
    inner = inputs.inner if isinstance(inputs, ScaledInputs) else inputs
    if isinstance(inner, MatrixInputs):
        return inner.rows.result
    return torch.float32 if codes.dtype == torch.float64 else codes.dtype
