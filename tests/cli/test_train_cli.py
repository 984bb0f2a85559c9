"""`transom train` from the outside."""

import dataclasses
import json

import yaml

from tests.training.runs import tiny_config
from transom.cli.main import main
from transom.training.config import DataArgs, TrainArgs
from transom.training.optim.args import OptimizerArgs


def test_help_names_every_field_with_its_default(capsys):
    assert main(["train", "--help"]) == 0
    told = capsys.readouterr().out
    for prefix, cls in (("", TrainArgs), ("data.", DataArgs), ("optimizer.", OptimizerArgs)):
        for field in dataclasses.fields(cls):
            assert f"  {prefix}{field.name}: " in told
    assert "data.seq_len: length of a training row (tokens, default 256)" in told


def test_a_config_and_overrides_make_a_run(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_config(tmp_path)))
    assert (
        main(["train", str(tmp_path / "config.yaml"), "steps=3", "optimizer.lr=2e-3", "--json"])
        == 0
    )
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["steps"], told["train_tokens"]) == (3, 3 * 4 * 32)
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (stored["steps"], stored["optimizer"]["lr"]) == (3, 0.002)
    assert (tmp_path / "run" / "report.html").exists()


def test_a_run_without_held_out_text_says_so_and_scores_nothing(tmp_path, capsys):
    config = tiny_config(tmp_path)
    config["data"]["held_out"] = 0
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(tmp_path / "config.yaml"), "steps=1", "eval_every=0"]) == 0
    err = capsys.readouterr().err
    assert err.count("nothing is held out") == 1 and "scoring held-out text" not in err


def test_overrides_change_the_default_preset():
    from transom.training.config import read_config

    args = read_config(None, ["model.dim=192", "data.sources=somewhere"]).model_args(None)
    assert (args.dim, args.n_layers, args.max_seq_len) == (192, 4, 256)


def test_unknown_verbs_and_flags_are_one_sentence(capsys):
    assert main(["trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err
    assert main(["train", "--resme"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_path_with_an_equals_sign_is_a_config_and_an_ended_run_says_so(tmp_path, capsys):
    config = tmp_path / "lr=1 #2.yaml"
    out = tmp_path / "runs = a" / "lr=1e-3: #2"
    config.write_text(yaml.safe_dump(tiny_config(tmp_path)))
    assert main(["train", str(config), "steps=1", f"out={out}", "--quiet"]) == 0
    assert "nothing is left" not in capsys.readouterr().err
    assert main(["train", str(out), "--resume", "--quiet"]) == 0
    assert "the run has ended; nothing is left to train" in capsys.readouterr().err
    assert (out / "report.html").exists()
