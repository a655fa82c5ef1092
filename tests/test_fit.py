"""The fit finds the sky, from every start and on every device."""
import logging
import os
from dataclasses import replace

import numpy as np
import pytest

import bgoptimizer
from bgoptimizer import (LOSS_TERMS, BgError, Device, Settings, compute_devices, import_tensorflow, on_first_that_works,
                         optimize, prepare, sky_sample, start_positions, start_values)
from runner import QUICK, quick
from scenes import make_scene, score, sloping_sky, to_planes

GPU, CPU = Device("/GPU:0", "Tesla T4"), Device("/CPU:0", "the CPU")


def error_in_percent(model, sky):
    """Largest rms over the channels of model - sky, less its median, in percent of the sky's range."""
    error = model - sky
    error -= np.median(error, (0, 1))
    return (np.sqrt(np.mean(error**2, (0, 1))) / np.ptp(sky, (0, 1)) * 100).max()


# ------------------------------------------------------------------------------------------------ loss

def test_each_loss_term_sees_its_own_fault():
    tf = import_tensorflow()
    r = tf.constant([[0.1, 0.1, 0.1], [0.3, 0.0, -0.3], [-0.2, -0.2, -0.2]])
    np.testing.assert_allclose(bgoptimizer.loss_error(tf, r), [0.1, 0.2, 0.2], atol=1e-7)
    np.testing.assert_allclose(bgoptimizer.loss_color(tf, r), [0, 0.06, 0], atol=1e-7)
    np.testing.assert_allclose(bgoptimizer.loss_overshoot(tf, r), [0, 0.2, 0.4], atol=1e-7)
    np.testing.assert_allclose(bgoptimizer.loss_negative(tf, r), [0, 0.2, 0.4], atol=1e-7)


# ------------------------------------------------------------------------------------------------ start and sample

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


def test_auto_leaves_no_wide_hole_between_random_starts():
    def widest_hole(auto):
        settings = Settings(auto=auto, points=64, seed=3)
        points = start_positions(settings, (400, 600))
        places = bgoptimizer.frame_coordinates(400, 600, 8).reshape(-1, 2)
        distances = np.linalg.norm(places[:, None] - points, axis=-1)
        return distances.min(1).max()

    assert widest_hole(True) < 0.75 * widest_hole(False)


def test_without_a_found_sky_first_values_are_the_pictures_and_under_a_mask_the_medians():
    planes = to_planes(sloping_sky(96, 144)[0])
    mask = np.ones((1, 96, 144), np.float32)
    mask[:, :48] = 0
    prepared = prepare(planes, Settings(), mask)
    values = start_values(prepared, np.array([[4.5, 100.5], [60.5, 100.5]], np.float32) / 144, 2)
    np.testing.assert_allclose(values[1], prepared.image[7, 12], atol=1e-6)
    medians = [np.median(prepared.image[..., k][prepared.weight[..., k] > 0]) for k in range(3)]
    np.testing.assert_allclose(values[0], medians, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_fit_sees_pixels_from_everywhere_but_none_that_is_masked(batch):
    image = sloping_sky(400, 600, 1)[0]
    image[:100] = 0
    settings = Settings(downscaling_factor=2, batch=batch)
    prepared = prepare(to_planes(image), settings)
    query, seen, weight, sky = sky_sample(prepared, settings)
    # As many again to judge by.
    assert len(query) == len(seen) == 2 * bgoptimizer.SAMPLE_PIXELS * batch and weight.min() > 0
    assert sky.all()
    assert len(set(map(tuple, query))) == len(query)  # no pixel twice
    counts = np.histogram2d(*query.T, (6, 8), ((100 / 600, 400 / 600), (0, 1)))[0]
    assert counts.min() > 0.7 * counts.mean()


def test_a_small_picture_is_seen_whole():
    prepared = prepare(to_planes(sloping_sky()[0]), QUICK)
    seen, whole = sky_sample(prepared, QUICK).image, prepared.image[prepared.used]
    np.testing.assert_array_equal(np.sort(seen, 0), np.sort(whole, 0))


# ------------------------------------------------------------------------------------------------ fit

@pytest.mark.parametrize("shape", [(96, 144), pytest.param((149, 101), marks=pytest.mark.slow)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_sky_is_found(shape, channels):
    image, sky = sloping_sky(*shape, channels)
    assert error_in_percent(optimize(image, QUICK).model, sky) < 3


@pytest.mark.slow
@pytest.mark.parametrize("family", ["city_glows", "stars"])
def test_the_sky_is_found_behind_a_field_of_stars(family):
    scene = make_scene(family, 1, 240, 360, 3, border=True)
    assert score(optimize(scene.image, QUICK).model, scene)[0] < 3


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("initializer", ["random", "grid"])
def test_every_order_and_start_finds_it(order, initializer):
    image, sky = sloping_sky()
    result = optimize(image, quick(order=order, initializer=initializer, points=16))
    assert error_in_percent(result.model, sky) < 5


def test_where_no_sky_is_seen_the_model_goes_little_beyond_its_range():
    planes = to_planes(sloping_sky(96, 144)[0])
    mask = np.zeros((1, 96, 144), np.float32)
    mask[:, :, :36] = 1
    prepared = prepare(planes, Settings(), mask)
    positions = start_positions(Settings(initializer="grid"), (96, 144))
    channels = len(planes)
    values = np.tile(0.2 + 0.5 * positions[:, 1:], channels)  # a steep slope, all over the frame
    fit = bgoptimizer.Fit(positions, values, 2, 1.0, np.zeros((1, 6)), "", [],
                          lambda places: np.zeros((*places.shape[:-1], channels)))
    sky = bgoptimizer.linear_sky(prepared, fit)(prepared.centers)
    seen = sky[prepared.used]
    assert (np.ptp(sky, (0, 1)) < 1.7 * np.ptp(seen, 0)).all()


def test_the_loss_falls_and_the_best_surface_is_kept(fitted):
    image, _, result = fitted
    loss = result.history["loss"]
    assert list(result.history) == ["loss"] + list(LOSS_TERMS)
    assert loss[-1] < loss[0] - 0.3  # it starts from the sky that was found
    assert 1 <= len(loss) <= 1000
    shorter = optimize(image, quick(epochs=len(loss) // 2))
    assert shorter.history["loss"].min() >= loss.min()
    assert np.abs(loss - loss.min()).min() < 1e-6 and result.fit.positions.shape == result.fit.track[0][1].shape


@pytest.mark.parametrize("auto, most, why", [(True, 21, "nothing is better than the sky it started from"),
                                             (False, 110, "no longer moves")])
def test_the_fit_stops_when_nothing_improves(auto, most, why):
    image = sloping_sky(64, 64, 1, noise=0)[0]
    settings = quick(learning_rate=1e-9, epochs=400, auto=auto)  # too slow to improve by what counts
    result = optimize(image, settings)
    assert len(result.history["loss"]) <= most and why in result.fit.stopped


def test_epochs_are_counted_and_told(fitted):
    told = []
    result = optimize(fitted[0], quick(epochs=25), on_epoch=lambda epoch, loss: told.append((epoch, loss)))
    assert [epoch for epoch, _ in told] == list(range(1, 26))
    np.testing.assert_array_equal([loss for _, loss in told], result.history["loss"])
    assert [epoch for epoch, _, _ in result.fit.track] == [0, 10, 20]


def test_the_same_seed_gives_the_same_pictures_and_another_does_not(fitted):
    image = fitted[0]
    settings = quick(initializer="random", epochs=150)
    first, second, other = (optimize(image, bgoptimizer.replace(settings, seed=seed)) for seed in (4, 4, 5))
    np.testing.assert_array_equal(first.model, second.model)
    np.testing.assert_array_equal(first.subtracted, second.subtracted)
    assert (first.model != other.model).any()


# ------------------------------------------------------------------------------------------------ devices

# Stand-ins fail in the place of a GPU.

@pytest.fixture
def said(caplog):
    """A function that gives the lines that were logged so far."""
    caplog.set_level(logging.INFO, "bgoptimizer")
    return lambda: [record.getMessage() for record in caplog.records]


def tf_error(kind):
    """An error as TensorFlow raises them."""
    return getattr(import_tensorflow().errors, kind)(None, None, "a long story\nof many lines")


def failing(*errors):
    """Work that raises these in turn, then is done."""
    waiting = list(errors)

    def work():
        if waiting:
            raise waiting.pop(0)
        return "done"
    return work


def test_a_gpu_that_works_is_used_and_nothing_said(said):
    assert on_first_that_works([GPU, CPU], failing()) == "done" and said() == []


@pytest.mark.parametrize("kind, words", [
    ("ResourceExhaustedError",
     "Tesla T4 has too little memory; going on with the CPU (a larger -dx or a smaller -B may fit)"),
    ("InternalError", "Tesla T4 failed (InternalError); going on with the CPU"),
    ("UnknownError", "Tesla T4 failed (UnknownError); going on with the CPU")])
def test_a_gpu_that_fails_is_one_line_and_the_cpu_goes_on(kind, words, said):
    assert on_first_that_works([GPU, CPU], failing(tf_error(kind))) == "done"
    assert said() == [words]


def test_a_cpu_without_memory_says_what_helps():
    with pytest.raises(BgError, match="the CPU has too little memory; try a larger -dx, or a smaller -B"):
        on_first_that_works([GPU, CPU], failing(*[tf_error("ResourceExhaustedError")] * 2))


@pytest.mark.parametrize("kind", ["InternalError", "InvalidArgumentError"])
def test_other_faults_of_the_cpu_are_not_hidden(kind):
    with pytest.raises(getattr(import_tensorflow().errors, kind)):
        on_first_that_works([CPU], failing(tf_error(kind)))


def test_our_own_errors_are_not_blamed_on_the_gpu():
    with pytest.raises(BgError, match="nothing left"):
        on_first_that_works([GPU, CPU], failing(BgError("nothing left")))


def test_a_gpu_that_tensorflow_sees_comes_first(monkeypatch):
    config, details = import_tensorflow().config, {"one": {"device_name": "Tesla T4"}, "two": {}}
    monkeypatch.setattr(config, "list_logical_devices", lambda kind: ["one", "two"])
    monkeypatch.setattr(config, "list_physical_devices", lambda kind: ["one", "two"])
    monkeypatch.setattr(config.experimental, "get_device_details", details.get)
    assert compute_devices() == [GPU, CPU]


def test_a_gpu_held_by_another_program_is_one_line_and_not_tried_again(monkeypatch, said):
    def held(kind):
        raise tf_error("InternalError")

    config, visible = import_tensorflow().config, []
    monkeypatch.setattr(config, "list_logical_devices", held)
    monkeypatch.setattr(config, "set_visible_devices", lambda devices, kind: visible.append((devices, kind)))
    assert compute_devices() == [CPU]
    assert said() == ["the GPU cannot be started (InternalError); going on with the CPU"] and visible == [([], "GPU")]


def test_the_device_is_said_and_memory_grows(said):
    if not import_tensorflow().config.list_physical_devices("GPU"):
        optimize(sloping_sky(channels=1)[0], quick(epochs=2))
        assert any("control points, smoothing 0.1, on the CPU" in line for line in said())
    assert os.environ["TF_FORCE_GPU_ALLOW_GROWTH"] == "true"


def test_a_fit_that_fails_on_the_gpu_gives_the_same_sky_on_the_cpu(monkeypatch, said):
    image, settings = sloping_sky()[0], quick(epochs=20)
    expected = optimize(image, settings)
    fit, tries = bgoptimizer.fit_surface, []

    def first_try_fails(*arguments):
        tries.append(1)
        if len(tries) == 1:
            raise tf_error("ResourceExhaustedError")
        return fit(*arguments)

    monkeypatch.setattr(bgoptimizer, "compute_devices", lambda: [GPU, CPU])
    monkeypatch.setattr(bgoptimizer, "fit_surface", first_try_fails)
    result = optimize(image, settings)
    np.testing.assert_array_equal(result.model, expected.model)
    assert len(tries) == 2 and sum("going on with the CPU" in line for line in said()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("initializer", ["grid", "random"])
def test_drop_in_and_tensorflow_addons_give_the_same_sky(initializer, monkeypatch):
    pytest.importorskip("tensorflow_addons.image.interpolate_spline", exc_type=Exception)
    image, sky = sloping_sky()
    settings = quick(initializer=initializer, epochs=200)
    theirs = optimize(image, settings)
    monkeypatch.setattr(bgoptimizer, "_import_interpolate_spline", lambda: bgoptimizer.interpolate_spline)
    ours = optimize(image, settings)
    np.testing.assert_allclose(ours.history["loss"][:3], theirs.history["loss"][:3], rtol=1e-5)
    error = ours.model - theirs.model
    assert (np.sqrt(np.mean(error**2, (0, 1))) < 0.005 * np.ptp(sky, (0, 1))).all()


def test_tensorflow_has_nothing_to_say_about_the_drop_in(monkeypatch):
    # Its warning, that it cannot rewrite our Python, would print the whole environment on the screen.
    messages = []
    handler = logging.Handler()
    handler.emit = messages.append
    monkeypatch.setattr(bgoptimizer, "_import_interpolate_spline", lambda: bgoptimizer.interpolate_spline)
    logger = import_tensorflow().get_logger()
    logger.addHandler(handler)
    try:
        optimize(sloping_sky(channels=1)[0], quick(epochs=2))
    finally:
        logger.removeHandler(handler)
    assert messages == []


# ------------------------------------------------------------------------------------------------ rules of the fit

@pytest.fixture(scope="module")
def nebula():
    """A nebula under two glows as --auto sees it, with the start of its fit."""
    scene = make_scene("nebula", 1, 400, 600, 1)
    settings = Settings(auto=True, initializer="grid", downscaling_factor=4)
    prepared, settings = bgoptimizer.examine(to_planes(scene.image), settings)
    positions = start_positions(settings, prepared.full_shape)
    start = positions, start_values(prepared, positions, settings.order)
    return prepared, settings, start


def test_the_loss_of_a_pixel_is_the_logarithm_of_all_its_terms():
    tf = import_tensorflow()
    terms = [tf.constant([term, 2 * term]) for term in (0.1, 0.02, 0.003, 0.0004)]
    total = np.array([1, 2]) * (0.1 + 0.02 + 5 * (0.003 + 0.0004))
    expected = np.log(bgoptimizer.LOSS_FLOOR + total).mean()
    assert abs(float(bgoptimizer.log_loss(tf, terms, 5.0)) - expected) < 1e-5


def test_the_fit_starts_from_the_found_sky_however_few_its_points(nebula):
    prepared, settings, _ = nebula
    positions = np.array([[0.1, 0.1], [0.5, 0.3], [0.2, 0.9]], np.float32)
    start = positions, start_values(prepared, positions, settings.order)
    fit = bgoptimizer.Fit(*start, settings.order, 1.0, np.zeros((1, 6)), "", [],
                          bgoptimizer.rest_of_sky(prepared, settings.order, start))
    found = prepared.stretch.extend(prepared.sky.start(prepared.centers))
    np.testing.assert_allclose(fit.surface(prepared.centers), found, atol=1e-6)


def test_behind_objects_the_found_sky_stands_for_the_picture(nebula):
    prepared, settings, _ = nebula
    sample = sky_sample(prepared, settings)
    hidden = ~sample.seen
    assert 0.1 < hidden.mean() < 0.9 and (sample.weight[hidden] > 0).all()
    found = prepared.stretch.extend(prepared.sky.start(sample.places[hidden]))
    np.testing.assert_allclose(sample.image[hidden], found, atol=1e-6)


def test_noise_does_not_move_the_surface_that_fits_best():
    """The loss likes the low side of the noise; the sample is moved there beforehand."""
    tf = import_tensorflow()
    scene = make_scene("flat", 1, 400, 600, 1)
    settings = Settings(auto=True, downscaling_factor=4)
    prepared, settings = bgoptimizer.examine(to_planes(scene.image), settings)
    sample = sky_sample(prepared, settings)
    truth = prepared.stretch.extend(scene.sky.mean((0, 1)))
    noise = sample.image[sample.seen].std()
    offsets = np.linspace(-2, 2, 41)
    losses = []
    for offset in offsets:
        residual = tf.constant(sample.image[sample.seen] - truth - offset * noise)
        terms = [bgoptimizer.loss_error(tf, residual), bgoptimizer.loss_color(tf, residual),
                 bgoptimizer.loss_overshoot(tf, residual), 0.0]
        losses.append(float(bgoptimizer.log_loss(tf, terms, settings.alpha)))
    assert abs(offsets[np.argmin(losses)]) < 0.4


def test_one_half_of_the_sample_is_fitted_and_the_other_judges(nebula):
    prepared, settings, start = nebula
    nodes, _ = bgoptimizer._bending_nodes(prepared.full_shape)
    rest = bgoptimizer.rest_of_sky(prepared, settings.order, start)
    sample = sky_sample(prepared, settings)
    lesson = bgoptimizer._make_lesson(prepared, settings, sample, nodes, rest, 0.01)
    assert int(lesson.fitted) == int(lesson.judging) == len(sample.places) // 2
    few = bgoptimizer.Sample(*(part[:100] for part in sample))
    lesson = bgoptimizer._make_lesson(prepared, settings, few, nodes, rest, 0.01)
    assert (int(lesson.fitted), int(lesson.judging)) == (100, 0)
    clipped = few._replace(image=np.where(np.arange(100)[:, None] < 7, 1.0, few.image),
                           seen=np.arange(100) != 3)
    lesson = bgoptimizer._make_lesson(prepared, settings, clipped, nodes, rest, 0.01)
    assert lesson.clipped.numpy().sum() == 6  # where sky is seen, and as bright as can be told
    for smoothing, costs in ((1e4, 1), (1e3, 0)):  # of a bowl
        stiff = replace(settings, smoothing=smoothing)
        lesson = bgoptimizer._make_lesson(prepared, stiff, sample, nodes, rest, 0.01)
        assert float(lesson.bowl) == costs


def test_a_learning_rate_that_is_far_too_high_costs_nothing(nebula):
    """The control points that were judged best are kept, not the last ones."""
    prepared, settings, start = nebula
    wild = replace(settings, learning_rate=0.3, epochs=15)
    fit = bgoptimizer.fit_surface(prepared, wild, start)
    found = prepared.stretch.extend(prepared.sky.start(prepared.centers))
    assert np.abs(fit.surface(prepared.centers) - found).max() < 0.01


def test_a_fit_that_never_stands_still_ends_when_nothing_improves(monkeypatch):
    monkeypatch.setattr(bgoptimizer, "STILL_CHANGE", 0.0)
    result = optimize(sloping_sky(96, 144)[0], quick(epochs=1000))
    assert "no improvement" in result.fit.stopped


def test_the_sample_is_spread_evenly():
    everywhere = np.full((256, 256), True)
    row, column = np.divmod(bgoptimizer.sample_pixels(everywhere, 2048, 1), 256)
    count = np.bincount(row // 32 * 8 + column // 32, minlength=64)  # in 64 tiles, 32 each
    assert count.std() < 3  # of a purely random one about 5.6
