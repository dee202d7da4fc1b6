"""The rows of docs/FAULTS.md, each with real processes: what is hit, found out, mended, and lost (nothing)."""

from __future__ import annotations

import pytest

from tools.fault_rows import Bench, Row
from tools.fault_table import HEAD, ROWS, line, main, table
from tools.trials import Unavailable


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    """One undisturbed run for all rows."""
    return Bench(tmp_path_factory.mktemp("faults"))


@pytest.mark.full
@pytest.mark.parametrize("name", ROWS)
def test_a_fault_costs_nothing_but_time(bench, name):
    try:
        row = ROWS[name](bench)
    except Unavailable as problem:
        pytest.skip(str(problem))
    assert 0 <= row.repeated <= 27 and row.sent and row.then
    assert row.detect is None or row.detect < 120


def test_the_table_has_a_cell_for_every_column():
    cells = [line("a", Row("kill", None, 12.34, 3, "resumes")), line("b", Row("stop", 10.0, None, 0, "goes on"))]
    assert table(cells).splitlines()[2] == "| a | kill | at once | 12.3 | nothing; 3 steps repeated | resumes |"
    assert all(len(row) == len(HEAD) for row in cells) and cells[1][2:4] == ["10.0", "goes on"]


def test_an_unknown_row_is_an_error_that_lists_the_known_ones(capsys):
    assert main(["the moon is full"]) == 2
    assert "no row 'the moon is full'. There are: a rank is killed, " in capsys.readouterr().err
