"""Interaction log, fit queue, and deletion of users from every file of a run folder."""
