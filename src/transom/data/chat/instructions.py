"""`stdlib-docs`: questions and answers about Python's standard library, from its docstrings.

The sources are read, but not imported or run. Every machine has them, and the model of `transom
demo` is trained on them, so that fine-tuning can be tried without a download.
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

from transom.data.row_files import DataRow

NAME = "stdlib-docs"
# Folders that are no part of the library, or that not every machine has.
EXCLUDED = (
    *("site-packages", "test", "tests", "idlelib", "lib2to3", "encodings"),
    *("distutils", "tkinter", "turtledemo"),
)
# Characters. With the words of a template both fit into the 256 tokens of the demo's model.
QUESTION, SHORTEST, LONGEST = 160, 20, 300
LONGEST_SIGNATURE = 120
PARTS = 3  # module.Class.method; deeper names are implementation details
Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = Function | ast.ClassDef | ast.Module


class Item(NamedTuple):
    """Something that has a docstring.

    Attributes:
        kind: `module`, `class`, `function` or `method`.
        name: Its full name.
        paragraph: The first paragraph of its docstring.
        signature: Its signature, if it is a function and its signature is short.
    """

    kind: str
    name: str
    paragraph: str
    signature: str = ""

    @property
    def sentence(self) -> str:
        """Return the first sentence without its full stop."""
        return re.split(r"\.(?=\s|$)", self.paragraph, maxsplit=1)[0]


def stdlib_rows() -> Iterator[DataRow]:
    """Return conversations of one question and one answer.

    They are the same on every machine with this version of Python. Their order mixes modules and
    kinds of questions, and their ids are `stdlib-docs:NAME#KIND`.
    """
    return iter(_all())


@cache
def _all() -> tuple[DataRow, ...]:
    """Return all conversations. Parsing the library takes seconds."""
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
                turns = {"user": question, "assistant": answer}
                messages = [{"role": role, "content": text} for role, text in turns.items()]
                id = f"{NAME}:{item.name}#{kind}"
                out.append(DataRow(id, id, {"messages": messages}))
    return tuple(sorted(out, key=lambda row: hashlib.sha256(row.id.encode()).digest()))


def _questions(
    item: Item, sentence_alone: bool, name_alone: bool
) -> Iterator[tuple[str, str, str]]:
    """Yield (kind, question, answer) about one item.

    Args:
        item: The item.
        sentence_alone: Whether no other docstring begins with its first sentence.
        name_alone: Whether nothing else has its last name.
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


# -- the library -----------------------------------------------------------------------------------


def _items(root: Path) -> Iterator[Item]:
    """Yield everything public that has a docstring, in the order of the files."""
    for path in _sources(root):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        try:
            with warnings.catch_warnings():  # about invalid escapes in old files
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # files that are malformed on purpose
            continue
        yield from _documented(tree, "module", name)


def _sources(folder: Path) -> Iterator[Path]:
    """Yield the public Python files of the library in the order of their names."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in EXCLUDED and _public(path.name):
            yield from _sources(path)
        elif path.suffix == ".py" and (_public(path.stem) or path.stem == "__init__"):
            yield path


def _documented(node: Documented, kind: str, name: str) -> Iterator[Item]:
    """Yield an item for a node, if it has a docstring, and for the nodes inside it."""
    paragraph = _first_paragraph(ast.get_docstring(node, clean=False))
    if paragraph is not None:
        function = kind == "function" and isinstance(node, Function)
        yield Item(kind, name, paragraph, _signature(node, name) if function else "")
    for inner in [] if isinstance(node, Function) else node.body:
        if isinstance(inner, Function | ast.ClassDef) and _public(inner.name):
            below = "method" if kind == "class" else "function"
            below = "class" if isinstance(inner, ast.ClassDef) else below
            yield from _documented(inner, below, f"{name}.{inner.name}")


def _public(name: str) -> bool:
    return name.isidentifier() and not name.startswith("_")


def _first_paragraph(docstring: str | None) -> str | None:
    """Return the first paragraph on one line; None if it is too short, too long or no prose."""
    text = re.split(r"\n\s*\n", inspect.cleandoc(docstring or "").strip(), maxsplit=1)[0]
    text = re.sub(r"\s+", " ", text).strip()
    fits = SHORTEST <= len(text) <= LONGEST and text.isascii() and " " in text
    prose = text[:1].isupper() and text.endswith(".") and not re.search(r">>>|->|\$|::|\|", text)
    return text if fits and prose else None


def _signature(node: Documented, name: str) -> str:
    """Return `name(arguments)` as in the source without annotations, or "" if it is long."""
    assert isinstance(node, Function), "only functions have arguments"
    for one in ast.walk(node.args):
        if isinstance(one, ast.arg):
            one.annotation = None
    text = f"{name}({ast.unparse(node.args)})"
    return text if len(text) <= LONGEST_SIGNATURE else ""
