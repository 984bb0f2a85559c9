"""Mistral's formats against what mistral_common wrote of the same conversations
(make_mistral_chats.py).
"""

import json
from pathlib import Path

import pytest

from tests.chat.test_chat_mistral import CONTROL, PATTERN, THINK, ids_of
from tests.tokenizers.makers import byte_ranks, sentencepiece_model, tekken_file, write
from transom.chat.template import ChatTemplate
from transom.tokenizers.tokenizer import Tokenizer

SAMPLES = json.loads((Path(__file__).parent / "mistral_chats.json").read_text(encoding="utf-8"))
CASES = [
    (version, name)
    for version, found in SAMPLES["pieces"].items()
    for name, pieces in found.items()
    if pieces
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A template and its tokenizer for every format, as the folder of a model chooses it."""
    found = {}
    for version in SAMPLES["pieces"]:
        number, _, tekken = version.partition("-")
        folder = tmp_path_factory.mktemp(version)
        if tekken:
            names = CONTROL + THINK
            text = tekken_file(
                byte_ranks(), named=names, control=len(names) + 4, version=number, pattern=PATTERN
            )
            write(folder, tekken__json=text)
        else:
            words = {"v1": [], "v2": CONTROL[3:10], "v3": CONTROL[3:10]}.get(
                number, CONTROL[3:10] + CONTROL[17:20]
            )
            (folder / f"tokenizer.model.{number}").write_bytes(
                sentencepiece_model(control_symbols=words)
            )
        found[version] = ChatTemplate.load(folder, Tokenizer.load(folder))
    return found


@pytest.mark.parametrize(("version", "name"), CASES)
def test_the_pieces_of_mistral_common(made, version, name):
    template, messages = made[version], SAMPLES["talks"][name]
    calls = any(one["role"] == "tool" or "tool_calls" in one for one in messages)
    ids = template.encode(messages, SAMPLES["tools"] if calls else None)
    expected = ids_of(template.tokenizer, SAMPLES["pieces"][version][name])
    decode = template.tokenizer.decode
    assert ids == expected, (
        f"{decode(ids, skip_special=False)}\n{decode(expected, skip_special=False)}"
    )
