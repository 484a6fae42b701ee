"""What a contributor may be called."""

from __future__ import annotations

LONGEST_NAME = 200  # characters of a site's name or incarnation


def name_trouble(what: str, name: object) -> str | None:
    """Why this cannot be the name of a site (or an incarnation), in words; None where it can."""
    if not isinstance(name, str) or len(name) > LONGEST_NAME or not name.isprintable():
        return f"{what} must be printable text of at most {LONGEST_NAME} characters."
    if name in (".", ".."):  # which an address takes for a folder
        return f"{what} is {name!r}; name the contributor."
    return None
