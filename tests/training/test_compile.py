"""Compiled blocks compute the same, are compiled once and not every step, and give way where
compiling fails.
"""

import pytest
import torch

from tests.helpers import random_model, random_tokens, tiny_args
from tests.training.runs import losses
from tests.training.runs import tiny_args as tiny_run
from transom.base.errors import WorkError
from transom.layers.inputs import TransformerInput
from transom.training.loop import step as step_module
from transom.training.loop.blocks import arrange_blocks
from transom.training.loop.setup import open_run

pytestmark = pytest.mark.usefixtures("fresh_compiler")

MODELS = {
    "dense": {},
    "window": {"sliding_window": 7},
    "llama4": {"attention_chunk_size": 8, "nope_layer_interval": 2, "use_qk_norm": True},
    "moe": {"moe_args": {"num_experts": 4, "top_k": 2, "hidden_dim": 32}},
}
PACKINGS = ([[10, 20], [30]], [[3, 3, 24], [29, 1]], [[1, 29], [7, 7, 7, 9]])


def gradients(model, sizes):
    model.zero_grad()
    model(TransformerInput(random_tokens(2, 30), sizes=sizes)).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# Recomputing is independent of the kind of attention: the model with experts is the one that is
# compiled and recomputed, the others are compiled alone.
QUICK = {"dense": "none", "window": "none", "llama4": "none", "moe": "full"}
CASES = [
    pytest.param(name, how, marks=() if QUICK[name] == how else pytest.mark.slow)
    for name in MODELS
    for how in ("none", "full")
]


@pytest.mark.parametrize(("name", "how"), CASES)
def test_equals_eager_and_is_compiled_once(name, how):
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    model = random_model(tiny_args(**MODELS[name])).train()
    expected = [gradients(model, sizes) for sizes in PACKINGS]
    arrange_blocks(model, compiled=True, checkpointing=how, backend=counting)
    assert list(model.state_dict()) == list(expected[0])
    got = [gradients(model, PACKINGS[0])]
    compiled = len(graphs)
    got += [gradients(model, sizes) for sizes in PACKINGS[1:]]
    assert 0 < compiled == len(graphs)  # other document lengths: no new graph
    for ours, theirs in zip(got, expected, strict=True):
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_inductor_equals_eager():
    model = random_model(tiny_args()).train()
    expected = gradients(model, PACKINGS[0])
    arrange_blocks(model, compiled=True)
    for name, got in gradients(model, PACKINGS[0]).items():
        torch.testing.assert_close(
            got, expected[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def with_backend(monkeypatch, backend):
    def arranged(model, **options):
        arrange_blocks(model, **options, backend=backend)

    monkeypatch.setattr(step_module, "arrange_blocks", arranged)


def no_compiler(graph, example_inputs):
    raise RuntimeError("no working C++ compiler found" + "\nand more that nobody reads" * 100)


@pytest.mark.parametrize("dry_run", [True, False])
def test_without_a_compiler_the_run_is_the_eager_one(tmp_path, monkeypatch, capsys, dry_run):
    words = [f"dry_run={dry_run}", "steps=4", "accumulate=2"]
    open_run(tiny_run(tmp_path, *words, f"out={tmp_path}/eager"), quiet=True).fit()
    with_backend(monkeypatch, no_compiler)
    capsys.readouterr()
    trainer = open_run(tiny_run(tmp_path, *words, "compile=true"), quiet=True)
    trainer.fit()
    told = [line for line in capsys.readouterr().err.splitlines() if "compile" in line]
    assert len(told) == 1
    assert "no working C++ compiler found" in told[0] and "run uncompiled" in told[0]
    assert len(told[0]) < 400
    assert losses(tmp_path / "run") == losses(tmp_path / "eager")


def test_a_lost_rank_is_no_compiler_error(tmp_path, monkeypatch, capsys):
    def lost(graph, example_inputs):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")

    with_backend(monkeypatch, lost)
    trainer = open_run(tiny_run(tmp_path, "compile=true", "dry_run=false"), quiet=True)
    with pytest.raises(RuntimeError, match="closed by peer"):
        trainer.step()
    assert "compile" not in capsys.readouterr().err


def test_a_step_half_done_when_compiling_fails_is_not_counted_twice(tmp_path, monkeypatch):
    """A later shape may be the one that fails: gradients of earlier micro-batches must not stay."""
    calls = []

    def fails_later(graph, example_inputs):
        def run(*args):
            calls.append(1)
            if len(calls) == 8:
                raise RuntimeError("broken kernel")
            return graph.forward(*args)

        return run

    words = ["dry_run=false", "steps=3", "accumulate=4"]
    open_run(tiny_run(tmp_path, *words, f"out={tmp_path}/eager"), quiet=True).fit()
    with_backend(monkeypatch, fails_later)
    open_run(tiny_run(tmp_path, *words, "compile=true"), quiet=True).fit()
    assert len(calls) == 8
    assert losses(tmp_path / "run") == losses(tmp_path / "eager")


def test_weights_that_moved_in_backward_are_not_moved_twice(tmp_path, monkeypatch):
    optimizer = {"name": "adamw", "max_grad_norm": None, "in_backward": True}
    with_backend(monkeypatch, no_compiler)
    trainer = open_run(
        tiny_run(tmp_path, "compile=true", "dry_run=false", optimizer=optimizer), quiet=True
    )
    with pytest.raises(Exception, match="no working C"):
        trainer.step()
    words = ["compile=true", f"out={tmp_path}/dry"]
    trainer = open_run(tiny_run(tmp_path, *words, optimizer=optimizer), quiet=True)
    assert trainer.step().loss > 0  # the dry run moves nothing, so it may fall back


def test_an_error_of_the_model_itself_is_not_swallowed(tmp_path, monkeypatch):
    with_backend(monkeypatch, "eager")
    trainer = open_run(tiny_run(tmp_path, "compile=true"), quiet=True)
    trainer.model.layers[1].feed_forward.w_out.weight = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(RuntimeError, match="shapes"):
        trainer.step()


def test_scoring_and_sampling_compile_nothing(tmp_path, monkeypatch):
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    with_backend(monkeypatch, counting)
    trainer = open_run(tiny_run(tmp_path, "compile=true"), quiet=True)
    trainer.step()
    before = len(graphs)
    assert before > 0
    assert trainer.evaluate(None).count > 0
    trainer.sample()
    trainer.save(None)
    assert len(graphs) == before


def test_a_loss_that_is_not_finite_is_no_compiler_error(tmp_path, monkeypatch):
    with_backend(monkeypatch, "eager")
    trainer = open_run(tiny_run(tmp_path, "compile=true"), quiet=True)
    with torch.no_grad():
        trainer.model.norm.weight.fill_(float("nan"))
    with pytest.raises(WorkError, match="the loss is nan"):
        trainer.step()
    assert trainer.compiled
