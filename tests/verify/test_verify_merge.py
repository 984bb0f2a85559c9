"""`verify merge`: green on what was merged rightly, red for each thing that is wrong afterwards."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.checkpoints.adapters.folders import write_adapter, write_base
from tests.mutations import merge_bugs
from transom.base.errors import RequestError
from transom.base.runtime import one_thread
from transom.cli.main import main
from transom.evaluation.merging import merge_folders
from transom.lora.args import CombineArgs
from transom.verify.findings import summarize
from transom.verify.merge import check


@pytest.fixture(autouse=True, scope="module")
def single_threaded():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("verify")
    base = write_base(root / "base")
    write_adapter(
        root / "adapter", base, modules_to_save=("norm",), targets=("all-linear", "output")
    )
    merge_folders(base, [root / "adapter"], root / "out", data=__file__)
    return root


def failing(model, adapter=None):
    findings = check(str(model), adapter=None if adapter is None else str(adapter))
    return {summary.comparison for summary in summarize(findings) if summary.failed}


def copied(made, folder):
    """The merged folder, to be changed."""
    return shutil.copytree(made / "out", folder / "out")


def test_adapters_and_merged_folders_are_green(made):
    assert (
        failing(made / "adapter")
        == failing(made / "base", made / "adapter")
        == failing(made / "out")
        == set()
    )


@pytest.mark.parametrize("method", ["linear", "ties", "dare"])
def test_several_adapters_are_made_again(made, tmp_path, method):
    for seed in (1, 2):
        write_adapter(tmp_path / str(seed), made / "base", seed=seed, targets=("ffn",))
    args = CombineArgs(method, (0.7, 0.3), seed=4)
    merge_folders(
        made / "base", [tmp_path / "1", tmp_path / "2"], tmp_path / "out", args=args, data=__file__
    )
    assert failing(tmp_path / "out") == set()


def test_a_weight_that_changed_since_is_found(made, tmp_path):
    out = copied(made, tmp_path)
    state = load_file(out / "model.safetensors")
    state["model.layers.1.mlp.down_proj.weight"][0] *= 4
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    assert failing(out) == {"written weights = formula"}


def test_an_adapter_that_changed_since_is_found(made, tmp_path):
    out = copied(made, tmp_path)
    report = json.loads((out / "merge_report.json").read_text())
    adapter = shutil.copytree(made / "adapter", tmp_path / "adapter")
    state = load_file(adapter / "adapter_model.safetensors")
    state[next(key for key in state if "q_proj.lora_B" in key)].mul_(2)
    save_file(state, adapter / "adapter_model.safetensors")
    report["adapters"][0]["folder"] = str(adapter)
    (out / "merge_report.json").write_text(json.dumps(report))
    assert failing(out) == {"written weights = formula"}


def test_a_merge_with_a_bug_is_found_in_its_folder_afterwards(made, tmp_path):
    with merge_bugs.other_base():
        merge_folders(made / "base", [made / "adapter"], tmp_path / "out", data=__file__)
    assert failing(tmp_path / "out") >= {"written weights = formula"}


def test_a_base_that_is_not_the_one_of_training_is_red(made, tmp_path):
    other = write_base(tmp_path / "other", seed=7)
    assert failing(other, made / "adapter") == {"base = base of the training"}


def test_what_cannot_be_verified_is_one_sentence(made, tmp_path):
    with pytest.raises(RequestError, match="expected an adapter or a merged folder"):
        failing(made / "base")
    out = copied(made, tmp_path)
    for content, said in (("{}", "not the report of a merge"), ("[]", "a JSON object")):
        (out / "merge_report.json").write_text(content)
        with pytest.raises(RequestError, match=said):
            failing(out)


def test_the_verb_takes_one_folder_or_two(made, capsys):
    for words, code in (
        (["merge", "adapter"], 0),
        (["merge", "base", "adapter"], 0),
        (["cache", "base", "adapter"], 2),
    ):
        what, *names = words
        assert main(["verify", what, *(str(made / name) for name in names)]) == code
    assert "adapter: got" in capsys.readouterr().err
