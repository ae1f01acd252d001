"""A run's folder, its attempts, and what it was made with."""
