"""Models by their id in the Hugging Face hub: from its local cache without a network, and downloaded only otherwise."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from framework.engine.manifest import MANIFEST
from framework.engine.run_directory import RunError
from framework.models.exported import CARD, CONFIG, WEIGHTS

_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?", re.ASCII)


def find_model(source: str | Path) -> Path:
    """The folder of a model: ``source`` itself, or the hub's local copy of the model of that id.

    ``owner/name`` and ``owner/name@revision``, a branch, tag or commit, are ids where there is no folder ``owner``
    here. The cached copy of a branch is used as it is, even where the hub has a newer one.

    Raises:
        RunError: if the model is neither in the cache nor can be downloaded, or is not one of this framework's.
    """
    folder, found = Path(source), _ID.fullmatch(str(source))
    if found is None or Path(found["name"]).parent.exists():
        return folder
    from huggingface_hub import constants, snapshot_download  # takes a second, which run directories do without
    from huggingface_hub.errors import LocalEntryNotFoundError

    files = [CONFIG, WEIGHTS, MANIFEST, CARD]
    snapshot = partial(snapshot_download, found["name"], revision=found["revision"], allow_patterns=files)
    try:
        try:
            local = Path(snapshot(local_files_only=True))
            if not all((local / name).is_file() for name in (CONFIG, WEIGHTS, MANIFEST)):
                raise LocalEntryNotFoundError(f"{local} is incomplete")
        except LocalEntryNotFoundError:
            local = Path(snapshot())
    except Exception as error:  # of many kinds, and all of them mean the same here
        revision = f" --revision {found['revision']}" if found["revision"] else ""
        raise RunError(
            f"{source} holds no run: there is no such folder here. As a model of the Hugging Face hub it is not in the "
            f"cache {constants.HF_HUB_CACHE}, and it cannot be downloaded: {str(error).strip().splitlines()[0]} "
            f"({type(error).__name__}). Where there is a network: hf download {found['name']}{revision} --local-dir "
            "FOLDER; then name that folder here"
        ) from error
    if not (local / MANIFEST).is_file():
        raise RunError(f"{source} is not a model that this framework has exported: it has no {MANIFEST}")
    return local
