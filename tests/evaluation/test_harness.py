"""The adapter for lm-evaluation-harness against the library's own `hf` model, on the same
folder.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.evaluation.twins import LONGEST, TEXT, write_llama
from tests.helpers import run_python

pytest.importorskip("lm_eval")
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from transom.base.errors import RequestError
from transom.chat.template import ChatTemplate
from transom.evaluation import harness
from transom.evaluation.choices import score_choices
from transom.evaluation.eval_args import EvalArgs
from transom.evaluation.eval_model import EvalModel
from transom.evaluation.harness import TransomLM, read_settings
from transom.evaluation.task_data import open_data
from transom.inference.text import Completion
from transom.layers.inputs import TransformerInput

QUESTIONS = [
    {
        "question": "The quick brown fox jumps over the lazy",
        "choices": ["dog", "café and fox", "fox"],
        "answer": 0,
    },
    {
        "question": "Question: what is two and two? Answer:",
        "choices": ["four", "three"],
        "answer": 1,
    },
    {"question": "Größe und", "choices": ["日本語", "naïve", "emoji"], "answer": 2},
    {"question": "One of ", "choices": ["A", "B", "C", "D"], "answer": 3},
]
COMMON = "dataset_path: json\ndataset_kwargs:\n  data_files: {data}\ntest_split: train\n"
TASKS = {
    "local_choices": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: "
    "choices\n"
    "doc_to_target: answer\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n  - metric: "
    "acc_bytes\n",
    "local_text": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: "
    "'{{question}}'\nmetric_list:\n  - metric: bits_per_byte\n  - metric: byte_perplexity\n",
    "local_answers": "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: "
    "'{{choices[0]}}'\n"
    "generation_kwargs:\n  until: ['.', '\\n']\n  max_gen_toks: 8\nmetric_list:\n  - metric: "
    "exact_match\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def ours(folder):
    return TransomLM(str(folder), device="cpu", dtype="float32", batch_size="auto")


@pytest.fixture(scope="module")
def theirs(folder):
    # Its cache takes the wrong positions where one text is cut at two places (lm_eval 0.4.13).
    return HFLM(
        pretrained=str(folder), device="cpu", dtype="float32", batch_size=2, logits_cache=False
    )


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of local tasks over `QUESTIONS`."""
    where = tmp_path_factory.mktemp("tasks")
    data = where / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    for name, text in TASKS.items():
        (where / f"{name}.yaml").write_text(f"task: {name}\n{COMMON.format(data=data)}{text}")
    return where


def requests(kind, rows):
    return [Instance(kind, {}, row, index) for index, row in enumerate(rows)]


def test_continuations_are_as_likely(ours, theirs):
    pairs = [
        ("The quick", " brown fox"),
        ("The quick brown fox ", "jumps"),  # a space that moves
        ("The qu", "ick brown"),  # a token that spans the boundary
        ("", "Hello"),
        ("<s>The quick", " brown"),  # a BOS that is there already
        ("x " * LONGEST, " dog"),  # a context that is cut
        ("Größe", " 日本語"),
        *(
            ("Question: what is two and two? Answer:", f" {word}")
            for word in ("four", "three", "4")
        ),
    ]
    got = ours.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    want = theirs.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    assert [one for one, _ in got] == pytest.approx([one for one, _ in want], rel=1e-5)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in want]


def test_the_greedy_continuation_is_called_greedy(ours, theirs):
    ids = ours.tok_encode("The fox")
    logits_V = ours.eval_model.model(TransformerInput(torch.tensor([ids])), inference=True).logits[
        0, -1
    ]
    best, second = logits_V.topk(2).indices.tolist()
    pairs = [(None, ids, [best]), (None, ids, [second])]
    for model in (ours, theirs):
        assert [greedy for _, greedy in model._loglikelihood_tokens(pairs, disable_tqdm=True)] == [
            True,
            False,
        ]


def test_whole_texts_are_as_likely(ours, theirs):
    texts = [(text,) for text in (*TEXT, "the dog " * LONGEST)]
    got = ours.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    want = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    assert got == pytest.approx(want, rel=1e-5)


def test_generations_are_the_same(ours, theirs):
    prompts = [
        ("The quick brown", {"until": ["\n"], "max_gen_toks": 12}),
        ("Question", {"until": ["\n"], "max_gen_toks": 12}),
        ("The dog", {"until": ["e", "o"], "max_new_tokens": 20, "do_sample": False}),
        ("x " * LONGEST, {"until": [], "max_gen_toks": 20}),
    ]
    got = ours.generate_until(requests("generate_until", prompts), disable_tqdm=True)
    assert got == theirs.generate_until(requests("generate_until", prompts), disable_tqdm=True)


@pytest.mark.parametrize("asked", [True, False])
def test_chats_are_written_the_same(ours, theirs, asked):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes, "}]
    chat = chat[:1] if asked else chat
    text = ours.apply_chat_template(chat, asked)
    assert text == theirs.apply_chat_template(chat, asked)
    assert ours.tok_encode(text) == theirs.tok_encode(text)
    assert ours.chat_template(True) == theirs.chat_template(True)


def test_reasoning_is_no_part_of_an_answer(ours, monkeypatch):
    source = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}"
    monkeypatch.setitem(ours.eval_model.__dict__, "template", ChatTemplate(source, ours.tokenizer))
    said = Completion("<think>five?</think>\nfour", [1], "stop")
    monkeypatch.setattr(harness, "complete_prompts", lambda *_, **__: iter([(0, said)]))
    rows = requests("generate_until", [("two and two", {"until": [], "max_gen_toks": 8})])
    monkeypatch.setattr(ours, "_chats", False)
    assert ours.generate_until(rows, disable_tqdm=True) == [said.text]
    ours.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert ours.generate_until(rows, disable_tqdm=True) == ["four"]


def test_local_tasks_score_the_same(ours, theirs, tasks):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = [
        simple_evaluate(model=model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)[
            "results"
        ]
        for model in (ours, theirs)
    ]
    for name in TASKS:
        got, want = ({k: v for k, v in one[name].items() if isinstance(v, float)} for one in found)
        assert got == pytest.approx(want, rel=1e-5) and got


def test_our_multiple_choice_counts_as_the_library_does(ours, tasks):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(
        model=ours,
        tasks=["local_choices"],
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
    )
    data = open_data([str(tasks / "questions.jsonl")])[0]
    got = score_choices(ours.eval_model, data, EvalArgs())
    for sample in found["samples"]["local_choices"]:
        at = sample["doc_id"]
        logprobs = [one for ((one, _),) in sample["resps"]]
        assert got.rows[at]["logprobs"] == pytest.approx(logprobs, rel=1e-5)
        right = {name: ratio.parts[at] for name, ratio in got.scores.items()}
        assert right == {name: sample[name] for name in right}


def test_generation_settings_are_read_or_refused():
    until, count, sampling = read_settings({"until": "\n", "temperature": 0.7, "top_p": 0.9}, 256)
    assert (until, count, sampling.temperature, sampling.top_p) == (["\n"], 256, 0.7, 0.9)
    assert read_settings({"do_sample": False, "temperature": 0.7, "max_gen_toks": 9}, 256)[1:] == (
        9,
        read_settings({}, 9)[2],
    )
    for wrong in ({"num_beams": 4}, {"typical_p": 0.9}):
        with pytest.raises(RequestError, match=next(iter(wrong))):
            read_settings(wrong, 256)


@pytest.mark.parametrize(
    "known", ["", "EntryPoint('transom', 'transom.evaluation.harness:TransomLM', 'x')"]
)
def test_the_class_is_found_by_its_name(known):
    """Without an entry point the module registers it; where there is one, the library has its name
    before.
    """
    code = (
        "import lm_eval.models\nfrom importlib.metadata import EntryPoint\n"
        "from lm_eval.api.registry import get_model, model_registry\n"
        + (
            f"model_registry.register('transom', target={known})\n"
            if known
            else "import transom.evaluation.harness\n"
        )
        + "print(get_model('transom').__module__)"
    )
    assert run_python(code).strip() == "transom.evaluation.harness"


@pytest.mark.slow  # it reads the thousands of tasks that the library brings
def test_the_librarys_command_line_knows_the_model(folder, tasks):
    src = Path(__file__).parents[2] / "src"
    words = [
        "--model",
        "transom",
        "--model_args",
        f"pretrained={folder},dtype=float32",
        "--device",
        "cpu",
    ]
    words += ["--tasks", "local_choices", "--include_path", str(tasks)]
    path = os.pathsep.join([str(src), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "transom.evaluation.harness", *words],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "|local_choices|" in done.stdout and "transom" in done.stdout


@pytest.mark.slow
def test_the_verb_runs_tasks(folder, tasks, capsys):
    from transom.cli.main import main

    words = [
        "eval",
        str(folder),
        "--tasks",
        "local_*",
        "--include-path",
        str(tasks),
        "--dtype",
        "float32",
        "--json",
    ]
    assert main([*words, "--device", "cpu", "--limit", "3"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(document["results"]) == set(TASKS)
    assert (
        document["model"]["fingerprint"] and document["n-samples"]["local_text"]["effective"] == 3
    )
    assert main([*words[:3], "no_such_task"]) == 2
    assert "--tasks: got 'no_such_task'; expected a task of lm_eval" in capsys.readouterr().err


def test_an_open_model_is_taken_as_it_is(folder, ours):
    lm = TransomLM(EvalModel.open(folder, device="cpu", dtype="float32"), batch_size=1)
    pairs = requests("loglikelihood", [("The quick", " brown fox"), ("The", " dog")])
    alone, batched = ([one for one, _ in model.loglikelihood(pairs, True)] for model in (lm, ours))
    assert alone == pytest.approx(batched)
