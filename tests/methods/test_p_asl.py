"""P-ASL: which unknown labels are left out, and the classes' priors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from spml_kernels import IGNORED

from spml_fast.core.errors import UserError
from spml_fast.data.labels import SparseLabels
from spml_fast.methods import get_method
from spml_fast.methods.p_asl import check_prior_out
from tests.support.formulas import (
    EPOCH_1,
    EPOCH_3,
    N,
    P,
    U,
    batch_of,
    f_p_asl,
    make,
    numeric_gradient,
    run,
    some_codes,
    some_logits,
)


def test_p_asl_selection() -> None:
    """The K B unknown entries of highest score go, and the classes whose prior is above eta."""
    codes = some_codes(6, 20)
    logits = some_logits(6, 20)
    method = make("p_asl", codes, top_k=2)
    weights = (codes != U) * 1.0
    unknown = sorted((float(z), i) for i, z in enumerate(logits.flatten()) if codes.flat[i] == U)
    for _, i in unknown[:-12]:
        weights.flat[i] = 1.0
    loss, gradient = run(method, logits, batch_of(codes))
    z = logits.numpy()
    formula = f_p_asl(weights, (0, 1, 4))
    assert loss.item() == pytest.approx(formula(z, z, codes), rel=1e-9)
    np.testing.assert_allclose(gradient.numpy(), numeric_gradient(formula, z, codes), rtol=1e-6, atol=1e-8)
    # The prior takes further entries; the 12 are still chosen among all unknown ones.
    method.given_prior = torch.linspace(0, 0.095, 20)
    weights[(codes == U) & (np.linspace(0, 0.095, 20) > 0.05)] = 0
    assert run(method, logits, batch_of(codes))[0].item() == pytest.approx(f_p_asl(weights, (0, 1, 4))(z, z, codes))


def test_p_asl_running_prior() -> None:
    """The mean sigmoid of all earlier training predictions; an evaluation does not count."""
    codes = some_codes(6, 5)
    method = make("p_asl", codes, prior="running", top_k=0, eta=0.5)
    first, second = some_logits(6, 5, 1), some_logits(6, 5, 2)
    run(method, first, batch_of(codes))
    np.testing.assert_allclose(method.class_prior(), torch.sigmoid(first).mean(0))
    prior = method.class_prior().numpy()
    assert (prior > 0.5).any() and (prior < 0.5).any()
    weights = np.where((codes == U) & (prior > 0.5), 0.0, 1.0)
    loss, _ = run(method, second, batch_of(codes))
    z = second.numpy()
    assert loss.item() == pytest.approx(f_p_asl(weights, (0, 1, 4))(z, z, codes))
    both = torch.sigmoid(torch.cat([first, second])).mean(0)
    np.testing.assert_allclose(method.class_prior(), both)
    method.eval()
    run(method, first, batch_of(codes))
    np.testing.assert_allclose(method.class_prior(), both)


def test_p_asl_prior_files(tmp_path: Any) -> None:
    """A run writes what the next one reads."""
    codes = some_codes(6, 5)
    path = tmp_path / "prior.txt"
    first = make("p_asl", codes, mode="ignore", prior_out=str(path))
    logits = some_logits(6, 5)
    run(first, logits, batch_of(codes))
    first.on_epoch_end(EPOCH_1)
    second = make("p_asl", codes, prior_file=str(path))
    np.testing.assert_allclose(second.class_prior(), torch.sigmoid(logits).mean(0), rtol=1e-6)
    labels = SparseLabels.from_dense(codes)
    cls = get_method("p_asl")
    cls.check_labels(labels, cls.Options(name="p_asl", prior_file=str(path)))
    # What is wrong with the file is said before anything is made, and again by the method itself.
    for text, message in (
        ("cat,0.1\ndog,0.2\n", r"prior.txt has 2 priors, but the data have 5 classes"),
        ("0.1\n\nx\n", r"prior.txt line 3: 'x'"),
        ("a,0.5\nb,-0.1\n", r"prior.txt line 2: 'b,-0.1' does not end in a probability"),
        ("a,1.01\n", r"prior.txt line 1: "),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            cls.check_labels(labels, cls.Options(name="p_asl", prior_file=str(path)))
        with pytest.raises(UserError, match=message):
            make("p_asl", codes, prior_file=str(path))
    path.write_text("a,0\n\nb,1\nc,0.25\nd, 0.5\n,0.75\n")
    assert make("p_asl", codes, prior_file=str(path)).class_prior().tolist() == [0, 1, 0.25, 0.5, 0.75]


def test_p_asl_prior_before_the_first_step_is_nothing(tmp_path: Any) -> None:
    method = make("p_asl", some_codes(6, 5), mode="ignore", prior="running", prior_out=str(tmp_path / "prior.txt"))
    assert method.class_prior().tolist() == [0.0] * 5
    method.on_epoch_end(EPOCH_1)
    assert [float(line) for line in (tmp_path / "prior.txt").read_text().splitlines()] == [0.0] * 5


def test_p_asl_sums_its_predictions_only_where_somebody_wants_them(tmp_path: Any) -> None:
    """A sum costs a collective a step; a prior from a file is the file's, and belongs into no checkpoint."""
    codes, path = some_codes(6, 5), tmp_path / "prior.txt"
    path.write_text("0.5\n" * 5)
    for options, sums in (
        ({}, False),
        ({"prior": "running"}, True),
        ({"prior_file": str(path)}, False),
        ({"prior": "running", "prior_file": str(path)}, False),
        ({"prior_file": str(path), "prior_out": str(tmp_path / "out.txt")}, True),
    ):
        method = make("p_asl", codes, **options)
        run(method, some_logits(6, 5), batch_of(codes))
        assert method.prior_count == (6 if sums else 0) and bool(method.prior_sum.any()) is sums, options
        assert set(method.state_dict()) == {"prior_sum", "prior_count"}


def test_p_asl_takes_no_file_for_its_own_that_holds_something_else(tmp_path: Any) -> None:
    """The file of priors is replaced after every epoch, so only what a run wrote may be in its place."""
    path = tmp_path / "prior.txt"
    check_prior_out(path)
    for text in ("0.25\n1e-08\nnan\n", ""):
        path.write_text(text)
        check_prior_out(path)
        assert make("p_asl", some_codes(6, 5), prior_out=str(path)).tracks
    for text in ("0.25\ncat\n", "cat,0.25\n", "\n0.5\n"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"prior\.txt exists and does not hold priors alone; give another name"):
            check_prior_out(path)
        with pytest.raises(UserError, match=r"prior\.txt exists"):
            make("p_asl", some_codes(6, 5), prior_out=str(path))
        assert path.read_text() == text
    with pytest.raises(UserError, match="exists and does not hold priors alone"):
        check_prior_out(tmp_path)


def test_p_asl_leaves_out_exactly_as_many_as_it_is_told() -> None:
    """Of one image K unknown labels; none with K = 0; all of them, whatever K is, in the mode ignore."""
    codes = np.array([[U, P, U, U, N]], np.int8)
    logits = torch.tensor([[3.0, 5.0, -1.0, 4.0, 9.0]])
    for options, expected in (
        ({"top_k": 0}, []),
        ({"top_k": 1}, [3]),
        ({"top_k": 2}, [0, 3]),
        ({"mode": "negative"}, []),
        ({"mode": "ignore", "top_k": 1}, [0, 2, 3]),
        ({"mode": "ignore_normalize_classes", "top_k": 0}, [0, 2, 3]),
    ):
        found, _ = make("p_asl", codes, **options).codes(logits, batch_of(codes), EPOCH_3)
        assert torch.nonzero(found[0] == IGNORED).flatten().tolist() == expected, options
        assert torch.equal(found[found != IGNORED], torch.from_numpy(codes)[found != IGNORED])


def test_p_asl_a_prior_of_exactly_eta_leaves_nothing_out() -> None:
    codes = np.array([[U, U, N]], np.int8)
    method = make("p_asl", codes, top_k=0, eta=0.5)
    method.given_prior = torch.tensor([0.5, 0.75, 0.75])
    found, _ = method.codes(torch.zeros(1, 3), batch_of(codes), EPOCH_3)
    assert found.tolist() == [[U, IGNORED, N]]
