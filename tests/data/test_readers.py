"""Every file kind, read back exactly, and every way in which one can be broken, with the place in the message."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.data import read_rows, read_table
from veneer.errors import DataError

Write = Callable[[str, str | bytes], str]


def failure(source: str) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(source)
    return str(caught.value)


def test_csv_keeps_values_as_written(write: Write) -> None:
    rows = read_rows(write("a.csv", "id,text,label\n01,NA,neg\n02,null,\n"))
    assert rows.to_list() == [{"id": "01", "text": "NA", "label": "neg"}, {"id": "02", "text": "null", "label": ""}]


def test_csv_with_mark_crlf_quotes_and_line_breaks(write: Write) -> None:
    table = read_table(write("a.csv", b'\xef\xbb\xbftext,label\r\n"one,\r\n""two""",x\r\n\r\nthree,y\r\n'))
    assert table.rows.to_list() == [{"text": 'one,\r\n"two"', "label": "x"}, {"text": "three", "label": "y"}]
    assert table.place(0).endswith("a.csv, line 2")
    assert table.place(1).endswith("a.csv, line 5")


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_csv_with_another_delimiter(write: Write, delimiter: str) -> None:
    rows = read_rows(write("a.csv", f"text{delimiter}label\na, b{delimiter}x\n"))
    assert rows[0] == {"text": "a, b", "label": "x"}


def test_csv_with_one_column_and_an_index(write: Write) -> None:
    assert read_rows(write("a.csv", "text\nhello\n\nworld\n"))["text"][:] == ["hello", "world"]
    assert read_rows(write("b.csv", ",text\n0,hello\n")).column_names == ["column_1", "text"]


def test_csv_with_a_long_field_leaves_the_csv_module_as_it_was(write: Write) -> None:
    before = csv.field_size_limit()
    assert len(read_rows(write("a.csv", "text,label\n" + "x" * 200_000 + ",a\n"))[0]["text"]) == 200_000
    assert csv.field_size_limit() == before


def test_csv_with_a_wrong_number_of_fields(write: Write) -> None:
    message = failure(write("a.csv", 'text,label\n"a\nb",x\none, two,y\n'))
    assert "a.csv, line 4: 3 fields ('one, two,y')" in message
    assert "line 1 names 2: text, label" in message
    assert "double quotes" in message


@pytest.mark.parametrize("row", ['"Great" film,x', '"never closed,x'])
def test_csv_with_broken_quoting(write: Write, row: str) -> None:
    message = failure(write("a.csv", f"text,label\nfine,x\n{row}\nfine,y\n"))
    assert "a.csv, line 3: broken quoting" in message
    assert "twice" in message


def test_csv_with_repeated_names_or_without_rows(write: Write) -> None:
    assert "names ['text'] more than once" in failure(write("a.csv", "text,text\na,b\n"))
    assert "no rows below it" in failure(write("b.csv", "text,label\n"))


def test_tsv_with_and_without_quoting(write: Write) -> None:
    quoted = read_rows(write("a.tsv", 'text\tlabel\n"a\tb"\tx\n'))
    assert quoted[0] == {"text": "a\tb", "label": "x"}
    plain = read_table(write("b.tsv", 'text\tlabel\n"Great" film\tx\nIt is 5" long\ty\n"open\tx\n'))
    assert plain.values("text") == ['"Great" film', 'It is 5" long', '"open']
    assert plain.place(2).endswith("line 4")


def test_tsv_with_a_wrong_number_of_fields(write: Write) -> None:
    assert "line 3: 1 fields ('alone')" in failure(write("a.tsv", "text\tlabel\na\tx\nalone\n"))


def test_jsonl_with_missing_keys_mark_and_blank_lines(write: Write) -> None:
    table = read_table(write("a.jsonl", '\ufeff{"text": "a\u2028b"}\r\n\r\n{"text": "c", "label": 1}\n'))
    assert table.rows.to_list() == [{"text": "a\u2028b", "label": None}, {"text": "c", "label": 1}]
    assert table.place(1).endswith("a.jsonl, line 3")


def test_ndjson_and_upper_case_endings(write: Write) -> None:
    assert len(read_rows(write("a.ndjson", '{"text": "a"}\n'))) == 1
    assert len(read_rows(write("A.JSONL", '{"text": "a"}\n'))) == 1


def test_jsonl_broken_on_line_17(write: Write) -> None:
    lines = ['{"text": "good"}'] * 16 + ['{"text": "bad" "label": 1}'] + ['{"text": "good"}']
    message = failure(write("a.jsonl", "\n".join(lines)))
    assert "a.jsonl, line 17, column 16: not valid JSON (Expecting ',' delimiter)" in message
    assert '{"text": "bad" "label": 1}' in message
    assert "remove this line" in message


def test_jsonl_cut_short(write: Write) -> None:
    assert "line 2, column 10" in failure(write("a.jsonl", '{"text": "a"}\n{"text": "b'))


def test_jsonl_of_something_else(write: Write) -> None:
    assert "line 2: the list ['b']. Expected one JSON object" in failure(write("a.jsonl", '{"text": "a"}\n["b"]\n'))


def test_jsonl_with_mixed_types_names_both_lines(write: Write) -> None:
    message = failure(write("a.jsonl", '{"a": null}\n{"a": 1}\n\n{"a": "b"}\n'))
    assert "column 'a' mixes types: line 2 has the number 1, line 4 has the text 'b'" in message


def test_jsonl_with_a_value_that_no_column_holds(write: Write) -> None:
    assert "column 'a' cannot be read" in failure(write("a.jsonl", f'{{"a": {2**70}}}\n'))
    assert "column 'a'" in failure(write("b.jsonl", '{"a": "x"}\n{"a": "\\ud800"}\n'))


def test_json_array(write: Write) -> None:
    table = read_table(write("a.json", '[\n {"text": "a"},\n {"text": "b"}\n]'))
    assert table.values("text") == ["a", "b"]
    assert table.place(1).endswith("a.json, row 2")


def test_json_that_is_jsonl(write: Write) -> None:
    path = write("a.json", '{"text": "a"}\n{"text": "b"}\n')
    assert read_table(path).place(1).endswith("line 2")
    assert "line 2, column 10" in failure(write("b.json", '{"text": "a"}\n{"text": "b'))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"text": "a"},\n {"text" "b"}]', "a.json, line 2, column 10: not valid JSON"),
        ('{"data": [{"text": "a"}]}', "an object with the keys ['data']"),
        ('"text"', "the text 'text'. Expected an array of objects"),
        ("[]", "an empty array"),
        ('[{"text": "a"}, 3]', "a.json, row 2: the number 3. Expected an object"),
    ],
)
def test_broken_json(write: Write, content: str, expected: str) -> None:
    assert expected in failure(write("a.json", content))


def test_parquet_with_class_names(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features).to_parquet(tmp_path / "a.parquet")
    table = read_table(tmp_path / "a.parquet")
    assert table.rows.features["label"].names == ["neg", "pos"]
    assert table.values("label") == [1, 0]
    assert table.place(1).endswith("a.parquet, row 2")


def test_parquet_in_a_folder_named_like_a_partition(tmp_path: Path) -> None:
    (tmp_path / "label=1").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "label=1" / "a.parquet")
    assert read_rows(tmp_path / "label=1" / "a.parquet").column_names == ["text"]


def test_parquet_truncated_empty_or_not_parquet(tmp_path: Path, write: Write) -> None:
    whole = tmp_path / "whole.parquet"
    pq.write_table(pa.table({"text": ["a"] * 1000}), whole)
    data = whole.read_bytes()
    assert "cut.parquet is not a complete parquet file" in failure(write("cut.parquet", data[: len(data) // 2]))
    assert "not a complete parquet file" in failure(write("other.parquet", b"text,label"))
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), whole)
    assert "whole.parquet is empty: columns text and no rows" in failure(str(whole))


def test_parquet_with_a_repeated_column(tmp_path: Path) -> None:
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "a.parquet")
    assert "more than one column named ['text']" in failure(str(tmp_path / "a.parquet"))


def test_text_file_has_an_example_a_line(write: Write) -> None:
    table = read_table(write("a.txt", "one\r\n\r\n  two\x0cthree\n"))
    assert table.values("text") == ["one", "  two\x0cthree"]
    assert table.place(1).endswith("a.txt, line 3")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.txt"])
@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xef\xbb\xbf"])
def test_empty_files(write: Write, name: str, content: bytes) -> None:
    assert f"{name} is empty" in failure(write(name, content))


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_undecodable_bytes(write: Write, mark: bytes) -> None:
    content = mark + b"text,label\nfine,x\ncaf\xe9,y\n"
    message = failure(write("a.csv", content))
    assert f"a.csv, line 3: byte {content.index(0xE9)} (0xe9) is not utf-8" in message
    assert "iconv" in message


def test_utf16_with_a_mark(write: Write) -> None:
    assert read_rows(write("a.csv", "text,label\ncafé,x\n".encode("utf-16")))[0]["text"] == "café"


def test_unknown_ending_and_unreadable_file(write: Write, tmp_path: Path) -> None:
    assert "files that end in '.xlsx' cannot be read" in failure(write("a.xlsx", "x"))
    (tmp_path / "b.csv").symlink_to(tmp_path / "b.csv")
    with pytest.raises(DataError):
        read_rows(tmp_path / "b.csv")


def test_reading_leaves_nothing_behind_and_sees_changes(write: Write, tmp_path: Path) -> None:
    path = write("data/a.csv", "text,label\na,x\n")
    assert read_rows(path)[0]["text"] == "a"
    write("data/a.csv", "text,label\nb,x\n")
    assert read_rows(path)[0]["text"] == "b"
    assert [entry.name for entry in tmp_path.rglob("*")] == ["data", "a.csv"]


def test_places_name_the_file_when_it_changes(write: Write, tmp_path: Path) -> None:
    write("data/a.csv", "text,label\na,x\nb,x\n")
    write("data/b.csv", "text,label\nc,x\nd,x\n")
    table = read_table(tmp_path / "data")
    a, b = tmp_path / "data" / "a.csv", tmp_path / "data" / "b.csv"
    assert table.places([0, 1, 3]) == f"{a}, line 2; line 3; {b}, line 3"
    assert table.places(range(4), show=2) == f"{a}, line 2; line 3 (and 2 more)"


# Text that files can hold: no lone surrogates (not UTF-8), no NUL and no bare carriage returns (csv readers differ).
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\ufeff"), min_size=1).filter(str.strip)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=5), st.sampled_from([",", "\t"]))
def test_csv_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], delimiter: str) -> None:
    path = tmp_path_factory.mktemp("csv") / ("a.csv" if delimiter == "," else "a.tsv")
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([("text", "label"), *rows])
    path.write_bytes(file.getvalue().encode())
    table = read_table(path)
    assert list(zip(table.values("text"), table.values("label"), strict=True)) == rows
    # Each row begins on the line that its place names.
    lines = file.getvalue().split("\n")
    for number, (text, _) in enumerate(rows):
        line = int(table.place(number).rsplit(" ", 1)[1])
        assert lines[line - 1].startswith('"' + text.split("\n")[0].replace('"', '""').split("\r")[0])


@settings(deadline=None, max_examples=50)
@given(st.lists(texts, min_size=1, max_size=5), st.booleans())
def test_json_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[str], ascii_only: bool) -> None:
    records = [{"text": text} for text in rows]
    folder = tmp_path_factory.mktemp("json")
    lines = "\n".join(json.dumps(record, ensure_ascii=ascii_only) for record in records)
    (folder / "a.jsonl").write_bytes(lines.encode())
    (folder / "a.json").write_bytes(json.dumps(records, ensure_ascii=ascii_only).encode())
    assert read_rows(folder / "a.jsonl").to_list() == records
    assert read_rows(folder / "a.json").to_list() == records
