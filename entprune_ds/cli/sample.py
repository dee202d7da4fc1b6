"""`entprune-ds sample`: draw samples of an exported model as a PNG folder or an npz, with a grid beside it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from entprune_ds.cli.common import help_text, launched_words, leave, refuse, split_shortcuts, wants_help, with_run
from entprune_ds.config import Config, ConfigError, PruneConfig, SoftConfig, load_config, problems_of
from entprune_ds.launcher import launch_problems
from entprune_ds.plain_json import parse_json

if TYPE_CHECKING:
    from entprune_ds.cli.drawing import Drawer
    from entprune_ds.evaluation.parts import Parts

HELP = """\
Draw samples of an exported model: a folder of PNG files with labels.csv, or one .npz in the form of ADM's evaluator
(arr_0 uint8 NHWC, and arr_1 labels); a grid OUT_grid.png; and OUT_protocol.json, everything that the samples depend on.

  entprune-ds sample run=runs/demo                                  settings and model of a run
  entprune-ds sample weights=demo_model out=samples.npz sample.num_samples=1000 sample.cfg_scale=1.5
  deepspeed --num_gpus 8 --module entprune_ds.cli.sample weights=... out=samples.npz sample.num_samples=50000
  torchrun --nproc_per_node 8 -m entprune_ds.cli.sample ...         out must lie where all nodes see it

Every image has its own noise and label, by its index: neither the number of ranks nor a kill changes what is drawn.
While they draw, the ranks keep what is finished in OUT.parts, sample.batch_size images a file; the same command again
goes on from there, and refuses a folder begun with other settings.
"""
SECTIONS = ["sample"]


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 1 failed on the way, 2 refused."""
    words, _ = launched_words(argv)
    if wants_help(words):
        print(help_text(HELP, SECTIONS))
        return 0
    try:
        words, folder = with_run(split_shortcuts(words, {"out": "sample.out", "weights": "model.weights"}), "sample")
        config = load_config(words, check=_problems)
        out = Path(config.sample.out or (folder / "samples" / "final.npz" if folder else "samples.npz"))
        check_output(out)
    except ConfigError as error:
        return refuse(error.problems)
    except (ValueError, OSError) as error:
        return refuse([str(error)])
    from entprune_ds.cli.launched import run_launched

    return run_launched(lambda: sample(config, out), config.run.timeout_seconds)


def sample(config: Config, out: Path) -> None:
    """Draw what is missing, put it in its place and say so. All ranks call.

    Raises:
        ValueError: when the weights cannot be read, or `out` holds other samples.
        comm.DistributedError: on all ranks, when one of them cannot go on.
    """
    from entprune_ds import comm
    from entprune_ds.cli.drawing import open_drawer
    from entprune_ds.evaluation import parts as store
    from entprune_ds.evaluation.images import save_grid

    drawer = open_drawer(config, Path(config.model.weights))
    shown = f"{len(drawer.labels)} samples of depth {drawer.protocol['depth']}: {out}, {grid_path(out)}"
    if finished(out, drawer.protocol):
        if comm.is_main():
            shutil.rmtree(parts_folder(out), ignore_errors=True)  # a kill came just before
            print(f"{shown} (drawn before)")
        return
    with drawn(config, drawer, parts_folder(out)) as parts:
        if out.suffix != ".npz":
            store.write_pictures(parts)
        comm.barrier()
        comm.shutdown()  # what is left is rank 0's work, and nobody waits for it
        if not comm.is_main():
            return
        for rest in out.parent.glob(f".{out.name}.*.tmp"):  # of a job that was killed here
            rest.unlink()
        labels, protocol = drawer.labels.numpy(), json.dumps(drawer.protocol, indent=2)
        if parts.image_shape[2] in (1, 3):
            save_grid(parts.take(by_class(labels)[: config.sample.grid].tolist()), grid_path(out))
        if out.suffix == ".npz":
            protocol_path(out).unlink(missing_ok=True)  # of other samples, which it would name these
            store.finish_npz(parts, labels, out)
            store.finish_text(protocol_path(out), protocol)  # last: an npz of other samples may lie there until now
        else:
            store.finish_text(protocol_path(out), protocol)  # first: a folder without it would be refused
            store.finish_folder(parts, labels, out)
        store.remove(parts)
    print(shown)


@contextmanager
def drawn(config: Config, drawer: Drawer, folder: Path) -> Iterator[Parts]:
    """All parts of a set of samples, drawn by all ranks together or found in the folder, which is locked. Collective.

    Raises:
        comm.DistributedError: on all ranks, when the folder is in use or was begun with other settings.
        comm.RankError: when this rank cannot draw or write.
    """
    from entprune_ds import comm
    from entprune_ds.evaluation.parts import Parts, begin, draw_missing
    from entprune_ds.faults import locked_by_job, watched
    from entprune_ds.logs import progress

    parts = Parts(folder, len(drawer.labels), config.sample.batch_size)
    remedy = f"What is finished stays in {folder}: the same command goes on."
    watch = watched(config.run.timeout_seconds, folder, remedy)
    with locked_by_job([folder], "`out`"):
        problems = begin(parts, drawer.protocol) if comm.is_main() else []
        comm.raise_together("\n".join(problems) or None)
        todo = comm.broadcast_json(parts.missing())
        done = parts.count - sum(len(parts.ranges[part]) for part in todo)
        with progress("sample", total=parts.count, done=done) as line:
            try:
                with watch if comm.world_size() > 1 else contextlib.nullcontext():  # a rank alone waits for nobody
                    draw_missing(parts, todo, drawer.draw, line.update)
            except (OSError, ValueError) as error:
                raise comm.RankError(f"{error} What is finished stays in {folder}.") from error
        yield parts


def finished(out: Path, protocol: dict[str, Any]) -> bool:
    """Whether `out` holds these samples already. An npz of other ones is replaced, a folder is not.

    Raises:
        ValueError: a folder of other samples, naming what differs.
    """
    from entprune_ds.evaluation.parts import differing

    there = out.is_file() or (out.is_dir() and any(out.iterdir()))
    if not there:
        return False
    try:
        before = parse_json(protocol_path(out).read_text())
    except (OSError, ValueError):
        before = {}
    other = differing(protocol, before if isinstance(before, dict) else {}, out)
    if other and out.is_dir():
        raise ValueError("\n".join([*other, f"`out`: {out} holds other samples. Choose another folder, or remove it."]))
    return not other


def parts_folder(out: Path) -> Path:
    """Where the parts of an output lie until it is whole."""
    return out.with_name(f"{out.name}.parts")


def _problems(config: Config) -> list[str]:
    found = launch_problems()
    if not config.model.weights:
        missing = "`model.weights` is missing: give an exported model, weights=DIR or run=RUNS/NAME."
        return [*found, *problems_of(config), missing]
    return found + sampling_problems(config, Path(config.model.weights))


def sampling_problems(config: Config, weights: Path, key: str = "model.weights") -> list[str]:
    """Problems of sampling an export, which the setting `key` names: its architecture counts, not the settings'."""
    from entprune_ds.interop.weights import diffusion_problems, open_weights

    try:
        source = open_weights(weights, assumed=config.model)
    except ValueError as error:
        return [*problems_of(config), f"`{key}`: {error}"]
    model = source.model
    found = problems_of(replace(config, model=model, prune=PruneConfig(), soft=SoftConfig()))
    found += diffusion_problems(config.diffusion, source, weights)
    if model.in_channels not in (1, 3) and not config.sample.vae:
        message = f"`sample.vae` is missing: {weights} makes latents of {model.in_channels} channels, not images. "
        found.append(message + "Give the VAE that they were encoded with, e.g. sample.vae=stabilityai/sd-vae-ft-ema.")
    return found


def check_output(out: Path) -> None:
    """Refuse what cannot be written before hours are spent on it.

    Raises:
        ValueError: a file that is no .npz, a folder with other files in it, or a parent that is a file.
    """
    blocked = next((parent for parent in out.parents if parent.exists() and not parent.is_dir()), None)
    if blocked is not None:
        raise ValueError(f"`out`: {blocked} is a file, so {out} cannot be written. Choose another `out`.")
    samples = out.is_dir() and (protocol_path(out).is_file() or not any(out.iterdir()))
    if out.suffix != ".npz" and out.exists() and not samples:
        raise ValueError(f"`out`: {out} exists already. Empty it, or choose another folder (or a path in .npz).")


def grid_path(out: Path) -> Path:
    """Where the PNG grid of an output lies."""
    return out.with_name(f"{_base(out)}_grid.png")


def protocol_path(out: Path) -> Path:
    """Where the protocol of an output lies."""
    return out.with_name(f"{_base(out)}_protocol.json")


def _base(out: Path) -> str:
    """The name of an output, of an npz without its ending; that of a folder may have a point in it (cfg1.5)."""
    return out.stem if out.suffix == ".npz" else out.name


def by_class(labels: np.ndarray) -> np.ndarray:
    """Indices that go through the classes in turn: first of each class, second of each class, ..."""
    turn = np.zeros(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        turn[labels == label] = np.arange((labels == label).sum())
    return np.lexsort((labels, turn))


if __name__ == "__main__":
    leave(main())
