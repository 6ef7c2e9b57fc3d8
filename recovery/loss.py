"""What recovery minimises: next-token cross-entropy over the tokens that count, by adapters or by all weights."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune import models
from jaxprune.models import axes
from jaxprune.recovery import lora

AdapterLoss: TypeAlias = Callable[[Any, models.Params, Any], tuple[Float[Array, ""], Float[Array, ""]]]
"""(adapter, params, batch) -> the weighted mean loss of the batch and the sum of its weights, both float32."""


def assemble(params: models.Params, adapter: Any, alpha: float | int | None, sparse: bool = False) -> models.Params:
    """The weights that the model runs with: `lora.overlay`, or the adapter itself, which then is a whole tree of weights.

    Args:
      params: the frozen model.
      adapter: from `lora.init`; or a tree like `params`, in the float32 that small updates need, if `alpha` is None.
      alpha: as in `lora.overlay`, or None.
      sparse: zeros in the matrices of `params` stay zeros.

    Returns:
      A tree for `models.hidden`, in the dtypes of `params`.

    >>> import jax
    >>> params = dict(embed=jax.numpy.ones((4, 2), "bfloat16"))
    >>> assemble(params, dict(embed=jax.numpy.zeros((4, 2))), None)["embed"].dtype.name
    'bfloat16'
    """
    if alpha is None:
        return jax.tree_util.tree_map_with_path(functools.partial(_in_place_of, sparse), adapter, params)
    return lora.overlay(params, adapter, alpha=alpha, sparse=sparse)


def _in_place_of(sparse: bool, path: Any, x: jax.Array, w: jax.Array) -> jax.Array:
    x = x.astype(w.dtype)
    return jnp.where(w != 0, x, 0) if sparse and path[-1].key in (*axes.MATRICES, *axes.MAMBA_MATRICES) else x


def weighted_mean(losses: Float[Array, "b t"], weights: Float[Array, "b t"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """What an `AdapterLoss` returns: sum_i w_i loss_i / sum_i w_i, zero where all weights are, and sum_i w_i."""
    weights = weights.astype(jnp.float32)
    return jnp.sum(weights * losses) / jnp.maximum(weights.sum(), jnp.finfo(jnp.float32).tiny), weights.sum()


def lm_loss(
    cfg: models.Config, *, alpha: float | int | None, sparse: bool = False, remat: bool = True, chunk: int = 256
) -> AdapterLoss:
    """The weighted mean of next-token cross-entropies in nats: sum_i w_i nll_i / sum_i w_i, over the batch.

    A batch is `{"tokens": int32[b, t], "weights": float32[b, t]}`; weights[:, i] is what predicting tokens[:, i] counts, so the
    first column is not used. Zero leaves a token out of the loss and of the gradient (the prompt, in instruction data;
    padding), though later tokens still attend to it: pad on the right, where nothing looks back.

    Args:
      cfg: the model.
      alpha: scale of the adapters, as in `lora.overlay`; None trains all weights, see `assemble`.
      sparse: zeros of the model stay zeros.
      remat: recompute each layer in the backward pass.
      chunk: tokens whose logits are in memory at a time.

    Raises:
      ValueError: alpha is not positive.

    >>> import jax
    >>> from jaxprune import models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> params = jax.tree.map(jax.numpy.zeros_like, models.init(jax.random.key(0), cfg))
    >>> batch = dict(tokens=jax.numpy.zeros((2, 5), int), weights=jax.numpy.ones((2, 5)).at[0, :3].set(0))
    >>> mean, weight = lm_loss(cfg, alpha=16)(lora.init(jax.random.key(1), params, cfg), params, batch)
    >>> bool(abs(mean - jax.numpy.log(64)) < 1e-5), float(weight)
    (True, 6.0)
    """
    if alpha is not None and not alpha > 0:
        raise ValueError(f"alpha: {alpha} given; it must be positive (LLM-Pruner uses 16)")

    def loss(adapter: Any, params: models.Params, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        tokens = batch["tokens"]
        full = assemble(params, adapter, alpha, sparse)
        x = models.hidden(full, tokens[:, :-1], cfg, remat=remat)
        return weighted_mean(models.token_losses(full, x, tokens[:, 1:], cfg, chunk), batch["weights"][:, 1:])

    return loss
