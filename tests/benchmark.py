#!/usr/bin/env python3
"""How long the tool takes, stage by stage, and how much memory; beside it the same work done plainly.

    python tests/benchmark.py                          # 6 Mpix, with the plain version: two minutes
    python tests/benchmark.py --sizes 6 24 61          # the README's table: half an hour, most of it the plain version
    python tests/benchmark.py --sizes 6 --no-plain --folder 10 -- --auto  # also a folder of ten, one by one and in jobs
    python tests/benchmark.py --no-plain --points 32 64 128 256 --factors 4 8 16

Each row is a process of its own, on a picture of noise, stars and a bent sky, Float32 RGB in and out. "Plain" is what
one would write first: xisf to read and write, block_reduce with nanmedian, Keras' `fit` over all reduced pixels for all
epochs on positions and raw coefficients, the surface from the same layer in chunks of full-size pixels.
"""
import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

SIZES = {1: (800, 1200), 6: (2000, 3000), 24: (4000, 6000), 61: (6376, 9568)}  # Mpix -> (height, width)
STAGES = ("import", "read", "stretch", "reduce", "fit", "surface", "write")


def make_picture(path, shape, seed=0):
    """Write an RGB picture of this (height, width)."""
    import bgoptimizer
    rng = np.random.default_rng(seed)
    y, x = ((np.arange(n, dtype=np.float32) + 0.5) / max(shape) for n in shape)
    planes = np.empty((3,) + shape, np.float32)
    for k, plane in enumerate(planes):
        glow = np.exp(-((x - 0.2 * k)**2 + (y[:, None] - 0.1)**2) / 0.1)
        plane[:] = 0.04 + 0.01 * k + 0.02 * y[:, None] * x + 0.03 * glow
        plane += 0.001 * rng.standard_normal(shape, np.float32)
        plane[rng.integers(0, shape[0], 5000), rng.integers(0, shape[1], 5000)] = 0.9
    with open(path, "wb") as file:
        bgoptimizer.write_xisf(file, planes)


def run_ours(path, folder, flags):
    """The command with a clock around each stage -> seconds by stage. Import runs beside read, stretch and reduce."""
    import bgoptimizer
    seconds, running = dict.fromkeys(STAGES, 0.0), threading.local()

    def clocked(stage, name):
        function = getattr(bgoptimizer, name)

        def wrapper(*arguments, **keywords):
            if getattr(running, "stage", None):  # called from inside another stage
                return function(*arguments, **keywords)
            running.stage, started = stage, time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                seconds[stage] += time.perf_counter() - started
                running.stage = None
        setattr(bgoptimizer, name, wrapper)

    for stage, name in (("import", "_import_silently"), ("read", "read_xisf"), ("stretch", "measure_stretch"),
                        ("reduce", "reduce_plane"), ("fit", "fit_surface"), ("surface", "full_size_sky"),
                        ("surface", "subtract"), ("write", "write_xisf")):
        clocked(stage, name)
    code = bgoptimizer.main([path, folder, "-i", "grid", "--quiet", *flags])
    if code:
        raise SystemExit(code)
    return seconds


def run_plain(path, folder, flags):
    """The same work, written down as it comes to mind -> seconds by stage."""
    options = dict(zip(flags[::2], flags[1::2]))
    count, factor, epochs = int(options.get("-N", 32)), int(options.get("-dx", 8)), int(options.get("-e", 1000))
    seconds, clock = {}, time.perf_counter()

    def lap(stage):
        nonlocal clock
        seconds[stage], clock = time.perf_counter() - clock, time.perf_counter()

    import tensorflow as tf
    from skimage.measure import block_reduce
    from xisf import XISF
    lap("import")
    image = XISF(path).read_image(0).astype(np.float32)  # (h, w, c)
    lap("read")
    low = image.min((0, 1))
    scale = np.quantile(image - low, 0.95, axis=(0, 1))
    stretched = np.clip((image - low) / scale, 0, 1)
    m = np.median(stretched, (0, 1))
    stretched = ((1 - m) * stretched / ((1 - 4 * m) * stretched + 3 * m)).astype(np.float32)
    lap("stretch")
    reduced = block_reduce(stretched, (factor, factor, 1), np.nanmedian, cval=np.nan).astype(np.float32)
    del stretched
    lap("reduce")

    class Surface(tf.keras.layers.Layer):
        def __init__(self):
            super().__init__()
            rows = int(np.sqrt(count))
            sides = np.linspace(0.1, 0.9, rows), np.linspace(0.1, 0.9, count // rows)
            grid = np.stack(np.meshgrid(*sides), -1).reshape(-1, 2)
            constant = tf.keras.initializers.Constant
            self.positions = self.add_weight(name="p", shape=grid.shape, initializer=constant(grid))
            self.weights_ = self.add_weight(name="w", shape=(len(grid), 3), initializer="zeros")
            flat = constant([[0] * 3, [0] * 3, [0.25] * 3])
            self.plane = self.add_weight(name="v", shape=(3, 3), initializer=flat)

        def call(self, query):
            squared = (tf.reduce_sum(query**2, 1, keepdims=True) - 2 * query @ tf.transpose(self.positions)
                       + tf.reduce_sum(self.positions**2, 1))
            squared = tf.maximum(squared, 1e-10)
            kernel = 0.5 * squared * tf.math.log(squared)
            return kernel @ self.weights_ + tf.concat([query, tf.ones_like(query[:, :1])], 1) @ self.plane

    def loss(truth, model):
        r = truth - model
        error = tf.reduce_mean(tf.abs(r), -1) + tf.math.reduce_variance(r, -1)
        penalty = tf.reduce_mean(tf.abs(r) - r, -1) + tf.reduce_mean(tf.abs(model) - model, -1)
        return tf.reduce_mean(tf.math.log(0.001 + error + 5 * penalty))

    query = np.stack(np.meshgrid(*(np.linspace(0, 1, n) for n in reduced.shape[:2]), indexing="ij"), -1)
    query = query.reshape(-1, 2).astype(np.float32)
    model = tf.keras.Sequential([tf.keras.Input((2,)), Surface()])
    model.compile(tf.keras.optimizers.Adam(0.001), loss)
    model.fit(query, reduced.reshape(-1, 3), batch_size=len(query), epochs=epochs, shuffle=False, verbose=0)
    lap("fit")
    columns = np.linspace(0, 1, image.shape[1], dtype=np.float32)
    sky = np.empty_like(image)
    step = max(1, 500_000 // image.shape[1])
    for top in range(0, image.shape[0], step):
        rows = np.linspace(0, 1, image.shape[0], dtype=np.float32)[top:top + step]
        part = model(np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)).numpy()
        part = 3 * m * part / ((1 - m) - (1 - 4 * m) * part) * scale + low
        sky[top:top + step] = part.reshape(len(rows), -1, 3)
    subtracted = np.clip(image - sky + np.median(sky, (0, 1)), 0, 1)
    lap("surface")
    XISF.write(os.path.join(folder, "model.xisf"), sky)
    XISF.write(os.path.join(folder, "subtracted.xisf"), subtracted)
    lap("write")
    return seconds


def measure(which, path, flags):
    """Run a version in a process of its own -> its seconds by stage, "total" and "memory" (GB)."""
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder:
        started = time.perf_counter()
        alone = [sys.executable, str(HERE), "--one", which, path, folder, "--", *flags]
        done = subprocess.run(alone, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if done.returncode:
            raise SystemExit(done.stderr.decode())
        return {**json.loads(done.stdout.splitlines()[-1]), "total": time.perf_counter() - started}


def run_one(which, path, folder, flags):
    import resource
    seconds = {"ours": run_ours, "plain": run_plain, "preview": run_ours}[which](path, folder, flags)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    print(json.dumps({**seconds, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}))


def row(name, result, ratio=None):
    cells = [name] + [f"{result[stage]:.2f}" for stage in STAGES]
    cells += [f"{result['total']:.1f}", f"{result['memory']:.2f}", f"{ratio:.1f}x" if ratio else ""]
    print("| " + " | ".join(cells) + " |", flush=True)


def measure_folder(folder, flags):
    """The command on a folder, in a process of its own -> seconds, and the largest process in GB."""
    import resource
    with tempfile.TemporaryDirectory() as results:
        started = time.perf_counter()
        alone = [sys.executable, str(HERE.parent.parent / "bgoptimizer.py"), folder, results, "--quiet", *flags]
        subprocess.run(alone, check=True, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e9


def folder_rows(size, count, flags):
    """A table of folders of `count` pictures: one by one, and where Dask is installed in as many jobs as cores."""
    from importlib.util import find_spec
    print(f"\n| folder of {count} x {size} Mpix | a picture (s) | pictures a minute | total (s) | peak of a process (GB) |")
    print("|---" * 5 + "|")
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            make_picture(os.path.join(folder, f"{number}.xisf"), SIZES[size], seed=number)
        jobs = ["--jobs", str(os.cpu_count())]
        for more in ([], jobs) if find_spec("distributed") else ([],):
            seconds, memory = measure_folder(folder, [*flags, *more])
            name = " ".join(more) or "one by one"
            print(f"| {name} | {seconds / count:.2f} | {60 * count / seconds:.1f} | {seconds:.1f} | {memory:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", choices=sorted(SIZES), default=[6],
                        help="megapixels (default: 6)")
    parser.add_argument("--points", type=int, nargs="*", default=[], help="also a row per -N, at the first size")
    parser.add_argument("--factors", type=int, nargs="*", default=[], help="also a row per -dx, at the first size")
    parser.add_argument("--folder", type=int, metavar="N", help="also a folder of N pictures, of the first size")
    parser.add_argument("--no-plain", action="store_true", help="leave the plain version out")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help="after --: flags for every run, such as -e 100")
    options = parser.parse_args()
    if options.one:
        return run_one(*options.one, options.flags)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
          f"Python {platform.python_version()}, {platform.system()}\n")
    print("| run | " + " | ".join(f"{stage} (s)" for stage in STAGES) + " | total (s) | peak (GB) | plain / ours |")
    print("|---" * (len(STAGES) + 4) + "|")
    with tempfile.TemporaryDirectory() as folder:
        for number, size in enumerate(options.sizes):
            path = os.path.join(folder, f"{size}.xisf")
            make_picture(path, SIZES[size])
            ours = measure("ours", path, options.flags)
            row(f"{size} Mpix", ours)
            row(f"{size} Mpix, --preview", measure("preview", path, ["-p", "--figures", "save", *options.flags]))
            if not options.no_plain:
                plain = measure("plain", path, options.flags)
                row(f"{size} Mpix, plain", plain, plain["total"] / ours["total"])
            for flag, values in (("-N", options.points), ("-dx", options.factors)) if number == 0 else ():
                for value in values:
                    row(f"{size} Mpix, {flag} {value}", measure("ours", path, [flag, str(value), *options.flags]))
            os.unlink(path)
    if options.folder:
        folder_rows(options.sizes[0], options.folder, options.flags)


if __name__ == "__main__":
    main()
