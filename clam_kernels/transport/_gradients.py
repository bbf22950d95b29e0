# SPDX-License-Identifier: Apache-2.0
"""Gradients at convergence: of the potentials by the implicit function theorem, of the value by the
envelope theorem. Both are those of one pass. Equations: docs/ops/sinkhorn.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._problem import Problem
from ._warn import not_converged

# Conjugate gradients end at this residual, relative to the right side, or after so many products.
ENOUGH = {torch.float64: 1e-12, torch.float32: 1e-6}
MOST = 500


def semi_dual(problem: Problem, g: Tensor) -> Tensor:
    """The f of the rows' step at a constant g, differentiable by all else: the value has no slope
    along g where it is greatest.
    """
    return problem.calls().one_pass(g.detach(), problem.log_row)[0]


def implicit(problem: Problem, g: Tensor) -> tuple[Tensor, Tensor]:
    """(f, g) with the gradients of log_mass(g) = log_col: one pass at the solution shows how its
    masses move with everything, the solve below how g has to follow.
    """
    calls = problem.calls()
    fixed = g.detach()
    log_mass = calls.one_pass(fixed, problem.log_row)[1]
    log_col = torch.zeros_like(fixed) if problem.log_col is None else problem.log_col.to(g.dtype)
    dead = fixed == -torch.inf
    residual = torch.where(dead, 0.0, log_mass - torch.where(dead, 0.0, log_col))
    followed: Tensor = _Follow.apply(residual, fixed, problem.detached())  # type: ignore[no-untyped-call]
    f = calls.one_pass(followed, problem.log_row)[0]
    return f, followed


class _Follow(torch.autograd.Function):
    """g as a function of the residual r of the masses' logarithms: dg = -(d log_mass / d g)^-1 dr,
    where sum_j b_j g_j is held, as adding a constant to g changes no mass.
    """

    @staticmethod
    def forward(ctx: Any, residual: Tensor, g: Tensor, problem: Problem) -> Tensor:
        ctx.save_for_backward(g)
        ctx.problem = problem
        return g.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (g,) = ctx.saved_tensors
        with torch.enable_grad():
            at = g.detach().requires_grad_()
            log_mass = ctx.problem.calls().one_pass(at, ctx.problem.log_row)[1]
        mass = log_mass.detach().double().exp()

        def product(y: Tensor) -> Tensor:
            """(diag(S) - Q^T diag(1/a) Q) y: how the masses S follow g; symmetric."""
            cotangent = (mass * y).to(log_mass.dtype)
            with (
                torch.enable_grad()
            ):  # a cotangent handed to `grad` imports sympy at the first call
                weighted = torch.dot(log_mass.flatten(), cotangent.flatten())
            return torch.autograd.grad(weighted, at, retain_graph=True)[0].double()

        right = torch.where(mass > 0, grad.double(), 0.0)
        right = right - mass / mass.sum(-1, keepdim=True) * right.sum(-1, keepdim=True)
        y = _solved(product, right, mass, ENOUGH[g.dtype])
        return -(mass * y).to(grad.dtype), None, None


def _solved(product: Any, right: Tensor, mass: Tensor, enough: float) -> Tensor:
    """Conjugate gradients preconditioned by the masses, for each problem of a batch."""
    safe = torch.where(mass > 0, mass, 1.0)
    y, rest = torch.zeros_like(right), right
    turned = rest / safe
    along = turned
    size = (rest * turned).sum(-1, keepdim=True)
    goal = enough**2 * size
    for _ in range(MOST):
        going = size > goal
        if not bool(going.any()):
            return y
        image = product(along)
        curve = (along * image).sum(-1, keepdim=True)
        step = torch.where(going & (curve > 0), size / torch.where(curve > 0, curve, 1.0), 0.0)
        y, rest = y + step * along, rest - step * image
        turned = rest / safe
        new = (rest * turned).sum(-1, keepdim=True)
        ratio = torch.where(going & (curve > 0), new / torch.where(size > 0, size, 1.0), 0.0)
        stuck = going & ~(curve > 0)
        size = torch.where(stuck, 0.0, torch.where(going, new, size))
        along = turned + ratio * along
    residual = float((size / goal.clamp(min=1e-300)).max()) ** 0.5 * enough
    not_converged(
        f"sinkhorn: the implicit gradient's equations are solved to {residual:.2g} after {MOST}"
        " steps: the plan is almost hard; raise epsilon"
    )
    return y
