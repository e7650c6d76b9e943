"""Whole runs, started as a user starts them: train, kill, resume, evaluate, one rank against two."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spml_fast.analysis.report.page import make_page
from tests.support import warm
from tests.support.paths import ROOT
from tests.support.runs import Run, command, environment, free_port, read_metrics

RECIPE = ROOT / "launch" / "configs" / "digits.yaml"


def options(data: Path, run: Path, **more: object) -> list[str]:
    """Options of a short run on the small scenes; `more` maps section__field to a value."""
    base: dict[str, object] = {
        "config": RECIPE,
        "data__dir": data,
        "run__dir": run,
        "train__epochs": 2,
        "train__precision": "fp32",
        "train__log_every": 1,
        "eval__batch_size": 32,
        "deepspeed__tensorboard": "false",
    }
    base |= more
    return [word for key, value in base.items() for word in (f"--{key.replace('__', '.')}", str(value))]


def succeed(done: subprocess.CompletedProcess[str]) -> str:
    """The output of a run that must have ended well."""
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The run's best weights."""
    return load_file(run / "model.safetensors")


def losses(run: Path) -> list[float]:
    """Running mean loss after every update and epoch, in order."""
    entries = sorted(read_metrics(run, "update") + read_metrics(run, "epoch"), key=lambda e: e["time"])
    return [e["loss"] for e in entries]


class TestQuickStart:
    """The README's command, on fewer images."""

    @pytest.fixture(scope="class")
    def finished(self, small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
        run = tmp_path_factory.mktemp("quick") / "run"
        words = command("train.py", 1, "deepspeed") + options(small_digits, run, deepspeed__tensorboard="true")
        done = subprocess.run(words, capture_output=True, text=True, timeout=600, env=environment(), cwd=ROOT)
        return run, succeed(done)

    def test_table_says_what_was_promised(self, finished: tuple[Path, str]) -> None:
        commands = finished[1].split("next: ")[1].splitlines()
        assert commands[0] == f"python {ROOT / 'launch' / 'evaluate.py'} --run {finished[0]} --per-class"
        scripts = [line.split()[1] for line in commands[1:4]]
        assert [Path(script).stem for script in scripts] == ["report", "explain", "suggest"]
        assert all(Path(script).is_file() for script in scripts)
        for text in (
            "test mAP, plain",
            "test mAP, BoostLU x5",
            "epoch 2/2 | loss",
            "labels rejected (",
            "images/s",
            "waiting for data",
            "run directory",
        ):
            assert text in finished[1]

    def test_run_directory_is_complete(self, finished: tuple[Path, str]) -> None:
        run, _ = finished
        for name in ("config.yaml", "deepspeed.json", "metrics.jsonl", "model.safetensors", "results.json"):
            assert (run / name).is_file(), name
        events = EventAccumulator(str(run / "tensorboard")).Reload().Tags()
        assert {"train/loss", "train/lr", "epoch/val_map", "test/alpha_5/map"} <= set(events["scalars"])
        # What DeepSpeed writes by itself, it writes in every update.
        assert not [name for name in events["scalars"] if name.startswith("Train/")]
        assert {"config/text_summary", "test/classes/text_summary"} <= set(events["tensors"])
        assert len(events["images"]) == 8
        assert json.loads((run / "deepspeed.json").read_text())["gradient_clipping"] == 0.0

    def test_diagnose_looks_at_its_maps(self, finished: tuple[Path, str], run_script: Run, tmp_path: Path) -> None:
        words = ["--run", finished[0], "--against", finished[0], "--json", tmp_path / "maps.json"]
        done = run_script("diagnose.py", *words, "--plot", tmp_path / "maps.png")
        assert done.returncode == 0, done.stdout + done.stderr
        found = json.loads((tmp_path / "maps.json").read_text())
        assert found["correlation"]["p25"] > 0.999 and found["pointing"]["pairs"] == found["pairs"]["positive"]
        assert "pointing game" in done.stdout and (tmp_path / "maps.png").stat().st_size > 10_000

    def test_report_shows_its_figures(self, finished: tuple[Path, str]) -> None:
        page = make_page([finished[0]])
        trained = json.loads((finished[0] / "results.json").read_text())
        for alpha in ("1", "5"):
            assert f"<dd>{trained['alpha'][alpha]['map']:.2f} <" in page
        # A label that training saw is in the plot against labels, since the data set is there.
        assert "AP against labels" in page and "of 2</span>" in page
        # What the run has kept of its test, and what it rejected, is on the page.
        assert '<section id="confusions"' in page and '<section id="time"' in page
        assert set(trained["seconds"]) >= {"test_seconds", "thresholds_seconds"}

    def test_evaluate_gives_the_same_figures(self, finished: tuple[Path, str], run_script: Run, tmp_path: Path) -> None:
        run, _ = finished
        out = tmp_path / "out.json"
        succeed(run_script("evaluate.py", "--run", run, "--alpha", 1, 5, "--json", out))
        report = json.loads(out.read_text())
        trained = json.loads((run / "results.json").read_text())
        assert report["split"] == "test"
        assert report["alpha"] == trained["alpha"]
        assert report["alpha"]["1"]["map"] != report["alpha"]["5"]["map"]

    def test_repeats_from_the_resolved_recipe(
        self, finished: tuple[Path, str], run_script: Run, tmp_path: Path
    ) -> None:
        run, _ = finished
        again = tmp_path / "again"
        succeed(run_script("train.py", "--config", run / "config.yaml", "--run.dir", again))
        assert losses(again) == losses(run)
        first, second = weights(run), weights(again)
        assert all(torch.equal(first[k], second[k]) for k in first)

    def test_finished_run_only_shows_its_table_again(self, finished: tuple[Path, str], run_script: Run) -> None:
        run, _ = finished
        before = len(read_metrics(run, "epoch"))
        out = succeed(run_script("train.py", "--config", run / "config.yaml"))
        assert "resuming after epoch 2, the last (from" in out and "test mAP" in out
        assert "nothing left to train" in out
        assert len(read_metrics(run, "epoch")) == before

    def test_never_resume_refuses_the_directory(self, finished: tuple[Path, str], run_script: Run) -> None:
        done = run_script("train.py", "--config", finished[0] / "config.yaml", "--run.resume", "never")
        assert done.returncode == 1 and "already holds a run" in done.stderr

    def test_evaluation_is_bit_equal_for_any_number_of_ranks(
        self, finished: tuple[Path, str], run_script: Run, tmp_path: Path
    ) -> None:
        reports = []
        for ranks in (1, 2, 3):
            out = tmp_path / f"{ranks}.json"
            # torchrun's own parser trips over --run, so several ranks are started by deepspeed.
            launcher = "deepspeed" if ranks == 2 else None
            succeed(run_script("evaluate.py", "--run", finished[0], "--json", out, ranks=ranks, launcher=launcher))
            reports.append(out.read_text())
        assert reports[0] == reports[1] == reports[2]


class TestKillAndResume:
    """A run that is killed and started again ends bit for bit where an undisturbed run ends."""

    def test_weights_labels_and_figures_survive(self, small_digits: Path, run_script: Run, tmp_path: Path) -> None:
        more = {
            "method": "ll_cp",
            "method__delta_rel": 5,
            "train__epochs": 3,
            "train__ema_decay": 0.9,
            "train__batch_size": 32,
            "run__save_updates": 2,
        }
        whole, cut = tmp_path / "whole", tmp_path / "cut"
        succeed(run_script("train.py", *options(small_digits, whole, **more)))
        words = command("train.py", 1, "python") + options(small_digits, cut, **more)
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, env=environment(), cwd=ROOT)
        newest = cut / "checkpoints" / "newest.json"
        deadline = time.time() + 300
        # Epoch 2 is the first whose corrections matter; inside it some of them are still pending.
        while process.poll() is None and time.time() < deadline:
            mark = json.loads(newest.read_text()) if newest.exists() else {}
            if mark.get("epoch") == 1 and mark["update"] > 0:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        mark = json.loads(newest.read_text())
        assert mark["epoch"] < 3, "the run ended before it was killed"
        out = succeed(run_script("train.py", *options(small_digits, cut, **more)))
        update = f", update {mark['update'] + 1}" if mark["update"] else ""
        assert f"resuming at epoch {mark['epoch'] + 1}{update} (from {cut}" in out
        first, second = weights(whole), weights(cut)
        assert all(torch.equal(first[k], second[k]) for k in first)
        ends = [read_metrics(run, "epoch")[-1] for run in (whole, cut)]
        assert ends[0]["corrected_total"] == ends[1]["corrected_total"] > 0
        assert ends[0]["val_map"] == ends[1]["val_map"]

    def test_resume_says_which_options_changed(self, small_digits: Path, run_script: Run, tmp_path: Path) -> None:
        run = tmp_path / "run"
        succeed(run_script("train.py", *options(small_digits, run, train__epochs=1)))
        out = succeed(run_script("train.py", *options(small_digits, run, train__epochs=2)))
        assert "resuming with changed options: train.epochs 1 -> 2\n" in out
        assert [e["epoch"] for e in read_metrics(run, "epoch")] == [1, 2]

    def test_keeps_the_newest_and_the_best(self, small_digits: Path, run_script: Run, tmp_path: Path) -> None:
        run = tmp_path / "run"
        succeed(run_script("train.py", *options(small_digits, run, train__epochs=4)))
        kept = {p.name for p in (run / "checkpoints").iterdir() if p.is_dir()}
        newest, best = (json.loads((run / "checkpoints" / f"{n}.json").read_text()) for n in ("newest", "best"))
        assert newest["epoch"] == 4
        assert kept == {f"finetune-e{m['epoch']:04d}-u000000-w1" for m in (newest, best)}
        scores = [e["val_map"] for e in read_metrics(run, "epoch")]
        assert best["epoch"] == 1 + int(np.argmax(scores))


class TestRanks:
    """The same training however it is spread."""

    # ConvNeXt has no BatchNorm, whose batch statistics would depend on the split.
    CONVNEXT: ClassVar[dict[str, Any]] = {
        "method__delta_rel": 3,
        "model__backbone": "test_convnext",
        "model__output_stride": 16,
        "train__batch_size": 24,
    }
    FROZEN: ClassVar[dict[str, Any]] = {"model__freeze_bn": "true", "train__batch_size": 48, "train__epochs": 1}

    @pytest.fixture(scope="class")
    def alone(self, small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
        """The run of one rank with some options, trained once for all tests that compare with it."""
        runs: dict[str, Path] = {}

        def train(**more: object) -> Path:
            name = json.dumps(more, sort_keys=True)
            if name not in runs:
                runs[name] = tmp_path_factory.mktemp("alone") / "run"
                succeed(warm.run_script("train.py", *options(small_digits, runs[name], **more)))
            return runs[name]

        return train

    @pytest.mark.parametrize(("method", "launcher"), [("ll_r", "deepspeed"), ("ll_ct", None)])
    def test_two_ranks_follow_one(
        self,
        method: str,
        launcher: str | None,
        small_digits: Path,
        alone: Callable[..., Path],
        run_script: Run,
        tmp_path: Path,
    ) -> None:
        more = self.CONVNEXT | {"method": method}
        one, two = alone(**more), tmp_path / "two"
        succeed(run_script("train.py", *options(small_digits, two, **more), ranks=2, launcher=launcher))
        assert len(losses(one)) == len(losses(two)) > 10
        np.testing.assert_allclose(losses(one), losses(two), rtol=2e-5)
        selected = [[e["selected_count"] for e in read_metrics(run, "epoch")] for run in (one, two)]
        assert selected[0] == selected[1] and selected[0][1] > 0

    def test_frozen_statistics_make_batch_norm_models_agree(
        self, small_digits: Path, run_script: Run, tmp_path: Path
    ) -> None:
        more = {"model__freeze_bn": "true", "train__batch_size": 24, "train__epochs": 1, "train__lr": 1e-3}
        one, two = tmp_path / "one", tmp_path / "two"
        succeed(run_script("train.py", *options(small_digits, one, **more)))
        succeed(run_script("train.py", *options(small_digits, two, **more), ranks=2))
        np.testing.assert_allclose(losses(one), losses(two), rtol=2e-5)

    def test_exact_accumulation_follows_one_large_batch(
        self, small_digits: Path, alone: Callable[..., Path], run_script: Run, tmp_path: Path
    ) -> None:
        more = self.CONVNEXT | {"method": "ll_r"}
        large, small = alone(**more), tmp_path / "small"
        more |= {"train__accumulation": 3, "train__exact_accumulation": "true"}
        succeed(run_script("train.py", *options(small_digits, small, **more), ranks=2))
        np.testing.assert_allclose(losses(large), losses(small), rtol=2e-5)

    @pytest.mark.parametrize("stage", [1, 2, 3])
    def test_zero_stages_follow_stage_0(
        self, stage: int, small_digits: Path, alone: Callable[..., Path], run_script: Run, tmp_path: Path
    ) -> None:
        plain, staged = alone(**self.FROZEN), tmp_path / "staged"
        more = self.FROZEN | {"deepspeed__zero_stage": stage}
        done = run_script("train.py", *options(small_digits, staged, **more), ranks=2)
        succeed(done)
        # What DeepSpeed calls by names that PyTorch has changed is nothing that a user can mend.
        assert "deprecated" not in done.stderr
        np.testing.assert_allclose(losses(plain), losses(staged), rtol=1e-4)
        first, second = weights(plain), weights(staged)
        assert all(first[k].shape == second[k].shape for k in first)
        # The mark has a checksum of every file of every rank.
        (mark,) = (staged / "checkpoints").glob("*/mark.json")
        files = {path.name for path in mark.parent.iterdir()} - {"mark.json"}
        assert json.loads(mark.read_text())["files"].keys() == files and len(files) >= 3
        # Resuming needs DeepSpeed's own files of that stage.
        more |= {"train__epochs": 2}
        assert "resuming at epoch 2 " in succeed(
            run_script("train.py", *options(small_digits, staged, **more), ranks=2)
        )

    def test_slurm_variables_start_it(self, small_digits: Path, tmp_path: Path) -> None:
        port = str(free_port())
        processes = []
        for task in range(2):
            env = environment(
                SLURM_PROCID=str(task),
                SLURM_LOCALID=str(task),
                SLURM_STEP_NUM_TASKS="2",
                SLURM_STEP_TASKS_PER_NODE="2",
                SLURM_STEP_NODELIST="127.0.0.1",
                SLURM_JOB_ID=str(int(port) - 20000),
            )
            words = command("train.py", 1, "python") + options(small_digits, tmp_path / "run", train__epochs=1)
            processes.append(subprocess.Popen(words, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        out = [p.communicate(timeout=300)[0] for p in processes]
        assert [p.returncode for p in processes] == [0, 0]
        assert "2 x cpu" in out[0] and "test mAP" in out[0]
        assert out[1] == ""


class TestPhases:
    """Linear phase, then fine-tuning."""

    def test_linear_phase_leaves_the_backbone_alone(self, small_digits: Path, run_script: Run, tmp_path: Path) -> None:
        run = tmp_path / "run"
        succeed(
            run_script("train.py", *options(small_digits, run, train__linear_epochs=2, train__epochs=1, run__keep=9))
        )
        assert [(e["phase"], e["epoch"]) for e in read_metrics(run, "epoch")] == [
            ("linear", 1),
            ("linear", 2),
            ("finetune", 1),
        ]

        def module(tag: str) -> dict[str, torch.Tensor]:
            path = run / "checkpoints" / tag / "mp_rank_00_model_states.pt"
            return torch.load(path, weights_only=False)["module"]

        first, second, third = (module(f"{t}-u000000-w1") for t in ("linear-e0001", "linear-e0002", "finetune-e0001"))
        backbone = [k for k in first if "backbone" in k]
        assert all(torch.equal(first[k], second[k]) for k in backbone)
        assert not torch.equal(first["classifier.head.weight"], second["classifier.head.weight"])
        assert any(not torch.equal(second[k], third[k]) for k in backbone)

    def test_own_images_without_a_recipe(self, small_digits: Path, run_script: Run, tmp_path: Path) -> None:
        """Epochs by the number of images, and fine-tuning that gains nothing keeps what the linear phase had."""
        run, file = tmp_path / "run", tmp_path / "weights.safetensors"
        torch.manual_seed(7)  # not the run's own seed, which would make the same weights
        save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), file)
        words = ["--data.dir", small_digits, "--run.dir", run, "--model.backbone", "test_resnet"]
        words += ["--model.weights", file, "--deepspeed.tensorboard", "false"]
        words += ["--data.image_size", 64, "--train.epochs", 1, "--train.lr", 1e-9]
        words += ["--train.batch_size", 64, "--method", "an", "--train.precision", "fp32"]
        out = succeed(run_script("train.py", *words))
        assert "recipe: finetune, since --config names none" in out
        assert "train.linear auto: the head of the linear phase is solved for" in out
        train = yaml.safe_load((run / "config.yaml").read_text())["train"]
        assert (train["linear"], train["linear_epochs"]) == ("solve", 1)
        assert (train["epochs"], train["best_of"]) == (1, "run")
        epochs = {(e["phase"], e["epoch"]): e["val_map"] for e in read_metrics(run, "epoch")}
        results = json.loads((run / "results.json").read_text())
        best = (results["best_phase"], results["best_epoch"])
        assert best[0] == "linear" and epochs[best] == pytest.approx(results["best_val_map"], abs=1e-5)
        assert results["best_val_map"] == pytest.approx(epochs["finetune", 1], abs=0.1), (
            "it began from the best weights"
        )
        assert f"(linear epoch {best[1]})" in out
        kept = (run / "model.safetensors").read_bytes()
        assert "nothing left to train" in succeed(run_script("train.py", *words))
        assert (run / "model.safetensors").read_bytes() == kept

    def test_bf16_trains(self, small_digits: Path, run_script: Run, tmp_path: Path) -> None:
        run = tmp_path / "run"
        out = succeed(run_script("train.py", *options(small_digits, run, train__precision="bf16", train__epochs=1)))
        assert "bf16" in out
        assert all(v.dtype != torch.bfloat16 for v in weights(run).values())


class TestBadInput:
    """One sentence, exit status 1 or 2, nothing lost."""

    def refuse(self, done: subprocess.CompletedProcess[str], *words: str) -> None:
        assert done.returncode in (1, 2), done.stdout + done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert len(lines) == 1, done.stderr
        assert "Traceback" not in done.stderr
        for word in words:
            assert word in lines[0], lines[0]

    def test_not_a_manifest(self, run_script: Run, tmp_path: Path) -> None:
        self.refuse(run_script("train.py", "--data.dir", tmp_path), str(tmp_path), "spml-fast prepare")

    def test_config_typo(self, run_script: Run, tmp_path: Path) -> None:
        recipe = tmp_path / "typo.yaml"
        recipe.write_text("train: {epoch: 3}\n")
        self.refuse(run_script("train.py", "--config", recipe), "typo.yaml", "'epoch'", "epochs")

    def test_abbreviated_option(self, run_script: Run) -> None:
        self.refuse(run_script("train.py", "--train.epoch", 3), "--train.epoch")

    def test_alpha_must_be_positive(self, run_script: Run) -> None:
        self.refuse(run_script("train.py", "--model.alpha_train", 0), "model.alpha_train", "greater than 0")

    def test_missing_split(self, small_digits: Path, run_script: Run, tmp_path: Path) -> None:
        done = run_script("train.py", *options(small_digits, tmp_path / "run", data__train_split="trian"))
        self.refuse(done, "'trian'", "train")

    def test_run_directory_not_writable(self, small_digits: Path, run_script: Run, tmp_path: Path) -> None:
        blocker = tmp_path / "file"
        blocker.write_text("")
        self.refuse(run_script("train.py", *options(small_digits, blocker / "run")), str(blocker), "written")

    def test_image_deleted_after_preparation(self, run_script: Run, tmp_path: Path) -> None:
        from spml_fast.prepare.datasets.digits import prepare_digits

        manifest = prepare_digits(tmp_path / "digits", sizes={"train": 64, "val": 16, "test": 16})
        victim = Path(manifest.split("train").path(5))
        run = tmp_path / "run"
        succeed(run_script("train.py", *options(tmp_path / "digits", run, train__epochs=1)))
        victim.unlink()
        done = run_script("train.py", *options(tmp_path / "digits", run, train__epochs=2))
        self.refuse(done, victim.name)
        victim_back = Path(manifest.split("train").path(6)).read_bytes()
        victim.write_bytes(victim_back)
        out = succeed(run_script("train.py", *options(tmp_path / "digits", run, train__epochs=2)))
        assert "resuming at epoch 2 (from" in out

    def test_batch_of_one_trains(self, run_script: Run, tmp_path: Path) -> None:
        from spml_fast.prepare.datasets.digits import prepare_digits

        prepare_digits(tmp_path / "digits", sizes={"train": 5, "val": 3, "test": 3})
        succeed(run_script("train.py", *options(tmp_path / "digits", tmp_path / "run", train__batch_size=1)))

    def test_full_needs_full_labels(self, run_script: Run, tmp_path: Path, small_digits: Path) -> None:
        done = run_script("train.py", *options(small_digits, tmp_path / "run", method="partial"))
        self.refuse(done, "no observed negative")

    def test_evaluate_alpha_and_run(self, run_script: Run, tmp_path: Path) -> None:
        self.refuse(run_script("evaluate.py", "--run", tmp_path), "not a run directory")


class TestPartlyKnownLabels:
    """Real positives and negatives, the rest unknown, in training and in evaluation."""

    @pytest.fixture(scope="class")
    def data(self, small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        from spml_fast.data.manifest import Manifest

        folder = tmp_path_factory.mktemp("partly")
        manifest, rng = Manifest(small_digits), np.random.default_rng(0)
        lines = ["path,positives,negatives,split"]
        for name, split in manifest.splits.items():
            for i in range(len(split)):
                codes = split.known.rows([i])[0]
                known = rng.random(10) < 0.5
                lists = [";".join(str(c) for c in np.flatnonzero((codes == code) & known)) for code in (1, 0)]
                lines.append(f"{split.relative_path(i)},{lists[0]},{lists[1]},{name}")
        table = folder / "table.csv"
        table.write_text("\n".join(lines) + "\n")
        words = ["csv", "--table", table, "--images", manifest.image_root, "--out", folder / "data"]
        succeed(warm.run_script("prepare.py", *words))
        return folder / "data"

    def test_trains_and_scores_annotated_pairs_alone(self, data: Path, run_script: Run, tmp_path: Path) -> None:
        run = tmp_path / "run"
        monitor = json.dumps({"csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "csv"}})
        more = {"method": "partial", "model__alpha_train": 1, "deepspeed__extra": monitor}
        succeed(run_script("train.py", *options(data, run, **more)))
        assert list((tmp_path / "csv").glob("*.csv")), "DeepSpeed's CSV monitor was not passed through"
        reports = []
        for ranks in (1, 2):
            out = tmp_path / f"{ranks}.json"
            succeed(run_script("evaluate.py", "--run", run, "--json", out, ranks=ranks))
            reports.append(json.loads(out.read_text()))
        assert reports[0] == reports[1]
        found = reports[0]["alpha"]["5"]
        # About half of 90 x 10 labels are known; a dense evaluation would count all 900.
        assert 350 < found["num_positives"] + found["num_negatives"] < 550
        assert found["empty_classes"] == "skip_unlabelled" and 0 < found["map"] < 100 and found["OF1_top3"] is not None
        assert json.loads((run / "results.json").read_text())["alpha"] == reports[0]["alpha"]
