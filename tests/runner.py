"""How the tests run the tool: as a function and as a command, with values given by hand.

So what the tool would choose by itself has no part in a test, unless the test is about just that
(test_find_sky.py).
"""
import gc
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import bgoptimizer
from bgoptimizer import Settings

SCRIPT = Path(bgoptimizer.__file__).resolve()
# A weak stretch, so that no sky is clipped, which is warned of.
QUICK = Settings(
    downscaling_factor=4,
    initializer="grid",
    smoothing=0.1,
    delinearization_quantile=0.999,
)
FAST = ["-dx", "4", "-i", "grid", "-e", "30", "--smoothing", "1", "-dq", "0.999"]
# Twice the input takes twice as long where time is in proportion to it, and a bit more than that in
# real programs; four times as long where time grows with the square
LINEAR = 3.5
# Some clocks advance by 16 ms. In seconds
TOO_SHORT_TO_COMPARE = 0.05
# What a run writes from sky.xisf
PAIR = ["sky_bgModel.xisf", "sky_bgSubtracted.xisf"]


def quick(**changes):
    """Return the quick settings, but for these changes."""
    return bgoptimizer.replace(QUICK, **changes)


def run(*arguments):
    """Run the command in this process, so that all tests import TensorFlow only once.

    Returns its exit code.
    """
    return bgoptimizer.main([str(argument) for argument in arguments])


def command(*arguments, **options):
    """Run the script in a process of its own."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        **options,
    )


def imports_script(**more):
    """Return the surroundings of a process that can import the script, and has more variables."""
    return {**os.environ, "PYTHONPATH": str(SCRIPT.parent), **more}


def python(program, *arguments, env=None, **options):
    """Run a program that imports the script, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        env=env or imports_script(),
        **options,
    )


def growth(work, tries=10):
    """Return how many times the processor time of `work(1)` twice the input, `work(2)`, takes.

    It is about 2 where time is in proportion to the input, and 4 where it grows with the square,
    on a slow machine and on a fast one. Other processes can only add to a time, so the least of a
    few counts; no more are taken than show that the growth is LINEAR. Garbage collection is off
    meanwhile: it goes through all that the tests before have left, and more often in `work(2)`.
    """
    least = {1: math.inf, 2: math.inf}
    work(1)  # what is loaded or made once is not counted
    gc.collect()
    gc.disable()
    try:
        for _ in range(tries):
            for size in least:
                started = time.process_time()
                work(size)
                least[size] = min(least[size], time.process_time() - started)
            ratio = least[2] / max(least[1], TOO_SHORT_TO_COMPARE)
            if ratio < LINEAR:
                break
    finally:
        gc.enable()
    return ratio


def refused(capsys):
    """Return what the command said on stderr, which must be one line of the agreed form."""
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if "warning:" not in line]
    assert len(lines) == 1, text
    assert lines[0].startswith("bgoptimizer: error: "), text
    assert "Traceback" not in text, text
    return lines[0]
