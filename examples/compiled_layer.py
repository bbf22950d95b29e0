# SPDX-License-Identifier: Apache-2.0
"""An associative-memory layer inside a model, trained in bfloat16 autocast and compiled: one graph,
forward and backward, any number of rows without recompiling, and on a GPU a CUDA graph.
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

import clam_kernels
from clam_kernels.nn import AssociativeMemory


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100, help="of the optimiser")
    parser.add_argument("--json", type=Path, help="also write the report here")
    return parser.parse_args()


def autocast(device: str) -> torch.autocast:
    """The linear layers compute in bfloat16; states, memories and their gradients stay float32."""
    return torch.autocast(device, torch.bfloat16)


def train(model: Callable[[Tensor], Tensor], parameters: Any, data: Tensor, target: Tensor,
          steps: int) -> list[float]:  # fmt: skip
    """Full batches but for every third, which has other row counts; the loss of each step."""
    optimiser = torch.optim.Adam(parameters, 3e-2)
    losses = []
    for step in range(steps):
        rows = len(data) - 7 * step if step % 3 == 2 else len(data)
        with autocast(data.device.type):
            loss = nn.functional.cross_entropy(model(data[:rows]), target[:rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def captured(model: nn.Module, data: Tensor) -> bool:
    """Whether a replayed CUDA graph follows its input, bit for bit."""
    held = data.clone()
    # no cache of casts: what one call keeps in it would lie in the graph's own memory
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
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
    torch.set_num_threads(1)  # layers this small gain nothing from more
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y = load_digits(return_X_y=True)
    data = torch.tensor(x, dtype=torch.float32, device=device) / 16
    target = torch.tensor(y, device=device)
    memory = AssociativeMemory(32, 16, steps=4, step=0.5)
    model = nn.Sequential(nn.Linear(64, 16), memory, nn.Linear(16, 10)).to(device)
    counter = CompileCounterWithBackend("inductor" if device == "cuda" else "aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    losses = train(compiled, model.parameters(), data, target, args.steps)
    with autocast(device):
        correct = compiled(data).argmax(1) == target
        rows = model[0](data)
        recalled = memory(rows)
    report = {
        # a half autocast asks for "medium" products, which a CPU computes in float32
        "backend": clam_kernels.explain("am_recursion", data, "medium"),
        "autocast": "bfloat16",
        "rows_into_memory": str(rows.dtype).removeprefix("torch."),
        "rows_out_of_memory": str(recalled.dtype).removeprefix("torch."),
        "beta": float(memory.beta.detach()),
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
