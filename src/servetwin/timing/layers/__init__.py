"""Measured times of one transformer layer as functions that can be asked anywhere (rules: docs/profiles.md)."""
