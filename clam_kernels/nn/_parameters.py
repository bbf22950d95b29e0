# SPDX-License-Identifier: Apache-2.0
"""Access to the parameters of a layer: plain parameters, those that torch.nn.utils.parametrize
computes, and those that fully_shard splits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._core import checks


def as_vector(x: Tensor) -> Tensor:
    """A tensor with at least one dim, because fully_shard splits a parameter along its first."""
    return x if x.ndim else x.reshape(1)


def write(module: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter to a value that broadcasts to its shape; call this inside torch.no_grad().

    A parametrized parameter then computes this value.
    """
    parameter: Tensor = getattr(module, name)
    if name in module._parameters:
        parameter.copy_(_shard(value, parameter))
        return
    parametrizations: list[Any] = []
    if parametrize.is_parametrized(module, name):
        parametrizations = list(module.get_submodule(_source(name)).children())
    if not parametrizations or not all(hasattr(part, "right_inverse") for part in parametrizations):
        expected = "a parameter, or a parametrization with right_inverse"
        got = ", ".join(type(part).__name__ for part in parametrizations) or "a computed tensor"
        raise RuntimeError(checks.wording(name, expected, got))
    # a new tensor, because the module may store it
    setattr(module, name, torch.empty_like(parameter).copy_(value))


def source_tensors(module: nn.Module, name: str) -> list[Tensor]:
    """A parameter, or the tensors from which a parametrized one is computed; and their
    gradients.
    """
    parameter = module._parameters.get(name)
    tensors: list[Tensor] = [] if parameter is None else [parameter]
    if parametrize.is_parametrized(module, name):
        source = module.get_submodule(_source(name))
        tensors = [*source.parameters(), *source.buffers()]
    return [*tensors, *(x.grad for x in tensors if x.is_leaf and x.grad is not None)]


def source_names(state_dict: Any, prefix: str, name: str) -> list[str]:
    """The keys in a state dict of a parameter, or of the tensors from which it is computed."""
    source = f"{prefix}{_source(name)}."
    return [key for key in state_dict if key == prefix + name or key.startswith(source)]


def _source(name: str) -> str:
    """The name of the submodule that computes a parametrized parameter."""
    return f"parametrizations.{name}"


def _shard(value: Tensor, parameter: Any) -> Tensor:
    """The value, split in the way that fully_shard split the parameter."""
    if not hasattr(parameter, "device_mesh") or hasattr(value, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    full = value.to(parameter.device).expand(parameter.shape).contiguous()
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(full, mesh, placements, src_data_rank=None)
