"""The model as a Flax Linen module: the parameters are declared from the axes table, the mathematics is `apply`."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxprune.models import axes
from jaxprune.models.config import LlamaConfig
from jaxprune.models.forward import apply
from jaxprune.models.params import shapes
from jaxprune.models.types import Probes


def _initializer(name: str, cfg: LlamaConfig) -> Any:
    if name.endswith("norm"):
        return nn.initializers.zeros if cfg.norm_offset else nn.initializers.ones
    if name in axes.SHORTCUTS:
        return lambda key, shape, dtype: jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype), shape)
    return nn.initializers.zeros if name.endswith("_bias") else nn.initializers.normal(0.02)


class _Run(nn.Module):
    """Declares the stacked arrays of one run, as (name, shape) pairs."""

    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    cfg: LlamaConfig
    dtype: Any

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        return {name: self.param(name, _initializer(name, self.cfg), shape, self.dtype) for name, shape in self.arrays}


class Llama(nn.Module):
    """A LLaMA whose variables are `{"params": params}`, with `params` the tree that `init`, `load` and `cut` return.

    Parameters of other shapes than `cfg` says, as after a cut with the old configuration, raise
    `flax.errors.ScopeParamShapeError`, which names the parameter.

    Attributes:
      cfg: the model.
      dtype: of the parameters that `init` makes.

    >>> import jax
    >>> from jaxprune import models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),) * 3)
    >>> variables = models.Llama(cfg).init(jax.random.key(0), jax.numpy.zeros((1, 5), int))
    >>> variables["params"]["run_0"]["q"].shape
    (3, 32, 2, 2, 8)
    """

    cfg: LlamaConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "b t"], probes: Probes | None = None, **options: Any) -> Float[Array, "b t v"]:
        """Logits, as `jaxprune.models.apply`."""
        params = {}
        for name, leaf in shapes(self.cfg).items():
            if isinstance(leaf, dict):
                params[name] = _Run(tuple((n, x.shape) for n, x in leaf.items()), self.cfg, self.dtype, name=name)()
            else:
                params[name] = self.param(name, _initializer(name, self.cfg), leaf.shape, self.dtype)
        return apply(params, tokens, self.cfg, probes, **options)
