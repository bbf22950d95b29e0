# SPDX-License-Identifier: Apache-2.0
"""Adam and SGD, with the arithmetic and the state of torch's.

Those of torch.optim import torch._dynamo, and with it sympy, at their first use: it takes seconds,
and after Ctrl-C in the middle of it every later use fails.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Optimiser(Protocol):
    """What a training loop asks of an optimiser, of those here or of torch.optim."""

    param_groups: list[dict[str, Any]]

    def zero_grad(self) -> None: ...

    def step(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class _Own:
    """Parameters in groups, each with a learning rate, and a state for each parameter."""

    def __init__(self, groups: Sequence[Sequence[Tensor]], **settings: Any) -> None:
        self.param_groups: list[dict[str, Any]] = [
            {"params": list(group), **settings} for group in groups
        ]
        self.state: dict[int, dict[str, Any]] = {}

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self._parameters():
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """State and settings; parameters are their numbers."""
        number = {id(p): i for i, p in enumerate(self._parameters())}
        groups = [
            {**group, "params": [number[id(p)] for p in group["params"]]}
            for group in self.param_groups
        ]
        state = {i: dict(entry) for i, entry in self.state.items()}
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, on the devices of the parameters."""
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


class Adam(_Own):
    """Adam with the usual running means; every parameter is a group of its own."""

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
        """One step by the gradients."""
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
            wide = state["exp_avg_sq"].sqrt().div_(math.sqrt(1 - second**steps))
            parameter.addcdiv_(state["exp_avg"], wide.add_(group["eps"]), value=-size)


class SGD(_Own):
    """Gradient descent with momentum and weight decay."""

    def __init__(
        self, parameters: Sequence[Tensor], lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__([parameters], lr=lr, momentum=momentum, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self) -> None:
        """One step by the gradients."""
        (group,) = self.param_groups
        at = [i for i, p in enumerate(group["params"]) if p.grad is not None]
        if any(group["params"][i].grad.is_sparse for i in at):
            for i in at:
                self._move_one(group, i)
        elif at:
            self._move(group, at)

    def _move(self, group: dict[str, Any], at: list[int]) -> None:
        """All parameters in few launches."""
        parameters = [group["params"][i] for i in at]
        slopes = [p.grad for p in parameters]
        if group["weight_decay"]:
            slopes = list(torch._foreach_add(slopes, parameters, alpha=group["weight_decay"]))
        if group["momentum"]:
            known = [i for i in at if self._momentum_of(i) is not None]
            if known:
                torch._foreach_mul_([self._momentum_of(i) for i in known], group["momentum"])
                new = dict(zip(at, slopes, strict=True))
                torch._foreach_add_([self._momentum_of(i) for i in known], [new[i] for i in known])
            for i, slope in zip(at, slopes, strict=True):
                if self._momentum_of(i) is None:
                    self.state[i] = {"momentum_buffer": slope.detach().clone()}
            slopes = [self._momentum_of(i) for i in at]
        torch._foreach_add_(parameters, slopes, alpha=-group["lr"])

    def _move_one(self, group: dict[str, Any], i: int) -> None:
        """One parameter, whose gradient may be sparse."""
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
