"""A trained run for use without this program: an ONNX model, or weights for timm.

ONNX: images in, logits and probabilities out, with normalisation and BoostLU inside the graph. Safetensors: where the
model at alpha 1 is timm's own model of that name (global average pooling and a linear layer), weights under timm's
names, which `timm.create_model` takes; else backbone and head beside each other, as the run has them. An ONNX model and
a timm model are compared with the run's own classifier before the file gets its final name. What is needed to use a
file is in its metadata.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import io
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from spml_fast import __version__
from spml_fast.core import env
from spml_fast.core.config import Config
from spml_fast.core.errors import UserError
from spml_fast.core.io import atomic_write
from spml_fast.core.progress import show_progress
from spml_fast.data.manifest import Manifest, may_exist
from spml_fast.evaluation.decisions import Decisions
from spml_fast.models.backbone import create_whole_model, needs_fixed_size
from spml_fast.models.classifier import Classifier
from spml_fast.runs.open import DIGITS_DIR, input_normalisation, make_eval_loader

ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
OPSET = 20
# Images that an export is compared on.
CHECKED = 4
# Largest difference of a logit, as a fraction of the largest (timm's model: bias left out). Other orders of summation
# in fp32 give 1e-5; a model that pools or normalises in another way differs by about the whole logit.
ALLOWED = 1e-3
# An ONNX file is one protobuf message, which ends at 2 GiB; the graph around the weights is far below 32 MiB.
ONNX_LIMIT = 2**31 - 2**25
RESIZE = "resize both sides to the size, bilinear with antialiasing (Pillow's BILINEAR), 8 bits per channel"


class ImageModel(nn.Module):
    """The classifier with normalisation in front and probabilities behind.

    Args:
        classifier: in eval mode.
        alpha: BoostLU's factor, fixed in the graph; 1 for heads without a map.
        mean: of the channels, 0..1.
        std: of the channels, 0..1.
        decisions: whose calibration the probabilities have, or None.
    """

    def __init__(
        self,
        classifier: Classifier,
        alpha: float,
        mean: list[float],
        std: list[float],
        decisions: Decisions | None = None,
    ) -> None:
        super().__init__()
        self.classifier, self.alpha = classifier, alpha
        self.calibrated = decisions is not None and decisions.calibrated
        if decisions is not None and decisions.calibrated:
            self.register_buffer("scale", torch.from_numpy(decisions.calibration.scale).float())
            self.register_buffer("shift", torch.from_numpy(decisions.calibration.shift).float())
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and probabilities [B, C] of RGB images [B, 3, S, S], fp32 with values 0..255."""
        assert isinstance(self.mean, Tensor) and isinstance(self.std, Tensor)
        logits = self.classifier((images - self.mean) / self.std, alpha=self.alpha).logits
        if not self.calibrated:
            return logits, torch.sigmoid(logits)
        assert isinstance(self.scale, Tensor) and isinstance(self.shift, Tensor)
        return logits, torch.sigmoid(logits * self.scale + self.shift)


def describe(
    config: Config, classifier: Classifier, classes: list[str], alpha: float, decisions: Decisions | None = None
) -> dict[str, str]:
    """Metadata needed to use the model.

    Args:
        config: the run's.
        classifier: with the run's weights.
        classes: class names in class-id order.
        alpha: BoostLU's factor in evaluation.
        decisions: the run's for this alpha, or None.

    Returns:
        Name -> text; lists are JSON.
    """
    mean, std = input_normalisation(config, classifier)
    decided = {} if decisions is None else decisions.metadata()
    return decided | {
        "classes": json.dumps(classes, ensure_ascii=False),
        "image_size": str(config.data.image_size),
        "resize": RESIZE,
        "mean": json.dumps(mean),
        "std": json.dumps(std),
        "backbone": config.model.backbone,
        "head": config.model.head,
        "head_options": json.dumps(dataclasses.asdict(classifier.head.options)),
        "alpha": f"{alpha:g}",
        "prefix_tokens": str(classifier.prefix_tokens),
        "method": str(config.method.name),
        "precision": config.train.precision,
        "spml_fast": __version__,
    }


def sample_images(config: Config, classifier: Classifier) -> tuple[Tensor, str]:
    """Images [n, 3, S, S], fp32 RGB 0..255, and what they are.

    They are the first of the run's test split, or noise where its data set is missing.
    """
    side = config.data.image_size
    noise = torch.rand(CHECKED, 3, side, side, generator=torch.Generator().manual_seed(0)) * 255, f"{CHECKED} of noise"
    folder, name = config.data.dir or DIGITS_DIR, config.data.test_split or config.data.train_split
    if not may_exist(folder):
        return noise
    manifest = Manifest.configured(config.data, DIGITS_DIR)
    if name not in manifest.splits:
        return noise
    split = manifest.split(name)
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, batch_size=min(CHECKED, len(split))))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in input_normalisation(config, classifier))
    try:
        loader = make_eval_loader(config, split, classifier, torch.device("cpu"))
        batch = next(iter(loader))
    except UserError:
        # The data set's table exists but its images do not.
        return noise
    images = ((batch.views["eval"][: batch.real] * std + mean) * 255).round().contiguous()
    return images, f"{len(images)} of split {name}"


def check_finite(logits: Tensor) -> None:
    """Raise `UserError` where a logit of the run is not finite."""
    if not bool(logits.isfinite().all()):
        raise UserError("the run gives logits that are not numbers: it has diverged, or its weights are damaged")


def difference(actual: Tensor, expected: Tensor, bias: Tensor | None = None) -> tuple[float, bool]:
    """Largest difference of logits [B, C], and whether it is rounding; what the images add to `bias` [C] counts."""
    if actual.shape != expected.shape:
        return float("inf"), False
    max_difference = float((actual - expected).abs().max())
    size = float((expected if bias is None else expected - bias).abs().max())
    return max_difference, max_difference <= ALLOWED * size


def need_onnx() -> None:
    """Raise `UserError` unless everything that an ONNX export takes is installed."""
    lacking = [p for p in ONNX_PACKAGES if importlib.util.find_spec(p) is None]
    if lacking:
        raise UserError(f"{', '.join(lacking)} not installed; run pip install -e '.[onnx]' first")


def export_onnx(
    classifier: Classifier,
    config: Config,
    classes: list[str],
    alpha: float,
    out: Path,
    decisions: Decisions | None = None,
) -> tuple[float, str]:
    """Write an ONNX model.

    Its input `images` is fp32 [batch, 3, S, S], RGB with values 0..255; its outputs `logits` and `probabilities` are
    fp32 [batch, C]. The batch size is free. Metadata: `describe`.

    Args:
        classifier: on the CPU, in eval mode.
        config: the run's.
        classes: class names in class-id order.
        alpha: BoostLU's factor, fixed in the graph.
        out: the file; an older one is replaced once the new one has passed.
        decisions: the run's for this alpha; their calibration is in the graph, their thresholds in the metadata.

    Returns:
        Largest difference of a logit between ONNX Runtime and the classifier, and on which images.

    Raises:
        UserError: a package is missing, the model cannot be exported or is too large, its logits differ, or the file
            cannot be written.
    """
    need_onnx()
    import onnx

    model = ImageModel(classifier, alpha, *input_normalisation(config, classifier), decisions).eval()
    size = sum(t.nbytes for t in model.state_dict().values())
    if size >= ONNX_LIMIT:
        raise UserError(f"the weights take {size / 1e9:.1f} GB and an ONNX file holds 2.1; use --format safetensors")
    images, source = sample_images(config, classifier)
    with env.reference_kernels(), torch.no_grad(), show_progress(2, "tracing the network", unit="steps") as advance:
        expected = model(images)[0]
        check_finite(expected)
        advance(1)
        program = _trace(model, images, config.model.backbone)
        advance(1)
    try:
        with atomic_write(out) as partial:
            program.save(str(partial), external_data=False)
            written = onnx.load(str(partial))
            del written.metadata_props[:]
            side = config.data.image_size
            metadata = describe(config, classifier, classes, alpha, decisions)
            metadata["input"] = f"images: float32 [batch, 3, {side}, {side}], RGB, values 0 to 255, not normalised"
            onnx.helper.set_model_props(written, metadata)
            written.producer_name, written.producer_version = "spml_fast", __version__
            onnx.save(written, str(partial))
            with show_progress(1, f"checking {out.name}", unit="steps") as advance:
                max_difference, same = difference(_run_onnx(partial, images, config.model.backbone), expected)
                advance(1)
            if not same:
                raise UserError(
                    "the ONNX model gives other logits than the run "
                    f"(largest difference {max_difference:.3g}); it was not written"
                )
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from error
    return max_difference, source


def _trace(model: ImageModel, images: Tensor, name: str) -> torch.onnx.ONNXProgram:
    """The model as an ONNX program with a free batch size; `name` of the backbone is for error messages."""
    # Of two images, since a batch of one would be taken for fixed.
    example = images[:1].expand(2, -1, -1, -1).contiguous()
    output, log = io.StringIO(), logging.getLogger("torch.onnx")
    level = log.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.setLevel(logging.ERROR)
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                program = torch.onnx.export(
                    model,
                    (example,),
                    dynamo=True,
                    opset_version=OPSET,
                    input_names=["images"],
                    output_names=["logits", "probabilities"],
                    dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                    verbose=False,
                )
        except Exception as error:
            # The exporter follows the model's own code, where anything may happen.
            text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UserError(f"{name} cannot be exported to ONNX: {text}") from error
        finally:
            log.setLevel(level)
    assert program is not None
    return program


def _run_onnx(path: Path, images: Tensor, name: str) -> Tensor:
    """Logits [n, C] of the file by ONNX Runtime; `name` of the backbone is for error messages."""
    import onnx
    import onnxruntime

    try:
        onnx.checker.check_model(str(path), full_check=True)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
    except Exception as error:
        # The classes of their errors are not public.
        text = " ".join(str(error).split())
        raise UserError(f"ONNX Runtime does not run the exported {name}: {text}") from error


def timm_options(config: Config) -> dict[str, Any]:
    """Arguments of `timm.create_model`, beside the name and the number of classes, that give the run's backbone."""
    options: dict[str, Any] = {}
    if config.model.output_stride is not None:
        options["output_stride"] = config.model.output_stride
    if needs_fixed_size(config.model.backbone):
        options["img_size"] = config.data.image_size
    return options


def as_timm_model(
    classifier: Classifier, config: Config, num_classes: int, options: dict[str, Any]
) -> nn.Module | None:
    """timm's model of the backbone's name with the run's weights, classifier included; None where it has other parts.

    Whether it gives the same logits is for the caller to see.

    Args:
        classifier: on the CPU.
        config: the run's.
        num_classes: C.
        options: of `timm.create_model`, such as `timm_options`.
    """
    if config.model.head != "cam":
        return None
    model: nn.Module = create_whole_model(config.model.backbone, num_classes, options)
    # timm's models have more than nn.Module promises.
    layer: Any = getattr(model, "get_classifier", lambda: None)()
    head = classifier.head
    if not isinstance(layer, nn.Linear | nn.Conv2d) or layer.bias is None:
        return None
    assert isinstance(head.weight, Tensor) and isinstance(head.bias, Tensor)
    if layer.weight.numel() != head.weight.numel():
        return None
    name = next(n for n, m in model.named_modules() if m is layer)
    weights = dict(classifier.backbone.state_dict())
    weights |= {f"{name}.weight": head.weight.reshape(layer.weight.shape), f"{name}.bias": head.bias}
    if set(weights) != set(model.state_dict()):
        return None
    model.load_state_dict(weights)
    return model.eval()


def export_safetensors(
    classifier: Classifier, config: Config, classes: list[str], out: Path, decisions: Decisions | None = None
) -> tuple[str, float, str]:
    """Write weights, under timm's names where timm's model gives the same logits at alpha 1.

    Args:
        classifier: on the CPU, in eval mode.
        config: the run's.
        classes: class names in class-id order.
        out: the file; an older one is replaced.
        decisions: the run's, which go into the metadata; or None.

    Returns:
        The layout: `timm` for a state of timm's whole model, `parts` for `backbone.` and `head.` beside each other;
        the largest difference of a logit between timm's model and the run's classifier (0 for `parts`, which are the
        run's own tensors), and on which images.

    Raises:
        UserError: the run's logits are not finite, or the file cannot be written.
    """
    images, source = sample_images(config, classifier)
    mean, std = (255 * torch.tensor(v).view(3, 1, 1) for v in input_normalisation(config, classifier))
    layout, max_difference, state = "parts", 0.0, classifier.state_dict()
    with torch.no_grad():
        views = (images - mean) / std
        expected = classifier(views).logits
        check_finite(expected)
        model = as_timm_model(classifier, config, len(classes), timm_options(config))
        if model is not None:
            bias = classifier.head.bias
            assert isinstance(bias, Tensor)
            timm_difference, same = difference(model(views), expected, bias)
            # A model that normalises after pooling, or pools a token, is another one.
            if same:
                layout, max_difference, state = "timm", timm_difference, model.state_dict()
    metadata = describe(config, classifier, classes, classifier.alpha_eval, decisions) | {
        "layout": layout,
        "timm_options": json.dumps(timm_options(config)),
        "timm": importlib.metadata.version("timm"),
    }
    try:
        with atomic_write(out) as partial:
            save_file({k: v.detach().cpu().contiguous().clone() for k, v in state.items()}, partial, metadata=metadata)
    except (OSError, SafetensorError) as error:
        # The library writes by itself, and has an error of its own for a full disk or a folder that may not be written.
        raise UserError(f"{out} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    return layout, max_difference, source
