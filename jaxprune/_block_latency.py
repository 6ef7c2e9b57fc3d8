"""How long a model takes on this device: its sublayers measured once by width, a shape predicted from them, a shape measured.

What was measured is kept in a file, `place`; deleting it is how to measure again.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._files import atomic_text
from jaxprune._losses import Progress
from jaxprune.models import LayerDims, LlamaConfig, decode, shapes

WIDTHS = 8  # of MLPs that are measured, evenly spaced
STACK = 2**28  # bytes of weights in a stack that is measured, so that a CPU reads them from memory as it does a model's
CALLS, ENOUGH = 5, 0.5  # a time is the median of at least so many calls, and of as many as take so many seconds


class Conditions(NamedTuple):
    """What is timed.

    Attributes:
      phase: `prefill`, which reads `context` tokens into an empty cache, or `decode`, one step with a cache of that length.
      batch: sequences.
      context: tokens in each.
      dtype: of weights and cache.
    """

    phase: str = "decode"
    batch: int = 1
    context: int = 1024
    dtype: str = "float32"

    @property
    def tokens(self) -> int:
        """That a call reads."""
        return self.batch * (self.context if self.phase == "prefill" else 1)


class Table(NamedTuple):
    """Measured seconds.

    Attributes:
      dense: of the whole model.
      outside: of the model without layers.
      blocks: name of a kind of sublayer -> pairs of width, ascending, and seconds. Kinds are `attention` with the query heads
        of a KV group, and `mlp`, both also `alone`, in a run of one layer, for which XLA makes other programs; or `model`,
        whole models by the width of their residual stream.
    """

    dense: float
    outside: float
    blocks: dict[str, list[list[float]]]

    def block(self, kind: str, width: float | int) -> float:
        """Seconds of a sublayer, linear between the widths that were measured; nothing takes no time."""
        found = self.blocks[kind]
        return float(np.interp(width, [w for w, _ in found], [s for _, s in found]))


def seconds(cfg: LlamaConfig, when: Conditions, of: Callable[[list[float]], float] = statistics.median) -> float:
    """The median time of a call of a model of this shape, with the functions that generation uses, after one that compiles."""
    params = _weights(cfg, when.dtype)
    times: list[float] = []
    cache = None
    tokens = (np.arange(when.batch * when.context, dtype=np.int32) % cfg.vocab).reshape(when.batch, when.context)
    while len(times) <= CALLS or sum(times[1:]) < ENOUGH:
        if when.phase == "prefill" or cache is None:
            cache = jax.block_until_ready(decode.init_cache(cfg, when.batch, when.context, when.dtype))
        begin = time.perf_counter()
        if when.phase == "prefill":
            logits, cache = decode.prefill(params, tokens, cfg, cache)
        else:
            logits, cache = decode.step(params, tokens[:, -1], when.context - 1, cfg, cache)
        jax.block_until_ready(logits)
        times.append(time.perf_counter() - begin)
    return of(times[1:])


def _weights(cfg: LlamaConfig, dtype: str) -> Any:
    """Numbers of a likely size: times depend on shapes alone."""
    some = (0.02 * np.random.default_rng(0).standard_normal(65_521)).astype(np.float32)
    return jax.tree.map(lambda x: jnp.asarray(np.resize(some, x.shape), x.dtype), shapes(cfg, jnp.dtype(dtype)))


def predicted(table: Table, dense: LlamaConfig, cfg: LlamaConfig) -> float:
    r"""Seconds that a shape should take, from what its sublayers took.

    .. math:: T + c \Big( \sum_s t_s(w_s) - \sum_s t_s(w^0_s) \Big), \qquad c = \frac{T - T_0}{\sum_s t_s(w^0_s)}

    with T the dense model, :math:`T_0` the same without layers, :math:`t_s` the table of a sublayer, w its width in the shape
    and :math:`w^0` in the dense model. The factor c, kept between 1/2 and 2, is for what stacks of one kind of sublayer do not
    share with a whole model. Where the residual stream gets narrower, whole models were measured and are interpolated.
    """
    if cfg == dense:
        return table.dense
    if "model" in table.blocks:
        return table.block("model", cfg.d)
    before = _blocks(table, dense)
    factor = min(max((table.dense - table.outside) / before, 0.5), 2.0) if before else 1.0
    return table.dense + factor * (_blocks(table, cfg) - before)


def _blocks(table: Table, cfg: LlamaConfig) -> float:
    total = 0.0
    for run in cfg.runs:
        alone, dims = run.length == 1, run.dims
        groups = dims.kv_heads * cfg.sizes(dims)["h"] / cfg.head_dim  # of whole heads
        each = table.block(_kind(dims, "k", alone), groups) if groups else 0.0
        total += run.length * (each + (table.block(_kind(dims, "f", alone), dims.ff) if dims.ff else 0.0))
    return total


def _kind(dims: LayerDims, axis: str, alone: bool) -> str:
    return (f"attention {dims.q_per_kv}" if axis == "k" else "mlp") + (", alone" if alone else "")


def measure(cfg: LlamaConfig, when: Conditions, progress: Progress | None = None) -> Table:
    """Measures the sublayers of a model by width, in stacks of equal ones, by the fastest call, which is the least disturbed.

    Args:
      cfg: the model.
      when: what is timed.
      progress: wraps the sequence of measurements; called with it and a description.
    """
    groups = {d.q_per_kv: max(e.kv_heads for e in cfg.layers if e.q_per_kv == d.q_per_kv) for d in cfg.layers if d.kv_heads}
    sublayers = [LayerDims(k, g, 0) for g, most in sorted(groups.items()) for k in range(1, most + 1)]
    widest = max(dims.ff for dims in cfg.layers)
    todo = [(dims, alone) for alone in (False, True) for dims in sublayers]
    todo += [(LayerDims(0, 0, f), alone) for alone in (False, True) for f in spread(widest, WIDTHS // 2 if alone else WIDTHS)]
    none = _like(cfg, (LayerDims(0, 0, 0),))
    shell = seconds(_like(none, none.layers, vocab=8), when, min)
    blocks: dict[str, list[list[float]]] = {}
    for dims, alone in todo if progress is None else progress(todo, "measuring latencies"):
        stack = _stack(cfg, dims, when, alone)
        each = max(seconds(_like(cfg, stack, vocab=8), when, min) - shell, 0.0) / stack.count(dims)
        width, axis = (dims.kv_heads, "k") if dims.kv_heads else (dims.ff, "f")
        blocks.setdefault(_kind(dims, axis, alone), [[0.0, 0.0]]).append([float(width), each])
    return Table(seconds(cfg, when), seconds(none, when), blocks)


def measure_widths(cfg: LlamaConfig, at: Callable[[int], LlamaConfig], when: Conditions, progress: Progress | None) -> Table:
    """Measures whole models by the width of their residual stream; `at` makes their shapes."""
    found = [[0.0, 0.0]]
    widths = spread(cfg.d, WIDTHS)
    for d in widths if progress is None else progress(widths, "measuring latencies"):
        found.append([float(d), seconds(at(d), when)])
    return Table(seconds(cfg, when), 0.0, {"model": found})


def spread(most: int, n: int) -> list[int]:
    """About n widths up to `most`, multiples of 8 but for the last.

    >>> from jaxprune import _block_latency
    >>> _block_latency.spread(100, 4)
    [24, 48, 72, 100]
    """
    inner = {round(most * i / n / 8) * 8 for i in range(1, n)}
    return sorted(w for w in inner | {most} if 0 < w <= most)


def _like(cfg: LlamaConfig, layers: Sequence[LayerDims], **more: Any) -> LlamaConfig:
    kinds = itertools.islice(itertools.cycle(cfg.windowed), len(layers))
    return dataclasses.replace(cfg, layers=tuple(layers), windowed=tuple(kinds), **more)


def _stack(cfg: LlamaConfig, dims: LayerDims, when: Conditions, alone: bool) -> tuple[LayerDims, ...]:
    """Equal layers: few where arithmetic takes the time, enough to leave the processor's caches where reading does.

    To stand alone they are separated by layers too small to count.
    """
    size = cfg.matrix_parameters(dims) * jnp.dtype(when.dtype).itemsize
    most = 4 if when.phase == "prefill" else max(4, STACK // max(size, 1))
    return ((dims, LayerDims(0, 0, 1)) if alone else (dims,)) * min(most, len(cfg.layers))


def place(cfg: LlamaConfig, when: Conditions, kind: str) -> tuple[Path, str]:
    """The file of a table, `latency-*.json` in `$XDG_CACHE_HOME/jaxprune` or `~/.cache/jaxprune`, and what it depends on."""
    shape = _like(cfg, cfg.layers, bos_id=None, eos_ids=(), pad_id=None)
    device = [jax.devices()[0].device_kind, str(jax.device_count()), str(os.cpu_count()), platform.node(), platform.machine()]
    key = json.dumps([2, kind, repr(shape), when._asdict(), device, jax.__version__], sort_keys=True)
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "jaxprune" / f"latency-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json", key


def load(path: Path, key: str) -> Table | None:
    """The table in a file, or None where there is none for this key.

    Raises:
      ValueError: the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["key"] != key:
            return None
        table = Table(float(content["dense"]), float(content["outside"]), content["blocks"])
        values = [x for pairs in table.blocks.values() for w, s in pairs for x in (w, s)]
        if not all(np.isfinite(x) and x >= 0 for x in [table.dense, table.outside, *values]) or not values:
            raise ValueError("it has numbers that are no times")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not a table of latencies ({error})") from None
    return table


def store(path: Path, key: str, table: Table) -> None:
    """Writes a table.

    Raises:
      OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_text(path, json.dumps(dict(key=key) | table._asdict()) + "\n")


def cached(
    cfg: LlamaConfig,
    when: Conditions,
    *,
    at: Callable[[int], LlamaConfig] | None = None,
    say: Callable[[str], None] = lambda what: None,
    progress: Callable[[Sequence[Any], str], Iterable[Any]] | None = None,
) -> Table:
    """The table of a model on this device: from its file, or measured and written there.

    Args:
      cfg: the model.
      when: what is timed.
      at: width of the residual stream -> shape, where that is what gets narrower; None where layers do.
      say: called with where the table is.
      progress: as in `measure`.
    """
    path, key = place(cfg, when, "blocks" if at is None else repr(at(8)))
    try:
        if (table := load(path, key)) is not None:
            say(f"latencies: read from {path}")
            return table
    except (OSError, ValueError) as error:
        say(f"note: {error}; measured again")
    table = measure(cfg, when, progress) if at is None else measure_widths(cfg, at, when, progress)
    try:
        store(path, key, table)
        say(f"latencies: kept in {path}; delete it to measure again")
    except OSError as error:
        say(f"note: latencies: not kept, {error}")
    return table
