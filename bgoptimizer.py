#!/usr/bin/env python3
"""Take the uneven sky out of a linear astrophoto.

Light pollution, moonlight and airglow lay a smooth, uneven veil over every deep-sky picture. Where it
ends and a nebula begins no single pixel can tell, but the veil is smooth and most of the frame shows
nothing else. bgoptimizer uses all of it: it reduces, stretches and masks a copy of the picture, fits one
polyharmonic spline surface to the sky in that copy by gradient descent, and takes the surface, brought
back to linear full size, out of the picture. Nobody places samples.

    bgoptimizer.py m31.xisf                      model and subtracted picture, beside where you stand
    bgoptimizer.py m31.xisf out --auto           let the tool choose mask, stretch and smoothing
    bgoptimizer.py m31.xisf --preview -dq 0.99   look at stretch and mask first; nothing is fitted
    bgoptimizer.py m31.xisf out -m stars.xisf    with a mask of your own (1 = sky, 0 = leave out)

From Python:

    import bgoptimizer
    result = bgoptimizer.optimize(image, bgoptimizer.Settings(auto=True))   # image: (h, w, c), linear, 0..1
    result.subtracted, result.model                                         # (h, w, c) each
"""
from __future__ import annotations

import argparse
import base64
import copy
import hashlib
import importlib.util
import io
import itertools
import math
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
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple
from xml.etree import ElementTree
from xml.parsers import expat

# Full-size work has threads of its own, and the equations solved here are small: threads of BLAS beside them only
# get in each other's way (the choices of --auto take 2.7 s with them, 0.8 s without). OpenBLAS looks once, when loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np  # noqa: E402

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

SURFACE_CELLS = 500
"""The full-size surface is the spline itself on about this many nodes along the longer side, and cubic
interpolation between them; far finer than the surface bends (see `SkySurface`)."""

STRIP_PIXELS = 1 << 18
"""Pixels of one channel handled at a time in full-size work: 1 MB of Float32, which stays in cache."""

PATH_EVERY = 10
"""Epochs between two recordings of the control points."""

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

    downscaling_factor: int = 8
    downscaling_func: str = "median"
    delinearization_quantile: Optional[float] = None  # 0.95; with auto 0.999
    points: Optional[int] = None  # 32; with auto more
    order: int = 2
    threshold_min: float = 0.001
    threshold_max: float = 1.0
    initializer: str = "random"
    epochs: int = 1000
    alpha: float = 5.0
    batch: int = 1
    learning_rate: float = 0.001
    smoothing: Optional[float] = None  # chosen by cross-validation
    auto: bool = False
    seed: int = 0

    def __post_init__(self):
        checks = (
            ("-dx", 1 <= self.downscaling_factor <= 1_000_000, "1 to 1000000"),
            ("-df", self.downscaling_func in ("median", "mean"), "median or mean"),
            ("-dq", self.delinearization_quantile is None or 0 < self.delinearization_quantile <= 1, "above 0, at most 1"),
            ("-N", self.points is None or 3 <= self.points <= 4096, "3 to 4096"),
            ("-O", self.order in (1, 2, 3, 4), "1, 2, 3 or 4"),
            ("-tm", math.isfinite(self.threshold_min), "a finite number"),
            ("-tM", self.threshold_min < self.threshold_max < math.inf, "a finite number above -tm"),
            ("-i", self.initializer in ("random", "grid"), "random or grid"),
            ("-e", self.epochs >= 1, "1 or more"),
            ("-a", 0 <= self.alpha <= 1e9, "0 to 1e9"),
            ("-B", self.batch >= 1, "1 or more"),
            ("-lr", 0 < self.learning_rate <= 1e9, "above 0, at most 1e9"),
            ("--smoothing", self.smoothing is None or 0 <= self.smoothing <= 1e9, "auto, or 0 to 1e9"),
            ("--seed", 0 <= self.seed < 2**32, "0 to 4294967295"),
        )
        for flag, good, wanted in checks:
            if not good:
                raise ValueError(f"{flag} must be {wanted}")


def _quiet(*_):
    """The default listener for a run's messages: nobody."""


# ---------------------------------------------------------------------------------------------------------
# XISF in and out
#
# The specification: https://pixinsight.com/doc/docs/XISF-1.0-spec/XISF-1.0-spec.html; where it is silent or PixInsight
# reads more, PixInsight's reader decides. lz4 and zstandard come with the `xisf` package but are called directly: the
# package expands blocks unbounded, and knows no sub-blocks, bounds, byte order, pixel storage or checksums. Error
# sentences inside begin with their verb; read_xisf puts the file's name before and, where none is given, advice behind.
# ---------------------------------------------------------------------------------------------------------

XISF_ROOT = {"version": "1.0", "xmlns": "http://www.pixinsight.com/xisf",
             "xmlns:xsi": "http://www.w3.org/2001/XMLSchema-instance",
             "xsi:schemaLocation": "http://www.pixinsight.com/xisf http://pixinsight.com/xisf/xisf-1.0.xsd"}
XISF_TYPES = {"uint8": "u1", "uint16": "u2", "uint32": "u4", "uint64": "u8", "float32": "f4", "float64": "f8"}
CHECKSUMS = {"sha-1": "sha1", "sha1": "sha1", "sha-256": "sha256", "sha256": "sha256", "sha-512": "sha512",
             "sha512": "sha512", "sha3-256": "sha3_256", "sha3-512": "sha3_512"}  # XISF's names and hashlib's
CODEC_RATIOS = {"zlib": 1032, "lz4": 255, "lz4hc": 255, "zstd": 1 << 16}  # no stream of that codec expands further
LZ4_LIMIT = 0x7E000000  # bytes; the largest LZ4 block. PixInsight fails on sub-blocks of more than 2 GiB together
HEADER_BYTES, HEADER_PARTS, HEADER_DEPTH = 1 << 23, 500_000, 64  # parts: elements, attributes. Real ones are far below
SAMPLES_AT_ONCE = 1 << 18  # converted together: few enough for the processor's cache
ALIGNMENT = 4096  # bytes; blocks start at multiples of it, as in PixInsight's own files
COMPRESSION = re.compile(r"(zlib|lz4|lz4hc|zstd)(\+sh)?:([1-9][0-9]{0,17})(?::([1-9]|1[0-6]))?")
INTEGER = re.compile(r"\+?(0|[1-9][0-9]{0,17}|0x[0-9a-fA-F]{1,15})")  # no leading zeros: 010 is 8 to PixInsight
ENCODING = re.compile(r"<\?xml[^>]*\sencoding\s*=\s*[\"'](?!(utf-?8|utf-16|iso-8859-1)[\"'])", re.I)  # but UTF-8 is meant
# Characters XML 1.0 forbids, bare and as references: PixInsight lets them pass, XML parsers refuse the file
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
NOT_XML_REFERENCE = re.compile("&#(0*([0-8]|1[124-9]|2[0-9]|3[01])|x0*([0-8bcef]|1[0-9a-f]));", re.I)
# Of "element name": what describes the old file, what the new pixels make untrue, and where in the sky the picture is
OF_THE_FILE = re.compile(r"(Data|Thumbnail) |Property XISF:(Creat|Compress|BlockAlign|MaxInline|Checksum|OutputHint"
                         r"|InputHint|ResourceURL|Load)")
OF_THE_PIXELS = re.compile(r"FITSKeyword (BITPIX|NAXIS\d*|BSCALE|BZERO|DATAMIN|DATAMAX|CHECKSUM|DATASUM|PEDESTAL"
                           r"|NOISE[A-Z]?\d*)$|Property (.*:)?(Statistics|Noise)(:|$)")
OF_THE_SKY = re.compile(r"Property (PCL:AstrometricSolution|Observation:(Center|CelestialReferenceSystem|Equinox)|Instrument"
                        r":(Telescope:FocalLength|Sensor:[XY]PixelSize))(:|$)|FITSKeyword (RA|DEC|OBJCTRA|OBJCTDEC|RADESYS"
                        r"|EQUINOX|LONPOLE|LATPOLE|(CTYPE|CRPIX|CRVAL|CDELT|CROTA|CUNIT|CD|PC|PV|AP?|BP?)_?(\d.*|ORDER))$")


@dataclass
class Source:
    """What the outputs carry over from a file besides its pixels."""
    root: ElementTree.Element  # the header, but for what describes the old pixels and the old file
    blocks: dict  # attached bytes, by the `location` written in their elements


@dataclass
class Picture:
    """An image in [0, 1]. Samples that are exactly 0 or not finite are missing."""
    planes: np.ndarray  # (c, h, w), c = 1 or 3; float32, or float64 if the file holds Float64
    source: Source
    warnings: list  # of str, one line each


@dataclass
class _Opened:
    """A file whose header has been read."""
    file: object
    start: int  # where blocks may begin
    size: int
    room: int  # bytes of blocks that may still be read: overlapping ones could fill any memory


def read_xisf(path):
    """Read the first image of a monolithic XISF file.

    Integers are scaled from their full range, or from `bounds` if given, floats from `bounds`. Samples below the lower
    bound become the smallest normal number, not 0, which would mean "missing"; above the upper bound, 1.
    Returns a Picture. Raises BgError if the file is damaged, hostile or of a kind that is not read; memory never grows
    past what an honest file of the same geometry and size needs.
    """
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)  # opening a FIFO would wait forever
        _require(regular, "is not a file; name an XISF file, or save the data to one first")
        with open(path, "rb") as file:
            root, opened = _read_header(file)
            warnings = []
            planes = _read_pixels(root, opened, warnings)
            return Picture(planes, _read_source(root, opened, warnings), warnings)
    except BgError as error:
        raise BgError(f"{path} {error}" + ("" if ";" in str(error) else "; copy or save it again")) from None
    except OSError as error:
        raise BgError(f"{path} cannot be read: {error.strerror or error}; check the path and the disk") from None
    except MemoryError:
        raise BgError(f"{path} needs more memory than there is; close other programs or crop the picture") from None


def _require(fact, otherwise):
    """Refuse what is being read unless `fact` holds."""
    if not fact:
        raise BgError(otherwise)


def _read_header(file):
    """Returns the root element, and the file as one whose header has been read."""
    start, size = file.read(16), os.fstat(file.fileno()).st_size
    length = int.from_bytes(start[8:12], "little")
    _require(start[:8] == b"XISF0100", "is not a monolithic XISF file; save the picture as .xisf")
    _require(16 + length <= size, f"is cut short: its header ends at byte {16 + length} of {size}")
    _require(length <= HEADER_BYTES, "has a header too large to be true")
    header = file.read(length).split(b"\0", 1)[0]  # some writers count padding in
    _require(header.count(b"<") + header.count(b"=") <= HEADER_PARTS, "has a header too large to be true")
    text = header.decode("utf-8-sig", "replace").lstrip()
    _require(not ENCODING.match(text), "has a header that is not UTF-8")
    _require(not re.search("<!(ENTITY|ATTLIST)", text), "declares XML entities or defaults, which can hide a memory bomb")
    text = NOT_XML_REFERENCE.sub("", NOT_XML.sub("", text))
    text = "".join(text.rpartition("</xisf>")[:2]) or text  # a signature may follow
    builder, parser = ElementTree.TreeBuilder(), expat.ParserCreate()  # no namespaces: as in PixInsight, bare names count
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.CharacterDataHandler, parser.buffer_text = builder.data, True
    try:
        parser.Parse(text, True)
    except expat.ExpatError as error:
        raise BgError(f"has a header that is not well-formed XML ({error})") from None
    root = builder.close()
    _require(root.tag == "xisf" and _value(root.attrib, "version") == "1.0", "is not XISF version 1.0")
    _require(root.find("*/" * HEADER_DEPTH + "*") is None, "has a header nested too deeply to be true")
    return root, _Opened(file, 16 + length, size, 2 * size)


def _value(attributes, name, default=""):
    """White space around a value and its colons and commas means nothing."""
    return re.sub(r"\s*([:,])\s*", r"\1", attributes.get(name, default).strip())


def _integers(text, what):
    """The numbers between colons."""
    _require(all(INTEGER.fullmatch(part) for part in text.split(":")), f"has a malformed {what} {text[:40]!r}")
    return [int(part, 0) for part in text.split(":")]


def _one_of(choices, text, what):
    """What `text` stands for."""
    _require(text in choices, f"has {what} {text[:40]!r}, which is not read; save it as 32-bit float, grayscale or RGB")
    return choices[text]


def _read_block(element, opened):
    """Returns an element's bytes as they are stored, (n,) uint8, and the attributes that tell how they are packed."""
    location, attributes = _value(element.attrib, "location"), element.attrib
    method, _, rest = location.partition(":")
    # url() and path() belong to distributed files: nothing but this file is ever opened
    _require(method in ("attachment", "inline", "embedded"),
             f"has its data elsewhere, at {location[:40]!r}; save it as one monolithic .xisf file")
    if method == "attachment":
        where = _integers(rest, "location")  # position and size
        _require(len(where) == 2 and where[0] >= opened.start, f"has an impossible location {rest[:40]!r}")
        _require(sum(where) <= opened.size, f"is cut short: its data end at byte {sum(where)} of {opened.size}")
        opened.room -= where[1]
        _require(opened.room >= 0, "has data that overlap with others")
        opened.file.seek(where[0])
        stored = np.fromfile(opened.file, np.uint8, where[1])
    else:
        data = element if method == "inline" else element.find("Data")
        _require(data is not None, "has an embedded data block without data")
        if method == "embedded":
            attributes, rest = {**attributes, **data.attrib}, _value(data.attrib, "encoding", "base64")
        decoders = {"base64": lambda text: base64.b64decode(text, validate=True), "hex": bytes.fromhex}
        decode = _one_of(decoders, rest.lower(), "data in the encoding")
        try:
            stored = np.frombuffer(bytearray(decode("".join((data.text or "").split()))), np.uint8)
        except ValueError:
            raise BgError(f"has damaged {rest} data") from None
    if "checksum" in attributes:
        name, _, digest = _value(attributes, "checksum").lower().partition(":")
        actual = hashlib.new(_one_of(CHECKSUMS, name, "a checksum of the kind"), stored).hexdigest()
        _require(actual == digest, "is damaged: its data do not match their checksum")
    return stored, attributes


def _read_samples(image, opened, kind, count):
    """Returns the image's `count` samples as they are stored, (count,) of the type `kind` in the file's byte order."""
    stored, attributes = _read_block(image, opened)
    order = _one_of({"little": "<", "big": ">"}, _value(attributes, "byteOrder", "little"), "the byte order")
    dtype = np.dtype(order + kind)
    codec, size, item = None, len(stored), 1
    if "compression" in attributes:
        packing = _value(attributes, "compression").lower()
        match = COMPRESSION.fullmatch(packing)
        _require(match and (match[4] or not match[2]), f"is compressed in the unknown way {packing[:40]!r}")
        codec, size, item = match[1], int(match[3]), int(match[4]) if match[2] else 1
    # Checked before memory is taken that the stored bytes do not vouch for
    _require(size == count * dtype.itemsize, f"is damaged: its data hold {size} bytes, not {count} samples")
    if not codec:
        return stored.view(dtype)
    sizes = [len(stored), size]  # of each piece, as stored and in full
    if "subblocks" in attributes:
        sizes = _integers(_value(attributes, "subblocks").replace(",", ":"), "list of sub-blocks")
    fit = len(sizes) % 2 == 0 and 0 not in sizes and sum(sizes[::2]) == len(stored) and sum(sizes[1::2]) == size
    _require(fit, "has a compressed block that contradicts itself")
    pieces = np.split(stored, np.cumsum(sizes[:-2:2]))
    pieces = [_decompress(codec, memoryview(piece), full) for piece, full in zip(pieces, sizes[1::2])]
    data = np.frombuffer(b"".join(pieces), np.uint8)  # of one piece: that piece itself, not a copy
    del stored, pieces
    samples, items = np.empty(size, np.uint8), size // item
    for byte in range(item):  # shuffled data are byte 0 of every item, then byte 1, ...; then the rest as it was
        samples[byte:items * item:item] = data[byte * items:(byte + 1) * items]
    samples[items * item:] = data[items * item:]
    return samples.view(dtype)


def _decompress(codec, stored, size):
    """Returns the `size` bytes that `stored` holds; never expands further."""
    import lz4.block
    import zstandard
    if len(stored) == size:  # what does not shrink is stored as it was
        return stored
    _require(size <= CODEC_RATIOS[codec] * len(stored), "claims more data than its compressed block can hold")
    data = b""
    with suppress(zlib.error, lz4.block.LZ4BlockError, zstandard.ZstdError, ValueError, OverflowError):
        if codec == "zlib":
            decoder = zlib.decompressobj()
            data = decoder.decompress(stored, size + 1)
            data = data if decoder.eof else b""  # the stream's own checksum stands at its end
        elif codec == "zstd":
            data = zstandard.decompress(stored) if zstandard.frame_content_size(stored) == size else b""
        else:
            data = lz4.block.decompress(stored, uncompressed_size=size)
    if len(data) != size:  # PixInsight takes the first bytes as they are; other programs keep a longer stream
        _require(len(stored) > size, "is damaged: its data cannot be decompressed")
        return stored[:size]
    return data


def _read_pixels(root, opened, warnings):
    """Returns the first image's samples, (c, h, w) in [0, 1]; adds to `warnings`."""
    images = root.findall("Image")
    _require(images, "holds no image; open it in the program that wrote it and save the image again")
    if len(images) > 1:
        warnings.append(f"holds {len(images)} images: only the first is used and kept")
    attributes = images[0].attrib
    kind = _one_of(XISF_TYPES, _value(attributes, "sampleFormat").lower(), "samples of the kind")
    colors = _one_of({"gray": 1, "rgb": 3}, _value(attributes, "colorSpace", "Gray").lower(), "the color space")
    storage = _value(attributes, "pixelStorage", "Planar").lower()
    normal = _one_of({"planar": False, "normal": True}, storage, "its samples in the order")
    geometry = _integers(_value(attributes, "geometry"), "geometry")
    _require(len(geometry) == 3 and 0 not in geometry, "is no two-dimensional picture; save it as width:height:channels")
    w, h, c = geometry
    _require(c >= colors, f"is called RGB but has {c} channel(s)")
    if c > colors:
        warnings.append(f"has {c - colors} alpha channel(s): dropped")
    samples = _read_samples(images[0], opened, kind, w * h * c)
    lower, upper = _bounds(attributes, samples.dtype)
    samples = (np.moveaxis(samples.reshape(h, w, c), 2, 0) if normal else samples.reshape(c, h, w))[:colors]
    dtype, below, above = np.dtype(np.float64 if kind == "f8" else np.float32), 0, 0
    # Large pictures are mostly planar floats: they stay where they were read
    planes = samples if samples.dtype == dtype and not normal else np.empty((colors, h, w), dtype)
    rows = max(1, SAMPLES_AT_ONCE // w)
    for i, y in itertools.product(range(colors), range(0, h, rows)):
        values, target = samples[i, y:y + rows], planes[i, y:y + rows]
        with np.errstate(all="ignore"):  # NaNs and infinities stay what they are
            if (lower, upper) != (0, 1):
                values = (values.astype(np.float64) - lower) / (upper - lower)
            if not (values.min() >= 0 and values.max() <= 1):
                dark, bright = (values < 0) & (values > -np.inf), (values > 1) & (values < np.inf)
                values = np.where(dark, np.finfo(dtype).tiny, np.where(bright, 1, values))
                below, above = below + np.count_nonzero(dark), above + np.count_nonzero(bright)
            target[...] = values
    if below or above:
        warnings.append(f"has {below} samples below and {above} above its bounds {lower:g}:{upper:g}: clipped")
    return planes


def _bounds(attributes, dtype):
    """The values that mean black and white. Integers may leave them out, floats may not."""
    full = 2.0 ** (8 * dtype.itemsize) - 1 if dtype.kind == "u" else math.inf
    try:
        lower, upper = sorted(float(part) for part in _value(attributes, "bounds", f"0:{full}").split(":")[:2])
    except ValueError:
        lower = upper = math.nan
    possible = 0 < upper - lower < math.inf and (dtype.kind == "f" or 0 <= lower and upper <= full)
    _require(possible, f"has no or impossible bounds, its black and white: {attributes.get('bounds', '')[:40]!r}")
    return lower, upper


def _read_source(root, opened, warnings):
    """Returns the Source; what cannot be carried over is left out and named in `warnings`."""
    image, metadata = root.find("Image"), ElementTree.Element("Metadata")
    loose = {element.get("uid", number): element for number, element in enumerate(root)
             if element.tag not in ("Image", "Metadata", "Signature")}
    for number, child in enumerate(image):  # PixInsight does not follow references: put the element in its place
        if child.tag == "Reference" and child.get("ref") in loose:
            image[number] = loose.pop(child.get("ref"))
    metadata[:] = root.findall("Metadata/Property")
    root = ElementTree.Element("xisf", {name: value for name, value in root.attrib.items() if name.startswith("xmlns:")})
    root[:] = loose.values()
    blocks, untrue, lost = {}, [], []
    for parent in (image, root, metadata):
        kept = []
        for element in parent:
            name = element.get("id") or element.get("name") or ""
            if OF_THE_PIXELS.match(f"{element.tag} {name}"):
                untrue.append(name)
            elif not OF_THE_FILE.match(f"{element.tag} {name}"):
                try:
                    blocks.update(_carry(element, opened, blocks))
                    kept.append(element)
                except BgError as error:
                    lost.append(f"{element.tag} {name[:80]!r}, which {error}")
        parent[:] = kept
    if lost:
        warnings.append(f"loses {len(lost)} element(s): {', '.join(lost)[:300]}")
    if untrue:
        warnings.append(f"had {', '.join(untrue)[:200]}: not kept, the new pixels make them untrue")
    if image.find("ColorFilterArray") is not None:
        warnings.append("is a color filter mosaic: debayer it first, or its colors are fitted as one")
    for name in ("location", "compression", "subblocks", "checksum", "byteOrder", "pixelStorage", "offset"):
        image.attrib.pop(name, None)
    if not re.fullmatch("[_a-zA-Z][_a-zA-Z0-9]*", image.get("id", "_")):
        del image.attrib["id"]
    image.text = image.tail = None  # pixels, if they stood there
    root[:] = [image, *root, metadata]
    return Source(root, blocks)


def _carry(element, opened, blocks):
    """Mend what is sure to be meant in an element; returns its attached bytes that are not in `blocks` yet."""
    if element.tag == "FITSKeyword":
        element.attrib.update({"value": "", "comment": "", **element.attrib})
    if element.tag == "Property" and _value(element.attrib, "type").lower() == "boolean":
        value = _value(element.attrib, "value").lower()
        element.set("value", {"1": "true", "t": "true", "0": "false", "f": "false"}.get(value, value))
    element.tail, attached = None, {}
    for part in element.iter():
        location = part.get("location")
        if location is not None and location not in blocks:  # several elements may share one block
            stored, _ = _read_block(part, opened)
            if "attachment" in location:  # others stand in the element itself
                attached[location] = stored
    return attached


def plate_solution(source):
    """Returns what of a Source is true of any picture of the same frame, a mask for one: where in the sky it is."""
    root = ElementTree.XML("<xisf><Image/><Metadata/></xisf>")
    root.find("Image")[:] = [element for element in source.root.find("Image")
                             if OF_THE_SKY.match(f"{element.tag} {element.get('id') or element.get('name')}")]
    return Source(root, source.blocks)


def write_xisf(file, planes, source=None, history=(), compress=False, image_id=None):
    """Write a picture as a monolithic XISF file.

    file: binary, writable, seekable, empty. planes: (c, h, w), c = 1 or 3, float32 or float64 in [0, 1]; an array, or
    anything with `shape` and `dtype` that yields one (h, w) plane after the other. source: a Source, whose metadata are
    kept; it is not changed. history: lines, added as HISTORY keywords. compress: lz4hc with byte shuffling, or zstd
    where PixInsight would not read that. image_id: the image's name, if not the source's.
    """
    root = copy.deepcopy(source.root) if source else ElementTree.XML("<xisf><Image/><Metadata/></xisf>")
    image, metadata = root.find("Image"), root.find("Metadata")
    (c, h, w), item = planes.shape, planes.dtype.itemsize
    root.attrib.update(XISF_ROOT)
    image.attrib.update(geometry=f"{w}:{h}:{c}", sampleFormat=f"Float{8 * item}", bounds="0:1", location="pixels",
                        colorSpace="RGB" if c == 3 else "Gray", **({"id": image_id} if image_id else {}))
    lines = [part for line in history for part in textwrap.wrap(line, 72)]
    for line in lines:
        ElementTree.SubElement(image, "FITSKeyword", name="HISTORY", value="", comment=line)
    for element in image.findall("Property[@id='Processing:History']"):  # to be kept and appended to, says the text
        if "location" not in element.attrib:
            element.text = "\n".join([element.text or ""] + lines)
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    ElementTree.SubElement(metadata, "Property", id="XISF:CreationTime", type="TimePoint", value=now)
    creator = ElementTree.SubElement(metadata, "Property", id="XISF:CreatorApplication", type="String")
    creator.text = f"bgoptimizer {VERSION}"

    size, pieces = c * h * w * item, (np.ascontiguousarray(plane, f"<f{item}") for plane in planes)
    if compress:
        codec, packed = _compress(planes, size)
        if len(packed) < size:
            image.set("compression", f"{codec}+sh:{size}:{item}")
            size, pieces = len(packed), [packed]
    blocks = {location: (len(block), [block]) for location, block in source.blocks.items()} if source else {}
    blocks["pixels"] = size, pieces
    # The header stands first and names where the blocks behind it are: leave room for that, 64 bytes each are plenty
    places, positions = [element for element in root.iter() if element.get("location") in blocks], {}
    position = 16 + len(_markup(root)) + 64 * len(places)
    for element in places:
        location = element.get("location")
        if location not in positions:
            positions[location] = position + -position % ALIGNMENT
            position = positions[location] + blocks[location][0]
        element.set("location", f"attachment:{positions[location]}:{blocks[location][0]}")
    header = _markup(root)
    file.write(b"XISF0100" + len(header).to_bytes(4, "little") + bytes(4) + header)
    for location, position in positions.items():
        file.seek(position)
        for piece in blocks[location][1]:
            file.write(piece)


def _compress(planes, size):
    """Returns the codec, and the compressed planes: byte 0 of every sample, then byte 1, ..."""
    import lz4.block
    import zstandard
    (c, h, w), item = planes.shape, planes.dtype.itemsize
    shuffled = np.empty((item, c, h * w), np.uint8)
    for channel, plane in enumerate(planes):
        shuffled[:, channel] = np.ascontiguousarray(plane, f"<f{item}").reshape(-1).view(np.uint8).reshape(-1, item).T
    if size > LZ4_LIMIT:
        return "zstd", zstandard.ZstdCompressor(threads=-1).compress(shuffled)
    return "lz4hc", lz4.block.compress(shuffled, mode="high_compression", store_size=False)


def _markup(root):
    """Returns the header. Parsers would turn a bare carriage return or tab into something else."""
    text = '<?xml version="1.0" encoding="UTF-8"?>' + ElementTree.tostring(root, encoding="unicode")
    return NOT_XML.sub("", text).replace("\r", "&#13;").replace("\t", "&#9;").encode()


@contextmanager
def atomic_outputs(*paths):
    """Open files for writing that take the names `paths` only once all are whole, and else leave nothing behind.

    Raises BgError if they cannot be written.
    """
    # Names nobody else has: two runs may write into one folder. open(), not mkstemp(): the results are for all to read
    temps = [os.path.join(os.path.dirname(path), f".bgoptimizer-{secrets.token_hex(8)}.tmp") for path in paths]
    try:
        with ExitStack() as stack:
            yield [stack.enter_context(open(temp, "x+b")) for temp in temps]
        for temp, path in zip(temps, paths):
            os.replace(temp, path)
    except OSError as error:
        folder, reason = os.path.dirname(paths[0]) or ".", error.strerror or error
        raise BgError(f"cannot write to {folder}: {reason}; free space or choose another folder") from None
    finally:
        for temp in temps:
            with suppress(OSError):
                os.unlink(temp)


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
        """Derivative of `apply` at linear samples (..., c), without its clipping: noise times this is stretched noise."""
        m = self.midtones
        x = np.clip((linear - self.pedestal) / self.scale, 0, 1)
        return 3 * m * (1 - m) / ((1 - 4 * m) * x + 3 * m)**2 / self.scale

    def channel(self, k: int) -> "Stretch":
        """The same stretch for channel k alone."""
        return Stretch(*(np.asarray(v)[k:k + 1] for v in (self.pedestal, self.scale, self.midtones)))


def _present(samples: np.ndarray) -> np.ndarray:
    """True where a sample is data: finite and not exactly 0 (what is black but real was read as > 0)."""
    return (samples > 0) & (samples < np.inf)


def _strips(height: int, width: int, multiple: int = 1) -> List[slice]:
    """Slices of rows that cover a plane in strips of about STRIP_PIXELS, each a `multiple` of rows high."""
    rows = max(multiple, STRIP_PIXELS // max(1, width) // multiple * multiple)
    return [slice(top, min(top + rows, height)) for top in range(0, height, rows)]


def _exact_quantiles(strips: Callable[[], Iterator[np.ndarray]], sample: np.ndarray, quantiles: Sequence[float]) -> List[float]:
    """Exact quantiles (the lower of the two middle ones) of more values than one would like to sort.

    A sample brackets each quantile; one pass over the strips counts what lies below the bracket and keeps
    what lies in it. Where a bracket misses, its side is opened and the pass repeated: never an estimate.

    Args:
        strips: called once a pass, yields 1-D arrays that hold all values.
        sample: 1-D subset of the values, at least one.
        quantiles: each in [0, 1].
    """
    sample = np.sort(sample)
    margin = 4 / math.sqrt(sample.size)  # a rank of the sample is off by at most sqrt(1/4 / n), 8 times over
    found = []
    brackets = []
    for q in quantiles:
        low, high = q - margin, q + margin
        brackets.append((sample[int(low * (sample.size - 1))] if low > 0 else -np.inf,
                         sample[int(math.ceil(high * (sample.size - 1)))] if high < 1 else np.inf))
    while True:
        total, below, kept = 0, [0] * len(brackets), [[] for _ in brackets]
        for values in strips():
            total += values.size
            for k, (low, high) in enumerate(brackets):
                inside = values[values >= low]
                below[k] += values.size - inside.size
                kept[k].append(inside[inside <= high])
        found = []
        for k, q in enumerate(quantiles):
            rank, inside = int(q * (total - 1)) - below[k], np.concatenate(kept[k])
            if 0 <= rank < inside.size:
                found.append(float(np.partition(inside, rank)[rank]))
            else:
                brackets[k] = (-np.inf, np.inf)
        if len(found) == len(quantiles):
            return found


def measure_stretch(planes: np.ndarray, quantile: float) -> Tuple[Stretch, np.ndarray]:
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
        plane = planes[k]

        def strips():
            for rows in _strips(*plane.shape):
                values = plane[rows].ravel()
                # NaN fails both comparisons, so this also sends strips with NaN to the slower branch.
                yield values if values.min() > 0 and values.max() < np.inf else values[_present(values)]

        step = max(1, int(math.sqrt(plane.size / STRIP_PIXELS)))
        sample = plane[::step, ::step]
        sample = sample[_present(sample)]
        if sample.size < 100:
            sample = plane[_present(plane)]
        if not sample.size:
            raise BgError(f"{_channel_name(k, len(planes))} holds no data (every sample is 0 or not finite); "
                          "remove that channel, or save the picture again")
        low, median, high = _exact_quantiles(strips, sample, (0.0, 0.5, quantile))
        if high - low < np.finfo(np.float32).tiny:  # less than the fit, in Float32, could tell apart
            raise BgError(f"{_channel_name(k, len(planes))} has the same value everywhere ({low:.6g}), so it shows no sky; "
                          "raise -dq if a bright object fills the frame, else give a picture with content")
        return low, high - low, median

    low, scale, median = np.array(list(_each(measure, range(len(planes))))).T
    # Coarsely quantized pictures can have their median at an end, where the function would degenerate.
    midtones = np.clip((median - low) / scale, 1e-4, 1 - 1e-4)
    return Stretch(low, scale, midtones), median


def _each(work: Callable, items: Sequence) -> Iterator:
    """Results of work(item), in order, computed by WORKERS threads."""
    with ThreadPoolExecutor(WORKERS) as pool:
        yield from pool.map(work, items)


def _channel_name(k: int, count: int) -> str:
    return "the picture" if count == 1 else f"channel {'RGB'[k]}"


# ---------------------------------------------------------------------------------------------------------
# Reduce and mask
# ---------------------------------------------------------------------------------------------------------

def reduce_plane(plane: np.ndarray, factor: int, func: str = "median", transform: Optional[Callable] = None) -> np.ndarray:
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
    full_height, full_width = height // factor * factor, width // factor * factor
    reduced = np.empty((-(-height // factor), -(-width // factor)), np.float32)

    def reduce_band(band):  # whole rows of blocks, or the one ragged row at the lower edge
        for columns in (slice(0, full_width), slice(full_width, width)):
            tile = plane[band, columns]
            if tile.size:
                block = min(factor, tile.shape[0]), min(factor, tile.shape[1])
                blocks = tile.reshape(tile.shape[0] // block[0], block[0], tile.shape[1] // block[1], block[1])
                blocks = blocks.transpose(0, 2, 1, 3).reshape(blocks.shape[0], blocks.shape[2], -1)
                reduced[band.start // factor:-(-band.stop // factor),
                        columns.start // factor:-(-columns.stop // factor)] = _reduce_blocks(blocks, func, transform)

    for _ in _each(reduce_band, _strips(full_height, width, factor) + [slice(full_height, height)]):
        pass
    return reduced


def _reduce_blocks(blocks: np.ndarray, func: str, transform: Optional[Callable]) -> np.ndarray:
    """(rows, columns, samples of a block) -> (rows, columns); NaN for a block with nothing present."""
    present = None
    if not (blocks.min() > 0 and blocks.max() < np.inf):  # NaN fails too
        present = _present(blocks)
        blocks = np.where(present, blocks, np.nan)
    if func == "mean":
        if transform is not None:
            blocks = transform(blocks)
        if present is None:
            return blocks.mean(-1)
        count = present.sum(-1)
        return np.where(present, blocks, 0).sum(-1) / np.where(count, count, np.nan)
    blocks = np.sort(blocks, axis=-1)  # quicker than a partition at this size; NaN goes last
    if present is None:
        middle = (blocks.shape[-1] - 1) // 2
        return (blocks[..., middle] + blocks[..., blocks.shape[-1] // 2]) / 2
    count = present.sum(-1)[..., None]
    low, high = (np.take_along_axis(blocks, np.maximum(at, 0), -1)[..., 0] for at in ((count - 1) // 2, count // 2))
    return (low + high) / 2  # with nothing present both are NaN


@dataclass(frozen=True)
class Bridge:
    """The sky that --auto expects, and the further reduced picture, (h, w) cells, that it was found on."""

    surface: Callable[[np.ndarray], np.ndarray]  # query (..., 2) in frame coordinates -> stretched sky (..., c)
    image: np.ndarray  # (h, w, c) stretched
    weight: np.ndarray  # (h, w, c) in [0, 1]; 0 where a cell is not sky
    query: np.ndarray  # (h, w, 2)


@dataclass(frozen=True)
class Prepared:
    """What the fit sees of a picture: reduced, stretched, masked. Shapes: (h, w) the reduced frame, c channels."""

    image: np.ndarray  # (h, w, c) stretched, in [0, 1]; 0 where missing
    weight: np.ndarray  # (h, w, c) in [0, 1]; 0 where masked or missing
    present: np.ndarray  # (h, w, c) bool
    query: np.ndarray  # (h, w, 2) block centers, in units of the full frame's longer side (row, column)
    stretch: Stretch
    median: np.ndarray  # (c,) medians of the linear picture over present samples
    linear: np.ndarray  # (h, w, c) block medians in the picture's own units; NaN where missing
    full_shape: Tuple[int, int]  # (h, w) of the full-size picture
    given: Optional[np.ndarray] = None  # (h, w, 1 or c) the mask file, reduced
    bridge: Optional[Bridge] = None  # with auto

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

    return np.stack(np.meshgrid(centers(height), centers(width), indexing="ij"), -1)


def stretch_quantile(settings: Settings) -> float:
    """The quantile in force: what was asked for, else what suits the way the picture is masked."""
    if settings.delinearization_quantile is not None:
        return settings.delinearization_quantile
    return AUTO_QUANTILE if settings.auto else DEFAULT_QUANTILE


def prepare(planes: np.ndarray, settings: Settings, mask: Optional[np.ndarray] = None) -> Prepared:
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
    weight = (present & (settings.threshold_min <= image) & (image <= settings.threshold_max)).astype(np.float32)
    given = None if mask is None else np.stack([_reduce_mask(plane, factor) for plane in mask], -1)
    if given is not None:
        weight *= given
    prepared = Prepared(image, weight, present, frame_coordinates(height, width, factor), stretch, median, linear,
                        (height, width), given)
    if not prepared.used.any():
        raise BgError("every pixel is masked, so there is no sky to fit; lower -tm, raise -tM, or check the mask (1 = use)")
    return prepared


def _reduce_mask(weights: np.ndarray, factor: int) -> np.ndarray:
    """(h, w) or (h, w, k) weights -> block means; 0 counts as a weight here, and what is not finite counts as 0."""
    weights = np.clip(np.nan_to_num(weights), 0, 1)
    for axis in (0, 1):
        starts = np.arange(0, weights.shape[axis], factor)
        sizes = np.diff(np.append(starts, weights.shape[axis]))
        weights = np.add.reduceat(weights, starts, axis) / np.expand_dims(sizes, tuple(k for k in range(weights.ndim) if k != axis))
    return weights.astype(np.float32)


def _size(planes: np.ndarray) -> str:
    return f"{planes.shape[2]} x {planes.shape[1]} with {planes.shape[0]} channel{'s' if len(planes) > 1 else ''}"


# ---------------------------------------------------------------------------------------------------------
# Spline: f(q) = sum_i w_i phi_k(|q - c_i|) + v.q + b
# ---------------------------------------------------------------------------------------------------------

_TINY_SQUARED_DISTANCE = 1e-10
"""Guards log(0), and the square root at 0, whose gradient is infinite. The value that tensorflow-addons has."""


def spline_matrix(query: np.ndarray, positions: np.ndarray, order: int, smoothing: float) -> np.ndarray:
    """The matrix that takes values at the control points to the surface: f(query) = matrix @ values.

    The surface is linear in the values, so one small solve serves every channel, and anything that searches
    over values (cross-validation, the first surface of --auto) is a matrix product.

    Args:
        query: (..., 2) where to evaluate.
        positions: (n, 2) control points.
        order: k of the kernel: r^k for odd k, r^k log r for even k.
        smoothing: weight on the diagonal of the interpolation system, 0 = through the values exactly.

    Returns:
        (..., n) float64.
    """
    return _evaluate(query, positions, order, _spline_coefficients(positions, order, smoothing))


def _evaluate(query: np.ndarray, positions: np.ndarray, order: int, coefficients: np.ndarray) -> np.ndarray:
    """f at query (..., 2) for each column of coefficients (n + 3, k): (..., k)."""
    weights, slopes, level = np.split(coefficients, (len(positions), len(positions) + 2))
    return _kernel(query, positions, order) @ weights + query @ slopes + level[0]


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


def interpolate_spline(train_points, train_values, query_points, order, regularization_weight=0.0, name="interpolate_spline"):
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
    """tensorflow-addons' function where it can be had (Python up to 3.11 with TensorFlow up to 2.15), else the drop-in."""
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


def start_positions(settings: Settings, shape: Tuple[int, int]) -> np.ndarray:
    """Where the control points start.

    Args:
        settings: `initializer`, `points` and `seed` count.
        shape: (h, w) of the full-size frame.

    Returns:
        (n, 2) float32 (row, column) in frame coordinates. "random": n uniform points. "grid": cell centers of the
        rows x columns nearest to n in the frame's aspect ratio; n may then differ from what was asked for.
    """
    sides = np.array(shape) / max(shape)
    wanted = settings.points or DEFAULT_POINTS
    if settings.initializer == "random":
        return (np.random.default_rng(settings.seed).random((wanted, 2)) * sides).astype(np.float32)
    shapes = [(rows, max(2, round(wanted / rows))) for rows in range(2, max(2, wanted // 2) + 1)]  # one row leaves a slope open
    rows, columns = min(shapes, key=lambda s: abs(s[0] * s[1] - wanted) / wanted + abs(math.log(s[1] / s[0] * sides[0] / sides[1])))
    row, column = (np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns
    return (np.stack(np.meshgrid(row, column, indexing="ij"), -1).reshape(-1, 2) * sides).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------
# Choose: object mask, first sky and smoothing, from the picture itself
# ---------------------------------------------------------------------------------------------------------
#
# Sky and object differ in one thing that needs no threshold on brightness: the sky is smooth. A flexible surface follows
# whatever is smooth, glows and wide halos too, and leaves what has structure: arms, filaments, dust lanes, star halos,
# tree tops. Where such structure is dense there is an object. Objects are grown into their own faint surroundings as far
# as these lie above the sky's own surface, and under them the sky is bridged: held by what is around it, and
# never above the picture, for an object only adds light. How stiff that surface must be, cross-validation tells.

CELLS, FEWEST_CELLS = 130, 64
"""About so many cells stand along the longer side of the copy that the choices are made on, in small pictures fewer, so that a
cell still is the median of several pixels: in the noise of single ones a faint nebula (M27 in half a minute of light) looks smooth."""

SKY_POINTS = 96
"""Control points of the surface on the cells. Its stiffness, not their number, decides how it bends."""

STIFFNESS_UNIT = 1e-4
"""Weight of the bending energy beside the mean squared residual, in units of the noise, at a smoothing of 1."""

SMOOTHINGS = (1e4, 1e2, 1e1, 1.0, 1e-1, 1e-2, 1e-3)
"""Tried by cross-validation, the stiffest (a plane) first."""

TOLERANCE = 0.012
"""The largest smoothing wins whose held-out loss is this close to the best: about the loss's own scatter."""

FOLD_TILES, FOLDS = 96, 4
"""Cross-validation holds out tiles, 8 x 12 of them, and not pixels: a neighbor knows too much about a pixel."""

ROUGH_SIGMA, ROUGH_SCALE, ROUGH_DENSITY, ROUGH_WINDOW = 3.5, 1.4, 0.2, 0.05
"""A cell is rough if it stands so many sigma off the Gaussian mean of so many cells about it; a region is an object if so many of its cells are rough, within a window
of this part of the longer side: lone stars stay single cells, nebulae and galaxies close up."""

HALO_SIGMA, HALO_SMOOTHING = 3.0, 0.003
"""Light so many sigma above the sky's surface, fitted with this smoothing, belongs to the object that it touches."""

STIFFEST_FIT = 10.0
"""Largest smoothing of the interpolation during a fit with --auto, which starts from the stiff surface anyway: beyond, the
equations lose their digits in Float32."""

PLAIN_SMOOTHING = (0.03, 1.0)
"""Range of the smoothing chosen for a plain run, whose control points start on the picture itself and have `-e` epochs to
settle: above 1 they do not get there, below 0.03 they dig into objects. Within it the best one goes with the square root
of the smoothing that the sky alone would have, but is not below the share of the picture that is not sky: nothing else keeps
a plain surface out of a nebula (measured on the truth bench, `tests/truth.py`)."""

HELD_BACK = 0.25
"""A surface may leave the range that it has over the sky it was fitted to by this part of the range, and no further: a
corner without sky, or hills, cannot make it run away."""

LITTLE_SKY = 0.1
"""Below this share of sky the surface is kept nearly flat: there is too little to tell glow from object."""

BRIDGE_WEIGHT = 0.5
"""Weight of 'the sky is not above the picture' under an object, beside 1 for a cell of sky."""


@dataclass(frozen=True)
class _Cells:
    """A further reduced copy of the picture. (h, w) cells, c channels; a cell is size x size reduced pixels."""

    values: np.ndarray  # (h, w, c) stretched
    usable: np.ndarray  # (h, w) bool: not missing, not masked by the user
    noise: np.ndarray  # (h, w, c) standard deviation of `values`
    query: np.ndarray  # (h, w, 2) frame coordinates
    size: int

    def smooth(self, image: np.ndarray, sigma: float) -> np.ndarray:
        """Gaussian mean of (h, w, c) over usable cells."""
        from scipy import ndimage
        total = ndimage.gaussian_filter(image * self.usable[..., None], (sigma, sigma, 0))
        return total / np.maximum(ndimage.gaussian_filter(self.usable.astype(float), sigma), 1e-6)[..., None]


def _make_cells(prepared: Prepared, threshold_max: float) -> _Cells:
    from scipy import ndimage
    # What is too dark for the fit stays in: a dark foreground is told by its step from the sky.
    usable = (prepared.present & (prepared.image <= threshold_max)).all(-1)
    if prepared.given is not None:
        usable &= (prepared.given > 0).any(-1)
    size = max(1, min(2, max(usable.shape) // FEWEST_CELLS), round(max(usable.shape) / CELLS))
    samples = np.where(usable[..., None], prepared.image, np.nan)
    values = np.stack([reduce_plane(np.ascontiguousarray(plane), size) for plane in np.moveaxis(samples, -1, 0)], -1).astype(float)
    share = _reduce_mask(usable.astype(np.float32), size)
    # Cells beside a border mix with it and are left out as well.
    usable = ndimage.minimum_filter((share > 0.5) & np.isfinite(values).all(-1), 3, mode="nearest")
    values = np.where(usable[..., None], values, 0)
    query = _reduce_mask(prepared.query, size).astype(float)
    return _Cells(values, usable, _cell_noise(values, usable, prepared.stretch), query, size)


def _cell_noise(values: np.ndarray, usable: np.ndarray, stretch: Stretch) -> np.ndarray:
    """Noise of the cells, (h, w, c), from the differences between neighbors where the picture is smoothest.

    Photon noise grows with the light, so in linear units variance = a + b x light; a and b follow the quietest quarter
    of small tiles at each level of brightness, and levels that only objects have, which are never quiet, are dropped.
    """
    from scipy.optimize import nnls
    linear = stretch.invert(values)
    noise = np.empty_like(values)
    for k in range(values.shape[-1]):
        light = np.where(usable & (values[..., k] < 1), linear[..., k], np.nan)  # what is clipped has no noise
        inner = light[1:-1, 1:-1]
        detail = np.abs(inner - (light[:-2, 1:-1] + light[2:, 1:-1] + light[1:-1, :-2] + light[1:-1, 2:]) / 4)
        side = min(7, *detail.shape)
        if side < 1:  # a strip: no cell has neighbors on all sides
            return np.full_like(values, 1e-3)
        rows, columns = (n // side for n in detail.shape)
        tiles = [image[:rows * side, :columns * side].reshape(rows, side, columns, side).swapaxes(1, 2).reshape(-1, side * side)
                 for image in (detail, inner)]
        whole = np.isfinite(tiles[0]).mean(1) > 0.5
        if not whole.any():
            return np.full_like(values, 1e-3)
        sigma, level = (np.nanmedian(tile[whole], 1) for tile in tiles)
        sigma = 1.4826 * sigma / math.sqrt(1.25)  # median absolute value -> deviation; four neighbors add a quarter
        bins = np.array_split(np.argsort(level), min(8, max(1, level.size // 6)))
        light_of_bin = np.array([np.median(level[b]) for b in bins])
        variance = np.array([(1.07 * np.percentile(sigma[b], 25))**2 for b in bins]) + 1e-18
        base, kept = light_of_bin.min(), np.full(len(bins), True)
        for _ in range(4):
            terms = np.stack([np.ones(len(bins)), light_of_bin - base], 1)
            floor, slope = nnls((terms / variance[:, None])[kept], np.ones(kept.sum()))[0]
            expected = floor + slope * (light_of_bin - base)
            kept = variance <= max(2.0, np.sort(variance / np.maximum(expected, 1e-30))[min(1, len(bins) - 1)]) * expected
        linear_noise = np.sqrt(floor + slope * np.maximum(linear[..., k] - base, 0))
        noise[..., k] = np.maximum(linear_noise * stretch.channel(k).slope(linear[..., k:k + 1])[..., 0], 2e-5)
    return noise


class _Bending:
    """A thin-plate surface on the cells that pays for bending: `values` at its own control points describe it."""

    def __init__(self, cells: _Cells, shape: Tuple[int, int]):
        sides = np.array(shape) / max(shape)
        rows = int(np.clip(round(math.sqrt(SKY_POINTS * sides[0] / sides[1])), 3, SKY_POINTS // 3))
        points = (np.linspace(0, side, n) for side, n in zip(sides, (rows, round(SKY_POINTS / rows))))
        self.positions = np.stack(np.meshgrid(*points, indexing="ij"), -1).reshape(-1, 2)
        weights = _spline_coefficients(self.positions, 2, 0.0)[:-3]
        self.energy = weights.T @ _kernel(self.positions, self.positions, 2) @ weights + 1e-6 * np.eye(len(weights))
        self.cells = cells
        self.matrix = self.at(cells.query.reshape(-1, 2))  # (cells, n)

    def at(self, query: np.ndarray) -> np.ndarray:
        """(..., n): values at the control points -> surface at query (..., 2)."""
        return spline_matrix(query, self.positions, 2, 0.0)

    def normal(self, weight: np.ndarray, bound: Optional[np.ndarray] = None) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Normal equations: grams (c, n, n), right sides (c, n), sums of weights (c,).

        Args:
            weight: (h, w) of squared residuals over noise; alike for all channels, so that they share one product.
            bound: (h, w, c) further weights, 0 nearly everywhere.
        """
        count = self.cells.values.shape[-1]
        values = self.cells.values.reshape(-1, count)
        inverse = 1 / (self.cells.noise**2).mean(-1).ravel()
        w = weight.ravel() * inverse
        weighted = self.matrix * w[:, None]
        grams, right = np.repeat((weighted.T @ self.matrix)[None], count, 0), (weighted.T @ values).T
        total = np.full(count, w.sum())
        for k in range(count if bound is not None else 0):
            rows = np.flatnonzero(bound[..., k])
            w = bound[..., k].ravel()[rows] * inverse[rows]
            weighted = self.matrix[rows] * w[:, None]
            grams[k] += weighted.T @ self.matrix[rows]
            right[k] += weighted.T @ values[rows, k]
            total[k] += w.sum()
        return grams, right, total

    def solve(self, normal: Tuple[np.ndarray, np.ndarray, np.ndarray], smoothing: float) -> np.ndarray:
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

    def bridge(self, sky: np.ndarray, bound: np.ndarray, smoothing: float, rounds: int = 6) -> Tuple[np.ndarray, Tuple]:
        """Fit to the sky's cells, held below the picture elsewhere.

        Args:
            sky: (h, w) weights of cells of sky. bound: (h, w) weights of cells that only bound the surface from above.
            smoothing: see `SMOOTHINGS`.

        Returns:
            (n, c) values at the control points, and the weights for `normal` that they are the solution for.
        """
        kept, below = sky, None
        for _ in range(rounds):
            values = self.solve(self.normal(kept, below), smoothing)
            residual = self.residual(values)
            size = np.sqrt((residual**2).mean(-1))
            spread = max(1.0, 1.2 * np.median(size[sky > 0]))
            kept = sky * np.minimum(1, 2.5 * spread / np.maximum(size, 1e-9))  # Huber: far cells pull, but no harder
            below = bound[..., None] * (residual < 0)
        return values, (kept, below)


def _rough_cells(cells: _Cells, residual: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """(h, w) bool each: cells with detail that the noise does not explain, and regions dense with them."""
    from scipy import ndimage
    detail = residual - cells.smooth(residual, ROUGH_SCALE)
    rough = (np.abs(detail).max(-1) > ROUGH_SIGMA) & cells.usable
    window = _odd(ROUGH_WINDOW * max(rough.shape))
    density = ndimage.uniform_filter(rough.astype(float), window) / np.maximum(
        ndimage.uniform_filter(cells.usable.astype(float), window), 0.2)
    return rough, (density > ROUGH_DENSITY) & cells.usable


def _odd(length: float) -> int:
    return max(3, int(length) | 1)


def _dark_foreground(cells: _Cells, objects: np.ndarray) -> np.ndarray:
    """(h, w) bool: hills, trees, a dome. The one thing that takes light away, and so lies below the sky by a step.

    The largest region without structure is taken for sky. A region near it whose edge is already darker than the nearest
    of that sky, by half of the sky's own range, is foreground: no sky falls so much so fast.
    """
    from scipy import ndimage
    regions, _ = ndimage.label(cells.usable & ~ndimage.binary_dilation(objects, iterations=2))
    foreground = np.zeros_like(objects)
    if not regions.any():
        return foreground
    sky = regions == np.bincount(regions.ravel())[1:].argmax() + 1
    distance, nearest = ndimage.distance_transform_edt(~sky, return_indices=True)
    drop = cells.values[tuple(nearest)] - cells.values
    span = np.percentile(cells.values[sky], 95, axis=0) - np.percentile(cells.values[sky], 5, axis=0)
    dark = cells.usable & ~sky & (drop > np.maximum(10 * cells.noise, 0.15 * span)).all(-1)
    parts, count = ndimage.label(ndimage.binary_opening(dark))
    for part in range(1, count + 1):
        inside = parts == part
        edge = inside & (distance < distance[inside].min() + 5)
        if (inside.sum() > 0.003 * cells.usable.sum() and edge.sum() > 0.02 * max(sky.shape)
                and distance[inside].min() < 0.25 * max(sky.shape) and (np.median(drop[edge], axis=0) > 0.5 * span).all()):
            foreground |= inside
    return ndimage.binary_dilation(foreground, iterations=2) & cells.usable


def _surroundings(objects: np.ndarray) -> np.ndarray:
    """(h, w) bool: cells about each object within half of its size, where its faint outskirts may be."""
    from scipy import ndimage
    labels, _ = ndimage.label(objects)
    reach = np.clip(0.5 * np.sqrt(np.bincount(labels.ravel())), 1, 0.1 * max(objects.shape))
    distance, nearest = ndimage.distance_transform_edt(~objects, return_indices=True)
    return (distance <= reach[labels[tuple(nearest)]]) & ~objects & objects.any()


def _find_objects(cells: _Cells, surface: _Bending) -> Tuple[np.ndarray, np.ndarray]:
    """(h, w) bool each: what is not sky (foreground included), and which of it bounds the sky from above."""
    from scipy import ndimage
    rough, objects = _rough_cells(cells, surface.follow(cells.usable.astype(float), SMOOTHINGS[-1]))
    foreground = _dark_foreground(cells, objects)
    if foreground.any():  # it has bent the surface, and made the sky along its edge look rough
        rest = replace(cells, usable=cells.usable & ~foreground)
        rough, objects = _rough_cells(rest, surface.follow(rest.usable.astype(float), SMOOTHINGS[-1]))
    near_foreground = ndimage.binary_dilation(foreground, iterations=_odd(ROUGH_WINDOW * max(rough.shape)) + 1)
    # The smooth cells between an object's rough ones may be gaps that show the sky; they are judged with its surroundings.
    # Along a ridge they are sky, and its brightest strip: there the rough cells alone are the object.
    around = _surroundings(ndimage.binary_opening(objects & ~near_foreground)) | objects
    objects = rough | foreground
    lighter = objects & ~near_foreground
    halo = (around | ndimage.binary_dilation(objects)) & cells.usable & ~objects & ~near_foreground
    sky, bound = (cells.usable & ~objects).astype(float), BRIDGE_WEIGHT * lighter
    weight = sky
    for k in range(10):
        values, _ = surface.bridge(weight, bound, HALO_SMOOTHING, rounds=3)
        above = (cells.smooth(surface.residual(values), 1.0) * math.sqrt(4 * math.pi)).max(-1)  # in sigma of the mean
        limit = HALO_SIGMA * (1 + 6 * 0.6**k)
        # All of the surroundings take part at first, and leave as they prove to stand above the rest.
        weight = sky * np.where(halo, np.minimum(1, limit / np.maximum(above, limit))**4, 1)
    objects = ndimage.binary_dilation(objects | (halo & (above > HALO_SIGMA))) & cells.usable
    return objects, objects & ~near_foreground


def _cross_validate(surface: _Bending, sky: np.ndarray, weights: Tuple[np.ndarray, np.ndarray]) -> Tuple[float, np.ndarray]:
    """The largest smoothing that predicts held-out tiles of sky nearly as well as the best does, and all losses."""
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
            size = np.sqrt((surface.residual(surface.solve(normal, smoothing))[test]**2).mean(-1))
            losses[k] += np.log1p(size).sum()
    losses /= max(1, np.count_nonzero(sky))
    return SMOOTHINGS[int(np.flatnonzero(losses <= losses.min() + TOLERANCE)[0])], losses


def choose_sky(prepared: Prepared, settings: Settings, say: Callable[[str], None] = _quiet) -> Tuple[Prepared, float]:
    """The choices of --auto: mask what is not sky, bridge it, and find how stiff the sky is.

    Args:
        prepared: picture and mask by thresholds and mask file; what they leave out is bridged like an object.
        settings: `threshold_max` counts, and `smoothing` if given by hand.
        say: called with a line on each choice.

    Returns:
        `prepared` with objects out of `weight` and with `bridge` set, and the smoothing.
    """
    smoothing, cells = settings.smoothing, _make_cells(prepared, settings.threshold_max)
    if min(cells.usable.shape) < 12 or cells.usable.sum() < 150:
        say("auto: the picture is too small to tell objects from sky; fitted as it is (a smaller -dx may help)")
        return prepared, 1.0 if smoothing is None else smoothing
    surface = _Bending(cells, prepared.full_shape)
    objects, lighter = _find_objects(cells, surface)
    used = _reduce_mask(prepared.used.astype(np.float32), cells.size) > 0.5
    sky = (cells.usable & used & ~objects).astype(float)
    share = sky.sum() / cells.usable.sum()
    if sky.sum() < 30:
        sky, lighter = cells.usable.astype(float), np.zeros_like(objects)
    bound = BRIDGE_WEIGHT * lighter
    _, weights = surface.bridge(sky, bound, 0.01)
    chosen, losses = _cross_validate(surface, sky, weights)
    why = f"held-out loss {losses[SMOOTHINGS.index(chosen)]:.3f}, best {losses.min():.3f}"
    if share < LITTLE_SKY:
        chosen, why = max(chosen, 1e2), "too little sky to tell glow from object, so the surface is kept nearly flat"
    if smoothing is not None:
        chosen, why = smoothing, "given by hand"
    say(f"auto: {100 * share:.0f} % of the picture is sky; stretch quantile {stretch_quantile(settings):g}; smoothing {chosen:g} ({why})")
    values, _ = surface.bridge(sky, bound, chosen)
    height, width = prepared.used.shape
    kept = (sky > 0)[np.arange(height) // cells.size][:, np.arange(width) // cells.size]
    masked = prepared.weight * kept[..., None]
    weight = _reduce_mask(masked, cells.size) * (sky > 0)[..., None]
    bridge = Bridge(lambda query: surface.at(query) @ values, cells.values, weight, cells.query)
    return replace(prepared, weight=masked, bridge=bridge), chosen


def choose_smoothing(prepared: Prepared, settings: Settings, say: Callable[[str], None] = _quiet) -> float:
    """The smoothing of a plain run: found as for --auto, on the sky that --auto would see, but nothing is masked."""
    low, high = PLAIN_SMOOTHING
    masked, smoothing = choose_sky(prepared, settings)
    objects = 1 - masked.used.sum() / prepared.used.sum()
    chosen = float(f"{np.clip(max(math.sqrt(smoothing), objects), low, high):.2g}")
    say(f"smoothing {chosen:g}, by cross-validation")
    return chosen


def start_values(prepared: Prepared, positions: np.ndarray, order: int, smoothing: float) -> np.ndarray:
    """First values at the control points (n, 2): (n, c).

    The reduced image there, blended by mask weight with the channel's median. With a bridge (--auto) the values that
    bring the surface closest to it: the fit then starts from the sky, wherever its control points stand.
    """
    if prepared.bridge is not None:
        query = prepared.bridge.query.reshape(-1, 2)
        matrix = spline_matrix(query, positions.astype(float), order, smoothing)
        return np.linalg.lstsq(matrix, prepared.bridge.surface(query), rcond=1e-9)[0].astype(np.float32)
    height, width = prepared.image.shape[:2]
    block = np.array(prepared.full_shape) / max(prepared.full_shape) / (height, width)
    row, column = np.clip((positions / block).astype(int), 0, (height - 1, width - 1)).T
    weight = prepared.weight[row, column]
    typical = [np.median(channel[used > 0]) if (used > 0).any() else MIDTONES_TARGET
               for channel, used in zip(np.moveaxis(prepared.image, -1, 0), np.moveaxis(prepared.weight, -1, 0))]
    return (weight * prepared.image[row, column] + (1 - weight) * typical).astype(np.float32)


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
    path: List[Tuple[int, np.ndarray, np.ndarray]]  # (epoch, positions, values) now and then, the start first

    def surface(self, query: np.ndarray) -> np.ndarray:
        """Stretched surface (..., c) at query (..., 2), float64."""
        positions, points = self.positions.astype(float), query.reshape(-1, 2)
        coefficients = _spline_coefficients(positions, self.order, self.smoothing) @ self.values
        # In parts: the kernels of all points at once would be the largest array of a run.
        parts = np.array_split(points, 1 + len(points) * len(positions) // STRIP_PIXELS)
        return np.concatenate([_evaluate(part, positions, self.order, coefficients) for part in parts]).reshape(*query.shape[:-1], -1)


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


def sky_sample(prepared: Prepared, settings: Settings) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the fit sees: query (m, 2), image (m, c) and weight (m, c), drawn once, so that losses compare over epochs.

    With a bridge (--auto) the sample is of its cells, over the whole frame, and what is masked or missing is replaced by
    the sky expected there, with noise like the rest: the logarithm of the loss would cling to a bridge without noise.
    """
    bridge, seen = prepared.bridge, prepared.bridge or prepared
    usable = prepared.used if bridge is None else np.ones(bridge.query.shape[:2], bool)
    wanted = SAMPLE_PIXELS * settings.batch * (1 if bridge is None else 2)  # twice, for two starts to agree to 0.5 % of the range
    pick = sample_pixels(usable, wanted, settings.seed)
    query, image, weight = (a.reshape(-1, a.shape[-1])[pick] for a in (seen.query, seen.image, seen.weight))
    if bridge is not None:
        expected = bridge.surface(query)
        spread = [1.4826 * np.median(np.abs(image - expected)[sky, k]) if sky.any() else 0.0 for k, sky in enumerate(weight.T > 0)]
        noise = np.random.default_rng(settings.seed).normal(size=image.shape) * spread
        image = np.where(weight > 0, image, expected + noise)
        weight = np.where(weight > 0, weight, 1)
    return query, image, weight


def fit_surface(prepared: Prepared, settings: Settings, start: Tuple[np.ndarray, np.ndarray], smoothing: float,
                on_epoch: Callable[[int, float], None] = _quiet, say: Callable[[str], None] = _quiet) -> Fit:
    """Fit the spline to the sky: Adam on positions and values, the learning rate halved on a plateau, early stopping.

    A loop of our own, not Keras' `fit`: an epoch here is one step of some 2 ms, and `fit` adds more than that to each.

    Args:
        prepared: what to fit. settings: see `Settings`.
        start: positions (n, 2) and values (n, c).
        smoothing: regularization weight of the interpolation.
        on_epoch: called after each epoch with its number, from 1, and its loss.
        say: called with one line about what a person should know.
    """
    tf = import_tensorflow()
    query, image, weight = (tf.constant(a, tf.float32) for a in sky_sample(prepared, settings))  # [m, 2], [m, c], [m, c]
    layer = spline_layer(*start, settings.order, smoothing)
    best = [tf.Variable(w) for w in layer.trainable_weights]
    best_loss = tf.Variable(np.float32(np.inf))
    adam = tf.keras.optimizers.Adam(settings.learning_rate)
    adam.build(layer.trainable_weights)

    @tf.function(autograph=False)  # nothing in it needs rewriting, which costs time and would reach into the drop-in
    def step():
        with tf.GradientTape() as tape:
            surface = layer(query)
            residual = weight * (image - surface)
            terms = [loss_error(tf, residual), loss_color(tf, residual),
                     loss_overshoot(tf, residual), loss_negative(tf, surface)]
            loss = tf.reduce_mean(tf.math.log(LOSS_FLOOR + terms[0] + terms[1] + settings.alpha * (terms[2] + terms[3])))
        better = loss < best_loss
        for variable, now in zip(best + [best_loss], layer.trainable_weights + [loss]):
            variable.assign(tf.where(better, now, variable))
        gradients = tape.gradient(loss, layer.trainable_weights)
        adam.apply_gradients(zip(gradients, layer.trainable_weights))
        return tf.stack([loss] + [tf.reduce_mean(term) for term in terms])

    history, path, rate = [], [(0, *start)], settings.learning_rate
    mark, waited, waited_rate = math.inf, 0, 0
    stopped = f"all {settings.epochs} epochs done"
    for epoch in range(1, settings.epochs + 1):
        try:
            now = step().numpy()
        except tf.errors.InvalidArgumentError:  # "Input matrix is not invertible": control points have met
            now = np.full(5, np.nan)
        if not np.isfinite(now).all():
            stopped = f"stopped at epoch {epoch}: the spline's equations became singular; best surface so far taken (try a larger --smoothing)"
            break
        history.append(now)
        on_epoch(epoch, float(now[0]))
        if epoch % PATH_EVERY == 0:
            path.append((epoch, *(w.numpy() for w in layer.trainable_weights)))
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
    return Fit(positions, values, settings.order, smoothing, np.array(history), stopped, path)


# ---------------------------------------------------------------------------------------------------------
# Apply: the surface at full size, and the picture without it
# ---------------------------------------------------------------------------------------------------------

class SkySurface:
    """The sky at full size in linear units, made strip by strip: it never stands in memory unless asked for.

    The spline is evaluated on nodes a few pixels apart, brought back to linear there, and interpolated between
    them by the cubic through four nodes along each axis. That is exact for planes, and the spline bends over
    hundreds of pixels, so between nodes nothing is lost (tests hold it to 1e-5); but the cost of a pixel is a
    few multiplications, however many control points there are.
    """

    def __init__(self, surface: Callable[[np.ndarray], np.ndarray], shape: Tuple[int, int], dtype=np.float32):
        """surface: (..., 2) frame coordinates -> (..., c) linear sky; shape: (h, w) of the full-size picture."""
        self.height, self.width = shape
        self.step = step = max(1, max(shape) // SURFACE_CELLS)
        # Node k stands on pixel (k - 1) * step: one node before the frame, and two behind its last cell.
        rows, columns = ((np.arange(-(-n // step) + 3) - 1) * step for n in shape)
        row, column = ((pixel + 0.5) / max(shape) for pixel in (rows, columns))
        parts = [surface(np.stack(np.meshgrid(part, column, indexing="ij"), -1))
                 for part in np.array_split(row, max(1, row.size // 32))]
        self.nodes = np.moveaxis(np.concatenate(parts), -1, 0).astype(dtype)  # (c, rows, columns)
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
        return np.clip((windows @ self.taps.T).reshape(len(tall), -1)[:, :self.width], 0, 1)

    def strips(self) -> List[slice]:
        return _strips(self.height, self.width, self.step)

    def plane(self, channel: int) -> np.ndarray:
        """Linear sky of one channel, (h, w), clipped to [0, 1]."""
        plane = np.empty((self.height, self.width), self.nodes.dtype)

        def fill(rows):
            plane[rows] = self.strip(channel, rows)

        for _ in _each(fill, self.strips()):
            pass
        return plane


class _SkyPlanes:
    """The model's channels as a sequence that makes each (h, w) plane when it is asked for."""

    def __init__(self, sky: SkySurface):
        self.sky, self.shape, self.dtype = sky, (len(sky.nodes), sky.height, sky.width), sky.nodes.dtype

    def __iter__(self):
        return (self.sky.plane(k) for k in range(len(self)))

    def __len__(self):
        return self.shape[0]


@dataclass(frozen=True)
class Subtraction:
    """What taking the sky out did, per channel (c,)."""

    offsets: np.ndarray  # added so that the channel's median stays
    below: np.ndarray  # samples clipped at 0
    above: np.ndarray  # samples clipped at 1


def subtract(planes: np.ndarray, sky: SkySurface, median: np.ndarray) -> Subtraction:
    """Take the sky out of a picture, in place: image - model + offset, clipped to [0, 1].

    The offset of a channel is what its median over present samples would lose, so the background stays neutral, and
    a black border or one bad pixel cannot decide a color. Missing samples stay as they are.

    Args:
        planes: (c, h, w) linear samples; changed.
        sky: the model. median: (c,) of the present samples of planes.
    """
    def work(k):
        plane = planes[k]

        def residual(rows):
            values = plane[rows] - sky.strip(k, rows)
            return values[_present(plane[rows])]

        strips = sky.strips()
        some = np.concatenate([residual(rows)[::len(strips)].copy() for rows in strips])
        offset = median[k] - _exact_quantiles(lambda: map(residual, strips), some, (0.5,))[0]
        below = above = 0
        for rows in strips:
            values = plane[rows] - sky.strip(k, rows) + plane.dtype.type(offset)
            kept = _present(plane[rows])
            below += np.count_nonzero((values < 0) & kept)
            above += np.count_nonzero((values > 1) & kept)
            np.copyto(plane[rows], np.clip(values, 0, 1), where=kept)
        return offset, below, above

    offsets, below, above = zip(*_each(work, range(len(planes))))
    return Subtraction(np.array(offsets), np.array(below), np.array(above))


# ---------------------------------------------------------------------------------------------------------
# The whole job on arrays
# ---------------------------------------------------------------------------------------------------------

def examine(planes: np.ndarray, settings: Settings, mask: Optional[np.ndarray] = None,
            say: Callable[[str], None] = _quiet) -> Tuple[Prepared, Settings]:
    """Everything before the fit: stretch, reduce, mask, and choose what was left to choose. Needs no TensorFlow.

    Args and errors: as for `prepare`; `say` is called with one line on each choice.

    Returns:
        What the fit sees, and the settings with the values really used in place of every None.
    """
    return _choose(prepare(planes, settings, mask), settings, say)


def _choose(prepared: Prepared, settings: Settings, say: Callable[[str], None]) -> Tuple[Prepared, Settings]:
    """Put a value where the settings have None, and an object mask and its bridge into `prepared` if asked to."""
    if settings.auto:
        prepared, smoothing = choose_sky(prepared, settings, say)
    elif settings.smoothing is None:
        smoothing = choose_smoothing(prepared, settings, say)
    else:
        smoothing = settings.smoothing
    return prepared, replace(
        settings, delinearization_quantile=stretch_quantile(settings), smoothing=smoothing,
        points=settings.points or (AUTO_POINTS if settings.auto else DEFAULT_POINTS))


def fit_sky(prepared: Prepared, settings: Settings, say: Callable[[str], None] = _quiet,
            on_epoch: Callable[[int, float], None] = _quiet) -> Fit:
    """Fit the surface to what `examine` gave. `on_epoch` is called with each epoch's number and loss."""
    positions = start_positions(settings, prepared.full_shape)
    smoothing = min(settings.smoothing, STIFFEST_FIT) if settings.auto else settings.smoothing
    values = start_values(prepared, positions, settings.order, smoothing)
    devices = compute_devices(say)
    say(f"fitting {len(positions)} control points on {devices[0].name}")
    return on_first_that_works(
        devices, lambda: fit_surface(prepared, settings, (positions, values), smoothing, on_epoch, say), say)


class Device(NamedTuple):
    """Something TensorFlow computes on."""

    place: str  # as in `tf.device`
    name: str  # for people


def compute_devices(say: Callable[[str], None] = _quiet) -> List[Device]:
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


def on_first_that_works(devices: List[Device], work: Callable, say: Callable[[str], None] = _quiet):
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


def sky_surface(prepared: Prepared, fit: Fit, dtype=np.float32) -> SkySurface:
    """The fitted surface at full size, in the picture's own units, held back where there was no sky to fit."""
    seen = fit.surface(prepared.query.reshape(-1, 2)[sample_pixels(prepared.used, SAMPLE_PIXELS, 0)])
    low, high = seen.min(0), seen.max(0)
    margin = HELD_BACK * (high - low)
    return SkySurface(lambda query: prepared.stretch.invert(np.clip(fit.surface(query), low - margin, high + margin)),
                      prepared.full_shape, dtype)


@dataclass(frozen=True)
class Result:
    """What `optimize` gives back."""

    model: np.ndarray  # (h, w, c) linear sky
    subtracted: np.ndarray  # (h, w, c) the picture without it
    offsets: np.ndarray  # (c,) what was added so that the medians stay
    history: Dict[str, np.ndarray]  # "loss" and its terms, each (epochs,)
    settings: Settings  # as used
    prepared: Prepared
    fit: Fit


def optimize(image: np.ndarray, settings: Settings = Settings(), mask: Optional[np.ndarray] = None,
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
    sky = sky_surface(prepared, fit, planes.dtype)
    done = subtract(planes, sky, prepared.median)
    return Result(np.moveaxis(np.stack(list(_SkyPlanes(sky))), 0, -1), np.moveaxis(planes, 0, -1), done.offsets,
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

def mask_reasons(prepared: Prepared, settings: Settings) -> Dict[str, np.ndarray]:
    """Why pixels of the reduced frame are left out: reason -> (h, w) bool. A pixel has one reason at most."""
    missing = ~prepared.present.any(-1)
    left_out = ~prepared.used & ~missing
    inside = (settings.threshold_min <= prepared.image) & (prepared.image <= settings.threshold_max)
    reasons = {"missing": missing, "threshold": left_out & ~(inside & prepared.present).any(-1)}
    left_out &= ~reasons["threshold"]
    by_file = np.zeros_like(left_out) if prepared.given is None else left_out & (prepared.given == 0).any(-1)
    return {**reasons, "mask file": by_file, "auto": left_out & ~by_file}


def clipped_by_stretch(prepared: Prepared) -> np.ndarray:
    """(h, w, c) bool: where the stretch ends at 1 and the fit cannot see how bright the picture is."""
    with np.errstate(invalid="ignore"):  # NaN where missing
        return prepared.linear >= prepared.stretch.pedestal + prepared.stretch.scale


def shares(prepared: Prepared) -> Dict[str, float]:
    """Shares of the reduced samples, all channels together; missing, masked and used add up to 1."""
    used = np.count_nonzero(prepared.weight) / prepared.weight.size
    missing = 1 - np.count_nonzero(prepared.present) / prepared.present.size
    return {"missing": missing, "masked": max(0.0, 1 - missing - used), "used": used,
            "clipped": np.count_nonzero(clipped_by_stretch(prepared)) / prepared.present.size}


BLOWN_SHARE, BLOWN_TEXTURE, BLOWN_PEAK = 0.01, 0.08, 1.0
"""Where clipping is taken for sky: one connected area of more than 1 % of the frame, which a quadratic surface
explains but for 8 % of its range (or of its height above the median), and which is brightest at the frame's edge (the light stands outside) or rises
above the clipping point by less than that lies above the median. A galaxy's core peaks inside, and steeply."""


def blown_out(prepared: Prepared) -> np.ndarray:
    """Where the stretch clips what looks like sky: (h, w) bool. The fit loses the sky there."""
    from scipy import ndimage
    blown = np.zeros(prepared.image.shape[:2], bool)
    clipped = clipped_by_stretch(prepared)
    for k in range(clipped.shape[-1]):
        labels, _ = ndimage.label(clipped[..., k])
        sizes = np.bincount(labels.ravel())
        for label in 1 + np.flatnonzero(sizes[1:] > BLOWN_SHARE * labels.size):
            area = labels == label
            if _looks_like_sky(prepared, k, area):
                blown |= area
    return blown


def _looks_like_sky(prepared: Prepared, k: int, area: np.ndarray) -> bool:
    """Whether channel k is as smooth in this area (h, w) as sky is, and peaks where sky peaks."""
    values, place = prepared.linear[area, k].astype(float), prepared.query[area] - prepared.query[area].mean(0)
    row, column = place.T
    terms = np.stack([np.ones_like(row), row, column, row * row, row * column, column * column], -1)
    smooth = terms @ np.linalg.lstsq(terms, values, rcond=None)[0]
    low, high = np.quantile(smooth, (0.01, 0.99))
    top = prepared.stretch.pedestal[k] + prepared.stretch.scale[k]
    texture = np.median(np.abs(values - smooth)) / max(high - low, top - prepared.median[k], 1e-12)
    brightest = prepared.query[area][smooth >= np.quantile(smooth, 0.95)]
    there = prepared.query[prepared.present.any(-1)]
    to_edge = np.minimum(brightest - there.min(0), there.max(0) - brightest).min(-1)
    blunt = np.quantile(values, 0.95) - top < BLOWN_PEAK * (top - prepared.median[k])
    return texture < BLOWN_TEXTURE and (np.median(to_edge) < 0.05 or blunt)


def gradient(linear: np.ndarray, used: np.ndarray) -> float:
    """How uneven a sky is: the range of its quadratic course over 8 x 12 tiles (8 along the shorter side), over its level.

    The course is the one with the least absolute deviations from the tiles' medians, so that objects hardly count.

    Args:
        linear: (h, w, c) reduced picture, NaN where missing. used: (h, w) bool, where it shows sky.

    Returns:
        The mean over the channels; NaN if fewer than 12 tiles show enough sky (`_percent` says so).
    """
    rows, columns = (8, 12) if linear.shape[0] <= linear.shape[1] else (12, 8)
    medians, places = [], []
    for y, (values, mask) in enumerate(zip(np.array_split(linear, rows), np.array_split(used, rows))):
        for x, (tile, sky) in enumerate(zip(np.array_split(values, columns, 1), np.array_split(mask, columns, 1))):
            tile = tile[sky & np.isfinite(tile).all(-1)]
            if 4 * len(tile) >= sky.size > 0:
                medians.append(np.median(tile, 0))
                places.append((y / rows - 0.5, x / columns - 0.5))
    if len(medians) < 12:
        return math.nan
    medians, (y, x) = np.array(medians, float), np.array(places).T
    terms = np.stack([np.ones_like(y), y, x, y * y, y * x, x * x], -1)  # (tiles, 6)
    ranges = []
    for values in medians.T:
        weight = np.ones_like(values)
        for _ in range(20):  # least squares, reweighted until it is least absolute deviations
            course = terms @ np.linalg.lstsq(terms * weight[:, None], values * weight, rcond=None)[0]
            weight = 1 / np.sqrt(np.maximum(np.abs(values - course), 1e-6 * values.max()))
        ranges.append((course.max() - course.min()) / np.median(values))
    return float(np.mean(ranges))


def _percent(share: float) -> str:
    return "unknown" if math.isnan(share) else f"{share:.1%}"


def reduced_sky(prepared: Prepared, fit: Fit) -> Tuple[np.ndarray, np.ndarray]:
    """The sky and the picture without it on the reduced frame, linear, (h, w, c) each; medians stay."""
    sky = np.clip(prepared.stretch.invert(fit.surface(prepared.query)), 0, 1)
    return sky, _keep_median(prepared.linear, prepared.linear - sky)


def _keep_median(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """`after`, each channel shifted to the median of `before`; (h, w, c), NaN where missing."""
    lost = [np.median(values[np.isfinite(values)][::4]) for image in (before, after) for values in np.moveaxis(image, -1, 0)]
    return after + np.subtract(*np.split(np.array(lost), 2)).astype(after.dtype)


# ---------------------------------------------------------------------------------------------------------
# Pictures: preview, figures, animation
#
# All are drawn from the reduced picture, so a large frame costs no more than a small one.
# ---------------------------------------------------------------------------------------------------------

PANEL_PIXELS = 600
"""Reduced pixels along the longer side of a picture in a figure; more could not be seen."""

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

OVERLAYS = {"missing": ("#6b7077", 0, "missing"), "threshold": ("#e69f00", 1, "left out by -tm, -tM"),
            "mask file": ("#56b4e9", -1, "left out by -m"), "auto": ("#cc79a7", 2, "left out by --auto"),
            "clipped": ("#f0e442", -2, "clipped by -dq")}
"""Reason -> its color, the slope of its hatching (0: solid), its name. Slopes tell them apart without color."""


def display_stretch(linear: np.ndarray) -> Stretch:
    """A stretch for the eye, of a reduced picture (h, w, c): nearly nothing clipped, every channel's median at 0.25."""
    low, median, high = np.nanquantile(linear, (0.002, 0.5, 0.9995), axis=(0, 1))
    pedestal = low - 0.1 * (median - low)
    scale = np.maximum(high - pedestal, 1e-9)
    constants = pedestal, scale, np.clip((median - pedestal) / scale, 1e-4, 0.5)
    return Stretch(*(np.asarray(constant, np.float32) for constant in constants))


def draw_preview(figure, prepared: Prepared, settings: Settings, title: str) -> None:
    """The cockpit for tuning: the picture, what the fit would see of it, what stands out; histograms and numbers."""
    prepared = _thin(prepared)
    figure.suptitle(title, x=0.015, ha="left", fontsize=11)
    top, bottom = figure.add_gridspec(2, 1, height_ratios=(1.6, 1), left=0.02, right=0.985, top=0.915, bottom=0.085, hspace=0.3)
    panels = [figure.add_subplot(cell) for cell in top.subgridspec(1, 3, wspace=0.03)]
    _show(panels[0], display_stretch(prepared.linear).apply(prepared.linear), "the picture, plain stretch")
    _show(panels[1], prepared.image, "stretched as for the fit, and what is left out")
    reasons = {**mask_reasons(prepared, settings), "clipped": clipped_by_stretch(prepared).any(-1) & prepared.used}
    _overlay(panels[1], reasons)
    _draw_hints(panels[2], prepared)

    channels = prepared.image.shape[-1]
    cells = bottom.subgridspec(1, 4, wspace=0.12)
    for k in range(channels):
        span = cells[0, k] if channels == 3 else cells[0, :3]
        _draw_histogram(figure.add_subplot(span), prepared, settings, k)
    figure.text(0.02, 0.012, "below the histograms: stretched value, and the picture's own value there; heights are logarithmic", fontsize=8)
    words = figure.add_subplot(cells[0, 3])
    words.axis("off")
    words.text(0.06, 1.0, "\n".join(_numbers(prepared, settings)), va="top", family="monospace", fontsize=8, linespacing=1.35)


def _numbers(prepared: Prepared, settings: Settings) -> List[str]:
    """The preview's numbers, one line each."""
    part, reasons = shares(prepared), mask_reasons(prepared, settings)
    inks = _channel_letters(prepared)
    stretch = prepared.stretch
    lines = ["           " + "".join(f"{ink:>9}" for ink in inks)]
    for name, values in (("minimum", stretch.pedestal), ("median", prepared.median), ("-dq value", stretch.pedestal + stretch.scale)):
        lines.append(f"{name:<11}" + "".join(f"{value:9.5f}" for value in values))
    clipped = clipped_by_stretch(prepared)
    lines.append("clipped %  " + "".join(f"{100 * clipped[..., k].mean():9.2f}" for k in range(len(inks))))
    blown = blown_out(prepared).mean()
    rows = [("used", part["used"], "of the samples"), ("masked", part["masked"], "of the samples")]
    rows += [("  " + OVERLAYS[name][2].replace("left out ", ""), reasons[name].mean(), "of the frame")
             for name in ("threshold", "mask file", "auto") if reasons[name].any()]
    rows += [("missing", part["missing"], ""), ("gradient", gradient(prepared.linear, prepared.used), "of the sky's level")]
    rows += [("blown out", blown, "sky: raise -dq")] if blown else []
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


def _draw_hints(axes, prepared: Prepared) -> None:
    """The picture less its own large-scale course: what is not sky, and may be mistaken for it unless it is masked."""
    from scipy import ndimage
    values, known = prepared.linear.mean(-1), prepared.present.all(-1)
    center = np.median(values[known]) if known.any() else 0.0
    capped = np.where(known, np.minimum(values, np.nanquantile(values, 0.9)), 0)  # bright things hardly count as course
    width = max(values.shape) / 8
    weight = np.maximum(ndimage.gaussian_filter(known.astype(float), width), 1e-9)
    residual = values - ndimage.gaussian_filter(capped, width) / weight
    residual = ndimage.gaussian_filter(np.where(known, residual, 0), max(values.shape) / 300)
    spread = 6 * np.median(np.abs(residual[known] - np.median(residual[known]))) if known.any() else 1.0
    image = axes.imshow(np.where(known, residual, np.nan), cmap="PuOr_r", vmin=-spread or -1, vmax=spread or 1, interpolation="nearest")
    axes.set_title("orange above, purple below surroundings")
    axes.set(xticks=[], yticks=[])
    bar = axes.inset_axes([0.02, -0.06, 0.96, 0.025])
    axes.figure.colorbar(image, cax=bar, orientation="horizontal", ticks=[-spread, 0, spread])
    bar.set_xticklabels([f"{v / center:+.0%}" if center else "" for v in (-spread, 0, spread)], fontsize=7)
    bar.tick_params(length=0, pad=2)
    blown = blown_out(prepared)
    if blown.any() and min(blown.shape) > 1:
        axes.contour(blown, [0.5], colors="#d7191c", linewidths=2)
        axes.text(0.5, -0.14, "outlined: sky blown out, raise -dq", ha="center", va="top", color="#ff8a80", weight="bold", transform=axes.transAxes)


def draw_figures(figure, prepared: Prepared, settings: Settings, fit: Fit, title: str) -> None:
    """The result: before, model, after in one stretch; where the control points went; how the loss fell."""
    prepared = _thin(prepared)
    sky, after = reduced_sky(prepared, fit)
    stretch = display_stretch(prepared.linear)
    figure.suptitle(title, x=0.015, ha="left", fontsize=11)
    figure.text(0.015, 0.012, facts(prepared, settings, fit), fontsize=8)
    top, bottom = figure.add_gridspec(2, 1, height_ratios=(1.25, 1), left=0.02, right=0.985, top=0.915, bottom=0.085, hspace=0.3)
    panels = [figure.add_subplot(cell) for cell in top.subgridspec(1, 3, wspace=0.03)]
    _show(panels[0], stretch.apply(prepared.linear), "before")
    _show(panels[1], stretch.apply(sky), "model, same stretch, lines of equal brightness")
    _draw_contours(panels[1], sky.mean(-1))
    _show(panels[2], stretch.apply(after), "after, same stretch")

    cells = bottom.subgridspec(1, 2, width_ratios=(1, 2.1), wspace=0.1)
    points = figure.add_subplot(cells[0])
    _show(points, np.where(prepared.used[..., None], 0.75 * prepared.image, np.nan), "control points, from ring to dot; brown: left out", blank=(0.30, 0.24, 0.12))
    path = np.array([_pixel_positions(prepared, positions) for _, positions, _ in fit.path] + [_pixel_positions(prepared, fit.positions)])
    points.plot(path[..., 1], path[..., 0], color="#56b4e9", linewidth=0.9, alpha=0.8)
    points.plot(path[0, :, 1], path[0, :, 0], "o", color="none", markeredgecolor="#56b4e9", markersize=3.5)
    points.plot(path[-1, :, 1], path[-1, :, 0], "o", color="#f0e442", markeredgecolor="black", markersize=5)
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
    after = reduced_sky(prepared, fit)[1]
    best = fit.history[np.argmin(fit.history[:, 0])]
    return (f"-dq {stretch_quantile(settings):g}, {len(fit.positions)} points ({settings.initializer}), order {settings.order}, "
            f"smoothing {fit.smoothing:g}, alpha {settings.alpha:g}, seed {settings.seed}   |   {len(fit.history)} epochs, "
            f"loss {best[0]:.4f}   |   {shares(prepared)['used']:.1%} used as sky   |   gradient "
            f"{_percent(gradient(prepared.linear, prepared.used))} -> {_percent(gradient(after, prepared.used))} of the sky's level")


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
    prepared = _thin(prepared, max(wide, tall))
    rows, columns, channels = prepared.image.shape
    stretch = display_stretch(prepared.linear)
    # Each surface on a coarse grid of nodes, then straight lines between them: quick, and enough for the eye.
    down, along = (_straight_lines(n) for n in (rows, columns))
    first, last = prepared.query[0, 0], prepared.query[-1, -1]
    places = (np.linspace(first[k], last[k], lines.shape[1]) for k, lines in enumerate((down, along)))
    query = np.stack(np.meshgrid(*places, indexing="ij"), -1)

    def half(linear):
        return Image.fromarray(_drawable(stretch.apply(linear))).resize((wide, tall), Image.BICUBIC)

    steps = fit.path + [(len(fit.history), fit.positions, fit.values)]
    # Most happens early: steps at equal distances of the square root of the epoch.
    chosen = sorted({int(k) for k in np.round(np.linspace(0, 1, 24)**2 * (len(steps) - 1))})
    frames = np.empty((len(chosen), head + tall + gap, 3 * gap + 2 * wide, 3), np.uint8)
    for frame, k in zip(frames, chosen):
        epoch, positions, values = steps[k]
        surface = spline_matrix(query, positions.astype(float), fit.order, fit.smoothing) @ values
        nodes = np.clip(prepared.stretch.invert(surface), 0, 1).astype(np.float32)
        sky = np.stack([down @ nodes[..., c] @ along.T for c in range(channels)], -1)
        model = half(sky)
        pen = ImageDraw.Draw(model)
        for y, x in _pixel_positions(prepared, positions) / (max(1, rows - 1), max(1, columns - 1)) * (tall - 1, wide - 1):
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill="#f0e442", outline="black")
        canvas = Image.new("RGB", frame.shape[1::-1], PAPER)
        canvas.paste(model, (gap, head))
        canvas.paste(half(_keep_median(prepared.linear, prepared.linear - sky)), (2 * gap + wide, head))
        pen = ImageDraw.Draw(canvas)
        pen.text((gap, 5), f"sky model, best of {epoch} epochs" if k == len(steps) - 1 else f"sky model, epoch {epoch}", INK)
        pen.text((2 * gap + wide, 5), "the picture without it", INK)
        frame[:] = canvas
    return frames


def _straight_lines(count: int) -> np.ndarray:
    """(count, n) float32: values at n nodes, some 8 pixels apart -> at count pixels, by straight lines between them."""
    n = max(2, count // 8)
    at = np.linspace(0, n - 1, count)[:, None]
    return np.maximum(0, 1 - np.abs(at - np.arange(n))).astype(np.float32)


def write_animation(file, frames: np.ndarray, most_bytes: int = 2_900_000) -> None:
    """Write frames, (n, h, w, 3) bytes, as a GIF that repeats: 4 seconds, the last frame longer; fewer colors if it gets too large."""
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


def _thin(prepared: Prepared, most: int = PANEL_PIXELS) -> Prepared:
    """Every k-th pixel of the reduced frame, so that its longer side has at most `most`."""
    step = -(-max(prepared.image.shape[:2]) // most)
    names = ("image", "weight", "present", "query", "linear", "given")
    parts = {name: getattr(prepared, name) for name in names}
    return replace(prepared, **{name: None if part is None else part[::step, ::step] for name, part in parts.items()})


def _pixel_positions(prepared: Prepared, positions: np.ndarray) -> np.ndarray:
    """Control points (n, 2) in frame coordinates -> (row, column) in pixels of the (thinned) reduced frame."""
    first, last = prepared.query[0, 0], prepared.query[-1, -1]
    return (positions - first) / np.maximum(last - first, 1e-9) * (np.array(prepared.image.shape[:2]) - 1)


def _channel_letters(prepared: Prepared) -> str:
    return "RGB" if prepared.image.shape[-1] == 3 else "L"


def _drawable(image: np.ndarray) -> np.ndarray:
    """(h, w, c) in [0, 1], NaN where nothing is -> (h, w, 3) bytes."""
    image = np.round(255 * np.clip(np.nan_to_num(image), 0, 1)).astype(np.uint8)
    return np.broadcast_to(image, image.shape[:2] + (3,))


def _show(axes, image: np.ndarray, title: str, blank=(0, 0, 0)) -> None:
    """Draw a stretched picture; NaN in the color `blank`."""
    colors = np.where(np.isfinite(image).all(-1, keepdims=True), _drawable(image), np.round(255 * np.array(blank)).astype(np.uint8))
    axes.imshow(colors, interpolation="bicubic" if max(colors.shape) < 300 else "antialiased")
    axes.set_title(title)
    axes.set(xticks=[], yticks=[])


def _overlay(axes, reasons: Dict[str, np.ndarray]) -> None:
    """Hatch what is left out, in colors and slopes that tell the reasons apart, with a legend of those that occur."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch
    legend = []
    height, width = reasons["missing"].shape
    scale = max(1, 900 // max(height, width))  # draw the hatching finer than a coarse picture's pixels
    row, column = np.ogrid[:height * scale, :width * scale]
    period = max(5, max(height, width) * scale // 40)
    paint = np.zeros((height * scale, width * scale, 4), np.float32)
    for reason, (color, slope, label) in OVERLAYS.items():
        if reasons[reason].any():
            where = reasons[reason].repeat(scale, 0).repeat(scale, 1)
            stripe = np.ones_like(where) if slope == 0 else (column * max(1, abs(slope)) + np.sign(slope) * row) % period < period * 0.45
            paint[where, :3] = np.where(stripe[..., None], to_rgb(color), 0)[where]  # dark between the stripes: seen on any color
            paint[where, 3] = np.where(stripe, 0.85, 0.35)[where]
            legend.append(Patch(facecolor=color, label=label, edgecolor=PAPER,
                                hatch={1: "//", -1: "\\\\", 2: "///", -2: "\\\\\\", 0: None}[slope]))
    axes.imshow(paint, extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="nearest")
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
    bar = axes.inset_axes([0.02, -0.06, 0.96, 0.025])
    axes.figure.colorbar(lines, cax=bar, orientation="horizontal", ticks=levels[::2])
    bar.tick_params(labelsize=7, length=0, pad=2)
    for line in bar.collections:
        line.set_linewidth(5)


def _import_matplotlib():
    """matplotlib, also where a notebook has handed down the name of a backend that this Python does not have."""
    backend = os.environ.get("MPLBACKEND", "")
    if backend.startswith("module://") and importlib.util.find_spec(backend[9:].split(".")[0]) is None:
        del os.environ["MPLBACKEND"]
    import matplotlib
    return matplotlib


def display_kind() -> Optional[str]:
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

DESCRIPTION = """\
Models the uneven sky of a linear astrophoto (light pollution, moonlight, airglow) as one smooth surface, fitted to
every pixel that shows sky, and takes it out. You place no samples. Run it after stacking and cropping, before color
calibration and stretching."""

EXAMPLES = """\
examples:
  bgoptimizer.py m31.xisf                     m31_bgModel.xisf and m31_bgSubtracted.xisf, in this folder
  bgoptimizer.py m31.xisf out --auto          let the tool mask the galaxy and choose the rest
  bgoptimizer.py m31.xisf -p                  look first: stretch, mask, histograms; nothing is fitted
  bgoptimizer.py m31.xisf -p -dq 0.99         ... with a weaker stretch, when a bright corner is blown out
  bgoptimizer.py m31.xisf out -m mask.xisf    with your own mask: 1 = sky, 0 = leave out
  bgoptimizer.py m31.xisf out --auto --save-mask --animate
                                              also the mask, to edit and give back with -m, and an animation

exit codes: 0 done, 1 could not be done, 2 wrong usage, 130 interrupted"""


class _Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def error(self, message):
        self.exit(2, f"bgoptimizer: error: {message}; see --help\n")


def _smoothing(text: str) -> Optional[float]:
    return None if text == "auto" else float(text)


_smoothing.__name__ = "number or auto"  # argparse names it in its message


def build_parser() -> argparse.ArgumentParser:
    """The command line; every default is the one of `Settings`."""
    default = Settings()
    parser = _Parser(prog="bgoptimizer.py", description=DESCRIPTION, epilog=EXAMPLES, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("input_file", help="linear XISF picture, gray or RGB")
    add("output_path", nargs="?", default=".", help="folder for what is written; made if missing (default: .)")
    add("-c", "--compress", action="store_true", help="compress the outputs: lz4hc with byte shuffling (default: off)")
    add("-dx", "--downscaling-factor", type=int, default=default.downscaling_factor,
        help="side of the pixel blocks that the fit sees as one pixel (default: %(default)s)")
    add("-df", "--downscaling-func", choices=("median", "mean"), default=default.downscaling_func, metavar="DOWNSCALING_FUNC",
        help="what a block is reduced to, median or mean; the median drops small stars (default: %(default)s)")
    add("-dq", "--delinearization-quantile", type=float,
        help="quantile of the picture that the stretch takes to 1; what is brighter is clipped for the fit. Lower stretches "
             f"more; raise it when the preview shows blown out sky (default: {DEFAULT_QUANTILE}, with --auto {AUTO_QUANTILE})")
    add("-p", "--preview", action="store_true", help="show stretch, mask and histograms, fit nothing, write no XISF (default: off)")
    add("-N", type=int, help="number of control points; more follow a more complicated sky, and objects too "
                             f"(default: {DEFAULT_POINTS}, with --auto chosen by the tool)")
    add("-O", type=int, choices=(1, 2, 3, 4), metavar="O", default=default.order,
        help="order of the spline, 1 to 4; 2 is a thin plate, 3 is cubic (default: %(default)s)")
    add("-tm", "--threshold-min", type=float, default=default.threshold_min,
        help="leave out what is darker in the stretched picture (default: %(default)s)")
    add("-tM", "--threshold-max", type=float, default=default.threshold_max,
        help="leave out what is brighter in the stretched picture; lower it to mask objects (default: %(default)s)")
    add("-m", "--mask", help="XISF mask of the picture's height and width, 1 channel or as many: 1 = use, 0 = leave out, "
                             "between = weight (default: none)")
    add("-i", "--initializer", choices=("random", "grid"), default=default.initializer, metavar="INITIALIZER",
        help="where the control points start, random or grid (default: %(default)s)")
    add("-e", "--epochs", type=int, default=default.epochs, help="most epochs; the fit stops before when nothing improves (default: %(default)s)")
    add("-a", "--alpha", type=float, default=default.alpha,
        help="weight of the penalties on a sky that is negative or brighter than the picture (default: %(default)g)")
    add("-B", type=int, default=default.batch,
        help=f"batch size: independent samples of {SAMPLE_PIXELS} pixels that the fit sees (default: %(default)s)")
    add("-lr", type=float, default=default.learning_rate, help="learning rate at the start (default: %(default)s)")

    more = parser.add_argument_group("more")
    add = more.add_argument
    add("--auto", action="store_true", help="choose object mask, -dq and -N from the picture; what you give by hand stays (default: off)")
    add("--smoothing", type=_smoothing, default=None, metavar="{auto,NUMBER}",
        help="stiffness of the surface: 0 goes through every control point, 10 is nearly a plane (default: auto, chosen from the picture)")
    add("--seed", type=int, default=default.seed, help="of all random numbers; the same command gives the same pictures (default: %(default)s)")
    add("--save-mask", action="store_true", help="also write <name>_mask.xisf, the mask in force, to edit and give back with -m (default: off)")
    add("--figures", choices=("auto", "show", "save", "none"), default="auto",
        help="result figure or preview: show it in a window or notebook, save it as PNG, or neither; auto shows it where it can "
             "(and saves the preview where it cannot) (default: %(default)s)")
    add("--animate", action="store_true", help="also write <name>_optimization.gif: how the surface settles (default: off)")
    add("--quiet", action="store_true", help="print warnings and errors only (default: off)")
    add("--version", action="version", version=f"bgoptimizer {VERSION}")
    return parser


def _parse(argv: Optional[Sequence[str]]) -> Tuple[argparse.Namespace, Settings]:
    """Options and settings, or exit 2 with a sentence."""
    parser = build_parser()
    options = parser.parse_args(argv)
    for flag in ("save_mask", "animate"):
        if options.preview and getattr(options, flag):
            parser.error(f"--{flag.replace('_', '-')} needs a fit and --preview does none; leave one of them out")
    try:
        return options, Settings(
            options.downscaling_factor, options.downscaling_func, options.delinearization_quantile, options.N, options.O,
            options.threshold_min, options.threshold_max, options.initializer, options.epochs, options.alpha, options.B,
            options.lr, options.smoothing, options.auto, options.seed)
    except ValueError as error:
        parser.error(str(error))


def main(argv: Optional[Sequence[str]] = None) -> int:
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
        return _fail("there is not enough memory; close other programs, crop the picture, or split its channels and do each alone")
    except OSError as error:
        return _fail(f"{error.filename or 'a file'}: {error.strerror or error}; check the path, the disk and your rights to it")
    except ImportError as error:
        return _fail(f"{error.name} cannot be imported; install what is needed with: python -m pip install -r requirements.txt")
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
    names = _check_paths(options)
    where = _place_for_pictures(options)
    if not options.preview and _has_good_header(options.input_file):
        _start_importing()

    planes, source = _read(options.input_file, say)
    mask = None if options.mask is None else _read(options.mask, _quiet)[0]
    if not options.preview:
        _check_memory(planes)
    if not (options.preview or options.compress):
        _check_space(options.output_path, (2 + options.save_mask) * planes.nbytes)
    if options.preview and not settings.auto:
        settings = replace(settings, smoothing=settings.smoothing or 0.0)  # shown nowhere, but takes seconds to choose
    prepared, settings = examine(planes, settings, mask, say)
    del mask
    _report(prepared, settings, say)
    title = os.path.basename(options.input_file).encode("utf-8", "replace").decode().replace("$", r"\$")  # no formula
    if options.preview:
        if where:
            put_picture(lambda figure: draw_preview(figure, prepared, settings, title), where, names["preview"])
        written = [names["preview"]] if where == "file" else []
        _say_end(written, started, say)
        return _hold_windows(where)

    interrupts.check()
    interrupts.patient = True
    with _progress(settings.epochs, options.quiet, say) as show:
        fit = fit_sky(prepared, settings, say, lambda epoch, loss: (interrupts.check(), show(epoch, loss)))
    interrupts.patient = False
    interrupts.check()
    say(f"{fit.stopped}; best loss {fit.history[:, 0].min():.4f}")
    sky = sky_surface(prepared, fit, planes.dtype)
    done = subtract(planes, sky, prepared.median)
    _report_subtraction(done, prepared, fit, planes.size, say)
    history = _history(options, settings, fit, done)
    outputs = [names["model"], names["subtracted"]] + [names["mask"]] * options.save_mask + [names["animation"]] * options.animate
    with atomic_outputs(*outputs) as files:
        write_xisf(files[1], planes, source, history + ["bgoptimizer: this is the picture without the sky"], options.compress)
        del planes  # of three large arrays never more than one is held
        write_xisf(files[0], _SkyPlanes(sky), source, history + ["bgoptimizer: this is the sky"], options.compress)
        if options.save_mask:
            write_xisf(files[2], full_mask(prepared, settings), plate_solution(source), history + ["bgoptimizer: this is the mask, 1 = sky"], options.compress)
        if options.animate:
            write_animation(files[-1], animation_frames(prepared, fit))
    if where:
        put_picture(lambda figure: draw_figures(figure, prepared, settings, fit, title), where, names["figures"])
    _say_end(outputs + [names["figures"]] * (where == "file"), started, say)
    _hold_windows(where)


class _Interrupts:
    """Ctrl-C that cannot get lost: what is being imported may swallow a KeyboardInterrupt, TensorFlow may crash by it."""

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


def _check_paths(options: argparse.Namespace) -> Dict[str, str]:
    """Everything about paths that can fail is tried before the work, so that nobody waits for what cannot be saved.

    Returns:
        What may be written -> its path.
    """
    for path in filter(None, (options.input_file, options.mask)):
        if not os.path.exists(path):
            raise BgError(f"{path} does not exist; check the name")
        if os.path.isdir(path):
            raise BgError(f"{path} is a folder; name an XISF file in it")
    folder, stem = options.output_path, os.path.splitext(os.path.basename(options.input_file))[0]
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise BgError(f"{folder} is a file, not a folder; name a folder for the outputs")
    endings = {"model": "bgModel.xisf", "subtracted": "bgSubtracted.xisf", "mask": "mask.xisf", "preview": "preview.png",
               "figures": "figures.png", "animation": "optimization.gif"}
    names = {what: os.path.join(folder, f"{stem}_{ending}") for what, ending in endings.items()}
    if os.path.isdir(folder) or not (options.preview and options.figures in ("show", "none")):
        try:
            os.makedirs(folder, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise BgError(f"cannot write to {folder}: {error.strerror}; choose another folder") from None
    for path in names.values():
        for kept in filter(None, (options.input_file, options.mask)):
            if os.path.exists(path) and os.path.samefile(path, kept):
                raise BgError(f"{path} would be overwritten, and it is what you gave to read; choose another output folder")
    return names


def _place_for_pictures(options: argparse.Namespace) -> Optional[str]:
    """Where the preview or the figures go: "notebook", "window", "file", or None."""
    if options.figures in ("save", "none"):
        return {"save": "file", "none": None}[options.figures]
    kind = display_kind()
    if kind is None and options.figures == "show":
        raise BgError("there is neither a notebook nor a window to show figures in; use --figures save")
    return kind or ("file" if options.preview else None)


def _has_good_header(path: str) -> bool:
    """Whether the file seems worth importing TensorFlow for; what is wrong with it is said when it is read."""
    try:
        if not os.path.isfile(path):  # opening a FIFO would wait forever
            return False
        with open(path, "rb") as file:
            return bool(_read_header(file))
    except (BgError, OSError):
        return False


def _start_importing() -> None:
    """Import TensorFlow beside the reading; whoever needs it waits for this import, or sees it fail again."""
    if sys.stderr is sys.__stderr__ is not None:  # our own lines take a way of their own, past what is silenced below
        sys.stderr = open(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")
    threading.Thread(target=_import_silently, daemon=True).start()


def _import_silently() -> None:
    """TensorFlow's C++ greets with a page of log lines, and again at the first operation; no setting silences all."""
    with suppress(Exception):  # there is no stderr, no TensorFlow, or a GPU that does not start
        kept = os.dup(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            import_tensorflow().zeros(1)
        finally:
            os.dup2(kept, 2)


def _read(path: str, say: Callable[[str], None]) -> Tuple[np.ndarray, Source]:
    picture = read_xisf(path)
    for text in picture.warnings:
        _warn(f"{path} {text}")
    count, height, width = picture.planes.shape
    say(f"{path}: {width} x {height}, {'gray' if count == 1 else 'RGB'}, {picture.planes.dtype}")
    return picture.planes, picture.source


def _check_memory(planes: np.ndarray) -> None:
    """Warn where the system may end the run for want of memory, which it does without a word. Linux tells how much is free."""
    needed, free = 0.6e9 + 2 * planes[0].nbytes, math.inf  # TensorFlow, and two planes while writing
    with suppress(OSError, ValueError, IndexError):
        with open("/proc/meminfo") as file:
            free = 1024 * [int(line.split()[1]) for line in file if line.startswith("MemAvailable")][0]
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            free = min(free, int(limit.read()) - int(used.read()))
    if free < needed:
        _warn(f"about {needed / 1e9:.1f} GB more memory is needed and {free / 1e9:.1f} GB are free; "
              "if the run dies, close other programs, or crop the picture or split its channels")


def _check_space(folder: str, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BgError(f"{folder} has {free / 1e6:.0f} MB free and the outputs need {needed / 1e6:.0f} MB; "
                      "free space, choose another folder, or try --compress")


def _report(prepared: Prepared, settings: Settings, say: Callable[[str], None]) -> None:
    """Numbers to act on before the fit."""
    part, reduced = shares(prepared), prepared.image.shape
    say(f"reduced to {reduced[1]} x {reduced[0]}: {part['used']:.1%} used, {part['masked']:.1%} masked, "
        f"{part['missing']:.1%} missing; {part['clipped']:.1%} clipped at 1 by the stretch (-dq {settings.delinearization_quantile:g})")
    for k, letter in enumerate(_channel_letters(prepared)):
        low, scale = prepared.stretch.pedestal[k], prepared.stretch.scale[k]
        say(f"  {letter}: minimum {low:.6f}, median {prepared.median[k]:.6f}, clipped above {low + scale:.6f}")
    share = blown_out(prepared).mean()
    if share:
        _warn(f"the stretch clips a smooth part of the picture ({share:.1%} of the frame), most likely sky, "
              f"and the fit loses it there; raise -dq (now {settings.delinearization_quantile:g})")


@contextmanager
def _progress(epochs: int, quiet: bool, say: Callable[[str], None]) -> Iterator[Callable[[int, float], None]]:
    """Gives a listener for the fit's epochs: a bar on a terminal, a line every 100 epochs elsewhere."""
    if quiet or not (sys.stderr and sys.stderr.isatty()):  # None: closed by the caller
        yield lambda epoch, loss: say(f"epoch {epoch:4d}  loss {loss:.4f}") if epoch % 100 == 0 else None
        return
    from tqdm import tqdm
    with tqdm(total=epochs, desc="fitting", unit="epoch", leave=False) as bar:
        def on_epoch(epoch, loss):
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update()
        yield on_epoch


def _report_subtraction(done: Subtraction, prepared: Prepared, fit: Fit, samples: int, say: Callable[[str], None]) -> None:
    after = reduced_sky(prepared, fit)[1]
    say(f"gradient {_percent(gradient(prepared.linear, prepared.used))} of the sky's level before, {_percent(gradient(after, prepared.used))} after")
    say("offsets: " + ", ".join(f"{letter} {offset:.6f}" for letter, offset in zip(_channel_letters(prepared), done.offsets)))
    say(f"clipped: {done.below.sum()} samples at 0, {done.above.sum()} at 1, of {samples}")


def _history(options: argparse.Namespace, settings: Settings, fit: Fit, done: Subtraction) -> List[str]:
    """HISTORY lines: what made this picture, to the last setting."""
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    lines = [f"bgoptimizer {VERSION}, {now}"]
    lines += [f"bgoptimizer: {item.name} = {getattr(settings, item.name)}" for item in fields(settings)]
    lines += [f"bgoptimizer: mask = {os.path.basename(options.mask) if options.mask else None}",
              f"bgoptimizer: control points used = {len(fit.positions)}", f"bgoptimizer: {fit.stopped}"]
    return lines + [f"bgoptimizer: offset of channel {k} = {offset:.9g}" for k, offset in enumerate(done.offsets)]


def full_mask(prepared: Prepared, settings: Settings) -> np.ndarray:
    """The mask in force at full size, (1 or c, h, w) float32, 1 = sky: one channel if all have the same."""
    height, width = prepared.full_shape
    weight = np.moveaxis(prepared.weight, -1, 0)
    weight = weight[:1] if (weight == weight[:1]).all() else weight
    row, column = (np.arange(n) // settings.downscaling_factor for n in (height, width))
    return np.ascontiguousarray(weight[:, row[:, None], column], np.float32)


def _say_end(written: List[str], started: float, say: Callable[[str], None]) -> None:
    for path in written:
        say(f"wrote {path}")
    say(f"{time.perf_counter() - started:.1f} s")


def _hold_windows(where: Optional[str]) -> None:
    """Keep windows open until they are closed."""
    if where == "window":
        from matplotlib import pyplot
        pyplot.show()


if __name__ == "__main__":
    sys.exit(main())
