"""A file for each row of what real and hostile XISF files hold, assembled from the specification.

`rows()` gives them with what must come of them. Nothing here uses the `xisf` package or the tool's
own reader and writer: only struct, bytes, and the bare codecs.
"""
import base64
import hashlib
import itertools
import struct
import zlib
from typing import NamedTuple, Optional
from xml.etree import ElementTree

import lz4.block
import numpy as np
import zstandard

DECLARATION = '<?xml version="1.0" encoding="UTF-8"?>'
ROOT = (
    '<xisf version="1.0" xmlns="http://www.pixinsight.com/xisf" '
    'xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" '
    'xsi:schemaLocation="http://www.pixinsight.com/xisf '
    'http://pixinsight.com/xisf/xisf-1.0.xsd">')
METADATA = (
    '<Metadata>'
    '<Property id="XISF:CreationTime" type="String">2019-09-15T20:24:28Z</Property>'
    '<Property id="XISF:CreatorApplication" type="String">by hand</Property>'
    '</Metadata>')
POSITION = 8192  # where the pixels are attached, unless a row says otherwise
KINDS = {
    "UInt8": "u1", "UInt16": "u2", "UInt32": "u4", "UInt64": "u8", "Float32": "f4", "Float64": "f8",
}


# ------------------------------------------------------------------------------------ assembling

def monolithic(xml, block=b"", position=POSITION, length=None):
    """Signature, length of the header, header, zeros up to `position`, block."""
    if isinstance(xml, str):
        xml = xml.encode("utf-8")
    if length is None:
        length = len(xml)
    start = b"XISF0100" + struct.pack("<I", length) + bytes(4) + xml
    if not block:
        return start
    gap = bytes(position - len(start))
    return start + gap + block


def header_of(file):
    """The XML of a file, as bytes."""
    (length,) = struct.unpack("<I", file[8:12])
    return file[16:16 + length]


def tag(name, attributes, content=""):
    """An element; attributes that are None are left out."""
    text = ""
    for key, value in attributes.items():
        if value is not None:
            text += ' {}="{}"'.format(key, value)
    return "<{}{}>{}</{}>".format(name, text, content, name)


def keyword_element(name, value, comment):
    element = ElementTree.Element("FITSKeyword", name=name, value=value, comment=comment)
    return ElementTree.tostring(element, encoding="unicode")


def unit(samples, full):
    """Integer samples in [0, 1]."""
    return (samples / float(full)).astype(np.float32)


def picture(kind="UInt16", channels=1, width=13, height=7):
    """A slope with some noise: its samples of the kind, (c, h, w), and what they mean in [0, 1]."""
    rng = np.random.RandomState(7)
    y, x = np.mgrid[0:height, 0:width]
    slope = 0.2 + 0.3 * x / width + 0.1 * y / height
    slopes = np.stack([slope + 0.05 * channel for channel in range(channels)])
    truth = slopes + 0.02 * rng.rand(*slopes.shape)
    dtype = np.dtype(KINDS[kind])
    if dtype.kind == "f":
        samples = truth.astype(dtype)
        return samples, samples
    full = 2 ** (8 * dtype.itemsize) - 1
    samples = np.floor(truth * float(full)).astype(dtype)
    return samples, unit(samples, full)


def shuffled(data, item):
    """Byte 0 of every item, then byte 1 of every item, ...; then what is less than an item."""
    end = len(data) // item * item
    columns = [data[byte:end:item] for byte in range(item)]
    return b"".join(columns) + data[end:]


def packed(codec, data):
    if codec == "zlib":
        return zlib.compress(data)
    if codec == "zstd":
        return zstandard.ZstdCompressor().compress(data)
    mode = "high_compression" if codec == "lz4hc" else "default"
    return lz4.block.compress(data, mode=mode, store_size=False)


def one_image(samples=None, children="", block=None, xml=None, declaration=DECLARATION, root=ROOT,
              end="</xisf>", metadata=METADATA, outside="", order="<", normal=False, length=None,
              position=POSITION, **attributes):
    """A file with one image.

    Keyword arguments beyond the named ones replace attributes of Image; None leaves them out.
    """
    if samples is None:
        samples = SAMPLES
    channels, height, width = samples.shape
    kinds = {dtype: kind for kind, dtype in KINDS.items()}
    kind = kinds[samples.dtype.str[1:]]
    if block is None:
        stored = np.moveaxis(samples, 0, 2) if normal else samples
        block = stored.astype(samples.dtype.newbyteorder(order)).tobytes()
    all_attributes = {
        "geometry": "{}:{}:{}".format(width, height, channels), "sampleFormat": kind,
        "bounds": "0:1" if kind.startswith("Float") else None,
        "colorSpace": "RGB" if channels == 3 else "Gray",
        "pixelStorage": "Normal" if normal else None, "byteOrder": "big" if order == ">" else None,
        "location": "attachment:{}:{}".format(position, len(block)),
    }
    all_attributes.update(attributes)
    image = tag("Image", all_attributes, children)
    if xml is None:
        xml = declaration + root + image + outside + metadata + end
    return monolithic(xml, block, position, length)


SAMPLES, TRUTH = picture()
RGB, RGB_TRUTH = picture(channels=3)
FLOATS, FLOAT_TRUTH = picture("Float32", 3)
DATA = SAMPLES.tobytes()
SIZE = len(DATA)  # bytes


# ------------------------------------------------------------------------------------ rows

class Row(NamedTuple):
    name: str
    data: bytes
    planes: Optional[np.ndarray] = None  # (c, h, w) in [0, 1], which must come out; None: a refusal
    says: str = ""  # regular expression for the refusal, or for a warning


def good(name, samples=None, planes=TRUTH, says="", **changes):
    """One image that must be read, and no warning or the one that `says`."""
    return Row(name, one_image(samples, **changes), planes, says)


def bad(name, says, samples=None, **changes):
    """One image that must be refused."""
    return Row(name, one_image(samples, **changes), None, says)


def rows():
    """All rows."""
    return itertools.chain(
        format_rows(), bounds_rows(), value_rows(), channel_rows(), embedded_rows(),
        location_rows(), codec_rows(), longer_stream_rows(), packing_rows(), bomb_rows(),
        checksum_rows(), attribute_rows(), header_rows(), cut_rows(), header_bomb_rows(),
        keyword_rows(), property_rows())


def format_rows():
    orders = (("little", "<"), ("big", ">"))
    for kind, channels in itertools.product(KINDS, (1, 3)):
        samples, truth = picture(kind, channels)
        for (order_name, order), normal in itertools.product(orders, (False, True)):
            name = "{}-{}-{}".format(kind, channels, order_name)
            if normal:
                name += "-normal"
            yield good(name, samples, truth, order=order, normal=normal)
    yield good("case-folded", RGB, RGB_TRUTH,
               colorSpace="rgb", sampleFormat="uint16", pixelStorage="planar")
    yield good("white-space", geometry=" 13 : 7 :1 ", sampleFormat=" UInt16\n",
               location=" attachment : {} : {} ".format(POSITION, SIZE))
    yield good("hexadecimal", geometry="0xd:7:1", location="attachment:0x2000:%d" % SIZE)
    yield good("block-unaligned", position=7777)
    yield Row("bytes-after-the-last-block", one_image() + b"garbage", TRUTH)


def bounds_rows():
    ranges = ((0, 65535), (-1, 1), (10, 20), (0.25, 0.75))
    for (lower, upper), kind in itertools.product(ranges, ("Float32", "Float64")):
        dtype = KINDS[kind]
        width = upper - lower
        samples = FLOAT_TRUTH.astype("f8") * width + lower
        samples = samples.astype(dtype)
        truth = (samples.astype("f8") - lower) / width
        truth = np.clip(truth, 0, 1).astype(dtype)
        bounds = "{}:{}".format(lower, upper)
        name = "bounds-{}-{}".format(kind, bounds)
        yield good(name, samples, truth, bounds=bounds)
    yield good("bounds-swapped", FLOATS, FLOAT_TRUTH, bounds="1:0")
    yield good("bounds-third-item", FLOATS, FLOAT_TRUTH, bounds=" 0 : 1. : 7")
    twelve_bits = (SAMPLES >> 4).astype("u2")
    yield good("bounds-integer-4095", twelve_bits, unit(twelve_bits, 4095), bounds="0:4095")
    clipped = np.minimum(unit(twelve_bits, 1000), 1)
    says = r"0 samples below and \d+ above .*0:1000.*clipped"
    yield good("bounds-integer-clipped", twelve_bits, clipped, says, bounds="0:1000")
    doubles, _ = picture("Float64")
    for text in (
            "", "0", "a:b", "1:1", "nan:1", "0:inf", "-inf:inf", "0:1,5", "0:1d3", "-1e308:1e308",
    ):
        yield bad("bounds-bad-" + text, "bounds", doubles, bounds=text)
    yield bad("bounds-missing", "bounds", FLOATS, bounds=None)
    yield bad("bounds-integer-negative", "bounds", bounds="-1:65535")
    yield bad("bounds-integer-too-large", "bounds", bounds="0:65536")


def value_rows():
    smallest = np.finfo("f4").tiny
    wild = FLOATS.copy()
    wild[0, 0, :5] = np.nan, np.inf, -np.inf, 0, -0.5
    wild[1, 1, :4] = 1.5, 1e-42, 1, -1e-30
    tame = wild.copy()
    tame[0, 0, 4] = smallest
    tame[1, 1, 0] = 1
    tame[1, 1, 3] = smallest
    yield good("values-wild", wild, tame, "2 samples below and 1 above its bounds 0:1: clipped")
    wild, _ = picture("Float64")
    wild = wild.copy()
    wild[0, 0, :3] = np.nan, -3, 0
    wild[0, 1, :3] = 7, 5, np.inf
    tame = wild / 5
    tame[0, 0, 1] = np.finfo("f8").tiny
    tame[0, 1, 0] = 1
    yield good("values-wild-bounds", wild, tame, "1 samples below and 1 above", bounds="0:5")
    for name, value in (("zero", 0), ("one", 1), ("nan", np.nan), ("denormal", 1e-40)):
        samples = np.full_like(FLOATS, value)
        yield good("values-all-" + name, samples, samples)


def channel_rows():
    two, two_truth = picture(channels=2)
    four, four_truth = picture(channels=4)
    floats, float_truth = picture("Float32", 4)
    yield good("alpha-gray", two, two_truth[:1], "alpha.*dropped", colorSpace="Gray")
    yield good("alpha-rgb", four, four_truth[:3], "alpha.*dropped", colorSpace="RGB")
    yield good("alpha-rgb-normal-big", four, four_truth[:3], "alpha",
               colorSpace="RGB", normal=True, order=">")
    yield good("alpha-float", floats, float_truth[:3], "alpha", colorSpace="RGB")
    yield good("three-channels-called-gray", RGB, RGB_TRUTH[:1], "2 alpha.*dropped",
               colorSpace=None)
    yield bad("two-channels-called-rgb", "rgb", two, colorSpace="RGB")
    mosaic = '<ColorFilterArray pattern="RGGB" width="2" height="2"/>'
    yield good("mosaic", says="mosaic", children=mosaic)
    location = "attachment:%d:1" % POSITION
    second = tag("Image", {"geometry": "1:1:1", "sampleFormat": "UInt8", "location": location})
    yield good("two-images", says="2 images.*first", outside=second)
    empty = DECLARATION + ROOT + METADATA + "</xisf>"
    yield Row("no-image", monolithic(empty), None, "no image")
    grouped = DECLARATION + ROOT + "<Group>" + second + "</Group></xisf>"
    yield bad("image-not-under-root", "no image", xml=grouped)


def embedded_rows():
    text = base64.b64encode(DATA).decode()
    hexes = DATA.hex()
    keyword = '<FITSKeyword name="OBJECT" value="\'M 31\'" comment=""/>'

    def child(content, **attributes):
        return {"location": "embedded", "children": tag("Data", attributes, content)}

    yield good("embedded-base64", **child(text, encoding="base64"))
    yield good("embedded-hex", location="embedded",
               children=keyword + tag("Data", {"encoding": "hex"}, hexes))
    yield good("embedded-hex-upper", **child(" " + hexes.upper() + "\n", encoding="HEX"))
    yield good("embedded-no-encoding", **child(text))
    yield good("embedded-lines", **child(text[:8] + "\n  " + text[8:]))

    small = packed("zlib", shuffled(DATA, 2))
    attributes = {
        "compression": "zlib+sh:%d:2" % SIZE, "encoding": "base64",
        "checksum": "sha-1:" + hashlib.sha1(small).hexdigest(),
    }
    compressed = tag("Data", attributes, base64.b64encode(small).decode())
    yield good("embedded-compressed", location="embedded", children=compressed + keyword)
    thumbnail = tag(
        "Thumbnail", {"geometry": "1:1:1", "sampleFormat": "UInt8", "location": "embedded"},
        "<Data>AA==</Data>")
    yield good("embedded-after-a-thumbnail", location="embedded", children=thumbnail + compressed)
    attributes["checksum"] = "sha-1:" + hashlib.sha1(b"").hexdigest()
    yield bad("embedded-wrong-checksum", "checksum", **child(text, **attributes))
    swapped = base64.b64encode(SAMPLES.byteswap().tobytes()).decode()
    yield good("embedded-big-endian", byteOrder="big", **child(swapped, byteOrder="big"))

    yield bad("embedded-without-data", "data", location="embedded")
    yield bad("embedded-cut", "data", **child(text[:8]))
    yield bad("embedded-not-base64", "base64", **child("*" + text))
    yield bad("embedded-not-hex", "hex", **child("xy", encoding="hex"))
    yield bad("embedded-unknown", "uu", **child(text, encoding="uu"))
    yield good("inline-base64", location="inline:base64", children=text)
    yield good("inline-hex", location="inline:hex", children=hexes + keyword)


def location_rows():
    elsewhere = "elsewhere|location"
    for location in (
            "url(http://localhost/x)", "path(/etc/passwd)", "path(@header_dir/x.xisb):1",
            "attached:4096:5", "",
    ):
        yield bad("location-" + location.replace("/", "_"), elsewhere, location=location)
    yield bad("location-missing", elsewhere, location=None)
    for text in (
            "attachment:8192", "attachment:-1:5", "attachment:08192:182", "attachment:8192:x",
            "attachment:::", "attachment:8192:%d:1" % SIZE, "attachment:1e3:5",
            "attachment:%s:5" % ("9" * 5000),
    ):
        yield bad("location-" + text[:40], "location", location=text)
    huge = "attachment:8192:1000000000000000"
    yield bad("location-in-header", "location", location="attachment:16:%d" % SIZE)
    yield bad("location-beyond", "cut short", location="attachment:999999:%d" % SIZE)
    yield bad("block-of-10^15", "cut short", location=huge)
    yield bad("block-of-10^15-and-geometry", "cut short",
              location=huge, geometry="10000000:50000000:1")
    yield bad("block-too-short", "samples", location="attachment:8192:%d" % (SIZE - 1))
    longer = one_image(location="attachment:8192:%d" % (SIZE + 1)) + b"x"
    yield Row("block-too-long", longer, None, "samples")


def codec_rows():
    pictures = (
        (SAMPLES, TRUTH), (RGB, RGB_TRUTH), (FLOATS, FLOAT_TRUTH), picture("Float64", 3),
        picture("UInt8"),
    )
    codecs = ("zlib", "lz4", "lz4hc", "zstd", "LZ4HC")
    for codec, (samples, truth) in itertools.product(codecs, pictures):
        raw = samples.tobytes()
        for item in (0, samples.itemsize, 3):
            body = raw
            compression = "{}:{}".format(codec, len(raw))
            if item:
                body = shuffled(raw, item)
                compression = "{}+sh:{}:{}".format(codec, len(raw), item)
            name = "{}-{}-{}-{}".format(codec, samples.dtype.name, samples.shape[0], item)
            whole = packed(codec.lower(), body)
            if len(whole) < len(raw):
                yield good(name, samples, truth, block=whole, compression=compression)
            pieces, listed = sub_blocks(codec.lower(), body)
            yield good(name + "-pieces", samples, truth,
                       block=pieces, compression=compression, subblocks=listed)
            yield good(name + "-stored-raw", samples, truth, block=body, compression=compression)


def sub_blocks(codec, body):
    """Three sub-blocks, and the list of their sizes; one of a single byte is stored as it is."""
    third = len(body) // 3 + 1
    blocks, sizes = [], []
    for piece in (body[:third], body[third:third + 1], body[third + 1:]):
        block = packed(codec, piece)
        if len(block) >= len(piece):
            block = piece
        blocks.append(block)
        sizes.append("{},{}".format(len(block), len(piece)))
    return b"".join(blocks), ":".join(sizes)


def longer_stream_rows():
    """Noise does not shrink. PixInsight stores it raw, other programs keep the longer stream."""
    noise = np.random.RandomState(3).randint(0, 256, (1, 7, 13)).astype("u1")
    for codec in ("zlib", "lz4", "zstd"):
        compression = codec + ":91"
        grown = packed(codec, noise.tobytes())
        yield good(codec + "-that-grew", noise, unit(noise, 255),
                   block=grown, compression=compression)
        yield bad(codec + "-stored-raw-and-more", "damaged", noise,
                  block=noise.tobytes() + b"more", compression=compression)
        damaged = grown + b"more" if codec == "lz4" else b"\xff" + grown[1:]
        yield bad(codec + "-that-grew-and-is-damaged", "damaged", noise,
                  block=damaged, compression=compression)


def packing_rows():
    big = FLOATS.astype(">f4").tobytes()
    yield good("compressed-big-endian", FLOATS, FLOAT_TRUTH, byteOrder="big",
               block=packed("zlib", shuffled(big, 4)), compression="zlib+sh:%d:4" % len(big))
    normal = np.moveaxis(RGB, 0, 2).tobytes()
    yield good("compressed-normal", RGB, RGB_TRUTH, pixelStorage="Normal",
               block=packed("lz4", shuffled(normal, 2)), compression="lz4+sh:%d:2" % len(normal))
    yield good("item-size-without-shuffling",
               block=packed("zlib", DATA), compression="zlib:%d:2" % SIZE)
    flat = np.zeros((1, 64, 64), "u2")  # 8192 bytes
    small = packed("zlib", flat.tobytes())
    for text in (
            "zlib", "zlib:", "zlib:x", "zlib:-5", "zlib+sh:8192", "zlib+sh:8192:0",
            "zlib+sh:8192:17", "zlib:8192:99", "zlib:08192", "zlib+sh:8192:2:2", "gzip:8192",
            "zlib+xx:8192:2", "", "bzip2+sh:8192:2", "zlib:8191", "zlib:8193", "lz4:8192",
            "zstd:8192",
    ):
        yield bad("compression-" + text, "compress|samples", flat, block=small, compression=text)
    half = len(small) // 2
    rest = len(small) - half
    for text in (
            "", "1,2", "{0},8192:0,0", "{0},8191", "{1},4096:{2},4096,7", "0,4096:{0},4096",
            "{1},-1:{2},8193", "a,b", "{1},4096:{2},4096",
    ):
        listed = text.format(len(small), half, rest)
        yield bad("subblocks-" + text, "sub-blocks|contradicts|damaged", flat,
                  block=small, compression="zlib:8192", subblocks=listed)
    yield bad("subblocks-odd", "contradicts", flat, block=small + b"xx",
              compression="zlib:8192", subblocks="%d,8192:2" % len(small))


def bomb_rows():
    """Damaged streams, and those that stand for more than the picture."""
    flat = np.zeros((1, 64, 64), "u2")
    refused = "damaged|claims"
    for codec in ("zlib", "lz4", "zstd"):
        compression = codec + ":8192"

        def block_row(name, says, block):
            return bad(codec + name, says, flat, block=block, compression=compression)

        stream = packed(codec, flat.tobytes())
        bomb = packed(codec, bytes(40_000_000))
        yield block_row("-cut", refused, stream[:-1])
        yield block_row("-garbage", refused, b"\xa5" * 100)
        yield block_row("-too-long", "damaged", packed(codec, bytes(8193)))
        yield block_row("-too-short", refused, packed(codec, bytes(8191)))
        yield block_row("-bomb", "damaged", bomb[:8000])
        yield bad(codec + "-bomb-of-40-MB", "samples", flat,
                  block=bomb, compression=codec + ":40000000")
        yield bad(codec + "-absurd", "claims", flat, block=stream,
                  compression=codec + ":8000000000000", geometry="2000000:2000000:1")
    compressor = zstandard.ZstdCompressor(write_content_size=False)
    yield good("zstd-without-size", flat, unit(flat, 65535),
               block=compressor.compress(flat.tobytes()), compression="zstd:8192")
    yield bad("zstd-lying-size", "damaged", flat,
              block=packed("zstd", bytes(9_000_000)), compression="zstd:8192")


def checksum_rows():
    compressed = packed("lz4hc", shuffled(FLOATS.tobytes(), 4))
    compression = "lz4hc+sh:%d:4" % FLOATS.nbytes
    algorithms = {
        "sha-1": "sha1", "sha1": "sha1", "sha-256": "sha256", "sha256": "sha256",
        "SHA-512": "sha512", "sha512": "sha512", "sha3-256": "sha3_256", "sha3-512": "sha3_512",
    }
    for name, algorithm in algorithms.items():
        digest = hashlib.new(algorithm, DATA).hexdigest()
        yield good("checksum-" + name, checksum=name + ":" + digest)
        yield good("checksum-upper-" + name, checksum=name + ":" + digest.upper())
        yield bad("checksum-wrong-" + name, "checksum", checksum=name + ":" + digest[::-1])
        digest = hashlib.new(algorithm, compressed).hexdigest()
        yield good("checksum-compressed-" + name, FLOATS, FLOAT_TRUTH, block=compressed,
                   compression=compression, checksum=name + ":" + digest)
    md5 = hashlib.md5(DATA).hexdigest()
    for text in ("md5:" + md5, "sha-1", "sha-1:", "", "sha-1:00", "sha-384:00", "blake2b:00"):
        yield bad("checksum-bad-" + text[:7], "checksum", checksum=text)


def attribute_rows():
    for text in (
            "0:7:1", "-13:7:1", "13:-7:1", "13:7:0", "13:7", "13", "13:7:1:1", "a:b:c", "",
            "13,7,1", "13.0:7:1", "013:7:1", "4294967296:7:1", "1_3:7:1", "\u0661\u0663:7:1",
            "9" * 5000 + ":1:1", "99999999:99999999:3", "7:7:1", "14:7:1",
    ):
        yield bad("geometry-" + text[:30], "geometry|samples|0 channel", geometry=text)
    yield bad("geometry-missing", "geometry", geometry=None)
    for text in ("UInt24", "Int16", "Complex32", "Complex64", "", "Byte", "Float16"):
        yield bad("sampleFormat-" + text, "kind", sampleFormat=text)
    yield bad("sampleFormat-missing", "kind", sampleFormat=None)
    for text in ("CIELab", "HSV", ""):
        yield bad("colorSpace-" + text, "color space", RGB, colorSpace=text)
    for text in ("Interleaved", ""):
        yield bad("pixelStorage-" + text, "order", pixelStorage=text)
    for text in ("middle", "Big", "LITTLE", ""):
        yield bad("byteOrder-" + text, "order", byteOrder=text)
    odd = {
        "id": "1 bad-id", "uuid": "no-uuid", "orientation": "flip;90", "offset": "-1",
        "imageType": "Cat",
    }
    for name, value in odd.items():
        yield good("odd-" + name, **{name: value})


def header_rows():
    german = '<FITSKeyword name="OBSERVER" value="\'M\u00fcller\'" comment="5 \u00b0C, 3 \u00b5m"/>'
    # It is UTF-8, whatever the label says
    for label in ("utf8", "UTF-8", "utf-8", "UTF8", "ISO-8859-1", "utf-16", "windows-1252"):
        declaration = "<?xml version='1.0' encoding='%s'?>\n" % label
        yield good("label-" + label, children=german, declaration=declaration)
    yield bad("label-empty", "XML", declaration='<?xml version="1.0" encoding=""?>')
    yield good("no-declaration", declaration="")
    yield good("declaration-without-label", declaration='<?xml version="1.0"?>')

    file = one_image()
    xml = header_of(file)
    yield good("null-padding", xml=xml + bytes(500))
    yield good("null-padding-and-garbage", xml=xml + bytes(5) + b"<garbage")
    yield good("null-and-the-end-of-an-older-header", xml=xml + b"\0<older/></xisf>")
    yield good("byte-order-mark", xml=b"\xef\xbb\xbf" + xml)
    yield good("no-namespace", root='<xisf version="1.0">')
    other = '<xisf version="1.0" xmlns="http://example.org/other">'
    yield good("other-namespace", root=other)
    yield good("version-with-blanks", root='<xisf version=" 1.0 ">')
    yield good("bad-utf-8", xml=xml.replace(b"by hand", b"M\xfcller"))
    yield good("white-space-first", xml=b"\n " + xml)
    yield good("doctype", declaration=DECLARATION + "<!DOCTYPE xisf>")
    yield good("comment", declaration=DECLARATION + "<!-- XISF <Image> -->")
    yield good("signature-follows", end="</xisf><Signature>abc</Signature>")
    control = '<FITSKeyword name="A" value="\'x\x01&#2;&#x1F;y\'" comment=""/>'
    yield good("control-characters", children=control)
    yield Row("reserved-not-zero", file[:12] + b"\xff\x00\x01\x02" + file[16:], TRUTH)

    yield bad("utf-16", "XML", xml=xml.decode().encode("utf-16"))
    yield bad("unclosed", "XML", end="")
    yield bad("malformed", "XML", children="<a><b></a></b>")
    yield bad("attribute-twice", "XML", children='<a b="1" b="2"/>')
    yield bad("undefined-entity", "XML", children="&nope;")
    prefixed = '<x:xisf xmlns:x="http://www.pixinsight.com/xisf" version="1.0"></x:xisf>'
    yield bad("prefixed-root", "1.0", xml=prefixed)
    for text in ("1.1", "2.0", "1", ""):
        yield bad("version-" + text, "1.0", root='<xisf version="%s">' % text)
    yield bad("version-missing", "1.0", root="<xisf>")
    yield Row("other-root", monolithic('<html version="1.0"></html>'), None, "1.0")


def cut_rows():
    file = one_image()
    end = 16 + len(header_of(file))
    fits = b"SIMPLE  =                    T"
    yield Row("signature-wrong", b"XISF0200" + file[8:], None, "XISF")
    yield Row("fits-file", fits.ljust(2880), None, "no end")
    yield Row("png-file", b"\x89PNG\r\n\x1a\n" + bytes(100), None, "XISF")
    yield Row("empty-file", b"", None, "XISF")
    for length in (0, 1, 64, end - 17, end - 24):
        yield bad("header-length-%d" % length, "XML", length=length)
    for length in (len(file), 2 ** 31, 2 ** 32 - 1):
        yield bad("header-length-%d" % length, "cut short", length=length)
    cuts = [0, 4, 7, 8, 11, 12, 15, 16, 17, 100]
    cuts += [end - 1, end, 8191, 8192, 8193, len(file) - 1]
    for cut in cuts:
        yield Row("cut-at-%d" % cut, file[:cut], None, "cut short|XISF")


def header_bomb_rows():
    nested = ['<!ENTITY e0 "ha">']
    for level in range(1, 10):
        ten = "&e%d;" % (level - 1) * 10
        nested.append('<!ENTITY e%d "%s">' % (level, ten))
    doctypes = {
        "bomb": "".join(nested), "external": '<!ENTITY x SYSTEM "file:///etc/passwd">',
        "hidden": '<!EN\x01TI&#2;TY x "y">', "parameter": '<!ENTITY % x "y">',
        "defaults": '<!ATTLIST a b CDATA "%s">' % ("x" * 1000),
    }
    for name, doctype in doctypes.items():
        declaration = DECLARATION + "<!DOCTYPE xisf [" + doctype + "]>"
        children = "&e9;" if name == "bomb" else ""
        yield bad("entity-" + name, "entities", declaration=declaration, children=children)
    yield bad("nested-100000-deep", "header|version",
              children="<a>" * 50000 + "</a>" * 50000, position=500000)
    yield bad("elements-by-the-million", "header too large",
              children="<a/>" * 1_000_000, position=5_000_000)
    yield bad("attributes-by-the-million", "header too large",
              children="<a b='' c=''/>" * 600_000, position=9_000_000)
    text = tag("Property", {"id": "A", "type": "String"}, "x" * 1_000_000)
    yield good("text-of-1-MB", children=text, position=1 << 20)


def keyword_rows():
    """Bad keywords and metadata must not cost the picture."""
    no_id = '<Metadata><Property type="String">x</Property></Metadata>'
    metadata = {
        "none": "", "empty": "<Metadata/>", "two": METADATA * 2,
        "unknown": "<Metadata><x/>y</Metadata>", "no-id": no_id,
    }
    for name, text in metadata.items():
        yield good("metadata-" + name, metadata=text)
    yield good("unknown-children", children="<Frob a='1'>text<x/></Frob>",
               outside="<Frob/><Property id='A:b' type='Int32' value='1'/>")
    for text in ('<FITSKeyword name="A" value="1"/>',
                 '<FITSKeyword name="A" comment="c"/>',
                 '<FITSKeyword name="A"/>',
                 '<FITSKeyword value="1" comment=""/>',
                 "<FITSKeyword/>",
                 '<FITSKeyword name="" value="" comment=""/>',
                 '<FITSKeyword name="lower case and long" value="what \'ever" '
                 'comment="&lt;&amp;"/>'):
        yield good("keyword-" + text[13:30], children=text)


def property_rows():
    """Bad properties must not cost the picture. Those that cannot be kept are named."""
    values = (
        ("Float64", "NaN"), ("Float64", "Inf"), ("Float32", "-inf"), ("Float64", ""),
        ("Float64", "word"), ("Int32", "1.5"), ("Boolean", "1"), ("Boolean", "perhaps"),
        ("UInt8", "-1"), ("Complex64", "(1,2)"), ("TimePoint", "yesterday"), ("Frob", "1"),
        ("", "1"), ("Int128", "9" * 40), ("String", "in the wrong place"),
    )
    for kind, value in values:
        attributes = {"id": "A:b", "type": kind, "value": value}
        yield good("property-%s-%s" % (kind, value), children=tag("Property", attributes))

    numbers = struct.pack("<2d", 1, 2)
    text = base64.b64encode(numbers).decode()
    vector = {"id": "A", "type": "F64Vector", "length": 2, "location": "inline:base64"}
    matrix = {"id": "A", "type": "Matrix", "rows": 1, "columns": 2, "location": "inline:base64"}
    attached = {"id": "A", "type": "UI8Vector", "length": 9, "location": "attachment:8192:9"}
    properties = {
        "no-type": tag("Property", {"id": "A"}),
        "no-id": tag("Property", {"type": "Int32", "value": "1"}),
        "nothing": tag("Property", {}),
        "no-value": tag("Property", {"id": "A", "type": "Float64"}),
        "bad-id": tag("Property", {"id": "1:;", "type": "Int32", "value": "1"}),
        "hex-vector": tag("Property", {**vector, "location": "inline:hex"}, numbers.hex()),
        "empty-vector": tag("Property", {**vector, "length": 0}),
        "matrix": tag("Property", matrix, text),
        "big-endian": tag("Property", {**vector, "byteOrder": "big"}, text),
        "wrong-length": tag("Property", {**vector, "length": 7}, text),
        "attached": tag("Property", attached),
        "attached-empty": tag(
            "Property", {**attached, "length": 0, "location": "attachment:8192:0"}),
    }
    for name, element in properties.items():
        yield good("property-" + name, children=element)

    broken = {**attached, "id": "A:Broken"}
    lost = {
        "beyond": tag("Property", {**broken, "location": "attachment:8192:1000000000000"}),
        "in-header": tag("Property", {**broken, "location": "attachment:16:8"}),
        "path": tag("Property", {**broken, "location": "path(/etc/passwd)"}),
        "malformed": tag("Property", {**broken, "location": "attachment:x"}),
        "checksum": tag("Property", {**broken, "checksum": "sha-1:00"}),
        "base64": tag("Property", {**broken, "location": "inline:base64"}, "***"),
    }
    for name, element in lost.items():
        yield good("property-lost-" + name, says="A:Broken", children=element)
