"""Every real XISF in, nothing lost out, and nothing wrong taken in silence.

BGOPT_FUZZ=5000 raises the number of fuzzed files a test (default 100).
"""
import base64
import hashlib
import io
import os
import re
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from pathlib import Path
from xml.etree import ElementTree

import lz4.block
import numpy as np
import pytest
import xisf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bgoptimizer as bg
from scenes import REAL
from xisf_files import POSITION, monolithic, one_image, picture, rows, shuffled, tag

ROWS = list(rows())
needs_real_files = pytest.mark.skipif(not (REAL / "pixinsight").is_dir(), reason="the real files are not here")
FUZZ = settings(max_examples=int(os.environ.get("BGOPT_FUZZ", 100)), deadline=None, database=None,
                suppress_health_check=list(HealthCheck))
XISF = "{http://www.pixinsight.com/xisf}"


# ------------------------------------------------------------------------------------------------ helpers

def read(data, folder):
    path = folder / "in.xisf"
    path.write_bytes(data)
    return bg.read_xisf(str(path))


def written(planes, source=None, history=(), compress=False, **more):
    file = io.BytesIO()
    bg.write_xisf(file, planes, source, history, compress, **more)
    return file.getvalue()


def rewritten(data, folder, **more):
    """The picture in `data`, read and written, as a strict reader sees it."""
    shot = read(data, folder)
    return Walked(written(shot.planes, shot.source, **more))


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True)


class Walked:
    """A file as a strict reader sees it: nothing is forgiven."""

    def __init__(self, data):
        self.data = data
        assert data[:8] == b"XISF0100"
        length, reserved = struct.unpack("<II", data[8:16])
        assert length >= 65 and reserved == 0
        xml = data[16:16 + length]
        assert xml.startswith(b'<?xml version="1.0" encoding="UTF-8"?><xisf ') and xml.endswith(b"</xisf>")
        assert b"\0" not in xml
        self.root = ElementTree.fromstring(xml.decode("utf-8", "strict").split("?>", 1)[1])
        assert self.root.tag == XISF + "xisf" and self.root.attrib["version"] == "1.0" and not self.root.text
        assert self.root.attrib["{http://www.w3.org/2001/XMLSchema-instance}schemaLocation"] == (
            "http://www.pixinsight.com/xisf http://pixinsight.com/xisf/xisf-1.0.xsd")
        (self.metadata,) = self.root.findall(XISF + "Metadata")
        (self.image,) = self.root.findall(XISF + "Image")
        ids = [child.get("id") for child in self.metadata]
        assert ids.count("XISF:CreationTime") == ids.count("XISF:CreatorApplication") == 1
        (created,) = [child for child in self.metadata if child.get("id") == "XISF:CreationTime"]
        assert created.get("type") == "TimePoint" and re.fullmatch(
            r"\d{4}(-\d\d){2}T(\d\d:){2}\d\dZ", created.get("value"))

        spans = {(0, 16 + length)}
        for element in self.root.iter():
            location = element.get("location", "inline:")
            if location.startswith("attachment:"):
                position, size = re.fullmatch(r"attachment:([1-9]\d*):([1-9]\d*)", location).groups()
                assert int(position) % 4096 == 0
                spans.add((int(position), int(position) + int(size)))
            else:
                assert location.split(":")[0] in ("inline", "embedded")
        spans = sorted(spans)
        for (_, end), (start, _) in zip(spans, spans[1:]):
            assert end <= start and not data[end:start].strip(b"\0"), "blocks overlap or gaps are not empty"
        assert spans[-1][1] == len(data)
        for keyword in self.image.findall(XISF + "FITSKeyword"):
            assert set(keyword.attrib) == {"name", "value", "comment"}

    def block(self, element):
        method, *where = element.get("location").split(":")
        if method == "inline":
            return base64.b64decode(element.text or "") if where[0] == "base64" else bytes.fromhex(element.text)
        return self.data[int(where[0]):int(where[0]) + int(where[1])]

    def planes(self):
        image = self.image
        assert not {"subblocks", "byteOrder", "pixelStorage", "offset"} & set(image.attrib)
        w, h, c = (int(number) for number in image.get("geometry").split(":"))
        assert image.get("colorSpace") == {1: "Gray", 3: "RGB"}[c] and image.get("bounds") == "0:1"
        dtype = np.dtype({"Float32": "<f4", "Float64": "<f8"}[image.get("sampleFormat")])
        block = self.block(image)
        if image.get("checksum"):
            assert image.get("checksum") == "sha1:" + hashlib.sha1(block).hexdigest()
        if image.get("compression"):
            codec, size, item = image.get("compression").split(":")
            assert codec == "lz4hc+sh" and int(item) == dtype.itemsize and len(block) < int(size)
            block = lz4.block.decompress(block, uncompressed_size=int(size))
            block = b"".join(bytes(row) for row in np.frombuffer(block, np.uint8).reshape(int(item), -1).T)
        return np.frombuffer(block, dtype).reshape(c, h, w)

    def properties(self):
        return [(p.get("id"), p.get("type"), p.get("value"), p.text) for p in self.image.findall(XISF + "Property")]

    def keywords(self):
        return [(k.get("name"), k.get("value"), k.get("comment")) for k in self.image.findall(XISF + "FITSKeyword")]


# ------------------------------------------------------------------------------------------------ reading

@pytest.mark.parametrize("row", [row for row in ROWS if row.planes is not None], ids=lambda row: row.name)
def test_what_pixinsight_reads_is_read_with_the_right_pixels(row, tmp_path):
    shot = read(row.data, tmp_path)
    expected = row.planes.astype("f8" if row.planes.dtype == np.float64 else "f4")
    assert same(shot.planes, expected) and shot.planes.flags.c_contiguous
    assert re.search(row.says, "\n".join(shot.warnings)) if row.says else not shot.warnings
    assert not any("\n" in line for line in shot.warnings)


@pytest.mark.parametrize("row", [row for row in ROWS if row.planes is None], ids=lambda row: row.name)
def test_what_is_broken_or_hostile_is_refused_in_one_line_at_once_and_cheaply(row, tmp_path):
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with pytest.raises(bg.BgError, match=row.says) as refusal:
            read(row.data, tmp_path)
        taken, memory = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    sentence = str(refusal.value)
    assert sentence.startswith(str(tmp_path / "in.xisf")) and "\n" not in sentence and ";" in sentence
    assert len(sentence) - len(str(tmp_path)) < 250
    assert taken < 2 and memory < 5 * len(row.data) + 50e6  # tracing memory makes it slower than it is


def test_all_bombs_together_stay_below_300_MB(tmp_path):
    """Memory that C libraries take is not seen by tracemalloc: ask the kernel."""
    hostile = [row for row in ROWS
               if row.planes is None and re.search("bomb|absurd|10\\^15|million|lying|geometry", row.name)]
    assert len(hostile) > 20
    for number, row in enumerate(hostile):
        (tmp_path / "{}.xisf".format(number)).write_bytes(row.data)
    if not Path("/proc/self/status").exists():
        pytest.skip("only Linux tells a program its own peak; "
                    "getrusage reports that of the process it was forked from too")
    program = ("import resource, sys, pathlib\n"
               "resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))\n"
               "sys.path[:0] = {!r}\n"
               "import {} as bg\n"
               "for path in pathlib.Path({!r}).iterdir():\n"
               "    try: bg.read_xisf(str(path)); print('taken', path)\n"
               "    except bg.BgError: pass\n"
               "print([int(line.split()[1]) >> 10 for line in open('/proc/self/status') "
               "if line.startswith('VmHWM')][0])\n")
    program = program.format([str(Path(bg.__file__).parent)], bg.__name__, str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    assert int(done.stdout) < 300


def test_a_property_cannot_make_the_file_be_read_over_and_over(tmp_path):
    """A thousand properties with checksums over the same megabytes, each shifted by one byte."""
    body = bytes(2_000_000)
    text = "".join(tag("Property", {"id": "A:p%d" % i, "type": "UI8Vector", "length": 1, "checksum": "sha-1:00",
                                    "location": "attachment:%d:%d" % (300_000 + i, 1_900_000)}) for i in range(1000))
    start = time.perf_counter()
    shot = read(one_image(children=text, position=300_000) + body, tmp_path)
    assert time.perf_counter() - start < 2
    assert len(shot.warnings) == 1 and "1000 element(s)" in shot.warnings[0] and len(shot.warnings[0]) < 400


def test_a_property_that_is_lost_leaves_no_data_behind(tmp_path):
    table = ('<Table id="A:T"><Row><Cell location="attachment:8192:50"/>'
             '<Cell location="attachment:1:1"/></Row></Table>')
    shot = read(one_image(children=table), tmp_path)
    assert "A:T" in shot.warnings[0] and not shot.source.blocks
    assert Walked(written(shot.planes, shot.source)).image.find(XISF + "Table") is None


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(str(tmp_path / "fifo"))
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for name, says in (("", "not a file"), ("fifo", "not a file"), ("missing.xisf", "No such file"),
                       ("gone", "No such file"), ("fifo/x", "Not a directory")):
        with pytest.raises(bg.BgError, match=says):
            bg.read_xisf(str(tmp_path / name))
    with pytest.raises(bg.BgError, match="not a file"):
        bg.read_xisf("/dev/zero")


def test_a_file_that_may_not_be_read_or_fails_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "in.xisf"
    path.write_bytes(one_image())

    def fail(*_, **__):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", fail)
        with pytest.raises(bg.BgError, match="Permission denied"):
            bg.read_xisf(str(path))
    with monkeypatch.context() as patch:
        patch.setattr(bg.np, "empty", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(bg.BgError, match="memory"):
            bg.read_xisf(str(path))


def test_reading_leaves_the_file_alone_and_prints_nothing(tmp_path, capfd):
    data = one_image(children=tag("Property", {"id": "A", "type": "Frob"}))
    read(data, tmp_path)
    assert (tmp_path / "in.xisf").read_bytes() == data
    assert capfd.readouterr() == ("", "")


def test_every_row_survives_being_rewritten(tmp_path):
    """Whatever was read is written legally, and read again with the same pixels and without new losses."""
    for row in ROWS:
        if row.planes is not None:
            shot = read(row.data, tmp_path)
            for compress in (False, True):
                data = written(shot.planes, shot.source, ["a line"], compress)
                if not re.search("keyword|property|metadata", row.name):  # rows that are illegal and kept as they stand
                    assert same(Walked(data).planes(), shot.planes), row.name
                again = read(data, tmp_path)
                assert same(again.planes, shot.planes), row.name
                assert not [line for line in again.warnings if "mosaic" not in line], row.name


# ------------------------------------------------------------------------------------------------ real files

@needs_real_files
def test_pixinsights_nine_files_hold_one_picture_per_kind():
    shots = {path.name: bg.read_xisf(str(path)) for path in sorted((REAL / "pixinsight").glob("*.xisf"))}
    assert len(shots) == 9 and not any(shot.warnings for shot in shots.values())
    by_name = {name[len("xisf-image-"):-len(".xisf")]: shot.planes for name, shot in shots.items()}
    rgb = [by_name["rgb-256x256-" + kind] for kind in ("8bits", "16bits", "32bits")]
    assert all(planes.shape == (3, 256, 256) for planes in rgb)
    for bits, planes in zip((8, 16), rgb):  # the same picture, rounded to 8 and 16 bits
        assert np.abs(planes - rgb[2]).max() <= 0.51 / (2 ** bits - 1) + 1e-7
    assert len(np.unique(rgb[2])) > 2 and not np.array_equal(rgb[2][0], rgb[2][1])
    for kind in ("gray-256x256-8bits", "rgb-256x256-8bits-compressed"):  # the second is gray, in an embedded block
        assert by_name[kind].shape == (1, 256, 256) and (by_name[kind] == 1).all()
    for kind, dtype in (("gray-256x256-float-32bits", np.float32), ("gray-256x256-float-64bits", np.float64)):
        assert by_name[kind].shape == (1, 255, 255) and by_name[kind].dtype == dtype and (by_name[kind] == 1).all()
    for kind, mean, spread in (("gray-256x256-16bits-zlib", 74.49, 3.2), ("gray-256x256-16bits-zlib_sh", 2220.4, 705)):
        planes = by_name[kind] * 65535.0  # sky: neighbors are alike, which garbage is not
        assert planes.mean() == pytest.approx(mean, rel=0.01)
        assert np.abs(np.diff(planes)).mean() < spread, np.abs(np.diff(planes)).mean()


@pytest.mark.slow
@needs_real_files
def test_m27_is_read_verified_and_keeps_keywords_properties_and_plate_solution(tmp_path):
    data = (REAL / "m27.xisf").read_bytes()
    shot = bg.read_xisf(str(REAL / "m27.xisf"))
    packed = data[3272:3272 + 4209751]
    assert hashlib.sha1(packed).hexdigest() == "7256df59b3d35c51805dad2b6dc0e145eacbd034"
    stored = np.frombuffer(lz4.block.decompress(packed, uncompressed_size=7636224), np.uint8)
    truth = (stored[:3818112].astype("u2") + (stored[3818112:].astype("u2") << 8)).reshape(3, 976, 1304)
    assert same(shot.planes, (truth / 65535.0).astype("f4")) and not shot.warnings

    damaged = bytearray(data)
    damaged[1_000_000] ^= 1
    with pytest.raises(bg.BgError, match="checksum"):
        read(bytes(damaged), tmp_path)

    before = ElementTree.fromstring(data[16:16 + 3256]).find(XISF + "Image")
    for compress in (False, True):
        after = Walked(written(shot.planes, shot.source, ["HISTORY line"], compress))
        assert same(after.planes(), shot.planes)
        kept = [(k.attrib["name"], k.attrib["value"], k.attrib["comment"])
                for k in before.findall(XISF + "FITSKeyword")]
        assert len(kept) == 7 and after.keywords() == kept + [("HISTORY", "", "HISTORY line")]
        old, new = before.findall(XISF + "Property"), after.image.findall(XISF + "Property")
        assert len(old) == 12 and [(p.attrib, p.text) for p in old] == [(p.attrib, p.text) for p in new]
        assert after.image.get("id") == "integration"
        assert after.image.find(XISF + "Resolution").attrib == before.find(XISF + "Resolution").attrib


@needs_real_files
def test_the_xisf_package_reads_what_we_write(tmp_path):
    """Other programs build on it: our files must not need a better reader than theirs."""
    from xisf import XISF as package
    shot = bg.read_xisf(str(REAL / "m27.xisf"))
    for compress in (False, True):
        (tmp_path / "out.xisf").write_bytes(written(shot.planes, shot.source, ["a line"], compress))
        theirs = package(str(tmp_path / "out.xisf"))
        assert np.array_equal(theirs.read_image(0, "channels_first"), shot.planes)
        properties = theirs.get_images_metadata()[0]["XISFProperties"]
        assert np.array_equal(properties["PCL:AstrometricSolution:ReferenceImageCoordinates"]["value"], [652, 488])


def test_the_xisf_package_still_keeps_what_it_reads_by_in_the_two_attributes_that_we_set(tmp_path):
    """They are private to the package: should it change, this says so first."""
    path = str(tmp_path / "in.xisf")
    samples = picture()[0]
    block = zlib.compress(shuffled(samples.tobytes(), 2))
    Path(path).write_bytes(one_image(block=block, compression="zlib+sh:182:2"))
    theirs = xisf.XISF(path)
    (described,) = theirs.get_images_metadata()
    assert theirs._fname == path and theirs._images_meta is theirs.get_images_metadata()
    known = {"geometry": (13, 7, 1), "location": ("attachment", POSITION, len(block)), "dtype": np.dtype("uint16"),
             "compression": ("zlib+sh", 182, 2)}
    assert {name: described[name] for name in known} == known
    ours = bg._BlockReader(path, known)
    assert set(vars(ours)) == {"_fname", "_images_meta"} <= set(vars(theirs))
    assert same(ours.read_image(0, "channels_first"), samples)
    known["location"], known["value"] = ("inline", "base64"), base64.b64encode(block)
    assert same(bg._BlockReader(None, known).read_image(0, "channels_first"), samples)


@pytest.mark.parametrize("name", ["Float32-3-little", "UInt16-1-big-normal", "lz4-float32-3-4", "embedded-hex"])
def test_the_xisf_package_reads_the_pixels(name, tmp_path, monkeypatch):
    (row,) = [row for row in ROWS if row.name == name]
    read_image = xisf.XISF.read_image
    monkeypatch.setattr(xisf.XISF, "read_image", lambda *arguments: np.zeros_like(read_image(*arguments)))
    assert not read(row.data, tmp_path).planes.any()


# ------------------------------------------------------------------------------------------------ writing

ICC = bytes(range(256)) * 3
VECTOR, MATRIX = struct.pack("<1000d", *range(1000)), zlib.compress(shuffled(struct.pack(">600f", *range(600)), 4))
BLOCKS = [ICC, VECTOR, MATRIX]


def full_file(**more):
    """A file with everything users have complained about losing."""
    end = POSITION + picture(channels=3)[0].nbytes
    places, position = [], end + 13  # unaligned on purpose
    for block in BLOCKS:
        places.append("attachment:{}:{}".format(position, len(block)))
        position += len(block) + 5
    keywords = [("OBJECT", "'O''Neil  '", "target \u00e4\u00b0\u00b5"), ("DIGITS", "'0042'", ""),
                ("HISTORY", "", "one"), ("EXPTIME", "36.", "[s] &lt;unit&gt;"), ("COMMENT", "", "two &amp; three"),
                ("HISTORY", "", "three"), ("FLAG", "T", ""), ("EMPTY", "", ""), ("ODD", "1.0D5", "&quot;quoted&quot;"),
                ("OBJECT", "'again'", ""), ("LEAD", "'   lead'", "")]
    children = "\n  ".join(
        ['<FITSKeyword name="%s" value="%s" comment="%s"/>' % keyword for keyword in keywords]
        + ['<ICCProfile location="%s"/>' % places[0],
           '<RGBWorkingSpace gamma="sRGB" x="0.64:0.3:0.15" y="0.33:0.6:0.06" Y="0.2:0.7:0.1"/>',
           '<Resolution horizontal="72.5" vertical="300" unit="cm"/>',
           '<ColorFilterArray pattern="RGGB" width="2" height="2" name="x"/>',
           '<DisplayFunction m="0.1:0.2:0.3:0.5" s="0:0:0:0" h="1:1:1:1" l="0:0:0:0" r="1:1:1:1" name="STF"/>',
           '<Property id="PCL:AstrometricSolution:SplineWorldTransformation:PointGridInterpolation" '
           'type="F64Vector" length="1000" location="%s" checksum="sha-256:%s"/>'
           % (places[1], hashlib.sha256(VECTOR).hexdigest()),
           '<Property id="A:Again" type="F64Vector" length="1000" location="%s"/>' % places[1],
           '<Property id="A:Matrix" type="F32Matrix" rows="20" columns="30" byteOrder="big" '
           'compression="zlib+sh:2400:4" location="%s"/>' % places[2],
           '<Property id="A:Small" type="F64Vector" length="1" location="inline:base64">AAAAAAAA8D8=</Property>',
           '<Property id="A:Empty" type="String"/>',
           '<Property id="A:Text" type="String">  \u00e4 &lt;x&gt; &#13;\n two  </Property>',
           '<Property id="A:True" type="Boolean" value="1"/>', '<Property id="A:False" type="Boolean" value="False"/>',
           '<Property id="A:Unit" type="Float64" value="1e-300" comment="m/s" format="unit:m/s"/>',
           '<Property id="A:Unit" type="Float64" value="NaN" comment="repeated"/>',
           '<Property id="A:Time" type="TimePoint" value="2018-09-07T22:31:45.123+02:00"/>',
           '<Property id="A:Odd" type="Frob" value="kept as it stands"/>',
           '<Property id="Processing:History" type="String">first step</Property>',
           '<Table id="T:able"><Structure><Field id="a" type="Int32"/></Structure><Row><Cell value="1"/></Row></Table>',
           '<Thumbnail geometry="1:1:1" sampleFormat="UInt8" location="embedded"><Data>AA==</Data></Thumbnail>',
           '<Unknown x:y="1" xmlns:x="urn:x">a<b/>c</Unknown>', '<Reference ref="later"/>'])
    metadata = ('<Metadata><Property id="XISF:CreationTime" type="String">2019-09-15T20:24:28Z</Property>'
                '<Property id="XISF:CreatorOS" type="String">OS/2</Property>'
                '<Property id="XISF:BlockAlignmentSize" type="UInt16" value="0"/>'
                '<Property id="XISF:Authors" type="String">J\u00f6rg</Property>'
                '<Property id="XISF:OriginalCreationTime" type="TimePoint" value="2015-01-01T00:00:00Z"/>'
                '<Property id="XISF:CompressionLevel" type="Int32" value="9"/></Metadata>')
    outside = ('<Property id="File:Loose" type="Int32" value="5"/>'
               '<RGBWorkingSpace uid="later" gamma="2.2"/><Mystery a="1"/>')
    blocks = b"".join(block + bytes(5) for block in BLOCKS)
    return keywords, one_image(
        picture(channels=3)[0], children="\n " + children + "\n", metadata=metadata, outside=outside, id="M31",
        imageType="Light", orientation="flip", **more) + bytes(13) + blocks


def test_nothing_users_care_for_is_lost(tmp_path):
    keywords, data = full_file()
    for compress in (False, True):
        after = rewritten(data, tmp_path, history=["line"], compress=compress)
        unescaped = [tuple(ElementTree.fromstring("<a>%s</a>" % part).text or "" for part in keyword)
                     for keyword in keywords]
        assert after.keywords() == unescaped + [("HISTORY", "", "line")]
        find = {child.tag[len(XISF):]: child for child in after.image}
        assert after.block(find["ICCProfile"]) == ICC
        assert find["Resolution"].attrib == {"horizontal": "72.5", "vertical": "300", "unit": "cm"}
        assert find["DisplayFunction"].get("m") == "0.1:0.2:0.3:0.5" and find["DisplayFunction"].get("name") == "STF"
        assert find["ColorFilterArray"].get("pattern") == "RGGB"
        assert find["Unknown"].text == "a" and find["Unknown"][0].tail == "c" and find["Unknown"].get("{urn:x}y") == "1"
        assert find["Table"][1][0].get("value") == "1"
        spaces = after.image.findall(XISF + "RGBWorkingSpace")
        assert spaces[0].get("Y") == "0.2:0.7:0.1"
        assert spaces[1].get("gamma") == "2.2", "the reference's target moves in"
        assert {name: after.image.get(name) for name in ("id", "imageType", "orientation")} == {
            "id": "M31", "imageType": "Light", "orientation": "flip"}

        properties = {p.get("id"): p for p in after.image.findall(XISF + "Property")}
        spline = properties["PCL:AstrometricSolution:SplineWorldTransformation:PointGridInterpolation"]
        assert after.block(spline) == VECTOR
        assert spline.get("checksum") == "sha-256:" + hashlib.sha256(VECTOR).hexdigest()
        assert spline.get("location") == properties["A:Again"].get("location"), "one block for both"
        matrix = properties["A:Matrix"]
        assert after.block(matrix) == MATRIX
        assert matrix.get("compression") == "zlib+sh:2400:4" and matrix.get("byteOrder") == "big"
        assert after.block(properties["A:Small"]) == struct.pack("<d", 1)
        assert not properties["A:Empty"].text and "value" not in properties["A:Empty"].attrib
        assert properties["A:Text"].text == "  \u00e4 <x> \r\n two  "
        assert properties["A:True"].get("value") == "true" and properties["A:False"].get("value") == "false"
        assert [p[2] for p in after.properties() if p[0] == "A:Unit"] == ["1e-300", "NaN"]
        assert properties["A:Unit"].get("comment") == "repeated"
        assert properties["A:Time"].get("value") == "2018-09-07T22:31:45.123+02:00"
        assert properties["A:Odd"].get("value") == "kept as it stands"
        assert properties["Processing:History"].text == "first step\nline"
        assert after.root.find(XISF + "Property").get("id") == "File:Loose"
        assert after.root.find(XISF + "Mystery") is not None


def test_what_new_pixels_make_untrue_is_dropped_and_said(tmp_path):
    keywords = "".join('<FITSKeyword name="%s" value="1" comment=""/>' % name for name in (
        "BITPIX", "NAXIS", "NAXIS1", "BSCALE", "BZERO", "DATAMAX", "CHECKSUM", "PEDESTAL", "NOISE00", "NAXISX", "GAIN"))
    properties = tag("Property", {"id": "Image:Statistics:Mean", "type": "Float64", "value": "1"})
    checksum = "sha-1:" + hashlib.sha1(picture()[0].tobytes()).hexdigest()
    data = one_image(children=keywords + properties, checksum=checksum, offset="100", byteOrder="little",
                     pixelStorage="Planar")
    after = rewritten(data, tmp_path)
    assert [keyword[0] for keyword in after.keywords()] == ["NAXISX", "GAIN"] and not after.properties()
    assert not {"offset", "byteOrder", "pixelStorage"} & set(after.image.attrib)
    assert after.image.get("checksum") != checksum, "one of the new pixels"
    after.planes()
    assert re.search("BITPIX.*PEDESTAL.*Statistics", "\n".join(read(data, tmp_path).warnings))
    after = rewritten(full_file()[1], tmp_path)
    assert after.image.find(XISF + "Thumbnail") is None


def test_metadata_describe_the_new_file_and_keep_the_authors(tmp_path):
    after = rewritten(full_file()[1], tmp_path)
    properties = {p.get("id"): p.get("value") or p.text for p in after.metadata}
    assert properties["XISF:CreatorApplication"] == "bgoptimizer " + bg.VERSION
    assert properties["XISF:Authors"] == "J\u00f6rg"
    assert properties["XISF:OriginalCreationTime"] == "2015-01-01T00:00:00Z"
    assert len(properties) == 4 and properties["XISF:CreationTime"] > "2020"


def test_history_lines_are_split_and_control_characters_dropped(tmp_path):
    lines = ["short \u00e4", "word " * 40, "x" * 100, "a\0b\x07c\ud800d", "", "<&\">'"]
    after = rewritten(one_image(), tmp_path, history=lines)
    assert all(name == "HISTORY" and value == "" and 0 < len(comment) <= 72
               for name, value, comment in after.keywords())
    comments = [comment for _, _, comment in after.keywords()]
    assert "".join(comments).replace(" ", "") == "".join(lines[:3]).replace(" ", "") + "abcd" + "<&\">'"


def test_writing_changes_neither_source_nor_pixels(tmp_path):
    shot = read(full_file()[1], tmp_path)
    planes, first = shot.planes.copy(), written(shot.planes, shot.source, ["one"], True)
    second = written(shot.planes, shot.source, ["one"], True)
    assert Walked(first).keywords() == Walked(second).keywords() and same(planes, shot.planes)
    bare = Walked(written(np.ones((1, 2, 3), np.float32)))
    assert len(bare.image) == 0 and same(bare.planes(), np.ones((1, 2, 3), np.float32))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 9), (3, 9, 1), (1, 8, 16384), (3, 300, 200)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pixels_come_back_bit_for_bit(shape, dtype, tmp_path):
    rng = np.random.RandomState(1)
    planes = (rng.rand(*shape) * 0.1).astype(dtype)
    planes.flat[0], planes.flat[-1] = np.nan, np.inf
    views = [planes, planes[:, ::-1], np.asfortranarray(planes), planes.astype(planes.dtype.newbyteorder(">"))]
    for view in views:
        for compress in (False, True):
            data = written(view, compress=compress)
            assert np.array_equal(Walked(data).planes(), view, equal_nan=True)
            assert np.array_equal(read(data, tmp_path).planes, view, equal_nan=True)


def test_what_does_not_shrink_is_not_called_compressed(tmp_path):
    noise = np.frombuffer(np.random.RandomState(2).bytes(4 * 90), np.uint32) % 0x3F800000  # any float in [0, 1)
    planes = noise.astype(np.uint32).view(np.float32).reshape(1, 9, 10)
    after = Walked(written(planes, compress=True))
    assert "compression" not in after.image.attrib and same(after.planes(), planes)


def test_pictures_beyond_the_lz4_limit_are_compressed_with_zstd(tmp_path, monkeypatch):
    """PixInsight reads no LZ4 sub-blocks above 2 GiB; one zstd frame that states its size it does."""
    planes = picture("Float32", 3, 400, 300)[0]
    monkeypatch.setattr(bg, "LZ4_LIMIT", 1000)
    data = written(planes, compress=True)
    image = Walked(data).image
    assert image.get("compression") == "zstd+sh:{}:4".format(planes.nbytes) and "subblocks" not in image.attrib
    assert same(read(data, tmp_path).planes, planes)
    noise = np.frombuffer(np.random.RandomState(2).bytes(4 * 900), np.uint32) % 0x3F800000
    planes = noise.astype(np.uint32).view(np.float32).reshape(1, 9, 100)
    assert same(Walked(written(planes, compress=True)).planes(), planes)


def test_planes_that_are_made_one_by_one_are_written_one_by_one(tmp_path):
    class Planes:
        shape, dtype, made = (3, 40, 50), np.dtype(np.float32), 0

        def __iter__(self):
            for k in range(3):
                self.made += 1
                yield np.full((40, 50), k / 4, np.float32)

    for compress in (False, True):
        planes = Planes()
        after = Walked(written(planes, compress=compress)).planes()
        assert planes.made == 3 and (after == np.float32([0, 0.25, 0.5])[:, None, None]).all()


def test_an_illegal_name_of_the_image_is_not_kept(tmp_path):
    assert "id" not in rewritten(one_image(id="1 bad-id"), tmp_path).image.attrib
    assert rewritten(one_image(id="M_31"), tmp_path).image.get("id") == "M_31"


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("place", ["none", "image", "embedded"])
def test_pixels_get_a_checksum_if_they_had_one_or_are_compressed(place, compress, tmp_path):
    data = picture()[0].tobytes()
    checksum = "sha-256:" + hashlib.sha256(data).hexdigest()
    child = tag("Data", {"checksum": checksum, "encoding": "hex"}, data.hex())
    source = {"none": one_image(), "image": one_image(checksum=checksum),
              "embedded": one_image(location="embedded", children=child)}[place]
    shot = read(source, tmp_path)
    for planes in (shot.planes, np.zeros((3, 500, 500), np.float32), np.asfortranarray(shot.planes)):
        output = written(planes, shot.source, compress=compress)
        after = Walked(output)
        assert ("checksum" in after.image.attrib) == (place != "none" or compress)
        assert same(after.planes(), planes), "compares the checksum too"
        if "checksum" in after.image.attrib:
            with pytest.raises(bg.BgError, match="checksum"):
                read(output[:-1] + bytes([output[-1] ^ 1]), tmp_path)


@pytest.mark.parametrize("shape", [(2, 4, 5), (4, 4, 5), (4, 5), (1, 1, 4, 5), (0, 4, 5), (1, 0, 5), (1, 4, 0)])
def test_shapes_that_could_not_be_read_back_are_not_written(shape):
    file = io.BytesIO()
    with pytest.raises(ValueError, match="planes must be"):
        bg.write_xisf(file, np.zeros(shape, np.float32))
    assert not file.getvalue()


@pytest.mark.parametrize("dtype", ["f2", "u2", "u1", "i4", "c8", "?", "longdouble"])
def test_types_that_could_not_be_read_back_are_not_written(dtype):
    with pytest.raises(ValueError, match="planes must be"):
        bg.write_xisf(io.BytesIO(), np.zeros((1, 4, 5), dtype))


# ------------------------------------------------------------------------------------------------ faults

BLANKS = " " * 300_000
SLOW = {
    "geometry": {"geometry": "13" + BLANKS + "x:7:1"},
    "version": {"root": '<xisf version="1.0' + BLANKS + 'x">'},
    "boolean": {"children": '<Property id="A" type="Boolean" value="1' + BLANKS + 'x"/>'},
    "colons": {"geometry": "1:" * 3_000_000},
    "commas": {"location": "attachment" + " : ," * 1_000_000},
    "sub-blocks": {"compression": "zlib:182", "subblocks": "1,1:" * 2_000_000 + "1,1"},
    "label": {"declaration": "<?xml" + " encoding" * 900_000 + "?>"},
    "label-with-blanks": {"declaration": "<?xml encoding" + BLANKS + "?>"},
    "reference": {"children": "&#" + "0" * 5_000_000},
    "id": {"children": '<Property id="' + "a:" * 3_000_000 + '"/>'},
    "keyword": {"children": '<FITSKeyword name="NOISEA' + "0" * 3_000_000 + 'x"/>'},
    "references": {"children": "".join('<Reference ref="%d"/>' % i for i in range(20_000)),
                   "outside": "".join('<a uid="%d"/>' % i for i in range(20_000))},
}


@pytest.mark.parametrize("name", SLOW)
def test_no_text_in_a_header_takes_long_or_much_memory(name, tmp_path):
    data = one_image(position=1 << 24, **SLOW[name])
    (tmp_path / "in.xisf").write_bytes(data)
    tracemalloc.start()
    start = time.perf_counter()
    try:
        bg.read_xisf(str(tmp_path / "in.xisf"))
    except bg.BgError as refusal:
        assert len(str(refusal)) - len(str(tmp_path)) < 250
    finally:
        taken, memory = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert taken < 5 and memory < 12 * len(data)  # a text in Python takes up to four bytes a character


@pytest.mark.parametrize("children, kept", [
    ("<FITSKeyword/>" * 300, 300),
    ("<FITSKeyword/>" * 1500, None),  # mended, they are heavier
    ('<FITSKeyword name="A" value="1" comment="x"/>' * 750, None),
    ('<Property id="A" type="String">' + "x" * 190_000 + "</Property>", 1),
    ('<Property id="A" type="String">' + "\t" * 190_000 + "</Property>", 0),  # four times as long when written
    ("<FITSKeyword %s/>" % " ".join("a%d=''" % i for i in range(2820)) + "<Resolution/>", 1)],
    ids=["short", "many", "full", "text", "tabs", "attributes"])
def test_what_is_written_is_never_too_large_to_be_read(children, kept, tmp_path, monkeypatch):
    """As much is kept as leaves room for HISTORY; the rest is named, and the picture is never lost."""
    assert bg.MAX_KEPT_WEIGHT < bg.MAX_HEADER_WEIGHT
    monkeypatch.setattr(bg, "MAX_HEADER_WEIGHT", 1 << 18)  # small, to be quick
    monkeypatch.setattr(bg, "MAX_KEPT_WEIGHT", 3 << 16)
    shot = read(one_image(children=children, position=1 << 18), tmp_path)
    count = len(shot.source.root.find("Image"))
    assert kept is None and count > 150 or count == kept
    lost = re.search(r"loses (\d+) element.*does not fit into a header", "\n".join(shot.warnings))
    assert bool(lost) == (children.count("/") > count)
    for _ in range(3):
        again = read(written(shot.planes, shot.source, ["x" * 72] * 150), tmp_path)
        assert same(again.planes, shot.planes)
        shot = again


def test_many_damaged_sub_blocks_make_one_warning(tmp_path):
    data = picture()[0].tobytes()
    pieces = [data[start:start + 26] for start in range(0, 182, 26)]
    listed = ":".join(["27,26"] * 7)
    shot = read(one_image(block=b"x".join(pieces) + b"x", compression="zlib:182", subblocks=listed), tmp_path)
    assert same(shot.planes, picture()[1]) and len(shot.warnings) == 1


def test_a_header_without_room_for_an_image_is_refused(tmp_path):
    attributes = {"a%d" % i: "" for i in range(180_000)}
    with pytest.raises(bg.BgError, match="header too large"):
        read(one_image(position=1 << 24, **attributes), tmp_path)


@pytest.mark.parametrize("depth", [60, 61, 62, 63, 64])
def test_what_is_written_is_never_nested_too_deeply_to_be_read(depth, tmp_path):
    """An element that takes the place of a reference goes one level down."""
    nested = '<a uid="u">' + "<a>" * depth + "</a>" * depth + "</a>"
    data = one_image(children='<Reference ref="u"/>', outside=nested)
    if depth > 62:
        with pytest.raises(bg.BgError, match="nested too deeply"):
            read(data, tmp_path)
    else:
        shot = read(data, tmp_path)
        assert not read(written(shot.planes, shot.source), tmp_path).warnings


def test_elements_of_one_uid_are_all_kept(tmp_path):
    outside = '<Frob uid="u" n="1"/><Frob uid="u" n="2"/>'
    after = rewritten(one_image(children='<Reference ref="u"/>', outside=outside), tmp_path)
    assert len(list(after.root.iter(XISF + "Frob"))) == 2


def test_names_in_warnings_cannot_break_the_line_and_advice_is_always_given(tmp_path):
    shot = read(one_image(children='<Property id="Statistics:a&#10;b" type="Int32" value="1"/>'), tmp_path)
    assert len(shot.warnings) == 1 and "\n" not in shot.warnings[0]
    with pytest.raises(bg.BgError, match="; copy or save it again"):
        read(one_image(geometry="13;7;1"), tmp_path)


def test_an_expanding_zlib_stream_is_stopped_where_the_picture_ends(tmp_path):
    """Its block is not shorter than other streams of such a picture: only the decoder can tell."""
    stream = zlib.compress(bytes(400_000_000), 9)  # 390 kB
    samples = np.zeros((1, 1000, 1000), "u2")
    path = tmp_path / "in.xisf"
    path.write_bytes(one_image(samples, block=stream, compression="zlib:2000000"))
    tracemalloc.start()
    try:
        with pytest.raises(bg.BgError, match="decompressed"):
            bg.read_xisf(str(path))
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_a_file_that_takes_over_the_name_is_not_mixed_in(tmp_path, monkeypatch):
    """Big pictures are read in strips; all come from the file whose header was read."""
    path = tmp_path / "in.xisf"
    path.write_bytes(one_image(np.full((1, 1000, 1000), 0.25, "f4")))
    (tmp_path / "other.xisf").write_bytes(one_image(np.full((1, 1000, 1000), 0.75, "f4")))
    read_image = xisf.XISF.read_image

    def replaced_after(*arguments):
        samples = read_image(*arguments)
        if (tmp_path / "other.xisf").exists():
            os.replace(str(tmp_path / "other.xisf"), str(path))
        return samples

    monkeypatch.setattr(xisf.XISF, "read_image", replaced_after)
    assert (bg.read_xisf(str(path)).planes == 0.25).all()


def test_a_file_that_is_cut_while_it_is_read_is_refused_and_no_descriptor_stays_open(tmp_path, monkeypatch):
    path = tmp_path / "in.xisf"
    path.write_bytes(one_image(np.full((1, 1000, 1000), 0.25, "f4")))
    descriptors = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    read_image = xisf.XISF.read_image

    def cut_after(*arguments):
        samples = read_image(*arguments)
        os.truncate(str(path), 2_000_000)
        return samples

    monkeypatch.setattr(xisf.XISF, "read_image", cut_after)
    with pytest.raises(bg.BgError, match="damaged"):
        bg.read_xisf(str(path))
    if descriptors:
        assert set(os.listdir("/proc/self/fd")) == descriptors


def test_outputs_appear_whole_and_together_with_usual_permissions(tmp_path):
    paths = [str(tmp_path / "a.xisf"), str(tmp_path / "b.xisf")]
    (tmp_path / "a.xisf").write_bytes(b"old")
    with bg.atomic_outputs(*paths) as files:
        for file in files:
            bg.write_xisf(file, np.ones((1, 2, 2), np.float32))
        assert (tmp_path / "a.xisf").read_bytes() == b"old" and not (tmp_path / "b.xisf").exists()
        assert all(name.startswith(".") for name in os.listdir(str(tmp_path)) if name.endswith("tmp"))
    assert sorted(os.listdir(str(tmp_path))) == ["a.xisf", "b.xisf"]
    umask = os.umask(0)
    os.umask(umask)
    for path in paths:
        Walked(Path(path).read_bytes())
        assert os.stat(path).st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError, SystemExit, bg.BgError])
def test_an_interrupted_run_leaves_nothing(interruption, tmp_path):
    (tmp_path / "a.xisf").write_bytes(b"old")
    with pytest.raises(interruption):
        with bg.atomic_outputs(str(tmp_path / "a.xisf"), str(tmp_path / "b.xisf")) as files:
            bg.write_xisf(files[0], np.ones((1, 200, 200), np.float32))
            raise interruption
    assert os.listdir(str(tmp_path)) == ["a.xisf"] and (tmp_path / "a.xisf").read_bytes() == b"old"


def test_an_interruption_between_the_two_renames_leaves_whole_files_only(tmp_path, monkeypatch):
    replace, calls = os.replace, []

    def interrupted(*names):
        calls.append(names)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(*names)

    monkeypatch.setattr(bg.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        with bg.atomic_outputs(str(tmp_path / "a.xisf"), str(tmp_path / "b.xisf")) as files:
            for file in files:
                bg.write_xisf(file, np.ones((1, 2, 2), np.float32))
    assert os.listdir(str(tmp_path)) == ["a.xisf"]
    Walked((tmp_path / "a.xisf").read_bytes())


def test_a_killed_run_leaves_no_half_output(tmp_path):
    program = ("import os, signal, sys; sys.path[:0] = [{!r}]; import {} as bg, numpy as np\n"
               "with bg.atomic_outputs({!r}) as (file,):\n"
               "    bg.write_xisf(file, np.ones((3, 500, 500), np.float32)); os.kill(os.getpid(), signal.SIGKILL)\n")
    program = program.format(str(Path(bg.__file__).parent), bg.__name__, str(tmp_path / "a.xisf"))
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert not (tmp_path / "a.xisf").exists()


def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(tmp_path):
    """The limit on the size of files stands in for the disk: the write fails in the same places."""
    resource = pytest.importorskip("resource")  # Windows has none
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    planes = np.random.RandomState(0).rand(3, 100, 100).astype(np.float32)
    for limit in (10, 5000, 8192, 60_000, 90_000):
        for compress in (False, True):
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
                with pytest.raises(bg.BgError, match="cannot write to .*; free space") as refusal:
                    with bg.atomic_outputs(str(tmp_path / "a.xisf"), str(tmp_path / "b.xisf")) as files:
                        bg.write_xisf(files[0], planes, None, [], compress)
                        bg.write_xisf(files[1], planes, None, [], compress)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            assert "\n" not in str(refusal.value) and os.listdir(str(tmp_path)) == []


def test_folders_that_cannot_be_written_are_said_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder.xisf").mkdir()
    for name in ("missing/a.xisf", "file/a.xisf", "folder.xisf"):
        with pytest.raises(bg.BgError, match="cannot write to"):
            with bg.atomic_outputs(str(tmp_path / name)) as files:
                bg.write_xisf(files[0], np.ones((1, 2, 2), np.float32))

    def fail(*_, **__):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", fail)
        with pytest.raises(bg.BgError, match="Permission denied"):
            with bg.atomic_outputs(str(tmp_path / "a.xisf")):
                pass
    assert sorted(os.listdir(str(tmp_path))) == ["file", "folder.xisf"]


def test_two_runs_into_one_folder_do_not_meet(tmp_path):
    target, barrier = str(tmp_path / "a.xisf"), threading.Barrier(8)

    def run(value):
        with bg.atomic_outputs(target) as (file,):
            barrier.wait()
            bg.write_xisf(file, np.full((1, 300, 300), value, np.float32), compress=bool(value > 0.4))
            barrier.wait()

    threads = [threading.Thread(target=run, args=(value / 10,)) for value in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.listdir(str(tmp_path)) == ["a.xisf"]
    assert len(np.unique(Walked((tmp_path / "a.xisf").read_bytes()).planes())) == 1


# ------------------------------------------------------------------------------------------------ fuzzing

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all examples, with nothing but the last one in it."""
    return tmp_path_factory.mktemp("fuzz")


def taken_or_refused(data, folder):
    """The Picture, or None if it was refused; anything else fails. What is taken must be sane and writable."""
    try:
        shot = read(data, folder)
    except bg.BgError as refusal:
        assert "\n" not in str(refusal)
        return None
    assert shot.planes.ndim == 3 and shot.planes.shape[0] in (1, 3) and shot.planes.dtype in (np.float32, np.float64)
    present = shot.planes[np.isfinite(shot.planes)]
    assert (present >= 0).all() and (present <= 1).all()
    again = read(written(shot.planes, shot.source, ["x"]), folder)
    assert same(again.planes, shot.planes) and not any("loses" in line for line in again.warnings)
    assert os.listdir(str(folder)) == ["in.xisf"]
    return shot


SMALL = {row.name: row.data for row in ROWS if row.planes is not None and len(row.data) < 20_000}
# Files that end with their pixels
PLAIN = {name: data for name, data in SMALL.items() if re.match("(zlib|lz4|zstd|Float|UInt)", name)}
TOKENS = st.sampled_from(
    "attachment: inline:base64 inline:hex embedded : , 0 1 -1 1e9 0x10 010 NaN inf 99999999999999999999 < > /> \" ' "
    "&#0; &#65; &amp; <Data> </Data> <Image </Image> <Image> </xisf> <Metadata/> <Thumbnail/> <FITSKeyword/> "
    "<Reference/> <Property <![CDATA[ ]]> <!-- --> "
    "<?x?> zlib lz4 zstd +sh :2 :4 Normal big RGB Gray UInt8 Float64 Complex32".split()
    + ['bounds="0:1" ', 'checksum="sha-1:00" ', 'compression="zlib:182" ', 'subblocks="1,1" ', 'uid="u" ', 'ref="u" ',
       " ", "\n", "\0", '<Property id="Processing:History" type="String">x</Property>',
       '<ICCProfile uid="u" location="attachment:8192:4"/>',
       "\u00e4", "\uffff", "\x01"]).map(lambda text: text.encode("utf-8")) | st.binary(min_size=1, max_size=3)


@FUZZ
@given(st.sampled_from(list(SMALL)), st.data())
def test_mutated_headers_never_end_in_anything_but_a_picture_or_a_sentence(folder, name, draw):
    data = SMALL[name]
    length = struct.unpack("<I", data[8:12])[0]
    xml = data[16:16 + length]
    for _ in range(draw.draw(st.integers(1, 4))):
        place = draw.draw(st.integers(0, len(xml)))
        kind = draw.draw(st.sampled_from(["insert", "delete", "replace", "repeat"]))
        if kind == "insert":
            xml = xml[:place] + draw.draw(TOKENS) + xml[place:]
        elif kind == "delete":
            xml = xml[:place] + xml[place + draw.draw(st.integers(1, 40)):]
        elif kind == "replace":
            token = draw.draw(TOKENS)
            xml = xml[:place] + token + xml[place + len(token):]
        else:
            start = draw.draw(st.integers(0, len(xml)))
            xml = xml[:place] + xml[start:start + draw.draw(st.integers(1, 200))] + xml[place:]
    taken_or_refused(monolithic(xml, data[POSITION:]) if len(xml) < POSITION - 16 else data[:16] + xml, folder)


VALUES = {
    "geometry": ["13:7:1", "7:13:1", "91:1:1", "13:7:3", "1:1:1", "13:7", "0:7:1", "-1:-91:1", "9999999999:1:1",
                 "13:7:01", "x"],
    "sampleFormat": ["UInt8", "UInt16", "UInt32", "UInt64", "Float32", "Float64", "Complex32", "uint16", "", "x"],
    "bounds": [None, "0:1", "1:0", "0:0", "0:65535", "-1:1", "nan:1", "0:inf", "0", "", "x", "0:1e-300", "1e300:2e300"],
    "colorSpace": [None, "Gray", "RGB", "CIELab", "rgb", "x"],
    "pixelStorage": [None, "Planar", "Normal", "x"],
    "byteOrder": [None, "little", "big", "x"],
    "location": ["attachment:8192:182", "attachment:8192:91", "attachment:8192:1e3", "attachment:0:182",
                 "attachment:8192:546", "embedded", "inline:hex", "inline:base64", "url(x)",
                 "attachment:8192:99999999999999", "attachment:8191:182", None],
    "compression": [None, "zlib:182", "zlib+sh:182:2", "lz4:182", "lz4+sh:182:2", "zstd:182", "zlib:1820000000",
                    "x:182", "zlib", "lz4:364"],
    "subblocks": [None, "182,182", "91,91:91,91", "1,1:181,181", "0,0", "x"],
    "checksum": [None, "sha-1:" + hashlib.sha1(picture()[0].tobytes()).hexdigest(), "sha-1:00", "md5:00"],
}


@FUZZ
@given(st.fixed_dictionaries({name: st.sampled_from(values) for name, values in VALUES.items()}))
def test_every_mixture_of_attributes_is_understood_as_the_specification_says_or_refused(folder, attributes):
    """Where a picture comes out, an independent reading of the same attributes must give the same pixels."""
    shot = taken_or_refused(one_image(**attributes), folder)
    if shot is None:
        return
    kind = {"uint16": "UInt16"}.get(attributes["sampleFormat"], attributes["sampleFormat"])
    dtype = np.dtype({None: "<", "little": "<", "big": ">"}[attributes["byteOrder"]]
                     + {"UInt8": "u1", "UInt16": "u2", "UInt32": "u4", "UInt64": "u8",
                        "Float32": "f4", "Float64": "f8"}[kind])
    w, h, c = (int(number) for number in attributes["geometry"].split(":"))
    _, position, size = attributes["location"].split(":")
    # Every one of these compressions holds them raw, or is damaged
    stored = one_image()[int(position):int(position) + int(size)]
    assert len(stored) == int(size) == w * h * c * dtype.itemsize
    if "+sh" in (attributes["compression"] or ""):
        stored = b"".join(bytes(pair) for pair in zip(stored[:len(stored) // 2], stored[len(stored) // 2:]))
    values = np.frombuffer(stored, dtype).astype("f8")
    normal = attributes["pixelStorage"] == "Normal"
    values = np.moveaxis(values.reshape(h, w, c), 2, 0) if normal else values.reshape(c, h, w)
    full = "0:%d" % (2 ** (8 * dtype.itemsize) - 1) if dtype.kind == "u" else None
    lower, upper = sorted(float(text) for text in (attributes["bounds"] or full).split(":"))
    with np.errstate(all="ignore"):
        unit = (values - lower) / (upper - lower)
    colors = 3 if (attributes["colorSpace"] or "").upper() == "RGB" else 1
    tiny = np.finfo(shot.planes.dtype).tiny
    unit = np.where(np.isfinite(values), np.where(unit < 0, tiny, np.minimum(unit, 1)), unit)
    assert np.array_equal(shot.planes, unit[:colors].astype(shot.planes.dtype), equal_nan=True)


@FUZZ
@given(st.sampled_from(list(PLAIN)), st.data())
def test_flipped_bits_in_the_pixels_never_pass_a_checksum(folder, name, draw):
    data = PLAIN[name]
    block, xml = data[POSITION:], data[16:16 + struct.unpack("<I", data[8:12])[0]]
    if b"attachment:8192:%d" % len(block) not in xml:  # rows with an odd location or bytes to spare
        return
    digest = hashlib.sha1(block).hexdigest().encode()
    xml = xml.replace(b"<Image ", b'<Image checksum="sha-1:' + digest + b'" ', 1)
    assert taken_or_refused(monolithic(xml, block), folder) is not None
    place = draw.draw(st.integers(0, len(block) - 1))
    flipped = block[:place] + bytes([block[place] ^ 1 << draw.draw(st.integers(0, 7))]) + block[place + 1:]
    assert taken_or_refused(monolithic(xml, flipped), folder) is None


@FUZZ
@given(st.sampled_from(list(PLAIN)), st.data())
def test_truncated_files_are_always_refused(folder, name, draw):
    data = PLAIN[name]
    cut = draw.draw(st.integers(0, len(data) - 1) | st.integers(max(0, len(data) - 20), len(data) - 1))
    assert taken_or_refused(data[:cut], folder) is None


@FUZZ
@given(st.binary(max_size=300), st.booleans())
def test_noise_is_refused(folder, noise, signed):
    assert taken_or_refused(monolithic(noise) if signed else noise, folder) is None


# ------------------------------------------------------------------------------------------------ found by fuzzing

def test_inline_data_around_a_child_are_kept_whole(tmp_path):
    """Found: the text behind the child was read, checked, and then not written."""
    child = '<Property id="A" type="UI8Vector" length="6" location="inline:base64">AAAA<x/>BBBB</Property>'
    shot = read(one_image(children=child), tmp_path)
    assert not read(written(shot.planes, shot.source), tmp_path).warnings


def test_a_list_of_sub_blocks_with_an_odd_number_of_sizes_is_refused(tmp_path):
    """Found: the sums were right and the last piece was forgotten."""
    block = zlib.compress(bytes(182))
    with pytest.raises(bg.BgError, match="contradicts"):
        read(one_image(block=block + b"xx", compression="zlib:182", subblocks="%d,182:2" % len(block)), tmp_path)
