"""What holds for all files: where they are found, and that no test draws at import."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "rootnoise"
# Tests of the whole, or of what is not in the package.
ACROSS = {"dist", "docs", "fail", "first", "golden", "markdown", "mutations", "public"}
ACROSS |= {"reference", "reproduce", "suite"}
# Rooms of one kind, command or library a file.
ALIKE = {"cli", "factorization", "integrations", "workload"}

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


def test_a_test_file_is_named_after_the_room_or_file_that_it_tests():
    tested = [*PACKAGE.rglob("*"), *(ROOT / "benchmarks").glob("*.py")]
    names = {path.stem.strip("_") for path in tested} | ACROSS
    for file in (ROOT / "tests").glob("test_*.py"):
        words = file.stem.split("_")[1:]
        starts = {"_".join(words[: i + 1]) for i in range(len(words))}
        assert starts & names, file.name


def test_the_package_has_few_rooms_and_the_map_shows_each_file():
    inside = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    rooms = {path.name for path in inside if path.is_dir()}
    assert len(rooms) <= 15
    assert len([path for path in inside if path.suffix == ".py"]) <= 9
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for room in rooms:
        assert f"**`{room}/`:" in text
    for file in PACKAGE.rglob("*.py"):
        place = file.relative_to(PACKAGE)
        if file.stem != "__init__" and place.parts[0] not in ALIKE:
            assert f"{file.name}`" in text, place


def test_nothing_is_drawn_at_import():
    """What a test is given would depend on what was imported before it."""
    files = Path(__file__).parent.glob("*.py")
    drawn = {file.name: drawn_at_import(file.read_text()) for file in files}
    assert {name: lines for name, lines in drawn.items() if lines} == {}


def test_a_draw_at_import_is_found():
    text = "X = torch.randn(3)\ndef f(x=rng.normal()):\n    torch.rand(1)\n"
    assert drawn_at_import(text) == [1, 2]
    assert drawn_at_import("@mark(default_rng(0))\nclass A:\n    x = [randint(2)]\n") == [1, 3]
    assert drawn_at_import("f = lambda: torch.rand(1)\n") == []
