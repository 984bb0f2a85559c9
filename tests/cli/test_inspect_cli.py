"""`transom inspect` as a person meets it."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import random_model, run_python, tiny_args
from transom.checkpoints.load import load
from transom.checkpoints.read_args import read_args
from transom.checkpoints.save import save
from transom.cli.main import main
from transom.config.model_args import ModelArgs
from transom.config.presets import PRESETS, preset
from transom.models.llm import LLM
from transom.planning import counts
from transom.tokenizers.training import byte_tokenizer

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
    assert len(rows) == len(
        set(map(repr, (replace(layer, index=0) for layer in preset(name).layers)))
    )


def test_the_plan_of_llama3(capsys):
    _, out, _ = inspect(capsys, "llama3-8b")
    for words in (
        "8.03 B parameters in 32 layers",
        "0-31",
        "causal",
        "32 q / 8 kv x 128",
        "SwiGLU 14336",
    ):
        assert words in out
    assert "14.96 GiB in bfloat16, 29.92 GiB in float32" in out
    sizes = "1 GiB in bfloat16, 2 GiB in float32, 528 MiB in int8"
    assert f"{sizes}, for one sequence of 8,192 tokens" in out


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
        "import sys, time\nfrom transom.cli.main import main\n"
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
    assert "nothing can be cached" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lama3-8b"], "did you mean 'llama3-8b'"),
        (["nothing"], f"a hub id or one of smollm2, {', '.join(PRESETS)}"),
        (["demo", "--trace", "text"], "preset demo has no weights"),
        (["demo", "--length", "0"], "length: got 0; expected 1 or more tokens"),
        (["demo", "--device", "cpu"], "--device: got 'cpu'"),
        (
            ["{model}", "--trace", "x", "--length", "8"],
            "--length: got 8",
        ),
        (
            ["{model}", "--trace", "x" * 32],
            "--trace: got 'a text of 33 tokens'; expected 1 to 32 tokens",
        ),
        (
            ["{model}/model.safetensors"],
            "expected a config.json, a params.json, a GGUF file, a folder, a hub id or a preset",
        ),
        (["{model}", "{model}", "--trace", "x"], "--trace: got 'x'"),
        (["{model}", "/no/such/folder"], "got '/no/such/folder', no such folder"),
        (
            ["{model}", "{model}", "--revision", "v1"],
            "--revision: got 'v1'",
        ),
    ],
)
def test_wrong_requests_are_one_sentence(words, said, model, capsys):
    code, out, err = inspect(capsys, *[word.format(model=model) for word in words])
    assert code == 2 and out == ""
    assert said in err and err.count("\n") == 1


def test_a_length_beyond_the_models_is_counted_and_said(capsys):
    code, out, err = inspect(capsys, "demo", "--length", 1000)
    assert code == 0 and "1,000 tokens" in out
    assert "--length 1000 is longer than max_seq_len = 256" in err


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
    code, out, _ = inspect(
        capsys, model, "--trace", "ab", "--json", "--device", "cpu", "--dtype", "float64"
    )
    document = json.loads(out.splitlines()[-1])
    assert code == 0
    assert [token["text"] for token in document["tokens"]] == ["<|begin_of_text|>", "a", "b"]
    dense, mixed = document["layers"]
    assert dense["experts"] == [] and len(mixed["experts"]) == 2
    assert sum(expert["weight"] for expert in mixed["experts"]) == pytest.approx(1.0)
    for layer in (dense, mixed):
        assert len(layer["heads"]) == 2 and len(layer["predictions"]) == 3
        assert all(0 <= head["strongest_position"] <= 2 for head in layer["heads"])


# -- two models, two runs
# ---------------------------------------------------------------------------------


def compared(capsys, *words):
    code, out, err = inspect(capsys, *words, "--json")
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


def write_changed(folder, changes, **fields):
    """The tiny dense model with some tensors changed, and fields of its own."""
    model = random_model(tiny_args(**fields))
    with torch.no_grad():
        for name, change in changes.items():
            change(model.get_parameter(name))
    save(model, folder)
    return folder


def test_the_largest_difference_comes_first_and_is_exact(tmp_path, capsys):
    def one(weight):
        weight[1, 2] -= 0.25

    def many(weight):
        weight += 2.0

    def broken(weight):
        weight[0] = float("nan")

    a = write_changed(tmp_path / "a", {})
    b = write_changed(tmp_path / "b", {"output.weight": one, "layers.1.attention.wq.weight": many})
    found = compared(capsys, a, b)
    first, second = found["differing"]
    assert (first["name"], second["name"]) == ("layers.1.attention.wq.weight", "output.weight")
    assert first["differing"] == first["count"] and second["differing"] == 1
    assert first["largest"] == pytest.approx(2.0, abs=1e-5) and second["largest"] == pytest.approx(
        0.25, abs=1e-6
    )
    theirs = load_file(a / "model.safetensors")
    assert first["scale"] == pytest.approx(float(theirs[first["name"]].abs().max()))
    assert found["identical"] == found["compared"] - 2 == len(theirs) - 2
    assert found["config"] == {} and found["only_a"] == found["only_b"] == []
    c = write_changed(tmp_path / "c", {"norm.weight": broken})
    assert [one["largest"] for one in compared(capsys, a, c)["differing"]] == [None]
    assert compared(capsys, c, c)["differing"] == [], "the same NaN is no difference"
    _, out, _ = inspect(capsys, a, c)
    assert "not finite" in out and "1 of 32" not in out


def test_names_shapes_dtypes_and_fields(tmp_path, capsys):
    a = write_changed(tmp_path / "a", {})
    b = write_changed(tmp_path / "b", {}, n_layers=1, hidden_dim=40, tie_embeddings=True)
    found = compared(capsys, a, b)
    assert found["config"]["hidden_dim"] == [48, 40] and found["config"]["n_layers"] == [2, 1]
    assert found["shapes"]["layers.0.feed_forward.w_gate.weight"] == [[48, 32], [40, 32]]
    assert "output.weight" in found["only_a"] and "layers.1.ffn_norm.weight" in found["only_a"]
    assert found["only_b"] == [] and not found["same_layers"]
    _, out, _ = inspect(capsys, b, a)
    assert "only in B" in out and "(40, 32)" in out
    half = tmp_path / "half"
    save(load(a), half, dtype="bfloat16")
    found = compared(capsys, a, half)
    assert (
        set(map(tuple, found["dtypes"].values())) == {("float32", "bfloat16")}
        and found["identical"] == 0
    )
    assert max(one["largest"] / one["scale"] for one in found["differing"]) < 2**-8
    save(load(half), tmp_path / "wide", dtype="float32")
    _, out, _ = inspect(capsys, half, tmp_path / "wide")
    assert "bfloat16 in A, float32 in B: 21 tensors, 21 of them equal in every number" in out


EXPERTS = {"num_experts": 4, "top_k": 1, "routing": "sigmoid", "shared_expert": True}
LLAMA4 = {
    "n_layers": 4,
    "attention_chunk_size": 8,
    "nope_layer_interval": 4,
    "use_qk_norm": True,
    "moe_args": {**EXPERTS, "interleave_moe_layer_step": 2},
}


@pytest.mark.parametrize(
    ("fields", "format"),
    [
        (
            {
                "hidden_dim": None,
                "multiple_of": 16,
                "ffn_dim_multiplier": 1.3,
                "use_scaled_rope": True,
            },
            "hf",
        ),
        ({"hidden_dim": None, "multiple_of": 16, "n_kv_heads": None}, "meta"),
        ({"sliding_window": 8}, "mistral"),
        ({"moe_args": {"num_experts": 4, "hidden_dim": 20}}, "hf"),
        (LLAMA4, "hf"),
    ],
)
def test_what_one_side_leaves_to_its_rule_is_no_difference(fields, format, tmp_path, capsys):
    save(random_model(tiny_args(**fields)), tmp_path / "a")
    save(load(tmp_path / "a"), tmp_path / "b", format)
    mine, theirs = (asdict(read_args(tmp_path / name)) for name in "ab")
    assert any(mine[key] != theirs[key] for key in mine if key != "rope_layout"), (
        "as written, they differ"
    )
    assert set(compared(capsys, tmp_path / "a", tmp_path / "b")["config"]) <= {"rope_layout"}


def test_what_a_rule_works_out_otherwise_is_a_difference(tmp_path, capsys):
    a = write_changed(tmp_path / "a", {}, hidden_dim=None, multiple_of=16)
    b = write_changed(tmp_path / "b", {}, hidden_dim=None, multiple_of=64, n_kv_heads=None)
    assert compared(capsys, a, b)["config"] == {"hidden_dim": [96, 128], "n_kv_heads": [2, 4]}
    c = write_changed(tmp_path / "c", {}, layer_pattern="SF", sliding_window=8)
    assert compared(capsys, a, c)["config"]["layer_pattern"] == ["FF", "SF"]


@pytest.mark.parametrize("format", ["hf", "meta", "mistral"])
def test_another_layout_of_the_same_weights_is_no_difference(format, tmp_path, capsys):
    for layout in ("interleaved", "halves"):
        save(random_model(tiny_args(rope_layout=layout)), tmp_path / layout)
        save(load(tmp_path / layout), tmp_path / f"{layout}-{format}", format=format)
        found = compared(capsys, tmp_path / layout, tmp_path / f"{layout}-{format}")
        assert found["differing"] == [] and found["identical"] == found["compared"]
        assert (found["rotary"] == "turned") == (
            layout != ("halves" if format == "hf" else "interleaved")
        )


def write_run(folder, rows=(), **changes):
    folder.mkdir()
    facts = {
        "transom": "1.0",
        "machine": {"torch": "2.11.0", "threads": 2},
        "seed": 0,
        "data": {"texts": "abc", "more": "def"},
        "model": {"dim": 16},
        "config": {
            "steps": 10,
            "model": "tiny",
            "optimizer": {"lr": 0.001},
            "data": {"sources": [{"path": "x"}]},
        },
    }
    for key, value in changes.items():
        facts[key] = {**facts.get(key, {}), **value} if isinstance(value, dict) else value
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_two_runs(tmp_path, capsys):
    rows = [
        {"step": 9, "loss": 3.5},
        {"step": 10, "loss": 3.0, "tokens": 640},
        {"step": 10, "held_out": {"bits_per_byte": 2.5, "perplexity": 9.0}},
    ]
    final = {"step": 10, "final": {"bits_per_byte": 2.25, "perplexity": 8.0}}
    a = write_run(tmp_path / "a", rows=rows)
    b = write_run(
        tmp_path / "b",
        rows=[*rows, final],
        transom="1.1",
        data={"more": "xyz"},
        config={"optimizer": {"lr": 0.002}, "data": {"sources": [{"path": "x"}, {"path": "y"}]}},
    )
    found = compared(capsys, a, b)
    assert found["run"] == {"transom": ["1.0", "1.1"]}
    assert found["data"] == {"more": ["def", "xyz"]} and found["model"] == {}
    assert found["config"] == {"optimizer.lr": [0.001, 0.002], "data.sources[1].path": [None, "y"]}
    assert found["scores"]["bits_per_byte"] == [2.5, 2.25] and found["scores"]["loss"] == [3.0, 3.0]
    code, out, _ = inspect(capsys, a, b)
    assert code == 0 and "Model: the same" in out and "data.sources[1].path" in out
    assert len(compared(capsys, a, a)["scores"]) == 5


def test_settings_of_runs_are_compared_once_with_the_values_that_were_chosen(tmp_path, capsys):
    a, b = (
        write_run(tmp_path / name, rows=[], steps=steps, resolved={"steps": steps, "seed": 1})
        for name, steps in (("a", 5), ("b", 6))
    )
    found = compared(capsys, a, b)
    assert found["config"] == {"steps": [5, 6]} and found["run"] == {}


def test_two_runs_need_no_torch(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1)
    code = (
        "import sys\nfrom transom.cli.main import main\n"
        f"assert main(['inspect', {str(a)!r}, {str(b)!r}]) == 0\n"
        "print('torch' in sys.modules)\n"
    )
    assert run_python(code).splitlines()[-1] == "False"
