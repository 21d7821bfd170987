"""`python -m mipo_lite`: the command line without its entry point."""

from .cli import main

main()
