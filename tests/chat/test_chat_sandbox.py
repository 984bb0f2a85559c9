"""What a stranger's chat template may do, and how it ends when it does more."""

from datetime import datetime

import pytest

from transom.base.errors import RequestError
from transom.chat import renderer, sandbox
from transom.chat.template import ChatTemplate
from transom.tokenizers.training import byte_tokenizer

MESSAGES = [{"role": "user", "content": "Hello there"}]


def grow(step):
    """Return a template that makes a value larger again and again, and writes it."""
    start = "[1]" if "[n.x" in step or "dict(" in step or "{" in step else "'ab'"
    loop = f"{{% for i in range(99) %}}{{% set {step} %}}{{% endfor %}}"
    return f"{{% set n = namespace(x={start}) %}}{loop}{{{{ n.x }}}}"


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


STOPPED = "stopped, since it (did not end within 0.3 seconds|needs more than 512 MiB)"
FAILED = "cannot render these messages|not a Jinja template that can be compiled"


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(x) %}{% if x %}{{ f(x-1) ~ f(x-1) }}{% endif %}{% endmacro %}{{ f(99) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ [0] * 10 ** 9 }}",
        "{{ (9 ** 999) ** 999 }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%999999999d'|format(1) }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ 'a'.ljust(10 ** 9) }}",
        "{{ 'a\nb'|indent(10 ** 9) }}",
        "{{ [1]|tojson(indent=10 ** 9) }}",
        grow("n.x = n.x ~ n.x"),
        grow("n.x = n.x + n.x"),
        grow("n.x = n.x|replace('a', n.x * 99)"),
        grow("n.x = n.x.join((n.x,) * 999)"),
        grow("n.x = [n.x, n.x]"),
        grow("n.x = {'a': n.x, 'b': n.x}"),
        grow("n.x = dict(a=n.x, b=n.x)"),
        grow("n.x = [n.x] * 99"),
        "{{ '%(a)s' * 9999 % {'a': 'a' * 99999} }}",
        "{{ ('{0}' * 9999).format('a' * 99999) }}",
        "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
    ],
)
def test_a_template_that_runs_away_ends_in_one_sentence(tokenizer, monkeypatch, source):
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.3)
    with pytest.raises(RequestError, match=f"{STOPPED}|{FAILED}") as caught:
        ChatTemplate(source, tokenizer, origin="chat_template.jinja").render(MESSAGES)
    text = str(caught.value)
    assert text.startswith("chat_template.jinja") and "\n" not in text and len(text) < 400
    assert ChatTemplate("{{ 1 + 1 }}", tokenizer).render(MESSAGES) == "2"  # by a new process


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("{{ messages.__class__ }}", "'__class__' of 'list'"),
        ("{{ ''['__class__'] }}", "'__class__'"),
        ("{{ ''|attr('__class__') }}", "'__class__'"),
        ("{{ messages|map(attribute='__class__')|list }}", "'__class__'"),
        ("{{ '{0.__class__}'.format(messages) }}", "'__class__'"),
        ("{{ cycler.__init__.__globals__ }}", "'__init__'"),
        ("{{ namespace(__class__=1).__class__ }}", "'__class__'"),
        ("{{ messages.append(1) }}", "'append' of 'list'"),
        ("{{ dict.mro() }}", "'mro' of 'type'"),
        ("{% set messages[0].x = 1 %}", "not a Jinja template"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ raise_exception('no\nthanks') }}", "refuses these messages: no thanks$"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{% for %}", r"line 1: not a Jinja template \("),
        ("x" * (sandbox.MAX_SOURCE + 1), "characters: got 1000001; expected at most 1000000"),
    ],
)
def test_what_a_template_may_not_do_is_refused_in_one_sentence(tokenizer, source, sentence):
    with pytest.raises(RequestError, match=sentence) as caught:
        ChatTemplate(source, tokenizer, origin="chat_template.jinja").render(MESSAGES)
    text = str(caught.value)
    assert text.startswith("chat_template.jinja") and "\n" not in text and len(text) < 400


@pytest.mark.parametrize("enough", [0, 1_000_000])
def test_texts_of_beginnings_are_those_of_single_renderings(monkeypatch, enough):
    """Also if a reply has one text only, because it is large enough already."""

    class InProcess:
        def ask(self, request, seconds):
            requests.append(request)
            return renderer.answer(request)

    requests = []
    monkeypatch.setattr(sandbox, "_worker", InProcess)
    monkeypatch.setattr(renderer, "ENOUGH_CHARACTERS", enough)
    template = sandbox.SandboxedTemplate(
        "{% if messages|length == 2 %}{{ raise_exception('two') }}{% endif %}"
        "{% for one in messages %}[{{ one }}]{% endfor %}{{ '?' if add_generation_prompt }}",
        "chat_template.jinja",
    )
    values, now = {"messages": ["a", "b", "c"]}, datetime.now()
    ends = [(3, False), (2, False), (1, True), (0, True), (1, False)]
    requests.clear()
    found = list(template.render_beginnings(values, now, ends))
    assert found == ["[a][b][c]", None, "[a]?", "", "[a]"]
    assert len(requests) == (1 if enough else 3)  # no reply ends behind an empty text
