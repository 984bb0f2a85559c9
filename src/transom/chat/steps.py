"""Find templates that write one message after another, so that one rendering gives the text of
every prefix.

Such a template is one loop over the messages, followed by text that depends on nothing set in the
loop. Inside the loop, nothing depends on later messages or on `add_generation_prompt`. The first k
messages then render to the text that the full conversation has before step k, followed by the text
after the loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from jinja2 import nodes

BACKWARD = frozenset(
    {"index", "index0", "first", "depth", "depth0", "previtem", "cycle", "changed"}
)
STATEFUL = frozenset({"cycler", "joiner"})  # objects whose value depends on earlier calls
ELSEWHERE = (nodes.Block, nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport)


class Steps(NamedTuple):
    """The loop over the messages, and the number of first messages that the template reads at any
    time.
    """

    loop: nodes.For
    reads: int


def steps_of(template: nodes.Template) -> Steps | None:
    """Return the loop of a template that writes message by message, None for any other."""
    if any(template.find(kind) for kind in ELSEWHERE):
        return None
    names = {"messages", *_aliases(template)}
    loops = [
        one for one in template.body if isinstance(one, nodes.For) and _is_name(one.iter, names)
    ]
    if len(loops) != 1 or loops[0].else_ or loops[0].test is not None or loops[0].recursive:
        return None
    loop = loops[0]
    at = template.body.index(loop)
    behind = template.body[at + 1 :]
    macros = list(template.find_all(nodes.Macro))
    changed = {name for part in (*loop.body, *macros) for name in _names(part, nodes.NSRef)}
    read_behind = {name for part in behind for name in _names(part, nodes.Name)}
    early = (*template.body[:at], *loop.body)
    asks_early = any("add_generation_prompt" in _names(part, nodes.Name) for part in early)
    everywhere = {name.name for name in template.find_all(nodes.Name)}
    if changed & read_behind or asks_early or everywhere & STATEFUL or not _looks_back(loop.body):
        return None
    reads = _reads(template, loop, names)
    return None if reads is None else Steps(loop, reads)


def _aliases(template: nodes.Template) -> set[str]:
    """Return other names of the list of messages that are set once at the top."""
    given = [
        one
        for one in template.body
        if isinstance(one, nodes.Assign) and _is_name(one.node, {"messages"})
    ]
    names = {one.target.name for one in given if isinstance(one.target, nodes.Name)}
    stored = [name.name for name in template.find_all(nodes.Name) if name.ctx == "store"]
    return {name for name in names if stored.count(name) == 1}


def _reads(template: nodes.Template, loop: nodes.For, names: set[str]) -> int | None:
    """Return how many messages are read by number; None if messages are read in any other way."""
    allowed = {id(loop.iter)}
    allowed |= {id(one.node) for one in template.body if isinstance(one, nodes.Assign)}
    count = 0
    for item in template.find_all(nodes.Getitem):
        number = item.arg.value if isinstance(item.arg, nodes.Const) else None
        if _is_name(item.node, names) and type(number) is int and number >= 0:
            allowed.add(id(item.node))
            count = max(count, number + 1)
    used = [name for name in template.find_all(nodes.Name) if name.name in names]
    if any(name.ctx == "load" and id(name) not in allowed for name in used):
        return None
    stored = [name for name in used if name.ctx != "load"]
    return None if any(name.name == "messages" for name in stored) else count


def _looks_back(body: list[nodes.Node]) -> bool:
    """Return whether `loop` is read for earlier steps only; an inner loop has a `loop` of its
    own.
    """
    for part in body:
        for name, owner in _loop_names(part, None):
            if not (
                isinstance(owner, nodes.Getattr) and owner.attr in BACKWARD and name is owner.node
            ):
                return False
    return True


def _loop_names(
    node: nodes.Node, owner: nodes.Node | None
) -> Iterator[tuple[nodes.Name, nodes.Node | None]]:
    """Yield every use of `loop` that means this loop, with the node around it."""
    if isinstance(node, nodes.Name) and node.name == "loop":
        yield node, owner
    parts = [node.iter] if isinstance(node, nodes.For) else node.iter_child_nodes()
    for part in parts:
        yield from _loop_names(part, node)


def _names(part: nodes.Node, kind: type[nodes.Name] | type[nodes.NSRef]) -> Iterator[str]:
    found = [part] if isinstance(part, kind) else []
    yield from (
        str(one.name)
        for one in (*found, *part.find_all(kind))
        if isinstance(one, nodes.Name | nodes.NSRef)
    )


def _is_name(node: nodes.Node | None, names: set[str]) -> bool:
    return isinstance(node, nodes.Name) and str(node.name) in names
