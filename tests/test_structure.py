"""What the documents say about the tree is true, and the front of the house stays light."""

import ast
import functools
import io
import re
import tokenize
import tomllib
from pathlib import Path

import pytest

from tests.helpers import run_python
from tools import code_lines

ROOT = Path(__file__).parents[1]


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def tree_in_docs() -> set[str]:
    """Return the files of the tree in docs/architecture.md, relative to the package."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    block = text.split("```")[1]
    names: set[str] = set()
    folders: list[tuple[int, str]] = []
    for line in block.splitlines()[2:]:
        indent = len(line) - len(line.lstrip())
        folders = [(depth, name) for depth, name in folders if depth < indent]
        words = re.match(r"\s*((?:[\w.]+(?:\.py|/)\s*)+)", line)
        for name in words[1].split() if words else ():
            if name.endswith("/"):
                folders.append((indent, name))
            else:
                names.add("".join(folder for _, folder in folders) + name)
    return names


def test_the_tree_in_the_docs_is_the_tree_on_disk():
    package = ROOT / "src" / "transom"
    disk = {str(p.relative_to(package)) for p in package.rglob("*.py")}
    disk = {name for name in disk if not name.endswith("/__init__.py")}
    assert tree_in_docs() == disk


def test_the_map_lists_every_room_in_the_order_of_the_tiers():
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (`[^|]*`) \|", text, flags=re.MULTILINE)
    rooms = [re.findall(r"`(\w+)/`", row) for row in rows]
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    tiers = [tier.split(" | ") for tier in config["contracts"][0]["layers"]]
    assert rooms == [[name.removeprefix("transom.") for name in tier] for tier in tiers]
    package = ROOT / "src" / "transom"
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert folders == {room for row in rooms for room in row}


@pytest.mark.parametrize(
    "module", ["transom", "transom.cli.main", "transom.training.config", "transom.planning.counts"]
)
def test_light_modules_leave_torch_alone(module):
    assert run_python(f"import {module}, sys; print('torch' in sys.modules)").strip() == "False"


def test_every_public_name_resolves():
    import transom

    assert all(getattr(transom, name) is not None for name in transom.__all__)
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        _ = transom.LMM


def test_every_dependency_has_its_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    reasons = (ROOT / "docs" / "dependencies.md").read_text()
    for requirement in (*project["dependencies"], *project["optional-dependencies"]["parquet"]):
        name, bounds = re.match(r"([\w-]+)(.*)", requirement).groups()
        assert f"| {name} | `{bounds}`" in reasons, requirement


# Code lines of each room. Lower a ceiling when a room shrinks; explain a higher one in the commit.
CEILINGS = {
    "base": 844,
    "config": 699,
    "planning": 487,
    "attention": 708,
    "ops": 220,
    "layers": 755,
    "cache": 462,
    "names": 127,
    "models": 514,
    "tokenizers": 964,
    "quantize": 1_192,
    "lora": 607,
    "chat": 896,
    "checkpoints": 4_980,
    "distributed": 1_414,
    "data": 2_203,
    "inference": 2_157,
    "evaluation": 1_370,
    "training": 4_379,
    "verify": 3_051,
    "cli": 1_807,
}


def test_no_room_outgrows_its_ceiling():
    rooms = code_lines.rooms()
    rooms.pop(".")  # the public names
    assert set(rooms) == set(CEILINGS)
    assert not {room: lines for room, lines in rooms.items() if lines > CEILINGS[room]}


def test_no_file_is_too_long():
    package = ROOT / "src" / "transom"
    lengths = {path: len(path.read_text().splitlines()) for path in package.rglob("*.py")}
    assert not [path for path, lines in lengths.items() if lines > 400]


def test_no_function_is_too_long():
    """A function has at most 60 lines; its docstring does not count."""
    long = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef):
                documented = ast.get_docstring(node, clean=False) is not None
                start = node.body[0].end_lineno if documented else node.lineno - 1
                if node.end_lineno - start > 60:
                    long.append(f"{path.name}: {node.name}")
    assert not long


def test_no_two_classes_have_one_name():
    names = [
        node.name
        for path in (ROOT / "src").rglob("*.py")
        for node in parsed(path).body
        if isinstance(node, ast.ClassDef)
    ]
    assert len(names) == len(set(names))


def imports(package: Path) -> dict[str, set[str]]:
    """Return which modules each module imports, at any place in it, also for types only."""
    modules = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [one if one in modules else node.module for one in whole]
            else:
                continue
            graph[name].update(set(targets) & set(modules) - {name})
    return graph


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Return the strongly connected components of more than one module."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen, todo = set(), [start]
        while todo:
            for target in graph[todo.pop()] - seen:
                seen.add(target)
                todo.append(target)
        reach[start] = seen
    components = {
        frozenset(other for other in reach[name] if name in reach[other])
        for name in graph
        if name in reach[name]
    }
    return sorted(map(set, components), key=sorted)


def test_no_modules_import_each_other():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [{"b", "c"}]
    assert circles(imports(ROOT / "src" / "transom")) == []


# Words that stand for a term of the field or for a clear subject ("said", "what it goes by").
PRIVATE_WORDS = re.compile(
    r"\b(said|lonely|behind|thereof|whoever|at hand|goes by|comes out of|in a word|no business"
    r"|what is there|told (?!apart|from))\b",
    re.IGNORECASE,
)


def prose(path: Path) -> list[str]:
    """Return the comments and strings of a Python file, or the text of another file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return [text]
    kinds = (tokenize.COMMENT, tokenize.STRING)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [token.string for token in tokens if token.type in kinds]


def test_the_text_has_no_private_words():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
    found = {
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in [*pages, *(ROOT / "src").rglob("*.py")]
        for text in prose(path)
        for match in PRIVATE_WORDS.finditer(text)
    }
    assert not found
