"""The colours and lines of every picture: told apart in grey, and by the colour-blind."""

from __future__ import annotations

# Okabe & Ito (2008), readable on white; all but the black on black too.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
AMBER, SKY, BLACK, BROWN = "#E69F00", "#56B4E9", "#000000", "#8C6D31"
GREY = "#777777"  # axes, and what the rest is compared with

# The i-th curve of a picture; its marker tells it from the others in grey.
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, BLACK, BROWN)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
DASHES = ("-", "--", "-.", ":")
