"""The house keeps its measure: modules of 600 lines at most, functions of 50 without docstring."""

import ast
from collections.abc import Iterator
from pathlib import Path

MODULES = sorted((Path(__file__).parent.parent / "balancesync").glob("*.py"))


def functions(node: ast.AST, name: str) -> Iterator[tuple[str, int]]:
    """Every function below a node by its full name, with its lines."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        full = f"{name}.{child.name}"
        if not isinstance(child, ast.ClassDef):
            first = child.body[1] if ast.get_docstring(child) and child.body[1:] else child
            last = child.end_lineno or 0
            head = child.body[0].lineno - child.lineno if first is not child else 0
            yield full, last - first.lineno + 1 + head
        yield from functions(child, full)


def test_modules_fit_on_a_few_screens() -> None:
    lengths = {each.stem: len(each.read_text().splitlines()) for each in MODULES}
    assert {name: count for name, count in lengths.items() if count > 600} == {}


def test_functions_fit_on_one_screen() -> None:
    lengths = [
        each for file in MODULES for each in functions(ast.parse(file.read_text()), file.stem)
    ]
    assert {name for name, count in lengths if count > 50} == set()
