"""`spml-fast export --run RUN --format {safetensors,onnx,timm} [--out OUT] [--alpha A]`: hand a trained run on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from spml_fast.cli import common
from spml_fast.core.errors import UserError
from spml_fast.core.io import printable
from spml_fast.core.outputs import Kind, OutputFile, writer_name
from spml_fast.runs.layout import ExportLayout, RunLayout

if TYPE_CHECKING:
    from spml_fast.core.config import Config
    from spml_fast.evaluation.decisions import Decisions
    from spml_fast.models.classifier import Classifier

DESCRIPTION = """onnx: images in, logits and probabilities out; runs in ONNX Runtime and whatever else reads ONNX.
safetensors: weights that timm takes by itself, where its model of that name is the same; else those of the backbone and
of the head. timm: a folder for timm.create_model("local-dir:FOLDER", pretrained=True), with normalisation, input size
and class names. What is written is compared with the run before it is kept."""
EXAMPLES = [
    ("--run RUN --format onnx", "to RUN/export.onnx"),
    ("--run RUN --format onnx --alpha 1", "without BoostLU in the graph"),
    ("--run RUN --format safetensors --out weights.safetensors", "weights for timm"),
    ("--run RUN --format timm --out model", "a folder for timm"),
]
FORMATS = ("onnx", "safetensors", "timm")
SUFFIX = {"onnx": ".onnx", "safetensors": ".safetensors"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.command_parser(
        "export", "--run RUN --format {onnx,safetensors,timm} [OPTIONS]", DESCRIPTION, EXAMPLES
    )
    common.add_run(parser)
    parser.add_argument("--format", choices=FORMATS, required=True, help="what to write")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="OUT",
        help="file, or folder of timm; default export.onnx, export.safetensors or export-timm in the run",
    )
    parser.add_argument(
        "--alpha", type=float, metavar="A", help="onnx: BoostLU factor, 1 for none; default the run's model.alpha_eval"
    )
    parser.add_argument("--no-decisions", action="store_true", help="leave the run's thresholds and calibration out")
    common.add_overwrite(parser)
    return common.parse(parser, argv)


def output_file(args: argparse.Namespace, out: Path) -> OutputFile:
    """The file to write."""
    kind: Kind = "onnx" if args.format == "onnx" else "safetensors"
    return OutputFile(out, kind, writer_name("export"), "--out", args.overwrite)


def check_output(args: argparse.Namespace, out: Path) -> None:
    """Refuse a file or folder that must not be written. Raises `UserError`."""
    if args.format != "timm":
        output_file(args, out).check()
        return
    from spml_fast.analysis.export_folder import ExportFolder

    ExportFolder(ExportLayout(out), writer_name("export"), "--out", args.overwrite).check()


def check(args: argparse.Namespace, out: Path) -> None:
    """Validate option combinations. Raises `UserError`."""
    common.check_one_process("export")
    if args.format in SUFFIX and out.suffix != SUFFIX[args.format]:
        raise UserError(f"--out {out} must be named {SUFFIX[args.format]}")
    if out.resolve() == RunLayout(args.run).weights.resolve():
        raise UserError(f"--out {out} is where the run keeps its own weights; give another name")
    if args.run.is_dir():
        check_output(args, out)
    if args.format != "onnx" and args.alpha is not None:
        raise UserError("--alpha goes into an ONNX graph; weights have none, and boosting is up to who uses them")
    common.check_alpha(args.alpha)


def main(argv: list[str] | None = None) -> int:
    """Export, and say what was written and how it was checked."""
    args = parse(argv)
    layout = RunLayout(args.run)
    default = layout.export("timm").folder if args.format == "timm" else args.run / f"export{SUFFIX[args.format]}"
    out = args.out or default
    check(args, out)
    from spml_fast.analysis import export

    if args.format == "onnx":
        export.need_onnx()

    from spml_fast.analysis.predict import usable_decisions
    from spml_fast.evaluation.evaluate import check_alphas
    from spml_fast.runs.decisions import load_decisions
    from spml_fast.runs.open import load_for_export

    config, classes, classifier = load_for_export(args.run)
    check_output(args, out)
    alpha = classifier.alpha_eval if args.alpha is None else args.alpha
    check_alphas([alpha], classifier, config)
    saved = None if args.no_decisions else load_decisions(args.run, classes)
    decisions = None if saved is None else usable_decisions(saved.decisions, alpha, common.say)
    if args.format == "onnx":
        apart, which = export.export_onnx(classifier, config, classes, alpha, out, decisions)
        said = f"alpha {alpha:g}; logits of images ({which}) are within {apart:.1e} of the run's"
    elif args.format == "timm":
        said = _export_timm(args, out, classifier, config, classes, decisions)
    else:
        said = _export_safetensors(out, classifier, config, classes, decisions)
    if decisions is not None:
        said += "; with the thresholds" + (" and the calibration" if decisions.calibrated else "") + " of the run"
    files = ExportLayout(out).files if args.format == "timm" else [out]
    size = sum(path.stat().st_size for path in files)
    print(f"{printable(str(out))}: {size / 1e6:.1f} MB, {said}")
    return 0


def _export_safetensors(
    out: Path, classifier: Classifier, config: Config, classes: list[str], decisions: Decisions | None
) -> str:
    """Write weights; what to say of them."""
    from spml_fast.analysis import export

    layout, apart, which = export.export_safetensors(classifier, config, classes, out, decisions)
    if layout != "timm":
        return f"backbone.* and head.*, since timm's {config.model.backbone} has no such head at alpha 1"
    words = "".join(f", {k}={v!r}" for k, v in export.timm_options(config).items())
    return (
        f"timm's names, for timm.create_model({config.model.backbone!r}, num_classes={len(classes)}{words}); "
        f"its logits of images ({which}) are within {apart:.1e} of the run's at alpha 1"
    )


def _export_timm(
    args: argparse.Namespace,
    out: Path,
    classifier: Classifier,
    config: Config,
    classes: list[str],
    decisions: Decisions | None,
) -> str:
    """Write a folder for timm; what to say of it."""
    from spml_fast.analysis.export_folder import ExportFolder, find_timm_form, require_timm

    form = find_timm_form(classifier, config, len(classes))
    require_timm(form, config)
    folder = ExportFolder(ExportLayout(out), writer_name("export"), "--out", args.overwrite)
    folder.write(classifier, config, classes, form, decisions)
    said = (
        f"for timm.create_model({f'local-dir:{out}'!r}, pretrained=True); its logits of images ({form.images}) are "
        f"within {form.max_difference:.1e} of the run's at alpha 1"
    )
    if classifier.alpha_eval != 1:
        said += (
            f"; BoostLU's alpha {classifier.alpha_eval:g}, which the run evaluates with, cannot be part of a timm model"
            ": spml_fast.load takes it"
        )
    return said
