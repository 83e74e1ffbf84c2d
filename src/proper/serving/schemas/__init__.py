"""Pydantic schemas of the HTTP API: generation requests, generation replies, and the other resources."""
