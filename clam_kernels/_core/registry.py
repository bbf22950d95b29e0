# SPDX-License-Identifier: Apache-2.0
"""The registry: an op is declared once, as an `OpSpec`, and installed here under every dispatch
key.

For each op: a kernel for CPU and CUDA (checks, then the chosen backend), a fake, an Autograd
kernel, autocast, a vmap rule; and, where it has a `Gradient`, the ops `_<name>_forward` (if
something beside inputs and output is saved) and `<name>_backward`. This is the only file that uses
torch's private dispatch functions.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backend

NAMESPACE = "clam"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_below_autograd = torch._C._AutoDispatchBelowAutograd
_SPECS: dict[str, OpSpec] = {}
# Dispatch keys of plain eager tensors, of a CPU and of a GPU.
_DIRECT = frozenset(
    (
        torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autograd{key}"))
    ).raw_repr()
    for key in ("CPU", "CUDA")
)
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)
# What a call that passed its check is remembered by: tensors by their metadata, these by value.
_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_VALUES = frozenset({bool, int, float, str, type(None)})
_MOST_REMEMBERED = 1024


@dataclass(frozen=True)
class Gradient:
    """How an op is differentiated.

    `reference(*grads, *arguments without precision, [saved], needs, precision)` returns one
    gradient for each tensor argument, empty where `needs` says no. `saved` is None where the
    arguments suffice, else the `(reference, fake)` of `_<name>_forward`, which returns `(output,
    saved)`. `output_dims` and `saved_dims` count the dims of the two below their batch dims; of
    several outputs the first have a gradient, as many as there are `output_dims`.
    """

    reference: Callable[..., tuple[Tensor, ...]]
    kernels: Mapping[str, str] = field(default_factory=dict)
    saved: tuple[Callable[..., Any], Callable[..., Any]] | None = None
    output_dims: int | tuple[int, ...] = 2
    saved_dims: int = 1
    saved_kernels: Mapping[str, str] = field(default_factory=dict)

    @property
    def outputs(self) -> tuple[int, ...]:
        """Dims below the batch dims of each output that has a gradient."""
        return self.output_dims if isinstance(self.output_dims, tuple) else (self.output_dims,)


@dataclass(frozen=True)
class OpSpec:
    """One op. `arguments` is the schema's list, ending in `str? precision=None` if the op has
    matrix products, where `{name}` is spelled by each entry of `overloads` in turn: those with
    Tensors first, or the dispatcher turns a tensor into a number and drops its gradient. `limits`
    name, by backend, a function that says why these arguments do not fit its kernels (None if they
    do), and by "auto-<backend>" one that says why the automatic choice takes another.
    """

    name: str
    arguments: str
    returns: str
    check: Callable[..., None]
    fake: Callable[..., Any]
    truth: Callable[..., Any]
    reference: Callable[..., Any]
    function: Callable[..., Any]
    overloads: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: {"": {}})
    check_values: Callable[..., None] | None = None
    kernels: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, str] = field(default_factory=dict)
    gradient: Gradient | None = None
    same_dtype: tuple[str, ...] = ()
    core: Mapping[str, int] | None = None  # dims of each tensor argument below its batch dims

    @property
    def family(self) -> str:
        """The word that names this op's file in every room."""
        return self.function.__module__.rpartition(".")[2]

    @property
    def precise(self) -> bool:
        """Whether the op has matrix products, and with them a precision."""
        return self.arguments.endswith("str? precision=None")

    @property
    def packet(self) -> Any:
        """`torch.ops.clam.<name>`."""
        return getattr(torch.ops.clam, self.name)

    @property
    def schemas(self) -> dict[str, str]:
        """Overload name -> schema."""
        return {
            overload: f"{_qualified(self.name, overload)}({self.arguments.format(**words)})"
            f" -> {self.returns}"
            for overload, words in self.overloads.items()
        }


@dataclass(frozen=True)
class _Part:
    """What `backend.run` needs: the op itself, its saving forward, or its backward."""

    name: str
    reference: Callable[..., Any]
    kernels: Mapping[str, str]
    limits: Mapping[str, str] = field(default_factory=dict)


def all_ops() -> tuple[OpSpec, ...]:
    """Every public op, in the order of registration."""
    return tuple(_SPECS.values())


def explain(op: object, *arguments: object) -> str:
    """Which backend would run an op on these arguments, at which precision, and why.

    Parameters
    ----------
    op : str, `torch.ops.clam.<name>` or the public function
        The op.
    arguments
        Its arguments; the first tensor decides the device. Without any, a CPU tensor is assumed.

    Returns
    -------
    str
        One line: op, backend, precision, reason.

    Raises
    ------
    ValueError
        There is no such op.
    RuntimeError
        A forced backend cannot run it.

    Examples
    --------
    >>> import clam_kernels
    >>> clam_kernels.explain("am_step")
    'clam::am_step: reference at highest precision (the tensors are on cpu)'
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", str(op))
    spec = _SPECS.get(name.removeprefix(f"{NAMESPACE}::").partition(".")[0])
    if spec is None:
        raise ValueError(f"op: expected one of {', '.join(_SPECS)}, got {name}")
    device = next((a.device.type for a in arguments if isinstance(a, Tensor)), "cpu")
    named = arguments[-1] if arguments and isinstance(arguments[-1], str) else None
    precision = backend.resolve_precision(named)
    given = arguments
    if arguments and spec.precise:
        given = (*arguments[: -1 if named else None], precision)
    chosen, reason = backend.choose(spec, device, given)
    if chosen == "reference" and device == "cpu":
        precision = "highest" if precision == "highest" else f"{precision} (float32 on a CPU)"
    return f"{NAMESPACE}::{spec.name}: {chosen} at {precision} precision ({reason})"


def op(**fields: Any) -> OpSpec:
    """Declare an op and install it."""
    spec = OpSpec(**fields)
    _SPECS[spec.name] = spec
    for overload, words in spec.overloads.items():
        _Installation(spec, overload, spec.arguments.format(**words)).install()
    return spec


def _qualified(name: str, overload: str) -> str:
    return f"{name}.{overload}" if overload else name


def _define(name: str, overload: str, schema: str) -> Any:
    """Define one overload and return it."""
    LIBRARY.define(f"{_qualified(name, overload)}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    return getattr(getattr(torch.ops.clam, name), overload or "default")


def _refuse_device(*_: Any, name: str, **__: Any) -> NoReturn:
    raise RuntimeError(f"{NAMESPACE}::{name}: expected tensors on cpu or cuda")


class _Installation:
    """One overload of one op, and of what its gradient needs, put under the dispatch keys."""

    def __init__(self, spec: OpSpec, overload: str, arguments: str) -> None:
        self.spec, self.overload, self.arguments = spec, overload, arguments
        self.defaults: tuple[Any, ...] = ()
        self.names: list[str] = []
        self.tensors: list[int] = []

    def install(self) -> None:
        spec = self.spec
        self.op = _define(spec.name, self.overload, f"({self.arguments}) -> {spec.returns}")
        schema = self.op._schema.arguments
        self.names = [a.name for a in schema]
        self.defaults = tuple(a.default_value for a in schema)
        self.tensors = [i for i, a in enumerate(schema) if "Tensor" in str(a.type)]
        # a gradient for every argument that is a tensor in some overload
        self.slots = _tensor_names(spec)
        part = _Part(spec.name, spec.reference, spec.kernels, spec.limits)
        kernel = self._kernels(self.op, part, self._checked(spec.fake))
        differentiate = self._differentiable(kernel) if spec.gradient else None
        self._autograd(kernel, differentiate)
        self._autocast()
        self._vmap(
            self.op, spec.core, [spec.core.get(n, 0) for n in self.names] if spec.core else []
        )

    # ---- kernels -------------------------------------------------------------------------------

    def _filled(self, a: tuple[Any, ...]) -> tuple[Any, ...]:
        """The dispatcher drops trailing defaults: put them back."""
        return a + self.defaults[len(a) :]

    def _checked(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        def checked_fake(*a: Any) -> Any:
            a = self._filled(a)
            self.spec.check(*a)
            return fake(*a)

        return checked_fake

    def _kernels(self, op: Any, part: _Part, fake: Callable[..., Any]) -> Callable[..., Any]:
        spec = self.spec
        passed: set[tuple[Any, ...]] = set()

        def kernel(*a: Any) -> Any:
            a = self._filled(a)
            seen = _seen_by_check(a)
            if seen not in passed:
                spec.check(*a)
                _remember(passed, seen)
            if spec.check_values is not None:
                spec.check_values(*a)
            device = a[self.tensors[0]].device.type
            if not spec.precise:
                return backend.run(part, device, "highest", a)
            precision = backend.resolve_precision(a[-1])
            return backend.run(part, device, precision, (*a[:-1], precision))

        self._register(op, kernel, fake)
        return kernel

    def _register(self, op: Any, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
        name = op._schema.name.partition("::")[2]
        qualified = _qualified(name, op._schema.overload_name)
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(qualified, kernel, key)
        for key in ("MPS", "XPU"):
            LIBRARY.impl(qualified, functools.partial(_refuse_device, name=name), key)
        torch.library.register_fake(f"{NAMESPACE}::{qualified}", fake, lib=LIBRARY)

    # ---- gradients -----------------------------------------------------------------------------

    def _differentiable(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        """Install the gradient's ops; returns the differentiable form of this overload, which
        takes `_is_direct` first.
        """
        gradient = self.spec.gradient
        assert gradient is not None
        forward = self.op
        if gradient.saved is not None:
            reference, fake = gradient.saved
            name = f"_{self.spec.name}_forward"
            forward = _define(name, self.overload, f"({self.arguments}) -> (Tensor, Tensor)")
            part = _Part(name, reference, gradient.saved_kernels, self.spec.limits)
            kernel = self._kernels(forward, part, self._checked(fake))
            _refuse_gradient(forward, kernel, f"{name} is internal; call {self.spec.name}")
        return _function(self, gradient, (forward, kernel), self._backward_op(gradient))

    def _backward_op(self, gradient: Gradient) -> Any:
        name = f"{self.spec.name}_backward"
        kept = re.sub(r"=[^,]+", "", self.arguments.rpartition(", str? precision")[0])
        saved = "" if gradient.saved is None else "Tensor saved, "
        returns = ", ".join(["Tensor"] * len(self.slots))
        count = len(gradient.outputs)
        grads = ["Tensor grad"] if count == 1 else [f"Tensor grad_{i}" for i in range(count)]
        schema = (
            f"({', '.join(grads)}, {kept}, {saved}bool[] needs, str precision, str backend)"
            f" -> ({returns})"
        )
        op = _define(name, self.overload, schema)
        part = _Part(name, gradient.reference, gradient.kernels)

        def kernel(*a: Any) -> Any:
            *arguments, precision, chosen = a
            # autocast had its say in the forward: a backward inside its block multiplies as outside
            with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
                device = a[0].device.type
                return backend.run(part, device, precision, (*arguments, precision), chosen)

        def fake(*a: Any) -> tuple[Tensor, ...]:
            needs = a[-3]
            given = dict(zip(self.names, a[count:], strict=False))
            return tuple(
                torch.empty_like(given[slot], memory_format=torch.contiguous_format)
                if need
                else a[count].new_empty(0)
                for slot, need in zip(self.slots, needs, strict=True)
            )

        self._register(op, kernel, fake)
        word = f"python_fallback.{self.spec.family}.{self.spec.name}"
        _refuse_gradient(
            op,
            kernel,
            f"double backward is not implemented; call {word}, which is twice differentiable",
        )
        if self.spec.core is not None:
            core = [self.spec.core.get(n, 0) for n in self.names[:-1]]
            extra = [gradient.saved_dims] if saved else []
            self._vmap_backward(op, count, [*gradient.outputs, *core, *extra, 0, 0, 0])
        return op

    def _autograd(
        self, kernel: Callable[..., Any], differentiate: Callable[..., Any] | None
    ) -> None:
        spec, op, tensors = self.spec, self.op, self.tensors

        def autograd_kernel(keys: Any, *a: Any) -> Any:
            a = self._filled(a)
            if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
                spec.check(*a)
                return spec.truth(*a)
            if differentiate is not None and torch.is_grad_enabled():
                for i in tensors:
                    if a[i] is not None and a[i].requires_grad:
                        return differentiate(_is_direct(keys), *a)
            with _below_autograd():
                return kernel(*a) if _is_direct(keys) else op(*a)

        name = _qualified(spec.name, self.overload)
        LIBRARY.impl(name, autograd_kernel, "Autograd", with_keyset=True)

    # ---- autocast and vmap -----------------------------------------------------------------------

    def _autocast(self) -> None:
        """Promote what must share a dtype to the widest; a half autocast dtype means "medium"."""
        promoted = [self.names.index(n) for n in self.spec.same_dtype]
        for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

            def autocast_kernel(
                *a: Any, device: str = device, excluded: torch._C.DispatchKeySet = excluded
            ) -> Any:
                values = list(self._filled(a))
                dtypes = [values[i].dtype for i in promoted]
                for i in promoted if dtypes and all(d.is_floating_point for d in dtypes) else ():
                    values[i] = values[i].to(functools.reduce(torch.promote_types, dtypes))
                lower = self.spec.precise and values[-1] is None
                if lower and torch.get_autocast_dtype(device) != torch.float32:
                    values[-1] = "medium"
                with torch._C._ExcludeDispatchKeyGuard(excluded):
                    return self.op(*values)

            LIBRARY.impl(_qualified(self.spec.name, self.overload), autocast_kernel, key)

    def _vmap(self, op: Any, core: Mapping[str, int] | None, dims: list[int]) -> None:
        name = f"{NAMESPACE}::{_qualified(self.spec.name, self.overload)}"

        def refuse(*_: Any) -> NoReturn:
            raise NotImplementedError(
                f"{name}: vmap is not supported: not all tensor arguments take leading dims"
            )

        def rule(info: Any, in_dims: Any, *a: Any) -> Any:
            lead = _lead(in_dims, a, dims)
            out = op(*(_aligned(x, d, c, lead) for x, d, c in zip(a, in_dims, dims, strict=False)))
            return out, tuple(0 for _ in out) if isinstance(out, tuple) else 0

        torch.library.register_vmap(name, refuse if core is None else rule, lib=LIBRARY)

    def _vmap_backward(self, op: Any, count: int, dims: list[int]) -> None:
        """As forward, but every operand is expanded: each problem of the batch has its gradient."""
        name = f"{NAMESPACE}::{_qualified(self.spec.name + '_backward', self.overload)}"

        def rule(info: Any, in_dims: Any, *a: Any) -> Any:
            lead = _lead(in_dims, a, dims)
            put = [_aligned(x, d, c, lead) for x, d, c in zip(a, in_dims, dims, strict=True)]
            put = [x.reshape(1, 1) if isinstance(x, Tensor) and not x.ndim else x for x in put]
            out = op(*(_widened(x, info.batch_size) for x in put))
            given = dict(zip(self.names, a[count:], strict=False))
            restored = tuple(
                g.reshape(
                    info.batch_size,
                    *_core_shape(given[slot], in_dims[count + self.names.index(slot)]),
                )
                if need
                else g
                for g, slot, need in zip(out, self.slots, a[-3], strict=True)
            )
            return restored, tuple(0 if need else None for need in a[-3])

        torch.library.register_vmap(name, rule, lib=LIBRARY)


def _is_direct(keys: Any) -> bool:
    """Whether nothing stands between Autograd and the kernel, no mode and no wrapper: then the
    kernel is called without the dispatcher.
    """
    return keys.raw_repr() in _DIRECT


def _seen_by_check(a: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """All that `OpSpec.check` sees of plain arguments; None where one is symbolic or of a class
    of its own.
    """
    seen: list[Any] = []
    for x in a:
        kind = type(x)
        if kind in _TENSORS:
            seen += (x.shape, x.dtype, x.device)
        elif kind in _VALUES:
            seen.append(x)
        else:
            return None
    return tuple(seen)


def _remember(passed: set[tuple[Any, ...]], seen: tuple[Any, ...] | None) -> None:
    """What passed the check need not be checked again; forgotten when it is too much."""
    if seen is not None:
        if len(passed) >= _MOST_REMEMBERED:
            passed.clear()
        passed.add(seen)


def _widened(x: Any, size: int) -> Any:
    """A tensor expanded along its first dim."""
    return x.expand(size, *x.shape[1:]) if isinstance(x, Tensor) else x


def _core_shape(x: Tensor, dim: int | None) -> list[int]:
    """The shape of one example of a batched tensor."""
    return [size for i, size in enumerate(x.shape) if i != dim]


def _tensor_names(spec: OpSpec) -> list[str]:
    """Arguments that are tensors in some overload, in order: the slots of the backward's result."""
    text = spec.arguments.format(**next(iter(spec.overloads.values())))
    return re.findall(r"Tensor\?? (\w+)", text)


def _lead(in_dims: Any, a: tuple[Any, ...], dims: list[int]) -> int:
    """Most batch dims that any argument has beside the mapped one."""
    return max(
        x.ndim - (d is not None) - c
        for x, d, c in zip(a, in_dims, dims, strict=False)
        if isinstance(x, Tensor)
    )


def _aligned(x: Any, dim: int | None, core: int, lead: int) -> Any:
    """The mapped dim first, then `lead` batch dims, then the core dims; a scalar stays a scalar."""
    if not isinstance(x, Tensor) or (dim is None and core == 1 and x.ndim == 0):
        return x
    x = x.movedim(dim, 0) if dim is not None else x.unsqueeze(0)
    if core == 1 and x.ndim == 1:
        x = x.unsqueeze(-1)
    while x.ndim < 1 + max(lead, 0) + core:
        x = x.unsqueeze(1)
    return x


def _refuse_gradient(op: Any, kernel: Callable[..., Any], why: str) -> None:
    """Autograd for an op without a derivative: its result raises when it is differentiated."""
    name = op._schema.name

    class Refuse(torch.autograd.Function):
        @staticmethod
        def forward(*a: Any) -> Any:
            with _below_autograd():
                return op(*a)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *_: Any) -> NoReturn:
            raise NotImplementedError(f"{name}: {why}")

    apply: Callable[..., Any] = Refuse.apply

    def autograd_kernel(keys: Any, *a: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in a):
            return apply(*a)
        with _below_autograd():
            return kernel(*a) if _is_direct(keys) else op(*a)

    qualified = _qualified(name.partition("::")[2], op._schema.overload_name)
    LIBRARY.impl(qualified, autograd_kernel, "Autograd", with_keyset=True)


def _function(
    installed: _Installation,
    gradient: Gradient,
    forward: tuple[Any, Callable[..., Any]],
    backward_op: Any,
) -> Callable[..., Any]:
    """The autograd function of one overload: what is saved and resolved here, backward uses.
    `forward` is an op and its kernel; which of them runs, `_is_direct` says.
    """
    spec, names, slots = installed.spec, installed.names, installed.slots
    positions = [names.index(slot) for slot in slots]
    has_forward, count = gradient.saved is not None, len(gradient.outputs)

    class Fn(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, direct: bool, *inputs: Any) -> Any:
            # one function: with a `setup_context` torch inspects a signature at every call
            with _below_autograd():
                output = forward[direct](*inputs)
            saved = [x if isinstance(x, Tensor) else None for x in inputs]
            if has_forward:
                saved.append(output[1])
            ctx.save_for_backward(*saved)
            ctx.numbers = [None if isinstance(x, Tensor) else x for x in inputs]
            device = inputs[installed.tensors[0]].device.type
            ctx.precision = backend.resolve_precision(inputs[-1])
            ctx.backend = backend.choose(spec, device, (*inputs[:-1], ctx.precision))[0]
            ctx.set_materialize_grads(False)
            if has_forward or count > 1:
                ctx.mark_non_differentiable(*output[count:])
                ctx.shapes = [(o.shape, o.dtype) for o in output[:count]]
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            upstream = grads[:count]
            if all(grad is None for grad in upstream):
                return (None,) * (1 + len(names))
            tensors = ctx.saved_tensors
            arguments = [
                number if tensor is None else tensor
                for number, tensor in zip(ctx.numbers, tensors, strict=False)
            ]
            extra = tensors[len(names) :]
            needs = [ctx.needs_input_grad[1 + i] for i in positions]
            if count > 1:
                like = next(grad for grad in upstream if grad is not None)
                upstream = tuple(
                    like.new_zeros(shape, dtype=dtype) if grad is None else grad
                    for grad, (shape, dtype) in zip(upstream, ctx.shapes, strict=True)
                )
            found = backward_op(
                *upstream, *arguments[:-1], *extra, needs, ctx.precision, ctx.backend
            )
            result: list[Any] = [None] * (1 + len(names))
            for i, need, value in zip(positions, needs, found, strict=True):
                result[1 + i] = value if need else None
            return tuple(result)

    apply: Callable[..., Any] = Fn.apply
    return (lambda *a: apply(*a)[0]) if has_forward else apply
