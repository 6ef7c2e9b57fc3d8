"""What a stage of pruning takes on a mesh, found by compiling it ahead of time for arrays that are not there."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxprune import _beside, _hlo, _losses, methods, models, pipeline, recovery, sharding
from jaxprune.models import LayerDims, LlamaConfig, Params
from jaxprune.recovery.reconstruct import Sums, add_sums
from jaxprune.recovery.train import State, update_state

STAGES = ("forward", "score", "reconstruct", "recover")
KEPT = 0.8  # of the channels, in reconstruction
# The CPU multiplies in float32. This pass would convert all layers before their loop: a copy of all weights in twice the bytes.
AS_STORED: dict[str, str | bool] = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


class Size(NamedTuple):
    """Of one device; bytes, but for the FLOPs.

    Attributes:
      weights: of the model.
      arguments: of the program; the weights that it reads are among them.
      temporaries: while it runs.
      output: but for what takes the place of arguments.
      beside: weights that the program does not read.
      work: FLOPs of its matrix products, and bytes of collectives that the device receives.
    """

    weights: int
    arguments: int
    temporaries: int
    output: int
    beside: int
    work: _hlo.Work

    @property
    def total(self) -> int:
        """All bytes that have to fit at the same time."""
        return self.arguments + self.temporaries + self.output + self.beside


def size(cfg: LlamaConfig, mesh: Mesh, stage: str, **step: Any) -> Size:
    """Compiles one step of a stage and reads what it takes; no weight is made. Arguments and errors as of `lower`.

    >>> from jaxprune import models, sharding, sizing
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> found = sizing.size(cfg, sharding.mesh_of("data=1"), "forward", batch=2, length=9, dtype="float32")
    >>> found.weights == 4 * models.count_parameters(cfg), found.work.flops > 2 * 2 * 8 * cfg.decoder_parameters
    (True, True)
    """
    params, lowered = lower(cfg, mesh, stage, **step)
    return size_of(lowered.compile(compiler_options=AS_STORED), params, cfg, stage)


def lower(
    cfg: LlamaConfig,
    mesh: Mesh,
    stage: str,
    *,
    batch: int,
    length: int,
    dtype: Any = jnp.bfloat16,
    method: str = "taylor",
    layers_at_once: int | None = None,
) -> tuple[Params, jax.stages.Lowered]:
    """The parameters, which are not there, and the program of one step of a stage before it is compiled.

    ============  ==========================================================================
    stage         one step
    ============  ==========================================================================
    `forward`     token losses of a batch, as in evaluation
    `score`       the scorer's update with a batch
    `reconstruct` both residual streams of a batch through the widest MLP, and its sums
    `recover`     an update of rank-8 adapters on all matrices with AdamW
    ============  ==========================================================================

    Args:
      cfg: the model.
      mesh: of `sharding.mesh_of`; its devices may be simulated.
      stage: see above.
      batch: sequences in a step.
      length: tokens in a sequence.
      dtype: of the weights.
      method: whose scorer is meant, for `score`.
      layers_at_once: of `score`, as in `Settings`; the first so many layers are meant, whose backward pass is the longest.

    Raises:
      ValueError: an unknown stage or method, a method without a scorer or without layers at once, sizes below 1 (2 tokens).
    """
    if stage not in STAGES:
        raise ValueError(f"stage: {stage!r} given; allowed are {', '.join(STAGES)}")
    if batch < 1 or length < 2:
        raise ValueError(f"batch, length: {batch} x {length} given; give at least one sequence of 2 tokens")
    params = jax.tree.map(_at, models.shapes(cfg, jnp.dtype(dtype)), sharding.shardings(cfg, mesh))
    tokens = _at(jax.ShapeDtypeStruct((batch, length), jnp.int32), NamedSharding(mesh, _beside.sequences(mesh, batch)))
    with jax.set_mesh(mesh):
        if stage == "forward":
            lowered = _losses.token_losses_of.lower(params, tokens, cfg)
        elif stage == "score":
            lowered = _score(params, tokens, cfg, method, layers_at_once)
        elif stage == "recover":
            lowered = _recover(params, tokens, cfg, mesh)
        else:
            lowered = _reconstruct(params, tokens, cfg, mesh)
    return params, lowered


def size_of(compiled: jax.stages.Compiled, params: Params, cfg: LlamaConfig, stage: str) -> Size:
    """What a compiled program of `lower` takes."""
    memory, text, weights = compiled.memory_analysis(), compiled.as_text(), _bytes(params)
    assert memory is not None and text is not None, "XLA says nothing of its program"
    return Size(
        weights=weights,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        output=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        beside=weights - _bytes(_widest(params, cfg)[0]) if stage == "reconstruct" else 0,
        work=_hlo.count(text),
    )


def _at(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _bytes(tree: Any) -> int:
    """Of one device."""
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _score(params: Any, tokens: Any, cfg: LlamaConfig, method: str, layers_at_once: int | None) -> Any:
    methods.check_layers_at_once(method, layers_at_once)
    make = methods.find(method).scorer
    if make is None:
        raise ValueError(f"method: {method} given, which rotates the model and has no scores; choose another")
    scorer = make(cfg, methods.Options(microbatch=pipeline.divisor(tokens.shape, params)))
    mine = None if layers_at_once is None else range(layers_at_once)
    probes = jax.eval_shape(lambda: models.probes(cfg, layers=mine))
    state = jax.eval_shape(scorer.init, probes)
    return jax.jit(scorer.update, donate_argnums=0).lower(state, params, probes, tokens)


def _recover(params: Any, tokens: Any, cfg: LlamaConfig, mesh: Mesh) -> Any:
    tx = recovery.schedule_and_optimizer(1e-4, 100)[1]

    def start(key: jax.Array) -> State:
        adapter = recovery.lora.init(key, models.shapes(cfg), cfg)
        return State(jnp.int32(0), adapter, tx.init(adapter), jnp.zeros(100, jnp.float32))

    whole = NamedSharding(mesh, PartitionSpec())
    state = jax.tree.map(lambda x: _at(x, whole), jax.eval_shape(start, jax.random.key(0)))
    batch = dict(tokens=tokens, weights=jax.ShapeDtypeStruct(tokens.shape, jnp.float32, sharding=tokens.sharding))
    update = functools.partial(update_state, recovery.lm_loss(cfg, alpha=16), tx, 1)
    return jax.jit(update, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, state), None)).lower(
        state, params, batch
    )


def _widest(params: Any, cfg: LlamaConfig) -> tuple[dict[str, Any], LayerDims]:
    """The arrays of the widest MLP, and the widths of its layer."""
    run = max(cfg.runs, key=lambda run: run.dims.ff)
    arrays = {n: x for n, x in params[run.name].items() if n in models.axes.MLP}
    one = {n: (x, NamedSharding(x.sharding.mesh, PartitionSpec(*x.sharding.spec[1:]))) for n, x in arrays.items()}
    return {n: jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=s) for n, (x, s) in one.items()}, run.dims


def _reconstruct(params: Any, tokens: Any, cfg: LlamaConfig, mesh: Mesh) -> Any:
    p, dims = _widest(params, cfg)
    n = round(KEPT * dims.ff)
    letters = models.axes.LAYER
    kept_shapes = {name: [n if a == "f" else m for a, m in zip(letters[name], x.shape, strict=True)] for name, x in p.items()}
    kept = {name: jax.ShapeDtypeStruct(shape, p[name].dtype) for name, shape in kept_shapes.items()}
    stream = jax.ShapeDtypeStruct((*tokens.shape, cfg.d), p["down"].dtype, sharding=tokens.sharding)
    whole = NamedSharding(mesh, PartitionSpec())
    sums = Sums(*(jax.ShapeDtypeStruct((m, n), jnp.float32, sharding=whole) for m in (n, cfg.d)))
    index = jax.ShapeDtypeStruct((n,), jnp.int32)
    correction = jax.ShapeDtypeStruct((), jnp.float32)
    return add_sums.lower(p, kept, index, None, "f", stream, stream, sums, "residual", correction, cfg)
