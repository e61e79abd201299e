"""Errors that end a run, each one line with an exit code; text that is safe to show.

InputError         2: the input is invalid, nothing was changed
    ModelError     a function of the user's can't be used (config/custom_model.py)
RunError           1: the run had to stop, finished work is kept
    TakenOver      another process runs the study (study/lock.py)
    Unfit          a worker can't run the study's trials (workers/tasks.py)
Interrupted        128 + signal: a KeyboardInterrupt
"""

import difflib
import re
from collections.abc import Iterable
from urllib.parse import unquote

# Control characters and lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class InputError(Exception):
    """User input is invalid; nothing was created or changed. Exit code 2.

    Raised with one line, or with its parts: the rule, what was found instead, and the remedy.
    """

    exit_code = 2

    def __init__(self, rule: str, found: str = "", remedy: str = "") -> None:
        super().__init__(f"{rule}, but {found}; {remedy}" if found else rule)


class RunError(Exception):
    """The run had to stop; finished work is kept. Exit code 1."""

    exit_code = 1


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or a signal ended the run; exit code 128 + the signal number."""

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


def interruption_behind(error: BaseException | None) -> KeyboardInterrupt | None:
    """The interruption in whose handling `error` was raised, as by a bare `except`, if it was."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


def printable(text: str) -> str:
    """`text` with control characters and lone surrogates replaced by their escapes.

    Terminals interpret them and databases reject them. Letters of every language are unchanged.
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(error: BaseException) -> str:
    """The error in one printable line of at most 300 characters, passwords masked."""
    message = " ".join(str(error).split()) or type(error).__name__
    text = printable(redact(message))
    return text if len(text) <= 300 else text[:297] + "..."


def nearest(word: str, known: Iterable[str], otherwise: str = "", cutoff: float = 0.6) -> str:
    """The remedy for a misspelt `word`: the most similar of `known`, or else `otherwise`.

    cutoff: the least similarity, 0 to 1, as in `difflib.get_close_matches`.
    """
    found = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return f"did you mean {found[0]}?" if found else otherwise


# ---- masking secrets ---------------------------------------------------------------------------

_SCHEME = r"[A-Za-z][\w+.-]*://"
_SECRET = re.compile(r"password|passwd|pwd|token|secret", re.IGNORECASE)
_PAIR = re.compile(  # also within another value, as in odbc_connect=...%3BPWD%3Dsecret
    r"(?i)(?<![\w.-])([\w.-]*(?:password|passwd|pwd|token|secret)[\w.-]*(?:=|%3D))"
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
    """`text`, a URL or a message that contains URLs, with all passwords, tokens and secrets masked.

    Where a secret ends is certain in a URL alone but a guess in a message: when in doubt, more is
    masked.
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
    """Split the URL as SQLAlchemy's `make_url` does, except that a password may contain an @."""
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
