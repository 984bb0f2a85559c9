"""Fine-tuning: what trains, what stays, exact resume, and folders that other verbs and libraries
read.
"""

import json
from datetime import date

import pytest
import torch

import transom
from tests.checkpoints.families import tiny_hf
from tests.training.finetune.runs import base_folder, chats, judged, preferences, run_args, solved
from tests.training.runs import losses, tiny_config
from transom.base.errors import RequestError
from transom.layers.inputs import TransformerInput
from transom.lora.adapters import active_adapters
from transom.lora.apply import apply_lora
from transom.lora.args import LoraArgs
from transom.training.config import read_config
from transom.training.finetune.weights import check_written
from transom.training.loop.setup import open_run

NF4 = {"kind": "nf4", "group": 32, "skip": ["w_out", "output"]}
MOE = {"num_experts": 4, "top_k": 2, "hidden_dim": 24, "shared_expert": True, "balance": "switch"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_folder(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return base_folder(tmp_path_factory.mktemp("moe") / "model", moe_args=MOE)


WAYS = {
    "adapter, packed": (chats, [], {"packing": True}),
    "adapter with dropout, padded": (
        chats,
        [],
        {"packing": False, "lora": {"rank": 2, "dropout": 0.3}},
    ),
    "DoRA with noise": (chats, [], {"lora": {"rank": 2, "dora": True}, "noise": 5.0}),
    "4-bit base": (chats, [], {"quantize": NF4, "lora": {"rank": 2}}),
    "all weights, average": (chats, ["ema_decay=0.9"], {"method": "full"}),
    "new tokens": (chats, [], {"new_tokens": ["<|x|>"]}),
    "dpo": (preferences, ["data.batch_size=2"], {"objective": "dpo"}),
    "dpo of all weights": (
        preferences,
        ["data.batch_size=2"],
        {"objective": "dpo", "method": "full"},
    ),
    "grpo": (
        solved,
        ["data.batch_size=2"],
        {"objective": "grpo", "group": 3, "answer_tokens": 6, "beta": 0.05},
    ),
    "kto": (judged, ["data.batch_size=4"], {"objective": "kto"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_is_the_run_that_was_never_stopped(base, tmp_path, way):
    rows, words, finetune = WAYS[way]
    data = rows(tmp_path / "rows.jsonl")
    straight = open_run(
        run_args(tmp_path, base, data, f"out={tmp_path}/straight", *words, **finetune), quiet=True
    )
    straight.fit()
    args = run_args(tmp_path, base, data, *words, **finetune)
    first = open_run(args, quiet=True)
    while first.progress.step < 4:
        first.log(first.step(), 1.0)
    first.save(None)
    again = open_run(args, resume=True, quiet=True)
    again.fit()
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    for (name, one), other in zip(
        straight.model.named_parameters(), again.model.parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def test_only_what_was_asked_for_moves_and_router_and_experts_do_as_said(moe, tmp_path):
    data = chats(tmp_path / "rows.jsonl")
    finetune = {"lora": {"rank": 2, "targets": ["experts"]}, "train_router": True}
    trainer = open_run(run_args(tmp_path, moe, data, **finetune), quiet=True)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    for _ in range(3):
        parts = trainer.step().parts
    moved = {n for n, w in trainer.model.named_parameters() if not torch.equal(w, before[n])}
    assert moved == {n for n in before if ".experts." in n and ".lora." in n} | {
        n for n in before if ".router." in n and "choice_bias" not in n
    }
    assert {"aux_loss", "z_loss"} <= set(parts)


@pytest.mark.parametrize(
    "finetune", [{}, {"lora": {"rank": 2, "dora": True}}, {"new_tokens": ["<|x|>"]}], ids=str
)
def test_the_folder_of_a_run_is_the_model_that_was_trained(base, tmp_path, finetune):
    data = chats(tmp_path / "rows.jsonl")
    trainer = open_run(
        run_args(tmp_path, base, data, "patience=3", "eval_every=2", **finetune), quiet=True
    )
    trainer.fit()
    step = (tmp_path / "run" / "latest").read_text().strip()
    tokens = torch.arange(2, 42)[None]
    expected = trainer.model.eval()(TransformerInput(tokens)).logits
    found = transom.load(tmp_path / "run" / step)(TransformerInput(tokens)).logits
    torch.testing.assert_close(found, expected)
    tokenizer = transom.load_tokenizer(tmp_path / "run" / step)
    assert tokenizer.hash == trainer.tokenizer.hash


def test_all_weights_come_back_in_the_format_of_the_base(tmp_path):
    from transformers import AutoModelForCausalLM

    base = base_folder(tmp_path / "hf", format="hf", rope_layout="halves")
    trainer = open_run(
        run_args(tmp_path, base, chats(tmp_path / "rows.jsonl"), method="full"), quiet=True
    )
    trainer.fit()
    step = tmp_path / "run" / (tmp_path / "run" / "latest").read_text().strip()
    tokens = torch.arange(2, 42)[None]
    theirs = AutoModelForCausalLM.from_pretrained(step)(tokens).logits
    torch.testing.assert_close(
        theirs, trainer.model.eval()(TransformerInput(tokens)).logits, atol=1e-4, rtol=0
    )


def test_peft_computes_the_same_with_the_folder_of_a_run(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = base_folder(tmp_path / "hf", format="hf", rope_layout="halves")
    trainer = open_run(run_args(tmp_path, base, chats(tmp_path / "rows.jsonl")), quiet=True)
    trainer.fit()
    step = tmp_path / "run" / (tmp_path / "run" / "latest").read_text().strip()
    tokens = torch.arange(2, 42)[None]
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), step)(
        input_ids=tokens
    ).logits
    torch.testing.assert_close(
        theirs, trainer.model.eval()(TransformerInput(tokens)).logits, atol=1e-4, rtol=0
    )


def test_early_stopping_keeps_the_best_step(base, tmp_path):
    words = ("steps=40", "eval_every=1", "patience=2", "optimizer.lr=0.5")
    trainer = open_run(run_args(tmp_path, base, chats(tmp_path / "rows.jsonl"), *words), quiet=True)
    trainer.fit()
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    scores = {row["step"]: row["held_out"]["loss"] for row in rows if "held_out" in row}
    best = min(scores, key=scores.get)
    assert trainer.progress.step < 40
    assert (tmp_path / "run" / "best").read_text().strip() == f"step_{best:06d}"


def test_epochs_become_steps(base, tmp_path):
    args = run_args(tmp_path, base, chats(tmp_path / "rows.jsonl"), epochs=2.0, packing=False)
    trainer = open_run(args, quiet=True)
    assert trainer.args.steps == -(-2 * trainer.batches.items_per_epoch // 4)


def test_a_set_smaller_than_a_batch_is_one_step_an_epoch_and_resumes(base, tmp_path, capsys):
    data = chats(tmp_path / "rows.jsonl")
    args = run_args(tmp_path, base, data, "data.batch_size=64", epochs=3.0)
    trainer = open_run(args, quiet=True)
    rows = trainer.batches.items_per_epoch
    assert f"data.batch_size = {rows}, " in capsys.readouterr().err
    assert (trainer.args.data.batch_size, trainer.args.steps) == (rows, 3)
    trainer.fit()
    assert open_run(args, resume=True, quiet=True).progress.step == 3


REFUSED = {
    "rows for another objective": (
        preferences,
        [],
        {},
        "finetune.objective: got 'sft'",
    ),
    "a target that fits nothing": (chats, [], {"lora": {"targets": ["wz"]}}, "targets: got 'wz'"),
    "a rank beyond the matrix": (chats, [], {"lora": {"rank": 33}}, "rank: got 33"),
    "rows longer than the model": (chats, ["data.seq_len=300"], {}, "data.seq_len: got 300"),
    "a set given twice": (chats, ["data.sources=[a.jsonl, a.jsonl]"], {}, r"data\.sources: got "),
    "a strength of nothing": (
        chats,
        [],
        {"beta": 0.3},
        "beta: got 0.3; valid only with objective = dpo",
    ),
    "a router that is not there": (chats, [], {"train_router": True}, "mixture of experts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_request_is_one_sentence_and_leaves_nothing(base, tmp_path, case):
    rows, words, finetune, sentence = REFUSED[case]
    data = rows(tmp_path / "rows.jsonl")
    with pytest.raises(RequestError, match=sentence):
        open_run(run_args(tmp_path, base, data, *words, **finetune), quiet=True)
    assert not (tmp_path / "run").exists()


UNWRITABLE = {
    "DoRA on a part of a fused weight": (
        {"targets": ["wq"], "dora": True},
        "qkv_proj of phi3 cannot hold it",
    ),
    "a fused weight in both ways": (
        {"targets": ["wq"], "modules_to_save": ["wv"]},
        "qkv_proj of phi3: got an adapter and a weight of its own",
    ),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_the_family_of_the_base_cannot_hold_is_refused_before_the_first_step(tmp_path, case):
    fields, sentence = UNWRITABLE[case]
    tiny_hf("phi3").save_pretrained(tmp_path)
    model = apply_lora(transom.load(tmp_path), LoraArgs.from_dict({"rank": 1, **fields}))
    with pytest.raises(RequestError, match=sentence):
        check_written(model, str(tmp_path))


def test_checking_what_is_written_leaves_the_model_as_it_was(tmp_path):
    tiny_hf("deepseek_v3").save_pretrained(tmp_path)
    args = LoraArgs(rank=1, targets=("wkv_b", "w_gate"), modules_to_save=("output", "norm"))
    model = apply_lora(transom.load(tmp_path), args)

    def seen():
        hooks = {
            n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()
        }
        flags = [
            (name, id(weight), weight.requires_grad) for name, weight in model.named_parameters()
        ]
        absorbed = ["absorbed" in vars(module) for module in model.modules()]
        return active_adapters(model), hooks, flags, absorbed

    before = seen()
    check_written(model, str(tmp_path))
    assert seen() == before


def test_new_tokens_of_tied_embeddings_train_and_are_read_back(tmp_path):
    base = base_folder(tmp_path / "tied", tie_embeddings=True)
    args = run_args(tmp_path, base, chats(tmp_path / "rows.jsonl"), new_tokens=["<|x|>"])
    trainer = open_run(args, quiet=True)
    trainer.fit()
    tokens = torch.arange(2, 42)[None]
    found = transom.load(tmp_path / "run")
    assert found.args.vocab_size == transom.load(base).args.vocab_size + 1
    expected = trainer.model.eval()(TransformerInput(tokens)).logits
    torch.testing.assert_close(found(TransformerInput(tokens)).logits, expected)


def test_a_base_reads_on_where_it_was_left(base, tmp_path):
    config = {**tiny_config(tmp_path), "base": str(base)}
    del config["model"], config["tokenizer"]
    before = transom.load(base, dtype="float32")
    trainer = open_run(read_config(None, [], base=config), quiet=True)
    for (name, one), other in zip(
        trainer.model.named_parameters(), before.parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    trainer.fit()
    step = tmp_path / "run" / (tmp_path / "run" / "latest").read_text().strip()
    tokens = torch.arange(2, 42)[None]
    found = transom.load(step)(TransformerInput(tokens)).logits
    torch.testing.assert_close(found, trainer.model.eval()(TransformerInput(tokens)).logits)
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


@pytest.mark.parametrize("given", [None, "2024-02-29"])
def test_a_template_that_writes_the_date_writes_that_of_the_run_when_it_goes_on_later(
    tmp_path, monkeypatch, given
):
    """The rows of a run are the same on every day, and its samples and prompts are asked for as on
    the first.
    """
    base, data = base_folder(tmp_path / "model"), chats(tmp_path / "rows.jsonl")
    body = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end_of_text|>{% endfor %}"
    ask = "{% if add_generation_prompt %}assistant: {% endif %}"
    (base / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + body + ask)

    class Day(date):
        on = "2026-11-29"

        @classmethod
        def today(cls):
            return date.fromisoformat(cls.on)

    monkeypatch.setattr("transom.training.finetune.weights.date", Day)
    args = run_args(tmp_path, base, data, date=given)
    trainer = open_run(args, quiet=True)
    day = date.fromisoformat(given or Day.on)
    tokens = trainer.data.batches.next().tokens.flatten().tolist()
    assert day.strftime("%d %b %Y") in trainer.tokenizer.decode(tokens)
    assert trainer.args.finetune.date == day.isoformat()
    trainer.fit()
    Day.on = "2026-12-01"
    again = open_run(args, resume=True, quiet=True)
    assert again.args == trainer.args
    with pytest.raises(RequestError, match="date"):
        open_run(run_args(tmp_path, base, data, date="2025-01-01"), resume=True, quiet=True)
    with pytest.raises(RequestError, match="date: got '29 Feb 2024'; expected a day"):
        run_args(tmp_path, base, data, date="29 Feb 2024")
