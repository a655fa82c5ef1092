#!/usr/bin/env python3
"""How long the tool takes, stage by stage, and how much memory; and the same work done plainly.

    python tests/benchmark.py                    # 6 Mpix, with the plain version: two minutes
    python tests/benchmark.py --sizes 6 24 61    # the README's table: half an hour, mostly plain
    python tests/benchmark.py --no-plain --points 32 64 128 256 --factors 4 8 16

    # also a folder of ten, one by one and in jobs
    python tests/benchmark.py --sizes 6 --no-plain --folder 10 -- --auto

Each row is a process of its own, on a picture of noise, stars and a bent sky, Float32 RGB in and
out. "Plain" is what one would write first: xisf to read and write, block_reduce with nanmedian,
Keras' `fit` over all reduced pixels for all epochs on positions and raw coefficients, the surface
from the same layer in chunks of full-size pixels.
"""
import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# The threads that the script allows its libraries; here NumPy comes first. The plain version has
# the same.
for variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"):
    os.environ[variable] = "1"

import numpy as np  # noqa: E402

HERE = Path(__file__).resolve()
SCRIPT = HERE.parent.parent / "bgoptimizer.py"
sys.path.insert(0, str(SCRIPT.parent))

SIZES = {1: (800, 1200), 6: (2000, 3000), 24: (4000, 6000), 61: (6376, 9568)}  # Mpix: (h, w)
STAGES = ("import", "read", "stretch", "reduce", "fit", "surface", "write")
FUNCTIONS = {  # what bgoptimizer calls, and the stage that it belongs to
    "_import_silently": "import",
    "read_picture": "read",
    "measure_stretches": "stretch",
    "reduce_plane": "reduce",
    "fit_surface": "fit",
    "take_out": "surface",
    "write_outputs": "write",
}
CHUNK = 500_000  # full-size pixels whose surface the plain version computes at once


def make_picture(path, shape, seed=0):
    """Write an RGB picture of this (height, width).

    It takes more memory than the tool does, and on Linux a process starts with the peak of the one
    that started it as its own: so this is done in a process that starts no other.
    """
    process = multiprocessing.get_context("spawn").Process(
        target=_make_picture,
        args=(path, shape, seed),
    )
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"benchmark.py: error: could not make {path}")


def _make_picture(path, shape, seed):
    import bgoptimizer
    rng = np.random.default_rng(seed)
    height, width = shape
    longer = max(shape)
    y = (np.arange(height, dtype=np.float32)[:, None] + 0.5) / longer  # (h, 1)
    x = (np.arange(width, dtype=np.float32) + 0.5) / longer  # (w,)
    planes = np.empty((3, height, width), np.float32)
    for k, plane in enumerate(planes):
        squared_distance = (x - 0.2 * k)**2 + (y - 0.1)**2
        glow = np.exp(-squared_distance / 0.1)
        plane[:] = 0.04 + 0.01 * k + 0.02 * y * x + 0.03 * glow
        plane += 0.001 * rng.standard_normal(shape, np.float32)
        rows = rng.integers(0, height, 5000)
        columns = rng.integers(0, width, 5000)
        plane[rows, columns] = 0.9  # stars
    with open(path, "wb") as file:
        bgoptimizer.write_xisf(file, planes)


def run_ours(path, folder, flags):
    """Run the command with a clock around each stage; returns seconds by stage.

    Import runs beside read, stretch and reduce.
    """
    import bgoptimizer
    seconds = dict.fromkeys(STAGES, 0.0)
    running = threading.local()

    def clocked(function, stage):
        def wrapper(*arguments, **keywords):
            if getattr(running, "stage", None):  # called from inside another stage
                return function(*arguments, **keywords)
            running.stage = stage
            started = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                seconds[stage] += time.perf_counter() - started
                running.stage = None

        return wrapper

    for name, stage in FUNCTIONS.items():
        function = getattr(bgoptimizer, name)
        setattr(bgoptimizer, name, clocked(function, stage))
    code = bgoptimizer.main([path, folder, "-i", "grid", "--quiet", *flags])
    if code:
        raise SystemExit(code)
    return seconds


def run_plain(path, folder, flags):
    """Do the same work, written down as it comes to mind; returns seconds by stage."""
    options = dict(zip(flags[::2], flags[1::2]))
    points = int(options.get("-N", 32))
    factor = int(options.get("-dx", 8))
    epochs = int(options.get("-e", 1000))
    seconds = {}
    lap_started = time.perf_counter()

    def lap(stage):
        nonlocal lap_started
        now = time.perf_counter()
        seconds[stage] = now - lap_started
        lap_started = now

    import tensorflow as tf
    from skimage.measure import block_reduce
    from xisf import XISF
    lap("import")

    image = XISF(path).read_image(0).astype(np.float32)  # (h, w, c)
    height, width, _ = image.shape
    lap("read")

    low = image.min((0, 1))
    scale = np.quantile(image - low, 0.95, axis=(0, 1))
    clipped = np.clip((image - low) / scale, 0, 1)
    m = np.median(clipped, (0, 1))  # it goes to a quarter
    stretched = (1 - m) * clipped / ((1 - 4 * m) * clipped + 3 * m)
    stretched = stretched.astype(np.float32)
    del clipped
    lap("stretch")

    reduced = block_reduce(stretched, (factor, factor, 1), np.nanmedian, cval=np.nan)
    reduced = reduced.astype(np.float32)
    del stretched
    lap("reduce")

    query = plain_places(*(np.linspace(0, 1, length) for length in reduced.shape[:2]))
    surface = plain_surface(tf, points)
    surface.fit(
        query,
        reduced.reshape(-1, 3),
        batch_size=len(query),
        epochs=epochs,
        shuffle=False,
        verbose=0,
    )
    lap("fit")

    rows = np.linspace(0, 1, height, dtype=np.float32)
    columns = np.linspace(0, 1, width, dtype=np.float32)
    sky = np.empty_like(image)
    step = max(1, CHUNK // width)
    for top in range(0, height, step):
        strip = slice(top, top + step)
        part = surface(plain_places(rows[strip], columns)).numpy()
        linear = 3 * m * part / ((1 - m) - (1 - 4 * m) * part)
        sky[strip] = (linear * scale + low).reshape(-1, width, 3)
    subtracted = np.clip(image - sky + np.median(sky, (0, 1)), 0, 1)
    lap("surface")

    XISF.write(os.path.join(folder, "model.xisf"), sky)
    XISF.write(os.path.join(folder, "subtracted.xisf"), subtracted)
    lap("write")
    return seconds


def plain_places(rows, columns):
    """Return where these rows and columns cross, (n, 2) float32."""
    crossings = np.meshgrid(rows, columns, indexing="ij")
    return np.stack(crossings, -1).reshape(-1, 2).astype(np.float32)


def plain_surface(tf, points):
    """Return a Keras model of the sky, (n, 2) -> (n, 3), ready to be fitted."""
    constant = tf.keras.initializers.Constant

    class Surface(tf.keras.layers.Layer):
        def __init__(self):
            super().__init__()
            count = int(np.sqrt(points))
            rows = np.linspace(0.1, 0.9, count)
            columns = np.linspace(0.1, 0.9, points // count)
            grid = np.stack(np.meshgrid(rows, columns), -1).reshape(-1, 2)
            flat = [[0] * 3, [0] * 3, [0.25] * 3]
            self.positions = self.add_weight(
                name="p",
                shape=grid.shape,
                initializer=constant(grid),
            )
            self.weights_ = self.add_weight(
                name="w",
                shape=(len(grid), 3),
                initializer="zeros",
            )
            self.plane = self.add_weight(
                name="v",
                shape=(3, 3),
                initializer=constant(flat),
            )

        def call(self, query):
            of_query = tf.reduce_sum(query**2, 1, keepdims=True)  # (n, 1)
            of_points = tf.reduce_sum(self.positions**2, 1)  # (points,)
            squared = of_query - 2 * query @ tf.transpose(self.positions) + of_points
            squared = tf.maximum(squared, 1e-10)
            kernel = 0.5 * squared * tf.math.log(squared)  # (n, points)
            ones = tf.ones_like(query[:, :1])
            terms = tf.concat([query, ones], 1)  # (n, 3)
            return kernel @ self.weights_ + terms @ self.plane

    def twice_negative(values):
        return tf.reduce_mean(tf.abs(values) - values, -1)

    def loss(truth, model):
        residual = truth - model
        error = tf.reduce_mean(tf.abs(residual), -1) + tf.math.reduce_variance(residual, -1)
        penalty = twice_negative(residual) + twice_negative(model)
        return tf.reduce_mean(tf.math.log(0.001 + error + 5 * penalty))

    model = tf.keras.Sequential([tf.keras.Input((2,)), Surface()])
    model.compile(tf.keras.optimizers.Adam(0.001), loss)
    return model


def run_folder(folder, results, flags):
    """Run the command on a folder of pictures; returns the seconds in "total"."""
    started = time.perf_counter()
    alone = [sys.executable, str(SCRIPT), folder, results, "--quiet", *flags]
    subprocess.run(alone, check=True, stderr=subprocess.DEVNULL)
    return {"total": time.perf_counter() - started}


def measure(which, path, flags):
    """Run a version in a process of its own; returns its seconds by stage, "total" and "memory".

    Memory is the peak of the process, of a folder that of the largest of its processes, in GB.
    """
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as results:
        started = time.perf_counter()
        alone = [sys.executable, str(HERE), "--one", which, path, results, "--", *flags]
        done = subprocess.run(alone, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        total = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(done.stderr.decode())
    last_line = done.stdout.splitlines()[-1]
    return {"total": total, **json.loads(last_line)}


def run_one(which, path, results, flags):
    """Run a version in this process, which `measure` started, and print what it took as JSON."""
    import resource
    run = {"ours": run_ours, "plain": run_plain, "folder": run_folder}[which]
    measured = run(path, results, flags)
    # A folder is done by a process below this one, and with --jobs by others below that.
    who = resource.RUSAGE_CHILDREN if which == "folder" else resource.RUSAGE_SELF
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    measured["memory"] = resource.getrusage(who).ru_maxrss * unit / 1e9
    print(json.dumps(measured))


def table_row(*cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def table_head(*cells):
    table_row(*cells)
    print("|---" * len(cells) + "|")


def run_row(name, result, ratio=""):
    seconds = [f"{result[stage]:.2f}" for stage in STAGES]
    table_row(name, *seconds, f"{result['total']:.1f}", f"{result['memory']:.2f}", ratio)


def size_rows(size, options, first):
    """Print the rows of a picture of this size; of the first size also those of other settings."""
    name = f"{size} Mpix"
    flags = options.flags
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f"{size}.xisf")
        make_picture(path, SIZES[size])
        ours = measure("ours", path, flags)
        run_row(name, ours)
        preview = measure("ours", path, ["-p", "--figures", "save", *flags])
        run_row(f"{name}, --preview", preview)
        if not options.no_plain:
            plain = measure("plain", path, flags)
            ratio = plain["total"] / ours["total"]
            run_row(f"{name}, plain", plain, f"{ratio:.1f}x")
        if not first:
            return
        others = [("-N", str(value)) for value in options.points]
        others += [("-dx", str(value)) for value in options.factors]
        for flag, value in others:
            run_row(f"{name}, {flag} {value}", measure("ours", path, [flag, value, *flags]))


def folder_rows(size, count, flags):
    """Print a table of folders of `count` pictures.

    They are done one by one, and where Dask is installed in as many jobs as there are cores.
    """
    print()
    table_head(
        f"folder of {count} x {size} Mpix",
        "a picture (s)",
        "pictures a minute",
        "total (s)",
        "peak of a process (GB)",
    )
    ways = [[]]
    if find_spec("distributed"):
        ways.append(["--jobs", str(os.cpu_count())])
    with tempfile.TemporaryDirectory() as temporary:
        folder = os.path.join(temporary, "lights")
        os.mkdir(folder)
        for number in range(count):
            make_picture(os.path.join(folder, f"{number}.xisf"), SIZES[size], seed=number)
        for jobs in ways:
            result = measure("folder", folder, [*flags, *jobs])
            seconds = result["total"]
            table_row(
                " ".join(jobs) or "one by one",
                f"{seconds / count:.2f}",
                f"{60 * count / seconds:.1f}",
                f"{seconds:.1f}",
                f"{result['memory']:.2f}",
            )


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        choices=sorted(SIZES),
        default=[6],
        help="megapixels (default: 6)",
    )
    parser.add_argument(
        "--points",
        type=int,
        nargs="*",
        default=[],
        help="also a row per -N, at the first size",
    )
    parser.add_argument(
        "--factors",
        type=int,
        nargs="*",
        default=[],
        help="also a row per -dx, at the first size",
    )
    parser.add_argument(
        "--folder",
        type=int,
        metavar="N",
        help="also a folder of N pictures, of the first size",
    )
    parser.add_argument("--no-plain", action="store_true", help="leave the plain version out")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help="after --: flags for every run, such as -e 100")
    return parser


def main():
    options = build_parser().parse_args()
    if options.one:
        which, path, results = options.one
        return run_one(which, path, results, options.flags)
    processor = platform.processor() or platform.machine()
    version = platform.python_version()
    print(f"{processor}, {os.cpu_count()} cores, Python {version}, {platform.system()}\n")
    stages = [f"{stage} (s)" for stage in STAGES]
    table_head("run", *stages, "total (s)", "peak (GB)", "plain / ours")
    for number, size in enumerate(options.sizes):
        size_rows(size, options, first=number == 0)
    if options.folder:
        folder_rows(options.sizes[0], options.folder, options.flags)


if __name__ == "__main__":
    main()
