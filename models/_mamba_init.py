"""Where the training of a Mamba begins."""

import math

import jax
import numpy as np

from jaxprune.models.mamba_config import MambaConfig

STEPS = (1e-3, 1e-1)  # time steps at the start


def initial(name: str, normal: np.ndarray, cfg: MambaConfig) -> np.ndarray | None:
    """The array `name` of a new model, or None for one that starts as those of every model do.

    States decay at rates 1 to n, time steps are log-uniform between 0.001 and 0.1, D is one, and the convolution and `dt_proj`
    are uniform within the inverse root of what they sum over.

    Args:
      name: of the array.
      normal: independent standard normal numbers in its shape.
      cfg: the model.

    Reference: Gu and Dao, `Mamba <https://arxiv.org/abs/2312.00752>`_, 2023, section 3.6, as transformers has it.
    """
    if name == "A_log":
        return np.broadcast_to(np.log(np.arange(1, cfg.state + 1)), normal.shape)
    if name == "D":
        return np.ones(normal.shape)
    if name not in ("dt_proj_bias", "conv1d", "dt_proj"):
        return None
    uniform = np.asarray(jax.scipy.special.ndtr(normal), np.float64)
    if name == "dt_proj_bias":
        low, high = np.log(STEPS)
        step = np.exp(low + uniform * (high - low))
        return step + np.log(-np.expm1(-step))  # what softplus maps to the step
    return (2 * uniform - 1) / math.sqrt(cfg.conv if name == "conv1d" else cfg.dt_rank)
