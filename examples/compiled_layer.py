# SPDX-License-Identifier: Apache-2.0
"""Train an associative-memory layer inside a compiled model, in bfloat16 autocast.

torch.compile makes one graph, forward and backward, for any number of rows; on a GPU the example
also captures a CUDA graph.
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
    """Train on full batches; every third batch has fewer rows. Returns the loss of each step."""
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


def follows_input(model: nn.Module, data: Tensor) -> bool:
    """Whether a replayed CUDA graph gives the bits of the model for new values of its input."""
    graph_input = data.clone()
    # no cache of casts: its tensors would be in the graph's private memory
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        model(graph_input)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(graph_input)
        graph_input.copy_(data.flip(0))
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
        # autocast to half precision means "medium" products, which a CPU computes in float32
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
        "cuda_graph_follows_input": follows_input(model, data) if device == "cuda" else None,
    }
    for name, value in report.items():
        print(f"{name:>26}: {value:.4f}" if isinstance(value, float) else f"{name:>26}: {value}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
