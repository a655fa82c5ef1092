"""Pictures for the tests: synthetic linear astrophotos with a known sky, and files of them.

A background model is only right or wrong against a known sky: a fit with a lower loss can be the
falser one (it has dug into the galaxy). So every scene here is made of three parts that are kept
apart until the end,

    image = pedestal + sky + light of the objects + noise    (0 in the registration border: missing)

and the test or bench compares a model with `pedestal + sky` alone.

    scene = make_scene("galaxy", seed=3, height=400, width=600, channels=3, border=True)
    rms, p999 = score(model, scene)          # both in percent
    kept, ring = object_score(model, scene)  # both in percent
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

FAMILIES = (
    "galaxy", "nebula", "city_glows", "airglow", "dust", "moon", "hills", "stars", "flat",
    "big_nebula", "full_object", "short_stack", "milky_way", "large_galaxy", "clipped", "mosaic",
    "edge_nebula", "amp_glow", "cluster", "vignetting", "star_halos", "narrowband", "pedestal",
    "plane_galaxy",
)


@dataclass
class Scene:
    """One picture and what is true about it."""
    image: np.ndarray  # (h, w, c) float32, linear, in [0, 1]; exactly 0 in the border = missing
    sky: np.ndarray  # (h, w, c) float64, the true background with the pedestal, everywhere
    valid: np.ndarray  # (h, w) bool, True inside the border
    object_mask: np.ndarray  # (h, w) bool, True where objects add over half the pixel noise
    light: np.ndarray  # (h, w, c) float32, extended objects' part of the image: no stars, no noise
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
    canvas = _Canvas(family, seed, height, width)
    paint = globals()["_" + family]
    paint(canvas)
    return canvas.finish(channels, border)


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
    low, high = np.percentile(scene.sky[scene.valid], (1, 99), axis=0)  # (c,)
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
        truth = scene.sky[..., k][scene.valid]
        found = model[..., k][scene.valid]
        error = found.astype(np.float64) - truth
        errors.append((error - np.median(error)) * (100 / unit))
    errors = np.abs(errors)  # (c, valid pixels)
    rms = np.sqrt(np.mean(errors ** 2))
    return float(rms), float(np.percentile(errors, 99.9))


def object_score(model, scene):
    """What a model does to the extended objects -> (light kept, ring error), in percent, or NaN.

    An object's pixels are those where its light is over half the pixel noise. The light kept is
    100 % less the share of their light that the model has taken for sky; over 100 % it has dug a
    hole. The ring error is the rms of model - truth within RING of them, in units of the sky's
    range. For both, the median of model - truth over the pixels without objects is taken off. NaN
    where there is next to no extended light, or next to no pixel without.
    """
    error = np.asarray(model, np.float64) - scene.sky  # (h, w, c)
    background = scene.valid & ~scene.object_mask  # (h, w)
    bright = scene.light > 0.5 * scene.noise
    core = bright & scene.valid[..., None]  # (h, w, c)
    touched = core.any(axis=2)  # (h, w)
    present = scene.valid.sum()
    if touched.sum() < OBJECT_SHARE * present:
        return np.nan, np.nan
    if background.sum() < BACKGROUND_SHARE * present:
        return np.nan, np.nan

    error -= np.median(error[background], axis=0)
    there = scene.light[core].sum(dtype=np.float64)
    kept = 100 * (1 - error[core].sum() / there)

    distance = ndimage.distance_transform_edt(~touched)  # (h, w) pixels
    near = distance <= RING * max(touched.shape)
    ring = near & ~touched & scene.valid
    if not ring.any():
        return kept, np.nan
    relative = error[ring] / score_unit(scene)
    return kept, 100 * np.sqrt(np.mean(relative ** 2))


def sloping_sky(height=96, width=144, channels=3, noise=0.0005, seed=1):
    """A simple picture and its sky, (h, w, c) each: a bent slope a channel, noise, a few stars."""
    rng = np.random.default_rng(seed)
    y, x = (np.indices((height, width)) + 0.5) / max(height, width)
    slopes = (0.04, 0.03), (-0.02, 0.04), (0.03, -0.03)
    planes = []
    for k, (a, b) in enumerate(slopes[:channels]):
        level = 0.05 + 0.02 * k
        planes.append(level + a * x + b * y + 0.03 * (x - 0.4) ** 2)
    sky = np.stack(planes, axis=-1)
    image = sky + rng.normal(0, noise, sky.shape)
    rows = rng.integers(0, height, 40)
    columns = rng.integers(0, width, 40)
    image[rows, columns] += 0.4
    return image.astype(np.float32), sky


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------

_BESIDE = [folder / "shared" / "real" for folder in Path(__file__).resolve().parents]
_FOUND = next(filter(Path.is_dir, _BESIDE), _BESIDE[0])

REAL = Path(os.environ.get("BGOPTIMIZER_REAL") or _FOUND)
"""Files of cameras and of PixInsight. They are no part of the project; where they are not, the
tests of them are skipped."""


def to_planes(image):
    """(h, w, c), as the tests have pictures -> (c, h, w), as the stages take them."""
    return np.ascontiguousarray(np.moveaxis(image, -1, 0))


def save(path, image):
    """Write (h, w, c) floats as XISF; returns the path as text."""
    with open(path, "wb") as file:
        bgoptimizer.write_xisf(file, to_planes(image))
    return str(path)


def load(path):
    """Read an XISF file -> (h, w, c)."""
    picture = bgoptimizer.read_xisf(str(path))
    return np.moveaxis(picture.planes, 0, -1)


# ------------------------------------------------------------------------------------------------
# The canvas
# ------------------------------------------------------------------------------------------------

NEUTRAL = np.ones(3)

FRACTAL_SIZE = 1536
"""Samples along a fractal's side. It is fixed, so that a seed has one texture at every scale."""

FRACTAL_CROP = 1152
"""Samples along the frame's longer side. The rest is cut off: an FFT's edges wrap around."""

RED = 1.9, 0.55, 0.55
"""Hydrogen's light, relative to the mean of the colors."""

TEAL = 0.4, 1.25, 1.35
"""The light of doubly ionized oxygen."""

OLD_STARS = 1.2, 1.0, 0.75
YOUNG_STARS = 0.85, 1.0, 1.1
DUST = 1.1, 1.0, 0.9


def _color(rng, around, spread):
    """A color (3,) near `around`, each channel off by up to `spread` (a fraction)."""
    return np.asarray(around) * rng.uniform(1 - spread, 1 + spread, 3)


def _log_uniform(rng, low, high):
    """A random number between two; each factor is as likely as any other."""
    return np.exp(rng.uniform(np.log(low), np.log(high)))


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
        streams = [np.random.default_rng([stable, seed, stream]) for stream in range(5)]
        self.rng, self.texture_rng, self.star_rng = streams[:3]
        self.pixel_rng, self.border_rng = streams[3:]

        self.longer = max(height, width)
        columns = np.arange(width) + 0.5 - width / 2
        rows = np.arange(height) + 0.5 - height / 2
        self.x = (columns / self.longer)[None, :]
        self.y = (rows / self.longer)[:, None]
        self.half_x = width / 2 / self.longer
        self.half_y = height / 2 / self.longer

        rng = self.rng
        # Of the sky over the pedestal, as a part of full scale
        self.level = _log_uniform(rng, 0.01, 0.1)
        pedestal = rng.uniform(0.005, 0.02)
        self.pedestal = pedestal * rng.uniform(0.95, 1.05, 3)
        self.sky_color = _color(rng, NEUTRAL, 0.25)
        # A deep stack has 1-4 % of the sky as noise in a pixel; one picture in four is a few
        # short exposures.
        few_exposures = rng.random() < 0.25
        low, high = (0.04, 0.10) if few_exposures else (0.01, 0.04)
        self.noise_fraction = rng.uniform(low, high)
        # Part of the sky noise's variance that light does not change
        self.read_share = rng.uniform(0.1, 0.5)
        # (h, w) or None: dims sky and objects, not the pedestal
        self.vignette = None
        # [((h, w) map, (3,) color)]; star_parts are cores of stars, which are not extended light
        self.sky_parts, self.light_parts, self.star_parts = [], [], []
        # ((h, w) coverage, (h, w) brightness, (3,) color) or None
        self.hill = None
        # At 400 x 600 pixels
        self.star_count = _log_uniform(rng, 100, 900)
        # (h, w) relative chance of a star, or None: even
        self.star_density = None
        self.halo_count = rng.integers(0, 4)
        # Of the frames in the picture where it is large, in radians; None: a little at random
        self.turn = None
        # Pixel noises from 0 to the darkest sky, in a picture clipped at 0; None: not clipped
        self.headroom = None

    # -- maps (h, w) over the frame

    def turned(self, x, y, angle):
        """Coordinates (h, w) from (x, y) along and across `angle`."""
        dx, dy = self.x - x, self.y - y
        cos, sin = np.cos(angle), np.sin(angle)
        return dx * cos + dy * sin, dy * cos - dx * sin

    def distance(self, x, y, angle=0.0, ratio=1.0):
        """Elliptical distance from (x, y); `ratio` <= 1 shortens the axis across `angle`."""
        along, across = self.turned(x, y, angle)
        return np.hypot(along, across / ratio)

    def random_distance(self, x, y, flattest):
        """The same at a random angle, with a ratio from `flattest` to 1."""
        angle = self.rng.uniform(0, np.pi)
        ratio = self.rng.uniform(flattest, 1)
        return self.distance(x, y, angle, ratio)

    def place(self, spread):
        """A random point in the middle `spread` (0-1) of the frame."""
        u, v = self.rng.uniform(-spread, spread, 2)
        return u * self.half_x, v * self.half_y

    def at_edge(self, outside):
        """A random point on the frame's edge, moved out by `outside` times the half frame."""
        angle = self.rng.uniform(0, 2 * np.pi)
        u, v = np.cos(angle), np.sin(angle)
        reach = (1 + outside) / max(abs(u), abs(v))
        return u * reach * self.half_x, v * reach * self.half_y

    def random_band(self):
        """A line through the frame's middle part -> (distance from it (h, w), angle, offset)."""
        angle = self.rng.uniform(0, np.pi)
        offset = self.rng.uniform(-0.15, 0.15)
        _, across = self.turned(0, 0, angle)
        return across - offset, angle, offset

    def blob(self, x, y, width, soft=2.0):
        """A smooth cloud (h, w): 1 at its top, half that `width` across; a Gaussian if soft = 2."""
        r = self.random_distance(x, y, 0.5) / (width / 2)
        return np.exp(-np.log(2) * r ** soft)

    def fractal(self, slope, stretch=1.0):
        """A random texture with power ~ frequency^-slope; mean 0, standard deviation 1."""
        n = FRACTAL_SIZE
        fy = np.fft.fftfreq(n)[:, None]
        fx = np.fft.rfftfreq(n)[None, :]
        frequency = np.hypot(fy * stretch, fx)  # (n, n // 2 + 1)
        frequency[0, 0] = np.inf  # no mean
        white = self.texture_rng.standard_normal((n, n))
        spectrum = np.fft.rfft2(white) * frequency ** (-slope / 2)
        texture = np.fft.irfft2(spectrum, (n, n)).astype(np.float32)

        rows = (self.y + 0.5) * (FRACTAL_CROP - 1)
        columns = (self.x + 0.5) * (FRACTAL_CROP - 1)
        places = np.broadcast_arrays(rows, columns)
        out = ndimage.map_coordinates(texture, places, order=1)
        return (out - out.mean()) / out.std()

    # -- sky

    def brighten(self, shape, amount, spread=0.4):
        """Add `shape` (h, w), scaled to 0..1 over the frame, times `amount`, in its own color."""
        low, high = shape.min(), shape.max()
        scaled = (shape - low) / (high - low)
        color = _color(self.rng, self.sky_color, spread)
        self.sky_parts.append((scaled, amount * color))

    def tilt(self, low=0.2, high=1.0, curvature=0.25):
        """A tilted plane, a little bent, as most skies are; `low` to `high` sky levels strong."""
        rng = self.rng
        angle, bend_angle = rng.uniform(0, 2 * np.pi, 2)
        plane, _ = self.turned(0, 0, angle)
        bend, _ = self.turned(0, 0, bend_angle)
        curve = rng.uniform(-curvature, curvature) * bend ** 2 * 2
        self.brighten(plane + curve, rng.uniform(low, high))

    def city_glow(self, low=0.2, high=0.8):
        """The glow of a town beyond a random edge: a blunt exponential or a Gaussian."""
        rng = self.rng
        x, y = self.at_edge(rng.uniform(-0.05, 0.25))
        r = self.random_distance(x, y, 0.5) / rng.uniform(0.2, 0.5)
        if rng.random() < 0.5:
            glow = np.exp(-np.sqrt(r ** 2 + 0.3 ** 2))  # no cusp: air has scattered it away
        else:
            glow = np.exp(-r ** 2 / 2)
        self.brighten(glow, rng.uniform(low, high))

    def dim_corners(self, low, high):
        """What flat fielding has left of the vignetting: corners darker by `low` to `high`."""
        rng = self.rng
        x, y = self.place(0.15)
        corner = np.hypot(self.half_x, self.half_y)
        r2 = (self.distance(x, y) / corner) ** 2
        depth = rng.uniform(low, high)
        self.vignette = 1 - depth * r2 ** rng.uniform(1, 1.6)

    def gradient(self):
        """The sky so far, over its even level (h, w), in units of the level, mean of the colors."""
        return sum(shape * color.mean() for shape, color in self.sky_parts)

    # -- objects

    def shine(self, light, color):
        """Add object light (h, w), in units of the sky level."""
        light = np.asarray(light, np.float32)
        self.light_parts.append((light, np.asarray(color, np.float64)))

    def galaxy(self, x, y, width, brightness):
        """A spiral or an elliptical, `width` across where it has `brightness`, fainter beyond."""
        rng = self.rng
        angle = rng.uniform(0, np.pi)
        ratio = rng.uniform(0.3, 0.95)
        warm = _color(rng, OLD_STARS, 0.1)
        blue = _color(rng, YOUNG_STARS, 0.1)
        if rng.random() < 0.35:
            r = self.distance(x, y, angle, ratio) / (width / 2)
            n = rng.uniform(1.5, 3)
            steep = rng.uniform(4.5, 6.0)
            self.shine(brightness * _sersic(r, n, steep), warm)
        else:
            self.spiral(x, y, width, brightness, angle, ratio, warm, blue)

    def spiral(self, x, y, width, brightness, angle, ratio, warm, blue):
        """A spiral galaxy: a disk with arms and clumps in `blue`, a bulge in `warm`."""
        rng = self.rng
        r = self.distance(x, y, angle, ratio) / (width / 2)
        lengths = rng.uniform(3.0, 4.5)  # scale lengths of the disk out to r = 1
        disk = brightness * np.exp(lengths * (1 - r))
        along, across = self.turned(x, y, angle)
        theta = np.arctan2(across / ratio, along)
        pitch = rng.uniform(0.25, 0.6)
        winding = np.log(r + 0.05) * 2 / np.tan(pitch)
        phase = theta * 2 - winding * rng.choice((-1, 1))
        outside_bulge = np.clip(r / 0.25, 0, 1)  # no arms and no clumps in the bulge
        contrast = rng.uniform(0.2, 0.6) * outside_bulge
        arms = 1 + contrast * np.cos(phase + 0.5 * self.fractal(2.5))
        clumps = np.exp(0.35 * outside_bulge * self.fractal(2.5) - 0.06)
        self.shine(disk * arms * clumps, blue)

        peak = brightness * rng.uniform(20, 150)
        blunt = np.sqrt(r ** 2 + 0.01 ** 2)
        core = peak * np.exp(-blunt / rng.uniform(0.05, 0.1))
        self.shine(core, warm)

    def nebula(self, coverage, brightness, sharpness=0.15):
        """An irregular nebula over `coverage` of the frame; its brightest 1 % has `brightness`."""
        rng = self.rng
        x, y = self.place(0.5 * (1 - coverage))
        r = self.random_distance(x, y, 0.6)
        ragged = rng.uniform(0.7, 1.3)
        field = -r / 0.2 + ragged * self.fractal(rng.uniform(2.9, 4.0))
        self.filaments(field, coverage, brightness, sharpness)

    def filaments(self, field, coverage, brightness, sharpness=0.15):
        """Light with filaments where `field` (h, w) is in its highest `coverage` (0-1)."""
        rng = self.rng
        edge = np.quantile(field, 1 - coverage)
        inside = np.clip(field - edge, 0, None)
        # It fades to nothing at its edge, from crisp to very soft.
        body = inside ** rng.uniform(1.0, 2.5)
        ridges = np.abs(self.fractal(rng.uniform(2.8, 3.3)))
        filaments = np.exp(-ridges / sharpness) * rng.uniform(0.5, 2.0)
        knots = np.exp(0.5 * self.fractal(rng.uniform(2.6, 3.2)))
        red = _color(rng, RED, 0.15)
        teal = _color(rng, TEAL, 0.15)
        glow = body * knots * (1 + filaments)
        glow *= brightness / np.quantile(glow, 0.99)
        self.shine(glow, red)
        if rng.random() < 0.6:  # doubly ionized oxygen or reflected starlight
            core = body ** 1.5 * np.exp(0.6 * self.fractal(2.8))
            peak = brightness * rng.uniform(0.15, 0.6)
            self.shine(core * (peak / np.quantile(core, 0.99)), teal)

    def small_galaxies(self):
        """None to six distant galaxies, as most deep pictures have."""
        rng = self.rng
        for _ in range(rng.integers(0, 7)):
            x, y = self.place(1.0)
            width = rng.uniform(0.004, 0.02)
            ratio = rng.uniform(0.3, 1)
            angle = rng.uniform(0, np.pi)
            r = self.distance(x, y, angle, ratio) / (width / 2)
            light = rng.uniform(0.02, 0.2) * np.exp(3 * (1 - r))
            self.shine(light, _color(rng, DUST, 0.1))

    def add_elliptical(self, light, x, y, width, brightness):
        """Add an elliptical galaxy to `light` (h, w), out to 5 times where it has `brightness`.

        It is drawn in a stamp: a cluster has dozens of them.
        """
        rng = self.rng
        angle = rng.uniform(0, np.pi)
        ratio = rng.uniform(0.55, 1)
        n = rng.uniform(1, 2)
        steep = rng.uniform(3.5, 5)
        columns = np.flatnonzero(np.abs(self.x[0] - x) < 2.5 * width)
        rows = np.flatnonzero(np.abs(self.y[:, 0] - y) < 2.5 * width)
        if not (len(rows) and len(columns)):
            return
        dx = self.x[:, columns] - x
        dy = self.y[rows] - y
        cos, sin = np.cos(angle), np.sin(angle)
        along = dx * cos + dy * sin
        across = dy * cos - dx * sin
        seeing = 0.7 / self.longer  # it blurs the tip
        r = np.sqrt(along ** 2 + (across / ratio) ** 2 + seeing ** 2) / (width / 2)
        profile = np.exp(steep * (1 - r ** (1 / n)))
        rim = np.exp(steep * (1 - 5 ** (1 / n)))
        stamp = brightness * np.clip(profile - rim, 0, None)
        light[np.ix_(rows, columns)] += stamp

    # -- the picture

    def finish(self, channels, border):
        """Put sky, objects, stars and noise together -> Scene."""
        sky = self.sky_over_pedestal(channels)  # (h, w, c)
        typical = np.median(sky[::4, ::4], axis=(0, 1))  # (c,)
        noise = self.noise_fraction * typical  # (c,)
        extended = np.zeros(sky.shape, np.float32)
        self.add(extended, self.light_parts)
        light = extended.copy()
        for k, star_light in enumerate(self.stars(noise.mean(), channels)):
            light[..., k] += star_light
        self.add(light, self.star_parts)
        if self.vignette is not None:
            dimmed = self.vignette[..., None]
            sky *= dimmed
            light *= dimmed.astype(np.float32)
            extended *= dimmed.astype(np.float32)

        object_mask = (light > 0.5 * noise).any(axis=2)
        clean = sky + light
        if self.hill is not None:  # hills stand in front of the sky and of the stars
            cover, brightness, color = self.hill
            dark = brightness[..., None] * (self.level * _seen(color, channels))
            clean += cover[..., None] * (dark - clean)
            extended *= (1 - cover[..., None]).astype(np.float32)
            object_mask |= cover > 0

        coverage = np.ones(self.shape)
        if border or self.turn is not None:
            coverage = self.coverage()
        valid = coverage > 0
        pedestal = _seen(self.pedestal, channels)
        darkest = 1e-6  # not 0: that is what missing means
        if self.headroom is not None:  # too much was subtracted: the dark end is in the noise
            pedestal = self.headroom * noise - sky.min(axis=(0, 1))
            darkest = 0
        grain = self.grain(clean / typical, coverage) * noise
        image = clean + pedestal + grain
        image = np.clip(image, darkest, 1).astype(np.float32)
        image[~valid] = 0
        return Scene(image, sky + pedestal, valid, object_mask, extended, noise,
                     self.family, self.seed)

    def sky_over_pedestal(self, channels):
        """The sky's even level and its parts -> (h, w, c)."""
        sky = np.empty(self.shape + (channels,))
        sky[:] = self.level * _seen(self.sky_color, channels)
        self.add(sky, self.sky_parts)
        return sky

    def add(self, picture, parts):
        """Add maps times colors to a picture (h, w, c), in its own precision."""
        channels = picture.shape[2]
        for shape, color in parts:
            color = self.level * _seen(color, channels)
            picture += shape[..., None] * color.astype(picture.dtype)

    def grain(self, relative, coverage):
        """Noise (h, w, c) of pixels with `relative` light, 1 = typical sky, in units of its noise.

        Photon noise grows with the light; the mean of fewer frames is noisier.
        """
        variance = self.read_share + (1 - self.read_share) * relative
        variance /= np.maximum(coverage, 1e-9)[..., None]
        pixels = self.pixel_rng.standard_normal(relative.shape, np.float32)
        if self.pixel_rng.random() < 0.5:  # registration interpolates: neighbors share noise
            pixels = ndimage.uniform_filter(pixels, (2, 2, 1)) * 2
        return pixels * np.sqrt(variance)

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
        count = int(self.star_count * (height * width / 240000) ** 0.6)
        draws = rng.random((count, 5))  # one row a star: a larger frame only adds rows
        x = draws[:, 0] * width
        y = draws[:, 1] * height
        if self.star_density is not None:
            chance = self.star_density[y.astype(int), x.astype(int)]
            keep = draws[:, 2] < chance
            x, y, draws = x[keep], y[keep], draws[keep]
        peak = 2 * noise * (1 - draws[:, 3]) ** (-1 / slope)
        peak = np.minimum(peak, 4.0)
        brightest = np.argsort(peak)[::-1][:self.halo_count]
        saturated = rng.uniform(1, 6, len(brightest))
        peak[brightest] = np.maximum(peak[brightest], saturated)
        warmth = 0.35 * (draws[:, 4] - 0.5)
        colors = np.stack([1 + warmth, np.ones_like(warmth), 1 - warmth], 1)  # (count, 3)
        colors = [_seen(color, channels) for color in colors]
        colors = np.reshape(colors, (-1, channels))  # (count, c), of none as well

        core = fwhm / 2 / np.sqrt(2 ** (1 / beta) - 1)
        maps = self.star_maps(x, y, peak, colors, noise, core, beta)
        for star in brightest:  # scattered light: wide, faint, and no sky
            scale = rng.uniform(0.005, 0.03)
            strength = rng.uniform(0.05, 0.6) * self.level
            halo_x = x[star] / self.longer - self.half_x
            halo_y = y[star] / self.longer - self.half_y
            halo = strength * np.exp(-self.distance(halo_x, halo_y) / scale)
            for k, star_map in enumerate(maps):
                star_map += halo * colors[star, k]
        return maps

    def star_maps(self, x, y, peak, colors, noise, core, beta):
        """Moffat profiles of stars -> one (h, w) map a channel.

        x, y (n,) are in pixels, colors (n, c). Stars of like size are drawn together in stamps of
        (s, s) pixels.
        """
        height, width = self.shape
        # Pixels from a star to where it has a 20th of the noise
        reach = core * np.sqrt((peak / (0.05 * noise)) ** (1 / beta) - 1)
        flat_maps = [np.zeros(height * width) for _ in range(colors.shape[1])]
        smaller = 0
        for size in (8, 16, 32, 64, 128, 256):
            fits = (reach <= size) | (size == 256)
            group = (reach > smaller) & fits
            smaller = size
            if not group.any():
                continue
            star_x = x[group][:, None, None]
            star_y = y[group][:, None, None]
            offset = np.arange(-size, size + 1)
            columns = star_x.astype(int) + offset[None, None, :]  # (n, 1, s)
            rows = star_y.astype(int) + offset[None, :, None]  # (n, s, 1)
            r2 = (columns + 0.5 - star_x) ** 2 + (rows + 0.5 - star_y) ** 2  # (n, s, s)
            rim = (1 + (size / core) ** 2) ** -beta
            profile = (1 + r2 / core ** 2) ** -beta - rim  # ends at 0: no square rims
            profile = np.clip(profile, 0, None) * peak[group][:, None, None]
            in_width = (columns >= 0) & (columns < width)
            in_height = (rows >= 0) & (rows < height)
            inside = in_width & in_height  # (n, s, s)
            index = (rows * width + columns)[inside]
            for k, flat in enumerate(flat_maps):
                color = colors[group, k][:, None, None]
                light = (profile * color)[inside]
                flat += np.bincount(index, light, minlength=flat.size)
        return [flat.reshape(height, width) for flat in flat_maps]

    def coverage(self):
        """Share (h, w), 0 to 1, of the stacked frames, a little shifted and turned, on a pixel."""
        rng = self.border_rng
        drift = rng.uniform(0, 2 * np.pi)
        direction = np.array([np.cos(drift), np.sin(drift)])
        shift = rng.uniform(0.012, 0.025) * direction
        turn = rng.uniform(-0.012, 0.012)
        if self.turn is not None:
            turn += self.turn
        if rng.random() < 0.4:  # the hard edge of a stack cropped to its reference
            frames, wander, wobble = 1, 0, 0
        else:
            frames, wander, wobble = 6, 0.008, 0.004
        covered = np.zeros(self.shape)
        for _ in range(frames):
            x, y = shift + rng.uniform(-wander, wander, 2)
            angle = turn + rng.uniform(-wobble, wobble)
            along, across = self.turned(x, y, angle)
            in_width = np.abs(along) <= self.half_x
            covered += in_width & (np.abs(across) <= self.half_y)
        return covered / frames


def _sersic(r, n, steep):
    """Sersic's profile of index `n`, 1 at r = 1 and exp(steep) in the middle, where it is blunt."""
    blunt = np.sqrt(r ** 2 + 0.005 ** 2)
    return np.exp(steep * (1 - blunt ** (1 / n)))


# ------------------------------------------------------------------------------------------------
# The families
# ------------------------------------------------------------------------------------------------

def _galaxy(canvas):
    """A large galaxy, its outskirts fading into a tilted sky."""
    rng = canvas.rng
    canvas.tilt(0.2, 1.0)
    x, y = canvas.place(0.35)
    canvas.galaxy(x, y, width=rng.uniform(0.15, 0.35), brightness=rng.uniform(0.02, 0.08))
    if rng.random() < 0.4:  # a companion
        x, y = canvas.place(0.8)
        canvas.galaxy(x, y, width=rng.uniform(0.03, 0.07), brightness=rng.uniform(0.03, 0.1))
    canvas.small_galaxies()


def _nebula(canvas):
    """An emission nebula over about a third of the frame, between the glows of two towns."""
    rng = canvas.rng
    canvas.city_glow()
    canvas.city_glow()
    coverage = rng.uniform(0.25, 0.40)
    canvas.nebula(coverage, _log_uniform(rng, 0.3, 3))


def _city_glows(canvas):
    """Two or three towns and vignetting; few objects."""
    for _ in range(canvas.rng.integers(2, 4)):
        canvas.city_glow(0.3, 1.0)
    canvas.dim_corners(0.1, 0.45)
    canvas.small_galaxies()


def _airglow(canvas):
    """A wavy band across the frame and a small bright glow in one corner."""
    rng = canvas.rng
    angle = rng.uniform(0, np.pi)
    offset = rng.uniform(-0.2, 0.2)
    along, across = canvas.turned(0, 0, angle)
    height = rng.uniform(0.02, 0.07)
    length = rng.uniform(0.5, 1.1)
    wave = np.sin(2 * np.pi * along / length + rng.uniform(0, 6.28))
    across = across - offset + height * wave
    band = np.exp(-across ** 2 / 2 / rng.uniform(0.08, 0.2) ** 2)
    canvas.brighten(band, rng.uniform(0.15, 0.5))

    side_x, side_y = rng.choice((-1, 1), 2)
    corner_x = side_x * canvas.half_x * rng.uniform(0.95, 1.1)
    corner_y = side_y * canvas.half_y * rng.uniform(0.95, 1.1)
    r = canvas.distance(corner_x, corner_y) / rng.uniform(0.10, 0.15)
    canvas.brighten(np.exp(-r ** 2 / 2), rng.uniform(0.4, 1.5))
    canvas.tilt(0.05, 0.3)
    canvas.small_galaxies()


def _dust(canvas):
    """Faint dust lit by the Milky Way over most of the frame; the truth is the sky without it."""
    rng = canvas.rng
    if rng.random() < 0.5:
        canvas.city_glow(0.3, 0.8)
    canvas.tilt(0.3, 0.8)
    slope = rng.uniform(2.6, 3.3)
    cirrus = canvas.fractal(slope, stretch=rng.uniform(0.6, 1.6))
    wisps = np.exp(-np.abs(canvas.fractal(2.8)) / 0.3)
    clear = np.quantile(cirrus, rng.uniform(0.1, 0.35))
    cirrus = np.clip(cirrus - clear, 0, None) ** 1.3 * (1 + 0.6 * wisps)
    peak = rng.uniform(0.1, 0.3) * np.ptp(canvas.gradient())
    cirrus *= peak / np.quantile(cirrus, 0.99)
    canvas.shine(cirrus, _color(rng, DUST, 0.1))
    canvas.small_galaxies()


def _moon(canvas):
    """Moonlight from beyond a side or corner: the brightest sky 6 to 10 times the darkest."""
    rng = canvas.rng
    x, y = canvas.at_edge(rng.uniform(0.1, 0.6))
    r = canvas.distance(x, y)
    if rng.random() < 0.5:
        glow = np.exp(-np.sqrt(r ** 2 + 0.1 ** 2) / rng.uniform(0.25, 0.5))
    else:
        glow = np.exp(-(r / rng.uniform(0.4, 0.7)) ** 2 / 2)
    canvas.level = _log_uniform(rng, 0.008, 0.04)  # the dark end: 8 times that is still linear
    canvas.brighten(glow, rng.uniform(5, 9), spread=0.15)
    if rng.random() < 0.4:
        x, y = canvas.place(0.6)
        canvas.galaxy(x, y, width=rng.uniform(0.06, 0.15), brightness=rng.uniform(0.05, 0.2))
    canvas.small_galaxies()


def _hills(canvas):
    """Dark hills before the lower 10-25 % of a sky that brightens to the horizon.

    One in four is upside down.
    """
    rng = canvas.rng
    upside = -1 if rng.random() < 0.25 else 1
    up = canvas.half_y - upside * canvas.y + 0 * canvas.x  # (h, w) over the frame's lower edge
    reach = 2 * canvas.half_y
    glow = np.exp(-up / (reach * rng.uniform(0.25, 0.6)))
    canvas.brighten(glow, rng.uniform(0.5, 2.0))
    canvas.tilt(0.05, 0.4)
    if rng.random() < 0.5:
        canvas.city_glow(0.2, 0.5)

    # One line of a texture is a skyline.
    ridge = canvas.fractal(rng.uniform(2.6, 3.4))[canvas.shape[0] // 2]  # (w,)
    trees = np.abs(canvas.fractal(1.4)[canvas.shape[0] // 3])  # (w,)
    ridge = ridge - ridge.mean()
    height = rng.uniform(0.10, 0.25)
    bumps = 0.03 * ridge / max(ridge.std(), 1e-9)
    ridge = reach * (height + bumps + rng.uniform(0, 0.006) * trees)
    pixels_below = (ridge[None, :] - up) * canvas.longer
    cover = np.clip(pixels_below + 0.5, 0, 1)  # an edge one pixel soft
    ground = rng.uniform(0.03, 0.5)
    rough = rng.uniform(0.1, 0.5)
    ground = ground * np.exp(rough * canvas.fractal(1.8))
    canvas.hill = cover, ground, _color(rng, (1.0, 1.0, 0.9), 0.2)


def _stars(canvas):
    """A dense Milky Way field: thousands of stars, the unresolved ones a faint band."""
    rng = canvas.rng
    canvas.tilt(0.3, 1.0)
    if rng.random() < 0.5:
        canvas.city_glow(0.2, 0.5)
    canvas.star_count = rng.uniform(2500, 6000)
    angle = rng.uniform(0, np.pi)
    _, across = canvas.turned(0, 0, angle)
    across = across - rng.uniform(-0.2, 0.2)
    band = np.exp(-across ** 2 / 2 / rng.uniform(0.15, 0.35) ** 2)
    band = band * np.exp(0.3 * canvas.fractal(2.8))
    band /= band.max()
    canvas.star_density = 0.5 + 0.5 * band
    light = rng.uniform(0.002, 0.01) * band
    canvas.shine(light, _color(rng, DUST, 0.05))


def _flat(canvas):
    """Nearly nothing to remove: a gradient of 3-25 % of the pixel noise."""
    noise = canvas.noise_fraction
    canvas.tilt(0.03 * noise, 0.25 * noise)
    canvas.small_galaxies()


def _big_nebula(canvas):
    """A nebula over more than 60 % of the frame, on a plane."""
    rng = canvas.rng
    canvas.tilt(0.2, 0.8)
    coverage = rng.uniform(0.6, 0.8)
    canvas.nebula(coverage, _log_uniform(rng, 0.3, 2))


def _full_object(canvas):
    """An object over nearly the whole frame: too little sky to tell."""
    rng = canvas.rng
    canvas.tilt(0.2, 0.6)
    coverage = rng.uniform(0.93, 0.99)
    canvas.nebula(coverage, _log_uniform(rng, 0.3, 2), sharpness=0.3)


def _short_stack(canvas):
    """A few minutes of a smart telescope: a soft nebula in much noise.

    The frame is turned, so that wedges are missing, with and without `border`.
    """
    rng = canvas.rng
    canvas.tilt(0.15, 0.6, curvature=0.5)
    if rng.random() < 0.5:
        canvas.city_glow(0.1, 0.4)
    gradient = canvas.gradient()
    low, middle, high = np.percentile(gradient, (1, 50, 99))
    span = high - low
    canvas.noise_fraction = rng.uniform(0.3, 0.7) * span / (1 + middle)
    canvas.turn = rng.choice((-1, 1)) * np.deg2rad(rng.uniform(5, 12))

    x, y = canvas.place(0.35)
    width = rng.uniform(0.2, 0.45)
    cloud = canvas.blob(x, y, width, rng.uniform(1.4, 2.2))
    for _ in range(rng.integers(1, 4)):
        dx, dy = rng.normal(0, 0.35 * width, 2)
        strength = rng.uniform(0.2, 0.8)
        smaller = width * rng.uniform(0.3, 0.8)
        cloud = cloud + strength * canvas.blob(x + dx, y + dy, smaller)
    uneven = rng.uniform(0.1, 0.35)
    cloud *= np.exp(uneven * canvas.fractal(rng.uniform(3.5, 4.5)))
    is_emission = rng.random() < 0.5
    color = (1.5, 0.75, 0.75) if is_emission else (0.8, 1.0, 1.25)
    peak = rng.uniform(0.3, 1.5) * span
    canvas.shine(cloud * (peak / cloud.max()), _color(rng, color, 0.15))


def _milky_way(canvas):
    """Star clouds cut by dark lanes across half of the frame, and two towns.

    The truth is the sky without the clouds; beyond the band it is seen as it is.
    """
    rng = canvas.rng
    canvas.city_glow(0.3, 0.8)
    canvas.city_glow(0.3, 0.8)
    across, angle, offset = canvas.random_band()
    across = across + 0.04 * canvas.fractal(3.5)
    reach = canvas.half_y * np.abs(np.cos(angle)) + canvas.half_x * np.abs(np.sin(angle))
    width = rng.uniform(0.25, 0.4) * reach  # half of the band's
    band = np.exp(-np.abs(across / width) ** rng.uniform(2.5, 4))
    patchy = rng.uniform(0.3, 0.6)
    clouds = band * np.exp(patchy * canvas.fractal(rng.uniform(2.8, 3.4)))

    # Dust lies in a thinner layer than the stars, a little beside their middle, and in fingers.
    rift = across - rng.uniform(-0.4, 0.4) * width
    layer = np.exp(-(rift / width / 0.35) ** 2)
    fingers = 1.3 * canvas.fractal(rng.uniform(2.8, 3.3))
    depth = fingers + rng.uniform(0.3, 1.2) * layer
    opacity = rng.uniform(1, 3) * np.clip(depth - 0.4, 0, None)
    clouds *= np.exp(-opacity)
    bright = np.quantile(clouds, 0.99)
    light = clouds * (rng.uniform(0.2, 1.0) / bright)
    canvas.shine(light, _color(rng, (1.1, 1.0, 0.85), 0.07))
    canvas.star_count = rng.uniform(2500, 6000)
    canvas.star_density = 0.2 + 0.8 * np.clip(clouds / bright, 0, 1)
    if rng.random() < 0.5:  # a glowing nebula in the arm
        x, y = offset * -np.sin(angle), offset * np.cos(angle)
        glow = canvas.blob(x, y, rng.uniform(0.03, 0.08), 1.2)
        glow = glow * np.exp(0.5 * canvas.fractal(2.8))
        light = glow * rng.uniform(0.1, 0.5)
        canvas.shine(light, _color(rng, (1.9, 0.6, 0.7), 0.1))


def _large_galaxy(canvas):
    """An inclined spiral over most of the longer side, its outskirts fading into the sky."""
    rng = canvas.rng
    canvas.tilt(0.2, 0.8, curvature=0.2)
    longer_axis = 0 if canvas.half_x >= canvas.half_y else np.pi / 2
    angle = longer_axis + rng.uniform(-0.6, 0.6)
    warm = _color(rng, OLD_STARS, 0.05)
    blue = _color(rng, (0.9, 1.0, 1.15), 0.05)
    x, y = canvas.place(0.12)
    width = rng.uniform(0.55, 0.85)
    brightness = rng.uniform(0.015, 0.06)
    ratio = rng.uniform(0.25, 0.55)
    canvas.spiral(x, y, width, brightness, angle, ratio, warm, blue)
    canvas.small_galaxies()


def _clipped(canvas):
    """A dark frame too bright was subtracted: the dark end of the sky is clipped in the noise.

    A galaxy with wide faint wings stands on it.
    """
    rng = canvas.rng
    canvas.tilt(0.1, 0.5)
    gradient = canvas.gradient()
    noise = _log_uniform(rng, 0.3, 1.1) * np.ptp(gradient)
    canvas.noise_fraction = noise / (1 + np.median(gradient))
    canvas.headroom = rng.uniform(0.0, 0.25)
    x, y = canvas.place(0.5)
    width = rng.uniform(0.08, 0.2)
    r = canvas.random_distance(x, y, 0.5) / (width / 2)
    n = rng.uniform(2, 4)
    steep = rng.uniform(5.0, 7.0)
    brightness = noise * rng.uniform(0.5, 1.5)
    canvas.shine(brightness * _sersic(r, n, steep), _color(rng, (1.2, 1.0, 0.8), 0.1))
    canvas.small_galaxies()


def _mosaic(canvas):
    """Three panels side by side, their levels and slopes not quite matched.

    The steps are part of the true sky, though no smooth surface can follow them.
    """
    rng = canvas.rng
    canvas.tilt(0.3, 1.0)
    position, half, other = canvas.y, canvas.half_y, canvas.x
    if rng.random() < 0.5:
        position, half, other = canvas.x, canvas.half_x, canvas.y
    lean = rng.uniform(-0.02, 0.02)
    position = position + lean * other  # (h, w); panels are never quite upright
    feather = max(rng.uniform(0, 0.01), 0.5 / canvas.longer)
    thirds = np.array([-1, 1]) / 3
    seams = half * (thirds + rng.uniform(-0.08, 0.08, 2))
    first, second = [np.clip((position - seam) / feather + 0.5, 0, 1) for seam in seams]
    weights = (1 - first), first - second, second  # of the panels, (h, w) each; their sum is 1
    levels = rng.permutation(3) / 2
    levels = levels + rng.uniform(-0.2, 0.2, 3)
    panels = 0
    for weight, level in zip(weights, levels):
        slope = position * rng.normal(0, 0.5)
        slope = slope + other * rng.normal(0, 0.5)
        panels = panels + weight * (level + slope / half)
    amount = rng.uniform(0.12, 0.35) * np.ptp(canvas.gradient())
    canvas.brighten(panels, amount)
    canvas.small_galaxies()
    for _ in range(rng.integers(0, 3)):
        x, y = canvas.place(0.8)
        canvas.galaxy(x, y, width=rng.uniform(0.02, 0.06), brightness=rng.uniform(0.03, 0.1))


def _edge_nebula(canvas):
    """A faint nebula from one edge of the frame to the other, and a gradient across it."""
    rng = canvas.rng
    canvas.tilt(0.3, 1.0)
    if rng.random() < 0.4:
        canvas.city_glow(0.2, 0.5)
    across, _, _ = canvas.random_band()
    band = -np.abs(across) / rng.uniform(0.1, 0.2)
    ragged = rng.uniform(0.5, 1.0)
    field = band + ragged * canvas.fractal(rng.uniform(2.9, 3.8))
    coverage = rng.uniform(0.4, 0.7)
    brightness = rng.uniform(0.12, 0.45) * np.ptp(canvas.gradient())
    canvas.filaments(field, coverage, brightness)


def _amp_glow(canvas):
    """The sensor's amplifier glows in a corner or two, on a tilted plane; few objects."""
    rng = canvas.rng
    canvas.tilt(0.2, 0.8, curvature=0.1)
    corners = rng.permutation([(-1, -1), (-1, 1), (1, -1), (1, 1)])
    count = 2 if rng.random() < 0.3 else 1
    for side_x, side_y in corners[:count]:
        reach = rng.uniform(0.03, 0.08)
        x = side_x * (canvas.half_x + rng.uniform(0, 0.03))
        y = side_y * (canvas.half_y + rng.uniform(0, 0.03))
        angle = rng.choice((0, np.pi / 2))
        ratio = rng.uniform(0.6, 1)
        r = canvas.distance(x, y, angle, ratio) / reach
        glow = np.exp(-np.sqrt(r ** 2 + 0.2 ** 2))
        canvas.brighten(glow, rng.uniform(0.5, 3), spread=0.25)
    if rng.random() < 0.4:
        x, y = canvas.place(0.5)
        canvas.galaxy(x, y, width=rng.uniform(0.04, 0.1), brightness=rng.uniform(0.03, 0.1))
    canvas.small_galaxies()


def _cluster(canvas):
    """A cluster of galaxies around a giant one, in the light of stars that belong to none."""
    rng = canvas.rng
    canvas.tilt(0.2, 0.8, curvature=0.4)
    x, y = canvas.place(0.3)
    width = rng.uniform(0.15, 0.35)
    r = canvas.random_distance(x, y, 0.6) / (width / 2)
    between = 1 / (1 + r ** 2) ** rng.uniform(1.3, 2.0)
    peak = rng.uniform(0.1, 0.2) * np.ptp(canvas.gradient())
    canvas.shine(peak * between, _color(rng, (1.15, 1.0, 0.85), 0.05))

    members = np.zeros(canvas.shape)
    for _ in range(rng.integers(30, 90)):
        distance = width * 0.5 * np.abs(rng.standard_t(2.5))
        direction = rng.uniform(0, 2 * np.pi)
        member_x = x + distance * np.cos(direction)
        member_y = y + distance * np.sin(direction)
        size = _log_uniform(rng, 0.005, 0.025)
        canvas.add_elliptical(members, member_x, member_y, size, rng.uniform(0.01, 0.06))
    size = rng.uniform(0.04, 0.08)
    canvas.add_elliptical(members, x, y, size, rng.uniform(0.05, 0.1))
    canvas.shine(members, _color(rng, OLD_STARS, 0.05))
    canvas.small_galaxies()


def _vignetting(canvas):
    """A flat field that did not fit: the sky is brightest near the middle; few objects."""
    rng = canvas.rng
    canvas.tilt(0.03, 0.12)
    canvas.dim_corners(0.2, 0.5)
    if rng.random() < 0.5:
        x, y = canvas.place(0.5)
        canvas.galaxy(x, y, width=rng.uniform(0.03, 0.1), brightness=rng.uniform(0.03, 0.1))
    canvas.small_galaxies()


def _star_halos(canvas):
    """Very bright stars, whose scattered light reaches far, on a tilted sky with a little dust."""
    rng = canvas.rng
    canvas.tilt(0.3, 1.0)
    cirrus = canvas.fractal(rng.uniform(2.7, 3.4)) - rng.uniform(-0.5, 0.5)
    cirrus = np.clip(cirrus, 0, None) ** 1.3
    peak = rng.uniform(0.03, 0.1) * np.ptp(canvas.gradient())
    cirrus *= peak / np.quantile(cirrus, 0.99)
    canvas.shine(cirrus, _color(rng, DUST, 0.1))

    slope = rng.uniform(2, 3)  # of the wings; the same optics scatter every star
    fwhm = rng.uniform(1.5, 2.5) / canvas.longer
    for _ in range(rng.integers(2, 7)):
        x, y = canvas.place(0.95)
        r = canvas.distance(x, y)
        core_radius = rng.uniform(0.003, 0.008)
        color = _color(rng, NEUTRAL, 0.3)
        strength = _log_uniform(rng, 1, 15)
        wings = (1 + (r / core_radius) ** 2) ** (-slope / 2)
        canvas.shine(strength * wings, color)
        peak = rng.uniform(3, 30) / canvas.level  # saturated
        core = (1 + (r / fwhm) ** 2) ** -3
        canvas.star_parts.append(((core * peak).astype(np.float32), color))
    canvas.small_galaxies()


def _narrowband(canvas):
    """Through a narrow filter: hardly any sky, and a nebula over 60 % of the frame."""
    rng = canvas.rng
    canvas.level = _log_uniform(rng, 0.002, 0.01)
    canvas.noise_fraction = rng.uniform(0.04, 0.15)
    canvas.tilt(0.15, 0.5)
    coverage = rng.uniform(0.5, 0.7)
    brightness = _log_uniform(rng, 0.5, 5)
    canvas.nebula(coverage, brightness, sharpness=rng.uniform(0.08, 0.2))


def _pedestal(canvas):
    """A pedestal of a fifth of full scale under a gradient of 0.4 %; one small object."""
    rng = canvas.rng
    pedestal = rng.uniform(0.15, 0.25)
    canvas.pedestal = pedestal * rng.uniform(0.98, 1.02, 3)
    canvas.level = rng.uniform(0.01, 0.03)
    span = rng.uniform(0.003, 0.005) / canvas.level
    canvas.tilt(span, span)
    if rng.random() < 0.5:
        x, y = canvas.place(0.6)
        canvas.galaxy(x, y, width=rng.uniform(0.05, 0.15), brightness=rng.uniform(0.02, 0.08))
    else:
        coverage = rng.uniform(0.04, 0.12)
        canvas.nebula(coverage, rng.uniform(0.1, 0.5))
    canvas.small_galaxies()


def _plane_galaxy(canvas):
    """A galaxy on a sky that is a perfect plane."""
    rng = canvas.rng
    canvas.tilt(0.2, 1.0, curvature=0)
    x, y = canvas.place(0.5)
    canvas.galaxy(x, y, width=rng.uniform(0.15, 0.35), brightness=rng.uniform(0.02, 0.08))
    canvas.small_galaxies()
