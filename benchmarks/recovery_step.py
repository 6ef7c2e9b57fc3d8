"""Time and memory of one LoRA step on SmolLM2-135M, beside a forward pass and a gradient that stops at the activations.

    python benchmarks/recovery_step.py                    # batch 4 x 128, rank 8
    python benchmarks/recovery_step.py --dtype bfloat16 --length 256

Each row gives the least wall time and CPU time of `--repeats` calls after compilation, and XLA's temporaries. CPU time is the
one to compare on a machine that does other work.
"""

import dataclasses
import time
from typing import Literal

import jax
import jax.numpy as jnp
import optax
import tyro
from _common import MIB, size

from jaxprune import models, recovery
from jaxprune.commands._common import peak_memory
from jaxprune.models import checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Measures a LoRA step."""

    model: str = "smollm2"
    """Model to train."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of its weights."""
    batch: int = 4
    """Sequences of an update."""
    length: int = 128
    """Tokens in a sequence."""
    rank: int = 8
    """Of the adapters."""
    chunk: int = 256
    """Tokens whose logits exist at a time."""
    repeats: int = 3
    """Calls that count, after one that does not."""


def measure(name, f, *args, repeats, donate=()):
    began = time.perf_counter()
    compiled = jax.jit(f, donate_argnums=donate).lower(*args).compile()
    compiling = time.perf_counter() - began
    wall, cpu = [], []
    for _ in range(repeats + 1):
        mine = [jax.tree.map(jnp.copy, x) if i in donate else x for i, x in enumerate(args)]
        jax.block_until_ready(mine)
        w, c = time.perf_counter(), time.process_time()
        jax.block_until_ready(compiled(*mine))
        wall.append(time.perf_counter() - w)
        cpu.append(time.process_time() - c)
    temporaries = compiled.memory_analysis().temp_size_in_bytes / MIB
    print(f"{name:44s} {min(wall[1:]):7.2f} {min(cpu[1:]):7.2f} {temporaries:10.0f} {compiling:10.1f}", flush=True)


def main(args: Args) -> None:
    """Measures each program and prints its row."""
    params, cfg = checkpoint.load(args.model, dtype=getattr(jnp, args.dtype))
    adapter = recovery.lora.init(jax.random.key(0), params, cfg, rank=args.rank)
    tokens = jax.random.randint(jax.random.key(1), (args.batch, args.length), 0, cfg.vocab)
    batch = dict(tokens=tokens, weights=jnp.ones(tokens.shape))
    _, tx = recovery.schedule_and_optimizer(1e-4, 100)
    print(f"{'':44s} {'wall s':>7s} {'CPU s':>7s} {'temp MiB':>10s} {'compile s':>10s}")

    def loss(remat):
        return recovery.lm_loss(cfg, alpha=16, remat=remat, chunk=args.chunk)

    def step(state, params, batch, remat):
        adapter, opt_state = state
        grads, _ = jax.grad(loss(remat), has_aux=True)(adapter, params, batch)
        updates, opt_state = tx.update(grads, opt_state, adapter)
        return optax.apply_updates(adapter, updates), opt_state

    measure("forward", loss(False), {}, params, batch, repeats=args.repeats)
    for remat in (False, True):
        note = ", recomputing layers" if remat else ""

        def residual(gates, params, batch, remat=remat):
            x = models.hidden(params, batch["tokens"][:, :-1], cfg, dict(gates=gates), remat=remat)
            return models.token_losses(params, x, batch["tokens"][:, 1:], cfg, args.chunk).mean()

        gates = models.probes(cfg, "k")["gates"]
        measure(f"gradient of activations only{note}", jax.grad(residual), gates, params, batch, repeats=args.repeats)
        measure(
            f"LoRA step{note}",
            lambda *a, remat=remat: step(*a, remat),
            (adapter, tx.init(adapter)),
            params,
            batch,
            repeats=args.repeats,
            donate=(0,),
        )
    print(f"peak of the process: {peak_memory() / MIB:.0f} MiB, loading included; weights {size(params) / MIB:.0f} MiB")


if __name__ == "__main__":
    main(tyro.cli(Args))
