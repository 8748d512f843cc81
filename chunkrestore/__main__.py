"""``python -m chunkrestore``."""

from chunkrestore.cli import main

main()
