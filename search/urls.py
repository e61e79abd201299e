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


# ---- what may be shown -------------------------------------------------------------------------

_SCHEME = r"[A-Za-z][\w+.-]*://"
_SECRET = re.compile(r"password|passwd|pwd|token|secret", re.IGNORECASE)
_PAIR = re.compile(  # also within another value, as in odbc_connect=...%3BPWD%3Dsecret
    r"(?i)([\w.-]*(?:password|passwd|pwd|token|secret)[\w.-]*(?:=|%3D))"
    r"(?:(?!%3B|%26)[^\s&;])+?(?=['\")\],.;:]*(?:[\s&;]|%3B|%26|$))"
)
_PORT = r"\d{1,5}(?![^\s/?#'\",;:)\]])"
_WITH_PASSWORD = re.compile(
    rf"({_SCHEME})([^\s/@:'\"]*):"
    rf"(?:(?!\w://)[^\s'\"])*@"  # a password without quotes and spaces, to the last @
    rf"|({_SCHEME})([^\s/@:?'\"]*):(?!{_PORT})(?:(?!\w://).)+?@(?:[^\s/@'\"]*@)*",  # to the next
    re.DOTALL,
)
_TOKEN = re.compile(r"(?i)(https?://)(?!\*\*\*@)[^\s/@:?#'\"]+:?@")


def redact(text: str) -> str:
    """`text`, a URL or words with URLs in them, with every password, token and secret masked.

    Where it ends is certain for a URL alone, and a guess in words: rather too much is masked.
    """
    if re.match(_SCHEME, text) and text.count("://") == 1:
        return _redact_url(text)
    text = _WITH_PASSWORD.sub(_without_password, text)
    return _PAIR.sub(r"\1***", _TOKEN.sub(r"\1***@", text))


def _without_password(match: re.Match[str]) -> str:
    scheme, user = match[1] or match[3], match[2] if match[1] else match[4]
    port = match[0].removeprefix(f"{scheme}{user}:")
    if scheme.lower().startswith("http") and re.match(r"\d{1,5}[/?#]", port):
        return match[0]  # an @ in the path of a server
    return f"{scheme}{user}:***@"


def _redact_url(url: str) -> str:
    """As SQLAlchemy's make_url reads it, but for a password with an @ in it, which is one, too."""
    query = re.search(r"[?#](?=[\w.%-]+=)", url)
    split = query.start() if query and "@" in url[: query.start()] else len(url)
    if query and "@" not in url:
        split = query.start()
    base, rest = url[:split], url[split:]
    scheme, _, where = base.partition("://")
    login, at, host = where.rpartition("@")
    user, _, password = login.partition(":")
    http = scheme.lower().startswith("http")
    if at and "/" not in user and not (http and re.match(r"\d{1,5}[/?#]", password)):
        user = "***" if http and not password else user
        base = f"{scheme}://{user}{':***' if password else ''}@{host}"
    pairs = re.split("([&#])" if http else "(&)", rest[1:])
    return base + rest[:1] + "".join(_PAIR.sub(r"\1***", _masked(pair)) for pair in pairs)


def _masked(pair: str) -> str:
    key, equals, _ = pair.partition("=")
    return f"{key}=***" if equals and _SECRET.search(unquote(key)) else pair
