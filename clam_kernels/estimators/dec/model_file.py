# SPDX-License-Identifier: Apache-2.0
"""The content of a model file of `DEC`: its network, the scale of its inputs, its results."""

from __future__ import annotations

import itertools
import math
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ... import serialize
from ..common.files import ModelFile
from ..training.checkpoint import of_module, restore_module, under
from .clustering import COLUMNS
from .inputs import InputScale
from .networks import DecNetwork, EncoderDecoder, default_pair, pair_of

REASONS = ("tol", "max_iter", "callback")
FUNCTIONS = ("augment", "optimizer", "writer", "callbacks")
MODULES = ("encoder", "decoder")


class DecFile(ModelFile):
    """Mixin of `DEC`. Functions and modules are no data: of an own encoder a file has the weights
    alone.
    """

    _unsaved = (*FUNCTIONS, *MODULES)
    _arrays = ("cluster_centers_", "labels_", "init_labels_", "soft_counts_", "_table")
    _learned = (
        "n_features_in_", "inertia_", "n_iter_", "n_steps_", "n_rounds_", "converged_",
        "stop_reason_", "device_", "_pretraining", "_layers", "_images",
    )  # fmt: skip
    encoder: Any
    decoder: Any
    _network: DecNetwork
    _scale: InputScale
    # whether the encoder is the user's, shape of a row, sizes of hidden layers, size of a code
    _layers: list[Any]
    _images: Any
    _table: np.ndarray  # columns of the history, and the size of each cluster
    _pretraining: list[Any]  # (name, losses) of each phase of pretraining
    soft_counts_: Any
    init_labels_: Any
    stop_reason_: str

    def _modules(self) -> dict[str, Tensor]:
        tensors = of_module("network", self._network)
        tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        scale = self._scale.on(torch.device("cpu"))
        return {**tensors, "scale.shift": scale.shift, "scale.divisor": scale.divisor}

    def _restore(self, learned: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        parts = {word: under(word, tensors) for word in ("network", "scale")}
        super()._restore(
            learned,
            {
                name: tensor
                for name, tensor in tensors.items()
                if name.partition(".")[0] not in parts
            },
        )
        shape, scale = tuple(int(x) for x in self._layers[1]), parts["scale"]
        serialize.expect(
            all(len(x) == math.prod(shape) == self.n_features_in_ for x in scale.values()),
            "the scale of its inputs does not fit the header",
        )
        self._scale = InputScale(scale["shift"], scale["divisor"], shape)
        self._network = self._restored_network(parts["network"])
        table = self._table
        fits = table.dtype == np.float64 and table.ndim == 2
        fits = fits and table.shape[1] == len(COLUMNS) + self.n_clusters
        serialize.expect(fits, "its history is no table")
        self._set_modules()

    def _restored_network(self, tensors: dict[str, Tensor]) -> DecNetwork:
        device = torch.device("cpu")
        is_own, _, hidden, components = self._layers
        # sizes are checked before layers of these sizes get memory
        fits = tensors["centroids"].shape == (self.n_clusters, components)
        if is_own:
            pair = pair_of(self.encoder, self.decoder).to(device)
        else:
            sizes = [self.n_features_in_, *(int(x) for x in hidden), int(components)]
            for i, (before, after) in enumerate(itertools.pairwise(sizes)):
                fits = fits and tensors[f"encoder.{2 * i + 1}.weight"].shape == (after, before)
            serialize.expect(fits, "sizes of layers do not fit the header")
            generator = torch.Generator().manual_seed(0)
            pair = default_pair(sizes[0], sizes[1:-1], sizes[-1], device, generator)
        serialize.expect(fits, "centroids do not fit the header")
        network = DecNetwork(pair, self.n_clusters, tensors["centroids"][:1])
        try:
            restore_module(network, tensors, device)
        except RuntimeError as error:
            raise ValueError(str(error)) from None
        finite = all(bool(x.isfinite().all()) for x in tensors.values())
        serialize.expect(finite, "values are not finite")
        return network.eval()

    def _set_modules(self) -> None:
        """Set the public attributes of the network and of the history."""
        self.encoder_, self.decoder_ = self._network.encoder, self._network.decoder
        self.code_scale_ = float(self._network.code_scale)
        self.history_ = dict(zip(COLUMNS, self._table.T, strict=False))
        self.history_["sizes"] = self._table[:, len(COLUMNS) :].astype(np.int64)
        self.history_["step"] = self.history_["step"].astype(np.int64)
        self.history_["pretraining"] = {name: list(losses) for name, losses in self._pretraining}

    def _center_features(self) -> int:
        return int(self._layers[3])

    def _check_restored(self) -> None:
        k = self.n_clusters
        super()._check_restored()
        self._n_features_out = self._center_features()
        self.init_embedding_ = None  # a file does not have it
        centers = self.cluster_centers_
        serialize.expect(self.stop_reason_ in REASONS, "no such stop reason")
        counts = self.soft_counts_
        fits = counts.dtype == np.float64 and counts.shape == (k,) and bool((counts >= 0).all())
        serialize.expect(fits, "soft counts are not those of its clusters")
        fits = self.init_labels_.shape == self.labels_.shape
        serialize.expect(fits, "start labels are not those of its rows")
        same = np.array_equal(self._network.centroids.detach().numpy(), centers)
        serialize.expect(same, "centroids are not those of its network")

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        *,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
    ) -> Any:
        """Read a model that `save` wrote; arrays are numpy arrays, the network is on the CPU.

        Parameters
        ----------
        path : str or PathLike
            The file.
        encoder, decoder : torch.nn.Module, optional
            The modules of a fit with an own encoder: a file has their weights, no code. Modules of
            the same layers get the weights of the file; the arguments stay as they are.

        Returns
        -------
        DEC
            Fitted, with the parameters it was fitted with. Functions (augment, optimizer, writer,
            callbacks) are None.

        Raises
        ------
        ModelFileError
            The file is truncated, damaged, of another class or of other layers, or of a newer
            version.
        ValueError
            The fit had an encoder of its own, and none came.
        FileNotFoundError
            There is no such file.
        """
        parameters, learned, tensors = serialize.load(path, cls.__name__)
        with serialize.reading(path):
            is_own = bool(learned["_layers"][0])
        if is_own != (encoder is not None):
            words = "the modules of the fit" if is_own else "None, as the fit had no own encoder"
            got = "None" if encoder is None else type(encoder).__name__
            raise ValueError(f"encoder: expected {words}, got {got}; {path} has weights alone")
        if encoder is not None:
            _check_modules(path, under("network", tensors), pair_of(encoder, decoder))
        with serialize.reading(path):
            model = cls(**{**parameters, "encoder": encoder, "decoder": decoder})
            model._validate_params()  # type: ignore[attr-defined]
            model._restore(learned, tensors)
            model._check_restored()
        return model


def _check_modules(
    path: str | PathLike[str], saved: dict[str, Tensor], pair: EncoderDecoder
) -> None:
    """ValueError unless the user's modules have the layers of the file."""
    own = under("pair", of_module("pair", pair))
    for name, tensor in saved.items():
        part = name.partition(".")[0]
        if part not in MODULES:
            continue
        if part == "decoder" and pair.decoder is None:
            raise ValueError(
                f"decoder: expected the module of the fit, got None; {path} has its weights"
            )
        if name not in own or own[name].shape != tensor.shape:
            got = list(own[name].shape) if name in own else "none"
            leaf = name.partition(".")[2]
            raise ValueError(
                f"{part}: expected the layers of the fit, {leaf} of shape {list(tensor.shape)},"
                f" got {got}"
            )
