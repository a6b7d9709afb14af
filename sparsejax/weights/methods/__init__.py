"""Published methods, each a rule of `sparsify`."""
