"""Files are read by what they hold, whatever they are called; what is no data is refused."""

import bz2
import gzip
import json
import lzma

import pyarrow
import pytest
from pyarrow import parquet

from jaxft.config import DataConfig
from jaxft.data.discovery import find_sources
from jaxft.data.problems import Problems
from jaxft.errors import DataError

ROWS = [{"prompt": f"question {i}, please", "completion": "é\n" * i} for i in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def zstd(data):
    buffer = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(data)
    return buffer.getvalue().to_pybytes()


COMPRESS = {"gz": gzip.compress, "zst": zstd, "bz2": bz2.compress, "xz": lzma.compress}


def read(path, **options):
    problems = Problems("test")
    [source] = find_sources(str(path), DataConfig(**options))
    values = [row.value for row in source.rows(problems)]
    problems.check()
    return values, source.remark()


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.xyz", LINES, "JSON lines"),
        ("a", LINES, "JSON lines"),
        ("a.txt", LINES, "JSON lines"),
        ("a.csv", LINES, "JSON lines"),
        ("a.csv", json.dumps(ROWS, indent=2), "JSON"),
        ("a.data", "\ufeff\n " + json.dumps(ROWS), "JSON"),
        ("a.jsonl", json.dumps(ROWS), "JSON"),
        ("a.jsonl", json.dumps(ROWS, indent=1), "JSON"),
        ("a.json", LINES, ""),
        ("a.jsonl", LINES, ""),
        ("a.json", json.dumps(ROWS), ""),
    ],
)
def test_json_is_found_by_its_content(tmp_path, name, content, kind):
    values, remark = read(write(tmp_path / name, content))
    assert values == ROWS
    assert remark == (f"; the file holds {kind}, which its name does not say" if kind else "")


def test_parquet_is_found_by_its_content(tmp_path):
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.jsonl")
    values, remark = read(tmp_path / "a.jsonl")
    assert values == ROWS
    assert "holds Parquet" in remark


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a", "a.jsonl.gz"])
def test_compressed_files_are_read_as_what_they_are_within(tmp_path, ending, name):
    content = {
        ".json": json.dumps(ROWS),
        ".csv": 'prompt,completion\n"a\nb",c\n',
        ".txt": "one\ntwo\n\nthree\n",
    }
    text = next((content[end] for end in content if name.endswith(end)), LINES)
    plain, _ = read(write(tmp_path / name, text))
    packed = COMPRESS[ending](text.encode())
    if not name.endswith(".gz"):
        assert read(write(tmp_path / f"{name}.{ending}", packed)) == (plain, "") or name == "a"
    assert read(write(tmp_path / name, packed))[0] == plain
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / f"train.jsonl.{ending}", COMPRESS[ending](LINES.encode()))
    assert read(folder)[0] == ROWS


def test_several_frames_in_one_file_are_all_read(tmp_path):
    for ending, compress in COMPRESS.items():
        path = write(tmp_path / f"a.jsonl.{ending}", compress(LINES.encode()) * 2)
        assert read(path)[0] == ROWS * 2, ending


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_file_that_was_not_downloaded_whole_is_refused(tmp_path, ending):
    text = "".join(json.dumps({"text": str(i) * 9}) + "\n" for i in range(30_000)).encode()
    packed = COMPRESS[ending](text)
    path = write(tmp_path / f"a.jsonl.{ending}", packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"a\.jsonl\.\w+ cannot be read: "):
        read(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xyz", b"PK\x03\x04....", "is a zip archive or a spreadsheet"),
        ("a.csv", b"PK\x03\x04....", "is a zip archive or a spreadsheet"),
        ("a.txt", b"%PDF-1.7", "is a PDF"),
        ("a.txt", b"text\0more", "is a binary file"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16"), "is UTF-16 text and cannot.*Save it as UTF-8"),
        (
            "a.gz",
            gzip.compress(gzip.compress(b"x", mtime=0), mtime=0),
            "is gzip within compressed data",
        ),
        ("a.jsonl", gzip.compress(b"PK\x03\x04....", mtime=0), "is a zip archive"),
        ("a.parquet", LINES.encode(), "not a readable Parquet file"),
    ],
)
def test_what_is_no_data_is_refused(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / name, content))


def test_a_table_without_a_name_of_one_is_not_taken_for_text(tmp_path):
    path = write(tmp_path / "a.data", "question,answer\nq,a\nr,b\n")
    with pytest.raises(DataError, match=r"may be a table.*'.*a\.data:format=text'"):
        read(path)
    assert read(f"{path}:format=text")[0] == ["question,answer\nq,a\nr,b"]
    columns = f"{path}:format=columns:prompt=question:completion=answer"
    assert read(columns)[0][0] == {"question": "q", "answer": "a"}


@pytest.mark.parametrize(
    "text",
    [
        "[Chorus]\nLa, la, la\n",
        "{\\bf Theorem.} Every field\nis a ring.\n",
        "First line, with comma\nsecond\nthird, with one\n",
        "Only two, lines\nlike, this\n",
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.tex", "a"])
def test_text_stays_text(tmp_path, name, text):
    assert read(write(tmp_path / name, text)) == ([text.strip("\n")], "")


def test_json_in_a_text_file_is_text_where_text_is_asked_for(tmp_path):
    path = write(tmp_path / "a.txt", LINES)
    assert read(f"{path}:format=text")[0] == [LINES.strip("\n")]
    assert read(write(tmp_path / "a.xyz", LINES), format="text")[0] == ROWS


def test_a_first_row_longer_than_what_is_looked_at_is_read(tmp_path):
    rows = [{"text": "x" * 200_000}, {"text": "y"}]
    for name in ("a.json", "a.xyz", "a.jsonl"):
        path = write(tmp_path / name, "".join(json.dumps(row) + "\n" for row in rows))
        assert read(path)[0] == rows
