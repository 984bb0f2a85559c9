"""The report of a run: its numbers come from the files, whatever state those are in."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transom.base.errors import RequestError
from transom.training.report import report
from transom.training.report.charts import chart, smoothed
from transom.training.report.report import read_metrics, write_report

VOID = {"meta", "br"}


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    monkeypatch.setattr(report, "chart", chart)


class Page(HTMLParser):
    """Checks that every tag is closed in order; keeps tags, text and the labels of pictures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.pictures: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(self.html)
        self.close()
        assert self._open == [], "unclosed tags"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "svg":
            self.pictures.append(str(dict(attrs).get("aria-label")))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text += data + "\n"


def training_row(step: int, rng: np.random.Generator, *, experts: int = 0) -> dict[str, Any]:
    row = {
        "step": step,
        "loss": 1.6 + 5.6 * math.exp(-step / 60) + 0.1 * rng.normal(),
        "learning_rates": {"matrices": 0.02, "embeddings": 0.01, "output": 0.01},
        "grad_norm": math.exp(0.3 * rng.normal()),
        "tokens": step * 2048,
        "tokens_per_second": 8100.0,
        "mfu": 0.613,
        "memory_bytes": 512_000_000,
        "seconds": step * 0.25,
        "a_later_key": [1],
    }
    if experts:
        row |= {"aux_loss": 1.02, "expert_load": rng.dirichlet([20.0] * experts, size=2).tolist()}
    return row


def evaluation_row(step: int, bits: float) -> dict[str, Any]:
    scores = {"bits_per_byte": bits, "perplexity": 9.125, "tokens": 41_000, "bytes": 123_456}
    return {
        "step": step,
        "held_out": {**scores, "sources": {"stories & banana": scores, "code": scores}},
    }


def write_run(run: Path, rows: list[dict[str, Any]], *, steps: int = 400, tail: str = "") -> Path:
    run.mkdir()
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + tail, encoding="utf-8"
    )
    machine = {
        "python": "3.11.2",
        "torch": "2.13.0",
        "processor": "Some <CPU>",
        "gpu": None,
        "threads": 2,
    }
    facts = {
        "transom": "0.1.0",
        "machine": machine,
        "parameters": 1_377_408,
        "steps": steps,
        "seed": 7,
    }
    (run / "run.json").write_text(
        json.dumps({**facts, "config": {"model": "demo"}}), encoding="utf-8"
    )
    return run


def fake_rows(steps: int, *, experts: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        rows.append(training_row(step, rng, experts=experts))
        if step % 100 == 0:
            rows.append(evaluation_row(step, 1.9 if step == 400 else 3 - step / 200))
    return rows


def test_the_header_shows_the_numbers_of_the_files(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a-run", fake_rows(400))
    (run / "config.yaml").write_text("steps: 400  # <as given>\n", encoding="utf-8")
    report = write_report(run)
    assert report == run / "report.html"
    assert sorted(path.name for path in run.iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "run.json",
    ]
    page = Page(report)
    for shown in (
        *("a-run", "1.377M parameters", "step 400 of 400", "Some <CPU>", "torch 2.13.0", "seed 7"),
        *("1.500", "best, step 300", "819,200", "1m40s", "8,100", "61.3%", "0.51 GB"),
        *("stories & banana", "123,456", "9.12", "# <as given>", "embeddings, output"),
    ):
        assert shown in page.text, shown
    assert [picture.split(" over ")[0] for picture in page.pictures] == [
        *(
            "Training loss",
            "Held-out bits per byte",
            "Learning rate",
            "Gradient norm",
            "Throughput",
            "MFU",
        )
    ]


def test_it_needs_nothing_from_outside_and_its_pictures_do_not_share_ids(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path / "run", fake_rows(100, experts=4))))
    assert not re.search(r"https?:|@import|url\((?!#)", page.html)
    assert not {"script", "link", "iframe"} & set(page.tags)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 0
    references = [value for name, value in page.attributes if name in ("xlink:href", "href", "src")]
    assert all(
        value[1:] in ids if value[0] == "#" else value.startswith("data:image/png")
        for value in references
    )
    clips = {value for name, value in page.attributes if name == "clip-path"}
    assert clips and all(value[5:-1] in ids for value in clips)


def test_text_of_the_model_is_shown_and_not_run(tmp_path: Path) -> None:
    evil = "</pre><script>alert('x')</script> & more"
    rows = [
        training_row(1, np.random.default_rng(0)),
        evaluation_row(1, 2.0),
        {"step": 1, "event": "<i>odd</i>"},
    ]
    rows[1]["held_out"]["sources"] = {
        "<b>name</b>": rows[1]["held_out"]["sources"]["code"],
        "other": {},
    }
    rows[0]["learning_rates"] = {"$<u>$": 0.1}
    rows += [
        {"step": step, "samples": [{"prompt": "<def> ", "text": f"{evil} {step}"}]}
        for step in (1, 2)
    ]
    page = Page(write_report(write_run(tmp_path / "run", rows)))
    assert "script" not in page.tags
    for shown in (f"{evil} 1", f"{evil} 2", "<def> ", "<b>name</b>", "$<u>$", "<i>odd</i>"):
        assert shown in page.text, shown
    assert (
        page.text.index(f"{evil} 2")
        < page.text.index("Earlier samples")
        < page.text.index(f"{evil} 1")
    )


def test_only_a_run_with_expert_load_has_a_panel_per_moe_layer(tmp_path: Path) -> None:
    rows = fake_rows(100, experts=8)
    rows[-2]["expert_load"][1] = [0.25, 0.0, *[0.125] * 6]
    moe = Page(write_report(write_run(tmp_path / "moe", rows)))
    assert [p for p in moe.pictures if "MoE layer" in p][1] == (
        "MoE layer 2 over training steps: last step: busiest expert 2.00, idlest 0.00"
    )
    assert len(moe.pictures) == 7 + 2
    dense = Page(write_report(write_run(tmp_path / "dense", fake_rows(100))))
    assert "MoE" not in dense.html


def test_a_cut_last_line_and_lost_steps_are_told(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [training_row(step, rng) | {"skipped_steps": int(step > 4)} for step in range(1, 8)]
    rows[2]["loss"] = math.nan
    rows.append({"step": 7, "event": "resumed"})
    page = Page(write_report(write_run(tmp_path / "run", rows, tail='{"step": 8, "lo')))
    assert "step 7 of 400" in page.text
    for shown in (
        "cannot be read: 1",
        "step 3: loss not finite (1 row in all)",
        "step 5: skipped, float16 gradients overflowed",
        "step 7: resumed",
    ):
        assert shown in page.text, shown


def test_steps_taken_again_after_a_resume_replace_the_first_ones(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": float(step)} for step in (1, 2, 3, 4)] + [
        {"step": 2, "event": "resumed"}
    ]
    run = write_run(tmp_path / "run", [*rows, {"step": 3, "loss": 30.0}])
    kinds, unreadable = read_metrics(run / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in kinds["loss"]] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert len(kinds["event"]) == 1 and unreadable == 0


@pytest.mark.parametrize("rows", [0, 1])
def test_a_run_that_has_hardly_begun(tmp_path: Path, rows: int) -> None:
    run = write_run(tmp_path / "run", [training_row(1, np.random.default_rng(0), experts=2)] * rows)
    page = Page(write_report(run))
    assert f"step {rows} of 400" in page.text and "not scored" in page.text
    assert len(page.pictures) == (6 + 2) * rows


def test_numbers_that_are_not_finite_are_dashes_and_gaps(tmp_path: Path) -> None:
    rows = [dict.fromkeys(training_row(1, np.random.default_rng(0)), math.nan) for _ in range(90)]
    for step, row in enumerate(rows):
        row |= {
            "step": step,
            "loss": math.inf if step % 2 else 2.0,
            "learning_rates": {"all": None},
            "mfu": None,
        }
    rows.append(evaluation_row(5, math.nan))
    page = Page(write_report(write_run(tmp_path / "run", rows)))
    assert "nan" not in page.html.replace("banana", "")
    assert len(page.pictures) == 1


def test_without_run_json_it_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"run\.json"):
        write_report(tmp_path)


def test_smoothed_keeps_a_line_and_skips_gaps() -> None:
    line = np.arange(20.0)
    np.testing.assert_allclose(smoothed(line, 5)[2:-2], line[2:-2])
    np.testing.assert_array_equal(smoothed(line, 1), line)
    np.testing.assert_allclose(smoothed([1.0, math.nan, 3.0, math.inf], 3), [1.0, 2.0, 3.0, 3.0])
    assert np.isnan(smoothed([math.nan] * 3, 3)).all()


def test_the_final_score_over_all_text_is_the_one_in_the_header(tmp_path):
    facts = {"parameters": 1, "steps": 2, "seed": 0, "machine": {}}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    part, whole = (
        {"bits_per_byte": bits, "perplexity": 2.0, "tokens": 1, "bytes": 1}
        for bits in (1.111, 2.222)
    )
    rows = [{"step": 1, "loss": 1.0}, {"step": 2, "held_out": part}, {"step": 2, "final": whole}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(tmp_path).read_text()
    assert "<b>2.222</b><small>all text, step 2" in page


def test_scores_of_fine_tuning_have_their_curves_and_their_best(tmp_path):
    rows = [{"step": step, "loss": 1.0, "margin": 0.1 * step} for step in range(1, 5)]
    rows += [{"step": 2, "held_out": {"loss": 0.321, "accuracy": 0.9, "examples": 4}}]
    rows += [{"step": 4, "held_out": {"loss": 0.654, "accuracy": 0.8, "examples": 4}}]
    page = write_report(write_run(tmp_path / "run", rows)).read_text()
    assert "<b>0.321</b><small>best, step 2" in page
    titles = ("Held-out loss", "Held-out accuracy", "Margin")
    assert all(f"<h3>{title}</h3>" in page for title in titles)
    assert "examples" not in page


def test_a_new_metric_is_drawn_without_an_entry_anywhere(tmp_path):
    rows = [{"step": step, "loss": 1.0, "tokens_<seen>": 0.5 * step} for step in (1, 2)]
    rows += [{"step": 2, "held_out": {"loss": 0.3, "calibration_error": 0.1}}]
    page = Page(write_report(write_run(tmp_path / "run", rows)))
    titles = [picture.split(" over ")[0] for picture in page.pictures]
    assert titles[-2:] == ["Tokens <seen>", "Held-out calibration error"]
