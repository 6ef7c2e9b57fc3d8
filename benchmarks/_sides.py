"""One side of a comparison with a torch program: a cold run in this process, what it cost and what it made."""

import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _common
import numpy as np

TORCH = {
    "flap": "_torch_activation.flap",
    "nirvana": "_torch_gradient.nirvana",
    "numerical": "_torch_numerical.numerical",
    "wanda-sp": "_torch_activation.wanda_sp",
    "shortgpt": "_torch_activation.shortgpt",
    "slicegpt": "_torch_slicegpt.slicegpt",
    "hywia": "_torch_gradient.hywia",
    "llm-bip": "_torch_activation.llm_bip",
    "taylor": "_torch_gradient.llm_pruner",
}
COMPENSATED = ("flap", "numerical")
SHOWN = 2  # sequences whose logits are compared


def prepare(folder: Path, model: str, source: str, sizes: dict[str, tuple[int, int]]) -> dict[str, list[int]]:
    """Writes what both sides load, the model in float32 and the tokens of each method, and returns how many tokens."""
    from jaxprune import methods, models

    models.save(folder, *models.load(model, dtype="float32"))
    found = {}
    for name, (samples, length) in sizes.items():
        own = methods.find(name)
        tokens = _common.calibration(source, model, samples or own.samples, length or own.length, or_fewer=True)
        np.save(folder / f"{name}.npy", tokens)
        found[name] = list(tokens.shape)
    return found


def with_jaxprune(folder: Path, method: str, setting: dict[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """One cold run of jaxprune, in this process."""
    import jax

    from jaxprune import methods, models, pipeline

    jax.config.update("jax_platforms", "cpu")  # as the torch side
    params, cfg = models.load(folder)
    tokens = np.load(folder / f"{method}.npy")
    settings = pipeline.Settings(method=method, units=methods.default_units(method), **setting)
    jax.block_until_ready(params)

    def program() -> pipeline.Pruned:
        pruned = pipeline.prune(params, cfg, tokens, settings)
        jax.block_until_ready(pruned.params)
        return pruned

    pruned, cost = _measured(program)
    outcome: dict[str, Any] = {"logits": models.apply(pruned.params, tokens[:SHOWN], pruned.cfg)}
    for i, keep in enumerate(pruned.plan.keep):
        outcome |= {f"channels/{i}": keep["f"], f"groups/{i}": keep["k"]}
    if method in COMPENSATED:
        for run in pruned.cfg.runs:
            arrays = pruned.params[run.name]
            for name in ("o", "down"):
                for j in range(run.length):
                    new = arrays[f"{name}_bias"][j] if settings.target == "bias" else arrays[name][j].reshape(-1, cfg.d)
                    outcome[f"{name}/{run.start + j}"] = new
    return cost | dict(ratio=1 - pruned.cfg.decoder_parameters / cfg.decoder_parameters), outcome


def with_torch(folder: Path, method: str, setting: dict[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """One run of the torch program, in this process, which does not import jaxprune."""
    import _torch_llama
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.from_numpy(np.load(folder / f"{method}.npy").astype(np.int64))
    module, function = TORCH[method].split(".")
    prune = getattr(importlib.import_module(module), function)
    layers = range(setting["protect_first"], len(model.model.layers) - setting["protect_last"])
    kept, cost = _measured(lambda: prune(model, tokens, _torch_llama.Goal(setting["ratio"], layers)))
    with torch.no_grad():
        outcome: dict[str, Any] = {"logits": model(tokens[:SHOWN], use_cache=False).logits}
    for i, keep in enumerate(kept):
        outcome |= {f"channels/{i}": keep.mlp, f"groups/{i}": keep.kv}
    if method in COMPENSATED:
        for i, layer in enumerate(model.model.layers):
            for name, linear in dict(o=layer.self_attn.o_proj, down=layer.mlp.down_proj).items():
                outcome[f"{name}/{i}"] = (linear.weight.T if linear.bias is None else linear.bias).detach()
    return cost, outcome


SIDES = dict(torch=with_torch, jaxprune=with_jaxprune)


def _measured(program: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What a program returns, and what the process spent."""
    begin, cpu = time.perf_counter(), time.process_time()
    made = program()
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    return made, dict(seconds=seconds, cpu=cpu, peak=_common.peak_memory())


def run(side: str, folder: Path, method: str, setting: dict[str, Any]) -> dict[str, float]:
    """One side once: its cost is returned, what it made is written beside the model."""
    cost, outcome = SIDES[side](folder, method, setting)
    np.savez(folder / f"{method}-{side}.npz", **{name: np.asarray(x) for name, x in outcome.items()})
    return cost
