"""The surface is the spline that was trained, and it is the same from every start."""
import functools
import logging
from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.ndimage import gaussian_filter

import bgoptimizer
from bgoptimizer import (
    BgError,
    Settings,
    examine,
    fit_surface,
    frame_coordinates,
    import_tensorflow,
    linear_sky,
    optimize,
    sample_cells,
    spline_surface,
    start_positions,
    start_values,
)
from runner import QUICK, quick
from scenes import make_scene, score, sloping_sky, to_planes

auto_and_plain = pytest.mark.parametrize("auto", [False, True], ids=["plain", "auto"])


def rms(error):
    """Return the root of the mean square of every channel of (h, w, c)."""
    return np.sqrt(np.mean(error**2, (0, 1)))


def error_in_percent(model, sky):
    """Return the rms of model - sky, less its median, in percent of the sky's range.

    Of several channels it is the largest.
    """
    error = model - sky
    error -= np.median(error, (0, 1))
    in_percent = 100 * rms(error) / np.ptp(sky, (0, 1))
    return in_percent.max()


def with_noise(sky, seed=1):
    """Return an image of a sky (h, w) with the noise PIXEL_NOISE, (h, w, 1) float32."""
    noise = np.random.default_rng(seed).normal(0, PIXEL_NOISE, sky.shape)
    return (sky + noise).astype(np.float32)[..., None]


PIXEL_NOISE = 0.0005


def ready(image, settings, mask=None):
    """Return what the fit sees of an image (h, w, c), and the settings that are used."""
    return examine(to_planes(image), settings, mask)


def start_of(prepared, settings, flat=False):
    """Return the control points at the start, with the found values or those of a flat sky."""
    positions = start_positions(settings, prepared.sky, prepared.full_shape)
    if not flat:
        return positions, start_values(prepared, positions)
    median = prepared.stretch.extend(prepared.median)  # (c,)
    values = np.tile(median, (len(positions), 1))
    return positions, values.astype(np.float32)


# ------------------------------------------------------------------------------------ loss

def test_each_loss_term_sees_its_own_fault():
    tf = import_tensorflow()
    r = tf.constant([  # (3, c)
        [0.1, 0.1, 0.1],
        [0.3, 0.0, -0.3],
        [-0.2, -0.2, -0.2],
    ])
    expected = {
        bgoptimizer.loss_error: [0.1, 0.2, 0.2],
        bgoptimizer.loss_color: [0, 0.06, 0],
        bgoptimizer.loss_overshoot: [0, 0.2, 0.4],
        bgoptimizer.loss_negative: [0, 0.2, 0.4],
    }
    for term, values in expected.items():
        assert_allclose(term(r), values, atol=1e-7)


def test_the_loss_of_a_cell_is_the_logarithm_of_all_its_terms():
    tf = import_tensorflow()
    alpha = 5.0
    terms = [tf.constant([term, 2 * term]) for term in (0.1, 0.02, 0.003, 0.0004)]
    total = 0.1 + 0.02 + alpha * (0.003 + 0.0004)
    of_cells = np.array([total, 2 * total])
    expected = np.log(bgoptimizer.LOSS_FLOOR + of_cells).mean()
    loss = bgoptimizer.log_loss(terms, alpha)
    assert abs(float(loss) - expected) < 1e-5


# ------------------------------------------------------------------------------ start and sample

@pytest.mark.parametrize("shape", [(2000, 3000), (3000, 2000), (500, 500), (100, 1000)])
@pytest.mark.parametrize("points", [3, 4, 16, 32, 36, 100])
def test_grid_start_covers_the_frame_in_its_own_aspect(shape, points):
    settings = Settings(points=points, initializer="grid")
    start = start_positions(settings, None, shape)  # wherever the sky is
    sides = np.array(shape) / max(shape)
    assert abs(len(start) - points) <= max(1, points / 6)
    assert_allclose(start.mean(0), sides / 2, rtol=1e-5)
    assert (start > 0).all()
    assert (start < sides).all()


@pytest.fixture(scope="module")
def sloping():
    """A slope as --auto sees it, in a frame of 200 x 300, and the settings."""
    image, _ = sloping_sky(200, 300, 1)
    return ready(image, quick(auto=True, points=64, initializer="random"))


@auto_and_plain
def test_random_start_follows_the_seed_and_stays_in_the_frame(auto, sloping):
    prepared, settings = sloping

    def start(seed):
        return start_positions(replace(settings, auto=auto, seed=seed), prepared.sky, (100, 300))

    first = start(seed=1)
    assert_array_equal(first, start(seed=1))
    assert (first != start(seed=2)).any()
    assert first.shape == (64, 2)
    assert (first >= 0).all()
    assert (first <= [1 / 3, 1]).all()


def test_auto_leaves_no_wide_hole_between_random_starts(sloping):
    prepared, settings = sloping
    places = frame_coordinates(200, 300, 4).reshape(-1, 2)

    def widest_hole(auto):
        chosen = replace(settings, auto=auto, seed=3)
        points = start_positions(chosen, prepared.sky, (200, 300))
        distances = np.linalg.norm(places[:, None] - points, axis=-1)
        return distances.min(1).max()

    assert widest_hole(True) < 0.75 * widest_hole(False)


def test_the_fit_starts_from_the_sky_that_was_found(sloping):
    prepared, settings = sloping
    positions, values = start_of(prepared, settings)
    found = prepared.stretch.invert(values)
    expected = prepared.sky.surface(positions)
    assert_allclose(found, expected, atol=1e-4 * np.ptp(expected))


@auto_and_plain
def test_the_sky_goes_on_beside_what_is_masked(auto):
    """Cells that the edge of a mask cuts hold no light, and must not draw the surface down."""
    image, sky = sloping_sky(400, 600)
    mottled = gaussian_filter(np.random.default_rng(1).normal(size=sky.shape[:2]), 12)
    nebula = mottled > np.median(mottled)
    image[nebula] += 0.2
    mask = 1.0 - nebula
    model = optimize(image, Settings(auto=auto, initializer="grid"), mask).model
    assert error_in_percent(model, sky) < 3


@auto_and_plain
def test_what_is_masked_has_no_say(auto):
    """The pixels under the mask change places, so that the stretch stays the same."""
    image, _ = sloping_sky(200, 300, 1)
    mask = np.ones(image.shape[:2])
    mask[:80, :120] = 0
    other = image.copy()
    hidden = image[:80, :120].ravel()
    other[:80, :120, 0] = np.random.default_rng(3).permutation(hidden).reshape(80, 120)
    settings = quick(auto=auto, smoothing=None, epochs=10)
    model = optimize(image, settings, mask).model
    of_other = optimize(other, settings, mask).model
    assert_allclose(of_other, model, atol=1e-6)


def test_the_sample_is_spread_evenly_and_sees_no_cell_twice():
    usable = np.full((256, 256), True)
    usable[:32] = False
    cells = sample_cells(usable, np.ones(usable.shape), 2048, 1)
    assert len(np.unique(cells)) == len(cells) == 2048
    row, column = np.divmod(cells, 256)
    assert row.min() >= 32
    tile = (row // 32 - 1) * 8 + column // 32
    count = np.bincount(tile, minlength=56)  # in 56 tiles, 37 each
    assert count.std() < 3  # of a purely random one about 6


def test_the_sample_is_denser_where_the_sky_needs_more_points():
    usable = np.full((256, 256), True)
    density = np.ones(usable.shape)
    density[:, 128:] = 2
    cells = sample_cells(usable, density, 2048, 1)
    right = (cells % 256 >= 128).mean()
    assert right > 0.7


@pytest.mark.parametrize("wanted", [500, 2048])
def test_few_cells_are_all_seen(wanted):
    usable = np.random.default_rng(1).random((20, 30)) < 0.5
    cells = sample_cells(usable, np.ones(usable.shape), wanted, 1)
    assert_array_equal(cells, np.flatnonzero(usable))


# ------------------------------------------------------------------------- the model is the spline

@pytest.mark.parametrize("auto, order, initializer, channels", [
    (False, 2, "random", 3),
    (True, 2, "random", 1),
    (False, 3, "grid", 1),
    pytest.param(True, 3, "grid", 3, marks=pytest.mark.slow),
])
def test_the_model_is_the_spline_through_the_trained_control_points(
        auto, order, initializer, channels):
    image, _ = sloping_sky(200, 300, channels)
    settings = quick(auto=auto, order=order, initializer=initializer, epochs=40, smoothing=None)
    result = optimize(image, settings)
    fit = result.fit
    regularization = bgoptimizer.SPLINE_REGULARIZATION
    places = frame_coordinates(200, 300)
    stretched = spline_surface(places, fit.positions.astype(float), fit.values, order,
                               regularization)
    spline = result.prepared.stretch.invert(stretched)  # (h, w, c)
    assert_allclose(result.model, spline, atol=1e-4 * np.ptp(spline))
    _, positions, values = fit.track[0]
    assert (positions != fit.positions).any()
    assert (values != fit.values).any()


def test_where_no_sky_is_seen_the_model_goes_little_beyond_its_range():
    image, _ = sloping_sky(96, 144)
    mask = np.zeros((1, 96, 144), np.float32)
    mask[:, :, :36] = 1
    prepared, settings = ready(image, QUICK, mask)
    positions = start_positions(settings, prepared.sky, (96, 144))
    slope = 0.2 + 0.5 * positions[:, 1:]  # steep, all over the frame
    fit = bgoptimizer.Fit(
        positions=positions,
        values=np.tile(slope, 3),
        order=2,
        history=np.zeros((1, 6)),
        stopped="",
        track=[],
    )
    sky = linear_sky(prepared, fit)(prepared.centers)  # (h, w, c)
    seen = sky[prepared.used]  # (n, c)
    assert (np.ptp(sky, (0, 1)) < 2 * np.ptp(seen, 0)).all()


@pytest.mark.parametrize("shape", [(96, 144), pytest.param((149, 101), marks=pytest.mark.slow)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_sky_is_found(shape, channels):
    image, sky = sloping_sky(*shape, channels)
    model = optimize(image, QUICK).model
    assert error_in_percent(model, sky) < 3


@pytest.mark.slow
@pytest.mark.parametrize("family", ["city_glows", "stars"])
def test_the_sky_is_found_behind_a_field_of_stars(family):
    scene = make_scene(family, 1, 240, 360, 3, border=True)
    model = optimize(scene.image, QUICK).model
    assert score(model, scene)[0] < 3


@pytest.mark.slow
@pytest.mark.parametrize("order, initializer", [
    (1, "grid"), (2, "grid"), (2, "random"), (3, "random"), (4, "grid")])
def test_every_order_and_start_finds_it(order, initializer):
    image, sky = sloping_sky()
    settings = quick(order=order, initializer=initializer, points=16)
    model = optimize(image, settings).model
    assert error_in_percent(model, sky) < 5


# ----------------------------------------------------------------------- it converges from anywhere

# Without --auto objects are in the fit, and the loss has several minima

@pytest.mark.parametrize("family, seed, channels", [
    ("moon", 1, 1),
    pytest.param("nebula", 1, 1, marks=pytest.mark.slow),
    pytest.param("galaxy", 1, 1, marks=pytest.mark.slow),
    pytest.param("city_glows", 0, 3, marks=pytest.mark.slow),
    pytest.param("airglow", 1, 1, marks=pytest.mark.slow),
    pytest.param("vignetting", 0, 1, marks=pytest.mark.slow),
])
def test_a_flat_start_and_the_found_one_give_the_same_surface(family, seed, channels):
    scene = make_scene(family, seed, 400, 600, channels)
    prepared, settings = ready(scene.image, Settings(auto=True, downscaling_factor=4))

    def surface_from(start):
        fit = fit_surface(prepared, settings, start)
        return linear_sky(prepared, fit)(prepared.centers)

    found = surface_from(start_of(prepared, settings))
    flat = surface_from(start_of(prepared, settings, flat=True))
    assert error_in_percent(flat, found) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("family, channels", [("moon", 1), ("nebula", 3)])
def test_random_and_grid_starts_and_two_seeds_agree(family, channels):
    scene = make_scene(family, 1, 400, 600, channels)
    auto = Settings(auto=True, initializer="grid", downscaling_factor=4)
    valid = scene.valid
    low, high = np.percentile(scene.sky[valid], (1, 99), axis=0)
    random = replace(auto, initializer="random")
    first = optimize(scene.image, auto).model[valid]
    for settings in (random, replace(random, seed=1)):
        other = optimize(scene.image, settings).model[valid]
        difference = (other - first) / (high - low)
        difference -= np.median(difference, axis=0)
        assert difference.std() < 0.005


# -------------------------------------------------------------------- every flag does what it says

@functools.lru_cache(maxsize=None)
def two_glows():
    """Return an image of a sky with two glows, and that sky, (h, w, 1) each."""
    y, x = np.indices((200, 300)) / 300
    left = np.exp(-((y - 0.2)**2 + (x + 0.05)**2) / (2 * 0.15**2))
    right = np.exp(-((y - 0.7)**2 + (x - 1.0)**2) / (2 * 0.2**2))
    sky = 0.05 + 0.03 * left + 0.02 * right
    return with_noise(sky), sky[..., None]


@functools.lru_cache(maxsize=None)
def model_of_two_glows(auto, **changes):
    """Return the model (h, w, 1) that a short fit with these settings gives."""
    image, _ = two_glows()
    settings = Settings(auto=auto, downscaling_factor=4, epochs=150)
    return optimize(image, replace(settings, **changes)).model


@auto_and_plain
def test_few_points_cannot_follow_two_glows(auto):
    _, sky = two_glows()
    few = model_of_two_glows(auto, points=5)
    many = model_of_two_glows(auto)
    assert error_in_percent(many, sky) < 3
    assert error_in_percent(few, sky) > 5


def test_a_larger_alpha_keeps_the_surface_lower():
    levels = [np.mean(model_of_two_glows(False, alpha=alpha)) for alpha in (0.0, 5.0, 50.0)]
    falls = -np.diff(levels)
    assert (falls > 0.1 * PIXEL_NOISE).all()


def test_auto_follows_a_sky_that_is_brighter_than_the_stretch():
    y, x = np.indices((200, 300)) / 300
    sky = 0.05 + 0.01 * x + 0.2 * np.exp(-np.hypot(y, x) / 0.06)
    settings = Settings(auto=True, downscaling_factor=2, delinearization_quantile=0.95, epochs=150)
    result = optimize(with_noise(sky), settings)
    bright = sky > result.prepared.stretch.white[0]
    assert bright.sum() > 500
    error = result.model[..., 0] - sky
    assert np.abs(error[bright]).mean() < 0.05 * np.ptp(sky[bright])


def test_auto_keeps_the_surface_in_the_middle_of_the_noise():
    _, sky = two_glows()
    offset = np.median(model_of_two_glows(True) - sky)
    assert abs(offset) < 0.1 * PIXEL_NOISE


@pytest.mark.parametrize("auto", [False, pytest.param(True, marks=pytest.mark.slow)],
                         ids=["plain", "auto"])
@pytest.mark.parametrize("changes, least, most", [
    ({"order": 3}, 0.05, 10),
    ({"learning_rate": 0.01}, 0.02, 10),
    ({"epochs": 1}, 0.1, 20),
    ({"batch": 2}, 0.02, 5),
    ({"initializer": "grid"}, 0.1, 5),
    ({"seed": 1}, 0.02, 5),
])
def test_the_flag_changes_the_result(changes, least, most, auto):
    other = model_of_two_glows(auto, **changes)
    moved = error_in_percent(other, model_of_two_glows(auto))
    assert least < moved < (most / 5 if auto else most)


# ----------------------------------------------------------------------------- how the fit goes on

def test_the_loss_falls_and_the_best_surface_is_kept(fitted):
    image, _, result = fitted
    loss = result.fit.history[:, 0]
    assert loss.min() < loss[0]
    assert 1 <= len(loss) <= 1000
    shorter = optimize(image, quick(epochs=len(loss) // 2))
    assert shorter.fit.history[:, 0].min() >= loss.min()
    _, start, _ = result.fit.track[0]
    assert result.fit.positions.shape == start.shape


@pytest.fixture(scope="module")
def nebula():
    """A nebula under two glows as --auto sees it, with the start of its fit."""
    scene = make_scene("nebula", 1, 400, 600, 1)
    settings = Settings(auto=True, initializer="grid", downscaling_factor=4)
    prepared, settings = ready(scene.image, settings)
    return prepared, settings, start_of(prepared, settings)


def test_the_best_control_points_are_given_back_and_not_the_last(nebula):
    prepared, settings, start = nebula
    flat = start_of(prepared, settings, flat=True)
    wild = fit_surface(prepared, replace(settings, learning_rate=0.3, epochs=60), flat)
    loss = wild.history[:, 0]
    best = wild.positions, wild.values
    again = fit_surface(prepared, replace(settings, epochs=1), best)
    assert loss[-1] > loss.min() + 0.2
    assert abs(again.history[0, 0] - loss.min()) < 0.05


def test_a_learning_rate_that_is_far_too_high_costs_nothing(nebula):
    """It starts from the sky that was found, and nothing else is better."""
    prepared, settings, start = nebula
    wild = replace(settings, learning_rate=0.3, epochs=15)
    fit = fit_surface(prepared, wild, start)
    sky = linear_sky(prepared, fit)(prepared.centers)
    found = prepared.sky.surface(prepared.centers)
    assert error_in_percent(sky, found) < 2


def test_the_fit_stops_when_nothing_improves():
    image, _ = sloping_sky(channels=1, noise=0)
    too_slow = 1e-9  # to improve by what counts
    result = optimize(image, quick(learning_rate=too_slow, epochs=400))
    assert len(result.fit.history[:, 0]) <= bgoptimizer.STOP_PATIENCE + 10
    assert "no improvement" in result.fit.stopped


@pytest.mark.slow
def test_most_fits_end_before_the_last_epoch():
    ended = []
    for family in ("moon", "nebula", "city_glows", "vignetting", "pedestal"):
        scene = make_scene(family, 0, 400, 600, 1)
        result = optimize(scene.image, Settings(auto=True, downscaling_factor=4))
        ended.append(len(result.fit.history[:, 0]))
    early = [epochs for epochs in ended if epochs < 1000]
    assert len(early) >= 3
    assert len(set(early)) > 1


def test_steps_get_smaller_on_a_plateau(nebula, monkeypatch):
    prepared, settings, start = nebula
    restless = replace(settings, learning_rate=0.05, epochs=250)
    monkeypatch.setattr(bgoptimizer, "STOP_PATIENCE", 1000)

    def last_steps():
        fit = fit_surface(prepared, restless, start)
        late = [positions for _, positions, _ in fit.track[-6:]]
        return np.abs(np.diff(late, axis=0)).mean()

    halved = last_steps()
    monkeypatch.setattr(bgoptimizer, "RATE_PATIENCE", 1000)
    assert halved < 0.6 * last_steps()


def test_epochs_are_counted_and_told(fitted):
    image, _, _ = fitted
    epochs = []
    losses = []

    def tell(epoch, loss):
        epochs.append(epoch)
        losses.append(loss)

    result = optimize(image, quick(epochs=25), on_epoch=tell)
    assert epochs == list(range(1, 26))
    assert_allclose(losses, result.fit.history[:, 0])
    assert [epoch for epoch, _, _ in result.fit.track] == [0, 10, 20]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_pictures_and_another_does_not(fitted):
    image, _, _ = fitted

    def optimized(seed):
        return optimize(image, quick(initializer="random", epochs=50, seed=seed))

    first = optimized(seed=4)
    second = optimized(seed=4)
    other = optimized(seed=5)
    assert_array_equal(first.model, second.model)
    assert_array_equal(first.subtracted, second.subtracted)
    assert (first.model != other.model).any()


def test_a_step_is_traced_once_for_pictures_of_one_kind(monkeypatch):
    """Tracing runs the loss in Python, which costs more than a hundred epochs."""
    calls = []
    term = bgoptimizer.loss_error

    def counted(r):
        calls.append(r)
        return term(r)

    monkeypatch.setattr(bgoptimizer, "loss_error", counted)
    settings = quick(initializer="random", points=17, epochs=3)  # as no other test has it
    for size in (2, 3, 5):
        image, _ = sloping_sky(24 * size, 36 * size)
        optimize(image, replace(settings, seed=size, learning_rate=0.01 * size, alpha=size))
    assert 1 <= len(calls) <= 2  # Keras may look at it once more


def test_a_picture_gives_the_same_whatever_came_before(nebula):
    first, _ = sloping_sky(72, 108)
    second, _ = sloping_sky(seed=2, noise=0.002)
    settings = quick(initializer="random", points=19, epochs=60)
    alone = optimize(second, settings)
    optimize(first, replace(settings, learning_rate=0.01))
    after_another = optimize(second, settings)
    assert_array_equal(after_another.model, alone.model)
    assert_array_equal(after_another.fit.history, alone.fit.history)


def test_control_points_that_cannot_be_solved_are_told_and_the_best_is_kept(nebula):
    prepared, settings, start = nebula
    positions, values = start
    met = np.full_like(positions, np.nan), values
    with pytest.raises(BgError, match="lower -N, or choose another --seed"):
        fit_surface(prepared, replace(settings, epochs=3), met)


# ------------------------------------------------------------------------------------ TensorFlow

def test_no_gpu_is_started_but_one_that_a_program_has_started_stays(monkeypatch):
    hidden = []

    def set_visible(devices, kind):
        hidden.append((devices, kind))
        raise RuntimeError("Visible devices cannot be modified after being initialized")

    monkeypatch.setattr(import_tensorflow().config, "set_visible_devices", set_visible)
    import_tensorflow()
    assert hidden == [([], "GPU")]


def use_drop_in(monkeypatch):
    """Make the fits of a test use our own interpolate_spline."""
    def drop_in():
        return bgoptimizer.interpolate_spline

    monkeypatch.setattr(bgoptimizer, "import_interpolate_spline", drop_in)


@pytest.mark.slow
@pytest.mark.parametrize("initializer", ["grid", "random"])
def test_drop_in_and_tensorflow_addons_give_the_same_sky(initializer, monkeypatch):
    pytest.importorskip("tensorflow_addons.image.interpolate_spline", exc_type=Exception)
    image, sky = sloping_sky()
    settings = quick(initializer=initializer, epochs=200)
    theirs = optimize(image, settings)
    use_drop_in(monkeypatch)
    ours = optimize(image, settings)
    our_loss = ours.fit.history[:, 0]
    their_loss = theirs.fit.history[:, 0]
    assert_allclose(our_loss[:3], their_loss[:3], rtol=1e-5)
    error = rms(ours.model - theirs.model)
    assert (error < 0.005 * np.ptp(sky, (0, 1))).all()


def test_tensorflow_has_nothing_to_say_about_the_drop_in(monkeypatch):
    # Its warning, that it cannot rewrite our Python, would print the whole environment on the
    # screen.
    image, _ = sloping_sky(channels=1)
    messages = []
    handler = logging.Handler()
    handler.emit = messages.append
    use_drop_in(monkeypatch)
    logger = import_tensorflow().get_logger()
    logger.addHandler(handler)
    try:
        optimize(image, quick(epochs=2))
    finally:
        logger.removeHandler(handler)
    assert messages == []
