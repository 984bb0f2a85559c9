"""What transformers does around a template: named templates, null fields, open messages, filters
and functions.
"""

import json
from datetime import datetime

import pytest
from transformers import AutoTokenizer

from tests.chat.chat_texts import CALL, FOLDER, PUBLISHED, TOOLS, say, tokenizer_pair
from transom.base.errors import RequestError
from transom.chat.template import ChatTemplate

COMMAND_R = {
    file.stem: file.read_text(encoding="utf-8") for file in (FOLDER / "command-r").glob("*.jinja")
}
QUESTION = [say("user", "Hi")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return (*tokenizer_pair(folder), folder)


def copied(folder, path):
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


# -- an open last message --


@pytest.mark.parametrize("words", ["Yes, ", "Yes,", " \n", "a<|im_end|>b ", "  1. "])
@pytest.mark.parametrize("name", sorted({*PUBLISHED} - {"gpt-oss"}))
def test_a_last_message_is_continued_as_in_transformers(made, name, words):
    tokenizer, peer, _ = made
    talk, template = [*QUESTION, say("assistant", words)], ChatTemplate(PUBLISHED[name], tokenizer)
    try:
        expected = peer.apply_chat_template(
            talk, chat_template=PUBLISHED[name], tokenize=False, continue_final_message=True
        )
    except ValueError:
        expected = None
    if expected is None:
        with pytest.raises(RequestError, match="cannot be continued"):
            template.render(talk, continue_final_message=True)
        return
    assert template.render(talk, continue_final_message=True) == expected
    ids = template.encode(talk, continue_final_message=True)
    assert tokenizer.decode(ids, skip_special=False) == expected
    ends = [id for id in ids if id == tokenizer.token_to_id("<|im_end|>")]
    assert len(ends) == template.encode(QUESTION, None, False).count(
        tokenizer.token_to_id("<|im_end|>")
    )


@pytest.mark.parametrize("field", ["reasoning_content", "thinking"])
def test_reasoning_is_continued_under_any_of_its_names(made, field):
    tokenizer, peer, _ = made
    talk = [*QUESTION, say("assistant", "", **{field: "First, "})]
    settings = {
        "chat_template": PUBLISHED["qwen3"],
        "tokenize": False,
        "continue_final_message": field,
    }
    template = ChatTemplate(PUBLISHED["qwen3"], tokenizer)
    expected = peer.apply_chat_template(talk, **settings)
    assert template.render(talk, continue_final_message=field) == expected
    assert expected.rstrip().endswith("First,")


@pytest.mark.parametrize(
    ("talk", "more", "sentence"),
    [
        (
            [say("assistant", "a")],
            {"add_generation_prompt": True},
            "continue_final_message: got True",
        ),
        (
            [say("assistant", "a", name="b")],
            {"continue_final_message": "name"},
            r"messages\[0\]: got 'name'",
        ),
        (
            [{"role": "assistant", "tool_calls": [CALL]}],
            {},
            r"messages\[0\].content: got None; expected text",
        ),
        ([say("assistant", [{"type": "text"}])], {}, "expected parts with a text"),
    ],
)
def test_what_cannot_be_continued_is_one_sentence(made, talk, more, sentence):
    template = ChatTemplate(
        "{% for m in messages %}{{ m.content['text'] or m.content }}{% endfor %}", made[0]
    )
    with pytest.raises(RequestError, match=sentence):
        template.render(talk, **{"continue_final_message": True, **more})


def test_parts_are_continued_at_their_last_text(made):
    source = (
        "{% for m in messages %}{% for p in m.content %}{{ p['text'] }}|{% endfor %}{% endfor %}"
    )
    talk = [
        say(
            "assistant",
            [{"type": "text", "text": "a"}, {"type": "text", "text": "b "}, {"type": "image"}],
        )
    ]
    expected = made[1].apply_chat_template(
        talk, chat_template=source, tokenize=False, continue_final_message=True
    )
    assert (
        ChatTemplate(source, made[0]).render(talk, continue_final_message=True)
        == expected
        == "a|b "
    )


# -- several templates --


@pytest.mark.parametrize(
    "names", [["default", "tool_use"], ["tool_use"], ["rag"], ["default", "rag"]]
)
@pytest.mark.parametrize("kept", ["list", "object", "files", "files beside a config"])
def test_the_template_of_several_is_that_of_transformers(made, tmp_path, names, kept):
    tokenizer, _, folder = made
    path, config = (
        copied(folder, tmp_path),
        json.loads((folder / "tokenizer_config.json").read_text()),
    )
    sources = {name: f"{name} {{{{ messages[0].content }}}}{{{{ tools }}}}" for name in names}
    if kept == "list":
        config["chat_template"] = [{"name": name, "template": one} for name, one in sources.items()]
    elif kept == "object":
        config["chat_template"] = sources
    elif kept == "files beside a config":
        config["chat_template"] = "old"
    if kept.startswith("files"):
        (path / "additional_chat_templates").mkdir()
        for name, one in sources.items():
            file = (
                "chat_template.jinja"
                if name == "default"
                else f"additional_chat_templates/{name}.jinja"
            )
            (path / file).write_text(one)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    peer, template = AutoTokenizer.from_pretrained(path), ChatTemplate.load(path, tokenizer)
    for tools in (None, TOOLS, []):
        try:
            expected = peer.apply_chat_template(QUESTION, tools, tokenize=False)
        except ValueError:
            expected = None
        if expected is None:
            with pytest.raises(RequestError, match="none is called default"):
                template.render(QUESTION, tools)
        else:
            assert template.render(QUESTION, tools) == expected
    for name in names:
        assert ChatTemplate.load(path, tokenizer, name).render(QUESTION).startswith(name)
    template.save(tmp_path / "again" if (tmp_path / "again").mkdir() is None else tmp_path)
    assert set(ChatTemplate.load(tmp_path / "again", tokenizer).sources) == set(names)


# -- values, filters and functions --

VALUES = {"b": [1, "ü<&>'\"", None, True, 1.5, 1e20], "a": {"z": {}, "y": []}, "long": "x" * 9}
LAYOUT = """
  {%- if true %}
    {# a note #}
    {% if true %}
  a
    {%- endif %}
  {% endif +%}
{%+ if true %} b {% endif %}
{% raw %}{{ x }}{% endraw %}

"""


@pytest.mark.parametrize(
    "source",
    [
        "{{ v|tojson }}",
        "{{ v|tojson(indent=2) }}",
        "{{ v|tojson(indent=4, ensure_ascii=True) }}",
        "{{ v|tojson(ensure_ascii=True, sort_keys=True) }}",
        "{{ v|tojson(separators=(',', ':')) }}",
        "{{ v|tojson(False, 1, (', ', ' = '), True) }}",
        "{{ (v|tojson)|upper }}{{ v.b|join(',') }}{{ v.a|dictsort }}{{ v|items|list }}",
        "{% for x in v.b %}{% if x is none %}{% continue %}{% endif %}{{ x }}{% endfor %}",
        "{% for x in v.b %}{% if x == 1.5 %}{% break %}{% endif %}{{ x }}{% endfor %}",
        "{% set d = dict(v, c=1) %}{{ d.c }}{{ dict.fromkeys(['a', 'b'], 1) }}{{ dict([('k', "
        "2)]) }}",
        "{% set ns = namespace({'x': 1}, y=2) %}{% set ns.x = ns.x + ns.y %}{{ ns.x }}",
        "{{ 'a b'.split(' ')[-1] }}{{ v.long[:3] }}{{ v.b[::-1] }}{{ 'x'.startswith(('x', 'y')) }}",
        "{{ v.missing }}{{ v.missing is defined }}{{ v['missing'] is none }}{{ "
        "v.missing|default('d') }}",
        "{% macro m(x) %}{{ x }}{{ caller() if caller }}{% endmacro %}{% call m(1) %}c{% endcall "
        "%}{{ m(2) }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{{ 1 / 3 }}{{ 7 // 2 }}{{ 2 ** 5 }}{{ 'a' ~ 1 }}{{ '%s-%d'|format('x', 3) }}{{ [1, "
        "2]|sum if false }}",
        "{{ v.b|map('string')|list }}{{ v.b|reject('none')|list }}{{ v|length }}{{ 'abc'|last "
        "}}{{ 'a-b'|title }}",
        "{{ messages[0].content|trim|capitalize }}{{ 'x'|e }}{{ '<b>'|safe }}{{ "
        "'a\\nb'|indent(2) }}",
        LAYOUT,
        "x\n",
        "x\n\n",
    ],
)
def test_expressions_are_worth_what_they_are_in_transformers(made, source):
    settings = {"chat_template": source, "tokenize": False, "v": VALUES}
    source_of_names = source if "v" in source else source + "{{ v if false }}"
    settings["chat_template"] = source_of_names
    expected = made[1].apply_chat_template(QUESTION, **settings)
    assert (
        ChatTemplate(source_of_names, made[0]).render(QUESTION, None, False, v=VALUES) == expected
    )


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_a_part_that_a_template_does_not_write_is_refused_and_its_file_is_not_text(
    made, kind, capsys
):
    talk = [
        say("user", [{"type": kind, "url": "some/file.png"}, {"type": "text", "text": "What?"}])
    ]
    part = "{{ p.text if p.type == 'text' else MORE }}"
    body = "{% for m in messages %}{% for p in m.content %}" + part + "{% endfor %}{% endfor %}"
    ids = ChatTemplate(body.replace("MORE", "'<s>'"), made[0]).encode(talk)
    assert made[0].decode(ids, skip_special=False) == "<s>What?" and capsys.readouterr().err == ""
    with pytest.raises(
        RequestError, match=rf"messages\[0\].content\[0\]: .* leaves out a part of type '{kind}'"
    ):
        ChatTemplate(body.replace("MORE", "''"), made[0]).encode(talk)


def test_texts_that_a_prompt_does_not_hold_are_printed(made, capsys):
    talk = [
        say("system", "Be brief"),
        say("user", "Hi", name="Ann"),
        say("assistant", "a", reasoning_content="hm"),
    ]
    source = (
        "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}{{ 'x' if tools }}"
    )
    ChatTemplate(source, made[0]).encode([*talk, say("user", "Why?")], TOOLS)
    told = capsys.readouterr().err
    for kind in ("content of system", "name of user", "name of tools", "description of tools"):
        assert f"leaves out: {kind}" in told
    assert "content of user" not in told and "reasoning" not in told


def test_keys_that_are_null_are_not_there(made):
    talk = [{"role": "user", "content": "a", "name": None, "tool_calls": None}]
    source = "{{ messages[0].keys()|list }}{{ messages[0].name is defined }}"
    expected = made[1].apply_chat_template(talk, chat_template=source, tokenize=False)
    assert ChatTemplate(source, made[0]).render(talk) == expected == "['role', 'content']False"


def test_the_time_is_today_unless_it_is_set(made):
    template = ChatTemplate("{{ strftime_now('%d %B %Y') }}", made[0])
    assert template.reads_time and not ChatTemplate("x", made[0]).reads_time
    assert template.render(QUESTION) == datetime.now().strftime("%d %B %Y")
    fixed = template.at(datetime(2024, 2, 29))
    assert fixed.render(QUESTION) == "29 February 2024" and template.now is None
