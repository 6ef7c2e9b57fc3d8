"""`jaxprune export`: a model in the format of another program."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from jaxprune import folder, models
from jaxprune._files import atomic_file, atomic_folder
from jaxprune.commands._common import ModelName, Output, flag, say, stage
from jaxprune.models import LlamaConfig, _hf_mamba, checkpoint, export
from jaxprune.models.mamba_config import only_llama


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write a model for another program: transformers, llama.cpp, MaxText.

    hf: a plain LLaMA, Mistral or Qwen2, equal layers. hf-custom: any widths, with trust_remote_code=True. hf-padded: any
    widths, filled up with zeros. gguf: llama.cpp, any widths. maxtext: stacked parameters, equal layers. --check says which of
    them a model fits. Example: jaxprune export small --to gguf --out small.gguf --type q8_0
    """

    model: ModelName
    to: Annotated[Literal["hf", "hf-custom", "hf-padded", "gguf", "maxtext"] | None, flag("PROFILE", "none")] = None
    """The format: hf, hf-custom, hf-padded, gguf or maxtext."""
    out: Annotated[Path | None, flag("PATH", "none")] = None
    """Folder to write, or FILE.gguf."""
    check: bool = False
    """Say which profiles the model fits, how large it would be, and why it does not fit the others; write nothing."""
    type: Annotated[str | None, flag("NAME", "as stored; f16 for gguf")] = None
    """How numbers are stored: float32, bfloat16 or float16; for gguf f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0."""
    overwrite: bool = False
    """Replace what stands at PATH."""
    output: Output = Output()


def run(args: Export) -> dict[str, Any]:
    """Checks, or writes."""
    if args.check:
        if args.to is not None or args.out is not None:
            raise ValueError("check: given together with --to or --out; --check writes nothing and looks at every profile")
        seen = checkpoint.read_config(args.model)
        return _fitting_mamba(seen) if isinstance(seen, models.MambaConfig) else _fitting(seen, args.type)
    if args.to is None or args.out is None:
        raise ValueError("export: --to and --out are needed; give --to PROFILE --out PATH, or --check")
    profile, path = export.find(args.to), checkpoint.resolve(args.model)
    if args.type is not None and args.type not in profile.types:
        raise ValueError(f"type: {args.type!r} given; {args.to} stores {', '.join(profile.types)}")
    if profile.suffix and args.out.suffix != profile.suffix:
        raise ValueError(f"out: {args.out} given; {args.to} is one file: name it {args.out.with_suffix(profile.suffix).name}")
    cfg = only_llama(checkpoint.read_config(path), f"export --to {args.to}")
    if problems := profile.problems(cfg):
        raise ValueError(f"{args.to}: this model does not fit: {'; '.join(problems)}")
    seconds: dict[str, float] = {}
    with (atomic_file if profile.suffix else atomic_folder)(args.out, overwrite=args.overwrite) as out:
        with stage("loading", seconds):
            params, _ = models.load(path, dtype=args.type if args.type in checkpoint.FLOATS else None)
            tokenizer = folder.load_tokenizer(path, needed=False)
        stored = params["embed"].dtype.name
        kind = args.type or (stored if stored in profile.types else profile.types[0])
        with stage("writing", seconds):
            notes = profile.write(out, params, cfg, tokenizer, kind)
    for note in notes:
        say(f"note: {note}")
    files = [args.out] if profile.suffix else [file for file in args.out.rglob("*") if file.is_file()]
    return {
        "profile": args.to,
        "stored as": kind,
        "bytes of numbers": profile.predicted_bytes(cfg, kind),
        "bytes on disk": sum(file.stat().st_size for file in files),
        "written": str(args.out),
        "notes": notes,
        "seconds": seconds,
    }


def _fitting_mamba(cfg: models.MambaConfig) -> dict[str, Any]:
    """A folder of a Mamba is what transformers loads, if its layers are equal; no profile writes another."""
    reasons = _hf_mamba.problems(cfg)
    row = {"profile": "the folder itself", "fits": "no" if reasons else "yes", "for": "MambaForCausalLM of transformers"}
    return {"profiles": [row], "reasons": [{"profile": row["profile"], "why not": reason} for reason in reasons]}


def _fitting(cfg: LlamaConfig, kind: str | None) -> dict[str, Any]:
    """Which profiles a model fits and how large it would be, and why it does not fit the others."""
    if kind is not None and not any(kind in profile.types for profile in export.PROFILES.values()):
        raise ValueError(f"type: {kind!r} given; allowed are {', '.join(export.TYPES)}")
    rows, reasons = [], []
    for name, profile in export.PROFILES.items():
        problems, stored = profile.problems(cfg), kind if kind in profile.types else profile.types[0]
        size = None if problems else round(profile.predicted_bytes(cfg, stored) / 1e6, 1)
        rows.append(
            {"profile": name, "fits": "no" if problems else "yes", "stored as": stored, "MB": size, "for": profile.summary}
        )
        reasons += [{"profile": name, "why not": problem} for problem in problems]
    return {"profiles": rows, "reasons": reasons}
