"""`transom quantize`: the folder and its receipt, the verbs that read it, and wrong requests."""

import errno
import json
import re
import shutil

import pytest
import torch

from tests.checkpoints.adapters.folders import write_adapter, write_base
from tests.training.finetune.runs import chats
from transom.checkpoints.load import load
from transom.evaluation import quantizing
from transom.quantize.formats import quantize
from transom.quantize.leaves import quantized_leaves

SHORT = ("--calibration-rows", "4", "--held-out-tokens", "600")
TEMPLATE = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
GPTQ = ("--kind", "int4", "--group-size", "32", *SHORT)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = write_base(tmp_path_factory.mktemp("quantize") / "base", dim=64, hidden_dim=96)
    (base / "chat_template.jinja").write_text(TEMPLATE)
    return base


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    """A folder that the verb wrote with its default method."""
    from transom.cli.main import main

    out = tmp_path_factory.mktemp("made") / "out"
    assert main(["quantize", str(base), str(out), *GPTQ]) == 0
    return out


def test_a_receipt_is_printed_and_lies_beside_the_weights(base, call, tmp_path):
    code, out, err = call("quantize", base, tmp_path / "out", *GPTQ, "--json")
    assert code == 0, err
    receipt = json.loads(out.splitlines()[-1])
    assert receipt.pop("quantized") == str(tmp_path / "out")
    assert receipt == json.loads((tmp_path / "out" / "quantization_receipt.json").read_text())
    assert receipt["quantize"]["method"] == "gptq"
    assert receipt["quantize"]["bits_per_weight"] == 4.5  # a scale in 16 bits for 32 codes
    assert receipt["calibration"] == {**receipt["calibration"], "source": "stdlib-docs", "rows": 8}
    assert receipt["held_out"]["tokens"] == 600 and receipt["held_out"]["bytes"] > 500
    original, ours, nearest = receipt["models"].values()
    assert nearest["kl"]["value"] > ours["kl"]["value"] > 0
    assert ours["bytes"] < original["bytes"] and "decode_tokens_per_second" in ours
    for words in ("round-to-nearest", "bits per byte", "measured on Python's language reference"):
        assert words in out
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE


def test_rounding_gives_the_nearest_codes_of_the_files(base, call, tmp_path):
    words = ("--method", "rtn", "--kind", "int8", "--group", "0", "--held-out-tokens", "0")
    code, out, err = call("quantize", base, tmp_path / "out", *words, "--scales", "float32")
    assert (code, out) == (0, ""), err
    dense = load(base)
    for path, leaf in quantized_leaves(load(tmp_path / "out")).items():
        parts = quantize(dense.get_parameter(f"{path}.weight"), leaf.format)
        assert torch.equal(leaf.parts["codes"], parts["codes"]), path
        assert leaf.format.scales == torch.float32 and leaf.weight_dtype == torch.bfloat16
    receipt = json.loads((tmp_path / "out" / "quantization_receipt.json").read_text())
    assert "models" not in receipt and receipt["calibration"] is None


def test_an_adapter_is_merged_before(base, call, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", base)
    words = ("--method", "rtn", "--kind", "int8", "--group", "0", "--held-out-tokens", "0")
    assert call("quantize", adapter, tmp_path / "out", *words)[0] == 0
    assert call("merge", adapter, tmp_path / "merged", "--dtype", "float32")[0] == 0
    merged = load(tmp_path / "merged")
    for path, leaf in quantized_leaves(load(tmp_path / "out", dtype="float32")).items():
        weight = merged.get_parameter(f"{path}.weight")
        assert (leaf.weight - weight).abs().max() < 0.01 * weight.abs().max()


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "MADE", "--prompt", "ab", "--max-tokens", "3"),
        ("chat", "MADE"),
        ("eval", "MADE", "--data", __file__, "--limit", "1"),
        ("bench", "MADE", "-p", "8", "-n", "4", "-r", "1"),
        ("convert", "MADE", "OUT", "--format", "native"),
        ("verify", "quantize", "MADE"),
    ],
    ids=" ".join,
)
def test_other_verbs_read_the_folder(made, call, tmp_path, words):
    names = {"MADE": made, "OUT": tmp_path / "out"}
    code, _, err = call(*(names.get(word, word) for word in words))
    assert code == 0, err


def test_a_model_without_a_family_is_refused_before_the_work_and_written_as_native(call, tmp_path):
    odd = write_base(
        tmp_path / "odd",
        "native",
        dim=64,
        hidden_dim=96,
        layer_pattern="CF",
        attention_chunk_size=8,
    )
    code, _, err = call("quantize", odd, tmp_path / "out", *GPTQ)
    assert code == 2 and "format: got 'hf'; expected 'native'" in err and "gptq" not in err
    words = ("--format", "native", "--method", "rtn", "--group", "32", "--held-out-tokens", "0")
    assert call("quantize", odd, tmp_path / "out", *words)[0] == 0
    assert call("generate", tmp_path / "out", "-p", "ab", "-m", "3")[0] == 0


def test_inspect_shows_the_bits_of_a_folder(base, made, call, tmp_path):
    code, out, err = call("inspect", made)
    assert code == 0 and "weights in codes: gptq of 4 bits in groups of 32; --memory" in out, err
    words = ("--bits-budget", "6", "--calibration-rows", "2", "--held-out-tokens", "0")
    code, _, err = call("quantize", base, tmp_path / "mixed", *words)
    assert code == 0, err
    out = call("inspect", tmp_path / "mixed")[1]
    assert re.search(r"codes: gptq of \d bits.*; \d bits.* for \d+ patterns? of names", out)


def test_an_adapter_trains_beside_the_codes_and_merges(made, call, tmp_path):
    rows = chats(tmp_path / "rows.jsonl")
    run = tmp_path / "run"
    words = ("--iters", "2", "--batch-size", "2", "--out", run, "threads=1", "device=cpu")
    code, _, err = call("finetune", made, "--data", rows, *words)
    assert code == 0, err
    code, out, err = call("merge", run, tmp_path / "merged", "--data", __file__, "--json")
    assert code == 0, err
    report = json.loads(out.splitlines()[-1])
    assert report["candidates"][0]["kl"] < report["controls"]["base alone"]["kl"]
    assert call("generate", tmp_path / "merged", "-p", "ab", "-m", "3")[0] == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("MADE", "OUT"), r"model: got a quantized one; expected dense leaves"),
        (("BASE", "OUT", "--kind", "int5"), r"kind: got 'int5'; .*did you mean 'int"),
        (("BASE", "OUT", "--method", "gtpq"), r"method: got 'gtpq'; .*did you mean 'gptq'"),
        (("BASE", "OUT", "--group", "48"), r"group: got 48; expected one of 0, 32, 64, 128"),
        (("BASE", "OUT", "--group", "128"), r"group: got 128 for the 64 inputs of layers\.0"),
        (("BASE", "OUT", "--skip", "feedforward"), r"skip: got 'feedforward'; .*'feed_forward'"),
        (("BASE", "OUT", "--calibration", "EMPTY"), r"empty\.txt'; expected text"),
        (
            ("BASE", "OUT", "--group", "32", "--calibration", "FEW"),
            r"got 21 tokens .*expected at least 96",
        ),
        (
            ("BASE", "OUT", "--calibration", "NONE"),
            r"calibration: path: got .*none\.txt'; expected",
        ),
        (("BASE", "OUT", "--calibration-rows", "0"), r"calibration_rows: got 0; expected 1"),
        (("BASE", "OUT", "--calibration", "LONG", "--held-out", "LONG"), r"held_out: got .*long"),
        (("BASE", "OUT", "--dtype", "int8"), r"dtype: got 'int8'; expected float32"),
        (("MUTE", "OUT", "--method", "rtn", "--group", "32"), r"no tokenizer|tokenizer"),
        (("BASE", "OUT", "--format", "gguf"), r"format: got 'gguf'; expected hf or native"),
        (("BASE", "FILE"), r"OUT: got .*, a file; expected a new or empty folder"),
        (("BASE", "BASE", "--overwrite"), r"out: got .*; expected a folder that is not read"),
        (("BASE", "MADE"), r"OUT: got .*which is not empty"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, tuple) else "",
)
def test_wrong_requests_are_one_sentence(base, made, call, tmp_path, words, expected):
    texts = {"EMPTY": "", "FEW": "a" * 20, "LONG": "ab cd " * 700, "FILE": "x"}
    names = {name: tmp_path / f"{name.lower()}.txt" for name in (*texts, "NONE")}
    for name, text in texts.items():
        names[name].write_text(text)
    out, mute = tmp_path / "out", shutil.copytree(base, tmp_path / "mute")
    (mute / "tokenizer.json").unlink()
    names |= {"BASE": base, "MADE": made, "MUTE": mute, "OUT": out}
    code, shown, err = call("quantize", *(names.get(word, word) for word in words), *SHORT[2:])
    last = err.splitlines()[-1]
    assert (code, shown) == (2, "") and not out.exists()
    assert re.search(expected, last), last


def test_a_full_disk_leaves_the_old_folder_as_it_was(base, made, call, tmp_path, monkeypatch):
    out = shutil.copytree(made, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(location, folder):
        assert (folder / "model.safetensors").exists(), "half of the files are written"
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(quantizing, "carry_companions", full)
    code, _, err = call("quantize", base, out, *GPTQ, "--overwrite")
    assert code == 1 and "could not be written" in err and "No space left" in err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
