"""What it saves to solve the experts of a layer together rather than one by one.

    python benchmarks/experts.py --device cpu

Every method is given the same views twice, all at once and one after the other, in turns, in processes of their own;
the inputs are correlated random tokens, of each expert its own. CPU seconds (on a GPU: seconds) of the fastest turn,
and by how much the process, or the GPU's allocator, grows at most while it solves.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from llmc.algorithms import Algorithm, SubsetView, new_statistics
from llmc.algorithms.gptq import GPTQ, GPTQOptions
from llmc.algorithms.sparsegpt import SparseGPT, SparseGPTOptions
from llmc.models import Heads, Subset
from llmc.quant import PerGroup, QuantSpec, Sparsity

SHAPES = {"64 x 768x256": (64, 768, 256), "8 x 1024x1024": (8, 1024, 1024)}
METHODS: dict[str, Callable[[], Algorithm]] = {
    "GPTQ, act-order": lambda: GPTQ(GPTQOptions()),
    "GPTQ, group-aware": lambda: GPTQ(GPTQOptions(actorder="group_aware")),
    "SparseGPT, 50%": lambda: SparseGPT(SparseGPTOptions()),
}


def make_views(shape: tuple[int, int, int], device: torch.device) -> list[SubsetView]:
    """Experts with one Linear each, bfloat16, W4 in groups of 64, half of the weights to be pruned."""
    experts, rows, columns = shape
    generator = torch.Generator(device).manual_seed(0)
    found = []
    for _ in range(experts):
        linear = nn.Linear(columns, rows, bias=False, device=device, dtype=torch.bfloat16)
        linear.weight.data = torch.randn(rows, columns, generator=generator, device=device).bfloat16()
        mixing = torch.randn(columns, columns, generator=generator, device=device) / columns**0.5
        statistics = new_statistics({"gram"}, columns, device)
        statistics.update(torch.randn(2 * columns, columns, generator=generator, device=device) @ mixing)
        found.append(
            SubsetView(
                subset=Subset(("down_proj",), None, "down_proj"),
                linears={"down_proj": linear},
                specs={"down_proj": QuantSpec(4, False, PerGroup(64), scale_dtype=torch.bfloat16)},
                prev=None,
                heads=Heads(1, 1, columns),
                stats=statistics,
                calls=None,
                clips={},
                sparsity={"down_proj": Sparsity(0.5)},
            )
        )
    return found


def one_by_one(method: Algorithm, views: list[SubsetView]) -> None:
    for view in views:
        method.solve([view])


def together(method: Algorithm, views: list[SubsetView]) -> None:
    method.solve(views)


def measured(method: Algorithm, views: list[SubsetView], way: Callable[[Algorithm, list[SubsetView]], None]) -> float:
    """Seconds; the results are thrown away."""
    cuda = views[0].linears["down_proj"].weight.is_cuda
    clock = time.perf_counter if cuda else time.process_time
    start = clock()
    way(method, views)
    if cuda:
        torch.cuda.synchronize()
    taken = clock() - start
    for view in views:
        for results in (view.quantized, view.weights, view.pruned, view.notes, view.clips):
            results.clear()
    return taken


def peak(device: torch.device) -> float:
    """Largest memory so far, MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def run(args: argparse.Namespace) -> dict[str, float]:
    """One method on one shape in one way: seconds of the fastest turn, and the growth of memory in MB."""
    torch.set_num_threads(1)
    device = torch.device(args.device)
    method, views = METHODS[args.method](), make_views(SHAPES[args.shape], device)
    way = together if args.way == "together" else one_by_one
    with torch.no_grad():
        measured(method, views[:1], way)
        before = peak(device)
        seconds = [measured(method, views, way) for _ in range(args.turns)]
    return {"seconds": min(seconds), "memory": peak(device) - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--method", choices=METHODS, help="one of them alone")
    parser.add_argument("--shape", choices=SHAPES, help="one of them alone")
    parser.add_argument("--way", choices=("together", "one by one"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(run(args)))
        return
    print("| experts | method | one by one, s | together, s | ratio | memory, MB |\n|---|---|---:|---:|---:|---:|")
    for shape in [args.shape] if args.shape else SHAPES:
        for method in [args.method] if args.method else METHODS:
            found = {}
            for way in ("one by one", "together"):
                options = ["--method", method, "--shape", shape, "--way", way]
                command = [sys.executable, __file__, "--device", args.device, "--turns", str(args.turns), *options]
                found[way] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            alone, batch = found["one by one"], found["together"]
            print(
                f"| {shape} | {method} | {alone['seconds']:.2f} | {batch['seconds']:.2f} "
                f"| {batch['seconds'] / alone['seconds']:.2f} | {alone['memory']:.0f} / {batch['memory']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
