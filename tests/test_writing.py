"""What is left of a run that is ended from outside.

These are whole pairs of one run, or nothing.
"""
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import bgoptimizer
from runner import FAST, PAIR, SCRIPT, command, python, refused, run
from scenes import load, save, sloping_sky

SIGNALS = pytest.mark.skipif(os.name == "nt", reason="signals differ")

def handlers():
    """Return what is called at each of the signals that end a run."""
    ending = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    return [signal.getsignal(number) for number in ending]


def write(*paths, data=b"new"):
    with bgoptimizer.atomic_outputs(*map(str, paths)) as files:
        for file in files:
            file.write(data)


def run_of(path):
    """The line of HISTORY that all pictures of one run have in common."""
    return re.search(rb"bgoptimizer [\d.]+, (\S+?Z)", Path(path).read_bytes())[1]


# ------------------------------------------------------------------------------- ended from outside

@SIGNALS
@pytest.mark.slow
@pytest.mark.parametrize("moment, number, code", [
    (b"600 x 400", signal.SIGINT, 130),  # while TensorFlow is imported
    (b"fitting", signal.SIGINT, 130),
    (b"fitting", signal.SIGTERM, 143),
])
def test_a_signal_ends_a_run_with_its_code_one_line_and_no_leftovers(moment, number, code, folder):
    save(folder / "sky.xisf", sloping_sky(400, 600)[0])
    endless = [sys.executable, "-u", str(SCRIPT), "sky.xisf", "out", "-e", "100000", "-dq", "0.999"]
    process = subprocess.Popen(endless, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while moment not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    error = process.communicate()[1].decode()
    assert process.returncode == code
    assert error == "bgoptimizer: error: interrupted; what was not finished was not written\n"
    assert os.listdir(folder / "out") == []


@SIGNALS
@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_the_exit_code_tells_the_signal(name, code, sky, folder, capsys, monkeypatch):
    def signalled(*_):
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(1)

    monkeypatch.setattr(bgoptimizer, "examine", signalled)
    before = handlers()
    assert run("sky.xisf", "out", *FAST) == code
    assert "interrupted" in refused(capsys)
    assert os.listdir("out") == []
    assert before == handlers()


@SIGNALS
def test_a_command_under_nohup_does_not_end_when_the_terminal_closes():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with bgoptimizer._Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            interrupts.check()
    finally:
        signal.signal(signal.SIGHUP, before)


@SIGNALS
def test_a_kill_between_the_names_never_mixes_two_runs(folder):
    write("a.xisf", "b.xisf", data=b"old")
    killed = """
import os, signal, sys, bgoptimizer
rename, calls = os.replace, []
def dies(*names):
    calls.append(names)
    if len(calls) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*names)
os.replace = dies
with bgoptimizer.atomic_outputs("a.xisf", "b.xisf") as files:
    for file in files:
        file.write(b"new")
"""
    for at in ("1", "2"):
        assert python(killed, at).returncode == -signal.SIGKILL
        outputs = [name for name in os.listdir(".") if not name.startswith(".")]
        assert len({Path(name).read_bytes() for name in outputs}) <= 1


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_a_failure_between_the_names_leaves_the_old_pair(failure, at, folder, monkeypatch):
    rename, calls = os.replace, []

    def fails(*names):
        calls.append(names)
        if len(calls) == at:
            raise failure
        rename(*names)

    monkeypatch.setattr(bgoptimizer.os, "replace", fails)
    for before in ([], ["a.xisf"], ["b.xisf"], ["a.xisf", "b.xisf"]):
        for name in before:
            Path(name).write_bytes(b"old " + name.encode())
        calls.clear()
        with pytest.raises((KeyboardInterrupt, bgoptimizer.BgError)):
            write("a.xisf", "b.xisf")
        assert sorted(os.listdir(".")) == before
        for name in before:
            assert Path(name).read_bytes() == b"old " + name.encode()
            os.unlink(name)


def test_a_folder_in_the_place_of_an_output_stays(folder):
    write("a.xisf", data=b"old")
    os.mkdir("b.xisf")
    with pytest.raises(bgoptimizer.BgError, match="cannot write to .: Is a directory"):
        write("a.xisf", "b.xisf")
    assert sorted(os.listdir(".")) == ["a.xisf", "b.xisf"]
    assert Path("a.xisf").read_bytes() == b"old"


def test_files_are_on_the_disk_before_they_get_their_names(folder, monkeypatch):
    done = []

    def note(name):
        real = getattr(os, name)

        def noted(*arguments):
            done.append(name)
            return real(*arguments)

        monkeypatch.setattr(bgoptimizer.os, name, noted)

    note("fsync")
    note("replace")
    write("a.xisf", "b.xisf")
    assert done == ["fsync", "fsync", "replace", "replace"]


@SIGNALS
@pytest.mark.slow
def test_runs_killed_at_any_moment_leave_whole_pairs(folder):
    save(folder / "sky.xisf", sloping_sky(40, 60)[0])
    kept = (folder / "sky.xisf").read_bytes()
    arguments = [sys.executable, str(SCRIPT), "sky.xisf", "out", *FAST]
    started = time.perf_counter()
    assert subprocess.run(arguments, stdout=subprocess.DEVNULL).returncode == 0
    whole = time.perf_counter() - started
    for part, number in ((0.6, signal.SIGKILL), (0.8, signal.SIGTERM), (0.9, signal.SIGKILL)):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(part * whole)
        process.send_signal(number)
        process.wait()
        assert len({run_of(f"out/{name}") for name in PAIR}) == 1
    assert (folder / "sky.xisf").read_bytes() == kept


def test_of_two_runs_at_once_the_last_one_writes_whole_files(folder):
    with bgoptimizer.atomic_outputs("a.xisf") as (file,):
        file.write(b"last")
        write("a.xisf", data=b"first, and longer")
        assert (folder / "a.xisf").read_bytes() == b"first, and longer"
    assert (folder / "a.xisf").read_bytes() == b"last"
    assert os.listdir(".") == ["a.xisf"]


def test_the_pictures_of_a_run_tell_that_they_belong_together(sky, folder):
    for _ in range(2):
        before = run_of(PAIR[0]) if os.path.exists(PAIR[0]) else None
        assert run("sky.xisf", *FAST, "--save-mask") == 0
        runs = {run_of(name) for name in [*PAIR, "sky_mask.xisf"]}
        assert len(runs) == 1 and before not in runs


# ------------------------------------------------------------------------------------ names

@pytest.mark.parametrize("name", [*PAIR, "sky_figures.png"])
def test_a_folder_named_like_an_output_is_found_before_the_fit(
        name, sky, folder, capsys, monkeypatch):
    monkeypatch.setattr(bgoptimizer, "examine", None)
    os.makedirs(f"out/{name}")
    assert run("sky.xisf", "out", *FAST, "--figures", "save") == 1
    assert "is a folder" in refused(capsys)
    assert os.listdir("out") == [name]


def test_names_as_long_as_the_system_takes_can_be_written(folder):
    write("m" * 250 + ".tif")
    assert len(os.listdir(".")) == 1


# ------------------------------------------------------------------------------ the same everywhere

@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or os.cpu_count() < 2,
    reason="one processor",
)
def test_the_same_bytes_come_from_any_number_of_threads(folder):
    save(folder / "sky.xisf", sloping_sky(192, 288)[0])
    allowed = os.sched_getaffinity(0)
    written = []
    try:
        for processors in (allowed, {min(allowed)}):
            os.sched_setaffinity(0, processors)
            threads = {
                **os.environ,
                "OPENBLAS_NUM_THREADS": str(len(processors)),
                "TF_NUM_INTRAOP_THREADS": str(4 * len(processors)),
            }
            options = "-dx", "1", "-e", "12", "-B", "16", "-dq", "0.999"
            done = command("sky.xisf", "out", *options, env=threads)
            assert done.returncode == 0, done.stderr
            written.append([load(f"out/{name}").tobytes() for name in PAIR])
    finally:
        os.sched_setaffinity(0, allowed)
    assert written[0] == written[1]


def test_history_tells_the_versions_as_pip_takes_them(sky, folder):
    assert run("sky.xisf", *FAST) == 0
    text = Path(PAIR[0]).read_bytes()[:30_000].decode("utf-8", "replace")
    assert f"bgoptimizer: Python {sys.version.split()[0]}" in text
    assert f"bgoptimizer: numpy=={np.__version__}" in text
    assert re.search(r"bgoptimizer: tensorflow==[\d.]+\d", text)


def test_no_requirement_forbids_what_nobody_has_seen_fail():
    lines = (SCRIPT.parent / "requirements.txt").read_text().splitlines()
    wanted = [line.split("#")[0].split(";")[0].strip() for line in lines]
    bounded = {line.split()[0] for line in wanted if re.search("<|~=|==", line)}
    assert bounded == {"tensorflow"}  # tensorflow-addons and Python 3.8 need an old one


def test_nothing_says_that_the_package_index_has_this_tool():
    for name in (
            "README.md", "bgoptimizer_colab.ipynb", "pyproject.toml", "requirements.txt",
            "bgoptimizer.py",
    ):
        text = (SCRIPT.parent / name).read_text(encoding="utf-8")
        assert not re.search(r"(pip|pipx) install (-\S+ )*bgoptimizer(?!\.)", text), name


# ---------------------------------------------------------------------------------- short of memory

@pytest.mark.parametrize("error", [
    MemoryError(), OSError(12, "Cannot allocate memory"), RuntimeError("std::bad_alloc"),
    ImportError("libx.so.2: failed to map segment from shared object"),
    RuntimeError("can't start new thread"),
])
def test_every_failure_for_want_of_memory_says_memory(error, sky, folder, capsys, monkeypatch):
    def fails(*_):
        raise error
    for stage in ("read_picture", "examine", "_new_header"):
        with monkeypatch.context() as patch:
            patch.setattr(bgoptimizer, stage, fails)
            assert run("sky.xisf", "out", *FAST) == 1
            said = refused(capsys)
            assert "memory" in said and "install" not in said and "bug" not in said, stage
    assert os.listdir("out") == []


def test_tensorflow_that_has_no_room_is_not_to_be_installed_again(folder, monkeypatch):
    def fails(_):
        raise ImportError("libtensorflow_cc.so.2: failed to map segment from shared object")
    monkeypatch.setattr(bgoptimizer.importlib, "import_module", fails)
    with pytest.raises(ImportError) as error:
        bgoptimizer.import_tensorflow()
    assert bgoptimizer.lacks_memory(error.value)


@SIGNALS
def test_a_reader_of_our_lines_who_leaves_is_no_full_disk(sky, folder):
    command = f"{sys.executable} {SCRIPT} sky.xisf out --figures none -dx 4 -e 20 | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "cannot write" not in done.stderr and "Traceback" not in done.stderr
    assert [name for name in os.listdir("out") if name.startswith(".")] == []
