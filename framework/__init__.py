"""Elastic image tokenizers, and the generators on top of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from framework.runs import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # Late, so that importing one part (or asking a tool for --help) does not import all of them.
    if name == "load":
        from framework.runs import load

        return load
    raise AttributeError(f"module 'framework' has no attribute {name!r}")
