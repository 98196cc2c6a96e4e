"""What is kept of an exception: a short message and a full traceback, both bounded and storable."""

from __future__ import annotations

import traceback

from kalamdb.errors import KalamDbError
from kalamdb.jobs.model import Permanent

_CUT = "... ({} bytes cut) ..."


def message_of(exc: BaseException, bytes_max: int) -> str:
    """One text that says what went wrong: our own errors as they are, others with their type."""
    name = type(exc).__name__
    try:
        text = str(exc)
    except Exception:
        # The class is not ours: its __str__ may raise anything, and the job must still end with a message.
        text = "(its message cannot be shown)"
    if not (text and isinstance(exc, KalamDbError | Permanent)):
        text = f"{name}: {text}" if text else name
    return bounded(text, bytes_max)


def trace_of(exc: BaseException, bytes_max: int) -> str:
    """The traceback with its causes."""
    try:
        text = "".join(traceback.format_exception(exc))
    except Exception:
        # Same reason: formatting calls code of the exception's class.
        text = f"(the traceback of {type(exc).__name__} cannot be shown)"
    return bounded_middle(text, bytes_max)


def storable(text: str) -> str:
    """Text without lone surrogates, which no encoding of the store can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="backslashreplace").decode()
    return text


def bounded(text: str, bytes_max: int) -> str:
    """At most about `bytes_max` bytes of the start of `text`, storable."""
    text = storable(text)
    raw = text.encode()
    if len(raw) <= bytes_max:
        return text
    return raw[:bytes_max].decode(errors="ignore") + _CUT.format(len(raw) - bytes_max)


def bounded_middle(text: str, bytes_max: int) -> str:
    """At most about `bytes_max` bytes: the start and the end of `text`, storable."""
    text = storable(text)
    raw = text.encode()
    if len(raw) <= bytes_max:
        return text
    half = bytes_max // 2
    cut = "\n" + _CUT.format(len(raw) - 2 * half) + "\n"
    return raw[:half].decode(errors="ignore") + cut + raw[-half:].decode(errors="ignore")
