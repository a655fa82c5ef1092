"""How the tests run the tool: as a function and as a command, with values given by hand.

So what the tool would choose by itself has no part in a test, unless the test is about just that
(test_find_sky.py).
"""
import os
import subprocess
import sys
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
        timeout=120,
        **options,
    )


def imports_script(**more):
    """Return the surroundings of a process that can import the script, and has more variables."""
    return {**os.environ, "PYTHONPATH": str(SCRIPT.parent), **more}


def python(program, *arguments, timeout=60, env=None, **options):
    """Run a program that imports the script, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=env or imports_script(),
        **options,
    )


def refused(capsys):
    """Return what the command said on stderr, which must be one line of the agreed form."""
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if "warning:" not in line]
    assert len(lines) == 1, text
    assert lines[0].startswith("bgoptimizer: error: "), text
    assert "Traceback" not in text, text
    return lines[0]
