"""What clothes and digits are called, and the sentences in which their names stand."""

from __future__ import annotations

# What the classes are called; the first name is the one that fine-tuning uses.
Names = tuple[tuple[str, ...], ...]
CLOTHES: Names = (
    ("t-shirt", "tee", "top"),
    ("trousers", "pants", "slacks"),
    ("pullover", "sweater", "jumper"),
    ("dress", "frock", "gown"),
    ("coat", "overcoat", "jacket"),
    ("sandal", "slipper", "flip-flop"),
    ("shirt", "blouse", "button-up"),
    ("sneaker", "trainer", "running shoe"),
    ("bag", "handbag", "purse"),
    ("ankle boot", "boot", "bootie"),
)
DIGITS: Names = (
    ("zero", "nought", "0"),
    ("one", "single", "1"),
    ("two", "pair", "2"),
    ("three", "trio", "3"),
    ("four", "quartet", "4"),
    ("five", "quintet", "5"),
    ("six", "sextet", "6"),
    ("seven", "septet", "7"),
    ("eight", "octet", "8"),
    ("nine", "nonet", "9"),
)
PROMPTS = ("a photo of a {}", "the nice {}", "{}", "a small grey picture of a {}")
