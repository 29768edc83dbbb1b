"""Stored predictions: reused only for the same question, resumed after an interruption, never half-written."""

import json

import pytest

from meteora.study.predictions import file_name, fingerprint, reuse_or_produce

IDS = ["a", "b", "c", "d"]


def producer(calls, *, stop_after=None):
    def produce(missing):
        calls.append(list(missing))
        for done, i in enumerate(missing):
            if done == stop_after:
                raise KeyboardInterrupt
            yield {i: f"answer {IDS[i]}\u2028\n"}

    return produce


EXPECTED = [f"answer {name}\u2028\n" for name in IDS]


def test_predictions_are_made_once_and_kept(tmp_path):
    calls = []
    for _ in range(2):
        assert reuse_or_produce(tmp_path / "x" / "p.jsonl", {"k": 2}, IDS, producer(calls)) == EXPECTED
    assert calls == [[0, 1, 2, 3]]
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["p.jsonl"]


def test_an_interrupted_run_resumes_where_it_stopped(tmp_path):
    calls, path = [], tmp_path / "p.jsonl"
    with pytest.raises(KeyboardInterrupt):
        reuse_or_produce(path, {}, IDS, producer(calls, stop_after=2))
    assert reuse_or_produce(path, {}, IDS, producer(calls)) == EXPECTED
    assert calls == [[0, 1, 2, 3], [2, 3]]


def test_another_header_discards_what_was_there(tmp_path):
    calls, path = [], tmp_path / "p.jsonl"
    for header in ({"weights": "1"}, {"weights": "2"}, {"weights": "1"}):
        reuse_or_produce(path, header, IDS, producer(calls))
    assert calls == [[0, 1, 2, 3]] * 3


def test_more_examples_reuse_the_old_ones_and_fewer_do_not_lose_order(tmp_path):
    calls, path = [], tmp_path / "p.jsonl"
    reuse_or_produce(path, {}, IDS[:2], producer(calls))
    assert reuse_or_produce(path, {}, IDS[::-1][:2] + IDS[:2], lambda missing: iter([{0: "d", 1: "c"}])) == [
        "d", "c", EXPECTED[0], EXPECTED[1],
    ]  # fmt: skip


@pytest.mark.parametrize("damage", ["", "{", '{"fingerprint": 1}\n{"id"', "[]\n", '"text"\n'])
def test_a_damaged_file_is_made_anew(tmp_path, damage):
    calls, path = [], tmp_path / "p.jsonl"
    reuse_or_produce(path, {}, IDS, producer(calls))
    path.write_text(damage)
    assert reuse_or_produce(path, {}, IDS, producer(calls)) == EXPECTED
    assert len(calls) == 2
    assert len(path.read_text().splitlines()) == 5 and json.loads(path.read_text().splitlines()[0])["fingerprint"]


def test_misuse_is_refused(tmp_path):
    with pytest.raises(ValueError, match="distinct ids"):
        reuse_or_produce(tmp_path / "p.jsonl", {}, ["a", "a"], producer([]))
    with pytest.raises(RuntimeError, match="'b'"):
        reuse_or_produce(tmp_path / "p.jsonl", {}, IDS[:2], lambda missing: iter([{0: "x"}]))


def test_names_become_one_component_each():
    assert file_name("independent", "a/b", "..").parts == ("independent", "a%2Fb", "...jsonl")
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})
