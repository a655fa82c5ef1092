"""README.md holds what it promises: its own length, the table of flags, its pictures, its files."""
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import bgoptimizer

ROOT = Path(bgoptimizer.__file__).resolve().parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = README.splitlines()
SCRIPT = (ROOT / "bgoptimizer.py").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def requirements():
    """What requirements.txt asks for, a string each."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def pythons(text):
    """The versions of Python that pyproject.toml or the head of the script asks for."""
    return SpecifierSet(re.search(r'(?m)^(?:# )?requires-python = "([^"]+)"', text)[1])


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
    for path in re.findall(r"\]\((?!\s?https?:)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:tests|imgs|\.ci)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`(test_\w+\.py)`", README):
        assert (ROOT / "tests" / name).exists(), name


def test_uv_runs_the_demo_with_what_pip_installs():
    """The head of the script has the list in the form of PEP 723."""
    block = re.search(r"(?ms)^# /// script$\n(.*?)^# ///$", SCRIPT)[1]
    listed = re.findall(r"'([^']+)'", block)
    assert sorted(listed) == sorted(requirements())
    demo = re.search(r"<!-- command: demo -->\n```sh\n.* (bgoptimizer.py .*)\n```", README)[1]
    assert f"```sh\nuv run {demo}\n```" in README


def test_every_python_gets_its_tensorflow_or_is_told_which_one_has():
    for minor in range(8, 18):
        version = f"3.{minor}"
        chosen = []
        for text in requirements():
            requirement = Requirement(text)
            fits = requirement.marker is None or requirement.marker.evaluate(
                {"python_version": version})
            if requirement.name == "tensorflow" and fits:
                chosen.append(str(requirement.specifier))
        assert len(chosen) == 1, version
        assert (chosen[0] == "==0+needs.Python.3.14.or.older") == (minor >= 15), version
        assert pythons(PYPROJECT).contains(f"{version}.1") == (minor <= 14)
        assert pythons(SCRIPT).contains(f"{version}.1") == (minor <= 13)  # the newest tried


def test_every_picture_is_shown():
    for path in (ROOT / "imgs").iterdir():
        assert f"imgs/{path.name}" in README, path


@pytest.mark.parametrize("name", ["README.md", "bgoptimizer.py", "bgoptimizer_colab.ipynb"])
def test_nobody_is_told_to_install_what_is_somebody_elses(name):
    """The name bgoptimizer on the package index is not ours."""
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"install\b[^\n]*\sbgoptimizer(?![\w./])", text)
