"""The spline is the known one, in TensorFlow and in NumPy, on the reduced frame and at full size."""
import numpy as np
import pytest
from conftest import sloping_sky, to_planes
from scipy.interpolate import RBFInterpolator

from bgoptimizer import (Settings, SkySurface, frame_coordinates, import_tensorflow, interpolate_spline, prepare,
                         spline_layer, spline_surface, start_positions, start_values)

RNG = np.random.default_rng(11)
POINTS, VALUES, QUERY = RNG.random((20, 2)), RNG.random((20, 3)), RNG.random((300, 2))


def evaluate(function, order, smoothing, dtype):
    """Values, and gradients of a sum of squares for positions and for values."""
    tf = import_tensorflow()
    points, values, query = (tf.constant(a[None], dtype) for a in (POINTS, VALUES, QUERY))
    with tf.GradientTape() as tape:
        tape.watch([points, values])
        out = function(points, values, query, order, smoothing)
        loss = tf.reduce_sum(out * out)
    return [a.numpy()[0] for a in [out] + tape.gradient(loss, [points, values])]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_drop_in_has_the_values_and_gradients_of_tensorflow_addons(order, smoothing):
    addons = pytest.importorskip("tensorflow_addons.image.interpolate_spline", exc_type=Exception)
    ours = evaluate(interpolate_spline, order, smoothing, "float32")
    theirs = evaluate(addons.interpolate_spline, order, smoothing, "float32")
    for mine, other in zip(ours, theirs):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_thin_plate_is_that_of_scipy(smoothing):
    # With r^2 log r all values have the same sign in both, so the weight on the diagonal has the other one in scipy.
    ours = evaluate(interpolate_spline, 2, smoothing, "float64")[0]
    scipy = RBFInterpolator(POINTS, VALUES, kernel="thin_plate_spline", smoothing=smoothing)(QUERY)
    np.testing.assert_allclose(ours, scipy, atol=1e-6)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_numpy_and_tensorflow_give_the_same_surface(order, smoothing):
    ours = evaluate(interpolate_spline, order, smoothing, "float64")[0]
    np.testing.assert_allclose(spline_surface(QUERY, POINTS, VALUES, order, smoothing), ours, atol=1e-7)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("smoothing", [0.0, 10.0])
def test_a_plane_stays_a_plane(order, smoothing):
    plane = POINTS @ [[0.3], [-0.7]] + 0.2
    np.testing.assert_allclose(spline_surface(QUERY, POINTS, plane, order, smoothing), QUERY @ [[0.3], [-0.7]] + 0.2, atol=1e-8)


def test_control_points_on_top_of_each_other_give_a_finite_surface():
    points = np.repeat(POINTS[:5], 2, axis=0)
    assert np.isfinite(spline_surface(QUERY, points, np.eye(len(points)), 2, 0.0)).all()


@pytest.mark.parametrize("shape, factor", [((96, 144), 8), ((145, 97), 8), ((101, 203), 5), ((64, 65), 1)])
def test_a_plane_seen_reduced_comes_back_at_full_size_unshifted(shape, factor):
    frame = frame_coordinates(*shape)
    plane = frame @ [0.3, 0.5] + 0.1
    prepared = prepare(plane[None], Settings(downscaling_factor=factor))
    at = RNG.choice(prepared.linear[..., 0].size, 30, replace=False)
    positions, values = prepared.centers.reshape(-1, 2)[at], prepared.linear.reshape(-1, 1)[at]
    sky = SkySurface(lambda query: spline_surface(query, positions, values, 2, 0.1), shape, np.float64)
    assert np.abs(sky.plane(0) - plane).max() < 1e-4 * np.ptp(plane)


@pytest.mark.parametrize("shape", [(1200, 1700), (2100, 900), (300, 301), (8, 4000), (1, 1), (1, 50)])
def test_strips_are_the_whole_and_the_whole_is_the_spline(shape):
    values = 0.3 + 0.2 * VALUES
    points = POINTS * np.array(shape) / max(shape)

    def surface(query):
        return spline_surface(query, points, values, 2, 0.01)

    sky = SkySurface(surface, shape, np.float64)
    for k in range(3):
        np.testing.assert_array_equal(np.concatenate([sky.strip(k, rows) for rows in sky.strips()]), sky.plane(k))
    step = max(1, max(shape) // 200)
    exact = np.clip(surface(frame_coordinates(*shape)[::step, ::step]), 0, 1)
    whole = np.stack([sky.plane(k) for k in range(3)], -1)[::step, ::step]
    assert np.abs(whole - exact).max() < 2e-5


@pytest.mark.parametrize("shape", [(2000, 3000), (3000, 2000), (500, 500), (100, 1000)])
@pytest.mark.parametrize("points", [3, 4, 16, 32, 36, 100])
def test_grid_start_covers_the_frame_in_its_own_aspect(shape, points):
    start = start_positions(Settings(points=points, initializer="grid"), shape)
    sides = np.array(shape) / max(shape)
    assert abs(len(start) - points) <= max(1, points / 6)
    np.testing.assert_allclose(start.mean(0), sides / 2, rtol=1e-5)
    assert (start > 0).all() and (start < sides).all()


def test_random_start_follows_the_seed_and_stays_in_the_frame():
    starts = [start_positions(Settings(points=50, seed=seed), (300, 900)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(starts[0], starts[1])
    assert (starts[0] != starts[2]).any() and starts[0].shape == (50, 2)
    assert (starts[0] >= 0).all() and (starts[0] <= [1 / 3, 1]).all()


def test_the_layer_trains_positions_and_values():
    layer = spline_layer(POINTS.astype(np.float32), VALUES.astype(np.float32), 2, 0.1)
    assert [tuple(w.shape) for w in layer.trainable_weights] == [(20, 2), (20, 3)]
    expected = spline_surface(QUERY, POINTS, VALUES, 2, 0.1)
    np.testing.assert_allclose(layer(import_tensorflow().constant(QUERY, "float32")).numpy(), expected, atol=1e-4)


def test_first_values_are_the_pictures_and_under_a_mask_the_medians():
    planes = to_planes(sloping_sky(96, 144)[0])
    mask = np.ones((1, 96, 144), np.float32)
    mask[:, :48] = 0
    prepared = prepare(planes, Settings(), mask)
    values = start_values(prepared, np.array([[4.5, 100.5], [60.5, 100.5]], np.float32) / 144, 2, 0.1)
    np.testing.assert_allclose(values[1], prepared.image[7, 12], atol=1e-6)
    np.testing.assert_allclose(values[0], [np.median(prepared.image[..., k][prepared.weight[..., k] > 0]) for k in range(3)], atol=1e-6)
