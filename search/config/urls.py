"""Addresses of databases and servers: which file is meant, what may be shown."""

import os
import re
from pathlib import Path
from urllib.parse import quote, unquote


def sqlite_path(url: str) -> Path | None:
    """The file behind a SQLite URL; None for any other database."""
    match = re.fullmatch(r"sqlite(\+\w+)?:///(?P<path>.+)", url, re.DOTALL)
    return Path(unquote(match["path"])).absolute() if match else None


def sqlite_url(path: Path) -> str:
    """The URL of a SQLite file, as SQLAlchemy reads it."""
    return f"sqlite:///{quote(str(path))}"


def is_postgresql(url: str) -> bool:
    """Whether `url` is of a PostgreSQL server, which has locks of its own."""
    return url.startswith("postgresql")


def same_database(storage: str, tracking_uri: str) -> bool:
    """Whether both URLs lead to one database."""
    paths = sqlite_path(storage), sqlite_path(tracking_uri)
    if None in paths:
        one_url, other_url = (
            re.sub(r"^(\w+)\+\w+", r"\1", url.split("?")[0]) for url in (storage, tracking_uri)
        )
        return one_url == other_url
    one, other = (path.resolve() for path in paths if path is not None)
    both = os.path.exists(one) and os.path.exists(other)  # False, too, for a name too long
    return one == other or (both and os.path.samefile(one, other))
