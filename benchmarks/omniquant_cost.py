"""What an epoch of OmniQuant costs, as a multiple of the forward and backward passes that it can't do without.

    python benchmarks/omniquant_cost.py --model DIR --calib valid.txt

In one run of llmc on the model's first blocks, each block is learned as always; right before, its calibration batches
are sent through it and back with all its weights as leaves: the same calls, inputs rounded the same way, and nothing to
learn. Both are process CPU seconds of one thread, an epoch of each. What the ratio has beyond 1 is rounding weights to
their grids, once a step, with its gradients, and the optimizer.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmc import compress
from llmc.algorithms.omniquant import OmniQuant

SCHEMES: dict[str, dict[str, Any]] = {
    "W4A16 in groups of 64, LWC": {
        "weight": {"bit": 4, "symmetric": False, "granularity": "per_group", "group_size": 64},
        "special": {"lwc": True},
    },
    "W4A4, LWC and LET": {
        "weight": {"bit": 4, "symmetric": True, "granularity": "per_channel"},
        "act": {"bit": 4, "symmetric": True, "granularity": "per_token"},
        "special": {"lwc": True, "let": True},
    },
}


def plain_epoch(view: Any) -> float:
    """Seconds of a forward and a backward pass of every batch."""
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in view.weights.items()}
    start = time.process_time()
    for batch in range(len(view.calls)):
        with torch.enable_grad():
            output = view.calls.output(batch, weights).float()
            loss = nn.functional.mse_loss(output, view.calls.target(batch).float())
            torch.autograd.grad(loss, list(weights.values()))
    return time.process_time() - start


def measured(scheme: dict[str, Any], args: argparse.Namespace) -> list[tuple[float, float]]:
    """For each block, the seconds of a plain epoch and of one of OmniQuant's."""
    found: list[tuple[float, float]] = []
    learn = OmniQuant.tune

    def tune(self: OmniQuant, view: Any) -> Any:
        plain = plain_epoch(view)
        start = time.process_time()
        note = learn(self, view)
        # Before and behind the epochs the loss of all batches is looked at: two forwards, each a third of an epoch.
        found.append((plain, (time.process_time() - start) / (args.epochs + 2 / 3)))
        return note

    OmniQuant.tune = tune  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            compress(config(scheme, args, Path(folder)))
    finally:
        OmniQuant.tune = learn  # type: ignore[method-assign]
    return found


def config(scheme: dict[str, Any], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    special = {**scheme["special"], "epochs": args.epochs}
    return {
        "base": {"device": args.device, "threads": 1},
        "model": {"type": "auto", "path": str(args.model), "torch_dtype": "torch.float32"},
        "calib": {
            "name": "text",
            "path": str(args.calib),
            "n_samples": args.samples,
            "seq_len": args.tokens,
            "bs": 1,
            "preproc": "sequential",
        },
        "quant": {**scheme, "method": "OmniQuant", "special": special},
        "ignored_layers": {"block_ids": [f"{args.blocks}-{args.last}"]},
        "save": {"save_fake": True, "save_path": str(folder / "run")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint")
    parser.add_argument("--calib", type=Path, required=True, help="text file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048, help="of a sample; the papers' is 2048")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=2, help="how many are learned")
    parser.add_argument("--last", type=int, default=29, help="index of the model's last block")
    args = parser.parse_args()
    print(f"{args.samples} x {args.tokens} tokens, seconds of one thread for an epoch\n")
    print("| | block | forward and backward | OmniQuant's epoch | ratio |\n|---|---:|---:|---:|---:|")
    for name, scheme in SCHEMES.items():
        for block, (plain, learned) in enumerate(measured(scheme, args)):
            print(f"| {name} | {block} | {plain:.2f} | {learned:.2f} | {learned / plain:.2f} |", flush=True)


if __name__ == "__main__":
    main()
