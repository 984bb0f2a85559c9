"""The tokens of each expert, counted another way."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.helpers import random_model, random_tokens, tiny_args
from transom.base.errors import RequestError
from transom.evaluation.experts import expert_tokens, token_row
from transom.evaluation.trace import recording
from transom.layers.inputs import TransformerInput
from transom.layers.moe import MoE
from transom.models.llm import LLM


class Letters:
    """Stands for a tokenizer: id n is the n-th character."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(65 + one) for one in ids)


def mixture(**fields: object) -> LLM:
    moe = {"num_experts": 4, "top_k": 2, "hidden_dim": 16, "first_dense_layers": 1, **fields}
    return random_model(tiny_args(n_layers=3, moe_args=moe))


def counted(model: LLM, batches: list[TransformerInput]) -> list[list[Counter[int]]]:
    """Token by token, one unpadded row at a time."""
    layers = [
        block.feed_forward.router for block in model.layers if isinstance(block.feed_forward, MoE)
    ]
    counters = [[Counter() for _ in range(4)] for _ in layers]
    for batch in batches:
        lengths = (
            batch.lengths
            if batch.lengths is not None
            else [batch.tokens.size(1)] * len(batch.tokens)
        )
        for row, length in zip(batch.tokens, lengths, strict=True):
            with recording(model) as recorded:
                model(TransformerInput(row[None, :length]))
            for router, experts in zip(layers, counters, strict=True):
                for token, chosen in zip(
                    row[:length].tolist(), recorded.outputs[router][0].tolist(), strict=True
                ):
                    for e in chosen:
                        experts[e][token] += 1
    return counters


def test_counts_and_order_are_those_of_counting_one_by_one():
    model = mixture(expert_capacity=0.25, jitter=0.5).train()  # which act in training only
    padded = TransformerInput(random_tokens(3, 20, seed=1), lengths=torch.tensor([20, 3, 11]))
    batches = [TransformerInput(random_tokens(2, 30, vocab_size=9)), padded]
    got = expert_tokens(model, iter(batches), top=3)
    assert model.training, "left as it was"
    expected = counted(model.eval(), batches)
    assert len(got) == 2
    for experts, counters in zip(got, expected, strict=True):
        for one, counter in zip(experts, counters, strict=True):
            assert one.total == counter.total()
            assert (
                list(one.most) == sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:3]
            )


def test_a_row_of_metrics_has_text_and_shares_and_room_for_idle_experts():
    model = mixture(top_k=1, router_bias=True)
    with torch.no_grad():
        model.layers[2].feed_forward.router.bias[0] = 100.0
    tokens = torch.tensor([[2, 2, 2, 5]])
    row = token_row(expert_tokens(model, [TransformerInput(tokens)]), Letters())
    assert row["expert_tokens"][1] == [[["C", 0.75], ["F", 0.25]], [], [], []]


def test_a_dense_model_is_refused():
    with pytest.raises(RequestError, match="moe_args"):
        expert_tokens(random_model(tiny_args()), [])


def test_held_out_text_is_read_no_further_than_the_budget():
    """The tokens of experts are measured on the beginning of the held-out text; the rest is never
    read.
    """
    from types import SimpleNamespace

    import numpy as np

    from tests.helpers import random_model, tiny_args
    from transom.distributed.ranks import Ranks
    from transom.training.loop.monitor import Monitor

    class Documents:
        read = 0

        def __len__(self):
            return 1000

        def document(self, index):
            self.read += 1
            return np.arange(8)

    documents = Documents()
    monitor = SimpleNamespace(
        model=random_model(tiny_args()),
        ranks=Ranks(),
        args=SimpleNamespace(data=SimpleNamespace(seq_len=8)),
        data=SimpleNamespace(held_out={"a": documents}),
    )
    texts = list(Monitor._held_out_text(monitor, 20))
    assert len(texts) == documents.read == 3
