"""Documents in a column of Parquet files and of the Arrow files behind Hugging Face data sets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

BATCH_ROWS = 1024


def num_units(path: str, kind: str) -> int:
    """Pieces a file can be cut into: row groups of Parquet, record batches of Arrow."""
    if kind == "parquet":
        return _parquet(path).metadata.num_row_groups
    return sum(1 for _ in _arrow_stream(path))


def read(path: str, kind: str, start: int, stop: int, text_key: str) -> Iterator[str]:
    """Texts of the units start .. stop - 1 of a file; their rows are counted from 1 in errors."""
    schema = _parquet(path).schema_arrow if kind == "parquet" else _arrow_stream(path).schema
    _check_column(path, schema, text_key)
    for row, batch in _batches(path, kind, start, stop, [text_key]):
        yield from _texts(path, batch.column(text_key), row, text_key)


def records(
    path: str, kind: str, start: int, stop: int
) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """Row number, from 1, and the row itself, or why it cannot be read, of the units."""
    for row, batch in _batches(path, kind, start, stop, None):
        for n in range(batch.num_rows):
            try:
                yield row + n + 1, batch.slice(n, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield row + n + 1, ValueError("not UTF-8")


def _batches(
    path: str, kind: str, start: int, stop: int, columns: list[str] | None
) -> Iterator[tuple[int, Any]]:
    """Rows before it in the file, and the batch, of the units start .. stop - 1; 0 to 0 is all."""
    stop = stop or num_units(path, kind)
    if kind == "parquet":
        file = _parquet(path)
        row = sum(file.metadata.row_group(n).num_rows for n in range(start))
        groups = list(range(start, stop))
        batches = file.iter_batches(BATCH_ROWS, groups, columns=columns, use_threads=False)
    else:
        numbered = list(enumerate(_arrow_stream(path)))
        row = sum(batch.num_rows for n, batch in numbered if n < start)
        batches = (batch for n, batch in numbered if start <= n < stop)
    for batch in batches:
        yield row, batch
        row += batch.num_rows


def _texts(path: str, column: Any, row: int, text_key: str) -> Iterator[str]:
    for n, value in enumerate(column, row + 1):
        try:
            text = value.as_py()
        except UnicodeDecodeError:
            raise ValueError(f"{path}: row {n}: column {text_key!r} is not UTF-8") from None
        if text is None:
            raise ValueError(f"{path}: row {n}: column {text_key!r} is null: a text is needed")
        yield text


def _check_column(path: str, schema: Any, text_key: str) -> None:
    import pyarrow.types as types

    if text_key not in schema.names:
        raise ValueError(
            f"{path}: no column {text_key!r} (--text-key): it has {', '.join(schema.names)}"
        )
    kind = schema.field(text_key).type
    inner = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(inner) or types.is_large_string(inner) or types.is_string_view(inner)):
        raise ValueError(f"{path}: column {text_key!r} must be text, not {kind}")


def _parquet(path: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, memory_map=True)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a whole Parquet file: {error}") from None


def _arrow_stream(path: str) -> Any:
    import pyarrow as pa

    return pa.ipc.open_stream(pa.memory_map(path))


def arrow_files(name: str) -> list[Path]:
    """Download a Hugging Face data set and return the Arrow files that hold the split.

    Args:
        name: `owner/name`, `owner/name:split` or `owner/name:config:split`.
    """
    if "[" in name:  # its Arrow files would be those of the whole split
        raise ValueError(f"{name}: a slice of a split is not read: name a whole split")
    repository, *rest = name.split(":")
    if repository.count("/") != 1 or len(rest) > 2 or repository.startswith((".", "/")):
        raise ValueError(f"{name}: no such file or folder")
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{name}: no such file or folder; a Hugging Face data set needs: pip install "
            "'ossature[hf]'"
        ) from None
    *config, split = rest or ["train"]
    try:
        table = datasets.load_dataset(repository, *config, split=split)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{name}: no such file or folder, and no Hugging Face data set to be had: {reason}"
        ) from None
    assert isinstance(table, datasets.Dataset)
    return [Path(file["filename"]) for file in table.cache_files]
