"""Loading and converting hold one tensor at a time beside what they make, and no weight that a
file's map holds.
"""

import json
import shutil

import pytest

from tests.helpers import run_python

# 102 MB in float32, of which the embeddings are 20.
ARGS = {
    "dim": 512,
    "n_layers": 6,
    "n_heads": 8,
    "n_kv_heads": 4,
    "hidden_dim": 1280,
    "vocab_size": 10000,
}
MODEL_MB = 4 * (2 * 10000 * 512 + 6 * (3 * 512 * 1280 + 512 * 512 * 3 + 2 * 512) + 512) / 2**20
LARGEST_MB = 4 * 10000 * 512 / 2**20
SLACK_MB = 60  # code that is imported on the way, and what the allocator keeps for later
# The share of the files' bytes that has to be made: nothing, all that two ranks hold together, all
# of a cast.
LOADED = [("native", None, 0), ("hf", None, 0), ("meta", None, 1), ("hf", "bfloat16", 0.5)]
CONVERTED = [("meta", "hf", None), ("hf", "meta", "bfloat16")]

# One process makes the folders and forks another for each measurement, since to import torch takes
# the longest. What a process holds that no file backs is sampled while it works: the highest, less
# the start, in MB.
SCRIPT = f"""
import json, os, pathlib, sys, threading, traceback, torch
from transom.config.model_args import ModelArgs
from transom.checkpoints.files.consolidated import rule_of
from transom.checkpoints.convert import convert
from transom.checkpoints.load import load
from transom.checkpoints.save import save
from transom.models.llm import LLM

torch.set_num_threads(1)
at = pathlib.Path("FOLDER")

def anonymous():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

def highest(work):
    start, seen, done = anonymous(), [], threading.Event()
    def watch():
        while not done.wait(0.001):
            seen.append(anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = work()
    done.set(); watcher.join()
    return max(seen, default=start) - start, kept

def forked(work):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            sys.stdout.flush()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        sys.exit(1)

def write():
    model = LLM(ModelArgs.from_dict({ARGS!r}))
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(0.5)
    for format in ("native", "hf", "meta"):
        save(model, at / format, format=format)
    # Meta's in two ranks, so that tensors have to be laid together.
    whole = dict(torch.load(at / "meta/consolidated.00.pth", weights_only=True, mmap=True))
    for rank in (0, 1):
        state = {{}}
        for key, tensor in whole.items():
            dim = 1 if rule_of(key) == "columns" else 0
            state[key] = tensor if rule_of(key) == "same" else tensor.chunk(2, dim)[rank].clone()
        torch.save(state, at / f"meta/new{{rank}}")
    for rank in (0, 1):
        (at / f"meta/new{{rank}}").rename(at / f"meta/consolidated.0{{rank}}.pth")

def loading(format, dtype):
    peak, model = highest(lambda: load(at / format, dtype=dtype))
    held = sum(weight.nbytes for weight in model.parameters()) / 2**20
    print(json.dumps(["load", format, dtype, peak, held]))

def converting(source, format, dtype):
    peak, _ = highest(lambda: convert(at / source, at / f"{{source}}-{{format}}", format, dtype))
    print(json.dumps(["convert", source, format, peak]))

forked(write)
for format, dtype, _ in {LOADED!r}:
    forked(lambda: loading(format, dtype))
for source, format, dtype in {CONVERTED!r}:
    forked(lambda: converting(source, format, dtype))
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The MB that each case needed, and for loading those that its weights have."""
    at = tmp_path_factory.mktemp("large")
    try:
        lines = run_python(SCRIPT.replace("FOLDER", str(at))).splitlines()
    finally:
        shutil.rmtree(at)  # more than a gigabyte
    rows = [json.loads(line) for line in lines if line.startswith("[")]
    return {tuple(row[:3]): row[3:] for row in rows}


@pytest.mark.parametrize(("format", "dtype", "made"), LOADED)
def test_loading_needs_what_it_makes_and_one_tensor(measured, format, dtype, made):
    peak, held = measured["load", format, dtype]
    assert held == pytest.approx(MODEL_MB * (made or 1), rel=1e-3)
    assert peak - made * MODEL_MB < LARGEST_MB + SLACK_MB


@pytest.mark.parametrize(("source", "format"), [case[:2] for case in CONVERTED])
def test_converting_needs_one_tensor(measured, source, format):
    (peak,) = measured["convert", source, format]
    assert peak < 2 * LARGEST_MB + SLACK_MB
