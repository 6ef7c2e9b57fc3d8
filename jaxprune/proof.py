"""The proof that a cut is exact, for users to run on their own weights."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.models import Config, LlamaConfig, Params, apply
from jaxprune.models._mesh import on_host
from jaxprune.models._runs import places
from jaxprune.plan import Plan
from jaxprune.surgery import gates_of, pruned_config, take, widen

FIXED = ("vocab", "d", "head_dim", "state", "conv", "dt_rank", "tie_embeddings")
TOLERANCE = dict(float32=1e-4, bfloat16=5e-2, float16=1e-2)  # of the largest logit


class Report(NamedTuple):
    """What `verify` found.

    Attributes:
      difference: largest absolute difference between the logits of the pruned model and of the masked one.
      largest_logit: largest absolute logit, for scale.
      tolerance: largest difference that counts as equal.
      kept: tensors whose bits equal the kept slice of the dense model.
      updated: tensors that differ, with the largest absolute difference.
      undeclared: updated tensors that no declared update explains.
    """

    difference: float
    largest_logit: float
    tolerance: float
    kept: tuple[str, ...]
    updated: dict[str, float]
    undeclared: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """The cut is exact, and nothing changed that was not declared."""
        return self.difference <= self.tolerance and not self.undeclared


def verify(
    params: Params,
    cfg: Config,
    small: Params,
    small_cfg: Config,
    plan: Plan,
    tokens: Any,
    updates: tuple[str, ...] = (),
) -> Report:
    """Compares a pruned model with the dense one that it was cut from.

    Tensor by tensor, the kept slice of the dense weights is compared bit for bit. If all are equal, the logits of the dense
    model, gated by the plan, must be those of the pruned model. If any was updated, the pruned model's own weights are
    scattered into the dense shapes, zeros elsewhere, and gated: the logits must be the same, whatever updated the weights.

    Args:
      params, cfg: the dense model.
      small, small_cfg: the pruned model.
      plan: what was kept.
      tokens: int32[b, t].
      updates: names of arrays (`q`, `down`, ...) that were meant to change, e.g. by reconstruction or training.

    Returns:
      A report; `report.exact` is the verdict.

    Raises:
      ValueError: the plan is for another model, the pruned model does not have the widths that it asks for, or it was rotated
        and has no units in common with the dense one.

    >>> import jax
    >>> from jaxprune import models, plan, proof, surgery
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> params = models.init(jax.random.key(0), cfg)
    >>> keep = plan.Plan(({"k": [1], "f": range(40)},), models.unit_counts(cfg))
    >>> proof.verify(params, cfg, *surgery.cut(params, cfg, keep), keep, jax.numpy.zeros((1, 5), int)).exact
    True
    """
    if _rotation(small_cfg) != _rotation(cfg):
        raise ValueError(
            "verify: the residual stream of one of the models is rotated (SliceGPT), so the pruned model is no selection of "
            "units of the dense one and there is no equality to prove; compare their perplexities instead"
        )
    want = pruned_config(cfg, plan)
    _check_shapes(small_cfg, want)
    differences = dict(_differences(params, cfg, small, small_cfg, plan))
    updated = {name: d for name, d in differences.items() if d}
    wide_cfg = dataclasses.replace(cfg, biases=small_cfg.biases)
    wide = widen(small, wide_cfg, plan) if updated else params
    logits = _logits(small, tokens, small_cfg)
    gated = _logits(wide, tokens, wide_cfg, gates_of(plan, cfg))
    largest = float(jnp.max(jnp.abs(logits)))
    return Report(
        difference=float(jnp.max(jnp.abs(logits - gated))),
        largest_logit=largest,
        tolerance=TOLERANCE[str(small["embed"].dtype)] * max(largest, 1.0),
        kept=tuple(name for name, d in differences.items() if not d),
        updated=updated,
        undeclared=tuple(name for name in updated if name.split(".")[-1] not in updates),
    )


def _rotation(cfg: Config) -> tuple[bool, int | None]:
    return (cfg.shortcuts, cfg.norm_width) if isinstance(cfg, LlamaConfig) else (False, None)


def _check_shapes(small_cfg: Config, want: Config) -> None:
    shapes = [
        {name: getattr(cfg, name) for name in FIXED if hasattr(cfg, name)}
        | {f"layer {i}": tuple(x for x in dims if x is not None) for i, dims in enumerate(cfg.layers)}
        for cfg in (small_cfg, want)
    ]
    for name in shapes[0] | shapes[1]:
        if (given := shapes[0].get(name)) != (asked := shapes[1].get(name)):
            raise ValueError(
                f"verify: the pruned model is not what the plan makes of the dense one: {name} is {given}, the plan asks for "
                f"{asked}; give the model that it was pruned from"
            )


@functools.partial(jax.jit, static_argnames="cfg")
def _logits(params, tokens, cfg, gates=None):
    with jax.default_matmul_precision("highest"):  # GPUs and TPUs would round float32 products by more than the tolerance
        return apply(params, tokens, cfg, gates)


def _differences(params, cfg, small, small_cfg, plan: Plan):
    """Yields tensor names with the largest difference from the kept slice of the dense model; 0 means equal bits."""
    shared = {"d": plan.keep[0]["d"]} if "d" in plan.keep[0] else {}
    for name, letters in small_cfg.top_arrays().items():
        yield name, _difference(take(params[name], letters, shared), on_host(small[name]))
    where = places(cfg.runs)
    for run in small_cfg.runs:
        for array, letters in small_cfg.layer_arrays(run.dims).items():
            for i in range(run.length):
                layer = run.start + i
                of, j = where[layer]
                dense = params[of.name].get(array)
                got = on_host(small[run.name][array], i)
                dense = np.zeros_like(got) if dense is None else take(on_host(dense, j), letters, plan.keep[layer])
                yield f"layers.{layer}.{array}", _difference(dense, got)


def _difference(dense: np.ndarray, small: np.ndarray) -> float:
    if dense.dtype == small.dtype and dense.tobytes() == small.tobytes():
        return 0.0
    difference = float(np.max(np.abs(dense.astype(np.float32) - small.astype(np.float32))))
    return difference or float("nan")  # equal values, other bits: -0.0, or another dtype
