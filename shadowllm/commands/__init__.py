"""One module per command: ``configure`` adds its options to a parser, ``run`` does the work."""
