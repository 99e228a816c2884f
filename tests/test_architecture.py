"""The shape of the project: which module may import which, what a bare import costs, and what no file may hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import etf_adapt

ROOT = Path(__file__).resolve().parents[1]

# From top to bottom. A module imports from its own layer or from those below it, and no two modules import each other.
LAYERS = (
    {"training", "publishing", "resume", "callbacks", "advisor", "arguments", "checkpoints"},
    {"report", "card", "card_metadata", "figures", "comparison", "hub"},
    {"alignment", "evaluation", "export", "feature_cache", "monitor", "parameters"},
    {"data", "sources", "columns", "splits", "images", "digits", "rows", "batches", "transforms", "text"},
    {
        "modeling",
        "etf_model",
        "made_class",
        "adapters",
        "pooling",
        "sentence_folders",
        "folders",
        "fingerprint",
        "quantization",
        "weight_file",
        "state_dict",
        "image_size",
        "model_names",
        "upload",
        "finished_folder",
    },
    {"swap"},
    {"long_tail", "sampler", "metrics", "collapse"},
    {
        "head",
        "frames",
        "losses",
        "dot_regression",
        "softmax_losses",
        "loss_terms",
        "simplex",
        "training_logits",
        "calibration",
    },
)
LEVEL = {name: level for level, names in enumerate(reversed(LAYERS)) for name in names}

# What the lower layers may know of the world, beside the standard library; `swap` alone knows the layouts of both libraries.
KNOWN_LIBRARIES = {
    0: {"torch"},
    1: {"torch", "numpy", "pyarrow", "datasets", "evaluate"},
    2: {"torch", "timm", "transformers"},
}


def module_names() -> list[str]:
    return sorted(path.stem for path in (ROOT / "etf_adapt").glob("*.py") if path.stem != "__init__")


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
            modules = (
                [f"etf_adapt.{alias.name}" for alias in node.names]
                if node.module == "etf_adapt"
                else [str(node.module)]
            )
            found |= {(name, id(node) in for_typing) for name in modules}
    return frozenset(found)


def own_imports(module: str, *, typing: bool) -> set[str]:
    """Return the modules of the package that one of them imports, with or without those for type checkers alone."""
    found = imports(ROOT / "etf_adapt" / f"{module}.py")
    return {name.split(".")[1] for name, for_typing in found if name.startswith("etf_adapt.") and typing >= for_typing}


def tracked_files() -> list[Path]:
    """Return the files that git tracks or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def test_every_module_has_one_layer():
    assert module_names() == sorted(name for names in LAYERS for name in names)


@pytest.mark.parametrize("module", module_names())
def test_imports_point_downward(module):
    above = {name for name in own_imports(module, typing=True) if LEVEL[name] > LEVEL[module]}
    assert not above, f"{module} (layer {LEVEL[module]}) imports from above: {sorted(above)}"


def test_no_two_modules_import_each_other():
    graph = {module: own_imports(module, typing=False) for module in module_names()}
    assert len([*TopologicalSorter(graph).static_order()]) == len(graph)  # raises CycleError, which names the cycle


@pytest.mark.parametrize("module", [name for name in module_names() if LEVEL.get(name) in KNOWN_LIBRARIES])
def test_lower_layers_know_few_libraries(module):
    roots = {name.split(".")[0] for name, _ in imports(ROOT / "etf_adapt" / f"{module}.py")}
    assert roots <= KNOWN_LIBRARIES[LEVEL[module]] | {"etf_adapt"} | sys.stdlib_module_names


def test_the_package_does_not_import_its_users():
    roots = {
        name.split(".")[0] for module in module_names() for name, _ in imports(ROOT / "etf_adapt" / f"{module}.py")
    }
    assert not roots & {"recipes", "examples", "tests", "finetune", "pytest"}


def test_nothing_is_unpickled():
    assert not [module for module in module_names() if "pickle" in dict(imports(ROOT / "etf_adapt" / f"{module}.py"))]
    code = {path: path.read_text(encoding="utf-8") for path in (ROOT / "etf_adapt").glob("*.py")}
    calls = [match for text in code.values() for match in re.findall(r"torch\.load\([^)]*\)", text)]
    assert all("weights_only=True" in call for call in calls)


@pytest.mark.parametrize("module", ["etf_adapt", "etf_adapt.report", "etf_adapt.model_names"])
def test_a_light_import_loads_no_framework(module):
    heavy = "{'torch', 'transformers', 'timm', 'datasets', 'accelerate', 'sklearn'}"
    program = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_the_same_for_python_and_for_type_checkers():
    promised = {f"etf_adapt.{module}" for module in etf_adapt._MODULES.values()}
    assert {name for name, for_typing in imports(ROOT / "etf_adapt" / "__init__.py") if for_typing} == promised
    typed = re.findall(
        r"^    from etf_adapt\.(\w+) import (\w+) as \2$", Path(etf_adapt.__file__).read_text(), re.MULTILINE
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


def test_no_module_is_long():
    modules = [path for path in tracked_files() if path.suffix == ".py" and path.parent.name != "tests"]
    lengths = {path.name: path.read_text(encoding="utf-8").count("\n") for path in modules}
    assert {name: lines for name, lines in lengths.items() if lines >= 500} == {}


def test_no_file_is_large():
    assert {path.name for path in tracked_files() if path.stat().st_size > 2_500_000} == set()
