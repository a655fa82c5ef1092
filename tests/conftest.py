"""What the tests share: pictures whose sky is known, and files made of them."""
import os
import sys
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # no test opens a window
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as the script does, which here is imported after NumPy
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import numpy as np  # noqa: E402
import pytest  # noqa: E402

import bgoptimizer  # noqa: E402


def sloping_sky(height=96, width=144, channels=3, noise=0.0005, seed=1):
    """A simple picture and its sky, (h, w, c) each: a bent slope of its own per channel, noise, a few stars."""
    rng = np.random.default_rng(seed)
    y, x = (np.indices((height, width)) + 0.5) / max(height, width)
    slopes = ((0.04, 0.03), (-0.02, 0.04), (0.03, -0.03))[:channels]
    sky = np.stack([0.05 + 0.02 * k + a * x + b * y + 0.03 * (x - 0.4)**2 for k, (a, b) in enumerate(slopes)], -1)
    image = sky + rng.normal(0, noise, sky.shape)
    image[rng.integers(0, height, 40), rng.integers(0, width, 40)] += 0.4
    return image.astype(np.float32), sky


def save(path, image, source=None):
    """Write (h, w, c) floats as XISF; returns the path as text."""
    with open(path, "wb") as file:
        bgoptimizer.write_xisf(file, np.ascontiguousarray(np.moveaxis(image, -1, 0)), source)
    return str(path)


def load(path):
    """Read an XISF file -> (h, w, c)."""
    return np.moveaxis(bgoptimizer.read_xisf(str(path)).planes, 0, -1)


def to_planes(image):
    return np.ascontiguousarray(np.moveaxis(image, -1, 0))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to stand in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
