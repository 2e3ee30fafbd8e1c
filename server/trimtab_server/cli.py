"""The command `trimtab`; each part's imports wait until it is called."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="trimtab",
    help="One tiny control model steers many LLMs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="The configuration, a YAML file.")]
# What follows the name of a mounted application is that application's own, its --help too.
_MOUNTED = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"trimtab {version('trimtab')}")
        raise typer.Exit


@app.callback()
def trimtab(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """One tiny control model steers many LLMs."""


@app.command()
def serve(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG", help="The configuration, a YAML file; without one, the small world."
        ),
    ] = None,
    *,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model", metavar="[NAME=]MODEL", help="Serve this, a directory or a hub id; repeatable."
        ),
    ] = None,
    controls: Annotated[
        list[str] | None,
        typer.Option("--control", metavar="[NAME=]PACK", help="Offer this control on them; repeatable."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="The address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="The port to listen on.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the replicas print.")] = False,
) -> None:
    """Serve models on one port: those of CONFIG, those named by --model, or else the small world.

    The small world, three models and a control that were made for it, is made when it is first asked for,
    which takes minutes.
    """
    from trimtab_server.config.inline import world_settings, written_settings
    from trimtab_server.config.schema import load_settings
    from trimtab_server.config.types import SettingsError
    from trimtab_server.server import run_gateway

    options = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    try:
        if models or controls:
            settings = written_settings(config, models or [], controls or [], options)
        elif config is not None:
            settings = load_settings(config, options)
        else:
            settings = world_settings(options)
        status = run_gateway(settings, verbose=verbose)
    except SettingsError as error:
        raise _refused(error) from error
    raise typer.Exit(status)


@app.command()
def check(config: ConfigArgument) -> None:
    """Look for what CONFIG names: models, packs, tables, devices, files, the port; nothing is started."""
    from trimtab_server.config.check import check_settings
    from trimtab_server.config.schema import load_settings
    from trimtab_server.config.types import SettingsError

    try:
        settings = load_settings(config)
    except SettingsError as error:
        raise _refused(error) from error
    faults = 0
    for finding in check_settings(settings):
        typer.echo(str(finding), err=finding.is_fault)
        faults += finding.is_fault
    if faults:
        raise _refused(f"{config} can't be served as it is: faults above: {faults}")
    scheme = "http" if settings.tls is None else "https"
    typer.echo(f"{config} is valid: {scheme}://{settings.host}:{settings.port}")


@app.command()
def schema() -> None:
    """Print the JSON schema of a configuration file."""
    from trimtab_server.config.schema import settings_schema

    typer.echo(json.dumps(settings_schema(), indent=2))


@app.command("map", context_settings=_MOUNTED, add_help_option=False)
def map_(context: typer.Context) -> None:
    """Mapping tables between vocabularies: build, show, look up, compare, check, score."""
    from trimtab_mappings.cli import app as mapped

    mapped(context.args, prog_name="trimtab map")


@app.command(context_settings=_MOUNTED, add_help_option=False)
def train(context: typer.Context) -> None:
    """Train a control beside a frozen model, from a recipe."""
    from trimtab_training.control.cli import app as mapped

    mapped(context.args, prog_name="trimtab train")


@app.command(context_settings=_MOUNTED, add_help_option=False)
def recipes(context: typer.Context) -> None:
    """List and copy the recipes that come with Trimtab."""
    from trimtab_training.control.recipes_cli import app as mapped

    mapped(context.args, prog_name="trimtab recipes")


@app.command(context_settings=_MOUNTED, add_help_option=False)
def world(context: typer.Context) -> None:
    """Make the small world: models and a control to try everything with."""
    from trimtab_training.world.cli import app as mapped

    mapped(context.args, prog_name="trimtab world")


@app.command("eval", context_settings=_MOUNTED, add_help_option=False)
def eval_(context: typer.Context) -> None:
    """Ask a model questions without and with a control, and score its answers."""
    from trimtab_training.evaluation.cli import app as mapped

    mapped(context.args, prog_name="trimtab eval")


@app.command(context_settings=_MOUNTED, add_help_option=False)
def similarity(context: typer.Context) -> None:
    """Compare the shifts that fine-tuning makes across models."""
    from trimtab_training.similarity.cli import app as mapped

    mapped(context.args, prog_name="trimtab similarity")


@app.command(context_settings=_MOUNTED, add_help_option=False)
def demo(context: typer.Context) -> None:
    """Show a control at work in the small world."""
    from trimtab_training.demo.demo import app as mapped

    mapped(context.args, prog_name="trimtab demo")


def _refused(error: Exception | str) -> typer.Exit:
    typer.echo(f"trimtab: {error}", err=True)
    return typer.Exit(2)


def main() -> None:
    """Run the command."""
    if sys.argv[1:2] in (["check"], ["map"]):  # they read tokenizers, and run no models
        from trimtab_mappings.loading import leave_out_torch

        leave_out_torch()
    app()
