"""What lies on disk and is read by more than one room: manifest, weight file, predictor file, engine records."""
