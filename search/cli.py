"""The command line: options and verbs -> StudyConfig -> one call; errors -> one line, exit code."""

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

import typer

from search import config as settings
from search import signals
from search.config import InputError, RunError, StudyConfig

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


_UsageError: type[Exception] = typer.BadParameter.__mro__[
    1
]  # Typer names it only in a private module

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
    """Search the hyperparameters of a Keras network and leave the best in production.

    Run the same command again to go on after an interruption: nothing is lost and nothing is done
    twice.
    """
    if context.invoked_subcommand is None:
        return functools.partial(run_study, build_config(config, given))
    for name, text in (("config", config), *given.items()):
        if text is not None:
            raise typer.BadParameter(
                f"{settings.flag(name)} must come after the verb: "
                f"python study.py {context.invoked_subcommand} {settings.flag(name)}"
            )
    return None


def _doctor(fix: bool = False, config: str | None = None, **given: str | None) -> Callable[[], int]:
    """Say what the two ledgers disagree about; exit code 1 if anything."""
    return functools.partial(run_doctor, build_config(config, given), fix)


_PLACES = ("study_name", "storage", "tracking_uri", "model_name")
_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def _with_options(
    function: Callable[..., Any], names: Iterable[str], *own: inspect.Parameter
) -> Callable[..., Any]:
    """Give `function` an option for each of these settings, described where the setting is."""
    parameters = [
        *own,
        inspect.Parameter(
            "config",
            _KEYWORD,
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
    for name in names:
        option = settings.options()[name]
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
        parameters.append(inspect.Parameter(name, _KEYWORD, default=None, annotation=annotation))
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in parameters}
    return function


app.callback(invoke_without_command=True)(
    _with_options(
        _study,
        settings.options(),
        inspect.Parameter("context", _KEYWORD, annotation=typer.Context),
    )
)
app.command("doctor")(
    _with_options(
        _doctor,
        _PLACES,
        inspect.Parameter(
            "fix",
            _KEYWORD,
            default=False,
            annotation=Annotated[
                bool, typer.Option("--fix", help="Mend it: MLflow follows Optuna.")
            ],
        ),
    )
)


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
    with signals.handled(lines.stop, functools.partial(pipeline.abandon, config)):
        result = pipeline.run(config, lines)
    console.print(report.summary(result), markup=False, highlight=False)
    return 0 if result.winner is not None else signals.EXIT_INTERRUPTED


def run_doctor(config: StudyConfig, fix: bool) -> int:
    """Print what the ledgers disagree about; returns the exit code."""
    from search import doctor

    mended, left = doctor.examine(config, fix=fix)
    for line in mended:
        print(f"mended: {line}")
    for line in left:
        print(line)
    if left:
        remedy = "run the study again" if fix else "mend with python study.py doctor --fix"
        print(f"{len(left)} disagreement{'s' * (len(left) > 1)}; {remedy}")
        return 1
    print(f"study {config.study_name}: both ledgers agree")
    return 0


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
        code = getattr(error, "exit_code", signals.EXIT_INTERRUPTED)
        return _fail(f"{reason}; run the same command again to go on", code)


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code
