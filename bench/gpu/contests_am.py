# SPDX-License-Identifier: Apache-2.0
"""The associative-memory contests: our calls, the fastest plain forms, and the error of each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import clam_kernels  # noqa: F401  registers torch.ops.clam
from python_fallback import am as truth

from .cases import Target, TimedContest
from .clock import Contestant, launches, products, tf32
from .setting import Setting

SAMPLE_ROWS, DRAWS = 4096, 6
STAND_IN_ROWS = 300
CHUNKS = (1 << 15, 1 << 18)
BATCH = 1 << 18
STEP, RATE, BATCHES = 0.5, 0.05, 4


def points(
    n: int, d: int, k: int, device: str, seed: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Points around k Gaussian memories, and a beta of about 3 / (gap between the two nearest)."""
    generator = torch.Generator(device).manual_seed(seed)
    rho = torch.randn(k, d, generator=generator, device=device)
    near = torch.randint(k, (n,), generator=generator, device=device)
    v = torch.randn(n, d, generator=generator, device=device).mul_(0.5)
    for rows, which in zip(v.split(1 << 22), near.split(1 << 22), strict=True):
        rows += rho[which]
    return v, rho, 3.0 / d


def operands_of(setting: Setting, target: Target) -> tuple[Tensor, Tensor, float, int]:
    """(v, rho, beta, steps) of a target; few rows and memories in a dry run."""
    n, d, k, steps = (target.shape[name] for name in ("n", "d", "k", "steps"))
    if setting.dry_run:
        n, k, steps = STAND_IN_ROWS, min(k, 16), min(steps, 3)
    return (*points(n, d, k, setting.device, setting.seed), steps)


# ---- peers ----------------------------------------------------------------------------------


def eager(
    v: Tensor, rho: Tensor, beta: Any, steps: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """v <- softmax(2 beta v rho^T - beta |rho|^2) rho, with whole N x K arrays; the products are in
    `dtype`.
    """
    bias, keys, values = -beta * rho.square().sum(-1), (2 * beta * rho).T.to(dtype), rho.to(dtype)
    for _ in range(steps):
        if dtype == torch.float32:
            v = torch.softmax(torch.addmm(bias, v, keys), -1) @ values
        else:
            v = (torch.softmax((v.to(dtype) @ keys).float() + bias, -1).to(dtype) @ values).float()
    return v


def chunked(rows: int, *args: Any, **more: Any) -> Tensor:
    v, *rest = args
    return torch.cat([eager(part, *rest, **more) for part in v.split(rows)])


def attention(v: Tensor, rho: Tensor, beta: float, steps: int) -> Tensor:
    """The same by attention in bfloat16: the bias is a column of the keys, and a column of ones in
    the values makes each result the next query.
    """
    width = -(-(rho.shape[1] + 1) // 8) * 8
    pad = (0, width - rho.shape[1] - 1)
    bias = -beta * rho.square().sum(-1, keepdim=True)
    ones = torch.ones_like
    grow = torch.nn.functional.pad
    q = grow(torch.cat([v, ones(v[:, :1])], 1), pad).bfloat16()[None, None]
    keys = grow(torch.cat([2 * beta * rho, bias], 1), pad).bfloat16()[None, None]
    values = grow(torch.cat([rho, ones(bias)], 1), pad).bfloat16()[None, None]
    for _ in range(steps):
        q = torch.nn.functional.scaled_dot_product_attention(q, keys, values, scale=1.0)
    return q[0, 0, :, : rho.shape[1]].float()


def compiled(setting: Setting, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under torch.compile. The first call compiles, so that an error of the compiler
    fails this peer alone. A dry run only traces it.
    """
    backend = "eager" if setting.dry_run else "inductor"
    ready = functools.cache(lambda: torch.compile(function, dynamic=False, backend=backend))
    return lambda *args: ready()(*args)


def torch_mode(mode: str) -> Callable[[], Any]:
    return functools.partial(products, "highest") if mode == "highest" else tf32


# ---- errors ---------------------------------------------------------------------------------


def sample_of(n: int, seed: int, device: str, draw: int = 0) -> Tensor:
    """Indices of the rows of one draw of several; draws share few rows, and the first draw has the
    first and the last rows.
    """
    if n < DRAWS * SAMPLE_ROWS:
        return torch.arange(draw, n, DRAWS, device=device)
    generator = torch.Generator().manual_seed(seed + draw)
    between = torch.randint(n, (SAMPLE_ROWS,), generator=generator)
    if draw == 0:
        between[:128] = torch.cat([torch.arange(64), torch.arange(n - 64, n)])
    return between.to(device)


def forward_errors(
    v: Tensor, rho: Tensor, beta: float, steps: int, seed: int
) -> Callable[[Tensor], dict[str, Any]]:
    """max |out - exact| / std(exact) on a sample of rows, with `exact` from float64; and the same
    on several samples, because one row near a border between basins decides the maximum by chance.
    """
    samples = [sample_of(len(v), seed, str(v.device), i) for i in range(DRAWS)]
    exact = [truth.am_recursion(v[at].double(), rho.double(), beta, steps) for at in samples]
    spread = float(exact[0].std())

    def errors(out: Tensor) -> dict[str, Any]:
        pairs = zip(samples, exact, strict=True)
        off = [(out[at].double() - e).abs().amax(1) / spread for at, e in pairs]
        largest = [float(rows.max()) for rows in off]
        return {"out": largest[0], "out_draws": largest, "out_p99": float(off[0].quantile(0.99))}

    return errors


def exact_gradients(
    v: Tensor, rho: Tensor, beta: Tensor, steps: int, grad: Tensor, rows: int = 1 << 17
) -> list[Tensor]:
    """Gradients of v, rho and beta in float64, a chunk of rows at a time."""
    v_gradients, sums = [], [torch.zeros_like(x, dtype=torch.float64) for x in (rho, beta)]
    for part, up in zip(v.detach().split(rows), grad.split(rows), strict=True):
        leaves = [x.detach().double().requires_grad_() for x in (part, rho, beta)]
        out = truth.am_recursion(*leaves, steps)
        first, *rest = torch.autograd.grad(out, leaves, up.double())
        v_gradients.append(first)
        for total, part_gradient in zip(sums, rest, strict=True):
            total += part_gradient
    return [torch.cat(v_gradients), *sums]


def gradient_errors(
    gradients: tuple[Tensor, ...], exact: list[Tensor], at: Tensor
) -> dict[str, float]:
    """|g - exact| / |exact|: row by row for v, since the rows near a border between basins dominate
    every norm; over the whole gradient for rho and beta.
    """
    per_row = (gradients[0][at].double() - exact[0][at]).norm(dim=1) / exact[0][at].norm(dim=1)
    whole = [
        float((g.double() - e).norm() / e.norm())
        for g, e in zip(gradients[1:], exact[1:], strict=True)
    ]
    return {
        "grad_median": float(per_row.median()),
        "grad_p99": float(per_row.quantile(0.99)),
        "rho": whole[0],
        "beta": whole[1],
    }


# ---- contests -----------------------------------------------------------------------------------


def recall(setting: Setting, target: Target) -> TimedContest:
    """Rows 1, 2, 3, 16, 17: forward."""
    v, rho, beta, steps = operands_of(setting, target)
    args = (v, rho, beta) if target.op == "am_step" else (v, rho, beta, steps)
    op, mode = getattr(torch.ops.clam, target.op), torch_mode(target.mode)
    peers = {"eager": Contestant(lambda: eager(v, rho, beta, steps), mode)}
    if "compile" in target.goal.ratios or target.id == "16":
        fast = compiled(setting, eager)
        peers["compile"] = Contestant(lambda: fast(v, rho, beta, steps), mode)
    if "sdpa" in target.goal.ratios:
        peers["sdpa"] = Contestant(lambda: attention(v, rho, beta, steps))
    facts = None
    if target.goal.launches is not None and not setting.dry_run:

        def facts() -> dict[str, Any]:
            return {
                "launches": launches(lambda: op(*args, precision=target.mode)),
                "launches_eager": launches(lambda: eager(v, rho, beta, steps)),
            }

    return TimedContest(
        ours=lambda: op(*args, precision=target.mode),
        args=args,
        peers=peers,
        errors=forward_errors(v, rho, beta, steps, setting.seed),
        plain=Contestant(lambda: eager(v, rho, beta, steps)),
        facts=facts,
    )


def recall_trained(setting: Setting, target: Target) -> TimedContest:
    """Target 4: forward and backward."""
    v, rho, number, steps = operands_of(setting, target)
    leaves = [x.requires_grad_() for x in (v, rho, torch.tensor(number, device=v.device))]
    generator = torch.Generator(v.device).manual_seed(setting.seed + 1)
    grad = torch.randn(v.shape, generator=generator, device=v.device)
    mode = torch_mode(target.mode)

    def trained(function: Callable[..., Tensor], **more: Any) -> tuple[Tensor, ...]:
        out = function(*leaves, steps, **more)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad))

    peers = {"eager": Contestant(lambda: trained(eager), mode)}
    if "compile" in target.goal.ratios:
        fast = compiled(setting, eager)
        peers["compile"] = Contestant(lambda: trained(fast), mode)
    exact = exact_gradients(v, rho, leaves[2], steps, grad)
    forward = forward_errors(v.detach(), rho.detach(), number, steps, setting.seed)
    at = sample_of(len(v), setting.seed, str(v.device))
    return TimedContest(
        ours=lambda: trained(torch.ops.clam.am_recursion, precision=target.mode),
        args=tuple(leaves),
        peers=peers,
        errors=lambda got: {**forward(got[0]), **gradient_errors(got[1:], exact, at)},
        plain=Contestant(lambda: trained(eager)),
    )


def inference(setting: Setting, target: Target) -> TimedContest:
    """Target 5: eager cannot run it whole, so the peers are eager in chunks of rows."""
    v, rho, beta, steps = operands_of(setting, target)
    half = {"dtype": torch.bfloat16} if target.mode == "medium" else {}
    peers = {
        f"eager_chunks_{size >> 10}k": Contestant(
            functools.partial(chunked, size, v, rho, beta, steps, **half), torch_mode(target.mode)
        )
        for size in CHUNKS
    }
    peers["sdpa"] = Contestant(lambda: attention(v, rho, beta, steps))
    return TimedContest(
        ours=lambda: torch.ops.clam.am_recursion(v, rho, beta, steps, precision=target.mode),
        args=(v, rho, beta),
        peers=peers,
        errors=forward_errors(v, rho, beta, steps, setting.seed),
        plain=Contestant(functools.partial(chunked, CHUNKS[0], v, rho, beta, steps, **half)),
    )


class CompletionTrainer:
    """SGD of the memories on completion: half of the entries of each row are hidden."""

    def __init__(self, setting: Setting, target: Target, function: Callable[..., Tensor]) -> None:
        n, d, k = (target.shape[name] for name in ("batch", "d", "k"))
        self.steps = target.shape["steps"]
        if setting.dry_run:
            n, k, self.steps = STAND_IN_ROWS, 16, 3
        self.function = function
        self.seed, device = setting.seed, setting.device
        self.x = points(n, d, k, device, setting.seed)[0]
        self.beta, self.first = 3.0 / d, 0.5 * self.x[:k].clone()
        self.restart()

    def restart(self) -> None:
        self.rho = self.first.clone().requires_grad_()
        self.generator = torch.Generator(self.rho.device).manual_seed(self.seed)

    def step(self) -> Tensor:
        """One batch: draw masks, run forward and backward, update the memories, return the loss."""
        x = self.x
        hidden = torch.rand(x.shape, generator=self.generator, device=x.device) < 0.5
        seen = x.masked_fill(hidden, 0.0)
        out = self.function(seen, self.rho, self.beta, self.steps, STEP, hidden)
        loss = ((out - x).square() * hidden).sum() / hidden.sum()
        (grad,) = torch.autograd.grad(loss, [self.rho])
        with torch.no_grad():
            self.rho -= RATE * len(self.rho) * grad
        return loss.detach()

    def batch(self) -> CompletionTrainer:
        """One step; returns the trainer, so that `errors` can compute its curve."""
        self.step()
        return self

    def curve(self) -> Tensor:
        self.restart()
        return torch.stack([self.step() for _ in range(BATCHES)]).double().cpu()


def eager_masked(
    v: Tensor, rho: Tensor, beta: float, steps: int, step: float, mask: Tensor
) -> Tensor:
    bias, keys = -beta * rho.square().sum(-1), (2 * beta * rho).T
    for _ in range(steps):
        v = v + step * mask * (torch.softmax(torch.addmm(bias, v, keys), -1) @ rho - v)
    return v


def eager_masked_chunks(v: Tensor, *rest: Any) -> Tensor:
    *between, mask = rest
    pairs = zip(v.split(CHUNKS[0]), mask.split(CHUNKS[0]), strict=True)
    return torch.cat([eager_masked(x, *between, u) for x, u in pairs])


def training(setting: Setting, target: Target) -> TimedContest:
    """Target 6: one batch of the epoch; the losses of a few batches beside those of eager
    float32.
    """
    ours = CompletionTrainer(
        setting, target,
        lambda v, rho, beta, steps, step, mask: torch.ops.clam.am_recursion(
            v, rho, beta, steps, step, mask, precision=target.mode
        ),
    )  # fmt: skip
    plain = CompletionTrainer(setting, target, eager_masked_chunks)
    exact = plain.curve()
    with tf32():
        rival = plain.curve()

    def off(losses: Tensor) -> float:
        return float((losses - exact).abs().max())

    def facts() -> dict[str, Any]:
        losses = ours.curve()
        return {
            "losses": losses.tolist(),
            "losses_eager": exact.tolist(),
            "losses_eager_tf32": rival.tolist(),
            "curve_ok": off(losses) <= max(2 * off(rival), 1e-3 * float(exact.abs().max())),
        }

    return TimedContest(
        ours=ours.batch,
        args=(ours.x, ours.rho, ours.beta),
        peers={"eager_chunks_32k": Contestant(plain.batch, tf32)},
        errors=lambda trainer: {"curve": off(trainer.curve())},
        plain=Contestant(plain.batch),
        scale=target.shape["n"] / target.shape["batch"],
        facts=facts,
    )
