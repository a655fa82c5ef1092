"""The notebook as Colab and as plain Jupyter run it, from its first cell to its last."""
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

nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(bgoptimizer.__file__).resolve().parent
NOTEBOOK = ROOT / "bgoptimizer_colab.ipynb"
GOOD, BAD, MASK = "M 31 [Ha] 'new' #2.xisf", "bad one [1].xisf", "my mask [1].xisf"
FAST = dict(auto=False, delinearization_quantile="0.999", smoothing="1", initializer="grid", downscaling_factor=4,
            epochs=110)  # what is filled into the form
RED, AMBER = "\033[1;31m", "\033[1;33m"


# What google.colab does, as far as the notebook can tell: files come from and go to folders beside its own.
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
'''


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def source(cell_id, **form):
    """A cell's source, its form fields filled in."""
    text = next(cell.source for cell in read().cells if cell.id == cell_id)
    for name, value in form.items():
        text, count = re.subn(rf"(?m)^{name} = .*?(?=  #@param)", lambda _: f"{name} = {value!r}", text)
        assert count == 1, name
    return text


def execute(folder, forms, colab=None):
    """Run the whole notebook in a folder; returns {cell id: (text, pictures)}."""
    notebook = read()
    for cell in notebook.cells:
        cell.source = source(cell.id, **forms.get(cell.id, {}))
    if colab:
        notebook.cells.insert(0, nbformat.v4.new_code_cell(colab, id="stand-in"))
    shutil.copy(bgoptimizer.__file__, folder)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    results = {}
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        results[cell.id] = ("".join(output.get("text", "") for output in outputs),
                            [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})])
    return results


def run_cells(*sources, **names):
    """Run cells in this process; returns their names."""
    for text in sources:
        exec(compile(text, "cell", "exec"), names)
    return names


def check_model(path, sky):
    """The model is the known sky, but for a constant."""
    error = load(path) - sky
    assert np.abs(error - np.median(error, (0, 1))).max() < 0.1 * np.ptp(sky, (0, 1)).min()


def test_the_notebook_is_valid_bare_and_has_stable_ids():
    notebook = read()
    nbformat.validate(notebook)
    assert [cell.id for cell in notebook.cells] == [
        "what-it-is", "get-the-tool", "device", "pictures", "settings", "preview", "optimize", "download",
        "all-options"]
    for cell in notebook.cells[1:]:
        assert cell.outputs == [] and cell.execution_count is None
        compile(cell.source, cell.id, "exec")


def test_the_first_cell_is_short_and_no_cell_uses_what_is_private():
    assert len(source("get-the-tool").splitlines()) <= 20
    for cell in read().cells:
        assert "bgoptimizer._" not in cell.source


@pytest.mark.slow
def test_on_colab_uploads_become_downloads(folder):
    image, sky = sloping_sky()
    for name in ("uploads", "downloads", "content"):
        (folder / name).mkdir()
    save(folder / "uploads" / GOOD, image)
    save(folder / "uploads" / MASK, np.ones_like(image[..., :1]))
    (folder / "uploads" / BAD).write_bytes(b"XISF0100 and then nothing")
    colab = COLAB.format(uploads=str(folder / "uploads"), downloads=str(folder / "downloads"))
    form = dict(FAST, mask=MASK, compress=True, more_options="--seed '7'")
    told = execute(folder / "content", {"settings": form}, colab)

    for word in (f"bgoptimizer {bgoptimizer.VERSION}\n", f"Python {sys.version_info[0]}.", "tensorflow 2.",
                 "Computing on the CPU"):
        assert word in told["device"][0]
    assert "WARNING" not in told["device"][0]
    text, pictures = told["preview"]  # of the first picture
    assert len(pictures) == 1 and "144 x 96" in text and "100.0% used" in text
    text, pictures = told["optimize"]
    assert len(pictures) == 1 and "Traceback" not in text
    assert text.count(f"{RED}bgoptimizer: error: ") == 1 and f"{RED}bgoptimizer: warning: failed: " in text
    names = sorted(path.name for path in (folder / "downloads").iterdir())
    stem = GOOD[:-5]
    assert names == [f"{stem}_bgModel.xisf", f"{stem}_bgSubtracted.xisf", f"{stem}_figures.png",
                     "bgoptimizer_report.csv"]
    check_model(folder / "downloads" / names[0], sky)
    header = (folder / "downloads" / names[0]).read_bytes()[:100_000]
    assert b"seed = 7" in header and b'compression="lz4hc+sh' in header
    assert "--delinearization-quantile" in told["all-options"][0]


@pytest.mark.slow
def test_in_jupyter_files_come_from_a_folder(folder):
    image, sky = sloping_sky(channels=1)
    lights = folder / "my [good] \"lights\""
    lights.mkdir()
    save(lights / GOOD, image)
    save(lights / "b.XISF", image)
    save(lights / "b_bgModel.xisf", image)  # of an earlier run
    form = dict(FAST, output_folder="out 'here'", save_mask=True, output_format="fits")
    told = execute(folder, {"pictures": {"folder": str(lights)}, "settings": form})

    text, pictures = told["optimize"]
    assert "2 pictures: 2 done" in text and len(pictures) == 2 and len(told["preview"][1]) == 1
    stems = [GOOD[:-5], "b"]
    endings = "bgModel.fits", "bgSubtracted.fits", "figures.png", "mask.fits"
    written = {f"{stem}_{ending}" for stem in stems for ending in endings} | {"bgoptimizer_report.csv"}
    assert {path.name for path in (folder / "out 'here'").iterdir()} == written
    model = bgoptimizer.read_picture(str(folder / "out 'here'" / "b_bgModel.fits")).planes.transpose(1, 2, 0)
    error = model - sky
    assert np.abs(error - np.median(error)).max() < 0.1 * np.ptp(sky)
    assert told["download"][0].count(" MB\n") == 9 and str(folder) in told["download"][0]


@pytest.mark.parametrize("colab", [True, False])
def test_without_pictures_the_demo_is_taken(colab, folder, monkeypatch, capsys):
    (folder / "imgs").mkdir()
    shutil.copy(ROOT / "imgs" / "demo.xisf", folder / "imgs")
    files = types.SimpleNamespace(upload=dict)  # cancelled
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(files=files))
    names = run_cells(source("pictures"), COLAB=colab, os=os, bgoptimizer=bgoptimizer)
    assert names["where"] == names["pictures"][0] == os.path.join("imgs", "demo.xisf")
    assert "demo" in capsys.readouterr().out


def test_a_wrong_folder_is_said_and_no_demo_put_in_its_place(folder, capsys):
    (folder / "imgs").mkdir()
    shutil.copy(ROOT / "imgs" / "demo.xisf", folder / "imgs")
    cell = source("pictures", folder="absent [x]")
    assert run_cells(cell, COLAB=False, os=os, bgoptimizer=bgoptimizer)["pictures"] == []
    assert "absent [x] holds no" in capsys.readouterr().out


def test_only_what_is_missing_is_installed_and_never_tensorflow(folder, monkeypatch):
    shutil.copy(bgoptimizer.__file__, folder)
    asked = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: asked.append(command))
    missing = "xisf", "PIL", "tensorflow"
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name in missing else object())
    run_cells(source("get-the-tool"))
    assert asked == [[sys.executable, "-m", "pip", "install", "--quiet", "pillow", "xisf"]]


def test_what_it_installs_is_what_the_tool_needs_beside_tensorflow():
    text = (ROOT / "requirements.txt").read_text()
    needed = {line.split()[0] for line in text.splitlines() if line and not line.startswith("#")}
    listed = set(re.search(r'modules = "(.*?)"', source("get-the-tool"))[1].split())
    packages = {{"PIL": "pillow", "skimage": "scikit-image"}.get(name, name) for name in listed}
    assert packages == needed - {"tensorflow", "tensorflow-addons"}


def test_the_tool_is_uploaded_or_comes_from_an_address_with_https(folder, monkeypatch):
    script = bgoptimizer.__file__
    for name in ("upload", "repository", "other"):
        (folder / name).mkdir()
    monkeypatch.chdir(folder / "upload")
    files = types.SimpleNamespace(upload=lambda: shutil.copy(script, "bgoptimizer.py"))
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(files=files))
    run_cells(source("get-the-tool"))
    assert (folder / "upload" / "bgoptimizer.py").exists()
    monkeypatch.delitem(sys.modules, "google.colab")

    asked = []

    def clone(command, check):
        asked.append(command[-2:])
        (folder / "repository" / "tool").mkdir()
        shutil.copy(script, folder / "repository" / "tool")

    monkeypatch.setattr(subprocess, "run", clone)
    monkeypatch.chdir(folder / "repository")
    run_cells(source("get-the-tool", tool_source="https://example.org/tool.git"))
    assert asked == [["https://example.org/tool.git", "tool"]] and Path.cwd().name == "tool"

    monkeypatch.chdir(folder / "other")
    for address in ("http://example.org/tool.git", "file:///tool", "--upload-pack=x"):
        run_cells(source("get-the-tool", tool_source=address))  # here the tool can be imported all the same
    assert len(asked) == 1


def settings_cell(**form):
    return run_cells(source("settings", **form), os=os, where=os.curdir)["arguments"]


def test_the_forms_first_values_are_the_commands():
    arguments = settings_cell(auto=False)
    options, settings = bgoptimizer._parse(["a.xisf", *arguments])
    assert settings == bgoptimizer.Settings()
    assert options == bgoptimizer.build_parser().parse_args(["a.xisf"])
    assert settings_cell() == arguments + ["--auto"]


def test_the_form_reaches_the_command():
    arguments = settings_cell(correction="divide", output_format="tiff", mask="m.xisf", compress=True,
                              more_options="-dx 4")
    options, settings = bgoptimizer._parse(["a.xisf", *arguments])
    assert (settings.correction, settings.downscaling_factor, settings.auto) == ("divide", 4, True)
    assert (options.format, options.mask, options.compress) == ("tiff", "m.xisf", True)


def test_the_preview_is_of_the_first_picture_and_leaves_out_what_needs_a_fit():
    called = []
    tool = types.SimpleNamespace(main=lambda argv: called.append(argv) or 0)
    settings = source("settings", save_mask=True, more_options="--animate --figures 'save'")
    run_cells(settings, source("preview"), bgoptimizer=tool, os=os, where="lights",
              find=lambda where, mask: ["a b.xisf", "c.xisf"])
    assert called[0][:2] == ["a b.xisf", "results"] and called[0][-3:] == ["--figures", "save", "--preview"]
    assert not {"--animate", "--save-mask"} & set(called[0])


@pytest.mark.parametrize("found, given", [(["lights/a.xisf"], "lights/a.xisf"), (["a", "b"], "lights"), ([], None)])
def test_several_pictures_are_one_run_of_their_folder(found, given, folder):
    called = []
    names = run_cells(source("optimize"), os=os, output_folder="results", pictures=found, where="lights",
                      run=lambda *words: called.append(words))
    assert called == ([(given, "--figures", "save")] if given else [])
    assert names["written"] == []


def test_warnings_are_amber_and_errors_red(capsys):
    def main(_):
        print("as usual")
        print("bgoptimizer: warning: look", file=sys.stderr)
        print("bgoptimizer: error: no", file=sys.stderr)
        return 1

    run = run_cells(source("preview"), bgoptimizer=types.SimpleNamespace(main=main), arguments=[], mask="", where="",
                    output_folder="", find=lambda *_: [])["run"]
    assert run("a.xisf") == 1
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out == (f"as usual\n{AMBER}bgoptimizer: warning: look\033[0m\n"
                        f"{RED}bgoptimizer: error: no\033[0m\n")
