"""What the benchmarks share: fresh processes, alternating repetitions, peak memory, tables."""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MIB = 2**20


def in_new_process(file: str, *arguments: Any, **environment: str) -> Any:
    """Runs a Python file and returns the last line that it prints, which is JSON. What it says on stderr passes through.

    The process has the variables of `environment` beside those of this one.
    """
    command = [sys.executable, file, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


class Spent(NamedTuple):
    """Seconds on the clock, and processor seconds of all threads, which other programs disturb less."""

    clock: float
    processor: float


def spent(program: Callable[[], Any]) -> Spent:
    """What a call costs, its result included."""
    import jax

    begin = time.perf_counter(), time.process_time()
    jax.block_until_ready(program())
    return Spent(time.perf_counter() - begin[0], time.process_time() - begin[1])


def median(spendings: Sequence[Spent]) -> Spent:
    """Of each kind of seconds."""
    return Spent(*map(statistics.median, zip(*spendings, strict=True)))


def alternate(programs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Spent]:
    """The median of each program: all of them in turn, `repeats` times, after one round that does not count."""
    rounds = [{name: spent(program) for name, program in programs.items()} for _ in range(repeats + 1)][1:]
    return {name: median([r[name] for r in rounds]) for name in programs}


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes, read without JAX; for processes larger than their starter."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def size(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    import jax

    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def calibration(source: str, model: str, samples: int, length: int, or_fewer: bool = False) -> Any:
    """Tokens of a calibration source, int32[samples, length], seed 0; of a text that is too short all it has, if allowed."""
    from jaxprune import data, models

    tokenizer = models.load_tokenizer(model)
    return data.token_blocks(source, tokenizer, samples=samples, length=length, seed=0, or_fewer=or_fewer).tokens


def show(title: str, rows: Sequence[Mapping[str, Any]], json_file: Path | None, **settings: Any) -> None:
    """Prints a table of results, and writes it as JSON where asked. Floats are printed with three digits after the point."""
    from jaxprune._json import write_json
    from jaxprune._progress import table

    print(title)
    print(table([{k: f"{v:.3f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]), flush=True)
    if json_file is not None:
        write_json(json_file, dict(title=title, rows=rows, **settings))
