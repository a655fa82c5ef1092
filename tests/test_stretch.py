"""What all stages share: settings and quantiles.

And the stretch: it shows the sky, and can be taken back exactly.
"""
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import bgoptimizer
from bgoptimizer import BgError, Settings, Stretch, _quantiles, measure_stretches, prepare
from scenes import sloping_sky, to_planes


# ---------------------------------------------------------------------------- what all stages share

@pytest.mark.parametrize("field, value, flag", [
    ("downscaling_factor", 0, "-dx"),
    ("downscaling_factor", 2.5, "-dx"),
    ("downscaling_func", "max", "-df"),
    ("delinearization_quantile", 0, "-dq"),
    ("delinearization_quantile", 1.1, "-dq"),
    ("delinearization_quantile", float("nan"), "-dq"),
    ("threshold_min", 1.0, "-tM"),
    ("initializer", "sobol", "-i"),
    ("points", 2, "-N"),
    ("points", 30.0, "-N"),
    ("order", 5, "-O"),
    ("epochs", 0, "-e"),
    ("alpha", -1, "-a"),
    ("batch", 0, "-B"),
    ("learning_rate", 0, "-lr"),
    ("smoothing", -1, "--smoothing"),
    ("seed", -1, "--seed"),
    ("alpha", "5", "-a"),
    ("threshold_min", None, "-tm"),
    ("threshold_max", None, "-tM"),
    ("learning_rate", None, "-lr"),
    ("smoothing", "1", "--smoothing"),
    ("delinearization_quantile", "0.9", "-dq"),
    ("epochs", None, "-e"),
    ("seed", "0", "--seed"),
    ("order", "2", "-O"),
])
def test_settings_out_of_range_or_of_a_wrong_type_are_refused(field, value, flag):
    with pytest.raises(ValueError, match=f"^{flag} must be "):
        Settings(**{field: value})


SAMPLES = {
    "random": np.random.default_rng(5).normal(size=50_001),
    "two values": np.arange(999.0) % 2,
    "one value sticks out": np.append(np.zeros(49_999), 9.0),
    "one value": np.ones(1),
}


@pytest.mark.parametrize("case", list(SAMPLES))
def test_quantiles_are_exact(case):
    values = SAMPLES[case]
    wanted = (0, 0.3, 0.5, 0.95, 0.999, 1)
    last = values.size - 1
    ranks = [int(quantile * last) for quantile in wanted]
    expected = np.sort(values)[ranks]
    everywhere = np.ones((1, values.size), bool)
    found = _quantiles(values[None], everywhere, wanted)
    assert_array_equal(found, expected)


def test_quantiles_of_very_many_samples_are_near_and_never_of_none(monkeypatch):
    monkeypatch.setattr(bgoptimizer, "QUANTILE_SAMPLES", 10_000)
    plane = np.random.default_rng(5).normal(size=(300, 400))
    everywhere = np.ones_like(plane, bool)
    wanted = (0.5, 0.95)
    found = _quantiles(plane, everywhere, wanted)
    assert_allclose(found, np.quantile(plane, wanted), atol=0.03)
    numbers = np.arange(plane.size).reshape(plane.shape)
    one = numbers == 12_346
    assert _quantiles(plane, one, (0.5,)) == plane[one]


# ------------------------------------------------------------------------------------ stretch

def stretch_of(image):
    """Measure the stretch of an image (h, w, c)."""
    stretches, _ = measure_stretches(to_planes(image), [0.95])
    return stretches[0.95]


@pytest.fixture(scope="module")
def stretch():
    image, _ = sloping_sky()
    return stretch_of(image)


def test_minimum_goes_to_0_median_to_a_quarter_and_the_quantile_to_1(stretch):
    image, _ = sloping_sky()
    values = np.sort(image.reshape(-1, 3), axis=0)
    last = len(values) - 1
    ranks = [0, last // 2, int(0.95 * last), -1]
    stretched = stretch.apply(values[ranks])  # (4, 3)
    assert_allclose(stretched.T, [[0, 0.25, 1, 1]] * 3, atol=1e-6)


@pytest.mark.parametrize("midtones", [1e-4, 0.02, 0.25, 0.5, 0.9999])
def test_inverse_takes_every_stretched_value_back(midtones):
    stretch = Stretch(np.array([0.01]), np.array([0.2]), np.array([midtones]))
    linear = np.linspace(0.01, 0.21, 1001)[:, None]
    there_and_back = stretch.invert(stretch.apply(linear))
    assert_allclose(there_and_back, linear, atol=1e-6)
    stretched = np.linspace(0, 1, 1001)[:, None]
    back_and_there = stretch.apply(stretch.invert(stretched))
    assert_allclose(back_and_there, stretched, atol=1e-6)


@pytest.mark.parametrize("midtones", [0.01, 0.24, 0.5])
def test_inverse_goes_on_straight_beyond_0_and_1(midtones):
    stretch = Stretch(np.zeros(1), np.ones(1), np.array([midtones]))

    def invert(values):
        column = np.reshape(values, (-1, 1))
        return stretch.invert(column)[:, 0]

    x = invert(np.linspace(-5, 6, 11001))  # the formula's pole would lie at (1 - m) / (1 - 4 m)
    assert np.isfinite(x).all()
    assert (np.diff(x) > 0).all()
    step = 1e-6
    at_0, after_0, before_1, at_1 = invert([0, step, 1 - step, 1])
    slope_at_0 = (after_0 - at_0) / step
    slope_at_1 = (at_1 - before_1) / step
    below, above = invert([-2.0, 3.0])
    assert_allclose(below, -2 * slope_at_0, rtol=1e-3)
    assert_allclose(above, 1 + 2 * slope_at_1, rtol=1e-3)


@pytest.mark.parametrize("missing", [0.0, np.nan, np.inf, -np.inf])
def test_missing_samples_have_no_say_in_the_stretch(stretch, missing):
    image, _ = sloping_sky()
    height, width, _ = image.shape
    framed = np.full((height + 30, width + 17, 3), missing, np.float32)
    framed[20:-10, :-17] = image
    stretches, median = measure_stretches(to_planes(framed), [0.95])
    for name in ("pedestal", "scale", "midtones"):
        assert_array_equal(getattr(stretches[0.95], name), getattr(stretch, name))
    assert_allclose(median, np.median(image, (0, 1)), rtol=1e-3)


def test_each_channel_is_stretched_on_its_own(stretch):
    image, _ = sloping_sky()
    for k in range(3):
        channel = image[..., k:k + 1]
        alone = stretch_of(channel)
        assert alone.scale[0] == stretch.scale[k]
        assert alone.midtones[0] == stretch.midtones[k]


@pytest.mark.parametrize("value, sentence", [
    (0.0, "channel G holds no data"),
    (np.nan, "channel G holds no data"),
    (0.3, "channel G has the same value everywhere"),
])
def test_a_dead_channel_is_named(value, sentence):
    image, _ = sloping_sky()
    image[..., 1] = value
    with pytest.raises(BgError, match=sentence):
        prepare(to_planes(image), Settings().resolved())


def test_a_picture_with_its_median_at_the_end_can_still_be_stretched():
    image, _ = sloping_sky(channels=1)
    image[:60] = image.min()
    stretch = stretch_of(image)
    there_and_back = stretch.invert(stretch.apply(image))
    assert np.isfinite(there_and_back).all()
