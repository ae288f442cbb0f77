"""Field checks and strict JSON, shared by everything that writes or reads a certificate."""

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

from jaxunlearn.errors import CertificateError

MAX_BYTES = 1_000_000
MAX_TEXT = 10_000
_DECIMAL = re.compile(r"-?[0-9]+(\.[0-9]+)?(e[+-][0-9]+)?")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class ReadOnly(Mapping[str, Any]):
    """A mapping that cannot be changed; a deep copy of it is a dict."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, Any]):
        self._items = dict(items)

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self):
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return repr(self._items)

    def __deepcopy__(self, memo) -> dict[str, Any]:
        return dict(self._items)


def text(name: str, value: Any, *, empty: bool = False) -> str:
    """`value` on one line, or CertificateError. One line, so that no text can imitate a heading."""
    if not isinstance(value, str):
        raise CertificateError(f"Expected {name} to be text, got {value!r:.80}.")
    value = " ".join(value.split())
    if not value.isprintable() or len(value) > MAX_TEXT:
        raise CertificateError(
            f"Expected {name} to be printable text of at most {MAX_TEXT} characters, "
            f"got {value!r:.80}."
        )
    if not (value or empty):
        raise CertificateError(f"Expected {name} to say something, got an empty text.")
    return value


def choice(name: str, value: Any, allowed: Collection[str]) -> str:
    """`value` if it is one of `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise CertificateError(
            f"Expected {name} to be one of {', '.join(allowed)}, got {value!r:.80}."
        )
    return value


def integer(name: str, value: Any, *, at_least: int) -> int:
    """`value` as int (NumPy integers too); bool, floats and text are refused."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise CertificateError(f"Expected {name} to be an integer, got {value!r:.80}.")
    if not at_least <= value.__index__() < 2**63:
        raise CertificateError(f"Expected {name} in [{at_least}, 2^63), got {value!r:.80}.")
    return value.__index__()


def number(name: str, value: Any, rounding: Callable[[float], float]) -> float:
    """`value` as a finite float, rounded by `rounding`."""
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
        raise CertificateError(f"Expected {name} to be a number, got {value!r:.80}.")
    rounded = rounding(float(value))
    if not math.isfinite(rounded):
        raise CertificateError(f"Expected a finite {name}, got {value!r:.80}.")
    return rounded + 0.0  # no negative zero


def digest(name: str, value: Any) -> str:
    """`value` if it reads "sha256:<64 hex digits>"."""
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise CertificateError(f"Expected {name} as sha256:<64 hex digits>, got {value!r:.80}.")
    return value


def mapping(name: str, value: Any, item: Callable[[str, Any], Any]) -> Mapping[str, Any]:
    """A read-only, sorted copy of `value` with every item checked."""
    if not isinstance(value, Mapping):
        raise CertificateError(f"Expected {name} to be a mapping, got {value!r:.80}.")
    keys = sorted(text(f"a name in {name}", key) for key in value)
    if set(keys) != set(value):
        raise CertificateError(f"Expected names on one line in {name}, got {sorted(value)!r:.80}.")
    return ReadOnly({key: item(f"{name}[{key}]", value[key]) for key in keys})


def sequence(name: str, value: Any, item: Callable[[str, Any], Any]) -> tuple:
    """`value` as a tuple with every item checked; a lone text is refused."""
    if isinstance(value, str) or not isinstance(value, tuple | list):
        raise CertificateError(f"Expected {name} to be a tuple, got {value!r:.80}.")
    return tuple(item(f"{name}[{i}]", entry) for i, entry in enumerate(value))


def to_plain(value: Any) -> Any:
    """JSON-ready form: floats become decimal strings, mappings dicts, tuples lists."""
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, Mapping):
        return {key: to_plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return [to_plain(entry) for entry in value]
    if hasattr(value, "__dataclass_fields__"):
        return {name: to_plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return value


def from_decimal(name: str, value: Any) -> float:
    """The float of a decimal string in the one form that `to_plain` writes."""
    if not isinstance(value, str) or len(value) > 32 or not _DECIMAL.fullmatch(value):
        raise CertificateError(f"Expected {name} as a decimal string, got {value!r:.80}.")
    parsed = float(value)
    if not math.isfinite(parsed) or repr(parsed) != value:
        raise CertificateError(f"Expected {name} in shortest decimal form, got {value!r:.80}.")
    return parsed


def exact_fields(name: str, value: Any, expected: Collection[str]) -> dict[str, Any]:
    """`value` if it is an object with exactly the `expected` fields."""
    if not isinstance(value, dict):
        raise CertificateError(f"Expected {name} to be an object, got {value!r:.80}.")
    unknown, missing = sorted(set(value) - set(expected)), sorted(set(expected) - set(value))
    if unknown or missing:
        raise CertificateError(
            f"Expected the fields of schema version 1 in {name}: unknown {unknown!r:.200}, "
            f"missing {missing!r:.200}."
        )
    return value


def loads_strictly(document: str | bytes) -> Any:
    """`json.loads` without its leniencies: no duplicate keys, no NaN, no float literal, 1 MB."""
    if isinstance(document, str):
        document = document.encode("utf-8", "surrogatepass")
    if not isinstance(document, bytes):
        raise CertificateError(f"Expected JSON text, got {type(document).__name__}.")
    if len(document) > MAX_BYTES:
        raise CertificateError(f"Expected at most {MAX_BYTES} bytes, got {len(document)}.")
    try:
        return json.loads(
            document.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse,
            parse_float=_refuse,
        )
    except CertificateError:
        raise
    except (ValueError, RecursionError) as error:
        raise CertificateError(f"Expected valid JSON, got: {error!s:.200}") from None


def _unique(pairs):
    """An object's pairs as a dict; a repeated name is refused."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise CertificateError("Expected each field once, got a repeated field name.")
    return fields


def _refuse(literal) -> NoReturn:
    """Refuses NaN, Infinity and every number that is not an integer."""
    raise CertificateError(f"Expected integers and decimal strings, got the number {literal:.40}.")
