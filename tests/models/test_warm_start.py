"""A classifier that starts from another's weights: classes by name, other image sizes, heads that do not fit."""

from __future__ import annotations

import pytest
import torch

from spml_fast.core.config import ModelConfig
from spml_fast.core.errors import UserError
from spml_fast.models.classifier import Classifier
from spml_fast.models.heads import get_head
from spml_fast.models.warm_start import start_from

THERE, HERE = ["ant", "bee", "cat"], ["cat", "dog", "ant", "eel"]


def classifier(classes: int, size: int = 64, backbone: str = "test_resnet", **options: object) -> Classifier:
    model = ModelConfig(backbone=backbone, pretrained=False, alpha_train=1.0, alpha_eval=1.0, **options)  # type: ignore[arg-type]
    return Classifier(model, classes, size).eval()


HEAD_OPTIONS: dict[str, dict[str, object]] = {
    "cam": {},
    # A query for each class: classes that share one cannot be matched.
    "ml_decoder": {"hidden": 32, "ffn": 48, "dropout": 0.0},
    "query2label": {"preset": "tiny", "dropout": 0.0},
}


@pytest.mark.parametrize("head", HEAD_OPTIONS)
def test_logits_of_the_classes_that_both_have(head: str) -> None:
    """The outcome, whatever parameters a head has: an image gets the logits that it got before."""
    options = {"head": head, "head_options": HEAD_OPTIONS[head]}
    source, target = classifier(3, **options), classifier(4, **options)
    fresh = {name: value.clone() for name, value in target.state_dict().items()}
    done = start_from(target, source.state_dict(), THERE, HERE, "RUN")
    assert (done.head, done.matched, done.new, done.left_out, done.resampled) == (True, 2, ("dog", "eel"), ("bee",), ())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before, after = source(images).logits, target(images).logits
    assert torch.allclose(after[:, [0, 2]], before[:, [2, 0]], atol=1e-5)
    for name in (f"head.{name}" for name in get_head(head).class_parameters):
        assert torch.equal(target.state_dict()[name][[1, 3]], fresh[name][[1, 3]]), "new classes start fresh"


def test_positions_are_resampled_to_another_image_size() -> None:
    source, target = classifier(3, 64, "test_vit"), classifier(3, 96, "test_vit")
    done = start_from(target, source.state_dict(), THERE, THERE, "RUN")
    assert done.resampled == ("pos_embed",)
    own, theirs = target.state_dict(), source.state_dict()
    assert own["backbone.pos_embed"].shape != theirs["backbone.pos_embed"].shape
    # The code of the class token is no position; the mean of the others stays about where it was.
    assert torch.equal(own["backbone.pos_embed"][:, 0], theirs["backbone.pos_embed"][:, 0])
    assert torch.allclose(
        own["backbone.pos_embed"][:, 1:].mean(), theirs["backbone.pos_embed"][:, 1:].mean(), atol=1e-3
    )
    rest = [name for name in own if name != "backbone.pos_embed"]
    assert all(torch.equal(own[name], theirs[name]) for name in rest)


def test_what_does_not_fit() -> None:
    target = classifier(3)
    before = {name: value.clone() for name, value in target.head.state_dict().items()}
    # Another kind of head, whose part the caller leaves out, and one of another width.
    state = {name: value for name, value in classifier(3).state_dict().items() if not name.startswith("head.")}
    done = start_from(target, state, THERE, THERE, "RUN")
    assert not done.head and done.matched == 0 and done.new == tuple(THERE)
    wide = classifier(3).state_dict() | {"head.weight": torch.zeros(3, 7)}
    assert not start_from(target, wide, THERE, THERE, "RUN").head
    assert all(torch.equal(before[name], value) for name, value in target.head.state_dict().items())
    with pytest.raises(UserError, match="RUN does not fit the backbone: only one of them has "):
        start_from(target, classifier(3, 64, "test_vit").state_dict(), THERE, THERE, "RUN")
    odd = classifier(3).state_dict()
    name = next(name for name in odd if name.startswith("backbone.") and odd[name].ndim == 4)
    with pytest.raises(UserError, match=r"has the shape \[1, 2\] there and .* here, and timm cannot resample it"):
        start_from(target, odd | {name: torch.zeros(1, 2)}, THERE, THERE, "RUN")
    with pytest.raises(UserError, match="holds conv1, which is no part of a classifier"):
        start_from(target, {"conv1": torch.zeros(1)}, THERE, THERE, "RUN")


def test_a_head_that_does_not_tell_its_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = classifier(3), classifier(3)
    monkeypatch.setattr(type(target.head), "class_parameters", ())
    assert start_from(target, source.state_dict(), THERE, THERE, "RUN").head
    with pytest.raises(UserError, match=r"other classes, and head CamHead does not say .* \(Head.class_parameters\)"):
        start_from(target, source.state_dict(), ["cat", "bee", "ant"], THERE, "RUN")


def test_classes_that_share_queries() -> None:
    """Two classes a query: the same classes in the same order are taken over, and no others are guessed at."""
    options = {"head": "ml_decoder", "head_options": {"hidden": 32, "ffn": 48, "groups": 2}}
    images = torch.randn(2, 3, 64, 64)
    source, same, other, more = (classifier(n, **options) for n in (4, 4, 4, 3))
    assert start_from(same, source.state_dict(), HERE, HERE, "RUN").head
    with torch.no_grad():
        assert torch.equal(same(images).logits, source(images).logits)
    for target, here in ((other, HERE[::-1]), (more, HERE[:3])):
        before = {name: value.clone() for name, value in target.head.state_dict().items()}
        done = start_from(target, source.state_dict(), HERE, here, "RUN")
        assert not done.head and done.matched == 0 and done.new == tuple(here)
        assert done.obstacle == (
            "2 of its classes share a query, so that they cannot be matched by name, and the run has other classes or "
            "another order"
        )
        assert all(torch.equal(before[name], value) for name, value in target.head.state_dict().items())
        backbone = target.backbone.state_dict()
        assert all(torch.equal(backbone[n], value) for n, value in source.backbone.state_dict().items())
    # A query for each class on one side alone: other sizes.
    alone = classifier(4, head="ml_decoder", head_options={"hidden": 32, "ffn": 48})
    assert start_from(alone, source.state_dict(), HERE, HERE, "RUN").obstacle == "that of the run has other sizes"
