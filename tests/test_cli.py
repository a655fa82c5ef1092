"""The command as a person meets it: what it prints, writes, refuses, and how it ends."""
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import load, save, sloping_sky
from PIL import Image

import bgoptimizer

SCRIPT = Path(bgoptimizer.__file__).resolve()
FAST = ["-dx", "4", "-i", "grid", "-e", "30", "--smoothing", "1", "-dq", "0.999"]  # so that no sky is clipped, which is warned of
REAL = Path(os.environ.get("BGOPTIMIZER_REAL", Path(__file__).resolve().parent.parent.parent / "shared" / "real"))


def command(*arguments, **options):
    """Run the script in a process of its own."""
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, timeout=120, **options)


def run(*arguments):
    """Run the command in this process: TensorFlow is imported once for all tests."""
    return bgoptimizer.main([str(a) for a in arguments])


@pytest.fixture
def sky(folder):
    return save(folder / "sky.xisf", sloping_sky()[0])


def refused(capsys, code=1):
    """What the command said on stderr, which is one line of the agreed form."""
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if "warning:" not in line]
    assert len(lines) == 1 and lines[0].startswith("bgoptimizer: error: ") and "Traceback" not in text, text
    return lines[0]


# ------------------------------------------------------------------------------------------------ as a process

def test_the_command_writes_model_and_subtracted_picture_and_nothing_else(sky, folder):
    done = command("sky.xisf", "out", *FAST, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert sorted(os.listdir(folder / "out")) == ["sky_bgModel.xisf", "sky_bgSubtracted.xisf"]
    assert "36 control points" in done.stdout or "30 control points" in done.stdout
    for word in ("144 x 96", "used", "masked", "missing", "clipped", "epoch", "offsets: R ", "wrote", " s\n"):
        assert word in done.stdout
    image, model, subtracted = load(sky), load(folder / "out/sky_bgModel.xisf"), load(folder / "out/sky_bgSubtracted.xisf")
    constant = (model + subtracted - image)[image < 0.2]
    assert model.shape == image.shape and np.isfinite(constant).all()


def test_help_is_quick_and_names_every_flag_with_its_default():
    started = time.perf_counter()
    done = command("--help")
    assert time.perf_counter() - started < 1.5 and done.returncode == 0  # on a busy machine; alone 0.2 s
    words = re.sub(r"\s+", " ", done.stdout)
    for flag, default in (("-dx", 8), ("-df", "median"), ("-dq", 0.95), ("-N", 32), ("-O", 2), ("-tm", 0.001), ("-tM", 1.0), ("-m", "none"),
                          ("-i", "random"), ("-e", 1000), ("-a", 5), ("-B", 1), ("-lr", 0.001), ("--smoothing", "auto"), ("--seed", 0), ("-c", "off"),
                          ("-p", "off"), ("--auto", "off"), ("--figures", "auto"), ("--animate", "off"), ("--quiet", "off"), ("--save-mask", "off")):
        assert re.search(rf" {flag}[ ,][^(]*(\([^d)][^)]*\)[^(]*)*\(default: {re.escape(str(default))}[,)]", words), flag


@pytest.mark.parametrize("arguments, code", [(["--help"], 0), (["--version"], 0), (["sky.xisf", "-dx", "0"], 2), ([], 2), (["absent.xisf"], 1),
                                             (["sky.xisf", "--preview"], 0), (["sky.xisf", "-p", "--auto"], 0), (["broken.xisf"], 1)])
def test_tensorflow_is_not_imported_for(arguments, code, sky, folder):
    (folder / "broken.xisf").write_bytes(b"XISF0100" + bytes(100))
    program = ("import sys, bgoptimizer; code = bgoptimizer.main(sys.argv[1:]); "
               "sys.exit(99 if 'tensorflow' in sys.modules else code)")
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)}, timeout=60)
    assert done.returncode == code, done.stderr


def test_nothing_but_the_preview_imports_matplotlib(sky, folder):
    program = "import sys, bgoptimizer; bgoptimizer.main(sys.argv[1:]); sys.exit('matplotlib' in sys.modules)"
    for arguments in (["--help"], ["absent.xisf"], ["sky.xisf", "-p", "--figures", "none"]):
        done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=folder, capture_output=True,
                              env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)}, timeout=60)
        assert done.returncode == 0, arguments


def test_preview_needs_no_display_and_writes_one_png(sky, folder):
    bare = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")}
    done = command("sky.xisf", "out", "--preview", cwd=folder, env=bare)
    assert done.returncode == 0, done.stderr
    assert os.listdir(folder / "out") == ["sky_preview.png"]
    assert Image.open(folder / "out/sky_preview.png").width <= 1440


def test_a_notebooks_backend_handed_down_does_no_harm(sky, folder):
    done = command("sky.xisf", "-p", cwd=folder, env={**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"})
    assert done.returncode == 0 and (folder / "sky_preview.png").exists(), done.stderr


@pytest.mark.skipif(os.name == "nt", reason="signals differ")
def test_ctrl_c_ends_with_130_one_line_and_no_leftovers(folder):
    save(folder / "sky.xisf", sloping_sky(400, 600)[0])
    for wait in (b"fitting", b"600 x 400"):
        process = subprocess.Popen([sys.executable, "-u", str(SCRIPT), "sky.xisf", "out", "-e", "100000", "-dq", "0.999"], cwd=folder, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE)
        while wait not in process.stdout.readline():
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
    process = subprocess.Popen([sys.executable, "-u", str(SCRIPT), "sky.xisf", "-p"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    process.wait(60)
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()


# ------------------------------------------------------------------------------------------------ usage errors: 2

@pytest.mark.parametrize("arguments, word", [
    (["-dx", "0"], "-dx"), (["-dx", "two"], "-dx"), (["-df", "max"], "-df"), (["-dq", "0"], "-dq"), (["-dq", "1.01"], "-dq"),
    (["-N", "2"], "-N"), (["-O", "5"], "-O"), (["-tm", "0.5", "-tM", "0.4"], "-tM"), (["-i", "sobol"], "-i"), (["-e", "0"], "-e"),
    (["-a", "-1"], "-a"), (["-B", "0"], "-B"), (["-lr", "nan"], "-lr"), (["--smoothing", "much"], "--smoothing"),
    (["--smoothing", "-1"], "--smoothing"), (["--seed", "-1"], "--seed"), (["--figures", "maybe"], "--figures"), (["--unknown"], "--unknown"),
    (["-p", "--animate"], "--animate"), (["-p", "--save-mask"], "--save-mask"), (["a", "b"], "b")])
def test_wrong_usage_is_one_sentence_and_exit_2(arguments, word, sky, folder, capsys):
    assert run("sky.xisf", *arguments) == 2
    assert word in refused(capsys, 2)
    assert os.listdir(folder) == ["sky.xisf"]


def test_no_arguments_is_wrong_usage(capsys):
    assert run() == 2
    assert "input_file" in refused(capsys)


# ------------------------------------------------------------------------------------------------ could not be done: 1

def test_missing_input(folder, capsys):
    assert run("absent.xisf", "out") == 1
    assert "absent.xisf does not exist" in refused(capsys)
    assert os.listdir(folder) == []


def test_input_that_is_a_folder(folder, capsys):
    assert run(folder) == 1
    assert "is a folder" in refused(capsys)


def test_input_that_is_no_xisf(folder, capsys):
    (folder / "note.xisf").write_text("hello")
    assert run("note.xisf") == 1
    assert "XISF" in refused(capsys)


def test_missing_mask_is_said_before_any_work(sky, folder, capsys):
    assert run("sky.xisf", "-m", "absent.xisf") == 1
    assert "absent.xisf does not exist" in refused(capsys)


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


@pytest.mark.parametrize("fill, word", [(0.0, "holds no data"), (np.nan, "holds no data"), (0.25, "the same value everywhere")])
def test_empty_pictures(fill, word, folder, capsys):
    save(folder / "empty.xisf", np.full((40, 50, 1), fill, np.float32))
    assert run("empty.xisf") == 1
    assert word in refused(capsys)


def test_all_masked(sky, folder, capsys):
    assert run("sky.xisf", "-tm", "5", "-tM", "6") == 1
    assert "every pixel is masked" in refused(capsys)


def test_figures_cannot_be_shown_without_a_display(sky, folder, capsys, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    if sys.platform.startswith("linux"):
        assert run("sky.xisf", "--figures", "show") == 1
        assert "--figures save" in refused(capsys)


def test_too_little_memory_says_what_helps(sky, folder, capsys, monkeypatch):
    def exhausted(*_):
        raise MemoryError
    monkeypatch.setattr(bgoptimizer, "examine", exhausted)
    assert run("sky.xisf") == 1
    assert "memory" in refused(capsys)


def test_too_little_disk_is_said_before_the_fit(sky, folder, capsys, monkeypatch):
    monkeypatch.setattr(bgoptimizer.shutil, "disk_usage", lambda path: os.terminal_size((0, 0)) and type("Usage", (), {"free": 1000})())
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
    return Path(path).read_bytes()[16:20000].split(b"</xisf>")[0].decode()


def test_history_tells_version_date_and_every_setting(sky, folder):
    assert run("sky.xisf", *FAST, "--seed", "7", "--quiet") == 0
    for name in ("sky_bgModel.xisf", "sky_bgSubtracted.xisf"):
        text = header(name)
        assert f"bgoptimizer {bgoptimizer.VERSION}, 20" in text
        for item in bgoptimizer.fields(bgoptimizer.Settings):
            assert f"bgoptimizer: {item.name} = " in text
        for line in ("seed = 7", "epochs = 30", "delinearization_quantile = 0.999", "points = 32", "smoothing = 1.0", "mask = None", "offset of channel 2 = "):
            assert f"bgoptimizer: {line}" in text
        assert "None" not in text.replace("mask = None", "")


def masked_dates(path):
    return hashlib.sha256(re.sub(rb"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d[.\d]*(Z|\+00:00)", b"", Path(path).read_bytes())).hexdigest()


def test_the_same_command_gives_the_same_files_but_for_dates(sky, folder):
    for out in ("a", "b"):
        assert run("sky.xisf", out, *FAST, "-i", "random") == 0
    assert run("sky.xisf", "c", *FAST, "-i", "random", "--seed", "1") == 0
    for name in ("sky_bgModel.xisf", "sky_bgSubtracted.xisf"):
        assert masked_dates(folder / "a" / name) == masked_dates(folder / "b" / name)
        assert masked_dates(folder / "a" / name) != masked_dates(folder / "c" / name)


def test_compressed_outputs_hold_the_same_pixels(sky, folder):
    assert run("sky.xisf", "plain", *FAST) == 0 and run("sky.xisf", "packed", *FAST, "--compress") == 0
    for name in ("sky_bgModel.xisf", "sky_bgSubtracted.xisf"):
        assert "lz4hc+sh:" in header(folder / "packed" / name)
        np.testing.assert_array_equal(load(folder / "packed" / name), load(folder / "plain" / name))


def test_quiet_says_nothing(sky, folder, capfd):
    assert run("sky.xisf", *FAST, "--quiet") == 0
    assert capfd.readouterr().out == ""


def test_mask_file_is_used(sky, folder, capsys):
    mask = np.ones((96, 144, 1), np.float32)
    mask[:48] = 0
    save(folder / "mask.xisf", mask)
    assert run("sky.xisf", *FAST, "-m", "mask.xisf", "--save-mask") == 0
    assert "50.0% masked" in capsys.readouterr().out
    np.testing.assert_array_equal(load(folder / "sky_mask.xisf"), mask)


def test_figures_and_animation_on_request(sky, folder):
    assert run("sky.xisf", "out", *FAST, "--figures", "save", "--animate") == 0
    assert sorted(os.listdir("out")) == ["sky_bgModel.xisf", "sky_bgSubtracted.xisf", "sky_figures.png", "sky_optimization.gif"]
    animation = Image.open("out/sky_optimization.gif")
    assert animation.is_animated and animation.width <= 900 and os.path.getsize("out/sky_optimization.gif") < 3e6


@pytest.mark.parametrize("channels, shape", [(1, (96, 144)), (3, (144, 96)), (1, (9, 200)), (1, (1, 30))])
def test_pictures_are_drawn_of_every_shape(channels, shape, folder):
    save(folder / "sky.xisf", sloping_sky(*shape, channels)[0])
    assert run("sky.xisf", "-p") == 0
    assert run("sky.xisf", *FAST, "--figures", "save", "--animate") == 0


def test_animation_lasts_as_long_as_promised(sky, folder):
    assert run("sky.xisf", "-dx", "4", "-e", "300", "--smoothing", "1", "--animate") == 0
    animation, total = Image.open("sky_optimization.gif"), 0
    for k in range(animation.n_frames):
        animation.seek(k)
        total += animation.info["duration"]
    assert 2000 <= total <= 6000


def test_preview_warns_when_the_stretch_clips_sky(folder, capsys):
    import scenes
    save(folder / "city.xisf", scenes.make_scene("city_glows", 0, 400, 600, 3).image)
    assert run("city.xisf", "-p", "-dx", "4") == 0
    assert "raise -dq" in capsys.readouterr().err
    assert run("city.xisf", "-p", "-dx", "4", "-dq", "0.999") == 0
    assert capsys.readouterr().err == ""


def test_flags_given_by_hand_win_over_auto(sky, folder):
    assert run("sky.xisf", *FAST, "--auto", "-dq", "0.9", "-N", "20") == 0
    text = header("sky_bgModel.xisf")
    assert "delinearization_quantile = 0.9<" in text.replace('"', "<") and "points = 20<" in text.replace('"', "<")


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
