"""Low-rank adapters (LoRA) as a tree of arrays beside the parameters: make them, train through them, merge them away.

Reference: Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021, equation 3.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune import models
from jaxprune.models import axes

Adapter: TypeAlias = dict[str, dict[str, Float[Array, "..."]]]
RANK = "z"  # the letter of the bottleneck, which the axes table leaves free


def init(
    key: jax.Array,
    params: models.Params,
    cfg: models.Config,
    *,
    rank: int = 8,
    targets: Sequence[str] | None = None,
    dtype: Any = jnp.float32,
) -> Adapter:
    """Adapters that change nothing yet: `a` uniform on +-1/sqrt(number of inputs), `b` zero.

    Args:
      key: PRNG key.
      params: the model's parameters, or their shapes (`models.shapes(cfg)`).
      cfg: what `params` was made with.
      rank: width r of the bottleneck.
      targets: matrices that get an adapter, in every layer that has them; None is all, `cfg.matrices`.
      dtype: of the adapter; float32 also for a bfloat16 model, since small updates vanish in bfloat16.

    Returns:
      `{run: {"q_a": [l, *input axes, r], "q_b": [l, r, *output axes], ...}}`.

    Raises:
      ValueError: rank under 1, an unknown target, or none of the targets left in the model.

    >>> import jax
    >>> from jaxprune import models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 3, 48),) * 4)
    >>> adapter = init(jax.random.key(0), models.shapes(cfg), cfg, rank=5, targets=("q", "down"))
    >>> {name: x.shape for name, x in adapter["run_0"].items()}
    {'q_a': (4, 32, 5), 'q_b': (4, 5, 2, 3, 8), 'down_a': (4, 48, 5), 'down_b': (4, 5, 32)}

    Reference: Hu et al., 2021, section 4.1. The start of `a` is that of the PEFT library (Kaiming uniform with slope sqrt(5));
    the paper says Gaussian.
    """
    if rank < 1:
        raise ValueError(f"rank: {rank} given; a low-rank adapter needs at least 1 (LLM-Pruner uses 8)")
    targets = cfg.matrices if targets is None else targets
    unknown = [name for name in targets if name not in cfg.matrices]
    if unknown or not targets:
        raise ValueError(f"targets: {unknown or 'none'} given; choose from {', '.join(cfg.matrices)}")
    chex.assert_trees_all_equal_shapes(params, models.shapes(cfg))
    shapes = {}
    for run in cfg.runs:
        size = cfg.sizes(run.dims) | {RANK: rank}
        for name in targets:
            if name in params.get(run.name, {}):
                shapes[run.name, name] = [(run.length, *(size[x] for x in letters)) for letters in _factors(name)]
    if not shapes:
        raise ValueError(f"targets: {', '.join(targets)} given, but no layer of this model has any of them; choose others")
    adapter: Adapter = {}
    starts = _uniform(key, tuple(a for a, _ in shapes.values()), dtype)
    for ((run_name, name), (a, b)), start in zip(shapes.items(), starts, strict=True):
        bound = math.prod(a[1:-1]) ** -0.5
        adapter.setdefault(run_name, {}).update({f"{name}_a": start * bound, f"{name}_b": jnp.zeros(b, dtype)})
    return adapter


@functools.partial(jax.jit, static_argnums=(1, 2))
def _uniform(key: jax.Array, shapes: tuple[tuple[int, ...], ...], dtype: Any) -> list[jax.Array]:
    """Numbers on [-1, 1) for all shapes from one draw: XLA compiles random bits slowly, half a second a shape."""
    sizes = [math.prod(shape) for shape in shapes]
    flat = jax.random.uniform(key, (sum(sizes),), dtype, -1, 1)
    parts = jnp.split(flat, list(itertools.accumulate(sizes))[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _factors(name: str) -> tuple[str, str]:
    """The axes of `a` and `b` for the matrix `name`, layer axis left out."""
    inputs = axes.INPUT[name]
    return inputs + RANK, RANK + axes.LAYER[name].replace(inputs, "")


def overlay(params: models.Params, adapter: Adapter, *, alpha: float | int, sparse: bool = False) -> models.Params:
    """The parameters with adapters beside them: each adapted matrix acts as w + alpha/rank * a b.

    Args:
      params: the frozen model, any floating dtype.
      adapter: from `init`.
      alpha: numerator of the scale; the change is `alpha / rank` times the product.
      sparse: the change is zero where w is zero; the product is then formed, a layer at a time.

    Returns:
      A new tree for `models.hidden`; adapters are cast to the dtype of the matrix that they adapt, the scale goes into `b`.
    """
    out = dict(params)
    for run, arrays in adapter.items():
        out[run] = dict(params[run])
        for name, x in arrays.items():
            matrix, part = name.rsplit("_", 1)
            scale = alpha / arrays[f"{matrix}_a"].shape[-1] if part == "b" else 1.0
            place = f"{matrix}_kept_{part}" if sparse else name
            out[run][place] = (x * scale).astype(params[run][matrix].dtype)
    return out


def merge(
    params: models.Params, adapter: Adapter, *, alpha: float | int, sparse: bool = False, donate: bool = False
) -> models.Params:
    """The parameters with each adapted matrix replaced by w + alpha/rank * a b, in float32 and rounded once.

    Args:
      params: the frozen model, any floating dtype.
      adapter: from `init`.
      alpha, sparse: as in `overlay`; zeros of w stay zeros.
      donate: reuse the memory of the adapted matrices in `params`, which become unusable. Without it they are held twice.

    Returns:
      A tree of the same shapes and dtypes as `params`, without adapters.

    >>> import jax
    >>> from jaxprune import models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 3, 48),))
    >>> params = models.init(jax.random.key(0), cfg)
    >>> merged = merge(params, init(jax.random.key(1), params, cfg), alpha=16.0)
    >>> bool(jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), params, merged)))
    True
    """
    out = dict(params)
    add = _add_donated if donate else _add
    for run, arrays in adapter.items():
        out[run] = dict(params[run])
        for name in (place.removesuffix("_a") for place in arrays if place.endswith("_a")):
            a, b = arrays[f"{name}_a"], arrays[f"{name}_b"]
            out[run][name] = add(name, sparse, out[run][name], a, b, alpha / a.shape[-1])
    return out


def _add_product(name: str, sparse: bool, w: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    a_axes, b_axes = _factors(name)

    def one(i, w):  # a layer at a time: the float32 copy of a bfloat16 run would be twice the run
        product = jnp.einsum(f"{a_axes},{b_axes}->{axes.LAYER[name]}", a[i], b[i], precision="highest")
        change = jnp.where(w[i] != 0, scale * product, 0) if sparse else scale * product
        return w.at[i].set((w[i].astype(jnp.float32) + change).astype(w.dtype))

    return jax.lax.fori_loop(0, w.shape[0], one, w)


_add = functools.partial(jax.jit, static_argnums=(0, 1))(_add_product)
_add_donated = functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)(_add_product)
