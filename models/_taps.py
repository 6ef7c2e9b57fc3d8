r"""Taps: an identity on a weight whose cotangent is reduced to a few numbers on the spot.

`outer` wraps the weights of one layer where all sequences meet, so its backward pass sees the gradient summed over the
calibration set; `inner` wraps them inside the loop over sequences, so its backward pass sees the gradient of one sequence and
passes it on together with its square. Nothing differentiates with respect to the weights themselves, so no weight gradient
outlives its layer.
"""

import functools

import jax
import jax.numpy as jnp

from jaxprune.models import axes
from jaxprune.models.types import TAP_KINDS

NEED_SQUARES = frozenset({"square", "mix", "energy"})


def reduce_onto(x: jax.Array, letters: str, keep: str) -> jax.Array:
    """Sums `x`, whose axes are `letters`, over the axes that are not in `keep`."""
    return jnp.sum(x, [i for i, a in enumerate(letters) if a not in keep], dtype=jnp.float32)


def salience(kind: str, w: jax.Array, g: jax.Array, g2: jax.Array | None) -> jax.Array:
    """The element-wise statistic of a tap, from a weight, its summed gradient and its summed squared gradients."""
    w, g, g2 = w.astype(jnp.float32), g.astype(jnp.float32), jnp.float32(0) if g2 is None else g2
    match kind:
        case "abs":
            return jnp.abs(w * g)
        case "sum":
            return w * g
        case "square":
            return w * w * g2
        case "mix":
            return jnp.abs(w * g - 0.5 * w * w * g2)
        case "energy":
            return g2
        case "energy_of_sum":
            return g * g
    raise ValueError(f"tap kind {kind!r} given; allowed are {TAP_KINDS}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tap(letters, axis_name, w, squares, probes):
    del letters, axis_name, probes
    return w, squares


def _tap_forward(letters, axis_name, w, squares, probes):
    del letters, axis_name
    return (w, squares), (w, probes)


def _tap_backward(letters, axis_name, residuals, cotangents):
    w, probes = residuals
    g, g2 = cotangents
    if axis_name is not None:
        g, g2 = jax.lax.psum((g, g2), axis_name)
    reduced = {
        kind: {unit: reduce_onto(salience(kind, w, g, g2), letters, axes.UNITS[unit]) for unit in units}
        for kind, units in probes.items()
    }
    return jnp.zeros_like(w), jax.tree.map(jnp.zeros_like, g2), reduced


_tap.defvjp(_tap_forward, _tap_backward)


@jax.custom_vjp
def _split(w, squares):
    del squares
    return w


_split.defvjp(lambda w, squares: (w, None), lambda _, g: (g, jnp.square(g.astype(jnp.float32))))


@jax.custom_vjp
def second_moment(x: jax.Array, probe: jax.Array) -> jax.Array:
    """`x`, [b, t, d]; the cotangent of `probe` is the sum over tokens of g g^T, g the cotangent of a token of `x`."""
    del probe
    return x


def _second_moment_backward(_, g):
    rows = g.reshape(-1, g.shape[-1]).astype(jnp.float32)
    return g, jnp.matmul(rows.T, rows, precision="highest")


second_moment.defvjp(lambda x, probe: (x, None), _second_moment_backward)


def outer(p: dict, taps: dict, axis_name: str | None) -> tuple[dict, dict]:
    """Taps every weight of a layer that a probe names.

    Args:
      p: arrays of one layer.
      taps: kind -> unit -> tensor -> float32 zeros.
      axis_name: mapped axis to sum gradients over before they are reduced, or None.

    Returns:
      The same arrays, and float32 zeros of the weights' shapes for `inner` (empty unless a kind needs squares).
    """
    p, squares = dict(p), {}
    for name in (*axes.MATRICES, *axes.MAMBA_MATRICES):
        probes = {
            kind: {unit: tensors[name] for unit, tensors in units.items() if name in tensors} for kind, units in taps.items()
        }
        probes = {kind: units for kind, units in probes.items() if units}
        if name not in p or not probes:
            continue
        zeros = jnp.zeros(p[name].shape, jnp.float32) if NEED_SQUARES & probes.keys() else None
        p[name], zeros = _tap(axes.LAYER[name], axis_name, p[name], zeros, probes)
        if zeros is not None:
            squares[name] = zeros
    return p, squares


def inner(p: dict, squares: dict) -> dict:
    """Splits each weight's cotangent, inside the loop over sequences, into the gradient and its square."""
    return p | {name: _split(p[name], z) for name, z in squares.items()}
