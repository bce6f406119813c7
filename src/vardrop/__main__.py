"""``python -m vardrop``: the command line."""

from vardrop.cli import main

main()
