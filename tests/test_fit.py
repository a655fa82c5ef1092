"""The fit finds the sky, from every start and on every device."""
import logging
import os
from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import bgoptimizer
from bgoptimizer import (
    LOSS_TERMS,
    BgError,
    Device,
    Settings,
    compute_devices,
    examine,
    import_tensorflow,
    on_first_that_works,
    optimize,
    prepare,
    sky_sample,
    start_positions,
    start_values,
)
from runner import QUICK, quick
from scenes import make_scene, score, sloping_sky, to_planes

GPU = Device("/GPU:0", "Tesla T4")
CPU = Device("/CPU:0", "the CPU")


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


def found_sky(prepared, places):
    """Return the sky that was found at places (n, 2), stretched."""
    return prepared.stretch.extend(prepared.sky.start(places))


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


# ------------------------------------------------------------------------------ start and sample

@pytest.mark.parametrize("shape", [(2000, 3000), (3000, 2000), (500, 500), (100, 1000)])
@pytest.mark.parametrize("points", [3, 4, 16, 32, 36, 100])
def test_grid_start_covers_the_frame_in_its_own_aspect(shape, points):
    settings = Settings(points=points, initializer="grid")
    start = start_positions(settings, shape)
    sides = np.array(shape) / max(shape)
    assert abs(len(start) - points) <= max(1, points / 6)
    assert_allclose(start.mean(0), sides / 2, rtol=1e-5)
    assert (start > 0).all()
    assert (start < sides).all()


def test_random_start_follows_the_seed_and_stays_in_the_frame():
    def start(seed):
        return start_positions(Settings(points=50, seed=seed), (300, 900))

    first = start(seed=1)
    assert_array_equal(first, start(seed=1))
    assert (first != start(seed=2)).any()
    assert first.shape == (50, 2)
    assert (first >= 0).all()
    assert (first <= [1 / 3, 1]).all()


def test_auto_leaves_no_wide_hole_between_random_starts():
    def widest_hole(auto):
        settings = Settings(auto=auto, points=64, seed=3)
        points = start_positions(settings, (400, 600))
        places = bgoptimizer.frame_coordinates(400, 600, 8).reshape(-1, 2)
        distances = np.linalg.norm(places[:, None] - points, axis=-1)
        return distances.min(1).max()

    assert widest_hole(True) < 0.75 * widest_hole(False)


def test_without_a_found_sky_first_values_are_the_pictures_and_under_a_mask_the_medians():
    image, _ = sloping_sky(96, 144)
    mask = np.ones((1, 96, 144), np.float32)
    mask[:, :48] = 0
    prepared = prepare(to_planes(image), Settings(), mask)
    pixels = np.array([[4.5, 100.5], [60.5, 100.5]], np.float32)  # the first is masked
    masked, seen = start_values(prepared, pixels / 144, 2)
    assert_allclose(seen, prepared.image[7, 12], atol=1e-6)
    for k in range(3):
        used = prepared.weight[..., k] > 0
        median = np.median(prepared.image[used, k])
        assert_allclose(masked[k], median, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_fit_sees_pixels_from_everywhere_but_none_that_is_masked(batch):
    image, _ = sloping_sky(400, 600, 1)
    image[:100] = 0
    settings = Settings(downscaling_factor=2, batch=batch)
    prepared = prepare(to_planes(image), settings)
    query, seen, weight, sky = sky_sample(prepared, settings)
    assert len(query) == 2 * bgoptimizer.SAMPLE_PIXELS * batch  # half of them to judge by
    assert len(seen) == len(query)
    assert weight.min() > 0
    assert sky.all()
    different = np.unique(query, axis=0)
    assert len(different) == len(query)  # no pixel twice
    y, x = query.T
    frame = (100 / 600, 400 / 600), (0, 1)
    counts, _, _ = np.histogram2d(y, x, bins=(6, 8), range=frame)
    assert counts.min() > 0.7 * counts.mean()


def test_a_small_picture_is_seen_whole():
    image, _ = sloping_sky()
    prepared = prepare(to_planes(image), QUICK)
    seen = sky_sample(prepared, QUICK).image
    whole = prepared.image[prepared.used]
    assert_array_equal(np.sort(seen, 0), np.sort(whole, 0))


# ------------------------------------------------------------------------------------ fit

def fit_of(positions, values, rest, order=2):
    """Return a fit that ended with these control points."""
    return bgoptimizer.Fit(
        positions=positions,
        values=values,
        order=order,
        smoothing=1.0,
        history=np.zeros((1, 6)),
        stopped="",
        track=[],
        rest=rest,
    )


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
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("initializer", ["random", "grid"])
def test_every_order_and_start_finds_it(order, initializer):
    image, sky = sloping_sky()
    settings = quick(order=order, initializer=initializer, points=16)
    model = optimize(image, settings).model
    assert error_in_percent(model, sky) < 5


def test_where_no_sky_is_seen_the_model_goes_little_beyond_its_range():
    image, _ = sloping_sky(96, 144)
    mask = np.zeros((1, 96, 144), np.float32)
    mask[:, :, :36] = 1
    prepared = prepare(to_planes(image), Settings(), mask)
    positions = start_positions(Settings(initializer="grid"), (96, 144))
    slope = 0.2 + 0.5 * positions[:, 1:]  # steep, all over the frame

    def no_rest(places):
        return np.zeros((*places.shape[:-1], 3))

    fit = fit_of(positions, np.tile(slope, 3), no_rest)
    sky = bgoptimizer.linear_sky(prepared, fit)(prepared.centers)  # (h, w, c)
    seen = sky[prepared.used]  # (n, c)
    assert (np.ptp(sky, (0, 1)) < 1.7 * np.ptp(seen, 0)).all()


def test_the_loss_falls_and_the_best_surface_is_kept(fitted):
    image, _, result = fitted
    loss = result.history["loss"]
    assert list(result.history) == ["loss", *LOSS_TERMS]
    assert loss[-1] < loss[0] - 0.3  # it starts from the sky that was found
    assert 1 <= len(loss) <= 1000
    shorter = optimize(image, quick(epochs=len(loss) // 2))
    assert shorter.history["loss"].min() >= loss.min()
    assert np.abs(loss - loss.min()).min() < 1e-6
    _, start, _ = result.fit.track[0]
    assert result.fit.positions.shape == start.shape


@pytest.mark.parametrize("auto, most, why", [
    (True, 21, "nothing is better than the sky it started from"),
    (False, 110, "no longer moves"),
])
def test_the_fit_stops_when_nothing_improves(auto, most, why):
    image, _ = sloping_sky(64, 64, 1, noise=0)
    too_slow = 1e-9  # to improve by what counts
    settings = quick(learning_rate=too_slow, epochs=400, auto=auto)
    result = optimize(image, settings)
    assert len(result.history["loss"]) <= most
    assert why in result.fit.stopped


def test_epochs_are_counted_and_told(fitted):
    image, _, _ = fitted
    epochs = []
    losses = []

    def tell(epoch, loss):
        epochs.append(epoch)
        losses.append(loss)

    result = optimize(image, quick(epochs=25), on_epoch=tell)
    assert epochs == list(range(1, 26))
    assert_array_equal(losses, result.history["loss"])
    assert [epoch for epoch, _, _ in result.fit.track] == [0, 10, 20]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_pictures_and_another_does_not(fitted):
    image, _, _ = fitted

    def optimized(seed):
        return optimize(image, quick(initializer="random", epochs=150, seed=seed))

    first = optimized(seed=4)
    second = optimized(seed=4)
    other = optimized(seed=5)
    assert_array_equal(first.model, second.model)
    assert_array_equal(first.subtracted, second.subtracted)
    assert (first.model != other.model).any()


# ------------------------------------------------------------------------------------ devices

# Stand-ins fail in the place of a GPU.

@pytest.fixture
def said(caplog):
    """A function that returns the lines that were logged so far."""
    caplog.set_level(logging.INFO, "bgoptimizer")

    def lines():
        return [record.getMessage() for record in caplog.records]

    return lines


def tf_error(kind):
    """Return an error as TensorFlow raises them."""
    errors = import_tensorflow().errors
    error = getattr(errors, kind)
    return error(None, None, "a long story\nof many lines")


def failing(*errors):
    """Return work that raises these errors in turn, then is done."""
    waiting = list(errors)

    def work():
        if waiting:
            raise waiting.pop(0)
        return "done"

    return work


def test_a_gpu_that_works_is_used_and_nothing_said(said):
    assert on_first_that_works([GPU, CPU], failing()) == "done"
    assert said() == []


@pytest.mark.parametrize("kind, words", [
    (
        "ResourceExhaustedError",
        "Tesla T4 has too little memory; going on with the CPU "
        "(a larger -dx or a smaller -B may fit)",
    ),
    ("InternalError", "Tesla T4 failed (InternalError); going on with the CPU"),
    ("UnknownError", "Tesla T4 failed (UnknownError); going on with the CPU"),
])
def test_a_gpu_that_fails_is_one_line_and_the_cpu_goes_on(kind, words, said):
    work = failing(tf_error(kind))
    assert on_first_that_works([GPU, CPU], work) == "done"
    assert said() == [words]


def test_a_cpu_without_memory_says_what_helps():
    no_memory = tf_error("ResourceExhaustedError")
    helps = "the CPU has too little memory; try a larger -dx, or a smaller -B"
    with pytest.raises(BgError, match=helps):
        on_first_that_works([GPU, CPU], failing(no_memory, no_memory))


@pytest.mark.parametrize("kind", ["InternalError", "InvalidArgumentError"])
def test_other_faults_of_the_cpu_are_not_hidden(kind):
    error = tf_error(kind)
    with pytest.raises(type(error)):
        on_first_that_works([CPU], failing(error))


def test_our_own_errors_are_not_blamed_on_the_gpu():
    error = BgError("nothing left")
    with pytest.raises(BgError, match="nothing left"):
        on_first_that_works([GPU, CPU], failing(error))


def test_a_gpu_that_tensorflow_sees_comes_first(monkeypatch):
    def devices(kind):
        return ["one", "two"]

    details = {"one": {"device_name": "Tesla T4"}, "two": {}}
    config = import_tensorflow().config
    monkeypatch.setattr(config, "list_logical_devices", devices)
    monkeypatch.setattr(config, "list_physical_devices", devices)
    monkeypatch.setattr(config.experimental, "get_device_details", details.get)
    assert compute_devices() == [GPU, CPU]


def test_a_gpu_held_by_another_program_is_one_line_and_not_tried_again(monkeypatch, said):
    def held(kind):
        raise tf_error("InternalError")

    visible = []

    def set_visible(devices, kind):
        visible.append((devices, kind))

    config = import_tensorflow().config
    monkeypatch.setattr(config, "list_logical_devices", held)
    monkeypatch.setattr(config, "set_visible_devices", set_visible)
    assert compute_devices() == [CPU]
    assert said() == ["the GPU cannot be started (InternalError); going on with the CPU"]
    assert visible == [([], "GPU")]


def test_the_device_is_said_and_memory_grows(said):
    if not import_tensorflow().config.list_physical_devices("GPU"):
        image, _ = sloping_sky(channels=1)
        optimize(image, quick(epochs=2))
        assert any("control points, smoothing 0.1, on the CPU" in line for line in said())
    assert os.environ["TF_FORCE_GPU_ALLOW_GROWTH"] == "true"


def test_a_fit_that_fails_on_the_gpu_gives_the_same_sky_on_the_cpu(monkeypatch, said):
    image, _ = sloping_sky()
    settings = quick(epochs=20)
    expected = optimize(image, settings)
    fit = bgoptimizer.fit_surface
    tries = []

    def first_try_fails(*arguments):
        tries.append(arguments)
        if len(tries) == 1:
            raise tf_error("ResourceExhaustedError")
        return fit(*arguments)

    monkeypatch.setattr(bgoptimizer, "compute_devices", lambda: [GPU, CPU])
    monkeypatch.setattr(bgoptimizer, "fit_surface", first_try_fails)
    result = optimize(image, settings)
    assert_array_equal(result.model, expected.model)
    assert len(tries) == 2
    told = [line for line in said() if "going on with the CPU" in line]
    assert len(told) == 1


def use_drop_in(monkeypatch):
    """Make the fits of a test use our own interpolate_spline."""
    def drop_in():
        return bgoptimizer.interpolate_spline

    monkeypatch.setattr(bgoptimizer, "_import_interpolate_spline", drop_in)


@pytest.mark.slow
@pytest.mark.parametrize("initializer", ["grid", "random"])
def test_drop_in_and_tensorflow_addons_give_the_same_sky(initializer, monkeypatch):
    pytest.importorskip("tensorflow_addons.image.interpolate_spline", exc_type=Exception)
    image, sky = sloping_sky()
    settings = quick(initializer=initializer, epochs=200)
    theirs = optimize(image, settings)
    use_drop_in(monkeypatch)
    ours = optimize(image, settings)
    our_loss = ours.history["loss"]
    their_loss = theirs.history["loss"]
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


# ------------------------------------------------------------------------------- rules of the fit

@pytest.fixture(scope="module")
def nebula():
    """A nebula under two glows as --auto sees it, with the start of its fit."""
    scene = make_scene("nebula", 1, 400, 600, 1)
    settings = Settings(auto=True, initializer="grid", downscaling_factor=4)
    prepared, settings = examine(to_planes(scene.image), settings)
    positions = start_positions(settings, prepared.full_shape)
    start = positions, start_values(prepared, positions, settings.order)
    return prepared, settings, start


def test_the_loss_of_a_pixel_is_the_logarithm_of_all_its_terms():
    tf = import_tensorflow()
    alpha = 5.0
    terms = [tf.constant([term, 2 * term]) for term in (0.1, 0.02, 0.003, 0.0004)]
    total = 0.1 + 0.02 + alpha * (0.003 + 0.0004)
    of_pixels = np.array([total, 2 * total])
    expected = np.log(bgoptimizer.LOSS_FLOOR + of_pixels).mean()
    loss = bgoptimizer.log_loss(terms, alpha)
    assert abs(float(loss) - expected) < 1e-5


def test_the_fit_starts_from_the_found_sky_however_few_its_points(nebula):
    prepared, settings, _ = nebula
    positions = np.array([[0.1, 0.1], [0.5, 0.3], [0.2, 0.9]], np.float32)
    start = positions, start_values(prepared, positions, settings.order)
    rest = bgoptimizer.rest_of_sky(prepared, settings.order, start)
    fit = fit_of(*start, rest, settings.order)
    found = found_sky(prepared, prepared.centers)
    assert_allclose(fit.surface(prepared.centers), found, atol=1e-6)


def test_behind_objects_the_found_sky_stands_for_the_picture(nebula):
    prepared, settings, _ = nebula
    sample = sky_sample(prepared, settings)
    hidden = ~sample.seen
    assert 0.1 < hidden.mean() < 0.9
    assert (sample.weight[hidden] > 0).all()
    found = found_sky(prepared, sample.places[hidden])
    assert_allclose(sample.image[hidden], found, atol=1e-6)


@pytest.mark.slow
def test_noise_does_not_move_the_surface_that_fits_best():
    """The loss likes the low side of the noise; the sample is moved there beforehand."""
    tf = import_tensorflow()
    scene = make_scene("flat", 1, 400, 600, 1)
    settings = Settings(auto=True, downscaling_factor=4)
    prepared, settings = examine(to_planes(scene.image), settings)
    sample = sky_sample(prepared, settings)
    seen = sample.image[sample.seen]
    truth = prepared.stretch.extend(scene.sky.mean((0, 1)))

    def loss(offset):
        residual = tf.constant(seen - truth - offset * seen.std())
        terms = [
            bgoptimizer.loss_error(residual),
            bgoptimizer.loss_color(residual),
            bgoptimizer.loss_overshoot(residual),
            0.0,
        ]
        return float(bgoptimizer.log_loss(terms, settings.alpha))

    offsets = np.linspace(-2, 2, 41)  # over the noise
    losses = [loss(offset) for offset in offsets]
    best = offsets[np.argmin(losses)]
    assert abs(best) < 0.4


def test_one_half_of_the_sample_is_fitted_and_the_other_judges(nebula):
    prepared, settings, start = nebula
    nodes, _ = bgoptimizer._bending_nodes(prepared.full_shape)
    rest = bgoptimizer.rest_of_sky(prepared, settings.order, start)

    def lesson_of(sample, settings=settings):
        return bgoptimizer._make_lesson(prepared, settings, sample, nodes, rest, 0.01)

    sample = sky_sample(prepared, settings)
    lesson = lesson_of(sample)
    assert int(lesson.fitted) == len(sample.places) // 2
    assert int(lesson.judging) == len(sample.places) // 2
    few = bgoptimizer.Sample(*(part[:100] for part in sample))
    lesson = lesson_of(few)
    assert int(lesson.fitted) == 100
    assert int(lesson.judging) == 0
    # Clipped is what is as bright as can be told, where sky is seen.
    image = few.image.copy()
    image[:7] = 1.0
    seen = np.ones(100, bool)
    seen[3] = False
    lesson = lesson_of(few._replace(image=image, seen=seen))
    assert lesson.clipped.numpy().sum() == 6
    for smoothing, costs in ((1e4, 1), (1e3, 0)):  # of a bowl
        stiff = replace(settings, smoothing=smoothing)
        assert float(lesson_of(sample, stiff).bowl) == costs


def test_a_learning_rate_that_is_far_too_high_costs_nothing(nebula):
    """The control points that were judged best are kept, not the last ones."""
    prepared, settings, start = nebula
    wild = replace(settings, learning_rate=0.3, epochs=15)
    fit = bgoptimizer.fit_surface(prepared, wild, start)
    moved = fit.surface(prepared.centers) - found_sky(prepared, prepared.centers)
    assert np.abs(moved).max() < 0.01


def test_a_fit_that_never_stands_still_ends_when_nothing_improves(monkeypatch):
    monkeypatch.setattr(bgoptimizer, "STILL_CHANGE", 0.0)
    image, _ = sloping_sky(96, 144)
    result = optimize(image, quick(epochs=1000))
    assert "no improvement" in result.fit.stopped


def test_the_sample_is_spread_evenly():
    everywhere = np.full((256, 256), True)
    pixels = bgoptimizer.sample_pixels(everywhere, 2048, 1)
    row, column = np.divmod(pixels, 256)
    tile = row // 32 * 8 + column // 32
    count = np.bincount(tile, minlength=64)  # in 64 tiles, 32 each
    assert count.std() < 3  # of a purely random one about 5.6
