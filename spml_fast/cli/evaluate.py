"""Evaluate a run's best weights: `python launch/evaluate.py --run RUN [--alpha A ...] [--split test] [--json OUT]`.

Starts under `deepspeed` and `torchrun` as well; the numbers do not depend on the number of ranks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

try:
    from spml_fast.core.errors import UserError, run_command
except ImportError as error:
    raise SystemExit(f"error: {error}; run `pip install -e .` in the repository first") from error


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument("--alpha", type=float, nargs="+", help="BoostLU factors; default 1 and the run's alpha_eval")
    parser.add_argument("--split", help="split to evaluate; default the run's test split")
    parser.add_argument("--definition", choices=("sklearn", "rank", "voc"), help="average precision; default the run's")
    parser.add_argument("--batch-size", type=int, help="images a forward; default the run's")
    parser.add_argument("--json", type=Path, help="write all metrics to this file")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Evaluate and print."""
    args = parse()
    from spml_fast.train.engine import init_distributed, shutdown_distributed

    device = init_distributed()
    from spml_fast.core import distributed
    from spml_fast.core.io import write_json
    from spml_fast.evaluation.evaluate import class_groups, evaluate_split, table_rows
    from spml_fast.runs.open import load_run, make_eval_loader
    from spml_fast.train.logs import print_table

    config, manifest, classifier, _ = load_run(args.run, device)
    if args.definition:
        config.eval.definition = args.definition
    if args.batch_size is not None:
        if args.batch_size < 1:
            raise UserError(f"--batch-size is {args.batch_size}; it must be at least 1")
        config.eval.batch_size = args.batch_size
    split = manifest.split(args.split or config.data.test_split or config.data.train_split)
    if len(split) == 0:
        raise UserError(f"split {split.name!r} of {manifest.folder} has no images")
    alphas = args.alpha or sorted({1.0, config.model.alpha_eval})
    loader = make_eval_loader(config, split, classifier, device)
    found = evaluate_split(classifier, loader, split, alphas, config, manifest.classes, class_groups(manifest, config))
    if distributed.is_main():
        # Shown first: a file that cannot be written takes no figure away.
        for alpha in alphas:
            print_table(f"{split.name}, alpha {alpha:g}, {len(split)} images", table_rows(found[alpha]))
        report = {"split": split.name, "alpha": {f"{a:g}": found[a] for a in alphas}, "classes": manifest.classes}
        if args.json is not None:
            try:
                write_json(args.json, report)
            except OSError as error:
                raise UserError(f"{args.json} cannot be written: {error.strerror}") from error
    shutdown_distributed()


if __name__ == "__main__":
    run_command(main)
