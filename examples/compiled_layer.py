# SPDX-License-Identifier: Apache-2.0
"""An associative-memory layer inside a model: one graph under torch.compile, forward and backward,
any number of rows without recompiling, and on a GPU captured in a CUDA graph.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import clam_kernels  # registers torch.ops.clam


class Recall(nn.Module):
    """Learnable memories; the layer returns what they recall after `steps` steps."""

    def __init__(self, memories: int, features: int, steps: int) -> None:
        super().__init__()
        self.memories = nn.Parameter(torch.randn(memories, features))
        self.log_beta = nn.Parameter(torch.zeros(()))
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.clam.am_recursion(
            x, self.memories, self.log_beta.exp(), self.steps, 0.5
        )
        return out


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100, help="of the optimiser")
    parser.add_argument("--json", type=Path, help="also write the report here")
    return parser.parse_args()


def train(model: Callable[[Tensor], Tensor], parameters: Any, data: Tensor, target: Tensor,
          steps: int) -> list[float]:  # fmt: skip
    """Full batches but for every third, which has other row counts; the loss of each step."""
    optimiser = torch.optim.Adam(parameters, 3e-2)
    losses = []
    for step in range(steps):
        rows = len(data) - 7 * step if step % 3 == 2 else len(data)
        loss = nn.functional.cross_entropy(model(data[:rows]), target[:rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def captured(model: nn.Module, data: Tensor) -> bool:
    """Whether a replayed CUDA graph follows its input, bit for bit."""
    held = data.clone()
    with torch.no_grad():
        model(held)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(held)
        held.copy_(data.flip(0))
        graph.replay()
        return bool(torch.equal(out, model(data.flip(0))))


def main() -> None:
    args = parse()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y = load_digits(return_X_y=True)
    data = torch.tensor(x, dtype=torch.float32, device=device) / 16
    target = torch.tensor(y, device=device)
    model = nn.Sequential(nn.Linear(64, 16), Recall(32, 16, 4), nn.Linear(16, 10)).to(device)
    counter = CompileCounterWithBackend("inductor" if device == "cuda" else "aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    losses = train(compiled, model.parameters(), data, target, args.steps)
    correct = compiled(data).argmax(1) == target
    report = {
        "backend": clam_kernels.explain("am_recursion", data),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "accuracy": float(correct.float().mean()),
        "row_counts": 1 + len(range(2, args.steps, 3)),
        "compiled_graphs": counter.frame_count,
        "cuda_graph_follows_input": captured(model, data) if device == "cuda" else None,
    }
    for name, value in report.items():
        print(f"{name:>26}: {value:.4f}" if isinstance(value, float) else f"{name:>26}: {value}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
