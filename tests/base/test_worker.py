"""A child process whose time and memory are bounded."""

import os
import signal
import threading
import time

import pytest

from transom.base.errors import WorkError
from transom.base.worker import Worker

ECHO = "tests.base.echo_worker"


@pytest.fixture
def worker():
    worker = Worker(ECHO)
    yield worker
    worker.close()


def test_one_process_answers_until_a_request_takes_too_long(worker):
    text, process = worker.ask("é\ud800\n", 10)
    assert text == "é\ud800\n" and worker.ask(1, 10) == [1, process]
    started = time.monotonic()
    assert worker.ask("sleep", 0.2) is None and time.monotonic() - started < 30
    assert worker.ask(2, 10)[1] != process


def test_memory_is_bounded(worker):
    assert worker.ask("grow", 10) == "MemoryError"


def test_a_process_that_does_not_start_is_an_error():
    with pytest.raises(WorkError, match="no_such_module ended with exit code 1"):
        Worker("transom.no_such_module").ask(1, 10)


def test_an_interrupted_request_is_not_answered_later(worker):
    worker.ask(0, 10)
    main = threading.get_ident()
    # A signal to this thread also ends the wait for the answer, as Ctrl-C does.
    threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        worker.ask("sleep", 30)
    assert worker.ask(1, 10)[0] == 1


def test_threads_and_forked_processes_get_their_own_answers(worker):
    process = worker.ask(0, 10)[1]
    answers: dict[int, int] = {}

    def ask(number):
        answers[number] = worker.ask(number, 10)[0]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: number for number in range(8)}
    child = os.fork()
    if child == 0:
        text, other = worker.ask("child", 10)
        worker.close()
        os._exit(0 if text == "child" and other != process else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert worker.ask("parent", 10) == ["parent", process]
