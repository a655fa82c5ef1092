"""Pictures for the tests: synthetic linear astrophotos whose sky is known, and what puts them into files and back.

A background model is only right or wrong against a known sky: a fit with a lower loss can be the falser one
(it has dug into the galaxy). So every scene here is made of three parts that are kept apart until the end,

    image = pedestal + sky + light of the objects + noise        (0 in the registration border: missing)

and the test or bench compares a model with `pedestal + sky` alone.

    scene = make_scene("galaxy", seed=3, height=400, width=600, channels=3, border=True)
    rms, p999 = score(model, scene)          # both in percent
    image, sky = sloping_sky()               # where a bent slope, noise and a few stars will do
    path = save("sky.xisf", image)

Lengths inside this file are fractions of the longer side, angles are radians, brightnesses are fractions of the
scene's sky level, so a scene of 400 x 600 pixels is the one of 2000 x 3000 seen small. Only what belongs to the
pixel stays as it is: the noise of one pixel and the size of a star (1.5-2.5 pixels FWHM). One seed gives the same
sky and objects in mono and in color; mono is the mean of the colors.
"""
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

import bgoptimizer

FAMILIES = ("galaxy", "nebula", "city_glows", "airglow", "dust", "moon", "hills", "stars", "flat",
            "big_nebula", "full_object", "short_stack", "milky_way", "large_galaxy", "clipped", "mosaic",
            "edge_nebula", "amp_glow", "cluster", "vignetting", "star_halos", "narrowband", "pedestal",
            "plane_galaxy")

NEUTRAL = np.ones(3)
FRACTAL_SIZE = 1536     # samples along a fractal's side; of fixed size, so that a seed has one texture at every scale
FRACTAL_CROP = 1152     # samples along the frame's longer side: the rest is cut off because an FFT's edges wrap around


@dataclass
class Scene:
    """One picture and what is true about it."""
    image: np.ndarray         # (h, w, c) float32, linear, in [0, 1]; exactly 0 in the border = missing
    sky: np.ndarray           # (h, w, c) float64, the true background: smooth, with the pedestal, everywhere
    valid: np.ndarray         # (h, w) bool, True inside the border
    object_mask: np.ndarray   # (h, w) bool, True where objects change the light by over half the pixel noise
    light: np.ndarray         # (h, w, c) float32, extended objects' part of the image: no stars, no noise
    noise: np.ndarray         # (c,) float64, standard deviation of a pixel of typical sky
    family: str
    seed: int


def make_scene(family, seed=0, height=400, width=600, channels=3, border=False):
    """Make one scene of a family; a seed (an integer from 0 on) varies all that can differ inside the family.

    `border` adds the zeros that registration leaves at 1-3 % of some sides, with noisier partial coverage inside.
    Raises ValueError for an unknown family or a number of channels other than 1 and 3.
    """
    if family not in FAMILIES:
        raise ValueError("unknown family %r; there are: %s" % (family, ", ".join(FAMILIES)))
    if channels not in (1, 3):
        raise ValueError("a scene has 1 or 3 channels, not %r" % (channels,))
    canvas = _Canvas(family, seed, height, width)
    globals()["_" + family](canvas)
    return canvas.finish(channels, border)


def score(model, scene):
    """Error of a model (h, w, c) -> (rms, 99.9th percentile of the absolute error), both in percent.

    Per channel over the valid pixels: model - truth, less its median (an offset is the pedestal's affair, and the
    tool fixes it by the median too), in units of that channel's true range, p99 - p1 of the truth. Then the root
    mean square over channels, and the percentile over all of them together. A weakly lit channel so counts as much
    as a strong one. For the family "flat", whose range is next to nothing, the unit is the pixel noise.
    """
    errors = []
    for channel in range(scene.sky.shape[2]):
        truth = scene.sky[..., channel][scene.valid]
        error = np.asarray(model[..., channel], np.float64)[scene.valid] - truth
        if scene.family == "flat":
            unit = scene.noise[channel]
        else:
            unit = np.subtract(*np.percentile(truth, (99, 1)))
        errors.append((error - np.median(error)) * (100 / unit))
    errors = np.abs(errors)
    return float(np.sqrt(np.mean(errors ** 2))), float(np.percentile(errors, 99.9))


OBJECT_SHARE = 0.002    # of the picture; less extended light than that is not asked what became of it
BACKGROUND_SHARE = 0.01     # of the picture; with less background a constant cannot be told from an object
RING = 0.04             # width of the ring around objects, in units of the longer side


def object_score(model, scene):
    """What a model does to the extended objects -> (light kept, ring error), both in percent, or NaN.

    An object's pixels are those where its light is over half the pixel noise. The light kept is 100 % less the share
    of their light that the model has taken for sky; over 100 % it has dug a hole. The ring error is the rms of
    model - truth within RING of them, in units of the sky's range. For both, the median of model - truth over the
    pixels without objects is taken off. NaN where there is next to no extended light, or next to no pixel without.
    """
    error = np.asarray(model, np.float64) - scene.sky                       # (h, w, c)
    background = scene.valid & ~scene.object_mask                           # (h, w)
    core = (scene.light > 0.5 * scene.noise) & scene.valid[..., None]       # (h, w, c)
    touched = core.any(axis=2)                                              # (h, w)
    present = scene.valid.sum()
    if touched.sum() < OBJECT_SHARE * present or background.sum() < BACKGROUND_SHARE * present:
        return np.nan, np.nan

    error -= np.median(error[background], axis=0)
    taken = error[core].sum() / scene.light[core].sum(dtype=np.float64)
    distance = ndimage.distance_transform_edt(~touched)                     # pixels
    ring = (distance > 0) & (distance <= RING * max(touched.shape)) & scene.valid
    if not ring.any():
        return 100 * (1 - taken), np.nan

    low, high = np.percentile(scene.sky[scene.valid], (1, 99), axis=0)      # (c,)
    unit = scene.noise if scene.family == "flat" else high - low            # (c,)
    ring_error = np.sqrt(np.mean((error[ring] / unit) ** 2))
    return 100 * (1 - taken), 100 * ring_error


def sloping_sky(height=96, width=144, channels=3, noise=0.0005, seed=1):
    """A simple picture and its sky, (h, w, c) each: a bent slope of its own per channel, noise, a few stars."""
    rng = np.random.default_rng(seed)
    y, x = (np.indices((height, width)) + 0.5) / max(height, width)
    slopes = ((0.04, 0.03), (-0.02, 0.04), (0.03, -0.03))[:channels]
    sky = np.stack([0.05 + 0.02 * k + a * x + b * y + 0.03 * (x - 0.4)**2 for k, (a, b) in enumerate(slopes)], -1)
    image = sky + rng.normal(0, noise, sky.shape)
    image[rng.integers(0, height, 40), rng.integers(0, width, 40)] += 0.4
    return image.astype(np.float32), sky


# ---------------------------------------------------------------------------------------------- files

_BESIDE = [folder / "shared" / "real" for folder in Path(__file__).resolve().parents]
# Files of cameras and of PixInsight, which are no part of the project; tests of them are skipped where they are not.
REAL = Path(os.environ.get("BGOPTIMIZER_REAL") or next(filter(Path.is_dir, _BESIDE), _BESIDE[0]))


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
    return np.moveaxis(bgoptimizer.read_xisf(str(path)).planes, 0, -1)


# ---------------------------------------------------------------------------------------------- the canvas

class _Canvas:
    """Sky and object light of a scene being made, each as (h, w) maps times a color (3,).

    x (1, w) and y (h, 1) are pixel centers, origin in the frame's center, in units of the longer side; the frame
    ends at +-half_x and +-half_y. Separate random streams for the plan, the textures, the stars and the pixels keep
    the plan the same at every size.
    """

    def __init__(self, family, seed, height, width):
        self.family, self.seed, self.shape = family, seed, (height, width)
        stable = zlib.crc32(family.encode())
        self.rng, self.texture_rng, self.star_rng, self.pixel_rng, self.border_rng = (
            np.random.default_rng([stable, seed, stream]) for stream in range(5))
        self.longer = max(height, width)
        self.x = ((np.arange(width) + 0.5 - width / 2) / self.longer)[None, :]
        self.y = ((np.arange(height) + 0.5 - height / 2) / self.longer)[:, None]
        self.half_x, self.half_y = width / 2 / self.longer, height / 2 / self.longer
        rng = self.rng
        self.level = np.exp(rng.uniform(np.log(0.01), np.log(0.1)))      # sky over the pedestal, part of full scale
        self.pedestal = rng.uniform(0.005, 0.02) * rng.uniform(0.95, 1.05, 3)
        self.sky_color = _color(rng, NEUTRAL, 0.25)
        # A deep stack has 1-4 % of the sky as noise in a pixel, and one picture in four is a few short exposures.
        self.noise_fraction = rng.uniform(0.04, 0.10) if rng.random() < 0.25 else rng.uniform(0.01, 0.04)
        self.read_share = rng.uniform(0.1, 0.5)          # part of the sky noise's variance that light does not change
        self.vignette = None                             # (h, w) or None: dims sky and objects, not the pedestal
        self.sky_parts, self.light_parts = [], []        # [((h, w) map, (3,) color)]
        self.hill = None                                 # ((h, w) coverage, (h, w) brightness, (3,) color) or None
        self.star_count = np.exp(rng.uniform(np.log(100), np.log(900)))   # at 400 x 600
        self.star_density = None                         # (h, w) relative chance of a star, or None: even
        self.halo_count = rng.integers(0, 4)
        self.star_parts = []                             # like light_parts, but cores of stars: not extended light
        self.turn = None                                 # radians; the frames' angle in the picture where it is large
        self.headroom = None                             # noises from 0 to the darkest sky: the picture is clipped at 0

    # -- maps (h, w) over the frame

    def distance(self, x, y, angle=0.0, ratio=1.0):
        """Elliptical distance from (x, y); `ratio` <= 1 shortens the axis across `angle`."""
        dx, dy = self.x - x, self.y - y
        along = dx * np.cos(angle) + dy * np.sin(angle)
        across = dy * np.cos(angle) - dx * np.sin(angle)
        return np.hypot(along, across / ratio)

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

    def fractal(self, slope, stretch=1.0):
        """A random texture with power ~ frequency^-slope; mean 0, standard deviation 1 over the frame."""
        n = FRACTAL_SIZE
        fy, fx = np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n)[None, :]
        frequency = np.hypot(fy * stretch, fx)
        frequency[0, 0] = np.inf                                            # no mean
        spectrum = np.fft.rfft2(self.texture_rng.standard_normal((n, n))) * frequency ** (-slope / 2)
        texture = np.fft.irfft2(spectrum, (n, n)).astype(np.float32)
        rows = (self.y + 0.5) * (FRACTAL_CROP - 1)
        columns = (self.x + 0.5) * (FRACTAL_CROP - 1)
        out = ndimage.map_coordinates(texture, np.broadcast_arrays(rows, columns), order=1)
        return (out - out.mean()) / out.std()

    # -- sky

    def brighten(self, shape, amount, spread=0.4):
        """Add light pollution: `shape` (h, w) scaled to 0..1 over the frame, times `amount`, in a color of its own."""
        low, high = shape.min(), shape.max()
        self.sky_parts.append(((shape - low) / (high - low), amount * _color(self.rng, self.sky_color, spread)))

    def tilt(self, low=0.2, high=1.0, curvature=0.25):
        """A tilted plane, a little bent, as most skies are; amplitude `low` to `high` of the sky level."""
        rng = self.rng
        angle, bend_angle = rng.uniform(0, 2 * np.pi, 2)
        plane = self.x * np.cos(angle) + self.y * np.sin(angle)
        bend = self.x * np.cos(bend_angle) + self.y * np.sin(bend_angle)
        self.brighten(plane + rng.uniform(-curvature, curvature) * bend ** 2 * 2, rng.uniform(low, high))

    def city_glow(self, low=0.2, high=0.8):
        """The glow of a town beyond a random edge: a blunt exponential or a Gaussian, often longer along one axis."""
        rng = self.rng
        x, y = self.at_edge(rng.uniform(-0.05, 0.25))
        r = self.distance(x, y, rng.uniform(0, np.pi), rng.uniform(0.5, 1)) / rng.uniform(0.2, 0.5)
        if rng.random() < 0.5:
            glow = np.exp(-np.sqrt(r ** 2 + 0.3 ** 2))      # without a cusp: real air has scattered it away
        else:
            glow = np.exp(-r ** 2 / 2)
        self.brighten(glow, rng.uniform(low, high))

    def dim_corners(self, low, high):
        """What flat fielding has left of the vignetting: corners darker by `low` to `high`."""
        rng = self.rng
        x, y = self.place(0.15)
        r2 = (self.distance(x, y) / np.hypot(self.half_x, self.half_y)) ** 2
        self.vignette = 1 - rng.uniform(low, high) * r2 ** rng.uniform(1, 1.6)

    # -- objects

    def shine(self, light, color):
        """Add object light (h, w), in units of the sky level."""
        self.light_parts.append((np.asarray(light, np.float32), np.asarray(color, np.float64)))

    def galaxy(self, x, y, width, brightness):
        """A spiral or an elliptical: `width` across where it has `brightness` (of the sky level), fainter beyond."""
        rng = self.rng
        angle, ratio = rng.uniform(0, np.pi), rng.uniform(0.3, 0.95)
        r = self.distance(x, y, angle, ratio) / (width / 2)
        warm, blue = _color(rng, (1.2, 1.0, 0.75), 0.1), _color(rng, (0.85, 1.0, 1.1), 0.1)
        if rng.random() < 0.35:                             # elliptical: one Sersic profile
            n = rng.uniform(1.5, 3)
            steep = rng.uniform(4.5, 6.0)                   # magnitudes of e between the center and r = 1
            self.shine(brightness * np.exp(steep * (1 - np.sqrt(r ** 2 + 0.005 ** 2) ** (1 / n))), warm)
        else:
            self.spiral(x, y, width, brightness, angle, ratio, warm, blue)

    def spiral(self, x, y, width, brightness, angle, ratio, warm, blue):
        """A spiral galaxy: an exponential disk with arms and clumps in `blue`, a bulge in `warm`."""
        rng = self.rng
        r = self.distance(x, y, angle, ratio) / (width / 2)
        lengths = rng.uniform(3.0, 4.5)                     # disk scale lengths out to r = 1
        disk = brightness * np.exp(lengths * (1 - r))
        dx, dy = self.x - x, self.y - y
        theta = np.arctan2((dy * np.cos(angle) - dx * np.sin(angle)) / ratio, dx * np.cos(angle) + dy * np.sin(angle))
        phase = theta * 2 - np.log(r + 0.05) * 2 / np.tan(rng.uniform(0.25, 0.6)) * rng.choice((-1, 1))
        contrast = rng.uniform(0.2, 0.6) * np.clip(r / 0.25, 0, 1)          # no arms in the bulge
        arms = 1 + contrast * np.cos(phase + 0.5 * self.fractal(2.5))
        clumps = np.exp(0.35 * np.clip(r / 0.25, 0, 1) * self.fractal(2.5) - 0.06)
        self.shine(disk * arms * clumps, blue)
        core = brightness * rng.uniform(20, 150) * np.exp(-np.sqrt(r ** 2 + 0.01 ** 2) / rng.uniform(0.05, 0.1))
        self.shine(core, warm)

    def nebula(self, coverage, brightness, sharpness=0.15):
        """Diffuse light with filaments, irregular, over `coverage` of the frame; its brightest 1 % has `brightness`."""
        rng = self.rng
        x, y = self.place(0.5 * (1 - coverage))
        r = self.distance(x, y, rng.uniform(0, np.pi), rng.uniform(0.6, 1))
        field = -r / 0.2 + rng.uniform(0.7, 1.3) * self.fractal(rng.uniform(2.9, 4.0))
        self.filaments(field, coverage, brightness, sharpness)

    def filaments(self, field, coverage, brightness, sharpness=0.15):
        """A nebula where `field` (h, w) is in its highest `coverage` (0-1); its brightest 1 % has `brightness`."""
        rng = self.rng
        edge = np.quantile(field, 1 - coverage)
        inside = np.clip(field - edge, 0, None)
        body = inside ** rng.uniform(1.0, 2.5)              # fades to nothing at its edge, from crisp to very soft
        filaments = np.exp(-np.abs(self.fractal(rng.uniform(2.8, 3.3))) / sharpness) * rng.uniform(0.5, 2.0)
        knots = np.exp(0.5 * self.fractal(rng.uniform(2.6, 3.2)))
        red, teal = _color(rng, (1.9, 0.55, 0.55), 0.15), _color(rng, (0.4, 1.25, 1.35), 0.15)
        glow = body * knots * (1 + filaments)
        glow *= brightness / np.quantile(glow, 0.99)
        self.shine(glow, red)
        if rng.random() < 0.6:                              # doubly ionized oxygen or reflected starlight
            core = body ** 1.5 * np.exp(0.6 * self.fractal(2.8))
            self.shine(core * (brightness * rng.uniform(0.15, 0.6) / np.quantile(core, 0.99)), teal)

    def small_galaxies(self):
        """None to six distant galaxies, as most deep pictures have."""
        for _ in range(self.rng.integers(0, 7)):
            x, y = self.place(1.0)
            width, ratio, angle = self.rng.uniform(0.004, 0.02), self.rng.uniform(0.3, 1), self.rng.uniform(0, np.pi)
            r = self.distance(x, y, angle, ratio) / (width / 2)
            self.shine(self.rng.uniform(0.02, 0.2) * np.exp(3 * (1 - r)), _color(self.rng, (1.1, 1.0, 0.9), 0.1))

    def blob(self, x, y, width, soft=2.0):
        """A smooth cloud (h, w), 1 at its top and half of that `width` across, like a Gaussian for `soft` = 2."""
        r = self.distance(x, y, self.rng.uniform(0, np.pi), self.rng.uniform(0.5, 1)) / (width / 2)
        return np.exp(-np.log(2) * r ** soft)

    def add_elliptical(self, light, x, y, width, brightness):
        """Add a small elliptical galaxy to `light` (h, w): `width` across where it has `brightness`, up to 5 widths."""
        rng = self.rng
        angle, ratio, n, steep = rng.uniform(0, np.pi), rng.uniform(0.55, 1), rng.uniform(1, 2), rng.uniform(3.5, 5)
        columns = np.flatnonzero(np.abs(self.x[0] - x) < 2.5 * width)
        rows = np.flatnonzero(np.abs(self.y[:, 0] - y) < 2.5 * width)
        if not (len(rows) and len(columns)):
            return
        dx, dy = self.x[:, columns] - x, self.y[rows] - y
        along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
        r = np.sqrt(along ** 2 + (across / ratio) ** 2 + (0.7 / self.longer) ** 2) / (width / 2)  # seeing blurs the tip
        profile = np.exp(steep * (1 - r ** (1 / n))) - np.exp(steep * (1 - 5 ** (1 / n)))
        light[np.ix_(rows, columns)] += brightness * np.clip(profile, 0, None)

    def gradient(self):
        """The sky so far, over its even level (h, w), in units of the level, mean of the colors."""
        return sum(shape * color.mean() for shape, color in self.sky_parts)

    # -- the picture

    def finish(self, channels, border):
        """Put sky, objects, stars and noise together -> Scene."""
        height, width = self.shape

        def seen(color):                                    # (3,) -> (c,)
            return np.asarray(color) if channels == 3 else np.asarray([np.mean(color)])

        sky = np.empty((height, width, channels))           # over the pedestal
        sky[:] = self.level * seen(self.sky_color)
        for shape, color in self.sky_parts:
            sky += shape[..., None] * (self.level * seen(color))
        light = np.zeros((height, width, channels), np.float32)
        for shape, color in self.light_parts:
            light += shape[..., None] * (self.level * seen(color)).astype(np.float32)
        typical = np.median(sky[::4, ::4], axis=(0, 1))     # (c,)
        noise = self.noise_fraction * typical
        extended = light.copy()
        for channel, star_light in enumerate(self.stars(noise.mean(), seen)):
            light[..., channel] += star_light
        for shape, color in self.star_parts:
            light += shape[..., None] * (self.level * seen(color)).astype(np.float32)
        if self.vignette is not None:
            sky *= self.vignette[..., None]
            extended *= self.vignette[..., None].astype(np.float32)
            light *= self.vignette[..., None].astype(np.float32)

        object_mask = (light > 0.5 * noise).any(axis=2)
        clean = sky + light                                 # (h, w, c)
        if self.hill is not None:                           # hills stand in front of the sky and of the stars
            cover, brightness, color = self.hill
            dark = brightness[..., None] * (self.level * seen(color))
            clean += cover[..., None] * (dark - clean)
            object_mask |= cover > 0
            extended *= (1 - cover[..., None]).astype(np.float32)
        coverage = self.coverage() if border or self.turn is not None else np.ones(self.shape)
        valid = coverage > 0
        # Photon noise grows with the light; the mean of fewer frames is noisier.
        variance = self.read_share + (1 - self.read_share) * clean / typical
        variance /= np.maximum(coverage, 1e-9)[..., None]
        pixels = self.pixel_rng.standard_normal(sky.shape, np.float32)
        if self.pixel_rng.random() < 0.5:                   # registration interpolates: neighbors share their noise
            pixels = ndimage.uniform_filter(pixels, (2, 2, 1)) * 2
        if self.headroom is None:
            pedestal, darkest = seen(self.pedestal), 1e-6   # not 0: that is what missing means
        else:                                               # too much was subtracted: the dark end sinks into the noise
            pedestal, darkest = self.headroom * noise - sky.min(axis=(0, 1)), 0
        image = clean + pedestal + pixels * np.sqrt(variance) * noise
        image = np.clip(image, darkest, 1).astype(np.float32)
        image[~valid] = 0
        return Scene(image, sky + pedestal, valid, object_mask, extended, noise, self.family, self.seed)

    def stars(self, noise, seen):
        """Light of all stars, one (h, w) map per channel, full scale = 1 (a star may exceed it: saturated).

        Number counts follow a power law; profiles are Moffat's. Stars of like size are drawn together in stamps.
        """
        height, width = self.shape
        rng = self.star_rng
        slope, fwhm, beta = rng.uniform(0.6, 0.9), rng.uniform(1.5, 2.5), rng.uniform(2.5, 4.5)
        # A larger picture of the same field goes deeper, but its stars do not simply multiply with its pixels.
        count = int(self.star_count * (height * width / 240000) ** 0.6)
        draws = rng.random((count, 5))                      # one row a star: a larger frame only adds rows
        x, y = draws[:, 0] * width, draws[:, 1] * height
        if self.star_density is not None:
            keep = draws[:, 2] < self.star_density[y.astype(int), x.astype(int)]
            x, y, draws = x[keep], y[keep], draws[keep]
        peak = np.minimum(2 * noise * (1 - draws[:, 3]) ** (-1 / slope), 4.0)
        brightest = np.argsort(peak)[::-1][:self.halo_count]
        peak[brightest] = np.maximum(peak[brightest], rng.uniform(1, 6, len(brightest)))  # saturated
        warmth = 0.35 * (draws[:, 4] - 0.5)
        colors = np.stack([1 + warmth, np.ones_like(warmth), 1 - warmth], 1)            # (count, 3)
        colors = np.stack([seen(color) for color in colors]) if len(colors) else np.ones((0, len(seen(NEUTRAL))))

        core = fwhm / 2 / np.sqrt(2 ** (1 / beta) - 1)
        reach = core * np.sqrt((peak / (0.05 * noise)) ** (1 / beta) - 1)               # pixels, to 1/20 of the noise
        maps = [np.zeros(height * width) for _ in range(colors.shape[1])]
        smaller = 0
        for size in (8, 16, 32, 64, 128, 256):
            group = (reach > smaller) & ((reach <= size) | (size == 256))
            smaller = size
            if not group.any():
                continue
            offset = np.arange(-size, size + 1)
            columns = x[group].astype(int)[:, None, None] + offset[None, None, :]       # (k, 1, s)
            rows = y[group].astype(int)[:, None, None] + offset[None, :, None]          # (k, s, 1)
            r2 = (columns + 0.5 - x[group][:, None, None]) ** 2 + (rows + 0.5 - y[group][:, None, None]) ** 2
            profile = (1 + r2 / core ** 2) ** -beta - (1 + (size / core) ** 2) ** -beta  # ends at 0: no square rims
            profile = np.clip(profile, 0, None) * peak[group][:, None, None]
            inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
            index = (rows * width + columns)[inside]
            for channel, flat in enumerate(maps):
                weights = (profile * colors[group, channel][:, None, None])[inside]
                flat += np.bincount(index, weights, minlength=flat.size)
        maps = [flat.reshape(height, width) for flat in maps]

        for star in brightest:                              # scattered light: wide, faint, and no sky
            scale, strength = rng.uniform(0.005, 0.03), rng.uniform(0.05, 0.6) * self.level
            r = self.distance(x[star] / self.longer - self.half_x, y[star] / self.longer - self.half_y)
            halo = strength * np.exp(-r / scale)
            for channel, star_map in enumerate(maps):
                star_map += halo * colors[star, channel]
        return maps

    def coverage(self):
        """Share of the stacked frames that cover each pixel (h, w), 0 to 1: frames shifted and turned a little."""
        rng = self.border_rng
        drift = rng.uniform(0, 2 * np.pi)
        shift = rng.uniform(0.012, 0.025) * np.array([np.cos(drift), np.sin(drift)])
        turn = rng.uniform(-0.012, 0.012)
        frames = 1 if rng.random() < 0.4 else 6             # one: the hard edge of a cropped-to-reference stack
        if self.turn is not None:
            turn += self.turn
        covered = np.zeros(self.shape)
        for _ in range(frames):
            x, y = shift + rng.uniform(-0.008, 0.008, 2) * (frames > 1)
            angle = turn + rng.uniform(-0.004, 0.004) * (frames > 1)
            along = (self.x - x) * np.cos(angle) + (self.y - y) * np.sin(angle)
            across = (self.y - y) * np.cos(angle) - (self.x - x) * np.sin(angle)
            covered += (np.abs(along) <= self.half_x) & (np.abs(across) <= self.half_y)
        return covered / frames


def _color(rng, around, spread):
    """A color (3,) near `around`, each channel off by up to `spread` (a fraction)."""
    return np.asarray(around) * rng.uniform(1 - spread, 1 + spread, 3)


# ---------------------------------------------------------------------------------------------- the families

def _galaxy(canvas):
    """A large galaxy, its outskirts fading into a tilted sky."""
    rng = canvas.rng
    canvas.tilt(0.2, 1.0)
    canvas.galaxy(*canvas.place(0.35), width=rng.uniform(0.15, 0.35),
                  brightness=rng.uniform(0.02, 0.08))
    if rng.random() < 0.4:                                  # a companion
        canvas.galaxy(*canvas.place(0.8), width=rng.uniform(0.03, 0.07), brightness=rng.uniform(0.03, 0.1))
    canvas.small_galaxies()


def _nebula(canvas):
    """An emission nebula over about a third of the frame, between the glows of two towns."""
    canvas.city_glow()
    canvas.city_glow()
    canvas.nebula(canvas.rng.uniform(0.25, 0.40), np.exp(canvas.rng.uniform(np.log(0.3), np.log(3))))


def _city_glows(canvas):
    """Two or three towns and vignetting; few objects."""
    for _ in range(canvas.rng.integers(2, 4)):
        canvas.city_glow(0.3, 1.0)
    canvas.dim_corners(0.1, 0.45)
    canvas.small_galaxies()


def _airglow(canvas):
    """A wavy band across the frame and a small bright glow in one corner."""
    rng = canvas.rng
    angle, offset = rng.uniform(0, np.pi), rng.uniform(-0.2, 0.2)
    along = canvas.x * np.cos(angle) + canvas.y * np.sin(angle)
    across = canvas.y * np.cos(angle) - canvas.x * np.sin(angle) - offset
    across = across + rng.uniform(0.02, 0.07) * np.sin(2 * np.pi * along / rng.uniform(0.5, 1.1) + rng.uniform(0, 6.28))
    canvas.brighten(np.exp(-across ** 2 / 2 / rng.uniform(0.08, 0.2) ** 2), rng.uniform(0.15, 0.5))
    side_x, side_y = rng.choice((-1, 1), 2)
    r = canvas.distance(side_x * canvas.half_x * rng.uniform(0.95, 1.1),
                        side_y * canvas.half_y * rng.uniform(0.95, 1.1))
    canvas.brighten(np.exp(-(r / rng.uniform(0.10, 0.15)) ** 2 / 2), rng.uniform(0.4, 1.5))
    canvas.tilt(0.05, 0.3)
    canvas.small_galaxies()


def _dust(canvas):
    """Faint dust lit by the Milky Way over most of the frame; the truth is the sky without it."""
    rng = canvas.rng
    if rng.random() < 0.5:
        canvas.city_glow(0.3, 0.8)
    canvas.tilt(0.3, 0.8)
    gradient = sum(shape * color.mean() for shape, color in canvas.sky_parts)
    cirrus = canvas.fractal(rng.uniform(2.6, 3.3), stretch=rng.uniform(0.6, 1.6))
    wisps = np.exp(-np.abs(canvas.fractal(2.8)) / 0.3)
    cirrus = np.clip(cirrus - np.quantile(cirrus, rng.uniform(0.1, 0.35)), 0, None) ** 1.3 * (1 + 0.6 * wisps)
    cirrus *= rng.uniform(0.1, 0.3) * np.ptp(gradient) / np.quantile(cirrus, 0.99)
    canvas.shine(cirrus, _color(rng, (1.1, 1.0, 0.9), 0.1))
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
    canvas.level = np.exp(rng.uniform(np.log(0.008), np.log(0.04)))        # the dark end: 8 times that is still linear
    canvas.brighten(glow, rng.uniform(5, 9), spread=0.15)
    if rng.random() < 0.4:
        canvas.galaxy(*canvas.place(0.6), width=rng.uniform(0.06, 0.15), brightness=rng.uniform(0.05, 0.2))
    canvas.small_galaxies()


def _hills(canvas):
    """Dark hills before the lower 10-25 % of a sky that brightens to the horizon; upside down in one of four."""
    rng = canvas.rng
    upside = -1 if rng.random() < 0.25 else 1
    up = (canvas.half_y - upside * canvas.y) + 0 * canvas.x                 # height over the frame's lower edge
    reach = 2 * canvas.half_y
    canvas.brighten(np.exp(-up / (reach * rng.uniform(0.25, 0.6))), rng.uniform(0.5, 2.0))
    canvas.tilt(0.05, 0.4)
    if rng.random() < 0.5:
        canvas.city_glow(0.2, 0.5)
    ridge = canvas.fractal(rng.uniform(2.6, 3.4))[canvas.shape[0] // 2]     # (w,) one line of a texture is a skyline
    trees = np.abs(canvas.fractal(1.4)[canvas.shape[0] // 3])
    ridge = ridge - ridge.mean()
    ridge = reach * (rng.uniform(0.10, 0.25) + 0.03 * ridge / max(ridge.std(), 1e-9) + rng.uniform(0, 0.006) * trees)
    cover = np.clip((ridge[None, :] - up) * canvas.longer + 0.5, 0, 1)      # an edge one pixel soft
    ground = rng.uniform(0.03, 0.5) * np.exp(rng.uniform(0.1, 0.5) * canvas.fractal(1.8))
    canvas.hill = cover, ground, _color(rng, (1.0, 1.0, 0.9), 0.2)


def _stars(canvas):
    """A dense Milky Way field: thousands of stars, the unresolved ones a faint band."""
    rng = canvas.rng
    canvas.tilt(0.3, 1.0)
    if rng.random() < 0.5:
        canvas.city_glow(0.2, 0.5)
    canvas.star_count = rng.uniform(2500, 6000)
    angle = rng.uniform(0, np.pi)
    across = canvas.y * np.cos(angle) - canvas.x * np.sin(angle) - rng.uniform(-0.2, 0.2)
    band = np.exp(-across ** 2 / 2 / rng.uniform(0.15, 0.35) ** 2) * np.exp(0.3 * canvas.fractal(2.8))
    band /= band.max()
    canvas.star_density = 0.5 + 0.5 * band
    canvas.shine(rng.uniform(0.002, 0.01) * band, _color(rng, (1.1, 1.0, 0.9), 0.05))


def _flat(canvas):
    """Nearly nothing to remove: a gradient of 3-25 % of the pixel noise."""
    canvas.tilt(0.03 * canvas.noise_fraction, 0.25 * canvas.noise_fraction)
    canvas.small_galaxies()


def _big_nebula(canvas):
    """A nebula over more than 60 % of the frame, on a plane."""
    canvas.tilt(0.2, 0.8)
    canvas.nebula(canvas.rng.uniform(0.6, 0.8), np.exp(canvas.rng.uniform(np.log(0.3), np.log(2))))


def _full_object(canvas):
    """An object over nearly the whole frame: too little sky to tell."""
    canvas.tilt(0.2, 0.6)
    canvas.nebula(canvas.rng.uniform(0.93, 0.99), np.exp(canvas.rng.uniform(np.log(0.3), np.log(2))), sharpness=0.3)


def _short_stack(canvas):
    """A few minutes of a smart telescope: a soft nebula in much noise, the frame turned, so that wedges are missing."""
    rng = canvas.rng
    canvas.tilt(0.15, 0.6, curvature=0.5)
    if rng.random() < 0.5:
        canvas.city_glow(0.1, 0.4)
    gradient = canvas.gradient()
    span = np.subtract(*np.percentile(gradient, (99, 1)))
    canvas.noise_fraction = rng.uniform(0.3, 0.7) * span / (1 + np.median(gradient))
    canvas.turn = rng.choice((-1, 1)) * np.deg2rad(rng.uniform(5, 12))
    x, y = canvas.place(0.35)
    width = rng.uniform(0.2, 0.45)
    cloud = canvas.blob(x, y, width, rng.uniform(1.4, 2.2))
    for _ in range(rng.integers(1, 4)):
        dx, dy = rng.normal(0, 0.35 * width, 2)
        cloud = cloud + rng.uniform(0.2, 0.8) * canvas.blob(x + dx, y + dy, width * rng.uniform(0.3, 0.8))
    cloud *= np.exp(rng.uniform(0.1, 0.35) * canvas.fractal(rng.uniform(3.5, 4.5)))
    color = (1.5, 0.75, 0.75) if rng.random() < 0.5 else (0.8, 1.0, 1.25)       # emission, or reflected starlight
    canvas.shine(cloud * (rng.uniform(0.3, 1.5) * span / cloud.max()), _color(rng, color, 0.15))


def _milky_way(canvas):
    """Star clouds cut by dark lanes across half of the frame, two towns; the truth is the sky without the clouds."""
    rng = canvas.rng
    canvas.city_glow(0.3, 0.8)
    canvas.city_glow(0.3, 0.8)
    angle, offset = rng.uniform(0, np.pi), rng.uniform(-0.15, 0.15)
    across = canvas.y * np.cos(angle) - canvas.x * np.sin(angle) - offset
    across = across + 0.04 * canvas.fractal(3.5)
    reach = canvas.half_y * np.abs(np.cos(angle)) + canvas.half_x * np.abs(np.sin(angle))
    width = rng.uniform(0.25, 0.4) * reach                  # half of the band
    band = np.exp(-np.abs(across / width) ** rng.uniform(2.5, 4))
    clouds = band * np.exp(rng.uniform(0.3, 0.6) * canvas.fractal(rng.uniform(2.8, 3.4)))
    # Dust lies in a thinner layer than the stars, a little beside their middle, and in fingers out of it.
    rift = across - rng.uniform(-0.4, 0.4) * width
    depth = 1.3 * canvas.fractal(rng.uniform(2.8, 3.3)) + rng.uniform(0.3, 1.2) * np.exp(-(rift / width / 0.35) ** 2)
    opacity = rng.uniform(1, 3) * np.clip(depth - 0.4, 0, None)
    clouds *= np.exp(-opacity)
    canvas.shine(clouds * (rng.uniform(0.2, 1.0) / np.quantile(clouds, 0.99)), _color(rng, (1.1, 1.0, 0.85), 0.07))
    canvas.star_count = rng.uniform(2500, 6000)
    canvas.star_density = 0.2 + 0.8 * np.clip(clouds / np.quantile(clouds, 0.99), 0, 1)
    if rng.random() < 0.5:                                  # a glowing nebula or two in the arm
        x, y = offset * -np.sin(angle), offset * np.cos(angle)
        glow = canvas.blob(x, y, rng.uniform(0.03, 0.08), 1.2) * np.exp(0.5 * canvas.fractal(2.8))
        canvas.shine(glow * rng.uniform(0.1, 0.5), _color(rng, (1.9, 0.6, 0.7), 0.1))


def _large_galaxy(canvas):
    """An inclined spiral over most of the longer side; its exponential outskirts fade into a nearly flat sky."""
    rng = canvas.rng
    canvas.tilt(0.2, 0.8, curvature=0.2)
    longer_axis = 0 if canvas.half_x >= canvas.half_y else np.pi / 2
    angle = longer_axis + rng.uniform(-0.6, 0.6)
    warm, blue = _color(rng, (1.2, 1.0, 0.75), 0.05), _color(rng, (0.9, 1.0, 1.15), 0.05)
    canvas.spiral(*canvas.place(0.12), width=rng.uniform(0.55, 0.85), brightness=rng.uniform(0.015, 0.06), angle=angle,
                  ratio=rng.uniform(0.25, 0.55), warm=warm, blue=blue)
    canvas.small_galaxies()


def _clipped(canvas):
    """A dark frame too bright was subtracted: the dark end of the sky lies in the noise around 0 and is clipped there."""
    rng = canvas.rng
    canvas.tilt(0.1, 0.5)
    gradient = canvas.gradient()
    noise = np.exp(rng.uniform(np.log(0.3), np.log(1.1))) * np.ptp(gradient)
    canvas.noise_fraction = noise / (1 + np.median(gradient))
    canvas.headroom = rng.uniform(0.0, 0.25)
    x, y = canvas.place(0.5)
    width = rng.uniform(0.08, 0.2)
    r = canvas.distance(x, y, rng.uniform(0, np.pi), rng.uniform(0.5, 1)) / (width / 2)
    n, steep = rng.uniform(2, 4), rng.uniform(5.0, 7.0)     # Sersic index, and magnitudes of e out to r = 1
    wings = np.exp(steep * (1 - np.sqrt(r ** 2 + 0.005 ** 2) ** (1 / n)))
    canvas.shine(noise * rng.uniform(0.5, 1.5) * wings, _color(rng, (1.2, 1.0, 0.8), 0.1))
    canvas.small_galaxies()


def _mosaic(canvas):
    """Three panels side by side, their levels and slopes not quite matched; the steps are part of the true sky."""
    rng = canvas.rng
    canvas.tilt(0.3, 1.0)
    sideways = rng.random() < 0.5
    position, half = (canvas.x, canvas.half_x) if sideways else (canvas.y, canvas.half_y)
    other = canvas.y if sideways else canvas.x
    lean = rng.uniform(-0.02, 0.02)
    position = position + lean * other                      # (h, w) panels are never quite upright
    feather = max(rng.uniform(0, 0.01), 0.5 / canvas.longer)
    seams = half * (np.array([-1, 1]) / 3 + rng.uniform(-0.08, 0.08, 2))
    first, second = [np.clip((position - seam) / feather + 0.5, 0, 1) for seam in seams]
    weights = (1 - first), first - second, second           # of the panels, (h, w) each; they add up to 1
    levels = rng.permutation(3) / 2 + rng.uniform(-0.2, 0.2, 3)
    panels = sum(weight * (level + (position * rng.normal(0, 0.5) + other * rng.normal(0, 0.5)) / half)
                 for weight, level in zip(weights, levels))
    canvas.brighten(panels, rng.uniform(0.12, 0.35) * np.ptp(canvas.gradient()))
    canvas.small_galaxies()
    for _ in range(rng.integers(0, 3)):
        canvas.galaxy(*canvas.place(0.8), width=rng.uniform(0.02, 0.06), brightness=rng.uniform(0.03, 0.1))


def _edge_nebula(canvas):
    """A faint nebula from one edge of the frame to the other, and a gradient across it."""
    rng = canvas.rng
    canvas.tilt(0.3, 1.0)
    if rng.random() < 0.4:
        canvas.city_glow(0.2, 0.5)
    angle, offset = rng.uniform(0, np.pi), rng.uniform(-0.15, 0.15)
    across = canvas.y * np.cos(angle) - canvas.x * np.sin(angle) - offset
    field = -np.abs(across) / rng.uniform(0.1, 0.2) + rng.uniform(0.5, 1.0) * canvas.fractal(rng.uniform(2.9, 3.8))
    canvas.filaments(field, rng.uniform(0.4, 0.7), rng.uniform(0.12, 0.45) * np.ptp(canvas.gradient()))


def _amp_glow(canvas):
    """The sensor's amplifier glows in a corner or two, on a tilted plane; there is no object but small ones."""
    rng = canvas.rng
    canvas.tilt(0.2, 0.8, curvature=0.1)
    corners = rng.permutation([(-1, -1), (-1, 1), (1, -1), (1, 1)])[:1 + (rng.random() < 0.3)]
    for side_x, side_y in corners:
        reach = rng.uniform(0.03, 0.08)
        x, y = side_x * (canvas.half_x + rng.uniform(0, 0.03)), side_y * (canvas.half_y + rng.uniform(0, 0.03))
        r = canvas.distance(x, y, rng.choice((0, np.pi / 2)), rng.uniform(0.6, 1)) / reach
        canvas.brighten(np.exp(-np.sqrt(r ** 2 + 0.2 ** 2)), rng.uniform(0.5, 3), spread=0.25)
    if rng.random() < 0.4:
        canvas.galaxy(*canvas.place(0.5), width=rng.uniform(0.04, 0.1), brightness=rng.uniform(0.03, 0.1))
    canvas.small_galaxies()


def _cluster(canvas):
    """A cluster of galaxies around a giant one, all in the smooth light of stars that belong to none of them."""
    rng = canvas.rng
    canvas.tilt(0.2, 0.8, curvature=0.4)
    x, y = canvas.place(0.3)
    width = rng.uniform(0.15, 0.35)
    r = canvas.distance(x, y, rng.uniform(0, np.pi), rng.uniform(0.6, 1)) / (width / 2)
    between = 2 / (1 + r ** 2) ** rng.uniform(1.3, 2.0) / 2
    canvas.shine(rng.uniform(0.1, 0.2) * np.ptp(canvas.gradient()) * between, _color(rng, (1.15, 1.0, 0.85), 0.05))
    members = np.zeros(canvas.shape)
    for _ in range(rng.integers(30, 90)):
        distance, direction = width * 0.5 * np.abs(rng.standard_t(2.5)), rng.uniform(0, 2 * np.pi)
        canvas.add_elliptical(members, x + distance * np.cos(direction), y + distance * np.sin(direction),
                              np.exp(rng.uniform(np.log(0.005), np.log(0.025))), rng.uniform(0.01, 0.06))
    canvas.add_elliptical(members, x, y, rng.uniform(0.04, 0.08), rng.uniform(0.05, 0.1))
    canvas.shine(members, _color(rng, (1.2, 1.0, 0.75), 0.05))
    canvas.small_galaxies()


def _vignetting(canvas):
    """A flat field that did not fit: the sky is brightest near the middle, and there is little else."""
    rng = canvas.rng
    canvas.tilt(0.03, 0.12)
    canvas.dim_corners(0.2, 0.5)
    if rng.random() < 0.5:
        canvas.galaxy(*canvas.place(0.5), width=rng.uniform(0.03, 0.1), brightness=rng.uniform(0.03, 0.1))
    canvas.small_galaxies()


def _star_halos(canvas):
    """Very bright stars, whose scattered light reaches far, on a tilted sky with a little dust."""
    rng = canvas.rng
    canvas.tilt(0.3, 1.0)
    cirrus = np.clip(canvas.fractal(rng.uniform(2.7, 3.4)) - rng.uniform(-0.5, 0.5), 0, None) ** 1.3
    cirrus *= rng.uniform(0.03, 0.1) * np.ptp(canvas.gradient()) / np.quantile(cirrus, 0.99)
    canvas.shine(cirrus, _color(rng, (1.1, 1.0, 0.9), 0.1))
    slope = rng.uniform(2, 3)                               # of the wings; the same optics scatter every star
    fwhm = rng.uniform(1.5, 2.5) / canvas.longer
    for _ in range(rng.integers(2, 7)):
        x, y = canvas.place(0.95)
        r = canvas.distance(x, y)
        core_radius = rng.uniform(0.003, 0.008)
        color = _color(rng, NEUTRAL, 0.3)
        canvas.shine(np.exp(rng.uniform(0, np.log(15))) * (1 + (r / core_radius) ** 2) ** (-slope / 2), color)
        core = (1 + (r / fwhm) ** 2) ** -3
        canvas.star_parts.append(((core * rng.uniform(3, 30) / canvas.level).astype(np.float32), color))
    canvas.small_galaxies()


def _narrowband(canvas):
    """Through a narrow filter: hardly any sky, a nebula with filaments over 60 % of the frame, a mild gradient."""
    rng = canvas.rng
    canvas.level = np.exp(rng.uniform(np.log(0.002), np.log(0.01)))
    canvas.noise_fraction = rng.uniform(0.04, 0.15)
    canvas.tilt(0.15, 0.5)
    canvas.nebula(rng.uniform(0.5, 0.7), np.exp(rng.uniform(np.log(0.5), np.log(5))), sharpness=rng.uniform(0.08, 0.2))


def _pedestal(canvas):
    """A pedestal of a fifth of full scale under a gradient of 0.4 %; one small object."""
    rng = canvas.rng
    canvas.pedestal = rng.uniform(0.15, 0.25) * rng.uniform(0.98, 1.02, 3)
    canvas.level = rng.uniform(0.01, 0.03)
    span = rng.uniform(0.003, 0.005) / canvas.level
    canvas.tilt(span, span)
    if rng.random() < 0.5:
        canvas.galaxy(*canvas.place(0.6), width=rng.uniform(0.05, 0.15), brightness=rng.uniform(0.02, 0.08))
    else:
        canvas.nebula(rng.uniform(0.04, 0.12), rng.uniform(0.1, 0.5))
    canvas.small_galaxies()


def _plane_galaxy(canvas):
    """A galaxy on a sky that is a perfect plane."""
    rng = canvas.rng
    canvas.tilt(0.2, 1.0, curvature=0)
    canvas.galaxy(*canvas.place(0.5), width=rng.uniform(0.15, 0.35), brightness=rng.uniform(0.02, 0.08))
    canvas.small_galaxies()
