r"""Optimal Brain Surgeon for whole units of a layer, greedily, with inverse updates.

The error of removing a set `S` of inputs of a projection, the others re-fitted, is
:math:`\operatorname{tr}(F\, W_S^\top (H^{-1}_{SS})^{-1} W_S)` with :math:`H = G + \delta I` and `F` the metric of output
errors: the identity, or the second moment of the loss gradient at the output, which makes it the Kronecker-factored loss
change.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.recovery._solve import damped, inverse


def greedy(
    w: np.ndarray, gram: np.ndarray, metric: np.ndarray | None = None, *, size: int = 1, step: int = 16, damp: float = 1e-2
):
    """Removes units one block after another, the cheapest first, and says what removing each has cost by then.

    Args:
      w: [units * size, out], the inputs of a unit next to each other.
      gram: sum of x x^T over calibration tokens, [units * size, units * size].
      metric: symmetric positive semi-definite [out, out], or None for the identity.
      size: inputs of a unit: 1 for a channel, query heads times head_dim for a KV group.
      step: units removed between two updates of the inverse.
      damp: in means of the diagonal of `gram`.

    Returns:
      float64[units], the total error once this unit and all before it are gone: it grows in the order of removal, so the
      units with the largest numbers are the ones to keep, and the sorted numbers are the error of each width.

    Raises:
      ValueError: a statistic that is not finite.

    Reference: Kurtic et al., `ZipLM <https://arxiv.org/abs/2302.04089>`_, 2023, equations 3 and 4 and algorithm 1, with blocks
    of units between updates; the metric is of van der Ouderaa et al., `The LLM Surgeon <https://arxiv.org/abs/2312.17244>`_,
    2024, section 3 (Kronecker-factored Fisher).

    >>> import numpy as np
    >>> from jaxprune import recovery
    >>> recovery.greedy(np.array([[3.0], [1.0], [2.0]]), np.eye(3), step=1, damp=0.0).round(6).tolist()
    [14.0, 1.0, 5.0]
    """
    w = np.asarray(w, np.float64)
    units = len(w) // size
    if metric is not None:
        values, vectors = np.linalg.eigh(np.asarray(metric, np.float64))
        w = w @ (vectors * np.sqrt(np.maximum(values, 0)))
    h = inverse(damped(gram, damp))
    scale_h, scale_w = float(np.mean(np.diag(h))) or 1.0, float(np.sqrt(np.mean(w * w))) or 1.0
    steps = -(-units // step)
    order, errors = _greedy(jnp.float32(w / scale_w), jnp.float32(h / scale_h), size, min(step, units), steps)
    order, errors = np.asarray(order).reshape(-1), np.asarray(errors, np.float64).reshape(-1)
    real = order < units
    out = np.zeros(units)
    out[order[real]] = np.cumsum(np.maximum(errors[real], 0)) * (scale_w**2 / scale_h)
    return out


@functools.partial(jax.jit, static_argnames=("size", "step", "steps"))
def _greedy(w, h, size, step, steps):
    units = len(w) // size
    eye = jnp.eye(size * step, dtype=w.dtype)

    def one(state, _):
        w, h, alive = state
        blocks = h.reshape(units, size, units, size)
        own = blocks[jnp.arange(units), :, jnp.arange(units)] if size > 1 else jnp.diagonal(h)[:, None, None]
        own = jnp.where(alive[:, None, None], own, jnp.eye(size, dtype=w.dtype))
        rows = w.reshape(units, size, -1)
        if size == 1:
            single = jnp.sum(rows * rows, (1, 2)) / own[:, 0, 0]
        else:
            single = jnp.sum(rows * jnp.linalg.solve(own, rows), (1, 2))
        cost, chosen = jax.lax.top_k(-jnp.where(alive, single, jnp.inf), step)
        gone = jnp.isfinite(cost)  # fewer than `step` may be left
        index = (chosen[:, None] * size + jnp.arange(size)).reshape(-1)
        taken = jnp.repeat(gone, size)
        hs = jnp.where(taken[None], h[:, index], 0)  # n, s
        hss = jnp.where(taken[:, None], hs[index], 0) + jnp.diag(jnp.where(taken, 0.0, 1.0))
        ws = jnp.where(taken[:, None], w[index], 0)
        factor = jnp.linalg.cholesky(hss + 1e-7 * jnp.trace(hss) / len(hss) * eye)
        fit = jax.scipy.linalg.cho_solve((factor, True), jnp.concatenate([ws, hs.T], 1))
        total = jnp.sum(ws * fit[:, : w.shape[1]])
        w, h = w - hs @ fit[:, : w.shape[1]], h - hs @ fit[:, w.shape[1] :]
        share = jnp.where(gone, -cost, 0)
        share = share / jnp.maximum(jnp.sum(share), 1e-30) * total
        alive = alive.at[chosen].set(jnp.where(gone, False, alive[chosen]))
        return (w, h, alive), (jnp.where(gone, chosen, units), share)

    _, (order, errors) = jax.lax.scan(one, (w, h, jnp.ones(units, bool)), None, length=steps)
    return order, errors
