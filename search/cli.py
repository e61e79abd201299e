"""The command line: options and verbs -> StudyConfig -> one call; errors -> one line, exit code."""

import contextlib
import functools
import gc
import inspect
import json
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import make_dataclass
from typing import Annotated, Any

import typer

from search import signals
from search.config import files
from search.config.files import build_config
from search.config.options import flag
from search.config.settings import options
from search.errors import InputError, RunError, printable, redact
from search.imports import hidden, quickly

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Given = Mapping[str, str | None]  # the text of every option by its setting's name
_STORES = ("study_name", "storage", "tracking_uri", "model_name")


# ---- options -------------------------------------------------------------------------------------


def _file(name: str, metavar: str, help: str) -> tuple[str, Any, Any]:
    option = typer.Option(f"--{name}", metavar=metavar, help=help, rich_help_panel="Study")
    return name, Annotated[str | None, option], None


_FILES = (
    _file("preset", "NAME", "A predefined search; python study.py presets lists them."),
    _file("config", "FILE.toml", "Settings file; its values take precedence over the preset's."),
)


def _setting(name: str) -> tuple[str, Any, Any]:
    """The option of a setting, as a field of a dataclass: name, type, default."""
    option = options()[name]
    shown = option.none if option.default is None else option.default
    environment = f" Environment: {option.env}." if option.env else ""
    declared = typer.Option(
        flag(name),
        metavar="|".join(option.choices) or option.metavar,
        help=f"{option.help}{environment} [dim]\\[default: {shown}][/dim]",
        show_default=False,
        rich_help_panel=option.group,
    )
    return name, Annotated[str | None, declared], None


def _command(function: Callable[..., int], settings: Collection[str], **methods: Any) -> Any:
    """The command of a verb for Typer: a dataclass whose fields are the verb's options.

    Typer creates an instance from the command line; calling that calls `function` with the settings
    as a mapping, and with the verb's own options, the keyword-only parameters of `function`.
    """
    parameters = inspect.signature(function).parameters.values()
    own = [(p.name, p.annotation, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY]

    def call(self: object) -> int:
        given = dict(vars(self))
        return function(given, **{name: given.pop(name) for name, *_ in own})

    fields = [*own, *(_FILES if settings else ()), *map(_setting, settings)]
    namespace = {"__doc__": function.__doc__, "__call__": call, **methods}
    return make_dataclass(function.__name__, fields, namespace=namespace, repr=False, eq=False)


# ---- verbs ---------------------------------------------------------------------------------------


def study(
    given: Given,
    *,
    context: typer.Context,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only the summary.")] = False,
) -> int:
    """Search the hyperparameters of a Keras network and promote the best model to production.

    Run the same command again to resume after an interruption: no work is lost or repeated.
    """
    config = build_config(given)
    from search.workers import processes

    processes.start_importing(config)
    from search.report.live import choose_progress
    from search.report.terminal import Output
    from search.report.text import summary

    console = Output(soft_wrap=True)
    shown = choose_progress(console, quiet=quiet)
    with contextlib.closing(shown):
        shown.loading(config.study_name)
        with _loading() if processes.trains_here(config) else _loading("pandas", "matplotlib"):
            from search import pipeline, session

        def abandon(reason: str) -> None:
            shown.close()
            session.abandon(config, reason)

        with signals.handled(shown.stop, abandon), contextlib.closing(shown):
            result = pipeline.run(config, shown)
    console.print(summary(result), markup=False, highlight=False)
    return 0 if result.winner is not None else signals.EXIT_INTERRUPTED


def show(
    given: Given,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> int:
    """Show the results of the study, read from the databases."""
    config = build_config(given)
    with _loading():
        from rich.console import Console

        from search.report import overview, text

    found = overview.read(config)
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        text.show(Console(), found)
    return 0


_OUTPUT = typer.Option("--output", metavar="FILE.html", help="File to write.")


def report(given: Given, *, output: Annotated[str, _OUTPUT] = "report.html") -> int:
    """Write the report: one HTML file with all charts and trials."""
    config = build_config(given)
    with _loading("pandas", "matplotlib"):
        from search.report import publish

    print(f"wrote {printable(str(publish.write_report(config, output)))}")
    return 0


_TRIAL = typer.Option("--trial", metavar="N", help="Number of the trial; by default the winner.")


def reproduce(given: Given, *, trial: Annotated[str | None, _TRIAL] = None) -> int:
    """Train a trial again and check that every epoch is the same to the last digit."""
    if trial is not None and not trial.isdecimal():
        raise InputError(
            f"--trial must be a whole number, 0 or more, but got {trial!r}; for example --trial 0"
        )
    config = build_config(given)
    with quickly():
        from search.workers import reproduce as workers

    number = None if trial is None else int(trial)
    done = workers.reproduce(config, number, given["dataset"], functools.partial(print, flush=True))
    if not done.differences:
        print(f"the same to the last digit: {done.objective} {done.value!r}, every epoch")
    else:
        print(f"not the same: {'; '.join(done.differences)}")
    if done.changed is None:
        print("the packages and hardware of the original training were not recorded")
    elif done.changed:
        print(f"changed since then: {'; '.join(done.changed)}")
    elif done.differences:
        print("the recorded packages and hardware are unchanged")
    return 1 if done.differences else 0


def ui(given: Given) -> int:
    """Serve MLflow's and Optuna's user interfaces for the study, until Ctrl-C."""
    config = build_config(given)
    from search.report import ui

    with signals.leaving():
        ui.serve(config, functools.partial(print, flush=True))
    return 0


def doctor(
    given: Given,
    *,
    fix: Annotated[
        bool, typer.Option("--fix", help="Repair MLflow's runs from the Optuna study.")
    ] = False,
) -> int:
    """Compare the Optuna study with its MLflow runs; exit code 1 if they differ."""
    config = build_config(given)
    with _loading("pandas", "matplotlib"):
        from search.tracking import sync

    repaired, left = sync.doctor(config, fix=fix)
    for line in repaired:
        print(f"repaired: {line}")
    for line in left:
        print(line)
    if left:
        remedy = "run the study again" if fix else "repair with python study.py doctor --fix"
        print(f"{len(left)} disagreement{'s' * (len(left) > 1)}; {remedy}")
        return 1
    print(f"study {config.study_name}: both stores agree")
    return 0


def presets(_: Given) -> int:
    """List the presets: predefined searches, run with --preset NAME."""
    for name, line in files.presets().items():
        print(f"{name:8s} {line}")
    return 0


def _check_order(self: Any) -> None:
    """Refuse settings before a verb: the verb would not see them."""
    verb = self.context.invoked_subcommand
    for name, value in vars(self).items():
        if verb is not None and isinstance(value, str):
            option = flag(name)
            raise typer.BadParameter(
                f"{option} must come after the verb: python study.py {verb} {option}"
            )


app.callback(invoke_without_command=True)(_command(study, options(), __post_init__=_check_order))
_VERBS: dict[Callable[..., int], tuple[str, ...]] = {
    show: _STORES,
    report: _STORES,
    reproduce: ("study_name", "storage", "dataset"),
    ui: _STORES,
    doctor: _STORES,
    presets: (),
}
for _verb, _settings in _VERBS.items():
    app.command(_verb.__name__)(_command(_verb, _settings))


@contextlib.contextmanager
def _loading(*unused: str) -> Iterator[None]:
    """Import a verb's modules in the block, quickly and without libraries that it does not need.

    unused: libraries that Optuna, Keras or MLflow import if they are installed. Scikit-learn is
    always one of them: its importance evaluators are not used.
    """
    with quickly(), hidden("sklearn", *unused):
        import optuna.importance  # noqa: F401

        yield


# ---- the command -------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Typer only parses, since it would hide why a verb was interrupted: it returns the verb's
    command, to be called here, or an exit code after it has shown the help.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # no warnings of MLflow's without git
    try:
        call = app(args=arguments, prog_name="study.py", standalone_mode=False)
        return call() if callable(call) else 0
    except (InputError, RunError) as error:
        return _fail(redact(str(error)), error.exit_code)
    except typer.TyperException as error:
        message = " ".join(str(error).split()).rstrip(".")
        return _fail(f"{message}; see python study.py --help", 2)
    except BrokenPipeError:  # the reader is gone, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt as error:
        reason = str(error) or "interrupted"
        code = getattr(error, "exit_code", signals.EXIT_INTERRUPTED)
        return _fail(f"{reason}; run the same command again to go on", code)
    finally:
        gc.freeze()  # saves a last garbage collection, about a second


def _fail(message: str, code: int) -> int:
    print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code
