"""Greedy decoding in one growing cache: against `generate`, against one row at a time, and against no cache at all."""

import pytest
import torch

from data_prep.base_models import load_base_model
from meteora.study.decoding import EncodedPrefix, TranscriptBatch, common_prefix_length

PROMPTS = ["hello there", " xyz", "hel", "a much longer prompt than all of the others"]
NEW = 14


@pytest.fixture(scope="module")
def tiny():
    """A tiny model in float64, so that equality is exact, with lively weights and frequent ends of text."""
    model, tokenizer = load_base_model("tiny")
    torch.manual_seed(1)
    for weights in model.parameters():
        if weights.dim() > 1:
            torch.nn.init.normal_(weights, std=0.4)
    return model.double().eval(), tokenizer


@pytest.fixture(scope="module")
def encoded(tiny):
    return [tiny[1](prompt)["input_ids"] for prompt in PROMPTS]


def uncached(model, tokens, limit, eos):
    """Greedy decoding that encodes everything anew for every token."""
    answer = []
    while len(answer) < limit:
        with torch.no_grad():
            token = model(torch.tensor([tokens + answer])).logits[0, -1].argmax().item()
        if token == eos:
            break
        answer.append(token)
    return answer


def eos_in_the_middle(model, encoded):
    """A token that some rows write early and others do not: stands in for end-of-text."""
    answers = [uncached(model, tokens, NEW, None) for tokens in encoded]
    for token in answers[0][2:]:
        lengths = {row.index(token) if token in row else NEW for row in answers}
        if len(lengths) > 1:
            return token
    raise AssertionError("choose another seed: no token tells the rows apart")


def start(tiny, encoded, eos, prefix=None):
    batch = TranscriptBatch(tiny[0], len(encoded), pad_token_id=tiny[1].pad_token_id, eos_token_id=eos, prefix=prefix)
    batch.extend(encoded)
    return batch


@pytest.mark.parametrize("last", [True, False])
def test_a_padded_batch_equals_generate_and_uncached_decoding(tiny, encoded, last):
    model, tokenizer = tiny
    eos = eos_in_the_middle(model, encoded)
    answers = start(tiny, encoded, eos).decode([NEW] * len(encoded), last=last)
    assert len({len(answer) for answer in answers}) > 1
    assert answers == [uncached(model, tokens, NEW, eos) for tokens in encoded]
    for tokens, answer in zip(encoded, answers):
        ids = torch.tensor([tokens])
        generated = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
            eos_token_id=eos, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        written = generated[0, len(tokens) :].tolist()
        assert answer == (written[:-1] if written[-1] == eos else written)


def test_growing_transcripts_equal_encoding_the_whole_transcript(tiny, encoded):
    model, _ = tiny
    eos = eos_in_the_middle(model, encoded)
    limits = [NEW, 3, NEW, 5]
    batch = start(tiny, encoded, eos)
    transcripts = [list(tokens) for tokens in encoded]
    for segments in (None, [[eos, 5], [eos, 6, 7, 8], [eos], [eos, 9]], [[eos, 11, 12], [eos], [eos, 7], [eos, 13]]):
        if segments:
            batch.extend(segments)
            transcripts = [row + segment for row, segment in zip(transcripts, segments)]
        answers = batch.decode(limits)
        assert answers == [uncached(model, row, limit, eos) for row, limit in zip(transcripts, limits)]
        transcripts = [row + answer for row, answer in zip(transcripts, answers)]


def test_an_encoded_prefix_changes_nothing_and_is_not_used_up(tiny, encoded):
    model, _ = tiny
    shared = [[3, 4, 5, 6, 7, 8] + tokens for tokens in encoded]
    length = common_prefix_length(shared)
    assert length >= 6
    prefix = EncodedPrefix(model, shared[0][:length])
    expected = start(tiny, shared, -1).decode([NEW] * 4, last=True)
    for _ in range(2):
        rest = [tokens[length:] for tokens in shared]
        assert start(tiny, rest, -1, prefix).decode([NEW] * 4, last=True) == expected


def test_common_prefix_leaves_every_prompt_a_token():
    assert common_prefix_length([[1, 2, 3], [1, 2, 4], [1, 2, 3, 9]]) == 2
    assert common_prefix_length([[1, 2], [1, 2, 3]]) == 1
    assert common_prefix_length([[2, 1], [1, 2]]) == 0
    assert common_prefix_length([[1, 2, 3]]) == 0
    assert common_prefix_length([]) == 0


def test_limits_of_zero_and_misuse(tiny, encoded):
    batch = start(tiny, encoded, -1)
    assert [len(answer) for answer in batch.decode([0, 2, 0, 1])] == [0, 2, 0, 1]
    with pytest.raises(RuntimeError, match="extend"):
        batch.decode([1] * 4)
    with pytest.raises(ValueError, match="at least one token"):
        TranscriptBatch(tiny[0], 1, pad_token_id=0, eos_token_id=1).extend([[]])
