"""What pytest reads first: the surroundings of the tests, their fixtures, and the switch for the slow ones."""
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # no test opens a window
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as the script does, which here is imported after NumPy
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import pytest  # noqa: E402

from bgoptimizer import optimize  # noqa: E402
from runner import QUICK  # noqa: E402
from scenes import save, sloping_sky  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config, items):
    """Without --all the slow tests stay out, unless -m or a node id (file::test) asks for tests by itself."""
    if config.getoption("--all") or config.option.markexpr or any("::" in argument for argument in config.args):
        return
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("slow")])
    items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to stand in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def sky(folder):
    """The path of a picture, sky.xisf, alone in the folder to stand in."""
    return save(folder / "sky.xisf", sloping_sky()[0])


@pytest.fixture(scope="session")
def fitted():
    """A picture, its sky, and what came of it: one fit for all tests that only look at the result."""
    image, sky = sloping_sky()
    return image, sky, optimize(image, QUICK)


@pytest.fixture(autouse=True)
def signals_are_heard():
    """Who starts the tests in the background or under nohup has them ignore signals: not ours, and not those of the
    processes that tests start."""
    heard = {"SIGINT": signal.default_int_handler, "SIGTERM": signal.SIG_DFL, "SIGHUP": signal.SIG_DFL}
    numbers = {getattr(signal, name): handler for name, handler in heard.items() if hasattr(signal, name)}
    before = {number: signal.signal(number, handler) for number, handler in numbers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
