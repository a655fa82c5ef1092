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
  bgoptimizer.py m31.fits out --format tiff FITS and TIFF too; m31_bgModel.tif ...
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
import logging
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
    correction: str = "subtract"  # or "divide", for what dims the light instead of adding to it
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
            ("--correction", self.correction in ("subtract", "divide"), "subtract or divide"),
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


class Unit(NamedTuple):
    """A picture's own unit: its values are samples * scale + offset."""
    scale: float = 1.0
    offset: float = 0.0


@dataclass
class Picture:
    """An image in [0, 1]. Samples that are exactly 0 or not finite are missing."""
    planes: np.ndarray  # (c, h, w), c = 1 or 3; float32, or float64 if the file holds Float64
    source: Source  # or a FitsSource, or a TiffSource
    warnings: list  # of str, one line each
    unit: Unit = Unit()
    format: str = "xisf"  # a name in FORMATS
    note: str = ""  # what the samples were, in words


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


# --------------------------------------------------------------------------------------------------
# Pictures on disk: FITS and TIFF, and the table of formats
#
# astropy understands the values in FITS headers and compresses, tifffile does TIFF. Both trust what
# a file says about its size, so that is checked here before they take memory for it.
# FITS: https://fits.gsfc.nasa.gov/fits_standard.html. Astro-TIFF, a FITS header in the description
# of a TIFF file: https://astro-tiff.sourceforge.io.
# --------------------------------------------------------------------------------------------------

FITS_BLOCK = 2880
"""Bytes: headers and data of FITS files fill whole blocks."""

FITS_CARD = 80
"""Characters of a card, a line of a FITS header."""

MAX_FITS_HEADERS = 1 << 22
"""Bytes of all headers in a FITS file together; 52 thousand cards. Real ones are far below."""

MAX_TILES = 1_000_000
"""Tiles or strips of a picture, each of which takes a call to decompress. Real ones hold a row or
more."""

HARMLESS_TILE = 1 << 28
"""Bytes that a tile may expand to without a closer look."""

GZIP_START, GZIP_WINDOW = b"\x1f\x8b", 31  # how gzip data begin, and what zlib calls them

MAX_TIFF_TAGS = 1000
"""Tags of a TIFF file's first directory. Real ones have some twenty."""

LARGEST_VALUE = 1e30
"""Floating point beyond it is no light: it is damage, or means something else."""

END_CARD = "END".ljust(FITS_CARD)
FITS_TYPES = {8: "u1", 16: "i2", 32: "i4", 64: "i8", -32: "f4", -64: "f8"}  # by BITPIX
FITS_NAME = re.compile("[A-Z0-9_-]{1,8}")
FITS_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([EDed][-+]?\d+)?|[TF]")
FITS_TEXT_NAMES = ("COMMENT", "HISTORY", "")  # cards without a value
# Keywords that every writer makes anew, and those of the table that a compressed picture stands in
FITS_STRUCTURE = re.compile(
    r"SIMPLE|XTENSION|EXTEND|BITPIX|NAXIS\d*|PCOUNT|GCOUNT|BSCALE|BZERO|BLANK|END|GROUPS")
FITS_COMPRESSION = re.compile(
    r"TFIELDS|THEAP|T(TYPE|FORM|UNIT|SCAL|ZERO|NULL|DISP|DIM)\d+|Z(IMAGE|TENSION|BITPIX|PCOUNT"
    r"|GCOUNT|SIMPLE|EXTEND|BLOCKED|CMPTYPE|QUANTIZ|DITHER0|BLANK|MASKCMP|HECKSUM|DATASUM|SCALE"
    r"|ZERO|(NAXIS|TILE|NAME|VAL)\d*)")

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
TIFF_EXPANSION = {1: 1, 5: 4096, 8: 1032, 32946: 1032, 32773: 64, 50000: 1 << 16}
"""The compressions that are read (none, LZW, deflate, PackBits, zstd), and how many bytes one byte
can stand for."""

TIFF_ICC = 34675  # the tag
TIFF_BYTES = 7  # its type
TIFF_GRAY, TIFF_RGB = 1, 2
TIFF_INCH = 2
TIFF_RESOLUTION_UNITS = 1, 2, 3  # none, inch, centimeter
TIFF_KEPT = {271: "s", 272: "s", 306: "s", 315: "s", 33432: "s", 274: "H", 700: "B"}
"""Tags that are carried over, and their types: camera, date, author, rights, orientation, XMP."""


@dataclass
class FitsSource:
    """What a FITS file has besides its pixels, in the bytes that stood in it."""
    cards: list  # of str, 80 characters each, without those that the pixels decide
    before: bytes = b""  # HDUs in front of the picture; empty if it is the first
    after: bytes = b""  # HDUs behind it
    checksum: bool = False  # True if the picture had a DATASUM or CHECKSUM
    icc: bytes = b""  # color profile; it also stands in one of the HDUs


@dataclass
class TiffSource:
    """What a TIFF file has besides its pixels."""
    description: bytes = b""
    icc: bytes = b""  # color profile
    resolution: tuple = ()  # horizontal and vertical, and the unit
    tags: tuple = ()  # others that are kept, as tifffile's writer takes them


class Format(NamedTuple):
    """A kind of file."""
    ending: str
    read: Callable  # path -> Picture
    write: Callable  # file, planes, source, history, compress, unit


def picture_format(path):
    """Return the name in FORMATS of a file's format, by its content; None for another one."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a FIFO would wait forever
        return None
    with open(path, "rb") as file:
        start = file.read(16)
    if start.startswith(b"XISF"):
        return "xisf"
    if start.startswith(b"SIMPLE  ="):
        return "fits"
    return "tiff" if start[:4] in TIFF_STARTS else None


def read_picture(path):
    """Read the first picture of an XISF, FITS, or TIFF file, whatever its name ends with.

    Unsigned integers are scaled from their full range to [0, 1], and floats that lie in [0, 1] are
    taken as they are. Anything else, such as ADU or electrons, is brought into [0, 1] for the work;
    `Picture.unit` tells the writers the way back.

    Returns a Picture.
    Raises BgError if the file is damaged, hostile, or of a kind that is not read.
    """
    with _refusals(path):
        name = picture_format(path)
    if name is None:
        raise BgError(f"{path} is not an XISF, FITS, or TIFF file; "
                      "save the picture as one of them")
    picture = FORMATS[name].read(path)
    picture.format = name
    return picture


def picture_stem(path):
    """Return a file's name without folder and without the endings of pictures."""
    name = os.path.basename(path)
    stem = re.sub(r"(?i)(?<=.)(\.(xisf|fits?|fts|fz|tiff?))+$", "", name)
    return stem if stem != name else os.path.splitext(name)[0]


@contextmanager
def _refusals(path):
    """Turn all that goes wrong while a file is read into a BgError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries' own, on headers not quite right
            yield
    except BgError:
        raise
    except _Unreadable as error:
        raise BgError(f"{path} {error}; {error.advice}") from None
    except MemoryError:
        raise BgError(f"{path} needs more memory than there is; "
                      "close other programs or crop the picture") from None
    except OSError as error:
        reason = error.strerror or error
        raise BgError(f"{path} cannot be read: {reason}; check the path and the disk") from None
    except ImportError as error:
        raise BgError(f"{path} cannot be read without {error.name}; install it with: "
                      "python -m pip install -r requirements.txt") from None
    except Exception as error:  # the libraries raise anything on damaged files
        reason = " ".join(str(error).split())[:100]
        raise BgError(f"{path} is damaged, or of a kind that is not read ({reason}); "
                      "copy or save it again") from None


# What the formats share: units, and metadata that they agree on

def _to_unit_range(stored, step=1.0, zero=0.0, blank=None):
    """Bring samples as a file has them into [0, 1].

    Args:
        stored: (c, h, w) of any type of number.
        step, zero: what they mean is stored * step + zero.
        blank: the integer that means "missing".

    Returns planes (c, h, w) that are float64 if `stored` is, else float32; the Unit; and a sentence
    on it.
    """
    planes = np.empty(stored.shape, "f8" if stored.dtype.itemsize == 8 and stored.dtype.kind == "f"
                      else "f4")
    white = _white(stored.dtype, step, zero)
    calculated = planes.dtype if stored.dtype.kind == "f" else np.float64
    lowest, highest = math.inf, -math.inf
    for plane, target in zip(stored, planes):
        for rows in _strips(*plane.shape):
            raw = plane[rows]
            values = raw.astype(calculated)
            if (step, zero) != (1, 0):
                values = values * step + zero
            if white:
                values /= white
            if blank is not None:
                values[raw == blank] = np.nan
            target[rows] = values
            low, high = _finite_range(values)
            lowest = min(lowest, low)
            highest = max(highest, high)
    if white:
        return planes, Unit(), f"integers, {white} = white"
    if lowest >= 0 and highest <= 1 or lowest > highest:
        return planes, Unit(), "from 0 to 1"
    largest = max(abs(lowest), abs(highest))
    _require(largest < LARGEST_VALUE, f"has values up to {largest:.3g}, which cannot be light",
             "look at it in another program")
    unit = _own_unit(planes, lowest, highest)
    note = (f"from {lowest:.6g} to {highest:.6g}, written back in this unit; "
            f"the levels below are (value {-unit.offset:+.6g}) / {unit.scale:g}")
    return planes, unit, note


def _white(dtype, step, zero):
    """Return the largest value of unsigned integers, and None for other numbers.

    FITS has no unsigned integers of more than 8 bits: it stores signed ones and adds half the
    range.
    """
    if dtype.kind not in "iu" or step != 1:
        return None
    numbers_of = np.iinfo(dtype)
    return int(numbers_of.max + zero) if numbers_of.min + zero == 0 else None


def _finite_range(values):
    """Return the smallest and the largest of the finite values; inf and -inf without any."""
    low, high = values.min(), values.max()
    if not (math.isfinite(low) and math.isfinite(high)):
        finite = values[np.isfinite(values)]
        if not finite.size:
            return math.inf, -math.inf
        low, high = finite.min(), finite.max()
    return float(low), float(high)


def _own_unit(planes, lowest, highest):
    """Scale planes in their own unit into [0, 1], in place, and return the Unit.

    Room is left where the corrected picture may need it: above the brightest star, and below the
    noise of the darkest sky, so that negative values stay what they are.
    """
    offset = 0.0
    if lowest < 0:
        every = max(1, planes[0].shape[0] * planes[0].shape[1] >> 20)
        sample = planes.reshape(len(planes), -1)[:, ::every | 1]
        sample = sample[np.isfinite(sample) & (sample != 0)]
        middle, bright = np.quantile(sample, (0.5, 0.999)) if sample.size else (lowest, highest)
        room = max(2 * (middle - lowest), bright - middle, -lowest / 1000)
        offset = float(lowest - room)
    # A power of two: without an offset, all digits stay
    scale = 2.0 ** (math.ceil(math.log2(highest - offset)) + 1)
    for plane in planes:
        for rows in _strips(*plane.shape):
            values = plane[rows]
            missing = values == 0
            values = (values - offset) / scale
            values[missing] = 0
            plane[rows] = values
    return Unit(scale, offset)


def array_unit(planes):
    """Bring planes outside [0, 1] into it, in place, and return their Unit. Raises BgError."""
    ranges = [_finite_range(plane) for plane in planes]
    lowest = min(low for low, _ in ranges)
    highest = max(high for _, high in ranges)
    if lowest >= 0 and highest <= 1 or lowest > highest:
        return Unit()
    if max(abs(lowest), abs(highest)) >= LARGEST_VALUE:
        raise BgError(f"the image has values from {lowest:.3g} to {highest:.3g}, which cannot be "
                      "light; look at it, and at what was done to it")
    return _own_unit(planes, lowest, highest)


def mask_weights(planes):
    """Scale the weights of a mask to [0, 1], if they are not yet, so that the largest is 1.

    So 255 means "use" in floats, and 1 does in integers, whose full range is far larger.
    """
    largest = _finite_range(planes)[1]
    if largest > 1 or 0 < largest < 1 / 254:  # as floats, 1 / 255 is a little more than that
        return planes / planes.dtype.type(largest)
    return planes


def _in_own_unit(plane, unit):
    """Return a plane's samples in the unit of their picture. Missing ones stay 0."""
    if unit == Unit():
        return plane
    values = plane * plane.dtype.type(unit.scale) + plane.dtype.type(unit.offset)
    values[plane == 0] = 0
    return values


@contextmanager
def _lenient_fits():
    """Give astropy's FITS module, which keeps to itself what it thinks of a header."""
    from astropy.io import fits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield fits


def _card(name, value, comment=""):
    """Return a FITS card, or several for a long text, as strings of 80 characters."""
    with _lenient_fits() as fits:  # long comments are cut
        return _split_cards(str(fits.Card(name, value, comment)))


def _split_cards(text):
    return [text[start:start + FITS_CARD] for start in range(0, len(text), FITS_CARD)]


def _printable(text):
    """Return what a FITS header can hold of a text."""
    return "".join(letter if " " <= letter <= "~" else "?" for letter in text)


def _text_cards(name, text):
    """Return cards without a value, such as HISTORY, that hold a text."""
    lines = textwrap.wrap(_printable(text), HISTORY_COLUMNS) or [""]
    return [f"{name:8}{line}".ljust(FITS_CARD) for line in lines]


def _cards_of_xisf(source):
    """Return the FITSKeyword elements of an XISF file as FITS cards."""
    cards = []
    for element in source.root.findall("Image/FITSKeyword"):
        name = _printable(element.get("name", "").strip().upper())
        value = element.get("value", "").strip()
        comment = _printable(element.get("comment", ""))
        if FITS_STRUCTURE.fullmatch(name) or name == "CONTINUE":
            continue
        if name in FITS_TEXT_NAMES:
            cards += _text_cards(name, comment or value)
        elif FITS_NAME.fullmatch(name) and FITS_NUMBER.fullmatch(value):
            cards.append(f"{name:8}= {value:>20} / {comment}"[:FITS_CARD].ljust(FITS_CARD))
        elif value.startswith("'") or value:
            text = value[1:-1].replace("''", "'").rstrip() if value.startswith("'") else value
            with suppress(ValueError):  # a name that no card can have
                cards += _card(name, _printable(text), comment)
        else:
            cards.append(f"{name:8}=".ljust(31) + f" / {comment}"[:49].ljust(49))
    return cards


def _keywords(cards):
    """Return FITS cards as attributes of XISF's FITSKeyword elements."""
    keywords = []
    with _lenient_fits() as fits:
        for card in fits.Header.fromstring("".join(cards)).cards:
            with suppress(ValueError, fits.VerifyError):  # a malformed card is lost
                keywords.append(_keyword(card))
    return keywords


def _keyword(card):
    """Return one of astropy's cards as attributes of a FITSKeyword element."""
    name, value = card.keyword, card.value
    if name in FITS_TEXT_NAMES:
        return {"name": name, "value": "", "comment": str(value)}
    text = card.image.partition("=")[2].partition("/")[0].strip()  # all digits, as they stand there
    if isinstance(value, str):
        text = "'" + value.replace("'", "''") + "'"
    return {"name": name, "value": text, "comment": card.comment}


def _icc_of_xisf(source):
    """Return the color profile of an XISF file, b"" without one."""
    element = source.root.find("Image/ICCProfile")
    if element is None:
        return b""
    location = element.get("location", "")
    attributes = element.attrib
    data = source.blocks.get(location)
    if data is None:
        encoding = location.partition(":")[2]
        if location.startswith("embedded"):
            element = element.find("Data")
            encoding = element.get("encoding", "base64")
            attributes = {**attributes, **element.attrib}
        data = _decode_text(element.text, encoding)
    block = _Block(attributes, len(data), data=bytes(data))
    codec, size, item = _read_compression(block)
    if codec:
        data = _decompress(block, None, codec, size)
        data = _unshuffle(data, item) if item > 1 else data
    return bytes(data)


def _shared_metadata(source):
    """Return what all formats can hold of a file's metadata: FITS cards, and the color profile."""
    if isinstance(source, Source):
        icc = b""
        with suppress(_Unreadable, AttributeError):  # a damaged profile is lost, not the picture
            icc = _icc_of_xisf(source)
        return _cards_of_xisf(source), icc
    if isinstance(source, FitsSource):
        return source.cards, source.icc
    return [], source.icc if source else b""


# FITS

def read_fits(path):
    """Read the first picture of a FITS file, which may be compressed (.fz); see `read_picture`.

    Planes (3, h, w) and (h, w, 3) are color, and lone axes count for nothing. The rows stay in the
    file's order: the sky does not care which end is up.
    """
    with _refusals(path), open(path, "rb") as file:
        notes = []
        parts = _fits_parts(file, notes)
        pictures = [number for number, part in enumerate(parts) if _fits_shape(part.header)]
        _require(pictures, "holds no picture of two or three axes", "name another file")
        if len(pictures) > 1:
            notes.append(f"holds {len(pictures)} images: only the first is used")
        number = pictures[0]
        header = parts[number].header
        if header.get("ZIMAGE") is True:
            stored = _decompressed_fits(file, number, header)
        else:
            dtype = ">" + FITS_TYPES[header["BITPIX"]]
            shape = tuple(_fits_shape(header))
            stored = np.memmap(file, dtype, "r", parts[number].data, shape)
        stored = _color_first(stored)
        step, zero = header.get("BSCALE", 1), header.get("BZERO", 0)
        numeric = isinstance(step, (int, float)) and isinstance(zero, (int, float))
        _require(numeric and math.isfinite(step) and math.isfinite(zero) and step,
                 f"has the impossible BSCALE {step!r} or BZERO {zero!r}")
        blank = header.get("BLANK") if stored.dtype.kind in "iu" else None
        planes, unit, note = _to_unit_range(stored, step, zero, blank)
        if len(planes) == 1 and ("BAYERPAT" in header or "COLORTYP" in header):
            notes.append("seems to be a color filter mosaic: if it is, debayer it first")
        source = _fits_source(file, parts, number, notes)
    return Picture(planes, source, notes, unit, note=note)


class _FitsPart(NamedTuple):
    """An HDU: a header and its data."""
    header: object  # astropy's
    cards: list
    start: int  # byte at which the header starts
    data: int  # byte at which the data start
    end: int  # byte behind the data and their padding


def _fits_parts(file, notes):
    """Return a file's HDUs; what cannot be understood behind the first picture is left out."""
    size = os.fstat(file.fileno()).st_size
    parts = []
    position = room = 0
    found = False
    while position < size:
        try:
            part, room = _fits_part(file, position, size, room)
        except Exception:
            if not found:
                raise
            notes.append(f"has {size - position} bytes at its end that are not FITS: not kept")
            break
        parts.append(part)
        found = found or bool(_fits_shape(part.header))
        position = part.end
    return parts


def _fits_part(file, position, size, used):
    """Return the HDU at a position, and the bytes of all headers until its end."""
    from astropy.io import fits
    file.seek(position)
    cards = []
    while END_CARD not in cards[-FITS_BLOCK // FITS_CARD:]:
        block = file.read(FITS_BLOCK)
        used += len(block)
        _require(len(block) == FITS_BLOCK, "is cut short: a header has no end")
        _require(used <= MAX_FITS_HEADERS, "has a header too large to be true")
        cards += _split_cards(block.decode("latin-1"))
    start_of_data = file.tell()
    cards = cards[:cards.index(END_CARD)]
    header = fits.Header.fromstring("".join(cards))
    length = _fits_data_size(header)
    end = start_of_data + length
    _require(end <= size, f"is cut short: its data end at byte {end} of {size}")
    padded = start_of_data + FITS_BLOCK * math.ceil(length / FITS_BLOCK)
    return _FitsPart(header, cards, position, start_of_data, padded), used


def _fits_number(header, name, *default):
    """Return a whole number, not negative, from a header."""
    value = header.get(name, *default)
    whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48
    _require(whole, f"has the impossible {name} {value!r}")
    return value


def _fits_axes(header, prefix=""):
    """Return the lengths of the axes, the last named first, as NumPy has them."""
    count = _fits_number(header, prefix + "NAXIS")
    _require(count <= 999, f"has the impossible NAXIS {count}")
    return [_fits_number(header, f"{prefix}NAXIS{axis}") for axis in range(count, 0, -1)]


def _fits_data_size(header):
    """Return how many bytes the data behind a header take, without their padding."""
    axes = _fits_axes(header)
    bits = header.get("BITPIX")
    _require(bits in FITS_TYPES, f"has the impossible BITPIX {bits!r}")
    if axes and axes[-1] == 0 and header.get("GROUPS") is True:
        axes.pop()  # random groups, an old form of tables
    samples = math.prod(axes) if axes else 0
    samples = _fits_number(header, "PCOUNT", 0) + samples
    return samples * _fits_number(header, "GCOUNT", 1) * abs(bits) // 8


def _fits_shape(header):
    """Return the shape of an HDU's picture, without lone axes in front; None if it has none."""
    if header.get("ZIMAGE") is True:
        shape = _fits_axes(header, "Z")
    elif header.get("XTENSION", "IMAGE") == "IMAGE" and not header.get("GROUPS"):
        shape = _fits_axes(header)
    else:
        return None
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    return shape if len(shape) >= 2 and 0 not in shape else None


def _decompressed_fits(file, number, header):
    """Return the samples of a compressed picture, HDU `number`, as they were before that."""
    shape = _fits_shape(header)
    bits = header.get("ZBITPIX")
    _require(bits in FITS_TYPES, f"has the impossible ZBITPIX {bits!r}")
    needed = math.prod(shape) * abs(bits) // 8
    possible = MAX_EXPANSION["zlib"] * _fits_data_size(header)
    tiles = _fits_number(header, "NAXIS2")
    heap = _fits_number(header, "PCOUNT")  # bytes
    _require(needed <= possible and 0 < tiles <= MAX_TILES and heap,
             "claims more data than its compressed block can hold")
    for axis, length in enumerate(_fits_axes(header, "Z")[::-1], 1):
        tile = _fits_number(header, f"ZTILE{axis}", length if axis == 1 else 1)
        _require(0 < tile <= length, f"has the impossible ZTILE{axis} {tile}")
    with _open_fits(file, disable_image_compression=True) as hdus:
        _refuse_gzip_bombs(hdus[number].data, needed)
    with _open_fits(file, do_not_scale_image_data=True) as hdus:
        return hdus[number].data.reshape(shape)


@contextmanager
def _open_fits(file, **options):
    """Let astropy open a file that is open already. It closes what it is given: a duplicate."""
    again = os.fdopen(os.dup(file.fileno()), "rb")
    again.seek(0)
    with _lenient_fits() as fits, fits.open(again, **options) as hdus:
        yield hdus


def _refuse_gzip_bombs(table, most):
    """Refuse a compressed picture if one of its tiles expands to more than `most` bytes.

    astropy expands them without a limit. Most tiles are so small that they can do no harm.
    """
    for column in table.columns.names:
        if column not in ("COMPRESSED_DATA", "GZIP_COMPRESSED_DATA"):
            continue
        for stream in table[column]:
            if len(stream) * MAX_EXPANSION["zlib"] <= HARMLESS_TILE:
                continue
            stream = stream.tobytes()
            if stream.startswith(GZIP_START):
                data = zlib.decompressobj(GZIP_WINDOW).decompress(stream, most + 1)
                _require(len(data) <= most, "has a tile that holds more than the picture")


def _color_first(stored):
    """Return samples as (c, h, w) with 1 or 3 channels, or refuse them."""
    if stored.ndim == 2:
        return stored[None]
    if stored.ndim == 3 and len(stored) == 3:
        return stored
    if stored.ndim == 3 and stored.shape[2] == 3:
        return np.moveaxis(stored, 2, 0)
    shape = " x ".join(map(str, stored.shape[::-1][:8]))
    raise _Unreadable(f"is a picture of {shape}, neither gray nor RGB",
                      "save its planes as pictures of their own")


def _fits_source(file, parts, number, notes):
    """Return what the outputs keep of a file besides the samples of HDU `number`."""
    part = parts[number]
    compressed = part.header.get("ZIMAGE") is True
    cards, untrue = [], []
    for card in part.cards:
        name = card[:8].rstrip()
        made_anew = FITS_STRUCTURE.fullmatch(name) or name in ("DATASUM", "CHECKSUM")
        if compressed:
            made_anew = (made_anew or FITS_COMPRESSION.fullmatch(name)
                         or card.startswith("EXTNAME = 'COMPRESSED_IMAGE'"))
        if made_anew:
            continue
        if STALE_PIXEL_METADATA.match(f"FITSKeyword {name}"):
            untrue.append(name)
        else:
            cards.append(card)
    if untrue:
        notes.append(f"had {', '.join(untrue)[:200]}: "
                     "not kept, because the new pixels make them untrue")
    file.seek(0)
    before = file.read(part.start)
    first = [card[:8].rstrip() for card in parts[0].cards]
    says_nothing = all(FITS_STRUCTURE.fullmatch(name) or name in FITS_TEXT_NAMES for name in first)
    if compressed and number == 1 and says_nothing:
        before = b""  # it is there because a compressed picture cannot be the first
    file.seek(part.end)
    after = file.read(parts[-1].end - part.end)
    icc = b""
    for other in parts:
        if str(other.header.get("EXTNAME")).lower() == "iccprofile":
            file.seek(other.data)
            icc = file.read(_fits_data_size(other.header))
    checksum = "DATASUM" in part.header or "CHECKSUM" in part.header
    return FitsSource(cards, before, _padded(after), checksum, icc)


def _padded(data, filling=b"\0"):
    return data + filling * (-len(data) % FITS_BLOCK)


def _fits_header(cards):
    """Return the bytes of a header."""
    return _padded("".join([*cards, END_CARD]).encode("latin-1"), b" ")


def _fits_shape_cards(shape, bits, first):
    """Return the cards that tell what the data are; `first`: of the first HDU."""
    axes = shape[::-1]
    cards = _card("SIMPLE", True) if first else _card("XTENSION", "IMAGE")
    cards += _card("BITPIX", bits) + _card("NAXIS", len(axes))
    for number, length in enumerate(axes, 1):
        cards += _card(f"NAXIS{number}", length)
    if first:
        return cards + _card("EXTEND", True)
    return cards + _card("PCOUNT", 0) + _card("GCOUNT", 1)


def _as_fits_source(source):
    """Return a FitsSource that holds what FITS can hold of another one."""
    if isinstance(source, FitsSource):
        return source
    cards, icc = _shared_metadata(source)
    after = b""
    if icc:
        header = _fits_shape_cards((len(icc),), 8, first=False) + _card("EXTNAME", "ICCProfile")
        after = _fits_header(header) + _padded(icc)
    return FitsSource(cards, after=after, icc=icc)


def write_fits(file, planes, source=None, history=(), compress=False, unit=None):
    """Write a picture as FITS; the arguments are those of `write_xisf`, and its Unit.

    All cards of a FITS source are written as they stood there, and its other HDUs too. `compress`
    makes a compressed image (GZIP_2, nothing is lost), with the ending .fits all the same.
    """
    unit = unit or Unit()
    source = _as_fits_source(source)
    channels, *size = planes.shape
    shape = planes.shape if channels > 1 else tuple(size)
    cards = source.cards + [card for line in history for card in _text_cards("HISTORY", line)]
    file.write(source.before)
    if compress:
        file.write(_compressed_fits(planes, shape, cards, source, unit))
        file.write(source.after)
        return
    stored = planes.dtype.newbyteorder(">")
    structure = _fits_shape_cards(shape, -8 * stored.itemsize, first=not source.before)
    cards = structure + cards
    start = file.tell()
    blank = _card("DATASUM", "0") + _card("CHECKSUM", "0" * 16) if source.checksum else []
    file.write(_fits_header(cards + blank))
    total = 0
    for plane in planes:
        for rows in _strips(*plane.shape):
            samples = np.ascontiguousarray(_in_own_unit(plane[rows], unit), stored)
            if source.checksum:
                total = _fits_sum(samples, total)
            file.write(samples)
        del plane  # before the next one is made
    file.write(bytes(-math.prod(shape) * stored.itemsize % FITS_BLOCK))
    file.write(source.after)
    if source.checksum:
        sum_card = _card("DATASUM", str(total))
        header = _fits_header(cards + sum_card + _card("CHECKSUM", "0" * 16))
        rest = _fits_sum(np.frombuffer(header, np.uint8), total) ^ 0xFFFFFFFF
        file.seek(start)
        file.write(_fits_header(cards + sum_card + _card("CHECKSUM", _fits_checksum(rest))))


def _fits_sum(data, total):
    """Add data to the ones' complement sum of 32-bit words that FITS takes as a checksum."""
    words = data.reshape(-1).view(">u4")
    total += int(words.sum(dtype=np.uint64))
    while total >> 32:
        total = (total & 0xFFFFFFFF) + (total >> 32)
    return total


def _fits_checksum(value):
    """Return a 32-bit number as the 16 letters of CHECKSUM, as appendix J of the standard says."""
    punctuation = set(range(0x3A, 0x41)) | set(range(0x5B, 0x61))
    letters = bytearray(16)
    for number, byte in enumerate(value.to_bytes(4, "big")):
        quotient, rest = divmod(byte, 4)
        column = [quotient + rest + 48, quotient + 48, quotient + 48, quotient + 48]
        while punctuation.intersection(column):
            for left in (0, 2):
                if punctuation.intersection(column[left:left + 2]):
                    column[left] += 1
                    column[left + 1] -= 1
        letters[number::4] = bytes(column)
    return (letters[-1:] + letters[:-1]).decode()


def _compressed_fits(planes, shape, cards, source, unit):
    """Return the bytes of a compressed picture, with an empty HDU in front where one is needed."""
    data = np.stack([_in_own_unit(plane, unit) for plane in planes]).reshape(shape)
    made = io.BytesIO()
    made.close = lambda: None  # astropy closes what it wrote
    with _lenient_fits() as fits:
        header = fits.Header()
        for card in fits.Header.fromstring("".join(cards)).cards:
            with suppress(ValueError, fits.VerifyError):  # astropy writes no malformed card
                card.verify("exception")
                str(card).encode("ascii")
                header.append(card)
        picture = fits.CompImageHDU(
            data, header, name=header.get("EXTNAME"), compression_type="GZIP_2", quantize_level=0)
        hdus = fits.HDUList([fits.PrimaryHDU(), picture])
        hdus.writeto(made, checksum=source.checksum)
    written = made.getbuffer()
    return written[FITS_BLOCK:] if source.before else written


# TIFF

def read_tiff(path):
    """Read the first picture of a TIFF file; see `read_picture`."""
    with _refusals(path):
        import tifffile
        logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it would print what it repairs
        with open(path, "rb") as file:
            _check_tiff_directory(file)
        with tifffile.TiffFile(path, _multifile=False) as tiff:
            page = tiff.pages[0]
            notes = []
            with suppress(IndexError, tifffile.TiffFileError):
                if tiff.pages[1]:
                    notes.append("holds several images: only the first is used and kept")
            colors = _check_tiff_page(page, os.path.getsize(path))
            if page.samplesperpixel > colors:
                notes.append(f"has {page.samplesperpixel - colors} alpha channel(s): dropped")
            if page.is_memmappable:
                dtype = page.dtype.newbyteorder(tiff.byteorder)
                samples = np.memmap(path, dtype, "r", page.dataoffsets[0], page.shape)
            else:
                samples = page.asarray()
            samples = samples.reshape(page.shaped)  # (planes, 1, h, w, samples together)
            if len(samples) > 1:
                stored = samples[:colors, 0, :, :, 0]
            else:
                stored = np.moveaxis(samples[0, 0], 2, 0)[:colors]
            planes, unit, note = _to_unit_range(stored)
            source = _tiff_source(page)
    return Picture(planes, source, notes, unit, note=note)


def _check_tiff_directory(file):
    """Refuse a TIFF file whose first directory claims more than the file can hold."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(16)
    order = "little" if start[:2] == b"II" else "big"
    big = 43 in start[2:4]
    word = 8 if big else 4  # bytes of a position
    position = int.from_bytes(start[8:16] if big else start[4:8], order)
    _require(8 <= position < size, "is cut short: its directory is missing")
    file.seek(position)
    count = int.from_bytes(file.read(8 if big else 2), order)
    _require(0 < count <= MAX_TIFF_TAGS, f"has a directory of {count} tags")
    entries = file.read(count * (4 + 2 * word))
    _require(len(entries) == count * (4 + 2 * word), "is cut short: its directory has no end")
    sizes = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4,
             16: 8, 17: 8, 18: 8}  # bytes, by type of tag
    total = 0
    for entry in range(0, len(entries), 4 + 2 * word):
        kind = int.from_bytes(entries[entry + 2:entry + 4], order)
        values = int.from_bytes(entries[entry + 4:entry + 4 + word], order)
        total += values * sizes.get(kind, 1)
    _require(total <= size + 16 * count, "has tags that claim more than the file holds")


def _check_tiff_page(page, size):
    """Refuse a page that is not read, or that lies about its size; return its number of colors."""
    advice = "save it as 32-bit float or 16-bit, grayscale or RGB"
    photometric = int(page.photometric)
    name = getattr(page.photometric, "name", photometric)
    _require(photometric in (TIFF_GRAY, TIFF_RGB), f"is neither gray nor RGB, but {name}", advice)
    compression = int(page.compression)
    name = getattr(page.compression, "name", compression)
    _require(compression in TIFF_EXPANSION, f"is compressed with {name}, which is not read",
             "save it uncompressed")
    bits = page.bitspersample
    kind = page.dtype and page.dtype.kind
    _require(kind and kind in "iuf" and bits == 8 * page.dtype.itemsize,
             f"has samples of {bits} bits, which are not read", advice)
    planes, depth, height, width, together = page.shaped
    colors = 3 if photometric == TIFF_RGB else 1
    _require(depth == 1 and height and width, "is not a flat picture", advice)
    _require(page.samplesperpixel >= colors and planes * together == page.samplesperpixel,
             f"is called RGB but has {page.samplesperpixel} channel(s)", advice)
    needed = math.prod(page.shaped) * page.dtype.itemsize
    stored = min(sum(page.databytecounts), size)
    _require(len(page.dataoffsets) <= MAX_TILES, "has too many strips to be true")
    last = max(map(sum, zip(page.dataoffsets, page.databytecounts)), default=0)
    _require(last <= size, f"is cut short: its data end at byte {last} of {size}")
    _require(needed <= TIFF_EXPANSION[compression] * stored, "claims more data than it holds")
    _require(math.prod(page.chunks) * page.dtype.itemsize <= 4 * needed + (1 << 20),
             "has tiles larger than the picture")
    return colors


def _tiff_source(page):
    """Return what the outputs keep of a page."""
    def value(code):
        tag = page.tags.get(code)
        return None if tag is None else tag.value

    def text(code):
        found = value(code) or b""
        return found if isinstance(found, bytes) else str(found).encode("utf-8", "replace")

    tags = []
    for code, kind in TIFF_KEPT.items():
        if value(code) is None:
            continue
        kept = int(value(code)) if kind == "H" else text(code)
        count = {"H": 1, "s": 0, "B": len(kept) if kind == "B" else 0}[kind]
        tags.append((code, kind, count, kept, True))
    resolution = ()
    unit = value(296) or TIFF_INCH
    if value(282) and value(283) and unit in TIFF_RESOLUTION_UNITS:
        resolution = tuple(value(282)), tuple(value(283)), int(unit)
    icc = value(TIFF_ICC)
    return TiffSource(text(270), bytes(icc) if isinstance(icc, bytes) else b"", resolution,
                      tuple(tags))


def write_tiff(file, planes, source=None, history=(), compress=False, unit=None):
    """Write a picture as 32-bit float TIFF; the arguments are those of `write_fits`.

    The FITS cards of another source become a description, as Astro-TIFF has it. HISTORY is appended
    to the description. `compress` is deflate with the floating point predictor.
    """
    import tifffile
    unit = unit or Unit()
    if not isinstance(source, TiffSource):
        cards, icc = _shared_metadata(source)
        description = "\n".join(card.rstrip() for card in cards).encode("latin-1", "replace")
        source = TiffSource(description, icc)
    channels, height, width = planes.shape
    data = np.empty((height, width, channels), np.float32)
    for channel, plane in enumerate(planes):
        data[..., channel] = _in_own_unit(plane, unit)
    photometric = "rgb"
    if channels == 1:
        data = data[..., 0]
        photometric = "minisblack"
    description = _tiff_description(source.description, history)
    tags = source.tags
    if source.icc:
        tags += ((TIFF_ICC, TIFF_BYTES, len(source.icc), source.icc, True),)
    options = {}
    if source.resolution:
        *values, resolution_unit = source.resolution
        options = {"resolution": tuple(values), "resolutionunit": resolution_unit}
    if compress:
        options.update(compression="adobe_deflate", predictor=3)
    big = data.nbytes + len(source.description) + len(source.icc) > 0xF0000000
    with tifffile.TiffWriter(file, bigtiff=big) as writer:
        writer.write(
            data, photometric=photometric, description=description, metadata=None,
            software=f"bgoptimizer {VERSION}", extratags=tags, **options)


def _tiff_description(description, history):
    """Return a description with HISTORY at its end, but before the END of a FITS header."""
    lines = description.rstrip(b"\0 \r\n").split(b"\n") if description else []
    end = lines[-1:] if lines and lines[-1].strip() == b"END" else []
    added = [card.rstrip().encode() for line in history for card in _text_cards("HISTORY", line)]
    return b"\n".join([*lines[:len(lines) - len(end)], *added, *end])


# The table of formats

def _write_xisf_of_any(file, planes, source=None, history=(), compress=False, unit=None):
    """Write a picture as XISF, whose samples stay in [0, 1]; HISTORY tells its own unit."""
    if unit not in (None, Unit()):
        history = [*history, f"bgoptimizer: the picture's own unit is sample * {unit.scale:.17g} "
                             f"{unit.offset:+.17g}"]
    if source is not None and not isinstance(source, Source):
        cards, icc = _shared_metadata(source)
        root = ElementTree.XML("<xisf><Image/><Metadata/></xisf>")
        image = root.find("Image")
        for keyword in _keywords(cards):
            ElementTree.SubElement(image, "FITSKeyword", keyword)
        if icc:
            profile = ElementTree.SubElement(image, "ICCProfile", location="inline:base64")
            profile.text = base64.b64encode(icc).decode()
        source = Source(root, {})
    write_xisf(file, planes, source, history, compress)


FORMATS = {
    "xisf": Format(".xisf", read_xisf, _write_xisf_of_any),
    "fits": Format(".fits", read_fits, write_fits),
    "tiff": Format(".tif", read_tiff, write_tiff),
}


# ---------------------------------------------------------------------------------------------------------
# What the stages share
# ---------------------------------------------------------------------------------------------------------

def _present(samples: np.ndarray) -> np.ndarray:
    """True where a sample is data: finite and not exactly 0 (what is black but real was read as > 0)."""
    return (samples > 0) & (samples < np.inf)


def _strips(height: int, width: int, multiple: int = 1) -> list[slice]:
    """Slices of rows that cover a plane in strips of about STRIP_PIXELS, each a `multiple` of rows high."""
    rows = max(multiple, STRIP_PIXELS // max(1, width) // multiple * multiple)
    return [slice(top, min(top + rows, height)) for top in range(0, height, rows)]


def _each(work: Callable, items: Sequence) -> Iterator:
    """Results of work(item), in order, computed by WORKERS threads."""
    with ThreadPoolExecutor(WORKERS) as pool:
        yield from pool.map(work, items)


def _grid(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Coordinates along two axes, (h,) and (w,) -> of all their crossings, (h, w, 2)."""
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), -1)


def _quantiles(plane: np.ndarray, present: np.ndarray, quantiles: Sequence[float]) -> np.ndarray:
    """Quantiles of the present samples, each one of them (the lower of the two middle ones).

    Exact up to 16 Mpix, of every k-th sample beyond: 8 million give the median to a thousandth of the noise.

    Args:
        plane: (h, w). present: (h, w) bool, somewhere True.
    """
    every = slice(None, None, plane.size // QUANTILE_SAMPLES | 1)  # odd, to meet all pixels of a mosaic
    values = plane.ravel()[every][present.ravel()[every]]
    values = values if values.size else plane[present]
    ranks = [int(q * (values.size - 1)) for q in quantiles]
    values.partition(ranks)
    return values[ranks].astype(float)


def _channel_name(k: int, count: int) -> str:
    return "the picture" if count == 1 else f"channel {'RGB'[k]}"


# ---------------------------------------------------------------------------------------------------------
# Stretch: linear to 'stretched' (delinearized) and exactly back
# ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Stretch:
    """Per-channel constants of the stretch, each an array (c,), for images with the channel last.

    `apply`: x -> (x - pedestal) / scale, clipped to [0, 1], then the midtones transfer function that takes
    `midtones` to 0.25. `invert` is exact on [0, 1] and goes on with its end slopes outside: the formula
    itself has a pole above 1, where a spline may well wander.
    """

    pedestal: np.ndarray
    scale: np.ndarray
    midtones: np.ndarray

    def apply(self, linear: np.ndarray) -> np.ndarray:
        """Linear samples (..., c), any range -> stretched samples (..., c) in [0, 1]; NaN stays NaN."""
        m = self.midtones
        x = np.clip((linear - self.pedestal) / self.scale, 0, 1)
        return (1 - m) * x / ((1 - 4 * m) * x + 3 * m)

    def invert(self, stretched: np.ndarray) -> np.ndarray:
        """Stretched samples (..., c), any range -> linear samples (..., c)."""
        m = self.midtones
        y = np.clip(stretched, 0, 1)
        x = 3 * m * y / ((1 - m) - (1 - 4 * m) * y)
        below, above = 3 * m / (1 - m), (1 - m) / (3 * m)  # slopes of the inverse at 0 and at 1
        x = x + below * np.minimum(stretched, 0) + above * np.maximum(stretched - 1, 0)
        return x * self.scale + self.pedestal

    def slope(self, linear: np.ndarray) -> np.ndarray:
        """Derivative of `apply`, without its clipping, at linear samples (..., c): what noise is stretched by."""
        m = self.midtones
        x = np.clip((linear - self.pedestal) / self.scale, 0, 1)
        return 3 * m * (1 - m) / ((1 - 4 * m) * x + 3 * m)**2 / self.scale

    def channel(self, k: int) -> "Stretch":
        """The same stretch for channel k alone."""
        return Stretch(*(np.asarray(v)[k:k + 1] for v in (self.pedestal, self.scale, self.midtones)))


def measure_stretch(planes: np.ndarray, quantile: float) -> tuple[Stretch, np.ndarray]:
    """The stretch of a picture, from its present samples.

    Args:
        planes: (c, h, w) linear samples.
        quantile: the share of samples below what the stretch maps to 1.

    Returns:
        The stretch, and the channels' medians (c,) in linear units.

    Raises:
        BgError: a channel has no present sample, or only one value.
    """
    def measure(k):
        present = _present(planes[k])
        if not present.any():
            raise BgError(f"{_channel_name(k, len(planes))} holds no data (every sample is 0 or not finite); "
                          "remove that channel, or save the picture again")
        low = float(np.min(planes[k], where=present, initial=np.inf))
        median, high = _quantiles(planes[k], present, (0.5, quantile))
        if high - low < np.finfo(np.float32).tiny:  # less than the fit, in Float32, could tell apart
            raise BgError(f"{_channel_name(k, len(planes))} has the same value everywhere ({low:.6g}), so it shows no "
                          "sky; raise -dq if a bright object fills the frame, else give a picture with content")
        return low, high - low, median

    low, scale, median = np.array(list(_each(measure, range(len(planes))))).T
    # Coarsely quantized pictures can have their median at an end, where the function would degenerate.
    midtones = np.clip((median - low) / scale, 1e-4, 1 - 1e-4)
    return Stretch(low, scale, midtones), median


# ---------------------------------------------------------------------------------------------------------
# Reduce and mask
# ---------------------------------------------------------------------------------------------------------

def reduce_plane(plane: np.ndarray, factor: int, func: str = "median", transform: Callable | None = None) -> np.ndarray:
    """Blocks of factor x factor samples -> their median or mean over the samples present.

    Args:
        plane: (h, w); missing samples are 0 or not finite.
        factor: side of a block; blocks at the right and lower edge use what they have.
        func: "median" or "mean".
        transform: applied to the samples before the mean (a median can wait until after).

    Returns:
        (ceil(h / factor), ceil(w / factor)) float32; NaN where a block has nothing present.
    """
    height, width = plane.shape
    down, across = min(factor, height), min(factor, width)  # a block larger than the picture takes no memory
    columns = -(-width // across)

    def reduce_strip(rows):
        strip = plane[rows]
        strip = np.pad(strip, ((0, -len(strip) % down), (0, -width % across)))  # with 0: missing
        blocks = strip.reshape(-1, down, columns, across).swapaxes(1, 2).reshape(-1, columns, down * across)
        present = _present(blocks)
        count = present.sum(-1)
        if func == "mean":
            blocks = blocks if transform is None else transform(blocks)
            return np.where(present, blocks, 0).sum(-1) / np.where(count, count, np.nan)
        blocks = np.sort(np.where(present, blocks, np.nan), axis=-1)  # quicker here than a partition; NaN goes last
        middle = np.stack([np.maximum(count - 1, 0) // 2, count // 2], -1)
        return np.take_along_axis(blocks, middle, -1).mean(-1)

    return np.concatenate(list(_each(reduce_strip, _strips(height, width, down)))).astype(np.float32)


@dataclass(frozen=True)
class ExpectedSky:
    """The sky that --auto expects, and the further reduced picture, (h, w) cells, that it was found on."""

    surface: Callable[[np.ndarray], np.ndarray]  # frame coordinates (..., 2) -> stretched sky (..., c)
    image: np.ndarray  # (h, w, c) stretched
    weight: np.ndarray  # (h, w, c) in [0, 1]; 0 where a cell is not sky
    centers: np.ndarray  # (h, w, 2), as in `Prepared`


@dataclass(frozen=True)
class Prepared:
    """What the fit sees of a picture: reduced, stretched, masked. Shapes: (h, w) the reduced frame, c channels."""

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
        """(h, w) bool: pixels that take part in the fit."""
        return (self.weight > 0).any(-1)


def frame_coordinates(height: int, width: int, factor: int = 1) -> np.ndarray:
    """Centers of the blocks of a full-size frame, both axes divided by its longer side.

    A block's center and the full-size pixels that it came from share this frame, so the surface is not shifted
    by half a block, and bending costs the same along both axes.

    Returns:
        (ceil(height / factor), ceil(width / factor), 2) float64, (row, column), inside [0, 1].
    """
    def centers(length):
        start = np.arange(0, length, factor)
        return (start + np.minimum(start + factor, length)) / 2 / max(height, width)

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
    return (settings.threshold_min <= image) & (image <= settings.threshold_max)


def _block_means(weights: np.ndarray, factor: int) -> np.ndarray:
    """(h, w) or (h, w, k) values in [0, 1] -> means of blocks; what is not finite counts as 0."""
    weights = np.clip(np.nan_to_num(weights), 0, 1)
    for axis in (0, 1):
        starts = np.arange(0, weights.shape[axis], factor)
        sizes = np.diff(np.append(starts, weights.shape[axis]))
        weights = np.add.reduceat(weights, starts, axis) / sizes.reshape(-1, *[1] * (weights.ndim - 1 - axis))
    return weights.astype(np.float32)


def _size(planes: np.ndarray) -> str:
    return f"{planes.shape[2]} x {planes.shape[1]} with {planes.shape[0]} channel{'s' if len(planes) > 1 else ''}"


def full_mask(prepared: Prepared, settings: Settings) -> np.ndarray:
    """The mask in force at full size, (1 or c, h, w) float32, 1 = sky: one channel if all have the same."""
    height, width = prepared.full_shape
    weight = np.moveaxis(prepared.weight, -1, 0)
    weight = weight[:1] if (weight == weight[:1]).all() else weight
    row, column = (np.arange(n) // settings.downscaling_factor for n in (height, width))
    return np.ascontiguousarray(weight[:, row[:, None], column], np.float32)


def mask_reasons(prepared: Prepared, settings: Settings) -> dict[str, np.ndarray]:
    """Why pixels of the reduced frame are left out: reason -> (h, w) bool. A pixel has one reason at most."""
    missing = ~prepared.present.any(-1)
    left_out = ~prepared.used & ~missing
    inside = _inside_thresholds(prepared.image, settings) & prepared.present
    reasons = {"missing": missing, "threshold": left_out & ~inside.any(-1)}
    left_out &= ~reasons["threshold"]
    by_file = np.zeros_like(left_out) if prepared.user_mask is None else left_out & (prepared.user_mask == 0).any(-1)
    return {**reasons, "mask file": by_file, "auto": left_out & ~by_file}


def clipped_by_stretch(prepared: Prepared) -> np.ndarray:
    """(h, w, c) bool: where the stretch ends at 1 and the fit cannot see how bright the picture is."""
    with np.errstate(invalid="ignore"):  # NaN where missing
        return prepared.linear >= prepared.stretch.pedestal + prepared.stretch.scale


def shares(prepared: Prepared) -> dict[str, float]:
    """Shares of the reduced samples, all channels together; missing, masked and used add up to 1."""
    used = np.count_nonzero(prepared.weight) / prepared.weight.size
    missing = 1 - np.count_nonzero(prepared.present) / prepared.present.size
    return {"missing": missing, "masked": max(0.0, 1 - missing - used), "used": used,
            "clipped": np.count_nonzero(clipped_by_stretch(prepared)) / prepared.present.size}


# ---------------------------------------------------------------------------------------------------------
# Spline: f(q) = sum_i w_i phi_k(|q - c_i|) + v.q + b
# ---------------------------------------------------------------------------------------------------------

_TINY_SQUARED_DISTANCE = 1e-10
"""Guards log(0), and the square root at 0, whose gradient is infinite. The value that tensorflow-addons has."""


def spline_surface(query: np.ndarray, positions: np.ndarray, values: np.ndarray, order: int,
                   smoothing: float) -> np.ndarray:
    """The surface through values at control points, in Float64: `interpolate_spline` where no gradient is needed.

    It is linear in the values: with np.eye(n) for them it is the matrix that takes values to the surface.

    Args:
        query: (..., 2) where to evaluate.
        positions: (n, 2) control points. values: (n, k) there.
        order: of the kernel phi: r^order if odd, r^order log r if even.
        smoothing: weight on the diagonal of the interpolation system, 0 = through the values exactly.

    Returns:
        (..., k).
    """
    weights, slopes, level = np.split(_spline_coefficients(positions, order, smoothing) @ values, (-3, -1))
    points = query.reshape(-1, 2)
    # In parts: the kernels of all points at once would be the largest array of a run.
    parts = np.array_split(points, 1 + len(points) * len(positions) // STRIP_PIXELS)
    surface = [_kernel(part, positions, order) @ weights + part @ slopes + level for part in parts]
    return np.concatenate(surface).reshape(*query.shape[:-1], -1)


def _spline_coefficients(positions: np.ndarray, order: int, smoothing: float) -> np.ndarray:
    """(n + 3, n): values at the control points -> weights of the kernels, then two slopes, then the level."""
    n = len(positions)
    system = np.zeros((n + 3, n + 3))
    system[:n, :n] = _kernel(positions, positions, order) + smoothing * np.eye(n)
    system[:n, n:] = np.c_[positions, np.ones(n)]
    system[n:, :n] = system[:n, n:].T
    try:
        return np.linalg.solve(system, np.eye(n + 3, n))
    except np.linalg.LinAlgError:  # control points on one line or on top of each other: the smallest coefficients
        return np.linalg.lstsq(system, np.eye(n + 3, n), rcond=None)[0]


def _kernel(query: np.ndarray, positions: np.ndarray, order: int) -> np.ndarray:
    """phi_k of the distances, (..., n) for query (..., 2) and positions (n, 2)."""
    squared = ((query[..., None, 0] - positions[:, 0])**2 + (query[..., None, 1] - positions[:, 1])**2)
    squared = np.maximum(squared, _TINY_SQUARED_DISTANCE)
    return squared**(order / 2) if order % 2 else 0.5 * squared**(order // 2) * np.log(squared)


def interpolate_spline(train_points, train_values, query_points, order, regularization_weight=0.0,
                       name="interpolate_spline"):
    """Drop-in for `tfa.image.interpolate_spline` where tensorflow-addons does not exist: same values, same gradients.

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

    def squared_distances(x, y):  # [b, n, d], [b, m, d] -> [b, n, m]
        product = tf.matmul(x, y, transpose_b=True)
        if x is y:  # norms rounded as the product is: the diagonal, where the kernel is steepest, is then exactly 0
            x_norm = y_norm = tf.linalg.diag_part(product)
        else:
            x_norm, y_norm = tf.reduce_sum(tf.square(x), 2), tf.reduce_sum(tf.square(y), 2)
        return x_norm[:, :, None] - 2 * product + y_norm[:, None, :]

    def phi(r2):
        guarded = tf.maximum(r2, _TINY_SQUARED_DISTANCE)
        if order % 2:
            return tf.sqrt(guarded) if order == 1 else tf.pow(guarded, order / 2)
        # The guard sits in the logarithm alone for orders 2 and 4: r2 may be 0, or slightly below from rounding.
        powered = r2 if order == 2 else tf.square(r2) if order == 4 else tf.pow(guarded, order / 2)
        return 0.5 * powered * tf.math.log(guarded)

    with tf.name_scope(name):
        c, f, q = (tf.convert_to_tensor(x) for x in (train_points, train_values, query_points))
        b, n, d = tf.shape(c)[0], tf.shape(c)[1], c.shape[-1]
        matrix_a = phi(squared_distances(c, c))  # [b, n, n]
        if regularization_weight > 0:
            matrix_a += regularization_weight * tf.eye(n, dtype=c.dtype)
        matrix_b = tf.concat([c, tf.ones_like(c[..., :1])], 2)  # [b, n, d + 1]
        system = tf.concat([tf.concat([matrix_a, matrix_b], 2),
                            tf.concat([tf.transpose(matrix_b, [0, 2, 1]), tf.zeros([b, d + 1, d + 1], c.dtype)], 2)], 1)
        w_v = tf.linalg.solve(system, tf.concat([f, tf.zeros([b, d + 1, f.shape[-1]], f.dtype)], 1))
        linear = tf.concat([q, tf.ones_like(q[..., :1])], 2)  # [b, m, d + 1]
        return tf.matmul(phi(squared_distances(q, c)), w_v[:, :n]) + tf.matmul(linear, w_v[:, n:])


def import_tensorflow():
    """TensorFlow, imported where it is first needed: it takes seconds, and help, errors and preview need none of it."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # else it takes all of a GPU's memory at once
    try:
        return importlib.import_module("tensorflow")
    except Exception as error:  # missing, or broken in one of many ways: it fails with almost any error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BgError(f"TensorFlow cannot be imported ({reason}); "
                      "install it with: python -m pip install -r requirements.txt") from None


def _import_interpolate_spline() -> Callable:
    """tensorflow-addons' function where it exists (Python up to 3.11, TensorFlow up to 2.15), else the drop-in."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its farewell notice, and which TensorFlow it was tested with
        try:
            return importlib.import_module("tensorflow_addons.image.interpolate_spline").interpolate_spline
        except Exception:  # not installed, or installed beside a TensorFlow that it does not know
            return interpolate_spline


def spline_layer(positions: np.ndarray, values: np.ndarray, order: int, smoothing: float):
    """A Keras layer: query points [m, 2] -> surface [m, c]; its weights are the control points.

    Args:
        positions: (n, 2) where the control points start, trainable.
        values: (n, c) the surface's values there, trainable.
        order: of the spline. smoothing: regularization weight of its interpolation.
    """
    tf, interpolate = import_tensorflow(), _import_interpolate_spline()

    class SplineSurface(tf.keras.layers.Layer):
        def __init__(self):
            super().__init__(name="spline_surface")
            self.positions = self._control_points("positions", positions)
            self.values = self._control_points("values", values)

        def _control_points(self, name, start):
            return self.add_weight(name=name, shape=start.shape, initializer=tf.keras.initializers.Constant(start))

        def call(self, query):
            return interpolate(self.positions[None], self.values[None], query[None], order, smoothing)[0]

    return SplineSurface()


# ---------------------------------------------------------------------------------------------------------
# Loss: four terms per pixel, each [m] from the weighted residual r or the surface b, [m, c]
# ---------------------------------------------------------------------------------------------------------

def loss_error(tf, r):
    """How far the surface is from the picture: mean |r| over the channels."""
    return tf.reduce_mean(tf.abs(r), -1)


def loss_color(tf, r):
    """How far the channels disagree: variance of r over the channels. Keeps the background neutral; 0 for mono."""
    return tf.math.reduce_variance(r, -1)


def loss_overshoot(tf, r):
    """How far the surface lies above the picture. Subtracting more light than there is leaves dark holes."""
    return tf.reduce_mean(tf.abs(r) - r, -1)


def loss_negative(tf, b):
    """How far the surface lies below zero: there is no negative sky."""
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


# ---------------------------------------------------------------------------------------------------------
# Apply: the surface at full size, and the picture without it
# ---------------------------------------------------------------------------------------------------------

class SkySurface:
    """The sky at full size, (c, h, w) in linear units, made strip by strip: it never stands in memory unless asked for.

    The spline is evaluated on nodes a few pixels apart, brought back to linear there, and interpolated between
    them by the cubic through four nodes along each axis. That is exact for planes, and the spline bends over
    hundreds of pixels, so between nodes nothing is lost (tests hold it to 2e-5); but the cost of a pixel is a
    few multiplications, however many control points there are.
    """

    def __init__(self, surface: Callable[[np.ndarray], np.ndarray], shape: tuple[int, int], dtype=np.float32):
        """surface: (..., 2) frame coordinates -> (..., c) linear sky; shape: (h, w) of the full-size picture."""
        self.step = step = max(1, max(shape) // SURFACE_NODES)
        # Node k stands on pixel (k - 1) * step: one node before the frame, and two behind its last cell.
        rows, columns = ((np.arange(-(-n // step) + 3) - 1) * step for n in shape)
        row, column = ((pixel + 0.5) / max(shape) for pixel in (rows, columns))
        nodes = surface(_grid(row, column))
        self.nodes = np.moveaxis(nodes, -1, 0).astype(dtype)  # (c, rows, columns)
        self.shape, self.dtype = (len(self.nodes), *shape), self.nodes.dtype
        u = np.arange(step)[:, None] / step
        self.taps = np.hstack([-u * (u - 1) * (u - 2) / 6, (u + 1) * (u - 1) * (u - 2) / 2,
                               -(u + 1) * u * (u - 2) / 2, (u + 1) * u * (u - 1) / 6]).astype(dtype)  # (step, 4)

    def strip(self, channel: int, rows: slice) -> np.ndarray:
        """Linear sky of one channel in these rows, (rows, w). rows.start must be a multiple of `step`."""
        first, cells = rows.start // self.step, -(-(rows.stop - rows.start) // self.step)
        nodes = self.nodes[channel, first:first + cells + 3]
        tall = np.einsum("st,ktc->ksc", self.taps, np.lib.stride_tricks.sliding_window_view(nodes, 4, 0).swapaxes(1, 2))
        tall = tall.reshape(cells * self.step, -1)[:rows.stop - rows.start]  # (rows, node columns)
        windows = np.lib.stride_tricks.sliding_window_view(tall, 4, 1)  # (rows, cells, 4)
        return np.clip((windows @ self.taps.T).reshape(len(tall), -1)[:, :self.shape[2]], 0, 1)

    def strips(self) -> list[slice]:
        return _strips(*self.shape[1:], self.step)

    def plane(self, channel: int) -> np.ndarray:
        """Linear sky of one channel, (h, w)."""
        plane = np.empty(self.shape[1:], self.dtype)

        def fill(rows):
            plane[rows] = self.strip(channel, rows)

        list(_each(fill, self.strips()))
        return plane

    def __iter__(self) -> Iterator[np.ndarray]:
        """The channels' planes, each made when it is asked for: what `write_xisf` takes."""
        return (self.plane(k) for k in range(len(self.nodes)))


def linear_sky(prepared: Prepared, fit: Fit) -> Callable[[np.ndarray], np.ndarray]:
    """The fitted sky in the picture's own units, held back where there was no sky to fit.

    Returns:
        A function: frame coordinates (..., 2) -> sky (..., c), clipped to [0, 1].
    """
    seen = fit.surface(prepared.centers.reshape(-1, 2)[sample_pixels(prepared.used, SAMPLE_PIXELS, 0)])
    low, high = seen.min(0), seen.max(0)
    low, high = low - HELD_BACK * (high - low), high + HELD_BACK * (high - low)
    return lambda places: np.clip(prepared.stretch.invert(np.clip(fit.surface(places), low, high)), 0, 1)


def full_size_sky(prepared: Prepared, fit: Fit, dtype=np.float32) -> SkySurface:
    """The fitted sky at full size."""
    return SkySurface(linear_sky(prepared, fit), prepared.full_shape, dtype)


def subtract(planes: np.ndarray, sky: SkySurface, median: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Take the sky out of a picture, in place: image - model + offset, clipped to [0, 1].

    The offset of a channel is what its median over present samples would lose, so the background stays neutral, and
    a black border or one bad pixel cannot decide a color. Missing samples stay as they are.

    Args:
        planes: (c, h, w) linear samples; changed.
        sky: the model. median: (c,) of the present samples of planes.

    Returns:
        The offsets, and the counts of samples clipped at 0 and at 1; (c,) each.
    """
    def work(k):
        plane, strips, below, above = planes[k], sky.strips(), 0, 0
        present = _present(plane)
        for rows in strips:
            np.subtract(plane[rows], sky.strip(k, rows), out=plane[rows], where=present[rows])
        offset = median[k] - _quantiles(plane, present, (0.5,))[0]
        for rows in strips:
            values = plane[rows] + plane.dtype.type(offset)
            below += np.count_nonzero((values < 0) & present[rows])
            above += np.count_nonzero((values > 1) & present[rows])
            np.copyto(plane[rows], np.clip(values, 0, 1), where=present[rows])
        return offset, below, above

    return tuple(map(np.array, zip(*_each(work, range(len(planes))))))


def divide(planes, sky, black=0.0):
    """Divide a picture by its model, in place: picture / model * the model's median.

    That is right where something dims the light, such as vignetting. The rest is as in `subtract`.

    Args:
        planes: (c, h, w) linear samples; changed.
        sky: the model, a SkySurface.
        black: the sample that no light at all would give. It is not 0 in a picture with a unit of
            its own that has negative values.

    Returns the model's medians, above black, and the counts of samples clipped at 0 and at 1; (c,)
    each.
    Raises BgError where the model is not above black.
    """
    inside = slice(1, -2)  # nodes in the frame
    levels = np.median(sky.nodes[:, inside, inside], (1, 2)) - black
    for channel, nodes in enumerate(sky.nodes):
        if nodes.min() <= black:
            name = _channel_name(channel, len(planes))
            raise BgError(f"the model of {name} is not above 0 everywhere, and nothing can be "
                          "divided by it; use --correction subtract")

    def work(channel):
        plane = planes[channel]
        below = above = 0
        for rows in sky.strips():
            present = _present(plane[rows])
            gain = levels[channel] / (sky.strip(channel, rows) - black)
            values = (plane[rows] - black) * gain + black
            below += np.count_nonzero((values < 0) & present)
            above += np.count_nonzero((values > 1) & present)
            np.copyto(plane[rows], np.clip(values, 0, 1), where=present, casting="same_kind")
        return levels[channel], below, above

    return tuple(map(np.array, zip(*_each(work, range(len(planes))))))


def reduced_sky(prepared: Prepared, fit: Fit, correction: str = "subtract") -> tuple[np.ndarray, np.ndarray]:
    """The sky and the picture without it on the reduced frame, linear, (h, w, c) each; medians stay."""
    sky = linear_sky(prepared, fit)(prepared.centers).astype(np.float32)
    if correction == "divide":
        return sky, prepared.linear / sky * np.median(sky, (0, 1))
    return sky, _keep_median(prepared.linear, prepared.linear - sky)


def _keep_median(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """`after`, each channel shifted to the median of `before`; (h, w, c), NaN where missing."""
    def medians(image):  # of every fourth sample: enough for the eye
        return np.array([np.median(plane[np.isfinite(plane)][::4]) for plane in np.moveaxis(image, -1, 0)], after.dtype)

    return after + (medians(before) - medians(after))


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
        image: (h, w), (h, w, 1) or (h, w, 3), linear; 0 and what is not finite count as missing. Integers
            count over their full range, floats in any unit: the results are in the same. Not changed.
        settings: see `Settings`.
        mask: (h, w), (h, w, 1) or (h, w, c) weights in [0, 1], 1 = use, 0 = ignore; or integers.
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
    unit = array_unit(planes)
    prepared, settings = examine(planes, settings, None if mask is None else mask_weights(_to_planes(mask, "the mask")),
                                 say)
    fit = fit_sky(prepared, settings, say, on_epoch)
    sky = full_size_sky(prepared, fit, planes.dtype)
    if settings.correction == "divide":
        offsets, _, _ = divide(planes, sky, -unit.offset / unit.scale)
        offsets = offsets * unit.scale
    else:
        offsets, _, _ = subtract(planes, sky, prepared.median)
        offsets = offsets * unit.scale + unit.offset
    model, corrected = (np.stack([_in_own_unit(plane, unit) for plane in part], -1) for part in (sky, planes))
    return Result(model, corrected, offsets,
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


# ---------------------------------------------------------------------------------------------------------
# Pictures: preview, figures, animation
#
# All are drawn from the reduced picture, so a large frame costs no more than a small one.
# ---------------------------------------------------------------------------------------------------------

FIGURE_SIZE = (13.6, 7.6)
"""Inches, at 100 pixels each: fits a laptop's screen."""

INK, PAPER, FAINT = "#e6e6e6", "#16191d", "#4a5058"
STYLE = {"figure.facecolor": PAPER, "savefig.facecolor": PAPER, "axes.facecolor": "#1e2227", "axes.edgecolor": FAINT,
         "axes.labelcolor": INK, "axes.titlecolor": INK, "axes.titlesize": 10, "axes.titlelocation": "left",
         "text.color": INK, "xtick.color": INK, "ytick.color": INK, "font.size": 9, "figure.dpi": 100,
         "hatch.linewidth": 1.5, "legend.frameon": False, "legend.fontsize": 8}
"""Ink and paper of our own, so that pictures look the same in light and in dark terminals and notebooks."""

CHANNEL_INKS = {1: (INK,), 3: ("#e8703a", "#2fb58a", "#5ab0ee")}
"""Red, green, blue as the color-blind tell them apart (after Okabe and Ito)."""

OVERLAYS = {"missing": ("#6b7077", "", "missing"), "threshold": ("#e69f00", "/////", "left out by -tm, -tM"),
            "mask file": ("#56b4e9", "\\\\\\\\\\", "left out by -m"), "auto": ("#cc79a7", "///", "left out by --auto"),
            "clipped": ("#f0e442", "\\\\\\", "clipped by -dq")}
"""Reason -> its color, its hatching (none: solid), its name. The hatching tells them apart without color."""


def display_stretch(linear: np.ndarray) -> Stretch:
    """A stretch for the eye, of a reduced picture (h, w, c): nearly nothing clipped, every channel's median at 0.25."""
    low, median, high = np.nanquantile(linear, (0.002, 0.5, 0.9995), axis=(0, 1))
    pedestal = low - 0.1 * (median - low)
    scale = np.maximum(high - pedestal, 1e-9)
    constants = pedestal, scale, np.clip((median - pedestal) / scale, 1e-4, 0.5)
    return Stretch(*(np.asarray(constant, np.float32) for constant in constants))


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


def _lay_out(figure, title: str, ratio: float):
    """A title, three axes beside each other, and below, in 1 : ratio of their height, a cell. Returns axes and cell."""
    figure.suptitle(title, x=0.015, ha="left", fontsize=11)
    top, bottom = figure.add_gridspec(2, 1, height_ratios=(ratio, 1), left=0.02, right=0.985, top=0.915, bottom=0.085,
                                      hspace=0.3)
    return [figure.add_subplot(cell) for cell in top.subgridspec(1, 3, wspace=0.03)], bottom


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


def _draw_histogram(axes, prepared: Prepared, settings: Settings, k: int) -> None:
    """Stretched values of one channel, with the thresholds and the points that the stretch is made from."""
    values = prepared.image[..., k]
    ink = CHANNEL_INKS[prepared.image.shape[-1]][k]
    used, _ = np.histogram(values[prepared.weight[..., k] > 0], 128, (0, 1))
    counts, edges = np.histogram(values[prepared.present[..., k]], 128, (0, 1))
    axes.fill_between(edges[:-1], used, step="post", color=ink, alpha=0.45, linewidth=0)
    axes.step(edges[:-1], counts, where="post", color=ink, linewidth=1)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(0, 4 * counts.max())
    axes.set_xlim(-0.02, 1.02)
    axes.yaxis.set_visible(False)
    for low, high in ((-0.02, settings.threshold_min), (settings.threshold_max, 1.02)):
        if high > low:
            axes.axvspan(low, high, facecolor="none", edgecolor=OVERLAYS["threshold"][0], hatch="///", linewidth=0)
            axes.axvline(high if low < 0 else low, color=OVERLAYS["threshold"][0], linewidth=1)
    axes.axvline(MIDTONES_TARGET, color=INK, linewidth=0.8, linestyle=":")
    axes.text(MIDTONES_TARGET + 0.01, 2 * counts.max(), "median", fontsize=7)
    axes.text(0.985, 2 * counts.max(), f"-dq {stretch_quantile(settings):g}", fontsize=7, ha="right")
    ticks = (0, 0.25, 0.5, 0.75, 1)
    linear = prepared.stretch.channel(k).invert(np.array(ticks)[:, None])[:, 0]
    axes.set_xticks(ticks, [f"{tick:g}\n{value:.4f}" for tick, value in zip(ticks, linear)], fontsize=7)
    axes.set_title(f"{_channel_letters(prepared)[k]}: how often a value occurs (filled: used)", fontsize=8)


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
    """The result: before, model, after in one stretch; where the control points went; how the loss fell."""
    figure.text(0.015, 0.012, facts(prepared, settings, fit), fontsize=8)
    prepared = thinned(prepared)
    sky, after = reduced_sky(prepared, fit, settings.correction)
    stretch = display_stretch(prepared.linear)
    panels, bottom = _lay_out(figure, title, 1.25)
    _show(panels[0], stretch.apply(prepared.linear), "before")
    _show(panels[1], stretch.apply(sky), "model, same stretch, lines of equal brightness")
    _draw_contours(panels[1], sky.mean(-1))
    _show(panels[2], stretch.apply(after), "after, same stretch")

    cells = bottom.subgridspec(1, 2, width_ratios=(1, 2.1), wspace=0.1)
    points = figure.add_subplot(cells[0])
    _show(points, np.where(prepared.used[..., None], 0.75 * prepared.image, np.nan),
          "control points, from ring to dot; brown: left out", blank=(0.30, 0.24, 0.12))
    stations = [positions for _, positions, _ in fit.track] + [fit.positions]
    row, column = np.moveaxis([_pixel_positions(prepared, positions) for positions in stations], -1, 0)  # (steps, n)
    points.plot(column, row, color="#56b4e9", linewidth=0.9, alpha=0.8)
    points.plot(column[0], row[0], "o", color="none", markeredgecolor="#56b4e9", markersize=3.5)
    points.plot(column[-1], row[-1], "o", color="#f0e442", markeredgecolor="black", markersize=5)
    height, width = prepared.image.shape[:2]
    points.set(xlim=(-0.5 - 0.04 * width, width * 1.04 - 0.5), ylim=(height * 1.04 - 0.5, -0.5 - 0.04 * height))

    charts = cells[1].subgridspec(1, 3, width_ratios=(1, 1, 0.2), wspace=0.2)
    loss, terms = figure.add_subplot(charts[0]), figure.add_subplot(charts[1])
    epochs = np.arange(1, len(fit.history) + 1)
    loss.plot(epochs, fit.history[:, 0], color=INK, linewidth=1.2)
    loss.set_title("loss")
    for name, values, ink in zip(LOSS_TERMS, fit.history[:, 1:].T, ("#56b4e9", "#2fb58a", "#e69f00", "#cc79a7")):
        values = np.where(values > 0, values, np.nan)
        if np.isfinite(values).any():
            terms.plot(epochs, values, color=ink, linewidth=1.2, label=name)
        else:
            terms.plot([], [], color=ink, label=f"{name} (0)")
    terms.set_yscale("log")
    terms.legend(title="its terms:", alignment="left", loc="upper left", bbox_to_anchor=(1, 1), borderpad=0)
    for axes in (loss, terms):
        axes.set_xlabel("epoch", labelpad=1)
        axes.grid(color=FAINT, linewidth=0.4)
        axes.tick_params(labelsize=8)


def facts(prepared: Prepared, settings: Settings, fit: Fit) -> str:
    """One line on the run: settings, epochs, loss, share of sky, gradient before and after."""
    return "   |   ".join((
        f"-dq {stretch_quantile(settings):g}, {len(fit.positions)} points ({settings.initializer}), "
        f"order {settings.order}, smoothing {fit.smoothing:g}, alpha {settings.alpha:g}, seed {settings.seed}",
        f"{len(fit.history)} epochs, loss {fit.history[:, 0].min():.4f}",
        f"{shares(prepared)['used']:.1%} used as sky", gradients(prepared, fit)))


def animation_frames(prepared: Prepared, fit: Fit, width: int = 800) -> np.ndarray:
    """How the surface and its control points settle, and the picture that it leaves.

    Args:
        prepared: what was fitted. fit: with its path.
        width: of a frame, pixels; a portrait's frames are narrower.

    Returns:
        (n, h, w, 3) bytes, n up to 24: the first frame at the start, the last with the final surface.
    """
    from PIL import Image, ImageDraw
    gap, head = 8, 22  # pixels around the two halves, and above them for the words
    rows, columns = prepared.image.shape[:2]
    wide = max(1, min((width - 3 * gap) // 2, int(math.sqrt(110_000 * columns / rows))))
    tall = max(1, wide * rows // columns)
    prepared = thinned(prepared, max(wide, tall))
    stretch, (rows, columns) = display_stretch(prepared.linear), prepared.image.shape[:2]
    # Each surface on every 8th pixel or so, and straight lines between: quick, and enough for the eye.
    corners, coarse = (prepared.centers[0, 0], prepared.centers[-1, -1]), (max(2, rows // 8), max(2, columns // 8))
    places = _grid(*map(np.linspace, *corners, coarse))
    down, along = (scipy.ndimage.zoom(np.eye(nodes, dtype=np.float32), (pixels / nodes, 1), order=1)
                   for nodes, pixels in zip(coarse, (rows, columns)))  # (pixels, nodes)

    def half(linear):
        return Image.fromarray(_drawable(stretch.apply(linear))).resize((wide, tall), Image.BICUBIC)

    steps = fit.track + [(len(fit.history), fit.positions, fit.values)]
    # Most happens early: steps at equal distances of the square root of the epoch.
    chosen = sorted({int(k) for k in np.round(np.linspace(0, 1, 24)**2 * (len(steps) - 1))})
    frames = np.empty((len(chosen), head + tall + gap, 3 * gap + 2 * wide, 3), np.uint8)
    for frame, k in zip(frames, chosen):
        epoch, positions, values = steps[k]
        nodes = linear_sky(prepared, replace(fit, positions=positions, values=values))(places).astype(np.float32)
        sky = np.einsum("yn,nmc,xm->yxc", down, nodes, along, optimize=True)
        model = half(sky)
        pen = ImageDraw.Draw(model)
        scale = np.array((tall - 1, wide - 1)) / np.maximum((rows - 1, columns - 1), 1)
        for y, x in _pixel_positions(prepared, positions) * scale:
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill="#f0e442", outline="black")
        canvas = Image.new("RGB", frame.shape[1::-1], PAPER)
        canvas.paste(model, (gap, head))
        canvas.paste(half(_keep_median(prepared.linear, prepared.linear - sky)), (2 * gap + wide, head))
        pen = ImageDraw.Draw(canvas)
        last = k == len(steps) - 1
        pen.text((gap, 5), f"sky model, best of {epoch} epochs" if last else f"sky model, epoch {epoch}", INK)
        pen.text((2 * gap + wide, 5), "the picture without it", INK)
        frame[:] = canvas
    return frames


def write_animation(file, frames: np.ndarray, most_bytes: int = 2_900_000) -> None:
    """Write frames, (n, h, w, 3) bytes, as a GIF that repeats: some 4 seconds, in fewer colors if it gets too large."""
    from PIL import Image
    pause = [130] * (len(frames) - 1) + [1500]  # milliseconds
    # One palette for all frames, from the first, a middle, and the last: what does not change stays the same. Most
    # colors where most pixels are (no bands in the sky), the rest where few are (the bright stay colored).
    sample = Image.fromarray(np.concatenate(frames[[0, len(frames) // 3, -1], ::3, ::3]))
    for colors in (255, 128, 64, 32, 16):
        palette = Image.new("P", (1, 1))
        palette.putpalette(sum((sample.quantize(count, method).getpalette()[:3 * count]
                                for count, method in ((3 * colors // 4, 0), (colors // 4, 1))), []))
        first, *others = (Image.fromarray(frame).quantize(palette=palette, dither=0) for frame in frames)
        packed = io.BytesIO()
        first.save(packed, "GIF", save_all=True, append_images=others, duration=pause, loop=0, optimize=False)
        if packed.tell() <= most_bytes:
            break
    file.write(packed.getvalue())


def _pixel_positions(prepared: Prepared, positions: np.ndarray) -> np.ndarray:
    """Control points (n, 2) in frame coordinates -> (row, column) in pixels of the (thinned) reduced frame."""
    first, last = prepared.centers[0, 0], prepared.centers[-1, -1]
    return (positions - first) / np.maximum(last - first, 1e-9) * (np.array(prepared.image.shape[:2]) - 1)


def _channel_letters(prepared: Prepared) -> str:
    return "RGB" if prepared.image.shape[-1] == 3 else "L"


def _drawable(image: np.ndarray) -> np.ndarray:
    """(h, w, c) in [0, 1], NaN where nothing is -> (h, w, 3) bytes."""
    image = np.round(255 * np.clip(np.nan_to_num(image), 0, 1)).astype(np.uint8)
    return np.broadcast_to(image, image.shape[:2] + (3,))


def _show(axes, image: np.ndarray, title: str, blank=(0, 0, 0)) -> None:
    """Draw a stretched picture; NaN in the color `blank`."""
    blank = np.round(255 * np.array(blank)).astype(np.uint8)
    colors = np.where(np.isfinite(image).all(-1, keepdims=True), _drawable(image), blank)
    axes.imshow(colors, interpolation="bicubic" if max(colors.shape) < 300 else "antialiased")
    axes.set_title(title)
    axes.set(xticks=[], yticks=[])


def _overlay(axes, reasons: dict[str, np.ndarray]) -> None:
    """Hatch what is left out, in colors and slopes that tell the reasons apart, with a legend of those that occur."""
    from matplotlib import rc_context
    from matplotlib.patches import Patch
    legend = []
    for reason, (color, hatch, label) in OVERLAYS.items():
        area = reasons[reason]
        if area.any():
            legend.append(Patch(facecolor=color, edgecolor=PAPER, hatch=hatch, label=label))
            if min(area.shape) > 1:
                with rc_context({"hatch.color": color}):
                    dark = (0, 0, 0, 0.35)  # between the lines, so that these are seen on any color
                    axes.contourf(area, (0.5, 1.5), colors=[dark if hatch else color], hatches=[hatch])
                axes.contour(area, (0.5,), colors=[color], linewidths=1)
    axes.legend(handles=legend, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3)


def _draw_contours(axes, values: np.ndarray) -> None:
    """Lines of equal brightness (h, w), with their scale in the picture's own units."""
    low, high = np.quantile(values, (0.005, 0.995))
    if high - low < 1e-9 or min(values.shape) < 2:
        return
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator
    levels = MaxNLocator(8).tick_values(low, high)
    lines = axes.contour(values, levels, colors=colormaps["plasma"](np.linspace(0.4, 1, len(levels))), linewidths=1.3)
    for line in _draw_scale(axes, lines, levels[::2]).collections:
        line.set_linewidth(5)


def _draw_scale(axes, drawn, ticks):
    """A color bar below a panel; returns its axes."""
    bar = axes.inset_axes([0.02, -0.06, 0.96, 0.025])
    axes.figure.colorbar(drawn, cax=bar, orientation="horizontal", ticks=ticks)
    bar.tick_params(labelsize=7, length=0, pad=2)
    return bar


def _import_matplotlib():
    """matplotlib, also where a notebook has handed down the name of a backend that this Python does not have."""
    backend = os.environ.get("MPLBACKEND", "")
    if backend.startswith("module://") and importlib.util.find_spec(backend[9:].split(".")[0]) is None:
        del os.environ["MPLBACKEND"]
    import matplotlib
    return matplotlib


def display_kind() -> str | None:
    """Where a picture can be shown: "notebook" (an IPython kernel), "window", or None."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if hasattr(shell, "kernel"):
        return "notebook"
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return None
    try:
        _import_matplotlib()
        from matplotlib import pyplot
        canvas = pyplot.figure().canvas
        pyplot.close()
        return "window" if getattr(canvas, "required_interactive_framework", None) else None
    except Exception:  # no toolkit, no screen, or a notebook's backend handed down to a subprocess
        return None


def put_picture(draw: Callable, where: str, path: str) -> None:
    """Draw and show, or save. `draw` gets the empty figure; `where` is "notebook", "window" or "file"."""
    matplotlib = _import_matplotlib()
    from matplotlib.figure import Figure
    with matplotlib.rc_context(STYLE):
        if where == "window":
            from matplotlib import pyplot
            draw(pyplot.figure(figsize=FIGURE_SIZE))
            return
        figure = Figure(FIGURE_SIZE)  # without pyplot it needs no display and touches no setting of the user's
        draw(figure)
        if where == "notebook":
            from IPython.display import Image, display
            packed = io.BytesIO()
            figure.savefig(packed, format="png")
            display(Image(packed.getvalue()))
        else:
            with atomic_outputs(path) as (file,):
                figure.savefig(file, format="png", pil_kwargs={"compress_level": 3})


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
    """The command line; every default is the one of `Settings`."""
    default = Settings()
    purpose, heading, examples = (__doc__ or "").partition("examples:")
    parser = _Parser(prog="bgoptimizer.py", description=purpose, epilog=heading + examples, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("input_file", help="linear XISF, FITS or TIFF picture, gray or RGB")
    add("output_path", nargs="?", default=".", help="folder for what is written; made if missing (default: .)")
    add("-c", "--compress", action="store_true", 
        help="compress the outputs without loss: lz4hc with byte shuffling, in FITS GZIP_2, in TIFF deflate "
             "(default: off)")
    add("-dx", "--downscaling-factor", type=int, default=default.downscaling_factor,
        help="side of the pixel blocks that the fit sees as one pixel (default: %(default)s)")
    add("-df", "--downscaling-func", choices=("median", "mean"), default=default.downscaling_func,
        metavar="DOWNSCALING_FUNC",
        help="what a block is reduced to, median or mean; the median drops small stars (default: %(default)s)")
    add("-dq", "--delinearization-quantile", type=float,
        help="quantile of the picture that the stretch takes to 1; what is brighter is clipped for the fit. Lower "
             "stretches more; raise it when the preview shows blown out sky "
             f"(default: {DEFAULT_QUANTILE}, with --auto {AUTO_QUANTILE})")
    add("-p", "--preview", action="store_true",
        help="show stretch, mask and histograms, fit nothing, write no model (default: off)")
    add("-N", dest="points", metavar="N", type=int,
        help="number of control points; more follow a more complicated sky, and objects too "
             f"(default: {DEFAULT_POINTS}, with --auto {AUTO_POINTS})")
    add("-O", dest="order", metavar="O", type=int, choices=(1, 2, 3, 4), default=default.order,
        help="order of the spline, 1 to 4; 2 is a thin plate, 3 is cubic (default: %(default)s)")
    add("-tm", "--threshold-min", type=float, default=default.threshold_min,
        help="leave out what is darker in the stretched picture (default: %(default)s)")
    add("-tM", "--threshold-max", type=float, default=default.threshold_max,
        help="leave out what is brighter in the stretched picture; lower it to mask objects (default: %(default)s)")
    add("-m", "--mask",
        help="mask, XISF, FITS or TIFF, of the picture's height and width, 1 channel or as many: 1 = use, 0 = leave out, "
             "between = weight (default: none)")
    add("-i", "--initializer", choices=("random", "grid"), default=default.initializer, metavar="INITIALIZER",
        help="where the control points start, random or grid (default: %(default)s)")
    add("-e", "--epochs", type=int, default=default.epochs,
        help="most epochs; the fit stops before when nothing improves (default: %(default)s)")
    add("-a", "--alpha", type=float, default=default.alpha,
        help="weight of the penalties on a sky that is negative or brighter than the picture (default: %(default)g)")
    add("-B", dest="batch", metavar="B", type=int, default=default.batch,
        help=f"batch size: independent samples of {SAMPLE_PIXELS} pixels that the fit sees (default: %(default)s)")
    add("-lr", dest="learning_rate", metavar="LR", type=float, default=default.learning_rate,
        help="learning rate at the start (default: %(default)s)")

    add = parser.add_argument_group("more").add_argument
    add("--auto", action="store_true",
        help="find objects and leave them out; what you give by hand stays (default: off)")
    add("--smoothing", type=_smoothing, default=None, metavar="{auto,NUMBER}",
        help="stiffness of the surface: 0 goes through every control point, 10 is nearly a plane "
             "(default: auto, chosen from the picture)")
    add("--correction", choices=("subtract", "divide"), default=default.correction,
        help="what is done with the sky: subtract it, or divide by it, against vignetting (default: %(default)s)")
    add("--format", choices=tuple(FORMATS), default=None,
        help="format of the outputs (default: the one of the input)")
    add("--seed", type=int, default=default.seed,
        help="of all random numbers; the same command gives the same pictures (default: %(default)s)")
    add("--save-mask", action="store_true",
        help="also write <name>_mask.xisf, the mask in force, to edit and give back with -m (default: off)")
    add("--figures", choices=("auto", "show", "save", "none"), default="auto",
        help="result figure or preview: show it in a window or notebook, save it as PNG, or neither; auto shows it "
             "where it can, and saves the preview where it cannot (default: %(default)s)")
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
    picture_read = _read(options.input_file, say)
    planes = picture_read.planes
    if options.preview:  # a plain run's smoothing takes a second to choose, and is not shown
        settings = settings if settings.auto else replace(settings, smoothing=0.0)
    else:
        _check_room(planes, options)
        _start_importing()
    prepared, settings = examine(
        planes, settings, _read_mask(options.mask), say)
    _report(prepared, settings, say)
    title = os.path.basename(options.input_file).encode("utf-8", "replace").decode().replace("$", r"\$")  # no formula
    if options.preview:
        written, picture = [], paths["preview"]
        draw = functools.partial(draw_preview, prepared=prepared, settings=settings, title=title)
    else:
        fit = _fit(prepared, settings, options.quiet, interrupts, say)
        written = _subtract_and_write(picture_read, prepared, settings, fit, options, paths, say)
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


def _subtract_and_write(picture_read: Picture, prepared: Prepared, settings: Settings, fit: Fit,
                        options: argparse.Namespace, paths: dict[str, str], say: Callable[[str], None]) -> list[str]:
    """Take the sky out of a picture's planes and write what was asked for; returns the paths."""
    planes, source, unit = picture_read.planes, picture_read.source, picture_read.unit
    sky = full_size_sky(prepared, fit, planes.dtype)
    if settings.correction == "divide":
        offsets, below, above = divide(planes, sky, -unit.offset / unit.scale)
        offsets = offsets * unit.scale  # the model's medians
    else:
        offsets, below, above = subtract(planes, sky, prepared.median)
        offsets = offsets * unit.scale + unit.offset  # so that picture - model + offset holds in the own unit too
    say(gradients(prepared, fit))
    words = "offsets: " if settings.correction == "subtract" else "divided by the sky, times its median: "
    say(words + ", ".join(map("{} {:.6f}".format, _channel_letters(prepared), offsets)))
    say(f"clipped: {below.sum()} samples at 0, {above.sum()} at 1, of {planes.size}")
    pictures = {"model": (sky, source, "the sky", unit),
                "subtracted": (planes, source, "the picture without the sky", unit)}
    if options.save_mask:
        pictures["mask"] = full_mask(prepared, settings), None, "the mask, 1 = sky", Unit()
    outputs = {kind: path for kind, path in paths.items() if kind != "figures"}
    history = _history(options, settings, fit, offsets)
    with atomic_outputs(*outputs.values()) as opened:
        files = dict(zip(outputs, opened))
        write = FORMATS[options.format or picture_read.format].write
        for kind, (picture, metadata, what, own) in pictures.items():
            lines = history + [f"bgoptimizer: this is {what}"]
            write(files[kind], picture, metadata, lines, options.compress, own)
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
    what = "offset" if settings.correction == "subtract" else "model's median"
    return lines + [f"bgoptimizer: {what} of channel {k} = {offset:.9g}" for k, offset in enumerate(offsets)]


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
    """Everything about paths that can fail is tried before the work, so that nobody waits for what cannot be saved.

    Returns:
        What the run may write -> its path.
    """
    given = [path for path in (options.input_file, options.mask) if path is not None]
    for path in given:
        if not os.path.exists(path):
            raise BgError(f"{path or 'a file without a name'} does not exist; check the name")
        if os.path.isdir(path):
            raise BgError(f"{path} is a folder; name an XISF, FITS or TIFF file in it")
    folder, stem = options.output_path, picture_stem(options.input_file)
    ending = FORMATS[options.format or picture_format(options.input_file) or "xisf"].ending
    corrected = "bgSubtracted" if options.correction == "subtract" else "bgDivided"
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise BgError(f"{folder} is a file, not a folder; name a folder for the outputs")
    kinds = (("preview", "preview.png", options.preview), ("model", "bgModel" + ending, not options.preview),
             ("subtracted", corrected + ending, not options.preview), ("mask", "mask" + ending, options.save_mask),
             ("animation", "optimization.gif", options.animate), ("figures", "figures.png", not options.preview))
    paths = {kind: os.path.join(folder, f"{stem}_{name}") for kind, name, wanted in kinds if wanted}
    if os.path.isdir(folder) or not (options.preview and options.figures in ("show", "none")):
        try:
            os.makedirs(folder, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise BgError(f"cannot write to {folder}: {error.strerror}; choose another folder") from None
    for path in paths.values():
        for kept in given:
            if os.path.exists(path) and os.path.samefile(path, kept):
                raise BgError(f"{path} would be overwritten, and you gave it to read; choose another output folder")
    return paths


def _place_for_pictures(options: argparse.Namespace) -> str | None:
    """Where the preview or the figures go: "notebook", "window", "file", or None."""
    if options.figures in ("save", "none"):
        return {"save": "file", "none": None}[options.figures]
    kind = display_kind()
    if kind is None and options.figures == "show":
        raise BgError("there is neither a notebook nor a window to show figures in; use --figures save")
    return kind or ("file" if options.preview else None)


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


def _read(path: str, say: Callable[[str], None]) -> Picture:
    picture = read_picture(path)
    for text in picture.warnings:
        _warn(f"{path} {text}")
    count, height, width = picture.planes.shape
    say(f"{path}: {width} x {height}, {'gray' if count == 1 else 'RGB'}, {picture.planes.dtype}"
        + (f"; {picture.note}" if picture.note else ""))
    return picture


def _read_mask(path):
    """Return the weights that a mask file gives, (c, h, w); None without a file."""
    if path is None:
        return None
    picture = _read(path, _quiet)
    if picture.unit.offset:
        raise BgError(f"{path} has negative values; a mask has 0 = leave out to 1 = use")
    return mask_weights(picture.planes * picture.planes.dtype.type(picture.unit.scale))


def _check_room(planes: np.ndarray, options: argparse.Namespace) -> None:
    """Refuse if the outputs do not fit on the disk; warn if the memory may not suffice.

    A system short of memory ends the run without a word. Linux tells how much is free.
    """
    needed, free = (2 + options.save_mask) * planes.nbytes, shutil.disk_usage(options.output_path).free
    if free < needed and not options.compress:
        raise BgError(f"{options.output_path} has {free / 1e6:.0f} MB free and the outputs need {needed / 1e6:.0f} MB; "
                      "free space, choose another folder, or try --compress")
    needed, free = 0.6e9 + 2 * planes[0].nbytes, math.inf  # TensorFlow, and two planes while writing
    with suppress(OSError, ValueError, IndexError):
        with open("/proc/meminfo") as file:
            free = 1024 * [int(line.split()[1]) for line in file if line.startswith("MemAvailable")][0]
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            free = min(free, int(limit.read()) - int(used.read()))
    if free < needed:
        _warn(f"about {needed / 1e9:.1f} GB more memory is needed and {free / 1e9:.1f} GB are free; "
              "if the run dies, close other programs, or crop the picture or split its channels")


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
def _progress(epochs: int, quiet: bool, say: Callable[[str], None]) -> Iterator[Callable[[int, float], None]]:
    """Yields what is called after each epoch: it moves a bar on a terminal, and says every 100th epoch elsewhere."""
    if quiet or not (sys.stderr and sys.stderr.isatty()):  # None: closed by the caller
        yield lambda epoch, loss: say(f"epoch {epoch:4d}  loss {loss:.4f}") if epoch % 100 == 0 else None
        return
    from tqdm import tqdm
    with tqdm(total=epochs, desc="fitting", unit="epoch", leave=False) as bar:
        def on_epoch(epoch, loss):
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update()
        yield on_epoch


if __name__ == "__main__":
    sys.exit(main())
