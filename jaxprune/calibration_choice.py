"""Which calibration set to prune with: the one whose pruned model stays closest to the dense one on other text."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int

from jaxprune.models import Config, Params, Probes, hidden, token_kl


class Choice(NamedTuple):
    """The best of several calibration sets.

    Attributes:
      best: index of the candidate with the least divergence; the first of equals.
      kl: divergence of each candidate, in nats a token.
    """

    best: int
    kl: tuple[float, ...]


def choose(
    candidates: Iterable[Any],
    prune: Callable[[Any], Probes],
    params: Params,
    cfg: Config,
    held_out: Int[Array, "b t"] | Int[np.ndarray, "b t"],
    *,
    microbatch: int | None = None,
    chunk: int = 256,
) -> Choice:
    r"""Prunes with each candidate and takes the one with the least divergence from the dense model on held-out tokens.

    The divergence is :math:`\frac{1}{BT} \sum_{bt} \sum_v p_{btv} (\log p_{btv} - \log q_{btv})` with :math:`p` the dense and
    :math:`q` the pruned model, in float32. Pruning is by gates, so nothing is cut and one compiled program serves all.

    Args:
      candidates: calibration sets, whatever `prune` takes.
      prune: candidate -> probes with the gates of the pruned model, e.g. scores, then `plan.select`, then `surgery.gates_of`.
      params, cfg: the dense model.
      held_out: token ids that are in no candidate.
      microbatch: sequences that go through a layer at a time; it divides b. None is all of them.
      chunk: tokens whose logits are in memory at a time.

    Raises:
      ValueError: no candidates, or a divergence that is not a number; the candidate is named.

    Reference: Ai et al., `NIRVANA <https://arxiv.org/abs/2509.14230>`_, 2025 (calibration data selection by KL divergence). The
    released code prints the divergence of one run; the loop over candidates is not in it. It clamps p at 1e-12, which
    logarithms of the softmax do not need.

    >>> import jax
    >>> from jaxprune import calibration_choice, models, plan, scorers, surgery
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> params, scorer = models.init(jax.random.key(0), cfg), scorers.fisher(models.loss_fn(cfg))
    >>> def prune(tokens):
    ...     scores = scorers.score(scorer, params, models.probes(cfg), [tokens])
    ...     return surgery.gates_of(plan.select(scores, ({"f": 24},)), cfg)
    >>> candidates = jax.random.randint(jax.random.key(1), (3, 2, 6), 0, 64)
    >>> choice = calibration_choice.choose(candidates, prune, params, cfg, jax.numpy.arange(12).reshape(2, 6))
    >>> choice.kl[choice.best] == min(choice.kl), len(choice.kl)
    (True, 3)
    """
    candidates = list(candidates)
    if not candidates:
        raise ValueError("candidates: none given; give at least one calibration set")

    def stream(params, probes, tokens):
        return hidden(params, tokens, cfg, probes, microbatch=microbatch)

    @jax.jit
    def divergence(params, x, probes, tokens):
        return token_kl(params, x, params, stream(params, probes, tokens), cfg, chunk).mean()

    dense = jax.jit(stream)(params, {}, held_out)
    kl = tuple(float(divergence(params, dense, prune(candidate), held_out)) for candidate in candidates)
    for i, x in enumerate(kl):
        if not math.isfinite(x):
            raise ValueError(f"candidate {i}: its divergence is {x}; check the weights and its gates")
    return Choice(kl.index(min(kl)), kl)
