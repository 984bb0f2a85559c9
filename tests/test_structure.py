"""What the documents say about the tree is true, and the front of the house stays light."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.helpers import run_python

ROOT = Path(__file__).parents[1]


def tree_in_docs() -> set[str]:
    text = (ROOT / "docs" / "architecture.md").read_text()
    block = text.split("```")[1]
    names, folder = set(), ""
    for line in block.splitlines()[2:]:
        indent = len(line) - len(line.lstrip())
        for name in re.findall(r"[\w.]+(?:\.py|/)", line):
            if name.endswith("/"):
                folder = name
            else:
                names.add(name if indent == 2 else folder + name)
    return names


def test_the_tree_in_the_docs_is_the_tree_on_disk():
    package = ROOT / "src" / "transom"
    disk = {str(p.relative_to(package)) for p in package.rglob("*.py")}
    disk = {name for name in disk if not name.endswith("/__init__.py")}
    assert tree_in_docs() == disk


@pytest.mark.parametrize(
    "module", ["transom", "transom.cli.main", "transom.training.config", "transom.planning.counts"]
)
def test_light_modules_leave_torch_alone(module):
    assert run_python(f"import {module}, sys; print('torch' in sys.modules)").strip() == "False"


def test_every_public_name_resolves():
    import transom

    assert all(getattr(transom, name) is not None for name in transom.__all__)
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        _ = transom.LMM


def test_every_dependency_has_its_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    reasons = (ROOT / "docs" / "dependencies.md").read_text()
    for requirement in (*project["dependencies"], *project["optional-dependencies"]["parquet"]):
        name, bounds = re.match(r"([\w-]+)(.*)", requirement).groups()
        assert f"| {name} | `{bounds}`" in reasons, requirement


def test_no_file_is_too_long():
    listed = subprocess.run(["git", "ls-files", "src"], cwd=ROOT, capture_output=True, text=True, check=False)
    long = {n: c for n in listed.stdout.split() if (c := len((ROOT / n).read_text().splitlines())) > 400}
    assert not long
    model = [*ROOT.glob("src/transom/layers/*.py"), ROOT / "src/transom/model.py"]
    assert sum(len(p.read_text().splitlines()) for p in model) <= 1500
