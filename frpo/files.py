"""Files, folders, saved and hub data sets -> raw rows, each with its place. Imports no ML library.

Whatever a reader can't make out is a ConfigError that names file and line (or row), what is wrong, and a
remedy.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from frpo.config import ConfigError, DatasetConfig
from frpo.rewards import gym

SUFFIXES = (".jsonl", ".csv", ".parquet", ".jsonl.gz", ".csv.gz")
HUB_NAME = re.compile(r"[\w-]+|[\w.-]+/[\w.-]+")
MAX_DEPTH = 100
"""Of lists and objects in one another; what writes JSON or crosses to another process gives up not far
beyond."""
MAX_CELL = (1 << 31) - 1
"""Characters of one csv cell; Python's own limit of 131,072 is less than a long document."""
HALF = re.compile(r"\\u[dD][89a-fA-F]")

Place = str
"""file:line, for people."""
Raw = dict[str, Any]
T = TypeVar("T")


def raw_rows(source: DatasetConfig) -> Iterator[tuple[Place, Raw]]:
    """Every row of a data set with its place. Raises ConfigError."""
    path = Path(source.path)
    try:
        folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:  # a name too long, a folder that may not be read
        raise ConfigError(f"data set {source.path!r}: {error}; give another path") from None
    if folder:
        return _folder(source)
    named = path.name.lower().endswith(SUFFIXES)
    if not exists and not named and _hub_name(source.path):
        return _hub(source)
    for field, value in (("split", source.split), ("subset", source.subset)):
        if value is not None:
            raise ConfigError(
                f"data set {source.path}: {field}: {value!r} means nothing for one file; leave it out, or "
                "give its file"
            )
    if source.path.startswith(gym.SCHEME):
        return ((f"{source.path}:{number}", row) for number, row in gym.make_rows(source.path))
    if not exists:
        raise ConfigError(
            f"data set {path}: no such file; give the path from where you run, or an absolute one"
        )
    if not path.is_file():  # a pipe could be read once, and waited for without end
        raise ConfigError(f"data set {path}: this is no file; give a file or a folder")
    if not named:
        raise ConfigError(f"data set {path}: unknown kind of file; give one of {', '.join(SUFFIXES)}")
    return _file(path)


def _hub_name(path: str) -> bool:
    """Whether it can be one: data/questions beside a folder data is a file that is missing."""
    return bool(HUB_NAME.fullmatch(path)) and not ("/" in path and Path(path).parent.is_dir())


def _file(path: Path) -> Iterator[tuple[Place, Raw]]:
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".parquet"):
        return _parquet(path)
    return _csv(path) if name.endswith(".csv") else _jsonl(path)


# ---- text


def _lines(path: Path) -> Iterator[tuple[int, str]]:
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
        guess = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "gzip: name it .gz"}.get(
            begins, "Latin-1, maybe"
        )
        place = f"byte 0x{byte:02X} at character {error.start + 1}"
        raise ConfigError(f"{where}: {place} is not UTF-8 ({guess}); save the file as UTF-8") from None


def _jsonl(path: Path) -> Iterator[tuple[Place, Raw]]:
    for number, line in _lines(path):
        if text := line.strip(
            " \t\r\n\ufeff"
        ):  # byte order marks stand inside where files with one each were joined
            where = f"{path}:{number}"
            yield where, _object(text, where)


def _unique(pairs: list[tuple[str, Any]]) -> Raw:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"the name {next(n for n in names if names.count(n) > 1)!r} stands twice in one object"
        )
    return found


def _constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON, write null")


def _finite(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise ValueError(f"{digits[:40]} is more than a number holds")
    return number


DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant, parse_float=_finite)


def _object(line: str, where: Place) -> Raw:
    try:
        value, end = DECODER.raw_decode(line)
        if end < len(line):
            raise json.JSONDecodeError("Extra data", line, end)
        if line.count("[") + line.count("{") > MAX_DEPTH:
            _refuse_depth(value)
    except RecursionError:
        raise ConfigError(f"{where}: lists and objects more than {MAX_DEPTH} deep; flatten the row") from None
    except json.JSONDecodeError as error:
        found = f"{error.msg} at character {error.pos + 1}"
        raise ConfigError(f"{where}: not valid JSON ({found}); each line must be one object") from None
    except ValueError as error:  # ours, and numbers of more digits than Python reads
        raise ConfigError(
            f"{where}: not valid JSON ({str(error).partition('; use sys')[0]}); mend the row"
        ) from None
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
        for item in value.values() if isinstance(value, dict) else value:
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
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            _refuse_halves(item, where)


def _csv(path: Path) -> Iterator[tuple[Place, Raw]]:
    """Rows named by the line that they begin on. Blank lines are no rows."""
    csv.field_size_limit(MAX_CELL)
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
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
            asked = f"{len(cells)} cells, and the header has {len(header)} columns"
            raise ConfigError(f"{where}: {asked}; quote cells that hold commas, and leave none out")
        else:
            yield where, dict(zip(header, cells, strict=True))


def _refuse_twice(names: list[str], where: Place) -> None:
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ConfigError(f"{where}: the column {twice[0]!r} stands twice; give each its own name")


# ---- parquet and Hugging Face


def _parquet(path: Path) -> Iterator[tuple[Place, Raw]]:
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


def _folder(source: DatasetConfig) -> Iterator[tuple[Place, Raw]]:
    """A saved data set, or files as the hub knows them: data/train-00000-of-00001.parquet, test.jsonl,
    configs in README.md."""
    import datasets

    folder = Path(source.path)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        with_splits = _asked(source, lambda: datasets.load_from_disk(source.path))
        if not isinstance(with_splits, datasets.DatasetDict):
            with_splits = {str(with_splits.split or "train"): with_splits}
        return _numbered(_split(source, with_splits), source.path)
    builder = _asked(source, lambda: datasets.load_dataset_builder(source.path, source.subset))
    files = _split(source, builder.config.data_files)
    if all(file.lower().endswith(SUFFIXES) for file in files):
        return chain.from_iterable(_file(Path(file)) for file in files)
    return _hub(source)


def _hub(source: DatasetConfig) -> Iterator[tuple[Place, Raw]]:
    """By `datasets`, which looks in its cache where it is offline."""
    import datasets

    found = _asked(source, lambda: datasets.load_dataset(source.path, source.subset, split=source.split))
    return _numbered(found if source.split else _split(source, found), source.path)


def _asked(source: DatasetConfig, call: Any) -> Any:
    try:
        return call()
    except Exception as error:  # the library raises many kinds; all mean that there is no such data set
        asked = "give a file, a folder of files, a saved data set or a hub name"
        if "onfig" in str(error) and "vailable" in str(error):  # it lists them
            asked = "name one in the data set's field subset"
        raise ConfigError(
            f"data set {source.path}: {type(error).__name__}: {_one_line(error)}; {asked}"
        ) from None


def _split(source: DatasetConfig, found: Mapping[str, T]) -> T:
    name = source.split or ("train" if "train" in found or len(found) != 1 else next(iter(found)))
    if name not in found:
        raise ConfigError(
            f"data set {source.path}: no split {name!r}; choose one of {sorted(map(str, found))}"
        )
    return found[name]


def _numbered(found: Iterable[Mapping[str, Any]], path: str) -> Iterator[tuple[Place, Raw]]:
    number = 0
    try:
        for row in found:
            number += 1
            yield f"{path}:{number}", dict(row)
    except Exception as error:  # of a column's own decoder (pictures, sound)
        raise ConfigError(
            f"{path}:{number + 1}: {type(error).__name__}: {_one_line(error)}; take the column out"
        ) from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
