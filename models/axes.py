"""The axes table: one letter names one axis everywhere, and the table is the dependency graph of surgery.

============  ==========================================
`d`           residual width
`k`           key/value head (its group of query heads goes with it)
`g`           query head inside its group
`h`           head dimension
`f`           MLP channel
`v`           vocabulary
`l b t s`     layer, batch, time (query), time (key)
============  ==========================================

Removing a unit means taking the kept positions along its letter, in every array whose axes contain that letter. A KV group
therefore takes its query heads and its rows of `o` with it by construction.

A model whose residual stream was rotated (SliceGPT) has two matrices more in each layer, its shortcuts: they turn the stream
from the axes that a sublayer reads into those that it writes.
"""

ATTENTION = dict(attn_norm="d", q="dkgh", k="dkh", v="dkh", o="kghd")
QK_NORMS = dict(q_norm="h", k_norm="h")
POST_NORMS = dict(attn_post_norm="d", mlp_post_norm="d")
MLP = dict(mlp_norm="d", gate="df", up="df", down="fd")
BIASES = dict(q_bias="kgh", k_bias="kh", v_bias="kh", o_bias="d", gate_bias="f", up_bias="f", down_bias="d")
SHORTCUTS = dict(attn_shortcut="dd", mlp_shortcut="dd")
LAYER = ATTENTION | QK_NORMS | MLP | POST_NORMS | BIASES | SHORTCUTS
TOP = dict(embed="vd", norm="d", head="dv")

# The letters that a matrix contracts over.
INPUT = dict(q="d", k="d", v="d", o="kgh", gate="d", up="d", down="f", attn_shortcut="d", mlp_shortcut="d")
POST_NORM_BEHIND = dict(o="attn_post_norm", down="mlp_post_norm")
SHORTCUT_BESIDE = dict(o="attn_shortcut", down="mlp_shortcut")
OUTPUT = dict(k="o", f="down")  # prunable letter -> the projection that reads its units
UNITS = dict(k="kgh", f="f", d="d")  # prunable letter -> the letters that a tap on that unit keeps
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")  # what `--ratio` counts
