"""How the commands compute: flags that change time, memory and rounding."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxprune import models
from jaxprune.commands._common import flag

FORWARD_MODE = ("curvature", "ntk")  # methods that differentiate forwards, which the kernels of attention do not


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """How it is computed: time, memory and rounding, not what comes out."""

    matmul_precision: Annotated[
        Literal["default", "high", "highest"] | None, flag("{default,high,highest}", "as JAX has it")
    ] = None
    """Of products of float32 matrices, which GPUs and TPUs round to TF32 or bfloat16 unless told otherwise."""
    attention: Literal["blocks", "xla", "cudnn", "splash"] = "blocks"
    """Of whole sequences. blocks: ours. xla, cudnn: jax.nn.dot_product_attention, cudnn on NVIDIA GPUs in bfloat16. splash: the
    Pallas kernel for TPUs."""
    remat: Literal[
        "nothing_saveable", "dots_with_no_batch_dims_saveable", "dots_saveable", "everything_saveable", "offload"
    ] = "nothing_saveable"
    """What a layer keeps for the backward pass beside its input, a policy of jax.checkpoint_policies. offload: nothing, and
    the inputs wait in the host's memory."""
    compilation_cache: Annotated[Path | None, flag("DIR", "none, or JAX_COMPILATION_CACHE_DIR")] = None
    """Keep programs that took a second or more to compile in this folder, for later processes."""


@contextlib.contextmanager
def using(args: Any) -> Iterator[None]:
    """The settings of a command's flags `compute`, if it has them, while it runs.

    Raises:
      ValueError: the device, the type of the weights or the method does not go with the attention.
      NotADirectoryError: the cache is a file.
    """
    flags: Compute | None = getattr(args, "compute", None)
    if flags is None:
        yield
        return
    _check(flags, args)
    with contextlib.ExitStack() as stack:
        stack.enter_context(models.computing(attention=flags.attention, remat=flags.remat))
        if flags.matmul_precision is not None:
            stack.enter_context(jax.default_matmul_precision(flags.matmul_precision))
        if flags.compilation_cache is not None:
            stack.enter_context(_cached(flags.compilation_cache))
        yield


def _check(flags: Compute, args: Any) -> None:
    if flags.compilation_cache is not None and flags.compilation_cache.is_file():
        raise NotADirectoryError(f"compilation_cache: {flags.compilation_cache} given, which is a file; name a folder")
    if flags.attention in ("cudnn", "splash") and getattr(args, "method", None) in FORWARD_MODE:
        raise ValueError(
            f"attention: {flags.attention} given with --method {args.method}, which differentiates forwards; use blocks or xla"
        )
    if flags.attention == "cudnn" and getattr(args, "dtype", None) == "float32":
        raise ValueError("attention: cudnn given with --dtype float32; give --dtype bfloat16, or use blocks or xla")


@contextlib.contextmanager
def _cached(folder: Path) -> Iterator[None]:
    """Compiled programs are kept in a folder; JAX decides once where, so it has to forget before and after."""
    before = jax.config.values["jax_compilation_cache_dir"]
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()
