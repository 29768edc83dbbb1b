"""Transcripts of several tasks for the gates."""

from meteora.study.transcripts import mixed_transcripts

EXAMPLES = {task: [{"task": task, "prompt": f"{task}{i}", "response": "x"} for i in range(9)] for task in "abc"}


def test_transcripts_are_seeded_mixed_and_of_every_length():
    rows = mixed_transcripts(EXAMPLES, 200, most_turns=4, seed=1)
    assert rows == mixed_transcripts(EXAMPLES, 200, most_turns=4, seed=1) != mixed_transcripts(EXAMPLES, 200, seed=2)
    assert {len(row["turns"]) for row in rows} == {2, 3, 4}
    turns = [turn for row in rows for turn in row["turns"]]
    assert all(turn in EXAMPLES[turn["task"]] for turn in turns)
    shares = [sum(turn["task"] == task for turn in turns) / len(turns) for task in EXAMPLES]
    assert all(0.25 < share < 0.42 for share in shares)
