"""Pruning by the methods of papers: jaxprune in a cold process, compilation included, against plain torch.

    python benchmarks/peer_methods.py [--methods flap nirvana ...] [--ratio 0.2] [--samples N] [--length N] [--repeats 1]
        [--model smollm2] [--calibration builtin] [--protect-first 0] [--protect-last 0] [--json FILE]

Both sides load the same float32 checkpoint and the same tokens, each run in a process of its own, in turn. The torch side
(`_torch_*.py`) is the algorithm alone, on transformers' LlamaForCausalLM, with as many threads as torch takes by itself. Tokens
are those of the method's paper unless given; the builtin text has fewer than FLAP's. LLM-Pruner's setting is
`--methods taylor --protect-first 4 --protect-last 2`.

`s` is the time from a loaded model and tokens to the pruned model (score, allocate, compensate, cut), median; imports and
loading are left out, compilation is not. `processor` is the time of all cores behind it. `MiB` is the largest resident size of
the whole process by then, loading included. Agreement: `channels` and `groups` are intersection over union of what a layer
keeps; `compensation` is that of the worst sublayer with the same units, for FLAP the largest difference of the biases in their
norms, for Numerical Pruning the relative difference of the weights; `logits` are differences in standard deviations of those of
torch.

2026-11-22, 2 cores, `--repeats 1`; `load` is the average of the minute before: the rows with more than 2 ran beside other
programs and are to be run again on an idle machine. shortgpt, slicegpt, hywia and llm-bip on the builtin text, the others on
WikiText-2; taylor with LLM-Pruner's setting:

    method     tokens     load  torch, s  jaxprune, s  / torch  torch, MiB  jaxprune, MiB  / torch  channels: lowest, mean
    ---------  ---------  ----  --------  -----------  -------  ----------  -------------  -------  ----------------------
    wanda-sp   32 x 128   1.4   14.124    9.672        0.685    1288        1593           1.237    1.0000, 1.0000
    taylor     10 x 128   1.4   14.218    7.724        0.543    3598        1635           0.455    1.0000, 1.0000
    flap       128 x 128  6.2   167.887   86.202       0.513    1177        2458           2.088    1.0000, 1.0000
    nirvana    32 x 128   7.0   132.733   67.097       0.506    7990        1955           0.245    1.0000, 1.0000
    numerical  8 x 256    6.8   79.981    80.649       1.008    1641        2259           1.377    1.0000, 1.0000
    shortgpt   8 x 256    4.5   17.704    7.877        0.445    1009        1335           1.322    1.0000, 1.0000
    slicegpt   8 x 256    4.5   152.265   93.146       0.612    1827        1797           0.984
    hywia      8 x 128    3.3   149.180   16.278       0.109    2606        1704           0.654    0.9982, 0.9999
    llm-bip    8 x 128    3.3   11.240    6.612        0.588    1289        1452           1.127    1.0000, 1.0000

The groups agree in every layer. Biases of FLAP differ by 2e-7 and weights of Numerical Pruning by 2e-4. The logits of SliceGPT
differ by at most 0.39; jaxprune's own move by at most 0.14 when it sums second moments in float64, as the torch program and the
released code do.

On a machine with other load compare on one core (`taskset -c 1 python ...`): at load 3.5 NumPy's Cholesky factor of a matrix of
1400 x 1400 took 0.72 s with two threads and 0.04 s with `OPENBLAS_NUM_THREADS=1`.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import _agreement
import _common
import _sides
import numpy as np
import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Compares pruning by jaxprune with the same algorithms in torch."""

    methods: tuple[str, ...] = tuple(_sides.TORCH)
    """Names of `jaxprune methods` that have a torch program."""
    ratio: float = 0.2
    """Fraction of the decoder's parameters to remove."""
    samples: int = 0
    """Sequences to score on; 0 takes the method's own, or as many as the text has."""
    length: int = 0
    """Tokens in each; 0 takes the method's own."""
    protect_first: int = 0
    """Layers at the beginning that are left alone."""
    protect_last: int = 0
    """Layers at the end that are left alone."""
    model: str = "smollm2"
    """Model to prune."""
    calibration: str = "builtin"
    """Text to score on: a file, FILE.jsonl:FIELD, hub:NAME, builtin."""
    repeats: int = 1
    """Processes of each side."""
    json: Path | None = None
    """Write the result to this file, too."""


def compare(folder: Path, method: str, args: Args) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row of costs and the row of agreement of a method."""
    setting = json.dumps(dict(ratio=args.ratio, protect_first=args.protect_first, protect_last=args.protect_last))
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in _sides.SIDES}
    for _ in range(args.repeats):
        for side in _sides.SIDES:
            runs[side].append(_common.in_new_process(__file__, "--run", side, folder, method, setting))
    costs: dict[str, Any] = {}
    for what, unit, scale in (("seconds", "s", 1), ("cpu", "processor, s", 1), ("peak", "MiB", _common.MIB)):
        torch, ours = (statistics.median(r[what] for r in runs[side]) / scale for side in _sides.SIDES)
        costs |= {f"torch, {unit}": torch, f"jaxprune, {unit}": ours, f"{unit.split(',')[0]} / torch": ours / torch}
    outcomes = [dict(np.load(folder / f"{method}-{side}.npz")) for side in ("jaxprune", "torch")]
    return costs, {"removed": runs["jaxprune"][0]["ratio"]} | _agreement.agreement(*outcomes)


def main(args: Args) -> None:
    """Runs both sides in turn, each time in a fresh process, and prints the tables."""
    if unknown := set(args.methods) - _sides.TORCH.keys():
        raise SystemExit(f"methods: {', '.join(sorted(unknown))} given; allowed are {', '.join(_sides.TORCH)}")
    costs, agreed = [], []
    with tempfile.TemporaryDirectory() as folder:
        sizes = json.dumps({name: (args.samples, args.length) for name in args.methods})
        tokens = _common.in_new_process(__file__, "--prepare", folder, args.model, args.calibration, sizes)
        for name in args.methods:
            print(f"{name} ...", file=sys.stderr, flush=True)
            cost, same = compare(Path(folder), name, args)
            costs.append({"method": name, "tokens": "{} x {}".format(*tokens[name])} | cost)
            agreed.append({"method": name} | same)
    _common.show(f"{args.model}, {args.calibration}, median of {args.repeats}", costs, args.json, agreement=agreed)
    small = ("compensation", "logits, largest", "logits, rms")
    shown = [{k: f"{v:.0e}" if k in small and v is not None else v for k, v in row.items()} for row in agreed]
    _common.show("agreement", shown, None)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--prepare", folder, model, source, sizes]:
            print(json.dumps(_sides.prepare(Path(folder), model, source, json.loads(sizes))))
        case ["--run", side, folder, method, setting]:
            print(json.dumps(_sides.run(side, Path(folder), method, json.loads(setting))))
        case _:
            main(tyro.cli(Args))
