"""Noise on embeddings: bounded as the paper says, in training only, by the length of each
example.
"""

import pytest
import torch

from tests.helpers import random_model, random_tokens, tiny_args
from transom.layers.inputs import TransformerInput
from transom.training.losses.noise import add_embedding_noise

ROWS = random_tokens(2, 60)
CALLS = {
    "whole rows": (TransformerInput(ROWS), [[60], [60]]),
    "packed": (TransformerInput(ROWS, sizes=[[10, 50], [60]]), [[10, 50], [60]]),
    "padded": (TransformerInput(ROWS, lengths=torch.tensor([20, 60])), [[20], [60]]),
}


@pytest.mark.parametrize("call", CALLS)
def test_noise_is_uniform_up_to_the_bound_of_its_example(call):
    inputs, sizes = CALLS[call]
    model = random_model(tiny_args())
    seen = []
    add_embedding_noise(model, 5.0)
    model.tok_embeddings.register_forward_hook(
        lambda module, args, output: seen.append(output.detach())
    )
    plain = model.tok_embeddings.weight.detach()[ROWS]
    model.eval()(inputs)
    assert torch.equal(seen.pop(), plain)
    model.train()(inputs)
    found = seen.pop() - plain
    for row, parts in zip(found, sizes, strict=True):
        for size, part in zip(parts, row[: sum(parts)].split(parts), strict=True):
            bound = 5.0 / (size * 32) ** 0.5
            assert 0.9 * bound < part.abs().max() <= bound * (1 + 1e-5)
            assert abs(float(part.std()) / (bound / 3**0.5) - 1) < 0.1
