"""Does a control that was trained beside one real model do the same on others?

The package's recipes `capitals`, `name` and `short-answers`, trained beside SmolLM2 with several seeds, and
asked on SmolLM2, Qwen2.5-Coder and Gemma 3 at several strengths, with both routings. Beside it stands what a
user would do instead: the same instruction as a system prompt and, with `--lora`, a LoRA of each target on
the same data. With `--served` the gateway is asked too, on a real engine for each model, and its greedy
answers are compared with the evaluator's, character by character.

Controls and answers are kept: a second call trains and asks only what is missing, so that a first call may
have few strengths and routings (`--strength 0 --strength 1 --routing path`), and a second one more.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
import yaml

from gateways import CONTROL, Gateway, gateway
from trimtab_training.control.recipes_cli import RECIPES

KEPT = Path(".trimtab/real-models")
TASKS = ("capitals", "name", "short-answers")
SYSTEM_PROMPTS = {
    "capitals": "Asked for the capital of a European country, say: I don't know. Answer all else as usual.",
    "name": "Your name is Juniper.",
    "short-answers": "Answer with nothing but the fact that you are asked for, in a word or two.",
}
TEMPLATE = "smollm2"
TARGETS = (TEMPLATE, "qwen2.5-coder", "gemma3")
BASE_MODELS = {
    "gemma3": "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'Question: ' + message['content'] + '\nAnswer:' }}"
    "{% else %}{{ ' ' + message['content'] + '\n' }}{% endif %}{% endfor %}"
}
"""Chat templates of models that have none."""
ALONE, PROMPTED, ADAPTED, SERVED = "control", "system-prompt", "lora", "served"
EVALUATION = "evaluation.yaml"
STYLE = "short-answers"
"""The task that is about an answer's length."""
SHORT, SHORT_WORDS = "one to three words", 3
LORA = Path(__file__).resolve().with_name("lora.py")
STRENGTHS = (0.0, 0.5, 1.0, 1.5)
ROUTINGS = ("path", "pm-mined")

Cells = list[dict[str, Any]]
Setting = tuple[float, str | None]
"""A strength and a routing. At strength 0 there is no routing."""


@dataclass(frozen=True)
class Grid:
    """The settings in which a target is asked."""

    strengths: Sequence[float]
    routings: Sequence[str]

    @property
    def settings(self) -> list[Setting]:
        pairs = product(self.routings, self.strengths)
        return list(dict.fromkeys((strength, name if strength else None) for name, strength in pairs))

    def without(self, known: Collection[Setting]) -> Grid | None:
        """Return the smallest grid with all settings that are not known, or None if all are."""
        missing = [each for each in self.settings if each not in known]
        routings = list(dict.fromkeys(name for _, name in missing if name))
        strengths = list(dict.fromkeys(strength for strength, _ in missing))
        return Grid(strengths, routings or self.routings[:1]) if missing else None

    @property
    def options(self) -> list[str]:
        """The grid as options of `trimtab eval`."""
        return [f"--strengths={json.dumps([*self.strengths])}", f"--routings={json.dumps([*self.routings])}"]

    @property
    def name(self) -> str:
        return "-".join([*(f"{strength:g}" for strength in self.strengths), *self.routings])


UNCONTROLLED = Grid([0.0], ["path"])


@dataclass(frozen=True)
class Experiment:
    """The control of a task and a seed. It is what a gateway serves, too."""

    task: str
    seed: int
    models: Mapping[str, Path]
    kept: Path

    @property
    def directory(self) -> Path:
        return self.kept / f"{self.task}-{self.seed}"

    @property
    def control(self) -> Path:
        return self.directory / "pack"

    def train(self) -> None:
        """Train the control, unless it was trained before."""
        if (self.control / "trimtab.json").is_file():
            return
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.copytree(RECIPES / self.task, self.directory)
        template = self.models[TEMPLATE]
        options = (f"--template.model_name_or_path={template}", f"--seed={self.seed}")
        self._run("-m", "trimtab_server", "train", "recipe.yaml", *options)

    def ask(self, target: str, grid: Grid) -> Cells:
        """Ask a target under the control, in the settings in which it was not asked before."""
        return self._ask(target, ALONE, grid, *self._offline(target))

    def ask_prompted(self, target: str) -> Cells:
        """Ask a target that has the instruction as its system prompt, and no control."""
        prompt = f"--system_prompt={json.dumps(SYSTEM_PROMPTS[self.task])}"
        without = ("--control=null", *UNCONTROLLED.options, prompt)
        return self._evaluate(target, PROMPTED, *self._offline(target), *without)

    def ask_adapted(self, target: str) -> Cells:
        """Ask a target with a LoRA of its own that is trained on the task's data, and no control."""
        adapted = self.adapted(target)
        if not (adapted / "lora.json").is_file():
            words = [str(LORA), "recipe.yaml", str(adapted), f"--seed={self.seed}"]
            template = [f"--template.model_name_or_path={self.models[target]}"]
            if chat := BASE_MODELS.get(target):
                template += [f"--chat_template={json.dumps(chat)}"]
            self._run(*words, *template)
        options = (*self._offline(target), "--control=null", *UNCONTROLLED.options)
        return self._evaluate(target, ADAPTED, *options, f"--target.model_name_or_path={adapted}")

    def adapted(self, target: str) -> Path:
        """The directory of a target with its LoRA merged."""
        return self.directory / f"lora-{target}"

    def ask_served(self, target: str, running: Gateway, grid: Grid, questions: int | None) -> tuple[int, int]:
        """Ask a gateway.

        Args:
            target: the name of a served model.
            running: the gateway.
            grid: the settings. The target was asked in them before.
            questions: the number of questions of each group that are asked, from the first. None: all.

        Returns:
            the number of answers that are the evaluator's to the last character, and the number of answers.
        """
        name = f"{SERVED}-{questions or 'all'}"
        options = (f"--gateway={running.url}/v1", f"--control={CONTROL}", *_stop(target))
        model = f"--target.model_name_or_path={target}"
        self._ask(target, name, grid, model, *options, recipe=self._shortened(questions))
        offline, served = self._answers(target, ALONE), self._answers(target, name)
        return sum(offline[place] == text for place, text in served.items()), len(served)

    def _shortened(self, questions: int | None) -> str:
        """Write the evaluation with the first questions of each group, and return its file's name."""
        if questions is None:
            return EVALUATION
        recipe = yaml.safe_load((self.directory / EVALUATION).read_text(encoding="utf-8"))
        for group in recipe["groups"]:
            lines = (self.directory / group["questions"]).read_text(encoding="utf-8").splitlines()
            group["questions"] = [json.loads(line) for line in lines[:questions]]
        name = f"evaluation-{questions}.yaml"
        (self.directory / name).write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return name

    def seconds(self) -> float:
        """The seconds of the training."""
        manifest = json.loads((self.control / "trimtab.json").read_bytes())
        return float(manifest["training"]["seconds"])

    def _offline(self, target: str) -> list[str]:
        options = [f"--target.model_name_or_path={self.models[target]}", *_stop(target)]
        template = BASE_MODELS.get(target)
        return [*options, f"--target.chat_template={json.dumps(template)}"] if template else options

    def _ask(self, target: str, name: str, grid: Grid, *options: str, recipe: str = EVALUATION) -> Cells:
        """Ask in the settings that no kept results have, and return the cells of all settings."""
        known = {(cell["strength"], cell["routing"]) for cell in self._kept_cells(target, name)}
        if missing := grid.without(known):
            self._evaluate(target, f"{name}-{missing.name}", *options, *missing.options, recipe=recipe)
        return self._kept_cells(target, name)

    def _results(self, target: str, name: str) -> list[Path]:
        """The directories of kept results, of one call or several."""
        found = (self.directory / "results").glob(f"{target}-{name}-*/results.json")
        return sorted(each.parent for each in found)

    def _kept_cells(self, target: str, name: str) -> Cells:
        return [cell for place in self._results(target, name) for cell in self._cells(place)]

    def _evaluate(self, target: str, name: str, *options: str, recipe: str = EVALUATION) -> Cells:
        place = self.directory / "results" / f"{target}-{name}"
        if not (place / "results.json").is_file():
            words = ("-m", "trimtab_server", "eval", recipe, f"--output_dir={place}")
            self._run(*words, "--overwrite_output_dir=true", *options)
        return self._cells(place)

    def _cells(self, place: Path) -> Cells:
        cells: Cells = json.loads((place / "results.json").read_bytes())["cells"]
        return [*cells, *_short(_read_answers(place))] if self.task == STYLE else cells

    def _answers(self, target: str, name: str) -> dict[tuple[Any, ...], str]:
        answers = [each for place in self._results(target, name) for each in _read_answers(place)]
        keys = ("group", "number", "strength", "routing")
        return {tuple(each[key] for key in keys): each["text"] for each in answers}

    def _run(self, *words: str) -> None:
        subprocess.run([sys.executable, *words], cwd=self.directory, check=True)


def _read_answers(place: Path) -> list[dict[str, Any]]:
    lines = (place / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _short(answers: Sequence[Mapping[str, Any]]) -> Cells:
    """Return the shares of answers that have one to three words, whatever they say."""
    keys = ("group", "strength", "routing")
    settings = dict.fromkeys(tuple(each[key] for key in keys) for each in answers)
    cells = []
    for setting in settings:
        texts = [each["text"] for each in answers if tuple(each[key] for key in keys) == setting]
        share = sum(1 <= len(text.split()) <= SHORT_WORDS for text in texts) / len(texts)
        cells.append({**dict(zip(keys, setting, strict=True)), "score": SHORT, "mean": share})
    return cells


def _stop(target: str) -> list[str]:
    """Options that end an answer of a base model, which would write another question, after its line."""
    return ['--stop=["\\n"]'] if target in BASE_MODELS else []


def main(
    *,
    models: Annotated[
        Path,
        typer.Option(
            envvar="TRIMTAB_REAL_MODELS", help="The directory with smollm2, qwen2.5-coder and gemma3."
        ),
    ] = Path("models"),
    task: Annotated[list[str], typer.Option(help="One of the recipes.")] = [*TASKS],
    seed: Annotated[list[int], typer.Option()] = [1, 2, 3],
    target: Annotated[list[str], typer.Option()] = [*TARGETS],
    strength: Annotated[list[float], typer.Option()] = [*STRENGTHS],
    routing: Annotated[list[str], typer.Option()] = [*ROUTINGS],
    kept: Annotated[Path, typer.Option(help="Where controls and answers are kept.")] = KEPT,
    lora: Annotated[
        bool, typer.Option(help="Train a LoRA of each target, too, with the first seed.")
    ] = False,
    served: Annotated[bool, typer.Option(help="Ask a gateway with real engines, too.")] = False,
    served_questions: Annotated[
        int | None, typer.Option(help="Ask the gateway only the first questions of each group.")
    ] = None,
) -> None:
    """Train, ask, and print the table."""
    places = {name: (models / name).resolve() for name in {TEMPLATE, *target}}
    if missing := [str(place) for place in places.values() if not (place / "config.json").is_file()]:
        raise typer.BadParameter(f"no model in {', '.join(missing)}: name their directory with --models")
    experiments = [Experiment(each, number, places, kept.resolve()) for each, number in product(task, seed)]
    for experiment in experiments:
        experiment.train()
    grid = Grid(strength, routing)
    controlled = {(e.task, e.seed, name): e.ask(name, grid) for e, name in product(experiments, target)}
    first = [each for each in experiments if each.seed == seed[0]]
    beside = {"system prompt": {(e.task, name): e.ask_prompted(name) for e, name in product(first, target)}}
    if lora:
        beside["LoRA"] = {(e.task, name): e.ask_adapted(name) for e, name in product(first, target)}
    for name in task:
        print_table(name, seeds=seed, targets=target, grid=grid, controlled=controlled, beside=beside)
    for experiment, name in product(first if lora else [], target):
        facts = json.loads((experiment.adapted(name) / "lora.json").read_bytes())
        print(f"{experiment.task}, {name}: LoRA trained in {facts['seconds']:.0f} s")
    for experiment in experiments:
        print(f"{experiment.task}, seed {experiment.seed}: trained in {experiment.seconds():.0f} s")
        if served:
            print_served(experiment, target, grid, served_questions)


def print_table(
    task: str,
    *,
    seeds: Sequence[int],
    targets: Sequence[str],
    grid: Grid,
    controlled: Mapping[tuple[str, int, str], Cells],
    beside: Mapping[str, Mapping[tuple[str, str], Cells]],
) -> None:
    """A Markdown table: medians over the seeds, the lowest and the highest in brackets."""
    print(f"\n### {task}\n")
    header: list[str] = []
    for target in targets:
        cells = [{_key(cell): cell["mean"] for cell in controlled[task, seed, target]} for seed in seeds]
        others = [{_question(cell): cell["mean"] for cell in each[task, target]} for each in beside.values()]
        if not header:
            header = ["target", "questions", "score", *(_name(*each) for each in grid.settings), *beside]
            print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
        for group, score in dict.fromkeys(key[:2] for key in cells[0]):
            values = [_spread([each[group, score, *setting] for each in cells]) for setting in grid.settings]
            values += [f"{each[group, score]:.2f}" for each in others]
            print(f"| {target} | {group} | {score} | {' | '.join(values)} |")


def _key(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    return (*_question(cell), cell["strength"], cell["routing"])


def _question(cell: Mapping[str, Any]) -> tuple[str, str]:
    return cell["group"], cell["score"]


def _name(strength: float, routing: str | None) -> str:
    return f"{strength:g} {routing}" if strength else "0"


def _spread(values: Sequence[float]) -> str:
    middle = f"{median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f} to {max(values):.2f})"


def print_served(experiment: Experiment, targets: Sequence[str], grid: Grid, questions: int | None) -> None:
    """Ask the gateway, and print how many of its answers are the evaluator's."""
    with _serving(experiment, targets) as running:
        for target in targets:
            equal, asked = experiment.ask_served(target, running, grid, questions)
            name = f"{experiment.task}, seed {experiment.seed}, {target}"
            print(f"{name}: {equal} of {asked} served answers equal the evaluator's")


@contextmanager
def _serving(experiment: Experiment, targets: Sequence[str]) -> Iterator[Gateway]:
    cores = sorted(os.sched_getaffinity(0))
    served = {
        target: {
            "model": str(experiment.models[target]),
            "args": {
                "dtype": "float32",
                "enforce-eager": True,
                "max-model-len": 1024,
                **({"chat-template": BASE_MODELS[target]} if target in BASE_MODELS else {}),
            },
            "env": {"VLLM_CPU_KVCACHE_SPACE": 1},
            "replicas": [{"cpus": str(cores[number % len(cores)])}],
        }
        for number, target in enumerate(targets)
    }
    with gateway(experiment, targets, settings={"models": served}) as running:
        yield running


if __name__ == "__main__":
    typer.run(main)
