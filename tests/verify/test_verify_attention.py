"""`verify attention`: right backends are green, each kind of wrong one is named for what it is, and
refused.
"""

from __future__ import annotations

import functools
import json

import pytest
import torch

from tests.mutations import model_bugs
from transom.attention import backends as attend
from transom.attention.backends import BACKENDS, Backend
from transom.attention.reference import reference
from transom.attention.view import ScoreArgs
from transom.base.errors import RequestError
from transom.base.runtime import one_thread
from transom.cli.main import main
from transom.verify import attention
from transom.verify.attention import Outcome, compare_backends, failures, support_matrix
from transom.verify.attention_jobs import PHASES, RULES, Job, build, jobs

DOUBLE = (torch.float64,)


@pytest.fixture(autouse=True, scope="module")
def single_threaded():
    with one_thread():
        yield


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSOM_CACHE", str(tmp_path))
    attend.reload()
    yield tmp_path
    attend.reload()


def declared(function, why_not=lambda *job: None):
    return {"fake": Backend("fake", function, why_not)}


def of(*groups):
    return lambda: (job for job in jobs() if job.group in groups)


def small():
    return (
        job
        for job in jobs()
        if job.group == "masked rows" or (job.phase == "prefill" and job.length < 50)
    )


def test_jobs_cover_every_rule_phase_and_group():
    every = list(jobs())
    assert len(set(every)) == len(every), "a job is done twice"
    assert {job.rule for job in every} >= set(RULES)
    assert {job.phase for job in every} == {*PHASES, "no visible key"}
    assert any(job.gradients and "sinks" in job.scoring for job in every)
    assert any(job.dims[0] != job.dims[1] for job in every)
    assert {job.length % 128 == 0 for job in every if job.group == "lengths"} == {True, False}


def test_a_blind_job_lets_no_query_see_a_key():
    inputs = build(Job("masked rows", RULES[2], "no visible key", length=5), torch.device("cpu"))
    assert (reference(inputs.tensors[0], inputs.view, inputs.spec, ScoreArgs()) == 0).all()


@pytest.mark.parametrize("name", ["sdpa", "blockwise"])
def test_the_backends_of_this_machine_are_green(name):
    outcomes = list(compare_backends(["cpu"], {name: BACKENDS[name]}, (torch.float32,)))
    assert failures(outcomes) == {}
    assert all(one.error > 0 for one in outcomes if one.job.group == "softcap" and not one.declined)


def wrong_window(q, view, spec, score):
    rule = (
        spec.rule if spec.rule.kind != "window" else type(spec.rule)("window", spec.rule.size + 1)
    )
    return reference(q, view, type(spec)(rule, spec.positions_BT, spec.segments_BT), score)


def nan_rows(q, view, spec, score):
    out = reference(q, view, spec, score)
    return out.masked_fill((out == 0).all(-1, keepdim=True), float("nan"))


def no_bfloat16(q, view, spec, score):
    if q.dtype == torch.bfloat16:
        raise RuntimeError("no kernel\n  for BFloat16")
    return reference(q, view, spec, score)


def whole_blocks(q, view, spec, score):
    out = reference(q, view, spec, score).clone()
    out[:, q.size(1) // 128 * 128 :] *= 0.5
    return out


def no_sink_gradient(q, view, spec, score):
    sinks = None if score.sinks_N is None else score.sinks_N.detach()
    return reference(q, view, spec, ScoreArgs(score.scale, score.softcap, sinks))


@pytest.mark.parametrize(
    ("function", "todo", "said"),
    [
        (wrong_window, small, "error"),
        (nan_rows, small, "NaN for a query that may attend to no key"),
        (
            no_bfloat16,
            small,
            "its kernel does not support bfloat16 (RuntimeError: no kernel for BFloat16)",
        ),
        (whole_blocks, of("lengths"), "wrong at lengths that are not a multiple of 128"),
        (no_sink_gradient, of("sinks", "gradients"), "(gradients)"),
    ],
)
def test_a_wrong_backend_is_named_for_what_it_is(function, todo, said):
    dtypes = (torch.float32, torch.bfloat16) if function is no_bfloat16 else DOUBLE
    outcomes = list(compare_backends(["cpu"], declared(function), dtypes, todo))
    found = failures(outcomes)
    assert said in found["fake"]
    assert "\n" not in found["fake"]


def test_what_is_declined_is_neither_run_nor_a_failure():
    def refuse_to_run(*job):
        raise AssertionError("it said that it cannot")

    outcomes = list(
        compare_backends(["cpu"], declared(refuse_to_run, lambda *job: "not today"), DOUBLE, small)
    )
    assert failures(outcomes) == {}
    (row,) = matrix_of_fake(outcomes)
    assert row["declined"] == "not today"
    assert set(row["errors"].values()) == {None}


def matrix_of_fake(outcomes: list[Outcome]):
    return support_matrix([Outcome(**{**vars(one), "backend": "sdpa"}) for one in outcomes])


def test_the_matrix_shows_the_largest_error_of_every_group():
    def some():
        found = of("masks", "lengths", "masked rows")()
        return (
            job for job in found if job.phase in ("prefill", "no visible key") and job.length < 300
        )

    outcomes = list(compare_backends(["cpu"], declared(wrong_window), DOUBLE, some))
    (row,) = matrix_of_fake(outcomes)
    assert row["failed"] == ["masks", "lengths"]
    assert row["errors"]["masks"] == max(one.error for one in outcomes if one.job.group == "masks")


def test_a_failing_backend_is_refused_until_it_is_right_again(own_cache, monkeypatch, capsys):
    quick = functools.partial(compare_backends, dtypes=DOUBLE, all_jobs=small)
    monkeypatch.setattr(attention, "compare_backends", quick)
    inputs = build(Job("masks"), torch.device("cpu"))
    call = (inputs.tensors[0], inputs.view, inputs.spec, inputs.score)
    with model_bugs.nan_in_masked_rows():
        assert main(["verify", "attention"]) == 1
    assert "sdpa: NaN for a query that may attend to no key" in capsys.readouterr().out
    with pytest.raises(RequestError, match=r"sdpa.*failed `transom verify attention`"):
        attend.backend("sdpa")(*call)
    assert attend.choose(*call).name == "blockwise"
    assert main(["verify", "attention", "--device", "cpu"]) == 0
    assert "no backend is refused for one device alone" in capsys.readouterr().err
    assert attend.choose(*call).name == "blockwise", "one device does not lift a refusal"
    assert main(["verify", "attention"]) == 0
    assert attend.choose(*call).name == "sdpa"


def test_json_is_one_document(own_cache, monkeypatch, capsys):
    monkeypatch.setattr(
        attention,
        "compare_backends",
        functools.partial(compare_backends, dtypes=DOUBLE, all_jobs=small),
    )
    assert main(["verify", "attention", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["ok"]
    assert {row["backend"] for row in told["rows"]} == set(BACKENDS)
