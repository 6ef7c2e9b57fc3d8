"""Instruction data: records with the fields of Alpaca as tokens, with the loss on the response."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from jaxprune._records import text_field

_TASK = "Below is an instruction that describes a task"
_ASK = "Write a response that appropriately completes the request."


class Example(NamedTuple):
    """One sequence: `tokens` int32[t] and `weights` float32[t], 1 where a token is a target of the loss."""

    tokens: np.ndarray
    weights: np.ndarray


def prompt(instruction: str, context: str = "") -> str:
    """The text that stands before the response; a model that was recovered on instructions expects it.

    Args:
      instruction: the field `instruction`.
      context: the field `input`, empty where the instruction needs none.

    >>> print(prompt("Name a colour."))
    Below is an instruction that describes a task. Write a response that appropriately completes the request.
    <BLANKLINE>
    ### Instruction:
    Name a colour.
    <BLANKLINE>
    ### Response:

    Reference:
      Taori et al., `Stanford Alpaca <https://github.com/tatsu-lab/stanford_alpaca>`_, 2023. The templates of
      Alpaca-LoRA and LLM-Pruner end with one more newline.
    """
    if context:
        lead = f"{_TASK}, paired with an input that provides further context. {_ASK}"
        return f"{lead}\n\n### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:"
    return f"{_TASK}. {_ASK}\n\n### Instruction:\n{instruction}\n\n### Response:"


def encode(before: str, response: str, tokenizer: Any, length: int) -> Example:
    """Tokens of a prompt, its response and the end-of-text token, cut to `length`, with the weights of the targets.

    The two texts are tokenised as one; a token that reaches into the response is a target. A beginning-of-text token stands
    first if the tokenizer adds one.

    Args:
      before: the prompt.
      response: what the model is to answer.
      tokenizer: of the model, a fast one (it must tell offsets).
      length: most tokens that are returned.

    Raises:
      ValueError: the tokenizer has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: it has no end-of-text token, which ends each response; set tokenizer.eos_token")
    coded = tokenizer(before + response, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    start = [i for i in tokenizer("")["input_ids"][:1] if i == tokenizer.bos_token_id]
    tokens = [*start, *coded["input_ids"], tokenizer.eos_token_id]
    weights = [*([0.0] * len(start)), *(end > len(before) for _, end in coded["offset_mapping"]), 1.0]
    return Example(np.asarray(tokens[:length], np.int32), np.asarray(weights[:length], np.float32))


def instruction_examples(
    records: Iterable[tuple[str, dict]], tokenizer: Any, length: int
) -> tuple[list[Example], int, list[str]]:
    """Examples of records with the fields `instruction`, `output` and, if they like, `input`.

    Args:
      records: (where, record), as `read_records` yields them.
      tokenizer: of the model.
      length: most tokens of an example.

    Returns:
      The examples; how many were left out, because their prompt alone fills `length`; the texts of all.

    Raises:
      ValueError: a field is missing or is not text, the tokenizer has no end-of-text token.
    """
    examples, texts, dropped = [], [], 0
    for where, record in records:
        context = text_field(where, record, "input") if record.get("input") is not None else ""
        before, response = prompt(text_field(where, record, "instruction"), context), text_field(where, record, "output")
        texts.append(before + response)
        example = encode(before, response, tokenizer, length)
        if example.weights[1:].any():
            examples.append(example)
        else:
            dropped += 1
    return examples, dropped, texts
