"""A process for tests of `Worker`."""

import os
import time

from transom.base.worker import serve


def answer(request):
    if request == "sleep":
        time.sleep(60)
    if request == "grow":
        try:
            return len("a" * 2**40)
        except MemoryError:
            return "MemoryError"
    return [request, os.getpid()]


if __name__ == "__main__":
    serve(answer, 1 << 29)
