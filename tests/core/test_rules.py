"""Rules of options: they stand beside their field, hold whenever a section is made, and name the option."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest

from spml_fast.core.config import SECTIONS, Config, EngineConfig, MethodOptions, TrainConfig
from spml_fast.core.errors import UserError
from spml_fast.core.rules import Section, fraction, not_negative, positive, ruled


@dataclass(frozen=True)
class Oven(Section):
    section: ClassVar[str] = "oven"

    heat: float = positive(180.0)
    fan: float = fraction(0.5)
    racks: int = not_negative(2)
    timer: float | None = positive(None)
    shelves: list[int] = ruled([1, 2], lambda value: None if value else "is empty; name a shelf")

    def check(self) -> None:
        if self.fan and self.heat > 250:
            raise UserError(f"oven.fan is {self.fan}; it must be off above 250 degrees")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"heat": 0}, "oven.heat is 0; it must be greater than 0"),
        ({"heat": float("nan")}, "oven.heat is nan; it must be greater than 0"),
        ({"fan": 1.5}, "oven.fan is 1.5; it must lie between 0 and 1"),
        ({"fan": -0.1}, "oven.fan is -0.1; it must lie between 0 and 1"),
        ({"racks": -1}, "oven.racks is -1; it must not be negative"),
        ({"timer": -3.0}, "oven.timer is -3.0; it must be greater than 0"),
        ({"shelves": []}, "oven.shelves is empty; name a shelf"),
        ({"heat": 300.0}, "oven.fan is 0.5; it must be off above 250 degrees"),
    ],
)
def test_a_broken_rule_names_section_and_field(values, sentence):
    with pytest.raises(UserError) as error:
        Oven(**values)
    assert str(error.value) == sentence
    with pytest.raises(UserError) as error:
        dataclasses.replace(Oven(), **values)
    assert str(error.value) == sentence


def test_the_bounds_themselves():
    Oven(fan=0)
    Oven(fan=1, racks=0, heat=1e-9, timer=None)


def test_lists_are_not_shared():
    first, second = Oven(), Oven()
    first.shelves.append(3)
    assert second.shelves == Oven().shelves == [1, 2]


@pytest.mark.parametrize("name", SECTIONS)
def test_sections_know_their_names_and_cannot_be_changed(name):
    section = SECTIONS[name]()
    assert section.section == name
    field = dataclasses.fields(section)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(section, field, getattr(section, field))


def test_a_configuration_checks_its_sections_against_each_other():
    averaged = TrainConfig(average_weights=True)
    with pytest.raises(UserError, match=r"train\.average_weights does not work with deepspeed\.zero_stage 3"):
        Config(method=MethodOptions(), train=averaged, deepspeed=EngineConfig(zero_stage=3))
    train = TrainConfig(ema_decay=0.9)
    with pytest.raises(UserError, match=r"train\.ema_decay does not work with deepspeed\.zero_stage 3"):
        Config(method=MethodOptions(), train=train, deepspeed=EngineConfig(zero_stage=3))
    config = Config(method=MethodOptions(), train=train)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train = TrainConfig()
