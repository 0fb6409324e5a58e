"""Files, folders, saved and hub data sets -> raw rows, each with its place. Imports no ML library.

Whatever a reader can't make out is a ConfigError that names file and line (or row), what is wrong, and a
remedy.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from frpo.config import ConfigError, DatasetConfig
from frpo.rewards import gym
from frpo.strict_json import HOOKS

SUFFIXES = (".jsonl", ".csv", ".parquet", ".jsonl.gz", ".csv.gz")
HUB_NAME = re.compile(r"[\w-]+|[\w.-]+/[\w.-]+")
MAX_DEPTH = 100
"""Of lists and objects in one another; what writes JSON or crosses to another process gives up not far
beyond."""
MAX_CELL = (1 << 31) - 1
"""Characters of one csv cell; Python's own limit of 131,072 is less than a long document."""
MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "gzip: name it .gz"}
"""First bytes of what is often taken for UTF-8 text."""
HALF = re.compile(r"\\u[dD][89a-fA-F]")

Place = str
"""file:line, for people."""
Raw = dict[str, Any]
T = TypeVar("T")


def raw_rows(source: DatasetConfig) -> Iterator[tuple[Place, Raw]]:
    """Every row of a data set with its place. Raises ConfigError."""
    path = Path(source.path)
    try:
        exists = path.exists()
        is_folder = path.is_dir()
    except (OSError, ValueError) as error:  # a name too long, a folder that may not be read
        raise ConfigError(f"data set {source.path!r}: {error}; give another path") from None
    if is_folder:
        return _read_folder(source)
    if not exists and names_hub(source.path):
        return _read_hub(source)
    for field, value in (("split", source.split), ("subset", source.subset)):
        if value is not None:
            raise ConfigError(
                f"data set {source.path}: {field}: {value!r} means nothing for one file; leave it out, or "
                "give its file"
            )
    if source.path.startswith(gym.SCHEME):
        return ((f"{source.path}:{number}", row) for number, row in gym.make_rows(source.path))
    _check_file(path)
    return _read_file(path)


def _check_file(path: Path) -> None:
    if not path.exists():
        raise ConfigError(
            f"data set {path}: no such file; give the path from where you run, or an absolute one"
        )
    if not path.is_file():  # a pipe could be read once, and waited for without end
        raise ConfigError(f"data set {path}: this is no file; give a file or a folder")
    if not _has_known_suffix(path):
        raise ConfigError(f"data set {path}: unknown kind of file; give one of {', '.join(SUFFIXES)}")


def _has_known_suffix(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def names_hub(path: str) -> bool:
    """Whether a path that is not here can be a hub's name: data/questions beside a folder data is a file that
    is missing."""
    is_name = HUB_NAME.fullmatch(path) and not _has_known_suffix(Path(path))
    return bool(is_name) and not ("/" in path and Path(path).parent.is_dir())


def _read_file(path: Path) -> Iterator[tuple[Place, Raw]]:
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".parquet"):
        return _read_parquet(path)
    if name.endswith(".csv"):
        return _read_csv(path)
    return _read_jsonl(path)


# ---- text


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of every line, without a byte order mark."""
    number = 0
    try:
        raw = gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")
        with raw, io.TextIOWrapper(raw, "utf-8-sig", "surrogateescape", newline="") as file:
            for number, line in enumerate(file, 1):
                if not line.isascii():
                    _refuse_other_bytes(line, f"{path}:{number}")
                if "\0" in line:
                    raise ConfigError(
                        f"{path}:{number}: a NUL byte: this is binary, or UTF-16; save it as UTF-8 text"
                    )
                yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(
            f"{path}:{number + 1}: broken gzip data ({error}); download or compress the file again"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"data set {path}: {error.strerror or error}; give a file that can be read"
        ) from None


def _refuse_other_bytes(line: str, where: Place) -> None:
    """Bytes that are not UTF-8 were decoded to lone surrogates, which no valid file can hold."""
    try:
        line.encode()
    except UnicodeEncodeError as error:
        byte = ord(line[error.start]) - 0xDC00
        begins = line[:2].encode("utf-8", "surrogateescape")[:2]
        guess = MARKS.get(begins, "Latin-1, maybe")
        place = f"byte 0x{byte:02X} at character {error.start + 1}"
        raise ConfigError(f"{where}: {place} is not UTF-8 ({guess}); save the file as UTF-8") from None


def _read_jsonl(path: Path) -> Iterator[tuple[Place, Raw]]:
    for number, line in _read_lines(path):
        # where files with a byte order mark each were joined, one stands inside
        text = line.strip(" \t\r\n\ufeff")
        if text:
            where = f"{path}:{number}"
            yield where, _parse_object(text, where)


DECODER = json.JSONDecoder(**HOOKS)


def _parse_object(line: str, where: Place) -> Raw:
    try:
        value, end = DECODER.raw_decode(line)
        if end < len(line):
            raise json.JSONDecodeError("Extra data", line, end)
        if line.count("[") + line.count("{") > MAX_DEPTH:
            _refuse_depth(value)
    except RecursionError:
        raise ConfigError(f"{where}: lists and objects more than {MAX_DEPTH} deep; flatten the row") from None
    except json.JSONDecodeError as error:
        mistake = f"{error.msg} at character {error.pos + 1}"
        raise ConfigError(f"{where}: not valid JSON ({mistake}); each line must be one object") from None
    except ValueError as error:  # ours, and numbers of more digits than Python reads
        mistake = str(error).partition("; use sys")[0]
        raise ConfigError(f"{where}: not valid JSON ({mistake}); mend the row") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected an object, found {type(value).__name__}")
    if "\\u" in line and HALF.search(line):
        for name, column in value.items():
            _refuse_halves([name, column], f"{where}: column {name!r}")
    return value


def _refuse_depth(value: Any, depth: int = 0) -> None:
    """Raises RecursionError."""
    if depth > MAX_DEPTH:
        raise RecursionError
    if isinstance(value, dict | list):
        inside = value.values() if isinstance(value, dict) else value
        for item in inside:
            _refuse_depth(item, depth + 1)


def _refuse_halves(value: Any, where: Place) -> None:
    """Half a character (a surrogate without its partner) passes json.loads; no tokenizer takes it and no file
    can hold it."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = ascii(value[error.start])
            raise ConfigError(
                f"{where}: half a character ({half}, a lone surrogate); mend or remove it"
            ) from None
    elif isinstance(value, dict | list):
        inside = [*value, *value.values()] if isinstance(value, dict) else value
        for item in inside:
            _refuse_halves(item, where)


def _read_csv(path: Path) -> Iterator[tuple[Place, Raw]]:
    """Rows named by the line that they begin on. Blank lines are no rows."""
    csv.field_size_limit(MAX_CELL)
    reader = csv.reader((line for _, line in _read_lines(path)), strict=True)
    header: list[str] = []
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ConfigError(
                f"{where}: not valid csv ({error}); put cells with quotes in quotes, the inner ones doubled"
            ) from None
        if not cells:
            continue
        if not header:
            header = cells
            _refuse_twice(header, where)
        elif len(cells) != len(header):
            raise ConfigError(
                f"{where}: {len(cells)} cells, and the header has {len(header)} columns; quote cells that "
                "hold commas, and leave none out"
            )
        else:
            yield where, dict(zip(header, cells, strict=True))


def _refuse_twice(names: list[str], where: Place) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{where}: the column {twice[0]!r} stands twice; give each its own name")


# ---- parquet and Hugging Face


def _read_parquet(path: Path) -> Iterator[tuple[Place, Raw]]:
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _refuse_twice(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except ConfigError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        place = f"{path}:{number + 1}" if number else f"data set {path}"
        raise ConfigError(
            f"{place}: no parquet file that can be read ({_one_line(error)}); write or download it again"
        ) from None


def _read_folder(source: DatasetConfig) -> Iterator[tuple[Place, Raw]]:
    """A saved data set, or files as the hub knows them: data/train-00000-of-00001.parquet, test.jsonl,
    configs in README.md."""
    import datasets

    folder = Path(source.path)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        splits = _ask_library(source, lambda: datasets.load_from_disk(source.path))
        if not isinstance(splits, datasets.DatasetDict):
            splits = {str(splits.split or "train"): splits}
        return _number_rows(_choose_split(source, splits), source.path)
    builder = _ask_library(source, lambda: datasets.load_dataset_builder(source.path, source.subset))
    files = _choose_split(source, builder.config.data_files)
    if all(file.lower().endswith(SUFFIXES) for file in files):
        return chain.from_iterable(_read_file(Path(file)) for file in files)
    return _read_hub(source)


def _read_hub(source: DatasetConfig) -> Iterator[tuple[Place, Raw]]:
    """By `datasets`, which looks in its cache where it is offline."""
    import datasets

    rows = _ask_library(source, lambda: datasets.load_dataset(source.path, source.subset, split=source.split))
    if not source.split:
        rows = _choose_split(source, rows)
    return _number_rows(rows, source.path)


def _ask_library(source: DatasetConfig, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # the library raises many kinds; all mean that there is no such data set
        remedy = "give a file, a folder of files, a saved data set or a hub name"
        if "onfig" in str(error) and "vailable" in str(error):  # it lists them
            remedy = "name one in the data set's field subset"
        raise ConfigError(
            f"data set {source.path}: {type(error).__name__}: {_one_line(error)}; {remedy}"
        ) from None


def _choose_split(source: DatasetConfig, splits: Mapping[str, T]) -> T:
    """The one that is named, else train, else the only one."""
    name = source.split or "train"
    if not source.split and len(splits) == 1:
        name = next(iter(splits))
    if name not in splits:
        raise ConfigError(
            f"data set {source.path}: no split {name!r}; choose one of {sorted(map(str, splits))}"
        )
    return splits[name]


def _number_rows(rows: Iterable[Mapping[str, Any]], path: str) -> Iterator[tuple[Place, Raw]]:
    number = 0
    try:
        for row in rows:
            number += 1
            yield f"{path}:{number}", dict(row)
    except Exception as error:  # of a column's own decoder (pictures, sound)
        raise ConfigError(
            f"{path}:{number + 1}: {type(error).__name__}: {_one_line(error)}; take the column out"
        ) from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
