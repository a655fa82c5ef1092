"""The spline is the known one, in TensorFlow and in NumPy."""
import numpy as np
import pytest
from scipy.interpolate import RBFInterpolator

from bgoptimizer import import_tensorflow, interpolate_spline, spline_layer, spline_surface

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
    def plane(places):
        return places @ [[0.3], [-0.7]] + 0.2

    surface = spline_surface(QUERY, POINTS, plane(POINTS), order, smoothing)
    np.testing.assert_allclose(surface, plane(QUERY), atol=1e-8)


def test_control_points_on_top_of_each_other_give_a_finite_surface():
    points = np.repeat(POINTS[:5], 2, axis=0)
    assert np.isfinite(spline_surface(QUERY, points, np.eye(len(points)), 2, 0.0)).all()


def test_the_layer_trains_positions_and_values():
    layer = spline_layer(POINTS.astype(np.float32), VALUES.astype(np.float32), 2, 0.1)
    assert [tuple(w.shape) for w in layer.trainable_weights] == [(20, 2), (20, 3)]
    expected = spline_surface(QUERY, POINTS, VALUES, 2, 0.1)
    np.testing.assert_allclose(layer(import_tensorflow().constant(QUERY, "float32")).numpy(), expected, atol=1e-4)
