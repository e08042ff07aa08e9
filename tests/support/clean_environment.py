"""A virtual environment that has everything installed here but optimum-sieve."""

from __future__ import annotations

import sys
import sysconfig
import venv
from pathlib import Path


def make_clean_environment(root: Path) -> Path:
    """Make it below `root`, and return its Python.

    It holds links to everything installed, but no `.pth` files, which is how editable installations are found.
    """
    venv.create(root / "venv", with_pip=False, symlinks=True)
    base = {"base": str(root / "venv")}
    target = Path(sysconfig.get_path("purelib", vars=base))
    sources = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    # An environment of `make compatibility` lies in front of another one.
    sources += [path for path in sys.path if Path(path).name == "site-packages"]
    for source in dict.fromkeys(sources):
        for entry in Path(source).iterdir():
            if entry.suffix != ".pth" and "optimum_sieve" not in entry.name and not (target / entry.name).exists():
                (target / entry.name).symlink_to(entry)
    return Path(sysconfig.get_path("scripts", vars=base)) / "python"
