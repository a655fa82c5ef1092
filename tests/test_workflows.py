"""The scripts for Siril and PixInsight, as they stand in README.md.

The two programs are stand-ins, which have what the programs' documentation has, and nothing else.
Only the settings at the top of the scripts are filled in, as a user does it.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import types
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from astropy.io import fits

from bgoptimizer import VERSION
from runner import SCRIPT
from scenes import load, save, sloping_sky, to_planes

README = (SCRIPT.parent / "README.md").read_text(encoding="utf-8")
OPTIONS = ["-dx", "4", "-dq", "0.999", "--smoothing", "1", "--seed", "1"]


def script(name, **settings):
    """A script of the README, with these in the place of the strings and lists at its top."""
    text = re.search(rf"<!-- script: {name} -->\n```\w+\n(.*?)\n```", README, re.DOTALL)[1]
    for key, value in settings.items():
        text, count = re.subn(rf"(?m)\b{key} = (\[[^\]]*\]|[^,;\n]*?)(?=[,;]|  #|$)",
                              lambda _: f"{key} = {json.dumps(value)}", text, count=1)
        assert count == 1, key
    return text


def flatness(image):
    """Return how uneven a picture (h, w, c) is.

    This is the range of the means of its 4 x 4 parts over their median.
    """
    height = image.shape[0] // 4
    width = image.shape[1] // 4
    whole = image[:4 * height, :4 * width]
    means = whole.reshape(4, height, 4, width, -1).mean((1, 3))  # (4, 4, c)
    return np.ptp(means, (0, 1)).max() / np.median(means)


# ------------------------------------------------------------------------------------ Siril

class SirilError(Exception):
    """The base of what sirilpy raises."""


class CommandError(SirilError):
    """A command of Siril has failed."""


class NoImageError(SirilError):
    """No picture is open."""


class Point(NamedTuple):
    """A corner of a polygon; y counts from the top of the picture."""

    x: float
    y: float


class Polygon(NamedTuple):
    points: list


class Siril:
    """The part of sirilpy's interface that is used.

    A picture is open, and what is done is noted.
    """

    def __init__(self, pixels, folder, version=(1, 4, 3), corners=(), in_a_window=True):
        self.pixels = pixels
        self.folder = folder
        self.version = version
        self.polygons = [Polygon(list(corners))] if corners else []
        self.in_a_window = in_a_window
        self.done = []
        self.lines = []
        self.progress = []

    def __call__(self):  # sirilpy.SirilInterface()
        return self

    def connect(self):
        self.done.append("connect")

    def cmd(self, *words):
        assert "lock" not in self.done, "commands do not run while a script holds the picture"
        name, version = words
        assert name == "requires"
        if tuple(map(int, version.split("."))) > self.version:
            raise CommandError(f"requires {version} failed")

    def is_cli(self):
        return not self.in_a_window

    def get_siril_wd(self):
        return str(self.folder)

    @contextmanager
    def image_lock(self):
        self.done.append("lock")
        yield
        self.done.append("unlock")

    def get_image_pixeldata(self):
        if self.pixels is None:
            raise NoImageError("no image is loaded")
        return self.pixels.copy()

    def overlay_get_polygons_list(self):
        assert self.in_a_window
        return self.polygons

    def undo_save_state(self, description):
        if self.version < (1, 4, 3):
            raise SirilError("undo_save_state failed")
        self.done.append("undo")

    def set_image_pixeldata(self, image_data):
        assert "lock" in self.done and "unlock" not in self.done
        assert image_data.dtype in (np.float32, np.uint16) and image_data.dtype.isnative
        self.done.append("set")
        self.pixels = image_data

    def log(self, my_string):
        self.lines.append(my_string)

    def update_progress(self, message, progress):
        assert 0 <= progress <= 1
        self.progress.append((message, progress))

    def reset_progress(self):
        self.done.append("reset")


def run_siril_script(monkeypatch, siril, options=OPTIONS):
    """Run the script in a Siril; returns the mask that the tool got."""
    masks = []

    def safe_subprocess_popen(command, **settings):
        *_, picture, folder, flag, mask = command[:-len(options)]
        assert flag == "-m"
        assert Path(folder).parent == siril.folder  # a Flatpak shares it with its host
        assert Path(picture).parent == Path(mask).parent == Path(folder)
        masks.append(fits.getdata(mask, memmap=False))
        return subprocess.Popen(command, **settings)

    utility = types.ModuleType("sirilpy.utility")
    utility.safe_subprocess_Popen = safe_subprocess_popen
    module = types.ModuleType("sirilpy")
    module.utility = utility
    module.SirilInterface = siril
    module.SirilError = SirilError
    module.ensure_installed = lambda *names: None
    monkeypatch.setitem(sys.modules, "sirilpy", module)
    monkeypatch.setitem(sys.modules, "sirilpy.utility", utility)
    text = script(
        "siril",
        HOME=str(SCRIPT.parent),
        TOOL=[sys.executable, "-E", str(SCRIPT)],
        OPTIONS=options,
    )
    exec(compile(text, "siril", "exec"), {})
    assert list(siril.folder.iterdir()) == []  # what was written in Siril's folder is removed
    return masks[0] if masks else None


@pytest.mark.slow
@pytest.mark.parametrize("channels, dtype", [(1, np.float32), (3, np.float32), (3, np.uint16)])
def test_siril_gets_its_picture_back_without_the_sky(channels, dtype, monkeypatch, folder):
    image, _ = sloping_sky(channels=channels)
    planes = to_planes(image)
    pixels = planes if dtype == np.float32 else np.rint(65535 * planes).astype(dtype)
    if channels == 1:
        pixels = pixels[0]
    working = folder / "M 31 [Ha]"
    working.mkdir()
    siril = Siril(pixels, working)
    mask = run_siril_script(monkeypatch, siril)
    assert siril.done == ["connect", "lock", "undo", "set", "unlock", "reset"]  # one step of undo
    assert siril.pixels.shape == pixels.shape and siril.pixels.dtype == dtype
    left = np.atleast_3d(np.moveaxis(siril.pixels, 0, -1) if channels == 3 else siril.pixels)
    assert flatness(left.astype(float)) < 0.1 * flatness(image)
    assert any(line.startswith("gradient") for line in siril.lines)
    np.testing.assert_allclose(np.median(siril.pixels), np.median(pixels), rtol=0.05)
    assert mask.shape == pixels.shape[-2:] and (mask == 255).all()  # no polygon is drawn

    messages, steps = zip(*siril.progress)
    assert list(messages) == siril.lines
    assert sorted(steps) == list(steps)
    fitting = next(step for text, step in siril.progress if text.startswith("fitting"))
    assert 0.2 < fitting < 0.8


@pytest.mark.slow
def test_siril_gets_no_steps_where_a_16_bit_sky_changes_by_less_than_one(monkeypatch, folder):
    image, _ = sloping_sky()
    counts = np.rint(100 * to_planes(image)).astype(np.uint16)  # its sky rises by 4 to 7
    floating = Siril((counts / np.float32(65535)).astype(np.float32), folder)
    run_siril_script(monkeypatch, floating)
    siril = Siril(counts, folder)
    run_siril_script(monkeypatch, siril)
    change = siril.pixels - 65535.0 * floating.pixels
    assert np.abs(change).max() <= 1
    # Means of many pixels are those of the unrounded picture. Those of 8 x 8 have an error of 0.06
    height, width = counts.shape[1] // 8, counts.shape[2] // 8
    blocks = change[:, :8 * height, :8 * width].reshape(-1, height, 8, width, 8)
    assert np.abs(blocks.mean((2, 4))).max() < 0.3
    assert abs(change.mean()) < 0.01


@pytest.mark.slow
def test_what_is_drawn_around_in_siril_is_left_out(monkeypatch, folder):
    image, _ = sloping_sky()
    pixels = to_planes(image)  # row 0 is the lowest
    upper_left = [Point(0, 0), Point(40, 0), Point(40, 20), Point(0, 20)]  # from the top
    siril = Siril(pixels, folder, corners=upper_left)
    mask = run_siril_script(monkeypatch, siril)
    assert (mask[-20:, :40] == 0).all()
    assert (mask[:-21] == 255).all() and (mask[:, 41:] == 255).all()
    reduced = next(line for line in siril.lines if line.startswith("reduced"))
    assert " 5.8% masked" in reduced  # 40 x 20 of 144 x 96 pixels


@pytest.mark.slow
@pytest.mark.parametrize("in_a_window", [True, False])
def test_siril_keeps_its_picture_when_the_tool_fails(in_a_window, monkeypatch, folder):
    pixels = np.full((40, 60), np.nan, np.float32)
    siril = Siril(pixels, folder, in_a_window=in_a_window)
    mask = run_siril_script(monkeypatch, siril)
    assert (mask == 255).all()  # where there is no window, nothing is drawn
    assert "set" not in siril.done and "undo" not in siril.done
    assert any("error:" in line for line in siril.lines) and "did nothing" in siril.lines[-1]
    assert siril.done[-1] == "reset"


def test_an_old_siril_that_could_lose_the_result_is_told_before_anything_is_done(
        monkeypatch, folder):
    siril = Siril(np.zeros((40, 60), np.float32), folder, version=(1, 4, 2))
    assert run_siril_script(monkeypatch, siril) is None
    assert siril.done == ["connect", "reset"]
    assert siril.lines == ["requires 1.4.3 failed"]


def test_a_siril_without_a_picture_is_told_so(monkeypatch, folder):
    siril = Siril(None, folder)
    assert run_siril_script(monkeypatch, siril) is None
    assert siril.lines == ["no image is loaded"] and siril.done[-1] == "reset"


# ------------------------------------------------------------------------------------ PixInsight

# The objects of PixInsight that are used, and nothing else: the script sees no object of node's.
# Samples are the bytes of an XISF file; what is done is noted.
PIXINSIGHT = r"""
const fs = require("fs"), done = [], printed = [], warned = [];
const CoreApplication = {
  ensureMinimumVersion: (...version) => done.push("version " + version.join(".")),
  processEvents: () => done.push("events"),
};
const UndoFlag = {NoSwapFile: "NoSwapFile"};
const Console = {
  writeln: text => printed.push(text),
  warningln: text => warned.push(text),
};
const File = {
  systemTempDirectory: FOLDER,
  exists: path => fs.existsSync(path),
  remove: path => fs.unlinkSync(path),
};
class Image {
  constructor(samples) {
    this.samples = samples;
    this.width = 144;
    this.height = 96;
    this.numberOfChannels = 3;
    this.isColor = true;
  }
  assign(other) { this.samples = other.samples; }
}
class View {
  constructor(name, samples) { this.name = name; this.image = new Image(samples); }
  beginProcess(...flags) { done.push(["begin", this.name, ...flags].join(" ")); }
  endProcess() { done.push("end " + this.name); }
}
class ImageWindow {
  constructor(width, height, channels, bits, floating, color) {
    done.push(["new", width, height, channels, bits, floating, color].join(" "));
    this.mainView = new View("copy");
  }
  saveAs(path, ...questions) {
    done.push("save " + questions.join(" "));
    fs.writeFileSync(path, this.mainView.image.samples);
  }
  show() { done.push("show " + this.mainView.name); }
  forceClose() { done.push("close " + this.mainView.name); }
  static open(path) {
    const window = Object.create(ImageWindow.prototype);
    window.mainView = new View(/_bg\w+/.exec(path)[0], fs.readFileSync(path));
    return [window];
  }
}
const active = Object.create(ImageWindow.prototype);
active.isNull = false;
active.mainView = new View("active", fs.readFileSync(PICTURE));
ImageWindow.activeWindow = ACTIVE;
class ExternalProcess {
  start(program, words) {
    const ended = require("child_process").spawnSync(program, words, {encoding: "utf8"});
    this.exitCode = ended.status;
    this.stdout = ended.stdout;
    this.stderr = ended.stderr;
    this.turns = 2;
  }
  get isStarting() { return false; }
  get isRunning() { return this.turns > 0; }
  waitForFinished(milliseconds) {  // never true: as in Qt, if it ends while events are processed
    done.push("wait " + milliseconds);
    this.turns--;
    return false;
  }
}
const known = {
  CoreApplication, ExternalProcess, File, ImageWindow, UndoFlag, console: Console,
};
let failure = "";
try {
  require("vm").runInNewContext(SCRIPT, known);
} catch (error) { failure = error.message; }
fs.writeFileSync(PICTURE, active.mainView.image.samples);
process.stdout.write(JSON.stringify({
  done, printed: printed.join("\n"), warned: warned.join("\n"), failure,
}));
"""


def run_pixinsight_script(folder, image, active="active", **settings):
    """Run the script with an image open; returns what it did, and the image afterwards.

    `active` is what PixInsight tells of the active window, in JavaScript.
    """
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    temporary = folder / "temporary files"
    temporary.mkdir()
    picture = save(folder / "open.xisf", image)
    settings = {"PYTHON": sys.executable, **settings}
    text = script("pixinsight", HOME=str(SCRIPT.parent), **settings)
    first, rest = text.split("\n", 1)
    assert first == "#engine v8"
    text = re.sub(r"(?m)^#feature-(?:id|info) +\S.*$", "", rest)  # PixInsight's preprocessor
    program = PIXINSIGHT.replace("ACTIVE", active)
    program = program.replace("FOLDER", json.dumps(str(temporary)))
    program = program.replace("PICTURE", json.dumps(picture))
    program = program.replace("SCRIPT", json.dumps(text))
    (folder / "program.js").write_text(program, encoding="utf-8")
    done = subprocess.run(
        ["node", "program.js"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert list(temporary.iterdir()) == []  # temporary files are removed
    return json.loads(done.stdout), load(picture)


@pytest.mark.slow
@pytest.mark.parametrize("correction, shown", [("subtract", False), ("divide", True)])
def test_pixinsight_gets_its_picture_back_without_the_sky(correction, shown, folder):
    image, _ = sloping_sky()
    options = OPTIONS + ["--correction", correction]
    told, after = run_pixinsight_script(folder, image, OPTIONS=options, SHOW_MODEL=shown)
    assert told["failure"] == "" and "gradient" in told["printed"]
    corrected = "_bgSubtracted" if correction == "subtract" else "_bgDivided"
    model = ["show _bgModel"] if shown else []
    assert told["done"] == [
        "version 1.9.4",
        "new 144 96 3 32 true true",
        "begin copy NoSwapFile",
        "end copy",
        "save false false true false",
        "wait 250",
        "events",
        "wait 250",
        "begin active",
        "end active",
        f"close {corrected}",
        *model,
        "close copy",
    ]
    assert flatness(after) < 0.1 * flatness(image)


@pytest.mark.slow
def test_pixinsight_keeps_its_picture_when_the_tool_fails(folder):
    image, _ = sloping_sky()
    told, after = run_pixinsight_script(folder, image, OPTIONS=["--no-such-flag"])
    assert "did nothing" in told["failure"] and "error: unrecognized" in told["warned"]
    assert "begin active" not in told["done"] and told["done"][-1] == "close copy"
    np.testing.assert_array_equal(after, image)


@pytest.mark.parametrize("active", ["null", "{isNull: true}"])
def test_pixinsight_without_a_window_is_told_what_to_open(active, folder):
    image, _ = sloping_sky()
    told, _ = run_pixinsight_script(folder, image, active=active)
    assert told["failure"] == "no window is open: bgoptimizer needs a linear picture"
    assert told["done"] == ["version 1.9.4"]


@pytest.mark.slow
def test_pixinsight_says_that_a_picture_is_not_linear(folder):
    image, _ = sloping_sky(240, 360)  # in less than ten tiles no stretch is looked for
    stretched = (image / image.max()) ** 0.3
    told, _ = run_pixinsight_script(folder, stretched, OPTIONS=OPTIONS)
    assert "the picture looks stretched" in told["warned"]


@pytest.mark.skipif(os.name == "nt", reason="there is no env")
def test_the_libraries_of_pixinsight_are_not_those_of_the_tool(folder, monkeypatch):
    """PixInsight's start script names its own libraries, a TensorFlow among them."""
    python = folder / "python that tells"
    names = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FRAMEWORK_PATH")
    for name in names:
        monkeypatch.setenv(name, str(folder / "PixInsight" / "bin" / "lib"))
    told = "".join(f"${name}" for name in names)
    python.write_text(f'#!/bin/sh\necho "[{told}] $2"\nexit 1\n')
    python.chmod(0o755)
    image, _ = sloping_sky()
    told, _ = run_pixinsight_script(folder, image, PYTHON=str(python))
    assert told["printed"].strip() == f"[] {SCRIPT.parent}/bgoptimizer.py"


def test_the_scripts_say_whose_they_are_and_where_the_menu_has_them():
    assert f"bgoptimizer {VERSION} " in script("siril").splitlines()[0]
    assert re.search(r"(?m)^#feature-id +Utilities > bgoptimizer$", script("pixinsight"))
