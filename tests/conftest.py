"""One thread for every test: the models are tiny, and waking a second core costs more than it does."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)
