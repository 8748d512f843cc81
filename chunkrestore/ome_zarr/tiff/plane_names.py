"""What the names of files say: which are planes of one image, and where each of them belongs.

The numbers in the names tell where a file belongs. Which number counts what is read from the word before it
(``_t000_c01_z0003``), or said by a pattern (``"*_{c}_{z}.tif"``) or by `axes`; what is not sure is an error.
"""

from __future__ import annotations

import glob
import itertools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".tif", ".tiff", ".btf", ".tf2", ".tf8")

MAX_FILES = 2**22
"""Of one image."""

_WORDS = {
    "t": ("t", "tp", "time", "timepoint", "frame"),
    "c": ("c", "ch", "chan", "channel", "w", "wavelength"),
    "z": ("z", "slice", "plane", "section"),
}
_LETTER_OF = {word: letter for letter, words in _WORDS.items() for word in words}
_FIELD = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Names:
    """Files in the order of the image, and what their names say."""

    files: tuple[str, ...]
    """Paths; the last axis of `letters` runs fastest."""
    letters: str
    """What the names count, of ``tcz``, or ``?`` where that cannot be told."""
    values: tuple[tuple[str, ...], ...]
    """For each of `letters`, what the names say, in order."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Files per axis."""
        return tuple(map(len, self.values))


def find_files(where: str) -> list[str]:
    """Return the TIFF files that a folder or pattern stands for, sorted as people sort numbers.

    Raises
    ------
    FileNotFoundError
        If there are none.
    ValueError
        If there are too many, or a pattern has other fields than ``{t}``, ``{c}`` and ``{z}``.
    """
    if Path(where).is_dir():
        with os.scandir(where) as entries:
            found = [e.path for e in entries if _is_tiff(e.name) and e.is_file()]
    else:
        fields, matcher = _FIELD.findall(where), _matcher(where)
        if set(fields) - set("tcz") or len(set(fields)) < len(fields):
            raise ValueError(
                f"{where}: the fields of a pattern are {{t}}, {{c}} and {{z}}, each once; found {', '.join(fields)}"
            )
        shell = _FIELD.sub("*", where)
        paths = (path for path in glob.iglob(shell) if _is_tiff(path) and Path(path).is_file())
        found = [path for path in paths if not fields or matcher.fullmatch(path)]
    if not found:
        raise FileNotFoundError(f"{where} holds no TIFF file ({', '.join(SUFFIXES)}); check the path")
    if len(found) > MAX_FILES:
        raise ValueError(f"{where} holds {len(found)} files, more than {MAX_FILES}; no image has")
    return sorted(found, key=_natural)


def read_names(where: str, axes: str | None, found: list[str]) -> Names:
    """Return the files of a folder or pattern in the order of the image.

    Parameters
    ----------
    where
        Folder or pattern.
    axes
        What the names count, and then the axes of a file, if that was said by hand.
    found
        What `find_files` returns.

    Raises
    ------
    ValueError
        If it is not sure what the names count, files are missing, or two have the same place.
    """
    fields = [] if Path(where).is_dir() else _FIELD.findall(where)
    if fields:
        matcher, letters = _matcher(where), "".join(fields)
        entries = [m.groups() for path in found if (m := matcher.fullmatch(path))]
    else:
        entries, letters = _numbers(where, found)
        letters = letters if axes is None else axes[: len(letters)]
    _check_letters(letters, where, found)
    # "01" and "1" are the same number: two files of one place, and no step.
    entries = [tuple(str(int(v)) if v.isdecimal() else v for v in entry) for entry in entries]
    values = tuple(tuple(sorted(set(column), key=_natural)) for column in zip(*entries, strict=True))
    for letter, column in zip(letters, values, strict=True):
        if letter != "c":
            _check_steps(where, letter, column)
    return Names(_placed(where, found, entries, letters, values), letters, values)


def _matcher(where: str) -> re.Pattern[str]:
    """Return the regular expression of a pattern with fields."""
    of_field = {"t": r"(\d+)", "z": r"(\d+)"}
    parts = _FIELD.split(where)
    return re.compile(
        "".join(of_field.get(p, r"([^/\\_]+)") if i % 2 else _as_regex(p) for i, p in enumerate(parts))
    )


def _as_regex(shell: str) -> str:
    """Return the regular expression of a part of a shell pattern."""
    parts = re.split(r"(\*|\?|\[[^\]]*\])", shell)
    special = {"*": r"[^/\\]*", "?": r"[^/\\]"}
    return "".join(
        re.escape(p) if i % 2 == 0 else special.get(p, p.replace("[!", "[^")) for i, p in enumerate(parts)
    )


def _numbers(where: str, found: list[str]) -> tuple[list[tuple[str, ...]], str]:
    """Return the numbers that change from name to name, and the letters that the words before them stand for."""
    stems = [Path(path).stem for path in found]
    split = [re.split(r"(\d+)", stem) for stem in stems]
    for stem, parts in zip(stems, split, strict=True):
        if parts[::2] != split[0][::2]:
            raise ValueError(
                f"{where}: {stems[0]!r} and {stem!r} differ in more than numbers; give a pattern with fields, such as "
                f"'{_folder(where)}/*_{{c}}_z{{z}}.tif'"
            )
    columns = list(zip(*(parts[1::2] for parts in split), strict=True))
    changing = [i for i, column in enumerate(columns) if len(set(map(int, column))) > 1]
    words = [re.sub(r"[\W_]+$", "", split[0][2 * i]) for i in changing]
    last = [re.search(r"[A-Za-z]*$", word) for word in words]
    letters = "".join(_LETTER_OF.get(m.group().lower(), "?") if m else "?" for m in last)
    return [tuple(parts[1::2][i] for i in changing) for parts in split], letters


def _check_letters(letters: str, where: str, found: list[str]) -> None:
    if "?" in letters or len(set(letters)) < len(letters) or set(letters) - set("tcz"):
        shown = ", ".join(repr(Path(path).name) for path in (found[0], found[-1]))
        n = f"{len(letters)} numbers change" if len(letters) > 1 else "one number changes"
        raise ValueError(
            f"{where}: in the names ({shown}) {n}, and what they count ({letters!r}) is not sure; pass `axes` (--axes) "
            "with a letter for each of them and for each axis of a file, such as 'zyx', or a pattern with {t}, {c}, {z}"
        )


def _check_steps(where: str, letter: str, values: Sequence[str]) -> None:
    """Raise if numbers are not at equal distances: a file is missing then."""
    numbers = [int(v) for v in values]
    steps = [b - a for a, b in itertools.pairwise(numbers)]
    odd = next((i for i, step in enumerate(steps) if step != min(steps)), None)
    if odd is not None:
        raise ValueError(
            f"{where}: on axis {letter!r} the names go from {values[odd]} to {values[odd + 1]}, elsewhere by "
            f"{min(steps)}; files are missing, restore them or take the others out"
        )


def _placed(
    where: str,
    found: list[str],
    entries: list[tuple[str, ...]],
    letters: str,
    values: Sequence[Sequence[str]],
) -> tuple[str, ...]:
    """Return the files in the order of the image, the last letter fastest."""
    at = dict(zip(reversed(entries), reversed(found), strict=True))
    if len(at) < len(found):
        seen: set[tuple[str, ...]] = set()
        twice = next(e for e in entries if e in seen or seen.add(e))  # type: ignore[func-returns-value]
        both = [Path(path).name for entry, path in zip(entries, found, strict=True) if entry == twice][:2]
        raise ValueError(
            f"{where}: {both[0]!r} and {both[1]!r} have the same place ({_place(letters, twice)}); take one out"
        )
    missing = [entry for entry in itertools.product(*values) if entry not in at]
    if missing:
        raise ValueError(
            f"{where}: {len(missing)} of {math.prod(map(len, values))} files are missing, the first is the one for "
            f"{_place(letters, missing[0])}; restore them or take the others of that place out"
        )
    return tuple(at[entry] for entry in itertools.product(*values))


def _place(letters: str, entry: Sequence[str]) -> str:
    return ", ".join(f"{letter} {value}" for letter, value in zip(letters, entry, strict=True))


def _is_tiff(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not Path(name).name.startswith(".")


def are_words(values: Sequence[str]) -> bool:
    """Return whether channels have names: words, or numbers that do not just count them, such as wavelengths."""
    if not all(v.isdecimal() for v in values):
        return True
    return bool(values) and [int(v) - int(values[0]) for v in values] != list(range(len(values)))


def _folder(where: str) -> str:
    return where if Path(where).is_dir() else str(Path(where).parent)


def _natural(text: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts 2 before 10."""
    pieces = (part for part in re.split(r"(\d+)", text) if part)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in pieces]
