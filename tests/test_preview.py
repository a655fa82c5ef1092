"""The preview window and panel: what their handlers do, and that the command told does the same."""
import shlex
import time
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.backend_bases import KeyEvent
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.testing import assert_array_equal

import bgoptimizer
from bgoptimizer import (
    WINDOW_SIZE,
    PreviewWindow,
    Task,
    build_parser,
    drawing_style,
    fields,
)
from runner import FAST, run
from scenes import load, save, sloping_sky

find_sky = bgoptimizer.find_sky
SKIES = {}  # what was looked for -> the sky: most tests look at the same picture
SQUARE = [(40, 40), (120, 40), (120, 100), (40, 100)]  # x and y, full size


@pytest.fixture
def opened(folder, monkeypatch):
    """Open a window on a picture with flags of the command line."""
    windows = []

    def open_window(*flags, channels=3, name="sky.xisf"):
        image, _ = sloping_sky(160, 240, channels)
        save(folder / name, image)
        options = bgoptimizer._parse([name, "out", "-p", *flags])
        mask = bgoptimizer.read_mask(options.mask).planes if options.mask else None
        picture = bgoptimizer.read_picture(name)
        with drawing_style():
            figure = FigureCanvasAgg(Figure(WINDOW_SIZE)).figure
            window = PreviewWindow(figure, Task(name, options), picture, mask)
        windows.append(window)
        wait(window)  # until the sky is found
        return window

    monkeypatch.setattr(bgoptimizer, "LOOK_AFTER", 0)
    monkeypatch.setattr(bgoptimizer, "find_sky", find_once)
    monkeypatch.setattr(FigureCanvasAgg, "draw_idle", lambda canvas: None)  # nobody looks
    yield open_window
    for window in windows:
        window.stopping.set()
        window.pool.shutdown()


def find_once(prepared, settings):
    """Find a sky that was not found before."""
    key = prepared.linear.tobytes(), prepared.weight.tobytes(), settings
    if key not in SKIES:
        SKIES[key] = find_sky(prepared, settings)
    return SKIES[key]


def press(window, *keys):
    for key in keys:
        window.keys[key]()


def wait(window):
    """Let the thread end what it does."""
    window.tick()
    deadline = time.monotonic() + 300
    while window.job is not None and time.monotonic() < deadline:
        time.sleep(0.1)
        window.tick()
    assert window.job is None


def shown(window):
    return np.array(window.axes.images[0].get_array())


def test_a_slider_changes_the_stretch_the_picture_and_the_command(opened):
    window = opened("-dx", "4", "-dq", "0.97")
    before = shown(window)
    window.widgets["-dq"].set_val(0)
    assert window.choice.asked.delinearization_quantile == 0.5
    assert (shown(window) != before).any()
    assert "-dq 0.5" in shlex.join(window.words())
    press(window, "right")
    assert "-dq 0.7" in shlex.join(window.words())
    assert window.widgets["-dq"].valtext.get_text() == "0.7"


def test_thresholds_and_smoothing_follow_slider_and_keys(opened):
    window = opened("-dx", "4", "--smoothing", "3")
    window.widgets["-tm"].set_val(50)  # thousandths
    window.widgets["-tM"].set_val(500)
    press(window, "down", "]", "+")
    settings = window.choice.asked
    assert (settings.threshold_min, settings.threshold_max) == (0.051, 0.49)
    assert settings.smoothing == 10
    wait(window)
    assert window.sky.smoothing == 10  # looked for anew
    press(window, *["-"] * 20)
    assert window.choice.asked.smoothing is None


def test_a_smoothing_of_0_is_a_rung(opened):
    window = opened("-dx", "4", "--smoothing", "0")
    assert window.widgets["smoothing"].val == 1
    assert "--smoothing 0" in shlex.join(window.words())


def test_what_leaves_no_sky_is_refused_in_words(opened):
    window = opened("-dx", "4")
    window.change(threshold_max=-1.0)
    assert "-tM must be" in window.status
    assert window.choice.asked.threshold_max == 1
    window.paint([(-9, -9), (999, -9), (999, 999), (-9, 999)])
    assert "every pixel is masked" in window.status
    assert window.choice.painting is None


def test_check_boxes_and_their_keys(opened):
    window = opened("-dx", "4")
    press(window, "a")
    assert window.choice.asked.auto
    assert window.choice.settings.delinearization_quantile == 0.999  # as the command line has it
    press(window, "d")
    assert all("\u2611" in window.widgets[key].label.get_text() for key in "ad")
    assert "--correction divide" in shlex.join(window.words())
    press(window, "a", "d")
    assert "--" not in shlex.join(window.words())


def test_blinking_shows_picture_model_and_result(opened):
    window = opened("-dx", "4")
    seen = [shown(window)]
    for _ in range(3):
        press(window, " ")
        seen.append(shown(window))
    assert_array_equal(seen[0], seen[3])
    model, result = seen[1], seen[2]
    assert np.ptp(model.mean((0, 2))) > 5 * np.ptp(np.median(result, (0, 2)))


def test_what_is_drawn_is_left_out_and_given_back(opened):
    window = opened("-dx", "4")
    window.paint(SQUARE)
    assert not window.choice.prepared.used[12:24, 12:28].any()
    assert window.choice.prepared.used[:9].all()
    window.shift = True
    window.paint([(40, 40), (80, 40), (80, 100), (40, 100)])
    assert window.choice.prepared.used[12:24, 12:18].all()
    choice = window.choice
    window.paint([(40, 40), (40, 40)])  # a click draws nothing
    assert window.choice is choice
    assert "-m out/sky_mask.xisf" in shlex.join(window.words())


def test_giving_back_what_auto_left_out_makes_its_mask_the_users_own(opened):
    window = opened("-dx", "4", "--auto", "-tM", "0.99")
    right = window.sky.centers[..., 1] > 0.5
    window.sky = bgoptimizer.replace(window.sky, shows_sky=right)
    window.shift = True
    window.paint(SQUARE)
    settings = window.choice.asked
    assert not settings.auto
    assert settings.delinearization_quantile == 0.999
    used = window.choice.prepared.used
    assert used[12:24, 12:28].all()  # given back
    assert not used[:8, :24].any()  # as --auto had it


def test_training_shows_the_result_and_writing_writes_what_the_command_writes(opened, folder):
    window = opened(*FAST, "--compress")
    window.paint(SQUARE)
    press(window, "w")
    assert "take the sky out first" in window.status
    press(window, "t")
    wait(window)  # for the fit
    assert window.choice.shown == "result"
    press(window, "w")
    wait(window)  # for the files
    names = ["sky_bgModel.xisf", "sky_bgSubtracted.xisf", "sky_mask.xisf"]
    assert sorted(path.name for path in (folder / "out").iterdir()) == names
    written = [load(folder / "out" / name) for name in names]
    assert run("sky.xisf", "again", *window.words()) == 0
    again = [load(folder / "again" / name) for name in names[:2]]
    for one, other in zip(written, again):
        assert one.tobytes() == other.tobytes()
    mask = written[2][..., 0]
    assert not mask[48:96, 48:112].any()


def test_the_fit_stops_when_asked_to(opened):
    window = opened("-dx", "4", "-e", "100000")
    press(window, "t", "escape")
    wait(window)  # before the first epoch
    assert window.choice.result is None
    press(window, "t")
    while "epoch" not in window.status:
        time.sleep(0.01)
        window.tick()
    press(window, "escape")
    wait(window)
    assert window.choice.result is None
    assert not list(bgoptimizer.Path().glob("out/*"))


def test_nothing_is_written_unless_asked_and_no_mask_is_overwritten(opened, folder):
    (folder / "out").mkdir()
    window = opened("-dx", "4")
    assert window.write_mask(window.choice) is None
    (folder / "out/sky_mask.xisf").write_text("of another day")
    window.paint(SQUARE)
    assert window.write_mask(window.choice).endswith("sky_mask2.xisf")
    assert window.write_mask(window.choice).endswith("sky_mask2.xisf")
    assert (folder / "out/sky_mask.xisf").read_text() == "of another day"
    assert len(list((folder / "out").iterdir())) == 2


def test_a_mask_that_was_given_is_drawn_on(opened, folder):
    mask = np.ones((160, 240, 1), np.float32)
    mask[:, :80] = 0
    save(folder / "given.xisf", mask)
    window = opened("-dx", "4", "-m", "given.xisf")
    assert "-m given.xisf" in shlex.join(window.words())
    window.paint([(160, 40), (200, 40), (200, 100), (160, 100)])
    path = window.write_mask(window.choice)
    assert f"-m {path}" in shlex.join(window.words())
    drawn = load(path)[..., 0]
    assert not drawn[:, :80].any()
    assert not drawn[48:96, 164:196].any()
    assert drawn[:36, 80:].all()


def test_keys_reach_their_handlers_as_events(opened):
    window = opened("-dx", "4")
    canvas = window.figure.canvas
    for key in ("a", "unknown"):
        canvas.callbacks.process("key_press_event", KeyEvent("key_press_event", canvas, key))
    assert window.choice.asked.auto


def test_the_command_is_copied(opened, monkeypatch):
    window = opened("-dx", "4")
    press(window, "c")
    assert window.texts[2].get_text().startswith("not copied: this toolkit")
    copied = []
    tk = SimpleNamespace(clipboard_clear=copied.clear, clipboard_append=copied.append)
    monkeypatch.setattr(window.figure.canvas, "get_tk_widget", lambda: tk, raising=False)
    press(window, "right", "c")
    assert copied[0].endswith(shlex.join(window.words()))
    assert window.texts[2].get_text() == "the command is in the clipboard"


@pytest.mark.parametrize("drawn", [False, True])
def test_closing_the_window_tells_the_command_and_writes_only_what_was_drawn(
        drawn, sky, folder, monkeypatch, capsys):
    from matplotlib import pyplot
    windows = []

    def work():
        """Stand in for a person, and for what a toolkit does in show()."""
        window, = windows
        if drawn:
            window.paint(SQUARE)
        press(window, "right", "q")

    def remember(*what):
        windows.append(PreviewWindow(*what))
        return windows[0]

    monkeypatch.setattr("bgoptimizer.display_kind", lambda: "window")
    monkeypatch.setattr("bgoptimizer.PreviewWindow", remember)
    monkeypatch.setattr(pyplot, "show", work)
    assert run("sky.xisf", "out", "-p") == 0
    assert not pyplot.get_fignums()
    *_, command = capsys.readouterr().out.splitlines()
    assert command.endswith("-dq 0.97 -m out/sky_mask.xisf" if drawn else "-dq 0.97")
    assert [path.name for path in folder.glob("out/*")] == ["sky_mask.xisf"] * drawn


# The panel of a notebook

@pytest.fixture
def panel(folder, monkeypatch):
    """A panel of a picture, and the list of what its button has handed over."""
    pytest.importorskip("ipywidgets")
    monkeypatch.setattr(bgoptimizer, "find_sky", find_once)
    image, _ = sloping_sky(160, 240)
    save(folder / "sky.xisf", image)
    options = bgoptimizer._parse(["sky.xisf", "-p", "-dx", "4", "--smoothing", "3"])
    used = []
    picture = bgoptimizer.read_picture("sky.xisf")
    made = bgoptimizer.PreviewPanel(used.append, Task("sky.xisf", options), picture, None)
    return made, used


def test_the_panel_tries_settings_and_its_button_hands_them_over(panel):
    panel, used = panel
    before = panel.image.value
    panel.widgets["delinearization_quantile"].label = "0.7"
    assert panel.choice.asked.delinearization_quantile == 0.7
    assert panel.image.value != before
    panel.widgets["smoothing"].label = "10.0"
    assert panel.sky.smoothing == 10  # looked for anew
    assert any("smoothing 10 " in line for line in panel.said)
    panel.widgets["threshold_min"].label = "0.05"
    panel.widgets["threshold_max"].label = "0.5"
    panel.widgets["correction"].label = "divide"
    panel.button.click()
    form = "-dx", "4", "-dq", "0.5", "-tm", "0.4", "--smoothing", "3"  # what came before
    options = bgoptimizer._parse(["sky.xisf", *form, *used[0]])
    assert Task("", options).settings == panel.choice.asked
    assert "-dq 0.7" in shlex.join(panel.words())


def test_the_panel_shows_what_auto_chooses_and_does_not_ask_for_it(panel):
    panel, used = panel
    panel.widgets["auto"].label = "True"
    assert panel.widgets["delinearization_quantile"].label == "0.999"
    panel.button.click()
    assert "--auto" in used[0] and "-dq" not in used[0]
    panel.widgets["auto"].label = "False"
    assert panel.widgets["delinearization_quantile"].label == "0.95"
    pictures = [panel.image.value]
    for view in ("model", "result"):
        panel.widgets["shown"].label = view
        pictures.append(panel.image.value)
    assert len(set(pictures)) == 3


def test_the_panel_refuses_in_words_what_leaves_no_sky(panel):
    panel, _ = panel
    panel.widgets["threshold_max"].label = "0.0"
    assert "-tM must be" in panel.status
    assert panel.widgets["threshold_max"].label == "1.0"


def test_the_command_knows_all_settings():
    options = vars(build_parser().parse_args(["a.xisf"]))
    for field in fields(bgoptimizer.Settings):
        flag = field.metadata["flag"]
        value = [] if flag == "--auto" else {
            "-df": ["mean"], "-i": ["grid"], "--correction": ["divide"]}.get(flag, ["1"])
        given = vars(build_parser().parse_args(["a.xisf", flag, *value]))
        assert [name for name in given if given[name] != options[name]] in ([field.name], [])
