"""A file for each row of what real and hostile XISF files hold, assembled by hand from the specification.

`rows()` gives them with what must come of them. Nothing here uses the `xisf` package or the tool's own reader and
writer: only struct, bytes and the bare codecs.
"""
import base64
import hashlib
import struct
import zlib
from typing import NamedTuple, Optional

import lz4.block
import numpy as np
import zstandard

DECLARATION = '<?xml version="1.0" encoding="UTF-8"?>'
ROOT = ('<xisf version="1.0" xmlns="http://www.pixinsight.com/xisf" '
        'xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" '
        'xsi:schemaLocation="http://www.pixinsight.com/xisf http://pixinsight.com/xisf/xisf-1.0.xsd">')
METADATA = ('<Metadata><Property id="XISF:CreationTime" type="String">2019-09-15T20:24:28Z</Property>'
            '<Property id="XISF:CreatorApplication" type="String">by hand</Property></Metadata>')
POSITION = 8192  # where the pixels are attached, unless a row says otherwise
KINDS = {"UInt8": "u1", "UInt16": "u2", "UInt32": "u4", "UInt64": "u8", "Float32": "f4", "Float64": "f8"}


class Row(NamedTuple):
    name: str
    data: bytes
    planes: Optional[np.ndarray] = None  # (c, h, w) in [0, 1]: the pixels that must come out; None: a refusal
    says: str = ""  # regular expression for the refusal, or for a warning


def monolithic(xml, block=b"", position=POSITION, length=None):
    """Signature, length of the header, header, zeros up to `position`, block."""
    xml = xml.encode("utf-8") if isinstance(xml, str) else xml
    start = b"XISF0100" + struct.pack("<I", len(xml) if length is None else length) + bytes(4) + xml
    return start + (bytes(position - len(start)) + block if block else b"")


def tag(name, attributes, content=""):
    text = "".join(' {}="{}"'.format(key, value) for key, value in attributes.items() if value is not None)
    return "<{}{}>{}</{}>".format(name, text, content, name)


def picture(kind="UInt16", channels=1, width=13, height=7):
    """A slope with some noise; (c, h, w) samples of the kind, and what they mean in [0, 1]."""
    rng = np.random.RandomState(7)
    y, x = np.mgrid[0:height, 0:width]
    slope = np.stack([0.2 + 0.3 * x / width + 0.1 * y / height + 0.05 * c for c in range(channels)])
    unit = slope + 0.02 * rng.rand(*slope.shape)
    if kind.startswith("Float"):
        samples = unit.astype(KINDS[kind])
        return samples, samples
    full = 2 ** (8 * int(KINDS[kind][1])) - 1
    samples = np.floor(unit * float(full)).astype(KINDS[kind])
    return samples, (samples / float(full)).astype(np.float32)


def shuffled(data, item):
    count = len(data) // item
    return b"".join(data[byte:count * item:item] for byte in range(item)) + data[count * item:]


def packed(codec, data):
    if codec == "zlib":
        return zlib.compress(data)
    if codec == "zstd":
        return zstandard.ZstdCompressor().compress(data)
    return lz4.block.compress(data, mode="high_compression" if codec == "lz4hc" else "default", store_size=False)


def one_image(samples=None, children="", block=None, xml=None, declaration=DECLARATION, root=ROOT, end="</xisf>",
              metadata=METADATA, outside="", order="<", normal=False, content=None, length=None, position=POSITION,
              **attributes):
    """A file with one image; keyword arguments beyond the named ones replace attributes of Image (None: leave out)."""
    samples = picture()[0] if samples is None else samples
    c, h, w = samples.shape
    kind = {value: key for key, value in KINDS.items()}[samples.dtype.str[1:]]
    if block is None:
        block = (np.moveaxis(samples, 0, 2) if normal else samples).astype(samples.dtype.newbyteorder(order)).tobytes()
    given = {"geometry": "{}:{}:{}".format(w, h, c), "sampleFormat": kind,
             "bounds": "0:1" if kind.startswith("Float") else None, "colorSpace": "RGB" if c == 3 else "Gray",
             "pixelStorage": "Normal" if normal else None, "byteOrder": "big" if order == ">" else None,
             "location": "attachment:{}:{}".format(position, len(block))}
    given.update(attributes)
    image = tag("Image", given, children if content is None else content)
    xml = xml or declaration + root + image + outside + metadata + end
    return monolithic(xml, block, position, length)


def rows(width=13, height=7):
    """All rows, with pictures of that size."""
    def shot(kind="UInt16", channels=1):
        return picture(kind, channels, width, height)

    samples, truth = shot()
    rgb, rgb_truth = shot(channels=3)
    floats, float_truth = shot("Float32", 3)
    data, size = samples.tobytes(), samples.nbytes

    def good(name, file, planes=truth, says=""):
        return Row(name, file, planes, says)

    def bad(name, file, says):
        return Row(name, file, None, says)

    # Formats, bounds, byte order, storage
    for kind in KINDS:
        for channels in (1, 3):
            for order, normal in (("<", False), (">", False), ("<", True), (">", True)):
                stored, unit = shot(kind, channels)
                name = "{}-{}-{}{}".format(kind, channels, "big" if order == ">" else "little", "-normal" * normal)
                yield good(name, one_image(stored, order=order, normal=normal), unit)
    for lower, upper in ((0, 65535), (-1, 1), (10, 20), (0.25, 0.75)):
        for kind in ("Float32", "Float64"):
            stored = (float_truth.astype("f8") * (upper - lower) + lower).astype(KINDS[kind])
            unit = np.clip((stored.astype("f8") - lower) / (upper - lower), 0, 1).astype(KINDS[kind])
            yield good("bounds-{}-{}:{}".format(kind, lower, upper),
                       one_image(stored, bounds="%s:%s" % (lower, upper)), unit)
    yield good("bounds-swapped", one_image(floats, bounds="1:0"), float_truth)
    yield good("bounds-third-item", one_image(floats, bounds=" 0 : 1. : 7"), float_truth)
    twelve_bits = (samples >> 4).astype("u2")
    yield good("bounds-integer-4095", one_image(twelve_bits, bounds="0:4095"), (twelve_bits / 4095.0).astype("f4"))
    yield good("bounds-integer-clipped", one_image(twelve_bits, bounds="0:1000"),
               np.minimum(twelve_bits / 1000.0, 1).astype("f4"), r"0 samples below and \d+ above .*0:1000.*clipped")
    for text in ("", "0", "a:b", "1:1", "nan:1", "0:inf", "-inf:inf", "0:1,5", "0:1d3", "-1e308:1e308"):
        yield bad("bounds-bad-" + text, one_image(shot("Float64")[0], bounds=text), "bounds")
    yield bad("bounds-missing", one_image(floats, bounds=None), "bounds")
    yield bad("bounds-integer-negative", one_image(bounds="-1:65535"), "bounds")
    yield bad("bounds-integer-too-large", one_image(bounds="0:65536"), "bounds")
    yield good("case-folded", one_image(rgb, colorSpace="rgb", sampleFormat="uint16", pixelStorage="planar"), rgb_truth)
    yield good("white-space", one_image(geometry=" {} : {} :1 ".format(width, height), sampleFormat=" UInt16\n",
                                        location=" attachment : {} : {} ".format(POSITION, size)))
    yield good("hexadecimal", one_image(geometry="0x%x:%d:1" % (width, height),
                                        location="attachment:0x2000:%d" % size))
    yield good("block-unaligned", one_image(position=7777))
    yield good("bytes-after-the-last-block", one_image() + b"garbage")

    # Values
    wild = floats.copy()
    wild[0, 0, :5], wild[1, 1, :4] = (np.nan, np.inf, -np.inf, 0, -0.5), (1.5, 1e-42, 1, -1e-30)
    tame = wild.copy()
    tame[0, 0, 4], tame[1, 1, 0], tame[1, 1, 3] = np.finfo("f4").tiny, 1, np.finfo("f4").tiny
    yield good("values-wild", one_image(wild), tame, "2 samples below and 1 above its bounds 0:1: clipped")
    wild = shot("Float64")[0].copy()
    wild[0, 0, :3], wild[0, 1, :3] = (np.nan, -3, 0), (7, 5, np.inf)
    tame = wild / 5
    tame[0, 0, 1], tame[0, 1, 0] = np.finfo("f8").tiny, 1
    yield good("values-wild-bounds", one_image(wild, bounds="0:5"), tame, "1 samples below and 1 above")
    for name, value in (("zero", 0), ("one", 1), ("nan", np.nan), ("denormal", 1e-40)):
        yield good("values-all-" + name, one_image(np.full_like(floats, value)), np.full_like(floats, value))

    # Channels and images
    two, two_truth = shot(channels=2)
    four, four_truth = shot(channels=4)
    yield good("alpha-gray", one_image(two, colorSpace="Gray"), two_truth[:1], "alpha.*dropped")
    yield good("alpha-rgb", one_image(four, colorSpace="RGB"), four_truth[:3], "alpha.*dropped")
    yield good("alpha-rgb-normal-big", one_image(four, colorSpace="RGB", normal=True, order=">"), four_truth[:3],
               "alpha")
    yield good("alpha-float", one_image(shot("Float32", 4)[0], colorSpace="RGB"), shot("Float32", 4)[1][:3], "alpha")
    yield good("three-channels-called-gray", one_image(rgb, colorSpace=None), rgb_truth[:1], "2 alpha.*dropped")
    yield bad("two-channels-called-rgb", one_image(two, colorSpace="RGB"), "RGB")
    yield good("mosaic", one_image(children='<ColorFilterArray pattern="RGGB" width="2" height="2"/>'), says="mosaic")
    second = tag("Image", {"geometry": "1:1:1", "sampleFormat": "UInt8", "location": "attachment:%d:1" % POSITION})
    yield good("two-images", one_image(outside=second), says="2 images.*first")
    yield bad("no-image", monolithic(DECLARATION + ROOT + METADATA + "</xisf>"), "no image")
    yield bad("image-not-under-root", one_image(xml=DECLARATION + ROOT + "<Group>" + second + "</Group></xisf>"),
              "no image")

    # Where the block is
    text, hexes = base64.b64encode(data).decode(), data.hex()
    keyword = '<FITSKeyword name="OBJECT" value="\'M 31\'" comment=""/>'
    yield good("embedded-base64", one_image(location="embedded", children=tag("Data", {"encoding": "base64"}, text)))
    yield good("embedded-hex", one_image(location="embedded",
                                         children=keyword + tag("Data", {"encoding": "hex"}, hexes)))
    yield good("embedded-hex-upper", one_image(location="embedded",
                                               children=tag("Data", {"encoding": "HEX"}, " " + hexes.upper() + "\n")))
    yield good("embedded-no-encoding", one_image(location="embedded", children=tag("Data", {}, text)))
    yield good("embedded-lines", one_image(location="embedded", children=tag("Data", {}, text[:8] + "\n  " + text[8:])))
    small = packed("zlib", shuffled(data, 2))
    attributes = {"compression": "zlib+sh:%d:2" % size, "encoding": "base64",
                  "checksum": "sha-1:" + hashlib.sha1(small).hexdigest()}
    compressed = tag("Data", attributes, base64.b64encode(small).decode())
    yield good("embedded-compressed", one_image(location="embedded", children=compressed + keyword))
    thumbnail = tag("Thumbnail", {"geometry": "1:1:1", "sampleFormat": "UInt8", "location": "embedded"},
                    "<Data>AA==</Data>")
    yield good("embedded-after-a-thumbnail", one_image(location="embedded", children=thumbnail + compressed))
    attributes["checksum"] = "sha-1:" + hashlib.sha1(b"").hexdigest()
    yield bad("embedded-wrong-checksum", one_image(location="embedded", children=tag("Data", attributes, text)),
              "checksum")
    yield good("embedded-big-endian", one_image(location="embedded", byteOrder="big", children=tag(
        "Data", {"byteOrder": "big"}, base64.b64encode(samples.byteswap().tobytes()).decode())))
    yield bad("embedded-without-data", one_image(location="embedded"), "data")
    yield bad("embedded-cut", one_image(location="embedded", children=tag("Data", {}, text[:8])), "data")
    yield bad("embedded-not-base64", one_image(location="embedded", children=tag("Data", {}, "*" + text)), "base64")
    yield bad("embedded-not-hex", one_image(location="embedded", children=tag("Data", {"encoding": "hex"}, "xy")),
              "hex")
    yield bad("embedded-unknown", one_image(location="embedded", children=tag("Data", {"encoding": "uu"}, text)), "uu")
    yield good("inline-base64", one_image(location="inline:base64", children=text))
    yield good("inline-hex", one_image(location="inline:hex", children=hexes + keyword))
    for location in ("url(http://localhost/x)", "path(/etc/passwd)", "path(@header_dir/x.xisb):1", "attached:4096:5",
                     ""):
        yield bad("location-" + location.replace("/", "_"), one_image(location=location), "elsewhere|location")
    yield bad("location-missing", one_image(location=None), "elsewhere|location")
    for text in ("attachment:8192", "attachment:-1:5", "attachment:08192:182", "attachment:8192:x", "attachment:::",
                 "attachment:8192:%d:1" % size, "attachment:1e3:5", "attachment:%s:5" % ("9" * 5000)):
        yield bad("location-" + text[:40], one_image(location=text), "location")
    yield bad("location-in-header", one_image(location="attachment:16:%d" % size), "location")
    yield bad("location-beyond", one_image(location="attachment:999999:%d" % size), "cut short")
    yield bad("block-of-10^15", one_image(location="attachment:8192:1000000000000000"), "cut short")
    yield bad("block-of-10^15-and-geometry", one_image(location="attachment:8192:1000000000000000",
                                                       geometry="10000000:50000000:1"), "cut short")
    yield bad("block-too-short", one_image(location="attachment:8192:%d" % (size - 1)), "samples")
    yield bad("block-too-long", one_image(location="attachment:8192:%d" % (size + 1)) + b"x", "samples")

    # Compression
    for codec in ("zlib", "lz4", "lz4hc", "zstd", "LZ4HC"):
        for stored, unit in ((samples, truth), (rgb, rgb_truth), (floats, float_truth), shot("Float64", 3),
                             shot("UInt8")):
            raw, kind = stored.tobytes(), stored.dtype.name
            for item in (0, stored.itemsize, 3):
                cut = [0, len(raw) // 3 + 1, len(raw) // 3 + 2, len(raw)]  # a piece of one byte is stored as it is
                body = shuffled(raw, item) if item else raw
                how = "{}{}:{}{}".format(codec, "+sh" * bool(item), len(raw), ":%d" % item if item else "")
                name = "{}-{}-{}-{}".format(codec, kind, stored.shape[0], item)
                whole = packed(codec.lower(), body)
                if len(whole) < len(raw):
                    yield good(name, one_image(stored, block=whole, compression=how), unit)
                pieces = [packed(codec.lower(), body[a:b]) for a, b in zip(cut, cut[1:])]
                pieces = [p if len(p) < b - a else body[a:b] for p, a, b in zip(pieces, cut, cut[1:])]
                listed = ":".join("{},{}".format(len(p), b - a) for p, a, b in zip(pieces, cut, cut[1:]))
                yield good(name + "-pieces", one_image(stored, block=b"".join(pieces), compression=how,
                                                       subblocks=listed), unit)
                yield good(name + "-stored-raw", one_image(stored, block=body, compression=how), unit)
    for codec in ("zlib", "lz4", "zstd"):  # other programs keep the stream where it is longer than the data
        noise = np.random.RandomState(3).randint(0, 256, (1, 7, 13)).astype("u1")
        grown = packed(codec, noise.tobytes())
        noise_truth = (noise / 255.0).astype("f4")
        yield good(codec + "-that-grew", one_image(noise, block=grown, compression=codec + ":91"), noise_truth)
        yield good(codec + "-stored-raw-and-more",
                   one_image(noise, block=noise.tobytes() + b"more", compression=codec + ":91"), noise_truth,
                   "longer than they should be: taken as uncompressed")
        damaged = b"\xff" + grown[1:] if codec != "lz4" else grown + b"more"
        raw = np.frombuffer(damaged, "u1", 91).reshape(1, 7, 13)
        yield good(codec + "-that-grew-and-is-damaged",
                   one_image(noise, block=damaged, compression=codec + ":91"), (raw / 255.0).astype("f4"),
                   "longer than they should be: taken as uncompressed")
    big = floats.astype(">f4").tobytes()
    yield good("compressed-big-endian", one_image(floats, block=packed("zlib", shuffled(big, 4)), byteOrder="big",
                                                  compression="zlib+sh:%d:4" % len(big)), float_truth)
    normal = np.moveaxis(rgb, 0, 2).tobytes()
    yield good("compressed-normal", one_image(rgb, block=packed("lz4", shuffled(normal, 2)), pixelStorage="Normal",
                                              compression="lz4+sh:%d:2" % len(normal)), rgb_truth)
    yield good("item-size-without-shuffling", one_image(block=packed("zlib", data), compression="zlib:%d:2" % size))
    flat = np.zeros((1, 64, 64), "u2")
    small = packed("zlib", flat.tobytes())
    half = len(small) // 2
    for text in ("zlib", "zlib:", "zlib:x", "zlib:-5", "zlib+sh:8192", "zlib+sh:8192:0", "zlib+sh:8192:17",
                 "zlib:8192:99", "zlib:08192", "zlib+sh:8192:2:2", "gzip:8192", "zlib+xx:8192:2", "", "bzip2+sh:8192:2",
                 "zlib:8191", "zlib:8193", "lz4:8192", "zstd:8192"):
        yield bad("compression-" + text, one_image(flat, block=small, compression=text), "compress|samples")
    for text in ("", "1,2", "{0},8192:0,0", "{0},8191", "{1},4096:{2},4096,7", "0,4096:{0},4096", "{1},-1:{2},8193",
                 "a,b", "{1},4096:{2},4096"):
        listed = text.format(len(small), half, len(small) - half)
        yield bad("subblocks-" + text, one_image(flat, block=small, compression="zlib:8192", subblocks=listed),
                  "sub-blocks|contradicts|decompressed")
    for codec in ("zlib", "lz4", "zstd"):
        how = codec + ":8192"
        damaged = packed(codec, flat.tobytes())
        yield bad(codec + "-cut", one_image(flat, block=damaged[:-1], compression=how), "decompressed|claims")
        yield bad(codec + "-garbage", one_image(flat, block=b"\xa5" * 100, compression=how), "decompressed|claims")
        longer, shorter = packed(codec, bytes(8193)), packed(codec, bytes(8191))
        yield bad(codec + "-too-long", one_image(flat, block=longer, compression=how), "decompressed")
        yield bad(codec + "-too-short", one_image(flat, block=shorter, compression=how), "decompressed|claims")
        bomb = packed(codec, bytes(40_000_000))
        yield bad(codec + "-bomb", one_image(flat, block=bomb[:8000], compression=how), "decompressed")
        yield bad(codec + "-bomb-of-40-MB", one_image(flat, block=bomb, compression="%s:%d" % (codec, 40_000_000)),
                  "samples")
        yield bad(codec + "-absurd", one_image(flat, block=damaged, compression=codec + ":8000000000000",
                                               geometry="2000000:2000000:1"), "claims")
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(flat.tobytes())
    yield bad("zstd-without-size", one_image(flat, block=frame, compression="zstd:8192"), "decompressed")
    yield bad("zstd-lying-size", one_image(flat, block=packed("zstd", bytes(9_000_000)), compression="zstd:8192"),
              "decompressed")

    # Checksums
    small = packed("lz4hc", shuffled(floats.tobytes(), 4))
    small_how = "lz4hc+sh:%d:4" % floats.nbytes
    for name, algorithm in (("sha-1", "sha1"), ("sha1", "sha1"), ("sha-256", "sha256"), ("sha256", "sha256"),
                            ("SHA-512", "sha512"), ("sha512", "sha512"), ("sha3-256", "sha3_256"),
                            ("sha3-512", "sha3_512")):
        digest = hashlib.new(algorithm, data).hexdigest()
        yield good("checksum-" + name, one_image(checksum=name + ":" + digest))
        yield good("checksum-upper-" + name, one_image(checksum=name + ":" + digest.upper()))
        yield bad("checksum-wrong-" + name, one_image(checksum=name + ":" + digest[::-1]), "checksum")
        digest = hashlib.new(algorithm, small).hexdigest()
        yield good("checksum-compressed-" + name, one_image(floats, block=small, compression=small_how,
                                                            checksum=name + ":" + digest), float_truth)
    for text in ("md5:" + hashlib.md5(data).hexdigest(), "sha-1", "sha-1:", "", "sha-1:00", "sha-384:00", "blake2b:00"):
        yield bad("checksum-bad-" + text[:7], one_image(checksum=text), "checksum")

    # Image attributes
    for text in ("0:7:1", "-13:7:1", "13:-7:1", "13:7:0", "13:7", "13", "13:7:1:1", "a:b:c", "", "13,7,1", "13.0:7:1",
                 "013:7:1", "4294967296:7:1", "1_3:7:1", "\u0661\u0663:7:1", "9" * 5000 + ":1:1",
                 "99999999:99999999:3", "7:7:1", "14:7:1"):
        yield bad("geometry-" + text[:30], one_image(picture()[0], geometry=text), "geometry|two-dimensional|samples")
    yield bad("geometry-missing", one_image(geometry=None), "geometry")
    for text in ("UInt24", "Int16", "Complex32", "Complex64", "", "Byte", "Float16"):
        yield bad("sampleFormat-" + text, one_image(sampleFormat=text), "kind")
    yield bad("sampleFormat-missing", one_image(sampleFormat=None), "kind")
    for text in ("CIELab", "HSV", ""):
        yield bad("colorSpace-" + text, one_image(rgb, colorSpace=text), "color space")
    for text in ("Interleaved", ""):
        yield bad("pixelStorage-" + text, one_image(pixelStorage=text), "order")
    for text in ("middle", "Big", "LITTLE", ""):
        yield bad("byteOrder-" + text, one_image(byteOrder=text), "order")
    for name, value in (("id", "1 bad-id"), ("uuid", "no-uuid"), ("orientation", "flip;90"), ("offset", "-1"),
                        ("imageType", "Cat")):
        yield good("odd-" + name, one_image(**{name: value}))

    # Headers
    german = '<FITSKeyword name="OBSERVER" value="\'M\u00fcller\'" comment="5 \u00b0C, 3 \u00b5m"/>'
    for label in ("utf8", "UTF-8", "utf-8", "UTF8", "ISO-8859-1", "utf-16"):
        declared = "<?xml version='1.0' encoding='%s'?>\n" % label
        yield good("label-" + label, one_image(children=german, declaration=declared))
    for label in ("windows-1252", "EBCDIC", "utf-7", ""):
        yield bad("label-" + label, one_image(declaration='<?xml version="1.0" encoding="%s"?>' % label), "UTF-8|XML")
    yield good("no-declaration", one_image(declaration=""))
    yield good("declaration-without-label", one_image(declaration='<?xml version="1.0"?>'))
    header = one_image()
    xml = header[16:16 + struct.unpack("<I", header[8:12])[0]]
    yield good("null-padding", one_image(xml=xml + bytes(500)))
    yield good("null-padding-and-garbage", one_image(xml=xml + bytes(5) + b"<garbage"))
    yield good("byte-order-mark", one_image(xml=b"\xef\xbb\xbf" + xml))
    yield good("no-namespace", one_image(root='<xisf version="1.0">'))
    yield good("other-namespace", one_image(root='<xisf version="1.0" xmlns="http://example.org/other">'))
    yield good("version-with-blanks", one_image(root='<xisf version=" 1.0 ">'))
    yield good("bad-utf-8", one_image(xml=xml.replace(b"by hand", b"M\xfcller")))
    yield good("white-space-first", one_image(xml=b"\n " + xml))
    yield good("doctype", one_image(declaration=DECLARATION + "<!DOCTYPE xisf>"))
    yield good("comment", one_image(declaration=DECLARATION + "<!-- XISF <Image> --!>".replace("--!", "--")))
    yield good("signature-follows", one_image(end="</xisf><Signature>abc</Signature>"))
    yield good("control-characters",
               one_image(children='<FITSKeyword name="A" value="\'x\x01&#2;&#x1F;y\'" comment=""/>'))
    yield good("reserved-not-zero", header[:12] + b"\xff\x00\x01\x02" + header[16:])
    yield bad("utf-16", one_image(xml=xml.decode().encode("utf-16")), "XML")
    yield bad("unclosed", one_image(end=""), "XML")
    yield bad("malformed", one_image(children="<a><b></a></b>"), "XML")
    yield bad("attribute-twice", one_image(children='<a b="1" b="2"/>'), "XML")
    yield bad("undefined-entity", one_image(children="&nope;"), "XML")
    prefixed = '<x:xisf xmlns:x="http://www.pixinsight.com/xisf" version="1.0"></x:xisf>'
    yield bad("prefixed-root", one_image(xml=prefixed), "1.0")
    for text in ("1.1", "2.0", "1", ""):
        yield bad("version-" + text, one_image(root='<xisf version="%s">' % text), "1.0")
    yield bad("version-missing", one_image(root="<xisf>"), "1.0")
    yield bad("other-root", monolithic('<html version="1.0"></html>'), "1.0")
    yield bad("signature-wrong", b"XISF0200" + header[8:], "XISF")
    yield bad("fits-file", b"SIMPLE  =                    T".ljust(2880), "XISF")
    yield bad("png-file", b"\x89PNG\r\n\x1a\n" + bytes(100), "XISF")
    yield bad("empty-file", b"", "XISF")
    for length in (0, 1, 64, len(xml) - 1, len(xml) - 8):
        yield bad("header-length-%d" % length, one_image(length=length), "XML")
    for length in (len(header), 2 ** 31, 2 ** 32 - 1):
        yield bad("header-length-%d" % length, one_image(length=length), "cut short")
    for cut in (0, 4, 7, 8, 11, 12, 15, 16, 17, 100, 15 + len(xml), 16 + len(xml), 8191, 8192, 8193, len(header) - 1):
        yield bad("cut-at-%d" % cut, header[:cut], "cut short|XISF")

    # Bombs in the header
    entities = "".join('<!ENTITY e%d "%s">' % (i, ("&e%d;" % (i - 1)) * 10 if i else "ha") for i in range(10))
    for name, doctype in (("bomb", entities), ("external", '<!ENTITY x SYSTEM "file:///etc/passwd">'),
                          ("hidden", '<!EN\x01TI&#2;TY x "y">'), ("parameter", '<!ENTITY % x "y">'), ("defaults", '<!ATTLIST a b CDATA "%s">' % ("x" * 1000))):
        yield bad("entity-" + name, one_image(declaration=DECLARATION + "<!DOCTYPE xisf [" + doctype + "]>",
                                              children="&e9;" if name == "bomb" else ""), "entities")
    yield bad("nested-100000-deep", one_image(children="<a>" * 50000 + "</a>" * 50000, position=500000),
              "header|version")
    yield bad("elements-by-the-million", one_image(children="<a/>" * 1_000_000, position=5_000_000), "header too large")
    yield bad("attributes-by-the-million", one_image(children="<a b='' c=''/>" * 600_000, position=9_000_000),
              "header too large")
    yield good("text-of-1-MB", one_image(children='<Property id="A" type="String">' + "x" * 1_000_000 + "</Property>",
                                         position=1 << 20))

    # Metadata that must not cost the picture
    for name, metadata in (("none", ""), ("empty", "<Metadata/>"), ("two", METADATA * 2),
                           ("unknown", "<Metadata><x/>y</Metadata>"),
                           ("no-id", '<Metadata><Property type="String">x</Property></Metadata>')):
        yield good("metadata-" + name, one_image(metadata=metadata))
    yield good("unknown-children", one_image(children="<Frob a='1'>text<x/></Frob>",
                                             outside="<Frob/><Property id='A:b' type='Int32' value='1'/>"))
    for text in ('<FITSKeyword name="A" value="1"/>', '<FITSKeyword name="A" comment="c"/>', '<FITSKeyword name="A"/>',
                 '<FITSKeyword value="1" comment=""/>', "<FITSKeyword/>", '<FITSKeyword name="" value="" comment=""/>',
                 '<FITSKeyword name="lower case and long" value="what \'ever" comment="&lt;&amp;"/>'):
        yield good("keyword-" + text[13:30], one_image(children=text))
    for kind, value in (("Float64", "NaN"), ("Float64", "Inf"), ("Float32", "-inf"), ("Float64", ""),
                        ("Float64", "word"), ("Int32", "1.5"), ("Boolean", "1"), ("Boolean", "perhaps"),
                        ("UInt8", "-1"), ("Complex64", "(1,2)"), ("TimePoint", "yesterday"), ("Frob", "1"), ("", "1"),
                        ("Int128", "9" * 40), ("String", "in the wrong place")):
        attributes = {"id": "A:b", "type": kind, "value": value}
        yield good("property-%s-%s" % (kind, value), one_image(children=tag("Property", attributes)))
    vector = base64.b64encode(struct.pack("<2d", 1, 2)).decode()
    for name, attributes, text in (
            ("no-type", {"id": "A"}, ""), ("no-id", {"type": "Int32", "value": "1"}, ""), ("nothing", {}, ""),
            ("no-value", {"id": "A", "type": "Float64"}, ""),
            ("bad-id", {"id": "1:;", "type": "Int32", "value": "1"}, ""),
            ("hex-vector", {"id": "A", "type": "F64Vector", "length": 2, "location": "inline:hex"},
             struct.pack("<2d", 1, 2).hex()),
            ("empty-vector", {"id": "A", "type": "F64Vector", "length": 0, "location": "inline:base64"}, ""),
            ("matrix", {"id": "A", "type": "Matrix", "rows": 1, "columns": 2, "location": "inline:base64"}, vector),
            ("big-endian", {"id": "A", "type": "F64Vector", "length": 2, "byteOrder": "big",
                            "location": "inline:base64"}, vector),
            ("wrong-length", {"id": "A", "type": "F64Vector", "length": 7, "location": "inline:base64"}, vector),
            ("attached", {"id": "A", "type": "UI8Vector", "length": 9, "location": "attachment:8192:9"}, "")):
        yield good("property-" + name, one_image(children=tag("Property", attributes, text)))
    for name, location, more in (("beyond", "attachment:8192:1000000000000", {}), ("in-header", "attachment:16:8", {}),
                                 ("path", "path(/etc/passwd)", {}), ("malformed", "attachment:x", {}),
                                 ("checksum", "attachment:8192:9", {"checksum": "sha-1:00"}),
                                 ("base64", "inline:base64", {})):
        attributes = dict({"id": "A:Broken", "type": "UI8Vector", "length": 9, "location": location}, **more)
        yield good("property-lost-" + name, one_image(children=tag("Property", attributes, "***" * (name == "base64"))),
                   says="A:Broken")
