"""The configuration of a Mamba model whose layers may have different inner widths."""

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxprune.models import axes
from jaxprune.models._runs import Run, runs_of
from jaxprune.models.config import LlamaConfig

# Those that know Mamba.
COMMANDS = ("prune", "sparsify", "recover", "verify", "inspect", "export --check", "evaluate --text", "generate")
BIASES = ((), ("conv1d",), ("in_proj", "out_proj"), ("in_proj", "conv1d", "out_proj"))


class MambaDims(NamedTuple):
    """Width of one Mamba layer.

    Attributes:
      inner: channels of the mixer (axis `i`).
    """

    inner: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """A Mamba model (Mamba-1); hashable, so it can be a static argument of `jax.jit`.

    Layers may differ in their inner widths; state size, width of the convolution and rank of the time step are those of all.

    Attributes:
      vocab: vocabulary size.
      d: width of the residual stream.
      layers: widths of each layer.
      state: states of an inner channel (axis `n`).
      conv: tokens that the causal convolution reads (axis `w`).
      dt_rank: rank of the projection to the time step (axis `r`).
      norm_eps: added to the mean square inside RMSNorm.
      tie_embeddings: the output head is the transposed embedding.
      biases: which of in_proj, conv1d and out_proj add a bias; in_proj and out_proj do so together. dt_proj always does.
      residual_in_fp32: the residual stream is float32, whatever the weights are.
      bos_id, eos_ids, pad_id: special tokens, as far as the checkpoint names them.

    Raises:
      ValueError: no layers, a size below 1, or biases that no checkpoint has.

    Reference: Gu and Dao, `Mamba <https://arxiv.org/abs/2312.00752>`_, 2023, section 3.4, as `MambaForCausalLM` of transformers
    has it.

    >>> from jaxprune.models import MambaConfig, MambaDims
    >>> cfg = MambaConfig(vocab=64, d=32, dt_rank=2, layers=(MambaDims(64),) * 2 + (MambaDims(40),))
    >>> [(run.name, run.length, run.dims.inner) for run in cfg.runs], cfg.sizes(cfg.layers[2])["i"]
    ([('run_0', 2, 64), ('run_1', 1, 40)], 40)
    """

    vocab: int
    d: int
    layers: tuple[MambaDims, ...]
    dt_rank: int
    state: int = 16
    conv: int = 4
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    biases: tuple[str, ...] = ("conv1d",)
    residual_in_fp32: bool = True
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self):
        if self.biases not in BIASES:
            raise ValueError(f"biases: {self.biases} given; allowed are {', '.join(map(str, BIASES))}")
        if not self.layers:
            raise ValueError("layers: none given; a model needs at least one MambaDims")
        for name in ("vocab", "d", "dt_rank", "state", "conv"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}: {value} given; it must be at least 1")
        for i, dims in enumerate(self.layers):
            if dims.inner < 1:
                raise ValueError(f"layer {i}: {dims.inner} inner channels given; a Mamba layer keeps at least 1")

    @property
    def family(self) -> str:
        """The Hugging Face `model_type`."""
        return "mamba"

    @property
    def max_positions(self) -> int:
        """Longest sequence: there are no positions, so any will do."""
        return sys.maxsize

    @property
    def runs(self) -> tuple[Run, ...]:
        """Consecutive layers of equal widths, in order."""
        return runs_of(self.layers)

    @property
    def matrices(self) -> tuple[str, ...]:
        """The matrices of a layer."""
        return axes.MAMBA_MATRICES

    @property
    def units(self) -> str:
        """The axis letters of units that layers may differ in."""
        return "i"

    def with_widths(self, widths: Sequence[Mapping[str, int]]) -> "MambaConfig":
        """The model whose layers have other widths, by axis letter; letters that are absent keep theirs."""
        layers = zip(self.layers, widths, strict=True)
        return dataclasses.replace(self, layers=tuple(MambaDims(layer.get("i", dims.inner)) for dims, layer in layers))

    def sizes(self, dims: Any = None) -> dict[str, int]:
        """Axis letter -> size, of the whole model or of a layer."""
        out = dict(v=self.vocab, d=self.d, n=self.state, r=self.dt_rank, w=self.conv, p=2, e=self.dt_rank + 2 * self.state)
        return out if dims is None else out | dict(i=dims.inner)

    def layer_arrays(self, dims: Any) -> dict[str, str]:
        """Array name -> axes, of one layer."""
        del dims
        names = [f"{n}_bias" for n in (*self.biases, "dt_proj")]
        return axes.MAMBA | {n: letters for n, letters in axes.MAMBA_BIASES.items() if n in names}

    def top_arrays(self) -> dict[str, str]:
        """Array name -> axes, of what stands outside the layers."""
        return {n: ax for n, ax in axes.TOP.items() if not (n == "head" and self.tie_embeddings)}

    def matrix_parameters(self, dims: Any) -> int:
        """Parameters of the matrices of one layer: what a pruning ratio is a fraction of."""
        size = self.sizes(dims)
        return sum(math.prod(size[a] for a in axes.MAMBA[n]) for n in axes.MAMBA_MATRICES)

    @property
    def decoder_parameters(self) -> int:
        """Parameters of the matrices of all layers."""
        return sum(map(self.matrix_parameters, self.layers))


def only_llama(cfg: LlamaConfig | MambaConfig, what: str) -> LlamaConfig:
    """`cfg`, where only LLaMA-family models will do.

    Args:
      cfg: the model.
      what: what is asked for, for the error.

    Raises:
      ValueError: it is a Mamba.

    >>> from jaxprune.models import LayerDims, LlamaConfig
    >>> from jaxprune.models.mamba_config import only_llama
    >>> cfg = LlamaConfig(vocab=64, d=32, head_dim=8, layers=(LayerDims(2, 2, 48),))
    >>> only_llama(cfg, "recover") is cfg
    True
    """
    if isinstance(cfg, MambaConfig):
        raise ValueError(
            f"{what}: works with LLaMA-family models, this one is a MambaForCausalLM; for it there are {', '.join(COMMANDS)}"
        )
    return cfg
