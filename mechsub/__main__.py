"""``python -m mechsub``: the command line."""

from mechsub.cli import main

main()
