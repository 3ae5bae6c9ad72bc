"""``SelectTopK``: the indices of the largest scores of each row, in ascending order."""
