"""The pages of docs/ideas say what is there: files, names, fields, and costs that were measured."""

import re
import shutil
import typing
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import transom
from benchmarks import options
from benchmarks.common import ROWS
from benchmarks.ideas import COST, PAGES, measured, read_rows, write_costs, write_index
from benchmarks.options import GROUPS, LOADING
from tests.helpers import TINY_VISION, tiny_args
from transom.base.fields import field_types
from transom.base.runtime import one_thread
from transom.config.model_args import ModelArgs
from transom.evaluation.eval_args import EvalArgs
from transom.inference.decode_args import DecodeArgs
from transom.layers.inputs import TransformerInput
from transom.lora.args import CombineArgs
from transom.models.llm import LLM
from transom.quantize.args import QuantizeArgs
from transom.training.config import TrainArgs

ROOT = Path(__file__).parents[1]
IDEAS = ROOT / "docs" / "ideas"
NAMES = sorted(path.stem for path in IDEAS.glob("*.md") if path.name != "README.md")
# Arguments that are no part of a run's config; pages and tables write the class in front.
NAMED: dict[str, Any] = {
    one.__name__: one for one in (TransformerInput, CombineArgs, EvalArgs, DecodeArgs, QuantizeArgs)
}
SECTIONS = ["What it is", "Formula", "Paper", "Files", "When to use it", "Cost"]

ROW = {
    "benchmark": "options",
    "case": "sinks",
    "peer": "plain model",
    "ms": 1234.5,
    "ratio": 0.5,
    "target": 1.0,
    "processor": "one CPU",
    "threads": 2,
    "torch": "2.13.0",
    "commit": "abc1234",
    "date": "2026-01-02",
}


def page(name: str) -> str:
    return (IDEAS / f"{name}.md").read_text(encoding="utf-8")


def section(name: str, title: str) -> str:
    return page(name).partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def costs(name: str) -> list[tuple[str, str]]:
    """(benchmark, case) of every row asked for; the case is empty where all are."""
    asked = [found[2].split("; ") for found in COST.finditer(page(name))]
    return [(benchmark, case) for benchmark, *cases in asked for case in cases or [""]]


def dataclasses_in(kind: Any) -> list[Any]:
    if is_dataclass(kind):
        return [kind]
    return [one for option in typing.get_args(kind) for one in dataclasses_in(option)]


def has_field(path: str) -> bool:
    """Whether `a.b` is a field of the model's arguments, of a run's, or of the class it begins
    with.
    """
    first, *rest = path.split(".")
    roots: list[Any] = [ModelArgs, TrainArgs]
    if first in NAMED:
        roots, first = [NAMED[first]], rest.pop(0)
    kinds = [kind for root in roots if (kind := field_types(root).get(first)) is not None]
    for name in rest:
        parts = [part for kind in kinds for part in dataclasses_in(kind)]
        kinds = [kind for part in parts if (kind := field_types(part).get(name)) is not None]
    return bool(kinds)


@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_short_and_has_every_section(name):
    text = page(name)
    assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == SECTIONS
    assert text.startswith("# ")
    assert all(section(name, title).strip() for title in SECTIONS)
    written = COST.sub(r"\1\n\4", text)
    assert len(written.splitlines()) <= 80
    assert max(map(len, written.splitlines())) <= 116


@pytest.mark.parametrize("name", NAMES)
def test_a_page_names_its_paper_or_source(name):
    assert re.search(r"arXiv \d{4}\.\d{5}|https://", " ".join(section(name, "Paper").split()))


@pytest.mark.parametrize("name", NAMES)
def test_files_exist_and_define_what_a_page_says(name):
    lines = re.findall(r"^- `(.+?)`(.*)$", section(name, "Files"), flags=re.MULTILINE)
    assert any(path.startswith("src/") for path, _ in lines)
    for path, rest in lines:
        source = (ROOT / path).read_text(encoding="utf-8")
        for known in re.findall(r"`(\w+)`", rest):
            defined = rf"^\s*(?:def|class) {known}\b|^{known}\b.*? = "
            assert re.search(defined, source, flags=re.MULTILINE), f"{known} in {path}"


@pytest.mark.parametrize("name", NAMES)
def test_fields_exist(name):
    said = re.search(
        r"^Fields: (.+?)\n\n", section(name, "What it is") + "\n\n", flags=re.DOTALL | re.MULTILINE
    )
    assert said is not None
    fields = re.findall(r"`([\w.]+)`", said[1])
    assert fields
    if said[1].startswith("none; "):  # what is called instead of set
        assert [
            field for field in fields if not callable(getattr(LLM, field.removeprefix("LLM.")))
        ] == []
    else:
        assert [field for field in fields if not has_field(field)] == []


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#]+)\)", page(name)):
        assert target.startswith("https://") or (IDEAS / target).exists(), target


@pytest.mark.parametrize("name", NAMES)
def test_costs_are_asked_for_by_names_that_a_benchmark_writes(name):
    assert costs(name)
    measured_here = {LOADING, *(case for group in GROUPS for case in group)}
    sources = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py")
    )
    for benchmark, case in costs(name):
        assert f'"benchmark": "{benchmark}"' in sources
        assert not case or (
            case in measured_here if benchmark == "options" else f'"{case}"' in sources
        )


def test_every_measured_option_is_on_a_page():
    peers = {next(iter(group)) for group in GROUPS}
    asked = {case for name in NAMES for benchmark, case in costs(name) if benchmark == "options"}
    assert {LOADING, *(case for group in GROUPS for case in group)} - asked <= peers


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: list(group)[-1])
def test_every_measured_option_runs(group, monkeypatch):
    small = {**options.SHAPE, "dim": 128, "n_heads": 2, "hidden_dim": 64, "vocab_size": 64}
    monkeypatch.setattr(options, "SHAPE", small)
    monkeypatch.setattr(options, "LENGTH", 64)
    with one_thread():
        for case in group.values():
            options.make_step(case, torch.device("cpu"))()


def test_costs_on_the_pages_are_those_of_the_rows(tmp_path):
    shutil.copytree(IDEAS, tmp_path, dirs_exist_ok=True)
    assert [path.name for path in write_costs(tmp_path, read_rows(ROWS))] == []


@pytest.mark.parametrize("name", NAMES)
def test_no_figure_under_cost_is_typed(name):
    prose = COST.sub("", section(name, "Cost"))
    assert not re.search(r"(?<!\w)\d", prose), prose


def test_the_index_is_generated_and_whole(tmp_path):
    assert sorted(name for names in PAGES.values() for name in names) == NAMES
    shutil.copytree(IDEAS, tmp_path, dirs_exist_ok=True)
    assert write_index(tmp_path).read_text() == (IDEAS / "README.md").read_text()


def test_a_row_is_written_where_it_was_asked_for(tmp_path):
    given = (
        "# Sinks\n<!-- cost:options; sinks -->\nold\n<!-- /cost -->\nkept\n<!-- cost:moe "
        "-->\n<!-- /cost -->\n"
    )
    (tmp_path / "a.md").write_text(given)
    assert write_costs(tmp_path, [ROW, {**ROW, "case": "other"}]) == [tmp_path / "a.md"]
    text = (tmp_path / "a.md").read_text()
    assert "one CPU, 2 threads, torch 2.13.0, commit abc1234, 2026-01-02:" in text
    assert "- sinks: ms 1,234.5, ratio 0.5 (peer: plain model)" in text
    assert "other" not in text
    assert "old" not in text
    assert "kept\n<!-- cost:moe -->\nnot measured yet\n<!-- /cost -->" in text
    assert write_costs(tmp_path, [ROW]) == []


def test_a_case_without_a_row_is_said_beside_those_that_have_one():
    assert measured("options; sinks; other", [ROW]).splitlines()[-1] == "- other: not measured yet"


def test_rows_of_two_machines_stand_apart():
    text = measured("options", [ROW, {**ROW, "processor": "two GPUs"}, {**ROW, "case": "other"}])
    kinds = [line.partition(":")[0].partition(",")[0] for line in text.splitlines() if line]
    assert kinds == ["one CPU", "- sinks", "- other", "two GPUs", "- sinks"]


def names_of(title: str) -> list[str]:
    """What the right column of a table of docs/names.md says."""
    text = (ROOT / "docs" / "names.md").read_text(encoding="utf-8")
    table = text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    cells = [line.split(" | ")[-1] for line in table.splitlines() if line.startswith("| `")]
    return [name for cell in cells for name in re.findall(r"`([\w.]+)`", cell)]


@pytest.mark.parametrize("title", ["Fields", "Fine-tuning fields"])
def test_fields_named_beside_those_of_other_codes_exist(title):
    assert names_of(title)
    assert [name for name in names_of(title) if not has_field(name)] == []


def test_calls_named_beside_those_of_other_codes_exist():
    text = (ROOT / "docs" / "names.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`transom\.(\w+)", text))
    assert "merge_folders" in named
    assert sorted(named - set(transom.__all__)) == []


def test_weights_named_beside_those_of_other_codes_exist():
    mla = {
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    }
    moe = {"routing": "biased_sigmoid", "shared_expert": True, "hidden_dim": 8}
    plain = {"norm_placement": "both", "qk_norm": "head", "attn_sinks": True, "context_dim": 8}
    models = (
        {**plain, "vision_args": TINY_VISION},
        {"n_kv_heads": None, "mla_args": mla, "moe_args": moe},
    )
    with torch.device("meta"):
        known = [
            name for fields in models for name, _ in LLM(tiny_args(**fields)).named_parameters()
        ]
    assert names_of("Weights")
    assert [
        name for name in names_of("Weights") if not any(f".{name}." in f".{one}." for one in known)
    ] == []
