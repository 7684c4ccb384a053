"""Reading files of one JSON object a line, whose last line a kill may have torn."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def read_lines(file: Path, key: str) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON objects that have a key; none of a file that cannot be read."""
    lines, content = [], b""
    with suppress(OSError):
        content = file.read_bytes()
    for text in content.splitlines():
        with suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, Mapping) and key in line:
                lines.append(dict(line))
    return lines
