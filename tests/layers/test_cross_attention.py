"""Attention to a context: torch's decoder layer is the peer; keys and values are made once per
request.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import random_model, random_tokens, tiny_args
from transom.base.errors import RequestError
from transom.config.model_args import ModelArgs
from transom.inference.loop import generate
from transom.layers.inputs import TransformerInput
from transom.models.build_step import build_step
from transom.models.llm import LLM

DECODER = {
    "dim": 32,
    "n_heads": 4,
    "n_kv_heads": 4,
    "hidden_dim": 48,
    "layer_pattern": "f",
    "norm": "layer",
    "qkv_bias": True,
    "out_bias": True,
    "ffn_bias": True,
    "ffn_gated": False,
    "context_dim": 32,
}


def decoder(**changes) -> LLM:
    return random_model(tiny_args(**{**DECODER, **changes}))


@pytest.fixture
def context() -> Tensor:
    return torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))


def as_torch(model: LLM, index: int) -> nn.TransformerDecoderLayer:
    """torch's own layer with the weights of one of our blocks."""
    block = model.layers[index]
    activation = block.layer.activation
    peer = nn.TransformerDecoderLayer(
        32, 4, 48, dropout=0.0, activation=activation, norm_first=True, batch_first=True
    )
    state = {}
    for theirs, ours in (("self_attn", block.attention), ("multihead_attn", block.cross_attention)):
        state[f"{theirs}.in_proj_weight"] = torch.cat(
            [ours.wq.weight, ours.wk.weight, ours.wv.weight]
        )
        state[f"{theirs}.in_proj_bias"] = torch.cat([ours.wq.bias, ours.wk.bias, ours.wv.bias])
        state |= {
            f"{theirs}.out_proj.weight": ours.wo.weight,
            f"{theirs}.out_proj.bias": ours.wo.bias,
        }
    pairs = (
        ("linear1", block.feed_forward.w_value),
        ("linear2", block.feed_forward.w_out),
        ("norm1", block.attention_norm),
        ("norm2", block.context_norm),
        ("norm3", block.ffn_norm),
    )
    for theirs, leaf in pairs:
        state |= {f"{theirs}.weight": leaf.weight, f"{theirs}.bias": leaf.bias}
    peer.load_state_dict(state)
    return peer


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_block_equals_torchs_decoder_layer_in_output_and_gradients(activation, context):
    model = decoder(activation=activation)
    inputs = TransformerInput(
        random_tokens(2, 9), context=context, context_lengths=torch.tensor([7, 4])
    )
    step = build_step(model.args, inputs, None, model.attend)
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
    hidden = torch.arange(7) >= torch.tensor([[7], [4]])
    future = nn.Transformer.generate_square_subsequent_mask(9).isinf()
    peer = as_torch(model, 0)
    ours, _ = model.layers[0](x, step)
    theirs = peer(x, context, tgt_mask=future, memory_key_padding_mask=hidden, tgt_is_causal=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(ours.sin().sum(), x, retain_graph=True)
    (grad_peer,) = torch.autograd.grad(theirs.sin().sum(), x, retain_graph=True)
    torch.testing.assert_close(grad, grad_peer, rtol=1e-4, atol=1e-4)
    ours.sin().sum().backward()
    theirs.sin().sum().backward()
    cross = model.layers[0].cross_attention
    torch.testing.assert_close(
        torch.cat([cross.wq.weight.grad, cross.wk.weight.grad, cross.wv.weight.grad]),
        peer.multihead_attn.in_proj_weight.grad,
        rtol=1e-4,
        atol=1e-4,
    )


def test_cached_calls_read_the_context_that_the_first_one_stored(context):
    model, tokens = decoder(n_kv_heads=2), random_tokens(2, 9)
    lengths = torch.tensor([7, 4])
    whole = model(TransformerInput(tokens, context=context, context_lengths=lengths)).logits
    cache = model.make_cache(2)
    parts = [
        model(
            TransformerInput(tokens[:, :4], context=context, context_lengths=lengths), cache
        ).logits
    ]
    saved = cache.snapshot()
    parts += [model(TransformerInput(tokens[:, i : i + 1]), cache).logits for i in range(4, 9)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    cache.restore(saved)
    swapped = cache.fork([1, 0])
    last = model(TransformerInput(tokens.flip(0)[:, 4:]), swapped).logits
    torch.testing.assert_close(last, whole.flip(0)[:, 4:], rtol=1e-5, atol=1e-5)


def test_padding_of_a_context_may_hold_anything(context):
    model, tokens = decoder(), random_tokens(2, 5)
    lengths = torch.tensor([7, 4])
    clean = model(TransformerInput(tokens, context=context, context_lengths=lengths)).logits
    context[1, 4:] = float("nan")
    spoiled = model(TransformerInput(tokens, context=context, context_lengths=lengths)).logits
    assert torch.equal(clean, spoiled)


def test_a_context_is_asked_for_once_and_only_where_it_is_read(context):
    tokens = random_tokens(2, 5)
    with pytest.raises(RequestError, match=r"context: got None; expected \[2, states, 32\]"):
        decoder()(TransformerInput(tokens))
    with pytest.raises(RequestError, match="context: got one; expected a model with context_dim"):
        random_model(tiny_args())(TransformerInput(tokens, context=context))
    with pytest.raises(RequestError, match=r"context: got \[2, 7, 16\]"):
        decoder()(TransformerInput(tokens, context=context[..., :16]))
    with pytest.raises(RequestError, match="context: got none"):
        generate(decoder(), tokens, 3)
    model = decoder()
    cache = model.make_cache(2)
    model(TransformerInput(tokens, context=context), cache)
    with pytest.raises(RequestError, match="context: got one again"):
        model(TransformerInput(tokens, context=context), cache)
    cache.reset()
    model(TransformerInput(tokens, context=context), cache)


def test_a_two_layer_encoder_decoder_learns_to_reverse_strings():
    """The decoder never sees the string: only cross-attention can tell it, from the encoder's
    states.
    """
    length, letters, start = 3, 8, 8
    shape = {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 64,
        "vocab_size": 9,
        "max_seq_len": 16,
    }
    encoder = LLM(ModelArgs.from_dict({**shape, "layer_pattern": "B"}))
    reader = LLM(ModelArgs.from_dict({**shape, "context_dim": 32}))
    encoder.init_weights(0)
    reader.init_weights(1)
    optimizer = torch.optim.AdamW(
        [*encoder.parameters(), *reader.parameters()], lr=1e-2, weight_decay=0.01
    )
    generator = torch.Generator().manual_seed(0)

    def batch(rows: int) -> tuple[Tensor, Tensor, Tensor]:
        text = torch.randint(letters, (rows, length), generator=generator)
        target = text.flip(1)
        return text, torch.cat([torch.full((rows, 1), start), target[:, :-1]], 1), target

    def logits(text: Tensor, given: Tensor) -> Tensor:
        context = encoder(TransformerInput(text, logits="none")).hidden_BTD
        return reader(TransformerInput(given, context=context)).logits

    steps = 150
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        text, given, target = batch(48)
        loss = nn.functional.cross_entropy(logits(text, given).flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    text, given, target = batch(200)
    right = (logits(text, given).argmax(-1) == target).float().mean()
    assert right > 0.98, f"{right:.2f} of the letters are right"
