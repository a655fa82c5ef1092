#!/usr/bin/env python3
"""Makes imgs/demo.xisf: an invented emission nebula under a two-colored city sky.

    python tests/make_demo.py            # writes imgs/demo.xisf
    python tests/make_demo.py other.xisf

The picture is what a stacked, linear color photograph from a suburban garden looks like: faint
object, bright uneven sky, stars, noise, and the empty border that aligning the frames leaves
behind. As everything in it is computed, the true sky is known, and a result can be measured against
it: see demo_picture().

The same command gives the same file, byte for byte, on any machine: the seed and the dates are
fixed, the random numbers are those of numpy's frozen RandomState, and all arithmetic before the
rounding to 16 bits is in double precision. (Another release of the LZ4 library may pack the same
pixels into other bytes.)
"""
import hashlib
import struct
import sys
from pathlib import Path
from xml.sax.saxutils import quoteattr

import lz4.block
import numpy as np
from scipy.ndimage import map_coordinates

DEMO = Path(__file__).resolve().parent.parent / "imgs" / "demo.xisf"
SEED = 2237  # the Rosette's number in the New General Catalogue
HEIGHT, WIDTH = 640, 960
WHITE = 65535

READ_NOISE = 0.0007  # of the full range, per channel: what is left of it after stacking
PHOTON_NOISE = 0.0042  # noise = this * sqrt(signal): at a sky of 0.05, 2 % of the sky
SEEING = 2.3  # full width of a star at half its height, pixels

NEBULA_ROW = 0.485 * HEIGHT
NEBULA_COLUMN = 0.545 * WIDTH
NEBULA_RADIUS = 128.0  # pixels, to the crest of the ring
NEBULA_PEAK = 0.050  # of the full range, in the brightest channel; about as bright as the sky


def demo_picture():
    """The demo picture and the sky that is in it.

    Returns
    -------
    picture : uint16 array, (height, width, 3)
        The linear picture as a file holds it. Exactly 0 in the border where no frame reached, and
        nowhere else.
    sky : float64 array, (height, width, 3)
        The true background, in [0, 1], over the whole frame: what a perfect background model would
        be.
    """
    random = np.random.RandomState(SEED)
    sky = city_sky()
    light = sky + nebula(random) + stars(random)  # (h, w, 3)
    noise = np.sqrt(READ_NOISE ** 2 + PHOTON_NOISE ** 2 * light)
    light = light + noise * random.normal(size=light.shape)
    picture = np.rint(WHITE * light.clip(0, 1))
    picture = picture.clip(1, WHITE)
    picture[~reached()] = 0
    return picture.astype(np.uint16), sky


def pixel_centers():
    """Return the row and the column of the center of every pixel, (h, w) each."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    return y, x


def tinted(light, color):
    """Return light (h, w) in this color (3,), (h, w, 3)."""
    return light[..., None] * np.array(color)


def city_sky():
    """Return the sky, (h, w, 3).

    In it are airglow, an old town's orange sodium lamps low on the left, and new bluish lamps high
    on the right.
    """
    row, column = pixel_centers()
    y = row / WIDTH
    x = column / WIDTH
    bottom = HEIGHT / WIDTH
    airglow = 1 + 0.10 * (y - bottom / 2) - 0.06 * (x - 0.5)
    to_sodium = np.hypot((x + 0.10) / 0.52, (y - bottom - 0.12) / 0.44)
    to_lamps = np.hypot((x - 1.06) / 0.46, (y + 0.10) / 0.36)
    sodium = np.exp(-to_sodium ** 1.5)
    lamps = np.exp(-to_lamps ** 1.6)
    return (
        tinted(airglow, [0.0260, 0.0290, 0.0270])
        + tinted(sodium, [0.1050, 0.0500, 0.0140])
        + tinted(lamps, [0.0170, 0.0350, 0.0560])
    )


def clouds(random, slope, smallest=0.0):
    """Return fractal noise of mean 0 and deviation 1, (h, w).

    Its power spectrum falls with `slope`. `smallest` is a blur in pixels that takes out the finest
    grain.
    """
    fy = np.fft.fftfreq(HEIGHT)[:, None]
    fx = np.fft.rfftfreq(WIDTH)[None, :]
    f = np.hypot(fy, fx)
    f[0, 0] = 1.0
    blur = np.exp(-2 * (np.pi * smallest * f) ** 2)
    amplitude = f ** (-slope / 2) * blur
    amplitude[0, 0] = 0.0
    noise = random.normal(size=(HEIGHT, WIDTH))
    spectrum = np.fft.rfft2(noise) * amplitude
    field = np.fft.irfft2(spectrum, s=(HEIGHT, WIDTH))
    return field / field.std()


def step(x, width):
    """Return 0 far below 0, 1 far above it, and a smooth rise of about this width between."""
    return 1 / (1 + np.exp(-x / width))


def nebula(random):
    """Return a ring of glowing hydrogen around a hollow, cut by dust, (h, w, 3).

    The hollow was blown by the nebula's young stars.
    """
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.0
    swirl = [clouds(random, 3.9, 4.0) for _ in range(4)]

    def swirled(slope, smallest, reach):
        """Return clouds sheared by turbulence: they look like gas; without, like marble."""
        field = clouds(random, slope, smallest)
        where = [rows + reach * swirl[0], columns + reach * swirl[1]]
        return map_coordinates(field, where, order=1, mode="grid-wrap")

    y = (rows - NEBULA_ROW) / NEBULA_RADIUS + 0.16 * swirl[2]
    x = (columns - NEBULA_COLUMN) / NEBULA_RADIUS + 0.16 * swirl[3]
    r = np.hypot(0.93 * x + 0.18 * y, 1.08 * y)
    ring_width = np.where(r < 0.90, 0.40, 0.46)
    ring = np.exp(-((r - 0.90) / ring_width) ** 2)
    heart = np.exp(-(r / 0.78) ** 2)
    edge = step(1.95 - r, 0.10)  # beyond it there is nothing: the sky there is pure

    billows = swirled(3.3, 1.5, reach=16)
    fronts = swirled(3.3, 1.5, reach=26)  # bright where it crosses 0: thin shells seen edge on
    wisps = swirled(2.6, 1.0, reach=12)
    coarse = np.exp(-3.6 * np.abs(fronts))
    fine = np.exp(-2.2 * np.abs(wisps))
    shells = coarse + 0.45 * fine
    in_ring = np.exp(0.50 * billows + 0.16 * wisps)
    in_heart = np.exp(0.35 * billows - 0.22 * fronts)
    hydrogen = ring * in_ring * (0.32 + 0.95 * shells) * edge
    oxygen = heart * in_heart * (0.75 + 0.35 * shells) * edge

    dust = swirled(3.0, 1.0, reach=34) + 0.25 * wisps
    globules = step(dust - 1.05, 0.16)
    to_lane = np.abs(dust + 0.35) / 0.38
    lanes = np.exp(-to_lane ** 1.5)
    lanes = lanes / (1 + np.exp(-(billows + 0.2) / 0.35))  # only in billows
    thickness = 1.7 * globules + 0.75 * lanes
    depth = tinted(thickness, [0.85, 1.0, 1.2])  # dust reddens

    glow = tinted(hydrogen, [1.00, 0.17, 0.27]) + tinted(oxygen, [0.16, 0.46, 0.52])
    light = glow * np.exp(-depth)
    brightest = np.percentile(light, 99.7)
    return light * (NEBULA_PEAK / brightest)


def stars(random):
    """Return stars of all colors, and a young blue cluster in the nebula's hollow, (h, w, 3)."""
    field = 2600  # stars
    cluster = 34
    field_y = random.uniform(-4, HEIGHT + 4, field)
    cluster_y = NEBULA_ROW + 26 * random.normal(size=cluster)
    field_x = random.uniform(-4, WIDTH + 4, field)
    cluster_x = NEBULA_COLUMN + 26 * random.normal(size=cluster)
    # Brightness at the center, of the full range. Stars get more numerous by a factor of about 2.2
    # a magnitude.
    field_peak = 0.0022 * random.uniform(size=field) ** (-1 / 0.86)
    cluster_peak = 0.02 * random.uniform(size=cluster) ** (-1 / 0.95)
    hotter = np.abs(0.62 * random.normal(size=field) + 0.42)
    field_kelvin = 3300 * np.exp(hotter)
    cluster_kelvin = random.uniform(12e3, 26e3, cluster)

    y = np.append(field_y, cluster_y)
    x = np.append(field_x, cluster_x)
    peak = np.append(field_peak, cluster_peak)
    peak = peak.clip(0, 6)  # the brightest are burnt out, as in life
    colors = star_color(np.append(field_kelvin, cluster_kelvin))
    light = np.zeros((HEIGHT, WIDTH, 3))
    for star in zip(y, x, peak, colors):
        add_star(light, *star)
    return light


def add_star(light, row, column, peak, color):
    """Add a star to light (h, w, 3), in place."""
    reach = 6 + 26 * min(1.0, peak) ** 0.5 + 6 * np.log1p(peak)
    reach = int(np.ceil(reach))  # pixels
    rows = pixels_near(row, reach, HEIGHT)
    columns = pixels_near(column, reach, WIDTH)
    if not (len(rows) and len(columns)):
        return
    dy = rows + 0.5 - row
    dx = columns + 0.5 - column
    r = np.hypot(dy[:, None], dx[None, :])
    beta = 3.2  # of Moffat's profile, the shape the air gives to a star
    core = SEEING / 2 / np.sqrt(2 ** (1 / beta) - 1)
    profile = (1 + (r / core) ** 2) ** -beta
    to_the_end = (r / (reach + 1)).clip(0, 1)
    shape = profile * (1 - to_the_end ** 2)
    light[np.ix_(rows, columns)] += peak * shape[..., None] * color


def pixels_near(center, reach, length):
    """Return the pixels of an axis that are within reach of a center."""
    first = max(0, int(center) - reach)
    end = min(length, int(center) + reach + 1)
    return np.arange(first, end)


def star_color(kelvin):
    """Return the colors (n, 3) of stars of these temperatures (n,), brightest channel 1.

    This is Planck's law at 620, 530 and 460 nm, the sun white.
    """
    def planck(t):
        meters = np.array([620e-9, 530e-9, 460e-9])
        return meters ** -5 / np.expm1(0.01438777 / (meters * t[:, None]))

    sun = np.array([5800.0])
    color = planck(kelvin) / planck(sun)
    return color / color.max(axis=1, keepdims=True)


def reached():
    """Return where at least one of the stacked frames reached, (h, w).

    They were shifted, and a little turned.
    """
    y, x = pixel_centers()
    right_of_left = x > 15 - 0.012 * y
    left_of_right = x < WIDTH - 2 - 0.010 * y
    below_top = y > 3 + 0.011 * x
    above_bottom = y < HEIGHT - 12 + 0.009 * x
    return right_of_left & left_of_right & below_top & above_bottom


KEYWORDS = (  # FITS: name, value as it stands in a header (strings in quotes), comment
    ("OBJECT", "'Demo nebula'", "invented"),
    ("IMAGETYP", "'Master Light'", "stacked"),
    ("INSTRUME", "'tests/make_demo.py'", "camera"),
    ("FILTER", "'RGB'", "one-shot color"),
    ("EXPTIME", "180.0", "seconds, one frame"),
    ("STACKCNT", "40", "frames in the stack"),
    ("FOCALLEN", "530.0", "mm"),
    ("XPIXSZ", "3.76", "micrometers"),
    ("DATE-OBS", "'2024-01-13T21:30:00.000'", "UTC"),
    ("HISTORY", "", "made by tests/make_demo.py of bgoptimizer"),
)
PROPERTIES = (  # XISF: id, type, value
    ("Observation:Object:Name", "String", "Demo nebula"),
    ("Observation:Time:Start", "TimePoint", "2024-01-13T21:30:00.000Z"),
    ("Instrument:Camera:Name", "String", "tests/make_demo.py"),
    ("Instrument:ExposureTime", "Float32", "180"),
    ("Instrument:Telescope:FocalLength", "Float32", "0.53"),
)
METADATA = (
    ("XISF:CreationTime", "TimePoint", "2024-01-14T12:00:00Z"),
    ("XISF:CreatorApplication", "String", "bgoptimizer tests/make_demo.py"),
    ("XISF:Title", "String", "bgoptimizer demo picture"),
)
XISF_ROOT = (
    '<?xml version="1.0" encoding="UTF-8"?>'
    '<xisf version="1.0" xmlns="http://www.pixinsight.com/xisf"'
    ' xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"'
    ' xsi:schemaLocation="http://www.pixinsight.com/xisf'
    ' http://pixinsight.com/xisf/xisf-1.0.xsd">'
)
BLOCK_ALIGNMENT = 4096
BEFORE_HEADER = 16  # bytes: signature, length of the header, reserved


def xisf_bytes(picture):
    """Return an XISF file of a uint16 picture (h, w, 3), compressed with shuffling and lz4hc."""
    planes = picture.transpose(2, 0, 1)  # one after another, as XISF wants them
    planes = np.ascontiguousarray(planes, dtype="<u2")
    samples = planes.view(np.uint8).reshape(-1, 2)
    shuffled = samples.T.tobytes()  # all low bytes, then all high bytes
    block = lz4.block.compress(shuffled, mode="high_compression", compression=9, store_size=False)

    position = BLOCK_ALIGNMENT  # it stands in the header, and the header has to end before it
    header = xisf_header(planes, block, position)
    while BEFORE_HEADER + len(header) > position:
        position += BLOCK_ALIGNMENT
        header = xisf_header(planes, block, position)
    start = struct.pack("<8sII", b"XISF0100", len(header), 0)
    return start + header.ljust(position - BEFORE_HEADER, b"\0") + block


def xisf_header(planes, block, position):
    """Return the XML of a file whose planes (3, h, w) are in a block at this position."""
    channels, height, width = planes.shape
    checksum = hashlib.sha1(block).hexdigest()
    image = element("Image", {
        "id": "demo",
        "geometry": "{}:{}:{}".format(width, height, channels),
        "sampleFormat": "UInt16",
        "colorSpace": "RGB",
        "location": "attachment:{}:{}".format(position, len(block)),
        "compression": "lz4hc+sh:{}:2".format(planes.nbytes),
        "checksum": "sha-1:" + checksum,
    })
    parts = [XISF_ROOT, image, ">"]
    for name, value, comment in KEYWORDS:
        keyword = {"name": name, "value": value, "comment": comment}
        parts.append(element("FITSKeyword", keyword) + "/>")
    parts += [property_element(*each) for each in PROPERTIES]
    parts.append("</Image><Metadata>")
    parts += [property_element(*each) for each in METADATA]
    parts.append("</Metadata></xisf>")
    return "".join(parts).encode("utf-8")


def element(name, attributes):
    """Return the start of an XML element, still open."""
    text = "<" + name
    for key, value in attributes.items():
        text += " {}={}".format(key, quoteattr(value))
    return text


def property_element(name, kind, value):
    """Return an XISF property: the value of a text is its content, of others an attribute."""
    head = element("Property", {"id": name, "type": kind})
    if kind == "String":
        return head + ">{}</Property>".format(value)
    return head + " value={}/>".format(quoteattr(value))


def main(argv=None):
    arguments = sys.argv[1:] if argv is None else argv
    path = Path(arguments[0]) if arguments else DEMO
    picture, _ = demo_picture()
    content = xisf_bytes(picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    megabytes = len(content) / 1e6
    print("{}: {:.2f} MB, {} x {} pixels".format(path, megabytes, WIDTH, HEIGHT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
