"""Folders of Meta and Mistral compute what transformers computes with the same weights."""

import json

import pytest
import torch

from tests.checkpoints.consolidated import (
    EXPERT,
    MISTRAL_PARAMS,
    PARAMS,
    VOCAB,
    cut,
    fuse,
    meta_state,
    mistral_state,
    mistral_twin,
    twin,
    write_meta,
    write_mistral,
)
from transom.checkpoints.files.layout import folder_format
from transom.checkpoints.load import load
from transom.checkpoints.read_args import read_args
from transom.inference.loop import generate
from transom.layers.inputs import MaskedEmbedding, TransformerInput


def ids_of(rows=2, count=21, seed=1):
    return torch.randint(1, VOCAB - 1, (rows, count), generator=torch.Generator().manual_seed(seed))


def close(got, expected, tolerance=2e-5):
    return torch.allclose(got, expected, atol=tolerance, rtol=0)


@pytest.fixture(scope="module")
def twins():
    return {kind: twin(kind) for kind in PARAMS}


CASES = [
    *((kind, ranks, False) for kind in ("llama2", "llama3", "llama4") for ranks in (1, 2, 4)),
    *((kind, ranks, True) for kind in ("llama2", "llama4") for ranks in (1, 2, 4)),
]


@pytest.mark.parametrize(("kind", "ranks", "fused"), CASES)
def test_meta_logits_equal(twins, tmp_path, kind, ranks, fused):
    states = cut(kind, meta_state(kind, twins[kind]), ranks)
    folder = write_meta(
        tmp_path, PARAMS[kind], [fuse(s) for s in states] if fused else states, nested=fused
    )
    ours = load(folder)(TransformerInput(ids_of()), inference=True).logits
    assert close(ours, twins[kind](ids_of()).logits)


def test_meta_greedy_tokens_equal(twins, tmp_path):
    folder = write_meta(
        tmp_path, PARAMS["llama4"], cut("llama4", meta_state("llama4", twins["llama4"]), 2)
    )
    prompt = ids_of(1, 5)
    expected = twins["llama4"].generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert generate(load(folder), prompt, max_new_tokens=20).tolist() == expected.tolist()


@pytest.mark.parametrize("ranks", [1, 2])
def test_meta_images_equal(twins, tmp_path, ranks):
    kind = "llama4-vision"
    folder = write_meta(tmp_path, PARAMS[kind], cut(kind, meta_state(kind, twins[kind]), ranks))
    mine, ids = load(folder), ids_of(1, 24)
    ids[0, 2:20] = VOCAB - 1
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(3))
    mask = ids == VOCAB - 1
    rows = mine.encode_images(pixels).flatten(0, 1)
    embedding = torch.zeros(*ids.shape, mine.args.dim).masked_scatter(mask.unsqueeze(-1), rows)
    ours = mine(TransformerInput(ids, image_embedding=MaskedEmbedding(embedding, mask))).logits
    assert close(ours, twins[kind](input_ids=ids, pixel_values=pixels).logits)


@pytest.mark.parametrize(
    "key",
    [
        "layers.0.attention.wq.weight",
        "layers.1.feed_forward.experts.moe_w_out_eF_D",
        "layers.1.feed_forward.w_out_shared_DF.weight",
        "layers.2.feed_forward.w3.weight",
        "layers.3.feed_forward.router_DE",
    ],
)
def test_a_corrupted_part_of_one_rank_is_seen(twins, tmp_path, key):
    states = cut("llama4", meta_state("llama4", twins["llama4"]), 2)
    rank = 0 if key.endswith("router_DE") else 1  # what all ranks hold is read from the first
    states[rank][key] = states[rank][key].roll(1, 0)
    ours = load(write_meta(tmp_path, PARAMS["llama4"], states))(
        TransformerInput(ids_of()), inference=True
    ).logits
    assert not close(ours, twins["llama4"](ids_of()).logits, 1e-3)


def test_what_params_do_not_say_is_said(twins, tmp_path, capsys):
    write_meta(
        tmp_path / "2", PARAMS["llama2"], cut("llama2", meta_state("llama2", twins["llama2"]), 2)
    )
    write_meta(
        tmp_path / "3", PARAMS["llama3"], cut("llama3", meta_state("llama3", twins["llama3"]), 1)
    )
    two, three = read_args(tmp_path / "2"), read_args(tmp_path / "3")
    assert (two.vocab_size, two.rope_theta, two.max_seq_len) == (VOCAB, 10000.0, 4096)
    assert (three.rope_scaling_factor, three.rope_high_freq_factor, three.max_seq_len) == (
        8.0,
        4.0,
        131072,
    )
    said = capsys.readouterr().err
    assert "max_seq_len = 4096" in said and "rope_scaling_factor = 8" in said


@pytest.mark.parametrize("written", [False, True])
def test_a_tied_mistral_may_have_an_output_or_not(tmp_path, written):
    theirs = mistral_twin("dense")
    state = mistral_state("dense", theirs, tmp_path / "hf")
    state["output.weight"] = state["tok_embeddings.weight"].clone()
    if not written:
        del state["output.weight"]
    mine = load(
        write_mistral(tmp_path / "m", {**MISTRAL_PARAMS["dense"], "tied_embeddings": True}, state)
    )
    theirs.lm_head.weight = theirs.model.embed_tokens.weight
    assert mine.output is None and close(
        mine(TransformerInput(ids_of())).logits, theirs(ids_of()).logits
    )


def test_llama4_defaults_are_those_of_its_code(twins, tmp_path):
    write_meta(tmp_path, {**PARAMS["llama4"], "vocab_size": 202048}, [{}])
    args = read_args(tmp_path)
    assert (args.rope_scaling_factor, args.rope_high_freq_factor) == (16.0, 1.0)
    assert [layer.moe.hidden_dim if layer.moe else layer.hidden_dim for layer in args.layers] == [
        112,
        EXPERT,
    ] * 2
    vision = {**PARAMS["llama4-vision"], "vocab_size": 202048}
    (tmp_path / "params.json").write_text(json.dumps(vision))
    assert read_args(tmp_path).vision_args.image_token == 200092


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("kind", MISTRAL_PARAMS)
def test_mistral_logits_equal(tmp_path, kind, pickled):
    theirs = mistral_twin(kind)
    state = mistral_state(kind, theirs, tmp_path / "hf")
    folder = write_mistral(tmp_path / "m", MISTRAL_PARAMS[kind], state, pickled)
    assert folder_format(folder) == "mistral"
    ours = load(folder)(TransformerInput(ids_of()), inference=True).logits
    assert close(ours, theirs(ids_of()).logits)


@pytest.mark.parametrize(
    ("window", "pattern", "size"),
    [
        (5, "SSSS", 5),
        ([5], "SSSS", 5),
        ([5, None], "SFSF", 5),
        ([None, 5, 5], "FSSF", 5),
        ([None], "FFFF", None),
    ],
)
@pytest.mark.parametrize("key", ["sliding_window", "_sliding_window"])
def test_mistral_windows(tmp_path, window, pattern, size, key):
    params = {**MISTRAL_PARAMS["later"], "n_layers": 4, "rope_theta": 1e4, key: window}
    args = read_args(write_mistral(tmp_path, params, {}))
    assert (args.pattern, args.sliding_window) == (pattern, size)


def test_the_format_is_that_of_the_files(twins, tmp_path, capsys):
    """Two formats side by side, as hubs hold them: Hugging Face's is read while its weights are
    there.
    """
    theirs = mistral_twin("dense")
    state = mistral_state("dense", theirs, tmp_path / "both")
    write_mistral(tmp_path / "both", MISTRAL_PARAMS["dense"], state)
    assert folder_format(tmp_path / "both") == "hf"
    (tmp_path / "both" / "model.safetensors").unlink()
    assert folder_format(tmp_path / "both") == "mistral"
    assert close(
        load(tmp_path / "both")(TransformerInput(ids_of())).logits, theirs(ids_of()).logits
    )
    assert "two configs; params.json is read, config.json is ignored" in capsys.readouterr().err


def test_leftovers_of_images_in_a_text_model_are_said(tmp_path, capsys):
    theirs = mistral_twin("dense")
    state = mistral_state("dense", theirs, tmp_path / "hf") | {
        "vision_encoder.ln_pre.weight": torch.ones(3)
    }
    folder = write_mistral(
        tmp_path / "m", {**MISTRAL_PARAMS["dense"], "vision_encoder": {"hidden_size": 3}}, state
    )
    assert close(load(folder)(TransformerInput(ids_of())).logits, theirs(ids_of()).logits)
    assert "1 tensors left unread: the image encoder" in capsys.readouterr().err
