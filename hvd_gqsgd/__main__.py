"""``python -m hvd_gqsgd``: the command ``hvd-gqsgd``."""

from hvd_gqsgd.tools.cli import main

main()
