"""The command as a person meets it: what it prints, writes, refuses, and how it ends."""
import hashlib
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import bgoptimizer
from runner import FAST, PAIR, SCRIPT, command, imports_script, python, refused, run
from scenes import REAL, load, save, sloping_sky
from xisf_files import rows

# For pictures of any size
FEW = ["-e", "2", "-N", "6", "-i", "grid", "--smoothing", "1", "-dx", "2", "--quiet"]
# Said of rows that are good files and no pictures of a sky
SHOWS_NO_SKY = "the same value everywhere|holds no data"


@pytest.fixture
def small(folder):
    """A gray picture, sky.xisf, of 30 x 20 pixels, alone in the folder to stand in."""
    image, _ = sloping_sky(20, 30, 1)
    return save(folder / "sky.xisf", image)


def in_own_unit(path):
    """Return the planes of a picture (c, h, w) in its own unit."""
    picture = bgoptimizer.read_picture(path)
    return picture.planes * picture.unit.scale + picture.unit.offset


# ------------------------------------------------------------------------------------ as a process

@pytest.mark.slow
def test_the_command_writes_model_and_subtracted_picture_and_nothing_else(sky, folder):
    done = command("sky.xisf", "out", *FAST, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert sorted(os.listdir(folder / "out")) == PAIR
    assert "30 control points" in done.stdout  # 5 x 6, the grid nearest to 32
    for word in (
            "144 x 96",
            "used",
            "masked",
            "missing",
            "clipped",
            "epoch",
            "offsets: R ",
            "wrote",
            " s\n",
    ):
        assert word in done.stdout
    image = load(sky)
    model = load("out/sky_bgModel.xisf")
    subtracted = load("out/sky_bgSubtracted.xisf")
    assert model.shape == image.shape
    assert np.isfinite(model + subtracted).all()
    inside = (subtracted > 0) & (subtracted < 1)
    constant = np.where(inside, model + subtracted - image, np.nan)
    spread = np.nanmax(constant, (0, 1)) - np.nanmin(constant, (0, 1))
    assert (spread < 2e-5).all()


# Runs commands one after the other, and tells which exit codes they had and which packages that
# take long to load were loaded
LOADS = """
import sys, bgoptimizer
codes = [bgoptimizer.main(words.split()) for words in sys.argv[1:]]
large = "tensorflow", "scipy.ndimage", "skimage", "astropy", "matplotlib", "tifffile", "distributed"
print(codes, [name for name in large if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize("commands, codes, quick_without", [
    (["--help", "--version", "sky.xisf -dx 0", ""], "0, 0, 2, 2", r"\w"),
    (["sky.xisf -p", "sky.xisf -p --auto", "absent.xisf", "bad.xisf"], "0, 0, 1, 1", "tensorflow"),
    (["absent.xisf", "sky.xisf -p --figures none"], "1, 0", "matplotlib"),
])
def test_what_needs_no_large_package_loads_none(commands, codes, quick_without, sky, folder):
    (folder / "bad.xisf").write_bytes(b"XISF0100" + bytes(100))
    *_, last = python(LOADS, *commands).stderr.splitlines()
    ended, loaded = last.replace("]", "").split("[")[1:]
    assert ended.strip() == codes
    assert not re.search(quick_without, loaded)


IMPORTS_BEFORE_TENSORFLOW = """
import sys, bgoptimizer
task = bgoptimizer.Task(sys.argv[1], bgoptimizer._parse([*sys.argv[1:], "-p"]))
picture, mask, reference = bgoptimizer.read_inputs(task)
bgoptimizer._import_for(task.options)
before = set(sys.modules)
bgoptimizer.examine(picture.planes, task.settings, mask, 0, reference)
print(sorted(set(sys.modules) - before))
"""


def test_nothing_is_imported_while_tensorflow_is(sky, folder):
    """Two threads that import may wait for each other forever."""
    save(folder / "survey.xisf", sloping_sky(seed=1)[0])
    done = python(IMPORTS_BEFORE_TENSORFLOW, "sky.xisf", "--reference", "survey.xisf")
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("given, kept", [(None, "1"), ("7", "7")])
def test_a_program_that_imports_the_script_keeps_its_own_number_of_threads(given, kept):
    surroundings = imports_script()
    surroundings.pop("OPENBLAS_NUM_THREADS", None)
    if given is not None:
        surroundings["OPENBLAS_NUM_THREADS"] = given
    program = "import os, bgoptimizer; print(os.environ['OPENBLAS_NUM_THREADS'])"
    assert python(program, env=surroundings).stdout == kept + "\n"


def start(*arguments):
    """Start the command in a process of its own; what it prints is not held back."""
    return subprocess.Popen(
        [sys.executable, "-u", str(SCRIPT), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_no_tensorflow_is_one_line_on_how_to_get_it(sky, folder):
    package = folder / "fake/tensorflow"
    package.mkdir(parents=True)
    raises = "raise ImportError('no tensorflow here\\nsecond line')"
    (package / "__init__.py").write_text(raises)
    surroundings = {**os.environ, "PYTHONPATH": str(package.parent)}
    done = command("sky.xisf", *FAST, cwd=folder, env=surroundings)
    assert done.returncode == 1
    assert done.stderr == (
        "bgoptimizer: error: TensorFlow cannot be imported (no tensorflow here); "
        "install it with: python -m pip install -r requirements.txt\n"
    )
    assert not list(folder.glob("*bg*"))


def test_a_reader_who_leaves_causes_no_traceback(sky, folder):
    process = start("sky.xisf", "-p")
    process.stdout.close()
    process.wait()
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="closes a stream by its number")
def test_a_closed_stderr_does_no_harm(small, folder):
    closed = "sh", "-c", '"$0" "$@" 2>&-'
    fit = sys.executable, str(SCRIPT), "sky.xisf", "-e", "2", "-dq", "1"
    done = subprocess.run([*closed, *fit], cwd=folder, stdout=subprocess.DEVNULL)
    assert done.returncode == 0


# --------------------------------------------------------------------------------- usage errors: 2

@pytest.mark.parametrize("arguments, word", [
    (["-dx", "0"], "-dx"),
    (["-dx", "two"], "-dx"),
    (["-df", "max"], "-df"),
    (["-dq", "0"], "-dq"),
    (["-dq", "1.01"], "-dq"),
    (["-N", "2"], "-N"),
    (["-O", "5"], "-O"),
    (["-tm", "0.5", "-tM", "0.4"], "-tM"),
    (["-i", "sobol"], "-i"),
    (["-e", "0"], "-e"),
    (["-a", "-1"], "-a"),
    (["-B", "0"], "-B"),
    (["-lr", "nan"], "-lr"),
    (["--smoothing", "much"], "--smoothing"),
    (["--smoothing", "-1"], "--smoothing"),
    (["--seed", "-1"], "--seed"),
    (["--figures", "maybe"], "--figures"),
    (["--unknown"], "--unknown"),
    (["-p", "--animate"], "--animate"),
    (["-p", "--save-mask"], "--save-mask"),
    (["-dx", "9" * 30], "-dx"),  # beyond what Float32 holds, as those below
    (["-a", "1e300"], "-a"),
    (["--smoothing", "1e300"], "--smoothing"),
    (["-lr", "1e300"], "-lr"),
    (["corrected.xisf"], "name a folder"),
])
def test_wrong_usage_is_one_sentence_and_exit_2(arguments, word, sky, folder, capsys):
    assert run("sky.xisf", *arguments) == 2
    assert word in refused(capsys)
    assert os.listdir(folder) == ["sky.xisf"]


def test_a_name_that_begins_like_a_flag_is_told_how_to_write(folder, capsys):
    for name in ("-M31.xisf", "-m31.xisf"):
        save(folder / name, sloping_sky()[0])
        assert run(name) == 2
        assert f"write ./{name}" in refused(capsys)


def test_flags_may_stand_between_the_names(sky, folder):
    assert run("sky.xisf", "--figures", "save", "out", "-p") == 0
    assert os.listdir("out") == ["sky_preview.png"]


def test_no_arguments_is_wrong_usage(capsys):
    assert run() == 2
    assert "input_file" in refused(capsys)


# ----------------------------------------------------------------------------- could not be done: 1

@pytest.mark.parametrize("arguments, said", [
    (["absent.xisf", "out"], "absent.xisf does not exist"),
    (["note.xisf"], "XISF"),
    (["sky.xisf", "-m", "absent.xisf"], "absent.xisf cannot be read: No such file"),
    (["sky.xisf", "-m", "."], ". is not a file"),
    (["sky.xisf", "-m", "mask.xisf"], "the mask is 6 x 5"),
    (["sky.xisf", "-tm", "5", "-tM", "6"], "every pixel is masked"),
    (["sky.xisf", "note.txt"], "cannot write to note.txt: File exists"),
])
def test_what_cannot_be_done_is_said_and_nothing_is_written(arguments, said, sky, folder, capsys):
    for name in ("note.xisf", "note.txt"):
        (folder / name).write_text("hello")
    save(folder / "mask.xisf", np.ones((5, 6, 1), np.float32))
    before = set(folder.rglob("*"))
    assert run(*arguments) == 1
    assert said in refused(capsys)
    left = set(folder.rglob("*")) - before
    assert left <= {folder / "out"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_fifo_is_refused_and_not_waited_for(folder):
    os.mkfifo(folder / "fifo.xisf")
    done = command("fifo.xisf", cwd=folder)
    assert done.returncode == 1
    assert "is not a file" in done.stderr


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_output_folder_that_cannot_be_written(sky, folder, capsys):
    (folder / "out").mkdir(mode=0o500)
    assert run("sky.xisf", "out") == 1
    assert "cannot write" in refused(capsys)


def test_the_input_is_never_overwritten(sky, folder, capsys):
    before = Path(sky).read_bytes()
    for name in PAIR:
        os.link(sky, folder / name)
        assert run("sky.xisf") == 1
        assert "would be overwritten" in refused(capsys)
        os.unlink(folder / name)
    assert Path(sky).read_bytes() == before


def test_a_saved_mask_beside_the_outputs_can_be_given_back(sky, folder):
    assert run("sky.xisf", "out", *FAST, "--save-mask") == 0
    assert run("sky.xisf", "out", *FAST, "-m", "out/sky_mask.xisf") == 0
    assert run("sky.xisf", "out", "-p", "-m", "out/sky_mask.xisf") == 0


def test_the_mask_is_never_overwritten(sky, folder, capsys):
    save(folder / "sky_mask.xisf", np.ones((96, 144, 1), np.float32))
    assert run("sky.xisf", "-m", "sky_mask.xisf", "--save-mask") == 1
    assert "would be overwritten" in refused(capsys)


@pytest.mark.parametrize("fill, word", [
    (0.0, "holds no data"),
    (np.nan, "holds no data"),
    (0.25, "the same value everywhere"),
])
def test_empty_pictures(fill, word, folder, capsys):
    image = np.full((40, 50, 1), fill, np.float32)
    save(folder / "empty.xisf", image)
    assert run("empty.xisf") == 1
    assert word in refused(capsys)


def test_a_range_below_float32_shows_no_sky(folder, capsys):
    image, _ = sloping_sky(40, 50, 1)
    save(folder / "tiny.xisf", image.astype("f8") * 1e-200)
    for func in ("median", "mean"):
        assert run("tiny.xisf", "-df", func, *FEW) == 1
        assert "the same value everywhere" in refused(capsys)


# ------------------------------------------------------------------------------------ done: 0

def header(path):
    """Return the XML at the start of a file, as text."""
    start = Path(path).read_bytes()[16:20000]
    xml, *_ = start.split(b"</xisf>")
    return xml.decode()


HISTORY = (
    "seed = 7",
    "epochs = 30",
    "delinearization_quantile = 0.999",
    "points = 32",
    "smoothing = 1.0",
    "mask = None",
    "offset of channel 2 = ",
)


def test_history_tells_version_date_and_every_setting(sky, folder):
    assert run("sky.xisf", *FAST, "--seed", "7", "--quiet") == 0
    for name in PAIR:
        text = header(name)
        assert f"bgoptimizer {bgoptimizer.VERSION}, 20" in text
        for item in bgoptimizer.fields(bgoptimizer.Settings):
            assert f"bgoptimizer: {item.name} = " in text
        for line in HISTORY:
            assert f"bgoptimizer: {line}" in text
        assert "None" not in text.replace("mask = None", "")


def digest_without_dates(path):
    date = rb"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d[.\d]*(Z|\+00:00)"
    content = Path(path).read_bytes()
    dateless = re.sub(date, b"", content)
    return hashlib.sha256(dateless).hexdigest()


def test_the_same_command_gives_the_same_files_but_for_dates(sky, folder):
    for out in ("a", "b"):
        assert run("sky.xisf", out, *FAST, "-i", "random") == 0
    assert run("sky.xisf", "c", *FAST, "-i", "random", "--seed", "1") == 0
    for name in PAIR:
        a, b, c = [digest_without_dates(folder / out / name) for out in "abc"]
        assert a == b
        assert a != c


def test_compressed_outputs_hold_the_same_pixels(sky, folder):
    assert run("sky.xisf", "plain", *FAST) == 0
    assert run("sky.xisf", "packed", *FAST, "--compress") == 0
    for name in PAIR:
        packed = folder / "packed" / name
        assert "lz4hc+sh:" in header(packed)
        assert_array_equal(load(packed), load(folder / "plain" / name))


def test_the_uncertainty_is_written_in_the_unit_of_the_picture(sky, folder):
    picture = bgoptimizer.read_picture(sky)
    for name, scale in (("one", 1.0), ("adu", 1000.0)):
        planes = (picture.planes * scale - scale / 100).astype(np.float32)
        with open(f"{name}.fits", "wb") as file:
            bgoptimizer.write_fits(file, planes)
        assert run(f"{name}.fits", *FAST, "--save-uncertainty") == 0
    ones, adu = [in_own_unit(f"{name}_uncertainty.fits") for name in ("one", "adu")]
    model = in_own_unit("one_bgModel.fits")
    assert 0 < ones.min() and ones.max() < 0.2 * np.ptp(model)
    assert adu.mean() == pytest.approx(1000 * ones.mean(), rel=0.05)  # rounding moves the fit


def test_quiet_says_nothing(sky, folder, capfd):
    assert run("sky.xisf", *FAST, "--quiet") == 0
    assert capfd.readouterr().out == ""


def gradients_told(capsys):
    """Return the gradient before and after, in percent, that the command printed."""
    told = r"gradient ([\d.]+)% of the sky's level before, ([\d.]+)% after"
    words = re.search(told, capsys.readouterr().out)
    return float(words[1]), float(words[2])


def test_what_is_reported_of_a_picture_is_what_was_printed(sky, folder, capsys):
    assert run("sky.xisf", "out", *FAST) == 0
    before, after = gradients_told(capsys)
    assert run("sky.xisf", "out", *FAST, "--jobs", "1") == 0
    row = bgoptimizer.read_report("out/bgoptimizer_report.csv")["sky.xisf"]
    assert float(row.gradient_before) * 100 == pytest.approx(before, abs=0.06)
    assert float(row.gradient_after) * 100 == pytest.approx(after, abs=0.06)
    assert float(row.smoothing) == 1
    assert 0.5 < float(row.sky_share) <= 1
    assert row.confidence == "sure"
    assert float(row.clipped) < 0.01


def test_a_program_that_logs_too_sees_each_line_once_and_its_loggers_unchanged(
        sky, folder, capsys, caplog):
    logger = logging.getLogger("bgoptimizer")
    before = logger.level, logger.propagate, list(logger.handlers)
    assert run("sky.xisf", "-p", "-dq", "0.5", "--figures", "none") == 0
    said = capsys.readouterr()
    assert said.out.count("reduced to") == 1
    assert said.err.count("raise -dq") == 1
    assert "warning" not in said.out
    assert "reduced to" not in said.err
    assert not caplog.records
    assert before == (logger.level, logger.propagate, logger.handlers)


def test_mask_file_is_used(sky, folder, capsys):
    mask = np.ones((96, 144, 1), np.float32)
    mask[:48] = 0
    save(folder / "mask.xisf", mask)
    assert run("sky.xisf", *FAST, "-m", "mask.xisf", "--save-mask") == 0
    assert "50.0% masked" in capsys.readouterr().out
    assert_array_equal(load(folder / "sky_mask.xisf"), mask)


def test_a_mask_of_blocks_larger_than_the_picture_takes_no_memory(small, folder):
    assert run("sky.xisf", *FEW, "-dx", "1000000", "--save-mask") == 0
    mask = load(folder / "sky_mask.xisf")
    assert mask.shape == (20, 30, 1)


def test_flags_given_by_hand_win_over_auto(sky, folder):
    assert run("sky.xisf", *FAST, "--auto", "-dq", "0.9", "-N", "20") == 0
    text = header("sky_bgModel.xisf")
    assert re.search(r'delinearization_quantile = 0\.9["<]', text)
    assert re.search(r'points = 20["<]', text)


# ------------------------------------------------------------------------------ files of every kind

@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
def test_generated_files_end_in_a_true_subtraction_or_one_sentence(part, folder, capsys):
    for row in list(rows())[part::16]:  # some of all: test_xisf.py reads and writes every one
        (folder / "in.xisf").write_bytes(row.data)
        out = folder / row.name.replace("/", "-")
        code = run("in.xisf", out.name, *FEW)
        if row.planes is None or code:
            assert code == 1, row.name
            says = row.says if row.planes is None else SHOWS_NO_SKY
            if row.name == "fits-file":  # the command reads these, too; this is only a beginning
                says = "cut short"
            assert re.search(says, refused(capsys)), row.name
            assert not out.exists() or not os.listdir(out)
            continue
        capsys.readouterr()
        before = load(folder / "in.xisf")
        model = load(out / "in_bgModel.xisf").astype(float)
        after = load(out / "in_bgSubtracted.xisf")
        constant = model + after - before
        kept = np.isfinite(before) & (before > 0) & (after > 0) & (after < 1)
        for k in range(before.shape[-1]):
            of_channel = constant[..., k][kept[..., k]]
            assert np.ptp(of_channel) < 2e-5, row.name


def name_of(path):
    """Return the name of a picture; without any there is a stand-in that has none."""
    return getattr(path, "stem", "none here")


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(REAL.glob("**/*.xisf")), ids=name_of)
def test_real_pictures(path, folder, capsys):
    image = load(path)
    ranges = np.ptp(image, (0, 1))
    if (ranges == 0).any():  # PixInsight's test patterns: a color all over
        assert run(path, "out") == 1
        assert "the same value everywhere" in refused(capsys)
        return
    assert run(path, "out", "-e", "20") == 0
    assert run(path, "out", "-p") == 0
    model = load(folder / f"out/{path.stem}_bgModel.xisf")
    assert model.shape == image.shape
    assert np.isfinite(model).all()
