"""Files, folders and saved data sets: what is read, and what is refused by file and line."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frpo.config import ConfigError, DatasetConfig
from frpo.files import raw_rows

GOOD = b'{"prompt": "What is 1+1?", "answer": 2}\n'
BOM = b"\xef\xbb\xbf"


def rows_of(path: Path | str, **fields: Any) -> list[dict[str, Any]]:
    return [row for _, row in raw_rows(DatasetConfig(path=str(path), task="t", **fields))]


def refusal(path: Path | str, **fields: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        rows_of(path, **fields)
    return str(raised.value)


UNREADABLE: list[tuple[str, bytes, str]] = [
    (
        "cut.jsonl.gz",
        gzip.compress(GOOD * 100)[:-20],
        "cut.jsonl.gz:27: broken gzip data (Compressed file ended",
    ),
    ("cut.csv.gz", gzip.compress(b"prompt\n" + os.urandom(30000).hex().encode())[:9000], "broken gzip data"),
    (
        "flipped.jsonl.gz",
        gzip.compress(GOOD * 9)[:30] + b"\x00\xff" + gzip.compress(GOOD * 9)[32:],
        "broken gzip data (",
    ),
    ("plain.jsonl.gz", GOOD, "plain.jsonl.gz:1: broken gzip data (Not a gzipped file"),
    (
        "latin1.jsonl",
        GOOD + '{"prompt": "café"}\n'.encode("latin-1"),
        "latin1.jsonl:2: byte 0xE9 at character 16 is not UTF-8",
    ),
    ("latin1.csv", "prompt\ncafé\n".encode("latin-1"), "latin1.csv:2: byte 0xE9 at character 4 is not UTF-8"),
    ("latin1.csv.gz", gzip.compress("prompt\ncafé\n".encode("latin-1")), "latin1.csv.gz:2: byte 0xE9"),
    ("utf16.jsonl", GOOD.decode().encode("utf-16"), "is not UTF-8 (UTF-16)"),
    ("utf16.csv", "prompt\na\n".encode("utf-16-le"), "utf16.csv:1: a NUL byte"),
    ("zipped.jsonl", gzip.compress(GOOD), "is not UTF-8 (gzip: name it .gz)"),
    ("nul.jsonl", GOOD + b'{"prompt": "a\0b"}\n', "nul.jsonl:2: a NUL byte"),
    (
        "deep.jsonl",
        GOOD + b'{"answer":' + b"[" * 100000 + b"]" * 100000 + b"}\n",
        "deep.jsonl:2: lists and objects more than 100 deep",
    ),
    (
        "deepish.jsonl",
        GOOD + b'{"answer":' + b'{"a":' * 150 + b"1" + b"}" * 151 + b"\n",
        "deepish.jsonl:2: lists and objects more than 100",
    ),
    (
        "digits.jsonl",
        GOOD + b'{"prompt": "x", "n": ' + b"7" * 5000 + b"}\n",
        "digits.jsonl:2: not valid JSON (Exceeds the limit (4300 digits)",
    ),
    (
        "nan.jsonl",
        GOOD + b'{"prompt": "x", "n": NaN}\n',
        "nan.jsonl:2: not valid JSON (NaN and infinities are not JSON, write null: NaN)",
    ),
    (
        "infinity.jsonl",
        b'{"n": [-Infinity]}\n',
        "infinity.jsonl:1: not valid JSON (NaN and infinities are not JSON, write null: -Infinity",
    ),
    (
        "large.jsonl",
        b'{"n": -1e999}\n',
        "large.jsonl:1: not valid JSON (a number is more than a double holds: -1e999)",
    ),
    (
        "twice.jsonl",
        GOOD + b'{"prompt": "x", "prompt": "y"}\n',
        "twice.jsonl:2: not valid JSON (a name stands twice in one object: 'prompt'",
    ),
    ("array.jsonl", b'[{"prompt": "x"}]\n', "array.jsonl:1: expected an object, found list"),
    ("pretty.jsonl", b'{\n"prompt": "x"\n}\n', "pretty.jsonl:1: not valid JSON"),
    (
        "two.jsonl",
        b'{"prompt": "x"} {"prompt": "y"}\n',
        "two.jsonl:1: not valid JSON (Extra data at character 16)",
    ),
    ("tail.jsonl", GOOD + b'{"prompt": "x"', "tail.jsonl:2: not valid JSON"),
    (
        "half.jsonl",
        GOOD + b'{"prompt": "broken \\ud83d emoji"}\n',
        r"half.jsonl:2: column 'prompt': half a character ('\ud83d', a lone",
    ),
    (
        "inner.jsonl",
        b'{"prompt": "x", "tags": [{"a": "\\uDE00"}]}\n',
        r"inner.jsonl:1: column 'tags': half a character ('\ude00'",
    ),
    (
        "key.jsonl",
        b'{"prompt": "x", "m": {"\\ud800": 1}}\n',
        r"key.jsonl:1: column 'm': half a character ('\ud800'",
    ),
    ("long.csv", b"prompt,answer\na,b\na,b,c\n", "long.csv:3: 3 cells, and the header has 2 columns"),
    (
        "short.csv",
        b"prompt,answer,tests\na,b,c\n\na,b\n",
        "short.csv:4: 2 cells, and the header has 3 columns",
    ),
    ("header.csv", b"prompt,answer,prompt\na,b,c\n", "header.csv:1: the column 'prompt' stands twice"),
    (
        "open.csv",
        b'prompt,answer\na,b\n"c,d\n' + b"e,f\n" * 99,
        "open.csv:3: not valid csv (unexpected end of data)",
    ),
    ("quote.csv", b'prompt,answer\n"say "hi" now",b\n', "quote.csv:2: not valid csv ("),
    ("not.parquet", GOOD, "not.parquet: no parquet file that can be read ("),
    ("empty.parquet", b"", "empty.parquet: no parquet file that can be read ("),
    ("rows.txt", GOOD, "rows.txt: unknown kind of file; give one of .jsonl, .csv"),
]


@pytest.mark.parametrize(("name", "data", "message"), UNREADABLE, ids=[name for name, _, _ in UNREADABLE])
def test_what_cannot_be_read_is_refused_by_file_and_line(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    said = refusal(tmp_path / name)
    assert message in said
    assert name in said
    assert len(said.splitlines()) == 1
    said.encode()


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_a_torn_parquet_file_is_refused(tmp_path: Path) -> None:
    whole = parquet(
        tmp_path / "whole.parquet", [{"prompt": f"{i} {'x' * 99}"} for i in range(5000)]
    ).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-9])
    assert "cut.parquet: no parquet file that can be read" in refusal(tmp_path / "cut.parquet")
    (tmp_path / "holed.parquet").write_bytes(whole[:200] + b"\xff" * 3000 + whole[3200:])
    assert "holed.parquet: no parquet file that can be read" in refusal(tmp_path / "holed.parquet")


def test_places_that_are_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "folder.jsonl").mkdir()
    assert "no such file" in refusal("data/questions")  # beside a folder, no hub name
    assert "no such file" in refusal("a.json/b/c")
    assert "folder.jsonl: EmptyDatasetError" in refusal("folder.jsonl")
    os.mkfifo(tmp_path / "pipe.parquet")
    assert "this is no file" in refusal("pipe.parquet")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_bytes(GOOD)
    (tmp_path / "r.jsonl").chmod(0)
    assert "Permission denied" in refusal(tmp_path / "r.jsonl")


@pytest.mark.parametrize("zipped", [False, True])
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path, zipped: bool) -> None:
    files = {"r.jsonl": BOM + GOOD + BOM + GOOD, "r.csv": BOM + b"prompt,answer\r\nWhat is 1+1?,2\r\n"}
    for name, data in files.items():
        path = tmp_path / (name + ".gz" * zipped)
        path.write_bytes(gzip.compress(data) if zipped else data)
        rows = rows_of(path)
        assert [row["prompt"] for row in rows] == ["What is 1+1?"] * len(rows)
        assert len(rows) == data.count(b"1+1")


def test_csv_cells_may_be_long_hold_lines_and_stand_after_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text('prompt,answer\n\n"two\nlines, ""quoted""",' + "x" * 200_000 + "\nnext,y\n")
    rows = list(raw_rows(DatasetConfig(path=str(path), task="t")))
    assert [where for where, _ in rows] == [f"{path}:3", f"{path}:5"]
    assert rows[0][1] == {"prompt": 'two\nlines, "quoted"', "answer": "x" * 200_000}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.text(), st.integers(), st.booleans()), min_size=1, max_size=6))
def test_any_unicode_comes_back_from_every_kind_of_file(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int, bool]]
) -> None:
    folder = tmp_path_factory.mktemp("r")
    asked = [{"prompt": text, "n": n % 1000} for text, n, _ in rows]
    lines = [json.dumps(row, ensure_ascii=plain) for row, (_, _, plain) in zip(asked, rows, strict=True)]
    data = "\n".join(lines).encode()
    (folder / "r.jsonl").write_bytes(data)
    (folder / "r.jsonl.gz").write_bytes(gzip.compress(data))
    for path in (folder / "r.jsonl", folder / "r.jsonl.gz", parquet(folder / "r.parquet", asked)):
        assert rows_of(path) == asked


# ---- folders and splits


def in_turn(rows: list[dict[str, Any]]) -> list[Any]:
    return [row["n"] for row in rows]


def hub_folder(folder: Path) -> Path:
    for split, numbers in (("train", range(4)), ("test", range(4, 6))):
        for part in range(2):
            rows = [{"prompt": "x", "n": n} for n in numbers if n % 2 == part]
            parquet(folder / "data" / f"{split}-0000{part}-of-00002.parquet", rows)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A data set\n")
    return folder


def test_a_folder_as_the_hub_leaves_it(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "set")
    rows = list(raw_rows(DatasetConfig(path=str(folder), task="t")))
    assert in_turn([row for _, row in rows]) == [0, 2, 1, 3]
    assert rows[2][0] == f"{folder}/data/train-00001-of-00002.parquet:1"
    assert in_turn(rows_of(folder, split="test")) == [4, 5]
    assert f"data set {folder}: no split 'validation'; choose one of ['test', 'train']" in refusal(
        folder, split="validation"
    )


@pytest.mark.parametrize(
    "name", ["train.jsonl", "data/train.csv", "train/a.jsonl.gz", "part-1.jsonl", "x.json"]
)
def test_folders_of_other_shapes(tmp_path: Path, name: str) -> None:
    path = tmp_path / "set" / name
    path.parent.mkdir(parents=True)
    text = b"prompt,n\na,1\n" if ".csv" in name else b'{"prompt": "a", "n": 1}\n'
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert [int(n) for n in in_turn(rows_of(tmp_path / "set"))] == [1]
    assert "no split 'test'; choose one of ['train']" in refusal(tmp_path / "set", split="test")


def test_a_bad_row_in_a_folder_is_named_by_its_own_file(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(GOOD + b"{\n")
    assert f"{tmp_path}/train.jsonl:2: not valid JSON" in refusal(tmp_path)


def test_a_folder_with_subsets_asks_for_one(tmp_path: Path) -> None:
    configs = []
    for name in ("main", "extra"):
        parquet(tmp_path / name / "train-00000-of-00001.parquet", [{"prompt": name}])
        configs.append(f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n")
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    assert rows_of(tmp_path, subset="extra") == [{"prompt": "extra"}]
    for fields in ({}, {"subset": "none"}):
        message = refusal(tmp_path, **fields)
        assert "'extra'" in message
        assert "name one in the data set's field subset" in message


def test_a_split_that_means_nothing_is_refused(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "r.jsonl").write_bytes(GOOD)
    assert "split: 'test' means nothing for one file" in refusal(tmp_path / "r.jsonl", split="test")
    assert "subset: 'main' means nothing for one file" in refusal(tmp_path / "r.jsonl", subset="main")
    one = datasets.Dataset.from_list([{"prompt": "a"}])
    one.save_to_disk(tmp_path / "one")
    assert rows_of(tmp_path / "one") == [{"prompt": "a"}]
    assert "no split 'test'" in refusal(tmp_path / "one", split="test")
    datasets.DatasetDict({"train": one, "val": one}).save_to_disk(tmp_path / "two")
    assert rows_of(tmp_path / "two") == rows_of(tmp_path / "two", split="val") == [{"prompt": "a"}]
    assert "no split 'test'; choose one of ['train', 'val']" in refusal(tmp_path / "two", split="test")
    datasets.DatasetDict({"val": one}).save_to_disk(tmp_path / "only")
    assert rows_of(tmp_path / "only") == [{"prompt": "a"}]


@pytest.mark.long
def test_a_hub_data_set_is_read_from_the_cache_when_offline(tmp_path: Path) -> None:
    """The cache as a download leaves it, read by another process that may not ask the hub."""
    fill: Callable[[str], str] = (
        "import datasets, datasets.builder as b\n"
        "made = datasets.load_dataset_builder('parquet', data_files={{'train': {0!r}}})\n"
        "made.download_and_prepare({1!r})\n"
    ).format
    cache = tmp_path / "cache"
    place = cache / "some-one___questions" / "default" / "0.0.0" / ("a" * 40)
    file = parquet(tmp_path / "r.parquet", [{"prompt": "kept"}])
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(cache),
        "HF_HOME": str(tmp_path / "home"),
    }
    subprocess.run(
        [sys.executable, "-c", fill(str(file), str(place))],
        check=True,
        env=env,
        capture_output=True,
        timeout=100,
    )
    for shard in place.glob("parquet-*.arrow"):
        shard.rename(shard.with_name(shard.name.replace("parquet-", "questions-")))
    (place / "dataset_info.json").write_text(
        (place / "dataset_info.json")
        .read_text()
        .replace('"dataset_name": "parquet"', '"dataset_name": "questions"')
    )
    read = (
        "from frpo.config import DatasetConfig; from frpo.files import raw_rows\n"
        "for fields in ({}, {'split': 'train'}): "
        "print(list(raw_rows(DatasetConfig(path='some-one/questions', task='t', **fields))))\n"
        "try: list(raw_rows(DatasetConfig(path='some-one/other', task='t')))\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", read], env=env, capture_output=True, text=True, timeout=100)
    first, second, third = done.stdout.splitlines()[-3:]
    assert first == second == "[('some-one/questions:1', {'prompt': 'kept'})]", done.stderr
    assert "data set some-one/other: ConnectionError: Couldn't reach 'some-one/other' on the Hub" in third
