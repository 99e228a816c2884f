"""Laws of tables: cells are read as they stand, and a row that does not fit is an error that names its line."""

from __future__ import annotations

import csv
import json
import random

import pandas
import pytest

from etf_adapt.data.inputs import open_inputs
from etf_adapt.data.load import load_data
from etf_adapt.errors import DataError
from etf_adapt.sources import tables
from etf_adapt.sources.tables import read_tables


def write(path, *lines, encoding="utf-8"):
    path.write_bytes("".join(f"{line}\n" for line in lines).encode(encoding))
    return path


def labelled(path, labels):
    return write(path, "text,label", *(f"text {row},{label}" for row, label in enumerate(labels)))


@pytest.mark.parametrize("seed", range(20))
def test_any_csv_that_is_written_by_the_rules_is_read_back_verbatim(seed, tmp_path):
    generator = random.Random(seed)
    pieces = [
        '"',
        ",",
        "\n",
        "\r\n",
        "\t",
        " ",
        "NA",
        "null",
        "007",
        "1.10",
        "é",
        "\u2028",
        "'",
        "\\",
        "x" * 200_000,
        "#",
    ]
    rows = [[*("".join(generator.choices(pieces, k=generator.randint(1, 4))) for _ in range(3))] for _ in range(30)]
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["first", "second", "third"], *rows])
    read = read_tables([tmp_path / "rows.csv"])
    assert [list(row.values()) for row in read.to_list()] == rows


def test_a_quotation_mark_in_a_tab_separated_file_is_a_character(tmp_path):
    file = write(tmp_path / "rows.tsv", "text\tlabel", '"well begun\ta', 'half "done"\tb', "it's 5\"\ta")
    assert read_tables([file])["text"][:] == ['"well begun', 'half "done"', "it's 5\""]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["001", "002", "010"], ["001", "002", "010"]),
        (["1.1", "1.10", "2.0"], ["1.1", "1.10", "2.0"]),
        ([*["2", "10", "1"] * 20_000, "other"], ["1", "10", "2", "other"]),  # the last row alone is no number
        (["A01", *["000", "001"] * 20_000], ["000", "001", "A01"]),  # the first alone
        (["10", "9", "1"], ["1", "9", "10"]),  # integers, as they would be written again
        (["-1", "0", "1"], ["-1", "0", "1"]),
        (["+1", "0", "1"], ["+1", "0", "1"]),
        (["NA", "null", "None"], ["NA", "None", "null"]),
        (["True", "False", "True"], ["False", "True"]),
    ],
)
def test_labels_are_never_numbers_by_a_guess(labels, names, tmp_path):
    data = load_data(str(labelled(tmp_path / "train.csv", [*labels, *labels])), validation_fraction=0)
    assert data.label_names == names
    assert [names[label] for label in data.train["label"]] == [*labels, *labels]


def test_types_do_not_differ_by_file_of_a_split_and_labels_match_by_name_between_splits(tmp_path):
    labelled(tmp_path / "train-0.csv", ["0", "1"] * 9)
    labelled(tmp_path / "train-1.csv", ["0", "x"] * 9)
    labelled(tmp_path / "test.csv", ["1", "0"])  # integers here
    data = load_data(str(tmp_path), validation_fraction=0)
    assert data.label_names == ["0", "1", "x"] and data.test["label"][:] == [1, 0]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            ["text,label", "a,b", "c,d,e"],
            r"rows.csv`: the row on line 3 has 3 fields, and the header has 2: put a cell",
        ),
        (["text,label", "a,b", "", "c"], r"the row on line 4 has 1 fields, and the header has 2: add what is missing"),
        (["text,label", '"two', 'lines",b', "c,d,e"], r"the row on line 4 has 3 fields"),
        (["text,label", "a,b", '"c,d', '"e,f'], r"the row that begins on line 3 cannot be read"),
        (["text,label", "a,b", '"c,d', "e,f"], r"the row that begins on line 3 cannot be read"),
        (["text,text", "a,b"], r"names column `text` twice"),
    ],
)
def test_a_row_that_does_not_fit_is_an_error_with_file_and_line(lines, words, tmp_path):
    with pytest.raises(DataError, match=words):
        load_data(str(write(tmp_path / "rows.csv", *lines)))


@pytest.mark.parametrize("header", ["i like it,positive", "i like it,1", "text,3"])
def test_a_table_without_column_names_keeps_its_first_row(header, tmp_path):
    second = header.split(",")[1]
    rows = [f"text {row},{second if row % 2 else 'negative'}" for row in range(40)]
    with pytest.raises(DataError, match=f"Column name `{second}` looks like a cell of the first row: begin the table"):
        load_data(str(write(tmp_path / "rows.csv", header, *rows)))
    data = load_data(str(tmp_path / "rows.csv"), label_column=second, text_column=header.split(",")[0])
    assert data.description["rows_in_source"] == {"train": 40}  # a person who names the columns knows them


@pytest.mark.parametrize("columns", [["0", "1"], ["0", "1", "2"], ["2019", "1", "-1"]])
def test_columns_with_numbers_for_names_are_read_where_the_inputs_are_named(columns, tmp_path):
    rows = [",".join([f"text {row}", "ab"[row % 2], *["x"] * (len(columns) - 2)]) for row in range(40)]
    file = str(write(tmp_path / "rows.csv", ",".join(columns), *rows))
    text, label = columns[:2]
    assert load_data(file, label_column=label, text_column=text).label_names == ["a", "b"]
    assert next(iter(open_inputs(file, task="text", column=text))) == ("text 0",)
    with pytest.raises(
        DataError, match=r"looks like a cell of the first row.*name the column of its inputs by `text_column`"
    ):
        open_inputs(file, task="text")


def test_files_of_one_split_have_one_header_in_any_order(tmp_path):
    write(tmp_path / "train-0.csv", "text,label", "a,x", "b,y")
    write(tmp_path / "train-1.csv", "label,text", "y,c")
    assert read_tables([tmp_path / "train-0.csv", tmp_path / "train-1.csv"])["text"][:] == ["a", "b", "c"]
    with pytest.raises(DataError, match=r"train-2.csv` has columns label, words, and `.*train-0.csv` has text, label"):
        read_tables([tmp_path / "train-0.csv", write(tmp_path / "train-2.csv", "label,words", "y,c")])


def test_encodings(tmp_path):
    file = write(tmp_path / "rows.csv", "text,label", "né,a", encoding="utf-8-sig")
    assert read_tables([file]).column_names == ["text", "label"]
    with pytest.raises(DataError, match=r"latin.csv` is not encoded in UTF-8"):
        read_tables([write(tmp_path / "latin.csv", "text,label", "né,a", encoding="latin-1")])


def test_a_column_of_row_numbers_without_a_name_is_no_mistake(tmp_path):
    file = write(tmp_path / "rows.csv", ",text,label", *(f"{row},text {row},{'ab'[row % 2]}" for row in range(20)))
    assert load_data(str(file), validation_fraction=0).label_names == ["a", "b"]


def test_class_names_that_look_alike_stay_apart_with_a_warning(tmp_path, caplog):
    file = labelled(tmp_path / "train.csv", ["Cat", "cat ", "dog", "ﬁsh", "fish"] * 9)
    assert len(load_data(str(file), validation_fraction=0).label_names) == 5
    assert [record.message.split(": ")[1] for record in caplog.records] == ["'Cat', 'cat '", "'fish', 'ﬁsh'"]


# -- csv as others write it


def test_a_csv_separated_by_semicolons_or_tabs_is_told_by_its_header(tmp_path):
    for mark in ";\t":
        file = write(
            tmp_path / "rows.csv", f"text{mark}label", f'"one, two{mark}"{mark}1,5', f"x{mark}a", encoding="utf-8-sig"
        )
        assert read_tables([file]).to_list() == [
            {"text": f"one, two{mark}", "label": "1,5"},
            {"text": "x", "label": "a"},
        ]


def test_empty_files_are_named_and_files_without_rows_are_none(tmp_path):
    empty, header = write(tmp_path / "train-0.csv"), write(tmp_path / "train-1.csv", "text,label")
    rows = labelled(tmp_path / "train-2.csv", ["1", "0"])
    for files in ([empty, rows], [rows, empty], [empty]):
        with pytest.raises(DataError, match=r"train-0.csv` is empty: remove it"):
            read_tables(files)
    assert read_tables([header, rows])["label"][:] == [1, 0]  # integers, though one file has none


# -- json


def lines_of(path, rows):
    return write(path, *map(json.dumps, rows))


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([*[0, 1] * 6_000, "007"], ["0", "007", "1"]),  # the last row alone is no number
        (["007", *[0, 1] * 6_000], ["0", "007", "1"]),  # the first alone
        ([1, "1", True, "x"], ["1", "true", "x"]),
        ([10, 9, 9, 10], ["9", "10"]),
        ([True, False, False], ["False", "True"]),
        (["2020-01-01", "2021-01-01T00:00:00"], ["2020-01-01", "2021-01-01T00:00:00"]),
        ([2**70, 5, 5], ["1180591620717411303424", "5"]),
    ],
)
def test_json_labels_are_of_one_type_in_the_whole_file_as_they_are_written(labels, names, tmp_path):
    rows = [{"text": f"text {row}", "label": label} for row, label in enumerate([*labels, *labels])]
    for suffix in ("jsonl", "json"):
        file = tmp_path / f"rows.{suffix}"
        lines_of(file, rows) if suffix == "jsonl" else file.write_text(json.dumps(rows, indent=1))
        data = load_data(str(file), validation_fraction=0)
        assert data.label_names == names and data.train.num_rows == len(rows)
        written = [label if isinstance(label, str) else json.dumps(label) for label in labels]
        assert [names[label].lower() for label in data.train["label"]] == [*map(str.lower, written)] * 2


def test_json_rows_may_lack_a_name_and_parts_may_differ_in_type(tmp_path):
    files = [lines_of(tmp_path / "train-0.jsonl", [{"text": "a", "label": 1}, {"text": "b"}])]
    files.append(lines_of(tmp_path / "train-1.jsonl", [{"label": "x", "more": [1]}]))
    rows = [{"text": "a", "label": "1", "more": None}, {"text": "b", "label": None, "more": None}]
    assert read_tables(files).to_list() == [*rows, {"text": None, "label": "x", "more": [1]}]


def test_json_as_pandas_writes_it(tmp_path):
    rows = pandas.DataFrame({"text": ["a", "b"], "label": ["x", "y"]})
    for orient in ("columns", "records"):
        rows.to_json(tmp_path / f"{orient}.json", orient=orient)
    (tmp_path / "list.json").write_text(json.dumps(rows.to_dict("list"), indent=2))
    for name in ("columns", "records", "list"):
        assert read_tables([tmp_path / f"{name}.json"]).to_list() == rows.to_dict("records")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"text": "a"}\n\n{"text": "b"\n{"text": "c"}\n', "cannot be read: .* on line 3"),
        ('[{"text": "a"},\n {"text": "b"\n', "cannot be read: .* on line 3"),
        ('{"text": "a"}\n["b"]\n', r"line 2 holds \[\"b\"\], and must hold an object"),
        ('["a", "b"]', 'row 0 holds "a", and must hold an object'),
        ('{"version": 1, "data": []}\n{', "cannot be read"),
        ('{"version": 1,\n "data": []}', "holds no table"),
        ('"text"', "holds no table"),
        ("", "cannot be read"),
    ],
)
def test_a_json_file_that_does_not_fit_is_an_error_with_file_and_line(text, words, tmp_path):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match=f"rows.json`.*{words}"):
        load_data(str(tmp_path / "rows.json"))


def test_tables_of_the_same_content_are_the_same_to_the_cache_and_others_are_not(tmp_path):
    files = [
        labelled(tmp_path / name, labels) for name, labels in (("a.csv", "xyz"), ("b.csv", "xyz"), ("c.csv", "xyx"))
    ]
    first, second, third = (read_tables([file])._fingerprint for file in files)
    assert first == second != third


@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
def test_a_stream_holds_the_cells_of_the_whole_table_and_reads_as_it_goes(tmp_path, name, monkeypatch):
    monkeypatch.setattr(tables, "_ROWS_AT_ONCE", 10)
    file, separator = tmp_path / name, "," if name == "t.csv" else "\t"
    file.write_text(
        separator.join(("id", "text")) + "\n" + "".join(f"{id:03}{separator}row {id}\n" for id in range(35))
    )
    head, rows = tables.stream_table(file)
    assert head.column_names == ["id", "text"] and head.num_rows == 10
    assert list(rows) == read_tables([file]).to_list()
    file.write_text(separator.join(("id", "text")) + "\n" + f"1{separator}a\n" * 40 + "2\n")
    _, rows = tables.stream_table(file)
    assert [next(rows)["id"] for _ in range(40)] == ["1"] * 40
    with pytest.raises(DataError, match="the row on line 42 has 1 fields"):
        next(rows)


@pytest.mark.parametrize("lines", [["", "text;label", "a;x", "b;y"], ["", "", "text\tlabel", "a\tx", "b\ty"]])
def test_a_blank_line_before_the_header_hides_no_separator(lines, tmp_path):
    assert read_tables([write(tmp_path / "rows.csv", *lines)])["text"][:] == ["a", "b"]


def test_a_blank_line_before_the_first_object_is_passed_over(tmp_path):
    lines = ["", '{"text": "a", "label": "x"}', "", '{"text": "b", "label": "y"}']
    assert read_tables([write(tmp_path / "rows.jsonl", *lines)])["text"][:] == ["a", "b"]
