"""Block keys are equal exactly when the blocks' tokens are."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servetwin.workload.identity import keys_of, own_seed
from servetwin.workload.table import RequestTable

OUTPUT = 7
"""output tokens expanded by the naive model"""


def table_of(prompt_tokens: list[int], **columns: object) -> RequestTable:
    zeros = np.zeros(len(prompt_tokens), np.int64)
    return RequestTable(zeros, np.array(prompt_tokens, np.int64), zeros + OUTPUT, **columns)  # type: ignore[arg-type]


def naive_tokens(table: RequestTable, request: int) -> list[Hashable]:
    if table.token_ids is not None:
        prompt: list[Hashable] = [int(token) for token in table.token_ids[request]]
    elif table.segments is not None:
        prompt = [(seed, j) for seed, length in table.segments[request] for j in range(length)]
    else:
        prompt = [(own_seed(request), j) for j in range(int(table.input_tokens[request]))]
    return prompt + [(table.output_seed(request), j) for j in range(OUTPUT)]


def assert_keys_mean_tokens(table: RequestTable, block_size: int) -> None:
    by_key: dict[Hashable, tuple[Hashable, ...]] = {}
    by_tokens: dict[tuple[Hashable, ...], Hashable] = {}
    for request in range(len(table)):
        tokens, keys = naive_tokens(table, request), keys_of(table, request, block_size)
        for i in range(len(tokens) // block_size):
            block = tuple(tokens[i * block_size : (i + 1) * block_size])
            assert by_key.setdefault(keys.key(i), block) == block
            assert by_tokens.setdefault(block, keys.key(i)) == keys.key(i)


# few seeds and short lengths, so that equal blocks are common; -1 and -2 quote the outputs of requests 0 and 1
segment = st.tuples(st.sampled_from([0, 1, 2, -1, -2]), st.integers(0, 6))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(segment, max_size=5), min_size=1, max_size=5), st.integers(1, 5))
def test_segments(prompts: list[list[tuple[int, int]]], block_size: int) -> None:
    table = table_of([sum(length for _, length in prompt) for prompt in prompts], segments=prompts)
    assert_keys_mean_tokens(table, block_size)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), max_size=9), min_size=1, max_size=5), st.integers(1, 4))
def test_literal_ids(prompts: list[list[int]], block_size: int) -> None:
    table = table_of(list(map(len, prompts)), token_ids=[np.array(prompt, np.int32) for prompt in prompts])
    assert_keys_mean_tokens(table, block_size)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(1, 5))
def test_prompts_of_their_own(lengths: list[int], block_size: int) -> None:
    assert_keys_mean_tokens(table_of(lengths), block_size)


def test_keys_have_the_canonical_form() -> None:
    keys = keys_of(table_of([20], segments=[[(5, 10), (6, 10)]]), 0, 8)
    # Seeds 5, 6 and -1 are folded to 10, 12 and 1.
    assert [keys.key(i) for i in range(4)] == [(10, 0, 8), (10, 8, 2, 12, 0, 6), (12, 6, 4, 1, 0, 4), (1, 4, 8)]
    keys = keys_of(table_of([3], token_ids=[np.array([7, 8, 9], np.int64)]), 0, 2)
    first, rest = np.array([7, 8], np.int32).tobytes(), np.array([9], np.int32).tobytes()
    assert [keys.key(i) for i in range(3)] == [first, (rest, 1, 0, 1), (1, 1, 2)]


def test_the_output_has_no_end() -> None:
    assert keys_of(table_of([4]), 0, 16).key(10**12) == (1, 16 * 10**12 - 4, 16)


def test_hashes_of_answers_differ() -> None:
    """hash(-1) == hash(-2), and the answers of requests 0 and 1 have these seeds."""
    table = table_of([16, 16])
    assert len({hash(keys_of(table, request, 16).key(1)) for request in range(2)}) == 2


def test_a_prompt_that_does_not_add_up_is_a_fault() -> None:
    with pytest.raises(ValueError, match="request 0 has 3 tokens in its prompt, but input_tokens says 4"):
        keys_of(table_of([4], segments=[[(0, 3)]]), 0, 16)
