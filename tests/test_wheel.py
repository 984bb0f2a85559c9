"""The wheel alone provides transom: every file of the package, its commands, and a generation."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import transom
from tests.helpers import random_model, tiny_args
from transom.checkpoints.save import save
from transom.cli.main import main
from transom.tokenizers.training import byte_tokenizer

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "transom"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling", reason="builds the wheel; part of the dev extra")
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out], cwd=ROOT, check=True
    )
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Run a program of a new virtual environment that has the wheel; its dependencies are those of
    this one.
    """
    place = tmp_path_factory.mktemp("elsewhere")
    venv.create(place / "venv", with_pip=False)
    binaries = place / "venv" / "bin"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        binaries / "python",
        "--disable-pip-version-check",
        "-q",
    ]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", wheel], check=True)
    (site,) = (place / "venv").glob("lib/python*/site-packages")
    # A folder in a .pth file is searched, the .pth files in it are not read: no editable transom
    # comes with it.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def run(program: str, *words: str) -> str:
        done = subprocess.run(
            [binaries / program, *words],
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel):
    files = {
        path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert inside == {str(path.relative_to(ROOT / "src")) for path in files}
    assert {"transom/py.typed", "transom/chat/templates/chatml.jinja"} <= inside


def test_commands_of_the_installed_wheel_answer(installed):
    where = Path(installed("python", "-c", "import transom; print(transom.__file__)").strip())
    assert "site-packages" in where.parts and not where.is_relative_to(ROOT)
    assert transom.__version__ in installed("transom", "--version")
    assert "usage: transom demo" in installed("transom", "demo", "--help")


def test_the_installed_wheel_generates(installed, tmp_path, capsys):
    model = random_model(tiny_args(vocab_size=258, max_seq_len=64))
    save(model, tmp_path / "model", tokenizer=byte_tokenizer())
    words = (
        "generate",
        str(tmp_path / "model"),
        "--prompt",
        "import",
        "--temp",
        "0",
        "--max-tokens",
        "5",
    )
    told = installed("transom", *words)
    assert main(list(words)) == 0
    assert told == capsys.readouterr().out  # the greedy tokens that the source tree says
    assert told.strip()
