"""Scores of a unit, a sublayer or a layer by what it changes in the residual stream, from one forward pass."""

import jax
import jax.numpy as jnp

from jaxprune.scorers._base import Scorer
from jaxprune.scorers._sites import Observe, from_sites, tokens_axes

NORMS = ("sum", "square", "l1")


def llm_bip(observe: Observe, norm: str = "sum", axis_name: str | None = None) -> Scorer:
    r"""The change of the block's output that a unit makes, :math:`\sum_t |W_u x_{tu}|_2`.

    For an MLP channel it is the change of the output of the block itself, :math:`|x_{tc}| \, |W_c|_2`. For a KV group it is the
    change of the attention's output; by Lipschitz continuity of the MLP, with constant L, the block's output changes by at most
    1 + L times as much, a factor that all groups of a layer share. Rank within layers: raw scores of layers do not compare.

    Args:
      observe: (params, tokens, reduce) -> per layer, as `jaxprune.models.observe` with its configuration bound.
      norm: `sum` of the norms over tokens; root of the sum of `square` norms; sum over tokens and outputs of the magnitudes of
        weights times those of inputs, `l1`, in the manner of NISP.
      axis_name: mapped axis that the sequences are spread over, or None.

    Returns:
      An additive scorer.

    Raises:
      ValueError: unknown norm.

    Reference: Wu, `LLM-BIP <https://arxiv.org/abs/2412.06419>`_, 2024. A reconstruction from the abstract and summaries: no
    code and no full text were at hand; the units and the contribution to the block's output are as described, the norm is a
    guess.

    >>> import functools, jax
    >>> from jaxprune import models, scorers
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> scorer = scorers.llm_bip(functools.partial(models.observe, cfg=cfg))
    >>> params, tokens = models.init(jax.random.key(0), cfg), jax.numpy.arange(12).reshape(2, 6)
    >>> scorers.score(scorer, params, models.probes(cfg), [tokens])[0]["k"].shape
    (2,)
    """
    if norm not in NORMS:
        raise ValueError(f"norm: {norm!r} given; allowed are {', '.join(NORMS)}")

    def contribution(site):
        z, w = tokens_axes(site.z), site.w.astype(jnp.float32)
        z, w = z.reshape(*z.shape[:2], -1), w.reshape(w.shape[0], -1, w.shape[-1])  # n u i, u i d
        if norm == "l1":
            return jnp.sum(jnp.abs(z).sum(0) * jnp.abs(w).sum(-1), -1)
        if w.shape[1] == 1:
            squares = z[..., 0] ** 2 * jnp.sum(w * w, (1, 2))
        else:
            squares = jnp.einsum("nui,uij,nuj->nu", z, jnp.einsum("uid,ujd->uij", w, w), z)
        squares = jnp.maximum(squares, 0)
        return jnp.sum(jnp.sqrt(squares) if norm == "sum" else squares, 0)

    def collect(sites):
        return {a: contribution(s) for a, s in sites.items()}

    def finish(sums, weights, count):
        del weights, count
        return jax.tree.map(jnp.sqrt, sums) if norm == "square" else sums

    return from_sites(observe, collect, lambda a, w: (), finish, axis_name)


def block_influence(observe: Observe, sublayers: bool = False, axis_name: str | None = None) -> Scorer:
    r"""How much a layer turns the residual stream, :math:`1 - \frac1n \sum_t \cos(h_t, h'_t)`, h before and h' after it.

    Args:
      observe: (params, tokens, reduce) -> per layer, as `jaxprune.models.observe` with its configuration bound.
      sublayers: score the attention and the MLP of each layer by themselves.
      axis_name: mapped axis that the sequences are spread over, or None.

    Returns:
      An additive scorer. Its scores are float32[1] on axis `l` of each layer, or with `sublayers` on `k` and `f`: the one score
      of the sublayer at each of its units.

    Reference: Men et al., `ShortGPT <https://arxiv.org/abs/2403.03853>`_, 2024, equation 1, on the residual stream before the
    final norm; for sublayers He et al., `What Matters in Transformers? <https://arxiv.org/abs/2406.15786>`_, 2024, section 3.

    >>> import functools, jax
    >>> from jaxprune import models, scorers
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> scorer = scorers.block_influence(functools.partial(models.observe, cfg=cfg))
    >>> params, tokens = models.init(jax.random.key(0), cfg), jax.numpy.arange(12).reshape(2, 6)
    >>> scorers.score(scorer, params, models.probes(cfg), [tokens])[0]["l"].shape
    (1,)
    """

    def turned(before, after):
        a, b = tokens_axes(before), tokens_axes(after)
        norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
        return jnp.sum(1 - jnp.sum(a * b, -1) / jnp.maximum(norms, 1e-30))

    def collect(sites):
        if sublayers:
            return {a: turned(s.before, s.after) * jnp.ones(s.w.shape[0]) for a, s in sites.items()}
        if not sites:
            return {"l": jnp.zeros(1)}
        ends = list(sites.values())
        return {"l": turned(ends[0].before, ends[-1].after)[None]}

    def finish(sums, weights, count):
        del weights
        return jax.tree.map(lambda x: x / count, sums)

    return from_sites(observe, collect, lambda a, w: (), finish, axis_name)
