"""KV caches: what a query may see under a budget, which entries are chosen, and where they are kept."""
