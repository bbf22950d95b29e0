# SPDX-License-Identifier: Apache-2.0
"""Registration: torch's own checks on every overload and on the ops behind it, the choice of
overloads, no aliases.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import clam_kernels
from clam_kernels import testing

CHEAP = ("test_schema", "test_faketensor", "test_autograd_registration")
ALL = (*CHEAP, "test_aot_dispatch_dynamic")


def _utils(spec: Any, sample: Any) -> tuple[str, ...]:
    """The checks for a sample; the tracing check costs ten times the others, so one sample of each
    kind has it.
    """
    return ALL if sample.name in testing.selection(spec.name, "traced") else CHEAP


def overload_of(packet: Any, args: tuple[Any, ...]) -> Any:
    """The overload whose Tensor arguments are Tensors here."""

    def fits(op: Any) -> bool:
        pairs = zip(op._schema.arguments, args, strict=False)
        return all(
            isinstance(a, Tensor) == (str(s.type) == "Tensor")
            for s, a in pairs
            if str(s.type) in ("Tensor", "float")
        )

    return next(op for op in (getattr(packet, o) for o in packet.overloads()) if fits(op))


def filled(op: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return args + tuple(a.default_value for a in op._schema.arguments[len(args) :])


def internal_calls(spec: Any, args: tuple[Any, ...]) -> list[tuple[Any, tuple[Any, ...]]]:
    """The ops behind a differentiable op, with arguments of this call."""
    full = filled(overload_of(spec.packet, args), args)
    tensors = {name for words in spec.overloads.values() for name in _tensors(spec, words)}
    names = testing.argument_names(spec.name)
    needs = [isinstance(a, Tensor) for n, a in zip(names, full, strict=True) if n in tensors]
    calls, saved = [], ()
    if spec.gradient.saved == "output":
        saved = (spec.packet(*full),)
    elif spec.gradient.saved is not None:
        packet = getattr(torch.ops.clam, f"_{spec.name}_forward")
        forward = (*full, needs) if spec.gradient.saved_for_needs else full
        calls.append((overload_of(packet, forward), forward))
        saved = packet(*forward)[-len(spec.gradient.saved_tensors) :]
    out = spec.packet(*full)
    grads = testing.upstream(
        [out] if isinstance(out, Tensor) else out[: len(spec.gradient.outputs)]
    )
    packet = getattr(torch.ops.clam, f"{spec.name}_backward")
    call = (*grads, *full[:-1], *saved, needs, "highest", "reference")
    return [*calls, (overload_of(packet, call), call)]


def _tensors(spec: Any, words: dict[str, str]) -> list[str]:
    parts = spec.arguments.format(**words).split(", ")
    return [p.split()[1].partition("=")[0] for p in parts if p.startswith("Tensor")]


def test_op(spec, sample, backend):
    args = sample.cast(backend.dtypes[0], backend.device).args
    leaves = tuple(
        a.clone().requires_grad_() if n in sample.differentiable else a
        for n, a in zip(testing.argument_names(spec.name), args, strict=False)
    )
    op = overload_of(spec.packet, args)
    torch.library.opcheck(op, leaves, test_utils=_utils(spec, sample))


@pytest.mark.contract(samples="traced")
def test_op_in_half(spec, sample, backend):
    """The fake knows which outputs are wider than the inputs."""
    args = sample.cast(torch.bfloat16, backend.device).args
    torch.library.opcheck(overload_of(spec.packet, args), args, test_utils=CHEAP)


@pytest.mark.contract(gradient=True, samples="traced")
def test_ops_behind_it_in_half(spec, sample):
    for op, args in internal_calls(spec, sample.cast(torch.bfloat16).args):
        torch.library.opcheck(op, args, test_utils=CHEAP)


@pytest.mark.contract(gradient=True)
def test_ops_behind_it(spec, sample):
    for op, args in internal_calls(spec, sample.args):
        torch.library.opcheck(op, args, test_utils=_utils(spec, sample))


def test_every_registered_op_is_known():
    registered = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("clam::")}
    declared = set()
    for spec in clam_kernels.all_ops():
        names = [spec.name]
        if spec.gradient is not None:
            names += [f"{spec.name}_backward"]
            names += [f"_{spec.name}_forward"] if isinstance(spec.gradient.saved, tuple) else []
        for overload in spec.overloads:
            declared |= {f"clam::{n}.{overload}" if overload else f"clam::{n}" for n in names}
    assert registered == declared


def test_tags(spec):
    for overload in spec.overloads:
        op = getattr(spec.packet, overload or "default")
        assert torch.Tag.pt2_compliant_tag in op.tags


def test_outputs_are_new_and_contiguous(spec, sample, backend):
    args = sample.cast(torch.float32, backend.device).args
    copies = [a.clone() if isinstance(a, Tensor) else a for a in args]
    storages = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor) and a.numel()}
    out = spec.packet(*args)
    for one in out if isinstance(out, tuple) else (out,):
        assert one.is_contiguous()
        assert one.numel() == 0 or one.untyped_storage().data_ptr() not in storages
        # an output owns no more memory than its shape needs: it is no view of scratch
        assert one.untyped_storage().nbytes() == one.numel() * one.element_size()
    for a, b in zip(args, copies, strict=True):  # and no input has changed
        assert not isinstance(a, Tensor) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
