"""Verbs on a quantized folder: training beside the codes, merging, and memory while it opens."""

import json

import pytest

from tests.checkpoints.families import random_ids, tiny_hf
from tests.checkpoints.gguf.vocabularies import byte_pairs
from tests.helpers import run_python
from tests.training.finetune.runs import asked, write_rows
from transom.checkpoints.files.location import find_model
from transom.checkpoints.load import load
from transom.checkpoints.save import save
from transom.cli.main import main
from transom.layers.inputs import TransformerInput
from transom.quantize.args import QuantizeArgs
from transom.quantize.leaves import quantized_leaves
from transom.quantize.methods import quantize_model

SIZES = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_key_value_heads": 2}


def quantized_folder(folder, args, **fields):
    """Return a folder in codes with a tokenizer."""
    library = byte_pairs()
    theirs = tiny_hf("qwen3", vocab_size=library.get_vocab_size(), **{**SIZES, **fields})
    theirs.save_pretrained(folder / "dense")
    save(quantize_model(load(folder / "dense"), args), folder / "codes", "hf")
    library.save(str(folder / "codes" / "tokenizer.json"))
    stated = json.dumps({"eos_token": library.id_to_token(1)})
    (folder / "codes" / "tokenizer_config.json").write_text(stated)
    return folder / "codes"


@pytest.mark.parametrize("kind", ["int4", "nf4"])
def test_an_adapter_trains_beside_the_codes_and_is_merged(kind, tmp_path, capsys):
    base = quantized_folder(tmp_path, QuantizeArgs(kind=kind, group=64))
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": asked("a", "b")}] * 8)
    run, merged = tmp_path / "run", tmp_path / "merged"
    words = ["finetune", str(base), "--data", str(rows), "--out", str(run), "--iters", "2"]
    assert main([*words, "dtype=float32"]) == 0, capsys.readouterr().err
    assert "kept in codes" in capsys.readouterr().err
    config = json.loads((find_model(run).adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert main(["merge", str(base), str(run), str(merged)]) == 0, capsys.readouterr().err
    beside, ids = load(run, dtype="float32"), TransformerInput(random_ids())
    assert len(quantized_leaves(beside)) == 14
    found = load(merged, dtype="float32")(ids, inference=True).logits
    expected = beside(ids, inference=True).logits
    untrained = load(base, dtype="float32")(ids, inference=True).logits
    noise = float((found - expected).abs().max())
    assert noise < 1e-4
    assert float((untrained - expected).abs().max()) > 10 * noise


MEMORY = """
import torch
from transom.base.runtime import memory_bytes
from transom.checkpoints.load import load
from transom.checkpoints.files.location import find_model

cpu = torch.device("cpu")
load({small!r})  # imports everything
before = memory_bytes(cpu)
model = load({folder!r})
print(memory_bytes(cpu) - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [
        QuantizeArgs(kind="int4", group=64),
        QuantizeArgs(kind="int4", group=64, zero_points=True),
        QuantizeArgs(kind="int8", group=64),
        QuantizeArgs(kind="nf4", group=64),
    ],
    ids=lambda args: f"{args.kind}{' with zero points' if args.zero_points else ''}",
)
def test_opening_takes_little_more_memory_than_the_file(args, tmp_path):
    small = quantized_folder(tmp_path / "small", args)
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    folder = quantized_folder(tmp_path, args, **sizes)
    found = int(run_python(MEMORY.format(small=str(small), folder=str(folder))))
    assert found <= 1.2 * (folder / "model.safetensors").stat().st_size
