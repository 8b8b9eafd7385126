"""WHAT IT COSTS: the same questions put to rootnoise and to others, each in a process of its own.

A side (`ours`, `with_opacus`, or a rival's script outside of the package) answers one question a
line. `clock` and `models` need nothing of rootnoise, so that rivals import them where it is not
installed. `questions` asks, `tables` shows.
"""
