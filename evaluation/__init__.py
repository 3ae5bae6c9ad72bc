"""Measurement of quality and speed, validation of bundles, and the choice of budgets."""
