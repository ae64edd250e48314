"""Imports run one way: each place uses only what stands above it in CONTRIBUTING.md's table."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = re.findall(r"^\| `([\w.]+?)(?:\.py|/)` ", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
FILES = [
    file
    for place in ORDER
    for file in (
        [ROOT / f"{place}.py"] if (ROOT / f"{place}.py").exists() else (ROOT / place).rglob("*.py")
    )
]


def imports(file: Path) -> set[str]:
    """Every module that a file imports, wherever it does: lazy, for types, under __main__."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write imports from the root"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_place_has_its_line_in_the_order():
    modules = {file.stem for file in ROOT.glob("*.py")}
    folders = {file.parent.name for file in ROOT.glob("*/__init__.py")}
    assert set(ORDER) == modules | folders


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_place_uses_only_what_stands_above_it(file):
    place = ORDER.index(file.relative_to(ROOT).parts[0].removesuffix(".py"))
    for name in imports(file):
        if (other := name.split(".")[0]) in ORDER:
            assert ORDER.index(other) <= place, f"{file.relative_to(ROOT)} imports {name}"


def test_no_two_modules_import_each_other():
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in FILES}
    graph = {name: imports(file) & modules.keys() for name, file in modules.items()}
    while leaves := [name for name, uses in graph.items() if not uses & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"a circle among {sorted(graph)}"
