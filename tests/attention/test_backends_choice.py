"""Which backend a job gets, what forcing the wrong one says, and the file of those refused on this
machine.
"""

from __future__ import annotations

import pytest
import torch

from tests.helpers import run_python
from transom.attention import backends as module
from transom.attention.backends import (
    BACKENDS,
    auto,
    backend,
    choose,
    machine_key,
    refuse,
    refused,
    refused_file,
    reload,
)
from transom.attention.mask import Layout, MaskSpec
from transom.attention.reference import reference
from transom.attention.view import CacheView, ScoreArgs
from transom.base.errors import RequestError
from transom.config.layer_args import LayerRule

CAPPED = ScoreArgs(softcap=5.0)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSOM_CACHE", str(tmp_path / "cache"))
    reload()
    yield
    reload()


def job(
    device: str = "cpu",
    length: int = 8,
    rule: LayerRule | None = None,
    layout: Layout | None = None,
    new_at=0,
):
    """(q, view, spec) of one row; on "cuda" without a device, since choosing reads shapes and
    dtypes alone.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    if device == "cpu":
        q = torch.randn(1, length, 2, 16, generator=torch.Generator().manual_seed(0))
    else:
        with FakeTensorMode():
            q = torch.empty(1, length, 2, 16, dtype=torch.bfloat16, device=device)
    positions = torch.arange(length)[None]
    return (
        q,
        CacheView((q, q), positions, new_at=new_at),
        MaskSpec(rule or LayerRule(), positions, None, layout),
    )


def test_names_and_the_nearest_of_them():
    assert backend("auto") is auto
    assert all(backend(name).name == name for name in BACKENDS)
    with pytest.raises(RequestError, match="did you mean 'reference'"):
        backend("referense")


@pytest.mark.parametrize(("score", "name"), [(ScoreArgs(0.3), "sdpa"), (CAPPED, "blockwise")])
def test_auto_on_a_cpu(score, name):
    q, view, spec = job()
    assert choose(q, view, spec, score).name == name
    torch.testing.assert_close(auto(q, view, spec, score), reference(q, view, spec, score))


@pytest.mark.parametrize(
    ("fields", "score", "name"),
    [
        ({"layout": Layout((8,))}, ScoreArgs(), "sdpa"),
        ({"layout": Layout((3, 5))}, ScoreArgs(), "varlen"),
        ({"layout": Layout((8,)), "rule": LayerRule("window", 4)}, ScoreArgs(), "varlen"),
        ({"new_at": None}, ScoreArgs(), "sdpa"),
        ({"length": 2048, "new_at": None}, ScoreArgs(), "flex"),
        ({"length": 2048, "rule": LayerRule("full"), "new_at": None}, ScoreArgs(), "sdpa"),
        ({"length": 2048, "rule": LayerRule("window", 64), "new_at": None}, ScoreArgs(), "flex"),
        ({"length": 2048, "layout": Layout((2048,))}, CAPPED, "flex"),
        ({"length": 1}, CAPPED, "blockwise"),
    ],
)
def test_auto_on_a_gpu(monkeypatch, fields, score, name):
    monkeypatch.setattr("transom.attention.flex._has_triton", lambda: True)
    assert choose(*job("cuda", **fields), score).name == name


@pytest.mark.parametrize(
    ("name", "score"), [("sdpa", CAPPED), ("flex", ScoreArgs()), ("varlen", ScoreArgs())]
)
def test_forcing_a_backend_on_a_job_it_cannot_do_is_refused_with_the_reason(name, score):
    q, view, spec = job()
    with pytest.raises(
        RequestError, match=f"attention backend: got '{name}', .*; expected auto"
    ) as told:
        backend(name)(q, view, spec, score)
    assert "\n" not in str(told.value)


def test_sdpa_called_directly_refuses_what_it_would_leave_out():
    with pytest.raises(RequestError, match="soft caps"):
        BACKENDS["sdpa"].function(*job(), CAPPED)


def test_a_refused_backend_is_not_chosen_and_comes_back(capsys):
    q, view, spec = job()
    refuse({"sdpa": "largest error 0.3"})
    assert dict(refused()) == {"sdpa": "largest error 0.3"}
    for _ in range(2):
        assert choose(q, view, spec, ScoreArgs()).name == "blockwise"
    assert capsys.readouterr().err.count("attention backend sdpa is skipped") == 1
    with pytest.raises(RequestError, match=r"largest error 0\.3"):
        backend("sdpa")(q, view, spec, ScoreArgs())
    refuse({"sdpa": "a", "blockwise": "b"})
    with pytest.raises(RequestError, match="attention: got a job for sdpa, blockwise"):
        auto(q, view, spec, ScoreArgs())
    refuse({})
    assert choose(q, view, spec, ScoreArgs()).name == "sdpa"


def test_the_file_is_read_once_and_other_machines_keep_their_part():
    refused_file().parent.mkdir(parents=True)
    refused_file().write_text('{"another machine": {"sdpa": "x"}}')
    assert not refused()
    refuse({"flex": "y"})
    assert module._read_refused() == {
        "another machine": {"sdpa": "x"},
        machine_key(): {"flex": "y"},
    }
    assert [path.name for path in refused_file().parent.iterdir()] == ["attention.json"]
    assert dict(refused()) == {"flex": "y"}
    refused_file().unlink()
    assert dict(refused()) == {"flex": "y"}, "read again on every call"
    reload()
    assert not refused()


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '{"a": {"sdpa": 1}}'])
def test_a_broken_file_refuses_nothing_and_is_said(capsys, text):
    refused_file().parent.mkdir(parents=True)
    refused_file().write_text(text)
    assert not refused()
    assert "no attention backend is skipped" in capsys.readouterr().err


def test_only_known_backends_can_be_refused():
    with pytest.raises(RequestError, match="attention backend: got 'spda'"):
        refuse({"spda": "typo"})


def test_inference_does_not_import_the_compiler():
    """torch._dynamo takes longer to import than torch, and every verb would wait for it."""
    code = (
        "import sys, torch; from transom.attention.backends import auto, MaskSpec, CacheView, "
        "ScoreArgs\nfrom transom.config.layer_args import LayerRule\n"
        "q, places = torch.ones(1, 4, 2, 8), torch.arange(4)[None]\n"
        "auto(q, CacheView((q, q), places), MaskSpec(LayerRule(), places), ScoreArgs(softcap=5.0))\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    run_python(code)


def test_choosing_compiles_into_one_graph():
    q, _, spec = job(layout=Layout((8,)))

    def block(q):
        return auto(q, CacheView((q, q), spec.positions_BT, new_at=0), spec, ScoreArgs()) * 2.0

    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="eager")(q), block(q))


def test_blockwise_runs_inside_a_compiled_block():
    q, _, spec = job(layout=Layout((8,)))

    def block(q):
        return auto(q, CacheView((q, q), spec.positions_BT, new_at=0), spec, CAPPED) * 2.0

    q.requires_grad_()
    got, expected = torch.compile(block, fullgraph=True, backend="aot_eager")(q), block(q)
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(x.square().sum(), q)[0] for x in (got, expected)]
    torch.testing.assert_close(*grads)
