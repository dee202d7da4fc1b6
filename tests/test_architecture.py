"""The shape of the house: floors without cycles, one room per dependency, and what no module may do."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import pytest

from tests.reference.imports import PACKAGE, cycle, imported_names, inside, outside, sources, tree

FLOORS = (
    (
        "",
        "config",
        "config_schema",
        "config_values",
        "config_data",
        "config_methods",
        "config_prune",
        "config_sampling",
        "config_checks",
        "config_checks_prune",
        "config_checks_methods",
        "config_checks_score",
        "config_checks_soft",
        "config_checks_evaluation",
        "soft_budget",
        "macs",
        "config_checks_compare",
        "plain_yaml",
        "user_file",
        "plain_json",
        "atomic",
        "locks",
        "redact",
        "fault_points",
        "comm",
        "rng",
        "logs",
        "learning_rate",
        "race_plan",
        "mac_counter",
        "loss_guard",
    ),
    ("models", "diffusion", "importance", "pruning"),
    ("data", "interop", "engine", "monitor", "evaluation"),
    (
        "coordinator",
        "criterion_choice",
        "user_criterion",
        "ranking",
        "recovery",
        "teacher",
        "estimate_teacher",
        "replay",
        "scoring",
        "estimate",
        "estimate_resize",
        "faults",
        "launcher",
        "latent_pictures",
        "preflight",
        "validation",
        "export",
        "environment",
        "rollback",
        "race",
        "race_replicas",
        "race_sharded",
        "race_trial",
        "soft_pruning",
        "restarts",
        "stop_request",
        "slow_ranks",
    ),
    ("calibration", "run_files", "run_state", "run_view", "step_metrics", "trainer", "bad_steps"),
    ("cli",),
)
ROOMS = {
    "omegaconf": ("config",),
    "webdataset": ("data",),
    "deepspeed": ("engine", "comm"),
    "wandb": ("monitor",),
    "matplotlib": ("monitor",),
    "cleanfid": ("evaluation",),
    "torchvision": ("evaluation",),
    "safetensors": ("engine.checkpoint", "interop", "evaluation.features"),
    "sklearn": ("data.builtin",),
    "diffusers": ("interop.vae",),
    "huggingface_hub": ("interop.vae",),
}
NEVER = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
SINGLE_FILE_FLOORS = (0, 3, 4)
"""Floors of single files, which may import each other (run_view sees run_state); folders of a floor may not."""


def room(module: str) -> str:
    """Folder, or single file, that a module lies in."""
    return module.split(".")[0]


def floor(module: str) -> int:
    """Floor of a module; fails for one that no floor names."""
    floors = [number for number, rooms in enumerate(FLOORS) if room(module) in rooms]
    assert floors, f"{module} is on no floor: name it in FLOORS"
    return floors[0]


def may_import(module: str, target: str) -> bool:
    """The rule of the floors."""
    if room(module) == room(target) or floor(target) < floor(module):
        return True
    return floor(target) == floor(module) and floor(module) in SINGLE_FILE_FLOORS


def lies_in(module: str, places: tuple[str, ...]) -> bool:
    """Whether a module is one of the places or lies in one."""
    return any(module == place or module.startswith(place + ".") for place in places)


def calls(module: str) -> list[ast.Call]:
    """Every call in a module."""
    return [node for node in ast.walk(tree(module)) if isinstance(node, ast.Call)]


def test_every_module_has_a_floor_and_every_named_room_exists():
    rooms = {room(module) for module in sources()}
    assert rooms == {name for rooms in FLOORS for name in rooms}
    for number in SINGLE_FILE_FLOORS:
        folders = [name for name in FLOORS[number] if name and sources()[name].name == "__init__.py"]
        assert not folders, f"floor {number} may not hold the folders {folders}"


def test_imports_go_down_or_stay_in_the_folder():
    edges = [(module, target) for module in sources() for target in inside(module)]
    assert len(edges) > 100  # the graph is really read
    assert ("engine.build", "models.dit") in edges
    wrong = [f"{module} imports {target}" for module, target in edges if not may_import(module, target)]
    assert not wrong, "\n".join(wrong)


def test_the_rule_itself_refuses_sideways_and_upward():
    assert may_import("models.dit", "models.layers") and may_import("engine.build", "models.dit")
    assert may_import("run_view", "run_state") and may_import("models.dit", "rng")
    assert not may_import("models.dit", "diffusion.objective")
    assert not may_import("data.stream", "engine.build")
    assert not may_import("engine.build", "trainer") and not may_import("trainer", "cli.common")
    assert not may_import("comm", "models.dit")


def test_no_module_imports_itself_through_others():
    assert cycle({module: inside(module) for module in sources()}) == []
    assert cycle({"a": ("b",), "b": ("c",), "c": ("b",)}) == ["b", "c", "b"]


@pytest.mark.parametrize("dependency", ROOMS)
def test_each_dependency_has_one_room(dependency):
    users = [module for module in sources() if dependency in outside(module)]
    assert users
    assert [module for module in users if not lies_in(module, ROOMS[dependency])] == []


def test_comm_imports_deepspeed_inside_init_only():
    users = [
        f.name
        for f in tree("comm").body
        if isinstance(f, ast.FunctionDef)
        for n in ast.walk(f)
        if isinstance(n, ast.Import) and n.names[0].name == "deepspeed"
    ]
    top = [n.names[0].name for n in tree("comm").body if isinstance(n, ast.Import)]
    assert users == ["init"] and "deepspeed" not in top


def test_floor_1_is_pure_torch_and_touches_no_file():
    for module in [m for m in sources() if floor(m) == 1]:
        foreign = outside(module) - sys.stdlib_module_names - {"torch"}
        assert not foreign, f"{module} imports {sorted(foreign)}"
        assert not outside(module) & {"pathlib", "os", "io", "shutil", "tempfile"}, module
        assert not [c for c in calls(module) if isinstance(c.func, ast.Name) and c.func.id == "open"], module


def test_settings_need_no_torch():
    for module in ("config", "config_schema", "config_checks", "cli.common", "cli.main"):
        reached, todo = set(), [module]
        while todo:
            current = todo.pop()
            if current not in reached:
                reached.add(current)
                todo += inside(current)
        assert not {"torch", "deepspeed"} & set().union(*(outside(m) for m in reached)), module


def test_nothing_unpickles():
    for module in sources():
        assert not outside(module) & NEVER, module
        if module == "interop.torch_file":
            continue  # the one exception, see below
        names = [name for name in imported_names(module) if name in ("torch.load", "torch.save", "numpy.load")]
        assert not names, f"{module} imports {names}"
        for call in calls(module):
            text = ast.unparse(call.func)
            assert text not in ("torch.load", "torch.save", "pickle.load", "pickle.loads", "eval", "exec"), module
            if text in ("np.load", "numpy.load", "np.save", "np.lib.format.write_array", "np.lib.format.read_array"):
                assert "allow_pickle=False" in ast.unparse(call), f"{module}: {ast.unparse(call)}"
            assert text not in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.dump"), module
            assert not text.endswith("_object_list") and "gather_object" not in text, f"{module} sends pickles: {text}"


def test_the_one_module_that_opens_pt_files_takes_plain_tensors_only():
    found = [
        c
        for c in calls("interop.torch_file")
        if ast.unparse(c.func).startswith("torch.") and "load" in ast.unparse(c.func)
    ]
    assert len(found) == 1 and "weights_only=True" in ast.unparse(found[0])
    allowed = [ast.unparse(c) for c in calls("interop.torch_file") if "safe_globals" in ast.unparse(c.func)]
    assert allowed == ["torch.serialization.safe_globals([argparse.Namespace])"]


def test_nothing_probes_or_imports_everything():
    for module in sources():
        assert not [n for n in imported_names(module) if n.endswith(".*")], f"{module} imports *"
        probes = [c for c in calls(module) if isinstance(c.func, ast.Name) and c.func.id == "hasattr"]
        assert not probes, f"{module} calls hasattr"


def test_only_the_command_dispatch_and_files_of_users_are_imported_by_name():
    users = [
        m
        for m in sources()
        if {"importlib", *(f"importlib.{n}" for n in ("import_module", "util", "machinery"))} & set(imported_names(m))
    ]
    users += [m for m in sources() for c in calls(m) if isinstance(c.func, ast.Name) and c.func.id == "__import__"]
    assert users == ["cli.main", "user_file"]  # a user's criterion or extractor, by the path that the user gave


def public(body: list[ast.stmt], prefix: str) -> list[tuple[str, ast.AST]]:
    """Public classes and functions, with the methods of classes."""
    found: list[tuple[str, ast.AST]] = []
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            found.append((prefix + node.name, node))
            if isinstance(node, ast.ClassDef):
                found += public(node.body, f"{prefix}{node.name}.")
    return found


SCHEMA = ("config_schema", "config_data", "config_methods", "config_prune", "config_sampling")


def documents_its_fields(node: ast.AST) -> bool:
    """Whether a class carries a text under each field instead (SCHEMA, read by --help)."""
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
    texts = [n for n in node.body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    return bool(fields) and len(texts) >= len(fields)


def test_public_things_say_what_they_are():
    missing = []
    for module in sources():
        if tree(module).body and not ast.get_docstring(tree(module)):
            missing.append(f"module {module}")
        for name, node in public(tree(module).body, ""):
            if name.endswith(".forward"):  # the shapes stand in the docstring of the layer's class
                continue
            if module in SCHEMA and isinstance(node, ast.ClassDef) and documents_its_fields(node):
                continue
            if not ast.get_docstring(node):
                missing.append(f"{module}: {name}")
    assert not missing, "\n".join(missing)


HELP = """
import contextlib, io, json, sys
from entprune_ds.cli.main import COMMANDS, main
loaded = {"import": sorted({"torch", "deepspeed"} & set(sys.modules))}
for command in [[], *[[c] for c in COMMANDS]]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = main([*command, "--help"])
    assert status == 0 and len(out.getvalue()) > 100, command
    loaded[" ".join(command)] = sorted({"torch", "deepspeed"} & set(sys.modules))
print(json.dumps(loaded))
"""


def test_help_of_every_command_loads_neither_torch_nor_deepspeed():
    result = subprocess.run(
        [sys.executable, "-c", HELP], capture_output=True, text=True, timeout=60, cwd=PACKAGE.parent
    )
    assert result.returncode == 0, result.stderr
    loaded = json.loads(result.stdout)
    assert set(loaded) >= {"import", "", "train", "sample", "evaluate", "export", "shards", "report"}
    assert loaded == {name: [] for name in loaded}
