"""Stop strings cut a stream of text where they would cut the whole text, however it is cut into pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llm_infer.text.stop_strings import StopStrings


@given(
    pieces=st.lists(st.text("ab\n", max_size=4), max_size=12),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
)
def test_any_cutting_gives_the_same_text(pieces: list[str], stops: list[str], include: bool) -> None:
    text = "".join(pieces)
    ends = [(text.index(s) + len(s), text.index(s), s) for s in stops if s in text]
    stream = StopStrings(stops, include=include)
    given_out, fed = "", ""
    for piece in pieces:
        fed += piece
        given_out += stream.push(piece)
        # Nothing is held back for longer than a stop string may still come of it.
        assert stream.found or len(fed) - len(given_out) < max(map(len, stops))
        assert (stream.found is not None) == any(s in fed for s in stops)
        if stream.found:
            break
    given_out += stream.finish()
    if ends:
        end, start, stop = min(ends)
        assert stream.found == stop
        assert given_out == text[: end if include else start]
    else:
        assert stream.found is None and given_out == text


def test_nothing_is_searched_before_its_time() -> None:
    stream = StopStrings(["end"])
    assert stream.push("an end, ", search=False) == "an end, "
    assert stream.push("the e") + stream.push("nd") == "the "
    assert stream.found == "end" and stream.push("more") == "" and stream.finish() == ""
