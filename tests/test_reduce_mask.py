"""Reducing loses no sample and shifts nothing; the mask lets through what it should."""
import functools
from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import ndimage

from bgoptimizer import (
    BgError,
    Settings,
    find_rim,
    frame_coordinates,
    full_mask,
    mask_reasons,
    measure_stretch,
    prepare,
    reduce_plane,
)
from scenes import make_scene, sloping_sky, to_planes


PLAIN = Settings().resolved()


def plain(**changes):
    """Return the settings of a plain run, but for these changes."""
    return replace(PLAIN, **changes)


def sky_planes(height=96, width=144):
    """Return a picture (3, h, w)."""
    image, _ = sloping_sky(height, width)
    return to_planes(image)


def plain_loop(plane, factor, func):
    """Return what reduce_plane promises, written down as it comes to mind."""
    height, width = plane.shape
    rows = -(-height // factor)  # rounded up
    columns = -(-width // factor)
    reduce = getattr(np, func)
    reduced = np.full((rows, columns), np.nan)
    for i in range(rows):
        for j in range(columns):
            top = i * factor
            left = j * factor
            block = plane[top:top + factor, left:left + factor]
            present = np.isfinite(block) & (block > 0)
            if present.any():
                reduced[i, j] = reduce(block[present])
    return reduced


@pytest.mark.parametrize("func", ["median", "mean"])
@pytest.mark.parametrize("shape, factor", [
    ((40, 64), 8),
    ((43, 61), 8),
    ((17, 5), 8),
    ((9, 9), 1),
    ((30, 31), 3),
    ((3, 100), 7),
])
@pytest.mark.parametrize("holes", [False, True])
def test_reduction_is_that_of_a_plain_loop(func, shape, factor, holes):
    rng = np.random.default_rng(2)
    plane = rng.uniform(0.1, 1, shape).astype(np.float32)
    if holes:
        plane[rng.random(shape) < 0.3] = 0
        plane[rng.random(shape) < 0.1] = np.nan
        plane[:factor, :factor] = 0  # a block with nothing in it
    before = plane.copy()
    reduced = reduce_plane(plane, factor, func)
    expected = plain_loop(plane, factor, func)
    assert_allclose(reduced, expected, rtol=1e-6)
    assert_array_equal(plane, before)


@pytest.mark.parametrize("shape", [(48, 80), (83, 45), (7, 200)])
def test_a_block_stands_where_its_pixels_stand(shape):
    pixels = frame_coordinates(*shape)
    blocks = frame_coordinates(*shape, 8)
    assert pixels.min() > 0
    assert pixels.max() < 1
    for axis in range(2):
        reduced = reduce_plane(pixels[..., axis], 8, "mean")
        assert_allclose(reduced, blocks[..., axis], rtol=1e-6)


def test_mean_is_taken_of_stretched_samples():
    image, _ = sloping_sky(64, 64, 1)
    planes = to_planes(image)
    stretch, _ = measure_stretch(planes, 0.95)
    stretched = stretch.apply(image)[..., 0]
    expected = plain_loop(stretched + 1e-30, 8, "mean")  # a stretched 0 is not missing
    prepared = prepare(planes, plain(downscaling_func="mean"))
    assert_allclose(prepared.image[..., 0], expected, atol=1e-6)


def test_thresholds_leave_out_what_lies_beyond_them():
    settings = plain(threshold_min=0.1, threshold_max=0.6)
    prepared = prepare(sky_planes(), settings)
    between = (prepared.image >= 0.1) & (prepared.image <= 0.6)
    assert_array_equal(prepared.weight > 0, between)


@pytest.mark.parametrize("channels", [1, 3])
def test_mask_file_weighs_by_its_mean_over_a_block(channels):
    planes = sky_planes(80, 120)
    mask = np.ones((channels, 80, 120), np.float32)
    mask[:, :40] = 0
    mask[:, 40:80, :60] = 0.5
    mask[:, 72:80, 112:116] = 0  # half a block
    bare = prepare(planes, PLAIN).weight  # (10, 15, 3)
    weight = prepare(planes, PLAIN, mask).weight
    assert (weight[:5] == 0).all()
    assert_array_equal(weight[5:, :7], 0.5 * bare[5:, :7])
    assert (weight[9, 14] == 0.5 * bare[9, 14]).all()
    assert (weight[6, 10] == bare[6, 10]).all()


def test_mask_of_a_channel_leaves_the_others_alone():
    mask = np.ones((3, 80, 120), np.float32)
    mask[0] = 0
    prepared = prepare(sky_planes(80, 120), PLAIN, mask)
    assert not prepared.weight[..., 0].any()
    assert prepared.weight[..., 1:].any()
    assert prepared.used.any()


def test_mask_of_another_size_is_refused():
    mask = np.ones((1, 40, 60), np.float32)
    sizes = "the mask is 60 x 40 with 1 channel, the picture 144 x 96 with 3 channels"
    with pytest.raises(BgError, match=sizes):
        prepare(sky_planes(), PLAIN, mask)


def test_a_picture_all_masked_is_refused():
    mask = np.zeros((1, 96, 144), np.float32)
    with pytest.raises(BgError, match="every pixel is masked"):
        prepare(sky_planes(), PLAIN, mask)


@pytest.mark.parametrize("shape", [(80, 120), (83, 125)])
def test_the_saved_mask_given_back_is_the_same_mask(shape):
    planes = sky_planes(*shape)
    planes[:, :16] = np.nan
    settings = plain(threshold_min=0.2, threshold_max=0.9)
    prepared = prepare(planes, settings)
    mask = full_mask(prepared, settings)
    assert mask.shape[1:] == shape
    again = prepare(planes, settings, mask)
    assert_allclose(again.weight, prepared.weight, atol=1e-6)


# ------------------------------------------------------------------------------------ a dark rim

@functools.lru_cache(maxsize=3)
def large_scene(family):
    """Return a picture of a family, (1000, 1500)."""
    return make_scene(family, 0, 1000, 1500, 1).image[..., 0]


def rimmed(side, dim=0.4):
    """Return planes (1, 400, 600) with a dark rim, and where that is, (100, 150) bool of blocks."""
    image, _ = sloping_sky(400, 600, 1)
    rim = np.zeros((400, 600), bool)
    rim[side] = True
    image[rim] *= dim
    return to_planes(image), rim[::4, ::4]


@pytest.mark.parametrize("side", [
    np.s_[:24],
    np.s_[-60:],
    np.s_[:, :40],
    np.s_[:, -16:],
])
def test_a_dark_rim_is_left_out_and_the_picture_beside_it_is_not(side):
    planes, rim = rimmed(side)
    settings = plain(downscaling_factor=4)
    prepared = prepare(planes, settings)
    assert not prepared.used[rim].any()
    assert prepared.used[~rim].mean() > 0.9
    reasons = mask_reasons(prepared, settings)
    assert reasons["rim"][rim].mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("level", [0.05, 0.4, 0.8])
@pytest.mark.parametrize("family", ["galaxy", "moon", "city_glows"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("kind", [8, 20, 80, "1 degree", "10 degrees", "45 degrees"])
def test_rims_of_all_kinds_are_found(kind, soft, family, level):
    """On all sides so many pixels of 1000 x 1500 wide, or outside of a turned frame."""
    image = large_scene(family)
    height, width = image.shape
    y, x = np.indices(image.shape) + 0.5
    if isinstance(kind, int):
        depth = np.min([x, width - x, y, height - y], axis=0) - kind
    else:
        angle = np.deg2rad(int(kind.split()[0]))
        x = x - width / 2
        y = y - height / 2
        along = x * np.cos(angle) + y * np.sin(angle)
        across = y * np.cos(angle) - x * np.sin(angle)
        depth = np.minimum(width / 2 - np.abs(along), height / 2 - np.abs(across))
    inside = np.clip(1 + depth / 6, 0, 1) if soft else depth >= 0
    dark = level * np.percentile(image[inside == 1], 5)
    rim = dark + np.random.default_rng(1).normal(0, 0.0005, image.shape)
    rimmed = np.maximum(inside * image + (1 - inside) * rim, 1e-6)
    reduced = reduce_plane(rimmed, 8)
    spoiled = reduce_plane(image, 8) - reduced > 0.03 * np.median(image)
    found = find_rim(reduced[..., None], np.isfinite(reduced))
    assert found[spoiled].mean() > 0.75
    beside = reduce_plane(inside + 1.0, 8) < 2
    assert (found & ~ndimage.binary_dilation(beside, iterations=4)).mean() < 0.01


@pytest.mark.parametrize("family", ["hills", "dark_clouds", "moon", "edge_glow", "vignetting"])
def test_what_is_dark_but_no_rim_stays(family):
    scene = make_scene(family, 1, 400, 600, 1)
    settings = plain(downscaling_factor=4)
    prepared = prepare(to_planes(scene.image), settings)
    assert mask_reasons(prepared, settings)["rim"].mean() < 0.01
