"""Make the environments of the rivals, .venv-rivals-NAME in the root: `install.py [NAME ...]`.

Each has pinned versions, and nothing of rootnoise. fastDP is on no package index: give a checkout
of its repository, `--fastdp FOLDER`, at the commit below; without it its column is "not installed".
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FASTDP_COMMIT = "3d5cc561aa337c72f79873ccc4fe8b900b5493b5"  # awslabs/fast-differential-privacy
TORCH = "torch==2.13.0"
PACKAGES = {
    "jax": ["jax-privacy==2.0.0", "jax==0.10.2", "dp-accounting==0.6.0"],
    "opake": [
        *(f"opake-{part}==0.16.1" for part in ("accounting", "dpftrl", "dpsgd", "optimizers")),
        TORCH,
    ],
    "fastdp": [TORCH, "transformers==4.57.1", "scipy==1.17.1"],
}


def install(name: str, fastdp: Path | None) -> None:
    """Make one environment, anew."""
    folder = ROOT / f".venv-rivals-{name}"
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pip = [folder / "bin/python", "-m", "pip", "--disable-pip-version-check", "-qq", "install"]
    subprocess.run([*pip, *PACKAGES[name]], check=True)
    if name == "fastdp" and fastdp is not None:
        packages = next(folder.glob("lib/python3*/site-packages"))
        shutil.copytree(fastdp / "fastDP", packages / "fastDP")


def main() -> None:
    """Make the environments that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PACKAGES))
    parser.add_argument("--fastdp", type=Path, help=f"a checkout of fastDP at {FASTDP_COMMIT[:7]}")
    options = parser.parse_args()
    for name in options.names or PACKAGES:
        if name not in PACKAGES:
            parser.error(f"NAME must be one of {', '.join(PACKAGES)}, got {name}")
        if name == "fastdp" and options.fastdp is None:
            print("fastDP needs --fastdp FOLDER: left out")
            continue
        install(name, options.fastdp)


if __name__ == "__main__":
    main()
