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


SPECIAL = {"<end>": 500, "<end>>": 501, "<s>": 502}


@given(
    pieces=st.lists(st.sampled_from(["a", "<end>", 500, 501, 502, "b<"]), max_size=10),
    stops=st.lists(st.sampled_from(["<end>", "a<end>", "<end>>b", "<end><end>", "ab"]), min_size=1, max_size=3),
    include=st.booleans(),
)
def test_special_tokens_that_the_text_leaves_out_are_found(
    pieces: list[str | int], stops: list[str], include: bool
) -> None:
    names = {i: text for text, i in SPECIAL.items()}
    stream = StopStrings(stops, include=include, special_tokens=SPECIAL)
    given_out, shown, whole, between = "", "", "", [""]  # `between` tokens that stop strings name
    for piece in pieces:
        given_out += stream.push(piece if isinstance(piece, str) else stream.marks.get(piece, ""))
        if isinstance(piece, str):
            shown += piece
            between[-1] += piece
        elif piece in stream.marks:
            between.append("")
        whole += piece if isinstance(piece, str) else names[piece]
        if stream.found:
            break
    given_out += stream.finish()
    if stream.found is None:
        assert given_out == shown and not any(stop in piece for stop in stops for piece in between)
        # Only a token that no stop string names may hide one.
        assert not any(stop in whole for stop in stops) or any(i not in stream.marks for i in names)
    else:
        assert stream.found in stops and (given_out.endswith(stream.found) or not include)
        visible = given_out.removesuffix(stream.found) if include else given_out
        assert shown.startswith(visible)


def test_a_stop_string_that_is_a_special_token_ends_the_text() -> None:
    for stop, tokens, text in [
        ("<end>", ["a", 500], "a"),
        ("<end>", ["a", "<en", "d>"], "a"),
        ("b<end>a", ["ab", 500, "a"], "a"),
        ("<end>\n", ["a", 500, "b", 500, "\n"], "ab"),
    ]:
        stream = StopStrings([stop], special_tokens=SPECIAL)
        assert stream.marks.keys() == {500}
        out = "".join(stream.push(t if isinstance(t, str) else stream.marks[t]) for t in tokens)
        assert stream.found == stop and out == text
