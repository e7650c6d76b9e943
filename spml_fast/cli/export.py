"""`spml-fast export --run RUN --format {safetensors,onnx} [--out FILE] [--alpha A]`: hand a trained run on."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from spml_fast.cli import common
from spml_fast.core.errors import UserError
from spml_fast.core.io import printable
from spml_fast.core.outputs import Kind, OutputFile, writer_name
from spml_fast.runs.layout import RunLayout

DESCRIPTION = """onnx: images in, logits and probabilities out; runs in ONNX Runtime and whatever else reads ONNX.
safetensors: weights that timm takes by itself, where its model of that name is the same; else those of the backbone and
of the head. What is written is compared with the run before it is kept."""
EXAMPLES = [
    ("--run RUN --format onnx", "to RUN/export.onnx"),
    ("--run RUN --format onnx --alpha 1", "without BoostLU in the graph"),
    ("--run RUN --format safetensors --out weights.safetensors", "weights for timm"),
]
SUFFIX = {"onnx": ".onnx", "safetensors": ".safetensors"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.command_parser("export", "--run RUN --format {onnx,safetensors} [OPTIONS]", DESCRIPTION, EXAMPLES)
    common.add_run(parser)
    parser.add_argument("--format", choices=sorted(SUFFIX), required=True, help="what to write")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default export.onnx or export.safetensors in the run")
    parser.add_argument(
        "--alpha", type=float, metavar="A", help="onnx: BoostLU factor, 1 for none; default the run's model.alpha_eval"
    )
    parser.add_argument(
        "--no-decisions", action="store_true", help="leave the run's thresholds and calibration out of the file"
    )
    common.add_overwrite(parser)
    return common.parse(parser, argv)


def output_file(args: argparse.Namespace, out: Path) -> OutputFile:
    """The file to write."""
    kind: Kind = "onnx" if args.format == "onnx" else "safetensors"
    return OutputFile(out, kind, writer_name("export"), "--out", args.overwrite)


def check(args: argparse.Namespace, out: Path) -> None:
    """Validate option combinations. Raises `UserError`."""
    common.check_one_process("export")
    if out.suffix != SUFFIX[args.format]:
        raise UserError(f"--out {out} must be named {SUFFIX[args.format]}")
    if out.resolve() == RunLayout(args.run).weights.resolve():
        raise UserError(f"--out {out} is where the run keeps its own weights; give another name")
    if args.run.is_dir():
        output_file(args, out).check()
    if args.format == "safetensors" and args.alpha is not None:
        raise UserError("--alpha goes into an ONNX graph; weights have none, and boosting is up to who uses them")
    common.check_alpha(args.alpha)


def main(argv: list[str] | None = None) -> int:
    """Export, and say what was written and how it was checked."""
    args = parse(argv)
    out = args.out or args.run / f"export{SUFFIX[args.format]}"
    check(args, out)
    from spml_fast.analysis import export

    if args.format == "onnx":
        export.need_onnx()
    import torch

    from spml_fast.analysis.predict import usable_decisions
    from spml_fast.evaluation.evaluate import check_alphas
    from spml_fast.runs.decisions import load_decisions
    from spml_fast.runs.open import load_classifier, load_run_config, run_classes

    config = load_run_config(args.run)
    classes = run_classes(args.run, config)
    # What is for training alone; checkpointing would be in the graph.
    model = dataclasses.replace(config.model, grad_checkpointing=False, compile=False, drop_path=None)
    config = dataclasses.replace(config, model=model)
    classifier, _ = load_classifier(args.run, config, len(classes), torch.device("cpu"))
    classifier.to(memory_format=torch.contiguous_format)
    output_file(args, out).check()
    alpha = classifier.alpha_eval if args.alpha is None else args.alpha
    check_alphas([alpha], classifier, config)
    saved = None if args.no_decisions else load_decisions(args.run, classes)
    decisions = None if saved is None else usable_decisions(saved.decisions, alpha, common.say)
    if args.format == "onnx":
        apart, which = export.export_onnx(classifier, config, classes, alpha, out, decisions)
        said = f"alpha {alpha:g}; logits of images ({which}) are within {apart:.1e} of the run's"
    else:
        layout, apart, which = export.export_safetensors(classifier, config, classes, out, decisions)
        if layout == "timm":
            words = "".join(f", {k}={v!r}" for k, v in export.timm_options(config).items())
            said = (
                f"timm's names, for timm.create_model({config.model.backbone!r}, num_classes={len(classes)}{words}); "
                f"its logits of images ({which}) are within {apart:.1e} of the run's at alpha 1"
            )
        else:
            said = f"backbone.* and head.*, since timm's {config.model.backbone} has no such head at alpha 1"
    if decisions is not None:
        said += "; with the thresholds" + (" and the calibration" if decisions.calibrated else "") + " of the run"
    print(f"{printable(str(out))}: {out.stat().st_size / 1e6:.1f} MB, {said}")
    return 0
