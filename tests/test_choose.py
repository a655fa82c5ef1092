"""What the tool chooses itself: with --auto the sky alone is fitted, whatever stands before it; choices are said."""
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

import bgoptimizer
from bgoptimizer import Settings, examine, frame_coordinates, optimize
from scenes import make_scene, score, sloping_sky, to_planes

AUTO = Settings(auto=True, initializer="grid", downscaling_factor=4)


def found_sky(scene):
    """The surface that the choices of --auto start the fit from, at full size, and what the fit sees."""
    prepared, _ = examine(to_planes(scene.image), AUTO)
    query = frame_coordinates(*scene.image.shape[:2])
    return prepared.stretch.invert(prepared.expected.surface(query)), prepared


@pytest.mark.parametrize("family, seed, channels, bound", [
    ("galaxy", 1, 1, 1.5), ("nebula", 1, 1, 1.5), ("city_glows", 0, 3, 1.5), ("airglow", 1, 1, 1.5), ("moon", 1, 1, 1),
    ("stars", 1, 1, 1.5), ("hills", 1, 1, 8), ("dust", 1, 1, 5),
    *(pytest.param(*once_more, marks=pytest.mark.slow)
      for once_more in (("galaxy", 2, 3, 1.5), ("nebula", 2, 3, 1.5), ("airglow", 3, 3, 1.5)))])
def test_the_sky_is_found_behind(family, seed, channels, bound):
    scene = make_scene(family, seed, 400, 600, channels)
    assert score(found_sky(scene)[0], scene)[0] < bound  # percent of the sky's range


@pytest.mark.slow
def test_the_fit_keeps_what_was_found():
    scene = make_scene("galaxy", 0, 600, 400, 3, border=True)
    result = optimize(scene.image, AUTO)
    assert score(result.model, scene)[0] < 1.5
    red = result.prepared.linear[..., 0]
    assert not result.prepared.used[red > np.nanpercentile(red, 99.5)].any()


@pytest.mark.slow
def test_random_and_grid_starts_agree():
    scene = make_scene("moon", 1, 400, 600, 1)
    grid, random = (optimize(scene.image, bgoptimizer.replace(AUTO, initializer=start)).model
                    for start in ("grid", "random"))
    difference = (grid - random)[scene.valid]
    span = np.subtract(*np.percentile(scene.sky[scene.valid], (99, 1)))
    assert (difference - np.median(difference)).std() < 0.005 * span


def test_the_halo_of_a_bright_star_is_left_out_and_the_sky_around_it_is_not():
    image, _ = sloping_sky(600, 900, 1)
    y, x = np.indices(image.shape[:2])
    distance = np.hypot(y - 300, x - 450)
    image += (0.02 * np.exp(-distance / 25) + 0.6 * np.exp(-(distance / 5)**2)).astype(np.float32)[..., None]
    used = np.kron(examine(to_planes(np.clip(image, 0, 1)), AUTO)[0].used, np.ones((4, 4), bool))
    assert used[distance < 70].mean() < 0.05 and used[distance > 150].mean() > 0.9


def test_a_flat_sky_is_left_alone():
    scene = make_scene("flat", 1, 400, 600, 1)
    assert score(found_sky(scene)[0], scene)[0] < 33  # percent of the pixel noise


def test_hills_are_masked_and_the_sky_above_them_is_not():
    scene = make_scene("hills", 1, 600, 900, 1)
    used = np.kron(found_sky(scene)[1].used, np.ones((4, 4), bool))
    hills = scene.object_mask & (gaussian_filter(scene.image, (8, 8, 0)) < 0.7 * scene.sky).all(-1)  # not the stars
    assert hills.mean() > 0.05 and used[hills].mean() < 0.1
    assert used[scene.valid & ~scene.object_mask].mean() > 0.8


def test_too_little_sky_is_said_and_the_surface_kept_nearly_flat():
    clouds = gaussian_filter(np.random.default_rng(0).random((400, 600, 1)), (14, 14, 0))
    said = []
    settings = examine(to_planes((0.1 + clouds).astype(np.float32)), AUTO, say=said.append)[1]
    assert "smoothing 100 (too little sky" in " ".join(said) and settings.smoothing == bgoptimizer.STIFFEST_FIT


def test_what_is_given_by_hand_wins():
    image = sloping_sky(300, 400, 1)[0]
    settings = Settings(auto=True, downscaling_factor=2, delinearization_quantile=0.9, points=20, smoothing=3.0)
    used = examine(to_planes(image), settings)[1]
    assert (used.delinearization_quantile, used.points, used.smoothing) == (0.9, 20, 3.0)
    mask = np.ones((1, 300, 400), np.float32)
    mask[:, :100] = 0
    assert not examine(to_planes(image), settings, mask)[0].used[:50].any()


@pytest.mark.parametrize("auto", [False, True])
def test_a_corner_without_sky_cannot_make_the_surface_run_away(auto):
    image, sky = sloping_sky(300, 400, 1)
    image[:150, 250:] = 0
    model = optimize(image, Settings(auto=auto, downscaling_factor=2, order=3, smoothing=0.0, epochs=100)).model
    low, high = sky[image > 0].min(), sky[image > 0].max()
    reach = bgoptimizer.HELD_BACK * 2 * (high - low)  # held back in stretched units, where the bright side is denser
    assert low - reach < model.min() and model.max() < high + reach


def test_a_plain_run_chooses_less_smoothing_where_the_sky_bends_more():
    chosen = [examine(to_planes(make_scene(family, 1, 400, 600, 1).image), Settings(downscaling_factor=4))[1].smoothing
              for family in ("airglow", "flat")]
    assert chosen[0] < chosen[1]


def test_pictures_too_small_for_choices_are_fitted_as_they_are():
    said = []
    result = optimize(sloping_sky(40, 60, 3)[0], Settings(auto=True, epochs=10), say=said.append)
    assert "too small" in " ".join(said) and result.prepared.expected is None


def test_a_picture_with_nothing_left_in_but_its_rim_is_still_fitted():
    image = sloping_sky(300, 400, 1)[0]
    image[8:-8, 8:-8] *= 0.5
    framed = np.zeros_like(image)  # cells beside missing ones do not count
    framed[4:-4, 4:-4] = image[4:-4, 4:-4]
    settings = Settings(auto=True, downscaling_factor=4, threshold_min=0.9, epochs=5)
    assert np.isfinite(optimize(framed, settings).model).all()


def test_the_smoothing_told_is_the_one_used():
    result = optimize(make_scene("flat", 1, 400, 600, 1).image, Settings(auto=True, downscaling_factor=4, epochs=2))
    assert result.settings.smoothing == result.fit.smoothing <= bgoptimizer.STIFFEST_FIT
