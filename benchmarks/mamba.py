"""Trains a small Mamba on a text, then makes it sparse and narrower by every method and measures perplexity on held-out text.

    python benchmarks/mamba.py --text wikitext2.valid.txt --out mamba-fixture     # 15 minutes on 2 busy cores
    python benchmarks/mamba.py                                                    # Python's own documentation

No pretrained Mamba is assumed: this one is small and trained for minutes, so that methods can be compared with each other and
with nothing else. The first 90 % of the text are for the tokenizer (byte-level BPE), the training and the calibration, the last
10 % are held out. With --out the model is kept there, a folder that every command of jaxprune loads; run again, it is not
trained anew. Prints a Markdown table.
"""

import dataclasses
import tempfile
from pathlib import Path

import jax
import numpy as np
import optax
import tyro

import jaxprune
from jaxprune import evaluate, folder, models, sparsify
from jaxprune._files import atomic_folder
from jaxprune._progress import progress
from jaxprune._text import tokenise
from jaxprune.data import read_text
from jaxprune.recovery import sparse

PATTERNS = {"0.5": sparse.Pattern(0.5), "2:4": sparse.n_of_m("2:4")}
METHODS = ("random", "magnitude", "taylor", "gate-taylor", "fisher")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Trains a small Mamba and compares methods on it."""

    text: str = "builtin"
    """Text as for `jaxprune prune --calibration`, such as a file."""
    out: Path | None = None
    """Folder of the trained model."""
    vocab: int = 2048
    """Tokens of the tokenizer."""
    width: int = 256
    """Channels of the residual stream; a layer has twice as many inside."""
    layers: int = 4
    """Layers."""
    steps: int = 300
    """Updates of the training."""
    batch: int = 8
    """Sequences of an update."""
    length: int = 128
    """Tokens in a sequence."""
    learning_rate: float = 4e-3
    """The highest, after warmup."""
    held_out_tokens: int = 8192
    """Tokens that perplexity is measured on."""
    seed: int = 0
    """Of weights and windows."""


def tokenizer_of(text: str, vocab: int):
    """Byte-level BPE, trained on the text."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def trained(text: str, args: Args) -> folder.Model:
    """A new model after `--steps` steps of AdamW on random windows of the text."""
    tokenizer = tokenizer_of(text, args.vocab)
    layers = (models.MambaDims(2 * args.width),) * args.layers
    cfg = models.MambaConfig(
        vocab=len(tokenizer), d=args.width, dt_rank=args.width // 16, layers=layers, eos_ids=(tokenizer.eos_token_id,)
    )
    tokens, rng = tokenise(tokenizer, text), np.random.default_rng(args.seed)
    rate = optax.warmup_cosine_decay_schedule(0.0, args.learning_rate, args.steps // 10, args.steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.1))
    loss = models.loss_fn(cfg, remat=False)

    @jax.jit
    def step(params, state, batch):
        value, gradient = jax.value_and_grad(lambda p: loss(p, {}, batch).mean())(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    params = models.init(jax.random.key(args.seed), cfg)
    state, losses = tx.init(params), []
    for _ in progress(range(args.steps), "training"):
        starts = rng.integers(0, len(tokens) - args.length - 1, args.batch)
        params, state, value = step(params, state, tokens[starts[:, None] + np.arange(args.length + 1)])
        losses.append(float(value))
    last = np.mean(losses[-20:])
    print(f"{models.count_parameters(cfg):,} parameters, {len(tokens):,} tokens, loss of the last 20 steps {last:.3f}\n")
    return folder.Model(params, cfg, tokenizer, "benchmarks/mamba.py", None)


def rows(model: folder.Model, calibration: np.ndarray, held_out: np.ndarray, window: int):
    """Yields rows of the table: what was done, perplexity, parameters of the matrices that are left or not zero."""

    def perplexity(params, cfg) -> float:
        return evaluate.perplexity(params, cfg, held_out, window=window)["perplexity"]

    dense = model.cfg.decoder_parameters
    yield "dense", "", perplexity(model.params, model.cfg), 1.0
    for name, pattern in PATTERNS.items():
        for method in sparsify.METHODS:
            skip = ("dt_proj",) if pattern.m and model.cfg.dt_rank % pattern.m else ()
            asked = sparsify.Sparsity(method=method, pattern=pattern, skip=skip)
            params, _ = sparsify.sparsify(model.params, model.cfg, list(calibration.reshape(4, -1, window)), asked)
            yield f"sparse, {name}", method, perplexity(params, model.cfg), 1 - pattern.fraction
    for ratio in (0.2, 0.5):
        for method in METHODS:
            settings = jaxprune.Settings(method=method, ratio=ratio, units=("inner",))
            small = jaxprune.prune(model.params, model.cfg, calibration, settings)
            yield f"channels, {ratio}", method, perplexity(small.params, small.cfg), small.cfg.decoder_parameters / dense


def main(args: Args) -> None:
    """Trains the model unless it is there, and prints the table."""
    source = read_text(args.text)
    text = source.separator.join(source.pieces)
    cut = int(0.9 * len(text))
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch) / "model"
        if not out.is_dir():
            made = trained(text[:cut], args)
            with atomic_folder(out) as beside:
                folder.save(beside, made)
        model = folder.load_any(str(out))
    tokens, held_out = (tokenise(model.tokenizer, part) for part in (text[:cut], text[cut:]))
    starts = np.random.default_rng(args.seed).integers(0, len(tokens) - args.length, 64)
    calibration = tokens[starts[:, None] + np.arange(args.length)]
    print("| what | method | perplexity | of the matrices |\n| --- | --- | --- | --- |", flush=True)
    for what, method, value, left in rows(model, calibration, held_out[: args.held_out_tokens], args.length):
        print(f"| {what} | {method} | {value:.2f} | {left:.1%} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
