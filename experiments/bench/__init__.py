"""How fast it is, against what one would use instead, in one run."""
