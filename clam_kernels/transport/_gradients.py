# SPDX-License-Identifier: Apache-2.0
"""Gradients at convergence, each through one pass: of the potentials by the implicit function
theorem, of the value by the envelope theorem. Equations: docs/ops/sinkhorn.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._problem import TransportProblem
from ._warn import not_converged

# Conjugate gradients stop at this residual, relative to the right-hand side, or after this many
# steps.
SOLVE_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
MAX_SOLVE_STEPS = 500


def semi_dual(problem: TransportProblem, g: Tensor) -> Tensor:
    """The f of the rows' half-step at a constant g. At the optimum the derivative of the value by g
    is 0, so the value is differentiated through f alone.
    """
    return problem.ops().one_pass(g.detach(), problem.log_row)[0]


def implicit(problem: TransportProblem, g: Tensor) -> tuple[Tensor, Tensor]:
    """(f, g) with the gradients of the equation log_mass(g) = log_col. One pass at the solution has
    the derivatives of the masses; `_ImplicitPotential` solves for the derivative of g.
    """
    ops = problem.ops()
    constant_g = g.detach()
    log_mass = ops.one_pass(constant_g, problem.log_row)[1]
    log_col = problem.log_col
    log_col = torch.zeros_like(constant_g) if log_col is None else log_col.to(g.dtype)
    masked = constant_g == -torch.inf
    residual = torch.where(masked, 0.0, log_mass - torch.where(masked, 0.0, log_col))
    implicit_g: Tensor = _ImplicitPotential.apply(  # type: ignore[no-untyped-call]
        residual, constant_g, problem.detach()
    )
    f = ops.one_pass(implicit_g, problem.log_row)[0]
    return f, implicit_g


class _ImplicitPotential(torch.autograd.Function):
    """g as a function of the residual r = log_mass - log_col: dg = -(d log_mass / d g)^-1 dr. A
    constant added to g changes no mass, so the solution keeps sum_j b_j g_j as it is.
    """

    @staticmethod
    def forward(ctx: Any, residual: Tensor, g: Tensor, problem: TransportProblem) -> Tensor:
        ctx.save_for_backward(g)
        ctx.problem = problem
        return g.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (g,) = ctx.saved_tensors
        with torch.enable_grad():
            point = g.detach().requires_grad_()
            log_mass = ctx.problem.ops().one_pass(point, ctx.problem.log_row)[1]
        mass = log_mass.detach().double().exp()

        def product(y: Tensor) -> Tensor:
            """(diag(S) - Q^T diag(1/a) Q) y, the derivative of the masses S by g along y; the
            matrix is symmetric.
            """
            cotangent = (mass * y).to(log_mass.dtype)
            # `grad` imports sympy at its first call with a cotangent: differentiate a dot product
            with torch.enable_grad():
                weighted = torch.dot(log_mass.flatten(), cotangent.flatten())
            return torch.autograd.grad(weighted, point, retain_graph=True)[0].double()

        rhs = torch.where(mass > 0, grad.double(), 0.0)
        rhs = rhs - mass / mass.sum(-1, keepdim=True) * rhs.sum(-1, keepdim=True)
        y = _solve(product, rhs, mass, SOLVE_TOLERANCE[g.dtype])
        return -(mass * y).to(grad.dtype), None, None


def _solve(product: Any, rhs: Tensor, mass: Tensor, tolerance: float) -> Tensor:
    """Conjugate gradients for `product(y) = rhs`, preconditioned by the masses, for each problem of
    a batch.
    """
    divisor = torch.where(mass > 0, mass, 1.0)
    y, residual = torch.zeros_like(rhs), rhs
    preconditioned = residual / divisor
    direction = preconditioned
    size = (residual * preconditioned).sum(-1, keepdim=True)
    target = tolerance**2 * size
    for _ in range(MAX_SOLVE_STEPS):
        is_active = size > target
        if not bool(is_active.any()):
            return y
        image = product(direction)
        curvature = (direction * image).sum(-1, keepdim=True)
        is_convex = curvature > 0
        step = size / torch.where(is_convex, curvature, 1.0)
        step = torch.where(is_active & is_convex, step, 0.0)
        y, residual = y + step * direction, residual - step * image
        preconditioned = residual / divisor
        next_size = (residual * preconditioned).sum(-1, keepdim=True)
        ratio = next_size / torch.where(size > 0, size, 1.0)
        ratio = torch.where(is_active & is_convex, ratio, 0.0)
        stuck = is_active & ~is_convex
        size = torch.where(stuck, 0.0, torch.where(is_active, next_size, size))
        direction = preconditioned + ratio * direction
    residual = float((size / target.clamp(min=1e-300)).max()) ** 0.5 * tolerance
    not_converged(
        f"sinkhorn: the equations of gradient='implicit' have a residual of {residual:.2g} after"
        f" {MAX_SOLVE_STEPS} steps, because the plan is almost hard; raise epsilon"
    )
    return y
