"""Where cached results live: one file per backend, and what they have in common."""
