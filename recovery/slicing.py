r"""SliceGPT: the residual stream in its principal components, of which the last are deleted.

RMSNorm without its gain commutes with an orthogonal `Q`, so a transformer computes the same when every matrix that reads the
stream becomes :math:`Q^\top W`, every one that writes it :math:`W Q`, and, where the next `Q` differs, the stream itself passes
through :math:`Q^\top Q_\text{next}`. With the principal components as `Q`, cutting it to its first columns loses least.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.models import LlamaConfig, Params, axes, embedded, layer_of, sublayer
from jaxprune.models._mesh import on_host
from jaxprune.models._runs import places
from jaxprune.recovery._solve import damped

DAMP = 0.01  # of the mean diagonal, as the released code
MULTIPLE = 8
SUBLAYERS = (("o", "attn_norm", ("q", "k", "v")), ("down", "mlp_norm", ("gate", "up")))


def slice_gpt(
    params: Params,
    cfg: LlamaConfig,
    batches: Sequence[Any],
    width: int,
    *,
    progress: Callable[[Sequence[Any], str], Iterable[Any]] | None = None,
) -> tuple[Params, LlamaConfig]:
    r"""Rotates the residual stream to its principal components and keeps the first `width` of them.

    .. math:: C = \sum_t x_t x_t^\top = Q \Lambda Q^\top, \qquad
        W_\text{in} \leftarrow Q_w^\top \operatorname{diag}(g)\, W_\text{in}, \quad W_\text{out} \leftarrow W_\text{out} Q'_w,
        \quad S = Q_w^\top Q'_w,

    with `x` the stream, `g` the gain of the norm, :math:`Q_w` the components before a sublayer, :math:`Q'_w` those after it and
    `S` its shortcut. The components are those of the embedding's output and of the stream after each attention and each MLP, in
    order, of what the model computes with everything before them already sliced. A sublayer that is gone keeps them.

    Gains become one. With tied embeddings the head must become a matrix of its own, because it takes in the gain of the final
    norm and another rotation: the model then stores `vocab * width` parameters twice, and a small model with a large vocabulary
    may have more parameters than before. `sliced_width` says which width makes the decoder smaller in truth.

    Args:
      params, cfg: the model; one that is sliced already can be sliced further.
      batches: int32[b, t] arrays of calibration tokens.
      width: components that stay, at most `cfg.d`, at which the model computes what it did before. Multiples of 8 are fast.
      progress: wraps the sequence of layers; called with it and a description.

    Returns:
      Params of width `width`, in the dtypes of `params`, and their configuration: `shortcuts`, and `norm_width`, the width that
      RMSNorm still divides by. Products are float32 at the highest precision, or float64 for float64 params; the
      released code sums second moments in float64.

    Raises:
      ValueError: `width` is out of range, the model has post norms, no batches, or statistics that are not finite.

    Reference: Ashkboos et al., `SliceGPT <https://arxiv.org/abs/2401.15024>`_, 2024, section 3, in the order and with the
    damping of the released code. That code also subtracts the mean of the embeddings, which changes what an RMSNorm
    model computes, and sets epsilon to 1e-5; neither is done here. It takes random components of the last layer's output and
    leaves the head unsliced; here the head reads the principal ones, at `width`, as everything does.

    >>> import jax
    >>> from jaxprune import models, recovery
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),) * 2)
    >>> params, tokens = models.init(jax.random.key(0), cfg), jax.random.randint(jax.random.key(1), (4, 16), 0, 64)
    >>> small, small_cfg = recovery.slice_gpt(params, cfg, [tokens], 24)
    >>> small["run_0"]["q"].shape, small["run_0"]["mlp_shortcut"].shape, small_cfg.norm_width
    ((2, 24, 2, 2, 8), (2, 24, 24), 32)
    """
    _check(cfg, batches, width)
    new_cfg = sliced_config(cfg, width)
    # The stream stays in the dense model's axes: slicing it there is the projection onto the components that stay.
    stream = [embedded(params, jnp.asarray(b), cfg) for b in batches]
    q = _components(stream, width, "the embedding")
    new: Params = dict(embed=_matmul(params["embed"], q))
    where = places(cfg.runs)
    sliced: dict[str, dict[str, list]] = {run.name: {} for run in cfg.runs}
    for layer in range(len(where)) if progress is None else progress(range(len(where)), "slicing"):
        run, i = where[layer]
        p = layer_of(params, run, i)
        out: dict[str, jax.Array] = {n: p[n] for n, letters in cfg.layer_arrays(run.dims).items() if "d" not in letters}
        for writes, norm, readers in SUBLAYERS:
            stream = [_after(p, writes, x, q, cfg) for x in stream]
            after = _components(stream, width, f"layer {layer}") if writes in p else q
            out |= _rotated(p, writes, norm, readers, q, after, params["embed"].dtype, cfg.norm_offset)
            q = after
        for n, x in out.items():
            sliced[run.name].setdefault(n, []).append(x)
    head = params["embed"].T if cfg.tie_embeddings else params["head"]
    new |= dict(norm=jnp.ones(width, params["norm"].dtype), head=_read(params["norm"], head, q, cfg.norm_offset))
    return new | {name: {n: jnp.stack(x) for n, x in arrays.items()} for name, arrays in sliced.items()}, new_cfg


def sliced_config(cfg: LlamaConfig, width: int) -> LlamaConfig:
    """The configuration that `slice_gpt` leads to; gains are one, so that nothing is added to them any more."""
    wide = cfg.norm_width or cfg.d
    return dataclasses.replace(cfg, d=width, shortcuts=True, norm_width=wide, norm_offset=False, tie_embeddings=False)


def sliced_width(cfg: LlamaConfig, ratio: float) -> int:
    """The width at which slicing takes the fraction `ratio` of the decoder's parameters away, shortcuts counted.

    Args:
      cfg: the model before slicing.
      ratio: of its decoder's parameters.

    Returns:
      The multiple of 8 whose parameters come nearest. But for the rounding it lies below `(1 - ratio) * cfg.d`, the width of
      the paper, which keeps more than `1 - ratio` of the parameters, or more than all of them, because of the shortcuts.

    Raises:
      ValueError: no width removes as much, or `ratio` is not above 0.

    >>> from jaxprune import models, recovery
    >>> llama = models.LlamaConfig(vocab=32000, d=4096, head_dim=128, layers=(models.LayerDims(32, 1, 11008),) * 32)
    >>> recovery.sliced_width(llama, 0.2)
    2928
    """

    def parameters(width: int) -> int:
        return dataclasses.replace(cfg, d=width, shortcuts=True).decoder_parameters

    dense = cfg.decoder_parameters
    most = 1 - parameters(MULTIPLE) / dense if dense and cfg.d >= MULTIPLE else 0.0
    if not 0 < ratio <= most:
        possible = f"more than 0 and at most {most:.4f}" if most > 0 else "none"
        raise ValueError(
            f"ratio: {ratio} given; possible for slicing this model (d = {cfg.d}) to a multiple of {MULTIPLE} is {possible}; "
            f"ask for a ratio in that range or prune other units"
        )
    return min(range(MULTIPLE, cfg.d + 1, MULTIPLE), key=lambda width: abs(parameters(width) - (1 - ratio) * dense))


def _check(cfg: LlamaConfig, batches: Sequence[Any], width: int) -> None:
    if not 1 <= width <= cfg.d:
        raise ValueError(f"width: {width} given; allowed is 1 to {cfg.d}, the width of the residual stream")
    if cfg.post_norms:
        raise ValueError(
            f"slicing: the model normalises what its sublayers add (family {cfg.family}), and no matrix can take the gains of "
            "these norms in, so its residual stream cannot be rotated; prune other units"
        )
    if not batches:
        raise ValueError("batches: none given; slicing needs at least one batch of calibration tokens")


def _precise(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@jax.jit
def _matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x w at the highest precision, in the dtype of `x`."""
    x32 = _precise(x)
    return jnp.matmul(x32, w.astype(x32.dtype), precision="highest").astype(x.dtype)


@functools.partial(jax.jit, static_argnames=("writes", "cfg"))
def _after(p: dict, writes: str, x: jax.Array, q: jax.Array, cfg: LlamaConfig) -> jax.Array:
    """The stream after a sublayer that reads `x` projected onto the components `q`."""
    x = _matmul(_matmul(x, q), q.T)
    return sublayer(p, writes, x, cfg)


@functools.partial(jax.jit, donate_argnums=0)
def _add_moment(total: jax.Array, x: jax.Array) -> jax.Array:
    rows = _precise(x).reshape(-1, x.shape[-1])
    return total + jnp.matmul(rows.T, rows, precision="highest")


def _components(stream: list[jax.Array], width: int, where: str) -> jax.Array:
    """The first `width` principal components of the tokens, as columns: float32, or float64 of a float64 stream."""
    d = stream[0].shape[-1]
    total = jnp.zeros((d, d), jnp.promote_types(stream[0].dtype, jnp.float32))
    for x in stream:
        total = _add_moment(total, x)
    moment = on_host(total).astype(np.float64)
    if not np.isfinite(moment).all():
        raise ValueError(
            f"slicing: the residual stream after {where} is not finite; check the weights and the calibration data"
        )
    vectors = np.linalg.eigh(damped(moment, DAMP))[1]
    return jnp.asarray(vectors[:, ::-1][:, :width], total.dtype)


@functools.partial(jax.jit, static_argnames="offset")
def _read(gain: jax.Array, w: jax.Array, q: jax.Array, offset: bool) -> jax.Array:
    """Q^T diag(gain) w, for a matrix that reads the stream, in the dtype of `w`; with `offset`, one is added to the gain."""
    gain = 1 + _precise(gain) if offset else _precise(gain)
    rows = _precise(w).reshape(len(q), -1)
    rows = jnp.matmul(q.T, gain[:, None] * rows, precision="highest")
    return rows.reshape(-1, *w.shape[1:]).astype(w.dtype)


@functools.partial(jax.jit, static_argnames=("writes", "norm", "readers", "dtype", "offset"))
def _rotated(
    p: dict, writes: str, norm: str, readers: tuple[str, ...], q: jax.Array, after: jax.Array, dtype: Any, offset: bool
) -> dict:
    """The arrays of one sublayer between the components `q` and `after`."""
    shortcut = axes.SHORTCUT_BESIDE[writes]
    turn = _matmul(_precise(p[shortcut]), after) if shortcut in p else after
    out = {shortcut: jnp.matmul(q.T, turn, precision="highest").astype(dtype)}
    if writes in p:
        out |= {norm: jnp.ones(q.shape[1], p[norm].dtype), writes: _matmul(p[writes], after)}
        out |= {n: _read(p[norm], p[n], q, offset) for n in readers}
    if f"{writes}_bias" in p:
        out[f"{writes}_bias"] = _matmul(p[f"{writes}_bias"], after)
    return out
