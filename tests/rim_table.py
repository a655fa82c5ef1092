"""The table of rims: which ones do no harm, by their size, sides, angle, and level.

    python tests/rim_table.py                    # four families, half an hour
    python tests/rim_table.py --families galaxy  # of `scenes.FAMILIES`

A rim is laid around a picture of 1000 x 1500 pixels: so many pixels on one to four sides, or what
is outside of a frame that is turned by so many degrees. It has a level (percent of the darkest
twentieth of the picture), its own noise, and a hard or soft edge. It does no harm if the sky inside
of it is found as well as without the rim: to HARMLESS, and with no other warning.

For the tests, a rim is found if three quarters of what it spoils are left out, and less than 1 % of
the rest of the frame is.
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Dict, List

import numpy as np
from scipy import ndimage

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import scenes  # noqa: E402  (found through the line above, from any folder)
from bgoptimizer import (  # noqa: E402
    Settings, find_rim, find_sky, frame_coordinates, prepare, reduce_plane)

SHAPE = 1000, 1500
WIDTHS = 1, 3, 6, 12, 24, 48, 80  # pixels
SIDES = ("top",), ("top", "right"), ("left", "right"), ("top", "left", "bottom", "right")
DEGREES = 0.5, 1, 3, 10, 20, 45
LEVELS = 0.02, 0.4, 0.8
FACTOR = 8
HARMLESS = 0.5
"""Percent of the sky's range, rms."""

SPOILED = 0.03
"""Part of the median: a block that a rim changes by more is spoiled."""


def straight_sides(width, sides):
    """How many pixels (h, w) lie inside of rims of this width on these sides; negative in them."""
    height, length = SHAPE
    y, x = np.indices(SHAPE) + 0.5
    from_edge = {"top": y, "left": x, "bottom": height - y, "right": length - x}
    return np.min([from_edge[side] for side in sides], axis=0) - width


def turned_frame(degrees):
    """How many pixels (h, w) lie inside of a frame that is turned; negative outside of it."""
    height, width = SHAPE
    y, x = np.indices(SHAPE) + 0.5
    y = y - height / 2
    x = x - width / 2
    angle = np.deg2rad(degrees)
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    return np.minimum(width / 2 - np.abs(along), height / 2 - np.abs(across))


def with_rim(image, depth, level, soft):
    """Lay a rim around a picture (h, w) -> the picture, and how much of it is inside, (h, w)."""
    inside = np.clip(1 + depth / 6, 0, 1) if soft else (depth >= 0).astype(float)
    dark = level * np.percentile(image[inside == 1], 5)
    rim = dark + np.random.default_rng(1).normal(0, 0.0005, image.shape)
    rimmed = inside * image + (1 - inside) * rim
    return np.maximum(rimmed, 1e-6).astype(np.float32), inside


def is_found(scene, depth, level, soft):
    """Whether a rim is found, and nothing but the rim."""
    image = scene.image[..., 0]
    rimmed, inside = with_rim(image, depth, level, soft)
    reduced = reduce_plane(rimmed, FACTOR)
    spoiled = reduce_plane(image, FACTOR) - reduced > SPOILED * np.median(image)
    if scene.family == "hills":
        spoiled &= ~hidden(scene)
    found = find_rim(reduced[..., None])
    beside = reduce_plane(inside + 1, FACTOR) < 2
    elsewhere = found & ~ndimage.binary_dilation(beside, iterations=4)
    all_of_it = found[spoiled].mean() > 0.75 if spoiled.any() else True
    return bool(all_of_it and elsewhere.mean() < 0.01)


def error_and_warning(scene, image, inside):
    """The error of the sky (rms in percent) where `inside` (h, w) is 1, and whether it is unsure.

    Args:
        image: (h, w) the scene's, in its rim.
    """
    settings = Settings(auto=True).resolved()
    prepared = prepare(image[None], settings)
    sky = find_sky(prepared, settings)
    found = sky.surface(frame_coordinates(*SHAPE))
    valid = scene.valid & (inside == 1)
    rms, _ = scenes.score(found, replace(scene, valid=valid))
    return rms, bool(sky.unsure)


def hidden(scene):
    """The blocks where hills stand, (h, w) bool: a rim there cannot be told from them."""
    dark = ndimage.binary_opening(scene.object_mask, iterations=FACTOR)[::FACTOR, ::FACTOR]
    bottom = np.zeros_like(dark)
    bottom[-1] = True
    hills = ndimage.binary_propagation(bottom & dark, mask=dark)
    return ndimage.binary_dilation(hills, iterations=3)


def main(argv=None):
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=scenes.FAMILIES, metavar="FAMILY",
                        default=["galaxy", "moon", "city_glows", "hills"])
    arguments = parser.parse_args(argv)
    kinds = {}
    for width in WIDTHS:
        for sides in SIDES:
            kinds[f"{width} px", f"{len(sides)} sides"] = straight_sides(width, sides)
    for degrees in DEGREES:
        kinds[f"{degrees} degrees", "turned"] = turned_frame(degrees)
    right: Dict[str, List[bool]] = {}
    for family in arguments.families:
        scene = scenes.make_scene(family, 0, *SHAPE, channels=1)
        least, usual = error_and_warning(scene, scene.image[..., 0], np.ones(SHAPE))
        for (size, sides), depth in kinds.items():
            for level in LEVELS:
                for soft in (False, True):
                    rimmed, inside = with_rim(scene.image[..., 0], depth, level, soft)
                    error, unsure = error_and_warning(scene, rimmed, inside)
                    harmless = error < least + HARMLESS and unsure == usual
                    if not harmless:
                        print(f"{family}, {size}, {sides}, {level:.0%}, soft: {soft}: "
                              f"{least:.2f} -> {error:.2f}, unsure: {unsure}", flush=True)
                    edge = "soft" if soft else "hard"
                    for key in (family, size, sides, f"level {level:.0%}", edge, "all"):
                        right.setdefault(key, []).append(harmless)
    for key, trials in right.items():
        print(f"{key:12} {np.mean(trials):6.1%} of {len(trials)}")


if __name__ == "__main__":
    main()
