"""Reading text: every format gives its documents in a fixed order, and each kind of wrong input says what is wrong."""

import gzip
import json
import random

import pyarrow
import pyarrow.parquet
import pytest

from expertmesh.system.train.corpus import check_source, documents, fingerprint, source_files

TEXTS = ["plain words", "naïve café — ü 漢字 🙂\nsecond line", '"quotes" and \\slashes\\', "tab\tand  spaces "]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return str(path)


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def test_every_format_gives_its_documents_in_name_order(tmp_path):
    write_parquet(tmp_path / "a.parquet", id=[1, 2, 3], text=["row one", None, TEXTS[1]])
    write_lines(tmp_path / "b.jsonl", [{"text": TEXTS[2]}, {"content": TEXTS[3], "title": "t"}])
    with gzip.open(tmp_path / "c.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write('{"text": "packed line"}\n')
    with gzip.open(tmp_path / "d.txt.gz", "wt", encoding="utf-8") as file:
        file.write("packed text")
    (tmp_path / "e.TXT").write_text("upper-case suffix")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "f.md").write_bytes("\ufeffmark\r\nand Windows line end".encode())
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "g.txt").write_text("not for you")
    expected = ["row one", *TEXTS[1:], "packed line", "packed text", "upper-case suffix", "mark\nand Windows line end"]
    assert list(documents(str(tmp_path))) == expected
    assert list(documents(str(tmp_path / "**" / "*.md"))) == expected[-1:]
    assert list(documents(str(tmp_path / "a.parquet"))) == expected[:2]


def test_random_records_come_back_from_jsonl_and_parquet(tmp_path):
    generator = random.Random(0)
    alphabet = 'abc \n\t"\\é漢🙂\u2028\x1f'  # U+2028 and U+001F end a line for str.splitlines, not for JSON
    texts = ["x" + "".join(generator.choices(alphabet, k=generator.randrange(40))) for _ in range(700)]
    lines = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    rows = write_parquet(tmp_path / "a.parquet", content=pyarrow.array(texts, pyarrow.large_string()))
    assert list(documents(lines)) == texts
    assert list(documents(rows)) == texts


@pytest.mark.parametrize(
    "max_bytes, expected",
    [
        (3, ["aé"]),  # ends with the document
        (2, ["a"]),  # would end inside é
        (4, ["aé", "b"]),  # ends inside the second document
        (6, ["aé", "bcd"]),  # ends with the source
        (99, ["aé", "bcd"]),  # more than there is
    ],
)
def test_max_bytes_cuts_the_last_document_at_a_character(tmp_path, max_bytes, expected):
    source = write_lines(tmp_path / "a.jsonl", [{"text": "aé"}, {"text": "bcd"}])
    assert list(documents(source, max_bytes)) == expected


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d b"}\n')
    assert list(documents(str(tmp_path / "a.jsonl"))) == ["a? b"]


def test_blank_documents_and_lines_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": " \\n"}\n\n{"text": "word"}\n  \n')
    (tmp_path / "empty.txt").write_text("")
    assert list(documents(str(tmp_path))) == ["word"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", '{"text": "x"}\n{"title": "y", "id": 3}\n', r"a\.jsonl, line 2: key \"text\".*'title', 'id'"),
        ("a.jsonl", '{"text": 5}\n', r"line 1: key \"text\" .* with a string is missing"),
        ("a.jsonl", '\n\n{"text": "x"}\n{"text": "torn', r"line 4: not JSON"),
        ("a.jsonl", '["text"]\n', r"line 1: a JSON list; each line must be an object"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"line 1: not JSON"),
        ("a.txt", b"good \xff", r"a\.txt: not UTF-8 at byte 5"),
        ("a.txt", "", r"holds no text"),
        ("a.csv", "x", r"a\.csv is not a file this reads; .*\.jsonl"),
        ("a.parquet", b"PAR1 no", r"a\.parquet: not a readable parquet file"),
        ("a.txt.gz", b"not gzip", r"a\.txt\.gz: not a whole gzip file"),
        ("a.txt.gz", gzip.compress(b"words " * 100, mtime=0)[:-9], r"a\.txt\.gz: not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9, mtime=0)[:-4], r"a\.jsonl\.gz: not a whole gzip file"),
    ],
)
def test_unreadable_files_say_where_and_why_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        list(documents(str(tmp_path / name)))
    assert "\n" not in str(caught.value)


def test_parquet_without_a_string_column_names_the_columns(tmp_path):
    source = write_parquet(tmp_path / "a.parquet", text=[1, 2], body=["x", "y"])
    with pytest.raises(ValueError, match=r"a\.parquet: string column .* missing; .* 'text' \(int64\), 'body' \(string"):
        list(documents(source))


def test_check_source_finds_what_is_missing_by_names_alone(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.csv").write_text("x")
    for source, message in [
        ("nowhere", "nowhere does not exist"),
        ("folder", "holds no file this reads"),
        ("folder/a.csv", "is not a file this reads"),
        ("folder/*.txt", r"no file matches .*\*\.txt"),
        ("folder/*.csv", "holds no file this reads"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_source(str(tmp_path / source))
    (tmp_path / "folder" / "broken.jsonl").write_text("{")
    check_source(str(tmp_path / "folder"))
    check_source("stdlib")


def test_max_bytes_below_one_is_refused():
    with pytest.raises(ValueError, match="max_bytes is 0"):
        next(documents("stdlib", 0))


def test_fingerprint_follows_the_files(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    before = fingerprint(source_files(str(tmp_path)))
    assert fingerprint(source_files(str(tmp_path))) == before
    (tmp_path / "b.txt").write_text("two")
    assert fingerprint(source_files(str(tmp_path))) != before


def test_the_standard_library_is_a_mix_of_prose_and_code_in_a_fixed_order():
    texts = list(documents("stdlib", 1_000_000))
    assert texts == list(documents("stdlib", 1_000_000))
    assert sum(len(text.encode()) for text in texts) == 1_000_000
    prose = [text for text in texts if "\n****" in text[:200]]
    assert len(prose) >= 3
    assert sum(len(text) for text in texts) > 2 * sum(len(text) for text in prose)
    names = {path.name for path in source_files("stdlib")}
    assert sum('The "while" statement is used' in text for text in documents("stdlib")) == 1, "an excerpt is left in"
    assert "argparse.py" in names and "topics.py" not in names and "test_os.py" not in names
