"""What recovery minimises: next-token cross-entropy of a frozen model with adapters, over the tokens that count."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune import models
from jaxprune.recovery import lora

AdapterLoss: TypeAlias = Callable[[Any, models.Params, Any], tuple[Float[Array, ""], Float[Array, ""]]]
"""(adapter, params, batch) -> the weighted mean loss of the batch and the sum of its weights, both float32."""


def lm_loss(
    cfg: models.LlamaConfig, *, alpha: float | int, sparse: bool = False, remat: bool = True, chunk: int = 256
) -> AdapterLoss:
    """The weighted mean of next-token cross-entropies in nats: sum_i w_i nll_i / sum_i w_i, over the batch.

    A batch is `{"tokens": int32[b, t], "weights": float32[b, t]}`; weights[:, i] is what predicting tokens[:, i] counts, so the
    first column is not used. Zero leaves a token out of the loss and of the gradient (the prompt, in instruction data;
    padding), though later tokens still attend to it: pad on the right, where nothing looks back.

    Args:
      cfg: the model.
      alpha, sparse: scale of the adapters, and whether zeros of the model stay zeros, as in `lora.overlay`.
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
    if not alpha > 0:
        raise ValueError(f"alpha: {alpha} given; it must be positive (LLM-Pruner uses 16)")

    def loss(adapter: lora.Adapter, params: models.Params, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        tokens, weights = batch["tokens"], batch["weights"][:, 1:].astype(jnp.float32)
        full = lora.overlay(params, adapter, alpha=alpha, sparse=sparse)
        x = models.hidden(full, tokens[:, :-1], cfg, remat=remat)
        total = jnp.sum(weights * models.token_losses(full, x, tokens[:, 1:], cfg, chunk))
        return total / jnp.maximum(weights.sum(), jnp.finfo(jnp.float32).tiny), weights.sum()

    return loss
