"""Seeds as pure functions of a place in training."""

from __future__ import annotations

import torch


def rng_seed(seed: int, *place: int) -> int:
    """A 63-bit seed that is a pure function of the run's seed and a place in training (phase, update, rank).

    Seeding every update from it makes dropout reproducible after a resume without saving any generator's state.
    """
    value = 0x9E3779B97F4A7C15
    for word in (seed, *place):
        value = ((value ^ word) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & (2**64 - 1)
        value ^= value >> 31
    return value >> 1


def seed_device(seed: int, device: torch.device) -> None:
    """Seed the generators of the CPU and of one device, as `torch.manual_seed` does.

    For every kind of accelerator that is not there `torch.manual_seed` notes the seed with a stack trace, which takes a
    millisecond.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
