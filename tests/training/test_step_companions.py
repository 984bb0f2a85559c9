"""What a base states on generation, and its templates, are in every step of a run on it."""

import json

import pytest

from tests.training.finetune.runs import base_folder, chats, run_args
from transom.chat.template import ChatTemplate
from transom.checkpoints.convert import convert
from transom.checkpoints.open_model import load_tokenizer
from transom.training.loop.setup import open_run

STATED = {"eos_token_id": [5, 7, 9], "bos_token_id": 3, "temperature": 0.6, "top_p": 0.9}
TALK = (
    "{% for message in messages %}{{ message.content }}{% generation %}{% endgeneration %}{% "
    "endfor %}"
)


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("method", ["lora", "full", "lora with new tokens"])
def test_steps_keep_what_the_base_states(method, where, tmp_path):
    base = base_folder(tmp_path / "base", "hf", rope_layout="halves")
    (base / "generation_config.json").unlink()
    own = json.loads((base / where).read_text()) if where == "config.json" else {}
    (base / where).write_text(json.dumps({**own, **STATED}))
    (base / "chat_template.jinja").write_text(TALK)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_text(TALK)
    finetune = {"method": method.split()[0], "train_on": "all"}
    if method.endswith("tokens"):
        finetune["new_tokens"] = ["<|new|>"]
    args = run_args(
        tmp_path, base, chats(tmp_path / "rows.jsonl"), "steps=2", "save_every=2", **finetune
    )
    open_run(args, quiet=True).fit()
    step = tmp_path / "run" / "step_000002"
    convert(tmp_path / "run", tmp_path / "out", "hf")
    for folder in (step, tmp_path / "out"):
        settings = json.loads((folder / "generation_config.json").read_text())
        assert {key: settings[key] for key in STATED} == STATED
        assert set(ChatTemplate.load(folder, load_tokenizer(folder)).sources) == {"default", "rag"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] is not None
