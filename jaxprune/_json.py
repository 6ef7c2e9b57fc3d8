"""Results as JSON."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune._files import atomic_text


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON as `atomic_text` does; numbers that JSON has no word for become the strings `"inf"`, `"-inf"` and `"nan"`.

    Args:
      path: the file.
      value: mappings, sequences, arrays, NamedTuples and dataclasses of numbers, text, paths and None.
    """
    atomic_text(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """The value in the types that JSON has; NamedTuples and dataclasses become objects.

    >>> plain({"perplexity": np.float32("inf"), "kept": np.arange(3), "path": Path("a/b")})
    {'perplexity': 'inf', 'kept': [0, 1, 2], 'path': 'a/b'}

    Raises:
      TypeError: there is something in it that JSON cannot hold.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif hasattr(value, "_asdict"):
        value = value._asdict()
    elif hasattr(value, "tolist"):
        value = np.asarray(value).tolist()
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} {value!r} cannot be written as JSON")
