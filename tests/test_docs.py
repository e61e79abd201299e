"""The README and the pages of docs/ say what is so; their commands and code blocks run."""

import ast
import json
import re
import runpy
import shlex
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import forks
import in_process
import numpy as np
import pytest
from conftest import ROOT, arrays

from search import StudyConfig, cli
from search.config import files
from search.config.hyperparameters import HYPERPARAMETERS
from search.config.options import flag
from search.config.settings import options
from search.data.load import load_dataset
from search.data.sources import MNIST

README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]


def each_page() -> Any:
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of `page` in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `python study.py` in the indented blocks of `page`."""
    text = re.sub(r" \\\n +", " ", page.read_text())
    lines = re.findall(r"^    (?:.* )?python study\.py(.*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```|^    .*?$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


# ---- what stands where ---------------------------------------------------------------------------


def test_the_readme_is_one_page() -> None:
    assert len(README.read_text().splitlines()) <= 200
    assert README.read_text().count("![") == 1


def test_the_page_of_options_is_what_its_script_writes() -> None:
    written = runpy.run_path(str(DOCS / "options.py"))["page"]()
    assert (DOCS / "options.md").read_text() == written, "run python docs/options.py"


def test_every_option_and_its_default_is_documented() -> None:
    page = (DOCS / "options.md").read_text()
    defaults = {setting.name: setting.default for setting in fields(StudyConfig)}
    for name, option in options().items():
        shown = option.none if defaults[name] is None else defaults[name]
        assert f"| `{flag(name)}` | {shown} |" in page, flag(name)
        assert not option.env or f"`{option.env}`" in page


def test_every_hyperparameter_and_preset_is_on_the_page_of_the_search_space() -> None:
    page = (DOCS / "search-space.md").read_text()
    for name, known in HYPERPARAMETERS.items():
        assert f"`{flag(name)}`" in page
        assert all(f"`{word}`" in page for word in known.domain.words)
    assert all(f"| `{name}` |" in page for name in files.presets())


def test_the_layout_in_the_readme_is_the_one_there_is() -> None:
    shown: set[str] = set()
    folder = ""
    for line in README.read_text().split("\n    search/\n")[1].split("\n    docs/")[0].splitlines():
        name = line.split()[0]
        assert len(line.split()) > 1, f"{name} has no caption"
        if name.endswith("/"):
            folder = name
        shown.add(name if len(line) - len(line.lstrip()) == 6 else folder + name)
    package = ROOT / "search"
    modules = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    there = {name for name in modules if not name.endswith("__init__.py")}
    assert shown == there | {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}


@each_page()
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        heads = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE) if anchor else []
        anchors = [re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads]
        assert not anchor or anchor in anchors, target


@each_page()
def test_every_page_is_reached_from_the_readme(page: Path) -> None:
    assert page == README or f"(docs/{page.name})" in README.read_text()


@each_page()
def test_every_file_that_is_named_exists(page: Path) -> None:
    for name in re.findall(r"`((?:search|tests|deploy|docs)/[\w./-]+)`", page.read_text()):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", [p for p in PAGES if p.stem != "options"], ids=lambda p: p.name)
def test_no_private_word_or_placeholder_is_left(page: Path) -> None:
    words = r"@@|\b(ledgers?|shall|whence|anew|mend(s|ed)?|begun|recipe)\b"
    assert re.findall(words, re.sub(r"`[^`]*`", "", prose(page))) == []


def test_every_message_in_the_table_of_troubleshooting_is_one_of_the_code() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "search").rglob("*.py"))
    told = re.sub(r"\{[^}]*\}", "{}", re.sub(r'"\s*f?"', "", sources))
    rows = re.findall(r"^\| ([^|]*`[^|]*) \|", (DOCS / "troubleshooting.md").read_text(), re.M)
    messages = [message for row in rows for message in re.findall("`([^`]+)`", row)]
    assert len(messages) > 8
    for message in messages:
        for part in re.split(r" \.\.\. |HOST, pid N", message):
            assert part in told, message


@pytest.mark.slow
def test_the_transcript_in_the_readme_is_what_a_run_prints(finished: dict[str, Any]) -> None:
    def shape(line: str) -> str:
        return " ".join(re.sub(r"\d[\d.,:]*(e-\d+)?", "N", line).split())

    printed = {shape(line) for line in finished["out"].splitlines()}
    transcript = README.read_text().split("## A run\n")[1].split("\n\n")[0].splitlines()[1:]
    assert 8 < len(transcript) < 16
    differs = ("$ ", "...", "2 workers", "The search ")  # by machine and by outcome
    for line in transcript:
        assert line.strip().startswith(differs) or shape(line) in printed, line


# ---- what runs -----------------------------------------------------------------------------------


@each_page()
def test_every_command_is_accepted(page: Path, in_folder: Path) -> None:
    """It is parsed and its settings are checked; nothing is run."""
    (source,) = [text for text in blocks(DOCS / "your-model.md", "python") if "SPACE" in text]
    Path("mine.py").write_text(source)
    for arguments in commands(page):
        call = cli.app(args=arguments, prog_name="study.py", standalone_mode=False)
        assert callable(call) or "--help" in arguments, arguments
        if not arguments or arguments[0].startswith("--"):
            given = dict(zip(arguments[::2], arguments[1::2], strict=False))
            known = [*options(), "preset", "config"]
            assert cli.build_config({name: given.get(flag(name)) for name in known})


def test_commands_are_found() -> None:
    assert ["--n-trials", "50"] in commands(README)
    assert sum(len(commands(page)) for page in PAGES) > 20


def test_the_settings_file_is_read(tmp_path: Path) -> None:
    (text,) = blocks(DOCS / "options.md", "toml")
    (tmp_path / "study.toml").write_text(text)
    assert len(files.read_file(str(tmp_path / "study.toml"))) == len(text.splitlines())


def test_the_arrays_of_a_table_are_a_dataset(in_folder: Path) -> None:
    rows = np.c_[arrays()["x_train"], arrays()["y_train"]]
    np.savetxt("flowers.csv", rows, delimiter=",", header="a,b,c,d,class")
    (text,) = [t for t in blocks(DOCS / "your-data.md", "python") if "flowers.csv" in t]
    exec(text, {})
    dataset = load_dataset("./mine.npz", 0.25, split="stratified", normalize=True)
    assert (dataset.features, dataset.classes, len(dataset.x_test)) == (4, 2, 8)


@pytest.mark.slow
def test_the_table_is_searched_and_its_model_answers_rows(in_folder: Path) -> None:
    write, use = [t for t in blocks(DOCS / "your-data.md", "python") if "wine.csv" in t]
    exec(write, {})
    (search,) = [words for words in commands(DOCS / "your-data.md") if "wine.csv" in words]
    small = ("--n-trials", "1", "--epochs", "2", "--workers", "1", "--report", "none")
    small += ("--baselines", "none")
    code, _, err = in_process.command(in_folder, *search, *small)
    assert (code, err) == (0, "")
    answers = run_python(use, in_folder)
    assert re.findall(r"^prediction +cultivar \d( +cultivar \d)?$", answers, re.MULTILINE)
    assert len(re.findall(r"^probability_cultivar \d +0\.\d+", answers, re.MULTILINE)) == 2 * 3


@pytest.mark.slow
def test_the_function_on_the_page_of_data_is_a_dataset(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import keras

    monkeypatch.syspath_prepend(in_folder)  # before the folders of other tests
    with np.load(MNIST) as mnist:
        train, test = ((mnist[f"x_{part}"], mnist[f"y_{part}"]) for part in ("train", "test"))
    monkeypatch.setattr(keras.datasets.mnist, "load_data", lambda path: (train, test))
    (text,) = [t for t in blocks(DOCS / "your-data.md", "python") if "class_names" in t]
    Path("mine.py").write_text(text)
    dataset = load_dataset("mine:load", 0.1, split="stratified")
    assert (dataset.classes, dataset.task.class_names) == (3, ("zero", "one", "two"))
    assert dataset.train_examples == (train[1][:3000] < 3).sum() - 200
    assert (
        dataset.note == "tf.data, trained batch by batch with Keras' fit, in its own batches of 100"
    )
    assert dataset.pipeline is not None
    first, second = (next(iter(dataset.pipeline.call().as_numpy_iterator())) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])  # of two calls
    pipeline = dataset.pipeline.call()
    first, second = (next(pipeline.as_numpy_iterator()) for _ in range(2))
    assert not np.array_equal(first[0], second[0])  # of two epochs


def test_the_arrays_of_a_regression_are_a_dataset(in_folder: Path) -> None:
    (text,) = [text for text in blocks(DOCS / "your-data.md", "python") if "diabetes" in text]
    exec(text, {})
    task = load_dataset("diabetes.npz", 0.1, split="random", task="regression").task
    assert (task.kind, task.outputs, 140 < task.mean < 160) == ("regression", 1, True)


@each_page()
def test_every_block_of_python_compiles(page: Path) -> None:
    for text in blocks(page, "python"):
        ast.parse(text)


def run_python(text: str, folder: Path) -> str:
    """What a script prints; in another process, as MLflow keeps what it has once opened here."""
    process = forks.Python(["-c", text], cwd=folder)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


@pytest.mark.slow
def test_the_call_from_python_runs(
    clouds: Path, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(clouds, in_folder)
    (text,) = blocks(README, "python")
    small = 'n_trials=1, epochs=1, dataset="clouds.npz", workers=1'
    small += ', baselines="none", report="none"'
    exec(text.replace("n_trials=50", small), {})
    best, accuracy, version = capsys.readouterr().out.split()[-3:]
    assert (0 < float(best) <= 1, 0 < float(accuracy) <= 1, version) == (True, True, "1")


@pytest.mark.slow
def test_the_registered_model_and_its_origin_are_loaded(
    finished: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "study"
    shutil.copytree(finished["folder"], folder)
    (use,), (origin,) = (blocks(DOCS / f"{page}.md", "python") for page in ("results", "trust"))
    shown = "print(probabilities.argmax(axis=1).tolist())"
    said = run_python(f"{use}\n{shown}\n{origin}", folder).splitlines()
    assert said[-2] == "[7, 2]"
    trial = finished["study"].best_trial
    number, rest = said[-1].split(" ", 1)
    tried, seed = rest.rsplit(" ", 1)
    assert (int(number), int(seed)) == (trial.number, trial.user_attrs["seed"])
    assert trial.params.items() <= json.loads(tried).items()


def test_every_block_of_python_is_run_but_those_for_clusters() -> None:
    """Here, in test_custom_model, in test_image_folder and in test_multilabel."""
    found = {page.stem: len(blocks(page, "python")) for page in PAGES}
    run = dict.fromkeys(("README", "your-model", "results", "trust"), 1)
    more = {"your-data": 8, "cluster": 2}
    assert {name: number for name, number in found.items() if number} == {**run, **more}
