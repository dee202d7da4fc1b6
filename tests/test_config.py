"""Settings: merged in order, every problem at once, nothing read from the environment, only ConfigError raised."""

from __future__ import annotations

import dataclasses
import math

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entprune_ds import config_schema
from entprune_ds.cli.common import _field_docs, help_text
from entprune_ds.config import (
    PRESETS,
    Config,
    ConfigError,
    config_from_dict,
    digest,
    load_config,
    problems_of,
    to_dict,
    to_yaml,
)
from entprune_ds.config_schema import DataConfig, ModelConfig, PruneConfig, RunConfig, TrainConfig

QUICK = dict(deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
SECTIONS = [f.name for f in dataclasses.fields(Config)]
KEYS = [f"{s}.{f.name}" for s in SECTIONS for f in dataclasses.fields(getattr(Config(), s))]


def problems(*words: str) -> list[str]:
    """Problems that a command line has; empty when it is accepted."""
    try:
        load_config(list(words))
    except ConfigError as error:
        assert error.problems and str(error) == "\n".join(error.problems)
        return error.problems
    return []


# ---------------------------------------------------------------- merging


def test_no_words_give_the_defaults():
    assert load_config([]) == Config()


def test_presets_overrule_defaults_and_words_overrule_presets():
    preset = yaml.safe_load((PRESETS / "digits.yaml").read_text())
    config = load_config(["preset=digits", "train.num_steps=7"])
    assert config.model.depth == preset["model"]["depth"] != Config().model.depth
    assert config.train.ema_decay == preset["train"]["ema_decay"] != Config().train.ema_decay
    assert config.train.num_steps == 7 != preset["train"]["num_steps"]
    assert config.train.weight_decay == Config().train.weight_decay and "weight_decay" not in preset["train"]


def test_a_preset_comes_first_wherever_it_stands_and_later_words_win():
    config = load_config(["train.num_steps=7", "preset=digits", "train.num_steps=9", "run.seed=3"])
    assert (config.train.num_steps, config.run.seed, config.model.depth) == (9, 3, 8)


def test_a_preset_may_be_a_file_and_a_group_may_be_set_whole(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("run: {name: mine}\ntrain: {num_steps: 5, betas: [0.5, 0.6]}\n")
    config = load_config([f"preset={path}", "train={learning_rate: 0.25}"])
    assert config.run.name == "mine"
    assert config.train == dataclasses.replace(TrainConfig(), num_steps=5, betas=(0.5, 0.6), learning_rate=0.25)


def test_values_become_the_types_of_the_fields():
    config = load_config(
        [
            "train.learning_rate=1",
            "model.kept_blocks=[0,2]",
            "run.name=12",
            "prune.end_step=null",
            "monitor.wandb=false",
        ]
    )
    assert config.train.learning_rate == 1.0 and type(config.train.learning_rate) is float
    assert config.model.kept_blocks == (0, 2) and config.model.blocks == (0, 2)
    assert config.run.name == "12" and config.prune.end_step is None and config.monitor.wandb is False


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "1.e-3", ".1e-2", "0.001", "+1e-3"])
def test_numbers_may_be_written_in_any_usual_way(tmp_path, number):
    path = tmp_path / "mine.yaml"
    path.write_text(f"train:\n  learning_rate: {number}\n")
    assert load_config([f"train.learning_rate={number}"]).train.learning_rate == 1e-3
    assert load_config([f"preset={path}"]).train.learning_rate == 1e-3
    assert problems(f"train.learning_rate={number}x")[0].startswith("`train.learning_rate` must be a number")


def test_another_check_replaces_the_usual_one():
    assert load_config(["train.num_steps=-1"], check=lambda config: []).train.num_steps == -1
    with pytest.raises(ConfigError, match="steps: 1000"):
        load_config([], check=lambda config: [f"steps: {config.train.num_steps}"])


@pytest.mark.parametrize("name", sorted(p.stem for p in PRESETS.glob("*.yaml")))
def test_every_preset_loads_and_has_no_problem(name):
    config = load_config([f"preset={name}"])
    assert problems_of(config) == []
    assert config != Config()


# ---------------------------------------------------------------- errors


def test_all_problems_come_at_once():
    found = problems(
        "model.depht=3", "train.num_steps=many", "nonsense", "run.naame=x", "monitor.wandb=1", "preset=digit"
    )
    assert len(found) == 6
    for text in ("`model.depht`", "`train.num_steps`", "`nonsense`", "`run.naame`", "`monitor.wandb`", "`digit`"):
        assert sum(text in problem for problem in found) == 1
    found = problems(
        "train.num_steps=0", "model.depth=0", "run.timeout_seconds=0", "sample.grid=0", "monitor.log_every=0"
    )
    assert len(found) == 5


def test_config_error_is_a_value_error():
    with pytest.raises(ValueError, match=r"train\.num_steps"):
        load_config(["train.num_steps=0"])


def test_unknown_keys_are_refused_with_a_suggestion():
    [text] = problems("train.num_steps.x=3")
    assert text.startswith("`train.num_steps.x` is not a setting.")
    assert problems("model.depht=3") == ["`model.depht` is not a setting. Did you mean `model.depth`?"]
    assert problems("modle.depth=3") == ["`modle` is not a setting. Did you mean `model`?"]
    [text] = problems("train.zzzz=3")
    assert text.startswith("`train.zzzz` is not a setting. Known: ") and "learning_rate" in text
    [text] = problems("preset=digit")
    assert "`digit` does not exist" in text and "digits, digits_compare, digits_prune" in text


@pytest.mark.parametrize(
    ("word", "what"),
    [
        ("train.num_steps=1.5", "a whole number"), ("train.num_steps=1.0", "a whole number"),
        ("train.num_steps=true", "a whole number"), ("train.num_steps=null", "a whole number"),
        ("train.num_steps=[1]", "a whole number"), ("prune.target_depth=x", "a whole number or null"),
        ("train.learning_rate=fast", "a number"), ("train.learning_rate=true", "a number"),
        ("monitor.wandb=1", "true or false"), ("monitor.wandb=yes please", "true or false"),
        ("train.betas=0.9", "a list of 2 (a number each)"),
        ("train.betas=[0.9]", "a list of 2"), ("train.betas=[0.9,0.99,0.999]", "a list of 2"),
        ("train.betas=[0.9,x]", "a list of 2"), ("model.kept_blocks=3", "a list (a whole number each) or null"),
        ("model.kept_blocks=[0.5]", "a list"), ("train=3", "a group of settings"), ("train=[]", "a group of settings"),
    ],
)  # fmt: skip
def test_wrong_types_are_refused_by_name(word, what):
    [text] = problems(word)
    assert text.startswith(f"`{word.partition('=')[0].removesuffix('.x')}` must be ") and what in text


@pytest.mark.parametrize("value", ["[a]", "true", "{b: 1}", "null"])
def test_text_must_be_text(value):
    [text] = problems(f"run={{name: {value}}}")
    assert text.startswith("`run.name` must be text, got ")


@pytest.mark.parametrize("value", [".nan", "nan", ".inf", "-.inf", "1e999"])
def test_numbers_must_be_finite(value):
    [text] = problems(f"train.learning_rate={value}")
    assert text.startswith("`train.learning_rate` must be a number, got ")
    [text] = problems(f"train.betas=[0.9,{value}]")
    assert text.startswith("`train.betas` must be a list of 2")


@pytest.mark.parametrize("depth", [28, 30])
def test_a_target_depth_that_is_not_below_the_depth_is_refused_in_these_words(depth):
    expected = f"`prune.target_depth` must be below the 28 blocks of the model, got {depth}. Lower it."
    assert problems(f"prune.target_depth={depth}") == [expected]


def test_target_depths_at_the_borders():
    assert problems("prune.target_depth=27") == problems("prune.target_depth=1") == []
    assert "must be at least 1, got 0. Raise it." in problems("prune.target_depth=0")[0]
    assert "the 3 blocks of the model, got 3" in problems("model.kept_blocks=[0,1,5]", "prune.target_depth=3")[0]


def test_readers_must_divide_the_batch():
    expected = "`data.num_readers` must divide `train.global_batch_size` (10), got 4."
    assert problems("train.global_batch_size=10", "data.num_readers=4") == [expected]
    assert problems("train.global_batch_size=10", "data.num_readers=5") == []


EXPLICIT = ["prune.criterion=explicit", "model.depth=4", "prune.target_depth=2"]


@pytest.mark.parametrize("order", ["[]", "[1]", "[1,1]", "[1,4]", "[-1,2]"])
def test_an_explicit_order_must_name_enough_different_present_blocks(order):
    [text] = problems(*EXPLICIT, f"prune.explicit_order={order}")
    assert text.startswith("`prune.explicit_order` must list at least 2 different present blocks, got [")


def test_an_explicit_order_of_present_blocks_is_accepted():
    assert problems(*EXPLICIT, "prune.explicit_order=[3,0]") == []
    kept = ["model.kept_blocks=[0,2,3]", "prune.target_depth=2"]
    assert problems(*EXPLICIT, *kept, "prune.explicit_order=[2]") == []
    assert problems(*EXPLICIT, *kept, "prune.explicit_order=[1]") != []


BAD_VALUES = """
run.name=a/b                                               -> one folder name
run.name=..                                                -> one folder name
run.name=                                                -> one folder name
run.timeout_seconds=0                                      -> above 0
model.depth=0                                              -> above 0
model.hidden_size=-4                                       -> above 0
model.mlp_ratio=0                                          -> above 0
model.num_heads=0                                          -> above 0
model.num_heads=7                                          -> must divide
model.hidden_size=18 model.num_heads=2                     -> multiple of 4
model.patch_size=3                                         -> must divide
model.process=ddpm                                         -> one of sit
model.kept_blocks=[]                                       -> sorted block indices
model.kept_blocks=[2,1]                                    -> sorted block indices
model.kept_blocks=[1,1]                                    -> sorted block indices
model.kept_blocks=[0,28]                                   -> sorted block indices
model.kept_blocks=[-1]                                     -> sorted block indices
model.block_widths=[[28,1,1]]                              -> name present blocks
model.block_widths=[[0,1]]                                 -> a list (a list of 3 (a whole number each) each)
model.block_widths=[[0,16,4608]]                           -> full width out
data.num_readers=0                                         -> above 0
data.prefetch=0                                            -> above 0
data.num_workers=-1                                        -> at least 0
data.max_skipped=-1                                        -> at least 0
data.latent_scale=0                                        -> above 0
data.shuffle_buffer=0                                      -> above 0
data.shard_size=0                                          -> above 0
train.num_steps=0                                          -> above 0
train.global_batch_size=0                                  -> above 0
train.micro_batch_size=0                                   -> above 0
train.learning_rate=0                                      -> above 0
train.min_learning_rate=1                                  -> [0, train.learning_rate]
train.min_learning_rate=-1                                 -> [0, train.learning_rate]
train.warmup_steps=-1                                      -> at least 0
train.lr_schedule=linear                                   -> constant, cosine
train.betas=[0.9,1.0]                                      -> [0, 1)
train.betas=[-0.1,0.9]                                     -> [0, 1)
train.weight_decay=-1                                      -> at least 0
train.grad_clip=-1                                         -> at least 0
train.ema_decay=1                                          -> [0, 1)
train.label_dropout=1                                      -> [0, 1)
train.label_dropout=-0.1                                   -> [0, 1)
train.checkpoint_every=0                                   -> above 0
train.keep_checkpoints=0                                   -> above 0
train.validate_every=-1                                    -> at least 0
train.validation_draws=0                                   -> above 0
parallel.zero_stage=4                                      -> 0, 1, 2, 3
parallel.zero_stage=-1                                     -> 0, 1, 2, 3
prune.criterion=best                                       -> ced, ced_abs
score.dtype=float16                                  -> float32, float64
prune.num_checks=0                                         -> at least 1
score.draws=1                                  -> at least 2
score.batch_size=0                                  -> at least 1
prune.ntk_samples=1                                        -> at least 2
prune.ntk_repeats=0                                        -> at least 1
prune.zico_batches=1                                       -> at least 2
prune.zico_batch_size=0                                    -> at least 1
prune.max_blocks_per_check=0                               -> at least 1
prune.vote_weights=[0,0,0]                                 -> not all 0
prune.vote_weights=[2,-1,0]                                -> at least 0
prune.vote_weights=[1,1]                                   -> must be 3 numbers (NTK, ZiCo, step time), got [1.0, 1.0]
prune.vote_tolerance=-0.1                                  -> at least 0
score.batch_size=100 prune.target_depth=4           -> must divide `score.draws`
score.batch_size=1024 prune.target_depth=4          -> be at most half of it
prune.end_step=1001 prune.target_depth=4                   -> `prune.end_step` <= `train.num_steps`
prune.start_step=1000 prune.target_depth=4                 -> `prune.start_step` < `prune.end_step`
prune.start_step=-1 prune.target_depth=4                   -> `prune.start_step` < `prune.end_step`
prune.num_checks=4 prune.end_step=3 prune.target_depth=4   -> as many steps
prune.max_blocks_per_check=5 prune.target_depth=4          -> must reach 24 blocks, got 5 x 4
sample.sampler=rk4                                         -> euler, heun, dopri5, sde, got rk4
sample.sampler=ddim                                        -> euler, heun, dopri5, sde, got ddim
sample.num_steps=1 sample.sampler=sde                      -> at least 2 with `sample.sde_last_step`
sample.sde_last_step_size=1                                -> below 1
sample.ddim_eta=1.5                                        -> in [0, 1], got 1.5
sample.cfg_interval=[0.5,0.5]                              -> 0 <= low < high <= 1
sample.cfg_channels=5                                      -> in [1, 4]
diffusion.path=cosine                                      -> linear, gvp, vp
model.learn_sigma=false model.process=dit sample.sampler=ddim -> `model.learn_sigma` must be true
sample.num_steps=1001 model.process=dit model.learn_sigma=true sample.sampler=ddim -> in [2, 1000]
sample.labels=all                                          -> uniform, balanced
sample.num_steps=0                                         -> above 0
sample.num_samples=0                                       -> above 0
sample.batch_size=0                                        -> above 0
sample.grid=0                                              -> above 0
evaluate.latency_repeats=0                                 -> above 0
evaluate.latency_batches=[1,0]                             -> above 0
monitor.log_every=0                                        -> above 0
monitor.sample_every=-1                                    -> at least 0
"""


@pytest.mark.parametrize("line", BAD_VALUES.strip().splitlines())
def test_impossible_values_are_refused_by_name(line):
    words, _, expected = line.partition(" -> ")
    found = problems(*words.split())
    assert len(found) == 1 and expected in found[0]
    assert f"`{words.split('=')[0]}`" in found[0] or "model.hidden_size=18" in words


def test_the_borders_of_what_is_possible_are_accepted():
    line = """
        train.betas=[0,0] train.grad_clip=0 train.validate_every=0 train.ema_decay=0 train.label_dropout=0
        train.min_learning_rate=0.0001 prune.vote_weights=[0,1,0] prune.vote_tolerance=0 prune.start_step=0
        prune.target_depth=4 prune.max_blocks_per_check=6 prune.num_checks=4 prune.end_step=4 sample.grid=1
        score.draws=256 prune.ntk_samples=2 prune.zico_batches=2 monitor.sample_every=0
        parallel.zero_stage=0
    """
    assert problems(*line.split()) == []


# ---------------------------------------------------------------- interpolations

SECRET = "a-value-of-the-environment"
INTERPOLATIONS = [
    ["run.name=${oc.env:ENTPRUNE_TEST}"], ["run=${oc.env:ENTPRUNE_TEST}"], ["model.depth=${oc.env:ENTPRUNE_TEST}"],
    ["run.name=x${oc.env:ENTPRUNE_TEST}"], ['model.kept_blocks=[0,"${oc.env:ENTPRUNE_TEST}"]'],
    ["run.name=${oc.env:HOME}"], ["run.name=${model.depth}"], ["run={name: '${oc.env:ENTPRUNE_TEST}'}"],
]  # fmt: skip
OVERWRITTEN = [
    ["run.name=${oc.env:ENTPRUNE_TEST}", "run.name=a"],
    ["run=${oc.env:ENTPRUNE_TEST}", "run.seed=1"],
    ["run=${oc.create:${oc.decode:${oc.env:ENTPRUNE_TEST}}}", "run.seed=1"],
]


@pytest.fixture
def secret(monkeypatch) -> None:
    monkeypatch.setenv("ENTPRUNE_TEST", f"{{{SECRET}: 1}}")


@pytest.mark.parametrize("words", INTERPOLATIONS)
def test_interpolations_are_refused_and_show_nothing_of_the_environment(secret, words):
    found = problems(*words)
    assert any("contains an interpolation" in text and text.startswith("`") for text in found)
    assert SECRET not in str(found) and "/" not in str(found)


@pytest.mark.parametrize("words", OVERWRITTEN)
def test_interpolations_are_refused_where_another_word_follows(secret, words):
    found = problems(*words)
    assert SECRET not in str(found)
    assert any("contains an interpolation" in text for text in found)


def test_interpolations_in_presets_are_refused(secret, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("run:\n  name: ${oc.env:ENTPRUNE_TEST}\n")
    found = problems(f"preset={path}", "run.seed=1")
    assert found == [
        "`run.name` contains an interpolation (`${`). Interpolations are disabled: write the value itself."
    ]


# ---------------------------------------------------------------- storing

names = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=8)
finite = st.floats(allow_nan=False, allow_infinity=False)
configs = st.builds(
    Config,
    run=st.builds(RunConfig, name=names, seed=st.integers()),
    model=st.builds(
        ModelConfig, depth=st.integers(1, 99), learn_sigma=st.booleans(), mlp_ratio=finite,
        kept_blocks=st.none() | st.lists(st.integers(0, 99), max_size=5).map(tuple),
        block_widths=st.lists(st.tuples(st.integers(), st.integers(), st.integers()), max_size=3).map(tuple),
    ),
    data=st.builds(DataConfig, shards=names),
    train=st.builds(TrainConfig, learning_rate=finite, betas=st.tuples(finite, finite)),
    prune=st.builds(PruneConfig, end_step=st.none() | st.integers(), score_only=st.booleans()),
)  # fmt: skip


@settings(**QUICK, max_examples=60)
@given(configs)
def test_a_config_survives_being_stored_as_yaml(config):
    assert config_from_dict(yaml.safe_load(to_yaml(config))) == config
    assert config_from_dict(to_dict(config)) == config


@pytest.mark.parametrize(
    "name", ["12e4567", "1e5", "007", "no", "null", "~", "1_000", "0x10", "12:30", "1.10", "2026-11-20"]
)
def test_a_stored_config_gives_the_same_settings_when_used_as_a_preset(tmp_path, name):
    config = dataclasses.replace(Config(), run=RunConfig(name=name))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config([f"preset={tmp_path / 'config.yaml'}"]) == config


@pytest.mark.parametrize(
    "name", ["12e4567", "1e5", "007", "no", "null", "1_000", "0x10", "12:30", "1.10", "{a,b}", "a: b"]
)
def test_text_is_taken_as_it_is_written(name):
    assert load_config([f"run.name={name}", f"data.shards=in-{name}.tar"]).run.name == name


def test_an_empty_value_is_the_empty_text_that_help_shows():
    assert "  data.val_shards=\n" in help_text("", ["data"])
    assert load_config(["data.val_shards="]).data.val_shards == ""


def test_stored_settings_with_a_fault_are_refused_together():
    with pytest.raises(ConfigError) as error:
        config_from_dict({"run": {"name": 3.5, "nam": 1}, "model": 7, "train": {"num_steps": "x"}})
    assert len(error.value.problems) == 3
    with pytest.raises(ConfigError):
        config_from_dict([])  # type: ignore[arg-type]


def test_the_digest_depends_on_values_only():
    a, b = to_dict(Config()), to_dict(load_config(["preset=digits"]))
    assert digest(a) == digest(dict(reversed(a.items()))) != digest(b)
    assert digest({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
    with pytest.raises(ValueError, match="JSON"):
        digest({"a": math.nan})


# ---------------------------------------------------------------- help


def test_every_setting_has_a_text_and_help_shows_it():
    text, documents = help_text("Head.", SECTIONS), _field_docs()
    classes = [c for c in vars(config_schema).values() if dataclasses.is_dataclass(c)]
    assert len(classes) == len(SECTIONS) + 1
    for cls in classes:
        for field in dataclasses.fields(cls):
            document = documents[cls.__name__][field.name]
            assert document.endswith(".") and document in text, f"{cls.__name__}.{field.name}"
    lines = text.splitlines()
    for key in KEYS:
        assert sum(line.startswith(f"  {key}=") for line in lines) == 1
    assert lines[0] == "Head." and "digits_prune" in text
    assert "  model.depth=28" in lines and "  model.kept_blocks=null" in lines and "  train.betas=[0.9, 0.999]" in lines


# ---------------------------------------------------------------- fuzzing

scalars = st.one_of(
    st.text(max_size=6), st.integers(-(10**5), 10**5).map(str), st.floats().map(repr), st.integers(10**20).map(str),
    st.sampled_from(["null", "true", "[]", "{}", "[1,2]", "{a: 1}", "???", "${a}", "${", "[", "&a [*a]", "!x y"]),
)  # fmt: skip
keys = st.one_of(st.sampled_from([*KEYS, *SECTIONS]), st.text(max_size=6), st.text("ab.[]$", max_size=6))
words = st.one_of(
    st.builds("{}={}".format, keys, scalars),
    st.builds("{}.{}={}".format, st.sampled_from(KEYS), st.sampled_from("a0[]"), scalars),
    st.text(max_size=8),
    st.builds("preset={}".format, st.sampled_from(["digits", "nope", "x.yaml", "a" * 300, "a\0b", ""])),
)


@settings(**QUICK, max_examples=300)
@given(st.lists(words, max_size=4))
def test_any_words_give_a_config_or_a_config_error(command):
    try:
        assert isinstance(load_config(command), Config)
    except ConfigError as error:
        assert error.problems and all(error.problems)


@pytest.mark.parametrize(
    "command",
    [
        ["preset=" + "a" * 300], ["train.learning_rate=" + "9" * 400], ["model.depth=" + "9" * 25],
        ["train=[1]", "train.num_steps=2"], ["prune.explicit_order=[1]", "prune.explicit_order.x=3"],
        ["model.kept_blocks={a: 1}", "model.kept_blocks=[1]"], ["[="], ["[]=1"], ["train.betas=" + "[" * 3000],
    ],
)  # fmt: skip
def test_these_words_give_a_config_error(command):
    with pytest.raises(ConfigError):
        load_config(command)


@pytest.mark.parametrize("text", ["[1, 2]", "3", "run: [", "run: {name: \\xff}", "a: 1\n---\nb: 2"])
def test_a_damaged_preset_is_a_config_error_that_names_the_file(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_bytes(text.encode().replace(b"\\xff", b"\xff"))
    found = problems(f"preset={path}")
    assert found and "mine.yaml" in str(found)


def test_an_unreadable_value_is_refused_with_its_key():
    for value in ("[1,", "{a: ]", "!tag x", "\x07"):
        [text] = problems(f"train.betas={value}")
        assert "train.betas" in text


@pytest.mark.parametrize("number", ["010", "0x10", "1_000", "1:30"])
def test_numbers_that_yaml_would_read_in_another_base_are_refused(number):
    """YAML 1.1 takes 010 for 8 and 1:30 for 90."""
    assert problems(f"train.num_steps={number}") == [f"`train.num_steps` must be a whole number, got {number!r}."]


def test_a_preset_that_gives_a_key_twice_is_refused_with_the_key(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("train:\n  num_steps: 5\n  num_steps: 50\n")
    (line,) = problems(f"preset={path}")
    assert "`num_steps` is given twice" in line
    assert "line 2" in line


def test_a_setting_without_its_section_is_named_with_it():
    assert problems("num_samples=4") == ["`num_samples` is not a setting. Did you mean `sample.num_samples`?"]
    [text] = problems("num_steps=5")
    assert "`train.num_steps` or `sample.num_steps`" in text


@pytest.mark.parametrize("name", [" x", "x ", " ", "a/b", ""])
def test_a_run_name_is_one_folder_name_without_blanks_around_it(name):
    assert problems(f"run.name={name}") == [f"`run.name` must be one folder name, got {name!r}."]
