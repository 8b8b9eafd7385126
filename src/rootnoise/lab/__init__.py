"""Data, models and runs behind the commands `train`, `demo` and `audit`."""
