"""Loading and converting hold one tensor at a time beside what they make, and no weight that a file's map holds."""

import json
import shutil

import pytest

from tests.helpers import run_python

# What the process holds that no file backs, sampled while `work` runs; the highest, less the start, in MB.
METER = """
import threading, sys, torch
torch.set_num_threads(1)
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
"""
# 200 MB in float32, of which the embeddings are 41.
ARGS = {"dim": 512, "n_layers": 12, "n_heads": 8, "n_kv_heads": 4, "hidden_dim": 1280, "vocab_size": 20000}
MODEL_MB = 4 * (2 * 20000 * 512 + 12 * (3 * 512 * 1280 + 512 * 512 * 3 + 2 * 512) + 512) / 2**20
LARGEST_MB = 4 * 20000 * 512 / 2**20
SLACK_MB = 60  # code that is imported on the way, and what the allocator keeps for later


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    at = tmp_path_factory.mktemp("large")
    run_python(f"""
import torch
from transom.args import ModelArgs
from transom.model import LLM
from transom.checkpoints.save import save
args = ModelArgs.from_dict({ARGS!r})
model = LLM(args)
with torch.no_grad():
    for weight in model.parameters():
        weight.fill_(0.5)
for format in ("native", "hf", "meta"):
    save(model, "{at}/" + format, format=format)
""")
    # Meta's in two ranks, so that tensors have to be laid together.
    run_python(f"""
import json, torch, pathlib
from transom.checkpoints.consolidated import rule_of
whole = torch.load("{at}/meta/consolidated.00.pth", weights_only=True, mmap=True)
for rank in (0, 1):
    state = {{}}
    for key, tensor in whole.items():
        rule = rule_of(key)
        dim = 1 if rule == "columns" else 0
        state[key] = tensor if rule == "same" else tensor.chunk(2, dim)[rank].clone()
    torch.save(state, "{at}/meta/new" + str(rank))
for rank in (0, 1):
    pathlib.Path("{at}/meta/new" + str(rank)).rename("{at}/meta/consolidated.0" + str(rank) + ".pth")
""")
    yield at
    shutil.rmtree(at)  # half a gigabyte


# The share of the files' bytes that has to be made: nothing, all that two ranks hold together, all of a cast.
@pytest.mark.parametrize(
    ("format", "dtype", "made"), [("native", None, 0), ("hf", None, 0), ("meta", None, 1), ("hf", "bfloat16", 0.5)]
)
def test_loading_needs_what_it_makes_and_one_tensor(folders, format, dtype, made):
    document = json.loads(
        run_python(
            METER
            + f"""
import json
from transom.checkpoints.load import load
peak, model = highest(lambda: load("{folders}/{format}", dtype={dtype!r}))
held = sum(weight.nbytes for weight in model.parameters()) / 2**20
print(json.dumps({{"peak": peak, "held": held}}))
"""
        ).splitlines()[-1]
    )
    assert document["held"] == pytest.approx(MODEL_MB * (made or 1), rel=1e-3)
    assert document["peak"] - made * MODEL_MB < LARGEST_MB + SLACK_MB


@pytest.mark.parametrize(("source", "format", "dtype"), [("meta", "hf", "None"), ("hf", "meta", "'bfloat16'")])
def test_converting_needs_one_tensor(folders, tmp_path, source, format, dtype):
    out = run_python(
        METER
        + f"""
from transom.checkpoints.convert import convert
print(highest(lambda: convert("{folders}/{source}", "{tmp_path}/out", "{format}", {dtype}))[0])
"""
    )
    assert float(out.splitlines()[-1]) < 2 * LARGEST_MB + SLACK_MB
