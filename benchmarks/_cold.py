"""Programs that prune a folder in a process of their own, from start to exit, and write the result."""

import os
import sys
from pathlib import Path

import numpy as np

RATIO, FIRST, LAST = 0.2, 4, 2  # LLM-Pruner's setting
DENSE, TOKENS = "dense", "tokens.npy"


def prepare(folder: Path, model: str, source: str, samples: int, length: int) -> list[int]:
    """Writes what all programs read, the model in float32 and the tokens; returns how many tokens."""
    import _sides

    shape = _sides.prepare(folder / DENSE, model, source, {"taylor": (samples, length)})["taylor"]
    (folder / DENSE / "taylor.npy").rename(folder / TOKENS)
    return shape


def command(program: str, folder: Path, out: str, torch_pruning: Path | None) -> list[str]:
    """The command line of a program."""
    dense, tokens, place = str(folder / DENSE), str(folder / TOKENS), str(folder / out)
    if program != "jaxprune":
        return [sys.executable, __file__, program, dense, tokens, place, str(torch_pruning)]
    samples, length = np.load(tokens, mmap_mode="r").shape
    flags = dict(method="taylor", ratio=RATIO, protect_first=FIRST, protect_last=LAST, samples=samples, length=length)
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "jaxprune", "prune", dense, "--out", place, "--calibration", tokens, *words]


def children() -> float:
    """Processor seconds of all processes that this one has waited for."""
    times = os.times()
    return times.children_user + times.children_system


def main(program: str, dense: str, tokens: str, out: str, library: str) -> None:
    """Loads, prunes and saves with torch; `library` is the folder of Torch-Pruning."""
    import _torch_gradient
    import _torch_llama
    import torch
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(dense, dtype=torch.float32)
    batch = torch.from_numpy(np.load(tokens).astype(np.int64))
    layers = range(FIRST, len(model.model.layers) - LAST)
    if program == "torch":
        _torch_gradient.llm_pruner(model, batch, _torch_llama.Goal(RATIO, layers))
    else:
        sys.path.append(library)
        import _torch_pruning

        _torch_pruning.taylor(model, batch, RATIO * len(model.model.layers) / len(layers), layers)
    Path(out).mkdir()
    torch.save(model.state_dict(), Path(out) / "model.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
