"""`transom merge` from the outside: which folder is which, what is printed, and what is refused."""

import json
import re

import pytest
from safetensors.torch import load_file

from tests.checkpoints.adapters.folders import write_adapter, write_base, write_run

DATA = ("--data", __file__)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("merge")
    base = write_base(root / "base")
    write_adapter(root / "a", base, seed=1)
    write_adapter(root / "b", base, seed=2)
    write_run(root / "run", base)
    return root


def report(out):
    return json.loads(out.splitlines()[-1])


def test_a_run_alone_is_merged_beside_itself_and_the_next_verbs_take_it(made, call):
    code, out, err = call("merge", made / "run", *DATA)
    assert code == 0, err
    assert "base alone" in out and "kept: full-precision base; the only candidate" in out
    merged = made / "run-merged"
    assert f"next: transom verify merge {merged}; transom chat {merged}" in err
    assert call("verify", "merge", merged)[0] == 0
    code, out, err = call("generate", merged, "-p", "ab", "-m", "8", "--ignore-eos")
    assert code == 0, err
    assert out == call("generate", made / "run", "-p", "ab", "-m", "8", "--ignore-eos")[1]


def test_folders_are_told_by_their_order(made, call, tmp_path):
    for words, base, adapters in (
        ([made / "a", tmp_path / "1"], made / "base", ["a"]),
        ([made / "base", made / "a", tmp_path / "2"], made / "base", ["a"]),
        ([made / "base", made / "a", made / "b", tmp_path / "3"], made / "base", ["a", "b"]),
    ):
        code, out, err = call("merge", *words, *DATA, "--json")
        assert code == 0, err
        told = report(out)
        assert told["base"]["folder"] == str(base) and told["merged"] == str(words[-1])
        assert [one["folder"] for one in told["adapters"]] == [
            str(made / name) for name in adapters
        ]
        assert (words[-1] / "model.safetensors").exists()


def test_flags_reach_the_merge(made, call, tmp_path):
    words = (
        "--method",
        "dare",
        "--weights",
        "0.7,-0.3",
        "--density",
        "0.25",
        "--seed",
        "3",
        "--dtype",
        "float32",
    )
    code, out, err = call(
        "merge", made / "base", made / "a", made / "b", tmp_path / "out", *words, *DATA, "--json"
    )
    assert code == 0, err
    told = report(out)
    assert told["combine"] == {"method": "dare", "density": 0.25, "seed": 3}
    assert [one["weight"] for one in told["adapters"]] == [0.7, -0.3]
    assert told["data"]["source"] == __file__ and told["out"]["dtype"] == "float32"
    assert {str(t.dtype) for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {
        "torch.float32"
    }


def test_a_folder_in_the_way_is_replaced_when_told_so(made, call, tmp_path):
    assert call("merge", made / "a", tmp_path / "out", *DATA)[0] == 0
    before = load_file(tmp_path / "out" / "model.safetensors")
    code, _, err = call("merge", made / "b", tmp_path / "out", *DATA)
    assert code == 2 and "not empty; expected a new or empty folder, or --overwrite" in err
    assert call("merge", made / "b", tmp_path / "out", *DATA, "--overwrite")[0] == 0
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert any(not (after[key] == tensor).all() for key, tensor in before.items())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["base"], "expected an adapter or its run, not a complete model"),
        (["nowhere"], "got 'nowhere', no such folder"),
        (["base", "a"], "OUT: got .*an adapter, which is never overwritten"),
        (
            ["a", "OUT", "--density", "0.5"],
            "--density: got 0.5; valid only with --method ties or dare",
        ),
        (
            ["a", "OUT", "--method", "ties", "--seed", "1"],
            "--seed: got 1; valid only with --method dare",
        ),
        (["a", "OUT", "--method", "ties", "--density", "2"], "density: got 2.0"),
        (["a", "OUT", "--weights", "half"], "--weights: got 'half'; expected numbers"),
        (["a", "OUT", "--weights", "1,2"], "one for each of 1 adapters"),
        (["a", "OUT", "--format", "meta", "--dtype", "int4"], "dtype: got 'int4'"),
    ],
)
def test_wrong_requests_are_one_sentence(made, call, tmp_path, words, said):
    names = {"base": made / "base", "a": made / "a", "OUT": tmp_path / "out"}
    code, out, err = call("merge", *(names.get(word, word) for word in words))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(said, err)


def test_an_adapter_for_another_base_is_refused(made, call, tmp_path):
    other = write_base(tmp_path / "other", seed=9)
    code, out, err = call("merge", other, made / "a", tmp_path / "out")
    assert (code, out) == (2, "") and "expected the base that" in err
    assert not (tmp_path / "out").exists()


def test_biases_that_choose_experts_do_not_widen_what_is_written(call, tmp_path):
    """They are float32 in a model of bfloat16, whose weights stay bfloat16."""
    moe = {"num_experts": 4, "top_k": 2, "hidden_dim": 20, "balance": "bias"}
    base = write_base(tmp_path / "base", "native", moe_args=moe)
    adapter = write_adapter(tmp_path / "adapter", base)
    code, _, err = call("merge", base, adapter, tmp_path / "out", *DATA)
    assert code == 0, err
    kinds = {
        name: str(one.dtype)
        for name, one in load_file(tmp_path / "out" / "model.safetensors").items()
    }
    biases = {name for name in kinds if name.endswith("choice_bias")}
    assert biases and {kinds[name] for name in biases} == {"torch.float32"}
    assert {kind for name, kind in kinds.items() if name not in biases} == {"torch.bfloat16"}
