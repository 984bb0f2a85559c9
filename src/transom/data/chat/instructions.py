"""`stdlib-docs`: questions and answers about the Python library of this machine, out of its own
docstrings.

Sources are read, never imported or run. Every machine has the text, and a model that `transom demo`
has trained has read it, so that fine-tuning can be tried without a download. No torch.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from transom.data.chat.conversations import ChatExample

NAME = "stdlib-docs"
# Folders that are not the library itself, or that not every machine has.
EXCLUDED = (
    "site-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",
    "distutils",
    "tkinter",
    "turtledemo",
)
# Characters; with the words of a template both fit into the 256 tokens of the demo's model.
QUESTION, SHORTEST, LONGEST = 160, 20, 300
LONGEST_SIGNATURE = 120
PARTS = 3  # module.Class.method; what lies deeper is of the library's own concern
Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = Function | ast.ClassDef | ast.Module


class Item(NamedTuple):
    """Something that has a docstring: what it is, its full name, the first paragraph of it, and its
    signature.
    """

    kind: str  # module, class, function or method
    name: str
    paragraph: str
    signature: str = ""

    @property
    def sentence(self) -> str:
        """The first sentence, without its full stop."""
        return re.split(r"\.(?=\s|$)", self.paragraph, maxsplit=1)[0]


def stdlib_instructions(limit: int | None = None) -> list[ChatExample]:
    """One question and one answer each, the same on every machine with this version of Python;
    `limit` of them.

    The order mixes modules and kinds of questions; ids are `stdlib-docs:NAME#KIND`.
    """
    return list(_all()[:limit])


@cache
def _all() -> tuple[ChatExample, ...]:
    """Every question; parsing the library takes seconds."""
    items = list(_items(Path(sysconfig.get_paths()["stdlib"])))
    meanings = Counter(item.sentence for item in items)
    names = Counter(item.name.rpartition(".")[2] for item in items)
    asked: set[str] = set()
    out = []
    for item in items:
        if item.name.count(".") >= PARTS:
            continue
        alone = meanings[item.sentence] == 1, names[item.name.rpartition(".")[2]] == 1
        for kind, question, answer in _questions(item, *alone):
            if question not in asked and len(question) <= QUESTION:
                asked.add(question)
                messages = (
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                )
                out.append(ChatExample(f"{NAME}:{item.name}#{kind}", "chat", messages))
    out.sort(key=lambda example: hashlib.sha256(example.id.encode()).digest())
    return tuple(out)


def _questions(
    item: Item, sentence_alone: bool, name_alone: bool
) -> Iterator[tuple[str, str, str]]:
    """(kind, question, answer); whether no other docstring begins so, and nothing else has its last
    name.
    """
    asks = {"module": f"What is the module `{item.name}` for?", "class": f"What is `{item.name}`?"}
    yield "what", asks.get(item.kind, f"What does `{item.name}` do?"), item.paragraph
    if item.kind == "method":
        return
    if item.signature:
        yield "signature", f"Write the signature of `{item.name}`.", f"`{item.signature}`"
    if sentence_alone and len(item.sentence) >= SHORTEST:
        yield "which", f"Which {item.kind} is this: {item.sentence}?", f"`{item.name}`"
    module, _, last = item.name.rpartition(".")
    if name_alone and item.kind == "function":
        yield "where", f"Which module has `{last}`?", f"`{last}` is in the module `{module}`."


# -- what the library says
# ---------------------------------------------------------------------------


def _items(root: Path) -> Iterator[Item]:
    """Everything public that is documented, in the order of the files."""
    for path in _sources(root):
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not parts or not all(map(_public, parts)):
            continue
        try:
            with warnings.catch_warnings():  # old files spell escapes that Python warns of
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (
            SyntaxError,
            ValueError,
        ):  # files of other versions, kept as examples of what is wrong
            continue
        yield from _documented(tree, "module", ".".join(parts))


def _sources(folder: Path) -> Iterator[Path]:
    """Python files in the order of their names, without going where there is other people's
    code.
    """
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in EXCLUDED and _public(path.name):
            yield from _sources(path)
        elif path.suffix == ".py":
            yield path


def _documented(node: Documented, kind: str, name: str) -> Iterator[Item]:
    """An item for the node itself, if it is documented, and for what it holds."""
    paragraph = _first_paragraph(ast.get_docstring(node, clean=False))
    if paragraph is not None:
        signature = (
            _signature(node, name) if kind == "function" and isinstance(node, Function) else ""
        )
        yield Item(kind, name, paragraph, signature)
    for inner in [] if isinstance(node, Function) else node.body:
        if (
            isinstance(inner, Documented)
            and not isinstance(inner, ast.Module)
            and _public(inner.name)
        ):
            below = (
                "class"
                if isinstance(inner, ast.ClassDef)
                else "method"
                if kind == "class"
                else "function"
            )
            yield from _documented(inner, below, f"{name}.{inner.name}")


def _public(name: str) -> bool:
    return name.isidentifier() and not name.startswith("_")


def _first_paragraph(docstring: str | None) -> str | None:
    """The first paragraph on one line, None where it is no sentence of prose or not of a fitting
    length.
    """
    text = re.split(r"\n\s*\n", inspect.cleandoc(docstring or "").strip(), maxsplit=1)[0]
    text = re.sub(r"\s+", " ", text).strip()
    fits = SHORTEST <= len(text) <= LONGEST and text.isascii() and " " in text
    prose = text[:1].isupper() and text.endswith(".") and not re.search(r">>>|->|\$|::|\|", text)
    return text if fits and prose else None


def _signature(node: Function, name: str) -> str:
    """`name(arguments)` as the source has it, without annotations; "" where that is long."""
    for one in ast.walk(node.args):
        if isinstance(one, ast.arg):
            one.annotation = None
    text = f"{name}({ast.unparse(node.args)})"
    return text if len(text) <= LONGEST_SIGNATURE else ""
