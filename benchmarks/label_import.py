"""Preparing label files of OpenImages against the mere reading of them by pyarrow; a part of bench_labels.py.

`python benchmarks/label_import.py FILE` streams a file as a process of its own and prints what that took.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.child_usage import Usage, usage_of

ROOT = Path(__file__).resolve().parent.parent
# Preparing takes at most so many times as long as reading, and so much memory.
GOAL_RATIO, GOAL_BYTES = 3.0, 2 * 10**9


def stream(path: Path) -> dict[str, float]:
    """Rows of a CSV file that pyarrow streams with its own settings; wall and processor seconds that it takes."""
    import pyarrow.csv

    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    with pyarrow.csv.open_csv(path) as reader:
        rows = sum(len(batch) for batch in reader)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"rows": rows, "seconds": seconds, "cpu_seconds": cpu}


@dataclass(frozen=True)
class Release:
    """Files of a release: training labels, trainable classes and their names."""

    labels: Path
    classes: Path
    descriptions: Path


def find_release(folder: Path) -> Release:
    """The files that make_openimages.py wrote for V7 below a folder."""
    base = folder / "v7" / "oidv7-"
    names = "train-annotations-human-imagelabels.csv", "classes-trainable.txt", "class-descriptions.csv"
    return Release(*(base.with_name(base.name + name) for name in names))


def prepare(release: Release, out: Path) -> Usage:
    """`spml-fast prepare openimages`, from start to end."""
    words: list[str | Path] = ["openimages", "--labels", f"train={release.labels}", "--classes", release.classes]
    words += ["--descriptions", release.descriptions, "--images", "none", "--out", out, "--overwrite"]
    return usage_of([sys.executable, ROOT / "launch" / "prepare.py", *words])


def measure(release: Release, out: Path, rounds: int) -> dict[str, Any]:
    """Read and prepare in turn.

    Args:
        release: the files.
        out: Manifest to write.
        rounds: of both.

    Returns:
        Rows and bytes of the file; median wall and processor seconds of both, the start of Python counted in the
        second alone; the largest memory of preparing; how many times as long it takes.
    """
    reads, runs = [], []
    for _ in range(rounds):
        reads.append(json.loads(usage_of([sys.executable, __file__, str(release.labels)]).output))
        runs.append(prepare(release, out))
    read, cpu_read = (statistics.median(r[k] for r in reads) for k in ("seconds", "cpu_seconds"))
    taken = statistics.median(r.seconds for r in runs)
    cpu_taken = statistics.median(r.cpu_seconds for r in runs)
    return {
        "rows": reads[0]["rows"],
        "file_bytes": release.labels.stat().st_size,
        "rounds": rounds,
        "read_s": read,
        "read_cpu_s": cpu_read,
        "prepare_s": taken,
        "prepare_cpu_s": cpu_taken,
        "ratio": taken / read,
        "cpu_ratio": cpu_taken / cpu_read,
        "peak_bytes": max(r.peak_bytes for r in runs),
    }


def sentences(row: dict[str, Any]) -> list[str]:
    """What `measure` found, beside its goals."""
    reached = row["ratio"] <= GOAL_RATIO
    fits = row["peak_bytes"] <= GOAL_BYTES
    return [
        f"{row['rows']:,} label rows, {row['file_bytes'] / 1e9:.2f} GB, median of {row['rounds']} rounds in turn:",
        f"  pyarrow streams the file in {row['read_s']:.1f} s ({row['read_cpu_s']:.1f} s of processor time)",
        f"  spml-fast prepare openimages takes {row['prepare_s']:.1f} s ({row['prepare_cpu_s']:.1f} s), start included",
        f"  ratio {row['ratio']:.2f}, of processor time {row['cpu_ratio']:.2f}; goal at most {GOAL_RATIO:.0f}: "
        f"{'reached' if reached else 'missed'}",
        f"  memory {row['peak_bytes'] / 1e9:.2f} GB; goal at most {GOAL_BYTES / 1e9:.0f} GB: "
        f"{'reached' if fits else 'missed'}",
    ]


if __name__ == "__main__":
    print(json.dumps(stream(Path(sys.argv[1]))))
