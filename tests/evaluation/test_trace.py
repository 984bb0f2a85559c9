"""A trace says what the model really does, and leaves the model as it was."""

import math

import pytest
import torch

from tests.helpers import random_model, random_tokens, tiny_args
from transom.attention.backends import auto
from transom.attention.sdpa import sdpa
from transom.base.errors import RequestError
from transom.evaluation import trace as module
from transom.evaluation.trace import trace
from transom.layers.inputs import TransformerInput
from transom.layers.rope import apply_rotary_emb, precompute_freqs_cis
from transom.models.build_step import build_step

MOE = {"num_experts": 5, "top_k": 2, "hidden_dim": 16, "interleave_moe_layer_step": 2}
MIXED = {"layer_pattern": "Cf", "attention_chunk_size": 4, "use_qk_norm": True, "moe_args": MOE}
LENGTH = 11


def tiny(**changes):
    return random_model(tiny_args(**changes), std=0.5)


@pytest.fixture
def tokens():
    return random_tokens(1, LENGTH)


def test_attention_of_the_last_token_sums_to_one_over_what_it_may_see(tokens):
    chunked, causal = trace(tiny(**MIXED), tokens)
    for layer in (chunked, causal):
        torch.testing.assert_close(layer.last_attention_NT.sum(-1), torch.ones(4))
    assert (chunked.last_attention_NT[:, :8] == 0).all()  # position 10 stands in the chunk 8 .. 11
    assert (causal.last_attention_NT > 0).all()


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"layer_pattern": "B"}, [LENGTH] * LENGTH),
        ({}, range(1, LENGTH + 1)),
        ({"sliding_window": 3}, [1, 2, *[3] * (LENGTH - 2)]),
    ],
)
def test_uniform_attention_has_the_entropy_of_its_number_of_keys(changes, keys, tokens):
    model = tiny(**changes)
    for block in model.layers:
        torch.nn.init.zeros_(block.attention.wq.weight)
    expected = sum(math.log(n) for n in keys) / LENGTH
    for layer in trace(model, tokens):
        torch.testing.assert_close(layer.entropy_N, torch.full((4,), expected))


def test_blocks_of_queries_change_nothing(tokens, monkeypatch):
    whole = trace(tiny(**MIXED), tokens)
    monkeypatch.setattr(module, "BLOCK", 3)
    for one, other in zip(whole, trace(tiny(**MIXED), tokens), strict=True):
        torch.testing.assert_close(one.entropy_N, other.entropy_N)
        torch.testing.assert_close(one.last_attention_NT, other.last_attention_NT)


def test_strongest_key_is_that_of_a_plain_computation(tokens):
    model = tiny()
    attention = model.layers[0].attention
    with torch.no_grad():
        x = model.layers[0].attention_norm(model.tok_embeddings(tokens))
        q, k = attention.wq(x).unflatten(-1, (4, 8)), attention.wk(x).unflatten(-1, (2, 8))
        q, k = apply_rotary_emb(q, k, precompute_freqs_cis(8, LENGTH, 10000.0))
        for head, (position, weight) in enumerate(trace(model, tokens)[0].strongest):
            weights = (k[0, :, head // 2] @ q[0, -1, head] / math.sqrt(8)).softmax(0)
            assert position == int(weights.argmax())
            assert weight == pytest.approx(float(weights.max()), rel=1e-4)


def test_sizes_are_those_of_the_parts(tokens):
    model = tiny()
    with torch.no_grad():
        step = build_step(model.args, TransformerInput(tokens), None, sdpa)
        block, h = model.layers[0], model.tok_embeddings(tokens)
        attended = block.attention(block.attention_norm(h), step)
        fed = block.feed_forward(block.ffn_norm(h + attended))
    expected = [
        float((x.norm(dim=-1) / 32**0.5).mean()) for x in (attended, fed, h + attended + fed)
    ]
    layer = trace(model, tokens)[0]
    assert [layer.attention_rms, layer.feed_forward_rms, layer.residual_rms] == pytest.approx(
        expected, rel=1e-4
    )


@pytest.mark.parametrize("changes", [{}, MIXED, {"tie_embeddings": True}])
def test_the_last_layer_predicts_what_the_model_predicts(changes, tokens):
    model = tiny(**changes)
    with torch.no_grad():
        shares, ids = model(TransformerInput(tokens)).logits[0, -1].softmax(-1).topk(3)
    found_ids, found_shares = zip(*trace(model, tokens)[-1].predictions, strict=True)
    assert list(found_ids) == ids.tolist()
    assert list(found_shares) == pytest.approx(shares.tolist(), rel=1e-4)


def test_an_earlier_layer_predicts_what_the_model_cut_there_predicts(tokens):
    model = tiny()
    cut = tiny(n_layers=1)
    cut.load_state_dict(
        {k: v for k, v in model.state_dict().items() if not k.startswith("layers.1.")}
    )
    for (id, share), (cut_id, cut_share) in zip(
        trace(model, tokens)[0].predictions, trace(cut, tokens)[-1].predictions, strict=True
    ):
        assert id == cut_id and share == pytest.approx(cut_share, rel=1e-4)


@pytest.mark.parametrize("routing", ["softmax", "sigmoid"])
def test_experts_are_those_the_router_chooses_for_the_last_token(routing, tokens):
    model = tiny(**{**MIXED, "moe_args": {**MOE, "routing": routing}})
    seen, chosen = [], set()
    handle = model.layers[1].feed_forward.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    for stop in range(1, LENGTH + 1):
        dense, mixed = trace(model, tokens[:, :stop])
        with torch.no_grad():
            ids, weights, _ = model.layers[1].feed_forward.router(seen[-1][0, -1:])
        assert dense.experts == ()
        assert [id for id, _ in mixed.experts] == ids[0].tolist()
        assert [weight for _, weight in mixed.experts] == pytest.approx(
            weights[0].tolist(), rel=1e-4
        )
        chosen |= {tuple(ids[0].tolist())}
    handle.remove()
    assert len(chosen) > 1  # else any token's experts would have done


def hooks(model):
    return [hook for part in model.modules() for hook in part._forward_hooks]


def test_the_model_is_as_before(tokens):
    model = tiny(**MIXED)
    before = model(TransformerInput(tokens)).logits
    trace(model, tokens)
    assert "attend" not in vars(model) and model.attend is auto and not hooks(model)
    assert torch.equal(model(TransformerInput(tokens)).logits, before)
    assert before.requires_grad


def test_the_model_is_as_before_after_an_exception(tokens):
    def broken(*_):
        raise ArithmeticError("backend")

    model = tiny(**MIXED)
    model.attend = broken
    with pytest.raises(ArithmeticError, match="backend"):
        trace(model, tokens)
    assert model.attend is broken and not hooks(model)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (torch.zeros(1, 257, dtype=torch.int64), "max_seq_len = 256"),
        (torch.zeros(2, 4, dtype=torch.int64), "expected .1, tokens"),
        (torch.zeros(1, 0, dtype=torch.int64), "expected .1, tokens"),
        (torch.tensor([[3, 61]]), "token id: got 61; expected 0 to 60"),
    ],
)
def test_what_cannot_be_traced_is_refused(tokens, words):
    model = tiny()
    with pytest.raises(RequestError, match=words):
        trace(model, tokens)
    assert model.attend is auto and not hooks(model)
