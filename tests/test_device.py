"""Where the fit is computed, and that it does not matter to the sky. Stand-ins fail in the place of a GPU."""
import logging
import os

import numpy as np
import pytest
from conftest import sloping_sky

import bgoptimizer
from bgoptimizer import BgError, Device, Settings, compute_devices, import_tensorflow, on_first_that_works, optimize

GPU, CPU = Device("/GPU:0", "Tesla T4"), Device("/CPU:0", "the CPU")
QUICK = Settings(downscaling_factor=4, initializer="grid", smoothing=0.1, delinearization_quantile=0.999, epochs=200)


def error(kind):
    return getattr(import_tensorflow().errors, kind)(None, None, "a long story\nof many lines")


def failing(*errors):
    """Work that raises these in turn, then is done."""
    waiting = list(errors)

    def work():
        if waiting:
            raise waiting.pop(0)
        return "done"
    return work


def test_a_gpu_that_works_is_used_and_nothing_said():
    said = []
    assert on_first_that_works([GPU, CPU], failing(), said.append) == "done" and said == []


@pytest.mark.parametrize("kind, words", [
    ("ResourceExhaustedError", "Tesla T4 has too little memory; going on with the CPU (a larger -dx or a smaller -B may fit)"),
    ("InternalError", "Tesla T4 failed (InternalError); going on with the CPU"),
    ("UnknownError", "Tesla T4 failed (UnknownError); going on with the CPU")])
def test_a_gpu_that_fails_is_one_line_and_the_cpu_goes_on(kind, words):
    said = []
    assert on_first_that_works([GPU, CPU], failing(error(kind)), said.append) == "done"
    assert said == [words]


def test_a_cpu_without_memory_says_what_helps():
    with pytest.raises(BgError, match="the CPU has too little memory; try a larger -dx, or a smaller -B"):
        on_first_that_works([GPU, CPU], failing(*[error("ResourceExhaustedError")] * 2))


@pytest.mark.parametrize("devices, fault", [([CPU], "InternalError"), ([CPU], "InvalidArgumentError")])
def test_other_faults_of_the_cpu_are_not_hidden(devices, fault):
    with pytest.raises(getattr(import_tensorflow().errors, fault)):
        on_first_that_works(devices, failing(error(fault)))


def test_our_own_errors_are_not_blamed_on_the_gpu():
    with pytest.raises(BgError, match="nothing left"):
        on_first_that_works([GPU, CPU], failing(BgError("nothing left")))


def test_a_gpu_that_tensorflow_sees_comes_first(monkeypatch):
    config = import_tensorflow().config
    monkeypatch.setattr(config, "list_logical_devices", lambda kind: ["one", "two"])
    monkeypatch.setattr(config, "list_physical_devices", lambda kind: ["one", "two"])
    monkeypatch.setattr(config.experimental, "get_device_details", lambda gpu: {"device_name": "Tesla T4"} if gpu == "one" else {})
    assert compute_devices() == [GPU, CPU]


def test_a_gpu_held_by_another_program_is_one_line_and_not_tried_again(monkeypatch):
    def held(kind):
        raise error("InternalError")

    config, said, visible = import_tensorflow().config, [], []
    monkeypatch.setattr(config, "list_logical_devices", held)
    monkeypatch.setattr(config, "set_visible_devices", lambda devices, kind: visible.append((devices, kind)))
    assert compute_devices(said.append) == [CPU]
    assert said == ["the GPU cannot be started (InternalError); going on with the CPU"] and visible == [([], "GPU")]


def test_the_device_is_said_and_memory_grows(monkeypatch):
    if not import_tensorflow().config.list_physical_devices("GPU"):
        said = []
        optimize(sloping_sky(channels=1)[0], bgoptimizer.replace(QUICK, epochs=2), say=said.append)
        assert any("control points, smoothing 0.1, on the CPU" in line for line in said)
    assert os.environ["TF_FORCE_GPU_ALLOW_GROWTH"] == "true"


def test_a_fit_that_fails_on_the_gpu_gives_the_same_sky_on_the_cpu(monkeypatch):
    image, settings = sloping_sky()[0], bgoptimizer.replace(QUICK, epochs=20)
    expected = optimize(image, settings)
    fit, tries, said = bgoptimizer.fit_surface, [], []

    def first_try_fails(*arguments):
        tries.append(1)
        if len(tries) == 1:
            raise error("ResourceExhaustedError")
        return fit(*arguments)

    monkeypatch.setattr(bgoptimizer, "compute_devices", lambda say: [GPU, CPU])
    monkeypatch.setattr(bgoptimizer, "fit_surface", first_try_fails)
    result = optimize(image, settings, say=said.append)
    np.testing.assert_array_equal(result.model, expected.model)
    assert len(tries) == 2 and sum("going on with the CPU" in line for line in said) == 1


@pytest.mark.parametrize("initializer", ["grid", "random"])
def test_drop_in_and_tensorflow_addons_give_the_same_sky(initializer, monkeypatch):
    pytest.importorskip("tensorflow_addons.image.interpolate_spline", exc_type=Exception)
    image, sky = sloping_sky()
    settings = bgoptimizer.replace(QUICK, initializer=initializer)
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
        optimize(sloping_sky(channels=1)[0], bgoptimizer.replace(QUICK, epochs=2))
    finally:
        logger.removeHandler(handler)
    assert messages == []
