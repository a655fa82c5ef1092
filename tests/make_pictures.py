#!/usr/bin/env python3
"""Makes everything in imgs/ anew: the demo picture, and with the tool itself the pictures that the README shows.

    python tests/make_pictures.py            # two minutes; needs what requirements.txt names
    python tests/make_pictures.py elsewhere  # into another folder
"""
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import bgoptimizer  # noqa: E402  (found through the line above, from any folder)
import make_demo  # noqa: E402
import scenes  # noqa: E402

HALF = 2  # full-size pixels per pixel of a JPEG, along each side
GAP = 8  # pixels between its panels

HARD_CASE = "full_object", 2  # family and seed of a picture that --auto warns about: nebula from edge to edge
VIGNETTED = "narrowband", 1  # the same of a picture with light in its corners, where dividing makes a difference
CORNER_LOSS = 0.65  # part of the light that the corners of that picture lose


def main(folder=make_demo.DEMO.parent):
    folder.mkdir(exist_ok=True)
    demo = folder / "demo.xisf"
    make_demo.main([str(demo)])
    with tempfile.TemporaryDirectory() as name:
        results = Path(name)
        run(demo, results, "--preview")
        keep_small(results / "demo_preview.png", folder / "preview.png")
        run(demo, results, "--preview", "--auto")
        keep_small(results / "demo_preview.png", folder / "preview_auto.png")
        run(demo, results, "-dq", "0.999", "--animate")  # with --auto the start is so good that little moves
        shutil.copy(results / "demo_optimization.gif", folder / "optimization.gif")
        run(demo, results, "--auto")
        keep_small(results / "demo_figures.png", folder / "figures.png")
        panels = [scenes.load(demo), scenes.load(results / "demo_bgSubtracted.xisf")]
        side_by_side(panels).save(folder / "before_after.jpg", quality=92)
        side_by_side(hard_case(results)).save(folder / "hard_case.jpg", quality=92)
        side_by_side(division(results)).save(folder / "divide.jpg", quality=92)
    for path in sorted(folder.iterdir()):
        print(f"{path.stat().st_size / 1e6:6.2f} MB  {path}")


def run(*words):
    """The command, with its pictures saved."""
    if bgoptimizer.main([*map(str, words), "--figures", "save", "--quiet"]):
        raise SystemExit("make_pictures.py: error: the tool failed; see above")


def keep_small(source, target):
    """The same PNG, packed as small as can be: the tool prefers to be quick."""
    Image.open(source).convert("RGB").save(target, optimize=True)


def hard_case(results):
    """A picture that --auto warns about, what comes out, and what should come out: (h, w, c) each."""
    scene = invent(*HARD_CASE)
    run(scenes.save(results / "hard.xisf", scene.image), results, "--auto")
    return [scene.image, scenes.load(results / "hard_bgSubtracted.xisf"), on_even_sky(scene)]


def division(results):
    """A vignetted picture, the same with its sky subtracted, and divided by it: (h, w, c) each."""
    scene = invent(*VIGNETTED)
    height, width, _ = scene.image.shape
    y, x = np.mgrid[-1:1:height * 1j, -1:1:width * 1j]
    light = 1 - CORNER_LOSS * (y**2 + x**2) / 2  # 1 in the middle
    vignetted = on_even_sky(scene) * light[..., None]
    path = scenes.save(results / "corners.xisf", vignetted.astype(np.float32))
    bowl = "--auto", "--smoothing", "1000"
    run(path, results, *bowl)
    run(path, results, *bowl, "--correction", "divide")
    return [vignetted, scenes.load(results / "corners_bgSubtracted.xisf"),
            scenes.load(results / "corners_bgDivided.xisf")]


def invent(family, seed):
    """A scene as large as the demo picture."""
    return scenes.make_scene(family, seed, make_demo.HEIGHT, make_demo.WIDTH)


def on_even_sky(scene):
    """What a perfect model leaves: the objects and the noise on the sky's median."""
    return scene.image - scene.sky + np.median(scene.sky, (0, 1))


def side_by_side(pictures):
    """Linear pictures (h, w, c) beside each other, all stretched for the eye like the first -> PIL.Image."""
    small = [np.stack([bgoptimizer.reduce_plane(plane, HALF, "mean") for plane in np.moveaxis(picture, -1, 0)], -1)
             for picture in pictures]
    stretch = bgoptimizer.display_stretch(small[0])
    white = np.full((len(small[0]), GAP, 3), 255, np.uint8)
    panels = []
    for linear in small:
        shown = np.nan_to_num(255 * stretch.apply(linear))
        panels += [white, shown.round().astype(np.uint8)]
    return Image.fromarray(np.concatenate(panels[1:], 1))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
