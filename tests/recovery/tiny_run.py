"""A small recovery run in a process of its own, for `test_resume`: python tiny_run.py FOLDER STEPS RESUME SAVE_EVERY.

Prints the step after each update and the losses, in hexadecimal, at the end.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import models, recovery

CFG = models.LlamaConfig(vocab=64, d=32, head_dim=8, layers=(models.LayerDims(2, 2, 48),))


def batches(step):
    tokens = np.random.default_rng(step).integers(0, 8, (4, 16), np.int32)
    return dict(tokens=tokens, weights=jnp.ones((4, 16)))


def main(folder, steps, resume, save_every):
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.array(rng.normal(0, 0.1, x.shape), x.dtype), models.shapes(CFG))
    adapter = recovery.lora.init(jax.random.key(1), params, CFG, rank=4)
    schedule, tx = recovery.schedule_and_optimizer(1e-2, steps, warmup=2)
    loss = recovery.lm_loss(CFG, alpha=8)
    _, losses = recovery.fit(
        loss, params, adapter, batches, tx, steps=steps, accumulate=2, checkpoint_dir=folder, save_every=save_every,
        resume=resume, callback=lambda step, value: print(step, flush=True),
    )  # fmt: skip
    print(" ".join(float(x).hex() for x in losses), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "resume", int(sys.argv[4]))
