"""Adapters at rest: the store of everything that belongs to one user, and the cache of slots in front of it."""
