"""The shape of the project: which module may import which, what a bare import costs, and what no file may hold."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import etf_adapt

ROOT = Path(__file__).resolve().parents[1]

# From the ground up. A file imports from its own folder and from those below it, and no two files import each other.
FLOORS = (
    "errors", "geometry", "losses", "sources", "data", "heads", "metrics", "results", "hub", "models", "inference", "training",
    "commands",
)  # fmt: skip
LEVEL = {name: level for level, name in enumerate((*FLOORS, "__main__"))}

# What a folder may know of the world, beside the standard library; folders that are not here know what they need.
KNOWN_LIBRARIES = {
    "errors": set(),
    "geometry": {"torch"},
    "losses": {"torch"},
    "sources": {"PIL", "datasets", "huggingface_hub", "numpy", "pyarrow"},
    "data": {"PIL", "accelerate", "datasets", "numpy", "pyarrow", "sklearn", "timm", "torch", "torchvision", "tqdm"},
    "heads": {"accelerate", "numpy", "torch"},
    "metrics": {"datasets", "evaluate", "numpy", "scipy", "sklearn", "torch"},
    "results": {"huggingface_hub", "jinja2", "matplotlib", "numpy", "pyarrow", "torch", "yaml"},
    "hub": {"huggingface_hub", "safetensors", "yaml"},
}
LIGHT = ("errors", "results", "hub", "commands")
"""Folders whose import loads no framework, so that a check of arguments or of a folder waits for none."""

HEAVY = "commands.dataclass_parser"  # transformers' parser, imported when flags are parsed


def modules() -> list[str]:
    """Return the files of the package as dotted names below it, such as ``geometry.simplex``; signposts are none."""
    package = ROOT / "etf_adapt"
    files = [file.relative_to(package).with_suffix("") for file in package.rglob("*.py") if file.stem != "__init__"]
    return sorted(".".join(file.parts) for file in files)


def path_of(module: str) -> Path:
    return ROOT.joinpath("etf_adapt", *module.split(".")).with_suffix(".py")


def folder_of(module: str) -> str:
    return module.partition(".")[0]


@cache
def imports(path: Path) -> frozenset[tuple[str, bool]]:
    """Return the dotted names that a file imports, anywhere in it, and whether it does so for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_blocks = [
        block for block in ast.walk(tree) if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
    ]
    for_typing = {id(node) for block in typing_blocks for statement in block.body for node in ast.walk(statement)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name, id(node) in for_typing) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively"
            module = str(node.module)
            is_folder = (ROOT / module.replace(".", "/") / "__init__.py").is_file()
            names = [f"{module}.{alias.name}" for alias in node.names] if is_folder else [module]
            found |= {(name, id(node) in for_typing) for name in names}
    return frozenset(found)


def own_imports(module: str, *, typing: bool) -> set[str]:
    """Return the files of the package that one of them imports, with or without those for type checkers alone."""
    known, found = set(modules()), set()
    for name, for_typing in imports(path_of(module)):
        if name.startswith("etf_adapt.") and typing >= for_typing:
            name = name.removeprefix("etf_adapt.")
            found.add(name if name in known else name.rpartition(".")[0])
    return found


def roots(module: str) -> set[str]:
    return {name.split(".")[0] for name, _ in imports(path_of(module))}


def tracked_files() -> list[Path]:
    """Return the files that git tracks or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def test_every_file_stands_in_a_folder_with_a_floor():
    assert {folder_of(module) for module in modules()} == set(LEVEL)
    assert [module for module in modules() if "." not in module] == ["__main__", "errors"]


@pytest.mark.parametrize("module", modules())
def test_imports_point_downward(module):
    level = LEVEL[folder_of(module)]
    above = {name for name in own_imports(module, typing=True) if LEVEL[folder_of(name)] > level}
    assert not above, f"{module} (floor {level}) imports from above: {sorted(above)}"


def test_no_two_files_import_each_other():
    graph = {module: own_imports(module, typing=True) - {module} for module in modules()}
    assert len([*TopologicalSorter(graph).static_order()]) == len(graph)  # raises CycleError, which names the cycle


@pytest.mark.parametrize("module", [name for name in modules() if folder_of(name) in KNOWN_LIBRARIES])
def test_folders_know_few_libraries(module):
    assert roots(module) <= KNOWN_LIBRARIES[folder_of(module)] | {"etf_adapt"} | sys.stdlib_module_names


@pytest.mark.parametrize("folder", [name for name in FLOORS if name != "errors"])
def test_a_folder_begins_with_a_signpost(folder):
    """Which says what is here and in which order to read it, and imports nothing: `import etf_adapt` stays light."""
    tree = ast.parse((ROOT / "etf_adapt" / folder / "__init__.py").read_text(encoding="utf-8"))
    text = ast.get_docstring(tree) or ""
    assert len(tree.body) == 1 and 3 <= text.count("\n") + 1 <= 10
    files = {module.split(".")[1] for module in modules() if folder_of(module) == folder}
    assert {name for name in files if f"``{name}``" not in text} == set()


def test_the_package_does_not_import_its_users():
    users = {"recipes", "examples", "tests", "finetune", "comparison", "export_onnx", "pytest"}
    assert {module: roots(module) & users for module in modules() if roots(module) & users} == {}


def test_nothing_is_unpickled():
    assert [module for module in modules() if roots(module) & {"pickle", "dill", "cloudpickle", "joblib"}] == []
    calls = [call for module in modules() for call in re.findall(r"torch\.load\([^)]*\)", path_of(module).read_text())]
    assert all("weights_only=True" in call for call in calls)


@pytest.mark.parametrize(
    "module",
    [
        "etf_adapt",
        "etf_adapt.models.names",
        *(f"etf_adapt.{name}" for name in modules() if folder_of(name) in LIGHT and name != HEAVY),
    ],
)
def test_a_light_import_loads_no_framework(module):
    heavy = "{'torch', 'transformers', 'timm', 'datasets', 'accelerate', 'sklearn'}"
    program = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_the_same_for_python_and_for_type_checkers():
    promised = {f"etf_adapt.{module}" for module in etf_adapt._MODULES.values()}
    assert {name for name, for_typing in imports(ROOT / "etf_adapt" / "__init__.py") if for_typing} == promised
    typed = re.findall(
        r"^    from etf_adapt\.([\w.]+) import (\w+) as \2$", Path(etf_adapt.__file__).read_text(), re.MULTILINE
    )
    assert {name: module for module, name in typed} == etf_adapt._MODULES
    assert set(etf_adapt.__all__) <= set(dir(etf_adapt))


@pytest.mark.parametrize("name", etf_adapt.__all__)
def test_every_public_name_is_there(name):
    assert getattr(etf_adapt, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'etf_adapt' has no attribute 'ETFHeads'"):
        _ = etf_adapt.ETFHeads


def test_no_file_names_a_folder_of_one_machine():
    folder = re.compile(r"(?<![\w.])/(?:work|farm|root|opt/pypi|tmp/env)/")
    text_files = [path for path in tracked_files() if path.suffix not in {".safetensors", ".parquet", ".png"}]
    found = [path.name for path in text_files if folder.search(path.read_text(encoding="utf-8"))]
    assert found == [], "a path that is right on one machine only"


def lines(modules: list[str]) -> dict[str, int]:
    return {module: path_of(module).read_text(encoding="utf-8").count("\n") for module in modules}


def test_the_core_is_read_in_an_evening():
    parts = ("names", "swap", "stock_subclass", "etf_model", "auto", "folders", "timm_layout", "weights")
    core = [name for name in modules() if folder_of(name) in ("geometry", "losses", "heads")]
    assert sum(lines([*core, *(f"models.{part}" for part in parts)]).values()) < 3500


def test_the_package_stays_small():
    """Sizes tell when something grows a second job. The core has a limit of its own; what lies around it may be longer."""
    sizes = lines(modules())
    folders = {folder: sum(sizes[name] for name in sizes if folder_of(name) == folder) for folder in FLOORS}
    assert sum(sizes.values()) < 14_700
    assert {folder: size for folder, size in folders.items() if size >= 2_800} == {}
    assert {name: size for name, size in sizes.items() if size >= 450} == {}
    assert statistics.median(sizes.values()) < 150


def test_no_recipe_or_example_is_long():
    files = [
        path
        for path in tracked_files()
        if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in ("recipes", "examples")
    ]
    assert {path.name for path in files if path.read_text(encoding="utf-8").count("\n") >= 450} == set()


def test_no_file_is_large():
    assert {path.name for path in tracked_files() if path.stat().st_size > 2_500_000} == set()


def test_the_oldest_versions_that_are_tested_are_the_lower_bounds():
    bounds = re.findall(r'"([\w-]+)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert (ROOT / ".ci/floors.txt").read_text(encoding="utf-8").split() == [
        f"{name}=={bound}" for name, bound in bounds
    ]
