"""Without flwr the module loads, and each part that needs it says what to install."""

import runpy
import sys
from pathlib import Path

import pytest

import federated_runs as runs
import rootnoise
from rootnoise._check import RootnoiseError

MODULE = Path(rootnoise.__file__).parent / "integrations" / "flower.py"


@pytest.mark.parametrize("part", ["PrivateStrategy", "AskedOnce", "name_of"])
def test_what_to_install_is_said(tmp_path, monkeypatch, part):
    for name in [name for name in sys.modules if name.startswith("flwr.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flwr", None)
    flower = runpy.run_path(str(MODULE))
    arguments = {"PrivateStrategy": (runs.server(tmp_path), flower["by_key"]), "name_of": ("ann",)}
    with pytest.raises(RootnoiseError, match=r"needs flwr: pip install 'rootnoise\[flower\]'"):
        flower[part](*arguments.get(part, ()))
