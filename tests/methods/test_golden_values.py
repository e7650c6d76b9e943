"""The point losses against golden values; docs/sources.md#golden-values says how these were made."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spml_fast.methods.an_ls import an_ls_point
from spml_fast.methods.asl import asl_point
from spml_fast.methods.em import em_point
from spml_fast.methods.epr import epr_point
from spml_fast.methods.gr import gr_point
from spml_fast.methods.hill import hill_point
from spml_fast.methods.p_asl import p_asl_point
from spml_fast.methods.splc import splc_point
from spml_fast.methods.wan import wan_point
from tests.support.formulas import (
    N,
    P,
    U,
    batch_of,
    make,
    nl,
    run,
    sigmoid,
)

POINTS = (-3.0, -0.5, 1.2, 4.0)
GUARD = 1e-5
GOLDEN = {
    "P EM": (
        em_point,
        P,
        (0.2, GUARD),
        "3.0483765/-.95237331 .9740505/-.62244284 .26326946/-.2314722 .018139745/-.017986027",
    ),
    "P EPR": (
        epr_point,
        P,
        (GUARD,),
        "3.0483765/-.95237331 .9740505/-.62244284 .26326946/-.2314722 .018139745/-.017986027",
    ),
    "P WAN": (
        wan_point,
        P,
        (1 / 19, GUARD),
        "3.0483765/-.95237331 .9740505/-.62244284 .26326946/-.2314722 .018139745/-.017986027",
    ),
    "P WAN logits": (
        wan_point,
        P,
        (1 / 19, 0.0),
        "3.0485874/-.95257413 .97407698/-.62245933 .26328247/-.23147522 .018149928/-.01798621",
    ),
    "P AN-LS": (
        an_ls_point,
        P,
        (0.1, GUARD),
        "2.7483966/-.85239344 .92405154/-.5224451 .38326644/-.13147583 .41808518/.081959387",
    ),
    "P ASL detached": (
        asl_point,
        P,
        (1.0, 4.0, 0.05, 1e-8, 0.0),
        "2.9040054/-.90739747 .60632331/-.38745562 .060943366/-.053580776 .00032644841/-.00032350375",
    ),
    "P ASL attached": (
        asl_point,
        P,
        (1.0, 4.0, 0.05, 1e-8, 1.0),
        "2.9040054/-1.0451225 .60632331/-.61636733 .060943366/-.10041726 .00032644841/-.00064408059",
    ),
    "P Hill": (
        hill_point,
        P,
        (1.5, 1.0, 2.0, 1.0),
        "3.8749072/-1.0863959 1.1372723/-.96142469 .1212125/-.22451939 .00010928332/-.00031487185",
    ),
    "P SPLC": (
        splc_point,
        P,
        (0.6, 1.0, 2.0, 1.0, 1.0),
        "3.8749072/-1.0863959 1.1372723/-.96142469 .1212125/-.22451939 .00010928332/-.00031487185",
    ),
    "P GR": (
        gr_point,
        P,
        (0.0, -2.0, 0.5, 2.0, 0.01, 1.0, 1e-7),
        "3.0485852/-.95257212 .97407672/-.62245917 .26328234/-.23147519 .018149826/-.017986208",
    ),
    "U AN": (
        an_ls_point,
        U,
        (0.0, GUARD),
        ".048576854/.047425375 .47406092/.3775346 1.4632393/.76849158 4.0175941/.98146811",
    ),
    "U AN logits": (
        an_ls_point,
        U,
        (0.0, 0.0),
        ".048587352/.047425873 .47407698/.37754067 1.4632825/.76852478 4.0181499/.98201379",
    ),
    "U WAN": (
        wan_point,
        U,
        (1 / 19, GUARD),
        ".0025566765/.0024960724 .024950575/.019870242 .077012593/.040446925 .21145232/.051656216",
    ),
    "U AN-LS": (
        an_ls_point,
        U,
        (0.1, GUARD),
        ".34855682/-.052554494 .52405988/.27753686 1.3432423/.6684952 3.6176487/.8815227",
    ),
    "U EM": (
        em_point,
        U,
        (0.2, GUARD),
        "-.038168994/-.027105996 -.13256546/-.023500371 -.10820655/.042694666 -.018014954/.014130164",
    ),
    "U ASL detached": (
        asl_point,
        U,
        (0.0, 4.0, 0.05, 1e-8, 0.0),
        "0/0 .0045671736/.0040222552 .33789925/.16845706 2.0285765/.19603146",
    ),
    "U ASL attached": (
        asl_point,
        U,
        (0.0, 4.0, 0.05, 1e-8, 1.0),
        "0/0 .0045671736/.017129669 .33789925/.50308935 2.0285765/.34980665",
    ),
    "N P-ASL": (
        p_asl_point,
        N,
        (1.0, 1.0, 1.0, 0.0, 1.0, 4.0, 0.0, 1e-8),
        ".0023042976/.0022492134 .17898334/.14253696 1.1245688/.59063034 3.9458786/.96435108",
    ),
    "U SPLC epoch 0": (
        splc_point,
        U,
        (0.6, 1.0, 2.0, 0.0, 1.0),
        ".00010928332/.00031487185 .067573491/.137937 .86425903/.85402315 3.8749072/1.0863959",
    ),
    "U SPLC epoch 1": (
        splc_point,
        U,
        (0.6, 1.0, 2.0, 1.0, 1.0),
        ".00010928332/.00031487185 .067573491/.137937 .014106879/-.034085594 5.8715697e-6/-1.7350531e-5",
    ),
    "U Hill": (
        hill_point,
        U,
        (1.5, 1.0, 2.0, 1.0),
        ".0032671493/.0061227918 .15999194/.16568023 .43203146/.094939296 .49952056/.00093591357",
    ),
    "U GR VOC": (
        gr_point,
        U,
        (0.0, -2.0, 0.5375, 1.8125, 0.01, 1.0, 1e-7),
        ".38534313/-.067823614 .44634426/.13299193 .70252708/.12812391 .84142911/.01301625",
    ),
    "U GR COCO": (
        gr_point,
        U,
        (8.75, -7.25, 0.8, 0.5, 0.01, 1.0, 1e-7),
        ".01630101/.01421829 .27205796/.15316388 .57950452/.025952072 .20378522/-.0099217978",
    ),
}


@pytest.mark.parametrize("row", GOLDEN)
def test_golden_values(row: str) -> None:
    """Values by hand with eight digits. Source: docs/sources.md#golden-values."""
    point, code, params, text = GOLDEN[row]
    want = np.array([[float(x) for x in pair.split("/")] for pair in text.split()])
    for kind, tolerance in ((torch.float64, 1e-7), (torch.float32, 1e-4)):
        z = torch.tensor(POINTS, dtype=kind, requires_grad=True)
        loss = point(z, torch.full((4,), code, dtype=torch.int8), *params)
        (gradient,) = torch.autograd.grad(loss.sum(), z)
        # fp32 forms 1 - k and small differences of near-equal numbers; its error is absolute.
        floor = 1e-15 if kind == torch.float64 else 2e-7
        np.testing.assert_allclose(loss.detach().numpy(), want[:, 0], rtol=tolerance, atol=floor)
        np.testing.assert_allclose(gradient.numpy(), want[:, 1], rtol=tolerance, atol=floor)


def test_golden_soft_label() -> None:
    """EM + APL's row of the table: s = 0.03, beta = 0.9."""
    want = ((0.12471376, 0.015688273), (0.44015455, 0.31278175), (1.2845162, 0.6646434), (3.5078494, 0.85633604))
    codes = np.array([[P, U, U, U, U]], np.int8)
    method = make("em_apl", codes, alpha=0.2, beta=0.9)
    method.add(torch.zeros(4, dtype=torch.int64), torch.arange(1, 5), torch.full((4,), 0.03))
    logits = torch.tensor([[0.3, *POINTS]], dtype=torch.float64)
    loss, gradient = run(method, logits, batch_of(codes))
    positive = nl(sigmoid(0.3))
    assert loss.item() * 5 == pytest.approx(positive + sum(v for v, _ in want), rel=3e-8)
    np.testing.assert_allclose(gradient[0, 1:].numpy() * 5, [g for _, g in want], rtol=3e-7)
