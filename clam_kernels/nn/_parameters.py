# SPDX-License-Identifier: Apache-2.0
"""How a layer writes its parameters: plain ones, those that torch.nn.utils.parametrize computes,
and those that fully_shard has split.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._core import checks


def as_vector(x: Tensor) -> Tensor:
    """A tensor with one dim at least: fully_shard splits a parameter along its first."""
    return x if x.ndim else x.reshape(1)


def write(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter a value that broadcasts to its shape; call it inside torch.no_grad().

    Of a parametrized one this is the value that the module then computes.
    """
    parameter: Tensor = getattr(module, name)
    if name in module._parameters:
        parameter.copy_(_shards(value, parameter))
        return
    chain: list[Any] = []
    if parametrize.is_parametrized(module, name):
        chain = list(module.get_submodule(_source(name)).children())
    if not chain or not all(hasattr(one, "right_inverse") for one in chain):
        expected = "a parameter, or a parametrization with right_inverse"
        got = ", ".join(type(one).__name__ for one in chain) or "a computed tensor"
        raise RuntimeError(checks.wording(name, expected, got))
    # the module may keep the tensor that it is given
    setattr(module, name, torch.empty_like(parameter).copy_(value))


def tensors_behind(module: nn.Module, name: str) -> list[Tensor]:
    """A parameter and its gradient, or those that a parametrized one is computed of."""
    own = module._parameters.get(name)
    found: list[Tensor] = [] if own is None else [own]
    if parametrize.is_parametrized(module, name):
        source = module.get_submodule(_source(name))
        found = [*source.parameters(), *source.buffers()]
    return [*found, *(x.grad for x in found if x.is_leaf and x.grad is not None)]


def names_behind(state_dict: Any, prefix: str, name: str) -> list[str]:
    """What a state dict calls a parameter, or those that a parametrized one is computed of."""
    source = f"{prefix}{_source(name)}."
    return [key for key in state_dict if key == prefix + name or key.startswith(source)]


def _source(name: str) -> str:
    return f"parametrizations.{name}"


def _shards(value: Tensor, parameter: Any) -> Tensor:
    """The value, split as fully_shard has split the parameter."""
    if not hasattr(parameter, "device_mesh") or hasattr(value, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    whole = value.to(parameter.device).expand(parameter.shape).contiguous()
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)
