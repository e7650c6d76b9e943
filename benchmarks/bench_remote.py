"""Images per second from a store that answers late, against the local disk; and what a large run asks of a store.

    python benchmarks/bench_remote.py [--images DIR] [--latencies 5 50 200] [--csv OUT] [--json OUT]
    python benchmarks/bench_remote.py --plan [--total 9e6] [--ranks 64] [--rate 1000] [--image-bytes 100e3]

The store is a web server of the standard library in a process of its own, which waits before every answer and sends at
most so many bytes a second on a connection. Rows, each an epoch of the training loader with `data.shuffle window`:
    disk         the shards on the local disk
    first        from the store, nothing kept yet (`data.cache_size` holds all)
    second       the epoch after it, from the cache
    uncached     from the store with `data.cache_size 0`, second epoch
First the batches are compared with those from the disk, bit for bit; others are not timed. `--plan` computes, and needs
no network: what `nine million images over 64 ranks` takes, from the parts that the formulas name.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench_input import MEAN, STD, images
from benchmarks.machine import machine
from spml_fast.core.config import DataConfig
from spml_fast.core.errors import UserError, run_command
from spml_fast.core.io import write_csv
from spml_fast.core.outputs import OutputFile, add_json_option, json_output
from spml_fast.data.loader import TrainLoader
from spml_fast.data.manifest import Manifest, Split
from spml_fast.data.remote.shards import RemoteShards
from spml_fast.prepare.pack import PackOptions, pack

COLUMNS = ("latency_ms", "row", "images_per_s", "requests", "requests_per_s", "bytes", "megabytes_per_s", "repeated")
MACHINE = ("cpu", "cores", "gpu", "torch", "dali")


@dataclass(frozen=True)
class Plan:
    """What a run asks of a store and of its machines, by arithmetic alone.

    Attributes:
        images: of the training split.
        ranks: processes.
        rate: images a second that one rank trains on.
        image_bytes: of one encoded image, on average.
        per_machine: ranks of one machine.
        block: `data.shuffle_block`.
        window: `data.shuffle_window`.
        threads: `data.read_threads`.
        latency: seconds until the first byte of an answer.
        stream: bytes a second of one connection.
    """

    images: float = 9e6
    ranks: int = 64
    rate: float = 1000.0
    image_bytes: float = 100e3
    per_machine: int = 8
    block: int = 64
    window: int = 65536
    threads: int = 8
    latency: float = 0.05
    stream: float = 60e6

    def figures(self) -> dict[str, float]:
        """Name -> figure; bytes in GB (10^9) or as the name says."""
        request = self.block * self.image_bytes
        # A piece that lies across two shards is two requests: one in so many as a shard of 256 MB has pieces.
        requests = self.images / self.block + self.images * self.image_bytes / 256e6
        seconds = self.latency + request / self.stream
        return {
            "request_MB": request / 1e6,
            "requests_per_epoch": requests,
            "requests_per_second": self.ranks * self.rate / self.images * requests,
            "GB_per_second": self.ranks * self.rate * self.image_bytes / 1e9,
            "GB_per_second_and_machine": self.per_machine * self.rate * self.image_bytes / 1e9,
            "threads_needed": self.rate / self.block * seconds,
            "images_per_second_of_a_rank": self.threads * self.block / seconds,
            "GB_of_two_windows_per_rank": 2 * self.window * self.image_bytes / self.ranks / 1e9,
            "GB_of_two_windows_per_machine": 2 * self.window * self.image_bytes / self.ranks * self.per_machine / 1e9,
            "seconds_until_the_first_batch": self.window / self.ranks / (self.threads * self.block / seconds),
            "connections_per_machine": self.threads * self.per_machine,
            "GB_of_all_images": self.images * self.image_bytes / 1e9,
            # A rank reads other blocks in every epoch, so a machine that is to need the store once keeps everything.
            "GB_of_cache_per_machine_for_one_download": self.images * self.image_bytes / 1e9,
            # width, height (int32), id (uint64), index (3 int64), checksum (uint32); labels: row (int64) and 6 x
            # (class id int16, code int8), known and observed.
            "GB_of_the_manifest": self.images * (4 + 4 + 8 + 24 + 4 + 2 * (8 + 6 * 3)) / 1e9,
        }


@contextmanager
def far_store(folder: Path, latency_ms: float, rate: float) -> Iterator[str]:
    """A web server of a folder, in a process of its own; yields its address."""
    program = str(Path(__file__).with_name("range_server.py"))
    words = [sys.executable, program, str(folder), "--latency-ms", str(latency_ms), "--megabytes-per-second", str(rate)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def epoch(loader: TrainLoader, number: int) -> tuple[float, list[Any]]:
    """Images a second of an epoch, and its batches."""
    start = time.perf_counter()
    batches = [batch for update in loader.epoch(number) for batch in update]
    return sum(len(batch.index) for batch in batches) / (time.perf_counter() - start), batches


def open_loader(split: Split, config: DataConfig, batch_size: int) -> TrainLoader:
    """The training loader of one rank."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given = {"views": ("weak",), "accumulation": 1, "seed": 0, "world_size": 1, "rank": 0, "mean": MEAN, "std": STD}
    return TrainLoader(split, config, batch_size=batch_size, device=device, **given)  # type: ignore[arg-type]


def measure(split: Split, config: DataConfig, batch_size: int, rows: Sequence[str], repeats: int) -> list[list[float]]:
    """For each row, median images a second, and requests, bytes and repeated attempts of the last time."""
    found = []
    loader = open_loader(split, config, batch_size)
    for number, _ in enumerate(rows):
        speeds = []
        for again in range(1 if rows[number] == "first" else repeats):
            traffic = split.shards.store.traffic if isinstance(split.shards, RemoteShards) else None
            before = (traffic.requests, traffic.received, traffic.repeated) if traffic else (0, 0, 0)
            speeds.append(epoch(loader, number + again)[0])
            after = (traffic.requests, traffic.received, traffic.repeated) if traffic else (0, 0, 0)
        found.append([statistics.median(speeds), *(float(b - a) for a, b in zip(before, after, strict=True))])
    return found


def compare(ours: TrainLoader, theirs: TrainLoader) -> None:
    """Raise `UserError` where batches differ."""
    for a, b in zip(epoch(ours, 0)[1], epoch(theirs, 0)[1], strict=True):
        if not torch.equal(a.index, b.index) or not torch.equal(a.views["weak"], b.views["weak"]):
            raise UserError("batches from the store differ from those of the disk; they are not timed")


def parse() -> argparse.Namespace:
    """The command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--images", type=Path, help="folder of JPEG images; default: generated ones of 640 x 480")
    parser.add_argument("--count", type=int, default=512, help="images at most")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--latencies", type=float, nargs="+", default=[5, 50, 200], metavar="MS")
    parser.add_argument("--stream", type=float, default=60.0, metavar="MB", help="10^6 bytes a second of a connection")
    parser.add_argument("--read-threads", type=int, default=8)
    parser.add_argument("--block", type=int, default=16, help="data.shuffle_block")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--csv", type=Path, metavar="OUT", help="write the rows, with the machine, to this file")
    parser.add_argument("--plan", action="store_true", help="compute what a large run takes, and measure nothing")
    parser.add_argument("--total", type=float, default=9e6, help="images of --plan")
    parser.add_argument("--ranks", type=int, default=64, help="of --plan")
    parser.add_argument("--rate", type=float, default=1000.0, help="images a second and rank of --plan")
    parser.add_argument("--image-bytes", type=float, default=100e3, help="of one image of --plan, on average")
    add_json_option(parser)
    return parser.parse_args()


def measure_all(args: argparse.Namespace, scratch: Path) -> list[list[Any]]:
    """The rows of the table."""
    (scratch / "files").mkdir()
    source = images(args.images, args.count, scratch / "files")
    size = max(1_000_000, args.count * 60_000 // 8)
    local = pack(PackOptions(source.folder.parent, scratch / "served" / "m", shard_size=size, progress=False))
    disk = local.split("train")
    config = DataConfig(
        image_size=args.image_size,
        shuffle="window",
        shuffle_block=args.block,
        shuffle_window=max(args.batch_size, args.block, len(disk) // 4),
        read_threads=args.read_threads,
        cache_size=100.0,
        keep_decoded=0,
    )
    bare = dataclasses.replace(config, cache_size=0.0)
    rows = [(0.0, "disk", measure(disk, config, args.batch_size, ["disk"], args.repeats)[0])]
    for latency in args.latencies:
        with far_store(scratch / "served", latency, args.stream) as url:
            cache = scratch / f"cache-{latency:g}"
            remote, fresh = (Manifest(f"{url}/m", cache=cache).split("train") for _ in range(2))
            compare(open_loader(fresh, bare, args.batch_size), open_loader(disk, bare, args.batch_size))
            first, second = measure(remote, config, args.batch_size, ["first", "second"], args.repeats)
            uncached = measure(fresh, bare, args.batch_size, ["first", "uncached"], args.repeats)[1]
            rows += [(latency, "first", first), (latency, "second", second), (latency, "uncached", uncached)]
            for split in (remote, fresh):
                # What is read ahead of an epoch that does not come will find nobody, which is nothing to be told.
                assert isinstance(split.shards, RemoteShards)
                split.shards.store.tell = lambda text: None
    table: list[list[Any]] = []
    for latency, name, (speed, requests, received, repeated) in rows:
        seconds = len(disk) / speed
        rates = requests / seconds, received, received / seconds / 1e6
        table.append([latency, name, speed, requests, *rates, repeated])
    return table


def main() -> int:
    """Measure, or compute, and print a table."""
    args = parse()
    out_file = json_output(args, "bench_remote")
    header = (*COLUMNS, *MACHINE)
    csv_file = None
    if args.csv is not None:
        csv_file = OutputFile(args.csv, "csv", ",".join(header), "--csv", args.overwrite)
        csv_file.check()
    if args.plan:
        figures = Plan(args.total, args.ranks, args.rate, args.image_bytes).figures()
        for name, value in figures.items():
            print(f"{name:42s}{value:>14,.4g}")
        if out_file is not None:
            out_file.write_json({"plan": figures})
        return 0
    facts = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(", ".join(f"{name} {facts[name]}" for name in MACHINE))
    with tempfile.TemporaryDirectory() as scratch:
        table = measure_all(args, Path(scratch))
    print(("{:>16s}" * len(COLUMNS)).format(*COLUMNS))
    for row in table:
        print("".join(f"{v:>16s}" if isinstance(v, str) else f"{v:>16,.4g}" for v in row), flush=True)
    if csv_file is not None:
        csv_file.check()
        write_csv(csv_file.path, header, [[*row, *(facts[name] for name in MACHINE)] for row in table])
    if out_file is not None:
        out_file.write_json({"machine": facts, "rows": [dict(zip(COLUMNS, row, strict=True)) for row in table]})
    return 0


if __name__ == "__main__":
    run_command(main)
