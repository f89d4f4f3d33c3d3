"""The passes of an answer as lines: accepted, certain and rejected ids, with marks or colours."""

import re

from specstream_cli.passes import Pass, PassLines, legend

WORDS = ["", " SELECT", " a", ",", " b", "\n", "</s>"]
PASSES = [
    Pass([1]),
    Pass([2, 3, 4], accepted=[2, 3], drafted=[[2, 3, 5], [2, 1], [4], [2, 3], [4]]),
    Pass([5, 6], accepted=[5, 6], drafted=[[5, 6]]),
    Pass([4], drafted=[[3, 3]]),
]


def decode(ids):
    return "".join(WORDS[i] for i in ids)


def lines(passes, decode=decode, *, coloured=False):
    drawn = PassLines(decode, coloured=coloured)
    return [drawn.line(one) for one in passes]


def test_passes_without_colour_have_brackets():
    assert lines(PASSES) == [
        "  1   SELECT",
        "  2  [ a,] b  {\\n}  { SELECT}  { b}",
        "  3  [\\n</s>]",
        "  4   b  {,,}",
    ]
    assert legend(coloured=False) == "[drafted and accepted], the model's own token, {drafted and rejected}"


def test_passes_in_colour_have_the_same_text():
    drawn = lines(PASSES, coloured=True)
    assert drawn[0] == "  1  \x1b[1m SELECT\x1b[0m"
    assert drawn[1].startswith("  2  \x1b[32m a,\x1b[0m\x1b[1m b\x1b[0m  \x1b[2;31m")
    bare = [re.sub("\x1b\\[[0-9;]*m", "", line) for line in drawn]
    assert bare == [re.sub(r"[\[\]{}]", "", line) for line in lines(PASSES)]
    assert legend(coloured=True).split(", ") == [
        "\x1b[32mdrafted and accepted\x1b[0m",
        "\x1b[1mthe model's own token\x1b[0m",
        "\x1b[2;31mdrafted and rejected\x1b[0m",
    ]


def test_letters_of_several_tokens_are_drawn_where_they_are_complete():
    """Red when: ids are decoded one by one, so that half letters show."""
    ids = "né".encode()

    for errors in ("ignore", "replace"):

        def decode_bytes(tokens, errors=errors):
            return bytes(ids[i] for i in tokens).decode(errors=errors)

        assert lines([Pass([0]), Pass([1]), Pass([2])], decode_bytes) == ["  1  n", "  2  ", "  3  é"]
        rejected = lines([Pass([0, 1], accepted=[0], drafted=[[0, 0]])], decode_bytes)
        assert rejected == ["  1  [n]  {n}"]


def test_a_long_text_is_not_decoded_again_in_every_pass():
    """Red when: a line takes longer the longer the text is."""
    most = 0

    def decode_counted(ids):
        nonlocal most
        most = max(most, len(ids))
        return decode(ids)

    assert lines([Pass([1, 2])] * 50, decode_counted)[-1] == " 50   SELECT a"
    assert most < 20
