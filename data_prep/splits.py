"""Deterministic train/validation/test splits without a prompt in two of them.

A split never depends on the caps or on Python's hash seed: a smaller cap gives a prefix of what a larger one gives.
"""

import hashlib
import random
from collections.abc import Sequence

TEST_SHARE = 0.2  # the paper's share, and BIG-bench's own
VALIDATION_SHARE = 0.1  # of what is not test
SPLITS = ("train", "valid", "test")

Example = dict
"""{"task", "id", "prompt", "response", "choices": list | None, "references": list (only if several are acceptable)}."""


def stable_rng(*key: object) -> random.Random:
    """A generator seeded by `key` alone, the same on every machine and in every process."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def drop_duplicate_prompts(examples: Sequence[Example], seen: set[str] | None = None) -> list[Example]:
    """The examples whose prompt is neither in `seen` nor that of an earlier one; `seen` is extended in place."""
    seen = set() if seen is None else seen
    kept = []
    for example in examples:
        if example["prompt"] not in seen:
            seen.add(example["prompt"])
            kept.append(example)
    return kept


def split_examples(
    train: Sequence[Example],
    test: Sequence[Example] | None,
    *,
    task: str,
    seed: int,
    sizes: dict[str, int | None],
    max_characters: int | None = None,
) -> tuple[dict[str, list[Example]], dict[str, int]]:
    """Splits one task's examples 80/20 into training and test, and takes a tenth of the 80 for validation.

    Args:
        train: all examples, or the training part where the source publishes a test part.
        test: the published test part, or None to draw 20% of `train` by `seed`. A published part stays what it is:
            adapters found elsewhere were trained on the other one.
        task, seed: seed every shuffle.
        sizes: cap of each split ("train", "valid", "test"); None or absent: all there is.
        max_characters: longer examples (prompt and response) are left out before the caps.

    Returns:
        The three lists, and {"available": examples given, "duplicates": how many had a prompt already seen,
        "too_long": how many were left out}. Where a prompt stands in both parts, test keeps it.
    """
    given = len(train) + len(test or ())
    if test is None:
        pool = drop_duplicate_prompts(train)
        stable_rng(seed, task, "test").shuffle(pool)
        cut = int(len(pool) * TEST_SHARE)
        test_pool, train_pool = pool[:cut], pool[cut:]
    else:
        seen: set[str] = set()
        test_pool = drop_duplicate_prompts(test, seen)
        train_pool = drop_duplicate_prompts(train, seen)
        stable_rng(seed, task, "test").shuffle(test_pool)
    counted = {"available": given, "duplicates": given - len(test_pool) - len(train_pool)}
    stable_rng(seed, task, "train").shuffle(train_pool)
    cut = int(len(train_pool) * VALIDATION_SHARE)
    pools = {"train": train_pool[cut:], "valid": train_pool[:cut], "test": test_pool}
    # Only now, so that an example is in the same split whatever the limit.
    fitting = {split: [e for e in pool if _fits(e, max_characters)] for split, pool in pools.items()}
    counted["too_long"] = sum(map(len, pools.values())) - sum(map(len, fitting.values()))
    return {split: fitting[split][: sizes.get(split)] for split in SPLITS}, counted


def _fits(example: Example, max_characters: int | None) -> bool:
    return max_characters is None or len(example["prompt"]) + len(example["response"]) <= max_characters
