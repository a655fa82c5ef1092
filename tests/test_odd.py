"""Odd pictures, names and streams, and the generator's files, through the whole command: a result or one sentence."""
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import load, save, sloping_sky
from test_cli import SCRIPT, command, refused, run
from xisf_files import rows

FEW = ["-e", "2", "-N", "6", "-i", "grid", "--smoothing", "1", "-dx", "2", "--quiet"]
SHOWS_NO_SKY = "the same value everywhere|holds no data"  # rows that are good files and no pictures of a sky


@pytest.mark.parametrize("part", range(3))
def test_generated_files_end_in_a_true_subtraction_or_one_sentence(part, folder, capsys):
    for row in list(rows())[part::16]:
        (folder / "in.xisf").write_bytes(row.data)
        code = run("in.xisf", row.name.replace("/", "-"), *FEW)
        done = folder / row.name.replace("/", "-")
        if row.planes is None or code:
            said = refused(capsys)
            assert code == 1 and re.search(row.says if row.planes is None else SHOWS_NO_SKY, said), row.name
            assert not done.exists() or not os.listdir(done)
            continue
        capsys.readouterr()
        image = load(folder / "in.xisf")
        model, subtracted = (load(done / f"in_{what}.xisf") for what in ("bgModel", "bgSubtracted"))
        for k in range(image.shape[-1]):
            kept = np.isfinite(image[..., k]) & (image[..., k] > 0) & (subtracted[..., k] > 0) & (subtracted[..., k] < 1)
            assert np.ptp((model[..., k].astype(float) + subtracted[..., k])[kept] - image[..., k][kept]) < 2e-5, row.name


def test_a_small_patch_of_data_warns_of_nothing_and_is_not_called_nan(folder, capsys):
    image = np.zeros((64, 80, 1), np.float32)
    image[8:16, 16:24] = sloping_sky(8, 8, 1)[0]  # one block at an odd place
    save(folder / "patch.xisf", image)
    assert run("patch.xisf", "-e", "2", "--smoothing", "1", "-dq", "1") == 0
    said = capsys.readouterr()
    assert said.err == "" and "nan" not in said.out and "unknown" in said.out


def test_a_range_below_float32_shows_no_sky(folder, capsys):
    save(folder / "tiny.xisf", sloping_sky(40, 50, 1)[0].astype("f8") * 1e-200)
    for func in ("median", "mean"):
        assert run("tiny.xisf", "-df", func, *FEW) == 1
        assert "the same value everywhere" in refused(capsys)


@pytest.mark.parametrize("arguments", [["-dx", "9" * 30], ["-a", "1e300"], ["--smoothing", "1e300"], ["-lr", "1e300"]])
def test_numbers_beyond_float32_are_wrong_usage(arguments, capsys):
    assert run("sky.xisf", *arguments) == 2
    assert arguments[0] in refused(capsys)


def test_a_mask_of_blocks_larger_than_the_picture_takes_no_memory(folder):
    save(folder / "sky.xisf", sloping_sky(20, 30, 1)[0])
    assert run("sky.xisf", *FEW, "-dx", "1000000", "--save-mask") == 0
    assert load(folder / "sky_mask.xisf").shape == (20, 30, 1)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_fifo_is_refused_and_not_waited_for(folder):
    os.mkfifo(folder / "fifo.xisf")
    done = command("fifo.xisf", cwd=folder)
    assert done.returncode == 1 and "is not a file" in done.stderr


def test_names_that_are_formulas_or_cannot_be_printed_do_no_harm(folder):
    names = [r"$\a_{$.xisf", "☃.xisf"] + ["bad\udcff.xisf"] * (sys.platform == "linux")
    for name in names:
        save(folder / name, sloping_sky(20, 30, 1)[0])
        done = command(name, "-p", "-dq", "1", cwd=folder, env={**os.environ, "PYTHONIOENCODING": "ascii:strict"})
        assert done.returncode == 0 and done.stderr == "", done.stderr


@pytest.mark.skipif(os.name == "nt", reason="closes a stream by its number")
def test_a_closed_stderr_does_no_harm(folder):
    save(folder / "sky.xisf", sloping_sky(20, 30, 1)[0])
    line = '"$0" "$@" 2>&-'
    assert subprocess.run(["sh", "-c", line, sys.executable, SCRIPT, "sky.xisf", "-e", "2", "-dq", "1"], cwd=folder, stdout=subprocess.DEVNULL).returncode == 0
