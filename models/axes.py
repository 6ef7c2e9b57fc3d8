"""The axes table: one letter names one axis everywhere, and the table is the dependency graph of surgery.

============  ==========================================
`d`           residual width
`k`           key/value head (its group of query heads goes with it)
`g`           query head inside its group
`h`           head dimension
`f`           MLP channel
`v`           vocabulary
`i`           inner channel of a Mamba mixer
`n r w`       its state size, rank of its time step and width of its convolution
`p`           the two halves of its input projection, x and z
`e`           what its `x_proj` makes: time step (r), B (n) and C (n)
`l b t s`     layer, batch, time (query), time (key)
============  ==========================================

Removing a unit means taking the kept positions along its letter, in every array whose axes contain that letter. A KV group
therefore takes its query heads and its rows of `o` with it by construction, and an inner channel of Mamba its convolution
and its states. Of the head dimension the unit is a rotary pair, two dimensions of every head of a layer.

A model whose residual stream was rotated (SliceGPT) has two matrices more in each layer, its shortcuts: they turn the stream
from the axes that a sublayer reads into those that it writes.
"""

ATTENTION = dict(attn_norm="d", q="dkgh", k="dkh", v="dkh", o="kghd")
QK_NORMS = dict(q_norm="h", k_norm="h")
POST_NORMS = dict(attn_post_norm="d", mlp_post_norm="d")
MLP = dict(mlp_norm="d", gate="df", up="df", down="fd")
BIASES = dict(q_bias="kgh", k_bias="kh", v_bias="kh", o_bias="d", gate_bias="f", up_bias="f", down_bias="d")
SHORTCUTS = dict(attn_shortcut="dd", mlp_shortcut="dd")
MAMBA = dict(mixer_norm="d", in_proj="dpi", conv1d="iw", x_proj="ie", dt_proj="ri", A_log="in", D="i", out_proj="id")
MAMBA_BIASES = dict(in_proj_bias="pi", conv1d_bias="i", dt_proj_bias="i", out_proj_bias="d")
LAYER = ATTENTION | QK_NORMS | MLP | POST_NORMS | BIASES | SHORTCUTS | MAMBA | MAMBA_BIASES
TOP = dict(embed="vd", norm="d", head="dv")

# The letters that a matrix contracts over.
INPUT = dict(q="d", k="d", v="d", o="kgh", gate="d", up="d", down="f", attn_shortcut="d", mlp_shortcut="d")
INPUT |= dict(in_proj="d", x_proj="i", dt_proj="r", out_proj="i")
POST_NORM_BEHIND = dict(o="attn_post_norm", down="mlp_post_norm")
SHORTCUT_BESIDE = dict(o="attn_shortcut", down="mlp_shortcut")
OUTPUT = dict(k="o", f="down")  # prunable letter -> the projection that reads its units
UNITS = dict(k="kgh", f="f", i="i", d="d", h="h")  # prunable letter -> the letters that a tap on that unit keeps
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")  # what `--ratio` counts
MAMBA_MATRICES = ("in_proj", "x_proj", "dt_proj", "out_proj")  # the same, of Mamba
