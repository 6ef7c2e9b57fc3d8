"""Distillation: what a pruned model minimises to become like the model that it was cut from."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune import models
from jaxprune.models import axes
from jaxprune.models._kinds import told
from jaxprune.recovery.divergence import hidden_distance, logit_divergence, relative_square
from jaxprune.recovery.layer_map import LayerMap, check_rising, checked_map
from jaxprune.recovery.loss import AdapterLoss, assemble, weighted_mean


class Pair(NamedTuple):
    """The frozen parameters of `fit` in distillation.

    Attributes:
      student: the pruned model; with all weights in training only its dtypes are read.
      teacher: the dense model; no gradient is taken by it.
    """

    student: models.Params
    teacher: models.Params


def distill_loss(
    cfg: models.LlamaConfig,
    teacher_cfg: models.LlamaConfig,
    *,
    alpha: float | int | None,
    sparse: bool = False,
    reverse: bool = False,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    ce_weight: float | int = 0.0,
    hidden_weight: float | int = 0.0,
    layer_map: LayerMap | None = None,
    remat: bool = True,
    chunk: int = 256,
) -> AdapterLoss:
    """The weighted mean over tokens of divergence + ce_weight * cross-entropy + hidden_weight * distance of hidden states.

    The loss reads a `Pair` where `lm_loss` reads the frozen model; batches are those of `lm_loss`.

    Args:
      cfg, teacher_cfg: the models; they have one vocabulary.
      alpha, sparse: scale of the adapters, as in `lora.overlay`, and whether zeros stay zeros; None trains all weights, see
        `assemble`.
      reverse, temperature, top_k, chunk: as in `logit_divergence`.
      ce_weight: of the cross-entropy of the text's next token, in nats.
      hidden_weight: of `hidden_distance`; both models then have residual streams of one width.
      layer_map: pairs of a student's and a teacher's layer; None is `same_layers`.
      remat: recompute each layer of the student in the backward pass.

    Raises:
      ValueError: an option out of range, or models whose vocabularies or streams differ.

    >>> import jax
    >>> from jaxprune import models, recovery
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> params = models.init(jax.random.key(0), cfg)
    >>> batch = dict(tokens=jax.numpy.arange(10).reshape(2, 5), weights=jax.numpy.ones((2, 5)))
    >>> adapter = recovery.lora.init(jax.random.key(1), params, cfg)
    >>> loss = distill_loss(cfg, cfg, alpha=16, hidden_weight=1)
    >>> float(loss(adapter, Pair(params, params), batch)[0])  # the teacher itself
    0.0
    """
    _check_numbers(alpha, temperature, top_k, ce_weight, hidden_weight)
    _check_vocabulary(cfg, teacher_cfg)
    if layer_map is not None and not hidden_weight:
        raise ValueError("layer_map: given without a hidden_weight; hidden states are not compared then")
    pairs = checked_map(cfg, teacher_cfg, layer_map) if hidden_weight else ()

    def loss(adapter: Any, params: Pair, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        student = assemble(params.student, adapter, alpha, sparse)
        x, states = _forward(student, inputs, cfg, bool(pairs), remat)
        y, teacher_states = jax.lax.stop_gradient(_forward(params.teacher, inputs, teacher_cfg, bool(pairs), False))
        total = logit_divergence(
            student, x, cfg, params.teacher, y, teacher_cfg,
            reverse=reverse, temperature=temperature, top_k=top_k, chunk=chunk,
        )  # fmt: skip
        if ce_weight:
            total += ce_weight * models.token_losses(student, x, targets, cfg, chunk)
        if pairs:
            total += hidden_weight * hidden_distance(states, teacher_states, pairs)
        return weighted_mean(total, batch["weights"][:, 1:])

    return loss


def block_loss(
    cfg: models.LlamaConfig,
    teacher_cfg: models.LlamaConfig,
    *,
    alpha: float | int | None,
    sparse: bool = False,
    layer_map: LayerMap | None = None,
) -> AdapterLoss:
    r"""Every layer of the student learns for itself to do what the teacher's does, from the teacher's input.

    .. math:: |f_s(x) - y|^2 / |y - x|^2

    of each token, the mean over layers and weighted tokens, with y the teacher's residual stream after the layer that s maps
    to, and x the one after the layer that the student's layer before s maps to. A student's layer therefore also does the work
    of teacher's layers that have gone before it. Nothing is propagated back from one layer to another; embedding, final norm
    and head get no gradient. Reads a `Pair` and the batches of `lm_loss`.

    Args:
      cfg, teacher_cfg: the models.
      alpha, sparse: as in `distill_loss`.
      layer_map: a pair for each of the student's layers, in order; None is `same_layers`.

    Raises:
      ValueError: streams of different width, or a map that leaves a layer out or goes back.

    >>> import jax
    >>> from jaxprune import models, recovery
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),) * 2)
    >>> params = models.init(jax.random.key(0), cfg)
    >>> batch = dict(tokens=jax.numpy.arange(10).reshape(2, 5), weights=jax.numpy.ones((2, 5)))
    >>> float(block_loss(cfg, cfg, alpha=None)(params, Pair(params, params), batch)[0]) < 1e-9
    True
    """
    _check_numbers(alpha)
    pairs = checked_map(cfg, teacher_cfg, layer_map)
    check_rising(cfg, pairs)
    before = dict(zip((s for s, _ in pairs), [-1, *(t for _, t in pairs)], strict=False))
    after = dict(pairs)

    def layer(_, z):
        p, x, y = z
        out = x
        for name in axes.OUTPUT.values():
            out = models.sublayer(p, name, out, cfg)
        error, scale = ((a - b).astype(jnp.float32) for a, b in ((out, y), (y, x)))
        return None, relative_square(error, scale)

    def loss(adapter: Any, params: Pair, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        student = assemble(params.student, adapter, alpha, sparse)
        states = jax.lax.stop_gradient(models.residuals(params.teacher, batch["tokens"][:, :-1], teacher_cfg))
        total = jnp.zeros(states.shape[1:3], jnp.float32)
        for run in cfg.runs:
            if arrays := told(student.get(run.name, {}), run):
                layers = range(run.start, run.start + run.length)
                x, y = (states[jnp.array([where[i] + 1 for i in layers])] for where in (before, after))
                total += jax.lax.scan(layer, None, (arrays, x, y))[1].sum(0)
        return weighted_mean(total / len(pairs), batch["weights"][:, 1:])

    return loss


def _forward(params: models.Params, tokens: jax.Array, cfg: models.LlamaConfig, keep: bool, remat: bool):
    """The stream after the final norm, and the states of all layers if they are to be kept."""
    if not keep:
        return models.hidden(params, tokens, cfg, remat=remat), None
    states = models.residuals(params, tokens, cfg, remat=remat)
    return models.stream_norm(states[-1], params["norm"], cfg), states


def _check_numbers(
    alpha: float | int | None,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    ce_weight: float | int = 0.0,
    hidden_weight: float | int = 0.0,
) -> None:
    for name, number in dict(alpha=alpha, temperature=temperature).items():
        if number is not None and not (number > 0 and math.isfinite(number)):
            raise ValueError(f"{name}: {number} given; it must be a positive number")
    for name, number in dict(ce_weight=ce_weight, hidden_weight=hidden_weight).items():
        if not (number >= 0 and math.isfinite(number)):
            raise ValueError(f"{name}: {number} given; it must be a number from 0 upwards")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: {top_k} given; it must be at least 1, or left out for all tokens")


def _check_vocabulary(cfg: models.LlamaConfig, teacher_cfg: models.LlamaConfig) -> None:
    if cfg.vocab != teacher_cfg.vocab:
        raise ValueError(
            f"teacher: its vocabulary has {teacher_cfg.vocab} tokens, the student's {cfg.vocab}; give the model that it was "
            "pruned from"
        )
