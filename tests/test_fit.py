"""From a picture to its sky: the fit finds it, and taking it out spoils nothing else."""
import numpy as np
import pytest
import scenes
from conftest import sloping_sky, to_planes

import bgoptimizer
from bgoptimizer import LOSS_TERMS, BgError, Settings, import_tensorflow, optimize, prepare, sky_sample

# Given by hand, so that what the tool would choose has no part in these tests.
QUICK = Settings(downscaling_factor=4, initializer="grid", smoothing=0.1, delinearization_quantile=0.999)


def quick(**changes):
    return bgoptimizer.replace(QUICK, **changes)


def error_in_percent(model, sky, valid=None):
    """Largest rms over the channels of model - sky, less its median, in percent of the sky's range."""
    valid = np.ones(sky.shape[:2], bool) if valid is None else valid
    errors = []
    for k in range(sky.shape[-1]):
        error = (model - sky)[..., k][valid]
        errors.append(np.sqrt(np.mean((error - np.median(error))**2)) / np.ptp(sky[..., k]) * 100)
    return max(errors)


@pytest.fixture(scope="module")
def run():
    image, sky = sloping_sky()
    return image, sky, optimize(image, QUICK)


@pytest.mark.parametrize("shape", [(96, 144), (149, 101)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_sky_is_found(shape, channels):
    image, sky = sloping_sky(*shape, channels)
    assert error_in_percent(optimize(image, QUICK).model, sky) < 3


@pytest.mark.parametrize("family", ["city_glows", "stars"])
def test_the_sky_is_found_behind_a_field_of_stars(family):
    scene = scenes.make_scene(family, 1, 240, 360, 3, border=True)
    assert scenes.score(optimize(scene.image, QUICK).model, scene)[0] < 3


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("initializer", ["random", "grid"])
def test_every_order_and_start_finds_it(order, initializer):
    image, sky = sloping_sky()
    result = optimize(image, quick(order=order, initializer=initializer, points=16))
    assert error_in_percent(result.model, sky) < 5


def test_a_nebula_under_a_mask_is_not_subtracted():
    image, sky = sloping_sky(128, 192)
    y, x = np.indices(image.shape[:2])
    nebula = 0.05 * np.exp(-((y - 60)**2 + (x - 100)**2) / 400)[..., None]
    mask = (nebula[..., 0] < 0.0002).astype(float)
    result = optimize((image + nebula).astype(np.float32), QUICK, mask)
    left = result.subtracted - (image - sky)  # the nebula and a constant
    brightness = left[55:65, 95:105].mean((0, 1)) - np.median(left[mask == 1], 0)
    np.testing.assert_allclose(brightness, nebula[55:65, 95:105].mean(), rtol=0.1)


def test_black_border_does_not_shift_the_color(run):
    image, _, bare = run
    framed = np.zeros((120, 180, 3), np.float32)
    framed[10:106, 20:164] = image
    result = optimize(framed, QUICK)
    np.testing.assert_allclose(np.median(result.subtracted[10:106, 20:164], (0, 1)), np.median(image, (0, 1)), rtol=1e-3)
    shift = np.median(result.subtracted[10:106, 20:164] - bare.subtracted, (0, 1))
    assert np.abs(shift).max() < 0.001 * image.mean()


def test_one_bad_pixel_does_not_shift_the_color(run):
    image, _, bare = run
    spoiled = image.copy()
    spoiled[50, 50] = 1e-30, 1.0, 1e-30
    shift = np.median(optimize(spoiled, QUICK).subtracted - bare.subtracted, (0, 1))
    assert np.abs(shift).max() < 0.001 * image.mean()


def test_medians_stay(run):
    image, _, result = run
    np.testing.assert_allclose(np.median(result.subtracted, (0, 1)), np.median(image, (0, 1)), rtol=1e-3)


def test_model_plus_subtracted_is_the_picture_and_a_constant(run):
    image, _, result = run
    constant = result.model + result.subtracted - image
    inside = (result.subtracted > 0) & (result.subtracted < 1)
    for k in range(3):
        assert np.abs(constant[..., k][inside[..., k]] - result.offsets[k]).max() < 2e-5


@pytest.mark.parametrize("missing", [0.0, np.nan, np.inf])
def test_missing_samples_come_out_as_they_went_in(missing):
    image, sky = sloping_sky()
    image[:10] = missing
    image[40, 60, 1] = missing
    result = optimize(image, quick(epochs=20))
    np.testing.assert_array_equal(result.subtracted[:10], image[:10])
    np.testing.assert_array_equal(result.subtracted[40, 60, 1], image[40, 60, 1])
    assert np.isfinite(result.model).all() and (result.subtracted[20:, :, 0] > 0).any()


def test_the_same_seed_gives_the_same_pictures_and_another_does_not(run):
    image = run[0]
    settings = quick(initializer="random", epochs=150)
    first, second, other = (optimize(image, bgoptimizer.replace(settings, seed=seed)) for seed in (4, 4, 5))
    np.testing.assert_array_equal(first.model, second.model)
    np.testing.assert_array_equal(first.subtracted, second.subtracted)
    assert (first.model != other.model).any()


def test_the_picture_given_is_not_changed_and_float64_stays():
    image = sloping_sky()[0].astype(np.float64)
    before = image.copy()
    result = optimize(image, quick(epochs=5))
    np.testing.assert_array_equal(image, before)
    assert result.model.dtype == result.subtracted.dtype == np.float64
    assert optimize(image.astype(np.float32), quick(epochs=5)).model.dtype == np.float32


def test_gray_pictures_may_have_two_dimensions_and_integers_count_over_their_range():
    image = sloping_sky(channels=1)[0]
    flat = optimize(np.round(image[..., 0] * 65535).astype(np.uint16), quick(epochs=5))
    deep = optimize(np.round(image * 65535) / np.float32(65535), quick(epochs=5))
    assert flat.model.shape == (96, 144, 1)
    np.testing.assert_allclose(flat.model, deep.model, atol=1e-6)


@pytest.mark.parametrize("image", [np.ones((5, 5, 2)), np.ones(7), np.ones((4, 4, 3, 1)), np.array([["a"]]), np.ones((0, 4))])
def test_arrays_that_are_no_pictures_are_refused(image):
    with pytest.raises(BgError, match="give"):
        optimize(image, QUICK)


def test_the_loss_falls_and_the_best_surface_is_kept(run):
    result = run[2]
    history = result.history
    assert list(history) == ["loss"] + list(LOSS_TERMS)
    assert history["loss"][-1] < history["loss"][0] - 1
    assert 1 <= len(history["loss"]) <= 1000
    again = optimize(run[0], quick(epochs=len(history["loss"]) // 2))
    assert again.history["loss"].min() >= history["loss"].min()


def test_the_fit_stops_when_nothing_improves():
    image = sloping_sky(64, 64, 1, noise=0)[0]
    result = optimize(image, quick(learning_rate=1e-9, epochs=400))  # too slow to improve by what counts
    assert len(result.history["loss"]) < 110 and "no improvement" in result.fit.stopped


def test_epochs_are_counted_and_told(run):
    told = []
    result = optimize(run[0], quick(epochs=25), on_epoch=lambda epoch, loss: told.append((epoch, loss)))
    assert [epoch for epoch, _ in told] == list(range(1, 26))
    np.testing.assert_array_equal([loss for _, loss in told], result.history["loss"])
    assert [epoch for epoch, _, _ in result.fit.track] == [0, 10, 20]


def test_each_loss_term_sees_its_own_fault():
    tf = import_tensorflow()
    r = tf.constant([[0.1, 0.1, 0.1], [0.3, 0.0, -0.3], [-0.2, -0.2, -0.2]])
    np.testing.assert_allclose(bgoptimizer.loss_error(tf, r), [0.1, 0.2, 0.2], atol=1e-7)
    np.testing.assert_allclose(bgoptimizer.loss_color(tf, r), [0, 0.06, 0], atol=1e-7)
    np.testing.assert_allclose(bgoptimizer.loss_overshoot(tf, r), [0, 0.2, 0.4], atol=1e-7)
    np.testing.assert_allclose(bgoptimizer.loss_negative(tf, r), [0, 0.2, 0.4], atol=1e-7)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_fit_sees_pixels_from_everywhere_but_none_that_is_masked(batch):
    image = sloping_sky(400, 600, 1)[0]
    image[:100] = 0
    settings = Settings(downscaling_factor=2, batch=batch)
    prepared = prepare(to_planes(image), settings)
    query, seen, weight = sky_sample(prepared, settings)
    assert len(query) == len(seen) == bgoptimizer.SAMPLE_PIXELS * batch and weight.min() > 0 and len(set(map(tuple, query))) == len(query)
    counts = np.histogram2d(*query.T, (6, 8), ((100 / 600, 400 / 600), (0, 1)))[0]
    assert counts.min() > 0.7 * counts.mean()


def test_a_small_picture_is_seen_whole():
    prepared = prepare(to_planes(sloping_sky()[0]), QUICK)
    np.testing.assert_array_equal(sky_sample(prepared, QUICK)[1], prepared.image[prepared.used])


@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (5, 5), (8, 700), (2, 2)])
def test_odd_pictures_give_a_picture_or_a_sentence(shape):
    image = np.random.default_rng(0).uniform(0.1, 0.2, shape + (1,)).astype(np.float32)
    try:
        result = optimize(image, Settings(epochs=20))
    except BgError as error:
        assert ";" in str(error)  # what is wrong; what to do
    else:
        assert np.isfinite(result.model).all() and np.isfinite(result.subtracted).all()


@pytest.mark.parametrize("field, value, flag", [
    ("downscaling_factor", 0, "-dx"), ("delinearization_quantile", 0, "-dq"), ("delinearization_quantile", 1.1, "-dq"),
    ("delinearization_quantile", float("nan"), "-dq"), ("threshold_min", 1.0, "-tM"), ("points", 2, "-N"), ("order", 5, "-O"),
    ("epochs", 0, "-e"), ("alpha", -1, "-a"), ("batch", 0, "-B"), ("learning_rate", 0, "-lr"), ("smoothing", -1, "--smoothing"),
    ("downscaling_factor", 2.5, "-dx"), ("points", 30.0, "-N"), ("seed", -1, "--seed"), ("downscaling_func", "max", "-df"), ("initializer", "sobol", "-i")])
def test_settings_out_of_range_are_refused(field, value, flag):
    with pytest.raises(ValueError, match=f"^{flag} must be "):
        Settings(**{field: value})
