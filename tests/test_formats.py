"""FITS and TIFF: the same picture in all formats, nothing lost between them.

Nothing hostile is let in.
"""

import gzip
import io
import os
import re
import shutil
import struct
import sys
import time
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zstandard
from astropy.io import fits
from astropy.wcs import WCS
from PIL import Image
from xisf import XISF

import bgoptimizer as bg
from make_demo import DEMO
from runner import LINEAR, growth, python, quick, refused, run
from scenes import REAL, sloping_sky
from xisf_files import keyword_element, one_image

FEW = ["-e", "2", "-N", "6", "-i", "grid", "--smoothing", "1", "-dx", "2", "--quiet", "-dq", "1"]
ICC = b"\0\0\2\x0cprofile" + bytes(range(256)) * 2
ICC_TAG = (34675, 7, len(ICC), ICC, True)


# ------------------------------------------------------------------------------------ helpers


@pytest.fixture(scope="module")
def demo():
    """The demo picture's planes, (3, h, w) uint16."""
    planes = bg.read_picture(str(DEMO)).planes
    return np.rint(planes * 65535).astype(np.uint16)


@pytest.fixture
def small():
    """A color picture, (3, 40, 60) uint16, that is not square; one sample is missing."""
    planes = np.moveaxis(sloping_sky(40, 60)[0], -1, 0)
    planes = np.rint(planes * 65535).astype(np.uint16)
    planes[1, 3, 4] = 0
    return planes


def header():
    """A header with all that tends to get lost."""
    cards = fits.Header()
    cards["OBJECT"] = "M 31"
    cards["SERIAL"] = ("0042", "text, not a number")
    cards["EXPTIME"] = (180.0, "seconds")
    cards["STACKCNT"] = 40
    cards["FLIPPED"] = True
    cards["LONGTEXT"] = "it's a 'long' text; " * 12
    cards["HIERARCH ESO DET CHIP"] = "CCD"
    cards["ROWORDER"] = "BOTTOM-UP"
    cards["CTYPE1"], cards["CTYPE2"] = "RA---TAN-SIP", "DEC--TAN-SIP"
    cards["CRVAL1"], cards["CRVAL2"] = 10.68470833, 41.26875
    cards["CRPIX1"], cards["CRPIX2"] = 30.5, 20.25
    cards["CD1_1"], cards["CD1_2"] = -0.00031, 0.00002
    cards["CD2_1"], cards["CD2_2"] = 0.00002, 0.00031
    cards["A_ORDER"], cards["A_2_0"], cards["A_1_1"], cards["A_0_2"] = 2, 1e-5, 2e-6, 3e-6
    cards["B_ORDER"], cards["B_2_0"], cards["B_1_1"], cards["B_0_2"] = 2, 3e-6, 2e-6, 1e-5
    cards["AP_ORDER"], cards["BP_ORDER"] = 0, 0
    cards["COMMENT"] = "a comment"
    cards["HISTORY"] = "stacked"
    cards["HISTORY"] = "cropped"
    return cards


def xisf_source(*elements):
    """A Source whose Image holds these elements, which are text."""
    text = "".join(["<xisf><Image>", *elements, "</Image><Metadata/></xisf>"])
    return bg.XisfSource(bg.ElementTree.XML(text), {})


def icc_hdu():
    return fits.ImageHDU(np.frombuffer(ICC, np.uint8), name="ICCProfile")


def in_fits_order(data, cards=None):
    """Rows from the lowest up, as FITS has them unless ROWORDER says otherwise."""
    if data is None or cards is not None and cards.get("ROWORDER") == "TOP-DOWN":
        return data
    return np.flip(data, 0 if data.shape[-1] == 3 else -2)


def upright(path, number=0):
    """The samples of a FITS file without ROWORDER, top row first."""
    with fits.open(path) as hdus:
        return np.flip(hdus[number].data, -2)


def save_fits(path, data, cards=None, more=(), **options):
    data = in_fits_order(data, cards)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fits.HDUList([fits.PrimaryHDU(data, cards), *more]).writeto(path, overwrite=True, **options)
    return str(path)


def save_compressed(path, data, kind, cards=None, **options):
    data = in_fits_order(data, cards)
    hdus = [fits.PrimaryHDU(), fits.CompImageHDU(data, cards, compression_type=kind, **options)]
    fits.HDUList(hdus).writeto(path, overwrite=True)
    return str(path)


def save_tiff(path, planes, **options):
    tifffile.imwrite(path, np.moveaxis(planes, 0, -1), photometric="rgb", metadata=None, **options)
    return str(path)


def written(name, picture, planes=None, folder=None, **options):
    """Write what was read in a format of this name; returns the path."""
    path = os.path.join(str(folder or "."), "again" + bg.FORMATS[name].ending)
    with open(path, "w+b") as file:
        planes = picture.planes if planes is None else planes
        bg.FORMATS[name].write(file, planes, picture.source, **options)
    return path


def cards_of(path, number=0):
    """The cards of a header, but for those of its structure: (keyword, value, comment)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with fits.open(path) as hdus:
            cards = [(card.keyword, card.value, card.comment) for card in hdus[number].header.cards]
    structure = ("SIMPLE", "BITPIX", "EXTEND", "BSCALE", "BZERO", "XTENSION", "PCOUNT", "GCOUNT")
    return [card for card in cards if card[0] not in structure and not card[0].startswith("NAXIS")]


def own_part(cards):
    return [card for card in cards if "bgoptimizer" not in str(card[1])]


# ------------------------------------------------------------------------------------ reading


def as_bytes(planes):
    return np.rint(planes / 257).astype(np.uint8)


KINDS = {  # of samples: how they are made of 16 bits, and by how much they may be off
    "u8": (as_bytes, 0.5 / 255), "u16": (lambda u: u, 0),
    "u32": (lambda u: u.astype(np.uint32) * 65537, 1e-6),
    "f16": (lambda u: (u / 65535).astype(np.float16), 3e-4),
    "f32": (lambda u: (u / 65535).astype(np.float32), 1e-6), "f64": (lambda u: u / 65535, 1e-6),
}


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"f16"}))
def test_the_demo_as_fits_reads_to_the_same_planes(kind, demo, folder):
    make, most = KINDS[kind]
    picture = bg.read_picture(save_fits("demo.fit", make(demo)))
    assert picture.warnings == []
    assert picture.unit == bg.Unit()
    assert picture.planes.dtype == (np.float64 if kind == "f64" else np.float32)
    assert np.abs(picture.planes - bg.read_picture(str(DEMO)).planes).max() <= most


@pytest.mark.parametrize("kind", ["RICE_1", "GZIP_1", "GZIP_2", "HCOMPRESS_1"])
def test_a_compressed_fits_reads_to_the_same_planes(kind, demo, folder):
    picture = bg.read_picture(save_compressed("demo.fits.fz", demo[:, :200, :300], kind))
    assert np.array_equal(picture.planes, bg.read_picture(str(DEMO)).planes[:, :200, :300])
    assert picture.source.hdus_before == b""


@pytest.mark.parametrize("kind, options", [
    *[(kind, {}) for kind in KINDS], ("u16", {"compression": "lzw", "predictor": True}),
    ("u16", {"compression": "zstd"}), ("f32", {"compression": "zlib", "predictor": True}),
    ("u16", {"tile": (64, 64), "compression": "deflate"}), ("u16", {"rowsperstrip": 7}),
    ("u16", {"byteorder": ">"}), ("u16", {"bigtiff": True})])
def test_the_demo_as_tiff_reads_to_the_same_planes(kind, options, demo, folder):
    make, most = KINDS[kind]
    picture = bg.read_picture(save_tiff("demo.tif", make(demo), **options))
    assert picture.warnings == []
    assert np.abs(picture.planes - bg.read_picture(str(DEMO)).planes).max() <= most


def test_a_planar_tiff_and_alpha(small, folder):
    tifffile.imwrite("planar.tif", small, photometric="rgb", planarconfig="separate")
    truth = small / np.float32(65535)
    assert np.allclose(bg.read_picture("planar.tif").planes, truth, atol=1e-7)
    four = np.concatenate([small, small[:1]])
    save_tiff("alpha.tif", four, extrasamples=["unassalpha"])
    picture = bg.read_picture("alpha.tif")
    assert np.allclose(picture.planes, truth, atol=1e-7)
    assert "1 alpha channel(s): dropped" in picture.warnings[0]


@pytest.mark.parametrize("arrange", [
    lambda u: u[0], lambda u: u[:1], lambda u: u[None, :1], lambda u: u, lambda u: u[None],
    lambda u: np.moveaxis(u, 0, -1)])
def test_axes_of_a_fits(arrange, small, folder):
    data = arrange(small)
    planes = bg.read_picture(save_fits("a.fits", np.ascontiguousarray(data))).planes
    count = 1 if data.size == small[0].size else 3
    assert np.allclose(planes, small[:count] / 65535, atol=1e-7)


def test_the_content_decides_and_not_the_ending(small, folder):
    save_fits("really.tif", small)
    save_tiff("really.fits", small)
    assert bg.picture_format("really.tif") == "fits"
    assert bg.picture_format("really.fits") == "tiff"
    for name in ("really.tif", "really.fits"):
        assert bg.read_picture(name).planes.shape == small.shape


def test_what_is_missing_stays_missing(small, folder):
    values = (small / 65535).astype(np.float32)
    values[0, 5, 6] = np.nan
    picture = bg.read_picture(save_fits("a.fits", values))
    assert np.isnan(picture.planes[0, 5, 6]) and picture.planes[1, 3, 4] == 0
    blank = small.astype(np.int16)
    cards = fits.Header()
    cards["BLANK"] = -5
    blank[2, 7, 8] = -5
    assert np.isnan(bg.read_picture(save_fits("b.fits", blank, cards)).planes[2, 7, 8])


def test_a_picture_in_an_extension_stays_there(small, folder):
    main = fits.PrimaryHDU()
    main.header["OBSERVER"] = "me"
    picture_hdu = fits.ImageHDU(in_fits_order(small), name="SCI")
    table = fits.BinTableHDU.from_columns([fits.Column("x", "D", array=np.arange(5.0))])
    fits.HDUList([main, picture_hdu, table, fits.ImageHDU(small[0], name="ERR")]).writeto("a.fits")
    picture = bg.read_picture("a.fits")
    assert picture.warnings == ["holds 2 images: only the first is used"]
    for compress in (False, True):
        with fits.open(written("fits", picture, compress=compress)) as hdus:
            assert hdus[0].header["OBSERVER"] == "me"
            assert hdus[1].header["EXTNAME"] == "SCI"
            assert np.array_equal(in_fits_order(hdus[1].data), picture.planes)
            assert np.array_equal(hdus[2].data["x"], np.arange(5.0))
            assert np.array_equal(hdus[3].data, small[0])


def test_warnings_of_mosaics_and_of_keywords_that_become_untrue(small, folder):
    cards = fits.Header()
    cards["BAYERPAT"], cards["PEDESTAL"] = "RGGB", 100
    picture = bg.read_picture(save_fits("a.fits", small[0], cards))
    assert any("mosaic" in text for text in picture.warnings)
    cards["NOISE00"] = 5.0
    picture = bg.read_picture(save_fits("b.fits", small, cards))
    assert picture.warnings[0].startswith("had NOISE00: not kept")


# ------------------------------------------------------------------------------------ units


@pytest.mark.parametrize("unit", ["electrons", "negatives", "signed", "bscale"])
def test_a_picture_comes_back_in_its_own_unit(unit, small, folder):
    cards = fits.Header()
    truth = small.astype(np.float32)
    stored = truth
    if unit == "negatives":
        stored = truth = np.where(small == 0, 0, truth - 3000)
    elif unit == "signed":
        truth = truth // 4
        stored = truth.astype(np.int16)
    elif unit == "bscale":
        stored = (small // 4).astype(np.int16)
        cards["BSCALE"], cards["BZERO"] = 0.5, 0.0
        truth = stored * np.float32(0.5)
    path = save_fits("a.fits", stored, cards)
    if unit == "bscale":
        plain = fits.Header.fromfile(path)
        plain["BSCALE"], plain["BZERO"] = 0.5, 0.0
        samples = in_fits_order(stored).astype(">i2").tobytes()  # astropy would scale the data
        Path(path).write_bytes(plain.tostring().encode() + samples)
    picture = bg.read_picture(path)
    assert (picture.planes >= 0).all() and (picture.planes <= 1).all()
    assert picture.planes[1, 3, 4] == 0 and "written back in its own unit" in picture.note
    for name in ("fits", "tiff"):
        again = written(name, picture, unit=picture.unit)
        back = upright(again) if name == "fits" else np.moveaxis(tifffile.imread(again), -1, 0)
        tolerance = 0 if unit != "negatives" else 0.01
        assert np.abs(back - truth).max() <= tolerance


def test_optimize_gives_floats_back_in_their_own_unit():
    image = sloping_sky(64, 96)[0]
    plain = bg.optimize(image, quick(epochs=20))
    for scale, zero in ((60000, 0), (60000, -5000)):
        result = bg.optimize(image * scale + zero, quick(epochs=20))
        span = np.ptp(plain.model) * scale
        assert np.abs(result.model - (plain.model * scale + zero)).max() < 0.1 * span
        whole = result.model + result.subtracted - result.offsets
        assert np.abs(whole - (image * scale + zero)).max() < 0.05


# ------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("compress", [False, True])
def test_a_fits_keeps_its_header_card_by_card(compress, small, folder):
    path = save_fits("a.fits", small, header(), [icc_hdu()], checksum=True)
    picture = bg.read_picture(path)
    again = written("fits", picture, history=["bgoptimizer: a line"], compress=compress)
    number = 1 if compress else 0
    sums = ("CHECKSUM", "DATASUM", "EXTNAME")
    kept = [card for card in own_part(cards_of(again, number)) if card[0] not in sums]
    assert kept == [card for card in cards_of(path) if card[0] not in sums]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of checksums that do not match
        with fits.open(again, checksum=True) as hdus:
            assert np.array_equal(in_fits_order(hdus[number].data), picture.planes)
            assert hdus[number + 1].data.tobytes() == ICC
            assert "bgoptimizer: a line" in str(hdus[number].header["HISTORY"])
            hdus.verify("exception")
        with fits.open(again, disable_image_compression=True) as hdus:
            assert not {"CHECKSUM", "DATASUM"} & set(hdus[number].header)


def test_what_malformed_cards_say_is_kept(small, folder):
    path = save_fits("a.fits", small)
    odd = [b"OBJECT  = 'no end", b"lower   = 3", b"BAD = = 3 /", b"\xb5\xe9 not ASCII",
           b"LONG    = 'goes on&'", b"CONTINUE  'without an end"]
    data = open(path, "rb").read()
    end = data.index(b"END".ljust(80))
    cards = b"".join(card.ljust(80) for card in odd)
    with open(path, "wb") as file:
        file.write((data[:end] + cards).ljust(2800) + b"END".ljust(80) + data[2880:])
    picture = bg.read_picture(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fits.getheader(written("fits", picture))
        assert "no end" in found["OBJECT"] and found["LOWER"] == 3
        assert "BAD" in str(found["COMMENT"]) and "?? not ASCII" in found.tostring()
        assert found["LONG"] == "goes on&" and "without an end" in found.tostring()
    for name in bg.FORMATS:
        for compress in (False, True):
            again = bg.read_picture(written(name, picture, compress=compress))
            assert np.array_equal(again.planes, picture.planes)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_tiff_keeps_what_it_has(compress, channels, small, folder):
    tifffile.imwrite(
        "a.tif", np.moveaxis(small, 0, -1)[..., :channels].squeeze(), metadata=None,
        photometric="rgb" if channels > 1 else "minisblack",
        description="SIMPLE  =                    T\nOBJECT  = 'M 31'\nEND",
        extratags=[ICC_TAG, (315, "s", 0, "me", True), (700, "B", 4, b"<x/>", True)],
    )
    picture = bg.read_picture("a.tif")
    again = written("tiff", picture, history=["bgoptimizer: a line"], compress=compress)
    with tifffile.TiffFile(again) as tiff:
        tags = tiff.pages[0].tags
        assert tiff.pages[0].dtype == np.float32
        lines = tags[270].value.split("\n")
        assert lines[0].split()[:3] == ["SIMPLE", "=", "T"] and lines[-1] == "END"
        assert lines[-3] == "OBJECT  = 'M 31'"
        assert lines[-2] == "HISTORY bgoptimizer: a line"
        assert tags[34675].value == ICC and tags[315].value == "me" and tags[700].value == b"<x/>"
        assert (tiff.pages[0].predictor == 3) == compress
    assert np.array_equal(bg.read_picture(again).planes, picture.planes)


def test_pillow_reads_our_tiff(small, folder):
    save_tiff("a.tif", small)
    color = bg.read_picture("a.tif")
    gray = written("tiff", color, planes=color.planes[:1])
    with Image.open(gray) as image:
        assert np.array_equal(np.asarray(image), color.planes[0])


@pytest.mark.parametrize("first", ["xisf", "fits", "tiff"])
@pytest.mark.parametrize("second", ["xisf", "fits", "tiff"])
def test_round_trips_between_all_formats(first, second, small, folder):
    path = save_fits("start.fits", small, header(), [icc_hdu()])
    start = bg.read_picture(path)
    one = bg.read_picture(written(first, start))
    two = bg.read_picture(written(second, one))
    back = bg.read_picture(written("fits", two))
    for picture in (one, two, back):
        assert np.array_equal(picture.planes, start.planes)
        assert bg._shared_metadata(picture.source, 40)[1] == ICC
    expected = [card[:2] for card in cards_of(path) if card[0] != "ROWORDER"]
    found = [card[:2] for card in cards_of("again.fits") if card[0] != "ROWORDER"]
    assert found == expected
    assert fits.getheader("again.fits")["ROWORDER"] == "BOTTOM-UP"


def test_xisf_keywords_become_cards(folder, small):
    source = xisf_source(
        keyword_element("TEXT", "'it''s'", "c"), keyword_element("NUMBER", "1.50", "digits"),
        keyword_element("HISTORY", "", "done"), keyword_element("EMPTY", "", "x"),
        keyword_element("NAXIS1", "7", ""), keyword_element("BARE", "word", "\u00b5m"))
    picture = bg.Picture(small / np.float32(65535), source, [])
    cards = fits.getheader(written("fits", picture))
    assert cards["TEXT"] == "it's" and cards.comments["TEXT"] == "c"
    assert cards["NUMBER"] == 1.5
    assert (cards["HISTORY"][0] == "done" and cards["BARE"] == "word" and cards["NAXIS1"] == 60)
    assert "EMPTY" in cards and cards.comments["BARE"] == "?m"


def test_writing_changes_neither_planes_nor_source(small, folder):
    picture = bg.read_picture(save_fits("a.fits", small, header()))
    planes, keywords = picture.planes.copy(), picture.source.keywords.tostring()
    for name in bg.FORMATS:
        written(name, picture, history=["a"], unit=bg.Unit(2.0, -1.0))
    assert np.array_equal(planes, picture.planes) and keywords == picture.source.keywords.tostring()


# ------------------------------------------------------------------------------------ hostile files


def fits_header(*cards, data=0):
    text = "".join(card.ljust(80) for card in [*cards, "END"])
    return text.ljust(-(-len(text) // 2880) * 2880).encode() + bytes(data)


def plain(bits=16, *axes, more=()):
    lines = [f"NAXIS{k}  = {length}" for k, length in enumerate(axes, 1)]
    return ["SIMPLE  = T", f"BITPIX  = {bits}", f"NAXIS   = {len(axes)}", *lines, *more]


def tiff_file(entries, tail=b"", next_ifd=0, count=None):
    """A little-endian TIFF file of one directory; entries are (tag, type, count, value)."""
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    number = len(entries) if count is None else count
    start, end = struct.pack("<H", number), struct.pack("<I", next_ifd)
    return b"II*\0\x08\0\0\0" + start + packed + end + tail


def tiff_tags(width=8, height=8, offset=200, size=64, **changes):
    tags = {
        256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1),
        273: (4, 1, offset), 277: (3, 1, 1), 278: (4, 1, height), 279: (4, 1, size),
    }
    tags.update({int(name[1:]): value for name, value in changes.items()})
    return [(tag, *values) for tag, values in sorted(tags.items())]


def fz_file(*changes, data=2880, start=b""):
    """A FITS file with a compressed picture of 8 x 4; later cards stand in front of others."""
    cards = {card[:8]: card for card in (*COMPRESSED, "ZNAXIS1 = 8", "ZNAXIS2 = 4", *changes)}
    return (fits_header(*plain(8)) + fits_header(*cards.values()) + start.ljust(data, b"\0"))


COMPRESSED = [
    "XTENSION= 'BINTABLE'", "BITPIX  = 8", "NAXIS   = 2", "NAXIS1  = 8", "NAXIS2  = 4",
    "PCOUNT  = 0", "GCOUNT  = 1", "TFIELDS = 1", "TTYPE1  = 'COMPRESSED_DATA'",
    "TFORM1  = '1PB(9)'", "ZIMAGE  = T", "ZBITPIX = 16", "ZNAXIS  = 2", "ZCMPTYPE= 'GZIP_1'",
]
HOSTILE = {
    "an empty file": b"",
    "a text": b"this is no picture at all",
    "a JPEG": b"\xff\xd8\xff\xe0" + bytes(100),
    "FITS that ends in the header": fits_header(*plain(16, 60, 40))[:1000],
    "FITS without END": b"SIMPLE  =                    T".ljust(2880 * 4),
    "FITS with a header bomb": b"SIMPLE  =                    T".ljust(2880 * 3000),
    "FITS with a damaged END": fits_header(*plain(16, 60, 40), data=5760).replace(b"END ", b"END?")
    + fits_header("XTENSION= 'IMAGE'", *plain(8)[1:]),
    "FITS without pixels": fits_header(*plain(8)),
    "FITS cut short": fits_header(*plain(16, 60, 40), data=2880),
    "FITS with absurd axes": fits_header(*plain(-64, 10**9, 10**9, 3), data=2880),
    "FITS with negative axes": fits_header(*plain(16, -60, 40), data=2880),
    "FITS with axes in words": fits_header(*plain(16, "'x'", 40), data=2880),
    "FITS with NAXIS 999": fits_header("SIMPLE  = T", "BITPIX  = 8", "NAXIS   = 999", data=2880),
    "FITS with NAXIS 10^9": fits_header("SIMPLE  = T", "BITPIX  = 8", "NAXIS   = 1000000000"),
    "FITS without NAXIS2": fits_header("SIMPLE  = T", "BITPIX  = 8", "NAXIS   = 2", "NAXIS1  = 8"),
    "FITS with BITPIX 7": fits_header(*plain(7, 60, 40), data=2880 * 2),
    "FITS with BSCALE 0": fits_header(*plain(16, 60, 40, more=["BSCALE  = 0"]), data=2880 * 2),
    "FITS with BZERO in words": fits_header(*plain(16, 60, 40, more=["BZERO   = 'a'"]), data=5760),
    "FITS with five planes": fits_header(*plain(8, 60, 40, 5), data=2880 * 5),
    "FITS with absurd tiles": fz_file("ZNAXIS1 = 1000000", "ZNAXIS2 = 1000000"),
    "FITS with a tile of 0": fz_file("ZTILE1  = 0"),
    "FITS with fewer tiles than rows": fz_file("ZTILE2  = 2"),
    "FITS with unknown compression": fz_file("ZCMPTYPE= 'MAGIC'"),
    "FITS with a billion columns": fz_file("TFIELDS = 1000000000"),
    # astropy 7 ends with a crash at these two, and with it Python
    "FITS with an impossible codec": fz_file(
        "ZCMPTYPE= 'RICE_1'", "ZNAME1  = 'BYTEPIX'", "ZVAL1   = -1"),
    "FITS with a tile beyond its memory": fz_file(
        "ZCMPTYPE= 'HCOMPRESS_1'", "ZTILE2  = 4", "NAXIS2  = 1", "PCOUNT  = 100",
        start=struct.pack(">iiHii", 100, 0, 0xDD99, 40000, 40000)),
    "FITS with descriptors out of the file": fz_file(start=b"\x7f\xff\xff\xff" * 8),
    "FITS with descriptors out of the heap": fz_file(
        "PCOUNT  = 2000", start=b"\x7f\xff\xff\xff" * 8),
    "TIFF of 8 bytes": b"II*\0\x08\0\0\0",
    "TIFF with its directory outside": b"II*\0\xff\xff\xff\x7f" + bytes(100),
    "TIFF with a directory of 65535": tiff_file(tiff_tags(), bytes(300), count=65535),
    "TIFF with absurd axes": tiff_file(tiff_tags(0x7FFFFFFF, 0x7FFFFFFF), bytes(300)),
    "TIFF with a zlib bomb": tiff_file(tiff_tags(1 << 20, 1 << 20, _259=(3, 1, 8)), bytes(300)),
    "TIFF with a strip outside": tiff_file(tiff_tags(offset=10**9), bytes(300)),
    "TIFF with damaged LZW": tiff_file(tiff_tags(_259=(3, 1, 5)), b"\xff" * 300),
    "TIFF with LZW of no table": tiff_file(tiff_tags(_259=(3, 1, 5)), b"\x7f" * 300),
    "TIFF with damaged deflate": tiff_file(tiff_tags(_259=(3, 1, 8)), b"\xff" * 300),
    "TIFF with a palette": tiff_file(tiff_tags(_262=(3, 1, 3)), bytes(300)),
    "TIFF in JPEG": tiff_file(tiff_tags(_259=(3, 1, 7)), bytes(300)),
    "TIFF of 12 bits": tiff_file(tiff_tags(_258=(3, 1, 12)), bytes(300)),
    "TIFF of many widths": tiff_file(
        tiff_tags(_256=(4, 239, 200), _277=(3, 1, 52227)), bytes(1200)),
    "TIFF with a color space in floats": tiff_file(tiff_tags(_262=(11, 1, 2)), bytes(300)),
    "TIFF of width 0": tiff_file(tiff_tags(width=0), bytes(300)),
    "TIFF with huge tiles": tiff_file(
        tiff_tags(_322=(4, 1, 1 << 30), _323=(4, 1, 1 << 30), _324=(4, 1, 200), _325=(4, 1, 64)),
        bytes(300)),
}


@pytest.mark.timeout(60)  # a second is plenty; without a guard, one of these takes hours
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line_without_time_and_memory(name, folder):
    with open("bad.fits", "wb") as file:
        file.write(HOSTILE[name])
    tracemalloc.start()
    try:
        with pytest.raises(bg.BgError, match="^bad.fits .*; ") as refusal:
            bg.read_picture("bad.fits")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64e6 and "\n" not in str(refusal.value)


def test_letters_beyond_ascii_cost_no_compressed_picture(small, folder):
    path = save_compressed("a.fz", small, "RICE_1", fits.Header([("CCD-TEMP", -10.0, "in X C")]))
    with open(path, "r+b") as file:
        data = file.read().replace(b"in X C", b"in \xb0 C")
        file.seek(0)
        file.write(data)
    assert bg.read_picture(path).source.keywords.comments["CCD-TEMP"] == "in ? C"


def test_a_tiff_tag_larger_than_the_file_costs_no_picture(folder):
    with open("a.tif", "wb") as file:
        file.write(tiff_file(tiff_tags(_270=(2, 0x7FFFFFFF, 0)), bytes(300)))
    assert bg.read_picture("a.tif").planes.shape == (1, 8, 8)


LONG_VALUES = {
    "blanks": lambda length: " " * length, "digits": lambda length: "1" * length + "x",
    "blanks in quotes": lambda length: "'" + " " * length + "x'",
    "quotes": lambda length: "'" * (length + 1), "words": lambda length: "- " * (length // 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind, name", [
    *((kind, "fits") for kind in LONG_VALUES), ("quotes", "tiff"), ("quotes", "xisf")])
def test_no_keyword_takes_long_to_become_one_of_another_format(kind, name, small, folder):
    def there_and_back(size):
        length = 15_000 * size
        value = LONG_VALUES[kind](length)
        names = ("A", "HISTORY", "a b", " " * length + "x", "\u00b5" * length)
        source = xisf_source(*[keyword_element(keyword, value, value) for keyword in names])
        picture = bg.Picture(small / np.float32(65535), source, [])
        again = bg.read_picture(written(name, picture))
        written("xisf", again)

    assert growth(there_and_back) < LINEAR


@pytest.mark.slow
@pytest.mark.parametrize(
    "place", ["OBJECT  = '", "OBJECT  = ", "OBJECT  = 1 /", "CONTINUE  '", "HIERARCH ", ""])
def test_no_blanks_in_a_fits_header_take_long(place, folder):
    def there_and_back(size):
        cards = [place.ljust(79) + end for end in ("x", "&", "'")] * 250 * size
        with open("a.fits", "wb") as file:
            file.write(fits_header(*plain(8, 60, 40), "OBJECT  = 'a&'", *cards, data=2880))
        picture = bg.read_picture("a.fits")
        for name in bg.FORMATS:
            written(name, picture)

    assert growth(there_and_back) < LINEAR


@pytest.mark.slow
@pytest.mark.parametrize("name", bg.FORMATS)
def test_what_is_written_is_never_too_large_to_be_read(name, small, folder, monkeypatch):
    """Headers just under the limits, with HISTORY added again and again."""
    monkeypatch.setattr(bg, "MAX_FITS_CARDS", 2000)
    lines = ["x" * 72] * 150
    cards = [f"KEY{number:5d}= '\"\"'" for number in range(bg.MAX_FITS_CARDS - 500)]
    with open("a.fits", "wb") as file:
        file.write(fits_header(*plain(8, 60, 40), *cards, data=2880))
    profile = (34675, 7, 14_000_000, bytes(14_000_000), True)
    save_tiff("a.tif", small, extratags=[profile], description="x" * 20_000_000)
    xisf = xisf_source(keyword_element("A", "'{}'".format("x" * 50_000), ""))
    for source in (bg.read_picture("a.fits").source, bg.read_picture("a.tif").source, xisf):
        picture = bg.Picture(small / np.float32(65535), source, [])
        for _ in range(2):
            picture = bg.read_picture(written(name, picture, history=lines))


def test_a_tiff_that_does_not_tell_its_compression_has_none(folder):
    tags = [entry for entry in tiff_tags() if entry[0] != 259]
    with open("a.tif", "wb") as file:
        file.write(tiff_file(tags).ljust(200, b"\0") + bytes(range(64)))
    assert (bg.read_picture("a.tif").planes.ravel() * 255).round().tolist() == list(range(64))


@pytest.mark.parametrize("tag", [(283, 5, 0, 0), (283, 5, 2, 8), (274, 3, 7, 8), (296, 3, 5, 8)])
def test_damaged_tags_cost_no_picture(tag, folder):
    number, *entry = tag
    entries = {282: (5, 1, 8), 283: (5, 1, 8), 274: (3, 1, 1), 296: (3, 1, 2), number: tuple(entry)}
    with open("a.tif", "wb") as file:
        tags = tiff_tags(offset=300, **{f"_{code}": values for code, values in entries.items()})
        file.write(tiff_file(tags).ljust(300, b"\0") + bytes(range(64)))
    picture = bg.read_picture("a.tif")
    for name in bg.FORMATS:
        assert bg.read_picture(written(name, picture)).planes.shape == (1, 8, 8)


def test_a_loop_of_tiff_directories_ends(folder):
    with open("loop.tif", "wb") as file:
        file.write(tiff_file(tiff_tags(), bytes(range(64)) * 5, next_ifd=8))
    assert bg.read_picture("loop.tif").planes.shape == (1, 8, 8)


def mutants(data, count, seed):
    random = np.random.default_rng(seed)
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(random.integers(1, 6)):
            near = min(len(data), 6000) if random.random() < 0.8 else len(data)
            changed[random.integers(near)] = random.integers(256)
        if random.random() < 0.3:
            del changed[random.integers(len(data)) :]
        yield bytes(changed)


@pytest.mark.parametrize("kind", ["fits", "fz", "tiff", "lzw"])
def test_mutants_are_read_or_refused(kind, small, folder):
    many = int(os.environ.get("BGOPT_FUZZ", 100))
    if kind in ("fz", "lzw"):  # each starts a process
        many //= 10
    if kind == "fits":
        path = save_fits("a", small, header(), [icc_hdu()])
    elif kind == "fz":
        path = save_compressed("a", small, "GZIP_2")
    else:
        compression = None if kind == "tiff" else "lzw"
        path = save_tiff("a", small, compression=compression, extratags=[ICC_TAG])
    data = open(path, "rb").read()
    for changed in mutants(data, many, seed=len(kind)):
        with open("mutant", "wb") as file:
            file.write(changed)
        try:
            picture = bg.read_picture("mutant")
        except bg.BgError as error:
            assert "\n" not in str(error)
            continue
        for name in bg.FORMATS:
            written(name, picture, history=["a"], unit=picture.unit)


# ------------------------------------------------------------------------------------ descriptions

PLAIN = "taken in the garden"
DESCRIPTIONS = {  # of a TIFF, and the comments that become of it
    "tifffile": ('{"shape": [40, 60, 3]}', []),
    "tifffile with more": (
        '{"shape": [40, 60, 3], "exposure": 30}', ['{"shape": [40, 60, 3], "exposure": 30}']),
    "OME": ('<?xml version="1.0"?><OME xmlns="x"><Image/></OME>',
            ['<?xml version="1.0"?><OME xmlns="x"><Image/></OME>']),
    "ImageJ": ("ImageJ=1.53\nimages=3\nchannels=3", ["ImageJ=1.53", "images=3", "channels=3"]),
    "ScanImage": ("state.configPath=1", ["state.configPath=1"]),
    "words": (PLAIN, [PLAIN]),
    "none": ("", []),
}


def read_by_others(name, path, planes):
    """Read an output as its users' libraries do."""
    if name == "tiff":
        found = np.moveaxis(tifffile.imread(path), -1, 0)
    elif name == "fits":
        with fits.open(path) as hdus:
            found = np.flip([hdu for hdu in hdus if hdu.data is not None][0].data, -2)
    else:
        found = XISF(path).read_image(0, "channels_first")
    assert np.array_equal(found, planes)


@pytest.mark.parametrize("kind", DESCRIPTIONS)
def test_every_output_is_read_by_the_libraries_whatever_a_tiff_says(kind, small, folder):
    description, comments = DESCRIPTIONS[kind]
    save_tiff("a.tif", small, description=description)
    picture = bg.read_picture("a.tif")
    assert not picture.warnings
    for name in bg.FORMATS:
        for compress in (False, True):
            path = written(name, picture, history=["bgoptimizer: a line"], compress=compress)
            read_by_others(name, path, picture.planes)
    with tifffile.TiffFile(written("tiff", picture, history=["a line"])) as tiff:
        found = fits.Header.fromstring(tiff.pages[0].description, sep="\n")
    assert list(found.get("COMMENT", [])) == comments and list(found["HISTORY"]) == ["a line"]


@pytest.mark.parametrize("name", bg.FORMATS)
def test_the_keywords_of_an_astro_tiff_reach_all_formats(name, small, folder):
    cards = header()
    text = "\n".join(cards.tostring(sep="\n", endcard=True, padding=False).split("\n"))
    save_tiff("a.tif", small, description="SIMPLE  = T\nBITPIX  = 16\nNAXIS   = 3\n" + text)
    written(name, bg.read_picture("a.tif"))
    back = fits.getheader(written("fits", bg.read_picture("again" + bg.FORMATS[name].ending)))
    for keyword in ("SERIAL", "EXPTIME", "LONGTEXT", "CRVAL1", "CRPIX2", "HIERARCH ESO DET CHIP"):
        assert back[keyword] == cards[keyword]
    assert list(back["HISTORY"]) == ["stacked", "cropped"]


@pytest.mark.parametrize("name", ["fits", "tiff"])
def test_long_texts_are_whole_wherever_their_cards_end(name, small, folder):
    texts = {f"TEXT{k}": "a" * k + "'" * 40 + "b" * k + " & 'c' &" for k in range(50, 72)}
    texts["HIERARCH SITE OF THE TELESCOPE"] = "it's " * 30 + "there"
    keywords = fits.Header()
    for keyword, text in texts.items():
        keywords[keyword] = (text, "which is long " * 9 + keyword)
    picture = bg.Picture(small / np.float32(65535), bg.FitsSource(keywords), [])
    for _ in range(2):
        picture = bg.read_picture(written(name, picture))
    cards = fits.getheader(written("fits", picture))
    for keyword, text in texts.items():
        assert cards[keyword] == text
        assert cards.comments[keyword] == keywords.comments[keyword]


@pytest.mark.parametrize("name, value, words", [
    ("A" * 66, "12345", ["A" * 66, "=", "12345"]),
    ("A" * 75, "'x'", ["A" * 72, "AAA", "=", "'x'"]),
    ("LONG NAME", "1." + "2" * 70, ["LONG NAME =", "1.2222"]),
    ("A=B", "'x'", ["A=B", "=", "'x'"])])
def test_what_no_card_can_hold_becomes_a_comment(name, value, words, small, folder):
    source = xisf_source(keyword_element(name, value, ""), keyword_element("OBJECT", "'M 31'", ""))
    path = written("fits", bg.Picture(small / np.float32(65535), source, []))
    cards = fits.getheader(path)
    comment = " ".join(cards.get("COMMENT", [])) + cards.tostring()
    assert all(word in comment for word in words)
    assert cards["OBJECT"] == "M 31"


# ------------------------------------------------------------------------------------ damaged files


@pytest.mark.parametrize("tag, value", [
    ("PlanarConfiguration", b"\2\0"), ("PlanarConfiguration", b"\0\0"),
    ("PlanarConfiguration", b"\3\0"), ("StripOffsets", bytes(4)), ("StripByteCounts", bytes(4))])
def test_a_tiff_with_other_chunks_than_it_needs_is_refused(tag, value, small, folder):
    path = save_tiff("a.tif", small, rowsperstrip=11, compression="lzw")
    with tifffile.TiffFile(path) as tiff:
        place = tiff.pages[0].tags[tag].valueoffset
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(value)
    with pytest.raises(bg.BgError, match="strips or tiles"):
        bg.read_picture(path)


CRASHES = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)"
HANGS = "while True: pass"


@pytest.mark.skipif(os.name == "nt", reason="signals differ")
@pytest.mark.parametrize("program", [CRASHES, HANGS, "raise SystemExit(0)", "print('few')"])
@pytest.mark.parametrize("kind", ["lzw", "fz"])
def test_a_decoder_that_crashes_or_hangs_costs_only_its_picture(
        kind, program, small, folder, monkeypatch):
    if kind == "lzw":
        path = save_tiff("a.tif", small, compression="lzw")
    else:
        path = save_compressed("a.fz", small, "RICE_1")
    monkeypatch.setattr(bg, "DECODER", program)
    monkeypatch.setattr(bg, "DECODING_SECONDS", 1)
    with pytest.raises(bg.BgError, match="damaged|cut short"):
        bg.read_picture(path)


def test_a_decoder_imports_nothing_from_where_the_pictures_are(small, folder):
    save_tiff("a.tif", small, compression="lzw")
    (folder / "numpy.py").write_text("raise SystemExit")
    assert bg.read_picture("a.tif").planes.shape == small.shape


@pytest.mark.parametrize("kind", ["fits", "tiff", "lzw", "fz"])
def test_a_file_that_is_cut_while_it_is_read_is_refused(kind, folder, monkeypatch):
    planes = np.random.default_rng(0).integers(0, 60000, (3, 500, 700)).astype(np.uint16)
    if kind == "fits":
        path = save_fits("a.fits", planes)
    elif kind == "fz":
        path = save_compressed("a.fz", planes, "RICE_1")
    else:
        path = save_tiff("a.tif", planes, compression="lzw" if kind == "lzw" else None)
    monkeypatch.setattr(bg, "_samples", cut_before(path, bg._samples))
    with pytest.raises(bg.BgError, match="cut short|damaged"):
        bg.read_picture(path)


def cut_before(path, function):
    def cut(*arguments, **options):
        os.truncate(path, os.path.getsize(path) // 2)
        return function(*arguments, **options)

    return cut


def zstd_bomb():
    stream = zstandard.ZstdCompressor().compress(bytes(1 << 30))
    size = (4, 1, len(stream))
    tags = tiff_tags(1 << 15, 1 << 15, 300, _259=(3, 1, 50000), _279=size)
    return tiff_file(tags).ljust(300, b"\0") + stream


def lying_zstd():
    stream = zstandard.ZstdCompressor().compress(bytes(1 << 30))
    tags = tiff_tags(8000, 8000, 300, _259=(3, 1, 50000), _279=(4, 1, len(stream)))
    return tiff_file(tags).ljust(300, b"\0") + stream


def gzip_bomb():
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    stream = packer.compress(bytes(400 << 20)) + packer.flush()
    cards = "ZNAXIS1 = 700", "ZNAXIS2 = 700", "ZTILE2  = 700", "NAXIS2  = 1"
    start = struct.pack(">ii", len(stream), 0) + stream
    data = -(-len(start) // 2880) * 2880
    return fz_file(*cards, f"PCOUNT  = {len(stream)}", data=data, start=start)


GREEDY = {
    "FITS with a gzip bomb": (gzip_bomb, "decompressed"),
    "TIFF with a zstd bomb": (zstd_bomb, "claims more"),
    "TIFF with a zstd stream that lies": (lying_zstd, "damaged"),
    "FITS with an HCOMPRESS bomb": (
        lambda: fz_file(
            "ZCMPTYPE= 'HCOMPRESS_1'", "ZNAXIS1 = 20000", "ZNAXIS2 = 20000", "NAXIS2  = 20000",
            "PCOUNT  = 800000", data=962560), "claims more"),
    "FITS in PLIO": (lambda: fz_file("ZCMPTYPE= 'PLIO_1'"), "PLIO_1"),
    "FITS with ZDITHER0 -64": (lambda: fz_file("ZDITHER0= -64"), "ZDITHER0"),
    "FITS with 20000 HDUs": (
        lambda: fits_header(*plain(8)) + 20000 * fits_header("XTENSION= 'IMAGE'", *plain(8)[1:]),
        "too many parts"),
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures as Linux does")
@pytest.mark.parametrize("name", GREEDY)
def test_no_small_file_takes_minutes_or_gigabytes(name, folder):
    make, says = GREEDY[name]
    with open("bad", "wb") as file:
        file.write(make())
    program = """
import re, resource, bgoptimizer as bg
try:
    bg.read_picture("bad")
except bg.BgError as error:
    print(error)
with open("/proc/self/status") as file:  # getrusage reports the process it was forked from, too
    print(int(re.search(r"VmHWM:\\s*(\\d+)", file.read())[1]) >> 10)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10)
"""
    *said, own, child = python(program, cwd=folder).stdout.splitlines()
    assert says in said[0]
    assert int(own) < 400 and int(child) < 400  # MB, of which half are libraries


@pytest.mark.slow
@pytest.mark.parametrize("name", bg.FORMATS)
@pytest.mark.parametrize("compress", [False, True])
def test_writing_takes_twice_as_long_for_twice_the_keywords(name, compress, small, folder):
    def there_and_back(size):
        cards = [f"KEY{number % 1000:05d}= {number}" for number in range(2500 * size)]
        with open("a.fits", "wb") as file:
            file.write(fits_header(*plain(8, 60, 40), *cards, data=2880))
        again = bg.read_picture(written(name, bg.read_picture("a.fits"), compress=compress))
        assert again.planes.shape == (1, 40, 60)

    assert growth(there_and_back) < LINEAR


# ------------------------------------------------------------------------------------ keywords


@pytest.mark.parametrize("first", bg.FORMATS)
@pytest.mark.parametrize("second", bg.FORMATS)
def test_keywords_in_the_unit_of_the_samples_stay_true(first, second, small, folder):
    cards = fits.Header()
    cards["BUNIT"], cards["SATURATE"], cards["CBLACK"] = "ADU", 60000, 655.35
    cards["DATAMIN"], cards["DATAMAX"], cards["PEDESTAL"] = 0, 65535, 100
    save_fits("a.fits", small, cards)
    if first == "tiff":
        text = cards.tostring(sep="\n", endcard=False, padding=False)
        path = save_tiff("a.tif", small, description=text)
    elif first == "xisf":
        elements = [keyword_element(card.keyword, repr(card.value), "") for card in cards.cards]
        path = "a.xisf"
        Path(path).write_bytes(one_image(small, children="".join(elements)))
    else:
        path = "a.fits"
    picture = bg.read_picture(path)
    assert picture.warnings == []
    again = bg.read_picture(written(second, picture))
    found = fits.getheader(written("fits", again))
    assert found["BUNIT"] == "65535 ADU"
    assert found["SATURATE"] == pytest.approx(60000 / 65535)
    assert found["CBLACK"] == pytest.approx(0.01)
    assert found["DATAMIN"] == pytest.approx(picture.planes.min())
    assert found["DATAMAX"] == pytest.approx(picture.planes.max())
    assert found["PEDESTAL"] == 100


def test_the_range_in_the_keywords_is_that_of_each_output(small, folder):
    cards = fits.Header()
    cards["DATAMIN"], cards["DATAMAX"], cards["BUNIT"] = 1.0, 2.0, "electron"
    picture = bg.read_picture(save_fits("a.fits", small.astype(np.float32), cards))
    half = picture.planes / 2
    for compress in (False, True):
        path = written("fits", picture, planes=half, unit=picture.unit, compress=compress)
        found = fits.getheader(path, int(compress))
        assert found["DATAMAX"] == pytest.approx(small.max() / 2) and found["DATAMIN"] == 0
        assert found["BUNIT"] == "electron"
    again = bg.read_picture(written("xisf", picture, unit=picture.unit))
    found = fits.getheader(written("fits", again))
    scale = picture.unit.scale
    assert found["DATAMAX"] == pytest.approx(small.max() / scale)
    assert found["BUNIT"] == f"{scale:g} electron"


@pytest.mark.parametrize("mark", [-9999.0, -32768.0, -99999.0])
@pytest.mark.parametrize("top", [1.0, 60000.0])
def test_a_value_that_marks_what_is_missing_is_left_out_told_and_kept(mark, top, small, folder):
    values = (small / 65535 * top).astype(np.float32)
    values[values == 0] = 0.1 * top
    values[:, 10:15, 20:30] = mark
    picture = bg.read_picture(save_fits("a.fits", values))
    assert np.isnan(picture.planes[:, 10:15, 20:30]).all()
    assert np.isfinite(picture.planes).sum() == values.size - 150
    assert picture.warnings == [f"has 150 samples of {mark:g}, which are taken for missing"]
    back = upright(written("fits", picture, unit=picture.unit))
    np.testing.assert_allclose(back, values, rtol=1e-6)
    assert (back[:, 10:15, 20:30] == mark).all()


def test_a_dark_sky_with_noise_below_zero_has_no_such_value(folder):
    for deviation in (0.4, 20, 4000):
        noise = np.random.default_rng(1).normal(0, deviation, (40, 60)).round()
        path = save_fits("a.fits", noise.astype(np.float32))
        assert bg.read_picture(path).warnings == []


@pytest.mark.parametrize("value", ["Dark Frame", "MasterBias", "flat", "OFFSET", "Master Flat"])
@pytest.mark.parametrize("name", bg.FORMATS)
def test_a_frame_without_sky_is_told(name, value, small, folder):
    cards = fits.Header()
    cards["IMAGETYP"] = value
    picture = bg.read_picture(save_fits("a.fits", small, cards))
    again = bg.read_picture(written(name, picture))
    for shot in (picture, again):
        assert any("no light frame" in text for text in shot.warnings)
    cards["IMAGETYP"] = "Light Frame"
    assert bg.read_picture(save_fits("a.fits", small, cards)).warnings == []


@pytest.mark.parametrize("name", ["fits", "tiff"])
def test_negative_samples_are_kept_where_no_bounds_forbid_them(name, small, folder):
    values = small / np.float32(65535) - np.float32(0.2)
    path = save_fits("a.fits", values) if name == "fits" else save_tiff("a.tif", values)
    picture = bg.read_picture(path)
    assert picture.warnings == []
    back = bg.read_picture(written(name, picture, unit=picture.unit))
    np.testing.assert_allclose(back.planes * back.unit.scale + back.unit.offset, values, atol=2e-7)
    with open("a.xisf", "wb") as file:
        file.write(one_image(values))
    below = (values < 0).sum()
    assert f"has {below} samples below" in bg.read_picture("a.xisf").warnings[0]


# ------------------------------------------------------------------------------------ which way is up


def letter():
    """An L in a frame that is not square: its foot is down, at the left."""
    picture = np.full((30, 50), 0.25, np.float32)
    picture[4:20, 6:9] = 1
    picture[17:20, 6:16] = 1
    return picture


def shown(path):
    """A picture as viewers show it, by the convention of its format, top row first."""
    if path.endswith(".fits"):
        with fits.open(path) as hdus:
            hdu = [hdu for hdu in hdus if hdu.data is not None][0]
            top_down = hdu.header.get("ROWORDER", "BOTTOM-UP") == "TOP-DOWN"
            return hdu.data if top_down else hdu.data[::-1]
    return tifffile.imread(path) if path.endswith(".tif") else XISF(path).read_image(0)[..., 0]


def save_letter(name, order=None):
    if name == "fits":
        cards = fits.Header()
        if order:
            cards["ROWORDER"] = order
        return save_fits("a.fits", letter(), cards)
    if name == "tiff":
        tifffile.imwrite("a.tif", letter())
        return "a.tif"
    with open("a.xisf", "wb") as file:
        file.write(one_image(letter()[None]))
    return "a.xisf"


@pytest.mark.parametrize("second", bg.FORMATS)
@pytest.mark.parametrize("first", [
    ("fits", None), ("fits", "BOTTOM-UP"), ("fits", "TOP-DOWN"), ("tiff", None), ("xisf", None)])
def test_every_pair_of_formats_shows_the_same_way_up(first, second, folder):
    picture = bg.read_picture(save_letter(*first))
    assert np.array_equal(picture.planes[0], letter())
    for compress in (False, True):
        if compress and second == "xisf":
            continue
        assert np.array_equal(shown(written(second, picture, compress=compress)), letter())


@pytest.mark.parametrize("order", [None, "BOTTOM-UP", "TOP-DOWN"])
def test_a_fits_keeps_the_order_of_its_rows(order, folder):
    path = save_letter("fits", order)
    again = written("fits", bg.read_picture(path))
    assert fits.getheader(again).get("ROWORDER") == order
    assert np.array_equal(fits.getdata(again), fits.getdata(path))


@pytest.mark.parametrize("order", ["BOTTOM-UP", "TOP-DOWN"])
@pytest.mark.parametrize("second", bg.FORMATS)
@pytest.mark.parametrize("matrix", ["CD", "PC", "CDELT"])
def test_a_star_keeps_its_place_in_the_sky(order, second, matrix, small, folder):
    cards = header()
    cards["ROWORDER"] = order
    if matrix != "CD":
        for name in ("CD1_1", "CD1_2", "CD2_1", "CD2_2"):
            value = cards.pop(name)
            if matrix == "PC":
                cards[name.replace("CD", "PC")] = value * 1000
        cards["CDELT1"], cards["CDELT2"] = (-0.00031, 0.00031) if matrix == "CDELT" else (1e-3, 1e-3)
    path = save_fits("a.fits", small, cards)
    picture = bg.read_picture(path)
    written(second, picture)
    again = written("fits", bg.read_picture("again" + bg.FORMATS[second].ending))
    sky = []
    for name in (path, again):
        found = fits.getheader(name)
        for x, row in ((0, 0), (59, 39), (7, 30)):  # from the top
            y = row if found["ROWORDER"] == "TOP-DOWN" else 39 - row
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                sky.append(WCS(found, naxis=2).all_pix2world([[x, y]], 0)[0])
    np.testing.assert_allclose(sky[3:], sky[:3], atol=1e-9)


def test_a_saved_mask_has_the_order_of_rows_of_its_picture(folder):
    picture = bg.read_picture(save_letter("fits", "TOP-DOWN"))
    mask = bg.Picture(picture.planes, bg.source_of_mask(picture.source), [])
    path = written("fits", mask)
    assert fits.getheader(path)["ROWORDER"] == "TOP-DOWN"
    assert np.array_equal(fits.getdata(path), letter())


# ------------------------------------------------------------------------------------ what people bring


def sub_ifd_raw(make=b"NIKON CORPORATION\0"):
    """A raw file as cameras write it: a preview, and the sensor's data below it."""
    preview = tiff_tags(8, 8, 400, _254=(4, 1, 1), _271=(2, len(make), 500), _330=(4, 1, 600))
    sensor = tiff_tags(8, 8, 400, _254=(4, 1, 0), _262=(3, 1, 32803))
    data = tiff_file(preview).ljust(500, b"\0") + make
    packed = b"".join(struct.pack("<HHII", *entry) for entry in sensor)
    return data.ljust(600, b"\0") + struct.pack("<H", len(sensor)) + packed + bytes(100)


RAW = {
    "NEF": (sub_ifd_raw(), "of NIKON CORPORATION"),
    "DNG": (tiff_file(tiff_tags(_50706=(1, 4, 1)), bytes(300)), "such as DNG"),
    "CR2": (b"II*\0\x10\0\0\0CR\2\0" + bytes(300), "Canon CR2"),
    "CR3": (b"\0\0\0\x18ftypcrx \0\0\0\1" + bytes(300), "Canon CR3"),
    "RAF": (b"FUJIFILMCCD-RAW 0201FF" + bytes(300), "Fujifilm RAF"),
    "RW2": (b"IIU\0\x18\0\0\0" + bytes(300), "Panasonic RW2"),
    "ORF": (b"IIRO\x08\0\0\0" + bytes(300), "Olympus ORF"),
}


@pytest.mark.parametrize("kind", RAW)
def test_a_cameras_raw_file_is_named_as_one(kind, folder, capsys):
    data, says = RAW[kind]
    with open("a.raw", "wb") as file:
        file.write(data)
    assert run("a.raw", "-p", "--figures", "none") == 1
    said = refused(capsys)
    assert "camera's raw file" in said and says in said and "stack it first" in said


def test_a_thumbnail_is_not_taken_for_the_picture(small, folder):
    with tifffile.TiffWriter("a.tif") as writer:
        thumbnail = np.zeros((4, 6, 3), "u1")
        writer.write(thumbnail, photometric="rgb", metadata=None, subfiletype=1)
        writer.write(np.moveaxis(small, 0, -1), photometric="rgb", metadata=None)
    picture = bg.read_picture("a.tif")
    assert picture.planes.shape == small.shape and picture.warnings == []


@pytest.mark.parametrize("name, kind", [
    ("a.jpg", "JPEG"), ("a.png", "PNG"), ("a.bmp", "BMP"), ("a.gif", "GIF"), ("a.webp", "WebP")])
def test_a_picture_for_screens_is_said_not_to_be_linear(name, kind, folder):
    Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(name)
    with pytest.raises(bg.BgError, match=f"{kind} picture, .*no longer linear; give the linear"):
        bg.read_picture(name)


@pytest.mark.parametrize("name", ["m31.fits.gz", "m31.fit.gz", "m31.fts.gz"])
def test_a_fits_in_gzip_is_read_and_its_name_is_known(name, small, folder):
    save_fits("a.fits", small)
    with open("a.fits", "rb") as plain_file, gzip.open(name, "wb") as file:
        file.write(plain_file.read())
    assert bg.picture_stem(name) == "m31" and bg.PICTURE_ENDINGS.search(name)
    assert bg.picture_format(name) == "fits"
    assert np.array_equal(bg.read_picture(name).planes, bg.read_picture("a.fits").planes)
    os.truncate(name, os.path.getsize(name) // 2)
    with pytest.raises(bg.BgError, match="cut short"):
        bg.read_picture(name)


@pytest.mark.parametrize("compression", [None, "lzw"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_gray_tiff_in_which_white_is_0_is_read(dtype, compression, small, folder):
    samples = (small[0] >> (8 if dtype is np.uint8 else 0)).astype(dtype)
    tifffile.imwrite("a.tif", ~samples, photometric="miniswhite", compression=compression)
    tifffile.imwrite("b.tif", samples, photometric="minisblack")
    assert np.array_equal(bg.read_picture("a.tif").planes, bg.read_picture("b.tif").planes)


def pillow_masks():
    """Masks in all ways that Pillow saves them, by name."""
    white = letter() == 1
    gray = Image.fromarray((white * 255).astype(np.uint8))
    rgb = Image.merge("RGB", [gray] * 3)
    return {
        "gray.png": gray, "bits.png": gray.convert("1"), "palette.png": gray.convert("P"),
        "rgb.png": rgb, "rgba.png": rgb.convert("RGBA"), "la.png": gray.convert("LA"),
        "deep.png": Image.fromarray(white.astype(np.uint16) * 65535),
        "bits.tif": gray.convert("1"), "palette.tif": gray.convert("P"), "rgb.tif": rgb,
        "rgba.tif": rgb.convert("RGBA"), "mask.bmp": gray, "mask.gif": gray,
    }


MASKS = {  # name: samples where the mask is 1, for it is 0 elsewhere
    "ones.fits": np.uint8(1), "floats.fits": np.float32(255), "full.tif": np.uint16(65535),
    "ones.tif": np.uint16(1),
}


@pytest.mark.parametrize("name", [*pillow_masks(), *MASKS])
def test_masks_as_people_have_them(name, folder):
    white = letter() == 1
    if name not in MASKS:
        pillow_masks()[name].save(name)
    elif name.endswith("fits"):
        save_fits(name, white * MASKS[name])
    else:
        tifffile.imwrite(name, white * MASKS[name])
    mask = bg.read_mask(name)
    assert mask.planes.shape == (1, 30, 50) and mask.planes.dtype == np.float32
    assert np.array_equal(mask.planes[0], white)
    assert bool(mask.warnings) == (name in ("rgba.png", "la.png", "rgba.tif"))


def test_what_no_mask_can_be_is_refused(folder):
    for name, data in (("a.png", b"\x89PNG\r\n\x1a\n" + bytes(50)), ("a.txt", b"text")):
        with open(name, "wb") as file:
            file.write(data)
        with pytest.raises(bg.BgError, match=name):
            bg.read_mask(name)


# ------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize("name, stem", [
    ("m31.fits.fz", "m31"), ("m31.fit.fits", "m31"), ("m31.FIT", "m31"), ("m31.tiff", "m31"),
    ("a/b.c.xisf", "b.c"), ("m31.dat", "m31"), (".fits", ".fits"), ("fits", "fits")])
def test_names_of_outputs(name, stem):
    assert bg.picture_stem(name) == stem


@pytest.mark.slow
@pytest.mark.parametrize("source, wanted, ending", [
    ("fits", None, ".fits"), ("tiff", None, ".tif"), ("xisf", "fits", ".fits"),
    ("fits", "tiff", ".tif"), ("tiff", "xisf", ".xisf")])
def test_the_command_writes_the_format_of_the_input_or_another(
        source, wanted, ending, small, folder):
    first = bg.read_picture(save_fits("first.fits", small))
    os.rename(written(source, first), "sky" + bg.FORMATS[source].ending)
    original = open("sky" + bg.FORMATS[source].ending, "rb").read()
    more = ["--format", wanted] if wanted else []
    assert run("sky" + bg.FORMATS[source].ending, "out", *FEW, "--save-mask", *more) == 0
    names = sorted(f"sky_{kind}{ending}" for kind in ("bgModel", "bgSubtracted", "mask"))
    assert sorted(os.listdir("out")) == names
    model, subtracted, mask = (bg.read_picture("out/" + name).planes for name in names)
    constant = model + subtracted - first.planes
    kept = (subtracted > 0) & (subtracted < 1) & (first.planes > 0)
    for channel in range(3):
        assert np.ptp(constant[channel][kept[channel]]) < 2e-5
    assert subtracted[1, 3, 4] == 0 and mask.max() == 1
    assert open("sky" + bg.FORMATS[source].ending, "rb").read() == original
    assert (run("sky" + bg.FORMATS[source].ending, "out2", *FEW, "-m", "out/" + names[2]) == 0)


FAULTS = REAL.parent / "faults"
SAMPLES = {  # of FAULTS, and why they are refused; None: they are good
    "lzw_damaged.tif": "cannot be read or decompressed",
    "planar_2_of_contiguous.tif": "strips or tiles", "zdither0_negative.fits.fz": "ZDITHER0",
    "t_f4_3_con_lzw_3_strip_le.tif": None, "t_u2_3_con_lzw_2_tile_le.tif": None,
}


@pytest.mark.slow
def test_damaged_pictures_in_a_folder_cost_no_good_ones(small, folder, capsys):
    os.mkdir("lights")
    for name in HOSTILE:
        Path("lights", name.replace(" ", "_") + ".fits").write_bytes(HOSTILE[name])
    samples = SAMPLES if FAULTS.is_dir() else {}
    for name in samples:
        shutil.copyfile(FAULTS / name, Path("lights") / name)
    save_fits("lights/a.fits", small)
    save_tiff("lights/m.tif", small, compression="lzw")
    save_compressed("lights/z.fits.fz", small, "RICE_1")
    assert run("lights", "out", *FEW) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "failed: " in line]
    refusals = {name: says for name, says in samples.items() if says}
    assert len(said) == len(HOSTILE) + len(refusals), said
    for name, says in refusals.items():
        assert any(name in line and says in line for line in said)
    done = {re.sub("_bg.*", "", name) for name in os.listdir("out")}
    good = {bg.picture_stem(name) for name in samples if name not in refusals}
    assert done == {*good, "a", "m", "z", "bgoptimizer_report.csv"}


@pytest.mark.slow
def test_negatives_of_a_photometrist_are_kept_by_the_command(small, folder):
    values = np.where(small == 0, 0, small.astype(np.float32) - np.float32(small[0].mean()))
    save_fits("sky.fits", values)
    assert run("sky.fits", "out", *FEW) == 0
    model, subtracted = map(upright, ("out/sky_bgModel.fits", "out/sky_bgSubtracted.fits"))
    assert subtracted.min() < 0 and subtracted[1, 3, 4] == 0
    history = fits.getheader("out/sky_bgSubtracted.fits")["HISTORY"]
    lines = [line for line in history if "offset of" in line]
    for channel, line in enumerate(lines):
        offset = float(line.split("=")[1])
        left = model[channel] + subtracted[channel] - values[channel] - offset
        assert np.abs(left[values[channel] != 0]).max() < 0.1


# ------------------------------------------------------------------------------------ division


def test_division_takes_vignetting_out():
    y, x = np.indices((96, 144))
    falloff = 1 - 0.4 * (np.hypot(y - 48, x - 72) / 87) ** 2
    noise = np.random.default_rng(3).normal(0, 0.0005, (96, 144, 1))
    image = ((0.2 + noise) * falloff[..., None]).astype(np.float32)
    image[5, 6] = 0
    result = bg.optimize(image, quick(correction="divide", epochs=100))
    flat = result.subtracted[image[..., 0] > 0]
    assert flat.std() / flat.mean() < 0.02 < 0.1 < image.std() / image.mean()
    assert result.subtracted[5, 6] == 0
    expected = image / result.model * np.median(result.model)
    np.testing.assert_allclose(result.subtracted, expected, rtol=5e-3)


def test_division_by_nothing_is_refused():
    image = sloping_sky(64, 96)[0]
    with pytest.raises(bg.BgError, match="--correction subtract"):
        bg.optimize(image * 1000 - 1000 * image.mean(), quick(correction="divide", epochs=5))
    with pytest.raises(ValueError, match="--correction"):
        bg.Settings(correction="add")


@pytest.mark.slow
def test_the_command_divides(small, folder):
    save_fits("sky.fits", small)
    assert run("sky.fits", "out", *FEW, "--correction", "divide") == 0
    assert sorted(os.listdir("out")) == ["sky_bgDivided.fits", "sky_bgModel.fits"]
    model = bg.read_picture("out/sky_bgModel.fits").planes
    divided = bg.read_picture("out/sky_bgDivided.fits").planes
    truth = small[0] / 65535 / model[0] * np.median(model[0])
    np.testing.assert_allclose(divided[0], truth, rtol=0.02)
    history = str(fits.getheader("out/sky_bgDivided.fits")["HISTORY"])
    assert "correction = divide" in history and "model's median of channel 0" in history
