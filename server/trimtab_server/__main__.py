"""`python -m trimtab_server` is the command `trimtab`."""

from trimtab_server.cli import main

main()
