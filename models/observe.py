"""What flows through a model: a forward pass that hands every layer's activations to a function and keeps what it returns."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxprune.models import _rope, axes
from jaxprune.models._how import rematerialised
from jaxprune.models._kinds import told
from jaxprune.models._mesh import by_sequence
from jaxprune.models._through import over_layers
from jaxprune.models.config import LlamaConfig
from jaxprune.models.llama import attention, embedded, mlp, project, stream_norm
from jaxprune.models.types import Axis, Params


class Site(NamedTuple):
    """A sublayer while tokens go through it.

    Attributes:
      w: its output projection, [units..., d]: `[k, g, h, d]` of the attention, `[f, d]` of the MLP.
      z: what the projection reads, [b, t, units...].
      read: the normed residual stream that the sublayer reads, [b, t, d].
      before, after: the residual stream around the sublayer, [b, t, d], without the final norm.
    """

    w: jax.Array
    z: jax.Array
    read: jax.Array
    before: jax.Array
    after: jax.Array


def reads(p: dict, name: str, x: jax.Array, cfg: LlamaConfig) -> jax.Array:
    """What an output projection of one layer reads: [b, t, k, g, h] of the attention, [b, t, f] of the MLP.

    Args:
      p: arrays of the layer, by name, as `block` reads them.
      name: `o` or `down`.
      x: residual stream before the sublayer, [b, t, d].
      cfg: the model.
    """
    if name == "down":
        return mlp(p, x, cfg, {})
    return attention(p, x, cfg, _rope.tables(cfg, jnp.arange(x.shape[1]), x.shape[1]), {})[0]


def sublayer(p: dict, name: str, x: jax.Array, cfg: LlamaConfig) -> jax.Array:
    """The residual stream after one sublayer, [b, t, d]; one that is gone leaves its bias and its shortcut.

    Args:
      p, name, x, cfg: as in `reads`.
    """
    return project(p, name, x, reads(p, name, x, cfg) if name in p else None, cfg, {})


Reduce = Callable[[dict[Axis, Site]], Any]


def observe(
    params: Params, tokens: Int[Array, "b t"], reduce: Reduce, cfg: LlamaConfig, layers: range | None = None
) -> tuple[Any, ...]:
    """Runs the model and reduces each layer's activations where they arise; what `reduce` does not read is not computed.

    Args:
      params: the model's weights.
      tokens: token ids.
      reduce: the sites of one layer by axis letter (`k` attention, `f` MLP; absent where the sublayer is gone) -> any tree.
      cfg: what `params` was made with.
      layers: consecutive layers to look at, or None for all; the model runs up to the last of them.

    Returns:
      What `reduce` returned, layer by layer.

    >>> import jax
    >>> from jaxprune import models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),) * 3)
    >>> params = models.init(jax.random.key(0), cfg)
    >>> seen = models.observe(params, jax.numpy.zeros((1, 5), int), lambda sites: (sites["f"].z ** 2).sum((0, 1)), cfg)
    >>> len(seen), seen[0].shape
    (3, (48,))
    """
    layers = range(len(cfg.layers)) if layers is None else layers
    x = embedded(params, tokens, cfg)
    out: list[Any] = []
    for run in cfg.runs:
        # of this run: the layers before those that are looked at, and these
        first, last = (min(max(at - run.start, 0), run.length) for at in (layers.start, layers.stop))
        if run.start >= layers.stop:
            break
        if not (arrays := told(params.get(run.name, {}), run)):
            out += [reduce({})] * (last - first)
            continue

        def layer(reduce, x, z):
            (p, _), (x, sites) = z, (by_sequence(x), {})
            for axis, name in axes.OUTPUT.items():
                z, before = None, x
                if name in p:
                    z = reads(p, name, x, cfg)
                x = project(p, name, x, z, cfg, {})
                if z is not None:
                    norm = p["attn_norm" if axis == "k" else "mlp_norm"]
                    sites[axis] = Site(p[name], z, stream_norm(before, norm, cfg), before, x)
            return x, reduce(sites)

        if first:
            x, _ = over_layers(functools.partial(layer, lambda sites: None), x, arrays, {}, 0, first)
        if last > first:
            x, stacked = over_layers(functools.partial(layer, reduce), x, arrays, {}, first, last)
            out += [jax.tree.map(lambda s, i=i: s[i], stacked) for i in range(last - first)]
    return tuple(out)


def residuals(
    params: Params, tokens: Int[Array, "b t"], cfg: LlamaConfig, *, remat: bool = False
) -> Float[Array, "states b t d"]:
    """The residual stream before the first layer and after each of them, without the final norm; one state more than layers.

    Args:
      params: the model's weights; they may have adapters beside them.
      tokens: token ids.
      cfg: what `params` was made with.
      remat: recompute each layer in the backward pass.

    >>> import jax
    >>> from jaxprune import models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),) * 3)
    >>> params, tokens = models.init(jax.random.key(0), cfg), jax.numpy.zeros((1, 5), int)
    >>> states = models.residuals(params, tokens, cfg)
    >>> last = models.rms_norm(states[-1], params["norm"], cfg.norm_eps)
    >>> states.shape, bool((last == models.hidden(params, tokens, cfg)).all())
    ((4, 1, 5, 32), True)
    """
    x = embedded(params, tokens, cfg)
    out = [x[None]]

    def layer(x, p):
        for name in axes.OUTPUT.values():
            x = sublayer(p, name, x, cfg)
        return x, x

    for run in cfg.runs:
        if arrays := told(params.get(run.name, {}), run):
            x, states = jax.lax.scan(rematerialised(layer) if remat else layer, x, arrays)
        else:
            states = jnp.broadcast_to(x, (run.length, *x.shape))
        out.append(states)
    return jnp.concatenate(out)
