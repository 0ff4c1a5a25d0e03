"""What is wrong with settings that pydantic refused: the first thing, on one line, with the line of the file."""

from __future__ import annotations

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from flatwater.lined import place_of

__all__ = ["contradiction", "explain"]


def contradiction(message: str, *location: int | str) -> PydanticCustomError:
    """For a validator of a model to raise: ``message``, about the setting at ``location`` within that model."""
    return PydanticCustomError("contradiction", "{message}", {"message": message, "location": location})


def explain(error: ValidationError, document: Any, model: type[BaseModel], source: str | None = None) -> str:
    """The first thing wrong, on one line; an unknown key first, since what it should have set is then missing too.

    Args:
        error: what ``model`` said to ``document``.
        document: the settings; where they are of a file (:class:`~flatwater.lined.LinedDict`), its line is named.
        model: where to look for what may have been meant.
        source: what to name where there is no line.
    """
    details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    detail = details[0]
    location = detail["loc"]
    if detail["type"] == "contradiction":
        location = (*location, *detail["ctx"]["location"])
    place = place_of(document, location) or source
    return f"{place}: {_problem(detail, model)}" if place else _problem(detail, model)


def _problem(detail: Any, model: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"unknown key {key}{_suggest(detail['loc'], model)}"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] in ("value_error", "contradiction"):
        return f"{key + ': ' if key else ''}{message}"
    return f"{key}={detail['input']!r}: {message[:1].lower()}{message[1:]}"


def _suggest(location: tuple[int | str, ...], model: type[BaseModel]) -> str:
    """What may have been meant: a similar name in the same section, else that very name in another."""
    *section, name = ("*" if isinstance(part, int) else part for part in location)
    known = _keys(model)
    siblings = [key for key in known if key.split(".")[:-1] == section]
    close = difflib.get_close_matches(".".join([*section, name]), siblings, n=1, cutoff=0.75)
    meant = close or [key for key in known if key.split(".")[-1] == name and "*" not in key]
    shown = [key.rpartition(".*.")[2] for key in meant or siblings]  # within a list, the list is clear
    return f"; did you mean {' or '.join(shown)}?" if meant else f"; known here: {', '.join(shown)}"


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        found.append(prefix + name)
        kinds = [field.annotation, *get_args(field.annotation)]
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if inner is not None:
            many = inner is not field.annotation and len(kinds) > 1 and kinds[-1] is ...
            found += _keys(inner, f"{prefix}{name}.{'*.' if many else ''}")
    return found
