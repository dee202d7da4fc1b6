"""prune.method: the defaults of a whole method, above the preset and below what is set beside it."""

from __future__ import annotations

import pytest

from entprune_ds.cli.common import help_text
from entprune_ds.config import METHODS, ConfigError, PruneConfig, load_config, to_yaml
from entprune_ds.config_checks_prune import CRITERIA
from entprune_ds.preflight import FREE_KEYS


def prune(*words: str) -> PruneConfig:
    return load_config(list(words), check=lambda config: []).prune


def test_a_method_is_above_the_preset_and_below_the_words(tmp_path):
    preset = tmp_path / "preset.yaml"
    preset.write_text("prune: {criterion: loss, num_checks: 7, vote_weights: [0, 0, 1], ntk_samples: 32}")
    plain = prune(f"preset={preset}")
    assert (plain.method, plain.criterion, plain.num_checks) == ("", "loss", 7)
    paper = prune("prune.method=entpruner", f"preset={preset}")
    assert (paper.criterion, paper.num_checks, paper.vote_weights) == ("ced", 4, (1, 1, 0))
    assert paper.ntk_samples == 32  # what the method does not speak of
    for words in (["prune.method=entpruner", "prune.num_checks=2"], ["prune.num_checks=2", "prune.method=entpruner"]):
        assert prune(f"preset={preset}", *words).num_checks == 2


def test_the_last_method_counts_alone():
    assert prune("prune.method=race", "prune.method=entpruner") == prune("prune.method=entpruner")
    assert prune("prune={method: race}").criterion == METHODS["race"]["prune"]["criterion"]
    assert prune("prune.method=race", "prune.method=") == PruneConfig()


def test_a_stored_run_keeps_what_was_set_beside_its_method(tmp_path):
    first = load_config(["prune.method=entpruner", "prune.num_checks=2"], check=lambda config: [])
    stored = tmp_path / "config.yaml"
    stored.write_text(to_yaml(first))
    assert load_config([f"preset={stored}"], check=lambda config: []) == first
    assert prune(f"preset={stored}", "prune.method=entpruner").num_checks == 4  # asked for again
    assert "prune.method" in FREE_KEYS  # a resume compares what it stands for


def test_a_preset_may_name_a_method_and_change_a_part_of_it(tmp_path):
    preset = tmp_path / "preset.yaml"
    preset.write_text("prune: {method: entpruner, num_checks: 6}")
    assert (prune(f"preset={preset}").num_checks, prune(f"preset={preset}").criterion) == (6, "ced")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_one_of_possible_settings(method):
    values = METHODS[method]
    if values["prune"]["criterion"] not in CRITERIA:
        pytest.skip(f"criterion {values['prune']['criterion']} is not there yet")
    config = load_config([f"prune.method={method}", "prune.target_depth=14", "train.num_steps=100000"])
    assert config.prune.method == method
    for section, settings in values.items():
        for key, value in settings.items():
            got = getattr(getattr(config, section), key)
            assert (list(got) if isinstance(got, tuple) else got) == value


def test_the_paper_faithful_method_is_that_of_the_paper():
    assert METHODS["entpruner"]["prune"] == {
        "criterion": "ced", "num_checks": 4, "max_blocks_per_check": None, "vote_weights": [1.0, 1.0, 0.0],
    }  # fmt: skip


@pytest.mark.parametrize("preset", ["digits_prune", "dit_xl2_256", "sit_xl2_256"])
def test_the_paper_faithful_method_is_one_key_away_from_a_preset(preset):
    assert prune(f"preset={preset}").criterion == "diff_pruning"
    paper = prune(f"preset={preset}", "prune.method=entpruner")
    assert (paper.criterion, paper.num_checks, paper.vote_weights) == ("ced", 4, (1, 1, 0))


def test_an_unknown_method_is_refused_and_help_lists_what_each_stands_for():
    with pytest.raises(ConfigError, match=r"`prune.method` must be empty or one of entpruner, .*, got magic"):
        load_config(["prune.method=magic"])
    text = help_text("", ["prune"])
    assert "entpruner: prune.criterion=ced prune.num_checks=4" in text
    assert all(f"  {name}: " in text for name in METHODS)
