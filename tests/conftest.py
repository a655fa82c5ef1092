"""What pytest reads first: the surroundings of the tests, fixtures, a switch for the slow ones."""
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # no test opens a window
# As the script does, which here is imported after NumPy
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import pytest  # noqa: E402

from bgoptimizer import optimize  # noqa: E402
from runner import QUICK  # noqa: E402
from scenes import save, sloping_sky  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config, items):
    """Leave the slow tests out, unless --all, -m or a node id (file::test) asks for them."""
    by_node_id = any("::" in argument for argument in config.args)
    if config.getoption("--all") or config.option.markexpr or by_node_id:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to stand in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def sky(folder):
    """The path of a picture, sky.xisf, alone in the folder to stand in."""
    image, _ = sloping_sky()
    return save(folder / "sky.xisf", image)


@pytest.fixture(scope="session")
def fitted():
    """A picture, its sky, and what came of it.

    This is one fit for all tests that only look at the result.
    """
    image, sky = sloping_sky()
    return image, sky, optimize(image, QUICK)


@pytest.fixture(autouse=True)
def signals_are_heard():
    """Signals end the processes that tests start, and the tests themselves.

    Who starts the tests in the background or under nohup has them ignore signals.
    """
    heard = {
        "SIGINT": signal.default_int_handler,
        "SIGTERM": signal.SIG_DFL,
        "SIGHUP": signal.SIG_DFL,
    }
    before = {}
    for name, handler in heard.items():
        if hasattr(signal, name):
            number = getattr(signal, name)
            before[number] = signal.signal(number, handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
