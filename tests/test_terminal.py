"""What reaches a terminal is shown and not obeyed."""

from sightline.terminal import harmless


def test_a_terminal_obeys_no_text():
    assert harmless("\x1b[2Jé\ta\n") == "\\x1b[2Jé\ta\n"


def test_line_ends_of_windows_are_line_ends():
    assert harmless("one\r\ntwo\rthree") == "one\ntwo\\rthree"
