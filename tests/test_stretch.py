"""What all stages share: settings and quantiles. And the stretch: it shows the sky, and can be taken back exactly."""
import numpy as np
import pytest

import bgoptimizer
from bgoptimizer import BgError, Settings, Stretch, _quantiles, measure_stretch, prepare
from scenes import sloping_sky, to_planes


# ------------------------------------------------------------------------------------------------ what all stages share

@pytest.mark.parametrize("field, value, flag", [
    ("downscaling_factor", 0, "-dx"), ("downscaling_factor", 2.5, "-dx"), ("downscaling_func", "max", "-df"),
    ("delinearization_quantile", 0, "-dq"), ("delinearization_quantile", 1.1, "-dq"),
    ("delinearization_quantile", float("nan"), "-dq"), ("threshold_min", 1.0, "-tM"), ("initializer", "sobol", "-i"),
    ("points", 2, "-N"), ("points", 30.0, "-N"), ("order", 5, "-O"), ("epochs", 0, "-e"), ("alpha", -1, "-a"),
    ("batch", 0, "-B"), ("learning_rate", 0, "-lr"), ("smoothing", -1, "--smoothing"), ("seed", -1, "--seed")])
def test_settings_out_of_range_are_refused(field, value, flag):
    with pytest.raises(ValueError, match=f"^{flag} must be "):
        Settings(**{field: value})


@pytest.mark.parametrize("case", ["random", "two values", "one value sticks out", "one value"])
def test_quantiles_are_exact(case):
    values = {"random": np.random.default_rng(5).normal(size=50_001), "two values": np.arange(999.0) % 2,
              "one value sticks out": np.append(np.zeros(49_999), 9.0), "one value": np.ones(1)}[case]
    wanted = (0, 0.3, 0.5, 0.95, 0.999, 1)
    expected = np.sort(values)[[int(q * (values.size - 1)) for q in wanted]]
    np.testing.assert_array_equal(_quantiles(values[None], np.ones((1, values.size), bool), wanted), expected)


def test_quantiles_of_very_many_samples_are_near_and_never_of_none(monkeypatch):
    monkeypatch.setattr(bgoptimizer, "QUANTILE_SAMPLES", 10_000)
    plane = np.random.default_rng(5).normal(size=(300, 400))
    found = _quantiles(plane, np.ones_like(plane, bool), (0.5, 0.95))
    np.testing.assert_allclose(found, np.quantile(plane, (0.5, 0.95)), atol=0.03)
    one = np.arange(plane.size).reshape(plane.shape) == 12_346
    assert _quantiles(plane, one, (0.5,)) == plane[one]


# ------------------------------------------------------------------------------------------------ stretch

@pytest.fixture(scope="module")
def stretch():
    return measure_stretch(to_planes(sloping_sky()[0]), 0.95)[0]


def test_minimum_goes_to_0_median_to_a_quarter_and_the_quantile_to_1(stretch):
    image = sloping_sky()[0]
    for k in range(3):
        values = np.sort(image[..., k].ravel())
        landmarks = values[[0, (values.size - 1) // 2, int(0.95 * (values.size - 1)), -1]]
        np.testing.assert_allclose(stretch.channel(k).apply(landmarks[:, None])[:, 0], [0, 0.25, 1, 1], atol=1e-6)


@pytest.mark.parametrize("midtones", [1e-4, 0.02, 0.25, 0.5, 0.9999])
def test_inverse_takes_every_stretched_value_back(midtones):
    stretch = Stretch(np.array([0.01]), np.array([0.2]), np.array([midtones]))
    linear = np.linspace(0.01, 0.21, 1001)[:, None]
    np.testing.assert_allclose(stretch.invert(stretch.apply(linear)), linear, atol=1e-6)
    stretched = np.linspace(0, 1, 1001)[:, None]
    np.testing.assert_allclose(stretch.apply(stretch.invert(stretched)), stretched, atol=1e-6)


@pytest.mark.parametrize("midtones", [0.01, 0.24, 0.5])
def test_inverse_goes_on_straight_beyond_0_and_1(midtones):
    stretch = Stretch(np.zeros(1), np.ones(1), np.array([midtones]))
    y = np.linspace(-5, 6, 11001)[:, None]  # the formula's pole would lie at (1 - m) / (1 - 4 m)
    x = stretch.invert(y)
    assert np.isfinite(x).all() and (np.diff(x[:, 0]) > 0).all()
    inside_slopes = np.diff(stretch.invert(np.array([[0], [1e-6], [1 - 1e-6], [1]]))[:, 0])[[0, 2]] / 1e-6
    np.testing.assert_allclose(stretch.invert(np.array([[-2.0]]))[0, 0], -2 * inside_slopes[0], rtol=1e-3)
    np.testing.assert_allclose(stretch.invert(np.array([[3.0]]))[0, 0], 1 + 2 * inside_slopes[1], rtol=1e-3)


@pytest.mark.parametrize("missing", [0.0, np.nan, np.inf, -np.inf])
def test_missing_samples_have_no_say_in_the_stretch(stretch, missing):
    image = sloping_sky()[0]
    framed = np.full((image.shape[0] + 30, image.shape[1] + 17, 3), missing, np.float32)
    framed[20:-10, :-17] = image
    again, median = measure_stretch(to_planes(framed), 0.95)
    for name in ("pedestal", "scale", "midtones"):
        np.testing.assert_array_equal(getattr(again, name), getattr(stretch, name))
    np.testing.assert_allclose(median, np.median(image, (0, 1)), rtol=1e-3)


def test_each_channel_is_stretched_on_its_own(stretch):
    for k in range(3):
        alone = measure_stretch(to_planes(sloping_sky()[0][..., k:k + 1]), 0.95)[0]
        assert alone.scale[0] == stretch.scale[k] and alone.midtones[0] == stretch.midtones[k]


@pytest.mark.parametrize("value, sentence", [(0.0, "channel G holds no data"), (np.nan, "channel G holds no data"),
                                             (0.3, "channel G has the same value everywhere")])
def test_a_dead_channel_is_named(value, sentence):
    image = sloping_sky()[0]
    image[..., 1] = value
    with pytest.raises(BgError, match=sentence):
        prepare(to_planes(image), Settings())


def test_a_picture_with_its_median_at_the_end_can_still_be_stretched():
    image = sloping_sky(channels=1)[0]
    image[:60] = image.min()
    stretch = measure_stretch(to_planes(image), 0.95)[0]
    assert np.isfinite(stretch.invert(stretch.apply(image))).all()
