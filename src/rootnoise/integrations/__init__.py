"""Private training inside other libraries: one file and one extra each, imported only when used."""
