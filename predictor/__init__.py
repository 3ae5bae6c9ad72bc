"""Calibration traces, importance criteria, training of predictors, and selectors for evaluation."""
