"""The sky is found: under --auto the fit starts from it and objects are left out; what cannot be known is said."""
import logging
from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

import bgoptimizer
from bgoptimizer import Settings, examine, frame_coordinates, optimize
from scenes import make_scene, score, sloping_sky, to_planes

AUTO = Settings(auto=True, initializer="grid", downscaling_factor=4)


def find(scene, settings=AUTO):
    """What was found out about the sky of a scene."""
    return examine(to_planes(scene.image), settings)[0]


def found_sky(scene):
    """The sky that is found, at full size, and what the fit sees."""
    prepared = find(scene)
    return prepared.sky.surface(frame_coordinates(*scene.image.shape[:2])), prepared


@pytest.mark.parametrize("family, seed, channels, bound", [
    ("galaxy", 1, 1, 1.5), ("nebula", 1, 1, 1.5), ("city_glows", 0, 3, 1.5), ("airglow", 1, 1, 1.5),
    ("moon", 1, 1, 1), ("stars", 1, 1, 1.5), ("hills", 1, 1, 8), ("dust", 1, 1, 5),
    ("cluster", 1, 1, 1), ("large_galaxy", 1, 1, 4), ("clipped", 3, 1, 6), ("milky_way", 0, 1, 7),
    ("vignetting", 0, 1, 1.5), ("narrowband", 3, 1, 3), ("pedestal", 0, 1, 1.5), ("plane_galaxy", 1, 1, 1.5),
    *(pytest.param(*once_more, marks=pytest.mark.slow)
      for once_more in (("galaxy", 2, 3, 1.5), ("nebula", 2, 3, 1.5), ("airglow", 3, 3, 1.5),
                        ("mosaic", 1, 3, 5), ("amp_glow", 3, 1, 5), ("edge_nebula", 3, 1, 3)))])
def test_the_sky_is_found_behind(family, seed, channels, bound):
    scene = make_scene(family, seed, 400, 600, channels)
    assert score(found_sky(scene)[0], scene)[0] < bound  # percent of the sky's range


def test_a_smooth_nebula_drowned_in_noise_is_an_object_and_no_sky():
    scene = make_scene("short_stack", 3, 900, 600, 1)
    sky, prepared = found_sky(scene)
    assert score(sky, scene)[0] < 5
    peak = np.unravel_index(scene.light[..., 0].argmax(), scene.image.shape[:2])
    assert prepared.sky.below[tuple(np.array(peak) // (4 * prepared.sky.size))]


def test_light_that_fades_from_an_edge_is_sky():
    y, x = (np.indices((400, 600)) + 0.5) / 600
    glow = 0.05 + 0.05 * np.exp(-((y - 0.3)**2 + (x + 0.1)**2) / 0.3**2 / 2)
    noisy = glow + np.random.default_rng(0).normal(0, 0.002, glow.shape)
    sky = examine(to_planes(noisy[..., None].astype(np.float32)), AUTO)[0].sky
    assert sky.share > 0.9 and not sky.unsure


def test_vignetting_has_a_top_inside_the_frame_and_is_sky():
    y, x = (np.indices((400, 600)) + 0.5) / 600
    vignetting = 0.05 * (1 - 0.6 * ((y - 0.33)**2 + (x - 0.5)**2))
    noisy = vignetting + np.random.default_rng(0).normal(0, 0.0005, vignetting.shape)
    sky = examine(to_planes(noisy[..., None].astype(np.float32)), AUTO)[0].sky
    assert sky.share > 0.95 and not sky.unsure


@pytest.mark.slow
def test_the_fit_keeps_what_was_found():
    scene = make_scene("galaxy", 0, 600, 400, 3, border=True)
    result = optimize(scene.image, AUTO)
    assert score(result.model, scene)[0] < 1.5
    red = result.prepared.linear[..., 0]
    assert not result.prepared.used[red > np.nanpercentile(red, 99.5)].any()


@pytest.mark.slow
@pytest.mark.parametrize("family, channels", [("moon", 1), ("nebula", 3)])
def test_random_and_grid_starts_and_two_seeds_agree(family, channels):
    scene = make_scene(family, 1, 400, 600, channels)
    variants = ({}, {"initializer": "random"}, {"initializer": "random", "seed": 1})
    first, *others = (optimize(scene.image, bgoptimizer.replace(AUTO, **variant)).model for variant in variants)
    span = np.ptp(np.percentile(scene.sky[scene.valid], (99, 1), axis=0), axis=0)
    for other in others:
        difference = ((other - first) / span)[scene.valid]
        assert (difference - np.median(difference, axis=0)).std() < 0.005


def test_the_halo_of_a_bright_star_is_left_out_and_the_sky_around_it_is_not():
    image, _ = sloping_sky(600, 900, 1)
    y, x = np.indices(image.shape[:2])
    distance = np.hypot(y - 300, x - 450)
    image += (0.02 * np.exp(-distance / 25) + 0.6 * np.exp(-(distance / 5)**2)).astype(np.float32)[..., None]
    used = np.kron(examine(to_planes(np.clip(image, 0, 1)), AUTO)[0].used, np.ones((4, 4), bool))
    assert used[distance < 60].mean() < 0.05 and used[distance > 250].mean() > 0.7


def test_a_flat_sky_is_left_alone():
    scene = make_scene("flat", 1, 400, 600, 1)
    assert score(found_sky(scene)[0], scene)[0] < 33  # percent of the pixel noise


def test_hills_are_masked_and_the_sky_above_them_is_not():
    scene = make_scene("hills", 1, 600, 900, 1)
    used = np.kron(found_sky(scene)[1].used, np.ones((4, 4), bool))
    hills = scene.object_mask & (gaussian_filter(scene.image, (8, 8, 0)) < 0.7 * scene.sky).all(-1)  # not the stars
    assert hills.mean() > 0.05 and used[hills].mean() < 0.1
    assert used[scene.valid & ~scene.object_mask].mean() > 0.6


def test_dark_sky_beyond_the_milky_way_is_no_hill():
    scene = make_scene("milky_way", 1, 600, 900, 1)
    looker = bgoptimizer._Looker(bgoptimizer._Surfaces(
        bgoptimizer._make_cells(bgoptimizer.prepare(to_planes(scene.image), AUTO)), (600, 900)))
    assert not looker.foreground.any()


def test_what_cannot_be_known_is_said_in_one_warning(caplog):
    clouds = gaussian_filter(np.random.default_rng(0).random((400, 600, 1)), (14, 14, 0))
    with caplog.at_level(logging.WARNING, "bgoptimizer"):
        prepared, _ = examine(to_planes((0.05 + 0.2 * clouds).astype(np.float32)), AUTO)
    assert prepared.sky.unsure
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1 and "cannot be told from objects" in warnings[0] and "-m" in warnings[0]


def test_a_good_picture_has_no_warning(caplog):
    with caplog.at_level(logging.WARNING, "bgoptimizer"):
        for family in ("galaxy", "city_glows", "stars"):
            find(make_scene(family, 1, 400, 600, 1))
    assert not caplog.records


@pytest.mark.parametrize("spoil, words", [
    (lambda image: np.clip(4 * image / (4 * image + 0.2), 0, 1), "looks stretched"),
    (lambda image: image * (1 + 0.3 * (np.indices(image.shape).sum(0) % 2)), "undebayered"),
    (lambda image: np.where(np.indices(image.shape)[1] < 400, 0, image), "missing")])
def test_a_picture_that_is_not_one_to_run_it_on_is_warned_about(spoil, words, caplog):
    image = sloping_sky(400, 600, 1)[0]
    image[::7, ::9] = 0.9  # stars
    with caplog.at_level(logging.WARNING, "bgoptimizer"):
        examine(to_planes(spoil(image).astype(np.float32)), AUTO)
    assert words in caplog.text


def test_what_is_given_by_hand_wins():
    image = sloping_sky(300, 400, 1)[0]
    settings = Settings(auto=True, downscaling_factor=2, delinearization_quantile=0.9, points=20, smoothing=3.0)
    used = examine(to_planes(image), settings)[1]
    assert (used.delinearization_quantile, used.points, used.smoothing) == (0.9, 20, 3.0)
    mask = np.ones((1, 300, 400), np.float32)
    mask[:, :100] = 0
    assert not examine(to_planes(image), settings, mask)[0].used[:50].any()


def test_the_largest_smoothing_is_a_plane_with_and_without_auto():
    image, _ = sloping_sky(300, 400, 1)
    for auto in (False, True):
        settings = Settings(auto=auto, downscaling_factor=2, smoothing=1e4, initializer="grid")
        model = optimize(image, settings).model[..., 0]
        y, x = np.indices(model.shape)
        terms = np.stack([np.ones_like(y), y, x], -1).reshape(-1, 3)
        plane = terms @ np.linalg.lstsq(terms, model.ravel(), rcond=None)[0]
        assert np.abs(plane - model.ravel()).max() < 0.03 * np.ptp(model)


@pytest.mark.parametrize("auto", [False, True])
def test_a_corner_without_sky_cannot_make_the_surface_run_away(auto):
    image, sky = sloping_sky(300, 400, 1)
    image[:150, 250:] = 0
    model = optimize(image, Settings(auto=auto, downscaling_factor=2, order=3, smoothing=0.0, epochs=100)).model
    low, high = sky[image > 0].min(), sky[image > 0].max()
    reach = 1.5 * bgoptimizer.MAX_EXTRAPOLATION * (high - low)
    assert low - reach < model.min() and model.max() < high + reach


def test_a_plain_run_chooses_less_smoothing_where_the_sky_bends_more():
    chosen = [examine(to_planes(make_scene(family, 1, 400, 600, 1).image), Settings(downscaling_factor=4))[1].smoothing
              for family in ("airglow", "flat")]
    assert chosen[0] < chosen[1]


def test_a_plain_run_is_stiffer_than_the_sky_where_objects_are():
    scene = make_scene("nebula", 1, 400, 600, 1)
    plain, auto = (find(scene, bgoptimizer.replace(AUTO, auto=auto)).sky.smoothing for auto in (False, True))
    assert plain > 2 * auto


def test_pictures_too_small_for_choices_are_fitted_as_they_are(caplog):
    caplog.set_level(logging.INFO, "bgoptimizer")
    result = optimize(sloping_sky(40, 60, 3)[0], Settings(auto=True, epochs=10))
    assert "too small" in caplog.text and result.prepared.sky is None


def test_a_picture_with_nothing_left_in_but_its_rim_is_still_fitted():
    image = sloping_sky(300, 400, 1)[0]
    image[8:-8, 8:-8] *= 0.5
    framed = np.zeros_like(image)  # cells beside missing ones do not count
    framed[4:-4, 4:-4] = image[4:-4, 4:-4]
    settings = Settings(auto=True, downscaling_factor=4, threshold_min=0.9, epochs=5)
    assert np.isfinite(optimize(framed, settings).model).all()


def test_the_smoothing_told_is_the_one_used():
    result = optimize(make_scene("flat", 1, 400, 600, 1).image, Settings(auto=True, downscaling_factor=4, epochs=2))
    assert result.settings.smoothing == result.fit.smoothing == result.prepared.sky.smoothing


def test_panels_that_do_not_match_are_told():
    assert "panels of a mosaic" in find(make_scene("mosaic", 4, 400, 600)).sky.unsure
    assert "panels" not in find(make_scene("galaxy", 1, 400, 600)).sky.unsure


def test_an_amplifier_glow_is_sky_and_the_fit_keeps_it():
    scene = make_scene("amp_glow", 0, 400, 600, 1)
    found, prepared = found_sky(scene)
    assert len(prepared.sky.glow(np.zeros((1, 2)))) == 1
    model = optimize(scene.image, replace(AUTO, epochs=60)).model
    assert score(found, scene)[0] < 2
    assert score(model, scene)[0] < 2
