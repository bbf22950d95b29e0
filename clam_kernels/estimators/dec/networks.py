# SPDX-License-Identifier: Apache-2.0
"""The modules of a DEC: the default layers, pairs of encoder and decoder, and the network of a fit
with its centroids.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..._core import checks
from ..common.threads import SMALL_PRODUCT
from ..training.trainer import RunGenerators, dtype_of, encode_batch

# Standard deviation of the weights at the start of the paper's layers.
PAPER_DEVIATION = 0.01


class EncoderDecoder(nn.Module):
    """An encoder to codes [B, D] and a decoder from codes to rows.

    A `DEC` takes it as its encoder: its methods `encode` and `decode` are all that it needs.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module | None) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def encode(self, x: Tensor) -> Tensor:
        """Codes of rows."""
        return encode_batch(self.encoder, x)

    def decode(self, codes: Tensor) -> Tensor:
        """Rows [B, features] from codes; TypeError or ValueError for another result."""
        assert self.decoder is not None
        rows = self.decoder(codes)
        kind = type(rows).__name__
        checks.type_error(
            isinstance(rows, Tensor),
            lambda: checks.wording("decoder", "it to return a Tensor", kind),
        )
        fits = rows.ndim >= 2 and len(rows) == len(codes)
        checks.expect(fits, "decoder", f"rows [{len(codes)}, ...] from it", list(rows.shape))
        return rows.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstructions [B, features] of rows."""
        return self.decode(self.encode(x))


class MethodCall(nn.Module):
    """A method of a module as a module."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, x: Tensor) -> Any:
        """The result of the method."""
        return getattr(self.module, self.method)(x)


class DecNetwork(EncoderDecoder):
    """Encoder, decoder, and centroids [K, D] of codes times a scale.

    `forward` gives scaled codes z = scale * encoder(x); the decoder gets codes that are not scaled.
    """

    def __init__(self, pair: EncoderDecoder, n_clusters: int, like: Tensor) -> None:
        """`like` are some codes of the encoder."""
        super().__init__(pair.encoder, pair.decoder)
        self.dtype = torch.promote_types(like.dtype, torch.float32)
        options: dict[str, Any] = {"device": like.device, "dtype": self.dtype}
        self.centroids = nn.Parameter(torch.zeros(n_clusters, like.shape[1], **options))
        self.code_scale: Tensor
        self.register_buffer("code_scale", torch.ones((), **options))

    def forward(self, x: Tensor) -> Tensor:
        """Scaled codes of rows."""
        codes: Tensor = self.encode(x).to(self.dtype) * self.code_scale
        return codes

    def reconstruct(self, z: Tensor) -> Tensor:
        """Rows [B, features] from scaled codes."""
        return self.decode(z / self.code_scale)

    def pair(self) -> EncoderDecoder:
        """A copy of encoder and decoder."""
        return copy.deepcopy(EncoderDecoder(self.encoder, self.decoder))


def pair_of(encoder: nn.Module, decoder: nn.Module | None) -> EncoderDecoder:
    """A copy of the user's modules. An encoder with methods `encode` and `decode` is both."""
    if isinstance(encoder, EncoderDecoder) and decoder is None:
        return copy.deepcopy(EncoderDecoder(encoder.encoder, encoder.decoder))
    is_whole = all(callable(getattr(encoder, name, None)) for name in ("encode", "decode"))
    if is_whole and decoder is None:
        both = MethodCall(encoder, "encode"), MethodCall(encoder, "decode")
        return copy.deepcopy(EncoderDecoder(*both))
    return copy.deepcopy(EncoderDecoder(encoder, decoder))


def default_pair(
    features: int,
    hidden: Sequence[int],
    components: int,
    device: torch.device,
    generator: torch.Generator,
    is_paper: bool = False,
) -> EncoderDecoder:
    """Layers features-hidden-components and their mirror image, with ReLU between them.

    Weights are uniform in +-sqrt(6 / (inputs + outputs)) (Glorot), those of the paper normal with
    the deviation 0.01; biases are 0. The generator is on the CPU.
    """
    sizes = [features, *hidden, components]
    with RunGenerators(0, torch.device("cpu")).turn():  # torch draws weights of its own
        encoder = nn.Sequential(nn.Flatten(), *_layers(sizes))
        decoder = nn.Sequential(*_layers(sizes[::-1]))
    with torch.no_grad():
        for layer in (*encoder, *decoder):
            if isinstance(layer, nn.Linear):
                weight = torch.empty(layer.weight.shape, dtype=torch.float32, device="cpu")
                if is_paper:
                    weight.normal_(0.0, PAPER_DEVIATION, generator=generator)
                else:
                    bound = math.sqrt(6.0 / sum(weight.shape))
                    weight.uniform_(-bound, bound, generator=generator)
                layer.weight.copy_(weight)
                layer.bias.zero_()
    return EncoderDecoder(encoder, decoder).to(device)


def _layers(sizes: Sequence[int]) -> list[nn.Module]:
    """Linear layers with ReLU between them, on the CPU."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after, device="cpu", dtype=torch.float32), nn.ReLU()]
    return layers[:-1]


def probe(pair: EncoderDecoder, batch: Tensor) -> Tensor:
    """Codes of a few rows in eval mode: they show the number of features of a code."""
    pair.eval()
    with torch.no_grad():
        return pair.encode(batch)


def batch_dtype(pair: EncoderDecoder) -> torch.dtype:
    """The dtype of the rows that an encoder gets."""
    return dtype_of(pair.encoder)


def product_of(network: nn.Module, batch_size: int) -> int:
    """Multiply-adds of the largest product of linear layers; those of large work where other
    layers have parameters.
    """
    sizes = [0]
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            sizes.append(layer.weight.numel())
        elif not isinstance(layer, DecNetwork) and any(True for _ in layer.parameters(False)):
            return SMALL_PRODUCT
    return batch_size * max(sizes)


def blocks_of(module: nn.Module, name: str) -> list[nn.Sequential]:
    """The layers of a Sequential: a Linear each, with the modules around it.

    ValueError for another module: layers train alone only if each of them is one Linear.
    """
    words = "a Sequential of Linear layers and activations, where pretrain='sdae'"
    children = list(module) if isinstance(module, nn.Sequential) else []
    starts = [i for i, child in enumerate(children) if isinstance(child, nn.Linear)]
    has_other = any(
        next(child.parameters(), None) is not None and not isinstance(child, nn.Linear)
        for child in children
    )
    checks.expect(bool(starts) and not has_other, name, words, type(module).__name__)
    starts[0] = 0  # what stands before the first Linear, such as Flatten, belongs to it
    ends = [*starts[1:], len(children)]
    return [nn.Sequential(*children[i:j]) for i, j in zip(starts, ends, strict=True)]
