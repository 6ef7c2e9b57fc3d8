"""Calibration text that the model writes itself, for when there is no data."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PRNGKeyArray

from jaxprune.models import Config, Params, decode


def self_blocks(
    params: Params,
    cfg: Config,
    *,
    samples: int,
    length: int,
    key: PRNGKeyArray,
    bos_id: int | None = None,
    batch_size: int = 8,
) -> Int[np.ndarray, "samples length"]:
    """Samples sequences from the model at temperature 1, each from its first token on, past any end-of-text token.

    Args:
      params: the model.
      cfg: what `params` was made with.
      samples: sequences.
      length: tokens in a sequence, the first one included.
      key: of the sampling.
      bos_id: the first token; None is `cfg.bos_id`.
      batch_size: sequences that are sampled at a time: the size of the key/value cache. It changes which ones are drawn.

    Raises:
      ValueError: neither `bos_id` nor `cfg.bos_id` names a token to begin with.

    Reference:
      Williams, Chrysostomou & Aletras, `Self-calibration for language model quantization and pruning
      <https://arxiv.org/abs/2410.17170>`_, 2025, section 3, with a constant temperature of 1.
    """
    bos_id = cfg.bos_id if bos_id is None else bos_id
    if bos_id is None:
        raise ValueError("self: the model names no beginning-of-text token; give bos_id, a token that sequences begin with")
    batch_size = min(batch_size, samples)
    prompt = jnp.full((batch_size, 1), bos_id, jnp.int32)
    written = [
        decode.generate(params, cfg, prompt, max_new_tokens=length - 1, temperature=1.0, key=k, eos_ids=())
        for k in jax.random.split(key, -(-samples // batch_size))
    ]
    return np.pad(np.concatenate(written)[:samples], ((0, 0), (1, 0)), constant_values=bos_id)
