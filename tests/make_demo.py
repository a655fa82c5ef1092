#!/usr/bin/env python3
"""Makes imgs/demo.xisf: an invented emission nebula under a two-colored city sky.

    python tests/make_demo.py            # writes imgs/demo.xisf
    python tests/make_demo.py other.xisf

The picture is what a stacked, linear color photograph from a suburban garden looks like: faint object, bright
uneven sky, stars, noise, and the empty border that aligning the frames leaves behind. As everything in it is
computed, the true sky is known, and a result can be measured against it: see demo_picture().

The same command gives the same file, byte for byte, on any machine: the seed and the dates are fixed, the random
numbers are those of numpy's frozen RandomState, and all arithmetic before the rounding to 16 bits is in double
precision. (Another release of the LZ4 library may pack the same pixels into other bytes.)
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

NEBULA_CENTER = (0.485, 0.545)  # of the height and the width
NEBULA_RADIUS = 128.0  # pixels, to the crest of the ring
NEBULA_PEAK = 0.050  # of the full range, in the brightest channel; about as bright as the sky itself


def demo_picture():
    """The demo picture and the sky that is in it.

    Returns
    -------
    picture : uint16 array, (height, width, 3)
        The linear picture as a file holds it. Exactly 0 in the border where no frame reached, and nowhere else.
    sky : float64 array, (height, width, 3)
        The true background, in [0, 1], over the whole frame: what a perfect background model would be.
    """
    random = np.random.RandomState(SEED)
    sky = city_sky()
    light = sky + nebula(random) + stars(random)  # (h, w, 3)
    noise = np.sqrt(READ_NOISE ** 2 + PHOTON_NOISE ** 2 * light)
    light = light + noise * random.normal(size=light.shape)
    picture = np.rint(WHITE * light.clip(0, 1)).clip(1, WHITE)
    picture[~reached()] = 0
    return picture.astype(np.uint16), sky


def frame():
    """Rows and columns of the pixels, both from 0 to about 1 along the longer side: two arrays (h, w)."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    return y / WIDTH, x / WIDTH


def city_sky():
    """Airglow, an old town's orange sodium lamps low on the left, new bluish ones high on the right: (h, w, 3)."""
    y, x = frame()
    bottom = HEIGHT / WIDTH
    airglow = 1 + 0.10 * (y - bottom / 2) - 0.06 * (x - 0.5)
    sodium = np.exp(-np.hypot((x + 0.10) / 0.52, (y - bottom - 0.12) / 0.44) ** 1.5)
    lamps = np.exp(-np.hypot((x - 1.06) / 0.46, (y + 0.10) / 0.36) ** 1.6)
    return (airglow[..., None] * np.array([0.0260, 0.0290, 0.0270])
            + sodium[..., None] * np.array([0.1050, 0.0500, 0.0140])
            + lamps[..., None] * np.array([0.0170, 0.0350, 0.0560]))


def clouds(random, slope, smallest=0.0):
    """Fractal noise of mean 0 and deviation 1, (h, w): a power spectrum that falls with `slope`.

    `smallest` is a blur in pixels that takes out the finest grain.
    """
    fy, fx = np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None, :]
    f = np.hypot(fy, fx)
    f[0, 0] = 1.0
    amplitude = f ** (-slope / 2) * np.exp(-2 * (np.pi * smallest * f) ** 2)
    amplitude[0, 0] = 0.0
    field = np.fft.irfft2(np.fft.rfft2(random.normal(size=(HEIGHT, WIDTH))) * amplitude, s=(HEIGHT, WIDTH))
    return field / field.std()


def nebula(random):
    """A ring of glowing hydrogen around a hollow that its young stars have blown, cut by dust: (h, w, 3)."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.0
    swirl = [clouds(random, 3.9, 4.0) for _ in range(4)]

    def swirled(field, reach):  # cloud sheared by turbulence looks like gas; without, like marble
        where = [rows + reach * swirl[0], columns + reach * swirl[1]]
        return map_coordinates(field, where, order=1, mode="grid-wrap")

    y = (rows - NEBULA_CENTER[0] * HEIGHT) / NEBULA_RADIUS + 0.16 * swirl[2]
    x = (columns - NEBULA_CENTER[1] * WIDTH) / NEBULA_RADIUS + 0.16 * swirl[3]
    r = np.hypot(0.93 * x + 0.18 * y, 1.08 * y)
    ring = np.exp(-((r - 0.90) / np.where(r < 0.90, 0.40, 0.46)) ** 2)
    heart = np.exp(-(r / 0.78) ** 2)
    edge = 1 / (1 + np.exp((r - 1.95) / 0.10))  # beyond it there is nothing: the sky there is pure

    billows = swirled(clouds(random, 3.3, 1.5), 16)
    fronts = swirled(clouds(random, 3.3, 1.5), 26)  # bright where it crosses 0: thin shells seen edge on
    wisps = swirled(clouds(random, 2.6, 1.0), 12)
    shells = np.exp(-3.6 * np.abs(fronts)) + 0.45 * np.exp(-2.2 * np.abs(wisps))
    hydrogen = ring * np.exp(0.50 * billows + 0.16 * wisps) * (0.32 + 0.95 * shells) * edge
    oxygen = heart * np.exp(0.35 * billows - 0.22 * fronts) * (0.75 + 0.35 * shells) * edge

    dust = swirled(clouds(random, 3.0, 1.0), 34) + 0.25 * wisps
    globules = 1 / (1 + np.exp(-(dust - 1.05) / 0.16))
    lanes = np.exp(-(np.abs(dust + 0.35) / 0.38) ** 1.5) / (1 + np.exp(-(billows + 0.2) / 0.35))
    depth = (1.7 * globules + 0.75 * lanes)[..., None] * np.array([0.85, 1.0, 1.2])  # dust reddens

    glow = hydrogen[..., None] * np.array([1.00, 0.17, 0.27]) + oxygen[..., None] * np.array([0.16, 0.46, 0.52])
    light = glow * np.exp(-depth)
    return light * (NEBULA_PEAK / np.percentile(light, 99.7))


def stars(random):
    """Field stars of all colors, and a young blue cluster in the nebula's hollow: (h, w, 3)."""
    field, cluster = 2600, 34
    y = np.append(random.uniform(-4, HEIGHT + 4, field), NEBULA_CENTER[0] * HEIGHT + 26 * random.normal(size=cluster))
    x = np.append(random.uniform(-4, WIDTH + 4, field), NEBULA_CENTER[1] * WIDTH + 26 * random.normal(size=cluster))
    # Brightness at the center, of the full range. Stars get more numerous by a factor of about 2.2 a magnitude.
    peak = np.append(0.0022 * random.uniform(size=field) ** (-1 / 0.86),
                     0.02 * random.uniform(size=cluster) ** (-1 / 0.95))
    peak = peak.clip(0, 6)  # the brightest are burnt out, as in life
    kelvin = np.append(3300 * np.exp(np.abs(0.62 * random.normal(size=field) + 0.42)),
                       random.uniform(12e3, 26e3, cluster))

    light = np.zeros((HEIGHT, WIDTH, 3))
    for row, column, height, color in zip(y, x, peak, star_color(kelvin)):
        reach = int(np.ceil(6 + 26 * min(1.0, height) ** 0.5 + 6 * np.log1p(height)))
        top, left = max(0, int(row) - reach), max(0, int(column) - reach)
        dy = np.arange(top, min(HEIGHT, int(row) + reach + 1)) + 0.5 - row
        dx = np.arange(left, min(WIDTH, int(column) + reach + 1)) + 0.5 - column
        if not (len(dy) and len(dx)):
            continue
        r = np.hypot(dy[:, None], dx[None, :])
        beta = 3.2  # of Moffat's profile, the shape the air gives to a star
        core = SEEING / 2 / np.sqrt(2 ** (1 / beta) - 1)
        shape = ((1 + (r / core) ** 2) ** -beta) * (1 - (r / (reach + 1)).clip(0, 1) ** 2)
        light[top:top + len(dy), left:left + len(dx)] += height * shape[..., None] * color
    return light


def star_color(kelvin):
    """Planck's law at 620, 530 and 460 nm for temperatures (n,), the sun white: (n, 3), brightest channel 1."""
    def planck(t):
        meters = np.array([620e-9, 530e-9, 460e-9])
        return meters ** -5 / np.expm1(0.01438777 / (meters * t[:, None]))
    color = planck(kelvin) / planck(np.array([5800.0]))
    return color / color.max(axis=1, keepdims=True)


def reached():
    """Where at least one of the stacked frames reached, (h, w): they were shifted, and a little turned."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    return (x > 15 - 0.012 * y) & (x < WIDTH - 2 - 0.010 * y) & (y > 3 + 0.011 * x) & (y < HEIGHT - 12 + 0.009 * x)


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
BLOCK_ALIGNMENT = 4096


def xisf_bytes(picture):
    """An XISF file of a uint16 picture (h, w, 3), compressed with lz4hc and byte shuffling."""
    height, width, channels = picture.shape
    planes = np.ascontiguousarray(picture.transpose(2, 0, 1), dtype="<u2")  # one after another, as XISF wants them
    shuffled = planes.view(np.uint8).reshape(-1, 2).T.tobytes()  # all low bytes, then all high bytes
    block = lz4.block.compress(shuffled, mode="high_compression", compression=9, store_size=False)

    def element(name, attributes):
        return "<" + name + "".join(" {}={}".format(key, quoteattr(value)) for key, value in attributes)

    def property_element(name, kind, value):
        head = element("Property", [("id", name), ("type", kind)])
        return head + (">{}</Property>".format(value) if kind == "String" else " value={}/>".format(quoteattr(value)))

    def header(position):
        image = element("Image", [
            ("id", "demo"), ("geometry", "{}:{}:{}".format(width, height, channels)), ("sampleFormat", "UInt16"),
            ("colorSpace", "RGB"), ("location", "attachment:{}:{}".format(position, len(block))),
            ("compression", "lz4hc+sh:{}:2".format(planes.nbytes)),
            ("checksum", "sha-1:" + hashlib.sha1(block).hexdigest())])
        return "".join([
            '<?xml version="1.0" encoding="UTF-8"?>',
            '<xisf version="1.0" xmlns="http://www.pixinsight.com/xisf"'
            ' xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"'
            ' xsi:schemaLocation="http://www.pixinsight.com/xisf http://pixinsight.com/xisf/xisf-1.0.xsd">',
            image, ">",
            *[element("FITSKeyword", zip(("name", "value", "comment"), keyword)) + "/>" for keyword in KEYWORDS],
            *[property_element(*each) for each in PROPERTIES],
            "</Image><Metadata>", *[property_element(*each) for each in METADATA], "</Metadata></xisf>",
        ]).encode("utf-8")

    position = BLOCK_ALIGNMENT  # it stands in the header, and the header has to end before it
    while 16 + len(header(position)) > position:
        position += BLOCK_ALIGNMENT
    text = header(position)
    return struct.pack("<8sII", b"XISF0100", len(text), 0) + text.ljust(position - 16, b"\0") + block


def main(argv=None):
    arguments = sys.argv[1:] if argv is None else argv
    path = Path(arguments[0]) if arguments else DEMO
    content = xisf_bytes(demo_picture()[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    print("{}: {:.2f} MB, {} x {} pixels".format(path, len(content) / 1e6, WIDTH, HEIGHT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
