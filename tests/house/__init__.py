"""The repository itself: its layers, its documentation, its package, its CI."""
