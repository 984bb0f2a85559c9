"""New tokens get rows, and nothing else of the model moves."""

import pytest
import torch

from tests.helpers import random_model, random_tokens, tiny_args
from transom.base.errors import RequestError
from transom.layers.inputs import TransformerInput
from transom.lora.vocabulary import add_tokens
from transom.tokenizers.tokenizer import Tokenizer
from transom.tokenizers.training import byte_tokenizer

NEW = ("<|tool|>", "<|end|>")


def model_for(tokenizer, **changes):
    return random_model(tiny_args(vocab_size=tokenizer.vocab_size, **changes))


@pytest.mark.parametrize("tied", [False, True])
def test_old_logits_stay_and_new_rows_are_the_mean(tied):
    tokenizer = byte_tokenizer()
    model = model_for(tokenizer, tie_embeddings=tied)
    tokens, count = random_tokens(2, 9), tokenizer.vocab_size
    before = model(TransformerInput(tokens)).logits
    larger = add_tokens(model, tokenizer, NEW, multiple=16)
    after = model(TransformerInput(tokens)).logits
    assert (larger.vocab_size, model.args.vocab_size) == (count + 2, -(-(count + 2) // 16) * 16)
    torch.testing.assert_close(after[..., :count], before)
    torch.testing.assert_close(
        model.tok_embeddings.weight[count], model.tok_embeddings.weight[:count].mean(0)
    )


def test_a_new_token_is_control_token_in_a_template_only_and_survives_saving(tmp_path):
    tokenizer = byte_tokenizer()
    larger = add_tokens(model_for(tokenizer), tokenizer, NEW)
    larger.save(tmp_path)
    read = Tokenizer.load(tmp_path)
    assert read.encode("a<|tool|>", allowed_special="all")[-1] == tokenizer.vocab_size
    assert tokenizer.vocab_size not in read.encode("a<|tool|>")
    assert (read.adds_bos, read.bos_id, read.eos_id) == (
        tokenizer.adds_bos,
        tokenizer.bos_id,
        tokenizer.eos_id,
    )


def test_a_token_that_is_there_is_refused():
    tokenizer = byte_tokenizer()
    known = tokenizer.id_to_token(tokenizer.eos_id)
    with pytest.raises(RequestError, match="no token yet"):
        add_tokens(model_for(tokenizer), tokenizer, [known])
