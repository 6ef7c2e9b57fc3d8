"""Sequences over devices by `shard_map`: a scorer that was built with an axis name, on a mesh that has this axis."""

import jax
from jax.sharding import Mesh, PartitionSpec

from jaxprune.scorers._base import Scorer


def mapped(scorer: Scorer, mesh: Mesh, axis_name: str) -> Scorer:
    """The scorer with its sequences spread over an axis of a mesh: each device updates with its own and they are summed.

    Args:
      scorer: built with this `axis_name`, as its loss is.
      mesh: has the axis; every device gets the whole model.
      axis_name: of the mesh; its size divides the sequences of a batch.

    Returns:
      A scorer for `score`, with the scores of one device.

    Raises:
      ValueError: the mesh has no such axis.

    >>> import jax
    >>> from jaxprune import models, scorers
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> scorer = scorers.fisher(models.loss_fn(cfg), axis_name="data")
    >>> spread = scorers.mapped(scorer, jax.make_mesh((1,), ("data",)), "data")
    >>> params, tokens = models.init(jax.random.key(0), cfg), jax.numpy.arange(12).reshape(2, 6)
    >>> scorers.score(spread, params, models.probes(cfg), [tokens])[0]["f"].shape
    (48,)
    """
    if axis_name not in mesh.axis_names:
        raise ValueError(f"axis_name: {axis_name!r} given; the mesh has {', '.join(map(str, mesh.axis_names))}")
    mesh = Mesh(mesh.devices, mesh.axis_names)  # whose axes are not explicit, so that sequences may come from anywhere
    whole, parts = PartitionSpec(), PartitionSpec(axis_name)
    # With check_vma the gradient by a probe that all devices share would be summed over them before it is squared.
    update = jax.shard_map(
        scorer.update, mesh=mesh, in_specs=(whole, whole, whole, parts), out_specs=whole, check_vma=False
    )  # fmt: skip
    return scorer._replace(update=update)
