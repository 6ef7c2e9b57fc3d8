"""Token ids in a `.npy` file: calibration data and text of models that have no tokenizer."""

from pathlib import Path

import numpy as np
from jaxtyping import Int

from jaxprune._decode import check_file


def is_token_file(source: str | None) -> bool:
    """Whether a source is a file of token ids, so that no tokenizer is needed.

    >>> is_token_file("tokens.npy"), is_token_file("text.txt"), is_token_file(None)
    (True, False, False)
    """
    return source is not None and source.endswith(".npy")


def read_token_file(source: str | Path) -> Int[np.ndarray, "sequences tokens"]:
    """Opens a file of token ids, one sequence a row; rows are read from disk when they are used.

    Args:
      source: a `.npy` file of integers [sequences, tokens].

    Raises:
      FileNotFoundError, IsADirectoryError: there is no such file, or it is a folder.
      ValueError: the file is not of NumPy's format, its array has another type or shape, or an id is negative or beyond int32.
    """
    path = check_file(source, "a .npy file of token ids")
    try:
        rows = np.lib.format.open_memmap(path, mode="r")
    except ValueError as error:
        raise ValueError(f"{path}: not a complete .npy file of numbers ({error}); write one with numpy.save") from None
    if rows.ndim != 2 or not np.issubdtype(rows.dtype, np.integer) or not len(rows) or rows.shape[1] < 2:
        given = f"{rows.dtype}{list(rows.shape)}"
        raise ValueError(f"{path}: {given} given; integers [sequences, tokens] are needed, 1 sequence of 2 tokens or more")
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= 2**31:
        raise ValueError(f"{path}: token ids {low} to {high} given; allowed are those of the vocabulary, 0 and above")
    return rows
