"""The truth bench: how far the background models are from skies that are known.

    python tests/truth.py                                 # every family, 4 seeds, reduced size
    python tests/truth.py --families galaxy dust --seeds 8 --columns auto
    python tests/truth.py --families new                  # of `scenes.NEW_FAMILIES`; old: the rest
    python tests/truth.py --full --check                  # 2000 x 3000; exit 1 if not kept
    python tests/truth.py --pictures /tmp/look -- -N 49   # flags after -- go to the tool
    python tests/truth.py --inject                        # known gradients put into real pictures
    python tests/truth.py --rivals                        # other tools, where they are installed

Each seed is another picture of its family. Unless --channels, --border or --portrait say otherwise,
the seeds take mono and RGB, both orientations, with and without border in turns.

The columns of the table, all in percent but the last two:
    mean, worst   rms of model - truth, of the sky's range (see `scenes.score`)
    p99.9         99.9th percentile of its absolute value
    kept          light of the extended objects that is left (see `scenes.object_score`)
    ring          rms of model - truth just outside the objects
    warned        pictures the tool warned about
    s             seconds a picture, the tool alone

With --inject a gradient G is added to a real picture P, whose sky nobody knows. A tool that models
what is smooth finds all of it: model(P + G) - model(P) = G. Its rms without a constant is given in
percent of G's range. `kept` is then the structure of the picture that is not in model(P), and
`depth` the range of model(P) in units of the pixel noise.

With --rivals the columns are those of other tools (see `RIVALS`), and of --columns if it is given.
Nothing requires them: one that is not installed is left out. `warned` are the pictures that a rival
gave up on, which count as if nothing had been done.
"""
import argparse
import importlib.util
import logging
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import fields
from pathlib import Path
from typing import Dict, List, NamedTuple

import numpy as np
from scipy import ndimage

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import scenes  # noqa: E402  (found through the line above, from any folder)

# Families by one name.
GROUPS = {
    "old": scenes.OLD_FAMILIES,
    "new": scenes.NEW_FAMILIES,
}

# Columns of the table: a name and the flags behind it. Flags after -- are laid over them.
COLUMNS = {
    "plain": ["-i", "grid"],
    "--auto": ["--auto"],
}

# Promised mean rms (percent) at 2000 x 3000; no single picture above twice that.
BOUNDS = {
    "plain": {
        "galaxy": 9,
        "nebula": 6,
        "city_glows": 3.5,
        "airglow": 7.5,
    },
    "--auto": {
        "galaxy": 1.5,
        "nebula": 1.5,
        "city_glows": 1.5,
        "airglow": 1.5,
        "moon": 1.5,
        "stars": 1.5,
        "dust": 4,
        "hills": 6,
        "flat": 33,
        "short_stack": 5,
        "milky_way": 7,
        "large_galaxy": 4,
        "clipped": 1.5,
        "mosaic": 5,
        "edge_nebula": 3,
        "amp_glow": 5,
        "cluster": 1,
        "vignetting": 1.5,
        "star_halos": 1.5,
        "narrowband": 1.5,
        "pedestal": 1.5,
        "plane_galaxy": 1.5,
    },
}

GOOD = 1.5
"""rms in percent; with less a picture needs no warning."""

BAD = 5
"""rms in percent; with more each picture needs one."""

TRUE_SKY = 2
"""rms in percent; with less an object's light must be kept."""

HONEST = 0.85
"""Share of a picture's pixels whose error must be within twice the uncertainty that was told."""

LIGHT_KEPT = 90
"""Percent of an object's light that must be left in the picture."""


class Row(NamedTuple):
    """What is measured of one model of one picture; numbers in percent."""
    rms: float
    p999: float
    kept: float  # NaN where there is nothing to keep
    ring: float  # NaN where there is no ring
    seconds: float
    warnings: List[str]
    nothing: float  # rms of a model that is a constant: of doing nothing
    within: float  # share of the pixels whose error is within twice the tool's own uncertainty


# ------------------------------------------------------------------------------------------------
# Running the tool
# ------------------------------------------------------------------------------------------------

def settings_from(optimizer, flags):
    """Flags of the tool's command line -> its Settings; exits with its message about them."""
    parser = optimizer.build_parser()
    options = parser.parse_args(["picture.xisf"] + flags)
    values = {}
    for field in fields(optimizer.Settings):
        if hasattr(options, field.name):
            values[field.name] = getattr(options, field.name)
    try:
        return optimizer.Settings(**values)
    except ValueError as error:
        parser.error(str(error))


class Warnings(logging.Handler):
    """Collects what the tool warns about while it is entered."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())

    def __enter__(self):
        logging.getLogger("bgoptimizer").addHandler(self)
        return self

    def __exit__(self, *_):
        logging.getLogger("bgoptimizer").removeHandler(self)


def model_sky(image, flags, tool):
    """Run the tool on a picture (h, w, c).

    Returns its model and the uncertainty of that, (h, w, c), seconds, and texts of warnings.
    """
    optimizer = importlib.import_module(tool)
    settings = settings_from(optimizer, flags)
    with Warnings() as warnings:
        start = time.perf_counter()
        result = optimizer.optimize(image.copy(), settings)
        seconds = time.perf_counter() - start
    return result.model, result.uncertainty, seconds, warnings.texts


def limit_threads(count):
    """Have the processes started from now on use `count` threads each."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS",
                 "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        os.environ[name] = str(count)


def each(work, items, arguments, note):
    """Call work(item, arguments) for all items, and note(item, result) as the results come."""
    if arguments.jobs == 1 and not arguments.threads:
        for item in items:
            note(item, work(item, arguments))
        return

    if arguments.threads:
        limit_threads(arguments.threads)
    context = multiprocessing.get_context("spawn")  # TensorFlow does not survive a fork
    with ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        waiting = {}
        for item in items:
            waiting[pool.submit(work, item, arguments)] = item
        for done in as_completed(waiting):
            note(waiting[done], done.result())


# ------------------------------------------------------------------------------------------------
# Rivals
# ------------------------------------------------------------------------------------------------

def photutils_sky(planes, boxes, exclude):
    """The sky that photutils finds in planes (c, h, w), NaN where missing -> (c, h, w).

    As in its user guide: sources are what is 2 sigma over a plane's clipped median in 10 connected
    pixels, and 10 pixels around it. Background2D does the rest by its defaults: each box's mode
    (SExtractorBackground) clipped at 3 sigma, and a median filter of 3 x 3 boxes. `boxes` go along
    the longer side. One with more than `exclude` percent masked is left out; by the default, 10,
    a dense star field is left without any.
    """
    from photutils.background import Background2D
    from photutils.segmentation import detect_sources, detect_threshold
    from photutils.utils import circular_footprint

    box = -(-max(planes.shape) // boxes)  # rounded up: the last box is not a sliver
    skies = []
    for plane in planes:
        missing = np.isnan(plane)
        threshold = detect_threshold(plane, 2.0, mask=missing)
        found = detect_sources(plane, threshold, 10, mask=missing)
        sources = None
        if found is not None:
            sources = found.make_source_mask(footprint=circular_footprint(10))
        background = Background2D(plane, box, mask=sources, coverage_mask=missing,
                                  exclude_percentile=exclude)
        skies.append(background.background)
    return np.stack(skies)


def seiza_sky(planes, **settings):
    """The sky that seiza fits to planes (c, h, w), NaN where missing -> (c, h, w)."""
    import seiza

    missing = np.isnan(planes).any(axis=0)
    image = np.moveaxis(planes, 0, -1)
    image = np.ascontiguousarray(image.squeeze())  # (h, w, 3) or (h, w)
    fitted = seiza.fit_background(image, mask=missing, **settings)
    sky = np.atleast_3d(fitted.render())
    return np.moveaxis(sky, -1, 0)


# A column's name, the package it needs, and how it is called. Where a package's documentation
# leaves a choice, it is the one that does best on these scenes.
RIVALS = {
    "photutils": ("photutils", photutils_sky, {"boxes": 16, "exclude": 80}),
    # "automatic" is what its README shows: the degree, up to this one, that predicts samples best.
    "seiza": ("seiza", seiza_sky, {"model": "automatic", "degree": 4}),
    "seiza-rbf": ("seiza", seiza_sky, {"model": "radial_basis"}),
}


def rival_sky(scene, column):
    """Run a rival on a scene -> as `model_sky`; it is told what is missing, as a user would.

    A rim that is not 0 is for each tool to find.
    """
    _, find, settings = RIVALS[column]
    is_zero = (scene.image == 0).all(axis=2)
    missing = is_zero & ~scene.valid
    image = np.where(missing[..., None], np.float32(np.nan), scene.image)
    planes = scenes.to_planes(image)
    gave_up = []
    start = time.perf_counter()
    try:
        sky = find(planes, **settings)
    except (ValueError, RuntimeError) as error:  # too few samples or boxes
        sky = np.zeros_like(planes)
        gave_up.append(str(error))
    seconds = time.perf_counter() - start
    unknown = np.full(scene.sky.shape, np.nan)
    return np.moveaxis(sky, 0, -1), unknown, seconds, gave_up


def rival_columns():
    """The columns of the installed rivals; says which are left out."""
    packages = sorted({package for package, _, _ in RIVALS.values()})
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    columns = [column for column in RIVALS if RIVALS[column][0] not in missing]
    if missing:
        what = "left out, not installed" if columns else "no rival is installed"
        tell("%s: to see them, python -m pip install %s" % (what, " ".join(missing)))
    return columns


# ------------------------------------------------------------------------------------------------
# Scenes with a known sky
# ------------------------------------------------------------------------------------------------

def plan(arguments):
    """The pictures to make -> list of keyword arguments of `scenes.make_scene`."""
    pictures = []
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    for family in arguments.families:
        for seed in seeds:
            # Four seeds in a row meet each pair of (mono, border), (mono, portrait) and
            # (border, portrait) once.
            is_odd = seed % 2 == 1
            is_late = seed % 4 >= 2
            portrait = arguments.portrait or is_late
            border = arguments.border or is_odd != is_late
            in_turn = 1 if is_odd else 3
            height, width = sorted(arguments.size, reverse=portrait)
            for channels in arguments.channels or [in_turn]:
                pictures.append(dict(
                    family=family,
                    seed=seed,
                    height=height,
                    width=width,
                    channels=channels,
                    border=border,
                ))
    return pictures


def measure(picture, arguments):
    """Make one scene and model it once for each column -> {column: Row}."""
    scene = scenes.make_scene(**picture)
    nothing, _ = scenes.score(np.zeros_like(scene.sky), scene)
    rows, models = {}, {}
    for column, flags in arguments.flags.items():
        if column in RIVALS:
            model, uncertainty, seconds, warnings = rival_sky(scene, column)
        else:
            model, uncertainty, seconds, warnings = model_sky(
                scene.image, flags, arguments.tool)
        rms, p999 = scenes.score(model, scene)
        kept, ring = scenes.object_score(model, scene)
        error = (model - scene.sky)[scene.valid]  # (n, c)
        error = np.abs(error - np.median(error, axis=0))  # the level comes back as an offset
        within = (error < 2 * uncertainty[scene.valid]).mean()
        rows[column] = Row(
            rms=rms,
            p999=p999,
            kept=kept,
            ring=ring,
            seconds=seconds,
            warnings=warnings,
            nothing=nothing,
            within=within,
        )
        models[column] = model
    if arguments.pictures:
        name = "{family}_{seed}_{channels}ch.png".format(**picture)
        path = Path(arguments.pictures) / name
        draw(scene, models, rows, path)
    return rows


def draw(scene, models, rows, path):
    """Write a PNG: the scene, its sky, each column's model and error; full color is 10 % error."""
    from matplotlib.figure import Figure

    longer = max(scene.valid.shape)
    step = max(1, longer // 750)
    valid = scene.valid[::step, ::step]
    image = scene.image[::step, ::step]
    sky = scene.sky[::step, ::step]
    low = np.percentile(image[valid], 0.5, axis=0)  # (c,)
    middle = np.median(image[valid], axis=0)  # (c,)
    unit = scenes.score_unit(scene)  # (c,)

    def show(axis, picture, title):
        above = (picture - low) / (middle - low)  # 1 at the median
        bright = np.arcsinh(above / 1.5)
        bright = bright / np.arcsinh(8)
        bright = np.clip(bright, 0, 1)
        axis.imshow(bright.squeeze(), cmap="gray")
        axis.set_title(title)

    columns = 1 + len(models)
    figure = Figure(figsize=(4 * columns, 6))
    axes = figure.subplots(2, columns)  # (2, columns)
    show(axes[0, 0], image, "image")
    show(axes[1, 0], sky, "true sky")
    for k, (name, model) in enumerate(models.items(), 1):
        model = model[::step, ::step]
        row = rows[name]
        title = "%s: rms %.2f %%, p99.9 %.2f %%"
        show(axes[0, k], model, title % (name, row.rms, row.p999))
        error = (model - sky) / unit  # (h, w, c)
        error = error - np.median(error[valid], axis=0)
        error = error.mean(axis=2)
        error = np.where(valid, error, np.nan)
        lower = axes[1, k]
        lower.imshow(error, cmap="RdBu_r", vmin=-0.1, vmax=0.1)
        lower.set_title("%s: model - truth" % name)
    for axis in axes.ravel():
        axis.set_axis_off()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(str(path), dpi=80)


def tell(line):
    """Say at once how far the bench is."""
    print(line, file=sys.stderr, flush=True)


def scene_name(picture):
    """A scene in words, for the lines on stderr."""
    name = "{family} {seed}, {height} x {width} x {channels}".format(**picture)
    return name + ", border" if picture["border"] else name


def percent(value, digits=1):
    """A number with some decimals, or - for NaN."""
    return "-" if np.isnan(value) else "%.*f" % (digits, value)


def row_text(column, row):
    """One result in words, for the lines on stderr."""
    kept = percent(row.kept)
    ring = percent(row.ring, 2)
    text = "%s %.2f %% (p99.9 %.2f" % (column, row.rms, row.p999)
    text += ", kept %s, ring %s, within 2 sigma %.0f %%" % (kept, ring, 100 * row.within)
    text += ", %.1f s)" % row.seconds
    if row.warnings:
        text += ", warned"
    return text


def numbers_of(rows, name):
    """One field of all rows (n,)."""
    return np.array([getattr(row, name) for row in rows], float)


def mean_of(rows, name):
    """The mean of one field of those rows where it is a number, or NaN."""
    values = numbers_of(rows, name)
    values = values[~np.isnan(values)]
    if values.size == 0:
        return np.nan
    return values.mean()


def warned_of(rows):
    """Which rows have warnings (n,) bool."""
    return np.array([bool(row.warnings) for row in rows])


def cell(rows, bound=np.inf):
    """One column's part of a line of the table; a * stands behind what is over the bound."""
    mean = mean_of(rows, "rms")
    worst = numbers_of(rows, "rms").max()
    p999 = mean_of(rows, "p999")
    kept = mean_of(rows, "kept")
    ring = mean_of(rows, "ring")
    warned = warned_of(rows).sum()
    seconds = mean_of(rows, "seconds")
    mean_star = "*" if mean > bound else " "
    worst_star = "*" if worst > 2 * bound else " "
    text = " | %6.2f%s" % (mean, mean_star)
    text += "%6.2f%s" % (worst, worst_star)
    text += "%6.2f" % p999
    text += " %6s %6s" % (percent(kept), percent(ring, 2))
    text += " %4d/%-3d" % (warned, len(rows))
    return text + " %5.1f" % seconds


CELL_HEAD = " |   mean  worst  p99.9   kept   ring   warned     s"


def table(families, columns, results):
    """The table as text; results: {(family, column): [Row]}."""
    names = "%-18s" % ""
    head = "%-18s" % "family"
    for column in columns:
        title = " | " + column
        names += title.ljust(len(CELL_HEAD))
        head += CELL_HEAD
    lines = [names, head, "-" * len(head)]
    for family in families:
        line = "%-18s" % family
        for column in columns:
            bound = bound_of(family, column)
            line += cell(results[family, column], bound)
        lines.append(line)

    last_line = "%-18s" % "all"
    summaries = []
    for column in columns:
        rows = all_rows(families, column, results)
        last_line += cell(rows)
        summaries += summary(column, rows)
    lines.append(last_line)
    lines.append("in % of the sky's range (flat: of the pixel noise); "
                 "* = over the bound promised at 2000 x 3000")
    return "\n".join(lines + summaries)


def bound_of(family, column):
    """The mean rms promised; infinite where nothing is."""
    promises = BOUNDS.get(column, {})
    return promises.get(family, np.inf)


def all_rows(families, column, results):
    """The rows of one column, of all families together."""
    rows = []
    for family in families:
        rows += results[family, column]
    return rows


def summary(column, rows):
    """Lines about all pictures of a column: its median, and what must not be."""
    rms = numbers_of(rows, "rms")
    kept = numbers_of(rows, "kept")
    warned = warned_of(rows)
    middle = np.median(rms)
    worse = rms > 1.000001 * numbers_of(rows, "nothing")  # a flat sky is as good, but for rounding
    lines = [
        "%s: median %.2f %%, worst %.2f %%" % (column, middle, rms.max()),
        "  worse than doing nothing: %d" % worse.sum(),
    ]
    for title, which in (
        ("over %g %%" % BAD, rms > BAD),
        ("under %g %%" % GOOD, rms < GOOD),
    ):
        both = which & warned
        counts = which.sum(), both.sum()
        lines.append("  " + title + ": %d, of which warned %d" % counts)
    honest = numbers_of(rows, "within") >= HONEST
    lines.append("  error within 2 sigma in %.0f %% of the pixels: %d of %d"
                 % (100 * HONEST, honest.sum(), len(rows)))
    true_sky = rms < TRUE_SKY
    eaten = true_sky & (kept < LIGHT_KEPT)  # NaN is not below anything
    limits = TRUE_SKY, LIGHT_KEPT
    title = "  under %g %% with less than %g %% of the light kept: " % limits
    lines.append(title + "%d" % eaten.sum())
    return lines


def broken_promises(results):
    """Sentences about the bounds not kept."""
    sentences = []
    for (family, column), rows in results.items():
        bound = bound_of(family, column)
        rms = numbers_of(rows, "rms")
        mean = rms.mean()
        worst = rms.max()
        if mean > bound or worst > 2 * bound:
            text = "%s, %s: " % (family, column)
            text += "mean %.2f %%, worst %.2f %%" % (mean, worst)
            text += ", promised %g and %g" % (bound, 2 * bound)
            sentences.append(text)
    return sentences


def run_scenes(arguments):
    """The bench on scenes -> sentences about promises not kept."""
    results = {}
    for family in arguments.families:
        for column in arguments.flags:
            results[family, column] = []

    def note(picture, rows):
        told = []
        for column, row in rows.items():
            results[picture["family"], column].append(row)
            told.append(row_text(column, row))
        tell(scene_name(picture) + ": " + "; ".join(told))

    each(measure, plan(arguments), arguments, note)
    print(table(arguments.families, arguments.flags, results))
    return broken_promises(results)


# ------------------------------------------------------------------------------------------------
# Known gradients in real pictures
# ------------------------------------------------------------------------------------------------

GRADIENT_SHARE = 0.5
"""Height of a gradient, as a share of the picture's sky level over its pedestal."""

PEDESTAL_PERCENTILE = 0.1
"""The lowest samples stand for the pedestal, but not the very lowest: those are bad pixels."""

MISSING_PIXELS = 16
"""Connected zeros of at least that many are a hole; fewer are dark samples."""

BLOCK = 8
"""Pixels; side of the blocks whose medians show a picture's structure."""


class Injection(NamedTuple):
    """What is measured of one model of one real picture."""
    errors: Dict[str, float]  # of each gradient, in percent
    kept: float  # percent of the picture's structure that is not in model(P)
    depth: float  # range of model(P) over the pixel noise
    warnings: List[str]  # of the run on P
    seconds: float  # of the run on P


def gradient_shapes(height, width):
    """Known gradients {name: (h, w)}, each from 0 to 1 over the frame."""
    longer = max(height, width)
    right = width / longer
    bottom = height / longer
    x = (np.arange(width) + 0.5) / longer  # (w,)
    y = (np.arange(height) + 0.5) / longer  # (h,)
    y = y[:, None]  # (h, 1)

    def distance(to_x, to_y):
        return np.hypot(x - to_x, y - to_y)  # (h, w)

    def bell(r):
        return np.exp(-r ** 2 / 2)

    def cone(r):
        return np.exp(-np.hypot(r, 0.3))

    near_town = distance(-0.05, 0.7 * bottom)
    far_town = distance(0.8 * right, -0.1)
    moon = distance(1.25 * right, -0.2 * bottom)
    corner = distance(right, bottom)
    shapes = {
        "plane": 0.9 * x + 0.5 * y,
        "glows": bell(near_town / 0.35) + 0.7 * cone(far_town / 0.3),
        "moon": cone(moon / 0.35),
        "corner": bell(corner / 0.15),
    }
    for name, shape in shapes.items():
        low = shape.min()
        high = shape.max()
        shapes[name] = (shape - low) / (high - low)
    return shapes


def present_samples(image):
    """(h, w, c) -> (h, w, c) bool, False where a sample is not finite or in a region of zeros."""
    present = np.isfinite(image)
    for k in range(image.shape[2]):
        zeros = image[..., k] == 0
        regions, _ = ndimage.label(zeros)  # (h, w), 0 outside the zeros
        sizes = np.bincount(regions.ravel())
        is_hole = sizes >= MISSING_PIXELS
        is_hole[0] = False
        present[..., k] &= ~is_hole[regions]
    return present


def pixel_noise(plane, present):
    """Noise of a pixel, from the differences of next but one neighbors, which share less of it."""
    both = present[:, 2:] & present[:, :-2]
    differences = plane[:, 2:] - plane[:, :-2]
    differences = differences[both]
    deviations = differences - np.median(differences)
    spread = np.median(np.abs(deviations))
    # 1.4826 median deviations are a standard deviation, and a difference has twice the variance.
    return 1.4826 * spread / np.sqrt(2)


def block_medians(plane, present):
    """(h, w) -> (h // BLOCK, w // BLOCK) medians of what is present; NaN in empty blocks."""
    height, width = plane.shape
    rows = height // BLOCK
    columns = width // BLOCK
    holey = np.where(present, plane, np.nan)
    holey = holey[:rows * BLOCK, :columns * BLOCK]
    blocks = holey.reshape(rows, BLOCK, columns, BLOCK)
    blocks = blocks.swapaxes(1, 2)
    blocks = blocks.reshape(rows, columns, -1)
    medians = np.full((rows, columns), np.nan)
    some = np.isfinite(blocks).any(axis=2)
    medians[some] = np.nanmedian(blocks[some], axis=1)
    return medians


def structure(blocks):
    """Standard deviation (a number) of blocks (h, w) around the plane that fits them best."""
    usable = np.isfinite(blocks)
    y, x = np.nonzero(usable)
    ones = np.ones(len(x))
    terms = np.stack([ones, x, y], axis=1)  # (n, 3)
    values = blocks[usable]
    coefficients = np.linalg.lstsq(terms, values, rcond=None)[0]
    plane = terms @ coefficients
    return np.std(values - plane)


def range_of(values):
    """From the 1st to the 99th percentile."""
    low, high = np.percentile(values, (1, 99))
    return high - low


def gradient_heights(image, present):
    """Heights (c,) that gradients get in a picture (h, w, c)."""
    heights = []
    for k in range(image.shape[2]):
        samples = image[..., k][present[..., k]]
        sky = np.median(samples)
        pedestal = np.percentile(samples, PEDESTAL_PERCENTILE)
        heights.append(GRADIENT_SHARE * (sky - pedestal))
    return np.array(heights)


def injection_error(found, gradient, present):
    """rms of found - gradient without a constant, in percent of the gradient's range; (h, w, c)."""
    squares = []
    for k in range(gradient.shape[2]):
        here = present[..., k]
        truth = gradient[..., k][here]
        error = found[..., k][here] - truth
        error = error - np.median(error)
        relative = error / range_of(truth)
        squares.append(np.mean(relative ** 2))
    return 100 * np.sqrt(np.mean(squares))


def structure_kept(image, model, present):
    """Structure of a picture that is not in its model (percent), and that model's depth."""
    kept, depth = [], []
    for k in range(image.shape[2]):
        here = present[..., k]
        picture_blocks = block_medians(image[..., k], here)
        model_blocks = block_medians(model[..., k], here)
        lost = structure(model_blocks) / structure(picture_blocks)
        kept.append(100 * (1 - lost))
        noise = pixel_noise(image[..., k], here)
        modeled = model[..., k][here]
        depth.append(range_of(modeled) / noise)
    return np.mean(kept), np.mean(depth)


def inject(path, arguments):
    """Put the gradients into one picture and look for them again -> {column: Injection}."""
    image = scenes.load(path)
    image = np.asarray(image, np.float32)  # (h, w, c)
    height, width, _ = image.shape
    present = present_samples(image)
    heights = gradient_heights(image, present)  # (c,)
    results = {}
    for column, flags in arguments.flags.items():
        before, _, seconds, warnings = model_sky(image, flags, arguments.tool)
        errors = {}
        for name, shape in gradient_shapes(height, width).items():
            gradient = shape[..., None] * heights  # (h, w, c)
            brighter = np.where(present, image + gradient, image)
            brighter = brighter.astype(np.float32)
            after, *_ = model_sky(brighter, flags, arguments.tool)
            errors[name] = injection_error(after - before, gradient, present)
        kept, depth = structure_kept(image, before, present)
        results[column] = Injection(
            errors=errors,
            kept=kept,
            depth=depth,
            warnings=warnings,
            seconds=seconds,
        )
    return results


def injection_text(result):
    """One picture's line of the table."""
    errors = list(result.errors.values())
    numbers = errors + [np.mean(errors)]
    numbers += [result.kept, result.depth]
    numbers.append(result.seconds)
    line = ""
    for number in numbers:
        line += "%9.2f" % number
    if result.warnings:
        line += "  warned"
    return line


def run_injections(arguments):
    """The bench on real pictures; prints one table a column."""
    paths = [Path(path) for path in arguments.inject]
    if not paths:
        paths = sorted(scenes.REAL.glob("*.xisf"))
    results = {}

    def note(path, found):
        results[path] = found
        for column, result in found.items():
            tell("%s, %s:" % (path.name, column) + injection_text(result))

    each(inject, paths, arguments, note)
    names = list(gradient_shapes(2, 3))
    names += ["mean", "kept", "depth", "s"]
    for column in arguments.flags:
        head = "%-24s" % column
        for name in names:
            head += "%9s" % name
        print(head)
        for path in paths:
            line = "%-24s" % path.stem
            print(line + injection_text(results[path][column]))


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------

def size(text):
    """`2000x3000` -> (2000, 3000)."""
    height, width = text.lower().split("x")
    return int(height), int(width)


def build_parser():
    """The bench's own flags."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--families", nargs="+", choices=scenes.FAMILIES + tuple(GROUPS), default=["old", "new"],
        metavar="FAMILY", help="old, new (both), or of: " + ", ".join(scenes.FAMILIES))
    add("--seeds", type=int, default=4, help="pictures of each family (4)")
    add("--first-seed", type=int, default=0, help="the first seed (0)")
    add("--size", type=size, default=(500, 750), metavar="HxW", help="picture size (500x750)")
    add("--full", action="store_true", help="the same as --size 2000x3000")
    add("--channels", type=int, nargs="+", choices=(1, 3),
        help="these for every seed, not in turns")
    add("--border", action="store_true", help="a registration border on every picture")
    add("--portrait", action="store_true", help="every picture upright")
    add("--columns", nargs="+", metavar="COLUMN",
        help="columns of the table, of: plain, auto (both; with --rivals: none)")
    add("--rivals", action="store_true", help="columns of other tools: " + ", ".join(RIVALS))
    add("--jobs", type=int, default=1,
        help="pictures at a time, each in a process of its own (1)")
    add("--threads", type=int, metavar="N",
        help="threads of NumPy and TensorFlow in each process (as many as they like)")
    add("--pictures", metavar="FOLDER",
        help="write a PNG of each scene with its models and errors")
    add("--check", action="store_true", help="exit 1 if a bound is not kept")
    add("--inject", nargs="*", metavar="FILE",
        help="put known gradients into these XISF pictures instead (all of %s)" % scenes.REAL)
    # A stand-in with the tool's interface
    add("--tool", default="bgoptimizer", help=argparse.SUPPRESS)
    return parser


def main(argv=None):
    """Run the bench; 0, or 1 when --check finds a promise not kept."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    for_tool = argv[cut + 1:]
    parser = build_parser()
    arguments = parser.parse_args(argv[:cut])
    families = []
    for name in arguments.families:
        families += GROUPS.get(name, [name])
    arguments.families = families
    if arguments.full:
        arguments.size = (2000, 3000)

    optimizer = importlib.import_module(arguments.tool)
    arguments.flags = {}  # {column: flags of the tool}
    for name in arguments.columns or ([] if arguments.rivals else COLUMNS):
        name = "--auto" if name == "auto" else name
        if name not in COLUMNS:
            parser.error("there are the columns plain and auto, not %s" % name)
        arguments.flags[name] = COLUMNS[name] + for_tool
        settings_from(optimizer, arguments.flags[name])  # what is wrong with them is said now

    if arguments.rivals:
        if arguments.inject is not None:
            parser.error("--rivals needs scenes, not --inject")
        rivals = rival_columns()
        if not rivals:
            return 1
        arguments.flags.update(dict.fromkeys(rivals, []))  # our flags are not theirs

    if arguments.inject is not None:
        run_injections(arguments)
        return 0
    broken = run_scenes(arguments)
    if broken:
        print("not kept:", *broken, sep="\n  ")
    return 1 if arguments.check and broken else 0


if __name__ == "__main__":
    sys.exit(main())
