"""The spline is the known one, in TensorFlow and in NumPy."""
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.interpolate import RBFInterpolator

import bgoptimizer
from bgoptimizer import (
    bending_nodes,
    bending_rows,
    import_interpolate_spline,
    import_tensorflow,
    interpolate_spline,
    spline_layer,
    spline_surface,
)

RNG = np.random.default_rng(11)
POINTS = RNG.random((20, 2))
VALUES = RNG.random((20, 3))
QUERY = RNG.random((300, 2))

every_order = pytest.mark.parametrize("order", [1, 2, 3, 4])


def evaluate(function, order, smoothing, dtype):
    """Return the values at QUERY, and the gradients of their sum of squares.

    The gradients are those for the positions and for the values of the control points.
    """
    tf = import_tensorflow()
    points = tf.constant(POINTS[None], dtype)  # (1, 20, 2)
    values = tf.constant(VALUES[None], dtype)  # (1, 20, 3)
    query = tf.constant(QUERY[None], dtype)  # (1, 300, 2)
    with tf.GradientTape() as tape:
        tape.watch([points, values])
        surface = function(points, values, query, order, smoothing)  # (1, 300, 3)
        loss = tf.reduce_sum(surface * surface)
    gradients = tape.gradient(loss, [points, values])
    return [tensor.numpy()[0] for tensor in (surface, *gradients)]


@every_order
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_drop_in_has_the_values_and_gradients_of_tensorflow_addons(order, smoothing):
    module = "tensorflow_addons.image.interpolate_spline"
    addons = pytest.importorskip(module, exc_type=Exception)
    ours = evaluate(interpolate_spline, order, smoothing, "float64")
    theirs = evaluate(addons.interpolate_spline, order, smoothing, "float64")
    for mine, other in zip(ours, theirs):
        largest = np.abs(other).max()
        assert_allclose(mine, other, rtol=1e-7, atol=1e-7 * largest)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_thin_plate_is_that_of_scipy(smoothing):
    # With r^2 log r all values have the same sign in both, so the weight on the diagonal has the
    # other one in scipy.
    ours, *_ = evaluate(interpolate_spline, 2, smoothing, "float64")
    spline = RBFInterpolator(
        POINTS,
        VALUES,
        kernel="thin_plate_spline",
        smoothing=smoothing,
    )
    assert_allclose(ours, spline(QUERY), atol=1e-6)


@every_order
@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_numpy_and_tensorflow_give_the_same_surface(order, smoothing):
    in_tensorflow, *_ = evaluate(interpolate_spline, order, smoothing, "float64")
    in_numpy = spline_surface(QUERY, POINTS, VALUES, order, smoothing)
    assert_allclose(in_numpy, in_tensorflow, atol=1e-7)


@every_order
@pytest.mark.parametrize("smoothing", [0.0, 10.0])
def test_a_plane_stays_a_plane(order, smoothing):
    def plane(places):
        return places @ [[0.3], [-0.7]] + 0.2

    surface = spline_surface(QUERY, POINTS, plane(POINTS), order, smoothing)
    assert_allclose(surface, plane(QUERY), atol=1e-8)


def test_control_points_on_top_of_each_other_give_a_finite_surface():
    points = np.repeat(POINTS[:5], 2, axis=0)
    values = np.eye(len(points))
    surface = spline_surface(QUERY, points, values, 2, 0.0)
    assert np.isfinite(surface).all()


@every_order
def test_the_layer_trains_positions_and_values(order, monkeypatch):
    monkeypatch.setattr(bgoptimizer, "SPLINE_REGULARIZATION", 0.1)  # with less, Float32 is coarse
    tf = import_tensorflow()
    layer = spline_layer(20, 3, order)
    shapes = [tuple(weights.shape) for weights in layer.trainable_weights]
    assert shapes == [(20, 2), (20, 3)]
    layer.set_weights([POINTS, VALUES])
    surface = layer(tf.constant(QUERY, "float32")).numpy()
    expected = spline_surface(QUERY, POINTS, VALUES, order, 0.1)
    assert_allclose(surface, expected, atol=1e-3)  # Float32, and close to a control point


def test_tensorflow_addons_is_used_where_it_exists():
    module = "tensorflow_addons.image.interpolate_spline"
    addons = pytest.importorskip(module, exc_type=Exception)
    assert import_interpolate_spline() is addons.interpolate_spline


# ------------------------------------------------------------------------------------ bending

def bending(surface, shape=(400, 600), free_bowl=False):
    """Return the bending energy of surface(y, x), in frame coordinates."""
    nodes, spacing = bending_nodes(shape, 24)
    everywhere = np.ones(nodes.shape[:2])
    y, x = np.moveaxis(nodes, -1, 0)
    heights = surface(y, x).ravel()
    derivatives = bending_rows(spacing, everywhere, free_bowl) @ heights
    return (derivatives**2).sum()


@pytest.mark.parametrize("surface, second_squared", [
    (lambda y, x: 0.2 + 0.3 * y - 0.7 * x, 0),
    (lambda y, x: y**2, 4),
    (lambda y, x: x * y, 2),
    (lambda y, x: 3 * x**2 - y**2, 40),
])
@pytest.mark.parametrize("shape", [(400, 600), (600, 400), (200, 1000)])
def test_bending_is_the_integral_of_the_squared_second_derivatives(surface, second_squared, shape):
    area = np.prod(shape) / max(shape)**2
    expected = second_squared * area / (8 * np.pi)
    assert bending(surface, shape) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_a_bowl_is_free_where_it_shall_be_and_nothing_else_is():
    def bowl(y, x):
        return 0.1 - y**2 + 0.5 * x * y - 2 * x**2

    def wave(y, x):
        return np.sin(6 * x)

    assert bending(bowl) > 0.1
    assert bending(bowl, free_bowl=True) < 1e-12
    assert bending(wave, free_bowl=True) > 0.5 * bending(wave)


def test_bending_costs_more_where_the_cost_is_higher():
    nodes, spacing = bending_nodes((400, 600), 24)
    x = nodes[..., 1]
    bump = np.exp(-(x - 0.8)**2 / 0.02).ravel()  # in the right half
    cost = np.where(x > 0.5, 10.0, 1.0)
    dear, cheap = [
        ((bending_rows(spacing, each, False) @ bump)**2).sum()
        for each in (cost, np.ones(x.shape))
    ]
    assert dear == pytest.approx(10 * cheap, rel=0.02)
