"""rootnoise inside other libraries: one file and one extra each, imported only by name."""
