"""`spml-fast push RUN NAME [--folder DIR]`: a run with its model card on the Hugging Face Hub, or in a folder."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from spml_fast.cli import common
from spml_fast.core.errors import UserError
from spml_fast.core.io import printable
from spml_fast.core.outputs import writer_name
from spml_fast.runs.hub import HubModel, check_name, need_hub
from spml_fast.runs.layout import ExportLayout, RunLayout

DESCRIPTION = """Writes weights, timm's config.json where timm has such a model, a model card made from the run, and a
record of checksums, and sends them to NAME on the Hugging Face Hub. A model that is not there yet is made private
unless --public is given. spml_fast.load("hf-hub:NAME") loads it.

Whoever is logged in (`hf auth login`, or HF_TOKEN) sends it; no token is asked for or kept here. A card that was edited
on the Hub stays as it is."""
EXAMPLES = [
    ("RUN owner/name", "to the Hub, private"),
    ("RUN owner/name --public", "for everybody to see"),
    ("RUN owner/name --folder model", "the same files in a folder, nothing is sent"),
]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.command_parser("push", "RUN NAME [OPTIONS]", DESCRIPTION, EXAMPLES)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory; its best weights are used")
    parser.add_argument("name", metavar="NAME", help="OWNER/NAME of the model, or NAME of one's own")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="write the files there, and send nothing")
    parser.add_argument("--public", action="store_true", help="a model that is made now is for everybody to see")
    parser.add_argument("--no-decisions", action="store_true", help="leave the run's thresholds and calibration out")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files there that this command did not write, and a card that was edited",
    )
    return common.parse(parser, argv)


def check(args: argparse.Namespace) -> None:
    """Validate option combinations. Raises `UserError`."""
    common.check_one_process("push")
    check_name(args.name)
    RunLayout(args.run).require()
    if args.folder is None:
        need_hub()
    elif args.public:
        raise UserError("--public is about the Hub, and --folder sends nothing; give one of them")


def main(argv: list[str] | None = None) -> int:
    """Write the folder, send it, and say where it is."""
    args = parse(argv)
    check(args)
    if args.folder is not None:
        write(args, ExportLayout(args.folder))
        size = sum(path.stat().st_size for path in ExportLayout(args.folder).files)
        print(f"{printable(str(args.folder))}: {size / 1e6:.1f} MB, what push sends to {args.name}; nothing was sent")
        return 0
    with tempfile.TemporaryDirectory(prefix="spml_fast-") as name:
        layout = ExportLayout(Path(name) / "model")
        write(args, layout)
        model = HubModel(args.name, private=not args.public)
        there = Path(name) / "there"
        there.mkdir()
        others, edited = model.others(layout, there)
        if others and not args.overwrite:
            raise UserError(
                f"{model.name} has {', '.join(others)} that this command did not write; give another NAME, or "
                "--overwrite to replace them"
            )
        keeps = edited and not args.overwrite
        if keeps:
            common.say(f"note: the model card of {model.name} is not as this command wrote it, and stays as it is")
        names = [path.name for path in layout.files if not (keeps and path == layout.card)]
        url = model.upload(layout, names)
    seen = "for everybody to see" if args.public else "private"
    print(f"{url}: sent ({seen}, if it was not there before); spml_fast.load('hf-hub:{model.name}') loads it")
    return 0


def write(args: argparse.Namespace, layout: ExportLayout) -> None:
    """Write everything that is sent. Raises `UserError`."""
    from spml_fast.analysis.export_folder import ExportFolder, find_timm_form
    from spml_fast.analysis.model_card import CardSource, model_card
    from spml_fast.analysis.predict import usable_decisions
    from spml_fast.runs.decisions import load_decisions
    from spml_fast.runs.open import load_for_export

    mark = writer_name("push")
    folder = ExportFolder(layout, mark, "--folder", args.overwrite)
    folder.check(card=True)
    config, classes, classifier = load_for_export(args.run)
    form = find_timm_form(classifier, config, len(classes))
    saved = None if args.no_decisions else load_decisions(args.run, classes)
    if saved is not None and usable_decisions(saved.decisions, classifier.alpha_eval, common.say) is None:
        saved = None
    source = CardSource(args.name, args.run, config, classifier, classes, saved, form.model is not None)
    decisions = None if saved is None else saved.decisions
    folder.write(classifier, config, classes, form, decisions, card=model_card(source, mark))
