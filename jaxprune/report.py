"""The report that a person looks at: figures as PNG files and one HTML page that needs no other file."""

import base64
import typing
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jaxprune import _plot
from jaxprune._figures import before_after_figure, loss_figure, widths_figure
from jaxprune._files import atomic_bytes, atomic_text
from jaxprune._metrics import rows
from jaxprune._scores_figure import scores_figure
from jaxprune.models import LayerDims, LlamaConfig
from jaxprune.models.units import unit_sizes

if typing.TYPE_CHECKING:
    import matplotlib.figure

__all__ = ["before_after_figure", "layer_rows", "loss_figure", "scores_figure", "widths_figure", "write_report"]

PARTS = ("notes", "verify", "layers", "prompt", "samples")
CAPTIONS = dict(
    before_after="Measured before and after; the dashed line is the first stage.",
    widths="Widths kept in each decoder layer; outlines are the dense model.",
    scores="Scores of the units in each decoder layer and the cut through them.",
    loss="Loss of recovery.",
)


def write_report(
    folder: str | Path, results: Mapping[str, Any], figures: Mapping[str, "matplotlib.figure.Figure"] | None = None
) -> Path:
    """Writes `report.html` and one PNG file a figure into a folder; what is missing in `results` is left out of the page.

    Args:
      folder: where to write; it is made if it does not exist.
      results: any of

        - `title`: text;
        - `command`: the command line as text;
        - `seed`, `method`, `calibration`, `settings`, `recovery`, `versions` and other facts: values or mappings of values;
        - `notes`: what the reader should know, one text each;
        - `stages`: {stage: {metric: number or mapping of numbers}}, the first stage being what the others are compared with;
        - `verify`: what `verify` found, with `exact` as the verdict;
        - `layers`: one mapping a layer, see `layer_rows`;
        - `prompt`, `samples`: the prompt, and {stage: generated text}.
      figures: name -> figure, shown in this order. The name is that of the file.

    Returns:
      The path of the page.

    Raises:
      OSError: the folder cannot be written to.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, figure in (figures or {}).items():
        image = _plot.png(figure)
        atomic_bytes(folder / f"{name}.png", image)
        caption = CAPTIONS.get(name, name.replace("_", " "))
        drawn.append(dict(caption=caption, data=base64.b64encode(image).decode()))
    stages = results.get("stages") or {}
    parts = {name: results.get(name) for name in PARTS}
    page = _template().render(
        parts
        | dict(facts=list(_facts(results)), stages=list(stages), metrics=rows(stages), figures=drawn, title=_title(results))
    )
    atomic_text(folder / "report.html", page)
    return folder / "report.html"


def layer_rows(dense_cfg: LlamaConfig, pruned_cfg: LlamaConfig) -> list[dict[str, Any]]:
    """The widths of each layer before and after, for tables.

    Args:
      dense_cfg: the model before pruning.
      pruned_cfg: the model after it, with as many layers.

    >>> from jaxprune.models import LayerDims, LlamaConfig
    >>> dense = LlamaConfig(vocab=64, d=32, head_dim=8, layers=(LayerDims(2, 2, 48),))
    >>> pruned = LlamaConfig(vocab=64, d=32, head_dim=8, layers=(LayerDims(1, 2, 40),))
    >>> layer_rows(dense, pruned)
    [{'layer': 0, 'KV groups': '1 of 2', 'query heads': '2 of 4', 'MLP channels': '40 of 48', 'parameters kept': '70.0 %'}]
    """
    paired = any(dims.pairs is not None for dims in (*dense_cfg.layers, *pruned_cfg.layers))
    return [
        {
            "layer": i,
            "KV groups": f"{after.kv_heads} of {before.kv_heads}",
            "query heads": f"{after.kv_heads * after.q_per_kv} of {before.kv_heads * before.q_per_kv}",
            **(_head(before, after, dense_cfg) if paired else {}),
            "MLP channels": f"{after.ff} of {before.ff}",
            "parameters kept": _share(pruned_cfg.matrix_parameters(after), dense_cfg.matrix_parameters(before)),
        }
        for i, (before, after) in enumerate(zip(dense_cfg.layers, pruned_cfg.layers, strict=True))
    ]


def _head(before: LayerDims, after: LayerDims, cfg: LlamaConfig) -> dict[str, str]:
    left, had = (2 * unit_sizes(cfg, dims)["h"] for dims in (after, before))
    return {"head dimensions": f"{left} of {had}"}


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""


def _title(results: Mapping[str, Any]) -> str:
    return str(results.get("title") or "Structured pruning report")


def _facts(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in results.items():
        if name not in (*PARTS, "stages", "title") and value is not None:
            yield name.replace("_", " "), _fact(value)


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{str(k).replace('_', ' ')} {_fact(v)}" for k, v in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        more = f" and {len(value) - 6} more" if len(value) > 6 else ""
        return ", ".join(map(_fact, value[:6])) + more or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["fact"] = _fact
    return environment.from_string(resources.files("jaxprune").joinpath("report.html.jinja").read_text(encoding="utf-8"))
