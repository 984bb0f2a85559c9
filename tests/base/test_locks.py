"""Only one process at a time writes into a folder."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from transom.base import locks
from transom.base.errors import RequestError
from transom.base.locks import FolderLock, output_folder
from transom.cli.main import main

SOURCE = str(Path(__file__).parents[2] / "src")
HOLD = (
    "import sys, transom.base.locks as c; lock = c.FolderLock(sys.argv[1]); print('held', "
    "flush=True); sys.stdin.read()"
)
WAIT = (
    "import sys, pathlib, transom.base.locks as c\n"
    "with c.FolderLock(sys.argv[1], wait=True):\n"
    "    print(pathlib.Path(sys.argv[1], 'done').exists(), flush=True)"
)


def python(code: str, *words: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        env={**os.environ, "PYTHONPATH": SOURCE},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def is_held(process: subprocess.Popen) -> bool:
    return process.stdout.readline().strip() == "held"


@pytest.fixture
def other(tmp_path):
    """Another process that writes into `tmp_path / "run"`."""
    process = python(HOLD, tmp_path / "run")
    assert is_held(process)
    yield process
    process.kill()
    with process:  # closes its pipes
        pass


def test_a_folder_of_another_process_is_refused_by_name(tmp_path, other):
    with pytest.raises(RequestError) as told:
        FolderLock(tmp_path / "run")
    assert str(tmp_path / "run") in str(told.value) and f"process {other.pid} on" in str(told.value)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(RequestError):
        FolderLock(tmp_path / "link")
    FolderLock(tmp_path / "another").release()


@pytest.mark.parametrize(
    "end", [signal.SIGKILL, signal.SIGTERM, None], ids=["killed", "terminated", "ended"]
)
def test_a_lock_ends_with_its_process(tmp_path, end):
    process = python(HOLD, tmp_path / "run")
    assert is_held(process)
    process.communicate() if end is None else process.send_signal(end)
    process.wait()
    with FolderLock(tmp_path / "run"):
        assert len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.iterdir())


def test_one_process_may_lock_a_folder_and_what_is_in_it_again(tmp_path):
    outer = FolderLock(tmp_path / "run")
    with FolderLock(tmp_path / "run"), FolderLock(tmp_path / "run" / "step"):
        pass
    process = python(HOLD, tmp_path / "run")
    assert not is_held(process)
    process.communicate()
    outer.release()
    outer.release()
    assert not list(tmp_path.iterdir())


def test_a_second_process_can_wait(tmp_path, other):
    waiting = python(WAIT, tmp_path / "run")
    assert f"waiting for process {other.pid}" in waiting.stderr.readline()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "done").touch()
    other.communicate()
    assert waiting.communicate()[0].strip() == "True"


def test_folders_made_for_the_lock_go_with_it(tmp_path):
    FolderLock(tmp_path / "a" / "b" / "run").release()
    assert not list(tmp_path.iterdir())
    with FolderLock(tmp_path / "a" / "b" / "run"):
        (tmp_path / "a" / "kept").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]


def test_a_file_system_without_locks_gets_a_line(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with FolderLock(tmp_path / "run"):
        pass
    assert "No locks available" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_not_taken_for_one_that_is_written(tmp_path, monkeypatch):
    def refuse(*_):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(locks.os, "open", refuse)
    with pytest.raises(RequestError, match="cannot be made"):
        FolderLock(tmp_path / "run")


def test_a_folder_whose_parent_cannot_be_written_gets_a_line(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "run").mkdir()
    monkeypatch.setattr(locks.os, "open", refuse)
    with FolderLock(tmp_path / "run"):
        pass
    assert "nothing keeps another process from writing there" in capsys.readouterr().err


def test_an_output_folder_is_locked_before_it_is_looked_at(tmp_path, other):
    with (
        pytest.raises(RequestError, match=f"process {other.pid}"),
        output_folder(tmp_path / "run", overwrite=True),
    ):
        pass


@pytest.mark.parametrize(
    "words", [["convert", "model", "RUN"], ["merge", "base", "adapter", "RUN"]]
)
def test_verbs_that_write_a_folder_are_refused(tmp_path, other, capsys, words):
    assert main([str(tmp_path / "run") if word == "RUN" else word for word in words]) == 2
    assert f"process {other.pid}" in capsys.readouterr().err


def test_train_is_refused_and_leaves_the_folder_alone(tmp_path, other, capsys):
    from tests.training.runs import tiny_config

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    config = tiny_config(tmp_path)
    words = [f"{name}={config[name]}" for name in ("out", "model", "data", "tokenizer")]
    for more in ([], ["--overwrite"], ["--resume"]):
        assert main(["train", *words, *more]) == 2
        assert f"process {other.pid}" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "{}\n"


@pytest.mark.slow
def test_of_two_commands_started_together_one_trains(tmp_path):
    from tests.training.runs import losses, tiny_config
    from tests.training.test_trainer import command, start

    tiny_config(tmp_path)
    both = [start(command(tmp_path, ["steps=40"])) for _ in range(2)]
    codes = sorted(process.wait() for process in both)
    assert codes == [0, 2]
    assert len(losses(tmp_path / "run")) == 40


def test_an_adapter_is_not_written_where_another_process_writes(tmp_path, other):
    from tests.helpers import random_model, tiny_args
    from transom.checkpoints.adapters.write import save_adapter
    from transom.lora.apply import apply_lora
    from transom.lora.args import LoraArgs

    model = random_model(tiny_args())
    apply_lora(model, LoraArgs(rank=2), quiet=True)
    with pytest.raises(RequestError, match=f"process {other.pid}"):
        save_adapter(model, tmp_path / "run", "default", base="base")
    assert not (tmp_path / "run").exists()
