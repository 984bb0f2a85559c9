"""The model as a whole: packing, padding, ties, weights, precision, and what it refuses."""

from __future__ import annotations

import copy
import math
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import TINY_VISION, random_model, random_tokens, tiny_args
from transom.attention.mask import positions_from_sizes, segments_from_sizes
from transom.attention.reference import reference
from transom.base.errors import RequestError
from transom.base.runtime import one_thread
from transom.layers.inputs import MaskedEmbedding, TransformerInput
from transom.models.build_step import build_step
from transom.models.llm import LLM

PATTERNS = {
    "full": {},
    "window": {"sliding_window": 4},
    "chunk": {
        "attention_chunk_size": 5,
        "nope_layer_interval": 2,
        "use_qk_norm": True,
        "attn_temperature_tuning": True,
        "floor_scale": 3.0,
    },
    "both ways": {"layer_pattern": "FB"},
    "mixture": {"moe_args": {"num_experts": 4, "top_k": 2, "hidden_dim": 24}},
}
by_pattern = pytest.mark.parametrize("pattern", PATTERNS)


@pytest.fixture(autouse=True, scope="module")
def single_threaded():
    with one_thread():
        yield


def build(pattern: str = "full") -> LLM:
    return random_model(tiny_args(**PATTERNS[pattern])).double()


def seeing() -> LLM:
    return random_model(tiny_args(vision_args=TINY_VISION)).double()


def same(mine: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-9)


def llama4_attention(model: LLM, index: int, x: Tensor) -> Tensor:
    """Meta's and transformers' Llama 4 text attention written out: local layers turn and norm, NoPE
    layers heat.
    """
    args, w = model.args, model.layers[index].attention
    positions = torch.arange(x.size(1))
    q, k, v = ((x @ m.weight.T).unflatten(-1, (-1, 8)) for m in (w.wq, w.wk, w.wv))
    may = positions[:, None] >= positions
    if index == 0:
        angles = torch.outer(positions.double(), 10000.0 ** -(torch.arange(0, 8, 2) / 8).double())
        turns = torch.polar(torch.ones_like(angles), angles)[:, None]
        q, k = (
            torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (4, 2))) * turns).flatten(-2)
            for y in (q, k)
        )
        q, k = (y / (y.pow(2).mean(-1, keepdim=True) + args.norm_eps).sqrt() for y in (q, k))
        may &= (
            positions[:, None] // args.attention_chunk_size
            == positions // args.attention_chunk_size
        )
    else:
        q = (
            q
            * (1 + args.attn_scale * ((positions + 1) / args.floor_scale).floor().log1p())[
                :, None, None
            ]
        )
    k, v = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
    scores = torch.einsum("btnh,bsnh->bnts", q, k) / 8**0.5
    weights = scores.masked_fill(~may, float("-inf")).softmax(-1)
    return torch.einsum("bnts,bsnh->btnh", weights, v).flatten(-2) @ w.wo.weight.T


@pytest.mark.parametrize("index", [0, 1], ids=["chunk", "NoPE"])
def test_attention_of_llama4_layers_is_the_published_formula(index):
    model, tokens = build("chunk"), random_tokens(2, 14)
    step = build_step(model.args, TransformerInput(tokens), None, model.attend)
    x = model.tok_embeddings(tokens) * 3  # large enough that the norm of queries and keys matters
    mine, expected = model.layers[index].attention(x, step), llama4_attention(model, index, x)
    torch.testing.assert_close(
        mine, expected, rtol=0, atol=1e-5
    )  # rotary tables are float32 by intent


@by_pattern
def test_packed_rows_equal_separate_documents_with_gradients(pattern):
    model, tokens, sizes = build(pattern), random_tokens(2, 16), [[7, 1, 8], [12, 4]]
    packed = model(TransformerInput(tokens, sizes=sizes)).logits
    documents = [
        piece[None] for row, cuts in zip(tokens, sizes, strict=True) for piece in row.split(cuts)
    ]
    alone = torch.cat([model(TransformerInput(document)).logits[0] for document in documents])
    same(packed.flatten(0, 1), alone)
    pull = torch.cos(torch.arange(alone.numel(), dtype=alone.dtype)).view_as(alone)
    weights = dict(model.named_parameters())
    grads = [
        torch.autograd.grad(x, list(weights.values()), pull) for x in (packed.flatten(0, 1), alone)
    ]
    for name, mine, expected in zip(weights, *grads, strict=True):
        torch.testing.assert_close(
            mine, expected, rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


@by_pattern
def test_padded_rows_equal_unpadded_ones_whatever_the_padding_holds(pattern):
    model, tokens = build(pattern), random_tokens(2, 11)
    model.tok_embeddings.weight.data[60] = float("nan")
    tokens[1, 6:] = 60
    padded = model(TransformerInput(tokens, lengths=torch.tensor([11, 6]))).logits
    same(padded[0], model(TransformerInput(tokens[:1])).logits[0])
    same(padded[1, :6], model(TransformerInput(tokens[1:, :6])).logits[0])


@by_pattern
def test_positions_count_and_the_order_of_tokens_does_not(pattern, monkeypatch):
    """Shuffled together with their positions, over several blocks, tokens keep their logits."""
    monkeypatch.setattr("transom.attention.sdpa.BLOCK", 4)
    model, tokens = build(pattern), random_tokens(2, 15)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    shuffled = model(TransformerInput(tokens[:, order], tokens_position=order)).logits
    same(shuffled, model(TransformerInput(tokens)).logits[:, order])


def test_left_padding_by_positions_equals_the_row_alone():
    model, tokens = build("chunk"), random_tokens(2, 9)
    positions = torch.stack((torch.arange(9), torch.arange(-3, 6).clamp(min=-1)))
    alone = model(TransformerInput(tokens[1:, 3:])).logits[0]
    same(model(TransformerInput(tokens, tokens_position=positions)).logits[1, 3:], alone)
    same(
        model(TransformerInput(tokens, tokens_position=positions, logits="last")).logits[1],
        alone[-1:],
    )


def test_start_position_moves_the_chunks():
    model, tokens = build("chunk"), random_tokens(2, 9)
    started = model(TransformerInput(tokens, tokens_position=3)).logits
    same(started, model(TransformerInput(tokens, tokens_position=torch.arange(3, 12))).logits)


def test_logits_of_the_last_token_or_none():
    model, tokens = build(), random_tokens(3, 9)
    lengths = torch.tensor([9, 4, 1])
    whole = model(TransformerInput(tokens, lengths=lengths))
    last = model(TransformerInput(tokens, lengths=lengths, logits="last"))
    same(last.logits[:, 0], whole.logits[torch.arange(3), lengths - 1])
    none = model(TransformerInput(tokens, lengths=lengths, logits="none"))
    assert none.logits is None
    same(none.hidden_BTD, whole.hidden_BTD)


def test_tied_embeddings_are_one_weight_read_twice():
    tied, untied = (random_model(tiny_args(tie_embeddings=tie)).double() for tie in (True, False))
    assert "output.weight" not in tied.state_dict()
    weights = tied.state_dict()
    untied.load_state_dict({**weights, "output.weight": weights["tok_embeddings.weight"]})
    tokens, grads = random_tokens(2, 9), []
    same(tied(TransformerInput(tokens)).logits, untied(TransformerInput(tokens)).logits)
    for model in (tied, untied):
        model(TransformerInput(tokens)).logits.sin().sum().backward()
        grads.append(model.tok_embeddings.weight.grad)
    same(grads[0], grads[1] + untied.output.weight.grad)


def test_image_embedding_replaces_the_masked_rows():
    model, tokens = seeing(), random_tokens(2, 9)
    other = random_tokens(2, 9, seed=1)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 2:5] = mask[1, 0] = True
    rows = MaskedEmbedding(model.tok_embeddings(other), mask)
    mixed = torch.where(mask, other, tokens)
    replaced = model(TransformerInput(tokens, image_embedding=rows)).logits
    same(replaced, model(TransformerInput(mixed)).logits)


def test_image_rows_of_another_shape_are_refused():
    rows = MaskedEmbedding(torch.zeros(2, 9, 8), torch.zeros(2, 9))
    with pytest.raises(RequestError, match=re.escape("image_embedding: got [2, 9, 8]")):
        seeing()(TransformerInput(random_tokens(2, 9), image_embedding=rows))


def test_image_masks_are_bool():
    rows = MaskedEmbedding(torch.zeros(2, 9, 32), torch.zeros(2, 9))
    with pytest.raises(RequestError, match=r"mask torch\.float32"):
        seeing()(TransformerInput(random_tokens(2, 9), image_embedding=rows))


@pytest.mark.parametrize("pattern", ["full", "mixture", "scaled"])
def test_a_forward_on_the_meta_device_gives_the_shapes(pattern):
    changes = (
        {"embedding_scale": 4.0, "attn_softcap": 5.0} if pattern == "scaled" else PATTERNS[pattern]
    )
    with torch.device("meta"):
        logits = LLM(tiny_args(**changes))(
            TransformerInput(torch.zeros(2, 9, dtype=torch.int64))
        ).logits
    assert (logits.shape, logits.device.type) == ((2, 9, 61), "meta")


def test_a_model_can_be_pickled_and_copied():
    model, tokens = build("mixture"), random_tokens(1, 5)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        same(other(TransformerInput(tokens)).logits, model(TransformerInput(tokens)).logits)


@pytest.mark.parametrize(
    "changes",
    [{"qk_norm": "head"}, {"qk_norm": "projection"}, {"mla_args": {}, "n_kv_heads": None}],
)
def test_autocast_hands_attention_one_dtype(changes):
    """The float32 weight of a norm would widen queries and keys, and half-precision kernels would
    refuse them.
    """
    model, kinds = random_model(tiny_args(**changes)), set()

    def attend(q, view, spec, score):
        kinds.update({q.dtype, *(state.dtype for state in view.states)})
        return reference(q, view, spec, score)

    model.attend = attend
    with torch.autocast("cpu", torch.bfloat16):
        model(TransformerInput(random_tokens(1, 5)))
    assert kinds == {torch.bfloat16}


def test_model_built_on_meta_equals_one_built_directly():
    args = tiny_args(**PATTERNS["mixture"])
    direct = LLM(args)
    with torch.device("meta"):
        later = LLM(args)
    later.to_empty(device="cpu")
    for model in (direct, later):
        model.init_weights(seed=3)
    weights = direct.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in later.state_dict().items())
    assert all(weight.isfinite().all() for weight in weights.values()), (
        "some weight was left as allocated"
    )


def test_init_weights_follow_the_seed_and_start_at_chance():
    models = [LLM(tiny_args(**PATTERNS["mixture"])) for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        model.init_weights(seed)
    first, again, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(
        first["layers.0.attention.wq.weight"], other["layers.0.attention.wq.weight"]
    )
    tokens = random_tokens(2, 9)
    logits = models[0](TransformerInput(tokens)).logits
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert loss.item() == pytest.approx(math.log(61), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@by_pattern
def test_half_precision_is_near_float32(pattern, dtype):
    model, tokens = random_model(tiny_args(**PATTERNS[pattern]), std=0.1), random_tokens(2, 20)
    lengths = torch.tensor([20, 13])
    exact = model(TransformerInput(tokens, lengths=lengths)).logits[0]
    rough = model.to(dtype)(TransformerInput(tokens, lengths=lengths)).logits[0]
    assert rough.dtype is dtype
    assert (rough.float() - exact).norm() < 0.03 * exact.norm()


def test_state_dict_holds_parameters_under_the_agreed_names_only():
    moe = {
        "num_experts": 4,
        "hidden_dim": 24,
        "shared_expert": True,
        "interleave_moe_layer_step": 2,
    }
    model = LLM(tiny_args(**PATTERNS["chunk"], moe_args=moe))
    feed_forward = ["w_gate", "w_value", "w_out"]
    block = ["attention_norm", "ffn_norm", *(f"attention.{w}" for w in ("wq", "wk", "wv", "wo"))]
    dense = [f"feed_forward.{w}" for w in feed_forward]
    mixture = ["feed_forward.router"]
    mixture += [
        f"feed_forward.{part}.{w}" for part in ("experts", "shared_expert") for w in feed_forward
    ]
    names = ["tok_embeddings", "norm", "output"]
    names += [f"layers.0.{name}" for name in block + dense] + [
        f"layers.1.{name}" for name in block + mixture
    ]
    assert set(model.state_dict()) == {f"{name}.weight" for name in names}
    assert not list(model.buffers())
    assert model.state_dict()["layers.1.feed_forward.experts.w_out.weight"].shape == (4, 32, 24)


def test_inference_records_no_gradient():
    model, tokens = build(), random_tokens(2, 9)
    assert model(TransformerInput(tokens)).logits.requires_grad
    out = model(TransformerInput(tokens), inference=True)
    assert not out.logits.requires_grad
    assert not out.hidden_BTD.requires_grad


def test_output_goes_through_its_leaf():
    """An adapter or a quantized weight lives there: reading `output.weight` past it would skip
    them.
    """
    model, tokens = build(), random_tokens(2, 9)
    plain = model(TransformerInput(tokens)).logits
    model.output.register_forward_hook(lambda _module, _inputs, logits: 2 * logits)
    same(model(TransformerInput(tokens)).logits, 2 * plain)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": torch.zeros(4, dtype=torch.int64)}, "tokens: got [4]"),
        ({"tokens": torch.zeros(2, 0, dtype=torch.int64)}, "tokens: got [2, 0]"),
        ({"tokens": random_tokens(1, 257)}, "tokens: got 257; expected at most max_seq_len = 256"),
        ({"sizes": [4, 4]}, "sizes: got [[4, 4]]"),
        ({"sizes": [[4, 5], [4, 4]]}, "sizes: got [[4, 5], [4, 4]]"),
        ({"sizes": [[9, 0], [9]]}, "sizes: got [[9, 0], [9]]"),
        ({"sizes": [[9], [9]], "lengths": torch.tensor([9, 9])}, "sizes: got lengths"),
        ({"lengths": torch.tensor([4])}, "lengths: got [1]"),
        ({"tokens_position": -3}, "tokens_position: got -3"),
        ({"tokens_position": torch.tensor(0)}, "tokens_position: got 'torch.int64 []'"),
        ({"tokens_position": torch.tensor([0])}, "tokens_position: got 'torch.int64 [1]'"),
        ({"tokens_position": torch.arange(8)}, "tokens_position: got 'torch.int64 [8]'"),
        ({"tokens_position": torch.arange(9.0)}, "tokens_position: got 'torch.float32 [9]'"),
        ({"logits": "lst"}, "logits: got 'lst'"),
        ({"context_lengths": torch.tensor([1, 1])}, "context_lengths: got lengths without"),
        ({"cached": 3}, "tokens: got [2, 9]; expected the cache's 3 rows"),
        ({"cached": 2, "sizes": [[9], [9]]}, "sizes: got packed rows with a cache"),
        ({"cached": 2, "tokens_position": 3}, "tokens_position: got positions with a cache"),
        (
            {"image_embedding": MaskedEmbedding(torch.zeros(2, 9, 8), torch.zeros(2, 9))},
            "image_embedding: got one",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_computed_is_refused_in_one_sentence(fields, message):
    model = build()
    given = {"tokens": random_tokens(2, 9), **fields}
    rows = given.pop("cached", None)
    cache = None if rows is None else model.make_cache(rows)
    with pytest.raises(RequestError, match=re.escape(message)):
        model(TransformerInput(**given), cache=cache)


def test_tokens_of_packed_rows_may_be_in_any_order_with_segments():
    """Positions and segments say what `sizes` says, for any order of the tokens of a row."""
    model = LLM(tiny_args(layer_pattern="SF", sliding_window=3)).double()
    tokens = torch.randint(0, model.args.vocab_size, (2, 9))
    sizes = ((4, 5), (2, 7))
    expected = model(TransformerInput(tokens, sizes=sizes)).logits
    order = torch.randperm(9)
    positions = torch.stack([positions_from_sizes(row) for row in sizes])[:, order]
    segments = torch.stack([segments_from_sizes(row) for row in sizes])[:, order]
    inputs = TransformerInput(tokens[:, order], tokens_position=positions, segments=segments)
    torch.testing.assert_close(model(inputs).logits, expected[:, order])


@pytest.mark.parametrize("given", ["without positions", "of another shape"])
def test_segments_that_do_not_fit_are_refused(given):
    model, tokens = LLM(tiny_args()), torch.zeros(2, 4, dtype=torch.int64)
    place = None if given == "without positions" else torch.arange(4)
    segments = torch.zeros(2, 4 if place is None else 3, dtype=torch.int64)
    inputs = TransformerInput(tokens, tokens_position=place, segments=segments)
    with pytest.raises(RequestError, match=r"segments: got .*; expected integers"):
        model(inputs)
