"""The soak: its table, its judgement of memory, and a short one for real."""

from __future__ import annotations

import pytest

from tools.soak import GROWTH, Life, main, page, soak


def test_the_table_names_every_life_and_its_memory():
    lives = [Life(0, 40, 61.0, 1, [100.0] * 9 + [101.0]), Life(20, 80, 30.0, None, [])]
    text = page(lives, Life(0, 80, 50.0, None, [100.0] * 5 + [120.0] * 5), 80, " --seed 1")
    assert "| 1 | 0 to 40 | 61 | SIGKILL to rank 1 | 100 | 100 | 1.002 |" in text
    assert "| undisturbed | 0 to 80 | 50 | its end | 100 | 120 | 1.200 |" in text
    assert "1 kills in 1.5 minutes, 80 steps" in text and "`python tools/soak.py --seed 1`" in text
    assert lives[0].growth < GROWTH < 1.2 and lives[1].growth == 1.0


def test_impossible_times_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--least", "90", "--most", "60"])
    assert "--most at least --least" in capsys.readouterr().err


@pytest.mark.full
def test_a_short_soak_ends_as_if_nothing_had_happened(tmp_path):
    lives, whole, stop = soak(tmp_path, minutes=1, seed=1, least=20, most=40)
    assert [life.victim is None for life in lives] == [False] * (len(lives) - 1) + [True] and len(lives) >= 2
    assert lives[-1].last == whole.last == stop
