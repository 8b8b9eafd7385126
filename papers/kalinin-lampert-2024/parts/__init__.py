"""The parts of the reproduction: what is computed, judged, drawn and shown of each."""
