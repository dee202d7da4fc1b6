"""Our block stack against the plain formulation of tests/reference/plain_blocks.py: same weights, one process, fp32.

Prints ratios of medians over interleaved repeats (above 1: ours is faster), the largest difference of the outputs, and
how far the time per forward pass is from proportional to depth at XL width. --json prints one line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from entprune_ds.models.layers import Block
from tests.reference.plain_blocks import PlainStack, random_values

BARS = {"forward_ratio": (">=", 0.97), "train_ratio": (">=", 0.97), "max_abs_difference": ("<=", 1e-5)}
BARS |= {"depth_proportionality": ("<=", 0.05)}


class OurStack(nn.Module):
    """The blocks as entprune_ds holds them: a ModuleDict keyed by original index."""

    def __init__(self, depth: int, width: int, heads: int):
        super().__init__()
        self.blocks = nn.ModuleDict({str(i): Block(width, heads, width // heads, 4 * width) for i in range(depth)})

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (N,T,D), c (N,D) -> (N,T,D)."""
        for block in self.blocks.values():
            x = block(x, c)
        return x


def interleaved(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each call, taken in turn, after one round to warm up."""
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 1):
        order = range(len(calls)) if turn % 2 else reversed(range(len(calls)))
        for index in order:
            start = time.perf_counter()
            calls[index]()
            seconds[index].append(time.perf_counter() - start)
    return [statistics.median(s[1:]) for s in seconds]


def forward(stack: nn.Module, x: Tensor, c: Tensor) -> Callable[[], object]:
    """A forward pass without gradients."""

    def call() -> object:
        with torch.no_grad():
            return stack(x, c)

    return call


def train(stack: nn.Module, x: Tensor, c: Tensor) -> Callable[[], object]:
    """A forward and a backward pass."""

    def call() -> object:
        stack.zero_grad(set_to_none=True)
        return stack(x, c).square().mean().backward()

    return call


def measure(options: argparse.Namespace) -> dict[str, object]:
    """All figures."""
    size = {"width": options.width, "heads": options.heads}
    ours, plain = OurStack(options.depth, **size), PlainStack(options.depth, **size)
    random_values(plain, seed=0)
    ours.load_state_dict(plain.state_dict(), strict=True)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(options.batch, options.tokens, options.width, generator=generator)
    c = torch.randn(options.batch, options.width, generator=generator)
    with torch.no_grad():
        difference = (ours(x, c) - plain(x, c)).abs().max().item()
    forward_ours, forward_plain = interleaved([forward(ours, x, c), forward(plain, x, c)], options.repeats)
    train_ours, train_plain = interleaved([train(ours, x, c), train(plain, x, c)], options.repeats)
    del ours, plain
    return {
        "forward_ratio": forward_plain / forward_ours, "train_ratio": train_plain / train_ours,
        "max_abs_difference": difference, **proportionality(options, x[:1], c[:1]),
        "protocol": vars(options) | {"threads": torch.get_num_threads(), "torch": torch.__version__},
    }  # fmt: skip


def proportionality(options: argparse.Namespace, x: Tensor, c: Tensor) -> dict[str, object]:
    """max over depths 19, 14 of |t_d / t_28 / (d / 28) - 1|; the shallower stacks are parts of the deepest."""
    depths = [28, 19, 14]
    stacks = [OurStack(0, options.width, options.heads) for _ in depths]
    width, heads = options.width, options.heads
    blocks = [random_values(Block(width, heads, width // heads, 4 * width), seed=i) for i in range(depths[0])]
    for stack, depth in zip(stacks, depths, strict=True):
        stack.blocks.update({str(i): block for i, block in enumerate(blocks[:depth])})
    seconds = interleaved([forward(stack, x, c) for stack in stacks], options.repeats)
    relative = {d: t / seconds[0] / (d / depths[0]) - 1 for d, t in zip(depths, seconds, strict=True)}
    worst = max(abs(value) for value in relative.values())
    return {"depth_proportionality": worst, "forward_seconds": dict(zip(map(str, depths), seconds, strict=True))}


def main() -> int:
    """Measure and print; status 1 when a figure misses its bar and --strict is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=4, help="blocks of the two stacks that are compared")
    parser.add_argument("--width", type=int, default=1152, help="hidden size (XL: 1152)")
    parser.add_argument("--heads", type=int, default=16, help="attention heads (XL: 16)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens (256 px, patch 2: 256)")
    parser.add_argument("--batch", type=int, default=2, help="examples a pass")
    parser.add_argument("--repeats", type=int, default=15, help="interleaved repeats; medians count")
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 when a figure misses its bar")
    options = parser.parse_args()
    figures = measure(options)
    missed = [n for n, (sign, bar) in BARS.items() if not (figures[n] >= bar if sign == ">=" else figures[n] <= bar)]
    if options.json:
        print(json.dumps(figures))
    else:
        for name, (sign, bar) in BARS.items():
            print(f"{'MISSED' if name in missed else 'ok':7}{name}: {figures[name]:.4g} ({sign} {bar:g})")
        print("forward seconds by depth:", {d: round(s, 4) for d, s in figures["forward_seconds"].items()})
    return int(options.strict and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
