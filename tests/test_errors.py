"""support/errors.py: texts for messages."""

from support.errors import counted, error_text


def test_long_texts_are_cut_between_words():
    for word in ("a-word-with-hyphens", "words", "/a/path/to-a-file.png"):
        text = error_text(ValueError(f"{word}\n" * 99))
        *words, end = text.split(" ")
        assert (set(words), end) == ({word}, "...")
        assert 170 < len(text) <= 200
    assert error_text(ValueError("a  short\none")) == "a short one"
    assert error_text(ValueError()) == "ValueError"


def test_one_is_not_counted_as_many():
    assert [counted(n, "image") for n in (0, 1, 2, 1000)] == ["0 images", "1 image", "2 images", "1,000 images"]
