"""Launchers, tasks and models; the library itself is `sparsejax`."""
