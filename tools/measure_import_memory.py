"""Peak memory of import and export, each in its own process: resident memory above that after the imports.

    python tools/measure_import_memory.py --model DiT-XL/2 --json

Makes a random official .pt of that size in a temporary folder (DiT-XL/2 takes 2.7 GB, and the exports as much again
each), then imports it and exports the result. Mapped file pages count as resident, though the system can drop them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PHASES = {"import": "official.pt", "export_official": "ours", "export_diffusers": "ours"}
"""Phase: what it reads."""


def main() -> None:
    """Measure all phases and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiT-S/2", help="published size, e.g. DiT-XL/2 or SiT-XL/2")
    parser.add_argument("--folder", help="where the files go for the time of the measurement (default: temporary)")
    parser.add_argument("--json", action="store_true", help="one JSON line instead of a table")
    parser.add_argument("--phase", choices=["make", *PHASES], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.phase:
        print(json.dumps(run_phase(given.phase, given.model, Path(given.folder))))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        child("make", given.model, folder)
        result: dict[str, Any] = {"model": given.model} | {p: child(p, given.model, folder) for p in PHASES}
    result["ratio"] = max(result[phase]["ratio"] for phase in PHASES)
    if given.json:
        print(json.dumps(result))
        return
    for phase in PHASES:
        r = result[phase]
        print(
            f"{phase:16} file {r['file_bytes'] / 2**20:8.1f} MiB   peak {r['peak_bytes'] / 2**20:8.1f} MiB above ",
            end="",
        )
        print(f"{r['baseline_bytes'] / 2**20:.1f} MiB   ratio {r['ratio']:.3f}   {r['seconds']:.1f} s")


def child(phase: str, model: str, folder: str) -> dict[str, Any]:
    """Run one phase in a fresh process."""
    command = [sys.executable, __file__, "--phase", phase, "--model", model, "--folder", folder]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def run_phase(phase: str, name: str, folder: Path) -> dict[str, Any]:
    """One phase in this process."""
    import torch

    from entprune_ds.export import import_model, write_model
    from entprune_ds.interop.tensors import parameter_shapes
    from entprune_ds.interop.weights import open_weights
    from entprune_ds.models.registry import model_config

    config = model_config(name)
    if phase == "make":
        make(folder / "official.pt", config)
        return {}
    parameter_shapes(model_config("DiT-S/8", depth=1))  # torch loads what the meta device needs at its first use
    torch.ones(64, 64) @ torch.ones(64, 64)  # and its matrix library
    read = folder / PHASES[phase]
    file_bytes = (read / "model.safetensors" if read.is_dir() else read).stat().st_size
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    baseline, start = memory("VmRSS"), time.perf_counter()
    if phase == "import":
        import_model(read, folder / "ours", given={"process": config.process})
    else:
        form = phase.removeprefix("export_")
        write_model(open_weights(read), folder / ("official_out.pt" if form == "official" else "out"), form)
    peak = memory("VmHWM") - baseline
    seconds = time.perf_counter() - start
    return {
        "file_bytes": file_bytes, "baseline_bytes": baseline, "peak_bytes": peak, "ratio": peak / file_bytes,
        "seconds": seconds,
    }  # fmt: skip


def make(path: Path, config: Any) -> None:
    """A random official state dict."""
    import torch

    from entprune_ds.interop.official import official_shapes
    from entprune_ds.models.layers import position_embedding

    generator = torch.Generator().manual_seed(0)
    state = {n: torch.empty(s).uniform_(-0.05, 0.05, generator=generator) for n, s in official_shapes(config).items()}
    state["pos_embed"] = position_embedding(config.hidden_size, config.input_size // config.patch_size)
    torch.save(state, path)


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS now, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
