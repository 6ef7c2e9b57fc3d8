"""The score that Search for Efficient LLMs starts from: the error of removing weights one at a time."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.models import LlamaConfig, Params, PerLayer, axes, observe
from jaxprune.models.axes import OUTPUT
from jaxprune.recovery._solve import damped, inverse
from jaxprune.scorers import Scorer
from jaxprune.scorers._sites import grams, tokens_axes


class State(NamedTuple):
    """Sums over tokens, and the weights.

    Attributes:
      reads: x x^T of what each sublayer reads, per layer and axis letter, float32[d, d].
      inputs: the same of what its output projection reads.
      params: the model.
    """

    reads: PerLayer
    inputs: PerLayer
    params: Params


def obs_importance(cfg: LlamaConfig, params: Params, *, damp: float = 1e-2, pairs: bool = False) -> Scorer:
    r"""Sum over the weights of a unit of the error that the Optimal Brain Surgeon gives for removing each alone.

    .. math:: \sum_{ij} \frac{W_{ij}^2}{[(2 X X^\top)^{-1}]_{jj}}

    over the rows of q, k, v, gate and up that write a unit and the columns of o and down that read it; X are the inputs of each
    matrix.

    Args:
      cfg: the model.
      params: its weights, whose shapes the state has; `update` reads those that it is given.
      damp: added to the diagonal of X X^T, in means of it.
      pairs: units of the attention are rotary pairs, dimensions i and i + head_dim / 2 of all heads of a layer (axis letter
        `h`), instead of KV groups.

    Returns:
      An additive scorer.

    Reference: Shen et al., `Search for Efficient Large Language Models <https://arxiv.org/abs/2409.17372>`_, 2024, equations 1
    to 3. The damping is ours (the paper states none), and the units are MLP channels and KV groups or, as in the paper, head
    dimensions, here in rotary pairs.

    >>> import jax
    >>> from jaxprune import models, scorers
    >>> from jaxprune.search import importance
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> params, tokens = models.init(jax.random.key(0), cfg), jax.numpy.arange(12).reshape(2, 6)
    >>> s = scorers.score(importance.obs_importance(cfg, params), params, models.probes(cfg), [tokens])
    >>> s[0]["k"].shape, s[0]["f"].shape
    ((2,), (48,))
    """

    def collect(sites: Any) -> tuple[dict, dict]:
        rows = {a: tokens_axes(s.read) for a, s in sites.items()}
        return {a: jnp.matmul(x.T, x, precision="highest") for a, x in rows.items()}, grams(sites)

    def init(probes: Any) -> State:
        reads = tuple({a: jnp.zeros((cfg.d, cfg.d), jnp.float32) for a in layer} for layer in probes["inputs"])
        inputs = tuple({a: jnp.zeros((x.size, x.size), jnp.float32) for a, x in layer.items()} for layer in probes["inputs"])
        return State(reads, inputs, {name: params[name] for name in (run.name for run in cfg.runs) if name in params})

    def update(state: State, params: Params, probes: Any, tokens: jax.Array) -> State:
        del probes
        seen = observe(params, tokens, collect, cfg)
        add = (tuple(x[i] for x in seen) for i in (0, 1))
        reads, inputs = (jax.tree.map(jnp.add, old, new) for old, new in zip(state[:2], add, strict=True))
        return State(reads, inputs, {name: params[name] for name in state.params})

    def finalize(state: State) -> PerLayer:
        out: list[dict] = []
        for run in cfg.runs:
            for j in range(run.length):
                i = run.start + j
                weights = {n: np.asarray(x[j], np.float64) for n, x in state.params.get(run.name, {}).items()}
                errors = {}
                for a in state.reads[i]:
                    unit = "h" if a == "k" and pairs else a
                    errors[unit] = _errors(a, unit, weights, state.reads[i][a], state.inputs[i][a], damp)
                out.append({unit: jnp.asarray(x, jnp.float32) for unit, x in errors.items()})
        return tuple(out)

    return Scorer(init, update, finalize, needs="activations")


def _errors(axis: str, unit: str, weights: dict[str, np.ndarray], reads: Any, inputs: Any, damp: float) -> np.ndarray:
    """Float64[units] of one sublayer."""
    read, out = (np.diag(inverse(2 * damped(np.asarray(g, np.float64), damp))) for g in (reads, inputs))
    names = ("q", "k", "v") if axis == "k" else ("gate", "up")

    def over(name: str, error: np.ndarray) -> np.ndarray:
        at = axes.LAYER[name].index(unit)
        return error.sum(tuple(i for i in range(error.ndim) if i != at))

    w = weights[OUTPUT[axis]]
    total = over(OUTPUT[axis], w**2 / out.reshape(*w.shape[:-1], 1))
    for name in names:
        w = weights[name]  # [d, units, ...]
        total = total + over(name, w**2 / read.reshape(-1, *[1] * (w.ndim - 1)))
    return total.reshape(2, -1).sum(0) if unit == "h" else total
