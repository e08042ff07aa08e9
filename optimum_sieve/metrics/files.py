"""The files of a module of the evaluate library: found or downloaded, and hashed, but not run.

`evaluate.load` would take a Hub id itself, but runs whatever revision is cached if it does not get the one that it was
asked for. So files are downloaded here, and evaluate loads a path.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from optimum_sieve._messages import cut


# evaluate copies the files that a module imports in this way, and no others.
_RELATIVE_IMPORT = re.compile(r"^(?:from\s+\.(\w+)[\w.]*\s+import|import\s+\.(\w+))", flags=re.MULTILINE)


def is_path(module: str) -> bool:
    """Whether a module is named by a local path: it begins with `.`, `/` or `~`, or ends in `.py`."""
    return module.startswith((".", "/", "~")) or module.endswith(".py") or Path(module).is_absolute()


def module_name(module: str) -> str:
    """Return the last part of a Hub id or path, without `.py`."""
    return Path(module).name.removesuffix(".py")


def find_script(module: str, revision: str | None) -> Path:
    """Return the file of a module: the path itself, `name/name.py` of a directory, or one from the Hub or its cache.

    Raises:
        FileNotFoundError: If there is none.
    """
    if not is_path(module):
        return _download(module, revision)
    path = Path(module)
    script = path if path.suffix == ".py" else path / f"{path.name}.py"
    # It is no device, and its name may have any length.
    if not os.path.isfile(script):
        raise FileNotFoundError(
            f"`metric.evaluate` must be a Hub id, a `.py` file or a directory `name` with `name.py`, got no file "
            f"{cut(str(script))}. Paths are relative to the task file."
        )
    return script


def files_digest(script: Path) -> str:
    """Return the SHA-256 of the file of a module and of the files next to it that it imports."""
    digest = hashlib.sha256()
    for file in (script, *(script.with_name(name) for name in _imported(script))):
        if os.path.isfile(file):
            digest.update(f"{file.name}\n".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _imported(script: Path) -> list[str]:
    code = script.read_bytes().decode(errors="replace")
    return sorted({f"{first or second}.py" for first, second in _RELATIVE_IMPORT.findall(code)})


def _download(module: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    repository = module if "/" in module else f"evaluate-metric/{module}"
    try:
        script = Path(hf_hub_download(repository, f"{module_name(module)}.py", repo_type="space", revision=revision))
        for name in _imported(script):
            # The directory has the name of the commit.
            hf_hub_download(repository, name, repo_type="space", revision=script.parent.name)
    except (OSError, HFValidationError) as error:
        of = f" of revision {revision!r}" if revision else ""
        raise FileNotFoundError(
            f"`metric.evaluate` must be a metric on the Hub or in its cache, or a path, got {module!r}{of} "
            f"({cut(str(error))}). Begin a path with `./`."
        ) from error
    return script
