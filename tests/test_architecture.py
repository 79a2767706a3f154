"""The shape of the house: who may import whom, no cycles, no shadowing, small files, empty __init__.py."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYER = {
    "config": 0, "batch": 0, "inputs": 0, "waits": 0, "dist": 0, "exit_codes": 0, "failure": 1, "ops": 1, "models": 2,
    "objectives": 2, "data": 2, "methods": 3, "engine": 4, "evals": 4, "recipe": 5, "convert": 5, "recipes": 6,
    "synthetic": 2, "train": 7, "plan": 7, "plan_sample": 7, "plan_knobs": 7,
    "flops": 7, "check_loss": 7, "cli_audit": 7, "cli_plan": 8, "cli_convert": 8,
    "cli_explain": 8, "cli_bench": 8, "cli_checkpoint": 8, "cli": 9,
}  # fmt: skip
SIBLINGS_APART = ("models", "objectives", "data", "engine", "evals")
FILES = sorted(p for top in ("mmpt", "data_tools", "launcher") for p in (ROOT / top).rglob("*.py"))


def part(path: Path) -> str:
    """`mmpt/ops/attention.py` -> ops, `mmpt/batch.py` -> batch."""
    inside = path.relative_to(ROOT / "mmpt")
    return inside.parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names of what a file imports, function-local imports included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    names = {name.split(".")[1] for name in imports(path) if name.startswith("mmpt.")}
    return names & LAYER.keys()


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[-2] != "recipes" and "mmpt" in p.parts], ids=str)
def test_imports_point_down(path: Path) -> None:
    if path.name == "__init__.py":
        return
    here = part(path)
    for target in ours(path):
        if here == target:
            continue
        if here == "recipe" and target == "recipes":
            continue  # by name only: the package is listed, its functions are looked up
        assert LAYER[target] <= LAYER[here], f"{path} imports {target}, which lies above it"
        apart = here in SIBLINGS_APART and target in SIBLINGS_APART and LAYER[here] == LAYER[target]
        assert not apart, f"{path} imports its sibling {target}"


@pytest.mark.parametrize("path", [p for p in FILES if "mmpt" in p.parts], ids=str)
def test_collectives_live_in_dist_and_engine(path: Path) -> None:
    if part(path) in ("models", "objectives"):
        assert "mmpt.dist" not in imports(path) and not any("distributed" in name for name in imports(path))
    if part(path) not in ("dist",):
        assert not any(name.startswith("torch.distributed") for name in imports(path)), f"{path}: use mmpt.dist"
    if part(path) != "engine":
        assert not any(name.split(".")[0] == "deepspeed" for name in imports(path)), f"{path} imports deepspeed"


def test_launcher_and_data_tools_keep_to_themselves() -> None:
    for path in (ROOT / "launcher").rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {"torch", "mmpt", "deepspeed"}, path
    for path in (ROOT / "data_tools").rglob("*.py"):
        assert ours(path) <= {"batch", "config", "data"}, path


def test_no_module_shadows_another() -> None:
    """`deepspeed mmpt/train.py` puts mmpt/ first on sys.path."""
    dependencies = re.findall(r'"([A-Za-z0-9_-]+)[">=]', (ROOT / "setup.py").read_text())
    taken = sys.stdlib_module_names | {name.replace("-", "_") for name in dependencies} | {"apex", "yaml", "PIL"}
    own = {p.name.removesuffix(".py") for p in (ROOT / "mmpt").iterdir() if not p.name.startswith("__")}
    assert not own & taken


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 300, f"{path} has {len(text.splitlines())} lines: it holds more than one idea"
    assert path.name not in ("utils.py", "helpers.py", "common.py", "misc.py")
    if path.name == "__init__.py":
        assert not text.strip(), f"{path} is not empty"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 75, f"{path}: {node.name} has {length} lines"


def test_train_is_one_screen_of_loop() -> None:
    text = (ROOT / "mmpt" / "train.py").read_text()
    assert len(text.splitlines()) <= 180
    assert not any(isinstance(node, ast.ClassDef) for node in ast.walk(ast.parse(text)))


def test_distance_from_train() -> None:
    """A reader reaches everything that train.py needs in few files, along a graph without cycles."""
    graph: dict[Path, set[Path]] = {}

    def visit(path: Path, above: tuple[Path, ...]) -> None:
        assert path not in above, f"import cycle through {path}"
        if path in graph:
            return
        graph[path] = {found for name in imports(path) if (found := module_file(name)) and found != path}
        if path.name in (
            "plan.py",
            "plan_sample.py",
        ):  # a side branch: one number for the records, whose formulas name the methods
            graph[path] = set()
        for target in graph[path]:
            visit(target, (*above, path))

    visit(ROOT / "mmpt" / "train.py", ())
    lines = sum(len(path.read_text().splitlines()) for path in graph)
    assert len(graph) <= 110 and lines <= 13_500, f"{len(graph)} files, {lines} lines"


def module_file(name: str) -> Path | None:
    """The file of `mmpt.a.b` or of `mmpt.a.b.attribute`."""
    parts = name.split(".")
    for end in (len(parts), len(parts) - 1):
        path = ROOT.joinpath(*parts[:end]).with_suffix(".py")
        if parts[0] == "mmpt" and path.is_file():
            return path
    return None
