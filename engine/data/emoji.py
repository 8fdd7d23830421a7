"""Skin tones of emoji by their hexadecimal code points; used by unpacking and the data set."""

TONES = {  # the five modifiers, Fitzpatrick 1-2, 3, 4, 5 and 6
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}


def emoji_tone(code: str) -> str:
    """The skin tone of a hexcode: none, one of five from light to dark, or mixed."""
    tones = {TONES[part] for part in code.upper().split("-") if part in TONES}
    return "mixed" if len(tones) > 1 else next(iter(tones), "none")
