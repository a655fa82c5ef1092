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
import tracemalloc
import zlib
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import lz4.block
import numpy as np
import pytest
import xisf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bgoptimizer as bg
from runner import LINEAR, growth
from scenes import REAL
from xisf_files import (
    DATA, POSITION, RGB, SAMPLES, TRUTH, header_of, keyword_element, monolithic, one_image, picture, rows, shuffled,
    tag)

ROWS = {row.name: row for row in rows()}
GOOD = {name: row for name, row in ROWS.items() if row.planes is not None}
BAD = {name: row for name, row in ROWS.items() if row.planes is None}
XISF = "{http://www.pixinsight.com/xisf}"
needs_real_files = pytest.mark.skipif(
    not (REAL / "pixinsight").is_dir(), reason="the real files are not here")
FUZZ = settings(
    max_examples=int(os.environ.get("BGOPT_FUZZ", 100)), deadline=None, database=None,
    suppress_health_check=list(HealthCheck))


# ------------------------------------------------------------------------------------ helpers

def read(data, folder):
    path = folder / "in.xisf"
    path.write_bytes(data)
    return bg.read_picture(str(path))


def written(planes, source=None, history=(), compress=False):
    file = io.BytesIO()
    bg.write_xisf(file, planes, source, history, compress)
    return file.getvalue()


def rewritten(data, folder, **options):
    """The picture in `data`, read and written, as a strict reader sees it."""
    shot = read(data, folder)
    return Walked(written(shot.planes, shot.source, **options))


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True)


def sha1(data):
    return hashlib.sha1(data).hexdigest()


@contextmanager
def measured():
    """Give a function that tells the peak of memory, in bytes, since then."""
    tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def run(program, *arguments):
    """Run a program that has the script as `bg`, in a process of its own."""
    folder = str(Path(bg.__file__).parent)
    start = "import sys; sys.path.insert(0, {!r}); import {} as bg\n".format(folder, bg.__name__)
    command = [sys.executable, "-c", start + program, *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


class Walked:
    """A file as a strict reader sees it: nothing is forgiven."""

    def __init__(self, data):
        self.data = data
        self.root = self.checked_root()
        (self.metadata,) = self.root.findall(XISF + "Metadata")
        (self.image,) = self.root.findall(XISF + "Image")
        self.check_metadata()
        self.check_blocks()
        for keyword in self.image.findall(XISF + "FITSKeyword"):
            assert set(keyword.attrib) == {"name", "value", "comment"}

    def checked_root(self):
        assert self.data[:8] == b"XISF0100"
        length, reserved = struct.unpack("<II", self.data[8:16])
        assert length >= 65 and reserved == 0
        xml = header_of(self.data)
        assert len(xml) == length and b"\0" not in xml
        declaration, _, markup = xml.decode("utf-8", "strict").partition("?>")
        assert declaration == '<?xml version="1.0" encoding="UTF-8"'
        assert markup.startswith("<xisf ") and markup.endswith("</xisf>")
        root = ElementTree.fromstring(markup)
        assert root.tag == XISF + "xisf" and root.get("version") == "1.0" and not root.text
        schema = "{http://www.w3.org/2001/XMLSchema-instance}schemaLocation"
        assert root.get(schema) == (
            "http://www.pixinsight.com/xisf http://pixinsight.com/xisf/xisf-1.0.xsd")
        return root

    def check_metadata(self):
        ids = [child.get("id") for child in self.metadata]
        assert ids.count("XISF:CreationTime") == 1
        assert ids.count("XISF:CreatorApplication") == 1
        created = self.metadata[ids.index("XISF:CreationTime")]
        assert created.get("type") == "TimePoint"
        assert re.fullmatch(r"\d{4}(-\d\d){2}T(\d\d:){2}\d\dZ", created.get("value"))

    def check_blocks(self):
        spans = {(0, 16 + len(header_of(self.data)))}
        for element in self.root.iter():
            location = element.get("location", "inline:")
            if location.startswith("attachment:"):
                match = re.fullmatch(r"attachment:([1-9]\d*):([1-9]\d*)", location)
                position, size = map(int, match.groups())
                assert position % 4096 == 0
                spans.add((position, position + size))
            else:
                assert location.split(":")[0] in ("inline", "embedded")
        spans = sorted(spans)
        for (_, end), (start, _) in zip(spans, spans[1:]):
            assert end <= start, "blocks overlap"
            assert not self.data[end:start].strip(b"\0"), "a gap is not empty"
        assert spans[-1][1] == len(self.data)

    def block(self, element):
        method, *place = element.get("location").split(":")
        if method == "inline":
            decode = base64.b64decode if place[0] == "base64" else bytes.fromhex
            return decode(element.text or "")
        position, size = map(int, place)
        return self.data[position:position + size]

    def planes(self):
        image = self.image
        stale = {"subblocks", "byteOrder", "pixelStorage", "offset"}
        assert not stale & set(image.attrib)
        width, height, channels = map(int, image.get("geometry").split(":"))
        assert image.get("colorSpace") == {1: "Gray", 3: "RGB"}[channels]
        assert image.get("bounds") == "0:1"
        dtype = np.dtype({"Float32": "<f4", "Float64": "<f8"}[image.get("sampleFormat")])
        block = self.block(image)
        if image.get("compression"):
            codec, size, item = image.get("compression").split(":")
            assert codec == "lz4hc+sh" and int(item) == dtype.itemsize
            assert len(block) < int(size)
            data = lz4.block.decompress(block, uncompressed_size=int(size))
            columns = np.frombuffer(data, np.uint8).reshape(int(item), -1)
            block = columns.T.tobytes()
        return np.frombuffer(block, dtype).reshape(channels, height, width)

    def find(self, name):
        return self.image.find(XISF + name)

    def properties(self):
        """The last of each id."""
        return {child.get("id"): child for child in self.image.findall(XISF + "Property")}

    def keywords(self):
        found = self.image.findall(XISF + "FITSKeyword")
        return [(child.get("name"), child.get("value"), child.get("comment")) for child in found]


# ------------------------------------------------------------------------------------ reading

@pytest.mark.parametrize("name", GOOD)
def test_what_pixinsight_reads_is_read_with_the_right_pixels(name, tmp_path):
    row = GOOD[name]
    shot = read(row.data, tmp_path)
    expected = np.float64 if row.planes.dtype == np.float64 else np.float32
    assert same(shot.planes, row.planes.astype(expected))
    assert shot.planes.flags.c_contiguous and shot.planes.flags.writeable
    warnings = "\n".join(shot.warnings)
    assert warnings.count("\n") == max(0, len(shot.warnings) - 1), "one line each"
    if row.says:
        assert re.search(row.says, warnings)
    else:
        assert not warnings


@pytest.mark.timeout(60)  # a second is plenty; without a guard, one of these takes hours
@pytest.mark.parametrize("name", BAD)
def test_what_is_broken_or_hostile_is_refused_in_one_line_at_once_and_cheaply(name, tmp_path):
    row = BAD[name]
    with measured() as cost:
        with pytest.raises(bg.BgError, match=row.says) as refusal:
            read(row.data, tmp_path)
        memory = cost()
    sentence = str(refusal.value)
    assert sentence.startswith(str(tmp_path / "in.xisf"))
    assert "\n" not in sentence and ";" in sentence
    assert len(sentence) - len(str(tmp_path)) < 250
    assert memory < 5 * len(row.data) + 50e6


def test_all_bombs_together_stay_below_300_MB(tmp_path):
    """Memory that C libraries take is not seen by tracemalloc: ask the kernel."""
    if not Path("/proc/self/status").exists():
        pytest.skip("only Linux tells a program its own peak; "
                    "getrusage reports that of the process it was forked from too")
    kinds = "bomb|absurd|10\\^15|million|lying|geometry"
    hostile = [row for name, row in BAD.items() if re.search(kinds, name)]
    assert len(hostile) > 20
    for number, row in enumerate(hostile):
        (tmp_path / "{}.xisf".format(number)).write_bytes(row.data)
    done = run("""
import pathlib, re, resource
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
for path in pathlib.Path(sys.argv[1]).iterdir():
    try:
        bg.read_picture(str(path))
        print("taken", path)
    except bg.BgError:
        pass
status = pathlib.Path("/proc/self/status").read_text()
print(int(re.search("VmHWM:\\\\s*(\\\\d+)", status)[1]) >> 10)
""", tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert int(done.stdout) < 300


@pytest.mark.parametrize("checksum", [None, "sha-1:00"])
def test_a_property_cannot_make_the_file_be_read_over_and_over(checksum, tmp_path, monkeypatch):
    """A thousand properties are the same megabytes, each shifted by one byte."""
    read_at, sizes = bg._read_at, []

    def counted(*arguments):
        data = read_at(*arguments)
        sizes.append(data.nbytes)
        return data

    monkeypatch.setattr(bg, "_read_at", counted)
    properties = [
        tag("Property", {"id": "A:p%d" % number, "type": "UI8Vector", "length": 1_900_000,
                         "location": "attachment:%d:1900000" % (300_000 + number),
                         "checksum": checksum})
        for number in range(1000)]
    data = one_image(children="".join(properties), position=300_000) + bytes(2_000_000)
    shot = read(data, tmp_path)
    assert sum(sizes) < 3 * len(data)
    (warning,) = shot.warnings
    assert re.search(r"loses (99\d|1000) element", warning) and len(warning) < 400


def test_a_property_that_shares_the_place_of_the_pixels_keeps_its_bytes(tmp_path):
    """The pixels are changed, in place, and the property is not."""
    samples = np.full((1, 30, 40), 0.25, "f4")
    samples[0, 3] = -0.5
    place = {"id": "A:Same", "type": "UI8Vector", "location": "attachment:8192:4800"}
    shot = read(one_image(samples, tag("Property", place)), tmp_path)
    shot.planes[:] = 0
    assert list(shot.source.blocks.values())[0].tobytes() == samples.tobytes()


def test_a_property_that_is_lost_leaves_no_data_behind(tmp_path):
    table = ('<Table id="A:T"><Row><Cell location="attachment:8192:50"/>'
             '<Cell location="attachment:1:1"/></Row></Table>')
    shot = read(one_image(children=table), tmp_path)
    assert "A:T" in shot.warnings[0] and not shot.source.blocks
    assert Walked(written(shot.planes, shot.source)).find("Table") is None


def test_what_is_no_file_or_may_not_be_read_is_refused(tmp_path, monkeypatch):
    os.mkfifo(str(tmp_path / "fifo"))
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    refusals = {"": "not a file", "fifo": "not a file", "missing.xisf": "No such file",
                "gone": "No such file", "fifo/x": "Not a directory", "/dev/zero": "not a file"}
    for name, says in refusals.items():
        with pytest.raises(bg.BgError, match=says):
            bg.read_picture(str(tmp_path / name))
    (tmp_path / "in.xisf").write_bytes(one_image())
    monkeypatch.setattr("builtins.open", raising(PermissionError(13, "Permission denied")))
    with pytest.raises(bg.BgError, match="Permission denied"):
        bg.read_picture(str(tmp_path / "in.xisf"))


def raising(error):
    def fail(*_, **__):
        raise error
    return fail


def test_reading_leaves_the_file_alone_and_prints_nothing(tmp_path, capfd):
    data = one_image(children=tag("Property", {"id": "A", "type": "Frob"}))
    read(data, tmp_path)
    assert (tmp_path / "in.xisf").read_bytes() == data
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_every_row_survives_being_rewritten(tmp_path):
    """What was read is written legally, and read again with its pixels and no new losses."""
    for name, row in GOOD.items():
        shot = read(row.data, tmp_path)
        kept_as_it_stands = re.search("keyword|property|metadata", name)  # though it is illegal
        for compress in (False, True):
            data = written(shot.planes, shot.source, ["a line"], compress)
            if not kept_as_it_stands:
                assert same(Walked(data).planes(), shot.planes), name
            again = read(data, tmp_path)
            assert same(again.planes, shot.planes), name
            assert all("mosaic" in warning for warning in again.warnings), name


# ------------------------------------------------------------------------------------ real files

@needs_real_files
def test_pixinsights_nine_files_hold_one_picture_per_kind():
    paths = sorted((REAL / "pixinsight").glob("xisf-image-*.xisf"))
    shots = {path.stem[len("xisf-image-"):]: bg.read_picture(str(path)) for path in paths}
    assert len(shots) == 9 and not any(shot.warnings for shot in shots.values())
    planes = {name: shot.planes for name, shot in shots.items()}

    truth = planes["rgb-256x256-32bits"]
    assert len(np.unique(truth)) > 2 and not np.array_equal(truth[0], truth[1])
    for bits in (8, 16):  # the same picture, rounded
        rounded = planes["rgb-256x256-%dbits" % bits]
        assert rounded.shape == truth.shape == (3, 256, 256)
        assert np.abs(rounded - truth).max() <= 0.51 / (2 ** bits - 1) + 1e-7
    for kind in ("gray-256x256-8bits", "rgb-256x256-8bits-compressed"):
        white = planes[kind]  # the second is gray, in an embedded block
        assert white.shape == (1, 256, 256) and (white == 1).all()
    for bits, dtype in ((32, np.float32), (64, np.float64)):
        white = planes["gray-256x256-float-%dbits" % bits]
        assert white.shape == (1, 255, 255) and white.dtype == dtype and (white == 1).all()
    skies = (("gray-256x256-16bits-zlib", 74.49, 3.2), ("gray-256x256-16bits-zlib_sh", 2220.4, 705))
    for kind, mean, spread in skies:
        sky = planes[kind] * 65535.0
        assert sky.mean() == pytest.approx(mean, rel=0.01)
        assert np.abs(np.diff(sky)).mean() < spread, "neighbors are alike, which garbage is not"


@pytest.mark.slow
@needs_real_files
def test_m27_is_read_verified_and_keeps_keywords_properties_and_plate_solution(tmp_path):
    data = (REAL / "m27.xisf").read_bytes()
    shot = bg.read_picture(str(REAL / "m27.xisf"))
    packed = data[3272:3272 + 4209751]
    assert sha1(packed) == "7256df59b3d35c51805dad2b6dc0e145eacbd034"
    unpacked = lz4.block.decompress(packed, uncompressed_size=7636224)
    low, high = np.frombuffer(unpacked, np.uint8).reshape(2, 3, 976, 1304).astype("u2")
    truth = (low + 256 * high) / 65535.0
    assert same(shot.planes, truth.astype("f4")) and not shot.warnings

    damaged = bytearray(data)
    damaged[1_000_000] ^= 1
    with pytest.raises(bg.BgError, match="checksum"):
        read(bytes(damaged), tmp_path)

    before = ElementTree.fromstring(header_of(data)).find(XISF + "Image")
    old_keywords = [tuple(child.attrib.values()) for child in before.findall(XISF + "FITSKeyword")]
    old_properties = [(p.attrib, p.text) for p in before.findall(XISF + "Property")]
    assert len(old_keywords) == 7 and len(old_properties) == 12
    for compress in (False, True):
        after = Walked(written(shot.planes, shot.source, ["HISTORY line"], compress))
        assert same(after.planes(), shot.planes)
        assert after.keywords() == old_keywords + [("HISTORY", "", "HISTORY line")]
        properties = after.image.findall(XISF + "Property")
        assert [(p.attrib, p.text) for p in properties] == old_properties
        assert after.image.get("id") == "integration"
        assert after.find("Resolution").attrib == before.find(XISF + "Resolution").attrib


# ------------------------------------------------------------------------------------ the package

@pytest.mark.slow
@needs_real_files
def test_the_xisf_package_reads_what_we_write(tmp_path):
    """Other programs build on it: our files must not need a better reader than theirs."""
    shot = bg.read_picture(str(REAL / "m27.xisf"))
    for compress in (False, True):
        data = written(shot.planes, shot.source, ["a line"], compress)
        (tmp_path / "out.xisf").write_bytes(data)
        theirs = xisf.XISF(str(tmp_path / "out.xisf"))
        assert np.array_equal(theirs.read_image(0, "channels_first"), shot.planes)
        properties = theirs.get_images_metadata()[0]["XISFProperties"]
        solution = properties["PCL:AstrometricSolution:ReferenceImageCoordinates"]
        assert np.array_equal(solution["value"], [652, 488])


def test_the_package_reads_compressed_blocks(tmp_path, monkeypatch):
    read_image, sizes = xisf.XISF.read_image, []

    def counted(*arguments):
        samples = read_image(*arguments)
        sizes.append(samples.nbytes)
        return samples

    monkeypatch.setattr(xisf.XISF, "read_image", counted)
    data = GOOD["lz4-float32-3-4"].data
    read(data, tmp_path)
    assert sizes == [len(data) - POSITION]


def before_a_block_is_read(monkeypatch, action):
    """Let something happen after the header has been read."""
    stored = bg._stored

    def act_and_read(*arguments):
        action()
        return stored(*arguments)

    monkeypatch.setattr(bg, "_stored", act_and_read)


def test_a_file_that_takes_over_the_name_is_not_mixed_in(tmp_path, monkeypatch):
    """All data come from the file whose header was read."""
    path, other = tmp_path / "in.xisf", tmp_path / "other.xisf"
    path.write_bytes(one_image(np.full((1, 1000, 1000), 0.25, "f4")))
    other.write_bytes(one_image(np.full((1, 1000, 1000), 0.75, "f4")))
    before_a_block_is_read(monkeypatch, lambda: os.replace(str(other), str(path)))
    assert (bg.read_picture(str(path)).planes == 0.25).all()


def test_a_file_that_is_cut_while_it_is_read_is_refused_and_closed(tmp_path, monkeypatch):
    path = tmp_path / "in.xisf"
    path.write_bytes(one_image(np.full((1, 1000, 1000), 0.25, "f4")))
    before_a_block_is_read(monkeypatch, lambda: os.truncate(str(path), 2_000_000))
    next_descriptor = os.dup(0)
    os.close(next_descriptor)
    with pytest.raises(bg.BgError, match="cut short"):
        bg.read_picture(str(path))
    descriptor = os.dup(0)
    os.close(descriptor)
    assert descriptor == next_descriptor, "one stayed open"


# ------------------------------------------------------------------------------------ writing

ICC = bytes(range(256)) * 3
VECTOR = struct.pack("<1000d", *range(1000))
MATRIX = zlib.compress(shuffled(struct.pack(">600f", *range(600)), 4))
BLOCKS = (ICC, VECTOR, MATRIX)
SPLINE = "PCL:AstrometricSolution:SplineWorldTransformation:PointGridInterpolation"
KEYWORDS = [  # name, value, comment
    ("OBJECT", "'O''Neil  '", "target \u00e4\u00b0\u00b5"), ("DIGITS", "'0042'", ""),
    ("HISTORY", "", "one"), ("EXPTIME", "36.", "[s] <unit>"), ("COMMENT", "", "two & three"),
    ("HISTORY", "", "three"), ("FLAG", "T", ""), ("EMPTY", "", ""), ("ODD", "1.0D5", '"quoted"'),
    ("OBJECT", "'again'", ""), ("LEAD", "'   lead'", ""),
]
CHILDREN = """
  <ICCProfile location="{icc}"/>
  <RGBWorkingSpace gamma="sRGB" x="0.64:0.3:0.15" y="0.33:0.6:0.06" Y="0.2:0.7:0.1"/>
  <Resolution horizontal="72.5" vertical="300" unit="cm"/>
  <ColorFilterArray pattern="RGGB" width="2" height="2" name="x"/>
  <DisplayFunction m="0.1:0.2:0.3:0.5" s="0:0:0:0" h="1:1:1:1" l="0:0:0:0" r="1:1:1:1" name="STF"/>
  <Property id="{spline}" type="F64Vector" length="1000" location="{vector}" checksum="{checksum}"/>
  <Property id="A:Again" type="F64Vector" length="1000" location="{vector}"/>
  <Property id="A:Matrix" type="F32Matrix" rows="20" columns="30" byteOrder="big"
            compression="zlib+sh:2400:4" location="{matrix}"/>
  <Property id="A:Small" type="F64Vector" length="1"
            location="inline:base64">AAAAAAAA8D8=</Property>
  <Property id="A:Empty" type="String"/>
  <Property id="A:Text" type="String">  \u00e4 &lt;x&gt; &#13;\n two  </Property>
  <Property id="A:True" type="Boolean" value="1"/>
  <Property id="A:False" type="Boolean" value="False"/>
  <Property id="A:Unit" type="Float64" value="1e-300" comment="m/s" format="unit:m/s"/>
  <Property id="A:Unit" type="Float64" value="NaN" comment="repeated"/>
  <Property id="A:Time" type="TimePoint" value="2018-09-07T22:31:45.123+02:00"/>
  <Property id="A:Odd" type="Frob" value="kept as it stands"/>
  <Property id="Processing:History" type="String">first step</Property>
  <Table id="T:able"><Structure><Field id="a" type="Int32"/></Structure>
    <Row><Cell value="1"/></Row></Table>
  <Thumbnail geometry="1:1:1" sampleFormat="UInt8" location="embedded"><Data>AA==</Data></Thumbnail>
  <Unknown x:y="1" xmlns:x="urn:x">a<b/>c</Unknown>
  <Reference ref="later"/>
"""
FILE_METADATA = """<Metadata>
  <Property id="XISF:CreationTime" type="String">2019-09-15T20:24:28Z</Property>
  <Property id="XISF:CreatorOS" type="String">OS/2</Property>
  <Property id="XISF:BlockAlignmentSize" type="UInt16" value="0"/>
  <Property id="XISF:Authors" type="String">J\u00f6rg</Property>
  <Property id="XISF:OriginalCreationTime" type="TimePoint" value="2015-01-01T00:00:00Z"/>
  <Property id="XISF:CompressionLevel" type="Int32" value="9"/></Metadata>"""
OUTSIDE = """
  <Property id="File:Loose" type="Int32" value="5"/>
  <RGBWorkingSpace uid="later" gamma="2.2"/>
  <Mystery a="1"/>"""


def full_file():
    """A file with everything that users have complained about losing."""
    places = []
    position = POSITION + RGB.nbytes + 13  # unaligned on purpose
    for block in BLOCKS:
        places.append("attachment:{}:{}".format(position, len(block)))
        position += len(block) + 5
    icc, vector, matrix = places
    checksum = "sha-256:" + hashlib.sha256(VECTOR).hexdigest()
    children = CHILDREN.format(
        icc=icc, vector=vector, matrix=matrix, spline=SPLINE, checksum=checksum)
    keywords = [keyword_element(*keyword) for keyword in KEYWORDS]
    picture_and_header = one_image(
        RGB, children="\n".join(keywords) + children, metadata=FILE_METADATA, outside=OUTSIDE,
        id="M31", imageType="Light", orientation="flip")
    blocks = [block + bytes(5) for block in BLOCKS]
    return picture_and_header + bytes(13) + b"".join(blocks)


@pytest.fixture(params=[False, True], ids=["plain", "compressed"])
def after(request, tmp_path):
    """The full file, read and written again."""
    return rewritten(full_file(), tmp_path, history=["line"], compress=request.param)


def test_keywords_keep_their_order_and_their_quotes(after):
    assert after.keywords() == KEYWORDS + [("HISTORY", "", "line")]


def test_what_belongs_to_the_image_is_kept(after):
    assert after.block(after.find("ICCProfile")) == ICC
    resolution = {"horizontal": "72.5", "vertical": "300", "unit": "cm"}
    assert after.find("Resolution").attrib == resolution
    assert after.find("DisplayFunction").get("m") == "0.1:0.2:0.3:0.5"
    assert after.find("DisplayFunction").get("name") == "STF"
    assert after.find("ColorFilterArray").get("pattern") == "RGGB"
    unknown = after.find("Unknown")
    assert (unknown.text, unknown[0].tail, unknown.get("{urn:x}y")) == ("a", "c", "1")
    assert after.find("Table")[1][0].get("value") == "1"
    assert after.find("RGBWorkingSpace").get("Y") == "0.2:0.7:0.1"
    assert after.find("Reference").get("ref") == "later"
    assert after.root.find(XISF + "RGBWorkingSpace").get("uid") == "later"
    attributes = [after.image.get(name) for name in ("id", "imageType", "orientation")]
    assert attributes == ["M31", "Light", "flip"]
    assert after.root.find(XISF + "Property").get("id") == "File:Loose"
    assert after.root.find(XISF + "Mystery") is not None


def test_properties_with_blocks_are_kept(after):
    properties = after.properties()
    spline = properties[SPLINE]
    assert after.block(spline) == VECTOR
    assert spline.get("checksum") == "sha-256:" + hashlib.sha256(VECTOR).hexdigest()
    assert spline.get("location") == properties["A:Again"].get("location"), "one block for both"
    matrix = properties["A:Matrix"]
    assert after.block(matrix) == MATRIX
    assert matrix.get("compression") == "zlib+sh:2400:4" and matrix.get("byteOrder") == "big"
    assert after.block(properties["A:Small"]) == struct.pack("<d", 1)


def test_properties_with_values_are_kept(after):
    properties = after.properties()
    assert not properties["A:Empty"].text and "value" not in properties["A:Empty"].attrib
    assert properties["A:Text"].text == "  \u00e4 <x> \r\n two  "
    values = {"A:True": "1", "A:False": "False", "A:Time": "2018-09-07T22:31:45.123+02:00",
              "A:Odd": "kept as it stands"}
    assert {name: properties[name].get("value") for name in values} == values
    repeated = after.image.findall(XISF + "Property[@id='A:Unit']")
    assert [unit.get("value") for unit in repeated] == ["1e-300", "NaN"]
    assert [unit.get("comment") for unit in repeated] == ["m/s", "repeated"]
    assert properties["Processing:History"].text == "first step"


def test_metadata_describe_the_new_file_and_keep_the_authors(after):
    properties = {child.get("id"): child.get("value") or child.text for child in after.metadata}
    assert properties.pop("XISF:CreationTime") > "2020"
    assert properties == {
        "XISF:CreatorApplication": "bgoptimizer " + bg.VERSION, "XISF:Authors": "J\u00f6rg",
        "XISF:OriginalCreationTime": "2015-01-01T00:00:00Z",
    }
    assert after.find("Thumbnail") is None


def test_what_new_pixels_make_untrue_is_dropped_and_said(tmp_path):
    untrue = ("BITPIX", "NAXIS", "NAXIS1", "BSCALE", "BZERO", "CHECKSUM", "NOISE00")
    keywords = [keyword_element(name, "1", "") for name in (*untrue, "NAXISX", "GAIN")]
    mean = tag("Property", {"id": "Image:Statistics:Mean", "type": "Float64", "value": "1"})
    checksum = "sha1:" + sha1(DATA)
    data = one_image(children="".join(keywords) + mean, checksum=checksum, offset="100",
                     byteOrder="little", pixelStorage="Planar")
    after = rewritten(data, tmp_path)
    assert same(after.planes(), TRUTH)
    assert "checksum" not in after.image.attrib, "it was one of the old pixels"
    assert [name for name, _, _ in after.keywords()] == ["NAXISX", "GAIN"]
    assert not after.properties()
    (warning,) = read(data, tmp_path).warnings
    assert re.search("BITPIX.*NOISE00.*Statistics", warning)


def test_history_lines_are_split_and_control_characters_dropped(tmp_path):
    lines = ["short \u00e4", "word " * 40, "x" * 100, "a\0b\x07c\ud800d", "", "<&\">'"]
    keywords = rewritten(one_image(), tmp_path, history=lines).keywords()
    assert all((name, value) == ("HISTORY", "") for name, value, _ in keywords)
    comments = [comment for _, _, comment in keywords]
    assert all(len(comment) <= 72 for comment in comments)
    expected = "".join(lines[:3]) + "abcd" + "<&\">'"
    assert "".join(comments).replace(" ", "") == expected.replace(" ", "")


def test_a_picture_without_a_source_has_no_metadata():
    planes = np.ones((1, 2, 3), np.float32)
    bare = Walked(written(planes))
    assert len(bare.image) == 0 and same(bare.planes(), planes)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 9), (3, 9, 1), (1, 8, 16384), (3, 300, 200)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pixels_come_back_bit_for_bit(shape, dtype, tmp_path):
    rng = np.random.RandomState(1)
    planes = (rng.rand(*shape) * 0.1).astype(dtype)
    planes.flat[0] = np.nan
    planes.flat[-1] = np.inf
    swapped = planes.astype(planes.dtype.newbyteorder(">"))
    for view in (planes, planes[:, ::-1], np.asfortranarray(planes), swapped):
        for compress in (False, True):
            data = written(view, compress=compress)
            assert np.array_equal(Walked(data).planes(), view, equal_nan=True)
            assert np.array_equal(read(data, tmp_path).planes, view, equal_nan=True)


def noise(height, width):
    """Any floats in [0, 1): their bytes do not shrink."""
    bits = np.frombuffer(np.random.RandomState(2).bytes(4 * height * width), np.uint32)
    return (bits % 0x3F800000).astype(np.uint32).view(np.float32).reshape(1, height, width)


def test_what_does_not_shrink_is_not_called_compressed(tmp_path):
    planes = noise(9, 10)
    after = Walked(written(planes, compress=True))
    assert "compression" not in after.image.attrib and same(after.planes(), planes)


def test_pictures_beyond_the_lz4_limit_are_not_compressed(monkeypatch):
    """PixInsight reads no LZ4 sub-blocks above 2 GiB."""
    monkeypatch.setattr(bg, "LZ4_LIMIT", 1000)
    planes, _ = picture("Float32", 3, 40, 30)
    after = Walked(written(planes, compress=True))
    assert "compression" not in after.image.attrib and same(after.planes(), planes)


@pytest.mark.parametrize("compress", [False, True])
def test_planes_that_are_made_one_by_one_are_written_one_by_one(compress):
    class Planes:
        shape, dtype, made = (3, 40, 50), np.dtype(np.float32), 0

        def __iter__(self):
            for value in (0, 0.25, 0.5):
                self.made += 1
                yield np.full((40, 50), value, np.float32)

    planes = Planes()
    after = Walked(written(planes, compress=compress)).planes()
    assert planes.made == 3
    assert [np.unique(plane).tolist() for plane in after] == [[0], [0.25], [0.5]]


def test_keywords_without_value_or_comment_get_empty_ones(tmp_path):
    children = '<FITSKeyword name="A" value="1"/><FITSKeyword name="B" comment="c"/>'
    after = rewritten(one_image(children=children), tmp_path)
    assert after.keywords() == [("A", "1", ""), ("B", "", "c")]


def test_headers_of_any_length_leave_their_blocks_alone(tmp_path):
    """Positions are filled in last: wherever the header ends, it stays clear of the first block."""
    shot = read(full_file(), tmp_path)
    (text,) = shot.source.root.findall("Image/Property[@id='A:Text']")
    for length in range(0, 4096, 16):
        text.text = "x" * length
        Walked(written(TRUTH, shot.source))


# ------------------------------------------------------------------------------------ limits

def blanks(size):
    return " " * 150_000 * size


# What stands in the file, for a size of 1 or 2
SLOW = {
    "geometry": lambda size: {"geometry": "13" + blanks(size) + "x:7:1"},
    "version": lambda size: {"root": '<xisf version="1.0' + blanks(size) + 'x">'},
    "colons": lambda size: {"geometry": "1:" * 1_500_000 * size},
    "commas": lambda size: {"location": "attachment" + " : ," * 500_000 * size},
    "sub-blocks": lambda size: {
        "compression": "zlib:182", "subblocks": "1,1:" * 1_000_000 * size + "1,1"},
    "reference": lambda size: {"children": "&#" + "0" * 2_500_000 * size},
    "keyword": lambda size: {
        "children": '<FITSKeyword name="NOISEA' + "0" * 1_500_000 * size + 'x"/>'},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_no_text_in_a_header_takes_long_or_much_memory(name, tmp_path):
    paths = {}
    for size in (1, 2):
        paths[size] = tmp_path / "{}.xisf".format(size)
        paths[size].write_bytes(one_image(position=1 << 24, **SLOW[name](size)))

    def read_it(size):
        try:
            bg.read_picture(str(paths[size]))
        except bg.BgError as refusal:
            assert len(str(refusal)) - len(str(tmp_path)) < 250

    assert growth(read_it) < LINEAR
    with measured() as cost:
        read_it(2)
        memory = cost()
    assert memory < 12 << 24  # a text in Python takes up to four bytes a character


@pytest.mark.slow
def test_a_header_of_attributes_without_end_is_refused(tmp_path):
    attributes = {"a%d" % number: "" for number in range(260_000)}
    with pytest.raises(bg.BgError, match="header too large"):
        read(one_image(position=1 << 24, **attributes), tmp_path)


@pytest.mark.parametrize("depth", [63, 64, 65])
def test_what_is_written_is_never_nested_too_deeply_to_be_read(depth, tmp_path):
    data = one_image(outside="<a>" * depth + "</a>" * depth)
    if depth > 64:
        with pytest.raises(bg.BgError, match="nested too deeply"):
            read(data, tmp_path)
    else:
        shot = read(data, tmp_path)
        assert not read(written(shot.planes, shot.source), tmp_path).warnings


@pytest.mark.slow
def test_an_expanding_zlib_stream_is_stopped_where_the_picture_ends(tmp_path):
    """Its block is not shorter than those of honest pictures: only the decoder can tell."""
    stream = zlib.compress(bytes(400_000_000), 9)  # 390 kB
    samples = np.zeros((1, 1000, 1000), "u2")
    path = tmp_path / "in.xisf"
    path.write_bytes(one_image(samples, block=stream, compression="zlib:2000000"))
    with measured() as cost:
        with pytest.raises(bg.BgError, match="damaged"):
            bg.read_picture(str(path))
        memory = cost()
    assert memory < 20e6


def test_names_in_warnings_cannot_break_the_line_and_advice_is_always_given(tmp_path):
    mean = '<Property id="Statistics:a&#10;b" type="Int32" value="1"/>'
    (warning,) = read(one_image(children=mean), tmp_path).warnings
    assert "\n" not in warning
    with pytest.raises(bg.BgError, match="; copy or save it again"):
        read(one_image(geometry="13;7;1"), tmp_path)


# ------------------------------------------------------------------------------------ faults

def write(file, compress=False, value=1, size=2):
    bg.write_xisf(file, np.full((1, size, size), value, np.float32), compress=compress)


def test_outputs_appear_whole_and_together_with_usual_permissions(folder):
    (folder / "a.xisf").write_bytes(b"old")
    with bg.atomic_outputs("a.xisf", "b.xisf") as files:
        for file in files:
            write(file)
        assert (folder / "a.xisf").read_bytes() == b"old"
        assert not (folder / "b.xisf").exists()
        temporary = [name for name in os.listdir(".") if name.endswith("tmp")]
        assert len(temporary) == 2 and all(name.startswith(".") for name in temporary)
    assert sorted(os.listdir(".")) == ["a.xisf", "b.xisf"]
    umask = os.umask(0)
    os.umask(umask)
    for path in ("a.xisf", "b.xisf"):
        Walked(Path(path).read_bytes())
        assert os.stat(path).st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError, SystemExit, bg.BgError])
def test_an_interrupted_run_leaves_nothing(interruption, folder):
    (folder / "a.xisf").write_bytes(b"old")
    with pytest.raises(interruption):
        with bg.atomic_outputs("a.xisf", "b.xisf") as files:
            write(files[0], size=200)
            raise interruption
    assert os.listdir(".") == ["a.xisf"]
    assert (folder / "a.xisf").read_bytes() == b"old"


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("limit", [10, 5000, 8192, 60_000, 90_000])
def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(limit, compress, folder):
    """The limit on the size of files stands in for the disk: the write fails in the same places."""
    resource = pytest.importorskip("resource")  # Windows has none
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    planes = np.random.RandomState(0).rand(3, 100, 100).astype(np.float32)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(bg.BgError, match="cannot write to .*; free space") as refusal:
            with bg.atomic_outputs("a.xisf", "b.xisf") as files:
                for file in files:
                    bg.write_xisf(file, planes, compress=compress)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(refusal.value)
    assert os.listdir(".") == []


def test_folders_that_cannot_be_written_are_said_in_one_line(folder, monkeypatch):
    (folder / "file").write_bytes(b"")
    (folder / "folder.xisf").mkdir()
    for name in ("file/a.xisf", "folder.xisf"):
        with pytest.raises(bg.BgError, match="cannot write to"):
            with bg.atomic_outputs(str(folder / name)) as (file,):
                write(file)
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", raising(PermissionError(13, "Permission denied")))
        with pytest.raises(bg.BgError, match="Permission denied"):
            with bg.atomic_outputs("a.xisf"):
                pass
    assert sorted(os.listdir(".")) == ["file", "folder.xisf"]


# ------------------------------------------------------------------------------------ fuzzing

@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """One folder for all examples, with nothing but the last one in it."""
    return tmp_path_factory.mktemp("fuzz")


def taken_or_refused(data, folder):
    """The Picture, or None if it was refused. What is taken must be sane, and writable."""
    try:
        shot = read(data, folder)
    except bg.BgError as refusal:
        assert "\n" not in str(refusal)
        return None
    planes = shot.planes
    assert planes.ndim == 3 and planes.shape[0] in (1, 3)
    assert planes.dtype in (np.float32, np.float64)
    present = planes[np.isfinite(planes)]
    assert (present >= 0).all() and (present <= 1).all()
    again = read(written(planes, shot.source, ["x"]), folder)
    assert same(again.planes, planes)
    assert not any("loses" in warning for warning in again.warnings)
    assert os.listdir(str(folder)) == ["in.xisf"]
    return shot


SMALL = {name: row.data for name, row in GOOD.items() if len(row.data) < 20_000}
# Files that end with their pixels
PLAIN = {name: data for name, data in SMALL.items() if re.match("(zlib|lz4|zstd|Float|UInt)", name)}
WORDS = """
attachment: inline:base64 inline:hex embedded : , 0 1 -1 1e9 0x10 010 NaN inf 99999999999999999999
< > /> " ' &#0; &#65; &amp; <Data> </Data> <Image </Image> <Image> </xisf> <Metadata/> <Thumbnail/>
<FITSKeyword/> <Reference/> <Property <![CDATA[ ]]> <!-- --> <?x?> zlib lz4 zstd +sh :2 :4 Normal
big RGB Gray UInt8 Float64 Complex32
""".split()
WORDS += [
    'bounds="0:1" ', 'checksum="sha-1:00" ', 'compression="zlib:182" ', 'subblocks="1,1" ',
    'uid="u" ', 'ref="u" ', " ", "\n", "\0", "\u00e4", "\uffff", "\x01",
    '<Property id="Processing:History" type="String">x</Property>',
    '<ICCProfile uid="u" location="attachment:8192:4"/>',
]
TOKENS = st.sampled_from([word.encode() for word in WORDS]) | st.binary(min_size=1, max_size=3)


def mutated(xml, draw):
    """A header with one change."""
    place = draw(st.integers(0, len(xml)))
    before, behind = xml[:place], xml[place:]
    change = draw(st.sampled_from(["insert", "delete", "replace", "repeat"]))
    if change == "delete":
        return before + behind[draw(st.integers(1, 40)):]
    if change == "repeat":
        start = draw(st.integers(0, len(xml)))
        return before + xml[start:start + draw(st.integers(1, 200))] + behind
    token = draw(TOKENS)
    if change == "replace":
        behind = behind[len(token):]
    return before + token + behind


@pytest.mark.slow
@FUZZ
@given(st.sampled_from(list(SMALL)), st.data())
def test_mutated_headers_end_in_a_picture_or_a_sentence(shelf, name, data):
    file = SMALL[name]
    xml = header_of(file)
    for _ in range(data.draw(st.integers(1, 4))):
        xml = mutated(xml, data.draw)
    if len(xml) < POSITION - 16:
        taken_or_refused(monolithic(xml, file[POSITION:]), shelf)
    else:
        taken_or_refused(file[:16] + xml, shelf)


VALUES = {
    "geometry": ["13:7:1", "7:13:1", "91:1:1", "13:7:3", "1:1:1", "13:7", "0:7:1", "-1:-91:1",
                 "9999999999:1:1", "13:7:01", "x"],
    "sampleFormat": ["UInt8", "UInt16", "UInt32", "UInt64", "Float32", "Float64", "Complex32",
                     "uint16", "", "x"],
    "bounds": [None, "0:1", "1:0", "0:0", "0:65535", "-1:1", "nan:1", "0:inf", "0", "", "x",
               "0:1e-300", "1e300:2e300"],
    "colorSpace": [None, "Gray", "RGB", "CIELab", "rgb", "x"],
    "pixelStorage": [None, "Planar", "Normal", "x"],
    "byteOrder": [None, "little", "big", "x"],
    "location": ["attachment:8192:182", "attachment:8192:91", "attachment:8192:1e3",
                 "attachment:0:182", "attachment:8192:546", "embedded", "inline:hex",
                 "inline:base64", "url(x)", "attachment:8192:99999999999999",
                 "attachment:8191:182", None],
    "compression": [None, "zlib:182", "zlib+sh:182:2", "lz4:182", "lz4+sh:182:2", "zstd:182",
                    "zlib:1820000000", "x:182", "zlib", "lz4:364"],
    "subblocks": [None, "182,182", "91,91:91,91", "1,1:181,181", "0,0", "x"],
    "checksum": [None, "sha-1:" + sha1(DATA), "sha-1:00", "md5:00"],
}
NUMPY_TYPES = {"UInt8": "u1", "UInt16": "u2", "uint16": "u2", "UInt32": "u4", "UInt64": "u8",
               "Float32": "f4", "Float64": "f8"}


def understood(attributes):
    """The planes as an independent reading of the specification has them, in float64.

    All compressions among the VALUES hold the samples raw, or are damaged.
    """
    width, height, channels = map(int, attributes["geometry"].split(":"))
    _, position, size = attributes["location"].split(":")
    stored = one_image()[int(position):int(position) + int(size)]
    dtype = np.dtype(NUMPY_TYPES[attributes["sampleFormat"]])
    if attributes["byteOrder"] == "big":
        dtype = dtype.newbyteorder(">")
    assert len(stored) == int(size) == width * height * channels * dtype.itemsize
    if "+sh" in (attributes["compression"] or ""):
        half = len(stored) // 2
        pairs = zip(stored[:half], stored[half:])
        stored = b"".join(map(bytes, pairs))
    values = np.frombuffer(stored, dtype).astype(np.float64)
    if attributes["pixelStorage"] == "Normal":
        values = np.moveaxis(values.reshape(height, width, channels), 2, 0)
    else:
        values = values.reshape(channels, height, width)
    bounds = attributes["bounds"] or "0:%d" % (2 ** (8 * dtype.itemsize) - 1)
    lower, upper = sorted(map(float, bounds.split(":")))
    with np.errstate(all="ignore"):
        unit = (values - lower) / (upper - lower)
    tiny = np.finfo(np.float64 if dtype.name == "float64" else np.float32).tiny
    clipped = np.where(unit < 0, tiny, np.minimum(unit, 1))
    unit = np.where(np.isfinite(values), clipped, unit)
    is_rgb = (attributes["colorSpace"] or "").upper() == "RGB"
    return unit[:3 if is_rgb else 1]


@FUZZ
@given(st.fixed_dictionaries({name: st.sampled_from(values) for name, values in VALUES.items()}))
def test_every_mixture_of_attributes_is_understood_or_refused(shelf, attributes):
    shot = taken_or_refused(one_image(**attributes), shelf)
    if shot is not None:
        expected = understood(attributes).astype(shot.planes.dtype)
        assert np.array_equal(shot.planes, expected, equal_nan=True)


@pytest.mark.slow
@FUZZ
@given(st.sampled_from(list(PLAIN)), st.data())
def test_flipped_bits_in_the_pixels_never_pass_a_checksum(shelf, name, data):
    file = PLAIN[name]
    block, xml = file[POSITION:], header_of(file)
    if b"attachment:8192:%d" % len(block) not in xml:  # an odd location, or bytes to spare
        return
    checksum = 'checksum="sha-1:{}" '.format(sha1(block))
    xml = xml.replace(b"<Image ", b"<Image " + checksum.encode(), 1)
    assert taken_or_refused(monolithic(xml, block), shelf) is not None
    flipped = bytearray(block)
    place = data.draw(st.integers(0, len(block) - 1))
    flipped[place] ^= 1 << data.draw(st.integers(0, 7))
    assert taken_or_refused(monolithic(xml, bytes(flipped)), shelf) is None


@pytest.mark.slow
@FUZZ
@given(st.sampled_from(list(PLAIN)), st.data())
def test_truncated_files_are_always_refused(shelf, name, data):
    file = PLAIN[name]
    last = len(file) - 1
    cut = data.draw(st.integers(0, last) | st.integers(max(0, last - 19), last))
    assert taken_or_refused(file[:cut], shelf) is None


# ----------------------------------------------------------------------------- found by fuzzing

def test_inline_data_around_a_child_are_kept_whole(tmp_path):
    """Found: the text behind the child was read, checked, and then not written."""
    child = ('<Property id="A" type="UI8Vector" length="6" location="inline:base64">'
             'AAAA<x/>BBBB</Property>')
    shot = read(one_image(children=child), tmp_path)
    assert not read(written(shot.planes, shot.source), tmp_path).warnings
