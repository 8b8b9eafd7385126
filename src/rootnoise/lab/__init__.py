"""Data, models and runs behind the commands `train`, `reproduce` and `audit`."""
