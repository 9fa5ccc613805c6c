"""Texts in labels of figures stay texts."""

import html

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.reports.page.labels import label, shortened


@given(st.text())
def test_a_label_has_no_tags_and_means_the_same_text(text: str) -> None:
    made = label(text, 10_000)
    assert not set("<>") & set(made)
    assert html.unescape(made) == shortened(text, 10_000)


@given(st.text(), st.integers(5, 80))
def test_a_label_is_one_line_of_limited_length(text: str, longest: int) -> None:
    line = shortened(text, longest)
    assert len(line) <= longest
    assert line.splitlines() == [line] * bool(line)


@pytest.mark.parametrize("longest", [9, 10])
def test_the_ends_of_a_long_text_stay(longest: int) -> None:
    line = shortened("model.layers.17.self_attn.q_proj", longest)
    assert line.startswith("mode")
    assert line.endswith("proj")
    assert len(line) == longest
