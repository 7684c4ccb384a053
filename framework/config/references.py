"""References between values: ``$a.b`` is another value of the tree, ``$env:NAME|default`` comes from the environment.

A reference is a whole scalar. ``$$`` starts a string that begins with ``$``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from framework.config.errors import Keys, dotted, nearest
from framework.config.yaml import Config, parse_scalar


class _Unresolved(Exception):
    def __init__(self, keys: Keys, message: str) -> None:
        self.keys = keys
        self.message = message


class References:
    """Replaces references by their values; what cannot be resolved is reported once, where it is written."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.tree = config.tree
        self.reported: set[Keys] = set()

    def value(self, keys: Keys, node: Any, chain: tuple[Keys, ...]) -> Any:
        """The node with its references followed; ``chain`` holds the references that led here."""
        if isinstance(node, dict):
            return {key: self.value((*keys, key), item, chain) for key, item in node.items()}
        if isinstance(node, list):
            return [self.value((*keys, index), item, chain) for index, item in enumerate(node)]
        if not isinstance(node, str) or not node.startswith("$"):
            return node
        if node.startswith("$$"):
            return node[1:]
        try:
            return self.environment(keys, node) if node.startswith("$env:") else self.follow(keys, node, chain)
        except _Unresolved as error:
            if chain:
                raise
            self.config.unresolved.add(keys)
            if error.keys not in self.reported:
                self.reported.add(error.keys)
                self.config.report(error.keys, error.message)
            return None

    def environment(self, keys: Keys, text: str) -> Any:
        match = re.fullmatch(r"\$env:([A-Za-z_][A-Za-z0-9_]*)(?:\|(.*))?", text, re.DOTALL)
        if not match:
            raise _Unresolved(keys, f"'{text}' is not a reference: write $env:NAME or $env:NAME|default")
        name, default = match.groups()
        value = os.environ.get(name) or default
        if value is None:
            hint = f"set it (export {name}=...) or override {dotted(keys)}=..."
            raise _Unresolved(keys, f"the environment variable {name} is not set: {hint}")
        return parse_scalar(value)

    def follow(self, keys: Keys, text: str, chain: tuple[Keys, ...]) -> Any:
        if keys in chain:
            circle = chain[chain.index(keys) :]
            start = circle.index(min(circle, key=dotted))
            circle = (*circle[start:], *circle[: start + 1])
            raise _Unresolved(circle[0], f"the references go in a circle: {' -> '.join(map(dotted, circle))}")
        target: Keys = ()
        node: Any = self.tree
        for word in text[1:].split("."):
            key: str | int = int(word) if isinstance(node, list) and word.isdecimal() else word
            if not (key in node if isinstance(node, dict) else isinstance(key, int) and key < len(node)):
                match = nearest(text[1:], map(dotted, _places(self.tree)))
                hint = f"did you mean '${match}'?" if match else "name a written value ($$ starts a plain string)"
                raise _Unresolved(keys, f"dangling reference '{text}': {hint}")
            node, target = node[key], (*target, key)
        if any(isinstance(item, dict) for item in (node if isinstance(node, list) else [node])):
            raise _Unresolved(keys, f"'{text}' is a mapping: a reference copies one value or a list of values")
        return self.value(target, node, (*chain, keys))


def _places(node: Any, keys: Keys = ()) -> Iterator[Keys]:
    """The keys of every value that can be referred to."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    if not isinstance(node, dict):
        yield keys
    for key, item in items:
        yield from _places(item, (*keys, key))
