"""What `jaxprune size` foretells against what a step really takes on the device at hand: memory, and time against its limits.

    python benchmarks/on_device.py [--model smollm2] [--batch 2] [--length 256] [--repeats 3] [--json FILE]

Weights are random. Each step is compiled twice: for a simulated CPU, as `jaxprune size` does without the accelerator
(`foretold`), and for the device (`compiled`: arguments, temporaries and output by its compiler); then it runs in a new process
(`peak`: the most bytes in use on the device at one time since that process began; on a CPU, which does not count them, the
largest resident size of the process, Python and compiler included). `limit` is the part of the best measured rate of
matrix products in the type of the weights that the counted FLOPs of the step reach.

`decode` is one token after another behind a prompt of 128, batch 1, on the model and on one with equal layers of half as many
MLP channels and KV groups; its limit reads all weights once a token at the rate of a sum over many bytes.

2026-11-23, one H100, `--model llama-7b --batch 8 --length 1024`: the tables of docs/on_a_pod.md.
"""

import dataclasses
import functools
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any, Literal

import _common
import jax
import jax.numpy as jnp
import tyro

STEPS = {  # name -> what differs from one update of Taylor scores
    "forward": dict(stage="forward"),
    "score taylor": {},
    "score fisher": dict(method="fisher"),
    "score kfac-obs, 4 layers at once": dict(method="kfac-obs", layers_at_once=4, batch=1),
    "reconstruct": dict(stage="reconstruct"),
    "recover": dict(stage="recover"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Compares memory and time of steps with what was foretold."""

    model: str = "smollm2"
    """Shapes of the model, as in `jaxprune size --model-config`."""
    batch: int = 2
    """Sequences in a step; statistics of layers at once take one."""
    length: int = 256
    """Tokens in a sequence."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the weights."""
    new_tokens: int = 64
    """Tokens that are decoded; 0 leaves decoding out."""
    repeats: int = 3
    """Runs that count, after one that does not."""
    json: Path | None = None
    """Write the result to this file, too."""


def lowered(step: dict[str, Any]) -> Any:
    """What `sizing.lower` returns, and the configuration."""
    from jaxprune import sharding, sizing
    from jaxprune.commands.size import config

    cfg = config(step["model"])
    names = ("batch", "length", "dtype", "method", "layers_at_once")
    return *sizing.lower(cfg, sharding.mesh_of("data=1"), step["stage"], **{n: step[n] for n in names}), cfg


def foretell(step: dict[str, Any]) -> dict[str, float]:
    """Bytes and FLOPs by the CPU's compiler."""
    from jaxprune import sizing

    params, program, cfg = lowered(step)
    found = sizing.size_of(program.compile(compiler_options=sizing.AS_STORED), params, cfg, step["stage"])
    return dict(total=found.total - found.beside, weights=found.weights, flops=found.work.flops)


def measure(step: dict[str, Any]) -> dict[str, Any]:
    """Bytes and seconds on the device."""
    _, program, _ = lowered(step)
    compiled = program.compile()
    memory = compiled.memory_analysis()
    infos, tree = jax.tree.flatten(program.args_info)
    drawn = [_random(info, key) for info, key in zip(infos, jax.random.split(jax.random.key(0), len(infos)), strict=True)]
    seconds = []
    for _ in range(step["repeats"] + 1):
        args, kwargs = tree.unflatten(drawn)
        seconds.append(_common.spent(lambda a=args, k=kwargs: compiled(*a, **k)).clock)
        drawn = [_random(info, jax.random.key(1)) if info.donated else x for info, x in zip(infos, drawn, strict=True)]
    in_all = (
        memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    )
    return dict(compiled=in_all, peak=_peak(), seconds=statistics.median(seconds[1:]), device=jax.devices()[0].device_kind)


def _random(info: Any, key: Any) -> Any:
    """Small weights, or tokens that every vocabulary has."""
    if jnp.issubdtype(info.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    if jnp.issubdtype(info.dtype, jnp.integer):
        return jax.random.randint(key, info.shape, 0, 1000, info.dtype)
    if jnp.issubdtype(info.dtype, jnp.floating):
        return _spread(info.shape, info.dtype)
    return jnp.ones(info.shape, info.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _spread(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Numbers from -0.02 to 0.02 without a pattern; random ones take minutes to compile for a CPU."""
    mixed = jax.lax.iota(jnp.uint32, math.prod(shape)) * jnp.uint32(2654435761)
    return ((mixed >> 16).astype(jnp.float32) / 2**16 - 0.5).astype(dtype).reshape(shape) * 0.04


def _peak() -> int:
    counted = jax.devices()[0].memory_stats()
    return _common.peak_memory() if counted is None else counted["peak_bytes_in_use"]


def limits(step: dict[str, Any]) -> dict[str, float]:
    """FLOPs a second of products of square matrices, and bytes a second of a read."""
    accelerated = jax.default_backend() != "cpu"
    n = 8192 if accelerated else 2048
    x, y = (jax.random.normal(jax.random.key(i), (n, n)).astype(step["dtype"]) for i in range(2))
    z = jnp.ones((8 if accelerated else 1) * 2**28, jnp.bfloat16)
    product, total = jax.jit(jnp.matmul), jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))
    calls = 10
    runs = {"product": lambda: [product(x, y) for _ in range(calls)], "read": lambda: [total(z) for _ in range(calls)]}
    found = _common.alternate(runs, step["repeats"])
    return dict(flops=calls * 2 * n**3 / found["product"].clock, bytes=calls * z.nbytes / found["read"].clock)


def decode(step: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds a token, and bytes of weights."""
    import pruned_speed

    from jaxprune import models
    from jaxprune.commands.size import config

    cfg = config(step["model"])
    part = step["part"]
    layers = tuple(x._replace(kv_heads=-(-x.kv_heads // part), ff=x.ff // part) for x in cfg.layers)
    cfg = dataclasses.replace(cfg, layers=layers)
    params = jax.tree.map(lambda x: _spread(x.shape, x.dtype), models.shapes(cfg, jnp.dtype(step["dtype"])))
    prompt = jax.random.randint(jax.random.key(1), (1, 128), 0, 1000)
    runs = [pruned_speed.decoding(params, cfg, prompt, step["new_tokens"]).clock for _ in range(step["repeats"] + 1)]
    return dict(ms=1000 * statistics.median(runs[1:]) / step["new_tokens"], bytes=_common.size(params))


def here(program: str, step: dict[str, Any], **environment: str) -> Any:
    """Runs a function of this file in a new process."""
    return _common.in_new_process(__file__, "--run", program, json.dumps(step), **environment)


def main(args: Args) -> None:
    """Measures each step and prints the tables."""
    shared = dict(model=args.model, dtype=args.dtype, repeats=args.repeats, length=args.length, new_tokens=args.new_tokens)
    limit = here("limits", shared)
    rows: list[dict[str, Any]] = []
    for name, own in STEPS.items():
        step: dict[str, Any] = shared | dict(stage="score", method="taylor", layers_at_once=None, batch=args.batch) | own
        foretold = here("foretell", step, JAX_PLATFORMS="cpu")
        found = here("measure", step)
        rows.append(
            {
                "step": name,
                "tokens": f"{step['batch']} x {args.length}",
                "weights, GiB": foretold["weights"] / 2**30,
                "foretold": foretold["total"] / 2**30,
                "compiled": found["compiled"] / 2**30,
                "peak": found["peak"] / 2**30,
                "peak / foretold": found["peak"] / foretold["total"],
                "s": found["seconds"],
                "TFLOP/s": foretold["flops"] / found["seconds"] / 1e12,
                "limit": foretold["flops"] / found["seconds"] / limit["flops"],
            }
        )
        print(f"measured: {rows[-1]}", file=sys.stderr)
    _common.show(
        f"{args.model}, {args.dtype}, {found['device']}; products {limit['flops'] / 1e12:.2f} TFLOP/s", rows, args.json
    )
    decoded = []
    for part, name in ((1, "dense"), (2, "half of each layer")) if args.new_tokens else ():
        found = here("decode", shared | dict(part=part))
        floor = 1000 * found["bytes"] / limit["bytes"]
        decoded.append({"model": name, "weights, GiB": found["bytes"] / 2**30, "ms a token": found["ms"], "limit, ms": floor})
        decoded[-1] |= {"/ limit": found["ms"] / floor, "speedup": decoded[0]["ms a token"] / found["ms"]}
    if decoded:
        where = None if args.json is None else args.json.with_suffix(".decode.json")
        _common.show(f"decode, batch 1; reads {limit['bytes'] / 1e9:.0f} GB/s", decoded, where)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        print(json.dumps(globals()[sys.argv[2]](json.loads(sys.argv[3]))))
    else:
        main(tyro.cli(Args))
