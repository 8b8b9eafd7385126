"""The wheel and the source archive, in a fresh environment that does not see the source tree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

STEP = """
import torch
import rootnoise as rn

sampler = rn.FixedCycleSampler(n_examples=8, batch_size=4, epochs=1)
split = rn.factorize(rn.SGD(sampler.n_steps, momentum=0.9), sampler.participation, "bsr")
mechanism = rn.Mechanism.calibrate(split, sampler.participation, epsilon=4, delta=1e-5)
model = rn.privatize(torch.nn.Linear(3, 2), loss_reduction="mean")
sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
optimizer = rn.PrivateOptimizer(sgd, model, mechanism, sampler)
before = [p.detach().clone() for p in model.parameters()]
indices = next(iter(sampler))
model(torch.ones(8, 3)[indices]).square().mean().backward()
optimizer.step(indices)
assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters()))
print(rn.__file__)
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Return the output of a command that no path of this process reaches."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the source archive, and with the wheel that was built from it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    return out


@pytest.fixture(scope="module")
def fresh(built, tmp_path_factory):
    """An environment that holds the wheel; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    # A line of a .pth file adds a folder, and not the .pth files there: the editable install stays
    # out of sight.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    return folder


def test_the_wheel_runs_without_the_source_tree(fresh):
    out = run(fresh / "bin" / "rootnoise", "factorize", "--steps", "20", "--json", cwd=fresh)
    assert json.loads(out)["mechanism"] == "bsr"
    file = run(fresh / "bin" / "python", "-c", STEP, cwd=fresh)
    assert Path(file.strip()).is_relative_to(fresh)


def test_the_wheel_has_types_and_nothing_but_the_package(fresh):
    (site,) = fresh.glob("lib/*/site-packages")
    assert (site / "rootnoise" / "py.typed").is_file()
    names = {path.name for path in site.iterdir() if not path.name.startswith("rootnoise-")}
    assert names - {"dependencies.pth", "__pycache__"} == {"rootnoise"}


def test_the_tests_of_the_source_archive_collect(built, fresh, tmp_path):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    for name in ("benchmarks", "examples", "papers", "src", "tests"):
        kinds = (".py", ".md", ".csv", ".png")
        here = {p.relative_to(ROOT) for p in (ROOT / name).rglob("*") if p.suffix in kinds}
        there = {p.relative_to(source) for p in (source / name).rglob("*") if p.suffix in kinds}
        assert here == there
        assert there
    command = [fresh / "bin" / "python", "-m", "pytest", "--collect-only", "-q", "-n0", "tests"]
    assert "test_dist.py" in run(*command, "-p", "no:cacheprovider", cwd=source)
