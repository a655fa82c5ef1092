"""The notebook as Colab and as plain Jupyter run it, from its first cell to its last."""
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import bgoptimizer
from scenes import load, save, sloping_sky

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(bgoptimizer.__file__).resolve().parent
NOTEBOOK = ROOT / "bgoptimizer_colab.ipynb"
STEM = "M 31 [Ha] 'new' #2"
GOOD = f"{STEM}.xisf"
BAD = "bad one [1].xisf"
MASK = "my mask [1].xisf"
FAST = dict(  # what is filled into the form
    auto=False,
    delinearization_quantile="0.999",
    smoothing="1",
    initializer="grid",
    downscaling_factor=4,
    epochs=110,
)
WIDGETS = "application/vnd.jupyter.widget-view+json"
RED = "\033[1;31m"
AMBER = "\033[1;33m"
PLAIN = "\033[0m"


# What google.colab does, as far as the notebook can tell: files come from and go to folders beside
# its own.
COLAB = '''
import os, shutil, sys, types

def upload():
    for name in os.listdir({uploads!r}):
        shutil.copy(os.path.join({uploads!r}, name), name)
    return {{name: open(name, "rb").read() for name in os.listdir({uploads!r})}}

def download(path):
    shutil.copy(path, {downloads!r})

files = types.SimpleNamespace(upload=upload, download=download)
sys.modules["google.colab"] = types.SimpleNamespace(files=files)
sys.modules["google.colab.files"] = files
sys.modules["ipywidgets"] = None  # the preview is a still picture
'''

# A person who moves a slider in the preview's panel, and clicks on its button
IN_THE_PANEL = """
import gc
panel, = [one for one in gc.get_objects() if type(one).__name__ == "PreviewPanel"]
panel.widgets["smoothing"].label = "10.0"
panel.button.click()
"""


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def source(cell_id, **form):
    """Return a cell's source, its form fields filled in."""
    sources = {cell.id: cell.source for cell in read().cells}
    text = sources[cell_id]
    for name, value in form.items():
        filled_in = f"{name} = {value!r}"
        text, count = re.subn(rf"(?m)^{name} = .*?(?=  #@param)", lambda _: filled_in, text)
        assert count == 1, name
    return text


def execute(folder, forms, colab=None, panel=None):
    """Run the whole notebook in a folder; returns {cell id: (text, number of pictures)}.

    `colab` and `panel` are cells to put before the first and after the preview.
    """
    notebook = read()
    for cell in notebook.cells:
        cell.source = source(cell.id, **forms.get(cell.id, {}))
    if colab:
        notebook.cells.insert(0, nbformat.v4.new_code_cell(colab, id="stand-in"))
    if panel:
        place = [cell.id for cell in notebook.cells].index("preview") + 1
        notebook.cells.insert(place, nbformat.v4.new_code_cell(panel, id="panel"))
    shutil.copy(bgoptimizer.__file__, folder)
    surroundings = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=None, resources=surroundings).execute()
    results = {}
    for cell in notebook.cells:
        text = ""
        pictures = 0
        for output in cell.get("outputs", []):
            text += output.get("text", "")
            shown = output.get("data", {})
            pictures += "image/png" in shown or WIDGETS in shown
        results[cell.id] = text, pictures
    return results


def run_cells(*sources, **names):
    """Run cells in this process; returns their names."""
    for text in sources:
        exec(compile(text, "cell", "exec"), names)
    return names


def check_model(model, sky):
    """Assert that a model (h, w, c) is the known sky, but for a constant."""
    error = model - sky
    error -= np.median(error, (0, 1))
    assert np.abs(error).max() < 0.1 * np.ptp(sky, (0, 1)).min()


def stand_in_for_colab(monkeypatch, upload):
    """Make google.colab importable; its upload is the one that is given."""
    files = types.SimpleNamespace(upload=upload)
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(files=files))


def test_the_notebook_is_valid_bare_and_has_stable_ids():
    notebook = read()
    nbformat.validate(notebook)
    assert [cell.id for cell in notebook.cells] == [
        "what-it-is",
        "drive",
        "get-the-tool",
        "device",
        "pictures",
        "settings",
        "preview",
        "optimize",
        "download",
        "all-options",
    ]
    for cell in notebook.cells[1:]:
        assert cell.outputs == []
        assert cell.execution_count is None
        compile(cell.source, cell.id, "exec")


def test_no_graphics_card_is_asked_for():
    assert set(read().metadata) == {"colab", "kernelspec", "language_info"}
    assert "gpuType" not in read().metadata.colab


def test_the_first_cell_is_short_and_no_cell_uses_what_is_private():
    assert len(source("get-the-tool").splitlines()) <= 20
    for cell in read().cells:
        assert "bgoptimizer._" not in cell.source


@pytest.mark.slow
def test_on_colab_uploads_become_downloads(folder):
    image, sky = sloping_sky()
    uploads = folder / "uploads"
    downloads = folder / "downloads"
    content = folder / "content"
    for each in (uploads, downloads, content):
        each.mkdir()
    save(uploads / GOOD, image)
    save(uploads / MASK, np.ones_like(image[..., :1]))
    (uploads / BAD).write_bytes(b"XISF0100 and then nothing")
    colab = COLAB.format(uploads=str(uploads), downloads=str(downloads))
    form = dict(FAST, mask=MASK, compress=True, more_options="--seed '7'")
    told = execute(content, {"settings": form}, colab)

    text, _ = told["device"]
    version = f"bgoptimizer {bgoptimizer.VERSION}\n"
    python = f"Python {sys.version_info[0]}."
    for words in (version, python, "tensorflow 2."):
        assert words in text
    assert "WARNING" not in text
    text, pictures = told["preview"]  # of the first picture
    assert pictures == 1
    assert "144 x 96" in text
    assert "100.0% used" in text
    text, pictures = told["optimize"]
    assert pictures == 1
    assert "Traceback" not in text
    assert text.count(f"{RED}bgoptimizer: error: ") == 1
    assert f"{RED}bgoptimizer: warning: failed: " in text
    text, _ = told["all-options"]
    assert "--delinearization-quantile" in text

    model = f"{STEM}_bgModel.xisf"
    assert sorted(os.listdir(downloads)) == [
        model,
        f"{STEM}_bgSubtracted.xisf",
        f"{STEM}_figures.png",
        "bgoptimizer_report.csv",
    ]
    check_model(load(downloads / model), sky)
    header = (downloads / model).read_bytes()[:100_000]
    assert b"seed = 7" in header
    assert b'compression="lz4hc+sh' in header


@pytest.mark.slow
def test_in_jupyter_files_come_from_a_folder(folder):
    image, sky = sloping_sky(channels=1)
    lights = folder / "my [good] \"lights\""
    lights.mkdir()
    save(lights / GOOD, image)
    save(lights / "b.XISF", image)
    save(lights / "b_bgModel.xisf", image)  # of an earlier run
    form = dict(FAST, output_folder="out 'here'", save_mask=True, output_format="fits")
    panel = IN_THE_PANEL if importlib.util.find_spec("ipywidgets") else None
    told = execute(folder, {"pictures": {"folder": str(lights)}, "settings": form}, None, panel)

    _, pictures = told["preview"]
    assert pictures == 1
    text, pictures = told["optimize"]
    assert pictures == 2
    assert "2 pictures: 2 done" in text
    text, _ = told["download"]
    assert text.count(" MB\n") == 9
    assert str(folder) in text

    written = {"bgoptimizer_report.csv"}
    for stem in (STEM, "b"):
        for ending in ("bgModel.fits", "bgSubtracted.fits", "figures.png", "mask.fits"):
            written.add(f"{stem}_{ending}")
    out = folder / "out 'here'"
    assert set(os.listdir(out)) == written
    planes = bgoptimizer.read_picture(str(out / "b_bgModel.fits")).planes
    check_model(np.moveaxis(planes, 0, -1), sky)
    header = (out / "b_bgModel.fits").read_bytes()[:100_000]
    assert (b"smoothing = 10.0" if panel else b"smoothing = 1.0") in header


@pytest.mark.parametrize("colab", [True, False])
def test_without_pictures_the_demo_is_taken(colab, folder, monkeypatch, capsys):
    stand_in_for_colab(monkeypatch, upload=dict)  # cancelled
    names = run_cells(source("pictures"), COLAB=colab, os=os, bgoptimizer=bgoptimizer)
    path = str(ROOT / "imgs" / "demo.xisf")  # beside the tool
    assert names["where"] == path
    assert names["pictures"][0] == path
    assert "demo" in capsys.readouterr().out


def test_a_wrong_folder_is_said_and_no_demo_put_in_its_place(folder, capsys):
    cell = source("pictures", folder="absent [x]")
    names = run_cells(cell, COLAB=False, os=os, bgoptimizer=bgoptimizer)
    assert names["pictures"] == []
    assert "absent [x] holds no" in capsys.readouterr().out


def test_only_what_is_missing_is_installed_and_never_tensorflow(folder, monkeypatch):
    shutil.copy(bgoptimizer.__file__, folder)
    asked = []

    def note(command, **_):
        asked.append(command)

    def find_spec(name, *_):
        missing = name in ("xisf", "PIL", "tensorflow")
        return None if missing else object()

    monkeypatch.setattr(subprocess, "run", note)
    monkeypatch.setattr("importlib.util.find_spec", find_spec)
    run_cells(source("get-the-tool"))
    assert asked == [[sys.executable, "-m", "pip", "install", "--quiet", "pillow", "xisf"]]


def test_what_it_installs_is_what_the_tool_needs_beside_tensorflow():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    needed = {line.split()[0] for line in lines if line and not line.startswith("#")}
    listed = re.search(r'modules = "(.*?)"', source("get-the-tool"))[1]
    package_of = {"PIL": "pillow", "skimage": "scikit-image"}
    packages = {package_of.get(module, module) for module in listed.split()}
    assert packages == needed - {"tensorflow", "tensorflow-addons"}


@pytest.fixture
def import_anew(monkeypatch):
    """The next import of bgoptimizer looks for it; afterwards all is as it was."""
    monkeypatch.setattr(sys, "path", sys.path[:])

    def forget():
        monkeypatch.delitem(sys.modules, "bgoptimizer", raising=False)

    return forget


def put_tool(folder):
    """Put the tool into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(bgoptimizer.__file__, folder)


@pytest.mark.parametrize("place", [
    ".",
    "my tools",
    "drive/MyDrive",
    "drive/MyDrive/Colab Notebooks",
])
def test_the_tool_is_found_without_typing(place, folder, monkeypatch, import_anew):
    def upload():
        raise AssertionError("nothing is to be uploaded")

    stand_in_for_colab(monkeypatch, upload)
    put_tool(folder / place)
    import_anew()
    names = run_cells(source("get-the-tool"))
    assert Path(names["bgoptimizer"].__file__).resolve() == folder / place / "bgoptimizer.py"


def test_a_tool_that_is_nowhere_is_uploaded(folder, monkeypatch, import_anew):
    def upload():
        put_tool(folder)
        return {"bgoptimizer.py": b""}

    stand_in_for_colab(monkeypatch, upload)
    import_anew()
    names = run_cells(source("get-the-tool"))
    assert Path(names["bgoptimizer"].__file__).resolve() == folder / "bgoptimizer.py"


def test_the_tool_comes_from_an_address_with_https_only(folder, monkeypatch, import_anew):
    asked = []

    def clone(command, check):
        asked.append(command[-2:])
        put_tool(folder / "tool")

    monkeypatch.setattr(subprocess, "run", clone)
    for address in ("http://example.org/tool.git", "file:///tool", "--upload-pack=x"):
        run_cells(source("get-the-tool", tool_source=address))  # the tool is imported already
    assert asked == []

    put_tool(folder)  # an older one
    import_anew()
    names = run_cells(source("get-the-tool", tool_source="https://example.org/tool.git"))
    assert asked == [["https://example.org/tool.git", "tool"]]
    assert Path(names["bgoptimizer"].__file__).resolve() == folder / "tool" / "bgoptimizer.py"
    run_cells(source("get-the-tool", tool_source="https://example.org/tool.git"))
    assert len(asked) == 1  # once is enough


@pytest.mark.parametrize("mount_drive, colab", [(True, True), (False, True), (True, False)])
def test_the_drive_is_mounted_only_by_who_chose_it(mount_drive, colab, monkeypatch):
    mounted = []
    if colab:
        drive = types.SimpleNamespace(mount=mounted.append)
        monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(drive=drive))
    run_cells(source("drive", mount_drive=mount_drive))
    assert mounted == (["/content/drive"] if mount_drive and colab else [])
    assert "mount_drive = False  #@param" in source("drive")


def settings_cell(**form):
    """Return the arguments of the command that the settings cell makes of the form."""
    names = run_cells(source("settings", **form), os=os, where=os.curdir)
    return names["arguments"]


def test_the_forms_first_values_are_the_commands():
    arguments = settings_cell(auto=False)
    options = bgoptimizer._parse(["a.xisf", *arguments])
    assert options == bgoptimizer.build_parser().parse_args(["a.xisf"])
    assert settings_cell() == arguments + ["--auto"]


def test_the_form_reaches_the_command():
    arguments = settings_cell(
        correction="divide",
        output_format="tiff",
        mask="m.xisf",
        compress=True,
        more_options="-dx 4",
    )
    options = bgoptimizer._parse(["a.xisf", *arguments])
    assert options.correction == "divide"
    assert options.downscaling_factor == 4
    assert options.auto is True
    assert options.format == "tiff"
    assert options.mask == "m.xisf"
    assert options.compress is True


def test_the_preview_is_of_the_first_picture_and_leaves_out_what_needs_a_fit():
    called = []

    def main(arguments, use):
        called.append(arguments)
        return 0

    def find(where, mask):
        return ["a b.xisf", "c.xisf"]

    settings = source("settings", save_mask=True, more_options="--animate --figures 'save'")
    run_cells(
        settings,
        source("preview"),
        bgoptimizer=types.SimpleNamespace(main=main),
        os=os,
        where="lights",
        find=find,
    )
    arguments = called[0]
    assert arguments[:2] == ["a b.xisf", "results"]
    assert arguments[-3:] == ["--figures", "save", "--preview"]
    assert "--animate" not in arguments
    assert "--save-mask" not in arguments


def test_what_is_chosen_in_the_panel_takes_the_place_of_the_form():
    used = []

    def main(arguments, use):
        use(["-tm", "0.01", "--smoothing", "auto"])
        used.append(arguments)
        return 0

    names = run_cells(
        source("settings", auto=True, smoothing="3", more_options="--seed 5", compress=True),
        source("preview"),
        bgoptimizer=types.SimpleNamespace(main=main),
        os=os,
        where="lights",
        find=lambda where, mask: ["a.xisf"],
    )
    assert "--auto" in used[0]
    options = bgoptimizer._parse(["a.xisf", *names["arguments"]])
    settings = bgoptimizer.Task("a.xisf", options).settings
    assert settings == bgoptimizer.Settings(threshold_min=0.01, seed=5)
    assert options.compress


@pytest.mark.parametrize("found, given", [
    (["lights/a.xisf"], "lights/a.xisf"),
    (["a", "b"], "lights"),
    ([], None),
])
def test_several_pictures_are_one_run_of_their_folder(found, given, folder):
    called = []

    def run(*words):
        called.append(words)

    names = run_cells(
        source("optimize"),
        os=os,
        output_folder="results",
        pictures=found,
        where="lights",
        run=run,
    )
    expected = [(given, "--figures", "save")] if given else []
    assert called == expected
    assert names["written"] == []


def test_warnings_are_amber_and_errors_red(capsys):
    def main(arguments, use):
        print("as usual")
        print("bgoptimizer: warning: look", file=sys.stderr)
        print("bgoptimizer: error: no", file=sys.stderr)
        return 1

    def find(where, mask):
        return []

    names = run_cells(
        source("preview"),
        bgoptimizer=types.SimpleNamespace(main=main),
        arguments=[],
        mask="",
        where="",
        output_folder="",
        find=find,
    )
    assert names["run"]("a.xisf") == 1
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out == (
        "as usual\n"
        f"{AMBER}bgoptimizer: warning: look{PLAIN}\n"
        f"{RED}bgoptimizer: error: no{PLAIN}\n"
    )
