"""A miniature of the small world: few people, few steps, models that know next to nothing."""

from __future__ import annotations

from trimtab_training.world.settings import ControlSettings, PretrainSettings
from trimtab_training.world.world import BaseSettings, WorldSettings

STEPS = PretrainSettings(steps=2, batch=4, warmup=1)


def miniature(**changes) -> WorldSettings:
    settings = {
        "people": 6,
        "trained": 4,
        "bases": {
            name: BaseSettings(size, 64, 1, STEPS) for name, size in zip("abc", (300, 320, 300), strict=True)
        },
        "layers": 1,
        "control": ControlSettings(steps=2),
        "gate": 0.0,
    }
    return WorldSettings(**settings | changes)
