"""How layers are computed, where that changes time and memory but no result: set around calls, as a mesh is."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax

ATTENTION = dict(blocks=None, xla=None, cudnn="gpu", splash="tpu")  # -> the platform that it needs
OFFLOAD = "offload"
REMAT = ("nothing_saveable", "dots_with_no_batch_dims_saveable", "dots_saveable", "everything_saveable", OFFLOAD)
LAYER_INPUT = "layer_input"  # the name of what `offload` keeps


class How(NamedTuple):
    """What `computing` sets."""

    attention: str = "blocks"
    remat: str = "nothing_saveable"


_HOW = jax.make_user_context(How())  # a part of the key that jitted functions are kept under


def how() -> How:
    """What is set where this is called."""
    return _HOW.value


def rematerialised(f: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.checkpoint` with the policy that is set."""
    return jax.checkpoint(f, policy=_offload() if how().remat == OFFLOAD else getattr(jax.checkpoint_policies, how().remat))


def _offload() -> Callable[..., Any]:
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    )


def computing(*, attention: str = How().attention, remat: str = How().remat) -> AbstractContextManager[Any]:
    """What is traced inside `with computing(...):` is computed in this way; functions that are jitted already are traced anew.

    ===========  ==============================================================================================
    attention    of whole sequences; a step of decoding, and sequences padded on the left, take `blocks`
    ===========  ==============================================================================================
    `blocks`     ours: blocks of queries that skip the keys after them
    `xla`        `jax.nn.dot_product_attention(implementation="xla")`: all scores at once
    `cudnn`      the same with `"cudnn"`: flash attention on NVIDIA GPUs, of bfloat16 or float16, reverse mode alone
    `splash`     JAX's Pallas kernel for TPUs, reverse mode alone
    ===========  ==============================================================================================

    Args:
      attention: see above.
      remat: what a layer that is recomputed in the backward pass keeps nevertheless, a policy of `jax.checkpoint_policies`:
        `nothing_saveable`, `dots_with_no_batch_dims_saveable` (products with weights), `dots_saveable` (all products) or
        `everything_saveable`; or `offload`, which keeps nothing and has the layers' inputs, which the others leave on the
        device, wait in the host's memory (`save_and_offload_only_these_names`).

    Raises:
      ValueError: an unknown name, or an attention that the default device cannot run.

    >>> import jax
    >>> from jaxprune import models
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))
    >>> params, tokens = models.init(jax.random.key(0), cfg), jax.numpy.zeros((1, 5), int)
    >>> with models.computing(attention="xla"):
    ...     logits = models.apply(params, tokens, cfg)
    >>> bool(abs(logits - models.apply(params, tokens, cfg)).max() < 1e-5)
    True
    """
    for name, given, allowed in (("attention", attention, ATTENTION), ("remat", remat, REMAT)):
        if given not in allowed:
            raise ValueError(f"{name}: {given!r} given; allowed are {', '.join(allowed)}")
    if (needed := ATTENTION[attention]) is not None and (here := jax.default_backend()) != needed:
        fits = ", ".join(name for name, platform in ATTENTION.items() if platform in (None, here))
        raise ValueError(f"attention: {attention} given, which needs a {needed.upper()}; here is a {here.upper()}: use {fits}")
    return _HOW(How(attention, remat))
