"""Numerical Pruning of an image generator: a LlamaGen-class decoder on synthetic images, before and after.

    python benchmarks/image_tokens.py [--out DIR] [--json FILE]

A class token and the 64 tokens of an image (`_synthetic_images`) are a sequence; the decoder has rotary embeddings in two
dimensions and is trained from scratch. It is cut by relaxed masks ranked globally, without and with least-squares compensation,
and at random. The folder gets the decoder and its tokens, as the commands read them, and `image_tokens.png`:

    jaxprune prune DIR/decoder --out small --method numerical --calibration DIR/calibration.npy --ratio 0.2
    jaxprune evaluate small --text DIR/heldout.npy
"""

import dataclasses
import time
from pathlib import Path

import _common
import _synthetic_images as synthetic
import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxprune import evaluate, models, pipeline, recovery
from jaxprune.models import decode

CLASSES, TOKENS = len(synthetic.CLASSES), synthetic.GRID**2
PRUNINGS = (("random", "none"), ("numerical", "none"), ("numerical", "weights"))  # method, what is reconstructed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Trains, prunes, samples and measures."""

    out: Path = Path("build/image_tokens")
    """Folder for the decoder, the tokens and the picture."""
    codes: int = 256
    """Code words."""
    steps: int = 1200
    """Updates of the training."""
    batch: int = 32
    """Images in an update."""
    ratios: tuple[float, ...] = (0.1, 0.2, 0.4)
    """Fractions of the decoder parameters to remove."""
    samples: int = 512
    """Images that each model draws, and that it is calibrated on."""
    seed: int = 0
    """Of everything random."""
    json: Path | None = None
    """Write the result to this file, too."""


def sequences(book: np.ndarray, rng: np.random.Generator, n: int) -> np.ndarray:
    """A class token and the tokens of an image in each of n rows, int32[n, 65]."""
    images, labels = synthetic.draw(rng, n)
    return np.concatenate([len(book) + labels[:, None], synthetic.encode(book, images)], 1).astype(np.int32)


def trained(args: Args, book: np.ndarray) -> tuple[models.Params, models.LlamaConfig]:
    """The decoder, after AdamW on images that it sees once each."""
    grid = (("columns", synthetic.GRID), ("first", 1), ("rope_type", "grid"))
    layers = (models.LayerDims(6, 1, 256),) * 4
    cfg = models.LlamaConfig(
        vocab=args.codes + CLASSES, d=96, head_dim=16, layers=layers, rope_scaling=grid, max_positions=1 + TOKENS
    )
    losses = models.loss_fn(cfg, remat=False)
    _, optimizer = recovery.schedule_and_optimizer(2e-3, args.steps, warmup=args.steps // 20, weight_decay=0.01)
    start = models.init(jax.random.key(args.seed), cfg)

    def batch(step: int) -> np.ndarray:
        return sequences(book, np.random.default_rng((args.seed, 1 + step)), args.batch)

    def loss(params, _, tokens):
        return losses(params, {}, tokens).mean(), jnp.float32(len(tokens))

    def report(step: int, value: float) -> None:
        if (step + 1) % 100 == 0:
            print(f"update {step + 1} of {args.steps}: {value:.3f} nats a token", flush=True)

    return recovery.fit(loss, start, start, batch, optimizer, steps=args.steps, callback=report)[0], cfg


def sampled(params: models.Params, cfg: models.LlamaConfig, book: np.ndarray, args: Args) -> np.ndarray:
    """Images that the model draws at temperature 1, the classes in turn, float[n, 32, 32, 3]."""
    prompt = args.codes + np.arange(args.samples)[:, None] % CLASSES
    key = jax.random.key(args.seed)
    tokens = decode.generate(params, cfg, prompt, max_new_tokens=TOKENS, temperature=1.0, key=key)
    return synthetic.decode(book, np.minimum(tokens, args.codes - 1))


def quality(images: np.ndarray) -> dict[str, float]:
    """How many images show the shape of their class, and how well the best fitting shape of any class overlaps."""
    labels, overlap = synthetic.recognise(images)
    return {"recognised": float((labels == np.arange(len(images)) % CLASSES).mean()), "overlap": float(overlap.mean())}


def picture(rows: dict[str, np.ndarray], path: Path) -> None:
    """Two images of each class side by side, one row a model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.5 * len(rows) + 0.2), dpi=125, layout="constrained")
    order = np.arange(2 * CLASSES).reshape(2, CLASSES).T.reshape(-1)
    for ax, (name, images) in zip(figure.subplots(len(rows), 1), rows.items(), strict=True):
        framed = np.pad(images[order], ((0, 0), (0, 0), (2, 2), (0, 0)), constant_values=1)
        ax.imshow(np.clip(np.concatenate(framed, 1), 0, 1), interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        ax.set_ylabel(name.replace(", ", ",\n"), rotation=0, ha="right", va="center", fontsize=8)
    width = framed.shape[2]
    figure.axes[0].set_xticks(width * (2 * np.arange(CLASSES) + 1), synthetic.CLASSES, fontsize=8)
    figure.axes[0].tick_params(length=0, labeltop=True, labelbottom=False)
    figure.savefig(path)


def main(args: Args) -> None:
    """Trains the decoder, prunes it, prints the table and writes the picture."""
    rng = np.random.default_rng(args.seed)
    book = synthetic.codebook(synthetic.draw(rng, 600)[0], args.codes, args.seed)
    begin = time.perf_counter()
    params, cfg = trained(args, book)
    seconds = time.perf_counter() - begin
    models.save(args.out / "decoder", params, cfg)
    params, cfg = models.load(args.out / "decoder")
    calibration, heldout = sequences(book, rng, args.samples), sequences(book, rng, 512)
    np.save(args.out / "calibration.npy", calibration)
    np.save(args.out / "heldout.npy", heldout)

    zoo = {"dense": (params, cfg)}
    for ratio in args.ratios:
        for method, target in PRUNINGS:
            settings = pipeline.Settings(method=method, ratio=ratio, reconstruct=target, seed=args.seed)
            pruned = pipeline.prune(params, cfg, None if method == "random" else calibration, settings)
            name = f"{method} {ratio:.0%}" + (", compensated" if target != "none" else "")
            zoo[name] = (pruned.params, pruned.cfg)

    real = synthetic.decode(book, heldout[: args.samples, 1:])
    drawn, rows = {"real": real}, [{"": "real images, quantised", "decoder parameters": "", "nats / token": ""} | quality(real)]
    for name, (p, c) in zoo.items():
        drawn[name] = sampled(p, c, book, args)
        found = evaluate.perplexity(p, c, heldout.reshape(-1), window=1 + TOKENS)
        numbers = {"decoder parameters": c.decoder_parameters, "nats / token": float(np.log(found["perplexity"]))}
        rows.append({"": name} | numbers | quality(drawn[name]))
    picture({name: images for name, images in drawn.items() if "random" not in name}, args.out / "image_tokens.png")
    title = f"{args.steps} updates of {args.batch} images in {seconds:.0f} s, {args.samples} samples a model"
    _common.show(title, rows, args.json)


if __name__ == "__main__":
    main(tyro.cli(Args))
