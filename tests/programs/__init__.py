"""What a loss may be made of: transformations, rules of its own, and programs drawn at random."""
