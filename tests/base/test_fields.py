"""Values of configs and of the command line get the types that their fields declare."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from transom.base.errors import RequestError
from transom.base.fields import check_bounds, describe, read
from transom.base.yaml_files import parse_yaml, read_yaml, word_value
from transom.inference.sampling import SamplingArgs
from transom.lora.args import CombineArgs
from transom.training.config import TrainArgs, read_config

TEXTS = (
    "exp #2",
    "0123",
    "no",
    "2024-11-29",
    "12:30:00",
    "a=b: c",
    " led by a space",
    "1e-4",
    "[x]",
    "'quoted'",
)


@dataclass(frozen=True)
class Inner:
    """One place."""

    path: str = describe("", "a path")
    share: float = describe(1.0, "a share")

    def __post_init__(self) -> None:
        if self.share < 0:
            raise RequestError(f"share: got {self.share!r}; expected 0 or more")


@dataclass(frozen=True)
class Outer:
    """One field of every kind."""

    text: str = describe("", "text")
    name: str | None = describe(None, "text or nothing")
    number: float = describe(0.0, "a number")
    count: int | None = describe(None, "a whole number or nothing")
    flag: bool = describe(False, "a switch")
    kind: Literal["no", "on", "8"] = describe("no", "a word")
    bits: Literal[8, 32] = describe(8, "a number")
    words: tuple[str, ...] = describe((), "texts")
    places: str | tuple[Inner | str, ...] = describe((), "places")
    free: dict[str, Any] = describe(dict, "anything")


def from_word(name: str, text: str) -> Any:
    kinds = Outer.__annotations__
    return getattr(read(Outer, {name: word_value(kinds[name], text, name)}), name)


def from_file(text: str) -> Outer:
    return read(Outer, parse_yaml(text))


@pytest.mark.parametrize("text", TEXTS)
def test_a_word_for_a_text_field_is_that_text(text):
    assert from_word("text", text) == from_word("name", text) == text
    assert type(from_word("text", text)) is str
    assert read_config(None, [f"out={text}"]).out == text


@pytest.mark.parametrize("text", ["0123", "no", "2024-11-29", "12:30:00", "1e-4", "0x1F", "1_000"])
def test_an_unquoted_value_for_a_text_field_is_that_text(text):
    outer = from_file(
        f"text: {text}\nname: {text}\nwords: [{text}, b]\nplaces: [{text}, {{path: {text}}}]\n"
    )
    assert (outer.text, outer.name, outer.words) == (text, text, (text, "b"))
    assert outer.places == (text, Inner(text))


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("number", "1e-4", 1e-4),
        ("number", "-.inf", float("-inf")),
        ("number", "3", 3.0),
        ("count", "1e3", 1000),
        ("count", "0123", 123),
        ("count", "0x10", 16),
        ("count", "null", None),
        ("count", "none", None),
        ("flag", "yes", True),
        ("flag", "FALSE", False),
        ("kind", "no", "no"),
        ("kind", "8", "8"),
        ("bits", "32", 32),
        ("name", "null", None),
        ("places", "[a, {path: no, share: 1e-1}]", ("a", Inner("no", 0.1))),
        ("free", "{a: 1e-4, b: no, c: [1, true, x]}", {"a": 1e-4, "b": "no", "c": [1, True, "x"]}),
    ],
)
def test_words_and_files_are_read_by_the_declared_type(name, text, value):
    assert from_word(name, text) == value
    assert getattr(from_file(f"{name}: {text}"), name) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("count", "12:30:00"),
        ("count", "1.5"),
        ("count", "true"),
        ("flag", "1"),
        ("flag", "2024-11-29"),
        ("bits", "9"),
    ],
)
def test_text_that_is_no_value_of_the_type_is_refused(name, text):
    with pytest.raises(RequestError, match=f"^{name}: got "):
        from_word(name, text)
    with pytest.raises(RequestError, match=f"^{name}: got "):
        from_file(f"{name}: {text}")


def test_quoted_numbers_are_text():
    assert from_file('text: "1"').text == "1"
    with pytest.raises(RequestError, match=r"^count: got '1'"):
        from_file('count: "1"')
    with pytest.raises(RequestError, match=r"^text: got None"):
        from_file("text: ~")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("places: [{pth: a.txt}]", r"^places\[0\]\.pth: .*'path'"),
        ("places: [a, {path: b, share: much}]", r"^places\[1\]\.share: got 'much'"),
        ("places: [a, {path: b, share: -1}]", r"^places\[1\]\.share: got -1.0"),
        ("places: [[a]]", r"^places\[0\]: got \['a'\]; .* or "),
        ("places: {path: a}", r"^places: got .*text or a list"),
        ("words: [a, [b]]", r"^words\[1\]: got "),
        ("count: [1]", r"^count: got \[1\]; expected a whole number$"),
    ],
)
def test_the_innermost_wrong_field_is_named(text, told):
    with pytest.raises(RequestError, match=told):
        from_file(text)


def test_errors_inside_sections_name_the_section():
    with pytest.raises(RequestError, match=r"^optimizer\.lr: got -1"):
        read_config(None, ["optimizer.lr=-1"])
    with pytest.raises(RequestError, match=r"^data\.sources\[0\]\.path: got nothing"):
        read(TrainArgs, {"data": {"sources": [{"weight": 2.0}]}})


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("steps: 3\nsteps: 4\n")
    with pytest.raises(RequestError, match=r"config\.yaml: .*'steps' twice"):
        read_yaml(path)


def test_merged_and_named_parts_of_a_file_still_work():
    assert from_file("free: {a: &x {b: 1}, c: {<<: *x, d: 2}}").free == {
        "a": {"b": 1},
        "c": {"b": 1, "d": 2},
    }


def test_a_leading_tilde_of_a_path_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    args = read_config(
        None, ["out=~/runs/x", "data.sources=[~/a, {path: ~/b}]", "data.cache_dir=a~b"]
    )
    assert (args.out, args.data.cache_dir) == ("/home/someone/runs/x", "a~b")
    assert [source.path for source in args.data.source_list] == [
        "/home/someone/a",
        "/home/someone/b",
    ]


def test_words_below_the_model_have_the_types_of_its_fields():
    model = read_config(
        None, ["model.layer_pattern=FF", "model.rope_theta=5e5", "model.n_layers=2"]
    ).model
    assert model == {"preset": "demo", "layer_pattern": "FF", "rope_theta": 5e5, "n_layers": 2}


@pytest.mark.parametrize("seed", [-1, 2**62])
@pytest.mark.parametrize("kind", [TrainArgs, SamplingArgs, CombineArgs])
def test_seeds_that_generators_cannot_take_are_refused(kind, seed):
    with pytest.raises(RequestError, match=f"seed: got {seed}"):
        kind(seed=seed)
    assert kind(seed=2**62 - 1).seed == 2**62 - 1


@dataclass(frozen=True)
class Bounded:
    """One field of every kind of bound."""

    count: int = describe(1, "a count", at_least=1)
    share: float | None = describe(None, "a share", above=0, at_most=1)
    weights: tuple[float, ...] = describe((), "weights", at_least=0, below=2)

    def __post_init__(self) -> None:
        check_bounds(self)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"count": 0}, "count: got 0; expected an integer of 1 or more"),
        ({"share": 0.0}, "share: got 0.0; expected a number of more than 0 and at most 1, or null"),
        ({"share": float("nan")}, "share: got nan; expected a number"),
        (
            {"weights": (0.5, 2.0)},
            "weights: got [0.5, 2.0]; expected a number of 0 or more and less",
        ),
    ],
)
def test_a_value_out_of_its_bounds_is_refused(fields, said):
    with pytest.raises(RequestError) as error:
        Bounded(**fields)
    assert str(error.value).startswith(said)
    assert Bounded(share=1.0, weights=(0.0, 1.9)).count == 1
