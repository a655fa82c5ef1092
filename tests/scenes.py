"""Pictures for the tests: synthetic linear astrophotos with a known sky, and files of them.

A background model is only right or wrong against a known sky: a fit with a lower loss can be the
falser one (it has dug into the galaxy). So every scene here is made of three parts that are kept
apart until the end,

    image = pedestal + sky + light of the objects + noise    (0 in the registration border: missing)

(dark clouds take light away: theirs is negative), and the test or bench compares a model with
`pedestal + sky` alone.

    scene = make_scene("galaxy", seed=3, height=400, width=600, channels=3, border=True)
    rms, p999 = score(model, scene)          # both in percent
    kept, ring = object_score(model, scene)  # both in percent
    reference = make_reference(scene)        # another picture of the same region
    image, sky = sloping_sky()               # where a bent slope, noise and a few stars will do
    path = save("sky.xisf", image)

Lengths inside this file are fractions of the longer side, angles are radians, brightnesses are
fractions of the scene's sky level, so a scene of 400 x 600 pixels is the one of 2000 x 3000 seen
small. Only what belongs to the pixel stays as it is: the noise of one pixel and the size of a star
(1.5-2.5 pixels FWHM). One seed gives the same sky and objects in mono and in color; mono is the
mean of the colors.
"""
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

import bgoptimizer

OLD_FAMILIES = (
    "galaxy", "nebula", "city_glows", "airglow", "dust", "moon", "hills", "stars", "flat",
    "big_nebula", "full_object", "short_stack", "milky_way", "large_galaxy", "clipped", "mosaic",
    "edge_nebula", "amp_glow", "cluster", "vignetting", "star_halos", "narrowband", "pedestal",
    "plane_galaxy",
)

NEW_FAMILIES = (
    "edge_glow", "dark_clouds", "tilted_steps", "globular", "comet", "banding", "small_galaxies",
    "inclined_galaxy", "three_panels", "h_alpha_edge", "ultrawide", "supernova_remnant",
    "planetary_nebula", "corner_star", "near_moon", "crowded", "rim",
)

FAMILIES = OLD_FAMILIES + NEW_FAMILIES


@dataclass
class Scene:
    """One picture and what is true about it."""
    image: np.ndarray  # (h, w, c) float32, linear, in [0, 1]; exactly 0 in the border = missing
    sky: np.ndarray  # (h, w, c) float64, the true background with the pedestal, everywhere
    valid: np.ndarray  # (h, w) bool, True inside the border, and inside a rim that is not 0
    object_mask: np.ndarray  # (h, w) bool, True where objects change over half the pixel noise
    light: np.ndarray  # (h, w, c) float32, extended objects' part of the image: no stars, no noise;
    # negative where dust takes the sky's light away
    noise: np.ndarray  # (c,) float64, standard deviation of a pixel of typical sky
    family: str
    seed: int


def make_scene(family, seed=0, height=400, width=600, channels=3, border=False):
    """Make one scene of a family; a seed (an integer from 0 on) varies all that can differ in it.

    `border` adds the zeros that registration leaves at 1-3 % of some sides, with noisier partial
    coverage inside. Raises ValueError for an unknown family, and for a number of channels other
    than 1 and 3.
    """
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError("unknown family %r; there are: %s" % (family, known))
    if channels not in (1, 3):
        raise ValueError("a scene has 1 or 3 channels, not %r" % (channels,))
    canvas = _painted(family, seed, height, width)
    return canvas.finish(channels, border)


def _painted(family, seed, height, width):
    """The canvas (a _Canvas) with a family's sky and objects on it."""
    canvas = _Canvas(family, seed, height, width)
    paint = globals()["_" + family]
    paint(canvas)
    return canvas


# ------------------------------------------------------------------------------------------------
# How good a model is
# ------------------------------------------------------------------------------------------------

OBJECT_SHARE = 0.002
"""Of the picture. What became of less extended light than that is not asked."""

BACKGROUND_SHARE = 0.01
"""Of the picture. With less background a constant cannot be told from an object."""

RING = 0.04
"""Width of the ring around objects, in units of the longer side."""


def score_unit(scene):
    """What an error is compared with (c,): the sky's range, or the noise where there is none."""
    if scene.family == "flat":
        return scene.noise
    seen = scene.sky[scene.valid]  # (valid pixels, c)
    low = np.percentile(seen, 1, axis=0)
    high = np.percentile(seen, 99, axis=0)
    return high - low


def score(model, scene):
    """Error of a model (h, w, c) -> (rms, 99.9th percentile of the absolute error), in percent.

    Per channel over the valid pixels: model - truth, less its median (an offset is the pedestal's
    affair, and the tool fixes it by the median too), in units of that channel's true range, p99 -
    p1 of the truth. Then the root mean square over channels, and the percentile over all of them
    together. A weakly lit channel so counts as much as a strong one. For the family "flat", whose
    range is next to nothing, the unit is the pixel noise.
    """
    errors = []
    for k, unit in enumerate(score_unit(scene)):
        truth = scene.sky[..., k]
        truth = truth[scene.valid]
        found = np.asarray(model[..., k], np.float64)
        error = found[scene.valid] - truth
        error = error - np.median(error)
        percent = 100 / unit
        errors.append(error * percent)
    errors = np.abs(errors)  # (c, valid pixels)
    rms = np.sqrt(np.mean(errors ** 2))
    p999 = np.percentile(errors, 99.9)
    return float(rms), float(p999)


def object_score(model, scene):
    """What a model does to the extended objects -> (light kept, ring error), in percent, or NaN.

    An object's pixels are those where its light is over half the pixel noise. The light kept is
    100 % less the share of their light that the model has taken for sky; over 100 % it has dug a
    hole. What a dark cloud takes away counts as its light: none is kept if the model follows it
    down. The ring error is the rms of model - truth within RING of them, in units of the sky's
    range. For both, the median of model - truth over the pixels without objects is taken off. NaN
    where there is next to no extended light, or next to no pixel without.
    """
    found = np.asarray(model, np.float64)
    error = found - scene.sky  # (h, w, c)
    background = scene.valid & ~scene.object_mask  # (h, w)
    bright = np.abs(scene.light) > 0.5 * scene.noise
    core = bright & scene.valid[..., None]  # (h, w, c)
    touched = core.any(axis=2)  # (h, w)
    present = scene.valid.sum()
    too_little_object = touched.sum() < OBJECT_SHARE * present
    too_little_background = background.sum() < BACKGROUND_SHARE * present
    if too_little_object or too_little_background:
        return np.nan, np.nan

    constant = np.median(error[background], axis=0)
    error = error - constant
    light = scene.light[core]
    there = np.abs(light).sum(dtype=np.float64)
    followed = error[core] * np.sign(light)
    taken = followed.sum()
    kept = 100 * (1 - taken / there)

    distance = ndimage.distance_transform_edt(~touched)  # (h, w) pixels
    reach = RING * max(touched.shape)
    near = distance <= reach
    ring = near & ~touched & scene.valid
    if not ring.any():
        return kept, np.nan
    relative = error[ring] / score_unit(scene)
    rms = np.sqrt(np.mean(relative ** 2))
    return kept, 100 * rms


def sloping_sky(height=96, width=144, channels=3, noise=0.0005, seed=1):
    """A simple picture and its sky, (h, w, c) each: a bent slope a channel, noise, a few stars."""
    rng = np.random.default_rng(seed)
    centers = np.indices((height, width)) + 0.5
    y, x = centers / max(height, width)
    slopes_x = 0.04, -0.02, 0.03
    slopes_y = 0.03, 0.04, -0.03
    bend = 0.03 * (x - 0.4) ** 2
    planes = []
    for k in range(channels):
        level = 0.05 + 0.02 * k
        along_x = slopes_x[k] * x
        along_y = slopes_y[k] * y
        plane = level + along_x + along_y
        planes.append(plane + bend)
    sky = np.stack(planes, axis=-1)
    image = sky + rng.normal(0, noise, sky.shape)
    rows = rng.integers(0, height, 40)
    columns = rng.integers(0, width, 40)
    image[rows, columns] += 0.4
    return image.astype(np.float32), sky


# ------------------------------------------------------------------------------------------------
# References
# ------------------------------------------------------------------------------------------------

CELL = 1 / 130
"""Side of the cells on which the tool looks for the sky, in units of the longer side."""

MOST_PIXELS = 1.5
"""Of a reference along a side, for each of the scene's; a finer one covers less than the frame."""


@dataclass
class Reference:
    """Another picture of a scene's region, and where both lie in the sky."""
    image: np.ndarray  # (h, w, c) float32, in [0, 1]
    header: object  # astropy's fits.Header of its plate solution; image[0, 0] is FITS pixel 1, 1
    scene_header: object  # the scene's


def make_reference(scene, seed=0, channels=3, degrees=17.0, mirrored=None, scale=None,
                   seeing=None, covers=None, gradient=0.2, changed=0.1, gamma=0.9,
                   distorted=False):
    """Make a picture of a scene's region as another telescope saw it on another night.

    It has a gradient of its own in another direction, its own noise and response to colors, and
    is saturated earlier or later. It sees the sky without the scene's hills and vignetting. What
    the scene takes for sky, as the Milky Way behind dark clouds, is not in it. Beyond the frame
    it shows the field mirrored: what is there is nobody's concern.

    Args:
        degrees: how far it is turned against the scene.
        mirrored: whether its parity is the other one.
        scale: size of its pixels, in the scene's (0.3 to 4).
        seeing: full width at half maximum of its stars, in CELLs (1 to 6).
        covers: its sides, in the scene's (0.7 to 1.6), but see MOST_PIXELS.
        gradient: range of its own, in that of the scene's sky.
        changed: share of the frame in which it shows other things, or none.
        gamma: of its values, 1 for a linear picture.
        distorted: its plate solution has SIP terms.

    `seed` decides on what is None, and on the rest.
    """
    rng = np.random.default_rng([seed, scene.seed, zlib.crc32(scene.family.encode())])
    drawn = rng.random(4)
    if mirrored is None:
        mirrored = drawn[0] < 0.5
    if scale is None:
        scale = 0.3 * (4 / 0.3) ** drawn[1]
    if seeing is None:
        seeing = 1 + 5 * drawn[2]
    if covers is None:
        covers = 0.7 * (1.6 / 0.7) ** drawn[3]

    # Where it lies
    height, width = scene.valid.shape
    longer = max(height, width)
    pixels = min(covers / scale, MOST_PIXELS)
    shape = max(round(pixels * height), 8), max(round(pixels * width), 8)
    field = rng.uniform(0.5, 4)  # degrees along the longer side
    pixel = field / longer
    place = np.array([rng.uniform(0, 360), rng.uniform(-60, 60)])
    aside = field * rng.uniform(-0.08, 0.08, 2)
    aside[0] /= np.cos(np.deg2rad(place[1]))
    angle = rng.uniform(0, 2 * np.pi)
    turned = angle + np.deg2rad(degrees)
    ours = _plate_solution(scene.valid.shape, place, pixel, angle)
    theirs = _plate_solution(shape, place + aside, scale * pixel, turned, mirrored)
    if distorted:
        _distort(theirs, shape, rng)
    x, y = _pixels_there(ours, theirs, shape)

    # The light of the objects
    canvas = _painted(scene.family, scene.seed, height, width)
    _, light = canvas.objects(scene.noise.mean(), 3)  # (h, w, 3)
    light = _other_things(light, changed, rng)
    through = rng.uniform(0.6, 1.5, 3)
    spilled = rng.uniform(0, 0.1, (3, 3))
    response = np.diag(through) + spilled
    if channels == 1:
        response = response.mean(axis=0, keepdims=True)
    light = light @ response.T  # (h, w, c)
    cells = seeing / 2.355
    sigma = cells * CELL * longer  # pixels
    box = scale / np.sqrt(12)  # the mean over its pixel
    sigma = np.hypot(sigma, box)
    seen = []
    for k in range(channels):
        blurred = ndimage.gaussian_filter(light[..., k], sigma, mode="mirror", truncate=3)
        seen.append(ndimage.map_coordinates(blurred, (y, x), order=1, mode="mirror"))
    seen = np.stack(seen, axis=-1)  # (rows, columns, c) of the reference, as all below

    # Its own sky, noise, and camera
    noise = scene.noise.mean() * rng.uniform(0.3, 1.5)
    level = rng.uniform(0.01, 0.04)
    level = max(level, 6 * noise - seen.min())  # nothing ends below 0, dark clouds neither
    height_there = gradient * score_unit(scene).mean()
    slopes = height_there * rng.uniform(0.8, 1.2, channels)
    sky = _another_slope(scene, x, y, rng)
    sky = level + sky[..., None] * slopes
    grain = rng.standard_normal(seen.shape, np.float32)
    image = seen + sky
    image = image + noise * grain
    full = rng.uniform(0.2, 1)  # where it is saturated, as a part of the scene's full scale
    image = np.clip(image / full, 1e-6, 1)
    image = image ** gamma
    return Reference(
        image=image.astype(np.float32),
        header=theirs.to_header(relax=True),
        scene_header=ours.to_header(),
    )


def _pixels_there(ours, theirs, shape):
    """Where a reference's pixels lie in the scene -> columns x and rows y from 0, (h, w) each."""
    rows, columns = np.indices(shape)
    rows = rows.ravel()
    columns = columns.ravel()
    longitude, latitude = theirs.all_pix2world(columns, rows, 0)
    x, y = ours.all_world2pix(longitude, latitude, 0)
    return x.reshape(shape), y.reshape(shape)


def _plate_solution(shape, place, pixel, angle, mirrored=False):
    """A tangential projection (astropy's WCS) around a place; degrees, and `angle` in radians."""
    from astropy.wcs import WCS

    height, width = shape
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[-cos, sin], [sin, cos]])  # the sky from inside: east is left of north
    if mirrored:
        turn[:, 0] *= -1
    solution = WCS(naxis=2)
    solution.wcs.ctype = "RA---TAN", "DEC--TAN"
    solution.wcs.crval = place
    solution.wcs.crpix = (width + 1) / 2, (height + 1) / 2
    solution.wcs.cd = pixel * turn
    solution.wcs.set()
    return solution


def _distort(solution, shape, rng):
    """Give a plate solution SIP terms of the second order, some thousandths of the frame."""
    from astropy.wcs import Sip

    strength = 0.01 / max(shape)
    along, across = np.zeros((2, 3, 3))  # of u^p v^q
    for p, q in (2, 0), (1, 1), (0, 2):
        along[p, q] = rng.normal(0, strength)
        across[p, q] = rng.normal(0, strength)
    solution.sip = Sip(along, across, None, None, solution.wcs.crpix)
    solution.wcs.ctype = "RA---TAN-SIP", "DEC--TAN-SIP"
    solution.wcs.set()


def _other_things(light, changed, rng):
    """Light (h, w, c) with patches over a share of the frame: half show other things, half none."""
    height, width, _ = light.shape
    coarse = rng.standard_normal((30, 30))
    zooms = height / 30, width / 30
    patches = ndimage.zoom(coarse, zooms, order=3, grid_mode=True, mode="nearest")
    half = changed / 2
    low, high = np.quantile(patches, (half, 1 - half))
    shift = round(0.07 * max(height, width))
    elsewhere = np.roll(light, shift, axis=(0, 1))
    has_moved = patches < low
    is_gone = patches > high
    light = np.where(has_moved[..., None], elsewhere, light)
    light[is_gone] = 0
    return light


def _another_slope(scene, x, y, rng):
    """A bent slope from 0 to 1 at pixels (h, w) of a scene, 60 to 140 degrees off its sky's."""
    gray = scene.sky.mean(axis=2)
    down, right = np.gradient(gray)
    angle = np.arctan2(down.mean(), right.mean())
    angle = angle + rng.choice((-1, 1)) * rng.uniform(1, 2.5)
    cos, sin = np.cos(angle), np.sin(angle)
    along = x * cos + y * sin
    along = along - along.min()
    along = along / along.max()
    bend = rng.uniform(-0.3, 0.3)
    return along + bend * along * (1 - along)


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------

def _real_pictures():
    """The folder that BGOPTIMIZER_REAL names, or else shared/real beside a folder above this."""
    named = os.environ.get("BGOPTIMIZER_REAL")
    if named:
        return Path(named)
    here = Path(__file__).resolve()
    for folder in here.parents:
        beside = folder / "shared" / "real"
        if beside.is_dir():
            return beside
    return here.parent / "shared" / "real"  # none: the name says so, and nothing is there


REAL = _real_pictures()
"""Files of cameras and of PixInsight. They are no part of the project; where they are not, the
tests of them are skipped."""


def to_planes(image):
    """(h, w, c), as the tests have pictures -> (c, h, w), as the stages take them."""
    planes = np.moveaxis(image, -1, 0)
    return np.ascontiguousarray(planes)


def save(path, image):
    """Write (h, w, c) floats as XISF; returns the path as text."""
    with open(path, "wb") as file:
        bgoptimizer.write_xisf(file, to_planes(image))
    return str(path)


def load(path):
    """Read an XISF file -> (h, w, c)."""
    picture = bgoptimizer.read_picture(str(path))
    return np.moveaxis(picture.planes, 0, -1)


# ------------------------------------------------------------------------------------------------
# The canvas
# ------------------------------------------------------------------------------------------------

NEUTRAL = np.ones(3)
MIDDLE = 0, 0

FRACTAL_SIZE = 1536
"""Samples along a fractal's side. It is fixed, so that a seed has one texture at every scale."""

FRACTAL_CROP = 1152
"""Samples along the frame's longer side. The rest is cut off: an FFT's edges wrap around."""

STARS_AT_ONCE = 50000
"""Drawn together; more would take gigabytes."""

RED = 1.9, 0.55, 0.55
"""Hydrogen's light, relative to the mean of the colors."""

TEAL = 0.4, 1.25, 1.35
"""The light of doubly ionized oxygen."""

REDDENING = 0.8, 1.0, 1.3
"""Optical depth of dust, relative to that in green light."""

OLD_STARS = 1.2, 1.0, 0.75
YOUNG_STARS = 0.85, 1.0, 1.1
DUST = 1.1, 1.0, 0.9


def _color(rng, around, spread):
    """A color (3,) near `around`, each channel off by up to `spread` (a fraction)."""
    factors = rng.uniform(1 - spread, 1 + spread, 3)
    return np.asarray(around) * factors


def _turn(x, y, angle, point):
    """Coordinates of (x, y) from a point along and across `angle`."""
    from_x, from_y = point
    dx = x - from_x
    dy = y - from_y
    cos = np.cos(angle)
    sin = np.sin(angle)
    along = dx * cos + dy * sin
    across = dy * cos - dx * sin
    return along, across


def _gaussian(r):
    """A bell (h, w) at a distance in standard deviations."""
    return np.exp(-r ** 2 / 2)


def _exponential(r, blunt):
    """exp(-r) without a cusp: air, or an optic, has scattered it away within `blunt`."""
    blunted = np.sqrt(r ** 2 + blunt ** 2)
    return np.exp(-blunted)


def _sersic(r, n, steep):
    """Sersic's profile of index `n`, 1 at r = 1 and exp(steep) in the middle, where it is blunt."""
    blunt = np.sqrt(r ** 2 + 0.005 ** 2)
    return np.exp(steep * (1 - blunt ** (1 / n)))


def _king(r, core, tidal):
    """King's profile of a globular cluster (1962): 1 in the middle, 0 beyond its tidal radius."""
    def falling(radius):
        return 1 / np.sqrt(1 + (radius / core) ** 2)

    end = falling(tidal)
    profile = _above(falling(r), end) ** 2
    return profile / (1 - end) ** 2


def _with_peak(light, peak):
    """Light (h, w) scaled so that its brightest 1 % has `peak`."""
    brightest = np.quantile(light, 0.99)
    return light * (peak / brightest)


def _above(field, level):
    """What a field (h, w) has over a level, or 0."""
    return np.clip(field - level, 0, None)


def _seen(color, channels):
    """A color (3,) as a camera of 1 or 3 channels sees it -> (c,)."""
    if channels == 3:
        return np.asarray(color)
    return np.asarray([np.mean(color)])


class _Canvas:
    """Sky and object light of a scene being made, each as (h, w) maps times a color (3,).

    x (1, w) and y (h, 1) are pixel centers, origin in the frame's center, in units of the longer
    side; the frame ends at +-half_x and +-half_y. Separate random streams for the plan, the
    textures, the stars, the pixels and the border keep the plan the same at every size.
    """

    def __init__(self, family, seed, height, width):
        self.family, self.seed = family, seed
        self.shape = height, width
        stable = zlib.crc32(family.encode())
        streams = []
        for stream in range(5):
            streams.append(np.random.default_rng([stable, seed, stream]))
        self.rng, self.texture_rng, self.star_rng = streams[:3]
        self.pixel_rng, self.border_rng = streams[3:]
        self.uniform = self.rng.uniform

        self.longer = max(height, width)
        columns = np.arange(width) + 0.5
        columns = columns - width / 2
        rows = np.arange(height) + 0.5
        rows = rows - height / 2
        self.x = (columns / self.longer)[None, :]
        self.y = (rows / self.longer)[:, None]
        self.half_x = width / 2 / self.longer
        self.half_y = height / 2 / self.longer

        # Of the sky over the pedestal, as a part of full scale
        self.level = self.log_uniform(0.01, 0.1)
        pedestal = self.uniform(0.005, 0.02)
        self.pedestal = pedestal * self.uniform(0.95, 1.05, 3)
        self.sky_color = _color(self.rng, NEUTRAL, 0.25)
        if self.chance(0.25):  # a few short exposures
            noise_fraction = 0.04, 0.10
        else:  # a deep stack
            noise_fraction = 0.01, 0.04
        # Noise of a pixel, as a part of the typical sky
        self.noise_fraction = self.uniform(*noise_fraction)
        # Part of the sky noise's variance that light does not change
        self.read_share = self.uniform(0.1, 0.5)
        # (h, w) or None: dims sky and objects, not the pedestal
        self.vignette = None
        # [((h, w) map, (3,) color)]; star_parts are cores of stars, which are not extended light
        self.sky_parts = []
        self.light_parts = []
        self.star_parts = []
        # ((h, w) coverage, (h, w) brightness, (3,) color) or None
        self.hill = None
        # At 400 x 600 pixels
        self.star_count = self.log_uniform(100, 900)
        # (h, w) relative chance of a star, or None: even
        self.star_density = None
        self.halo_count = self.rng.integers(0, 4)
        # Of the frames in the picture where it is large, in radians; None: a little at random
        self.turn = None
        # Pixel noises from 0 to the darkest sky, in a picture clipped at 0; None: not clipped
        self.headroom = None
        # (h, w) exposures on a pixel, 1 = as many as the noise is for, 0 = missing; None: 1
        self.exposures = None
        # Standard deviation of the lines' offsets, in pixel noises; None: no banding
        self.banding = None
        # ((h, w) 1 in the picture and 0 in the rim, level and noise of the rim as parts of the
        # picture's dark end's), or None
        self.rim = None

    # -- random numbers of the plan, beside self.uniform(low, high)

    def log_uniform(self, low, high):
        """A number between two; each factor is as likely as any other."""
        low = np.log(low)
        high = np.log(high)
        return np.exp(self.uniform(low, high))

    def chance(self, probability):
        """True with a probability."""
        return self.rng.random() < probability

    def sign(self):
        """-1 or 1."""
        return self.rng.choice((-1, 1))

    # -- maps (h, w) over the frame

    def turned(self, angle, point=MIDDLE):
        """Coordinates (h, w) from a point along and across `angle`."""
        return _turn(self.x, self.y, angle, point)

    def distance(self, point, angle=0.0, ratio=1.0):
        """Elliptical distance from a point; `ratio` <= 1 shortens the axis across `angle`."""
        along, across = self.turned(angle, point)
        return np.hypot(along, across / ratio)

    def random_distance(self, point, flattest):
        """The same at a random angle, with a ratio from `flattest` to 1."""
        angle = self.uniform(0, np.pi)
        ratio = self.uniform(flattest, 1)
        return self.distance(point, angle, ratio)

    def place(self, spread):
        """A random point in the middle `spread` (0-1) of the frame."""
        u, v = self.uniform(-spread, spread, 2)
        return u * self.half_x, v * self.half_y

    def from_edge(self, side):
        """Distance (h, w) from one of four edges, and position along it, -1 to 1 (h, w)."""
        if side < 2:
            across, half, along, reach = self.x, self.half_x, self.y, self.half_y
        else:
            across, half, along, reach = self.y, self.half_y, self.x, self.half_x
        toward = 1 if side % 2 else -1
        inward = half - toward * across
        return np.broadcast_arrays(inward, along / reach)

    def at_edge(self, outside):
        """A random point on the frame's edge, moved out by `outside` times the half frame."""
        angle = self.uniform(0, 2 * np.pi)
        u, v = np.cos(angle), np.sin(angle)
        longer = max(abs(u), abs(v))
        reach = (1 + outside) / longer
        x = u * reach * self.half_x
        y = v * reach * self.half_y
        return x, y

    def random_band(self):
        """A line through the frame's middle part -> (distance from it (h, w), angle, offset)."""
        angle = self.uniform(0, np.pi)
        offset = self.uniform(-0.15, 0.15)
        _, across = self.turned(angle)
        return across - offset, angle, offset

    def blob(self, point, width, soft=2.0):
        """A smooth cloud (h, w): 1 at its top, half that `width` across; a Gaussian if soft = 2."""
        radius = width / 2
        r = self.random_distance(point, 0.5) / radius
        return np.exp(-np.log(2) * r ** soft)

    def fractal(self, slope, stretch=1.0):
        """A random texture with power ~ frequency^-slope; mean 0, standard deviation 1."""
        n = FRACTAL_SIZE
        fy = np.fft.fftfreq(n)[:, None]
        fx = np.fft.rfftfreq(n)[None, :]
        frequency = np.hypot(fy * stretch, fx)  # (n, n // 2 + 1)
        frequency[0, 0] = np.inf  # no mean
        white = self.texture_rng.standard_normal((n, n))
        power = -slope / 2  # of the amplitude
        spectrum = np.fft.rfft2(white) * frequency ** power
        texture = np.fft.irfft2(spectrum, (n, n))
        texture = texture.astype(np.float32)

        rows = (self.y + 0.5) * (FRACTAL_CROP - 1)
        columns = (self.x + 0.5) * (FRACTAL_CROP - 1)
        places = np.broadcast_arrays(rows, columns)
        out = ndimage.map_coordinates(texture, places, order=1)
        return (out - out.mean()) / out.std()

    # -- sky

    def brighten(self, shape, amount, spread=0.4):
        """Add `shape` (h, w), scaled to 0..1 over the frame, times `amount`, in its own color."""
        low = shape.min()
        high = shape.max()
        scaled = (shape - low) / (high - low)
        color = _color(self.rng, self.sky_color, spread)
        self.sky_parts.append((scaled, amount * color))

    def tilt(self, low=0.2, high=1.0, curvature=0.25):
        """A tilted plane, a little bent, as most skies are; `low` to `high` sky levels strong."""
        angle, bend_angle = self.uniform(0, 2 * np.pi, 2)
        plane, _ = self.turned(angle)
        bend, _ = self.turned(bend_angle)
        curve = self.uniform(-curvature, curvature)
        curve = curve * bend ** 2 * 2
        amount = self.uniform(low, high)
        self.brighten(plane + curve, amount)

    def city_glow(self, low=0.2, high=0.8):
        """The glow of a town beyond a random edge: a blunt exponential or a Gaussian."""
        outside = self.uniform(-0.05, 0.25)
        town = self.at_edge(outside)
        r = self.random_distance(town, 0.5)
        r = r / self.uniform(0.2, 0.5)
        if self.chance(0.5):
            glow = _exponential(r, 0.3)
        else:
            glow = _gaussian(r)
        amount = self.uniform(low, high)
        self.brighten(glow, amount)

    def dim_corners(self, low, high):
        """What flat fielding has left of the vignetting: corners darker by `low` to `high`."""
        center = self.place(0.15)
        corner = np.hypot(self.half_x, self.half_y)
        r = self.distance(center) / corner
        depth = self.uniform(low, high)
        power = self.uniform(1, 1.6)
        self.vignette = 1 - depth * (r ** 2) ** power

    def gradient(self):
        """The sky so far, over its even level (h, w), in units of the level, mean of the colors."""
        return sum(shape * color.mean() for shape, color in self.sky_parts)

    def span(self):
        """From the darkest to the brightest of that."""
        return np.ptp(self.gradient())

    # -- objects

    def shine(self, light, color, spread=None):
        """Add object light (h, w), in units of the sky level, in a color or one near it."""
        light = np.asarray(light, np.float32)
        color = np.asarray(color, np.float64)
        if spread is not None:
            color = _color(self.rng, color, spread)
        self.light_parts.append((light, color))

    def random_galaxy(self, within, width, brightness):
        """A galaxy in the middle `within` of the frame; a width and a brightness from ranges."""
        center = self.place(within)
        self.galaxy(
            center,
            width=self.uniform(*width),
            brightness=self.uniform(*brightness),
        )

    def galaxy(self, center, width, brightness):
        """A spiral or an elliptical, `width` across where it has `brightness`, fainter beyond."""
        rng = self.rng
        angle = self.uniform(0, np.pi)
        ratio = self.uniform(0.3, 0.95)
        warm = _color(rng, OLD_STARS, 0.1)
        blue = _color(rng, YOUNG_STARS, 0.1)
        if self.chance(0.35):
            radius = width / 2
            r = self.distance(center, angle, ratio) / radius
            n = self.uniform(1.5, 3)
            steep = self.uniform(4.5, 6.0)
            light = brightness * _sersic(r, n, steep)
            self.shine(light, warm)
        else:
            self.spiral(center, width, brightness, angle, ratio, warm, blue)

    def spiral(self, center, width, brightness, angle, ratio, warm, blue):
        """A spiral galaxy: a disk with arms and clumps in `blue`, a bulge in `warm`."""
        radius = width / 2
        r = self.distance(center, angle, ratio) / radius
        lengths = self.uniform(3.0, 4.5)  # scale lengths of the disk out to r = 1
        disk = brightness * np.exp(lengths * (1 - r))

        along, across = self.turned(angle, center)
        theta = np.arctan2(across / ratio, along)
        pitch = self.uniform(0.25, 0.6)
        winding = np.log(r + 0.05) * 2
        winding = winding / np.tan(pitch)
        handedness = self.sign()
        phase = theta * 2 - winding * handedness
        outside_bulge = np.clip(r / 0.25, 0, 1)  # no arms and no clumps in the bulge
        contrast = self.uniform(0.2, 0.6)
        contrast = contrast * outside_bulge
        wobble = 0.5 * self.fractal(2.5)
        arms = 1 + contrast * np.cos(phase + wobble)
        uneven = 0.35 * outside_bulge
        uneven = uneven * self.fractal(2.5)
        clumps = np.exp(uneven - 0.06)
        self.shine(disk * arms * clumps, blue)

        peak = self.uniform(20, 150)
        length = self.uniform(0.05, 0.1)
        blunt = np.sqrt(r ** 2 + 0.01 ** 2)
        core = np.exp(-blunt / length)
        self.shine(brightness * peak * core, warm)

    def nebula(self, coverage, brightness, sharpness=0.15):
        """An irregular nebula over `coverage` of the frame; its brightest 1 % has `brightness`."""
        spread = 0.5 * (1 - coverage)
        center = self.place(spread)
        r = self.random_distance(center, 0.6)
        ragged = self.uniform(0.7, 1.3)
        slope = self.uniform(2.9, 4.0)
        field = -r / 0.2 + ragged * self.fractal(slope)
        self.filaments(field, coverage, brightness, sharpness)

    def filaments(self, field, coverage, brightness, sharpness=0.15, hydrogen=RED, oxygen=0.6):
        """Light with filaments where `field` (h, w) is in its highest `coverage` (0-1).

        `oxygen` is the chance that a part of it is teal.
        """
        edge = np.quantile(field, 1 - coverage)
        inside = _above(field, edge)
        # It fades to nothing at its edge, from crisp to very soft.
        body = inside ** self.uniform(1.0, 2.5)
        slope = self.uniform(2.8, 3.3)
        ridges = np.abs(self.fractal(slope))
        strength = self.uniform(0.5, 2.0)
        filaments = np.exp(-ridges / sharpness)
        filaments = filaments * strength
        slope = self.uniform(2.6, 3.2)
        knots = np.exp(0.5 * self.fractal(slope))
        red = _color(self.rng, hydrogen, 0.15)
        teal = _color(self.rng, TEAL, 0.15)
        glow = body * knots * (1 + filaments)
        glow = _with_peak(glow, brightness)
        self.shine(glow, red)
        if self.chance(oxygen):  # doubly ionized oxygen or reflected starlight
            knots = np.exp(0.6 * self.fractal(2.8))
            core = body ** 1.5 * knots
            peak = brightness * self.uniform(0.15, 0.6)
            core = _with_peak(core, peak)
            self.shine(core, teal)

    def small_galaxies(self):
        """None to six distant galaxies, as most deep pictures have."""
        for _ in range(self.rng.integers(0, 7)):
            center = self.place(1.0)
            width = self.uniform(0.004, 0.02)
            ratio = self.uniform(0.3, 1)
            angle = self.uniform(0, np.pi)
            radius = width / 2
            r = self.distance(center, angle, ratio) / radius
            brightness = self.uniform(0.02, 0.2)
            light = brightness * np.exp(3 * (1 - r))
            self.shine(light, DUST, 0.1)

    def optical_depth(self, coverage):
        """Dust in front of `coverage` (0-1) of the frame -> its optical depth (h, w) in green.

        Clouds, with denser fingers in them; their edges are crisp or soft.
        """
        slope = self.uniform(2.8, 3.6)
        stretch = self.uniform(0.6, 1.6)
        field = self.fractal(slope, stretch)
        edge = np.quantile(field, 1 - coverage)
        cloud = _above(field, edge) ** self.uniform(0.7, 1.6)
        slope = self.uniform(2.6, 3.2)
        fingers = np.exp(0.5 * self.fractal(slope))
        thickness = self.log_uniform(0.7, 4)
        return _with_peak(cloud * fingers, thickness)

    def absorb(self, behind, depth, color):
        """Take the light `behind` (h, w) dust of an optical depth (h, w) away, blue the most.

        `behind` is part of the sky, in units of its level and of a color (3,).
        """
        for k, redder in enumerate(REDDENING):
            lost = 1 - np.exp(-depth * redder)
            alone = np.zeros(3)
            alone[k] = color[k]
            self.shine(-behind * lost, alone)

    def bright_star(self, star, slope, fwhm):
        """A saturated star, whose light an optic scatters into wings of a slope; its color (3,)."""
        r = self.distance(star)
        core_radius = self.uniform(0.003, 0.008)
        color = _color(self.rng, NEUTRAL, 0.3)
        strength = self.log_uniform(1, 15)
        wings = (1 + (r / core_radius) ** 2) ** (-slope / 2)
        self.shine(strength * wings, color)
        peak = self.uniform(3, 30) / self.level  # saturated
        core = (1 + (r / fwhm) ** 2) ** -3
        core = core * peak
        self.star_parts.append((core.astype(np.float32), color))

    def add_elliptical(self, light, center, width, brightness):
        """Add an elliptical galaxy to `light` (h, w), out to 5 times where it has `brightness`.

        It is drawn in a stamp: a cluster has dozens of them.
        """
        angle = self.uniform(0, np.pi)
        ratio = self.uniform(0.55, 1)
        n = self.uniform(1, 2)
        steep = self.uniform(3.5, 5)
        x, y = center
        radius = width / 2
        reach = 5 * radius
        dx = np.abs(self.x[0] - x)
        dy = np.abs(self.y[:, 0] - y)
        columns = np.flatnonzero(dx < reach)
        rows = np.flatnonzero(dy < reach)
        if len(rows) == 0 or len(columns) == 0:
            return

        stamp_x = self.x[:, columns]
        stamp_y = self.y[rows]
        along, across = _turn(stamp_x, stamp_y, angle, center)
        seeing = 0.7 / self.longer  # it blurs the tip
        squares = along ** 2 + (across / ratio) ** 2
        r = np.sqrt(squares + seeing ** 2) / radius
        profile = np.exp(steep * (1 - r ** (1 / n)))
        rim = np.exp(steep * (1 - 5 ** (1 / n)))
        stamp = brightness * _above(profile, rim)
        light[np.ix_(rows, columns)] += stamp

    # -- the picture

    def finish(self, channels, border):
        """Put sky, objects, stars and noise together -> Scene."""
        sky = self.sky_over_pedestal(channels)  # (h, w, c)
        typical = np.median(sky[::4, ::4], axis=(0, 1))  # (c,)
        noise = self.noise_fraction * typical  # (c,)
        extended, light = self.objects(noise.mean(), channels)
        if self.vignette is not None:
            dimmed = self.vignette[..., None]
            sky *= dimmed
            dimmed = dimmed.astype(np.float32)
            light *= dimmed
            extended *= dimmed

        bright = np.abs(light) > 0.5 * noise
        object_mask = bright.any(axis=2)
        clean = sky + light
        if self.hill is not None:  # hills stand in front of the sky and of the stars
            cover, brightness, color = self.hill
            color = self.level * _seen(color, channels)
            dark = brightness[..., None] * color
            hidden = cover[..., None]
            clean += hidden * (dark - clean)
            extended *= (1 - hidden).astype(np.float32)
            object_mask |= cover > 0

        coverage = np.ones(self.shape)
        if border or self.turn is not None:
            coverage = self.coverage()
        if self.exposures is not None:
            coverage = coverage * self.exposures
        valid = coverage > 0
        pedestal = _seen(self.pedestal, channels)
        darkest = 1e-6  # not 0: that is what missing means
        if self.headroom is not None:  # too much was subtracted: the dark end is in the noise
            lowest = sky.min(axis=(0, 1))
            pedestal = self.headroom * noise - lowest
            darkest = 0
        grain = self.grain(clean / typical, coverage)
        if self.banding is not None:
            grain = grain + self.lines(channels)
        image = clean + pedestal + grain * noise
        if self.rim is not None:
            image = self.framed(image, noise)
            valid = valid & (self.rim[0] == 1)
        image = np.clip(image, darkest, 1)
        image = image.astype(np.float32)
        image[coverage == 0] = 0
        return Scene(
            image=image,
            sky=sky + pedestal,
            valid=valid,
            object_mask=object_mask,
            light=extended,
            noise=noise,
            family=self.family,
            seed=self.seed,
        )

    def sky_over_pedestal(self, channels):
        """The sky's even level and its parts -> (h, w, c)."""
        sky = np.empty(self.shape + (channels,))
        sky[:] = self.level * _seen(self.sky_color, channels)
        self.add(sky, self.sky_parts)
        return sky

    def objects(self, noise, channels):
        """Light of extended objects, and of those and the stars -> two (h, w, c) float32."""
        extended = np.zeros(self.shape + (channels,), np.float32)
        self.add(extended, self.light_parts)
        light = extended.copy()
        for k, star_light in enumerate(self.stars(noise, channels)):
            light[..., k] += star_light
        self.add(light, self.star_parts)
        return extended, light

    def add(self, picture, parts):
        """Add maps times colors to a picture (h, w, c), in its own precision."""
        channels = picture.shape[2]
        for shape, color in parts:
            color = self.level * _seen(color, channels)
            color = color.astype(picture.dtype)
            picture += shape[..., None] * color

    def grain(self, relative, coverage):
        """Noise (h, w, c) of pixels with `relative` light, 1 = typical sky, in units of its noise.

        Photon noise grows with the light; the mean of fewer frames is noisier.
        """
        photon_share = 1 - self.read_share
        variance = self.read_share + photon_share * relative
        frames = np.maximum(coverage, 1e-9)
        variance /= frames[..., None]
        rng = self.pixel_rng
        pixels = rng.standard_normal(relative.shape, np.float32)
        if rng.random() < 0.5:  # registration interpolates: neighbors share noise
            pixels = ndimage.uniform_filter(pixels, (2, 2, 1))
            pixels = pixels * 2
        return pixels * np.sqrt(variance)

    def lines(self, channels):
        """Banding (h, 1, c) or (1, w, c): a line's offset, in pixel noises.

        Neighbors share some of it, and so do the channels.
        """
        rng = self.pixel_rng
        upright = self.shape[0] > self.shape[1]  # the camera was turned, and its lines with it
        count = self.shape[1] if upright else self.shape[0]
        shared = rng.standard_normal((count, 1))
        own = rng.standard_normal((count, channels))
        offsets = 0.8 * shared + 0.6 * own
        wide = ndimage.gaussian_filter1d(offsets, rng.uniform(2, 6), axis=0)
        wide /= wide.std()
        offsets = self.banding * (0.7 * offsets + 0.7 * wide)  # (count, c)
        return offsets[None] if upright else offsets[:, None]

    def framed(self, image, noise):
        """A picture (h, w, c) in its rim: another level, another noise, a soft edge between."""
        inside, level, rim_noise = self.rim
        dark = np.percentile(image[inside == 1], 5, axis=0)  # (c,)
        grain = self.pixel_rng.standard_normal(image.shape)
        rim = level[..., None] * dark + rim_noise * noise * grain
        weight = inside[..., None]
        return weight * image + (1 - weight) * rim

    def stars(self, noise, channels):
        """Light of all stars: one (h, w) map a channel, full scale = 1 (saturated stars exceed it).

        Number counts follow a power law; profiles are Moffat's.
        """
        height, width = self.shape
        rng = self.star_rng
        slope = rng.uniform(0.6, 0.9)
        fwhm = rng.uniform(1.5, 2.5)  # pixels
        beta = rng.uniform(2.5, 4.5)
        # A larger picture of a field goes deeper, but its stars do not multiply with its pixels.
        larger = height * width / 240000
        count = int(self.star_count * larger ** 0.6)
        draws = rng.random((count, 5))  # one row a star: a larger frame only adds rows
        x = draws[:, 0] * width
        y = draws[:, 1] * height
        if self.star_density is not None:
            rows, columns = y.astype(int), x.astype(int)
            chance = self.star_density[rows, columns]
            keep = draws[:, 2] < chance
            x = x[keep]
            y = y[keep]
            draws = draws[keep]

        rarity = 1 - draws[:, 3]
        peak = 2 * noise * rarity ** (-1 / slope)
        peak = np.minimum(peak, 4.0)
        brightest = np.argsort(peak)[::-1]
        brightest = brightest[:self.halo_count]
        saturated = rng.uniform(1, 6, len(brightest))
        peak[brightest] = np.maximum(peak[brightest], saturated)
        warmth = 0.35 * (draws[:, 4] - 0.5)
        green = np.ones_like(warmth)
        colors = np.stack([1 + warmth, green, 1 - warmth], 1)  # (count, 3)
        colors = [_seen(color, channels) for color in colors]
        colors = np.reshape(colors, (-1, channels))  # (count, c), of none as well

        half = 2 ** (1 / beta) - 1  # (r / core)^2 where a profile has half its peak
        core = fwhm / 2 / np.sqrt(half)
        maps = self.star_maps(x, y, peak, colors, noise, core, beta)
        for star in brightest:  # scattered light: wide, faint, and no sky
            scale = rng.uniform(0.005, 0.03)
            strength = rng.uniform(0.05, 0.6)
            strength = strength * self.level
            halo_x = x[star] / self.longer - self.half_x
            halo_y = y[star] / self.longer - self.half_y
            r = self.distance((halo_x, halo_y))
            halo = strength * np.exp(-r / scale)
            for k, star_map in enumerate(maps):
                star_map += halo * colors[star, k]
        return maps

    def star_maps(self, x, y, peak, colors, noise, core, beta):
        """Moffat profiles of stars -> one (h, w) map a channel.

        x, y (n,) are in pixels, colors (n, c). Stars of like size are drawn together in stamps of
        (s, s) pixels.
        """
        height, width = self.shape
        contrast = peak / (0.05 * noise)
        squares = contrast ** (1 / beta) - 1
        reach = core * np.sqrt(squares)  # pixels, to a 20th of the noise
        flat_maps = [np.zeros(height * width) for _ in colors.T]
        smaller = 0
        for size in (8, 16, 32, 64, 128, 256):
            fits = (reach <= size) | (size == 256)
            group = (reach > smaller) & fits
            smaller = size
            members = np.flatnonzero(group)
            for first in range(0, len(members), STARS_AT_ONCE):
                some = members[first:first + STARS_AT_ONCE]
                star_x = x[some][:, None, None]
                star_y = y[some][:, None, None]
                star_peak = peak[some][:, None, None]
                offset = np.arange(-size, size + 1)
                columns = star_x.astype(int) + offset[None, None, :]  # (n, 1, s)
                rows = star_y.astype(int) + offset[None, :, None]  # (n, s, 1)
                dx = columns + 0.5 - star_x
                dy = rows + 0.5 - star_y
                r2 = dx ** 2 + dy ** 2  # (n, s, s)
                rim = (1 + (size / core) ** 2) ** -beta
                profile = (1 + r2 / core ** 2) ** -beta
                profile = _above(profile, rim)  # ends at 0: no square rims
                profile = profile * star_peak

                in_width = (columns >= 0) & (columns < width)
                in_height = (rows >= 0) & (rows < height)
                inside = in_width & in_height  # (n, s, s)
                index = rows * width + columns
                index = index[inside]
                for k, flat in enumerate(flat_maps):
                    color = colors[some, k]
                    light = profile * color[:, None, None]
                    flat += np.bincount(index, light[inside], minlength=flat.size)
        return [flat.reshape(height, width) for flat in flat_maps]

    def coverage(self):
        """Share (h, w), 0 to 1, of the stacked frames, a little shifted and turned, on a pixel."""
        rng = self.border_rng
        drift = rng.uniform(0, 2 * np.pi)
        direction = np.array([np.cos(drift), np.sin(drift)])
        shift = rng.uniform(0.012, 0.025)
        shift = shift * direction
        turn = rng.uniform(-0.012, 0.012)
        if self.turn is not None:
            turn += self.turn
        if rng.random() < 0.4:  # the hard edge of a stack cropped to its reference
            frames, wander, wobble = 1, 0, 0
        else:
            frames, wander, wobble = 6, 0.008, 0.004
        covered = np.zeros(self.shape)
        for _ in range(frames):
            center = shift + rng.uniform(-wander, wander, 2)
            angle = turn + rng.uniform(-wobble, wobble)
            along, across = self.turned(angle, center)
            in_width = np.abs(along) <= self.half_x
            in_height = np.abs(across) <= self.half_y
            covered += in_width & in_height
        return covered / frames


# ------------------------------------------------------------------------------------------------
# The families
# ------------------------------------------------------------------------------------------------

def _galaxy(canvas):
    """A large galaxy, its outskirts fading into a tilted sky."""
    canvas.tilt(0.2, 1.0)
    canvas.random_galaxy(
        within=0.35,
        width=(0.15, 0.35),
        brightness=(0.02, 0.08),
    )
    if canvas.chance(0.4):  # a companion
        canvas.random_galaxy(
            within=0.8,
            width=(0.03, 0.07),
            brightness=(0.03, 0.1),
        )
    canvas.small_galaxies()


def _nebula(canvas):
    """An emission nebula over about a third of the frame, between the glows of two towns."""
    canvas.city_glow()
    canvas.city_glow()
    coverage = canvas.uniform(0.25, 0.40)
    brightness = canvas.log_uniform(0.3, 3)
    canvas.nebula(coverage, brightness)


def _city_glows(canvas):
    """Two or three towns and vignetting; few objects."""
    for _ in range(canvas.rng.integers(2, 4)):
        canvas.city_glow(0.3, 1.0)
    canvas.dim_corners(0.1, 0.45)
    canvas.small_galaxies()


def _airglow(canvas):
    """A wavy band across the frame and a small bright glow in one corner."""
    uniform = canvas.uniform
    angle = uniform(0, np.pi)
    offset = uniform(-0.2, 0.2)
    along, across = canvas.turned(angle)
    height = uniform(0.02, 0.07)
    length = uniform(0.5, 1.1)
    phase = uniform(0, 6.28)
    wave = np.sin(2 * np.pi * along / length + phase)
    across = across - offset + height * wave
    width = uniform(0.08, 0.2)
    band = np.exp(-across ** 2 / 2 / width ** 2)
    amount = uniform(0.15, 0.5)
    canvas.brighten(band, amount)

    side_x, side_y = canvas.rng.choice((-1, 1), 2)
    corner_x = side_x * canvas.half_x
    corner_x = corner_x * uniform(0.95, 1.1)
    corner_y = side_y * canvas.half_y
    corner_y = corner_y * uniform(0.95, 1.1)
    r = canvas.distance((corner_x, corner_y))
    r = r / uniform(0.10, 0.15)
    amount = uniform(0.4, 1.5)
    canvas.brighten(_gaussian(r), amount)
    canvas.tilt(0.05, 0.3)
    canvas.small_galaxies()


def _dust(canvas):
    """Faint dust lit by the Milky Way over most of the frame; the truth is the sky without it."""
    uniform = canvas.uniform
    if canvas.chance(0.5):
        canvas.city_glow(0.3, 0.8)
    canvas.tilt(0.3, 0.8)
    slope = uniform(2.6, 3.3)
    stretch = uniform(0.6, 1.6)
    cirrus = canvas.fractal(slope, stretch)
    ridges = np.abs(canvas.fractal(2.8))
    wisps = np.exp(-ridges / 0.3)
    clear_share = uniform(0.1, 0.35)
    clear = np.quantile(cirrus, clear_share)
    cirrus = _above(cirrus, clear) ** 1.3
    cirrus = cirrus * (1 + 0.6 * wisps)
    peak = uniform(0.1, 0.3)
    peak = peak * canvas.span()
    cirrus = _with_peak(cirrus, peak)
    canvas.shine(cirrus, DUST, 0.1)
    canvas.small_galaxies()


def _moon(canvas):
    """Moonlight from beyond a side or corner: the brightest sky 6 to 10 times the darkest."""
    uniform = canvas.uniform
    outside = uniform(0.1, 0.6)
    r = canvas.distance(canvas.at_edge(outside))
    if canvas.chance(0.5):
        blunt = np.sqrt(r ** 2 + 0.1 ** 2)
        glow = np.exp(-blunt / uniform(0.25, 0.5))
    else:
        glow = _gaussian(r / uniform(0.4, 0.7))
    canvas.level = canvas.log_uniform(0.008, 0.04)  # the dark end: 8 times that is still linear
    amount = uniform(5, 9)
    canvas.brighten(glow, amount, spread=0.15)
    if canvas.chance(0.4):
        canvas.random_galaxy(
            within=0.6,
            width=(0.06, 0.15),
            brightness=(0.05, 0.2),
        )
    canvas.small_galaxies()


def _hills(canvas):
    """Dark hills before the lower 10-25 % of a sky that brightens to the horizon.

    One in four is upside down.
    """
    uniform = canvas.uniform
    upside = -1 if canvas.chance(0.25) else 1
    up = canvas.half_y - upside * canvas.y  # (h, 1) over the frame's lower edge
    up = up + 0 * canvas.x  # (h, w)
    reach = 2 * canvas.half_y
    length = reach * uniform(0.25, 0.6)
    glow = np.exp(-up / length)
    amount = uniform(0.5, 2.0)
    canvas.brighten(glow, amount)
    canvas.tilt(0.05, 0.4)
    if canvas.chance(0.5):
        canvas.city_glow(0.2, 0.5)

    # One line of a texture is a skyline.
    rows = canvas.shape[0]
    slope = uniform(2.6, 3.4)
    ridge = canvas.fractal(slope)[rows // 2]  # (w,)
    trees = canvas.fractal(1.4)[rows // 3]  # (w,)
    trees = np.abs(trees)
    ridge = ridge - ridge.mean()
    height = uniform(0.10, 0.25)
    roughness = max(ridge.std(), 1e-9)
    bumps = 0.03 * ridge / roughness
    tree_height = uniform(0, 0.006)
    ridge = reach * (height + bumps + tree_height * trees)
    below = (ridge[None, :] - up) * canvas.longer  # pixels
    cover = np.clip(below + 0.5, 0, 1)  # an edge one pixel soft
    brightness = uniform(0.03, 0.5)
    uneven = uniform(0.1, 0.5)
    rocks = np.exp(uneven * canvas.fractal(1.8))
    color = _color(canvas.rng, (1.0, 1.0, 0.9), 0.2)
    canvas.hill = cover, brightness * rocks, color


def _stars(canvas):
    """A dense Milky Way field: thousands of stars, the unresolved ones a faint band."""
    uniform = canvas.uniform
    canvas.tilt(0.3, 1.0)
    if canvas.chance(0.5):
        canvas.city_glow(0.2, 0.5)
    canvas.star_count = uniform(2500, 6000)
    angle = uniform(0, np.pi)
    _, across = canvas.turned(angle)
    across = across - uniform(-0.2, 0.2)
    width = uniform(0.15, 0.35)
    band = np.exp(-across ** 2 / 2 / width ** 2)
    patches = np.exp(0.3 * canvas.fractal(2.8))
    band = band * patches
    band /= band.max()
    canvas.star_density = 0.5 + 0.5 * band
    brightness = uniform(0.002, 0.01)
    canvas.shine(brightness * band, DUST, 0.05)


def _flat(canvas):
    """Nearly nothing to remove: a gradient of 3-25 % of the pixel noise."""
    noise = canvas.noise_fraction
    canvas.tilt(0.03 * noise, 0.25 * noise)
    canvas.small_galaxies()


def _big_nebula(canvas):
    """A nebula over more than 60 % of the frame, on a plane."""
    canvas.tilt(0.2, 0.8)
    coverage = canvas.uniform(0.6, 0.8)
    brightness = canvas.log_uniform(0.3, 2)
    canvas.nebula(coverage, brightness)


def _full_object(canvas):
    """An object over nearly the whole frame: too little sky to tell."""
    canvas.tilt(0.2, 0.6)
    coverage = canvas.uniform(0.93, 0.99)
    brightness = canvas.log_uniform(0.3, 2)
    canvas.nebula(coverage, brightness, sharpness=0.3)


def _short_stack(canvas):
    """A few minutes of a smart telescope: a soft nebula in much noise.

    The frame is turned, so that wedges are missing, with and without `border`.
    """
    uniform = canvas.uniform
    canvas.tilt(0.15, 0.6, curvature=0.5)
    if canvas.chance(0.5):
        canvas.city_glow(0.1, 0.4)
    gradient = canvas.gradient()
    low, middle, high = np.percentile(gradient, (1, 50, 99))
    span = high - low
    noise = uniform(0.3, 0.7) * span
    canvas.noise_fraction = noise / (1 + middle)
    side = canvas.sign()
    degrees = uniform(5, 12)
    canvas.turn = side * np.deg2rad(degrees)

    x, y = canvas.place(0.35)
    width = uniform(0.2, 0.45)
    soft = uniform(1.4, 2.2)
    cloud = canvas.blob((x, y), width, soft)
    for _ in range(canvas.rng.integers(1, 4)):
        dx, dy = canvas.rng.normal(0, 0.35 * width, 2)
        strength = uniform(0.2, 0.8)
        smaller = width * uniform(0.3, 0.8)
        part = canvas.blob((x + dx, y + dy), smaller)
        cloud = cloud + strength * part
    uneven = uniform(0.1, 0.35)
    slope = uniform(3.5, 4.5)
    cloud *= np.exp(uneven * canvas.fractal(slope))
    color = 0.8, 1.0, 1.25  # reflected starlight
    if canvas.chance(0.5):
        color = 1.5, 0.75, 0.75  # emission
    peak = uniform(0.3, 1.5) * span
    cloud = cloud * (peak / cloud.max())
    canvas.shine(cloud, color, 0.15)


def _milky_way(canvas):
    """Star clouds cut by dark lanes across half of the frame, and two towns.

    The truth is the sky without the clouds; beyond the band it is seen as it is.
    """
    uniform = canvas.uniform
    canvas.city_glow(0.3, 0.8)
    canvas.city_glow(0.3, 0.8)
    across, angle, offset = canvas.random_band()
    across = across + 0.04 * canvas.fractal(3.5)
    cos, sin = np.cos(angle), np.sin(angle)
    reach_y = canvas.half_y * np.abs(cos)
    reach_x = canvas.half_x * np.abs(sin)
    width = uniform(0.25, 0.4)
    width = width * (reach_y + reach_x)  # half of the band's
    power = uniform(2.5, 4)
    band = np.exp(-np.abs(across / width) ** power)
    uneven = uniform(0.3, 0.6)
    slope = uniform(2.8, 3.4)
    patches = np.exp(uneven * canvas.fractal(slope))
    clouds = band * patches

    # Dust lies in a thinner layer than the stars, a little beside their middle, and in fingers.
    beside = uniform(-0.4, 0.4) * width
    from_layer = (across - beside) / width / 0.35
    layer = np.exp(-from_layer ** 2)
    slope = uniform(2.8, 3.3)
    fingers = 1.3 * canvas.fractal(slope)
    depth = fingers + uniform(0.3, 1.2) * layer
    thickness = uniform(1, 3)
    opacity = thickness * _above(depth, 0.4)
    clouds *= np.exp(-opacity)

    brightest = np.quantile(clouds, 0.99)
    peak = uniform(0.2, 1.0)
    light = clouds * (peak / brightest)
    canvas.shine(light, (1.1, 1.0, 0.85), 0.07)
    canvas.star_count = uniform(2500, 6000)
    crowded = np.clip(clouds / brightest, 0, 1)
    canvas.star_density = 0.2 + 0.8 * crowded
    if canvas.chance(0.5):  # a glowing nebula in the arm
        center = offset * -sin, offset * cos
        width = uniform(0.03, 0.08)
        glow = canvas.blob(center, width, 1.2)
        glow = glow * np.exp(0.5 * canvas.fractal(2.8))
        brightness = uniform(0.1, 0.5)
        canvas.shine(glow * brightness, (1.9, 0.6, 0.7), 0.1)


def _large_galaxy(canvas):
    """An inclined spiral over most of the longer side, its outskirts fading into the sky."""
    uniform = canvas.uniform
    canvas.tilt(0.2, 0.8, curvature=0.2)
    is_landscape = canvas.half_x >= canvas.half_y
    longer_axis = 0 if is_landscape else np.pi / 2
    angle = longer_axis + uniform(-0.6, 0.6)
    warm = _color(canvas.rng, OLD_STARS, 0.05)
    blue = _color(canvas.rng, (0.9, 1.0, 1.15), 0.05)
    center = canvas.place(0.12)
    width = uniform(0.55, 0.85)
    brightness = uniform(0.015, 0.06)
    ratio = uniform(0.25, 0.55)
    canvas.spiral(center, width, brightness, angle, ratio, warm, blue)
    canvas.small_galaxies()


def _clipped(canvas):
    """A dark frame too bright was subtracted: the dark end of the sky is clipped in the noise.

    A galaxy with wide faint wings stands on it.
    """
    uniform = canvas.uniform
    canvas.tilt(0.1, 0.5)
    gradient = canvas.gradient()
    noise = canvas.log_uniform(0.3, 1.1)
    noise = noise * np.ptp(gradient)
    canvas.noise_fraction = noise / (1 + np.median(gradient))
    canvas.headroom = uniform(0.0, 0.25)
    center = canvas.place(0.5)
    width = uniform(0.08, 0.2)
    radius = width / 2
    r = canvas.random_distance(center, 0.5) / radius
    n = uniform(2, 4)
    steep = uniform(5.0, 7.0)
    brightness = noise * uniform(0.5, 1.5)
    light = brightness * _sersic(r, n, steep)
    canvas.shine(light, (1.2, 1.0, 0.8), 0.1)
    canvas.small_galaxies()


def _mosaic(canvas):
    """Three panels side by side, their levels and slopes not quite matched.

    The steps are part of the true sky, though no smooth surface can follow them.
    """
    rng = canvas.rng
    canvas.tilt(0.3, 1.0)
    if canvas.chance(0.5):
        position, half, other = canvas.x, canvas.half_x, canvas.y
    else:
        position, half, other = canvas.y, canvas.half_y, canvas.x
    lean = canvas.uniform(-0.02, 0.02)
    position = position + lean * other  # (h, w); panels are never quite upright
    feather = canvas.uniform(0, 0.01)
    feather = max(feather, 0.5 / canvas.longer)
    thirds = np.array([-1, 1]) / 3
    seams = thirds + canvas.uniform(-0.08, 0.08, 2)
    beyond = []  # (h, w) each: 0 before a seam, 1 behind it
    for seam in half * seams:
        steps = (position - seam) / feather
        beyond.append(np.clip(steps + 0.5, 0, 1))
    first, second = beyond
    weights = 1 - first, first - second, second  # of the panels; their sum is 1
    levels = rng.permutation(3) / 2
    levels = levels + canvas.uniform(-0.2, 0.2, 3)
    panels = 0
    for weight, level in zip(weights, levels):
        along = position * rng.normal(0, 0.5)
        across = other * rng.normal(0, 0.5)
        panel = level + (along + across) / half
        panels = panels + weight * panel
    amount = canvas.uniform(0.12, 0.35)
    amount = amount * canvas.span()
    canvas.brighten(panels, amount)
    canvas.small_galaxies()
    for _ in range(rng.integers(0, 3)):
        canvas.random_galaxy(
            within=0.8,
            width=(0.02, 0.06),
            brightness=(0.03, 0.1),
        )


def _edge_nebula(canvas):
    """A faint nebula from one edge of the frame to the other, and a gradient across it."""
    uniform = canvas.uniform
    canvas.tilt(0.3, 1.0)
    if canvas.chance(0.4):
        canvas.city_glow(0.2, 0.5)
    across, _, _ = canvas.random_band()
    width = uniform(0.1, 0.2)
    band = -np.abs(across) / width
    ragged = uniform(0.5, 1.0)
    slope = uniform(2.9, 3.8)
    field = band + ragged * canvas.fractal(slope)
    coverage = uniform(0.4, 0.7)
    brightness = uniform(0.12, 0.45)
    brightness = brightness * canvas.span()
    canvas.filaments(field, coverage, brightness)


def _amp_glow(canvas):
    """The sensor's amplifier glows in a corner or two, on a tilted plane; few objects."""
    uniform = canvas.uniform
    canvas.tilt(0.2, 0.8, curvature=0.1)
    corners = canvas.rng.permutation([
        (-1, -1),
        (-1, 1),
        (1, -1),
        (1, 1),
    ])
    count = 2 if canvas.chance(0.3) else 1
    for side_x, side_y in corners[:count]:
        reach = uniform(0.03, 0.08)
        outside_x = uniform(0, 0.03)
        outside_y = uniform(0, 0.03)
        x = side_x * (canvas.half_x + outside_x)
        y = side_y * (canvas.half_y + outside_y)
        angle = canvas.rng.choice((0, np.pi / 2))
        ratio = uniform(0.6, 1)
        r = canvas.distance((x, y), angle, ratio)
        glow = _exponential(r / reach, 0.2)
        amount = uniform(0.5, 3)
        canvas.brighten(glow, amount, spread=0.25)
    if canvas.chance(0.4):
        canvas.random_galaxy(
            within=0.5,
            width=(0.04, 0.1),
            brightness=(0.03, 0.1),
        )
    canvas.small_galaxies()


def _cluster(canvas):
    """A cluster of galaxies around a giant one, in the light of stars that belong to none."""
    rng = canvas.rng
    uniform = canvas.uniform
    canvas.tilt(0.2, 0.8, curvature=0.4)
    x, y = canvas.place(0.3)
    width = uniform(0.15, 0.35)
    radius = width / 2
    r = canvas.random_distance((x, y), 0.6) / radius
    power = uniform(1.3, 2.0)
    between = 1 / (1 + r ** 2) ** power
    peak = uniform(0.1, 0.2)
    peak = peak * canvas.span()
    canvas.shine(peak * between, (1.15, 1.0, 0.85), 0.05)

    members = np.zeros(canvas.shape)
    for _ in range(rng.integers(30, 90)):
        distance = np.abs(rng.standard_t(2.5))  # most are near, some far out
        distance = radius * distance
        direction = uniform(0, 2 * np.pi)
        member_x = x + distance * np.cos(direction)
        member_y = y + distance * np.sin(direction)
        size = canvas.log_uniform(0.005, 0.025)
        brightness = uniform(0.01, 0.06)
        canvas.add_elliptical(members, (member_x, member_y), size, brightness)
    size = uniform(0.04, 0.08)
    brightness = uniform(0.05, 0.1)
    canvas.add_elliptical(members, (x, y), size, brightness)
    canvas.shine(members, OLD_STARS, 0.05)
    canvas.small_galaxies()


def _vignetting(canvas):
    """A flat field that did not fit: the sky is brightest near the middle; few objects."""
    canvas.tilt(0.03, 0.12)
    canvas.dim_corners(0.2, 0.5)
    if canvas.chance(0.5):
        canvas.random_galaxy(
            within=0.5,
            width=(0.03, 0.1),
            brightness=(0.03, 0.1),
        )
    canvas.small_galaxies()


def _star_halos(canvas):
    """Very bright stars, whose scattered light reaches far, on a tilted sky with a little dust."""
    uniform = canvas.uniform
    canvas.tilt(0.3, 1.0)
    slope = uniform(2.7, 3.4)
    cirrus = canvas.fractal(slope)
    clear = uniform(-0.5, 0.5)
    cirrus = _above(cirrus, clear) ** 1.3
    peak = uniform(0.03, 0.1)
    peak = peak * canvas.span()
    cirrus = _with_peak(cirrus, peak)
    canvas.shine(cirrus, DUST, 0.1)

    slope = uniform(2, 3)  # of the wings; the same optics scatter every star
    fwhm = uniform(1.5, 2.5) / canvas.longer
    for _ in range(canvas.rng.integers(2, 7)):
        star = canvas.place(0.95)
        canvas.bright_star(star, slope, fwhm)
    canvas.small_galaxies()


def _narrowband(canvas):
    """Through a narrow filter: hardly any sky, and a nebula over 60 % of the frame."""
    uniform = canvas.uniform
    canvas.level = canvas.log_uniform(0.002, 0.01)
    canvas.noise_fraction = uniform(0.04, 0.15)
    canvas.tilt(0.15, 0.5)
    coverage = uniform(0.5, 0.7)
    brightness = canvas.log_uniform(0.5, 5)
    sharpness = uniform(0.08, 0.2)
    canvas.nebula(coverage, brightness, sharpness)


def _pedestal(canvas):
    """A pedestal of a fifth of full scale under a gradient of 0.4 %; one small object."""
    uniform = canvas.uniform
    pedestal = uniform(0.15, 0.25)
    canvas.pedestal = pedestal * uniform(0.98, 1.02, 3)
    canvas.level = uniform(0.01, 0.03)
    span = uniform(0.003, 0.005) / canvas.level
    canvas.tilt(span, span)
    if canvas.chance(0.5):
        canvas.random_galaxy(
            within=0.6,
            width=(0.05, 0.15),
            brightness=(0.02, 0.08),
        )
    else:
        coverage = uniform(0.04, 0.12)
        brightness = uniform(0.1, 0.5)
        canvas.nebula(coverage, brightness)
    canvas.small_galaxies()


def _plane_galaxy(canvas):
    """A galaxy on a sky that is a perfect plane."""
    canvas.tilt(0.2, 1.0, curvature=0)
    canvas.random_galaxy(
        within=0.5,
        width=(0.15, 0.35),
        brightness=(0.02, 0.08),
    )
    canvas.small_galaxies()


def _edge_glow(canvas):
    """Street lights or a warm sensor: a glow along a whole edge or two, uneven along it."""
    uniform = canvas.uniform
    canvas.tilt(0.1, 0.6)
    sides = canvas.rng.permutation(4)
    count = 2 if canvas.chance(0.25) else 1
    for side in sides[:count]:
        inward, along = canvas.from_edge(side)
        length = canvas.log_uniform(0.02, 0.15)
        power = uniform(0.7, 1.6)  # 1: exponential, 2: a bell
        glow = np.exp(-(inward / length) ** power)
        lean = uniform(-0.6, 0.6)
        bend = uniform(-0.4, 0.4)
        waves = uniform(0.5, 1.5) * np.pi
        phase = uniform(0, 2 * np.pi)
        swell = uniform(0, 0.15) * np.sin(waves * along + phase)
        strength = np.exp(lean * along + bend * along ** 2 + swell)
        amount = uniform(0.4, 2.5)
        canvas.brighten(glow * strength, amount)
    if canvas.chance(0.5):
        canvas.random_galaxy(
            within=0.6,
            width=(0.05, 0.2),
            brightness=(0.03, 0.1),
        )
    elif canvas.chance(0.5):
        coverage = uniform(0.1, 0.3)
        brightness = canvas.log_uniform(0.2, 1)
        canvas.nebula(coverage, brightness)
    canvas.small_galaxies()


def _dark_clouds(canvas):
    """Dust before a bright Milky Way, over 20 to 60 % of the frame.

    The truth is the sky as it would be without the dust: its bright part is the sky, and the light
    of the clouds is negative. The night's own glow is in front of them, and shines on.
    """
    uniform = canvas.uniform
    canvas.tilt(0.1, 0.6)
    across, _, _ = canvas.random_band()
    width = uniform(0.3, 0.9)
    behind = _gaussian(across / width)
    behind = behind * uniform(0.3, 1.2)
    color = canvas.sky_color * _color(canvas.rng, DUST, 0.1)
    canvas.sky_parts.append((behind, color))
    coverage = uniform(0.2, 0.6)
    depth = canvas.optical_depth(coverage)
    canvas.absorb(behind, depth, color)
    canvas.star_count = canvas.log_uniform(1000, 6000)
    canvas.star_density = 0.1 + 0.9 * np.exp(-depth)
    if canvas.chance(0.3):  # a young star lights the dust around it
        center = canvas.place(0.7)
        width = uniform(0.03, 0.08)
        brightness = uniform(0.1, 0.4)
        glow = brightness * canvas.blob(center, width, 1.2)
        canvas.shine(glow, (0.8, 1.0, 1.25), 0.1)


def _tilted_steps(canvas):
    """Sessions stacked: the camera was turned between them, or the mount flipped at the meridian.

    Each has its own sky, and perhaps its own transparency, and covers a turned and shifted part of
    the frame; where one ends is a step. The steps are part of the true sky, though no smooth
    surface can follow them.
    """
    rng = canvas.rng
    uniform = canvas.uniform
    canvas.tilt(0.2, 0.8)
    turned_by_hand = canvas.chance(0.5)
    lost_frames = canvas.chance(0.3)  # the first session does not cover the whole frame either
    has_haze = canvas.chance(0.5)
    feather = canvas.log_uniform(0.5, 4) / canvas.longer
    exposures, sky, transparent = 0, 0, 0  # (h, w) sums
    for session in range(rng.integers(2, 5)):
        if session == 0:
            angle = 0
            across = uniform(0.03, 0.12) if lost_frames else 0
            shift = 0, across * canvas.sign()
        elif turned_by_hand:
            angle = canvas.sign() * uniform(0.08, 0.7)
            shift = rng.normal(0, 0.06, 2)
        else:
            angle = canvas.sign() * uniform(0.01, 0.08)
            shift = rng.normal(0, 0.18, 2)
        along, across = canvas.turned(angle, shift)
        beside = canvas.half_x - np.abs(along)
        below = canvas.half_y - np.abs(across)
        edge = np.minimum(beside, below)
        covered = np.clip(edge / feather + 0.5, 0, 1)
        covered = covered * uniform(0.4, 1)
        if session == 0 and not lost_frames:
            covered = np.full(canvas.shape, uniform(0.4, 1))
        slope_x, slope_y = rng.normal(0, 0.6, 2)
        level = session % 2 + uniform(-0.3, 0.3)
        exposures = exposures + covered
        sky = sky + covered * (level + slope_x * canvas.x + slope_y * canvas.y)
        transparent = transparent + covered * uniform(0.88, 1)
    some = np.maximum(exposures, 1e-6)
    amount = uniform(0.25, 0.7)
    amount = amount * canvas.span()
    canvas.brighten(sky / some, amount)
    if has_haze:
        canvas.vignette = np.where(exposures > 0, transparent / some, 1)
    canvas.exposures = exposures / exposures.max()
    canvas.small_galaxies()
    if canvas.chance(0.5):
        canvas.random_galaxy(
            within=0.6,
            width=(0.05, 0.2),
            brightness=(0.03, 0.1),
        )


def _globular(canvas):
    """A globular cluster over half of the frame: King's profile, half of it resolved in stars."""
    uniform = canvas.uniform
    canvas.tilt(0.2, 0.8)
    center = canvas.place(0.15)
    tidal = uniform(0.4, 0.75)
    core = tidal * uniform(0.05, 0.2)
    r = canvas.random_distance(center, 0.85)
    profile = _king(r, core, tidal)
    grain = np.exp(0.12 * canvas.fractal(1.2))  # stars on the verge of being seen
    brightness = canvas.log_uniform(2, 15)
    canvas.shine(brightness * profile * grain, (1.1, 1.0, 0.85), 0.05)
    field = uniform(0.01, 0.05)
    canvas.star_density = field + (1 - field) * profile ** 0.6
    canvas.star_count = uniform(5000, 15000)
    canvas.small_galaxies()


def _comet(canvas):
    """A comet with a green coma, a fan of dust and a thin tail of ions, which leave the frame."""
    uniform = canvas.uniform
    canvas.tilt(0.2, 0.7)
    if canvas.chance(0.5):
        canvas.city_glow(0.2, 0.6)
    nucleus = canvas.place(0.6)
    x, y = nucleus
    outward = np.arctan2(-y, -x)  # the tail has room to be seen in
    away_from_sun = outward + uniform(-0.8, 0.8)

    r = canvas.distance(nucleus)
    center = uniform(0.003, 0.008)
    outer = uniform(0.03, 0.1)
    coma = np.exp(-r / outer) / np.hypot(1, r / center)  # gas that flows out thins as 1 / r
    peak = canvas.log_uniform(2, 15)
    canvas.shine(peak * coma, (0.75, 1.25, 1.0), 0.1)

    along, across = canvas.turned(away_from_sun, nucleus)
    behind = _above(along, 0)
    head = uniform(0.01, 0.03)
    start = 1 / (1 + np.exp(-along / head))
    curve = uniform(-0.4, 0.4)
    beside = across - curve * behind ** 2
    spread = uniform(0.1, 0.35)
    sharper = np.where(beside * curve > 0, 1, uniform(0.4, 0.9))  # the side that leads
    half = np.hypot(head, spread * behind) * sharper
    length = uniform(0.4, 1.2)
    fading = np.exp(-behind / length) / (1 + behind / (5 * head))
    streaks = np.exp(0.15 * canvas.fractal(3.2))
    dust = start * fading * np.exp(-np.abs(beside / half) ** 1.6) * streaks
    brightness = uniform(0.6, 2)
    canvas.shine(brightness * dust, (1.15, 1.0, 0.8), 0.07)

    turn = canvas.sign() * uniform(0.05, 0.25)  # dust lags behind the ions
    along, across = canvas.turned(away_from_sun + turn, nucleus)
    behind = _above(along, 0)
    start = 1 / (1 + np.exp(-along / head))
    length = uniform(0.5, 1.5)
    ions = 0
    for _ in range(canvas.rng.integers(2, 6)):
        direction = canvas.rng.normal(0, 0.04)
        half = 0.002 + uniform(0.01, 0.04) * behind
        beside = across - direction * behind
        thinner = 0.01 / (0.01 + half)
        ions = ions + thinner * _gaussian(beside / half)
    knots = np.exp(0.3 * canvas.fractal(2.8))
    brightness = uniform(0.1, 0.4)
    ions = brightness * start * np.exp(-behind / length) * ions * knots
    canvas.shine(ions, (0.55, 0.85, 1.6), 0.1)


def _banding(canvas):
    """One exposure of a camera: lines read with offsets of their own, a tilt, and vignetting."""
    uniform = canvas.uniform
    canvas.noise_fraction = uniform(0.08, 0.25)
    canvas.banding = canvas.log_uniform(0.1, 0.5)
    canvas.read_share = uniform(0.3, 0.6)
    canvas.tilt(0.2, 0.8)
    canvas.dim_corners(0.15, 0.5)
    if canvas.chance(0.5):
        coverage = uniform(0.05, 0.2)
        brightness = canvas.log_uniform(0.3, 1.5)
        canvas.nebula(coverage, brightness)
    else:
        canvas.random_galaxy(
            within=0.5,
            width=(0.05, 0.2),
            brightness=(0.05, 0.15),
        )


def _small_galaxies(canvas):
    """Hundreds of small galaxies, in groups and alone, on a faint gradient."""
    rng = canvas.rng
    uniform = canvas.uniform
    canvas.tilt(0.03, 0.25)
    groups = [canvas.place(0.8) for _ in range(rng.integers(1, 4))]
    apart = uniform(0.03, 0.12)
    alone = uniform(0.3, 0.8)
    for color in OLD_STARS, YOUNG_STARS:
        light = np.zeros(canvas.shape)
        for _ in range(rng.integers(60, 250)):
            center = canvas.place(1)
            if not canvas.chance(alone):
                group = groups[rng.integers(len(groups))]
                center = group + rng.normal(0, apart, 2)
            width = canvas.log_uniform(0.003, 0.02)
            brightness = canvas.log_uniform(0.02, 0.2)
            canvas.add_elliptical(light, center, width, brightness)
        canvas.shine(light, color, 0.1)
    for _ in range(rng.integers(0, 4)):  # a nearer one
        canvas.random_galaxy(
            within=0.9,
            width=(0.02, 0.05),
            brightness=(0.03, 0.1),
        )


def _inclined_galaxy(canvas):
    """A spiral seen nearly from its edge, over 60 to 90 % of the frame, with two companions."""
    uniform = canvas.uniform
    canvas.tilt(0.2, 0.8)
    if canvas.chance(0.3):
        canvas.city_glow(0.2, 0.5)
    diagonal = np.arctan2(canvas.half_y, canvas.half_x)
    angle = canvas.sign() * diagonal * uniform(0, 1.2)
    if canvas.half_y > canvas.half_x:
        angle = np.pi / 2 - canvas.sign() * (np.pi / 2 - diagonal) * uniform(0, 1.2)
    center = canvas.place(0.1)
    width = uniform(0.6, 0.9)
    ratio = uniform(0.15, 0.32)
    brightness = uniform(0.02, 0.08)
    warm = _color(canvas.rng, OLD_STARS, 0.05)
    blue = _color(canvas.rng, (0.95, 1.0, 1.1), 0.05)
    canvas.spiral(center, width, brightness, angle, ratio, warm, blue)
    radius = width / 2
    rounder = uniform(0.4, 0.6)
    r = canvas.distance(center, angle, rounder) / radius
    halo = uniform(0.1, 0.4) * brightness
    lengths = uniform(2.5, 4)
    canvas.shine(halo * np.exp(lengths * (1 - r)), warm)
    x, y = center
    companions = np.zeros(canvas.shape)
    for _ in range(2):
        beside = canvas.sign() * uniform(0.5, 1) * ratio * radius
        along = uniform(-0.5, 0.5) * radius
        place_x = x + along * np.cos(angle) - beside * np.sin(angle)
        place_y = y + along * np.sin(angle) + beside * np.cos(angle)
        size = uniform(0.02, 0.06)
        strength = uniform(0.03, 0.1)
        canvas.add_elliptical(companions, (place_x, place_y), size, strength)
    canvas.shine(companions, warm)


def _three_panels(canvas):
    """A mosaic of three nights: each panel has its own sky, color and depth, and hangs askew.

    The steps are part of the true sky, though no smooth surface can follow them.
    """
    uniform = canvas.uniform
    canvas.tilt(0.2, 0.7)
    across, half, other, reach = canvas.x, canvas.half_x, canvas.y, canvas.half_y
    if canvas.chance(0.3):
        across, half, other, reach = other, reach, across, half
    thirds = half * np.array([-1, 1]) / 3
    seams = thirds + half * uniform(-0.06, 0.06, 2)
    leans = uniform(-0.04, 0.04, 2)
    blended = canvas.log_uniform(0.5 / canvas.longer, 0.02)
    beyond = []  # (h, w) each: 0 before a seam, 1 behind it
    for seam, lean in zip(seams, leans):
        steps = (across + lean * other - seam) / blended
        beyond.append(np.clip(steps + 0.5, 0, 1))
    first, second = beyond
    exposures = 0
    staggered = canvas.chance(0.5)
    strongest = uniform(0.3, 0.7) * canvas.span()
    for weight in (1 - first, first - second, second):
        slopes = canvas.rng.normal(0, 0.5, 2)
        panel = 1 + slopes[0] * across / half + slopes[1] * other / reach
        amount = strongest * uniform(0.2, 1)
        color = _color(canvas.rng, canvas.sky_color, 0.4)
        canvas.sky_parts.append((weight * panel, amount * color))
        seen = np.ones(canvas.shape)
        if staggered:
            upper = uniform(0, 0.06)
            lower = uniform(0, 0.06)
            is_seen = (other > upper - reach) & (other < reach - lower)
            seen = seen * is_seen
        exposures = exposures + weight * seen * uniform(0.4, 1)
    canvas.exposures = exposures
    if canvas.chance(0.6):
        coverage = uniform(0.1, 0.35)
        brightness = canvas.log_uniform(0.2, 1)
        canvas.nebula(coverage, brightness)
    else:
        canvas.random_galaxy(
            within=0.6,
            width=(0.1, 0.3),
            brightness=(0.03, 0.1),
        )
    canvas.small_galaxies()


def _h_alpha_edge(canvas):
    """Red hydrogen from edge to edge over 60 to 90 % of the frame, on a gradient."""
    uniform = canvas.uniform
    canvas.tilt(0.3, 1.0)
    if canvas.chance(0.4):
        canvas.city_glow(0.2, 0.5)
    slope = uniform(3.0, 3.8)
    field = canvas.fractal(slope)
    angle = uniform(0, 2 * np.pi)
    toward, _ = canvas.turned(angle)
    field = field + uniform(0, 2) * toward
    coverage = uniform(0.6, 0.9)
    brightness = uniform(0.3, 1.5)
    brightness = brightness * canvas.span()
    hydrogen = 2.4, 0.35, 0.25
    canvas.filaments(field, coverage, brightness, hydrogen=hydrogen, oxygen=0)
    canvas.star_count = canvas.log_uniform(500, 3000)


def _ultrawide(canvas):
    """The Milky Way through an ultrawide lens: an arch with its bulge and rift, no landscape.

    The sky brightens to the horizon, which is not in the frame; a town shines there, and the lens
    darkens the corners.
    """
    uniform = canvas.uniform
    side = canvas.rng.integers(0, 4)
    inward, _ = canvas.from_edge(side)
    length = uniform(0.2, 0.6)
    amount = uniform(0.3, 1.2)
    canvas.brighten(np.exp(-inward / length), amount)
    canvas.city_glow(0.2, 0.8)
    canvas.tilt(0.05, 0.3)
    canvas.dim_corners(0.15, 0.5)

    across, angle, _ = canvas.random_band()
    along, _ = canvas.turned(angle)
    bend = uniform(-0.35, 0.35)
    across = across + bend * along ** 2
    bulge_at = uniform(-0.5, 0.5)
    from_bulge = (along - bulge_at) / uniform(0.12, 0.25)
    bulge = _gaussian(from_bulge)
    width = uniform(0.05, 0.1)
    width = width * (1 + uniform(0.3, 1) * bulge)
    wings = 1 / (1 + (across / width) ** 2) ** 1.5
    patches = np.exp(uniform(0.2, 0.5) * canvas.fractal(3))
    clouds = wings * (0.4 + 0.6 * bulge) * patches
    rift = across / width - uniform(-0.2, 0.2)
    fingers = 0.8 * canvas.fractal(2.9)
    dust = _above(fingers + 1.2 * np.exp(-(rift / 0.35) ** 2), 0.5)
    clouds *= np.exp(-uniform(0.8, 2) * dust)
    peak = uniform(0.3, 1.2)
    clouds = _with_peak(clouds, peak)
    canvas.shine(clouds, (1.1, 1.0, 0.85), 0.07)
    canvas.star_count = uniform(2500, 6000)
    canvas.star_density = 0.25 + 0.75 * np.clip(clouds / peak, 0, 1)


def _supernova_remnant(canvas):
    """Thin sheets of gas in a torn ring, red and teal, over most of the frame."""
    rng = canvas.rng
    uniform = canvas.uniform
    canvas.tilt(0.2, 0.8)
    if canvas.chance(0.4):
        canvas.city_glow(0.2, 0.5)
    center = canvas.place(0.25)
    radius = uniform(0.2, 0.45)
    r = canvas.random_distance(center, 0.75) / radius
    fields = []
    for _ in range(4):
        slope = uniform(2.8, 3.4)
        fields.append(canvas.fractal(slope))
    fields = np.array(fields)  # (4, h, w); each mixture of them is another one
    span = canvas.span()
    for hydrogen in True, False:
        sheets = 0
        for _ in range(rng.integers(10, 25)):
            dents, holes = rng.normal(0, 0.5, (2, 4))
            dented = r + uniform(0.03, 0.12) * np.tensordot(dents, fields, 1)
            size = uniform(0.7, 1.05)
            thickness = canvas.log_uniform(0.003, 0.03)
            beside = (dented - size) / thickness
            # A shell seen from outside: it ends sharply outward and fades inward.
            sheet = np.where(beside > 0, _gaussian(beside), np.exp(beside / 3))
            torn = _above(np.tensordot(holes, fields, 1), uniform(0, 1))
            sheets = sheets + sheet * torn
        inside = _gaussian(_above(r, 0.9) / 0.06)
        wisps = _above(canvas.fractal(2.8), 0)
        gas = sheets + uniform(0.02, 0.1) * inside * wisps
        brightness = uniform(0.3, 1.5) * span
        color = RED if hydrogen else TEAL
        canvas.shine(_with_peak(gas, brightness), color, 0.1)
    canvas.star_count = canvas.log_uniform(500, 3000)


def _planetary_nebula(canvas):
    """A bright teal bubble in a red rim, and its faint torn halo over much of the frame."""
    uniform = canvas.uniform
    canvas.tilt(0.2, 0.8)
    center = canvas.place(0.3)
    angle = uniform(0, np.pi)
    ratio = uniform(0.6, 1)
    radius = uniform(0.03, 0.1)
    r = canvas.distance(center, angle, ratio) / radius
    r = r * (1 + 0.06 * canvas.fractal(3.2))
    texture = np.exp(0.25 * canvas.fractal(2.6))
    edge = uniform(0.05, 0.12)
    filled = 1 / (1 + np.exp((r - 0.85) / edge))
    hollow = 1 - uniform(0.2, 0.7) * _gaussian(r / 0.4)
    brightness = canvas.log_uniform(0.5, 6)
    canvas.shine(brightness * filled * hollow * texture, TEAL, 0.15)
    along, _ = canvas.turned(angle, center)
    ends = 1 + uniform(0, 1) * np.abs(along / radius) / np.maximum(r, 0.3)
    rim = _gaussian((r - 1) / uniform(0.1, 0.25))
    strength = uniform(0.3, 1)
    canvas.shine(brightness * strength * rim * ends * texture, RED, 0.15)

    shell = uniform(3, 7)
    torn = np.exp(0.7 * canvas.fractal(3))
    out = r / shell
    halo = np.exp(-out ** 2) + uniform(0, 1.5) * _gaussian((out - 0.9) / 0.12)
    faint = uniform(0.02, 0.15)
    canvas.shine(faint * halo * torn, (1.4, 0.85, 0.75), 0.15)
    canvas.small_galaxies()


def _corner_star(canvas):
    """A glow in a corner, and right beside it a bright star or a galaxy."""
    uniform = canvas.uniform
    canvas.tilt(0.2, 0.7)
    side_x, side_y = canvas.rng.choice((-1, 1), 2)
    corner = side_x * canvas.half_x, side_y * canvas.half_y
    r = canvas.random_distance(corner, 0.6) / uniform(0.06, 0.2)
    glow = _exponential(r, 0.3) if canvas.chance(0.6) else _gaussian(r)
    amount = uniform(0.3, 2)
    canvas.brighten(glow, amount)
    beside = corner - np.array([side_x, side_y]) * uniform(0.03, 0.18, 2)
    if canvas.chance(0.6):
        slope = uniform(2, 3)
        fwhm = uniform(1.5, 2.5) / canvas.longer
        canvas.bright_star(beside, slope, fwhm)
    else:
        width = uniform(0.04, 0.12)
        brightness = uniform(0.03, 0.12)
        canvas.galaxy(beside, width, brightness)
    canvas.small_galaxies()


def _near_moon(canvas):
    """A deep picture beside the moon: it stands just outside the frame, in its bright aureole."""
    uniform = canvas.uniform
    canvas.level = canvas.log_uniform(0.008, 0.03)
    canvas.noise_fraction = canvas.log_uniform(0.004, 0.02)
    outside = uniform(0.03, 0.25)
    moon = canvas.at_edge(outside)
    r = canvas.distance(moon)
    blunt = uniform(0.05, 0.15)  # its disk, haze, and the optics
    power = uniform(0.8, 1.6)
    aureole = (r ** 2 + blunt ** 2) ** (-power / 2)  # light scattered forward
    amount = uniform(2, 8)
    canvas.brighten(aureole, amount, spread=0.1)
    amount = uniform(0.3, 1)
    canvas.brighten(-r, amount, spread=0.2)  # light scattered by the air, all over the sky
    if canvas.chance(0.6):
        canvas.random_galaxy(
            within=0.5,
            width=(0.1, 0.3),
            brightness=(0.03, 0.1),
        )
    canvas.small_galaxies()


def _crowded(canvas):
    """Toward the galactic center: stars upon stars, dust lanes, and light of stars too faint."""
    uniform = canvas.uniform
    canvas.tilt(0.3, 1.0)
    if canvas.chance(0.4):
        canvas.city_glow(0.2, 0.5)
    coverage = uniform(0.2, 0.5)
    depth = canvas.optical_depth(coverage)
    patches = np.exp(0.2 * canvas.fractal(3))
    seen = patches * np.exp(-depth)
    brightness = uniform(0.05, 0.4)
    canvas.shine(_with_peak(seen, brightness), (1.2, 1.0, 0.75), 0.07)
    canvas.star_count = canvas.log_uniform(8000, 20000)
    crowds = seen / seen.max()
    canvas.star_density = 0.05 + 0.95 * np.sqrt(crowds)
    if canvas.chance(0.4):
        center = canvas.place(0.7)
        width = uniform(0.03, 0.1)
        glow = canvas.blob(center, width, 1.2)
        glow = glow * np.exp(0.5 * canvas.fractal(2.8))
        brightness = uniform(0.2, 1)
        canvas.shine(glow * brightness, RED, 0.1)


def _rim(canvas):
    """A dark rim that is not 0 around the picture, or beside it; it is not valid.

    The strips of a sensor that sees no light, edges that registration leaves, or the corners of a
    turned frame: 1 to 80 pixels on one to four sides, or a frame turned by up to 45 degrees; at 0
    to 80 % of the dark end of the sky, with its own noise and a hard or soft edge.
    """
    uniform = canvas.uniform
    canvas.tilt(0.2, 1.0)
    if canvas.chance(0.5):
        canvas.city_glow(0.2, 0.6)
    if canvas.chance(0.5):
        canvas.random_galaxy(
            within=0.5,
            width=(0.05, 0.25),
            brightness=(0.03, 0.1),
        )
    elif canvas.chance(0.5):
        coverage = uniform(0.1, 0.3)
        brightness = canvas.log_uniform(0.2, 1)
        canvas.nebula(coverage, brightness)
    canvas.small_galaxies()

    depth = np.inf  # (h, w) pixels inside the picture, negative in the rim
    if canvas.chance(0.3):
        degrees = uniform(1, 45)
        angle = canvas.sign() * np.deg2rad(degrees)
        along, across = canvas.turned(angle)
        beside = canvas.half_x - np.abs(along)
        below = canvas.half_y - np.abs(across)
        depth = np.minimum(beside, below) * canvas.longer
    else:
        most = 0.1 * min(canvas.shape)
        sides = canvas.rng.permutation(4)
        count = canvas.rng.integers(1, 5)
        for side in sides[:count]:
            inward, _ = canvas.from_edge(side)
            width = canvas.log_uniform(1, 80)
            width = round(min(width, most))
            inward = inward * canvas.longer
            depth = np.minimum(depth, inward - width)
    soft = uniform(1, 8) if canvas.chance(0.5) else 1e-6
    inside = np.clip(1 + depth / soft, 0, 1)
    level = np.full(canvas.shape, uniform(0, 0.8))
    if canvas.chance(0.4):  # fewer and fewer frames reach out there
        fading = uniform(10, 100)
        level = level * np.exp(np.minimum(depth, 0) / fading)
    noise = canvas.log_uniform(0.05, 2)
    canvas.rim = inside, level, noise
