# SPDX-License-Identifier: Apache-2.0
"""Installation of an op: an `OpSpec` declares it once, and this file registers it for every
dispatch key.

Each op gets a kernel for CPU and CUDA (checks, then the chosen backend), a fake, an Autograd
kernel, autocast and a vmap rule. An op with a `Gradient` also gets the ops `<name>_backward` and,
if the backward needs a saved tensor, `_<name>_forward`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backend
from .autograd import function, refuse_gradient, register_autograd
from .batching import register_vmap, register_vmap_backward
from .dispatch import LIBRARY, Implementation, check_key, define, register, store_key
from .spec import SPECS, Gradient, OpSpec, qualified, tensor_names

_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def _without_defaults(arguments: str) -> str:
    """An argument list without its default values."""
    return re.sub(r"=[^,]+", "", arguments)


def op(**fields: Any) -> OpSpec:
    """Declare an op and install it."""
    spec = OpSpec(**fields)
    SPECS[spec.name] = spec
    for overload, words in spec.overloads.items():
        Installation(spec, overload, spec.arguments.format(**words)).install()
    return spec


class Installation:
    """One overload of an op and of its gradient ops."""

    def __init__(self, spec: OpSpec, overload: str, arguments: str) -> None:
        self.spec, self.overload, self.arguments = spec, overload, arguments
        self.defaults: tuple[Any, ...] = ()
        self.names: list[str] = []
        self.tensors: list[int] = []

    def install(self) -> None:
        """Define the op and register all its kernels."""
        spec = self.spec
        self.op = define(spec.name, self.overload, f"({self.arguments}) -> {spec.returns}")
        schema = self.op._schema.arguments
        self.names = [a.name for a in schema]
        self.defaults = tuple(a.default_value for a in schema)
        self.tensors = [i for i, a in enumerate(schema) if "Tensor" in str(a.type)]
        # a gradient for every argument that is a tensor in some overload
        self.slots = tensor_names(spec)
        part = Implementation(spec.name, spec.reference, spec.kernels, spec.limits)
        kernel = self._kernels(self.op, part, spec.fake)
        differentiate = self._differentiable(kernel) if spec.gradient else None
        register_autograd(spec, self.op, self._fill_defaults, self.tensors, kernel, differentiate)
        self._autocast()
        dims = [spec.core.get(n, 0) for n in self.names] if spec.core else []
        register_vmap(self.op, qualified(spec.name, self.overload), spec.core, dims)

    # ---- kernels -------------------------------------------------------------------------------

    def _fill_defaults(self, a: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments with the trailing defaults that the dispatcher drops."""
        return a + self.defaults[len(a) :]

    def _check_first(self, fake: Callable[..., Any], count: int) -> Callable[..., Any]:
        """A fake that checks the arguments of the op, the first `count`, and then runs."""

        def checked_fake(*a: Any) -> Any:
            a = self._fill_defaults(a)
            self.spec.check(*a[:count])
            return fake(*a)

        return checked_fake

    def _kernels(
        self, op: Any, part: Implementation, fake: Callable[..., Any], with_needs: bool = False
    ) -> Callable[..., Any]:
        """Register the kernel of an op, which checks and runs the chosen backend; return it. With
        `with_needs` the op has one more argument behind those that are checked.
        """
        spec, count = self.spec, len(self.names)
        passed: set[tuple[Any, ...]] = set()

        def kernel(*a: Any) -> Any:
            a = self._fill_defaults(a)
            a, needs = (a[:count], a[count:]) if with_needs else (a, ())
            key = check_key(a)
            if key not in passed:
                spec.check(*a)
                store_key(passed, key)
            if spec.check_values is not None:
                spec.check_values(*a)
            device = a[self.tensors[0]].device.type
            if not spec.precise:
                return backend.run(part, device, "highest", (*a, *needs))
            precision = backend.resolve_precision(a[-1])
            return backend.run(part, device, precision, (*a[:-1], precision, *needs))

        register(op, kernel, self._check_first(fake, count))
        return kernel

    # ---- gradients -----------------------------------------------------------------------------

    def _differentiable(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        """Install the gradient ops; return the differentiable form of this overload, whose first
        argument is `is_direct`.
        """
        gradient = self.spec.gradient
        assert gradient is not None
        forward = self.op
        if gradient.saved is not None:
            reference, fake = gradient.saved
            name, arguments = f"_{self.spec.name}_forward", self.arguments
            if gradient.saved_for_needs:
                arguments = f"{_without_defaults(arguments)}, bool[] needs"
            returns = ", ".join(["Tensor"] * (1 + len(gradient.saved_tensors)))
            forward = define(name, self.overload, f"({arguments}) -> ({returns})")
            part = Implementation(name, reference, gradient.saved_kernels, self.spec.limits)
            kernel = self._kernels(forward, part, fake, gradient.saved_for_needs)
            refuse_gradient(forward, kernel, f"{name} is internal; call {self.spec.name}")
        return function(
            self.spec, gradient, self.names, (forward, kernel), self._backward_op(gradient)
        )

    def _backward_op(self, gradient: Gradient) -> Any:
        """Define and register `<name>_backward`; return it."""
        name = f"{self.spec.name}_backward"
        arguments = _without_defaults(self.arguments.rpartition(", str? precision")[0])
        saved = "".join(f"Tensor saved_{i}, " for i in range(len(gradient.saved_tensors)))
        returns = ", ".join(["Tensor"] * len(self.slots))
        count = len(gradient.outputs)
        grads = ["Tensor grad"] if count == 1 else [f"Tensor grad_{i}" for i in range(count)]
        schema = (
            f"({', '.join(grads)}, {arguments}, {saved}bool[] needs, str precision, str backend)"
            f" -> ({returns})"
        )
        op = define(name, self.overload, schema)
        part = Implementation(name, gradient.reference, gradient.kernels)

        def kernel(*a: Any) -> Any:
            *inputs, precision, chosen = a
            # autocast applies to the forward: a backward inside an autocast block ignores it
            with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
                device = a[0].device.type
                return backend.run(part, device, precision, (*inputs, precision), chosen)

        def fake(*a: Any) -> tuple[Tensor, ...]:
            needs = a[-3]
            operands = dict(zip(self.names, a[count:], strict=False))
            return tuple(
                torch.empty_like(operands[slot], memory_format=torch.contiguous_format)
                if need
                else a[count].new_empty(0)
                for slot, need in zip(self.slots, needs, strict=True)
            )

        register(op, kernel, fake)
        truth = f"python_fallback.{self.spec.family}.{self.spec.name}"
        refuse_gradient(
            op,
            kernel,
            f"double backward is not implemented; call {truth}, which is twice differentiable",
        )
        if self.spec.core is not None:
            core = [self.spec.core.get(n, 0) for n in self.names[:-1]]
            dims = [*gradient.outputs, *core, *gradient.saved_tensors, 0, 0, 0]
            register_vmap_backward(
                op, qualified(name, self.overload), dims, count, self.names, self.slots
            )
        return op

    # ---- autocast ------------------------------------------------------------------------------

    def _autocast(self) -> None:
        """Register autocast: promote arguments of `same_dtype` to the widest; a half precision
        autocast dtype means precision "medium".
        """
        promoted = [self.names.index(n) for n in self.spec.same_dtype]
        for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

            def autocast_kernel(
                *a: Any, device: str = device, excluded: torch._C.DispatchKeySet = excluded
            ) -> Any:
                values = list(self._fill_defaults(a))
                dtypes = [values[i].dtype for i in promoted]
                for i in promoted if dtypes and all(d.is_floating_point for d in dtypes) else ():
                    values[i] = values[i].to(functools.reduce(torch.promote_types, dtypes))
                lower = self.spec.precise and values[-1] is None
                if lower and torch.get_autocast_dtype(device) != torch.float32:
                    values[-1] = "medium"
                with torch._C._ExcludeDispatchKeyGuard(excluded):
                    return self.op(*values)

            LIBRARY.impl(qualified(self.spec.name, self.overload), autocast_kernel, key)
