"""How launched commands end: with their exit status, whatever the destructors of their libraries do."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.ranks import ROOT

ABORTING = """
import atexit, os, sys
from entprune_ds.cli.common import leave

class Group:
    def __del__(self):
        os.abort()

kept = Group()
atexit.register(print, "exit handlers have run")
print("done")
"""


@pytest.mark.parametrize("end, status", [("leave(3)", 3), ("sys.exit(3)", -6)])
def test_destructors_do_not_change_the_exit_status(end, status):
    done = subprocess.run([sys.executable, "-c", ABORTING + end], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    assert "done\nexit handlers have run\n" in done.stdout or status < 0


@pytest.mark.parametrize("command", ["cli.train", "cli.encode", "cli.main"])
def test_commands_that_join_a_process_group_leave_without_destructors(command):
    source = (ROOT / "entprune_ds" / f"{command.replace('.', '/')}.py").read_text()
    assert ("    leave(main())\n" in source or "    leave(status)\n" in source) and "sys.exit(main())" not in source


def test_a_reader_that_has_seen_enough_gets_no_traceback():
    """As `entprune-ds score --help | head -2` ends: the help is longer than a pipe holds."""
    command = [sys.executable, "-u", "-c", "import sys; from entprune_ds.cli import main as m; "
               "m.main = lambda: [print('x' * 999) for _ in range(999)]; m.run()"]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == 1 and "Traceback" not in said
