"""`jaxprune inspect`: what a model looks like inside. `jaxprune methods`: what can be asked of `prune`."""

import dataclasses
from typing import Any

from jaxprune import folder, methods, models
from jaxprune.commands._common import ModelName, Output
from jaxprune.models import checkpoint
from jaxprune.models._hf_mamba import problems
from jaxprune.models.units import unit_sizes

UNITS = dict(k="KV groups", f="MLP channels", i="inner channels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show the widths of every layer, the parameters, and what was removed."""

    model: ModelName
    output: Output = Output()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Methods:
    """List the methods: what each reads, its calibration, its paper."""

    output: Output = Output()


def run(args: Inspect) -> dict[str, Any]:
    """Widths and parameters, per layer and in all; weights are not read."""
    path = checkpoint.resolve(args.model)
    cfg, record = checkpoint.read_config(path), folder.read_record(path)
    plan = None if record is None else record["plan"]
    if plan is not None and len(plan["sizes"]) != len(cfg.layers):
        raise ValueError(f"{path}: {folder.RECORD} is for {len(plan['sizes'])} layers, the model has {len(cfg.layers)}")
    layers = []
    paired = any(getattr(dims, "pairs", None) is not None for dims in cfg.layers)
    for i, dims in enumerate(cfg.layers):
        row = {"layer": i} | _widths(dims)
        row |= {"head size": 2 * unit_sizes(cfg, dims)["h"]} if paired else {}
        row["matrix parameters"] = cfg.matrix_parameters(dims)
        if plan is not None:
            gone = {a: plan["sizes"][i][a] - len(plan["keep"][i].get(a, range(plan["sizes"][i][a]))) for a in plan["sizes"][i]}
            row |= {f"{UNITS[a]} removed": gone.get(a, 0) for a in cfg.units}
        layers.append(row)
    return {
        "family": cfg.family,
        "residual width": cfg.d,
        **_sizes(cfg),
        "vocabulary": cfg.vocab,
        "tied embeddings": cfg.tie_embeddings,
        "decoder parameters": cfg.decoder_parameters,
        "all parameters": models.count_parameters(cfg),
        "pruned with": None if record is None else record["method"].get("name"),
        "pruned from": None if record is None else record["source"],
        "layers": layers,
    }


def _widths(dims: Any) -> dict[str, int]:
    if isinstance(dims, models.MambaDims):
        return {UNITS["i"]: dims.inner}
    return {UNITS["k"]: dims.kv_heads, "query heads": dims.kv_heads * dims.q_per_kv, UNITS["f"]: dims.ff}


def _sizes(cfg: models.Config) -> dict[str, Any]:
    if isinstance(cfg, models.LlamaConfig):
        return {"head size": cfg.head_dim}
    loads = "; ".join(problems(cfg)) or "yes"
    return {"states": cfg.state, "convolution": cfg.conv, "rank of the time step": cfg.dt_rank, "transformers loads it": loads}


def run_methods(args: Methods) -> dict[str, Any]:
    """The registry as rows."""
    del args
    rows = [
        {"method": name, "reads": m.needs, "samples x length": f"{m.samples} x {m.length}" if m.needs != "weights" else "",
         "units": ",".join(m.units), "what": m.summary, "paper": m.paper}
        for name, m in methods.METHODS.items()
    ]  # fmt: skip
    return {"methods": rows}
