from pathlib import Path

from conftest import ROOT

from search.config import settings
from search.config.options import flag
from search.config.settings import options

README = (ROOT / "README.md").read_text()


def test_every_option_and_its_default_stand_in_the_readme() -> None:
    defaults = settings.defaults()
    for name, option in options().items():
        shown = option.none if defaults[name] is None else defaults[name]
        assert f"| `{flag(name)}` | {shown} |" in README, flag(name)
        assert not option.env or f"`{option.env}`" in README


def test_every_module_has_its_line_in_the_file_tree() -> None:
    for module in Path(ROOT / "search").glob("*.py"):
        if module.name != "__init__.py":
            assert f"      {module.name} " in README, module.name


def test_no_placeholder_is_left() -> None:
    assert "@@" not in README
