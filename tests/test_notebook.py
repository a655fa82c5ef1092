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

    assert "Ready" in told["get-the-tool"][0] and "installed" not in told["get-the-tool"][0]
    for word in (f"bgoptimizer {bgoptimizer.VERSION}\n", f"Python {sys.version_info[0]}.", "tensorflow 2.",
                 "Computing on the CPU"):
        assert word in told["device"][0]
    assert "WARNING" not in told["device"][0]
    for cell in ("preview", "optimize"):
        text, pictures = told[cell]
        assert len(pictures) == 1, text
        assert text.count("bgoptimizer: error: ") == 1 and "Traceback" not in text
        assert "144 x 96" in text and f"1 of 2 pictures done; not ./{BAD}" in text
    assert "100.0% used" in told["preview"][0] and "epoch  100  loss -" in told["optimize"][0]
    names = sorted(path.name for path in (folder / "downloads").iterdir())
    assert names == [GOOD[:-5] + "_bgModel.xisf", GOOD[:-5] + "_bgSubtracted.xisf"]
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
    (lights / BAD).write_bytes(b"")
    form = dict(FAST, output_folder="out 'here'", save_mask=True)
    told = execute(folder, {"pictures": {"folder": str(lights)}, "settings": form})

    text, pictures = told["optimize"]
    assert "2 of 3 pictures done; not" in text and len(pictures) == 2 and len(told["preview"][1]) == 2
    stems = [GOOD[:-5], "b"]
    assert sorted(path.name for path in (folder / "out 'here'").iterdir()) == sorted(
        f"{stem}_{ending}.xisf" for stem in stems for ending in ("bgModel", "bgSubtracted", "mask"))
    for stem in stems:
        check_model(folder / "out 'here'" / f"{stem}_bgModel.xisf", sky)
    assert told["download"][0].count(" MB\n") == 6 and str(folder) in told["download"][0]


@pytest.mark.parametrize("colab", [True, False])
def test_without_pictures_the_demo_is_taken(colab, folder, monkeypatch, capsys):
    (folder / "imgs").mkdir()
    shutil.copy(ROOT / "imgs" / "demo.xisf", folder / "imgs")
    files = types.SimpleNamespace(upload=dict)  # cancelled
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(files=files))
    names = run_cells(source("pictures"), COLAB=colab)
    assert [Path(path) for path in names["pictures"]] == [Path("imgs/demo.xisf")]
    assert "demo" in capsys.readouterr().out


def test_a_wrong_folder_is_said_and_no_demo_put_in_its_place(folder, capsys):
    assert run_cells(source("pictures", folder="absent [x]"), COLAB=False)["pictures"] == []
    assert "absent [x]; check the name" in capsys.readouterr().out


def test_only_what_is_missing_is_installed_and_never_tensorflow(folder, monkeypatch):
    shutil.copy(bgoptimizer.__file__, folder)
    asked = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: asked.append(command))
    missing = "xisf", "lz4", "tensorflow"
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name in missing else object())
    run_cells(source("get-the-tool"))
    assert asked == [[sys.executable, "-m", "pip", "install", "--quiet", "xisf", "lz4"]]


def test_the_tool_comes_from_an_address_a_repository_or_an_upload(folder, monkeypatch):
    for name in ("address", "repository", "upload", "origin"):
        (folder / name).mkdir()
    shutil.copy(bgoptimizer.__file__, folder / "origin")
    script = folder / "origin" / "bgoptimizer.py"
    monkeypatch.chdir(folder / "address")
    with monkeypatch.context() as patch:
        patch.setattr("urllib.request.urlretrieve", lambda address, path: shutil.copy(script, path))
        run_cells(source("get-the-tool", tool_source="https://example.org/bgoptimizer.py"))
    assert (folder / "address" / "bgoptimizer.py").exists()

    monkeypatch.chdir(folder / "upload")
    files = types.SimpleNamespace(upload=lambda: shutil.copy(script, "bgoptimizer.py"))
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(files=files))
    run_cells(source("get-the-tool"))
    monkeypatch.delitem(sys.modules, "google.colab")

    monkeypatch.chdir(folder / "repository")
    with pytest.raises(FileNotFoundError, match="put it beside this notebook"):
        run_cells(source("get-the-tool"))
    git = ["git", "-C", str(folder / "origin"), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "a"]):
        subprocess.run(git + command, check=True)
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.{(folder / 'origin').as_uri()}.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "https://example.org/bgoptimizer")
    run_cells(source("get-the-tool", tool_source="https://example.org/bgoptimizer"))
    assert Path.cwd() == folder / "repository" / "bgoptimizer"


@pytest.mark.parametrize("address", ["http://example.org/bgoptimizer.py", "file:///tmp/bgoptimizer.py",
                                     "git://example.org/bgoptimizer", "ext::sh -c id", "/tmp/bgoptimizer"])
def test_code_is_taken_from_https_only(address, folder):
    with pytest.raises(ValueError, match="https://"):
        run_cells(source("get-the-tool", tool_source=address))
    assert os.listdir(folder) == []


def test_the_forms_first_values_are_the_commands():
    arguments = run_cells(source("settings", auto=False))["arguments"]
    options, settings = bgoptimizer._parse(["a.xisf", *arguments])
    assert settings == bgoptimizer.Settings()
    assert options == bgoptimizer.build_parser().parse_args(["a.xisf"])
    assert run_cells(source("settings"))["arguments"] == arguments + ["--auto"]


def test_interrupting_or_wrong_settings_stop_all_but_a_bad_file_only_itself(capsys):
    for code, wanted in ((130, 1), (143, 1), (2, 1), (1, 3), (0, 3)):
        called = []
        tool = types.SimpleNamespace(main=lambda argv, code=code: called.append(argv[0]) or code)
        run_cells(source("settings"), bgoptimizer=tool, pictures=["a", "b", "c"])["run_all"]()
        assert len(called) == wanted
        assert f"{3 if code == 0 else 0} of 3 pictures done" in capsys.readouterr().out


def test_the_preview_leaves_out_what_needs_a_fit():
    called = []
    tool = types.SimpleNamespace(main=lambda argv: called.append(argv) or 0)
    settings = source("settings", save_mask=True, more_options="--animate --figures 'save'")
    run_cells(settings, source("preview"), bgoptimizer=tool, pictures=["a b.xisf"])
    assert called[0][:2] == ["a b.xisf", "results"] and called[0][-3:] == ["--figures", "save", "--preview"]
    assert not {"--animate", "--save-mask"} & set(called[0])
