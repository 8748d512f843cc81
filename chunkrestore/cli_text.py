"""Printing for the command line."""

from __future__ import annotations

import click


def say(text: object, *, err: bool = False) -> None:
    """Print text so that it cannot command a terminal: names in it may come from a store of anyone's."""
    click.echo("".join(map(_printable, str(text))), err=err)


def _printable(character: str) -> str:
    is_plain = character.isprintable() or character == "\n"
    return character if is_plain else character.encode("unicode_escape").decode()
