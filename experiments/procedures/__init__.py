"""Procedures around training, and what claims measure of them and of layers."""
