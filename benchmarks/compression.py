"""How fast vectors are compressed and read back on one core, how small they get, and how far that is from memory's limit.

    python -m benchmarks.compression [--megabytes 64] [--repeats 3] [--only KIND] [--cpu-time]

MB/s counts the float32 bytes of the vector. `of bound` is the share of what the memory could do: the bytes that have to be
read and written once (vector, residual and what is kept, four bytes an element each; the wire), at the speed of a large copy
in the same run. What touches only what was sent (`add` of sparse forms) may exceed it. `wire` is the size that travels, as a
share of the vector's. The best of the repeats is printed. The vector has standard normal elements and blocks of different
magnitudes; the residual is a tenth as large. --cpu-time counts the time that the thread ran, for a machine that is busy.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from p2pcoord.compression import compressor
from p2pcoord.compression.packing import pack, unpack
from p2pcoord.compression.quantization import quantize
from p2pcoord.compression.sparsification import largest

SUBJECTS = [
    ("none", {}),
    *(("quantization", {"bits": bits}) for bits in (1, 2, 3, 4, 8)),
    *(("quantization", {"bits": bits, "stochastic": True}) for bits in (4, 8)),
    ("quantization", {"bits": 4, "block": 32}),
    *(("top_k", {"ratio": ratio}) for ratio in (0.001, 0.01, 0.1, 0.5)),
    ("top_k", {"ratio": 0.01, "accumulate_residuals": False}),
    ("random_k", {"sparsity": 0.99}),
    ("random_k", {"sparsity": 0.9, "unbiased": True}),
    *(
        ("adaptive", {"min_bits": 2, "max_bits": 8, "target_ratio": 0.125, "importance_metric": metric})
        for metric in ("norm", "variance")
    ),
    ("composition", {"stages": [("top_k", {"ratio": 0.01}), ("quantization", {"bits": 4})]}),
]


def best_seconds(repeats: int, clock: Callable[[], float], work: Callable[[], object]) -> float:
    """The shortest of some runs: what the code takes when nothing else runs."""
    times = []
    for _ in range(repeats + 1):  # the first also touches pages
        begin = clock()
        work()
        times.append(clock() - begin)
    return min(times[1:])


def repeated(times: int, work: Callable[..., object], *of: object) -> None:
    """A tile's work, for as many tiles as a vector has."""
    for _ in range(times):
        work(*of)


def spoken(options: dict[str, object]) -> str:
    """Options on one line."""
    if "stages" in options:
        return " > ".join(f"{kind} {spoken(inner)}" for kind, inner in options["stages"])
    return " ".join(f"{name}={value}" for name, value in options.items())


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--megabytes", type=int, default=64, help="size of the vector")
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--only", default="", help="a kind")
    arguments.add_argument("--cpu-time", action="store_true", help="not the wall's")
    given = arguments.parse_args()
    clock = time.thread_time if given.cpu_time else time.perf_counter

    count = given.megabytes * 250_000
    random = np.random.default_rng(0)
    vector, residual = (random.standard_normal(count, np.float32) for _ in range(2))
    vector *= np.repeat(np.exp(random.standard_normal(-(-count // 4096), np.float32)), 4096)[:count]
    residual *= np.float32(0.1)
    out = np.empty_like(vector)
    copied = 2 * given.megabytes / best_seconds(given.repeats, clock, lambda: np.copyto(out, vector))
    print(
        f"{given.megabytes} MB, one core, best of {given.repeats}; memcpy {copied:.0f} MB/s (read and written)"
    )
    print(f"{'operation':<78}{'MB/s':>7}{'of bound':>10}{'wire':>9}")

    def show(name: str, touched: float, work: Callable[..., object], *of: object, wire: str = "") -> None:
        """`touched` bytes an element, of its four."""
        speed = given.megabytes / best_seconds(given.repeats, clock, partial(work, *of))
        print(f"{name:<78}{speed:>7.0f}{speed * touched / 4 / copied:>10.2f}{wire:>9}", flush=True)

    if not given.only:
        tiles = vector[: count - count % (1 << 15)].reshape(-1, 128, 256)
        steps, rows = np.empty(128, np.uint16), np.empty((128, 256), np.float32)

        def all_tiles() -> None:
            for tile in tiles:
                np.copyto(rows, tile)
                quantize(rows, 4, steps, None)

        show("quantize alone, 4 bits, tile by tile", 5, all_tiles)
        for bits in (1, 3, 4, 7):
            codes = random.integers(0, 1 << bits, 1 << 15, np.uint8)
            packed = pack(codes, bits)
            show(f"pack alone, {bits} bits", 1 + bits / 8, repeated, count >> 15, pack, codes, bits)
            show(f"unpack alone, {bits} bits", 1 + bits / 8, repeated, count >> 15, unpack, packed, bits)
        for share in (0.001, 0.01, 0.1, 0.5):
            show(f"largest {share:g} of all, alone", 4, largest, vector, int(count * share))

    for kind, options in SUBJECTS:
        if given.only not in ("", kind):
            continue
        c = compressor(kind, **options)
        data, _ = c.compress(vector, residual, 7)
        share = len(data) / vector.nbytes
        name = f"{kind} {spoken(options)}"
        show(f"compress {name}", 12 + 4 * share, c.compress, vector, residual, 7, wire=f"{share:.4f}")
        show(f"decompress {name}", 4 + 4 * share, c.decompress, data, count)
        show(f"add {name}", 8 + 4 * share, c.add, data, out, 0.5)


if __name__ == "__main__":
    main()
