"""Errors that end a run, each one line with an exit code; text that is safe to show."""

import re
from urllib.parse import unquote

_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\ud800-\udfff]"
)  # control characters, lone surrogates


class InputError(Exception):
    """Something the user gave cannot be used; nothing was created or changed. Exit code 2."""

    exit_code = 2


class RunError(Exception):
    """The run had to stop; what it had finished is kept. Exit code 1."""

    exit_code = 1


class Interrupted(KeyboardInterrupt):
    """The user or the system ended the run; `exit_code` is 128 + the signal's number."""

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


def printable(text: str) -> str:
    """`text` without what terminals obey and databases refuse: such a character becomes its escape.

    Letters of every language stay as they are.
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def one_line(error: BaseException) -> str:
    """What went wrong, in one printable line of at most 300 characters, passwords masked."""
    text = printable(redact(_one_line(error)))
    return text if len(text) <= 300 else text[:297] + "..."


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
