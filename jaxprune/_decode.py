"""UTF-8 files, read in parts, with errors that name the file and the byte."""

import codecs
from collections.abc import Iterator
from pathlib import Path


def check_file(source: str | Path, allowed: str = "a file") -> Path:
    """The path, if it is a file.

    Args:
      source: the path.
      allowed: what could have been given, for the error.

    Raises:
      FileNotFoundError, IsADirectoryError: there is no such file, or it is a folder.
    """
    path = Path(source)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a folder was given; give {allowed}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; give {allowed}")
    return path


def decoded(path: Path, size: int = 2**20) -> Iterator[str]:
    """The text of a file in parts; line ends stay as they are.

    Args:
      path: the file.
      size: bytes that are read at a time.

    Raises:
      ValueError: the file is not UTF-8.
    """
    decoder, read = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as file:
        while True:
            data = file.read(size)
            held = len(decoder.getstate()[0])  # an unfinished character of the part before
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                at = read - held + error.start
                raise ValueError(f"{path}: not UTF-8 at byte {at} ({error.reason}); convert the file to UTF-8") from None
            read += len(data)
            if text:
                yield text
            if not data:
                return
