"""What is said of a picture and what is drawn: numbers, warnings, preview, figures, animation."""
import io
import os
import sys

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image, ImageSequence

from bgoptimizer import (
    OVERLAYS,
    Settings,
    examine,
    fit_surface,
    frame_coordinates,
    gradients,
    mask_reasons,
    prepare,
    start_positions,
    striped,
    write_animation,
)
from runner import FAST, command, quick, refused, run
from scenes import make_scene, save, sloping_sky, to_planes


# ---------------------------------------------------------------------------- numbers and warnings

def test_what_is_left_out_has_its_reason():
    image, _ = sloping_sky(80, 120)
    image[:16] = 0
    mask = np.ones((1, 80, 120), np.float32)
    mask[:, :, :24] = 0
    settings = Settings(threshold_max=0.3).resolved()
    prepared = prepare(to_planes(image), settings, mask)
    reasons = mask_reasons(prepared, settings)
    assert reasons["missing"].mean() == pytest.approx(0.2)
    assert reasons["mask file"].any()
    assert reasons["threshold"].any()
    count = sum(area.astype(int) for area in reasons.values())
    assert_array_equal(count, ~prepared.used)


@pytest.mark.parametrize("correction", ["subtract", "divide"])
def test_the_gradient_after_is_that_of_the_picture_as_it_was_corrected(correction):
    places = frame_coordinates(240, 360)
    sky = 0.02 * np.exp(3 * places[..., 1])
    noise = np.random.default_rng(1).normal(0, 0.0005, sky.shape)
    image = (sky + noise).astype(np.float32)
    prepared, _ = examine(image[None], Settings(downscaling_factor=4))

    def model(places):
        """Return half of the sky, as one sees it."""
        return 0.05 * np.exp(1.5 * places[..., 1:])

    taken = model(places)[..., 0]
    if correction == "subtract":
        left = sky - taken
    else:
        left = sky / taken * np.median(taken)
    low, high = np.quantile(left, (0.01, 0.99))
    expected = (high - low) / np.median(sky)
    _, after = gradients(prepared, model, correction)
    assert after == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("family, warned", [
    ("city_glows", True),
    ("moon", True),
    ("galaxy", False),
    ("stars", False),
    ("nebula", False),
    ("flat", False),
])
def test_blown_out_sky_is_told_from_blown_out_objects(family, warned, caplog):
    seeds = {"galaxy": 3, "stars": 2}  # others have a bright corner of sky besides
    scene = make_scene(family, seeds.get(family, 0), 400, 600, 3)
    planes = to_planes(scene.image)
    examine(planes, Settings(downscaling_factor=4))
    assert ("raise -dq" in caplog.text) == warned
    caplog.clear()
    followed = Settings(downscaling_factor=4, auto=True, delinearization_quantile=0.95)
    examine(planes, followed)
    examine(planes, Settings(downscaling_factor=4, delinearization_quantile=0.999))  # as is asked
    assert "raise -dq" not in caplog.text


@pytest.mark.slow
def test_preview_warns_when_the_stretch_clips_sky(folder, capsys):
    scene = make_scene("city_glows", 0, 400, 600, 3)
    save(folder / "city.xisf", scene.image)
    preview = "city.xisf", "-p", "-dx", "4"
    assert run(*preview) == 0
    assert "raise -dq" in capsys.readouterr().err
    assert run(*preview, "-dq", "0.999") == 0
    assert capsys.readouterr().err == ""


def test_a_small_patch_of_data_is_warned_about_once_and_not_called_nan(folder, capsys):
    image = np.zeros((64, 80, 1), np.float32)
    patch, _ = sloping_sky(8, 8, 1)
    image[8:16, 16:24] = patch  # one block at an odd place
    save(folder / "patch.xisf", image)
    assert run("patch.xisf", "-e", "2", "--smoothing", "1", "-dq", "1") == 0
    said = capsys.readouterr()
    assert said.err.count("missing") == 1  # and that its sky is too small to be sure of
    assert "nan" not in said.out
    assert "unknown" in said.out


def test_a_gradient_that_means_nothing_is_not_told(folder, capsys):
    scene = make_scene("full_object", 0, 400, 600, 1)
    save(folder / "full.xisf", scene.image)
    assert run("full.xisf", *FAST, "--auto") == 0
    said = capsys.readouterr()
    assert "cannot be told from objects" in said.err
    assert "gradient unknown: too little" in said.out


def test_a_sky_that_is_clipped_is_told_with_what_helps(folder, capsys):
    noise = np.random.default_rng(1).normal(0.001, 0.001, (400, 600, 1))  # next to 0
    image = np.clip(noise, 1e-7, 1)
    save(folder / "dark.xisf", image.astype(np.float32))
    assert run("dark.xisf", *FAST) == 0
    assert "add a pedestal" in capsys.readouterr().err


@pytest.mark.parametrize("family, extra, told", [
    ("large_galaxy", [], True),
    pytest.param("large_galaxy", ["--auto"], False, marks=pytest.mark.slow),
    ("city_glows", [], False),
])
def test_a_plain_run_with_objects_in_it_hints_at_auto(family, extra, told, folder, capsys):
    scene = make_scene(family, 0, 400, 600, 3)
    save(folder / "picture.xisf", scene.image)
    assert run("picture.xisf", *FAST, *extra) == 0
    said = capsys.readouterr()
    assert ("--auto would leave them out" in said.out) == told
    assert "--auto" not in said.err


# ------------------------------------------------------------------------------------ drawing

@pytest.mark.slow
def test_a_small_picture_is_drawn_from_itself_and_a_large_one_from_its_reduced_copy():
    def drawn(height, width, factor):
        noise = np.random.default_rng(1).uniform(0.01, 0.02, (1, height, width))
        image = noise.astype(np.float32)
        prepared = prepare(image, Settings(downscaling_factor=factor).resolved())
        return image, prepared.linear, prepared.display

    image, _, shown = drawn(200, 300, 8)
    assert_allclose(shown[..., 0], image[0])
    _, _, halved = drawn(640, 960, 8)
    assert halved.shape == (320, 480, 1)  # a figure could not show more
    _, reduced, shown = drawn(1000, 1600, 8)
    assert_array_equal(shown, reduced)
    _, reduced, shown = drawn(1000, 1600, 1)
    assert_array_equal(shown, reduced[::3, ::3])


@pytest.mark.slow
@pytest.mark.parametrize("channels, shape", [
    (1, (96, 144)),
    (3, (144, 96)),
    (1, (9, 200)),
    (1, (1, 30)),
])
def test_pictures_are_drawn_of_every_shape(channels, shape, folder):
    image, _ = sloping_sky(*shape, channels)
    save(folder / "sky.xisf", image)
    assert run("sky.xisf", "-p") == 0
    assert run("sky.xisf", *FAST, "--figures", "save", "--animate") == 0


def test_the_animation_shows_the_surface_as_it_was_trained():
    """From a flat start, the first frame shows a flat sky and the last one the found slope."""
    image, _ = sloping_sky(channels=1)
    prepared, settings = examine(to_planes(image), quick(epochs=100))
    positions = start_positions(settings, prepared.sky, prepared.full_shape)
    median = prepared.stretch.extend(prepared.median)
    flat = np.tile(median, (len(positions), 1)).astype(np.float32)
    fit = fit_surface(prepared, settings, (positions, flat))
    file = io.BytesIO()
    write_animation(file, prepared, fit)
    images = ImageSequence.Iterator(Image.open(file))
    frames = np.stack([image.convert("RGB") for image in images])  # (n, h, w, 3)
    model = frames[:, 40:-20, 20:frames.shape[2] // 2 - 20]  # without the words above it
    low, high = np.percentile(model.astype(float), (20, 80), axis=(1, 2, 3))
    contrast = high - low  # (n,) the points are too small to count
    assert contrast[0] < 3
    assert contrast[-1] > 20


def test_figures_and_animation_on_request(sky, folder):
    assert run("sky.xisf", "out", *FAST, "--figures", "save", "--animate") == 0
    assert sorted(os.listdir("out")) == [
        "sky_bgModel.xisf",
        "sky_bgSubtracted.xisf",
        "sky_figures.png",
        "sky_optimization.gif",
    ]
    path = "out/sky_optimization.gif"
    assert os.path.getsize(path) < 3e6
    animation = Image.open(path)
    assert animation.is_animated
    assert animation.width <= 900


@pytest.mark.slow
def test_animation_lasts_as_long_as_promised(sky, folder):
    assert run("sky.xisf", "-dx", "4", "-e", "300", "--smoothing", "1", "--animate") == 0
    animation = Image.open("sky_optimization.gif")
    total = 0  # milliseconds
    for k in range(animation.n_frames):
        animation.seek(k)
        total += animation.info["duration"]
    assert 2000 <= total <= 6000


@pytest.mark.slow
def test_names_that_are_formulas_or_cannot_be_printed_do_no_harm(folder):
    image, _ = sloping_sky(160, 240, 1)
    names = [r"$\a_{$.xisf", "☃.xisf"]
    if sys.platform == "linux":
        names.append("bad\udcff.xisf")
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    for name in names:
        save(folder / name, image)
        done = command(name, "-p", "-dq", "1", cwd=folder, env=ascii_only)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""


def test_the_figure_repeats_the_warnings_and_shows_what_was_called_sky(folder, monkeypatch):
    texts = []

    def keep(draw):
        figure = Figure((13.6, 7.6))
        draw(figure)
        words = figure.findobj(Text)
        texts.extend(text.get_text() for text in words)
        return b""

    monkeypatch.setattr("bgoptimizer.png_of", keep)
    image, _ = sloping_sky(channels=1)
    image[:60] = 0
    save(folder / "sky.xisf", image)
    assert run("sky.xisf", *FAST, "--figures", "save", "-tM", "0.25") == 0
    said = "\n".join(texts)
    assert "warning: " in said
    assert "missing (" in said
    assert "left out by -tm, -tM (" in said


def test_stripes_tell_reasons_apart_without_colors():
    image, _ = sloping_sky(160, 160, 1)
    prepared, settings = examine(to_planes(image), quick())
    nowhere = np.zeros(prepared.used.shape, bool)
    grays = []
    for reason, (ink, _, _) in OVERLAYS.items():
        areas = {**dict.fromkeys(OVERLAYS, nowhere), reason: ~nowhere}
        shown = striped(prepared, areas)[40:-40, 40:-40]  # (h, w, 3) without its edge
        color = [int(ink[k:k + 2], 16) for k in (1, 3, 5)]
        marked = (shown == color).all(-1)
        grays.append(marked.tobytes())
    assert len(set(grays)) == len(OVERLAYS)


# ----------------------------------------------------------------------------- without a display

def test_preview_needs_no_display_and_writes_one_png(sky, folder):
    bare = dict(os.environ)
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND"):
        bare.pop(name, None)
    done = command("sky.xisf", "out", "--preview", cwd=folder, env=bare)
    assert done.returncode == 0, done.stderr
    assert os.listdir(folder / "out") == ["sky_preview.png"]
    preview = Image.open(folder / "out/sky_preview.png")
    assert preview.width <= 1440


@pytest.mark.slow
def test_a_notebooks_backend_handed_down_does_no_harm(sky, folder):
    inline = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = command("sky.xisf", "-p", cwd=folder, env={**os.environ, **inline})
    assert done.returncode == 0, done.stderr
    assert (folder / "sky_preview.png").exists(), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="other systems always have a display")
def test_figures_cannot_be_shown_without_a_display(sky, capsys, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert run("sky.xisf", "--figures", "show") == 1
    assert "--figures save" in refused(capsys)
