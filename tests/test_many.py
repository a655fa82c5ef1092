"""Many pictures in one run: a folder, a pattern, and helpers beside this process."""
import csv
import glob
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

import bgoptimizer
from runner import FAST, SCRIPT, command, imports_script, python, refused, run
from scenes import save, sloping_sky, to_planes

DATES = re.compile(rb"20\d\d[-:]\d\d[-:]\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?Z?")

needs_dask = pytest.mark.skipif(
    importlib.util.find_spec("distributed") is None, reason="Dask's distributed is not installed")


def save_as(path, image):
    """Write (h, w, c) in the format that the path's ending names."""
    kind = {".xisf": "xisf", ".fits": "fits", ".tif": "tiff"}[os.path.splitext(path)[1]]
    with open(path, "wb") as file:
        bgoptimizer.FORMATS[kind].write(file, to_planes(image))


@pytest.fixture
def lights(folder):
    """A folder of five good pictures, two broken ones, one that shows no sky, and other things."""
    where = folder / "lights"
    where.mkdir()
    for seed, name in enumerate(("a.xisf", "b.fits", "c.tif", "d.xisf", "f.xisf")):
        save_as(str(where / name), sloping_sky(48, 72, seed=seed)[0])
    noise = np.random.default_rng(0).normal(0.1, 0.01, (8, 12, 3))  # too small to look for a sky
    save(where / "e.xisf", noise.astype(np.float32))
    (where / "broken.xisf").write_bytes(b"XISF0100" + bytes(100))
    whole = (where / "b.fits").read_bytes()
    (where / "cut.fits").write_bytes(whole[:5000])
    (where / "notes.txt").write_text("no picture")
    save(where / ".hidden.xisf", sloping_sky(48, 72)[0])
    save(where / "a_bgModel.xisf", sloping_sky(48, 72)[0])
    return where


def rows_of(folder):
    """The report of a run, by file name."""
    with open(folder / "bgoptimizer_report.csv", newline="") as file:
        return {os.path.basename(row["file"]): row for row in csv.DictReader(file)}


def undated(folder):
    """What the outputs in a folder hold, without the dates of the runs."""
    found = {}
    for name in sorted(os.listdir(folder)):
        if not name.endswith(".csv"):
            found[name] = DATES.sub(b"DATE", (folder / name).read_bytes())
    return found


def assert_same_files(one, other):
    """Compare folders of outputs. pytest itself would look for hours where bytes differ."""
    one, other = undated(one), undated(other)
    assert sorted(one) == sorted(other)
    different = [name for name in one if one[name] != other[name]]
    assert not different


def without_seconds(rows):
    return {name: {**row, "seconds": ""} for name, row in rows.items()}


# ------------------------------------------------------------------------------------ a folder

def test_a_folder_is_done_in_the_order_of_names_and_broken_files_do_not_stop_it(lights, capsys):
    assert run("lights", "out", *FAST) == 1
    said = capsys.readouterr()
    errors = said.err.splitlines()
    rows = rows_of(lights.parent / "out")
    assert list(rows) == ["a.xisf", "b.fits", "broken.xisf", "c.tif", "cut.fits", "d.xisf",
                          "e.xisf", "f.xisf"]
    for name, row in rows.items():
        failed = name in ("broken.xisf", "cut.fits")
        assert (row["outcome"] == "failed") == failed
        told = [line for line in errors if f"failed: lights/{name} " in line]
        assert len(told) == failed
        if not failed:
            assert float(row["seconds"]) > 0 and float(row["clipped"]) >= 0 and row["smoothing"]
    assert float(rows["a.xisf"]["gradient_before"]) > 10 * float(rows["a.xisf"]["gradient_after"])
    assert "8 pictures: " in said.out and "2 failed" in said.out and " s; wrote out" in said.out
    assert said.err.splitlines()[-1].startswith("bgoptimizer: error: 2 of 8 pictures failed; ")
    written = os.listdir(lights.parent / "out")
    assert len(written) == 2 * 6 + 1
    assert {"a_bgModel.xisf", "b_bgModel.fits", "c_bgSubtracted.tif"} < set(written)


def test_a_picture_among_others_gives_the_bytes_that_it_gives_alone(lights):
    run("lights", "out", *FAST, "--quiet")
    for name in ("d.xisf", "c.tif"):
        assert run(lights / name, "alone", *FAST, "--quiet") == 0
    together = undated(lights.parent / "out")
    for name, data in undated(lights.parent / "alone").items():
        assert together[name] == data, name


@pytest.mark.parametrize("where, names", [
    ("lights [Ha]/[ad].x*", ["a.xisf", "d.xisf"]),  # brackets in the name of a folder
    ("lights [[]Ha]/a.xisf", ["a.xisf"]),
    ("lights [Ha]/m31[Ha].xisf", ["m31[Ha].xisf"]),  # in that of a file
    ("lights [Ha]/[bz]*", ["b.fits", "broken.xisf", "z.fits.gz"]),
])
def test_patterns_name_pictures_and_names_may_look_like_patterns(where, names, lights):
    shutil.copy(lights / "a.xisf", lights / "m31[Ha].xisf")
    shutil.copy(lights / "b.fits", lights / "z.fits.gz")
    lights.rename("lights [Ha]")
    assert [os.path.basename(path) for path in bgoptimizer.find_pictures(where)] == names


@pytest.mark.parametrize("where", ["empty", "empty/*.fit", "lights/*.txt", "lights/*_bgModel*"])
def test_where_there_are_no_pictures_is_told_in_a_line(where, lights, capsys):
    (lights.parent / "empty").mkdir()
    assert run(where, "out") == 1
    line = refused(capsys)
    assert where in line and "holds no XISF, FITS or TIFF pictures" in line
    assert not (lights.parent / "out").exists()


def test_of_two_pictures_that_would_write_one_file_the_second_fails_and_the_rest_is_done(
        lights, capsys):
    save_as(str(lights / "d.fits"), sloping_sky(48, 72)[0])
    assert run("lights/[ad].*", "out", "--format", "xisf", *FAST) == 1
    line, *_ = capsys.readouterr().err.splitlines()  # before the first is done
    assert "d.fits" in line and "d.xisf" in line and "d_bgModel.xisf" in line
    outcomes = {name: row["outcome"] for name, row in rows_of(lights.parent / "out").items()}
    assert outcomes == {"a.xisf": "done", "d.fits": "done", "d.xisf": "failed"}


def test_names_that_a_shell_puts_in_the_place_of_a_pattern_are_taken(lights, capsys, monkeypatch):
    names = ["lights/d.xisf", "lights/a.xisf", "lights/a_bgModel.xisf", "lights/notes.txt"]
    assert run(*names, "out", *FAST, "--quiet") == 0
    assert list(rows_of(lights.parent / "out")) == ["a.xisf", "d.xisf"]
    monkeypatch.chdir(lights)
    assert run("a.xisf", "d.xisf", *FAST, "--quiet") == 0
    assert list(rows_of(lights)) == ["a.xisf", "d.xisf"]
    assert run("a.xisf", "absent.xisf", "d.xisf") == 1
    assert "absent.xisf does not exist" in refused(capsys)


def test_what_a_folder_leaves_out_is_told(lights, capsys):
    save(lights / "galaxy_mask.xisf", sloping_sky(48, 72)[0])
    found = bgoptimizer.find_pictures("lights")
    assert len(found) == 8
    assert run("lights", "out", "--figures", "show") == 1
    said = capsys.readouterr().out
    assert "left out by name" in said and "hidden" not in said
    assert ": lights/a_bgModel.xisf, lights/galaxy_mask.xisf, lights/notes.txt\n" in said


def test_a_report_that_cannot_be_written_is_told_before_the_first_picture(lights, capsys):
    (lights.parent / "out" / "bgoptimizer_report.csv").mkdir(parents=True)
    assert run("lights", "out", *FAST) == 1
    assert "bgoptimizer_report.csv is a folder" in refused(capsys)
    assert len(os.listdir(lights.parent / "out")) == 1


def test_the_second_run_on_a_folder_is_refused_and_disturbs_nothing(lights, capsys):
    (lights.parent / "out").mkdir()
    with bgoptimizer.atomic_outputs("out/bgoptimizer_report.csv"):  # as the first one does
        assert run("lights", "out", *FAST) == 1
        assert "is writing out/bgoptimizer_report.csv; wait until it ends" in refused(capsys)
    assert os.listdir(lights.parent / "out") == ["bgoptimizer_report.csv"]


@pytest.mark.parametrize("flags, words", [
    (["-p"], "for one picture; name it, such as lights/a.xisf"),
    (["--figures", "show"], "for one picture"),
    (["-m", "absent.xisf"], "absent.xisf"),
    (["--reference", "absent.xisf"], "absent.xisf")])
def test_what_is_not_for_many_is_refused_in_a_line(flags, words, lights, capsys):
    assert run("lights", "out", *flags) == 1
    assert words in refused(capsys)


def test_one_mask_serves_all_pictures_of_its_size(lights, capsys):
    mask = np.ones((48, 72, 1), np.float32)
    mask[:, :30] = 0
    save(lights / "mask.xisf", mask)
    assert run("lights/[ade]*.xisf", "out", "-m", "lights/mask.xisf", *FAST, "--quiet") == 1
    rows = rows_of(lights.parent / "out")
    for name in ("a.xisf", "d.xisf"):  # they are written, and the report says that they are small
        assert rows[name]["outcome"] == "warned" and "too small" in rows[name]["message"]
    assert rows["e.xisf"]["outcome"] == "failed" and "mask" in rows["e.xisf"]["message"]


def test_skip_done_goes_on_where_a_run_was_and_keeps_its_report(lights, capsys):
    assert run("lights/[acdf].*", "out", *FAST, "--quiet") == 0
    out = lights.parent / "out"
    before = rows_of(out)
    (out / "c_bgModel.tif").unlink()
    later = time.time() + 10
    os.utime(lights / "d.xisf", (later, later))
    kept = (out / "a_bgModel.xisf").stat().st_mtime_ns
    assert run("lights/[acdf].*", "out", *FAST, "--skip-done") == 0
    rows = rows_of(out)
    outcomes = [row["outcome"] for row in rows.values()]
    assert outcomes == ["skipped", "done", "done", "skipped"]
    assert (out / "a_bgModel.xisf").stat().st_mtime_ns == kept
    assert rows["a.xisf"] == {**before["a.xisf"], "outcome": "skipped"}
    assert "4 pictures: 2 done, 2 skipped" in capsys.readouterr().out


def test_a_single_file_can_be_skipped_too(sky, folder, capsys):
    for _ in range(2):
        assert run("sky.xisf", "out", *FAST, "--skip-done") == 0
    assert "1 picture: 1 skipped" in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="signals differ")
@pytest.mark.slow
def test_ctrl_c_between_pictures_leaves_whole_outputs_and_a_report(lights):
    process = subprocess.Popen(
        [sys.executable, "-u", str(SCRIPT), "lights/[abcdf].*", "out", "-dq", "0.999",
         "-e", "3000", "-lr", "1e-5"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (lights.parent / "out/a_bgSubtracted.xisf").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    lines = process.communicate()[1].decode().splitlines()
    errors = [line for line in lines if "warning: " not in line]  # small pictures are warned of
    assert process.returncode == 130 and len(errors) == 1, lines
    done = list(rows_of(lights.parent / "out"))
    assert done[0] == "a.xisf" and len(done) < 5
    assert len(os.listdir(lights.parent / "out")) == 2 * len(done) + 1


def test_what_all_pictures_of_a_folder_need_is_made_once(lights, monkeypatch):
    reads = []
    read = bgoptimizer.read_picture

    def counted_read(path, *others):
        reads.append(os.path.basename(path))
        return read(path, *others)

    monkeypatch.setattr(bgoptimizer, "read_picture", counted_read)
    bgoptimizer._traced_step.cache_clear()
    save(lights.parent / "survey.xisf", sloping_sky(48, 72, seed=9)[0])
    reference = "--reference", "survey.xisf"
    assert run("lights/[abcdf].*", "out", *FAST, *reference, "--quiet") == 0
    assert bgoptimizer._traced_step.cache_info().misses == 1
    assert reads == ["survey.xisf", "a.xisf", "b.fits", "c.tif", "d.xisf", "f.xisf"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_pictures(folder):
    (folder / "lights").mkdir()
    image, _ = sloping_sky()
    for number in range(120):
        save(folder / "lights" / f"{number:03d}.xisf", image)
    program = """
import sys, bgoptimizer
sizes = []
one = bgoptimizer._try_picture
def measured(*arguments):
    outcome = one(*arguments)
    with open("/proc/self/statm") as file:
        sizes.append(int(file.read().split()[1]))
    return outcome
bgoptimizer._try_picture = measured
code = bgoptimizer.main(sys.argv[1:])
print(max(sizes[50:]) / sizes[50])
sys.exit(code)
"""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("this system does not tell the memory of a process")
    options = "--smoothing", "1e4", "-e", "50", "--quiet"
    done = python(program, "lights", "out", *options)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.05


# ------------------------------------------------------------------------------------ workers

def test_without_dask_it_is_told_how_to_install_it(lights, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert run("lights", "out", "--dask", "tcp://127.0.0.1:1") == 1
    assert os.listdir("out") == []  # nothing was done, so no report tells of it
    assert refused(capsys) == ("bgoptimizer: error: --dask needs Dask; install it with: "
                               'python -m pip install "dask[distributed]"')


@pytest.mark.parametrize("flags", [["--jobs", "0"], ["--jobs", "2", "--dask", "tcp://127.0.0.1:1"]])
def test_wrong_jobs_are_wrong_usage(flags, lights, capsys):
    assert run("lights", "out", *flags) == 2
    assert "--jobs" in refused(capsys)


@pytest.mark.slow
def test_jobs_give_the_same_pictures_and_the_same_report(lights):
    one_by_one = command("lights", "out", *FAST)
    jobs = command("lights", "jobs", *FAST, "--jobs", "2")
    assert one_by_one.returncode == jobs.returncode == 1
    expected = one_by_one.stderr.replace("out/", "jobs/")
    assert sorted(jobs.stderr.splitlines()) == sorted(expected.splitlines())
    alone, together = lights.parent / "out", lights.parent / "jobs"
    assert_same_files(alone, together)
    assert without_seconds(rows_of(alone)) == without_seconds(rows_of(together))


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")
def test_what_a_killed_process_was_at_is_done_by_another(lights):
    for number in range(6):
        save(lights / f"g{number}.xisf", sloping_sky(48, 72, seed=number)[0])
    flags = ["-dq", "0.999", "-e", "400"]
    assert command("lights", "out", *flags).returncode == 1
    process = subprocess.Popen(
        [sys.executable, "-u", str(SCRIPT), "lights", "jobs", *flags, "--jobs", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for_pictures(process, lights.parent / "jobs")
    workers = [int(pid) for pid in children(process.pid) if b"spawn_main" in command_line(pid)]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    error = process.communicate()[1].decode()
    assert process.returncode == 1 and "Traceback" not in error, error
    alone, together = lights.parent / "out", lights.parent / "jobs"
    assert_same_files(alone, together)
    assert without_seconds(rows_of(alone)) == without_seconds(rows_of(together))


def wait_for_pictures(process, folder, count=1):
    """Wait until so many pictures are written."""
    while len(glob.glob(f"{folder}/*_bgSubtracted.*")) < count:
        assert process.poll() is None
        time.sleep(0.02)


def children(pid):
    """The processes that a process has started."""
    found = set()
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/children") as file:
            found.update(file.read().split())
    return found


def command_line(pid):
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read()


def runs(pid):
    """Whether a process has not ended; one that nobody has asked for its end has no command."""
    try:
        return command_line(pid) != b""
    except OSError:
        return False


@needs_dask
@pytest.mark.slow
def test_a_scheduler_that_is_there_is_used(lights):
    program = """
if __name__ == "__main__":
    import sys, bgoptimizer
    from distributed import LocalCluster
    with LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=":0") as cluster:
        sys.exit(bgoptimizer.main([*sys.argv[1:], "--dask", cluster.scheduler_address]))
"""
    (lights.parent / "driver.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "driver.py", "lights", "dask", *FAST],
        capture_output=True,
        text=True,
        env=imports_script(),
    )
    assert done.returncode == 1 and "2 of 8 pictures failed" in done.stderr, done.stderr
    assert command("lights", "out", *FAST).returncode == 1
    assert_same_files(lights.parent / "out", lights.parent / "dask")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_jobs_end_with_the_run_and_leave_no_half_files(number, code, lights):
    process = subprocess.Popen(
        [sys.executable, "-u", str(SCRIPT), "lights/[abcdf].*", "out", "-dq", "0.999",
         "-e", "3000", "-lr", "1e-5", "--jobs", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for_pictures(process, lights.parent / "out")
    workers = [int(pid) for pid in children(process.pid) if b"spawn_main" in command_line(pid)]
    assert len(workers) == 2
    process.send_signal(number)
    said = process.communicate()[1].decode()  # until no process writes there any more
    assert process.returncode == code
    assert "Traceback" not in said, said
    deadline = time.monotonic() + 60
    while any(map(runs, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    left = [name for name in os.listdir("out") if name.endswith(".tmp")]
    assert len(left) == (number == signal.SIGKILL)  # that of the report


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no helper of Python's is started first there")
def test_processes_that_die_at_their_start_fail_in_words(lights):
    program = """
import os, sys, bgoptimizer
from multiprocessing import resource_tracker
resource_tracker.ensure_running()
os.environ["PYTHONHOME"] = "/absent"
sys.exit(bgoptimizer.main(sys.argv[1:]))
"""
    done = python(program, "lights/[ad].xisf", "out", *FAST, "--jobs", "2")
    assert done.returncode == 1
    ours = [line for line in done.stderr.splitlines() if line.startswith("bgoptimizer: ")]
    assert len(ours) == 3, done.stderr  # Python complains, too, of this strange folder
    assert "failed: lights/a.xisf: the process that did it has died" in ours[0]
    assert ours[-1].startswith("bgoptimizer: error: 2 of 2 pictures failed")


def dask(*arguments):
    """Start a scheduler, or a worker, as a process of its own."""
    what, *rest = arguments
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(
        [sys.executable, "-m", f"distributed.cli.dask_{what}", "--no-dashboard", *rest], **quiet)


@needs_dask
@pytest.mark.slow
def test_a_scheduler_that_ends_in_the_middle_is_told_in_a_line_and_skip_done_goes_on(lights):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = "127.0.0.1:{}".format(free.getsockname()[1])
    host, port = address.split(":")
    scheduler = dask("scheduler", "--host", host, "--port", port)
    worker = dask("worker", address, "--nthreads", "1", "--local-directory", "scratch")
    arguments = ["lights/[abcdf].*", "out", *FAST]
    try:
        process = subprocess.Popen(
            [sys.executable, "-u", str(SCRIPT), *arguments, "--dask", address],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        wait_for_pictures(process, lights.parent / "out", 2)  # the first is told as well, then
        scheduler.kill()
        said = process.communicate()[1].decode().splitlines()
    finally:
        scheduler.kill()
        worker.terminate()
        worker.wait()
    assert process.returncode == 1
    errors = [line for line in said if "warning: the scheduler" not in line]
    assert len(errors) == 1, said
    assert "the Dask scheduler has ended, after" in errors[0]
    assert "of 5 pictures" in errors[0] and "--skip-done" in errors[0]
    done = rows_of(lights.parent / "out")
    assert 0 < len(done) < 5 and {row["outcome"] for row in done.values()} == {"done"}
    assert command(*arguments, "--skip-done").returncode == 0
    assert len(rows_of(lights.parent / "out")) == 5


@needs_dask
@pytest.mark.slow
def test_a_scheduler_that_is_not_there_is_told_in_a_line(lights, capsys, monkeypatch):
    monkeypatch.setattr(bgoptimizer, "PATIENCE_WITH_SCHEDULER", 1)
    assert run("lights/a.xisf", "out", "--dask", "tcp://127.0.0.1:1") == 1
    assert "no Dask scheduler answers at tcp://127.0.0.1:1 " in refused(capsys)
