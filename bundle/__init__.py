"""The file formats that several packages share: manifest, weight file, predictor file and engine records."""
