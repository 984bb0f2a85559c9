"""What a run writes is whole or absent, and never somebody else's."""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.training.finetune.runs import base_folder, chats, run_args
from tests.training.runs import tiny_args, tiny_config, write_corpus
from transom.base.errors import RequestError, WorkError
from transom.base.fields import read
from transom.checkpoints.files import checksums
from transom.checkpoints.load import load
from transom.checkpoints.save import save
from transom.cli.main import main
from transom.training.config import TrainArgs, read_config
from transom.training.loop.setup import open_run
from transom.training.report.report import write_report


@pytest.fixture
def finished(tmp_path):
    open_run(tiny_args(tmp_path, "keep_last=3"), quiet=True).fit()
    return tmp_path


def test_keeps_the_last_steps_and_the_best(tmp_path):
    trainer = open_run(
        tiny_args(tmp_path, "save_every=2", "keep_last=2", "eval_every=2"), quiet=True
    )
    marks = iter([9.0, 1.0, 5.0, 5.0, 5.0, 5.0, 5.0])  # step 4 is the best
    score = trainer.evaluate

    def fake(max_tokens, **key):
        measured = score(max_tokens, **key)
        return replace(measured, loss_sum=next(marks) * measured.bytes)

    trainer.evaluate = fake
    trainer.fit()
    steps = sorted(p.name for p in (tmp_path / "run").glob("step_*"))
    assert steps == ["step_000004", "step_000010", "step_000012"]
    assert (tmp_path / "run" / "best").read_text().strip() == "step_000004"


def test_a_run_folder_stands_for_its_best_step(finished, capsys):
    load(finished / "run")
    assert "using best step step_000012" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["cut", "altered", "removed"])
def test_a_damaged_checkpoint_is_refused_by_name(finished, damage):
    file = finished / "run" / "step_000012" / "model.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "removed":
        file.unlink()
    else:
        content[-1] ^= 1
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    with pytest.raises(RequestError, match=r"step_000012/model\.safetensors"):
        open_run(tiny_args(finished, "keep_last=3"), resume=True, quiet=True)


@pytest.mark.parametrize("sums", ["with checksums", "without"])
def test_a_cut_file_is_refused_when_loading(finished, sums):
    file = finished / "run" / "step_000012" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    if sums == "without":
        (file.parent / "sha256.json").unlink()
    with pytest.raises(
        RequestError, match="altered or cut" if sums == "with checksums" else "not a complete"
    ):
        load(finished / "run")


def test_a_load_hashes_what_a_model_is_made_of(finished, monkeypatch):
    """The state of the trainer is most of a step, and only a run that goes on reads it."""
    hashed = []
    made = checksums.sha256_of
    monkeypatch.setattr(checksums, "sha256_of", lambda path: hashed.append(path.name) or made(path))
    step = finished / "run" / "step_000012"
    load(step)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(hashed)
    assert not {"trainer.json", "trainer.safetensors"} & set(hashed)
    (step / "trainer.safetensors").write_bytes(b"")
    load(step)
    with pytest.raises(RequestError, match=r"trainer\.safetensors: altered or cut"):
        open_run(tiny_args(finished, "keep_last=3"), resume=True, quiet=True)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_an_altered_part_of_a_model_is_refused_when_loading(finished, name):
    file = finished / "run" / "step_000012" / name
    file.write_text(file.read_text() + " ")
    with pytest.raises(RequestError, match="altered or cut"):
        load(finished / "run")


def test_weights_that_were_added_to_a_step_are_refused(finished):
    step = finished / "run" / "step_000012"
    save(load(step), finished / "shards", max_shard_size="9KB")
    (step / "model.safetensors").rename(finished / "whole.safetensors")
    sums = json.loads((step / "sha256.json").read_text())
    del sums["model.safetensors"]
    for path in (finished / "shards").glob("model*"):
        path.rename(step / path.name)
        sums[path.name] = checksums.sha256_of(step / path.name)
    (step / "sha256.json").write_text(json.dumps(sums))
    load(step)
    (finished / "whole.safetensors").rename(step / "model.safetensors")
    with pytest.raises(RequestError, match=r"model\.safetensors: added since the step was written"):
        load(step)


def test_latest_is_whole_whenever_a_save_is_killed(finished, monkeypatch):
    """The same step saved twice must not pass through a moment without it."""
    trainer = open_run(tiny_args(finished, "keep_last=3"), resume=True, quiet=True)
    monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("the latest step was moved"))
    trainer.save(None)
    assert (finished / "run" / "step_000012" / "model.safetensors").exists()


def test_a_full_disk_loses_nothing(finished, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = open_run(tiny_args(finished, "keep_last=3"), resume=True, quiet=True)
    trainer.progress.step += 1
    before = {p: p.read_bytes() for p in (finished / "run").rglob("*") if p.is_file()}
    monkeypatch.setattr("transom.checkpoints.files.safetensors_files._write_tensor", full)
    with pytest.raises(WorkError, match="No space left"):
        trainer.save(None)
    assert {p: p.read_bytes() for p in (finished / "run").rglob("*") if p.is_file()} == before
    assert not list((finished / "run").glob("*.tmp-*"))


def test_an_occupied_folder_is_refused(finished):
    with pytest.raises(RequestError, match="--overwrite or --resume"):
        open_run(tiny_args(finished), quiet=True)


def test_overwrite_never_removes_foreign_files(finished):
    thesis = finished / "run" / "thesis.tex"
    thesis.write_text("five years of work")
    with pytest.raises(RequestError, match=r"thesis\.tex"):
        open_run(tiny_args(finished), overwrite=True, quiet=True)
    assert thesis.read_text() == "five years of work"


def test_a_wrong_corpus_does_not_cost_the_run(finished):
    data = {**tiny_config(finished)["data"], "sources": [str(finished / "nowhere")]}
    with pytest.raises(RequestError, match="nowhere"):
        open_run(tiny_args(finished, data=data), overwrite=True, quiet=True)
    assert (finished / "run" / "latest").exists()


def test_resume_refuses_another_run(finished):
    with pytest.raises(RequestError, match="belongs to another run: its seed"):
        open_run(tiny_args(finished, "seed=1", "keep_last=3"), resume=True, quiet=True)


def edit(path, **changes):
    config = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**config, **changes}))


@pytest.mark.parametrize("where", ["the run's config.yaml", "a config of one's own", "a word"])
def test_a_change_between_two_sittings_is_treated_alike_wherever_it_is_made(
    finished, capsys, where
):
    own = finished / "own.yaml"
    own.write_text(yaml.safe_dump(tiny_config(finished, keep_last=3)))

    def resume(**changes):
        if where == "a word":
            return main(
                [
                    "train",
                    str(own),
                    "--resume",
                    *(f"{name}={value}" for name, value in changes.items()),
                ]
            )
        path = finished / "run" / "config.yaml" if where.startswith("the run") else own
        edit(path, **changes)
        return main(["train", str(path.parent if path != own else own), "--resume"])

    assert resume(keep_last=2) == 0
    assert "keep_last: 3 -> 2" in capsys.readouterr().err
    config = yaml.safe_load((finished / "run" / "config.yaml").read_text())
    facts = json.loads((finished / "run" / "run.json").read_text())
    assert config["keep_last"] == facts["config"]["keep_last"] == 2
    assert resume(keep_last=2, seed=1, accumulate=2) == 2
    told = capsys.readouterr().err
    assert "its seed is 0, the config says 1" in told and "its accumulate is 1" in told


def test_the_stored_config_is_the_given_one_and_what_followed_from_the_data_stands_beside_it(
    tmp_path,
):
    base, data = base_folder(tmp_path / "model"), chats(tmp_path / "rows.jsonl")
    given = run_args(
        tmp_path, base, data, "data.batch_size=null", "finetune.epochs=2", "finetune.scores=2"
    )
    trainer = open_run(given, quiet=True)
    assert read_config(tmp_path / "run" / "config.yaml") == given
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert read(TrainArgs, facts["config"]) == given
    assert read(TrainArgs, facts["resolved"]) == trainer.args != given
    trainer.fit()
    again = open_run(given, resume=True, quiet=True)
    assert again.args == trainer.args


def test_resume_refuses_changed_text(finished):
    args = tiny_args(finished, "keep_last=3")
    (finished / "corpus" / "00.txt").write_text("something else")
    with pytest.raises(RequestError, match="got changed data"):
        open_run(args, resume=True, quiet=True)


def test_a_run_below_its_own_sources_is_none_of_them(tmp_path, monkeypatch):
    monkeypatch.chdir(write_corpus(tmp_path / "corpus"))
    data = {**tiny_config(tmp_path)["data"], "sources": ".", "cache_dir": "cache"}
    for out in ("runs/first", "runs/second"):
        first = open_run(tiny_args(tmp_path, f"out={out}", "steps=4", data=data), quiet=True)
        first.fit()
    write_report(Path("runs/second"))
    again = open_run(
        tiny_args(tmp_path, "out=runs/second", "steps=4", data=data), resume=True, quiet=True
    )
    assert again.data.hashes == first.data.hashes


def test_resume_names_the_source_that_has_changed(tmp_path):
    base = base_folder(tmp_path / "model")
    paths = [chats(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    args = run_args(tmp_path, base, paths[0], f"data.sources=[{paths[0]}, {paths[1]}]", "steps=2")
    open_run(args, quiet=True).fit()
    paths[1].write_text(paths[1].read_text().replace("Paris", "Lyon"))
    with pytest.raises(RequestError, match=r"b\.jsonl: got changed data") as told:
        open_run(args, resume=True, quiet=True)
    assert "a.jsonl" not in str(told.value)


def test_two_sources_of_one_name_are_refused(tmp_path):
    data = {
        **tiny_config(tmp_path)["data"],
        "sources": [{"path": "a", "name": "x"}, {"path": "b", "name": "x"}],
    }
    with pytest.raises(RequestError, match=r"data\.sources: got 'x'"):
        open_run(tiny_args(tmp_path, data=data), quiet=True)


def test_unfinished_checkpoints_are_removed(finished):
    leftover = finished / "run" / "step_000099.tmp-1"
    leftover.mkdir()
    open_run(tiny_args(finished, "keep_last=3"), resume=True, quiet=True)
    assert not leftover.exists()


def test_run_json_says_what_was_run(finished):
    facts = json.loads((finished / "run" / "run.json").read_text())
    assert facts["config"]["steps"] == 12
    assert len(facts["data"][str(finished / "corpus")]) == 64
    assert facts["machine"]["torch"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.batch_size=0"], "data.batch_size: got 0"),
        (["data.seq_len=128"], "data.seq_len: got 128"),
        (["stepz=3"], "did you mean 'steps'"),
        (["model.n_heads=3"], "n_heads: got 3"),
        (["tokenizer.kind=bpe", "tokenizer.vocab_size=50000"], "50000"),
        (["model.vocab_size=10"], "model.vocab_size: got 10"),
        (["data.sources=/nowhere/at/all"], "/nowhere/at/all"),
        (["data.sources=[]"], "data.sources"),
        (["optimizer.lr=fast"], "optimizer.lr: got 'fast'"),
        (["nonsense"], "key=value"),
    ],
)
def test_a_wrong_request_is_one_sentence(tmp_path, capsys, words, told):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_config(tmp_path)))
    assert main(["train", str(tmp_path / "config.yaml"), *words]) == 2
    lines = [
        line for line in capsys.readouterr().err.splitlines() if not line.startswith("transom: /")
    ]
    assert told in lines[-1]
    assert "Traceback" not in "".join(lines)
    assert not Path(tmp_path / "run").exists()


@pytest.mark.parametrize("gone", ["best", "latest"])
def test_a_step_deleted_by_hand_does_not_end_a_healthy_run(tmp_path, capsys, gone):
    trainer = open_run(tiny_args(tmp_path, "save_every=2", "eval_every=2", "steps=8"), quiet=True)
    run, real = tmp_path / "run", trainer.save

    def save(measured):
        real(measured)
        if trainer.progress.step == 4:
            shutil.rmtree(run / (run / gone).read_text().strip())
            trainer.progress.best = 0.0  # no later step is a better one

    trainer.save = save
    trainer.fit()
    assert (run / "latest").read_text().strip() == "step_000008"
    load(run)
    assert "the step that `best` names is missing" in capsys.readouterr().err


def test_a_kill_while_a_run_is_overwritten_leaves_nothing_of_it_to_resume(finished, monkeypatch):
    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            open_run(tiny_args(finished, "seed=1"), overwrite=True, quiet=True)
    assert list((finished / "run").glob("step_*"))
    trainer = open_run(tiny_args(finished, "seed=1"), resume=True, quiet=True)
    assert trainer.progress.step == 0
    assert not list((finished / "run").glob("step_*"))
