"""The loop: it learns, counts right, resumes exactly, stops when told."""

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from tests.training.runs import losses, tiny_args, tiny_config
from transom.base.errors import RequestError, WorkError
from transom.checkpoints.load import load
from transom.cli.main import main
from transom.config.parallel_args import ParallelArgs
from transom.distributed.mesh import Meshes
from transom.training.config import read_config
from transom.training.loop import run_folder
from transom.training.loop.monitor import Monitor
from transom.training.loop.setup import open_run
from transom.training.losses.balance import mixtures


def train(args, **options):
    trainer = open_run(args, quiet=True, **options)
    return trainer, trainer.fit()


def test_a_tiny_model_learns_its_text(tmp_path):
    _, final = train(tiny_args(tmp_path, "steps=150"))
    first = losses(tmp_path / "run")[0]
    assert first == pytest.approx(
        math.log(258), abs=0.05
    )  # zero output weights: uniform over 256 bytes + 2
    assert losses(tmp_path / "run")[-1] < 0.5
    assert final.bits_per_byte < 1.0


def test_losses_do_not_depend_on_accumulation(tmp_path):
    runs = {}
    for count in (1, 2, 4):
        train(
            tiny_args(
                tmp_path, f"accumulate={count}", f"out={tmp_path}/run{count}", "dtype=float32"
            )
        )
        runs[count] = losses(tmp_path / f"run{count}")
    assert runs[2] == pytest.approx(runs[1], rel=1e-4)
    assert runs[4] == pytest.approx(runs[1], rel=1e-4)


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def two_ranks(rank, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/ranks", rank=rank, world_size=2)
    folder = Path(folder)
    ranks = {"meshes": Meshes.make(ParallelArgs(replicate=2, shard=1), "cpu")}
    args = tiny_args(folder, f"out={folder}/two", "dtype=float32")
    _, score = train(args, **ranks)
    (folder / f"score{rank}").write_text(json.dumps(score.row()))
    states = [torch.get_rng_state()]
    open_run(args, quiet=True, resume=True, **ranks)
    torch.save([*states, torch.get_rng_state()], folder / f"random{rank}")

    failing = open_run(tiny_args(folder, f"out={folder}/full"), quiet=True, **ranks)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            patch.setattr(run_folder, "write_tensors", full)
        with pytest.raises(WorkError) as told:
            failing.save(None)
    (folder / f"full{rank}").write_text(str(told.value))

    scores = Monitor.scores

    def signal_and_score(self, *arguments):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return scores(self, *arguments)

    Monitor.scores = signal_and_score
    stopped, _ = train(tiny_args(folder, f"out={folder}/stopped", "eval_every=3"), **ranks)
    (folder / f"stopped{rank}").write_text(f"{stopped.stop.signal} {stopped.progress.step}")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """A folder with what two processes have done as two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(two_ranks, args=(str(folder),), nprocs=2)
    return folder


def test_two_ranks_train_as_one(ranks):
    train(tiny_args(ranks, f"out={ranks}/one", "dtype=float32"))
    assert losses(ranks / "two") == pytest.approx(losses(ranks / "one"), rel=1e-4)


def test_two_ranks_score_as_one(ranks):
    alone = open_run(tiny_args(ranks, f"out={ranks}/alone", "dtype=float32"), quiet=True)
    alone.parts.writer.restore(ranks / "two" / "step_000012", {})
    expected = alone.evaluate(None).row()
    for rank in (0, 1):
        assert json.loads((ranks / f"score{rank}").read_text()) == pytest.approx(expected, rel=1e-6)


def test_a_checkpoint_that_rank_0_cannot_write_ends_every_rank(ranks):
    first, second = ((ranks / f"full{rank}").read_text() for rank in (0, 1))
    assert "step_000000: checkpoint not written" in first and "No space left" in first
    assert second == f"rank 0: {first}"


def test_every_rank_has_its_own_random_numbers_and_resumes_them(ranks):
    states = [torch.load(ranks / f"random{rank}", weights_only=True) for rank in (0, 1)]
    assert not torch.equal(states[0][0], states[1][0])
    for before, resumed in states:
        assert torch.equal(before, resumed)


def test_a_signal_to_one_rank_while_it_scores_ends_the_run_of_all(ranks):
    assert {(ranks / f"stopped{rank}").read_text() for rank in (0, 1)} == {
        f"{int(signal.SIGTERM)} 3"
    }
    state = json.loads((ranks / "stopped" / "step_000003" / "trainer.json").read_text())
    assert state["progress"]["unmeasured"]


def command(folder: Path, words: list[str]) -> list[str]:
    (folder / "config.yaml").write_text(yaml.safe_dump(tiny_config(folder)))
    return [
        sys.executable,
        "-m",
        "transom",
        "train",
        str(folder / "config.yaml"),
        "--quiet",
        *words,
    ]


def start(words: list[str]) -> subprocess.Popen:
    source = str(Path(__file__).parents[2] / "src")
    return subprocess.Popen(
        words, env={**os.environ, "PYTHONPATH": source}, stdout=subprocess.DEVNULL
    )


def kill_behind(process: subprocess.Popen, run: Path, step: int) -> None:
    """kill -9 as soon as a checkpoint of at least `step` is there."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        done = [int(p.name[5:]) for p in run.glob("step_??????")] if run.exists() else []
        if done and max(done) >= step:
            break
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"


@pytest.mark.parametrize(
    ("steps", "kills"), [(100, [10]), pytest.param(300, [40, 120], marks=pytest.mark.slow)]
)
def test_resume_after_kill_is_exact(tmp_path, steps, kills):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    words = [f"steps={steps}", "save_every=10"]
    train(tiny_args(tmp_path, *words, f"out={straight}"))
    for step, resume in zip(kills, ([], ["--resume"]), strict=False):
        kill_behind(start(command(tmp_path, [*words, f"out={killed}", *resume])), killed, step)
    assert main(["train", str(killed), "--quiet", "--resume"]) == 0
    assert losses(killed) == losses(straight)
    ours, theirs = (run / f"step_{steps:06}" / "model.safetensors" for run in (killed, straight))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_tells_the_scheduler(tmp_path, monkeypatch, number, code):
    from transom.training.loop.trainer import Trainer

    log = Trainer.log

    def log_and_signal(self, *arguments):
        log(self, *arguments)
        if self.progress.step == 5:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Trainer, "log", log_and_signal)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_config(tmp_path)))
    assert main(["train", str(tmp_path / "config.yaml"), "--quiet"]) == code
    assert (tmp_path / "run" / "latest").read_text().strip() == "step_000005"
    monkeypatch.setattr(Trainer, "log", log)
    assert main(["train", str(tmp_path / "config.yaml"), "--quiet", "--resume"]) == 0
    train(tiny_args(tmp_path, f"out={tmp_path}/straight"))
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    trainer = open_run(tiny_args(tmp_path), quiet=True)
    with torch.no_grad():
        trainer.model.norm.weight.fill_(float("nan"))
    with pytest.raises(WorkError, match="step 1: the loss is nan"):
        trainer.fit()


def test_float16_training_needs_a_gpu(tmp_path):
    with pytest.raises(RequestError, match="float16"):
        open_run(tiny_args(tmp_path, "dtype=float16"), quiet=True)


def test_short_rows_see_only_their_piece(tmp_path):
    trainer = open_run(tiny_args(tmp_path, "short_rows=1", "short_rows_split=2"), quiet=True)
    whole = trainer.batches.next()
    short = whole.split_rows(2)
    assert short.tokens.shape == (8, 16)
    assert torch.equal(short.targets.flatten(), whole.targets.flatten())
    assert all(sum(row) == 16 for row in short.sizes)
    alone = trainer.model(short.inputs()).logits[3]
    one = whole.tokens[1:2, 16:]
    sizes = [short.sizes[3]]
    assert torch.allclose(
        alone, trainer.model(type(short.inputs())(one, sizes=sizes)).logits[0], atol=1e-5
    )


def test_a_mixture_logs_balance_and_load(tmp_path):
    model = {
        **tiny_config(tmp_path)["model"],
        "moe_args": {"num_experts": 4, "top_k": 2, "hidden_dim": 32},
    }
    train(tiny_args(tmp_path, model=model))
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    row = next(row for row in rows if "loss" in row)
    assert row["aux_loss"] == pytest.approx(2.0, abs=0.5)  # balance gives top_k
    assert [sum(layer) for layer in row["expert_load"]] == pytest.approx([1.0, 1.0])


def test_the_tokens_of_each_expert_are_told_at_the_end(tmp_path):
    train(tiny_args(tmp_path, "steps=2", model=mixture(tmp_path)))
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    (told,) = (row["expert_tokens"] for row in rows if "expert_tokens" in row)
    assert [len(layer) for layer in told] == [4, 4]
    shares = [share for layer in told for expert in layer for _, share in expert]
    assert 0 < max(shares) <= 1


def mixture(tmp_path, **moe):
    return {
        **tiny_config(tmp_path)["model"],
        "moe_args": {"num_experts": 4, "top_k": 2, "hidden_dim": 32, **moe},
    }


def rows_of(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def test_router_numbers_do_not_depend_on_accumulation(tmp_path):
    model, rows = mixture(tmp_path, z_loss_coef=0.1, aux_loss_coef=0.1), []
    for count in (1, 4):
        words = [f"accumulate={count}", f"out={tmp_path}/run{count}", "steps=3", "dtype=float32"]
        train(tiny_args(tmp_path, *words, model=model))
        rows.append(rows_of(tmp_path / f"run{count}"))
    for one, four in zip(*rows, strict=True):
        for name in ("loss", "aux_loss", "z_loss", "grad_norm"):
            assert four[name] == pytest.approx(one[name], rel=1e-4), name
        for name in ("expert_load", "router_entropy", "dropped_tokens"):
            assert torch.tensor(four[name]).allclose(torch.tensor(one[name]), atol=1e-5), name


@pytest.mark.parametrize(
    ("coefficient", "moves"), [("aux_loss_coef", True), ("z_loss_coef", True), ("none", False)]
)
def test_router_losses_are_trained(tmp_path, coefficient, moves):
    off = {"aux_loss_coef": 0.0, "z_loss_coef": 0.0}
    norms = []
    for name, moe in (("off", off), ("on", {**off, **({coefficient: 5.0} if moves else {})})):
        model = mixture(tmp_path, **moe)
        trainer = open_run(tiny_args(tmp_path, f"out={tmp_path}/{name}", model=model), quiet=True)
        norms.append(trainer.step().grad_norm)
    assert (norms[0] != norms[1]) == moves


@pytest.mark.parametrize("balance", ["bias", "mixtral"])
def test_choice_biases_move_against_the_load(tmp_path, balance):
    model = mixture(tmp_path, balance=balance, bias_update_rate=0.5)
    trainer = open_run(tiny_args(tmp_path, model=model), quiet=True)
    result = trainer.step()
    for layer, picks_E in zip(mixtures(trainer.model), result.router.picks_LE, strict=True):
        bias_E = layer.router.choice_bias
        assert (bias_E is None) == (balance == "mixtral")
        if bias_E is not None:
            assert torch.equal(bias_E, 0.5 * torch.sign(picks_E.mean() - picks_E))


def test_the_average_is_scored_and_saved_and_the_weights_go_on(tmp_path):
    trainer = open_run(tiny_args(tmp_path, "ema_decay=0.5", "steps=3"), quiet=True)
    starts = {name: p.clone() for name, p in trainer.model.named_parameters()}
    for step in range(3):
        trainer.step()
        share = 1 - min(0.5, (1 + step) / (10 + step))
        for name, p in trainer.model.named_parameters():
            starts[name].lerp_(p.detach(), share)
    weights = {name: p.clone() for name, p in trainer.model.named_parameters()}
    scored = trainer.evaluate(None)
    trainer.sample()
    trainer.save(scored)
    assert all(torch.equal(p, weights[name]) for name, p in trainer.model.named_parameters())
    saved = load(tmp_path / "run" / "step_000003")
    for name, p in saved.named_parameters():
        torch.testing.assert_close(p, starts[name], rtol=1e-5, atol=1e-7)
    trainer.ema, trainer.model = None, saved
    trainer.monitor.model = saved
    assert trainer.evaluate(None).bits_per_byte == pytest.approx(scored.bits_per_byte, rel=1e-6)


def test_a_step_in_backward_is_the_step(tmp_path):
    plain = {"name": "adamw", "lr": 0.01, "max_grad_norm": None}
    for name, optimizer in (("plain", plain), ("inside", {**plain, "in_backward": True})):
        train(tiny_args(tmp_path, f"out={tmp_path}/{name}", optimizer=optimizer))
    assert losses(tmp_path / "inside") == losses(tmp_path / "plain")
    ours, theirs = (
        [row["grad_norm"] for row in rows_of(tmp_path / name)] for name in ("inside", "plain")
    )
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("words", [["accumulate=2"], ["optimizer.max_grad_norm=1.0"]])
def test_a_step_in_backward_is_refused_with(tmp_path, words):
    optimizer = {"name": "adamw", "max_grad_norm": None, "in_backward": True}
    with pytest.raises(RequestError, match=r"optimizer\.in_backward: got True; expected with"):
        tiny_args(tmp_path, *words, optimizer=optimizer)


@pytest.mark.parametrize("chunk", [1, 13, 64, 1000])
def test_losses_do_not_depend_on_the_loss_chunk(tmp_path, chunk):
    words = ["steps=6", "accumulate=2", "dtype=float32"]
    train(tiny_args(tmp_path, *words, f"out={tmp_path}/whole"))
    train(tiny_args(tmp_path, *words, f"loss_chunk={chunk}"))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


@pytest.mark.parametrize(
    ("field", "value"), [("loss_chunk", -1), ("ema_decay", 1.0), ("ema_decay", 0)]
)
def test_values_out_of_range_are_refused(tmp_path, field, value):
    with pytest.raises(RequestError, match=f"{field}: got .*; expected"):
        tiny_args(tmp_path, **{field: value})


def test_rows_go_to_tensorboard(tmp_path, monkeypatch):
    curves = []

    class Writer:
        def __init__(self, log_dir, purge_step):
            assert log_dir == str(tmp_path / "run" / "tensorboard")

        def add_scalar(self, name, value, step):
            curves.append((name, step))

        def add_text(self, name, value, step): ...

        def flush(self): ...

        def close(self):
            curves.append(("closed", 0))

    for where in ("loop.setup", "report.tensorboard"):
        monkeypatch.setattr(f"transom.training.{where}.writer_class", lambda: Writer)
    train(tiny_args(tmp_path, "steps=2", "tensorboard=true"))
    assert [step for name, step in curves if name == "loss"] == [1, 2]
    assert ("held_out/bits_per_byte", 2) in curves
    assert curves[-1] == ("closed", 0)


def test_tensorboard_that_is_missing_costs_no_earlier_run(tmp_path, monkeypatch):
    train(tiny_args(tmp_path, "steps=2"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RequestError, match="pip install tensorboard"):
        train(tiny_args(tmp_path, "tensorboard=true"), overwrite=True)
    assert (tmp_path / "run" / "step_000002").is_dir()


def test_bfloat16_products_train_float32_weights(tmp_path):
    half, _ = train(tiny_args(tmp_path, "dtype=bfloat16", "steps=6"))
    train(tiny_args(tmp_path, "dtype=float32", "steps=6", f"out={tmp_path}/wide"))
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    got, wide = losses(tmp_path / "run"), losses(tmp_path / "wide")
    assert got != wide
    assert got == pytest.approx(wide, rel=0.03)


def test_samples_and_the_progress_line_are_shown(tmp_path, capsys):
    prompts = ["the cat", "a mat"]
    open_run(tiny_args(tmp_path, "sample_every=6", sample_prompts=prompts, sample_tokens=8)).fit()
    told = capsys.readouterr().err
    assert "step 6: 'the cat' ->" in told
    last = next(line for line in told.splitlines() if line.startswith("step 12/12"))
    assert all(part in last for part in ("loss", "tokens/s", "MFU", "memory", "eta"))
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    (samples,) = (row["samples"] for row in rows if "samples" in row)
    assert [one["prompt"] for one in samples] == prompts


def test_sources_are_weighted_and_scored_apart(tmp_path):
    (tmp_path / "digits.jsonl").write_text(
        "".join(f'{{"text": "{i * 7919 % 10007:05d} "}}\n' * 3 for i in range(200))
    )
    data = tiny_config(tmp_path)["data"]
    sources = [
        {"path": data["sources"][0], "name": "words", "weight": 3.0},
        {"path": str(tmp_path / "digits.jsonl"), "name": "digits", "weight": 1.0},
    ]
    trainer, final = train(tiny_args(tmp_path, data={**data, "sources": sources}))
    (row,) = [
        json.loads(line)["held_out"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        if "held_out" in line
    ]
    assert set(row["sources"]) == {"words", "digits"}
    assert sum(one["bytes"] for one in row["sources"].values()) == row["bytes"] == final.bytes
    digits = sum(int((trainer.batches.next().tokens == ord("7")).sum() > 0) for _ in range(10))
    assert digits > 0


def test_profile_splits_the_step(tmp_path, capsys):
    trainer = open_run(tiny_args(tmp_path), profile_steps=3)
    trainer.fit()
    told = capsys.readouterr().err
    assert all(part in told for part in ("data", "forward", "loss", "backward", "optimizer"))
    trace = json.loads((tmp_path / "run" / "trace.json").read_text())
    assert any(event.get("name") == "backward" for event in trace["traceEvents"])


def test_the_loss_trace_is_the_committed_one(tmp_path):
    """Catches a change of arithmetic anywhere between bytes and weights; see CONTRIBUTING before
    updating it.
    """
    train(tiny_args(tmp_path, "steps=20", "dtype=float32"))
    expected = json.loads((Path(__file__).parent / "loss_trace.json").read_text())
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"layer_pattern": "FB"}, "model.layer_pattern: got 'FB'"),
        ({"context_dim": 8}, "model.context_dim: got 8; expected null"),
    ],
)
def test_what_next_token_prediction_cannot_learn_from_is_refused(tmp_path, model, words):
    """A layer that sees later tokens would see its own targets: a loss near zero that means
    nothing.
    """
    fields = {**tiny_config(tmp_path)["model"], **model}
    with pytest.raises(RequestError, match=re.escape(words)):
        read_config(None, base=tiny_config(tmp_path, model=fields))
