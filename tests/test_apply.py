"""The sky at full size, and the picture without it: nothing is shifted, nothing else is spoiled."""
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bgoptimizer import (
    BgError,
    Settings,
    SkyModel,
    _to_planes,
    frame_coordinates,
    keep_dark_samples,
    optimize,
    prepare,
    spline_surface,
)
from runner import QUICK, quick
from scenes import sloping_sky


def medians(image):
    """Return the median of every channel of an image (h, w, c)."""
    return np.median(image, (0, 1))


# ------------------------------------------------------------------------------------ the surface

@pytest.mark.parametrize("shape, factor", [
    ((96, 144), 8),
    ((145, 97), 8),
    ((101, 203), 5),
    ((64, 65), 1),
])
def test_a_plane_seen_reduced_comes_back_at_full_size_unshifted(shape, factor):
    frame = frame_coordinates(*shape)
    plane = frame @ [0.3, 0.5] + 0.1
    settings = Settings(downscaling_factor=factor).resolved()
    prepared = prepare(plane[None], settings)
    places = prepared.centers.reshape(-1, 2)
    seen = prepared.linear.reshape(-1, 1)
    chosen = np.random.default_rng(11).choice(len(seen), 30, replace=False)
    positions = places[chosen]
    values = seen[chosen]

    def surface(query):
        return spline_surface(query, positions, values, 2, 0.1)

    sky = SkyModel(surface, shape, np.float64)
    error = np.abs(sky.plane(0) - plane)
    assert error.max() < 1e-4 * np.ptp(plane)


@pytest.mark.parametrize("shape", [
    (1200, 1700),
    (2100, 900),
    (300, 301),
    (8, 4000),
    (1, 1),
    (1, 50),
])
def test_strips_are_the_whole_and_the_whole_is_the_spline(shape):
    rng = np.random.default_rng(11)
    longer = max(shape)
    positions = rng.random((20, 2)) * np.array(shape) / longer
    values = 0.3 + 0.2 * rng.random((20, 3))

    def surface(query):
        return spline_surface(query, positions, values, 2, 0.01)

    sky = SkyModel(surface, shape, np.float64)
    planes = [sky.plane(k) for k in range(3)]
    height, _ = shape
    for k in range(3):
        strips = [sky.strip(k, slice(top, min(top + 37, height))) for top in range(0, height, 37)]
        assert_array_equal(np.concatenate(strips), planes[k])
    step = max(1, longer // 200)
    few = slice(None, None, step)
    places = frame_coordinates(*shape)[few, few]
    exact = np.clip(surface(places), 0, 1)
    whole = np.stack(planes, -1)[few, few]
    assert np.abs(whole - exact).max() < 2e-5


# ------------------------------------------------------------------------------ without the sky

@pytest.mark.slow
def test_a_nebula_under_a_mask_is_not_subtracted():
    image, sky = sloping_sky(128, 192)
    y, x = np.indices((128, 192))
    squared_distance = (y - 60)**2 + (x - 100)**2
    nebula = 0.05 * np.exp(-squared_distance / 400)
    mask = (nebula < 0.0002).astype(float)
    lit = image + nebula[..., None]
    result = optimize(lit.astype(np.float32), QUICK, mask)
    left = result.subtracted - (image - sky)  # the nebula and a constant
    constant = np.median(left[mask == 1], 0)
    core = slice(55, 65), slice(95, 105)
    brightness = left[core].mean((0, 1)) - constant
    assert_allclose(brightness, nebula[core].mean(), rtol=0.1)


def test_black_border_does_not_shift_the_color(fitted):
    image, _, _ = fitted
    settings = quick(auto=True)  # two plain fits differ by more, from other control points
    bare = optimize(image, settings)
    framed = np.zeros((120, 180, 3), np.float32)
    inside = slice(10, 106), slice(20, 164)
    framed[inside] = image
    subtracted = optimize(framed, settings).subtracted[inside]
    assert_allclose(medians(subtracted), medians(image), rtol=1e-3)
    shift = medians(subtracted - bare.subtracted)
    assert np.abs(shift).max() < 0.0002 * image.mean()


def test_one_bad_pixel_does_not_shift_the_color(fitted):
    image, _, bare = fitted
    spoiled = image.copy()
    spoiled[50, 50] = 1e-30, 1.0, 1e-30
    result = optimize(spoiled, QUICK)
    shift = medians(result.subtracted - bare.subtracted)
    assert np.abs(shift).max() < 0.001 * image.mean()


def test_medians_stay(fitted):
    image, _, result = fitted
    assert_allclose(medians(result.subtracted), medians(image), rtol=1e-3)


def test_model_plus_subtracted_is_the_picture_and_a_constant(fitted):
    image, _, result = fitted
    constant = result.model + result.subtracted - image
    inside = (result.subtracted > 0) & (result.subtracted < 1)
    for k in range(3):
        of_channel = constant[..., k]
        unclipped = of_channel[inside[..., k]]
        assert np.abs(unclipped - result.offsets[k]).max() < 2e-5


@pytest.mark.parametrize("missing", [0.0, np.nan, np.inf])
def test_missing_samples_come_out_as_they_went_in(missing):
    image, _ = sloping_sky()
    image[:10] = missing
    image[:, 60, 1] = missing  # a dead column
    result = optimize(image, quick(epochs=20))
    assert_array_equal(result.subtracted[:10], image[:10])
    assert_array_equal(result.subtracted[:, 60, 1], image[:, 60, 1])
    assert np.isfinite(result.model).all()
    assert (result.subtracted[20:, :, 0] > 0).any()


def test_lone_zeros_in_a_noisy_dark_sky_are_dark_samples_and_not_missing():
    missing = np.zeros((120, 160), bool)
    missing[:20] = True  # a border
    missing[:, 70] = True  # a dead column
    missing[60:90, 100:130] = True  # a hole
    noise = np.random.default_rng(0).normal(0.01, 0.01, missing.shape)
    sky = np.clip(noise, 0, 1).astype(np.float32)
    sky[missing] = 0
    lone = (sky == 0) & ~missing
    planes = sky[None].copy()
    count = keep_dark_samples(planes)
    kept = planes[0]
    assert 0.1 < lone[20:].mean() < 0.2
    assert count == pytest.approx(lone.sum(), rel=0.1)
    assert (kept[missing] == 0).all()
    assert (kept[lone] > 0).mean() > 0.95  # but for those beside what is missing


def test_lone_zeros_in_a_bright_sky_are_dead_pixels_and_missing():
    noise = np.random.default_rng(0).normal(0.5, 0.01, (1, 120, 160))
    noise[0, ::17, ::13] = 0
    before = noise.copy()
    assert keep_dark_samples(noise) == 0
    assert_array_equal(noise, before)


# ------------------------------------------------------------------------------------ the whole job

def test_the_picture_given_is_not_changed_and_float64_stays():
    image, _ = sloping_sky()
    image = image.astype(np.float64)
    before = image.copy()
    settings = quick(epochs=5)
    result = optimize(image, settings)
    assert_array_equal(image, before)
    assert result.model.dtype == np.float64
    assert result.subtracted.dtype == np.float64
    result = optimize(image.astype(np.float32), settings)
    assert result.model.dtype == np.float32


def test_gray_pictures_may_have_two_dimensions_and_integers_count_over_their_range():
    image, _ = sloping_sky(channels=1)
    integers = np.round(image * 65535)
    settings = quick(epochs=5)
    flat = optimize(integers[..., 0].astype(np.uint16), settings)
    deep = optimize(integers / np.float32(65535), settings)
    assert flat.model.shape == (96, 144, 1)
    assert_allclose(flat.model, deep.model, atol=1e-6)


@pytest.mark.parametrize("image", [
    np.ones((5, 5, 2)),
    np.ones(7),
    np.ones((4, 4, 3, 1)),
    np.array([["a"]]),
    np.ones((0, 4)),
])
def test_arrays_that_are_no_pictures_are_refused(image):
    with pytest.raises(BgError, match="give"):
        optimize(image, QUICK)


@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (5, 5), (8, 700), (2, 2)])
def test_odd_pictures_give_a_picture_or_a_sentence(shape):
    noise = np.random.default_rng(0).uniform(0.1, 0.2, shape)
    image = noise[..., None].astype(np.float32)
    try:
        result = optimize(image, Settings(epochs=20))
    except BgError as error:
        assert ";" in str(error)  # what is wrong; what to do
    else:
        assert np.isfinite(result.model).all()
        assert np.isfinite(result.subtracted).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_what_a_masked_array_masks_is_missing(dtype):
    image, _ = sloping_sky()
    unit = 1 if dtype == np.float32 else 65535
    samples = (image * unit).astype(dtype)
    masked = np.ma.masked_array(samples)
    masked[20:40, 30:60] = np.ma.masked
    before = masked.copy()
    linear = masked.astype(np.float32) / unit
    nans = linear.filled(np.nan).astype(np.float32)
    settings = quick(epochs=20)
    in_color = masked, nans
    in_gray = masked[..., 0], nans[..., 0]
    for given, same in (in_color, in_gray):
        result = optimize(given, settings)
        expected = optimize(same, settings)
        hole = result.prepared.weight[6:9, 9:14]
        assert not hole.any()
        assert_allclose(result.model, expected.model, atol=2e-6)
    assert (masked.mask == before.mask).all()
    assert (masked.data == before.data).all()


@pytest.mark.slow
def test_weights_that_a_masked_array_masks_are_none():
    image, _ = sloping_sky()
    ones = np.ones(image.shape[:2])
    weights = np.ma.masked_array(ones)
    weights[:48] = np.ma.masked
    settings = quick(epochs=20)
    result = optimize(image, settings, weights)
    expected = optimize(image, settings, weights.filled(0))
    assert_array_equal(result.prepared.weight, expected.prepared.weight)


def test_a_lone_zero_in_a_mask_leaves_its_pixel_out():
    mask = np.random.default_rng(1).uniform(0.1, 1, (64, 64)).astype(np.float32)
    mask[::9, ::9] = 0
    planes = _to_planes(mask, "the mask")
    assert (planes == 0).sum() == (mask == 0).sum()
