"""Records: JSON objects of a file or of a dataset on the hub, each with the words that say where it stands."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxprune._decode import check_file, decoded


def read_records(source: str) -> Iterator[tuple[str, dict]]:
    """Yields (where, record) from a `.json` file (a list of objects), a `.jsonl` file (one object a line) or a `hub:` dataset.

    Raises:
      FileNotFoundError, IsADirectoryError: there is no such file, or it is a folder.
      ValueError: bytes that are not UTF-8, text that is not JSON, records that are not objects, a dataset out of reach.
    """
    if source.startswith("hub:"):
        name, config, split, _ = hub_parts(source)
        return _hub(source, name, config, split)
    file = check_file(source)
    return _jsonl(file) if file.suffix == ".jsonl" else _json(file)


def hub_parts(source: str) -> tuple[str, str | None, str, str]:
    """Name, config, split and field of `hub:NAME[:CONFIG[:SPLIT[:FIELD]]]`; `train` and `text` unless given.

    >>> hub_parts("hub:allenai/c4:en")
    ('allenai/c4', 'en', 'train', 'text')

    Raises:
      ValueError: no name, or too many parts.
    """
    parts = source.split(":")[1:]
    if not parts[0] or len(parts) > 4:
        raise ValueError(f"{source}: write hub:NAME[:CONFIG[:SPLIT[:FIELD]]], e.g. hub:allenai/c4:en:train:text")
    name, config, split, field = parts + [""] * (4 - len(parts))
    return name, config or None, split or "train", field or "text"


def text_field(where: str, record: dict, field: str) -> str:
    """The text in one field of a record.

    Raises:
      ValueError: the field is missing or is not text.
    """
    if field not in record:
        raise ValueError(f"{where}: no field {field!r}; it has {sorted(record)}")
    if not isinstance(record[field], str):
        raise ValueError(f"{where}: field {field!r} is a {type(record[field]).__name__}; text is needed")
    return record[field]


def _jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                record = json.loads(line.decode()) if line.strip() else None
            except UnicodeDecodeError as error:
                at = offset + error.start
                raise ValueError(f"{where}: not UTF-8 at byte {at} ({error.reason}); convert the file to UTF-8") from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error.msg}, column {error.colno}); write one object a line") from None
            offset += len(line)
            if line.strip():
                yield where, _object(where, record)


def _json(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        records = json.loads("".join(decoded(path)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(records, list):
        raise ValueError(f"{path}: the top of the file is a {type(records).__name__}; a list of objects is needed")
    for i, record in enumerate(records, 1):
        yield f"{path}, record {i}", _object(f"{path}, record {i}", record)


def _hub(source: str, name: str, config: str | None, split: str) -> Iterator[tuple[str, dict]]:
    import datasets

    try:
        dataset = datasets.load_dataset(name, config, split=split, streaming=True)
        for i, record in enumerate(dataset, 1):
            yield f"{source}, record {i}", record
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{source}: cannot be read ({reason}); check the name and the network, or give a file") from error


def _object(where: str, record: Any) -> dict:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a {type(record).__name__} stands where a JSON object is needed")
    return record
