"""The scripts for Siril and PixInsight, as they stand in README.md.

The two programs are stand-ins. Only the settings at their top are filled in, as a user does it.
"""
import json
import re
import shutil
import subprocess
import sys
import types
from contextlib import contextmanager

import numpy as np
import pytest

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

class Siril:
    """The part of sirilpy's interface that is used.

    A picture is open, and what is done is noted.
    """

    def __init__(self, pixels):
        self.pixels = pixels
        self.done = []
        self.lines = []

    def __call__(self):  # sirilpy.SirilInterface()
        return self

    def connect(self):
        self.done.append("connect")

    @contextmanager
    def image_lock(self):
        self.done.append("lock")
        yield
        self.done.append("unlock")

    def get_image_pixeldata(self):
        return self.pixels.copy()

    def undo_save_state(self, text):
        self.done.append("undo")

    def set_image_pixeldata(self, pixels):
        assert "lock" in self.done and "unlock" not in self.done
        assert pixels.dtype in (np.float32, np.uint16) and pixels.dtype.isnative
        self.done.append("set")
        self.pixels = pixels

    def log(self, text):
        self.lines.append(text)


def run_siril_script(monkeypatch, pixels, options=OPTIONS):
    siril = Siril(pixels)
    module = types.SimpleNamespace(
        SirilInterface=siril,
        SirilError=type("SirilError", (Exception,), {}),
        ensure_installed=lambda *names: None,
    )
    monkeypatch.setitem(sys.modules, "sirilpy", module)
    text = script(
        "siril",
        HOME=str(SCRIPT.parent),
        TOOL=[sys.executable, "-E", str(SCRIPT)],
        OPTIONS=options,
    )
    exec(compile(text, "siril", "exec"), {})
    return siril


@pytest.mark.slow
@pytest.mark.parametrize("channels, dtype", [(1, np.float32), (3, np.float32), (3, np.uint16)])
def test_siril_gets_its_picture_back_without_the_sky(channels, dtype, monkeypatch):
    image, _ = sloping_sky(channels=channels)
    planes = to_planes(image)
    pixels = planes if dtype == np.float32 else np.rint(65535 * planes).astype(dtype)
    if channels == 1:
        pixels = pixels[0]
    siril = run_siril_script(monkeypatch, pixels)
    assert siril.done == ["connect", "lock", "undo", "set", "unlock"]  # one step of undo
    assert siril.pixels.shape == pixels.shape and siril.pixels.dtype == dtype
    left = np.atleast_3d(np.moveaxis(siril.pixels, 0, -1) if channels == 3 else siril.pixels)
    assert flatness(left.astype(float)) < 0.1 * flatness(image)
    assert any(line.startswith("gradient") for line in siril.lines)
    np.testing.assert_allclose(np.median(siril.pixels), np.median(pixels), rtol=0.05)


@pytest.mark.slow
def test_siril_keeps_its_picture_when_the_tool_fails(monkeypatch):
    pixels = np.full((40, 60), np.nan, np.float32)
    siril = run_siril_script(monkeypatch, pixels)
    assert "set" not in siril.done and "undo" not in siril.done
    assert any("error:" in line for line in siril.lines) and "did nothing" in siril.lines[-1]


# ------------------------------------------------------------------------------------ PixInsight

# The objects of PixInsight that are used. Samples are the bytes of an XISF file; what is done is
# noted.
PIXINSIGHT = r"""
const fs = require("fs"), done = [], printed = [];
const CoreApplication = {
  ensureMinimumVersion: (...version) => done.push("version " + version.join(".")),
};
const UndoFlag = {NoSwapFile: "NoSwapFile"};
const processEvents = () => done.push("events");
console.writeln = text => printed.push(text);
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
ImageWindow.activeWindow = Object.create(ImageWindow.prototype);
ImageWindow.activeWindow.mainView = new View("active", fs.readFileSync(PICTURE));
class ExternalProcess {
  start(program, words) {
    const ended = require("child_process").spawnSync(program, words, {encoding: "utf8"});
    this.exitCode = ended.status;
    this.stdout = ended.stdout;
    this.stderr = ended.stderr;
    this.turns = 2;
  }
  get isRunning() { return this.turns > 0; }
  waitForFinished(milliseconds) {  // never true: as in Qt, if it ends while events are processed
    done.push("wait " + milliseconds);
    this.turns--;
    return false;
  }
}
let failure = "";
try {
SCRIPT
} catch (error) { failure = error.message; }
fs.writeFileSync(PICTURE, ImageWindow.activeWindow.mainView.image.samples);
process.stdout.write(JSON.stringify({done, printed: printed.join("\n"), failure}));
"""


def run_pixinsight_script(folder, image, **settings):
    """Run the script with an image open; returns what it did, and the image afterwards."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    temporary = folder / "temporary files"
    temporary.mkdir()
    picture = save(folder / "open.xisf", image)
    text = script("pixinsight", HOME=str(SCRIPT.parent), PYTHON=sys.executable, **settings)
    assert text.startswith("#engine v8\n")
    text = text.split("\n", 1)[1]  # a line for PixInsight's preprocessor
    program = PIXINSIGHT.replace("SCRIPT", text)
    program = program.replace("FOLDER", json.dumps(str(temporary)))
    program = program.replace("PICTURE", json.dumps(picture))
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
    assert "did nothing" in told["failure"] and "error: unrecognized" in told["printed"]
    assert "begin active" not in told["done"] and told["done"][-1] == "close copy"
    np.testing.assert_array_equal(after, image)
