"""`python -m trimtab_training.control`, for `accelerate launch -m`."""

from trimtab_training.control.cli import app

app(prog_name="trimtab train")
