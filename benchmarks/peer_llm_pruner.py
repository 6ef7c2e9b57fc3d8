"""Scoring and cutting by LLM-Pruner's method: jaxprune in a cold process, compilation included, against plain torch.

    python benchmarks/peer_llm_pruner.py [--model smollm2] [--calibration builtin] [--repeats 3] [--json FILE]

The setting is that of `jaxprune prune --ratio 0.2 --samples 10 --length 128 --protect-first 4 --protect-last 2`: element-wise
first order, local ranking. Both sides load the same float32 checkpoint and the same tokens, each run in a process
of its own, in turn. The torch side (`_llm_pruner.py`) is the algorithm alone, on transformers' LlamaForCausalLM, with as many
threads as torch takes by itself.

`score and cut` is the time from a loaded model and tokens to the smaller model, median; imports and loading are left out,
compilation is not. `processor` is the time of all cores behind it. `process` is the largest resident size of the whole process,
loading included. `agreement` is the overlap of the channels that the two keep:
intersection over union, layer by layer, and the same of the channels that they remove.

2026-11-22, 2 cores, `--repeats 1`, load 1.5:

    side      score and cut, s  / torch  processor, s  process, MiB  process / torch
    --------  ----------------  -------  ------------  ------------  ---------------
    torch     11.705            1.000    22.083                3594  1.000
    jaxprune  7.149             0.611    12.328                1586  0.441
    agreement of kept channels, per layer: lowest 0.9980, mean 0.9999
    agreement of removed channels, per layer: lowest 0.9961, mean 0.9998

On a machine with other load compare on one core (`taskset -c 1 python ...`): under load torch's two threads took 31 to 36 s of
processor time for what one does in 15, presumably waiting for each other in busy loops.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import _common
import tyro

from jaxprune.commands._common import peak_memory

RATIO, PROTECT_FIRST, PROTECT_LAST, SAMPLES, LENGTH = 0.2, 4, 2, 10, 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Compares the pruning of jaxprune with LLM-Pruner's algorithm in torch."""

    model: str = "smollm2"
    """Model to prune."""
    calibration: str = "builtin"
    """Text to score on: a file, FILE.jsonl:FIELD, hub:NAME, builtin."""
    repeats: int = 3
    """Processes of each side."""
    json: Path | None = None
    """Write the result to this file, too."""


def prepare(folder: Path, model: str, source: str) -> dict:
    """Writes what both sides load, in float32, and returns the setting in numbers of units."""
    import numpy as np

    from jaxprune import allocate, models, pipeline

    params, cfg = models.load(model, dtype="float32")
    models.save(folder, params, cfg)
    np.save(folder / "tokens.npy", _common.calibration(source, model, SAMPLES, LENGTH))
    constraints = pipeline.Settings(protect_first=PROTECT_FIRST, protect_last=PROTECT_LAST).constraints(cfg)
    widths = allocate.local((), cfg, round(RATIO * cfg.decoder_parameters), constraints)
    chosen = constraints.chosen(cfg)
    return dict(start=chosen.start, stop=chosen.stop, mlp=widths[chosen.start]["f"], kv=widths[chosen.start]["k"])


def with_jaxprune(folder: Path, setting: dict) -> dict:
    """One cold run of jaxprune, in this process."""
    import jax
    import numpy as np

    from jaxprune import models, pipeline

    jax.config.update("jax_platforms", "cpu")  # as the torch side
    params, cfg = models.load(folder)
    tokens = np.load(folder / "tokens.npy")
    jax.block_until_ready(params)
    begin, cpu = time.perf_counter(), time.process_time()
    settings = pipeline.Settings(method="taylor", ratio=RATIO, protect_first=PROTECT_FIRST, protect_last=PROTECT_LAST)
    pruned = pipeline.prune(params, cfg, tokens, settings)
    jax.block_until_ready(pruned.params)
    spent = dict(seconds=time.perf_counter() - begin, cpu=time.process_time() - cpu)
    kept = {i: pruned.plan.keep[i]["f"] for i in range(setting["start"], setting["stop"])}
    return dict(**spent, peak=peak_memory(), kept={i: [int(x) for x in k] for i, k in kept.items()})


def with_torch(folder: Path, setting: dict) -> dict:
    """One run of the torch program, in this process."""
    import _llm_pruner
    import numpy as np
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.from_numpy(np.load(folder / "tokens.npy").astype(np.int64))
    begin, cpu = time.perf_counter(), time.process_time()
    layers = range(setting["start"], setting["stop"])
    kept = _llm_pruner.prune(model, tokens, layers, setting["mlp"], setting["kv"])
    spent = dict(seconds=time.perf_counter() - begin, cpu=time.process_time() - cpu)
    return dict(**spent, peak=peak_memory(), kept={i: k.mlp.tolist() for i, k in kept.items()})


SIDES = dict(torch=with_torch, jaxprune=with_jaxprune)


def agreement(a: dict[str, list[int]], b: dict[str, list[int]], width: int) -> tuple[list[float], list[float]]:
    """Intersection over union of the kept and of the removed channels, per layer."""
    everything = set(range(width))
    pairs = [(set(a[i]), set(b[i])) for i in a]
    removed = [(everything - x, everything - y) for x, y in pairs]
    return tuple([len(x & y) / len(x | y) for x, y in sets] for sets in (pairs, removed))


def main(args: Args) -> None:
    """Runs both sides in turn, each time in a fresh process, and prints the table."""
    with tempfile.TemporaryDirectory() as folder:
        setting = _common.in_new_process(__file__, "--prepare", folder, args.model, args.calibration)
        runs: dict[str, list] = {side: [] for side in SIDES}
        for _ in range(args.repeats):
            for side in SIDES:
                runs[side].append(_common.in_new_process(__file__, "--run", side, folder, json.dumps(setting)))
        width = json.loads((Path(folder) / "config.json").read_text())["intermediate_size"]
    spent, cpu, peak = (
        {side: statistics.median(run[what] for run in found) for side, found in runs.items()}
        for what in ("seconds", "cpu", "peak")
    )
    rows = [
        {
            "side": side,
            "score and cut, s": spent[side],
            "/ torch": spent[side] / spent["torch"],
            "processor, s": cpu[side],
            "process, MiB": round(peak[side] / _common.MIB),
            "process / torch": peak[side] / peak["torch"],
        }
        for side in SIDES
    ]
    kept, removed = agreement(runs["torch"][0]["kept"], runs["jaxprune"][0]["kept"], width)
    title = (
        f"{args.model}, {args.calibration}, median of {args.repeats}; layers {setting['start']} to {setting['stop'] - 1} keep "
        f"{setting['mlp']} of {width} MLP channels and all {setting['kv']} KV groups"
    )
    _common.show(title, rows, args.json, kept=kept, removed=removed)
    for what, values in dict(kept=kept, removed=removed).items():
        print(f"agreement of {what} channels, per layer: lowest {min(values):.4f}, mean {statistics.mean(values):.4f}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--prepare", folder, model, source]:
            print(json.dumps(prepare(Path(folder), model, source)))
        case ["--run", side, folder, setting]:
            print(json.dumps(SIDES[side](Path(folder), json.loads(setting))))
        case _:
            main(tyro.cli(Args))
