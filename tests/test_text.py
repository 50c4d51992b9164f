"""When two texts count as equal, and prompts."""

import random
import re
import unicodedata

import pytest

from f2llm.text import normalise, prompted, without_prompt


@pytest.mark.parametrize("alphabet", [[chr(code) for code in range(128)], list("aB9_ -é字ｆＦﬁ²ß\u0301\n")])
def test_folding_agrees_with_its_definition(alphabet):
    draw = random.Random(0)
    for _ in range(2000):
        text = "".join(draw.choices(alphabet, k=draw.randint(0, 12)))
        folded = unicodedata.normalize("NFKC", text).casefold()
        assert normalise(text) == re.sub(r"[\W_]+", " ", folded).strip(), repr(text)


def test_case_punctuation_and_width_do_not_count():
    assert normalise("  Hello,\tＷorld_1! ") == normalise("hello world 1") == "hello world 1"
    assert normalise("...") == ""
    assert normalise("Straße") == normalise("STRASSE")
    assert normalise("你好。") == normalise("你好")
    assert normalise("hello") != normalise("hallo")


def test_a_prompt_is_put_before_a_text_and_taken_off():
    text = "where?\nQuery: here"
    assert prompted(text, "Find it.") == "Instruct: Find it.\nQuery: where?\nQuery: here"
    assert without_prompt(prompted(text, "Find it.")) == text
    assert prompted(text, None) == text == without_prompt(text)
    assert without_prompt("Instruct: me") == "Instruct: me"
