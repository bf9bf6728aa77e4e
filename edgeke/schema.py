"""From plain YAML values to frozen dataclasses, with errors that name key, value and remedy."""

import contextlib
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from edgeke.errors import InputError

__all__ = ["build", "check_keys", "require"]


class _OutOfRangeError(ValueError):
    """A field's value is refused; the builder adds the full key."""

    def __init__(self, field: str, remedy: str) -> None:
        super().__init__(remedy)
        self.field = field


def require(ok: bool, field: str, remedy: str) -> None:
    """Refuse a field's value inside `__post_init__`; `build` adds the full key and the value."""
    if not ok:
        raise _OutOfRangeError(field, remedy)


def build(kind: Any, value: Any, key: str, where: str) -> Any:
    """Turn plain YAML into dataclass `kind`, or refuse it by its full key.

    Understands numbers (integers serve as floats), text, booleans, null, `Literal`, lists as
    tuples, nested dataclasses, and unions of these. A missing key is null where the dataclass says
    `optional_keys`.
    """
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: {key} = {value!r} must be a section with keys of its own")
    hints = typing.get_type_hints(kind)
    check_keys(value, hints, key, where)
    arguments: dict[str, Any] = {}
    for name, hint in hints.items():
        full = _join(key, name)
        if name not in value and getattr(kind, "optional_keys", False):
            arguments[name] = None
            continue
        if name not in value:
            raise InputError(f"{where}: key `{full}` is missing; add it")
        if hasattr(hint, "__dataclass_fields__") and not isinstance(value[name], hint):
            arguments[name] = build(hint, value[name], full, where)
        else:
            arguments[name] = _convert(hint, value[name], full, where)
    try:
        return kind(**arguments)
    except _OutOfRangeError as error:
        shown: Any = arguments
        for part in error.field.split("."):
            shown = shown[part] if isinstance(shown, dict) else getattr(shown, part)
        shown = list(shown) if isinstance(shown, tuple) else shown
        full = _join(key, error.field)
        raise InputError(f"{where}: {full} = {shown!r} is out of range; {error}") from None


def check_keys(value: Mapping[str, Any], known: Iterable[str], key: str, where: str) -> None:
    """Refuse a key that is not among the known ones, with the nearest that is."""
    for name in value:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            meant = f"did you mean `{close[0]}`?" if close else f"known: {', '.join(known)}"
            raise InputError(
                f"{where}: unknown key `{_join(key, name)}` = {value[name]!r}; {meant}"
            )


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _convert(hint: Any, value: Any, key: str, where: str) -> Any:
    """Check one value against its type hint; integers serve as floats."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in options and isinstance(value, str):
            return value
        raise InputError(f"{where}: {key} = {value!r} is unknown; use one of {', '.join(options)}")
    if origin is types.UnionType and isinstance(value, list):
        lists = [option for option in options if typing.get_origin(option) is tuple]
        return _convert(lists[0] if lists else options[0], value, key, where)
    if origin is tuple:
        if isinstance(value, list):
            return tuple(
                build(options[0], item, f"{key}[{i}]", where)
                if hasattr(options[0], "__dataclass_fields__")
                else _convert(options[0], item, key, where)
                for i, item in enumerate(value)
            )
        raise InputError(f"{where}: {key} = {value!r} must be a list, such as [0, 1]")
    accepted = options if origin is types.UnionType else (hint,)
    accepted = tuple(option for option in accepted if typing.get_origin(option) is None)
    if float in accepted and isinstance(value, str):
        # PyYAML reads 1e-4 as text; DVC, which follows YAML 1.2, reads a number.
        with contextlib.suppress(ValueError):
            value = float(value)
    if float in accepted and int not in accepted and type(value) is int:
        return float(value)
    right_type = isinstance(value, accepted) and (hint is bool or not isinstance(value, bool))
    if right_type and not (isinstance(value, float) and not math.isfinite(value)):
        return value
    names = " or ".join("null" if a is types.NoneType else a.__name__ for a in accepted)
    raise InputError(f"{where}: {key} = {value!r} has the wrong type; give one {names}")
