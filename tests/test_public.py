"""The public names: all there, none hidden by a module, and nothing heavy at the door."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import rootnoise

GUARD = "TYPE_CHECKING"


def test_every_exported_name_exists():
    for name in rootnoise.__all__:
        assert getattr(rootnoise, name) is not None
    assert dir(rootnoise) == sorted(rootnoise.__all__)


def test_no_name_is_that_of_a_submodule():
    modules = {module.name for module in pkgutil.iter_modules(rootnoise.__path__)}
    assert not modules & set(rootnoise.__all__)


def test_type_checkers_and_users_see_the_same_names():
    tree = ast.parse(Path(rootnoise.__file__).read_text())
    (block,) = [
        node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == GUARD
    ]
    typed = {
        name.asname or name.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    assert typed == {name: f"rootnoise.{home}" for name, home in rootnoise._HOMES.items()}
    assert set(rootnoise.__all__) == {*rootnoise._HOMES, "RootnoiseError", "__version__"}


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="module 'rootnoise' has no attribute 'magic'"):
        _ = rootnoise.magic


@pytest.mark.parametrize(
    "statement",
    [
        "import rootnoise",
        "import rootnoise.mechanism",
        "import rootnoise.cli",
        "from rootnoise.cli import main; main(['--help'])",
        "from rootnoise.cli import main; main(['factorize', '--steps', '100', '--json'])",
        "from rootnoise.cli import main; main(['account', '--epsilon', '1', '--delta', '1e-5'])",
    ],
)
def test_mathematics_and_help_need_no_torch(statement):
    check = (
        "; import sys; sys.exit(any(m in sys.modules for m in ('torch', 'opacus', 'matplotlib')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", statement + check], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_help_needs_no_scipy():
    """It takes as long to import as all the rest of help."""
    check = "import sys; from rootnoise.cli import main; main(['--help']); "
    done = subprocess.run(
        [sys.executable, "-c", check + "sys.exit('scipy' in sys.modules)"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
