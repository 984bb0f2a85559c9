"""`verify finetune`: its own ways to find answers and gradients are right, and what is wrong in a
folder is red.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import chain

import peft
import pytest
import torch

from tests.chat.chat_texts import PUBLISHED, READS_TOOLS, TOOL_TALK, say, tokenizer_pair
from tests.training.finetune.runs import (
    asked,
    base_folder,
    chats,
    preferences,
    run_args,
    write_rows,
)
from transom.base.runtime import one_thread
from transom.chat.built_in import named
from transom.chat.files import FILE
from transom.chat.template import ChatTemplate
from transom.cli.main import main
from transom.config.model_args import ModelArgs
from transom.data.chat.batches import packed_batch
from transom.data.chat.conversations import ChatExample
from transom.data.chat.rows import ChatEncoder
from transom.layers.linear import Linear
from transom.lora.weights import LoraWeights
from transom.tokenizers.training import byte_tokenizer
from transom.verify import finetune, finetune_rows
from transom.verify.adapters import merged_weight
from transom.verify.findings import summarize
from transom.verify.finetune_rows import (
    CHATS,
    END,
    PAIRS,
    answers_of,
    compare_masks,
    encoder_of,
    examples_of,
    sample_encoders,
)
from transom.verify.sample_models import SAMPLES


@pytest.fixture(autouse=True, scope="module")
def single_threaded():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tokenizer of every control token, here and in transformers."""
    return tokenizer_pair(tmp_path_factory.mktemp("tokenizer"))


def failing(findings):
    return {line.comparison for line in summarize(findings) if line.failed}


# What carries loss

# The texts before and after the content of an answer.
FRAMES = {
    "template chatml": ("", "<|im_end|>"),
    "template llama3": ("", "<|eot_id|>"),
    "template mistral-v3": (" ", END),
    "template mistral-v3-tekken": ("", END),
    "template gemma": ("", "<end_of_turn>"),
    "template plain": ("", END),
    "template of the folder": ("", END),
    "no template": ("", END),
}


@pytest.mark.parametrize("name", FRAMES)
def test_answers_are_the_contents_in_the_frame_of_the_template(name):
    (before, after), encoder = FRAMES[name], sample_encoders()[name]
    for example in examples_of(CHATS, "conversation"):
        if encoder.template is None and not example.bare:
            continue
        contents = [
            (f"{before}{message['content']}{after}", message.get("weight", 1.0))
            for message in (*example.messages, *chain(*example.answers))
            if message["role"] == "assistant" and message.get("weight", 1.0) > 0
        ]
        assert answers_of(example, encoder) == contents


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_are_green_or_refuse(pair, name):
    encoder = encoder_of(pair[0], ChatTemplate(PUBLISHED[name], pair[0]), 4096)
    for rows in (CHATS, PAIRS):
        found = list(compare_masks(examples_of(rows, "row"), encoder, name))
        assert found and failing(found) == set()


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma"])
def test_answers_are_those_that_transformers_masks(pair, name):
    ours, theirs = pair
    template = ChatTemplate(named(name).source(ours), ours)
    (example,) = examples_of(CHATS[:1], "row")
    messages = list(example.messages)
    made = theirs.apply_chat_template(
        messages,
        chat_template=named(name).source(ours),
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    said = [id for id, mask in zip(made["input_ids"], made["assistant_masks"], strict=True) if mask]
    found = answers_of(example, encoder_of(ours, template, 4096))
    assert "".join(text for text, _ in found) == theirs.decode(said)


@pytest.mark.parametrize("name", ["phi3", *READS_TOOLS])
def test_calls_of_tools_are_answers_where_the_template_writes_them(pair, name, capsys):
    encoder = encoder_of(pair[0], ChatTemplate(PUBLISHED[name], pair[0]), 4096)
    found = list(compare_masks(examples_of([{"messages": TOOL_TALK}], "row"), encoder, name))
    assert failing(found) == set()
    refused = "cannot be written" in capsys.readouterr().err
    assert refused == (name not in READS_TOOLS)


def test_rows_that_are_not_compared_are_counted(pair, capsys):
    encoder = encoder_of(pair[0], ChatTemplate(PUBLISHED["gemma3"], pair[0]), 60)
    rows = [
        {"messages": asked("q", "a")},
        {"messages": [say("user", "q"), say("user", "r"), say("assistant", "a")]},
    ]
    long = {"messages": [say("user", "q" * 400), say("assistant", "a", weight=0)]}
    assert (
        failing(
            compare_masks(
                [*examples_of([*rows, long], "row"), ChatExample("t", "text", text="x")],
                encoder,
                "here",
            )
        )
        == set()
    )
    told = capsys.readouterr().err
    for reason in ("are not conversations", "cannot be written (the chat", "are too long"):
        assert f"here: 1 examples are not compared, since they {reason}" in told


def test_an_example_that_is_wrongly_left_out_is_red(pair, monkeypatch):
    def encode(self, examples, *given, **more):
        encoded = original(self, examples, *given, **more)
        return replace(encoded, items=[item for item in encoded.items if item[0].id != "row 0"])

    original = ChatEncoder.encode
    encoder = encoder_of(pair[0], ChatTemplate(named("plain").source(pair[0]), pair[0]), 4096)
    monkeypatch.setattr(ChatEncoder, "encode", encode)
    found = failing(compare_masks(examples_of(CHATS, "row"), encoder, "here"))
    assert found == {"examples without loss have no answer"}


# What trains


@pytest.mark.parametrize("kind", finetune.ADAPTERS)
def test_weights_written_out_are_those_that_peft_merges(kind):
    torch.manual_seed(0)
    settings = {"LoRA": {}, "rsLoRA": {"use_rslora": True}, "DoRA": {"use_dora": True}}[kind]
    base = torch.nn.Sequential(torch.nn.Linear(12, 20, bias=False))
    leaf = Linear(12, 20)
    leaf.weight.data.copy_(base[0].weight.data)
    config = peft.LoraConfig(
        r=finetune.RANK, lora_alpha=finetune.ALPHA, target_modules=["0"], **settings
    )
    theirs = peft.get_peft_model(base, config)
    parts = {}
    for key, weight in theirs.named_parameters():
        for name, sign in (("A", "lora_A"), ("B", "lora_B"), ("magnitude", "lora_magnitude")):
            if sign in key:
                weight.data.add_(torch.randn(weight.shape))
                parts[name] = weight.detach()
    scaling = finetune.ADAPTERS[kind].get("scaling", "alpha_over_rank")
    magnitude = parts.get("magnitude")
    assert (magnitude is not None) == (kind == "DoRA")
    lora = LoraWeights(parts["A"], parts["B"], finetune.ALPHA, scaling, magnitude=magnitude)
    found = merged_weight(leaf, leaf.weight, [lora]).detach().float()
    torch.testing.assert_close(found, theirs.merge_and_unload()[0].weight.detach())


def test_a_gradient_that_is_lost_in_one_expert_is_red(monkeypatch):
    original = finetune.step_loss

    def step_loss(model, objective, batch):
        for key, weight in model.named_parameters():
            if key.endswith("experts.w_out.lora.default.B"):
                keep = (torch.arange(len(weight)) > 0).view(-1, 1, 1)
                weight.register_hook(lambda gradient, keep=keep: gradient * keep)
        return original(model, objective, batch)

    tokenizer = byte_tokenizer()
    args = ModelArgs.from_dict({**SAMPLES["mixtral"], "vocab_size": tokenizer.vocab_size})
    rows = encoder_of(tokenizer, None, 99).encode(
        [ChatExample("t", "text", text="every token of a text " * 4)]
    )
    monkeypatch.setattr(finetune, "step_loss", step_loss)
    batch = packed_batch([[rows.items[0][0]]])
    assert failing(finetune.compare_gradients(args, {}, batch, "it")) == {
        "gradients = merged weights"
    }


# Folders


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_folder(tmp_path_factory.mktemp("base") / "model")


def test_a_folder_is_verified_with_its_rows(base, tmp_path, capsys):
    assert (
        failing(finetune.compare_folder(str(base), str(chats(tmp_path / "chats.jsonl")))) == set()
    )
    assert (
        failing(finetune.compare_folder(str(base), str(preferences(tmp_path / "pairs.jsonl"))))
        == set()
    )
    assert "no losses are compared, since no conversation" in capsys.readouterr().err


def test_a_template_that_marks_half_of_an_answer_is_red(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "model")
    answer = "{{ message.content[:3] }}{% endgeneration %}{{ message.content[3:] }}"
    (folder / FILE).write_text(
        finetune_rows.OWN_TEMPLATE.replace("{{ message.content }}{% endgeneration %}", answer)
    )
    findings = finetune.compare_folder(str(folder), str(chats(tmp_path / "chats.jsonl")))
    assert failing(findings) == {"loss on answers alone, padded", "loss on answers alone, packed"}


def test_more_examples_than_are_looked_at_are_said(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(finetune, "MOST_EXAMPLES", 2)
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"messages": asked("q", str(at))} for at in range(5)]
    )
    assert failing(finetune.compare_folder(str(base), str(rows))) == set()
    assert "only the first 2 of 5 examples are read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["finetune", "--data", "x"], "--data: got 'x'; valid only with `verify finetune MODEL`"),
        (
            ["finetune", "demo", "--data", "x"],
            "--data: got 'x'; valid only with a model folder, and demo has no tokenizer",
        ),
        (
            ["merge", "demo", "--data", "x"],
            "--data: got 'x'; valid only with `verify finetune MODEL`",
        ),
        (["finetune", "no/such/model"], "got 'no/such/model', no such folder"),
    ],
)
def test_a_wrong_request_is_one_sentence(capsys, words, said):
    assert main(["verify", *words]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1


def test_a_fine_tuning_run_is_no_subject_of_resume(base, tmp_path, capsys):
    config = run_args(tmp_path, base, chats(tmp_path / "chats.jsonl")).to_dict()
    (tmp_path / "run.json").write_text(json.dumps(config))
    assert main(["verify", "resume", str(tmp_path / "run.json")]) == 2
    assert "finetune: got" in capsys.readouterr().err
