"""Training and sampling speed of DiT and SiT on one device, against a plain PyTorch loop with what makes one fast.

Training: our engine (DeepSpeed, one rank, our draws, our EMA) against a loop with autocast, latents and noise on the
device, torch.compile, fused AdamW and foreach EMA, in turn, on the same model, batch and data. Sampling: guided Euler
or DDIM steps at several depths, plain, compiled, and compiled with CUDA graphs. --json prints one line.

  python tools/bench_train.py --markdown docs/BENCH_GPU.md                              on a GPU
  python tools/bench_train.py --size S --depths 4 2 --batch 4 --steps 2 --repeats 3     small, on a CPU
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from entprune_ds import comm
from entprune_ds.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    ParallelConfig,
    SampleConfig,
    TrainConfig,
)
from entprune_ds.diffusion.ddpm import NUM_TIMESTEPS, noised
from entprune_ds.diffusion.interpolant import PATHS
from entprune_ds.diffusion.objective import build_objective
from entprune_ds.diffusion.sampling import build_sampler
from entprune_ds.engine.build import build_engine, destroy_engine, initialize_fresh
from entprune_ds.engine.train_step import train_step
from entprune_ds.models.dit import DiT, initialize
from entprune_ds.models.registry import SIZES, count_macs, count_parameters, model_config


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], object], steps: int) -> float:
    """Seconds of one call, over several in a row."""
    synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        call()
    synchronize()
    return (time.perf_counter() - start) / steps


def ours(model: ModelConfig, options: argparse.Namespace) -> tuple[Callable[[], object], Callable[[], None]]:
    """One optimizer step as the trainer does it, draws and EMA included; and what releases the engine."""
    precision = "bf16" if options.bf16 else "fp32"
    config = Config(
        model=model, data=DataConfig(num_readers=1), train=TrainConfig(global_batch_size=options.batch, grad_clip=1.0),
        parallel=ParallelConfig(ds_config=f"zero1_{precision}"),
    )  # fmt: skip
    engine = build_engine(config, model)
    initialize_fresh(engine, seed=0)
    objective, (latents, labels) = build_objective(model, DiffusionConfig()), data(model, options)
    step = 0

    def call() -> None:
        nonlocal step
        draws = objective.make_draws(
            latents, labels, range(options.batch), seed=0, purpose="train", step=step, label_dropout=0.1,
            null_label=model.num_classes,
        )  # fmt: skip
        train_step(engine, [draws], objective.loss)
        engine.update_ema(0.9999)
        step += 1

    return call, lambda: destroy_engine(engine)


def data(model: ModelConfig, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """A batch of random latents (N,C,H,W) and labels (N,), kept in memory."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(options.batch, model.in_channels, model.input_size, model.input_size, generator=generator)
    return latents, torch.randint(model.num_classes, (options.batch,), generator=generator)


def plain(config: ModelConfig, options: argparse.Namespace) -> Callable[[], object]:
    """One optimizer step of the plain loop: everything on the device, compiled, fused."""
    device = comm.device()
    model = initialize(DiT(config), seed=0).to(device)
    ema = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=device.type == "cuda")
    objective = build_objective(config, DiffusionConfig())
    latents, labels = (column.to(device) for column in data(config, options))
    run = torch.compile(model) if options.compile else model

    def call() -> None:
        z_t, t, target = draws_on_device(config, latents)
        dropped = torch.rand(len(labels), device=device) < 0.1
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            prediction = run(z_t, t, torch.where(dropped, config.num_classes, labels))
        loss = objective.loss(prediction, target, t).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        torch._foreach_lerp_(ema, list(model.parameters()), 1e-4)

    return call


def draws_on_device(config: ModelConfig, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z_t, t and target with torch's own generator of the device."""
    noise = torch.randn_like(latents)
    if config.process == "dit":
        t = torch.randint(NUM_TIMESTEPS, (len(latents),), device=latents.device)
        return noised(latents, noise, t), t.float(), torch.cat([noise, latents], dim=1)
    t = torch.rand(len(latents), device=latents.device)
    z_t, velocity = PATHS["linear"].mix(latents, noise, t)
    return z_t, t, velocity


def training(model: ModelConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Images a second of both loops in turn, their ratio, and the model FLOPs utilisation."""
    ours_step, close = ours(model, options)
    steps = {"ours": ours_step, "plain": plain(model, options)}
    for call in steps.values():
        seconds_of(call, 3)  # compilation, allocator
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.repeats):
        for name, call in steps.items():
            seconds[name].append(seconds_of(call, options.steps))
    close()
    rate = {name: options.batch / statistics.median(values) for name, values in seconds.items()}
    flops = 3 * 2 * count_macs(model)  # forward and backward of one image; an MAC is two operations
    peak = options.peak_tflops * 1e12
    return {
        "images_per_second": rate, "ratio": rate["ours"] / rate["plain"],
        "mfu": {name: flops * r / peak for name, r in rate.items()} if peak else None,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
    }  # fmt: skip


def sampling(model: ModelConfig, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Guided images a second by depth and mode, for `sample_steps` steps."""
    sample = SampleConfig(
        sampler="ddim" if model.process == "dit" else "euler", num_steps=options.sample_steps, cfg_scale=1.5,
        cfg_channels=min(3, model.in_channels),
    )  # fmt: skip
    draw, device = build_sampler(model, DiffusionConfig(), sample), comm.device()
    latents, labels = (column.to(device) for column in data(model, options))
    rates: dict[str, dict[str, float]] = {}
    for depth in options.depths:
        net = initialize(DiT(replace(model, kept_blocks=tuple(range(depth)))), seed=0).to(device).eval()
        modes: dict[str, Callable] = {"eager": net}
        if options.compile:
            modes["compiled"] = torch.compile(net)
            if device.type == "cuda":
                modes["CUDA graphs"] = torch.compile(net, mode="reduce-overhead")
        rates[str(depth)] = {}
        for mode, run in modes.items():

            def call(run: Callable = run) -> Tensor:
                with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
                    return draw(lambda *inputs: run(*inputs).clone(), latents, labels, lambda step: latents)

            call()
            seconds = statistics.median(seconds_of(call, 1) for _ in range(options.repeats))
            rates[str(depth)][mode] = options.batch / seconds
        torch._dynamo.reset()
    return rates


def markdown(figures: dict[str, Any]) -> str:
    """The figures as two tables."""
    protocol = figures["protocol"]
    what = f"{protocol['device']}, torch {protocol['torch']}, batch {protocol['batch']}, "
    what += f"{'bf16' if protocol['bf16'] else 'fp32'}, medians of {protocol['repeats']} interleaved repeats."
    lines = ["# Speed on one device", "", f"`python tools/bench_train.py`: {what}", ""]
    lines += [
        "| training | ours, images/s | plain, images/s | ratio | MFU ours | MFU plain |",
        "|---|---|---|---|---|---|",
    ]
    for name, values in figures["training"].items():
        rate, mfu = values["images_per_second"], values["mfu"]
        cells = [f"{rate['ours']:.2f}", f"{rate['plain']:.2f}", f"{values['ratio']:.3f}"]
        cells += [f"{mfu[k]:.3f}" if mfu else "-" for k in ("ours", "plain")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    modes = ["eager", "compiled", "CUDA graphs"]
    lines += ["", f"Sampling, {protocol['sample_steps']} guided steps, images/s:", ""]
    lines += ["| model | depth | " + " | ".join(modes) + " |", "|---|---|" + "---|" * len(modes)]
    for name, depths in figures["sampling"].items():
        for depth, rates in depths.items():
            cells = [f"{rates[m]:.2f}" if m in rates else "-" for m in modes]
            lines.append(f"| {name} | {depth} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure both families and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="XL", choices=list(SIZES), help="published size, patch 2, 256 tokens")
    parser.add_argument("--batch", type=int, default=64, help="images a step")
    parser.add_argument("--steps", type=int, default=10, help="steps of one measurement")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats; medians count")
    parser.add_argument("--depths", type=int, nargs="+", default=[28, 20, 14], help="depths; the first one is trained")
    parser.add_argument("--sample-steps", type=int, default=25, help="sampler steps")
    parser.add_argument("--peak-tflops", type=float, default=0, help="peak of the device in bf16, for MFU (H200: 989)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out everywhere")
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    parser.add_argument("--markdown", help="file for the tables")
    options = parser.parse_args()
    options.bf16 = torch.cuda.is_available()  # CPUs without bf16 units would measure emulation
    comm.init(timeout_seconds=600)
    figures: dict[str, Any] = {"training": {}, "sampling": {}}
    for family in ("DiT", "SiT"):
        model = model_config(f"{family}-{options.size}/2")
        model = replace(model, kept_blocks=tuple(range(options.depths[0])), compile=options.compile)
        name = f"{family}-{options.size}/2, depth {options.depths[0]}, {count_parameters(model) / 1e6:.0f} M"
        figures["training"][name] = training(model, options)
        figures["sampling"][f"{family}-{options.size}/2"] = sampling(replace(model, compile=False), options)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    figures["protocol"] = vars(options) | {"device": device, "torch": torch.__version__}
    if options.markdown:
        Path(options.markdown).write_text(markdown(figures))
    print(json.dumps(figures) if options.json else markdown(figures))
    comm.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
