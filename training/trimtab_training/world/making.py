"""Making the models of a small world."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from trimtab_processors.pack import Pack
from trimtab_training.world import corpus, lessons, steer
from trimtab_training.world.families import FAMILIES
from trimtab_training.world.parallel import run
from trimtab_training.world.pretrain import pretrain
from trimtab_training.world.recall import recall, require_recall
from trimtab_training.world.teaching import control_recipe, train_control
from trimtab_training.world.world import CONTROL, CONTROL_NAME, TEMPLATE, TITLES, Report, WorldSettings


def make_models(
    directory: Path, seed: int, settings: WorldSettings, progress: Report, jobs: int | None
) -> dict[str, float]:
    """Train all models into `directory`; gives the share of its facts that each base model knows."""
    largest_first = sorted(settings.bases, key=lambda name: -settings.bases[name].width)
    tasks: dict[str, Callable[[Report], float]] = {
        name: partial(make_base, directory, name, seed, settings) for name in largest_first
    }
    tasks[CONTROL] = partial(make_control, directory, seed, settings)
    results = run(tasks, {CONTROL: TEMPLATE}, progress, jobs)
    return {name: results[name] for name in settings.bases}


def make_base(directory: Path, name: str, seed: int, settings: WorldSettings, report: Report) -> float:
    """Train the base model `name` into `directory / name`; gives the share of its facts that it knows.

    Raises:
        GateError: that is less than the settings ask for.
    """
    base, family, people = settings.bases[name], FAMILIES[name], settings.draw_people(seed)
    documents = corpus.documents(
        people,
        base.pretrain.steps * base.pretrain.batch,
        random.Random(f"corpus {name} {seed}"),
        settings.dialect,
    )
    tokenizer = family.tokenizer(documents, base.vocabulary)
    torch.manual_seed(seed)
    model = family.model(tokenizer, base.width, base.layers)
    pretrain(model, tokenizer, documents, base.pretrain, partial(report, name))
    share = recall(model, tokenizer, people)
    require_recall(name, share, settings.gate)
    model.save_pretrained(directory / name)
    tokenizer.save_pretrained(directory / name)
    return share


def make_control(directory: Path, seed: int, settings: WorldSettings, report: Report) -> float:
    """Train the control beside the template in `directory` and save its pack; gives the last steps' loss."""
    template = steer.load(directory / TEMPLATE)
    tokenizer = template.tokenizer
    recipe = control_recipe(
        settings.control,
        width=settings.width,
        layers=settings.layers,
        seed=seed,
        output_dir=directory / CONTROL,
    )
    people = settings.draw_people(seed)[: settings.trained]
    control, losses = train_control(
        recipe,
        template.model,
        tokenizer,
        lessons.lessons(people, tokenizer, settings.draws, settings.dialect),
        partial(report, CONTROL),
    )
    control.save_pretrained(directory / CONTROL)
    tokenizer.save_pretrained(directory / CONTROL)
    _manifest(seed, settings).save(directory / CONTROL)
    last = losses[-20:]
    return sum(last) / len(last)


def _manifest(seed: int, settings: WorldSettings) -> Pack:
    return Pack(
        name=CONTROL_NAME,
        strength=1.0,
        description="Answers a question in one sentence, ends, and keeps passwords to itself.",
        training={
            "method": "cross-model control (arXiv 2410.17599)",
            "template": TITLES[TEMPLATE],
            "data": f"{settings.trained} people of the small world of seed {seed}",
            "objective": {
                "cross_entropy": "chat answers and refusals",
                "forget": "passwords in plain text",
                "retain": "other facts in plain text",
            },
            "examples per step": asdict(settings.draws),
            "settings": asdict(settings.control),
        },
    )
