"""The configuration of a LLaMA-family model whose layers may all differ."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxprune.models import axes
from jaxprune.models._runs import Run, runs_of

ACTIVATIONS = ("silu", "gelu_pytorch_tanh")  # as transformers calls them


class LayerDims(NamedTuple):
    """Widths of one decoder layer; 0 means that this sublayer is gone.

    Attributes:
      kv_heads: key/value heads (axis `k`).
      q_per_kv: query heads for each key/value head (axis `g`).
      ff: MLP channels (axis `f`).
      pairs: rotary pairs that every head of the layer still has, ascending, or None for all: pair i is dimensions i and
        i + head_dim / 2 of the head before anything was cut.
    """

    kv_heads: int
    q_per_kv: int
    ff: int
    pairs: tuple[int, ...] | None = None

    @property
    def widths(self) -> tuple[int, int, int]:
        """The three numbers, without the pairs."""
        return self[:3]

    def __repr__(self) -> str:
        shown = dict(zip(self._fields, self, strict=True))
        return f"LayerDims({', '.join(f'{name}={value}' for name, value in shown.items() if value is not None)})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Hashable, so it can be a static argument of `jax.jit`.

    Attributes:
      vocab: vocabulary size.
      d: width of the residual stream.
      head_dim: size of one head.
      layers: widths of each decoder layer.
      activation: of the MLP's gate, one of `ACTIVATIONS`.
      norm_eps: added to the mean square inside RMSNorm.
      rope_theta: base of the rotary frequencies.
      rope_scaling: Hugging Face's rope scaling settings as sorted pairs, e.g. `(("factor", 8.0), ("rope_type", "llama3"))`.
      max_positions: longest sequence that the model was trained for.
      tie_embeddings: the output head is the transposed embedding.
      biases: which of q k v o gate up down add a bias.
      sliding_window: a token attends to at most this many last tokens (Mistral), or None.
      windowed: does `sliding_window` hold in this layer? One for each layer, empty where it holds in all (Gemma 2 and 3).
      local_rope_theta: base of the rotary frequencies of layers with a window, which are not scaled (Gemma 3), or None where
        it is that of all layers.
      score_width: attention scores are divided by its root, or None for `head_dim`.
      score_cap: attention scores s become `score_cap * tanh(s / score_cap)` (Gemma 2), or None.
      logit_cap: the same of logits.
      partial_rotary: fraction of a head that rotates: its first `rotary_dim` dimensions (GLM).
      qk_norm: each query and each key goes through an RMSNorm over its head dimension before it rotates (Qwen3).
      post_norms: what a sublayer adds to the residual stream goes through an RMSNorm of its own before (GLM-4-0414).
      norm_offset: the gain of an RMSNorm is one plus its array (Gemma).
      embed_scale: what embeddings are multiplied by before the first layer, in the dtype of the weights (Gemma), or None.
      shortcuts: every layer has two matrices [d, d] that the residual stream is multiplied by before its attention and its MLP
        add to it, see `jaxprune.recovery.slice_gpt`.
      norm_width: what RMSNorm divides the sum of squares by, or None for the width of what it norms.
      family: the Hugging Face `model_type` that it was loaded from, a key of `jaxprune.models._families.FAMILIES`.
      bos_id, eos_ids, pad_id: special tokens, as far as the checkpoint names them.
    """

    vocab: int
    d: int
    head_dim: int
    layers: tuple[LayerDims, ...]
    activation: str = "silu"
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: tuple[tuple[str, Any], ...] = ()
    max_positions: int = 2048
    tie_embeddings: bool = False
    biases: tuple[str, ...] = ()
    sliding_window: int | None = None
    windowed: tuple[bool, ...] = ()
    local_rope_theta: float | None = None
    score_width: int | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    partial_rotary: float = 1.0
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: bool = False
    embed_scale: float | None = None
    shortcuts: bool = False
    norm_width: int | None = None
    family: str = "llama"
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self):
        unknown = set(self.biases) - set(axes.MATRICES)
        if unknown:
            raise ValueError(f"biases: {sorted(unknown)} given; allowed are {axes.MATRICES}")
        if self.post_norms and (added := [n for n in ("o", "down") if n in self.biases]):
            raise ValueError(f"biases: {added} given with post_norms; a bias that is normalised afterwards is not supported")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: {self.activation!r} given; allowed are {', '.join(ACTIVATIONS)}")
        if not self.layers:
            raise ValueError("layers: none given; a model needs at least one LayerDims")
        if self.windowed and len(self.windowed) != len(self.layers):
            raise ValueError(f"windowed: {len(self.windowed)} given for {len(self.layers)} layers; one each is needed, or none")
        if any(self.windowed) and self.sliding_window is None:
            raise ValueError("windowed: layers with a window given without sliding_window; give its length")
        if self.local_rope_theta is not None and not self.windowed:
            raise ValueError("local_rope_theta: given without windowed, which says in which layers it holds")
        for name in ("score_width", "score_cap", "logit_cap", "local_rope_theta", "embed_scale"):
            if (value := getattr(self, name)) is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}: {value} given; it must be a positive number, or None")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: {self.head_dim} given; rotary embeddings need an even number")
        if not 0 < self.partial_rotary <= 1 or self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(
                f"partial_rotary: {self.partial_rotary} of heads of {self.head_dim} given; "
                "it must be above 0, at most 1, and make an even number of dimensions rotate"
            )
        if self.norm_width is not None and self.norm_width < 1:
            raise ValueError(f"norm_width: {self.norm_width} given; it must be at least 1, or None for the width of the stream")
        if any(n < 0 for dims in self.layers for n in dims.widths):
            raise ValueError(f"layers: negative widths in {self.layers}; use 0 for a sublayer that is gone")
        if any(dims.pairs is not None for dims in self.layers):
            self._check_pairs()

    def _check_pairs(self) -> None:
        if self.qk_norm or self.partial_rotary != 1:
            raise ValueError(
                f"layers: rotary pairs given for a model of family {self.family}, whose heads are normed or rotate in part; "
                "remove KV groups instead"
            )
        for i, dims in enumerate(self.layers):
            if dims.pairs is None:
                continue
            allowed = list(dims.pairs) == sorted(set(dims.pairs) & set(range(self.head_dim // 2)))
            if not dims.pairs or not dims.kv_heads or not allowed:
                raise ValueError(
                    f"layers: rotary pairs {dims.pairs} of layer {i} given; allowed are ascending numbers from 0 to "
                    f"{self.head_dim // 2 - 1}, at least one, and None for all of them or for a layer without attention"
                )

    @property
    def score_scale(self) -> float:
        """Factor on attention scores."""
        return (self.score_width or self.head_dim) ** -0.5

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that rotate."""
        return int(self.head_dim * self.partial_rotary)

    @property
    def runs(self) -> tuple[Run, ...]:
        """Consecutive layers of equal widths, in order.

        >>> from jaxprune.models import LayerDims, LlamaConfig
        >>> cfg = LlamaConfig(vocab=64, d=32, head_dim=8, layers=(LayerDims(2, 2, 48),) * 3 + (LayerDims(1, 2, 48),))
        >>> [(run.name, run.start, run.length) for run in cfg.runs]
        [('run_0', 0, 3), ('run_1', 3, 1)]
        """
        return runs_of(self.layers, self.windowed)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Last tokens that each layer sees, or None for all."""
        return tuple(self.sliding_window if held else None for held in self.windowed or (True,) * len(self.layers))

    @property
    def matrices(self) -> tuple[str, ...]:
        """The matrices of a layer, as far as it has them."""
        return axes.MATRICES

    @property
    def units(self) -> str:
        """The axis letters of units that layers may differ in, and that scores know."""
        return "kf"

    def with_widths(self, widths: Sequence[Mapping[str, int]]) -> "LlamaConfig":
        """The model whose layers have other widths, by axis letter; letters that are absent keep theirs."""

        def narrow(dims: LayerDims, layer: Mapping[str, int]) -> LayerDims:
            kv = layer.get("k", dims.kv_heads)
            return LayerDims(kv, dims.q_per_kv if kv else 0, layer.get("f", dims.ff), dims.pairs if kv else None)

        return dataclasses.replace(self, layers=tuple(narrow(*pair) for pair in zip(self.layers, widths, strict=True)))

    def sizes(self, dims: Any = None) -> dict[str, int]:
        """Axis letter -> size, of the whole model or of a layer."""
        out = dict(v=self.vocab, d=self.d, h=self.head_dim)
        if dims is None:
            return out
        head = self.head_dim if dims.pairs is None else 2 * len(dims.pairs)
        return out | dict(k=dims.kv_heads, g=dims.q_per_kv, f=dims.ff, h=head)

    def layer_arrays(self, dims: Any) -> dict[str, str]:
        """Array name -> axes, of one layer with these widths.

        What acts on the residual stream itself, a bias or a shortcut, outlives its sublayer.

        >>> from jaxprune.models import LayerDims, LlamaConfig
        >>> cfg = LlamaConfig(vocab=64, d=32, head_dim=8, layers=(LayerDims(2, 2, 48),), biases=("o",))
        >>> cfg.layer_arrays(LayerDims(0, 0, 48))
        {'mlp_norm': 'd', 'gate': 'df', 'up': 'df', 'down': 'fd', 'o_bias': 'd'}
        """
        post = axes.POST_NORMS if self.post_norms else {}
        attention = axes.ATTENTION | (axes.QK_NORMS if self.qk_norm else {}) | {n: a for n, a in post.items() if n[0] == "a"}
        mlp = axes.MLP | {n: a for n, a in post.items() if n[0] == "m"}
        weights = (attention if dims.kv_heads else {}) | (mlp if dims.ff else {})
        biases = {f"{n}_bias": axes.BIASES[f"{n}_bias"] for n in axes.MATRICES if n in self.biases}
        gone = ("" if dims.kv_heads else "k") + ("" if dims.ff else "f")
        shortcuts = axes.SHORTCUTS if self.shortcuts else {}
        return weights | {n: ax for n, ax in biases.items() if not set(ax) & set(gone)} | shortcuts

    def top_arrays(self) -> dict[str, str]:
        """Array name -> axes, of what stands outside the layers."""
        return {n: ax for n, ax in axes.TOP.items() if not (n == "head" and self.tie_embeddings)}

    def matrix_parameters(self, dims: Any) -> int:
        """Parameters of the matrices of one layer, shortcuts included: what a pruning ratio is a fraction of."""
        size = self.sizes(dims)
        attention = (2 + 2 * size["g"]) * size["k"] * size["h"]
        return size["d"] * (attention + 3 * size["f"] + len(axes.SHORTCUTS) * self.shortcuts * size["d"])

    @property
    def decoder_parameters(self) -> int:
        """Parameters of the matrices of all layers, shortcuts included."""
        return sum(map(self.matrix_parameters, self.layers))
