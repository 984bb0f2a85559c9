"""What a stranger's chat template may do, and how it ends when it does more."""

import pytest

from transom.base.errors import RequestError
from transom.chat import sandbox
from transom.chat.template import ChatTemplate
from transom.tokenizers.training import byte_tokenizer

MESSAGES = [{"role": "user", "content": "Hello there"}]


def grow(step):
    """A template that makes a value larger again and again."""
    start = "[1]" if "[n.x" in step or "dict(" in step or "{" in step else "'ab'"
    return (
        f"{{% set n = namespace(x={start}) %}}{{% for i in range(99) %}}{{% set {step} %}}{{% "
        f"endfor %}}"
    )


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "did not end within",
        ),
        (
            "{% macro f(x) %}{% if x %}{{ f(x-1) ~ f(x-1) }}{% endif %}{% endmacro %}{{ f(99) }}",
            "did not end within",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ messages.__class__ }}", "reaches for '__class__' of 'list'"),
        ("{{ ''['__class__'] }}", "reaches for '__class__'"),
        ("{{ ''|attr('__class__') }}", "reaches for '__class__'"),
        ("{{ messages|map(attribute='__class__')|list }}", "reaches for '__class__'"),
        ("{{ '{0.__class__}'.format(messages) }}", "reaches for '__class__'"),
        ("{{ cycler.__init__.__globals__ }}", "reaches for '__init__'"),
        ("{{ namespace(__init__=1) }}", "begins with an underscore"),
        ("{{ messages.append(1) }}", "reaches for 'append' of 'list'"),
        ("{% set messages[0].x = 1 %}", "not a Jinja template"),
        ("{{ 'a' * 10 ** 9 }}", "writes more than"),
        ("{{ [0] * 10 ** 9 }}", "writes more than"),
        ("{{ (9 ** 999) ** 999 }}", "integers of thousands"),
        ("{{ '%999999999d' % 1 }}", "width of thousands"),
        ("{{ '%999999999d'|format(1) }}", "width of thousands"),
        ("{{ '{:999999999}'.format(1) }}", "width of thousands"),
        ("{{ '{:{}}'.format(1, 9) }}", "width of thousands"),
        ("{{ 'a'.ljust(10 ** 9) }}", "ljust with a number"),
        ("{{ 'a'|indent(10 ** 9) }}", "indent with a number"),
        ("{{ [1]|tojson(indent=10 ** 9) }}", "tojson with a number"),
        (
            grow("n.x = n.x ~ n.x"),
            "writes more",
        ),
        (
            grow("n.x = n.x + n.x"),
            "writes more",
        ),
        (
            grow("n.x = n.x|replace('a', n.x * 99)"),
            "writes more",
        ),
        (
            grow("n.x = n.x.join((n.x,) * 999)"),
            "writes more",
        ),
        (
            grow("n.x = [n.x, n.x]"),
            "values of",
        ),
        (
            grow("n.x = {'a': n.x, 'b': n.x}"),
            "values of",
        ),
        (
            grow("n.x = dict(a=n.x, b=n.x)"),
            "values of",
        ),
        (
            grow("n.x = [n.x] * 99"),
            "values of|writes",
        ),
        ("{{ '%(a)s' * 9999 % {'a': 'a' * 99999} }}", "writes more"),
        ("{{ ('{0}' * 9999).format('a' * 99999) }}", "writes more"),
        ("{{ strftime_now('%999999999Y') }}", "with a width"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ raise_exception('no\nthanks') }}", "refuses these messages: no thanks$"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{% for %}", r"line 1: not a Jinja template \("),
        ("{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}", "recursion"),
        ("x" * (sandbox.MAX_SOURCE + 1), "1000001 characters; expected a template of 1,000,000"),
    ],
)
def test_a_template_that_runs_away_ends_in_one_sentence(tokenizer, monkeypatch, source, sentence):
    monkeypatch.setattr(sandbox, "MAX_STEPS", 50_000)  # a million of them take seconds
    with pytest.raises(RequestError, match=sentence) as caught:
        ChatTemplate(source, tokenizer, origin="chat_template.jinja").render(MESSAGES)
    text = str(caught.value)
    assert text.startswith("chat_template.jinja") and "\n" not in text and len(text) < 400


def test_time_ends_a_template_too(tokenizer, monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.0)
    with pytest.raises(RequestError, match="did not end within 0 seconds"):
        ChatTemplate("{% for m in messages %}{% endfor %}", tokenizer).render(MESSAGES)
