"""Profile `maxtext`: parameters stacked over layers in an Orbax checkpoint, as MaxText keeps those of LLaMA and Mistral.

The tree, with heads `n` and every array's axes in the order of the file; `l`, the layer, is always the second::

    {"params": {"params": {"token_embedder": {"embedding": vd},
                           "decoder": {"layers": {"pre_self_attention_layer_norm": {"scale": dl},
                                                  "self_attention": {"query": {"kernel": dlnh}, "key": {"kernel": dlkh},
                                                                     "value": {"kernel": dlkh}, "out": {"kernel": nlhd}},
                                                  "post_self_attention_layer_norm": {"scale": dl},
                                                  "mlp": {"wi_0": {"kernel": dlf}, "wi_1": {"kernel": dlf},
                                                          "wo": {"kernel": fld}}},
                                       "decoder_norm": {"scale": d},
                                       "logits_dense": {"kernel": dv}}}}}

`wi_0` is the gate, `wi_1` the other input of the MLP. Queries are divided by the square root of the head's size, because
MaxText's attention does not scale. With tied embeddings there is no `logits_dense` (`logits_via_embedding`). Without rotary
scaling the two halves of a head are rotated with each other, as here; with that of Llama 3.1 neighbours are, so the dimensions
of queries and keys change places.

Certain, because it is read off the sources of MaxText 0.2.5: names, axes, the scale and both rotary layouts (the converter's
`param_mapping.py`, `llama_or_mistral_ckpt.py`, `embeddings.py`), and that `load_parameters_path` names the folder `0/items`. A
reconstruction: that MaxText reads what the Orbax of this environment writes, and that the settings in `maxtext.yml` suffice.
MaxText itself was not run. It has biases for Qwen2 only; they are refused.
"""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxprune.models import _stored
from jaxprune.models._family import beyond_llama
from jaxprune.models.config import LlamaConfig
from jaxprune.models.export._plain import cut_heads, kept, shapes_of
from jaxprune.models.export.hf import refuse
from jaxprune.models.params import shapes
from jaxprune.models.types import Params

LLAMA31 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
PLACES = dict(  # array -> path below `decoder/layers`, and its axes there
    attn_norm=("pre_self_attention_layer_norm/scale", "dl"),
    q=("self_attention/query/kernel", "dlnh"),
    k=("self_attention/key/kernel", "dlkh"),
    v=("self_attention/value/kernel", "dlkh"),
    o=("self_attention/out/kernel", "nlhd"),
    mlp_norm=("post_self_attention_layer_norm/scale", "dl"),
    gate=("mlp/wi_0/kernel", "dlf"),
    up=("mlp/wi_1/kernel", "dlf"),
    down=("mlp/wo/kernel", "fld"),
)
TOP = dict(embed="token_embedder/embedding", norm="decoder/decoder_norm/scale", head="decoder/logits_dense/kernel")


def problems(cfg: LlamaConfig) -> list[str]:
    """Why this model does not fit into stacked parameters; empty if it does.

    >>> from jaxprune.models import LayerDims, LlamaConfig
    >>> from jaxprune.models.export import maxtext
    >>> layers = (LayerDims(2, 2, 40), LayerDims(0, 0, 0), LayerDims(2, 2, 40))
    >>> maxtext.problems(LlamaConfig(vocab=64, d=32, head_dim=8, layers=layers))
    []
    >>> maxtext.problems(LlamaConfig(vocab=64, d=32, head_dim=8, layers=(LayerDims(2, 2, 40),), biases=("q",)))
    ['biases of q: the layout of MaxText for them is not known here; prune a model without biases, or recover without them']
    """
    why = []
    layers, shown = shapes_of(cfg)
    if len(layers) > 1:
        why.append(
            f"layers have {len(layers)} different shapes ({shown}), and stacked parameters have one; pad them "
            f"(jaxprune.models.export.hf_padded.pad), or prune all layers to one shape"
        )
    elif not layers or not min(next(iter(layers)).widths):
        why.append(f"MaxText's layers have an attention and an MLP; here {shown or 'nothing is left of any layer'}")
    if cfg.biases:
        why.append(
            f"biases of {', '.join(cfg.biases)}: the layout of MaxText for them is not known here; prune a model without "
            f"biases, or recover without them"
        )
    if beyond := beyond_llama(cfg):
        why.append(f"{', '.join(beyond)} of family {cfg.family}, whose layout in MaxText is not known here")
    why += cut_heads(cfg)
    if cfg.shortcuts or cfg.norm_width is not None:
        why.append(
            "the residual stream is rotated (shortcuts, norm_width), which MaxText has no place for; prune without SliceGPT"
        )
    if cfg.sliding_window is not None:
        why.append(f"sliding_window {cfg.sliding_window}: MaxText's LLaMA and Mistral attend to all tokens; set it to None")
    scaling = dict(cfg.rope_scaling)
    if scaling and {key: scaling.get(key) for key in LLAMA31} != LLAMA31:
        given = ", ".join(f"{key}={value}" for key, value in cfg.rope_scaling if key in (*LLAMA31, "rope_type"))
        why.append(f"rope scaling {given}: MaxText knows that of Llama 3.1 only, {LLAMA31}")
    return why


def tree(params: Params, cfg: LlamaConfig) -> dict[str, Any]:
    """The nested dicts of the module's docstring below `params/params`, as numpy arrays in the dtypes of `params`.

    Args:
      params: the tree of `init`.
      cfg: what `params` was made with. Layers of which nothing is left are left out.

    Raises:
      ValueError: `problems(cfg)` is not empty, or `params` is not a tree of `cfg`.

    >>> import jax
    >>> from jaxprune import models
    >>> from jaxprune.models.export import maxtext
    >>> cfg = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 40),) * 3)
    >>> decoder = maxtext.tree(models.init(jax.random.key(0), cfg), cfg)["decoder"]
    >>> decoder["layers"]["self_attention"]["query"]["kernel"].shape, decoder["layers"]["mlp"]["wo"]["kernel"].shape
    ((32, 3, 4, 8), (40, 3, 32))
    """
    from flax import traverse_util

    refuse("maxtext", problems(cfg))
    _stored.check_tree(params, cfg)
    flat = {TOP[name]: np.asarray(params[name]) for name in cfg.top_arrays()}
    runs = [params[run.name] for run in cfg.runs if run.name in params]
    for name, (path, _) in PLACES.items():
        flat[f"decoder/layers/{path}"] = _stacked(name, np.concatenate([np.asarray(run[name]) for run in runs]), cfg)
    return traverse_util.unflatten_dict(flat, sep="/")


def _stacked(name: str, x: np.ndarray, cfg: LlamaConfig) -> np.ndarray:
    if name == "q":
        x = (x.astype(np.float32) / math.sqrt(cfg.head_dim)).astype(x.dtype)
        x = x.reshape(*x.shape[:2], -1, cfg.head_dim)
    if name == "o":
        x = x.reshape(len(x), -1, *x.shape[3:])
    if name in ("q", "k") and cfg.rope_scaling:  # pairs (i, i + h/2) become neighbours
        x = np.stack(np.split(x, 2, -1), -1).reshape(x.shape)
    return np.ascontiguousarray(np.moveaxis(x, 0, 1))


def write(folder: str | Path, params: Params, cfg: LlamaConfig, tokenizer: Any = None) -> None:
    """Writes the checkpoint `0/items`, `maxtext.yml` with the settings that describe the model, and the tokenizer's files.

    Args:
      folder: made if it is not there.
      params, cfg: as in `tree`.
      tokenizer: of transformers, or None.

    Raises:
      ValueError: as `tree`.
    """
    import orbax.checkpoint as ocp

    arrays = tree(params, cfg)
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder / "0" / "items", {"params": {"params": arrays}})
    lines = [f"{key}: {str(value).lower() if isinstance(value, bool) else value}" for key, value in settings(cfg).items()]
    (folder / "maxtext.yml").write_text("\n".join([*lines, ""]), encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def settings(cfg: LlamaConfig) -> dict[str, Any]:
    """The settings of MaxText that describe the model, by the names of its `base.yml`."""
    alive = list(kept(cfg).values())
    return dict(
        decoder_block="llama2",
        vocab_size=cfg.vocab,
        base_emb_dim=cfg.d,
        base_num_decoder_layers=len(alive),
        base_num_query_heads=alive[0].kv_heads * alive[0].q_per_kv,
        base_num_kv_heads=alive[0].kv_heads,
        base_mlp_dim=alive[0].ff,
        head_dim=cfg.head_dim,
        mlp_activations=["silu", "linear"],
        normalization_layer_epsilon=cfg.norm_eps,
        rope_max_timescale=int(cfg.rope_theta) if cfg.rope_theta.is_integer() else cfg.rope_theta,
        rope_type="llama3.1" if cfg.rope_scaling else "default",
        rope_use_scale=bool(cfg.rope_scaling),
        logits_via_embedding=cfg.tie_embeddings,
        normalize_embedding_logits=False,  # MaxText would divide the logits of tied embeddings by sqrt(d)
        scan_layers=True,
        param_scan_axis=1,
    )


def predicted_bytes(cfg: LlamaConfig, dtype: Any) -> int:
    """Bytes of the parameters; Orbax compresses them, so its files may be smaller.

    >>> from jaxprune.models import LayerDims, LlamaConfig
    >>> from jaxprune.models.export import maxtext
    >>> maxtext.predicted_bytes(LlamaConfig(vocab=64, d=32, head_dim=8, layers=(LayerDims(2, 2, 40),)), "bfloat16")
    22208
    """
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes(cfg, dtype)))
