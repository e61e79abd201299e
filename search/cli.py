"""The command line: options and verbs -> StudyConfig -> one call; errors -> one line, exit code."""

import inspect
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from search import config as settings
from search.config import InputError, RunError, StudyConfig

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


_UsageError = typer.BadParameter.__mro__[1]  # Typer names it only in a private module

_METAVARS = {
    "timeout": "SECONDS",
    "patience": "TRIALS",
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


def _study(context: typer.Context, config: str | None = None, **given: str | None) -> None:
    if context.invoked_subcommand is not None:
        return
    run_study(build_config(config, given))


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
        shown = "none" if defaults[name] is None else str(defaults[name])
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
        parameters.append(
            inspect.Parameter(name, keyword, default=None, annotation=annotation)
        )
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


def run_study(config: StudyConfig) -> None:
    """Run the study, printing as it goes."""
    from rich.console import Console

    from search import pipeline, report

    console = Console(soft_wrap=True)
    result = pipeline.run(config, report.Lines(console))
    console.print(report.summary(result), markup=False, highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    try:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        app(args=arguments, prog_name="study.py", standalone_mode=False)
    except (InputError, RunError) as error:
        return _fail(settings.redact(str(error)), error.exit_code)
    except _UsageError as error:
        message = " ".join(str(error).split()).rstrip(".")
        return _fail(f"{message}; see python study.py --help", 2)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted; run the same command again to go on", 130)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
