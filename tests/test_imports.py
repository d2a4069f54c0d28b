"""Which module imports which, and that an import only adds modules."""

import ast
import json
import re
import sys
import tomllib

import pytest
from helpers.commands import ROOT, call

PACKAGE = ROOT / "torchtitan_ext"
MODULES = {path: ast.parse(path.read_text()) for path in [*PACKAGE.rglob("*.py"), *(ROOT / "scripts").glob("*.py")]}
# what each room may import beside itself and what no room is in: console, arguments, figures, patching
BELOW = {"lighthouse": set(), "data": {"lighthouse"}, "model": {"lighthouse"}}
BELOW["jobs"] = {"data", "model", "lighthouse"}
BELOW["train"] = BELOW["evaluate"] = BELOW["experiment"] = {"jobs", *BELOW["jobs"]}
BELOW["no room"] = set()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.slow
def test_importing_the_package_changes_nothing_but_by_the_module_whose_job_it_is(monkeypatch):
    mine = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TOKENIZERS_PARALLELISM", "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED")
    for name in mine:  # set in this process
        monkeypatch.delenv(name, raising=False)
    done = call(sys.executable, "tests/helpers/import_all.py")
    assert done.returncode == 0, done.stderr
    changes = json.loads(done.stdout)
    assert len(changes["modules"]) > 40 and changes["imports"] == []
    expected = {"DATASETS", "_op_sac_save_list", "os.environ", "safe globals", "train specs"}
    expected |= {"torch.distributed.checkpoint.filesystem.pickle"}
    assert {name for name in changes["register"] if not name.startswith("torch._weights_only")} == expected
    assert [name for name in changes["again"] if not name.startswith("torch.")] == []


def imported(path):
    """The modules and names that a file imports, with their full names."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(MODULES[path]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            yield from (".".join([*above, *filter(None, [node.module]), alias.name]) for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    room = path.parent.name if path.parent.parent == PACKAGE else "no room"
    names = [name.split(".") for name in imported(path)]
    if room == "lighthouse":  # needs what the package alone installs; those who have the others call for them
        packages = {name[0] for name in names} - {*sys.stdlib_module_names, "torchtitan_ext", "fla", "transformers"}
        assert packages <= {re.match(r"\w+", line)[0] for line in PROJECT["dependencies"]} == {"torch", "triton"}
    if path.parent.name != "scripts" and path.name not in ("cli.py", "__main__.py", "register.py"):
        rooms = {name[1] for name in names if name[0] == "torchtitan_ext" and name[1] in BELOW}
        assert rooms <= {room, *BELOW[room]}


@pytest.mark.parametrize("path", [*PACKAGE.glob("lighthouse/*.py")], ids=lambda path: path.stem)
def test_no_private_name_crosses_a_file_of_lighthouse(path):
    own = [name.split(".") for name in imported(path) if name.startswith("torchtitan_ext")]
    used = [name[-1] for name in own]
    for node in ast.walk(MODULES[path]):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in used:
            used.append(node.attr)
    assert [name for name in used if name.startswith("_")] == []
