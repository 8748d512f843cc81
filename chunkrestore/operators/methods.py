"""Deconvolution methods by name, for functions, pipelines and the command line."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from typing import Any

from chunkrestore.operators.base import ImageOperator

METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "richardson-lucy": ("richardson_lucy", "RichardsonLucy", {}),
    "gradient-consensus": ("gradient_consensus", "GradientConsensus", {}),
    "wiener-butterworth": ("unmatched", "UnmatchedRichardsonLucy", {"back_projector": "wiener-butterworth"}),
    "masked-wiener": ("unmatched", "UnmatchedRichardsonLucy", {"back_projector": "masked-wiener"}),
    "wiener": ("wiener", "Wiener", {"prior": "constant"}),
    "regularized-inverse": ("wiener", "Wiener", {"prior": "laplacian"}),
}
"""For each method: module, class, and the parameters that make the class this method."""

_NOT_FOR_USERS = {"psf", "decision"}


def deconvolution(method: str, psf: Any, **parameters: Any) -> ImageOperator:
    """Return the operator of a method.

    Parameters
    ----------
    method
        One of `METHODS`.
    psf
        Point spread function, or a `chunkrestore.psf.varying.PsfField`.
    parameters
        Of the operator; None means its default for all of them but ``acceleration`` and ``stop``.

    Raises
    ------
    TypeError, ValueError
        If there is no such method, it has no such parameter, or a value is out of range.
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(map(repr, METHODS))}; got {method!r}")
    module, name, fixed = METHODS[method]
    cls = getattr(import_module(f"chunkrestore.operators.{module}"), name)
    known = {f.name for f in fields(cls) if f.init} - _NOT_FOR_USERS - set(fixed)
    given = {k: v for k, v in parameters.items() if v is not None or k in ("acceleration", "stop")}
    for parameter in sorted(set(given) - known):
        raise ValueError(
            f"`{parameter}` is no parameter of the method {method!r}; it takes {', '.join(sorted(known))}"
        )
    operator: ImageOperator = cls(psf, **fixed, **given)
    return operator
