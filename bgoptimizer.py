#!/usr/bin/env python3
"""Take the uneven sky out of a linear astrophoto.

Light pollution, moonlight, and airglow lay a smooth, uneven veil over every
deep-sky picture. No single pixel can tell where the veil ends and a nebula
begins, but the veil is smooth, and most of the frame shows nothing else. All of
that is used: a reduced, stretched, and masked copy of the picture is made, one
polyharmonic spline surface is fitted to the sky in it by gradient descent, and
the surface, brought back to linear full size, is taken out of the picture.
Nobody places samples. Run it after stacking and cropping, before color
calibration and stretching.

examples:
  bgoptimizer.py m31.xisf                   m31_bgModel and m31_bgSubtracted.xisf
  bgoptimizer.py m31.xisf out --auto        leave out objects, found by the tool
  bgoptimizer.py m31.xisf -p                look first; nothing is fitted
  bgoptimizer.py m31.xisf -p -dq 0.99       ... with a weaker stretch
  bgoptimizer.py m31.xisf out -m mask.xisf  your own mask: 1 = sky, 0 = leave out
  bgoptimizer.py m31.xisf out --auto --save-mask --animate
                                            also the mask, to edit, and a GIF

from Python, with image of shape (h, w, c), linear, in 0..1:
  result = bgoptimizer.optimize(image, bgoptimizer.Settings(auto=True))
  result.subtracted, result.model

exit codes: 0 done, 1 could not be done, 2 wrong usage, 130 interrupted
"""
from __future__ import annotations

import argparse
import base64
import copy
import functools
import hashlib
import importlib.util
import io
import itertools
import math
import numbers
import os
import re
import secrets
import shutil
import signal
import stat
import sys
import tempfile
import textwrap
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields, replace
from datetime import datetime, timezone
from typing import Callable, Iterator, NamedTuple, Sequence
from xml.etree import ElementTree
from xml.parsers import expat

if __name__ == "__main__":  # until `main` listens, Ctrl-C ends the command at once, without a traceback of imports
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# Full-size work has threads of its own, and the equations solved here are small: threads of BLAS beside them only
# get in each other's way (the choices of --auto take 2.7 s with them, 0.8 s without). OpenBLAS looks once, when loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import lz4.block  # noqa: E402
import numpy as np  # noqa: E402
import scipy  # noqa: E402  (its parts are imported when first used)
import zstandard  # noqa: E402
from xisf import XISF  # noqa: E402

VERSION = "1.0.0"

# ---------------------------------------------------------------------------------------------------------
# Constants
# ---------------------------------------------------------------------------------------------------------

MIDTONES_TARGET = 0.25
"""Stretched value that the median of a channel is taken to: PixInsight's own choice for a readable sky."""

LOSS_FLOOR = 0.001
"""Added inside the logarithm of the loss. It decides from which residual on (in stretched units) a pixel is
good enough, and keeps the logarithm finite where the surface meets the pixel exactly."""

SAMPLE_PIXELS = 2048
"""Reduced pixels in one independent sample (`-B` of them in a step). The surface has some hundred degrees of
freedom: at a block noise of 1 % of the gradient, 2048 pixels pin 36 control points to 0.13 %, a quarter of what the
rest of the method leaves."""

STOP_PATIENCE, STOP_DELTA = 100, 5e-5
"""Epochs without so much improvement of the loss after which the fit stops."""

RATE_PATIENCE, RATE_FLOOR = 50, 1e-4
"""Epochs without improvement after which the learning rate is halved, and the rate it never falls below."""

SURFACE_NODES = 500
"""The full-size surface is the spline itself on about this many nodes along the longer side, and cubic
interpolation between them; far finer than the surface bends (see `SkySurface`)."""

QUANTILE_SAMPLES = 1 << 23
"""Samples of a channel that quantiles are taken of, at least; from twice as many on a part of them is enough."""

STRIP_PIXELS = 1 << 18
"""Pixels of one channel handled at a time in full-size work: 1 MB of Float32, which stays in cache."""

TRACK_EVERY = 10
"""Epochs between two recordings of the control points."""

STIFFEST_FIT = 10.0
"""Largest smoothing of the fit with --auto, which starts from a surface that is stiff already: beyond, the equations
lose their digits in Float32."""

HELD_BACK = 0.25
"""The surface may exceed the range of values that it has over the sky by this fraction, and no further: a corner
without sky, or hills, cannot make it run away."""

DEFAULT_QUANTILE, DEFAULT_POINTS = 0.95, 32
AUTO_QUANTILE, AUTO_POINTS = 0.999, 64

WORKERS = min(4, os.cpu_count() or 1)
"""Threads for full-size work. NumPy frees the interpreter lock in it, and memory bandwidth ends the gain at 4."""


# ---------------------------------------------------------------------------------------------------------
# Settings and errors
# ---------------------------------------------------------------------------------------------------------

class BgError(Exception):
    """The job cannot be done. The text is one sentence: what is wrong, and what to do about it."""


@dataclass(frozen=True)
class Settings:
    """What a run is asked to do; checked when made.

    A `None` means: not asked for. `delinearization_quantile`, `points` and `smoothing` are then the default
    of the command line, or what `auto` chooses from the picture.

    Raises:
        ValueError: a value is out of its range; the text names the flag and the range.
    """

    downscaling_factor: int = 8  # less noise, fewer stars, 64 times less to do
    downscaling_func: str = "median"  # drops small stars
    delinearization_quantile: float | None = None  # 0.95; with auto 0.999, which blows out no bright corner of the sky
    points: int | None = None  # 32; with auto 64: more cannot dig into objects that are left out
    order: int = 2  # a thin plate, the surface that bends least
    threshold_min: float = 0.001
    threshold_max: float = 1.0
    initializer: str = "random"
    epochs: int = 1000
    alpha: float = 5.0  # a pixel above the sky costs 1, a sky above the pixel 11: it sits at the low side of the noise
    batch: int = 1  # samples of SAMPLE_PIXELS; one is enough
    learning_rate: float = 0.001
    smoothing: float | None = None  # chosen by cross-validation
    auto: bool = False
    seed: int = 0

    def __post_init__(self):
        def whole(value, low, high=math.inf):
            return isinstance(value, numbers.Integral) and low <= value <= high

        checks = (
            ("-dx", whole(self.downscaling_factor, 1, 1_000_000), "1 to 1000000"),
            ("-df", self.downscaling_func in ("median", "mean"), "median or mean"),
            ("-dq", self.delinearization_quantile is None or 0 < self.delinearization_quantile <= 1,
             "above 0, at most 1"),
            ("-N", self.points is None or whole(self.points, 3, 4096), "3 to 4096"),
            ("-O", self.order in (1, 2, 3, 4), "1, 2, 3 or 4"),
            ("-tm", math.isfinite(self.threshold_min), "a finite number"),
            ("-tM", self.threshold_min < self.threshold_max < math.inf, "a finite number above -tm"),
            ("-i", self.initializer in ("random", "grid"), "random or grid"),
            ("-e", whole(self.epochs, 1), "1 or more"),
            ("-a", 0 <= self.alpha <= 1e9, "0 to 1e9"),
            ("-B", whole(self.batch, 1), "1 or more"),
            ("-lr", 0 < self.learning_rate <= 1e9, "above 0, at most 1e9"),
            ("--smoothing", self.smoothing is None or 0 <= self.smoothing <= 1e9, "auto, or 0 to 1e9"),
            ("--seed", whole(self.seed, 0, 2**32 - 1), "0 to 4294967295"),
        )
        for flag, good, wanted in checks:
            if not good:
                raise ValueError(f"{flag} must be {wanted}")


def _quiet(*_):
    """The default listener for a run's messages: nobody."""


# --------------------------------------------------------------------------------------------------
# Pictures on disk: XISF
#
# The specification: https://pixinsight.com/doc/docs/XISF-1.0-spec/XISF-1.0-spec.html. Where it is
# silent, or where PixInsight reads more than it allows, PixInsight's reader decides.
#
# The header is parsed and checked here, because the `xisf` package fails on many real headers. The
# package then reads and decompresses the blocks that the checked header describes. Files are
# written here, because the package's writer loses metadata.
# --------------------------------------------------------------------------------------------------

XML_DECLARATION = b'<?xml version="1.0" encoding="UTF-8"?>'
XISF_ROOT = {
    "version": "1.0",
    "xmlns": "http://www.pixinsight.com/xisf",
    "xmlns:xsi": "http://www.w3.org/2001/XMLSchema-instance",
    "xsi:schemaLocation":
        "http://www.pixinsight.com/xisf http://pixinsight.com/xisf/xisf-1.0.xsd",
}
SAMPLE_FORMATS = {  # XISF's names, in lower case, and those of NumPy
    "uint8": "u1", "uint16": "u2", "uint32": "u4", "uint64": "u8", "float32": "f4", "float64": "f8",
}
BYTE_ORDERS = {"little": "<", "big": ">"}
COLOR_CHANNELS = {"gray": 1, "rgb": 3}
INTERLEAVED = {"planar": False, "normal": True}
BOOLEANS = {"1": "true", "t": "true", "0": "false", "f": "false"}
TEXT_DECODERS = {
    "base64": functools.partial(base64.b64decode, validate=True), "hex": bytes.fromhex,
}
CHECKSUMS = {  # XISF's names and those of hashlib
    "sha-1": "sha1", "sha1": "sha1", "sha-256": "sha256", "sha256": "sha256",
    "sha-512": "sha512", "sha512": "sha512", "sha3-256": "sha3_256", "sha3-512": "sha3_512",
}

PART_WEIGHT = 64
"""Bytes of memory that a tag or an attribute of a header takes, roughly."""

MAX_HEADER_WEIGHT = 1 << 24
"""Heaviest header that is read: its bytes, and PART_WEIGHT for each tag and attribute. Real ones
are far below."""

MAX_KEPT_WEIGHT = 3 << 22
"""Heaviest metadata that the outputs take over. With HISTORY, their header must stay below
MAX_HEADER_WEIGHT, so that it can be read again."""

MAX_HEADER_DEPTH = 64
"""Elements inside each other."""

MAX_EXPANSION = {"zlib": 1032, "lz4": 255, "lz4hc": 255, "zstd": 1 << 16}
"""Bytes that one byte of a codec's stream can stand for. A block that claims more is a lie."""

MAX_SUBBLOCKS = 10_000
"""Sub-blocks of one block. Writers make a few for each thread of the processor."""

ZSTD_HEADER_SIZE = 18
"""Bytes: the longest header of a zstd stream."""

CHECKED_AT_ONCE = 1 << 20
"""Bytes that are read together for a checksum."""

LZ4_LIMIT = 0x7E000000
"""Bytes: the largest LZ4 block. More would need sub-blocks, and PixInsight fails on those of more
than 2 GiB together."""

ALIGNMENT = 4096
"""Bytes: attached blocks start at multiples of it, as in PixInsight's own files."""

HISTORY_COLUMNS = 72
"""Characters of text that a HISTORY keyword has room for in a FITS header."""

XISF_NAME = re.compile("[_a-zA-Z][_a-zA-Z0-9]*")
# Without leading zeros: PixInsight takes 010 for 8
XISF_INTEGER = re.compile(r"\+?(0|[1-9][0-9]{0,17}|0x[0-9a-fA-F]{1,15})")
XISF_COMPRESSION = re.compile(
    r"(?P<codec>zlib|lz4|lz4hc|zstd)(?P<shuffled>\+sh)?"
    r":(?P<size>[1-9][0-9]{0,17})(:(?P<item>[1-9]|1[0-6]))?")
# A run of blanks is tried at its start only. Tried at all its characters, a long one takes hours.
BLANKS_AT_SEPARATORS = re.compile(r"(?<!\s)\s+(?=[:,])|(?<=[:,])\s+")
# PixInsight takes these labels, and whatever they say, the header is UTF-8
UNKNOWN_ENCODING = re.compile(
    r"<\?xml[^>]*\sencoding\s*=\s*[\"'](?!(utf-?8|utf-16|iso-8859-1)[\"'])", re.IGNORECASE)
# Characters that XML 1.0 forbids, bare and as references. PixInsight lets them pass.
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
NOT_XML_REFERENCE = re.compile(
    "&#(0*([0-8]|1[124-9]|2[0-9]|3[01])|x0*([0-8bcef]|1[0-9a-f]));", re.IGNORECASE)
# Metadata, as "element name", that describe the old file, and those that new pixels make untrue
STALE_FILE_METADATA = re.compile(
    "(Data|Thumbnail) |Property XISF:"
    "(Creat|Compress|BlockAlign|MaxInline|Checksum|OutputHint|InputHint|ResourceURL|Load)")
STALE_PIXEL_METADATA = re.compile(
    r"FITSKeyword (BITPIX|NAXIS\d*|BSCALE|BZERO|DATAMIN|DATAMAX|CHECKSUM|DATASUM|PEDESTAL"
    r"|NOISE[A-Z]?\d*)$|Property (.*:)?(Statistics|Noise)(:|$)")
STALE_IMAGE_ATTRIBUTES = (
    "location", "compression", "subblocks", "checksum", "byteOrder", "pixelStorage", "offset")

NOT_DECODED = (
    ValueError, OverflowError, zlib.error, zstandard.ZstdError, lz4.block.LZ4BlockError)
"""What the decoders raise on damaged data."""


@dataclass
class Source:
    """What the outputs carry over from a file besides its pixels."""
    root: ElementTree.Element  # the header, without what describes the old pixels and the old file
    blocks: dict  # attached bytes, by the `location` that stands in their elements
    checksum: bool = False  # True if the pixels had a checksum: then those of the outputs get one


@dataclass
class Picture:
    """An image in [0, 1]. Samples that are exactly 0 or not finite are missing."""
    planes: np.ndarray  # (c, h, w), c = 1 or 3; float32, or float64 if the file holds Float64
    source: Source
    warnings: list  # of str, one line each


class _Unreadable(ValueError):
    """What is wrong with a file, in words that go on from its name, and what to do about it."""

    def __init__(self, problem, advice="copy or save it again"):
        super().__init__(problem[:150])
        self.advice = advice


@dataclass
class _OpenFile:
    """A file whose header has been read."""
    file: object
    size: int  # bytes
    header_end: int  # byte at which the first block may start
    bytes_left: int  # of blocks, that may still be read: overlapping ones could fill any memory
    weight_left: int  # of metadata that may still be carried over into the outputs
    warnings: list  # of str, for the user


@dataclass
class _Block:
    """The bytes that belong to an element, as they are stored."""
    attributes: dict  # tell how the bytes are packed
    size: int  # bytes
    position: int | None = None  # in the file
    data: bytes = b""  # the bytes themselves, if they stand in the header


class _BlockReader(XISF):
    """The `xisf` package's reader, which is told where a block is, and parses no header itself."""

    def __init__(self, file, block):
        self._fname = file
        self._images_meta = [block]


def read_xisf(path):
    """Read the first image of a monolithic XISF file.

    Integers are scaled from their full range, or from `bounds` if given, floats from `bounds`.
    Samples below the lower bound become the smallest normal number, not 0, which would mean
    "missing". Samples above the upper bound become 1. Memory never grows past what an honest file
    of the same geometry and size needs.

    Returns a Picture.
    Raises BgError if the file is damaged, hostile, or of a kind that is not read.
    """
    try:
        mode = os.stat(path).st_mode
        _require(stat.S_ISREG(mode), "is not a file",  # and opening a FIFO would wait forever
                 "name an XISF file, or save the data to one first")
        with open(path, "rb") as file:
            root, opened = _read_header(file)
            planes = _read_pixels(root, opened)
            source = _read_source(root, opened)
    except _Unreadable as error:
        raise BgError(f"{path} {error}; {error.advice}") from None
    except OSError as error:
        reason = error.strerror or error
        raise BgError(f"{path} cannot be read: {reason}; check the path and the disk") from None
    except MemoryError:
        raise BgError(f"{path} needs more memory than there is; "
                      "close other programs or crop the picture") from None
    return Picture(planes, source, opened.warnings)


def _require(fact, problem, *advice):
    """Refuse what is being read unless `fact` holds."""
    if not fact:
        raise _Unreadable(problem, *advice)


def _read_header(file):
    """Return the root element, and the file as an _OpenFile."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(16)
    _require(start[:8] == b"XISF0100", "is not a monolithic XISF file", "save the picture as .xisf")
    length = int.from_bytes(start[8:12], "little")
    end = 16 + length
    _require(end <= size, f"is cut short: its header ends at byte {end} of {size}")
    header = file.read(min(length, MAX_HEADER_WEIGHT + 1))
    header, _, _ = header.partition(b"\0")  # some writers count padding in
    _require(_weight(header) <= MAX_HEADER_WEIGHT, "has a header too large to be true")
    root = _parse_header(header.decode("utf-8-sig", "replace"))
    opened = _OpenFile(file, size, header_end=end, bytes_left=2 * size,
                       weight_left=MAX_KEPT_WEIGHT, warnings=[])
    return root, opened


def _weight(markup):
    """Return roughly the bytes of memory that a part of a header takes."""
    parts = markup.count(b"<") + markup.count(b"=")
    return len(markup) + PART_WEIGHT * parts


def _parse_header(text):
    """Return the root element of a header."""
    text = NOT_XML.sub("", text)
    text = NOT_XML_REFERENCE.sub("", text).lstrip()
    _require(not UNKNOWN_ENCODING.match(text), "has a header that is not UTF-8")
    entities = re.search("<!(ENTITY|ATTLIST)", text)
    _require(not entities, "declares XML entities, which can hide a memory bomb")
    content, end, _ = text.rpartition("</xisf>")
    if end:  # what follows is a signature
        text = content + end
    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate()  # without namespaces, as in PixInsight
    parser.buffer_text = True
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(text, True)
    except expat.ExpatError as error:
        raise _Unreadable(f"has a header that is not well-formed XML ({error})") from None
    root = builder.close()
    version = _value(root.attrib, "version")
    _require(root.tag == "xisf" and version == "1.0", "is not XISF version 1.0")
    _refuse_deeper(root, MAX_HEADER_DEPTH)
    return root


def _refuse_deeper(element, depth):
    """Refuse the file if elements are nested more than `depth` levels below an element."""
    deepest = element.find("*/" * depth + "*")
    _require(deepest is None, "has a header nested too deeply to be true")


def _value(attributes, name, default=""):
    """Return an attribute without the white space around it, its colons, and its commas."""
    text = attributes.get(name, default).strip()
    return BLANKS_AT_SEPARATORS.sub("", text)


def _integers(text, count, what):
    """Return the `count` numbers between the colons of `text`."""
    parts = text.split(":", count)
    well_formed = all(map(XISF_INTEGER.fullmatch, parts))
    _require(well_formed and len(parts) == count, f"has the malformed {what} {text!r}")
    return [int(part, 0) for part in parts]


def _look_up(choices, text, what):
    """Look up what `text` stands for, or refuse the file."""
    _require(text in choices, f"has {what} {text!r}, which is not read",
             "save it as 32-bit float, grayscale or RGB")
    return choices[text]


def _find_block(element, opened):
    """Return the _Block of an element. No other file is ever opened for it."""
    attributes = element.attrib
    location = _value(attributes, "location")
    method, _, place = location.partition(":")
    if method == "attachment":
        position, size = _integers(place, 2, "location")
        end = position + size
        _require(position >= opened.header_end, f"has the impossible location {place!r}")
        _require(end <= opened.size, f"is cut short: its data end at byte {end} of {opened.size}")
        opened.bytes_left -= size
        _require(opened.bytes_left >= 0, "has data that overlap with others")
        return _Block(attributes, size, position)
    encoding = place
    if method == "embedded":
        element = element.find("Data")
        _require(element is not None, "has an embedded data block without data")
        attributes = {**attributes, **element.attrib}
        encoding = _value(element.attrib, "encoding", "base64")
    else:
        _require(method == "inline", f"has its data elsewhere, at {location!r}",
                 "save it as one monolithic .xisf file")
    data = _decode_text(element.text, encoding)
    return _Block(attributes, len(data), data=data)


def _decode_text(text, encoding):
    """Return the bytes that stand in the header as text."""
    decode = _look_up(TEXT_DECODERS, encoding.lower(), "data in the encoding")
    digits = "".join((text or "").split())
    try:
        return decode(digits)
    except ValueError:
        raise _Unreadable(f"has damaged {encoding} data") from None


def _read_array(block, opened, start, shape, dtype=np.uint8, codec=None, stored_size=None):
    """Let the `xisf` package read a part of a block, from byte `start` on.

    Returns a read-only array of the three-dimensional `shape`. With a codec, `stored_size` bytes
    are decompressed for it.
    """
    channels, height, width = shape  # to the package
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    described = {"geometry": (width, height, channels), "dtype": dtype}
    if codec:
        described["compression"] = codec, size, None
        size = stored_size
    if block.position is None:
        file = None
        described["location"] = "inline", "base64"
        described["value"] = base64.b64encode(block.data[start:start + size])
    else:
        # The package opens a file by name or descriptor, and closes it. By descriptor it is still
        # the same file if another one takes over its name.
        file = os.dup(opened.file.fileno())
        described["location"] = "attachment", block.position + start, size
    try:
        return _BlockReader(file, described).read_image(0, "channels_first")
    except NOT_DECODED:
        raise _Unreadable("is damaged: its data cannot be read or decompressed") from None


def _read_bytes(block, opened, start, size):
    """Return the `size` stored bytes from byte `start` of a block on, (size,) uint8."""
    return _read_array(block, opened, start, (1, 1, size)).ravel()


def _verify_checksum(block, opened):
    """Refuse a block that does not match its checksum."""
    if "checksum" not in block.attributes:
        return
    checksum = _value(block.attributes, "checksum").lower()
    name, _, expected = checksum.partition(":")
    digest = hashlib.new(_look_up(CHECKSUMS, name, "a checksum of the kind"))
    for start in range(0, block.size, CHECKED_AT_ONCE):
        size = min(CHECKED_AT_ONCE, block.size - start)
        digest.update(_read_bytes(block, opened, start, size))
    matches = digest.hexdigest() == expected
    _require(matches, "is damaged: its data do not match their checksum")


def _read_pixels(root, opened):
    """Return the first image's samples, (c, h, w) in [0, 1]."""
    images = root.findall("Image")
    _require(images, "holds no image", "open it in the program that wrote it and save it again")
    if len(images) > 1:
        opened.warnings.append(f"holds {len(images)} images: only the first is used and kept")
    attributes = images[0].attrib
    block = _find_block(images[0], opened)
    _verify_checksum(block, opened)
    geometry = _integers(_value(attributes, "geometry"), 3, "geometry")
    _require(0 not in geometry, "is a picture without samples")
    width, height, channels = geometry
    color_space = _value(attributes, "colorSpace", "Gray").lower()
    colors = _look_up(COLOR_CHANNELS, color_space, "the color space")
    _require(channels >= colors, f"is called RGB but has {channels} channel(s)")
    if channels > colors:
        opened.warnings.append(f"has {channels - colors} alpha channel(s): dropped")
    dtype = _read_dtype(attributes, block)
    bounds = _read_bounds(attributes, dtype)
    storage = _value(attributes, "pixelStorage", "Planar").lower()
    together = channels  # samples of a pixel that stand together
    if not _look_up(INTERLEAVED, storage, "its samples in the order"):
        together = 1
    size = width * height * channels * dtype.itemsize
    read_rows = _open_samples(block, opened, size, dtype, (width, together))
    planes = np.empty((colors, height, width), "f8" if dtype.name == "float64" else "f4")
    # The same in the file's order: rows of all colors, or rows of one color after those of another
    table = np.moveaxis(planes, 0, 2) if together > 1 else planes.reshape(-1, width, 1)
    clipped = np.zeros(2, int)
    for rows in _strips(len(table), width * together):
        samples = read_rows(rows)[..., :colors]  # (n, w, c) or (n, w, 1)
        clipped += _scale(samples, bounds, table[rows])
    below, above = clipped
    if below or above:
        lower, upper = bounds
        opened.warnings.append(f"has {below} samples below and {above} above its bounds "
                               f"{lower:g}:{upper:g}: clipped")
    return planes


def _read_dtype(attributes, block):
    """Return the type of the samples, with their byte order."""
    sample_format = _value(attributes, "sampleFormat").lower()
    name = _look_up(SAMPLE_FORMATS, sample_format, "samples of the kind")
    byte_order = _value(block.attributes, "byteOrder", "little")
    return np.dtype(_look_up(BYTE_ORDERS, byte_order, "the byte order") + name)


def _read_bounds(attributes, dtype):
    """Return the values that mean black and white. Integers may leave them out, floats may not."""
    lowest, highest = -math.inf, math.inf
    if dtype.kind == "u":
        lowest, highest = 0, 2.0 ** (8 * dtype.itemsize) - 1
    text = _value(attributes, "bounds", f"0:{highest}")
    try:
        lower, upper = sorted(map(float, text.split(":", 2)[:2]))
    except ValueError:
        lower = upper = math.nan
    possible = lowest <= lower < upper <= highest and upper - lower < math.inf
    _require(possible, f"has no or impossible bounds, its black and white: {text!r}")
    return lower, upper


def _open_samples(block, opened, size, dtype, row_shape):
    """Return a function that returns a slice of rows of samples, as stored: (n, *row_shape).

    A row of planes that stand below each other has the shape (w, 1). Where all channels of a pixel
    stand together, it is (w, c). All samples together have `size` bytes.
    """
    codec, unpacked_size, item = _read_compression(block)
    # Checked before memory is taken that the stored bytes do not vouch for
    _require(unpacked_size == size,
             f"is damaged: its data hold {unpacked_size} bytes, its samples need {size}")
    row_size = math.prod(row_shape) * dtype.itemsize
    if codec:
        data = _decompress(block, opened, codec, size)
        if item != dtype.itemsize:
            data = _unshuffle(data, item)
            item = 1
        data = data.reshape(item, -1)  # byte 0 of all samples, byte 1, ...; or all their bytes

    def read_rows(rows):
        start, stop = rows.start * row_size, rows.stop * row_size
        shape = rows.stop - rows.start, *row_shape
        if not codec:
            return _read_array(block, opened, start, shape, dtype)
        part = data[:, start // item:stop // item]
        return _unshuffle(part.ravel(), item).view(dtype).reshape(shape)

    return read_rows


def _read_compression(block):
    """Return the codec (None: not compressed), the size of the data, and of the shuffled items.

    Sizes are in bytes; items of one byte are not shuffled.
    """
    if "compression" not in block.attributes:
        return None, block.size, 1
    text = _value(block.attributes, "compression").lower()
    match = XISF_COMPRESSION.fullmatch(text)
    complete = match and (match["item"] or not match["shuffled"])
    _require(complete, f"is compressed in the unknown way {text!r}")
    item = int(match["item"]) if match["shuffled"] else 1
    return match["codec"], int(match["size"]), item


def _decompress(block, opened, codec, size):
    """Return the `size` bytes that a compressed block holds, (size,) uint8."""
    sizes = [block.size, size]  # of each piece, as stored and unpacked
    if "subblocks" in block.attributes:
        text = _value(block.attributes, "subblocks").replace(",", ":")
        count = min(1 + text.count(":"), 2 * MAX_SUBBLOCKS)
        sizes = _integers(text, count, "list of sub-blocks")
    stored_sizes, unpacked_sizes = sizes[::2], sizes[1::2]
    consistent = len(sizes) % 2 == 0 and 0 not in sizes
    totals = sum(stored_sizes), sum(unpacked_sizes)
    _require(consistent and totals == (block.size, size),
             "has a compressed block that contradicts itself")
    pieces = []
    start = 0
    for stored_size, unpacked_size in zip(stored_sizes, unpacked_sizes):
        piece = _decompress_piece(block, opened, start, stored_size, codec, unpacked_size)
        pieces.append(piece)
        start += stored_size
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _decompress_piece(block, opened, start, stored_size, codec, size):
    """Return the `size` bytes in the stored ones from `start` on; never expand further."""
    _require(size <= MAX_EXPANSION[codec] * stored_size,
             "claims more data than its compressed block can hold")
    if stored_size != size:  # what does not shrink is stored as it was
        with suppress(NOT_DECODED):
            return _decode(block, opened, start, stored_size, codec, size)
        _require(stored_size > size, "is damaged: its data cannot be decompressed")
        # Other programs keep a stream that is longer than the data, PixInsight never does
        warning = ("has data that cannot be decompressed and are longer than they should be: "
                   "taken as uncompressed, as PixInsight does")
        if warning not in opened.warnings:  # from another piece
            opened.warnings.append(warning)
    return _read_bytes(block, opened, start, size)


def _decode(block, opened, start, stored_size, codec, size):
    """Return the `size` bytes that a stream stands for, or raise one of NOT_DECODED."""
    if codec == "zlib":  # the package would expand it without a limit
        decoder = zlib.decompressobj()
        stream = _read_bytes(block, opened, start, stored_size)
        data = decoder.decompress(stream, size + 1)
        if not decoder.eof or len(data) != size:  # the stream's own checksum stands at its end
            raise ValueError
        return np.frombuffer(data, np.uint8)
    if codec == "zstd":  # the package would expand it to the size that the stream claims
        head = _read_bytes(block, opened, start, min(stored_size, ZSTD_HEADER_SIZE))
        if zstandard.frame_content_size(head) != size:
            raise ValueError
    return _read_array(block, opened, start, (1, 1, size), np.uint8, codec, stored_size).ravel()


def _unshuffle(data, item):
    """Put byte 0 of every item, then byte 1 of every item, and so on, back into items.

    What is less than an item stays behind them. The package takes four times as long for it, and
    fails where the items do not fill the data.
    """
    items = data.size // item
    end = items * item
    unshuffled = np.empty_like(data)
    for byte in range(item):
        unshuffled[byte:end:item] = data[byte * items:(byte + 1) * items]
    unshuffled[end:] = data[end:]
    return unshuffled


def _scale(samples, bounds, target):
    """Scale samples from their bounds to [0, 1], into `target`, an array of the same shape.

    Returns how many were below the bounds, and how many above.
    """
    lower, upper = bounds
    with np.errstate(all="ignore"):  # NaNs and infinities stay what they are
        if bounds != (0, 1):
            samples = (samples.astype(np.float64) - lower) / (upper - lower)
        below = above = 0
        if not (samples.min() >= 0 and samples.max() <= 1):
            dark = (samples < 0) & (samples > -np.inf)
            bright = (samples > 1) & (samples < np.inf)
            below, above = dark.sum(), bright.sum()
            samples = np.where(dark, np.finfo(target.dtype).tiny, samples)  # 0 means missing
            samples = np.where(bright, 1, samples)
        target[...] = samples
    return below, above


def _read_source(root, opened):
    """Return the Source; what cannot be carried over is left out and named in the warnings."""
    image = root.find("Image")
    checksum = "checksum" in image.attrib or image.find("Data[@checksum]") is not None
    metadata = ElementTree.Element("Metadata")
    metadata[:] = root.findall("Metadata/Property")
    namespaces = {name: root.get(name) for name in root.keys() if name.startswith("xmlns:")}
    new_root = ElementTree.Element("xisf", namespaces)
    new_root[:] = _resolve_references(image, root)
    _refuse_deeper(image, MAX_HEADER_DEPTH - 1)
    for name in STALE_IMAGE_ATTRIBUTES:
        image.attrib.pop(name, None)
    if not XISF_NAME.fullmatch(image.get("id", "_")):
        del image.attrib["id"]
    image.text = image.tail = None  # pixels, if they stood there
    bare = ElementTree.Element("Image", {**namespaces, **image.attrib})
    opened.weight_left -= _weight(_markup(bare))
    _require(opened.weight_left >= 0, "has a header too large to be true")
    blocks = {}
    for parent in (image, new_root, metadata):
        parent[:] = _carry_over(parent, blocks, opened)
    if image.find("ColorFilterArray") is not None:
        opened.warnings.append("is a color filter mosaic: debayer it first, "
                               "or its colors are fitted as one")
    new_root[:] = [image, *new_root, metadata]
    return Source(new_root, blocks, checksum)


def _resolve_references(image, root):
    """Put elements in the place of references to them, which PixInsight does not follow.

    Returns the other elements that stand beside the image.
    """
    loose = [child for child in root if child.tag not in ("Image", "Metadata", "Signature")]
    targets = {child.get("uid"): child for child in loose}
    for number, child in enumerate(image):
        if child.tag == "Reference":
            image[number] = targets.pop(child.get("ref", ""), child)
    children = set(image)
    return [child for child in loose if child not in children]


def _carry_over(elements, blocks, opened):
    """Return the elements that are kept, and add their attached bytes to `blocks`."""
    kept, untrue, lost = [], [], []
    for element in elements:
        name = element.get("id") or element.get("name") or ""
        title = f"{element.tag} {name}"
        if STALE_FILE_METADATA.match(title):
            continue
        if STALE_PIXEL_METADATA.match(title):
            untrue.append(f"{name[:80]!r}")
            continue
        _mend(element)
        try:
            weight = _weight(_markup(element))
            _require(weight <= opened.weight_left, "does not fit into a header")
            blocks.update(_attached_bytes(element, blocks, opened))
        except _Unreadable as error:
            lost.append(f"{element.tag} {name[:80]!r}, which {error}")
        else:
            opened.weight_left -= weight
            kept.append(element)
    if lost:
        opened.warnings.append(f"loses {len(lost)} element(s): {', '.join(lost)[:300]}")
    if untrue:
        opened.warnings.append(f"had {', '.join(untrue)[:200]}: "
                               "not kept, because the new pixels make them untrue")
    return kept


def _mend(element):
    """Write down what an element is sure to mean, as strict readers want it."""
    element.tail = None
    if element.tag == "FITSKeyword":
        element.attrib.setdefault("value", "")
        element.attrib.setdefault("comment", "")
    if element.tag == "Property" and _value(element.attrib, "type").lower() == "boolean":
        value = _value(element.attrib, "value").lower()
        element.set("value", BOOLEANS.get(value, value))


def _attached_bytes(element, blocks, opened):
    """Return the attached bytes of an element and its children, by location, but for known ones."""
    attached = {}
    for part in element.iter():
        location = part.get("location")
        if location is None or location in blocks:  # several elements may share one block
            continue
        block = _find_block(part, opened)
        _verify_checksum(block, opened)
        if block.position is not None:  # others stand in the element itself
            attached[location] = _read_bytes(block, opened, 0, block.size)
    return attached


def write_xisf(file, planes, source=None, history=(), compress=False):
    """Write a picture as a monolithic XISF file.

    Args:
        file: binary, writable, seekable, empty.
        planes: (c, h, w), c = 1 or 3, float32 or float64 in [0, 1]; an array, or anything with
            `shape` and `dtype` that yields one (h, w) plane after the other.
        source: a Source, whose metadata are kept. It is not changed.
        history: lines, which become HISTORY keywords.
        compress: lz4hc with byte shuffling, or zstd where PixInsight would not read that.

    The pixels get a checksum if they are to be compressed, or if those of the source had one.
    Raises ValueError if the planes are of a shape or type that could not be read back.
    """
    if len(planes.shape) != 3 or planes.shape[0] not in (1, 3) or 0 in planes.shape:
        raise ValueError(f"planes must be (c, h, w) with c = 1 or 3, not {planes.shape}")
    if planes.dtype.name not in ("float32", "float64"):
        raise ValueError(f"planes must be float32 or float64, not {planes.dtype}")
    source = source or Source(ElementTree.XML("<xisf><Image/><Metadata/></xisf>"), {})
    root = _new_header(planes, source, history)
    image = root.find("Image")
    item = planes.dtype.itemsize
    size = math.prod(planes.shape) * item
    pieces = map(_in_file_order, planes)
    if compress:
        codec, packed = _compress(planes)
        if len(packed) < size:
            image.set("compression", f"{codec}+sh:{size}:{item}")
            pieces = [packed]
            size = len(packed)
    if compress or source.checksum:
        image.set("checksum", f"sha1:{hashlib.sha1().hexdigest()}")  # as long as the final one
    sizes = {location: len(block) for location, block in source.blocks.items()}
    positions = _place_blocks(root, {**sizes, "pixels": size})
    for location, block in source.blocks.items():
        file.seek(positions[location])
        file.write(block)
    file.seek(positions["pixels"])
    if "checksum" in image.attrib:
        image.set("checksum", f"sha1:{_write_and_hash(file, pieces)}")
    else:
        for piece in pieces:
            file.write(piece)
            del piece  # before the next plane is made
    header = XML_DECLARATION + _markup(root)
    file.seek(0)
    file.write(b"XISF0100" + len(header).to_bytes(4, "little") + bytes(4) + header)


def _in_file_order(plane):
    """Return a plane in the order of rows and bytes that the file has."""
    return np.ascontiguousarray(plane, plane.dtype.newbyteorder("<"))


def _write_and_hash(file, pieces):
    """Write pieces, and return their SHA-1. It is made while the disk takes them."""
    digest = hashlib.sha1()
    with ThreadPoolExecutor(1) as writer:
        for piece in pieces:
            writing = writer.submit(file.write, piece)
            digest.update(piece)
            writing.result()
            del piece  # before the next plane is made
    return digest.hexdigest()


def _new_header(planes, source, history):
    """Return the root element for an output, in which the places of the blocks are missing."""
    root = copy.deepcopy(source.root)
    root.attrib.update(XISF_ROOT)
    image = root.find("Image")
    channels, height, width = planes.shape
    image.attrib.update(
        geometry=f"{width}:{height}:{channels}", location="pixels", bounds="0:1",
        sampleFormat=planes.dtype.name.capitalize(), colorSpace="RGB" if channels == 3 else "Gray")
    lines = []
    for line in history:
        lines += textwrap.wrap(line, HISTORY_COLUMNS)
    for line in lines:
        ElementTree.SubElement(image, "FITSKeyword", name="HISTORY", value="", comment=line)
    for element in image.findall("Property[@id='Processing:History']"):
        if "location" not in element.attrib:  # the specification wants it kept and appended to
            element.text = "\n".join([element.text or "", *lines])
    metadata = root.find("Metadata")
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    ElementTree.SubElement(
        metadata, "Property", id="XISF:CreationTime", type="TimePoint", value=now)
    creator = ElementTree.SubElement(
        metadata, "Property", id="XISF:CreatorApplication", type="String")
    creator.text = f"bgoptimizer {VERSION}"
    return root


def _compress(planes):
    """Return the codec, and the compressed planes: byte 0 of every sample, then byte 1, ..."""
    channels, height, width = planes.shape
    item = planes.dtype.itemsize
    shuffled = np.empty((item, channels, height * width), np.uint8)
    for channel, plane in enumerate(planes):
        samples = _in_file_order(plane).view(np.uint8)  # (h, w * item)
        shuffled[:, channel] = samples.reshape(-1, item).T
    if shuffled.size > LZ4_LIMIT:
        return "zstd", zstandard.ZstdCompressor(threads=-1).compress(shuffled)
    packed = lz4.block.compress(shuffled, mode="high_compression", store_size=False)
    return "lz4hc", packed


def _place_blocks(root, sizes):
    """Write into the header where the blocks are, whose `sizes` are given by location.

    Returns their positions, by location too.
    """
    places = [element for element in root.iter() if element.get("location") in sizes]
    # The header stands first, and what is filled in makes it longer: by less than 64 bytes each
    end = 16 + len(XML_DECLARATION) + len(_markup(root)) + 64 * len(places)
    positions = {}
    for element in places:
        location = element.get("location")
        size = sizes[location]
        if location not in positions:
            if size:  # else the file may end here
                end = ALIGNMENT * math.ceil(end / ALIGNMENT)
            positions[location] = end
            end += size
        element.set("location", f"attachment:{positions[location]}:{size}")
    return positions


def _markup(element):
    """Return an element as it is written."""
    text = ElementTree.tostring(element, encoding="unicode")
    text = NOT_XML.sub("", text)
    # Parsers would turn a bare carriage return or tab into something else
    return text.replace("\r", "&#13;").replace("\t", "&#9;").encode()


@contextmanager
def atomic_outputs(*paths):
    """Open files that take the names `paths` once all are whole, and else leave nothing behind.

    Raises BgError if they cannot be written.
    """
    temporary = []
    for path in paths:
        # Two runs may write into one folder, so nobody else may have this name. `mkstemp` would
        # hide the results from other users.
        name = f".bgoptimizer-{secrets.token_hex(8)}.tmp"
        temporary.append(os.path.join(os.path.dirname(path), name))
    try:
        with ExitStack() as stack:
            yield [stack.enter_context(open(name, "x+b")) for name in temporary]
        for name, path in zip(temporary, paths):
            os.replace(name, path)
    except OSError as error:
        folder = os.path.dirname(paths[0]) or "."
        reason = error.strerror or error
        raise BgError(f"cannot write to {folder}: {reason}; "
                      "free space or choose another folder") from None
    finally:
        for name in temporary:
            with suppress(OSError):
                os.unlink(name)


# ---------------------------------------------------------------------------------------------------------
# What the stages share
# ---------------------------------------------------------------------------------------------------------

def _present(samples: np.ndarray) -> np.ndarray:
    """Return True where a sample is data: finite, and not 0.

    Black data are above 0, because the reader sets them to the smallest number that is.
    """
    return (samples > 0) & (samples < np.inf)


def _strips(height: int, width: int, multiple: int = 1) -> list[slice]:
    """Return slices of rows that cut a plane into strips of about STRIP_PIXELS.

    The height of each strip but the last is a multiple of `multiple` rows.
    """
    rows = STRIP_PIXELS // max(1, width)
    rows -= rows % multiple
    rows = max(rows, multiple)
    tops = range(0, height, rows)
    return [slice(top, min(top + rows, height)) for top in tops]


def _each(work: Callable, items: Sequence) -> Iterator:
    """Yield work(item) for all items, in order, computed by WORKERS threads."""
    with ThreadPoolExecutor(WORKERS) as pool:
        yield from pool.map(work, items)


def _grid(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return all pairs of a row (h,) and a column (w,) coordinate, (h, w, 2)."""
    row, column = np.meshgrid(rows, columns, indexing="ij")  # (h, w) each
    return np.stack((row, column), -1)


def _quantiles(plane: np.ndarray, present: np.ndarray, quantiles: Sequence[float]) -> np.ndarray:
    """Return quantiles of the present samples: each is a sample, the lower one of two.

    They are exact up to 16 Mpix. Of larger planes only every k-th sample is taken: 8 million
    samples give the median to a thousandth of the noise.

    Args:
        plane: (h, w).
        present: (h, w) bool, True somewhere.
        quantiles: in [0, 1].
    """
    step = plane.size // QUANTILE_SAMPLES
    step |= 1  # odd, so that it meets all the colors of a sensor's mosaic
    some = plane.ravel()[::step]
    values = some[present.ravel()[::step]]
    if values.size == 0:
        values = plane[present]
    last = values.size - 1
    ranks = [int(quantile * last) for quantile in quantiles]
    values.partition(ranks)
    return values[ranks].astype(float)


def _channel_name(k: int, count: int) -> str:
    """Return what messages call channel `k` of `count`."""
    if count == 1:
        return "the picture"
    return f"channel {'RGB'[k]}"


# --------------------------------------------------------------------------------------------------
# Stretch: linear to 'stretched' (delinearized) and exactly back
# --------------------------------------------------------------------------------------------------

MIDTONES_MARGIN = 1e-4
"""The midtones stay this far from 0 and 1, where the midtones function degenerates. The median of a
coarsely quantized picture can lie there."""


@dataclass(frozen=True)
class Stretch:
    """The constants of the stretch, one for each channel: arrays (c,), for images (..., c).

    `apply` takes a linear x to (x - pedestal) / scale, clips it to [0, 1], and takes the result to

        f(x) = (1 - m) x / ((1 - 4 m) x + 3 m)

    with the midtones m. This is the midtones transfer function that takes m to MIDTONES_TARGET.
    `invert` is exact on [0, 1]. Outside it goes on with the slopes at the ends, because the inverse
    of f has a pole above 1, and a spline may well get there.
    """

    pedestal: np.ndarray
    scale: np.ndarray
    midtones: np.ndarray

    def apply(self, linear: np.ndarray) -> np.ndarray:
        """Stretch linear samples (..., c) of any range to (..., c) in [0, 1]; NaN stays NaN."""
        m = self.midtones
        x = (linear - self.pedestal) / self.scale
        x = np.clip(x, 0, 1)
        denominator = (1 - 4 * m) * x + 3 * m
        return (1 - m) * x / denominator

    def invert(self, stretched: np.ndarray) -> np.ndarray:
        """Take stretched samples (..., c) of any range back to linear ones, (..., c)."""
        m = self.midtones
        y = np.clip(stretched, 0, 1)
        x = 3 * m * y / ((1 - m) - (1 - 4 * m) * y)
        slope_at_0 = 3 * m / (1 - m)
        slope_at_1 = (1 - m) / (3 * m)
        below_0 = np.minimum(stretched, 0)
        above_1 = np.maximum(stretched - 1, 0)
        x = x + slope_at_0 * below_0 + slope_at_1 * above_1
        return x * self.scale + self.pedestal

    def slope(self, linear: np.ndarray) -> np.ndarray:
        """Derivative of `apply`, without its clipping, at linear samples (..., c): what noise is stretched by."""
        m = self.midtones
        x = np.clip((linear - self.pedestal) / self.scale, 0, 1)
        return 3 * m * (1 - m) / ((1 - 4 * m) * x + 3 * m)**2 / self.scale

    def channel(self, k: int) -> "Stretch":
        """Return the same stretch for channel `k` alone."""
        only = slice(k, k + 1)
        return Stretch(self.pedestal[only], self.scale[only], self.midtones[only])


def measure_stretch(planes: np.ndarray, quantile: float) -> tuple[Stretch, np.ndarray]:
    """Measure the stretch of a picture from its present samples.

    Args:
        planes: (c, h, w) linear samples.
        quantile: share of the samples that lie below the one that the stretch takes to 1.

    Returns:
        The stretch, and the medians of the channels, (c,) in linear units.

    Raises:
        BgError: a channel has no present sample, or only one value.
    """
    count = len(planes)

    def measure(k):
        plane = planes[k]
        present = _present(plane)
        if not present.any():
            raise BgError(
                f"{_channel_name(k, count)} holds no data (every sample is 0 or not finite); "
                "remove that channel, or save the picture again")
        low = float(np.min(plane, where=present, initial=np.inf))
        median, high = _quantiles(plane, present, (0.5, quantile))
        scale = high - low
        if scale < np.finfo(np.float32).tiny:  # 0 to the fit, which computes in Float32
            raise BgError(
                f"{_channel_name(k, count)} has the same value everywhere ({low:.6g}), so it shows "
                "no sky; raise -dq if a bright object fills the frame, else give a picture with "
                "content")
        return low, scale, median

    measured = _each(measure, range(count))
    pedestal, scale, median = np.array(list(measured)).T  # (c,) each
    midtones = (median - pedestal) / scale
    midtones = np.clip(midtones, MIDTONES_MARGIN, 1 - MIDTONES_MARGIN)
    return Stretch(pedestal, scale, midtones), median


# --------------------------------------------------------------------------------------------------
# Reduce and mask
# --------------------------------------------------------------------------------------------------

def reduce_plane(plane: np.ndarray, factor: int, func: str = "median",
                 transform: Callable | None = None) -> np.ndarray:
    """Reduce blocks of factor x factor samples to the median or mean of their present samples.

    Args:
        plane: (h, w); missing samples are 0 or not finite.
        factor: side of a block. Blocks at the right and the lower edge use the samples they have.
        func: "median" or "mean".
        transform: applied to the samples before the mean; a median can wait until after.

    Returns:
        (ceil(h / factor), ceil(w / factor)) float32; NaN where a block has nothing present.
    """
    def reduce_blocks(blocks, axis):  # (rows, columns, height, width) -> (rows, columns)
        samples = blocks.reshape(*blocks.shape[:2], -1)  # (rows, columns, samples)
        present = _present(samples)
        count = present.sum(-1)
        if func == "mean":
            if transform is not None:
                samples = transform(samples)
            total = np.where(present, samples, 0).sum(-1)
            return total / np.where(count > 0, count, np.nan)
        samples = np.where(present, samples, np.nan)
        samples.sort(-1)  # NaN goes last; for so few samples it is faster than a partition
        lower = np.maximum(count - 1, 0) // 2
        upper = count // 2
        middle = np.stack((lower, upper), -1)  # (rows, columns, 2): the same sample if odd
        return np.take_along_axis(samples, middle, -1).mean(-1)

    return _reduce_blocks(plane, factor, reduce_blocks)


def _reduce_blocks(image, factor, func):
    """Reduce blocks of factor x factor floats by a function, as scikit-image does, but in strips.

    Blocks at the right and the lower edge are filled up with NaN.

    Args:
        image: (h, w) or (h, w, k).
        factor: side of a block.
        func: takes blocks, and the axes of the samples in them, which are the last ones.

    Returns:
        (ceil(h / factor), ceil(w / factor)), and k if there is one; float32.
    """
    from skimage.measure import block_reduce
    height, width = image.shape[:2]
    down = min(factor, height)  # a block that is larger than the picture would take memory
    across = min(factor, width)
    block = (down, across, 1)[:image.ndim]

    def reduce_strip(rows):
        return block_reduce(image[rows], block, func, cval=np.nan)

    strips = _strips(height, width, down)
    reduced = np.concatenate(list(_each(reduce_strip, strips)))
    return reduced.astype(np.float32)


@dataclass(frozen=True)
class ExpectedSky:
    """The sky that --auto expects, and the further reduced picture, (h, w) cells, that it was found on."""

    surface: Callable[[np.ndarray], np.ndarray]  # frame coordinates (..., 2) -> stretched sky (..., c)
    image: np.ndarray  # (h, w, c) stretched
    weight: np.ndarray  # (h, w, c) in [0, 1]; 0 where a cell is not sky
    centers: np.ndarray  # (h, w, 2), as in `Prepared`


@dataclass(frozen=True)
class Prepared:
    """What the fit sees of a picture: it is reduced, stretched, and masked.

    In the shapes, (h, w) is the reduced frame, and c is the number of channels.
    """

    image: np.ndarray  # (h, w, c) stretched, in [0, 1]; 0 where missing
    weight: np.ndarray  # (h, w, c) in [0, 1]; 0 where masked or missing
    present: np.ndarray  # (h, w, c) bool
    centers: np.ndarray  # (h, w, 2) of the blocks: frame coordinates
    stretch: Stretch
    median: np.ndarray  # (c,) medians of the linear picture over present samples
    linear: np.ndarray  # (h, w, c) block medians in the picture's own units; NaN where missing
    full_shape: tuple[int, int]  # (h, w) of the full-size picture
    user_mask: np.ndarray | None = None  # (h, w, 1 or c) the mask file, reduced
    expected: ExpectedSky | None = None  # with auto

    @property
    def used(self) -> np.ndarray:
        """The pixels that take part in the fit, (h, w) bool."""
        return (self.weight > 0).any(-1)


def frame_coordinates(height: int, width: int, factor: int = 1) -> np.ndarray:
    """Return the centers of the blocks of a full-size frame, divided by its longer side.

    A block and the full-size pixels that it came from share these coordinates, so the surface is
    not shifted by half a block. Both axes have the same unit, so bending costs the same along both.

    Returns:
        (ceil(height / factor), ceil(width / factor), 2) float64: row and column, inside [0, 1].
    """
    longer = max(height, width)

    def centers(length):
        start = np.arange(0, length, factor)
        stop = np.minimum(start + factor, length)
        return (start + stop) / 2 / longer

    return _grid(centers(height), centers(width))


def stretch_quantile(settings: Settings) -> float:
    """The quantile in force: what was asked for, else what suits the way the picture is masked."""
    if settings.delinearization_quantile is not None:
        return settings.delinearization_quantile
    return AUTO_QUANTILE if settings.auto else DEFAULT_QUANTILE


def prepare(planes: np.ndarray, settings: Settings, mask: np.ndarray | None = None) -> Prepared:
    """Stretch, reduce and mask a picture.

    Args:
        planes: (c, h, w) linear samples in [0, 1], c 1 or 3; missing samples are 0 or not finite. Not changed.
        settings: see `Settings`.
        mask: (1 or c, h, w) weights, 1 = use, 0 = ignore, or None.

    Raises:
        BgError: nothing is left to fit, a channel is constant or empty, or the mask does not fit the picture.
    """
    count, height, width = planes.shape
    if mask is not None and mask.shape not in ((1, height, width), (count, height, width)):
        raise BgError(f"the mask is {_size(mask)}, the picture {_size(planes)}; "
                      f"give a mask of {width} x {height} pixels with 1 or {count} channels")
    factor = settings.downscaling_factor
    stretch, median = measure_stretch(planes, stretch_quantile(settings))
    linear = np.stack([reduce_plane(plane, factor) for plane in planes], -1)
    if settings.downscaling_func == "mean":
        reduced = [reduce_plane(plane, factor, "mean", stretch.channel(k).apply) for k, plane in enumerate(planes)]
        image = np.stack(reduced, -1)
    else:  # the stretch is monotone: the median may come first, and the stretch has fewer samples to do
        image = stretch.apply(linear)
    present = np.isfinite(image)
    image = np.where(present, image, 0).astype(np.float32)
    weight = (present & _inside_thresholds(image, settings)).astype(np.float32)
    user_mask = None if mask is None else np.stack([_block_means(plane, factor) for plane in mask], -1)
    if user_mask is not None:
        weight *= user_mask
    prepared = Prepared(image, weight, present, frame_coordinates(height, width, factor), stretch, median, linear,
                        (height, width), user_mask)
    if not prepared.used.any():
        raise BgError("every pixel is masked, so there is no sky to fit; "
                      "lower -tm, raise -tM, or check the mask (1 = use)")
    return prepared


def _inside_thresholds(image: np.ndarray, settings: Settings) -> np.ndarray:
    """Return True where a stretched sample is neither too dark nor too bright."""
    return (settings.threshold_min <= image) & (image <= settings.threshold_max)


def _block_means(weights: np.ndarray, factor: int) -> np.ndarray:
    """Reduce blocks of factor x factor values in [0, 1] to their means; NaN counts as 0.

    Args:
        weights: (h, w) or (h, w, k), floats or booleans.
        factor: side of a block. Blocks at the right and the lower edge use the values they have.

    Returns:
        (ceil(h / factor), ceil(w / factor)), and k if there is one; float32.
    """
    weights = np.clip(np.nan_to_num(weights), 0.0, 1.0)  # booleans become floats
    mean = functools.partial(np.nanmean, dtype=np.float64)  # of what a block at an edge has
    return _reduce_blocks(weights, factor, mean)


def _size(planes: np.ndarray) -> str:
    """Return the size of planes (c, h, w) in words."""
    count, height, width = planes.shape
    channels = "1 channel" if count == 1 else f"{count} channels"
    return f"{width} x {height} with {channels}"


def full_mask(prepared: Prepared, settings: Settings) -> np.ndarray:
    """Return the mask of the fit at full size, (1 or c, h, w) float32, 1 = sky.

    It has one channel if all channels have the same mask.
    """
    weight = np.moveaxis(prepared.weight, -1, 0)  # (c, rows, columns)
    if (weight == weight[:1]).all():
        weight = weight[:1]
    height, width = prepared.full_shape
    row = np.arange(height) // settings.downscaling_factor
    column = np.arange(width) // settings.downscaling_factor
    mask = weight[:, row[:, None], column]  # (1 or c, h, w)
    return np.ascontiguousarray(mask, np.float32)


def mask_reasons(prepared: Prepared, settings: Settings) -> dict[str, np.ndarray]:
    """Tell why pixels of the reduced frame are left out.

    Returns:
        Reason -> (h, w) bool. A pixel that is left out has exactly one reason.
    """
    missing = ~prepared.present.any(-1)
    left_out = ~prepared.used & ~missing
    inside = prepared.present & _inside_thresholds(prepared.image, settings)
    by_threshold = left_out & ~inside.any(-1)
    left_out &= ~by_threshold
    by_file = np.zeros_like(left_out)
    if prepared.user_mask is not None:
        by_file = left_out & (prepared.user_mask == 0).any(-1)
    by_auto = left_out & ~by_file
    return {
        "missing": missing,
        "threshold": by_threshold,
        "mask file": by_file,
        "auto": by_auto,
    }


def clipped_by_stretch(prepared: Prepared) -> np.ndarray:
    """Return True, (h, w, c), where the stretch ends at 1, so that the fit sees no brightness."""
    white = prepared.stretch.pedestal + prepared.stretch.scale  # (c,)
    with np.errstate(invalid="ignore"):  # NaN where missing
        return prepared.linear >= white


def shares(prepared: Prepared) -> dict[str, float]:
    """Return the shares of the reduced samples, of all channels together.

    "missing", "masked", and "used" add up to 1. "clipped" is the share that the stretch clips at 1.
    """
    missing = 1 - np.mean(prepared.present)
    used = np.mean(prepared.weight > 0)
    masked = max(0.0, 1 - missing - used)  # not below 0 by rounding
    clipped = np.mean(clipped_by_stretch(prepared))
    return {"missing": missing, "masked": masked, "used": used, "clipped": clipped}


# ---------------------------------------------------------------------------------------------------------
# Spline: f(q) = sum_i w_i phi_k(|q - c_i|) + v.q + b
# ---------------------------------------------------------------------------------------------------------

_TINY_SQUARED_DISTANCE = 1e-10
"""Replaces smaller squared distances, for which the logarithm and the gradient of the square root
grow without bound. The value is that of tensorflow-addons."""


def spline_surface(query: np.ndarray, positions: np.ndarray, values: np.ndarray, order: int,
                   smoothing: float) -> np.ndarray:
    """Evaluate the surface through values at control points, in Float64.

    It is that of `interpolate_spline`, for where no gradient is needed. It is linear in the values:
    for the values np.eye(n), it is the matrix that takes any values to their surface.

    Args:
        query: (..., 2) where to evaluate.
        positions: (n, 2) control points.
        values: (n, k) at the control points.
        order: of the kernel phi, which is r^order if odd and r^order log r if even.
        smoothing: weight on the diagonal of the interpolation system, 0 = through the values.

    Returns:
        (..., k).
    """
    coefficients = _spline_coefficients(positions, order, smoothing) @ values
    weights, slopes, level = np.split(coefficients, (-3, -1))  # (n, k), (2, k), (1, k)
    points = query.reshape(-1, 2)  # (m, 2)
    # In parts: the kernels of all points at once would be the largest array of a run
    count = 1 + len(points) * len(positions) // STRIP_PIXELS
    surface = []
    for part in np.array_split(points, count):
        kernels = _kernel(part, positions, order)
        surface.append(kernels @ weights + part @ slopes + level)
    surface = np.concatenate(surface)  # (m, k)
    return surface.reshape(*query.shape[:-1], -1)


def _spline_coefficients(positions: np.ndarray, order: int, smoothing: float) -> np.ndarray:
    """Return the matrix that takes values at control points to the spline's coefficients.

    It has the shape (n + 3, n). The coefficients are n weights of kernels, two slopes, and a level.
    """
    n = len(positions)
    kernels = _kernel(positions, positions, order)  # (n, n)
    plane = np.c_[positions, np.ones(n)]  # (n, 3)
    system = np.zeros((n + 3, n + 3))
    system[:n, :n] = kernels + smoothing * np.eye(n)
    system[:n, n:] = plane
    system[n:, :n] = plane.T
    values = np.eye(n + 3, n)
    try:
        return np.linalg.solve(system, values)
    except np.linalg.LinAlgError:
        # Control points stand on one line or on top of each other: take the smallest coefficients
        return np.linalg.lstsq(system, values, rcond=None)[0]


def _kernel(query: np.ndarray, positions: np.ndarray, order: int) -> np.ndarray:
    """Return phi_k of the distances of query (m, 2) from positions (n, 2): (m, n)."""
    from scipy.spatial.distance import cdist
    squared = cdist(query, positions, "sqeuclidean")
    squared = np.maximum(squared, _TINY_SQUARED_DISTANCE)
    if order % 2:
        return squared**(order / 2)
    return 0.5 * squared**(order // 2) * np.log(squared)


def interpolate_spline(train_points, train_values, query_points, order, regularization_weight=0.0,
                       name="interpolate_spline"):
    """Do what `tfa.image.interpolate_spline` does, where tensorflow-addons does not exist.

    It is a drop-in with the same values and the same gradients.

    Args:
        train_points: `[b, n, d]` float tensor of control points.
        train_values: `[b, n, k]` float tensor of values there.
        query_points: `[b, m, d]` float tensor of where to evaluate.
        order: of the polyharmonic kernel, an int.
        regularization_weight: weight on the diagonal of the system; 0 interpolates exactly.
        name: scope of the operations.

    Returns:
        `[b, m, k]` float tensor.

    Source: https://en.wikipedia.org/wiki/Polyharmonic_spline; notation (c, f, w, v, A, B) as there.
    """
    tf = import_tensorflow()
    with tf.name_scope(name):
        c = tf.convert_to_tensor(train_points)
        f = tf.convert_to_tensor(train_values)
        q = tf.convert_to_tensor(query_points)
        b, n = tf.shape(c)[0], tf.shape(c)[1]
        d = c.shape[-1]

        r2 = _squared_distances(tf, c, c)
        matrix_a = _phi(tf, r2, order)  # [b, n, n]
        if regularization_weight > 0:
            matrix_a += regularization_weight * tf.eye(n, dtype=c.dtype)
        matrix_b = tf.concat([c, tf.ones_like(c[..., :1])], 2)  # [b, n, d + 1]
        transposed_b = tf.transpose(matrix_b, [0, 2, 1])
        corner = tf.zeros([b, d + 1, d + 1], c.dtype)
        upper = tf.concat([matrix_a, matrix_b], 2)  # [b, n, n + d + 1]
        lower = tf.concat([transposed_b, corner], 2)  # [b, d + 1, n + d + 1]
        system = tf.concat([upper, lower], 1)

        no_plane = tf.zeros([b, d + 1, f.shape[-1]], f.dtype)
        right_side = tf.concat([f, no_plane], 1)  # [b, n + d + 1, k]
        w_v = tf.linalg.solve(system, right_side)
        w = w_v[:, :n]
        v = w_v[:, n:]  # with b of the formula in the last row

        r2 = _squared_distances(tf, q, c)
        kernels = _phi(tf, r2, order)  # [b, m, n]
        linear = tf.concat([q, tf.ones_like(q[..., :1])], 2)  # [b, m, d + 1]
        return tf.matmul(kernels, w) + tf.matmul(linear, v)


def _squared_distances(tf, x, y):
    """Return the squared distances of x `[b, n, d]` from y `[b, m, d]`: `[b, n, m]`."""
    product = tf.matmul(x, y, transpose_b=True)
    if x is y:
        # These norms are rounded as the product is, so the diagonal, where the kernel is steepest,
        # is exactly 0
        x_norm = y_norm = tf.linalg.diag_part(product)
    else:
        x_norm = tf.reduce_sum(tf.square(x), 2)
        y_norm = tf.reduce_sum(tf.square(y), 2)
    return x_norm[:, :, None] - 2 * product + y_norm[:, None, :]


def _phi(tf, r2, order):
    """Return the kernel for squared distances r2, of any shape."""
    guarded = tf.maximum(r2, _TINY_SQUARED_DISTANCE)
    if order == 1:
        return tf.sqrt(guarded)
    if order % 2:
        return tf.pow(guarded, order / 2)
    # For orders 2 and 4, r2 may be 0, or slightly below by rounding, outside the logarithm
    if order == 2:
        powered = r2
    elif order == 4:
        powered = tf.square(r2)
    else:
        powered = tf.pow(guarded, order / 2)
    return 0.5 * powered * tf.math.log(guarded)


def import_tensorflow():
    """Import TensorFlow where it is first needed.

    It takes seconds, and help, errors, and previews do not need it.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Or else it takes all memory of a GPU at once
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    try:
        return importlib.import_module("tensorflow")
    except Exception as error:  # missing, or broken: then it fails with almost any error
        lines = str(error).splitlines() or [type(error).__name__]
        raise BgError(f"TensorFlow cannot be imported ({lines[0]}); "
                      "install it with: python -m pip install -r requirements.txt") from None


def _import_interpolate_spline() -> Callable:
    """Return tensorflow-addons' function where it exists, else the drop-in.

    It exists for Python up to 3.11 and TensorFlow up to 2.15.
    """
    with warnings.catch_warnings():
        # It warns that its development has ended, and which TensorFlow it was tested with
        warnings.simplefilter("ignore")
        try:
            module = importlib.import_module("tensorflow_addons.image.interpolate_spline")
            return module.interpolate_spline
        except Exception:  # not installed, or installed beside a TensorFlow that it does not know
            return interpolate_spline


def spline_layer(positions: np.ndarray, values: np.ndarray, order: int, smoothing: float):
    """Return a Keras layer, query points [m, 2] -> surface [m, c].

    Its trainable weights are the control points: first their positions, then their values.

    Args:
        positions: (n, 2) where the control points start.
        values: (n, c) of the surface there, at the start.
        order: of the spline.
        smoothing: regularization weight of its interpolation.
    """
    tf = import_tensorflow()
    interpolate = _import_interpolate_spline()

    class SplineSurface(tf.keras.layers.Layer):
        def __init__(self):
            super().__init__(name="spline_surface")
            self.positions = self._control_points("positions", positions)
            self.values = self._control_points("values", values)

        def _control_points(self, name, start):
            constant = tf.keras.initializers.Constant(start)
            return self.add_weight(name=name, shape=start.shape, initializer=constant)

        def call(self, query):
            surface = interpolate(
                self.positions[None], self.values[None], query[None], order, smoothing)
            return surface[0]

    return SplineSurface()


# ---------------------------------------------------------------------------------------------------------
# Loss: four terms per pixel, each [m] from the weighted residual r or the surface b, [m, c]
# ---------------------------------------------------------------------------------------------------------

def loss_error(tf, r):
    """Return how far the surface is from the picture: the mean |r| of the channels."""
    return tf.reduce_mean(tf.abs(r), -1)


def loss_color(tf, r):
    """Return how far the channels disagree: the variance of r over them, 0 for a gray picture.

    It keeps the background neutral.
    """
    return tf.math.reduce_variance(r, -1)


def loss_overshoot(tf, r):
    """Return how far the surface lies above the picture.

    Subtracting more light than there is leaves dark holes.
    """
    return tf.reduce_mean(tf.abs(r) - r, -1)


def loss_negative(tf, b):
    """Return how far the surface lies below zero: there is no negative sky."""
    return tf.reduce_mean(tf.abs(b) - b, -1)


LOSS_TERMS = ("error", "color", "overshoot", "negative")


# ---------------------------------------------------------------------------------------------------------
# Fit
# ---------------------------------------------------------------------------------------------------------

@dataclass
class Fit:
    """A fitted surface, and how it came about."""

    positions: np.ndarray  # (n, 2) final control points, in frame coordinates
    values: np.ndarray  # (n, c) final values there, stretched units
    order: int
    smoothing: float
    history: np.ndarray  # (epochs, 5): loss, then the terms in the order of LOSS_TERMS, each a mean over pixels
    stopped: str  # why the fit ended, in words
    track: list[tuple[int, np.ndarray, np.ndarray]]  # (epoch, positions, values) now and then, the start first

    def surface(self, query: np.ndarray) -> np.ndarray:
        """Stretched surface (..., c) at query (..., 2), float64."""
        return spline_surface(query, self.positions.astype(float), self.values, self.order, self.smoothing)


def start_positions(settings: Settings, shape: tuple[int, int]) -> np.ndarray:
    """Where the control points start.

    Args:
        settings: `initializer`, `points`, `seed` and `auto` count.
        shape: (h, w) of the full-size frame.

    Returns:
        (n, 2) float32 (row, column) in frame coordinates. "random": n uniform points; with auto each is the one of ten
        that is farthest from the others, for no small glow may be without points. "grid": cell centers of the rows x
        columns nearest to n in the frame's aspect ratio; n may then differ from what was asked for.
    """
    sides = np.array(shape) / max(shape)
    wanted = settings.points or DEFAULT_POINTS
    if settings.initializer == "random":
        rng, points = np.random.default_rng(settings.seed), np.full((1, 2), np.inf)
        while len(points) <= wanted:
            draws = rng.random((10 if settings.auto else 1, 2)) * sides
            distances = np.hypot(*(draws[:, None] - points).T).min(0)
            points = np.append(points, draws[[distances.argmax()]], 0)
        return points[1:].astype(np.float32)
    # At least two rows and columns: one leaves a slope open
    shapes = [(rows, max(2, round(wanted / rows))) for rows in range(2, max(2, wanted // 2) + 1)]
    rows, columns = min(shapes, key=lambda shape: abs(shape[0] * shape[1] - wanted) / wanted
                        + abs(math.log(shape[1] / shape[0] * sides[0] / sides[1])))
    row, column = (np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns
    return (_grid(row, column).reshape(-1, 2) * sides).astype(np.float32)


def start_values(prepared: Prepared, positions: np.ndarray, order: int, smoothing: float) -> np.ndarray:
    """First values at the control points (n, 2): (n, c) float32.

    The reduced image there, blended by mask weight with the channel's median. With an expected sky (--auto) the values
    that bring the surface closest to it: the fit then starts from the sky, wherever its control points stand.
    """
    if prepared.expected is not None:
        centers = prepared.expected.centers.reshape(-1, 2)
        matrix = spline_surface(centers, positions.astype(float), np.eye(len(positions)), order, smoothing)
        return np.linalg.lstsq(matrix, prepared.expected.surface(centers), rcond=1e-9)[0].astype(np.float32)
    block = 2 * prepared.centers[0, 0]  # its two sides
    row, column = np.minimum((positions / block).astype(int), np.array(prepared.used.shape) - 1).T
    weight = prepared.weight[row, column]
    typical = [np.median(channel[used > 0]) if (used > 0).any() else MIDTONES_TARGET
               for channel, used in zip(np.moveaxis(prepared.image, -1, 0), np.moveaxis(prepared.weight, -1, 0))]
    return (weight * prepared.image[row, column] + (1 - weight) * typical).astype(np.float32)


def sample_pixels(usable: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """Flat indices of at most `wanted` pixels of usable, (h, w) bool.

    The surface is smooth, so a sample pins it as well as all pixels do, and a 61 Mpix fit costs what a 6 Mpix
    one does. The sample is stratified: the pixels in the order of a coarse grid of tiles, one drawn at random
    out of each run of equal length.
    """
    height, width = usable.shape
    row, column = np.nonzero(usable)
    if row.size > wanted:
        tile = max(1, int(math.sqrt(row.size / wanted)))
        along = np.lexsort((column, row, column // tile, row // tile))  # tile by tile
        edges = np.linspace(0, row.size, wanted + 1).astype(int)  # whole numbers, so that no pixel is drawn twice
        pick = np.sort(along[(edges[:-1] + np.random.default_rng(seed).random(wanted) * np.diff(edges)).astype(int)])
        row, column = row[pick], column[pick]
    return row * width + column


def sky_sample(prepared: Prepared, settings: Settings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the fit sees: places (m, 2), image (m, c) and weight (m, c), drawn once, so that losses compare over epochs.

    With an expected sky (--auto) the sample is of its cells, over the whole frame, and what is masked or missing is
    replaced by the sky expected there, with noise like the rest: the loss's logarithm would cling to pixels without.
    """
    expected, seen = prepared.expected, prepared.expected or prepared
    usable = prepared.used if expected is None else np.ones(expected.centers.shape[:2], bool)
    count = SAMPLE_PIXELS * settings.batch * (1 if expected is None else 4)  # so that two seeds agree to 0.5 %
    pick = sample_pixels(usable, count, settings.seed)
    places, image, weight = (a.reshape(-1, a.shape[-1])[pick] for a in (seen.centers, seen.image, seen.weight))
    if expected is not None:
        sky = expected.surface(places)
        spread = [1.4826 * np.median(np.abs(image - sky)[used, k]) if used.any() else 0.0
                  for k, used in enumerate(weight.T > 0)]
        noise = np.random.default_rng(settings.seed).normal(size=image.shape) * spread
        image = np.where(weight > 0, image, sky + noise)
        weight = np.where(weight > 0, weight, 1)
    return places, image, weight


def fit_surface(prepared: Prepared, settings: Settings, start: tuple[np.ndarray, np.ndarray],
                on_epoch: Callable[[int, float], None] = _quiet) -> Fit:
    """Fit the spline to the sky: Adam on positions and values, the learning rate halved on a plateau, early stopping.

    A loop of our own, not Keras' `fit`: an epoch here is one step of some 2 ms, and `fit` adds more than that to each.

    Args:
        prepared, settings: what `examine` gave.
        start: positions (n, 2) and values (n, c).
        on_epoch: called after each epoch with its number, from 1, and its loss.

    Raises:
        BgError: the spline cannot be computed at all from this start.
    """
    tf = import_tensorflow()
    step, adam, layer, best = _training(tf, prepared, settings, start)
    history, track, rate = [], [(0, *start)], settings.learning_rate
    mark, waited, waited_rate = math.inf, 0, 0
    stopped = f"all {settings.epochs} epochs done"
    for epoch in range(1, settings.epochs + 1):
        try:
            now = step().numpy()
        except tf.errors.InvalidArgumentError:  # "Input matrix is not invertible": control points have met
            now = np.full(5, np.nan)
        if not np.isfinite(now).all():
            stopped = (f"stopped at epoch {epoch}: the spline's equations became singular; "
                       "best surface so far taken (try a larger --smoothing)")
            break
        history.append(now)
        on_epoch(epoch, float(now[0]))
        if epoch % TRACK_EVERY == 0:
            track.append((epoch, *(w.numpy() for w in layer.trainable_weights)))
        improved = now[0] < mark - STOP_DELTA
        mark = now[0] if improved else mark
        waited, waited_rate = (0, 0) if improved else (waited + 1, waited_rate + 1)
        if waited >= STOP_PATIENCE:
            stopped = f"stopped at epoch {epoch}: no improvement in {STOP_PATIENCE} epochs"
            break
        if waited_rate >= RATE_PATIENCE and rate > RATE_FLOOR:
            rate, waited_rate = max(rate / 2, RATE_FLOOR), 0
            adam.learning_rate = rate
    if not history:
        raise BgError("the spline's equations cannot be solved from these control points; "
                      "raise --smoothing, lower -N, or choose another --seed")
    positions, values = (v.numpy() for v in best)
    return Fit(positions, values, settings.order, settings.smoothing, np.array(history), stopped, track)


def _training(tf, prepared: Prepared, settings: Settings, start: tuple[np.ndarray, np.ndarray]):
    """What a fit needs: the function that does one step, its optimizer, its layer, and the best weights so far."""
    places, image, weight = (tf.constant(a, tf.float32) for a in sky_sample(prepared, settings))
    layer = spline_layer(*start, settings.order, settings.smoothing)
    best = [tf.Variable(w) for w in layer.trainable_weights]
    best_loss = tf.Variable(np.float32(np.inf))
    adam = tf.keras.optimizers.Adam(settings.learning_rate)
    adam.build(layer.trainable_weights)

    @tf.function(autograph=False)  # nothing in it needs rewriting, which costs time and would reach into the drop-in
    def step():
        with tf.GradientTape() as tape:
            surface = layer(places)  # [m, c]
            residual = weight * (image - surface)
            terms = [loss_error(tf, residual), loss_color(tf, residual),
                     loss_overshoot(tf, residual), loss_negative(tf, surface)]  # [m] each
            total = terms[0] + terms[1] + settings.alpha * (terms[2] + terms[3])
            loss = tf.reduce_mean(tf.math.log(LOSS_FLOOR + total))
        better = loss < best_loss
        for variable, now in zip(best + [best_loss], layer.trainable_weights + [loss]):
            variable.assign(tf.where(better, now, variable))
        gradients = tape.gradient(loss, layer.trainable_weights)
        adam.apply_gradients(zip(gradients, layer.trainable_weights))
        return tf.stack([loss] + [tf.reduce_mean(term) for term in terms])  # in the order of Fit.history

    return step, adam, layer, best


class Device(NamedTuple):
    """A device of TensorFlow's."""

    place: str  # as in `tf.device`
    name: str  # for people


def compute_devices(say: Callable[[str], None] = _quiet) -> list[Device]:
    """What there is to compute on, best first: a GPU if TensorFlow sees one that works, and always the CPU."""
    tf, gpus = import_tensorflow(), []
    try:
        if tf.config.list_logical_devices("GPU"):  # starts it: fails where another program holds it
            details = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])
            gpus = [Device("/GPU:0", details.get("device_name", "the GPU"))]
    except (tf.errors.OpError, RuntimeError) as error:
        say(f"the GPU cannot be started ({type(error).__name__}); going on with the CPU")
        tf.config.set_visible_devices([], "GPU")
    return gpus + [Device("/CPU:0", "the CPU")]


def on_first_that_works(devices: list[Device], work: Callable, say: Callable[[str], None] = _quiet):
    """What work() gives on the first device that does not fail in it; `say` is told of each that does."""
    tf = import_tensorflow()
    for device, following in zip(devices, devices[1:] + [None]):
        try:
            with tf.device(device.place):
                return work()
        except tf.errors.OpError as error:
            short = isinstance(error, tf.errors.ResourceExhaustedError)
            reason = f"{device.name} " + ("has too little memory" if short else f"failed ({type(error).__name__})")
            if following is None:
                raise BgError(f"{reason}; try a larger -dx, or a smaller -B") if short else error
            say(f"{reason}; going on with {following.name}" + short * " (a larger -dx or a smaller -B may fit)")


def fit_sky(prepared: Prepared, settings: Settings, say: Callable[[str], None] = _quiet,
            on_epoch: Callable[[int, float], None] = _quiet) -> Fit:
    """Fit the surface to what `examine` gave. `on_epoch` is called with each epoch's number and loss."""
    positions = start_positions(settings, prepared.full_shape)
    values = start_values(prepared, positions, settings.order, settings.smoothing)
    devices = compute_devices(say)
    say(f"fitting {len(positions)} control points, smoothing {settings.smoothing:g}, on {devices[0].name}")
    return on_first_that_works(devices, lambda: fit_surface(prepared, settings, (positions, values), on_epoch), say)


# --------------------------------------------------------------------------------------------------
# Apply: the surface at full size, and the picture without it
# --------------------------------------------------------------------------------------------------

class SkySurface:
    """The sky at full size, (c, h, w) in linear units, made in strips of rows.

    It is never in memory as a whole, unless somebody asks for that. The spline is evaluated at
    nodes a few pixels apart, brought back to linear there, and interpolated between them by the
    cubic through four nodes along each axis. That is exact for planes, and the spline bends over
    hundreds of pixels, so nothing is lost between the nodes (tests hold it to 2e-5). But a pixel
    costs only a few multiplications, however many control points there are.
    """

    def __init__(self, surface: Callable[[np.ndarray], np.ndarray], shape: tuple[int, int],
                 dtype=np.float32):
        """Evaluate the nodes.

        Args:
            surface: takes frame coordinates (..., 2) to the linear sky there, (..., c).
            shape: (h, w) of the full-size picture.
            dtype: of the sky.
        """
        height, width = shape
        longer = max(shape)
        self.step = max(1, longer // SURFACE_NODES)  # pixels of a cell, from node to node

        def place_nodes(length):
            # Each cell needs the two nodes at its ends, and one more on either side
            cells = math.ceil(length / self.step)
            pixel = self.step * np.arange(-1, cells + 2)
            return (pixel + 0.5) / longer

        places = _grid(place_nodes(height), place_nodes(width))
        nodes = surface(places)  # (rows, columns, c)
        nodes = np.moveaxis(nodes, -1, 0)  # (c, rows, columns)
        self.nodes = nodes.astype(dtype)
        self.shape = (len(self.nodes), height, width)
        self.dtype = self.nodes.dtype

        # How far, in cells, the pixels of a cell are from each of its four nodes, (step, 1)
        second = np.arange(self.step)[:, None] / self.step
        first = second + 1
        third = second - 1
        fourth = second - 2
        taps = (  # Lagrange's cubic: what each node weighs at the pixels
            -second * third * fourth / 6,
            first * third * fourth / 2,
            -first * second * fourth / 2,
            first * second * third / 6,
        )
        self.taps = np.hstack(taps).astype(dtype)  # (step, 4)

    def strip(self, channel: int, rows: slice) -> np.ndarray:
        """Return the linear sky of one channel in some rows, (rows, w).

        rows.start must be a multiple of `step`.
        """
        from numpy.lib.stride_tricks import sliding_window_view
        height = rows.stop - rows.start
        cells = math.ceil(height / self.step)
        first = rows.start // self.step
        last = first + cells + 2
        nodes = self.nodes[channel, first:last + 1]  # (cells + 3, columns)
        around = sliding_window_view(nodes, 4, 0)  # (cells, columns, 4)
        tall = np.einsum("st,kct->ksc", self.taps, around)  # (cells, step, columns)
        columns = tall.shape[2]
        tall = tall.reshape(-1, columns)[:height]  # (rows, columns)
        around = sliding_window_view(tall, 4, 1)  # (rows, cells, 4)
        strip = around @ self.taps.T  # (rows, cells, step)
        strip = strip.reshape(height, -1)  # (rows, w or more)
        width = self.shape[2]
        return np.clip(strip[:, :width], 0, 1)

    def strips(self) -> list[slice]:
        """Return the rows of all strips."""
        _, height, width = self.shape
        return _strips(height, width, self.step)

    def plane(self, channel: int) -> np.ndarray:
        """Return the linear sky of one channel, (h, w)."""
        plane = np.empty(self.shape[1:], self.dtype)

        def fill(rows):
            plane[rows] = self.strip(channel, rows)

        list(_each(fill, self.strips()))
        return plane

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the planes of the channels, as `write_xisf` takes them.

        Each one is made when it is asked for.
        """
        return map(self.plane, range(len(self.nodes)))


def linear_sky(prepared: Prepared, fit: Fit) -> Callable[[np.ndarray], np.ndarray]:
    """Return the fitted sky in the picture's own units, as a function.

    Where there was no sky to fit, it is held back (see HELD_BACK).

    Returns:
        A function that takes frame coordinates (..., 2) to the sky there, (..., c) in [0, 1].
    """
    sample = sample_pixels(prepared.used, SAMPLE_PIXELS, seed=0)
    centers = prepared.centers.reshape(-1, 2)[sample]
    seen = fit.surface(centers)  # (samples, c)
    low = seen.min(0)
    high = seen.max(0)
    beyond = HELD_BACK * (high - low)
    lowest = low - beyond
    highest = high + beyond

    def sky(places):
        stretched = np.clip(fit.surface(places), lowest, highest)
        linear = prepared.stretch.invert(stretched)
        return np.clip(linear, 0, 1)

    return sky


def full_size_sky(prepared: Prepared, fit: Fit, dtype=np.float32) -> SkySurface:
    """Return the fitted sky at full size."""
    surface = linear_sky(prepared, fit)
    return SkySurface(surface, prepared.full_shape, dtype)


def subtract(planes: np.ndarray, sky: SkySurface,
             median: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Take the sky out of a picture, in place: image - model + offset, clipped to [0, 1].

    The offset of a channel is what the median of its present samples would lose. So the background
    stays neutral, and a black border or one bad pixel cannot decide a color. Missing samples stay
    as they are.

    Args:
        planes: (c, h, w) linear samples; changed.
        sky: the model.
        median: (c,) of the present samples of planes.

    Returns:
        The offsets, and the counts of samples clipped at 0 and at 1; (c,) each.
    """
    strips = sky.strips()

    def work(k):
        plane = planes[k]
        present = _present(plane)
        for rows in strips:
            samples = plane[rows]  # changed in place
            model = sky.strip(k, rows)
            np.subtract(samples, model, out=samples, where=present[rows])
        median_left = _quantiles(plane, present, (0.5,))[0]
        offset = median[k] - median_left
        shift = plane.dtype.type(offset)
        below = above = 0
        for rows in strips:
            samples = plane[rows]
            here = present[rows]
            values = samples + shift
            below += np.count_nonzero(here & (values < 0))
            above += np.count_nonzero(here & (values > 1))
            np.clip(values, 0, 1, out=samples, where=here)
        return offset, below, above

    results = _each(work, range(len(planes)))
    offsets, below, above = map(np.array, zip(*results))
    return offsets, below, above


def reduced_sky(prepared: Prepared, fit: Fit) -> tuple[np.ndarray, np.ndarray]:
    """Return the sky, and the picture without it, on the reduced frame: linear, (h, w, c) each.

    The medians of the picture's channels stay what they were.
    """
    surface = linear_sky(prepared, fit)
    sky = surface(prepared.centers).astype(np.float32)
    after = prepared.linear - sky
    return sky, _keep_median(prepared.linear, after)


def _keep_median(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return `after`, with each channel shifted to the median of `before`.

    All are (h, w, c), NaN where missing.
    """
    def medians(image):
        found = []
        for plane in np.moveaxis(image, -1, 0):
            present = plane[np.isfinite(plane)]
            found.append(np.median(present[::4]))  # every fourth sample: enough for the eye
        return np.array(found, after.dtype)

    shift = medians(before) - medians(after)  # (c,)
    return after + shift


# ---------------------------------------------------------------------------------------------------------
# Choose: object mask, first sky and smoothing, from the picture itself
# ---------------------------------------------------------------------------------------------------------
#
# Sky and object differ in one thing that needs no threshold on brightness: the sky is smooth. A flexible surface
# follows whatever is smooth, glows and wide halos too, and leaves what has structure: arms, filaments, dust lanes, star
# halos, tree tops. Where such structure is dense there is an object. Objects are grown into their own faint
# surroundings as far as these lie above the sky's own surface. Under them the surface is determined by the sky around,
# and never above the picture, for an object only adds light. How stiff that surface must be, cross-validation tells.

CELLS, FEWEST_CELLS = 130, 64
"""About so many cells stand along the longer side of the copy that the choices are made on. In small pictures fewer, so
that a cell still is the median of several pixels: in the noise of single ones a faint nebula (M27 in half a minute of
light) looks smooth."""

SKY_POINTS = 96
"""Control points of the surface on the cells. Its stiffness, not their number, decides how it bends."""

STIFFNESS_UNIT = 1e-4
"""Weight of the bending energy beside the mean squared residual, in units of the noise, at a smoothing of 1. (In the
fit, smoothing is the regularization of the interpolation: it cannot keep trained values from bending a surface, but
makes Adam slow to.)"""

SMOOTHINGS = (1e4, 1e2, 1e1, 1.0, 1e-1, 1e-2, 1e-3)
"""Tried by cross-validation, the stiffest (a plane) first."""

TOLERANCE = 0.012
"""The largest smoothing wins whose held-out loss, the mean log(1 + residual in units of the noise), is this close to
the best: about the scatter of that loss."""

FOLD_TILES, FOLDS = 96, 4
"""Cross-validation holds out tiles, 8 x 12 of them, and not pixels: neighbors are too alike to test each other."""

ROUGH_SIGMA, ROUGH_SCALE, ROUGH_DENSITY, ROUGH_WINDOW = 3.5, 1.4, 0.2, 0.05
"""A cell is rough if it stands so many sigma off the Gaussian mean of so many cells about it. A region is an object if
so many of its cells are rough, within a window of this part of the longer side: lone stars stay single cells, nebulae
and galaxies close up."""

STAR_SIGMA, STAR_REACH = 30.0, 2.0
"""A star of more than so many sigma may have a halo; it is looked for within so many times sigma^0.4 cells."""

HALO_SIGMA, HALO_SMOOTHING = 3.0, 0.003
"""Light so many sigma above the sky's surface, fitted with this smoothing, belongs to the object that it touches."""

PLAIN_SMOOTHING = (0.03, 1.0)
"""Range of the smoothing chosen for a plain run, whose control points start on the picture itself and have `-e` epochs
to settle: above 1 they do not get there, below 0.03 they dig into objects. Within it the best one goes with the square
root of the smoothing that the sky alone would have, but is not below the share of the picture that is not sky: nothing
else keeps a plain surface out of a nebula (measured on the truth bench, `tests/truth.py`)."""

LITTLE_SKY = 0.1
"""Below this share of sky the surface is kept nearly flat: there is too little to tell glow from object."""

CEILING_WEIGHT = 0.5
"""Weight of 'the sky is not above the picture' under an object, beside 1 for a cell of sky."""


@dataclass(frozen=True)
class _Cells:
    """A further reduced copy of the picture. (h, w) cells, c channels; a cell is size x size reduced pixels."""

    values: np.ndarray  # (h, w, c) stretched
    usable: np.ndarray  # (h, w) bool: not missing, not masked by the user
    noise: np.ndarray  # (h, w, c) standard deviation of `values`
    centers: np.ndarray  # (h, w, 2) frame coordinates
    size: int

    def smooth(self, image: np.ndarray, sigma: float) -> np.ndarray:
        """Gaussian mean of (h, w, c) over usable cells."""
        total = scipy.ndimage.gaussian_filter(image * self.usable[..., None], (sigma, sigma, 0))
        return total / np.maximum(scipy.ndimage.gaussian_filter(self.usable.astype(float), sigma), 1e-6)[..., None]


def _make_cells(prepared: Prepared, threshold_max: float) -> _Cells:
    # What is too dark for the fit stays in: a dark foreground is told by its step from the sky.
    usable = (prepared.present & (prepared.image <= threshold_max)).all(-1)
    if prepared.user_mask is not None:
        usable &= (prepared.user_mask > 0).any(-1)
    size = max(1, min(2, max(usable.shape) // FEWEST_CELLS), round(max(usable.shape) / CELLS))
    channels = np.moveaxis(np.where(usable[..., None], prepared.image, 0), -1, 0)  # 0: missing
    values = np.stack([reduce_plane(channel, size) for channel in channels], -1).astype(float)
    share = _block_means(usable.astype(np.float32), size)
    # Cells beside a border mix with it and are left out as well.
    usable = scipy.ndimage.minimum_filter((share > 0.5) & np.isfinite(values).all(-1), 3, mode="nearest")
    values = np.where(usable[..., None], values, 0)
    centers = _block_means(prepared.centers, size).astype(float)
    return _Cells(values, usable, _cell_noise(values, usable, prepared.stretch), centers, size)


def _cell_noise(values: np.ndarray, usable: np.ndarray, stretch: Stretch) -> np.ndarray:
    """Noise of the cells, (h, w, c), from the differences between neighbors where the picture is smoothest.

    Photon noise grows with the light: in linear units variance = floor + slope x light, and the quietest tiles at each
    level of light follow that line. Levels that only objects have are never quiet; they are dropped.
    """
    linear = stretch.invert(values)
    noise = np.full_like(values, 1e-3)  # if there is no tile to measure it in
    for k in range(values.shape[-1]):
        light = np.where(usable & (values[..., k] < 1), linear[..., k], np.nan)  # what is clipped has no noise
        levels, variances = _quiet_levels(light)
        kept = np.full(levels.shape, True)
        for _ in range(4 if levels.size else 0):
            terms = np.stack([np.ones_like(levels), levels - levels.min()], 1)
            line, _ = scipy.optimize.nnls((terms / variances[:, None])[kept], np.ones(kept.sum()))
            excess = variances / np.maximum(terms @ line, 1e-30)
            kept = excess <= max(2.0, np.sort(excess)[:2].max())  # two levels stay at least
        if levels.size:
            linear_noise = np.sqrt(line[0] + line[1] * np.maximum(linear[..., k] - levels.min(), 0))
            noise[..., k] = np.maximum(linear_noise * stretch.channel(k).slope(linear[..., k:k + 1])[..., 0], 2e-5)
    return noise


def _quiet_levels(light: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Up to eight levels of light (h, w) with NaNs, and the variance of the quietest tiles of 7 x 7 cells at each."""
    inner = light[1:-1, 1:-1]
    detail = np.abs(inner - (light[:-2, 1:-1] + light[2:, 1:-1] + light[1:-1, :-2] + light[1:-1, 2:]) / 4)
    side = min(7, *detail.shape)
    if side < 1:  # a strip: no cell has neighbors on all sides
        return np.empty(0), np.empty(0)
    rows, columns = (n // side for n in detail.shape)
    tiles = [image[:rows * side, :columns * side].reshape(rows, side, columns, side).swapaxes(1, 2).reshape(-1, side**2)
             for image in (detail, inner)]
    whole = np.isfinite(tiles[0]).mean(1) > 0.5
    if not whole.any():
        return np.empty(0), np.empty(0)
    sigma, level = (np.nanmedian(tile[whole], 1) for tile in tiles)
    sigma *= 1.4826 / math.sqrt(1.25)  # median absolute value -> deviation; four neighbors add a quarter
    bins = np.array_split(np.argsort(level), min(8, max(1, level.size // 6)))
    quiet = np.array([1.07 * np.percentile(sigma[b], 25) for b in bins])  # a lower quartile of 49 cells' is 7 % low
    return np.array([np.median(level[b]) for b in bins]), quiet**2 + 1e-18


class _ThinPlate:
    """A thin-plate surface on the cells that pays for bending: `values` at its own control points describe it."""

    def __init__(self, cells: _Cells, shape: tuple[int, int]):
        sides = np.array(shape) / max(shape)
        rows = int(np.clip(round(math.sqrt(SKY_POINTS * sides[0] / sides[1])), 3, SKY_POINTS // 3))
        points = (np.linspace(0, side, n) for side, n in zip(sides, (rows, round(SKY_POINTS / rows))))
        self.positions = _grid(*points).reshape(-1, 2)
        weights = _spline_coefficients(self.positions, 2, 0.0)[:-3]
        self.energy = weights.T @ _kernel(self.positions, self.positions, 2) @ weights + 1e-6 * np.eye(len(weights))
        self.cells = cells
        unit = np.eye(len(self.positions))
        self.matrix = spline_surface(cells.centers.reshape(-1, 2), self.positions, unit, 2, 0.0)  # (cells, n)

    def normal(self, weight: np.ndarray, below: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Normal equations: grams (c, n, n), right sides (c, n), sums of weights (c,).

        Args:
            weight: (h, w) of squared residuals over noise; alike for all channels, so that they share one product.
            below: (h, w, c) further weights, 0 nearly everywhere.
        """
        count = self.cells.values.shape[-1]
        values = self.cells.values.reshape(-1, count)
        inverse = 1 / (self.cells.noise**2).mean(-1).ravel()
        w = weight.ravel() * inverse
        weighted = self.matrix * w[:, None]
        grams, right = np.repeat((weighted.T @ self.matrix)[None], count, 0), (weighted.T @ values).T
        total = np.full(count, w.sum())
        for k in range(count if below is not None else 0):
            rows = np.flatnonzero(below[..., k])
            w = below[..., k].ravel()[rows] * inverse[rows]
            weighted = self.matrix[rows] * w[:, None]
            grams[k] += weighted.T @ self.matrix[rows]
            right[k] += weighted.T @ values[rows, k]
            total[k] += w.sum()
        return grams, right, total

    def solve(self, normal: tuple[np.ndarray, np.ndarray, np.ndarray], smoothing: float) -> np.ndarray:
        """(n, c) values at the control points."""
        grams, right, total = normal
        energy = smoothing * STIFFNESS_UNIT * self.energy + 1e-10 * np.eye(len(self.energy))
        return np.linalg.solve(grams / total[:, None, None] + energy, right[..., None] / total[:, None, None])[..., 0].T

    def residual(self, values: np.ndarray) -> np.ndarray:
        """(h, w, c) picture less surface, in units of the noise."""
        return (self.cells.values - (self.matrix @ values).reshape(self.cells.values.shape)) / self.cells.noise

    def follow(self, weight: np.ndarray, smoothing: float, rounds: int = 15) -> np.ndarray:
        """Robust fit that lets go of what it cannot meet: (h, w, c) residual. weight: (h, w)."""
        now = weight
        for k in range(rounds):
            residual = self.residual(self.solve(self.normal(now), smoothing))
            spread = np.median(np.abs(residual.mean(-1))[weight > 0])
            scale = max(1.5, spread * (1 + 3 * 0.7**k))  # narrowed step by step, or the start decides
            now = weight / (scale**2 + (residual**2).mean(-1))
        return residual

    def fit_below(self, sky: np.ndarray, ceiling: np.ndarray, smoothing: float,
                  rounds: int = 6) -> tuple[np.ndarray, tuple]:
        """Fit to the sky's cells, held below the picture elsewhere.

        Args:
            sky: (h, w) weights of cells of sky. ceiling: (h, w) weights of cells that only bound the sky from above.
            smoothing: see `SMOOTHINGS`.

        Returns:
            (n, c) values at the control points, and the weights for `normal` that they are the solution for.
        """
        kept, below = sky, None
        for _ in range(rounds):
            values = self.solve(self.normal(kept, below), smoothing)
            residual = self.residual(values)
            distance = np.sqrt((residual**2).mean(-1))
            spread = max(1.0, 1.2 * np.median(distance[sky > 0]))
            kept = sky * np.minimum(1, 2.5 * spread / np.maximum(distance, 1e-9))  # Huber: no cell pulls harder
            below = ceiling[..., None] * (residual < 0)
        return values, (kept, below)


def _rough_cells(cells: _Cells, residual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(h, w) bool each: cells with detail that the noise does not explain, and regions dense with them."""
    detail = residual - cells.smooth(residual, ROUGH_SCALE)
    rough = (np.abs(detail).max(-1) > ROUGH_SIGMA) & cells.usable
    window = _odd(ROUGH_WINDOW * max(rough.shape))
    density = scipy.ndimage.uniform_filter(rough.astype(float), window) / np.maximum(
        scipy.ndimage.uniform_filter(cells.usable.astype(float), window), 0.2)
    return rough, (density > ROUGH_DENSITY) & cells.usable


def _odd(length: float) -> int:
    return max(3, int(length) | 1)


def _dark_foreground(cells: _Cells, objects: np.ndarray) -> np.ndarray:
    """(h, w) bool: hills, trees, a dome. The one thing that takes light away, and so lies below the sky by a step.

    The largest region without structure is taken for sky. A region near it whose edge is already darker than the
    nearest of that sky, by half of the sky's own range, is foreground: no sky falls so much so fast.
    """
    regions, _ = scipy.ndimage.label(cells.usable & ~scipy.ndimage.binary_dilation(objects, iterations=2))
    foreground = np.zeros_like(objects)
    if not regions.any():
        return foreground
    sky = regions == np.bincount(regions.ravel())[1:].argmax() + 1
    distance, nearest = scipy.ndimage.distance_transform_edt(~sky, return_indices=True)
    drop = cells.values[tuple(nearest)] - cells.values
    span = np.subtract(*np.percentile(cells.values[sky], (95, 5), axis=0))
    dark = cells.usable & ~sky & (drop > np.maximum(10 * cells.noise, 0.15 * span)).all(-1)
    parts, count = scipy.ndimage.label(scipy.ndimage.binary_opening(dark))
    longer = max(sky.shape)
    for part in range(1, count + 1):
        inside = parts == part
        gap = distance[inside].min()
        edge = inside & (distance < gap + 5)
        large = inside.sum() > 0.003 * cells.usable.sum() and edge.sum() > 0.02 * longer
        if large and gap < 0.25 * longer and (np.median(drop[edge], axis=0) > 0.5 * span).all():
            foreground |= inside
    return scipy.ndimage.binary_dilation(foreground, iterations=2) & cells.usable


def _surroundings(objects: np.ndarray, rough: np.ndarray, residual: np.ndarray) -> np.ndarray:
    """(h, w) bool: cells where the faint outskirts of objects may be: within half of their size, and farther about
    bright stars, whose halos fall off so (distance^-2.5) that the noise drowns them where STAR_REACH says.

    Args:
        objects, rough: (h, w) bool. residual: (h, w), picture less surface in units of the noise.
    """
    labels, _ = scipy.ndimage.label(objects)
    reach = 0.5 * np.sqrt(np.bincount(labels.ravel()))[labels] * objects
    stars, count = scipy.ndimage.label(rough, np.ones((3, 3)))
    peaks = np.append(0, scipy.ndimage.maximum(residual, stars, range(1, count + 1)))
    reach = np.maximum(reach, np.where(peaks > STAR_SIGMA, STAR_REACH * np.maximum(peaks, 0)**0.4, 0)[stars])
    around = objects.copy()
    for radius in range(1, int(min(reach.max(), 0.1 * max(objects.shape))) + 1):
        around |= scipy.ndimage.distance_transform_edt(reach < radius) <= radius
    return around


def _find_objects(cells: _Cells, surface: _ThinPlate) -> tuple[np.ndarray, np.ndarray]:
    """(h, w) bool each: what is not sky (foreground included), and which of it bounds the sky from above."""
    residual = surface.follow(cells.usable.astype(float), SMOOTHINGS[-1])
    rough, objects = _rough_cells(cells, residual)
    foreground = _dark_foreground(cells, objects)
    if foreground.any():  # it has bent the surface, and made the sky along its edge look rough
        rest = replace(cells, usable=cells.usable & ~foreground)
        residual = surface.follow(rest.usable.astype(float), SMOOTHINGS[-1])
        rough, objects = _rough_cells(rest, residual)
    near_foreground = scipy.ndimage.binary_dilation(foreground, iterations=_odd(ROUGH_WINDOW * max(rough.shape)) + 1)
    # The smooth cells between an object's rough ones may be gaps that show the sky: judged with its surroundings. Along
    # a ridge they are sky, and its brightest strip: there the rough cells alone are the object.
    compact = scipy.ndimage.binary_opening(objects & ~near_foreground)
    around = objects | _surroundings(compact, rough & ~near_foreground, residual.max(-1))
    objects = rough | foreground
    halo = (around | scipy.ndimage.binary_dilation(objects)) & cells.usable & ~objects & ~near_foreground
    sky, ceiling = (cells.usable & ~objects).astype(float), CEILING_WEIGHT * (objects & ~near_foreground)
    weight = sky
    for k in range(10):
        values, _ = surface.fit_below(weight, ceiling, HALO_SMOOTHING, rounds=3)
        above = (cells.smooth(surface.residual(values), 1.0) * math.sqrt(4 * math.pi)).max(-1)  # in sigma of the mean
        limit = HALO_SIGMA * (1 + 6 * 0.6**k)
        # All of the surroundings take part at first, and leave as they prove to stand above the rest.
        weight = sky * np.where(halo, np.minimum(1, limit / np.maximum(above, limit))**4, 1)
    objects = scipy.ndimage.binary_dilation(objects | (halo & (above > HALO_SIGMA))) & cells.usable
    return objects, objects & ~near_foreground


def _cross_validate(surface: _ThinPlate, sky: np.ndarray, weights: tuple) -> tuple[float, np.ndarray]:
    """The largest smoothing that predicts held-out tiles of sky nearly as well as the best does, and all losses.

    Args:
        sky: (h, w), above 0 where a cell is sky. weights: of `fit_below`.
    """
    height, width = sky.shape
    down, across = (8, 12) if height <= width else (12, 8)
    row, column = np.indices(sky.shape)
    tile = (row * down // height) * across + column * across // width
    fold = (np.random.default_rng(0).permutation(FOLD_TILES) % FOLDS)[tile]
    kept, below = weights
    shares = [surface.normal(kept * (fold == k), below * (fold == k)[..., None]) for k in range(FOLDS)]
    losses = np.zeros(len(SMOOTHINGS))
    for held in range(FOLDS):
        normal = tuple(sum(part) for part in zip(*(shares[k] for k in range(FOLDS) if k != held)))
        test = (sky > 0) & (fold == held)
        if normal[2].min() <= 0:
            continue
        for k, smoothing in enumerate(SMOOTHINGS):
            distance = np.sqrt((surface.residual(surface.solve(normal, smoothing))[test]**2).mean(-1))
            losses[k] += np.log1p(distance).sum()
    losses /= max(1, np.count_nonzero(sky))
    return SMOOTHINGS[int(np.flatnonzero(losses <= losses.min() + TOLERANCE)[0])], losses


class _SkyOnCells(NamedTuple):
    """What is sky, found on the cells, and how stiff it is."""

    surface: _ThinPlate
    sky: np.ndarray  # (h, w) weights: 1 where a cell is sky
    ceiling: np.ndarray  # (h, w) weights of the cells that bound the sky from above
    share: float  # of the usable cells, that are sky
    smoothing: float
    why: str  # this smoothing


def _find_sky(prepared: Prepared, settings: Settings) -> _SkyOnCells | None:
    """Tell objects from sky and choose the smoothing; None if the picture is too small for that."""
    cells = _make_cells(prepared, settings.threshold_max)
    if min(cells.usable.shape) < 12 or cells.usable.sum() < 150:
        return None
    surface = _ThinPlate(cells, prepared.full_shape)
    objects, lighter = _find_objects(cells, surface)
    used = _block_means(prepared.used.astype(np.float32), cells.size) > 0.5
    sky = (cells.usable & used & ~objects).astype(float)
    share = sky.sum() / cells.usable.sum()
    if sky.sum() < 30:
        sky, lighter = (cells.usable & used).astype(float), np.zeros_like(objects)
    if not sky.any():
        return None
    ceiling = CEILING_WEIGHT * lighter
    if settings.smoothing is not None:
        return _SkyOnCells(surface, sky, ceiling, share, settings.smoothing, "given by hand")
    chosen, losses = _cross_validate(surface, sky, surface.fit_below(sky, ceiling, 0.01)[1])
    why = f"held-out loss {losses[SMOOTHINGS.index(chosen)]:.3f}, best {losses.min():.3f}"
    if share < LITTLE_SKY:
        chosen, why = max(chosen, 1e2), "too little sky to tell glow from object, so the surface is kept nearly flat"
    return _SkyOnCells(surface, sky, ceiling, share, chosen, why)


def choose_sky(prepared: Prepared, settings: Settings, say: Callable[[str], None] = _quiet) -> tuple[Prepared, float]:
    """The choices of --auto: mask what is not sky, and find the sky to expect there and how stiff it is.

    Args:
        prepared: picture and mask by thresholds and mask file; what they leave out is treated like an object.
        settings: `threshold_max` counts, and `smoothing` if given by hand.
        say: called with a line on each choice.

    Returns:
        `prepared` with objects out of `weight` and with `expected` set, and the smoothing of the fit.
    """
    found = _find_sky(prepared, settings)
    if found is None:
        say("auto: too small or too much left out to tell objects from sky; fitted as it is (a smaller -dx may help)")
        return prepared, 1.0 if settings.smoothing is None else settings.smoothing
    say(f"auto: {100 * found.share:.0f} % of the picture is sky; stretch quantile {stretch_quantile(settings):g}; "
        f"smoothing {found.smoothing:g} ({found.why})")
    surface, cells = found.surface, found.surface.cells
    values, _ = surface.fit_below(found.sky, found.ceiling, found.smoothing)
    height, width = prepared.used.shape
    kept = (found.sky > 0)[np.arange(height) // cells.size][:, np.arange(width) // cells.size]
    masked = prepared.weight * kept[..., None]
    weight = _block_means(masked, cells.size) * (found.sky > 0)[..., None]
    expected = ExpectedSky(lambda places: spline_surface(places, surface.positions, values, 2, 0.0),
                           cells.values, weight, cells.centers)
    return replace(prepared, weight=masked, expected=expected), min(found.smoothing, STIFFEST_FIT)


def choose_smoothing(prepared: Prepared, settings: Settings, say: Callable[[str], None] = _quiet) -> float:
    """The smoothing of a plain run: found as for --auto, on the sky that --auto would see, but nothing is masked."""
    found = _find_sky(prepared, settings)
    best = 1.0 if found is None else max(math.sqrt(found.smoothing), 1 - found.share)
    chosen = float(f"{np.clip(best, *PLAIN_SMOOTHING):.2g}")
    say(f"smoothing {chosen:g}, by cross-validation")
    return chosen


# ---------------------------------------------------------------------------------------------------------
# The whole job on arrays
# ---------------------------------------------------------------------------------------------------------

def examine(planes: np.ndarray, settings: Settings, mask: np.ndarray | None = None,
            say: Callable[[str], None] = _quiet) -> tuple[Prepared, Settings]:
    """Everything before the fit: stretch, reduce, mask, and choose what was left to choose. Needs no TensorFlow.

    Args and errors: as for `prepare`; `say` is called with one line on each choice.

    Returns:
        What the fit sees, and the settings with the values really used in place of every None.
    """
    prepared, smoothing = prepare(planes, settings, mask), settings.smoothing
    if settings.auto:
        prepared, smoothing = choose_sky(prepared, settings, say)
    elif smoothing is None:
        smoothing = choose_smoothing(prepared, settings, say)
    return prepared, replace(
        settings, delinearization_quantile=stretch_quantile(settings), smoothing=smoothing,
        points=settings.points or (AUTO_POINTS if settings.auto else DEFAULT_POINTS))


@dataclass(frozen=True)
class Result:
    """What `optimize` gives back."""

    model: np.ndarray  # (h, w, c) linear sky
    subtracted: np.ndarray  # (h, w, c) the picture without it
    offsets: np.ndarray  # (c,) what was added so that the medians stay
    history: dict[str, np.ndarray]  # "loss" and its terms, each (epochs,)
    settings: Settings  # as used
    prepared: Prepared
    fit: Fit


def optimize(image: np.ndarray, settings: Settings = Settings(), mask: np.ndarray | None = None,
             say: Callable[[str], None] = _quiet, on_epoch: Callable[[int, float], None] = _quiet) -> Result:
    """Model the sky of a linear picture and take it out.

    Args:
        image: (h, w), (h, w, 1) or (h, w, 3), linear, in [0, 1]; 0 and what is not finite count as missing. Integers
            count over their full range. Not changed.
        settings: see `Settings`.
        mask: (h, w), (h, w, 1) or (h, w, c) weights in [0, 1], 1 = use, 0 = ignore.
        say: called with a line of text now and then; `print` will do.
        on_epoch: called with each epoch's number, from 1, and its loss.

    Returns:
        Model and picture in Float32, or in Float64 if the image is.

    Raises:
        BgError: the image's shape is another, nothing is left to fit, or a channel is empty.
    """
    planes = _to_planes(image, "the image")
    if len(planes) not in (1, 3):
        raise BgError(f"the image has shape {np.shape(image)}; give (h, w), (h, w, 1) or (h, w, 3)")
    prepared, settings = examine(planes, settings, None if mask is None else _to_planes(mask, "the mask"), say)
    fit = fit_sky(prepared, settings, say, on_epoch)
    sky = full_size_sky(prepared, fit, planes.dtype)
    offsets, _, _ = subtract(planes, sky, prepared.median)
    return Result(np.moveaxis(np.stack(list(sky)), 0, -1), np.moveaxis(planes, 0, -1), offsets,
                  dict(zip(("loss",) + LOSS_TERMS, fit.history.T)), settings, prepared, fit)


def _to_planes(image: np.ndarray, name: str) -> np.ndarray:
    """(h, w) or (h, w, c) -> a copy (c, h, w), Float64 if the image is, else Float32."""
    image = np.asarray(image)
    if image.ndim not in (2, 3) or not image.size or image.dtype.kind not in "fiub":
        raise BgError(f"{name} is {image.dtype} of shape {image.shape}; give numbers of shape (h, w) or (h, w, c)")
    full = np.iinfo(image.dtype).max if image.dtype.kind in "iu" else 1
    dtype = np.float64 if image.dtype == np.float64 else np.float32
    planes = image[None] if image.ndim == 2 else np.moveaxis(image, -1, 0)
    return np.array(planes, dtype, order="C") / dtype(full)


# ---------------------------------------------------------------------------------------------------------
# What can be said about a picture
# ---------------------------------------------------------------------------------------------------------

VIEW_PIXELS = 600
"""Reduced pixels along the longer side that are looked at for numbers and pictures; more could not be seen."""

BLOWN_SHARE, BLOWN_TEXTURE, BLOWN_PEAK = 0.01, 0.08, 1.0
"""Clipped sky is one connected area of more than 1 % of the frame that a quadratic surface fits to within 8 % of its
range (or of its height above the median), and that is brightest at the frame's edge, for the light stands outside, or
does not rise above the clipping point by more than that lies above the median. A galaxy's core peaks inside, and more
steeply."""


def thinned(prepared: Prepared, most: int = VIEW_PIXELS) -> Prepared:
    """Every k-th pixel of the reduced frame, so that its longer side has about `most`."""
    step = max(1, round(max(prepared.image.shape[:2]) / most))
    names = ("image", "weight", "present", "centers", "linear", "user_mask")
    parts = {name: getattr(prepared, name) for name in names}
    return replace(prepared, **{name: None if part is None else part[::step, ::step] for name, part in parts.items()})


def blown_out(prepared: Prepared) -> np.ndarray:
    """Where the stretch clips what looks like sky: (h, w) bool. The fit loses the sky there."""
    blown = np.zeros(prepared.image.shape[:2], bool)
    clipped = clipped_by_stretch(prepared)
    for k in range(clipped.shape[-1]):
        labels, _ = scipy.ndimage.label(clipped[..., k])
        sizes = np.bincount(labels.ravel())
        for label in 1 + np.flatnonzero(sizes[1:] > BLOWN_SHARE * labels.size):
            area = labels == label
            if _looks_like_sky(prepared, k, area):
                blown |= area
    return blown


def _looks_like_sky(prepared: Prepared, k: int, area: np.ndarray) -> bool:
    """Whether channel k is as smooth in this area (h, w) as sky is, and peaks where sky peaks."""
    values, terms = prepared.linear[area, k].astype(float), _quadratic(prepared.centers[area])
    smooth = terms @ np.linalg.lstsq(terms, values, rcond=None)[0]
    low, high = np.quantile(smooth, (0.01, 0.99))
    top = prepared.stretch.pedestal[k] + prepared.stretch.scale[k]
    texture = np.median(np.abs(values - smooth)) / max(high - low, top - prepared.median[k], 1e-12)
    brightest = prepared.centers[area][smooth >= np.quantile(smooth, 0.95)]
    there = prepared.centers[prepared.present.any(-1)]
    to_edge = np.minimum(brightest - there.min(0), there.max(0) - brightest).min(-1)
    blunt = np.quantile(values, 0.95) - top < BLOWN_PEAK * (top - prepared.median[k])
    return texture < BLOWN_TEXTURE and (np.median(to_edge) < 0.05 or blunt)


def _quadratic(places: np.ndarray) -> np.ndarray:
    """(n, 2) -> (n, 6): the terms of a quadratic surface, about its middle."""
    y, x = (places - places.mean(0)).T
    return np.stack([np.ones_like(y), y, x, y * y, y * x, x * x], -1)


def gradient(linear: np.ndarray, used: np.ndarray) -> float:
    """How uneven a sky is: the range of its quadratic course over some 8 x 12 tiles, over its level.

    The course is the one with the least absolute deviations from the tiles' medians, so that objects hardly count.

    Args:
        linear: (h, w, c) reduced picture, NaN where missing. used: (h, w) bool, where it shows sky.

    Returns:
        The mean over the channels; NaN if fewer than 12 tiles show enough sky (`_percent` says so).
    """
    side = -(-max(used.shape) // 12)
    sky = [np.where(used, plane, 0) for plane in np.moveaxis(linear, -1, 0)]  # 0: missing
    tiles = np.stack([reduce_plane(plane, side) for plane in sky], -1).astype(float)
    enough = (_block_means(used, side) >= 0.25) & np.isfinite(tiles).all(-1)
    if enough.sum() < 12:
        return math.nan
    terms, ranges = _quadratic(np.argwhere(enough) / max(enough.shape)), []
    for values in tiles[enough].T:
        weight = np.ones_like(values)
        for _ in range(20):  # least squares, reweighted until it is least absolute deviations
            course = terms @ np.linalg.lstsq(terms * weight[:, None], values * weight, rcond=None)[0]
            weight = 1 / np.sqrt(np.maximum(np.abs(values - course), 1e-6 * values.max()))
        ranges.append((course.max() - course.min()) / np.median(values))
    return float(np.mean(ranges))


def gradients(prepared: Prepared, fit: Fit) -> str:
    """The gradient before and after, in words."""
    prepared = thinned(prepared)
    before, after = (gradient(linear, prepared.used) for linear in (prepared.linear, reduced_sky(prepared, fit)[1]))
    return f"gradient {_percent(before)} of the sky's level before, {_percent(after)} after"


def _percent(share: float) -> str:
    return "unknown" if math.isnan(share) else f"{share:.1%}"


# --------------------------------------------------------------------------------------------------
# Pictures: preview, figures, animation
#
# All are drawn from the reduced picture, so a large frame costs no more than a small one.
# --------------------------------------------------------------------------------------------------

FIGURE_SIZE = (13.6, 7.6)
"""Inches, at 100 pixels each: fits a laptop's screen."""

INK, PAPER, FAINT = "#e6e6e6", "#16191d", "#4a5058"
STYLE = {
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.facecolor": "#1e2227",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 9,
    "figure.dpi": 100,
    "hatch.linewidth": 1.5,
    "lines.linewidth": 1.2,
    "grid.color": FAINT,
    "grid.linewidth": 0.4,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
"""Ink and paper of our own, so that pictures look the same in light and in dark terminals and
notebooks."""

RED, GREEN, BLUE = "#e8703a", "#2fb58a", "#5ab0ee"
CHANNEL_INKS = {1: (INK,), 3: (RED, GREEN, BLUE)}
"""Red, green, and blue as the color-blind tell them apart (after Okabe and Ito)."""

TERM_INKS = ("#56b4e9", "#2fb58a", "#e69f00", "#cc79a7")
"""The same for LOSS_TERMS."""

OVERLAYS = {
    "missing": ("#6b7077", "", "missing"),
    "threshold": ("#e69f00", "/////", "left out by -tm, -tM"),
    "mask file": ("#56b4e9", "\\\\\\\\\\", "left out by -m"),
    "auto": ("#cc79a7", "///", "left out by --auto"),
    "clipped": ("#f0e442", "\\\\\\", "clipped by -dq"),
}
"""Reason -> its color, its hatching (none: solid), its name. The hatching tells them apart without
color."""

START_INK, END_INK = "#56b4e9", "#f0e442"
"""Colors of a control point where it starts, and where it ends."""

DISPLAY_QUANTILES = (0.002, 0.5, 0.9995)
"""Quantiles of a channel that the eye is shown as nearly black, as the background, and as white: so
nearly nothing is clipped, and no single star decides how dark the rest is."""

HISTOGRAM_BINS = 128
HISTOGRAM_EDGES = (-0.02, 1.02)
"""Where the axis of stretched values ends: a little beyond 0 and 1, so that the ends are seen."""

FRAMES = 24
"""Most frames in an animation."""

FRAME_GAP, FRAME_HEAD = 8, 22
"""Pixels around the two halves of a frame, and above them, for the words."""

HALF_FRAME_PIXELS = 110_000
"""Most pixels in one half of a frame, so that a GIF of the usual noise stays below 3 MB."""

NODE_SPACING = 8
"""Pixels between the places where an animation's surfaces are evaluated: fine enough for the eye."""

FRAME_PAUSE, LAST_PAUSE = 130, 1500
"""Milliseconds that a frame is shown, and the last one: 24 of them take some 4 seconds."""

PALETTE_SIZES = (255, 128, 64, 32, 16)
"""Numbers of colors that are tried for a GIF, until it is small enough."""


def display_stretch(linear: np.ndarray) -> Stretch:
    """Return a stretch for the eye of a reduced picture (h, w, c).

    Nearly nothing is clipped, and the median of every channel is at 0.25, unless it is very bright.
    """
    low, median, high = np.nanquantile(linear, DISPLAY_QUANTILES, axis=(0, 1))  # (c,) each
    pedestal = low - 0.1 * (median - low)  # darker than `low`, so that faint structure stays
    scale = np.maximum(high - pedestal, 1e-9)  # not 0 where the picture is flat
    midtones = (median - pedestal) / scale
    midtones = np.clip(midtones, MIDTONES_MARGIN, 0.5)  # 0.5 is a straight line
    constants = np.float32([pedestal, scale, midtones])  # (3, c)
    return Stretch(*constants)


def draw_preview(figure, prepared: Prepared, settings: Settings, title: str) -> None:
    """The cockpit for tuning: the picture, what the fit would see of it, what stands out; histograms and numbers."""
    prepared = thinned(prepared)
    reasons, blown = mask_reasons(prepared, settings), blown_out(prepared)
    panels, bottom = _lay_out(figure, title, 1.6)
    _show(panels[0], display_stretch(prepared.linear).apply(prepared.linear), "the picture, plain stretch")
    _show(panels[1], prepared.image, "stretched as for the fit, and what is left out")
    _overlay(panels[1], {**reasons, "clipped": clipped_by_stretch(prepared).any(-1) & prepared.used})
    _draw_hints(panels[2], prepared, blown)

    channels = prepared.image.shape[-1]
    cells = bottom.subgridspec(1, 4, wspace=0.12)
    for k in range(channels):
        span = cells[0, k] if channels == 3 else cells[0, :3]
        _draw_histogram(figure.add_subplot(span), prepared, settings, k)
    figure.text(0.02, 0.012, "below the histograms: stretched value, and the picture's own value there; "
                "heights are logarithmic", fontsize=8)
    words = figure.add_subplot(cells[0, 3])
    words.axis("off")
    words.text(0.06, 1.0, "\n".join(_numbers(prepared, reasons, blown)), va="top", family="monospace", fontsize=8,
               linespacing=1.35)


def _lay_out(figure, title, ratio):
    """Give a figure a title, three axes beside each other, and a cell below them.

    The heights of axes and cell are as ratio : 1. Returns the axes and the cell.
    """
    figure.suptitle(title, x=0.015, ha="left", fontsize=11)
    top, bottom = figure.add_gridspec(
        2, 1, height_ratios=(ratio, 1),
        left=0.02, right=0.985, top=0.915, bottom=0.085, hspace=0.3)
    cells = top.subgridspec(1, 3, wspace=0.03)
    return [figure.add_subplot(cell) for cell in cells], bottom


def _numbers(prepared: Prepared, reasons: dict[str, np.ndarray], blown: np.ndarray) -> list[str]:
    """The preview's numbers, one line each."""
    part = shares(prepared)
    low, high = prepared.stretch.pedestal, prepared.stretch.pedestal + prepared.stretch.scale
    lines = ["           " + "".join(f"{letter:>9}" for letter in _channel_letters(prepared))]
    for name, values in (("minimum", low), ("median", prepared.median), ("-dq value", high)):
        lines.append(f"{name:<11}" + "".join(f"{value:9.5f}" for value in values))
    clipped = 100 * clipped_by_stretch(prepared).mean((0, 1))
    lines.append("clipped %  " + "".join(f"{value:9.2f}" for value in clipped))
    rows = [("used", part["used"], "of the samples"), ("masked", part["masked"], "of the samples")]
    rows += [("  " + OVERLAYS[name][2].replace("left out ", ""), reasons[name].mean(), "of the frame")
             for name in ("threshold", "mask file", "auto") if reasons[name].any()]
    rows += [("missing", part["missing"], ""),
             ("gradient", gradient(prepared.linear, prepared.used), "of the sky's level")]
    rows += [("blown out", blown.mean(), "sky: raise -dq")] if blown.any() else []
    return lines + [""] + [f"{name:<13}{_percent(value):>7}  {what}" for name, value, what in rows]


def _draw_histogram(axes, prepared, settings, k):
    """Draw how often the stretched values of one channel occur, and what is made of them."""
    values = prepared.image[..., k]
    present = values[prepared.present[..., k]]
    used = values[prepared.weight[..., k] > 0]
    counts, edges = np.histogram(present, HISTOGRAM_BINS, (0, 1))
    used_counts, _ = np.histogram(used, HISTOGRAM_BINS, (0, 1))
    starts = edges[:-1]
    letters = _channel_letters(prepared)
    ink = CHANNEL_INKS[len(letters)][k]
    axes.fill_between(starts, used_counts, step="post", color=ink, alpha=0.45, linewidth=0)
    axes.step(starts, counts, where="post", color=ink, linewidth=1)
    axes.set_title(f"{letters[k]}: how often a value occurs (filled: used)", fontsize=8)
    axes.set_yscale("symlog", linthresh=1)
    highest = counts.max()
    axes.set_ylim(0, 4 * highest)
    axes.yaxis.set_visible(False)

    left, right = HISTOGRAM_EDGES
    axes.set_xlim(left, right)
    color = OVERLAYS["threshold"][0]
    darkest = settings.threshold_min
    brightest = settings.threshold_max
    for low, high in ((left, darkest), (brightest, right)):
        if low < high:
            axes.axvspan(low, high, facecolor="none", edgecolor=color, hatch="///", linewidth=0)
    for threshold in (darkest, brightest):
        axes.axvline(threshold, color=color, linewidth=1)

    axes.axvline(MIDTONES_TARGET, color=INK, linewidth=0.8, linestyle=":")
    axes.text(MIDTONES_TARGET + 0.01, 2 * highest, "median", fontsize=7)
    quantile = stretch_quantile(settings)
    axes.text(0.985, 2 * highest, f"-dq {quantile:g}", fontsize=7, ha="right")
    ticks = np.linspace(0, 1, 5)
    stretch = prepared.stretch.channel(k)
    linear = stretch.invert(ticks[:, None]).ravel()
    labels = map("{:g}\n{:.4f}".format, ticks, linear)
    axes.set_xticks(ticks, list(labels), fontsize=7)


def _draw_hints(axes, prepared: Prepared, blown: np.ndarray) -> None:
    """The picture less its own large-scale course: what is not sky, and may be mistaken for it unless it is masked."""
    values, known = prepared.linear.mean(-1), prepared.present.all(-1)
    center = np.median(values[known]) if known.any() else 0.0
    capped = np.where(known, np.minimum(values, np.nanquantile(values, 0.9)), 0)  # bright things hardly count as course
    width = max(values.shape) / 8
    weight = np.maximum(scipy.ndimage.gaussian_filter(known.astype(float), width), 1e-9)
    residual = values - scipy.ndimage.gaussian_filter(capped, width) / weight
    residual = scipy.ndimage.gaussian_filter(np.where(known, residual, 0), max(values.shape) / 300)
    spread = 6 * np.median(np.abs(residual[known] - np.median(residual[known]))) if known.any() else 1.0
    image = axes.imshow(np.where(known, residual, np.nan), cmap="PuOr_r", vmin=-spread or -1, vmax=spread or 1,
                        interpolation="nearest")
    axes.set_title("orange above, purple below surroundings")
    axes.set(xticks=[], yticks=[])
    bar = _draw_scale(axes, image, [-spread, 0, spread])
    bar.set_xticklabels([f"{v / center:+.0%}" if center else "" for v in (-spread, 0, spread)])
    if blown.any() and min(blown.shape) > 1:
        axes.contour(blown, [0.5], colors="#d7191c", linewidths=2)
        axes.set_xlabel("outlined: sky blown out, raise -dq", color="#ff8a80", weight="bold", labelpad=28)


def draw_figures(figure, prepared: Prepared, settings: Settings, fit: Fit, title: str) -> None:
    """Draw the result: before, model, and after, the control points, and the loss."""
    figure.text(0.015, 0.012, facts(prepared, settings, fit), fontsize=8)
    prepared = thinned(prepared)
    sky, after = reduced_sky(prepared, fit)
    stretch = display_stretch(prepared.linear)
    panels, bottom = _lay_out(figure, title, 1.25)
    _show(panels[0], stretch.apply(prepared.linear), "before")
    _show(panels[1], stretch.apply(sky), "model, same stretch, lines of equal brightness")
    _draw_contours(panels[1], sky.mean(-1))
    _show(panels[2], stretch.apply(after), "after, same stretch")

    cells = bottom.subgridspec(1, 2, width_ratios=(1, 2.1), wspace=0.1)
    _draw_control_points(figure.add_subplot(cells[0]), prepared, fit)
    charts = cells[1].subgridspec(1, 3, width_ratios=(1, 1, 0.2), wspace=0.2)  # a legend at the end
    loss = figure.add_subplot(charts[0])
    terms = figure.add_subplot(charts[1])
    _draw_loss(loss, terms, fit.history)


def _draw_control_points(axes, prepared, fit):
    """Draw the paths of the control points over what the fit saw."""
    used = prepared.used[..., None]
    image = np.where(used, 0.75 * prepared.image, np.nan)  # darker, so that points stand out
    brown = (0.30, 0.24, 0.12)
    _show(axes, image, "control points, from ring to dot; brown: left out", blank=brown)
    stations = [positions for _, positions, _ in fit.track]
    stations.append(fit.positions)
    paths = [_pixel_positions(prepared, positions) for positions in stations]
    row, column = np.moveaxis(paths, -1, 0)  # (steps, n) each
    axes.plot(column, row, color=START_INK, linewidth=0.9, alpha=0.8)
    axes.plot(column[0], row[0], "o", color="none", markeredgecolor=START_INK, markersize=3.5)
    axes.plot(column[-1], row[-1], "o", color=END_INK, markeredgecolor="black", markersize=5)

    def around(length):  # points may leave the picture a little
        margin = 0.04 * length
        return -0.5 - margin, length - 0.5 + margin

    height, width, _ = image.shape
    axes.set_xlim(around(width))
    axes.set_ylim(around(height)[::-1])  # the first row on top


def _draw_loss(loss, terms, history):
    """Draw in two axes how the loss and its terms fell; `history` is that of `Fit`."""
    epochs = np.arange(1, len(history) + 1)
    total, *parts = history.T
    loss.plot(epochs, total, color=INK)
    loss.set_title("loss")
    for name, values, ink in zip(LOSS_TERMS, parts, TERM_INKS):
        positive = values > 0  # the axis is logarithmic
        if positive.any():
            values = np.where(positive, values, np.nan)
            terms.plot(epochs, values, color=ink, label=name)
        else:
            terms.plot([], [], color=ink, label=f"{name} (0)")
    terms.set_yscale("log")
    terms.legend(title="its terms:", alignment="left", loc="upper left", bbox_to_anchor=(1, 1),
                 borderpad=0)
    for axes in (loss, terms):
        axes.set_xlabel("epoch", labelpad=1)
        axes.grid()


def facts(prepared: Prepared, settings: Settings, fit: Fit) -> str:
    """Return one line on the run: settings, epochs, loss, share of sky, gradient."""
    quantile = stretch_quantile(settings)
    how = (f"-dq {quantile:g}, {len(fit.positions)} points ({settings.initializer}), "
           f"order {settings.order}, smoothing {fit.smoothing:g}, alpha {settings.alpha:g}, "
           f"seed {settings.seed}")
    best = fit.history[:, 0].min()
    fitted = f"{len(fit.history)} epochs, loss {best:.4f}"
    used = shares(prepared)["used"]
    return f"{how}   |   {fitted}   |   {used:.1%} used as sky   |   {gradients(prepared, fit)}"


def animation_frames(prepared: Prepared, fit: Fit, width: int = 800) -> np.ndarray:
    """Show how the surface and its control points settle, and the picture that they leave.

    Args:
        prepared: what was fitted.
        fit: with its path.
        width: of a frame, pixels; a portrait's frames are narrower.

    Returns:
        (n, h, w, 3) bytes, n up to FRAMES: the first frame at the start, the last with the final
        surface.
    """
    from PIL import Image, ImageDraw
    tall, wide = _half_frame(prepared, width)
    prepared = thinned(prepared, max(tall, wide))
    before = prepared.linear
    stretch = display_stretch(before)
    pixels = np.array(before.shape[:2])
    enlarged = (np.array((tall, wide)) - 1) / np.maximum(pixels - 1, 1)
    nodes = np.maximum(2, pixels // NODE_SPACING)
    places = _frame_nodes(prepared, nodes)
    down, across = map(_interpolation, nodes, pixels)

    def draw_half(linear):
        stretched = stretch.apply(linear)
        picture = Image.fromarray(_drawable(stretched))
        return picture.resize((wide, tall), Image.BICUBIC)

    left = FRAME_GAP  # where the two halves start
    right = left + wide + FRAME_GAP
    size = (right + wide + FRAME_GAP, FRAME_HEAD + tall + FRAME_GAP)
    frames = []
    for when, positions, values in _settling(fit):
        step = replace(fit, positions=positions, values=values)
        surface = linear_sky(prepared, step)
        sky = surface(places).astype(np.float32)
        sky = np.einsum("yn,nmc,xm->yxc", down, sky, across, optimize=True)
        after = _keep_median(before, before - sky)
        model = draw_half(sky)
        pen = ImageDraw.Draw(model)
        points = enlarged * _pixel_positions(prepared, positions)
        for y, x in points:
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=END_INK, outline="black")
        canvas = Image.new("RGB", size, PAPER)
        canvas.paste(model, (left, FRAME_HEAD))
        canvas.paste(draw_half(after), (right, FRAME_HEAD))
        pen = ImageDraw.Draw(canvas)
        pen.text((left, 5), f"sky model, {when}", INK)
        pen.text((right, 5), "the picture without it", INK)
        frames.append(np.array(canvas))
    return np.stack(frames)


def _half_frame(prepared, width):
    """Return the height and width of one half of a frame that is at most `width` wide."""
    rows, columns = prepared.image.shape[:2]
    limit = math.sqrt(HALF_FRAME_PIXELS * columns / rows)
    room = (width - 3 * FRAME_GAP) // 2
    wide = max(1, min(room, int(limit)))
    tall = max(1, wide * rows // columns)
    return tall, wide


def _frame_nodes(prepared, shape):
    """Return frame coordinates of nodes that cover a thinned picture, (*shape, 2)."""
    start = prepared.centers[0, 0]
    end = prepared.centers[-1, -1]
    row, column = map(np.linspace, start, end, shape)
    return _grid(row, column)


def _interpolation(nodes, pixels):
    """Return the matrix that draws straight lines between nodes, (pixels, nodes)."""
    unit = np.eye(nodes, dtype=np.float32)
    return scipy.ndimage.zoom(unit, (pixels / nodes, 1), order=1)


def _settling(fit):
    """Return what to show of a fit: when it was, in words, positions, and values.

    Most happens early, so the steps are at equal distances of the square root of the epoch.
    """
    last = len(fit.track)
    chosen = np.round(last * np.linspace(0, 1, FRAMES)**2)
    chosen = np.unique(chosen.astype(int))
    shown = []
    for k in chosen[:-1]:  # the last one is the result
        epoch, positions, values = fit.track[k]
        shown.append((f"epoch {epoch}", positions, values))
    epochs = len(fit.history)
    shown.append((f"best of {epochs} epochs", fit.positions, fit.values))
    return shown


def write_animation(file, frames: np.ndarray, most_bytes: int = 2_900_000) -> None:
    """Write frames, (n, h, w, 3) bytes, as a GIF that repeats.

    It has fewer colors if it would be larger than `most_bytes`.
    """
    from PIL import Image
    pauses = [FRAME_PAUSE] * len(frames)
    pauses[-1] = LAST_PAUSE
    # Colors are taken from some pixels of the first frame, one from the middle, and the last
    some = frames[[0, len(frames) // 3, -1], ::3, ::3]  # (3, h / 3, w / 3, 3)
    sample = Image.fromarray(np.concatenate(some))
    pictures = [Image.fromarray(frame) for frame in frames]
    for colors in PALETTE_SIZES:
        palette = _common_palette(sample, colors)
        first, *others = (picture.quantize(palette=palette, dither=0) for picture in pictures)
        packed = io.BytesIO()
        first.save(packed, "GIF", save_all=True, append_images=others, duration=pauses, loop=0,
                   optimize=False)
        if packed.tell() <= most_bytes:
            break
    file.write(packed.getvalue())


def _common_palette(sample, colors):
    """Return an image with the palette for all frames, so that what does not change stays the same.

    Most colors are where most pixels are, so that the sky has no bands. The rest are where few are,
    so that what is bright keeps its color.
    """
    from PIL import Image
    usual = 3 * colors // 4
    rare = colors // 4
    of_most = sample.quantize(usual, Image.MEDIANCUT).getpalette()
    of_few = sample.quantize(rare, Image.MAXCOVERAGE).getpalette()
    palette = Image.new("P", (1, 1))
    palette.putpalette(of_most[:3 * usual] + of_few[:3 * rare])  # three bytes each
    return palette


def _pixel_positions(prepared, positions):
    """Take control points (n, 2) from frame coordinates to rows and columns of the reduced frame.

    The frame may be thinned.
    """
    start = prepared.centers[0, 0]
    end = prepared.centers[-1, -1]
    share = (positions - start) / np.maximum(end - start, 1e-9)  # a side of one pixel has no length
    last = np.array(prepared.image.shape[:2]) - 1
    return share * last


def _channel_letters(prepared):
    """Return a letter for each channel."""
    return "RGB" if prepared.image.shape[-1] == 3 else "L"


def _drawable(image):
    """Take a picture (h, w, c) in [0, 1], NaN where nothing is, to bytes (h, w, 3)."""
    image = np.clip(np.nan_to_num(image), 0, 1)
    image = np.round(255 * image).astype(np.uint8)
    height, width = image.shape[:2]
    return np.broadcast_to(image, (height, width, 3))


def _show(axes, image, title, blank=(0, 0, 0)):
    """Draw a stretched picture; NaN in the color `blank`."""
    blank = np.round(255 * np.array(blank)).astype(np.uint8)
    known = np.isfinite(image).all(-1, keepdims=True)
    colors = np.where(known, _drawable(image), blank)
    small = max(colors.shape) < 300  # pixels: it is enlarged, and should not look like a mosaic
    axes.imshow(colors, interpolation="bicubic" if small else "antialiased")
    axes.set_title(title)
    axes.set(xticks=[], yticks=[])


def _overlay(axes, reasons):
    """Hatch what is left out, with a legend of the reasons that occur.

    Colors and slopes tell the reasons apart.
    """
    from matplotlib import rc_context
    from matplotlib.patches import Patch
    legend = []
    for reason, (color, hatch, label) in OVERLAYS.items():
        area = reasons[reason]
        if not area.any():
            continue
        legend.append(Patch(facecolor=color, edgecolor=PAPER, hatch=hatch, label=label))
        if min(area.shape) == 1:  # contours need two rows and two columns
            continue
        # Darker between the lines, so that these are seen on any color
        filling = (0, 0, 0, 0.35) if hatch else color
        with rc_context({"hatch.color": color}):
            axes.contourf(area, (0.5, 1.5), colors=[filling], hatches=[hatch])
        axes.contour(area, (0.5,), colors=[color], linewidths=1)
    axes.legend(handles=legend, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3)


def _draw_contours(axes, values):
    """Draw lines of equal brightness (h, w), with their scale in the picture's own units."""
    low, high = np.quantile(values, (0.005, 0.995))
    if high - low < 1e-9 or min(values.shape) == 1:  # flat, or too narrow for contours
        return
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator
    levels = MaxNLocator(8).tick_values(low, high)
    brightness = np.linspace(0.4, 1, len(levels))  # without the dark colors of the map
    colors = colormaps["plasma"](brightness)
    lines = axes.contour(values, levels, colors=colors, linewidths=1.3)
    bar = _draw_scale(axes, lines, levels[::2])
    for line in bar.collections:
        line.set_linewidth(5)


def _draw_scale(axes, drawn, ticks):
    """Draw a color bar below a panel; returns its axes."""
    bar = axes.inset_axes([0.02, -0.06, 0.96, 0.025])
    axes.figure.colorbar(drawn, cax=bar, orientation="horizontal", ticks=ticks)
    bar.tick_params(labelsize=7, length=0, pad=2)
    return bar


def _import_matplotlib():
    """Import matplotlib, also where a notebook has handed down the name of its own backend.

    This Python may not have that backend.
    """
    backend = os.environ.get("MPLBACKEND", "")
    scheme, _, module = backend.partition("://")
    package, _, _ = module.partition(".")
    if scheme == "module" and importlib.util.find_spec(package) is None:
        del os.environ["MPLBACKEND"]
    import matplotlib
    return matplotlib


def display_kind() -> str | None:
    """Return where a picture can be shown: "notebook" (an IPython kernel), "window", or None."""
    if "IPython" in sys.modules:
        shell = sys.modules["IPython"].get_ipython()
        if hasattr(shell, "kernel"):
            return "notebook"
    screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform.startswith("linux") and not screen:
        return None
    try:
        _import_matplotlib()
        from matplotlib import pyplot
        canvas = pyplot.figure().canvas
        pyplot.close()
    except Exception:  # no toolkit, no screen, or a notebook's backend handed down to a subprocess
        return None
    if getattr(canvas, "required_interactive_framework", None):
        return "window"
    return None


def put_picture(draw: Callable, where: str, path: str) -> None:
    """Draw and show, or save.

    Args:
        draw: gets the empty figure.
        where: "notebook", "window" or "file".
        path: of the file.
    """
    matplotlib = _import_matplotlib()
    with matplotlib.rc_context(STYLE):
        if where == "window":
            from matplotlib import pyplot
            draw(pyplot.figure(figsize=FIGURE_SIZE))
            return
        # Without pyplot it needs no display and touches no setting of the user's
        from matplotlib.figure import Figure
        figure = Figure(FIGURE_SIZE)
        draw(figure)
        if where == "file":
            with atomic_outputs(path) as (file,):
                figure.savefig(file, format="png", pil_kwargs={"compress_level": 3})
            return
        from IPython.display import Image, display
        packed = io.BytesIO()
        figure.savefig(packed, format="png")
        display(Image(packed.getvalue()))


# ---------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------

class _Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def error(self, message):
        self.exit(2, f"bgoptimizer: error: {message}; see --help\n")


def _smoothing(text: str) -> float | None:
    return None if text == "auto" else float(text)


_smoothing.__name__ = "number or auto"  # argparse names it in its message


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line; every default is the one of `Settings`."""
    default = Settings()
    purpose, heading, examples = (__doc__ or "").partition("examples:")
    parser = _Parser(
        prog="bgoptimizer.py", description=purpose, epilog=heading + examples, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("input_file", help="linear XISF picture, gray or RGB")
    add("output_path", nargs="?", default=".",
        help="folder for what is written; made if missing (default: .)")
    add("-c", "--compress", action="store_true",
        help="compress the outputs: lz4hc with byte shuffling (default: off)")
    add("-dx", "--downscaling-factor", type=int, default=default.downscaling_factor,
        help="side of the pixel blocks that the fit sees as one pixel (default: %(default)s)")
    add("-df", "--downscaling-func", choices=("median", "mean"), default=default.downscaling_func,
        metavar="DOWNSCALING_FUNC",
        help="what a block is reduced to, median or mean; the median drops small stars "
             "(default: %(default)s)")
    add("-dq", "--delinearization-quantile", type=float,
        help="quantile of the picture that the stretch takes to 1; what is brighter is clipped for "
             "the fit. Lower stretches more; raise it when the preview shows blown out sky "
             f"(default: {DEFAULT_QUANTILE}, with --auto {AUTO_QUANTILE})")
    add("-p", "--preview", action="store_true",
        help="show stretch, mask and histograms, fit nothing, write no XISF (default: off)")
    add("-N", dest="points", metavar="N", type=int,
        help="number of control points; more follow a more complicated sky, and objects too "
             f"(default: {DEFAULT_POINTS}, with --auto {AUTO_POINTS})")
    add("-O", dest="order", metavar="O", type=int, choices=(1, 2, 3, 4), default=default.order,
        help="order of the spline, 1 to 4; 2 is a thin plate, 3 is cubic (default: %(default)s)")
    add("-tm", "--threshold-min", type=float, default=default.threshold_min,
        help="leave out what is darker in the stretched picture (default: %(default)s)")
    add("-tM", "--threshold-max", type=float, default=default.threshold_max,
        help="leave out what is brighter in the stretched picture; lower it to mask objects "
             "(default: %(default)s)")
    add("-m", "--mask",
        help="XISF mask of the picture's height and width, 1 channel or as many: 1 = use, "
             "0 = leave out, between = weight (default: none)")
    add("-i", "--initializer", choices=("random", "grid"), default=default.initializer,
        metavar="INITIALIZER",
        help="where the control points start, random or grid (default: %(default)s)")
    add("-e", "--epochs", type=int, default=default.epochs,
        help="most epochs; the fit stops before when nothing improves (default: %(default)s)")
    add("-a", "--alpha", type=float, default=default.alpha,
        help="weight of the penalties on a sky that is negative or brighter than the picture "
             "(default: %(default)g)")
    add("-B", dest="batch", metavar="B", type=int, default=default.batch,
        help=f"batch size: independent samples of {SAMPLE_PIXELS} pixels that the fit sees "
             "(default: %(default)s)")
    add("-lr", dest="learning_rate", metavar="LR", type=float, default=default.learning_rate,
        help="learning rate at the start (default: %(default)s)")

    add = parser.add_argument_group("more").add_argument
    add("--auto", action="store_true",
        help="find objects and leave them out; what you give by hand stays (default: off)")
    add("--smoothing", type=_smoothing, default=None, metavar="{auto,NUMBER}",
        help="stiffness of the surface: 0 goes through every control point, 10 is nearly a plane "
             "(default: auto, chosen from the picture)")
    add("--seed", type=int, default=default.seed,
        help="of all random numbers; the same command gives the same pictures "
             "(default: %(default)s)")
    add("--save-mask", action="store_true",
        help="also write <name>_mask.xisf, the mask in force, to edit and give back with -m "
             "(default: off)")
    add("--figures", choices=("auto", "show", "save", "none"), default="auto",
        help="result figure or preview: show it in a window or notebook, save it as PNG, or "
             "neither; auto shows it where it can, and saves the preview where it cannot "
             "(default: %(default)s)")
    add("--animate", action="store_true",
        help="also write <name>_optimization.gif: how the surface settles (default: off)")
    add("--quiet", action="store_true", help="print warnings and errors only (default: off)")
    add("--version", action="version", version=f"bgoptimizer {VERSION}")
    return parser


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Settings]:
    """Options and settings, or exit 2 with a sentence."""
    parser = build_parser()
    options = parser.parse_args(argv)
    for flag in ("save_mask", "animate"):
        if options.preview and getattr(options, flag):
            parser.error(f"--{flag.replace('_', '-')} needs a fit and --preview does none; leave one of them out")
    try:
        return options, Settings(**{item.name: getattr(options, item.name) for item in fields(Settings)})
    except ValueError as error:
        parser.error(str(error))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Whatever goes wrong is said in one line on stderr."""
    try:
        with _Interrupts() as interrupts:
            _run(*_parse(argv), interrupts)
        return 0
    except SystemExit as stop:  # argparse has said why
        return stop.code or 0
    except KeyboardInterrupt:
        return _fail("interrupted; what was not finished is not there", 130)
    except BgError as error:
        return _fail(str(error))
    except BrokenPipeError:  # whoever read our lines has left; Python would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError:
        return _fail("there is not enough memory; close other programs, crop the picture, or split its channels")
    except OSError as error:
        return _fail(f"{error.filename or 'a file'}: {error.strerror or error}; check the path, the disk, your rights")
    except ImportError as error:
        return _fail(f"{error.name} cannot be imported; install it with: python -m pip install -r requirements.txt")
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        return _fail(f"unexpected {type(error).__name__}: {reason}; this is a bug, please report it with your command")


def _fail(message: str, code: int = 1) -> int:
    print(f"bgoptimizer: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _warn(message: str) -> None:
    print(f"bgoptimizer: warning: {message}", file=sys.stderr)


def _run(options: argparse.Namespace, settings: Settings, interrupts: _Interrupts) -> None:
    """The command, from file to files."""
    started = time.perf_counter()
    with suppress(AttributeError):  # a notebook's, or none; names may hold what the terminal's encoding does not
        sys.stdout.reconfigure(errors="backslashreplace")
    say = _quiet if options.quiet else lambda text: print(text, flush=True)
    paths, where = _check_paths(options), _place_for_pictures(options)
    planes, source = _read(options.input_file, say)
    if options.preview:  # a plain run's smoothing takes a second to choose, and is not shown
        settings = settings if settings.auto else replace(settings, smoothing=0.0)
    else:
        _check_room(planes, options)
        _start_importing()
    prepared, settings = examine(
        planes, settings, None if options.mask is None else _read(options.mask, _quiet)[0], say)
    _report(prepared, settings, say)
    title = os.path.basename(options.input_file).encode("utf-8", "replace").decode().replace("$", r"\$")  # no formula
    if options.preview:
        written, picture = [], paths["preview"]
        draw = functools.partial(draw_preview, prepared=prepared, settings=settings, title=title)
    else:
        fit = _fit(prepared, settings, options.quiet, interrupts, say)
        written = _subtract_and_write(planes, source, prepared, settings, fit, options, paths, say)
        picture = paths["figures"]
        draw = functools.partial(draw_figures, prepared=prepared, settings=settings, fit=fit, title=title)
    if where:
        put_picture(draw, where, picture)
    for path in written + [picture] * (where == "file"):
        say(f"wrote {path}")
    say(f"{time.perf_counter() - started:.1f} s")
    if where == "window":
        from matplotlib import pyplot
        pyplot.show()  # waits until the window is closed


def _fit(prepared: Prepared, settings: Settings, quiet: bool, interrupts: _Interrupts,
         say: Callable[[str], None]) -> Fit:
    """The fit, watched on the terminal, that ends cleanly after Ctrl-C."""
    interrupts.check()
    interrupts.patient = True
    with _progress(settings.epochs, quiet, say) as show:
        fit = fit_sky(prepared, settings, say, lambda epoch, loss: (interrupts.check(), show(epoch, loss)))
    interrupts.patient = False
    interrupts.check()
    say(f"{fit.stopped}; best loss {fit.history[:, 0].min():.4f}")
    return fit


def _subtract_and_write(planes: np.ndarray, source: Source, prepared: Prepared, settings: Settings, fit: Fit,
                        options: argparse.Namespace, paths: dict[str, str], say: Callable[[str], None]) -> list[str]:
    """Take the sky out of `planes` and write what was asked for; returns the paths."""
    sky = full_size_sky(prepared, fit, planes.dtype)
    offsets, below, above = subtract(planes, sky, prepared.median)
    say(gradients(prepared, fit))
    say("offsets: " + ", ".join(map("{} {:.6f}".format, _channel_letters(prepared), offsets)))
    say(f"clipped: {below.sum()} samples at 0, {above.sum()} at 1, of {planes.size}")
    pictures = {"model": (sky, source, "the sky"), "subtracted": (planes, source, "the picture without the sky")}
    if options.save_mask:
        pictures["mask"] = full_mask(prepared, settings), None, "the mask, 1 = sky"
    outputs = {kind: path for kind, path in paths.items() if kind != "figures"}
    history = _history(options, settings, fit, offsets)
    with atomic_outputs(*outputs.values()) as opened:
        files = dict(zip(outputs, opened))
        for kind, (picture, metadata, what) in pictures.items():
            write_xisf(files[kind], picture, metadata, history + [f"bgoptimizer: this is {what}"], options.compress)
        if options.animate:
            write_animation(files["animation"], animation_frames(prepared, fit))
    return list(outputs.values())


def _history(options: argparse.Namespace, settings: Settings, fit: Fit, offsets: np.ndarray) -> list[str]:
    """HISTORY lines: what made this picture, to the last setting."""
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    lines = [f"bgoptimizer {VERSION}, {now}"]
    lines += [f"bgoptimizer: {item.name} = {getattr(settings, item.name)}" for item in fields(settings)]
    lines += [f"bgoptimizer: mask = {os.path.basename(options.mask) if options.mask else None}",
              f"bgoptimizer: control points used = {len(fit.positions)}", f"bgoptimizer: {fit.stopped}"]
    return lines + [f"bgoptimizer: offset of channel {k} = {offset:.9g}" for k, offset in enumerate(offsets)]


class _Interrupts:
    """Ctrl-C that cannot get lost: what is being imported may swallow it, and TensorFlow may crash by it."""

    def __init__(self):
        self.asked, self.patient, self.before = False, False, None

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # signals reach no other
            self.before = signal.signal(signal.SIGINT, self._listen)
        return self

    def _listen(self, *_):
        self.asked = True
        if not self.patient:
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raise what was swallowed, or held back while `patient`."""
        if self.asked:
            raise KeyboardInterrupt

    def __exit__(self, *_):
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)


def _check_paths(options: argparse.Namespace) -> dict[str, str]:
    """Try all of the paths that may fail, so that nobody waits for what cannot be saved.

    Returns:
        What the run may write -> its path.
    """
    given = [options.input_file]
    if options.mask is not None:
        given.append(options.mask)
    for path in given:
        if not os.path.exists(path):
            raise BgError(f"{path or 'a file without a name'} does not exist; check the name")
        if os.path.isdir(path):
            raise BgError(f"{path} is a folder; name an XISF file in it")
    folder = options.output_path
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise BgError(f"{folder} is a file, not a folder; name a folder for the outputs")
    never_written = options.preview and options.figures in ("show", "none")
    if os.path.isdir(folder) or not never_written:
        try:
            os.makedirs(folder, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            reason = error.strerror
            raise BgError(f"cannot write to {folder}: {reason}; choose another folder") from None
    paths = _output_paths(options)
    for path in filter(os.path.exists, paths.values()):
        for kept in given:
            if os.path.samefile(path, kept):
                raise BgError(f"{path} would be overwritten, and you gave it to read; "
                              "choose another output folder")
    return paths


def _output_paths(options):
    """Return the paths of what the run may write: kind -> path."""
    if options.preview:
        endings = {"preview": "preview.png"}
    else:
        endings = {"model": "bgModel.xisf", "subtracted": "bgSubtracted.xisf"}
        if options.save_mask:
            endings["mask"] = "mask.xisf"
        if options.animate:
            endings["animation"] = "optimization.gif"
        endings["figures"] = "figures.png"
    name = os.path.basename(options.input_file)
    stem, _ = os.path.splitext(name)
    start = os.path.join(options.output_path, stem)
    return {kind: f"{start}_{ending}" for kind, ending in endings.items()}


def _place_for_pictures(options: argparse.Namespace) -> str | None:
    """Return where the preview or the figures go: "notebook", "window", "file", or None."""
    if options.figures == "none":
        return None
    if options.figures == "save":
        return "file"
    kind = display_kind()
    if kind is not None:
        return kind
    if options.figures == "show":
        raise BgError(
            "there is neither a notebook nor a window to show figures in; use --figures save")
    return "file" if options.preview else None


def _start_importing() -> None:
    """Import TensorFlow beside stretching and reducing; who needs it waits for this import, or sees it fail again."""
    if sys.stderr is sys.__stderr__ is not None:  # our own lines take a way of their own, past what is silenced below
        sys.stderr = open(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")
    threading.Thread(target=_import_silently, daemon=True).start()


def _import_silently() -> None:
    """TensorFlow's C++ greets with a page of log lines, and again at the first operation; no setting silences all."""
    with suppress(Exception):  # there is no stderr, no TensorFlow, or a GPU that does not start
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        try:
            import_tensorflow().zeros(1)
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(nowhere)


def _read(path: str, say: Callable[[str], None]) -> tuple[np.ndarray, Source]:
    picture = read_xisf(path)
    for text in picture.warnings:
        _warn(f"{path} {text}")
    count, height, width = picture.planes.shape
    say(f"{path}: {width} x {height}, {'gray' if count == 1 else 'RGB'}, {picture.planes.dtype}")
    return picture.planes, picture.source


def _check_room(planes: np.ndarray, options: argparse.Namespace) -> None:
    """Refuse if the outputs do not fit on the disk; warn if the memory may not suffice.

    A system that is short of memory ends the run without a word.
    """
    outputs = 3 if options.save_mask else 2
    needed = outputs * planes.nbytes
    free = shutil.disk_usage(options.output_path).free
    if free < needed and not options.compress:
        raise BgError(
            f"{options.output_path} has {free / 1e6:.0f} MB free and the outputs need "
            f"{needed / 1e6:.0f} MB; free space, choose another folder, or try --compress")
    tensorflow = 0.6e9  # bytes
    needed = tensorflow + 2 * planes[0].nbytes  # two planes while the outputs are written
    free = _free_memory()
    if free < needed:
        _warn(f"about {needed / 1e9:.1f} GB more memory is needed and {free / 1e9:.1f} GB are "
              "free; if the run dies, close other programs, or crop the picture or split its "
              "channels")


def _free_memory():
    """Return the bytes of memory that are free; without end where only Linux could tell."""
    free = math.inf
    with suppress(OSError, ValueError, LookupError):
        with open("/proc/meminfo") as file:
            table = dict(line.split(":") for line in file)
        kibibytes, _ = table["MemAvailable"].split()
        free = 1024 * int(kibibytes)
        # A container may have less
        with open("/sys/fs/cgroup/memory.max") as file:
            limit = int(file.read())
        with open("/sys/fs/cgroup/memory.current") as file:
            used = int(file.read())
        free = min(free, limit - used)
    return free


def _report(prepared: Prepared, settings: Settings, say: Callable[[str], None]) -> None:
    """Numbers to act on before the fit."""
    part, reduced, quantile = shares(prepared), prepared.image.shape, settings.delinearization_quantile
    say(f"reduced to {reduced[1]} x {reduced[0]}: {part['used']:.1%} used, {part['masked']:.1%} masked, "
        f"{part['missing']:.1%} missing; {part['clipped']:.1%} clipped at 1 by the stretch (-dq {quantile:g})")
    for k, letter in enumerate(_channel_letters(prepared)):
        low, scale = prepared.stretch.pedestal[k], prepared.stretch.scale[k]
        say(f"  {letter}: minimum {low:.6f}, median {prepared.median[k]:.6f}, clipped above {low + scale:.6f}")
    share = blown_out(thinned(prepared)).mean()
    if share:
        _warn(f"the stretch clips a smooth part of the picture ({share:.1%} of the frame), most likely sky, "
              f"and the fit loses it there; raise -dq (now {quantile:g})")


@contextmanager
def _progress(epochs: int, quiet: bool, say: Callable) -> Iterator[Callable[[int, float], None]]:
    """Yield a function to call after each epoch, with its number and its loss.

    On a terminal it moves a bar. Elsewhere it says every 100th epoch.
    """
    terminal = sys.stderr and sys.stderr.isatty()  # None if the caller has closed it
    if quiet or not terminal:
        def say_epoch(epoch, loss):
            if epoch % 100 == 0:
                say(f"epoch {epoch:4d}  loss {loss:.4f}")
        yield say_epoch
        return

    from tqdm import tqdm
    with tqdm(total=epochs, desc="fitting", unit="epoch", leave=False) as bar:
        def move_bar(epoch, loss):
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update()
        yield move_bar


if __name__ == "__main__":
    sys.exit(main())
