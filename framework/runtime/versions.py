"""Which versions of packages are installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def installed_version(package: str) -> str | None:
    """The version of a package, by the name that pip knows it by, or ``None`` where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
