"""Private training in other libraries: one file and one optional extra each, imported on use."""
