"""The forward pass of every model: `hidden` and `apply` for the configurations that there are."""

from typing import Any

from jaxtyping import Array, Float, Int

from jaxprune.models import llama, mamba
from jaxprune.models.mamba_config import MambaConfig
from jaxprune.models.types import Config, Params, Probes


def hidden(
    params: Params,
    tokens: Int[Array, "b t"],
    cfg: Config,
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
      remat: keep only the residual stream between layers for the backward pass and recompute the rest, see `computing`.
      microbatch: sequences that go through a layer at a time; it divides b. None is all of them. Changes memory, not results.
      axis_name: a mapped axis (`pmap`, `shard_map`) over which taps sum weight gradients before they reduce them.
    """
    options: dict[str, Any] = dict(remat=remat, microbatch=microbatch, axis_name=axis_name)
    if isinstance(cfg, MambaConfig):
        return mamba.hidden(params, tokens, cfg, probes, **options)
    return llama.hidden(params, tokens, cfg, probes, **options)


def apply(
    params: Params, tokens: Int[Array, "b t"], cfg: Config, probes: Probes | None = None, **options: Any
) -> Float[Array, "b t v"]:
    """Logits of every position, float32; options as in `hidden`.

    >>> import jax
    >>> from jaxprune import models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),) * 3)
    >>> params = models.init(jax.random.key(0), cfg)
    >>> models.apply(params, jax.numpy.zeros((1, 5), int), cfg).shape
    (1, 5, 64)
    """
    return llama.head(params, hidden(params, tokens, cfg, probes, **options), cfg)
