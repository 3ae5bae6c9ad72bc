"""An OpenAI-compatible HTTP server for a bundle, with a page to try it."""
