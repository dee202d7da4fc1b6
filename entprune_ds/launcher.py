"""What has started this rank: the launcher above it, and whether the numbers that it has set make sense.

When a launcher is killed alone, its ranks would train on as orphans, holding their GPUs.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil

WORDS = ("deepspeed.launcher", "bin/deepspeed", "torchrun", "torch.distributed.run", "torch.distributed.launch")
"""What the command line of a launcher of deepspeed or torch contains."""


def launchers() -> list[psutil.Process]:
    """The launcher processes above this one, nearest first.

    A shell (or ssh) above them may go (nohup) and is not among them, also where its script names a launcher.
    """
    found: list[psutil.Process] = []
    for process in psutil.Process().parents():
        try:
            words = process.cmdline()
        except psutil.Error:
            break
        shell = Path(words[0]).name.endswith("sh") if words else True
        if shell or not any(word in part for part in words[:5] for word in WORDS):
            break
        found.append(process)
    return found


def first_gone(processes: list[psutil.Process]) -> psutil.Process | None:
    """The first of some processes that has ended, or None."""
    return next((p for p in processes if not _alive(p)), None)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


ALLOW_SSH = "ENTPRUNE_ALLOW_SSH"
"""Set to 1, deepspeed may start ranks with pdsh or ssh under Slurm; it exports what ~/.deepspeed_env says."""
REMEDY = "Start it with: sbatch slurm/prune_xl.sh key=value ..."


def launch_problems() -> list[str]:
    """What is wrong with the way in which this rank was started; known before any process group is there."""
    if found := _number_problems():
        return found
    if "RANK" in os.environ:
        return _past_slurm()
    if "SLURM_PROCID" in os.environ and (tasks := _tasks("SLURM_STEP_NUM_TASKS")) > 1:
        text = f"srun has started {tasks} tasks, but `RANK` is missing: each of them would work alone, in one folder. "
        return [text + REMEDY]
    if (tasks := _tasks("OMPI_COMM_WORLD_SIZE")) > 1:
        text = f"mpirun has started {tasks} processes, but `RANK` is missing: MPI is not used here, so each of them "
        text += "would work alone. Use deepspeed without --launcher openmpi, or torchrun. Under Slurm: "
        return [text + REMEDY]
    return []


def _tasks(variable: str) -> int:
    value = os.environ.get(variable, "")
    return int(value) if value.isdecimal() else 0


def _number_problems() -> list[str]:
    found = []
    for name, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        here, count = os.environ.get(name, "0"), os.environ.get(size)
        for key, value in ((name, here), (size, count)):
            if value is not None and not value.isdecimal():
                found.append(f"`{key}` is {value!r}; a launcher sets it to a whole number. Unset it, or use one.")
        if not found and count is not None and int(here) >= int(count):
            text = f"`{name}` is {here}, but `{size}` is {count}: they come from different launchers. "
            found.append(text + "Unset both, or let one launcher set both.")
    if "RANK" in os.environ and _tasks("WORLD_SIZE") > 1:
        missing = [f"`{key}`" for key in ("MASTER_ADDR", "MASTER_PORT") if key not in os.environ]
        if missing:
            text = f"{' and '.join(missing)} missing, though `WORLD_SIZE` is {os.environ['WORLD_SIZE']}. "
            found.append(text + "Use a launcher (deepspeed, torchrun), or sbatch slurm/prune_xl.sh.")
    return found


def _past_slurm() -> list[str]:
    """Whether deepspeed has started this rank through pdsh or ssh under Slurm: only its inner launcher is above."""
    above = launchers()
    remote = bool(above) and "deepspeed.launcher.launch" in above[-1].cmdline()
    if not remote or "SLURM_STEP_ID" in os.environ or os.environ.get(ALLOW_SSH) == "1" or not _under_slurm():
        return []
    text = (
        "deepspeed has started this rank with pdsh or ssh, past Slurm, to which the node belongs. Slurm would neither "
    )
    text += (
        "end it with a job nor give it a job's GPUs and limits; and a remote shell expands words such as {0000..1023}. "
    )
    text += REMEDY + " Or run one launcher per node: srun --ntasks-per-node=1 deepspeed --no_ssh ... "
    return [text + f"Where it is meant, write {ALLOW_SSH}=1 into ~/.deepspeed_env."]


def _under_slurm() -> bool:
    """Whether Slurm has to do with this process: with its job, which it may not know of, or with its node."""
    group = Path("/proc/self/cgroup")
    if "SLURM_JOB_ID" in os.environ or (group.is_file() and "slurm" in group.read_text()):
        return True
    return any(p.info["name"] == "slurmd" for p in psutil.process_iter(["name"]))  # ssh tells nothing of a job
