"""The settings of all tests: one thread, a cache folder of their own, quick writes and reports."""

import os
import signal
import warnings
from contextlib import suppress
from importlib.util import find_spec

import pytest
import torch

from transom.base.errors import reset_notices
from transom.base.runtime import one_thread


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """The models are tiny: to wake a second core costs more than it does."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _interruptible():
    """Commands that a shell starts in the background ignore SIGINT, those of `nohup` ignore SIGHUP,
    and so would the runs of tests.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _notices_again():
    """A notice is printed once per command, and each test is one."""
    reset_notices()


@pytest.fixture
def fresh_compiler():
    """torch.compile starts without the graphs of other tests, and on one thread."""
    torch._dynamo.reset()
    with warnings.catch_warnings(), one_thread():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own code, while it traces
        yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory, pytestconfig):
    """Each process of pytest-xdist has a cache folder; that of the developer is neither read nor
    changed. They share the compiled library, since compiling takes both cores for seconds, and so
    do later runs of pytest: it lies in the folder `.pytest_cache`, if pytest may write there.
    """
    cache, base = tmp_path_factory.mktemp("cache"), tmp_path_factory.getbasetemp()
    kept = None
    with suppress(OSError):
        kept = pytestconfig.cache.mkdir("ops") if hasattr(pytestconfig, "cache") else None
    if kept is not None and os.access(kept, os.W_OK):
        (cache / "ops").symlink_to(kept)
    elif "PYTEST_XDIST_WORKER" in os.environ:
        shared = base.parent / "ops"
        shared.mkdir(exist_ok=True)
        (cache / "ops").symlink_to(shared)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRANSOM_CACHE", str(cache))
        yield


@pytest.fixture(autouse=True, scope="session")
def _quick_writes():
    """No test outlives its process, so that nothing needs to be forced to the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _charts_without_curves():
    """Half the time of a short run would go into the curves of its report. The fixture `drawn` of
    test_report.py draws them.
    """
    if find_spec("matplotlib") is None:  # tests/gpu needs no more than torch and pytest
        yield
        return
    from transom.training.report import report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "chart", lambda title, *drawn: f"<h3>{title}</h3>")
        yield
