"""Reading rows: every accepted source, and errors that say where a file is broken."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma

import pytest

from lorakit.data.read import read_rows
from lorakit.errors import DataError

PAIRS = [{"prompt": "one", "completion": "1"}, {"prompt": "two\nlines", "completion": 'with "quotes", and more'}]


def values(rows):
    return [row.values for row in rows]


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def refused(path, *words, **how):
    with pytest.raises(DataError) as caught:
        read_rows(path, **how)
    for word in words:
        assert word in str(caught.value)


def test_jsonl_rows_carry_their_line_numbers_past_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert [(row.values["text"], row.number, row.file) for row in read_rows(path)] == [
        ("a", 1, str(path)),
        ("b", 3, str(path)),
    ]


def test_a_jsonl_string_may_hold_a_unicode_line_separator(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\u2028b\x85c"}\n{"text": "d"}', encoding="utf-8")
    assert values(read_rows(tmp_path / "a.jsonl")) == [{"text": "a\u2028b\x85c"}, {"text": "d"}]


@pytest.mark.parametrize("document", [PAIRS, {"version": 1, "data": PAIRS}])
def test_json_is_a_list_of_objects_or_an_object_that_holds_one(tmp_path, document):
    (tmp_path / "a.json").write_text(json.dumps(document, indent=1))
    rows = read_rows(tmp_path / "a.json")
    assert values(rows) == PAIRS
    assert [row.number for row in rows] == [1, 2]


def test_json_with_several_lists_is_read_by_split(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"train": PAIRS, "test": PAIRS[:1]}))
    assert len(read_rows(path, split="test")) == 1
    refused(path, "several", "train, test")


def test_json_lines_under_the_name_json_are_read(tmp_path):
    (tmp_path / "a.json").write_text(lines(PAIRS))
    assert values(read_rows(tmp_path / "a.json")) == PAIRS


@pytest.mark.parametrize("suffix, delimiter", [("csv", ","), ("tsv", "\t")])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables_keep_quotes_separators_and_line_ends_in_fields(tmp_path, suffix, delimiter, end):
    path = tmp_path / f"a.{suffix}"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter, lineterminator=end)
        writer.writeheader()
        writer.writerows(PAIRS)
    assert values(read_rows(path)) == PAIRS


def test_a_csv_field_may_exceed_the_csv_modules_limit(tmp_path):
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000)
    assert len(read_rows(tmp_path / "a.csv")[0].values["text"]) == 200_000
    assert csv.field_size_limit() == before


def test_parquet_gives_the_same_rows(tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(PAIRS), tmp_path / "a.parquet")
    assert values(read_rows(tmp_path / "a.parquet")) == PAIRS
    assert len(read_rows(tmp_path / "a.parquet", limit=1)) == 1


def test_prose_is_one_document_or_split_at_the_document_mark(tmp_path):
    (tmp_path / "a.txt").write_text("\nOne.\n\nStill one.\n")
    (tmp_path / "b.txt").write_text("One.\n<|endoftext|>\nTwo.\n<|endoftext|>\n")
    assert values(read_rows(tmp_path / "a.txt")) == [{"text": "One.\n\nStill one."}]
    assert values(read_rows(tmp_path / "b.txt")) == [{"text": "One."}, {"text": "Two."}]


@pytest.mark.parametrize("suffix, pack", [("gz", gzip.compress), ("xz", lzma.compress), ("bz2", bz2.compress)])
def test_compressed_text_is_read_and_a_truncated_file_is_an_error(tmp_path, suffix, pack):
    packed = pack(lines(PAIRS).encode())
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(packed)
    assert values(read_rows(path)) == PAIRS
    path.write_bytes(packed[:-12])
    refused(path, str(path), f"broken or incomplete .{suffix}")


def test_a_folder_is_read_in_order_of_names_and_other_files_are_skipped(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"text": "b"}')
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    (tmp_path / "README.md").write_text("about")
    (tmp_path / ".hidden.jsonl").write_text("broken")
    assert [row.values["text"] for row in read_rows(tmp_path)] == ["a", "b"]


def test_a_folder_of_several_splits_needs_a_split(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "train"}')
    (tmp_path / "test.jsonl").write_text('{"text": "test"}')
    assert [row.values["text"] for row in read_rows(tmp_path, split="test")] == ["test"]
    refused(tmp_path, "several splits", "train.jsonl", "test.jsonl")
    refused(tmp_path, "no file for split 'dev'", "train.jsonl", split="dev")


def test_limit_takes_the_first_rows_across_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "1"}\n{"text": "2"}')
    (tmp_path / "b.jsonl").write_text('{"text": "3"}\n{"text": "4"}')
    assert [row.values["text"] for row in read_rows(tmp_path, limit=3)] == ["1", "2", "3"]


def test_a_utf8_byte_order_mark_is_stripped_from_the_first_column(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext\nx")
    assert values(read_rows(tmp_path / "a.csv")) == [{"text": "x"}]


@pytest.mark.parametrize("encoding, name", [("utf-16", "UTF-16"), ("utf-32", "UTF-32")])
def test_other_byte_order_marks_are_named(tmp_path, encoding, name):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "é"}'.encode(encoding))
    refused(path, f"this is {name}", "UTF-8 is expected", "iconv")


def test_a_byte_that_is_not_utf8_is_named_with_line_and_offset(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    refused(path, "line 2", "0xe9", "offset 27", "UTF-8")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
@pytest.mark.parametrize("content", ["", " \n\n"])
def test_an_empty_file_is_an_error(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    refused(tmp_path / name, str(tmp_path / name), "empty")


@pytest.mark.parametrize(
    "name, content", [("a.csv", "prompt,completion\n"), ("a.json", "[]"), ("a.txt", "<|endoftext|>\n")]
)
def test_a_file_without_rows_is_an_error(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    refused(tmp_path / name, "no rows")


def test_broken_jsonl_names_row_and_column(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"\n')
    refused(path, f"{path}, row 2, column 13", "broken JSON")


def test_broken_json_names_line_and_column(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n {"text": "a"},\n {"text": }\n]')
    refused(path, "line 3, column 11", "broken JSON")


@pytest.mark.parametrize(
    "line, kind",
    [("[1]", "a list"), ('"text"', "a string"), ("3", "a number"), ("null", "null"), ("true", "true or false")],
)
def test_a_jsonl_row_that_is_not_an_object_is_an_error(tmp_path, line, kind):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + line)
    refused(path, "row 2", f"{kind} where an object is expected")


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_document_named_jsonl_gets_a_hint(tmp_path, indent):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(PAIRS, indent=indent))
    refused(path, "row 1", "name it .json")


@pytest.mark.parametrize(
    "document, word", [('{"a": 1}', "its keys are: a"), ("3", "a number"), ('[{"a": 1}, 2]', "row 2: a number")]
)
def test_json_without_a_list_of_objects_is_an_error(tmp_path, document, word):
    (tmp_path / "a.json").write_text(document)
    refused(tmp_path / "a.json", word)


def test_a_csv_record_with_the_wrong_number_of_fields_is_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"a\nb",1\nc,2,3\n')
    refused(path, "row 2", "line 4", "3 fields", "the header has 2")


@pytest.mark.parametrize(
    "text, word",
    [
        ('a,b\n1,"2\n', "line 2"),
        ('a,b\n"1"x,2\n', "line 2"),
        ("a;b\n1;2\n", "separated by commas"),
        ("a,a\n1,2\n", "twice: a"),
    ],
)
def test_a_malformed_csv_is_named(tmp_path, text, word):
    (tmp_path / "a.csv").write_text(text)
    refused(tmp_path / "a.csv", word)


def test_a_file_that_is_not_parquet_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"not parquet at all")
    refused(tmp_path / "a.parquet", "a.parquet", "not a readable Parquet file")


def test_a_missing_file_suggests_the_nearest_name_without_asking_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: pytest.fail("the hub was asked for a file name"))
    (tmp_path / "train.jsonl").write_text('{"text": "a"}')
    refused(tmp_path / "trian.jsonl", "no such file", "did you mean 'train.jsonl'")
    refused(tmp_path / "nowhere" / "train.jsonl", "no such file", "nor is there a folder")


@pytest.mark.parametrize("name", ["a.xlsx", "a.jsnl", "a", "a.tar.gz", "a.parquet.gz"])
def test_an_unknown_file_type_lists_the_known_ones(tmp_path, name):
    (tmp_path / name).write_text("x")
    refused(tmp_path / name, "unknown file type", ".jsonl", ".parquet")


def test_a_folder_without_data_says_what_is_in_it(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    refused(tmp_path, "no data files", "notes.md")


def test_a_name_that_is_not_a_path_is_a_hub_dataset(monkeypatch):
    requests = []

    def load_dataset(*args, **kwargs):
        requests.append((*args, kwargs["split"]))
        return PAIRS

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    rows = read_rows("owner/name:main", split="test", limit=2)
    assert requests == [("owner/name", "main", "test[:2]")]
    assert values(rows) == PAIRS
    assert rows[1].where == "owner/name:main (test), row 2"


def test_the_error_names_both_the_missing_file_and_the_hubs_reason(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    refused("owner/name", "owner/name: no such file or folder", "hub (split train): Couldn't reach the Hub")


def test_arrows_nulls_inside_columns_are_no_keys(tmp_path):
    """Arrow gives all objects of a column the same keys."""
    import pyarrow as pa
    from pyarrow import parquet

    def messages(**arguments):
        call = {"function": {"name": "add", "arguments": arguments}}
        return [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]

    values = [{"messages": messages(a=1), "id": None}, {"messages": messages(b=[2]), "id": 2}]
    parquet.write_table(pa.Table.from_pylist(values), tmp_path / "rows.parquet")
    assert [row.values for row in read_rows(tmp_path / "rows.parquet")] == values
