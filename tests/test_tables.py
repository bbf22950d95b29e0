# SPDX-License-Identifier: Apache-2.0
"""Tables from and to files: no value is lost, invented or renamed without an error."""

from __future__ import annotations

import gzip
import io
import subprocess
import sys
import tempfile
import warnings
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet as pq

from clam_kernels import tables
from clam_kernels.exceptions import DataFileError

NAN = np.nan


@pytest.fixture
def table(tmp_path: Path):
    """A function that writes a text to a file and reads it as a table."""

    def read(text: str | bytes, **options):
        path = tmp_path / "x.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return tables.read(path, **options)

    return read


@pytest.mark.parametrize(
    ("text", "names", "rows"),
    [
        ("a,b\n1,2\n", ["a", "b"], [[1, 2]]),
        ("5,2\n1,2\n", None, [[5, 2], [1, 2]]),
        ("NA,2\n1,2\n", None, [[NAN, 2], [1, 2]]),
        ("null,NULL\n1,2\n", None, [[NAN, NAN], [1, 2]]),
        ("?,None\n1,2\n", None, [[NAN, NAN], [1, 2]]),
        ("N/A\n1\n", None, [[NAN], [1]]),
        ("a,NA\n1,2\n", ["a", "NA"], [[1, 2]]),
        ("a,b", ["a", "b"], []),
        ("a,b\n", ["a", "b"], []),
        ("5,2,3", None, [[5, 2, 3]]),
        ("7", None, [[7]]),
        ("\ufeffa,b\r\n1,2\r\n\r\n3,4\r\n", ["a", "b"], [[1, 2], [3, 4]]),
        ("\ufeff5,b\n".replace("b", "2"), None, [[5, 2]]),
        ('"a\nb",c\n1,2\n', ["a\nb", "c"], [[1, 2]]),
        ("\n\na,b\n1,2\n", ["a", "b"], [[1, 2]]),
        ("true,2\nfalse,3\n", None, [[1, 2], [0, 3]]),
    ],
)
def test_names_and_rows_are_distinguished(table, text, names, rows):
    x, names_read = table(text)
    assert names_read == names
    np.testing.assert_array_equal(x, np.array(rows, float).reshape(len(rows), x.shape[1]))


@pytest.mark.parametrize(
    ("text", "names", "rows", "message"),
    [
        ("0,1,2\n5,6,7\n", ["0", "1", "2"], 1, "became column names; --no-header"),
        ("2019,2020\n5,6\n", None, 2, "became data; --header"),
        ("0\n5\n", None, 2, "became data; --header"),
        ("5.1,setosa\n4.9,2\n", ["5.1", "setosa"], 1, "became column names; --no-header"),
    ],
)
def test_a_doubtful_header_warns(table, text, names, rows, message):
    with pytest.warns(UserWarning, match=message):
        x, names_read = table(text)
    assert (names_read, len(x)) == (names, rows)


def test_the_caller_decides_about_the_header(table):
    assert table("0,1\n5,6\n", header=False)[1] is None
    assert table("0,1\n5,6\n", header=False)[0].shape == (2, 2)
    assert table("2019,2020\n5,6\n", header=True)[1] == ["2019", "2020"]
    x, names = table("2019,2020\n5,6\n", expected=["2019", "2020"])
    assert (x.tolist(), names) == ([[5, 6]], ["2019", "2020"])


@pytest.mark.parametrize("digits", [8, 10, 13])
def test_a_first_row_beyond_the_first_64_kib_is_read_whole(table, digits):
    """With 8 and 10 digits the first 64 KiB end behind the sign of a number."""
    cells = [f"-1.{i:0{digits}d}e-{i % 9}" for i in range(65536 // (digits + 7) + 9)]
    x, names = table("\n".join([",".join(cells)] * 2))
    assert names is None
    np.testing.assert_array_equal(x, [[float(cell) for cell in cells]] * 2)


def test_long_names_are_read_whole(table):
    names = [f"name {i} {'x' * 20}" for i in range(9000)]
    x, names_read = table(",".join(names) + "\n" + ",".join(["1.5"] * 9000))
    assert names_read == names
    assert x.shape == (1, 9000)


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_an_empty_line_of_one_column_is_a_row(table, line_end):
    x, names = table(line_end.join(["a", "1", "", "3", "9", "", ""]))
    assert names == ["a"]
    np.testing.assert_array_equal(x[:, 0], [1, NAN, 3, 9, NAN])
    x, names = table(line_end.join(["", "5", "", "6", ""]))
    assert names is None
    np.testing.assert_array_equal(x[:, 0], [NAN, 5, NAN, 6])


HOSTILE = [
    "a,b",
    'c"d',
    '"',
    "e\nf",
    "g\r",
    "h\r\n",
    "Größe",
    "日本",
    " x ",
    "",
    "x",
    "x",
    "1;2",
    "t\tt",
    "\ufeff",
    "\ufeffa",
    "k\n\ufeff",
    '\ufeff"',
]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet"])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_names_and_numbers_round_trip(tmp_path, suffix, rows):
    path = tmp_path / f"x{suffix}"
    x = np.random.default_rng(0).normal(size=(rows, len(HOSTILE))) * 1e-7
    tables.write(path, x, HOSTILE)
    table_read, names = tables.read(path)
    assert names == HOSTILE
    np.testing.assert_array_equal(table_read, x)


def test_one_hostile_name_round_trips(tmp_path):
    for name in [*HOSTILE, "NA"]:
        for suffix in (".csv", ".tsv", ".parquet"):
            path = tmp_path / f"x{suffix}"
            tables.write(path, np.arange(3.0), [name])
            table_read, names = tables.read(path, header=None if suffix == ".parquet" else True)
            assert names == [name]
            assert table_read.tolist() == [[0], [1], [2]]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_table_round_trips(data):
    names = data.draw(st.lists(st.text('a",;\t\n\r é0.1-', max_size=5), min_size=1, max_size=4))
    cell = st.sampled_from([NAN, np.inf, -(2.0**60), 1e300, -0.5, 3.0]) | st.floats(width=64)
    row = st.lists(cell, min_size=len(names), max_size=len(names))
    x = np.array(data.draw(st.lists(row, max_size=5))).reshape(-1, len(names))
    for suffix in (".csv", ".tsv", ".csv.gz", ".parquet"):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = Path(folder) / f"x{suffix}"
            tables.write(path, x, names)
            for options in ({"header": True, "index_col": False}, {"expected": names}):
                table_read, read = tables.read(path, **options)
                assert read == names
                np.testing.assert_array_equal(table_read, x)


def test_pandas_reads_what_was_written(tmp_path):
    tables.write(tmp_path / "x.csv", np.eye(len(HOSTILE)), HOSTILE)
    frame = pd.read_csv(tmp_path / "x.csv", header=None, keep_default_na=False, dtype=str)
    assert frame.iloc[0].tolist() == HOSTILE


def test_text_keeps_the_digits_of_its_dtype():
    x = np.array([[0.1, 1e22, NAN]], np.float32)
    assert tables.encode(x, ".csv", list("abc")) == b"a,b,c\n0.1,1e+22,nan\n"
    assert tables.encode(x.astype(float), ".csv", list("abc")).startswith(b"a,b,c\n0.10000000149")


def test_text_is_written_without_pyarrow(tmp_path):
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "import numpy as np\nfrom clam_kernels import tables\n"
        "tables.write('x.csv', np.arange(2), ['a,b'])\nnp.save('x.npy', np.eye(2))\n"
        "print(tables.read('x.npy')[0].shape)\n"
        "for call in (lambda: tables.read('x.csv'), lambda: tables.check_output('x.parquet')):\n"
        "    try: call()\n"
        "    except ValueError as error: print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert run.returncode == 0, run.stderr
    shape, reading, writing = run.stdout.splitlines()
    assert shape == "(2, 2)"
    assert "reading it needs pyarrow" in reading
    assert "writing Parquet needs pyarrow" in writing
    assert (tmp_path / "x.csv").read_text() == '"a,b"\n0\n1\n'


def test_the_index_of_a_parquet_file_is_no_feature(tmp_path):
    path = tmp_path / "x.parquet"
    frame = pd.DataFrame({"a": [1.0, 2, 3], "b": [4, 9, 6], "c": [7, 1, 9]})
    for written, names in (
        (frame.sample(frac=1, random_state=1), ["a", "b", "c"]),
        (frame.set_index("b"), ["a", "c"]),
        (frame.set_index(["c", "a"]), ["b"]),
        (frame.set_index(["c"], append=True), ["a", "b"]),
    ):
        written.to_parquet(path)
        x, names_read = tables.read(path)
        assert names_read == names
        np.testing.assert_array_equal(x, written.to_numpy())
        assert len(tables.read(path, index_col=False)[1]) > len(names)
    frame.to_parquet(path, index=False)
    assert tables.read(path)[1] == ["a", "b", "c"]
    assert tables.read(path, index_col="b")[1] == ["a", "c"]


def test_the_index_of_a_csv_is_refused(tmp_path):
    path = tmp_path / "x.csv"
    frame = pd.DataFrame({"a": [1.0, 2], "b": [4, 5]}, index=[7, 3])
    frame.to_csv(path)
    with pytest.raises(DataFileError, match="--index-col '' leaves it out"):
        tables.read(path)
    for options in (
        {"index_col": ""},
        {"index_col": "0"},
        {"drop": ["0"]},
        {"columns": ["a", "b"]},
    ):
        x, names = tables.read(path, **options)
        assert (names, x.tolist()) == (["a", "b"], [[1, 4], [2, 5]])
    assert tables.read(path, index_col=False)[0].tolist() == [[7, 1, 4], [3, 2, 5]]
    pd.read_csv(path).to_csv(path, index=False)
    with pytest.raises(DataFileError, match="--index-col 'Unnamed: 0' leaves it out"):
        tables.read(path)
    pd.DataFrame(np.eye(3)).to_csv(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataFileError, match="the index of a frame"):
            tables.read(path)
        np.testing.assert_array_equal(tables.read(path, index_col="")[0], np.eye(3))


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("names", [["a", "b"], ["0", "1"]])
def test_every_level_of_an_index_is_refused(table, levels, names):
    text = ",".join([*[""] * levels, *names]) + "\n" + ",".join(["5"] * levels + ["1", "2"]) + "\n"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataFileError, match=r"the column '' has .* --index-col '' leaves it"):
            table(text)
        x, names_read = table(text, index_col="")
        assert (names_read, x.tolist()) == (names, [[1, 2]])
        assert table(text, index_col=False)[0].shape == (1, levels + 2)


def test_every_name_that_pandas_makes_is_refused(table):
    text = "Unnamed: 0,Unnamed: 1,a\n7,8,1\n"
    message = r"'Unnamed: 0', 'Unnamed: 1' .* --index-col 'Unnamed: 0,Unnamed: 1' leaves them out"
    for index in (None, "Unnamed: 0", ["Unnamed: 1"]):
        with pytest.raises(DataFileError, match=message):
            table(text, index_col=index)
    assert table(text, index_col=["Unnamed: 0", "Unnamed: 1"])[0].tolist() == [[1]]
    assert table(text, drop=["0", "1"])[0].tolist() == [[1]]
    assert table(text, index_col=False)[0].tolist() == [[7, 8, 1]]
    assert table(text, expected=["Unnamed: 0", "Unnamed: 1", "a"])[0].tolist() == [[7, 8, 1]]
    for name in ("Unnamed: 0.1", "Unnamed: 2", "Unnamed: 0_level_1"):
        with pytest.raises(DataFileError, match=f"'{name}' has the name that pandas gives"):
            table(f"a,{name},b\n1,2,3\n")
    assert table(",NA\n1,2\n", header=False)[1] is None
    assert table(",,\n1,2,3\n")[1] is None


def test_columns_are_chosen(table):
    text = 'id,"a,b",c,label\nx,1,2,y\nz,3,4,q\n'
    for options in ({"drop": ["id", "label"]}, {"columns": ["a,b", "c"]}):
        x, names = table(text, **options)
        assert (names, x.tolist()) == (["a,b", "c"], [[1, 2], [3, 4]])
    assert table(text, columns=["c", "a,b"])[0].tolist() == [[2, 1], [4, 3]]
    assert table("5,1\n6,2\n", drop=["0"])[0].tolist() == [[1], [2]]
    with pytest.raises(DataFileError, match="no column 'd'; the table has the columns 'id', 'a,b'"):
        table(text, columns=["d"])
    with pytest.raises(DataFileError, match="no column '2'; the table has 2 columns without names"):
        table("5,1\n6,2\n", drop=["2"])
    for twice in (["c", "c"], ["c", "2"], ["a,b", "c", "1"]):
        with pytest.raises(DataFileError, match="--columns: expected every column once, got '"):
            table(text, columns=twice)
    with pytest.raises(DataFileError, match="every column once, got 1 twice"):
        table("5,1\n6,2\n", columns=["1", "1"])
    assert table("a,a\n1,2\n", columns=["a"])[0].tolist() == [[1, 2]]
    with pytest.raises(DataFileError, match="no column is left"):
        table("5,1\n6,2\n", drop=["0", "1"])


@pytest.mark.parametrize(
    "word", ["", " ", "N/A", "n/a", "NULL", "null", "None", "?", " NA ", "nan"]
)
def test_words_for_missing_cells(table, word):
    x, _ = table(f"a,b\n1,2\n{word},3\n")
    np.testing.assert_array_equal(x, [[1, 2], [NAN, 3]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a;b\n1,5;1.000\n", "column 'b', row 1: expected a number, got '1.000'; write thousands"),
        ("a;b\n1,5;2\n2,5;1.5\n", "column 'b', row 2: .* got '1.5'; --decimal . reads a point"),
        ("a\n1\n1.000,5\n", "column 'a', row 2: .* got '1.000,5'; write thousands"),
        ("1.000;2\n3;4\n", "column 0, row 1: expected a number, got '1.000'"),
    ],
)
def test_a_point_is_refused_beside_a_decimal_comma(table, text, message):
    text = text.replace("1.000,5", '"1.000,5"')
    with pytest.raises(DataFileError, match=message):
        table(text, decimal=",")


def test_a_comma_between_thousands_is_no_decimal_comma(table):
    for value in ("1,000", "-12,345,678", "1,000.5"):
        with pytest.raises(DataFileError, match=r"expected a number, got .*; write thousands"):
            table(f'a,b\n"{value}",2\n')
    for value in ("0,125", "1,5", "1,0000"):
        with pytest.raises(DataFileError, match="--decimal , reads a comma"):
            table(f'a,b\n"{value}",2\n')
    x, names = table('"1,5",2\n"2,5",3\n', decimal=",")
    assert (names, x.tolist()) == (None, [[1.5, 2], [2.5, 3]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a,b\n" + "1,2\n" * 16 + "n/a?,3\n",
            "column 'a', row 17: expected a number, got 'n/a\\?'",
        ),
        ("5,2\n1,x\n", "column 1, row 2: expected a number, got 'x'"),
        ("a,b\n1,2020-01-01\n", "column 'b', row 1: expected a number, got '2020-01-01'"),
        ("a;b\n1,5;2\n", "column 'a', row 1: expected a number, got '1,5'; --decimal ,"),
        ("1,5;2,5\n3,5;4\n", "column 0, row 1: expected a number, got '1,5'; --decimal ,"),
        ("a,b\n1,2\n1,9007199254740993\n", "column 'b', row 2: .* 9007199254740993,"),
        ("a,b\n1,2\n1,-9223372036854775809\n", "column 'b', row 2: .* -9223372036854775809,"),
        ("a,b\n.5,18446744073709551617\n", "column 'b', row 1: .* 18446744073709551617,"),
        ("a,b\n1,2\n1,9007199254740993.0\n", "column 'b', row 2: .* 9007199254740993.0,"),
        ("a\n" + "9" * 400 + "\n", "column 'a', row 1: "),
        ("a,b\n1\n", "x.csv: row 1: expected 2 cells, as the first row has, got 1 in '1'"),
        ("a,b\n1,2\n\n1,2,3\n1,2\n", "row 2: expected 2 cells, .* got 3 in '1,2,3'"),
        ('a,b\n"1",2\n' + "1,2\n" * 400_000 + "1\n", "row 400002: expected 2 cells"),
        (b"a,b\n1,2\n\xff\n", "row 2: expected 2 cells, as the first row has, got 1"),
        ("a,b\n1,x\n1\n", "row 2: expected 2 cells"),
        (b"a,b\n1,2\n3,\xff4\n", r"column 'b', row 2: expected text in UTF-8, got b'\\xff4'"),
        (b"5,1\n1,2\nx,\xe9\n", "column 0, row 3: expected a number, got 'x'"),
        ("", "the file is empty"),
        ("\n\n", "the file is empty"),
        ("Größe\n1\n".encode("latin-1"), "expected text in UTF-8"),
        ("a,b\n1,2\n".encode("utf-16"), "expected text in UTF-8"),
    ],
)
def test_refusals_name_column_row_and_value(table, text, message):
    with pytest.raises(DataFileError, match=message):
        table(text)


def test_integers_that_float64_represents_are_read(table, tmp_path):
    text = "a,b\n9007199254740992,9223372036854775808\n-9007199254740994,1e300\n"
    assert table(text)[0].tolist() == [[2.0**53, 2.0**63], [-(2.0**53) - 2, 1e300]]
    path = tmp_path / "x.parquet"
    pd.DataFrame({"a": [1, 2**53], "b": [2**62, 2**63 - 1]}).to_parquet(path)
    assert tables.read(path, columns=["a"])[0].tolist() == [[1], [2.0**53]]
    with pytest.raises(DataFileError, match=f"column 'b', row 2: .* {2**63 - 1},"):
        tables.read(path)


@pytest.mark.parametrize(("digits", "scale"), [(18, 0), (38, 5), (60, 20)])
def test_decimals_are_read_as_integers_are(tmp_path, digits, scale):
    path = tmp_path / "x.parquet"

    def put(*values: str) -> None:
        cells = [None if value is None else Decimal(value) for value in values]
        kind = (pa.decimal128 if digits < 39 else pa.decimal256)(digits, scale)
        pq.write_table(pa.table({"a": [0] * len(cells), "b": pa.array(cells, kind)}), path)

    spelled = ["3", "-7", str(2**53 + 2), str(-(2**59)), "123456789012345680"]
    put(*spelled, None)
    np.testing.assert_array_equal(tables.read(path)[0][:, 1], [*map(float, spelled), NAN])
    put("1", None, "9007199254740993")
    with pytest.raises(DataFileError, match=r"column 'b', row 3: .* 9007199254740993, .*--drop"):
        tables.read(path)
    assert tables.read(path, drop=["b"])[0].tolist() == [[0]] * 3
    if scale:
        few = ["0.5", "0.1", "-0.00007", "9007199254740993.5"]
        put(*few)
        assert tables.read(path)[0][:, 1].tolist() == list(map(float, few))


def test_whole_rows_decide_the_delimiter(table):
    assert table('"a,b";c\n1;2\n')[1] == ["a,b", "c"]
    assert table('"a;b;c",d\n1,2\n')[1] == ["a;b;c", "d"]
    assert table('"a,b,c"\td\n1\t2\n')[1] == ["a,b,c", "d"]
    assert table('",",",","",";"\n')[1] == [",", ",", "", ";"]
    assert table('"b"\t"0,"" a"\n')[1] == ["b", '0," a']
    assert table("1,5;2,5", decimal=",")[0].tolist() == [[1.5, 2.5]]
    x, names = table("1,5;2,5\n3,5;4\n", decimal=",")
    assert (names, x.tolist()) == (None, [[1.5, 2.5], [3.5, 4]])
    x, _ = table("a;b\n1,5; ?\n 3,5;4\n", decimal=",")
    np.testing.assert_array_equal(x, [[1.5, NAN], [3.5, 4]])


def test_gzip_is_recognised_by_content(table):
    assert table(gzip.compress(b"a,b\n1,2\n"))[0].tolist() == [[1, 2]]


def test_standard_input_is_a_file(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", np.eye(2))
    np.savez(tmp_path / "x.npz", np.eye(2))
    tables.write(tmp_path / "x.csv.gz", np.eye(2), ["a", "b"])
    tables.write(tmp_path / "x.parquet", np.eye(2), ["a", "b"])
    for name in ("x.npy", "x.npz", "x.csv.gz", "x.parquet"):
        content = io.TextIOWrapper(io.BytesIO((tmp_path / name).read_bytes()))
        monkeypatch.setattr(sys, "stdin", content)
        np.testing.assert_array_equal(tables.read("-")[0], np.eye(2))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\nx\n")))
    with pytest.raises(DataFileError, match="standard input: column 'a', row 1"):
        tables.read("-")


def test_a_folder_named_like_a_partition_is_no_column(tmp_path):
    folder = tmp_path / "year=2020"
    folder.mkdir()
    tables.write(folder / "x.parquet", np.eye(2), ["a", "b"])
    assert tables.read(folder / "x.parquet")[1] == ["a", "b"]


def test_an_output_that_cannot_be_written_is_refused(tmp_path):
    for name in ("x.txt", "x.npy.gz", "x.parquet.gz", "x.gz"):
        with pytest.raises(DataFileError, match="expected an output"):
            tables.check_output(tmp_path / name)
    with pytest.raises(ValueError, match="names: expected 2 names, got 1"):
        tables.encode(np.eye(2), ".csv", ["a"])
