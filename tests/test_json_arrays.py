"""A JSON array of objects: each is a row or a malformed line, wherever the text is cut into stretches."""
import json
import random

import pytest

from addons.inputs import json_arrays
from addons.inputs.text import Text


def records_of(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return list(json_arrays.read_records(Text(str(path), "utf-8")))


@pytest.mark.parametrize("indent", [None, 1, 4])
@pytest.mark.parametrize("name", ["t.json", "t.jsonl"])
def test_an_array_is_a_table(tmp_path, score_input, indent, name):
    """Objects of an array are rows, however they are laid out; a list of captions makes several, late keys are columns."""
    values = [{"url": "a", "caption": "b\n]é,{", "n": 1.50}, {"url": "c", "caption": ["d", "e"], "more": {"x": [1]}}]
    (tmp_path / name).write_text(json.dumps(values, indent=indent))
    _, rows, bad, manifest = score_input(name)
    assert [(row["url"], row["caption"], row["n"], row["more"], row["caption_index"]) for row in rows] == [
        ("a", "b\n]é,{", "1.5", "", "0"), ("c", "d", "", '{"x": [1]}', "0"), ("c", "e", "", '{"x": [1]}', "1")]
    assert bad == [] and manifest["input_rows"] == 2
    assert score_input(name)[0].code == 0


def test_lines_under_the_name_of_json(tmp_path, score_input):
    """A .json with one object a line is read as such; one object alone that is no row is exit 3."""
    (tmp_path / "t.json").write_text('{"url": "a", "caption": "b"}\n' * 2)
    assert len(score_input("t.json")[1]) == 2
    for text in ('{"images": [{"url": "a", "caption": "b"}]}', '{\n "images": []\n}', "[]", "[1, 2]", "[", '["a"'):
        (tmp_path / "t.json").write_text(text)
        outcome = score_input("t.json", "--fresh")[0]
        assert outcome.code == 3 and "t.json" in outcome.stderr.splitlines()[-1], text


def test_an_empty_array_among_others_is_a_file_without_rows(tmp_path, score_input):
    """A shard that is an array of nothing is left out, as an empty file is; alone it is refused."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d/0.json").write_text("[]")
    (tmp_path / "d/1.json").write_text('[{"url": "a.png", "caption": "x"}]')
    (tmp_path / "d/2.json").write_text("[\n]\n")
    outcome, rows, *_ = score_input("d", max_failure_rate=1.0)
    assert outcome.code == 0 and len(rows) == 1, outcome.stderr
    outcome, *_ = score_input("d/0.json", "--fresh")
    assert outcome.code == 3 and len(outcome.stderr.strip().splitlines()) == 1


def test_flawed_records_cost_themselves(tmp_path, score_input):
    """A record that is no JSON is malformed, with its line; the others are rows; a list that is cut off is told."""
    text = '[\n{"url": "a", "caption": "b"},\n{"url": bad, "caption": "x"},\n{"url": "c", "caption": "d"},\n5,\n' \
           '{"url": "e"},\n{"url": "f", "caption": "g"}, {"url": "h", "capt'
    (tmp_path / "t.json").write_text(text)
    outcome, rows, bad, _ = score_input("t.json")
    assert [row["url"] for row in rows] == ["a", "c", "f"]
    assert [row["line"] for row in bad] == ["3", "5", "6", "7"] and "ends before its list does" in outcome.stderr
    (tmp_path / "t.json").write_text('[{"url": "a", "caption": "b"}]\n\n{"url": "z", "caption": "y"}\n')
    _, rows, bad, _ = score_input("t.json", "--fresh")
    assert len(rows) == 2 and not bad  # what follows a list may be rows of lines


@pytest.mark.parametrize("stretch", [7, 50, 333, 10_000])
def test_stretches_do_not_matter(tmp_path, monkeypatch, stretch):
    """Wherever the text is cut, the records and their lines are the same, those of chance among them."""
    monkeypatch.setattr(json_arrays, "STRETCH_BYTES", stretch)
    rng = random.Random(stretch)
    for _ in range(40):
        values = [rng.choice([{"a": "é€😀" * rng.randint(0, 9)}, {"b": [1, {"c": None}]}, 12345, "x,]", {}, [], True])
                  for _ in range(rng.randint(0, 12))]
        text = json.dumps(values, indent=rng.choice([None, 1]), ensure_ascii=rng.random() < 0.5)
        found = records_of(tmp_path / "t.json", text)
        assert [json.loads(record) for _, record in found] == values
        lines = text.splitlines()
        assert all(record.splitlines()[0] in lines[number - 1] for number, record in found if record)


def test_hostile_arrays_end(tmp_path, monkeypatch):
    """Texts of chance are read to their end, in order and without a record that is empty."""
    monkeypatch.setattr(json_arrays, "STRETCH_BYTES", 40)
    monkeypatch.setattr(json_arrays, "MAX_RECORD_CHARS", 300)
    rng = random.Random(1)
    for _ in range(500):
        text = "[" + "".join(rng.choice(['{"a": 1}', "{", "}", "},{", "[", "]", ",", '"', "\n", "\\", "é", "1", " ", "nul"])
                             for _ in range(rng.randint(0, 60)))
        found = records_of(tmp_path / "t.json", text)
        assert all(record.strip() for _, record in found)
        rest = text
        for _, record in found:
            rest = rest[rest.index(record.rstrip("\n")) + len(record.rstrip("\n")):]
        kept = "".join(record for _, record in found)
        assert sorted(set(text) - set(kept) - set("[], \n")) == []
