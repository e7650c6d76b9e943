"""`spml-fast diagnose --run RUN [--against FULL_RUN] [--plot OUT.png]`: what a run's class activation maps show."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spml_fast.cli import common
from spml_fast.core.errors import UserError
from spml_fast.core.outputs import writer_name
from spml_fast.runs.layout import RunLayout

if TYPE_CHECKING:
    import torch

    from spml_fast.core.outputs import OutputFile

DESCRIPTION = """Highest and lowest cells of the maps of positive and negative labels, and of hidden positives on the
training split; with --against, a run with full labels on the same data, the rank correlation of the maps of both; the
pointing game where the data set has boxes, and MaxBoxAcc with --box-accuracy; for IGNORE the histogram of its gaps
(train with --method.gap_histogram true). Starts under `deepspeed` and `torchrun` as well."""
EXAMPLES = [
    ("--run RUN", "the test split"),
    ("--run RUN --against FULL --plot maps.png", "compared with a run with full labels"),
    ("--run RUN --against FULL --split train", "hidden positives too, where the data set hides labels"),
    ("--run RUN --split val --json maps.json", "figures of another split for a program"),
]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.command_parser("diagnose", "--run RUN [--against FULL] [OPTIONS]", DESCRIPTION, EXAMPLES)
    common.add_run(parser)
    parser.add_argument("--against", type=Path, help="run directory of a model trained with full labels")
    parser.add_argument("--split", help="split to look at; default the run's test split")
    parser.add_argument("--negatives", type=int, default=20, help="known negatives an image (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of their draw (default: %(default)s)")
    parser.add_argument(
        "--box-accuracy",
        action="store_true",
        help="MaxBoxAcc too: whether a box around the high part of a map fits one of its class; about 15 ms for each "
        "positive label",
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plot", type=Path, help="draw them to this PNG file")
    common.add_overwrite(parser)
    return common.parse(parser, argv)


def _shown(quartiles: dict[str, float] | None) -> str:
    return "-" if quartiles is None else "{p50:.2f} ({p25:.2f} to {p75:.2f})".format(**quartiles)


def table_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures for people: medians with quartiles."""
    pairs = found["pairs"]
    kinds = ["positive"]
    if "hidden_positive" in pairs:
        kinds = ["observed_positive", "hidden_positive"]
    words = {kind: kind.replace("_", " ") for kind in (*kinds, "negative")}
    rows = [("pairs looked at", ", ".join(f"{pairs[kind]} {name}" for kind, name in words.items()))]
    for end, title in (("top", "highest"), ("bottom", "lowest")):
        for kind, name in words.items():
            cells = found[end][kind]
            text = _shown(cells["model"])
            if cells["full"] is not None:
                text += f"; full labels {_shown(cells['full'])}"
            rows.append((f"{title} 5% of cells, {name} labels", text))
    if found["correlation"] is not None:
        parts = found["correlation_by_label"] or {"": found["correlation"]}
        for kind, quartiles in parts.items():
            name = f", {words[kind]} labels" if kind else ""
            rows.append((f"rank correlation with the full-label map{name}", _shown(quartiles)))
        rows.append(("the same of a centred Gaussian", _shown(found["control"])))
    if found["pointing"] is not None:
        game = found["pointing"]
        rows.append(
            (
                "pointing game",
                f"{game['accuracy']:.1f}% of {game['pairs']} pairs, mean of classes {game['class_mean']:.1f}%, "
                f"anywhere {game['chance']:.1f}%",
            )
        )
    if found["boxes"] is not None:
        fit = found["boxes"]
        each = ", ".join(f"{value:.1f}% at {overlap}" for overlap, value in fit["by_overlap"].items())
        rows.append(
            (
                "MaxBoxAcc (largest part, IoU 0.5)",
                f"{fit['max_box_acc']:.1f}% of {fit['pairs']} pairs at threshold {fit['threshold']:.2f}, mean of "
                f"classes {fit['class_mean']:.1f}%",
            )
        )
        rows.append(("MaxBoxAccV2 (any part, mean of IoU)", f"{fit['max_box_acc_v2']:.1f}%: {each}"))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Look and report."""
    args = parse(argv)
    if args.negatives < 0 or args.seed < 0:
        raise UserError("--negatives and --seed must not be negative")
    if args.plot is not None and args.plot.suffix.lower() != ".png":
        raise UserError(f"--plot {args.plot} must be named .png")
    json_out = common.output_file(args, "json", "json", writer_name("diagnose"))
    plot_out = common.output_file(args, "plot", "png", writer_name("diagnose"))
    with common.ranks() as device:
        diagnose(args, json_out, plot_out, device)
    return 0


def diagnose(
    args: argparse.Namespace, json_out: OutputFile | None, plot_out: OutputFile | None, device: torch.device
) -> None:
    """The same on this rank.

    Args:
        args: the command line, checked.
        json_out: where the figures go.
        plot_out: where the drawing goes.
        device: this rank's.
    """
    from spml_fast.analysis.diagnostics import measure_maps, summarise
    from spml_fast.analysis.diagnostics_plot import plot
    from spml_fast.core import distributed
    from spml_fast.runs.open import input_normalisation, load_run, make_eval_loader
    from spml_fast.runs.read import read_epochs
    from spml_fast.training.console import print_table

    config, manifest, classifier, _ = load_run(args.run, device)
    split = manifest.split(args.split or config.data.test_split or config.data.train_split)
    full = None
    if args.against is not None:
        other, their_manifest, full, _ = load_run(args.against, device)
        if their_manifest.classes != manifest.classes:
            raise UserError(f"{args.against} was trained on other classes than {args.run}")
        same = other.data.image_size == config.data.image_size
        if not same or input_normalisation(other, full) != input_normalisation(config, classifier):
            raise UserError(f"{args.against} takes images of another size or normalisation than {args.run}")
    table = measure_maps(
        classifier,
        make_eval_loader(config, split, classifier, device),
        split,
        full=full,
        negatives=args.negatives,
        seed=args.seed,
        precision=config.train.precision,
        tell_hidden=split.name == config.data.train_split and split.hides_labels,
        fit_boxes=args.box_accuracy,
        task=f"measuring the maps of the {split.name} split",
    )
    if table is not None and distributed.is_main():
        found = summarise(table)
        # A run that was copied without its log still has maps.
        epochs = read_epochs(args.run) if RunLayout(args.run).metrics.is_file() else []
        gaps = [e for e in epochs if "gap_histogram" in e]
        report: dict[str, Any] = {"run": str(args.run), "against": None if args.against is None else str(args.against)}
        report |= {"split": split.name, **found}
        if gaps:
            report["gap_histograms"] = [{"epoch": e["epoch"], **e["gap_histogram"]} for e in gaps]
        # Shown first: a file that cannot be written takes no figure away.
        print_table(f"maps of {args.run}, {split.name} split", table_rows(found))
        if json_out is not None:
            json_out.write_json(report)
        if plot_out is not None:
            plot_out.check()
            try:
                plot(plot_out.path, table, gaps)
            except OSError as error:
                raise common.write_failed(plot_out.path, error) from error
