# SPDX-License-Identifier: Apache-2.0
"""Adam and SGD, with the arithmetic and the state of torch.optim's.

torch.optim imports torch._dynamo, and with it sympy, at its first use: that takes seconds, and
after Ctrl-C during the import every later use fails.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..._core import checks


class Optimiser(Protocol):
    """The methods of an optimiser that a training loop uses: of one here or of torch.optim."""

    param_groups: list[dict[str, Any]]

    def zero_grad(self) -> None: ...

    def step(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class _ParameterGroups:
    """Parameters in groups with a learning rate each, and a state for each parameter."""

    def __init__(self, groups: Sequence[Sequence[Tensor]], **settings: Any) -> None:
        self.param_groups: list[dict[str, Any]] = [
            {"params": list(group), **settings} for group in groups
        ]
        self.state: dict[int, dict[str, Any]] = {}

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def zero_grad(self) -> None:
        """Set every gradient to None."""
        for parameter in self._parameters():
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """State and settings; a parameter is its number."""
        number = {id(p): i for i, p in enumerate(self._parameters())}
        groups = [
            {**group, "params": [number[id(p)] for p in group["params"]]}
            for group in self.param_groups
        ]
        state = {i: dict(entry) for i, entry in self.state.items()}
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace state and settings by a `state_dict`, on the devices of the parameters."""
        groups, parameters = state["param_groups"], self._parameters()
        sizes = [len(group["params"]) for group in groups]
        if sizes != [len(group["params"]) for group in self.param_groups]:
            raise ValueError("state: expected the state of an optimiser of these parameters")
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
        self.state = {
            int(i): {
                name: value.to(parameters[int(i)].device) if isinstance(value, Tensor) else value
                for name, value in entry.items()
            }
            for i, entry in state["state"].items()
        }


class Adam(_ParameterGroups):
    """Adam; every parameter is a group of its own.

    m <- m + (1 - b1) (g - m), v <- b2 v + (1 - b2) g^2,
    p <- p - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps).
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        lr: float,
        eps: float = 1e-8,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        super().__init__([[p] for p in parameters], lr=lr, betas=betas, eps=eps)

    @torch.no_grad()
    def step(self) -> None:
        """One step with the gradients."""
        for i, group in enumerate(self.param_groups):
            (parameter,) = group["params"]
            slope = parameter.grad
            if slope is None:
                continue
            if i not in self.state:
                zeros = torch.zeros_like(parameter)
                self.state[i] = {"step": 0, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
            state, (first, second) = self.state[i], group["betas"]
            steps = state["step"] = int(state["step"]) + 1
            state["exp_avg"].lerp_(slope, 1 - first)
            state["exp_avg_sq"].mul_(second).addcmul_(slope, slope, value=1 - second)
            size = group["lr"] / (1 - first**steps)
            root = state["exp_avg_sq"].sqrt().div_(math.sqrt(1 - second**steps))
            parameter.addcdiv_(state["exp_avg"], root.add_(group["eps"]), value=-size)


class SGD(_ParameterGroups):
    """Gradient descent with momentum and weight decay.

    g <- g + decay p, m <- momentum m + g (g at the first step), p <- p - lr m.
    """

    def __init__(
        self, parameters: Sequence[Tensor], lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__([parameters], lr=lr, momentum=momentum, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self) -> None:
        """One step with the gradients."""
        (group,) = self.param_groups
        index = [i for i, p in enumerate(group["params"]) if p.grad is not None]
        if any(group["params"][i].grad.is_sparse for i in index):
            for i in index:
                self._step_of_one(group, i)
        elif index:
            self._step_of_all(group, index)

    def _step_of_all(self, group: dict[str, Any], index: list[int]) -> None:
        """The step of several parameters, in few launches."""
        parameters = [group["params"][i] for i in index]
        slopes = [p.grad for p in parameters]
        if group["weight_decay"]:
            slopes = list(torch._foreach_add(slopes, parameters, alpha=group["weight_decay"]))
        if group["momentum"]:
            later = [i for i in index if self._momentum_of(i) is not None]
            if later:
                buffers = [self._momentum_of(i) for i in later]
                torch._foreach_mul_(buffers, group["momentum"])
                slope_of = dict(zip(index, slopes, strict=True))
                torch._foreach_add_(buffers, [slope_of[i] for i in later])
            for i, slope in zip(index, slopes, strict=True):
                if self._momentum_of(i) is None:
                    self.state[i] = {"momentum_buffer": slope.detach().clone()}
            slopes = [self._momentum_of(i) for i in index]
        torch._foreach_add_(parameters, slopes, alpha=-group["lr"])

    def _step_of_one(self, group: dict[str, Any], i: int) -> None:
        """The step of one parameter, whose gradient may be sparse."""
        parameter = group["params"][i]
        slope = parameter.grad
        if group["weight_decay"]:
            slope = slope.add(parameter, alpha=group["weight_decay"])
        if group["momentum"]:
            running = self._momentum_of(i)
            if running is None:
                self.state[i] = {"momentum_buffer": slope.detach().clone()}
            else:
                running.mul_(group["momentum"]).add_(slope)
            slope = self._momentum_of(i)
        parameter.add_(slope, alpha=-group["lr"])

    def _momentum_of(self, i: int) -> Any:
        return self.state.get(i, {}).get("momentum_buffer")


def checked_optimiser(optimiser: Any) -> torch.optim.Optimizer:
    """The result of the parameter `optimizer`; TypeError unless it steps without a closure."""
    kind = type(optimiser).__name__
    if not isinstance(optimiser, torch.optim.Optimizer):
        raise TypeError(f"optimizer: expected it to return a torch Optimizer, got {kind}")
    try:
        inspect.signature(optimiser.step).bind()
    except TypeError:
        words = "it to return an Optimizer whose step needs no closure"
        raise TypeError(checks.wording("optimizer", words, kind)) from None
    return optimiser
