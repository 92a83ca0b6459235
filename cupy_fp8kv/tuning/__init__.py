"""Searching for plans by measuring: what may be chosen, the search, where its results are kept, and the study."""
