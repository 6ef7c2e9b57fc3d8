"""How far two programs made the same pruned model: the units that they keep, what they compensate with, the logits."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Outcome = Mapping[str, Any]  # `channels/I`, `groups/I`: what layer I keeps; `o/I`, `down/I`: weights or biases; `logits`


def kept(a: Outcome, b: Outcome, what: str) -> list[float]:
    """Intersection over union of what each layer keeps."""
    sets = [(set(a[name].tolist()), set(b[name].tolist())) for name in a if name.startswith(f"{what}/")]
    return [len(x & y) / len(x | y) if x | y else 1.0 for x, y in sets]


def largest(x: np.ndarray, y: np.ndarray) -> float:
    """Largest difference of two vectors, in norms of the second."""
    return float(np.abs(x - y).max() / max(np.linalg.norm(y), 1e-30))


def relative(x: np.ndarray, y: np.ndarray) -> float:
    """Norm of the difference, in norms of the second."""
    return float(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30))


def compensated(a: Outcome, b: Outcome, how: Callable[[np.ndarray, np.ndarray], float]) -> float | None:
    """The worst sublayer of those with the same units in both; None where there is no compensation."""
    found = []
    for array, units in (("o", "groups"), ("down", "channels")):
        for name in [n for n in a if n.startswith(f"{array}/")]:
            same = f"{units}/{name.split('/')[1]}"
            if np.array_equal(a[same], b[same]):
                found.append(how(a[name], b[name]))
    return max(found, default=None)


def agreement(a: Outcome, b: Outcome) -> dict[str, float | None]:
    """All of it; the second outcome is what the first is measured against."""
    units = {what: kept(a, b, what) for what in ("channels", "groups")}
    logits = (a["logits"] - b["logits"]) / b["logits"].std()
    return {
        "channels, lowest": min(units["channels"]),
        "channels, mean": float(np.mean(units["channels"])),
        "groups, lowest": min(units["groups"]),
        "groups, mean": float(np.mean(units["groups"])),
        "compensation": compensated(a, b, largest if "o/0" in a and a["o/0"].ndim == 1 else relative),
        "logits, largest": float(np.abs(logits).max()),
        "logits, rms": float(np.sqrt(np.square(logits).mean())),
    }
