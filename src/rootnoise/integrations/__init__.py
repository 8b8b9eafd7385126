"""Hosts that rootnoise trains in: one file each, imported on demand."""
