"""Reducing loses no sample and shifts nothing; the mask lets through what it should."""
import numpy as np
import pytest

from bgoptimizer import BgError, Settings, frame_coordinates, full_mask, measure_stretch, prepare, reduce_plane
from scenes import sloping_sky, to_planes


def plain_loop(plane, factor, func):
    """What reduce_plane promises, written down as it comes to mind."""
    height, width = plane.shape
    out = np.full((-(-height // factor), -(-width // factor)), np.nan)
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            block = plane[i * factor:(i + 1) * factor, j * factor:(j + 1) * factor]
            block = block[np.isfinite(block) & (block > 0)]
            if block.size:
                out[i, j] = getattr(np, func)(block)
    return out


@pytest.mark.parametrize("func", ["median", "mean"])
@pytest.mark.parametrize("shape, factor", [((40, 64), 8), ((43, 61), 8), ((17, 5), 8), ((9, 9), 1), ((30, 31), 3),
                                           ((3, 100), 7)])
@pytest.mark.parametrize("holes", [False, True])
def test_reduction_is_that_of_a_plain_loop(func, shape, factor, holes):
    rng = np.random.default_rng(2)
    plane = rng.uniform(0.1, 1, shape).astype(np.float32)
    if holes:
        plane[rng.random(shape) < 0.3] = 0
        plane[rng.random(shape) < 0.1] = np.nan
        plane[:factor, :factor] = 0  # a block with nothing in it
    before = plane.copy()
    np.testing.assert_allclose(reduce_plane(plane, factor, func), plain_loop(plane, factor, func), rtol=1e-6)
    np.testing.assert_array_equal(plane, before)


@pytest.mark.parametrize("shape", [(48, 80), (83, 45), (7, 200)])
def test_a_block_stands_where_its_pixels_stand(shape):
    full = frame_coordinates(*shape)
    assert full.min() > 0 and full.max() < 1
    for axis in range(2):
        reduced = reduce_plane(full[..., axis], 8, "mean")
        np.testing.assert_allclose(reduced, frame_coordinates(*shape, 8)[..., axis], rtol=1e-6)


def test_mean_is_taken_of_stretched_samples():
    planes = to_planes(sloping_sky(64, 64, 1)[0])
    stretch = measure_stretch(planes, 0.95)[0]
    stretched = stretch.apply(np.moveaxis(planes, 0, -1))[..., 0] + 1e-30  # a stretched 0 is not missing
    expected = plain_loop(stretched, 8, "mean")
    np.testing.assert_allclose(prepare(planes, Settings(downscaling_func="mean")).image[..., 0], expected, atol=1e-6)


def test_thresholds_leave_out_what_lies_beyond_them():
    prepared = prepare(to_planes(sloping_sky()[0]), Settings(threshold_min=0.1, threshold_max=0.6))
    np.testing.assert_array_equal(prepared.weight > 0, (prepared.image >= 0.1) & (prepared.image <= 0.6))


@pytest.mark.parametrize("channels", [1, 3])
def test_mask_file_weighs_by_its_mean_over_a_block(channels):
    planes = to_planes(sloping_sky(80, 120)[0])
    mask = np.ones((channels, 80, 120), np.float32)
    mask[:, :40] = 0
    mask[:, 40:80, :60] = 0.5
    mask[:, 72:80, 112:116] = 0  # half a block
    weight = prepare(planes, Settings(), mask).weight
    bare = prepare(planes, Settings()).weight
    assert (weight[:5] == 0).all()
    np.testing.assert_array_equal(weight[5:, :7], 0.5 * bare[5:, :7])
    assert (weight[9, 14] == 0.5 * bare[9, 14]).all() and (weight[6, 10] == bare[6, 10]).all()


def test_mask_of_a_channel_leaves_the_others_alone():
    planes = to_planes(sloping_sky(80, 120)[0])
    mask = np.ones((3, 80, 120), np.float32)
    mask[0] = 0
    prepared = prepare(planes, Settings(), mask)
    assert not prepared.weight[..., 0].any() and prepared.weight[..., 1:].any() and prepared.used.any()


def test_mask_of_another_size_is_refused():
    with pytest.raises(BgError, match="the mask is 60 x 40 with 1 channel, the picture 144 x 96 with 3 channels"):
        prepare(to_planes(sloping_sky()[0]), Settings(), np.ones((1, 40, 60), np.float32))


def test_a_picture_all_masked_is_refused():
    with pytest.raises(BgError, match="every pixel is masked"):
        prepare(to_planes(sloping_sky()[0]), Settings(), np.zeros((1, 96, 144), np.float32))


@pytest.mark.parametrize("shape", [(80, 120), (83, 125)])
def test_the_saved_mask_given_back_is_the_same_mask(shape):
    image = sloping_sky(*shape)[0]
    image[:16] = np.nan
    settings = Settings(threshold_min=0.2, threshold_max=0.9)
    prepared = prepare(to_planes(image), settings)
    mask = full_mask(prepared, settings)
    assert mask.shape[1:] == shape
    np.testing.assert_allclose(prepare(to_planes(image), settings, mask).weight, prepared.weight, atol=1e-6)
