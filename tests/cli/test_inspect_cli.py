"""`transom inspect` as a person meets it."""

import json
from dataclasses import replace

import pytest
from safetensors.torch import save_file

from tests.helpers import run_python
from transom.args import ModelArgs
from transom.cli.main import main
from transom.model import LLM
from transom.planning import counts
from transom.presets import PRESETS, preset
from transom.tokenizer import byte_tokenizer

TINY = {
    "dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 24,
    "vocab_size": 260,
    "max_seq_len": 32,
    "moe_args": {"num_experts": 3, "top_k": 2, "hidden_dim": 20, "interleave_moe_layer_step": 2},
}


def write_model(folder):
    args = ModelArgs.from_dict(TINY)
    model = LLM(args)
    model.init_weights()
    byte_tokenizer().save(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "transom", **args.to_dict()}))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def inspect(capsys, *words):
    code = main(["inspect", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_printed_whole(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")  # a pipe is not a narrow terminal
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, out, err = inspect(capsys, name)
    assert code == 0 and err == ""
    assert "\x1b" not in out and "…" not in out
    assert all(line == line.rstrip() for line in out.splitlines())
    rows = [line for line in out.splitlines() if " q / " in line]
    assert len(rows) == len(set(map(repr, (replace(layer, index=0) for layer in preset(name).layers))))


def test_the_plan_of_llama3(capsys):
    _, out, _ = inspect(capsys, "llama3-8b")
    for words in ("8.03 B parameters in 32 layers", "0-31", "causal", "32 q / 8 kv x 128", "SwiGLU 14336"):
        assert words in out
    assert "14.96 GiB in bfloat16, 29.92 GiB in float32" in out
    assert "1 GiB in bfloat16, 2 GiB in float32, for one sequence of 8,192 tokens" in out


def test_json_has_the_exact_numbers(capsys):
    code, out, _ = inspect(capsys, "mixtral-8x7b", "--json", "--length", 100)
    document = json.loads(out.splitlines()[-1])
    args = preset("mixtral-8x7b")
    assert code == 0 and document["length"] == 100
    assert document["parameters"] == counts.parameters(args)
    assert document["active_parameters"] == counts.parameters(args, active_only=True)
    assert document["flops_per_token"] == counts.flops_per_token(args, 100)
    assert document["kv_bytes"]["bfloat16"] == counts.kv_bytes(args, 100, 2)
    assert [layer["index"] for layer in document["layers"]] == list(range(32))
    assert ModelArgs.from_dict(document["args"]) == args


def test_the_plan_needs_no_torch_and_no_time():
    code = (
        "import sys, time\n"
        "from transom.cli.main import main\n"
        "assert main(['inspect', 'llama4-scout']) == 0\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "print(time.process_time())\n"
    )
    assert float(run_python(code).splitlines()[-1]) < 1.0  # seconds of processor time


def test_folders_and_config_files(model, tmp_path, capsys):
    step = tmp_path / "step_000010"
    step.mkdir()
    (tmp_path / "best").write_text("step_000010\n")
    (step / "config.json").write_text((model / "config.json").read_text())
    for path in (model, model / "config.json", tmp_path):
        code, out, _ = inspect(capsys, path)
        assert code == 0 and "MoE 3 x 20, top 2 softmax" in out
    assert str(step) in out


def test_a_path_wins_over_a_preset_of_the_same_name(model, tmp_path, capsys, monkeypatch):
    (tmp_path / "demo").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    _, out, _ = inspect(capsys, "demo", "--json")
    assert ModelArgs.from_dict(json.loads(out)["args"]) == ModelArgs.from_dict(TINY)


def test_layers_that_see_later_tokens_have_no_cache(tmp_path, capsys):
    config = {**TINY, "model_type": "transom", "layer_pattern": "B"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, out, _ = inspect(capsys, tmp_path)
    assert "nothing can be cached" in out and "later tokens too" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lama3-8b"], "did you mean 'llama3-8b'"),
        (["nothing"], f"presets are {', '.join(PRESETS)}"),
        (["demo", "--trace", "text"], "preset demo has no weights"),
        (["demo", "--length", "0"], "length = 0: accepted is 1 or more tokens"),
        (["demo", "--device", "cpu"], "--device = 'cpu': accepted with --trace"),
        (["{model}", "--trace", "x", "--length", "8"], "--length = 8: accepted without --trace"),
        (["{model}", "--trace", "x" * 32], "33 tokens': accepted are 1 to 32 tokens"),
        (["{model}/model.safetensors"], "accepted is a config.json, a folder or a preset"),
    ],
)
def test_wrong_requests_are_one_sentence(words, said, model, capsys):
    code, out, err = inspect(capsys, *[word.format(model=model) for word in words])
    assert code == 2 and out == ""
    assert said in err and err.count("\n") == 1


def test_a_length_beyond_the_models_is_counted_and_said(capsys):
    code, out, err = inspect(capsys, "demo", "--length", 1000)
    assert code == 0 and "1,000 tokens" in out
    assert "longer than the 256 tokens" in err


def test_trace_prints_every_layer_and_head(model, capsys):
    code, out, _ = inspect(capsys, model, "--trace", "a [red]\nä")
    assert code == 0
    lines = out.splitlines()
    assert lines[1].endswith("11 tokens, the last is '<token 164>' at position 10")
    # Output matrices start at zero, so every token is as likely as the next: 1 in 260.
    assert sum("0.4%" in line for line in lines) == 2
    start = lines.index("Attention heads") + 3
    assert [line.split()[:2] for line in lines[start : start + 4]] == [
        ["0", "0"],
        ["0", "1"],
        ["1", "0"],
        ["1", "1"],
    ]


def test_trace_as_json(model, capsys):
    code, out, _ = inspect(capsys, model, "--trace", "ab", "--json", "--device", "cpu", "--dtype", "float64")
    document = json.loads(out.splitlines()[-1])
    assert code == 0
    assert [token["text"] for token in document["tokens"]] == ["<|begin_of_text|>", "a", "b"]
    dense, mixed = document["layers"]
    assert dense["experts"] == [] and len(mixed["experts"]) == 2
    assert sum(expert["weight"] for expert in mixed["experts"]) == pytest.approx(1.0)
    for layer in (dense, mixed):
        assert len(layer["heads"]) == 2 and len(layer["predictions"]) == 3
        assert all(0 <= head["strongest_position"] <= 2 for head in layer["heads"])
