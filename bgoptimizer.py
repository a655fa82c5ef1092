#!/usr/bin/env python3
# /// script
# requires-python = ">= 3.8, < 3.14"  # 3.13 is the newest tried
# dependencies = [  # those of requirements.txt
#   'tensorflow ~= 2.13.0 ; python_version < "3.9"',
#   'tensorflow ~= 2.15.0 ; python_version >= "3.9" and python_version < "3.12"',
#   'tensorflow >= 2.16 ; python_version >= "3.12" and python_version < "3.15"',
#   'tensorflow == 0+needs.Python.3.14.or.older ; python_version >= "3.15"',
#   'tensorflow-addons >= 0.21 ; python_version < "3.12" and platform_machine != "aarch64"',
#   'astropy', 'imagecodecs', 'matplotlib', 'numpy', 'pillow', 'scikit-image', 'scipy',
#   'tifffile', 'tqdm', 'xisf >= 0.9.6',
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
import atexit
import base64
import copy
import csv
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
import secrets
import shlex
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
from concurrent.futures import BrokenExecutor, CancelledError, Executor, as_completed
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Callable, ContextManager, Iterable, Iterator, NamedTuple, Sequence
from xml.etree import ElementTree
from xml.parsers import expat

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

import numpy as np  # noqa: E402
import scipy  # noqa: E402  (its parts are imported when first used)
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


# What libraries say, each in its own way, when there is no memory left
NO_MEMORY = re.compile(
    "cannot allocate memory|unable to allocate|failed to map segment|bad_alloc|out of memory"
    "|OOM when|ResourceExhausted|can't start new thread", re.IGNORECASE)


def lacks_memory(error: BaseException | None) -> bool:
    """Tell whether an error, or what led to it, comes from a lack of memory."""
    while error is not None:
        if isinstance(error, MemoryError) or NO_MEMORY.search(f"{type(error).__name__} {error}"):
            return True
        error = error.__cause__ or error.__context__
    return False


def _flag(flag: str, default, least, most):
    """Return a field that a flag sets: `least` to `most` if it is a number, else one of the two."""
    return field(default=default, metadata=dict(flag=flag, least=least, most=most))


@dataclass(frozen=True)
class Settings:
    """What a run is asked to do; checked when made.

    None means that it was not asked for: `resolved` and `examine` then choose a value.

    Raises:
        ValueError: a value is out of its range; the text names the flag and the range.
    """

    downscaling_factor: int = _flag("-dx", 8, 1, 10**6)  # less noise, fewer stars and pixels
    downscaling_func: str = _flag("-df", "median", "median", "mean")  # a median drops small stars
    delinearization_quantile: float | None = _flag("-dq", None, 1e-9, 1)
    points: int | None = _flag("-N", None, 3, 4096)
    order: int = _flag("-O", 2, 1, 4)  # 2 is a thin plate, the surface that bends least
    threshold_min: float = _flag("-tm", 0.001, -10**9, 10**9)
    threshold_max: float = _flag("-tM", 1.0, -10**9, 10**9)
    initializer: str = _flag("-i", "random", "random", "grid")
    epochs: int = _flag("-e", 1000, 1, 10**9)
    alpha: float = _flag("-a", 5.0, 0, 10**9)  # a sky above a pixel costs 11 times what a sky
    # below it costs, so it settles at the low side of the noise
    batch: int = _flag("-B", 1, 1, 10**9)  # samples of SAMPLE_CELLS; one is enough
    learning_rate: float = _flag("-lr", 0.001, 1e-9, 10**9)
    smoothing: float | None = _flag("--smoothing", None, 0, 10**9)
    correction: str = _flag("--correction", "subtract", "subtract", "divide")  # to divide is for
    # what dims the light instead of adding to it
    auto: bool = _flag("--auto", False, False, True)
    seed: int = _flag("--seed", 0, 0, 2**32 - 1)

    def __post_init__(self):
        for item in fields(self):
            value = getattr(self, item.name)
            flag, least, most = item.metadata.values()
            if value is None and item.default is None:
                continue
            if item.type in ("str", "bool"):
                words = f"{least} or {most}"
                fits = value in (least, most)
            else:
                words = f"{least} to {most}"
                kind = numbers.Integral if item.type.startswith("int") else numbers.Real
                fits = isinstance(value, kind) and least <= value <= most
            if not fits:
                raise ValueError(f"{flag} must be {words}")
        if self.threshold_min >= self.threshold_max:
            raise ValueError("-tM must be above -tm")

    def resolved(self) -> Settings:
        """Return these settings with a value for every None but `smoothing`: see `examine`."""
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

LARGEST_VALUE = 1e30  # floating point beyond it is no light, but damage, or means something else
SMALLEST_MARK = -99  # -99, -999, -9999, -32768, and the like stand for what is missing

# What compressed data may claim, and what a process may take to decode them
ALWAYS_ALLOWED = 1 << 28  # bytes that any file may claim
LARGEST_RATIO = 250  # bytes for one stored, of more; pictures, with their noise, have some dozens
MAX_PIECES = 100_000  # strips, tiles, or blocks, each of which takes a call to decompress
DECODING_SECONDS = 60
DECODING_SPEED = 500_000  # bytes for which there is one second more; it is ten times as fast
DECODER_SPARE = 1 << 27  # bytes of memory beside thrice what it decodes

# A program that decodes the picture `number` of the file that is its standard input
DECODER = """
import sys
sys.path[:] = filter(None, sys.path)  # nothing is imported from where pictures are
import numpy
kind, dtype = sys.argv[1:3]
number, memory, seconds = map(int, sys.argv[3:])
if kind == "fits":
    from astropy.io import fits
else:
    import imagecodecs, tifffile
try:
    import resource
    with open("/proc/self/statm") as file:
        memory += int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))  # also if nobody waits any more
except (ImportError, OSError, ValueError):
    pass  # another system
if kind == "fits":
    with fits.open(sys.stdin.buffer, do_not_scale_image_data=True, memmap=False) as hdus:
        samples = hdus[number].data
else:
    with tifffile.TiffFile(sys.stdin.buffer, _multifile=False) as tiff:
        samples = tiff.pages[number].asarray(maxworkers=1)
sys.stdout.buffer.write(numpy.ascontiguousarray(samples, dtype))
"""

CUT_SHORT = "is cut short: the end of its data is missing"
NOT_DECODED = "is damaged: its data cannot be read or decompressed"


class Unit(NamedTuple):
    """A picture's own unit: its values are samples * scale + offset."""
    scale: float = 1.0
    offset: float = 0.0
    mark: float | None = None  # the value, such as -9999, that means "missing": here it is NaN

    @property
    def black(self):
        """The sample that no light at all would give."""
        return -self.offset / self.scale


@dataclass
class Picture:
    """An image in [0, 1]. Samples that are exactly 0 or not finite are missing."""
    planes: np.ndarray  # (c, h, w), c = 1 or 3; row 0 is the top. float32, or float64 if it was
    source: XisfSource | FitsSource | TiffSource | None
    warnings: list  # of str, one line each
    unit: Unit = Unit()

    @property
    def note(self):
        """What the unit means for the levels that are told, in words."""
        scale, offset, _ = self.unit
        if (scale, offset) == Unit()[:2]:
            return ""
        value = f"(value + {-offset:.6g})" if offset else "value"
        return f"written back in its own unit; the levels below are {value} / {scale:g}"


def _refuse(problem, advice="copy or save it again"):
    """Refuse what is being read; `problem` is the end of a sentence that begins with its name."""
    raise BgError(f"{problem[:150]}; {advice}")


def _require(fact, problem, *advice):
    """Refuse what is being read unless `fact` holds."""
    if not fact:
        _refuse(problem, *advice)


def _refuse_raw(kind):
    """Say that a camera's raw file is no picture yet."""
    _refuse(
        f"is a camera's raw file ({kind}), a single undeveloped frame",
        "calibrate, debayer, and stack it first, and save the stack as XISF, FITS, or TIFF")


@contextmanager
def _silence():
    """Leave out the libraries' own warnings, on headers not quite right."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _refusals(name):
    """Turn what is wrong with what is read into a BgError about `name`."""
    try:
        with _silence():
            yield
    except ImportError:
        raise
    except BgError as error:
        raise BgError(f"{name} {error}") from None
    except OSError as error:
        reason = error.strerror or error
        raise BgError(f"{name} cannot be read: {reason}; check the path and the disk") from None
    except Exception as error:  # the libraries raise anything on damaged files
        if lacks_memory(error):
            raise
        reason = " ".join(str(error).split())[:100]
        raise BgError(f"{name} is damaged, or of a kind that is not read ({reason}); "
                      "copy or save it again") from None


def _check_codec(codec, known):
    """Refuse data of an unknown codec."""
    _require(codec in known, f"is compressed with {codec}, which is not read",
             "save it uncompressed")


def _check_claims(size, stored, pieces=1):
    """Refuse `stored` bytes that claim to be far too many when they are unpacked."""
    _require(size <= max(ALWAYS_ALLOWED, LARGEST_RATIO * stored),
             "claims more data than its compressed block can hold")
    _require(pieces <= MAX_PIECES, "has too many strips or tiles to be true")


def _file_size(file):
    """Return how many bytes an open file has."""
    return os.fstat(file.fileno()).st_size


def _unzipping(file):
    """Return a file, or one that unpacks it if gzip has packed it."""
    is_packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return gzip.GzipFile(fileobj=file) if is_packed else file


@contextmanager
def _opened(path):
    """Open a file to read; what gzip has packed is unpacked into a nameless one."""
    _require(stat.S_ISREG(os.stat(path).st_mode),  # opening a FIFO would wait forever
             "is not a file", "name a picture, or save the data to one first")
    with open(path, "rb") as file:
        stream = _unzipping(file)
        if stream is file:
            yield file
            return
        with tempfile.TemporaryFile() as unpacked:
            try:
                for piece in iter(lambda: stream.read(1 << 20), b""):
                    unpacked.write(piece)
                    _check_claims(unpacked.tell(), _file_size(file))
            except (EOFError, gzip.BadGzipFile, zlib.error):
                _refuse("is cut short or damaged: gzip cannot unpack it")
            unpacked.seek(0)
            yield unpacked


def _read_at(file, position, size, problem=CUT_SHORT):
    """Return bytes of an open file, (size,) uint8."""
    _require(position + size <= _file_size(file), problem)
    file.seek(position)
    data = np.fromfile(file, np.uint8, size)
    _require(data.size == size, problem)  # another program may have cut it just now
    return data


def _samples(kind, file, number, position, dtype, shape):
    """Return the samples of HDU or page `number` of an opened file as they are stored.

    Without a position in the file they are to be decoded. That may crash, so another process does
    it; `kind`, "fits" or "tiff", tells how.
    """
    size = math.prod(shape) * dtype.itemsize
    if position is not None:
        return _read_at(file, position, size).view(dtype).reshape(shape)
    seconds = DECODING_SECONDS + size // DECODING_SPEED
    arguments = kind, dtype.str, number, 3 * size + DECODER_SPARE, seconds
    decoder = [sys.executable, "-c", DECODER, *map(str, arguments)]
    os.lseek(file.fileno(), 0, os.SEEK_SET)
    with tempfile.TemporaryFile() as decoded:
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(
                decoder, stdin=file, stdout=decoded, stderr=subprocess.DEVNULL, timeout=seconds)
        return _read_at(decoded, 0, size, NOT_DECODED).view(dtype).reshape(shape)


def _planes_of(samples, step=1, zero=0, white=1, blank=None):
    """Return samples, (c, h, w), as planes of float64 if they are that, else of float32.

    They become (stored * step + zero) / white; the integer `blank` means "missing".
    """
    dtype = np.dtype("f8" if samples.dtype.name == "float64" else "f4")
    stays = samples.dtype.kind == "f" and (step, zero, white) == (1, 0, 1)
    if stays and samples.dtype == dtype and samples.flags.carray:
        return samples
    planes = np.empty(samples.shape, dtype)
    for plane, stored in zip(planes, samples):
        for rows in _strips(*plane.shape):
            values = stored[rows]
            if not stays:
                values = (values.astype(np.float64) * step + zero) / white
            plane[rows] = values
            if blank is not None:
                plane[rows][stored[rows] == blank] = np.nan
    return planes


def array_unit(planes):
    """Bring planes outside [0, 1] into it, in place, and return their Unit. Raises BgError."""
    notes = []
    with _refusals("the image"):
        unit = _fit_into_unit_range(planes, notes)
    for text in notes:
        logger.warning(f"the image {text}")
    return unit


def _fit_into_unit_range(planes, notes):
    """Bring planes outside [0, 1] into it, in place; return their Unit.

    Room is left where the corrected picture may need it: above the brightest star, and below the
    noise of the darkest sky, so that negative values stay what they are.
    """
    mark = _leave_out_marks(planes, notes)
    lowest, highest = _finite_range(planes)
    if lowest >= 0 and highest <= 1 or lowest > highest:
        return Unit(mark=mark)
    _require(max(-lowest, highest) < LARGEST_VALUE,
             f"has values from {lowest:.6g} to {highest:.6g}, which cannot be light",
             "look at it, and at what was done to it")
    offset = 0.0
    if lowest < 0:
        some = planes[:, ::7, ::7]
        some = some[np.isfinite(some)]
        middle, bright = lowest, highest
        if some.size:
            middle, bright = np.quantile(some, (0.5, 0.999))
        room = max(2 * (middle - lowest), bright - middle, -lowest / 1000)
        offset = lowest - float(room)
    # A power of two: without an offset, all digits stay
    scale = 2.0 ** (math.ceil(math.log2(highest - offset)) + 1)
    for plane in planes:
        missing = plane == 0
        plane -= offset
        plane /= scale
        plane[missing] = 0
    return Unit(scale, offset, mark)


def _leave_out_marks(planes, notes):
    """Set samples to NaN, in place, that a value such as -9999 marks as missing, and note that.

    It is a whole number up to SMALLEST_MARK, and all others are nearer to their median than to it.
    It is returned, or None.
    """
    lowest, _ = _finite_range(planes)
    if not (-LARGEST_VALUE < lowest <= SMALLEST_MARK and lowest == round(lowest)):
        return None
    others = planes[np.isfinite(planes) & (planes > lowest)]
    if not others.size:
        return None
    least = others.min()
    if least - lowest <= np.median(others) - least:
        return None
    marked = planes == lowest
    planes[marked] = np.nan
    count = np.count_nonzero(marked)
    notes.append(f"has {count} samples of {lowest:g}, which are taken for missing")
    return lowest


def _finite_range(values):
    """Return the smallest and the largest of the finite values; inf and -inf without any."""
    low, high = values.min(), values.max()
    if not math.isfinite(high - low):
        finite = np.isfinite(values)
        low = values.min(where=finite, initial=math.inf)
        high = values.max(where=finite, initial=-math.inf)
    return float(low), float(high)


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
# the description of an Astro-TIFF, https://astro-tiff.sourceforge.io, as lines. From one format to
# another they go as astropy's fits.Header. Outside of FITS they describe, as in PixInsight and
# Siril, the picture in the order of rows that FITS has by convention: from the lowest up.
# --------------------------------------------------------------------------------------------------

FITS_CARD = 80  # characters of a card
HISTORY_COLUMNS = 72  # characters of text that a card of HISTORY or COMMENT has room for
MAX_FITS_CARDS = 20_000  # of a header; no real file has more

TEXT_NAMES = ("COMMENT", "HISTORY", "")  # keywords whose text is all they have
# Keywords that every writer makes anew
STRUCTURE_NAMES = re.compile(
    r"SIMPLE|XTENSION|EXTEND|BITPIX|NAXIS\d*|PCOUNT|GCOUNT|BSCALE|BZERO|BLANK|END|GROUPS"
    "|DATASUM|CHECKSUM")
ROW_ORDER = "ROWORDER"  # says which row is the first: the lowest, unless it is 'TOP-DOWN'
# Keywords in the unit of the samples. (PEDESTAL is in steps of 16 bits in all files.)
LEVEL_NAMES = ("CBLACK", "CWHITE", "SATURATE", "SATLEVEL", "DATAMIN", "DATAMAX")
# Keywords and XISF's properties, as "element name", that new pixels make untrue
STALE_PIXEL_METADATA = re.compile(
    r"FITSKeyword (BITPIX|NAXIS\d*|BSCALE|BZERO|CHECKSUM|DATASUM|NOISE[A-Z]?\d*)$"
    r"|Property (.*:)?(Statistics|Noise)(:|$)")

BLANKS = " " * 50  # in a text over several cards; with more, astropy would need minutes to read it
CONTINUED = re.compile(rf"CONTINUE +'(?!{BLANKS}).*' *(/.*)?")
NO_LIGHT = re.compile("dark|bias|flat|offset|zero", re.IGNORECASE)  # no IMAGETYP of the sky
FITS_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([ED][-+]?\d+)?", re.IGNORECASE)


def _printable(text):
    """Return what a FITS header can hold of a text."""
    return re.sub("[^ -~]", "?", text)


def _wrapped(text):
    """Return the lines of a text, which are short enough for HISTORY."""
    wrapper = textwrap.TextWrapper(HISTORY_COLUMNS, break_on_hyphens=False)
    return list(itertools.chain(*map(wrapper.wrap, text.splitlines()))) or [""]


def _header_of(text):
    """Return the fits.Header whose cards stand in a text without a mark between them.

    What is malformed becomes COMMENT.
    """
    from astropy.io import fits
    images = []  # of cards, each with those that continue it
    for image in re.findall(f".{{{FITS_CARD}}}", _printable(text)):
        if images and CONTINUED.fullmatch(image):
            images[-1] += image
        else:
            images.append(re.sub("^CONTINUE", "COMMENT ", image))
    cards = []
    for image in images:
        card = fits.Card.fromstring(image)
        try:
            card.verify("silentfix")
            card.value  # raises if it cannot be repaired
            cards.append(card)
        except fits.VerifyError:
            cards += _cards_of("COMMENT", None, image)
    return fits.Header(cards)


def _cards_of(name, value, comment):
    """Return fits.Cards of a keyword: COMMENT if it cannot be written so that it reads the same."""
    from astropy.io import fits
    if name not in TEXT_NAMES:
        if isinstance(value, str):
            value = _printable(value)
        with suppress(ValueError, fits.VerifyError):
            card = fits.Card(name, value, _printable(comment))
            image = card.image
            if BLANKS not in image.rstrip() and fits.Card.fromstring(image).value == card.value:
                return [card]
        comment = f"{name} = {_text_of_value(value)} / {comment}"
        name = "COMMENT"
    return [fits.Card(name, _printable(line)) for line in _wrapped(comment)]


def _value_of_text(text):
    """Return the value that the text of an XISF keyword stands for; None for an empty one."""
    if text[:1] == text[-1:] == "'":
        return text[1:-1].replace("''", "'").rstrip()
    if text in ("T", "F"):
        return text == "T"
    if FITS_NUMBER.fullmatch(text):
        with suppress(ValueError):
            return int(text)
        return float(text.upper().replace("D", "E"))
    return text or None


def _text_of_value(value):
    """Return the text of an XISF keyword that stands for a value of a fits.Card."""
    if isinstance(value, bool):
        return "T" if value else "F"
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return str(value).upper() if isinstance(value, numbers.Number) else ""


def _kept(header, white, notes, structure=STRUCTURE_NAMES):
    """Return the keywords of FITS or an Astro-TIFF that outputs keep.

    Names of keywords that the new pixels make untrue go into `notes`.
    Levels of integers, whose largest is `white`, become those of samples in [0, 1].
    """
    from astropy.io import fits
    kept = fits.Header()
    untrue = []
    for card in header.cards:
        if structure.fullmatch(card.keyword):
            continue
        if STALE_PIXEL_METADATA.match(f"FITSKeyword {card.keyword}"):
            untrue.append(card.keyword)
        else:
            kept.append(card, end=True)
    _note_keywords(kept, untrue, notes)
    if white:
        kept.update(_levels_in(kept, Unit(white)))
    return kept


def _note_keywords(values, untrue, notes):
    """Note names that are not kept, and what keywords (values by name) tell against the picture."""
    if untrue:
        notes.append(f"had {', '.join(untrue)[:200]}: "
                     "not kept, because the new pixels make them untrue")
    for name in ("imageType", "IMAGETYP", "FRAME", "FRAMETYP"):
        kind = str(values.get(name, "")).strip("' ")
        if NO_LIGHT.search(kind) and "light" not in kind.lower():
            notes.append(f"is no light frame, says its {name} {kind[:40]!r}: "
                         "there is no sky in it to take out")
            break


def _levels_in(values, unit):
    """Return those of `values`, by keyword, that are levels in a Unit, for samples in [0, 1]."""
    levels = {}
    for name in LEVEL_NAMES:
        level = values.get(name)
        if isinstance(level, numbers.Real):
            levels[name] = float(f"{(level - unit.offset) / unit.scale:.9g}")
    name_of_unit = values.get("BUNIT")
    if isinstance(name_of_unit, str) and name_of_unit:
        levels["BUNIT"] = f"{unit.scale:.9g} {name_of_unit.strip()}"
    return levels


def _range_in(values, planes, unit):
    """Return DATAMIN and DATAMAX of planes in a Unit, if `values` has them."""
    found = {}
    if "DATAMIN" in values or "DATAMAX" in values:
        lows, highs = zip(*map(_finite_range, planes))
        for name, limit in (("DATAMIN", min(lows)), ("DATAMAX", max(highs))):
            if name in values and math.isfinite(limit):
                found[name] = float(f"{limit * unit.scale + unit.offset:.9g}")
    return found


def _header_text(structure, keywords, history, planes, unit):
    """Return the cards of an output's header, which stand in it without a mark between them.

    They are its structure, the keywords, made true of these planes in a Unit, and HISTORY.
    """
    header = keywords.copy()
    header.update(_range_in(header, planes, unit))
    for line in history:
        for card in _cards_of("HISTORY", None, line):
            header.append(card, end=True)
    return structure.tostring(endcard=False, padding=False) + header.tostring(padding=False)


def _upside_down(header, height):
    """Return the keywords that tell of celestial coordinates as they are with the rows turned.

    With y' = height + 1 - y, the column of y in the matrix changes its sign, and so do odd powers
    of y in the SIP polynomials, and what they add to y.
    """
    changes_sign = "(CD|PC)[12]_2[A-Z]?|AP?_[0-9]_[13579]|BP?_[0-9]_[02468]"
    if not any(re.match("(CD|PC)2_2", name) for name in header):
        changes_sign += "|CDELT2[A-Z]?"
    turned = {}
    for name, value in header.items():
        if isinstance(value, numbers.Real):
            if re.fullmatch("CRPIX2[A-Z]?", name):
                turned[name] = height + 1 - value
            elif re.fullmatch(changes_sign, name):
                turned[name] = -value
    return turned


def _shared_metadata(source, height):
    """Return what all formats can hold of a file's metadata: keywords, and the color profile.

    The keywords are those of a picture whose rows go from the lowest up; there are `height`.
    """
    from astropy.io import fits
    keywords, icc = fits.Header(), b""
    if isinstance(source, XisfSource):
        profile = source.root.find("Image/ICCProfile")
        with suppress(Exception):  # a damaged profile is lost, not the picture
            icc = bytes(_unpack(*_stored(profile, source.blocks)))
        for element in source.root.findall("Image/FITSKeyword"):
            name = element.get("name", "").strip().upper()
            text = element.get("value", "").strip()
            comment = element.get("comment", "")
            if name in TEXT_NAMES:
                comment = comment or text
            if not STRUCTURE_NAMES.fullmatch(name):
                for card in _cards_of(name, _value_of_text(text), comment):
                    keywords.append(card, end=True)
    elif source is not None:
        keywords, icc = source.keywords.copy(), source.icc
    keywords.remove(ROW_ORDER, ignore_missing=True, remove_all=True)
    if isinstance(source, FitsSource) and source.top_down:
        keywords.update(_upside_down(keywords, height))
    return keywords, icc


# --------------------------------------------------------------------------------------------------
# Pictures on disk: XISF
#
# The specification: https://pixinsight.com/doc/docs/XISF-1.0-spec/XISF-1.0-spec.html. Where it is
# silent, or where PixInsight reads more than it allows, PixInsight's reader decides.
#
# The `xisf` package fails on many real headers, sets no limit to what it decompresses, and its
# writer loses metadata: see `_by_package`.
# --------------------------------------------------------------------------------------------------

XISF_ROOT = {
    "version": "1.0", "xmlns": "http://www.pixinsight.com/xisf",
    "xmlns:xsi": "http://www.w3.org/2001/XMLSchema-instance",
    "xsi:schemaLocation":
        "http://www.pixinsight.com/xisf http://pixinsight.com/xisf/xisf-1.0.xsd",
}
BARE_XISF = "<xisf><Image/><Metadata/></xisf>"
# What may stand in a header, in lower case but for byteOrder, and what it stands for
XISF_CODECS = {"zlib": "zlib", "lz4": "lz4", "lz4hc": "lz4", "zstd": "zstd"}  # of imagecodecs
XISF_DTYPES = {"uint8": "u1", "uint16": "u2", "uint32": "u4", "uint64": "u8", "float32": "f4",
               "float64": "f8"}
BYTE_ORDERS = {"little": "<", "big": ">"}
XISF_COLORS = {"gray": 1, "rgb": 3}
TEXT_DECODERS = {
    "base64": functools.partial(base64.b64decode, validate=True), "hex": bytes.fromhex}
CHECKSUMS = ("sha1", "sha256", "sha512", "sha3_256", "sha3_512")  # of hashlib
# Limits that no real file meets
MAX_HEADER = 1 << 24  # bytes
MAX_HEADER_PARTS = 200_000  # tags and attributes
MAX_HEADER_DEPTH = 64  # elements inside each other

LZ4_LIMIT = 0x7E000000  # bytes: the largest block. PixInsight fails on larger ones in pieces
ALIGNMENT = 4096  # bytes: attached blocks start at multiples of it, as in PixInsight's own files

# Without leading zeros: PixInsight takes 010 for 8
XISF_INTEGER = re.compile(r"\+?(0|[1-9][0-9]{0,17}|0x[0-9a-fA-F]{1,15})")
XISF_COMPRESSION = re.compile(
    r"none|(?P<codec>zlib|lz4|lz4hc|zstd)(\+sh(?=:\d+:))?"
    r":(?P<size>[1-9][0-9]{0,17})(:(?P<item>[1-9]|1[0-6]))?")
# What XML 1.0 forbids, bare and as references. PixInsight lets it pass.
NOT_XML = re.compile(
    "[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
    "|&#(0*([0-8]|1[124-9]|2[0-9]|3[01])|x0*([0-8bcef]|1[0-9a-f]));", re.IGNORECASE)
# Elements, as "element name", that describe the old file, or are not carried over
STALE_FILE_METADATA = re.compile(
    "(Data|Image|Metadata|Signature|Thumbnail) |Property XISF:"
    "(Creat|Compress|BlockAlign|MaxInline|Checksum|OutputHint|InputHint|ResourceURL|Load)")
STALE_IMAGE_ATTRIBUTES = (
    "location", "compression", "subblocks", "checksum", "byteOrder", "pixelStorage", "offset")


@dataclass
class XisfSource:
    """What the outputs carry over from an XISF file besides its pixels."""
    root: ElementTree.Element  # the header, without what describes the old pixels and the old file
    blocks: dict  # attached bytes, by the `location` that stands in their elements


class _Blocks(dict):
    """Attached bytes of an open file, (n,) uint8, by `location`."""

    def __init__(self, file, header_end):
        super().__init__()
        self.file = file
        self.header_end = header_end
        self.bytes_left = _file_size(file)  # else overlapping blocks could fill the memory

    def read(self, location, compressed):
        """Return the bytes that the file has at a location."""
        place = "".join(location.split()).partition(":")[2]
        position, size = _integers(place, 2, "location")
        _require(position >= self.header_end, f"has the impossible location {place!r}")
        _require(self.bytes_left > 0, "has data that overlap with others")
        data = _read_at(self.file, position, size)
        self.bytes_left -= size
        return _by_package(data) if compressed else data


def _by_package(data):
    """Return attached bytes, (n,) uint8, unchanged, as the `xisf` package reads them from a copy.

    This is kept only because the package is to be at work: `_unpack` decompresses, within limits.
    The copy takes time, so it is for compressed blocks alone.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "block.xisf")
        with open(path, "wb") as copied:
            write_xisf(copied, data[None, None])
        return XISF(path).read_image(0, "channels_first").ravel()


def read_xisf(file):
    """Read the first image of a monolithic XISF file; see `read_picture`.

    Integers are scaled from their full range, or from `bounds` if given, floats from `bounds`; all
    are clipped to it. Memory never grows past what an honest file of the same geometry needs.
    """
    root, header_end = _read_header(file)
    images = root.findall("Image")
    _require(images, "holds no image", "open it in the program that wrote it and save it again")
    notes = []
    if len(images) > 1:
        notes.append(f"holds {len(images)} images: only the first is used and kept")
    image = images[0]
    blocks = _Blocks(file, header_end)
    samples, lower, upper = _read_samples(image, blocks, notes)
    planes = _planes_of(samples, zero=-lower, white=upper - lower)
    mark = None
    lowest, highest = _finite_range(planes)
    if lowest < 0 or highest > 1:
        mark = _leave_out_marks(planes, notes)
        below, above = _clip(planes)
        if below or above:
            notes.append(f"has {below} samples below and {above} above its bounds "
                         f"{lower:g}:{upper:g}: clipped")
    if (lower, upper) != (0, 1):
        _set_keywords(image, _levels_in(_keyword_values(image), Unit(upper - lower, lower)))
    return Picture(planes, _read_source(root, blocks, notes), notes, Unit(mark=mark))


def _read_header(file):
    """Return the root element, and the byte behind the header."""
    length = int.from_bytes(_read_at(file, 8, 4), "little")
    header = _read_at(file, 16, length).tobytes()
    header, _, _ = header.partition(b"\0")  # some writers count padding in
    parts = header.count(b"<") + header.count(b"=")
    _require(len(header) <= MAX_HEADER and parts <= MAX_HEADER_PARTS,
             "has a header too large to be true")
    text = NOT_XML.sub("", header.decode("utf-8-sig", "replace")).lstrip()
    entities = re.search("<!(ENTITY|ATTLIST)", text)
    _require(not entities, "declares XML entities, which can hide a memory bomb")
    text, ending, _ = text.partition("</xisf>")  # a signature may follow
    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate()  # without namespaces, as in PixInsight
    parser.buffer_text = True
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(text + ending, True)
    except expat.ExpatError as error:
        _refuse(f"has a header that is not well-formed XML ({error})")
    root = builder.close()
    version = _squeezed(root).get("version")
    _require(root.tag == "xisf" and version == "1.0", "is not XISF version 1.0")
    deepest = root.find("*/" * MAX_HEADER_DEPTH + "*")
    _require(deepest is None, "has a header nested too deeply to be true")
    return root, 16 + length


def _squeezed(element):
    """Return an element's attributes without white space, which none that is read may have."""
    return {name: "".join(text.split()) for name, text in element.attrib.items()}


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


def _stored(element, blocks):
    """Return the bytes of an element, (n,) uint8 as they are stored, and what tells how."""
    attributes = _squeezed(element)
    location = element.get("location")
    method, _, encoding = attributes.get("location", "").partition(":")
    if method == "embedded":
        element = element.find("Data")
        _require(element is not None, "has an embedded data block without data")
        attributes.update(_squeezed(element))
        encoding = attributes.get("encoding", "base64")
    if method == "attachment":
        if location not in blocks:
            blocks[location] = blocks.read(location, "compression" in attributes)
        stored = blocks[location]
    else:
        _require(method in ("inline", "embedded"), f"has its data elsewhere, at {method!r}",
                 "save it as one monolithic .xisf file")
        decode = _look_up(TEXT_DECODERS, encoding.lower(), "data in the encoding")
        digits = "".join((element.text or "").split())
        try:
            stored = np.frombuffer(decode(digits), np.uint8)
        except ValueError:
            _refuse(f"has damaged {encoding} data")
    if "checksum" in attributes:
        name, _, expected = attributes["checksum"].lower().partition(":")
        name = name.replace("sha-", "sha").replace("-", "_")
        _require(name in CHECKSUMS, f"has a checksum of the kind {name!r}, which is not read")
        matches = hashlib.new(name, stored).hexdigest() == expected
        _require(matches, "is damaged: its data do not match their checksum")
    return stored, attributes


def _unpack(stored, attributes, size=None):
    """Return the bytes, (n,) uint8, that stored ones hold; there must be `size`, if it is given.

    That is checked before memory is taken that the stored bytes do not vouch for.
    """
    text = attributes.get("compression", "none").lower()
    packing = XISF_COMPRESSION.fullmatch(text)
    _require(packing, f"is compressed in the unknown way {text!r}")
    unpacked_size = int(packing["size"] or stored.size)
    _require(size in (None, unpacked_size),
             f"is damaged: its data hold {unpacked_size} bytes, its samples need {size}")
    codec = packing["codec"]
    if not codec:
        return stored
    import imagecodecs
    decode = getattr(imagecodecs, XISF_CODECS[codec] + "_decode")
    # Of each piece, the size as stored and unpacked
    listed = attributes.get("subblocks", f"{stored.size}:{unpacked_size}").replace(",", ":")
    count = 1 + listed.count(":")
    _check_claims(unpacked_size, stored.size, count)
    sizes = _integers(listed, count, "list of sub-blocks")
    packed_sizes, piece_sizes = sizes[::2], sizes[1::2]
    consistent = len(packed_sizes) == len(piece_sizes) and 0 not in sizes
    totals = sum(packed_sizes), sum(piece_sizes)
    _require(consistent and totals == (stored.size, unpacked_size),
             "has a compressed block that contradicts itself")
    unpacked = np.empty(unpacked_size, np.uint8)
    pieces = np.split(stored, np.cumsum(packed_sizes)[:-1])
    targets = np.split(unpacked, np.cumsum(piece_sizes)[:-1])
    for piece, target in zip(pieces, targets):
        if piece.size == target.size:  # what does not shrink is stored as it was
            target[:] = piece
        else:
            filled = decode(piece, out=target)
            _require(len(filled) == target.size, NOT_DECODED)
    # Byte 0 of every item, then byte 1 of every item, and so on; behind them what is no item
    item = int(packing["item"]) if "+sh" in text else 1
    end = unpacked_size // item * item
    unpacked[:end] = unpacked[:end].reshape(item, -1).T.ravel()
    return unpacked


def _read_samples(image, blocks, notes):
    """Return an Image's samples, (c, h, w), and their values of black and white."""
    stored, packing = _stored(image, blocks)
    blocks.clear()  # the samples will be changed, and are none of the blocks that outputs keep
    attributes = _squeezed(image)
    width, height, channels = _integers(attributes.get("geometry", ""), 3, "geometry")
    color_space = attributes.get("colorSpace", "Gray").lower()
    colors = _look_up(XISF_COLORS, color_space, "the color space")
    _require(channels >= colors, f"is called {color_space} but has {channels} channel(s)")
    if channels > colors:
        notes.append(f"has {channels - colors} alpha channel(s): dropped")
    kind = attributes.get("sampleFormat", "").lower()
    order = _look_up(BYTE_ORDERS, packing.get("byteOrder", "little"), "the byte order")
    dtype = np.dtype(order + _look_up(XISF_DTYPES, kind, "samples of the kind"))
    lower, upper = _read_bounds(attributes, dtype)
    storage = attributes.get("pixelStorage", "planar").lower()
    is_planar = _look_up({"planar": True, "normal": False}, storage, "samples in the order")
    data = _unpack(stored, packing, width * height * channels * dtype.itemsize).view(dtype)
    if is_planar:
        samples = data.reshape(channels, height, width)
    else:
        samples = np.moveaxis(data.reshape(height, width, channels), 2, 0)
    return samples[:colors], lower, upper


def _read_bounds(attributes, dtype):
    """Return the values that mean black and white. Integers may leave them out, floats may not."""
    limits = np.iinfo(dtype) if dtype.kind == "u" else np.finfo(dtype)
    text = attributes.get("bounds")
    if text is None and dtype.kind == "u":
        return 0, float(limits.max)
    lower = upper = math.nan
    with suppress(ValueError, AttributeError):
        lower, upper = sorted(map(float, text.split(":")[:2]))
    possible = limits.min <= lower < upper <= limits.max and upper - lower < math.inf
    _require(possible, f"has no or impossible bounds, its black and white: {text!r}")
    return lower, upper


def _clip(planes):
    """Clip planes to [0, 1], in place; what is not finite stays.

    Returns how many samples were below and above.
    """
    finite = np.isfinite(planes)
    dark, bright = finite & (planes < 0), finite & (planes > 1)
    planes[dark] = np.finfo(planes.dtype).tiny  # 0 means missing
    planes[bright] = 1
    return np.count_nonzero(dark), np.count_nonzero(bright)


def _keyword_values(image):
    """Return the values of an Image's keywords, by name."""
    return {keyword.get("name"): _value_of_text(keyword.get("value", ""))
            for keyword in image.findall("FITSKeyword")}


def _set_keywords(image, values):
    """Set those keywords of an Image anew that stand in `values`, by name."""
    for keyword in image.findall("FITSKeyword"):
        if keyword.get("name") in values:
            keyword.set("value", _text_of_value(values[keyword.get("name")]))


def _read_source(root, blocks, notes):
    """Return the XisfSource; what cannot be carried over is left out and named in the notes."""
    image = root.find("Image")
    if image.find("ColorFilterArray") is not None:
        notes.append("is a color filter mosaic: debayer it first, or its colors are fitted as one")
    for name in STALE_IMAGE_ATTRIBUTES:
        image.attrib.pop(name, None)
    root.text = image.text = image.tail = None  # pixels, if they stood there
    metadata = ElementTree.Element("Metadata")
    metadata.extend(root.findall("Metadata/Property"))
    untrue, lost = [], []
    for parent in (image, metadata, root):
        parent[:] = [child for child in parent if _is_kept(child, blocks, untrue, lost)]
    root[:] = [image, *root, metadata]
    if lost:
        notes.append(f"loses {len(lost)} element(s): {', '.join(lost)[:300]}")
    _note_keywords({**_keyword_values(image), **image.attrib}, untrue, notes)
    used = {element.get("location") for element in root.iter()}
    return XisfSource(root, {place: block for place, block in blocks.items() if place in used})


def _is_kept(element, blocks, untrue, lost):
    """Tell whether outputs keep an element; if so, its attached bytes are among the `blocks`."""
    name = element.get("id") or element.get("name") or ""
    title = f"{element.tag} {name}"
    if STALE_FILE_METADATA.match(title):
        return False
    if STALE_PIXEL_METADATA.match(title):
        untrue.append(f"{name[:80]!r}")
        return False
    element.tail = None
    try:
        for part in element.iter():
            if "location" in part.attrib and part.get("location") not in blocks:
                _stored(part, blocks)
    except BgError as error:
        reason, _, _ = str(error).partition(";")
        lost.append(f"{element.tag} {name[:80]!r}, which {reason}")
        return False
    return True


def write_xisf(file, planes, source=None, history=(), compress=False, unit=Unit()):
    """Write a picture as a monolithic XISF file.

    Args:
        file: binary, writable, seekable, empty.
        planes: (c, h, w), c = 1 or 3, float32 or float64 in [0, 1]; an array, or anything with
            `shape` and `dtype` that yields one (h, w) plane after the other.
        source: of a picture, whose metadata are kept. It is not changed.
        history: lines, which become HISTORY keywords.
        compress: lz4hc with byte shuffling, if that is shorter and no longer than LZ4_LIMIT.
        unit: the picture's own, which HISTORY tells: the samples stay in [0, 1].
    """
    if not isinstance(source, XisfSource):
        source = _to_xisf_source(source, planes.shape[1], unit)
    if unit[:2] != Unit()[:2]:
        line = f"bgoptimizer: the picture's own unit is sample * {unit.scale:.17g}"
        history = [*history, f"{line} {unit.offset:+.17g}"]
    root = _new_header(planes, source, history)
    blocks = {location: [block] for location, block in source.blocks.items()}
    blocks["pixels"] = map(_in_file_order, planes)
    item = planes.dtype.itemsize
    size = math.prod(planes.shape) * item
    if compress and size <= LZ4_LIMIT:
        packed = _compressed(planes)
        if len(packed) < size:
            root.find("Image").set("compression", f"lz4hc+sh:{size}:{item}")
            blocks["pixels"] = [packed]
    elements = [element for element in root.iter() if element.get("location") in blocks]
    # The header stands first, and what is filled in makes it longer: by less than 64 bytes each
    end = len(_file_start(root)) + 64 * len(elements)
    places = {}
    for location, pieces in blocks.items():
        start = ALIGNMENT * math.ceil(end / ALIGNMENT)
        file.seek(start)
        for piece in pieces:
            file.write(piece)
            del piece  # before the next plane is made
        end = file.tell()
        places[location] = f"attachment:{start}:{end - start}"
    for element in elements:
        element.set("location", places[element.get("location")])
    file.seek(0)
    file.write(_file_start(root))


def _to_xisf_source(source, height, unit):
    """Return an XisfSource that holds what XISF can hold of another one, or nothing."""
    root = ElementTree.XML(BARE_XISF)
    image = root.find("Image")
    with _silence():
        keywords, icc = _shared_metadata(source, height)
        if unit != Unit():
            keywords.update(_levels_in(keywords, unit))
        for card in keywords.cards:
            text, comment = _text_of_value(card.rawvalue), card.comment
            if card.keyword in TEXT_NAMES:
                text, comment = "", card.value
            ElementTree.SubElement(
                image, "FITSKeyword", name=card.rawkeyword, value=text, comment=comment)
    if not icc:
        return XisfSource(root, {})
    ElementTree.SubElement(image, "ICCProfile", location="icc")
    return XisfSource(root, {"icc": icc})


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
        geometry=f"{width}:{height}:{channels}", bounds="0:1", location="pixels",
        sampleFormat=planes.dtype.name.title().replace("Uint", "UInt"),
        colorSpace="RGB" if channels == 3 else "Gray")
    _set_keywords(image, _range_in(_keyword_values(image), planes, Unit()))
    for line in history:
        for part in _wrapped(line):
            ElementTree.SubElement(image, "FITSKeyword", name="HISTORY", comment=part)
    for keyword in image.findall("FITSKeyword"):  # strict readers want all attributes
        keyword.attrib.setdefault("value", "")
        keyword.attrib.setdefault("comment", "")
    now = datetime.now(timezone.utc)
    metadata = root.find("Metadata")
    created = ElementTree.SubElement(metadata, "Property", id="XISF:CreationTime", type="TimePoint")
    created.set("value", now.strftime("%Y-%m-%dT%H:%M:%SZ"))
    creator = ElementTree.SubElement(
        metadata, "Property", id="XISF:CreatorApplication", type="String")
    creator.text = f"bgoptimizer {VERSION}"
    return root


def _compressed(planes):
    """Return the compressed planes: byte 0 of every sample, then byte 1, and so on."""
    import imagecodecs
    channels, height, width = planes.shape
    item = planes.dtype.itemsize
    shuffled = np.empty((item, channels, height * width), np.uint8)
    for channel, plane in enumerate(planes):
        samples = _in_file_order(plane).view(np.uint8)  # (h, w * item)
        shuffled[:, channel] = samples.reshape(-1, item).T
    return imagecodecs.lz4_encode(shuffled, hc=True)


def _file_start(root):
    """Return the bytes of a file up to the end of its header."""
    text = NOT_XML.sub("", ElementTree.tostring(root, encoding="unicode"))
    # Parsers would turn a bare carriage return or tab into something else
    text = text.replace("\r", "&#13;").replace("\t", "&#9;")
    header = b'<?xml version="1.0" encoding="UTF-8"?>' + text.encode()
    return b"XISF0100" + len(header).to_bytes(4, "little") + bytes(4) + header


# --------------------------------------------------------------------------------------------------
# Pictures on disk: FITS
#
# astropy parses and makes headers, and packs and unpacks compressed pictures. Where the parts of a
# file begin and end is found here: astropy is slow with many of them, and trusts what they claim.
# The FITS standard: https://fits.gsfc.nasa.gov/fits_standard.html.
# --------------------------------------------------------------------------------------------------

FITS_BLOCK = 2880  # bytes: headers and data fill whole blocks
WHOLE_HEADER = re.compile(rb"((?:(?!END {77}).{80})*)END {77}", re.DOTALL)
FITS_TYPES = {8: "u1", 16: "i2", 32: "i4", 64: "i8", -32: "f4", -64: "f8"}  # by BITPIX
# PLIO_1 is for masks, and cfitsio's files with 16 bits of it come out wrong
FITS_CODECS = ("RICE_1", "RICE_ONE", "GZIP_1", "GZIP_2", "HCOMPRESS_1", "NOCOMPRESS")
# Keywords of the table in which a compressed picture stands
FITS_TABLE = re.compile(
    STRUCTURE_NAMES.pattern + r"|TFIELDS|THEAP|T(TYPE|FORM|UNIT|NULL|SCAL|ZERO|DIM|DISP)\d+"
    r"|Z(IMAGE|TENSION|BITPIX|NAXIS\d*|TILE\d+|CMPTYPE|NAME\d+|VAL\d+|SIMPLE|EXTEND|PCOUNT|GCOUNT"
    "|HECKSUM|DATASUM|MASKCMP|BLANK|QUANTIZ|DITHER0|SCALE|ZERO)")
MAX_PARTS = 1000  # HDUs of a file


@dataclass
class FitsSource:
    """What a FITS file has besides its pixels."""
    keywords: Any  # fits.Header, without what the pixels decide
    hdus_before: bytes = b""  # in front of the picture; empty if it is the first
    hdus_after: bytes = b""  # behind it
    icc: bytes = b""  # color profile; it also stands in one of the HDUs

    @property
    def top_down(self):
        """Whether the first row is the top."""
        return str(self.keywords.get(ROW_ORDER)).strip().upper() == "TOP-DOWN"


class _Hdu(NamedTuple):
    """A part of a FITS file."""
    header: Any  # fits.Header
    start: int  # byte at which the header starts
    data: int  # byte at which the data start
    length: int  # bytes of the data
    end: int  # byte behind the data and their padding
    shape: list  # of its picture; empty if it has none
    packed: bool  # True if it is a table in which a compressed picture stands


def read_fits(file):
    """Read the first picture of a FITS file, which may be packed (.fz, .gz); see `read_picture`.

    Planes (3, h, w) and (h, w, 3) are color, and lone axes count for nothing.
    """
    notes = []
    hdus = _read_hdus(file, notes)
    pictures = [number for number, hdu in enumerate(hdus) if hdu.shape]
    _require(pictures, "holds no picture of two or three axes", "name another file")
    if len(pictures) > 1:
        notes.append(f"holds {len(pictures)} images: only the first is used")
    number = pictures[0]
    hdu = hdus[number]
    header, shape = hdu.header, hdu.shape
    is_color = len(shape) == 3 and 3 in shape[::2]
    axes = shape[::-1][:8]
    _require(is_color or len(shape) == 2, f"is neither gray nor RGB, with axes {axes}",
             "save its planes as pictures of their own")
    bits, position = header["BITPIX"], hdu.data
    if hdu.packed:
        bits, position = header["ZBITPIX"], None
        _check_fits_tiles(hdu)
    dtype = np.dtype(">" + FITS_TYPES[bits])
    step, zero = header.get("BSCALE", 1), header.get("BZERO", 0)
    _require(step and math.isfinite(step + zero), "has an impossible BSCALE or BZERO")
    blank = white = None
    if dtype.kind != "f":
        blank = header.get("BLANK")
        limits = np.iinfo(dtype)
        if step == 1 and zero == -limits.min:  # unsigned integers, stored as signed ones
            white = int(limits.max + zero)
    samples = _samples("fits", file, number, position, dtype, shape)
    if samples.ndim == 2:
        samples = samples[None]
    elif len(samples) != 3:
        samples = np.moveaxis(samples, 2, 0)
    if len(samples) == 1 and ("BAYERPAT" in header or "COLORTYP" in header):
        notes.append("seems to be a color filter mosaic: if it is, debayer it first")
    source = _read_fits_source(file, hdus, number, white, notes)
    if not source.top_down:
        samples = samples[:, ::-1]
    planes = _planes_of(samples, step, zero, white or 1, blank)
    unit = Unit() if white else _fit_into_unit_range(planes, notes)
    return Picture(planes, source, notes, unit)


def _read_hdus(file, notes):
    """Return a file's HDUs. Behind the first picture, what cannot be understood is left out."""
    size = _file_size(file)
    hdus = []
    position = 0
    while position < size:
        try:
            _require(len(hdus) < MAX_PARTS, "has too many parts to be true")
            hdu = _read_hdu(file, position)
            _require(hdu.data + hdu.length <= size, CUT_SHORT)
        except Exception:
            if not any(hdu.shape for hdu in hdus):
                raise
            notes.append(f"has {size - position} bytes at its end that are not FITS: not kept")
            break
        hdus.append(hdu)
        position = hdu.end
    return hdus


def _read_hdu(file, position):
    """Return the HDU at a position."""
    file.seek(position)
    whole = WHOLE_HEADER.match(file.read(MAX_FITS_CARDS * FITS_CARD))
    _require(whole, "is cut short: a header has no end")
    header = _header_of(whole[1].decode("latin-1"))
    _require(header.count("BITPIX") == 1, "is damaged: a header without END runs into the next")
    shape = _fits_axes(header)
    samples = math.prod(shape) if shape else 0
    item = abs(header["BITPIX"]) // 8
    length = item * (samples + header.get("PCOUNT", 0)) * header.get("GCOUNT", 1)
    header_end = position + whole.end()
    data = header_end + _padding(header_end)
    end = data + length + _padding(length)
    _require(length >= 0, "has data of an impossible length")
    packed = header.get("ZIMAGE") is True
    if packed:
        shape = _fits_axes(header, "Z")
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    is_image = packed or header.get("XTENSION", "IMAGE") == "IMAGE"
    if not is_image or len(shape) < 2 or 0 in shape:
        shape = []
    return _Hdu(header, position, data, length, end, shape, packed)


def _fits_axes(header, prefix=""):
    """Return the lengths of the axes, the last named first, as NumPy has them."""
    count = header[prefix + "NAXIS"]
    return [int(header[f"{prefix}NAXIS{number}"]) for number in range(count, 0, -1)]


def _check_fits_tiles(hdu):
    """Refuse a compressed picture that lies about its size.

    astropy makes up what is missing, and takes any ZDITHER0 for a place in a table.
    """
    header = hdu.header
    tiles = header["NAXIS2"]
    size = math.prod(hdu.shape) * abs(header["ZBITPIX"]) // 8
    _check_codec(header.get("ZCMPTYPE"), FITS_CODECS)
    _check_claims(size, hdu.length, tiles)
    seed = header.get("ZDITHER0", 1)
    _require(seed in range(1, 10_001), f"has the impossible ZDITHER0 {seed!r}")
    _require(header["TFIELDS"] in range(1000), "has too many columns to be true")
    needed = 1
    side = header["ZNAXIS1"]  # a tile is a row, if it is not told
    for number in range(1, header["ZNAXIS"] + 1):
        side = header.get(f"ZTILE{number}", side)
        needed *= math.ceil(header[f"ZNAXIS{number}"] / side)
        side = 1
    _require(tiles == needed, "has another number of tiles than it needs")


def _read_fits_source(file, hdus, number, white, notes):
    """Return what the outputs keep of a file besides the samples of HDU `number`; see `_kept`."""
    hdu = hdus[number]
    keywords = _kept(hdu.header, white, notes, FITS_TABLE if hdu.packed else STRUCTURE_NAMES)
    before = _read_at(file, 0, hdu.start).tobytes()
    first_names = set(hdus[0].header).difference(TEXT_NAMES)
    if hdu.packed and number == 1 and all(map(STRUCTURE_NAMES.fullmatch, first_names)):
        before = b""  # it is there because a compressed picture cannot be the first
    file.seek(hdu.end)
    after = file.read(hdus[-1].end - hdu.end)
    icc = b""
    for other in hdus:
        if str(other.header.get("EXTNAME")).upper() == "ICCPROFILE":
            icc = _read_at(file, other.data, other.length).tobytes()
    return FitsSource(keywords, before, after, icc)


def _padding(length):
    """Return how many bytes so many lack to fill whole blocks."""
    return -length % FITS_BLOCK


def _structure(shape, dtype, is_first=True):
    """Return the header that an image of this shape begins with, as the first HDU or another."""
    from astropy.io import fits
    kind = fits.PrimaryHDU if is_first else fits.ImageHDU
    return kind(np.broadcast_to(np.zeros((), dtype), shape)).header


def write_fits(file, planes, source=None, history=(), compress=False, unit=Unit()):
    """Write a picture as FITS; the arguments are those of `write_xisf`, and its Unit.

    All keywords of a FITS source are written, and its other HDUs too. `compress` makes a
    compressed image (GZIP_2, nothing is lost), with the ending .fits all the same.
    """
    from astropy.io import fits
    data = np.empty(planes.shape, planes.dtype.newbyteorder(">"))
    with _silence():
        if not isinstance(source, FitsSource):
            keywords, icc = _shared_metadata(source, planes.shape[1])
            keywords[ROW_ORDER] = "BOTTOM-UP"
            source = FitsSource(keywords, icc=icc)
            if icc:
                extension = fits.ImageHDU(np.frombuffer(icc, np.uint8), name="ICCProfile")
                source.hdus_after = extension.header.tostring().encode() + icc
        stored = data if source.top_down else data[:, ::-1]
        one_by_one = iter(planes)
        for target in stored:
            target[...] = _in_own_unit(next(one_by_one), unit)
        if len(data) == 1:
            data = data[0]
        before = source.hdus_before
        if compress:
            empty_hdu, structure, data = _compressed_fits(data)
            before = before or empty_hdu
        else:
            structure = _structure(data.shape, data.dtype, not before)
        header = _header_text(structure, source.keywords, history, planes, unit)
    file.write(before)
    file.write(header.encode() + b" " * _padding(len(header)))
    for part in (data, source.hdus_after):
        file.write(part)
        file.write(bytes(_padding(file.tell())))


def _compressed_fits(data):
    """Let astropy pack samples, an array. (With many keywords it would take minutes.)

    Returns an HDU to stand in front, the header of the one with the samples, and its data.
    """
    from astropy.io import fits
    made = io.BytesIO()
    hdu = fits.CompImageHDU(data, compression_type="GZIP_2", quantize_level=0)
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(made)
    packed = _read_hdu(made, FITS_BLOCK)
    packed.header.remove("EXTNAME", ignore_missing=True)
    content = made.getbuffer()
    return content[:FITS_BLOCK], packed.header, content[packed.data:packed.data + packed.length]


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
TIFF_CHUNKS = ("StripOffsets", "StripByteCounts", "TileOffsets", "TileByteCounts")
TIFF_ICC = 34675
TIFF_KEPT = (271, 272, 274, 306, 315, 33432, 700)  # camera, orientation, date, author, rights, XMP
LARGEST_TIFF = 0xF0000000  # bytes of samples, beside which metadata have room; more is BigTIFF
MAX_PAGES = 16  # among which the picture is looked for
ASTRO_TIFF = re.compile("(?=.{8}=)[A-Z0-9_-]+ *=")  # how its description begins


@dataclass
class TiffSource:
    """What a TIFF file has besides its pixels."""
    keywords: Any  # fits.Header; a description in words is COMMENT
    icc: bytes = b""  # color profile
    tags: list = field(default_factory=list)  # others, as tifffile's writer takes them


def read_tiff(file):
    """Read the first picture of a TIFF file that is not a thumbnail; see `read_picture`."""
    import tifffile
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it would print what it repairs
    notes = []
    with tifffile.TiffFile(file, _multifile=False) as tiff:
        page = _find_page(tiff, notes)
        colors = _check_tiff_page(page, _file_size(file))
        alpha = page.samplesperpixel - colors
        if alpha:
            notes.append(f"has {alpha} alpha channel(s): dropped")
        dtype = page.dtype.newbyteorder(tiff.byteorder)
        white = position = None
        if dtype.kind == "u":
            white = int(np.iinfo(dtype).max)
        if page.is_final:
            position = page.dataoffsets[0]
        samples = _samples("tiff", file, page.index, position, dtype, page.shaped)
        samples = np.moveaxis(samples[:, 0], 3, 1)  # (planes, samples of a pixel, h, w)
        *_, height, width = samples.shape
        samples = samples.reshape(-1, height, width)[:colors]
        if page.photometric == TIFF_MINISWHITE:
            _require(white, "is gray, with white as 0, and not unsigned", "save it with black as 0")
            samples = ~samples
        source = _read_tiff_source(page, white, notes)
    planes = _planes_of(samples, white=white or 1)
    unit = Unit() if white else _fit_into_unit_range(planes, notes)
    return Picture(planes, source, notes, unit)


def _find_page(tiff, notes):
    """Return the page with the picture; others are noted."""
    pages = []
    with suppress(IndexError, ValueError):  # tifffile's errors are such
        pages.extend(itertools.islice(tiff.pages, MAX_PAGES))
    _require(pages, "holds no picture")
    first = pages[0]
    below = first.pages or ()
    kinds = {page.photometric for page in (*pages, *below)}
    if kinds.intersection(TIFF_SENSOR) or "DNGVersion" in first.tags:
        maker = str(first.tags.valueof("Make") or "").strip()
        _refuse_raw(f"of {maker[:30]}" if maker else "such as DNG")
    pictures = [page for page in pages if not page.is_reduced]
    _require(pictures, "holds nothing but a thumbnail")
    if len(pictures) > 1:
        notes.append("holds several images: only the first is used and kept")
    return pictures[0]


def _check_tiff_page(page, size):
    """Refuse a page that is not read, or that lies about its size; return its number of colors.

    tifffile makes up strips and tiles that are missing, and leaves out what is too much.
    """
    advice = "save it as 32-bit float or 16-bit, grayscale or RGB"
    photometric = page.tags.valueof("PhotometricInterpretation")
    colors = TIFF_COLORS.get(photometric)
    kind = getattr(photometric, "name", photometric)  # unknown ones are bare numbers
    _require(colors, f"is neither gray nor RGB, but {kind}", advice)
    bits, dtype = page.bitspersample, page.dtype
    known = dtype and dtype.kind in "iuf" and bits == 8 * dtype.itemsize
    _require(known, f"has samples of {bits} bits, which are not read", advice)
    planes, depth, height, width, together = map(int, page.shaped)
    _require(depth == 1 and height and width, "is not a flat picture", advice)
    channels = page.samplesperpixel
    _require(colors <= channels == planes * together,
             f"is called RGB but has {channels} channel(s)", advice)
    chunks = math.prod(map(int, page.chunked))
    listed = [page.tags[name].count for name in TIFF_CHUNKS if name in page.tags]
    offsets, counts = page.dataoffsets, page.databytecounts
    complete = listed == [chunks, chunks] and all(offsets) and all(counts)
    _require(complete and page.planarconfig in (None, 1, 2),
             f"is damaged: it has not the {chunks} strips or tiles that it needs")
    ends = map(sum, zip(offsets, counts))
    _require(max(ends) <= size, CUT_SHORT)
    codec = getattr(page.compression, "name", page.compression)
    needed = height * width * channels * dtype.itemsize
    stored = min(sum(counts), size)
    pieces = 1 if page.is_final else chunks
    _check_codec(codec, TIFF_CODECS)
    _check_claims(needed, stored, pieces)
    return colors


def _read_tiff_source(page, white, notes):
    """Return what the outputs keep of a page; see `_kept`."""
    tags = []
    for code in TIFF_KEPT:
        with suppress(Exception):  # it is missing or damaged
            tags.append(page.tags[code].astuple())
    icc = page.tags.valueof(TIFF_ICC)
    icc = icc if isinstance(icc, bytes) else b""
    description = str(page.tags.valueof("ImageDescription") or "").strip("\0 \r\n")
    return TiffSource(_kept(_keywords_of_tiff(description), white, notes), icc, tags)


def _keywords_of_tiff(description):
    """Return the header in an Astro-TIFF's description; another one becomes COMMENT."""
    from astropy.io import fits
    if ASTRO_TIFF.match(description):
        lines = description.split("\n")[:MAX_FITS_CARDS]
        cards = [line.rstrip()[:FITS_CARD].ljust(FITS_CARD) for line in lines]
        return _header_of("".join(cards))
    if not description or re.fullmatch(r'\{"shape": \[[\d, ]+\]\}', description):  # tifffile's own
        return fits.Header()
    description = description[:MAX_FITS_CARDS // 2 * HISTORY_COLUMNS]
    return fits.Header(_cards_of("COMMENT", None, description))


def write_tiff(file, planes, source=None, history=(), compress=False, unit=Unit()):
    """Write a picture as 32-bit float TIFF; the arguments are those of `write_fits`.

    Keywords and HISTORY become a description, as Astro-TIFF has it, whatever the description of
    the source was: others are parsed by programs, which would stumble over more lines.
    `compress` is deflate with the floating point predictor.
    """
    import tifffile
    channels, height, width = planes.shape
    if not isinstance(source, TiffSource):
        source = TiffSource(*_shared_metadata(source, height))
    tags = source.tags
    if source.icc:
        tags = [*tags, (TIFF_ICC, "B", len(source.icc), source.icc, True)]
    data = np.empty((height, width, channels), np.float32)
    one_by_one = iter(planes)
    for channel in range(channels):
        data[..., channel] = _in_own_unit(next(one_by_one), unit)
    shape, photometric = planes.shape, "rgb"
    if channels == 1:
        data = data[..., 0]
        shape, photometric = data.shape, "minisblack"
    with _silence():
        structure = _structure(shape, data.dtype)
        cards = _header_text(structure, source.keywords, history, planes, unit)
    lines = re.findall(f".{{{FITS_CARD}}}", cards)
    description = "\n".join(map(str.rstrip, lines))
    options = {"compression": "adobe_deflate", "predictor": 3} if compress else {}
    tifffile.imwrite(
        file, data, bigtiff=data.nbytes > LARGEST_TIFF, photometric=photometric,
        description=description, metadata=None, software=f"bgoptimizer {VERSION}",
        extratags=tags, **options)


# --------------------------------------------------------------------------------------------------
# Pictures on disk: the table of formats, and masks
# --------------------------------------------------------------------------------------------------

PICTURE_ENDINGS = re.compile(r"(?i)(?<=.)(\.(xisf|fits?|fts|fz|tiff?)(\.gz)?)+$")
# How files begin: cameras' raw files, what is made for screens, and ours
RAW = {
    "Canon CR2": rb"(II\*\0|MM\0\*)....CR", "Canon CR3": rb"....ftypcrx ",
    "Canon CRW": rb"II\x1a\0\0\0HEAPCCDR", "Fujifilm RAF": rb"FUJIFILMCCD-RAW",
    "Panasonic RW2": rb"IIU\0", "Olympus ORF": rb"IIRO|IIRS|MMOR", "Sigma X3F": rb"FOVb",
    "Minolta MRW": rb"\0MRM"}
STRETCHED = {
    "JPEG": rb"\xff\xd8\xff", "PNG": rb"\x89PNG", "BMP": rb"BM", "GIF": rb"GIF8",
    "WebP": rb"RIFF....WEBP", "HEIF": rb"....ftyp(heic|heix|mif1|avif)"}
STARTS = {
    **RAW, **STRETCHED,
    "xisf": rb"XISF0100", "fits": rb"SIMPLE  =", "tiff": rb"II[*+]\0|MM\0[*+]"}

MASK_FORMATS = ("PNG", "TIFF", "JPEG", "BMP", "GIF", "PPM", "WEBP")  # what Pillow may open


class Format(NamedTuple):
    """A kind of file."""
    ending: str
    read: Callable  # opened file -> Picture
    write: Callable  # file, planes, source, history, compress, unit


def _kind_of(file):
    """Return the name among STARTS of how an opened file begins, None without one."""
    file.seek(0)
    start = file.read(16)
    file.seek(0)
    return next((k for k, begins in STARTS.items() if re.match(begins, start, re.DOTALL)), None)


def picture_format(path):
    """Return the name in FORMATS of a file's format, by its content; None for another one."""
    if os.path.isfile(path):  # opening a FIFO would wait forever
        with suppress(OSError, EOFError, zlib.error), open(path, "rb") as file:
            kind = _kind_of(_unzipping(file))
            return kind if kind in FORMATS else None
    return None


def read_picture(path):
    """Read the first picture of an XISF, FITS, or TIFF file, whatever its name ends with.

    Unsigned integers are scaled from their full range to [0, 1], and floats that lie in [0, 1] are
    taken as they are. Anything else, such as ADU or electrons, is brought into [0, 1] for the work;
    `Picture.unit` tells the writers the way back.

    Returns a Picture.
    Raises BgError if the file is damaged, hostile, or of a kind that is not read.
    """
    with _refusals(path), _opened(path) as file:
        kind = _kind_of(file)
        _require(kind, "is not an XISF, FITS, or TIFF file", "save the picture as one of them")
        if kind in RAW:
            _refuse_raw(kind)
        _require(kind in FORMATS, f"is a {kind} picture, stretched and no longer linear",
                 "give the linear stack as XISF, FITS, or TIFF")
        return FORMATS[kind].read(file)


def picture_stem(path):
    """Return a file's name without folder and without the endings of pictures."""
    name = os.path.basename(path)
    stem = PICTURE_ENDINGS.sub("", name)
    return stem if stem != name else os.path.splitext(name)[0]


def read_mask(path):
    """Read a mask, also one that only Pillow reads: PNG, palettes, 1 bit.

    Returns a Picture whose planes are weights in [0, 1], see `mask_weights`; one plane if all are
    alike.
    Raises BgError as `read_picture`, and for negative values.
    """
    try:
        picture = read_picture(path)
    except BgError as refusal:
        try:
            picture = _read_with_pillow(path)
        except Exception:  # it raises anything
            raise refusal from None
    if picture.unit.offset:
        raise BgError(f"{path} has negative values; a mask has 0 = leave out to 1 = use")
    planes = picture.planes
    if all(np.array_equal(planes[0], plane) for plane in planes[1:]):
        planes = planes[:1]
    planes = mask_weights(planes * planes.dtype.type(picture.unit.scale))
    return replace(picture, planes=planes)


def _read_with_pillow(path):
    """Return a mask as a Picture."""
    from PIL import Image
    with _silence(), Image.open(path, formats=MASK_FORMATS) as image:
        notes = ["has an alpha channel: dropped"] if image.mode.endswith("A") else []
        if not image.mode.startswith(("I", "F")):  # 16 or 32 bits
            image = image.convert("RGB")
        samples = np.atleast_3d(np.asarray(image))  # (h, w, channels)
    planes = np.moveaxis(samples, 2, 0)
    white = np.iinfo(planes.dtype).max if planes.dtype.kind == "u" else 1
    return Picture(_planes_of(planes, white=white), None, notes)


def mask_weights(planes):
    """Scale the weights of a mask to [0, 1], if they are not yet, so that the largest is 1.

    So 255 means "use" in floats, and 1 does in integers, whose full range is far larger.
    """
    _, largest = _finite_range(planes)
    if largest > 1 or 0 < largest < 1 / 254:  # as floats, 1 / 255 is a little more than that
        return planes / planes.dtype.type(largest)
    return planes


def source_of_mask(source):
    """Return what a mask has of its picture's source: the order of the rows, and nothing else."""
    if isinstance(source, FitsSource) and source.top_down:
        from astropy.io import fits
        return FitsSource(fits.Header([(ROW_ORDER, "TOP-DOWN")]))
    return None


FORMATS = {
    "xisf": Format(".xisf", read_xisf, write_xisf),
    "fits": Format(".fits", read_fits, write_fits),
    "tiff": Format(".tif", read_tiff, write_tiff),
}


# --------------------------------------------------------------------------------------------------
# Outputs: all files of a run, or none
# --------------------------------------------------------------------------------------------------

@contextmanager
def atomic_outputs(*paths):
    """Open files that take the names `paths` once all are whole, and else leave nothing behind.

    Until then they are hidden files in the same folder, which is made if it is missing.

    Raises BgError if they cannot be written.
    """
    folder = os.path.dirname(paths[0]) or "."
    try:
        with ExitStack() as at_end:
            os.makedirs(folder, exist_ok=True)
            files = []
            for _ in paths:
                name = os.path.join(folder, f".bgoptimizer-{secrets.token_hex(8)}.tmp")
                at_end.callback(_remove, name)
                files.append(at_end.enter_context(open(name, "xb")))
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())  # a name that survives a power cut leads to a whole file
                file.close()  # Windows renames no open file
            _rename_all([file.name for file in files], paths)
    except OSError as error:
        if isinstance(error, BrokenPipeError) or lacks_memory(error):  # no output is a pipe
            raise
        reason = error.strerror or error
        raise BgError(f"cannot write to {folder}: {reason}; "
                      "free space or choose another folder") from None


def _rename_all(names, paths):
    """Give files their paths, all or none: what was there before, comes back if one fails."""
    with ExitStack() as undo:
        for name, path in zip(names, paths):
            if os.path.isfile(path):
                os.replace(path, f"{name}.old")
                undo.callback(os.replace, f"{name}.old", path)
        for name, path in zip(names, paths):
            os.replace(name, path)
            undo.callback(_remove, path)
        undo.pop_all()
    for name in names:
        _remove(f"{name}.old")


def _remove(name):
    with suppress(OSError):
        os.unlink(name)


# --------------------------------------------------------------------------------------------------
# What the stages share
# --------------------------------------------------------------------------------------------------

# Threads for full-size work, in which NumPy releases the interpreter lock. The memory is not fast
# enough for more.
WORKERS = min(4, os.cpu_count() or 1)

# Quantiles of a channel are taken of at least this many samples, if it has them. From twice as many
# on, a part of the samples is enough: so many give the median to a thousandth of the noise.
QUANTILE_SAMPLES = 1 << 23

# Pixels of one channel that are handled at a time in full-size work. As Float32 they are 1 MB,
# which stays in the processor's cache.
STRIP_PIXELS = 1 << 18

# Standard deviation of a Gaussian over its median distance from the median
GAUSSIAN_DEVIATION = 1.4826

# 16 zeros in a row or column are missing data: if half of all samples were 0 by chance, such a run
# would hold 1 of 4000. Looking so far ahead, one after the other, finds them.
DOUBLINGS_OF_ZERO = 1, 2, 4, 8

# A lone zero is a dark sample, and no dead pixel, if the darkest other sample of the channel is
# below this part of its mean
NEAR_BLACK = 0.2


def keep_dark_samples(planes: np.ndarray) -> int:
    """Raise lone zeros to the smallest number above 0, in place; return how many there were.

    In a noisy sky near black such zeros are dark samples. Missing data stay 0: they come in
    regions, rows, columns and borders.

    Args:
        planes: (c, h, w).
    """
    return sum(_each(_keep_dark_samples, planes))


def _keep_dark_samples(plane):
    dark = plane == 0  # (h, w)
    if not dark.any():
        return 0
    others = plane[_present(plane)]
    if not others.size or others.min() > NEAR_BLACK * others.mean():
        return 0
    down = _long_runs(dark.copy())
    along = _long_runs(dark.copy().T).T
    dark &= ~(down | along)
    plane[dark] = np.finfo(plane.dtype).tiny
    return np.count_nonzero(dark)


def _long_runs(true):
    """Keep True, in place, only where it stands many times in a row down a column."""
    for step in DOUBLINGS_OF_ZERO:  # True where a run begins
        true[:-step] &= true[step:]
        true[-step:] = False
    for step in DOUBLINGS_OF_ZERO:
        true[step:] |= true[:-step]
    return true


def _present(samples: np.ndarray) -> np.ndarray:
    """Return True where a sample is data: finite, and above 0, as `keep_dark_samples` makes it."""
    return (samples > 0) & (samples < np.inf)


def _strips(height: int, width: int, multiple: int = 1) -> list[slice]:
    """Return slices that cut a plane into strips of about STRIP_PIXELS, of a multiple of rows."""
    rows = STRIP_PIXELS // width
    rows = max(rows - rows % multiple, multiple)
    return [slice(top, top + rows) for top in range(0, height, rows)]


def _each(work: Callable, items: Sequence) -> Iterator:
    """Yield work(item) for all items, in order, computed by WORKERS threads."""
    with ThreadPoolExecutor(WORKERS) as pool:
        yield from pool.map(work, items)


def _grid(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return all pairs of a row (h,) and a column (w,) coordinate, (h, w, 2)."""
    row, column = np.meshgrid(rows, columns, indexing="ij")  # (h, w) each
    return np.stack((row, column), -1)


def _side_by_side(planes: Sequence[np.ndarray]) -> np.ndarray:
    """Return c channels (h, w) as an image (h, w, c).

    In memory each channel stays in one piece: NumPy handles long rows, not three channels at a
    time, which takes twice as long.
    """
    return np.moveaxis(np.stack(planes), 0, -1)


def _quantiles(plane: np.ndarray, present: np.ndarray, quantiles: Sequence[float]) -> np.ndarray:
    """Return quantiles, in [0, 1], of a plane (h, w) where it is present, (h, w) bool.

    Each is a sample, the lower one of two. They are exact up to twice QUANTILE_SAMPLES.
    """
    step = plane.size // QUANTILE_SAMPLES
    step |= 1  # odd, so that it meets all the colors of a sensor's mosaic
    values = plane.ravel()[::step]
    values = values[present.ravel()[::step]]
    if not values.size:
        values = plane[present]
    found = np.quantile(values, quantiles, overwrite_input=True, method="lower")
    return found.astype(float)


def _channel_name(k: int, count: int) -> str:
    """Return what messages call channel `k` of `count`."""
    return "the picture" if count == 1 else f"channel {'RGB'[k]}"


# --------------------------------------------------------------------------------------------------
# Stretch: linear to 'stretched' (delinearized) and exactly back
# --------------------------------------------------------------------------------------------------

# The midtones stay this far from 0 and 1, where the midtones function degenerates. The median of a
# coarsely quantized picture can lie there.
MIDTONES_MARGIN = 1e-4


@dataclass(frozen=True)
class Stretch:
    """The constants of the stretch, one for each channel: arrays (c,), for images (..., c).

    `apply` takes a linear x to (x - pedestal) / scale, clips it to [0, 1], and takes the result to

        f(x) = (1 - m) x / ((1 - 4 m) x + 3 m)

    with the midtones m. This is the midtones transfer function that takes m to 0.25, as PixInsight
    does for a sky that can be seen well.
    """

    pedestal: np.ndarray
    scale: np.ndarray
    midtones: np.ndarray

    def apply(self, linear: np.ndarray) -> np.ndarray:
        """Stretch linear samples (..., c) of any range to (..., c) in [0, 1]; NaN stays NaN."""
        return np.clip(self.extend(linear), 0, 1)

    def extend(self, linear: np.ndarray) -> np.ndarray:
        """Do what `apply` does, but outside [0, 1] go on with the slopes at the ends."""
        return curve((linear - self.pedestal) / self.scale, self.slope)

    def invert(self, stretched: np.ndarray) -> np.ndarray:
        """Undo `extend`: take stretched samples (..., c) back to linear ones, (..., c)."""
        return curve(stretched, 1 / self.slope) * self.scale + self.pedestal

    @property
    def slope(self) -> np.ndarray:
        """The slope of f at 0, (c,)."""
        return (1 - self.midtones) / (3 * self.midtones)

    @property
    def white(self) -> np.ndarray:
        """The linear values that are taken to 1, (c,)."""
        return self.pedestal + self.scale


def curve(x, slope, library=np):
    """Return slope x / (slope x + 1 - x), the midtones transfer function with a slope at 0, (c,).

    Its inverse has the reciprocal slope. Outside [0, 1] both go on straight: there is a pole, and a
    spline may well get there.

    Args:
        x: (..., c).
        library: numpy, or tensorflow for tensors.
    """
    below_0 = library.minimum(x, 0.0)
    above_1 = library.maximum(x - 1, 0.0)
    inside = library.minimum(library.maximum(x, 0.0), 1.0)
    steep = slope * inside
    y = steep / (steep + 1 - inside)  # 1 at 1, exactly
    return y + slope * below_0 + above_1 / slope


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
    smallest = np.finfo(np.float32).tiny  # less is 0 to the fit, which computes in Float32

    def measure(k):
        plane = planes[k]
        name = _channel_name(k, len(planes))
        present = _present(plane)
        if not present.any():
            raise BgError(f"{name} holds no data (every sample is 0 or not finite); "
                          "remove that channel, or save the picture again")
        low = float(np.min(plane, where=present, initial=np.inf))
        median, *high = _quantiles(plane, present, (0.5, *quantiles))
        if max(high) - low < smallest:
            raise BgError(f"{name} has the same value everywhere ({low:.6g}), so it shows no sky; "
                          "raise -dq if a bright object fills the frame, else give a picture with "
                          "content")
        return low, median, *high

    measured = _each(measure, range(len(planes)))
    pedestal, median, *high = np.array(list(measured)).T  # (c,) each
    stretches = {}
    for quantile, white in zip(quantiles, high):
        scale = white - pedestal
        if scale.min() >= smallest:
            midtones = (median - pedestal) / scale
            midtones = np.clip(midtones, MIDTONES_MARGIN, 1 - MIDTONES_MARGIN)
            stretches[quantile] = Stretch(pedestal, scale, midtones)
    return stretches, median


# --------------------------------------------------------------------------------------------------
# Reduce and mask
# --------------------------------------------------------------------------------------------------

def reduce_plane(plane: np.ndarray, factor: int, func: str = "median") -> np.ndarray:
    """Reduce blocks of factor x factor samples to the median or mean of their present samples.

    Args:
        plane: (h, w); missing samples are 0 or not finite.
        factor: side of a block. Blocks at the right and the lower edge use the samples they have.
        func: "median" or "mean".

    Returns:
        (ceil(h / factor), ceil(w / factor)) float32; NaN where a block has nothing present.
    """
    if func == "median":
        return _block_medians(plane, factor)
    present = _present(plane)
    count = _block_sums(present, factor)
    total = _block_sums(np.where(present, plane, 0), factor)
    means = total / np.where(count > 0, count, np.nan)
    return means.astype(np.float32)


def _block_medians(plane, factor):
    from skimage.measure import block_reduce
    height, width = plane.shape
    block = min(factor, height), min(factor, width)  # a larger one would only take memory

    def medians(blocks, axis):  # (rows, columns, height, width) -> (rows, columns)
        samples = np.array(blocks).reshape(*blocks.shape[:2], -1)
        present = _present(samples)
        if present.all():
            return _whole_medians(samples)
        samples[~present] = np.nan
        samples.sort(-1)  # NaN goes last
        count = present.sum(-1)
        lower = np.maximum(count - 1, 0) // 2
        upper = count // 2
        middle = np.stack((lower, upper), -1)  # the same sample if the count is odd
        return np.take_along_axis(samples, middle, -1).mean(-1)

    def reduce_strip(rows):
        return block_reduce(plane[rows], block, medians, cval=np.nan)

    strips = _strips(height, width, block[0])
    reduced = np.concatenate(list(_each(reduce_strip, strips)))
    return reduced.astype(np.float32)


def _whole_medians(samples):
    """Return the medians along the last axis of samples that are all present, and change these."""
    count = samples.shape[-1]
    middle = [(count - 1) // 2, count // 2]
    if np.__version__ < "2":  # its sort takes five times as long as that of later ones
        samples.partition(middle)
    else:
        samples.sort()
    return samples[..., middle].mean(-1)


def _block_sums(image, factor):
    """Return the sums of blocks of an image (h, w, ...), as many as `reduce_plane` makes."""
    for axis in (0, 1):
        starts = range(0, image.shape[axis], factor)
        image = np.add.reduceat(image, starts, axis, dtype=np.float64)
    return image


def _block_means(weights: np.ndarray, factor: int) -> np.ndarray:
    """Reduce weights (h, w, ...) in [0, 1] to their means over blocks; NaN counts as 0."""
    weights = np.nan_to_num(weights)
    weights = np.clip(weights, 0, 1)
    total = _block_sums(weights, factor)
    count = _block_sums(np.ones_like(weights), factor)  # less at the right and the lower edge
    means = total / count
    return means.astype(np.float32)


@dataclass(frozen=True)
class Reduced:
    """What a picture is, on its reduced frame: (h, w) pixels with c channels."""

    linear: np.ndarray  # (h, w, c) in the picture's own units; NaN where missing
    median: np.ndarray  # (c,) medians of the linear picture over present samples
    centers: np.ndarray  # (h, w, 2) of the blocks: frame coordinates
    full_shape: tuple[int, int]  # (h, w) of the full-size picture
    user_mask: np.ndarray  # (h, w, 1 or c) the mask file, reduced; 1 if there is none
    rim: np.ndarray  # (h, w) bool: darker than the picture by a step; see `find_rim`
    display: np.ndarray  # (h', w', c) as `linear`, in the size in which it is drawn
    black: float  # the linear value that no light at all would give
    reference: Reference | None  # another picture of the region

    @property
    def present(self) -> np.ndarray:
        """Where there are data, (h, w, c) bool."""
        return np.isfinite(self.linear)


@dataclass(frozen=True)
class Prepared(Reduced):
    """A reduced picture that is stretched and masked as settings ask."""

    stretch: Stretch
    image: np.ndarray  # (h, w, c) stretched, in [0, 1]; 0 where missing
    weight: np.ndarray  # (h, w, c) in [0, 1]; 0 where masked or missing
    sky: Sky | None = None  # when it is found; with auto, what shows no sky then has no weight

    @property
    def used(self) -> np.ndarray:
        """The pixels that take part, (h, w) bool."""
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


def prepare(planes: np.ndarray, settings: Settings, mask: np.ndarray | None = None,
            black: float = 0.0, reference: Reference | None = None) -> Prepared:
    """Reduce, stretch, and mask a picture.

    Args:
        planes: (c, h, w) linear samples in [0, 1], c 1 or 3; missing samples are 0 or not finite.
            Not changed.
        settings: without None, but for `smoothing`.
        mask: (1 or c, h, w) weights, 1 = use, 0 = ignore, or None.
        black, reference: see `Reduced`.

    Raises:
        BgError: nothing is left to fit, a channel is constant or empty, or the mask has another
            size.
    """
    count, height, width = planes.shape
    if mask is not None and mask.shape not in ((1, height, width), (count, height, width)):
        size = "{2} x {1} (channels: {0})"
        raise BgError(f"the mask is {size.format(*mask.shape)}, the picture "
                      f"{size.format(*planes.shape)}; give a mask of the picture's size, gray "
                      "or with its channels")
    factor = settings.downscaling_factor
    quantile = settings.delinearization_quantile
    stretches, median = measure_stretches(planes, [quantile])
    linear = [reduce_plane(plane, factor, settings.downscaling_func) for plane in planes]
    linear = _side_by_side(linear)  # (h, w, c)
    user_mask = np.ones((*linear.shape[:2], 1), np.float32)
    if mask is not None:
        user_mask = _side_by_side([_block_means(plane, factor) for plane in mask])
    reduced = Reduced(
        linear=linear,
        median=median,
        centers=frame_coordinates(height, width, factor),
        full_shape=(height, width),
        user_mask=user_mask,
        rim=find_rim(linear),
        display=to_draw(planes, linear),
        black=black,
        reference=reference)
    return stretch_and_mask(reduced, stretches[quantile], settings)


def stretch_and_mask(reduced: Reduced, stretch: Stretch, settings: Settings) -> Prepared:
    """Stretch and mask a reduced picture as these settings ask; raise BgError if nothing is left.

    The stretch is monotone, so after the median it gives what it would before, in less time.
    """
    image = stretch.apply(reduced.linear)
    image = np.where(reduced.present, image, 0).astype(np.float32)
    usable = reduced.present & _inside_thresholds(image, settings) & ~reduced.rim[..., None]
    weight = usable * reduced.user_mask
    if not weight.any():
        raise BgError("every pixel is masked, so there is no sky to fit; "
                      "lower -tm, raise -tM, or check the mask (1 = use)")
    parts = dict(vars(reduced), stretch=stretch, image=image, weight=weight)
    return Prepared(**parts)


def _inside_thresholds(image: np.ndarray, settings: Settings) -> np.ndarray:
    """Return True where a stretched sample is neither too dark nor too bright."""
    return (settings.threshold_min <= image) & (image <= settings.threshold_max)


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


def clipped_by_stretch(prepared: Prepared) -> np.ndarray:
    """Return True, (h, w, c), where the stretch ends at 1, so that the fit sees no brightness."""
    return prepared.image == 1


# --- Rims: edges of the frame that are darker than the picture by a step ---

RIM_VIEW = 300  # rims are looked for on a copy whose longer side has at most so many pixels

# Less than this part of the light is left beyond a step. Where fewer exposures reach, more is.
RIM_LEFT = 0.88

# The light falls by a step at this part of a straight line across the frame. Stars and hills hide
# the rest. Along hills it does at 0.76 of a line at most, along rims at 0.85 at least.
RIM_WHOLE = 0.8

# It does so over this part of the longer side, and over so many pixels
RIM_LENGTH = 0.15
RIM_FEWEST = 20

# A step is on a line only if the cosine between its direction and the line's is above this
RIM_FACING = 0.8

# Degrees between the directions that are tried, and between those of two rims
RIM_TURN = 0.5
RIM_APART = 10.0

RIM_SOFT = 2  # pixels by which a rim is widened, because its edge may be soft


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


# --------------------------------------------------------------------------------------------------
# Spline: f(q) = sum_i w_i phi_k(|q - c_i|) + v.q + b
# --------------------------------------------------------------------------------------------------

# Replaces smaller squared distances, for which the logarithm and the gradient of the square root
# grow without bound. The value is that of tensorflow-addons.
TINY_SQUARED_DISTANCE = 1e-10

# Regularization of the interpolation inside the fit. It keeps the equations solvable where control
# points come close to each other. It does not make the surface stiff: the bending energy does.
SPLINE_REGULARIZATION = 1e-4


def spline_surface(query: np.ndarray, positions: np.ndarray, values: np.ndarray, order: int,
                   regularization: float = SPLINE_REGULARIZATION) -> np.ndarray:
    """Evaluate the surface through values at control points, in Float64, as `interpolate_spline`.

    For the values np.eye(n) it is the matrix that takes any values to their surface.

    Args:
        query: (..., 2) where to evaluate; the result is (..., k).
        positions: (n, 2) control points.
        values: (n, k) at the control points.
        order: of the kernel phi, which is r^order if odd and r^order log r if even.
        regularization: weight on the diagonal of the interpolation system, 0 = through the values.
    """
    n = len(positions)
    plane = np.c_[positions, np.ones(n)]  # (n, 3)
    kernels = _kernel(positions, positions, order)
    kernels += regularization * np.eye(n)
    system = np.block([
        [kernels, plane],
        [plane.T, np.zeros((3, 3))],
    ])
    right_side = np.pad(values, ((0, 3), (0, 0)))
    try:
        coefficients = np.linalg.solve(system, right_side)  # (n + 3, k)
    except np.linalg.LinAlgError:
        # Control points stand on one line or on top of each other: take the smallest coefficients
        coefficients, *_ = np.linalg.lstsq(system, right_side, rcond=None)
    weights, slopes, level = np.split(coefficients, (-3, -1))  # (n, k), (2, k), (1, k)
    points = query.reshape(-1, 2)  # (m, 2)
    surface = points @ slopes + level  # (m, k)
    # In parts: the kernels of all points at once would be the largest array of a run
    step = 1 + STRIP_PIXELS // n
    for start in range(0, len(points), step):
        part = slice(start, start + step)
        surface[part] += _kernel(points[part], positions, order) @ weights
    return surface.reshape(*query.shape[:-1], -1)


def _kernel(query, positions, order):
    """Return phi_k of the distances of query (m, 2) from positions (n, 2): (m, n)."""
    from scipy.spatial.distance import cdist
    squared = cdist(query, positions, "sqeuclidean")
    squared = np.maximum(squared, TINY_SQUARED_DISTANCE)
    if order % 2:
        return squared**(order / 2)
    return 0.5 * squared**(order // 2) * np.log(squared)


def interpolate_spline(train_points, train_values, query_points, order, regularization_weight=0.0,
                       name="interpolate_spline"):
    """Do what `tfa.image.interpolate_spline` does, where tensorflow-addons does not exist.

    Args, values, and gradients are the same: points `[b, n, d]`, values there `[b, n, k]`, and
    `[b, m, d]` where to evaluate, give `[b, m, k]`. The order is 1 to 4.

    Source: https://en.wikipedia.org/wiki/Polyharmonic_spline; notation (c, f, w, v, A, B) as there.
    """
    import tensorflow as tf
    with tf.name_scope(name):
        c = tf.convert_to_tensor(train_points)
        f = tf.convert_to_tensor(train_values)
        q = tf.convert_to_tensor(query_points)
        n = tf.shape(c)[1]
        more = c.shape[-1] + 1  # equations, for the plane

        matrix_a = _phi(c, c, order)  # [b, n, n]
        matrix_a += regularization_weight * tf.eye(n, dtype=c.dtype)
        matrix_b = tf.pad(c, [[0, 0], [0, 0], [0, 1]], constant_values=1)  # [b, n, d + 1]
        transposed_b = tf.transpose(matrix_b, [0, 2, 1])
        upper = tf.concat([matrix_a, matrix_b], 2)  # [b, n, n + d + 1]
        lower = tf.pad(transposed_b, [[0, 0], [0, 0], [0, more]])
        system = tf.concat([upper, lower], 1)
        right_side = tf.pad(f, [[0, 0], [0, more], [0, 0]])  # [b, n + d + 1, k]
        w_v = tf.linalg.solve(system, right_side)
        w = w_v[:, :n]
        v = w_v[:, n:-1]
        b = w_v[:, -1:]

        kernels = _phi(q, c, order)  # [b, m, n]
        return tf.matmul(kernels, w) + tf.matmul(q, v) + b


def _phi(x, y, order):
    """Return the kernel of the distances of x `[b, m, d]` from y `[b, n, d]`: `[b, m, n]`."""
    import tensorflow as tf
    r2 = 0.0
    for k in range(x.shape[-1]):
        r2 += tf.math.squared_difference(x[:, :, None, k], y[:, None, :, k])
    guarded = tf.maximum(r2, TINY_SQUARED_DISTANCE)
    if order % 2:
        return tf.pow(guarded, order / 2)
    powered = r2 if order == 2 else tf.square(r2)
    return 0.5 * powered * tf.math.log(guarded)


def import_tensorflow():
    """Import TensorFlow, which takes seconds, and which help, errors, and previews do not need."""
    try:
        tf = importlib.import_module("tensorflow")
        with suppress(RuntimeError):  # the program that imports this script uses its GPUs already
            tf.config.set_visible_devices([], "GPU")  # starting one takes longer than a fit
        return tf
    except Exception as error:  # missing, or broken: then it fails with almost any error
        if lacks_memory(error):
            raise
        lines = str(error).splitlines() or [type(error).__name__]
        raise BgError(f"TensorFlow cannot be imported ({lines[0]}); "
                      "install it with: python -m pip install -r requirements.txt") from None


def import_interpolate_spline() -> Callable:
    """Return tensorflow-addons' function where it exists, up to Python 3.11; else the drop-in."""
    with warnings.catch_warnings():
        # It warns that its development has ended, and which TensorFlow it was tested with
        warnings.simplefilter("ignore")
        try:
            module = importlib.import_module("tensorflow_addons.image.interpolate_spline")
            return module.interpolate_spline
        except Exception:  # not installed, or installed beside a TensorFlow that it does not know
            return interpolate_spline


def spline_layer(points: int, channels: int, order: int):
    """Return a Keras layer, query points [m, 2] -> surface [m, c].

    Its trainable weights are the control points: their positions (n, 2) and their values (n, c).
    """
    import tensorflow as tf
    interpolate = import_interpolate_spline()

    class SplineSurface(tf.keras.layers.Layer):
        def __init__(self):
            super().__init__(name="spline_surface")
            self.positions = self.add_weight(name="positions", shape=(points, 2))
            self.values = self.add_weight(name="values", shape=(points, channels))

        def call(self, query):
            surface = interpolate(self.positions[None], self.values[None], query[None], order,
                                  SPLINE_REGULARIZATION)
            return surface[0]

    return SplineSurface()


def bending_nodes(full_shape: tuple[int, int], longer: int) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes over a frame (h, w), (rows, columns, 2), and their distances down and along it.

    Along the longer side there are `longer` nodes.
    """
    sides = np.array(full_shape) / max(full_shape)
    nodes = []
    for side in sides:
        count = max(4, round(longer * side))
        nodes.append(np.linspace(0, side, count))
    down, along = nodes
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
    """
    def differences(count):  # at the inner nodes: (count - 2, count) each
        unit = np.eye(count)
        same = unit[1:-1]
        first = unit[2:] - unit[:-2]
        second = unit[2:] - 2 * same + unit[:-2]
        return same, first, second

    rows, columns = cost.shape
    down, along = spacing
    same_down, first_down, second_down = differences(rows)
    same_along, first_along, second_along = differences(columns)
    mixed = np.kron(first_down, first_along) / (4 * down * along)
    derivatives = np.stack([
        np.kron(second_down, same_along) / down**2,
        np.kron(same_down, second_along) / along**2,
        math.sqrt(2) * mixed,
    ])
    weight = cost[1:-1, 1:-1].ravel()
    if free_bowl:
        shares = weight / weight.sum()
        derivatives -= np.einsum("i,kin->kn", shares, derivatives)[:, None]
    area = (rows - 1) * down * (columns - 1) * along
    each = area / weight.size / (8 * math.pi)
    derivatives *= np.sqrt(each * weight)[:, None]
    return derivatives.reshape(-1, cost.size)  # (3 inner nodes, nodes)


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
# In the shapes below, (h, w) are cells, and c is the number of channels. "Sigma" is the standard
# deviation of the noise of what it is said of.
# --------------------------------------------------------------------------------------------------

# --- Cells ---

FIND_CELLS = 130  # cells along the longer side of a large picture

# A cell has at least 2 x 2 reduced pixels if so many cells remain along the longer side. In the
# noise of single pixels a faint nebula looks smooth.
FEWEST_CELLS = 64

SMALLEST_SIDE = 12  # Cells. In a picture with a shorter side the sky is not looked for.
FEWEST_USABLE = 150  # Cells. In a picture with fewer usable ones the sky is not looked for.
NOISE_TILE = 7  # cells along a side of the tiles in which the noise is measured
NOISE_LEVELS = 8  # the noise is measured at no more levels of light than this
TILES_PER_LEVEL = 6  # a level of light has at least so many tiles, or it is the only one

# The lower quartile of deviations that are measured on 49 cells is 7 % too low
QUIET_QUARTILE = 1.07

# So many times levels of light are dropped, and the line through the others is fitted again
NOISE_ROUNDS = 4

# A level is dropped if its variance is more than this many times that on the line
QUIET_EXCESS = 2.0

# An outermost cell is left out if it is so many sigma darker than those inside it let expect
EDGE_SIGMA = 7.0

# So many cells deep, at most. A rim that is wider is seen by itself; see `find_rim`.
EDGE_ROUNDS = 2


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
    def border(self) -> np.ndarray:
        """The usable cells within two cells of the edge of what is usable, (h, w) bool."""
        return self.usable & ~scipy.ndimage.binary_erosion(self.usable, iterations=2)


def _make_cells(prepared: Prepared) -> _Cells:
    """Reduce the picture to cells."""
    linear = prepared.linear
    used = prepared.present.all(-1) & prepared.used  # (rows, columns) of reduced pixels
    if not used.any():  # channels that are never present together count as flat where missing
        used = prepared.used
        linear = np.where(prepared.present, linear, prepared.median)
    longer = max(used.shape)
    smallest = 2 if longer >= 2 * FEWEST_CELLS else 1
    size = max(smallest, round(longer / FIND_CELLS))
    shown = np.where(used[..., None], linear, 0)  # 0: missing
    planes = [reduce_plane(channel, size) for channel in np.moveaxis(shown, -1, 0)]
    light = _side_by_side(planes).astype(float)  # (h, w, c)

    some = np.isfinite(light).all(-1)
    whole = some & _mostly(used, size)
    inner = scipy.ndimage.minimum_filter(whole, 3)  # a cell beside a border mixes with it
    strictest = [mask for mask in (inner, whole) if mask.sum() >= FEWEST_USABLE]
    usable = (strictest or [some])[0]  # (h, w)
    light[~usable] = 0
    for _ in range(EDGE_ROUNDS):
        usable = usable & ~_darker_edge(light, usable)
    dark, median = np.percentile(light[usable], (0.5, 50), axis=0)  # (c,) each
    scale = np.maximum(3 * (median - dark), 1e-9)
    values = (light - dark) / scale
    values[~usable] = 0
    noise = _cell_noise(light, usable) / scale
    centers = _block_means(prepared.centers, size).astype(float)
    return _Cells(values, usable, noise, centers, size, dark, scale)


def _darker_edge(light: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Return the outermost usable cells that are darker than those inside them let expect, (h, w).

    They mix with what is beyond, such as a rim too thin to be found, or its soft edge.

    Args:
        light: (h, w, c).
        usable: (h, w) bool.
    """
    noise = _cell_noise(light, usable)
    light = np.where(usable[..., None], light, np.nan)
    darker = np.zeros_like(usable)
    moved = functools.partial(scipy.ndimage.shift, light, order=0, cval=np.nan)
    for outward in ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0)):
        outside, near, far = [moved(cells * np.array(outward)) for cells in (-1, 1, 2)]
        outermost = usable & ~np.isfinite(outside).all(-1)
        expected = near * np.minimum(near / far, 1)  # a slope goes on
        fall = _channels_together((expected - light) / noise)
        darker |= outermost & (fall > EDGE_SIGMA)
    return darker


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

# Control points of the surface on the cells. Its stiffness, not their number, decides how it bends.
SKY_POINTS = 96

NODES = 24  # nodes along the longer side on which bending is measured
THIN_PLATE = 2  # order of the spline whose bending energy is that of a thin plate

# Weight of the bending energy beside the mean squared residual at a smoothing of 1. Residuals are
# in units of three times the sky's median above its darkest part. The energy is that for the longer
# side of the frame as the unit of length.
STIFFNESS_UNIT = 1e-4

# Candidates, the stiffest first: a plane, then a plane with a bowl, then ever more flexible
# surfaces
SMOOTHINGS = (1e4, 1e3, 1e2, 1e1, 1.0, 1e-1, 1e-2)

# From this smoothing on a bowl costs as much as any other bending, and the surface is a plane
PLANE = 1e4

WITH_BOWL = 1e3  # at this smoothing the surface is a plane with a bowl, and nothing else
UNSEEN_COST = 10.0  # bending costs so many times as much where no sky is seen

# A surface has one degree of freedom for so many cells that may show sky, and no more, but a bowl
# is always free. Of hundreds of stars on 100 x 100 pixels, others would follow the stars.
CELLS_PER_FREEDOM = 15.0

GLOW_COST = 1e-7  # weight of the squared coefficients of a glow: next to nothing

# Modes of the surface whose bending costs more than so many times their squared height are left
# out. They would keep 3 % of their height at most.
STIFF_MODE = 10.0

# Lengths over which a glow falls off, in units of the longer side
GLOW_LENGTHS = (0.02, 0.04, 0.08, 0.16)

# How much faster the glow in a corner falls off along a row than along a column. With 1.0 alone the
# sky of an amplifier's glow was off by 2.0 % instead of 1.2, and that behind a star by 0.7.
GLOW_RATIOS = (0.6, 1.0, 1.6)

GLOW_KNOWN = 0.03  # the form of a glow is known to this part of its light
FIT_ROUNDS = 4  # rounds of fitting, with the weights that the last fit suggests

# A cell farther from the surface than so many typical residuals pulls no harder (Huber's loss)
HUBER_LIMIT = 2.5

# Deviation of the residuals over their median. It is 1.48 for one channel, and 1.13 for the rms of
# three.
HUBER_DEVIATION = 1.2

# The sky may be above an object's light by so many sigma; else it would follow the low side of the
# noise
CEILING_SIGMA = 2.0

# Weight of "the sky is not above the picture" under an object, beside 1 for a cell of sky
CEILING_WEIGHT = 0.5


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
        self.glows = glows
        self.sides = np.array(shape) / max(shape)  # (2,) of the frame
        self.positions = _regular_points(self.sides)  # (n, 2) frame coordinates
        self.nodes, self.spacing = bending_nodes(shape, NODES)  # (rows, columns, 2), (2,)
        self._set_cells(cells)
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

    def _set_cells(self, cells: _Cells) -> None:
        # Float32 is twice as fast. The modes are orthogonal, so nothing is lost by it
        channels = cells.values.shape[-1]
        inverse = 1 / (cells.noise**2).mean(-1).ravel()
        self.cells = cells
        self.values = cells.values.reshape(-1, channels).astype(np.float32)  # (cells, c)
        self.inverse = (inverse / inverse.mean()).astype(np.float32)  # (cells,)

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

    def of(self, cells: _Cells) -> _Surfaces:
        """Return the same surfaces for other values of the same cells."""
        other = copy.copy(self)
        other._set_cells(cells)
        return other

    def linear(self, heights: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return the surface of coefficients (m, c) in the picture's own units, at places.

        Args:
            heights: (k, c) coefficients of the first modes.
            places: (..., 2) frame coordinates.

        Returns:
            (..., c)
        """
        coefficients = self.modes[:, :len(heights)] @ heights
        n = len(self.positions)
        plate = spline_surface(places, self.positions, coefficients[:n], THIN_PLATE, 0.0)
        surface = plate + self._simple_terms(places) @ coefficients[n:]
        return surface * self.cells.scale + self.cells.pedestal

    def surface(self, heights: np.ndarray) -> np.ndarray:
        """Return the surface on the cells, (h, w, c)."""
        surface = self.matrix[:, :len(heights)] @ heights.astype(np.float32)  # (cells, c)
        return surface.reshape(self.cells.values.shape)

    def glow(self, heights: np.ndarray) -> np.ndarray:
        """Return the light of the glows alone on the cells, (h, w, c)."""
        first = len(self.positions) + 3
        coefficients = self.modes[first:, :len(heights)] @ heights
        return self.glow_terms @ coefficients

    def rest(self, heights: np.ndarray) -> np.ndarray:
        """Return picture less surface, (h, w, c)."""
        return self.cells.values - self.surface(heights)

    def excess(self, heights: np.ndarray) -> np.ndarray:
        """Return picture less surface, (h, w, c), in units of what both may be wrong by."""
        return self.rest(heights) / self.uncertain(heights)

    def height_in_scatter(self, heights: np.ndarray, sky: np.ndarray) -> np.ndarray:
        """Return picture less surface in units of its scatter in the cells of sky, (h, w)."""
        height = _channels_together(self.excess(heights))
        return height / max(1.0, _deviation(height[sky]))

    def uncertain(self, heights: np.ndarray) -> np.ndarray:
        """Return the noise of the picture, and with it that of the form of a glow, (h, w, c)."""
        if not self.glows:
            return self.cells.noise
        return np.hypot(self.cells.noise, GLOW_KNOWN * self.glow(heights))

    def fit(self, sky: np.ndarray, bounds: np.ndarray, smoothing: float,
            heights: np.ndarray | None = None) -> np.ndarray:
        """Fit the sky with a surface that is not above the picture elsewhere.

        Args:
            sky: (h, w) bool, cells of sky.
            bounds: (h, w) bool: cells that only bound the sky from above.
            smoothing: see `SMOOTHINGS`.
            heights: coefficients to begin with, for half of the rounds.

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
        rounds = FIT_ROUNDS if heights is None else FIT_ROUNDS // 2
        for _ in range(rounds):
            pierced = np.zeros((len(below), values.shape[1]), bool)
            if heights is not None:
                excess = self.excess(heights).reshape(self.values.shape)
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
                ceiling = self.matrix[high, :count]
                pull = CEILING_WEIGHT * self.inverse[high, None]
                system = gram + ceiling.T @ (ceiling * pull)
                wanted = right[:, k] + ceiling.T @ (self.values[high, k] * pull[:, 0])
                all_weights = total + pull.sum()
                solutions.append(np.linalg.solve(
                    system / all_weights + energy, wanted / all_weights))
            heights = np.stack(solutions, -1)
        return heights

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

    def deviation(self, heights: np.ndarray, sky: np.ndarray, smoothing: float) -> np.ndarray:
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
        residual = self.rest(heights)[sky]  # (n, c)
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
    is_along = np.isnan(glow)
    if is_along.any():
        distance = _distance_from(glow, places)
        falls = [np.exp(-distance / length) for length in GLOW_LENGTHS]
        along = (places / sides)[..., is_along.argmax()] - 0.5
        return [fall * along**power for fall in falls for power in range(3)]
    down, across = np.moveaxis(places - np.array(glow), -1, 0)
    distances = [np.hypot(down, ratio * across) for ratio in GLOW_RATIOS]
    return [np.exp(-distance / length) for distance in distances for length in GLOW_LENGTHS]


def _distance_from(place: tuple, centers: np.ndarray) -> np.ndarray:
    """Return the distance of (..., 2) from a corner; or from an edge, with a NaN in its place."""
    return np.sqrt(np.nansum((centers - np.array(place))**2, -1))


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

ROUGH_SCALE = 1.4  # cells: detail is what differs from a smooth mean of this width
ROUGH_SIGMA = 3.5  # a cell is rough if its detail is more than so many sigma
ROUGH_WINDOW = 0.05  # in units of the longer side: the window in which rough cells are counted

# A region is an object if this part of its cells is rough. Lone stars stay single cells, nebulae
# and galaxies close up.
ROUGH_DENSITY = 0.2


def _texture(surfaces: _Surfaces, usable: np.ndarray) -> tuple:
    """Find what has fine structure in cells (h, w) bool, less a flexible surface for steep skies.

    Returns:
        The fields of `_Scene` that tell of it.
    """
    cells = surfaces.cells
    most_flexible = surfaces.candidates(usable)[-1]
    heights = surfaces.fit(usable, np.zeros_like(usable), most_flexible)
    values = surfaces.rest(heights)
    detail = values - _smooth_slope(values, ROUGH_SCALE, usable)
    detail /= surfaces.uncertain(heights)
    strongest = np.abs(detail).argmax(-1)[..., None]
    detail = np.take_along_axis(detail, strongest, -1)[..., 0]  # (h, w)
    rough = usable & (np.abs(detail) > ROUGH_SIGMA)
    window = _rough_window(cells)
    share = scipy.ndimage.uniform_filter(usable.astype(float), window)
    density = scipy.ndimage.uniform_filter(rough.astype(float), window)
    density /= np.maximum(share, 0.2)  # few usable cells are no region
    return detail, rough, usable & (density > ROUGH_DENSITY)


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

# Hills begin within this part of the longer side from the sky: at 0.05 to 0.10 in eight scenes. The
# dark sky beyond a band of the Milky Way or a nebula begins at 0.12, or farther off.
FOREGROUND_GAP = 0.11

# Hills fall below the sky by this part of the sky's range (5th to 95th percentile) at once
FOREGROUND_DROP = 0.8

FOREGROUND_SIGMA = 10.0  # all of a hill is darker than the nearest sky by so many sigma
FOREGROUND_EDGE = 5  # cells: how deep the edge of a hill is, in which it is compared with the sky


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
    farthest = FOREGROUND_GAP * cells.longer
    for region in range(1, count + 1):
        inside = regions == region
        gap = from_sky[inside].min()
        edge = inside & (from_sky < gap + FOREGROUND_EDGE)
        close = gap <= farthest and inside[cells.border].any()
        step = np.median(drop[edge], axis=0)  # (c,)
        if close and (step > FOREGROUND_DROP * span).all():
            foreground |= inside
    return cells.usable & scipy.ndimage.binary_dilation(foreground, iterations=2)


# --- Steep glows ---

# The noise of a pixel, about, in units of that of a cell: nobody can see what differs by less
PIXEL_NOISE = 15

GLOW_REACH = 0.3  # a glow is compared with the picture this part of the longer side away

# A steep glow has fallen to half within this part of the longer side. A plate follows wider ones.
GLOW_HALF = 0.17

GLOW_HEIGHT = 0.5  # a steep glow rises by this part of the picture's range (5th to 95th percentile)

# The picture differs from a glow by at most this part of the glow's light, median in its core. True
# glows have up to 0.03, nebulae 0.16 and more.
GLOW_SMOOTH = 0.06


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


# --- Scene ---

@dataclass(frozen=True)
class _Scene:
    """What is known of a picture before its sky is."""

    cells: _Cells
    surfaces: _Surfaces  # with the steep glows of this sky
    near_hills: np.ndarray  # (h, w) bool: hills and trees, with a margin
    detail: np.ndarray  # (h, w) fine structure in sigma, with its sign
    rough: np.ndarray  # (h, w) bool: detail that noise does not explain
    dense: np.ndarray  # (h, w) bool: regions dense with it

    @property
    def plain(self) -> np.ndarray:
        """What has no structure, and so may be sky, (h, w) bool."""
        return self.cells.usable & ~(self.rough | self.dense | self.near_hills)


def _nothing_but_sky(surfaces: _Surfaces) -> _Scene:
    """Return a scene without structure and hills, on the cells of these surfaces."""
    nowhere = np.zeros_like(surfaces.cells.usable)
    return _Scene(surfaces.cells, surfaces, nowhere, nowhere.astype(float), nowhere, nowhere)


def _look(cells: _Cells, shape: tuple[int, int]) -> _Scene:
    """Tell what has structure, what are hills, and where the sky has steep glows.

    Args:
        cells: of the picture.
        shape: (h, w) of the full picture.
    """
    usable = cells.usable
    plates = _Surfaces(cells, shape)
    if cells.too_small:
        return _nothing_but_sky(plates)
    _, _, dense = texture = _texture(plates, usable)
    hills = _dark_foreground(cells, dense)
    if hills.any():
        texture = _texture(plates, usable & ~hills)
    width = _rough_window(cells) + 1
    near_hills = usable & scipy.ndimage.binary_dilation(hills, iterations=width)
    scene = _Scene(cells, plates, near_hills, *texture)
    beside = usable & ~near_hills
    glows = _steep_glows(cells, beside)
    while glows:
        surfaces = _Surfaces(cells, shape, glows)
        cores = [beside & (_distance_from(glow, cells.centers) < GLOW_HALF) for glow in glows]
        sky = scene.plain | np.any(cores, 0)
        heights = surfaces.fit(sky, np.zeros_like(usable), WITH_BOWL)
        rest = np.abs(surfaces.rest(heights)).mean(-1)  # (h, w)
        glow = np.abs(surfaces.glow(heights)).mean(-1)
        smooth = [place for place, core in zip(glows, cores)
                  if np.median(rest[core]) < GLOW_SMOOTH * np.median(glow[core])]
        if smooth == glows:
            texture = _texture(surfaces, usable & ~hills)
            return _Scene(cells, surfaces, near_hills, *texture)
        glows = smooth
    return scene


# --- Closed patches ---

# Cells: scales at which patches of light are looked for. Structure is found at finer ones.
CLOSED_SCALES = (2.5, 5.0, 10.0, 16.0)

CLOSED_SIGMA = 10.0  # a patch stands so many sigma of a mean of that scale above each way out of it
CLOSED_LEAST = 0.6  # how closed a patch must be: 1 - level of its lowest way out / its height

# So many times patches are looked for, each time above a surface through the sky beside them
CLOSED_ROUNDS = 2


def _closed_patches(scene: _Scene) -> np.ndarray:
    """Return smooth patches of light that are surrounded by darker picture, (h, w) bool.

    They are closed above a plane, as glow that fades from an edge is not, and above a plane with a
    bowl, as vignetting is not. Both are fitted again without the patches: the top of a glow then
    sinks.
    """
    surfaces = scene.surfaces
    usable = scene.cells.usable & ~scene.near_hills
    objects = scene.dense & usable
    patches = np.zeros_like(usable)
    for _ in range(CLOSED_ROUNDS):
        before = patches
        sky = scene.plain & ~patches
        if not sky.any():
            break
        heights = []  # above the plane, and above the bowl
        for smoothing in (PLANE, WITH_BOWL):
            surface = surfaces.fit(sky, patches | objects, smoothing)
            heights.append(surfaces.height_in_scatter(surface, sky))
        patches = np.zeros_like(usable)
        for scale in CLOSED_SCALES:
            if 4 * scale <= min(usable.shape):  # else there are too few independent means
                views = [_smooth(height, scale, scene.plain) for height in heights]
                views = [np.where(usable, np.maximum(view, 0), 0) for view in views]
                patches |= _patches(*views, scale, scene.cells.border)
    lasting = before & patches
    return scipy.ndimage.binary_propagation(lasting, mask=patches)  # the whole of their patches


def _patches(above_plane: np.ndarray, above_bowl: np.ndarray, scale: float,
             border: np.ndarray) -> np.ndarray:
    """Return patches of light that are closed, (h, w) bool.

    Args:
        above_plane, above_bowl: (h, w) means of picture less surface, in units of its scatter, not
            below 0.
        scale: of the means, in cells.
        border: (h, w) bool, see `_above_way_out`.
    """
    clear = CLOSED_SIGMA * _noise_of_mean(scale)
    closed = _above_way_out(above_bowl, border)
    tops = (closed > clear) & (_above_way_out(above_plane, border) > clear)
    patches = np.zeros_like(tops)
    regions, count = scipy.ndimage.label(tops)
    for region in range(1, count + 1):
        top = regions == region
        peak = scipy.ndimage.maximum_position(above_bowl, top)
        height = above_bowl[peak]
        is_large = top.sum() >= scale**2  # else it is smaller than what was averaged over
        if is_large and closed[peak] >= CLOSED_LEAST * height:
            foot = height - closed[peak]
            patches |= scipy.ndimage.binary_propagation(top, mask=top | (above_bowl > foot))
    return patches


def _above_way_out(view: np.ndarray, border: np.ndarray) -> np.ndarray:
    """Return how far each cell is above the lowest place of the best way to the border, (h, w).

    It is 0 if the way only climbs.

    Args:
        view: (h, w) heights.
        border: (h, w) bool.
    """
    from skimage.morphology import reconstruction
    way_out = reconstruction(np.where(border, view, view.min()), view)
    return view - way_out


# --- Growth ---

STAR_SIGMA = 30.0  # a star of more than so many sigma may have a halo

# Cells: the halo of a star is looked for within so many times sigma to the power HALO_POWER
STAR_REACH = 2.0

# Halos of stars fall off with the distance to the power -2.5. At that distance from the star the
# noise drowns them.
HALO_POWER = 0.4

STAR_REACH_MOST = 0.1  # halos of stars never reach beyond this part of the longer side

OUTSKIRTS_SCALE = 3.0  # cells: outskirts are looked for in a Gaussian mean of this width
OUTSKIRTS_SIGMA = 3.0  # outskirts stand so many sigma of such a mean above the surface


def _reach(scene: _Scene, bodies: np.ndarray) -> np.ndarray:
    """Return how far from each cell the outskirts of an object may be, (h, w) cells; 0 in the sky.

    They are looked for within the radius of an object, and farther about bright stars.

    Args:
        bodies: (h, w) bool, extended objects.
    """
    radius = np.sqrt(_areas(bodies) / math.pi)
    stars, _ = scipy.ndimage.label(scene.rough, np.ones((3, 3)))
    peak = scipy.ndimage.maximum(scene.detail, stars, stars)  # (h, w): of the star of this cell
    peak = np.where(scene.rough & (peak > STAR_SIGMA), peak, 0)
    of_star = np.minimum(STAR_REACH * peak**HALO_POWER, STAR_REACH_MOST * scene.cells.longer)
    return np.maximum(radius, of_star)


def _areas(mask: np.ndarray) -> np.ndarray:
    """Return how many cells the region of each cell of a mask (h, w) has, (h, w); 0 beside it."""
    regions, _ = scipy.ndimage.label(mask)
    return scipy.ndimage.sum_labels(mask, regions, regions)


def _within(reach: np.ndarray) -> np.ndarray:
    """Return the cells that are within the reach of some cell, (h, w) bool.

    Args:
        reach: (h, w) of each cell, in cells.
    """
    around = reach > 0
    for radius in range(1, int(reach.max()) + 1):
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
    if not seeds.any():
        return np.zeros_like(seeds)
    view = _smooth(excess, OUTSKIRTS_SCALE, usable & ~seeds)
    clear = OUTSKIRTS_SIGMA * _noise_of_mean(OUTSKIRTS_SCALE)
    above = near & ~seeds & (view > clear)
    beside = above & scipy.ndimage.binary_dilation(seeds)
    return scipy.ndimage.binary_propagation(beside, mask=above)


# --- Choice ---

# The stiffest surface whose loss is this close to the best one wins. The number is about the
# scatter of the loss.
GOOD_ENOUGH = 0.016

ALIKE = 0.05  # surfaces explain the sky alike if their losses differ by no more than this

# The sky has no closed top or bottom inside the frame that is higher or deeper than this part of
# its range. If the surface that explains the picture best has one, a stiffer one is taken, if one
# is within DOUBT_MARGIN of it, and the sky cannot be known unless that explains the picture alike.
BULGE = 0.1

# A top counts only if less than this part of the frame is in the upper half of it. That of
# vignetting is larger.
SMALL_TOP = 0.2

# Where the sky cannot be known, the stiffest surface wins whose loss is this close to that of the
# chosen one. On 46 such scenes 11 got truer by it, and 6 less true; and it eats less of objects.
DOUBT_MARGIN = 0.15

# The sky beside closed patches of light is simple if its smoothing is at least this. The dome of a
# night sky is no object: what is left beside it has to bend as well.
SIMPLE_SKY = 10.0

FEWEST_SKY = 30  # if fewer cells than this are sky, all cells that are used are taken for sky

# So many times outskirts are looked for, each time above a surface through the rest of the sky
GROWTH_ROUNDS = 3

GROWTH_LEFT = 0.5  # outskirts no longer grow if less than this part of the sky is left beside them
DARK_SIGMA = 3.0  # a dark body lies so many sigma below a surface with a bowl


class _Objects(NamedTuple):
    """What is no sky, before a surface tells what its outskirts are; (h, w) each."""

    light: np.ndarray  # bool: adds light, so that the sky is below the picture there
    dark: np.ndarray  # bool: takes light away
    reach: np.ndarray  # how far the outskirts of an object here may be, in cells
    sky: np.ndarray  # bool: what may be sky, outskirts included


class _Candidate(NamedTuple):
    """A surface that the sky may have, and how well it explains the cells."""

    smoothing: float
    heights: np.ndarray  # (m, c) coefficients
    sky: np.ndarray  # (h, w) bool: what it calls sky
    bounds: np.ndarray  # (h, w) bool: light that only bounds it from above
    loss: float  # mean log(1 + residual in units of the noise) over the sky


class _Explanation(NamedTuple):
    """What may be objects, and the surfaces that the rest may be."""

    surfaces: _Surfaces
    objects: _Objects
    candidates: list  # of _Candidate, the stiffest first
    chosen: _Candidate
    bulging: bool = False  # only one with a closed top or bottom explains the picture well


def _look_for_sky(scene: _Scene, smoothings: Sequence[float]) -> _Explanation:
    """Explain the picture, with closed patches of light as objects, or as sky.

    They are objects if the sky beside them is a simple one, or is explained better by more than
    GOOD_ENOUGH.

    Args:
        scene: the picture.
        smoothings: to choose from, the stiffest first.
    """
    patches = _closed_patches(scene)
    beside = _explain(scene, patches, smoothings)
    if not patches.any() or beside.chosen.smoothing >= SIMPLE_SKY:
        return beside
    whole_sky = _explain(scene, np.zeros_like(patches), smoothings)
    is_better = beside.chosen.loss < whole_sky.chosen.loss - GOOD_ENOUGH
    return beside if is_better or whole_sky.bulging else whole_sky


def _explain(scene: _Scene, patches: np.ndarray, smoothings: Sequence[float]) -> _Explanation:
    """Explain the picture with these patches, (h, w) bool, as objects; see `_look_for_sky`."""
    usable = scene.cells.usable
    no_hills = ~scene.near_hills
    not_plain = scipy.ndimage.binary_dilation(scene.rough | patches)
    not_plain &= usable & no_hills
    bodies = patches | scipy.ndimage.binary_opening(scene.dense & no_hills)
    sky = usable & ~not_plain & no_hills
    if sky.sum() < FEWEST_SKY:
        sky = usable
    surfaces = scene.surfaces.dearer(~sky)
    dark = not_plain & _dark_bodies(surfaces, bodies, sky & ~bodies)
    objects = _Objects(not_plain & ~dark, dark, _reach(scene, bodies), sky)
    candidates = [_try_smoothing(surfaces, objects, smoothing) for smoothing in smoothings]
    chosen = _choose(candidates, GOOD_ENOUGH)
    before = _Explanation(surfaces, objects, candidates, chosen)
    if _closed_top(surfaces, chosen) <= BULGE:
        return before
    most = chosen.loss + DOUBT_MARGIN
    stiffer = [other for other in candidates if other.smoothing > chosen.smoothing
               and other.loss <= most and _closed_top(surfaces, other) <= BULGE]
    if not stiffer:
        return before._replace(bulging=True)
    bulging = stiffer[-1].loss > chosen.loss + ALIKE
    return before._replace(chosen=stiffer[-1], bulging=bulging)


def _closed_top(surfaces: _Surfaces, candidate: _Candidate) -> float:
    """Return the height of the highest closed top of a surface, or the depth of its deepest bottom.

    It is a part of the surface's range.
    """
    cells = surfaces.cells
    border = np.full(cells.usable.shape, True)
    border[1:-1, 1:-1] = False
    highest = 0.0
    views = np.moveaxis(surfaces.surface(candidate.heights), -1, 0)  # (c, h, w)
    for view in (*views, *-views):
        above = _above_way_out(view, border)
        core = above > 0.5 * above.max()
        if core.mean() < SMALL_TOP:
            span = max(_span(view[cells.usable], (99, 1)), 1e-12)
            highest = max(highest, above.max() / span)
    return highest


def _dark_bodies(surfaces: _Surfaces, bodies: np.ndarray, sky: np.ndarray) -> np.ndarray:
    """Return the bodies that take light away instead of adding it, with a margin, (h, w) bool.

    Dust absorbs the light behind it, so it is darker than the sky around it.

    Args:
        bodies: (h, w) bool, extended objects.
        sky: (h, w) bool.
    """
    if sky.sum() < FEWEST_SKY:
        return np.zeros_like(bodies)
    heights = surfaces.fit(sky, np.zeros_like(sky), WITH_BOWL)
    height = surfaces.height_in_scatter(heights, sky)
    regions, count = scipy.ndimage.label(bodies)
    level = scipy.ndimage.median(height, regions, range(count + 1))
    dark = level < -DARK_SIGMA
    dark[0] = False  # the sky
    return scipy.ndimage.binary_dilation(dark[regions])


def _try_smoothing(surfaces: _Surfaces, objects: _Objects, smoothing: float) -> _Candidate:
    """Return the surface of one smoothing through the sky beside the outskirts of objects.

    They grow, above a surface through the rest of the sky, until they no longer change.
    """
    light, dark, reach, open_sky = objects
    usable = surfaces.cells.usable
    # The surface averages over so many cells, and follows outskirts that are wider
    most = max(_averaging_length(smoothing) * surfaces.cells.longer, OUTSKIRTS_SCALE)
    near = usable & _within(np.minimum(reach, most))
    sky = open_sky
    bounds = light
    heights = surfaces.fit(sky, bounds, smoothing)
    for _ in range(GROWTH_ROUNDS):
        excess = surfaces.height_in_scatter(heights, sky)
        outskirts = _outskirts(excess, light, near & ~dark, usable)
        shadows = _outskirts(-excess, dark, near & ~light, usable)
        now = open_sky & ~outskirts & ~shadows
        if now.sum() < GROWTH_LEFT * open_sky.sum() or (now == sky).all():
            break
        sky = now
        bounds = light | outskirts
        heights = surfaces.fit(sky, bounds, smoothing, heights)
    in_sigma = surfaces.rest(heights) / surfaces.cells.noise
    loss = _loss_of(in_sigma[sky])
    return _Candidate(smoothing, heights, sky, bounds, loss)


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
    best = min(candidate.loss for candidate in candidates)
    return next(candidate for candidate in candidates if candidate.loss <= best + margin)


# --- Doubt ---

# The loss of a surface that leaves nothing but Gaussian noise, by the number of channels
PURE_NOISE = {1: 0.535, 3: 0.632}

# The sky cannot be known if the loss is more than this many times that of pure noise
UNEXPLAINED = 1.28

LITTLE_SKY = 0.15  # the sky cannot be known if less than this part of the picture shows it
MOST_DOUBT = 0.05  # the sky cannot be known if it is uncertain by more than this part of its range

# The sky is uncertain by this part of the difference between surfaces that explain it alike
ALIKE_DOUBT = 0.5

# The sky is uncertain by so many times the deviation of its posterior, in which residuals are
# independent. They are not: what is left of objects is smooth as well. Measured on the truth bench,
# `tests/truth.py`.
POSTERIOR_DOUBT = 9.0

SEAM_SIGMA = 10.0  # panels of a mosaic differ by so many sigma of the median along a seam
SEAM_HEIGHT = 0.05  # panels differ by this part of the picture's range (1st to 99th percentile)
SEAM_ALIKE = 0.92  # panels differ in the same direction along this part of a seam
SEAM_TURNS = 120  # directions in which seams are looked for
MEDIAN_NOISE = 1.25  # the noise of a median of many values over that of their mean
SEAM_LENGTH = 0.4  # a seam is at least this part of the longer side long


def _judge(explanation: _Explanation, doubt_of_reference: float) -> tuple[str, bool]:
    """Return why the sky cannot be known, in words, and whether a stiff one would do less harm.

    The words are empty if the sky can be known. Stiffness is no help against steps.
    """
    cells = explanation.surfaces.cells
    if cells.too_small:
        return "it is too small", False
    explained = _is_explained(explanation)
    if _has_seam(cells):
        return "it steps along a straight line, as between the panels of a mosaic", not explained
    share = explanation.chosen.sky.sum() / cells.usable.sum()
    doubt = max(_doubt(explanation), doubt_of_reference)
    unsure = ""
    if not explained:
        unsure = "no smooth surface explains what looks like sky"
    elif share < LITTLE_SKY:
        unsure = f"only {100 * share:.0f} % of the picture shows sky"
    elif explanation.bulging:
        unsure = "the sky would have a closed patch of light or dark inside the frame"
    elif doubt > MOST_DOUBT:
        unsure = f"it is uncertain by about {100 * doubt:.0f} % of its range"
    return unsure, bool(unsure)


def _is_explained(explanation: _Explanation) -> bool:
    """Tell whether the surface leaves little but noise, and what is open about a glow's form."""
    surfaces, best = explanation.surfaces, explanation.chosen
    loss = _loss_of(surfaces.excess(best.heights)[best.sky])
    return loss <= UNEXPLAINED * _pure_noise(surfaces.cells)


def _in_doubt(explanation: _Explanation) -> _Explanation:
    """Return the same explanation with a stiffer surface, which does less harm if it is wrong.

    Where no surface explains the picture, a flexible one only follows objects.
    """
    most = explanation.chosen.loss + DOUBT_MARGIN if _is_explained(explanation) else math.inf
    stiffest = next(candidate for candidate in explanation.candidates
                    if candidate is explanation.chosen
                    or (candidate.smoothing <= WITH_BOWL and candidate.loss <= most))
    return explanation._replace(chosen=stiffest)


def _pure_noise(cells: _Cells) -> float:
    return PURE_NOISE[cells.values.shape[-1]]


def _doubt(explanation: _Explanation) -> float:
    """Return by which part of its range the sky is uncertain, rms over the frame.

    That is the deviation of the fit itself, and how far surfaces that explain the sky about as well
    lie from it, which have nothing to do with each other.
    """
    usable = explanation.surfaces.cells.usable
    span = _range_of_sky(explanation)
    of_fit, differences = _errors(explanation)
    differences = differences[:, usable]  # (n, cells, c)
    differences -= np.median(differences, axis=1, keepdims=True)
    doubt_of_fit = np.sqrt(np.mean((of_fit[usable] / span)**2))
    of_choice = np.sqrt(np.mean((differences / span)**2, axis=(1, 2)))  # (n,)
    return float(np.hypot(doubt_of_fit, ALIKE_DOUBT * of_choice.max()))


def _uncertainty(explanation: _Explanation, doubt: float) -> np.ndarray:
    """Return the standard deviation of the sky in each cell, (h, w, c).

    Here, other than in its doubt, the whole difference between surfaces that explain the sky alike
    counts, and the level of the sky as well.

    Args:
        explanation: what was found.
        doubt: by which part of its range the sky is uncertain for another reason.
    """
    of_fit, differences = _errors(explanation)
    of_choice = np.abs(differences).max(0)
    uncertain = np.hypot(of_fit, of_choice)
    return np.hypot(uncertain, doubt * _range_of_sky(explanation))


def _errors(explanation: _Explanation) -> tuple[np.ndarray, np.ndarray]:
    """Return by what the sky may be wrong in the cells.

    Returns:
        (h, w, c) standard deviation of the fit, and (n, h, w, c) how far n surfaces that explain
        the sky about as well lie from it; it is one of them.
    """
    surfaces, best = explanation.surfaces, explanation.chosen
    deviation = surfaces.deviation(best.heights, best.sky, best.smoothing)
    alike = [candidate.heights for candidate in explanation.candidates
             if candidate.loss <= best.loss + ALIKE]
    others = np.array(list(map(surfaces.surface, alike)), float)
    return POSTERIOR_DOUBT * deviation, others - surfaces.surface(best.heights)


def _range_of_sky(explanation: _Explanation) -> np.ndarray:
    """Return the range of the sky over the usable cells, (c,); it is at least what can be seen."""
    cells = explanation.surfaces.cells
    surface = explanation.surfaces.surface(explanation.chosen.heights)[cells.usable]  # (cells, c)
    invisible = PIXEL_NOISE * np.median(cells.noise, axis=(0, 1))
    return np.maximum(_span(surface, (99, 1)), invisible)


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
        up = (step > 0).sum(0)
        down = (step < 0).sum(0)
        alike = np.maximum(up, down) > SEAM_ALIKE * count
        for column in np.nonzero(alike & (count >= shortest))[0]:
            steps = step[:, column]
            steps = steps[np.isfinite(steps)]
            typical = np.median(steps)
            sigma = MEDIAN_NOISE * _deviation(steps - typical) / math.sqrt(len(steps))
            if abs(typical) > max(least, SEAM_SIGMA * sigma):
                return True
    return False


# --- Result ---

# A plain run leaves no object out, so its surface must be stiffer than the sky's: by so many powers
# of ten for the part of the picture that is not sky. It was measured on the truth bench,
# `tests/truth.py`.
PLAIN_STIFFER = 2.5

PLAIN_MOST = 1.5  # the surface of a plain run is stiffer by at most so many powers of ten
SMALL_SMOOTHING = 1e6  # in a picture that is too small the sky is a plane, and no noise bends it

# Per area, there are at most so many times as many control points where the sky bends most
DENSEST = 30.0


@dataclass(frozen=True)
class Sky:
    """What was found out about the sky of a picture, on cells of the reduced frame.

    In the shapes, (h, w) are cells, and c is the number of channels.
    """

    surface: Callable[[np.ndarray], np.ndarray]  # frame coordinates (..., 2) -> linear sky (..., c)
    shows_sky: np.ndarray  # (h, w) bool: sky and nothing else
    below: np.ndarray  # (h, w) bool: objects that add light: the sky is not above the picture
    usable: np.ndarray  # (h, w) bool: neither missing nor masked, nor beside what is
    image: np.ndarray  # (h, w, c) linear, less the objects of a reference; 0 where not usable
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
    uncertainty: np.ndarray  # (h, w, c) linear, standard deviation of `surface`
    unsure: str  # why the sky cannot be known, in words; empty if it can
    by_hand: bool  # the smoothing was given
    why: str  # this smoothing, in words
    shared: Shared | None = None  # what it has in common with a reference, if one was given

    def at(self, cells: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return what cells (h, w) hold at places in the frame, (..., 2): (...)."""
        return _cells_at(places, cells, self.centers)

    def uncertain(self, places: np.ndarray) -> np.ndarray:
        """Return the standard deviation of the linear sky at places in the frame: (..., c)."""
        side = 2 * self.centers[0, 0]  # (2,) of a cell
        cells = np.moveaxis(places / side - 0.5, -1, 0)  # (2, ...)
        sample = functools.partial(
            scipy.ndimage.map_coordinates, coordinates=cells, order=1, mode="nearest")
        return np.stack([sample(plane) for plane in np.moveaxis(self.uncertainty, -1, 0)], -1)


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
    explanation = _look_for_sky(scene, smoothings)
    shared = None
    if prepared.reference is not None and not cells.too_small:
        explanation, shared = look_with_reference(
            scene, explanation, prepared.reference, smoothings)
    doubt_of_reference = shared.doubt if shared else 0.0
    unsure, stiff_is_better = _judge(explanation, doubt_of_reference)
    if stiff_is_better:
        explanation = _in_doubt(explanation)
    surfaces, objects, best = explanation.surfaces, explanation.objects, explanation.chosen
    total = cells.usable.sum()
    cells = surfaces.cells  # with a reference, without the light of objects
    smoothing, why = _smoothing_of_fit(explanation, settings, 1 - objects.sky.sum() / total)
    light = surfaces.surface(best.heights)
    bending = _bending(light, cells.longer)
    cost = bending_cost(~objects.sky, cells.centers, cells.centers)
    if surfaces.glows:  # they bend as they like
        cost = cost / (1 + bending**2)
    smooth_bending = scipy.ndimage.gaussian_filter(bending, 2)
    typical = max(smooth_bending.mean(), 1e-9)
    residual = (cells.values - light)[best.sky]
    image = cells.values * cells.scale + cells.pedestal
    return Sky(
        surface=functools.partial(surfaces.linear, best.heights),
        shows_sky=best.sky,
        below=best.bounds,
        usable=cells.usable,
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
        uncertainty=_uncertainty(explanation, doubt_of_reference) * cells.scale,
        unsure=unsure,
        by_hand=settings.smoothing is not None,
        why=why,
        shared=shared,
    )


def _smoothings(scene: _Scene, settings: Settings) -> list[float]:
    """Return the smoothings to choose from, the stiffest first: one if it was given by hand."""
    if scene.cells.too_small:
        return [SMALL_SMOOTHING]
    if settings.smoothing is not None:
        return [settings.smoothing]
    return scene.surfaces.candidates(scene.plain)


def _smoothing_of_fit(explanation: _Explanation, settings: Settings,
                      objects_share: float) -> tuple[float, str]:
    """Return how stiff the surface of the fit shall be, and why, in words.

    Args:
        explanation: what was found.
        settings: of the fit.
        objects_share: part of the picture that is no sky.
    """
    chosen = explanation.chosen
    cells = explanation.surfaces.cells
    why = f"loss {chosen.loss:.3f}, pure noise has {_pure_noise(cells):g}"
    if cells.too_small:
        return chosen.smoothing, "the picture is too small for more than a plane"
    if settings.smoothing is not None:
        return chosen.smoothing, "given by hand"
    if settings.auto:
        return chosen.smoothing, why
    stiffer = 10**min(PLAIN_MOST, PLAIN_STIFFER * objects_share)
    why = f"{chosen.smoothing:g}, made stiffer as no objects are left out; {why}"
    return chosen.smoothing * stiffer, why


def _bending(surface: np.ndarray, longer: int) -> np.ndarray:
    """Return how much a surface (h, w, c) bends, (h, w): its second derivatives, rms of channels.

    The unit of length is the longer side, which has so many cells.
    """
    if min(surface.shape[:2]) < 2:
        return np.zeros(surface.shape[:2])
    squares = 0
    for slope in np.gradient(surface, axis=(0, 1)):
        for curvature in np.gradient(slope, axis=(0, 1)):
            squares = squares + curvature**2  # (h, w, c)
    return np.sqrt(squares.mean(-1)) * longer**2


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

REFERENCE_NODES = 64  # along the longer side, so many places are looked up in plate solutions

# A reference that covers less of the picture is not used: the sky beside it would be a guess
LEAST_COVERED = 1 / 3

# A reference that explains less of the picture's structure beside the sky is not used
LEAST_EXPLAINED = 0.5

# Nothing can be explained if the variance of the structure is less than this part of that of the
# noise
STRUCTURE = 0.1

MATCH_ROUNDS = 6  # rounds of fitting, with the weights that the last fit suggests

# The stiffest sky whose loss is this close to the best one wins. A flexible sky takes what the two
# pictures share, and a little of what they do not.
MATCH_ENOUGH = 0.075

MATCH_TILE = 8  # cells along a side of the tiles whose residuals are independent of each other

# A sky that was found without the reference stays if it is sure, and if it differs from the one
# with it by a plane and a bowl, and beside them by no more than this part of its range, rms, or
# than it is uncertain
SKY_CONFIRMED = 0.01

# The reference's own sky makes that of the picture uncertain by this part of its range, rms. A
# slope over a fifth of it does.
REFERENCE_DOUBT = 0.05

# Cells: what differs from a Gaussian mean of this width tells whether both lie in the same place
SHIFT_VIEW = 3.0

# A reference is shifted if it correlates so many times as well with the picture elsewhere...
SHIFT_CLEAR = 1.15

# ... and if that correlation is at least this. Chance gives up to 0.2, a right place 0.25 to 0.8.
SHIFT_SEEN = 0.2

STAR_DETAIL = 5.0  # a star of the reference stands so many sigma above its surroundings
STAR_WINDOW = 5  # cells along a side of the window in which such cells are counted...
STAR_SPARSE = 0.6  # ... and if they are more than this part of it, they are an object
STAR_WINGS = 2  # cells about such a star that are left out as well

# Projections in PixInsight's words and in those of FITS
PROJECTIONS = {
    "Gnomonic": "TAN", "Stereographic": "STG", "PlateCarree": "CAR", "Mercator": "MER",
    "HammerAitoff": "AIT", "ZenithalEqualArea": "ZEA", "Orthographic": "SIN"}

SOLUTION = "PCL:AstrometricSolution:"  # how the properties of a plate solution begin in XISF


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
    heights: np.ndarray  # (m, c) coefficients of the sky
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
    """Read a reference, once for all pictures of a folder; raises BgError if it cannot be read."""
    with _refusals(path):
        changed = os.stat(path).st_mtime_ns
    return _open_reference(path, changed)


@functools.lru_cache(maxsize=1)
def _open_reference(path, changed):
    other = read_picture(path)
    solution = plate_solution(other.source, other.planes.shape[1])
    checksum = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return OpenedReference(other.planes, solution, checksum)


def read_reference(path: str, picture: Picture, factor: int) -> Reference:
    """Read a reference, and lay it on a picture.

    Where it lies is told by plate solutions, if both have one. Otherwise a reference of the same
    size lies pixel on pixel, and for others `astroalign` compares the stars.

    Args:
        path: of the reference.
        picture: as it was read.
        factor: side of a block of the picture's pixels.

    Raises:
        BgError: it cannot be read, or nothing tells where it lies.
    """
    other = open_reference(path)
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
    from astropy.wcs import WCS
    with warnings.catch_warnings(), suppress(Exception):  # damaged ones are none
        warnings.simplefilter("ignore")
        keywords, _ = _shared_metadata(source, height)
        solution = WCS(keywords, naxis=2)
        if solution.has_celestial:
            return solution
        if isinstance(source, XisfSource):
            return WCS(_solution_of_xisf(source, height))
    return None


def _solution_of_xisf(source: XisfSource, height: int) -> dict:
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
    lone = scene.rough & ~scene.dense
    seen = covered & ~_stars(light / grain, covered) & ~scipy.ndimage.binary_dilation(lone)
    if seen.sum() < FEWEST_USABLE:
        return before, Shared("shows next to nothing but stars")

    sure = _doubt(before) <= MOST_DOUBT and not before.bulging
    outside = before.chosen.sky & ~covered & sure
    # With the objects known, the sky needs no more flexibility than without, but may have a bowl
    least = min(before.chosen.smoothing, WITH_BOWL)
    smoothings = [smoothing for smoothing in smoothings if smoothing >= least]
    matches = [_match(scene.surfaces, light, grain, seen, outside, each) for each in smoothings]
    match = _choose(matches, MATCH_ENOUGH)
    in_linear_light = cells.scale / unit[:, None]  # (k, c)
    shared = Shared(
        f"covers {share:.0%} of the picture and explains {match.explained:.0%} of its structure",
        gains=match.gains * in_linear_light,
        gain_errors=match.errors * in_linear_light)
    if match.explained < LEAST_EXPLAINED:
        return before, shared

    with_it = scene.surfaces.surface(match.heights)  # (h, w, c)
    taken = before if sure else _in_doubt(before)  # without the reference
    possible, unlike = _not_refuted(taken, with_it)
    guessed = taken.bulging or not _is_explained(taken)
    doubt = 1.0 if guessed else _doubt(possible)
    if doubt <= MOST_DOUBT and unlike <= max(SKY_CONFIRMED, doubt):
        verdict = shared.verdict + ", but shows no object in the sky that was found without it"
        return possible, replace(shared, verdict=verdict, confirms=True)

    belief = 1 / (1 + (max(doubt, unlike) / REFERENCE_DOUBT)**2)  # in what was found without it
    where = seen & taken.chosen.sky
    if where.sum() < LITTLE_SKY * seen.sum():
        where = seen
    without = taken.surfaces.surface(taken.chosen.heights)
    own_sky = belief * _plane_with_bowl(without - with_it, where, cells.centers)
    objects = light @ match.gains + match.step - own_sky
    objects[~covered] = 0
    noise = np.sqrt(cells.noise**2 + grain**2 @ match.gains**2)
    surfaces = scene.surfaces.of(replace(
        cells, values=cells.values - objects, noise=noise, usable=seen | outside))
    nowhere = np.zeros_like(seen)
    explanation = _explain(_nothing_but_sky(surfaces), nowhere, smoothings)
    doubt = REFERENCE_DOUBT * math.sqrt(1 - belief)
    return explanation, replace(shared, used=True, doubt=doubt)


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
    span = _span(surfaces.surface(before.chosen.heights)[usable], (99, 1))  # (c,)

    def unlike(candidate):
        difference = surfaces.surface(candidate.heights) - sky
        difference -= _plane_with_bowl(difference, usable, surfaces.cells.centers)
        return float(np.sqrt(np.mean((difference[usable] / np.maximum(span, 1e-9))**2)))

    of_best = unlike(before.chosen)
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

# Added inside the logarithm of the loss (stretched units). Cells whose residuals are smaller than
# this are fitted well enough. Without it noiseless cells would dominate the loss.
LOSS_FLOOR = 0.001


def loss_error(r):
    """Return how far the surface is from the picture: the mean |r| of the channels."""
    import tensorflow as tf
    return tf.reduce_mean(tf.abs(r), -1)


def loss_color(r):
    """Return the variance of r over the channels: it keeps the sky neutral."""
    import tensorflow as tf
    return tf.math.reduce_variance(r, -1)


def loss_overshoot(r):
    """Return how far the surface lies above the picture: that would leave dark holes."""
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
    total = error + color + alpha * (overshoot + negative)
    return tf.reduce_mean(tf.math.log(LOSS_FLOOR + total))


# --------------------------------------------------------------------------------------------------
# Fit
# --------------------------------------------------------------------------------------------------

# Cells in one independent sample of the sky; a fit sees `-B` samples. Where the noise of a cell is
# 1 % of the gradient, so many determine 32 control points to 0.13 %.
SAMPLE_CELLS = 2048

SAMPLE_MEAN = 0.7  # cells: width of the Gaussian means that the sample is drawn from

# For one cell of sky in the sample there are so many that only bound the sky, if there are
BOUNDS_SHARE = 0.25

# The fit stops after so many epochs in which the loss has not fallen by this much
STOP_PATIENCE = 100
STOP_DELTA = 5e-5

# The learning rate is halved after so many such epochs, but not below this
RATE_PATIENCE = 50
RATE_FLOOR = 1e-4

TRACK_EVERY = 10  # epochs between two recordings of the control points

# With auto, the loss forgives what is farther from the surface than so many sigma. It needs not
# forgive objects then, and must not forgive a steep corner of the sky.
FORGIVEN = 10.0

# Nodes along the longer side on which the bending of the fit is measured: about as dense as 96
# control points. The small waves between few points, which a spline has, are no bending of the sky.
# With fewer nodes the surface would bend where none of them sees it.
FIT_NODES = 15

# The bending of the sky that was found costs at most this much of the loss. Where it cost more, the
# loss would rather give a corner up than bend the surface.
FOUND_COST = 0.005

# The same, where a plane is asked for: a spline in the stretched frame is never quite one. A plane
# that was found may have a glow in its corner.
PLANE_COST = 1.0

# Stretched units by which the surface moves where a trained coordinate moves by 1. With less, a
# flat start takes more than 1000 epochs; with more, the surface trembles longer about its end.
VALUE_RATE = 0.3

# Control points move by this part of their mean distance where a trained coordinate moves by 1.
# With 0.5 the sky of a glowing corner is truer by a tenth, and a fit takes three times as long.
POSITION_RATE = 0.02

# Directions in which the objective curves by less than this part of the most train no faster
CONDITION_FLOOR = 1e-4


@dataclass(frozen=True)
class Fit:
    """A fitted surface, and how it came about."""

    positions: np.ndarray  # (n, 2) final control points, in frame coordinates
    values: np.ndarray  # (n, c) final values there, stretched units
    order: int
    history: np.ndarray  # (epochs, 6): loss, error, color, overshoot, negative, bending; as means
    stopped: str  # why the fit ended, in words
    track: list[tuple[int, np.ndarray, np.ndarray]]  # (epoch, positions, values); the start first

    def surface(self, query: np.ndarray) -> np.ndarray:
        """Return the surface (..., c) at query (..., 2), stretched, float64."""
        return spline_surface(query, self.positions, self.values, self.order)


def start_positions(settings: Settings, sky: Sky, shape: tuple[int, int]) -> np.ndarray:
    """Return where the control points start, (n, 2) float32, in a frame of this shape (h, w).

    Random points are uniform. With auto each one is that of ten which is farthest from those
    before, so that every small glow has points. A distance counts more where the sky needs more;
    there the lines of a grid are closer as well.
    """
    sides = np.array(shape) / max(shape)
    if settings.initializer == "grid":
        rows, columns = _grid_lines(settings.points, sides)
        if settings.auto:
            rows = _denser(rows, sky.density.max(1))
            columns = _denser(columns, sky.density.max(0))
        grid = sides * _grid(rows, columns)
        return grid.reshape(-1, 2).astype(np.float32)
    rng = np.random.default_rng(settings.seed)
    draws = 10 if settings.auto else 1
    points = np.full((1, 2), np.inf)  # one that is far from all, to begin with
    while len(points) <= settings.points:
        candidates = sides * rng.random((draws, 2))
        differences = candidates[:, None] - points  # (draws, points, 2)
        distances = np.linalg.norm(differences, axis=-1)
        density = sky.at(sky.density, candidates)
        counted = density * distances.min(1)
        farthest = counted.argmax()
        points = np.vstack((points, candidates[farthest]))
    return points[1:].astype(np.float32)


def _grid_lines(wanted, sides):
    """Return where the rows and the columns of a grid are, in [0, 1]: centers of its cells.

    They come nearest to the wanted number and to the frame's aspect ratio, so there may be a few
    points more or fewer.
    """
    height, width = sides
    misfits = {}
    # At least two rows and columns: with one the slope along the other axis would be open
    for rows in range(2, max(2, wanted // 2) + 1):
        columns = max(2, round(wanted / rows))
        number = abs(rows * columns - wanted) / wanted
        aspect = columns / rows * height / width
        stretched = abs(math.log(aspect))
        misfits[rows, columns] = number + stretched
    best = min(misfits, key=misfits.get)
    return [np.arange(0.5, count) / count for count in best]


def _denser(lines, density):
    """Move lines in [0, 1] so that between each two there is as much of a density (n,) along it."""
    reached = np.append(0, np.cumsum(density))
    share = reached / reached[-1]
    even = np.linspace(0, 1, len(share))
    return np.interp(lines, share, even)


def start_values(examined: Prepared, positions: np.ndarray) -> np.ndarray:
    """Return the first values at control points (n, 2): the sky found there, stretched (n, c)."""
    linear = examined.sky.surface(positions)
    return examined.stretch.extend(linear).astype(np.float32)


def sample_cells(usable: np.ndarray, density: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """Return the flat indices of at most `wanted` cells of usable, (h, w) bool, sorted.

    The sample is stratified: the cells are put in the order of a coarse grid of tiles, and one is
    drawn at random from each run of equal weight. A cell's weight is the density (h, w) of control
    points squared. So the loss, which forgives, cannot forgive a small steep part of the sky.
    """
    cells = np.flatnonzero(usable)
    if cells.size <= wanted:
        return cells
    row, column = np.nonzero(usable)
    side = math.sqrt(cells.size / wanted)
    tile = max(1, int(side))
    keys = column, row, column // tile, row // tile
    tile_by_tile = np.lexsort(keys)  # the last key counts first
    cells = cells[tile_by_tile]
    weights = density.ravel()[cells]**2
    reached = np.cumsum(weights)
    rng = np.random.default_rng(seed)
    drawn = np.arange(wanted) + rng.random(wanted)
    drawn *= reached[-1] / wanted
    ranks = np.searchsorted(reached, drawn)
    return np.unique(cells[ranks])


class Sample(NamedTuple):
    """The m cells that the fit sees."""

    places: Any  # (m, 2) frame coordinates
    image: Any  # (m, c) stretched
    brightest: Any  # (m, c) that the stretch can tell: a brighter sky is no overshoot
    weight: Any  # (m, c) in [0, 1]
    follows: Any  # (m, 1) 1 where the surface follows the picture, 0 where that only bounds it
    bounded: Any  # (m, 1) 1 where an overshoot counts


class Lesson(NamedTuple):
    """What the training step sees of a picture, with n control points, and k nodes for bending."""

    sample: Sample
    nodes: Any  # (k, 2) frame coordinates
    bending: Any  # (r, k) see `bending_rows`
    stiffness: Any  # () weight of the bending
    unit: Any  # (c,) linear, that of the bending, in units of the stretch's scale
    slope: Any  # (c,) of the inverse of the stretch at 0
    positions: Any  # (n, 2) at the start
    values: Any  # (n, c) at the start
    condition: Any  # (n, n) takes trained coordinates to values
    spacing: Any  # () takes trained coordinates to positions
    alpha: Any  # () weight of overshoot and negative sky


def sky_sample(examined: Prepared, settings: Settings) -> Sample:
    """Draw the cells that the fit sees.

    With auto, the surface follows those that show sky, and objects that add light bound it. Objects
    are left out, so the loss need not forgive much: a cell weighs less the noisier it is, and then
    residuals count nearly linearly up to FORGIVEN sigma.
    """
    sky = examined.sky
    stretch = examined.stretch
    auto = settings.auto
    trust = _block_means(examined.weight, sky.size)  # (h, w, c) of the cells
    follows = (trust > 0).any(-1) & sky.usable
    bounds = np.full(follows.shape, False)
    density = np.ones(follows.shape)
    if auto:
        follows &= sky.shows_sky
        bounds = sky.below
        density = sky.density
    wanted = SAMPLE_CELLS * settings.batch
    of_sky = sample_cells(follows, density, wanted, settings.seed)
    most = int(BOUNDS_SHARE * len(of_sky))
    of_bounds = sample_cells(bounds, density, most, settings.seed)
    picked = np.append(of_sky, of_bounds)  # (m,)
    pick = np.unravel_index(picked, follows.shape)
    is_sky = np.arange(len(picked)) < len(of_sky)
    is_sky = is_sky[:, None]  # (m, 1)

    light = sky.image[pick]  # (m, c) linear
    noise = sky.noise[pick]
    # What is not in the sample counts through means, which have less than half of the noise
    smooth = _smooth_slope(sky.image, SAMPLE_MEAN, follows)
    ceiling = light + CEILING_SIGMA * noise
    picture = np.where(is_sky, smooth[pick], ceiling)
    weight = np.where(is_sky, trust[pick], 1)
    if auto:
        # What is left is sky, however bright: the stretch shall not clip it
        image = stretch.extend(picture)
        brightest = np.full(image.shape, np.inf)
        noise = stretch.extend(light + noise) - stretch.extend(light)  # (m, c) stretched
        noise = noise.mean(-1, keepdims=True)
        noise = np.maximum(noise, LOSS_FLOOR / FORGIVEN)
        weight = weight * LOSS_FLOOR / (FORGIVEN * noise)
    else:
        image = stretch.apply(picture)
        brightest = np.where(image < 1, np.inf, 1)
    bounded = ~is_sky | (not auto)
    return Sample(sky.centers[pick], image, brightest, weight, is_sky, bounded)


def _stiffness(sky: Sky, settings: Settings, bending: float) -> tuple[float, float]:
    """Return the weight of the bending in the loss, and how the loss curves at the sky.

    Args:
        bending: energy of the sky that was found.
    """
    # In finding the sky, bending stands beside the mean squared residual. The loss curves by
    # 1 / spread^2 at the sky, and by less where it forgives less.
    sharpness = 2 / FORGIVEN if settings.auto else 1
    curvature = sharpness / sky.spread**2
    stiffness = curvature / 2 * STIFFNESS_UNIT * settings.smoothing
    asked_for_plane = sky.by_hand and settings.smoothing >= PLANE
    most = PLANE_COST if asked_for_plane else FOUND_COST
    most *= settings.smoothing / max(sky.found_smoothing, 1e-9)
    most /= max(bending, 1e-12)
    return min(stiffness, most), curvature  # at a smoothing of 0, no stiffness


def make_lesson(examined: Prepared, settings: Settings,
                start: tuple[np.ndarray, np.ndarray]) -> Lesson:
    """Put together what the training step sees of a picture; the arguments are `fit_surface`'s."""
    sky = examined.sky
    stretch = examined.stretch
    positions, values = start
    sample = sky_sample(examined, settings)
    nodes, spacing = bending_nodes(examined.full_shape, FIT_NODES)  # (rows, columns, 2)
    cost = sky.at(sky.cost, nodes) if settings.auto else np.ones(nodes.shape[:2])
    rows = bending_rows(spacing, cost, settings.smoothing < PLANE)
    nodes = nodes.reshape(-1, 2)
    unit = np.eye(len(positions))
    on_nodes = spline_surface(nodes, positions, unit, settings.order)  # (k, n)
    found = on_nodes @ start_values(examined, positions)  # (k, c)
    linear = stretch.invert(found) / sky.unit
    squares = (rows @ linear)**2  # (r, c)
    bending = squares.sum(0).mean()
    stiffness, curvature = _stiffness(sky, settings, bending)

    step = 1e-3
    rise = stretch.invert(found + step) - stretch.invert(found - step)
    slopes = rise / (2 * step) / sky.unit  # (k, c) of the inverse of the stretch
    slopes = slopes.mean(-1)
    bent = (rows * slopes) @ on_nodes
    followed = sample.follows[:, 0]
    places = sample.places[followed]
    on_places = spline_surface(places, positions, unit, settings.order)  # (places, n)
    # A step along a trained coordinate shall change the objective by as much in every direction.
    # Adam alone would take thousands of epochs for the directions in which points move together.
    curvatures = on_places.T @ on_places / len(places)
    energy = 2 * stiffness / curvature
    curvatures += energy * bent.T @ bent
    strengths, directions = np.linalg.eigh(curvatures)
    least = CONDITION_FLOOR * strengths[-1]
    strengths = np.maximum(strengths, least)
    condition = VALUE_RATE * directions / np.sqrt(strengths)
    return Lesson(
        sample=sample,
        nodes=nodes,
        bending=rows,
        stiffness=stiffness * sample.follows.mean(),  # the loss is a mean over cells of both kinds
        unit=sky.unit / stretch.scale,
        slope=1 / stretch.slope,
        positions=positions,
        values=values,
        condition=condition @ directions.T,
        spacing=POSITION_RATE / math.sqrt(len(positions)),
        alpha=settings.alpha)


def fit_surface(examined: Prepared, settings: Settings, start: tuple[np.ndarray, np.ndarray],
                on_epoch: Callable[[int, float], None] | None = None) -> Fit:
    """Fit the spline to the sky.

    Adam trains positions and values. The learning rate is halved on a plateau, and the fit stops
    early. Keras' own `fit` would add more to each epoch than the 2 ms that an epoch takes.

    Args:
        examined, settings: what `examine` gave.
        start: positions (n, 2) and values (n, c).
        on_epoch: called after each epoch with its number, from 1, and its loss.

    Raises:
        BgError: the spline cannot be computed at all from this start.
    """
    lesson = make_lesson(examined, settings, start)
    step, adam = _begin(lesson, settings)
    rate = settings.learning_rate
    history = []
    track = []
    least = math.inf
    improved = 0  # last epoch in which the loss fell
    changed = 0  # last epoch in which the loss or the learning rate fell
    stopped = f"all {settings.epochs} epochs done"
    for epoch in range(1, settings.epochs + 2):  # one more, to see what the last has reached
        adam.learning_rate = rate
        losses, *now = step()
        if not np.isfinite(losses).all():
            stopped = (f"stopped at epoch {epoch}: the spline's equations became singular; "
                       "best surface so far taken (try a smaller -lr, or another --seed)")
            break
        loss = losses[0]
        if loss < least:
            best = now
        if epoch > settings.epochs:
            break
        if loss < least - STOP_DELTA:
            improved = changed = epoch
        least = min(least, loss)
        history.append(losses)
        done = epoch - 1
        if done % TRACK_EVERY == 0:
            track.append((done, *now))
        if on_epoch is not None:
            on_epoch(epoch, float(loss))
        if epoch - improved >= STOP_PATIENCE:
            stopped = f"stopped at epoch {epoch}: no improvement in {STOP_PATIENCE} epochs"
            break
        if epoch - changed >= RATE_PATIENCE and rate > RATE_FLOOR:
            rate = max(rate / 2, RATE_FLOOR)
            changed = epoch
    if not history:
        raise BgError("the spline's equations cannot be solved from these control points; "
                      "lower -N, or choose another --seed")
    return Fit(*best, settings.order, np.array(history), stopped, track)


def _begin(lesson: Lesson, settings: Settings) -> tuple[Callable, Any]:
    """Return a step of training, which stands at the start of this lesson, and its Adam.

    Each step returns the loss before it and its terms, (6,) as in Fit.history, and the positions
    and values that have them. All are NaN if the spline's equations are singular, because control
    points have met.
    """
    import tensorflow as tf
    in_float32 = functools.partial(tf.constant, dtype=tf.float32)
    lesson = tf.nest.map_structure(in_float32, lesson)
    # A step traced for the number of cells of its first picture would round differently, so that
    # what comes first in a folder changed the results of all others.
    cells = [tf.TensorSpec([None, part.shape[1]]) for part in lesson.sample]
    kinds = tf.nest.map_structure(tf.TensorSpec.from_tensor, lesson)
    kinds = kinds._replace(sample=Sample(*cells))
    traced, variables, adam = _traced_step(kinds, settings.order)
    for variable in variables:  # forget the picture before
        variable.assign(tf.zeros_like(variable))

    def step():
        try:
            results = traced(lesson)
        except tf.errors.InvalidArgumentError:
            return np.nan, np.nan, np.nan
        return [result.numpy() for result in results]

    return step, adam


@functools.lru_cache(maxsize=8)  # a folder holds pictures of few kinds
def _traced_step(kinds: Lesson, order: int) -> tuple:
    """Return the training step of all lessons of these kinds, its variables, and its Adam.

    TensorFlow takes longer to trace a step than to do a hundred. The variables are 0 at the start.
    """
    import tensorflow as tf
    points, channels = kinds.values.shape
    layer = spline_layer(points, channels, order)
    start = np.zeros((points, 2 + channels), np.float32)
    coordinates = tf.Variable(start)  # of positions and values, see `make_lesson`
    adam = tf.keras.optimizers.Adam()
    adam.build([coordinates])

    def step(lesson):
        moved = lesson.spacing * coordinates[:, :2]
        risen = tf.matmul(lesson.condition, coordinates[:, 2:])
        layer.positions.assign(lesson.positions + moved)
        layer.values.assign(lesson.values + risen)
        now = [tf.identity(layer.positions), tf.identity(layer.values)]
        sample = lesson.sample
        count = tf.shape(sample.image)[0]
        query = tf.concat([sample.places, lesson.nodes], 0)
        with tf.GradientTape() as tape:
            surface = layer(query)  # [m + k, c]
            terms = _cell_terms(sample, surface[:count])
            linear = curve(surface[count:], lesson.slope, tf) / lesson.unit
            bending = lesson.stiffness * loss_bending(linear, lesson.bending)
            loss = log_loss(terms, lesson.alpha) + bending
        of_positions, of_values = tape.gradient(loss, [layer.positions, layer.values])
        of_positions *= lesson.spacing
        of_values = tf.matmul(lesson.condition, of_values, transpose_a=True)
        gradient = tf.concat([of_positions, of_values], 1)
        adam.apply_gradients([(gradient, coordinates)])
        means = [tf.reduce_mean(term) for term in terms]
        return tf.stack([loss, *means, bending]), *now

    # Nothing in it needs rewriting, which costs time and would reach into the drop-in
    traced = tf.function(step, input_signature=[kinds], autograph=False)
    variables = coordinates, *adam.variables
    return traced, variables, adam


atexit.register(_traced_step.cache_clear)  # later TensorFlow could not free them


def _cell_terms(sample, surface):
    """Return the four terms of the loss of the cells, [m] each."""
    import tensorflow as tf
    counted = tf.minimum(surface, sample.brightest)
    residual = sample.weight * (sample.image - counted)
    followed = sample.follows * residual
    return [
        loss_error(followed),
        loss_color(followed),
        loss_overshoot(sample.bounded * residual),
        loss_negative(surface),
    ]


_fitting = threading.Lock()  # there is one training for all threads; `_Interrupts` looks at it


def fit_sky(examined: Prepared, settings: Settings,
            on_epoch: Callable[[int, float], None] | None = None) -> Fit:
    """Fit the surface to what `examine` gave, on the CPU; see `fit_surface`."""
    positions = start_positions(settings, examined.sky, examined.full_shape)
    start = positions, start_values(examined, positions)
    with _fitting, import_tensorflow().device("/CPU:0"):
        logger.info(f"fitting {len(positions)} control points, smoothing {settings.smoothing:.3g}")
        return fit_surface(examined, settings, start, on_epoch)


# --------------------------------------------------------------------------------------------------
# Apply: the model at full size, and the picture without it
# --------------------------------------------------------------------------------------------------

# Nodes of `SkyModel`: about so many along the longer side, at least so many along the shorter
SURFACE_NODES = 300
LEAST_NODES = 4

# The model may exceed the range of values that it has over the sky by this fraction of that range.
# So it cannot run away in a corner without sky, or behind hills.
MAX_EXTRAPOLATION = 0.5


class SkyModel:
    """The sky at full size, (c, h, w) in linear units, made in strips of rows.

    The sky is evaluated at nodes some pixels apart, and a cubic spline along each axis goes through
    them. It bends over much longer distances, so nothing is lost (tests hold it to 2e-5), and a
    pixel costs only a few multiplications. SciPy's RectBivariateSpline takes three times as long.
    """

    def __init__(self, sky: Callable[[np.ndarray], np.ndarray], shape: tuple[int, int],
                 dtype=np.float32):
        """Evaluate the nodes of a sky, a function as of `linear_sky`, for a picture (h, w)."""
        height, width = shape
        longer = max(shape)
        spacing = min(longer / SURFACE_NODES, min(shape) / LEAST_NODES)
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
        terms = np.moveaxis(spline.c, -1, 0)
        self.terms = terms.astype(dtype)  # (c, rows, w)
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
        """Yield the planes of the channels, each made when it is asked for."""
        return map(self.plane, range(len(self.nodes)))


def linear_sky(examined: Prepared, fit: Fit) -> Callable[[np.ndarray], np.ndarray]:
    """Return the fitted sky: takes frame coordinates (..., 2) to linear units (..., c) in [0, 1].

    Its range is limited, which matters where there was no sky to fit; see MAX_EXTRAPOLATION.
    """
    found = examined.sky
    limited = found.shows_sky | found.below  # objects that add light limit the sky from above

    def unlimited(places):
        return examined.stretch.invert(fit.surface(places))

    seen = unlimited(found.centers[limited])  # (cells, c)
    low = seen.min(0)
    high = seen.max(0)
    beyond = MAX_EXTRAPOLATION * (high - low)
    lowest = np.maximum(low - beyond, 0)
    highest = np.minimum(high + beyond, 1)

    def sky(places):
        return np.clip(unlimited(places), lowest, highest)

    return sky


def take_out(planes: np.ndarray, sky: SkyModel, reduced: Reduced,
             correction: str) -> tuple[np.ndarray, np.ndarray]:
    """Take the sky out of a picture (c, h, w), in place, and clip what is left to [0, 1].

    "subtract" makes it image - model + offset. The offset of a channel is what the median of its
    present samples would lose. So the background stays neutral, and a black border or one bad pixel
    cannot decide a color. "divide" makes it image / model * the model's median, all above black;
    that is right where something dims the light, such as vignetting. Missing samples stay as they
    are.

    Returns:
        The offsets, or the model's medians above black, (c,), and how many samples were clipped at
        0 and at 1, (2,).

    Raises:
        BgError: the model is to be divided by, and not above black everywhere.
    """
    divides = correction == "divide"
    black = reduced.black
    levels = np.median(sky.nodes, (1, 2)) - black
    if divides and sky.nodes.min() <= black:
        raise BgError("the model is not above 0 everywhere, and nothing can be divided by it; "
                      "use --correction subtract")

    def work(channel):
        plane = planes[channel]
        present = _present(plane)
        strips = _strips(*plane.shape)
        for rows in strips:
            samples = plane[rows]
            model = sky.strip(channel, rows)
            left = _without_sky(samples, model, correction, black, levels[channel])
            np.copyto(samples, left, where=present[rows])
        offset = black
        if not divides:
            median_left, = _quantiles(plane, present, (0.5,))
            offset = reduced.median[channel] - median_left
        below = above = 0
        shift = plane.dtype.type(offset)
        for rows in strips:
            there = present[rows]
            values = plane[rows] + shift
            below += np.count_nonzero(there & (values < 0))
            above += np.count_nonzero(there & (values > 1))
            np.clip(values, 0, 1, out=plane[rows], where=there)
        return offset, below, above

    offsets, *clipped = np.transpose(list(_each(work, range(len(planes)))))
    return levels if divides else offsets, np.sum(clipped, 1).astype(int)


def _without_sky(samples, sky, correction, black, level):
    """Return samples less their sky, or above black, divided by it and times its level."""
    if correction == "subtract":
        return samples - sky
    gain = level / (sky - black)
    return (samples - black) * gain


def corrected(reduced: Reduced, linear: np.ndarray, sky: np.ndarray,
              correction: str) -> np.ndarray:
    """Return some samples of a picture without their sky, (..., c), as `take_out`, but not clipped.

    Missing samples are NaN.
    """
    pixels = tuple(range(sky.ndim - 1))  # the axes
    black = reduced.black
    level = np.median(sky, pixels) - black
    left = _without_sky(linear, sky, correction, black, level)
    shift = np.full(len(level), black)
    if correction == "subtract":
        shift = reduced.median - np.nanmedian(left, pixels)
    return left + shift.astype(left.dtype)


# --------------------------------------------------------------------------------------------------
# The whole job on arrays
# --------------------------------------------------------------------------------------------------

# Part of the samples. If the correction clips more than that, something is wrong.
MOST_CLIPPED = 0.01

# Part of the frame. If objects take more of what is used, which stars alone do not, --auto would
# help.
OBJECTS_SHARE = 0.2


def examine(planes: np.ndarray, settings: Settings, mask: np.ndarray | None = None,
            black: float = 0.0,
            reference: Reference | None = None) -> tuple[Prepared, Settings]:
    """Do everything before the fit: stretch, reduce, mask, find the sky, and warn of what is odd.

    It needs no TensorFlow. The arguments are those of `remove_sky`, but for `black`: the sample
    that no light at all would give, which counts where the sky is divided out.

    Returns:
        What the fit sees, and the settings with the values that are used in place of every None.
    """
    settings = settings.resolved()
    prepared = prepare(planes, settings, mask, black, reference)
    sky = find_sky(prepared, settings)
    examined = with_sky(prepared, settings, sky)
    judge(planes, examined, settings)
    return examined, replace(settings, smoothing=sky.smoothing)


def with_sky(prepared: Prepared, settings: Settings, sky: Sky) -> Prepared:
    """Return what the fit sees, now that the sky is found; with auto, objects are masked."""
    weight = prepared.weight
    if settings.auto:
        shows_sky = sky.at(sky.shows_sky, prepared.centers)  # (h, w)
        weight = weight * shows_sky[..., None]
    return replace(prepared, weight=weight, sky=sky)


def judge(planes: np.ndarray, examined: Prepared, settings: Settings) -> None:
    """Tell what was found out about a picture (c, h, w), and warn of what is odd."""
    sky = examined.sky
    if sky.shared is not None:
        tell_of_reference(examined.reference, sky.shared)
    logger.info(f"sky: {100 * sky.share:.0f} % of the picture; "
                f"smoothing {sky.smoothing:.3g} ({sky.why})")
    if sky.unsure:
        logger.warning(f"the sky of this picture cannot be told from objects: {sky.unsure}. "
                       "Take the result as a guess, mask objects with -m, or keep the surface "
                       "stiff with --smoothing 1e4")
    shows_sky = sky.at(sky.shows_sky, examined.centers)  # (h, w)
    objects = np.mean(examined.used & ~shows_sky)  # none with auto
    if objects > OBJECTS_SHARE and not sky.unsure:
        logger.info("hint: objects were found in this picture; --auto would leave them out, "
                    f"with a margin ({objects:.0%} of the frame)")
    if examined.rim.any():
        pixels = settings.downscaling_factor * rim_depth(examined)
        logger.info(f"left out: a rim of {pixels} pixels that is darker than the picture by a step "
                    f"({examined.rim.mean():.1%} of the frame)")
    _warn_of_odd_data(planes, examined)
    _warn_of_inverted_mask(examined)
    _log_numbers(examined, settings)
    _warn_of_clipped_sky(examined, settings)


@dataclass(frozen=True)
class Result:
    """A picture whose sky was taken out, and how that came about; (h, w) pixels, c channels."""

    planes: np.ndarray  # (c, h, w) the picture without the sky, linear in [0, 1]
    model_planes: SkyModel  # as the planes
    sky_at: Callable[[np.ndarray], np.ndarray]  # the model as `linear_sky` gives it
    unit: Unit  # the picture's own
    offsets: np.ndarray  # (c,) in the own unit: picture - model + offset is what is left, or
    # picture / model * offset if the sky was divided out
    clipped: float  # share of the samples that were clipped at 0 or 1
    gradient_before: float  # see `gradients`
    gradient_after: float
    settings: Settings  # as used
    prepared: Prepared  # with its sky
    fit: Fit

    @functools.cached_property
    def model(self) -> np.ndarray:
        """The sky, (h, w, c) in the picture's own unit."""
        return self._to_image(self.model_planes)

    @functools.cached_property
    def subtracted(self) -> np.ndarray:
        """The picture without the sky, (h, w, c) in its own unit."""
        return self._to_image(self.planes)

    @property
    def deviations(self) -> SkyModel:
        """The standard deviation of the model, as the planes.

        It is that of the sky that was found, and with it how far the fit ended from that.
        """
        found = self.prepared.sky

        def uncertain(places):
            of_fit = self.sky_at(places) - found.surface(places)
            return np.hypot(found.uncertain(places), of_fit)

        return SkyModel(uncertain, self.prepared.full_shape, self.planes.dtype)

    @functools.cached_property
    def uncertainty(self) -> np.ndarray:
        """The standard deviation of the model, (h, w, c) in the picture's own unit."""
        deviations = np.stack(list(self.deviations), -1)
        return deviations * self.planes.dtype.type(self.unit.scale)

    def _to_image(self, planes):
        in_own_unit = [_in_own_unit(plane, self.unit) for plane in planes]
        return np.stack(in_own_unit, -1)


def remove_sky(planes: np.ndarray, settings: Settings, mask: np.ndarray | None = None,
               unit: Unit = Unit(), watched: ContextManager = nullcontext(),
               reference: Reference | None = None) -> Result:
    """Find the sky of a picture, fit the surface, and take it out: the whole job on one picture.

    Args:
        planes: (c, h, w) linear samples in [0, 1], c 1 or 3; changed in place.
        mask: (1 or c, h, w) weights, 1 = use, 0 = ignore, or None.
        unit: the picture's own unit, for the offsets.
        watched: a context for the fit. It may give what `fit_sky` calls after each epoch.
        reference: another picture of the region.

    Raises:
        BgError: as `prepare`, `fit_surface`, and `take_out`.
    """
    examined, settings = examine(planes, settings, mask, unit.black, reference)
    with watched as on_epoch:
        fit = fit_sky(examined, settings, on_epoch)
    logger.info(f"{fit.stopped}; lowest loss {fit.history[:, 0].min():.4f}")
    surface = linear_sky(examined, fit)
    sky = SkyModel(surface, examined.full_shape, planes.dtype)
    offsets, clipped = take_out(planes, sky, examined, settings.correction)
    offsets = offsets * unit.scale
    words = "divided by the sky, times its median"
    if settings.correction == "subtract":
        offsets += unit.offset  # the model is in that unit too
        words = "offsets"
    before, after = gradients(examined, surface, settings.correction)
    if math.isnan(before):
        logger.info("gradient unknown: too little of the picture is sure to be sky")
    else:
        logger.info(f"gradient {before:.1%} of the sky's level before, {after:.1%} after")
    letters = "RGB" if len(planes) == 3 else "L"
    each = [f"{letter} {offset:.6f}" for letter, offset in zip(letters, offsets)]
    each = ", ".join(each)
    logger.info(f"{words}: {each}")
    below, above = clipped
    logger.info(f"clipped: {below} samples at 0, {above} at 1, of {planes.size}")
    share = clipped.sum() / planes.size
    if share > MOST_CLIPPED:
        logger.warning(f"{share:.1%} of the samples were clipped: if they are sky, add a pedestal "
                       "to the picture, or use a stiffer surface (--smoothing); if they are dark "
                       "borders, crop them, or leave them out with -m")
    return Result(planes, sky, surface, unit, offsets, share, before, after, settings, examined,
                  fit)


def optimize(image: np.ndarray, settings: Settings = Settings(), mask: np.ndarray | None = None,
             on_epoch: Callable[[int, float], None] | None = None) -> Result:
    """Model the sky of a linear picture and take it out.

    What it finds out is logged as "bgoptimizer", at the level INFO; doubts are at WARNING.

    Args:
        image: (h, w), (h, w, 1) or (h, w, 3), linear; 0, what is not finite, and what a masked
            array masks count as missing. Integers count over their full range, which becomes 0 to
            1. Floats may have any unit, and the results are in it. Not changed.
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
    if mask is not None:
        mask = mask_weights(_to_planes(mask, "the mask"))
    return remove_sky(planes, settings, mask, unit, nullcontext(on_epoch))


def _to_planes(image: np.ndarray, name: str) -> np.ndarray:
    """Copy (h, w) or (h, w, c) to (c, h, w), to Float64 if the image is, else to Float32.

    What a masked array masks becomes NaN.
    """
    image = np.asanyarray(image)
    kind = image.dtype.kind
    if image.ndim not in (2, 3) or not image.size or kind not in "fiub":
        raise BgError(f"{name} is {image.dtype} of shape {image.shape}; "
                      "give numbers of shape (h, w) or (h, w, c)")
    white = np.iinfo(image.dtype).max if kind in "iu" else 1
    dtype = np.float64 if image.dtype == np.float64 else np.float32
    samples = np.ma.filled(image.astype(dtype), np.nan)
    planes = np.moveaxis(np.atleast_3d(samples), -1, 0)
    planes = np.ascontiguousarray(planes)
    planes /= dtype(white)
    return planes


# --------------------------------------------------------------------------------------------------
# What can be said about a picture
# --------------------------------------------------------------------------------------------------

# Part of the frame. If the stretch clips less sky than that, nobody needs to know.
BLOWN_SHARE = 0.01

# Cells: what the found sky misses is measured on Gaussian means of so many. Noise is small in them,
# and every gradient is wider.
GRADIENT_SCALE = 6.0

GRADIENT_SHARE = 0.3  # a gradient is told if at least this part of the picture shows sky

# A picture looks stretched if its noise falls from the dim to the bright side of a tile by so many
# times the error of that. In 131 linear pictures, of `tests/scenes.py` and real ones, it fell by up
# to 2.4.
STRETCHED_SIGMA = 3.0

# Any fall is enough if the brightest thousandth is above the first number, and the median above the
# second part of the way from black to there
STRETCHED_TOP = 0.6
STRETCHED_MEDIAN = 0.15

# Squares of 2 x 2 pixels along a side of a tile. In so few nothing else changes the noise.
TILE_SQUARES = 32

FEWEST_TILES = 10  # with fewer nobody knows the error of what they tell

# The means of the four phases of a mosaic differ by at least this part of their height above black
MOSAIC_DIFFERENCE = 0.03

# On one diagonal are the two greens: they differ by less than this part of what all phases do.
# Columns or rows of a sensor that differ do so on both diagonals.
MOSAIC_GREENS = 0.5


def _warn_of_odd_data(planes: np.ndarray, prepared: Prepared) -> None:
    """Warn if a picture (c, h, w) looks as if the tool should not run on it."""
    pixels = 0, 1  # the axes
    low, median, high = np.nanquantile(prepared.linear, (0, 0.5, 0.999), pixels)  # (c,) each
    span = np.maximum(high - low, 1e-30)
    height = (median - low) / span
    bright = (high > STRETCHED_TOP) & (height > STRETCHED_MEDIAN)
    if _looks_stretched(planes, bright.all()):
        logger.warning("the picture looks stretched; "
                       "light can be subtracted only while the data are linear")
    if len(planes) == 1 and _looks_like_mosaic(planes[0]):
        logger.warning("the picture looks like an undebayered color picture; debayer it first")
    missing = 1 - prepared.present.mean()
    if missing > 0.5:
        logger.warning(f"{missing:.0%} of the picture is missing (0 or not finite); "
                       "check that it is the right one")


def _warn_of_inverted_mask(examined: Prepared) -> None:
    """Ask whether a mask is inverted: it leaves the bright minority, most of it not sky."""
    present = examined.present.all(-1)
    left = present & (examined.user_mask > 0).any(-1)
    if not 0 < left.sum() < 0.5 * present.sum():
        return
    light = examined.linear.mean(-1)
    brighter = np.median(light[left]) > np.median(light[present])
    if brighter and (examined.sky.unsure or examined.sky.share < 0.5):
        logger.warning("is the mask inverted? What it leaves is brighter than what it leaves out, "
                       "and white (1) means sky. Invert it where it was made (PixInsight: Image > "
                       "Invert, Siril: neg), and give it again")


def _warn_of_clipped_sky(examined: Prepared, settings: Settings) -> None:
    """Warn if the stretch takes sky to 1, without auto, which follows a sky that bright."""
    sky = examined.sky
    surface = sky.surface(sky.centers)  # (h, w, c)
    darker = np.minimum(surface, sky.image)  # stars are no sky
    blown = (darker > examined.stretch.white).any(-1)
    blown = blown.mean()
    if blown > BLOWN_SHARE and not settings.auto:
        quantile = settings.delinearization_quantile
        logger.warning(f"the stretch clips a smooth part of the picture ({blown:.1%} of the "
                       "frame), most likely sky, and the fit loses it there; "
                       f"raise -dq (now {quantile:g})")


def _squares(plane: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the squares of 2 x 2 pixels in tiles of a plane, (n, 4) in each.

    Squares in which pixels are missing or clipped are left out, and so are tiles full of these.
    """
    side = 2 * TILE_SQUARES  # pixels
    apart = math.sqrt(plane.size / 1.6e6)  # some hundred tiles are enough
    step = side * max(1, round(apart))
    height, width = plane.shape
    rows = range(0, height - side + 1, step)
    columns = range(0, width - side + 1, step)
    for y, x in itertools.product(rows, columns):
        tile = plane[y:y + side, x:x + side]
        tile = tile.astype(float)
        squares = tile.reshape(TILE_SQUARES, 2, TILE_SQUARES, 2)
        squares = squares.swapaxes(1, 2)
        squares = squares.reshape(-1, 4)
        inside = (squares > 0) & (squares < 0.99)
        squares = squares[inside.all(1)]
        if len(squares) > TILE_SQUARES**2 / 2:
            yield squares


def _looks_stretched(planes: np.ndarray, bright: bool = False) -> bool:
    """Tell whether the noise falls as the light grows, which a stretch makes it do.

    In linear data it grows, or stays. It is compared within small tiles: vignetting, and borders
    that fewer exposures reach, have another noise. If a picture is `bright`, any fall is enough.
    """
    falls = []
    for plane in planes:
        falls += map(_fall_of_noise, _squares(plane))
    count = len(falls)
    if count < FEWEST_TILES:
        return False
    typical = np.median(falls)
    scatter = _deviation(falls - typical)
    error = MEDIAN_NOISE * scatter / math.sqrt(count)
    least = 0 if bright else STRETCHED_SIGMA * error
    return bool(typical > least)


def _fall_of_noise(squares: np.ndarray) -> float:
    """Return by which part the noise of 2 x 2 pixels (n, 4) falls from the dim to the bright."""
    detail = squares @ (0.5, -0.5, -0.5, 0.5)  # no slope adds to it
    detail = np.abs(detail)
    most = 4 * np.median(detail)
    detail = np.minimum(detail, most)  # stars
    light = squares.mean(1)
    by_light = np.argsort(light)
    variances = detail[by_light]**2
    ninths = np.array_split(variances, 9)
    dim = np.concatenate(ninths[1:3])
    bright = np.concatenate(ninths[6:8])
    dim = dim.mean() + 1e-30  # without noise the fall is 0
    bright = bright.mean() + 1e-30
    return 0.5 * math.log(dim / bright)


def _looks_like_mosaic(plane: np.ndarray) -> bool:
    """Tell whether the pixels of two phases of a 2 x 2 mosaic agree better than all four."""
    tiles = list(_squares(plane))
    if len(tiles) < FEWEST_TILES:
        return False
    means = np.array([squares.mean(0) for squares in tiles])  # (tiles, 4)
    phases = means - means.mean(1, keepdims=True)
    phases = np.median(phases, 0)  # stars are in few tiles
    dark = [np.quantile(squares, 0.01) for squares in tiles]
    dark = min(dark)
    difference = np.ptp(phases)
    one_diagonal = abs(phases[0] - phases[3])
    other_diagonal = abs(phases[1] - phases[2])
    greens = min(one_diagonal, other_diagonal)
    height = np.median(means) - dark
    large = difference > MOSAIC_DIFFERENCE * height
    return bool(large and greens < MOSAIC_GREENS * difference)


def gradients(examined: Prepared, model: Callable[[np.ndarray], np.ndarray],
              correction: str) -> tuple[float, float]:
    """Tell how uneven the sky is before and after the correction: its range over its level.

    That is the mean of the channels; NaN if too little of the picture is sure to be sky. After the
    correction, what the found sky misses of the picture counts as well: the model, which is as
    `linear_sky` gives it, is like the found sky by its making.
    """
    found = examined.sky
    if found.unsure or found.share < GRADIENT_SHARE:
        return math.nan, math.nan
    shows_sky = found.shows_sky  # (h, w)
    surface = found.surface(found.centers)  # (h, w, c)
    missed = _smooth(found.image - surface, GRADIENT_SCALE, shows_sky)
    sky = surface[shows_sky]  # (n, c)
    picture = sky + missed[shows_sky]
    taken = model(found.centers[shows_sky])
    left = corrected(examined, picture, taken, correction)
    level = np.median(sky, axis=0)  # (c,)
    level = np.maximum(level, 1e-12)
    before = _span(sky, (99, 1)) / level
    after = _span(left, (99, 1)) / level
    return before.mean(), after.mean()


def _log_numbers(examined: Prepared, settings: Settings) -> None:
    """Log what the fit sees of a picture, in numbers."""
    height, width, _ = examined.image.shape
    present = examined.present.mean()
    used = np.mean(examined.weight > 0)
    masked = present - used
    missing = 1 - present
    clipped = clipped_by_stretch(examined).mean()
    quantile = settings.delinearization_quantile
    logger.info(
        f"reduced to {width} x {height}: {used:.1%} used, {masked:.1%} masked, "
        f"{missing:.1%} missing; {clipped:.1%} clipped at 1 by the stretch (-dq {quantile:g})")


# --------------------------------------------------------------------------------------------------
# Pictures: preview, figures, animation
#
# All are drawn in the size of `Reduced.display`, so a large frame costs no more than a small one.
# Axes are those of the full-size picture, in its pixels.
# --------------------------------------------------------------------------------------------------

# What is shown of a picture, in figures with one stretch; see `Displayed`
SHOWN = ("picture", "model", "result")

NOT_TRAINED = " (of the sky that was found, not trained yet)"
FIGURE_SIZE = 13.6, 7.6  # inches of 100 pixels: fits a laptop's screen
INK = "#f0e442"  # of control points, and of what can be moved

# Reason -> its color (after Okabe and Ito), its stripes (none: solid), its name. Stripes tell the
# reasons apart where colors do not.
OVERLAYS = {
    "missing": ("#6b7077", "", "missing"),
    "threshold": ("#e69f00", "/////", "left out by -tm, -tM"),
    "rim": ("#009e73", "-----", "left out: a dark rim"),
    "mask file": ("#56b4e9", "\\\\\\\\\\", "left out by -m"),
    "auto": ("#cc79a7", "///", "left out by --auto"),
    "clipped": ("#f0e442", "\\\\\\", "clipped by -dq"),
}

ANIMATION_SIZE = 7.4, 2.8  # inches of 100 pixels; larger is more than 3 MB
FRAMES = 20  # of an animation, at most
FRAME_PAUSE = 130  # milliseconds that a frame is shown
LAST_PAUSE = 1500  # milliseconds: some 4 seconds in all

# Pixels along the longer side from which pictures are drawn. More could not be seen.
DISPLAY_PIXELS = 600

# Pixels along the longer side. The reduced copy of a picture up to this size looks blocky.
SMALL_PICTURE = 1200


def enough(image: np.ndarray) -> np.ndarray:
    """Return every k-th pixel of an image on the reduced frame, (h, w, ...): enough to be drawn."""
    apart = max(image.shape[:2]) / DISPLAY_PIXELS
    step = max(1, round(apart))
    return image[::step, ::step]


def thinned(prepared: Prepared) -> Prepared:
    """Return what is drawn of a picture and its mask, with `enough` pixels."""
    parts = {}
    for name in ("image", "weight", "centers", "linear", "user_mask", "rim"):
        parts[name] = enough(getattr(prepared, name))
    return replace(prepared, **parts)


def to_draw(planes: np.ndarray, linear: np.ndarray) -> np.ndarray:
    """Return what a picture (c, h, w) is drawn from, (h, w, c) linear, NaN where missing.

    That is `enough` of the reduced picture, `linear`; unless the picture is small.
    """
    _, height, width = planes.shape
    longer = max(height, width)
    if longer > SMALL_PICTURE:
        return enough(linear)
    factor = math.ceil(longer / DISPLAY_PIXELS)
    reduced = [reduce_plane(plane, factor, "mean") for plane in planes]
    return _side_by_side(reduced)


def mask_reasons(prepared: Prepared, settings: Settings) -> dict[str, np.ndarray]:
    """Tell why pixels of the reduced frame are left out.

    Returns:
        Reason -> (h, w) bool. A pixel that is left out has exactly one reason.
    """
    inside = prepared.present & _inside_thresholds(prepared.image, settings)
    conditions = {  # the first one that holds counts
        "missing": ~prepared.present.any(-1),
        "threshold": ~inside.any(-1),
        "rim": prepared.rim,
        "mask file": (prepared.user_mask == 0).any(-1),
        "auto": np.full(inside.shape[:2], True),
    }
    reasons = {}
    left_out = ~prepared.used
    for reason, where in conditions.items():
        reasons[reason] = left_out & where
        left_out = left_out & ~reasons[reason]
    return reasons


def display_stretch(linear: np.ndarray) -> Stretch:
    """Return a stretch for the eye of a reduced picture (h, w, c).

    Nearly nothing is clipped, no single star decides how dark the rest is, and the median of every
    channel is at 0.25, unless it is very bright.
    """
    low, median, high = np.nanquantile(linear, (0.002, 0.5, 0.9995), axis=(0, 1))  # (c,) each
    pedestal = low - 0.1 * (median - low)  # darker than `low`, so that faint structure stays
    scale = np.maximum(high - pedestal, 1e-9)  # not 0 where the picture is flat
    midtones = (median - pedestal) / scale
    midtones = np.clip(midtones, MIDTONES_MARGIN, 0.5)  # 0.5 is a straight line
    constants = np.float32([pedestal, scale, midtones])  # (3, c)
    return Stretch(*constants)


def to_bytes(stretched: np.ndarray) -> np.ndarray:
    """Take a stretched picture (h, w, c), NaN where nothing is, to bytes (h, w, 3)."""
    image = 255 * np.nan_to_num(stretched)
    image = np.round(image).astype(np.uint8)
    height, width, _ = image.shape
    return np.broadcast_to(image, (height, width, 3))


class Displayed:
    """A picture, a model of its sky, and what is left without it, as they are drawn."""

    def __init__(self, prepared: Prepared, sky: Callable, correction: str):
        """Make them; the correction is "subtract" or "divide".

        The sky takes frame coordinates (..., 2) to the linear sky there, (..., c).
        """
        self.shape = prepared.full_shape
        self.picture = prepared.display  # (h, w, c) linear, as the others
        planes = SkyModel(sky, self.picture.shape[:2])
        self.model = _side_by_side(list(planes))
        with np.errstate(divide="ignore", invalid="ignore"):  # a sky of no light at all
            self.result = corrected(prepared, self.picture, self.model, correction)

    def draw(self, axes, shown: str, stretch: Stretch, words: str = "") -> None:
        """Draw one of SHOWN, the model with lines of equal brightness; words follow its name."""
        picture = getattr(self, shown)
        colors = to_bytes(stretch.apply(picture))
        show(axes, colors, self.shape, f"the {shown}{words}")
        brightness = picture.mean(-1)
        span = np.ptp(brightness)
        if shown == "model" and span > 1e-9 and min(brightness.shape) > 1:
            darkest = brightness.min() - span  # without the dark colors of the map
            frame = axes.images[0].get_extent()
            axes.contour(brightness, 8, cmap="plasma", vmin=darkest, origin="upper", extent=frame)


def show(axes, colors: np.ndarray, shape: tuple[int, int], title: str):
    """Draw bytes (h, w, 3), or numbers (h, w) in colors, over a full-size frame of this shape."""
    height, width = shape
    right = width - 0.5
    bottom = height - 0.5
    axes.set_title(title, loc="left")  # the style does not reach what a window draws later
    axes.set(xticks=[], yticks=[])
    frame = -0.5, right, bottom, -0.5
    return axes.imshow(colors, "cividis", extent=frame, mouseover=False)


def draw_seen(axes, prepared: Prepared, settings: Settings, columns: int = 2) -> None:
    """Draw the picture as the fit would see it, and in stripes what it would not, with a legend.

    The legend has so many columns.
    """
    from matplotlib.patches import Patch
    areas = mask_reasons(prepared, settings)
    areas["clipped"] = clipped_by_stretch(prepared).any(-1) & prepared.used
    colors = striped(prepared, areas)
    show(axes, colors, prepared.full_shape, "as the fit would see it, and what is left out")
    legend = []
    for reason, (color, hatch, label) in OVERLAYS.items():
        share = areas[reason].mean()
        if share > 0:
            label = f"{label} ({share:.1%})"
            legend.append(Patch(facecolor=color, edgecolor="black", hatch=hatch, label=label))
    axes.legend(handles=legend, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=columns)


def striped(prepared: Prepared, areas: dict[str, np.ndarray]) -> np.ndarray:
    """Return the picture as the fit would see it, bytes (h, w, 3), and over it areas in stripes.

    Args:
        areas: reason, as in OVERLAYS -> (rows, columns) of the reduced frame, bool.
    """
    from matplotlib.colors import to_rgb
    if max(prepared.full_shape) > SMALL_PICTURE:  # then this is what `display` would become
        stretched = enough(prepared.image)
    else:
        stretched = prepared.stretch.apply(prepared.display)
    times = math.ceil(DISPLAY_PIXELS / max(stretched.shape))  # a small one is enlarged
    colors = to_bytes(stretched).repeat(times, 0)
    colors = colors.repeat(times, 1)
    height, width, _ = colors.shape
    row, column = np.ogrid[:height, :width]
    lines = {"": 0 * row, "/": row + column, "\\": row - column, "-": row}
    rows, columns = prepared.rim.shape
    cells = row * rows // height, column * columns // width
    for reason, (color, hatch, _) in OVERLAYS.items():
        if not areas[reason].any():
            continue  # it would take time
        area = areas[reason][cells]
        inside = scipy.ndimage.binary_erosion(area, iterations=2)
        period = 36 // max(len(hatch), 1)
        wide = max(period // 3, not hatch)
        stripes = lines[hatch[:1]] % period < wide
        marked = area & (stripes | ~inside)  # stripes, and its edge
        ink = 255 * np.array(to_rgb(color))
        colors[area] //= 2  # darker between stripes, so that these are seen on any color
        colors[marked] = ink.astype(np.uint8)
    return colors


def draw_figures(figure, prepared: Prepared, settings: Settings, title: str, said: list[str],
                 fit: Fit | None = None) -> None:
    """Draw picture, model, result; what the fit sees; uncertainty; the loss; and what was said.

    Args:
        figure: empty.
        prepared, settings: as `examine` gives them.
        title: the name of the picture.
        said: sentences.
        fit: None before it. Then the model is the sky that was found.
    """
    figure.set_layout_engine("constrained")
    said_of_fit = [["words"]] if fit is None else [["loss"], ["words"], ["words"]]
    axes = figure.subplot_mosaic([list(SHOWN), ["seen", "uncertainty", said_of_fit]])
    sky = prepared.sky.surface if fit is None else linear_sky(prepared, fit)
    displayed = Displayed(prepared, sky, settings.correction)
    stretch = display_stretch(displayed.picture)
    words = NOT_TRAINED if fit is None else ", same stretch"
    for shown in SHOWN:
        displayed.draw(axes[shown], shown, stretch, words)
    axes["picture"].set_title(in_lines([title], 60), loc="left", parse_math=False)
    draw_seen(axes["seen"], prepared, settings)
    draw_uncertainty(axes["uncertainty"], prepared)
    if fit is not None:
        axes["loss"].plot(fit.history[:, 0])
        axes["loss"].set_title("loss of the epochs", loc="left")
    axes["words"].axis("off")
    axes["words"].text(0, 1, in_lines(said, 62), va="top", parse_math=False, in_layout=False)


def draw_uncertainty(axes, prepared: Prepared) -> None:
    """Draw the standard deviation of the sky, in percent of its range."""
    places = frame_coordinates(*prepared.display.shape[:2])
    sky = prepared.sky.surface(places)  # (h, w, c)
    span = np.maximum(np.ptp(sky, (0, 1)), 1e-12)  # (c,)
    percent = 100 * prepared.sky.uncertain(places) / span
    title = "uncertainty of the model, percent of the sky's range"
    colors = show(axes, percent.mean(-1), prepared.full_shape, title)
    axes.figure.colorbar(colors, ax=axes, shrink=0.8)


def in_lines(said: list[str], width: int) -> str:
    """Return sentences in lines of so many characters, as they can be drawn."""
    lines = [textwrap.fill(line, width, subsequent_indent="  ") for line in said]
    text = "\n".join(lines)
    return text.encode("utf-8", "replace").decode()  # names of files may hold anything


def write_animation(file, prepared: Prepared, fit: Fit, correction: str = "subtract") -> None:
    """Write a GIF of how the surface and its control points settle, and what picture they leave.

    Args:
        file: opened.
        prepared: what was fitted.
        fit: with its path, from whose start to whose end there are up to FRAMES.
        correction: "subtract" or "divide".
    """
    from matplotlib.figure import Figure
    from PIL import Image
    longer = max(prepared.full_shape)
    # Most happens early, so the steps are at equal distances of the square root of the epoch
    chosen = (len(fit.track) - 1) * np.linspace(0, 1, FRAMES - 1)**2
    steps = [fit.track[k] for k in np.unique(chosen.round().astype(int))]
    steps.append((f"the best of {len(fit.history)}", fit.positions, fit.values))
    frames = []
    for epoch, positions, values in steps:
        sky = linear_sky(prepared, replace(fit, positions=positions, values=values))
        displayed = Displayed(prepared, sky, correction)
        stretch = display_stretch(displayed.picture)
        with drawing_style():
            figure = Figure(ANIMATION_SIZE)
            figure.subplots_adjust(0.01, 0.01, 0.99, 0.89, 0.02)
            model, result = figure.subplots(1, 2)
            for axes, shown in ((model, "model"), (result, "result")):
                displayed.draw(axes, shown, stretch, f", epoch: {epoch}")
            model.autoscale(False)  # points may be outside
            row, column = positions.T * longer - 0.5  # (n,) pixels
            model.plot(column, row, "o", color=INK, markeredgecolor="black", markersize=5)
            png = to_png(figure)
        frames.append(Image.open(io.BytesIO(png)).convert("RGB"))
    pauses = [FRAME_PAUSE] * (len(frames) - 1) + [LAST_PAUSE]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=pauses, loop=0)


def drawing_style() -> ContextManager:
    """Return a context in which matplotlib draws in our colors, on light and on dark screens."""
    from matplotlib import style
    ours = {"figure.dpi": 100, "font.size": 8, "legend.frameon": False}
    return style.context(["dark_background", ours])


def to_png(figure) -> bytes:
    """Return what a figure shows as a PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def display_kind() -> str | None:
    """Return where a picture can be shown: "notebook" (an IPython kernel), "window", or None."""
    if "IPython" in sys.modules and hasattr(sys.modules["IPython"].get_ipython(), "kernel"):
        return "notebook"
    screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform.startswith("linux") and not screen:
        return None
    try:
        from matplotlib import pyplot
        kind = pyplot.figure().canvas.required_interactive_framework
        pyplot.close()
    except Exception:  # no toolkit, no screen, or a notebook's backend handed down to a subprocess
        return None
    gc.collect()  # here: Tk ends the process if another thread comes to delete its objects
    return "window" if kind else None


def png_of(draw: Callable) -> bytes:
    """Return the PNG of an empty figure that draw(figure) fills."""
    from matplotlib.figure import Figure
    with drawing_style():
        figure = Figure(FIGURE_SIZE)
        draw(figure)
        return to_png(figure)


def show_figure(draw: Callable, where: str) -> None:
    """Have draw(figure) fill an empty figure, and show it in a "notebook" or "window"."""
    if where == "window":
        from matplotlib import pyplot
        with drawing_style():
            draw(pyplot.figure(figsize=FIGURE_SIZE))
    else:
        from IPython.display import Image, display
        display(Image(png_of(draw)))


# --------------------------------------------------------------------------------------------------
# One picture, from file to files
# --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Task:
    """One picture to do."""

    path: str
    options: argparse.Namespace  # of the command line

    @functools.cached_property
    def settings(self) -> Settings:
        """What the options ask of the work on the picture; ValueError if they cannot."""
        chosen = {item.name: getattr(self.options, item.name) for item in fields(Settings)}
        return Settings(**chosen)

    @functools.cached_property
    def format(self) -> Format:
        """The format of the outputs."""
        return FORMATS[self.options.format or picture_format(self.path) or "xisf"]

    @functools.cached_property
    def outputs(self) -> dict[str, str]:
        """What is written -> its path."""
        options = self.options
        fits = not options.preview
        ending = self.format.ending
        left = "bgDivided" if options.correction == "divide" else "bgSubtracted"
        figure = "figures.png" if fits else "preview.png"
        kinds = (
            ("model", fits, f"bgModel{ending}"),
            ("subtracted", fits, f"{left}{ending}"),
            ("uncertainty", options.save_uncertainty, f"uncertainty{ending}"),
            ("mask", options.save_mask, f"mask{ending}"),
            ("animation", options.animate, "optimization.gif"),
            ("figure", options.figures == "save", figure),
        )
        return {kind: self.output(end) for kind, is_asked, end in kinds if is_asked}

    def output(self, end: str) -> str:
        """Return the path of an output whose name ends so."""
        return os.path.join(self.options.output_path, f"{picture_stem(self.path)}_{end}")

    def check(self) -> None:
        """Raise a BgError if an output would take the place of a folder, or of what was read."""
        named = self.path, self.options.mask, self.options.reference
        given = [name for name in named if name is not None]
        for output in self.outputs.values():
            _check_output(output, given)


def _check_output(path: str, kept: Iterable[str]) -> None:
    """Refuse a path to write that is a folder, or one of the files to keep, which are there."""
    if os.path.isdir(path):
        raise BgError(f"{path} is a folder, and a file of that name is to be written; "
                      "choose another output folder")
    if os.path.exists(path) and any(os.path.samefile(path, other) for other in kept):
        raise BgError(f"{path} would be overwritten, and you gave it to read; "
                      "choose another output folder")


def process_file(task: Task, said: list[str], watched: ContextManager = nullcontext(),
                 place: str | None = None) -> Result | None:
    """Take the sky out of one picture, or draw its preview, from file to files.

    Args:
        said: what has been logged of it, as `heard` gives it.
        watched: as for `remove_sky`.
        place: where the figure is shown, too: "notebook", "window", or None.

    Returns:
        What came of it, None of a preview.

    Raises:
        BgError: it cannot be done.
    """
    paths = task.outputs.values()
    with atomic_outputs(*paths) if paths else nullcontext(()) as opened:
        files = dict(zip(task.outputs, opened))
        picture, mask, reference = read_inputs(task)
        _import_for(task.options)
        result = fit = None
        if task.options.preview:
            prepared, settings = examine(
                picture.planes, task.settings, mask, picture.unit.black, reference)
        else:
            result = remove_sky(
                picture.planes, task.settings, mask, picture.unit, watched, reference)
            prepared, settings, fit = result.prepared, result.settings, result.fit
            write_outputs(task, picture, result, files)
        draw = functools.partial(
            draw_figures, prepared=prepared, settings=settings, said=said, fit=fit,
            title=os.path.basename(task.path))
        if "figure" in files:
            files["figure"].write(png_of(draw))
        elif place is not None:
            show_figure(draw, place)
    return result


def read_inputs(task: Task) -> tuple[Picture, np.ndarray | None, Reference | None]:
    """Read what a task names: the picture, its mask (1 or c, h, w), and its reference.

    What the picture is, and what its file has or loses, is logged.
    """
    picture = _read_and_warn(read_picture, task.path)
    count, height, width = picture.planes.shape
    colors = "gray" if count == 1 else "RGB"
    line = f"{task.path}: {width} x {height}, {colors}, {picture.planes.dtype}"
    logger.info(f"{line}; {picture.note}" if picture.note else line)
    lone = keep_dark_samples(picture.planes)
    if lone:
        logger.info(f"{lone} lone samples of 0 are taken for dark sky, not for missing data")
    options = task.options
    mask = reference = None
    if options.mask is not None:
        mask = _read_and_warn(read_mask, options.mask).planes
    if options.reference is not None:
        factor = task.settings.downscaling_factor
        reference = read_reference(options.reference, picture, factor)
    task.check()  # nobody shall wait for what cannot be saved
    return picture, mask, reference


def _read_and_warn(read: Callable[[str], Picture], path: str) -> Picture:
    picture = read(path)
    for text in picture.warnings:
        logger.warning(f"{path} {text}")
    return picture


# What is used while another thread imports TensorFlow. It has to be there before: where two threads
# import, Python 3.11 may have each wait for the other forever.
USED_BESIDE_IMPORTS = (
    "scipy.interpolate", "scipy.linalg", "scipy.ndimage", "scipy.optimize",
    "scipy.spatial.distance", "skimage.draw.polygon2mask", "skimage.measure.block_reduce",
    "skimage.morphology.reconstruction", "skimage.registration.phase_cross_correlation",
    "tqdm.tqdm")


def _import_for(options: argparse.Namespace) -> None:
    """Import what a run will use; unless it is a preview, TensorFlow beside all up to the fit."""
    for name in USED_BESIDE_IMPORTS:
        module, _, part = name.rpartition(".")
        getattr(importlib.import_module(module), part)
    if not options.preview:
        _start_importing()


@functools.lru_cache(maxsize=None)  # so that only the first call does anything
def _start_importing() -> None:
    """Import TensorFlow in a thread. Who needs it waits for this, or sees it fail again."""
    if sys.stderr is not None and sys.stderr is sys.__stderr__:  # nobody has replaced it
        # Keep our stderr on a descriptor of its own: descriptor 2 is silenced below
        own = os.dup(2)
        sys.stderr = open(own, "w", buffering=1, encoding=sys.stderr.encoding,
                          errors="backslashreplace")
    threading.Thread(target=_import_silently, daemon=True).start()


def _import_silently() -> None:
    """Import TensorFlow and do its first operation, with stderr led to nowhere.

    Both print a page of log lines from C++, and no setting silences all of them.
    """
    with suppress(Exception), ExitStack() as stack:  # no stderr, or no TensorFlow
        kept = os.dup(2)
        stack.callback(os.close, kept)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        stack.callback(os.dup2, kept, 2)
        if gc.isenabled():  # it would look through all that is imported, for half a second
            gc.disable()
            stack.callback(gc.enable)
        import_tensorflow().zeros(1)


def write_outputs(task: Task, picture: Picture, result: Result, files: dict) -> None:
    """Write what a task asks for, but for its figure, into its opened files."""
    history = _history(task, result)
    own = picture.source, picture.unit
    pictures = {
        "model": (result.model_planes, *own, "the sky"),
        "subtracted": (result.planes, *own, "the picture without the sky"),
    }
    if "uncertainty" in files:
        unit = picture.unit._replace(offset=0.0)  # a deviation is the same at any level
        pictures["uncertainty"] = (
            result.deviations, picture.source, unit, "the standard deviation of the model")
    if "mask" in files:
        mask = full_mask(result.prepared, result.settings)
        pictures["mask"] = mask, source_of_mask(picture.source), Unit(), "the mask, 1 = sky"
    for kind, (planes, metadata, unit, what) in pictures.items():
        lines = history + [f"bgoptimizer: this is {what}"]
        task.format.write(files[kind], planes, metadata, lines, task.options.compress, unit)
    if "animation" in files:
        correction = result.settings.correction
        write_animation(files["animation"], result.prepared, result.fit, correction)


def _history(task: Task, result: Result) -> list[str]:
    """Return HISTORY lines: what made this picture, to the last setting.

    The first is the same in all pictures of one run, and in no other picture: its time has
    microseconds.
    """
    settings = result.settings
    now = datetime.now(timezone.utc)
    date = now.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    lines = [f"{name} = {value}" for name, value in vars(settings).items()]
    mask = task.options.mask
    lines.append(f"mask = {mask and os.path.basename(mask)}")
    reference = result.prepared.reference
    if reference is not None:
        lines.append(f"reference = {reference.name}, SHA-256 {reference.checksum}")
    shared = result.prepared.sky.shared
    if shared is not None:
        lines.append(f"the reference {shared.verdict}; {'used' if shared.used else 'not used'}")
        lines += gains_in_words(shared)
    lines.append(f"control points used = {len(result.fit.positions)}")
    lines.append(result.fit.stopped)
    what = "offset" if settings.correction == "subtract" else "model's median"
    for channel, offset in enumerate(result.offsets):
        lines.append(f"{what} of channel {channel} = {offset:.9g}")
    lines.append(f"Python {platform.python_version()}")
    for name in ("tensorflow", "tensorflow-addons", "keras", "numpy", "scipy", "scikit-image"):
        with suppress(importlib.metadata.PackageNotFoundError):  # so that pip takes these lines
            lines.append(f"{name}=={importlib.metadata.version(name)}")
    lines = [f"bgoptimizer: {line}" for line in lines]
    return [f"bgoptimizer {VERSION}, {date}"] + lines


class _Interrupts:
    """Ctrl-C, or another wish to end the run, that cannot get lost.

    A module that is being imported may swallow it. TensorFlow may crash when it is interrupted, so
    nothing is raised during a fit, or while `patient`: then `check` does it.
    """

    asked = 0  # number of the signal
    patient = False

    def __enter__(self):
        self.before = {}
        for number in signal.Signals:
            ends = number.name in ("SIGINT", "SIGTERM", "SIGHUP")
            if ends and signal.getsignal(number) not in (None, signal.SIG_IGN):  # as under `nohup`
                with suppress(ValueError):  # signals reach the main thread only
                    self.before[number] = signal.signal(number, self._listen)
        return self

    def _listen(self, number, _):
        self.asked = number
        if not self.patient and not _fitting.locked():
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raise what was swallowed or held back."""
        if self.asked:
            raise KeyboardInterrupt

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


@contextmanager
def watched_fit(epochs: int, interrupts: _Interrupts,
                shown: bool) -> Iterator[Callable[[int, float], None]]:
    """Show how a fit goes on, and end it cleanly after Ctrl-C; yields what `on_epoch` is.

    If it is `shown`, a bar moves on a terminal, and elsewhere every 100th epoch is told.
    """
    from tqdm import tqdm
    terminal = sys.stderr is not None and sys.stderr.isatty()  # None if the caller has closed it
    with tqdm(total=epochs, unit="epoch", leave=False, disable=not (shown and terminal)) as bar:
        def on_epoch(epoch, loss):
            interrupts.check()
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update()
            if bar.disable and epoch % 100 == 0:
                logger.info(f"epoch {epoch:4d}  loss {loss:.4f}")

        interrupts.check()
        yield on_epoch
        interrupts.check()


WARNING = "warning: "  # how a warning begins


@contextmanager
def heard(printed: int = logging.CRITICAL) -> Iterator[list[str]]:
    """Note what is logged, a sentence each, and print what has this level; nobody else hears it.

    Information is printed on stdout and warnings on stderr, wherever these lead when it happens.
    """
    said = []

    def hear(record):  # whatever fails here ends the run: a reader may have closed stdout
        text = record.getMessage()
        is_warning = record.levelno >= logging.WARNING
        said.append(WARNING + text if is_warning else text)
        if record.levelno >= printed:
            if is_warning:
                print(f"bgoptimizer: {WARNING}{text}", file=sys.stderr)
            else:
                print(text, flush=True)
        return False

    before = logger.filters, logger.level
    logger.filters = [hear]
    logger.setLevel(logging.INFO)
    try:
        yield said
    finally:
        logger.filters, level = before
        logger.setLevel(level)


def _told(error: Exception) -> str:
    """Return one sentence on what went wrong."""
    words = " ".join(str(error).split())
    if isinstance(error, BgError):
        return words
    if lacks_memory(error):
        return ("there is not enough memory; "
                "close other programs, crop the picture, or split its channels")
    if isinstance(error, OSError):
        name = error.filename or "a file"
        return f"{name}: {error.strerror or words}; check the path, the disk, your rights"
    if isinstance(error, ImportError):
        return (f"{error.name} cannot be imported; "
                "install it with: python -m pip install -r requirements.txt")
    return (f"unexpected {type(error).__name__}: {words[:300]}; "
            "this is a bug, please report it with your command")


# --------------------------------------------------------------------------------------------------
# Preview to work in: a window, and a panel in notebooks
#
# A `Choice` is what is chosen of a picture. The handlers of a `Preview` replace it, and `refresh`
# shows it; a window and a panel differ in their widgets only. The preview calls the functions of
# the command line, so the command that it prints gives the same result.
# --------------------------------------------------------------------------------------------------

WINDOW_SIZE = 13.0, 6.2  # inches of 100 pixels: fits a screen of 1366 x 768, with its frame
LOOK_AFTER = 0.4  # seconds after the last move until the sky is looked for anew
TICK = 200  # milliseconds between two looks at what the thread does
THOUSANDTHS = tuple(k / 1000 for k in range(1001))

# What can be chosen, a field of `Settings` or what is shown -> its values
LADDERS = {
    # What is above these falls by even steps, to about a half each
    "delinearization_quantile": (
        0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999, 1.0),
    "threshold_min": THOUSANDTHS,
    "threshold_max": THOUSANDTHS,
    "smoothing": (None, *sorted(SMOOTHINGS)),
    "auto": (False, True),
    "correction": ("subtract", "divide"),
    "shown": SHOWN,
}

# Label of a slider in the window -> what is chosen with it
SLIDERS = {
    "-dq": "delinearization_quantile",
    "-tm": "threshold_min",
    "-tM": "threshold_max",
    "smoothing": "smoothing",
}

# Key -> what is chosen with it, and by how many values it goes on
STEPS = {
    "left": ("delinearization_quantile", -1), "right": ("delinearization_quantile", 1),
    "down": ("threshold_max", -10), "up": ("threshold_max", 10),
    "[": ("threshold_min", -1), "]": ("threshold_min", 1),
    "-": ("smoothing", -1), "+": ("smoothing", 1),
    "a": ("auto", 1), "d": ("correction", 1), " ": ("shown", 1),
}

# Key -> label of the button that does the same; the first two are check boxes
BUTTONS = {
    "a": "--auto  [a]", "d": "--correction divide  [d]",
    " ": "Picture, model, result  [space]", "c": "Copy the command  [c]",
    "t": "Take the sky out  [t]", "escape": "Stop  [escape]",
    "w": "Write  [w]", "q": "Close  [q]",
}

HELP = ("Keys: left, right -dq;  down, up -tM;  [ ] -tm;  - + smoothing.\n"
        "Draw around what is to be left out; with Shift it is given back.")


@dataclass(frozen=True)
class Choice:
    """What is chosen of a picture, and what follows from it."""

    asked: Settings  # None where nothing was asked for, as on the command line
    prepared: Prepared  # thinned: what the fit would see, but for what --auto leaves out
    painting: np.ndarray | None = None  # (h, w, 1) of the reduced frame: 0 left out, 1 given back,
    # NaN not painted on
    result: Result | None = None  # of a training with just this
    shown: str = SHOWN[0]

    @property
    def settings(self) -> Settings:
        """The settings as used."""
        return self.asked.resolved()


class Preview:
    """A picture, what is chosen of it, and the handlers that change the choice."""

    def __init__(self, figure, task: Task, picture: Picture, mask: np.ndarray | None,
                 reference: Reference | None = None):
        """Prepare the picture; what is not seen at once is computed later, or beside it.

        The figure is empty, and the picture, its mask, and its reference are as `read_inputs` gives
        them.
        """
        self.task = task
        self.picture = picture
        self.mask = mask
        planes = picture.planes
        used = task.settings.resolved()
        self.unpainted = prepare(planes, used, mask, picture.unit.black, reference)
        thin = thinned(self.unpainted)
        self.choice = Choice(task.settings, thin)
        # As long as a sky and a correction are those of the last time, so is what is shown
        self.displayed = functools.lru_cache(maxsize=1)(functools.partial(Displayed, thin))
        self.ladders = {name: list(values) for name, values in LADDERS.items()}
        for name, values in self.ladders.items():
            if self.value(name) not in values:
                values.append(self.value(name))
                values.sort(key=lambda value: -1 if value is None else value)
        self.stretches = ThreadPoolExecutor(1).submit(
            measure_stretches, planes, self.ladders["delinearization_quantile"])
        self.written = None  # path of the mask that was drawn here
        self.sky = None  # as it was found last
        self.due = 0.0  # when to look for it, by the monotonic clock
        self.said = []
        self.status = ""  # what was refused, or is being done
        self.showing = False  # widgets are set to the choice: their handlers have nothing to do
        self.figure = figure
        self.axes = figure.add_axes([0.01, 0.09, 0.66, 0.86])  # left, bottom, width, height
        write = functools.partial(figure.text, s="", va="top", parse_math=False)
        self.texts = write(0.01, 0.04), write(0.69, 0.49), write(0.69, 0.05, color=INK)

    def value(self, name: str):
        """Return what is chosen, by its name in LADDERS."""
        return self.choice.shown if name == "shown" else getattr(self.choice.settings, name)

    def place(self, name: str) -> int:
        """Return where on its ladder that stands."""
        return self.ladders[name].index(self.value(name))

    # --- Handlers: they change the choice ---

    def take(self, name: str, place: float) -> None:
        """Choose what is at a place of the ladder of this name."""
        value = self.ladders[name][int(place)]
        if self.showing:
            return
        if name == "shown":
            self.choice = replace(self.choice, shown=value)
            self.refresh()
        else:
            self.change(**{name: value})

    def step(self, name: str, by: int) -> None:
        """Go along a ladder, and around where it is short."""
        count = len(self.ladders[name])
        place = self.place(name) + by
        if count > 3:
            place = min(max(place, 0), count - 1)
        self.take(name, place % count)

    def change(self, painting: np.ndarray | None = None, **changes) -> None:
        """Change what is chosen, or the drawing, if a fit could do with it."""
        painting = self.choice.painting if painting is None else painting
        try:
            asked = replace(self.choice.asked, **changes)
            prepared = self.prepared(asked.resolved(), painting, True)
            choice = Choice(asked, prepared, painting, shown=self.choice.shown)
        except (ValueError, BgError) as error:
            self.status = str(error)
            self.refresh()
        else:
            self.go_to(choice)

    def go_to(self, choice: Choice) -> None:
        """Take a choice for which the sky may be another one."""
        self.choice = choice
        self.said = []  # it was said of something else
        self.status = ""
        self.due = time.monotonic() + LOOK_AFTER
        self.refresh()

    def prepared(self, settings: Settings, painting: np.ndarray | None,
                 thin: bool = False) -> Prepared:
        """Return what a fit would see, of the whole reduced frame or thinned."""
        quantile = settings.delinearization_quantile
        stretches, _ = self.stretches.result()
        if quantile not in stretches:
            raise BgError(f"-dq {quantile:g} takes all of a channel to 1; raise it")
        user_mask = painted_over(self.unpainted.user_mask, painting)
        reduced = replace(self.unpainted, user_mask=user_mask)
        reduced = thinned(reduced) if thin else reduced
        return stretch_and_mask(reduced, stretches[quantile], settings)

    def look(self, choice: Choice) -> Sky:
        """Find the sky of a choice, and tell of it."""
        prepared = self.prepared(choice.settings, choice.painting)
        sky = find_sky(prepared, choice.settings)
        judge(self.picture.planes, with_sky(prepared, choice.settings, sky), choice.settings)
        return sky

    def keep_sky(self, sky: Sky) -> None:
        self.sky = sky

    # --- From the choice to what is shown ---

    def refresh(self) -> None:
        """Show all anew."""
        axes, choice = self.axes, self.choice
        for old in (*axes.images, *axes.collections, axes.get_legend()):
            if old is not None:
                old.remove()
        prepared = self.seen(choice.prepared)
        if choice.shown == "picture" or self.sky is None:
            draw_seen(axes, prepared, choice.settings, 5)
        else:
            words = "" if choice.result else NOT_TRAINED
            displayed = self.displayed(self.model(), choice.settings.correction)
            displayed.draw(axes, choice.shown, prepared.stretch, words)
        axes.images[0].set_interpolation("nearest")  # it is the quickest
        words = shlex.join(self.words()), in_lines(self.said, 62), self.status
        for text, line in zip(self.texts, words):
            text.set_text(line)
        self.showing = True
        self.set_widgets()
        self.showing = False

    def seen(self, prepared: Prepared) -> Prepared:
        """Return what the fit would see, as far as the sky is known."""
        return with_sky(prepared, self.choice.settings, self.sky) if self.sky else prepared

    def model(self) -> Callable:
        """Return the linear sky as a function of frame coordinates, trained if it is."""
        result = self.choice.result
        return result.sky_at if result else self.sky.surface

    def mask_path(self, choice: Choice) -> str | None:
        """Return the path of a choice's mask: of the given, or if it is painted, of a new file."""
        if choice.painting is None:
            return self.task.options.mask
        ending = self.task.format.ending
        paths = (self.task.output(f"mask{count}{ending}") for count in ("", *range(2, 1000)))
        return self.written or next(path for path in paths if not os.path.exists(path))

    def words(self, usual=Settings) -> list[str]:
        """Return the flags of the command that does what is shown; `usual` as for `flag_words`."""
        return flag_words(self.task.options, self.choice.asked, self.mask_path(self.choice), usual)


def painted_over(mask: np.ndarray | None, painting: np.ndarray | None) -> np.ndarray | None:
    """Return a mask, None for 1 all over, with what is painted, but for NaN, put over it."""
    if painting is None:
        return mask
    return np.where(np.isnan(painting), 1 if mask is None else mask, painting)


def _quietly(work: Callable) -> tuple[Any, list[str]]:
    """Return what work() gives, and what it says, which nobody else hears."""
    with heard() as said:
        return work(), said


class PreviewWindow(Preview):
    """A window in which a mask can be drawn, too, and the sky taken out.

    What takes long runs in one thread beside it: looking for the sky, training, writing.
    """

    def __init__(self, *what):
        """Make the widgets; `what` is as for `Preview`."""
        from matplotlib import widgets
        super().__init__(*what)
        self.pool = ThreadPoolExecutor(1)
        self.job = None  # what the thread does, and what is done with what it gives
        self.looking = False  # whether that is to look for the sky
        self.stopping = threading.Event()
        self.shift = False  # is held
        self.keys = {key: functools.partial(self.step, *step) for key, step in STEPS.items()}
        self.keys.update(t=self.train, escape=self.stopping.set, w=self.write, c=self.copy)
        add = self.figure.add_axes
        self.figure.text(0.69, 0.11, HELP, va="top")
        self.widgets = {}  # matplotlib forgets one that nobody keeps
        for k, (label, name) in enumerate(SLIDERS.items()):
            last = len(self.ladders[name]) - 1
            place = add([0.755, 0.93 - 0.045 * k, 0.15, 0.03])
            slider = widgets.Slider(place, label, 0, last, valstep=1, color=INK)
            slider.drawon = False  # `refresh` draws all at once
            slider.on_changed(lambda place, name=name: self.take(name, place))
            slider.label.set_x(-0.06)  # beside the handle, not below it
            slider.valtext.set_x(1.06)
            self.widgets[label] = slider
        for k, (key, label) in enumerate(BUTTONS.items()):
            place = add([0.69 + 0.15 * (k % 2), 0.74 - 0.05 * (k // 2), 0.145, 0.045])
            button = widgets.Button(place, label, color="#30363d", hovercolor="#4a5058")
            button.on_clicked(lambda _, key=key: self.keys[key]())
            place.xaxis.set_visible(False)  # else it takes time, though it is empty
            place.yaxis.set_visible(False)
            self.widgets[key] = button
        self.lasso = widgets.LassoSelector(
            self.axes, self.paint, props=dict(color=INK, linewidth=2), button=1)
        self.lasso.set_visible(False)  # else all would be drawn twice
        listen = self.figure.canvas.mpl_connect
        listen("button_press_event", lambda event: setattr(self, "shift", event.key == "shift"))
        listen("key_press_event", lambda event: self.keys.get(event.key, lambda: None)())
        listen("close_event", lambda event: self.stopping.set())
        self.refresh()

    def set_widgets(self):
        for label, name in SLIDERS.items():
            slider = self.widgets[label]
            slider.set_val(self.place(name))
            slider.valtext.set_text(in_words(self.value(name)))
        for key, name in (("a", "auto"), ("d", "correction")):
            box = "\u2611" if self.place(name) else "\u2610"
            self.widgets[key].label.set_text(f"{box}  {BUTTONS[key]}")
        self.figure.canvas.draw_idle()

    # --- Handlers that only a window has ---

    def paint(self, corners):
        """Leave out what the lasso holds, or with Shift give it back.

        What --auto leaves out can be given back only where its mask becomes one of the user's own.
        """
        from skimage.draw import polygon2mask
        choice = self.choice
        shape = self.unpainted.rim.shape
        pixels = np.array(corners)[:, ::-1]  # (n, 2) row and column, full size
        inside = polygon2mask(shape, (pixels + 0.5) / choice.settings.downscaling_factor - 0.5)
        if len(corners) < 3 or not inside.any():  # a click
            return
        painting = np.full((*shape, 1), np.nan, np.float32)
        if choice.painting is not None:
            painting = choice.painting.copy()
        changes = {}
        if self.shift and choice.settings.auto:
            painting[..., 0] = self.seen(self.prepared(choice.settings, choice.painting)).used
            quantile = choice.settings.delinearization_quantile
            changes = dict(auto=False, delinearization_quantile=quantile)
        painting[inside] = self.shift
        self.change(painting, **changes)

    def train(self) -> None:
        """Take the sky out as the command would, and show what comes of it."""
        choice = self.choice
        _start_importing()

        def on_epoch(epoch, loss):
            if self.stopping.is_set():
                raise BgError("stopped")
            self.status = f"epoch {epoch}, loss {loss:.4f}"

        def work():
            return remove_sky(
                self.picture.planes.copy(), choice.asked, self.full_mask(choice), self.picture.unit,
                nullcontext(on_epoch), self.unpainted.reference)

        def keep(result):
            self.sky = result.prepared.sky
            self.choice = replace(choice, result=result, shown="result")

        self._start(work, keep, "preparing the fit")

    def write(self):
        """Write what the command would write."""
        choice = self.choice
        if choice.result is None:
            self.status = "take the sky out first  [t]"
            self.refresh()
            return

        def work():
            changes = dict(mask=self.write_mask(choice), preview=False, figures="none")
            chosen = {**vars(self.task.options), **vars(choice.asked), **changes}
            task = Task(self.task.path, argparse.Namespace(**chosen))
            task.check()
            with atomic_outputs(*task.outputs.values()) as files:
                write_outputs(task, self.picture, choice.result, dict(zip(task.outputs, files)))
            logger.info("wrote " + ", ".join(task.outputs.values()))

        self._start(work, lambda _: None, "writing")

    def copy(self):
        """Put the command that does what is shown into the clipboard."""
        line = command_line(self.task.options, self.words())
        canvas = self.figure.canvas
        self.status = "the command is in the clipboard"
        if hasattr(canvas, "get_tk_widget"):
            clipboard = canvas.get_tk_widget()
            clipboard.clipboard_clear()
            clipboard.clipboard_append(line)
        elif canvas.required_interactive_framework == "qt":
            from matplotlib.backends.qt_compat import QtWidgets
            QtWidgets.QApplication.clipboard().setText(line)
        else:
            self.status = "not copied: this toolkit is neither Tk nor Qt; it is printed at the end"
        self.refresh()

    def full_mask(self, choice: Choice) -> np.ndarray | None:
        """Return the mask of a choice at full size, (1 or c, h, w), or None."""
        if choice.painting is None:
            return self.mask
        factor = choice.settings.downscaling_factor
        painting = _enlarge(choice.painting, factor, self.unpainted.full_shape)  # (h, w, 1)
        return painted_over(self.mask, np.moveaxis(painting, -1, 0))

    def write_mask(self, choice: Choice) -> str | None:
        """Write the mask of a choice if it was painted; returns its path, or that of the given."""
        path = self.mask_path(choice)
        if choice.painting is not None:
            lines = ["bgoptimizer: a mask drawn by hand, 1 = sky"]
            metadata = source_of_mask(self.picture.source)
            mask = self.full_mask(choice)
            task = self.task
            with atomic_outputs(path) as (file,):
                task.format.write(file, mask, metadata, lines, task.options.compress, Unit())
            self.written = path
        return path

    # --- The thread ---

    def _start(self, work, then, status, looking=False):
        """Have the thread do work(), and then call then() with what that gives.

        That replaces a look for the sky, and waits for nothing else.
        """
        if self.job is not None and not self.looking:
            return
        self.looking = looking
        self.due = math.inf
        self.stopping.clear()
        self.status = status
        self.job = self.pool.submit(_quietly, work), then
        self.refresh()

    def tick(self) -> None:
        """See what the thread has done, and have it look for the sky anew where that is due."""
        if self.job is None:
            if time.monotonic() > self.due:
                look = functools.partial(self.look, self.choice)
                self._start(look, self.keep_sky, "looking for the sky", looking=True)
            return
        future, then = self.job
        if future.done():
            self.job = None
            self.status = ""
            try:
                given, self.said = future.result()
                then(given)
            except Exception as error:
                self.status = _told(error)
                if not self.looking:  # it may have replaced a look for the sky
                    self.due = time.monotonic()
            self.refresh()
        elif self.texts[2].get_text() != self.status:
            self.texts[2].set_text(self.status)
            self.figure.canvas.draw_idle()


def work_in_window(task: Task, interrupts: _Interrupts) -> None:
    """Open the preview window on one picture, until it is closed; then write the drawn mask."""
    inputs = read_inputs(task)
    _import_for(task.options)
    with drawing_style():
        from matplotlib import pyplot
        figure = pyplot.figure(in_lines([os.path.basename(task.path)], 80), WINDOW_SIZE)
        # pyplot's own keys do other things
        figure.canvas.mpl_disconnect(figure.canvas.manager.key_press_handler_id)
        window = PreviewWindow(figure, task, *inputs)
        window.keys["q"] = functools.partial(pyplot.close, figure)

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
    line = command_line(task.options, window.words())
    if not task.options.quiet:  # the thread may still import TensorFlow, and has the log for itself
        print(f"this command does it:\n{line}", flush=True)
    window.pool.shutdown()
    window.write_mask(window.choice)
    del figure, window, timer, tick
    gc.collect()  # as in `display_kind`
    interrupts.check()


class PreviewPanel(Preview):
    """A panel of ipywidgets in a notebook; `box` is what is to be displayed."""

    widgets_in_use = []  # of the last panel

    def __init__(self, use: Callable[[list[str]], None], *what):
        """Make the widgets; the button calls use(flags), and `what` is as for `Preview`."""
        import ipywidgets
        from matplotlib.figure import Figure
        with drawing_style():
            super().__init__(Figure(WINDOW_SIZE), *what)
        for widget in PreviewPanel.widgets_in_use:
            widget.close()  # else it would keep its picture as long as the notebook is open
        self.widgets = {}
        for name, values in self.ladders.items():
            kind = ipywidgets.SelectionSlider if len(values) > 3 else ipywidgets.ToggleButtons
            words = list(map(in_words, values))
            widget = kind(options=words, index=0, description=name, continuous_update=False)
            widget.observe(lambda change, name=name: self.take(name, change.new), "index")
            self.widgets[name] = widget
        self.button = ipywidgets.Button(description="Use these settings")
        self.button.on_click(lambda _: use(self.words(usual=None)))
        self.image = ipywidgets.Image(format="png")
        PreviewPanel.widgets_in_use = [*self.widgets.values(), self.button]
        self.box = ipywidgets.VBox([*PreviewPanel.widgets_in_use, self.image])
        self.go_to(self.choice)

    def go_to(self, choice):
        """Also look for the sky, for there is no thread that does."""
        super().go_to(choice)
        self.sky, self.said = _quietly(functools.partial(self.look, choice))
        self.refresh()

    def set_widgets(self):
        for name, widget in self.widgets.items():
            widget.index = self.place(name)
        with drawing_style():
            self.image.value = to_png(self.figure)


def in_words(value) -> str:
    """Return what can be chosen in words, as the command line takes it."""
    return "auto" if value is None else str(value)


# --------------------------------------------------------------------------------------------------
# Many pictures
#
# They are done one by one in this process, or by an executor: processes of its own, or workers of
# Dask. These get paths and options, not our classes: pickle names a class by its module, and a
# script's module is `__main__`.
# --------------------------------------------------------------------------------------------------

REPORT_NAME = "bgoptimizer_report.csv"
DONE, WARNED, FAILED, SKIPPED = "done", "warned", "failed", "skipped"

# How names of pictures end that this tool has written. They are nothing to work on.
OWN_OUTPUTS = ("_bgModel", "_bgSubtracted", "_bgDivided", "_uncertainty", "_mask")

PATIENCE_WITH_SCHEDULER = 15  # seconds until a scheduler that does not answer is taken for absent


class Outcome(NamedTuple):
    """What came of one picture: a row of the report, as text."""

    file: str
    outcome: str  # DONE, WARNED, FAILED, or SKIPPED
    sky_share: str = ""
    smoothing: str = ""
    gradient_before: str = ""
    gradient_after: str = ""
    clipped: str = ""  # share of the samples
    confidence: str = ""  # sure, or unsure and why
    seconds: str = ""
    message: str = ""  # the warnings, or why it failed


def find_pictures(where: str | Sequence[str], *used: str | None) -> list[str]:
    """Return the paths of pictures, by name; raises BgError if there are none.

    Args:
        where: a picture; or a folder, a pattern, or several of all these. Of them, hidden files,
            what this tool has written, what has another name than pictures have, and what is used
            are left out.
        used: paths of the mask and of the reference, or None.
    """
    named = [where] if isinstance(where, str) else list(where)
    files = sorted({path for name in named for path in _files_at(name)})
    if files == named and len(named) == 1:
        return named
    used = {os.path.realpath(path) for path in used if path is not None}
    pictures, others = [], []
    for path in files:
        if os.path.isdir(path) or os.path.realpath(path) in used:
            continue
        is_own = picture_stem(path).endswith(OWN_OUTPUTS)
        if is_own or not PICTURE_ENDINGS.search(os.path.basename(path)):
            others.append(path)
        else:
            pictures.append(path)
    if others:  # they may be somebody's pictures all the same
        some = textwrap.shorten(", ".join(others), 200, placeholder=" ...")
        logger.info(f"left out by name (no pictures, or outputs of this tool): {some}")
    if not pictures:
        raise BgError(f"{', '.join(named[:3])} holds no XISF, FITS or TIFF pictures to work on; "
                      "check the name of the folder, or the pattern")
    return pictures


def _files_at(name: str) -> list[str]:
    """Return what is in a folder or fits a pattern, but for hidden files; or a path that exists."""
    if os.path.isdir(name):
        name = os.path.join(name, "*")
    elif os.path.exists(name):
        return [name]
    elif not glob.has_magic(name):
        raise BgError(f"{name or 'a file without a name'} does not exist; check the name")
    folder, pattern = os.path.split(name)
    as_it_is = glob.glob(os.path.join(glob.escape(folder), pattern))  # [Ha] may be in its name
    return as_it_is or glob.glob(name, recursive=True)


def run_many(pictures: list[str], options: argparse.Namespace, interrupts: _Interrupts) -> None:
    """Do all these pictures as the command line says, and write the report.

    A BgError is raised if nothing can be done at all, and if some of the pictures failed.
    """
    started = time.perf_counter()
    if options.preview or options.figures == "show":
        raise BgError("--preview and --figures show are for one picture; "
                      f"name it, such as {pictures[0]}")
    for path, read in ((options.mask, read_mask), (options.reference, open_reference)):
        if path is not None:
            read(path)  # so that a bad one is told once
    report = os.path.join(options.output_path, REPORT_NAME)
    _check_output(report, pictures)
    outcomes = []
    stopped = None
    with atomic_outputs(report) as (file,):
        to_do, settled = _plan(pictures, options, report)
        results = _outcomes(to_do, options, interrupts)
        try:
            with closing(results):
                for outcome in itertools.chain(settled, results):
                    outcomes.append(outcome)
                    _tell(outcome, f"{len(outcomes)} of {len(pictures)}")
        except BaseException as error:  # an interrupted night has a report, too
            stopped = error
            if not outcomes:
                raise
        text = io.StringIO(newline="")
        csv.writer(text).writerows([Outcome._fields, *sorted(outcomes)])
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))
    if stopped is not None:
        raise stopped
    _sum_up(outcomes, time.perf_counter() - started, report)


def _outcomes(to_do: list[Task], options: argparse.Namespace,
              interrupts: _Interrupts) -> Iterator[Outcome]:
    """Do pictures here, or by an executor, as the options say; yields what came of each."""
    jobs = min(options.jobs or 1, len(to_do), 61)  # Windows cannot wait for more processes
    if options.dask is not None and to_do:
        return _by_dask(to_do, options.dask)
    if jobs > 1:
        return _by_processes(to_do, jobs)
    return (_try_picture(task, interrupts) for task in to_do)


def read_report(path: str) -> dict[str, Outcome]:
    """Return the outcomes of a report by file; none if there is no report, or not one of ours."""
    with suppress(FileNotFoundError):
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            rows = [row for row in csv.reader(file) if len(row) == len(Outcome._fields)]
        return {row[0]: Outcome(*row) for row in rows}
    return {}


def _plan(pictures: list[str], options: argparse.Namespace,
          report: str) -> tuple[list[Task], list[Outcome]]:
    """Return what there is to do, and the outcomes of what is done already or cannot be written."""
    known = read_report(report) if options.skip_done else {}
    to_do = []
    settled = []
    writers = {}  # path of an output -> the first picture that writes it
    for path in pictures:
        task = Task(path, options)
        shared = [output for output in task.outputs.values()
                  if writers.setdefault(os.path.normcase(output), path) != path]
        if shared:
            first = writers[os.path.normcase(shared[0])]
            message = (f"{path} and {first} would both write {shared[0]}; "
                       "rename one of them, or do it alone into another folder")
            settled.append(Outcome(path, FAILED, message=message))
        elif options.skip_done and _is_done(task):
            before = known.get(path, Outcome(path, SKIPPED))
            settled.append(before._replace(outcome=SKIPPED))
        else:
            to_do.append(task)
    return to_do, settled


def _is_done(task: Task) -> bool:
    """Tell whether all outputs are there and newer than the picture."""
    made = os.path.getmtime(task.path)
    for path in task.outputs.values():
        if not os.path.exists(path) or os.path.getmtime(path) <= made:
            return False
    return True


def _tell(outcome: Outcome, number: str) -> None:
    """Log what came of a picture, the `number` of which says how far the run is."""
    message = outcome.message
    if not message.startswith(outcome.file):
        message = f"{outcome.file}: {message}"
    if outcome.outcome == FAILED:
        logger.warning(f"failed: {message}")
    elif outcome.outcome == WARNED:
        logger.warning(message)
    elif outcome.outcome == DONE:
        logger.info(f"{outcome.file}: done, {outcome.seconds} s ({number})")


def _sum_up(outcomes: list[Outcome], seconds: float, report: str) -> None:
    """Log what came of all pictures; raises BgError if some failed."""
    count = len(outcomes)
    total = "1 picture" if count == 1 else f"{count} pictures"
    counts = Counter(row.outcome for row in outcomes)
    parts = [f"{counts[outcome]} {outcome}" for outcome in sorted(counts)]
    parts = ", ".join(parts)
    logger.info(f"{total}: {parts}; {seconds:.1f} s; wrote {report}")
    failed = counts[FAILED]
    if failed:
        raise BgError(f"{failed} of {total} failed; {report} says why")


def _try_picture(task: Task, interrupts: _Interrupts) -> Outcome:
    """Do one picture, whatever may happen; nothing is printed."""
    started = time.perf_counter()
    watched = watched_fit(task.settings.epochs, interrupts, shown=False)
    try:
        with heard() as said:
            result = process_file(task, said, watched)
        outcome = _outcome(task, result, said)
    except Exception as error:
        outcome = Outcome(task.path, FAILED, message=_told(error))
    return outcome._replace(seconds=f"{time.perf_counter() - started:.2f}")


def _outcome(task: Task, result: Result, said: list[str]) -> Outcome:
    """Put a result into the words and digits of a row."""
    sky = result.prepared.sky
    values = (
        sky.share,
        result.settings.smoothing,
        result.gradient_before,
        result.gradient_after,
        result.clipped)
    digits = ["" if math.isnan(value) else f"{value:.5g}" for value in values]
    confidence = f"unsure: {sky.unsure}" if sky.unsure else "sure"
    warned = [line[len(WARNING):] for line in said if line.startswith(WARNING)]
    outcome = WARNED if warned else DONE
    return Outcome(task.path, outcome, *digits, confidence, message=" | ".join(warned))


# Many pictures: executors

_one_at_a_time = threading.Lock()


def do_picture(path: str, options: argparse.Namespace, folder: str) -> tuple:
    """Do one picture for an executor; takes the fields of a `Task`, gives those of an `Outcome`.

    Paths start from `folder`. A worker of Dask may have several threads, but TensorFlow, the log,
    and memory are one for all.
    """
    with _one_at_a_time, _Interrupts() as interrupts:
        os.chdir(folder)
        try:
            return tuple(_try_picture(Task(path, options), interrupts))
        except KeyboardInterrupt:  # in a process; what it wrote is cleared away
            os._exit(1)


def _by_executor(executor: Executor, work: Callable, to_do: list[Task]) -> Iterator[Outcome]:
    """Submit all pictures, and yield each outcome when it is ready.

    What is done is taken out of `to_do`.

    BrokenExecutor, CancelledError, and OSError are the end of the executor.
    """
    folder = os.getcwd()
    tasks = {executor.submit(work, task.path, task.options, folder): task for task in to_do}
    for future in as_completed(tasks):
        task = tasks[future]
        try:
            outcome = Outcome(*future.result())
        except (CancelledError, BrokenExecutor):
            raise
        except Exception as error:  # a picture that has killed one worker of Dask after the other
            message = f"it could not be done by any worker ({type(error).__name__}); try it alone"
            outcome = Outcome(task.path, FAILED, message=message)
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
        except (BrokenExecutor, OSError):  # such as one that could not be started
            if count == 1:
                message = "the process that did it has died; is there enough memory?"
                yield Outcome(to_do.pop(0).path, FAILED, message=message)
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
    """Do pictures by the workers of a Dask scheduler, which get this script."""
    try:
        import distributed
    except ImportError:
        raise BgError("--dask needs Dask; install it with: "
                      'python -m pip install "dask[distributed]"') from None
    # Dask hands a function of a module over by its name, and one of a script with all it uses
    name = Path(__file__).stem if __name__ == "__main__" else __name__
    script = importlib.import_module(name)
    for name in ("distributed", "distributed.client", "tornado.application"):
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
        except (CancelledError, OSError):
            raise BgError(f"the Dask scheduler has ended, after {number - len(to_do)} of {number} "
                          "pictures; start it again, and go on with --skip-done") from None


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

class _Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def error(self, message):
        self.exit(2, f"bgoptimizer: error: {message}; see --help\n")


def auto_or_number(text: str) -> float | None:
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
    parser.add_argument(
        "input_file", nargs="+",
        help="linear XISF, FITS or TIFF picture, gray or RGB; or several, a folder of them, or a "
             'pattern such as "lights/*.fit"')
    parser.add_argument(
        "output_path", nargs="?", default=".",
        help="folder for what is written; made if missing (default: .)")

    def add(*flags, help, default="%(default)s", **kind):
        parser.add_argument(*flags, help=f"{help} (default: {default})", **kind)

    switch = {"action": "store_true", "default": "off"}
    add("-c", "--compress", **switch,
        help="compress without loss: XISF by LZ4-HC, FITS by GZIP_2, TIFF by deflate")
    add("-dx", "--downscaling-factor", type=int,
        help="side of the blocks of pixels that the fit sees as one pixel")
    add("-df", "--downscaling-func",
        help="what a block is reduced to, median or mean; the median drops small stars")
    add("-dq", "--delinearization-quantile", type=float,
        default=f"{DEFAULT_QUANTILE}, with --auto {AUTO_QUANTILE}",
        help="quantile taken to 1; what is above is clipped")
    add("-p", "--preview", **switch,
        help="try settings in a window, draw a mask; without a display, a picture is saved")
    add("-N", dest="points", metavar="N", type=int,
        default=f"{DEFAULT_POINTS}, with --auto {AUTO_POINTS}",
        help="number of control points that the fit trains")
    add("-O", dest="order", metavar="O", type=int,
        help="order of the spline, 1 to 4; 2 is a thin plate, 3 is cubic")
    add("-tm", "--threshold-min", type=float,
        help="leave out what is darker than this in the stretched picture")
    add("-tM", "--threshold-max", type=float,
        help="leave out what is brighter than this in the stretched picture")
    add("-m", "--mask", default="none",
        help="a picture of the same size: 1 = use, 0 = leave out, between = weight")
    add("-i", "--initializer", help="where the control points start, random or grid")
    add("-e", "--epochs", type=int, help="most epochs; the fit ends before when nothing improves")
    add("-a", "--alpha", type=float, default="%(default)g",
        help="weight of the penalties on a sky that is negative or brighter than the picture")
    add("-B", dest="batch", metavar="B", type=int,
        help=f"batch size: independent samples of {SAMPLE_CELLS} cells that the fit sees")
    add("-lr", dest="learning_rate", metavar="LR", type=float, help="learning rate at the start")
    add("--auto", **switch, help="find objects and leave them out")
    add("--reference", metavar="FILE", default="none",
        help="a picture of the region with a gentler sky, tells nebula from glow; turns on --auto")
    add("--smoothing", type=auto_or_number, metavar="{auto,NUMBER}",
        default="auto, found from the picture",
        help="stiffness: 10000 is a plane, 1000 adds a bowl, 0.001 follows all that is smooth")
    add("--correction", metavar="{subtract,divide}",
        help="what is done with the sky: subtract it, or divide by it, against vignetting")
    add("--format", choices=tuple(FORMATS), default="the one of the input",
        help="format of the outputs")
    add("--seed", type=int, help="seed of all random numbers")
    add("--save-mask", **switch, help="also write the mask, to edit it and give it back with -m")
    add("--save-uncertainty", **switch, help="also write the standard deviation of the model")
    add("--figures", choices=("auto", "show", "save", "none"),
        help="figure or preview: show it, save it as PNG, or none; auto shows it where it can")
    add("--animate", **switch, help="also write an animation of how the surface settles")
    add("--skip-done", **switch, help="leave out pictures whose outputs are newer than they are")
    add("--jobs", type=int, metavar="N", default="1",
        help="pictures of a folder that are done at the same time")
    add("--dask", metavar="ADDRESS", default="none",
        help="Dask scheduler, such as tcp://host:8786, whose workers do the pictures")
    add("--quiet", **switch, help="print warnings and errors only")
    parser.add_argument("--version", action="version", version=f"bgoptimizer {VERSION}")
    parser.set_defaults(**vars(Settings()), figures="auto")
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, or exit with code 2 and a sentence."""
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
    if options.preview and (options.save_mask or options.save_uncertainty or options.animate):
        parser.error("--preview writes nothing but itself, no --save-mask, no --save-uncertainty, "
                     "and no --animate")
    if options.jobs is not None and (options.jobs < 1 or options.dask is not None):
        parser.error("--jobs must be 1 or more, and does not go with --dask")
    options.auto = options.auto or options.reference is not None
    try:
        Task("", options).settings
    except ValueError as error:
        parser.error(str(error))
    return options


def flag_words(options: argparse.Namespace, settings: Settings, mask: str | None,
               usual: type | None = Settings) -> list[str]:
    """Return the flags that ask for these settings, this mask file, and what else was given.

    Settings that are as `usual` are left out; without any, what follows may change no setting.
    """
    words = []
    for item in fields(settings):
        flag = item.metadata["flag"]
        value = getattr(settings, item.name)
        if usual is not None and value == getattr(usual, item.name):
            continue
        if value is True:
            words.append(flag)
        elif value is not False and (value is not None or flag == "--smoothing"):
            words += [flag, in_words(value)]
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
        with interrupts:
            options = _parse(argv)
            with heard(logging.WARNING if options.quiet else logging.INFO) as said:
                pictures = find_pictures(options.input_file, options.mask, options.reference)
                reported = options.jobs or options.dask or options.skip_done
                is_named = len(pictures) == 1 and pictures == options.input_file
                if is_named and not reported:
                    _run_one(options, said, interrupts, use)
                else:  # a folder that holds one picture has a report, too
                    run_many(pictures, options, interrupts)
        return 0
    except SystemExit as stop:  # argparse has said why
        return stop.code or 0
    except KeyboardInterrupt:
        code = 128 + (interrupts.asked or signal.SIGINT)
        message = "interrupted; what was not finished was not written"
    except BrokenPipeError:  # whoever read our lines has left
        return 1
    except Exception as error:
        code = 1
        message = _told(error)
    print(f"bgoptimizer: error: {message}", file=sys.stderr)
    return code


def command() -> None:
    """Run the command line and leave. What Python and TensorFlow would put away takes 0.6 s."""
    code = main()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError):  # there is no such stream, or nobody listens
            stream.flush()
    os._exit(code)


def _run_one(options: argparse.Namespace, said: list[str], interrupts: _Interrupts,
             use: Callable[[list[str]], None]) -> None:
    """Do one picture, and tell how it goes on; `said` is as `heard` gives it."""
    started = time.perf_counter()
    place = _place_for_figure(options)
    if place == "save":
        options.figures = place
    task = Task(*options.input_file, options)
    if options.preview and place == "window":
        work_in_window(task, interrupts)
    elif options.preview and place == "notebook" and importlib.util.find_spec("ipywidgets"):
        from IPython.display import display
        display(PreviewPanel(use, task, *read_inputs(task)).box)
    else:
        watched = watched_fit(task.settings.epochs, interrupts, not options.quiet)
        process_file(task, said, watched, place)
        for path in task.outputs.values():
            logger.info(f"wrote {path}")
        logger.info(f"{time.perf_counter() - started:.1f} s")
        if place == "window":
            from matplotlib import pyplot
            pyplot.show()  # waits until the window is closed


def _place_for_figure(options: argparse.Namespace) -> str | None:
    """Return where the preview or the figure goes: "notebook", "window", "save", or None."""
    if options.figures in ("none", "save"):
        return "save" if options.figures == "save" else None
    kind = display_kind()
    if kind is None and options.figures == "show":
        raise BgError(
            "there is neither a notebook nor a window to show figures in; use --figures save")
    return kind or ("save" if options.preview else None)


if __name__ == "__main__":
    command()
