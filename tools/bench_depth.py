"""At which depth is a forward pass 2.22x as fast as at full depth? Measured, many depths in turn, at XL width.

The EntPruner paper states up to 2.22x at 50 % of the blocks; half of the multiply-accumulates are 2.00x. All depths
share one model's blocks (the shallower ones are its first ones) and are timed interleaved; a speed-up is the median of
the ratios of neighbouring measurements. Printed: the speed-up of every depth, the deepest measured depth that reaches
the goal, its share of the full depth, and the depth of the digits base at that share. --json prints one line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from entprune_ds.config import ModelConfig
from entprune_ds.evaluation.latency import measure_latency, speedup, speedup_spread
from entprune_ds.models.dit import DiT

GOAL = 2.22


def shallow(model: DiT, depth: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The model with its first blocks only, around the same weights."""
    blocks = list(model.blocks.values())[:depth]

    def forward(z_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:  # (N,C,H,W), (N,), (N,) -> (N,C,H,W)
        x, c = model.embed(z_t, t, labels)
        for block in blocks:
            x = block(x, c)
        return model.head(x, c)

    return forward


def measure(options: argparse.Namespace) -> dict[str, object]:
    """All figures."""
    torch.manual_seed(0)
    config = ModelConfig(depth=options.depth, hidden_size=options.width, num_heads=options.heads)
    model = DiT(config).eval().requires_grad_(False)
    depths = sorted({options.depth, *options.depths}, reverse=True)
    models = {str(depth): shallow(model, depth) for depth in depths}
    shape, full = (config.in_channels, config.input_size, config.input_size), str(options.depth)
    measured = measure_latency(
        models, batch_sizes=[options.batch], shape=shape, num_classes=config.num_classes, repeats=options.repeats,
        device="cpu", warmup=1,
    )  # fmt: skip
    ratios = {d: speedup(measured, full, d)[options.batch] for d in models}
    reached = [int(d) for d, ratio in ratios.items() if ratio >= options.goal]
    depth = max(reached, default=None)
    share = None if depth is None else depth / options.depth
    return {
        "goal": options.goal, "depth": depth, "share": share,
        "digits_depth": None if share is None else round(share * options.digits_depth),
        "speedup_at_half": ratios.get(str(options.depth // 2)), "speedups": ratios,
        "quartiles": {d: list(speedup_spread(measured, full, d)[options.batch].values()) for d in models},
        "milliseconds": {d: m[options.batch]["median_ms"] for d, m in measured.items()},
        "protocol": vars(options) | {"threads": torch.get_num_threads(), "torch": torch.__version__},
    }  # fmt: skip


def main() -> int:
    """Measure and print; status 1 when no measured depth reaches the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=28, help="full depth (XL: 28)")
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 16, 15, 14, 13, 12, 11, 10], help="others")
    parser.add_argument("--width", type=int, default=1152, help="hidden size (XL: 1152)")
    parser.add_argument("--heads", type=int, default=16, help="attention heads (XL: 16)")
    parser.add_argument("--batch", type=int, default=1, help="examples a pass; 256 tokens each")
    parser.add_argument("--repeats", type=int, default=9, help="interleaved repeats; medians count")
    parser.add_argument("--goal", type=float, default=GOAL, help="speed-up over the full depth")
    parser.add_argument("--digits-depth", type=int, default=12, help="depth of the digits base")
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    options = parser.parse_args()
    figures = measure(options)
    if options.json:
        print(json.dumps(figures))
    else:
        for depth, ratio in figures["speedups"].items():
            low, high = figures["quartiles"][depth]
            milliseconds = figures["milliseconds"][depth]
            print(f"depth {depth:>3}: {milliseconds:8.1f} ms  {ratio:.2f}x  (quartiles {low:.2f} to {high:.2f})")
        if figures["depth"] is None:
            print(f"no measured depth reaches {options.goal}x")
        else:
            share, digits = figures["share"], figures["digits_depth"]
            print(f"{options.goal}x from depth {figures['depth']} on: {share:.2f} of the depth, digits base: {digits}")
    return int(figures["depth"] is None)


if __name__ == "__main__":
    sys.exit(main())
