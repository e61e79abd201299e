"""The command line: options and verbs -> StudyConfig -> one call; errors -> one line, exit code."""

import contextlib
import functools
import inspect
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import typer

from search import config as settings
from search.config import InputError, Interrupted, RunError, StudyConfig

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


_UsageError: type[Exception] = typer.BadParameter.__mro__[
    1
]  # Typer names it only in a private module

_EXIT_INTERRUPTED, _EXIT_TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
_METAVARS = {
    "timeout": "SECONDS",
    "patience": "TRIALS",
    "workers": "auto|N",
    "study_name": "NAME",
    "storage": "URL",
    "dataset": "NAME|FILE.npz",
    "validation_split": "SHARE",
    "hidden_units": "SPACE",
    "dropout_rate": "SPACE",
    "learning_rate": "SPACE",
    "tracking_uri": "URL",
    "experiment": "NAME",
    "model_name": "NAME",
}


def _study(
    context: typer.Context, config: str | None = None, **given: str | None
) -> Callable[[], int] | None:
    if context.invoked_subcommand is not None:
        return None
    return functools.partial(run_study, build_config(config, given))


def _parameters() -> list[inspect.Parameter]:
    """One option a setting of StudyConfig, so that a setting is described in one place."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("context", keyword, annotation=typer.Context),
        inspect.Parameter(
            "config",
            keyword,
            default=None,
            annotation=Annotated[
                str | None,
                typer.Option(
                    "--config",
                    metavar="FILE.toml",
                    help="Settings, the options' names as keys; the command line wins.",
                    rich_help_panel="Study",
                ),
            ],
        ),
    ]
    defaults = settings.defaults()
    for name, option in settings.options().items():
        shown = option.none if defaults[name] is None else str(defaults[name])
        help_text = option.help + (f" Environment: {option.env}." if option.env else "")
        metavar = "|".join(option.choices) or _METAVARS.get(name, "N")
        annotation = Annotated[
            str | None,
            typer.Option(
                settings.flag(name),
                metavar=metavar,
                help=f"{help_text} [dim]\\[default: {shown}][/dim]",
                show_default=False,
                rich_help_panel=option.group,
            ),
        ]
        parameters.append(inspect.Parameter(name, keyword, default=None, annotation=annotation))
    return parameters


_study.__signature__ = inspect.Signature(_parameters())  # type: ignore[attr-defined]
_study.__annotations__ = {p.name: p.annotation for p in _parameters()}
_study.__doc__ = """Search the hyperparameters of a Keras network and leave the best in production.

Run the same command again to go on after an interruption: nothing is lost and nothing is done
twice.
"""
app.callback(invoke_without_command=True)(_study)


def build_config(file: str | None, given: dict[str, str | None]) -> StudyConfig:
    """The settings: the command line before the environment, the file and the defaults."""
    values: dict[str, Any] = {} if file is None else settings.read_file(file)
    for name, option in settings.options().items():
        from_environment = os.environ.get(option.env) if option.env else None
        text = given.get(name)
        if text is None and from_environment:
            text = from_environment
        if text is not None:
            values[name] = settings.from_text(name, text)
    return StudyConfig(**values)


def run_study(config: StudyConfig) -> int:
    """Run the study, printing as it goes; returns the exit code."""
    from rich.console import Console

    from search import pipeline, report

    console = Console(soft_wrap=True)
    lines = report.Lines(console)
    with _signals(lines.stop):
        result = pipeline.run(config, lines)
    console.print(report.summary(result), markup=False, highlight=False)
    return 0 if result.winner is not None else _EXIT_INTERRUPTED


@contextlib.contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C calls `stop`; the second, or SIGTERM, raises Interrupted, once."""
    pressed = 0

    def end(reason: str, code: int) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        raise Interrupted(reason, code)

    def on_interrupt(*_: object) -> None:
        nonlocal pressed
        pressed += 1
        if pressed > 1:
            end("interrupted by Ctrl-C", _EXIT_INTERRUPTED)
        stop()

    def on_terminate(*_: object) -> None:
        end("terminated by SIGTERM", _EXIT_TERMINATED)

    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, on_interrupt),
        signal.SIGTERM: signal.signal(signal.SIGTERM, on_terminate),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code.

    Typer only parses: it answers with the call to make, or with None where it showed the help.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        call = app(args=arguments, prog_name="study.py", standalone_mode=False)
        return call() if callable(call) else 0
    except (InputError, RunError) as error:
        return _fail(settings.redact(str(error)), error.exit_code)
    except _UsageError as error:
        message = " ".join(str(error).split()).rstrip(".")
        return _fail(f"{message}; see python study.py --help", 2)
    except KeyboardInterrupt as error:
        reason = str(error) or "interrupted"
        code = getattr(error, "exit_code", _EXIT_INTERRUPTED)
        return _fail(f"{reason}; run the same command again to go on", code)


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code
