"""No test draws at import: what it is given would depend on what was imported before it."""

import ast
from pathlib import Path

DRAWS = {"default_rng", "fresh", "manual_seed", "normal", "normal_", "rand", "randint", "randn"}
DRAWS |= {"random", "randperm", "seed", "token_bytes", "uniform", "uniform_"}


def drawn_at_import(text):
    """Return the lines of calls that draw outside of functions; decorators and defaults count."""
    found, left = [], [ast.parse(text)]
    while left:
        node = left.pop()
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            left += [*getattr(node, "decorator_list", ()), *node.args.defaults]
            left += [default for default in node.args.kw_defaults if default]
            continue
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            name = node.func.id if isinstance(node.func, ast.Name) else name
            found += [node.lineno] if name in DRAWS else []
        left += ast.iter_child_nodes(node)
    return sorted(found)


def test_nothing_is_drawn_at_import():
    files = Path(__file__).parent.glob("*.py")
    drawn = {file.name: drawn_at_import(file.read_text()) for file in files}
    assert {name: lines for name, lines in drawn.items() if lines} == {}


def test_a_draw_at_import_is_found():
    text = "X = torch.randn(3)\ndef f(x=rng.normal()):\n    torch.rand(1)\n"
    assert drawn_at_import(text) == [1, 2]
    assert drawn_at_import("@mark(default_rng(0))\nclass A:\n    x = [randint(2)]\n") == [1, 3]
    assert drawn_at_import("f = lambda: torch.rand(1)\n") == []
