"""LLaMA (Touvron et al., 2023) as pure functions on a tree of arrays, with probes that scores are derivatives by."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxprune.models import _rope, _taps, axes
from jaxprune.models._attention import attend
from jaxprune.models.config import LayerDims, LlamaConfig
from jaxprune.models.types import TAP_KINDS, LossFn, Params, PerLayer, Probes


def rms_norm(x: jax.Array, w: jax.Array, eps: float, gate: jax.Array | None = None) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * w over the residual width, the mean taken over the channels that `gate` keeps."""
    x32 = x.astype(jnp.float32)
    n = x.shape[-1] if gate is None else jnp.sum(gate)
    x32 = x32 * jax.lax.rsqrt(jnp.sum(x32 * x32, -1, keepdims=True) / n + eps)
    return x32.astype(x.dtype) * w


def linear(p: dict, name: str, x: jax.Array) -> jax.Array:
    """`x` times the matrix `name`, plus its low-rank adapter (`name_a`, `name_b`), if `p` has them. Biases are not added."""
    b, t = x.shape[:2]
    rows = x.reshape(b * t, math.prod(x.shape[2:]))  # einsum over several axes: XLA transposes whole weights
    y = rows @ p[name].reshape(rows.shape[1], -1)
    if f"{name}_a" in p:
        low = rows @ p[f"{name}_a"].reshape(rows.shape[1], -1)
        y += low @ p[f"{name}_b"].reshape(low.shape[1], -1)
    return y.reshape(b, t, *p[name].shape[len(axes.INPUT[name]) :])


def _add_bias(p: dict, name: str, x: jax.Array) -> jax.Array:
    return x + p[f"{name}_bias"].astype(x.dtype) if f"{name}_bias" in p else x


def block(p: dict, x: jax.Array, cfg: LlamaConfig, rope, gates: dict, cache: dict | None = None, start=0, mask_from=None):
    """One decoder layer. A sublayer whose arrays are absent adds nothing but its bias.

    Args:
      p: arrays of the layer, by name.
      x: residual stream, [b, t, d].
      rope: cos and sin, float32[t, h/2].
      gates: axis letter -> float32[units]; absent letters are all ones.
      cache: keys and values so far, {"k", "v"}: [b, s, k, h], or None to attend within `x` alone.
      start: position of `x[:, 0]`.
      mask_from: int32[b], the first key that each sequence may see (left padding), or None.

    Returns:
      The new residual stream and the new cache.
    """
    gate = {a: g.astype(x.dtype) for a, g in gates.items()}
    if "q" in p:
        y = rms_norm(x, p["attn_norm"], cfg.norm_eps, gates.get("d"))
        q = _rope.rotate(_add_bias(p, "q", linear(p, "q", y)), *rope)
        k = _rope.rotate(_add_bias(p, "k", linear(p, "k", y)), *rope)
        v = _add_bias(p, "v", linear(p, "v", y))
        if cache is not None:
            k = jax.lax.dynamic_update_slice(cache["k"], k, (0, start, 0, 0))
            v = jax.lax.dynamic_update_slice(cache["v"], v, (0, start, 0, 0))
            cache = dict(k=k, v=v)
        z = attend(q, k, v, cfg.head_dim**-0.5, start, cfg.sliding_window, mask_from)
        if "k" in gate:
            z = z * gate["k"][:, None, None]
        update = linear(p, "o", z)
        x = x + (update * gate["d"] if "d" in gate else update)
    if "o_bias" in p:
        x = x + p["o_bias"].astype(x.dtype)
    if "up" in p:
        y = rms_norm(x, p["mlp_norm"], cfg.norm_eps, gates.get("d"))
        z = jax.nn.silu(_add_bias(p, "gate", linear(p, "gate", y))) * _add_bias(p, "up", linear(p, "up", y))
        if "f" in gate:
            z = z * gate["f"]
        update = linear(p, "down", z)
        x = x + (update * gate["d"] if "d" in gate else update)
    if "down_bias" in p:
        x = x + p["down_bias"].astype(x.dtype)
    return x, cache


def _stack(per_layer: PerLayer | None, start: int, length: int) -> Any:
    return {} if per_layer is None else jax.tree.map(lambda *x: jnp.stack(x), *per_layer[start : start + length])


def _layer(p, x, cfg, rope, probes, microbatch, axis_name):
    taps = {kind: probes[kind] for kind in TAP_KINDS if kind in probes}
    p, squares = _taps.outer(p, taps, axis_name)
    b = x.shape[0]
    microbatch = 1 if squares else microbatch
    if microbatch is None or microbatch >= b:
        return block(_taps.inner(p, squares), x, cfg, rope, probes.get("gates", {}))[0]
    if b % microbatch:
        raise ValueError(f"microbatch: {microbatch} given; it must divide the batch of {b} sequences")

    def one(x):
        return block(_taps.inner(p, squares), x, cfg, rope, probes.get("gates", {}))[0]

    return jax.lax.map(one, x.reshape(-1, microbatch, *x.shape[1:])).reshape(x.shape)


def hidden(
    params: Params,
    tokens: Int[Array, "b t"],
    cfg: LlamaConfig,
    probes: Probes | None = None,
    *,
    remat: bool = False,
    microbatch: int | None = None,
    axis_name: str | None = None,
) -> Float[Array, "b t d"]:
    """The residual stream after the final norm.

    Args:
      params: the tree of `init`.
      tokens: token ids.
      cfg: what `params` was made with.
      probes: see `jaxprune.models.types`; None is the plain model.
      remat: keep only the residual stream between layers for the backward pass and recompute the rest.
      microbatch: sequences that go through a layer at a time; it divides b. None is all of them. Changes memory, not results.
      axis_name: a mapped axis (`pmap`, `shard_map`) over which taps sum weight gradients before they reduce them.
    """
    probes = probes or {}
    first_gates = probes["gates"][0] if "gates" in probes else {}
    x = params["embed"][tokens]
    if "d" in first_gates:
        x = x * first_gates["d"].astype(x.dtype)
    rope = _rope.tables(cfg, jnp.arange(tokens.shape[1]), tokens.shape[1])

    for run in cfg.runs:
        arrays = params.get(run.name, {})
        if not arrays:
            continue

        def layer(x, z):
            return _layer(z[0], x, cfg, rope, z[1], microbatch, axis_name), None

        stacked = {kind: _stack(per_layer, run.start, run.length) for kind, per_layer in probes.items()}
        x, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, (arrays, stacked))
    return rms_norm(x, params["norm"], cfg.norm_eps, first_gates.get("d"))


def head(params: Params, x: Float[Array, "... d"], cfg: LlamaConfig) -> Float[Array, "... v"]:
    """Logits, in float32."""
    if cfg.tie_embeddings:
        return jnp.einsum("...d,vd->...v", x, params["embed"], preferred_element_type=jnp.float32)
    return jnp.einsum("...d,dv->...v", x, params["head"], preferred_element_type=jnp.float32)


def apply(
    params: Params, tokens: Int[Array, "b t"], cfg: LlamaConfig, probes: Probes | None = None, **options: Any
) -> Float[Array, "b t v"]:
    """Logits of every position, float32; options as in `hidden`.

    >>> import jax
    >>> from jaxprune import models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),) * 3)
    >>> params = models.init(jax.random.key(0), cfg)
    >>> models.apply(params, jax.numpy.zeros((1, 5), int), cfg).shape
    (1, 5, 64)
    """
    return head(params, hidden(params, tokens, cfg, probes, **options), cfg)


def token_losses(
    params: Params, x: Float[Array, "b t d"], targets: Int[Array, "b t"], cfg: LlamaConfig, chunk: int = 256
) -> Float[Array, "b t"]:
    """Cross-entropy of each target in nats, float32, with the logits of at most `chunk` tokens in memory at a time."""
    b, t, d = x.shape
    pad = -(b * t) % min(chunk, b * t)
    flat = jnp.pad(x.reshape(b * t, d), ((0, pad), (0, 0))).reshape(-1, min(chunk, b * t), d)
    wanted = jnp.pad(targets.reshape(b * t), (0, pad)).reshape(flat.shape[:2])

    @jax.checkpoint
    def one(z):
        logits = head(params, z[0], cfg)
        return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, z[1][:, None], -1)[:, 0]

    return jax.lax.map(one, (flat, wanted)).reshape(-1)[: b * t].reshape(b, t)


def loss_fn(
    cfg: LlamaConfig,
    *,
    remat: bool = True,
    microbatch: int | None = None,
    axis_name: str | None = None,
    chunk: int = 256,
) -> LossFn:
    """The mean next-token cross-entropy of each sequence as a function of (params, probes, tokens), float32[b] in nats.

    Args:
      cfg: the model.
      remat, microbatch, axis_name: as in `hidden`.
      chunk: tokens whose logits are in memory at a time.

    >>> import jax
    >>> from jaxprune import models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),) * 3)
    >>> loss = models.loss_fn(cfg)
    >>> uniform = jax.tree.map(jax.numpy.zeros_like, models.init(jax.random.key(0), cfg))
    >>> losses = loss(uniform, {}, jax.numpy.zeros((2, 5), int))
    >>> losses.shape, bool(abs(losses - jax.numpy.log(64)).max() < 1e-5)
    ((2,), True)
    """

    def losses(params: Params, probes: Probes, tokens: Int[Array, "b t"]) -> Float[Array, " b"]:
        x = hidden(params, tokens[:, :-1], cfg, probes, remat=remat, microbatch=microbatch, axis_name=axis_name)
        return token_losses(params, x, tokens[:, 1:], cfg, chunk).mean(-1)

    return losses


def shapes(cfg: LlamaConfig, dtype: Any = jnp.float32) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s: `embed`, `norm`, `head` unless tied, one dict of stacked arrays a run."""

    def arrays(table: dict[str, str], size: dict[str, int], lead: tuple[int, ...] = ()) -> dict:
        return {n: jax.ShapeDtypeStruct((*lead, *(size[a] for a in ax)), dtype) for n, ax in table.items()}

    runs = {run.name: arrays(cfg.layer_arrays(run.dims), cfg.sizes(run.dims), (run.length,)) for run in cfg.runs}
    return arrays(cfg.top_arrays(), cfg.sizes()) | {name: run for name, run in runs.items() if run}


def init(key: jax.Array, cfg: LlamaConfig, dtype: Any = jnp.float32) -> Params:
    """Random parameters: norms one, biases zero, matrices normal with standard deviation 0.02."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes(cfg, dtype))
    ends = np.cumsum([leaf.size for _, leaf in leaves])
    flat = np.asarray(0.02 * jax.random.normal(key, (int(ends[-1]),)))  # one draw: XLA compiles random bits slowly

    def one(path, leaf, end):
        name = path[-1].key
        if name.endswith("norm"):
            return jnp.ones(leaf.shape, leaf.dtype)
        if name.endswith("_bias"):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return jnp.asarray(flat[end - leaf.size : end].reshape(leaf.shape), leaf.dtype)

    return jax.tree.unflatten(tree, [one(path, leaf, end) for (path, leaf), end in zip(leaves, ends, strict=True)])


def count_parameters(cfg: LlamaConfig) -> int:
    """All stored parameters; tied embeddings count once.

    >>> from jaxprune.models import LayerDims, LlamaConfig, count_parameters
    >>> count_parameters(LlamaConfig(vocab=32000, d=4096, head_dim=128, layers=(LayerDims(32, 1, 11008),) * 32))
    6738415616
    """
    return sum(x.size for x in jax.tree.leaves(shapes(cfg)))


def probes(cfg: LlamaConfig, units: str = "kf") -> Probes:
    """Templates of all probes of the model: gates of one, taps of zero.

    Args:
      cfg: the model.
      units: axis letters that gates are made for; taps exist for `k` and `f`.

    Returns:
      `{"gates": PerLayer of float32[units], "taps": PerLayer of {tensor: float32[unit, ..., channel]}}`. A layer whose sublayer
      is gone has no probes for it.

    >>> from jaxprune.models import LayerDims, LlamaConfig, probes
    >>> p = probes(LlamaConfig(vocab=64, d=32, head_dim=8, layers=(LayerDims(2, 3, 48),)))
    >>> p["gates"][0]["k"].shape, p["taps"][0]["k"]["q"].shape, p["taps"][0]["f"]["down"].shape
    ((2,), (2, 3, 8), (48,))
    """

    def layer(dims: LayerDims) -> tuple[dict, dict]:
        size, arrays = cfg.sizes(dims), cfg.layer_arrays(dims)
        alive = [u for u in units if size[u]]
        gates = {u: jnp.ones(size[u], jnp.float32) for u in alive}
        taps = {
            u: {
                n: jnp.zeros([size[a] for a in axes.UNITS[u] if a in arrays[n]], jnp.float32)
                for n in axes.MATRICES
                if n in arrays and u in arrays[n]
            }
            for u in alive
            if u in "kf"
        }
        return gates, taps

    gates, taps = zip(*map(layer, cfg.layers), strict=True)
    return dict(gates=gates, taps=taps)
