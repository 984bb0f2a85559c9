"""Noise on embeddings: bounded as the paper says, in training only."""

import torch

from tests.helpers import random_model, random_tokens, tiny_args
from transom.training.noise import add_noise


def test_noise_is_uniform_up_to_the_bound_and_gone_in_evaluation():
    model, tokens = random_model(tiny_args()), random_tokens(4, 50)
    plain = model.tok_embeddings(tokens)
    handle = add_noise(model, 5.0)
    torch.testing.assert_close(model.eval().tok_embeddings(tokens), plain, rtol=0, atol=0)
    noise = model.train().tok_embeddings(tokens) - plain
    bound = 5.0 / (50 * 32) ** 0.5
    assert 0.95 * bound < noise.abs().max() <= bound * (1 + 1e-5)
    assert abs(float(noise.detach().std()) / (bound / 3**0.5) - 1) < 0.05
    handle.remove()
    torch.testing.assert_close(model.tok_embeddings(tokens), plain, rtol=0, atol=0)
