"""`jaxprune verify`: proof that a pruned model is the dense one without the removed units."""

import dataclasses
from typing import Annotated, Any

import tyro

from jaxprune import _hosts, data, folder, proof, sparsify
from jaxprune.commands import _devices
from jaxprune.commands._common import Output, check_tokens, flag, say, stage
from jaxprune.commands._compute import Compute
from jaxprune.commands._sparse_result import by_matrix
from jaxprune.recovery.sparse import Pattern


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify:
    """Prove that the cut is exact: the pruned model equals the dense one with the removed units masked.

    Also says, tensor by tensor, whether the kept weights are the dense ones bit for bit or were updated, and by what. Exit
    status 1 if the logits differ or a tensor changed that no recorded step explains.
    """

    dense: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DENSE", help="the model that it was pruned from")]
    pruned: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRUNED", help="a folder that jaxprune wrote")]
    text: Annotated[str, flag("SRC")] = "builtin"
    """Text to compare the logits on, or FILE.npy of token ids."""
    samples: Annotated[int, flag("N")] = 2
    """Sequences."""
    length: Annotated[int, flag("T")] = 64
    """Tokens in a sequence."""
    tensors: bool = False
    """List every tensor."""
    devices: _devices.Devices = _devices.Devices()
    hosts: _devices.Hosts = _devices.Hosts()
    compute: Compute = Compute()
    output: Output = Output()


def run(args: Verify) -> dict[str, Any]:
    """Loads both and compares."""
    seconds: dict[str, float] = {}
    with stage("loading", seconds):
        small = _devices.load_any(args.devices, args.pruned, needs_tokenizer=False)
        if small.record is None:
            raise ValueError(
                f"{args.pruned}: no {folder.RECORD}, so there is no plan to verify; give a folder that jaxprune wrote"
            )
        needs_tokenizer = not data.is_token_file(args.text)
        dtype = str(small.params["embed"].dtype)
        dense = _devices.load_any(args.devices, args.dense, dtype, needs_tokenizer=needs_tokenizer)
    with _hosts.alike():
        plan = folder.plan_from(small.record, dense.cfg, small.cfg)
        tokens = data.token_blocks(args.text, dense.tokenizer, samples=args.samples, length=args.length, seed=0).tokens
        check_tokens(tokens, dense.cfg, args.text)
    with stage("comparing", seconds):
        report = proof.verify(dense.params, dense.cfg, small.params, small.cfg, plan, tokens, folder.updates_of(small.record))
    for name in report.undeclared:
        say(f"undeclared update: {name} differs by {report.updated[name]:.3g}")
    steps = [f"{u['by']}: {', '.join(u['arrays'])}" for u in small.record.get("updates", ())]
    result = {
        "exact": report.exact,
        "largest logit difference": report.difference,
        "tolerance": report.tolerance,
        "largest logit": report.largest_logit,
        "tensors equal bit for bit": len(report.kept),
        "tensors updated": len(report.updated),
        "updated by": "; ".join(steps) or "nothing",
        "undeclared updates": len(report.undeclared),
    }
    if args.tensors:
        rows: list[dict[str, Any]] = [{"tensor": n, "state": "equal"} for n in report.kept]
        rows += [{"tensor": n, "state": "updated", "largest difference": d} for n, d in report.updated.items()]
        result["tensors"] = rows
    return result | _sparsity(small, result, args.tensors)


def _sparsity(small: folder.Model, result: dict[str, Any], each: bool) -> dict[str, Any]:
    """What a model that was made sparse has of its pattern; not exact if a zero is gone or N:M is violated."""
    assert small.record is not None
    if "sparsity" not in small.record:
        return {}
    recorded = small.record["sparsity"]["zeros"]
    found = sparsify.achieved(small.params, small.cfg, list(recorded), Pattern(**small.record["sparsity"]["pattern"]))
    lost = [name for name, (zeros, violations) in found.items() if zeros < recorded[name] or violations]
    for name in lost:
        say(f"sparsity lost: {name} has {found[name][0]:.4f} zeros, recorded are {recorded[name]:.4f}")
    parts: dict[str, Any] = {"exact": result["exact"] and not lost, "matrices that lost zeros": len(lost)}
    if each:
        parts["sparse"] = [{"matrix": n, "zeros": z, "N:M violations": v} for n, (z, v) in found.items()]
    return parts | {"by matrix": by_matrix(found)}
