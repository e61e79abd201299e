"""The errors that end a run: their exit codes, in one line, without secrets."""

import time

import pytest
from sqlalchemy import make_url

from search.errors import InputError, RunError, one_line, printable, redact


def test_the_two_errors_have_two_exit_codes() -> None:
    assert (InputError.exit_code, RunError.exit_code) == (2, 1)


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://me:hunter2@host/db",
        "postgresql+psycopg://me:hunter2@host:5432/db?sslmode=require",
        "http://me:hunter2@host:5000/path",
        "postgresql://host/db?user=me&password=hunter2",
        "postgresql://me:p@hunter2@host/db",
        "postgresql://me:p:hunter2@host/db",
        "http://:hunter2@host",
        "https://host/?token=hunter2&x=1",
        "cannot open 'mysql://me:hunter2@host/db': refused",
        "from postgresql://me:hunter2@one/db to http://you:hunter2@two/",
        "postgresql://me:it's hunter2@host/db",
        'postgresql://me:a"hunter2@host/db',
        "postgresql://me:12/hunter2@host:5432/db?sslmode=require",
        "postgresql://me:a?hunter2@host/db",
        "postgresql://me:a?b=hunter2@host/db",
        "postgresql://me:a#hunter2@host/db",
        "postgresql://me@host/db?sslpassword=hunter2",
        "postgresql://me@host/db?x=1&sslpassword=it's hunter2&y=2",
        "postgresql://me@host/db?sslpassword=a?b#hunter2",
        "postgresql://me@host/db?ssl%70assword=hunter2",
        "mssql+pyodbc:///?odbc_connect=DRIVER%3DX%3BPWD%3Dhunter2%3BUID%3Dme",
        "https://hunter2@host/x",
        "https://hunter2:@host/x",
        "http://me:pa ss'w\"hunter2@host:5000",
        "http://me@host:5000/a?client_secret=hunter2&x=1",
        "https://host/x#access_token=hunter2",
        'but http://me:it\'s "my" hunter2@host:5000 is not: refused',
        "'postgresql://me:it\\'s hunter2@host/db' cannot: refused by me@corp",
        "open https://hunter2@host/x: failed",
        "to 'postgresql://me@host/db?sslpassword=hunter2', which failed",
        "to 'postgresql://me@host/db?sslpassword=a'hunter2', which failed",
        "PGPASSWORD=hunter2 psql",
    ],
)
def test_no_password_is_printed(text: str) -> None:
    assert "hunter2" not in redact(text)
    assert "***" in redact(text)


def test_only_what_is_secret_is_masked() -> None:
    url = 'postgresql+psycopg://me:it\'s "hunter2"@host:5432/db?sslmode=require&sslpassword=a b&x=1'
    assert make_url(url).password == 'it\'s "hunter2"'
    assert make_url(url).query["sslpassword"] == "a b"
    masked = "postgresql+psycopg://me:***@host:5432/db?sslmode=require&sslpassword=***&x=1"
    assert redact(url) == masked
    assert redact(f"from {masked!r} to {masked}") == f"from {masked!r} to {masked}"


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:///study.db",
        "http://localhost:5000",
        "postgresql://me@host/db",
        "sqlite:///a@b.db",
        "--study-name a exists (stored -> given): epochs: 5 -> 6",
        "sqlite:////my runs@home/a:b@c.db",
        "http://localhost:5000/a@b",
        "postgresql://host/db?options=a@b",
        "cannot reach http://localhost:5000/a?b=1 of models:/X@production",
        "cannot reach 'http://localhost:5000': ask a@b",
        "http://me:***@host:5000 and https://***@x/y?token=***",
        "the token is wrong: none",
    ],
)
def test_what_is_no_secret_is_printed_as_it_is(text: str) -> None:
    assert redact(text) == text


def test_a_long_word_is_read_once() -> None:
    word = "9" * 20_000  # read from every digit on, it would take more than ten seconds
    started = time.process_time()
    assert redact(f"--seed must be less, but got {word} pwd={word}") == (
        f"--seed must be less, but got {word} pwd=***"
    )
    assert time.process_time() - started < 2


def test_control_characters_and_lone_surrogates_are_escaped_and_letters_stay() -> None:
    letters = "größer, 模型, مثال, मॉडल, naïve, 🎉, no-break\u00a0space"
    assert printable(letters) == letters
    assert printable("a\x1b[2J\x00\r\n\x7f\x9b\udcff") == r"a\x1b[2J\x00\r\n\x7f\x9b\udcff"
    assert one_line(ValueError("two\nlines\x1b")) == r"two lines\x1b"
