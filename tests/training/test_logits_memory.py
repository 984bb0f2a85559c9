"""No objective ever holds the logits of all tokens, in its loss, its reference or its held-out
score.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.training.finetune.runs import base_folder, chats, judged, preferences, run_args, solved
from tests.training.runs import tiny_args
from transom.evaluation import bits
from transom.tokenizers.training import byte_tokenizer
from transom.training.loop.setup import open_run
from transom.training.losses import log_probs

VOCABULARY = byte_tokenizer().vocab_size
VOCABULARIES = (VOCABULARY, VOCABULARY + 1)  # with a new token
DIMS = (32, 48)  # of the model and of a teacher
CHUNK = 16  # positions


class Widest(TorchDispatchMode):
    """The most positions that any one tensor holds logits of."""

    positions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if (
                not isinstance(one, torch.Tensor)
                or not one.ndim
                or one.size(-1) not in VOCABULARIES
            ):
                continue
            if one.ndim > 2 or one.size(0) not in DIMS:  # else an output matrix, transposed
                self.positions = max(self.positions, one.numel() // one.size(-1))
        return out


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(log_probs, "PLAIN_LOGITS", CHUNK * VOCABULARY)
    monkeypatch.setattr(log_probs, "CHUNK_LOGITS", CHUNK * VOCABULARY)
    monkeypatch.setattr(bits, "LOGITS", CHUNK * VOCABULARY)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_folder(tmp_path_factory.mktemp("base") / "model")


RUNS = {
    "sft": (chats, {}),
    "sft of all weights": (chats, {"method": "full"}),
    "sft with new tokens": (chats, {"new_tokens": ["<|x|>"]}),
    "distill": (chats, {"objective": "distill"}),
    "dpo": (preferences, {"objective": "dpo"}),
    "dpo of all weights": (preferences, {"objective": "dpo", "method": "full"}),
    "orpo": (preferences, {"objective": "orpo"}),
    "kto": (judged, {"objective": "kto"}),
    "grpo": (solved, {"objective": "grpo", "group": 4, "answer_tokens": 24, "beta": 0.1}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_finetune_step_and_its_score_hold_a_chunk_of_logits(base, tmp_path, name):
    rows, finetune = RUNS[name]
    if finetune.get("objective") == "distill":
        finetune = {**finetune, "teacher": str(base_folder(tmp_path / "teacher", dim=48))}
    args = run_args(tmp_path, base, rows(tmp_path / "rows.jsonl"), **finetune)
    with Widest() as widest:
        trainer = open_run(args, quiet=True)
        trainer.step()
        trainer.evaluate(None)
    assert 1 < widest.positions <= CHUNK


def test_a_step_of_pretraining_and_its_score_hold_a_chunk_of_logits(tmp_path):
    with Widest() as widest:
        trainer = open_run(tiny_args(tmp_path), quiet=True)
        trainer.step()
        trainer.evaluate(None)
    assert 1 < widest.positions <= CHUNK
