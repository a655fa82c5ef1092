"""README.md holds what it promises: its own length, the table of flags, its pictures, its files."""
import re
from pathlib import Path

import pytest

import bgoptimizer

ROOT = Path(bgoptimizer.__file__).resolve().parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = README.splitlines()


def flags():
    """The table of flags: {("-c", "--compress"): "off", ...}, the names and the default."""
    section = README.split("\n## Flags\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `-")]
    return {tuple(re.findall(r"`(-[^`]+)`", names)): default.strip() for names, default, *_ in rows}


def options():
    """The options of the parser in the same form; None where the help tells no default."""
    parser = bgoptimizer.build_parser()
    found = {}
    for action in parser._actions:
        if action.option_strings and "--help" not in action.option_strings:
            text = parser._get_formatter()._expand_help(action)
            default = re.search(r"\(default: ([^)]*)\)", text)
            found[tuple(action.option_strings)] = default and default[1]
    return found


def commands():
    """The lines that are pasted as a whole, and so are as long as they must be."""
    return re.findall(r"<!-- command: \w+ -->\n```sh\n(.*)\n```", README)


def test_it_can_be_read_in_one_sitting():
    assert len(LINES) <= 300
    assert [line for line in LINES if len(line) > 120 and line not in commands()] == []


def test_the_table_of_flags_is_that_of_the_parser():
    documented, known = flags(), options()
    assert set(documented) == set(known)
    for names, default in known.items():
        assert (default or "").startswith(documented[names]), names
        assert bool(default) == bool(documented[names]), names


def test_what_it_shows_and_names_is_there():
    for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:tests|imgs|\.ci)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`(test_\w+\.py)`", README):
        assert (ROOT / "tests" / name).exists(), name


def test_every_picture_is_shown():
    for path in (ROOT / "imgs").iterdir():
        assert f"imgs/{path.name}" in README, path


@pytest.mark.parametrize("name", ["README.md", "bgoptimizer.py", "bgoptimizer_colab.ipynb"])
def test_nobody_is_told_to_install_what_is_somebody_elses(name):
    """The name bgoptimizer on the package index is not ours."""
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"install\b[^\n]*\sbgoptimizer(?![\w./])", text)
