#!/usr/bin/env python3
# /// script
# requires-python = ">= 3.8, < 3.14"  # 3.13 is the newest tried
# dependencies = [  # those of requirements.txt
#   'tensorflow ~= 2.13.0 ; python_version < "3.9"',
#   'tensorflow ~= 2.15.0 ; python_version >= "3.9" and python_version < "3.12"',
#   'tensorflow >= 2.16 ; python_version >= "3.12" and python_version < "3.15"',
#   'tensorflow == 0+needs.Python.3.14.or.older ; python_version >= "3.15"',
#   'tensorflow-addons >= 0.21 ; python_version < "3.12" and platform_machine != "aarch64"',
#   'astropy', 'imagecodecs', 'lz4', 'matplotlib', 'numpy', 'pillow', 'scikit-image', 'scipy',
#   'tifffile', 'tqdm', 'xisf >= 0.9.6', 'zstandard',
# ]
# ///
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
  bgoptimizer.py m31.xisf out --reference survey.fits
                                            another picture tells nebula from glow
  bgoptimizer.py lights out --auto          all pictures of a folder, and a report
  bgoptimizer.py "lights/*.fit" out --jobs 4 --skip-done
                                            in 4 processes, without those done

from Python, with image of shape (h, w, c), linear, in any unit:
  result = bgoptimizer.optimize(image, bgoptimizer.Settings(auto=True))
  result.subtracted, result.model

exit codes: 0 done, 1 could not be done, 2 wrong usage, 130 interrupted (TERM 143, HUP 129)
"""
from __future__ import annotations

import argparse
import base64
import copy
import csv
import errno
import functools
import gc
import glob
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import logging
import math
import multiprocessing
import numbers
import os
import platform
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import warnings
import zlib
from collections import Counter
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
)
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Callable, ContextManager, Iterable, Iterator, NamedTuple, Sequence
from xml.etree import ElementTree
from xml.parsers import expat

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

if __name__ == "__main__":
    # Until `main` listens, Ctrl-C ends the command at once, without a traceback of imports
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# Full-size work has threads of its own, and the equations solved here are small. More threads of
# BLAS would only get in the way: with them --auto needs 2.7 s to find the sky, without them 0.8 s.
# And sums are taken in another order by every number of threads, so their last digits differ,
# and the fit turns these into a thousandth of the model's range.
# The libraries read these once, when they are loaded. The command sets them, so that its bytes are
# always the same; a program that imports this script and has set them itself keeps its own.
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1"}
os.environ.update(ONE_THREAD if __name__ == "__main__" else {**ONE_THREAD, **os.environ})
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # else it takes all memory of a GPU

import lz4.block  # noqa: E402
import numpy as np  # noqa: E402
import scipy  # noqa: E402  (its parts are imported when first used)
import zstandard  # noqa: E402
from xisf import XISF  # noqa: E402

VERSION = "2.0.0"

# --------------------------------------------------------------------------------------------------
# Settings and errors
# --------------------------------------------------------------------------------------------------

DEFAULT_QUANTILE = 0.95
DEFAULT_POINTS = 32
AUTO_QUANTILE = 0.999  # clips no bright corner of the sky
AUTO_POINTS = 96  # more than 32 cannot dig into objects, because they are left out

logger = logging.getLogger("bgoptimizer")


class BgError(Exception):
    """The job cannot be done. The text is one sentence: what is wrong, and what to do about it."""


NO_MEMORY = re.compile(
    "cannot allocate memory|unable to allocate|failed to map segment|bad_alloc|out of memory"
    "|OOM when|ResourceExhausted|can't start new thread", re.IGNORECASE)
"""What libraries say, each in its own way, when there is no memory left."""


@contextmanager
def memory_errors():
    """Turn each error that comes from a lack of memory into a MemoryError."""
    try:
        yield
    except (BgError, MemoryError):  # said already
        raise
    except Exception as error:
        root = error
        while root is not None:
            if isinstance(root, MemoryError) or NO_MEMORY.search(f"{type(root).__name__} {root}"):
                raise MemoryError from error
            root = root.__cause__ or root.__context__
        raise


@dataclass(frozen=True)
class Settings:
    """What a run is asked to do; checked when made.

    None means that it was not asked for: `resolved` and `examine` then choose a value.

    Raises:
        ValueError: a value is out of its range; the text names the flag and the range.
    """

    downscaling_factor: int = 8  # less noise, fewer stars, 64 times fewer pixels
    downscaling_func: str = "median"  # drops small stars
    delinearization_quantile: float | None = None
    points: int | None = None
    order: int = 2  # a thin plate, the surface that bends least
    threshold_min: float = 0.001
    threshold_max: float = 1.0
    initializer: str = "random"
    epochs: int = 1000
    alpha: float = 5.0  # a sky above a pixel costs 11 times what a sky below it costs, so it
    # settles at the low side of the noise
    batch: int = 1  # samples of SAMPLE_CELLS; one is enough
    learning_rate: float = 0.001
    smoothing: float | None = None
    correction: str = "subtract"  # or "divide", for what dims the light instead of adding to it
    auto: bool = False
    seed: int = 0

    def __post_init__(self):
        def whole(value, low, high=math.inf):
            return isinstance(value, numbers.Integral) and low <= value <= high

        def number(value):  # NaN lies in no range
            return value if isinstance(value, numbers.Real) else math.nan

        quantile = self.delinearization_quantile
        points = self.points
        smoothing = self.smoothing
        minimum = number(self.threshold_min)
        above_minimum = minimum < number(self.threshold_max) < math.inf
        checks = (
            ("-dx", whole(self.downscaling_factor, 1, 1_000_000), "1 to 1000000"),
            ("-df", self.downscaling_func in ("median", "mean"), "median or mean"),
            ("-dq", quantile is None or 0 < number(quantile) <= 1, "above 0, at most 1"),
            ("-N", points is None or whole(points, 3, 4096), "3 to 4096"),
            ("-O", self.order in (1, 2, 3, 4), "1, 2, 3 or 4"),
            ("-tm", -math.inf < minimum < math.inf, "a finite number"),
            ("-tM", above_minimum, "a finite number above -tm"),
            ("-i", self.initializer in ("random", "grid"), "random or grid"),
            ("-e", whole(self.epochs, 1), "1 or more"),
            ("-a", 0 <= number(self.alpha) <= 1e9, "0 to 1e9"),
            ("-B", whole(self.batch, 1), "1 or more"),
            ("-lr", 0 < number(self.learning_rate) <= 1e9, "above 0, at most 1e9"),
            ("--smoothing", smoothing is None or 0 <= number(smoothing) <= 1e9,
             "auto, or 0 to 1e9"),
            ("--correction", self.correction in ("subtract", "divide"), "subtract or divide"),
            ("--seed", whole(self.seed, 0, 2**32 - 1), "0 to 4294967295"),
        )
        for flag, good, wanted in checks:
            if not good:
                raise ValueError(f"{flag} must be {wanted}")

    def resolved(self) -> Settings:
        """Return these settings with defaults in place of every None but `smoothing`.

        The smoothing is chosen with the sky, by `examine`.
        """
        quantile = AUTO_QUANTILE if self.auto else DEFAULT_QUANTILE
        points = AUTO_POINTS if self.auto else DEFAULT_POINTS
        return replace(
            self,
            delinearization_quantile=self.delinearization_quantile or quantile,
            points=self.points or points)


# --------------------------------------------------------------------------------------------------
# Pictures on disk: what all formats share
#
# Row 0 of a picture is its top. Libraries parse and decode. What may crash in them, or run away,
# is done in a process of its own.
# --------------------------------------------------------------------------------------------------

READ_AT_ONCE = 1 << 20  # bytes that are read together where no picture gives the measure
GZIP_START = b"\x1f\x8b"
LARGEST_VALUE = 1e30  # floating point beyond it is no light, but damage, or means something else
SMALLEST_MARK = -99  # -99, -999, -9999, -32768, and the like stand for what is missing

NO_QUESTIONS = 1 << 28
"""Bytes that any compressed data may claim to hold: few enough for a small file that lies."""

MOST_COMPRESSED = 250
"""Bytes that one stored byte may stand for beyond NO_QUESTIONS. Of pictures, with their noise,
nothing makes more than some dozens."""

MAX_TILES = 100_000  # or strips of a picture, each of which takes a call to decompress

# What a decoder may take: seconds, one more for so many bytes (tenfold of what it needs), and bytes
# beside thrice what it decodes
DECODING_SECONDS, DECODING_SPEED, DECODER_SPARE = 60, 500_000, 1 << 27

DECODER = """
import sys
sys.path[:] = filter(None, sys.path)  # nothing is imported from where pictures are
import os, warnings
import numpy
kind, number, dtype = sys.argv[1], int(sys.argv[2]), sys.argv[3]
parent, memory = map(int, sys.argv[4:])
warnings.simplefilter("ignore")
if kind == "fits":
    from astropy.io import fits
else:
    import imagecodecs, tifffile
try:
    import ctypes, resource
    with open("/proc/self/statm") as file:
        memory += int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    ctypes.CDLL(None).prctl(1, 9)  # Linux ends this process with its parent
    if os.getppid() != parent:
        sys.exit(1)
except (ImportError, AttributeError, OSError, ValueError, TypeError):
    pass  # another system
if kind == "fits":
    with fits.open(sys.stdin.buffer, do_not_scale_image_data=True, memmap=False) as hdus:
        samples = hdus[number].data
else:
    with tifffile.TiffFile(sys.stdin.buffer, _multifile=False) as tiff:
        samples = tiff.pages[number].asarray(maxworkers=1)
sys.stdout.buffer.write(numpy.ascontiguousarray(samples, dtype))
"""
"""A program that decodes the picture `number` of the file that is its standard input."""

NOT_A_FILE = "is not a file", "name a picture, or save the data to one first"
NOT_DECODED = "is damaged: its data cannot be read or decompressed"

NO_LIGHT = re.compile("dark|bias|flat|offset|zero", re.IGNORECASE)
"""What IMAGETYP and the like say of frames that show no sky."""


class Unit(NamedTuple):
    """A picture's own unit: its values are samples * scale + offset."""
    scale: float = 1.0
    offset: float = 0.0
    mark: float | None = None  # the value, such as -9999, that means "missing": here it is NaN


@dataclass
class Picture:
    """An image in [0, 1]. Samples that are exactly 0 or not finite are missing."""
    planes: np.ndarray  # (c, h, w), c = 1 or 3; row 0 is the top. float32, or float64 if it was
    source: Source  # or a FitsSource, or a TiffSource
    warnings: list  # of str, one line each
    unit: Unit = Unit()
    note: str = ""  # what the samples were, in words


class _Unreadable(ValueError):
    """What is wrong with a file, in words that go on from its name, and what to do about it."""

    def __init__(self, problem, advice="copy or save it again"):
        super().__init__(problem[:150])
        self.advice = advice


@contextmanager
def _refusals(path):
    """Turn what is wrong with a file that is read into a BgError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries' own, on headers not quite right
            with memory_errors():
                yield
    except (BgError, MemoryError, ImportError):
        raise
    except _Unreadable as error:
        raise BgError(f"{path} {error}; {error.advice}") from None
    except OSError as error:
        reason = error.strerror or error
        raise BgError(f"{path} cannot be read: {reason}; check the path and the disk") from None
    except Exception as error:  # the libraries raise anything on damaged files
        reason = " ".join(str(error).split())[:100]
        raise BgError(f"{path} is damaged, or of a kind that is not read ({reason}); "
                      "copy or save it again") from None


def _require(fact, problem, *advice):
    """Refuse what is being read unless `fact` holds."""
    if not fact:
        raise _Unreadable(problem, *advice)


def _check_expansion(codec, known, size, stored):
    """Refuse data of an unknown codec, or `stored` bytes that claim to hold far too many."""
    _require(codec in known, f"is compressed with {codec}, which is not read",
             "save it uncompressed")
    _require(size <= max(NO_QUESTIONS, MOST_COMPRESSED * stored),
             "claims more data than its compressed block can hold")


@contextmanager
def _opened(path):
    """Open a file to read; what gzip has packed is unpacked into a nameless one."""
    _require(stat.S_ISREG(os.stat(path).st_mode), *NOT_A_FILE)  # opening a FIFO would wait forever
    with ExitStack() as stack:
        file = stack.enter_context(open(path, "rb"))
        if file.read(len(GZIP_START)) == GZIP_START:
            file = stack.enter_context(_unzipped(file))
        file.seek(0)
        yield file


@contextmanager
def _unzipped(packed):
    """Unpack a gzip file."""
    stored = os.fstat(packed.fileno()).st_size
    packed.seek(0)
    with tempfile.TemporaryFile() as file, gzip.GzipFile(fileobj=packed) as pieces:
        try:
            for piece in iter(lambda: pieces.read(READ_AT_ONCE), b""):
                file.write(piece)
                _check_expansion("gzip", ("gzip",), file.tell(), stored)
        except (EOFError, gzip.BadGzipFile, zlib.error):
            raise _Unreadable("is cut short or damaged: gzip cannot unpack it") from None
        yield file


@contextmanager
def _stream_of(kind, file, number, position, dtype, size):
    """Yield a stream of a picture's samples: the file itself, or what another process decodes.

    Args:
        kind: "fits" or "tiff".
        file: opened; if the samples are decoded, nothing can be read from it afterwards.
        number: of the HDU or page.
        position: of the samples in the file; None if they are to be decoded, which may crash.
        dtype, size: of the samples, in all in bytes.
    """
    if position is not None:
        file.seek(position)
        yield file
        return
    limits = os.getpid(), 3 * size + DECODER_SPARE
    arguments = map(str, (kind, number, dtype.str, *limits))
    os.lseek(file.fileno(), 0, os.SEEK_SET)
    process = subprocess.Popen([sys.executable, "-c", DECODER, *arguments], stdin=file,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    clock = threading.Timer(DECODING_SECONDS + size / DECODING_SPEED, process.kill)
    clock.daemon = True
    clock.start()
    try:
        _require(process.stdout.peek(1), NOT_DECODED)
        yield process.stdout
    finally:
        clock.cancel()
        process.kill()
        process.wait()
        process.stdout.close()


def _rows_of(stream, dtype, row_shape):
    """Return a function for `_read_planes` that reads rows of this shape one after the other."""
    row_size = math.prod(row_shape) * dtype.itemsize

    def read_rows(start, stop):
        size = (stop - start) * row_size
        data = stream.read(size)
        _require(len(data) == size, "is cut short: rows of it are missing")
        return np.frombuffer(data, dtype).reshape(stop - start, *row_shape)

    return read_rows


def _read_planes(read_rows, dtype, shape, together, white=None, step=1, zero=0, blank=None,
                 flip=False):
    """Read samples strip by strip, in the order of the file.

    Args:
        read_rows: (start, stop) -> so many rows as stored, (n, w, together).
        dtype: of the samples.
        shape: (c, h, w) of the planes, c = 1 or 3.
        together: samples of a pixel that stand together. With 1, whole planes follow each other.
        white, step, zero: samples become (stored * step + zero) / white.
        blank: the integer that means "missing".
        flip: True if the first row is the lowest.

    Returns planes (float64 if the samples are, else float32).
    """
    colors, height, width = shape
    planes = np.empty(shape, "f8" if dtype.name == "float64" else "f4")
    tables = planes[:, ::-1] if flip else planes
    tables = tables[..., None]  # (c, h, w, 1)
    if together > 1:
        tables = np.moveaxis(tables[..., 0], 0, 2)[None]  # (1, h, w, c)
    scaled = white or (step, zero) != (1, 0)
    calculated = np.float64 if scaled or dtype.kind != "f" else planes.dtype
    for number, table in enumerate(tables):
        for rows in _strips(height, width * together):
            first = number * height
            samples = read_rows(first + rows.start, first + rows.stop)[..., :colors]
            values = samples.astype(calculated)
            if scaled:
                values = (values * step + zero) / (white or 1)
            if blank is not None:
                values[samples == blank] = np.nan
            table[rows] = values
    return planes


def _picture(planes, white, source, notes, path):
    """Return a Picture; planes of integers, whose largest is `white`, lie in [0, 1] already."""
    unit, note, marked = Unit(), f"integers, {white} = white", []
    if not white:
        unit, note, marked = _fit_into_unit_range(planes, path)
    return Picture(planes, source, notes + marked, unit, note)


def _white(dtype, step=1, zero=0):
    """Return the largest value of unsigned integers, and None for other numbers.

    FITS has no unsigned integers of more than 8 bits: it stores signed ones and adds half the
    range.
    """
    if dtype.kind == "f" or step != 1:
        return None
    limits = np.iinfo(dtype)
    return int(limits.max + zero) if limits.min + zero == 0 else None


def _finite_range(values):
    """Return the smallest and the largest of the finite values; inf and -inf without any."""
    low, high = values.min(), values.max()
    if not np.isfinite([low, high]).all():
        finite = np.isfinite(values)
        low = values.min(where=finite, initial=math.inf)
        high = values.max(where=finite, initial=-math.inf)
    return float(low), float(high)


def array_unit(planes):
    """Bring planes outside [0, 1] into it, in place, and return their Unit. Raises BgError."""
    unit, _, marked = _fit_into_unit_range(planes, "the image")
    for text in marked:
        logger.warning(f"the image {text}")
    return unit


def _leave_out_marks(planes, notes):
    """Set samples to NaN, in place, that a value such as -9999 marks as missing, and note that.

    It is a whole number up to SMALLEST_MARK, and all others are nearer to their median than to it.

    Returns the value, None without one.
    """
    lowest = min(_finite_range(plane)[0] for plane in planes)
    if not (-LARGEST_VALUE < lowest <= SMALLEST_MARK and lowest == round(lowest)):
        return None
    others = np.concatenate([plane[np.isfinite(plane) & (plane > lowest)] for plane in planes])
    if not others.size or others.min() - lowest <= np.median(others) - others.min():
        return None
    marked = planes == lowest
    planes[marked] = np.nan
    count = np.count_nonzero(marked)
    notes.append(f"has {count} samples of {lowest:g}, which are taken for missing")
    return lowest


def _fit_into_unit_range(planes, name):
    """Bring planes outside [0, 1] into it, in place; return their Unit, a sentence, and warnings.

    Room is left where the corrected picture may need it: above the brightest star, and below the
    noise of the darkest sky, so that negative values stay what they are.
    """
    marked = []
    mark = _leave_out_marks(planes, marked)
    lows, highs = zip(*map(_finite_range, planes))
    lowest, highest = min(lows), max(highs)
    if lowest >= 0 and highest <= 1 or lowest > highest:
        return Unit(mark=mark), "from 0 to 1", marked
    values_are = f"from {lowest:.6g} to {highest:.6g}"
    if max(-lowest, highest) >= LARGEST_VALUE:
        raise BgError(f"{name} has values {values_are}, which cannot be light; "
                      "look at it, and at what was done to it")
    offset = 0.0
    value = "value"
    if lowest < 0:
        offset = lowest - _room_below(planes, lowest, highest)
        value = f"(value + {-offset:.6g})"
    # A power of two: without an offset, all digits stay
    scale = 2.0 ** (math.ceil(math.log2(highest - offset)) + 1)
    for plane in planes:
        missing = plane == 0
        plane -= offset
        plane /= scale
        plane[missing] = 0
    note = f"{values_are}, written back in this unit; the levels below are {value} / {scale:g}"
    return Unit(scale, offset, mark), note, marked


def _room_below(planes, lowest, highest):
    """Return how much darker than its darkest sample a picture may become."""
    height, width = planes[0].shape
    every = (height * width >> 20) | 1  # odd, so that it meets odd and even columns
    sample = planes.reshape(len(planes), -1)[:, ::every]
    sample = sample[np.isfinite(sample) & (sample != 0)]
    middle, bright = lowest, highest
    if sample.size:
        middle, bright = map(float, np.quantile(sample, (0.5, 0.999)))
    return max(2 * (middle - lowest), bright - middle, -lowest / 1000)


def _in_own_unit(plane, unit):
    """Return a plane's samples in the unit of their picture. Missing ones are what they were."""
    if unit == Unit():
        return plane
    number = plane.dtype.type
    values = plane * number(unit.scale) + number(unit.offset)
    values[plane == 0] = 0
    if unit.mark is not None:
        values[np.isnan(plane)] = unit.mark
    return values


# --------------------------------------------------------------------------------------------------
# Pictures on disk: keywords
#
# The keywords of FITS stand in its header as cards of 80 characters, in XISF as elements, and in
# the description of an Astro-TIFF, https://astro-tiff.sourceforge.io, as lines. All become a list
# of Keyword. Outside of FITS they describe, as in PixInsight and Siril, the picture in the order of
# rows that FITS has by convention: from the lowest up.
# --------------------------------------------------------------------------------------------------

FITS_CARD = 80  # characters of a card
HISTORY_COLUMNS = 72  # characters of text that a card of HISTORY has room for
SHORTEST_ROOM = 20  # characters that a name must leave to a text that needs several cards

NUMBER_PATTERN = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[EDed][-+]?\d+)?"
VALUE_PATTERN = rf"(?:'(?:[^']|'')*'|\([^()']*\)|{NUMBER_PATTERN}|[TF])?"
FITS_NAME = re.compile("[A-Z0-9_-]{1,8}")
FITS_VALUE = re.compile(VALUE_PATTERN)
FITS_CARD_WITH_VALUE = re.compile(
    r"(?:(?=.{8}=)([A-Z0-9_-]+) *=|HIERARCH +([^=]*[^= ]) *=|(CONTINUE)  )"
    rf" *({VALUE_PATTERN}) *(?:/ ?(.*))?")
TEXT_NAMES = ("COMMENT", "HISTORY", "")  # cards without a value: their text is the comment
# Keywords that every writer makes anew
STRUCTURE_NAMES = re.compile(
    r"SIMPLE|XTENSION|EXTEND|BITPIX|NAXIS\d*|PCOUNT|GCOUNT|BSCALE|BZERO|BLANK|END|GROUPS"
    "|DATASUM|CHECKSUM")
RANGE_NAMES = ("DATAMIN", "DATAMAX")
LEVEL_NAMES = re.compile("CBLACK|CWHITE|SATURATE|SATLEVEL|DATAMIN|DATAMAX|BUNIT")
"""Keywords in the unit of the samples. (PEDESTAL is in steps of 16 bits in all files.)"""

# Keywords and XISF's properties, as "element name", that new pixels make untrue
STALE_PIXEL_METADATA = re.compile(
    r"FITSKeyword (BITPIX|NAXIS\d*|BSCALE|BZERO|CHECKSUM|DATASUM|NOISE[A-Z]?\d*)$"
    r"|Property (.*:)?(Statistics|Noise)(:|$)")

MAX_KEPT_CARDS = 18_000  # of a header; with HISTORY, it must be readable, too


class Keyword(NamedTuple):
    """A keyword of a picture."""
    name: str
    value: str  # as it stands in FITS: 'text', 1.50, T; empty for HISTORY and the like
    comment: str = ""


def _parse_card(card):
    """Return the Keyword of a card; None if it is malformed."""
    name = card[:8].rstrip()
    if name in TEXT_NAMES:
        return Keyword(name, "", card[8:].rstrip())
    match = FITS_CARD_WITH_VALUE.fullmatch(card.rstrip())
    if not match:
        return None
    name, long_name, continued, value, comment = match.groups("")
    return Keyword(name or long_name or continued, value, comment)


def _parse_cards(cards):
    """Return the keywords of cards. Texts over several cards are joined; see `_cards`.

    Malformed cards become COMMENT.
    """
    found = []  # of name, the parts of a text, comments
    for card in cards:
        keyword = _parse_card(card)
        goes_on = found and found[-1][1][-1].endswith("&'")
        if keyword and keyword.name == "CONTINUE" and keyword.value[:1] == "'" and goes_on:
            _, parts, comments = found[-1]
            parts[-1] = parts[-1][:-2]
            parts.append(keyword.value[1:])
            comments.append(keyword.comment)
            continue
        if not keyword or keyword.name == "CONTINUE":
            keyword = Keyword("COMMENT", "", card.rstrip())
        found.append((keyword.name, [keyword.value], [keyword.comment]))
    keywords = []
    for name, parts, comments in found:
        value = "".join(parts)
        if value[:1] == "'":
            value = value[:-1].rstrip() + "'"
        keywords.append(Keyword(name, value, " ".join(filter(None, comments))))
    return keywords


def _cards(keywords):
    """Return the cards of keywords. What no card can hold becomes COMMENT."""
    cards = []
    for keyword in keywords:
        if keyword.name in TEXT_NAMES:
            cards += _cards_of_text(keyword.name, keyword.comment)
        else:
            cards += _cards_of_value(keyword)
    return [_printable(card[:FITS_CARD]).ljust(FITS_CARD) for card in cards]


def _cards_of_text(name, text):
    """Return cards without a value, such as HISTORY, that hold a text."""
    return [f"{name:8}{line}" for line in _wrapped(text)]


def _cards_of_value(keyword):
    """Return the card of a keyword with a value; a long text needs several."""
    name, value, comment = keyword
    start = f"{name:8}= " if FITS_NAME.fullmatch(name) else f"HIERARCH {name} = "
    room = FITS_CARD - len(start)
    if "=" not in name and len(value) <= room:
        value = f"{value:20}" if value.startswith("'") else f"{value:>20}"
        comment = comment and f" / {comment}"
        return [start + value + comment]
    if "=" not in name and value.startswith("'") and room >= SHORTEST_ROOM:
        return _cards_of_long_text(start, value[1:-1].replace("''", "'"), comment)
    return _cards_of_text("COMMENT", f"{name} = {value} / {comment}")


def _cards_of_long_text(start, text, comment):
    """Return the cards of a text, the first with this `start`; the comment stands after it.

    fits.Card, which could do that, takes time with the square of the text's length.
    """
    width = FITS_CARD - len(start) - len("'&'")
    if "'" in text:
        width //= 2  # a quote is written as two, which may not part
    parts = []
    for place in range(0, len(text), width):
        piece = text[place:place + width].replace("'", "''")
        parts.append((piece, ""))
    if comment:
        for line in _wrapped(comment, FITS_CARD - len("CONTINUE  '&' / ")):
            parts.append(("", f" / {line}"))
    cards = [f"CONTINUE  '{piece}&'{remark}" for piece, remark in parts[:-1]]
    piece, remark = parts[-1]
    cards.append(f"CONTINUE  '{piece}'{remark}")
    cards[0] = start + cards[0][len("CONTINUE  "):]
    return cards


def _split_cards(text):
    """Return the cards of a header, which stand in it without a mark between them."""
    return [text[start:start + FITS_CARD] for start in range(0, len(text), FITS_CARD)]


def _printable(text):
    """Return what a FITS header can hold of a text."""
    return re.sub("[^ -~]", "?", text)


def _wrapped(text, width=HISTORY_COLUMNS):
    """Return the lines of a text, which are short enough for HISTORY."""
    if len(text) <= width and "\n" not in text:
        return [text]
    return re.findall(rf"\S.{{0,{width - 1}}}(?!\S)|\S{{{width}}}", text)


def _changed(keywords, change):
    """Return keywords in which `change`, (name, value) -> value, has set values anew."""
    return [keyword._replace(value=change(keyword.name, keyword.value)) for keyword in keywords]


def _in_unit(unit):
    """Return a change for `_changed` that brings levels into samples from that Unit."""
    def change(name, value):
        if not LEVEL_NAMES.fullmatch(name):
            return value
        if name == "BUNIT" and len(value) > 2:
            return f"'{unit.scale:.9g} {value[1:-1].strip()}'"
        number = _number(value)
        return value if number is None else f"{(number - unit.offset) / unit.scale:.9G}"
    return change


def _with_range(planes, unit):
    """Return a change for `_changed` that sets DATAMIN and DATAMAX to those of planes."""
    def change(name, value):
        if name not in RANGE_NAMES:
            return value
        number = ranges()[RANGE_NAMES.index(name)] * unit.scale + unit.offset
        return f"{number:.9G}" if math.isfinite(number) else value

    @functools.lru_cache(maxsize=None)  # most pictures do not have them
    def ranges():
        lows, highs = zip(*map(_finite_range, planes))
        return min(lows), max(highs)

    return change


def _upside_down(height, keywords):
    """Return a change for `_changed` that turns celestial coordinates with the rows.

    With y' = height + 1 - y, the column of y in the matrix changes its sign, and so do odd powers
    of y in the SIP polynomials, and what they add to y.
    """
    has_matrix = any(re.match("(CD|PC)2_2", name) for name, *_ in keywords)

    def change(name, value):
        number = _number(value)
        match = re.fullmatch(r"(CRPIX2|(?:CD|PC)[12]_2|CDELT2|[AB]P?_\d_(\d))[A-Z]?", name)
        if not match or number is None:
            return value
        if name.startswith("CRPIX"):
            return f"{height + 1 - number!r}"
        odd = match[2] is None or int(match[2]) % 2
        turned = bool(odd) != name.startswith("B")
        if name.startswith("CDELT"):
            turned = not has_matrix
        return f"{-number!r}" if turned else value

    return change


def _number(value):
    """Return the number that a value stands for, None if it is none."""
    try:
        number = float(value.replace("D", "E").replace("d", "e"))
    except ValueError:
        return None
    return int(number) if number.is_integer() else number


def _kept(keywords, white, notes):
    """Return the keywords of FITS or an Astro-TIFF that outputs keep; the others are noted.

    Levels of integers, whose largest is `white`, become those of samples in [0, 1].
    """
    kept, untrue = [], []
    for keyword in keywords:
        if STRUCTURE_NAMES.fullmatch(keyword.name):
            continue
        is_stale = STALE_PIXEL_METADATA.match(f"FITSKeyword {keyword.name}")
        (untrue if is_stale else kept).append(keyword)
    _note_untrue([keyword.name for keyword in untrue], notes)
    _what_keywords_say({name: value for name, value, _ in kept}, notes)
    return _changed(kept, _in_unit(Unit(white))) if white else kept


def _note_untrue(names, notes):
    """Note what is not kept."""
    if names:
        notes.append(f"had {', '.join(names)[:200]}: "
                     "not kept, because the new pixels make them untrue")


def _what_keywords_say(values, notes):
    """Add to `notes` what keywords (texts by name) tell against a picture as input."""
    for name in ("imageType", "IMAGETYP", "FRAME", "FRAMETYP"):
        kind = str(values.get(name, "")).strip("' ")
        if NO_LIGHT.search(kind) and "light" not in kind.lower():
            notes.append(f"is no light frame, says its {name} {kind[:40]!r}: "
                         "there is no sky in it to take out")
            break


def _keywords_of_xisf(source):
    """Return the keywords of an XISF file, such as FITS can have them."""
    keywords = []
    for element in source.root.findall("Image/FITSKeyword"):
        name = element.get("name", "").strip().upper()
        value = element.get("value", "").strip()
        comment = element.get("comment", "")
        if name in TEXT_NAMES:
            value, comment = "", comment or value
        elif not FITS_VALUE.fullmatch(value) or len(value) > HISTORY_COLUMNS:
            text = value[1:-1].replace("''", "'") if value[:1] == value[-1:] == "'" else value
            value = "'" + text.replace("'", "''") + "'"
        if not STRUCTURE_NAMES.fullmatch(name):
            keywords.append(Keyword(name, value, comment))
    return keywords


def _shared_metadata(source, height):
    """Return what all formats can hold of a file's metadata: keywords, and the color profile.

    The keywords are those of a picture whose rows go from the lowest up; there are `height`.
    """
    if source is None:
        return [], b""
    if isinstance(source, Source):
        keywords, icc = _keywords_of_xisf(source), b""
        with suppress(_Unreadable, AttributeError):  # a damaged profile is lost, not the picture
            icc = _icc_of_xisf(source)
    else:
        keywords, icc = source.keywords, source.icc
    keywords = [keyword for keyword in keywords if keyword.name != ROW_ORDER]
    if isinstance(source, FitsSource) and source.top_down:
        keywords = _changed(keywords, _upside_down(height, keywords))
    return keywords, icc


# --------------------------------------------------------------------------------------------------
# Pictures on disk: XISF
#
# The specification: https://pixinsight.com/doc/docs/XISF-1.0-spec/XISF-1.0-spec.html. Where it is
# silent, or where PixInsight reads more than it allows, PixInsight's reader decides.
#
# The header is parsed and checked here, because the `xisf` package fails on many real headers. The
# package then reads the attached blocks. Files are written here, because the package's writer loses
# metadata.
# --------------------------------------------------------------------------------------------------

XML_DECLARATION = b'<?xml version="1.0" encoding="UTF-8"?>'
XISF_ROOT = {
    "version": "1.0",
    "xmlns": "http://www.pixinsight.com/xisf",
    "xmlns:xsi": "http://www.w3.org/2001/XMLSchema-instance",
    "xsi:schemaLocation":
        "http://www.pixinsight.com/xisf http://pixinsight.com/xisf/xisf-1.0.xsd",
}
BARE_XISF = "<xisf><Image/><Metadata/></xisf>"
BLOCK_XISF = (
    '<xisf version="1.0" xmlns="http://www.pixinsight.com/xisf"><Image geometry="{size}:1:1" '
    'sampleFormat="UInt8" location="attachment:{position}:{size}"/><Metadata/></xisf>')
XISF_CODECS = ("zlib", "lz4", "lz4hc", "zstd")
SAMPLE_FORMATS = {  # XISF's names, in lower case, and those of NumPy
    "uint8": "u1", "uint16": "u2", "uint32": "u4", "uint64": "u8", "float32": "f4", "float64": "f8",
}
BYTE_ORDERS = {"little": "<", "big": ">"}
COLOR_CHANNELS = {"gray": 1, "rgb": 3}
INTERLEAVED = {"planar": False, "normal": True}
TEXT_DECODERS = {
    "base64": functools.partial(base64.b64decode, validate=True), "hex": bytes.fromhex,
}
CHECKSUMS = {  # XISF's names and those of hashlib
    "sha-1": "sha1", "sha1": "sha1", "sha-256": "sha256", "sha256": "sha256",
    "sha-512": "sha512", "sha512": "sha512", "sha3-256": "sha3_256", "sha3-512": "sha3_512",
}

# Limits that no real file meets
PART_WEIGHT = 64  # bytes of memory that a tag or an attribute of a header takes, roughly
MAX_HEADER_WEIGHT = 1 << 24  # of a header: its bytes, and PART_WEIGHT for each of these
MAX_HEADER_DEPTH = 64  # elements inside each other
MAX_SUBBLOCKS = 10_000  # of one block; writers make a few for each thread

LZ4_LIMIT = 0x7E000000
"""Bytes: the largest LZ4 block. More would need sub-blocks, and PixInsight fails on those of more
than 2 GiB together."""

ALIGNMENT = 4096  # bytes: attached blocks start at multiples of it, as in PixInsight's own files

# Without leading zeros: PixInsight takes 010 for 8
XISF_INTEGER = re.compile(r"\+?(0|[1-9][0-9]{0,17}|0x[0-9a-fA-F]{1,15})")
XISF_COMPRESSION = re.compile(
    r"(?P<codec>zlib|lz4|lz4hc|zstd)(?P<shuffled>\+sh)?"
    r":(?P<size>[1-9][0-9]{0,17})(:(?P<item>[1-9]|1[0-6]))?")
# Characters that XML 1.0 forbids, bare and as references. PixInsight lets them pass.
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
NOT_XML_REFERENCE = re.compile(
    "&#(0*([0-8]|1[124-9]|2[0-9]|3[01])|x0*([0-8bcef]|1[0-9a-f]));", re.IGNORECASE)
# Metadata, as "element name", that describe the old file
STALE_FILE_METADATA = re.compile(
    "(Data|Thumbnail) |Property XISF:"
    "(Creat|Compress|BlockAlign|MaxInline|Checksum|OutputHint|InputHint|ResourceURL|Load)")
STALE_IMAGE_ATTRIBUTES = (
    "location", "compression", "subblocks", "checksum", "byteOrder", "pixelStorage", "offset")


@dataclass
class Source:
    """What the outputs carry over from a file besides its pixels."""
    root: ElementTree.Element  # the header, without what describes the old pixels and the old file
    blocks: dict  # attached bytes, by the `location` that stands in their elements


@dataclass
class _OpenFile:
    """A file whose header has been read."""
    file: object
    header_end: int  # byte at which the first block may start
    bytes_left: int  # of blocks, that may still be read: overlapping ones could fill any memory
    warnings: list  # of str, for the user


def read_xisf(path):
    """Read the first image of a monolithic XISF file.

    Integers are scaled from their full range, or from `bounds` if given, floats from `bounds`.
    Samples below the lower bound become the smallest normal number, not 0, which would mean
    "missing". Samples above the upper bound become 1. Memory never grows past what an honest file
    of the same geometry and size needs.

    Returns a Picture.
    Raises BgError if the file is damaged, hostile, or of a kind that is not read.
    """
    with _refusals(path), _opened(path) as file:
        root, end = _read_header(file)
        size = os.fstat(file.fileno()).st_size
        opened = _OpenFile(file, end, bytes_left=2 * size, warnings=[])
        planes, mark = _read_pixels(root, opened)
        source = _read_source(root, opened)
    return Picture(planes, source, opened.warnings, Unit(mark=mark))


def _read_header(file):
    """Return the root element, and the byte behind the header."""
    start = file.read(16)
    _require(start[:8] == b"XISF0100", "is not a monolithic XISF file", "save the picture as .xisf")
    length = int.from_bytes(start[8:12], "little")
    end = 16 + length
    _require(end <= os.fstat(file.fileno()).st_size, "is cut short: it ends in its header")
    header = file.read(min(length, MAX_HEADER_WEIGHT + 1))
    header, _, _ = header.partition(b"\0")  # some writers count padding in
    parts = header.count(b"<") + header.count(b"=")
    weight = len(header) + PART_WEIGHT * parts
    _require(weight <= MAX_HEADER_WEIGHT, "has a header too large to be true")
    return _parse_header(header.decode("utf-8-sig", "replace")), end


def _parse_header(text):
    """Return the root element of a header."""
    text = NOT_XML.sub("", text)
    text = NOT_XML_REFERENCE.sub("", text).lstrip()
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
    deepest = root.find("*/" * MAX_HEADER_DEPTH + "*")
    _require(deepest is None, "has a header nested too deeply to be true")
    return root


def _value(attributes, name, default=""):
    """Return an attribute without white space, which none of those that are read may have."""
    return "".join(attributes.get(name, default).split())


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


def _read_block(element, opened):
    """Return the bytes of an element, (n,) uint8 as they are stored, and what tells how.

    No other file is ever opened for it.
    """
    attributes = element.attrib
    method, _, place = _value(attributes, "location").partition(":")
    if method == "attachment":
        stored = _read_attached(place, opened)
    elif method == "embedded":
        element = element.find("Data")
        _require(element is not None, "has an embedded data block without data")
        attributes = {**attributes, **element.attrib}
        stored = _decode_text(element, _value(element.attrib, "encoding", "base64"))
    else:
        _require(method == "inline", f"has its data elsewhere, at {method!r}",
                 "save it as one monolithic .xisf file")
        stored = _decode_text(element, place)
    if "checksum" in attributes:
        name, _, expected = _value(attributes, "checksum").lower().partition(":")
        digest = hashlib.new(_look_up(CHECKSUMS, name, "a checksum of the kind"), stored)
        matches = digest.hexdigest() == expected
        _require(matches, "is damaged: its data do not match their checksum")
    return stored, attributes


def _decode_text(element, encoding):
    """Return the bytes, (n,) uint8, that stand as text in an element."""
    decode = _look_up(TEXT_DECODERS, encoding.lower(), "data in the encoding")
    digits = "".join((element.text or "").split())
    try:
        return np.frombuffer(decode(digits), np.uint8)
    except ValueError:
        raise _Unreadable(f"has damaged {encoding} data") from None


def _read_attached(place, opened):
    """Let the `xisf` package read a block, whose `place` is position and size."""
    position, size = _integers(place, 2, "location")
    missing = position + size - os.fstat(opened.file.fileno()).st_size
    _require(position >= opened.header_end, f"has the impossible location {place!r}")
    _require(missing <= 0, "is cut short: the end of its data is missing")
    opened.bytes_left -= size
    _require(opened.bytes_left >= 0, "has data that overlap with others")
    # The package would fail on many real headers, so a copy of the block gets one that is plain
    header = BLOCK_XISF.format(position=ALIGNMENT, size=size).encode()
    opened.file.seek(position)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "block.xisf")
        with open(path, "wb") as copied:
            _write_header(copied, header)
            copied.seek(ALIGNMENT)
            copied.write(opened.file.read(size))
            _require(copied.tell() == ALIGNMENT + size, "is cut short: it ends in its data")
        return XISF(path).read_image(0, "channels_first").ravel()


def _read_pixels(root, opened):
    """Return the first image's samples, (c, h, w) in [0, 1], and the value that marks missing ones.
    """
    images = root.findall("Image")
    _require(images, "holds no image", "open it in the program that wrote it and save it again")
    if len(images) > 1:
        opened.warnings.append(f"holds {len(images)} images: only the first is used and kept")
    attributes = images[0].attrib
    stored, packing = _read_block(images[0], opened)
    geometry = _integers(_value(attributes, "geometry"), 3, "geometry")
    _require(0 not in geometry, "is a picture without samples")
    width, height, channels = geometry
    color_space = _value(attributes, "colorSpace", "Gray").lower()
    colors = _look_up(COLOR_CHANNELS, color_space, "the color space")
    _require(channels >= colors, f"is called RGB but has {channels} channel(s)")
    if channels > colors:
        opened.warnings.append(f"has {channels - colors} alpha channel(s): dropped")
    sample_format = _value(attributes, "sampleFormat").lower()
    name = _look_up(SAMPLE_FORMATS, sample_format, "samples of the kind")
    byte_order = _value(packing, "byteOrder", "little")
    dtype = np.dtype(_look_up(BYTE_ORDERS, byte_order, "the byte order") + name)
    bounds = _read_bounds(attributes, dtype)
    storage = _value(attributes, "pixelStorage", "Planar").lower()
    interleaved = _look_up(INTERLEAVED, storage, "its samples in the order")
    together = channels if interleaved else 1
    data = _unpack(stored, packing, math.prod(geometry) * dtype.itemsize)
    rows = data.view(dtype).reshape(-1, width, together)
    lower, upper = bounds
    white = None if bounds == (0, 1) else upper - lower
    planes = _read_planes(lambda start, stop: rows[start:stop], dtype, (colors, height, width),
                          together, white, zero=-lower)
    mark = _leave_out_marks(planes, opened.warnings)
    below, above = np.sum([_clip(plane) for plane in planes], 0)
    if below or above:
        opened.warnings.append(f"has {below} samples below and {above} above its bounds "
                               f"{lower:g}:{upper:g}: clipped")
    if bounds != (0, 1):
        change = _in_unit(Unit(upper - lower, lower))
        for keyword in images[0].findall("FITSKeyword"):
            keyword.set("value", change(keyword.get("name", ""), keyword.get("value", "")))
    return planes, mark


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


def _unpack(stored, attributes, size=None):
    """Return the bytes, (n,) uint8, that stored ones hold; there must be `size`, if it is given.

    That is checked before memory is taken that the stored bytes do not vouch for.
    """
    codec, unpacked_size, item = None, stored.size, 1
    if "compression" in attributes:
        text = _value(attributes, "compression").lower()
        match = XISF_COMPRESSION.fullmatch(text)
        complete = match and (match["item"] or not match["shuffled"])
        _require(complete, f"is compressed in the unknown way {text!r}")
        codec, unpacked_size = match["codec"], int(match["size"])
        item = int(match["item"]) if match["shuffled"] else 1
    _require(size in (None, unpacked_size),
             f"is damaged: its data hold {unpacked_size} bytes, its samples need {size}")
    if codec is None:
        return stored
    _check_expansion(codec, XISF_CODECS, unpacked_size, stored.size)
    sizes = [stored.size, unpacked_size]  # of each piece, as stored and unpacked
    if "subblocks" in attributes:
        text = _value(attributes, "subblocks").replace(",", ":")
        count = min(1 + text.count(":"), 2 * MAX_SUBBLOCKS)
        sizes = _integers(text, count, "list of sub-blocks")
    stored_sizes, unpacked_sizes = sizes[::2], sizes[1::2]
    consistent = len(sizes) % 2 == 0 and 0 not in sizes
    totals = sum(stored_sizes), sum(unpacked_sizes)
    _require(consistent and totals == (stored.size, unpacked_size),
             "has a compressed block that contradicts itself")
    unpacked = np.empty(unpacked_size, np.uint8)
    start = position = 0
    for piece_size, size in zip(stored_sizes, unpacked_sizes):
        piece = stored[start:start + piece_size]
        unpacked[position:position + size] = _decompress(piece, codec, size)
        start += piece_size
        position += size
    # Byte 0 of every item, then byte 1 of every item, and so on; behind them what is no item
    end = unpacked_size // item * item
    unpacked[:end] = unpacked[:end].reshape(item, -1).T.ravel()
    return unpacked


def _decompress(stored, codec, size):
    """Return the `size` bytes in stored ones; never expand further."""
    if stored.size == size:  # what does not shrink is stored as it was
        return stored
    with suppress(ValueError, zlib.error, zstandard.ZstdError, lz4.block.LZ4BlockError):
        if codec == "zlib":
            decoder = zlib.decompressobj()
            data = decoder.decompress(stored, size + 1)
            _require(decoder.eof, NOT_DECODED)  # the stream's own checksum stands at its end
        elif codec == "zstd":  # would be expanded to what it claims
            _require(zstandard.frame_content_size(stored) == size, NOT_DECODED)
            data = zstandard.ZstdDecompressor().decompress(stored)
        else:
            data = lz4.block.decompress(stored, size)
        _require(len(data) == size, NOT_DECODED)
        return np.frombuffer(data, np.uint8)
    raise _Unreadable(NOT_DECODED)


def _clip(plane):
    """Clip a plane to [0, 1], in place; what is not finite stays.

    Returns how many samples were below and above.
    """
    low, high = _finite_range(plane)
    if low >= 0 and high <= 1:
        return 0, 0
    dark = (plane < 0) & (plane > -np.inf)
    bright = (plane > 1) & (plane < np.inf)
    plane[dark] = np.finfo(plane.dtype).tiny  # 0 means missing
    plane[bright] = 1
    return dark.sum(), bright.sum()


def _read_source(root, opened):
    """Return the Source; what cannot be carried over is left out and named in the warnings."""
    image = root.find("Image")
    keywords = {element.get("name"): element.get("value")
                for element in image.findall("FITSKeyword")}
    _what_keywords_say({**keywords, **image.attrib}, opened.warnings)
    if image.find("ColorFilterArray") is not None:
        opened.warnings.append("is a color filter mosaic: debayer it first, "
                               "or its colors are fitted as one")
    for name in STALE_IMAGE_ATTRIBUTES:
        image.attrib.pop(name, None)
    image.text = image.tail = None  # pixels, if they stood there
    others = [child for child in root if child.tag not in ("Image", "Metadata", "Signature")]
    blocks = {}
    kept, untrue, lost = [], [], []
    for elements in (image, others, root.findall("Metadata/Property")):
        kept.append([element for element in elements
                     if _is_kept(element, blocks, opened, untrue, lost)])
    if lost:
        opened.warnings.append(f"loses {len(lost)} element(s): {', '.join(lost)[:300]}")
    _note_untrue(untrue, opened.warnings)
    metadata = ElementTree.Element("Metadata")
    image[:], others, metadata[:] = kept
    namespaces = {name: root.get(name) for name in root.keys() if name.startswith("xmlns:")}
    new_root = ElementTree.Element("xisf", namespaces)
    new_root[:] = [image, *others, metadata]
    return Source(new_root, blocks)


def _is_kept(element, blocks, opened, untrue, lost):
    """Tell whether outputs keep an element; if so, add its attached bytes to `blocks`."""
    name = element.get("id") or element.get("name") or ""
    title = f"{element.tag} {name}"
    if STALE_FILE_METADATA.match(title):
        return False
    if STALE_PIXEL_METADATA.match(title):
        untrue.append(f"{name[:80]!r}")
        return False
    element.tail = None
    attached = {}
    try:
        for part in element.iter():
            location = part.get("location")
            if location is None or location in blocks:  # several elements may share one block
                continue
            stored, _ = _read_block(part, opened)
            if location.strip().startswith("attachment"):  # others stand in the element itself
                attached[location] = stored
    except _Unreadable as error:
        lost.append(f"{element.tag} {name[:80]!r}, which {error}")
        return False
    blocks.update(attached)
    return True


def _icc_of_xisf(source):
    """Return the color profile of an XISF file, b"" without one."""
    element = source.root.find("Image/ICCProfile")
    if element is None:
        return b""
    block = source.blocks.get(element.get("location"))
    if block is None:  # it stands in the header
        return bytes(_unpack(*_read_block(element, opened=None)))
    return bytes(_unpack(np.frombuffer(block, np.uint8), element.attrib))


def write_xisf(file, planes, source=None, history=(), compress=False):
    """Write a picture as a monolithic XISF file.

    Args:
        file: binary, writable, seekable, empty.
        planes: (c, h, w), c = 1 or 3, float32 or float64 in [0, 1]; an array, or anything with
            `shape` and `dtype` that yields one (h, w) plane after the other.
        source: a Source, whose metadata are kept. It is not changed.
        history: lines, which become HISTORY keywords.
        compress: lz4hc with byte shuffling, or zstd where PixInsight would not read that.

    Compressed pixels get a checksum.
    """
    source = source or Source(ElementTree.XML(BARE_XISF), {})
    root = _new_header(planes, source, history)
    image = root.find("Image")
    item = planes.dtype.itemsize
    size = math.prod(planes.shape) * item
    pieces = map(_in_file_order, planes)
    if compress:
        codec, packed = _compress(planes)
        if len(packed) < size:
            image.set("compression", f"{codec}+sh:{size}:{item}")
            image.set("checksum", f"sha1:{hashlib.sha1(packed).hexdigest()}")
            pieces = [packed]
            size = len(packed)
    sizes = {location: len(block) for location, block in source.blocks.items()}
    positions = _place_blocks(root, {**sizes, "pixels": size})
    for location, block in source.blocks.items():
        file.seek(positions[location])
        file.write(block)
    file.seek(positions["pixels"])
    for piece in pieces:
        file.write(piece)
        del piece  # before the next plane is made
    file.seek(0)
    _write_header(file, XML_DECLARATION + _markup(root))


def _write_header(file, header):
    """Write the start of a file, up to the end of its header."""
    file.write(b"XISF0100" + len(header).to_bytes(4, "little") + bytes(4) + header)


def _in_file_order(plane):
    """Return a plane in the order of rows and bytes that the file has."""
    return np.ascontiguousarray(plane, plane.dtype.newbyteorder("<"))


def _new_header(planes, source, history):
    """Return the root element for an output, in which the places of the blocks are missing."""
    root = copy.deepcopy(source.root)
    root.attrib.update(XISF_ROOT)
    image = root.find("Image")
    channels, height, width = planes.shape
    image.attrib.update(
        geometry=f"{width}:{height}:{channels}", sampleFormat=planes.dtype.name.capitalize(),
        bounds="0:1", location="pixels", colorSpace="RGB" if channels == 3 else "Gray")
    lines = []
    for line in history:
        lines += _wrapped(line)
    for line in lines:
        ElementTree.SubElement(image, "FITSKeyword", name="HISTORY", value="", comment=line)
    change = _with_range(planes, Unit())
    for keyword in image.findall("FITSKeyword"):  # strict readers want all attributes
        keyword.set("value", change(keyword.get("name"), keyword.get("value", "")))
        keyword.attrib.setdefault("comment", "")
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


# --------------------------------------------------------------------------------------------------
# Pictures on disk: FITS
#
# Headers are read and written card by card, so that what is malformed or strange costs neither
# time nor the picture. astropy packs and unpacks compressed pictures.
# The FITS standard: https://fits.gsfc.nasa.gov/fits_standard.html.
# --------------------------------------------------------------------------------------------------

FITS_BLOCK = 2880  # bytes: headers and data fill whole blocks
END_CARD = "END".ljust(FITS_CARD)
ROW_ORDER = "ROWORDER"  # says which row is the first: the lowest, unless it is 'TOP-DOWN'

FITS_TYPES = {8: "u1", 16: "i2", 32: "i4", 64: "i8", -32: "f4", -64: "f8"}  # by BITPIX
# PLIO_1 is for masks, and cfitsio's files with 16 bits of it come out wrong
FITS_CODECS = ("RICE_1", "RICE_ONE", "GZIP_1", "GZIP_2", "HCOMPRESS_1", "NOCOMPRESS")
# Settings of the decoders, and what they can be; with others they write where they must not
FITS_CODEC_SETTINGS = {"BLOCKSIZE": (16, 32), "BYTEPIX": (1, 2, 4), "ZDITHER0": range(1, 10_001)}
# Keywords of the table in which a compressed picture stands
FITS_TABLE = re.compile(
    r"TFIELDS|THEAP|T(TYPE|FORM|UNIT|NULL|SCAL|ZERO|DIM|DISP)\d+"
    r"|Z(IMAGE|TENSION|BITPIX|NAXIS\d*|TILE\d+|CMPTYPE|NAME\d+|VAL\d+|SIMPLE|EXTEND|PCOUNT|GCOUNT"
    "|HECKSUM|DATASUM|MASKCMP|BLANK|QUANTIZ|DITHER0|SCALE|ZERO)")
COMPRESSED_NAME = "'COMPRESSED_IMAGE'"  # EXTNAME of such a table, if the picture has none

MAX_PARTS = 1000  # HDUs of a file, and
MAX_FITS_CARDS = 20_000  # cards of a header; no real file has more


@dataclass
class FitsSource:
    """What a FITS file has besides its pixels."""
    keywords: list  # of Keyword, without those that the pixels decide
    before: bytes = b""  # HDUs in front of the picture; empty if it is the first
    after: bytes = b""  # HDUs behind it
    icc: bytes = b""  # color profile; it also stands in one of the HDUs
    top_down: bool = False  # True if the first row is the top


def read_fits(path):
    """Read the first picture of a FITS file, which may be packed (.fz, .gz); see `read_picture`.

    Planes (3, h, w) and (h, w, 3) are color, and lone axes count for nothing.
    """
    notes = []
    with _refusals(path), _opened(path) as file:
        parts = _read_fits_parts(file, notes)
        pictures = [number for number, part in enumerate(parts) if part.shape]
        _require(pictures, "holds no picture of two or three axes", "name another file")
        if len(pictures) > 1:
            notes.append(f"holds {len(pictures)} images: only the first is used")
        number = pictures[0]
        part = parts[number]
        header = part.header
        shape, together = _fits_layout(part.shape)
        bits = header.get("ZBITPIX" if part.packed else "BITPIX")
        _require(bits in FITS_TYPES, f"has the impossible BITPIX {bits!r}")
        dtype = np.dtype(">" + FITS_TYPES[bits])
        size = math.prod(shape) * dtype.itemsize
        if part.packed:
            _check_fits_tiles(part, size)
        step, zero = _fits_scale(header)
        blank = header.get("BLANK") if dtype.kind != "f" else None
        white = _white(dtype, step, zero)
        source = _read_fits_source(file, parts, number, white, notes)
        if shape[0] == 1 and ("BAYERPAT" in header or "COLORTYP" in header):
            notes.append("seems to be a color filter mosaic: if it is, debayer it first")
        position = None if part.packed else part.data
        with _stream_of("fits", file, number, position, dtype, size) as stream:
            rows = _rows_of(stream, dtype, (shape[2], together))
            planes = _read_planes(rows, dtype, shape, together, white, step, zero, blank,
                                  flip=not source.top_down)
        return _picture(planes, white, source, notes, path)


class _FitsPart(NamedTuple):
    """An HDU: a header and its data."""
    cards: list  # of str
    keywords: list  # of Keyword
    header: dict  # numbers, and texts in capitals, by keyword; of repeated ones the first
    start: int  # byte at which the header starts
    data: int  # byte at which the data start
    length: int  # bytes of the data
    end: int  # byte behind the data and their padding
    shape: list  # of its picture; empty if it has none
    packed: bool  # True if it is a table in which a compressed picture stands


def _read_fits_parts(file, notes):
    """Return a file's HDUs. Behind the first picture, what cannot be understood is left out."""
    size = os.fstat(file.fileno()).st_size
    parts = []
    position = 0
    while position < size:
        try:
            _require(len(parts) < MAX_PARTS, "has too many parts to be true")
            part = _read_fits_part(file, position, size)
        except Exception:
            if not any(part.shape for part in parts):
                raise
            notes.append(f"has {size - position} bytes at its end that are not FITS: not kept")
            break
        parts.append(part)
        position = part.end
    return parts


def _read_fits_part(file, position, size):
    """Return the HDU at a position in a file of so many bytes."""
    cards = _read_fits_cards(file, position)
    start_of_data = file.tell()
    names = [card[:8].rstrip() for card in cards]
    _require("XTENSION" not in names[1:] and names.count("BITPIX") <= 1,
             "is damaged: a header without END runs into the next")
    for name, card in zip(names, cards):
        damaged = STRUCTURE_NAMES.fullmatch(name) and not _parse_card(card)
        _require(not damaged, f"has the damaged card {_printable(card).rstrip()!r}")
    keywords = _parse_cards(cards)
    header = {}
    for name, value, _ in keywords:
        number = _number(value)
        header.setdefault(name, value.strip("' ").upper() if number is None else number)
    bits = header.get("BITPIX")
    _require(bits in FITS_TYPES, f"has the impossible BITPIX {bits!r}")
    shape = _fits_axes(header)
    samples = math.prod(shape) if shape else 0
    length = abs(bits) // 8 * (samples + header.get("PCOUNT", 0)) * header.get("GCOUNT", 1)
    packed = header.get("ZIMAGE") == "T"
    if packed:
        shape = _fits_axes(header, "Z")
    elif header.get("XTENSION", "IMAGE") != "IMAGE":
        shape = []
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) < 2 or 0 in shape:
        shape = []
    complete = length >= 0 and start_of_data + length <= size
    _require(complete, "is cut short: the end of its data is missing")
    padding = -length % FITS_BLOCK
    end = start_of_data + length + padding
    return _FitsPart(
        cards, keywords, header, position, start_of_data, length, end, shape, packed)


def _read_fits_cards(file, position):
    """Return the cards of the header at a position, and leave the file behind its last block."""
    file.seek(position)
    cards = []
    while END_CARD not in cards[-FITS_BLOCK // FITS_CARD:]:
        block = file.read(FITS_BLOCK)
        _require(len(block) == FITS_BLOCK, "is cut short: a header has no end")
        cards += _split_cards(block.decode("latin-1"))
        _require(len(cards) <= MAX_FITS_CARDS, "has a header too large to be true")
    return cards[:cards.index(END_CARD)]


def _fits_axes(header, prefix=""):
    """Return the lengths of the axes, the last named first, as NumPy has them."""
    count = header.get(prefix + "NAXIS")
    _require(count in range(1000), f"has the impossible {prefix}NAXIS {count!r}")
    axes = []
    for number in range(count, 0, -1):
        name = f"{prefix}NAXIS{number}"
        length = header.get(name)
        possible = isinstance(length, int) and length >= 0
        _require(possible, f"has the impossible {name} {length!r}")
        axes.append(length)
    return axes


def _fits_scale(header):
    """Return what the stored samples are multiplied with, and what is added then."""
    scale = header.get("BSCALE", 1), header.get("BZERO", 0)
    for name, number in zip(("BSCALE", "BZERO"), scale):
        possible = isinstance(number, (int, float)) and math.isfinite(number)
        _require(possible, f"has the impossible {name} {number!r}")
    _require(scale[0] != 0, "has the impossible BSCALE 0")
    return scale


def _fits_layout(shape):
    """Return the shape of the planes (c, h, w), and how many samples of a pixel stand together."""
    if len(shape) == 2:
        return (1, *shape), 1
    if len(shape) == 3 and shape[0] == 3:
        return tuple(shape), 1
    if len(shape) == 3 and shape[2] == 3:
        return (3, *shape[:2]), 3
    lengths = " x ".join(map(str, shape[::-1][:8]))
    raise _Unreadable(f"is a picture of {lengths}, neither gray nor RGB",
                      "save its planes as pictures of their own")


def _check_fits_tiles(part, size):
    """Refuse a compressed picture of so many bytes that lies about its size or its settings."""
    header = part.header
    _check_expansion(header.get("ZCMPTYPE"), FITS_CODECS, size, part.length)
    settings = {"ZDITHER0": header.get("ZDITHER0", 1)}
    for name in header:
        if name.startswith("ZNAME"):
            setting = header[name]
            settings[setting] = header.get(name.replace("NAME", "VAL"))
    for name, possible in FITS_CODEC_SETTINGS.items():
        value = settings.get(name, possible[0])
        _require(value in possible, f"has the impossible {name} {value!r}")
    _require(header.get("TFIELDS") in range(1000), "has too many columns to be true")
    tiles = 1
    axes = _fits_axes(header, "Z")
    for number, length in enumerate(reversed(axes), 1):
        name = f"ZTILE{number}"
        usual = length if number == 1 else 1
        side = header.get(name, usual)
        _require(isinstance(side, int) and side > 0, f"has the impossible {name} {side!r}")
        tiles *= math.ceil(length / side)
    _require(tiles == header["NAXIS2"] <= MAX_TILES, "has another number of tiles than it claims")


def _read_fits_source(file, parts, number, white, notes):
    """Return what the outputs keep of a file besides the samples of HDU `number`.

    Levels of integers, whose largest is `white`, become those of samples in [0, 1].
    """
    part = parts[number]
    keywords = part.keywords
    if part.packed:
        keywords = [keyword for keyword in keywords if not FITS_TABLE.fullmatch(keyword.name)
                    and keyword[:2] != ("EXTNAME", COMPRESSED_NAME)]
    keywords = _kept(keywords, white, notes)
    file.seek(0)
    before = file.read(part.start)
    first_names = {keyword.name for keyword in parts[0].keywords}.difference(TEXT_NAMES)
    says_nothing = all(map(STRUCTURE_NAMES.fullmatch, first_names))
    if part.packed and number == 1 and says_nothing:
        before = b""  # it is there because a compressed picture cannot be the first
    file.seek(part.end)
    after = file.read(parts[-1].end - part.end)
    icc = b""
    for other in parts:
        if other.header.get("EXTNAME") == "ICCPROFILE":
            file.seek(other.data)
            icc = file.read(other.length)
    top_down = part.header.get(ROW_ORDER) == "TOP-DOWN"
    return FitsSource(keywords, before, _padded(after), icc, top_down)


def _padded(data, filling=b"\0"):
    """Return bytes that fill whole blocks."""
    return data + filling * (-len(data) % FITS_BLOCK)


def _fits_header(cards):
    """Return the bytes of a header."""
    text = "".join([*cards, END_CARD])
    return _padded(text.encode("ascii"), b" ")


def _structure_cards(is_first, bits, axes):
    """Return the cards that a header begins with: of the first HDU, or of an image extension."""
    values = {"BITPIX": bits, "NAXIS": len(axes)}
    for number, length in enumerate(reversed(axes), 1):
        values[f"NAXIS{number}"] = length
    if is_first:
        values = {"SIMPLE": "T", **values, "EXTEND": "T"}
    else:
        values = {"XTENSION": "'IMAGE   '", **values, "PCOUNT": 0, "GCOUNT": 1}
    return _cards(Keyword(name, str(value)) for name, value in values.items())


def _to_fits_source(source, height):
    """Return a FitsSource that holds what FITS can hold of another one."""
    keywords, icc = _shared_metadata(source, height)
    after = b""
    if icc:
        cards = _structure_cards(False, 8, [len(icc)])
        cards += _cards([Keyword("EXTNAME", "'ICCProfile'")])
        after = _fits_header(cards) + _padded(icc)
    keywords.append(Keyword(ROW_ORDER, "'BOTTOM-UP'"))
    return FitsSource(keywords, after=after, icc=icc)


def write_fits(file, planes, source=None, history=(), compress=False, unit=Unit()):
    """Write a picture as FITS; the arguments are those of `write_xisf`, and its Unit.

    All keywords of a FITS source are written, and its other HDUs too. `compress` makes a
    compressed image (GZIP_2, nothing is lost), with the ending .fits all the same.
    """
    if not isinstance(source, FitsSource):
        source = _to_fits_source(source, planes.shape[1])
    cards = _cards(_changed(source.keywords, _with_range(planes, unit)))
    if len(cards) > MAX_KEPT_CARDS:
        lost = len(cards) - MAX_KEPT_CARDS
        logger.warning(f"{lost} lines of FITS keywords are lost: a header has no room for them")
    cards = cards[:MAX_KEPT_CARDS] + _cards(Keyword("HISTORY", "", line) for line in history)
    file.write(source.before)
    data = np.empty(planes.shape, planes.dtype.newbyteorder(">"))
    stored = data if source.top_down else data[:, ::-1]
    one_by_one = iter(planes)
    for target in stored:
        target[...] = _in_own_unit(next(one_by_one), unit)
    if len(data) == 1:
        data = data[0]
    if compress:
        empty_hdu, structure, data = _compressed_fits(data)
        if not source.before:
            file.write(empty_hdu)
    else:
        is_first = not source.before
        structure = _structure_cards(is_first, -8 * data.itemsize, data.shape)
    file.write(_fits_header(structure + cards))
    file.write(data)
    file.write(bytes(-data.nbytes % FITS_BLOCK))
    file.write(source.after)


def _compressed_fits(data):
    """Let astropy pack samples, an array.

    Returns an HDU to stand in front, the cards of the one with the samples, and its data.
    """
    from astropy.io import fits
    made = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hdu = fits.CompImageHDU(data, compression_type="GZIP_2", quantize_level=0)
        fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(made)
    content = made.getbuffer()
    first = _read_fits_part(made, 0, len(content))
    packed = _read_fits_part(made, first.end, len(content))
    cards = [card for card in packed.cards if card.rstrip() and not card.startswith("EXTNAME")]
    return content[:packed.start], cards, content[packed.data:packed.end]


# --------------------------------------------------------------------------------------------------
# Pictures on disk: TIFF
#
# tifffile reads the tags, which are checked here, and writes.
# --------------------------------------------------------------------------------------------------

TIFF_COLORS = {0: 1, 1: 1, 2: 3}  # channels of gray (white is 0 or largest) and RGB, by photometric
TIFF_MINISWHITE = 0
TIFF_SENSOR = (32803, 34892)  # photometric of a color filter mosaic, and of a camera's linear data
TIFF_CODECS = (
    1, "NONE", "LZW", "DEFLATE", "ADOBE_DEFLATE", "PACKBITS", "ZSTD")  # tifffile's names
TIFF_ICC = 34675
TIFF_CHUNKS = ("StripOffsets", "StripByteCounts", "TileOffsets", "TileByteCounts")
TIFF_PLANAR = None, 1, 2  # not said, samples of a pixel together, or planes
TIFF_THUMBNAIL = 2  # value of the old SubfileType
LARGEST_TIFF = 0xF0000000  # bytes; larger ones are BigTIFF
TIFF_BYTES = 7  # a type
TIFF_ORIENTATION = 274
TIFF_KEPT = {271: "s", 272: "s", 306: "s", 315: "s", 33432: "s", 700: "B"}
"""Tags that are carried over, and their types: camera, date, author, rights, XMP."""

MAX_PAGES = 16  # among which the picture is looked for


@dataclass
class TiffSource:
    """What a TIFF file has besides its pixels."""
    keywords: list  # of Keyword; a description in words is COMMENT
    icc: bytes = b""  # color profile
    tags: list = field(default_factory=list)  # these and others, as tifffile's writer takes them


def read_tiff(path):
    """Read the first picture of a TIFF file that is not a thumbnail; see `read_picture`."""
    with _refusals(path), _opened(path) as file:
        import tifffile
        logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it would print what it repairs
        with tifffile.TiffFile(file, _multifile=False) as tiff:
            number, notes = _find_page(tiff)
            page = tiff.pages[number]
            colors = _check_tiff_page(page, os.fstat(file.fileno()).st_size)
            if page.samplesperpixel > colors:
                notes.append(f"has {page.samplesperpixel - colors} alpha channel(s): dropped")
            _, _, height, width, together = page.shaped
            dtype = page.dtype.newbyteorder(tiff.byteorder)
            white = _white(dtype)
            source = _read_tiff_source(page, white, notes)
            step, zero = 1, 0
            if page.photometric == TIFF_MINISWHITE:
                _require(white, "is gray, with white as 0, and not unsigned",
                         "save it with black as 0")
                step, zero = -1, white
            position = page.dataoffsets[0] if page.is_final else None
            with _stream_of("tiff", file, number, position, dtype, page.nbytes) as stream:
                rows = _rows_of(stream, dtype, (width, together))
                shape = colors, height, width
                planes = _read_planes(rows, dtype, shape, together, white, step, zero)
        return _picture(planes, white, source, notes, path)


def _find_page(tiff):
    """Return the number of the page with the picture, and what is to be told about the others."""
    pages = []
    with suppress(IndexError, ValueError):  # tifffile's errors are such
        for number in range(MAX_PAGES):
            pages.append(tiff.pages[number])
    _require(pages, "holds no picture")
    first = pages[0]
    from_sensor = any(
        page.photometric in TIFF_SENSOR for page in [*pages, *(first.pages or ())])
    if from_sensor or "DNGVersion" in first.tags:
        maker = str(first.tags.valueof("Make") or "").strip()
        _refuse_raw(f"of {maker[:30]}" if maker else "such as DNG")
    pictures = []
    for number, page in enumerate(pages):
        old_kind = page.tags.valueof("SubfileType")
        if not page.is_reduced and old_kind != TIFF_THUMBNAIL:
            pictures.append(number)
    _require(pictures, "holds nothing but a thumbnail")
    notes = []
    if len(pictures) > 1:
        notes.append("holds several images: only the first is used and kept")
    return pictures[0], notes


def _refuse_raw(kind):
    """Refuse a camera's raw file."""
    raise _Unreadable(f"is a camera's raw file ({kind}), a single undeveloped frame",
                      "calibrate, debayer, and stack it first, and save the stack as XISF, FITS, "
                      "or TIFF")


def _check_tiff_page(page, size):
    """Refuse a page that is not read, or that lies about its size; return its number of colors."""
    advice = "save it as 32-bit float or 16-bit, grayscale or RGB"
    known = "PhotometricInterpretation" in page.tags
    _require(known, "does not say whether it is gray or RGB", advice)
    colors = TIFF_COLORS.get(page.photometric)
    _require(colors, f"is neither gray nor RGB, but {_tiff_word(page.photometric)}", advice)
    bits = page.bitspersample
    item = page.dtype.itemsize if page.dtype and page.dtype.kind in "iuf" else 0
    _require(item and bits == 8 * item, f"has samples of {bits} bits, which are not read", advice)
    channels = page.samplesperpixel
    lengths = *page.shaped, *page.chunks, channels
    whole = all(isinstance(length, int) for length in lengths)
    _require(whole, "is damaged: its size is not a number")
    planes, depth, height, width, together = page.shaped
    _require(depth == 1 and height and width, "is not a flat picture", advice)
    _require(channels >= colors and planes * together == channels,
             f"is called RGB but has {channels} channel(s)", advice)
    _check_tiff_chunks(page, size)
    needed = math.prod(page.shaped) * item
    stored = min(sum(page.databytecounts), size)
    _check_expansion(_tiff_word(page.compression), TIFF_CODECS, needed, stored)
    tile = math.prod(page.chunks) * item
    _require(tile <= 4 * needed + (1 << 20), "has tiles larger than the picture")
    return colors


def _check_tiff_chunks(page, size):
    """Refuse a page that does not have all its strips or tiles in a file of so many bytes.

    tifffile makes up what is missing, and leaves out what is too much.
    """
    offsets, counts = page.dataoffsets, page.databytecounts
    _require(len(offsets) <= MAX_TILES or page.is_final, "has too many strips to be true")
    chunks = math.prod(page.chunked)
    listed = [page.tags[name].count for name in TIFF_CHUNKS if name in page.tags]
    complete = listed == [chunks, chunks] and all(offsets) and all(counts)
    arranged = page.planarconfig in TIFF_PLANAR
    _require(complete and arranged,
             f"is damaged: it has not the {chunks} strips or tiles that it needs")
    ends = map(sum, zip(offsets, counts))
    _require(max(ends) <= size, "is cut short: its last rows are missing")


def _tiff_word(value):
    """Return the name of a tag's value; unknown ones are bare numbers."""
    return getattr(value, "name", value)


def _read_tiff_source(page, white, notes):
    """Return what the outputs keep of a page; integers have `white` for their largest."""
    value = page.tags.valueof

    def as_bytes(code):
        found = value(code) or b""
        return found if isinstance(found, bytes) else str(found).encode("utf-8", "replace")

    tags = []
    for code, kind in TIFF_KEPT.items():
        text = as_bytes(code)
        if text:
            count = len(text) if kind == "B" else 0
            tags.append((code, kind, count, text, True))
    orientation = value(TIFF_ORIENTATION)
    if isinstance(orientation, int):
        tags.append((TIFF_ORIENTATION, "H", 1, int(orientation), True))
    icc = value(TIFF_ICC)
    icc = icc if isinstance(icc, bytes) else b""
    tags += _icc_tags(icc)
    description = as_bytes("ImageDescription").decode("utf-8", "replace")
    keywords = _keywords_of_tiff(description.strip("\0 \r\n"))
    return TiffSource(_kept(keywords, white, notes), icc, tags)


def _keywords_of_tiff(description):
    """Return the keywords of an Astro-TIFF's description; another one becomes COMMENT."""
    if re.fullmatch(r'(\{"shape": \[[\d, ]+\]\})?', description):  # tifffile's: it tells nothing
        return []
    description = description[:MAX_KEPT_CARDS * HISTORY_COLUMNS]
    lines = [line.rstrip() for line in description.split("\n")]
    if max(map(len, lines)) <= FITS_CARD:
        cards = [line.ljust(FITS_CARD) for line in lines if line != "END"]
        first = _parse_card(cards[0]) if cards else None
        if first and first.name:
            return _parse_cards(cards[:MAX_KEPT_CARDS])
    return [Keyword("COMMENT", "", line) for line in _wrapped(description)[:MAX_KEPT_CARDS]]


def write_tiff(file, planes, source=None, history=(), compress=False, unit=Unit()):
    """Write a picture as 32-bit float TIFF; the arguments are those of `write_fits`.

    Keywords and HISTORY become a description, as Astro-TIFF has it, whatever the description of
    the source was: others are parsed by programs, which would stumble over more lines.
    `compress` is deflate with the floating point predictor.
    """
    import tifffile
    channels, height, width = planes.shape
    if not isinstance(source, TiffSource):
        source = _to_tiff_source(source, height)
    data = np.empty((height, width, channels), np.float32)
    one_by_one = iter(planes)
    for channel in range(channels):
        data[..., channel] = _in_own_unit(next(one_by_one), unit)
    photometric = "rgb"
    if channels == 1:
        data = data[..., 0]
        photometric = "minisblack"
    options = {"compression": "adobe_deflate", "predictor": 3} if compress else {}
    cards = _cards(_changed(source.keywords, _with_range(planes, unit)))[:MAX_KEPT_CARDS]
    cards += _cards(Keyword("HISTORY", "", line) for line in history)
    shape = planes.shape if channels > 1 else planes.shape[1:]
    cards = [*_structure_cards(True, -32, shape), *cards, END_CARD]
    description = "\n".join(card.rstrip() for card in cards)
    big = data.nbytes + len(description) + len(source.icc) > LARGEST_TIFF
    with tifffile.TiffWriter(file, bigtiff=big) as writer:
        writer.write(data, photometric=photometric, description=description, metadata=None,
                     software=f"bgoptimizer {VERSION}", extratags=source.tags, **options)


def _to_tiff_source(source, height):
    """Return a TiffSource that holds what TIFF can hold of another one."""
    keywords, icc = _shared_metadata(source, height)
    return TiffSource(keywords, icc, _icc_tags(icc))


def _icc_tags(icc):
    """Return the tag of a color profile in a list, which is empty without one."""
    return [(TIFF_ICC, TIFF_BYTES, len(icc), icc, True)] if icc else []


# --------------------------------------------------------------------------------------------------
# Pictures on disk: the table of formats, and masks
# --------------------------------------------------------------------------------------------------

GZIP_WINDOW = 31  # what zlib calls gzip
PICTURE_ENDINGS = re.compile(r"(?i)(?<=.)(\.(xisf|fits?|fts|fz|tiff?)(\.gz)?)+$")

STARTS = {  # how files begin, by format
    "xisf": b"XISF", "fits": b"SIMPLE  =", "tiff": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")}
RAW = {  # and those of others that people try
    rb"(II\*\0|MM\0\*)....CR": "Canon CR2", rb"....ftypcrx ": "Canon CR3",
    rb"II\x1a\0\0\0HEAPCCDR": "Canon CRW", rb"FUJIFILMCCD-RAW": "Fujifilm RAF",
    rb"IIU\0": "Panasonic RW2", rb"IIRO|IIRS|MMOR": "Olympus ORF", rb"FOVb": "Sigma X3F",
    rb"\0MRM": "Minolta MRW"}
STRETCHED = {
    rb"\xff\xd8\xff": "JPEG", rb"\x89PNG": "PNG", rb"BM": "BMP", rb"GIF8": "GIF",
    rb"RIFF....WEBP": "WebP", rb"....ftyp(heic|heix|mif1|avif)": "HEIF"}

MASK_FORMATS = ("PNG", "TIFF", "JPEG", "BMP", "GIF", "PPM", "WEBP")  # what Pillow may open
MASK_MODES = ("1", "P", "PA", "CMYK", "YCbCr")  # what it makes RGB of


class Format(NamedTuple):
    """A kind of file."""
    ending: str
    read: Callable  # path -> Picture
    write: Callable  # file, planes, source, history, compress, unit


def picture_format(path):
    """Return the name in FORMATS of a file's format, by its content; None for another one."""
    start = _first_bytes(path)
    names = [name for name, starts in STARTS.items() if start.startswith(starts)]
    return names[0] if names else None


def _first_bytes(path):
    """Return the first bytes of a file, unpacked; none of what is no file."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a FIFO would wait forever
        return b""
    with open(path, "rb") as file:
        start = file.read(FITS_BLOCK)
    if start.startswith(GZIP_START):
        with suppress(zlib.error):
            return zlib.decompressobj(GZIP_WINDOW).decompress(start, 16)
    return start


def read_picture(path):
    """Read the first picture of an XISF, FITS, or TIFF file, whatever its name ends with.

    Unsigned integers are scaled from their full range to [0, 1], and floats that lie in [0, 1] are
    taken as they are. Anything else, such as ADU or electrons, is brought into [0, 1] for the work;
    `Picture.unit` tells the writers the way back.

    Returns a Picture.
    Raises BgError if the file is damaged, hostile, or of a kind that is not read.
    """
    with _refusals(path):
        start = _first_bytes(path)
        _require(start or os.path.isfile(path), *NOT_A_FILE)
        for pattern, kind in RAW.items():
            if re.match(pattern, start, re.DOTALL):
                _refuse_raw(kind)
        for pattern, kind in STRETCHED.items():
            _require(not re.match(pattern, start, re.DOTALL),
                     f"is a {kind} picture, stretched and no longer linear",
                     "give the linear stack as XISF, FITS, or TIFF")
        name = picture_format(path)
        _require(name, "is not an XISF, FITS, or TIFF file", "save the picture as one of them")
    return FORMATS[name].read(path)


def picture_stem(path):
    """Return a file's name without folder and without the endings of pictures."""
    name = os.path.basename(path)
    stem = PICTURE_ENDINGS.sub("", name)
    return stem if stem != name else os.path.splitext(name)[0]


def read_mask(path):
    """Read a mask, also one that only Pillow reads: PNG, palettes, 1 bit.

    Returns a Picture whose planes are weights in [0, 1], the largest 1; one plane if all are alike.
    Raises BgError as `read_picture`, and for negative values.
    """
    try:
        picture = read_picture(path)
    except BgError:
        picture = _read_with_pillow(path)
        if picture is None:
            raise
    if picture.unit.offset:
        raise BgError(f"{path} has negative values; a mask has 0 = leave out to 1 = use")
    planes = picture.planes
    if all(np.array_equal(planes[0], plane) for plane in planes[1:]):
        planes = planes[:1]
    planes = mask_weights(planes * planes.dtype.type(picture.unit.scale))
    return replace(picture, planes=planes)


def _read_with_pillow(path):
    """Return a mask as a Picture; None if Pillow does not read it."""
    from PIL import Image
    is_tiff = picture_format(path) == "tiff"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of sizes beyond all masks
            with Image.open(path, formats=MASK_FORMATS) as image:
                if image.mode in MASK_MODES:
                    image = image.convert("RGB")
                elif is_tiff:  # why it was refused is known
                    return None
                samples = np.atleast_3d(np.asarray(image))  # (h, w, channels)
    except Exception:  # it raises anything
        return None
    colors = 3 if samples.shape[2] >= 3 else 1
    notes = []
    if samples.shape[2] > colors:
        notes.append("has an alpha channel: dropped")
    white = np.iinfo(samples.dtype).max if samples.dtype.kind == "u" else 1
    planes = np.moveaxis(samples[..., :colors], 2, 0).astype(np.float32) / np.float32(white)
    return Picture(planes, None, notes)


def mask_weights(planes):
    """Scale the weights of a mask to [0, 1], if they are not yet, so that the largest is 1.

    So 255 means "use" in floats, and 1 does in integers, whose full range is far larger.
    """
    _, largest = _finite_range(planes)
    if largest > 1 or 0 < largest < 1 / 254:  # as floats, 1 / 255 is a little more than that
        return planes / planes.dtype.type(largest)
    return planes


def _write_xisf_of_any(file, planes, source=None, history=(), compress=False, unit=Unit()):
    """Write a picture as XISF, whose samples stay in [0, 1]; HISTORY tells its own unit."""
    if unit[:2] != Unit()[:2]:
        line = f"bgoptimizer: the picture's own unit is sample * {unit.scale:.17g}"
        history = [*history, f"{line} {unit.offset:+.17g}"]
    if source and not isinstance(source, Source):
        source = _to_xisf_source(source, planes.shape[1], unit)
    write_xisf(file, planes, source, history, compress)


def _to_xisf_source(source, height, unit):
    """Return a Source that holds what XISF can hold of another one."""
    keywords, icc = _shared_metadata(source, height)
    if unit != Unit():
        keywords = _changed(keywords, _in_unit(unit))
    root = ElementTree.XML(BARE_XISF)
    image = root.find("Image")
    for keyword in keywords:
        ElementTree.SubElement(image, "FITSKeyword", keyword._asdict())
    blocks = {}
    if icc:
        ElementTree.SubElement(image, "ICCProfile", location="icc")
        blocks["icc"] = icc
    return Source(root, blocks)


def rows_of(source):
    """Return a source that tells nothing but the order of another one's rows, for its mask."""
    if isinstance(source, FitsSource) and source.top_down:
        return FitsSource([Keyword(ROW_ORDER, "'TOP-DOWN'")], top_down=True)
    return None


FORMATS = {
    "xisf": Format(".xisf", read_xisf, _write_xisf_of_any),
    "fits": Format(".fits", read_fits, write_fits),
    "tiff": Format(".tif", read_tiff, write_tiff),
}


# --------------------------------------------------------------------------------------------------
# Outputs: all files of a run, or none
# --------------------------------------------------------------------------------------------------

@contextmanager
def atomic_outputs(*paths):
    """Open files that take the names `paths` once all are whole, and else leave nothing behind.

    Until then they are hidden files in the same folder, which no other run can write. They survive
    a power cut as soon as they have their names.

    Raises BgError if they cannot be written, or another run writes them.
    """
    folder = os.path.dirname(paths[0])
    try:
        with memory_errors(), ExitStack() as stack:
            files = [stack.enter_context(_hidden_file(path)) for path in paths]
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
                if fcntl is None:
                    file.close()  # Windows renames no open file
            _rename_all(paths)
            with suppress(OSError):  # Windows opens no folders, and some disks cannot do that
                opened = os.open(folder or ".", os.O_RDONLY)
                stack.callback(os.close, opened)
                os.fsync(opened)
    except BrokenPipeError:  # that of stdout: no output is a pipe
        raise
    except OSError as error:
        reason = error.strerror or error
        raise BgError(f"cannot write to {folder or '.'}: {reason}; "
                      "free space or choose another folder") from None


def _hidden_name(path, ending):
    """Return a name in the folder of an output; it depends on `path` alone, so that runs meet."""
    folder, name = os.path.split(path)
    digest = hashlib.sha1(os.fsencode(name)).hexdigest()  # any name is short enough
    return os.path.join(folder, f".bgoptimizer-{digest[:16]}{ending}")


@contextmanager
def _hidden_file(path):
    """Open the file that will become an output; what does not become one is removed."""
    name, aside = _hidden_name(path, ".tmp"), _hidden_name(path, ".old")
    try:
        file = _open_alone(name)
    except FileExistsError:
        raise BgError(f"another run is writing {path}; wait until it ends, or choose another "
                      f"folder (if none runs, delete {name})") from None
    except BaseException:  # a signal may come when it is made, but not yet known here
        with suppress(OSError):
            _open_alone(name).close()
            _remove(name)
        raise
    try:
        with file:
            if os.path.exists(path):
                _remove(aside)
            else:  # a run may have been killed between two names
                with suppress(FileNotFoundError):
                    os.rename(aside, path)
            yield file
    except BaseException:
        _remove(name)
        raise


def _open_alone(name):
    """Open a file to write, anew if a killed run left it; raise FileExistsError if a run has it."""
    if fcntl is None:
        _remove(name)  # Windows removes no open file
        return open(name, "x+b")
    is_new = True
    try:
        file = open(name, "x+b")
    except FileExistsError:
        file = open(name, "r+b")
        is_new = False
    try:
        if not _has_alone(file, name, is_new):
            raise FileExistsError
        file.truncate()
    except BaseException:
        file.close()
        raise
    return file


def _has_alone(file, name, is_new):
    """Tell whether this run has a file of this name for itself; then no other run gets it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some disks know no locks
        return is_new
    # Its run may have ended just now, and renamed it
    return os.path.exists(name) and os.path.samefile(file.fileno(), name)


def _rename_all(paths):
    """Give files their names, all or none: what had these names before, comes back if one fails.

    A kill may leave some out, but never mixes two runs.
    """
    set_aside, renamed = [], []
    try:
        for path in paths:
            if os.path.isdir(path):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            aside = _hidden_name(path, ".old")
            with suppress(FileNotFoundError):
                os.rename(path, aside)
                set_aside.append((aside, path))
        for path in paths:
            os.replace(_hidden_name(path, ".tmp"), path)
            renamed.append(path)
    except BaseException:
        for path in renamed:
            _remove(path)
        for aside, path in set_aside:
            os.replace(aside, path)
        raise
    for aside, _ in set_aside:
        _remove(aside)


def _remove(name):
    with suppress(OSError):
        os.unlink(name)


# --------------------------------------------------------------------------------------------------
# What the stages share
# --------------------------------------------------------------------------------------------------

WORKERS = min(4, os.cpu_count() or 1)
"""Threads for full-size work. NumPy releases the interpreter lock in it. More than 4 threads gain
nothing, because the memory is not fast enough for them."""

QUANTILE_SAMPLES = 1 << 23
"""Quantiles of a channel are taken of at least this many samples, if it has them. From twice as
many on, a part of the samples is enough."""

STRIP_PIXELS = 1 << 18
"""Pixels of one channel that are handled at a time in full-size work. As Float32 they are 1 MB,
which stays in the processor's cache."""

GAUSSIAN_DEVIATION = 1.4826
"""Standard deviation of a Gaussian over its median distance from the median."""

TILE = 8
"""Pixels along a side of the tiles by which missing data are told from dark samples."""

DEAD_TILES = 4
"""So many tiles of zeros in a row, along a row or column, are missing data and not chance."""

NEAR_BLACK = 0.2
"""A lone zero is a dark sample if the darkest other sample of its tile is below this part of the
tile's mean."""


def keep_dark_samples(planes: np.ndarray) -> int:
    """Raise lone zeros to the smallest number above 0, in place.

    In a noisy sky near black such zeros are dark samples. Missing data stay 0: they come in
    regions, rows, columns and borders.

    Args:
        planes: (c, h, w).

    Returns:
        How many samples were lone zeros.
    """
    return sum(_each(_keep_dark_samples, planes))


def _keep_dark_samples(plane: np.ndarray) -> int:
    zero = plane == 0
    if not zero.any():
        return 0
    height, width = plane.shape
    below = -height % TILE
    beside = -width % TILE
    padded = np.pad(zero, ((0, below), (0, beside)), mode="edge")
    rows = len(padded) // TILE
    # Where all is zero: over the height of a tile, over its width, over all of it
    down = padded.reshape(rows, TILE, -1).all(1)  # (rows, w)
    along = padded.reshape(rows * TILE, -1, TILE).all(2)  # (h, columns)
    full = down.reshape(rows, -1, TILE).all(2)  # (rows, columns)
    near_full = scipy.ndimage.binary_dilation(full, np.ones((3, 3)))
    down = _long_runs(down)
    along = _long_runs(along.T).T
    lone = 0
    for row in range(rows):
        top = row * TILE
        strip = slice(top, top + TILE)
        samples = plane[strip]  # (8, w); the last strip may have fewer rows
        missing = np.repeat(near_full[row], TILE)  # (w,)
        missing = missing | down[row]
        missing = missing | np.repeat(along[strip], TILE, axis=1)  # (8, w)
        dark = zero[strip] & ~missing[:len(samples), :width]
        if dark.any():
            near_black = np.repeat(_near_black(samples), TILE)
            dark &= near_black[:width]
            lone += np.count_nonzero(dark)
            samples[dark] = np.finfo(plane.dtype).tiny
    return lone


def _near_black(strip: np.ndarray) -> np.ndarray:
    """Tell which tiles of a strip (8, w) come so near to 0 that a sample may be 0 by chance.

    In other tiles a 0 is a dead pixel, and missing.

    Returns:
        (columns,) bool.
    """
    height, width = strip.shape
    beside = -width % TILE
    padded = np.pad(strip, ((0, 0), (0, beside)), mode="edge")
    tiles = padded.reshape(height, -1, TILE)  # (8, columns, 8)
    present = _present(tiles)
    inside = (0, 2)
    darkest = np.min(tiles, inside, where=present, initial=np.inf)
    total = np.sum(tiles, inside, where=present)
    count = np.sum(present, inside)
    mean = total / np.maximum(count, 1)
    return darkest < NEAR_BLACK * mean


def _long_runs(tiles: np.ndarray) -> np.ndarray:
    """Return True where `tiles` is True at least DEAD_TILES times in a row down a column.

    A run ends somewhere inside a tile, so the tiles at its ends belong to it.
    """
    beyond = (DEAD_TILES, DEAD_TILES)  # what touches the edge goes on there
    padded = np.pad(tiles, (beyond, (0, 0)), mode="edge")
    run = np.ones((DEAD_TILES, 1))
    runs = scipy.ndimage.binary_opening(padded, run)
    ends = np.ones((3, 1))
    runs = scipy.ndimage.binary_dilation(runs, ends)
    return runs[DEAD_TILES:-DEAD_TILES]


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
    strips = []
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        strips.append(slice(top, bottom))
    return strips


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
    some_present = present.ravel()[::step]
    values = some[some_present]
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

MIDTONES_TARGET = 0.25
"""Stretched value that the median of a channel is taken to. It is PixInsight's own choice for a sky
that can be seen well."""

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
        above = (1 - m) * x
        below = (1 - 4 * m) * x + 3 * m
        return above / below

    def extend(self, linear: np.ndarray) -> np.ndarray:
        """Do what `apply` does, but outside [0, 1] go on with the slopes at the ends.

        It is what `invert` undoes.
        """
        x = (linear - self.pedestal) / self.scale
        slope_at_0, slope_at_1 = _end_slopes(self.midtones)
        below_0 = np.minimum(x, 0)
        above_1 = np.maximum(x - 1, 0)
        y = self.apply(linear)
        return y + slope_at_0 * below_0 + slope_at_1 * above_1

    def invert(self, stretched: np.ndarray) -> np.ndarray:
        """Take stretched samples (..., c) of any range back to linear ones, (..., c)."""
        x = inverse_midtones(stretched, self.midtones)
        return x * self.scale + self.pedestal

    @property
    def white(self) -> np.ndarray:
        """The linear values that are taken to 1, (c,)."""
        return self.pedestal + self.scale

    def channel(self, k: int) -> Stretch:
        """Return the same stretch for channel `k` alone."""
        only = [k]
        return Stretch(self.pedestal[only], self.scale[only], self.midtones[only])


def inverse_midtones(stretched, midtones, library=np):
    """Undo the midtones transfer function, and go on with the slopes at its ends.

    Args:
        stretched: an array (..., c), or a tensor [..., c].
        midtones: (c,) or [c].
        library: numpy, or tensorflow for tensors.

    Returns:
        What the stretch took there, in units of its scale above the pedestal; as `stretched`.
    """
    m = midtones
    y = library.maximum(stretched, 0.0)
    y = library.minimum(y, 1.0)
    above = 3 * m * y
    below = (1 - m) - (1 - 4 * m) * y
    # The slopes of the inverse are the reciprocals, and so are these two of each other
    slope_at_1, slope_at_0 = _end_slopes(m)
    below_0 = library.minimum(stretched, 0.0)
    above_1 = library.maximum(stretched - 1, 0.0)
    return above / below + slope_at_0 * below_0 + slope_at_1 * above_1


def _end_slopes(m):
    """Return the slopes of the stretch with midtones m at 0 and at 1, (c,) each."""
    slope_at_0 = (1 - m) / (3 * m)
    slope_at_1 = 3 * m / (1 - m)
    return slope_at_0, slope_at_1


def measure_stretch(planes: np.ndarray, quantile: float) -> tuple[Stretch, np.ndarray]:
    """Measure the stretch of a picture from its present samples; see `measure_stretches`."""
    stretches, median = measure_stretches(planes, [quantile])
    return stretches[quantile], median


def measure_stretches(planes: np.ndarray,
                      quantiles: Sequence[float]) -> tuple[dict[float, Stretch], np.ndarray]:
    """Measure stretches of a picture from its present samples.

    Args:
        planes: (c, h, w) linear samples.
        quantiles: shares of the samples that lie below the one that a stretch takes to 1.

    Returns:
        Quantile -> its stretch, without those below which a channel has only one value; and the
        medians of the channels, (c,) in linear units.

    Raises:
        BgError: a channel has no present sample, or only one value below all quantiles.
    """
    count = len(planes)
    smallest = np.finfo(np.float32).tiny  # less is 0 to the fit, which computes in Float32

    def measure(k):
        plane = planes[k]
        name = _channel_name(k, count)
        present = _present(plane)
        if not present.any():
            raise BgError(f"{name} holds no data (every sample is 0 or not finite); "
                          "remove that channel, or save the picture again")
        low = float(np.min(plane, where=present, initial=np.inf))
        median, *high = _quantiles(plane, present, (0.5, *quantiles))
        scales = np.array(high) - low
        if scales.max() < smallest:
            raise BgError(f"{name} has the same value everywhere ({low:.6g}), so it shows no sky; "
                          "raise -dq if a bright object fills the frame, else give a picture with "
                          "content")
        return low, median, *scales

    measured = _each(measure, range(count))
    pedestal, median, *scales = np.array(list(measured)).T  # (c,) each
    stretches = {}
    for quantile, scale in zip(quantiles, scales):
        if scale.min() >= smallest:
            midtones = (median - pedestal) / scale
            midtones = np.clip(midtones, MIDTONES_MARGIN, 1 - MIDTONES_MARGIN)
            stretches[quantile] = Stretch(pedestal, scale, midtones)
    return stretches, median


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
    def medians(blocks, axis):  # (rows, columns, height, width) -> (rows, columns)
        samples = blocks.reshape(*blocks.shape[:2], -1)
        present = _present(samples)
        whole = present.all(-1)  # (rows, columns)
        reduced = np.empty(whole.shape, np.float32)
        reduced[whole] = np.median(samples[whole], -1)
        reduced[~whole] = _median_of_present(samples[~whole], present[~whole])
        return reduced

    def means(blocks, axis):
        present = _present(blocks)
        samples = blocks if transform is None else transform(blocks)
        total = np.where(present, samples, 0).sum(axis, dtype=np.float64)
        count = present.sum(axis)
        return total / np.where(count > 0, count, np.nan)

    return _reduce_blocks(plane, factor, medians if func == "median" else means)


def _median_of_present(samples: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Return the medians (blocks,) of samples (blocks, n) that are present; NaN where none is."""
    samples = np.where(present, samples, np.nan)
    samples.sort(-1)  # NaN goes last
    count = present.sum(-1)
    lower = np.maximum(count - 1, 0) // 2
    upper = count // 2
    middle = np.stack((lower, upper), -1)  # (blocks, 2): the same sample if the count is odd
    return np.take_along_axis(samples, middle, -1).mean(-1)


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
    rim: np.ndarray | None = None  # (h, w) bool: darker than the picture by a step; see `find_rim`
    close_up: np.ndarray | None = None  # as `linear`, but reduced less: what is drawn if small
    black: float = 0.0  # the linear value that no light at all would give
    reference: Reference | None = None  # another picture of the region
    sky: Sky | None = None  # as it was found; None if it could not be looked for

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


def prepare(planes: np.ndarray, settings: Settings, mask: np.ndarray | None = None) -> Prepared:
    """Stretch, reduce and mask a picture.

    Args:
        planes: (c, h, w) linear samples in [0, 1], c 1 or 3; missing samples are 0 or not finite.
            Not changed.
        settings: see `Settings`.
        mask: (1 or c, h, w) weights, 1 = use, 0 = ignore, or None.

    Raises:
        BgError: nothing is left to fit, a channel is constant or empty, or the mask has another
            size.
    """
    count, height, width = planes.shape
    if mask is not None and mask.shape not in ((1, height, width), (count, height, width)):
        raise BgError(f"the mask is {_size(mask)}, the picture {_size(planes)}; "
                      f"give a mask of {width} x {height} pixels with 1 or {count} channels")
    factor = settings.downscaling_factor
    quantile = settings.delinearization_quantile
    stretch, median = measure_stretch(planes, quantile)
    linear = np.stack([reduce_plane(plane, factor) for plane in planes], -1)  # (h, w, c)
    present = np.isfinite(linear)
    rim = find_rim(linear)
    user_mask = None
    if mask is not None:
        user_mask = np.stack([_block_means(plane, factor) for plane in mask], -1)
    centers = frame_coordinates(height, width, factor)
    bare = Prepared(linear, present, present, centers, stretch, median, linear,
                    (height, width), user_mask, rim)
    return prepare_again(bare, planes, stretch, settings)


def prepare_again(prepared: Prepared, planes: np.ndarray, stretch: Stretch,
                  settings: Settings) -> Prepared:
    """Stretch and mask a reduced picture as these settings ask.

    Args:
        prepared: its `image` and `weight` do not count.
        planes, settings: as for `prepare`.
        stretch: the picture's own for the quantile of the settings.

    Raises:
        BgError: nothing is left to fit.
    """
    if settings.downscaling_func == "median":
        # The stretch is monotone: after the median it has fewer samples to do
        image = stretch.apply(prepared.linear)
    else:
        reduced = []
        for k, plane in enumerate(planes):
            transform = stretch.channel(k).apply
            reduced.append(reduce_plane(plane, settings.downscaling_factor, "mean", transform))
        image = np.stack(reduced, -1)
    present = prepared.present
    image = np.where(present, image, 0).astype(np.float32)
    usable = present & _inside_thresholds(image, settings) & ~prepared.rim[..., None]
    weight = usable.astype(np.float32)
    if prepared.user_mask is not None:
        weight *= prepared.user_mask
    if not weight.any():
        raise BgError("every pixel is masked, so there is no sky to fit; "
                      "lower -tm, raise -tM, or check the mask (1 = use)")
    return replace(prepared, image=image, weight=weight, stretch=stretch)


RIM_VIEW = 300
"""Rims are looked for on a copy whose longer side has at most so many pixels."""

RIM_LEFT = 0.88
"""Less than this part of the light is left beyond a step. Where fewer exposures reach, more is."""

RIM_WHOLE = 0.8
"""The light falls by a step at this part of a straight line across the frame. Stars and hills hide
the rest. Along hills it does at 0.76 of a line at most, along rims at 0.85 at least."""

RIM_LENGTH = 0.15
RIM_FEWEST = 20
"""It does so over this part of the longer side, and over so many pixels."""

RIM_FACING = 0.8
"""A step is on a line only if the cosine between its direction and the line's is above this."""

RIM_TURN = 0.5
RIM_APART = 10.0
"""Degrees between the directions that are tried, and between those of two rims."""

RIM_SOFT = 2
"""Pixels by which a rim is widened, because its edge may be soft."""


def find_rim(linear: np.ndarray) -> np.ndarray:
    """Find a rim at the edge of the frame that is darker than the picture by a step, but not 0.

    Overscan, the edges that registration leaves, and the corners of a turned frame are such rims:
    each lies beyond a straight line across the frame. Hills do not.

    Args:
        linear: (h, w, c) the reduced picture; NaN where missing.

    Returns:
        (h, w) bool.
    """
    height, width = linear.shape[:2]
    light = linear / np.nanmedian(linear, axis=(0, 1))
    factor = math.ceil(max(height, width) / RIM_VIEW)
    light = reduce_plane(light.mean(-1), factor, "mean")
    beyond = _beyond_steps(light)
    near = scipy.ndimage.binary_dilation(beyond, iterations=RIM_SOFT)
    inside = np.isfinite(light) & ~near
    if not inside.any():
        return np.full((height, width), False)
    level = light[_nearest(inside)]
    halfway = (1 + RIM_LEFT) / 2
    rim = beyond & (light < halfway * level)
    rim = scipy.ndimage.binary_dilation(rim, iterations=RIM_SOFT)
    rim = _enlarge(rim, factor, (height, width))
    present = np.isfinite(linear)
    return rim & present.all(-1)


def _beyond_steps(light: np.ndarray) -> np.ndarray:
    """Return True, (h, w), beyond straight lines at which light (h, w) falls by a step."""
    y, x = np.indices(light.shape)
    y = y - y.mean()  # from the middle of the frame, beyond which no rim reaches
    x = x - x.mean()
    is_step, down, right = _steps(light)
    step_y = y[is_step]  # (n,)
    step_x = x[is_step]
    shortest = max(RIM_FEWEST, RIM_LENGTH * max(light.shape))
    lines = []
    for degrees in np.arange(0, 360, RIM_TURN):
        angle = math.radians(degrees)
        outward = _outward(angle, step_y, step_x)
        facing = _outward(angle, down, right) > RIM_FACING
        outward = outward[facing & (outward > 0)]
        nearest = np.rint(outward)
        count = np.bincount(nearest.astype(int))
        count = count + np.append(count[1:], 0)  # a step is two pixels wide
        for start in np.flatnonzero(count > shortest):
            lines.append((count[start], angle, start + 0.5))
    lines.sort(reverse=True)
    alike = math.cos(math.radians(RIM_APART))
    beyond = np.full(light.shape, False)
    found = []  # angles
    for _, angle, distance in lines:
        turned = angle - np.array(found)
        known = np.cos(turned) > alike
        if known.any() or not _falls_across(light, angle, distance, shortest):
            continue
        found.append(angle)
        beyond |= _outward(angle, y, x) > distance - 0.5
    return beyond


def _outward(angle: float, down: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return how far ways go in the direction of an angle: 0 is right, a quarter turn is down."""
    return math.sin(angle) * down + math.cos(angle) * right


def _steps(light: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where light falls by a step over two pixels, and in which direction.

    Args:
        light: (h, w); NaN where missing.

    Returns:
        (h, w) bool, and for the n places where it is True, how far down (n,) and right (n,) a
        way of length 1 in that direction goes.
    """
    there = np.isfinite(light)
    light = light[_nearest(there)]
    down = scipy.ndimage.sobel(light, 0, mode="nearest") / -4
    right = scipy.ndimage.sobel(light, 1, mode="nearest") / -4
    fall = np.hypot(down, right)
    brightest = scipy.ndimage.maximum_filter(light, 3)
    is_step = there & (fall > (1 - RIM_LEFT) * brightest)
    fall = fall[is_step]
    return is_step, down[is_step] / fall, right[is_step] / fall


def _falls_across(light: np.ndarray, angle: float, distance: float, shortest: float) -> bool:
    """Tell whether light falls by a step all along a line.

    Args:
        light: (h, w); NaN where missing.
        angle: of the direction in which it should fall, which is across the line.
        distance: pixels from the middle of the frame to the line.
        shortest: the light falls over so many pixels at least.
    """
    middle = (np.array(light.shape) - 1) / 2
    reach = sum(light.shape)
    along = np.arange(-reach, reach)

    def sample(outward):
        y = _outward(angle, outward, along)
        x = _outward(angle, -along, outward)
        places = middle + np.stack((y, x), -1)  # (n, 2)
        places = np.rint(places)
        return scipy.ndimage.map_coordinates(light, places.T, order=0, cval=np.nan)

    before = sample(distance - 1)
    after = sample(distance + 1)
    slope = before / sample(distance - 3)
    expected = before * np.minimum(slope, 1)  # a slope goes on
    both = np.isfinite(expected + after)
    falls = after[both] < RIM_LEFT * expected[both]
    return falls.sum() >= shortest and falls.mean() >= RIM_WHOLE


def rim_depth(prepared: Prepared) -> int:
    """Return how many reduced pixels deep a rim is; 0 if there is none."""
    present = prepared.present.all(-1)
    present = np.pad(present, 1)  # nothing is present beyond the frame
    depth = scipy.ndimage.distance_transform_cdt(present, "chessboard")
    depth = depth[1:-1, 1:-1]
    return int(depth[prepared.rim].max(initial=0))


def _nearest(where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the nearest pixel of `where`, (h, w) bool, for each pixel."""
    _, indices = scipy.ndimage.distance_transform_edt(~where, return_indices=True)
    return tuple(indices)


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
    def means(blocks, axis):
        return np.nanmean(blocks, axis, dtype=np.float64)  # what lies beyond an edge is NaN

    weights = np.clip(np.nan_to_num(weights), 0.0, 1.0)  # booleans become floats
    return _reduce_blocks(weights, factor, means)


def _size(planes: np.ndarray) -> str:
    """Return the size of planes (c, h, w) in words."""
    count, height, width = planes.shape
    channels = "1 channel" if count == 1 else f"{count} channels"
    return f"{width} x {height} with {channels}"


def full_mask(prepared: Prepared, settings: Settings) -> np.ndarray:
    """Return the mask of the fit at full size, (1 or c, h, w) float32, 1 = sky.

    It has one channel if all channels have the same mask.
    """
    weight = prepared.weight
    first = weight[..., :1]
    if (weight == first).all():
        weight = first
    mask = _enlarge(weight, settings.downscaling_factor, prepared.full_shape)
    mask = np.moveaxis(mask, -1, 0)
    return np.ascontiguousarray(mask, np.float32)


def _enlarge(reduced: np.ndarray, factor: int, shape: tuple[int, int]) -> np.ndarray:
    """Repeat what was reduced, (rows, columns, ...), so that it fills a frame of `shape` (h, w)."""
    height, width = shape
    tall = reduced.repeat(factor, axis=0)
    large = tall[:height].repeat(factor, axis=1)
    return large[:, :width]


def mask_reasons(prepared: Prepared, settings: Settings) -> dict[str, np.ndarray]:
    """Tell why pixels of the reduced frame are left out.

    Returns:
        Reason -> (h, w) bool. A pixel that is left out has exactly one reason.
    """
    inside = prepared.present & _inside_thresholds(prepared.image, settings)
    everywhere = np.full(prepared.used.shape, True)
    by_file = ~everywhere
    if prepared.user_mask is not None:
        by_file = (prepared.user_mask == 0).any(-1)
    reasons = {  # the first one that holds counts
        "missing": ~prepared.present.any(-1),
        "threshold": ~inside.any(-1),
        "rim": prepared.rim,
        "mask file": by_file,
        "auto": everywhere,
    }
    left_out = ~prepared.used
    for reason, where in reasons.items():
        reasons[reason] = left_out & where
        left_out = left_out & ~where
    return reasons


def clipped_by_stretch(prepared: Prepared) -> np.ndarray:
    """Return True, (h, w, c), where the stretch ends at 1, so that the fit sees no brightness."""
    with np.errstate(invalid="ignore"):  # NaN where missing
        return prepared.linear >= prepared.stretch.white


def shares(prepared: Prepared) -> dict[str, float]:
    """Return the shares of the reduced samples, of all channels together.

    "missing", "masked", and "used" add up to 1. "clipped" is the share that the stretch clips at 1.
    """
    missing = 1 - np.mean(prepared.present)
    used = np.mean(prepared.weight > 0)
    masked = max(0.0, 1 - missing - used)  # not below 0 by rounding
    clipped = np.mean(clipped_by_stretch(prepared))
    return {"missing": missing, "masked": masked, "used": used, "clipped": clipped}


# --------------------------------------------------------------------------------------------------
# Spline: f(q) = sum_i w_i phi_k(|q - c_i|) + v.q + b
# --------------------------------------------------------------------------------------------------

_TINY_SQUARED_DISTANCE = 1e-10
"""Replaces smaller squared distances, for which the logarithm and the gradient of the square root
grow without bound. The value is that of tensorflow-addons."""


SPLINE_REGULARIZATION = 1e-4
"""Regularization of the interpolation inside the fit. It keeps the equations solvable where control
points come close to each other. It does not make the surface stiff: the bending energy does."""


def spline_surface(query: np.ndarray, positions: np.ndarray, values: np.ndarray, order: int,
                   regularization: float) -> np.ndarray:
    """Evaluate the surface through values at control points, in Float64.

    It is that of `interpolate_spline`, for where no gradient is needed. It is linear in the values:
    for the values np.eye(n), it is the matrix that takes any values to their surface.

    Args:
        query: (..., 2) where to evaluate.
        positions: (n, 2) control points.
        values: (n, k) at the control points.
        order: of the kernel phi, which is r^order if odd and r^order log r if even.
        regularization: weight on the diagonal of the interpolation system, 0 = through the values.

    Returns:
        (..., k).
    """
    coefficients = _spline_coefficients(positions, order, regularization) @ values
    weights, slopes, level = np.split(coefficients, (-3, -1))  # (n, k), (2, k), (1, k)
    points = query.reshape(-1, 2)  # (m, 2)
    # In parts: the kernels of all points at once would be the largest array of a run
    count = 1 + len(points) * len(positions) // STRIP_PIXELS
    parts = []
    for part in np.array_split(points, count):
        kernels = _kernel(part, positions, order)
        parts.append(kernels @ weights + part @ slopes + level)
    values_there = np.concatenate(parts)  # (m, k)
    return values_there.reshape(*query.shape[:-1], -1)


def _spline_coefficients(positions: np.ndarray, order: int, regularization: float) -> np.ndarray:
    """Return the matrix that takes values at control points to the spline's coefficients.

    It has the shape (n + 3, n). The coefficients are n weights of kernels, two slopes, and a level.
    """
    n = len(positions)
    kernels = _kernel(positions, positions, order)  # (n, n)
    plane = np.c_[positions, np.ones(n)]  # (n, 3)
    system = np.zeros((n + 3, n + 3))
    system[:n, :n] = kernels + regularization * np.eye(n)
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
    import tensorflow as tf
    with tf.name_scope(name):
        c = tf.convert_to_tensor(train_points)
        f = tf.convert_to_tensor(train_values)
        q = tf.convert_to_tensor(query_points)
        b, n = tf.shape(c)[0], tf.shape(c)[1]
        d = c.shape[-1]

        r2 = _squared_distances(c, c)
        matrix_a = _phi(r2, order)  # [b, n, n]
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

        r2 = _squared_distances(q, c)
        kernels = _phi(r2, order)  # [b, m, n]
        linear = tf.concat([q, tf.ones_like(q[..., :1])], 2)  # [b, m, d + 1]
        return tf.matmul(kernels, w) + tf.matmul(linear, v)


def _squared_distances(x, y):
    """Return the squared distances of x `[b, n, d]` from y `[b, m, d]`: `[b, n, m]`."""
    import tensorflow as tf
    product = tf.matmul(x, y, transpose_b=True)
    if x is y:
        # These norms are rounded as the product is, so the diagonal, where the kernel is steepest,
        # is exactly 0
        x_norm = y_norm = tf.linalg.diag_part(product)
    else:
        x_norm = tf.reduce_sum(tf.square(x), 2)
        y_norm = tf.reduce_sum(tf.square(y), 2)
    return x_norm[:, :, None] - 2 * product + y_norm[:, None, :]


def _phi(r2, order):
    """Return the kernel for squared distances r2, of any shape."""
    import tensorflow as tf
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
    try:
        with memory_errors():
            return importlib.import_module("tensorflow")
    except MemoryError:
        raise
    except Exception as error:  # missing, or broken: then it fails with almost any error
        lines = str(error).splitlines() or [type(error).__name__]
        raise BgError(f"TensorFlow cannot be imported ({lines[0]}); "
                      "install it with: python -m pip install -r requirements.txt") from None


def import_interpolate_spline() -> Callable:
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


def spline_layer(points: int, channels: int, order: int, regularization: float):
    """Return a Keras layer, query points [m, 2] -> surface [m, c].

    Its trainable weights are the control points: their positions (n, 2) and their values (n, c).

    Args:
        points: n, the number of control points.
        channels: c, of the surface.
        order: of the spline.
        regularization: weight on the diagonal of the interpolation system.
    """
    import tensorflow as tf
    interpolate = import_interpolate_spline()

    class SplineSurface(tf.keras.layers.Layer):
        def __init__(self):
            super().__init__(name="spline_surface")
            self.positions = self._control_points("positions", 2)
            self.values = self._control_points("values", channels)

        def _control_points(self, name, numbers):
            return self.add_weight(name=name, shape=(points, numbers), initializer="zeros")

        def call(self, query):
            surface = interpolate(
                self.positions[None], self.values[None], query[None], order, regularization)
            return surface[0]

    return SplineSurface()


def bending_nodes(full_shape: tuple[int, int], longer: int) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes over the frame, (rows, columns, 2), and their distances down and along it.

    All are in frame coordinates.

    Args:
        full_shape: (h, w) of the picture. Only its ratio counts.
        longer: nodes along the longer side.
    """
    sides = np.array(full_shape) / max(full_shape)
    counts = np.maximum(4, np.round(longer * sides)).astype(int)
    down, along = [np.linspace(0, side, count) for side, count in zip(sides, counts)]
    return _grid(down, along), np.array([down[1], along[1]])


def bending_rows(spacing: np.ndarray, cost: np.ndarray, free_bowl: bool) -> np.ndarray:
    """Return the matrix whose product with a surface on nodes has the bending as its square.

    The bending energy is that of a thin plate over 8 pi: the integral of the squared second
    derivatives over the frame, in frame coordinates, here times the cost of each place.

    Args:
        spacing: (2,) distances of the nodes, down and along.
        cost: (rows, columns) of bending at the nodes.
        free_bowl: only deviations from the mean second derivatives count. These are those of a
            bowl, and most skies have a part that is one: vignetting, and most glows.

    Returns:
        (3 (rows - 2) (columns - 2), rows columns).
    """
    rows, columns = cost.shape
    down, along = spacing
    count = rows * columns
    unit = np.eye(count).reshape(rows, columns, count)
    center = unit[1:-1, 1:-1]
    down_down = (unit[2:, 1:-1] - 2 * center + unit[:-2, 1:-1]) / down**2
    along_along = (unit[1:-1, 2:] - 2 * center + unit[1:-1, :-2]) / along**2
    corners = unit[2:, 2:] - unit[2:, :-2] - unit[:-2, 2:] + unit[:-2, :-2]
    down_along = corners / (4 * down * along)
    derivatives = np.stack([down_down, along_along, math.sqrt(2) * down_along])
    weight = cost[1:-1, 1:-1]  # (rows - 2, columns - 2)
    if free_bowl:
        shares = weight / weight.sum()
        derivatives -= np.einsum("ij,kijn->kn", shares, derivatives)[:, None, None]
    area = (rows - 1) * down * (columns - 1) * along
    each = area / weight.size / (8 * math.pi)
    derivatives *= np.sqrt(each * weight)[..., None]
    return derivatives.reshape(-1, count)


# --------------------------------------------------------------------------------------------------
# Find the sky: what is sky, its surface, how stiff it is, and how sure that is
#
# Light adds up in linear data, so the sky is found there, on a coarse copy of the picture: the
# cells. Three facts tell the sky from objects, and none of them is a threshold on brightness.
#
# 1. The sky is smooth. What has fine structure (arms, filaments, dust lanes, stars) is an object.
#    Hills and trees are recognized by their step down from the sky.
# 2. Glow comes from outside the frame and grows toward an edge. A smooth patch of light that is
#    closed, which means surrounded by darker picture on all sides, is an object too: a nebula
#    drowned in noise, a globular cluster.
# 3. The light of an object goes on beside it. What stands above a candidate surface there,
#    without a gap, may be its outskirts, and does not count against that surface. A dark cloud is
#    such an object with the opposite sign.
#
# A surface pays for bending, but not for a tilt or for a bowl (vignetting), and it pays most where
# no sky is seen. The answer is the stiffest surface that explains the sky nearly as well as the
# best one does.
#
# The parts of this section, in the order in which the picture passes through them:
#
#   Cells                  the picture, reduced once more, and its noise
#   Surfaces               all surfaces that the sky may have, and how they are fitted
#   Texture                what has fine structure
#   Hills                  what stands in front of the sky and is dark
#   Steep glows            light of the sky that is too steep for a plate
#   Scene                  all of these
#   Closed patches         smooth objects
#   Growth                 the outskirts of objects
#   Choice                 the stiffest surface that explains the sky
#   Doubt                  when the sky cannot be known
#   Result                 find_sky, which does all of it
#
# In the shapes below, (h, w) are cells, and c is the number of channels. "Sigma" is the standard
# deviation of the noise of what it is said of.
# --------------------------------------------------------------------------------------------------

# --- Cells ---

FIND_CELLS = 130
"""Cells along the longer side of a large picture."""

FEWEST_CELLS = 64
"""A cell has at least 2 x 2 reduced pixels if so many cells remain along the longer side. In the
noise of single pixels a faint nebula looks smooth."""

SMALLEST_SIDE = 12
"""Cells. In a picture with a shorter side the sky is not looked for."""

FEWEST_USABLE = 150
"""Cells. In a picture with fewer usable ones the sky is not looked for."""

NOISE_TILE = 7
"""Cells along a side of the tiles in which the noise is measured."""

NOISE_LEVELS = 8
"""The noise is measured at no more levels of light than this."""

TILES_PER_LEVEL = 6
"""A level of light has at least so many tiles, or it is the only one."""

QUIET_QUARTILE = 1.07
"""The lower quartile of deviations that are measured on 49 cells is 7 % too low."""

NOISE_ROUNDS = 4
"""So many times levels of light are dropped, and the line through the others is fitted again."""

QUIET_EXCESS = 2.0
"""A level is dropped if its variance is more than this many times that on the line."""


@dataclass(frozen=True)
class _Cells:
    """The picture, reduced once more: a cell is size x size reduced pixels."""

    values: np.ndarray  # (h, w, c) linear, less the pedestal, in units of `scale`
    usable: np.ndarray  # (h, w) bool: not missing, not masked by the user
    noise: np.ndarray  # (h, w, c) standard deviation of `values`
    centers: np.ndarray  # (h, w, 2) frame coordinates
    size: int
    pedestal: np.ndarray  # (c,) linear: the darkest part of the picture
    scale: np.ndarray  # (c,) linear: three times the height of the median above the pedestal

    @property
    def longer(self) -> int:
        """Cells along the longer side."""
        return max(self.usable.shape)

    @property
    def too_small(self) -> bool:
        """Whether there is too little to tell objects from sky."""
        return min(self.usable.shape) < SMALLEST_SIDE or self.usable.sum() < FEWEST_USABLE

    @property
    def rim(self) -> np.ndarray:
        """The usable cells within two cells of the edge of what is usable, (h, w) bool."""
        return self.usable & ~scipy.ndimage.binary_erosion(self.usable, iterations=2)


def _make_cells(prepared: Prepared) -> _Cells:
    """Reduce the picture to cells."""
    linear = prepared.linear
    usable = prepared.present.all(-1) & prepared.used  # (rows, columns) of reduced pixels
    if not usable.any():  # channels that are never present together count as flat where missing
        usable = prepared.used
        linear = np.where(prepared.present, linear, prepared.median)
    longer = max(usable.shape)
    smallest = 2 if longer >= 2 * FEWEST_CELLS else 1
    size = max(smallest, round(longer / FIND_CELLS))
    shown = np.where(usable[..., None], linear, 0)  # 0: missing
    planes = [reduce_plane(channel, size) for channel in np.moveaxis(shown, -1, 0)]
    light = np.stack(planes, -1).astype(float)  # (h, w, c)

    some = np.isfinite(light).all(-1)
    whole = some & _mostly(usable, size)
    # A cell beside a border mixes with it, and is left out as well
    inner = scipy.ndimage.minimum_filter(whole, 3)  # (h, w)
    usable = next((cells for cells in (inner, whole, some) if cells.sum() >= FEWEST_USABLE), some)
    light[~usable] = 0
    dark, median = np.percentile(light[usable], (0.5, 50), axis=0)  # (c,) each
    scale = np.maximum(3 * (median - dark), 1e-9)
    values = (light - dark) / scale
    values[~usable] = 0
    noise = _cell_noise(light, usable) / scale
    centers = _block_means(prepared.centers, size).astype(float)
    return _Cells(values, usable, noise, centers, size, dark, scale)


def _mostly(mask: np.ndarray, size: int) -> np.ndarray:
    """Return the cells, (h, w) bool, in which most reduced pixels are True."""
    return _block_means(mask, size) > 0.5


def _cell_noise(light: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Return the noise of cells of light (h, w, c): (h, w, c).

    It is measured by the differences between neighbors where the picture is smoothest. Photon noise
    grows with the light: variance = floor + slope * light.
    """
    noise = np.full_like(light, 1e-6)  # if there is no tile to measure it in
    for k, plane in enumerate(np.moveaxis(light, -1, 0)):
        levels, variances = _quiet_levels(np.where(usable, plane, np.nan))
        if levels.size:
            darkest = levels.min()
            floor, slope = _noise_line(levels - darkest, variances)
            above = np.maximum(plane - darkest, 0)
            noise[..., k] = np.sqrt(floor + slope * above)
    return np.maximum(noise, 1e-9)


def _quiet_levels(light: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return some levels of light, and the variance of the quietest tiles at each.

    Args:
        light: (h, w), NaN where it is not usable.

    Returns:
        (levels,) each; empty if no tile is mostly usable.
    """
    # The mean of a cell's four neighbors, less the cell. At the edges some neighbors are missing
    detail = scipy.ndimage.laplace(light) / 4
    detail = _tiles(detail[1:-1, 1:-1])  # (tiles, 49)
    inner = _tiles(light[1:-1, 1:-1])
    whole = np.isfinite(detail).mean(1) > 0.5
    if not whole.any():
        return np.empty(0), np.empty(0)
    # The mean of four neighbors adds a quarter of the variance
    sigma = _deviation(detail[whole], 1) / math.sqrt(1.25)  # (tiles,)
    level = np.nanmedian(inner[whole], 1)
    by_level = np.argsort(level)
    count = min(NOISE_LEVELS, level.size // TILES_PER_LEVEL)
    levels = []
    variances = []
    for alike in np.array_split(by_level, max(1, count)):
        quiet = QUIET_QUARTILE * np.percentile(sigma[alike], 25)
        levels.append(np.median(level[alike]))
        variances.append(quiet**2 + 1e-18)
    return np.array(levels), np.array(variances)


def _tiles(image: np.ndarray) -> np.ndarray:
    """Cut an image (h, w) into whole tiles, (tiles, 49)."""
    tile = (NOISE_TILE, NOISE_TILE)
    if min(image.shape) < NOISE_TILE:
        return np.empty((0, NOISE_TILE**2))
    windows = np.lib.stride_tricks.sliding_window_view(image, tile)
    tiles = windows[::NOISE_TILE, ::NOISE_TILE]  # (rows, columns, 7, 7)
    return tiles.reshape(-1, NOISE_TILE**2)


def _deviation(residuals: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Return the standard deviation about 0 of residuals, robustly; NaN does not count."""
    return GAUSSIAN_DEVIATION * np.nanmedian(np.abs(residuals), axis)


def _span(values: np.ndarray, percentiles: tuple[float, float]) -> np.ndarray:
    """Return the difference of two percentiles, the upper one first, of (n, c) or (n,) values."""
    high, low = np.percentile(values, percentiles, axis=0)
    return high - low


def _noise_line(above: np.ndarray, variances: np.ndarray) -> np.ndarray:
    """Return the floor and the slope of the variance over the light above the darkest level.

    The quietest tiles at each level follow such a line. Levels that only objects have are never
    quiet; they are dropped.

    Args:
        above, variances: (levels,).
    """
    terms = np.stack([np.ones_like(above), above], 1)  # (levels, 2)
    relative = terms / variances[:, None]
    kept = np.full(above.shape, True)
    for _ in range(NOISE_ROUNDS):
        one = np.ones(kept.sum())
        line, _ = scipy.optimize.nnls(relative[kept], one)  # (2,)
        excess = variances / np.maximum(terms @ line, 1e-30)
        lowest = np.sort(excess)[:2]  # two levels stay at least
        kept = excess <= max(QUIET_EXCESS, lowest.max())
    return line


def _smooth(image: np.ndarray, sigma: float, where: np.ndarray) -> np.ndarray:
    """Return the Gaussian mean of (h, w) or (h, w, c) over the cells `where`, (h, w) bool."""
    sigmas = (sigma, sigma)
    if image.ndim == 3:
        sigmas = (sigma, sigma, 0)
        where = where[..., None]
    counted = np.where(where, image, 0)
    total = scipy.ndimage.gaussian_filter(counted, sigmas)
    share = scipy.ndimage.gaussian_filter(where.astype(float), sigmas)
    return total / np.maximum(share, 1e-6)  # where no cell is near, the mean is 0


def _noise_of_mean(sigma: float) -> float:
    """Return the noise of a Gaussian mean of so many cells; that of a cell is 1."""
    return 1 / (math.sqrt(4 * math.pi) * sigma)


def _channels_together(excess: np.ndarray) -> np.ndarray:
    """Add the channels of (h, w, c), in units of their noise: (h, w), in units of its noise."""
    return excess.sum(-1) / math.sqrt(excess.shape[-1])

# --- Surfaces ---

SKY_POINTS = 96
"""Control points of the surface on the cells. Its stiffness, not their number, decides how it
bends."""

NODES = 24
"""Nodes along the longer side on which bending is measured."""

THIN_PLATE = 2
"""Order of the spline whose bending energy is that of a thin plate."""

STIFFNESS_UNIT = 1e-4
"""Weight of the bending energy beside the mean squared residual at a smoothing of 1. Residuals are
in units of three times the sky's median above its darkest part. The energy is that for the longer
side of the frame as the unit of length."""

SMOOTHINGS = (1e4, 1e3, 1e2, 1e1, 1.0, 1e-1, 1e-2)
"""Candidates, the stiffest first: a plane, then a plane with a bowl, then ever more flexible
surfaces."""

PLANE = 1e4
"""From this smoothing on a bowl costs as much as any other bending, and the surface is a plane."""

WITH_BOWL = 1e3
"""At this smoothing the surface is a plane with a bowl, and nothing else."""

UNSEEN_COST = 10.0
"""Bending costs so many times as much where no sky is seen."""

CELLS_PER_FREEDOM = 15.0
"""A surface has one degree of freedom for so many cells that may show sky, and no more, but a bowl
is always free. Of hundreds of stars on 100 x 100 pixels, others would follow the stars."""

GLOW_COST = 1e-7
"""Weight of the squared coefficients of a glow: next to nothing."""

STIFF_MODE = 10.0
"""Modes of the surface whose bending costs more than so many times their squared height are left
out. They would keep 3 % of their height at most."""

GLOW_LENGTHS = (0.02, 0.04, 0.08, 0.16)
"""Lengths over which a glow falls off, in units of the longer side."""

GLOW_RATIOS = (0.6, 1.0, 1.6)
"""How much faster the glow in a corner falls off along a row than along a column."""

GLOW_KNOWN = 0.03
"""The form of a glow is known to this part of its light."""

FIT_ROUNDS = 4
"""Rounds of fitting, with the weights that the last fit suggests."""

HUBER_LIMIT = 2.5
"""A cell farther from the surface than so many typical residuals pulls no harder (Huber's loss)."""

HUBER_DEVIATION = 1.2
"""Deviation of the residuals over their median. It is 1.48 for one channel, and 1.13 for the rms of
three."""

CEILING_SIGMA = 2.0
"""The sky may be above an object's light by so many sigma; else it would follow the low side of the
noise."""

CEILING_WEIGHT = 0.5
"""Weight of "the sky is not above the picture" under an object, beside 1 for a cell of sky."""


class _Surfaces:
    """All surfaces that the sky may have on the cells: thin plates with bowls, and glows.

    A surface is a linear function of its coefficients (m, c). These are the heights of its modes,
    which are sorted by how much they bend, so that a stiff surface needs the first few only.

    Args:
        cells: of the picture.
        shape: (h, w) of the full picture. Only its ratio counts.
        glows: where light is too steep for a plate: (row, column) of corners of the frame, or of
            edges, for which one of the two is NaN.
    """

    def __init__(self, cells: _Cells, shape: tuple[int, int], glows: Sequence = ()):
        self.cells = cells
        self.glows = glows
        self.sides = np.array(shape) / max(shape)  # (2,) of the frame
        self.positions = _regular_points(self.sides)  # (n, 2) frame coordinates
        self.nodes, self.spacing = bending_nodes(shape, NODES)  # (rows, columns, 2), (2,)
        # Float32 is twice as fast. The modes are orthogonal, so nothing is lost by it
        channels = cells.values.shape[-1]
        self.values = cells.values.reshape(-1, channels).astype(np.float32)  # (cells, c)
        inverse = 1 / (cells.noise**2).mean(-1).ravel()
        self.inverse = (inverse / inverse.mean()).astype(np.float32)  # (cells,)
        self.on_nodes = self._terms(self.nodes.reshape(-1, 2))  # (nodes, m)
        self.on_nodes[:, len(self.positions) + 3:] = 0  # a glow bends as it likes
        self.glow_terms = self._simple_terms(cells.centers)[..., 3:]  # (h, w, glows)
        self.matrix = self._terms(cells.centers.reshape(-1, 2))  # (cells, m)
        self.modes, self.bends = self._find_modes()  # (m, m) and (m,)
        self.matrix = (self.matrix @ self.modes).astype(np.float32)
        self.on_nodes = self.on_nodes @ self.modes
        glow = self.modes[len(self.positions) + 3:]
        self.glow_energy = GLOW_COST * glow.T @ glow  # (m, m)
        self.cost = np.ones(self.nodes.shape[:2])

    def _terms(self, places: np.ndarray) -> np.ndarray:
        """Return plates, bowls, and glows at places (..., 2): (..., m)."""
        unit = np.eye(len(self.positions))
        plates = spline_surface(places, self.positions, unit, THIN_PLATE, 0.0)
        return np.concatenate([plates, self._simple_terms(places)], -1)

    def _simple_terms(self, places: np.ndarray) -> np.ndarray:
        """Return bowls and glows at places (..., 2): (..., 3 + glows)."""
        y, x = np.moveaxis(places - self.sides / 2, -1, 0)
        terms = [x * x, x * y, y * y]
        for glow in self.glows:
            terms.extend(_glow_terms(glow, places, self.sides))
        return np.stack(terms, -1)

    def _find_modes(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the modes (m, m), of mean square 1 on the cells, and the bending of each (m,)."""
        if self.cells.too_small:  # only planes: through values that lie on one, so does a plate
            modes = np.zeros((self.matrix.shape[1], 3))
            modes[:len(self.positions)] = np.c_[self.positions, np.ones(len(self.positions))]
            return modes, np.zeros(3)
        rows = self.matrix[self.cells.usable.ravel()]
        square = rows.T @ rows / len(rows)
        square += 1e-9 * np.trace(square) * np.eye(len(square))  # keeps the equations solvable
        everywhere = np.ones(self.nodes.shape[:2])
        derivatives = bending_rows(self.spacing, everywhere, True) @ self.on_nodes
        bends, modes = scipy.linalg.eigh(derivatives.T @ derivatives, square)
        return modes, bends

    def candidates(self, sky: np.ndarray) -> list[float]:
        """Return those of `SMOOTHINGS` that cells (h, w) bool are enough for."""
        enough = []
        for smoothing in SMOOTHINGS:
            kept = 1 / (1 + smoothing * STIFFNESS_UNIT * self.bends)  # (m,) of each mode
            if smoothing >= WITH_BOWL or CELLS_PER_FREEDOM * kept.sum() <= sky.sum():
                enough.append(smoothing)
        return enough

    def dearer(self, unseen: np.ndarray) -> _Surfaces:
        """Return the same surfaces, whose bending costs more where no sky is seen, (h, w) bool."""
        other = copy.copy(self)
        other.cost = bending_cost(unseen, self.nodes, self.cells.centers)
        return other

    def linear(self, found: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return the surface of coefficients (m, c) in the picture's own units, at places.

        Args:
            found: (k, c) coefficients of the first modes.
            places: (..., 2) frame coordinates.

        Returns:
            (..., c)
        """
        coefficients = self.modes[:, :len(found)] @ found
        n = len(self.positions)
        plate = spline_surface(places, self.positions, coefficients[:n], THIN_PLATE, 0.0)
        surface = plate + self._simple_terms(places) @ coefficients[n:]
        return surface * self.cells.scale + self.cells.pedestal

    def surface(self, found: np.ndarray) -> np.ndarray:
        """Return the surface on the cells, (h, w, c)."""
        surface = self.matrix[:, :len(found)] @ found.astype(np.float32)  # (cells, c)
        return surface.reshape(self.cells.values.shape)

    def glow(self, found: np.ndarray) -> np.ndarray:
        """Return the light of the glows alone on the cells, (h, w, c)."""
        first = len(self.positions) + 3
        coefficients = self.modes[first:, :len(found)] @ found
        return self.glow_terms @ coefficients

    def rest(self, found: np.ndarray) -> np.ndarray:
        """Return picture less surface, (h, w, c)."""
        return self.cells.values - self.surface(found)

    def excess(self, found: np.ndarray) -> np.ndarray:
        """Return picture less surface, (h, w, c), in units of what both may be wrong by."""
        return self.rest(found) / self.uncertain(found)

    def uncertain(self, found: np.ndarray) -> np.ndarray:
        """Return the noise of the picture, and with it that of the form of a glow, (h, w, c)."""
        if not self.glows:
            return self.cells.noise
        return np.hypot(self.cells.noise, GLOW_KNOWN * self.glow(found))

    def fit(self, sky: np.ndarray, bounds: np.ndarray, smoothing: float,
            found: np.ndarray | None = None) -> np.ndarray:
        """Fit the sky with a surface that is not above the picture elsewhere.

        Args:
            sky: (h, w) bool, cells of sky.
            bounds: (h, w) bool: cells that only bound the sky from above.
            smoothing: see `SMOOTHINGS`.
            found: coefficients to begin with, for half of the rounds.

        Returns:
            (k, c) coefficients of the first k modes.
        """
        energy = self.energy(smoothing)
        count = len(energy)
        seen = np.flatnonzero(sky)
        below = np.flatnonzero(bounds)
        matrix = self.matrix[seen, :count]
        values = self.values[seen]
        weight = self.inverse[seen]
        for _ in range(FIT_ROUNDS if found is None else FIT_ROUNDS // 2):
            pierced = np.zeros((len(below), values.shape[1]), bool)
            if found is not None:
                excess = self.excess(found).reshape(self.values.shape)
                distance = np.sqrt((excess[seen]**2).mean(-1))
                limit = HUBER_LIMIT * max(1.0, HUBER_DEVIATION * np.median(distance))
                weight = self.inverse[seen] * np.minimum(1, limit / np.maximum(distance, 1e-9))
                pierced = excess[below] < -CEILING_SIGMA
            root = np.sqrt(weight)[:, None]
            rows = matrix * root
            gram = rows.T @ rows  # of one matrix: BLAS computes half of it
            right = rows.T @ (values * root)
            total = weight.sum()
            solutions = []
            for k in range(values.shape[1]):
                high = below[pierced[:, k]]  # where this channel's surface was too high
                rows = self.matrix[high, :count]
                pull = CEILING_WEIGHT * self.inverse[high, None]
                system = gram + rows.T @ (rows * pull)
                wanted = right[:, k] + rows.T @ (self.values[high, k] * pull[:, 0])
                all_weights = total + pull.sum()
                solutions.append(np.linalg.solve(
                    system / all_weights + energy, wanted / all_weights))
            found = np.stack(solutions, -1)
        return found

    def energy(self, smoothing: float) -> np.ndarray:
        """Return the cost of the modes that count, the first m, beside the mean squared residual.

        Returns:
            (m, m)
        """
        count = int((smoothing * STIFFNESS_UNIT * self.bends < STIFF_MODE).sum())
        rows = bending_rows(self.spacing, self.cost, smoothing < PLANE)
        derivatives = rows @ self.on_nodes[:, :count]
        energy = smoothing * STIFFNESS_UNIT * derivatives.T @ derivatives
        energy += self.glow_energy[:count, :count]
        return energy + 1e-6 * np.eye(count)  # decides what too few cells leave open

    def deviation(self, found: np.ndarray, sky: np.ndarray, smoothing: float) -> np.ndarray:
        """Return the standard deviation of a fitted surface, (h, w, c).

        It is that of the posterior, if bending is what the smoothing expects, and the residuals of
        cells (h, w) bool are independent.
        """
        energy = self.energy(smoothing)
        count = len(energy)
        rows = self.matrix[sky.ravel(), :count].astype(float)
        weight = self.inverse[sky.ravel(), None]
        system = rows.T @ (rows * weight) / weight.sum() + energy
        root = np.linalg.cholesky(np.linalg.inv(system))
        spread = np.linalg.norm(self.matrix[:, :count] @ root, axis=1)  # (cells,)
        residual = self.rest(found)[sky]  # (n, c)
        noise = _deviation(residual, 0) / math.sqrt(len(residual))  # (c,)
        return (spread[:, None] * noise).reshape(self.cells.values.shape)


def _glow_terms(glow: tuple, places: np.ndarray, sides: np.ndarray) -> list:
    """Return terms of light that falls off from a corner or an edge, at places (..., 2).

    Args:
        glow: (row, column) in frame coordinates; one of the two is NaN along an edge.
        places: (..., 2) frame coordinates.
        sides: (2,) of the frame.

    Returns:
        A list of (...).
    """
    distances = np.abs(places - np.array(glow))  # (..., 2)
    terms = []
    if np.isnan(glow).any():
        axis = int(np.isnan(glow[0]))  # across the edge
        distance = distances[..., axis]
        along = places[..., 1 - axis] / sides[1 - axis] - 0.5
        for length in GLOW_LENGTHS:
            fall = np.exp(-distance / length)
            terms.extend([fall, along * fall, along**2 * fall])
        return terms
    for ratio in GLOW_RATIOS:
        distance = np.hypot(distances[..., 0], ratio * distances[..., 1])
        terms.extend(np.exp(-distance / length) for length in GLOW_LENGTHS)
    return terms


def bending_cost(unseen: np.ndarray, places: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Return what bending costs at places (rows, columns, 2), where (h, w) bool is not seen.

    Single stars do not count, holes do.

    Args:
        centers: (h, w, 2) frame coordinates of the cells.
    """
    width = max(3, int(max(unseen.shape) / NODES) | 1)
    share = scipy.ndimage.uniform_filter(unseen.astype(float), width)
    hole = np.clip(2 * _cells_at(places, share, centers) - 1, 0, 1)
    return 1 + (UNSEEN_COST - 1) * hole


def _cells_at(places: np.ndarray, cells: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Return what cells (h, w) with centers (h, w, 2) hold at places (..., 2): (...)."""
    side = 2 * centers[0, 0]  # (2,) of a cell
    last = np.array(cells.shape) - 1
    row, column = np.moveaxis(np.minimum((places / side).astype(int), last), -1, 0)
    return cells[row, column]


def _regular_points(sides: np.ndarray) -> np.ndarray:
    """Return control points (n, 2) on a regular grid over a frame with these sides, (2,)."""
    height, width = sides
    wanted = math.sqrt(SKY_POINTS * height / width)
    rows = int(np.clip(round(wanted), 3, SKY_POINTS // 3))
    columns = round(SKY_POINTS / rows)
    row = np.linspace(0, height, rows)
    column = np.linspace(0, width, columns)
    return _grid(row, column).reshape(-1, 2)


# --- Texture ---

ROUGH_SCALE = 1.4
"""Cells: detail is what differs from a smooth mean of this width."""

ROUGH_SIGMA = 3.5
"""A cell is rough if its detail is more than so many sigma."""

ROUGH_WINDOW = 0.05
"""In units of the longer side: the window in which rough cells are counted."""

ROUGH_DENSITY = 0.2
"""A region is an object if this part of its cells is rough. Lone stars stay single cells, nebulae
and galaxies close up."""


class _Texture(NamedTuple):
    """What has fine structure, (h, w) each."""

    detail: np.ndarray  # in sigma, with its sign
    rough: np.ndarray  # bool: detail that noise does not explain
    dense: np.ndarray  # bool: regions dense with it


def _texture(surfaces: _Surfaces, usable: np.ndarray) -> _Texture:
    """Find what has fine structure, beside the most flexible surface, which follows steep skies.

    Args:
        usable: (h, w) bool.
    """
    cells = surfaces.cells
    most_flexible = surfaces.candidates(usable)[-1]
    found = surfaces.fit(usable, np.zeros_like(usable), most_flexible)
    values = surfaces.rest(found)
    detail = values - _smooth_slope(values, ROUGH_SCALE, usable)
    detail /= surfaces.uncertain(found)
    strongest = np.abs(detail).argmax(-1)[..., None]
    detail = np.take_along_axis(detail, strongest, -1)[..., 0]  # (h, w)
    rough = usable & (np.abs(detail) > ROUGH_SIGMA)
    window = _rough_window(cells)
    share = scipy.ndimage.uniform_filter(usable.astype(float), window)
    density = scipy.ndimage.uniform_filter(rough.astype(float), window)
    density /= np.maximum(share, 0.2)  # few usable cells are no region
    return _Texture(detail, rough, usable & (density > ROUGH_DENSITY))


def _rough_window(cells: _Cells) -> int:
    """Return the side of the window in which rough cells are counted, an odd number of cells."""
    return max(3, int(ROUGH_WINDOW * cells.longer) | 1)


def _smooth_slope(image: np.ndarray, sigma: float, where: np.ndarray) -> np.ndarray:
    """Return the Gaussian mean of (h, w, c) over the cells `where`, (h, w) bool, as a local plane.

    At an edge, where all neighbors are on one side, a plain mean would take a slope for detail.
    """
    y, x = np.indices(where.shape).astype(float)
    mean = functools.partial(scipy.ndimage.gaussian_filter, sigma=sigma)
    weight = where.astype(float)
    share = np.maximum(mean(weight), 1e-6)
    center_y = mean(weight * y) / share
    center_x = mean(weight * x) / share
    yy = mean(weight * y * y) / share - center_y**2 + 1e-3
    xx = mean(weight * x * x) / share - center_x**2 + 1e-3
    xy = mean(weight * x * y) / share - center_x * center_y
    determinant = np.maximum(yy * xx - xy**2, 1e-6)
    smooth = np.zeros(image.shape)
    for k in range(image.shape[-1]):
        counted = np.where(where, image[..., k], 0.0)
        center = mean(counted) / share
        by_y = mean(counted * y) / share - center * center_y
        by_x = mean(counted * x) / share - center * center_x
        slope_y = (by_y * xx - by_x * xy) / determinant
        slope_x = (by_x * yy - by_y * xy) / determinant
        smooth[..., k] = center + slope_y * (y - center_y) + slope_x * (x - center_x)
    return smooth


# --- Hills ---

FOREGROUND_GAP = 0.1
"""Hills begin within this part of the longer side from the sky. The dark sky beyond a band of the
Milky Way is farther off, and falls less."""

FOREGROUND_DROP = 0.8
"""Hills fall below the sky by this part of the sky's range (5th to 95th percentile) at once."""

FOREGROUND_SIGMA = 10.0
"""All of a hill is darker than the nearest sky by so many sigma."""

FOREGROUND_SIZE = 0.003
"""Hills cover at least this part of the picture."""

FOREGROUND_EDGE = 5
"""Cells: how deep the edge of a hill is, in which it is compared with the sky."""


def _dark_foreground(cells: _Cells, objects: np.ndarray) -> np.ndarray:
    """Return hills, trees, or a dome, (h, w) bool.

    Only they take light away, and so lie below the sky by a step. The largest region without
    structure is taken for sky. A region at the edge of the frame is foreground if it begins close
    to that sky, and is darker than the nearest of it, at once and by most of the sky's own range.

    Args:
        objects: (h, w) bool, regions with structure.
    """
    foreground = np.zeros_like(objects)
    near_objects = scipy.ndimage.binary_dilation(objects, iterations=2)
    plain = cells.usable & ~near_objects
    if not plain.any():
        return foreground
    regions, _ = scipy.ndimage.label(plain)
    sizes = np.bincount(regions[plain])
    sky = regions == sizes.argmax()
    from_sky, nearest = scipy.ndimage.distance_transform_edt(~sky, return_indices=True)
    drop = cells.values[tuple(nearest)] - cells.values  # (h, w, c)
    span = _span(cells.values[sky], (95, 5))  # (c,)
    dark = cells.usable & (drop > FOREGROUND_SIGMA * cells.noise).all(-1)
    regions, count = scipy.ndimage.label(scipy.ndimage.binary_opening(dark))
    smallest = FOREGROUND_SIZE * cells.usable.sum()
    farthest = FOREGROUND_GAP * cells.longer
    for region in range(1, count + 1):
        inside = regions == region
        gap = from_sky[inside].min()
        edge = inside & (from_sky < gap + FOREGROUND_EDGE)
        large = inside.sum() > smallest
        close = gap <= farthest and inside[cells.rim].any()
        step = np.median(drop[edge], axis=0)  # (c,)
        if large and close and (step > FOREGROUND_DROP * span).all():
            foreground |= inside
    return cells.usable & scipy.ndimage.binary_dilation(foreground, iterations=2)


# --- Steep glows ---

PIXEL_NOISE = 15
"""The noise of a pixel, about, in units of that of a cell: nobody can see what differs by less."""

GLOW_REACH = 0.3
"""A glow is compared with the picture this part of the longer side away."""

GLOW_HALF = 0.17
"""A steep glow has fallen to half within this part of the longer side. A plate follows wider
ones."""

GLOW_HEIGHT = 0.5
"""A steep glow rises by this part of the picture's range (5th to 95th percentile)."""

GLOW_SMOOTH = 0.06
"""The picture differs from a glow by at most this part of the glow's light, median in its core.
True glows have up to 0.03, nebulae 0.16 and more."""


def _steep_glows(cells: _Cells, usable: np.ndarray) -> list:
    """Find light that rises to an edge or a corner too steeply for a plate, and is sky.

    Street lights, the edge of a sensor, and an amplifier make it. Its profile is the median of all
    cells that are as far from the edge or the corner: no star and no galaxy decides it.

    Returns:
        Their places, as `_Surfaces` takes them.
    """
    light = _channels_together(cells.values / cells.noise)
    centers = cells.centers[cells.usable]
    low, high = centers.min(0), centers.max(0)  # (2,) of what is usable
    edges = [(low[0], math.nan), (high[0], math.nan), (math.nan, low[1]), (math.nan, high[1])]
    glows = [edge for edge in edges if _falls_off(cells, light, usable, edge)]
    glowing = set(itertools.chain(*glows))
    for corner in itertools.product(*zip(low, high)):
        # The glow along an edge brightens both of its corners
        if not glowing.intersection(corner) and _falls_off(cells, light, usable, corner):
            glows.append(corner)
    return glows


def _falls_off(cells: _Cells, light: np.ndarray, usable: np.ndarray, place: tuple) -> bool:
    """Tell whether light (h, w) falls off steeply with the distance from an edge or a place."""
    ring = np.round(_distance_from(place, cells.centers) * cells.longer).astype(int)
    if ring[usable].min(initial=2) > 1:  # hills stand there, or everywhere
        return False
    rings = range(int(GLOW_REACH * cells.longer))
    levels = [light[usable & (ring == k)] for k in rings]
    profile = np.array([np.median(level) for level in levels if level.size])  # (rings,)
    base = profile.min()
    height = profile[0] - base
    span = _span(light[usable], (95, 5))
    half = (profile < base + 0.5 * height).argmax()
    falls = (np.diff(profile[:half + 1]) < 0.1 * height).all()
    return bool(falls and half < GLOW_HALF * cells.longer
                and height > max(GLOW_HEIGHT * span, PIXEL_NOISE))


def _distance_from(place: tuple, centers: np.ndarray) -> np.ndarray:
    """Return the distance of (..., 2) from a corner or an edge; see `_Surfaces`."""
    return np.sqrt(np.nansum((centers - np.array(place))**2, -1))


# --- Scene ---

@dataclass(frozen=True)
class _Scene:
    """What is known of a picture before its sky is."""

    cells: _Cells
    surfaces: _Surfaces  # with the steep glows of this sky
    texture: _Texture
    near_hills: np.ndarray  # (h, w) bool: hills and trees, with a margin

    @property
    def plain(self) -> np.ndarray:
        """What has no structure, and so may be sky, (h, w) bool."""
        structure = self.texture.rough | self.texture.dense | self.near_hills
        return self.cells.usable & ~structure


def _look(cells: _Cells, shape: tuple[int, int]) -> _Scene:
    """Tell what has structure, what are hills, and where the sky has steep glows.

    Args:
        cells: of the picture.
        shape: (h, w) of the full picture.
    """
    usable = cells.usable
    plates = _Surfaces(cells, shape)
    if cells.too_small:
        nothing = np.zeros_like(usable)
        return _Scene(cells, plates, _Texture(np.zeros(usable.shape), nothing, nothing), nothing)
    texture = _texture(plates, usable)
    hills = _dark_foreground(cells, texture.dense)
    if hills.any():
        texture = _texture(plates, usable & ~hills)
    width = _rough_window(cells) + 1
    near_hills = usable & scipy.ndimage.binary_dilation(hills, iterations=width)
    beside = usable & ~near_hills
    plain = beside & ~texture.rough & ~texture.dense
    glows = _steep_glows(cells, beside)
    while glows:
        surfaces = _Surfaces(cells, shape, glows)
        cores = [beside & (_distance_from(glow, cells.centers) < GLOW_HALF) for glow in glows]
        found = surfaces.fit(plain | np.any(cores, 0), np.zeros_like(usable), WITH_BOWL)
        rest = np.abs(surfaces.rest(found)).mean(-1)  # (h, w)
        glow = np.abs(surfaces.glow(found)).mean(-1)
        smooth = [place for place, core in zip(glows, cores)
                  if np.median(rest[core]) < GLOW_SMOOTH * np.median(glow[core])]
        if smooth == glows:
            texture = _texture(surfaces, usable & ~hills)
            return _Scene(cells, surfaces, texture, near_hills)
        glows = smooth
    return _Scene(cells, plates, texture, near_hills)


# --- Closed patches ---

CLOSED_SCALES = (2.5, 5.0, 10.0, 16.0)
"""Cells: scales at which patches of light are looked for. Structure is found at finer ones."""

CLOSED_SIGMA = 5.0
"""A patch curves down by so many sigma in all directions, and is as many sigma high."""

CLOSED_ROUNDNESS = 0.25
"""Along the direction in which a patch curves least, it curves by this part of what it does across.
A band of airglow curves along one direction only."""

CURVATURE_NOISE = 0.32
"""Noise of a second derivative of a Gaussian mean, times its scale cubed; that of a cell is 1.
White noise has 0.244; stars and gaps add a third."""

CLOSED_VIEW = 2.5
"""Cells: the height of a patch is measured on a Gaussian mean of this width."""

CLOSED_FOOT = 0.15
"""A patch reaches down to this part of its height."""

CLOSED_LEAST = 0.6
"""How closed a patch must be: 1 - level of its highest way out / its height."""

CLOSED_ROUNDS = 5
"""So many times patches are looked for, each time above a surface through the sky beside them."""

DETAIL_NOISE = 1.07
"""The noise of a cell over that of its detail: the mean takes 7 % of it away."""


def _closed_patches(scene: _Scene) -> np.ndarray:
    """Return smooth patches of light that are surrounded by darker picture, (h, w) bool.

    Their height is measured above a stiff surface through the rest of the sky. It is fitted again
    without the patches: the top of a glow then sinks.
    """
    surfaces = scene.surfaces
    usable = scene.cells.usable & ~scene.near_hills
    objects = scene.texture.dense & usable
    plain = scene.plain
    found = np.zeros_like(usable)
    for _ in range(CLOSED_ROUNDS):
        before = found
        if not (plain & ~found).any():
            break
        stiff = surfaces.fit(plain & ~found, found | objects, WITH_BOWL)
        found = _patches_above(surfaces, stiff, usable, plain)
    lasting = before & found
    return scipy.ndimage.binary_propagation(lasting, mask=found)  # the whole of their patches


def _patches_above(surfaces: _Surfaces, stiff: np.ndarray, usable: np.ndarray,
                   plain: np.ndarray) -> np.ndarray:
    """Return closed patches of light above a surface, (h, w) bool.

    A patch curves down in all directions, both in the picture (glow that fades from an edge does
    not) and above the surface (vignetting does not).

    Args:
        stiff: (m, c) coefficients of the surface.
        usable: (h, w) bool, without hills.
        plain: (h, w) bool, those of them without structure.
    """
    from skimage.morphology import flood
    cells = surfaces.cells
    noise = np.sqrt((cells.noise**2).mean((0, 1)))  # (c,) of the whole frame
    surface = _channels_together(surfaces.surface(stiff) / noise)  # (h, w)
    above = _channels_together(cells.values / noise) - surface
    detail = above - _smooth(above, ROUGH_SCALE, plain)
    noise = DETAIL_NOISE * _deviation(detail[plain])
    view = _smooth(above, CLOSED_VIEW, plain)
    view = np.where(usable, view, view[usable].min())
    way_out = np.maximum(_way_out(view, cells.rim), 0)
    least = CLOSED_SIGMA * noise * _noise_of_mean(CLOSED_VIEW)
    found = np.zeros_like(usable)
    for scale in CLOSED_SCALES:
        if 4 * scale > min(usable.shape):  # too few independent means
            continue
        steep = CLOSED_SIGMA * CURVATURE_NOISE * noise / scale**3
        second = _curvatures(_smooth(above, scale, plain))
        tops = usable & _curves_down(second, steep)
        tops &= _curves_down(second + _curvatures(surface), steep)
        regions, count = scipy.ndimage.label(tops)
        for region in range(1, count + 1):
            top = regions == region
            if top.sum() < max(4, scale**2):  # smaller than what was averaged over
                continue
            peak = scipy.ndimage.maximum_position(view, top)
            height = view[peak]
            level = way_out[peak]
            if height > least and 1 - level / height >= CLOSED_LEAST:
                foot = max(level, CLOSED_FOOT * height)
                above_foot = usable & (view > foot)
                found |= top | flood(above_foot, peak, connectivity=1)
    return found


def _way_out(view: np.ndarray, rim: np.ndarray) -> np.ndarray:
    """Return the lowest height on the highest way from each cell to the rim, (h, w).

    It is the height of the cell itself if the way only climbs.

    Args:
        view: (h, w) heights.
        rim: (h, w) bool.
    """
    from skimage.morphology import reconstruction
    return reconstruction(np.where(rim, view, view.min()), view)


def _curvatures(view: np.ndarray) -> np.ndarray:
    """Return second derivatives of a smooth (h, w), per cell squared.

    Returns:
        (3, h, w): along y, along both, along x.
    """
    along_y, along_x = np.gradient(view)
    twice_y, along_both = np.gradient(along_y)
    twice_x = np.gradient(along_x, axis=1)
    return np.stack([twice_y, along_both, twice_x])


def _curves_down(second: np.ndarray, least: float) -> np.ndarray:
    """Return where a surface is a round top in all directions, (h, w) bool.

    Args:
        second: (3, h, w), see `_curvatures`.
        least: by how much it must curve down.
    """
    along_y, along_both, along_x = second
    mean = (along_y + along_x) / 2
    difference = (along_y - along_x) / 2
    spread = np.hypot(difference, along_both)
    flattest = mean + spread
    steepest = mean - spread
    return (flattest < -least) & (flattest < CLOSED_ROUNDNESS * steepest)


# --- Growth ---

STAR_SIGMA = 30.0
"""A star of more than so many sigma may have a halo."""

STAR_REACH = 2.0
"""Cells: the halo of a star is looked for within so many times sigma to the power HALO_POWER."""

HALO_POWER = 0.4
"""Halos of stars fall off with the distance to the power -2.5. At that distance from the star the
noise drowns them."""

STAR_REACH_MOST = 0.1
"""Halos of stars never reach beyond this part of the longer side."""

OUTSKIRTS_REACH = 1.5
"""Outskirts reach so many times as far as the surface averages over, which cannot tell what is
wider."""

OUTSKIRTS_PARTS = (0.1, 0.35)
"""Outskirts may reach as far as the first part of the longer side, and never beyond the second."""

OUTSKIRTS_SCALES = (1.5, 4.0)
"""Cells: outskirts are looked for in Gaussian means of these widths."""

OUTSKIRTS_SIGMA = 3.0
"""Outskirts stand so many sigma of such a mean above the surface."""


def _reach(cells: _Cells, texture: _Texture, bodies: np.ndarray) -> np.ndarray:
    """Return how far from each cell the outskirts of an object may be, (h, w) cells; 0 in the sky.

    They are looked for within the radius of an object, and farther about bright stars.

    Args:
        bodies: (h, w) bool, extended objects.
    """
    radius = np.sqrt(_areas(bodies) / math.pi)
    stars, _ = scipy.ndimage.label(texture.rough, np.ones((3, 3)))
    peak = scipy.ndimage.maximum(texture.detail, stars, stars)  # (h, w): of the star of this cell
    peak = np.where(texture.rough & (peak > STAR_SIGMA), peak, 0)
    of_star = np.minimum(STAR_REACH * peak**HALO_POWER, STAR_REACH_MOST * cells.longer)
    return np.maximum(radius, of_star)


def _areas(mask: np.ndarray) -> np.ndarray:
    """Return how many cells the region of each cell of a mask (h, w) has, (h, w); 0 beside it."""
    regions, _ = scipy.ndimage.label(mask)
    return scipy.ndimage.sum_labels(mask, regions, regions)


def _within(reach: np.ndarray, most: float) -> np.ndarray:
    """Return the cells that are within the reach of some cell, (h, w) bool.

    Args:
        reach: (h, w) of each cell, in cells.
        most: no reach counts beyond this.
    """
    around = reach > 0
    for radius in range(1, int(min(reach.max(), most)) + 1):
        distance = scipy.ndimage.distance_transform_edt(reach < radius)
        around |= distance <= radius
    return around


def _outskirts(excess: np.ndarray, seeds: np.ndarray, near: np.ndarray,
               usable: np.ndarray) -> np.ndarray:
    """Return cells about objects that may show their outskirts, (h, w) bool.

    They stand above the surface, without a gap beside the objects.

    Args:
        excess: (h, w) picture less surface, in units of its scatter in the sky.
        seeds: (h, w) bool, objects.
        near: (h, w) bool, within their reach.
        usable: (h, w) bool.
    """
    outskirts = np.zeros_like(seeds)
    if not seeds.any():
        return outskirts
    for scale in OUTSKIRTS_SCALES:
        view = _smooth(excess, scale, usable & ~seeds)
        sigma = _noise_of_mean(scale)
        above = near & ~seeds & (view > OUTSKIRTS_SIGMA * sigma)
        beside = above & scipy.ndimage.binary_dilation(seeds)
        outskirts |= scipy.ndimage.binary_propagation(beside, mask=above)
    return outskirts


# --- Choice ---

GOOD_ENOUGH = 0.016
"""The stiffest surface whose loss is this close to the best one wins. The number is about the
scatter of the loss."""

GOOD_ENOUGH_CLOSED = 0.03
"""The same, where closed patches of light are taken for objects. It is larger, because a simple sky
is part of that explanation."""

PLANE_MARGIN = 0.006
"""A plane wins only if its loss is this close to that of a plane with a bowl."""

SIMPLE_SKY = 10.0
"""Patches are objects if the smoothing of the sky beside them is at least this."""

CLOSED_FLEXIBLE = 1.0
"""Patches may leave a sky that only has this smoothing..."""

CLOSED_GAIN = 0.004
"""... if its loss is smaller by this than that of the sky that includes the patches."""

FEWEST_SKY = 30
"""If fewer cells than this are sky, all cells that are used are taken for sky."""

GROWTH_ROUNDS = 3
"""So many times outskirts are looked for, each time above a surface through the rest of the sky."""

GROWTH_LEFT = 0.5
"""Outskirts no longer grow if less than this part of the sky is left beside them."""

DARK_SIGMA = 3.0
"""A dark body lies so many sigma below that surface."""


class _Objects(NamedTuple):
    """What is no sky, before a surface tells what its outskirts are; (h, w) each."""

    light: np.ndarray  # bool: adds light, so that the sky is below the picture there
    dark: np.ndarray  # bool: takes light away
    reach: np.ndarray  # how far the outskirts of an object here may be, in cells
    sky: np.ndarray  # bool: what may be sky, outskirts included


class _Candidate(NamedTuple):
    """A surface that the sky may have, and how well it explains the cells."""

    smoothing: float
    found: np.ndarray  # (m, c) coefficients
    sky: np.ndarray  # (h, w) bool: what it calls sky
    bounds: np.ndarray  # (h, w) bool: light that only bounds it from above
    loss: float  # mean log(1 + residual in units of the noise) over the sky


class _Explanation(NamedTuple):
    """What may be objects, and the surfaces that the rest may be."""

    surfaces: _Surfaces
    objects: _Objects
    candidates: list  # of _Candidate, the stiffest first
    best: _Candidate  # the one that was chosen
    bulging: bool = False  # only one with a closed top or bottom explains the picture well


def _look_for_sky(scene: _Scene, used: np.ndarray, smoothings: Sequence[float]) -> _Explanation:
    """Explain the picture, with closed patches of light as objects if they earn it, else without.

    Patches are objects if the rest is then a simple sky. They may leave a more flexible sky, but it
    must explain the rest better than the sky that includes them does.

    Args:
        scene: the picture.
        used: (h, w) bool, the cells that take part.
        smoothings: to choose from, the stiffest first.
    """
    patches = _closed_patches(scene)
    without = functools.partial(_explain, scene, np.zeros_like(used), used, smoothings, GOOD_ENOUGH)
    if not patches.any():
        return without()
    with_patches = _explain(scene, patches, used, smoothings, GOOD_ENOUGH_CLOSED)
    smoothing, loss = with_patches.best.smoothing, with_patches.best.loss
    if smoothing >= SIMPLE_SKY:
        return with_patches
    whole_sky = without()
    better = smoothing >= CLOSED_FLEXIBLE and loss < whole_sky.best.loss - CLOSED_GAIN
    return with_patches if better else whole_sky


def _explain(scene: _Scene, patches: np.ndarray, used: np.ndarray, smoothings: Sequence[float],
             margin: float) -> _Explanation:
    """Explain the picture with these patches, (h, w) bool, as objects; see `_look_for_sky`."""
    cells = scene.cells
    no_hills = ~scene.near_hills
    objects = scipy.ndimage.binary_dilation(scene.texture.rough | patches)
    objects &= cells.usable & no_hills
    bodies = patches | scipy.ndimage.binary_opening(scene.texture.dense & no_hills)
    sky = used & ~objects & no_hills
    if sky.sum() < FEWEST_SKY:
        sky = used
    surfaces = scene.surfaces.dearer(~sky)
    dark = objects & _dark_bodies(surfaces, bodies, sky & ~bodies)
    reach = _reach(cells, scene.texture, bodies)
    found = _Objects(objects & ~dark, dark, reach, sky)
    candidates = [_try_smoothing(surfaces, found, smoothing) for smoothing in smoothings]
    best = _choose(candidates, margin)
    if _closed_top(surfaces, best) <= BULGE:
        return _Explanation(surfaces, found, candidates, best)
    stiffer = [other for other in candidates if other.smoothing > best.smoothing
               and _closed_top(surfaces, other) <= BULGE]
    if not stiffer:
        return _Explanation(surfaces, found, candidates, best, bulging=True)
    bulging = stiffer[-1].loss > best.loss + ALIKE
    return _Explanation(surfaces, found, candidates, stiffer[-1], bulging)


def _dark_bodies(surfaces: _Surfaces, bodies: np.ndarray, sky: np.ndarray) -> np.ndarray:
    """Return the bodies that take light away instead of adding it, with a margin, (h, w) bool.

    Dust absorbs the light behind it, so it is darker than the sky around it.

    Args:
        bodies: (h, w) bool, extended objects.
        sky: (h, w) bool.
    """
    if sky.sum() < FEWEST_SKY:
        return np.zeros_like(bodies)
    found = surfaces.fit(sky, np.zeros_like(sky), WITH_BOWL)
    excess = _channels_together(surfaces.excess(found))
    spread = max(1.0, _deviation(excess[sky]))
    regions, count = scipy.ndimage.label(bodies)
    level = scipy.ndimage.median(excess, regions, range(count + 1))
    dark = level < -DARK_SIGMA * spread
    dark[0] = False  # the sky
    return scipy.ndimage.binary_dilation(dark[regions])


def _try_smoothing(surfaces: _Surfaces, objects: _Objects, smoothing: float) -> _Candidate:
    """Return the surface of one smoothing through the sky beside the outskirts of objects.

    They grow, above a surface through the rest of the sky, until they no longer change.
    """
    light, dark, reach, open_sky = objects
    usable = surfaces.cells.usable
    part = np.clip(OUTSKIRTS_REACH * _averaging_length(smoothing), *OUTSKIRTS_PARTS)
    most = part * surfaces.cells.longer  # cells
    near = usable & _within(np.minimum(reach, most), most)
    sky = open_sky
    bounds = light
    found = surfaces.fit(sky, bounds, smoothing)
    for _ in range(GROWTH_ROUNDS):
        excess = _channels_together(surfaces.excess(found))  # (h, w)
        excess /= max(1.0, _deviation(excess[sky]))
        outskirts = _outskirts(excess, light, near & ~dark, usable)
        shadows = _outskirts(-excess, dark, near & ~light, usable)
        now = open_sky & ~outskirts & ~shadows
        if now.sum() < GROWTH_LEFT * open_sky.sum() or (now == sky).all():
            break
        sky = now
        bounds = light | outskirts
        found = surfaces.fit(sky, bounds, smoothing, found)
    in_sigma = surfaces.rest(found) / surfaces.cells.noise
    loss = _loss_of(in_sigma[sky])
    return _Candidate(smoothing, found, sky, bounds, loss)


def _loss_of(excess: np.ndarray) -> float:
    """Return the mean log(1 + rms of the channels) of residuals (n, c) in units of the noise."""
    distance = np.sqrt((excess**2).mean(-1))  # (n,)
    return np.log1p(distance).mean()


def _averaging_length(smoothing: float) -> float:
    """Return the length over which a surface averages, in units of the longer side.

    The energy of a bump of that size, as it is counted here (over 8 pi), is 1 / (8 pi size^2) times
    its squared height. It equals the squared height, summed over the bump, as part of a frame of
    3 to 2.
    """
    frame = 2 / 3
    return (smoothing * STIFFNESS_UNIT / (8 * math.pi) * frame)**0.25


def _choose(candidates: list[_Candidate], margin: float) -> _Candidate:
    """Return the stiffest candidate whose loss is within `margin` of the best."""
    losses = np.array([candidate.loss for candidate in candidates])
    good = np.flatnonzero(losses <= losses.min() + margin)  # (at least 1,)
    if len(good) > 1 and good[0] == 0 and losses[0] > losses[1] + PLANE_MARGIN:
        good = good[1:]
    return candidates[good[0]]


# --- Doubt ---

PURE_NOISE = {1: 0.535, 3: 0.632}
"""The loss of a surface that leaves nothing but Gaussian noise, by the number of channels."""

UNEXPLAINED = 1.28
"""The sky cannot be known if the loss is more than this many times that of pure noise."""

LITTLE_SKY = 0.15
"""The sky cannot be known if less than this part of the picture shows it."""

MOST_DOUBT = 0.05
"""The sky cannot be known if it is uncertain by more than this part of its range."""

ALIKE = 0.05
"""Surfaces explain the sky alike if their losses differ by no more than this."""

ALIKE_DOUBT = 0.5
"""The sky is uncertain by this part of the difference between surfaces that explain it alike."""

POSTERIOR_DOUBT = 9.0
"""The sky is uncertain by so many times the deviation of its posterior, in which residuals are
independent. They are not: what is left of objects is smooth as well. Measured on the truth bench,
`tests/truth.py`."""

BULGE = 0.1
"""The sky has no closed top or bottom inside the frame that is higher or deeper than this part of
its range. If the surface that explains the picture best has one, a stiffer one is taken, and the
sky cannot be known unless that explains the picture alike."""

SMALL_TOP = 0.2
"""A top counts only if less than this part of the frame is in the upper half of it. That of
vignetting is larger."""

DOUBT_MARGIN = 0.15
"""Where the sky cannot be known, the stiffest surface wins whose loss is this close to that of the
chosen one. On 46 such scenes 11 got truer by it, and 6 less true; and it eats less of objects."""

SEAM_SIGMA = 10.0
"""Panels of a mosaic differ by so many sigma of the median along a seam."""

SEAM_HEIGHT = 0.05
"""Panels differ by this part of the picture's range (1st to 99th percentile)."""

SEAM_ALIKE = 0.92
"""Panels differ in the same direction along this part of a seam."""

SEAM_TURNS = 120
"""Directions in which seams are looked for."""

MEDIAN_NOISE = 1.25
"""The noise of a median of many values over that of their mean."""

SEAM_LENGTH = 0.4
"""A seam is at least this part of the longer side long."""


def _judge(explanation: _Explanation, doubt: float) -> str:
    """Return why the sky cannot be known, in words; empty if it can.

    Args:
        explanation: what was found.
        doubt: by which part of its range the sky is uncertain.
    """
    cells = explanation.surfaces.cells
    best = explanation.best
    if _has_seam(cells):
        return "it steps along a straight line, as between the panels of a mosaic"
    if not _is_explained(explanation):
        return "no smooth surface explains what looks like sky"
    share = best.sky.sum() / cells.usable.sum()
    if share < LITTLE_SKY:
        return f"only {100 * share:.0f} % of the picture shows sky"
    if explanation.bulging:
        return "the sky would have a closed patch of light or dark inside the frame"
    if doubt > MOST_DOUBT:
        return f"it is uncertain by about {100 * doubt:.0f} % of its range"
    return ""


def _is_explained(explanation: _Explanation) -> bool:
    """Tell whether the surface leaves little but noise, and what is open about a glow's form."""
    surfaces, best = explanation.surfaces, explanation.best
    loss = _loss_of(surfaces.excess(best.found)[best.sky])
    return loss <= UNEXPLAINED * _pure_noise(surfaces.cells)


def _in_doubt(explanation: _Explanation) -> _Explanation:
    """Return the same explanation with a stiffer surface, which does less harm if it is wrong."""
    most = explanation.best.loss + DOUBT_MARGIN
    stiffest = next(candidate for candidate in explanation.candidates
                    if candidate is explanation.best
                    or (candidate.smoothing <= WITH_BOWL and candidate.loss <= most))
    return explanation._replace(best=stiffest)


def _pure_noise(cells: _Cells) -> float:
    return PURE_NOISE[cells.values.shape[-1]]


def _doubt(explanation: _Explanation) -> float:
    """Return by which part of its range the sky is uncertain, rms over the frame.

    That is the deviation of the fit itself, and how far surfaces that explain the sky about as well
    lie from it, which have nothing to do with each other.
    """
    surfaces = explanation.surfaces
    best = explanation.best
    cells = surfaces.cells
    chosen = surfaces.surface(best.found)[cells.usable]  # (cells, c)
    invisible = PIXEL_NOISE * np.median(cells.noise, axis=(0, 1))
    span = np.maximum(_span(chosen, (99, 1)), invisible)  # (c,)
    deviation = surfaces.deviation(best.found, best.sky, best.smoothing)[cells.usable]
    of_fit = POSTERIOR_DOUBT * np.sqrt(np.mean((deviation / span)**2))
    differences = [0.0]
    for candidate in explanation.candidates:
        if candidate.loss <= best.loss + ALIKE:
            error = surfaces.surface(candidate.found)[cells.usable] - chosen
            error -= np.median(error, axis=0)
            differences.append(ALIKE_DOUBT * np.sqrt(np.mean((error / span)**2)))
    return float(np.hypot(of_fit, max(differences)))


def _closed_top(surfaces: _Surfaces, candidate: _Candidate) -> float:
    """Return the height of the highest closed top of a surface, or the depth of its deepest bottom.

    It is a part of the surface's range.
    """
    cells = surfaces.cells
    border = np.full(cells.usable.shape, True)
    border[1:-1, 1:-1] = False
    highest = 0.0
    views = np.moveaxis(surfaces.surface(candidate.found), -1, 0)  # (c, h, w)
    for view in (*views, *-views):
        above = view - _way_out(view, border)  # (h, w)
        core = above > 0.5 * above.max()
        if core.mean() < SMALL_TOP:
            span = max(_span(view[cells.usable], (99, 1)), 1e-12)
            highest = max(highest, above.max() / span)
    return highest


def _has_seam(cells: _Cells) -> bool:
    """Tell whether the picture steps up or down along a straight line through the frame.

    Panels of a mosaic that do not match do so, and exposures that were shifted or turned. The
    picture is turned, and each column of it compared with those beside it.
    """
    light = _channels_together(cells.values / cells.noise)
    light = np.where(cells.usable, light, np.nan)
    least = SEAM_HEIGHT * _span(light[cells.usable], (99, 1))
    shortest = SEAM_LENGTH * cells.longer
    for turn in range(SEAM_TURNS):
        angle = 180 * turn / SEAM_TURNS
        turned = scipy.ndimage.rotate(light, angle, order=1, cval=np.nan)
        rise = turned[:, 2:] - turned[:, :-2]  # over two cells: the seam may lie within one
        slope = (rise[:, :-4] + rise[:, 4:]) / 2  # beside it
        step = rise[:, 2:-2] - slope
        count = np.isfinite(step).sum(0)  # (columns,)
        step, count = step[:, count >= shortest], count[count >= shortest]
        typical = np.nanmedian(step, axis=0) if count.size else np.zeros(0)
        height = np.abs(typical)
        alike = (np.sign(step) == np.sign(typical)).sum(0) > SEAM_ALIKE * count
        sigma = MEDIAN_NOISE * _deviation(step - typical, 0) / np.sqrt(count)
        if (alike & (height > least) & (height > SEAM_SIGMA * sigma)).any():
            return True
    return False


# --- Result ---

PLAIN_STIFFER = 2.5
"""A plain run leaves no object out, so its surface must be stiffer than the sky's: by so many
powers of ten for the part of the picture that is not sky. It was measured on the truth bench,
`tests/truth.py`."""

PLAIN_MOST = 1.5
"""The surface of a plain run is stiffer by at most so many powers of ten."""

SMALL_SMOOTHING = 1e6
"""In a picture that is too small the sky is a plane, and no noise bends it."""

DENSEST = 30.0
"""Per area, there are at most so many times as many control points where the sky bends most."""


@dataclass(frozen=True)
class Sky:
    """What was found out about the sky of a picture, on cells of the reduced frame.

    In the shapes, (h, w) are cells, and c is the number of channels.
    """

    surface: Callable[[np.ndarray], np.ndarray]  # frame coordinates (..., 2) -> linear sky (..., c)
    shows_sky: np.ndarray  # (h, w) bool: sky and nothing else
    below: np.ndarray  # (h, w) bool: objects that add light: the sky is not above the picture
    image: np.ndarray  # (h, w, c) linear cells; 0 where missing
    noise: np.ndarray  # (h, w, c) standard deviation of `image`
    centers: np.ndarray  # (h, w, 2) frame coordinates
    size: int  # reduced pixels along a cell's side
    unit: np.ndarray  # (c,) linear, that of the bending and of `spread`
    spread: float  # deviation of the cells of sky from the surface
    cost: np.ndarray  # (h, w) of bending, 1 where sky is seen
    density: np.ndarray  # (h, w) of control points along a line, relative to the least
    share: float  # of the usable cells, that show sky, in [0, 1]
    found_smoothing: float  # of `surface`
    smoothing: float  # of the surface that the fit shall find
    doubt: float  # by which part of its range the sky is uncertain, rms; NaN if it is too small
    unsure: str  # why the sky cannot be known, in words; empty if it can
    by_hand: bool  # the smoothing was given
    why: str  # this smoothing, in words
    shared: Shared | None = None  # what it has in common with a reference, if one was given

    def at(self, cells: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return what cells (h, w) hold at places in the frame, (..., 2): (...)."""
        return _cells_at(places, cells, self.centers)


def find_sky(prepared: Prepared, settings: Settings) -> Sky:
    """Find what is sky, its surface, how stiff it is, and how sure that is.

    Args:
        prepared: `linear` and `weight` count: what is masked by thresholds or mask file is not
            looked at.
        settings: `smoothing` if given by hand, and `auto`: without it the smoothing is that of a
            surface that objects shall not bend.
    """
    cells = _make_cells(prepared)
    scene = _look(cells, prepared.full_shape)
    smoothings = _smoothings(scene, settings)
    explanation = _look_for_sky(scene, cells.usable, smoothings)
    shared = None
    if prepared.reference is not None and not cells.too_small:
        explanation, shared = look_with_reference(
            scene, explanation, prepared.reference, smoothings)
    doubt, unsure = _certainty(explanation, shared)
    if unsure:
        explanation = _in_doubt(explanation)
    surfaces, objects, best = explanation.surfaces, explanation.objects, explanation.best
    total = cells.usable.sum()
    cells = surfaces.cells  # with a reference, without the light of objects

    smoothing = best.smoothing
    why = "given by hand"
    if settings.smoothing is None:
        why = f"loss {best.loss:.3f}, pure noise has {_pure_noise(cells):g}"
        if not settings.auto:
            objects_share = 1 - objects.sky.sum() / total
            smoothing *= 10**min(PLAIN_MOST, PLAIN_STIFFER * objects_share)
    light = surfaces.surface(best.found)
    bending = _bending(light, cells.longer)
    cost = bending_cost(~objects.sky, cells.centers, cells.centers)
    if surfaces.glows:  # they bend as they like
        cost = cost / (1 + bending**2)
    smooth_bending = scipy.ndimage.gaussian_filter(bending, 2)
    typical = max(smooth_bending.mean(), 1e-9)
    residual = (cells.values - light)[best.sky]
    image = cells.values * cells.scale + cells.pedestal
    return Sky(
        surface=functools.partial(surfaces.linear, best.found),
        shows_sky=best.sky,
        below=best.bounds,
        image=np.where(cells.usable[..., None], image, 0),
        noise=cells.noise * cells.scale,
        centers=cells.centers,
        size=cells.size,
        unit=cells.scale,
        spread=max(float(_deviation(residual)), 1e-9),
        cost=cost,
        density=np.sqrt(1 + np.minimum(smooth_bending / typical, DENSEST)),
        share=best.sky.sum() / total,
        found_smoothing=best.smoothing,
        smoothing=smoothing,
        doubt=doubt,
        unsure=unsure,
        by_hand=settings.smoothing is not None,
        why=why,
        shared=shared,
    )


def _smoothings(scene: _Scene, settings: Settings) -> list[float]:
    """Return the smoothings to choose from, the stiffest first: one if it was given by hand."""
    smoothings = scene.surfaces.candidates(scene.plain)
    if settings.smoothing is not None:
        smoothings = [settings.smoothing]
    if scene.cells.too_small:
        return [max(smoothings[0], SMALL_SMOOTHING)]
    return smoothings


def _certainty(explanation: _Explanation, shared: Shared | None) -> tuple[float, str]:
    """Return by which part of its range the sky is uncertain, and why it cannot be known, if so."""
    if explanation.surfaces.cells.too_small:
        return math.nan, "it is too small"
    doubt = _doubt(explanation)
    if shared is not None:
        doubt = max(doubt, shared.doubt)
    return doubt, _judge(explanation, doubt)


def _bending(surface: np.ndarray, longer: int) -> np.ndarray:
    """Return how much a surface (h, w, c) bends, (h, w): its second derivatives, rms of channels.

    The unit of length is the longer side, which has so many cells.
    """
    if min(surface.shape[:2]) < 2:
        return np.zeros(surface.shape[:2])
    squares = [(_curvatures(channel)**2).sum(0) for channel in np.moveaxis(surface, -1, 0)]
    return np.sqrt(np.mean(squares, 0)) * longer**2


# --------------------------------------------------------------------------------------------------
# Reference: another picture of the region, which tells objects from sky
#
# It may have another scale, rotation, exposure, and other colors, but its own sky is flat, or at
# least gentler. Its light, with a gain for each pair of channels, and the surface of a sky are
# fitted to the picture together:
#
#   picture[c] = sky[c] + sum over k of gains[k, c] * reference[k],  gains >= 0
#
# Structure finer than the sky decides the gains, so the smooth part of the objects is known, too.
# Stars are left out: their light is spread differently in the two.
#
# What stays unknown is the reference's own sky. It is a plane with a bowl at most, and looks like a
# part of the picture's. The sky that was found without the reference knows about that part: where
# that is sure, it is believed, and the reference where it is not.
#
# In the shapes below, (h, w) are cells, c is the number of the picture's channels, and k that of
# the reference's.
# --------------------------------------------------------------------------------------------------

REFERENCE_NODES = 64
"""Along the longer side, so many places are looked up in plate solutions."""

LEAST_COVERED = 1 / 3
"""A reference that covers less of the picture is not used: the sky beside it would be a guess."""

LEAST_EXPLAINED = 0.5
"""A reference that explains less of the picture's structure beside the sky is not used."""

STRUCTURE = 0.1
"""Nothing can be explained if the variance of the structure is less than this part of that of the
noise."""

MATCH_ROUNDS = 6
"""Rounds of fitting, with the weights that the last fit suggests."""

MATCH_ENOUGH = 0.075
"""The stiffest sky whose loss is this close to the best one wins. A flexible sky takes what the two
pictures share, and a little of what they do not."""

MATCH_TILE = 8
"""Cells along a side of the tiles whose residuals are independent of each other."""

SKY_CONFIRMED = 0.01
"""A sky that was found without the reference stays if it is sure, and if it differs from the one
with it by a plane and a bowl, and beside them by no more than this part of its range, rms, or than
it is uncertain."""

REFERENCE_DOUBT = 0.05
"""The reference's own sky makes that of the picture uncertain by this part of its range, rms. A
slope over a fifth of it does."""

SHIFT_VIEW = 3.0
"""Cells: what differs from a Gaussian mean of this width tells whether both lie in the same place.
"""

SHIFT_CLEAR = 1.15
"""A reference is shifted if it correlates so many times as well with the picture elsewhere..."""

SHIFT_SEEN = 0.2
"""... and if that correlation is at least this. Chance gives up to 0.2, a right place 0.25 to 0.8.
"""

STAR_DETAIL = 5.0
"""A star of the reference stands so many sigma above its surroundings."""

STAR_WINDOW = 5
"""Cells along a side of the window in which such cells are counted..."""

STAR_SPARSE = 0.6
"""... and if they are more than this part of it, they are an object."""

STAR_WINGS = 2
"""Cells about such a star that are left out as well."""

PROJECTIONS = {
    "Gnomonic": "TAN", "Stereographic": "STG", "PlateCarree": "CAR", "Mercator": "MER",
    "HammerAitoff": "AIT", "ZenithalEqualArea": "ZEA", "Orthographic": "SIN"}
"""Projections in PixInsight's words and in those of FITS."""

SOLUTION = "PCL:AstrometricSolution:"
"""How the properties of a plate solution begin in XISF."""


@dataclass(frozen=True)
class Reference:
    """Another picture of the region, as it lies on the reduced frame of the picture."""

    name: str
    checksum: str  # SHA-256 of its file
    light: np.ndarray  # (rows, columns, k) means over the blocks, NaN where it shows nothing


@dataclass(frozen=True)
class Shared:
    """What a picture and its reference share, and whether the sky was found by it."""

    verdict: str  # in words that go on from the reference's name
    used: bool = False
    gains: np.ndarray | None = None  # (k, c) linear light for one unit of the reference's
    gain_errors: np.ndarray | None = None  # (k, c) their standard deviations
    confirms: bool = False  # that what was found without it is sky
    doubt: float = 0.0  # by which part of its range the sky stays uncertain, for all the reference


class _Match(NamedTuple):
    """A sky, and the reference's light, that explain the picture together."""

    smoothing: float
    found: np.ndarray  # (m, c) coefficients of the sky
    step: np.ndarray  # (c,) by which the reference's level differs from its sky
    gains: np.ndarray  # (k, c) in the units of the cells
    errors: np.ndarray  # (k, c) standard deviations of the gains
    loss: float  # as that of a candidate
    explained: float  # share of the structure beside such a sky, and beyond noise


class OpenedReference(NamedTuple):
    """A reference as it was read, whatever picture it is for."""

    planes: np.ndarray  # (k, rows, columns)
    solution: Any  # astropy's WCS, or None
    checksum: str  # SHA-256 of its file


def open_reference(path: str) -> OpenedReference:
    """Read a reference; raises BgError if it cannot be read."""
    other = read_picture(path)
    solution = plate_solution(other.source, other.planes.shape[1])
    checksum = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return OpenedReference(other.planes, solution, checksum)


def read_reference(path: str, picture: Picture, factor: int,
                   opened: Callable[[str], OpenedReference] = open_reference) -> Reference:
    """Read a reference, and lay it on a picture.

    Where it lies is told by plate solutions, if both have one. Otherwise a reference of the same
    size lies pixel on pixel, and for others `astroalign` compares the stars.

    Args:
        path: of the reference.
        picture: as it was read.
        factor: side of a block of the picture's pixels.
        opened: as `open_reference`.

    Raises:
        BgError: it cannot be read, or nothing tells where it lies.
    """
    other = opened(path)
    planes = other.planes
    height, width = picture.planes.shape[1:]
    ours = plate_solution(picture.source, height)
    if ours is not None and other.solution is not None:
        there = functools.partial(_by_solutions, ours, other.solution, height, planes.shape[1])
    elif planes.shape[1:] == (height, width):
        there = np.array  # pixel on pixel
    else:
        there = _by_stars(picture.planes, planes, path)
    light = lay_on_blocks(planes, there, (height, width), factor)
    return Reference(os.path.basename(path), other.checksum, light)


def plate_solution(source: Any, height: int):
    """Return the plate solution of a file as astropy's WCS, None without one.

    Args:
        source: what `read_picture` gave.
        height: rows of the picture. In the solution, row 0 is the lowest.
    """
    from astropy.io import fits
    from astropy.wcs import WCS
    with warnings.catch_warnings(), suppress(Exception):  # damaged ones are none
        warnings.simplefilter("ignore")
        keywords, _ = _shared_metadata(source, height)
        solution = WCS(fits.Header.fromstring("".join(_cards(keywords))), naxis=2)
        if solution.has_celestial:
            return solution
        if isinstance(source, Source):
            return WCS(_solution_of_xisf(source, height))
    return None


def _solution_of_xisf(source: Source, height: int) -> dict:
    """Return PixInsight's properties of a plate solution as FITS keywords.

    There, rows are counted from the top, and the corner of the first pixel is 0, 0.
    """
    properties = {part.get("id"): part for part in source.root.iter("Property")}

    def numbers(name):
        part = properties[SOLUTION + name]
        stored = source.blocks.get(part.get("location"))
        if stored is None:
            stored = base64.b64decode(part.text)
        order = ">f8" if part.get("byteOrder") == "big" else "<f8"
        return np.frombuffer(stored, order)

    x, y = numbers("ReferenceImageCoordinates")
    x_by_column, x_by_row, y_by_column, y_by_row = numbers("LinearTransformationMatrix")
    longitude, latitude = numbers("ReferenceCelestialCoordinates")
    projection = properties[SOLUTION + "ProjectionSystem"]
    code = PROJECTIONS[projection.text or projection.get("value")]
    return {
        "CTYPE1": "RA---" + code,
        "CTYPE2": "DEC--" + code,
        "CRVAL1": longitude,
        "CRVAL2": latitude,
        "CRPIX1": x + 0.5,
        "CRPIX2": height - y + 0.5,
        "CD1_1": x_by_column,
        "CD1_2": -x_by_row,
        "CD2_1": y_by_column,
        "CD2_2": -y_by_row,
    }


def _by_solutions(ours, theirs, height: int, their_height: int, places: np.ndarray) -> np.ndarray:
    """Return where places of the picture lie in the reference, by their plate solutions.

    Args:
        places: (2, n) rows and columns; the center of the first pixel is 0, 0.

    Returns:
        (2, n), NaN where the reference's solution does not reach.

    Raises:
        BgError: nothing tells how the coordinates of one become those of the other.
    """
    from astropy.wcs.utils import pixel_to_pixel
    row, column = places
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where it does not converge, it is far outside
        try:
            x, y = pixel_to_pixel(ours, theirs, column, height - 1 - row)
        except ValueError as error:
            raise BgError("the plate solutions of the picture and of its reference cannot be "
                          f"compared ({error}); solve both anew") from None
    return np.stack([their_height - 1 - y, x])


def _by_stars(planes: np.ndarray, others: np.ndarray, path: str) -> Callable:
    """Return a function as `_by_solutions` that compares stars."""
    try:
        import astroalign
    except ImportError:
        raise BgError(f"nothing tells where {path} lies: it has another size, and not both have a "
                      "plate solution; solve both, or let their stars be compared after: "
                      "python -m pip install astroalign") from None
    images = [np.nan_to_num(image.mean(0)).astype(float) for image in (planes, others)]
    try:
        turned, _ = astroalign.find_transform(*images)
    except Exception as error:  # it raises several kinds
        raise BgError(f"no stars in {path} match those of the picture ({error}); solve both, or "
                      "leave --reference out. Mirrored pictures do not match") from None
    return lambda places: turned(places[::-1].T).T[::-1]


def lay_on_blocks(planes: np.ndarray, there: Callable, shape: tuple[int, int],
                  factor: int) -> np.ndarray:
    """Return the means of a reference over the blocks of a picture.

    Args:
        planes: (k, rows, columns) of the reference.
        there: (2, n) rows and columns in the picture -> the same in the reference.
        shape: (height, width) of the picture.
        factor: side of a block.

    Returns:
        (ceil(height / factor), ceil(width / factor), k), NaN where it shows nothing.
    """
    spacing = max(factor, max(shape) / REFERENCE_NODES)
    nodes = [np.linspace(0, max(side - 1, 1), max(2, math.ceil(side / spacing))) for side in shape]
    known = _grid(*nodes)  # (rows, columns, 2) of nodes
    looked_up = there(known.reshape(-1, 2).T).T.reshape(known.shape)
    place_of = scipy.interpolate.RegularGridInterpolator(
        nodes, looked_up, bounds_error=False, fill_value=None)
    centers = [np.arange(0, side, factor) + (factor - 1) / 2 for side in shape]
    places = np.moveaxis(place_of(_grid(*centers)), -1, 0)  # (2, h, w)

    # Means over areas as large as a block is there
    apart = np.hypot(*np.diff(places, axis=2))
    apart = apart[np.isfinite(apart)]
    side = max(1, round(np.median(apart))) if apart.size else 1
    places = (places + 0.5) / side - 0.5
    light = []
    for plane in planes:
        means = reduce_plane(plane, side, "mean")
        last = np.array(means.shape)[:, None, None] - 0.5
        inside = ((places >= -0.5) & (places <= last)).all(0)  # not so where NaN
        sampled = scipy.ndimage.map_coordinates(means, places, order=1, mode="nearest")
        light.append(np.where(inside, sampled, np.nan))
    return np.stack(light, -1)


def look_with_reference(scene: _Scene, before: _Explanation, reference: Reference,
                        smoothings: Sequence[float]) -> tuple[_Explanation, Shared]:
    """Explain the picture as sky and light of the reference, if that fits.

    Args:
        scene: the picture.
        before: how it was explained without the reference.
        reference: of the same frame.
        smoothings: to choose from, the stiffest first.

    Returns:
        The explanation, which is the one before if the reference is not used.
    """
    cells = scene.cells
    light, unit = _cells_of_light(reference.light, cells)  # (h, w, k), (k,)
    covered = cells.usable & np.isfinite(light).all(-1)
    share = covered.sum() / cells.usable.sum()
    if share < LEAST_COVERED:
        return before, Shared(f"covers only {share:.0%} of the picture")
    light = np.where(covered[..., None], light, 0)
    grain = _cell_noise(light, covered)  # (h, w, k)
    shift = _shift(cells.values / cells.noise, light / grain, covered)
    if shift:
        return before, Shared(f"lies {shift * cells.size:.0f} reduced pixels beside the picture")
    lone = scene.texture.rough & ~scene.texture.dense
    seen = covered & ~_stars(light / grain, covered) & ~scipy.ndimage.binary_dilation(lone)
    if seen.sum() < FEWEST_USABLE:
        return before, Shared("shows next to nothing but stars")

    sure = _doubt(before) <= MOST_DOUBT and not before.bulging
    outside = before.best.sky & ~covered & sure
    # With the objects known, the sky needs no more flexibility than without
    smoothings = [each for each in smoothings if each >= before.best.smoothing]
    if not sure:
        before = _in_doubt(before)  # what would be taken without the reference
    matches = [_match(scene.surfaces, light, grain, seen, outside, each) for each in smoothings]
    match = _choose(matches, MATCH_ENOUGH)
    in_linear_light = cells.scale / unit[:, None]  # (k, c)
    shared = Shared(
        f"covers {share:.0%} of the picture and explains {match.explained:.0%} of its structure",
        gains=match.gains * in_linear_light,
        gain_errors=match.errors * in_linear_light)
    if match.explained < LEAST_EXPLAINED:
        return before, shared

    with_it = scene.surfaces.surface(match.found)  # (h, w, c)
    possible, unlike = _not_refuted(before, with_it)
    guessed = before.bulging or not _is_explained(before)
    doubt = 1.0 if guessed else _doubt(possible)
    if doubt <= MOST_DOUBT and unlike <= max(SKY_CONFIRMED, doubt):
        verdict = shared.verdict + ", but shows no object in the sky that was found without it"
        return possible, replace(shared, verdict=verdict, confirms=True)

    belief = 1 / (1 + (max(doubt, unlike) / REFERENCE_DOUBT)**2)  # in what was found without it
    where = seen & before.best.sky
    if where.sum() < LITTLE_SKY * seen.sum():
        where = seen
    without = before.surfaces.surface(before.best.found)
    own_sky = belief * _plane_with_bowl(without - with_it, where, cells.centers)
    objects = light @ match.gains + match.step - own_sky
    objects[~covered] = 0
    noise = np.sqrt(cells.noise**2 + grain**2 @ match.gains**2)
    surfaces = _of_values(scene.surfaces, cells.values - objects, noise, seen | outside)
    explanation = _explain_all(surfaces, match.smoothing, smoothings)
    doubt = REFERENCE_DOUBT * math.sqrt(1 - belief)
    return explanation, replace(shared, used=True, doubt=doubt)


def _explain_all(surfaces: _Surfaces, smoothing: float,
                 smoothings: Sequence[float]) -> _Explanation:
    """Explain all usable cells as sky, by the surface of one of the smoothings."""
    sky = surfaces.cells.usable
    surfaces = surfaces.dearer(~sky)
    nowhere = np.zeros_like(sky)
    no_objects = _Objects(nowhere, nowhere, np.zeros(sky.shape), sky)
    candidates = [_try_smoothing(surfaces, no_objects, each) for each in smoothings]
    chosen = candidates[smoothings.index(smoothing)]
    return _Explanation(surfaces, no_objects, candidates, chosen)


def tell_of_reference(reference: Reference, shared: Shared) -> None:
    """Log what became of a reference; that it does not fit is a warning."""
    text = f"reference {reference.name}: it {shared.verdict}"
    if shared.used:
        logger.info(text)
    elif shared.confirms:
        logger.info(f"{text}, and the sky stays")
    else:
        logger.warning(f"{text}; it is left out. Give a picture of this region through a similar "
                       "filter, with a plate solution")
    for line in gains_in_words(shared):
        logger.info(line)


def gains_in_words(shared: Shared) -> list[str]:
    """Return a line for each channel of the picture that tells its gains, if they are known."""
    if shared.gains is None:
        return []
    count = shared.gains.shape[1]
    lines = []
    for channel in range(count):
        pairs = zip(shared.gains[:, channel], shared.gain_errors[:, channel])
        gains = ", ".join(f"{gain:.3g} +/- {error:.1g}" for gain, error in pairs)
        lines.append(f"gains of the reference in {_channel_name(channel, count)} = {gains}")
    return lines


def _cells_of_light(light: np.ndarray, cells: _Cells) -> tuple[np.ndarray, np.ndarray]:
    """Return a reference on the cells (h, w, k), above its darkest part, and its unit (k,)."""
    planes = np.moveaxis(light, -1, 0)
    means = [reduce_plane(plane, cells.size, "mean") for plane in planes]
    light = np.stack(means, -1).astype(float)
    there = light[cells.usable & np.isfinite(light).all(-1)]  # (n, k)
    if not there.size:
        return light, np.ones(light.shape[-1])
    dark, bright = np.percentile(there, (1, 99), axis=0)
    unit = np.maximum(bright - dark, 1e-12)
    return (light - dark) / unit, unit


def _stars(light: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Return the cells that its stars light, (h, w) bool, of a reference (h, w, k) in sigma."""
    detail = (light - _smooth_slope(light, ROUGH_SCALE, covered)).max(-1)
    bright = covered & (detail > STAR_DETAIL)
    density = scipy.ndimage.uniform_filter(bright.astype(float), STAR_WINDOW)
    return scipy.ndimage.binary_dilation(bright & (density < STAR_SPARSE), iterations=STAR_WINGS)


def _match(surfaces: _Surfaces, light: np.ndarray, grain: np.ndarray, seen: np.ndarray,
           outside: np.ndarray, smoothing: float) -> _Match:
    """Fit a sky and the light of the reference to the picture together.

    A cell that neither explains, for something has moved or is saturated, hardly counts.

    Args:
        light, grain: (h, w, k) of the reference, and its noise.
        seen: (h, w) bool, cells in which both are compared.
        outside: (h, w) bool, cells of sky that the reference does not cover.
        smoothing: of the sky.
    """
    channels = light.shape[-1]
    used = seen | outside
    light = light[used]  # (n, k)
    grain = grain[used]
    noise = surfaces.cells.noise[used]  # (n, c)
    both = np.concatenate([light, surfaces.cells.values[used]], 1)  # (n, k + c)
    energy = scipy.linalg.block_diag(surfaces.energy(smoothing), 1e-6)  # (m + 1, m + 1)
    modes = surfaces.matrix[used.ravel(), :len(energy) - 1]
    step = seen[used] & outside.any()
    sky = np.column_stack([modes, step])  # (n, m + 1)
    trust = 1 / (noise**2).mean(1, keepdims=True)  # (n, 1)
    weight = trust
    for _ in range(MATCH_ROUNDS):
        share = weight / weight.sum()
        weighted = (sky * share).T
        parts = np.linalg.solve(weighted @ sky + energy, weighted @ both)  # (m + 1, k + c)
        rest = both - sky @ parts  # what the sky explains of neither
        of_light, of_picture = np.split(rest, [channels], 1)
        products = (light * share).T @ rest  # (k, k + c)
        gram, right = np.split(products, [channels], 1)
        # The reference's noise would make its gains too small
        of_noise = np.minimum((grain**2 * share).sum(0), np.diag(gram) / 2)
        gains = _not_negative(gram - np.diag(of_noise), right)
        residual = of_picture - of_light @ gains  # (n, c)
        distance = np.sqrt((residual**2 * trust).mean(1, keepdims=True))
        limit = HUBER_LIMIT * HUBER_DEVIATION * max(np.median(distance), 1e-9)
        pull = np.minimum(1, limit / np.maximum(distance, 1e-9))
        weight = trust * pull**2

    structure = ((of_picture**2 - noise**2) * share).sum()
    left = ((residual**2 - noise**2) * share).sum()
    explained = 0.0
    if structure > STRUCTURE * (noise**2 * share).sum():
        explained = float(np.clip(1 - left / structure, 0, 1))
    found = parts[:, channels:] - parts[:, :channels] @ gains
    errors = _gain_errors(of_light, share, residual, used)
    loss = _loss_of(residual / noise)
    return _Match(smoothing, found[:-1], found[-1], gains, errors, loss, explained)


def _not_negative(gram: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Solve gram (k, k) @ gains = right (k, c) with gains >= 0, by least squares."""
    heights, vectors = np.linalg.eigh(gram)
    heights = np.maximum(heights, 1e-6 * max(heights.max(), 1e-12))
    roots = np.sqrt(heights)[:, None]
    matrix = roots * vectors.T
    wanted = vectors.T @ right / roots
    gains = [scipy.optimize.nnls(matrix, column)[0] for column in wanted.T]
    return np.stack(gains, -1)


def _gain_errors(light: np.ndarray, share: np.ndarray, residual: np.ndarray,
                 used: np.ndarray) -> np.ndarray:
    """Return the standard deviations of gains, (k, c), if tiles of cells are independent.

    Args:
        light, share, residual: (n, k), (n, 1), and (n, c) of the cells that were compared.
        used: (h, w) bool, those cells.
    """
    row, column = np.nonzero(used)
    tile = row // MATCH_TILE * used.shape[1] + column // MATCH_TILE  # (n,)
    weighted = light * share
    pushes = weighted @ np.linalg.pinv(weighted.T @ light)  # (n, k): gains for one unit of residual
    moved = pushes[:, :, None] * residual[:, None]  # (n, k, c)
    by_tile = np.zeros((tile.max() + 1, *moved.shape[1:]))
    np.add.at(by_tile, tile, moved)
    return np.sqrt((by_tile**2).sum(0))


def _not_refuted(before: _Explanation, sky: np.ndarray) -> tuple[_Explanation, float]:
    """Drop the skies that were found without a reference and that it refutes.

    Args:
        before: what was found without it; the best stays.
        sky: (h, w, c) that was found with it.

    Returns:
        What is left, and how far the best one is from that sky, as a part of its own range. A plane
        with a bowl does not count, for that may be the reference's.
    """
    surfaces = before.surfaces
    usable = surfaces.cells.usable
    span = _span(surfaces.surface(before.best.found)[usable], (99, 1))  # (c,)

    def unlike(candidate):
        difference = surfaces.surface(candidate.found) - sky
        difference -= _plane_with_bowl(difference, usable, surfaces.cells.centers)
        return float(np.sqrt(np.mean((difference[usable] / np.maximum(span, 1e-9))**2)))

    of_best = unlike(before.best)
    most = max(of_best, SKY_CONFIRMED)
    left = [candidate for candidate in before.candidates if unlike(candidate) <= most]
    return before._replace(candidates=left), of_best


def _plane_with_bowl(values: np.ndarray, where: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Return the plane with a bowl that fits values (h, w, c) best in the cells `where`.

    Args:
        centers: (h, w, 2) frame coordinates.
    """
    y, x = np.moveaxis(centers, -1, 0)
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], -1)  # (h, w, 6)
    found, *_ = np.linalg.lstsq(terms[where], values[where], rcond=None)
    return terms @ found


def _of_values(surfaces: _Surfaces, values: np.ndarray, noise: np.ndarray,
               usable: np.ndarray) -> _Surfaces:
    """Return the same surfaces for other values (h, w, c) of the cells."""
    other = copy.copy(surfaces)
    other.cells = replace(surfaces.cells, values=values, noise=noise, usable=usable)
    other.values = values.reshape(-1, values.shape[-1]).astype(np.float32)
    return other


def _shift(ours: np.ndarray, theirs: np.ndarray, covered: np.ndarray) -> float:
    """Return by how many cells a reference lies beside the picture; 0 if it fits.

    Args:
        ours, theirs: (h, w, c) and (h, w, k), in sigma.
        covered: (h, w) bool, cells in which both are compared.
    """
    from skimage.registration import phase_cross_correlation

    def detail(values):
        rest = values - _smooth_slope(values, SHIFT_VIEW, covered)
        rest = np.clip(rest, -STAR_DETAIL, STAR_DETAIL).mean(-1)
        rest = np.where(covered, rest, 0)
        return rest / max(np.linalg.norm(rest), 1e-12)

    ours = detail(ours)  # (h, w)
    theirs = detail(theirs)
    shift, *_ = phase_cross_correlation(ours, theirs, normalization=None)
    moved = scipy.ndimage.shift(theirs, shift, order=0)
    here = (ours * theirs).sum()
    there = (ours * moved).sum()
    is_shifted = there > max(SHIFT_SEEN, SHIFT_CLEAR * here)
    return float(np.hypot(*shift)) if is_shifted else 0.0


# --------------------------------------------------------------------------------------------------
# Loss
#
# Each of m cells has four terms, [m] each. They are made of r, the weighted residual (picture less
# surface, [m, c]), or of b, the surface, [m, c]. The bending is one number for the whole surface.
# --------------------------------------------------------------------------------------------------

LOSS_FLOOR = 0.001
"""Added inside the logarithm of the loss (stretched units). Cells whose residuals are smaller than
this are fitted well enough. Without it noiseless cells would dominate the loss."""

LOSS_TERMS = ("error", "color", "overshoot", "negative", "bending")


def loss_error(r):
    """Return how far the surface is from the picture: the mean |r| of the channels."""
    import tensorflow as tf
    return tf.reduce_mean(tf.abs(r), -1)


def loss_color(r):
    """Return how far the channels disagree: the variance of r over them, 0 for a gray picture.

    It keeps the background neutral.
    """
    import tensorflow as tf
    return tf.math.reduce_variance(r, -1)


def loss_overshoot(r):
    """Return how far the surface lies above the picture.

    Subtracting more light than there is leaves dark holes.
    """
    import tensorflow as tf
    return tf.reduce_mean(tf.abs(r) - r, -1)


def loss_negative(b):
    """Return how far the surface lies below zero: there is no negative sky."""
    import tensorflow as tf
    return tf.reduce_mean(tf.abs(b) - b, -1)


def loss_bending(nodes, rows):
    """Return the bending energy of a surface on nodes [k, c], linear; see `bending_rows`."""
    import tensorflow as tf
    derivatives = tf.matmul(rows, nodes)  # [3 inner, c]
    energy = tf.reduce_sum(derivatives**2, 0)  # [c]
    return tf.reduce_mean(energy)


def log_loss(terms, alpha):
    """Return the loss of cells with these four terms, [m] each.

    It is a mean of logarithms, which forgives cells that no smooth surface can meet.
    """
    import tensorflow as tf
    error, color, overshoot, negative = terms
    penalties = overshoot + negative
    total = error + color + alpha * penalties
    return tf.reduce_mean(tf.math.log(LOSS_FLOOR + total))


# --------------------------------------------------------------------------------------------------
# Fit
# --------------------------------------------------------------------------------------------------

SAMPLE_CELLS = 2048
"""Cells in one independent sample of the sky; a fit sees `-B` samples. The surface has some hundred
degrees of freedom. Where the noise of a cell is 1 % of the gradient, 2048 cells determine 32
control points to 0.13 %."""

SAMPLE_MEAN = 0.7
"""Cells: the sample is drawn from Gaussian means of this width."""

BOUNDS_SHARE = 0.25
"""For one cell of sky in the sample there are so many that only bound the sky, if there are."""

STOP_PATIENCE = 100
"""The fit stops after so many epochs without improvement."""

STOP_DELTA = 5e-5
"""The loss must fall by this much to count as improved."""

RATE_PATIENCE = 50
"""The learning rate is halved after so many epochs without improvement."""

RATE_FLOOR = 1e-4
"""The learning rate is not halved below this."""

TRACK_EVERY = 10
"""Epochs between two recordings of the control points."""

FORGIVEN = 10.0
"""With auto, the loss forgives what is farther from the surface than so many sigma. It needs not
forgive objects then, and must not forgive a steep corner of the sky."""

FIT_NODES = 15
"""Nodes along the longer side on which the bending of the fit is measured: about as dense as 96
control points. The small waves between few points, which a spline has, are no bending of the sky.
With fewer nodes the surface would bend where none of them sees it."""

FOUND_COST = 0.005
"""The bending of the sky that was found costs at most this much of the loss. Where it cost more,
the loss would rather give a corner up than bend the surface."""

PLANE_COST = 1.0
"""The same, where a plane is asked for: a spline in the stretched frame is never quite one. A plane
that was found may have a glow in its corner."""

VALUE_RATE = 0.3
"""Stretched units by which the surface moves where a trained coordinate moves by 1. With less, a
flat start takes more than 1000 epochs. With more, the surface trembles longer about its end."""

POSITION_RATE = 0.02
"""Control points move by this part of their mean distance where a trained coordinate moves by 1.
With 0.5 the sky of a glowing corner is truer by a tenth, and a fit takes three times as long."""

CONDITION_FLOOR = 1e-4
"""Directions in which the objective curves by less than this part of the most are not trained
faster than that."""


@dataclass
class Fit:
    """A fitted surface, and how it came about."""

    positions: np.ndarray  # (n, 2) final control points, in frame coordinates
    values: np.ndarray  # (n, c) final values there, stretched units
    order: int
    smoothing: float
    history: np.ndarray  # (epochs, 6): loss, then LOSS_TERMS, four as means
    stopped: str  # why the fit ended, in words
    track: list[tuple[int, np.ndarray, np.ndarray]]  # (epoch, positions, values); the start first

    def surface(self, query: np.ndarray) -> np.ndarray:
        """Return the surface (..., c) at query (..., 2), stretched, float64."""
        return _fit_spline(query, self.positions, self.values, self.order)


def _fit_spline(query: np.ndarray, positions: np.ndarray, values: np.ndarray,
                order: int) -> np.ndarray:
    """Return the spline of the fit's layer through values (n, k), at query (..., 2): (..., k)."""
    positions = positions.astype(float)
    return spline_surface(query, positions, values, order, SPLINE_REGULARIZATION)


def start_positions(settings: Settings, sky: Sky, shape: tuple[int, int]) -> np.ndarray:
    """Return where the control points start.

    Args:
        settings: `initializer`, `points`, `seed` and `auto` count.
        sky: with auto, random points are denser where it is steeper.
        shape: (h, w) of the full-size frame.

    Returns:
        (n, 2) float32 (row, column) in frame coordinates. A grid may have a few more or fewer
        points than were asked for.
    """
    sides = np.array(shape) / max(shape)
    if settings.initializer == "grid":
        positions = _grid_positions(settings.points, sides)
    else:
        positions = _random_positions(settings, sky, sides)
    return positions.astype(np.float32)


def _random_positions(settings, sky, sides):
    """Return uniformly random points.

    With auto each point is the one of ten that is farthest from those before, so that every small
    glow has points. A distance counts more where the sky needs more points.
    """
    rng = np.random.default_rng(settings.seed)
    draws = 10 if settings.auto else 1
    points = np.full((1, 2), np.inf)  # one that is far from all, to begin with
    while len(points) <= settings.points:
        candidates = sides * rng.random((draws, 2))
        differences = candidates[:, None] - points  # (draws, points, 2)
        distances = np.linalg.norm(differences, axis=-1)
        counted = distances.min(1) * sky.at(sky.density, candidates)
        points = np.vstack((points, candidates[counted.argmax()]))
    return points[1:]


def _grid_positions(wanted, sides):
    """Return the centers of the cells of a grid.

    Its rows and columns come nearest to the wanted number and to the frame's aspect ratio.
    """
    def misfit(shape):
        rows, columns = shape
        number = abs(rows * columns - wanted) / wanted
        height, width = sides
        aspect = columns / rows * height / width
        return number + abs(math.log(aspect))

    # At least two rows and columns: with one the slope along the other axis would be open
    shapes = []
    most = max(2, wanted // 2)
    for rows in range(2, most + 1):
        columns = max(2, round(wanted / rows))
        shapes.append((rows, columns))
    rows, columns = min(shapes, key=misfit)
    row = (np.arange(rows) + 0.5) / rows
    column = (np.arange(columns) + 0.5) / columns
    centers = _grid(row, column)  # (rows, columns, 2) in [0, 1]
    return sides * centers.reshape(-1, 2)


def start_values(prepared: Prepared, positions: np.ndarray) -> np.ndarray:
    """Return the first values at the control points (n, 2): the sky that was found there.

    Returns:
        (n, c) float32, stretched.
    """
    linear = prepared.sky.surface(positions)
    return prepared.stretch.extend(linear).astype(np.float32)


def sample_cells(usable: np.ndarray, density: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """Return the flat indices of at most `wanted` cells of usable, (h, w) bool, sorted.

    The sample is stratified: the cells are put in the order of a coarse grid of tiles, and one is
    drawn at random from each run of equal weight. A cell's weight is the density (h, w) of control
    points squared. So the loss, which forgives, cannot forgive a small steep part of the sky.
    """
    _, width = usable.shape
    row, column = np.nonzero(usable)
    if row.size <= wanted:
        return row * width + column
    tile = max(1, int(math.sqrt(row.size / wanted)))
    keys = (column, row, column // tile, row // tile)
    tile_by_tile = np.lexsort(keys)
    places = (row * width + column)[tile_by_tile]
    reached = np.cumsum(density.ravel()[places]**2)
    rng = np.random.default_rng(seed)
    drawn = (np.arange(wanted) + rng.random(wanted)) / wanted
    return np.unique(places[np.searchsorted(reached, drawn * reached[-1])])


class Lesson(NamedTuple):
    """What the training step sees of one picture: m cells, and k nodes where bending is measured.

    There are n control points.
    """

    places: Any  # (m + k, 2) frame coordinates: of the cells, then of the nodes
    image: Any  # (m, c) stretched
    weight: Any  # (m, c) in [0, 1]
    clipped: Any  # (m, c) as bright as the stretch can tell: a sky that is brighter is no overshoot
    follows: Any  # (m, 1) 1 where the surface follows the picture, 0 where that only bounds it
    bounded: Any  # (m, 1) 1 where an overshoot counts
    bending: Any  # (r, k) see `bending_rows`
    stiffness: Any  # () weight of the bending
    unit: Any  # (c,) linear, that of the bending, in units of the stretch's scale
    midtones: Any  # (c,) of the stretch
    positions: Any  # (n, 2) at the start
    values: Any  # (n, c) at the start
    condition: Any  # (n, n) takes trained coordinates to values
    spacing: Any  # () takes trained coordinates to positions


class Sample(NamedTuple):
    """What the fit sees of the cells: m of them."""

    places: np.ndarray  # (m, 2) frame coordinates
    image: np.ndarray  # (m, c) stretched
    weight: np.ndarray  # (m, c) in [0, 1]
    follows: np.ndarray  # (m, 1) bool: False where the picture only bounds the sky


def sky_sample(prepared: Prepared, settings: Settings) -> Sample:
    """Draw the cells that the fit sees.

    With auto, the surface follows those that show sky, and objects that add light bound it. Objects
    are left out, so the loss need not forgive much: a cell weighs less the noisier it is, and then
    residuals count nearly linearly up to FORGIVEN sigma.
    """
    sky = prepared.sky
    stretch = prepared.stretch
    auto = settings.auto
    trust = _block_means(prepared.weight, sky.size)  # (h, w, c) of the cells
    follows = (trust > 0).any(-1) & (sky.shows_sky | (not auto))
    bounds = sky.below & auto
    density = sky.density if auto else np.ones(follows.shape)
    of_sky = sample_cells(follows, density, SAMPLE_CELLS * settings.batch, settings.seed)
    most = int(BOUNDS_SHARE * len(of_sky))
    of_bounds = sample_cells(bounds, density, most, settings.seed)
    pick = np.concatenate([of_sky, of_bounds])
    is_sky = np.arange(len(pick))[:, None] < len(of_sky)  # (m, 1)

    light = _picked(sky.image, pick)  # (m, c) linear
    noise = _picked(sky.noise, pick)
    # What is not in the sample counts through means, which have less than half of the noise
    smooth = _picked(_smooth_slope(sky.image, SAMPLE_MEAN, follows), pick)
    picture = np.where(is_sky, smooth, light + CEILING_SIGMA * noise)
    # What is left with auto is sky, however bright: the stretch shall not clip it
    image = stretch.extend(picture) if auto else stretch.apply(picture)
    weight = np.where(is_sky, _picked(trust, pick), 1.0)
    if auto:
        noise = stretch.extend(light + noise) - stretch.extend(light)  # (m, c) stretched
        noise = np.maximum(noise.mean(-1, keepdims=True), LOSS_FLOOR / FORGIVEN)
        weight *= LOSS_FLOOR / (FORGIVEN * noise)
    return Sample(_picked(sky.centers, pick), image, weight, is_sky)


def make_lesson(prepared: Prepared, settings: Settings,
                start: tuple[np.ndarray, np.ndarray]) -> Lesson:
    """Put together what the training step sees of a picture.

    Args:
        prepared, settings: what `examine` gave.
        start: positions (n, 2) and values (n, c) of the control points.
    """
    sky = prepared.sky
    stretch = prepared.stretch
    sample = sky_sample(prepared, settings)
    follows = sample.follows
    positions, values = start
    nodes, spacing = bending_nodes(prepared.full_shape, FIT_NODES)  # (rows, columns, 2)
    cost = sky.at(sky.cost, nodes) if settings.auto else np.ones(nodes.shape[:2])
    rows = bending_rows(spacing, cost, settings.smoothing < PLANE)
    nodes = nodes.reshape(-1, 2)
    found = _fit_spline(nodes, positions, start_values(prepared, positions), settings.order)
    derivatives = rows @ (stretch.invert(found) / sky.unit)  # (r, c)
    bending = (derivatives**2).sum(0).mean()

    # In finding the sky, bending stands beside the mean squared residual. The loss curves by
    # 1 / spread^2 at the sky, and by less where it forgives less.
    curvature = (2 / FORGIVEN if settings.auto else 1) / sky.spread**2
    stiffness = curvature / 2 * STIFFNESS_UNIT * settings.smoothing
    asked_for_plane = sky.by_hand and settings.smoothing >= PLANE
    most = PLANE_COST if asked_for_plane else FOUND_COST
    most *= settings.smoothing / max(sky.found_smoothing, 1e-9)
    stiffness = min(stiffness, most / max(bending, 1e-12))  # at a smoothing of 0, none

    step = 1e-3
    slopes = (stretch.invert(found + step) - stretch.invert(found - step)) / (2 * step)
    slopes = (slopes / sky.unit).mean(-1)  # (k,) of the inverse of the stretch
    places = sample.places[follows[:, 0]]
    energy = 2 * stiffness / curvature
    condition = _condition(positions, settings.order, places, nodes, rows * slopes, energy)
    return Lesson(
        places=np.concatenate([sample.places, nodes]),
        image=sample.image,
        weight=sample.weight,
        clipped=follows * (sample.image >= 1) * (not settings.auto),
        follows=follows,
        bounded=np.full(follows.shape, not settings.auto) | ~follows,
        bending=rows,
        stiffness=stiffness * follows.mean(),  # the loss is a mean over cells of both kinds
        unit=sky.unit / stretch.scale,
        midtones=stretch.midtones,
        positions=positions,
        values=values,
        condition=VALUE_RATE * condition,
        spacing=POSITION_RATE / math.sqrt(len(positions)))


def _picked(pixels, pick):
    """Return the pixels of (h, w, k) with these flat indices, (m, k)."""
    return pixels.reshape(-1, pixels.shape[-1])[pick]


def _condition(positions: np.ndarray, order: int, places: np.ndarray, nodes: np.ndarray,
               rows: np.ndarray, energy: float) -> np.ndarray:
    """Return the matrix (n, n) that takes trained coordinates to values at the control points.

    In these coordinates a step changes the objective by as much in every direction. Adam alone
    would take thousands of epochs for the directions in which points move together.

    Args:
        positions: (n, 2) control points.
        order: of the spline.
        places: (m, 2) the sky in the sample.
        nodes, rows: (k, 2) and (r, k), for the bending of a stretched surface.
        energy: weight of the bending beside the mean squared residual.
    """
    unit = np.eye(len(positions))
    on_places = _fit_spline(places, positions, unit, order)  # (m, n)
    on_nodes = _fit_spline(nodes, positions, unit, order)  # (k, n)
    derivatives = rows @ on_nodes
    curvature = on_places.T @ on_places / len(places)
    curvature += energy * derivatives.T @ derivatives
    strengths, directions = np.linalg.eigh(curvature)
    floor = CONDITION_FLOOR * strengths[-1]
    strengths = np.maximum(strengths, floor)
    return (directions / np.sqrt(strengths)) @ directions.T


def fit_surface(prepared: Prepared, settings: Settings, start: tuple[np.ndarray, np.ndarray],
                on_epoch: Callable[[int, float], None] | None = None) -> Fit:
    """Fit the spline to the sky.

    Adam trains positions and values. The learning rate is halved on a plateau, and the fit stops
    early. This is a loop of our own and not Keras' `fit`, which would add more to each epoch than
    the 2 ms that an epoch takes.

    Args:
        prepared, settings: what `examine` gave.
        start: positions (n, 2) and values (n, c).
        on_epoch: called after each epoch with its number, from 1, and its loss.

    Raises:
        BgError: the spline cannot be computed at all from this start.
    """
    import tensorflow as tf
    lesson = make_lesson(prepared, settings, start)
    points, channels = start[1].shape
    lesson = Lesson(*[tf.constant(part, tf.float32) for part in lesson])
    training = _training(points, channels, settings.order, settings.alpha,
                         tuple(lesson.bending.shape), lesson.image.device,
                         import_interpolate_spline())
    history = []
    track = []
    rate = settings.learning_rate
    least = math.inf
    improved = 0  # last epoch in which the loss fell
    changed = 0  # last epoch in which the loss or the learning rate fell
    stopped = f"all {settings.epochs} epochs done"
    with training.lock:  # two threads may fit at the same time
        training.begin(lesson, rate)
        for epoch in range(1, settings.epochs + 1):
            now = training.control_points()
            if (epoch - 1) % TRACK_EVERY == 0:
                track.append((epoch - 1, *now))
            try:
                losses = training.step()
            except tf.errors.InvalidArgumentError:  # the matrix is not invertible: points have met
                losses = np.array([np.nan])
            if not np.isfinite(losses).all():
                stopped = (f"stopped at epoch {epoch}: the spline's equations became singular; "
                           "best surface so far taken (try a smaller -lr, or another --seed)")
                break
            history.append(losses)
            if on_epoch is not None:
                on_epoch(epoch, float(losses[0]))
            if losses[0] < least:
                best = now
            if losses[0] < least - STOP_DELTA:
                improved = changed = epoch
            least = min(least, losses[0])
            if epoch - improved >= STOP_PATIENCE:
                stopped = f"stopped at epoch {epoch}: no improvement in {STOP_PATIENCE} epochs"
                break
            if epoch - changed >= RATE_PATIENCE and rate > RATE_FLOOR:
                rate = max(rate / 2, RATE_FLOOR)
                changed = epoch
                training.adam.learning_rate = rate
        if settings.epochs == len(history):
            last = training.control_points()
            if training.step()[0] < least:
                best = last
    if not history:
        raise BgError("the spline's equations cannot be solved from these control points; "
                      "lower -N, or choose another --seed")
    return Fit(*best, settings.order, settings.smoothing, np.array(history), stopped, track)


@functools.lru_cache(maxsize=8)  # a folder holds pictures of few kinds
def _training(points, channels, order, alpha, bending_shape, device, interpolate) -> _Training:
    """Return the training of fits that have all of this in common.

    It is made once: TensorFlow takes longer to trace a step than to do a hundred.
    """
    return _Training(points, channels, order, alpha, bending_shape)


class _Training:
    """A spline in training. It serves one picture after the other, each of which holds `lock`."""

    def __init__(self, points, channels, order, alpha, bending_shape):
        import tensorflow as tf
        self.lock = threading.Lock()
        self.alpha = alpha
        self.layer = spline_layer(points, channels, order, SPLINE_REGULARIZATION)
        start = np.zeros((points, 2 + channels), np.float32)
        self.coordinates = tf.Variable(start)  # of positions and values, see `_condition`
        self.adam = tf.keras.optimizers.Adam()
        self.adam.build([self.coordinates])

        def numbers(*shape):
            return tf.TensorSpec(shape, tf.float32)

        # A step traced for the number of cells of its first picture would round differently, so
        # that what comes first in a folder changed the results of all others.
        signature = Lesson(
            places=numbers(None, 2),
            image=numbers(None, channels),
            weight=numbers(None, channels),
            clipped=numbers(None, channels),
            follows=numbers(None, 1),
            bounded=numbers(None, 1),
            bending=numbers(*bending_shape),
            stiffness=numbers(),
            unit=numbers(channels),
            midtones=numbers(channels),
            positions=numbers(points, 2),
            values=numbers(points, channels),
            condition=numbers(points, points),
            spacing=numbers())
        # Nothing in it needs rewriting, which costs time and would reach into the drop-in
        self._step = tf.function(self._trace, input_signature=[signature], autograph=False)

    def begin(self, lesson: Lesson, learning_rate: float) -> None:
        """Forget the picture before, and start from the control points of this lesson."""
        import tensorflow as tf
        self.lesson = lesson
        self.layer.positions.assign(lesson.positions)
        self.layer.values.assign(lesson.values)
        for variable in (self.coordinates, *self.adam.variables):  # the epoch and the moments too
            variable.assign(tf.zeros_like(variable))
        self.adam.learning_rate = learning_rate

    def control_points(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions (n, 2) and the values (n, c)."""
        return self.layer.positions.numpy(), self.layer.values.numpy()

    def step(self) -> np.ndarray:
        """Do one step. Return the loss before it, and its terms as in Fit.history, (6,)."""
        return self._step(self.lesson).numpy()

    def _trace(self, lesson):
        """Do what `step` does, on tensors."""
        import tensorflow as tf
        weights = [self.layer.positions, self.layer.values]
        count = tf.shape(lesson.image)[0]
        with tf.GradientTape() as tape:
            surface = self.layer(lesson.places)  # [m + k, c]
            terms = self._cell_terms(lesson, surface[:count])
            linear = inverse_midtones(surface[count:], lesson.midtones, tf)
            bending = lesson.stiffness * loss_bending(linear / lesson.unit, lesson.bending)
            loss = log_loss(terms, self.alpha) + bending
        of_positions, of_values = tape.gradient(loss, weights)
        of_positions *= lesson.spacing
        of_values = tf.matmul(lesson.condition, of_values, transpose_a=True)
        gradient = tf.concat([of_positions, of_values], 1)
        self.adam.apply_gradients([(gradient, self.coordinates)])
        moved = lesson.spacing * self.coordinates[:, :2]
        risen = tf.matmul(lesson.condition, self.coordinates[:, 2:])
        self.layer.positions.assign(lesson.positions + moved)
        self.layer.values.assign(lesson.values + risen)
        means = [tf.reduce_mean(term) for term in terms]
        return tf.stack([loss, *means, bending])

    def _cell_terms(self, lesson, surface):
        """Return the four terms of the loss of the cells, [m] each."""
        import tensorflow as tf
        brighter = tf.maximum(lesson.image, surface)
        picture = tf.where(lesson.clipped > 0, brighter, lesson.image)
        residual = lesson.weight * (picture - surface)
        followed = lesson.follows * residual
        return [
            loss_error(followed),
            loss_color(followed),
            loss_overshoot(lesson.bounded * residual),
            loss_negative(surface),
        ]


class Device(NamedTuple):
    """A device of TensorFlow's."""

    place: str  # as in `tf.device`
    name: str  # for people


def compute_devices() -> list[Device]:
    """Return what there is to compute on, the best first: a GPU if one works, then the CPU."""
    tf = import_tensorflow()
    cpu = Device("/CPU:0", "the CPU")
    try:
        # This starts the GPU, and fails where another program holds it
        if not tf.config.list_logical_devices("GPU"):
            return [cpu]
        first = tf.config.list_physical_devices("GPU")[0]
        details = tf.config.experimental.get_device_details(first)
    except (tf.errors.OpError, RuntimeError) as error:
        reason = type(error).__name__
        logger.info(f"the GPU cannot be started ({reason}); going on with the CPU")
        tf.config.set_visible_devices([], "GPU")
        return [cpu]
    name = details.get("device_name", "the GPU")
    return [Device("/GPU:0", name), cpu]


def on_first_that_works(devices: list[Device], work: Callable):
    """Return what work() gives on the first of one or two devices on which it does not fail.

    Raises:
        BgError: the last device has too little memory. Its other errors are raised as they are.
    """
    import tensorflow as tf
    last = devices[-1]
    for device in devices:
        try:
            with tf.device(device.place):
                return work()
        except tf.errors.ResourceExhaustedError:
            if device is last:
                raise BgError(f"{device.name} has too little memory; "
                              "try a larger -dx, or a smaller -B") from None
            logger.info(f"{device.name} has too little memory; going on with {last.name} "
                        "(a larger -dx or a smaller -B may fit)")
        except tf.errors.OpError as error:
            if device is last:
                raise
            logger.info(f"{device.name} failed ({type(error).__name__}); going on with {last.name}")


def fit_sky(prepared: Prepared, settings: Settings,
            on_epoch: Callable[[int, float], None] | None = None) -> Fit:
    """Fit the surface to what `examine` gave, on the best device that works.

    `on_epoch` is called with the number of each epoch, from 1, and its loss.
    """
    positions = start_positions(settings, prepared.sky, prepared.full_shape)
    start = positions, start_values(prepared, positions)
    devices = compute_devices()
    logger.info(f"fitting {len(positions)} control points, smoothing {settings.smoothing:.3g}, "
                f"on {devices[0].name}")

    def work():
        return fit_surface(prepared, settings, start, on_epoch)

    return on_first_that_works(devices, work)


# --------------------------------------------------------------------------------------------------
# Apply: the model at full size, and the picture without it
# --------------------------------------------------------------------------------------------------

SURFACE_NODES = 300
"""The model at full size is the spline itself on about this many nodes along the longer side, and
interpolated between them. The surface bends over much longer distances; see `SkyModel`."""

LEAST_NODES = 4
"""Nodes along the shorter side; a cubic needs four."""

MAX_EXTRAPOLATION = 0.5
"""The model may exceed the range of values that it has over the sky by this fraction of that range.
So it cannot run away in a corner without sky, or behind hills."""


class SkyModel:
    """The sky at full size, (c, h, w) in linear units, made in strips of rows.

    It is never in memory as a whole, unless somebody asks for that. The sky is evaluated at nodes
    some pixels apart, and a cubic spline along each axis goes through them. The sky bends over
    hundreds of pixels, so nothing is lost between the nodes (tests hold it to 2e-5), and a pixel
    costs only a few multiplications, however many control points there are.
    """

    def __init__(self, sky: Callable[[np.ndarray], np.ndarray], shape: tuple[int, int],
                 dtype=np.float32, nodes: int = SURFACE_NODES):
        """Evaluate the nodes.

        Args:
            sky: takes frame coordinates (..., 2) to the linear sky there, (..., c).
            shape: (h, w) of the picture.
            dtype: of the model.
            nodes: about so many along the longer side, no more than pixels.
        """
        height, width = shape
        longer = max(shape)
        spacing = min(longer / nodes, min(shape) / LEAST_NODES)
        spacing = max(spacing, 1)  # pixels

        def place_nodes(length):  # from the center of the first pixel to that of the last, or more
            count = 1 + math.ceil((length - 1) / spacing)
            return spacing * np.arange(max(count, LEAST_NODES))

        down = place_nodes(height)
        along = place_nodes(width)
        places = (_grid(down, along) + 0.5) / longer
        nodes = sky(places)  # (rows, columns, c)
        make_spline = scipy.interpolate.make_interp_spline  # cubic
        across = make_spline(along, nodes, axis=1)
        x = np.arange(width)
        spline = make_spline(down, across(x))
        y = np.arange(height)
        weights = scipy.interpolate.BSpline.design_matrix(y, spline.t, 3)
        self.nodes = np.moveaxis(nodes, -1, 0)  # (c, rows, columns)
        self.terms = np.moveaxis(spline.c, -1, 0).astype(dtype)  # (c, rows, w)
        self.weights = weights.astype(dtype)  # (h, rows), sparse: what each term adds to a row
        self.shape = (len(self.nodes), height, width)
        self.dtype = self.terms.dtype

    def strip(self, channel: int, rows: slice) -> np.ndarray:
        """Return the linear sky of one channel in some rows, (rows, w)."""
        return np.clip(self.weights[rows] @ self.terms[channel], 0, 1)

    def plane(self, channel: int) -> np.ndarray:
        """Return the linear sky of one channel, (h, w)."""
        plane = np.empty(self.shape[1:], self.dtype)

        def fill(rows):
            plane[rows] = self.strip(channel, rows)

        list(_each(fill, _strips(*plane.shape)))
        return plane

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the planes of the channels, as `write_xisf` takes them.

        Each one is made when it is asked for.
        """
        return map(self.plane, range(len(self.nodes)))


def linear_sky(prepared: Prepared, fit: Fit) -> Callable[[np.ndarray], np.ndarray]:
    """Return the fitted sky in linear units, as a function.

    Its range is limited, which matters where there was no sky to fit; see MAX_EXTRAPOLATION.

    Returns:
        A function that takes frame coordinates (..., 2) to the sky there, (..., c) in [0, 1].
    """
    found = prepared.sky
    limited = found.shows_sky | found.below  # objects that add light limit the sky from above
    stretched = fit.surface(found.centers[limited])  # (cells, c)
    seen = prepared.stretch.invert(stretched)
    low = seen.min(0)
    high = seen.max(0)
    beyond = MAX_EXTRAPOLATION * (high - low)
    lowest = np.maximum(low - beyond, 0)
    highest = np.minimum(high + beyond, 1)

    def sky(places):
        stretched = fit.surface(places)
        linear = prepared.stretch.invert(stretched)
        return np.clip(linear, lowest, highest)

    return sky


def take_out(planes: np.ndarray, sky: SkyModel, prepared: Prepared,
             correction: str) -> tuple[np.ndarray, np.ndarray]:
    """Take the sky out of a picture, in place, and clip what is left to [0, 1].

    "subtract" makes it image - model + offset. The offset of a channel is what the median of its
    present samples would lose. So the background stays neutral, and a black border or one bad pixel
    cannot decide a color. "divide" makes it image / model * the model's median, all above black;
    that is right where something dims the light, such as vignetting. Missing samples stay as they
    are.

    Args:
        planes: (c, h, w) linear samples; changed.
        sky: the model.
        prepared: `median` and `black` count.
        correction: "subtract" or "divide".

    Returns:
        The offsets, or the model's medians above black, (c,), and how many samples were clipped at
        0 and at 1, (2,).

    Raises:
        BgError: the model is to be divided by, and not above black everywhere.
    """
    divides = correction == "divide"
    black = prepared.black
    levels = np.median(sky.nodes, (1, 2)) - black
    for channel, nodes in enumerate(sky.nodes):
        if divides and nodes.min() <= black:
            name = _channel_name(channel, len(planes))
            raise BgError(f"the model of {name} is not above 0 everywhere, and nothing can be "
                          "divided by it; use --correction subtract")

    def work(channel):
        plane = planes[channel]
        present = _present(plane)
        strips = _strips(*plane.shape)
        for rows in strips:
            samples = plane[rows]
            model = sky.strip(channel, rows)
            if divides:
                gain = levels[channel] / (model - black)
                left = (samples - black) * gain
                np.copyto(samples, left, where=present[rows])
            else:
                np.subtract(samples, model, out=samples, where=present[rows])
        offset = black
        if not divides:
            median_left = _quantiles(plane, present, (0.5,))[0]
            offset = prepared.median[channel] - median_left
        shift = plane.dtype.type(offset)
        clipped = np.zeros(2, int)
        for rows in strips:
            values = plane[rows] + shift
            beyond = np.stack((values < 0, values > 1))  # (2, rows, w)
            beyond &= present[rows]
            clipped += np.count_nonzero(beyond, (1, 2))
            np.clip(values, 0, 1, out=plane[rows], where=present[rows])
        return offset, clipped

    offsets, clipped = zip(*_each(work, range(len(planes))))
    return levels if divides else np.array(offsets), np.sum(clipped, 0)


def corrected(prepared: Prepared, linear: np.ndarray, sky: np.ndarray,
              correction: str) -> np.ndarray:
    """Return some samples of a picture without their sky.

    Args:
        prepared: `black` and `median` count.
        linear: (..., c) samples, NaN where missing.
        sky: (..., c) the model there.
        correction: "subtract", which keeps the medians of the picture, or "divide".
    """
    pixels = tuple(range(sky.ndim - 1))  # the axes
    if correction == "subtract":
        left = linear - sky
        shift = prepared.median - np.nanmedian(left, pixels)
        return left + shift.astype(left.dtype)
    black = prepared.black
    above_black = sky - black
    level = np.median(above_black, pixels)
    gain = level / above_black
    return (linear - black) * gain + black


# --------------------------------------------------------------------------------------------------
# The whole job on arrays
# --------------------------------------------------------------------------------------------------

MOST_CLIPPED = 0.01
"""Part of the samples. If the correction clips more than that, something is wrong."""

OBJECTS_SHARE = 0.2
"""Part of the frame. Stars alone take up to this; if objects take more, a plain run is told of
--auto."""


def examine(planes: np.ndarray, settings: Settings, mask: np.ndarray | None = None,
            black: float = 0.0,
            reference: Reference | None = None) -> tuple[Prepared, Settings]:
    """Do everything before the fit: stretch, reduce, mask, find the sky, and warn of what is odd.

    It needs no TensorFlow.

    Args:
        planes, settings, mask: as for `prepare`.
        black: the sample that no light at all would give; it counts where the sky is divided out.
        reference: another picture of the region, as `read_reference` gives it.

    Returns:
        What the fit sees, and the settings with the values that are used in place of every None.

    Raises:
        BgError: as `prepare`.
    """
    settings = settings.resolved()
    prepared = prepare(planes, settings, mask)
    prepared = replace(
        prepared, black=black, close_up=close_up(planes, settings), reference=reference)
    return judge(planes, prepared, settings, find_sky(prepared, settings))


def judge(planes: np.ndarray, prepared: Prepared, settings: Settings,
          sky: Sky) -> tuple[Prepared, Settings]:
    """Do what `examine` does once the sky is found: tell of it, and mask what is none with auto."""
    if sky.shared is not None:
        tell_of_reference(prepared.reference, sky.shared)
    settings = replace(settings, smoothing=sky.smoothing)
    logger.info(f"sky: {100 * sky.share:.0f} % of the picture; "
                f"smoothing {sky.smoothing:.3g} ({sky.why})")
    if sky.unsure:
        logger.warning(f"the sky of this picture cannot be told from objects: {sky.unsure}. "
                       "Take the result as a guess, mask objects with -m, or keep the surface "
                       "stiff with --smoothing 1e4")
    if prepared.rim.any():
        pixels = settings.downscaling_factor * rim_depth(prepared)
        logger.info(f"left out: a rim of {pixels} pixels that is darker than the picture by a step "
                    f"({prepared.rim.mean():.1%} of the frame)")
    for sentence in doubts(planes, prepared):
        logger.warning(sentence)
    _hint_at_inverted_mask(prepared, sky)
    prepared = with_sky(prepared, settings, sky)
    _log_numbers(prepared, settings)
    return prepared, settings


def with_sky(prepared: Prepared, settings: Settings, sky: Sky) -> Prepared:
    """Return what the fit sees, now that the sky is found; with auto, objects are masked."""
    weight = prepared.weight
    if settings.auto:
        shows_sky = sky.at(sky.shows_sky, prepared.centers)  # (h, w)
        weight = weight * shows_sky[..., None]
    return replace(prepared, weight=weight, sky=sky)


@dataclass(frozen=True)
class Result:
    """A picture whose sky was taken out, and how that came about; (h, w) pixels, c channels."""

    planes: np.ndarray  # (c, h, w) the picture without the sky, linear in [0, 1]
    sky: SkyModel  # the model, as the planes
    unit: Unit  # the picture's own
    offsets: np.ndarray  # (c,) in the own unit: picture - model + offset is what is left, or
    # picture / model * offset if the sky was divided out
    clipped: float  # share of the samples that were clipped at 0 or 1
    gradient_before: float  # see `gradient`
    gradient_after: float
    settings: Settings  # as used
    prepared: Prepared
    fit: Fit

    @functools.cached_property
    def linear_sky(self) -> Callable[[np.ndarray], np.ndarray]:
        """The model as a function of frame coordinates; see the function of this name."""
        return linear_sky(self.prepared, self.fit)

    @functools.cached_property
    def model(self) -> np.ndarray:
        """The sky, (h, w, c) in the picture's own unit."""
        return self._to_image(self.sky)

    @functools.cached_property
    def subtracted(self) -> np.ndarray:
        """The picture without the sky, (h, w, c) in its own unit."""
        return self._to_image(self.planes)

    @property
    def history(self) -> dict[str, np.ndarray]:
        """The loss and its terms, (epochs,) each."""
        names = ("loss", *LOSS_TERMS)
        return dict(zip(names, self.fit.history.T))

    def _to_image(self, planes):
        in_own_unit = [_in_own_unit(plane, self.unit) for plane in planes]
        return np.stack(in_own_unit, -1)


def remove_sky(planes: np.ndarray, settings: Settings, mask: np.ndarray | None = None,
               unit: Unit = Unit(), watched: ContextManager = nullcontext(),
               reference: Reference | None = None) -> Result:
    """Find the sky of a picture, fit the surface, and take it out: the whole job on one picture.

    Args:
        planes: (c, h, w) linear samples in [0, 1], c 1 or 3; changed in place.
        settings: see `Settings`.
        mask: (1 or c, h, w) weights, 1 = use, 0 = ignore, or None.
        unit: the picture's own unit, for the offsets.
        watched: a context for the fit. It may give a function that is called after each epoch with
            its number, from 1, and its loss.
        reference: as for `examine`.

    Raises:
        BgError: as `prepare`, `fit_surface`, and `take_out`.
    """
    black = -unit.offset / unit.scale
    prepared, settings = examine(planes, settings, mask, black, reference)
    with watched as on_epoch:
        fit = fit_sky(prepared, settings, on_epoch)
    logger.info(f"{fit.stopped}; lowest loss {fit.history[:, 0].min():.4f}")
    sky = SkyModel(linear_sky(prepared, fit), prepared.full_shape, planes.dtype)
    offsets, clipped = take_out(planes, sky, prepared, settings.correction)
    offsets = offsets * unit.scale
    words = "divided by the sky, times its median"
    if settings.correction == "subtract":
        offsets += unit.offset  # the model is in that unit too
        words = "offsets"
    share = clipped.sum() / planes.size
    before = gradient(prepared)
    after = gradient(prepared, fit, settings.correction)
    result = Result(
        planes, sky, unit, offsets, share, before, after, settings, prepared, fit)

    logger.info(gradients(result))
    letters = _channel_letters(prepared)
    each = map("{} {:.6f}".format, letters, offsets)
    logger.info(f"{words}: {', '.join(each)}")
    below, above = clipped
    logger.info(f"clipped: {below} samples at 0, {above} at 1, of {planes.size}")
    if share > MOST_CLIPPED:
        advice = ", but hardly any sky; crop dark borders, or leave them out with -m"
        if _sky_is_clipped(planes, prepared, settings):
            advice = (": the sky leaves no room below or above it; add a pedestal to the picture, "
                      "or use a stiffer surface (--smoothing)")
        logger.warning(f"{share:.1%} of the samples were clipped{advice}")
    _hint_at_objects(prepared, settings)
    return result


def _sky_is_clipped(planes: np.ndarray, prepared: Prepared, settings: Settings) -> bool:
    """Tell whether the correction clipped more of the sky than MOST_CLIPPED."""
    factor = settings.downscaling_factor
    samples = planes[:, ::factor, ::factor]  # one of each block
    sky = prepared.sky.at(prepared.sky.shows_sky, prepared.centers)
    samples = samples[:, sky & prepared.present.all(-1)]
    return bool(samples.size and ((samples <= 0) | (samples >= 1)).mean() > MOST_CLIPPED)


def _hint_at_inverted_mask(prepared: Prepared, sky: Sky) -> None:
    """Ask whether a mask is inverted: it leaves the bright minority, most of it not sky."""
    present = prepared.present.all(-1)
    left = present & prepared.used
    if prepared.user_mask is None or not 0 < left.sum() < 0.5 * present.sum():
        return
    light = prepared.linear.mean(-1)
    brighter = np.median(light[left]) > np.median(light[present])
    if brighter and (sky.unsure or sky.share < 0.5):
        logger.warning("is the mask inverted? What it leaves is brighter than what it leaves out, "
                       "and white (1) means sky. Invert it where it was made (PixInsight: Image > "
                       "Invert, Siril: neg), and give it again")


def _hint_at_objects(prepared: Prepared, settings: Settings) -> None:
    """Tell a plain run that it had much in its fit that is not sky."""
    sky = prepared.sky
    if settings.auto or sky.unsure:
        return
    objects = prepared.used & ~sky.at(sky.shows_sky, prepared.centers)  # (h, w)
    if objects.mean() > OBJECTS_SHARE:
        logger.info("hint: objects were found in this picture; --auto would leave them out, "
                    f"with a margin ({objects.mean():.0%} of the frame)")


def optimize(image: np.ndarray, settings: Settings = Settings(), mask: np.ndarray | None = None,
             on_epoch: Callable[[int, float], None] | None = None) -> Result:
    """Model the sky of a linear picture and take it out.

    What it finds out is logged as "bgoptimizer", at the level INFO; doubts are at WARNING.

    Args:
        image: (h, w), (h, w, 1) or (h, w, 3), linear; 0, what is not finite, and what a masked
            array masks count as missing. Integers count over their full range, which becomes 0 to
            1. Floats may have any unit, and the results are in it. Not changed.
        settings: see `Settings`.
        mask: (h, w), (h, w, 1) or (h, w, c) weights in [0, 1], 1 = use, 0 = ignore; or integers.
        on_epoch: called after each epoch with its number, from 1, and its loss.

    Returns:
        `model` and `subtracted` are in Float32, or in Float64 if the image is.

    Raises:
        BgError: the image has another shape, nothing is left to fit, or a channel is empty.
    """
    planes = _to_planes(image, "the image")
    if len(planes) not in (1, 3):
        raise BgError(f"the image has shape {np.shape(image)}; "
                      "give (h, w), (h, w, 1) or (h, w, 3)")
    unit = array_unit(planes)
    keep_dark_samples(planes)
    weights = None if mask is None else mask_weights(_to_planes(mask, "the mask"))
    return remove_sky(planes, settings, weights, unit, nullcontext(on_epoch))


def _to_planes(image: np.ndarray, name: str) -> np.ndarray:
    """Copy (h, w) or (h, w, c) to (c, h, w), to Float64 if the image is, else to Float32.

    What a masked array masks becomes NaN.
    """
    masked = np.ma.getmask(image)
    image = np.asarray(image)
    kind = image.dtype.kind
    if image.ndim not in (2, 3) or not image.size or kind not in "fiub":
        raise BgError(f"{name} is {image.dtype} of shape {image.shape}; "
                      "give numbers of shape (h, w) or (h, w, c)")
    white = np.iinfo(image.dtype).max if kind in "iu" else 1
    dtype = np.float64 if image.dtype == np.float64 else np.float32
    planes = np.moveaxis(np.atleast_3d(image), -1, 0)
    planes = np.array(planes, dtype, order="C") / dtype(white)
    if masked is not np.ma.nomask:
        planes[np.moveaxis(np.atleast_3d(masked), -1, 0)] = np.nan
    return planes


# --------------------------------------------------------------------------------------------------
# What can be said about a picture
# --------------------------------------------------------------------------------------------------

VIEW_PIXELS = 600
"""Reduced pixels along the longer side that numbers and pictures are made of. More could not be
seen."""

SMALL_PICTURE = 1200
"""Pixels along the longer side. A picture up to this size is drawn from itself, not from the
reduced copy; a larger one has enough reduced pixels."""

BLOWN_SHARE = 0.01
"""Part of the frame. If the stretch clips less sky than that, nobody needs to know."""

GRADIENT_SCALE = 6.0
"""Cells: what the found sky misses is measured on Gaussian means of so many. Noise is small in
them, and every gradient is wider."""

GRADIENT_SHARE = 0.3
"""A gradient is told if at least this part of the picture shows sky."""

STRETCHED_FALL = 0.015
STRETCHED_SIGMA = 3.0
"""A picture looks stretched if its noise falls by this part from the dim to the bright side of a
tile, and by so many times the error of that. In 131 linear pictures, of `tests/scenes.py` and real
ones, it fell by up to 0.011 and 2.4."""

STRETCHED_TOP = 0.6
STRETCHED_MEDIAN = 0.15
"""Any fall is enough if the brightest thousandth is above the first number, and the median above
the second part of the way from black to there."""

STRETCHED_LIGHT = 0.08
"""A fall may be smaller if the median is above this part of the full range. Stretches take it to
0.1 at least. In none of the linear pictures was any fall certain."""

STRETCHED_TILE = 32
"""Squares of 2 x 2 pixels along a side of a tile. In so few nothing else changes the noise."""

MOSAIC_DIFFERENCE = 0.03
"""The means of the four phases of a mosaic differ by at least this part of their height above
black."""

MOSAIC_GREENS = 0.5
"""On one diagonal are the two greens: they differ by less than this part of what all phases do.
Columns or rows of a sensor that differ do so on both diagonals."""


def thinned(prepared: Prepared, most: int = VIEW_PIXELS) -> Prepared:
    """Take every k-th pixel of the reduced frame, so that its longer side has about `most`."""
    longer = max(prepared.image.shape[:2])
    step = max(1, round(longer / most))
    parts = {}
    for name in ("image", "weight", "present", "centers", "linear", "user_mask", "rim"):
        part = getattr(prepared, name)
        if part is not None:
            parts[name] = part[::step, ::step]
    return replace(prepared, **parts)


def close_up(planes: np.ndarray, settings: Settings) -> np.ndarray | None:
    """Reduce a small picture to what fits into a figure, for the reduced copy would look blocky.

    Returns:
        (h, w, c) linear, NaN where missing; None if the picture is large, or hardly reduced.
    """
    longer = max(planes.shape[1:])
    factor = math.ceil(longer / VIEW_PIXELS)
    if longer > SMALL_PICTURE or factor >= settings.downscaling_factor:
        return None
    return np.stack([reduce_plane(plane, factor, "mean") for plane in planes], -1)


def blown_out(prepared: Prepared, settings: Settings) -> np.ndarray:
    """Return True, (h, w), where the stretch clips sky, so that the fit loses it.

    It is nowhere True if that is hardly anywhere, or with auto, which follows a sky that bright.
    """
    if settings.auto:
        return np.full(prepared.used.shape, False)
    sky = prepared.sky.surface(prepared.centers)  # (h, w, c)
    too_bright = sky > prepared.stretch.white
    blown = (too_bright & clipped_by_stretch(prepared)).any(-1)
    return blown & (blown.mean() > BLOWN_SHARE)


def doubts(planes: np.ndarray, prepared: Prepared) -> list[str]:
    """Return reasons to doubt that a picture is one to run the tool on, a sentence each.

    Args:
        planes: (c, h, w) linear samples.
        prepared: the same picture.
    """
    sentences = []
    linear = prepared.linear[prepared.present.all(-1)]  # (n, c)
    bright = light = False
    if linear.size:  # there are pixels of which no channel is missing
        low, median, high = np.quantile(linear, (0, 0.5, 0.999), axis=0)
        above = median - low
        bright = (high > STRETCHED_TOP) & (above > STRETCHED_MEDIAN * (high - low))
        light = median.mean() > STRETCHED_LIGHT
    if _looks_stretched(planes, np.all(bright), light):
        sentences.append("the picture looks stretched; "
                         "light can be subtracted only while the data are linear")
    if len(planes) == 1 and _looks_like_mosaic(planes[0]):
        sentences.append("the picture looks like an undebayered color picture; debayer it first")
    missing = 1 - prepared.present.mean()
    if missing > 0.5:
        sentences.append(f"{missing:.0%} of the picture is missing (0 or not finite); "
                         "check that it is the right one")
    return sentences


def _looks_stretched(planes: np.ndarray, bright: bool = False, light: bool = False) -> bool:
    """Tell whether the noise falls as the light grows, which a stretch makes it do.

    In linear data it grows, or stays. It is compared within small tiles: vignetting, and borders
    that fewer exposures reach, have another noise. If a picture is `bright`, any fall is
    enough, and in a small one, that it is bright. If its sky is `light`, so is any fall that is
    certain.
    """
    side = STRETCHED_TILE
    falls = []
    for plane in planes:
        height, width = plane.shape
        apart = math.sqrt(plane.size / 4e6)  # a few Mpix are enough
        step = 2 * side * max(1, round(apart))
        for y, x in np.ndindex(height // step, width // step):
            top = y * step
            left = x * step
            tile = plane[top:top + 2 * side, left:left + 2 * side]
            squares = tile.astype(float).reshape(side, 2, side, 2)
            squares = squares.swapaxes(1, 2)
            squares = squares.reshape(-1, 4)
            inside = (squares > 0) & (squares < 0.99)  # neither missing nor clipped
            squares = squares[inside.all(1)]
            if len(squares) > side**2 / 2:
                falls.append(_fall_of_noise(squares))
    if len(falls) < 10:  # too few to know the error
        return bright
    typical = np.median(falls)
    error = MEDIAN_NOISE * _deviation(falls - typical) / math.sqrt(len(falls))
    if bright:
        return typical > 0
    certain = typical > STRETCHED_SIGMA * error
    return bool(certain and (light or typical > STRETCHED_FALL))


def _fall_of_noise(squares: np.ndarray) -> float:
    """Return by which part the noise of 2 x 2 pixels (n, 4) falls from the dim to the bright."""
    detail = np.abs(squares @ (0.5, -0.5, -0.5, 0.5))  # no slope adds to it
    detail = np.minimum(detail, 4 * np.median(detail))  # stars
    by_light = np.argsort(squares.mean(1))
    variances = detail[by_light]**2
    ninths = [part.mean() for part in np.array_split(variances, 9)]
    dim = ninths[1] + ninths[2] + 1e-30  # without noise the fall is 0
    bright = ninths[6] + ninths[7] + 1e-30
    return 0.5 * math.log(dim / bright)


def _looks_like_mosaic(plane: np.ndarray) -> bool:
    """Tell whether pixels of one phase of a 2 x 2 mosaic agree better than pixels of two."""
    height, width = plane.shape
    down = 4 * max(1, height // 2000)  # a few Mpix are enough
    across = 4 * max(1, width // 2000)
    means = []
    errors = []
    dark = math.inf
    for y, x in np.ndindex(2, 2):
        phase = plane[y::down, x::across]
        phase = phase[_present(phase)]
        if phase.size < 1000:
            return False
        dark = min(dark, np.quantile(phase, 0.01))
        mean = scipy.stats.trim_mean(phase, 0.1, axis=None)  # a median would be an integer
        noise = _deviation(phase - np.median(phase))
        error = noise / math.sqrt(phase.size)
        means.append(mean)
        errors.append(error)
    difference = np.ptp(means)
    above_dark = np.median(means) - dark
    one_diagonal = abs(means[0] - means[3])
    other_diagonal = abs(means[1] - means[2])
    greens = min(one_diagonal, other_diagonal)
    certain = difference > 10 * max(errors)
    large = difference > MOSAIC_DIFFERENCE * above_dark
    return certain and large and greens < MOSAIC_GREENS * difference


def gradient(prepared: Prepared, fit: Fit | None = None, correction: str = "subtract") -> float:
    """Tell how uneven the sky is: its range over its level, mean of the channels.

    Before the correction it is the range of the sky that was found. After it, what the found sky
    misses of the picture counts as well: the model is like the found sky by its making.

    Args:
        prepared: with its sky.
        fit: None for the sky before, else for what the correction leaves of it.
        correction: "subtract" or "divide".

    Returns:
        NaN if too little of the picture is sure to be sky.
    """
    found = prepared.sky
    if found.unsure or found.share < GRADIENT_SHARE:
        return math.nan
    shows_sky = found.shows_sky  # (h, w)
    surface = found.surface(found.centers)  # (h, w, c)
    sky = surface[shows_sky]  # (n, c)
    level = np.maximum(np.median(sky, axis=0), 1e-12)
    if fit is not None:
        missed = found.image - surface
        missed = _smooth(missed, GRADIENT_SCALE, shows_sky)[shows_sky]
        model = linear_sky(prepared, fit)(found.centers[shows_sky])
        sky = corrected(prepared, sky + missed, model, correction)
    return float(np.mean(_span(sky, (99, 1)) / level))


def gradients(result: Result) -> str:
    """Put the gradient before and after into words."""
    before = result.gradient_before
    if math.isnan(before):
        return "gradient unknown: too little of the picture is sure to be sky"
    return f"gradient {before:.1%} of the sky's level before, {result.gradient_after:.1%} after"


def _log_numbers(prepared: Prepared, settings: Settings) -> None:
    """Log numbers to act on before the fit."""
    part = shares(prepared)
    height, width, _ = prepared.image.shape
    quantile = settings.delinearization_quantile
    logger.info(
        "reduced to {} x {}: {used:.1%} used, {masked:.1%} masked, {missing:.1%} missing; "
        "{clipped:.1%} clipped at 1 by the stretch (-dq {:g})".format(
            width, height, quantile, **part))
    for k, letter in enumerate(_channel_letters(prepared)):
        low = prepared.stretch.pedestal[k]
        high = prepared.stretch.white[k]
        logger.info(f"  {letter}: minimum {low:.6f}, median {prepared.median[k]:.6f}, "
                    f"clipped above {high:.6f}")
    share = blown_out(thinned(prepared), settings).mean()
    if share > 0:
        logger.warning(f"the stretch clips a smooth part of the picture ({share:.1%} of the "
                       "frame), most likely sky, and the fit loses it there; "
                       f"raise -dq (now {quantile:g})")


# --------------------------------------------------------------------------------------------------
# Pictures: preview, figures, animation
#
# All are drawn from the reduced picture, so a large frame costs no more than a small one; of a
# small picture, there is a close-up. Axes are those of the full-size picture, in its pixels.
# --------------------------------------------------------------------------------------------------

FIGURE_SIZE = (13.6, 7.6)
"""Inches, at 100 pixels each: fits a laptop's screen."""

FIGURE_STYLE = {
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.dpi": 100,
    "font.size": 9,
    "grid.linewidth": 0.2,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}
"""What differs from matplotlib's dark style. So pictures look the same in light and in dark windows
and notebooks."""

CHANNEL_INKS = {"L": ("white",), "RGB": ("#e8703a", "#2fb58a", "#5ab0ee")}
"""Colors of channels that color-blind people can tell apart (after Okabe and Ito)."""

OVERLAYS = {
    "missing": ("#6b7077", "", "missing"),
    "threshold": ("#e69f00", "/////", "left out by -tm, -tM"),
    "rim": ("#009e73", "-----", "left out: a dark rim"),
    "mask file": ("#56b4e9", "\\\\\\\\\\", "left out by -m"),
    "auto": ("#cc79a7", "///", "left out by --auto"),
    "clipped": ("#f0e442", "\\\\\\", "clipped by -dq"),
}
"""Reason -> its color, its stripes (none: solid), its name. Stripes tell the reasons apart where
colors do not."""

START_INK = "#56b4e9"
END_INK = "#f0e442"
"""Colors of a control point where it starts, and where it ends."""

DISPLAY_QUANTILES = (0.002, 0.5, 0.9995)
"""Quantiles of a channel that are shown as nearly black, as the background, and as white. So nearly
nothing is clipped, and no single star decides how dark the rest is."""

FRAMES = 20
FRAME_PAUSE = 130
LAST_PAUSE = 1500
"""Largest number of frames in an animation, and milliseconds that a frame and the last frame are
shown: some 4 seconds in all."""

HALF_FRAME = 3.0
"""Inches: the side of a square of the area of half a frame. With so few pixels, a GIF with the
usual noise stays below 3 MB."""


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


def to_bytes(image: np.ndarray) -> np.ndarray:
    """Take a stretched picture (h, w, c), NaN where nothing is, to bytes (h, w, 3)."""
    image = np.nan_to_num(image)
    image = 255 * np.clip(image, 0, 1)
    image = np.round(image).astype(np.uint8)
    height, width, _ = image.shape
    return np.broadcast_to(image, (height, width, 3))


def left_out(prepared: Prepared, settings: Settings) -> dict[str, np.ndarray]:
    """Tell where a thinned frame is left out or clipped: reason -> (h, w) bool, as OVERLAYS."""
    clipped = clipped_by_stretch(prepared).any(-1) & prepared.used
    return {**mask_reasons(prepared, settings), "clipped": clipped}


def striped(prepared: Prepared, areas: dict[str, np.ndarray]) -> np.ndarray:
    """Return the picture as the fit would see it, and over it in stripes what it would not.

    Args:
        prepared: thinned.
        areas: as of `left_out`.

    Returns:
        Bytes (h, w, 3), larger than `prepared` where that is small.
    """
    from matplotlib.colors import to_rgb
    stretched = prepared.stretch.apply(_drawn(prepared))
    times = math.ceil(VIEW_PIXELS / max(stretched.shape))
    colors = to_bytes(stretched).repeat(times, 0).repeat(times, 1)
    height, width, _ = colors.shape
    row, column = np.ogrid[:height, :width]
    lines = {"": 0 * row, "/": row + column, "\\": row - column, "-": row}
    for reason, (color, hatch, _) in OVERLAYS.items():
        area = areas[reason]
        if not area.any():
            continue
        rows, columns = area.shape
        area = area[row * rows // height, column * columns // width]
        edge = area & ~scipy.ndimage.binary_erosion(area, iterations=2)
        period = 36 // max(len(hatch), 1)
        stripes = lines[hatch[:1]] % period < max(period // 3, not hatch)
        colors[area & ~stripes] //= 2  # darker between them, so that these are seen on any color
        ink = 255 * np.array(to_rgb(color))
        colors[area & stripes | edge] = ink.astype(np.uint8)
    return colors


def draw_preview(figure, prepared: Prepared, settings: Settings, title: str,
                 said: list[str]) -> None:
    """Draw what helps to choose settings.

    That is the picture, what the fit would see of it, what stands out, a histogram, and what was
    said of it.
    """
    prepared = thinned(prepared)
    areas = left_out(prepared, settings)
    (picture, stretched, hints), (histogram,) = _lay_out(figure, title, said, (2,))
    shape = prepared.full_shape
    linear = _drawn(prepared)
    shown = to_bytes(display_stretch(linear).apply(linear))
    show(picture, shown, shape, "the picture, plain stretch")
    words = "stretched as for the fit, and what is left out"
    show(stretched, striped(prepared, areas), shape, words)
    add_legend(stretched, areas)
    _draw_hints(hints, prepared, settings)
    _draw_histogram(histogram, prepared, settings)


def _drawn(prepared: Prepared) -> np.ndarray:
    """Return the linear picture (h, w, c) as it is drawn."""
    return prepared.linear if prepared.close_up is None else prepared.close_up


def _lay_out(figure, title, said, widths):
    """Give a figure a title, three axes, axes of such widths below them, and words beside these.

    Returns the axes above and below.
    """
    figure.suptitle(title, x=0.015, ha="left", fontsize=11)
    cells = figure.add_gridspec(
        2, 1, height_ratios=(1.5, 1),
        left=0.025, right=0.985, top=0.915, bottom=0.085, hspace=0.35)
    above = cells[0].subgridspec(1, 3, wspace=0.03)
    below = cells[1].subgridspec(1, len(widths) + 1, width_ratios=(*widths, 1.6), wspace=0.15)
    above, below = [list(map(figure.add_subplot, part)) for part in (above, below)]
    words = below.pop()
    words.axis("off")
    lines = [textwrap.fill(line, 80, subsequent_indent="  ") for line in said]
    text = "\n".join(lines).encode("utf-8", "replace").decode()  # names may hold anything
    words.text(0, 1, text, va="top", fontsize=8, parse_math=False)
    return above, below


def _extent(shape):
    """Return where the sides of a full-size frame (h, w) are, in its pixels, for matplotlib."""
    height, width = shape
    return -0.5, width - 0.5, height - 0.5, -0.5


def show(axes, image: np.ndarray, shape: tuple[int, int], title: str, **look):
    """Draw bytes (h, w, 3), or values (h, w), over a full-size frame; returns what was drawn."""
    interpolation = "antialiased"
    if max(image.shape) < 300:  # pixels: it is enlarged, and should not look like a mosaic
        interpolation = "bicubic"
    axes.set_title(title)
    axes.set(xticks=[], yticks=[])
    look = {"interpolation": interpolation, **look}
    return axes.imshow(image, extent=_extent(shape), **look)


def add_legend(axes, areas: dict[str, np.ndarray], columns: int = 2) -> None:
    """Say below a picture what the stripes in it mean, and of how much of it."""
    from matplotlib.patches import Patch
    legend = []
    for reason, (color, hatch, label) in OVERLAYS.items():
        share = areas[reason].mean()
        if share > 0:
            label += f" ({share:.1%})"
            legend.append(Patch(facecolor=color, edgecolor="black", hatch=hatch, label=label))
    axes.legend(handles=legend, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=columns)


def _draw_histogram(axes, prepared, settings):
    """Draw how often the stretched values of each channel occur, and what is made of them."""
    letters = _channel_letters(prepared)
    for k, ink in enumerate(CHANNEL_INKS[letters]):
        values = prepared.image[..., k]
        for counted, filled in ((prepared.present, False), (prepared.weight > 0, True)):
            counts, edges = np.histogram(values[counted[..., k]], 128, (0, 1))
            axes.stairs(counts, edges, fill=filled, color=ink, alpha=0.3 if filled else 1)
    axes.set_title("how often a stretched value occurs (filled: used; heights are logarithmic)")
    axes.set_yscale("symlog", linthresh=1)
    axes.yaxis.set_visible(False)
    left, right = -0.02, 1.02  # a little beyond 0 and 1, so that these can be seen
    axes.set_xlim(left, right)
    color, hatch, _ = OVERLAYS["threshold"]
    for threshold, end in ((settings.threshold_min, left), (settings.threshold_max, right)):
        axes.axvspan(threshold, end, facecolor="none", edgecolor=color, hatch=hatch)
    axes.axvline(MIDTONES_TARGET, linestyle=":")
    quantile = settings.delinearization_quantile
    axes.set_xticks([0, MIDTONES_TARGET, 0.5, 0.75, 1],
                    ["minimum", "median", "0.5", "0.75", f"-dq {quantile:g}"])


def _draw_hints(axes, prepared: Prepared, settings: Settings) -> None:
    """Draw the picture less the sky that was found.

    What stands out is not sky, and may be mistaken for it unless it is masked.
    """
    known = prepared.present.all(-1)  # (h, w)
    sky = prepared.sky.surface(prepared.centers)  # (h, w, c)
    residual = (prepared.linear - sky).mean(-1)
    residual = np.where(known, residual, 0)
    residual = scipy.ndimage.gaussian_filter(residual, max(known.shape) / 300)
    limit = 6 * float(np.median(np.abs(residual[known]))) if known.any() else 0.0
    if limit == 0:  # nothing to see
        limit = 1.0
    residual = np.where(known, residual, np.nan)
    drawn = show(axes, residual, prepared.full_shape,
                 "less the sky that was found: orange above, purple below",
                 cmap="PuOr_r", vmin=-limit, vmax=limit, interpolation="nearest")
    ticks = np.array((-limit, 0, limit))
    bar = _draw_scale(axes, drawn, ticks)
    labels = map("{:+.0%}".format, ticks / np.mean(sky))
    bar.set_xticklabels(labels)
    blown = blown_out(prepared, settings)
    if blown.any() and min(blown.shape) > 1:
        axes.contour(blown, [0.5], colors="#d7191c", linewidths=2, origin="upper",
                     extent=_extent(prepared.full_shape))
        axes.set_xlabel("outlined: sky blown out, raise -dq", color="#ff8a80", weight="bold",
                        labelpad=28)


def before_model_after(prepared: Prepared, sky: Callable, correction: str) -> list[np.ndarray]:
    """Return the picture as it is drawn, a model of its sky, and what is left, (h, w, c) linear.

    Args:
        prepared: thinned.
        sky: takes frame coordinates (..., 2) to the linear sky there, (..., c).
        correction: "subtract" or "divide".
    """
    before = _drawn(prepared)
    model = SkyModel(sky, before.shape[:2])
    model = np.stack(list(model), -1)
    return [before, model, corrected(prepared, before, model, correction)]


def draw_figures(figure, result: Result, title: str, said: list[str]) -> None:
    """Draw the result: before, model, after; what was called sky, control points, loss, words."""
    fit = result.fit
    prepared = thinned(result.prepared)
    shape = prepared.full_shape
    above, (points, loss) = _lay_out(figure, title, said, (1.2, 1))
    sky = linear_sky(prepared, fit)
    pictures = before_model_after(prepared, sky, result.settings.correction)
    stretch = display_stretch(pictures[0])
    titles = "before", "model, same stretch, lines of equal brightness", "after, same stretch"
    for axes, picture, words in zip(above, pictures, titles):
        show(axes, to_bytes(stretch.apply(picture)), shape, words)
    lines = draw_contours(above[1], pictures[1].mean(-1), shape)
    if lines is not None:
        bar = _draw_scale(above[1], lines, lines.levels[::2])
        for line in bar.collections:
            line.set_linewidth(5)

    areas = left_out(prepared, result.settings)
    words = "what was called sky; control points, from ring to dot"
    show(points, striped(prepared, areas), shape, words)
    add_legend(points, areas)
    _draw_control_points(points, fit, shape)
    loss.plot(fit.history[:, 0])
    loss.set_title("loss of the epochs")
    loss.grid()


def _draw_control_points(axes, fit, shape):
    """Draw the paths of the control points of a fit over a picture of this shape."""
    stations = [positions for _, positions, _ in fit.track]
    paths = np.stack([*stations, fit.positions]) * max(shape) - 0.5  # (steps, n, 2) pixels
    row, column = np.moveaxis(paths, -1, 0)  # (steps, n) each
    axes.plot(column, row, color=START_INK, linewidth=0.9, alpha=0.8)
    ring = dict(color="none", markeredgecolor=START_INK, markersize=3.5)
    axes.plot(column[0], row[0], "o", **ring)
    axes.plot(column[-1], row[-1], "o", color=END_INK, markeredgecolor="black", markersize=5)
    axes.margins(0.04)  # points may leave the picture a little


def animation_frames(prepared: Prepared, fit: Fit, correction: str = "subtract") -> np.ndarray:
    """Show how the surface and its control points settle, and the picture that they leave.

    Args:
        prepared: what was fitted.
        fit: with its path.
        correction: "subtract" or "divide".

    Returns:
        (n, h, w, 3) bytes, n up to FRAMES: the first frame at the start, the last with the final
        surface.
    """
    height, width = shape = prepared.full_shape
    wide = HALF_FRAME * math.sqrt(width / height)  # inches
    wide = min(wide, 4.0)
    tall = wide * height / width
    prepared = thinned(prepared, round(100 * max(wide, tall)))
    stretch = display_stretch(_drawn(prepared))
    head = tall / (tall + 0.3)  # the rest is for the words
    frames = []
    # Most happens early, so the steps are at equal distances of the square root of the epoch
    last = len(fit.track) - 1
    chosen = np.unique(np.round(last * np.linspace(0, 1, FRAMES - 1)**2).astype(int))
    steps = [(f"epoch {epoch}", *points) for epoch, *points in map(fit.track.__getitem__, chosen)]
    steps.append((f"best of {len(fit.history)} epochs", fit.positions, fit.values))
    with drawing_style():
        figure = _empty_figure((2 * wide, tall + 0.3))
        panels = figure.subplots(1, 2, gridspec_kw=dict(
            left=0.01, right=0.99, bottom=0.01, top=head, wspace=0.02))
        for words, positions, values in steps:
            sky = linear_sky(prepared, replace(fit, positions=positions, values=values))
            _, *pictures = before_model_after(prepared, sky, correction)
            titles = f"sky model, {words}", "the picture without it"
            for axes, picture, title in zip(panels, pictures, titles):
                axes.clear()
                show(axes, to_bytes(stretch.apply(picture)), shape, title)
            row, column = positions.T * max(shape) - 0.5
            panels[0].plot(column, row, "o", color=END_INK, markeredgecolor="black", markersize=5)
            panels[0].axis(_extent(shape))
            figure.canvas.draw()
            frames.append(np.array(figure.canvas.buffer_rgba())[..., :3])
    return np.stack(frames)


def write_animation(file, frames: np.ndarray) -> None:
    """Write frames, (n, h, w, 3) bytes, as a GIF that repeats."""
    from PIL import Image
    first, *others = map(Image.fromarray, frames)
    pauses = [FRAME_PAUSE] * len(others) + [LAST_PAUSE]
    first.save(file, "GIF", save_all=True, append_images=others, duration=pauses, loop=0)


def _channel_letters(prepared):
    """Return a letter for each channel."""
    return "RGB" if prepared.image.shape[-1] == 3 else "L"


def draw_contours(axes, values: np.ndarray, shape: tuple[int, int]):
    """Draw lines of equal brightness (h, w); returns them, or None where there are none."""
    low, high = np.quantile(values, (0.005, 0.995))
    if high - low < 1e-9 or min(values.shape) == 1:  # flat, or too narrow for contours
        return None
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator
    levels = MaxNLocator(8).tick_values(low, high)
    brightness = np.linspace(0.4, 1, len(levels))  # without the dark colors of the map
    colors = colormaps["plasma"](brightness)
    return axes.contour(values, levels, colors=colors, linewidths=1.3, origin="upper",
                        extent=_extent(shape))


def _draw_scale(axes, drawn, ticks):
    """Draw a color bar below a panel; returns its axes."""
    bar = axes.inset_axes([0.02, -0.06, 0.96, 0.025])
    axes.figure.colorbar(drawn, cax=bar, orientation="horizontal", ticks=ticks)
    bar.tick_params(labelsize=7, length=0, pad=2)
    return bar


def drawing_style() -> ContextManager:
    """Return a context in which matplotlib draws in our colors.

    It works also where a notebook has handed down the name of its own backend, which this Python
    may not have.
    """
    backend = os.environ.get("MPLBACKEND", "")
    scheme, _, module = backend.partition("://")
    package, _, _ = module.partition(".")
    if scheme == "module" and importlib.util.find_spec(package) is None:
        del os.environ["MPLBACKEND"]
    from matplotlib import style
    return style.context(["dark_background", FIGURE_STYLE])


def _empty_figure(size):
    """Return a figure of so many inches that needs no display, and is not pyplot's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    return FigureCanvasAgg(Figure(size)).figure


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
        with drawing_style():
            from matplotlib import pyplot
            canvas = pyplot.figure().canvas
            kind = getattr(canvas, "required_interactive_framework", None)
            pyplot.close()
    except Exception:  # no toolkit, no screen, or a notebook's backend handed down to a subprocess
        return None
    del canvas
    gc.collect()  # here: Tk ends the process if another thread comes to delete its objects
    return "window" if kind else None


def put_picture(draw: Callable, where: str, path: str) -> None:
    """Draw and show, or save.

    Args:
        draw: gets the empty figure.
        where: "notebook", "window" or "file".
        path: of the file.
    """
    with drawing_style():
        if where == "window":
            from matplotlib import pyplot
            draw(pyplot.figure(figsize=FIGURE_SIZE))
            return
        figure = _empty_figure(FIGURE_SIZE)
        draw(figure)
        if where == "file":
            with atomic_outputs(path) as (file,):
                figure.savefig(file, format="png", pil_kwargs={"compress_level": 3})
            return
        from IPython.display import Image, display
        packed = io.BytesIO()
        figure.savefig(packed, format="png")
        display(Image(packed.getvalue()))


# --------------------------------------------------------------------------------------------------
# One picture, from file to files
# --------------------------------------------------------------------------------------------------

TENSORFLOW_BYTES = 0.6e9
TENSORFLOW_MAPS = 1.2e9
"""Memory that TensorFlow and the fit take, about, in bytes; and addresses that they take and never
fill, which count where `ulimit -v` limits. Measured with TensorFlow 2.15."""

PLANES_TO_WRITE = 6
PLANES_TO_COMPRESS = 12
"""Memory that writing takes at most, in planes of the picture. Measured were 5.3 (FITS and TIFF, if
not in [0, 1]), and with --compress 9.5 (XISF) and 11.7 (FITS)."""

MEMORY_LIMITS = "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"
"""Where Linux tells how much memory a container may fill: in version 2 and in version 1."""


@dataclass(frozen=True)
class Task:
    """One picture to do: what to read, what to write, and how."""

    input_file: str
    mask_file: str | None
    reference_file: str | None
    settings: Settings
    outputs: dict[str, str]  # "model", "subtracted", "mask" or "animation" -> its path
    figure: str  # path of the figure or the preview, if it is saved
    place_for_figure: str | None  # "notebook", "window", "file", or None
    format: str  # of the outputs, a key of FORMATS
    compress: bool

    @property
    def title(self) -> str:
        """The name of the picture, as it can be drawn."""
        name = os.path.basename(self.input_file)
        name = name.encode("utf-8", "replace").decode()
        return name.replace("$", r"\$")  # matplotlib would take it for a formula

    @property
    def written(self) -> list[str]:
        """The paths of all that is written."""
        figure = [self.figure] if self.place_for_figure == "file" else []
        return [*self.outputs.values(), *figure]


def _make_task(path: str, options: argparse.Namespace, settings: Settings,
               place: str | None) -> Task:
    """Return the task that does the picture at this path.

    Nobody shall wait for what cannot be saved: a BgError is raised if a file is not there, or would
    be overwritten.
    """
    given = [name for name in (path, options.mask, options.reference) if name is not None]
    _check_given(given)
    name = output_format(path, options)
    ending = FORMATS[name].ending
    start = os.path.join(options.output_path, picture_stem(path))
    what = "bgSubtracted" if settings.correction == "subtract" else "bgDivided"
    outputs = {}
    if not options.preview:
        outputs["model"] = f"{start}_bgModel{ending}"
        outputs["subtracted"] = f"{start}_{what}{ending}"
    if options.save_mask:
        outputs["mask"] = f"{start}_mask{ending}"
    if options.animate:
        outputs["animation"] = f"{start}_optimization.gif"
    figure = f"{start}_preview.png" if options.preview else f"{start}_figures.png"
    for output in [*outputs.values(), figure]:
        _check_output(output, given)
    return Task(
        path, options.mask, options.reference, settings, outputs, figure, place, name,
        options.compress)


def output_format(path: str, options: argparse.Namespace) -> str:
    """Return the format of what is written for the picture at this path, a key of FORMATS."""
    return options.format or picture_format(path) or "xisf"


def _check_given(paths: list[str]) -> None:
    """Refuse paths to read that are no files."""
    for path in paths:
        if not os.path.exists(path):
            raise BgError(f"{path or 'a file without a name'} does not exist; check the name")
        if os.path.isdir(path):
            raise BgError(f"{path} is a folder; name an XISF, FITS or TIFF file in it")


def _check_output(path: str, kept: list[str]) -> None:
    """Refuse a path to write that is a folder, or one of the files to keep."""
    if os.path.isdir(path):
        raise BgError(f"{path} is a folder, and a file of that name is to be written; "
                      "choose another output folder")
    if any(_is_same(path, other) for other in kept):
        raise BgError(f"{path} would be overwritten, and you gave it to read; "
                      "choose another output folder")


def _is_same(path: str, other: str | None) -> bool:
    """Tell whether two paths, or none, lead to one file."""
    there = other is not None and os.path.exists(path) and os.path.exists(other)
    return there and os.path.samefile(path, other)


def _check_folder(options: argparse.Namespace) -> None:
    """Make the folder for the outputs, if anything may be written."""
    folder = options.output_path
    if options.preview and options.figures in ("show", "none"):
        return
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError:
        raise BgError(f"{folder} is a file, not a folder; name a folder for the outputs") from None
    except OSError as error:
        raise BgError(f"cannot write to {folder}: {error.strerror}; "
                      "choose another folder") from None
    except ValueError:  # a NUL, or what this system's names cannot hold
        raise BgError(f"{folder!r} holds a character that no name of a folder can have; "
                      "choose another folder") from None


def process_file(task: Task, watched: ContextManager = nullcontext(),
                 opened: Callable[[str], OpenedReference] = open_reference) -> Result:
    """Take the sky out of one picture, from file to files.

    Args:
        task: its paths have been checked.
        watched: as for `remove_sky`.
        opened: takes the path of a reference to what `open_reference` gives.

    Raises:
        BgError: the picture cannot be done.
    """
    with _heard() as said, atomic_outputs(*task.outputs.values()) as files:
        picture, mask, reference = read_inputs(task, opened)
        result = remove_sky(
            picture.planes, task.settings, mask, picture.unit, watched, reference)
        _write_outputs(task, picture, result, files)
    _put_figure(task, draw_figures, result=result, said=said)
    return result


def preview_file(task: Task) -> None:
    """Draw the preview of one picture."""
    with _heard() as said:
        picture, mask, reference = read_inputs(task)
        prepared, settings = examine(picture.planes, task.settings, mask, reference=reference)
    _put_figure(task, draw_preview, prepared=prepared, settings=settings, said=said)


def _put_figure(task: Task, draw: Callable, **what) -> None:
    """Draw a figure of something where the task wants it."""
    if task.place_for_figure is not None:
        draw = functools.partial(draw, title=task.title, **what)
        put_picture(draw, task.place_for_figure, task.figure)


def read_inputs(task: Task, opened: Callable[[str], OpenedReference] = open_reference) -> tuple[
        Picture, np.ndarray | None, Reference | None]:
    """Read what a task names: the picture, its mask (1 or c, h, w), and its reference.

    What the picture is, and what its file has or loses, is logged.
    """
    picture = read_picture(task.input_file)
    for text in picture.warnings:
        logger.warning(f"{task.input_file} {text}")
    count, height, width = picture.planes.shape
    colors = "gray" if count == 1 else "RGB"
    line = f"{task.input_file}: {width} x {height}, {colors}, {picture.planes.dtype}"
    if picture.note:
        line += f"; {picture.note}"
    logger.info(line)
    lone = keep_dark_samples(picture.planes)
    if lone:
        logger.info(f"{lone} lone samples of 0 are taken for dark sky, not for missing data")
    if "model" in task.outputs:  # there will be a fit
        _check_room(task, picture.planes)
        _start_importing()
    mask = _read_mask(task.mask_file)
    reference = None
    if task.reference_file is not None:
        factor = task.settings.downscaling_factor
        reference = read_reference(task.reference_file, picture, factor, opened)
    return picture, mask, reference


def _read_mask(path):
    """Return the weights that a mask file gives, (c, h, w); None without a file."""
    if path is None:
        return None
    picture = read_mask(path)
    for text in picture.warnings:
        logger.warning(f"{path} {text}")
    return picture.planes


def _check_room(task: Task, planes: np.ndarray) -> None:
    """Refuse if the outputs do not fit on the disk, and warn if the work may not fit into memory.

    A system that is short of memory ends the run without a word.
    """
    folder = os.path.dirname(task.outputs["model"]) or "."
    needed = len(task.outputs) * planes.nbytes  # an animation is smaller than that
    free = shutil.disk_usage(folder).free
    if free < needed and not task.compress:  # nobody knows how large those will be
        raise BgError(f"{folder} has {free / 1e6:.3g} MB free and the outputs need "
                      f"{needed / 1e6:.3g} MB; free space, choose another folder, "
                      "or try --compress")
    count = PLANES_TO_COMPRESS if task.compress else PLANES_TO_WRITE
    needed = TENSORFLOW_BYTES + count * planes[0].nbytes
    free = _free_memory()
    if free < needed:
        logger.warning(f"about {needed / 1e9:.1f} GB more memory is needed and "
                       f"{free / 1e9:.1f} GB are free; if the run dies, close other programs, "
                       "or crop the picture or split its channels")


def _free_memory() -> float:
    """Return the bytes that this process may still fill, as Linux tells it; elsewhere infinity."""
    free = [math.inf]
    with suppress(ImportError, OSError):  # another system, or one that hides this
        import resource
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        pages = Path("/proc/self/statm").read_text().split()
        mapped, filled = [int(number) * resource.getpagesize() for number in pages[:2]]
        if limit != resource.RLIM_INFINITY:
            free.append(limit - mapped - TENSORFLOW_MAPS)
        for path in MEMORY_LIMITS:
            with suppress(OSError, ValueError):  # no such container, or "max"
                free.append(int(Path(path).read_text()) - filled)
        available = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
        if available:
            free.append(1024 * int(available[1]))
    return max(0, min(free))


@functools.lru_cache(maxsize=None)  # so that only the first call does anything
def _start_importing() -> None:
    """Import TensorFlow beside stretching and reducing.

    Who needs it waits for this import, or sees it fail again.
    """
    ours = sys.stderr is sys.__stderr__  # else somebody has replaced it
    if ours and sys.stderr is not None:
        # Keep our stderr on a descriptor of its own: descriptor 2 is silenced below
        own = os.dup(2)
        sys.stderr = open(own, "w", buffering=1, encoding=sys.stderr.encoding,
                          errors="backslashreplace")
    threading.Thread(target=_import_silently, daemon=True).start()


def _import_silently() -> None:
    """Import TensorFlow and do its first operation, with stderr led to nowhere.

    Both print a page of log lines from C++, and no setting silences all of them.
    """
    with suppress(Exception):  # there is no stderr, no TensorFlow, or a GPU that does not start
        kept = os.dup(2)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        collects = gc.isenabled()
        gc.disable()  # else it looks through all that is imported, time and again: half a second
        try:
            import_tensorflow().zeros(1)
            importlib.import_module("scipy.interpolate")  # for `SkyModel`, beside the fit
        finally:
            if collects:
                gc.enable()
            os.dup2(kept, 2)
            os.close(kept)
            os.close(nowhere)


def _write_outputs(task: Task, picture: Picture, result: Result, opened: list) -> None:
    """Write what a task asks for into its opened files."""
    history = _history(task, result)
    write = FORMATS[task.format].write
    own = picture.source, picture.unit
    pictures = {
        "model": (result.sky, *own, "the sky"),
        "subtracted": (result.planes, *own, "the picture without the sky"),
    }
    if "mask" in task.outputs:
        mask = full_mask(result.prepared, result.settings)
        pictures["mask"] = mask, rows_of(picture.source), Unit(), "the mask, 1 = sky"
    files = dict(zip(task.outputs, opened))
    for kind, (planes, metadata, unit, what) in pictures.items():
        lines = history + [f"bgoptimizer: this is {what}"]
        write(files[kind], planes, metadata, lines, task.compress, unit)
    if "animation" in files:
        correction = result.settings.correction
        frames = animation_frames(result.prepared, result.fit, correction)
        write_animation(files["animation"], frames)


def _history(task: Task, result: Result) -> list[str]:
    """Return HISTORY lines: what made this picture, to the last setting.

    The first is the same in all pictures of one run, and in no other picture: its time has
    microseconds.
    """
    settings = result.settings
    fit = result.fit
    now = datetime.now(timezone.utc)
    date = now.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    lines = [f"{name} = {value}" for name, value in vars(settings).items()]
    mask = None if task.mask_file is None else os.path.basename(task.mask_file)
    lines.append(f"mask = {mask}")
    lines += _facts_of_reference(result.prepared)
    lines.append(f"control points used = {len(fit.positions)}")
    lines.append(fit.stopped)
    what = "offset" if settings.correction == "subtract" else "model's median"
    for channel, offset in enumerate(result.offsets):
        lines.append(f"{what} of channel {channel} = {offset:.9g}")
    lines += _versions()
    lines = [f"bgoptimizer: {line}" for line in lines]
    return [f"bgoptimizer {VERSION}, {date}"] + lines


def _facts_of_reference(prepared: Prepared) -> list[str]:
    """Return lines that tell what reference was given, and what became of it."""
    reference = prepared.reference
    if reference is None:
        return []
    lines = [f"reference = {reference.name}, SHA-256 {reference.checksum}"]
    shared = prepared.sky.shared
    if shared is not None:
        lines.append(f"the reference {shared.verdict}; {'used' if shared.used else 'not used'}")
        lines += gains_in_words(shared)
    return lines


def _versions() -> list[str]:
    """Return lines that tell the versions of what a result depends on, as pip takes them."""
    lines = [f"Python {platform.python_version()}"]
    for name in ("tensorflow", "tensorflow-addons", "keras", "numpy", "scipy", "scikit-image"):
        with suppress(importlib.metadata.PackageNotFoundError):
            lines.append(f"{name}=={importlib.metadata.version(name)}")
    return lines


class _Interrupts:
    """Ctrl-C, or another wish to end the run, that cannot get lost.

    A module that is being imported may swallow it. TensorFlow may crash when it is interrupted, so
    nothing is raised while `patient`: then `check` does it.
    """

    def __init__(self):
        self.asked = 0  # number of the signal
        self.patient = False
        self.before = {}

    def __enter__(self):
        names = "SIGINT", "SIGTERM", "SIGHUP"
        for number in [getattr(signal, name) for name in names if hasattr(signal, name)]:
            before = signal.getsignal(number)
            if before not in (None, signal.SIG_IGN):  # `nohup` has a command ignore HUP
                with suppress(ValueError):  # signals reach the main thread only
                    signal.signal(number, self._listen)
                    self.before[number] = before
        return self

    def _listen(self, number, _):
        self.asked = number
        if not self.patient:
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raise what was swallowed, or held back while `patient`."""
        if self.asked:
            raise KeyboardInterrupt

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


@contextmanager
def _watched_fit(epochs: int, interrupts: _Interrupts) -> Iterator[Callable[[int, float], None]]:
    """Show how a fit goes on, and end it cleanly after Ctrl-C; yields what `on_epoch` is.

    On a terminal a bar moves. Elsewhere every 100th epoch is told.
    """
    with _bar(epochs, "epoch") as bar:
        def on_epoch(epoch, loss):
            interrupts.check()
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update()
            if bar.disable and epoch % 100 == 0:
                logger.info(f"epoch {epoch:4d}  loss {loss:.4f}")

        interrupts.check()
        interrupts.patient = True
        try:
            yield on_epoch
        finally:
            interrupts.patient = False
        interrupts.check()


def _bar(total: int, unit: str):
    """Return a bar of tqdm, which shows nothing but on a terminal, and only if we may talk."""
    from tqdm import tqdm
    terminal = sys.stderr is not None and sys.stderr.isatty()  # None if the caller has closed it
    shown = terminal and logger.isEnabledFor(logging.INFO)
    return tqdm(total=total, unit=unit, leave=False, disable=not shown)


@contextmanager
def _logging_to(*handlers: logging.Handler) -> Iterator[None]:
    """Let only these handlers hear what is logged, from the level of the first."""
    before = logger.handlers[:], logger.propagate, logger.level
    logger.handlers[:] = handlers
    logger.propagate = False
    logger.setLevel(handlers[0].level)
    try:
        yield
    finally:
        logger.handlers[:], logger.propagate, level = before
        logger.setLevel(level)


@contextmanager
def _heard(mark: str = "warning: ") -> Iterator[list[str]]:
    """Collect what is logged meanwhile, a sentence each, with this mark before warnings."""
    said = []

    def write(record):
        doubt = mark if record.levelno >= logging.WARNING else ""
        said.append(doubt + record.getMessage())

    handler = logging.Handler()
    handler.emit = write
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def _told(error: Exception) -> str:
    """Return one sentence on what went wrong."""
    if isinstance(error, BgError):
        return " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return ("there is not enough memory; "
                "close other programs, crop the picture, or split its channels")
    if isinstance(error, OSError):
        name = error.filename or "a file"
        reason = error.strerror or error
        return f"{name}: {reason}; check the path, the disk, your rights"
    if isinstance(error, ImportError):
        return (f"{error.name} cannot be imported; "
                "install it with: python -m pip install -r requirements.txt")
    reason = " ".join(str(error).split())
    return (f"unexpected {type(error).__name__}: {reason[:300]}; "
            "this is a bug, please report it with your command")


# --------------------------------------------------------------------------------------------------
# Preview to work in: a window, and a panel in notebooks
#
# A `View` is all that can be chosen. The handlers of a `Preview` replace it, and `draw` draws from
# it; a window and a panel differ in their widgets only. All is computed by the functions of the
# command line, so the command that is told does the same.
# --------------------------------------------------------------------------------------------------

WINDOW_SIZE = (13.0, 6.2)
"""Inches, at 100 pixels each: fits a screen of 1366 x 768 pixels with the window's frame."""

PANEL_SIZE = (9.0, 5.5)

LADDER = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999, 1.0)
"""Values of -dq. What they leave above them falls by even steps, to about a half each."""

LOOK_AFTER = 0.4
"""Seconds after the last move until the sky is looked for anew."""

TICK = 200
"""Milliseconds between two looks at what the thread does."""

VIEWS = ("picture", "model", "result")

BUTTONS = {
    "blink": "Picture, model, result  [space]",
    "undo": "Undo the last drawing  [z]",
    "train": "Take the sky out  [t]",
    "stop": "Stop  [escape]",
    "write": "Write  [w]",
    "close": "Close  [q]",
}
"""Methods of the window: what their buttons say, with their keys."""

MOVES = {
    "left": ("-dq", -1), "right": ("-dq", 1),
    "down": ("-tm, -tM", (0, -0.01)), "up": ("-tm, -tM", (0, 0.01)),
    "[": ("-tm, -tM", (-0.001, 0)), "]": ("-tm, -tM", (0.001, 0)),
    "-": ("smoothing", -1), "+": ("smoothing", 1),
}
"""Key -> a slider, and by how much the key moves it."""

HELP = ("Keys: left, right -dq;  down, up -tM;  [ ] -tm;  - + smoothing.\n"
        "Draw around what is to be left out; with Shift it is given back.")


@dataclass(frozen=True)
class View:
    """What is chosen: what a run would do, and what is shown of it."""

    settings: Settings  # None where nothing was asked for, as on the command line
    drawn: np.ndarray  # (h, w) of the reduced frame: 0 left out, 1 given back, NaN not drawn on
    shown: str = "picture"  # one of VIEWS

    @property
    def is_drawn_on(self) -> bool:
        return bool(np.isfinite(self.drawn).any())


class Preview:
    """A picture, the view that is chosen of it, and the handlers that change the view."""

    def __init__(self, options: argparse.Namespace, settings: Settings, picture: Picture,
                 mask: np.ndarray | None, reference: Reference | None = None):
        """Look for the sky.

        Args:
            options, settings: of the command line.
            picture, mask, reference: as `read_inputs` gives them.
        """
        self.options = argparse.Namespace(**{**vars(options), "preview": False})
        self.picture = picture
        self.mask = mask
        black = -picture.unit.offset / picture.unit.scale
        with _heard() as self.said:
            self.reduced, resolved = examine(picture.planes, settings, mask, black, reference)
        quantiles = {*LADDER, resolved.delinearization_quantile}
        self.stretches, _ = measure_stretches(picture.planes, sorted(quantiles))
        smoothings = {*SMOOTHINGS, settings.smoothing} - {None}
        self.rungs = {"-dq": list(self.stretches), "smoothing": [None, *sorted(smoothings)]}
        self.view = View(settings, np.full(self.reduced.used.shape, np.nan, np.float32))
        self.trained = None  # a view and its Result
        self.written = None  # path of the mask that was drawn here
        self.status = HELP
        self.moved = math.inf  # when something was changed for which to look for the sky
        self.showing = False  # widgets are set to the view: their handlers have nothing to do
        self.prepared, self.settings = self._prepare()
        self.looked = self._what_sky_needs()

    # --- Handlers: they change the view ---

    def change(self, drawn: np.ndarray | None = None, **changes) -> None:
        """Change settings or the drawing, if a fit could do with them."""
        if self.showing:
            return
        before = self.view
        self.status = HELP
        try:
            settings = replace(before.settings, **changes)
            drawn = before.drawn if drawn is None else drawn
            self.view = replace(before, settings=settings, drawn=drawn)
            self.prepared, self.settings = self._prepare()
            self.moved = time.monotonic()
            self.said = []  # it was said of something else
        except (ValueError, BgError) as error:
            self.view = before
            self.status = str(error)
        self.refresh()

    def slide(self, name, value):
        """Take what a slider stands at: a rung, or the two thresholds."""
        if name == "-tm, -tM":
            low, high = np.round(value, 3).tolist()
            self.change(threshold_min=low, threshold_max=high)
        elif name == "-dq":
            self.change(delinearization_quantile=self.rungs[name][int(value)])
        else:
            self.change(smoothing=self.rungs[name][int(value)])

    def check(self, auto, divide):
        self.change(auto=auto, correction="divide" if divide else "subtract")

    def turn_to(self, shown):
        self.view = replace(self.view, shown=shown)
        self.refresh()

    def look(self) -> Callable:
        """Return what finds the sky of the view, if it can be another one, and tells of it."""
        prepared, settings, known = self.prepared, self.settings, self.reduced.sky
        needs = self._what_sky_needs()
        same = needs == self.looked

        def work():
            sky = known if same else find_sky(prepared, settings)
            judge(self.picture.planes, prepared, settings, sky)
            return needs, sky

        return work

    def found(self, given) -> None:
        self.looked, sky = given
        self.reduced = replace(self.reduced, sky=sky)

    def _what_sky_needs(self):
        return self.settings.smoothing, self.settings.auto, self.prepared.used.tobytes()

    # --- From the view to what is shown and run ---

    def refresh(self) -> None:
        """Show all anew."""

    def _prepare(self):
        """Return what the fit would see of the view before the sky is known, and the settings."""
        settings = self.view.settings.resolved()
        weight = self.reduced.user_mask
        if self.view.is_drawn_on:
            drawn = self.view.drawn[..., None]
            weight = np.where(np.isnan(drawn), 1 if weight is None else weight, drawn)
        prepared = replace(self.reduced, user_mask=weight)
        stretch = self.stretches[settings.delinearization_quantile]
        return prepare_again(prepared, self.picture.planes, stretch, settings), settings

    def draw(self, axes) -> None:
        """Draw what the view shows of the picture."""
        settings = self.settings
        shown = self.view.shown
        prepared = thinned(with_sky(self.prepared, settings, self.reduced.sky))
        for old in (*axes.images, *axes.collections, axes.get_legend()):
            if old is not None:
                old.remove()
        if shown == "picture":
            areas = left_out(prepared, settings)
            colors = striped(prepared, areas)
            add_legend(axes, areas, 5)
            title = "the picture as the fit would see it, and what is left out"
        else:
            pictures = before_model_after(prepared, self._sky(), settings.correction)
            picture = pictures[VIEWS.index(shown)]
            colors = to_bytes(prepared.stretch.apply(picture))
            title = f"the {shown}, same stretch"
            title += "" if self._result() else " (the sky that was found, not trained yet)"
        show(axes, colors, prepared.full_shape, title, interpolation="nearest", mouseover=False)
        if shown == "model":
            draw_contours(axes, picture.mean(-1), prepared.full_shape)

    def marks(self) -> dict[str, tuple]:
        """Return slider -> what it stands at, and what it says."""
        quantile = self.settings.delinearization_quantile
        thresholds = self.settings.threshold_min, self.settings.threshold_max
        smoothing = self.view.settings.smoothing
        words = "auto" if smoothing is None else f"{smoothing:g}"
        return {
            "-dq": (self.rungs["-dq"].index(quantile), f"{quantile:g}"),
            "-tm, -tM": (thresholds, "{:g}, {:g}".format(*thresholds)),
            "smoothing": (self.rungs["smoothing"].index(smoothing), words),
        }

    def words_on(self, x: float, y: float) -> str:
        """Say what is at a place of the picture: value and sky, in the picture's own unit."""
        places = np.array([y, x]) + 0.5
        cell = (places / self.settings.downscaling_factor).astype(int)
        row, column = np.clip(cell, 0, np.array(self.prepared.used.shape) - 1)
        sky = self._sky()(places / max(self.reduced.full_shape))
        words = f"x {x:.0f}, y {y:.0f}"
        for name, values in (("value", self.reduced.linear[row, column]), ("sky", sky)):
            unit = self.picture.unit
            each = map("{:.5g}".format, values * unit.scale + unit.offset)
            words += f"   {name} {' '.join(each)}"
        return words

    def _result(self):
        """Return what training gave with just these settings and this drawing, or None."""
        if self.trained is None:
            return None
        view, result = self.trained
        same = view.settings == self.view.settings and view.drawn is self.view.drawn
        return result if same else None

    def _sky(self):
        """Return the linear sky as a function of frame coordinates, trained if it is."""
        result = self._result()
        return result.linear_sky if result else self.reduced.sky.surface

    def full_mask(self, view: View) -> np.ndarray | None:
        """Return the mask of a view at full size, (1 or c, h, w), or None."""
        if not view.is_drawn_on:
            return self.mask
        drawn = full_mask(replace(self.reduced, weight=view.drawn[..., None]), view.settings)
        return np.where(np.isnan(drawn), 1 if self.mask is None else self.mask, drawn)

    def mask_path(self, view: View) -> str | None:
        """Return the path of a view's mask: of the given one, or if it is drawn, of a new file."""
        if not view.is_drawn_on:
            return self.options.mask
        if self.written is not None:
            return self.written
        path, = self.options.input_file
        ending = FORMATS[output_format(path, self.options)].ending
        start = os.path.join(self.options.output_path, picture_stem(path) + "_mask")
        names = (f"{start}{count}{ending}" for count in ["", *range(2, 1000)])
        return next(name for name in names if not os.path.exists(name))

    def words(self) -> list[str]:
        """Return the flags of the command that does what is shown."""
        return flag_words(self.options, self.view.settings, self.mask_path(self.view))


def _quietly(work: Callable) -> tuple[Any, list[str]]:
    """Return what work() gives, and what it says, which nobody else hears."""
    unheard = logging.NullHandler(logging.INFO)
    with memory_errors(), _logging_to(unheard), _heard() as said:
        return work(), said


class PreviewWindow(Preview):
    """A window in which a mask can be drawn, too, and the sky taken out.

    What takes long runs in one thread beside it: looking for the sky, training, writing.
    """

    def __init__(self, figure, *what):
        """Show the picture in an empty figure; `what` is as for `Preview`."""
        super().__init__(*what)
        self.figure = figure
        self.before = []  # views that `undo` goes back to
        self.pool = ThreadPoolExecutor(1)
        self.job = None  # what the thread does, and what is done with what it gives
        self.stopping = False
        self.shift = False  # is held
        self._make_widgets()
        self.refresh()

    def _make_widgets(self):
        from matplotlib import widgets

        def add(left, top, width, height):
            return self.figure.add_axes([left, top - height, width, height])

        self.axes = add(0.01, 0.95, 0.66, 0.86)
        self.axes.format_coord = self.words_on
        words = functools.partial(self.figure.text, s="", fontsize=8, parse_math=False, va="top")
        self.texts = words(0.01, 0.04), words(0.69, 0.49), words(0.69, 0.08, color=END_INK)
        kinds = {
            "-dq": (widgets.Slider, len(self.rungs["-dq"]) - 1, 1),
            "-tm, -tM": (widgets.RangeSlider, 1, 0.001),
            "smoothing": (widgets.Slider, len(self.rungs["smoothing"]) - 1, 1),
        }
        self.sliders = {}
        for k, (name, (kind, last, step)) in enumerate(kinds.items()):
            place = add(0.755, 0.95 - 0.05 * k, 0.15, 0.03)
            slider = kind(place, name, 0, last, valstep=step, color=START_INK)
            slider.drawon = False  # `refresh` draws all at once
            slider.on_changed(functools.partial(self.slide, name))
            slider.label.set_x(-0.06)  # beside the handle, not below it
            slider.valtext.set_x(1.06)
            self.sliders[name] = slider
        self.checks = widgets.CheckButtons(
            add(0.69, 0.81, 0.295, 0.1), ["--auto  [a]", "--correction divide  [d]"], useblit=False,
            frame_props=dict(edgecolor="white"), check_props=dict(facecolor=END_INK))
        self.checks.drawon = False
        self.checks.on_clicked(lambda _: self.check(*self.checks.get_status()))
        toggle = self.checks.set_active
        self.keys = {"a": functools.partial(toggle, 0), "d": functools.partial(toggle, 1)}
        for key, (name, by) in MOVES.items():
            self.keys[key] = functools.partial(self.move, self.sliders[name], by)
        self.buttons = []  # matplotlib forgets a widget that nobody keeps
        for k, (name, label) in enumerate(BUTTONS.items()):
            place = add(0.69 + 0.15 * (k % 2), 0.69 - 0.045 * (k // 2), 0.145, 0.04)
            button = widgets.Button(place, label, color="#30363d", hovercolor="#4a5058")
            button.label.set_fontsize(8)
            handler = getattr(self, name)
            button.on_clicked(lambda event, handler=handler: handler())
            self.buttons.append(button)
            _, key = label[:-1].split("[")
            self.keys[" " if key == "space" else key] = handler
        self.lasso = widgets.LassoSelector(
            self.axes, self.draw_around, props=dict(color=END_INK, linewidth=2), button=1)
        self.lasso.set_visible(False)  # else all would be drawn twice
        listen = self.figure.canvas.mpl_connect
        listen("button_press_event", lambda event: setattr(self, "shift", event.key == "shift"))
        listen("key_press_event", lambda event: self.keys.get(event.key, lambda: None)())
        listen("close_event", lambda event: self.stop())

    def refresh(self):
        self.draw(self.axes)
        self.showing = True
        for name, (value, words) in self.marks().items():
            self.sliders[name].set_val(value)
            self.sliders[name].valtext.set_text(words)
        wanted = self.settings.auto, self.settings.correction == "divide"
        for k, (now, then) in enumerate(zip(self.checks.get_status(), wanted)):
            if now != then:
                self.checks.set_active(k)
        self.showing = False
        lines = [textwrap.fill(line, 62, subsequent_indent="  ") for line in self.said]
        for text, words in zip(self.texts, (self.command(), "\n".join(lines), self.status)):
            text.set_text(words)
        self.figure.canvas.draw_idle()

    def command(self) -> str:
        """Return the command that does what the window shows."""
        return command_line(self.options, self.words())

    # --- Handlers that only a window has ---

    def move(self, slider, by):
        value = np.add(slider.val, by)
        slider.set_val(np.clip(value, slider.valmin, slider.valmax))

    def blink(self):
        place = VIEWS.index(self.view.shown) + 1
        self.turn_to(VIEWS[place % len(VIEWS)])

    def draw_around(self, corners):
        """Leave out what the lasso holds, or with Shift give it back.

        What --auto leaves out can be given back only where its mask becomes one of the user's own.
        """
        from skimage.draw import polygon2mask
        drawn = self.view.drawn.copy()
        pixels = np.array(corners)[:, ::-1]  # (n, 2) row and column, full size
        inside = polygon2mask(drawn.shape, (pixels + 0.5) / self.settings.downscaling_factor - 0.5)
        if len(corners) < 3 or not inside.any():  # a click
            return
        changes = {}
        if self.shift and self.settings.auto:
            drawn[:] = with_sky(self.prepared, self.settings, self.reduced.sky).used
            quantile = self.settings.delinearization_quantile
            changes = dict(auto=False, delinearization_quantile=quantile)
        drawn[inside] = self.shift
        self.before.append(self.view)
        self.change(drawn, **changes)

    def undo(self):
        if self.before:
            before = self.before.pop()
            self.change(before.drawn, **vars(before.settings))

    def stop(self):
        self.stopping = True

    def train(self, then: Callable = lambda: None) -> None:
        """Take the sky out as the command would, and show what comes of it."""
        view = self.view
        needs = self._what_sky_needs()
        mask = self.full_mask(view)
        _start_importing()

        def on_epoch(epoch, loss):
            if self.stopping:
                raise BgError("stopped")
            self.status = f"epoch {epoch}, loss {loss:.4f}"

        def work():
            planes = self.picture.planes.copy()
            return remove_sky(planes, view.settings, mask, self.picture.unit,
                              nullcontext(on_epoch), self.reduced.reference)

        def keep(result):
            self.found((needs, result.prepared.sky))
            self.trained = view, result
            self.turn_to("result")
            then()

        self._start(work, keep, "preparing the fit")

    def write(self):
        """Write what the command would write."""
        if self._result() is None:
            self.train(self.write)
            return
        view, result = self.trained

        def work():
            options = argparse.Namespace(**{**vars(self.options), "mask": self.write_mask(view)})
            _check_folder(options)
            task = _make_task(*options.input_file, options, view.settings, None)
            _check_room(task, result.planes)
            with atomic_outputs(*task.outputs.values()) as files:
                _write_outputs(task, self.picture, result, files)
            return task.written

        def tell(paths):
            self.said = [f"wrote {path}" for path in paths]

        self._start(work, tell, "writing")

    def write_mask(self, view: View) -> str | None:
        """Write the mask of a view, if one was drawn; returns its path, or that of the given."""
        path = self.mask_path(view)
        if view.is_drawn_on:
            _check_folder(self.options)
            lines = [f"bgoptimizer {VERSION}: a mask drawn by hand, 1 = sky"]
            rows = rows_of(self.picture.source)
            write = FORMATS[output_format(*self.options.input_file, self.options)].write
            with atomic_outputs(path) as (file,):
                write(file, self.full_mask(view), rows, lines, self.options.compress, Unit())
            self.written = path
        return path

    def close(self):
        from matplotlib import pyplot
        pyplot.close(self.figure)

    # --- The thread ---

    def _start(self, work, then, status):
        """Have the thread do work(), and then call then() with what that gives.

        What is asked for replaces a look for the sky, whose outcome then does not matter.
        """
        if self.job is not None and self.job[1] != self.found:
            self.status = "wait for what is being done, or stop it"
            return
        self.moved = math.inf
        self.stopping = False
        self.status = status
        self.job = self.pool.submit(_quietly, work), then
        self.refresh()

    def tick(self) -> None:
        """See what the thread has done, and have it look for the sky anew where that is due."""
        if self.job is None:
            if time.monotonic() - self.moved > LOOK_AFTER:
                self._start(self.look(), self.found, "looking for the sky")
            return
        future, then = self.job
        if not future.done():
            if self.texts[2].get_text() != self.status:
                self.texts[2].set_text(self.status)
                self.figure.canvas.draw_idle()
            return
        self.job = None
        self.status = HELP
        try:
            given, self.said = future.result()
            then(given)
        except Exception as error:
            self.status = _told(error)
            if then != self.found:  # it may have replaced a look for the sky
                self.moved = time.monotonic()
        self.refresh()


def work_in_window(task: Task, options: argparse.Namespace, settings: Settings,
                   interrupts: _Interrupts) -> None:
    """Open the preview window on one picture, until it is closed; then write the drawn mask."""
    import matplotlib
    inputs = read_inputs(task)
    no_keys = {name: [] for name in matplotlib.rcParams if name.startswith("keymap.")}
    with drawing_style(), matplotlib.rc_context(no_keys):
        from matplotlib import pyplot
        figure = pyplot.figure(task.title, WINDOW_SIZE)
        window = PreviewWindow(figure, options, settings, *inputs)

        def tick():
            window.tick()
            if interrupts.asked:
                pyplot.close(figure)

        timer = figure.canvas.new_timer(TICK)
        timer.add_callback(tick)
        timer.start()
        interrupts.patient = True  # a toolkit would print a traceback, and go on
        pyplot.show()
        interrupts.patient = False
    window.pool.shutdown()
    path = window.write_mask(window.view)
    if path != options.mask:
        logger.info(f"the mask that was drawn: {path}")
    logger.info(f"this command does it:\n{window.command()}")
    del figure, window, timer, tick
    gc.collect()  # as in `display_kind`
    interrupts.check()


class PreviewPanel(Preview):
    """A panel of ipywidgets in a notebook."""

    shown_before: list[PreviewPanel] = []

    def __init__(self, use: Callable[[list[str]], None], *what):
        """Make the widgets; `box` is what is to be displayed.

        Args:
            use: gets the flags that are chosen when the button is clicked.
            what: as for `Preview`.
        """
        import ipywidgets as widgets
        super().__init__(*what)
        self.status = ""
        self.use = use
        with drawing_style():
            self.figure = _empty_figure(PANEL_SIZE)
            self.axes = self.figure.add_axes([0.01, 0.06, 0.98, 0.88])
        look = dict(continuous_update=False, readout=False, style=dict(description_width="9em"))
        rungs = {name: list(range(len(values))) for name, values in self.rungs.items()}
        self.sliders = {
            "-dq": widgets.SelectionSlider(options=rungs["-dq"], **look),
            "-tm, -tM": widgets.FloatRangeSlider(min=0, max=1, step=0.001, **look),
            "smoothing": widgets.SelectionSlider(options=rungs["smoothing"], **look),
        }
        self.checks = [widgets.Checkbox(description=name) for name in ("--auto", "divide")]
        self.shown = widgets.ToggleButtons(options=VIEWS)
        self.button = widgets.Button(description="Use these settings")
        self.image = widgets.Image(format="png")
        self.text = widgets.Textarea(disabled=True, rows=8, layout=dict(width="98%"))
        for name, slider in self.sliders.items():
            self._listen(slider, functools.partial(self.slide, name))
        for box in self.checks:
            self._listen(box, lambda _: self.check(*[box.value for box in self.checks]))
        self._listen(self.shown, self.turn_to)
        self.button.on_click(lambda _: self.use_flags())
        left = widgets.VBox([*self.sliders.values(), *self.checks, self.button])
        right = widgets.VBox([self.shown, self.image])
        self.box = widgets.VBox([widgets.HBox([left, right]), self.text])
        self.refresh()

    def _listen(self, widget, handler):
        widget.observe(lambda change: self.showing or handler(change.new), "value")

    def use_flags(self):
        """Hand over the flags of all that can be chosen here; they are to stand after others."""
        settings = self.view.settings
        flags = {
            "-dq": settings.delinearization_quantile,
            "-tm": settings.threshold_min,
            "-tM": settings.threshold_max,
            "--smoothing": "auto" if settings.smoothing is None else settings.smoothing,
            "--correction": settings.correction,
        }
        words = ["--auto"] if settings.auto else []
        for flag, value in flags.items():
            words += [] if value is None else [flag, str(value)]
        self.use(words)
        self.status = "these settings are in use now"
        self.refresh()

    def close(self):
        """Forget the picture: the widgets would keep it as long as the notebook is open."""
        for widget in (*self.sliders.values(), *self.checks, self.shown, self.button, self.box):
            widget.close()

    def change(self, *drawn, **changes):
        """Also look for the sky anew, for there is no thread that does."""
        super().change(*drawn, **changes)
        if self.moved < math.inf:
            self.moved = math.inf
            given, self.said = _quietly(self.look())
            self.found(given)
            self.refresh()

    def refresh(self):
        with drawing_style():
            self.draw(self.axes)
        file = io.BytesIO()
        self.figure.savefig(file, format="png")
        self.showing = True
        self.image.value = file.getvalue()
        for name, (value, words) in self.marks().items():
            self.sliders[name].value = value
            self.sliders[name].description = f"{name}: {words}"
        wanted = self.settings.auto, self.settings.correction == "divide"
        for box, value in zip(self.checks, wanted):
            box.value = value
        self.shown.value = self.view.shown
        self.showing = False
        words = shlex.join(self.words())
        self.text.value = "\n".join([*self.said, f"flags: {words}", self.status])


def preview_in_panel(task: Task, options: argparse.Namespace, settings: Settings,
                     use: Callable[[list[str]], None]) -> None:
    """Show the panel of one picture in a notebook; one that was shown before is closed."""
    from IPython.display import display
    panel = PreviewPanel(use, options, settings, *read_inputs(task))
    for before in PreviewPanel.shown_before:
        before.close()
    PreviewPanel.shown_before[:] = [panel]
    display(panel.box)


# --------------------------------------------------------------------------------------------------
# Many pictures
#
# They are done one by one in this process, or by an executor: processes of its own, or workers of
# Dask. To these goes plain data: it means the same to a script and to a module.
# --------------------------------------------------------------------------------------------------

REPORT_NAME = "bgoptimizer_report.csv"
DONE, WARNED, FAILED, SKIPPED = "done", "warned", "failed", "skipped"

OWN_OUTPUTS = ("_bgModel", "_bgSubtracted", "_bgDivided", "_mask")
"""How names of pictures end that this tool has written. They are nothing to work on."""

COPIES_IN_MEMORY = 4
"""A process needs about so many times the size of a picture's file, if that is neither compressed
nor of 8 bits: 16-bit samples become 32-bit, and some planes are there twice."""

MOST_JOBS = 61
"""Windows cannot wait for more processes."""

PATIENCE_WITH_SCHEDULER = 15
"""Seconds until a scheduler that does not answer is taken for absent."""


class Outcome(NamedTuple):
    """What came of one picture: a row of the report, as text."""

    file: str
    outcome: str  # DONE, WARNED, FAILED, or SKIPPED
    sky_share: str = ""
    smoothing: str = ""
    gradient_before: str = ""
    gradient_after: str = ""
    confidence: str = ""  # sure, or unsure and why
    clipped: str = ""  # share of the samples
    seconds: str = ""
    message: str = ""  # the warnings, or why it failed


def find_pictures(where: str | Sequence[str], *used: str | None) -> list[str]:
    """Return the paths of pictures, by name.

    Args:
        where: a picture; or a folder, a pattern, or several of all these. Of them, hidden files,
            what this tool has written, what has another name than pictures have, and what is used
            are left out.
        used: paths of the mask and of the reference, or None.

    Raises:
        BgError: there are none.
    """
    named = [where] if isinstance(where, str) else list(where)
    if not names_many(named):
        return named
    pictures, own, others = [], [], []
    for path in sorted({path for name in named for path in _files_at(name)}):
        if os.path.isdir(path) or any(_is_same(path, other) for other in used):
            continue
        if not PICTURE_ENDINGS.search(os.path.basename(path)):
            others.append(path)
        elif picture_stem(path).endswith(OWN_OUTPUTS):
            own.append(path)
        else:
            pictures.append(path)
    for paths, why in ((own, "what this tool writes"), (others, "no picture")):
        if paths:  # they may be somebody's pictures all the same
            more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
            logger.info(f"left out: {', '.join(paths[:3])}{more}; {why} is named so")
    if not pictures:
        raise BgError(f"{', '.join(named[:3])} holds no XISF, FITS or TIFF pictures to work on; "
                      "check the name of the folder, or the pattern")
    return pictures


def names_many(named: Sequence[str]) -> bool:
    """Tell a folder, a pattern, or several names from the name of one picture."""
    return len(named) > 1 or _files_at(named[0]) != named


def _files_at(name: str) -> list[str]:
    """Return what is in a folder or fits a pattern, but for hidden files; or a path that exists."""
    folder, pattern = os.path.split(name)
    if os.path.isdir(name):
        return glob.glob(os.path.join(glob.escape(name), "*"))
    if os.path.exists(name) or not glob.has_magic(name):
        _check_given([name])
        return [name]
    if os.path.isdir(folder):  # its name may hold brackets
        name = os.path.join(glob.escape(folder), pattern)
    return glob.glob(name, recursive=True)


def run_many(options: argparse.Namespace, settings: Settings, interrupts: _Interrupts) -> None:
    """Do all pictures that the command line names, and write the report.

    Raises:
        BgError: nothing can be done at all, or some of the pictures failed.
    """
    started = time.perf_counter()
    pictures = find_pictures(options.input_file, options.mask, options.reference)
    if options.preview:
        raise BgError(f"--preview shows one picture; name it, such as {pictures[0]}")
    if options.figures == "show":
        raise BgError("--figures show is for one picture; use --figures save")
    for path, read in ((options.mask, _read_mask), (options.reference, _open_reference_once)):
        if path is not None:
            _check_given([path])
            read(path)  # so that a bad one is told once
    _check_folder(options)
    path = os.path.join(options.output_path, REPORT_NAME)
    _check_output(path, pictures)
    with _report(path) as report:
        to_do, settled = _plan(pictures, options, settings, path)
        tried = len(to_do)
        jobs = _jobs_that_fit(options.jobs or 1, [task.input_file for task in to_do])
        if options.dask is not None and to_do:
            results = _by_dask(to_do, options.dask)
        elif jobs > 1:
            results = _by_processes(to_do, jobs)
        else:
            results = (_try_picture(task, interrupts) for task in to_do)
        with closing(results), _bar(len(pictures), "picture") as bar:
            for outcome in itertools.chain(settled, results):
                report[outcome.file] = outcome
                _tell(outcome, bar)
    _sum_up(report.values(), tried, time.perf_counter() - started, path)


@contextmanager
def _report(path: str) -> Iterator[dict[str, Outcome]]:
    """Yield the outcomes by file, to be filled, and write them as a table in CSV.

    They are also written if the run is interrupted, unless there are none. Until then no other run
    can write this report, so no two runs work on one folder.
    """
    outcomes = {}
    stopped = None
    with atomic_outputs(path) as (file,):
        try:
            yield outcomes
        except BaseException as error:  # an interrupted night has a report, too
            stopped = error
            if not outcomes:
                raise
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(Outcome._fields)
        writer.writerows(outcomes[name] for name in sorted(outcomes))
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))
    if stopped is not None:
        raise stopped


def read_report(path: str) -> dict[str, Outcome]:
    """Return the outcomes of a report by file; none if there is no report, or not one of ours."""
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        table = csv.DictReader(file)
        if tuple(table.fieldnames or ()) != Outcome._fields:
            return {}
        rows = [Outcome(**row) for row in table if None not in row]
    return {row.file: row for row in rows}


def _plan(pictures: list[str], options: argparse.Namespace, settings: Settings,
          report: str) -> tuple[list[Task], list[Outcome]]:
    """Return what there is to do, and the outcomes of what is done already or cannot start."""
    known = read_report(report) if options.skip_done else {}
    place = "file" if options.figures == "save" else None
    to_do = []
    settled = []
    writers = {}  # path of an output -> its picture
    for path in pictures:
        try:
            task = _make_task(path, options, settings, place)
            for output in task.written:
                other = writers.setdefault(os.path.normcase(output), path)
                if other != path:
                    raise BgError(f"{path} and {other} would both write {output}; "
                                  "rename one of them, or do it alone into another folder")
        except Exception as error:
            settled.append(Outcome(path, FAILED, message=_told(error)))
            continue
        if options.skip_done and _is_done(task):
            settled.append(known.get(path, Outcome(path, SKIPPED))._replace(outcome=SKIPPED))
        else:
            to_do.append(task)
    return to_do, settled


def _is_done(task: Task) -> bool:
    """Tell whether all outputs are there and newer than the picture."""
    made = os.stat(task.input_file).st_mtime_ns
    return all(os.path.exists(path) and os.stat(path).st_mtime_ns > made for path in task.written)


def _tell(outcome: Outcome, bar) -> None:
    """Move the bar; what failed or was warned of is told in a line, and without a bar all is."""
    bar.set_postfix_str(os.path.basename(outcome.file), refresh=False)
    bar.update()
    message = outcome.message
    if not message.startswith(outcome.file):
        message = f"{outcome.file}: {message}"
    with bar.external_write_mode():
        if outcome.outcome == FAILED:
            logger.warning(f"failed: {message}")
        elif outcome.outcome == WARNED:
            logger.warning(message)
        elif outcome.outcome == DONE and bar.disable:
            logger.info(f"{outcome.file}: done, {outcome.seconds} s")


def _sum_up(rows: Iterable[Outcome], tried: int, seconds: float, report: str) -> None:
    """Log what came of all pictures; raises BgError if some failed."""
    numbers = Counter(row.outcome for row in rows)
    total = sum(numbers.values())
    noun = "picture" if total == 1 else "pictures"
    kinds = [kind for kind in (DONE, WARNED, FAILED, SKIPPED) if numbers[kind]]
    parts = [f"{numbers[kind]} {kind}" for kind in kinds]
    line = f"{total} {noun}: {', '.join(parts)}"
    if tried:
        line += f"; {seconds / tried:.1f} s a picture, {seconds:.1f} s in all"
    logger.info(f"{line}; wrote {report}")
    if numbers[FAILED]:
        raise BgError(f"{numbers[FAILED]} of {total} {noun} failed; {report} says why")


@functools.lru_cache(maxsize=1)
def _kept_reference(path: str, changed: int) -> OpenedReference:
    """Read a reference that changed then; all pictures of a folder have the same."""
    return open_reference(path)


def _open_reference_once(path: str) -> OpenedReference:
    return _kept_reference(path, os.stat(path).st_mtime_ns)


def _try_picture(task: Task, interrupts: _Interrupts) -> Outcome:
    """Do one picture, whatever may happen; nothing is printed."""
    started = time.perf_counter()
    watched = _watched_fit(task.settings.epochs, interrupts)
    try:
        with _logging_to(logging.NullHandler(logging.WARNING)), _heard(mark="") as warned:
            result = process_file(task, watched, _open_reference_once)
        outcome = _outcome(task, result, warned)
    except Exception as error:
        outcome = Outcome(task.input_file, FAILED, message=_told(error))
    return outcome._replace(seconds=f"{time.perf_counter() - started:.2f}")


def _outcome(task: Task, result: Result, warned: list[str]) -> Outcome:
    """Put a result into the words and digits of a row."""
    sky = result.prepared.sky
    numbers = {
        "sky_share": sky.share,
        "smoothing": result.settings.smoothing,
        "gradient_before": result.gradient_before,
        "gradient_after": result.gradient_after,
        "clipped": result.clipped,
    }
    digits = {
        name: "" if math.isnan(number) else f"{number:.5g}" for name, number in numbers.items()}
    return Outcome(
        task.input_file, WARNED if warned else DONE, message=" | ".join(warned),
        confidence=f"unsure: {sky.unsure}" if sky.unsure else "sure", **digits)


def _jobs_that_fit(jobs: int, pictures: list[str]) -> int:
    """Return how many of the wanted processes there is work and memory for."""
    jobs = min(jobs, len(pictures), MOST_JOBS)
    largest = max(map(os.path.getsize, pictures), default=0)
    needed = TENSORFLOW_BYTES + COPIES_IN_MEMORY * largest
    free = _free_memory()
    room = max(1, int(min(free / needed, jobs)))
    if room < jobs:
        logger.warning(f"there is memory for {room} of {jobs} jobs "
                       f"({free / 1e9:.1f} GB are free, and each needs {needed / 1e9:.1f} GB)")
    return min(jobs, room)


# Many pictures: executors

_one_at_a_time = threading.Lock()


def do_picture(given: dict, folder: str) -> tuple:
    """Do one picture for an executor.

    A worker of Dask may have several threads. TensorFlow, the log, and memory are one for all.

    Args:
        given: the fields of a `Task`, and in it those of `Settings`.
        folder: the one that its paths start from.

    Returns:
        The fields of an `Outcome`.
    """
    with _one_at_a_time, _Interrupts() as interrupts:
        os.chdir(folder)
        task = Task(**{**given, "settings": Settings(**given["settings"])})
        try:
            return tuple(_try_picture(task, interrupts))
        except KeyboardInterrupt:  # in a process; what it wrote is cleared away
            os._exit(1)


def _by_executor(executor: Executor, work: Callable, to_do: list[Task]) -> Iterator[Outcome]:
    """Have work done on all pictures, in the order in which they are ready.

    What is done is taken out of `to_do`.
    """
    folder = os.getcwd()
    try:
        tasks = {executor.submit(work, asdict(task), folder): task for task in to_do}
    except OSError as error:  # a process could not be started, or died at once
        raise BrokenExecutor from error
    for future in as_completed(tasks):
        task = tasks[future]
        try:
            outcome = Outcome(*future.result())
        except (CancelledError, BrokenExecutor):
            raise
        except Exception as error:  # a picture that has killed one worker of Dask after the other
            message = f"it could not be done by any worker ({type(error).__name__}); try it alone"
            outcome = Outcome(task.input_file, FAILED, message=message)
        to_do.remove(task)
        yield outcome


def _by_processes(to_do: list[Task], count: int) -> Iterator[Outcome]:
    """Do pictures in processes.

    One that dies, for want of memory, takes the executor with it. Then what is left is done by one
    process after the other, and where this dies, the picture has failed.
    """
    others = set(multiprocessing.active_children())
    spawned = multiprocessing.get_context("spawn")  # a copy of this process could hang
    while to_do:
        executor = ProcessPoolExecutor(count, spawned, _start_process)
        try:
            yield from _by_executor(executor, do_picture, to_do)
        except BrokenExecutor:
            if count == 1:
                message = "the process that did it has died; is there enough memory?"
                yield Outcome(to_do.pop(0).input_file, FAILED, message=message)
            count = 1
        except BaseException:  # Ctrl-C, or nobody wants more
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            raise
        finally:
            executor.shutdown()


def _start_process() -> None:
    """Make a process ready for pictures. Ctrl-C ends it, and so does the end of its parent."""
    os.environ["TF_NUM_INTEROP_THREADS"] = "1"  # there may be as many processes as cores
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def follow():
        multiprocessing.parent_process().join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()


def _by_dask(to_do: list[Task], address: str) -> Iterator[Outcome]:
    """Do pictures by the workers of a Dask scheduler, which get this script.

    Raises:
        BgError: Dask is not installed, or no scheduler answers, or it ends.
    """
    try:
        import distributed
    except ImportError:
        raise BgError("--dask needs Dask; install it with: "
                      'python -m pip install "dask[distributed]"') from None
    # Dask hands a function of a module over by its name, and one of a script with all it uses
    name, _ = os.path.splitext(os.path.basename(__file__))
    script = importlib.import_module(name if __name__ == "__main__" else __name__)
    for name in ("distributed", "distributed.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # we say what matters
    try:
        client = distributed.Client(address, timeout=PATIENCE_WITH_SCHEDULER)
        client.upload_file(script.__file__)  # also to workers that come later
    except (OSError, RuntimeError, TimeoutError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BgError(f"no Dask scheduler answers at {address} ({reason}); "
                      "start one with: dask scheduler --host ADDRESS") from None
    number = len(to_do)
    with client:
        if not client.scheduler_info()["workers"]:
            logger.warning(f"the scheduler at {address} has no workers yet; waiting for them "
                           f"(start one with: dask worker --nthreads 1 {address})")
        try:
            yield from _by_executor(client.get_executor(pure=False), script.do_picture, to_do)
        except (CancelledError, distributed.comm.CommClosedError):
            raise BgError(f"the Dask scheduler has ended, after {number - len(to_do)} of {number} "
                          "pictures; start it again, and go on with --skip-done") from None


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

FLAGS = ("-dx", "-df", "-dq", "-N", "-O", "-tm", "-tM", "-i", "-e", "-a", "-B", "-lr",
         "--smoothing", "--correction", "--auto", "--seed")
"""Flags of the fields of Settings, in their order."""


class _Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def error(self, message):
        self.exit(2, f"bgoptimizer: error: {message}; see --help\n")


def _number_or_auto(text: str) -> float | None:
    """Read what --smoothing takes; None stands for auto."""
    if text == "auto":
        return None
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number") from None


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line; every default is the one of `Settings`."""
    purpose, heading, examples = (__doc__ or "").partition("examples:")
    parser = _Parser(
        prog="bgoptimizer.py", description=purpose, epilog=heading + examples, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("input_file", nargs="+",
        help="linear XISF, FITS or TIFF picture, gray or RGB; or several, a folder of them, or a "
             'pattern such as "lights/*.fit"')
    add("output_path", nargs="?", default=".",
        help="folder for what is written; made if missing (default: .)")
    add("-c", "--compress", action="store_true",
        help="compress the outputs without loss: lz4hc with byte shuffling, in FITS GZIP_2, in "
             "TIFF deflate (default: off)")
    add("-dx", "--downscaling-factor", type=int,
        help="side of the blocks of pixels that the fit sees as one pixel (default: %(default)s)")
    add("-df", "--downscaling-func", choices=("median", "mean"), metavar="DOWNSCALING_FUNC",
        help="what a block is reduced to, median or mean; the median drops small stars "
             "(default: %(default)s)")
    add("-dq", "--delinearization-quantile", type=float,
        help="quantile of the picture that the stretch takes to 1; the fit does not see what is "
             "brighter. A lower one stretches more; raise it if the preview shows blown out sky "
             f"(default: {DEFAULT_QUANTILE}, with --auto {AUTO_QUANTILE})")
    add("-p", "--preview", action="store_true",
        help="show stretch and mask: in a window to try settings and draw a mask in, without a "
             "display as a picture that is saved (default: off)")
    add("-N", dest="points", metavar="N", type=int,
        help="number of control points that the fit trains; --smoothing decides how stiff the "
             f"surface is (default: {DEFAULT_POINTS}, with --auto {AUTO_POINTS})")
    add("-O", dest="order", metavar="O", type=int, choices=(1, 2, 3, 4),
        help="order of the spline, 1 to 4; 2 is a thin plate, 3 is cubic (default: %(default)s)")
    add("-tm", "--threshold-min", type=float,
        help="leave out what is darker than this in the stretched picture (default: %(default)s)")
    add("-tM", "--threshold-max", type=float,
        help="leave out what is brighter than this in the stretched picture; lower it to mask "
             "objects (default: %(default)s)")
    add("-m", "--mask",
        help="mask in XISF, FITS or TIFF, as high and wide as the picture, with 1 channel or as "
             "many: 1 = use, 0 = leave out, between = weight (default: none)")
    add("-i", "--initializer", choices=("random", "grid"), metavar="INITIALIZER",
        help="where the control points start, random or grid (default: %(default)s)")
    add("-e", "--epochs", type=int,
        help="most epochs; the fit stops earlier if nothing improves (default: %(default)s)")
    add("-a", "--alpha", type=float,
        help="weight of the penalties on a sky that is negative or brighter than the picture "
             "(default: %(default)g)")
    add("-B", dest="batch", metavar="B", type=int,
        help=f"batch size: independent samples of {SAMPLE_CELLS} cells that the fit sees "
             "(default: %(default)s)")
    add("-lr", dest="learning_rate", metavar="LR", type=float,
        help="learning rate at the start (default: %(default)s)")

    add = parser.add_argument_group("more").add_argument
    add("--auto", action="store_true",
        help="find objects and leave them out; flags given by hand stay in force (default: off)")
    add("--reference", metavar="FILE",
        help="another picture of the region in XISF, FITS or TIFF, whose sky is flat or gentler; "
             "it tells nebula from glow. It is laid on the picture by plate solutions, or stars, "
             "and implies --auto (default: none)")
    add("--smoothing", type=_number_or_auto, metavar="{auto,NUMBER}",
        help="stiffness of the surface: 10000 is a plane, 1000 a plane with a bowl, 0.001 follows "
             "all that is smooth (default: auto, found from the picture)")
    add("--correction", choices=("subtract", "divide"),
        help="what is done with the sky: subtract it, or divide by it, against vignetting "
             "(default: %(default)s)")
    add("--format", choices=tuple(FORMATS),
        help="format of the outputs (default: the one of the input)")
    add("--seed", type=int,
        help="seed of random numbers; one command gives one result (default: %(default)s)")
    add("--save-mask", action="store_true",
        help="also write <name>_mask.xisf, the mask in force, to edit and give back with -m "
             "(default: off)")
    add("--figures", choices=("auto", "show", "save", "none"), default="auto",
        help="result figure or preview: show it in a window or notebook, save it as PNG, or "
             "neither; auto shows it where it can, and saves the preview where it cannot "
             "(default: %(default)s)")
    add("--animate", action="store_true",
        help="also write <name>_optimization.gif: how the surface settles (default: off)")
    add("--skip-done", action="store_true",
        help="leave out pictures whose outputs are there and newer than they are (default: off)")
    add("--jobs", type=int, metavar="N",
        help="do the pictures of a folder in N processes, as far as memory allows "
             "(default: 1)")
    add("--dask", metavar="ADDRESS",
        help="do the pictures of a folder on the workers of the Dask scheduler at this address, "
             "such as tcp://host:8786; they need to see the same files (default: none)")
    add("--quiet", action="store_true", help="print warnings and errors only (default: off)")
    add("--version", action="version", version=f"bgoptimizer {VERSION}")
    parser.set_defaults(**vars(Settings()))
    return parser


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Settings]:
    """Return options and settings, or exit with code 2 and a sentence."""
    parser = build_parser()
    argv = sys.argv[1:] if argv is None else argv
    for word in argv:
        if word.startswith("-") and PICTURE_ENDINGS.search(word) and os.path.isfile(word):
            parser.error(f"{word} is taken for a flag; write ./{word} for the file of that name")
    options = parser.parse_intermixed_args(argv)
    # A shell puts the names of all files in the place of lights/*.fit
    *others, last = options.input_file
    if others and PICTURE_ENDINGS.search(last) and not os.path.exists(last):
        parser.error(f"{last} is no picture that is there, and outputs get names of their own; "
                     "name a folder for them")
    if others and not (PICTURE_ENDINGS.search(last) and os.path.isfile(last)):
        options.input_file = others
        options.output_path = last
    for flag, given in (("--save-mask", options.save_mask), ("--animate", options.animate)):
        if given and options.preview:
            parser.error(f"--preview writes nothing but itself; leave it or {flag} out")
    if options.jobs is not None and options.dask is not None:
        parser.error("--jobs starts workers here and --dask uses those of a scheduler; "
                     "leave one of them out")
    if options.jobs is not None and options.jobs < 1:
        parser.error("--jobs must be 1 or more")
    options.auto = options.auto or options.reference is not None
    try:
        settings = Settings(**{item.name: getattr(options, item.name) for item in fields(Settings)})
    except ValueError as error:
        parser.error(str(error))
    return options, settings


def flag_words(options: argparse.Namespace, settings: Settings, mask: str | None) -> list[str]:
    """Return the flags that ask for these settings, this mask file, and what else was given."""
    words = []
    usual = vars(Settings())
    for flag, (name, value) in zip(FLAGS, vars(settings).items()):
        if value != usual[name]:
            words += [flag] if value is True else [flag, str(value)]
    for flag, value in (("-m", mask), ("--reference", options.reference),
                        ("--format", options.format)):
        words += [] if value is None else [flag, value]
    if options.compress:
        words.append("-c")
    return words


def command_line(options: argparse.Namespace, flags: list[str]) -> str:
    """Return the command that does one picture with these flags."""
    program = sys.argv[0]
    words = [sys.executable, program] if program.endswith(".py") else [os.path.basename(program)]
    words += options.input_file
    if options.output_path != ".":
        words.append(options.output_path)
    return shlex.join(words + flags)


def main(argv: Sequence[str] | None = None,
         use: Callable[[list[str]], None] = lambda flags: print(shlex.join(flags))) -> int:
    """Run the command line; returns the exit code. Every failure is one line on stderr.

    In a notebook, the preview's panel has a button that calls `use` with the flags that are chosen
    in it. They are to stand after others, and to take the place of --auto.
    """
    interrupts = _Interrupts()
    with suppress(AttributeError):  # a notebook's stdout cannot do that, and there may be none
        # File names may hold characters that the terminal's encoding does not have
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with interrupts, memory_errors():
            options, settings = _parse(argv)
            console = _Console(logging.WARNING if options.quiet else logging.INFO)
            with _logging_to(console, *logger.handlers):
                asked = (options.jobs, options.dask, options.skip_done) != (None, None, False)
                if asked or names_many(options.input_file):
                    run_many(options, settings, interrupts)
                else:
                    _run_one(options, settings, interrupts, use)
        return 0
    except SystemExit as stop:  # argparse has said why
        return stop.code or 0
    except KeyboardInterrupt:
        return _fail("interrupted; what was not finished was not written",
                     128 + (interrupts.asked or signal.SIGINT))
    except BrokenPipeError:  # whoever read our lines has left
        # Python flushes stdout at its end, and would complain once more
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        return 1
    except Exception as error:
        return _fail(_told(error))


def command() -> None:
    """Run the command line and leave.

    All is written by then. What Python and TensorFlow would still put away takes 0.6 s.
    """
    code = main()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError):  # there is no such stream, or nobody listens
            stream.flush()
    os._exit(code)


def _fail(message: str, code: int = 1) -> int:
    print(f"bgoptimizer: error: {message}", file=sys.stderr)
    return code


class _Console(logging.Handler):
    """Prints information on stdout and warnings on stderr, wherever these lead when it happens."""

    def emit(self, record):  # whatever fails here ends the run: a reader may have closed stdout
        text = record.getMessage()
        if record.levelno < logging.WARNING:
            print(text, flush=True)
        else:
            print(f"bgoptimizer: warning: {text}", file=sys.stderr)


def _run_one(options: argparse.Namespace, settings: Settings, interrupts: _Interrupts,
             use: Callable[[list[str]], None]) -> None:
    """Do one picture, and tell how it goes on."""
    started = time.perf_counter()
    place = _place_for_figure(options)
    task = _make_task(*options.input_file, options, settings, place)
    if options.preview and place == "window":
        work_in_window(task, options, settings, interrupts)
        return
    if options.preview and place == "notebook" and importlib.util.find_spec("ipywidgets"):
        preview_in_panel(task, options, settings, use)
        return
    _check_folder(options)
    if options.preview:
        preview_file(task)
    else:
        process_file(task, _watched_fit(settings.epochs, interrupts))
    for path in task.written:
        logger.info(f"wrote {path}")
    logger.info(f"{time.perf_counter() - started:.1f} s")
    if place == "window":
        from matplotlib import pyplot
        pyplot.show()  # waits until the window is closed


def _place_for_figure(options: argparse.Namespace) -> str | None:
    """Return where the preview or the figure goes: "notebook", "window", "file", or None."""
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


if __name__ == "__main__":
    command()
