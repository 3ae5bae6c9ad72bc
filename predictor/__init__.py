"""Selectors: calibration traces, importance criteria, trained predictors and their artefact."""
