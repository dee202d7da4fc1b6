"""Shell functions of slurm/env.sh by themselves: what a rank's shell does with signals, and without a controller."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ranks import ROOT
from tests.test_slurm import executable

ENV = ROOT / "slurm" / "env.sh"
RANK = f"""
script=x root={ROOT}
source {ENV}
exec bash -c "$(declare -f rank wait_for)"'; rank "$@"' rank 1 module
"""
LISTENS = f"""#!/bin/bash
touch "$PLACE/started"
sleep 0.5  # what comes now must not kill it
exec {sys.executable} -c '
import os, pathlib, signal, sys, time
def leave(number, frame):
    print("heard", number, flush=True)
    time.sleep(0.3)
    print("saved", flush=True)
    sys.exit(85)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, leave)
pathlib.Path(os.environ["PLACE"], "ready").touch()
time.sleep(60)
'
"""


def rank_shell(folder: Path, rank: int, program: str) -> subprocess.Popen:
    """The shell of a rank, in which `program` stands for Python."""
    given = {
        "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "2",
        "SLURMD_NODENAME": "n7", "ENTPRUNE_RANK_LOGS": str(folder / "logs"), "STOPPED": "85", "PLACE": str(folder),
        "ENTPRUNE_PYTHON": executable(folder / "python", program),
    }  # fmt: skip
    return subprocess.Popen(["bash", "-c", RANK], env=os.environ | given, stdout=subprocess.PIPE, text=True)


def there(path: Path) -> None:
    """Wait for a file."""
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_shell_of_a_rank_alone_reaches_its_python(tmp_path, rank, number):
    """Slurm with cgroups signals the shell and nothing below it."""
    process = rank_shell(tmp_path, rank, LISTENS)
    there(tmp_path / "started")
    process.send_signal(signal.SIGUSR1)  # too early: nobody listens, and nobody dies of it
    there(tmp_path / "ready")
    process.send_signal(number)
    shown = process.communicate(timeout=60)[0]
    log = (tmp_path / "logs" / f"rank_{rank}.log").read_text()
    assert process.returncode == 0  # or --kill-on-bad-exit would end the others
    assert f"heard {int(number)}\nsaved\n" in log and ("saved" in shown) is (rank == 0)
    assert (tmp_path / "logs" / "ended").read_text() == f"85 {rank} n7\n"


def test_the_status_and_the_last_lines_of_a_rank_that_crashes(tmp_path):
    process = rank_shell(tmp_path, 0, "#!/bin/bash\nseq 20000\necho the end >&2\ntouch $PLACE/over\nexit 7\n")
    there(tmp_path / "over")
    time.sleep(0.5)
    assert process.poll() is None  # nobody has read what rank 0 said, more than a pipe holds
    shown = process.communicate(timeout=60)[0]
    assert process.returncode == 7 and shown.endswith("20000\nthe end\n")
    assert (tmp_path / "logs" / "rank_0.log").read_text().endswith("20000\nthe end\n")
    assert (tmp_path / "logs" / "ended").read_text() == "7 0 n7\n"


@pytest.mark.parametrize(("answer", "said"), [("exit 1", "0"), ("echo EndTime=Unknown", "0")])
def test_a_controller_that_does_not_answer_sets_no_limit_to_saving(tmp_path, answer, said):
    executable(tmp_path / "scontrol", f"#!/bin/bash\n{answer}\n")
    command = f"script=x root={ROOT} SLURM_JOB_ID=1; source {ENV}; seconds_to_save"
    place = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert subprocess.check_output(["bash", "-c", command], env=os.environ | place, text=True).strip() == said


def test_site_sh_may_use_variables_that_nobody_has_set(tmp_path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "site.sh").write_text('MODULES="$NOBODY_HAS_SET_THIS:/opt"\n')
    command = f'script=x root={tmp_path}; source {ENV}; echo "$MODULES"; echo "$NOBODY_HAS_SET_THIS"'
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.stdout == ":/opt\n" and result.returncode != 0  # our own scripts may not
