"""A rehearsed step has the bytes that follow from the shapes."""

import pytest

import transom
from transom.base.errors import RequestError
from transom.tokenizers.training import byte_tokenizer
from transom.training.config import read_config
from transom.training.loop.rehearsal import rehearse

MODEL = {"dim": 64, "n_layers": 4, "n_heads": 8, "n_kv_heads": 8, "hidden_dim": 128}
EXPERTS = {"num_experts": 8, "top_k": 2, "hidden_dim": 64}
SIZES = {"vocab_size": 512, "max_seq_len": 256}
BLOCK = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64  # parameters of a block
OUTSIDE = 2 * 512 * 64 + 64  # embeddings, output and final norm
TOKENS = 256  # of a row


def run_args(model=(), **changes):
    given = {} if "base" in changes else {"model": {**MODEL, **SIZES, **dict(model)}}
    fields = {**given, "optimizer": {"name": "adamw"}}
    data = {"seq_len": TOKENS, "batch_size": 1024}
    return read_config(None, base={**fields, "data": data, "dtype": "float32", **changes})


def test_fsdp_gathers_blocks_twice_and_scatters_gradients_once():
    found = rehearse(run_args(), 64)
    count = 4 * BLOCK + OUTSIDE
    assert found.memory["weights"] == pytest.approx(4 * count / 64, rel=0.02)
    assert found.memory["optimizer"] == pytest.approx(8 * count / 64, rel=0.02)
    others = 63 / 64
    calls, sent = found.collectives["fsdp", "all-gather"]
    assert calls == 2 * 4 + 1  # the outermost weights stay until backward
    assert sent == pytest.approx(others * 4 * (2 * 4 * BLOCK + OUTSIDE), rel=0.02)
    calls, sent = found.collectives["fsdp", "reduce-scatter"]
    assert (calls, sent) == (5, pytest.approx(others * 4 * count, rel=0.02))


def test_tensor_ranks_move_hidden_states_four_times_per_sublayer():
    found = rehearse(run_args(parallel={"tensor": 8, "shard": 1}), 8)
    rows = run_args().data.rows_per_step
    hidden = 7 / 8 * 4 * rows * TOKENS * 64
    calls, sent = found.collectives["tensor", "reduce-scatter"]
    assert (calls, sent) == (16, pytest.approx(16 * hidden))
    assert found.memory["weights"] == pytest.approx(4 * (4 * BLOCK + OUTSIDE) / 8, rel=0.05)


def test_experts_fewer_than_ranks_are_divided_evenly():
    args = run_args({"moe_args": EXPERTS}, parallel={"expert": 8})
    found = rehearse(args, 64)
    experts = 4 * 8 * 3 * 64 * 64
    others = 4 * (4 * 64 * 64 + 2 * 64 + 8 * 64) + OUTSIDE
    assert found.memory["weights"] == pytest.approx(4 * (experts + others) / 64, rel=0.05)
    rows = 1024 // 64 * TOKENS * 2  # top_k
    calls, sent = found.collectives["expert", "all-to-all"]
    assert calls == 4 * 4  # in each layer, there and back, forward and backward
    assert sent == pytest.approx(16 * 7 / 8 * 4 * rows * 64, rel=0.01)


def test_checkpointing_keeps_one_input_per_block():
    plain = rehearse(run_args(), 64).memory["activations of a micro-batch"]
    found = rehearse(run_args(activation_checkpoint="full"), 64)
    rows = 1024 // 64 * TOKENS
    kept = found.memory["activations of a micro-batch"]
    assert 4 * 4 * rows * 64 <= kept < plain / 4


def test_an_adapter_alone_has_gradients_and_the_base_is_gathered_as_it_is_stored(tmp_path):
    model = transom.LLM(transom.ModelArgs(**MODEL, **SIZES))
    transom.save(model, tmp_path / "base", format="native", tokenizer=byte_tokenizer())
    lora = {"rank": 4, "targets": ["wq"]}

    def found(**finetune):
        based = {"base": str(tmp_path / "base"), "finetune": {"lora": lora, **finetune}}
        return rehearse(run_args(**based, dtype="auto"), 64)

    dense, coded = found(), found(quantize={"kind": "nf4"})
    adapter = 4 * 4 * (4 * 64 + 64 * 4)  # bytes in float32
    others = 63 / 64
    assert dense.memory["gradients"] == pytest.approx(adapter / 64)
    assert dense.memory["optimizer"] == pytest.approx(2 * adapter / 64, rel=0.15)  # and steps
    assert dense.collectives["fsdp", "reduce-scatter"] == (4, pytest.approx(others * adapter))
    count = 4 * BLOCK + OUTSIDE
    assert dense.memory["weights"] == pytest.approx((2 * count + adapter) / 64, rel=0.03)
    blocks = 2 * 4 * (2 * BLOCK + adapter // 4)  # twice
    gathered = dense.collectives["fsdp", "all-gather"][1]
    assert gathered == pytest.approx(others * (blocks + 2 * OUTSIDE), rel=0.03)
    assert coded.collectives["fsdp", "all-gather"][1] < gathered / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": {"tensor": 3}}, "got 63; expected 64, the number of ranks"),
        (
            {"parallel": {"tensor": 16}},
            "parallel.tensor: got 16; expected a divisor of 8, the greatest",
        ),
        ({"parallel": {"expert": 3}}, "parallel.expert: got 3; expected a divisor of shard x"),
        ({"accumulate": 1024}, "data.batch_size: got 1024; expected a multiple of"),
        ({"parallel": {"pipeline": 2}}, "parallel.pipeline: got 2; expected 1 with --rehearse"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused(changes, message):
    with pytest.raises(RequestError, match=message):
        rehearse(run_args(**changes), 64)
