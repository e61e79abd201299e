"""The command line: options and verbs -> StudyConfig -> one call; errors -> one line, exit code."""

import contextlib
import functools
import gc
import inspect
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer

from search import signals
from search.config import files
from search.config.hyperparameters import HYPERPARAMETERS
from search.config.options import flag
from search.config.settings import StudyConfig, defaults, from_text, options
from search.errors import InputError, RunError, printable, redact
from search.imports import hidden, quickly

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
    "scheduler": "ADDRESS",
    "study_name": "NAME",
    "storage": "URL",
    "dataset": "NAME|FILE.npz",
    "validation_split": "SHARE",
    "model": "MODULE:FUNCTION",
    **dict.fromkeys(HYPERPARAMETERS, "SPACE"),
    "tracking_uri": "URL",
    "experiment": "NAME",
    "model_name": "NAME",
}


def _study(
    context: typer.Context, quiet: bool = False, **given: str | None
) -> Callable[[], int] | None:
    """Search the hyperparameters of a Keras network and leave the best in production.

    Run the same command again to go on after an interruption: nothing is lost and nothing is done
    twice.
    """
    if context.invoked_subcommand is None:
        return functools.partial(run_study, build_config(given), quiet)
    for name, text in given.items():
        if text is not None:
            raise typer.BadParameter(
                f"{flag(name)} must come after the verb: "
                f"python study.py {context.invoked_subcommand} {flag(name)}"
            )
    return None


def _doctor(fix: bool = False, **given: str | None) -> Callable[[], int]:
    """Say what the two ledgers disagree about; exit code 1 if anything."""
    return functools.partial(run_doctor, build_config(given), fix)


def _show(*, json: bool = False, **given: str | None) -> Callable[[], int]:
    """Show what the study has found, from the databases alone."""
    return functools.partial(run_show, build_config(given), json)


def _report(output: str = "report.html", **given: str | None) -> Callable[[], int]:
    """Write the report: one HTML file with every chart and trial."""
    return functools.partial(run_report, build_config(given), output)


def _reproduce(*, trial: str | None = None, **given: str | None) -> Callable[[], int]:
    """Train a trial again and say whether every epoch is the same to the last digit."""
    if trial is not None and not trial.isdecimal():
        raise InputError(
            f"--trial must be a whole number, 0 or more, but got {trial!r}; for example --trial 0"
        )
    number = None if trial is None else int(trial)
    return functools.partial(run_reproduce, build_config(given), number, given["dataset"])


def _ui(**given: str | None) -> Callable[[], int]:
    """Open the study in MLflow's and Optuna's own user interfaces, until Ctrl-C."""
    return functools.partial(run_ui, build_config(given))


def _presets() -> Callable[[], int]:
    """List the presets, searches that are ready to run with --preset NAME."""
    return run_presets


_PLACES = ("study_name", "storage", "tracking_uri", "model_name")
_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def _file(name: str, metavar: str, help: str) -> inspect.Parameter:
    option = typer.Option(f"--{name}", metavar=metavar, help=help, rich_help_panel="Study")
    return inspect.Parameter(name, _KEYWORD, default=None, annotation=Annotated[str | None, option])


def _with_options(
    function: Callable[..., Any], names: Iterable[str], *own: inspect.Parameter
) -> Callable[..., Any]:
    """Give `function` an option for each of these settings, described where the setting is."""
    parameters = [
        *own,
        _file("preset", "NAME", "A search that is ready to run: python study.py presets."),
        _file("config", "FILE.toml", "Settings, the options' names as keys; they win over preset."),
    ]
    for name in names:
        option = options()[name]
        shown = option.none if defaults()[name] is None else str(defaults()[name])
        help_text = option.help + (f" Environment: {option.env}." if option.env else "")
        metavar = "|".join(option.choices) or _METAVARS.get(name, "N")
        annotation = Annotated[
            str | None,
            typer.Option(
                flag(name),
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


def _own(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, _KEYWORD, default=default, annotation=annotation)


def _flag(name: str, help: str) -> inspect.Parameter:
    return _own(name, Annotated[bool, typer.Option(f"--{name}", help=help)], False)


app.callback(invoke_without_command=True)(
    _with_options(
        _study,
        options(),
        _own("context", typer.Context),
        _flag("quiet", "Print the summary alone."),
    )
)


for _name, _verb, *_parameters in (
    ("show", _show, _flag("json", "Print it as JSON, for scripts.")),
    (
        "report",
        _report,
        _own(
            "output",
            Annotated[
                str, typer.Option("--output", metavar="FILE.html", help="Where to write it.")
            ],
            "report.html",
        ),
    ),
    (
        "reproduce",
        _reproduce,
        _own(
            "trial",
            Annotated[
                str | None,
                typer.Option("--trial", metavar="N", help="Which one; by default the winner."),
            ],
            None,
        ),
    ),
    ("ui", _ui),
    ("doctor", _doctor, _flag("fix", "Repair it: make the MLflow runs follow Optuna.")),
):
    _names = ("study_name", "storage", "dataset") if _name == "reproduce" else _PLACES
    app.command(_name)(_with_options(_verb, _names, *_parameters))


app.command("presets")(_presets)


def build_config(given: Mapping[str, str | None]) -> StudyConfig:
    """The settings: the command line before the environment, the file, the preset, the defaults.

    Raises InputError, also for a hyperparameter on the command line that would change nothing.
    """
    preset, file = given.get("preset"), given.get("config")
    values: dict[str, Any] = {} if preset is None else files.read_preset(preset)
    values.update({} if file is None else files.read_file(file))
    for name, option in options().items():
        from_environment = os.environ.get(option.env) if option.env else None
        text = given.get(name)
        if text is None and from_environment:
            text = from_environment
        if text is not None:
            values[name] = from_text(name, text)
    if "model" not in given:  # a verb: none needs it, and to import it takes time
        values.pop("model", None)
    config = StudyConfig(**values)
    for name in HYPERPARAMETERS:
        if given.get(name) is not None:
            _check_matters(name, config)
    return config


def _check_matters(name: str, config: StudyConfig) -> None:
    space = config.space
    if name not in space.parameters or (config.model and HYPERPARAMETERS[name].network):
        raise InputError(
            f"{flag(name)} must be left out with --model, whose network has what its "
            f"SPACE declares, but got {getattr(config, name)!r}; declare it there"
        )
    if not space.can_matter(name):
        condition = space.conditions[name]
        raise InputError(
            f"{flag(name)} matters only with {condition}, but got "
            f"{getattr(config, name)!r} and {condition.parent} "
            f"{space.parameters[condition.parent]}; give "
            f"{flag(condition.parent)} {condition.values[-1]}, too"
        )


def run_study(config: StudyConfig, quiet: bool = False) -> int:
    """Run the study, showing how it goes; returns the exit code."""
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
            from search import pipeline

        def abandon(reason: str) -> None:
            shown.close()
            pipeline.abandon(config, reason)

        with signals.handled(shown.stop, abandon), contextlib.closing(shown):
            result = pipeline.run(config, shown)
    console.print(summary(result), markup=False, highlight=False)
    return 0 if result.winner is not None else signals.EXIT_INTERRUPTED


@contextlib.contextmanager
def _loading(*unused: str) -> Iterator[None]:
    """Load a verb's modules in the block, quickly and without what they load in vain.

    unused: libraries that Optuna, Keras or MLflow load where they are there. Scikit-learn is one:
    it serves importance evaluators that are not used.
    """
    with quickly(), hidden("sklearn", *unused):
        import optuna.importance  # noqa: F401

        yield


def run_show(config: StudyConfig, as_json: bool) -> int:
    """Print what the study has found; returns the exit code."""
    with _loading():
        from rich.console import Console

        from search.report import overview
        from search.report.text import show

    found = overview.read(config)
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        show(Console(), found)
    return 0


def run_report(config: StudyConfig, output: str) -> int:
    """Write the report; returns the exit code."""
    with _loading("pandas", "matplotlib"):
        from search.report import publish

    print(f"wrote {printable(str(publish.write_report(config, output)))}")
    return 0


def run_reproduce(config: StudyConfig, number: int | None, moved: str | None) -> int:
    """Train a trial again and print whether it is the same; returns the exit code."""
    with quickly():
        from search.workers import reproduce

    done = reproduce.reproduce(config, number, moved, functools.partial(print, flush=True))
    if not done.differences:
        print(f"the same to the last digit: val_accuracy {done.value!r}, every epoch")
    else:
        print(f"not the same: {'; '.join(done.differences)}")
    if done.changed is None:
        print("what it ran on then was not recorded")
    elif done.changed:
        print(f"changed since then: {'; '.join(done.changed)}")
    elif done.differences:
        print("nothing that is recorded of the machine's kind and the packages has changed")
    return 1 if done.differences else 0


def run_presets() -> int:
    """Print the presets; returns the exit code."""
    for name, line in files.presets().items():
        print(f"{name:8s} {line}")
    return 0


def run_ui(config: StudyConfig) -> int:
    """Serve both user interfaces until Ctrl-C; returns the exit code."""
    from search.report import ui

    with signals.leaving():
        ui.serve(config, functools.partial(print, flush=True))
    return 0


def run_doctor(config: StudyConfig, fix: bool) -> int:
    """Print where the Optuna study and the MLflow runs disagree; returns the exit code."""
    with _loading("pandas", "matplotlib"):
        from search.tracking.sync import doctor

    repaired, left = doctor(config, fix=fix)
    for line in repaired:
        print(f"repaired: {line}")
    for line in left:
        print(line)
    if left:
        remedy = "run the study again" if fix else "repair with python study.py doctor --fix"
        print(f"{len(left)} disagreement{'s' * (len(left) > 1)}; {remedy}")
        return 1
    print(f"study {config.study_name}: Optuna and MLflow agree")
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
        return _fail(redact(str(error)), error.exit_code)
    except _UsageError as error:
        message = " ".join(str(error).split()).rstrip(".")
        return _fail(f"{message}; see python study.py --help", 2)
    except BrokenPipeError:  # nobody reads on, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt as error:
        reason = str(error) or "interrupted"
        code = getattr(error, "exit_code", signals.EXIT_INTERRUPTED)
        return _fail(f"{reason}; run the same command again to go on", code)
    finally:
        gc.freeze()  # Python would search all that was loaded for garbage once more, for a second


def _fail(message: str, code: int) -> int:
    print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code
