"""The passes of an answer as lines: accepted, certain and rejected ids, with marks or colours."""

from specstream_cli.passes import Pass, legend, pass_lines

WORDS = ["", " SELECT", " a", ",", " b", "\n", "</s>"]
PASSES = [
    Pass([1]),
    Pass([2, 3, 4], accepted=[2, 3], drafted=[[2, 3, 5], [2, 1], [4], [2, 3], [4]]),
    Pass([5, 6], accepted=[5, 6], drafted=[[5, 6]]),
    Pass([4], drafted=[[3, 3]]),
]


def decode(ids):
    return "".join(WORDS[i] for i in ids)


def test_passes_without_colour_have_brackets():
    assert list(pass_lines(PASSES, decode, colour=False)) == [
        "  1   SELECT",
        "  2  [ a,] b  {\\n}  { SELECT}  { b}",
        "  3  [\\n</s>]",
        "  4   b  {,,}",
    ]
    assert legend(colour=False, rejected=True) == (
        "[drafted and accepted], the model's own token, {drafted and rejected}"
    )


def test_passes_in_colour_have_the_same_text():
    lines = list(pass_lines(PASSES, decode, colour=True))
    assert lines[0] == "  1  \x1b[1m SELECT\x1b[0m"
    assert lines[1].startswith("  2  \x1b[32m a,\x1b[0m\x1b[1m b\x1b[0m  \x1b[2;31m")
    assert legend(colour=True) == "\x1b[32mdrafted and accepted\x1b[0m, \x1b[1mthe model's own token\x1b[0m"


def test_a_pass_is_drawn_before_the_next_is_made():
    made = []

    def passes():
        for one in PASSES:
            made.append(one)
            yield one

    lines = pass_lines(passes(), decode, colour=False)
    next(lines)
    assert len(made) == 1


def test_letters_of_several_tokens_are_drawn_where_they_are_complete():
    """Red when: ids are decoded one by one, so that half letters show."""
    tokens = "é".encode()

    def decode_bytes(ids):
        return bytes(tokens[i] for i in ids).decode(errors="ignore")

    assert list(pass_lines([Pass([0]), Pass([1])], decode_bytes, colour=False)) == ["  1  ", "  2  é"]
