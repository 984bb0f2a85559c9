"""What every test runs under: one thread, and a cache folder of its own."""

import signal

import pytest
import torch

from transom.base.errors import reset_notices


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """The models are tiny: to wake a second core costs more than it does."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _interruptible():
    """Commands that a shell starts in the background ignore SIGINT, and so would the runs of
    tests.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _notices_again():
    """A notice is printed once per command, and each test is one."""
    reset_notices()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Each process of pytest-xdist has a cache folder; that of the developer is neither read nor
    changed.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRANSOM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
