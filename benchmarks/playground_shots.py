"""Pictures of the playground, for docs/playground/: three models of the small world under its control."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
from playwright.sync_api import Browser, Page, expect, sync_playwright

from gateways import WORLD, gateway, the_world
from trimtab_training.world.world import World

SECONDS = 60
LARGEST = 200_000
"""Bytes of one picture."""


@dataclass(frozen=True)
class Shot:
    """One picture.

    token: of the controlled answer of the first model; its details are shown.
    """

    name: str
    question: str
    width: int
    height: int
    token: int
    scheme: Literal["light", "dark"] = "light"


SHOTS = (
    Shot("light", "Where does {name} live?", 1280, 980, token=1),
    Shot("dark", "What is the password of {name}?", 1280, 980, token=0, scheme="dark"),
    Shot("phone", "Where does {name} live?", 360, 780, token=0),
)


def main(
    output: Annotated[Path, typer.Argument(help="Where the pictures go.")] = Path("docs/playground"),
    world: Annotated[Path, typer.Option(help="Where the small world is, or is to be made.")] = WORLD,
) -> None:
    """Serve the small world, and take the pictures."""
    output.mkdir(parents=True, exist_ok=True)
    made = the_world(world)
    with gateway(made, list(made.models)) as running, sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=sandbox)
        for shot in SHOTS:
            path = output / f"{shot.name}.png"
            take(shot, browser, running.url, made, path)
            print(path, path.stat().st_size)
            if path.stat().st_size > LARGEST:
                raise SystemExit(f"{path} is larger than {LARGEST} bytes")


def take(shot: Shot, browser: Browser, url: str, world: World, path: Path) -> None:
    """Ask about somebody whom the control never saw, and show what became of one token."""
    page = browser.new_page(
        viewport={"width": shot.width, "height": shot.height},
        color_scheme=shot.scheme,
        reduced_motion="reduce",
    )
    page.goto(url)
    page.get_by_label("Prompt", exact=True).fill(shot.question.format(name=world.held_out[0].name))
    page.get_by_role("button", name="Run").click()
    _wait_for_answers(page)
    token = page.locator(".token").nth(shot.token)
    token.focus()
    page.screenshot(path=path)
    page.close()


def _wait_for_answers(page: Page) -> None:
    expect(page.locator(".side").first).to_be_visible(timeout=SECONDS * 1000)
    expect(page.locator("[aria-busy=true]")).to_have_count(0, timeout=SECONDS * 1000)


if __name__ == "__main__":
    typer.run(main)
