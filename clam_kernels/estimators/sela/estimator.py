# SPDX-License-Identifier: Apache-2.0
"""SeLa: training of an encoder on labels of its own data, which are computed from its features.

Equations: docs/sela.md.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from ... import serialize, tables
from ..._core.warn import warn
from ..common.base import choose_device, keeps_state_on_failure
from ..common.settings import check_enough_rows
from ..training.checkpoint import check_checkpoint
from ..training.inputs import Inputs, inputs_of
from ..training.trainer import check_writer, dtype_of, encode_rows, seed_of
from .labelling import Training
from .settings import CONSTRAINTS, SeLaSettings

Schedule = str | Callable[[float], float]


class SeLa(BaseEstimator):
    """Self-labelling: an encoder learns labels of its own data, of equal shares, without classes.

    Two steps alternate. (1) Encoder and heads train by cross entropy with the current labels, mean
    over heads. (2) Each head gets new labels from its log-probabilities, averaged over augmented
    draws, by the optimal transport that gives all labels equal shares (Asano, Rupprecht, Vedaldi
    2020, arXiv 1911.05371). Without equal shares all rows could get one label; augmentation defines
    which differences between rows do not matter.

    Parameters
    ----------
    encoder : torch.nn.Module
        From a batch to features [B, D]. `fit` trains a copy, `encoder_`.
    n_clusters : int, >= 1
        Number of labels K; choose more than the expected classes.
    n_heads : int, >= 1
        Number of heads H; each has its own labels.
    recipe : "default" or "paper"
        The values of parameters that are None: for a run of minutes, or those published for
        ImageNet (SGD with steps, 100 relabellings, one draw).
    augment : callable, optional
        `augment(batch, generator) -> batch` on the batch's device. A run repeats only if all random
        numbers come from the generator.
    n_epochs : int, >= 1, default by recipe (40; paper 400)
        Passes over the data.
    batch_size : int, >= 2, default by recipe (128; paper 256)
        Rows of a batch; a single last row is part of the batch before.
    learning_rate : float, > 0
        Learning rate of SGD.
    momentum : float in [0, 1)
        Momentum of SGD.
    weight_decay : float, >= 0, default by recipe (1e-4; paper 1e-5)
        Weight decay of SGD.
    schedule : "cosine", "steps", "constant" or callable, default by recipe (cosine; paper steps)
        Factor of the learning rate; a callable gets the progress in [0, 1).
    optimizer : callable, optional
        `optimizer(parameters) -> torch.optim.Optimizer` instead of SGD; its step must need no
        closure. `schedule` still applies.
    n_relabels : int, >= 1, default by recipe (12; paper 100)
        Number of relabellings of all heads: after (n_epochs + 1.01) N linspace(0, 1, n_relabels)^2
        rows of training; the last one is at the end. The first one
        is before the first step.
    n_augment : int, >= 1, default by recipe (4; paper 1)
        Number of augmented draws of each row that a relabelling averages.
    lam : float, > 0
        Inverse temperature of the transport plan.
    tol : float, > 0, default by recipe (1e-3; paper .1 / N)
        L1 error of the label shares.
    max_iter : int, >= 1, default by recipe (400; paper 2000)
        Most iterations of a relabelling.
    col_marginal : array-like [K], > 0, optional
        Shares of the labels; None is equal shares.
    row_marginal : array-like [N], > 0, optional
        Masses of the rows in the shares; None is equal masses.
    strict : bool
        Whether every label has exactly its share of the rows, rounded to whole rows.
    image_size : int, >= 1, optional
        Side to which the images of a folder are cropped (equally at opposite sides) and scaled.
    device : str
        "auto" is the tensor's device, for other data a GPU if there is one.
    random_state : int, RandomState or None
        An int repeats a run, on the CPU to the bit with the same number of threads, on a GPU as far
        as the encoder's layers repeat. The caller's global generators do not change.
    verbose : int
        1 shows a bar over epochs on stderr (needs tqdm).
    writer : object, optional
        `writer.add_scalar(tag, value, step)` is called for losses, rate and relabellings; such as
        torch's SummaryWriter.
    callbacks : callable, object or list of them, optional
        Called after every epoch as `callback(estimator, info)`, with a dict of epoch, loss and
        changed; a true result ends the training.

    Attributes
    ----------
    labels_ : int32 array [H, N], or int64 Tensor on its device where data is a Tensor
        Labels of the rows by each head.
    encoder_ : torch.nn.Module
        The trained copy, in eval mode.
    heads_ : clam_kernels.nn.SelfLabeller
        The heads, with their labels and potentials.
    history_ : dict
        "loss": mean of each epoch; "relabellings": dict of arrays, a row for each head each time:
        seen (rows of training before it), head, n_iter, err, converged, changed (share of rows).
    files_ : list of str
        For a folder of images: their paths in it, in the order of the rows.
    n_steps_ : int
        Number of steps of the optimiser.
    device_ : str
        Device of the fit.

    Notes
    -----
    Memory beside encoder and optimiser: N D features and N K scores of one head at a time, 8 N H
    bytes of labels. Features for relabelling are computed in training mode, in random batches, as
    in the published code: on digits, labels from eval mode gave features that cluster worse
    (docs/sela.md).

    Dropout draws from torch's global generators, which all threads share. In each step a fit sets
    them to its own states, and restores the caller's states at the end of the step. Fits in several
    threads take turns step by step, and each gives the result that it gives alone. Another thread
    must not draw from these generators while a fit runs, as it could get the fit's numbers: give it
    a generator of its own.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from clam_kernels import SeLa
    >>> rng = np.random.default_rng(0)
    >>> X = np.concatenate([rng.normal(m, 0.1, (40, 2)) for m in (-1.0, 1.0)]).astype("float32")
    >>> def noisy(batch, generator):
    ...     return batch + 0.1 * torch.randn(batch.shape, generator=generator)
    >>> encoder = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.ReLU())
    >>> model = SeLa(encoder, 2, n_heads=3, n_epochs=5, augment=noisy, random_state=0).fit(X)
    >>> model.labels_.shape, np.bincount(model.labels_[0]).tolist()
    ((3, 80), [40, 40])
    """

    _parameter_constraints = CONSTRAINTS
    _images: tuple[str, int | None] | None = None  # mode and side of the fit's images

    def __init__(
        self,
        encoder: nn.Module,
        n_clusters: int,
        *,
        n_heads: int = 10,
        recipe: str = "default",
        augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
        n_epochs: int | None = None,
        batch_size: int | None = None,
        learning_rate: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float | None = None,
        schedule: Schedule | None = None,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        n_relabels: int | None = None,
        n_augment: int | None = None,
        lam: float = 25.0,
        tol: float | None = None,
        max_iter: int | None = None,
        col_marginal: Any = None,
        row_marginal: Any = None,
        strict: bool = False,
        image_size: int | None = None,
        device: str = "auto",
        random_state: Any = None,
        verbose: int = 0,
        writer: Any = None,
        callbacks: Any = None,
    ) -> None:
        self.encoder = encoder
        self.n_clusters = n_clusters
        self.n_heads = n_heads
        self.recipe = recipe
        self.augment = augment
        self.n_epochs = n_epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.optimizer = optimizer
        self.n_relabels = n_relabels
        self.n_augment = n_augment
        self.lam = lam
        self.tol = tol
        self.max_iter = max_iter
        self.col_marginal = col_marginal
        self.row_marginal = row_marginal
        self.strict = strict
        self.image_size = image_size
        self.device = device
        self.random_state = random_state
        self.verbose = verbose
        self.writer = writer
        self.callbacks = callbacks

    @keeps_state_on_failure
    def fit(
        self,
        data: Any,
        y: Any = None,
        *,
        checkpoint: str | PathLike[str] | None = None,
        checkpoint_every: int | None = None,
        resume: bool = False,
    ) -> SeLa:
        """Train a copy of the encoder, and compute labels.

        Parameters
        ----------
        data : Tensor or array [N, ...], path, or map-style Dataset
            Rows. A path is an .npy (memory-mapped), an .npz with one array or one called x, or a
            folder of images (needs Pillow), which are read batch by batch. Images of a folder are
            [C, H, W] in [0, 1], grey (C = 1) if all of them are, else colour (C = 3). Arrays, files
            of them and tensors are not scaled. Items of a Dataset are tensors or arrays, or tuples
            that begin with one. The encoder gets all rows in its dtype, except whole numbers of a
            Dataset, which keep their dtype.
        y : object, optional
            Ignored, for pipelines.
        checkpoint : str or PathLike, optional
            File of the whole state of the run. A write replaces the whole file in one step.
        checkpoint_every : int, >= 1, optional
            Batches between two writes; default those of an epoch.
        resume : bool
            Continue the run of the file if there is one; a finished run is only loaded. On the CPU,
            with the same number of threads, the result has the bits of a fit without an
            interruption. The file does not have the state of callbacks, nor that of a Dataset whose
            items are random.

        Returns
        -------
        self

        Raises
        ------
        InvalidParameterError, ValueError, TypeError
            A parameter, shape or dtype does not fit; NaN or infinity in the data, with its place; a
            checkpoint of other settings or data.
        FloatingPointError
            The loss is not finite.
        FileExistsError
            The checkpoint exists, without `resume`.
        ModelFileError
            The checkpoint is damaged, or the encoder has more tensors than a file can have.
        """
        self._validate_params()
        settings = SeLaSettings.of(self)
        check_writer(settings.writer)
        inputs = inputs_of(data, settings.image_size)
        check_enough_rows(len(inputs), settings.n_clusters)
        check_checkpoint(checkpoint, checkpoint_every, resume)
        device = choose_device(settings.device, inputs.origin)
        seed = seed_of(settings.random_state)
        settings.callbacks.fit_begin()
        training = Training(settings, inputs, device, seed)
        if checkpoint is not None:
            training.use_checkpoint(checkpoint, checkpoint_every, resume)
        training.go()
        self._store(training)
        settings.callbacks.fit_end()
        return self

    def _store(self, training: Training) -> None:
        """Store the attributes of a fit; warn of heads that did not converge."""
        self.encoder_ = training.encoder.eval()
        self.heads_ = training.heads
        self.labels_ = training.inputs.give(training.heads.labels)
        self.device_, self.n_steps_ = str(training.device), training.run.steps
        table = training.table()
        self.history_ = {"loss": list(training.run.losses), "relabellings": table}
        self._images = training.inputs.images
        self.__dict__.pop("files_", None)
        if training.inputs.files is not None:
            self.files_ = training.inputs.files
        heads = training.settings.n_heads
        is_open = table["converged"][-heads:] == 0
        if is_open.any():
            worst = table["err"][-heads:].max()
            warn(
                f"SeLa: {int(is_open.sum())} of {heads} heads were last relabelled with an"
                f" error of the shares up to {worst:.3g}, tol={training.tol:g}: raise max_iter,"
                " or lower lam",
                ConvergenceWarning,
            )

    # ---- use -------------------------------------------------------------------------------------

    def transform(self, data: Any) -> Any:
        """Features of rows, by the trained encoder in eval mode, without augmentation.

        Parameters
        ----------
        data : as in `fit`

        Returns
        -------
        array or Tensor [N, D]
            An array for arrays, a Tensor for a Tensor.
        """
        check_is_fitted(self, "encoder_")
        settings = SeLaSettings.of(self)
        inputs = self._inputs(settings, data)
        return inputs.give(self._features(settings, inputs))

    def predict(self, data: Any, head: int = 0) -> Any:
        """Labels of rows by one head at the potentials of its last relabelling.

        argmax_k(lam log p_k + g_k): the label of that relabelling for a row that does not change
        the potentials. Shares of new rows may be unequal. Training rows may get other labels than
        `labels_`, as these are of augmented draws, maybe `strict`, and of an encoder in training
        mode: BatchNorm used the statistics of each batch there, and uses its running ones here.

        Parameters
        ----------
        data : as in `fit`
        head : int
            Number of the head, 0 <= head < H.

        Returns
        -------
        int32 array or int64 Tensor [N]
            An array for arrays, a Tensor for a Tensor.
        """
        check_is_fitted(self, "encoder_")
        settings = SeLaSettings.of(self)
        inputs = self._inputs(settings, data)
        return inputs.give(self.heads_.assign(self._features(settings, inputs), head))

    def _inputs(self, settings: SeLaSettings, data: Any) -> Inputs:
        """New rows; images of a folder get the mode and size of the images of `fit`."""
        mode, size = self._images or (None, settings.image_size)
        return inputs_of(data, size, mode)

    def _features(self, settings: SeLaSettings, inputs: Inputs) -> Tensor:
        device, dtype = self.heads_.weight.device, dtype_of(self.encoder_)
        return encode_rows(self.encoder_, inputs, device, dtype, settings.batch_size)

    def export_labels(self, path: str | PathLike[str]) -> None:
        """Write the labels to a file; after an error there is no part of a file.

        Parameters
        ----------
        path : str or PathLike
            .npz (arrays labels [H, N], g [H, K] and, for a folder, files [N]), .npy (labels), or
            .csv, .tsv (also with .gz), .parquet (a row for each row of the data, a column head_h
            for each head, and before them, for a folder, the column file).

        Raises
        ------
        DataFileError
            Another suffix, or Parquet without pyarrow.
        """
        check_is_fitted(self, "heads_")
        path = Path(path)
        tables.check_output(path, also=(".npz",))
        labels = self.heads_.labels.cpu().numpy().astype(np.int32)
        if path.suffix == ".npz":
            out = io.BytesIO()
            arrays: dict[str, Any] = {"labels": labels, "g": self.heads_.g.cpu().numpy()}
            if hasattr(self, "files_"):
                arrays["files"] = np.array(self.files_)
            np.savez(out, **arrays)
            serialize.write_atomically(path, out.getvalue())
        elif path.suffix == ".npy":
            tables.write(path, labels, [])
        else:
            names = [f"head_{h}" for h in range(len(labels))]
            if not hasattr(self, "files_"):
                tables.write(path, labels.T, names)
                return
            columns = [np.array(self.files_, dtype=object)[:, None], labels.T.astype(object)]
            tables.write(path, np.concatenate(columns, 1), ["file", *names])
