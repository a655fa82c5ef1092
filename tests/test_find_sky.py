"""The sky is found: where it is seen, how stiff it is, and what is none.

What cannot be known is said.
"""
import logging
from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from scipy.ndimage import gaussian_filter

import bgoptimizer
from bgoptimizer import Settings, examine, frame_coordinates, optimize
from rim_table import SHAPE, SIDES, straight_sides, turned_frame, with_rim
from scenes import REAL, make_scene, score, sloping_sky, to_planes

NIGHT_SKY = REAL / "nightsky.xisf"
AUTO = Settings(auto=True, initializer="grid", downscaling_factor=4)

FAMILIES = """
    galaxy            1  1  1.5
    nebula            1  1  1.5
    city_glows        0  3  1.5
    airglow           1  1  1.5  slow
    moon              1  1  1
    hills             1  1  8
    dust              1  1  5    slow
    vignetting        0  1  1.5  slow
    pedestal          0  1  1.5  slow
    edge_glow         0  1  2
    corner_star       0  1  2      slow
    dark_clouds       0  1  5      open
    globular          0  1  2.5
    comet             0  1  4
    tilted_steps      1  1  7    slow
    stars             1  1  1.5  slow
    cluster           1  1  1    slow
    large_galaxy      1  1  4    slow
    clipped           3  1  6      slow
    milky_way         0  1  7    slow
    narrowband        3  1  3      slow
    plane_galaxy      1  1  1.5  slow
    galaxy            2  3  1.5  slow
    nebula            2  3  1.5    slow
    airglow           3  3  1.5    slow
    mosaic            1  3  5    slow
    amp_glow          3  1  5    slow
    edge_nebula       3  1  3      open
    edge_glow         1  1  2    slow
    edge_glow         2  3  2      open
    corner_star       1  1  2    slow
    dark_clouds       1  1  5      open
    dark_clouds       2  3  5    slow
    globular          1  1  2.5  slow
    globular          2  3  2.5  slow
    comet             1  1  4      slow
    comet             2  3  4            open
    hills             2  1  8      slow
    banding           1  1  2      open
    small_galaxies    1  1  2.5    open
"""
"""Family, seed, channels, and the largest error of the sky, in percent of its range. What is open is
not reached yet, and slow."""


def families():
    """Yield the rows of FAMILIES as parameters of a test."""
    for row in FAMILIES.strip().splitlines():
        family, seed, channels, bound, *words = row.split()
        marks = [pytest.mark.slow] if words else []
        if words == ["open"]:
            marks.append(pytest.mark.xfail(strict=False, reason="not reached yet"))
        yield pytest.param(family, int(seed), int(channels), float(bound), marks=marks)


def find(image, settings=AUTO):
    """Return what the fit sees of an image (h, w, c), with the sky that was found."""
    planes = to_planes(image.astype(np.float32))
    prepared, _ = examine(planes, settings)
    return prepared


def settings_used(image, settings):
    """Return the settings with the values that are used in place of every None."""
    _, used = examine(to_planes(image), settings)
    return used


def error_of_sky(prepared, scene):
    """Return the error of the sky that was found, at full size; see `score`."""
    height, width = scene.image.shape[:2]
    places = frame_coordinates(height, width)
    sky = prepared.sky.surface(places)
    return score(sky, scene)[0]


def used_pixels(prepared):
    """Return which pixels take part in the fit, at full size, (h, w) bool."""
    block = np.ones((4, 4), bool)
    return np.kron(prepared.used, block)


def coordinates(height, width):
    """Return the y and x of pixel centers, (h, w) each, over the width."""
    y, x = np.indices((height, width))
    return (y + 0.5) / width, (x + 0.5) / width


def with_noise(light, sigma):
    """Return an image (h, w, 1) of light (h, w)."""
    noise = np.random.default_rng(0).normal(0, sigma, light.shape)
    return (light + noise)[..., None]


def distance_from_plane(places, surface):
    """Return the largest distance of a surface (m, c) at places (..., 2) from a plane.

    It is in units of the surface's range.
    """
    terms = np.column_stack([places.reshape(-1, 2), np.ones(len(surface))])
    coefficients = np.linalg.lstsq(terms, surface, rcond=None)[0]
    distance = np.abs(terms @ coefficients - surface).max()
    return distance / max(np.ptp(surface, 0).max(), 1e-9)


@pytest.mark.parametrize("family, seed, channels, bound", families())
def test_the_sky_is_found_behind(family, seed, channels, bound):
    scene = make_scene(family, seed, 400, 600, channels)
    assert error_of_sky(find(scene.image), scene) < bound


def test_a_smooth_nebula_drowned_in_noise_is_an_object_and_no_sky():
    scene = make_scene("short_stack", 3, 900, 600, 1)
    prepared = find(scene.image)
    assert error_of_sky(prepared, scene) < 5
    nebula = scene.light[..., 0]
    peak = np.unravel_index(nebula.argmax(), nebula.shape)
    row, column = np.array(peak) // (4 * prepared.sky.size)
    assert prepared.sky.below[row, column]


def test_light_that_fades_from_an_edge_is_sky():
    y, x = coordinates(400, 600)
    squared_distance = (y - 0.3)**2 + (x + 0.1)**2
    glow = np.exp(-squared_distance / (2 * 0.3**2))
    image = with_noise(0.05 + 0.05 * glow, 0.002)
    sky = find(image).sky
    assert sky.share > 0.9
    assert not sky.unsure


def test_vignetting_has_a_top_inside_the_frame_and_is_sky():
    y, x = coordinates(400, 600)
    squared_distance = (y - 0.33)**2 + (x - 0.5)**2
    image = with_noise(0.05 * (1 - 0.6 * squared_distance), 0.0005)
    sky = find(image).sky
    assert sky.share > 0.95
    assert not sky.unsure


@pytest.mark.skipif(not NIGHT_SKY.exists(), reason="the real pictures are not part of the project")
def test_the_dome_of_a_real_night_sky_is_no_object():
    planes = bgoptimizer.read_picture(str(NIGHT_SKY)).planes
    prepared, _ = examine(planes, Settings(auto=True))
    assert prepared.sky.share > 0.9


@pytest.mark.slow
def test_the_fit_keeps_what_was_found():
    scene = make_scene("galaxy", 0, 600, 400, 3, border=True)
    result = optimize(scene.image, AUTO)
    assert score(result.model, scene)[0] < 1.5
    red = result.prepared.linear[..., 0]
    bright = red > np.nanpercentile(red, 99.5)
    assert not result.prepared.used[bright].any()


def test_the_halo_of_a_bright_star_is_left_out_and_the_sky_around_it_is_not():
    image, _ = sloping_sky(600, 900, 1)
    y, x = np.indices((600, 900))
    distance = np.hypot(y - 300, x - 450)
    halo = 0.02 * np.exp(-distance / 25)
    star = 0.6 * np.exp(-(distance / 5)**2)
    image[..., 0] += halo + star
    used = used_pixels(find(np.clip(image, 0, 1)))
    assert used[distance < 60].mean() < 0.05
    assert used[distance > 250].mean() > 0.7


def test_a_flat_sky_is_left_alone():
    scene = make_scene("flat", 1, 400, 600, 1)
    assert error_of_sky(find(scene.image), scene) < 33  # percent of the pixel noise


@pytest.mark.parametrize("depth, level", [
    (straight_sides(5, SIDES[3]), 0.4),
    pytest.param(straight_sides(4, SIDES[1]), 0.02, marks=pytest.mark.slow),
    pytest.param(turned_frame(0.5), 0.02, marks=pytest.mark.slow),
    pytest.param(turned_frame(1), 0.8, marks=pytest.mark.slow),
])
def test_a_rim_that_is_too_thin_to_be_seen_does_not_bend_the_sky(depth, level):
    scene = make_scene("galaxy", 0, *SHAPE, channels=1)
    rimmed, inside = with_rim(scene.image[..., 0], depth, level, soft=True)
    prepared = find(rimmed[..., None], Settings(auto=True))
    assert not prepared.sky.unsure
    assert error_of_sky(prepared, replace(scene, valid=inside == 1)) < 0.5


def test_hills_are_masked_and_the_sky_above_them_is_not():
    scene = make_scene("hills", 1, 600, 900, 1)
    used = used_pixels(find(scene.image))
    smooth = gaussian_filter(scene.image, (8, 8, 0))
    dark = (smooth < 0.7 * scene.sky).all(-1)
    hills = scene.object_mask & dark  # without the stars
    sky = scene.valid & ~scene.object_mask
    assert hills.mean() > 0.05
    assert used[hills].mean() < 0.1
    assert used[sky].mean() > 0.6


@pytest.mark.slow
def test_dark_sky_beyond_the_milky_way_is_no_hill():
    scene = make_scene("milky_way", 1, 600, 900, 1)
    used = used_pixels(find(scene.image))
    sky = scene.valid & ~scene.object_mask
    assert used[sky].mean() > 0.6


@pytest.mark.parametrize("seed", [
    0, pytest.param(1, marks=[
        pytest.mark.slow, pytest.mark.xfail(strict=False, reason="not reached yet")])])
def test_clouds_before_the_sky_are_objects_and_the_sky_between_them_is_not(seed):
    scene = make_scene("dark_clouds", seed, 600, 900, 1)
    used = used_pixels(find(scene.image))
    darker = (scene.light < -5 * scene.noise).all(-1) & scene.valid
    sky = scene.valid & ~scene.object_mask
    assert darker.mean() > 0.1
    assert used[darker].mean() < 0.2
    assert used[sky].mean() > 0.3


def test_a_globular_cluster_bounds_the_sky_and_is_none():
    scene = make_scene("globular", 1, 400, 600, 1)
    prepared = find(scene.image)
    light = gaussian_filter(scene.light[..., 0], 8)
    peak = np.unravel_index(light.argmax(), light.shape)
    place = (np.array(peak) + 0.5) / 600
    sky = prepared.sky
    assert sky.at(sky.below, place)
    assert not sky.at(sky.shows_sky, place)


@pytest.mark.parametrize("smoothing", [None, 1.0])
def test_what_cannot_be_known_is_said_in_one_warning(smoothing, caplog):
    noise = np.random.default_rng(0).random((400, 600, 1))
    clouds = gaussian_filter(noise, (14, 14, 0))
    with caplog.at_level(logging.WARNING, "bgoptimizer"):
        prepared = find(0.05 + 0.2 * clouds, replace(AUTO, smoothing=smoothing))
    assert prepared.sky.unsure
    assert len(caplog.records) == 1
    warning = caplog.records[0].getMessage()
    assert "cannot be told from objects" in warning
    assert "-m" in warning


def test_a_good_picture_has_no_warning(caplog):
    with caplog.at_level(logging.WARNING, "bgoptimizer"):
        for family in ("galaxy", "city_glows", "stars"):
            scene = make_scene(family, 1, 400, 600, 1)
            find(scene.image)
    assert not caplog.records


def stretched(image):
    bright = 4 * image
    return bright / (bright + 0.2)


def autostretched(image, target=0.25):
    """Return the picture as PixInsight and Siril show it: its median at a quarter, or less."""
    middle = np.median(image)
    deviation = 1.4826 * np.median(np.abs(image - middle))
    dark = max(0, middle - 2.8 * deviation)
    light = np.clip((image - dark) / (1 - dark), 0, 1)
    middle = (middle - dark) / (1 - dark)
    midtones = middle * (target - 1) / (2 * target * middle - target - middle)
    return (midtones - 1) * light / ((2 * midtones - 1) * light - midtones)


def undebayered(image):
    checkers = np.indices(image.shape).sum(0) % 2
    return image * (1 + 0.3 * checkers)


def one_odd_phase(image):
    image = image.copy()
    image[1::2, ::2] *= 0.8
    return image


def half_missing(image):
    image = image.copy()
    image[:, :400] = 0
    return image


@pytest.mark.parametrize("spoil, words", [
    (stretched, "looks stretched"),
    (undebayered, "undebayered"),
    (one_odd_phase, "undebayered"),
    (half_missing, "missing"),
])
def test_a_picture_that_is_not_one_to_run_it_on_is_warned_about(spoil, words, caplog):
    image, _ = sloping_sky(400, 600, 1)
    image[::7, ::9] = 0.9  # stars
    with caplog.at_level(logging.WARNING, "bgoptimizer"):
        find(spoil(image))
    assert words in caplog.text


@pytest.mark.parametrize("family", ["flat", "moon", "crowded", "short_stack", "vignetting"])
def test_linear_pictures_do_not_look_stretched(family):
    planes = to_planes(make_scene(family, 1, 400, 600, 3).image)
    assert not bgoptimizer._looks_stretched(planes)
    planes[:, :, :200] *= 0.9  # dimmer, and noisier, where fewer exposures reach
    planes[:, :, :200] += np.random.default_rng(0).normal(0, 0.003, planes[:, :, :200].shape)
    assert not bgoptimizer._looks_stretched(planes)


@pytest.mark.parametrize("family, target", [
    ("flat", 0.25),
    ("short_stack", 0.25),
    ("short_stack", 0.11),
    ("banding", 0.25),
    ("banding", 0.11),
    ("small_galaxies", 0.25),
    ("small_galaxies", 0.11),
])
def test_autostretched_pictures_look_stretched(family, target):
    image = make_scene(family, 1, 400, 600, 3).image
    assert bgoptimizer._looks_stretched(to_planes(autostretched(image, target)))


@pytest.mark.skipif(not REAL.exists(), reason="no real pictures here")
def test_a_real_picture_that_is_stretched_a_little_is_told(caplog):
    planes = bgoptimizer.read_picture(str(REAL / "seestar_ngc7023.xisf")).planes
    image = autostretched(np.moveaxis(planes, 0, -1), 0.11)
    with caplog.at_level(logging.WARNING, "bgoptimizer"):
        find(image)
    assert "looks stretched" in caplog.text


@pytest.mark.parametrize("name", ["allsky", "galaxy", "horsehead", "m13", "m27", "m51", "nightsky",
                                  "seestar_ngc7023"])
def test_real_linear_pictures_do_not_look_stretched_and_asinh_of_them_do(name):
    path = REAL / f"{name}.xisf"
    if not path.exists():
        pytest.skip("no real pictures here")
    planes = bgoptimizer.read_picture(str(path)).planes
    assert not bgoptimizer._looks_stretched(planes)
    if name == "allsky":
        return  # half of it is black
    dark = np.quantile(planes[planes > 0], 0.001)
    light = np.clip(planes - dark, 0, None)
    strength = 30 / np.median(light[light > 0])
    stretched = np.arcsinh(strength * light) / np.arcsinh(strength)
    assert bgoptimizer._looks_stretched(stretched)


@pytest.mark.parametrize("axis", [0, 1])
def test_columns_or_rows_of_a_mono_camera_that_differ_are_no_mosaic(axis):
    """Twelve bits in sixteen, noise of 5 of them; every second line is 0.2 of them brighter."""
    adu = 60 + np.random.default_rng(axis).normal(0, 5, (600, 800))
    adu += 0.2 * (np.indices(adu.shape)[axis] % 2)
    plane = np.round(adu).astype(np.float32) * 16 / 65535
    assert not bgoptimizer._looks_like_mosaic(plane)
    lines = np.indices(adu.shape)[axis] % 2
    assert not bgoptimizer._looks_like_mosaic(plane * (1 + np.float32(0.2) * lines))


@pytest.mark.parametrize("inverted", [False, True])
def test_a_mask_that_leaves_the_object_is_asked_about(inverted, caplog):
    scene = make_scene("nebula", 0, 400, 600, 1)
    mask = np.ones((1, 400, 600), np.float32)
    mask[0, scene.object_mask] = 0
    if inverted:
        mask = 1 - mask
    with caplog.at_level(logging.WARNING, "bgoptimizer"):
        examine(to_planes(scene.image), Settings(downscaling_factor=4), mask)
    assert ("is the mask inverted?" in caplog.text) == inverted


def crop(side, stars):
    """Return a small picture without noise, its sky, and what is found in it."""
    image, sky = sloping_sky(side, side, 1, noise=0)
    rng = np.random.default_rng(2)
    spots = np.zeros(image.shape)
    spots[rng.integers(0, side, stars), rng.integers(0, side, stars)] = rng.uniform(0.1, 3)
    image = image + gaussian_filter(spots, (1.5, 1.5, 0)).astype(np.float32)
    prepared, _ = examine(to_planes(image), Settings(auto=True))
    found = prepared.sky.surface(frame_coordinates(side, side))
    return sky, found, prepared.sky.unsure


def test_nothing_is_invented_in_a_small_picture_without_noise():
    sky, found, _ = crop(100, 0)
    assert np.abs(found - sky).max() < 0.03 * np.ptp(sky)


@pytest.mark.parametrize("side, stars", [(80, 0), (80, 300), (100, 300)])
def test_a_small_crop_is_told_and_if_too_small_it_gets_a_plane(side, stars):
    _, found, unsure = crop(side, stars)
    assert unsure
    if "too small" in unsure:
        assert distance_from_plane(frame_coordinates(side, side), found.reshape(-1, 1)) < 0.01
    else:
        assert side == 100


def test_channels_that_are_nowhere_present_together_are_no_fault():
    image, _ = sloping_sky(200, 300)
    image[:100, :, 0] = 0
    image[100:, :, 1] = 0
    prepared, _ = examine(to_planes(image), Settings(downscaling_factor=4))
    assert not prepared.present.all(-1).any()
    assert prepared.sky.unsure


def test_what_is_given_by_hand_wins():
    image, _ = sloping_sky(300, 400, 1)
    settings = Settings(auto=True, downscaling_factor=2, delinearization_quantile=0.9, points=20,
                        smoothing=3.0)
    used = settings_used(image, settings)
    assert used.delinearization_quantile == 0.9
    assert used.points == 20
    assert used.smoothing == 3.0
    mask = np.ones((1, 300, 400), np.float32)
    mask[:, :100] = 0
    prepared, _ = examine(to_planes(image), settings, mask)
    assert not prepared.used[:50].any()


@pytest.mark.slow
@pytest.mark.parametrize("auto", [
    pytest.param(False, marks=pytest.mark.xfail(
        strict=False, reason="30 points in the stretched frame are 6 % off a plane in the corners")),
    True])
def test_the_largest_smoothing_is_a_plane_with_and_without_auto(auto):
    image, _ = sloping_sky(300, 400, 1)
    settings = Settings(auto=auto, downscaling_factor=2, smoothing=1e4, initializer="grid")
    model = optimize(image, settings).model.reshape(-1, 1)
    assert distance_from_plane(frame_coordinates(300, 400), model) < 0.03


@pytest.mark.parametrize("auto", [False, True])
def test_a_corner_without_sky_cannot_make_the_surface_run_away(auto):
    image, sky = sloping_sky(300, 400, 1)
    image[:150, 250:] = 0
    settings = Settings(auto=auto, downscaling_factor=2, order=3, smoothing=0.0, epochs=100)
    model = optimize(image, settings).model
    seen = sky[image > 0]
    low = seen.min()
    high = seen.max()
    reach = 1.5 * bgoptimizer.MAX_EXTRAPOLATION * (high - low)
    assert model.min() > low - reach
    assert model.max() < high + reach


def test_a_plain_run_chooses_less_smoothing_where_the_sky_bends_more():
    settings = Settings(downscaling_factor=4)
    bent = make_scene("airglow", 1, 400, 600, 1)
    flat = make_scene("flat", 1, 400, 600, 1)
    of_bent = settings_used(bent.image, settings)
    of_flat = settings_used(flat.image, settings)
    assert of_bent.smoothing < of_flat.smoothing


@pytest.mark.slow
def test_a_plain_run_is_stiffer_than_the_sky_where_objects_are():
    scene = make_scene("nebula", 1, 400, 600, 1)
    plain = find(scene.image, replace(AUTO, auto=False))
    auto = find(scene.image)
    assert plain.sky.smoothing > 2 * auto.sky.smoothing


@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize("shape", [(40, 60), (8, 700), (3, 3), (1, 40)])
def test_the_sky_of_a_small_picture_is_a_plane_and_unsure(shape, auto):
    image, _ = sloping_sky(*shape, 3)
    prepared, settings = examine(to_planes(image), Settings(auto=auto))
    assert prepared.sky.unsure
    assert settings.smoothing >= 1e4
    places = frame_coordinates(*shape)
    sky = prepared.sky.surface(places).reshape(-1, 3)
    assert np.isfinite(sky).all()
    assert distance_from_plane(places, sky) < 1e-3


@pytest.mark.parametrize("shape", [(40, 60), (8, 700)])
def test_small_pictures_are_fitted(shape):
    image, sky = sloping_sky(*shape, 3)
    model = optimize(image, Settings(auto=True, epochs=100)).model
    error = model - sky
    error -= np.median(error, (0, 1))
    assert error.std() < 0.3 * (sky - np.median(sky, (0, 1))).std()


def test_a_picture_with_nothing_left_in_but_its_rim_is_still_fitted():
    image, _ = sloping_sky(300, 400, 1)
    image[8:-8, 8:-8] *= 0.5
    framed = np.zeros_like(image)  # cells beside missing ones do not count
    framed[4:-4, 4:-4] = image[4:-4, 4:-4]
    settings = Settings(auto=True, downscaling_factor=4, threshold_min=0.9, epochs=5)
    model = optimize(framed, settings).model
    assert np.isfinite(model).all()


def test_the_smoothing_told_is_the_one_used():
    scene = make_scene("flat", 1, 400, 600, 1)
    result = optimize(scene.image, replace(AUTO, epochs=2))
    smoothing = result.prepared.sky.smoothing
    assert result.settings.smoothing == smoothing


@pytest.mark.slow
def test_panels_that_do_not_match_are_told():
    mosaic = make_scene("mosaic", 4, 400, 600)
    galaxy = make_scene("galaxy", 1, 400, 600)
    assert "panels of a mosaic" in find(mosaic.image).sky.unsure
    assert "panels" not in find(galaxy.image).sky.unsure


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_tilted_steps_are_warned_about(seed):
    scene = make_scene("tilted_steps", seed, 400, 600)
    assert find(scene.image).sky.unsure


@pytest.mark.slow
@pytest.mark.parametrize("family", ["full_object", "crowded", "rim", "near_moon", "three_panels",
                                    "h_alpha_edge", "ultrawide", "short_stack", "narrowband"])
@pytest.mark.parametrize("seed", [0, 1])
def test_an_error_above_5_percent_is_never_without_a_warning(family, seed):
    scene = make_scene(family, seed, 400, 600, 1)
    prepared = find(scene.image)
    assert error_of_sky(prepared, scene) < 5 or prepared.sky.unsure


@pytest.mark.slow
def test_an_amplifier_glow_is_sky_and_the_fit_keeps_it():
    scene = make_scene("amp_glow", 0, 400, 600, 1)
    prepared = find(scene.image)
    assert error_of_sky(prepared, scene) < 2
    settings = replace(AUTO, initializer="random")  # a grid has few points in a corner
    model = optimize(scene.image, settings).model
    assert score(model, scene)[0] < 2


@pytest.mark.parametrize("family, seed", [
    ("galaxy", 0), ("nebula", 1), ("city_glows", 0), ("hills", 1), ("comet", 1),
    pytest.param("dust", 0, marks=pytest.mark.xfail(reason="true of 76 % of it, not of 85")),
    pytest.param("milky_way", 1, marks=pytest.mark.slow),
    pytest.param("tilted_steps", 0, marks=pytest.mark.slow),
])
def test_the_sky_is_as_uncertain_as_it_says(family, seed):
    scene = make_scene(family, seed, 400, 600)
    sky = find(scene.image).sky
    places = frame_coordinates(400, 600)
    error = np.abs(sky.surface(places) - scene.sky)[scene.valid]
    deviation = sky.uncertain(places)[scene.valid]
    assert (error < 2 * deviation).mean() > 0.85
    assert deviation.mean() < 0.1 * np.ptp(scene.sky)


def test_what_is_known_of_cells_is_told_at_any_place():
    image, _ = sloping_sky(200, 300, 1)
    sky = find(image).sky
    cells = np.arange(sky.shows_sky.size).reshape(sky.shows_sky.shape)
    assert_array_equal(sky.at(cells, sky.centers), cells)
    corners = np.array([[0, 0], [200 / 300, 1]])  # of the frame
    assert_array_equal(sky.at(cells, corners), [0, cells.size - 1])


def crowded_crop(seed):
    """Return a picture (100, 100, 1) of 400 stars on a slope, and its sky, whose median is 0.05."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:100, :100]
    angle = rng.uniform(0, 2 * np.pi)
    along = (x * np.cos(angle) + y * np.sin(angle)) / 100
    sky = 0.05 + 0.01 * (along - np.median(along))
    image = sky.copy()
    for _ in range(400):
        star_y, star_x = rng.uniform(-10, 110, 2)
        distance = np.hypot(y - star_y, x - star_x)
        flux = min(20, 0.004 * (rng.pareto(1) + 1))
        image += flux / 10 * (1 + distance**2 / 9.7)**-3  # Moffat's profile, 3 pixels wide
    image += 0.002 * rng.standard_normal(image.shape)
    return image[..., None].astype(np.float32), sky[..., None]


@pytest.mark.parametrize("seed", range(4))
def test_the_sky_of_a_small_crowded_picture_does_not_follow_its_stars(seed):
    image, sky = crowded_crop(seed)
    prepared, _ = examine(to_planes(image), Settings(auto=True))
    found = prepared.sky
    error = found.surface(frame_coordinates(100, 100)) - sky
    error -= np.median(error)
    assert error.std() < 0.01 * 0.05
    assert found.found_smoothing >= 1e3  # at most a bowl: there are 13 x 13 reduced pixels
