"""One file per experiment: each has a `get_config()`."""
