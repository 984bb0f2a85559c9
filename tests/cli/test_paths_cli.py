"""Paths of the command line that begin with `~`, as in `--out=~/x`, which shells leave as it is."""

from tests.helpers import random_model, tiny_args
from transom.checkpoints.save import save
from transom.cli.chat import named_adapters
from transom.tokenizers.training import byte_tokenizer


def test_the_home_folder_is_found_and_written_to(call, tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    save(random_model(tiny_args(vocab_size=258)), home / "model", tokenizer=byte_tokenizer())
    (home / "text.txt").write_text("a b c\n" * 50)
    assert call("generate", "~/model", "-p", "~/a", "-m", 2)[0] == 0
    assert call("convert", "~/model", "~/copy")[0] == 0
    assert call("embed", "~/model", "--text", "~", "--out=~/v.npy")[0] == 0
    assert (
        call("eval", "~/model", "--data", "~/text.txt", "--out=~/e.json", "--rows=~/r.jsonl")[0]
        == 0
    )
    assert call("inspect", "~/model", "~/copy")[0] == 0
    assert {"copy", "v.npy", "e.json", "r.jsonl"} <= {path.name for path in home.iterdir()}
    assert not list(here.iterdir())
    assert named_adapters(["a=~/model"]) == {"a": str(home / "model")}


def test_texts_keep_their_tilde(call, tmp_path):
    folder = tmp_path / "model"
    save(random_model(tiny_args(vocab_size=258)), folder, tokenizer=byte_tokenizer())
    _, out, _ = call("generate", folder, "-p", "~/a", "-p", "b", "-m", 1)
    assert "'~/a'" in out
