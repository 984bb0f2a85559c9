"""One tiny Llama of `transformers` in a folder, and what `transom eval` makes of it."""

import pytest

from tests.evaluation.twins import write_llama
from transom.evaluation.eval_model import EvalModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def opened(folder):
    return EvalModel.open(folder, device="cpu", dtype="float32")
