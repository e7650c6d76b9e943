"""The one description of a run: frozen dataclasses whose fields are the YAML keys and the command line options.

The texts under `Attributes:` are the help texts. `dataclasses.replace` makes a section, or a run, with other values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from spml_fast.core.errors import UserError
from spml_fast.core.rules import (
    Section,
    adam_betas,
    all_different,
    all_positive,
    cache_place,
    channels,
    crc32_digits,
    fraction,
    not_negative,
    positive,
    ruled,
)

# Width x height of the largest image that is decoded unless another limit is given: half a gigabyte as RGB.
MAX_PIXELS = 178_956_970


def _seed(value: int) -> str | None:
    return None if 0 <= value < 2**63 else f"is {value}; it must lie between 0 and 2^63 - 1"


def _alphas(values: Sequence[float]) -> str | None:
    wrong = next((alpha for alpha in values if not alpha > 0), None)
    return None if wrong is None else f"has {wrong}; every alpha must be greater than 0"


@dataclass(frozen=True)
class DataConfig(Section):
    """Images and how they reach the model.

    Attributes:
        dir: Manifest directory made by `spml-fast prepare`, or the URL of one on object storage (s3://bucket/set); null
            builds and uses the embedded digit scenes.
        image_root: image folder, or URL of the shards, when it is not where it was at preparation.
        image_size: side of the square model input in pixels.
        train_split: split to train on.
        train_labels: which of its labels training sees: observed, those that were left when the data set was prepared,
            or known, everything that is annotated (the upper reference where labels were hidden; `partial` takes sets
            of which some labels are unknown even then).
        val_split: split for model selection after every epoch; null for none.
        test_split: split for the final figures; null for none.
        train_crop: squash resizes to the square ignoring the aspect ratio (the papers' way); random_resized crops.
        crop_scale: smallest fraction of the image's area that random_resized keeps.
        hflip: probability of a horizontal flip in training.
        cutout: side of the square of one random colour that covers a part of every training image, as a fraction of
            the image's; 0 for none. For methods with one view, as the programs of ASL, SPLC, Hill and CSL.
        randaugment: which view RandAugment changes: strong, which IGNORE has, on the image in its own size; or weak,
            the only view of other methods, behind the resize and cutout, as in the same programs.
        strong_from: what RandAugment of the strong view changes: original, the image in its own size (as published);
            or resized, the cropped and resized one, which is less work and another augmentation: one pixel of the view
            is moved or sharpened, not one of the image (docs/data.md).
        randaugment_ops: RandAugment operations per image in that view.
        randaugment_magnitude: RandAugment magnitude, 0 to 30.
        mean: per-channel mean in 0..1; null takes the backbone's.
        std: per-channel standard deviation in 0..1; null takes the backbone's.
        threads: decoding threads per process; 0 divides the cores evenly among the processes of a machine.
        prefetch: batches decoded ahead.
        shuffle: global draws every epoch's order from all samples; window reads shards a block at a time and shuffles
            within windows of blocks, for disks and mounts that are slow at random reads (docs/data.md).
        shuffle_window: samples of a window; shuffle_block times train.batch_size or more mixes batches well. Encoded
            images of two windows are in memory, spread over the ranks.
        shuffle_block: samples that follow each other in the shards and are read in one go.
        read_threads: threads per process that read shards ahead.
        cache_dir: folder that keeps what is read from object storage, for all processes of the machine; null for
            spml_fast/remote in the user's cache.
        cache_size: GB (10^9 bytes) of images that are kept there; 0 keeps none. What does not fit is read from the
            store in every epoch.
        bad_images: what to do when a training image is missing, damaged or unreadable. stop ends the run with its name;
            replace shows another image of the epoch in its place and lists it in the run directory. Evaluation always
            stops.
        bad_image_limit: bad_images replace goes on with so many different bad images, and stops at one more.
        cache: none decodes images anew in every epoch; auto keeps them decoded and resized in the Manifest's folder,
            any other value in the folder of that name (docs/data.md). For sets that fit on a disk, and views that are
            made of resized images: train_crop squash, and strong_from resized where there is a strong view.
        keep_decoded: GB (10^9 bytes) of memory for decoded images: a split that needs no more stays there once it was
            decoded, in every rank; 0 decodes in every epoch. Without a GPU, and with data.decode full, only.
        decode: full, or reduced: JPEGs at a half, a quarter or an eighth of their size where that is not below what the
            view shows, which is less work and rounds differently (docs/data.md). Without a GPU only; what data.cache
            keeps is decoded in full.
        max_pixels: width x height up to which an image is decoded where the Manifest does not know its size; a known
            size is the limit itself, so that an image that was swapped for a huge one is an error.
    """

    section: ClassVar[str] = "data"

    dir: str | None = None
    image_root: str | None = None
    image_size: int = positive(448)
    train_split: str = "train"
    train_labels: Literal["observed", "known"] = "observed"
    val_split: str | None = "val"
    test_split: str | None = "test"
    train_crop: Literal["squash", "random_resized"] = "squash"
    crop_scale: float = fraction(0.5)
    hflip: float = fraction(0.5)
    cutout: float = fraction(0.0)
    randaugment: Literal["strong", "weak"] = "strong"
    strong_from: Literal["original", "resized"] = "original"
    randaugment_ops: int = 3
    randaugment_magnitude: int = 5
    mean: list[float] | None = ruled(None, channels)
    std: list[float] | None = ruled(None, channels, all_positive)
    threads: int = not_negative(0)
    prefetch: int = positive(2)
    shuffle: Literal["global", "window"] = "global"
    shuffle_window: int = 8192
    shuffle_block: int = positive(64)
    read_threads: int = positive(4)
    cache_dir: str | None = None
    cache_size: float = not_negative(20.0)
    bad_images: Literal["stop", "replace"] = "stop"
    bad_image_limit: int = not_negative(100)
    cache: str = ruled("none", cache_place)
    keep_decoded: float = not_negative(0.25)
    decode: Literal["full", "reduced"] = "full"
    max_pixels: int = positive(MAX_PIXELS)

    def check(self) -> None:
        """A window holds whole blocks."""
        if self.shuffle_window < self.shuffle_block:
            raise UserError(
                f"data.shuffle_window is {self.shuffle_window}; it must be data.shuffle_block "
                f"({self.shuffle_block}) or more"
            )


@dataclass(frozen=True)
class HeadOptions:
    """A head without options of its own; those of a head with some are a subclass."""


@dataclass(frozen=True)
class ModelConfig(Section):
    """Backbone and head.

    Attributes:
        backbone: any timm model that gives a feature map, for example resnet50.tv_in1k or vit_base_patch16_224.
        pretrained: load the backbone's pretrained weights by timm's own means (a download or its cache).
        weights: local file with backbone weights (.safetensors, .pth), used instead of a download; or a run, to start
            from its best weights: backbone and head, whose classes are matched by name.
        weights_crc32: checksum that the weights file must have. A run that starts from another one writes it into its
            config.yaml, so that a repeat starts from the same weights.
        head: cam is 1x1 class weights, BoostLU and the spatial mean; query2label reads the features by cross-attention,
            a query for each class, and ml_decoder with a query for a group of classes, which suits thousands of them
            (neither has a map to boost, so alpha is 1 with them).
        head_options: options of that head, for example {preset: tiny} or --model.head_options.preset tiny for
            query2label; --model.head NAME --help explains those of NAME.
        alpha_train: BoostLU's factor on positive cells in training; 1 is the plain class activation map.
        alpha_eval: BoostLU's factor at evaluation.
        output_stride: stride of the feature map, where the backbone allows to choose; null takes its own.
        freeze_bn: keep BatchNorm statistics as they are (its weights still train).
        freeze: shell patterns of backbone parameter names that do not train, for example [conv1.*, layer1.*].
        sync_bn: BatchNorm statistics over all ranks (GPUs only).
        drop_path: stochastic depth rate; null takes the backbone's default.
        grad_checkpointing: recompute activations in the backward, to save memory.
        compile: torch.compile the backbone's training passes; auto does it where that pays for the minute that it
            takes, which is tried where training is long enough (docs/operations.md). The run keeps what was chosen.
        prior_bias: start the head's biases at the logit of each class's fraction of positives among its observed labels
            (labels), or among all images (images: what assumed negative is headed for); none leaves them random.
        prior_floor: smallest fraction, and 1 minus the largest, that prior_bias takes.
    """

    section: ClassVar[str] = "model"

    backbone: str = "resnet50.tv_in1k"
    pretrained: bool = True
    weights: str | None = None
    weights_crc32: str | None = ruled(None, crc32_digits)
    head: str = "cam"
    head_options: HeadOptions | dict[str, Any] = field(default_factory=dict)
    alpha_train: float = positive(5.0)
    alpha_eval: float = positive(5.0)
    output_stride: int | None = None
    freeze_bn: bool = False
    freeze: list[str] = field(default_factory=list)
    sync_bn: bool = False
    drop_path: float | None = None
    grad_checkpointing: bool = False
    compile: Literal["auto"] | bool = False
    prior_bias: Literal["none", "labels", "images", "pictures"] = "none"
    prior_floor: float = 1e-3


@dataclass(frozen=True)
class TrainConfig(Section):
    """Optimisation.

    Attributes:
        epochs: epochs of fine-tuning (the whole network); null takes a number that suits the number of training images
            (docs/operations.md), which the run then shows and keeps.
        linear_epochs: epochs before that with a frozen backbone, training the head only (linear-init protocol); null
            as for epochs.
        linear: how that head is trained. sgd trains it for linear_epochs epochs like everything else; solve takes one
            pass over the images and solves for its optimum (docs/methods.md#a-head-that-is-solved-for), for methods and
            heads that allow it; auto solves where that is possible and linear_epochs is null, and else trains.
        linear_lr: head learning rate of the linear phase; null takes lr times head_lr_multiplier.
        batch_size: samples of one optimizer update, over all ranks and accumulation steps.
        accumulation: forward and backward passes per update.
        drop_last: leave out an epoch's last batch where it is smaller than batch_size, as some released programs do;
            which images that concerns differs from epoch to epoch.
        exact_accumulation: batch statistics of the method over the whole update instead of each micro-step; costs one
            more forward without gradient a step. No effect when accumulation is 1.
        lr: learning rate of the backbone (peak value for one_cycle and cosine).
        head_lr_multiplier: the head's learning rate is lr times this.
        optimizer: torch optimizer.
        weight_decay: weight decay; not applied to biases and norms unless decay_all.
        decay_all: apply weight decay to every parameter.
        momentum: SGD momentum.
        betas: Adam betas.
        schedule: learning rate over updates.
        warmup_share: fraction of the updates during which the learning rate rises (one_cycle, cosine).
        clip: largest global gradient norm; 0 is off.
        ema_decay: decay of an exponential moving average of the weights (then evaluated and saved); 0 is off.
        average_weights: evaluate and save the mean of the weights after every update of fine-tuning, those that it
            starts from included, in the place of the last ones; not together with ema_decay.
        precision: bf16 runs the network under autocast; auto takes it on GPUs from sm_80, and on a CPU where steps of
            the run's network, which are timed at the start, are 1.15 times as fast with it; fp32 elsewhere. The run
            keeps what was chosen.
        best_of: which epochs compete for the best validation mAP, whose weights are kept: those of fine-tuning alone
            (finetune, as published), or those of the linear phase too (run), so that fine-tuning cannot lose what the
            linear phase had.
        stop_after_drop: stop when validation mAP falls this many points below the best; 0 never stops.
        patience: stop a phase when so many validations in a row were not its best; 0 never stops.
        log_every: updates between two progress lines in metrics.jsonl.
        nonfinite: what to do about an update whose loss or gradient is not finite. stop ends the run with the images of
            that batch in nonfinite.jsonl, and keeps the checkpoint of before; skip leaves the update out, and asks the
            device after every update.
        nonfinite_limit: updates that skip leaves out before it stops the run, counted anew in each phase and after a
            resume.
        sampling: uniform shows every image once an epoch; repeat_factor shows images of rare classes more often
            (LVIS; spml_fast/data/repeat_factor.py has the formula), so that an epoch is longer.
        repeat_threshold: repeat_factor repeats classes with a positive in a smaller fraction of the images than this.
    """

    section: ClassVar[str] = "train"

    epochs: int | None = positive(10)
    linear_epochs: int | None = not_negative(0)
    linear: Literal["sgd", "solve", "auto"] = "sgd"
    linear_lr: float | None = positive(None)
    batch_size: int = positive(16)
    accumulation: int = positive(1)
    drop_last: bool = False
    exact_accumulation: bool = False
    lr: float = positive(1e-5)
    head_lr_multiplier: float = positive(10.0)
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    weight_decay: float = not_negative(0.0)
    decay_all: bool = False
    momentum: float = not_negative(0.9)
    betas: list[float] = ruled([0.9, 0.999], adam_betas)
    schedule: Literal["constant", "one_cycle", "cosine"] = "constant"
    warmup_share: float = fraction(0.2)
    clip: float = not_negative(0.0)
    ema_decay: float = fraction(0.0)
    average_weights: bool = False
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    best_of: Literal["finetune", "run"] = "finetune"
    stop_after_drop: float = not_negative(0.0)
    patience: int = not_negative(0)
    log_every: int = positive(50)
    nonfinite: Literal["stop", "skip"] = "stop"
    nonfinite_limit: int = positive(10)
    sampling: Literal["uniform", "repeat_factor"] = "uniform"
    repeat_threshold: float = 1e-3

    def check(self) -> None:
        """A head that is solved for takes one pass; there is one average."""
        if self.linear == "solve" and self.linear_epochs not in (None, 1):
            raise UserError(
                f"train.linear solve is one pass, and train.linear_epochs is {self.linear_epochs}; set it to null (or "
                "train.linear to sgd)"
            )
        if self.average_weights and self.ema_decay:
            raise UserError(
                "train.average_weights and train.ema_decay are two averages of the weights; take one of them"
            )


@dataclass(frozen=True)
class EvalConfig(Section):
    """Evaluation.

    Attributes:
        alphas: BoostLU factors to report at the end; null reports 1 and model.alpha_eval. All come from one pass.
        batch_size: images per rank and forward; every batch is padded to this size, so results do not depend on ranks.
        definition: average precision as scikit-learn defines it, by rank, or VOC-interpolated.
        every: epochs between two validations.
        threshold: probability above which a class counts as predicted (OP, OR, OF1, CP, CR, CF1).
        empty_classes: what the headline mAP does with classes without a known positive; zero counts them as 0,
            skip_unlabelled leaves out those without any label (Large Loss and BoostLU on OpenImages), skip all of
            them, skip_one_sided those without a negative too (CSL on OpenImages V6). Null takes zero for fully
            annotated splits and skip_unlabelled for others. All of them are reported.
        groups: mAP also for so many groups of classes, sorted by their number of labels in the training split; 0 for
            none, null for five where the training labels are partly known.
        group_by: number of labels means positives and negatives (labels) or positives alone.
    """

    section: ClassVar[str] = "eval"

    alphas: list[float] | None = ruled(None, _alphas)
    batch_size: int = positive(64)
    definition: Literal["sklearn", "rank", "voc"] = "sklearn"
    every: int = positive(1)
    threshold: float = fraction(0.5)
    empty_classes: Literal["zero", "skip_unlabelled", "skip", "skip_one_sided"] | None = None
    groups: int | None = not_negative(None)
    group_by: Literal["labels", "positives"] = "labels"


@dataclass(frozen=True)
class EngineConfig(Section):
    """DeepSpeed.

    Attributes:
        zero_stage: ZeRO stage. 0 suits CNNs (and keeps their weights channels_last); 1 saves memory on large ViTs.
        overlap_gradients: at ZeRO stage 0, average gradients over ranks while the backward still computes, in buckets;
            false, or a section of `extra` about it, leaves that to DeepSpeed, which begins after the backward.
        tensorboard: false leaves tensorboard out of run.trackers.
        extra: further sections for DeepSpeed's configuration as they are, for example
            {wandb: {enabled: true, project: spml}, csv_monitor: {enabled: true, output_path: runs/csv}}.
    """

    section: ClassVar[str] = "deepspeed"

    zero_stage: Literal[0, 1, 2, 3] = 0
    overlap_gradients: bool = True
    tensorboard: bool = True
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunConfig(Section):
    """Where the run lives.

    Attributes:
        dir: run directory; null makes a new one under runs/.
        resume: auto resumes from the newest whole checkpoint in the run directory if there is one, never starts afresh
            and refuses a directory that has one, force is auto that takes a checkpoint of another method, data set or
            model as far as it fits; anything else is the path of a run or a checkpoint to resume from.
        seed: seed of everything random.
        keep: checkpoints kept beside the best one.
        save_updates: also save every so many updates within an epoch; 0 does not.
        save_minutes: also save within an epoch when the last save is so many minutes ago; 0 does not.
        stop_seconds: SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR1 save at the next update and end the run. It ends
            without that, and the checkpoint before stays, where so many seconds are not enough; launchers kill after
            30.
        deterministic: on a GPU, take algorithms that give the same bits in every run, and say so where PyTorch has
            none. Off, cuDNN times its algorithms and takes the fastest, and repeated runs differ by rounding. CPU runs
            repeat bit for bit either way.
        timeout_minutes: minutes that ranks wait for one that does not move (its machine is lost, it hangs) before the
            run ends. What rank 0 does alone may take longer.
        trackers: where the run's figures are shown beside metrics.jsonl: tensorboard, wandb, mlflow, trackio; all but
            the first need a package (docs/operations.md).
        tracker_images: test images that trackers show with their predictions at the end; 0 sends none.
        tracker_options: options by tracker, for example {wandb: {project: birds, mode: offline}}.
        profile: measure where the time of so many updates goes, in an epoch of each phase, and keep a trace of them
            (docs/performance.md); null does not.
        plugins: modules, or paths of .py files, to import first because they register the run's method, head or data
            set; --plugins NAME adds one.
    """

    section: ClassVar[str] = "run"

    dir: str | None = None
    resume: str = "auto"
    seed: int = ruled(0, _seed)
    keep: int = positive(1)
    save_updates: int = not_negative(0)
    save_minutes: float = not_negative(10.0)
    stop_seconds: float = positive(25.0)
    deterministic: bool = False
    timeout_minutes: float = positive(10.0)
    trackers: list[str] = ruled(["tensorboard"], all_different)
    tracker_images: int = not_negative(8)
    tracker_options: dict[str, Any] = field(default_factory=dict)
    profile: int | None = positive(None)
    plugins: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class MethodOptions(Section):
    """Method.

    Attributes:
        name: the method.
    """

    section: ClassVar[str] = "method"

    name: str = ""


@dataclass(frozen=True)
class Config:
    """A whole run.

    Attributes:
        method: options of the method chosen, an instance of that method's `Options`.
        data: images and how they reach the model.
        model: backbone and head.
        train: optimisation.
        eval: evaluation.
        deepspeed: DeepSpeed.
        run: where the run lives.

    Raises:
        UserError: options of two sections do not go together.
    """

    method: MethodOptions
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    deepspeed: EngineConfig = field(default_factory=EngineConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        averaged = "ema_decay" if self.train.ema_decay else "average_weights" if self.train.average_weights else None
        if averaged is not None and self.deepspeed.zero_stage == 3:
            raise UserError(f"train.{averaged} does not work with deepspeed.zero_stage 3 (no rank holds whole weights)")


SECTIONS: dict[str, type[Section]] = {
    "data": DataConfig,
    "model": ModelConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "deepspeed": EngineConfig,
    "run": RunConfig,
}
