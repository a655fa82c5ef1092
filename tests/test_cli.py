"""The command as a person meets it: what it prints, writes, refuses, and how it ends."""
import hashlib
import logging
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

import bgoptimizer
from runner import FAST, SCRIPT, command, python, refused, run
from scenes import REAL, load, save, sloping_sky
from xisf_files import rows

FEW = ["-e", "2", "-N", "6", "-i", "grid", "--smoothing", "1", "-dx", "2", "--quiet"]  # for pictures of any size
SHOWS_NO_SKY = "the same value everywhere|holds no data"  # said of rows that are good files and no pictures of a sky


# ------------------------------------------------------------------------------------------------ as a process

@pytest.mark.slow
def test_the_command_writes_model_and_subtracted_picture_and_nothing_else(sky, folder):
    done = command("sky.xisf", "out", *FAST, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert sorted(os.listdir(folder / "out")) == ["sky_bgModel.xisf", "sky_bgSubtracted.xisf"]
    assert "30 control points" in done.stdout  # 5 x 6, the grid nearest to 32
    for word in ("144 x 96", "used", "masked", "missing", "clipped", "epoch", "offsets: R ", "wrote", " s\n"):
        assert word in done.stdout
    image, model, subtracted = map(load, (sky, "out/sky_bgModel.xisf", "out/sky_bgSubtracted.xisf"))
    constant = np.where((subtracted > 0) & (subtracted < 1), model + subtracted - image, np.nan)
    assert model.shape == image.shape and np.isfinite(model + subtracted).all()
    assert (np.nanmax(constant, (0, 1)) - np.nanmin(constant, (0, 1)) < 2e-5).all()


def test_help_is_quick_and_names_every_flag_with_its_default():
    started = time.perf_counter()
    done = command("--help")
    assert time.perf_counter() - started < 1.5 and done.returncode == 0  # on a busy machine; alone 0.2 s
    words = re.sub(r"\s+", " ", done.stdout)
    for flag, default in (
            ("-dx", 8), ("-df", "median"), ("-dq", 0.95), ("-N", 32), ("-O", 2), ("-tm", 0.001), ("-tM", 1.0),
            ("-m", "none"), ("-i", "random"), ("-e", 1000), ("-a", 5), ("-B", 1), ("-lr", 0.001),
            ("--smoothing", "auto"), ("--seed", 0), ("-c", "off"), ("-p", "off"), ("--auto", "off"),
            ("--figures", "auto"), ("--animate", "off"), ("--quiet", "off"), ("--save-mask", "off"),
            ("--skip-done", "off"), ("--jobs", 1), ("--dask", "none")):
        other_parentheses = r"[^(]*(\([^d)][^)]*\)[^(]*)*"
        assert re.search(rf" {flag}[ ,]{other_parentheses}\(default: {re.escape(str(default))}[,)]", words), flag


@pytest.mark.parametrize("arguments, code", [
    (["--help"], 0), (["--version"], 0), (["sky.xisf", "--preview"], 0), (["sky.xisf", "-p", "--auto"], 0),
    (["absent.xisf"], 1), (["broken.xisf"], 1), (["sky.xisf", "-dx", "0"], 2), ([], 2)])
def test_tensorflow_is_not_imported_for(arguments, code, sky, folder):
    (folder / "broken.xisf").write_bytes(b"XISF0100" + bytes(100))
    program = ("import sys, bgoptimizer; code = bgoptimizer.main(sys.argv[1:]); "
               "sys.exit(99 if 'tensorflow' in sys.modules else code)")
    done = python(program, *arguments, cwd=folder)
    assert done.returncode == code, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals differ")
def test_ctrl_c_ends_with_130_one_line_and_no_leftovers(folder):
    save(folder / "sky.xisf", sloping_sky(400, 600)[0])
    endless = [sys.executable, "-u", str(SCRIPT), "sky.xisf", "out", "-e", "100000", "-dq", "0.999"]
    for moment in (b"fitting", b"600 x 400"):
        process = subprocess.Popen(endless, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while moment not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1].decode()
        assert process.returncode == 130, error
        assert error.startswith("bgoptimizer: error: interrupted") and error.count("\n") == 1, error
        assert os.listdir(folder / "out") == []


def test_no_tensorflow_is_one_line_on_how_to_get_it(sky, folder):
    (folder / "fake/tensorflow").mkdir(parents=True)
    (folder / "fake/tensorflow/__init__.py").write_text("raise ImportError('no tensorflow here\\nsecond line')")
    done = command("sky.xisf", *FAST, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder / "fake")})
    assert done.returncode == 1
    assert done.stderr == ("bgoptimizer: error: TensorFlow cannot be imported (no tensorflow here); "
                           "install it with: python -m pip install -r requirements.txt\n")
    assert not list(folder.glob("*bg*"))


def test_a_reader_who_leaves_causes_no_traceback(sky, folder):
    preview = [sys.executable, "-u", str(SCRIPT), "sky.xisf", "-p"]
    process = subprocess.Popen(preview, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    process.wait(60)
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="closes a stream by its number")
def test_a_closed_stderr_does_no_harm(folder):
    save(folder / "sky.xisf", sloping_sky(20, 30, 1)[0])
    closed = ["sh", "-c", '"$0" "$@" 2>&-', sys.executable, str(SCRIPT), "sky.xisf", "-e", "2", "-dq", "1"]
    assert subprocess.run(closed, cwd=folder, stdout=subprocess.DEVNULL, timeout=120).returncode == 0


# ------------------------------------------------------------------------------------------------ usage errors: 2

@pytest.mark.parametrize("arguments, word", [
    (["-dx", "0"], "-dx"), (["-dx", "two"], "-dx"), (["-df", "max"], "-df"), (["-dq", "0"], "-dq"),
    (["-dq", "1.01"], "-dq"), (["-N", "2"], "-N"), (["-O", "5"], "-O"), (["-tm", "0.5", "-tM", "0.4"], "-tM"),
    (["-i", "sobol"], "-i"), (["-e", "0"], "-e"), (["-a", "-1"], "-a"), (["-B", "0"], "-B"), (["-lr", "nan"], "-lr"),
    (["--smoothing", "much"], "--smoothing"), (["--smoothing", "-1"], "--smoothing"), (["--seed", "-1"], "--seed"),
    (["--figures", "maybe"], "--figures"), (["--unknown"], "--unknown"), (["-p", "--animate"], "--animate"),
    (["-p", "--save-mask"], "--save-mask"), (["a", "b"], "b")])
def test_wrong_usage_is_one_sentence_and_exit_2(arguments, word, sky, folder, capsys):
    assert run("sky.xisf", *arguments) == 2
    assert word in refused(capsys)
    assert os.listdir(folder) == ["sky.xisf"]


@pytest.mark.parametrize("arguments", [["-dx", "9" * 30], ["-a", "1e300"], ["--smoothing", "1e300"], ["-lr", "1e300"]])
def test_numbers_beyond_float32_are_wrong_usage(arguments, capsys):
    assert run("sky.xisf", *arguments) == 2
    assert arguments[0] in refused(capsys)


def test_no_arguments_is_wrong_usage(capsys):
    assert run() == 2
    assert "input_file" in refused(capsys)


# ------------------------------------------------------------------------------------------------ could not be done: 1

def test_missing_input(folder, capsys):
    assert run("absent.xisf", "out") == 1
    assert "absent.xisf does not exist" in refused(capsys)
    assert os.listdir(folder) == []


def test_mask_that_is_a_folder(sky, folder, capsys):
    assert run("sky.xisf", "-m", folder) == 1
    assert "is a folder" in refused(capsys)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_fifo_is_refused_and_not_waited_for(folder):
    os.mkfifo(folder / "fifo.xisf")
    done = command("fifo.xisf", cwd=folder)
    assert done.returncode == 1 and "is not a file" in done.stderr


def test_input_that_is_no_xisf(folder, capsys):
    (folder / "note.xisf").write_text("hello")
    assert run("note.xisf") == 1
    assert "XISF" in refused(capsys)


@pytest.mark.parametrize("name, said", [("absent.xisf", "absent.xisf does not exist"), ("", "a file without a name")])
def test_missing_mask_is_said(name, said, sky, folder, capsys):
    assert run("sky.xisf", "-m", name) == 1
    assert said in refused(capsys)


def test_mask_of_another_size(sky, folder, capsys):
    save(folder / "mask.xisf", np.ones((5, 6, 1), np.float32))
    assert run("sky.xisf", "-m", "mask.xisf") == 1
    assert "the mask is 6 x 5" in refused(capsys)


def test_output_folder_that_is_a_file(sky, folder, capsys):
    (folder / "out").write_text("")
    assert run("sky.xisf", "out") == 1
    assert "is a file, not a folder" in refused(capsys)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_output_folder_that_cannot_be_written(sky, folder, capsys):
    (folder / "out").mkdir(mode=0o500)
    assert run("sky.xisf", "out") == 1
    assert "cannot write" in refused(capsys)


def test_the_input_is_never_overwritten(sky, folder, capsys):
    before = Path(sky).read_bytes()
    for name in ("sky_bgModel.xisf", "sky_bgSubtracted.xisf"):
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


@pytest.mark.parametrize("fill, word", [(0.0, "holds no data"), (np.nan, "holds no data"),
                                        (0.25, "the same value everywhere")])
def test_empty_pictures(fill, word, folder, capsys):
    save(folder / "empty.xisf", np.full((40, 50, 1), fill, np.float32))
    assert run("empty.xisf") == 1
    assert word in refused(capsys)


def test_a_range_below_float32_shows_no_sky(folder, capsys):
    save(folder / "tiny.xisf", sloping_sky(40, 50, 1)[0].astype("f8") * 1e-200)
    for func in ("median", "mean"):
        assert run("tiny.xisf", "-df", func, *FEW) == 1
        assert "the same value everywhere" in refused(capsys)


def test_all_masked(sky, folder, capsys):
    assert run("sky.xisf", "-tm", "5", "-tM", "6") == 1
    assert "every pixel is masked" in refused(capsys)


def test_too_little_memory_says_what_helps(sky, folder, capsys, monkeypatch):
    def exhausted(*_):
        raise MemoryError
    monkeypatch.setattr(bgoptimizer, "examine", exhausted)
    assert run("sky.xisf") == 1
    assert "memory" in refused(capsys)


def test_too_little_disk_is_said_before_the_fit(sky, folder, capsys, monkeypatch):
    monkeypatch.setattr(bgoptimizer.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    monkeypatch.setattr(bgoptimizer, "fit_sky", None)
    assert run("sky.xisf", *FAST) == 1
    assert "free" in refused(capsys)


def test_a_failure_while_writing_leaves_nothing_behind(sky, folder, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(bgoptimizer, "write_xisf", full)
    assert run("sky.xisf", "out", *FAST) == 1
    assert "No space left" in refused(capsys)
    assert os.listdir(folder / "out") == []


# ------------------------------------------------------------------------------------------------ done: 0

def header(path):
    """The XML at the start of a file, as text."""
    return Path(path).read_bytes()[16:20000].split(b"</xisf>")[0].decode()


def test_history_tells_version_date_and_every_setting(sky, folder):
    assert run("sky.xisf", *FAST, "--seed", "7", "--quiet") == 0
    for name in ("sky_bgModel.xisf", "sky_bgSubtracted.xisf"):
        text = header(name)
        assert f"bgoptimizer {bgoptimizer.VERSION}, 20" in text
        for item in bgoptimizer.fields(bgoptimizer.Settings):
            assert f"bgoptimizer: {item.name} = " in text
        for line in ("seed = 7", "epochs = 30", "delinearization_quantile = 0.999", "points = 32", "smoothing = 1.0",
                     "mask = None", "offset of channel 2 = "):
            assert f"bgoptimizer: {line}" in text
        assert "None" not in text.replace("mask = None", "")


def digest_without_dates(path):
    date = rb"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d[.\d]*(Z|\+00:00)"
    return hashlib.sha256(re.sub(date, b"", Path(path).read_bytes())).hexdigest()


def test_the_same_command_gives_the_same_files_but_for_dates(sky, folder):
    for out in ("a", "b"):
        assert run("sky.xisf", out, *FAST, "-i", "random") == 0
    assert run("sky.xisf", "c", *FAST, "-i", "random", "--seed", "1") == 0
    for name in ("sky_bgModel.xisf", "sky_bgSubtracted.xisf"):
        assert digest_without_dates(folder / "a" / name) == digest_without_dates(folder / "b" / name)
        assert digest_without_dates(folder / "a" / name) != digest_without_dates(folder / "c" / name)


def test_compressed_outputs_hold_the_same_pixels(sky, folder):
    assert run("sky.xisf", "plain", *FAST) == 0 and run("sky.xisf", "packed", *FAST, "--compress") == 0
    for name in ("sky_bgModel.xisf", "sky_bgSubtracted.xisf"):
        assert "lz4hc+sh:" in header(folder / "packed" / name)
        np.testing.assert_array_equal(load(folder / "packed" / name), load(folder / "plain" / name))


def test_quiet_says_nothing(sky, folder, capfd):
    assert run("sky.xisf", *FAST, "--quiet") == 0
    assert capfd.readouterr().out == ""


def gradients_told(capsys):
    """The gradient before and after, in percent, that the command printed."""
    words = re.search(r"gradient ([\d.]+)% of the sky's level before, ([\d.]+)% after", capsys.readouterr().out)
    return float(words[1]), float(words[2])


def test_what_is_reported_of_a_picture_is_what_was_printed(sky, folder, capsys):
    options, settings = bgoptimizer._parse(["sky.xisf", "out", *FAST])
    report = bgoptimizer.process_file(bgoptimizer._make_task(options, settings))
    assert run("sky.xisf", "out", *FAST) == 0
    before, after = gradients_told(capsys)
    assert report.gradient_before * 100 == pytest.approx(before, abs=0.06)
    assert report.gradient_after * 100 == pytest.approx(after, abs=0.06)
    assert report.smoothing == 1 and 0.5 < report.sky_share <= 1 and report.unsure == "" and report.clipped < 0.01
    assert [os.path.basename(path) for path in report.written] == ["sky_bgModel.xisf", "sky_bgSubtracted.xisf"]


def test_a_program_that_logs_too_sees_each_line_once_and_its_loggers_unchanged(sky, folder, capsys, caplog):
    logger = logging.getLogger("bgoptimizer")
    before = logger.level, logger.propagate, list(logger.handlers)
    assert run("sky.xisf", "-p", "-dq", "0.5", "--figures", "none") == 0
    said = capsys.readouterr()
    assert said.out.count("reduced to") == 1 and said.err.count("raise -dq") == 1
    assert "warning" not in said.out and "reduced to" not in said.err and not caplog.records
    assert before == (logger.level, logger.propagate, logger.handlers)


def test_mask_file_is_used(sky, folder, capsys):
    mask = np.ones((96, 144, 1), np.float32)
    mask[:48] = 0
    save(folder / "mask.xisf", mask)
    assert run("sky.xisf", *FAST, "-m", "mask.xisf", "--save-mask") == 0
    assert "50.0% masked" in capsys.readouterr().out
    np.testing.assert_array_equal(load(folder / "sky_mask.xisf"), mask)


def test_a_mask_of_blocks_larger_than_the_picture_takes_no_memory(folder):
    save(folder / "sky.xisf", sloping_sky(20, 30, 1)[0])
    assert run("sky.xisf", *FEW, "-dx", "1000000", "--save-mask") == 0
    assert load(folder / "sky_mask.xisf").shape == (20, 30, 1)


def test_flags_given_by_hand_win_over_auto(sky, folder):
    assert run("sky.xisf", *FAST, "--auto", "-dq", "0.9", "-N", "20") == 0
    text = header("sky_bgModel.xisf")
    assert "delinearization_quantile = 0.9<" in text.replace('"', "<") and "points = 20<" in text.replace('"', "<")


# ------------------------------------------------------------------------------------------------ files of every kind

@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
def test_generated_files_end_in_a_true_subtraction_or_one_sentence(part, folder, capsys):
    for row in list(rows())[part::16]:  # some of all: test_xisf.py reads and writes every one
        (folder / "in.xisf").write_bytes(row.data)
        code = run("in.xisf", row.name.replace("/", "-"), *FEW)
        done = folder / row.name.replace("/", "-")
        if row.planes is None or code:
            said = refused(capsys)
            says = row.says if row.planes is None else SHOWS_NO_SKY
            if row.name == "fits-file":  # the command reads these, too, and this one is only a beginning
                says = "cut short"
            assert code == 1 and re.search(says, said), row.name
            assert not done.exists() or not os.listdir(done)
            continue
        capsys.readouterr()
        image = load(folder / "in.xisf")
        model, subtracted = (load(done / f"in_{what}.xisf") for what in ("bgModel", "bgSubtracted"))
        for k in range(image.shape[-1]):
            before, after = image[..., k], subtracted[..., k]
            kept = np.isfinite(before) & (before > 0) & (after > 0) & (after < 1)
            assert np.ptp((model[..., k].astype(float) + after - before)[kept]) < 2e-5, row.name


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(REAL.glob("**/*.xisf")), ids=lambda path: getattr(path, "stem", "none here"))
def test_real_pictures(path, folder, capsys):
    image = load(path)
    if any(np.ptp(image[..., k]) == 0 for k in range(image.shape[-1])):  # PixInsight's test patterns: a color all over
        assert run(path, "out") == 1 and "the same value everywhere" in refused(capsys)
        return
    assert run(path, "out", "-e", "20") == 0
    assert run(path, "out", "-p") == 0
    image, model = load(path), load(folder / f"out/{path.stem}_bgModel.xisf")
    assert model.shape == image.shape and np.isfinite(model).all()
