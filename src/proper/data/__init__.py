"""Data pipeline: read interaction files, split them into user histories and held-out queries, and batch them.

Imports no layers and no models; the token count comes in as a callable.
"""
