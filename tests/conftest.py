"""What every test begins with."""

import pytest
import torch

from transom.errors import reset_notices


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """The models are tiny: waking a second core costs more than it does."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _notices_of_this_test():
    reset_notices()
