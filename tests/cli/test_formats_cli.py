"""Every verb on a folder of every format: the same model says the same, whoever's files it is
in.
"""

import json
import shutil

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer as Fast
from transformers import AutoModelForCausalLM

from tests.checkpoints.consolidated import PARAMS, cut, meta_state, twin, write_meta
from tests.helpers import random_model, tiny_args
from transom.checkpoints.load import load
from transom.checkpoints.save import save
from transom.inference.text import encode_prompts
from transom.layers.inputs import TransformerInput
from transom.tokenizers.stream import StreamDecoder
from transom.tokenizers.tokenizer import Tokenizer
from transom.tokenizers.training import byte_tokenizer

WHOLE = ("hf", "meta", "mistral", "native")
FORMATS = (*WHOLE, "adapter", "run")
PROMPT = "ab"


def write_adapter(folder, base):
    """An adapter by PEFT that changes what the base says, which it names from its own folder."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(
        model, LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "lora_" in key:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
    model.save_pretrained(folder)
    config = folder / "adapter_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "../hf"})
    )
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("formats")
    model = random_model(tiny_args(vocab_size=byte_tokenizer().vocab_size))
    for format in WHOLE:
        save(model, root / format, format=format, tokenizer=byte_tokenizer())
    write_adapter(root / "adapter", root / "hf")
    shutil.copytree(
        root / "adapter", root / "run" / "step_000002"
    )  # which names its base as from the run
    byte_tokenizer().save(root / "run" / "step_000002")
    (root / "run" / "best").write_text("step_000002\n")
    (root / "run" / "latest").write_text("step_000002\n")
    return root


def expected(folder, count=12):
    """What greedy steps of whole forwards say behind the prompt."""
    model, tokenizer = load(folder), byte_tokenizer()
    ids = tokenizer.encode(PROMPT, add_bos=True)
    for _ in range(count):
        logits = model(TransformerInput(torch.tensor([ids])), inference=True).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[3:]


@pytest.mark.parametrize("format", FORMATS)
def test_generate_continues(folders, call, format):
    code, out, err = call(
        "generate", folders / format, "-p", PROMPT, "-m", 12, "--ignore-eos", "--json"
    )
    assert code == 0, err
    tokens = json.loads(out.splitlines()[-1])["completions"][0]["tokens"]
    assert tokens == expected(folders / format)
    assert (tokens == expected(folders / "hf")) == (format in WHOLE), (
        "the adapter must be on the model"
    )


@pytest.mark.parametrize("format", FORMATS)
def test_chat_answers(folders, call, format):
    code, out, err = call("chat", folders / format, "-m", 12, "--ignore-eos", stdin=f"{PROMPT}\n")
    assert code == 0, err
    stream = StreamDecoder(Tokenizer.load(folders / "hf"))
    assert (
        out
        == "".join(stream.push(id) for id in expected(folders / format)) + stream.finish() + "\n"
    )


@pytest.mark.parametrize("format", FORMATS)
def test_inspect_plans_and_traces(folders, call, format):
    code, out, err = call("inspect", folders / format, "--json")
    plan = json.loads(out.splitlines()[-1])
    assert code == 0, err
    assert plan["parameters"] == sum(weight.numel() for weight in load(folders / "hf").parameters())
    assert (plan.get("adapter") is None) == (format in WHOLE)
    code, out, err = call("inspect", folders / format, "--trace", PROMPT, "--json")
    assert code == 0, err
    guess = json.loads(out.splitlines()[-1])["layers"][-1]["predictions"][0]["id"]
    assert guess == expected(folders / format)[0]


@pytest.mark.parametrize("format", FORMATS)
def test_embed_gives_vectors(folders, call, format):
    code, out, err = call("embed", folders / format, "--text", PROMPT, "--json")
    assert code == 0, err
    assert len(json.loads(out.splitlines()[-1])["embeddings"][0]) == 32


@pytest.mark.parametrize("format", FORMATS)
def test_verify_runs_it(folders, call, format):
    code, out, err = call("verify", "cache", folders / format, "--full", "--length", 16)
    assert code == 0, out + err


@pytest.mark.parametrize("format", FORMATS)
def test_convert_leaves_nothing_that_differs(folders, call, tmp_path, format):
    assert call("convert", folders / format, tmp_path / "out", "--format", "native")[0] == 0
    code, out, _ = call(
        "inspect", folders / ("native" if format in WHOLE else format), tmp_path / "out", "--json"
    )
    found = json.loads(out.splitlines()[-1])
    assert code == 0 and found["differing"] == [] and found["identical"] == found["compared"] > 0
    same = json.loads(
        call("inspect", folders / "native", tmp_path / "out", "--json")[1].splitlines()[-1]
    )
    assert (same["differing"] == []) == (format in WHOLE)


def test_the_words_for_an_adapter_name_base_and_targets(folders, call):
    _, out, _ = call("inspect", folders / "adapter")
    assert f"{folders / 'adapter' / '../hf'} + adapter {folders / 'adapter'}: " in out
    assert "adapter: LoRA of rank 2, alpha 8, on down_proj, q_proj" in out


def test_what_lies_beside_an_adapter_counts_before_the_base(folders, call, tmp_path):
    shutil.copytree(folders / "adapter", tmp_path / "adapter")
    shutil.copytree(folders / "hf", tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ raise_exception('the base') }}")
    code, _, err = call("chat", tmp_path / "adapter", "-m", 4, stdin="a\n")
    assert "the base" in err, "its template is the one there is"
    (tmp_path / "adapter" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    code, _, err = call("chat", tmp_path / "adapter", "-m", 4, stdin="a\n")
    assert code == 0 and "the base" not in err
    byte_tokenizer(("<s>", "</s>", "<more>")).save(tmp_path / "adapter")
    (tmp_path / "adapter" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [*range(258)]})
    )
    code, out, err = call("generate", tmp_path / "adapter", "-p", PROMPT, "--json")
    assert code == 0 and "special tokens from id 258 on have no embedding" in err
    assert json.loads(out.splitlines()[-1])["completions"][0]["finish_reason"] == "stop"


def test_a_merged_adapter_is_compared_with_its_tied_base(call, tmp_path):
    tokenizer = byte_tokenizer()
    save(
        random_model(tiny_args(vocab_size=258, tie_embeddings=True)),
        tmp_path / "hf",
        "hf",
        tokenizer,
    )
    write_adapter(tmp_path / "adapter", tmp_path / "hf")
    found = json.loads(
        call("inspect", tmp_path / "hf", tmp_path / "adapter", "--json")[1].splitlines()[-1]
    )
    assert found["only_a"] == found["only_b"] == []
    leaves = {one["name"].split(".")[3] for one in found["differing"]}
    assert leaves == {"wq", "w_out"} and len(found["differing"]) == 4


def test_a_vocabulary_that_only_the_weights_know(call, tmp_path):
    folder = write_meta(
        tmp_path, PARAMS["llama2"], cut("llama2", meta_state("llama2", twin("llama2")), 2)
    )
    assert call("inspect", folder)[0] == call("inspect", folder / "params.json")[0] == 0
    byte_tokenizer().save(folder)
    code, out, err = call("generate", folder, "-p", PROMPT)
    assert (code, out) == (2, "") and "id 96; expected ids below 96" in err


def write_config(folder, **changes):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_bos_that_the_makers_do_not_add_is_not_added(call, tmp_path):
    tokenizer = byte_tokenizer()
    save(random_model(tiny_args(vocab_size=tokenizer.vocab_size)), tmp_path, tokenizer=tokenizer)
    assert encode_prompts(Tokenizer.load(tmp_path), [PROMPT]) == [[256, 97, 98]], (
        "runs of this project begin with it"
    )
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": None}))
    theirs = Fast.from_file(str(path)).encode(PROMPT).ids
    assert Tokenizer.load(tmp_path).bos_id == 256 and theirs == [97, 98]
    assert encode_prompts(Tokenizer.load(tmp_path), [PROMPT]) == [theirs]
    assert "Prompt: 2 tokens" in call("generate", tmp_path, "-p", PROMPT, "-m", 2)[2]
    trace = json.loads(call("inspect", tmp_path, "--trace", PROMPT, "--json")[1].splitlines()[-1])
    assert [token["id"] for token in trace["tokens"]] == theirs


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A cache of the hub with owner/tiny of two revisions, and no network."""
    root = tmp_path / "cache" / "models--owner--tiny"
    (root / "refs").mkdir(parents=True)
    for seed, (ref, commit) in enumerate({"main": "a" * 40, "v1": "b" * 40}.items()):
        model = random_model(tiny_args(vocab_size=byte_tokenizer().vocab_size), seed=seed)
        save(model, root / "snapshots" / commit, format="hf", tokenizer=byte_tokenizer())
        (root / "refs" / ref).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return root / "snapshots"


VERBS = {
    "generate": ["-p", PROMPT, "-m", "4", "--json"],
    "chat": ["-m", "4"],
    "embed": ["--text", PROMPT, "--json"],
    "inspect": ["--trace", PROMPT, "--json"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_hub_id_is_read_at_its_revision(offline, call, verb):
    words, said = VERBS[verb], f"{PROMPT}\n"

    def answer(*model):
        code, out, err = call(verb, *model, *words, stdin=said)
        assert code == 0, err
        document = json.loads(out.splitlines()[-1]) if "--json" in words else {"text": out}
        return {
            key: document[key]
            for key in ("completions", "embeddings", "layers", "text")
            if key in document
        }

    assert answer("owner/tiny", "--revision", "v1") == answer(offline / ("b" * 40))
    assert (
        answer("owner/tiny")
        == answer(offline / ("a" * 40))
        != answer("owner/tiny", "--revision", "v1")
    )


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("model", "said"),
    [
        (["owner/other"], "owner/other: no such folder, not in the hub's cache"),
        (["nowhere"], "no such folder"),
        (["FOLDER", "--revision", "v1"], "revision: got 'v1'; valid only with a hub id"),
    ],
)
def test_what_is_nowhere_is_one_sentence(offline, call, verb, model, said):
    words = [str(offline / ("a" * 40)) if word == "FOLDER" else word for word in model]
    code, out, err = call(verb, *words, *VERBS[verb], stdin=f"{PROMPT}\n")
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1


def test_an_adapter_on_an_adapter_is_refused(folders, call, tmp_path):
    config = json.loads((folders / "adapter" / "adapter_config.json").read_text())
    for base in (folders / "adapter", tmp_path):
        (tmp_path / "adapter_config.json").write_text(
            json.dumps({**config, "base_model_name_or_path": str(base)})
        )
        code, _, err = call("inspect", tmp_path)
        assert code == 2 and "is an adapter; expected a complete model" in err
