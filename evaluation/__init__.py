"""What a budget costs in quality and gives in speed."""
