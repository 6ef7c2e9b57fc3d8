"""What the command line shows: progress of long loops on stderr, tables as text."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, TypeVar

import tqdm

from jaxprune import _hosts

T = TypeVar("T")


def progress(
    iterable: Iterable[T],
    description: str,
    *,
    total: int | None = None,
    unit: str = "it",
    file: Any = None,
    interval: float = 30.0,
) -> Iterator[T]:
    """Passes the items on and shows how many there were, their rate and the time that is left.

    On a terminal it is one bar that moves. Elsewhere (a log file, CI) it is a line at most every `interval` seconds, and one at
    the end. Of several processes the first one shows it.

    Args:
      iterable: the items.
      description: what the loop does.
      total: how many items there are; None asks `len`, and shows no time left where there is none.
      unit: what one item is.
      file: text stream to write to; None is stderr.
      interval: seconds between lines, off the terminal.
    """
    if not _hosts.first():
        yield from iterable
        return
    file = sys.stderr if file is None else file
    total = len(iterable) if total is None and isinstance(iterable, Sized) else total
    if file.isatty():
        with tqdm.tqdm(iterable, description, total, file=file, unit=f" {unit}", dynamic_ncols=True) as bar:
            yield from bar
        return
    begin = shown = time.monotonic()
    n = 0
    for item in iterable:
        yield item
        n, now = n + 1, time.monotonic()
        if now - shown >= interval and n != total:
            shown = now
            print(tqdm.tqdm.format_meter(n, total, now - begin, 80, description, unit=f" {unit}"), file=file, flush=True)
    print(tqdm.tqdm.format_meter(n, total, time.monotonic() - begin, 80, description, unit=f" {unit}"), file=file, flush=True)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a text table: one column a key, in the order that keys first appear; numbers to the right, absent values empty.

    Args:
      rows: one mapping a row. Floats are shown with six significant digits: format them before if that is not what is wanted.

    >>> print(table([{"layer": 0, "MLP channels": 1536}, {"layer": 10, "note": "protected"}]))
    layer  MLP channels  note
    -----  ------------  ---------
        0          1536
       10                protected
    """
    keys = list(dict.fromkeys(key for row in rows for key in row))
    right = {k: all(isinstance(row.get(k), (int, float, type(None))) for row in rows) for k in keys}
    body = [[_cell(row.get(k)) for k in keys] for row in rows]
    widths = [max(len(line[i]) for line in [keys, *body]) for i in range(len(keys))]
    lines = [keys, ["-" * w for w in widths], *body]
    return "\n".join(
        "  ".join(x.rjust(w) if right[k] else x.ljust(w) for x, w, k in zip(line, widths, keys, strict=True)).rstrip()
        for line in lines
    )


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


@contextlib.contextmanager
def meter(description: str, total: int, unit: str, *, interval: float = 15.0) -> Iterator[Callable[[int, str], None]]:
    """As `progress`, for loops that call back: yields a function of how many are done and a few words on the state.

    Args:
      description: what the loop does.
      total: how many there are.
      unit: what one is.
      interval: seconds between lines, off the terminal.
    """
    if not _hosts.first():
        yield lambda done, state: None
        return
    if sys.stderr.isatty():
        with tqdm.tqdm(total=total, desc=description, unit=f" {unit}", dynamic_ncols=True) as bar:

            def move(done: int, state: str) -> None:
                bar.set_postfix_str(state, refresh=False)
                bar.update(done - bar.n)

            yield move
        return
    begin, shown, before = time.monotonic(), time.monotonic(), 0

    def line(done: int, state: str) -> None:
        nonlocal shown, begin, before
        now = time.monotonic()
        if done > before + 1 and not before:  # resumed: what was done earlier does not count for the rate
            begin, before = now, done
        if now - shown >= interval or done == total:
            shown = now
            text = tqdm.tqdm.format_meter(
                done, total, now - begin, 80, description, unit=f" {unit}", initial=before, postfix=state
            )
            print(text, file=sys.stderr, flush=True)

    yield line
