"""`transom bench` as a person or a script meets it."""

import json

import pytest

from tests.cli.test_generate_cli import write_model
from transom.base import runtime


@pytest.fixture(autouse=True)
def known_limits(monkeypatch):
    """Replace the measured limits of the machine, which take a second."""
    monkeypatch.setattr("transom.inference.speed.read_bandwidth", lambda device: 1e9)
    monkeypatch.setattr("transom.inference.speed.matmul_peak", lambda device, dtype: 1e9)
    monkeypatch.setattr(runtime, "read_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(runtime, "matmul_peak", lambda device, dtype: 1e9)


def test_every_batch_size_and_prompt_length_is_measured(tmp_path, call):
    model = write_model(tmp_path / "model")
    picture = tmp_path / "speed.svg"
    words = ("-p", 8, 16, "-b", 1, 3, "-n", 4, "-r", 2, "--device", "cpu", "--picture", picture)
    code, out, err = call("bench", tmp_path / "model", *words, "--json")
    assert code == 0, err
    document = json.loads(out.splitlines()[-1])
    speeds = document["speeds"]
    pairs = [(one["batch_size"], one["prompt_length"]) for one in speeds]
    assert pairs == [(1, 8), (1, 16), (3, 8), (3, 16)]
    weights = sum(weight.nbytes for weight in model.parameters())
    embeddings = model.tok_embeddings.weight.nbytes  # not read: the output has its own matrix
    kv_bytes = 3 * 2 * 2 * (2 * 8) * 4 * (16 + 2)  # rows, layers, K and V, heads, bytes, tokens
    assert speeds[3]["bytes_per_step"] == weights - embeddings + kv_bytes
    for one in speeds:
        rate = one["decode_tokens_per_second"]
        assert 0 < rate["low"] <= rate["median"] <= rate["high"]
        steps = rate["median"] / one["batch_size"]
        assert one["bandwidth_fraction"] == pytest.approx(steps * one["bytes_per_step"] / 1e9)
    assert picture.read_text().lstrip().startswith("<?xml")


def test_a_config_is_measured_with_random_weights_of_which_a_token_reads_its_experts(
    tmp_path, call
):
    write_model(tmp_path, moe_args={"num_experts": 4, "top_k": 1, "hidden_dim": 48})
    (tmp_path / "model.safetensors").unlink()
    words = ("-p", 4, "-n", 2, "-r", 1, "--device", "cpu", "--dtype", "float32", "--json")
    read = []
    for rows in (1, 50):
        code, out, err = call("bench", tmp_path / "config.json", *words, "-b", rows)
        assert (code, "random weights" in err) == (0, True)
        read.append(json.loads(out)["speeds"][0]["bytes_per_step"])
    kv_bytes = 49 * 2 * 2 * (2 * 8) * 4 * (4 + 1)
    experts = 2 * 3 * 32 * 48 * 4 * 3  # layers, matrices, bytes; of 4 experts one token skips 3
    assert read[1] - read[0] - kv_bytes == pytest.approx(experts, rel=1e-3)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("-p", 4, 90, "-n", 20), "tokens: got 'a prompt of 90 tokens and 20 new"),
        (("-n", 1), "new_tokens: got 1"),
        (("-b", 0), "batch_sizes: got [0]"),
        (("-r", 0), "repetitions: got 0"),
        (("--picture", "speed.jpg"), "--picture: got 'speed.jpg'"),
        (("--prompt-cache-file", "x"), "prompt_cache_file: got 'x'; expected none"),
        (("-b", "1", "2", "--prompt-lookup-num-tokens", "2"), "batch_sizes: got [1, 2]"),
        (("-p", 4, "-n", 2, "-b", 10**9), "memory: got a KV cache"),
    ],
)
def test_a_wrong_request_is_one_sentence(tmp_path, call, words, told):
    write_model(tmp_path)
    code, _, err = call("bench", tmp_path, "--device", "cpu", *words)
    assert (code, err.count("\n"), told in err) == (2, 1, True), err
