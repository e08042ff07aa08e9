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
    # An environment of `make compatibility` adds its packages to those of another one, and comes first.
    sources += [path for path in sys.path if Path(path).name == "site-packages"]
    taken = set()
    for source in dict.fromkeys(sources):
        for entry in Path(source).iterdir():
            # The metadata of a package have its version in their name.
            name = entry.name.partition("-")[0] if entry.suffix == ".dist-info" else entry.name
            key = (name, entry.suffix == ".dist-info")
            if entry.suffix != ".pth" and "optimum_sieve" not in name and key not in taken:
                taken.add(key)
                (target / entry.name).symlink_to(entry)
    return Path(sysconfig.get_path("scripts", vars=base)) / "python"
