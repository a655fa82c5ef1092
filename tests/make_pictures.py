#!/usr/bin/env python3
"""Makes everything in imgs/ anew: the demo picture, and with the tool itself the pictures that the README shows.

    python tests/make_pictures.py            # a minute; needs what requirements.txt names
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

HALF = 2  # full-size pixels per pixel of before_after.jpg, along each side
GAP = 8  # pixels between before and after


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
        before_after(demo, results / "demo_bgSubtracted.xisf").save(folder / "before_after.jpg", quality=92)
    for path in sorted(folder.iterdir()):
        print(f"{path.stat().st_size / 1e6:6.2f} MB  {path}")


def run(*words):
    """The command, with its pictures saved."""
    if bgoptimizer.main([*map(str, words), "--figures", "save", "--quiet"]):
        raise SystemExit("make_pictures.py: error: the tool failed; see above")


def keep_small(source, target):
    """The same PNG, packed as small as can be: the tool prefers to be quick."""
    Image.open(source).convert("RGB").save(target, optimize=True)


def before_after(before, after):
    """Two XISF files side by side, both stretched for the eye like the first -> PIL.Image."""
    halves, stretch = [], None
    for path in (before, after):
        planes = bgoptimizer.read_xisf(path).planes
        linear = np.stack([bgoptimizer.reduce_plane(plane, HALF, "mean") for plane in planes], -1)
        stretch = stretch or bgoptimizer.display_stretch(linear)
        halves.append(np.nan_to_num(255 * stretch.apply(linear)).round().astype(np.uint8))
    return Image.fromarray(np.concatenate([halves[0], np.full((len(halves[0]), GAP, 3), 255, np.uint8), halves[1]], 1))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
