"""Accelerators that a model may have to fit: what their makers say of them.

==============  ==============================================================================================
H100, H200      SXM; NVIDIA's data sheets of the H100 and the H200 (BF16 without sparsity: half of the printed number)
RTX 4090        a card of 24 GB; NVIDIA's whitepaper of the Ada architecture, BF16 with accumulation in FP32; PCIe 4.0 x16
v5e, v5p, v6e   Google Cloud's pages of TPU v5e, v5p and v6e, values of one chip
==============  ==============================================================================================

Bytes are those of 10^9 in a GB, links are the sum of both directions, as printed.
"""

from typing import NamedTuple

USABLE = 0.9  # of the memory: the rest is the runtime's, its buffers for communication, and fragmentation


class Accelerator(NamedTuple):
    """One device.

    Attributes:
      bytes: of memory.
      flops: a second, bfloat16, dense.
      link: bytes a second to and from other devices.
    """

    bytes: float
    flops: float
    link: float


ACCELERATORS = {
    "24 GB (RTX 4090)": Accelerator(24e9, 165e12, 64e9),
    "H100": Accelerator(80e9, 989e12, 900e9),
    "H200": Accelerator(141e9, 989e12, 900e9),
    "v5e": Accelerator(16e9, 197e12, 400e9),
    "v5p": Accelerator(95e9, 459e12, 1200e9),
    "v6e": Accelerator(32e9, 918e12, 800e9),
}
