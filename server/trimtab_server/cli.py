"""The command `trimtab`; each part's imports wait until it is called."""

from __future__ import annotations

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
    config: ConfigArgument,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the workers print.")] = False,
) -> None:
    """Serve the configured models on one port."""
    from trimtab_server.service import run_gateway
    from trimtab_server.settings import SettingsError, load_settings

    try:
        status = run_gateway(load_settings(config), verbose=verbose)
    except SettingsError as error:
        raise _refused(error) from error
    raise typer.Exit(status)


@app.command()
def check(config: ConfigArgument) -> None:
    """Check a configuration, its models' directories and its packs; nothing is started."""
    from trimtab_server.controls import load_controls
    from trimtab_server.settings import SettingsError, load_settings

    try:
        settings = load_settings(config)
        load_controls(settings)
        keys = len(settings.api_keys)
    except SettingsError as error:
        raise _refused(error) from error
    for name, model in settings.models.items():
        kind = "directory" if Path(str(model.model)).exists() else "hub id, not looked up"
        offered = ", ".join(settings.controls_of(name)) or "none"
        typer.echo(f"model {name}: {model.model} ({kind}); controls: {offered}")
    typer.echo(f"{config} is valid: http://{settings.host}:{settings.port}, {keys} API keys")


@app.command("map", context_settings=_MOUNTED, add_help_option=False)
def map_(context: typer.Context) -> None:
    """Mapping tables between vocabularies: build, show, look up, compare, check, score."""
    from trimtab_mappings.cli import app as mapped

    mapped(context.args, prog_name="trimtab map")


@app.command(context_settings=_MOUNTED, add_help_option=False)
def world(context: typer.Context) -> None:
    """Make the small world: models and a control to try everything with."""
    from trimtab_training.cli import app as mapped

    mapped(context.args, prog_name="trimtab world")


@app.command(context_settings=_MOUNTED, add_help_option=False)
def demo(context: typer.Context) -> None:
    """Show a control at work in the small world."""
    from trimtab_training.demo import app as mapped

    mapped(context.args, prog_name="trimtab demo")


def _refused(error: Exception) -> typer.Exit:
    typer.echo(f"trimtab: {error}", err=True)
    return typer.Exit(2)


def main() -> None:
    """Run the command."""
    app()
