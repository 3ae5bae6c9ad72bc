"""Sessions that run a bundle, and the generation loop over them."""
