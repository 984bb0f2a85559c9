"""`transom finetune`: words to a config, the whole chain on tiny folders, wrong requests as one
sentence.
"""

import json
import shlex

import pytest

from tests.training.finetune.runs import base_folder, chats
from transom.cli import demo, finetune
from transom.cli.finetune import config_of
from transom.cli.main import Parser, main
from transom.training.finetune import config as finetune_config

FAST = ("dtype=float32", "threads=1", "device=cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    where = tmp_path_factory.mktemp("finetune")
    return base_folder(where / "model"), chats(where / "rows.jsonl")


def parsed(*words):
    parser = Parser()
    finetune.add_arguments(parser)
    return config_of(parser.parse_intermixed_args([str(word) for word in words]))


def test_the_chain_of_folders(folders, tmp_path, capsys, monkeypatch):
    base, rows = folders
    run = tmp_path / "run"
    words = [
        "finetune",
        base,
        "--data",
        rows,
        "--iters",
        4,
        "--batch-size",
        2,
        "--out",
        run,
        *FAST,
        "--json",
    ]
    assert main([str(word) for word in words]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["steps"] == 4 and facts["held_out_loss"] > 0 and facts["trained_parameters"] > 0
    monkeypatch.setattr("sys.stdin", open("/dev/null"))  # noqa: SIM115, PTH123 - a chat that ends at once
    assert main(["chat", str(run)]) == 0
    assert main(["merge", str(run)]) == 0
    merged = tmp_path / "run-merged"
    assert json.loads((merged / "merge_report.json").read_text())
    assert main(["generate", str(merged), "--prompt", "Capital", "--max-tokens", "3"]) == 0
    capsys.readouterr()
    (run / "best").unlink()
    assert (
        main(["finetune", str(run), "--resume", "--quiet"]) == 0
    )  # a finished run is measured again
    assert "resumed at step 4 of 4" in capsys.readouterr().err


def test_the_next_commands_can_be_pasted_into_a_shell(folders, tmp_path):
    for command in (
        finetune.next_commands(parsed(folders[0], "--data", folders[1], "--out", "exp #2"))
    ).splitlines():
        words = shlex.split(command, comments=True)
        assert words[:1] != ["transom"] or words[2] == "exp #2"
    assert "transom chat 'exp #2'" in demo.next_commands("exp #2")


def test_flags_words_and_file_in_order(folders, tmp_path):
    base, rows = folders
    config = tmp_path / "config.yaml"
    config.write_text("finetune: {lora: {rank: 3}, epochs: 5}\noptimizer: {eps: 1.0e-6}\n")
    args = parsed(
        base, config, "--data", rows, "--rank", 4, "finetune.lora.rank=5", f"out={tmp_path}/x"
    )
    assert (args.finetune.lora.rank, args.finetune.epochs, args.optimizer.eps) == (5, 5, 1e-6)
    assert (args.data.batch_size, args.optimizer.weight_decay) == (
        None,
        0.0,
    )  # what neither of them says
    assert args.data.seq_len == 256  # no longer than the model's


def test_a_python_user_gets_the_same_config(folders):
    words = ["finetune.method=full", "data.batch_size=4"]
    given = finetune_config.finetune_args(str(folders[0]), [str(folders[1])], words)
    assert given == parsed(folders[0], "--data", folders[1], *words)
    assert given.out == f"{folders[0]}-finetune" and given.data.batch_size == 4


def test_the_folder_of_a_config_file_is_kept(folders, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(f"out: {tmp_path}/mine\n")
    assert parsed(folders[0], config, "--data", folders[1]).out == f"{tmp_path}/mine"


@pytest.mark.parametrize(
    ("words", "rate"),
    [
        ((), 2e-4),
        (("--method", "full"), 2e-5),
        (("--objective", "dpo"), 2e-5),
        (("--learning-rate", 0.5), 0.5),
    ],
)
def test_the_rate_follows_the_method_unless_given(folders, words, rate, monkeypatch):
    monkeypatch.setattr(finetune_config, "SMALL_PARAMETERS", 0)
    assert parsed(folders[0], "--data", folders[1], *words).optimizer.lr == pytest.approx(rate)


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    """A run that wrote its last step."""
    run = tmp_path_factory.mktemp("finished") / "run"
    words = [
        "finetune",
        folders[0],
        "--data",
        folders[1],
        "--iters",
        2,
        "--batch-size",
        2,
        "--out",
        run,
        *FAST,
    ]
    assert main([str(word) for word in words]) == 0
    return run


RESUMED = {
    "another base": (["BASE2"], "MODEL: got"),
    "other rows": (["BASE", "--data", "other.jsonl"], "--data: got ['other.jsonl']"),
    "another config": (["BASE", "CONFIG"], "finetune.lora.dropout"),
    "another batch": (["BASE", "--batch-size", "4"], "data.batch_size"),
    "another rank": (["BASE", "--rank", "3"], "its finetune.lora.rank is"),
}


@pytest.mark.parametrize("case", RESUMED)
def test_only_the_same_run_is_resumed(folders, finished, tmp_path, capsys, case):
    words, sentence = RESUMED[case]
    other = base_folder(tmp_path / "other", dim=48)
    (tmp_path / "config.yaml").write_text("finetune: {lora: {dropout: 0.5}}\n")
    named = {"BASE": str(folders[0]), "BASE2": str(other), "CONFIG": str(tmp_path / "config.yaml")}
    given = [named.get(word, word) for word in words]
    assert main(["finetune", *given, "--out", str(finished), "--resume"]) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_the_same_command_resumes_whatever_has_been_saved(folders, tmp_path, capsys, monkeypatch):
    (tmp_path / "config.yaml").write_text("finetune: {lora: {rank: 3}}\nsave_every: 1\n")
    words = [
        folders[0],
        tmp_path / "config.yaml",
        "--data",
        folders[1],
        "--iters",
        2,
        "--batch-size",
        2,
    ]
    words = ["finetune", *map(str, words), "--out", str(tmp_path / "run"), *FAST, "--resume"]
    monkeypatch.setenv("HOME", str(tmp_path))
    at_home = [
        "out=~/run" if word == str(tmp_path / "run") else word for word in words if word != "--out"
    ]
    for same, told in (
        (words, "no step was saved yet"),
        (words, "step 2 of 2"),
        (at_home, "step 2 of 2"),
    ):
        assert main(same) == 0
        assert told in capsys.readouterr().err
    assert main([*words, "--iters", "3"]) == 2
    assert "its steps is 2" in capsys.readouterr().err


def test_a_run_is_not_written_over_its_base(finished, folders, capsys):
    words = [
        "finetune",
        str(finished),
        "--data",
        str(folders[1]),
        "--out",
        str(finished),
        "--overwrite",
    ]
    assert main(words) == 2
    assert (
        main(
            [
                "finetune",
                str(folders[0]),
                "--data",
                str(folders[1]),
                "--out",
                str(folders[0].parent),
            ]
        )
        == 2
    )
    assert "out: got" in capsys.readouterr().err
    assert (finished / "best").exists() and (folders[0] / "config.json").exists()


def test_an_adapter_on_weights_that_have_changed_is_refused(finished, folders, tmp_path, capsys):
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    moved = tmp_path / "run"
    shutil.copytree(finished, moved)
    changed = tmp_path / "model"
    shutil.copytree(folders[0], changed)
    weights = load_file(changed / "model.safetensors")
    weights["layers.0.attention.wq.weight"] *= 3
    save_file(
        {name: torch.clone(weight) for name, weight in weights.items()},
        changed / "model.safetensors",
    )
    step = next(moved.glob("step_*"))
    for name in ("adapter_config.json", "transom.json"):
        text = (step / name).read_text()
        (step / name).write_text(text.replace(str(folders[0].resolve()), str(changed)))
    (step / "sha256.json").unlink()
    assert main(["generate", str(step), "--prompt", "a", "--max-tokens", "1"]) == 2
    assert "fingerprint" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("rank", ["8", "1e1", "08"])
def test_the_scale_follows_the_rank_however_it_is_written(folders, rank):
    lora = parsed(folders[0], "--data", folders[1], f"finetune.lora.rank={rank}").finetune.lora
    assert lora.alpha == 2 * lora.rank == 2 * int(float(rank))


def test_a_name_of_a_run_is_no_yaml(folders):
    assert parsed(folders[0], "--data", folders[1], "--out", "exp #2: a").out == "exp #2: a"


def test_steps_replace_epochs(folders):
    assert parsed(folders[0], "--data", folders[1], "--iters", 7).finetune.epochs is None
    assert parsed(folders[0], "--data", folders[1]).finetune.epochs == "auto"


WRONG = {
    "no data": ([], "--data: got None"),
    "no such data": (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    "a method that is none": (["--data", "ROWS", "--method", "prefix"], "finetune.method"),
    "a field that is none": (["--data", "ROWS", "finetune.rank=3"], "finetune.rank"),
    "nothing to finetune": (["--data", "ROWS", "finetune=null"], "finetune: got None"),
    "a quantized base with all weights": (
        ["--data", "ROWS", "--method", "full", "--quantize", "nf4"],
        "quantize",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_one_sentence(folders, tmp_path, capsys, case):
    words, sentence = WRONG[case]
    given = [str(folders[1]) if word == "ROWS" else word for word in words]
    assert main(["finetune", str(folders[0]), *given, f"out={tmp_path}/run", *FAST]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert sentence in err[-1] and not (tmp_path / "run").exists()
