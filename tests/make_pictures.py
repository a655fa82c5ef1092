#!/usr/bin/env python3
"""Makes everything in imgs/ anew: the demo picture, and the pictures that the README shows.

The tool itself draws these.

    python tests/make_pictures.py            # two minutes; needs what requirements.txt names
    python tests/make_pictures.py elsewhere  # into another folder
"""
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import bgoptimizer  # noqa: E402  (found through the line above, from any folder)
import make_demo  # noqa: E402
import scenes  # noqa: E402

HALF = 2  # full-size pixels per pixel of a JPEG, along each side
GAP = 8  # pixels between its panels

HARD_CASE = "full_object", 2  # family and seed; --auto warns about it: nebula from edge to edge
VIGNETTED = "narrowband", 1  # the same; light in its corners, where dividing makes a difference
CORNER_LOSS = 0.65  # part of the light that the corners of that picture lose


def main(folder=Path(os.path.relpath(make_demo.DEMO.parent))):  # its name stands in the pictures
    folder.mkdir(exist_ok=True)
    demo = folder / "demo.xisf"
    make_demo.main([str(demo)])
    with tempfile.TemporaryDirectory() as name:
        results = Path(name)
        preview = results / "demo_preview.png"
        run(demo, results, "--preview")
        keep_small(preview, folder / "preview.png")
        window(demo, folder / "window.png")
        run(demo, results, "--preview", "--auto")
        keep_small(preview, folder / "preview_auto.png")
        # With --auto the start is so good that little moves.
        run(demo, results, "-dq", "0.999", "--animate")
        shutil.copy(results / "demo_optimization.gif", folder / "optimization.gif")
        run(demo, results, "--auto")
        keep_small(results / "demo_figures.png", folder / "figures.png")
        before = scenes.load(demo)
        after = scenes.load(results / "demo_bgSubtracted.xisf")
        side_by_side([before, after], folder / "before_after.jpg")
        side_by_side(hard_case(results), folder / "hard_case.jpg")
        side_by_side(division(results), folder / "divide.jpg")
    for path in sorted(folder.iterdir()):
        megabytes = path.stat().st_size / 1e6
        print(f"{megabytes:6.2f} MB  {path}")


def run(*words):
    """Run the command, with its pictures saved."""
    arguments = [str(word) for word in words]
    code = bgoptimizer.main([*arguments, "--figures", "save"])
    if code:
        raise SystemExit("make_pictures.py: error: the tool failed; see above")


def window(source, target):
    """Draw the preview window as soon as the sky is found, without a display."""
    task = bgoptimizer.Task(str(source), bgoptimizer._parse([str(source), "--preview"]))
    with bgoptimizer.drawing_style():
        figure = FigureCanvasAgg(Figure(bgoptimizer.WINDOW_SIZE)).figure
        picture = bgoptimizer.read_picture(source)
        opened = bgoptimizer.PreviewWindow(figure, task, picture, None)
        opened.sky, opened.said = bgoptimizer._quietly(lambda: opened.look(opened.choice))
        opened.refresh()
        figure.savefig(target)
    opened.pool.shutdown()
    keep_small(target, target)


def keep_small(source, target):
    """Write the same PNG, packed as small as can be: the tool prefers to be quick."""
    picture = Image.open(source).convert("RGB")
    picture.save(target, optimize=True)


def hard_case(results):
    """Return a picture that --auto warns about, what comes out, and what should: (h, w, c) each."""
    scene = invent(*HARD_CASE)
    path = scenes.save(results / "hard.xisf", scene.image)
    run(path, results, "--auto")
    subtracted = scenes.load(results / "hard_bgSubtracted.xisf")
    return [scene.image, subtracted, on_even_sky(scene)]


def division(results):
    """Return a vignetted picture, it with its sky subtracted, and divided by it: (h, w, c) each."""
    scene = invent(*VIGNETTED)
    height, width, _ = scene.image.shape
    y = np.linspace(-1, 1, height)[:, None]
    x = np.linspace(-1, 1, width)
    light = 1 - CORNER_LOSS * (y**2 + x**2) / 2  # (h, w), 1 in the middle
    vignetted = on_even_sky(scene) * light[..., None]
    path = scenes.save(results / "corners.xisf", vignetted.astype(np.float32))
    bowl = "--auto", "--smoothing", "1000"
    run(path, results, *bowl)
    run(path, results, *bowl, "--correction", "divide")
    subtracted = scenes.load(results / "corners_bgSubtracted.xisf")
    divided = scenes.load(results / "corners_bgDivided.xisf")
    return [vignetted, subtracted, divided]


def invent(family, seed):
    """Return a scene as large as the demo picture."""
    return scenes.make_scene(family, seed, make_demo.HEIGHT, make_demo.WIDTH)


def on_even_sky(scene):
    """Return what a perfect model leaves: the objects and the noise on the sky's median."""
    level = np.median(scene.sky, (0, 1))
    return scene.image - scene.sky + level


def reduced(picture):
    """Return a picture (h, w, c) at the size of a panel."""
    planes = np.moveaxis(picture, -1, 0)
    small = [bgoptimizer.reduce_plane(plane, HALF, "mean") for plane in planes]
    return np.stack(small, -1)


def side_by_side(pictures, path):
    """Save linear pictures (h, w, c) beside each other, all stretched like the first."""
    small = [reduced(picture) for picture in pictures]
    stretch = bgoptimizer.display_stretch(small[0])
    gap = np.full((len(small[0]), GAP, 3), 255, np.uint8)  # white
    panels = []
    for linear in small:
        shown = np.nan_to_num(255 * stretch.apply(linear))
        panels += [gap, shown.round().astype(np.uint8)]
    row = np.concatenate(panels[1:], 1)  # (h, w, 3)
    Image.fromarray(row).save(path, quality=92)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
