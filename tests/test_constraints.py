"""Every requirement has an exact version, and a release that breaks the tests is named."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
FILE = ROOT / "tools" / "constraints.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("constraints", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_requirement_has_an_exact_version_in_its_range(tool):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pinned = tool.read()
    for line in [*tool.requirements(project), *tool.EDITABLES, *tool.WITHOUT_DEPENDENCIES]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(pinned[tool.canonical(wanted.name)]), line


def test_the_file_holds_on_every_machine(tool):
    for line in tool.FILE.read_text().splitlines():
        assert re.fullmatch(r"#.*|[a-z0-9-]+==[\w.]+", line), line  # no local version such as +cpu
        assert not line.startswith(("nvidia-", "cuda-", "triton=="))


def test_what_the_makefile_installs_by_name_is_in_the_file(tool):
    recipes = (ROOT / "Makefile").read_text()
    named = re.findall(
        r"^\t\$\(INSTALL\) (?:--no-deps )?([^-\n][^\n]*)$", recipes, flags=re.MULTILINE
    )
    names = [
        tool.canonical(Requirement(word.strip('"')).name) for line in named for word in line.split()
    ]
    assert {"torch", "hatchling"} <= set(names) <= tool.read().keys()


def test_a_release_that_breaks_tests_is_named_with_its_failures(tool, tmp_path, monkeypatch):
    pins = "".join(
        f"{name}=={version}\n" for name, version in tool.read().items() if name != "transformers"
    )
    monkeypatch.setattr(tool, "FILE", tmp_path / "constraints.txt")
    tool.FILE.write_text(f"{pins}transformers==4.0\nabsent==1\n")
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite><testcase name='a'><failure message='no'>\n"
        ".venv/lib/python3.11/site-packages/transformers/models/llama4/modeling_llama4.py:1318: "
        "AttributeError</failure></testcase><testcase name='b'/></testsuite></testsuites>"
    )
    lines = tool.compare(tool.failures(report))
    said = [line for line in lines if line.startswith("transformers: 4.0 -> ")]
    assert len(said) == 1
    assert said[0].endswith("in the traceback of 1 of 1 failures")
    assert not [line for line in lines if line.startswith("absent")]
